"""lowrank/layers.py: products of two layers in place of one, and separate layers for queries, keys
and values."""

import pytest
import torch
from torch import nn

from helpers import cached_logits, make, same, svd, tokens
from lowrank.layers import LowRankLinear, SplitProjection, fuse

pytestmark = pytest.mark.usefixtures('one_thread')
# (m, n)
each_shape = pytest.mark.parametrize('shape', [(12, 7), (7, 12), (9, 9)],
                                     ids=['tall', 'wide', 'square'])
each_dtype = pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
each_bias = pytest.mark.parametrize('bias', [True, False])


def fused(layer):
    """Mark a linear layer as a projection to queries, keys and values."""
    layer.heads, layer.rows = dict.fromkeys('qkv', 1), [len(layer.weight) // 3] * 3
    return layer


def dense(shape, bias=True, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    layer = nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype)
    with torch.no_grad():
        layer.weight.normal_()
    return layer


@pytest.mark.any_device
@each_shape
@each_dtype
@each_bias
def test_no_weight_of_that_rank_is_nearer(shape, dtype, bias, device):
    """At every rank the error is the norm of the discarded singular values, which is the least
    possible. Both factors have the scale sqrt(S), and the merged layer computes the same."""
    dtype = torch.float32 if device == 'mps' else dtype
    layer, x = dense(shape, bias, dtype).to(device), torch.randn(3, shape[1],
                                                                 dtype=dtype).to(device)
    s = torch.linalg.svdvals(layer.weight.detach().cpu().double())
    atol = 100 * torch.finfo(dtype).eps * s[0].item()
    for rank in range(1, min(shape) + 1):
        product = LowRankLinear.from_linear(layer, rank)
        merged = product.merge()
        assert product.rank == rank and product.weight.dtype == merged.weight.dtype == dtype
        for found, expected in ((torch.linalg.norm(layer.weight - merged.weight), s[rank:].norm()),
                                (product.A.weight.norm(dim=1), s[:rank].sqrt()),
                                (product.B.weight.norm(dim=0), s[:rank].sqrt()),
                                (product(x), merged(x)), (product.weight, merged.weight)):
            torch.testing.assert_close(found.cpu().double(),
                                       expected.cpu().double(), rtol=0, atol=atol)
        assert same([layer.bias] * 3,
                    [product.bias, product.B.bias, merged.bias]) and product.A.bias is None


@pytest.mark.parametrize('trained', [True, False])
def test_no_larger_tensor_is_kept_and_all_are_of_the_layers_kind(trained):
    """Factors and parts own their memory and have the dtype and requires_grad of the original
    layer. A view would keep all of the larger tensor in memory."""
    layer = dense((300, 200), dtype=torch.bfloat16).requires_grad_(trained)
    product, parts = LowRankLinear.from_linear(layer, 2), SplitProjection(fused(layer)).children()
    for module, numbers in ((product, 2 * 500 + 300), (product.merge(), 300 * 201),
                            *((part, 100 * 201) for part in parts)):
        assert {(p.dtype, p.requires_grad)
                for p in module.parameters()} == {(torch.bfloat16, trained)}
        assert sum(p.untyped_storage().nbytes() for p in module.parameters()) == 2 * numbers
        assert not {p.data_ptr()
                    for p in module.parameters()} & {p.data_ptr() for p in layer.parameters()}


@each_bias
@each_dtype
def test_split_and_fused_again_it_is_the_same_to_the_bit(bias, dtype):
    """Splitting a projection and fusing it again gives bit-identical weights. A part may be a
    product of two layers."""
    whole, x = dense((12, 5), bias, dtype), torch.randn(2, 5, dtype=dtype)
    parts = [*SplitProjection(fused(whole)).children()]
    assert same(fuse(parts), (whole.weight, whole.bias))
    assert [tuple(part.weight.shape) for part in parts] == [(4, 5)] * 3
    torch.testing.assert_close(torch.cat([part(x) for part in parts], dim=1), whole(x))
    product = LowRankLinear.from_linear(parts[1], 2)
    assert torch.equal(fuse([parts[0], product])[0][4:], product.weight)


@each_bias
@pytest.mark.parametrize('scope', [None, 'weight', 'causal', 'sequence'])
def test_a_model_with_queries_keys_and_values_apart_is_the_same_model(scope, bias):
    """A model with separate query, key and value layers has the logits of the fused model, with and
    without a cache, and a cache of the same size."""
    options = dict(bias=bias, n_kv_head=1, **(svd(scope, svd_targets='q,v') if scope else
                                              dict(qk_head_dim=[3, 4], v_head_dim=[2, 1])))
    model, apart, idx = make(**options), make(**options), tokens(3)
    for block in apart.transformer.h:
        block.attn.c_attn = SplitProjection(block.attn.c_attn)
    expected = model(idx, idx)[0]
    assert (apart(idx, idx)[0] - expected).abs().max() <= 1e-9
    if scope != 'sequence':
        assert (cached_logits(apart, idx, 5) - expected).abs().max() <= 1e-9
        one_prompt = cached_logits(apart, idx[:1].expand(3, -1), 5, one_prompt=True)
        assert (one_prompt - expected[:1]).abs().max() <= 1e-9
    assert apart.kv_cache_bytes(2, 9) == model.kv_cache_bytes(2, 9)

"""lowrank/layers.py: products of two layers in the place of one, and queries, keys and values apart."""

import io

import pytest
import torch
from torch import nn

from helpers import cached_logits, make, svd, tokens
from lowrank.layers import LowRankLinear, SplitProjection, fuse, split
from model import GPTConfig, QKVProjection

pytestmark = pytest.mark.usefixtures('one_thread')
SHAPES = (12, 7), (7, 12), (9, 9)                                   # (m, n)
each_shape = pytest.mark.parametrize('shape', SHAPES, ids=['tall', 'wide', 'square'])
each_dtype = pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
each_bias = pytest.mark.parametrize('bias', [True, False])


def dense(shape, bias=True, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    layer = nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype)
    with torch.no_grad():
        layer.weight.normal_()
    return layer


def stored(*tensors):
    """Bytes of the file that holds them."""
    file = io.BytesIO()
    torch.save(tensors, file)
    return file.tell()


@each_shape
@each_dtype
@each_bias
def test_no_weight_of_that_rank_is_nearer(shape, dtype, bias):
    """What is lost is the tail of the singular values, at every rank; the factors are sqrt(S) V^T and U sqrt(S)."""
    layer, eps = dense(shape, bias, dtype), torch.finfo(dtype).eps
    u, s, vh = torch.linalg.svd(layer.weight.detach().double(), full_matrices=False)
    for rank in range(1, min(shape) + 1):
        product = LowRankLinear.from_linear(layer, rank)
        merged = product.merge()
        assert type(product.A) is type(product.B) and isinstance(product.A, nn.Linear) and isinstance(merged, nn.Linear)
        assert (product.A.weight.shape, product.B.weight.shape) == ((rank, shape[1]), (shape[0], rank))
        assert product.rank == rank and product.weight.dtype == merged.weight.dtype == product.A.weight.dtype == dtype
        lost = (layer.weight - merged.weight).double().norm()
        assert lost.item() == pytest.approx(s[rank:].square().sum().sqrt().item(), abs=100 * eps * s[0].item())
        a, b = product.A.weight.detach().double(), product.B.weight.detach().double()
        root, signs = s[:rank].sqrt(), (a * vh[:rank]).sum(1).sign()
        assert torch.allclose(a * signs[:, None], root[:, None] * vh[:rank], atol=100 * eps)
        assert torch.allclose(b * signs, u[:, :rank] * root, atol=100 * eps)
        assert torch.allclose(product.weight, merged.weight, atol=20 * eps)
        if bias:
            assert torch.equal(product.bias, layer.bias) and torch.equal(merged.bias, layer.bias)
        else:
            assert product.bias is product.A.bias is product.B.bias is merged.bias is None


@each_shape
@each_dtype
@each_bias
def test_it_computes_what_its_merged_layer_does(shape, dtype, bias):
    layer = dense(shape, bias, dtype)
    for rank in (1, 4, min(shape)):
        product, x = LowRankLinear.from_linear(layer, rank), torch.randn(2, 3, shape[1], dtype=dtype)
        expected = product.merge()(x)
        assert (product(x) - expected).abs().max() <= 50 * torch.finfo(dtype).eps * expected.abs().max()
        assert rank < min(shape) or torch.allclose(expected, layer(x), atol=1e-5)


@each_shape
@pytest.mark.parametrize('rank', [0, -1, 10])
def test_a_rank_that_cannot_be(shape, rank):
    with pytest.raises(ValueError, match=f'^rank={rank}: must be 1 to {min(shape)} for a layer of {shape[0]} x'):
        LowRankLinear(shape[1], shape[0], rank)
    with pytest.raises(ValueError, match=rf'rank.*{rank}'):
        LowRankLinear.from_linear(dense(shape), rank)


def test_no_larger_tensor_is_kept_or_stored():
    """Factors and parts that were cut from a larger tensor would take all of it with them."""
    layer, whole = dense((300, 200)), dense((300, 200))
    product = LowRankLinear.from_linear(layer, 2)
    parts = split(whole, 3)
    for module, numbers in ((product, 2 * 500 + 300), *((part, 100 * 201) for part in parts)):
        assert sum(p.numel() for p in module.parameters()) == numbers
        assert sum(p.untyped_storage().nbytes() for p in module.parameters()) == 8 * numbers
        assert stored(*module.state_dict().values()) < 8 * numbers + 4000
    assert stored(layer.weight.detach()[:2]) > 8 * 300 * 200        # the measure is not blind


def test_a_layer_of_any_kind_is_left_alone_and_its_kind_kept():
    """bfloat16, without gradients; the factors are copies, and training goes on in them."""
    layer = dense((6, 5), dtype=torch.bfloat16).requires_grad_(False)
    before = layer.weight.clone()
    product = LowRankLinear.from_linear(layer, 3)
    assert {p.dtype for p in (*product.parameters(), product.merge().weight)} == {torch.bfloat16}
    product.requires_grad_(False).A.weight.zero_()
    product.bias.add_(1)
    assert torch.equal(layer.weight, before) and not torch.equal(layer.bias, product.bias)


@each_bias
def test_gradients_reach_every_parameter(bias):
    """They are those of the merged weight by the chain rule."""
    product = LowRankLinear.from_linear(dense((6, 5), bias), 3)
    merged, x = product.merge(), torch.randn(4, 5, dtype=torch.float64)
    for layer in (product, merged):
        layer(x).square().sum().backward()
    G = merged.weight.grad
    assert torch.allclose(product.A.weight.grad, product.B.weight.mT @ G)
    assert torch.allclose(product.B.weight.grad, G @ product.A.weight.mT) and G.abs().min() > 0
    assert not bias or torch.allclose(product.bias.grad, merged.bias.grad)
    assert len([*product.parameters()]) == 2 + bias


@each_bias
@each_dtype
def test_split_and_fused_again_it_is_the_same_to_the_bit(bias, dtype):
    whole = dense((12, 5), bias, dtype)
    parts, x = split(whole, 3), torch.randn(2, 5, dtype=dtype)
    weight, fused_bias = fuse(parts)
    assert torch.equal(weight, whole.weight) and weight.dtype == dtype
    assert torch.equal(fused_bias, whole.bias) if bias else fused_bias is None
    assert [tuple(part.weight.shape) for part in parts] == [(4, 5)] * 3
    assert torch.allclose(torch.cat([part(x) for part in parts], dim=1), whole(x))
    with torch.no_grad():
        parts[0].weight.zero_()
    assert whole.weight.abs().min() > 0
    product = LowRankLinear.from_linear(parts[1], 2)
    assert torch.equal(fuse([parts[0], product])[0][4:], product.weight)


@each_bias
def test_queries_keys_and_values_are_those_of_the_fused_projection(bias):
    """With another W_v, too, and as `value_weight`."""
    torch.manual_seed(0)
    fused = QKVProjection(GPTConfig(n_embd=8, n_head=2, bias=bias)).double()
    apart, x, w_v = SplitProjection(fused), torch.randn(2, 5, 8).double(), torch.randn(2, 4, 8).double()
    for given in (None, w_v):
        assert all(torch.allclose(a, b, atol=1e-12) and a.shape == (2, 2, 5, 4)
                   for a, b in zip(apart(x, given), fused(x, given), strict=True))
    assert torch.equal(apart.value_weight(), fused.value_weight())
    assert sum(p.numel() for p in apart.parameters()) == sum(p.numel() for p in fused.parameters())


@each_bias
@pytest.mark.parametrize('scope', [None, 'weight', 'causal', 'sequence'])
def test_a_model_with_them_apart_is_the_same_model(scope, bias):
    """Logits, cached ones at every position, and the bytes of the cache."""
    options = dict(bias=bias, **(svd(scope) if scope else {}))
    model, apart, idx = make(**options), make(**options), tokens(3)
    for block in apart.transformer.h:
        block.attn.c_attn = SplitProjection(block.attn.c_attn)
    with torch.no_grad():
        expected = model(idx, idx)[0]
        assert (apart(idx, idx)[0] - expected).abs().max() <= 1e-9
        if scope != 'sequence':
            assert (cached_logits(apart, idx, 5) - expected).abs().max() <= 1e-9
            assert (cached_logits(apart, idx[:1].expand(3, -1), 5, one_prompt=True) - expected[:1]).abs().max() <= 1e-9
    assert apart.kv_cache_bytes(2, 9) == model.kv_cache_bytes(2, 9)

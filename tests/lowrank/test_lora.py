"""LoRA adapters on frozen layers: how they start, what they compute, and how they merge into the
original weight."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers import normal, same
from lowrank.adapters import to_standard_lora
from lowrank.layers import LoRALinear

pytestmark = pytest.mark.usefixtures('one_thread')
BARS = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 2e-2}  # relative
each_svd = pytest.mark.parametrize('init', ['pissa', 'milora'])
each_case = pytest.mark.parametrize('init, shape, dtype, bias', [   # shape (m, n)
    ('lora', (12, 7), torch.float32, True), ('lora', (7, 12), torch.float64, False),
    ('pissa', (7, 12), torch.float32, True), ('pissa', (9, 9), torch.float64, False),
    ('pissa', (12, 7), torch.float64, True), ('milora', (9, 9), torch.float32, False),
    ('milora', (12, 7), torch.float32, True), ('milora', (7, 12), torch.float64, True),
    ('lora', (12, 16), torch.bfloat16, True), ('pissa', (16, 12), torch.bfloat16, False),
    ('milora', (12, 16), torch.bfloat16, False)])


def relative(y, expected):
    return ((y - expected).abs().max() / expected.abs().max()).item()


def dense(shape=(12, 9), bias=True, dtype=torch.float32, kind='full'):
    """Return a layer whose weight is random, zero or of rank 3."""
    layer = nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype)
    rank = {'full': min(shape), 'zero': 0, 'rank 3': 3}[kind]
    with torch.no_grad():
        layer.weight.copy_(normal(shape[0], rank) @ normal(rank, shape[1], seed=1))
    return layer


def adapted(base, *args, **options):
    """Return a LoRALinear made from a copy of the layer."""
    return LoRALinear(copy.deepcopy(base), *args, **options)


def trained(layer):
    """Move the adapter of a layer far from its initial values, and return the layer."""
    with torch.no_grad():
        for seed, p in enumerate((layer.A.weight, layer.B.weight)):
            p += (.3 * normal(*p.shape, seed=seed + 1)).to(p)
    return layer


@pytest.mark.any_device
@each_case
def test_it_starts_as_the_layer_it_is_made_of(init, shape, dtype, bias, device):
    """At the start a LoRALinear computes what the original layer does. For 'pissa' and 'milora', A
    and B hold the largest or smallest singular values, with sqrt(S) in each, and the base weight
    holds the rest."""
    dtype = torch.float32 if device == 'mps' else dtype
    base, x = dense(shape, bias, dtype).to(device), normal(5, 3, shape[1]).to(device, dtype)
    sigma = torch.linalg.svdvals(base.weight.detach().cpu().double())
    for rank in (1, 3, min(shape)):
        layer = adapted(base, rank, 6.0, init=init)
        assert (layer.rank, layer.scale) == (rank, 6 / rank) and relative(layer(x),
                                                                          base(x)) <= BARS[dtype]
        assert relative(layer.merge().weight, base.weight) <= torch.finfo(dtype).eps
        a, b, left = (w.detach().cpu().double()
                      for w in (layer.A.weight, layer.B.weight, layer.base.weight))
        assert (a.shape, b.shape) == ((rank, shape[1]), (shape[0], rank))
        if init == 'lora':
            assert torch.equal(layer.base.weight, base.weight)
            assert not b.any() and a.abs().max() <= shape[1] ** -.5
            continue
        taken, kept = (sigma[:rank], sigma[rank:]) if init == 'pissa' else (sigma[-rank:],
                                                                            sigma[:-rank])
        for gram in (a @ a.mT, b.mT @ b):
            assert torch.allclose(layer.scale * gram, taken.diag(), atol=BARS[dtype] * sigma[0])
        remaining = torch.cat((kept, 0 * taken))
        assert torch.allclose(torch.linalg.svdvals(left), remaining, atol=BARS[dtype] * sigma[0])


def test_lora_draws_a_as_its_authors_do():
    """A is drawn as in the LoRA paper's code: Kaiming-uniform with a = sqrt(5), so within 1 /
    sqrt(n), from torch's global generator."""
    base, a = dense((300, 400)), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        a.append(adapted(base, 100, 1.0).A.weight)
    assert torch.equal(a[0], a[1]) and not torch.equal(a[0], a[2])
    assert .0499 < a[0].abs().max() <= .05 and a[0].std().item() == pytest.approx(
        .05 / 3 ** .5, rel=.02)


@pytest.mark.any_device
@each_case
def test_merged_it_computes_the_same(init, shape, dtype, bias, device):
    """The layer, its merged nn.Linear and W x + b + s B A x computed by hand agree."""
    dtype = torch.float32 if device == 'mps' else dtype
    base, x = dense(shape, bias, dtype).to(device), normal(5, 3, shape[1]).to(device, dtype)
    layer = trained(adapted(base, 3, 6.0, .5, init)).eval()
    merged, y = layer.merge(), layer(x)
    assert type(merged) is nn.Linear and merged.weight.dtype == dtype and relative(y, base(x)) > .01
    by_hand = F.linear(x, layer.base.weight,
                       base.bias) + 2 * (x @ layer.A.weight.mT @ layer.B.weight.mT)
    for other in (merged(x), F.linear(x, layer.weight, base.bias), by_hand):
        assert relative(y, other) <= 2 * BARS[dtype]
    assert torch.equal(merged.bias, base.bias) if bias else merged.bias is layer.bias is None


@each_svd
@pytest.mark.parametrize('kind', ['zero', 'rank 3'])
def test_every_pair_of_factors_can_learn_where_there_is_nothing_to_take_out(init, kind):
    """Adapters get a gradient even if the singular values they take out are zero. B A is zero
    there, but the rows of A keep the norm sqrt(1e-4 * sigma_1 / scale)."""
    base, x = dense(kind=kind), normal(20, 9).float()
    floor = 1e-4 * torch.linalg.matrix_norm(base.weight.detach(), 2).item() or 1.0
    layer = adapted(base, 8, 4.0, init=init)
    assert layer.A.weight.norm(dim=1).min().item() == pytest.approx((floor / layer.scale) ** .5,
                                                                    rel=1e-5)
    assert layer.B.weight.norm(dim=0).min() <= 1e-5
    assert relative(layer.merge().weight + 1, base.weight + 1) <= 1e-6
    layer(x).square().sum().add(layer(x).sum()).backward()
    assert layer.B.weight.grad.norm(
        dim=0).min() > 0 and layer.base.weight.grad is layer.bias.grad is None


@each_case
def test_an_adapter_of_the_residual_is_a_plain_one_of_the_original(init, shape, dtype, bias):
    """`to_standard_lora` turns an adapter into a plain LoRA of the original weight with the same
    output. For PiSSA and MiLoRA the rank is up to twice as large."""
    base, x = dense(shape, bias, dtype), normal(20, shape[1]).to(dtype)
    for rank in (1, 3, 7):
        layer = trained(adapted(base, rank, 6.0, init=init))
        a, b = to_standard_lora(layer, base.weight)
        r = rank if init == 'lora' else min(2 * rank, *shape)
        assert (a.shape, b.shape) == ((r, shape[1]), (shape[0], r)) and a.dtype == b.dtype == dtype
        assert relative(layer(x), base(x)) > .01
        assert relative(base(x) + layer.scale * x @ a.mT @ b.mT, layer(x)) <= 2 * BARS[dtype]
        assert init != 'lora' or torch.equal(a, layer.A.weight) and torch.equal(b, layer.B.weight)


@each_svd
def test_only_the_weight_it_was_made_of_is_an_original(init):
    """`to_standard_lora` raises a ValueError for any weight but the one that the adapter was made
    from."""
    base = dense((9, 12))
    layer = trained(adapted(base, 3, 3.0, init=init))
    own, converted = (to_standard_lora(made, base.weight)
                      for made in (layer, copy.deepcopy(layer).double()))
    torch.testing.assert_close(converted[1] @ converted[0], (own[1] @ own[0]).double(), rtol=0,
                               atol=1e-3)
    for other in (normal(9, 12, seed=1), layer.base.weight + torch.eye(9, 12), base.weight[:1],
                  layer.merge().weight + base.weight,
                  base.weight * (1 + 1e-4 * normal(9, 12, seed=2).float())):
        with pytest.raises(ValueError, match='^original: .*3 components'):
            to_standard_lora(layer, other)
    base.weight.data[0, 0] = float('nan')
    with pytest.raises(torch.linalg.LinAlgError):
        adapted(base, 3, 6.0, init=init)


def test_dropout_is_of_the_adapters_input_and_in_training():
    """Dropout acts in training only, and only on the input of the adapter. W gets the full
    input."""
    base, x = dense().eval(), normal(4, 9).float()
    layer = trained(adapted(base, 3, 6.0, .4))
    assert not layer.training and torch.equal(layer(x), layer(x))
    assert adapted(base.train(), 3, 6.0, .4).training
    torch.manual_seed(0)
    y = layer.train()(x)
    torch.manual_seed(0)
    assert relative(y,
                    base(x) + 2 * F.dropout(x, .4) @ layer.A.weight.mT @ layer.B.weight.mT) <= 1e-6
    nn.init.zeros_(layer.B.weight)
    assert torch.equal(layer(x), base(x))                           # W gets x without dropout


def test_autocast_changes_outputs_alone():
    """Autocast rounds the outputs of a layer, but not its merged weight or its plain LoRA."""
    base, x = dense((32, 24)), normal(20, 24).float()
    layer = trained(adapted(base, 4, 8.0, init='pissa'))
    with torch.autocast('cpu', torch.bfloat16):
        y, merged, plain = layer(x), layer.merge(), to_standard_lora(layer, base.weight)
    assert y.dtype == torch.bfloat16 and 1e-4 < relative(y.float(),
                                                         layer(x)) <= BARS[torch.bfloat16]
    assert torch.equal(merged.weight, layer.merge().weight)
    assert same(plain, to_standard_lora(layer, base.weight))

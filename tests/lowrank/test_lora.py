"""lowrank/lora.py: adapters of frozen layers, what they start from, and what they are for the original weight."""

import copy
import io

import pytest
import torch
from torch.nn import functional as F

from helpers import cached_logits, equal, make, tokens
from lowrank.lora import FLOOR, INITS, LoRALinear, plain_adapter
from test_layers import dense, each_bias, each_dtype, each_shape

pytestmark = pytest.mark.usefixtures('one_thread')
each_init = pytest.mark.parametrize('init', INITS)
each_svd = pytest.mark.parametrize('init', ['pissa', 'milora'])
BARS = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2}                        # relative


def relative(y, expected):
    return ((y - expected).abs().max() / expected.abs().max()).item()


def trained(layer, seed=1):
    """The layer with an adapter well away from where it began."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (layer.A.weight, layer.B.weight):
            p += (.3 * torch.randn(p.shape, generator=generator)).to(p)
    return layer


def degenerate(kind, shape=(12, 9)):
    """A layer whose weight is zero, or of rank 3."""
    layer = dense(shape, dtype=torch.float32)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(shape[0], 3) @ torch.randn(3, shape[1]) if kind == 'rank 3' else 0)
    return layer


each_degenerate = pytest.mark.parametrize('kind', ['zero', 'rank 3'])


@each_shape
@each_dtype
@each_init
@each_bias
def test_it_starts_as_the_layer_it_is_made_of(shape, dtype, init, bias):
    """A and B show what was taken out: the largest or the smallest singular values, half on either side."""
    base, x = dense(shape, bias, dtype), torch.randn(5, 3, shape[1], dtype=dtype)
    before = copy.deepcopy(base.state_dict())
    sigma = torch.linalg.svdvals(base.weight.detach().double())
    for rank in (1, 3, min(shape)):
        layer = LoRALinear.from_linear(base, rank, 6.0, init=init)
        assert (layer.rank, layer.scale) == (rank, 6 / rank)
        assert relative(layer(x), base(x)) <= BARS[dtype]
        assert relative(layer.merge().weight, base.weight) <= torch.finfo(dtype).eps
        a, b = layer.A.weight.detach().double(), layer.B.weight.detach().double()
        assert (a.shape, b.shape) == ((rank, shape[1]), (shape[0], rank))
        if init == 'lora':
            assert torch.equal(layer.base.weight, base.weight) and not b.any() and a.abs().max() <= shape[1] ** -.5
        else:
            taken = sigma[:rank] if init == 'pissa' else sigma[-rank:]
            for factor in (a, b.mT):
                assert torch.allclose(layer.scale * factor @ factor.mT, taken.diag(), atol=1e-5 * sigma[0])
            left = torch.linalg.svdvals(layer.base.weight.detach().double())
            kept = sigma[rank:] if init == 'pissa' else sigma[:-rank]
            assert torch.allclose(left[:len(kept)], kept, atol=1e-5) and left[len(kept):].sum() <= 1e-4
    assert equal(base.state_dict(), before)                         # and that layer is left alone


def test_lora_draws_a_as_its_authors_do():
    """Kaiming-uniform with a = sqrt(5), within 1 / sqrt(n), from the global generator."""
    base, a = dense((300, 400), dtype=torch.float32), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        a.append(LoRALinear.from_linear(base, 100, 1.0).A.weight)
    assert torch.equal(a[0], a[1]) and not torch.equal(a[0], a[2])
    assert .0499 < a[0].abs().max() <= .05 and a[0].std().item() == pytest.approx(.05 / 3 ** .5, rel=.02)


@each_shape
@each_dtype
@each_init
@each_bias
def test_merged_it_computes_the_same(shape, dtype, init, bias):
    """The adapter as W x + b + s B A x, by hand, and as one weight."""
    base, x = dense(shape, bias, dtype), torch.randn(5, 3, shape[1], dtype=dtype)
    layer = trained(LoRALinear.from_linear(base, 3, 6.0, .5, init)).eval()
    merged, y = layer.merge(), layer(x)
    assert type(merged) is torch.nn.Linear and merged.weight.dtype == dtype and relative(y, base(x)) > .1
    assert relative(merged(x), y) <= 10 * BARS[dtype]
    assert relative(F.linear(x, layer.weight, base.bias), y) <= 10 * BARS[dtype]
    by_hand = F.linear(x, layer.base.weight, base.bias) + 2 * (x @ layer.A.weight.mT @ layer.B.weight.mT)
    assert relative(y, by_hand) <= 10 * BARS[dtype]
    assert torch.equal(merged.bias, base.bias) if bias else merged.bias is layer.bias is None


@each_init
@each_bias
@pytest.mark.parametrize('made_of', ['full', 'zero', 'rank 3'])
def test_gradients_reach_the_adapter_and_nothing_else(init, bias, made_of):
    """In one step, or with LoRA, where B = 0, in two; every pair of a row of A and a column of B takes part."""
    base = dense((12, 9), dtype=torch.float32) if made_of == 'full' else degenerate(made_of)
    base.bias = base.bias if bias else None
    layer = LoRALinear.from_linear(base.requires_grad_(False), 8, 8.0, init=init)
    frozen, x, target = copy.deepcopy(layer), torch.randn(64, 9), torch.randn(64, 12)
    names = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert names == {'A.weight', 'B.weight'}
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    outputs = []
    for step in range(2):
        optimizer.zero_grad()
        outputs.append(layer(x))
        F.mse_loss(outputs[-1], target).backward()
        assert layer.B.weight.grad.norm(dim=0).min() > 1e-4
        optimizer.step()
    assert layer.A.weight.grad.norm(dim=1).min() > 1e-8
    assert relative(outputs[1], outputs[0]) > (1e-6 if made_of == 'zero' else 1e-4)
    assert layer.base.weight.grad is None and torch.equal(layer.base.weight, frozen.base.weight)
    assert not bias or layer.bias.grad is None and torch.equal(layer.bias, frozen.bias)


@each_svd
@each_degenerate
def test_no_pair_is_dead_where_there_is_nothing_to_take_out(init, kind):
    """Rows of A have at least the floor's root; what they stand for is still nothing."""
    base = degenerate(kind)
    sigma_1 = torch.linalg.matrix_norm(base.weight.detach(), 2).item()
    layer = LoRALinear.from_linear(base, 8, 4.0, init=init)
    least = ((FLOOR * sigma_1 if kind == 'rank 3' else 1.0) / layer.scale) ** .5
    assert layer.A.weight.norm(dim=1).min().item() == pytest.approx(least, rel=1e-5)
    assert relative(layer.merge().weight + 1, base.weight + 1) <= 1e-6
    assert layer.B.weight.norm(dim=0).min().item() <= 1e-5


@each_shape
@each_dtype
@each_init
@pytest.mark.parametrize('rank', [1, 3, 7])
def test_an_adapter_of_the_residual_is_a_plain_one_of_the_original(shape, dtype, init, rank):
    base, x = dense(shape, True, dtype), torch.randn(20, shape[1], dtype=dtype)
    layer = LoRALinear.from_linear(base, rank, 6.0, init=init)
    optimizer = torch.optim.AdamW([layer.A.weight, layer.B.weight], lr=.03)
    for _ in range(5):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    a, b = plain_adapter(layer, base.weight)
    assert not a.requires_grad and not b.requires_grad and a.dtype == b.dtype == dtype
    if init == 'lora':
        assert torch.equal(a, layer.A.weight) and torch.equal(b, layer.B.weight)
        assert a.data_ptr() != layer.A.weight.data_ptr() and b.data_ptr() != layer.B.weight.data_ptr()
    assert (a.shape, b.shape) == ((len(a), shape[1]), (shape[0], len(a))) and len(a) == (
        rank if init == 'lora' else min(2 * rank, *shape))
    x = torch.randn(20, shape[1], dtype=dtype)
    expected = layer(x)
    assert relative(base(x) + layer.scale * x @ a.mT @ b.mT, expected) <= 10 * BARS[dtype]
    assert relative(base(x), expected) > .01
    plain = LoRALinear.from_linear(base, len(a), layer.scale * len(a))
    plain.base.load_state_dict(base.state_dict())
    plain.load_state_dict(plain.state_dict() | {'A.weight': a, 'B.weight': b})
    assert relative(plain(x), expected) <= 10 * BARS[dtype]


@each_svd
@each_degenerate
def test_so_is_one_of_a_weight_with_less_than_its_rank(init, kind):
    base, x = degenerate(kind), torch.randn(20, 9)
    layer = trained(LoRALinear.from_linear(base, 5, 5.0, init=init))
    a, b = plain_adapter(layer, base.weight)
    assert relative(base(x) + layer.scale * x @ a.mT @ b.mT, layer(x)) <= 1e-5
    assert len(a) == 5 or kind == 'rank 3'


@each_svd
def test_only_the_weight_it_was_made_of_is_an_original(init):
    base = dense((9, 12), dtype=torch.float32)
    layer = trained(LoRALinear.from_linear(base, 3, 3.0, init=init))
    converted = copy.deepcopy(layer).double()                       # is as far from the original as float32 has made it
    assert all(torch.allclose(one.mT @ one, other.double().mT @ other.double(), atol=1e-3)
               for one, other in zip(plain_adapter(converted, base.weight), plain_adapter(layer, base.weight)))
    for other in (dense((9, 12), seed=1).weight, layer.base.weight + torch.eye(9, 12),
                  layer.merge().weight + base.weight, base.weight * (1 + 1e-4 * torch.randn(9, 12))):
        with pytest.raises(ValueError, match='^original: is not what the layer was made of, .*3 components'):
            plain_adapter(layer, other)
    with pytest.raises(ValueError, match=r'^original: has the shape \(1, 12\), the layer \(9, 12\)'):
        plain_adapter(layer, base.weight[:1])
    with pytest.raises(torch.linalg.LinAlgError, match='non-finite'):
        plain_adapter(layer, base.weight * float('nan'))


def test_dropout_is_of_the_adapters_input_and_in_training():
    base = dense((12, 9), dtype=torch.float32)
    base.eval()
    layer = trained(LoRALinear.from_linear(base, 3, 6.0, .4))
    x = torch.randn(4, 9)
    assert not layer.training and torch.equal(layer(x), layer(x))
    layer.train()
    assert LoRALinear.from_linear(base.train(), 3, 6.0, .4).training
    torch.manual_seed(0)
    y = layer(x)
    assert relative(y, layer(x)) > 1e-2                             # another mask
    torch.manual_seed(0)
    expected = base(x) + 2 * F.dropout(x, .4) @ layer.A.weight.mT @ layer.B.weight.mT
    assert relative(y, expected) <= 1e-6
    with torch.no_grad():
        layer.B.weight.zero_()
    assert torch.equal(layer(x), base(x))                           # W sees all of x


@each_init
@each_bias
def test_it_is_rebuilt_from_its_shape_and_state_to_the_bit(init, bias):
    base, x = dense((12, 9), bias, torch.float32), torch.randn(4, 9)
    layer, file = trained(LoRALinear.from_linear(base, 3, 6.0, .1, init)).eval(), io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert [*state] == ['base.weight', *['base.bias'] * bias, 'A.weight', 'B.weight']
    again = LoRALinear(9, 12, 3, 6.0, .1, bias).eval()
    assert not again.B.weight.any() and not equal(again.state_dict(), state)
    again.load_state_dict(state)
    assert equal(again.state_dict(), layer.state_dict()) and torch.equal(again(x), layer(x))
    assert [p.requires_grad for p in again.parameters()] == [False, *[False] * bias, True, True]


@pytest.mark.parametrize('change, message', [
    ({'rank': 0}, '^rank=0: must be 1 to 7 for a layer of 12 x 7$'), ({'rank': -1}, '^rank=-1: '),
    ({'rank': 8}, '^rank=8: must be 1 to 7'), ({'alpha': 0}, '^alpha=0: must be above 0 and finite'),
    ({'alpha': -1.0}, '^alpha=-1.0: '),
    ({'alpha': float('nan')}, '^alpha=nan'), ({'alpha': float('inf')}, '^alpha=inf'),
    ({'dropout': 1.0}, '^dropout=1.0: must be at least 0 and below 1'), ({'dropout': -.1}, '^dropout=-0.1'),
    ({'dropout': float('nan')}, '^dropout=nan'),
    ({'init': 'olora'}, "^init='olora': must be one of lora, pissa, milora$"),
])
def test_what_cannot_be(change, message):
    options = {'rank': 3, 'alpha': 6.0, 'dropout': .1, **change}
    with pytest.raises(ValueError, match=message):
        LoRALinear.from_linear(dense((12, 7)), **options)
    if 'init' not in change:
        with pytest.raises(ValueError, match=message):
            LoRALinear(7, 12, **options)


@each_svd
def test_a_weight_that_is_not_finite_has_no_parts(init):
    base = dense((12, 9))
    base.weight.data[0, 0] = float('inf')
    with pytest.raises(torch.linalg.LinAlgError, match='non-finite'):
        LoRALinear.from_linear(base, 3, 6.0, init=init)


@each_init
def test_bfloat16_stays_what_it_is(init):
    """Taken apart in float64 and rounded once: the merged weight is the original but for a last digit."""
    base, x = dense((32, 24), dtype=torch.bfloat16), torch.randn(20, 24, dtype=torch.bfloat16)
    layer = LoRALinear.from_linear(base, 4, 8.0, init=init)
    assert {p.dtype for p in (*layer.parameters(), layer.merge().weight)} == {torch.bfloat16}
    assert relative(layer.merge().weight, base.weight) <= 2 ** -8
    assert relative(layer(x), base(x)) <= BARS[torch.bfloat16]
    a, b = plain_adapter(trained(layer), base.weight)
    assert relative(base(x) + layer.scale * x @ a.mT @ b.mT, layer(x)) <= BARS[torch.bfloat16]


def test_autocast():
    base, x = dense((32, 24), dtype=torch.float32), torch.randn(20, 24)
    layer = trained(LoRALinear.from_linear(base, 4, 8.0, init='pissa'))
    with torch.autocast('cpu', torch.bfloat16):
        y = layer(x)
        merged = layer.merge()
        plain = plain_adapter(layer, base.weight)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and 1e-4 < relative(y.float(), layer(x)) <= BARS[torch.bfloat16]
    assert layer.A.weight.grad.dtype == torch.float32 and torch.equal(merged.weight, layer.merge().weight)
    assert all(torch.equal(one, other) for one, other in zip(plain, plain_adapter(layer, base.weight)))


@each_bias
def test_a_model_decodes_with_adapters(bias):
    """Cached logits at every position are the uncached ones, and those of the merged layers."""
    model, idx = make(bias=bias), tokens(2)
    merged = copy.deepcopy(model)
    for i, module in ((0, 'c_proj'), (1, 'c_fc')):
        name, init = f'h.{i}.mlp.{module}', INITS[i + 1]
        base = model.transformer.get_submodule(name)
        model.set_layer(name, trained(LoRALinear.from_linear(base, 3, 6.0, .5, init)))
        merged.set_layer(name, model.transformer.get_submodule(name).merge())
    with torch.no_grad():
        expected = merged(idx, idx)[0]
        assert (model(idx, idx)[0] - expected).abs().max() <= 1e-9
        assert (cached_logits(model, idx, 5) - expected).abs().max() <= 1e-9


@pytest.mark.slow
@pytest.mark.parametrize('backend', ['aot_eager', 'inductor'])
def test_compiles_to_one_graph_with_the_same_result(backend):
    """Output and gradients; in training with the same mask, where the backend draws as eager does."""
    base, x = dense((12, 9), dtype=torch.float32), torch.randn(5, 9)
    layer = trained(LoRALinear.from_linear(base, 3, 6.0, .4 if backend == 'aot_eager' else 0.0, 'pissa'))
    compiled, results = torch.compile(layer, fullgraph=True, backend=backend), []
    for f in (layer, compiled):
        torch.manual_seed(0)
        layer.zero_grad()
        y = f(x)
        y.square().sum().backward()
        results.append((y, layer.A.weight.grad, layer.B.weight.grad))
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected)
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))

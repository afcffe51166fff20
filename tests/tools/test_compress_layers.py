"""compress_layers.py: statistics, low-rank layers and MLA in a model, each as good as it is foretold to be."""

import copy
from dataclasses import asdict, replace
from functools import partial
from itertools import product

import pytest
import torch

import compress_layers as layers
from helpers import equal, svd
from lowrank.compression import RIDGE, Factorization
from lowrank.layers import LowRankLinear, SplitProjection
from model import GPT, GPTConfig, QKVProjection
from runtime.dataset import Dataset
from test_compression import rand

pytestmark = pytest.mark.usefixtures('one_thread')
each_bias = pytest.mark.parametrize('bias', [False, True])


@pytest.fixture(scope='module')
def windows(toy):
    """windows(tokens) of the training split."""
    return lambda tokens=512: layers.batches(Dataset(toy), tokens, 16, 1337, 'cpu')


@pytest.fixture
def no_ridge(monkeypatch):
    """Errors are foretold to rounding."""
    monkeypatch.setattr(layers, 'Factorization', partial(Factorization, ridge=0))
    monkeypatch.setattr(layers, 'refit', partial(layers.refit, ridge=1e-12))          # LayerNorm's have rank C - 1


def random_model(dtype=torch.float32, **options):
    """Weights and biases of a size that makes every one of them count."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**dict(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=17) | options))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=.3)
    return model.to(dtype).eval().requires_grad_(False)


def split_model(dtype=torch.float64, **options):
    """The same with q, k and v apart -> the model, name -> layer."""
    model = random_model(dtype, **options)
    return model, layers.dense_layers(model, layers.layer_names(model))


def difference(a, b):
    """Largest difference of logits on tokens nobody calibrated on."""
    idx = torch.randint(17, (8, 16), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return (a(idx, idx)[0] - b(idx, idx)[0]).abs().max().item()


def seen(model, names, windows):
    """What hooks see of each layer -> name -> inputs (N, n), outputs (N, m), gradients at these (N, m)."""
    found = {name: ([], [], []) for name in names}

    def look(name, module, args, output):
        output = output.detach().requires_grad_()
        output.retain_grad()
        for kept, t in zip(found[name], (args[0], output, output)):
            kept.append(t)
        return output * 1                                           # the gradient of what goes on
    model = copy.deepcopy(model)
    hooked = {name: model.transformer.get_submodule(name) for name in names}
    # a leaf cuts the graph: gradients reach a layer's outputs only where nothing before it is cut, so one at a time
    for name, module in hooked.items():
        handle = module.register_forward_hook(partial(look, name))
        for x, y in windows:
            (model(x, y)[1] * y.numel()).backward()
        handle.remove()
    return {name: tuple(torch.cat([(t.grad if i == 2 else t.detach()).flatten(0, 1) for t in kept])
                        for i, kept in enumerate(found[name])) for name in names}


def second_moment(x, centred=False):
    x = x - x.mean(0) if centred else x
    return x.mT @ x / len(x)


# ----------------------------------------------------------------------------------------------------------------------
# statistics

@each_bias
def test_statistics_are_those_that_hooks_see(windows, bias):
    """Of layers and of a projection that gives q, k, v: C and W^T G W, or W C W^T and G."""
    model, modules = split_model(bias=bias)
    statistics = {name: layers.Statistics(layer.weight, bias) for name, layer in modules.items()}
    layers.calibrate(model, modules, statistics, windows(128), gradients=True)
    for name, (x, _, g) in seen(model, modules, windows(128)).items():
        W, found = modules[name].weight, statistics[name]
        C, G = second_moment(x, bias), second_moment(g)
        expected = (C, W.mT @ G @ W) if name[4:] != 'mlp.c_proj' else (W @ C @ W.mT, G)
        assert found.tokens == 128 == len(x) and torch.allclose(found.mean(), x.mean(0))
        for a, b in zip((found.inputs / 128, found.gradients / 128), expected):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-12 * b.abs().max().item()) and b.abs().max() > 0


def test_statistics_of_keys_and_values(windows):
    """Against hooks and autograd's own gradients of keys and values."""
    model, kept = random_model(torch.float64), []
    modules = {i: block.attn.c_attn for i, block in enumerate(model.transformer.h)}
    weights = {i: layers.key_value_weight(block.attn) for i, block in enumerate(model.transformer.h)}
    statistics = {i: layers.Statistics(weight, False) for i, weight in weights.items()}
    layers.calibrate(model, modules, statistics, windows(128), gradients=True)

    def keep(layer, inputs, output):
        for t in output:
            t.retain_grad()
        kept.append((inputs[0], output))
    for c_attn in modules.values():
        c_attn.register_forward_hook(keep)
    (x, y), = windows(128)
    model.requires_grad_(True)
    (model(x, y)[1] * y.numel()).backward()
    for i, (inputs, (_, k, v)) in enumerate(kept):
        g = torch.cat([t.grad.transpose(1, 2).reshape(128, 16) for t in (k, v)], dim=1) @ weights[i].detach()
        assert torch.allclose(statistics[i].mean(), inputs.flatten(0, 1).mean(0))
        assert torch.allclose(statistics[i].inputs, inputs.flatten(0, 1).mT @ inputs.flatten(0, 1))
        assert statistics[i].tokens == 128 and torch.allclose(statistics[i].gradients, g.mT @ g)


def test_dropout_and_the_running_basis_are_left_out_of_it(windows):
    """Evaluations leave a model in training mode; the statistics are those of the model as it is used."""
    model, modules = split_model(torch.float32, dropout=.5, use_svd=True, svd_rank=3, svd_method='randomized')
    found = []
    for mode in (True, False):
        found.append({name: layers.Statistics(layer.weight, False) for name, layer in modules.items()})
        layers.calibrate(model.train(mode), modules, found[-1], windows(128), gradients=True)
    a, b = found
    assert all(torch.equal(a[name].gradients, b[name].gradients) and torch.equal(a[name].inputs, b[name].inputs)
               for name in modules)
    model.advance_svd_basis()
    assert model.svd_basis is None


def test_windows_are_of_the_training_split_alone(toy, monkeypatch):
    """Whole ones, as many as asked for at least, at most all; drawn by the seed."""
    splits, tokens, data = set(), Dataset.tokens, Dataset(toy)
    monkeypatch.setattr(Dataset, 'tokens', lambda self, split: splits.add(split) or tokens(self, split))
    train = torch.as_tensor(data.tokens('train').astype('int64'))
    known = {tuple(train[i:i + 17].tolist()) for i in range(len(train) - 16)}
    for asked, count in ((1, 1), (16, 1), (17, 2), (10 ** 18, -(-len(train) // 16))):
        (x, y), = layers.batches(data, asked, 16, 0, 'cpu')
        assert x.shape == y.shape == (count, 16) and torch.equal(x[:, 1:], y[:, :-1])
        assert {(*a, b) for a, b in zip(map(tuple, x.tolist()), y[:, -1].tolist())} <= known
    assert splits == {'train'}
    a, b, c = (layers.batches(data, 256, 16, seed, 'cpu')[0][0] for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    monkeypatch.setattr(layers, 'BATCH_TOKENS', 64)
    parts = layers.batches(data, 256, 16, 1, 'cpu')
    assert len(parts) == 4 and torch.equal(torch.cat([x for x, _ in parts]), a)


# ----------------------------------------------------------------------------------------------------------------------
# by the SVD alone

def by_hand(model, rank, names):
    """Each of these weights cut by torch.linalg.svd, where that saves: in a copy of the model."""
    model = copy.deepcopy(model)
    for name in names:
        _, i, part = name.split('.', 2)
        at = {'attn.c_attn.c_q': 0, 'attn.c_attn.c_k': 1, 'attn.c_attn.c_v': 2}.get(part)
        layer = model.transformer.h[int(i)].get_submodule('attn.c_attn' if at is not None else part)
        weight = layer.weight.data if at is None else layer.weight.data.chunk(3)[at]
        if rank * sum(weight.shape) < weight.numel():
            u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
            weight.copy_(u[:, :rank] * s[:rank] @ vh[:rank])
    return model


@each_bias
@pytest.mark.parametrize('dtype, most', [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_svd_compression_is_the_svd_by_hand(bias, dtype, most):
    """In place; square layers (16, 16) stay dense at rank 8, those of the MLP (64, 16) at 13."""
    for rank, factored in ((1, 12), (7, 12), (8, 4), (12, 4), (13, 0), (16, 0)):
        model = random_model(dtype, bias=bias)
        before, expected = copy.deepcopy(model), by_hand(model, rank, layers.layer_names(model))
        assert layers.apply_svd_compression(model, rank) is model
        assert difference(model, expected) < most and (factored == 0) == equal(model.state_dict(), before.state_dict())
        assert len(model.config.layer_ranks or {}) == factored
        assert set((model.config.layer_ranks or {}).values()) <= {rank}
        assert (model.config == before.config) == (factored == 0)
        assert factored < 12 or difference(model, before) > .01
        kind = SplitProjection if factored == 12 else QKVProjection
        assert all(type(block.attn.c_attn) is kind for block in model.transformer.h)
        again = GPT(GPTConfig(**asdict(model.config))).to(dtype).eval()
        again.load_state_dict(model.state_dict())
        assert difference(again, model) == 0


def test_it_is_applied_to_modules_and_again():
    model = layers.apply_svd_compression(random_model(), 6, ('mlp',))
    assert sorted(model.config.layer_ranks) == ['h.0.mlp.c_fc', 'h.0.mlp.c_proj', 'h.1.mlp.c_fc', 'h.1.mlp.c_proj']
    mlp_only = copy.deepcopy(model)
    layers.apply_svd_compression(model, 6, ('attn',))
    assert len(model.config.layer_ranks) == 12 and difference(model, mlp_only) > .01
    weight = model.transformer.h[0].mlp.c_fc.weight
    assert torch.equal(weight, mlp_only.transformer.h[0].mlp.c_fc.weight)
    layers.apply_svd_compression(model, 6)                          # of rank 6 already
    assert torch.allclose(model.transformer.h[0].mlp.c_fc.weight, weight, atol=1e-5)
    for rank in (7, 16):                                            # nothing grows
        assert layers.apply_svd_compression(copy.deepcopy(model), rank).config == model.config
    layers.apply_svd_compression(model, 2)
    assert set(model.config.layer_ranks.values()) == {2} and len(model.config.layer_ranks) == 12


@pytest.mark.parametrize('rank', [0, -1, 17, 2.0, True, '2'])
def test_a_rank_that_cannot_be(rank):
    model = random_model()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=f'rank={rank!r}: must be 1 to n_embd=16'):
        layers.apply_svd_compression(model, rank)
    assert equal(model.state_dict(), before.state_dict())


def test_square_layers_break_even_at_half_their_width():
    shape = dict(n_layer=1, n_head=2, n_embd=128)
    for rank, named in ((63, 6), (64, 2)):
        model = layers.apply_svd_compression(random_model(**shape), rank)
        assert len(model.config.layer_ranks) == named
        assert ('h.0.attn.c_proj' in model.config.layer_ranks) == (rank == 63)
    assert model.get_num_params() < random_model(**shape).get_num_params()


@pytest.mark.parametrize('dtype, most', [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize('options', [{}, dict(bias=False), svd('weight', 3), svd('causal', 3), dict(use_mla=True)],
                         ids=str)
def test_products_of_full_rank_are_the_model(dtype, most, options):
    model, dense = random_model(dtype, **options), random_model(dtype, **options)
    for name, layer in layers.dense_layers(model, layers.layer_names(model)).items():
        model.set_layer(name, LowRankLinear.from_linear(layer, 16))
    layers.settle(model)
    assert len(model.config.layer_ranks) == (8 if options.get('use_mla') else 10 if options == svd('weight', 3) else 12)
    assert difference(model, dense) < (most if 'svd_scope' not in options else max(most, 1e-5))
    layers.settle(model)                                            # and back again
    layers.dense_layers(model, layers.layer_names(model))
    assert layers.settle(model).config.layer_ranks is None
    assert difference(model, dense) < (most if 'svd_scope' not in options else max(most, 1e-5))
    assert model.state_dict().keys() == dense.state_dict().keys()


# ----------------------------------------------------------------------------------------------------------------------
# for inputs, and gradients

@each_bias
@pytest.mark.parametrize('rank', [2, 6])
def test_the_output_error_is_the_one_foretold(windows, no_ridge, bias, rank):
    """Over the calibration tokens, of the layers' own inputs; where there is a bias it keeps the mean output."""
    model, energies = split_model(bias=bias)[0], {}
    dense = copy.deepcopy(model)

    def choose(found, shapes):
        energies.update(found)
        return dict.fromkeys(found, rank)
    lost = layers.low_rank(model, 'whitened', choose, layers.MODULES, windows())
    assert lost.keys() == energies.keys() == {*layers.layer_names(dense)} == {*model.config.layer_ranks}
    for name, (x, outputs, _) in seen(dense, lost, windows()).items():
        new = model.transformer.get_submodule(name)(x).detach()
        error = (outputs - new).square().sum(1).mean().item()
        assert error == pytest.approx(energies[name][rank:].sum().item(), rel=1e-6) and error > 0
        assert lost[name] == pytest.approx(error / energies[name].sum().item(), rel=1e-6)
        assert not bias or torch.allclose(outputs.mean(0), new.mean(0), atol=1e-9)
        centred = outputs - outputs.mean(0) if bias else outputs
        assert energies[name].sum().item() == pytest.approx(centred.square().sum(1).mean().item(), rel=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# inputs that have changed

def samples(shape, centred):
    """W, x, x^, statistics of W and of gradients, and the `Shift`."""
    weight = rand(*shape)
    x, g = rand(300, shape[1], seed=1) @ rand(shape[1], shape[1], seed=2) + 1, rand(300, shape[0], seed=3)
    g = g * torch.logspace(-1, 1, shape[0])
    now = x + .5 * (rand(300, shape[1], seed=4) + x.roll(1, 1))
    statistics = layers.Statistics(weight, centred)
    statistics.add(x, g)
    shift = layers.Shift(statistics)
    for part in (slice(0, 100), slice(100, 300)):
        shift.add(now[part], x[part])
    return weight, x, now, g, statistics, shift


@pytest.mark.parametrize('shape', [(12, 8), (8, 12)], ids=['tall', 'wide'])
def test_rounding_moves_no_more_than_the_ridge_lets_it(shape):
    """Deficient inputs, their mean up to 1e7 times their spread: a covariance as two passes find it, positive; a refit
    that roundings of the moments move by eps times n / ridge. What is constant, to rounding, moves nothing."""
    eps, n = torch.finfo(torch.float64).eps, shape[1]
    small = torch.eye(n).double() if shape[0] >= n else rand(*shape)
    for mean, rank in product(torch.logspace(0, 7, 8).tolist(), range(5)):
        x, now = (mean * rand(n) * (1 + eps * rand(100, n, seed=seed)) + rand(100, rank, seed=seed) @ rand(
            rank, n, seed=seed + 1) for seed in (5, 7))
        x, now = (t.float() if rank else t for t in (x, now))
        statistics = layers.Statistics(rand(*shape), True)
        shift = layers.Shift(statistics)
        for part in (slice(0, 5), slice(5, 60), slice(60, 100)):
            statistics.add(x[part]), shift.add(now[part], x[part])
        found, both, x = statistics.moments(), shift.moments(), x.double()
        expected = second_moment(x, True) + torch.diag((layers.ROUNDING * x.mean(0)).square())
        most = len(x) * eps * second_moment(x).trace().sqrt() * expected.trace().sqrt() * small.norm() ** 2
        assert (found - small @ expected @ small.mT).norm() <= most
        assert torch.linalg.eigvalsh(found)[0] >= -n * eps * found.norm()
        refitted, level = layers.refit(small, both[:n], both[n:]), both[:n].diagonal().mean()
        assert rank or torch.allclose(refitted, small)
        bound = eps * n / RIDGE * n * (small.norm() + refitted.norm() + both[n:].norm() / level)
        for seed in range(10):
            moved = both + eps * rand(*both.shape, seed=seed).clamp(-1, 1) * both.norm(dim=1)[:, None]
            assert (layers.refit(small, moved[:n], moved[n:]) - refitted).norm() <= bound


@each_bias
@pytest.mark.parametrize('shape', [(12, 8), (8, 12), (9, 9)], ids=['tall', 'wide', 'square'])
@pytest.mark.parametrize('rank', [2, 5])
def test_no_factors_are_better_for_inputs_that_have_changed(no_ridge, shape, bias, rank):
    """E|R (W x - B A x^)|^2, R^T R = G: against alternating least squares on the samples, and perturbations."""
    weight, x, now, g, statistics, shift = samples(shape, bias)
    x, now = (x - x.mean(0), now - now.mean(0)) if bias else (x, now)
    G, outputs = second_moment(g), x @ weight.mT

    def loss(up, down):
        e = outputs - now @ down.mT @ up.mT
        return ((e @ G) * e).sum(1).mean().item()
    found = shift.factorization(statistics).factors(rank)
    best, stale = loss(*found), loss(*statistics.factorization().factors(rank))
    down = rand(rank, shape[1], seed=9)
    for _ in range(500):
        up = torch.linalg.lstsq(now @ down.mT, outputs).solution.mT
        down = torch.linalg.solve(up.mT @ G @ up, up.mT @ G @ torch.linalg.lstsq(now, outputs).solution.mT)
    assert best == pytest.approx(loss(up, down), rel=1e-3) and best <= loss(up, down) * (1 + 1e-9)
    assert best < .99 * stale
    for seed in range(20):
        moved = [t + 1e-3 * rand(*t.shape, seed=seed + i) for i, t in enumerate(found)]
        assert loss(*moved) > best


@each_bias
@pytest.mark.parametrize('options', [{}, dict(use_mla=True), svd('causal', 3)], ids=['dense', 'MLA', 'causal'])
def test_each_layer_is_made_for_the_inputs_it_gets(windows, no_ridge, bias, options):
    """In a model, from end to end: of what a layer gets now, no B A near its own makes something nearer to what the
    dense layer gave; biases keep the mean of that."""
    model, modules = split_model(bias=bias, **options)
    dense = copy.deepcopy(model)
    layers.low_rank(model, 'activation', lambda energies, shapes: dict.fromkeys(shapes, 4), layers.MODULES, windows())
    now, before = seen(model, modules, windows()), seen(dense, modules, windows())
    moved = 0
    for name in modules:
        (x, found, _), (x_before, target, g) = now[name], before[name]
        layer, G = model.transformer.get_submodule(name), second_moment(g)
        up, down = layer.B.weight.detach(), layer.A.weight.detach()
        moved = max(moved, (x - x_before).abs().max().item())
        assert not bias or torch.allclose(found.mean(0), target.mean(0), atol=1e-9)
        x, target = (x - x.mean(0), target - target.mean(0)) if bias else (x, target)

        def loss(up, down):
            e = target - x @ down.mT @ up.mT
            return ((e @ G) * e).sum(1).mean().item()
        best = loss(up, down)
        assert best > 0
        for seed in range(5):
            assert loss(*(t + 1e-3 * rand(*t.shape, seed=seed + i) for i, t in enumerate((up, down)))) > best
    assert moved > .1


def test_methods_see_what_they_say(windows):
    """'plain' no text, 'whitened' no gradients; each chooses among all layers, and dense ones stay to the bit."""
    dense, products = random_model(), {}
    for method in ('plain', 'whitened', 'activation'):
        model = copy.deepcopy(dense)
        lost = layers.low_rank(model, method, lambda *_: {'h.1.mlp.c_fc': 3, 'h.0.attn.c_proj': None}, layers.MODULES,
                               None if method == 'plain' else windows())
        assert model.config.layer_ranks == {'h.1.mlp.c_fc': 3} and lost.keys() == {'h.1.mlp.c_fc'}
        assert 0 < lost['h.1.mlp.c_fc'] < 1
        own, state = model.state_dict(), dense.state_dict()
        shared = own.keys() & state.keys() - {'transformer.h.1.mlp.c_fc.bias'}
        assert len(shared) == len(state) - 2 and all(torch.equal(own[name], state[name]) for name in shared)
        products[method] = model.transformer.h[1].mlp.c_fc
    expected = LowRankLinear.from_linear(dense.transformer.h[1].mlp.c_fc, 3)
    assert torch.allclose(products['plain'].weight, expected.weight, atol=1e-6)
    assert torch.equal(products['plain'].bias, expected.bias) and not torch.equal(products['whitened'].bias,
                                                                                  expected.bias)
    assert not torch.allclose(products['whitened'].weight, expected.weight, atol=.01)
    assert not torch.allclose(products['whitened'].weight, products['activation'].weight, atol=.01)


SCALES = torch.logspace(-4, 4, 16)


@pytest.mark.parametrize('spoil', [
    lambda norm, layer: layer.weight.zero_(),                       # nothing but biases: all that follows is constant
    *(lambda norm, layer, spread=spread: norm.weight.mul_(spread) + norm.bias.fill_(1) for spread in (1e-5, 1e-7)),
    *(lambda norm, layer, mean=mean: norm.weight[3].zero_() + norm.bias[3].fill_(mean) for mean in (1e3, 1e6)),
    lambda norm, layer: layer.weight[8:].copy_(layer.weight[:-8].clone()),
    lambda norm, layer: layer.weight.copy_(layer.weight[:, :1] * layer.weight[:1]),
    lambda norm, layer: (norm.weight.mul_(SCALES), norm.bias.mul_(SCALES), layer.weight.div_(SCALES))],
    ids='constant 1e-5 1e-7 1e3 1e6 duplicates deficient scales'.split())
def test_the_default_method_takes_what_whitened_does(windows, spoil):
    """Whatever a model's activations are. And it loses no more."""
    models = [random_model(bias=True)]
    for block in models[0].transformer.h:
        spoil(block.ln_1, block.attn.c_attn), spoil(block.ln_2, block.mlp.c_fc)
    for method, choose in (('whitened', layers.uniform_share(.6)), ('activation', layers.best_share(.6))):
        models.append(copy.deepcopy(models[0]))
        layers.low_rank(models[-1], method, choose, layers.MODULES, windows())
        assert models[0].transformer.h[0].mlp.c_fc.weight.any() or difference(models[0], models[-1]) < 1e-3
    before, whitened, activation = (sum(m(x, y)[1].item() for x, y in windows()) for m in models)
    assert activation < max(before, whitened) + .01


def test_w_v_is_left_to_weight_scope():
    """Which cuts it anew at each step; not where it cuts nothing."""
    for options, count in ((svd('weight', 3), 10), (svd('weight', 8), 12), (svd('causal', 3), 12)):
        names = layers.layer_names(random_model(**options))
        assert len(names) == count and ('h.0.attn.c_attn.c_v' in names) == (count == 12)


# ----------------------------------------------------------------------------------------------------------------------
# ranks

def some_layers():
    shapes = {'a': (16, 16), 'b': (64, 16), 'c': (16, 64)}
    return {name: rand(16, seed=i).square().sort(descending=True)[0] for i, name in enumerate(shapes)}, shapes


def kept(ranks, shapes):
    return sum(m * n if ranks[name] is None else ranks[name] * (m + n) for name, (m, n) in shapes.items()) / sum(
        m * n for m, n in shapes.values())


def test_how_ranks_are_chosen():
    energies, shapes = some_layers()
    assert layers.fixed_rank(7)(energies, shapes) == dict(a=7, b=7, c=7)
    assert layers.fixed_rank(9)(energies, shapes) == dict(a=None, b=9, c=9)
    with pytest.raises(ValueError, match=r'rank=17: a layer has no more than 16 \(nearest: 16\)'):
        layers.fixed_rank(17)(energies, shapes)
    for fraction in (.3, .9, 1):
        ranks = layers.rank_of_energy(fraction)(energies, shapes)
        for name, rank in ranks.items():
            share = energies[name].cumsum(0) / energies[name].sum()
            if rank is not None:
                assert share[rank - 1] >= fraction - 1e-9 and (rank == 1 or share[rank - 2] < fraction)
    assert ranks == dict(a=None, b=None, c=None)
    assert layers.uniform_share(.5)(energies, shapes) == dict(a=4, b=6, c=6)


@pytest.mark.parametrize('choose', [layers.uniform_share, layers.best_share])
def test_shares_are_kept(choose):
    """Never more, little less; all of it is the model itself. The nearest share that a refusal names is taken."""
    energies, shapes = some_layers()
    for keep in (.2, .25, .5, .8, .99):
        ranks = choose(keep)(energies, shapes)
        assert keep - .1 < kept(ranks, shapes) <= keep
    assert choose(1.0)(energies, shapes) == dict.fromkeys(shapes)
    with pytest.raises(ValueError, match=r'^keep=0.01: leaves .*\(nearest: 0\.\d+\)$') as e:
        choose(.01)(energies, shapes)
    nearest = float(str(e.value).rpartition(' ')[2][:-1])
    assert set(choose(nearest)(energies, shapes).values()) <= {1, None}
    with pytest.raises(ValueError):
        choose(nearest - 1e-3)(energies, shapes)


def test_wide_layers_get_ranks_in_multiples_of_eight():
    shapes = {'a': (128, 128), 'b': (512, 128)}
    energies = {name: torch.exp(-.05 * torch.arange(128)) * (i + 1) for i, name in enumerate(shapes)}
    ranks = layers.best_share(.5)(energies, shapes)
    assert all((rank or 0) % 8 == 0 for rank in ranks.values()) and any(ranks.values())         # None: dense
    assert .4 < kept(ranks, shapes) <= .5
    assert any((rank or 0) % 8 for rank in layers.best_share(.5)(energies | dict(c=energies['a'][:127]),
                                                          shapes | dict(c=(127, 500))).values())


# ----------------------------------------------------------------------------------------------------------------------
# MLA

def converted(model, latent, windows=None):
    return layers.to_mla(copy.deepcopy(model), latent, windows).eval()


@pytest.mark.parametrize('svd', [{}, dict(svd_scope='weight'), dict(svd_scope='causal', svd_block=4),
                                 dict(svd_scope='sequence', svd_method='randomized')])
@pytest.mark.parametrize('dtype, most', [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@each_bias
@pytest.mark.parametrize('tokens', [None, 1, 512])
def test_at_full_width_the_logits_stay(windows, tokens, bias, dtype, most, svd):
    """On any input, with one calibration window of 16 too; tokens None: plain."""
    model = random_model(dtype, bias=bias, **svd, **(dict(use_svd=True, svd_rank=3) if svd else {}))
    found = tokens and windows(tokens)
    new = converted(model, 16, found)
    most = max(most, 1e-5) if svd else most                         # SVD of V works in float32 here and there
    assert difference(model, new) < most < 1e-3 < difference(model, converted(model, 8, found))


def test_a_product_that_weight_scope_cuts_becomes_latents(windows):
    """No layer is left out, whatever else may be factored."""
    made = layers.apply_svd_compression(random_model(), 5)
    model = GPT(replace(made.config, **svd('weight', 3))).eval()
    model.load_state_dict(made.state_dict())
    assert difference(model, converted(model, 16, windows(128))) < 1e-4


@pytest.mark.parametrize('trained', [True, False])
def test_replaced_layers_are_trained_or_not_as_they_were(trained):
    model = random_model().requires_grad_(trained)
    for rank, modules in ((5, ['mlp']), (5, 'attn,mlp'), (9, ['attn', 'mlp'])):
        layers.apply_svd_compression(model, rank, modules)
        assert {p.requires_grad for p in model.parameters()} == {trained}
    layers.dense_layers(model, layers.layer_names(model))
    assert {p.requires_grad for p in layers.settle(model).parameters()} == {trained}


def test_products_become_latents_as_their_layers_would(windows):
    """Products of keys and values are multiplied out; the rest, queries too, stays as it is."""
    model = layers.apply_svd_compression(random_model(), 5)
    new = converted(model, 16, windows(128))
    assert difference(model, new) < 1e-4
    assert set(new.config.layer_ranks) == {f'h.{i}.{part}' for i in range(2)
                                           for part in ('attn.c_attn.query', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')}
    again = GPT.from_checkpoint(dict(model_args=asdict(new.config), model=new.state_dict())).eval()
    assert difference(again, new) == 0


def test_weight_scope_finds_nothing_more_to_cut(windows):
    model = random_model(use_svd=True, svd_rank=3, svd_scope='weight')
    new = converted(model, 6, windows(128))
    assert new.config.svd_truncates
    uncut = GPT.from_checkpoint(dict(model_args=asdict(new.config), model=new.state_dict()), use_svd=False).eval()
    assert difference(new, uncut) < 1e-4


def test_a_running_basis_comes_along():
    """From which 'randomized' starts: without it, another approximation."""
    model = random_model(use_svd=True, svd_rank=3, svd_method='randomized', svd_power_iters=0)
    model.svd_basis = torch.linalg.qr(torch.randn(2, 2, 8, 3, generator=torch.Generator().manual_seed(1)))[0]
    new = converted(model, 16)
    assert torch.equal(new.svd_basis, model.svd_basis) and difference(model, new) < 1e-4
    new.svd_basis = None
    assert difference(model, new) > 1e-3


def test_a_bias_takes_the_mean_of_what_is_lost(windows):
    """The mean value over the calibration tokens stays; without statistics it moves."""
    model, inputs = random_model(bias=True, n_layer=1), []
    c_attn = model.transformer.h[0].attn.c_attn
    handle = c_attn.register_forward_hook(lambda _, args, output: inputs.append(args[0].double().flatten(0, 1)))
    for x, y in windows(128):
        model(x, y)
    handle.remove()
    mean = torch.cat(inputs).mean(0).float()[None, None]            # (1, 1, C)
    values = [m.transformer.h[0].attn.c_attn(mean)[2] for m in (model, *(converted(model, 4, w) for w in (
        windows(128), None)))]
    assert torch.allclose(values[0], values[1], atol=1e-5) and not torch.allclose(values[0], values[2], atol=1e-2)

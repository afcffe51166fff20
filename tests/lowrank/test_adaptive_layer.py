"""lowrank/adaptive_layer.py and what lowrank/adaptive_control.py does with it and its optimizer: no switch changes the
function, what is protected stays, momenta are carried, and analyses decide when."""

import pytest
import torch
from torch import nn

import special_layers
from helpers import optimizer_of
from lowrank.adaptive_control import (CALM, PATIENCE, AdaptiveSVD, state_of_factors, state_of_weight, to_factors,
                                      to_full)
from lowrank.adaptive_layer import AdaptiveSVDLinear, left_basis, minor_factors
from model import GPT, GPTConfig
from runtime.optim import exchange, restore_optimizer

pytestmark = pytest.mark.usefixtures('one_thread')
SHAPES = {'square': (24, 24), 'wide': (16, 40), 'tall': (40, 16), 'one below': (12, 11)}
KINDS = ('random', 'zero', 'rank 1', 'rank 5', 'a zero row', 'tiny', 'large')
each_shape = pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
each_kind = pytest.mark.parametrize('kind', KINDS)
each_dtype = pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=['float32', 'float64'])
each_optimizer = pytest.mark.parametrize('optimizer', ['adamw', 'muon'])


def weight(kind, shape, seed=0):
    """float64, with the spectrum of a trained layer."""
    (m, n), g = shape, min(shape)
    generator = torch.Generator().manual_seed(seed)
    U, _, Vh = torch.linalg.svd(torch.randn(m, n, generator=generator, dtype=torch.float64), full_matrices=False)
    S = torch.linspace(2, .2, g, dtype=torch.float64)
    if kind.startswith('rank'):
        S[int(kind[5:]):] = 0
    W = U * S @ Vh
    if kind == 'a zero row':
        W[1] = 0
    return W * {'zero': 0, 'tiny': 1e-12, 'large': 1e6}.get(kind, 1)


def make_layer(W, protection='left', dtype=torch.float64, bias=True):
    linear = nn.Linear(W.size(1), W.size(0), bias=bias).to(dtype)
    with torch.no_grad():
        linear.weight.copy_(W)
        if bias:
            linear.bias.copy_(torch.arange(W.size(0)) / 10)
    return AdaptiveSVDLinear(linear, protection)


def gradient_step(layer, seed, lr=1e-2):
    """A step of a fresh AdamW, whatever the gradient; -> the parameters that had one."""
    params = [p for p in layer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr)
    x = torch.randn(64, layer.base.in_features, generator=torch.Generator().manual_seed(seed)).to(layer.weight)
    layer(x).square().sum().backward()
    (layer.weight * torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(seed + 1)).to(x)
     ).sum().backward()
    optimizer.step()
    layer.protect()
    grads = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
    optimizer.zero_grad(set_to_none=True)
    return grads


def relative(a, b):
    """|a - b| / |b|, of zero: |a|."""
    return ((a - b).norm() / (b.norm() or 1)).item()


# ----------------------------------------------------------------------------------------------------------------------
# the function

@each_dtype
@each_kind
@each_shape
def test_no_switch_changes_the_function(shape, kind, dtype):
    """Full, low-rank, the same r again, a smaller one, full, low-rank: W, outputs and the bias; training between."""
    g, layer = min(shape), make_layer(weight(kind, shape), dtype=dtype)
    x = torch.randn(3, shape[1], generator=torch.Generator().manual_seed(9)).to(dtype)
    r = max(2, g - 10)
    bias, lr = layer.bias, 1e-2 * (layer.weight.abs().max().item() ** .5 or 1)
    for step, switch in enumerate((lambda: layer.switch_to_lowrank(r), lambda: layer.switch_to_lowrank(r),
                                   lambda: layer.switch_to_lowrank(r - 1), layer.switch_to_full,
                                   lambda: layer.switch_to_lowrank(g - 1), lambda: layer.switch_to_lowrank(1),
                                   layer.switch_to_full)):
        with torch.no_grad():
            W, y, b = layer.weight.clone(), layer(x), layer.bias.clone()
            switch()
            assert relative(layer.weight, W) <= 1e-6, step
            assert (layer(x) - y).norm() <= 1e-6 * (W.norm() * x.norm() + b.norm()), step
            assert layer.bias is bias and torch.equal(layer.bias, b)
            merged = layer.merge()
            assert relative(merged.weight, W) <= 1e-6 and torch.equal(merged.bias, b) and type(merged) is nn.Linear
        assert layer.weight.dtype == layer(x).dtype == dtype
        assert {p.dtype for p in (*layer.parameters(), *layer.buffers())} == {dtype}
        assert layer.base.weight.requires_grad == (layer.r is None)
        gradient_step(layer, step, lr)


@each_dtype
@each_kind
@each_shape
def test_no_pair_is_dead(shape, kind, dtype):
    """Where sigma is zero, too: after two steps each row of A and column of B has had a gradient and moved."""
    layer = make_layer(weight(kind, shape), dtype=dtype)
    layer.switch_to_lowrank(min(shape) - 2)
    A, B = (p.detach().clone() for p in layer.half_decayed())
    gradient_step(layer, 0), gradient_step(layer, 1)
    grads = gradient_step(layer, 2)
    assert set(grads) == {'base.bias', 'A.weight', 'B.weight'}
    assert (grads['A.weight'].norm(dim=1) > 0).all() and (grads['B.weight'].norm(dim=0) > 0).all()
    assert (layer.A.weight != A).any(dim=1).all() and (layer.B.weight != B).any(dim=0).all()
    assert layer.weight.isfinite().all()


@each_kind
@each_shape
def test_factors_are_the_minor_components_and_the_protected_space_is_the_rest(shape, kind):
    W, g = weight(kind, shape), min(shape)
    for r in {1, g // 2, g - 1}:
        layer = make_layer(W)
        layer.switch_to_lowrank(r)
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        k = g - r
        assert layer.protected.shape == (shape[0], k) and layer.A.weight.shape == (r, shape[1])
        eye = torch.eye(k, dtype=torch.float64)
        assert (layer.protected.mT @ layer.protected - eye).abs().max() <= 1e-12
        assert (layer.protected.mT @ layer.B.weight).abs().max() <= 1e-6 * (layer.B.weight.abs().max() or 1)
        product = layer.B.weight @ layer.A.weight
        assert (torch.linalg.svdvals(product)[:r] - S[k:]).abs().max() <= 1e-6 * (S[0] or 1)
        if S[k - 1] - S[k] > 1e-6 * S[0]:                           # else another basis is as good
            assert (product - U[:, k:] * S[k:] @ Vh[k:]).norm() <= 1e-6 * S[0]
            assert (torch.linalg.svdvals(U[:, :k].mT @ layer.protected) - 1).abs().max() <= 1e-8
        rows = layer.A.weight.norm(dim=1)
        assert (rows >= (1e-3 * S[0].item() or 1) ** .5 * (1 - 1e-6)).all()


def test_no_switch_draws_random_numbers():
    """Dropout goes on as without."""
    layer = make_layer(weight('random', (12, 15)))
    state = torch.get_rng_state()
    layer.switch_to_lowrank(3), layer.switch_to_lowrank(2), layer.switch_to_full(), layer.merge()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize('r', [-1, 0, 12, 13])
def test_ranks_that_cannot_be(r):
    layer = make_layer(weight('random', (12, 15)))
    for method in (layer.switch_to_lowrank, layer.make_lowrank):
        with pytest.raises(ValueError, match=rf'^r={r}: must be 1 to 11 for a layer of 12 x 15'):
            method(r)
    assert layer.r is None
    with pytest.raises(ValueError, match="^protection='right'"):
        AdaptiveSVDLinear(nn.Linear(2, 2), 'right')


def test_a_saved_layer_is_rebuilt_from_its_r():
    for r in (None, 1, 7):
        layer, again = (make_layer(weight('random', (12, 15), seed)) for seed in range(2))
        if r is not None:
            layer.switch_to_lowrank(r), again.make_lowrank(r)
        again.load_state_dict(layer.state_dict())
        assert torch.equal(again.weight, layer.weight) and again.r == layer.r == r
        again.protect(), layer.protect()
        assert torch.equal(again.weight, layer.weight)


# ----------------------------------------------------------------------------------------------------------------------
# protection

@each_dtype
@each_shape
def test_what_is_protected_survives_a_hostile_optimizer(shape, dtype):
    """500 steps of AdamW that only want to turn the principal components around. Protected: U_p^T W stays, though the
    rest is free to move, and does. Without: they are gone. Both for 'none' and for a forgotten `protect`."""
    changes = {}
    for name in ('left', 'none', 'forgotten'):
        layer = make_layer(weight('random', shape), protection='none' if name == 'none' else 'left', dtype=dtype)
        r = max(1, min(shape) - 6)
        layer.switch_to_lowrank(r)
        W, U = layer.weight.detach().clone(), layer.protected.clone()
        optimizer = torch.optim.AdamW(layer.half_decayed(), lr=1e-2, weight_decay=.05)
        generator = torch.Generator().manual_seed(0)
        for _ in range(500 if name == 'left' else 100):
            noise = torch.randn(shape, generator=generator).to(dtype)
            loss = (U.mT @ (layer.weight + W)).square().sum() + .01 * (layer.weight * noise).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if name != 'forgotten':
                layer.protect()
        changes[name] = relative(U.mT @ layer.weight, U.mT @ W)
        assert relative(layer.weight, W) > .01
    assert changes['left'] < 1e-5
    assert changes['none'] > .1 and changes['forgotten'] > .1


def test_in_full_mode_there_is_nothing_to_protect():
    layer = make_layer(weight('random', (12, 15)))
    W = layer.weight.detach().clone()
    layer.protect()
    assert torch.equal(layer.weight, W) and layer.half_decayed() == [] and layer.protected is None


def test_a_watched_layer_has_the_gradient_of_its_weight():
    """In low-rank mode only when asked; factors get theirs all the same."""
    layer, x = make_layer(weight('random', (12, 15))), torch.randn(5, 15, dtype=torch.float64)
    target = torch.randn(5, 12, dtype=torch.float64)

    def gradient(watch):
        for p in layer.parameters():
            p.grad = None
        layer.watch(watch)
        (layer(x) * target).sum().backward()
        return layer.base.weight.grad
    expected = target.mT @ x
    for watch in (True, False):
        torch.testing.assert_close(gradient(watch), expected)       # full mode
    layer.switch_to_lowrank(4)
    torch.testing.assert_close(gradient(True), expected)
    torch.testing.assert_close(layer.B.weight.grad, expected @ layer.A.weight.mT)
    torch.testing.assert_close(layer.A.weight.grad, layer.B.weight.mT @ expected)
    assert gradient(False) is None and layer.A.weight.grad is not None


# ----------------------------------------------------------------------------------------------------------------------
# the optimizer

SHAPE = dict(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=24, bias=False)


def trained(optimizer, steps=3, **options):
    """A GPT of float64 with adaptive layers, its optimizer after some steps, and a function that leaves gradients."""
    torch.manual_seed(0)
    options = dict(adaptive_svd_target_layer=-1, adaptive_svd_targets='c_q,c_proj') | options
    model = GPT(GPTConfig(**SHAPE, adaptive_svd=True, **options)).double()
    opt = optimizer_of(model, optimizer)

    def backward(seed):
        opt.zero_grad(set_to_none=True)
        idx = torch.randint(11, (4, 17), generator=torch.Generator().manual_seed(seed))
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        loss.backward()
        return loss
    for seed in range(steps):
        backward(seed), opt.step()
    return model, opt, backward


def switch(model, opt, layer, r):
    """r None: to full mode."""
    def change(*args):
        exchange(opt, model, *args)
    to_full(layer, change) if r is None else to_factors(layer, r, None, change)


def states(opt):
    parts = getattr(opt, 'optimizers', (opt,))
    return {p: dict(state) for part in parts for p, state in part.state.items()}


def assert_groups(model, opt):
    """Every trainable parameter in exactly one group, with its decay; nothing else."""
    where = [p for group in opt.param_groups for p in group['params']]
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(where) == len(set(where)) == len(trainable) and set(where) == set(trainable)
    decay = {p: group['weight_decay'] for group in opt.param_groups for p in group['params']}
    adaptive = special_layers.adaptive_layers(model).values()
    halved = {p for layer in adaptive for p in layer.half_decayed()}
    for p in trainable:
        assert decay[p] == (.05 if p in halved else .1 if p.dim() == 2 else 0)
    for layer in adaptive:
        assert (layer.base.weight in decay) == (layer.r is None)
    assert set(states(opt)) <= set(where)


# (layer, r) after one another; None: full
SWITCHES = [(0, 14), (0, 14), (1, 5), (0, 8), (2, 23), (1, None), (0, 14), (0, None), (1, 1), (2, None), (1, None)]


@each_optimizer
def test_every_parameter_is_in_one_group_whatever_the_modes(optimizer):
    """With half the decay for factors, none for W_p; and a state dict that a rebuilt model's optimizer takes."""
    model, opt, backward = trained(optimizer)
    layers = list(special_layers.adaptive_layers(model).values())
    assert len(layers) == 4
    assert_groups(model, opt)
    order = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    for steps, (i, r) in enumerate(SWITCHES, 4):
        backward(steps)
        switch(model, opt, layers[i], r)
        assert_groups(model, opt)
        opt.step()
        assert_groups(model, opt)
        ranks = special_layers.lowrank_modes(model)
        again = GPT(GPTConfig(**SHAPE, adaptive_svd=True, adaptive_svd_target_layer=-1,
                              adaptive_svd_targets='c_q,c_proj', adaptive_svd_ranks=ranks)).double()
        again.load_state_dict(model.state_dict())
        other = optimizer_of(again, optimizer)
        restore_optimizer(other, opt.state_dict(), steps, cropped=None)
        names, mine = {p: name for name, p in again.named_parameters()}, states(opt)
        of = {name: states(other)[p] for p, name in names.items() if p in states(other)}
        for name, p in model.named_parameters():
            if p.requires_grad:
                assert of[name].keys() == mine[p].keys()
                assert all(torch.equal(of[name][key], value) for key, value in mine[p].items())
    assert order == {name: i for i, (name, _) in enumerate(model.named_parameters())}          # all is full again


@each_optimizer
def test_a_switch_leaves_the_other_layers_alone_and_skips_no_step(optimizer):
    """The very tensors of the other states, with the same numbers; counters go on; every parameter moves."""
    model, opt, backward = trained(optimizer)
    layers = list(special_layers.adaptive_layers(model).values())
    for steps, (i, r) in enumerate(SWITCHES, 4):
        loss = backward(steps).item()
        own = {layers[i].base.weight, *layers[i].half_decayed()}
        before = {p: {key: (t, t.clone()) for key, t in state.items()} for p, state in states(opt).items()}
        grads = {p: (p.grad, p.grad.clone()) for p in model.parameters() if p.grad is not None}
        values = {p: p.detach().clone() for p in model.parameters()}
        if layers[i].r is not None:                                 # as on analysis steps
            layers[i].watch(True)
            backward(steps)
            grads = {p: (p.grad, p.grad.clone()) for p in model.parameters() if p.grad is not None}
        switch(model, opt, layers[i], r)
        own |= {layers[i].base.weight, *layers[i].half_decayed()}
        after = states(opt)
        assert before.keys() - own == after.keys() - own
        for p in before.keys() - own:
            assert all(after[p][key] is t and torch.equal(t, value) for key, (t, value) in before[p].items())
        for p in grads.keys() - own:
            assert p.grad is grads[p][0] and torch.equal(p.grad, grads[p][1]) and torch.equal(p, values[p])
        trainable = [p for p in model.parameters() if p.requires_grad]
        assert all(p.grad is not None for p in trainable)
        values = {p: p.detach().clone() for p in trainable}
        opt.step()
        assert all((p != values[p]).any() for p in trainable)
        counters = {float(state['step']) for state in states(opt).values() if 'step' in state}
        assert counters == {steps} and len(states(opt)) == len(trainable)
        assert abs(backward(steps).item() - loss) < .5


@pytest.mark.parametrize('r', [1, 14, 23])
@each_optimizer
def test_momenta_and_gradients_follow_the_chain_rule(optimizer, r):
    """exp_avg of A is B^T m_W, of B m_W A^T; gradients are those that a backward pass through the factors makes."""
    model, opt, backward = trained(optimizer)
    layer = special_layers.adaptive_layers(model)['block1.attn.c_q']
    backward(7)
    W, key = layer.base.weight, 'momentum_buffer' if optimizer == 'muon' else 'exp_avg'
    m, G = states(opt)[W][key].clone(), W.grad.clone()
    switch(model, opt, layer, r)
    A, B = layer.half_decayed()
    torch.testing.assert_close(states(opt)[A][key], B.mT @ m, rtol=1e-10, atol=0)
    torch.testing.assert_close(states(opt)[B][key], m @ A.mT, rtol=1e-10, atol=0)
    assert W.grad is None and not W.requires_grad
    ours = A.grad.clone(), B.grad.clone()
    torch.testing.assert_close(ours, ((B.mT @ G).detach(), (G @ A.mT).detach()))
    backward(7)
    torch.testing.assert_close(ours, (A.grad, B.grad), rtol=1e-6, atol=1e-10)
    for refactored in (r, max(1, r - 3)):                           # by way of W: again those of a backward pass
        layer.watch(True)
        backward(8)
        switch(model, opt, layer, refactored)
        ours = [p.grad.clone() for p in layer.half_decayed()]
        backward(8)
        torch.testing.assert_close(ours, [p.grad for p in layer.half_decayed()], rtol=1e-6, atol=1e-10)
    layer.watch(True)
    backward(9)
    ours = W.grad.clone()
    switch(model, opt, layer, None)
    torch.testing.assert_close(W.grad, ours)
    backward(9)
    torch.testing.assert_close(W.grad, ours, rtol=1e-6, atol=1e-10)


def factors(shape, r, kind='random', dtype=torch.float64):
    W = weight(kind, shape)
    B, A = minor_factors(W, *left_basis(W), min(shape) - r)
    return A.to(dtype), B.to(dtype)


@each_dtype
@pytest.mark.parametrize('scale', [1e-25, 1e-12, 1, 1e12, 1e20])
def test_a_basis_has_the_weights_scale(scale, dtype):
    """No square overflows, none is lost; in low-rank mode the weight is what it was."""
    W = (weight('random', (24, 24)) * scale).to(dtype)
    U, S = left_basis(W)
    exact = torch.linalg.svdvals(W.double() / scale) * scale
    assert U.isfinite().all() and ((S.double() - exact).abs() / exact[0]).max() < 1e-6
    layer = make_layer(W, dtype=dtype)
    layer.switch_to_lowrank(14)
    assert relative(layer.weight.detach().double() / scale, W.double() / scale) <= 1e-6


def test_the_spaces_of_a_steep_spectrum_are_told_apart_in_low_rank_mode():
    """k = 226 of 256, sigma from 1 to 1e-3: noise of float32's size turns it by little, as an analysis sees it."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(256, 256, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    layer = make_layer(U * torch.logspace(0, -3, 256, dtype=torch.float64) @ V.mT, dtype=torch.float32)
    layer.switch_to_lowrank(30)
    control, seen = AdaptiveSVD({'x': layer}, 1), []
    for step in (20, 21):
        control.watch()
        layer.base.weight.grad = torch.randn(256, 256, generator=generator)
        control.analyse(step, lambda old, new, convert: convert([{} for _ in old]))
        seen.append(control.seen['x']['subspace_angle'])
        with torch.no_grad():
            layer.base.weight.mul_(1 + 1e-7 * torch.randn(256, 256, generator=generator))
    assert seen[0] is None and seen[1] < 1e-2


@each_shape
def test_the_momentum_of_a_weight_comes_back_from_its_factors(shape):
    """Exactly where it is in their range, which at r = g is everything in a square; else the least that fits."""
    g, generator = min(shape), torch.Generator().manual_seed(0)
    for r in {1, g // 2, g - 2, g - 1}:
        A, B = factors(shape, r)
        G = torch.randn(shape, generator=generator, dtype=torch.float64)
        inside = B @ torch.randn(r, shape[1], generator=generator, dtype=torch.float64) + torch.randn(
            shape[0], r, generator=generator, dtype=torch.float64) @ A
        for key in ('exp_avg', 'momentum_buffer'):
            step = torch.tensor(5.0)
            back = state_of_weight(*state_of_factors({key: inside, 'step': step}, A, B), A, B)
            assert relative(back[key], inside) <= 1e-4 and back['step'] == 5 and back['step'] is not step
            least = state_of_weight(*state_of_factors({key: G}, A, B), A, B)[key]
            assert least.norm() <= G.norm() * (1 + 1e-6)
            assert relative(B.mT @ least, B.mT @ G) <= 1e-4 and relative(least @ A.mT, G @ A.mT) <= 1e-4


@each_dtype
@each_shape
def test_means_of_squares_stay_positive_and_of_their_size(shape, dtype):
    generator, g = torch.Generator().manual_seed(0), min(shape)
    v = (torch.rand(shape, generator=generator, dtype=torch.float64) + .1).to(dtype)
    for scale in (1, 1e-12, 1e-20):
        for r in {1, g // 2, g - 1}:
            A, B = factors(shape, r, dtype=dtype)
            of_A, of_B = state_of_factors({'exp_avg_sq': v * scale}, A, B)
            back = state_of_weight(of_A, of_B, A, B)['exp_avg_sq']
            for t in (of_A['exp_avg_sq'], of_B['exp_avg_sq'], back):
                assert (t > 0).all() and t.isfinite().all()
            assert .2 < back.mean() / (v * scale).mean() < 5
    flat = state_of_weight(*state_of_factors({'exp_avg_sq': torch.full_like(v, 3)}, A, B), A, B)['exp_avg_sq']
    torch.testing.assert_close(flat, torch.full_like(v, 3), rtol=1e-4, atol=0)


@pytest.mark.parametrize('kind', KINDS)
@each_dtype
def test_states_stay_finite_whatever_the_weight(kind, dtype):
    """There and back before the factors have moved: where sigma is zero, B is."""
    for shape in SHAPES.values():
        A, B = factors(shape, min(shape) - 2, kind, dtype)
        G = weight('random', shape, seed=3).to(dtype)
        state = {'exp_avg': G, 'exp_avg_sq': G.square(), 'step': torch.tensor(3.0)}
        of_factors = state_of_factors(state, A, B)
        back = state_of_weight(*of_factors, A, B)
        for t in (*of_factors[0].values(), *of_factors[1].values(), *back.values()):
            assert t.isfinite().all()
        assert all((state['exp_avg_sq'] >= 0).all() for state in (*of_factors, back))


@each_dtype
@pytest.mark.parametrize('shape', [(256, 256), (64, 256)])
def test_states_come_back_from_factors_that_training_has_made_singular(shape, dtype):
    """Gram matrices in the layer's own precision: columns of B that are nearly one, of very different length."""
    r, generator = min(shape) - 10, torch.Generator().manual_seed(0)
    A, B = factors(shape, r)
    common = torch.randn(shape[0], 1, generator=generator, dtype=torch.float64)
    for noise in (1e-2, 1e-4, 1e-8, 0):
        B1 = (common + noise * B).to(dtype)
        A1 = (torch.ones_like(A) + noise * A).to(dtype)
        G = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        state = state_of_factors({'exp_avg': G, 'exp_avg_sq': G.square()}, A1, B1)
        back = state_of_weight(*state, A1, B1)
        assert all(t.isfinite().all() for t in back.values()) and back['exp_avg'].norm() <= 1.1 * G.norm()


@pytest.mark.parametrize('rank', [0, 100])
def test_analyses_of_a_weight_of_low_rank_go_on_while_it_trains(rank):
    """256 x 256 in float32 with r = 246: AdamW moves what was zero in a single direction, 20 steps between analyses."""
    generator = torch.Generator().manual_seed(0)
    W, G = (torch.randn(256, columns, generator=generator) @ torch.randn(columns, 256, generator=generator)
            for columns in (rank, 1))
    layer = make_layer(W * .02 / 16, dtype=torch.float32, bias=False)
    model = torch.nn.ModuleDict(dict(c_q=layer))
    opt = torch.optim.AdamW([{'params': [layer.base.weight]}, {'params': []}, {'params': []}], lr=1e-3)

    def backward():
        opt.zero_grad(set_to_none=True)
        noise = torch.randn(256, 4, generator=generator) @ torch.randn(4, 256, generator=generator)
        (layer.weight * (G + .1 * noise)).sum().backward()
    for _ in range(3):
        backward()
        layer.watch(True)
        backward()
        switch(model, opt, layer, 246)
        for _ in range(20):
            opt.step()
            layer.protect()
            backward()
    assert layer.weight.isfinite().all()


@each_optimizer
def test_before_the_first_step_there_is_no_state_to_carry(optimizer):
    model, opt, backward = trained(optimizer, steps=0)
    layer = special_layers.adaptive_layers(model)['block0.attn.c_proj']
    for r in (5, 5, 3, None):
        layer.watch(True)
        backward(0)
        switch(model, opt, layer, r)
        assert_groups(model, opt)
    opt.step()


@each_optimizer
def test_decay_shrinks_the_product_as_much_as_a_weight(optimizer):
    """No gradient, no momentum: B A becomes (1 - lr decay) B A to first order, W_p stays to the bit."""
    model, opt, backward = trained(optimizer, steps=0)
    layer, plain = (special_layers.adaptive_layers(model)[name] for name in ('block0.attn.c_q', 'block1.attn.c_q'))
    switch(model, opt, layer, 14)
    backward(0)
    for p in model.parameters():
        p.grad = None if p.grad is None else torch.zeros_like(p)
    A, B = layer.half_decayed()
    W_p, product, other = layer.base.weight.clone(), (B @ A).detach(), plain.weight.detach().clone()
    opt.step()
    lr, decay = 1e-2, .1
    torch.testing.assert_close((B @ A).detach(), product * (1 - lr * decay / 2) ** 2, rtol=1e-9, atol=0)
    torch.testing.assert_close(plain.weight.detach(), other * (1 - lr * decay), rtol=1e-9, atol=0)
    assert torch.equal(layer.base.weight, W_p)


@each_optimizer
def test_training_is_hardly_disturbed_by_a_switch(optimizer):
    """With free factors that hold all but one component, the next step of W is nearly that of full mode, in direction,
    and no larger than a few times it: momenta of another scale would show."""
    steps = {}
    for r in (None, 23):
        model, opt, backward = trained(optimizer, steps=30, adaptive_svd_protection='none')
        layer = special_layers.adaptive_layers(model)['block0.attn.c_q']
        backward(31)
        W = layer.weight.detach().clone()
        if r:
            switch(model, opt, layer, r)
        opt.step()
        steps[r] = (layer.weight - W).detach()
    cosine = torch.nn.functional.cosine_similarity(steps[None].flatten(), steps[23].flatten(), dim=0)
    ratio = (steps[23].norm() / steps[None].norm()).item()
    assert cosine > .2 and .1 < ratio < 10, (cosine, ratio)


# ----------------------------------------------------------------------------------------------------------------------
# when

class Watched:
    """A layer of 40 x 40, in float32, an AdamW and a controller. `analyse(kind)` goes through one analysis with a
    gradient inside ('danger') or outside ('calm') the components that are protected or would be."""

    def __init__(self, protection='left'):
        self.layer = make_layer(weight('random', (40, 40)), protection, torch.float32)
        self.model = torch.nn.ModuleDict(dict(c_q=self.layer))
        self.optimizer = torch.optim.AdamW([{'params': [self.layer.base.weight]}, {'params': [self.layer.bias]},
                                            {'params': []}], lr=1e-5)
        self.control, self.step = AdaptiveSVD({'c_q': self.layer}, 20), 0

    def analyse(self, kind, k=10):
        self.step += 20
        assert self.control.due(self.step) and not self.control.due(self.step - 1)
        self.control.watch()
        U, layer = left_basis(self.layer.weight)[0].float(), self.layer
        k = 40 - layer.r if layer.r else k
        columns = U[:, :k] if kind == 'danger' else U[:, k:]
        G = columns @ torch.randn(columns.size(1), 40, generator=torch.Generator().manual_seed(self.step))
        self.optimizer.zero_grad(set_to_none=True)
        (layer.weight * G).sum().backward()
        changed = self.control.analyse(self.step, lambda *args: exchange(self.optimizer, self.model, *args))
        self.optimizer.step()
        self.control.protect()
        return changed, self.control.seen['c_q']


def test_a_gradient_in_the_principal_space_switches_at_the_next_analysis():
    watched = Watched()
    changed, seen = watched.analyse('danger')
    assert (changed, seen['action'], seen['mode'], seen['reason']) == (False, 'initial', 'full',
                                                                       'initial_svd_computation')
    assert watched.control.report(20) == ['=== SVD Analysis at step 20 ===', '[c_q] Initial SVD computed',
                                          '=== SVD Analysis complete ===']
    changed, seen = watched.analyse('danger')
    assert (changed, seen['action'], seen['mode'], seen['r']) == (True, 'lowrank', 'lowrank', 30)
    assert seen['principal_alignment'] > .99 and seen['reason'] == 'gradient_clobbering_risk'
    assert '[c_q] SWITCHED TO LOW-RANK (r=30) - Reason: gradient_clobbering_risk' in watched.control.report(40)
    assert watched.layer.r == 30 and watched.layer.base.weight.grad is None


def test_a_gradient_outside_does_not():
    watched = Watched()
    for _ in range(6):
        changed, seen = watched.analyse('calm')
        assert not changed and seen['mode'] == 'full' and watched.layer.r is None
    assert seen['principal_alignment'] < 1e-6 and seen['reason'] == 'reconstruction_unsafe'


def test_without_protection_the_update_is_seen_in_the_principal_space_and_with_it_not():
    for protection, least, most in (('none', .01, 1), ('left', 0, 1e-3)):
        watched = Watched(protection)
        for _ in range(2):
            _, seen = watched.analyse('danger')
        assert least <= seen['update_alignment'] <= most


def test_analyses_go_on_after_a_switch_and_r_shrinks_after_patience():
    """Danger all the time: low-rank mode does not end. r: 30, then 0.8 of it after each three analyses, 8 at last."""
    watched = Watched()
    watched.analyse('danger'), watched.analyse('danger')
    ranks, seen_principal = [], []
    for _ in range(8 * PATIENCE):
        changed, seen = watched.analyse('danger')
        ranks.append(watched.layer.r)
        seen_principal.append(seen['principal_alignment'])
        assert seen['action'] == 'refactored' and changed == (len(ranks) > 1 and ranks[-1] != ranks[-2]
                                                              or len(ranks) == 1 and ranks[0] != 30)
    expected = [30, 24, 19, 15, 12, 9, 8, 8, 8]
    assert ranks == [expected[(i + 1) // PATIENCE] for i in range(len(ranks))]
    assert min(seen_principal) > .99                                # of the space that is protected then


def test_low_rank_mode_ends_after_calm_analyses():
    """In a row: a danger in between starts the count anew. After that danger switches it on again, at the r it had."""
    watched = Watched()
    watched.analyse('danger'), watched.analyse('danger')
    for kind in ['calm'] * (CALM - 1) + ['danger'] + ['calm'] * (CALM - 1):
        _, seen = watched.analyse(kind)
        assert seen['mode'] == 'lowrank' and watched.layer.r is not None
    r = watched.layer.r
    changed, seen = watched.analyse('calm')
    assert changed and seen['action'] == 'full' and watched.layer.r is None
    assert f'[c_q] SWITCHED TO FULL - Reason: nothing to protect from in {CALM} analyses' in watched.control.report(1)
    assert watched.layer.base.weight.requires_grad and watched.layer.base.weight in watched.optimizer.state
    _, seen = watched.analyse('danger')
    assert seen['action'] == 'lowrank' and watched.layer.r == r < 30


@pytest.mark.parametrize('nothing', [0.0, float('nan'), float('inf')])
def test_gradients_that_say_nothing_are_not_calm(nothing):
    watched = Watched()
    watched.analyse('danger'), watched.analyse('danger')
    for _ in range(CALM + 2):
        watched.step += 20
        watched.control.watch()
        watched.optimizer.zero_grad(set_to_none=True)
        (watched.layer.weight * nothing).sum().backward()
        watched.control.analyse(watched.step, lambda *args: exchange(watched.optimizer, watched.model, *args))
        assert watched.layer.r is not None and watched.control.memory['c_q']['calm'] == 0


def test_the_protected_space_is_that_of_the_last_analysis():
    """Refactored each time, also at the same r."""
    watched = Watched()
    watched.analyse('danger'), watched.analyse('danger')
    with torch.no_grad():
        watched.layer.base.weight.add_(torch.randn(40, 40, generator=torch.Generator().manual_seed(1)))
    W = watched.layer.weight.detach().double()
    objects = watched.layer.half_decayed()
    watched.analyse('danger')
    assert all(a is b for a, b in zip(objects, watched.layer.half_decayed()))               # r did not change
    U = torch.linalg.svd(W)[0][:, :10]
    assert (torch.linalg.svdvals(U.mT @ watched.layer.protected.double()) - 1).abs().max() < 1e-5


@pytest.mark.parametrize('damage', [
    lambda s: s.pop('c_q'), lambda s: s.update(other=s['c_q']), lambda s: s['c_q'].pop('U'),
    lambda s: s['c_q'].update(S=torch.ones(3)), lambda s: s['c_q'].update(U=3), lambda s: s['c_q'].update(calm=-1),
    lambda s: s['c_q'].update(patience=True), lambda s: s['c_q'].update(r=40), lambda s: s['c_q'].update(r=0),
    lambda s: s['c_q'].update(patience=1.0)])
def test_a_state_that_does_not_fit_is_refused(damage):
    watched, other = Watched(), Watched()
    watched.analyse('danger'), watched.analyse('danger')
    other.control.load_state_dict(watched.control.state_dict())
    state = watched.control.state_dict()
    damage(state)
    with pytest.raises(ValueError):
        other.control.load_state_dict(state)


def test_a_narrow_layer_can_be_watched():
    """g = 2, the least that has a minor and a principal component."""
    for m, n in ((2, 2), (2, 9), (9, 2), (11, 11)):
        layer = make_layer(weight('random', (m, n)), dtype=torch.float32)
        control = AdaptiveSVD({'x': layer}, 1)
        for step in range(20, 24):
            control.watch()
            layer.base.weight.grad = left_basis(layer.weight)[0][:, :1].float() @ torch.ones(1, n)
            control.analyse(step, lambda old, new, convert: convert([{} for _ in old]))
            control.protect()
        assert layer.r == 1 and control.seen['x']['mode'] == 'lowrank'

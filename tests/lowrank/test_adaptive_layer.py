"""Adaptive layers: a switch does not change the function, protected directions stay, the optimizer
follows a switch, and the analyses decide when to switch."""

from functools import partial

import pytest
import torch
from torch import nn

from helpers import normal, optimizer_of, with_singular_values
from lowrank.adapters import adaptive_layers
from lowrank.adaptive_layer import AdaptiveSVD, AdaptiveSVDLinear, switch, thin_svd
from model import GPT, GPTConfig
from runtime.optimizer import swap_params

pytestmark = pytest.mark.usefixtures('one_thread')
each_optimizer = pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
each_case = pytest.mark.parametrize(
    'kind, shape, dtype',
    [  # shape (m, n)
        ('random', (24, 24), torch.float32), ('random', (40, 16), torch.float64),
        ('zero', (16, 40), torch.float64), ('zero', (12, 11), torch.float32),
        ('rank 1', (40, 16), torch.float32), ('rank 5', (24, 24), torch.float64),
        ('rank 5', (16, 40), torch.float32), ('a zero row', (12, 11), torch.float64),
        ('tiny', (16, 40), torch.float32), ('large', (40, 16), torch.float32),
        ('large', (24, 24), torch.float64)])


def weight(kind, shape):
    """Return a float64 matrix with singular values as evenly spread as those of a trained layer."""
    U, _, Vh = torch.linalg.svd(normal(*shape), full_matrices=False)
    S = torch.linspace(2, .2, min(shape), dtype=torch.float64)
    S[{'rank 1': 1, 'rank 5': 5}.get(kind, len(S)):] = 0
    scales = torch.ones(shape[0], 1) * {'zero': 0, 'tiny': 1e-12, 'large': 1e6}.get(kind, 1)
    scales[1] *= kind != 'a zero row'
    return scales * (U * S @ Vh)


def make_layer(W, protection='left', dtype=torch.float64):
    linear = nn.Linear(W.size(1), W.size(0)).to(dtype)
    linear.load_state_dict(dict(weight=W, bias=torch.arange(W.size(0)) / 10))
    return AdaptiveSVDLinear(linear, protection)


def gradient_step(layer, seed, lr=1e-2):
    """Take a step of a new AdamW towards random targets, and keep the gradients."""
    layer.zero_grad()
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=lr)
    x = normal(64, layer.base.in_features, seed=seed).to(layer.weight)
    (layer(x) - x[:, :1]).square().sum().backward()
    optimizer.step()
    layer.project_factors()


def relative(a, b):
    """Return |a - b| / |b|, or |a| if b is zero."""
    return ((a - b).norm() / (b.norm() or 1)).item()


# --------------------------------------------------------------------------------------------------
# the function

@pytest.mark.any_device
@each_case
def test_no_switch_changes_the_function(kind, shape, dtype, device):
    """A switch changes neither the weight, the outputs nor the bias, up to 1e-6, and it draws no
    random number. The layer is trained between switches."""
    dtype, g = torch.float32 if device == 'mps' else dtype, min(shape)
    layer, x = make_layer(weight(kind, shape),
                          dtype=dtype).to(device), normal(3, shape[1]).to(device, dtype)
    bias, lr = layer.bias, 1e-2 * (layer.weight.abs().max().item() ** .5 or 1)
    for step, r in enumerate(
        (max(2, g - 10), max(2, g - 10), max(2, g - 10) - 1, None, g - 1, 1, None)):
        W, b, y = layer.weight.detach().clone(), layer.bias.detach().clone(), layer(x)
        state = torch.get_rng_state()
        layer.switch_to_full() if r is None else layer.switch_to_lowrank(r)
        merged = layer.merge()
        assert torch.equal(torch.get_rng_state(),
                           state) and layer.r == r and type(merged) is nn.Linear
        assert relative(layer.weight, W) <= 1e-6 and relative(merged.weight, W) <= 1e-6, step
        assert (layer(x) - y).norm() <= 1e-6 * (W.norm() * x.norm() + b.norm()), step
        assert layer.bias is bias and torch.equal(bias, b) and torch.equal(merged.bias, b)
        assert {t.dtype for t in (*layer.parameters(), *layer.buffers(), layer(x))} == {dtype}
        gradient_step(layer, step, lr)


@each_case
def test_every_pair_of_factors_can_learn(kind, shape, dtype):
    """Every row of A and column of B gets a gradient and moves, even if its singular value is
    zero."""
    layer = make_layer(weight(kind, shape), dtype=dtype)
    layer.switch_to_lowrank(min(shape) - 2)
    A, B = (p.detach().clone() for p in layer.factor_params())
    for seed in range(3):
        gradient_step(layer, seed)
    assert [name for name, p in layer.named_parameters() if p.grad is not None] == [
        'base.bias', 'A.weight', 'B.weight']
    for axis, p, before in ((1, layer.A.weight, A), (0, layer.B.weight, B)):
        assert (p.grad.norm(dim=axis)
                > 0).all() and (p != before).any(dim=axis).all() and p.isfinite().all()


@each_case
def test_factors_are_the_minor_components_and_the_protected_space_is_the_rest(kind, shape, dtype):
    """B A starts as the minor components, and `protected` holds the principal left singular
    vectors. The reference is torch.linalg.svd. Scales of 1e-200 and 1e150 show that no square
    overflows or underflows."""
    W, g = weight(kind, shape), min(shape)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    near = 1e-6 * (S[0].item() or 1)
    for r, scale in ((1, 1), (g // 2, 1e-200), (g - 1, 1e150)):
        layer, k = make_layer(W * scale), g - r
        layer.switch_to_lowrank(r)
        space, A, B = layer.protected, layer.A.weight / scale ** .5, layer.B.weight / scale ** .5
        assert (space.shape, A.shape, B.shape) == ((shape[0], k), (r, shape[1]), (shape[0], r))
        torch.testing.assert_close(space.mT @ space, torch.eye(k).double(), rtol=0, atol=1e-12)
        assert (B @ A - U[:, k:] * S[k:] @ Vh[k:]).norm() <= near >= (space.mT @ B).norm()
        assert (space @ (space.mT @ W) - U[:, :k] * S[:k] @ Vh[:k]).norm() <= near
        if S[0] > 0:  # rows of A have the norm sqrt(max(sigma, floor))
            torch.testing.assert_close(A.norm(dim=1), S[k:].clamp_min(1e-3 * S[0]).sqrt(),
                                       rtol=1e-6, atol=0)


# --------------------------------------------------------------------------------------------------
# protection

@pytest.mark.parametrize('shape, dtype', [((24, 24), torch.float32), ((16, 40), torch.float64),
                                          ((40, 16), torch.float32), ((12, 11), torch.float64)])
@pytest.mark.parametrize('protection, least, most', [('left', 0, 1e-5), ('none', .1, 10)])
def test_what_is_protected_survives_a_hostile_optimizer(shape, dtype, protection, least, most):
    """U_p^T W stays within 1e-5 over 100 AdamW steps on a loss that reverses the principal
    components. The rest of W moves. Without protection the principal components are overwritten."""
    layer = make_layer(weight('random', shape), protection, dtype)
    layer.switch_to_lowrank(max(1, min(shape) - 6))
    W, U = layer.weight.detach().clone(), layer.protected.clone()
    optimizer = torch.optim.AdamW(layer.factor_params(), lr=1e-2, weight_decay=.05)
    for seed in range(100):
        optimizer.zero_grad()
        noise = normal(*shape, seed=seed).to(dtype)
        ((U.mT @ (layer.weight + W)).square().sum() + .01 * (layer.weight * noise).sum()).backward()
        optimizer.step()
        layer.project_factors()
    assert relative(layer.weight,
                    W) > .01 and least <= relative(U.mT @ layer.weight, U.mT @ W) <= most


# --------------------------------------------------------------------------------------------------
# the optimizer

def trained(optimizer, steps=3):
    """Return a float64 GPT with adaptive layers, its optimizer after some steps, and a function
    that runs a backward pass."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=24, bias=False,
                          adaptive_svd=True, adaptive_svd_target_layer=-1,
                          adaptive_svd_targets='c_q,c_proj')).double()
    opt = optimizer_of(model, optimizer)

    def backward(seed):
        opt.zero_grad(set_to_none=True)
        idx = torch.randint(11, (4, 17), generator=torch.Generator().manual_seed(seed))
        model(idx[:, :-1], idx[:, 1:])[1].backward()
    for seed in range(steps):
        backward(seed), opt.step()
    return model, opt, backward


def states(opt):
    """Return a dict: parameter -> its optimizer state."""
    parts = getattr(opt, 'optimizers', (opt,))
    return {p: dict(state) for part in parts for p, state in part.state.items()}


def tensors(model, opt, but):
    """Return all parameters except `but`, with their gradients and optimizer states."""
    return [t for p in model.parameters() if p not in but
            for t in (p, p.grad, *states(opt).get(p, {}).values()) if t is not None]


@each_optimizer
def test_a_switch_leaves_other_parameters_alone_and_skips_no_step(optimizer):
    """A switch leaves all other parameters, gradients and optimizer states untouched. They stay the
    same objects with the same values. The gradients after a switch equal those of a new backward
    pass. The optimizer state of the switched layer starts from zero, and every parameter moves in
    the next step."""
    model, opt, backward = trained(optimizer)
    layers, seen = list(adaptive_layers(model).values()), set()
    for step, (i, r) in enumerate([(0, 14), (0, 14), (1, 5), (0, 8), (3, 23), (1, None), (0, None),
                                   (1, 1), (3, None), (1, None)], 4):  # None: to full mode
        layers[i].track_weight_grad(True)  # as in steps with an analysis
        backward(step)
        own = {layers[i].base.weight, *layers[i].factor_params()}
        before = [(t, t.clone()) for t in tensors(model, opt, own)]
        switch(layers[i], r, partial(swap_params, opt, model))
        assert all(a is b and torch.equal(b, value) for a, (b, value) in zip(
            tensors(model, opt, own | {*layers[i].factor_params()}), before, strict=True))
        trainable = {p: p.detach().clone() for p in model.parameters() if p.requires_grad}
        grouped = [p for group in opt.param_groups for p in group['params']]
        assert len(grouped) == len(trainable) and {*grouped} == {*trainable}
        new = {layers[i].base.weight, *layers[i].factor_params()} & {*trainable}
        assert {*states(opt)} == {*trainable} - (new if optimizer == 'adamw' else set())
        ours = [p.grad.clone() for p in trainable]
        backward(step)
        torch.testing.assert_close(ours, [p.grad for p in trainable], rtol=1e-6, atol=1e-10)
        opt.step()
        assert all((p != value).any() for p, value in trainable.items())
        assert {*states(opt)} == {*trainable}
        assert all(state['step'] == (1 if p in new else step) for p, state in states(opt).items()
                   if 'step' in state and p not in seen)
        seen |= new


@each_optimizer
def test_decay_shrinks_the_product_as_much_as_a_weight(optimizer):
    """Weight decay shrinks B A as much as it would shrink a weight. With a zero gradient B A is
    multiplied by (1 - lr * decay / 2)^2, and W_p stays bit-identical."""
    model, opt, _ = trained(optimizer, steps=0)
    layer = adaptive_layers(model)['block0.attn.c_q']
    for r in (14, None, 5, 14):
        switch(layer, r, partial(swap_params, opt, model))
    A, B = layer.factor_params()
    A.grad, B.grad = torch.zeros_like(A), torch.zeros_like(B)
    frozen, product = layer.base.weight.clone(), (B @ A).detach()
    opt.step()
    assert torch.equal(layer.base.weight, frozen)
    torch.testing.assert_close((B @ A).detach(),
                               product * (1 - 1e-2 * .1 / 2) ** 2, rtol=1e-9, atol=0)


# --------------------------------------------------------------------------------------------------
# when to switch

class Watched:
    """A float32 layer with its AdamW and its analyses.

    `analyze(kind)` runs one analysis. For 'danger' the gradient lies inside the span of the
    components that are protected, or would be after a switch. For 'calm' it lies outside. `kind`
    may also be the gradient itself."""

    def __init__(self, W=None, protection='left'):
        self.layer = make_layer(
            weight('random', (40, 40)) if W is None else W, protection, torch.float32)
        self.optimizer = torch.optim.AdamW(self.layer.parameters(), 1e-5)
        self.control, self.step = AdaptiveSVD({'c_q': self.layer}, 20), 0

    def swap(self, old):
        """Give the optimizer the current parameters of the layer."""
        for p in old:
            self.optimizer.state.pop(p, None)
        self.optimizer.param_groups[0]['params'] = [
            p for p in self.layer.parameters() if p.requires_grad]

    def gradient(self, kind):
        U, r = thin_svd(
            self.layer.weight)[0], self.layer.r or max(1,
                                                       min(self.layer.weight.shape) - 10)
        columns = U.split((U.size(1) - r, r), dim=1)[kind == 'calm']
        return columns @ normal(columns.size(1), self.layer.base.in_features,
                                seed=self.step).float()

    def analyze(self, kind, **processes):
        self.step += 20
        self.control.track_weight_grads()
        G = self.gradient(kind) if isinstance(kind, str) else kind
        self.optimizer.zero_grad(set_to_none=True)
        (self.layer.weight * G).sum().backward()
        changed = self.control.analyze(self.step, self.swap, **processes)
        assert (self.layer.base.weight.grad is None) == (self.layer.r is not None)
        self.optimizer.step()
        self.control.project_factors()
        return changed, self.control.diagnostics['c_q']


@pytest.fixture
def protected():
    """A layer after two analyses with gradients in the principal components."""
    watched = Watched()
    watched.analyze('danger'), watched.analyze('danger')
    return watched


def test_a_gradient_in_the_principal_space_switches_at_the_second_analysis():
    """The first analysis only records the SVD. The second one switches the layer to low-rank mode
    if the gradient lies in the principal components, and the report and the metrics say so."""
    watched = Watched()
    for expected in ((False, 'initial', 'full', 40, 'initial_svd_computation'),
                     (True, 'lowrank', 'lowrank', 30, 'gradient_clobbering_risk')):
        changed, seen = watched.analyze('danger')
        assert (changed, *(seen[key] for key in ('action', 'mode', 'r', 'reason'))) == expected
    first, line, _ = watched.control.report(40)
    assert 'step 40' in first and '[c_q]' in line and 'r=30' in line and seen['reason'] in line
    assert watched.layer.r == 30 and not watched.layer.base.weight.requires_grad
    metrics = watched.control.metrics()
    assert metrics['svd/c_q/mode'] == 'lowrank' and metrics['svd/c_q/chance'] == .25
    assert 'svd/c_q/r_seen' not in metrics and None not in metrics.values()
    assert [step for step in range(1, 61) if watched.control.is_analysis_step(step)] == [20, 40, 60]


@pytest.mark.parametrize('protection, least, most', [('none', .01, 1), ('left', 0, 1e-3)])
def test_protection_keeps_the_update_out_of_the_principal_space(protection, least, most):
    """With protection at most 0.1% of the energy of the optimizer's update lies in the principal
    components. Without protection it is at least 1%."""
    watched = Watched(protection=protection)
    watched.analyze('danger')
    assert least <= watched.analyze('danger')[1]['update_alignment'] <= most


def test_r_shrinks_at_every_third_analysis_while_danger_lasts(protected):
    """While gradients lie in the principal components, r shrinks from 30 by a fifth at every third
    analysis, down to 8."""
    ranks = [protected.layer.r]
    for _ in range(23):
        factors_before = protected.layer.factor_params()
        changed, seen = protected.analyze('danger')
        assert changed or all(a is b
                              for a, b in zip(factors_before, protected.layer.factor_params()))
        ranks.append(protected.layer.r)
        assert seen['action'] == 'refactored' and changed == (ranks[-1] != ranks[-2])
        assert seen['principal_alignment'] > .99
    assert ranks == [r for r in (30, 24, 19, 15, 12, 9, 8, 8) for _ in range(3)]


def test_low_rank_mode_ends_after_five_calm_analyses_in_a_row(protected):
    """Low-rank mode ends after five calm analyses in a row. An analysis that finds danger restarts
    the count. A later switch to low-rank mode uses the last r."""
    for kind in ['calm'] * 4 + ['danger'] + ['calm'] * 4:
        assert protected.analyze(kind)[1]['mode'] == 'lowrank'
    r = protected.layer.r
    changed, seen = protected.analyze('calm')
    assert (changed, seen['action'], seen['r'], protected.layer.r) == (True, 'full', 40, None)
    assert 'FULL' in protected.control.report(1)[1]
    assert protected.analyze('danger')[1]['action'] == 'lowrank' and protected.layer.r == r
    for _ in range(4):                                              # both counts start again
        assert protected.analyze('calm')[1]['action'] == 'refactored'


@pytest.mark.parametrize('nothing', [0.0, float('nan'), float('inf')])
def test_gradients_without_information_are_not_calm(protected, nothing):
    """Gradients that are zero, NaN or inf do not count as calm analyses."""
    for _ in range(7):
        protected.control.track_weight_grads()
        (protected.layer.weight * nothing).sum().backward()
        protected.control.analyze(40, lambda old: None)
    assert protected.layer.r is not None and protected.control.state_dict()['c_q']['calm'] == 0


def test_several_processes_decide_on_their_mean_gradient(protected):
    """With several processes the decision uses the gradient that `mean` averages over them.
    `on_main` lets process 0 alone run the analysis, and all processes use its result."""
    _, seen = protected.analyze('calm', mean=lambda grad: protected.gradient('danger'))
    assert seen['reason'] == 'gradient_clobbering_risk'
    _, seen = protected.analyze(
        'danger', on_main=lambda look: [(*decision, found | {'reason': 'that of the first'}, r, usv)
                                        for *decision, found, r, usv in look()])
    assert seen['reason'] == 'that of the first'


def test_the_spaces_of_a_steep_spectrum_are_told_apart():
    """The measured angle stays below 0.01 radians if W changes by noise of float32's size only,
    even with k = 226 of 256 directions and singular values from 1 to 1e-3."""
    watched = Watched(with_singular_values(torch.logspace(0, -3, 256), 256, 256))
    watched.layer.switch_to_lowrank(30)
    for angle in (None, pytest.approx(0, abs=1e-2)):
        assert watched.analyze(normal(256, 256, seed=2))[1]['subspace_angle'] == angle
        watched.layer.base.weight.data *= 1 + 1e-7 * normal(256, 256, seed=3)


@pytest.mark.parametrize('shape', [(2, 2), (2, 9), (9, 2), (11, 11)])
def test_a_narrow_layer_can_be_watched(shape):
    """Layers with as few as two rows or columns can switch to low-rank mode."""
    watched = Watched(weight('random', shape))
    for _ in range(4):
        watched.analyze('danger')
    assert watched.layer.r == 1 and watched.control.diagnostics['c_q']['mode'] == 'lowrank'


def test_a_state_comes_back_and_needs_every_layer(protected):
    """The state dict restores the controller, and a state without one of the layers raises
    KeyError."""
    other, state = Watched(), protected.control.state_dict()
    other.control.load_state_dict(state)
    assert other.control.state_dict() == state
    with pytest.raises(KeyError, match='c_q'):
        other.control.load_state_dict({})

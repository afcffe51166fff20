"""The device must compute what the CPU computes. Together with the other tests marked any_device
this is the self-test of a machine: python -m pytest --device=cuda

Bounds are relative to the largest entry of each compared tensor. They are wider on MPS, which has
no float64 and sums V^T V in float32. That costs a gradient up to 1 / gap^2 roundings."""

import copy

import pytest
import torch

from helpers import checkpoint, svd
from lowrank.svd import METHODS, low_rank_approximation
from model import GPT, SCOPES, GPTConfig
from runtime.device import autocast

pytestmark = [pytest.mark.any_device, pytest.mark.usefixtures('one_thread')]
# heads of 16
SHAPE = dict(block_size=32, vocab_size=17, n_layer=2, n_head=2, n_embd=32, svd_block=8)
FACTORS = {'h.0.attn.c_attn.c_v': 8, 'h.0.attn.c_proj': 8, 'h.0.mlp.c_fc': 16, 'h.0.mlp.c_proj': 16}
MODELS = {
    'dense': {}, 'mla': dict(use_mla=True), 'mla causal': dict(use_mla=True, **svd('causal', 4)),
    'factored': dict(layer_ranks=FACTORS),
    'shared keys': dict(n_kv_head=1), 'narrow heads': dict(qk_head_dim=[9, 5], v_head_dim=[16, 16]),
    'targets': svd('causal', 4, svd_targets='k,v'),
    **{f'{scope} {method}': svd(scope, 4, method) for scope in SCOPES for method in METHODS}
}
each_model = pytest.mark.parametrize('options', MODELS.values(), ids=MODELS)


def well_separated(**options):
    """Return a float32 model whose value projections halve from one column of a head to the next.
    The singular values of V fall as fast, so the gap at the cut is wide and devices differ by
    rounding only."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE | options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=.2)
        for block in model.transformer.h:
            # (nh, hs, C or latent)
            block.attn.c_attn.head_weight('v').mul_(2.0 ** -torch.arange(16).unsqueeze(-1))
    return model


def outcome(model, device, dtype='float32', replica=None):
    """Return [logits, loss, gradient of each parameter] as float32 on the CPU. For float16 the loss
    is scaled, as in training."""
    x, y = torch.randint(17, (2, 4, 32), generator=torch.Generator().manual_seed(0)).to(device)
    scale = 2.0 ** 10 if dtype == 'float16' else 1.0
    model.zero_grad()
    with autocast(device, dtype):
        logits, loss = (replica or model)(x, y)
    (loss * scale).backward()
    return [
        t.detach().float().cpu()
        for t in (logits, loss, *(p.grad / scale for p in model.parameters()))]


def assert_near(actual, expected, bound):
    """Compare each tensor relative to its largest entry. Gradients of key biases are zero up to
    rounding, so their scale has a floor."""
    floor = .1 * max(gradient.abs().max() for gradient in expected[2:])
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).abs().max() <= bound * max(b.abs().max(), floor)      # false for NaN


@each_model
def test_the_device_computes_what_the_cpu_does(device, options):
    """Logits, loss and gradients on the device equal those on the CPU to 1e-4, or 1e-3 on MPS."""
    if device == 'cpu':
        pytest.skip('the device is the CPU')
    model = well_separated(**options)
    expected = outcome(copy.deepcopy(model), 'cpu')
    assert_near(outcome(model.to(device), device), expected, 1e-3 if device == 'mps' else 1e-4)


@pytest.mark.parametrize('dtype, bound', [('bfloat16', .2), ('float16', .03)])
@pytest.mark.parametrize('name',
                         ['dense', 'mla', 'sequence standard', 'causal gram', 'weight randomized'])
def test_half_precision_is_near_float32(device, dtype, bound, name):
    """Under autocast, bfloat16 and float16 differ from float32 by a few dozen of their
    roundings."""
    model = well_separated(**MODELS[name]).to(device)
    assert_near(outcome(model, device, dtype), outcome(model, device), bound)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('method', METHODS)
def test_the_svd_of_half_precision_is_that_of_float32_rounded_once(device, method, dtype):
    """The SVD of half-precision values is bit-identical to the float32 one, rounded once."""
    v, dy = torch.randn(2, 8, 64, 16, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    half, single = v.clone().requires_grad_(), v.float().requires_grad_()
    with autocast(device, str(dtype).removeprefix('torch.')):
        low = low_rank_approximation(half, 4, method)
    low.backward(dy)
    expected = low_rank_approximation(single, 4, method)
    expected.backward(dy.float())
    assert torch.equal(low, expected.to(dtype)) and torch.equal(half.grad, single.grad.to(dtype))


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_a_resumed_run_is_the_undisturbed_one(device, fit, here, dtype):
    """On the device a stopped and resumed run ends near the uninterrupted run, including the state
    of a float16 gradient scaler."""
    if device == 'cpu':
        pytest.skip('tests/runtime/test_resume.py does it there, to the bit')
    options = [
        '--dropout=.2', '--use_svd=True', '--svd_rank=3', '--optimizer=muon', '--lr_decay_iters=6',
        '--eval_interval=3', f'--device={device}', f'--dtype={dtype}']
    fit(*options, '--max_iters=6', '--out_dir=whole')
    fit(*options, '--max_iters=3')
    half = checkpoint()['model']
    fit(*options, '--max_iters=6', '--init_from=resume')
    whole, parts = checkpoint('whole')['model'], checkpoint()['model']
    # a backward pass may add in any order; a lost random state, data order or optimizer state would
    # move weights by a third of the way
    for name, weight in whole.items():
        assert (parts[name] - weight).norm() <= .1 * (weight - half[name]).norm()


@pytest.mark.parametrize('name', ['dense', 'causal gram', 'mla'])
def test_the_compiled_model_is_the_eager_one(device, name):
    """torch.compile on the device gives one graph with the eager logits, loss and gradients."""
    if device == 'cpu':
        pytest.skip('tests/model/test_compile.py compiles on the CPU')
    model = well_separated(n_layer=1, **MODELS[name] | dict(layer_ranks=None)).to(device)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    assert_near(outcome(model, device, replica=compiled), outcome(model, device), 1e-4)

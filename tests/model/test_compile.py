"""torch.compile of the whole model as one graph, and half precision around the SVD but not in it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank.svd import EXACT_METHODS, METHODS, causal_low_rank_approximation, low_rank_approximation
from model import GPT, SCOPES, GPTConfig

pytestmark = pytest.mark.usefixtures('one_thread')
SVDS = [dict(use_svd=True, svd_method=method, svd_scope=scope) for method in METHODS for scope in SCOPES]
BASELINE = dict(use_svd=False)
LATENTS = [dict(use_svd=True, svd_method=method, svd_scope=scope, use_mla=True, mla_latent_dim=3) for method, scope in (
    ('gram', 'causal'), ('standard', 'sequence'), ('gram', 'weight'), ('randomized', 'causal'))]
LATENTS += [dict(use_svd=False, use_mla=True, mla_latent_dim=3)]
FACTORS = dict(use_svd=False, layer_ranks={'h.0.attn.c_attn.c_v': 3, 'h.0.attn.c_proj': 4, 'h.0.mlp.c_fc': 5})
half = pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=['bfloat16', 'float16'])


def name(options):
    names = {'use_mla': 'latents', 'layer_ranks': 'factors'}
    unsaid = ('use_svd', 'mla_latent_dim')
    return ', '.join(names.get(k, str(v)) for k, v in options.items() if k not in unsaid) or 'baseline'


@pytest.fixture
def fresh():
    """Many models share one forward, which torch compiles anew eight times and no more."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(**options):
    torch.manual_seed(0)
    shape = dict(block_size=16, vocab_size=11, n_layer=1, n_head=2, n_embd=16)
    model = GPT(GPTConfig(**shape, svd_rank=2, svd_block=4, **options))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=.2)
    return model


def outcome(model, dtype=None):
    """-> loss, every gradient."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(11, (2, 16), generator=generator) for _ in range(2))
    model.zero_grad()
    with torch.autocast('cpu', dtype=dtype, enabled=dtype is not None):
        _, loss = model(x, y)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


def assert_close(ours, expected, tolerance):
    """Relative to the loss, and to the largest gradient of all: those of the key biases are zero but for rounding."""
    scale = max(g.abs().max() for g in expected[1])
    assert abs(ours[0] - expected[0]) <= tolerance * expected[0]
    assert max((a - b).abs().max() for a, b in zip(ours[1], expected[1])) <= tolerance * scale


# ----------------------------------------------------------------------------------------------------------------------
# torch.compile

@pytest.mark.parametrize('backend', ['aot_eager', pytest.param('inductor', marks=pytest.mark.slow)])
@pytest.mark.parametrize('options', [
    BASELINE, *(pytest.param({**options, 'svd_basis_grad': basis_grad}, marks=[pytest.mark.slow] * (
        not basis_grad or name(options) in ('randomized, sequence', 'randomized, weight')))
        for options in SVDS for basis_grad in (True, False) if basis_grad or options['svd_method'] in EXACT_METHODS),
    LATENTS[0], FACTORS, *(pytest.param(o, marks=pytest.mark.slow) for o in LATENTS[1:])], ids=name)
def test_the_compiled_model_is_the_model(fresh, options, backend):
    """fullgraph: a graph break raises. aot_eager traces forward and backward and runs them in torch's own kernels, so
    to the bit; inductor makes kernels that add in another order, needs a compiler and is slow."""
    model = make(**options)
    assert_close(outcome(torch.compile(model, fullgraph=True, backend=backend)), outcome(model),
                 1e-4 if backend == 'inductor' else 0)


@pytest.mark.parametrize('options', [
    BASELINE, *(pytest.param(o, marks=[pytest.mark.slow] * (name(o) != 'gram, causal')) for o in SVDS
                if name(o) not in ('randomized, sequence', 'randomized, causal')),
    pytest.param(LATENTS[0], marks=pytest.mark.slow)], ids=name)
def test_autocast_compiles_as_one_graph(fresh, options):
    """The SVD leaves autocast inside the graph."""
    model, dtype = make(**options), torch.bfloat16
    assert_close(outcome(torch.compile(model, fullgraph=True, backend='aot_eager'), dtype), outcome(model, dtype), 0)


# ----------------------------------------------------------------------------------------------------------------------
# half precision

@half
@pytest.mark.parametrize('options', [BASELINE, *SVDS, *LATENTS], ids=name)
def test_half_precision_gives_finite_gradients_and_nearly_the_loss(options, dtype):
    """Gradients are only finite here: at a small gap they may differ by more than a rounding, and rightly so."""
    model = make(**options)
    loss, gradients = outcome(model, dtype)
    torch.testing.assert_close(loss, outcome(model)[0], rtol=.02, atol=0)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


class Recorder(TorchDispatchMode):
    """seen: (operation, dtypes of its floating tensors) of all that is computed, copies and casts left out."""
    COPIES = ('_to_copy', 'copy_', 'clone', 'view', '_unsafe_view', 'reshape', 'expand', 'transpose', 'detach', 'slice')

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        flat = torch.utils._pytree.arg_tree_leaves(*args, **(kwargs or {}))
        dtypes = {t.dtype for t in flat if isinstance(t, torch.Tensor) and t.is_floating_point()}
        operation = func.overloadpacket.__name__
        if operation not in self.COPIES:
            self.seen.append((operation, dtypes))
        return func(*args, **(kwargs or {}))


@half
@pytest.mark.parametrize('shape', [(2, 24, 8), (2, 6, 8)], ids=['tall', 'wide'])
@pytest.mark.parametrize('f', [low_rank_approximation, causal_low_rank_approximation], ids=['whole', 'causal'])
@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('given', ['half', 'float32'])
def test_nothing_inside_the_svd_is_in_half_precision(f, method, shape, given, dtype):
    """Forward and backward, under autocast, for input in half precision (V) and in float32 (W_v)."""
    generator = torch.Generator().manual_seed(0)
    v, dy = (torch.randn(shape, generator=generator).to(dtype if given == 'half' else torch.float32) for _ in range(2))
    v.requires_grad_()
    with torch.autocast('cpu', dtype=dtype), Recorder() as recorder:
        y = f(v, 3, method, **({'block': 4} if f is causal_low_rank_approximation else {}))
        (gradient,) = torch.autograd.grad(y, v, dy)
    assert y.dtype == gradient.dtype == v.dtype
    operations = {operation for operation, _ in recorder.seen}
    decomposition = {'standard': '_linalg_svd', 'gram': '_linalg_eigh', 'randomized': 'linalg_cholesky_ex'}[method]
    assert {decomposition, 'bmm'} <= operations
    assert not [row for row in recorder.seen if row[1] & {torch.bfloat16, torch.float16}]

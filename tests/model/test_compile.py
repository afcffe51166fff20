"""torch.compile of the whole model as one graph, and half precision around the SVD."""

import pytest
import torch

from helpers import make, mla, svd, tokens
from lowrank.svd import METHODS
from model import SCOPES

pytestmark = pytest.mark.usefixtures('one_thread')
SVDS = {f'{method}, {scope}': svd(scope, 2, method) for method in METHODS for scope in SCOPES}
MODELS = {
    'baseline': {},
    **SVDS,
    'MLA': mla(),
    'MLA, gram, causal': mla(**SVDS['gram, causal']),
    'MLA, standard, weight': mla(**SVDS['standard, weight']),
    'shared keys, gram': dict(n_kv_head=1, **svd('causal', 2, svd_targets='k,v')),
    'all targets': svd('weight', 2, 'randomized', svd_targets='q,k,v', svd_rank_q=1),
    'narrow heads': dict(qk_head_dim=[3], v_head_dim=[2]),
    'factored': dict(
        layer_ranks={'h.0.attn.c_attn.c_v': 3, 'h.0.attn.c_proj': 4, 'h.0.mlp.c_fc': 5}),
}
CONSTANT_BASIS = [
    SVDS[name] | dict(svd_basis_grad=False)
    for name in ('standard, causal', 'gram, sequence', 'gram, weight')
]


@pytest.fixture
def fresh():
    """Forget all compiled code. All models share one forward method, which torch recompiles only
    eight times."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def outcome(model, dtype=None):
    """Return the loss and all gradients."""
    model.zero_grad()
    with torch.autocast('cpu', dtype=dtype, enabled=dtype is not None):
        _, loss = model(tokens(), tokens(seed=1))
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize(
    'options, backend, dtype',
    [
        *((options, 'aot_eager', None) for options in (*MODELS.values(), *CONSTANT_BASIS)),
        *(
            (MODELS[name], backend, dtype)
            for backend, dtype in (('aot_eager', torch.bfloat16), ('inductor', None))
            for name in (
                'baseline',
                'gram, causal',
                'standard, sequence',
                'randomized, weight',
                'MLA, gram, causal',
                'factored',
            )
        ),
    ],
    ids=str,
)
def test_the_compiled_model_is_the_model_as_one_graph(fresh, options, backend, dtype):
    """The compiled model is one graph with the eager loss and gradients.

    aot_eager traces forward and backward but runs torch's own kernels, so it is bit-identical.
    inductor generates kernels that add in another order, and it needs a compiler. Under autocast
    the SVD turns autocast off inside the graph. Gradients are compared relative to the largest of
    all, because those of key biases are zero up to rounding."""
    # two layers where a layer's random start must not appear twice in the graph
    layers = 2 if options.get('svd_method') == 'randomized' else 1
    model, tolerance = make(dtype=torch.float32, n_layer=layers,
                            **options), 1e-4 if backend == 'inductor' else 0
    loss, gradients = outcome(torch.compile(model, fullgraph=True, backend=backend), dtype)
    expected_loss, expected = outcome(model, dtype)
    assert abs(loss - expected_loss) <= tolerance * expected_loss
    scale = max(g.abs().max() for g in expected)
    assert max((a - b).abs().max() for a, b in zip(gradients, expected)) <= tolerance * scale


@pytest.mark.parametrize('options', MODELS.values(), ids=MODELS)
def test_half_precision_gives_finite_gradients_and_nearly_the_loss(options):
    """In half precision the loss is within 2% of the float32 loss and all gradients are finite.
    Their values are not compared, because at a small gap they may differ by more than rounding."""
    model = make(dtype=torch.float32, n_layer=1, **options)
    for dtype in (torch.bfloat16, torch.float16):
        loss, gradients = outcome(model, dtype)
        torch.testing.assert_close(loss, outcome(model)[0], rtol=0.02, atol=0)
        assert all(g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in gradients)

"""lowrank/svd.py against torch.linalg.svd in float64: values, gradients, causality and
ill-conditioned matrices. test_subspace.py has the tests of 'randomized' alone.

Apple's MPS has no float64. Tests marked `each_branch` or `exact_branch` also run the code for such
devices, on CPU tensors."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import (assert_close, causal_truth, normal, value_and_gradient, whole_truth,
                     with_singular_values)
from lowrank.spectrum import effective_rank, energy, energy_kept, rank_for_energy
from lowrank.svd import (EXACT_METHODS, METHODS, causal_low_rank_approximation,
                         leading_eigenvectors, low_rank_approximation, truncated_svd)

pytestmark = pytest.mark.usefixtures('one_thread')
EPS = torch.finfo(torch.float32).eps

whole, causal = low_rank_approximation, partial(causal_low_rank_approximation, block=4)
TRUTH = {whole: whole_truth, causal: causal_truth}
each_method = pytest.mark.parametrize('method', METHODS)
exact_method = pytest.mark.parametrize('method', EXACT_METHODS)
each_map = pytest.mark.parametrize('approximate', [whole, causal], ids=['whole', 'causal'])
# (method, whether the device has float64); 'standard' computes in float64 either way
BRANCHES = [('standard', True), ('gram', True), ('gram', False), ('randomized', True),
            ('randomized', False)]
each_branch, exact_branch = (
    pytest.mark.parametrize('method, float64_here', branches, indirect=['float64_here'])
    for branches in (BRANCHES, BRANCHES[:3]))


# --------------------------------------------------------------------------------------------------
# values and gradients


@settings(derandomize=True, deadline=None, max_examples=60)
@given(rows=st.integers(1, 30), columns=st.integers(1, 12),
       batch=st.sampled_from([(), (1, ), (2, 2)]), rank=st.integers(1, 13), block=st.integers(1, 9),
       seed=st.integers(0, 99), method=st.sampled_from(EXACT_METHODS))
def test_any_matrix_has_the_values_and_gradient_of_torch_svd(rows, columns, batch, rank, block,
                                                             seed, method):
    """Values and gradients equal those of torch.linalg.svd and autograd, for random shapes, ranks
    and blocks. The tolerance of the gradient is wider and leaves room for gaps down to 1e-4,
    because autograd divides by differences of squared singular values."""
    x, dy = normal(*batch, rows, columns, seed=seed), normal(*batch, rows, columns, seed=seed + 1)
    for ours, truth in ((lambda x: whole(x, rank, method), lambda x: whole_truth(x, rank)),
                        (lambda x: causal(x, rank, method, block=block),
                         lambda x: causal_truth(x, rank, block))):
        y, gradient = value_and_gradient(ours, x, dy)
        expected_y, expected_gradient = value_and_gradient(truth, x, dy)
        assert_close(y, expected_y, 1e-11)
        assert_close(gradient, expected_gradient, 1e-7)


@each_map
@exact_branch
@pytest.mark.parametrize('c, early',
                         [pytest.param(1, 1e-4, marks=pytest.mark.any_device), (1e-6, 1), (1e4, 1)])
def test_float32_has_the_values_and_gradient_of_float64(approximate, method, float64_here, c, early,
                                                        device):
    """In float32, values and gradients equal those of float64 to 100 roundings, for inputs of size
    1, 1e-6 and 1e4. In one case the first rows are 1e4 times smaller than the rest, because a
    causal basis has the scale of the rows that it comes from. Every gap at a cut is at least 1%, so
    rounding costs at most two digits."""
    x, dy = (c * normal(20, 6).clamp(-3, 3)).float(), normal(20, 6, seed=1).float()
    x[:4] *= early
    y, gradient = value_and_gradient(lambda x: approximate(x, 2, method), x.to(device),
                                     dy.to(device))
    expected_y, expected = value_and_gradient(lambda x: TRUTH[approximate](x, 2),
                                              x.double() / c, dy.double())
    assert_close(y.cpu().double() / c, expected_y, 100 * EPS)
    assert_close(gradient.cpu(), expected, 100 * EPS)


@exact_branch
@pytest.mark.parametrize('ratio, gap', [(1, .1), (100, .1), (10, .01), (100, .02), (100, .01)])
def test_precision_is_that_of_the_gap_at_the_cut(method, float64_here, ratio, gap):
    """The error stays at 8 roundings even if sigma_1 / sigma_k = ratio is large and the relative
    gap between sigma_k and sigma_k+1 is small. Only a Gram matrix summed in float32 adds an error
    of eps * ratio / gap. The reference is torch.linalg.svd in float64."""
    sigma = [ratio ** (-i / 15) for i in range(16)] + [(1 - gap) / ratio] + [.5 / ratio] * 15
    x = with_singular_values(sigma, 256, 32).float()
    lost = ratio / gap if method == 'gram' and not float64_here else 0
    assert_close(whole(x, 16, method), whole_truth(x.double(), 16), (8 + lost) * EPS)


@exact_method
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_a_closed_gap_counts_as_n_eps_of_the_largest_eigenvalue(method, dtype):
    """If the singular values at the cut are equal, the gradient divides by n * eps * lambda_1
    instead of by zero. The expected entry is computed by hand."""
    x, dy = 3 * torch.eye(2, dtype=dtype), torch.tensor([[0, 1], [0, 0]], dtype=dtype)
    gradient = value_and_gradient(lambda x: whole(x, 1, method), x, dy)[1]
    assert gradient[1, 0].item() == pytest.approx(1 / (2 * torch.finfo(dtype).eps), rel=1e-6)


@pytest.mark.parametrize('rank', [None, 5, 6])
@pytest.mark.parametrize('approximate, shape', [
    (whole, (9, 5)), (whole, (5, 9)), (whole, (2, 3, 5, 5)), (causal, (64, 5))])
def test_full_rank_returns_the_very_tensor(approximate, shape, rank):
    """At full rank or rank None the result is the input tensor itself, not a copy."""
    x = normal(*shape)
    assert approximate(x, rank) is x


@each_map
@each_branch
@pytest.mark.parametrize('dtype, exponents', [(torch.float32, (-20, 14)),
                                              (torch.float64, (-60, 60))])
def test_scaling_leaves_the_gradient_as_it_is(approximate, method, float64_here, dtype, exponents):
    """Scaling the input by a power of two scales the values by it and does not change the gradient.
    'gram' is bit-identical. The other methods are compared with a tolerance, because LAPACK's svd
    scales by other factors."""
    x, dy = normal(20, 6).to(dtype), normal(20, 6, seed=1).to(dtype)
    bar = 0 if method == 'gram' else 100 * torch.finfo(dtype).eps
    y, gradient = value_and_gradient(lambda x: approximate(x, 2, method), x, dy)
    for c in (2.0 ** exponent for exponent in exponents):
        scaled_y, scaled_gradient = value_and_gradient(lambda x: approximate(x, 2, method), c * x,
                                                       dy)
        assert_close(scaled_y / c, y, bar)
        assert_close(scaled_gradient, gradient, bar)


@each_method
@pytest.mark.parametrize('approximate, spans', [(whole, [(20, 0, 20)]),
                                                (causal, [(4, 4, 8), (8, 8, 16), (16, 16, 20)])],
                         ids=['whole', 'causal'])
def test_without_basis_grad_the_projectors_are_constants(approximate, spans, method):
    """With basis_grad=False the projectors are constants. The map is then linear and symmetric, so
    its gradient is the same map applied to dy."""
    x, dy = normal(20, 6), normal(20, 6, seed=1)
    y, gradient = value_and_gradient(lambda x: approximate(x, 2, method, basis_grad=False), x, dy)
    expected = dy.clone()
    for s, a, b in spans:
        w = leading_eigenvectors(x[:s].mT @ x[:s], 2, method)
        expected[a:b] = dy[a:b] @ w @ w.mT
    assert torch.equal(y, approximate(x, 2, method))
    assert_close(gradient, expected, 1e-11)


@each_method
def test_double_backward_raises(method):
    """A second derivative raises an error. It is not implemented, and without the error Hessians
    would be wrong."""
    x = normal(20, 6).requires_grad_()
    gradient, = torch.autograd.grad(whole(x, 2, method).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        gradient.sum().backward()


# --------------------------------------------------------------------------------------------------
# ill-conditioned matrices

def hostile(rank):
    """Return a dict: name of an ill-conditioned kind -> four different matrices (4, 12, 8) in
    float32."""
    x, row, ramp = normal(4, 12, 8), normal(4, 1, 8, seed=1), torch.logspace(-6, 4,
                                                                             12).double()[:, None]
    orthonormal = torch.linalg.qr(x)[0]
    found = {
        'zero': 0 * x, 'one token': row.expand_as(x), 'repeated values': orthonormal,
        'two repeated values': orthonormal * torch.tensor([3.] * rank + [1.] * (8 - rank)),
        'repeated at the cut': orthonormal * torch.tensor([3.] * (rank - 1) + [1.] * (9 - rank)),
        'identity': torch.eye(12,
                              8).double().expand(4, -1,
                                                 -1), 'duplicated rows': x[:, :3].repeat(1, 4, 1),
        'few rows': torch.cat((x[:, :3], 0 * x[:, 3:]), 1), 'late rows': torch.cat(
            (0 * x[:, :9], x[:, 9:]), 1), 'one element': x * (torch.arange(96).view(12, 8) == 17),
        'zero columns': x * torch.tensor([1., 0, 0, 1, 0, 0, 0, 0]),
        'steep columns': x * torch.logspace(0, -9, 8), 'tiny, then huge': x * ramp,
        'huge, then tiny': x * ramp.flip(0), 'jump up': torch.cat(
            (1e-6 * x[:, :5], 1e4 * x[:, 5:]), 1), 'jump down': torch.cat(
                (1e4 * x[:, :5], 1e-6 * x[:, 5:]), 1), **{
                    f'rank {r}': x[..., :r] @ normal(4, r, 8, seed=2) for r in range(1, rank + 2)
                }, **{f'scale 1e{e}': x * 10. ** e for e in (-6, -3, 4)},
        **{f'rank one, scale 1e{e}': x[..., :1] @ row * 10. ** e for e in (-6, 4)}}
    return {name: x.float() for name, x in found.items()}


@each_map
@each_branch
@pytest.mark.parametrize('rank', [2, 5])
def test_hostile_matrices_give_finite_values_and_gradients(approximate, method, float64_here, rank):
    """Ill-conditioned matrices give finite values and gradients. Each kind runs in a batch of its
    own, where all matrices have the same size, and then in one batch with all others. Matrices
    whose rank is at most the given rank come back unchanged, up to the error of Cholesky QR."""
    dy, kinds = normal(12, 8, seed=5).float(), hostile(rank)
    starts = (dict(start=torch.zeros(8, rank)), dict(start=normal(8, rank), power_iters=1))
    for name, x in (kinds | {'all': torch.cat(list(kinds.values()))}).items():
        size = x.abs().amax((-2, -1), keepdim=True)
        for options in ({}, *starts) if method == 'randomized' else ({},):
            y, gradient = value_and_gradient(
                lambda x: approximate(x, rank, method, **options), x, dy.expand_as(x))
            assert y.isfinite().all() and gradient.isfinite().all(), (name, options)
            assert (y.abs() <= 10 * size).all(), (name, options)
        ranks = torch.linalg.matrix_rank(x.double() / size.clamp_min(1e-45))
        if approximate is whole and ranks.max() <= rank and 'steep' not in name:
            assert ((whole(x, rank, method) - x).abs() <= 1e-4 * size).all(), name


@each_branch
@pytest.mark.parametrize('dtype, value', [(torch.float32, float('nan')),
                                          (torch.float64, float('inf')),
                                          (torch.float32, -float('inf'))])
def test_what_is_not_finite_raises(method, float64_here, dtype, value):
    """On the CPU, NaN and inf in the input raise torch.linalg.LinAlgError in every function and
    method."""
    for shape in ((2, 20, 6), (2, 20, 2), (2, 5, 6)):
        x = normal(*shape).to(dtype)
        x[1, 3, 1] = value
        for f in (truncated_svd, leading_eigenvectors, whole, causal):
            with pytest.raises(torch.linalg.LinAlgError, match='NaN or infinite'):
                f(x.mT @ x if f is leading_eigenvectors else x, 1, method)


# --------------------------------------------------------------------------------------------------
# causality


@each_branch
@pytest.mark.parametrize('dtype, scale', [(torch.float32, 1e-6), (torch.float32, 1e4),
                                          (torch.float64, 1)])
def test_no_bit_of_a_causal_row_depends_on_a_later_one(method, float64_here, dtype, scale):
    """Changing later rows, or their scale, does not change a single bit of an earlier row. NaN in
    row 33 or later stays in its row, because no basis is computed from these rows. Cutting the
    later rows off only changes the order of sums, which costs at most two digits at gaps above
    1%."""
    x = (scale * normal(2, 40, 6)).to(dtype)
    y = causal(x, 2, method)
    for j in (1, 5, 8, 9, 17, 33, 39):
        for later in (1e-6, -3, 1e4, *[float('nan')] * (j > 32)):
            changed = torch.cat((x[:, :j], later * x[:, j:]), dim=1)
            assert torch.equal(causal(changed, 2, method)[:, :j], y[:, :j])
        assert_close(causal(x[:, :j], 2, method), y[:, :j], 1000 * torch.finfo(dtype).eps)


@each_method
@pytest.mark.parametrize('rank, options, unchanged',
                         [(3, dict(block=4), 4), (4, dict(block=4), 8), (5, dict(block=1), 8),
                          (2, dict(block=99), 40), (2, {}, 32)], ids=str)
def test_rows_pass_until_there_are_block_rows_and_more_rows_than_the_rank(
        method, rank, options, unchanged):
    x = normal(40, 6)
    passed = (causal_low_rank_approximation(x, rank, method, **options) == x).all(-1)
    assert passed.tolist() == [True] * unchanged + [False] * (40 - unchanged)


# --------------------------------------------------------------------------------------------------
# spectra

@exact_method
@pytest.mark.parametrize('dtype, shape', [
    (torch.float16, (40, 8)), (torch.bfloat16, (8, 8)), (torch.float32, (2, 3, 8, 12)),
    (torch.float64, (40, 8)), (torch.float64, (2, 3, 8, 12))])
def test_truncated_svd_is_orthonormal_descending_and_the_best_in_its_dtype(method, dtype, shape):
    """The factors are orthonormal, the singular values descend, and the product is the best
    approximation that the dtype can hold. The result is computed in float64 and rounded once, so
    the reference is torch.linalg.svd in float64."""
    x, bar = normal(*shape).to(dtype), 2 * torch.finfo(dtype).eps + 1e-11
    for rank in (1, 5, 8):
        parts = truncated_svd(x, rank, method)
        u, s, vh = (part.double() for part in parts)
        assert [part.dtype for part in parts] == [dtype] * 3
        torch.testing.assert_close(s,
                                   torch.linalg.svdvals(x.double())[..., :rank], rtol=bar, atol=0)
        for gram in (u.mT @ u, vh @ vh.mT):
            torch.testing.assert_close(gram,
                                       torch.eye(rank).double().expand_as(gram), rtol=0, atol=bar)
        assert_close(u * s[..., None, :] @ vh, whole_truth(x.double(), rank), bar)


@exact_branch
@pytest.mark.parametrize('condition', [1e3, 1e5])
def test_u_is_orthonormal_where_singular_values_are_small(method, float64_here, condition):
    """U is orthonormal in float32 even for a condition number of 1e5. A column of U is x w / sigma,
    so a small sigma magnifies every error in x w."""
    x = with_singular_values([condition ** (-i / 7) for i in range(8)], 40, 8).float()
    u = truncated_svd(x, 8, method)[0]
    torch.testing.assert_close(u.mT @ u, torch.eye(8), rtol=0, atol=32 * EPS)


@pytest.mark.parametrize('scale', [1e-9, 1, 1e9])
def test_energy_is_the_share_of_the_squared_norm(scale):
    """`energy` and `rank_for_energy` match values computed by hand. Fraction 1 asks for every
    singular value that contributes, but never for more values than there are. A zero matrix needs
    rank 1."""
    s = scale * torch.tensor([[2., 1, 1, 0], [1, 1e-4, 1e-4, 1e-4], [4, 3, 0, 0], [0, 0, 0, 0]
                              ]).double()
    expected = [[4 / 6, 5 / 6, 1, 1], [1 - 3e-8, 1 - 2e-8, 1 - 1e-8, 1], [.64, 1, 1, 1],
                [1, 1, 1, 1]]
    torch.testing.assert_close(energy(s), torch.tensor(expected).double(), rtol=0, atol=1e-7)
    assert (energy(s)[:, -1] == 1).all() and (energy(s)[3] == 1).all()
    for fraction, ranks in (
            (1, [3, 4, 2, 1]), (5 / 6, [2, 1, 2, 1]), (.64, [1, 1, 1, 1]), (.65, [1, 1, 2, 1])):
        assert rank_for_energy(s, fraction).tolist() == ranks


@pytest.mark.parametrize('shape, rank', [((12, 8), 1), ((8, 12), 8), ((2, 3, 12, 8), 3)])
def test_energy_kept_is_what_energy_says_of_the_best_approximation(shape, rank):
    """`energy_kept` of the best approximation equals `energy` of the singular values."""
    x = normal(*shape)
    expected = energy(torch.linalg.svdvals(x))[..., rank - 1]
    torch.testing.assert_close(energy_kept(1e4 * x, 1e4 * whole_truth(x, rank)), expected)
    assert (energy_kept(x, 0 * x) == 0).all() and (energy_kept(0 * x, 0 * x) == 1).all()


def test_effective_rank_is_the_exponential_of_the_entropy():
    """`effective_rank` equals the perplexity of the normalized singular values, and is exact for
    matrices with a known answer."""
    many = [
        torch.outer(normal(8), normal(8, seed=1)),
        torch.linalg.qr(normal(8, 8))[0], 0 * normal(8, 8),
        with_singular_values([2, 2, 2, 0, 0, 0, 0, 0], 8, 8)]
    expected, s = [1, 8, 1, 3], torch.linalg.svdvals(normal(2, 12, 8))
    assert effective_rank(torch.stack(many)).tolist() == pytest.approx(expected, rel=1e-5)
    for x in (1e-6 * normal(2, 12, 8).float(), normal(2, 12, 8).mT, 1e4 * normal(2, 12, 8).mT):
        torch.testing.assert_close(
            effective_rank(x), torch.distributions.Categorical(s).perplexity(), rtol=1e-5, atol=0)


# --------------------------------------------------------------------------------------------------
# errors, autocast, compilation

FULL = torch.zeros(8, 4)


@pytest.mark.parametrize('f, x, rank, options, words', [
    *((f, *fault) for f in (whole, causal, truncated_svd) for fault in (
        (FULL, 0, {}, 'rank=0: .*at least 1'),
        (FULL, 2, dict(method='qr'), "'qr'.*standard, gram, randomized"))),
    *((rank_for_energy, FULL, fraction, {}, f'above 0 and at most 1.* {fraction}')
      for fraction in (0, -.1, 1.001, float('nan'))),
    *((rank_for_energy, torch.tensor([[3., 2], [value, 1]]), .5, {}, 'singular values .*finite')
      for value in (float('nan'), float('inf')))])
def test_arguments_that_cannot_be_are_refused(f, x, rank, options, words):
    """Invalid ranks, methods, fractions and singular values raise a ValueError that names the valid
    choice."""
    with pytest.raises(ValueError, match=words):
        f(x, rank, **options)


@each_method
@each_map
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(approximate, method, dtype):
    """Under autocast a float32 tensor keeps full precision, and a bfloat16 tensor only loses the
    casts of its input and output. The reference is the float32 result without autocast."""
    x, dy = normal(20, 6).to(dtype), normal(20, 6, seed=1).to(dtype)
    expected = value_and_gradient(lambda x: approximate(x, 2, method), x.float(), dy.float())
    with torch.autocast('cpu', torch.bfloat16):
        actual = value_and_gradient(lambda x: approximate(x, 2, method), x, dy)
    assert all(torch.equal(a, e.to(dtype)) for a, e in zip(actual, expected))


@pytest.mark.parametrize('approximate, method, backend', [
    (whole, 'gram', 'eager'), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (causal, 'gram', 'aot_eager'), (whole, 'standard', 'aot_eager'),
        (whole, 'randomized', 'eager'), *zip((whole, causal, whole), METHODS, ('inductor', ) * 3)))
])
def test_compiles_to_one_graph_with_the_same_result(approximate, method, backend):
    """torch.compile makes one graph whose values and gradients equal the eager ones. inductor
    generates code, so it can fail where the other backends pass. It needs a C++ compiler and is
    marked slow."""
    x, dy = normal(2, 20, 6).float(), normal(2, 20, 6, seed=1).float()
    torch.compiler.reset()  # earlier cases count towards the limit of recompilations
    compiled = torch.compile(lambda x: approximate(x, 2, method), fullgraph=True, backend=backend)
    for actual, expected in zip(value_and_gradient(compiled, x, dy),
                                value_and_gradient(lambda x: approximate(x, 2, method), x, dy)):
        torch.testing.assert_close(actual, expected)

"""lowrank/svd.py against torch.linalg.svd in float64: values, gradients, causality, degenerate matrices. What only
'randomized' is to be asked is in test_subspace.py.

Apple's MPS has no float64; tests marked `each_branch` run what is done there, too, on CPU tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import (assert_close, causal_truth, normal, projector, value_and_gradient, whole_truth,
                     with_singular_values)
from lowrank import svd
from lowrank.svd import (EXACT_METHODS, METHODS, causal_low_rank_approximation, effective_rank, energy, energy_kept,
                         low_rank_approximation, rank_for_energy, truncated_svd)

pytestmark = pytest.mark.usefixtures('one_thread')
BAR = {'standard': 1e-5, 'gram': 1e-4}                              # relative error of a float32 X_k


# ----------------------------------------------------------------------------------------------------------------------
# the definitions, written out, and matrices to try them on

def whole(x, rank, method, block=None, basis_grad=True):
    return low_rank_approximation(x, rank, method, basis_grad)


def causal(x, rank, method, block=4, basis_grad=True):
    return causal_low_rank_approximation(x, rank, method, block, basis_grad)


TRUTH = {whole: whole_truth, causal: causal_truth}
each_method = pytest.mark.parametrize('method', METHODS)
exact_method = pytest.mark.parametrize('method', EXACT_METHODS)
each_map = pytest.mark.parametrize('approximate', [whole, causal])
each_branch = pytest.mark.parametrize('float64_here', [True, False], indirect=True)


# ----------------------------------------------------------------------------------------------------------------------
# values

@exact_method
@pytest.mark.parametrize('rows, columns', [(40, 8), (8, 8), (8, 40)])
@pytest.mark.parametrize('sigma', [
    [1, .9, .8, .7, .6, .5, .4, .3],
    [1, .5, .2, .1, .05, .03, .02, .01],                            # sigma_1 / sigma_k up to 100
    [1, 1, 1, 1, .1, .1, .1, .1],                                   # repeated, but not across the cut at 4
    [1, .9, .9, .01, 1e-3, 1e-3, 1e-3, 0],
], ids=['linear', 'steep', 'repeated', 'deficient'])
def test_is_the_best_approximation_of_rank_k(method, rows, columns, sigma):
    x = torch.stack([with_singular_values(sigma, rows, columns, seed) for seed in (0, 10)]).float()
    for rank in (1, 3, 4, 7):
        if sigma[rank - 1] > sigma[rank] and sigma[0] <= 100 * sigma[rank - 1]:
            y = low_rank_approximation(x, rank, method)
            assert y.shape == x.shape and y.dtype == x.dtype
            assert_close(y, whole_truth(x.double(), rank), BAR[method])


@settings(derandomize=True, deadline=None, max_examples=60)
@given(rows=st.integers(1, 24), columns=st.integers(1, 24), batch=st.sampled_from([(), (1,), (3,), (2, 2)]),
       rank=st.integers(1, 24), seed=st.integers(0, 99), method=st.sampled_from(EXACT_METHODS))
def test_any_shape_and_rank(rows, columns, batch, rank, seed, method):
    x = normal(*batch, rows, columns, seed=seed).float()
    assert_close(low_rank_approximation(x, rank, method), whole_truth(x.double(), rank), BAR[method])


@settings(derandomize=True, deadline=None, max_examples=40)
@given(rows=st.integers(1, 40), columns=st.integers(2, 8), rank=st.integers(1, 7), block=st.integers(1, 9),
       seed=st.integers(0, 99), method=st.sampled_from(EXACT_METHODS))
def test_causal_equals_its_definition_row_by_row(rows, columns, rank, block, seed, method):
    x = normal(2, rows, columns, seed=seed)
    expected = causal_truth(x, rank, block) if rank < columns else x
    torch.testing.assert_close(causal(x, rank, method, block), expected, rtol=0, atol=1e-12)


@exact_method
def test_a_small_gap_at_the_cut_costs_no_precision(method):
    """sigma_k and sigma_k+1 2% apart and small: with a Gram matrix in float32 the error would be 1e-5."""
    x = with_singular_values([1] * 8 + [.01, .0098] + [.005] * 22, 256, 32).float()
    assert_close(low_rank_approximation(x, 9, method), whole_truth(x.double(), 9), 1e-6)


@pytest.mark.parametrize('rank', [None, 5, 6, 99])
@pytest.mark.parametrize('shape', [(9, 5), (5, 9), (2, 3, 5, 5)])
def test_full_rank_returns_the_very_tensor(shape, rank):
    x = normal(*shape)
    assert low_rank_approximation(x, rank) is x


@pytest.mark.parametrize('rank', [None, 5, 6])
def test_causal_full_rank_returns_the_very_tensor(rank):
    x = normal(64, 5)
    assert causal(x, rank, 'gram') is x


@each_method
@each_map
@each_branch
@pytest.mark.parametrize('dtype, c', [
    *((torch.float32, 2.0 ** e) for e in (-110, -60, 60, 125)),
    *((torch.float64, 2.0 ** e) for e in (-960, -531, 531, 960))])
def test_scaling_the_input_scales_the_output_and_leaves_the_gradient(approximate, method, float64_here, dtype, c):
    """From near the smallest normal number to near the largest; 2^531 is 1e160. 'gram' does it to the bit, LAPACK's svd
    scales by other factors."""
    x, dy = normal(20, 6).to(dtype), normal(20, 6, seed=1).to(dtype)
    assert (c * x).abs().max() < torch.finfo(dtype).max
    y, gradient = value_and_gradient(lambda x: approximate(x, 2, method), x, dy)
    scaled_y, scaled_gradient = value_and_gradient(lambda x: approximate(x, 2, method), c * x, dy)
    bar = 0 if method == 'gram' else 1e-6 if dtype == torch.float32 else 1e-13
    assert_close(scaled_y / c, y, bar)
    assert_close(scaled_gradient, gradient, bar)


@exact_method
@each_map
@pytest.mark.parametrize('c', [1e-43, 1e-38, 3e-29, 1e38])
def test_float32_gradient_at_the_ends_of_its_range(approximate, method, c):
    """The first is denormal: what little it keeps of x is the truth."""
    x, dy = (c * normal(20, 6).double().clamp(-3, 3)).float(), normal(20, 6, seed=1).float()
    actual = value_and_gradient(lambda x: approximate(x, 2, method), x, dy)
    expected = value_and_gradient(lambda x: TRUTH[approximate](x, 2), x.double() / c, dy.double())
    assert_close(actual[0].double() / c, expected[0], max(1e-6, 1e-44 / c))
    assert_close(actual[1], expected[1], 1e-5)


# what float32 sums for G cost; measured 5 times below these bars
@pytest.mark.parametrize('ratio, gap, bar, gradient_bar', [
    (1, .1, 1e-6, 3e-6), (10, .1, 3e-6, 2e-5), (100, .1, 2e-5, 1e-3), (10, .01, 1e-5, 4e-4), (100, .01, 2e-4, None)])
@pytest.mark.parametrize('float64_here', [False], indirect=True)
def test_precision_of_gram_without_float64(float64_here, monkeypatch, ratio, gap, bar, gradient_bar):
    """sigma_1 / sigma_k = ratio, sigma_k and sigma_k+1 a relative gap apart. At the last one the bound on the gap is
    what the gradient shows, in both branches."""
    sigma = [ratio ** (-i / 15) for i in range(16)] + [(1 - gap) / ratio] + [.5 / ratio] * 15
    for seed in range(0, 30, 10):
        x, dy = with_singular_values(sigma, 256, 32, seed).float(), normal(256, 32, seed=7)
        y, gradient = value_and_gradient(lambda x: low_rank_approximation(x, 16, 'gram'), x, dy.float())
        assert_close(y, whole_truth(x.double(), 16), bar)
        with monkeypatch.context() as patch:
            patch.setattr(svd, '_lacks_float64', lambda device: False)
            expected = value_and_gradient(lambda x: low_rank_approximation(x, 16, 'standard'), x.double(), dy)[1]
        if gradient_bar:
            assert_close(gradient, expected, gradient_bar)


@exact_method
@each_map
@each_branch
def test_either_branch_gives_the_truth(approximate, method, float64_here):
    x, dy = normal(2, 64, 16), normal(2, 64, 16, seed=1)
    y, gradient = value_and_gradient(lambda x: approximate(x, 4, method), x.float(), dy.float())
    expected_y, expected_gradient = value_and_gradient(lambda x: TRUTH[approximate](x, 4), x, dy)
    assert_close(y, expected_y, 1e-6)
    assert_close(gradient, expected_gradient, 3e-6)


# ----------------------------------------------------------------------------------------------------------------------
# gradients

@exact_method
@each_map
@pytest.mark.parametrize('shape', [(13, 4), (2, 9, 3), (5, 7), (3, 6)], ids=str)
def test_gradcheck(approximate, method, shape):
    """Finite differences; the last two have fewer rows than columns. A block of 3 gives bases of fewer rows too."""
    x = normal(*shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: approximate(x, 2, method, block=3), x)


@exact_method
@each_map
@pytest.mark.parametrize('rows, columns', [(40, 6), (6, 6), (6, 9)])
def test_gradient_is_that_of_autograd_through_u_s_vh(approximate, method, rows, columns):
    """Every gap is wide, in every prefix, and autograd's own formula therefore holds."""
    x, dy = normal(rows, columns) * 1.5 ** torch.arange(columns), normal(rows, columns, seed=1)
    y, gradient = value_and_gradient(lambda x: approximate(x, 3, method), x, dy)
    expected_y, expected_gradient = value_and_gradient(lambda x: TRUTH[approximate](x, 3), x, dy)
    assert_close(y, expected_y, 1e-11)
    assert_close(gradient, expected_gradient, 1e-11)


@exact_method
@pytest.mark.parametrize('scale', [1, 1e-2, 1e-4])
def test_causal_gradient_is_exact_where_early_rows_are_small(method, scale):
    """Every basis has its own scale: gaps count relative to the rows it comes from, not to larger rows after them."""
    x, dy = normal(20, 6), normal(20, 6, seed=1)
    x[:4] *= scale
    gradient = value_and_gradient(lambda x: causal(x, 2, method), x.float(), dy.float())[1]
    assert_close(gradient, value_and_gradient(lambda x: causal_truth(x, 2), x, dy)[1], 1e-5)


@exact_method
@each_map
def test_without_basis_grad_the_projectors_are_constants(approximate, method):
    """Then the map is linear and symmetric, so its gradient is the same map applied to dy."""
    x, dy = normal(20, 6), normal(20, 6, seed=1)
    y, gradient = value_and_gradient(lambda x: approximate(x, 2, method, basis_grad=False), x, dy)
    assert torch.equal(y, approximate(x, 2, method))
    expected = dy @ projector(x, 2) if approximate is whole else causal_truth(dy, 2, basis_of=x)
    assert_close(gradient, expected, 1e-11)


@exact_method
def test_without_basis_grad_a_wide_matrix_is_treated_as_its_transpose(method):
    """The constant is then the projector on the left: U_k U_k^T, of the smaller side."""
    x, dy = normal(6, 20), normal(6, 20, seed=1)
    gradient = value_and_gradient(lambda x: low_rank_approximation(x, 2, method, basis_grad=False), x, dy)[1]
    assert_close(gradient, projector(x.mT, 2) @ dy, 1e-11)


DEGENERATE = {
    'zero': torch.zeros(20, 6),
    'rank one': torch.outer(torch.arange(1., 21), torch.tensor([1., -2, 0, 3, 1, 1])),
    'equal rows': torch.tensor([1., 2, 3, 4, 5, 6]).expand(20, 6),
    'duplicated rows': normal(4, 6).repeat(5, 1).float(),
    'identity': torch.eye(20, 6),
    'stacked identities': torch.eye(6).repeat(4, 1)[:20],
    'zero rows first': torch.cat((torch.zeros(9, 6), normal(11, 6).float())),
    'zero columns': normal(20, 6).float() * torch.tensor([1., 0, 0, 1, 0, 0]),
    'fewer rows than columns': normal(5, 6).float(),
    'scale 1e-40': normal(20, 6).float() * 1e-40,
    'scale 1e-30': normal(20, 6).float() * 1e-30,
    'scale 1e30': normal(20, 6).float() * 1e30,
}


@each_method
@each_map
@pytest.mark.parametrize('x', DEGENERATE.values(), ids=DEGENERATE)
@pytest.mark.parametrize('rank', [1, 3])
def test_degenerate_matrices_give_finite_values_and_gradients(approximate, method, x, rank):
    y, gradient = value_and_gradient(lambda x: approximate(x, rank, method), x, normal(*x.shape, seed=1).float())
    assert y.isfinite().all()
    assert gradient.isfinite().all()
    if approximate is whole and torch.linalg.matrix_rank(x.double()) <= rank:
        torch.testing.assert_close(y, x)                            # nothing to cut


@each_method
@each_map
def test_double_backward_raises(approximate, method):
    """It is not implemented; silence would mean wrong Hessians."""
    x = normal(20, 6).requires_grad_()
    gradient, = torch.autograd.grad(approximate(x, 2, method).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        gradient.sum().backward()


# ----------------------------------------------------------------------------------------------------------------------
# causality

@each_method
def test_causal_changing_a_row_changes_no_row_before_it(method):
    x = normal(40, 6)
    y = causal(x, 2, method)
    for j in range(40):
        changed = x.clone()
        changed[j] += 1
        difference = (causal(changed, 2, method) - y).abs().amax(-1)
        assert (difference[:j] <= 1e-12).all() and difference[j] > 1e-3


@each_method
@each_branch
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('later', [1e-30, 1.1, 1e30, float('nan')])
def test_causal_no_bit_of_a_row_depends_on_a_later_one(method, float64_here, dtype, later):
    """Nor on the scale of later rows, which is where a scale of all rows would show. NaN stays where no basis comes
    from it: in the second half."""
    x = normal(2, 40, 6).to(dtype)
    y = causal(x, 2, method)
    for j in (39, 33) if later != later else (39, 33, 17, 9, 8, 5, 1):
        changed = x.clone()
        changed[:, j:] *= later
        assert torch.equal(causal(changed, 2, method)[:, :j], y[:, :j])


@each_method
def test_causal_gradient_never_reaches_a_later_row(method):
    x = normal(40, 6).requires_grad_()
    y = causal(x, 2, method)
    for t in range(40):
        gradient, = torch.autograd.grad(y[t].sum(), x, retain_graph=True)
        assert gradient[t + 1:].count_nonzero() == 0


@each_method
def test_causal_appending_rows_changes_no_earlier_row(method):
    x = normal(40, 6)
    y = causal(x, 2, method)
    for rows in range(1, 40):
        torch.testing.assert_close(causal(x[:rows], 2, method), y[:rows], rtol=0, atol=1e-12)


@each_method
@pytest.mark.parametrize('rank, block, unchanged', [(2, 4, 4), (3, 4, 4), (4, 4, 8), (5, 4, 8), (5, 1, 8), (2, 99, 40)])
def test_causal_rows_pass_until_there_are_block_rows_and_more_rows_than_the_rank(method, rank, block, unchanged):
    x = normal(40, 6)
    passed = (causal(x, rank, method, block) == x).all(-1)
    assert passed[:unchanged].all() and not passed[unchanged:].any()


@each_method
def test_causal_projects_most_rows_with_the_default_block(method):
    x = normal(256, 32)
    changed = (causal_low_rank_approximation(x, 8, method) != x).any(-1)
    assert changed.double().mean() >= .85


# ----------------------------------------------------------------------------------------------------------------------
# spectra

@exact_method
@pytest.mark.parametrize('shape', [(40, 8), (8, 8), (8, 40), (2, 3, 12, 8)], ids=str)
@pytest.mark.parametrize('rank', [1, 5, 8])
def test_truncated_svd_is_orthonormal_descending_and_reconstructs(method, shape, rank):
    x = normal(*shape)
    u, s, vh = truncated_svd(x, rank, method)
    assert u.shape == (*shape[:-1], rank) and vh.shape == (*shape[:-2], rank, shape[-1])
    torch.testing.assert_close(s, torch.linalg.svdvals(x)[..., :rank], rtol=1e-10, atol=0)
    assert (s.diff(dim=-1) <= 0).all()
    for gram in (u.mT @ u, vh @ vh.mT):
        torch.testing.assert_close(gram, torch.eye(rank, dtype=x.dtype).expand_as(gram), rtol=0, atol=1e-10)
    assert_close(u * s[..., None, :] @ vh, whole_truth(x, rank), 1e-12)


@exact_method
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_truncated_svd_keeps_the_dtype(method, dtype):
    x = normal(12, 8).to(dtype)
    u, s, vh = truncated_svd(x, 3, method)
    assert u.dtype == s.dtype == vh.dtype == dtype
    assert_close(u.float() * s.float() @ vh.float(), whole_truth(x.double(), 3), 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('scale', [1e-30, 1, 1e30])
def test_gram_gives_zero_columns_of_u_beyond_the_rank_of_x(dtype, scale):
    x = (scale * with_singular_values([3, 2], 20, 6)).to(dtype)
    u, s, vh = truncated_svd(x, 5, 'gram')
    assert u[:, 2:].count_nonzero() == 0 and (u[:, :2].norm(dim=0) - 1).abs().max() < 1e-6
    torch.testing.assert_close(vh @ vh.mT, torch.eye(5, dtype=dtype))
    assert_close(u * s @ vh, x, 1e-6)


@exact_method
@pytest.mark.parametrize('condition', [1e3, 1e5])
@each_branch
def test_u_is_orthonormal_where_singular_values_are_small(method, float64_here, condition):
    """A column of U is x w / sigma: small sigma bring out what x w lost."""
    x = with_singular_values([condition ** (-i / 7) for i in range(8)], 40, 8).float()
    u = truncated_svd(x, 8, method)[0]
    torch.testing.assert_close(u.mT @ u, torch.eye(8), rtol=0, atol=3e-6)


def test_energy_is_the_share_of_the_squared_norm():
    torch.testing.assert_close(energy(torch.tensor([[2., 1, 1], [1, 0, 0]])).float(),
                               torch.tensor([[4 / 6, 5 / 6, 1], [1, 1, 1]]))
    assert rank_for_energy(torch.tensor([[2., 1, 1], [1, 0, 0]]), .8).tolist() == [2, 1]


@settings(derandomize=True, deadline=None)
@given(s=st.lists(st.floats(0, 1e3), min_size=1, max_size=9), fraction=st.floats(0, 1, exclude_min=True))
def test_rank_for_energy_is_the_smallest_that_reaches_it(s, fraction):
    s = torch.tensor(sorted(s, reverse=True), dtype=torch.float64)
    share, rank, slack = energy(s), rank_for_energy(s, fraction).item(), 1e-14
    assert 1 <= rank <= len(s) and share[rank - 1] >= fraction - slack
    assert rank == 1 or share[rank - 2] < fraction


@pytest.mark.parametrize('scale', [1e-200, 1, 1e200])
def test_energy_of_all_and_of_nothing(scale):
    """fraction 1 asks for every singular value that counts, never more than there are; a zero matrix needs rank 1."""
    s = scale * torch.tensor([[1, 1e-4, 1e-4, 1e-4], [4, 3, 0, 0], [0, 0, 0, 0]], dtype=torch.float64)
    assert rank_for_energy(s, 1).tolist() == [4, 2, 1]
    assert energy(s)[:, -1].tolist() == [1, 1, 1] and energy(s)[2].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize('fraction', [0, -.1, 1.001, float('nan')])
def test_energy_fraction_out_of_range(fraction):
    with pytest.raises(ValueError, match='energy fraction must be above 0 and at most 1'):
        rank_for_energy(torch.ones(3), fraction)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_energy_of_singular_values_that_are_not_finite(value):
    s = torch.tensor([[3., 2, 1], [value, 1, 1]])
    for f in (energy, lambda s: rank_for_energy(s, .5)):
        with pytest.raises(ValueError, match='singular values must be finite, got NaN or inf'):
            f(s)


@pytest.mark.parametrize('shape', [(12, 8), (8, 12), (2, 3, 12, 8)], ids=str)
def test_energy_kept_is_what_energy_says_of_the_best_approximation(shape):
    x = normal(*shape)
    for rank in (1, 3, 8):
        torch.testing.assert_close(energy_kept(x, whole_truth(x, rank)), energy(torch.linalg.svdvals(x))[..., rank - 1])
    assert (energy_kept(x, 0 * x) == 0).all() and (energy_kept(0 * x, 0 * x) == 1).all()


@pytest.mark.parametrize('scale', [1e-30, 1, 1e30])
def test_effective_rank_is_its_definition(scale):
    x = normal(2, 12, 8)
    s = torch.linalg.svdvals(x)
    shares = s / s.sum(-1, keepdim=True)
    expected = (-shares * shares.log()).sum(-1).exp()
    for y in (x, x.mT):
        torch.testing.assert_close(effective_rank(scale * y.float()), expected, rtol=1e-5, atol=0)


def test_effective_rank_of_one_direction_of_all_and_of_nothing():
    many = [torch.outer(normal(8), normal(8, seed=1)), torch.linalg.qr(normal(8, 8))[0], torch.zeros(8, 8).double(),
            with_singular_values([2, 2, 2, 0, 0, 0, 0, 0], 8, 8), torch.full((8, 8), float('inf')).double()]
    assert effective_rank(torch.stack(many)).tolist() == pytest.approx([1, 8, 1, 3, float('nan')], rel=1e-5,
                                                                       nan_ok=True)


# ----------------------------------------------------------------------------------------------------------------------
# errors, autocast, compilation

@pytest.mark.parametrize('f', [low_rank_approximation, causal_low_rank_approximation, truncated_svd])
@pytest.mark.parametrize('shape, rank, method, message', [
    ((8, 4), 0, 'gram', 'rank must be at least 1, got 0'),
    ((8, 4), -3, 'gram', 'rank must be at least 1, got -3'),
    ((8, 4), 2, 'qr', "unknown SVD method 'qr'; valid: standard, gram"),
    ((8,), 2, 'gram', r'two dimensions, got shape \(8,\)'),
])
def test_errors(f, shape, rank, method, message):
    with pytest.raises(ValueError, match=message):
        f(torch.zeros(shape), rank, method)


def test_more_errors():
    with pytest.raises(ValueError, match=r'rank 5 is more than the smaller side of \(8, 4\); valid: 1 to 4'):
        truncated_svd(torch.zeros(8, 4), 5)
    with pytest.raises(ValueError, match='rank is missing; valid: 1 to 4'):
        truncated_svd(torch.zeros(8, 4), None)
    with pytest.raises(ValueError, match='block must be at least 1 row, got 0'):
        causal_low_rank_approximation(torch.zeros(8, 4), 2, block=0)


@each_method
@each_branch
@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('f', [whole, causal, truncated_svd])
@pytest.mark.parametrize('shape', [(2, 20, 6), (2, 20, 2), (2, 5, 6)], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_non_finite_input_raises_and_says_so(f, method, float64_here, value, shape, dtype):
    x = normal(*shape).to(dtype)
    x[1, 3, 1] = value
    if method == 'randomized' and not float64_here and f is not truncated_svd:      # would have to wait for the device
        assert not f(x, 1, method)[1].isfinite().all() and f(x, 1, method)[0].isfinite().all()
        return
    with pytest.raises(torch.linalg.LinAlgError, match=f"^the input has non-finite values .* SVD method '{method}'$"):
        f(x, 1, method)


@exact_method
def test_a_failure_on_finite_input_keeps_its_own_words(method, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.linalg.LinAlgError('did not converge')
    monkeypatch.setattr(torch.linalg, {'gram': 'eigh', 'standard': 'svd'}[method], fail)
    with pytest.raises(torch.linalg.LinAlgError, match='^did not converge$'):
        low_rank_approximation(normal(20, 6), 2, method)


@each_method
def test_non_finite_rows_that_nothing_decomposes_pass(method):
    x = normal(40, 6).float()
    x[33, 2] = float('nan')
    assert low_rank_approximation(x, 6, method) is x
    assert (~causal(x, 2, method).isfinite().all(-1)).nonzero().tolist() == [[33]]


@each_method
@each_map
def test_autocast_changes_nothing(approximate, method):
    """A float32 tensor stays at full precision, a bfloat16 one loses only its own two casts."""
    x, dy = normal(20, 6).float(), normal(20, 6, seed=1).float()
    expected = value_and_gradient(lambda x: approximate(x, 2, method), x, dy)
    with torch.autocast('cpu', torch.bfloat16):
        actual = value_and_gradient(lambda x: approximate(x, 2, method), x, dy)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected))

    half, half_dy = x.bfloat16(), dy.bfloat16()
    expected = value_and_gradient(lambda x: approximate(x, 2, method), half.float(), half_dy.float())
    with torch.autocast('cpu', torch.bfloat16):
        actual = value_and_gradient(lambda x: approximate(x, 2, method), half, half_dy)
    assert all(torch.equal(a, e.bfloat16()) for a, e in zip(actual, expected))


@each_method
@each_map
@pytest.mark.parametrize('backend', ['aot_eager', pytest.param('inductor', marks=pytest.mark.slow)])
def test_compiles_to_one_graph_with_the_same_result(approximate, method, backend):
    """inductor generates code, and so can fail where aot_eager passes; it needs a C++ compiler, hence slow."""
    x, dy = normal(2, 20, 6).float(), normal(2, 20, 6, seed=1).float()
    compiled = torch.compile(lambda x: approximate(x, 2, method), fullgraph=True, backend=backend)
    for actual, expected in zip(value_and_gradient(compiled, x, dy),
                                value_and_gradient(lambda x: approximate(x, 2, method), x, dy)):
        torch.testing.assert_close(actual, expected)

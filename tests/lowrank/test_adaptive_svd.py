"""The measurements and decisions of adaptive SVD, on cases with a known answer and on both sides of
each threshold."""

import json
import math

import pytest
import torch

from helpers import normal
from lowrank.adaptive_svd import (DIAGNOSTICS, random_baseline, compute_gradient_alignment,
                                  compute_reconstruction_error,
                                  compute_singular_value_concentration, compute_subspace_angle,
                                  determine_next_r, normalized_alignment, lift,
                                  should_use_lowrank_training)

pytestmark = pytest.mark.usefixtures('one_thread')
each_dtype = pytest.mark.parametrize('dtype', [torch.float32, torch.float64],
                                     ids=['float32', 'float64'])


def orthonormal(m, k, seed=0):
    return torch.linalg.qr(normal(m, k, seed=seed)).Q


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def svd(W):
    """Return U (m, g), S (g) and V (n, g)."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U, S, Vh.mT


# --------------------------------------------------------------------------------------------------
# subspace angle

@each_dtype
@pytest.mark.parametrize('angle', [0, 1e-6, .01, .1, math.pi / 4 - 1e-6, math.pi / 4 + 1e-6, 1.2,
                                   math.pi / 2 - 1e-6, math.pi / 2])
def test_the_largest_of_known_angles(angle, dtype):
    """The result is the largest principal angle, for planes turned by known angles. Each basis is
    also rotated within its span."""
    frame, angles = orthonormal(24, 24), numbers(angle / 3, angle, 0, angle / 2)
    turned = frame[:, :4] * angles.cos() + frame[:, 4:8] * angles.sin()
    first, second = (frame[:, :4] @ orthonormal(4, 4, 1)).to(dtype), (
        turned @ orthonormal(4, 4, 2)).to(dtype)
    near = pytest.approx(angle, abs=1e-6 if dtype == torch.float32 else 1e-13)
    # columns need not have exactly unit length
    for pair in ((first, second), (second, first), (first * 1.001, second * .999)):
        found = compute_subspace_angle(*pair, 4)
        assert found == near and type(found) is float


@pytest.mark.parametrize('k', [1, 10, 246, 256])
def test_a_float32_space_is_at_no_angle_from_itself(k):
    """The angle between a float32 basis and itself is below 1e-13, and below 2e-6 for another basis
    of the same span."""
    U = torch.linalg.svd(normal(256, 256).float())[0]  # columns are orthonormal to 3e-6
    assert compute_subspace_angle(U, U, k) < 1e-13
    other = (U[:, :k].double() @ orthonormal(k, k)).float()         # elements rounded to 6e-8
    assert compute_subspace_angle(U, other, k) < 2e-6


def test_the_leading_columns_make_the_space():
    """Only the k leading columns count."""
    frame = orthonormal(12, 12)
    swapped = frame[:, [0, 1, 3, 2, *range(4, 12)]]
    for k, angle in ((0, 0), (2, 0), (3, math.pi / 2), (4, 0)):
        assert compute_subspace_angle(frame, swapped, k) == pytest.approx(angle, abs=1e-14)
    assert compute_subspace_angle(frame[:, :3], swapped[:, :5],
                                  3) == pytest.approx(math.pi / 2, abs=1e-14)


# --------------------------------------------------------------------------------------------------
# spectra and reconstruction

@pytest.mark.parametrize('S, percentile, expected', [
    (torch.ones(20), .95, (.95, 19)), (torch.ones(20), .5, (.5, 10)), (torch.ones(20), 1, (1, 20)),
    (numbers(1, 0, 0, 0), 1, (.25, 1)), (numbers(7), .95, (1, 1)),
    *((numbers(3, 1, 1, 1), p, (rank / 4, rank)) for p, rank in (   # energies 9, 1, 1, 1 of 12
        (.74, 1), (.75, 1), (.76, 2), (.84, 3), (.92, 4))),
    (torch.zeros(4), .95, (0, 0)), (torch.zeros(0), .95, (0, 0))])
def test_concentration_of_known_spectra(S, percentile, expected):
    """The number of singular values that hold a percentile of the energy, and its share of all
    singular values, match values computed by hand."""
    found = compute_singular_value_concentration(S, percentile)
    assert found == expected and type(found[0]) is float
    assert percentile != .95 or compute_singular_value_concentration(S) == expected  # the default


@each_dtype
@pytest.mark.parametrize('m, n', [(9, 6), (6, 9), (6, 6)])
def test_reconstruction_error_is_what_the_minor_values_hold(m, n, dtype):
    """The error is the norm of the r smallest singular values relative to the norm of all. Here
    only r = 0 counts as safe."""
    S, U, V = numbers(8, 4, 2, 1, .5, .25), orthonormal(m, 6), orthonormal(n, 6, 1)
    W, U, V = (t.to(dtype) for t in (U * S @ V.mT, U, V))
    for r in range(7):
        want = (S[6 - r:].square().sum() / S.square().sum()).sqrt().item()
        for columns in (6, 6 - r):                                  # all, or the leading ones alone
            error, safe = compute_reconstruction_error(W, U[:, :columns], S.to(dtype),
                                                       V[:, :columns], r)
            assert error == pytest.approx(want, abs=1e-6 if dtype == torch.float32 else 1e-14)
            assert type(error) is float and safe is (r == 0)
    assert compute_reconstruction_error(W, U, S, V, 99) == (1, False)


def test_reconstruction_errors_at_the_edges():
    """An error of exactly 0.01 is not safe, and a zero weight has an error of 0. The error does not
    depend on the scale of W, because no square overflows or underflows."""
    S, eye = numbers(64, 62, 45, 5, 3, 1), torch.eye(6)  # the squares have the sum 10,000
    assert compute_reconstruction_error(S.diag(), eye, S, eye, 1) == (.01, False)
    S[-1] = .999
    assert compute_reconstruction_error(S.diag(), eye, S, eye, 1)[1] is True
    assert compute_reconstruction_error(0 * eye, eye, 0 * S, eye, 2) == (0, True)
    W = normal(6, 6)
    U, S, V = svd(W)
    expected = (S[4:].square().sum() / S.square().sum()).item()
    for scale in (1, 1e-9, 1e9):
        found = compute_reconstruction_error(W * scale, U, S * scale, V, 2)[0]
        minor = compute_gradient_alignment(W * scale, U, S * scale, 2)[1]
        assert minor == pytest.approx(expected) == found ** 2


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_what_is_not_finite_is_refused_by_name(bad):
    """NaN and inf in W, U, S or V, and percentiles outside (0, 1], raise a ValueError. The message
    names the tensor."""
    S, wrong, eye, bad_eye = numbers(3, 2, 1), numbers(3, bad, 1), torch.eye(3), torch.eye(3) * bad
    for function, arguments, message in (
            (compute_reconstruction_error, (bad_eye, eye, S, eye, 1), 'W must be finite'),
            (compute_reconstruction_error, (eye, bad_eye, S, eye, 1), 'U must be finite'),
            (compute_reconstruction_error, (eye, eye, wrong, eye, 1), 'S must be finite'),
            (compute_reconstruction_error, (eye, eye, S, bad_eye, 1), 'V must be finite'),
            (compute_subspace_angle, (eye, bad_eye, 1), 'U2 must be finite'),
            (compute_gradient_alignment, (eye, bad_eye, S, 1), 'U must be finite'),
            (determine_next_r, (wrong, None, 1), 'S must be finite'),
            (determine_next_r, (S, wrong, 1), 'S_prev must be finite'),
            (compute_singular_value_concentration, (wrong,), 'S must be finite'),
            (compute_singular_value_concentration, (S, 0), ''),
            (compute_singular_value_concentration, (S, 1.01), '')):
        with pytest.raises(ValueError, match=f'^{message}'):
            function(*arguments)


# --------------------------------------------------------------------------------------------------
# gradient alignment

@each_dtype
@pytest.mark.parametrize('columns', [6, 2])
def test_gradients_inside_outside_and_between(dtype, columns):
    """The alignment equals the share of the gradient's energy in the protected directions, for
    gradients inside, outside and between them. There are 9 outputs and 6 components, of which 2 are
    protected, so 3 outputs belong to no component."""
    frame = orthonormal(9, 9)
    inside, minor, beside = (frame[:, a:b] @ normal(b - a, 7) for a, b in ((0, 2), (2, 6), (6, 9)))
    between = 3 * inside / inside.norm() + 4 * minor / minor.norm()
    near = dict(abs=1e-6 if dtype == torch.float32 else 1e-14)
    for gradient, expected in ((inside, (1, 0)), (minor, (0, 1)), (beside, (0, 1)), (between,
                                                                                     (.36, .64))):
        found = compute_gradient_alignment(gradient.to(dtype), frame[:, :columns].to(dtype),
                                           torch.ones(6), 4)
        assert found == pytest.approx(expected, **near) and min(found) >= 0
        assert all(type(part) is float for part in found)


def test_gradient_alignment_at_the_edges():
    """Gradients that are missing, zero or not finite give (0, 0). The cases with everything or
    nothing protected are exact, and columns slightly longer than 1 do not raise the share above
    1."""
    U, S, nan = orthonormal(6, 4), torch.ones(4), torch.ones(6, 5).index_fill(
        1, torch.tensor(2), math.nan)
    for gradient in (None, torch.zeros(6, 5), nan, nan.nan_to_num(math.inf),
                     nan.nan_to_num(-math.inf)):
        assert compute_gradient_alignment(gradient, U, S, 1) == (0, 0)
    for r in (4, 5, 100):
        assert compute_gradient_alignment(normal(6, 5), U, S, r) == (0, 1)
    assert compute_gradient_alignment(normal(4, 6), orthonormal(4, 4), S, 0) == pytest.approx(
        (1, 0))
    assert compute_gradient_alignment(torch.ones(3, 3), 1.00001 * torch.eye(3), torch.ones(3),
                                      0) == (1, 0)


def test_chance_lift_and_excess():
    """The random baseline, the lift and the normalized excess match values computed by hand."""
    assert random_baseline(64, 256) == .25
    assert [lift(*args) for args in ((.5, .25), (.25, .25), (0, .25), (0, 0))] == [2, 1, 0, 1]
    assert [
        normalized_alignment(*args)
        for args in ((.25, .25), (1, .25), (.625, .25), (0, .5), (1, 1), (0, 0), (.3, 0))
    ] == [0, 1, .5, -1, 0, 0, .3]


# --------------------------------------------------------------------------------------------------
# the next r

def test_r_begins_ten_below_g_and_decreases_by_a_fifth_between_its_bounds():
    """r starts at g - 10 and shrinks by a fifth, but stays between r_min and g - 1."""
    for g, r in ((1, 0), (2, 1), (5, 4), (8, 7), (9, 8), (10, 8), (18, 8), (19, 9), (32, 22),
                 (256, 246)):
        assert determine_next_r(torch.ones(g), None, 5)[0] == r, g
    for g, r_current, r_min, r in (
            (256, 246, 8, 196), (256, 35, 8, 28), (256, 11, 8, 8), (256, 10, 8, 8), (256, 8, 8, 8),
            (256, 3, 8, 8), (256, 3, 1, 2), (256, 1, 1, 1), (256, 0, 0, 0), (256, 500, 8, 255),
            (256, 300, 8, 240), (256, 100, 90, 90), (256, 100, 999, 255),
            (8, 7, 8, 7), (8, 7, 2, 5), (5, 4, 8, 4), (5, 4, 1, 3),
            (1, 0, 8, 0), (1, 1, 0, 0)):
        found, why = determine_next_r(torch.ones(g), torch.ones(g), r_current, r_min)
        assert found == r and type(found) is int and 'stable' in why, (g, r_current, r_min)


@pytest.mark.parametrize(
    'place, by, r, stable',
    [
        # a change of up to a tenth is stable: four of the 16 ones are watched, their norm is 2
        (-1, .1999, 12, True),
        (-1, -.1999, 12, True),
        (-1, .2001, 12, False),
        (-1, -.2001, 12, False),
        # the smallest min(r, 4) values are watched, and at least one
        (slice(0, 12), 9, 12, True),
        (12, 9, 12, False),
        (13, 9, 2, True),
        (14, 9, 2, False),
        (15, 9, 1, False),
        (14, 9, 1, True),
        (15, 9, 0, False),
        (14, 9, 0, True)])
def test_r_stays_while_the_smallest_values_change(place, by, r, stable):
    """r only shrinks if the smallest singular values changed by at most a tenth."""
    now = torch.ones(16)
    now[place] += by
    found, why = determine_next_r(now, torch.ones(16), r, 1)
    assert ('stable' in why) == stable and ('changing' in why) != stable
    assert found == max(1, int(.8 * r) if stable else r)


def test_change_is_relative_to_what_was():
    """The change is measured relative to the previous singular values, at any scale."""
    for now, before, stable in (
        (numbers(11, 11, 11, 11), numbers(10, 10, 10, 10), True),  # 0.1 to the bit
        (numbers(99, 99, 2), numbers(99, 99, 1), False),  # g // 4 = 0
            *((numbers(9, 9, 9, a) * scale, numbers(9, 9, 9, b) * scale, stable)
              for scale in (1e-3, 1, 1e3)
              for a, b, stable in ((1, 1.105, True), (1.105, 1, False)))):  # 0.095 and 0.105
        assert ('stable' if stable else 'changing') in determine_next_r(now, before, 3)[1]
    zero, one = torch.zeros(8), torch.ones(8)
    for now, before, r in ((zero, zero, 4), (one, zero, 6), (zero, one, 6)):
        assert determine_next_r(now, before, 6, 1)[0] == r


# --------------------------------------------------------------------------------------------------
# the decision

def scene(principal=.1, angle=.05, error=.005, m=16, k=2, dtype=torch.float64, **given):
    """Return arguments for `should_use_lowrank_training` with these metrics. The defaults are calm
    and safe."""
    S = torch.full((m,), math.sqrt(error ** 2 / (m - k)), dtype=torch.float64)
    S[:k] = math.sqrt((1 - error ** 2) / k)
    U_prev, gradient = torch.eye(m).double(), torch.zeros(m, m).double()
    c, s = math.cos(angle), math.sin(angle)
    # turn the last protected direction by `angle`
    U_prev[k - 1:k + 1, k - 1:k + 1] = numbers(c, -s, s, c).view(2, 2)
    gradient[0, 3], gradient[-1, 5] = math.sqrt(principal), math.sqrt(1 - principal)
    tensors = dict(W=S.diag(), U=torch.eye(m), S=S, V=torch.eye(m), U_prev=U_prev, S_prev=S,
                   grad_W=gradient)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()} | dict(
        W_prev=None, V_prev=None, r_current=m - k, step=100) | given


def decide(**given):
    decision, r_next, diagnostics = should_use_lowrank_training(**given)
    assert tuple(diagnostics) == DIAGNOSTICS and type(r_next) is int
    assert json.dumps(diagnostics, allow_nan=False)                 # it can be logged
    return decision, diagnostics['reason']


WARMUP, NO_GRADIENT, INITIAL, DANGER, OPTIMAL, UNSAFE, CONTINUE = (
    (False, 'warmup_period'), (None, 'no_gradient_yet'), (None, 'initial_svd_computation'),
    (True, 'gradient_clobbering_risk'), (True, 'optimal_lowrank_conditions'),
    (False, 'reconstruction_unsafe'), (None, 'continue_current_mode'))


@each_dtype
def test_each_decision(dtype):
    """The decision and its reason are as documented on both sides of every threshold."""
    for given, want in ((dict(), OPTIMAL), (dict(step=9), WARMUP), (dict(step=0), WARMUP),
                        (dict(step=10), OPTIMAL), (dict(grad_W=None), NO_GRADIENT),
                        (dict(U_prev=None), INITIAL), (dict(S_prev=None), INITIAL),
                        (dict(principal=.9), DANGER), (dict(principal=.401), DANGER),
                        (dict(principal=.399), OPTIMAL), (dict(principal=.401, k=3), DANGER), (dict(
                            principal=.43,
                            k=4), CONTINUE), (dict(principal=.44, k=4), DANGER), (dict(
                                principal=.62,
                                k=8), CONTINUE), (dict(principal=.63,
                                                       k=8), DANGER), (dict(angle=.0999), OPTIMAL),
                        (dict(angle=.1001), CONTINUE), (dict(error=.0099), OPTIMAL),
                        (dict(error=.0101), UNSAFE), (dict(in_lowrank_mode=True), OPTIMAL), (dict(
                            error=.0101, in_lowrank_mode=True), CONTINUE), (dict(
                                error=.5, angle=1), UNSAFE), (dict(principal=.5, k=8,
                                                                   error=.5), UNSAFE)):
        assert decide(**scene(**given, dtype=dtype)) == want, given


def test_the_first_reason_that_applies_decides():
    """The reasons have a fixed order, and the first that applies decides. At first every reason but
    'optimal' applies, and the test removes them one by one."""
    given = scene(principal=.9, error=.5, step=3, grad_W=None, U_prev=None)
    for change, want in (
            (dict(), WARMUP), (dict(step=10), NO_GRADIENT),
            (dict(grad_W=scene(principal=.9)['grad_W']), INITIAL),
            (dict(U_prev=torch.eye(16)), DANGER), (dict(in_lowrank_mode=True), DANGER),
            (dict(grad_W=scene()['grad_W'], in_lowrank_mode=False), UNSAFE)):
        given |= change
        assert decide(**given) == want


@pytest.mark.parametrize(
    'm, lengths, metric, value, want',
    [  # k = 4
        (64, {0: 1, 1: 1, 2: 1, 3: 1, **dict.fromkeys(range(58, 64), 1)
              }, 'principal_alignment', .4, CONTINUE),
        (8, {0: 5, 1: 5, 7: 6}, 'excess', .25, CONTINUE),
        (8, {0: 6, 1: 5, 7: 6}, 'chance', .5, DANGER)])
def test_on_the_edge_it_is_neither_danger_nor_calm(m, lengths, metric, value, want):
    """Exactly at a threshold an analysis finds neither danger nor calm, and just above it finds
    danger. The gradient contains only zeros and ones, so the protected shares are exact: 4 of 10
    with k/m = 1/16, 10 of 16 with k/m = 1/2, and 11 of 17."""
    gradient = torch.stack([torch.arange(m) < lengths.get(row, 0) for row in range(m)]).double()
    given = scene(m=m, k=4, grad_W=gradient)
    assert should_use_lowrank_training(**given)[2][metric] == value and decide(**given) == want


@pytest.mark.parametrize('factor', [0, math.nan, math.inf])
def test_a_gradient_that_says_nothing_switches_nothing(factor):
    """A gradient that is zero or not finite does not trigger a switch."""
    given = scene(principal=.9, grad_W=torch.ones(16, 16) * factor)
    assert decide(**given | dict(r_current=16)) == UNSAFE           # k = 0: nothing of W is kept
    decision, _, seen = should_use_lowrank_training(**given)
    assert decision is seen['lift'] is seen['excess'] is None
    assert seen['principal_alignment'] == seen['minor_alignment'] == 0


def test_the_diagnostics():
    """The diagnostics have the expected values. An early decision leaves out metrics that it did
    not compute, and r_next depends on the spectrum alone."""
    _, r_next, seen = should_use_lowrank_training(
        **scene(principal=.3, angle=.07, error=.004, m=20, k=4))
    assert seen == dict(
        reason='optimal_lowrank_conditions',
        why=seen['why'],
        principal_alignment=pytest.approx(.3),
        minor_alignment=pytest.approx(.7),
        chance=.2,
        lift=pytest.approx(1.5),
        excess=pytest.approx(.125),
        subspace_angle=pytest.approx(.07),
        reconstruction_error=pytest.approx(.004),
        reconstruction_safe=True,
        # 10 of the 16 minor values, which are all equal
        dropped_error=pytest.approx(.004 * math.sqrt(10 / 16)),
        concentration=.2,
        concentration_rank=4)
    assert r_next == 12 and 'stable' in seen['why']
    for given, known, r in ((dict(step=0), {'reason'}, 29), (dict(grad_W=None), {'reason'}, 29),
                            (dict(U_prev=None), {'reason', 'why'}, 22)):
        _, r_next, seen = should_use_lowrank_training(**scene(**given, m=32, k=3))
        assert {name for name in seen if seen[name] is not None} == known and r_next == r
    for metrics in (dict(), dict(principal=.9), dict(angle=.2), dict(error=.5)):
        assert should_use_lowrank_training(**scene(**metrics))[1] == 11  # 0.8 of 14
    assert should_use_lowrank_training(**scene(S_prev=scene()['S'] * 1.2))[1] == 14


def test_what_is_not_needed_may_be_missing():
    """The k leading columns of U, V and U_prev are enough, and tensors may require gradients."""
    given = scene(m=16, k=5)
    given |= {
        name: given[name].requires_grad_()
        for name in given
        if isinstance(given[name], torch.Tensor)}
    short = {name: given[name][:, :5] for name in ('U', 'V', 'U_prev')}
    assert should_use_lowrank_training(**given | short) == should_use_lowrank_training(**given)


@pytest.mark.parametrize('m, n', [(1, 1), (1, 7), (7, 1), (5, 8), (8, 5)])
def test_layers_of_any_shape(m, n):
    """Layers of any shape get a decision, down to a single component. r may be 0, and r above g
    protects nothing."""
    W, g = normal(m, n), min(m, n)
    U, S, V = svd(W)
    for r in (0, g - 1, g, g + 10):
        k, gradient = max(g - r, 0), normal(m, n, seed=1)
        decision, r_next, seen = should_use_lowrank_training(W, U, S, V, None, U, S, None, gradient,
                                                             r, 50)
        assert seen['chance'] == k / m and r_next <= g - 1
        assert seen[
            'subspace_angle'] < 1e-7 and seen['principal_alignment'] + seen['minor_alignment'] == 1
        if k == 0:
            assert (seen['principal_alignment'], seen['lift'], seen['excess'],
                    decision) == (0, 1, 0, False)
        assert k < m or seen['excess'] == 0 and seen['principal_alignment'] == pytest.approx(1)

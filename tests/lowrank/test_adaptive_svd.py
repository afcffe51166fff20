"""lowrank/adaptive_svd.py: cases with a known answer, every branch of the decision, thresholds at their edge."""

import inspect
import json
import math

import pytest
import torch

from lowrank.adaptive_svd import (DIAGNOSTICS, chance, compute_gradient_alignment, compute_reconstruction_error,
                                  compute_singular_value_concentration, compute_subspace_angle, determine_next_r,
                                  excess, lift, should_use_lowrank_training)

pytestmark = pytest.mark.usefixtures('one_thread')
each_dtype = pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=['float32', 'float64'])
each_bad = pytest.mark.parametrize('bad', [float('nan'), float('inf')])


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(m, k, seed=0):
    return torch.linalg.qr(rand(m, k, seed=seed)).Q


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def svd(W):
    """U (m, g), S (g), V (n, g)."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U, S, Vh.mT


def weight(m, n, S, seed=0):
    """W (m, n) with those singular values, and its U (m, g) and V (n, g)."""
    U, V = orthonormal(m, len(S), seed), orthonormal(n, len(S), seed + 1)
    return U * S @ V.mT, U, V


# ----------------------------------------------------------------------------------------------------------------------
# subspace angle

def turned(angles, m=24, seed=0):
    """Two bases (m, k) with these principal angles: whole planes of a random frame turn; then each is mixed."""
    k = len(angles)
    frame, angles = orthonormal(m, m, seed), numbers(*angles)
    first, beside = frame[:, :k], frame[:, k:2 * k]
    second = first * angles.cos() + beside * angles.sin()
    return first @ orthonormal(k, k, seed + 1), second @ orthonormal(k, k, seed + 2)


@each_dtype
@pytest.mark.parametrize('angle', [0, 1e-6, 1e-4, .01, .1, math.pi / 4 - 1e-6, math.pi / 4 + 1e-6, 1.2,
                                   math.pi / 2 - 1e-6, math.pi / 2])
def test_the_largest_of_known_angles(angle, dtype):
    first, second = (basis.to(dtype) for basis in turned([angle / 3, angle, 0, angle / 2]))
    bar = 1e-6 if dtype == torch.float32 else 1e-13
    found = compute_subspace_angle(first, second, 4)
    assert type(found) is float and abs(found - angle) < bar
    assert abs(compute_subspace_angle(second, first, 4) - angle) < bar
    assert abs(compute_subspace_angle(first * 1.001, second * .999, 4) - angle) < bar       # columns a little off


@pytest.mark.parametrize('k', [1, 10, 246, 256])
def test_a_float32_space_is_at_no_angle_from_itself(k):
    U = torch.linalg.svd(rand(256, 256).float())[0]                 # columns are orthonormal to 3e-6
    assert compute_subspace_angle(U, U, k) < 1e-13
    other = (U[:, :k].double() @ orthonormal(k, k)).float()         # another basis, rounded: 6e-8 an element
    assert compute_subspace_angle(U, other, k) < 2e-6


def test_only_the_leading_columns_make_the_space():
    frame = orthonormal(12, 12)
    swapped = frame[:, [0, 1, 3, 2, *range(4, 12)]]
    assert compute_subspace_angle(frame, swapped, 2) < 1e-14
    assert compute_subspace_angle(frame, swapped, 3) == pytest.approx(math.pi / 2, abs=1e-14)
    assert compute_subspace_angle(frame, swapped, 4) < 1e-14
    assert compute_subspace_angle(frame[:, :3], swapped[:, :5], 3) == pytest.approx(math.pi / 2, abs=1e-14)


def test_no_columns_and_too_few():
    U = orthonormal(5, 3)
    assert compute_subspace_angle(U, -U, 0) == 0
    for k in (4, -1):
        with pytest.raises(ValueError, match='U1 has 3 columns'):
            compute_subspace_angle(U, orthonormal(5, 5), k)
    with pytest.raises(ValueError, match='U2 has 2 columns'):
        compute_subspace_angle(U, U[:, :2], 3)


# ----------------------------------------------------------------------------------------------------------------------
# spectra and reconstruction

def test_concentration_of_known_spectra():
    assert compute_singular_value_concentration(torch.ones(20)) == (.95, 19)
    assert compute_singular_value_concentration(torch.ones(20), .5) == (.5, 10)
    assert compute_singular_value_concentration(torch.ones(20), 1) == (1, 20)
    assert compute_singular_value_concentration(numbers(1, 0, 0, 0), 1) == (.25, 1)
    S = numbers(3, 1, 1, 1)                                         # energies 9, 1, 1, 1 of 12; of the values it is 3/6
    assert [compute_singular_value_concentration(S, p)[1] for p in (.74, .75, .76, .84, .92)] == [1, 1, 2, 3, 4]
    assert compute_singular_value_concentration(numbers(7)) == (1, 1)
    assert compute_singular_value_concentration(numbers(1e-200, 1e-200)) == (1, 2)
    found = compute_singular_value_concentration(torch.zeros(4))
    assert found == (0, 0) and type(found[0]) is float
    assert compute_singular_value_concentration(torch.zeros(0)) == (0, 0)
    for percentile in (0, 1.01):
        with pytest.raises(ValueError, match='fraction must be'):
            compute_singular_value_concentration(S, percentile)


@each_dtype
@pytest.mark.parametrize('shape', [(9, 6), (6, 9), (6, 6)])
def test_reconstruction_error_is_what_the_minor_values_hold(shape, dtype):
    S = numbers(8, 4, 2, 1, .5, .25)
    W, U, V = (t.to(dtype) for t in weight(*shape, S))
    for r in range(7):
        want = (S[6 - r:].square().sum() / S.square().sum()).sqrt().item()
        for columns in (6, 6 - r):                                  # all, or the leading ones alone
            error, safe = compute_reconstruction_error(W, U[:, :columns], S.to(dtype), V[:, :columns], r)
            assert error == pytest.approx(want, abs=1e-6 if dtype == torch.float32 else 1e-14)
            assert type(error) is float and safe is (r == 0)
    assert compute_reconstruction_error(W, U, S, V, 99) == (1, False)
    with pytest.raises(ValueError, match='V has 3 columns, too few for k = 4'):
        compute_reconstruction_error(W, U, S, V[:, :3], 2)


def test_v_is_not_transposed():
    """On a square weight V^T has the right shape and must not pass."""
    W = rand(6, 6)
    U, S, V = svd(W)
    assert compute_reconstruction_error(W, U, S, V, 0)[1]
    assert compute_reconstruction_error(W, U, S, V.mT, 0)[0] > .1


def test_the_error_of_one_in_a_hundred_is_not_safe():
    S = numbers(64, 62, 45, 5, 3, 1)                                # the squares have the sum 10,000: to the bit
    assert compute_reconstruction_error(S.diag(), torch.eye(6), S, torch.eye(6), 1) == (.01, False)
    S[-1] = .999
    assert compute_reconstruction_error(S.diag(), torch.eye(6), S, torch.eye(6), 1)[1] is True


@pytest.mark.parametrize('scale', [1e-200, 1e200])
def test_nothing_over_or_underflows(scale):
    W = rand(6, 5) * scale
    U, S, V = svd(W)
    plain = compute_reconstruction_error(W / scale, U, S / scale, V, 2)[0]
    assert plain > .1 and compute_reconstruction_error(W, U, S, V, 2)[0] == pytest.approx(plain)
    assert sum(compute_gradient_alignment(W, U, S, 2)) == 1
    assert compute_gradient_alignment(W, U, S, 2)[1] == pytest.approx(plain ** 2)


def test_a_zero_weight_has_no_error():
    zero = torch.zeros(4, 3)
    assert compute_reconstruction_error(zero, torch.eye(4, 3), torch.zeros(3), torch.eye(3), 2) == (0, True)


def test_what_the_two_errors_of_a_gaussian_are():
    """Ten components of a Gaussian weight are hardly any of it, and the other 246 nearly all."""
    W = rand(256, 256)
    U, S, V = svd(W)
    assert compute_reconstruction_error(W, U, S, V, 246) == (pytest.approx(.928, abs=.003), False)
    assert compute_reconstruction_error(W, U, S, V, 10) == (pytest.approx(.0067, abs=.001), True)


@each_bad
def test_values_that_are_no_numbers_are_refused_by_name(bad):
    W, S = torch.diag(numbers(3, 2, 1)), numbers(3, 2, 1)
    U = V = torch.eye(3)
    spoilt = {'W': torch.full((3, 3), bad), 'U': torch.full((3, 3), bad), 'S': numbers(3, bad, 1)}
    for name in 'WUSV':
        given = dict(W=W, U=U, S=S, V=V) | {name: spoilt.get(name, spoilt['U'])}
        with pytest.raises(ValueError, match=f'^{name} must be finite'):
            compute_reconstruction_error(**given, r=1)
    with pytest.raises(ValueError, match='U2 must'):
        compute_subspace_angle(U, spoilt['U'], 1)
    with pytest.raises(ValueError, match='S must'):
        compute_gradient_alignment(W, U, spoilt['S'], 1)
    with pytest.raises(ValueError, match='S must'):
        determine_next_r(spoilt['S'], None, 1)
    with pytest.raises(ValueError, match='S_prev must'):
        determine_next_r(S, numbers(3, 2, bad), 1)
    with pytest.raises(ValueError, match='S must'):
        compute_singular_value_concentration(spoilt['S'])


# ----------------------------------------------------------------------------------------------------------------------
# gradient alignment

@each_dtype
def test_gradients_inside_outside_and_between(dtype):
    frame = orthonormal(9, 9)                                       # 9 outputs, 6 components: 3 outputs beside them
    U, S = frame[:, :6].to(dtype), torch.ones(6)
    inside, minor, beside = frame[:, :2] @ rand(2, 7), frame[:, 2:6] @ rand(4, 7), frame[:, 6:] @ rand(3, 7)
    bar = dict(abs=1e-6 if dtype == torch.float32 else 1e-14)
    for columns in (6, 2):
        def alignment(gradient):
            return compute_gradient_alignment(gradient.to(dtype), U[:, :columns], S, 4)
        assert alignment(inside) == pytest.approx((1, 0), **bar) and alignment(inside)[1] >= 0
        assert alignment(minor) == pytest.approx((0, 1), **bar)
        assert alignment(beside) == pytest.approx((0, 1), **bar)
        mixed = 3 * inside / inside.norm() + 4 * minor / minor.norm()
        assert alignment(mixed) == pytest.approx((.36, .64), **bar)     # of the norms it would be .6 and .8
    assert all(type(part) is float for part in alignment(mixed))


def test_columns_that_are_a_little_too_long_give_no_more_than_all():
    assert compute_gradient_alignment(torch.ones(3, 3), 1.00001 * torch.eye(3), torch.ones(3), 0) == (1, 0)


@each_bad
def test_a_gradient_that_says_nothing(bad):
    spoilt = torch.ones(3, 4)
    spoilt[1, 2] = bad
    for gradient in (None, torch.zeros(3, 4), spoilt, -spoilt):
        assert compute_gradient_alignment(gradient, torch.eye(3), torch.ones(3), 1) == (0, 0)


def test_everything_and_nothing_protected():
    gradient = rand(6, 4)
    U, S = orthonormal(6, 4), torch.ones(4)
    for r in (4, 5, 100):
        assert compute_gradient_alignment(gradient, U, S, r) == (0, 1)
    assert compute_gradient_alignment(rand(4, 6), orthonormal(4, 4), S, 0) == pytest.approx((1, 0))
    with pytest.raises(ValueError, match='U has 4 columns, too few for k = 5'):
        compute_gradient_alignment(gradient, U, S, -1)
    with pytest.raises(ValueError, match='U has 2 columns, too few for k = 3'):
        compute_gradient_alignment(gradient, U[:, :2], S, 1)


@pytest.mark.parametrize('k', [1, 6, 20])
def test_random_gradients_are_aligned_by_chance(k):
    """Principal and minor energies of m n independent N(0, 1) are chi^2 of k n and (m - k) n degrees of freedom, so the
    share is Beta(a, b), a = k n / 2, b = (m - k) n / 2: mean c = a / (a + b) = k/m, and variance
    a b / ((a + b)^2 (a + b + 1)) = c (1 - c) / (m n / 2 + 1)."""
    m, n, draws = 24, 16, 300
    U, S, c = orthonormal(m, m), torch.ones(m), chance(k, m)
    deviation = math.sqrt(c * (1 - c) / (m * n / 2 + 1))
    found = numbers(*(compute_gradient_alignment(rand(m, n, seed=seed), U, S, m - k)[0] for seed in range(draws)))
    assert abs(found[0].item() - k / m) < 3 * deviation
    assert abs(found.mean().item() - k / m) < 3 * deviation / math.sqrt(draws)
    assert abs(found.std().item() / deviation - 1) < 3 / math.sqrt(2 * draws)


def test_chance_lift_and_excess():
    assert chance(64, 256) == .25
    assert lift(.5, .25) == 2 and lift(.25, .25) == 1 and lift(0, .25) == 0 and lift(0, 0) == 1
    assert excess(.25, .25) == 0 and excess(1, .25) == 1 and excess(.625, .25) == .5 and excess(0, .5) == -1
    assert excess(1, 1) == 0 and excess(0, 0) == 0 and excess(.3, 0) == .3


# ----------------------------------------------------------------------------------------------------------------------
# the next r

@pytest.mark.parametrize('g, r', [(1, 0), (2, 1), (5, 4), (8, 7), (9, 8), (10, 8), (18, 8), (19, 9), (32, 22),
                                  (256, 246)])
def test_the_first_r_leaves_ten_components_or_what_a_small_layer_has(g, r):
    found, why = determine_next_r(torch.ones(g), None, 5)
    assert found == r and 'Initial' in why


@pytest.mark.parametrize('g, r_current, r_min, r', [
    (256, 246, 8, 196), (256, 35, 8, 28), (256, 11, 8, 8), (256, 10, 8, 8), (256, 9, 8, 8), (256, 8, 8, 8),
    (256, 3, 8, 8), (256, 3, 1, 2), (256, 1, 1, 1), (256, 0, 0, 0), (256, 500, 8, 255), (256, 300, 8, 240),
    (256, 100, 90, 90), (256, 100, 999, 255), (8, 7, 8, 7), (8, 7, 2, 5), (5, 4, 8, 4), (5, 4, 1, 3), (1, 0, 8, 0),
    (1, 1, 0, 0)])
def test_r_decreases_by_a_fifth_between_its_bounds(g, r_current, r_min, r):
    S = torch.ones(g)
    found, why = determine_next_r(S, S, r_current, r_min)
    assert found == r and type(found) is int and 'stable, decrease r' in why


def test_r_reaches_its_minimum_and_stays_there():
    S, r, seen = torch.ones(256), 246, []
    while r not in seen:
        seen.append(r)
        r = determine_next_r(S, S, r)[0]
    assert seen == [246, 196, 156, 124, 99, 79, 63, 50, 40, 32, 25, 20, 16, 12, 9, 8]


def moved(S, place, by):
    S = S.clone()
    S[place] += by
    return S


def test_a_tenth_of_change_is_still_stable():
    before = torch.ones(16)                                         # watched: 4, of norm 2
    for sign in (1, -1):                                            # whichever way
        r, why = determine_next_r(moved(before, -1, sign * .1999), before, 12)
        assert r == 9 and 'stable, decrease r' in why
        r, why = determine_next_r(moved(before, -1, sign * .2001), before, 12)
        assert r == 12 and 'changing' in why
    edge = numbers(11, 11, 11, 11), numbers(10, 10, 10, 10)         # one is watched: a change of 0.1 to the bit
    assert 'stable' in determine_next_r(*edge, 3)[1]


def test_only_the_smallest_values_are_watched():
    before = torch.ones(16)
    assert 'stable' in determine_next_r(moved(before, slice(0, 12), 9), before, 12)[1]      # the four at the end count
    assert 'changing' in determine_next_r(moved(before, 12, 9), before, 12)[1]
    assert 'stable' in determine_next_r(moved(before, 13, 9), before, 2)[1]                 # of r = 2 only two
    assert 'changing' in determine_next_r(moved(before, 14, 9), before, 2)[1]
    for r in (0, 1):                                                                        # one at least
        assert 'changing' in determine_next_r(moved(before, 15, 9), before, r)[1]
    assert 'changing' in determine_next_r(numbers(99, 99, 2), numbers(99, 99, 1), 2)[1]     # g // 4 = 0


def test_change_is_relative_to_what_was():
    for scale in (1e-3, 1, 1e3):
        now, before = numbers(9, 9, 9, 1) * scale, numbers(9, 9, 9, 1.105) * scale      # 0.095 of before, 0.105 of now
        assert 'stable' in determine_next_r(now, before, 3)[1] and 'changing' in determine_next_r(before, now, 3)[1]
    zero = torch.zeros(8)
    assert determine_next_r(zero, zero, 6, 1)[0] == 4
    assert determine_next_r(torch.ones(8), zero, 6, 1) == (6, 'minor singular values changing by inf%')
    assert determine_next_r(zero, torch.ones(8), 6, 1)[0] == 6


def test_spectra_that_do_not_fit():
    with pytest.raises(ValueError, match='3 singular values in S, before it 4'):
        determine_next_r(torch.ones(3), torch.ones(4), 2)
    with pytest.raises(ValueError, match='0 singular values'):
        determine_next_r(torch.ones(0), None, 2)


# ----------------------------------------------------------------------------------------------------------------------
# the decision

def scene(principal=.1, angle=.05, error=.005, m=16, k=2, dtype=torch.float64, **given):
    """Arguments for `should_use_lowrank_training` with these metrics, calm and safe unless told otherwise."""
    S = torch.full((m,), math.sqrt(error ** 2 / (m - k)), dtype=torch.float64)
    S[:k] = math.sqrt((1 - error ** 2) / k)
    U_prev, gradient = torch.eye(m).double(), torch.zeros(m, m).double()
    c, s = math.cos(angle), math.sin(angle)
    U_prev[k - 1:k + 1, k - 1:k + 1] = numbers(c, -s, s, c).view(2, 2)  # the last protected direction turns
    gradient[0, 3], gradient[-1, 5] = math.sqrt(principal), math.sqrt(1 - principal)
    tensors = dict(W=S.diag(), U=torch.eye(m), S=S, V=torch.eye(m), U_prev=U_prev, S_prev=S, grad_W=gradient)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()} | dict(
        W_prev=None, V_prev=None, r_current=m - k, step=100) | given


def decide(**given):
    decision, r_next, diagnostics = should_use_lowrank_training(**given)
    assert tuple(diagnostics) == DIAGNOSTICS and type(r_next) is int
    json.dumps(diagnostics, allow_nan=False)                        # it can be logged
    return decision, diagnostics['reason']


WARMUP, NO_GRADIENT, INITIAL = (False, 'warmup_period'), (None, 'no_gradient_yet'), (None, 'initial_svd_computation')
DANGER, OPTIMAL = (True, 'gradient_clobbering_risk'), (True, 'optimal_lowrank_conditions')
UNSAFE, CONTINUE = (False, 'reconstruction_unsafe'), (None, 'continue_current_mode')


@each_dtype
@pytest.mark.parametrize('given, want', [
    (dict(), OPTIMAL),
    (dict(step=9), WARMUP), (dict(step=0), WARMUP), (dict(step=10), OPTIMAL),
    (dict(grad_W=None), NO_GRADIENT),
    (dict(U_prev=None), INITIAL), (dict(S_prev=None), INITIAL),
    (dict(principal=.9), DANGER), (dict(principal=.401), DANGER), (dict(principal=.399), OPTIMAL),
    (dict(principal=.401, k=3), DANGER), (dict(principal=.43, k=4), CONTINUE), (dict(principal=.44, k=4), DANGER),
    (dict(principal=.62, k=8), CONTINUE), (dict(principal=.63, k=8), DANGER),
    (dict(angle=.0999), OPTIMAL), (dict(angle=.1001), CONTINUE),
    (dict(error=.0099), OPTIMAL), (dict(error=.0101), UNSAFE),
    (dict(error=.0101, in_lowrank_mode=True), CONTINUE), (dict(in_lowrank_mode=True), OPTIMAL),
    (dict(error=.5, angle=1), UNSAFE), (dict(principal=.5, k=8, error=.5), UNSAFE)])
def test_each_decision(given, want, dtype):
    assert decide(**scene(**given, dtype=dtype)) == want


def test_the_first_that_holds_decides():
    """Everything but 'optimal' at once; then one after the other is taken away."""
    given = scene(principal=.9, error=.5, step=3, grad_W=None, U_prev=None)
    assert decide(**given) == WARMUP
    assert decide(**(given := given | dict(step=10))) == NO_GRADIENT
    assert decide(**(given := given | dict(grad_W=scene(principal=.9)['grad_W']))) == INITIAL
    assert decide(**(given := given | dict(U_prev=torch.eye(16)))) == DANGER
    assert decide(**(given | dict(in_lowrank_mode=True))) == DANGER
    assert decide(**(given | dict(grad_W=scene()['grad_W']))) == UNSAFE


def test_on_the_edge_it_is_neither_danger_nor_calm():
    gradient = torch.zeros(64, 64)
    gradient[:4, 0] = gradient[-6:, 0] = 1                          # 4 of 10 in the protected space, k/m = 1/16
    given = scene(m=64, k=4, grad_W=gradient)
    assert should_use_lowrank_training(**given)[2]['principal_alignment'] == .4
    assert should_use_lowrank_training(**given)[2]['minor_alignment'] == .6
    assert decide(**given) == CONTINUE
    gradient = torch.zeros(8, 8)
    gradient[0, :5] = gradient[1, :5] = gradient[-1, :6] = 1        # 10 of 16, k/m = 1/2
    given = scene(m=8, k=4, grad_W=gradient)
    assert should_use_lowrank_training(**given)[2]['excess'] == .25 and decide(**given) == CONTINUE
    gradient[0, 7] = 1
    assert decide(**given) == DANGER


@pytest.mark.parametrize('spoil', [lambda g: g * 0, lambda g: g * math.nan, lambda g: g + math.inf])
def test_a_gradient_that_says_nothing_switches_nothing(spoil):
    for given in (scene(), scene(principal=.9)):
        given['grad_W'] = spoil(given['grad_W'])
        assert decide(**given) == CONTINUE
        assert decide(**given | dict(r_current=16)) == UNSAFE       # k = 0: nothing of W is kept
        seen = should_use_lowrank_training(**given)[2]
        assert seen['principal_alignment'] == seen['minor_alignment'] == 0 and seen['lift'] is seen['excess'] is None


def test_the_diagnostics():
    _, r_next, seen = should_use_lowrank_training(**scene(principal=.3, angle=.07, error=.004, m=20, k=4))
    assert seen == dict(
        reason='optimal_lowrank_conditions', why=seen['why'], principal_alignment=pytest.approx(.3),
        minor_alignment=pytest.approx(.7), chance=.2, lift=pytest.approx(1.5), excess=pytest.approx(.125),
        subspace_angle=pytest.approx(.07), reconstruction_error=pytest.approx(.004), reconstruction_safe=True,
        dropped_error=pytest.approx(.004 * math.sqrt(10 / 16)),     # of the 16 minor values, all the same, 10
        concentration=.2, concentration_rank=4)
    assert r_next == 12 and 'stable, decrease r' in seen['why']


def test_the_diagnostics_of_an_early_decision():
    for given in (dict(step=0), dict(grad_W=None), dict(U_prev=None)):
        _, r_next, seen = should_use_lowrank_training(**scene(**given, m=32, k=3))
        known = {'reason', 'why'} if 'U_prev' in given else {'reason'}
        assert {name for name in seen if seen[name] is not None} == known
        assert r_next == (22 if 'U_prev' in given else 29)
    assert 'Initial' in seen['why']


def test_r_next_follows_the_spectrum():
    for metrics in (dict(), dict(principal=.9), dict(angle=.2), dict(error=.5)):            # whatever the decision
        assert should_use_lowrank_training(**scene(**metrics))[1] == 11                     # 0.8 of 14
    given = scene()
    given['S_prev'] = given['S'] * 1.2
    assert should_use_lowrank_training(**given)[1] == 14
    assert 'changing' in should_use_lowrank_training(**given)[2]['why']


def test_what_is_not_needed_may_be_missing_and_bases_may_be_short():
    given = scene(m=16, k=5)
    short = {name: given[name][:, :5] for name in ('U', 'V', 'U_prev')}
    assert should_use_lowrank_training(**given | short) == should_use_lowrank_training(**given)
    with pytest.raises(ValueError, match='has 4 columns, too few for k = 5'):   # r has decreased since it was cut
        should_use_lowrank_training(**given | {'U_prev': given['U_prev'][:, :4]})
    spoilt = given['W'] * math.nan
    assert decide(**given | dict(W=spoilt, S=spoilt, step=9)) == WARMUP         # nothing is looked at
    with pytest.raises(ValueError, match='W must be finite'):
        decide(**given | dict(W=spoilt))


@pytest.mark.parametrize('shape', [(1, 1), (1, 7), (7, 1), (5, 8), (8, 5)])
def test_layers_of_any_shape(shape):
    """Down to one component, of which r = 0 is trainable, and r above g, which protects none."""
    W = rand(*shape)
    U, S, V = svd(W)
    g = min(shape)
    for r in (0, g - 1, g, g + 10):
        k = max(g - r, 0)
        decision, r_next, seen = should_use_lowrank_training(W, U, S, V, W, U, S, V, rand(*shape, seed=1), r, 50)
        json.dumps(seen, allow_nan=False)
        assert seen['chance'] == k / shape[0] and seen['subspace_angle'] < 1e-7 and r_next <= g - 1
        assert seen['principal_alignment'] + seen['minor_alignment'] == 1
        if k == 0:
            assert (seen['principal_alignment'], seen['lift'], seen['excess'], decision) == (0, 1, 0, False)
        if k == shape[0]:
            assert seen['excess'] == 0 and seen['principal_alignment'] == pytest.approx(1)


def test_nothing_is_changed_and_no_graph_is_kept():
    given = scene(m=8, k=2)
    given |= {name: given[name].requires_grad_() for name in ('W', 'U', 'S', 'V', 'U_prev', 'S_prev', 'grad_W')}
    before = {name: value.detach().clone() for name, value in given.items() if isinstance(value, torch.Tensor)}
    first = should_use_lowrank_training(**given)
    assert first == should_use_lowrank_training(**given)            # stateless
    assert all(torch.equal(before[name], given[name]) for name in before)


def test_the_arguments_in_order():
    assert list(inspect.signature(should_use_lowrank_training).parameters)[:11] == (
        'W U S V W_prev U_prev S_prev V_prev grad_W r_current step').split()

"""lowrank/compression.py: the factors are the best ones, whatever the statistics; the ranks, for what they may cost."""

from itertools import product

import pytest
import torch

from lowrank.compression import RIDGE, Factorization, budgeted_ranks, convex_hull, factored_size, refit, saving_rank

pytestmark = pytest.mark.usefixtures('one_thread')
SHAPES = (12, 8), (8, 12)
each_shape = pytest.mark.parametrize('shape', SHAPES, ids=['tall', 'wide'])


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistic(size, seed, tokens=100, spread=1.0):
    """E[x x^T] of tokens whose coordinates differ in scale and are correlated."""
    x = rand(tokens, size, seed=seed) @ rand(size, size, seed=seed + 1) * torch.logspace(-spread, spread, size)
    return (x.mT @ x / tokens).double()


def decomposed(weight, inputs=None, gradients=None, ridge=RIDGE):
    """The `Factorization` for C = E[x x^T] and G = E[g g^T] in full; None: identities."""
    def small(outer, full):                                         # outer^T full outer
        return None if full is None else outer.mT @ full.double() @ outer
    if len(weight) >= weight.size(1):
        return Factorization(weight, inputs, small(weight.double(), gradients), ridge)
    return Factorization(weight, gradients, small(weight.double().mT, inputs), ridge)


def factor(weight, rank, inputs=None, gradients=None):
    """Factors for statistics in full."""
    return decomposed(weight, inputs, gradients).factors(rank)


def error(weight, up, down, inputs, gradients):
    """tr(G E C E^T) for E = weight - up down."""
    e = weight - up @ down
    return torch.trace(gradients @ e @ inputs @ e.mT).item()


def alternating_least_squares(weight, rank, inputs, gradients, steps=2000):
    """The same optimum without any decomposition: each factor in turn is the solution of its normal equations."""
    down = rand(rank, weight.size(1), seed=9)
    for _ in range(steps):
        up = torch.linalg.solve(down @ inputs @ down.mT, down @ inputs @ weight.mT).mT
        down = torch.linalg.solve(up.mT @ gradients @ up, up.mT @ gradients @ weight)
    return up, down


@each_shape
@pytest.mark.parametrize('rank', [1, 3, 6])
def test_no_factors_have_a_smaller_weighted_error(rank, shape):
    M, N = shape
    weight, inputs, gradients = rand(M, N), statistic(N, 1), statistic(M, 3)
    # the usual ridge costs 0.3% of an error that is 1e-7 of the whole
    up, down = decomposed(weight, inputs, gradients, RIDGE / 100).factors(rank)
    assert (up.shape, down.shape, up.dtype) == ((M, rank), (rank, N), torch.float64)
    best = error(weight, up, down, inputs, gradients)
    found = error(weight, *alternating_least_squares(weight, rank, inputs, gradients), inputs, gradients)
    assert best <= found * (1 + 1e-4) and found <= best * 1.01
    for seed in range(20):
        moved = error(weight, up + 1e-2 * rand(M, rank, seed=seed), down + 1e-2 * rand(rank, N, seed=seed + 50), inputs,
                      gradients)
        assert moved > best
    assert best < .9 * error(weight, *factor(weight, rank), inputs, gradients)


@each_shape
def test_each_statistic_counts_alone(shape):
    M, N = shape
    weight, inputs, gradients = rand(M, N), statistic(N, 1), statistic(M, 3)
    for given in (dict(inputs=inputs), dict(gradients=gradients)):
        full = dict(inputs=torch.eye(N).double(), gradients=torch.eye(M).double()) | given
        best, found = (error(weight, *factors, **full) for factors in (
            factor(weight, 3, **given), alternating_least_squares(weight, 3, **full)))
        assert abs(best / found - 1) < 1e-4


@each_shape
def test_without_statistics_it_is_the_truncated_svd(shape):
    M, N = shape
    weight = rand(M, N)
    up, down = factor(weight.float(), 3)
    u, s, vh = torch.linalg.svd(weight.float().double())
    assert torch.allclose(up @ down, u[:, :3] * s[:3] @ vh[:3], atol=1e-12)
    blank = factor(weight.float(), 3, torch.zeros(N, N), torch.zeros(M, M))
    assert torch.allclose(blank[0] @ blank[1], up @ down, atol=1e-12)


@each_shape
def test_the_factors_are_balanced(shape):
    M, N = shape
    up, down = factor(rand(M, N), 3, statistic(N, 1), statistic(M, 3))
    assert torch.allclose(up.mT @ up, down @ down.mT, atol=1e-10)
    assert up.norm() > .1


@each_shape
@pytest.mark.parametrize('rank', [8, 11])
@pytest.mark.parametrize('tokens', [0, 1, 3, 100])
def test_full_rank_reproduces_the_weight_whatever_was_seen(rank, tokens, shape):
    M, N = shape
    weight = rand(M, N)
    inputs, gradients = (statistic(size, 5, tokens, spread=4) if tokens else torch.zeros(size, size)
                         for size in (N, M))
    up, down = factor(weight, rank, inputs, gradients)
    assert (up.shape, down.shape) == ((M, rank), (rank, N)) and (up @ down - weight).abs().max() < 1e-12


@each_shape
def test_what_was_seen_comes_first_and_the_rest_as_in_the_plain_svd(shape):
    """Two inputs were seen, rank 4: both are exact, and the rest is better than nothing."""
    M, N = shape
    weight, x = rand(M, N), rand(2, N, seed=4)
    up, down = factor(weight, 4, x.mT @ x)
    plain = torch.matmul(*factor(weight, 4))
    assert ((weight - up @ down) @ x.mT).abs().max() < 1e-2 < ((weight - plain) @ x.mT).abs().max()
    unseen = torch.eye(N).double() - torch.linalg.pinv(x) @ x
    rest = weight @ unseen
    rest = rest - weight @ x.mT @ torch.linalg.pinv(weight @ x.mT) @ rest                       # not yet in U's columns
    left = ((weight - up @ down) @ unseen).norm().item()
    assert left == pytest.approx(torch.linalg.svdvals(rest)[2:].norm().item(), rel=.01)


@each_shape
def test_units_do_not_matter(shape):
    M, N = shape
    weight, inputs, gradients = rand(M, N), statistic(N, 1), statistic(M, 3)
    products = [torch.matmul(*factor(weight, 3, inputs * a, gradients * b)) for a, b in ((1, 1), (1e12, 1e-30))]
    assert torch.allclose(*products, atol=1e-9)


@pytest.mark.parametrize('change, words', [
    (dict(rank=0), r'rank=0: must be at least 1 \(nearest: 1\)'),
    (dict(weight=torch.full((12, 8), torch.nan)), 'weight: not finite'),
    (dict(gradients=torch.full((12, 12), torch.nan)), 'inputs or gradients: not finite'),
    (dict(inputs=torch.full((8, 8), torch.inf)), 'inputs or gradients: not finite')])
def test_what_cannot_be_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        factor(**(dict(weight=rand(12, 8), rank=3) | change))


@each_shape
def test_the_error_foretold_is_the_error_made(shape):
    """At every rank, to rounding; with a ridge, to the ridge."""
    M, N = shape
    weight, inputs, gradients = rand(M, N), statistic(N, 1), statistic(M, 3)
    for given in (dict(), dict(inputs=inputs), dict(gradients=gradients), dict(inputs=inputs, gradients=gradients)):
        full = dict(inputs=torch.eye(N).double(), gradients=torch.eye(M).double()) | given
        for ridge, most in ((0, 1e-9), (RIDGE, 1e-3)):
            found = decomposed(weight, **given, ridge=ridge)
            errors = [error(weight, *found.factors(rank), **full) for rank in range(1, 9)]
            whole = error(weight, 0 * weight, torch.eye(N).double(), **full)
            assert [found.error(rank) for rank in range(9)] == pytest.approx([whole, *errors], abs=most * whole)
            assert found.energies.shape == (8,) and sorted(found.energies, reverse=True) == list(found.energies)


@each_shape
def test_zero_weights_and_statistics_of_nothing(shape):
    """Finite factors whose product is the best there is, worth nothing."""
    M, N = shape
    for weight, inputs in ((torch.zeros(M, N), statistic(N, 1)), (rand(M, N), torch.zeros(N, N))):
        found = decomposed(weight, inputs)
        up, down = found.factors(3)
        assert up.isfinite().all() and down.isfinite().all() and found.energies.count_nonzero() == 0
        assert torch.allclose(up @ down, torch.matmul(*factor(weight, 3)), atol=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# inputs that have changed

def test_refitting_is_least_squares():
    """Against lstsq on the samples themselves; what nobody saw stays as it was, and nothing seen changes nothing."""
    before, x, now = rand(5, 8), rand(100, 8, seed=1), rand(100, 8, seed=2) @ rand(8, 8, seed=3)
    u = x @ before.mT
    found = refit(before, now.mT @ now / 100, u.mT @ now / 100, ridge=1e-12)
    assert torch.allclose(found, torch.linalg.lstsq(now, u).solution.mT, atol=1e-8) and not torch.allclose(
        found, before, atol=.1)
    few, ridge = now[:2], 1e-9
    kept, unseen = refit(before, few.mT @ few, u[:2].mT @ few, ridge), torch.eye(8) - torch.linalg.pinv(few) @ few
    # to rounding times the condition that is left, n / ridge; where inputs were seen the ridge is a small share of them
    assert ((kept - before) @ unseen).norm() < torch.finfo(torch.float64).eps * 8 * 8 / ridge * before.norm()
    share = ridge * few.square().sum() / 8 / torch.linalg.svdvals(few)[-1] ** 2
    assert (kept @ few.mT - u[:2].mT).norm() < 2 * share * (u[:2].mT - before @ few.mT).norm()
    assert torch.equal(refit(before, torch.zeros(8, 8).double(), torch.zeros(5, 8).double()), before)
    assert torch.allclose(refit(before, x.mT @ x, u.mT @ x), before, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# ranks

def spectra(seed, count=3, largest=9):
    """Random layers: shapes (m, n), and energies that fall at rates of their own."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {f'layer {i}': tuple(torch.randint(2, largest, (2,), generator=generator).tolist()) for i in range(count)}
    energies = {}
    for name, shape in shapes.items():
        s, rate = min(shape), torch.rand((), generator=generator) * 3
        energies[name] = (torch.rand(s, generator=generator) * torch.exp(-rate * torch.arange(s))).sort(
            descending=True)[0]
    return energies, shapes


def points(energies, shape):
    """All that can be made of a layer: (size, error, rank)."""
    m, n = shape
    return [(r * (m + n), energies[r:].double().sum().item(), r) for r in range(1, min(m, n))
            if r * (m + n) < m * n] + [(m * n, 0.0, None)]


def cost(ranks, shapes):
    return sum(factored_size(shapes[name], rank) for name, rank in ranks.items())


def lost(ranks, energies):
    return sum(energies[name][rank:].double().sum().item() for name, rank in ranks.items() if rank is not None)


@pytest.mark.parametrize('seed', range(15))
def test_no_ranks_within_the_budget_lose_less(seed):
    """Brute force over all ranks of three layers, at budgets that are spent to the last number; at others what is left
    over buys no whole stretch, but never costs anything."""
    energies, shapes = spectra(seed)
    every = {name: points(energies[name], shapes[name]) for name in shapes}
    combinations = [(sum(p[0] for p in chosen), sum(p[1] for p in chosen)) for chosen in product(*every.values())]
    least, most = min(size for size, _ in combinations), cost(dict.fromkeys(shapes), shapes)
    for price in torch.logspace(-5, 0, 30).tolist():                # of a number: what each layer on its own then takes
        best = {name: min(found, key=lambda p: p[1] + price * p[0]) for name, found in every.items()}
        budget = sum(p[0] for p in best.values())
        ranks = budgeted_ranks(energies, shapes, budget)
        assert ranks == {name: p[2] for name, p in best.items()}
        assert lost(ranks, energies) <= min(e for size, e in combinations if size <= budget) + 1e-12
    before = float('inf')
    for budget in range(least, most + 5):
        ranks = budgeted_ranks(energies, shapes, budget)
        assert cost(ranks, shapes) <= budget and lost(ranks, energies) <= before + 1e-12
        before = lost(ranks, energies)
    assert ranks == dict.fromkeys(shapes)                           # all of it: dense
    with pytest.raises(ValueError, match=rf'too few for the smallest ranks \(nearest: {least}\)'):
        budgeted_ranks(energies, shapes, least - 1)


@pytest.mark.parametrize('step', [1, 4])
def test_they_lose_less_than_the_same_share_of_each(step):
    for seed in range(10):
        energies, shapes = spectra(seed, 12, 70)
        shapes = {name: (m + 40, n + 40) for name, (m, n) in shapes.items()}
        rates = torch.rand(len(shapes), generator=torch.Generator().manual_seed(seed))
        energies = {name: torch.exp(-rate * torch.arange(min(shape))) for rate, (name, shape) in zip(
            rates, shapes.items())}
        for keep in (.3, .6, .9):
            uniform = {name: int(keep * m * n / (m + n)) // step * step for name, (m, n) in shapes.items()}
            ranks = budgeted_ranks(energies, shapes, cost(uniform, shapes), step)
            assert cost(ranks, shapes) <= cost(uniform, shapes)
            assert lost(ranks, energies) < .9 * lost(uniform, energies)
            assert all(rank is None or rank % step == 0 and saving_rank(shapes[name], rank)
                       for name, rank in ranks.items())


def test_a_dense_layer_is_a_choice_like_others():
    """A flat spectrum saves little as factors; what is worth nothing is not bought."""
    flat, steep = torch.ones(10), torch.tensor([5., *[0] * 9])
    shapes = {'flat': (10, 10), 'steep': (10, 10)}
    assert budgeted_ranks(dict(flat=flat, steep=steep), shapes, 120) == dict(flat=None, steep=1)
    assert budgeted_ranks(dict(flat=flat, steep=steep), shapes, 119)['flat'] in range(1, 5)
    assert budgeted_ranks(dict(flat=flat, steep=steep), shapes, 10 ** 6) == dict(flat=None, steep=1)
    rest = torch.tensor([9., 8, 7, *[0] * 7])                       # of rank 3: that, at any step, and never dense
    for step in (1, 2):
        assert budgeted_ranks(dict(flat=flat, steep=rest), shapes, 10 ** 6, step) == dict(flat=None, steep=3)
    nothing = {name: torch.zeros(10) for name in shapes}
    assert budgeted_ranks(nothing, shapes, 10 ** 6, 2) == dict(flat=2, steep=2)
    assert budgeted_ranks(dict(thin=torch.ones(1)), dict(thin=(1, 9)), 9) == dict(thin=None)    # rank 1 is 10 numbers


def test_the_hull_is_below_every_point():
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        found = sorted(zip(torch.randperm(50, generator=generator)[:8].tolist(),
                           torch.rand(8, generator=generator).tolist()))
        hull = convex_hull(found)
        assert hull[0] == found[0] and hull[-1] == found[-1] and set(hull) <= set(found)
        slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(hull, hull[1:])]
        assert slopes == sorted(slopes)
        for x, y in found:
            a, b = next((a, b) for a, b in zip(hull, hull[1:]) if a[0] <= x <= b[0])
            assert y >= a[1] + (b[1] - a[1]) * (x - a[0]) / (b[0] - a[0]) - 1e-12


def test_sizes():
    assert factored_size((5, 7), 2) == 24 and factored_size((5, 7), None) == 35
    assert saving_rank((5, 7), 2) == 2 and saving_rank((5, 7), 3) is None and saving_rank((128, 128), 64) is None
    assert saving_rank((128, 128), 63) == 63

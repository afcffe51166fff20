"""Low-rank factors have the least possible error for any statistics, and the chosen ranks have the
least error within a budget."""

from itertools import product

import pytest
import torch

from helpers import normal as rand
from lowrank.factorization import (RIDGE, Factorization, allocate_ranks, beneficial_rank,
                                   factored_size, ridge_refit)

pytestmark = pytest.mark.usefixtures('one_thread')
each_shape = pytest.mark.parametrize('M, N', [(12, 8), (8, 12)], ids=['tall', 'wide'])


def statistic(size, seed, tokens=100, spread=1.0):
    """Return E[x x^T] of tokens whose coordinates are correlated and differ in scale."""
    scales = torch.logspace(-spread, spread, size)
    x = rand(tokens, size, seed=seed) @ rand(size, size, seed=seed + 1) * scales
    return (x.mT @ x / max(tokens, 1)).double()


def decomposed(weight, inputs=None, gradients=None, ridge=RIDGE):
    """Return the `Factorization` for C = E[x x^T] and G = E[g g^T]. None stands for the
    identity."""
    near, far, outer = inputs, gradients, weight.double()
    if len(weight) < weight.size(1):
        near, far, outer = gradients, inputs, weight.double().mT
    return Factorization(weight, near, None if far is None else outer.mT @ far.double() @ outer,
                         ridge)


def error(weight, up, down, inputs, gradients):
    """Return tr(G E C E^T) for E = weight - up down."""
    e = weight - up @ down
    return torch.trace(gradients @ e @ inputs @ e.mT).item()


@each_shape
@pytest.mark.parametrize('given', ['', 'inputs', 'gradients', 'inputs gradients'])
def test_the_factors_have_the_least_weighted_error_and_it_is_predicted(M, N, given):
    """At every rank the weighted error is the least that the theorem of Eckart and Young allows,
    and `energies` predicts it. Without a ridge this holds to rounding, and with one to the size of
    the ridge."""
    weight, some = rand(M, N), dict(inputs=statistic(N, 1), gradients=statistic(M, 3))
    some = {name: some[name] for name in given.split()}
    full = dict(inputs=torch.eye(N).double(), gradients=torch.eye(M).double()) | some
    left, right = (torch.linalg.cholesky(full[name]) for name in ('gradients', 'inputs'))
    energies = torch.linalg.svdvals(left.mT @ weight @ right).square()
    for ridge, most in ((0, 1e-9), (RIDGE, 1e-3)):
        found = decomposed(weight, **some, ridge=ridge)
        for rank in range(1, 9):
            up, down = found.factors(rank)
            assert (up.shape, down.shape, up.dtype) == ((M, rank), (rank, N), torch.float64)
            assert (up.mT @ up - down @ down.mT).abs().max() < 1e-10 * up.norm() ** 2  # balanced
            least = pytest.approx(energies[rank:].sum().item(), abs=most * energies.sum().item())
            assert error(weight, up, down, **full) == least == found.energies[rank:].sum().item()
        assert found.energies.sum().item() == pytest.approx(energies.sum().item(), rel=1e-3)
        assert found.energies.tolist() == sorted(found.energies.tolist(), reverse=True)


@each_shape
def test_without_statistics_it_is_the_truncated_svd(M, N):
    """Without statistics, or with statistics that are zero, the factors are those of
    torch.linalg.svd. A zero weight has zero factors."""
    weight, blank = rand(M, N).float(), (torch.zeros(N, N), torch.zeros(M, M))
    u, s, vh = torch.linalg.svd(weight.double())
    for statistics in ((), blank):
        torch.testing.assert_close(torch.matmul(*decomposed(weight, *statistics).factors(3)),
                                   u[:, :3] * s[:3] @ vh[:3], rtol=0, atol=1e-12)
    zero = decomposed(torch.zeros(M, N), statistic(N, 1))
    for found in (decomposed(weight, blank[0]), zero):
        assert found.energies.shape == (8,) and not found.energies.any()
    assert not torch.matmul(*zero.factors(3)).any()


@each_shape
@pytest.mark.parametrize('tokens', [0, 1, 3, 100])
def test_full_rank_reproduces_the_weight_whatever_was_seen(M, N, tokens):
    """At full rank the product is the weight itself, for any number of calibration tokens."""
    weight = rand(M, N)
    up, down = decomposed(weight,
                          *(statistic(size, 5, tokens, spread=4) for size in (N, M))).factors(8)
    assert (up.shape, down.shape) == ((M, 8), (8, N)) and (up @ down - weight).abs().max() < 1e-12


@each_shape
def test_what_was_seen_comes_first_and_the_rest_as_in_the_plain_svd(M, N):
    """Inputs in the statistics come first, and the remaining rank is spent as in the plain SVD.
    With two inputs and rank 4, the outputs for both inputs are exact. The error in all other
    directions is that of the best rank-2 approximation."""
    weight, x = rand(M, N), rand(2, N, seed=4)
    product, plain = (torch.matmul(*decomposed(weight, seen).factors(4))
                      for seen in (x.mT @ x, None))
    assert ((weight - product) @ x.mT).abs().max() < 1e-2 < ((weight - plain) @ x.mT).abs().max()
    unseen = torch.eye(N).double() - torch.linalg.pinv(x) @ x
    rest = weight @ unseen
    rest = rest - weight @ x.mT @ torch.linalg.pinv(weight @ x.mT) @ rest    # not in U's columns
    left = ((weight - product) @ unseen).norm().item()
    assert left == pytest.approx(torch.linalg.svdvals(rest)[2:].norm().item(), rel=.01)


@each_shape
def test_units_do_not_matter(M, N):
    """Scaling the statistics does not change the factors."""
    weight, inputs, gradients = rand(M, N), statistic(N, 1), statistic(M, 3)
    products = [torch.matmul(*decomposed(weight, inputs * a, gradients * b).factors(3))
                for a, b in ((1, 1), (1e12, 1e-30))]
    torch.testing.assert_close(*products, rtol=0, atol=1e-9)


@pytest.mark.parametrize('arguments, message',
                         [((torch.full((12, 8), torch.inf), ), 'weight must be finite'),
                          ((torch.ones(12, 8), torch.full(
                              (8, 8), torch.nan)), 'inputs or gradients must be finite'),
                          ((torch.ones(12, 8), None, torch.full(
                              (8, 8), torch.nan)), 'inputs or gradients must be finite')])
def test_what_is_not_finite_and_rank_0_are_refused(arguments, message):
    """A weight or a statistic that is not finite raises a ValueError that names it."""
    with pytest.raises(ValueError, match=f'^{message}'):
        Factorization(*arguments).factors(0)


# --------------------------------------------------------------------------------------------------
# inputs that have changed

def test_refitting_is_least_squares():
    """`ridge_refit` gives the solution of torch.linalg.lstsq on the samples. Directions that are
    not in the samples keep the weight, and without samples nothing changes."""
    before, x, now = rand(5, 8), rand(100, 8, seed=1), rand(100, 8, seed=2) @ rand(8, 8, seed=3)
    u = x @ before.mT
    found = ridge_refit(before, now.mT @ now / 100, u.mT @ now / 100, ridge=1e-12)
    torch.testing.assert_close(found, torch.linalg.lstsq(now, u).solution.mT, rtol=0, atol=1e-8)
    few, ridge = now[:2], 1e-9
    kept = ridge_refit(before, few.mT @ few, u[:2].mT @ few, ridge)
    unseen = torch.eye(8) - torch.linalg.pinv(few) @ few
    # two bounds: rounding times the condition number n / ridge, and the share of the ridge in the
    # directions of the samples
    assert ((kept - before) @ unseen).norm() < torch.finfo(
        torch.float64).eps * 8 * 8 / ridge * before.norm()
    share = ridge * few.square().sum() / 8 / torch.linalg.svdvals(few)[-1] ** 2
    assert (kept @ few.mT - u[:2].mT).norm() < 2 * share * (u[:2].mT - before @ few.mT).norm()
    assert torch.equal(ridge_refit(before,
                                   torch.zeros(8, 8).double(),
                                   torch.zeros(5, 8).double()), before)
    torch.testing.assert_close(ridge_refit(before, x.mT @ x, u.mT @ x), before, rtol=0, atol=1e-12)


# --------------------------------------------------------------------------------------------------
# ranks

def spectra(seed, count, least, most):
    """Return the energies of random layers, which fall at different rates, and their shapes (m,
    n)."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(least, most, (count, 2), generator=generator).tolist()
    rates = torch.rand(count, generator=generator) * 2
    energies = {
        i: torch.rand(min(shape), generator=generator) * torch.exp(-rate * torch.arange(min(shape)))
        for i, (shape, rate) in enumerate(zip(sizes, rates))}
    return {i: e.sort(descending=True)[0]
            for i, e in energies.items()}, dict(enumerate(map(tuple, sizes)))


def cost(ranks, shapes):
    return sum(factored_size(shapes[name], rank) for name, rank in ranks.items())


def lost(ranks, energies):
    return sum(energies[name][rank:].double().sum().item() for name, rank in ranks.items() if rank)


@pytest.mark.parametrize('seed, step', [*((seed, 1) for seed in range(5)), (5, 2), (6, 2), (7, 3)])
def test_no_ranks_within_the_budget_lose_less(seed, step):
    """No other choice of ranks within the budget has a smaller error. The reference is a search
    over all ranks of three layers. A larger budget never increases the error, and a large enough
    one keeps all layers dense."""
    energies, shapes = spectra(seed, 3, 2, 9)
    choices = [[*(r for r in range(step, min(shape), step) if beneficial_rank(shape, r)), None]
               for shape in shapes.values()]
    every = [dict(zip(shapes, ranks)) for ranks in product(*choices)]
    costs, losses = [cost(ranks, shapes)
                     for ranks in every], [lost(ranks, energies) for ranks in every]
    for price in torch.logspace(-5, 0, 30).tolist():                # per parameter
        best = min(range(len(every)), key=lambda i: losses[i] + price * costs[i])
        assert allocate_ranks(energies, shapes, costs[best], step) == every[best]
        assert losses[best] <= min(
            e for size, e in zip(costs, losses) if size <= costs[best]) + 1e-12
    before = float('inf')
    for budget in range(min(costs), max(costs) + 5):
        ranks = allocate_ranks(energies, shapes, budget, step)
        assert cost(ranks, shapes) <= budget and lost(ranks, energies) <= before + 1e-12
        before = lost(ranks, energies)
    assert ranks == dict.fromkeys(shapes)
    with pytest.raises(ValueError, match=rf'nearest: {min(costs)}\)'):
        allocate_ranks(energies, shapes, min(costs) - 1, step)


FLAT, STEEP, REST = torch.ones(10), torch.tensor([5., *[0] * 9]), torch.tensor([9., 8, 7, *[0] * 7])


@pytest.mark.parametrize('energies, budget, step, expected', [
    # factors save little for a flat spectrum
    ((FLAT, STEEP), 120, 1, (None, 1)), ((FLAT, STEEP), 119, 1, (1, 1)),
    ((FLAT, STEEP), 10 ** 6, 1, (None, 1)),
    # parameters that reduce no error are not spent: a weight of rank 3 is never dense
    ((FLAT, REST), 10 ** 6, 1, (None, 3)), ((FLAT, REST), 10 ** 6, 2, (None, 3)),
    ((0 * FLAT, 0 * FLAT), 10 ** 6, 2, (2, 2)), ((0 * FLAT, 0 * FLAT), 10 ** 6, 1, (1, 1))])
def test_a_dense_layer_is_a_choice_like_others(energies, budget, step, expected):
    """A layer stays dense if that is the best use of the budget. The budget is not spent on
    parameters that reduce no error."""
    named = dict(zip(('first', 'second'), energies))
    ranks = allocate_ranks(named, dict.fromkeys(named, (10, 10)), budget, step)
    assert tuple(ranks.values()) == expected


def test_sizes():
    """The sizes of products and the largest ranks that save parameters match values computed by
    hand."""
    assert [factored_size((5, 7), rank) for rank in (2, None)] == [24, 35]
    assert [beneficial_rank((5, 7), rank) for rank in (2, 3)] == [2, None]
    assert [beneficial_rank((128, 128), rank) for rank in (63, 64)] == [63, None]
    assert allocate_ranks(dict(thin=torch.ones(1)), dict(thin=(1, 9)), 9) == dict(thin=None)

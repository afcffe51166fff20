"""Low-rank factors have the least possible error for any statistics, and the chosen ranks have the
least error within a budget."""

from itertools import product

import pytest
import torch

from helpers import normal as rand
from lowrank.factorization import (RIDGE, SELECTION_RIDGE, Curve, Factorization, InputSelection,
                                   allocate_ranks, beneficial_rank)

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
# selected inputs

def selection_error(weight, chosen, selected, inputs, gradients):
    """Return tr(G E C E^T) for the error E of the weight of the chosen inputs."""
    full = torch.zeros_like(weight.double()).index_copy(1, chosen, selected)
    e = weight - full
    return torch.trace(gradients @ e @ inputs @ e.mT).item()


@pytest.mark.parametrize('M, N', [(5, 20), (20, 12)], ids=['wide', 'tall'])
def test_selected_inputs_have_the_least_error_and_it_is_predicted(M, N):
    """The weight of the chosen inputs is the least squares fit, which includes the ridge.
    `energies` are what the rounds of removal predict, and sum up to the error of no inputs. All
    inputs give the weight itself. The choice is at least as good as nearly all random choices."""
    weight, inputs, gradients = rand(M, N).double(), statistic(N, 1), statistic(M, 3)
    found = InputSelection(weight, inputs, gradients)
    assert sorted(found.order.tolist()) == [*range(N)]
    assert found.energies.tolist() == sorted(found.energies.tolist(), reverse=True)
    total = torch.trace(gradients @ weight @ inputs @ weight.mT).item()
    assert found.energies.sum().item() == pytest.approx(total, rel=.01)
    chosen, selected = found.select(N)
    torch.testing.assert_close(selected, weight, rtol=0, atol=1e-9)
    ridge = SELECTION_RIDGE * inputs.diagonal().mean() * torch.eye(N)
    for count in (1, N // 3, N - 1):
        chosen, selected = found.select(count)
        cov = inputs + ridge
        best = (weight @ cov[:, chosen]) @ torch.linalg.inv(cov[chosen][:, chosen])
        torch.testing.assert_close(selected, best, rtol=0, atol=1e-6 * best.abs().max().item())
    chosen, selected = found.select(N // 3)
    own, worse = selection_error(weight, chosen, selected, inputs, gradients), 0
    for seed in range(50):
        other = torch.randperm(N, generator=torch.Generator().manual_seed(seed))[:N // 3]
        fitted = weight @ cov[:, other] @ torch.linalg.inv(cov[other][:, other])
        worse += selection_error(weight, other, fitted, inputs, gradients) >= own
    assert worse >= 45


def test_inputs_that_repeat_each_other_or_are_zero_go_first():
    """A copy of an input and an input without variance are removed at no cost. Without any variance
    all inputs cost nothing."""
    x = rand(200, 6)
    x = torch.cat((x, x[:, :1], torch.zeros(200, 1)), dim=1).double()
    found = InputSelection(rand(4, 8), x.mT @ x / 200, torch.eye(4).double())
    assert {*found.order[6:].tolist()} in ({0, 7}, {6, 7})
    assert found.energies[6:].sum() < 1e-3 * found.energies.sum()
    assert InputSelection(rand(4, 8), torch.zeros(8, 8).double(),
                          torch.eye(4).double()).energies.tolist() == [0] * 8


# --------------------------------------------------------------------------------------------------
# ranks

def layer_curve(energies, shape, step):
    return Curve(energies, sum(shape), shape[0] * shape[1], step)


def spectra(seed, count, least, most, step):
    """Return the curves of random layers (m, n), whose energies fall at different rates."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(least, most, (count, 2), generator=generator).tolist()
    rates = torch.rand(count, generator=generator) * 2
    energies = [
        torch.rand(min(shape), generator=generator) * torch.exp(-rate * torch.arange(min(shape)))
        for shape, rate in zip(sizes, rates)]
    return {i: layer_curve(e.sort(descending=True)[0], shape, step)
            for i, (e, shape) in enumerate(zip(energies, sizes))}


def cost(ranks, curves):
    return sum(curves[name].size(rank) for name, rank in ranks.items())


def lost(ranks, curves):
    return sum(curves[name].energies[rank:].double().sum().item()
               for name, rank in ranks.items() if rank)


@pytest.mark.parametrize('seed, step', [*((seed, 1) for seed in range(5)), (5, 2), (6, 2), (7, 3)])
def test_no_ranks_within_the_budget_lose_less(seed, step):
    """No other choice of ranks within the budget has a smaller error. The reference is a search
    over all ranks of three layers. A larger budget never increases the error, and a large enough
    one keeps all layers dense."""
    curves = spectra(seed, 3, 2, 9, step)
    choices = [[*(r for r in range(step, len(curve.energies), step)
                  if curve.size(r) < curve.full), None] for curve in curves.values()]
    every = [dict(zip(curves, ranks)) for ranks in product(*choices)]
    costs, losses = [cost(ranks, curves)
                     for ranks in every], [lost(ranks, curves) for ranks in every]
    for price in torch.logspace(-5, 0, 30).tolist():                # per parameter
        best = min(range(len(every)), key=lambda i: losses[i] + price * costs[i])
        assert allocate_ranks(curves, costs[best]) == every[best]
        assert losses[best] <= min(
            e for size, e in zip(costs, losses) if size <= costs[best]) + 1e-12
    before = float('inf')
    for budget in range(min(costs), max(costs) + 5):
        ranks = allocate_ranks(curves, budget)
        assert cost(ranks, curves) <= budget and lost(ranks, curves) <= before + 1e-12
        before = lost(ranks, curves)
    assert ranks == dict.fromkeys(curves)
    with pytest.raises(ValueError, match=rf'nearest: {min(costs)}\)'):
        allocate_ranks(curves, min(costs) - 1)


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
    curves = dict(enumerate(layer_curve(e, (10, 10), step) for e in energies))
    assert tuple(allocate_ranks(curves, budget).values()) == expected


def test_equal_energies_are_spent_in_order():
    """Rounding in the sums of equal energies does not change their order, so the whole budget is
    used: 40 of 100 components of 3 parameters, in two parts."""
    curves = {name: Curve(torch.full((100,), value), 3, 300) for name, value in
              dict(a=.1, b=.1 + 1e-9).items()}
    assert sum(allocate_ranks(curves, 240).values()) == 80


def test_sizes():
    """The sizes of products and the largest ranks that save parameters match values computed by
    hand."""
    assert [layer_curve(torch.ones(5), (5, 7), 1).size(rank) for rank in (2, None)] == [24, 35]
    assert [beneficial_rank((5, 7), rank) for rank in (2, 3)] == [2, None]
    assert [beneficial_rank((128, 128), rank) for rank in (63, 64)] == [63, None]
    assert allocate_ranks(dict(thin=layer_curve(torch.ones(1), (1, 9), 1)), 9) == dict(thin=None)

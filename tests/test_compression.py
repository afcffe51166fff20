"""lowrank/compression.py: the factors are the best ones, whatever the statistics."""

import pytest
import torch

from lowrank.compression import factor

pytestmark = pytest.mark.usefixtures('one_thread')
M, N = 12, 8


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistic(size, seed, tokens=100, spread=1.0):
    """E[x x^T] of tokens whose coordinates differ in scale and are correlated."""
    x = rand(tokens, size, seed=seed) @ rand(size, size, seed=seed + 1) * torch.logspace(-spread, spread, size)
    return (x.mT @ x / tokens).double()


def error(weight, up, down, inputs, gradients):
    """tr(G E C E^T) for E = weight - up down."""
    e = weight - up @ down
    return torch.trace(gradients @ e @ inputs @ e.mT).item()


def alternating_least_squares(weight, rank, inputs, gradients, steps=2000):
    """The same optimum without any decomposition: each factor in turn is the solution of its normal equations."""
    down = rand(rank, N, seed=9)
    for _ in range(steps):
        up = torch.linalg.solve(down @ inputs @ down.mT, down @ inputs @ weight.mT).mT
        down = torch.linalg.solve(up.mT @ gradients @ up, up.mT @ gradients @ weight)
    return up, down


@pytest.mark.parametrize('rank', [1, 3, 6])
def test_no_factors_have_a_smaller_weighted_error(rank):
    weight, inputs, gradients = rand(M, N), statistic(N, 1), statistic(M, 3)
    up, down = factor(weight, rank, inputs, gradients)
    assert (up.shape, down.shape, up.dtype) == ((M, rank), (rank, N), torch.float64)
    best = error(weight, up, down, inputs, gradients)
    found = error(weight, *alternating_least_squares(weight, rank, inputs, gradients), inputs, gradients)
    assert best <= found * (1 + 1e-4) and found <= best * 1.01
    for seed in range(20):
        moved = error(weight, up + 1e-2 * rand(M, rank, seed=seed), down + 1e-2 * rand(rank, N, seed=seed + 50), inputs,
                      gradients)
        assert moved > best
    assert best < .9 * error(weight, *factor(weight, rank), inputs, gradients)


def test_each_statistic_counts_alone():
    weight, inputs, gradients = rand(M, N), statistic(N, 1), statistic(M, 3)
    for given in (dict(inputs=inputs), dict(gradients=gradients)):
        full = dict(inputs=torch.eye(N).double(), gradients=torch.eye(M).double()) | given
        best, found = (error(weight, *factors, **full) for factors in (
            factor(weight, 3, **given), alternating_least_squares(weight, 3, **full)))
        assert abs(best / found - 1) < 1e-4


def test_without_statistics_it_is_the_truncated_svd():
    weight = rand(M, N)
    up, down = factor(weight.float(), 3)
    u, s, vh = torch.linalg.svd(weight.float().double())
    assert torch.allclose(up @ down, u[:, :3] * s[:3] @ vh[:3], atol=1e-12)
    blank = factor(weight.float(), 3, torch.zeros(N, N), torch.zeros(M, M))
    assert torch.allclose(blank[0] @ blank[1], up @ down, atol=1e-12)


def test_the_factors_are_balanced():
    up, down = factor(rand(M, N), 3, statistic(N, 1), statistic(M, 3))
    assert torch.allclose(up.mT @ up, down @ down.mT, atol=1e-10)
    assert up.norm() > .1


@pytest.mark.parametrize('rank', [N, N + 3])
@pytest.mark.parametrize('tokens', [0, 1, 3, 100])
def test_full_rank_reproduces_the_weight_whatever_was_seen(rank, tokens):
    weight = rand(M, N)
    inputs, gradients = (statistic(size, 5, tokens, spread=4) if tokens else torch.zeros(size, size)
                         for size in (N, M))
    up, down = factor(weight, rank, inputs, gradients)
    assert (up.shape, down.shape) == ((M, rank), (rank, N)) and (up @ down - weight).abs().max() < 1e-12


def test_what_was_seen_comes_first_and_the_rest_as_in_the_plain_svd():
    """Two inputs were seen, rank 4: both are exact, and the rest is better than nothing."""
    weight, x = rand(M, N), rand(2, N, seed=4)
    up, down = factor(weight, 4, x.mT @ x)
    plain = torch.matmul(*factor(weight, 4))
    assert ((weight - up @ down) @ x.mT).abs().max() < 1e-2 < ((weight - plain) @ x.mT).abs().max()
    unseen = torch.eye(N).double() - torch.linalg.pinv(x) @ x
    rest = weight @ unseen
    rest = rest - weight @ x.mT @ torch.linalg.pinv(weight @ x.mT) @ rest                       # not yet in U's columns
    left = ((weight - up @ down) @ unseen).norm().item()
    assert left == pytest.approx(torch.linalg.svdvals(rest)[2:].norm().item(), rel=.01)


def test_units_do_not_matter():
    weight, inputs, gradients = rand(M, N), statistic(N, 1), statistic(M, 3)
    products = [torch.matmul(*factor(weight, 3, inputs * a, gradients * b)) for a, b in ((1, 1), (1e12, 1e-30))]
    assert torch.allclose(*products, atol=1e-9)


@pytest.mark.parametrize('change, words', [
    (dict(rank=0), r'rank=0: must be at least 1 \(nearest: 1\)'),
    (dict(inputs=torch.eye(M)), r'inputs of shape \(12, 12\): must be \(8, 8\)'),
    (dict(gradients=torch.eye(N)), r'gradients of shape \(8, 8\): must be \(12, 12\)'),
    (dict(weight=torch.full((M, N), torch.nan)), 'weight: not finite'),
    (dict(inputs=torch.full((N, N), torch.inf)), 'inputs: not finite')])
def test_what_cannot_be_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        factor(**(dict(weight=rand(M, N), rank=3) | change))

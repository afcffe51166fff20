"""'randomized': lowrank/subspace.py and what svd.py, model.py and train.py make of it, against the best approximation,
finite differences and the exact gradient. What it shares with the exact methods is tested beside them."""

from functools import partial

import pytest
import torch

from helpers import (assert_close, checkpoint, checkpoint_of, make, normal, rows, tokens, value_and_gradient,
                     with_singular_values)
from lowrank.subspace import RunningBasis, advance, gaussian_start, saved_state
from lowrank.svd import (causal_low_rank_approximation, leading_eigenvectors, low_rank_approximation,
                         low_rank_factors, truncated_svd)
from model import GPT, SCOPES

pytestmark = pytest.mark.usefixtures('one_thread')
each_scope = pytest.mark.parametrize('scope', ['sequence', 'causal'])
whole = partial(low_rank_approximation, method='randomized')
causal = partial(causal_low_rank_approximation, method='randomized', block=4)


# ----------------------------------------------------------------------------------------------------------------------
# quality

def matrices(n, count):
    """kind -> float32 (count, 2n, n)."""
    i, low = torch.arange(1, n + 1).double(), normal(count, 2 * n, n // 4) @ normal(count, n // 4, n, seed=1)
    u, v = torch.linalg.qr(normal(count, 2 * n, n))[0], torch.linalg.qr(normal(count, n, n, seed=1))[0]
    spectra = {'0.9^i': .9 ** i, **{f'i^-{exponent}': i ** -exponent for exponent in (.25, .5, 1, 2)}}
    return {'Gaussian': normal(count, 2 * n, n).float(),
            'low rank + noise': (low / n ** .5 + .1 * normal(count, 2 * n, n, seed=2)).float(),
            **{kind: (u * sigma @ v.mT).float() for kind, sigma in spectra.items()}}


def residuals(x, y, rank):
    """Frobenius norm of x - y over that of the best approximation: (...)."""
    best = torch.linalg.svdvals(x.double())[..., rank:].square().sum(-1).sqrt()
    return torch.linalg.matrix_norm(x.double() - y.double()) / best


@pytest.mark.any_device
@pytest.mark.parametrize('n, count, float64_here', [
    (16, 32, True), (32, 32, False), (64, 16, True),
    *(pytest.param(n, count, here, marks=pytest.mark.slow) for n, count, here in (
        (16, 32, False), (32, 32, True), (64, 16, False), (128, 6, True), (128, 6, False)))], indirect=['float64_here'])
def test_a_cold_start_is_nearly_the_best_where_sigma_k_is_large_enough(n, count, float64_here, device):
    for kind, x in matrices(n, count).items():
        s = torch.linalg.svdvals(x.double())
        for rank, mean in ((n // 2, 1.04), (n // 4, 1.03), (n // 8, 1.03)):
            if (s[:, rank - 1] >= (1e-3 if float64_here else 3e-3) * s[:, 0]).all():
                found = residuals(x, whole(x.to(device), rank).cpu(), rank)
                assert found.min() >= 1 - 1e-5 and found.mean() <= mean and found.max() <= 1.06, (kind, rank, found)


@pytest.mark.parametrize('kind', ['Gaussian', 'i^-0.25', 'low rank + noise'])
def test_more_iterations_and_more_columns_bring_it_nearer(kind):
    x = matrices(32, 16)[kind]
    for options, least in (([dict(power_iters=i) for i in (0, 1, 2, 4, 8)], .005),
                           ([dict(oversample=p) for p in (0, 4, 12)], .006)):               # 12: all 32 columns
        excess = [residuals(x, whole(x, 16, **given), 16).mean().item() - 1 for given in options]
        assert all(b < .8 * a for a, b in zip(excess, excess[1:])) and excess[-1] < least


def test_a_cold_start_has_four_columns_more_and_leaves_the_best_of_them():
    """Of k + 4 columns the first k alone would be 1.1 times the best."""
    assert gaussian_start(32, 16).shape == (32, 20) and gaussian_start(32, 16, 3).shape == (32, 23)
    assert gaussian_start(18, 16).shape == (18, 18)
    x = matrices(32, 32)['Gaussian']
    bare, cold = (residuals(x, whole(x, 16, start=start), 16).mean() - 1 for start in (
        gaussian_start(32, 16)[:, :16], None))
    assert bare > 1.5 * cold


def test_a_warm_start_from_similar_matrices_is_nearly_the_best_in_one_iteration():
    """Batches of one distribution, each with noise of its own; the start is of the batch before."""
    common = torch.stack([normal(32, 32, seed=i) * .8 ** torch.arange(32) for i in (0, 1)])
    before, x = (normal(8, 2, 64, 32, seed=seed) @ common for seed in (2, 3))
    start = leading_eigenvectors((before.mT @ before).sum(0), 8)                            # (2, 32, 8)
    warm, cold, same = (residuals(x, whole(x, 8, **options), 8) for options in (
        dict(start=start, power_iters=1), dict(power_iters=0), dict(start=start, power_iters=0)))
    assert warm.mean() <= 1.02 and warm.max() <= 1.06 < cold.mean() and warm.mean() < same.mean()


def test_truncated_svd_is_orthonormal_and_descending_and_nearer_with_more_iterations():
    x = normal(3, 40, 16)
    u, s, vh = truncated_svd(x, 6, 'randomized')
    for gram in (u.mT @ u, vh @ vh.mT):
        torch.testing.assert_close(gram, torch.eye(6).double().expand_as(gram), rtol=0, atol=1e-9)
    assert (s.diff(dim=-1) <= 0).all() and (s <= torch.linalg.svdvals(x)[:, :6] + 1e-9).all()
    torch.testing.assert_close(u * s.unsqueeze(-2) @ vh, whole(x, 6), rtol=0, atol=1e-9)
    u, s, vh = truncated_svd(x.mT, 6, 'randomized', power_iters=40)
    assert residuals(x.mT, u * s.unsqueeze(-2) @ vh, 6).max() < 1 + 1e-3 < residuals(x, whole(x, 6), 6).max()


@pytest.mark.parametrize('f', [whole, causal, truncated_svd, low_rank_factors, leading_eigenvectors])
def test_two_iterations_and_no_more_columns_are_the_default_and_both_count(f):
    """Of a matrix that is as wide as it is tall, and of one that is wider."""
    for x in ([normal(16, 16) @ normal(16, 16).mT] if f is leading_eigenvectors else [normal(40, 16), normal(16, 40)]):
        def found(**options):
            parts = f(x, 3, method='randomized', **options)
            return torch.cat([part.flatten() for part in parts])
        assert torch.equal(found(), found(power_iters=2, oversample=0))
        assert not torch.equal(found(), found(power_iters=1)) and not torch.equal(found(), found(oversample=1))


# ----------------------------------------------------------------------------------------------------------------------
# gradients

@pytest.mark.parametrize('approximate, shape, start', [
    (whole, (2, 9, 5), (5, 2)), (whole, (2, 2, 7, 4), (2, 4, 2)), (whole, (4, 6), (6, 2)),
    (causal, (2, 2, 9, 4), (2, 4, 2)), (causal, (9, 7), (7, 3))])
def test_the_gradient_is_that_of_the_last_iteration_and_each_head_has_its_own_start(approximate, shape, start):
    """The basis before it is a constant, here by `start`; the last shapes have bases of fewer rows than columns."""
    x, start = normal(*shape).requires_grad_(), normal(*start, seed=1)
    assert torch.autograd.gradcheck(lambda x: approximate(x, start.shape[-1], start=start, power_iters=0), x)
    if x.dim() == 4:
        alone = approximate(x[1, 1], 2, start=start[1], power_iters=0)
        torch.testing.assert_close(approximate(x, 2, start=start, power_iters=0)[1, 1], alone)


def gradients(x, rank, dy, **options):
    """Of 'randomized', of 'gram'."""
    return [value_and_gradient(lambda x: low_rank_approximation(x, rank, method, **options), x, dy)[1]
            for method in ('randomized', 'gram')]


@pytest.mark.parametrize('below, least', [(.1, .99), (.3, .97), (.6, .9)])
def test_the_gradient_points_where_the_exact_one_does(below, least):
    """sigma is 1 ... 0.8 up to the cut, and `below` times that after it. Without the basis's part it would not."""
    sigma = torch.linspace(1, .8, 8).tolist() + [below * s for s in torch.linspace(1, .8, 8).tolist()]
    for seed in (0, 10, 20):
        x, dy = with_singular_values(sigma, 64, 16, seed), normal(64, 16, seed=7)
        ours, exact = gradients(x, 8, dy)
        constant, _ = gradients(x, 8, dy, basis_grad=False)
        cosine = torch.nn.functional.cosine_similarity
        assert cosine(ours.flatten(), exact.flatten(), dim=0) >= least
        assert cosine((ours - constant).flatten(), (exact - constant).flatten(), dim=0) >= least - .15


def test_the_gradient_is_bounded_where_the_gap_closes():
    for gap in (1e-1, 1e-3, 1e-5, 1e-7, 0):
        x = with_singular_values([2, 1.5, 1.2, 1, 1 - gap, .8, .5, .3], 40, 8)
        dy = normal(40, 8, seed=3)
        ours, exact = (gradient.norm() / dy.norm() for gradient in gradients(x, 4, dy))
        assert ours < 3
        assert gap > 1e-3 or exact > .01 / max(gap, 1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# the running basis

def randomized(scope, rank=2, **overrides):
    return make(use_svd=True, svd_scope=scope, svd_rank=rank, svd_method='randomized', **overrides)


def take_steps(model, steps, seed=0):
    """Train as train.py does."""
    optimizer = model.train().configure_optimizers(.1, 1e-3, (.9, .95), 'cpu')
    for step in range(seed, seed + steps):
        model(tokens(seed=step), tokens(seed=-step))[1].backward()
        optimizer.step()
        model.advance_svd_basis()
        optimizer.zero_grad()
    return model


def span(basis):
    """The projector on the columns."""
    q = torch.linalg.qr(basis)[0]
    return q @ q.mT


def test_what_is_noted_is_the_gram_matrix_of_v():
    """'causal': of the rows that the last basis comes from."""
    x = normal(2, 3, 12, 4)
    for f, stop in ((whole, 12), (causal, 8)):
        noted = []
        f(x, 2, note=noted.append)
        torch.testing.assert_close(noted[0], x[:, :, :stop].mT @ x[:, :, :stop])


def test_a_running_basis_follows_the_leading_subspace_of_what_was_noted():
    """From the Gaussian start, then in one iteration a step from where it was."""
    bases = [RunningBasis(2, 16, 4, power_iters=8, oversample=0) for _ in range(2)]
    assert [own.start()[1] for own in bases] == [8, 8] and bases[0].start()[0].shape == (16, 8)
    for seed in (1, 2):
        x = torch.stack([with_singular_values([5, 4, 3, 2] + [.1] * 12, 16, 16, seed + 10 * i) for i in range(4)])
        grams = (x @ x.mT).view(2, 2, 16, 16)
        for _ in range(3):
            for own, gram in zip(bases, grams):
                own.note(torch.stack((.3 * gram, .7 * gram)))
            advance(bases)
        torch.testing.assert_close(span(saved_state(bases)), span(leading_eigenvectors(grams, 4)), rtol=0, atol=5e-3)
        assert [own.start()[1] for own in bases] == [1, 1] and bases[1].start()[0] is bases[1].basis


def test_a_running_basis_stays_where_there_is_nothing_to_follow():
    """Cold until every head has something, and where it was after a step that was not completed, that noted nothing or
    what is not finite. A head whose values were zero comes back."""
    own, x = RunningBasis(2, 16, 4, 2, 0), with_singular_values([5, 4, 3, 2] + [.1] * 12, 16, 16)
    gram, other = (x @ x.mT).float(), (x.mT @ x).float()

    def step(*grams, **options):
        own.note(torch.stack(grams).unsqueeze(0))
        before = own.basis.clone()
        advance([own], **options)
        return [torch.equal(a, b) for a, b in zip(before, own.basis)]
    assert step(gram, 0 * gram) == [True, True] and saved_state([own]) is None
    assert step(gram, gram) == [False, False] and saved_state([own]).shape == (1, 2, 16, 4)
    assert step(other, float('nan') * gram) == [False, True]
    assert step(other, other, completed=False) == [True, True]
    before = own.basis.clone()
    advance([own])
    assert torch.equal(own.basis, before)
    step(gram, 0 * gram)
    torch.testing.assert_close(own.basis[1], 1e-3 / 4 * own.gaussian[:, :4])
    for _ in range(3):
        step(other, gram)
    expected = leading_eigenvectors(torch.stack((other, gram)), 4)
    torch.testing.assert_close(span(own.basis), span(expected), rtol=0, atol=5e-3)


@each_scope
def test_looking_between_steps_changes_no_bit(scope):
    model, watched = randomized(scope), randomized(scope)
    for step in range(3):
        take_steps(model, 1, step)
        take_steps(watched, 1, step)
        watched.eval()(tokens(3), tokens(3))
        watched.generate(tokens(), 3, use_cache=scope != 'sequence')
        with torch.no_grad():
            watched.train()(tokens(3), tokens(3))
    assert torch.equal(model.svd_basis, watched.svd_basis)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), watched.parameters()))


def test_the_average_over_processes_and_micro_batches_is_what_counts():
    """Two replicas with batches of their own, one with both as micro-batches, and one with both at once."""
    idx, sums = tokens(4), []
    both, micro, *halves = (randomized('sequence').train() for _ in range(4))
    both(idx, idx)
    for model, part in zip(halves, idx.split(2)):
        model(part, part)
        micro(part, part)
        model.advance_svd_basis(lambda tensor: sums.append(tensor.clone()) or tensor)
    again = randomized('sequence').train()
    again(idx, idx)
    again.advance_svd_basis(lambda tensor: sum(sums) / 2)
    for model in (both, micro):
        model.advance_svd_basis()
        torch.testing.assert_close(span(model.svd_basis), span(again.svd_basis))


@each_scope
def test_a_checkpoint_brings_it_back_unless_it_does_not_fit(scope):
    """It is no part of parameters or state, and the model gets a copy of the checkpoint's."""
    model = take_steps(randomized(scope, dtype=torch.float32), 3)
    assert model.state_dict().keys() == make().state_dict().keys() and not model.svd_basis.requires_grad
    assert len(list(model.parameters())) == len(list(make().parameters()))
    saved = checkpoint_of(model) | {'svd_basis': model.svd_basis.clone()}
    again = GPT.from_checkpoint(saved)
    assert torch.equal(again.svd_basis, model.svd_basis) and model.svd_basis.shape == (2, 2, 4, 2)
    assert torch.equal(again.eval()(tokens(), tokens())[0], model.eval()(tokens(), tokens())[0])
    take_steps(again, 1)
    assert torch.equal(saved['svd_basis'], model.svd_basis) and not torch.equal(again.svd_basis, model.svd_basis)
    for overrides in (dict(svd_rank=3), dict(svd_method='gram'), dict(svd_scope='weight'), dict(use_svd=False)):
        assert GPT.from_checkpoint(saved, **overrides).svd_basis is None
    assert GPT.from_checkpoint(checkpoint_of(model)).svd_basis is None


# ----------------------------------------------------------------------------------------------------------------------
# training

@pytest.mark.parametrize('scope', SCOPES)
def test_weights_and_random_numbers_do_not_depend_on_the_method(scope):
    states = []
    for method in ('gram', 'randomized'):
        torch.manual_seed(5)
        model = GPT(make(use_svd=True, svd_rank=2, svd_scope=scope, svd_method=method).config)
        torch.manual_seed(6)
        state = torch.get_rng_state()
        model.train()(tokens(), tokens())[1].backward()
        model.advance_svd_basis()
        assert torch.equal(torch.get_rng_state(), state)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_run_draws_the_windows_and_masks_of_another_method(trained):
    """And ckpt.pt has what it starts from, metrics.jsonl what the SVD leaves of V."""
    options = ('--use_svd=True', '--svd_rank=2', '--svd_block=4', '--dropout=.2')
    folders = [trained(*options, f'--svd_method={method}', folder=method) for method in ('gram', 'randomized')]
    (gram, losses), (saved, other) = ((checkpoint(folder), [row['loss'] for row in rows(folder) if 'loss' in row])
                                      for folder in folders)
    assert all(torch.equal(gram['random'][0][name], saved['random'][0][name]) for name in ('torch', 'batches'))
    assert losses[0] == pytest.approx(other[0], abs=2e-3) and losses != other
    assert saved['svd_basis'].shape == (1, 2, 8, 2) and saved['svd_basis'].isfinite().all()
    assert 'svd_basis' not in gram
    evaluations = [row for row in rows('randomized') if 'train/loss' in row]
    assert [row['iter'] for row in evaluations] == [0, 2, 4]
    for name in (f'svd/block0.head{head}/' for head in (0, 1)):
        assert all(0 < row[name + 'energy_kept'] <= 1 <= row[name + 'effective_rank'] <= 8 for row in evaluations)

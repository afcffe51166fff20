"""The method 'randomized': lowrank/subspace_iteration.py and its use in svd.py and model.py. The
references are the best approximation, finite differences and the exact gradient. test_svd.py has
the tests that 'randomized' shares with the exact methods."""

from functools import partial

import pytest
import torch

from helpers import (assert_close, checkpoint_of, make, normal, same, tokens, value_and_gradient,
                     with_singular_values)
from lowrank.subspace_iteration import (WarmStartBasis, clear_grams, gaussian_start, get_bases,
                                        update_bases)
from lowrank.svd import (causal_low_rank_approximation, leading_eigenvectors,
                         low_rank_approximation, truncated_svd)
from model import GPT, SCOPES

pytestmark = pytest.mark.usefixtures('one_thread')
each_scope = pytest.mark.parametrize('scope', ['sequence', 'causal'])
whole = partial(low_rank_approximation, method='randomized')
causal = partial(causal_low_rank_approximation, method='randomized', block=4)


# --------------------------------------------------------------------------------------------------
# quality

def matrices(n, count):
    """Return a dict: kind of spectrum -> float32 matrices (count, 2n, n)."""
    i, low = torch.arange(
        1, n + 1).double(), normal(count, 2 * n, n // 4) @ normal(count, n // 4, n, seed=1)
    u, v = torch.linalg.qr(normal(count, 2 * n, n))[0], torch.linalg.qr(normal(count, n, n,
                                                                               seed=1))[0]
    spectra = {'0.9^i': .9 ** i, **{f'i^-{power}': i ** -power for power in (.25, .5, 1, 2)}}
    return {'Gaussian': normal(count, 2 * n, n).float(),
            'low rank + noise': (low / n ** .5 + .1 * normal(count, 2 * n, n, seed=2)).float(),
            **{kind: (u * sigma @ v.mT).float() for kind, sigma in spectra.items()}}


def residuals(x, y, rank):
    """Return the Frobenius norm of x - y divided by that of the best approximation, per matrix."""
    best = torch.linalg.svdvals(x.double())[..., rank:].square().sum(-1).sqrt()
    return torch.linalg.matrix_norm(x.double() - y.double()) / best


@pytest.mark.any_device
@pytest.mark.parametrize('n, count, float64_here',
                         [(16, 32, True), (32, 32, False),
                          (64, 8, True), *(pytest.param(*slow, marks=pytest.mark.slow)
                                           for slow in ((16, 32, False), (32, 32, True),
                                                        (64, 16, False), (128, 6, True),
                                                        (128, 6, False)))],
                         indirect=['float64_here'])
def test_a_cold_start_is_nearly_the_best_where_sigma_k_is_large_enough(
        n, count, float64_here, device):
    """From a cold start the residual is at most 6% above that of the best approximation, and on
    average at most 4% (rank n / 2) or 3% (lower ranks). This holds if sigma_k is at least 1e-3 of
    sigma_1, or 3e-3 without float64."""
    for kind, x in matrices(n, count).items():
        s = torch.linalg.svdvals(x.double())
        for rank, mean in ((n // 2, 1.04), (n // 4, 1.03), (n // 8, 1.03)):
            if (s[:, rank - 1] >= (1e-3 if float64_here else 3e-3) * s[:, 0]).all():
                found = residuals(x, whole(x.to(device), rank).cpu(), rank)
                assert found.min() >= 1 - 1e-5 and found.mean() <= mean and found.max() <= 1.06, (
                    kind, rank)


@pytest.mark.parametrize('kind', ['Gaussian', 'i^-0.25', 'low rank + noise'])
@pytest.mark.parametrize('options, least', [
    ([dict(power_iters=i) for i in (0, 1, 2, 4, 8)], .005),
    # a rank of 16, the 4 default columns and 12 more are all 32 columns
    ([dict(oversample=p) for p in (0, 4, 12)], .006)], ids=['iterations', 'columns'])
def test_more_iterations_and_more_columns_bring_it_nearer(kind, options, least):
    """Each step of more power iterations or more extra columns reduces the excess residual by a
    fifth or more."""
    x = matrices(32, 16)[kind]
    excess = [residuals(x, whole(x, 16, **given), 16).mean().item() - 1 for given in options]
    assert all(b < .8 * a for a, b in zip(excess, excess[1:])) and excess[-1] < least


def test_a_warm_start_from_similar_matrices_is_nearly_the_best_in_one_iteration():
    """A warm start needs one iteration to come within 2% of the best residual on average. The
    batches come from one distribution with different noise, and the start is the basis of the
    previous batch."""
    common = torch.stack([normal(32, 32, seed=i) * .8 ** torch.arange(32) for i in (0, 1)])
    before, x = (normal(8, 2, 64, 32, seed=seed) @ common for seed in (2, 3))
    start = leading_eigenvectors((before.mT @ before).sum(0), 8)  # (2, 32, 8)
    warm, cold, unmoved = (residuals(x, whole(x, 8, **options), 8) for options in (
        dict(start=start, power_iters=1), dict(power_iters=0), dict(start=start, power_iters=0)))
    assert warm.mean() <= 1.02 and warm.max() <= 1.06 < cold.mean() and warm.mean() < unmoved.mean()


def test_truncated_svd_is_orthonormal_and_descending():
    """With 'randomized', `truncated_svd` returns orthonormal factors and descending singular values
    that do not exceed the exact ones."""
    x = normal(3, 40, 16)
    u, s, vh = truncated_svd(x, 6, 'randomized')
    for gram in (u.mT @ u, vh @ vh.mT):
        torch.testing.assert_close(gram, torch.eye(6).double().expand_as(gram), rtol=0, atol=1e-9)
    assert (s.diff(dim=-1) <= 0).all() and (s <= torch.linalg.svdvals(x)[:, :6] + 1e-9).all()
    assert_close(u * s.unsqueeze(-2) @ vh, whole(x, 6), 1e-9)


@pytest.mark.parametrize('x', [normal(16, 16) @ normal(16, 16).mT, normal(40, 16), normal(16, 40)],
                         ids=['square', 'tall', 'wide'])
@pytest.mark.parametrize('f', [whole, causal, truncated_svd, leading_eigenvectors])
def test_the_default_is_two_iterations_and_four_columns_more_than_the_rank(f, x):
    """The default is power_iters=2 and a start with four columns more than the rank, for every
    function that takes these options."""
    gram = x @ x.mT if f is leading_eigenvectors else x
    for options, equal in ((dict(power_iters=2), True), (dict(oversample=0), True),
                           (dict(power_iters=1), False), (dict(power_iters=3),
                                                          False), (dict(oversample=1), False)):
        assert same(f(gram, 3, method='randomized'), f(gram, 3, method='randomized',
                                                       **options)) == equal
    assert gaussian_start(99, 16).shape == (99, 20) and gaussian_start(
        99, 16, oversample=3).shape == (99, 23)


# --------------------------------------------------------------------------------------------------
# gradients

@pytest.mark.parametrize('approximate, shape, start', [
    (whole, (2, 9, 5), (5, 2)), (whole, (2, 2, 7, 4), (2, 4, 2)), (whole, (4, 6), (6, 2)),
    (causal, (2, 2, 9, 4), (2, 4, 2)), (causal, (9, 7), (7, 3))])
def test_the_gradient_is_that_of_the_last_iteration(approximate, shape, start):
    """The gradient is that of the last iteration, with the basis before it held constant. The
    reference is finite differences from a fixed `start`, which may be different for each head. In
    the last two cases a basis comes from fewer rows than columns."""
    x, start = normal(*shape).requires_grad_(), normal(*start, seed=1)
    assert torch.autograd.gradcheck(
        lambda x: approximate(x, start.shape[-1], start=start, power_iters=0), x)
    if x.dim() == 4:
        both, alone = (approximate(x[of], 2, start=start[of[1:]], power_iters=0)
                       for of in ((..., ), (1, 1)))
        torch.testing.assert_close(both[1, 1], alone)


@pytest.mark.parametrize('seed', [0, 10, 20])
@pytest.mark.parametrize('below, least', [(.1, .99), (.3, .97), (.6, .9), (1, -1)])
def test_the_gradient_points_where_the_exact_one_does_and_is_bounded_where_the_gap_closes(
        below, least, seed):
    """The gradient points in nearly the direction of the exact one if there is a gap at the cut,
    and it stays bounded if there is none. Singular values go from 1 to 0.8 up to the cut. After it
    they are `below` times these values, in reverse order if there is no gap."""
    head, dy = torch.linspace(1, .8, 8), normal(64, 16, seed=7)
    x = with_singular_values(torch.cat((head, below * (head if below < 1 else head.flip(0)))), 64,
                             16, seed)
    ours, exact = (value_and_gradient(lambda x: low_rank_approximation(x, 8, method), x, dy)[1]
                   for method in ('randomized', 'gram'))
    assert torch.nn.functional.cosine_similarity(ours.flatten(), exact.flatten(), dim=0) >= least
    assert ours.norm() < 3 * dy.norm()


# --------------------------------------------------------------------------------------------------
# the warm start

def randomized(scope, rank=2, **overrides):
    return make(use_svd=True, svd_scope=scope, svd_rank=rank, svd_method='randomized', **overrides)


def basis_of(model):
    return model.extra_state()['svd_basis']


def take_step(model, seed=0):
    """Take an optimizer step as train.py does, with a learning rate of 0, so only the basis
    moves."""
    optimizer = model.configure_optimizers(0, 0., (.9, .95), 'cpu')
    model.train()(tokens(seed=seed), tokens(seed=-seed))[1].backward()
    optimizer.step()
    return model


def span(basis):
    """Return the projector on the span of the columns."""
    q = torch.linalg.qr(basis.double())[0]
    return q @ q.mT


def test_the_gram_matrix_that_is_returned_is_that_of_v():
    """return_gram=True returns V^T V of the rows that the last basis comes from. In 'causal' scope
    these are the first 8 of 12 rows."""
    x = normal(2, 3, 12, 4)
    for f, stop in ((whole, 12), (causal, 8)):
        y, gram = f(x, 2, return_gram=True)
        assert torch.equal(y, f(x, 2)) and f(x, 4, return_gram=True) == (x, None)
        torch.testing.assert_close(gram, x[:, :, :stop].mT @ x[:, :, :stop])


def test_a_warm_start_follows_the_leading_subspace_and_stays_where_there_is_none():
    """The warm basis converges to the leading eigenvectors of the Gram matrix averaged over
    processes.

    The start stays cold until every head has had a non-zero Gram matrix. A step that was not
    completed, had no Gram matrix or had a non-finite one does not move the basis. A head whose
    values were zero can recover."""
    own, x = WarmStartBasis(2, 16, 4, 5,
                            oversample=1).eval(), with_singular_values([5, 4, 3, 2] + [.1] * 12, 16,
                                                                       16)
    gram, other = (x @ x.mT).float(), (x.mT @ x).float()

    def moved(*grams, completed=True, **options):
        """Return which heads move in a step of two micro-batches."""
        before = own.basis.clone()
        for part in (.3, .7)[:2 * len(grams)]:
            own.accumulate_gram(part * torch.stack(grams).unsqueeze(0))
        if not completed:
            clear_grams([own])
        update_bases([own], **options)
        return [not torch.equal(a, b) for a, b in zip(before, own.basis)]
    assert moved(gram, 0 * gram) == [False, False] and get_bases([own]) is None
    assert own.start()['start'].shape == (16, 9) and own.start()['power_iters'] == 5
    assert moved(gram, gram) == [True, True] and get_bases([own]).shape == (1, 2, 16, 4)
    assert own.start()['start'] is own.basis and own.start()['power_iters'] == 0
    assert moved(other, float('nan') * gram) == [True, False] and moved() == [False, False]
    assert moved(other, other, completed=False) == [False, False] and moved() == [False, False]
    assert moved(gram, 0 * gram) == [True, True]
    torch.testing.assert_close(own.basis[1], 1e-3 / 4 * own.gaussian[:, :4])
    both = torch.stack((other, gram))
    for _ in range(3):
        moved(gram, gram, mean=lambda sums: both.expand_as(sums))
    torch.testing.assert_close(span(own.basis), span(leading_eigenvectors(both, 4)), rtol=0,
                               atol=5e-3)


@each_scope
def test_only_completed_steps_of_its_optimizer_move_the_basis(scope):
    """Only completed steps of the model's own optimizer move the basis. A step that a GradScaler
    skips, here because its scale overflows, does not move it, and neither does a step of another
    optimizer. Without its own optimizer the model does not use a loaded basis in training."""
    model, cold = (randomized(scope, dtype=torch.float32).train() for _ in range(2))
    optimizer, scaler = model.configure_optimizers(0, 0., (.9, .95),
                                                   'cpu'), torch.amp.GradScaler('cpu', 2. ** 127)
    scaler.scale(1e4 * model(tokens(), tokens())[1]).backward()
    scaler.step(optimizer)
    assert not model.extra_state()
    cold.load_extra_state(take_step(model).extra_state())
    before, (_, loss) = basis_of(cold), cold(tokens(), tokens())
    torch.optim.SGD(cold.parameters(), 0.).step()
    assert torch.equal(basis_of(cold), before) and loss != cold.eval()(tokens(), tokens())[1]


@each_scope
def test_looking_between_steps_changes_no_bit(scope):
    """Evaluating, generating or running a forward pass between steps does not change a bit of the
    basis."""
    model, watched = randomized(scope), randomized(scope)
    for step in range(3):
        take_step(model, step)
        take_step(watched, step).eval()(tokens(3), tokens(3))
        watched.generate(tokens(), 3, use_cache=scope != 'sequence')
        with torch.no_grad():
            watched.train()(tokens(3), tokens(3))
    assert torch.equal(basis_of(model), basis_of(watched))


@each_scope
def test_a_checkpoint_brings_it_back_unless_it_does_not_fit(scope):
    """A checkpoint restores the basis, and a model with another rank, method or scope starts cold.
    The basis is neither a parameter nor in the state dict, and the model keeps a copy of the
    checkpoint's tensor."""
    model = take_step(take_step(randomized(scope, dtype=torch.float32)), 1)
    assert model.state_dict().keys() == make().state_dict().keys(
    ) and not basis_of(model).requires_grad
    saved = checkpoint_of(model) | {'svd_basis': basis_of(model).clone()}
    again = GPT.from_checkpoint(saved)
    assert torch.equal(basis_of(again), basis_of(model)) and basis_of(model).shape == (2, 2, 4, 2)
    assert torch.equal(again.eval()(tokens(), tokens())[0], model.eval()(tokens(), tokens())[0])
    take_step(again)
    assert torch.equal(saved['svd_basis'], basis_of(model))
    for overrides in (dict(svd_rank=3), dict(svd_method='gram'), dict(svd_scope='weight'),
                      dict(use_svd=False)):
        assert not GPT.from_checkpoint(saved, **overrides).extra_state()
    assert not GPT.from_checkpoint(checkpoint_of(model)).extra_state()


def test_queries_and_keys_have_their_own_bases():
    """Each target of the SVD has its own warm start, with its own rank and number of heads, and a
    checkpoint holds all of them."""
    model = take_step(randomized('causal', svd_targets='q,k,v', svd_rank_q=3, svd_rank_k=1,
                                 n_kv_head=1, dtype=torch.float32))
    found = model.extra_state()
    assert {key: tuple(basis.shape) for key, basis in found.items()} == {
        'svd_basis': (2, 1, 4, 2), 'svd_basis_q': (2, 2, 4, 3), 'svd_basis_k': (2, 1, 4, 1)}
    again = GPT.from_checkpoint(checkpoint_of(model) | found)
    assert same(again.extra_state(), found)


@pytest.mark.parametrize('scope', SCOPES)
def test_weights_and_random_numbers_do_not_depend_on_the_method(scope):
    """The method changes neither the initial weights nor the state of torch's random generator."""
    found = []
    for method in ('gram', 'randomized'):
        config = make(use_svd=True, svd_rank=2, svd_scope=scope, svd_method=method,
                      dropout=.2).config
        torch.manual_seed(5)
        model = take_step(GPT(config))
        found.append((model.state_dict(), torch.get_rng_state()))
    assert same(*found)

"""'randomized': lowrank/subspace.py and what svd.py, model.py and train.py make of it, against the best approximation,
finite differences and the exact gradient. What it shares with the exact methods is tested beside them."""

import copy

import pytest
import torch

import train
from helpers import (TINY, assert_close, checkpoint, checkpoint_of, make, normal, rows, tokens,
                     value_and_gradient, with_singular_values)
from lowrank import subspace
from lowrank.svd import causal_low_rank_approximation, leading_eigenvectors, low_rank_approximation, truncated_svd
from model import GPT, SCOPES
from test_svd import each_branch

pytestmark = pytest.mark.usefixtures('one_thread')
each_scope = pytest.mark.parametrize('scope', ['sequence', 'causal'])


def whole(x, rank, **options):
    return low_rank_approximation(x, rank, 'randomized', **options)


def causal(x, rank, block=4, **options):
    return causal_low_rank_approximation(x, rank, 'randomized', block, **options)


each_map = pytest.mark.parametrize('approximate', [whole, causal])


# ----------------------------------------------------------------------------------------------------------------------
# quality

def power_law(exponent):
    return lambda n: torch.arange(1, n + 1).double() ** -exponent


SPECTRA = {'1': power_law(0), 'i^-1/4': power_law(.25), 'i^-1/2': power_law(.5), '1/i': power_law(1),
           'i^-2': power_law(2), '0.9^i': lambda n: .9 ** torch.arange(n).double()}
LEAST = {True: 1e-3, False: 3e-3}                                   # sigma_k / sigma_1 that is promised anything


def matrices(kind, n, count):
    """float32 (count, 2n, n)."""
    if kind == 'Gaussian':
        return normal(count, 2 * n, n).float()
    if kind == 'low rank + noise':
        low = normal(count, 2 * n, n // 4) @ normal(count, n // 4, n, seed=1) / n ** .5
        return (low + .1 * normal(count, 2 * n, n, seed=2)).float()
    u, v = torch.linalg.qr(normal(count, 2 * n, n))[0], torch.linalg.qr(normal(count, n, n, seed=1))[0]
    return (u * SPECTRA[kind](n) @ v.mT).float()


def residuals(x, y, rank):
    """Frobenius norm of x - y over that of the best approximation: (...)."""
    best = torch.linalg.svdvals(x.double())[..., rank:].square().sum(-1).sqrt()
    return torch.linalg.matrix_norm(x.double() - y.double()) / best


@each_branch
@pytest.mark.parametrize('n, count', [(16, 32), (32, 32), (64, 16), (128, 6)])
def test_a_cold_start_is_nearly_the_best(n, count, float64_here):
    """Wherever sigma_k is as large as promised."""
    kinds = ['Gaussian', 'low rank + noise', *(kind for kind in SPECTRA if kind != '1')]
    for kind in kinds:
        x = matrices(kind, n, count)
        for rank, mean, worst in ((n // 2, 1.04, 1.06), (n // 4, 1.03, 1.06), (n // 8, 1.03, 1.06)):
            if kind in SPECTRA and SPECTRA[kind](n)[rank - 1] < LEAST[float64_here]:
                continue
            found = residuals(x, whole(x, rank), rank)
            assert found.min() >= 1 - 1e-5 and found.mean() <= mean and found.max() <= worst, (kind, rank, found)


@pytest.mark.parametrize('kind', ['Gaussian', 'i^-1/4', 'low rank + noise'])
def test_more_iterations_and_more_columns_bring_it_nearer(kind):
    x = matrices(kind, 32, 16)

    def excess(**options):
        return residuals(x, whole(x, 16, **options), 16).mean().item() - 1

    by_iterations = [excess(power_iters=i) for i in (0, 1, 2, 4, 8)]
    assert all(b < .8 * a for a, b in zip(by_iterations, by_iterations[1:])) and by_iterations[-1] < .005
    by_columns = [excess(oversample=p) for p in (0, 4, 12)]
    assert all(b < .8 * a for a, b in zip(by_columns, by_columns[1:])) and by_columns[-1] < .006    # all 32 columns


def test_a_cold_start_leaves_the_best_of_its_columns():
    """Of k + 4 columns the first k alone would be 1.1 times the best."""
    x = matrices('Gaussian', 32, 32)
    bare = whole(x, 16, start=subspace.gaussian_start(32, 16)[:, :16])
    assert residuals(x, bare, 16).mean() - 1 > 1.5 * (residuals(x, whole(x, 16), 16).mean() - 1)


def test_a_warm_start_from_similar_matrices_is_nearly_the_best_in_one_iteration():
    """Batches of one distribution, each with noise of its own; the start is of the batch before."""
    common = torch.stack([normal(32, 32, seed=i) * .8 ** torch.arange(32) for i in (0, 1)])
    before, x = (normal(8, 2, 64, 32, seed=seed) @ common for seed in (2, 3))
    start = leading_eigenvectors((before.mT @ before).sum(0), 8)                                # (2, 32, 8)
    warm, cold, same = (residuals(x, whole(x, 8, **options), 8) for options in (
        dict(start=start, power_iters=1), dict(power_iters=0), dict(start=start, power_iters=0)))
    assert warm.mean() <= 1.02 and warm.max() <= 1.06 < cold.mean() and warm.mean() < same.mean()


def test_truncated_svd_is_orthonormal_and_descending():
    x = normal(3, 40, 16)
    u, s, vh = truncated_svd(x, 6, 'randomized')
    for gram in (u.mT @ u, vh @ vh.mT):
        torch.testing.assert_close(gram, torch.eye(6).double().expand_as(gram), rtol=0, atol=1e-9)
    assert (s.diff(dim=-1) <= 0).all() and (s <= torch.linalg.svdvals(x)[:, :6] + 1e-9).all()
    torch.testing.assert_close(u * s.unsqueeze(-2) @ vh, whole(x, 6), rtol=0, atol=1e-9)
    u, s, vh = truncated_svd(x, 6, 'randomized', power_iters=40)
    assert residuals(x, u * s.unsqueeze(-2) @ vh, 6).max() < 1 + 1e-3 < residuals(x, whole(x, 6), 6).max()


# ----------------------------------------------------------------------------------------------------------------------
# gradients

@pytest.mark.parametrize('approximate, shape, start', [
    (whole, (9, 5), (5, 2)), (whole, (2, 9, 5), (5, 2)), (whole, (2, 3, 7, 4), (3, 4, 2)), (whole, (4, 6), (6, 2)),
    (causal, (13, 4), (4, 2)), (causal, (2, 2, 9, 4), (2, 4, 2)), (causal, (9, 7), (7, 3))], ids=str)
def test_gradcheck_of_the_last_iteration(approximate, shape, start):
    """The basis before it is a constant, here by `start`; the last shapes have bases of fewer rows than columns."""
    x, start = normal(*shape).requires_grad_(), normal(*start, seed=1)
    assert torch.autograd.gradcheck(lambda x: approximate(x, start.shape[-1], start=start, power_iters=0), x)


def test_each_head_has_its_own_start():
    x, start = normal(2, 3, 9, 5), normal(3, 5, 2, seed=1)
    y = whole(x, 2, start=start, power_iters=0)
    for i in range(2):
        for head in range(3):
            torch.testing.assert_close(y[i, head], whole(x[i, head], 2, start=start[head], power_iters=0))


def test_without_basis_grad_the_projectors_are_constants():
    x, dy = normal(20, 6), normal(20, 6, seed=1)
    for approximate, spans in ((whole, [(20, 0, 20)]), (causal, [(4, 4, 8), (8, 8, 16), (16, 16, 20)])):
        gradient, expected = value_and_gradient(lambda x: approximate(x, 2, basis_grad=False), x, dy)[1], dy.clone()
        for s, a, b in spans:
            w = leading_eigenvectors(x[:s].mT @ x[:s], 2, 'randomized')
            expected[a:b] = dy[a:b] @ w @ w.mT
        assert_close(gradient, expected, 1e-11)
    wide = x.mT.contiguous()
    gradient = value_and_gradient(lambda x: whole(x, 2, basis_grad=False), wide, dy.mT)[1]
    w = leading_eigenvectors(x.mT @ x, 2, 'randomized')
    assert_close(gradient, w @ w.mT @ dy.mT, 1e-11)


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def gradients(x, rank, dy):
    """Of 'randomized', of 'gram'."""
    return [value_and_gradient(lambda x: low_rank_approximation(x, rank, method), x, dy)[1]
            for method in ('randomized', 'gram')]


@pytest.mark.parametrize('below, least', [(.1, .99), (.3, .97), (.6, .9)])
def test_the_gradient_points_where_the_exact_one_does(below, least):
    """sigma is 1 ... 0.8 up to the cut, and `below` times that after it. Without the basis's part it would not."""
    sigma = torch.linspace(1, .8, 8).tolist() + [below * s for s in torch.linspace(1, .8, 8).tolist()]
    for seed in range(0, 50, 10):
        x, dy = with_singular_values(sigma, 64, 16, seed), normal(64, 16, seed=7)
        ours, exact = gradients(x, 8, dy)
        assert cosine(ours, exact) >= least
        constant = value_and_gradient(lambda x: whole(x, 8, basis_grad=False), x, dy)[1]
        assert cosine(ours - constant, exact - constant) >= least - .15


def test_the_gradient_is_bounded_where_the_gap_closes():
    for gap in (1e-1, 1e-3, 1e-5, 1e-7, 0):
        x = with_singular_values([2, 1.5, 1.2, 1, 1 - gap, .8, .5, .3], 40, 8)
        dy = normal(40, 8, seed=3)
        ours, exact = (gradient.norm() / dy.norm() for gradient in gradients(x, 4, dy))
        assert ours < 3
        assert gap > 1e-3 or exact > .01 / max(gap, 1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# hostile matrices

def hostile(rank):
    """name -> (20, 12, 8) float32, of each kind 20 of different numbers."""
    x = normal(20, 12, 8)
    orthonormal, row = torch.linalg.qr(x)[0], normal(20, 1, 8, seed=1)
    ramp = torch.logspace(-30, 30, 12).unsqueeze(-1).double()
    found = {'zero': 0 * x, 'one token': row.expand_as(x), 'repeated values': orthonormal,
             'two repeated values': orthonormal * torch.tensor([3.] * rank + [1.] * (8 - rank)),
             'repeated at the cut': orthonormal * torch.tensor([3.] * (rank - 1) + [1.] * (9 - rank)),
             'duplicated rows': x[:, :3].repeat(1, 4, 1), 'few rows': torch.cat((x[:, :3], 0 * x[:, 3:]), 1),
             'late rows': torch.cat((0 * x[:, :9], x[:, 9:]), 1),
             'one element': x * (torch.arange(96).view(12, 8) == 17),
             'zero columns': x * torch.tensor([1., 0, 0, 1, 0, 0, 0, 0]),
             'steep columns': x * torch.logspace(0, -30, 8),
             'tiny, then huge': x * ramp, 'huge, then tiny': x * ramp.flip(0),
             'jump up': torch.cat((1e-30 * x[:, :5], 1e30 * x[:, 5:]), 1),
             'jump down': torch.cat((1e30 * x[:, :5], 1e-30 * x[:, 5:]), 1),
             **{f'rank {r}': x[..., :r] @ normal(20, r, 8, seed=2) for r in range(1, rank + 2)},
             **{f'scale 1e{e}': x * 10. ** e for e in (-40, -30, -20, -10, 10, 20, 30, 37)},
             **{f'rank one, scale 1e{e}': x[..., :1] @ row * 10. ** e for e in (-30, -15, 15, 30)}}
    return {name: x.float() for name, x in found.items()}


@pytest.fixture
def factors(monkeypatch):
    """A list of the info of every Cholesky factor that is asked for."""
    infos, real = [], torch.linalg.cholesky_ex

    def cholesky_ex(a, **options):
        factor, info = real(a, **options)
        infos.append(info)
        return factor, info
    monkeypatch.setattr(torch.linalg, 'cholesky_ex', cholesky_ex)
    return infos


@each_map
@each_branch
def test_hostile_matrices_give_finite_values_and_gradients_and_no_factor_fails(approximate, float64_here, factors):
    """Of each kind by itself, where all are of one size, and of all at once: more than a thousand matrices."""
    dy, count = normal(12, 8, seed=5).float(), 0
    for rank in (2, 5):
        kinds = hostile(rank)
        for name, x in (kinds | {'all': torch.cat(list(kinds.values()))}).items():
            for options in ({}, dict(start=normal(8, rank), power_iters=1), dict(start=torch.zeros(8, rank))):
                y, gradient = value_and_gradient(lambda x: approximate(x, rank, **options), x, dy.expand_as(x))
                assert y.isfinite().all() and gradient.isfinite().all(), (name, rank, options)
                assert (y.abs() <= 10 * x.abs().amax((-2, -1), keepdim=True)).all(), (name, rank)
            count += len(x)
    assert count > 1000 and factors and not torch.cat([info.flatten() for info in factors]).any()


@pytest.mark.parametrize('rank', [2, 5])
@each_branch
def test_matrices_of_no_more_than_the_rank_pass(rank, float64_here):
    """To the precision that Cholesky QR leaves to directions of very different size."""
    for name, x in hostile(rank).items():
        if torch.linalg.matrix_rank(x.double() / x.abs().max().clamp_min(1e-45)).max() <= rank and 'steep' not in name:
            size = x.abs().max()
            assert (whole(x, rank) - x).abs().max() <= 1e-4 * size, name


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_leading_eigenvectors_of_what_is_not_finite(value):
    with pytest.raises(torch.linalg.LinAlgError, match="non-finite values .* SVD method 'randomized'"):
        leading_eigenvectors(torch.full((3, 3), value), 1, 'randomized')


@pytest.mark.parametrize('scope', SCOPES)
def test_a_model_with_weights_that_are_not_finite_raises(scope):
    model = randomized(scope).train()
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[-1, 0] = float('nan')
    with pytest.raises(torch.linalg.LinAlgError, match='non-finite'):
        model(tokens(), tokens())


# ----------------------------------------------------------------------------------------------------------------------
# causality

@each_branch
@pytest.mark.parametrize('scale', [1e-25, 1, 1e25])
def test_no_later_row_nor_their_number_changes_an_earlier_row(float64_here, scale):
    x = scale * normal(2, 40, 8)
    for dtype, bar in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        y = causal(x.to(dtype), 3)
        for t in (5, 8, 9, 16, 17, 33):
            torch.testing.assert_close(causal(x[:, :t].to(dtype), 3) / scale, y[:, :t] / scale, rtol=0, atol=bar)
            for other in (1e-30, -3., 1e10):
                changed = x.clone()
                changed[:, t:] *= other
                assert torch.equal(causal(changed.to(dtype), 3)[:, :t], y[:, :t])


# ----------------------------------------------------------------------------------------------------------------------
# the running basis

def randomized(scope, rank=2, **overrides):
    return make(use_svd=True, svd_scope=scope, svd_rank=rank, svd_method='randomized', **overrides)


def take_steps(model, steps, seed=0, **options):
    """Train as train.py does."""
    optimizer = model.train().configure_optimizers(.1, 1e-3, (.9, .95), 'cpu')
    for step in range(seed, seed + steps):
        model(tokens(seed=step), tokens(seed=-step))[1].backward()
        optimizer.step()
        model.advance_svd_basis(**options)
        optimizer.zero_grad()
    return model


def pooled(model):
    return torch.stack([own.pooled for own in subspace.running_bases(model)])


def projector(basis):
    q = torch.linalg.qr(basis)[0]
    return q @ q.mT


@each_scope
def test_it_is_no_part_of_parameters_or_state(scope):
    model = take_steps(randomized(scope), 1)
    assert model.state_dict().keys() == make().state_dict().keys()
    assert len(list(model.parameters())) == len(list(make().parameters()))
    assert model.svd_basis.shape == (2, 2, 4, 2) and not model.svd_basis.requires_grad
    assert randomized('weight').svd_basis is None and make().svd_basis is None


@each_scope
def test_training_steps_alone_are_noted(scope):
    model, idx = randomized(scope), tokens()
    model(idx, idx)
    model.train()
    with torch.no_grad():
        model(idx, idx)
    model.eval().generate(idx[:, :3], 3, use_cache=scope != 'sequence')
    assert pooled(model).count_nonzero() == 0
    model.train()(idx, idx)
    once = pooled(model)
    assert (once.diagonal(dim1=-2, dim2=-1) > 0).all()
    model(idx, idx)
    torch.testing.assert_close(pooled(model), 2 * once)


def test_what_is_noted_is_the_gram_matrix_of_v():
    """'causal': of the rows that the last basis comes from."""
    x = normal(2, 3, 12, 4)
    for f, stop in ((whole, 12), (causal, 8)):
        noted = []
        f(x, 2, note=noted.append)
        torch.testing.assert_close(noted[0], x[:, :, :stop].mT @ x[:, :, :stop])


@each_scope
def test_looking_between_steps_changes_no_bit(scope):
    model, watched = randomized(scope), randomized(scope)
    for step in range(4):
        take_steps(model, 1, step)
        take_steps(watched, 1, step)
        watched.eval()(tokens(3), tokens(3))
        with torch.no_grad():
            watched.train()(tokens(3), tokens(3))
    assert torch.equal(model.svd_basis, watched.svd_basis)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), watched.parameters()))


def test_it_is_the_leading_subspace_of_what_was_noted_and_follows():
    model = take_steps(randomized('sequence', svd_power_iters=8), 1)
    for seed in (1, 2):
        grams = torch.stack([with_singular_values([3, 2, .2, .1], 4, 4, seed + 10 * i) for i in range(4)])
        grams = (grams @ grams.mT).view(2, 2, 4, 4)
        for _ in range(4):                                          # one product a step
            for own, gram in zip(subspace.running_bases(model), grams):
                own.note(gram.unsqueeze(0))
            model.advance_svd_basis()
            assert pooled(model).count_nonzero() == 0
        expected = leading_eigenvectors(grams, 2)
        torch.testing.assert_close(projector(model.svd_basis), expected @ expected.mT, rtol=0, atol=5e-3)


def test_the_average_over_processes_is_what_counts():
    """Two replicas with batches of their own, and one with both."""
    idx = tokens(4)
    both, *halves = (randomized('sequence').train() for _ in range(3))
    both(idx, idx)
    for model, part in zip(halves, idx.split(2)):
        model(part, part)
    mean = (pooled(halves[0]) + pooled(halves[1])) / 2
    both.advance_svd_basis()
    for model in halves:
        model.advance_svd_basis(lambda sums: mean)
        torch.testing.assert_close(projector(model.svd_basis), projector(both.svd_basis))
    assert torch.equal(halves[0].svd_basis, halves[1].svd_basis)


def test_a_head_whose_values_were_zero_comes_back():
    own = subspace.RunningBasis(2, 16, 4, 2, 0)
    gram = (lambda x: x @ x.mT)(with_singular_values([5, 4, 3, 2] + [.1] * 12, 16, 16)).float()
    for _ in range(20):
        own.note(torch.stack((gram, torch.zeros_like(gram))).unsqueeze(0))
        subspace.advance([own], lambda sums: sums)
        assert own.basis.isfinite().all() and own.basis[1].any()
    other = torch.flip(gram, (0, 1))
    for _ in range(3):
        own.note(torch.stack((other, gram)).unsqueeze(0))           # and the other head moves to another subspace
        subspace.advance([own], lambda sums: sums)
    expected = leading_eigenvectors(torch.stack((other, gram)), 4)
    torch.testing.assert_close(projector(own.basis), expected @ expected.mT, rtol=0, atol=5e-3)


@each_scope
def test_a_checkpoint_brings_it_back(scope):
    model = take_steps(randomized(scope, dtype=torch.float32), 3)
    saved = checkpoint_of(model) | {'svd_basis': model.svd_basis.clone()}
    again = GPT.from_checkpoint(saved)
    assert torch.equal(again.svd_basis, model.svd_basis)
    assert torch.equal(again.eval()(tokens(), tokens())[0], model.eval()(tokens(), tokens())[0])
    take_steps(again, 1)
    assert torch.equal(saved['svd_basis'], model.svd_basis)         # a copy, not the checkpoint's own


@pytest.mark.parametrize('overrides', [dict(svd_rank=3), dict(svd_method='gram'), dict(svd_scope='weight'),
                                       dict(use_svd=False)], ids=str)
def test_a_checkpoints_basis_that_does_not_fit_is_passed_over(overrides):
    model = take_steps(randomized('sequence', dtype=torch.float32), 1)
    saved = checkpoint_of(model) | {'svd_basis': model.svd_basis}
    assert GPT.from_checkpoint(saved, **overrides).svd_basis is None
    assert GPT.from_checkpoint(checkpoint_of(model)).svd_basis is None


# ----------------------------------------------------------------------------------------------------------------------
# training

RANDOMIZED = ('--use_svd=True', '--svd_rank=2', '--svd_method=randomized', '--svd_block=4')


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


def test_a_run_draws_the_windows_and_masks_of_another_method(fit, here):
    """And ckpt.pt has what it starts from, metrics.jsonl what the SVD leaves of V."""
    runs = []
    for method in ('gram', 'randomized'):
        fit(*RANDOMIZED, '--dropout=.2', f'--svd_method={method}')
        runs.append((checkpoint(), [row['loss'] for row in rows() if 'loss' in row]))
    (gram, losses), (saved, other) = runs
    assert all(torch.equal(gram['random'][0][name], saved['random'][0][name]) for name in ('torch', 'batches'))
    assert losses[0] == pytest.approx(other[0], abs=2e-3) and losses != other

    assert saved['svd_basis'].shape == (1, 2, 8, 2) and saved['svd_basis'].isfinite().all()
    assert 'svd_basis' not in gram

    evaluations = [row for row in rows() if 'train/loss' in row]
    assert [row['iter'] for row in evaluations] == [0, 2, 4]
    for row in evaluations:
        for head in (0, 1):
            assert 0 < row[f'svd/block0.head{head}/energy_kept'] <= 1
            assert 1 <= row[f'svd/block0.head{head}/effective_rank'] <= 8


@pytest.mark.parametrize('spoilt', ['gradient', 'scaled gradient'])
def test_a_step_that_is_not_taken_does_not_move_the_basis(call, here, monkeypatch, spoilt):
    """Refused, where it ends the run; skipped by the scaler of float16, where the run goes on."""
    step, seen = train.step, []

    def spoiling(run, replica):
        if run.iter_num == 2:
            run.model.lm_head.weight.register_hook(lambda g: g * float('inf'))
            if spoilt == 'scaled gradient':
                run.scaler = torch.amp.GradScaler('cpu')
            before = run.model.svd_basis.clone()
            try:
                step(run, replica)
            finally:
                seen.append(torch.equal(before, run.model.svd_basis))
                raise KeyboardInterrupt
        before = copy.deepcopy(run.model.svd_basis)
        loss = step(run, replica)
        assert before is None or not torch.equal(before, run.model.svd_basis)
        return loss
    monkeypatch.setattr(train, 'step', spoiling)
    assert call(train.main, *TINY, *RANDOMIZED).code == 130 and seen == [True]

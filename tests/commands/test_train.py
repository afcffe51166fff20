"""train.py and its runtime: what a run writes, what its numbers mean, what resumes, what is refused."""

import json
import math
import pickle
import re
import sys
import time
import weakref
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import runtime.run
import train
from helpers import ROOT, TEXT, TINY, checkpoint, equal, folder_bytes, interrupt, rows
from model import GPT, METHODS, SCOPES, GPTConfig
from runtime import config as configuration
from runtime import device as devices
from runtime import tracking
from runtime.config import UserError
from runtime.dataset import Dataset, name_of, write_dataset
from runtime.evaluation import Evaluation, prefix_gap
from runtime.optim import Muon, MuonAdamW, gpt_groups

pytestmark = pytest.mark.usefixtures('one_thread', 'here')
SVD = ('--use_svd=True', '--svd_rank=2')                            # of 8
RESUME = '--init_from=resume'


def model_of(saved):
    """The model of a checkpoint, built by hand, in eval mode."""
    model = GPT(GPTConfig(**saved['model_args']))
    model.load_state_dict(saved['model'])
    return model.eval()


def gpt(seed=0, **changes):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**dict(block_size=16, vocab_size=17, n_layer=2, n_head=2, n_embd=16, bias=False) | changes))


# ----------------------------------------------------------------------------------------------------------------------
# what a run leaves behind

def test_a_run_writes_checkpoint_configuration_environment_and_metrics(fit):
    out = fit('--max_iters=4', '--eval_interval=2', '--log_interval=2')
    assert {p.name for p in Path('out').iterdir()} == {'ckpt.pt', 'config.py', 'environment.json', 'metrics.jsonl'}
    steps = [row for row in rows() if 'loss' in row]
    looks = [row for row in rows() if 'train/loss' in row]
    last = rows()[-1]
    assert [row['iter'] for row in steps] == [2, 4] and [row['iter'] for row in looks] == [0, 2, 4]
    assert all(row.keys() == {'iter', 'loss', 'lr', 'step_ms', 'tokens_per_s'} for row in steps)
    statistics = {f'svd/block0.head{head}/{name}' for head in (0, 1) for name in ('energy_kept', 'effective_rank')}
    assert all(row.keys() == {'iter', 'train/loss', 'val/loss'} | statistics for row in looks)
    assert last.keys() == {'iter', 'final', 'val/loss', 'val/tokens'} and (last['iter'], last['final']) == (4, True)
    assert all(math.isfinite(value) for row in rows() for value in row.values())
    environment = json.loads(Path('out/environment.json').read_text())
    assert environment.keys() >= {'command', 'python', 'torch', 'platform', 'cpus', 'threads', 'device', 'dtype',
                                  'git_commit', 'git_changes'}
    assert f'final, all 235 validation tokens: val loss {last["val/loss"]:.4f}' in out


def test_a_run_closes_with_a_sample_of_200_tokens(call):
    text = call(train.main, *TINY).out.partition('sample:\n')[2]
    assert len(text) == 1 + 200 + 2 and text[0] == '\n' and set(text) <= set(TEXT)


def test_the_written_configuration_runs_again_to_the_same_bits(fit, call):
    fit(*SVD, '--vocab_size=None')
    first = checkpoint()
    assert call(train.main, 'out/config.py').code == 0
    assert equal(checkpoint()['model'], first['model']) and Path('out.1').is_dir()
    assert Path('out/config.py').read_text() == Path('out.1/config.py').read_text()


def test_a_checkpoint_is_plain_and_has_raw_names(fit):
    fit(*SVD)
    saved = checkpoint()                                            # weights_only=True
    assert saved.keys() == {'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config', 'tokenizer',
                            'random', 'scaler', 'interim_best_val_loss'}
    assert saved['model'].keys() == gpt(n_layer=1).state_dict().keys()
    assert saved['iter_num'] == 4 and saved['best_val_loss'] == min(r['val/loss'] for r in rows() if 'train/loss' in r)
    assert GPTConfig(**saved['model_args']).svd_rank == saved['config']['svd_rank'] == 2
    assert saved['tokenizer']['chars'] == sorted(set(TEXT))


def test_without_always_save_only_an_improvement_is_saved(fit, monkeypatch):
    losses = iter([3., 1., 2., 1.5])                                # 1.5 is better than the last, not than the best
    monkeypatch.setattr(Evaluation, 'interim', lambda *_: {'train/loss': 0., 'val/loss': next(losses)})
    fit('--always_save_checkpoint=False', '--max_iters=6')
    assert (checkpoint()['iter_num'], checkpoint()['best_val_loss']) == (2, 1.)


def test_an_old_run_is_moved_aside_and_one_line_says_so(fit):
    fit('--seed=1')
    first = folder_bytes()
    assert 'out holds a run: moved to out.1\n' in fit('--seed=2')
    second = folder_bytes()
    assert 'out holds a run: moved to out.2\n' in fit('--seed=3')
    assert folder_bytes('out.1') == first and folder_bytes('out.2') == second
    assert checkpoint()['config']['seed'] == 3


def test_a_symbolic_link_as_out_dir_stays_one(fit, here):
    """Its target may be a larger disk: old run and new run both belong there."""
    (here / 'disk').mkdir()
    (here / 'out').symlink_to('disk', target_is_directory=True)
    fit('--seed=1')
    fit('--seed=2')
    assert (here / 'out').is_symlink() and checkpoint('disk')['config']['seed'] == 2


@pytest.mark.parametrize('options', [
    ['--n_embd=15'], ['--dataset=nowhere'], ['--block_size=5000'], ['--vocab_size=3'], ['--device=tpu'], ['nowhere.py'],
    ['--init_from=resume', '--n_layer=7'], ['--tokenizer=gpt2']], ids=' '.join)
def test_nothing_is_moved_or_written_when_the_input_is_wrong(fit, refused, options):
    fit()
    before = folder_bytes('.')
    refused(train.main, *TINY, *options)
    assert folder_bytes('.') == before


@pytest.mark.parametrize('out_dir', ['notes.txt', 'notes.txt/run'])
def test_an_out_dir_that_cannot_be_made_is_refused(refused, here, out_dir):
    (here / 'notes.txt').write_text('mine')
    assert f"out_dir='{out_dir}'" in refused(train.main, *TINY, f'--out_dir={out_dir}')
    assert (here / 'notes.txt').read_text() == 'mine'


def test_the_data_sets_own_folder_is_no_out_dir(refused):
    assert "out_dir='data/toy'" in refused(train.main, *TINY, '--out_dir=data/toy')


@pytest.mark.parametrize('method', ['write', 'rename'])
def test_an_out_dir_that_cannot_be_written_is_refused(fit, refused, monkeypatch, method):
    fit()

    def deny(*args, **kwargs):
        raise PermissionError(13, 'Permission denied', str(args[0]))
    monkeypatch.setattr(*{'rename': (Path, 'rename'), 'write': (runtime.run, 'write_atomically')}[method], deny)
    assert "out_dir='out'" in refused(train.main, *TINY)


# ----------------------------------------------------------------------------------------------------------------------
# training itself

@pytest.mark.parametrize('options', [[], SVD, [*SVD, '--svd_scope=causal', '--svd_block=4'],
                                     [*SVD, '--svd_scope=weight'], ['--optimizer=muon']], ids=' '.join)
def test_the_loss_falls(fit, options):
    """Every scope and optimizer learns the toy text; chance is log(17) = 2.83."""
    fit('--max_iters=60', '--lr_decay_iters=60', '--eval_interval=60', '--learning_rate=3e-2', *options)
    losses = [row['loss'] for row in rows() if 'loss' in row]
    assert 2.6 < losses[0] < 3.1 and sum(losses[-5:]) / 5 < 2.2 and rows()[-1]['val/loss'] < 2.2


@pytest.mark.parametrize('options', [['--dropout=.2'], ['--optimizer=muon'], SVD, ['--learning_rate=0', '--min_lr=0']],
                         ids=' '.join)
def test_equal_seeds_give_equal_bits_and_other_seeds_do_not(fit, options):
    """Of the trained weights, of the initial ones (a learning rate of 0) and of the data's order."""
    states, orders = [], []
    for seed in (1, 1, 2):
        fit(*options, f'--seed={seed}')
        states.append(checkpoint()['model'])
        orders.append(checkpoint()['random'][0]['batches'])
    assert equal(states[0], states[1]) and not equal(states[0], states[2])
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('options', [['--svd_rank=2', '--use_svd=False'], ['--svd_rank=None'],
                                     *[[f'--svd_scope={scope}', f'--svd_rank={rank}']
                                       for scope in SCOPES for rank in (8, 99)],
                                     ['--svd_scope=causal', '--svd_rank=2', '--svd_block=16']], ids=' '.join)
def test_svd_off_and_full_rank_train_to_the_bits_of_the_baseline(fit, options, method):
    fit('--use_svd=False', '--dropout=.1')
    baseline = checkpoint()['model']
    out = fit('--use_svd=True', '--dropout=.1', f'--svd_method={method}', *options)
    assert equal(checkpoint()['model'], baseline) and 'SVD on V: off (' in out


def test_a_truncating_rank_is_not_the_baseline(fit):
    fit()
    baseline = checkpoint()['model']
    fit(*SVD)
    assert not equal(checkpoint()['model'], baseline)


@pytest.mark.parametrize('options', [[], SVD, [*SVD, '--svd_method=randomized', '--svd_scope=causal', '--svd_block=4']],
                         ids=['baseline', 'sequence', 'randomized'])
def test_evaluating_more_often_changes_no_parameter(fit, options):
    states = []
    for often in (['--eval_interval=1', '--eval_iters=3'], ['--eval_interval=100', '--eval_iters=1']):
        fit('--dropout=.2', *options, *often)
        states.append(checkpoint())
    assert equal(states[0]['model'], states[1]['model'])
    assert torch.equal(states[0]['random'][0]['torch'], states[1]['random'][0]['torch'])


def test_the_reported_loss_is_the_mean_over_micro_steps(fit, monkeypatch):
    losses = []

    class Recording(GPT):
        def forward(self, idx, targets=None):
            logits, loss = super().forward(idx, targets)
            if self.training:
                losses.append(loss.item())
            return logits, loss
    monkeypatch.setattr(train, 'GPT', Recording)
    fit('--gradient_accumulation_steps=3')
    assert len(losses) == 4 * 3 and len(set(losses)) == 12
    means = [sum(three) / 3 for three in zip(*[iter(losses)] * 3)]
    assert [row['loss'] for row in rows() if 'loss' in row] == pytest.approx(means, rel=1e-6)


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_two_micro_batches_of_four_are_one_batch_of_eight(fit, optimizer):
    """The generator deals the same eight windows either way, so losses and parameters agree to rounding."""
    runs = []
    for steps, batch_size in ((2, 4), (1, 8)):
        fit(f'--gradient_accumulation_steps={steps}', f'--batch_size={batch_size}', f'--optimizer={optimizer}')
        runs.append(([row['loss'] for row in rows() if 'loss' in row], checkpoint()['model']))
    (losses_a, a), (losses_b, b) = runs
    assert losses_a == pytest.approx(losses_b, rel=1e-5)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('grad_clip, clipped', [(1e-3, True), (0, False), (1e9, False)])
def test_gradients_are_clipped_to_grad_clip_and_0_means_not_at_all(fit, monkeypatch, grad_clip, clipped):
    norms = []

    class Recording(torch.optim.SGD):
        def step(self):
            norms.append(torch.cat([p.grad.flatten() for g in self.param_groups for p in g['params']]).norm().item())
            super().step()
    monkeypatch.setattr(train, 'build_optimizer', lambda cfg, model, device: Recording(model.parameters(), 1.))
    fit(f'--grad_clip={grad_clip}')
    assert norms == pytest.approx([1e-3] * 4, rel=1e-3) if clipped else len(norms) == 4 and min(norms) > .1


def test_every_parameter_is_in_one_group_and_decays_if_it_has_two_dimensions():
    model = gpt(bias=True)
    for optimizer in ('adamw', 'muon'):
        cfg = configuration.load(train.TrainConfig, [f'--optimizer={optimizer}', '--weight_decay=.5'])[0]
        built = train.build_optimizer(cfg, model, 'cpu')
        for group in built.param_groups:
            assert all((p.dim() >= 2) == (group['weight_decay'] == .5) for p in group['params'])
        ids = [id(p) for group in built.param_groups for p in group['params']]
        assert sorted(ids) == sorted(id(p) for p in model.parameters())             # each in exactly one group


@pytest.mark.slow
def test_torch_compile_trains(fit):
    """On the CPU too, and the checkpoint has raw names."""
    fit('--compile=True', '--max_iters=3')
    assert len([row for row in rows() if 'loss' in row]) == 3
    assert checkpoint()['model'].keys() == gpt(n_layer=1).state_dict().keys()


@pytest.mark.parametrize('scope', SCOPES)
def test_bfloat16_trains_with_svd_on_the_cpu(fit, scope):
    fit('--dtype=bfloat16', *SVD, f'--svd_scope={scope}', '--svd_block=4')
    assert all(math.isfinite(value) for row in rows() for value in row.values())
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in checkpoint()['model'].values())


# ----------------------------------------------------------------------------------------------------------------------
# learning rate

def schedule(**changes):
    return SimpleNamespace(**dict(decay_lr=True, learning_rate=6e-4, min_lr=6e-5, warmup_iters=20, lr_decay_iters=100,
                                  max_iters=100) | changes)


def nanogpt_lr(it, c):
    """nanoGPT's get_lr and its caller."""
    if not c.decay_lr:
        return c.learning_rate
    if it < c.warmup_iters:
        return c.learning_rate * (it + 1) / (c.warmup_iters + 1)
    if it > c.lr_decay_iters:
        return c.min_lr
    decay_ratio = (it - c.warmup_iters) / (c.lr_decay_iters - c.warmup_iters)
    return c.min_lr + 0.5 * (1.0 + math.cos(math.pi * decay_ratio)) * (c.learning_rate - c.min_lr)


@pytest.mark.parametrize('changes', [{}, dict(warmup_iters=0), dict(warmup_iters=99), dict(lr_decay_iters=60),
                                     dict(lr_decay_iters=200), dict(min_lr=0), dict(decay_lr=False)], ids=str)
def test_the_learning_rate_is_nanogpts_wherever_the_warm_up_fits(changes):
    c = schedule(**changes)
    assert [train.get_lr(it, c) for it in range(121)] == pytest.approx([nanogpt_lr(it, c) for it in range(121)])


@pytest.mark.parametrize('warmup_iters, max_iters, used', [(2000, 1000, 100), (100, 100, 10), (99, 100, 99), (5, 3, 0)])
def test_a_warm_up_that_does_not_fit_is_a_tenth_of_the_run(warmup_iters, max_iters, used):
    c = schedule(warmup_iters=warmup_iters, max_iters=max_iters, lr_decay_iters=max_iters)
    lr = [train.get_lr(it, c) for it in range(max_iters)]
    assert lr.index(max(lr)) == used and max(lr) == 6e-4


def test_the_schedule_is_max_iters_long_fits_its_warm_up_and_a_resume_keeps_it(fit, call):
    options = '--warmup_iters=50', '--eval_interval=20', '--min_lr=1e-3', '--lr_decay_iters=None'
    out = fit('--max_iters=20', *options)
    assert 'warmup_iters=50 does not fit 20 steps: using 2\n' in out and 'learning rate:' not in out
    out = call(train.main, RESUME, '--device=cpu', '--max_iters=25').out
    assert 'lr_decay_iters=20 ' in out and 'max_iters=25 ' in out and checkpoint()['config']['lr_decay_iters'] == 20
    c = schedule(learning_rate=1e-2, min_lr=1e-3, warmup_iters=2, lr_decay_iters=20)
    assert [row['lr'] for row in rows() if 'lr' in row] == [nanogpt_lr(it, c) for it in range(20)] + [1e-3] * 5


# ----------------------------------------------------------------------------------------------------------------------
# evaluation

@pytest.mark.parametrize('options', [[], ['--block_size=13', '--batch_size=1'], SVD], ids=' '.join)
def test_the_final_loss_is_that_of_every_validation_token(fit, options):
    fit(*options)
    model, last = model_of(checkpoint()), rows()[-1]
    ids = torch.from_numpy(np.fromfile('data/toy/val.bin', dtype='uint16').astype(np.int64))
    size, total = model.config.block_size, 0.
    with torch.no_grad():
        for start in range(0, len(ids) - 1, size):
            x, y = ids[start:start + size][:len(ids) - 1 - start], ids[start + 1:start + size + 1]
            total += F.cross_entropy(model(x[None], y[None])[0][0], y, reduction='sum').item()
    assert last['val/tokens'] == len(ids) - 1 == 235
    assert last['val/loss'] == pytest.approx(total / 235, rel=1e-5)


def test_an_evaluation_uses_the_same_windows_each_time(fit):
    """So that a curve shows the model and not the draw: without a learning rate it is flat."""
    fit('--learning_rate=0', '--min_lr=0')
    looks = [(row['train/loss'], row['val/loss']) for row in rows() if 'train/loss' in row]
    assert len(looks) == 3 and len(set(looks)) == 1


GAP_KEYS = {'val/prefix_loss', 'val/prefix_gap', 'val/prefix_gap_se', 'val/prefix_positions',
            'val/parallel_loss_at_positions', 'val/prefix_loss_at_positions'}


@pytest.mark.parametrize('options', [[], [*SVD, '--svd_scope=causal'], [*SVD, '--svd_scope=weight'],
                                     ['--use_svd=True', '--svd_rank=8'], ['--use_svd=False', '--svd_rank=2']],
                         ids=' '.join)
def test_no_prefix_loss_where_no_token_sees_the_future(fit, options):
    out = fit(*options)
    assert not any(GAP_KEYS & row.keys() for row in rows()) and 'prefix' not in out


def test_sequence_scope_reports_the_loss_that_generation_would_see(fit):
    out = fit(*SVD)
    looks, last = [row for row in rows() if 'val/loss' in row], rows()[-1]
    for row in looks:
        assert GAP_KEYS <= row.keys() and row['val/prefix_gap_se'] > 0
        assert row['val/prefix_loss'] == pytest.approx(row['val/loss'] + row['val/prefix_gap'])
        assert row['val/prefix_gap'] == pytest.approx(
            row['val/prefix_loss_at_positions'] - row['val/parallel_loss_at_positions'], abs=1e-6)
    assert last['val/prefix_positions'] >= 512 and f'{last["val/prefix_loss"]:.4f} prefix-only' in out


class Reader(torch.nn.Module):
    """Sure of the next token where it can look at it (`peeks`), else of the one it stands on."""

    def __init__(self, peeks):
        super().__init__()
        self.peeks = peeks

    def forward(self, idx, targets=None):
        seen = torch.cat((idx[:, 1:], idx[:, -1:]), dim=1) if self.peeks else idx       # (B, T)
        logits = 5. * F.one_hot(seen, 17)                                               # (B, T, vocab)
        if targets is None:
            return logits[:, -1:], None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def test_the_prefix_gap_is_zero_for_a_causal_model_and_large_for_one_that_peeks():
    data = Dataset('data/toy')
    gap = {peeks: prefix_gap(Reader(peeks), data, 'val', 200, 16, 'cpu', nullcontext(), seed=0)
           for peeks in (False, True)}
    assert gap[False]['gap'] == gap[False]['gap_se'] == 0 and gap[False]['parallel'] == gap[False]['prefix'] > 3
    assert gap[True]['gap'] > 3 and gap[True]['gap'] > 10 * gap[True]['gap_se'] > 0
    assert gap[True]['positions'] == gap[False]['positions'] == 200
    assert gap[True]['parallel'] < 1                                # nearly all of it was read off the next token


def test_the_standard_error_of_the_gap_is_what_repetition_shows():
    """Over many draws the gap scatters by about its own estimate of that."""
    data, model = Dataset('data/toy'), Reader(peeks=True)
    draws = [prefix_gap(model, data, 'val', 160, 16, 'cpu', nullcontext(), seed=seed) for seed in range(60)]
    scatter = torch.tensor([d['gap'] for d in draws]).std().item()
    estimate = sum(d['gap_se'] for d in draws) / len(draws)
    assert .7 < scatter / estimate < 1.4


@pytest.mark.parametrize('gap, se, warns', [(.021, .01, True), (-.021, .01, True), (.019, .01, False), (0., 0., False),
                                            (-.019, .01, False), (1e-9, 0., True)])
def test_a_warning_appears_exactly_when_the_gap_exceeds_two_standard_errors(gap, se, warns):
    row = {'val/loss': 2., 'val/prefix_loss': 2. + gap, 'val/prefix_gap': gap, 'val/prefix_gap_se': se}
    text = Evaluation(None, None, None, None, None, True).describe(row)
    assert ('warning: ' in text) == warns and f'(gap {gap:+.4f} +- {se:.4f})' in text


def test_the_model_trains_on_after_an_evaluation():
    model = gpt(dropout=.5).train()
    cfg = configuration.load(train.TrainConfig, [*TINY, *SVD])[0]
    evaluate = Evaluation(cfg, model, Dataset('data/toy'), 'cpu', nullcontext(), sees_future=True)
    for look in (evaluate.interim, evaluate.final):
        assert look() == look() and model.training                  # deterministic: without dropout


# ----------------------------------------------------------------------------------------------------------------------
# eval_only

@pytest.mark.parametrize('scope', SCOPES)
def test_eval_only_measures_what_a_rank_costs_and_leaves_the_run_alone(fit, scope):
    fit('--max_iters=60', '--lr_decay_iters=60', '--eval_interval=60', '--learning_rate=3e-2')
    before, trained = folder_bytes(), rows()[-1]['val/loss']
    for rank in (1, 8):
        fit('--eval_only=True', RESUME, '--use_svd=True', f'--svd_rank={rank}', f'--svd_scope={scope}', '--svd_block=2')
    after, (cut, full) = folder_bytes(), rows(file='eval.jsonl')
    assert after.pop('eval.jsonl') and after == before and not Path('out.1').exists()
    Path('out/eval.jsonl').unlink(), Path('out/eval.jsonl').mkdir()
    assert 'not written: ' in fit('--eval_only=True', RESUME)       # of somebody else's run: the loss is known
    assert full['val/loss'] == pytest.approx(trained, abs=1e-6) and abs(cut['val/loss'] - trained) > 1e-3
    assert (cut['config']['svd_rank'], cut['config']['svd_scope']) == (1, scope)


# ----------------------------------------------------------------------------------------------------------------------
# Muon

def matrix(singular_values, rows=24, columns=16):
    torch.manual_seed(0)
    s = torch.tensor(singular_values)
    u, v = (torch.linalg.qr(torch.randn(n, len(s)))[0] for n in (rows, columns))
    return (u * s) @ v.T


@pytest.mark.parametrize('shape', [(24, 16), (16, 24), (16, 16)])
def test_orthogonalisation_moves_all_singular_values_near_one(shape):
    """10 to 0.1 become 0.6 to 1.3, and the singular vectors stay."""
    g = matrix(torch.logspace(1, -1, 16).tolist(), *shape)
    muon = Muon([torch.nn.Parameter(g)], .1, 0., torch.float32)
    o = muon._orthogonalize(g[None], muon.param_groups[0])[0]
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    inner = u.T @ o @ vh.T                                          # diagonal if the singular vectors are g's
    assert .6 < inner.diag().min() and inner.diag().max() < 1.3
    assert (inner - inner.diag().diag()).abs().max() < 1e-3


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, .05), (torch.bfloat16, .05)], ids=str)
def test_a_muon_step_is_torchs_own_to_bfloat16_rounding(dtype, tolerance):
    """Several steps, shapes in one batch and alone, decay and momentum included."""
    shapes = [(24, 16), (24, 16), (16, 24), (8, 8)]
    torch.manual_seed(0)
    start, grads = ([torch.randn(s) for s in shapes] for _ in range(2))
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    options = dict(lr=.1, weight_decay=.1)
    a = Muon(ours, dtype=dtype, **options)
    b = torch.optim.Muon(theirs, momentum=.95, adjust_lr_fn='match_rms_adamw', **options)
    for step in range(3):
        for p, q, g in zip(ours, theirs, grads):
            p.grad, q.grad = g * (step + 1) + step, g * (step + 1) + step
        a.step(), b.step()
    for p, q, p0 in zip(ours, theirs, start):
        assert (p - q).norm() < tolerance * (q - p0).norm()


def muon_adamw(model):
    return MuonAdamW(gpt_groups(model, .1), .01, (.9, .95), 'cpu', torch.float32)


def train_steps(model, optimizer, steps):
    x = torch.randint(17, (4, 17), generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        model(x[:, :-1], x[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = gpt(bias=True)
    optimizer = muon_adamw(model)
    names = {id(p): name for name, p in model.named_parameters()}
    taken = [[names[id(p)] for g in o.param_groups for p in g['params']] for o in optimizer.optimizers]
    assert sorted(taken[0] + taken[1]) == sorted(names.values())    # each exactly once
    assert {re.sub(r'\.\d+\.', '.*.', name) for name in taken[0]} == {
        f'transformer.h.*.{part}.weight' for part in ('attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')}


def test_muon_with_adamw_continues_from_its_state_to_the_bit():
    model, twin = gpt(), gpt()
    optimizer = muon_adamw(model)
    train_steps(model, optimizer, 2)
    twin.load_state_dict(model.state_dict())
    restored = muon_adamw(twin)
    restored.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    train_steps(model, optimizer, 2), train_steps(twin, restored, 2)
    assert equal(model.state_dict(), twin.state_dict())


# ----------------------------------------------------------------------------------------------------------------------
# resuming

@pytest.mark.parametrize('options', [['--svd_rank=3', '--use_svd=True', '--svd_scope=causal'], ['--dropout=.5']],
                         ids=' '.join)
def test_what_changes_no_parameter_may_change_at_resume(fit, options):
    fit()
    assert train.main([RESUME, '--device=cpu', '--max_iters=6', *options]) == 0
    for option in options:
        key, value = option[2:].split('=')
        assert str(checkpoint()['model_args'][key]).lstrip('0') == value


def as_nanogpt(saved):
    """A checkpoint as nanoGPT writes it after torch.compile on a GPU."""
    args = {k: saved['model_args'][k] for k in (
        'n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')}
    config = {k: saved['config'][k] for k in (
        'out_dir', 'eval_interval', 'log_interval', 'eval_iters', 'eval_only', 'always_save_checkpoint', 'init_from',
        'wandb_log', 'wandb_project', 'wandb_run_name', 'dataset', 'gradient_accumulation_steps', 'batch_size',
        'learning_rate', 'max_iters', 'weight_decay', 'beta1', 'beta2', 'grad_clip', 'decay_lr', 'warmup_iters',
        'lr_decay_iters', 'min_lr', 'backend', *args) if k != 'vocab_size'}
    return dict(model={f'_orig_mod.{k}': v for k, v in saved['model'].items()}, optimizer=saved['optimizer'],
                model_args=args, iter_num=saved['iter_num'], best_val_loss=torch.tensor(saved['best_val_loss']),
                config=config | dict(device='cuda', dtype='float16', compile=True))


def test_a_checkpoint_of_nanogpt_resumes(fit):
    fit()
    torch.save(as_nanogpt(checkpoint()), 'out/ckpt.pt')
    before = checkpoint()
    assert train.main([RESUME, '--device=cpu', '--max_iters=5']) == 0
    saved = checkpoint()
    assert saved['iter_num'] == 5 and saved['model'].keys() == gpt(n_layer=1).state_dict().keys()
    assert saved['optimizer']['state'][0]['step'] == 5 and isinstance(saved['best_val_loss'], float)
    moved = {k: (saved['model'][k] - before['model'][f'_orig_mod.{k}']).abs().max() for k in saved['model']}
    assert 0 < max(moved.values()) < .02                            # one step of a learning rate of at most 0.01


def test_a_shape_that_contradicts_the_checkpoint_is_refused(fit, call, refused, here):
    """On the command line; in a config file it gives way with a remark."""
    fit()
    assert 'n_layer=2' in refused(train.main, RESUME, '--device=cpu', '--n_layer=2')
    (here / 'two.py').write_text('n_layer = 2\nmax_iters = 5\n')
    result = call(train.main, 'two.py', RESUME, '--device=cpu')
    assert result.code == 0 and result.out.count('n_layer=2 of two.py gives way') == 1
    assert checkpoint()['model_args']['n_layer'] == 1 and checkpoint()['iter_num'] == 5


def test_the_gelu_of_a_checkpoint_stays(fit, call, refused):
    """Checkpoints from before there was a choice are exact."""
    fit('--gelu=tanh')
    assert 'gelu=exact: resume has gelu=tanh, which is fixed' in refused(train.main, RESUME, '--gelu=exact',
                                                                         '--device=cpu')
    assert call(train.main, RESUME, '--device=cpu', '--max_iters=5').code == 0
    saved = checkpoint()
    assert saved['model_args'].pop('gelu') == saved['config'].pop('gelu') == 'tanh'
    torch.save(saved, 'out/ckpt.pt')
    assert call(train.main, RESUME, '--device=cpu', '--max_iters=6').code == 0
    assert checkpoint()['model_args']['gelu'] == 'exact' and checkpoint()['iter_num'] == 6


def test_a_shape_that_agrees_with_the_checkpoint_may_be_given(fit, call):
    """n_embd=16 fits the checkpoint's 2 heads, if not the default's 12."""
    fit()
    assert call(train.main, RESUME, '--device=cpu', '--max_iters=5', '--n_embd=16').code == 0


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_the_context_can_be_cropped_at_resume(fit, optimizer):
    fit(f'--optimizer={optimizer}')
    assert train.main([RESUME, '--device=cpu', '--max_iters=6', '--block_size=8']) == 0
    saved = checkpoint()
    assert saved['model_args']['block_size'] == 8 and saved['model']['transformer.wpe.weight'].shape == (8, 16)


def test_a_resumed_checkpoint_is_freed_before_training(fit, monkeypatch):
    """It holds the weights a second time."""
    fit()
    loaded, alive = [], []
    load = train.ckpt.load

    def watch(path):
        saved = load(path)
        loaded.append(weakref.ref(saved['model']['transformer.wpe.weight']))
        return saved
    monkeypatch.setattr(train.ckpt, 'load', watch)
    monkeypatch.setattr(train.ckpt, 'save', lambda *args: alive.append(loaded[0]() is not None))
    assert train.main([RESUME, '--device=cpu', '--max_iters=6']) == 0
    assert alive and not any(alive)


def test_a_cropped_context_crops_the_optimizers_state_too(fit):
    fit()
    assert train.main([RESUME, '--device=cpu', '--max_iters=6', '--block_size=8']) == 0
    assert checkpoint()['optimizer']['state'][1]['exp_avg'].shape == (8, 16)


def test_other_characters_than_the_checkpoints_are_refused(fit, refused):
    """As many, but others: every id would silently change its meaning."""
    fit()
    write_dataset('data/other', TEXT.replace('a', 'A'), 'char', source='tests')
    assert 'dataset=other' in refused(train.main, RESUME, '--device=cpu', '--dataset=other', '--max_iters=6')


def touch_if_run():
    class Bomb:
        def __reduce__(self):
            return Path.touch, (Path('EXECUTED'),)
    return Bomb()


def without(key):
    return lambda good: {k: v for k, v in good.items() if k != key}


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
@pytest.mark.parametrize('spoil, words', [
    (lambda good: Path('out/ckpt.pt').read_bytes()[:5000], 'damaged, or not a PyTorch file'),
    (lambda good: b'', 'damaged, or not a PyTorch file'),
    (lambda good: b'PK\3\4 not really', 'damaged, or not a PyTorch file'),
    (lambda good: pickle.dumps(touch_if_run()), 'damaged, or not a PyTorch file'),
    (lambda good: touch_if_run(), 'not loadable with weights_only=True'),
    (lambda good: good | {'config': touch_if_run()}, 'not loadable with weights_only=True'),
    (lambda good: [1, 2], 'it needs the keys'), (lambda good: good['model'], 'it needs the keys'),
    (without('model_args'), 'it needs the keys'), (without('model'), 'it needs the keys'),
    (lambda good: good | {'model': {}}, 'do not fit its model_args'),
    (lambda good: good | {'model_args': {**good['model_args'], 'n_embd': 32}}, 'do not fit its model_args'),
    (lambda good: good | {'model_args': {**good['model_args'], 'n_head': 'two'}}, "n_head='two': must be"),
    (lambda good: good | {'model_args': {**good['model_args'], 'svd_scope': 'rows'}}, "svd_scope='rows'"),
    (lambda good: good | {'config': {**good['config'], 'batch_size': 'big'}}, "batch_size='big'"),
    (without('optimizer'), 'does not fit optimizer=adamw'),
    pytest.param(lambda good: good | {'model_args': {**good['model_args'], 'n_moe': 8}}, 'n_moe'),
    pytest.param(without('best_val_loss'), 'best_val_loss'),
    pytest.param(lambda good: good | {'model': 1}, 'out/ckpt.pt'),
    pytest.param(lambda good: good | {'config': None}, 'out/ckpt.pt'),
    pytest.param(lambda good: good | {'iter_num': 'four'}, 'iter_num')])
def test_a_damaged_or_foreign_checkpoint_is_refused_and_nothing_in_it_runs(fit, refused, spoil, words):
    fit()
    bad = spoil(checkpoint())
    if isinstance(bad, bytes):
        Path('out/ckpt.pt').write_bytes(bad)
    else:
        torch.save(bad, 'out/ckpt.pt')
    before = folder_bytes()
    line = refused(train.main, RESUME, '--device=cpu', '--max_iters=6')
    assert words in line and not Path('EXECUTED').exists() and folder_bytes() == before


def test_a_crash_while_saving_leaves_the_old_checkpoint(fit, monkeypatch):
    fit()
    before = folder_bytes()['ckpt.pt']

    def crash(checkpoint, file):
        file.write(b'half of it')
        raise RuntimeError('out of electricity')
    monkeypatch.setattr(torch, 'save', crash)
    with pytest.raises(RuntimeError, match='electricity'):
        train.ckpt.save({}, 'out/ckpt.pt')
    assert folder_bytes()['ckpt.pt'] == before and not list(Path('out').glob('*.tmp'))


# ----------------------------------------------------------------------------------------------------------------------
# a training that fails

@pytest.mark.parametrize('bad', ['nan', 'inf'])
def test_a_loss_that_is_no_number_stops_with_one_line_and_keeps_the_checkpoint(call, monkeypatch, bad):
    class Failing(GPT):
        def forward(self, idx, targets=None):
            logits, loss = super().forward(idx, targets)
            steps[0] += self.training
            return logits, loss * float(bad) if steps[0] == 3 and self.training else loss
    steps = [0]
    monkeypatch.setattr(train, 'GPT', Failing)
    result = call(train.main, *TINY, '--eval_interval=2')
    assert result.code == 1 and f'train.py: training stopped: step 3: the loss is {bad}' in result.err
    assert 'Traceback' not in result.err and checkpoint()['iter_num'] == 2
    assert all(p.isfinite().all() for p in checkpoint()['model'].values())


def test_weights_that_are_no_numbers_are_never_saved(call):
    """A step can spoil the weights after its own loss was fine; the evaluation that follows sees it."""
    result = call(train.main, *TINY, '--learning_rate=1e38', '--grad_clip=0', '--eval_interval=1', '--warmup_iters=0',
                  '--log_interval=100', '--max_iters=20')
    assert result.code == 1 and 'training stopped' in result.err and 'Traceback' not in result.err
    assert not Path('out/ckpt.pt').exists() or all(p.isfinite().all() for p in checkpoint()['model'].values())


# ----------------------------------------------------------------------------------------------------------------------
# data sets

def test_token_ids_beyond_the_vocabulary_are_refused(refused):
    ids = np.fromfile('data/toy/val.bin', dtype='uint16')
    ids[-1] = 17
    ids.tofile('data/toy/val.bin')
    assert 'val.bin: token id 17 is outside its vocabulary of 17' in refused(train.main, *TINY)


@pytest.mark.parametrize('vocab_size', [1, 16])
def test_a_vocabulary_too_small_for_the_data_is_refused(refused, vocab_size):
    assert '(nearest: 17)' in refused(train.main, *TINY, f'--vocab_size={vocab_size}')


@pytest.mark.parametrize('block_size, ok', [(235, True), (236, False), (5000, False)])
def test_a_block_longer_than_the_data_is_refused(call, block_size, ok):
    result = call(train.main, *TINY, f'--block_size={block_size}', '--max_iters=1')
    assert result.code == (0 if ok else 2)
    assert ok or 'val.bin has only 236 tokens (nearest: 235)' in result.err


@pytest.mark.parametrize('spoil', [lambda d: (d / 'val.bin').unlink(), lambda d: (d / 'val.bin').write_bytes(b''),
                                   lambda d: (d / 'train.bin').write_bytes(b'123'),
                                   lambda d: (d / 'meta.json').write_text('{'),
                                   lambda d: (d / 'meta.json').write_text('[]'),
                                   lambda d: (d / 'meta.json').write_text('{"unfinished": "prepare again"}')],
                         ids=['no val', 'empty val', 'odd train', 'broken meta', 'foreign meta', 'unfinished'])
def test_a_data_folder_left_half_written_is_refused(refused, spoil):
    spoil(Path('data/toy'))
    assert 'toy' in refused(train.main, *TINY) and not Path('out').exists()


def test_a_data_folder_left_half_written_is_called_that():
    Path('data/toy/val.bin').unlink()
    with pytest.raises(UserError) as e:
        train.locate('toy', 'char')
    assert 'val.bin' in str(e.value) and 'no such data set' not in str(e.value)


@pytest.fixture
def texts(monkeypatch, here):
    """Text files are encoded below this folder, not into the repository."""
    monkeypatch.setattr(train, 'locate', partial(train.locate, roots=(here / 'data',)))


@pytest.mark.parametrize('end', ['\n', '\r\n'], ids=['unix', 'windows'])
def test_a_text_file_prepares_itself_once(texts, fit, end):
    Path('my text.txt').write_bytes(TEXT.replace('\n', end).encode())
    assert '2,360 characters' in fit('--dataset=my text.txt')
    assert '2,360 characters' not in fit('--dataset=my text.txt')
    assert checkpoint()['tokenizer']['chars'] == sorted(set(TEXT))
    assert len(list(Path('data').glob('my text-char-*'))) == 1


def test_a_text_file_can_be_encoded_by_gpt2s_bpe(texts, fit, byte_bpe):
    Path('my.txt').write_text(TEXT)
    fit('--dataset=my.txt', '--tokenizer=gpt2')
    saved = checkpoint()
    assert saved['tokenizer']['tokenizer'] == 'gpt2'
    assert saved['model_args']['vocab_size'] == 50304               # 50257 rounded up to 64s
    assert rows()[-1]['val/tokens'] == 235


def test_a_run_goes_on_without_the_text_that_it_was_given(texts, here, fit, call, monkeypatch):
    Path('my.txt').write_text(TEXT)
    fit('--dataset=my.txt')
    folder, = (here / 'data').glob('my-char-*')
    assert checkpoint()['config']['dataset'] == str(folder)
    assert name_of(ROOT / 'data' / folder.name, 'my.txt') == folder.name
    Path('my.txt').unlink()
    monkeypatch.chdir('data')
    result = call(train.main, '--init_from=resume', f'--out_dir={here}/out')
    assert result.code == 0 and f'data: {folder}' in result.out


@pytest.mark.parametrize('content, words', [(b'', 'too few'), (b'a', 'too few'), (b'\xff\xfe', 'not a readable UTF-8'),
                                            (b'short', '(nearest: a longer text)')])
def test_a_text_file_without_enough_text_is_refused(texts, refused, content, words):
    Path('my.txt').write_bytes(content)
    assert words in refused(train.main, *TINY, '--dataset=my.txt')


@pytest.mark.parametrize('name', [pytest.param('data/toy'), 'toy/', 'ABSOLUTE'])
def test_a_prepared_folder_can_be_given_by_path(fit, name):
    fit(f'--dataset={Path("data/toy").absolute() if name == "ABSOLUTE" else name}')


# ----------------------------------------------------------------------------------------------------------------------
# wandb

def test_wandb_offline_writes_below_out_dir(fit, monkeypatch):
    wandb = pytest.importorskip('wandb')
    for key, value in dict(WANDB_MODE='offline', WANDB_SILENT='true', WANDB_CONSOLE='off').items():
        monkeypatch.setenv(key, value)
    fit('--wandb_log=True')
    wandb.teardown()
    assert list(Path('out/wandb').glob('offline-run-*/run-*.wandb'))


class Wandb:
    """The little of wandb that a run needs, and what it was told. `broken`: name of a call -> what it does instead."""

    def __init__(self, **broken):
        self.broken, self.options, self.rows, self.metrics, self.codes = broken, [], [], [], []

    def init(self, **options):
        self.options.append(options | dict(terminal=sys.stdin.isatty()))
        self.broken.get('init', lambda: None)()
        return self

    def define_metric(self, name, **options):
        self.metrics.append((name, options))

    def log(self, row):
        self.broken.get('log', lambda: None)()
        self.rows.append(row)

    def finish(self, exit_code):
        self.codes.append(exit_code)
        self.broken.get('finish', lambda: None)()

    Image = staticmethod(lambda path: ('image', path))


@pytest.fixture
def fake(monkeypatch):
    """fake(**broken) -> the `Wandb` that a run will import, and for which it has little patience."""
    def fake(**broken):
        made = Wandb(**broken)
        monkeypatch.setitem(sys.modules, 'wandb', made)
        return made
    for name in tracking.LIMITS:
        monkeypatch.setenv(name, '0.3')
    monkeypatch.setattr(tracking, 'GRACE', 0)
    return fake


def test_wandb_gets_the_rows_of_metrics(fit, fake):
    wandb = fake()
    fit('--wandb_log=True', '--wandb_project=ours', '--wandb_run_name=7', '--wandb_group=sweep', '--wandb_tags=a, b')
    options = wandb.options[0]
    assert [options[key] for key in ('project', 'name', 'group', 'tags')] == ['ours', '7', 'sweep', ['a', 'b']]
    resolved = asdict(train.load_config(['out/config.py'])[0])
    assert options['config'] == resolved and resolved['vocab_size'] == 17
    assert wandb.rows == rows() and wandb.codes == [0]


def test_a_resumed_run_goes_on_in_the_same_wandb_run(fit, call, fake, monkeypatch):
    wandb = fake()
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        assert call(train.main, *TINY, '--wandb_log=True').code == 130
    assert call(train.main, RESUME, '--device=cpu').code == 0
    fit('--wandb_log=True')                                         # another one
    first, second, other = [options['id'] for options in wandb.options]
    assert first == second != other and wandb.codes == [130, 0, 0]
    assert all(options['resume'] == 'allow' and options['allow_val_change'] for options in wandb.options)
    # wandb's own step only grows; with 'iter' as axis, a step that is taken again is no fault
    assert ('*', {'step_metric': 'iter'}) in wandb.metrics and all('iter' in row for row in wandb.rows)


def test_a_wandb_id_that_is_none_is_replaced(fit, fake):
    wandb = fake()
    fit('--wandb_log=True', '--max_iters=2')
    Path('out/wandb/run-id').write_bytes(b'\xff../x')
    fit(RESUME, '--wandb_log=True')
    assert re.fullmatch('[0-9a-f]{8}', wandb.options[1]['id'])
    assert Path('out/wandb/run-id').read_text() == wandb.options[1]['id']


def test_a_run_that_fails_has_failed_for_wandb(call, fake, monkeypatch):
    wandb = fake()
    monkeypatch.setattr(runtime.run, 'append_json', lambda *_: (_ for _ in ()).throw(OSError(5, 'broken')))
    assert call(train.main, *TINY, '--wandb_log=True').code == 1 and wandb.codes == [1]


def raising(error):
    def fail():
        raise error
    return fail


@pytest.mark.parametrize('broken, words', [
    (dict(init=raising(RuntimeError('No API\nkey.'))), 'wandb does not start (RuntimeError: No API key.)'),
    (dict(init=raising(SystemExit(1))), 'wandb does not start (RuntimeError: SystemExit)'),
    (dict(init=partial(time.sleep, 5)), 'wandb does not start (TimeoutError: no answer in 0.3 seconds)'),
    (dict(log=raising(OSError(28, 'No space left'))), 'wandb does not log (OSError: [Errno 28] No space left)'),
    (dict(finish=raising(ValueError('why'))), 'wandb does not finish (ValueError: why)'),
    (dict(finish=partial(time.sleep, 5)), 'wandb does not finish (TimeoutError: no answer in 0.3 seconds)')])
def test_a_wandb_that_breaks_does_not_stop_training(fit, fake, broken, words):
    fake(**broken)
    out = fit('--wandb_log=True')
    assert out.count('wandb') == 1 and words in out and 'metrics.jsonl has everything' in out and rows()[-1]['final']


@pytest.mark.parametrize('module', [None, SimpleNamespace()], ids=['not installed', 'a folder named wandb'])
def test_a_missing_wandb_does_not_stop_training(fit, monkeypatch, module):
    monkeypatch.setitem(sys.modules, 'wandb', module)
    assert 'wandb does not start (not installed: pip install wandb)' in fit('--wandb_log=True') and rows()[-1]['final']


def test_wandb_is_not_let_near_the_terminal(fit, fake, monkeypatch):
    """It would ask for a key there, and wait."""
    wandb, terminal = fake(), SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr(sys, 'stdin', terminal)
    fit('--wandb_log=True')
    assert wandb.options[0]['terminal'] is False and sys.stdin is terminal


def test_figures_go_to_wandb(fake, capsys):
    wandb = fake()
    run = tracking.Tracking('sweep', print, project='ours', group='sweep')
    run.figures({'loss against rank': Path('a.png')})
    run.finish()
    assert wandb.rows == [{'loss against rank': ('image', 'a.png')}] and wandb.codes == [0]
    assert Path('sweep/wandb/run-id').exists() and not capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# devices, by fakes

@pytest.fixture
def machine(monkeypatch):
    """machine(cuda=number of GPUs, mps, name, bf16): what torch will say is here."""
    def machine(cuda=0, mps=False, name='NVIDIA A100-SXM4-80GB', bf16=True):
        monkeypatch.setattr('torch.cuda.is_available', lambda: cuda > 0)
        monkeypatch.setattr('torch.cuda.device_count', lambda: cuda)
        monkeypatch.setattr('torch.backends.mps.is_available', lambda: mps)
        monkeypatch.setattr('torch.cuda.get_device_name', lambda device=None: name)
        monkeypatch.setattr('torch.cuda.is_bf16_supported', lambda including_emulation=True:
                            bf16 or including_emulation)
    return machine


@pytest.mark.parametrize('here_is, wanted, picked', [
    (dict(cuda=1, mps=True), 'auto', 'cuda'), (dict(mps=True), 'auto', 'mps'), ({}, 'auto', 'cpu'),
    (dict(cuda=2), 'cuda:1', 'cuda:1'), (dict(cuda=2), 'cpu', 'cpu'), (dict(cuda=1), 'cuda', 'cuda'),
    (dict(cuda=2), 'cuda:2', None), (dict(cuda=1), 'mps', None), ({}, 'cuda', None), (dict(cuda=1), 'cuda:x', None)])
def test_pick_device_takes_cuda_then_mps_then_cpu_and_refuses_what_is_not_here(machine, here_is, wanted, picked):
    machine(**here_is)
    if picked:
        assert devices.pick_device(wanted) == picked
    else:
        with pytest.raises(UserError, match=f'device={wanted}: not on this machine'):
            devices.pick_device(wanted)


@pytest.mark.parametrize('bf16, wanted, device, picked', [
    (True, 'auto', 'cuda', 'bfloat16'), (False, 'auto', 'cuda:1', 'float16'), (True, 'auto', 'cpu', 'float32'),
    (True, 'auto', 'mps', 'float32'), (False, 'bfloat16', 'cuda', 'bfloat16'), (True, 'float32', 'cuda', 'float32')])
def test_pick_dtype_is_bfloat16_only_where_the_hardware_has_it(machine, bf16, wanted, device, picked):
    machine(cuda=2, bf16=bf16)
    assert devices.pick_dtype(wanted, device) == picked


@pytest.mark.parametrize('name, tera', [
    ('NVIDIA A100-SXM4-80GB', 312), ('NVIDIA A100-PCIE-40GB', 312), ('NVIDIA H100 80GB HBM3', 989),
    ('NVIDIA H100 PCIe', 756), ('NVIDIA H200', 989), ('NVIDIA GeForce RTX 4090', 165),
    ('NVIDIA GeForce RTX 3090', 71), ('NVIDIA L4', 121), ('NVIDIA L40S', 362), ('NVIDIA A10', 125),
    ('NVIDIA A10G', 70), ('Tesla T4', None), ('NVIDIA RTX A1000', None),
    pytest.param('NVIDIA GeForce RTX 4090 Laptop GPU', None),
    pytest.param('NVIDIA A100-SXM4-80GB MIG 1g.10gb', None)])
def test_peak_flops_are_the_data_sheets_and_unknown_names_have_none(machine, name, tera):
    machine(cuda=1, name=name)
    assert devices.peak_flops('cuda', 'bfloat16') == (tera and tera * 1e12)
    assert devices.peak_flops('cuda', 'float32') is None and devices.peak_flops('cpu', 'bfloat16') is None


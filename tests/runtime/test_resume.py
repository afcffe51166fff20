"""A run that was stopped and resumed is the run that was never stopped, to the last bit."""

import errno
import itertools
import os
import random
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import compare
import export
import runtime.run
import train
from helpers import ROOT, TINY, checkpoint, interrupt, rows, same, untimed
from model import METHODS, SCOPES
from runtime.config import UserError
from runtime.files import write_atomically

pytestmark = pytest.mark.usefixtures('one_thread', 'here')
SVD = [f'--use_svd=True --svd_rank=2 --svd_block=4 --svd_scope={scope} --svd_method={method} --svd_basis_grad={grad}'
       for scope in SCOPES for method in METHODS for grad in (True, False)]
FEATURES = ['', '--dropout=.2', '--gradient_accumulation_steps=3', '--optimizer=muon', '--dtype=bfloat16',
            '--decay_lr=False', '--warmup_iters=5', '--log_interval=3', '--always_save_checkpoint=False', '--bias=True',
            "--layer_ranks={'h.0.mlp.c_fc':3,'h.0.attn.c_attn.c_v':2,'h.0.attn.c_proj':5} --optimizer=muon --bias=True",
            '--grad_clip=0', '--use_mla=True --bias=True --dropout=.2',
            '--use_mla=True --optimizer=muon --use_svd=True --svd_rank=2 --svd_block=4 --svd_scope=causal '
            '--svd_method=randomized',
            *(pytest.param(f'--dropout=.1 --gradient_accumulation_steps=2 --optimizer=muon {svd}',
                           marks=[pytest.mark.slow] * ('standard' in svd)) for svd in SVD)]
STEPS = 13
RUN = [*TINY, f'--max_iters={STEPS}', f'--lr_decay_iters={STEPS}', '--eval_interval=4']
NAME = "it's my run"
HERE, THERE = f'--out_dir={NAME}', ['--init_from=resume', f'--out_dir={NAME}', '--device=cpu']


def assert_same_run(folder, other):
    a, b = checkpoint(folder), checkpoint(other)
    for key in a.keys() - {'config'}:
        assert same(a[key], b[key]), key
    here = ('out_dir', 'init_from', 'max_iters')
    assert {k: v for k, v in a['config'].items() if k not in here} == {
        k: v for k, v in b['config'].items() if k not in here}
    assert untimed(folder) == untimed(other)


@pytest.mark.parametrize('options', FEATURES)
def test_a_resumed_run_is_the_undisturbed_one(fit, call, monkeypatch, options):
    """Stopped twice: by a small max_iters, which evaluates and ends in order, and by Ctrl-C. Checkpoint (parameters,
    optimizer, best loss, random states, data order) and metrics are equal at the end."""
    options = options.split()
    fit(*RUN, *options, '--out_dir=whole')
    first, second = sorted(random.Random(' '.join(options)).sample(range(1, STEPS), 2))
    fit(*RUN, *options, f'--max_iters={first}')
    with monkeypatch.context() as patch:
        interrupt(patch, second - first)
        assert call(train.main, '--init_from=resume', '--device=cpu', f'--max_iters={STEPS}').code == 130
    assert call(train.main, '--init_from=resume', '--device=cpu').code == 0
    assert_same_run('out', 'whole')


@pytest.mark.slow
def test_a_compiled_run_is_resumed_compiled(fit, call):
    """Dropout too: inductor draws other masks than eager torch from the same state."""
    options = [*RUN, '--compile=True', '--dropout=.2', '--max_iters=6']
    fit(*options, '--out_dir=whole')
    fit(*options, '--max_iters=3')
    assert call(train.main, '--init_from=resume', '--device=cpu', '--max_iters=6').code == 0
    assert_same_run('out', 'whole')


def random_options(draw):
    """A point of the whole grid of features, as a dict."""
    steps = draw.randint(5, 40)
    return dict(max_iters=steps, lr_decay_iters=draw.choice([steps, steps // 2 + 1, 2 * steps]),
                warmup_iters=draw.choice([0, 2, 2000]), eval_interval=draw.randint(1, 12),
                log_interval=draw.randint(1, 4), dropout=draw.choice([0, .1, .5]),
                gradient_accumulation_steps=draw.randint(1, 4), optimizer=draw.choice(['adamw', 'muon']),
                grad_clip=draw.choice([0, .1, 1]), n_layer=draw.randint(1, 3), bias=draw.random() < .5,
                use_svd=draw.choice([True, True, False]), svd_rank=draw.randint(1, 8), svd_scope=draw.choice(SCOPES),
                svd_method=draw.choice(METHODS), svd_block=draw.choice([2, 4, 8]), svd_basis_grad=draw.random() < .5,
                dtype=draw.choice(['float32', 'bfloat16']), always_save_checkpoint=draw.random() < .7,
                use_mla=draw.random() < .4, mla_latent_dim=draw.choice([None, 1, 3, 12]))


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(20))
def test_random_stops_anywhere_on_the_grid_of_features(fit, call, monkeypatch, seed):
    """Up to four stops, by max_iters, Ctrl-C or SIGTERM."""
    draw = random.Random(seed)
    options = random_options(draw)
    steps = options['max_iters']
    argv = [*TINY, f'--seed={seed}', *(f'--{key}={value}' for key, value in options.items())]
    fit(*argv, '--out_dir=whole')
    for stop in sorted(draw.sample(range(1, steps), draw.randint(1, 4))):
        saved = [torch.load(p, weights_only=True)['iter_num'] for p in Path().glob('out/*.pt')]
        again = ['--init_from=resume', '--device=cpu'] if saved else argv
        if draw.random() < .5:
            assert call(train.main, *again, f'--max_iters={stop}').code == 0
            continue
        with monkeypatch.context() as patch:
            interrupt(patch, stop - max(saved, default=0), draw.choice([signal.SIGINT, signal.SIGTERM]))
            assert call(train.main, *again, f'--max_iters={steps}').code in (130, 143)
    assert call(train.main, '--init_from=resume', '--device=cpu', f'--max_iters={steps}').code == 0
    assert_same_run('out', 'whole')


@pytest.mark.parametrize('number, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_saves_after_the_step_at_hand(call, monkeypatch, number, code):
    interrupt(monkeypatch, 3, number)
    result = call(train.main, *RUN, '--eval_interval=100', HERE)
    assert result.code == code and checkpoint(NAME)['iter_num'] == 3
    assert f'interrupted after step 3, saved to {NAME}/ckpt.pt' in result.out
    assert result.err.splitlines()[-1] == f'train.py: stopped by {number.name}'
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)     # as it was
    advice = shlex.split(result.out.rpartition('to go on: ')[2])
    assert call(train.main, *advice, '--device=cpu', '--max_iters=4').code == 0


def test_a_second_signal_stops_without_saving(call, monkeypatch):
    def twice(run, replica):
        os.kill(os.getpid(), signal.SIGINT), os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr(train, 'step', twice)
    assert call(train.main, *RUN).code == 130 and not Path('out/ckpt.pt').exists()


def test_a_signal_ends_an_evaluation_which_the_resumed_run_makes_again(fit, call, monkeypatch):
    fit(*RUN, '--out_dir=whole')
    interim = train.Evaluation.interim

    def interrupted(self, poll):
        if next(calls) == 3:                                        # at step 8
            os.kill(os.getpid(), signal.SIGTERM)
        return interim(self, poll)
    calls = itertools.count(1)
    with monkeypatch.context() as patch:
        patch.setattr(train.Evaluation, 'interim', interrupted)
        assert call(train.main, *RUN).code == 143
    assert checkpoint()['iter_num'] == 8 and [row['iter'] for row in rows() if 'val/loss' in row] == [0, 4]
    assert call(train.main, '--init_from=resume', '--device=cpu').code == 0
    assert_same_run('out', 'whole')


def test_a_signal_just_before_an_evaluation_does_not_wait_for_it(call, monkeypatch):
    interrupt(monkeypatch, 4)
    seen, interim = [], train.Evaluation.interim
    monkeypatch.setattr(train.Evaluation, 'interim', lambda self, poll: interim(self, lambda: seen.append(poll())))
    assert call(train.main, *RUN).code == 130                       # --eval_interval=4
    assert len(seen) == 4 and checkpoint()['iter_num'] == 4


def test_nohup_stays_in_force(fit, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        interrupt(monkeypatch, 3, signal.SIGHUP)
        fit(*RUN)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert checkpoint()['iter_num'] == STEPS


def test_before_training_and_after_it_a_signal_ends_at_once(call, monkeypatch):
    for name in ('build_model', 'sample'):
        with monkeypatch.context() as patch:
            patch.setattr(train, name, lambda *args: os.kill(os.getpid(), signal.SIGTERM))
            assert call(train.main, *RUN).code == 143
    assert rows()[-1]['final'] and checkpoint()['iter_num'] == STEPS


def test_the_best_checkpoint_is_kept_when_a_run_is_interrupted(fit, call, monkeypatch):
    """always_save_checkpoint=False: ckpt.pt is the best, so the state goes to last.pt, and resuming takes that."""
    losses = {0: 5., 4: 1., 8: 2., 12: 3., STEPS: 4.}

    def interim(self, poll):
        return {'train/loss': 0., 'val/loss': losses[step_of(self)]}

    def step_of(evaluate):
        return runs[0].iter_num
    runs, init = [], train.Run.__init__

    def remember(self, *args):
        init(self, *args)
        runs[:] = [self]
    monkeypatch.setattr(train.Run, '__init__', remember)
    monkeypatch.setattr(train.Evaluation, 'interim', interim)
    fit(*RUN, '--always_save_checkpoint=False', '--out_dir=whole')
    with monkeypatch.context() as patch:
        interrupt(patch, 6)
        assert call(train.main, *RUN, '--always_save_checkpoint=False').code == 130
    assert checkpoint()['iter_num'] == 4 and torch.load('out/last.pt', weights_only=True)['iter_num'] == 6
    assert call(train.main, '--init_from=resume', '--device=cpu').code == 0
    assert_same_run('out', 'whole')
    assert checkpoint()['best_val_loss'] == 1.


@pytest.mark.parametrize('interrupted', [False, True])
def test_a_longer_run_keeps_the_better_checkpoint_of_the_shorter(fit, call, monkeypatch, interrupted):
    """Step 6, where the shorter run ended and evaluated, is off the grid of the longer one."""
    losses = iter([5., 4., 1., 2., 3., 6.])
    monkeypatch.setattr(train.Evaluation, 'interim', lambda *_: {'train/loss': 0., 'val/loss': next(losses)})
    options = [*RUN, '--always_save_checkpoint=False']
    fit(*options, '--max_iters=6')
    assert (checkpoint()['iter_num'], checkpoint()['best_val_loss']) == (6, 1.)
    if interrupted:
        with monkeypatch.context() as patch:
            interrupt(patch, 1)
            assert call(train.main, '--init_from=resume', '--device=cpu', '--max_iters=9').code == 130
    result = call(train.main, '--init_from=resume', '--device=cpu', '--max_iters=9')
    assert result.code == 0 and 'out/ckpt.pt, the best of a shorter run, stays as out/best-1.0000.pt' in result.out
    assert checkpoint()['iter_num'] == 8 and torch.load('out/best-1.0000.pt', weights_only=True)['iter_num'] == 6


def test_the_better_checkpoint_is_still_there_if_its_successor_cannot_be_saved(fit, call, monkeypatch):
    losses = iter([5., 4., 1., 2.])
    monkeypatch.setattr(train.Evaluation, 'interim', lambda *_: {'train/loss': 0., 'val/loss': next(losses)})
    fit(*RUN, '--always_save_checkpoint=False', '--max_iters=6')

    def full(checkpoint, file):
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(torch, 'save', full)
    result = call(train.main, '--init_from=resume', '--device=cpu', '--max_iters=9')
    assert result.code == 1 and 'the checkpoint of step 6 is kept' in result.err and checkpoint()['iter_num'] == 6


def test_a_last_pt_that_is_older_than_ckpt_pt_does_not_count(fit, call):
    fit(*RUN, '--max_iters=3', '--out_dir=early')
    fit(*RUN, '--max_iters=6')
    os.rename('early/ckpt.pt', 'out/last.pt')
    assert call(train.main, '--init_from=resume', '--device=cpu', '--max_iters=7').code == 0
    assert [row['iter'] for row in rows() if 'loss' in row] == [1, 2, 3, 4, 5, 6, 7]


def test_a_checkpoint_that_is_saved_while_the_run_is_resumed_is_not_thrown_away(fit, refused, monkeypatch):
    """By the run that held the lock until then."""
    fit(*RUN, '--max_iters=3')
    content, lock = Path('out/ckpt.pt').read_bytes(), runtime.run.lock

    def late(folder):
        write_atomically(Path('out/ckpt.pt'), content)
        return lock(folder)
    monkeypatch.setattr(runtime.run, 'lock', late)
    assert 'another run has just saved it' in refused(train.main, '--init_from=resume', '--device=cpu', '--max_iters=6')


def test_a_folder_that_moves_away_while_it_is_locked_is_locked_again(here, monkeypatch):
    """The lock is on the folder of that name, not on the one that had it."""
    (here / 'out').mkdir()
    flock = runtime.run.fcntl.flock

    def moving(descriptor, kind):
        if not (here / 'out.1').exists():
            (here / 'out').rename(here / 'out.1')
        flock(descriptor, kind)
    monkeypatch.setattr(runtime.run.fcntl, 'flock', moving)
    descriptor = runtime.run.lock(Path('out'))
    assert os.path.samestat(os.fstat(descriptor), os.stat('out'))
    with pytest.raises(UserError, match='a run is going on there'):
        runtime.run.lock(Path('out'))
    os.close(descriptor)


def test_a_burst_of_signals_is_one_signal(call, monkeypatch):
    step = train.step

    def burst(*args):
        for _ in range(5):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)
    monkeypatch.setattr(train, 'step', burst)
    assert call(train.main, *RUN).code == 143 and checkpoint()['iter_num'] == 1


def test_another_eval_interval_at_resume_loses_no_evaluation(fit, call):
    fit(*RUN, '--max_iters=8')
    assert call(train.main, '--init_from=resume', '--device=cpu', '--max_iters=13', '--eval_interval=5').code == 0
    assert [row['iter'] for row in rows() if 'train/loss' in row] == [0, 4, 8, 10, 13]


def test_a_stale_last_pt_belongs_to_the_run_that_is_moved_aside(fit):
    fit(*RUN, '--max_iters=4')
    os.remove('out/metrics.jsonl'), os.rename('out/ckpt.pt', 'out/last.pt')
    fit(*RUN, '--max_iters=2', '--eval_interval=100', '--always_save_checkpoint=False')
    assert {p.name for p in Path('out').glob('*.pt')} == {'ckpt.pt'} and Path('out.1/last.pt').exists()


def test_the_file_that_was_read_is_the_one_that_is_named(fit, refused):
    fit(*RUN, '--max_iters=2')
    os.rename('out/ckpt.pt', 'out/last.pt')
    assert 'out/last.pt: its optimizer' in refused(
        train.main, '--init_from=resume', '--device=cpu', '--optimizer=muon', '--max_iters=4')


def test_a_later_checkpoint_replaces_last_pt(fit, call, monkeypatch):
    fit(*RUN, '--max_iters=4')
    os.rename('out/ckpt.pt', 'out/last.pt')
    assert call(train.main, '--init_from=resume', '--device=cpu', f'--max_iters={STEPS}').code == 0
    assert checkpoint()['iter_num'] == STEPS and not Path('out/last.pt').exists()


def test_metrics_of_a_run_that_died_are_cut_back_to_the_checkpoint(fit, call):
    """Rows of steps after the last checkpoint, and the half line that was being written."""
    fit(*RUN, '--out_dir=whole')
    fit(*RUN, '--max_iters=6')
    os.truncate('out/metrics.jsonl', Path('out/metrics.jsonl').stat().st_size - 7)
    with open('out/metrics.jsonl', 'a') as f:
        f.write('\n{"iter": 7, "loss": 1.0}\n[8]\n{"iter": 9, "lo')
    assert call(train.main, '--init_from=resume', '--device=cpu', f'--max_iters={STEPS}').code == 0
    assert_same_run('out', 'whole')


def test_what_a_resumed_run_asks_for_counts_not_the_optimizers_old_options(fit, call, monkeypatch):
    fit(*RUN, '--max_iters=2')
    seen, build = [], train.build_optimizer
    monkeypatch.setattr(train, 'build_optimizer', lambda *args: seen.append(build(*args)) or seen[0])
    options = '--init_from=resume --device=cpu --max_iters=3 --weight_decay=.5 --beta2=.5'.split()
    assert call(train.main, *options).code == 0
    assert [(g['weight_decay'], g['betas']) for g in seen[0].param_groups] == [(.5, (.9, .5)), (0., (.9, .5))]


@pytest.mark.parametrize('main, argv, option', [
    (train.main, [*THERE, '--optimizer=adamw'], ''), (train.main, [*THERE, '--adaptive_svd=True'], ''),
    (train.main, [*RUN, '--out_dir=file/'], '--out_dir='), (train.main, [*THERE[:1], '--out_dir=none'], ''),
    (export.main, [HERE, '--save_dir=file'], '--save_dir='), (export.main, [HERE, '--save_dir=.'], '--save_dir='),
    (export.main, [HERE, f'--save_dir={NAME}'], '--save_dir='), (export.main, ['--out_dir=none'], ''),
    (compare.main, [*RUN, f'--sweep={NAME}/', '--dry_run'], '--sweep=')])
def test_advice_works_when_it_is_pasted(fit, call, refused, main, argv, option):
    fit(*RUN, HERE, '--optimizer=muon', '--max_iters=2')
    Path('file').touch(), Path(f'{NAME}-2/file').mkdir(parents=True)
    advice = re.search(r'nearest: (.*?)\)( \[.*])?$', refused(main, *argv))[1]
    for words in advice.split(', or from its weights: '):
        result = call(main, *argv, *shlex.split(option + words))
        assert result.code == 0, (words, result.err)


def test_another_number_of_processes_is_refused(fit, refused):
    fit(*RUN, '--max_iters=2')
    saved = checkpoint()
    torch.save(saved | {'random': saved['random'] * 2}, 'out/ckpt.pt')
    line = refused(train.main, '--init_from=resume', '--device=cpu', '--max_iters=3')
    assert 'its run has 2 processes, and here are 1' in line and 'torchrun --nproc_per_node=2' in line


def test_leftovers_of_killed_processes_go_and_those_of_living_ones_stay(fit):
    fit(*RUN, '--max_iters=2')
    dead = subprocess.Popen([sys.executable, '-c', ''])
    dead.wait()
    for name in (f'ckpt.pt.{dead.pid}.tmp', f'ckpt.pt.{os.getppid()}.tmp', 'mine.tmp'):
        (Path('out') / name).touch()
    assert train.main(['--init_from=resume', '--device=cpu', '--max_iters=3']) == 0
    assert {p.name for p in Path('out').glob('*.tmp')} == {f'ckpt.pt.{os.getppid()}.tmp', 'mine.tmp'}


def test_ctrl_c_in_a_real_process(endless):
    """As a user would: the whole command, the signal from outside."""
    process = endless([sys.executable, str(ROOT / 'train.py')])
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and 'saved to out/ckpt.pt' in out and 'Traceback' not in err
    assert checkpoint()['iter_num'] == rows()[-1]['iter'] > 5


def test_two_runs_do_not_share_a_folder_and_a_run_outlives_its_readers(endless, refused):
    """`2>&1 | tee log`, and Ctrl-C ends tee first: nobody reads what the run says, and it saves all the same."""
    process = endless([sys.executable, str(ROOT / 'train.py')])
    assert "out_dir='out': a run is going on there" in refused(train.main, *RUN)
    process.stdout.close(), process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert checkpoint()['iter_num'] == rows()[-1]['iter'] > 5 and not Path('out.1').exists()

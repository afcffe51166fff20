"""A run that was stopped and resumed is bit-identical to the run that was never stopped."""

import os
import random
import re
import shlex
import signal
import sys
from pathlib import Path

import pytest
import torch

import compare
import export
import train
from helpers import (ROOT, TINY, assert_same_metrics, assert_same_run, before_forward, change,
                     checkpoint, interrupt, rows, slow)
from model import METHODS, SCOPES

pytestmark = pytest.mark.usefixtures('one_thread', 'here')
STEPS = 13
RUN = [f'--max_iters={STEPS}', f'--lr_decay_iters={STEPS}', '--eval_interval=4']
RESUME = ['--init_from=resume', '--device=cpu']
SVD = '--use_svd=True --svd_rank=2 --svd_block=4 --svd_scope='


def random_features(seed):
    """Return options drawn from the grid of all features."""
    values = dict(warmup_iters=(0, 2, 2000), eval_interval=(1, 3, 5, 12), log_interval=(1, 2, 4),
                  dropout=(0, .1, .5), gradient_accumulation_steps=(1, 2, 4),
                  optimizer=('adamw', 'muon'), grad_clip=(0, .1, 1), n_layer=(1, 2, 3),
                  bias=(True, False), use_svd=(True, True, False), svd_rank=(1, 2, 5, 8),
                  svd_scope=SCOPES, svd_method=METHODS, svd_block=(2, 4, 8),
                  svd_basis_grad=(True, False), dtype=('float32', 'bfloat16'),
                  always_save_checkpoint=(True, True, False), use_mla=(True, False),
                  mla_latent_dim=(None, 1, 3, 12), lr_decay_iters=(5, 20, 40))
    draw = random.Random(seed)
    return ' '.join(f'--{key}={draw.choice(choices)}' for key, choices in values.items())


FEATURES = [
    '', '--optimizer=muon --dtype=bfloat16 --warmup_iters=5 --bias=True '
    '--muon_per_head=True --weight_init=mimetic --beta1=0 --n_kv_head=1',
    '--optimizer=muon --bias=True '
    "--layer_ranks={'h.0.mlp.c_fc':3,'h.0.attn.c_attn.c_v':2,'h.0.attn.c_proj':5}",
    f'--dropout=.2 --decay_lr=False --optimizer=muon --use_mla=True {SVD}causal '
    '--svd_method=randomized --muon_per_head=True --weight_init=mimetic',
    '--always_save_checkpoint=False --log_interval=3 --use_mla=True --bias=True '
    f'{SVD}causal --svd_method=standard',
    f'--grad_clip=0 --dropout=.1 --gradient_accumulation_steps=3 {SVD}weight --svd_method=gram'
]
# seed 3 is left out: its extra evaluation at the stop has the best loss, so ckpt.pt keeps that step
# compile=True: inductor draws other dropout masks than eager PyTorch
SLOW = [
    f'{SVD}causal --svd_method=randomized --svd_targets=q,k,v --svd_rank_k=1 --n_kv_head=1',
    *map(random_features, (0, 1, 2, 4)), '--compile=True --dropout=.2',
    *(f'--dropout=.1 --optimizer=muon {SVD}{scope} --svd_method={method} --svd_basis_grad={grad}'
      for scope, method, grad in (('sequence', 'gram', False), ('sequence', 'standard', True),
                                  ('sequence', 'randomized', False), ('causal', 'gram', True),
                                  ('weight', 'standard', False), ('weight', 'randomized', True)))
]


def resume(call, *options, code=0):
    """Resume out/, check the exit code, and return what is printed."""
    result = call(train.main, *RESUME, *options)
    assert result.code == code, result.err
    return result.out


# --------------------------------------------------------------------------------------------------
# stopping and resuming

@pytest.mark.parametrize('options', [*FEATURES[:3], *map(slow, FEATURES[3:] + SLOW)])
def test_a_resumed_run_is_the_undisturbed_one(fit, call, monkeypatch, options):
    """A run stopped twice and resumed ends with the checkpoint and the metrics of the uninterrupted
    run. The first stop is a small max_iters, which ends the run with an evaluation. The second is
    Ctrl-C."""
    options = [*RUN, *options.split()]
    fit(*options, '--out_dir=whole')
    first, second = sorted(random.Random(str(options)).sample(range(1, STEPS), 2))
    fit(*options, f'--max_iters={first}')
    with monkeypatch.context() as patch:
        interrupt(patch, second - first)
        resume(call, f'--max_iters={STEPS}', code=130)
    resume(call)
    assert_same_run('out', 'whole')


def test_what_a_killed_run_left_behind_goes(trained, call):
    """A resume removes what a killed run left behind: metrics of steps after the last checkpoint, a
    half written line and the run's temporary files. Other files stay."""
    trained(*RUN, folder='whole'), trained(*RUN, '--max_iters=6')
    os.truncate('out/metrics.jsonl', Path('out/metrics.jsonl').stat().st_size - 7)
    with open('out/metrics.jsonl', 'a') as f:
        f.write('\n{"iter": 7, "loss": 1.0}\n[8]\n{"iter": 9, "lo')
    for name in ('mine.tmp', 'ckpt.pt.12345.tmp'):
        Path('out', name).touch()
    Path('out/.export.12345.tmp').mkdir()                       # an export may be at work in it
    resume(call, f'--max_iters={STEPS}')
    assert_same_run('out', 'whole')
    assert {p.name for p in Path('out').glob('*.tmp')} == {'mine.tmp', '.export.12345.tmp'}


def test_what_a_resumed_run_asks_for_counts_not_what_the_checkpoint_says(trained, call):
    """Options on the command line replace those of the checkpoint. Earlier evaluations stay if
    eval_interval changes."""
    trained(*RUN, '--max_iters=8')
    resume(call, f'--max_iters={STEPS}', '--eval_interval=5', '--weight_decay=.5', '--beta2=.5')
    assert [row['iter'] for row in rows() if 'train/loss' in row] == [0, 4, 8, 10, 13]
    groups = checkpoint()['optimizer']['param_groups']
    assert [(g['weight_decay'], g['betas']) for g in groups] == [(.5, (.9, .5)), (0., (.9, .5))]


# --------------------------------------------------------------------------------------------------
# signals


@pytest.mark.parametrize('number, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143),
                                          (signal.SIGHUP, 129)])
def test_a_signal_saves_after_the_step_at_hand(call, monkeypatch, number, code):
    """SIGINT, SIGTERM and SIGHUP end the run after the current step, with a checkpoint and a curve.
    The printed command resumes it."""
    interrupt(monkeypatch, 3, number)
    before = signal.getsignal(number)                       # a shell's background job ignores some
    result = call(train.main, *TINY, '--eval_interval=100', "--out_dir=it's mine")
    assert result.code == code and checkpoint("it's mine")['iter_num'] == 3
    assert number.name in result.err.splitlines()[-1] and Path("it's mine/curves.png").exists()
    assert signal.getsignal(number) == before
    advice = shlex.split(result.out.rpartition('to continue: python train.py ')[2])
    assert call(train.main, *advice, '--device=cpu', '--max_iters=3').code == 0


@pytest.mark.parametrize('number, code, saved', [(signal.SIGTERM, 143, True),
                                                 (signal.SIGINT, 130, False)])
def test_a_second_sigterm_waits_and_a_second_ctrl_c_does_not(call, monkeypatch, number, code,
                                                             saved):
    """A second SIGTERM waits for the checkpoint, and a second Ctrl-C ends the run at once."""
    interrupt(monkeypatch, 1, number)
    interrupt(monkeypatch, 1, number)
    assert call(train.main, *TINY).code == code
    assert Path('out/ckpt.pt').exists() == saved


def test_a_signal_ends_an_evaluation_which_the_resumed_run_makes_again(trained, call, monkeypatch):
    """A signal ends an evaluation at once, and the resumed run repeats it. A signal in the step
    before an evaluation ends the run without it."""
    trained(*RUN, folder='whole')
    modes = []

    def stop(model):
        modes.append(model.training)
        if not model.training and modes.count(True) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
    with monkeypatch.context() as patch, before_forward(stop):
        interrupt(patch, 4)
        assert call(train.main, *TINY, *RUN).code == 130            # --eval_interval=4
        assert modes[-4:] == [True] * 4 and checkpoint()['iter_num'] == 4
        assert call(train.main, *RESUME).code == 143
    assert checkpoint()['iter_num'] == 8 and [row['iter'] for row in rows() if 'val/loss' in row
                                              ] == [0, 4]
    resume(call)
    assert_same_run('out', 'whole')


def test_nohup_stays_in_force(fit, monkeypatch):
    """A run that was started with nohup ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupt(monkeypatch, 3, signal.SIGHUP)
    fit()
    signal.signal(signal.SIGHUP, before)
    assert checkpoint()['iter_num'] == 4


def test_before_training_and_after_it_a_signal_ends_at_once(call):
    """A signal ends the run at once while the data set is prepared and while the closing sample is
    drawn."""
    Path('data/slow').mkdir()
    Path('data/slow/prepare.py').write_text(
        f'import os, time\nos.kill({os.getpid()}, {signal.SIGTERM:d})\ntime.sleep(.2)')
    assert call(train.main, *TINY, '--dataset=slow').code == 143 and not Path('out').exists()

    def stop(model):
        if Path('out/metrics.jsonl').exists() and 'final' in rows()[-1]:
            os.kill(os.getpid(), signal.SIGTERM)
    with before_forward(stop):
        assert call(train.main, *TINY).code == 143
    assert rows()[-1]['final'] and checkpoint()['iter_num'] == 4


@pytest.mark.slow
def test_two_runs_do_not_share_a_folder_and_a_run_outlives_its_readers(
        endless, refused, monkeypatch):
    """A second run into the same folder ends in a one-line error. A run saves on Ctrl-C even if
    nothing reads its output any more, as with `2>&1 | tee log`, where Ctrl-C ends tee first."""
    monkeypatch.delenv('PYTHONUNBUFFERED', raising=False)
    process = endless([sys.executable, str(ROOT / 'train.py')])
    assert process.stdout.readline().startswith('model: ')          # it is not buffered
    assert 'out_dir=' in refused(train.main, *TINY)
    process.stdout.close(), process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert checkpoint()['iter_num'] == rows()[-1]['iter'] > 5 and not Path('out.1').exists()


# --------------------------------------------------------------------------------------------------
# ckpt.pt and last.pt

def test_the_best_checkpoint_is_kept_when_a_run_is_interrupted(trained, call, monkeypatch):
    """With always_save_checkpoint=False an interrupted run keeps the best model in ckpt.pt and
    saves its state to last.pt, from which it resumes."""
    trained(*RUN, folder='whole'), trained(*RUN, '--max_iters=6')
    change(best_val_loss=0.)
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        resume(call, '--always_save_checkpoint=False', f'--max_iters={STEPS}', code=130)
    assert torch.load('out/last.pt', weights_only=True)['iter_num'] == 9
    resume(call)
    assert checkpoint()['iter_num'] == 6
    assert_same_metrics('out', 'whole')


def test_a_run_that_never_improves_has_a_ckpt_pt_all_the_same(trained):
    """A run whose loss never improves has the checkpoint of step 0."""
    trained('--always_save_checkpoint=False', '--learning_rate=1', '--decay_lr=False')
    assert checkpoint()['best_val_loss'] == rows()[0]['val/loss']    # at step 0


def test_a_resume_goes_on_from_the_later_of_ckpt_pt_and_last_pt(trained, call, refused):
    trained(*RUN, '--max_iters=3', folder='early'), trained(*RUN, '--max_iters=6')
    os.rename('early/ckpt.pt', 'out/last.pt')
    resume(call, '--max_iters=7')
    assert [row['iter'] for row in rows() if 'loss' in row] == [1, 2, 3, 4, 5, 6, 7]
    os.rename('out/ckpt.pt', 'out/last.pt')
    assert 'out/last.pt: its optimizer' in refused(train.main, *RESUME, '--optimizer=muon',
                                                   '--max_iters=9')
    resume(call, '--max_iters=8')
    assert checkpoint()['iter_num'] == 8 and not Path('out/last.pt').exists()


def test_a_stale_last_pt_belongs_to_the_run_that_is_moved_aside(trained, fit):
    """A new run moves the old run aside together with its last.pt."""
    os.rename(trained() / 'ckpt.pt', 'out/last.pt')
    os.remove('out/metrics.jsonl')
    fit('--eval_interval=100', '--always_save_checkpoint=False')
    assert {p.name
            for p in Path('out').glob('*.pt')} == {'ckpt.pt'} and Path('out.1/last.pt').exists()


# --------------------------------------------------------------------------------------------------
# corrections in error messages

HERE = "--out_dir=it's my run"


@pytest.mark.parametrize(
    'main, argv, option',
    [(train.main, [*RESUME, HERE, '--optimizer=adamw'], ''),
     (train.main, [*RESUME, HERE, '--adaptive_svd=True'], ''),
     (train.main, [*TINY, '--out_dir=file/'], '--out_dir='),
     (train.main, [*TINY, '--out_dir=mine'], '--out_dir='),
     (train.main, [*RESUME, '--out_dir=none'], ''),
     (export.main, [HERE, '--save_dir=file'], '--save_dir='),
     (export.main, [HERE, '--save_dir=.'], '--save_dir='),
     (export.main, [HERE, f'--save_dir={HERE[10:]}'], '--save_dir='),
     (export.main, ['--out_dir=none'], ''),
     (compare.main, [*TINY, f'--sweep={HERE[10:]}/', '--dry_run'], '--sweep=')])
def test_advice_works_when_it_is_pasted(trained, call, refused, main, argv, option):
    """The correction in an error message works when it is pasted into the command, even for folder
    names with quotes and spaces."""
    folder = trained(*RUN, '--optimizer=muon', '--max_iters=2', folder=HERE[10:])
    Path('file').touch(), Path(f'{folder}-2/file').mkdir(parents=True)
    Path('mine').mkdir(), Path('mine/config.py').touch()
    advice = re.search(r'nearest: (.*?)\)( \[.*])?$', refused(main, *argv))[1]
    for words in advice.split(', or from its weights: '):
        result = call(main, *argv, *shlex.split(option + words))
        assert result.code == 0, (words, result.err)

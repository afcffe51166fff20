"""Several processes train the same run as one process, up to rounding. If a process dies, the
others end with a message."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from helpers import ROOT, TINY, checkpoint, equal, rows
from runtime import checkpoint as ckpt

pytestmark = pytest.mark.usefixtures('one_thread', 'here')
RUN = [
    *TINY, '--gradient_accumulation_steps=4', '--max_iters=6', '--lr_decay_iters=6',
    '--eval_interval=3'
]
SVD = '--use_svd=True --svd_rank=2 --svd_block=4'
TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
            str(ROOT / 'train.py')]


def torchrun(*argv):
    done = subprocess.run([*TORCHRUN, *argv], capture_output=True, text=True, timeout=200,
                          env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.mark.slow
@pytest.mark.parametrize('options', [
    '--optimizer=muon', f'{SVD} --svd_scope=sequence --svd_method=standard',
    f'--use_mla=True --mla_latent_dim=5 --bias=True {SVD} --svd_scope=weight --svd_method=gram',
    f'--optimizer=muon {SVD} --svd_scope=causal --svd_method=randomized'])
def test_two_processes_train_what_one_does(fit, options):
    """Two processes end with the parameters of one process with the same options and seed, up to
    rounding. Gradients are summed in another order. The tolerance of 2e-5 is small, because
    parameters move by about 0.01 per step."""
    torchrun(*RUN, *options.split(), '--out_dir=two')
    fit(*RUN, *options.split(), '--out_dir=one')
    one, two = checkpoint('one'), checkpoint('two')
    assert ('svd_basis' in one) == ('randomized' in options)
    # the basis follows V of both processes
    for key, atol in (('model', 2e-5), ('svd_basis', 1e-3)):
        torch.testing.assert_close(one.get(key), two.get(key), rtol=0, atol=atol)
    for a, b in zip(rows('one'), rows('two'), strict=True):
        shared = a.keys() & {'iter', 'loss', 'train/loss', 'val/loss'}
        assert {k: a[k] for k in shared} == pytest.approx({k: b[k] for k in shared}, abs=1e-5)
    for state in two['random']:  # every process has the same data order
        assert torch.equal(state['batches'], one['random'][0]['batches'])
    assert not torch.equal(*(state['torch'] for state in two['random']))    # different dropout


@pytest.mark.slow
def test_torchrun_stops_and_resumes_to_the_same_bits():
    """Under torchrun a stopped and resumed run ends with bit-identical weights, with dropout,
    because each process has its own random state."""
    options = [*RUN, '--dropout=.2', '--eval_interval=100']
    for argv in ([*options, '--out_dir=whole'], [*options, '--max_iters=3'],
                 ['--init_from=resume', '--max_iters=6']):
        assert torchrun(*argv).stdout.count('sample:') == 1
    assert equal(checkpoint('whole')['model'], checkpoint()['model'])


@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1])
def test_a_killed_process_ends_the_job_with_a_message_and_a_good_checkpoint(endless, victim):
    """If one process is killed, the other ends within a minute with a message, and the last
    checkpoint can be loaded."""
    job = endless(TORCHRUN, '--gradient_accumulation_steps=2', '--eval_interval=2',
                  '--eval_iters=1')
    children = Path(f'/proc/{job.pid}/task/{job.pid}/children').read_text().split()     # by rank
    os.kill(int(children[victim]), signal.SIGKILL)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 1 and f'train.py: process {1 - victim}: lost contact' in err, err
    assert ckpt.load('out/ckpt.pt')['iter_num'] >= 2


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGKILL])
def test_processes_save_once_and_end_when_torchrun_is_stopped(endless, number):
    """When torchrun is stopped, all processes stop after the same step and the checkpoint is saved
    once. torchrun passes Ctrl-C on to every process. After SIGKILL it cannot, so the processes
    notice that it is gone."""
    job = endless(TORCHRUN, '--gradient_accumulation_steps=2')
    job.send_signal(number)
    out, err = job.communicate(timeout=60)  # until all processes have closed the pipe
    assert out.count('saved to out/ckpt.pt') == 1 and 'process 1: stopped by SIG' in err
    assert ckpt.load('out/ckpt.pt')['iter_num'] == rows()[-1]['iter']


@pytest.mark.parametrize(
    'name, value, option, nearest',
    [('MASTER_ADDR', '', [], 'RANK'), ('MASTER_PORT', '', [], 'RANK'),
     ('LOCAL_RANK', '', [], 'RANK'),
     ('gradient_accumulation_steps', '1', ['--gradient_accumulation_steps=1'], '2'),
     ('gradient_accumulation_steps', '3', ['--gradient_accumulation_steps=3'], '4')])
def test_wrong_settings_of_several_processes_are_refused(refused, monkeypatch, name, value, option,
                                                         nearest):
    """Incomplete variables of torchrun, and micro-batches that the processes cannot share equally,
    end in a one-line error."""
    settings = dict(RANK='0', LOCAL_RANK='0', WORLD_SIZE='2', MASTER_ADDR='localhost',
                    MASTER_PORT='1')
    for key in settings:
        monkeypatch.setenv(key, value if key == name else settings[key])
    line = refused(train.main, *TINY, *option)
    assert f'{name}={value}: ' in line and re.search(rf'nearest: (unset )?{nearest}\)', line)

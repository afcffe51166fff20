"""Several processes: the same run as one, to rounding, and one whose process dies ends with a message."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from helpers import ROOT, TINY, checkpoint, rows
from model import METHODS, SCOPES
from runtime import checkpoint as ckpt
from runtime.files import write_atomically

pytestmark = pytest.mark.usefixtures('one_thread', 'here')
RUN = [*TINY, '--gradient_accumulation_steps=4', '--max_iters=6', '--lr_decay_iters=6', '--eval_interval=3']
LATENTS = ['--use_mla=True', '--mla_latent_dim=5', '--bias=True', '--use_svd=True', '--svd_rank=2',
           '--svd_scope=causal', '--svd_block=4']
VARIANTS = {'baseline': [], 'muon': ['--optimizer=muon'], 'latents': LATENTS} | {
    f'{scope}-{method}': ['--use_svd=True', '--svd_rank=2', f'--svd_scope={scope}', f'--svd_method={method}',
                          '--svd_block=4']
    for scope in SCOPES for method in METHODS if (scope, method) != ('weight', 'randomized')}   # only a basis is shared


TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', str(ROOT / 'train.py')]


@pytest.mark.slow
def test_two_processes_train_what_one_does(fit):
    """The same options, the same seed, nothing arranged: baseline, Muon, latents and every SVD method and scope.
    Parameters move by about the learning rate, 0.01, a step; the sums of gradients are rounded in another order."""
    env = os.environ | dict(WORLD_SIZE='2', MASTER_ADDR='localhost', OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT))
    jobs = [subprocess.Popen([sys.executable, __file__], env=env | dict(RANK=rank, LOCAL_RANK=rank),
                             stdout=subprocess.DEVNULL, stderr=open(f'err-{rank}', 'w')) for rank in '01']
    try:
        for rank, job in enumerate(jobs):
            assert job.wait(150) == 0, Path(f'err-{rank}').read_text()[-2000:]
            assert 'Warning' not in Path(f'err-{rank}').read_text()
    finally:
        for job in jobs:
            job.kill()
    for name, options in VARIANTS.items():
        fit(*RUN, *options, f'--out_dir=one-{name}')
        one, two = checkpoint(f'one-{name}'), checkpoint(f'two-{name}')
        for key, value in one['model'].items():
            torch.testing.assert_close(value, two['model'][key], rtol=0, atol=2e-5, msg=lambda m: f'{name} {key}: {m}')
        assert ('svd_basis' in one) == ('svd_basis' in two) == ('randomized' in name)
        if 'svd_basis' in one:                                      # of the V of both processes
            torch.testing.assert_close(one['svd_basis'], two['svd_basis'], rtol=0, atol=1e-3)
        assert [row['iter'] for row in rows(f'one-{name}')] == [row['iter'] for row in rows(f'two-{name}')]
        for a, b in zip(rows(f'one-{name}'), rows(f'two-{name}')):
            assert all(a[k] == pytest.approx(b[k], abs=1e-5) for k in a.keys() & {'loss', 'train/loss', 'val/loss'})
        a, b = (saved['random'] for saved in (one, two))
        assert len(b) == 2 and torch.equal(a[0]['batches'], b[0]['batches'])            # one order of data,
        assert torch.equal(b[0]['batches'], b[1]['batches'])                            # the same on each,
        assert not torch.equal(b[0]['torch'], b[1]['torch'])                            # and different dropout


def every_variant():
    """What each of the two processes runs: one group after the other. Process 0 finds a port for each."""
    for name, options in VARIANTS.items():
        port = Path(f'port-{name}')
        if os.environ['RANK'] == '0':
            with socket.socket() as s:
                s.bind(('localhost', 0))
                write_atomically(port, str(s.getsockname()[1]).encode())
        while not port.exists():
            time.sleep(.01)
        os.environ['MASTER_PORT'] = port.read_text()
        assert train.main([*RUN, *options, f'--out_dir=two-{name}']) == 0


@pytest.mark.slow
def test_torchrun_stops_and_resumes_to_the_same_bits(refused):
    """Dropout included: each process has its own random state. One process alone may not go on."""
    options = [*RUN, '--dropout=.2', '--eval_interval=100']
    for argv in ([*options, '--out_dir=whole'], [*options, '--max_iters=3'], ['--init_from=resume', '--max_iters=6']):
        done = subprocess.run([*TORCHRUN, *argv], capture_output=True, text=True, timeout=100,
                              env=os.environ | {'OMP_NUM_THREADS': '1'})
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count('sample:') == 1 and 'backend=nccl needs CUDA: using gloo' in done.stdout
    whole, resumed = checkpoint('whole'), checkpoint()
    assert all(torch.equal(whole['model'][k], resumed['model'][k]) for k in whole['model'])
    assert {p.name for p in Path('whole').iterdir()} == {'ckpt.pt', 'config.py', 'environment.json', 'metrics.jsonl'}
    done = subprocess.run([*TORCHRUN, *options, '--dataset=nowhere'], capture_output=True, text=True, timeout=100)
    assert done.stderr.count(': dataset=nowhere: no such data set') == 2 and 'no contact' not in done.stderr
    assert 'its run has 2 processes, and here are 1' in refused(train.main, '--init_from=resume', '--max_iters=9')


@pytest.mark.parametrize('victim', [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_process_ends_the_job_with_a_message_and_a_good_checkpoint(endless, victim):
    job = endless(TORCHRUN, '--gradient_accumulation_steps=2', '--eval_interval=5', '--eval_iters=1')
    until = time.monotonic() + 60
    while not Path('out/ckpt.pt').exists():
        assert time.monotonic() < until
        time.sleep(.01)
    os.kill(workers(job)[victim], signal.SIGKILL)
    _, err = job.communicate(timeout=60)                            # within a minute
    assert job.returncode == 1
    assert f'train.py: process {1 - victim}: training stopped: no contact with another process' in err, err
    assert ckpt.load('out/ckpt.pt')['iter_num'] >= 5


@pytest.mark.slow
def test_processes_without_torchrun_save_and_end(endless):
    """SIGKILL leaves it no time to end them: they notice that it is gone."""
    job = endless(TORCHRUN, '--gradient_accumulation_steps=2')
    alive = workers(job)
    job.kill(), job.wait()
    until = time.monotonic() + 60
    while any(Path(f'/proc/{pid}').exists() for pid in alive.values()):
        assert time.monotonic() < until
        time.sleep(.05)
    assert ckpt.load('out/ckpt.pt')['iter_num'] == rows()[-1]['iter']


def workers(job):
    """Rank -> process number."""
    numbers = Path(f'/proc/{job.pid}/task/{job.pid}/children').read_text().split()
    environments = {int(pid): Path(f'/proc/{pid}/environ').read_bytes().decode().split('\0') for pid in numbers}
    return {int(line[5:]): pid for pid, lines in environments.items() for line in lines if line.startswith('RANK=')}


@pytest.mark.slow
def test_ctrl_c_under_torchrun_saves_once(endless):
    """torchrun passes a signal on to every process; all stop after the same step."""
    job = endless(TORCHRUN, '--gradient_accumulation_steps=2')
    job.send_signal(signal.SIGINT)
    out, err = job.communicate(timeout=60)
    assert out.count('saved to out/ckpt.pt') == 1 and checkpoint()['iter_num'] == rows()[-1]['iter']
    assert 'train.py: process 1: stopped by SIGINT' in err


@pytest.mark.parametrize('name', ['MASTER_ADDR', 'MASTER_PORT', 'LOCAL_RANK'])
def test_several_processes_without_what_torchrun_sets_are_refused(refused, monkeypatch, name):
    for key, value in dict(RANK='0', LOCAL_RANK='0', WORLD_SIZE='2', MASTER_ADDR='localhost', MASTER_PORT='1').items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv(name)
    assert f'{name}=: ' in refused(train.main, *TINY)


@pytest.mark.parametrize('steps, nearest', [(1, 2), (3, 4)])
def test_micro_batches_that_do_not_divide_among_the_processes_are_refused(refused, monkeypatch, steps, nearest):
    for key, value in dict(RANK='0', LOCAL_RANK='0', WORLD_SIZE='2', MASTER_ADDR='localhost', MASTER_PORT='1').items():
        monkeypatch.setenv(key, value)
    assert f'not a multiple of the 2 processes (nearest: {nearest})' in refused(
        train.main, *TINY, f'--gradient_accumulation_steps={steps}')


if __name__ == '__main__':
    every_variant()

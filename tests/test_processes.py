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
from conftest import ROOT, TINY, checkpoint, rows
from model import METHODS, SCOPES

pytestmark = pytest.mark.usefixtures('one_thread', 'here')
RUN = [*TINY, '--gradient_accumulation_steps=4', '--max_iters=6', '--lr_decay_iters=6', '--eval_interval=3']
VARIANTS = {'baseline': [], 'muon': ['--optimizer=muon']} | {
    f'{scope}-{method}': ['--use_svd=True', '--svd_rank=2', f'--svd_scope={scope}', f'--svd_method={method}',
                          '--svd_block=4'] for scope in SCOPES for method in METHODS}


def start(rank, *ports):
    """This file as process `rank` of 2."""
    env = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR='localhost', OMP_NUM_THREADS=1, PYTHONPATH=ROOT)
    return subprocess.Popen([sys.executable, __file__, *ports], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=os.environ | {k: str(v) for k, v in env.items()})


def free_port():
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]


def torchrun(*argv):
    return [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', str(ROOT / 'train.py'),
            *argv]


def test_two_processes_train_what_one_does(fit):
    """The same options, the same seed, nothing arranged: baseline, Muon and every SVD method and scope. Parameters move
    by about the learning rate, 0.01, a step; the sums of gradients are rounded in another order."""
    ports = [str(free_port()) for _ in VARIANTS]
    jobs = [start(rank, *ports) for rank in (0, 1)]
    for job in jobs:
        assert job.wait(120) == 0, job.stderr.read()[-2000:]
    for name, options in VARIANTS.items():
        fit(*RUN, *options, f'--out_dir=one-{name}')
        one, two = checkpoint(f'one-{name}'), checkpoint(f'two-{name}')
        for key, value in one['model'].items():
            torch.testing.assert_close(value, two['model'][key], rtol=0, atol=2e-5, msg=lambda m: f'{name} {key}: {m}')
        assert [row['iter'] for row in rows(f'one-{name}')] == [row['iter'] for row in rows(f'two-{name}')]
        for a, b in zip(rows(f'one-{name}'), rows(f'two-{name}')):
            assert all(a[k] == pytest.approx(b[k], abs=1e-5) for k in a.keys() & {'loss', 'train/loss', 'val/loss'})
        a, b = (saved['random'] for saved in (one, two))
        assert len(b) == 2 and torch.equal(a[0]['batches'], b[0]['batches'])            # one order of data,
        assert torch.equal(b[0]['batches'], b[1]['batches'])                            # the same on each,
        assert not torch.equal(b[0]['torch'], b[1]['torch'])                            # and different dropout


def two_processes_of_every_variant(ports):
    """What each of the two processes runs: one group after the other."""
    for port, (name, options) in zip(ports, VARIANTS.items()):
        os.environ['MASTER_PORT'] = port
        assert train.main([*RUN, *options, f'--out_dir=two-{name}']) == 0


@pytest.mark.slow
def test_torchrun_stops_and_resumes_to_the_same_bits(refused):
    """Dropout included: each process has its own random state. One process alone may not go on."""
    options = [*RUN, '--dropout=.2', '--eval_interval=100']
    for argv in ([*options, '--out_dir=whole'], [*options, '--max_iters=3'], ['--init_from=resume', '--max_iters=6']):
        done = subprocess.run(torchrun(*argv), capture_output=True, text=True, timeout=100,
                              env=os.environ | {'OMP_NUM_THREADS': '1'})
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count('sample:') == 1 and 'backend=nccl needs CUDA: using gloo' in done.stdout
    whole, resumed = checkpoint('whole'), checkpoint()
    assert all(torch.equal(whole['model'][k], resumed['model'][k]) for k in whole['model'])
    assert {p.name for p in Path('whole').iterdir()} == {'ckpt.pt', 'config.py', 'environment.json', 'metrics.jsonl'}
    assert 'its run has 2 processes, and here are 1' in refused(train.main, '--init_from=resume', '--max_iters=9')


@pytest.mark.parametrize('victim', [0, 1])
def test_a_killed_process_ends_the_job_with_a_message_and_a_good_checkpoint(victim):
    job = subprocess.Popen(torchrun(*RUN, '--max_iters=1000000', '--eval_interval=5', '--eval_iters=1'),
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           env=os.environ | {'OMP_NUM_THREADS': '1'})
    while not Path('out/ckpt.pt').exists():
        assert job.poll() is None, job.stderr.read()[-2000:]
        time.sleep(.1)
    workers = {rank_of(pid): pid for pid in children(job.pid)}
    os.kill(workers[victim], signal.SIGKILL)
    _, err = job.communicate(timeout=60)                            # within a minute
    assert job.returncode not in (0, None)
    assert f'train.py: process {1 - victim}: training stopped: no contact with another process' in err
    assert checkpoint()['iter_num'] % 5 == 0


def children(pid):
    return [int(p) for p in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]


def rank_of(pid):
    environ = Path(f'/proc/{pid}/environ').read_bytes().decode().split('\0')
    return next((int(line[5:]) for line in environ if line.startswith('RANK=')), None)


def test_ctrl_c_under_torchrun_saves_once():
    """torchrun passes a signal on to every process; all stop after the same step."""
    options = [*RUN, '--max_iters=1000000', '--eval_interval=1000000']
    job = subprocess.Popen(torchrun(*options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           env=os.environ | {'OMP_NUM_THREADS': '1'})
    while not (Path('out/metrics.jsonl').exists() and len(Path('out/metrics.jsonl').read_text().splitlines()) > 5):
        assert job.poll() is None
        time.sleep(.1)
    job.send_signal(signal.SIGINT)
    out, err = job.communicate(timeout=60)
    assert out.count('saved to out/ckpt.pt') == 1 and checkpoint()['iter_num'] == rows()[-1]['iter']
    assert 'train.py: process 1: stopped by SIGINT' in err


@pytest.mark.parametrize('steps, nearest', [(1, 2), (3, 4)])
def test_micro_batches_that_do_not_divide_among_the_processes_are_refused(refused, monkeypatch, steps, nearest):
    for key, value in dict(RANK='0', LOCAL_RANK='0', WORLD_SIZE='2').items():
        monkeypatch.setenv(key, value)
    assert f'not a multiple of the 2 processes (nearest: {nearest})' in refused(
        train.main, *TINY, f'--gradient_accumulation_steps={steps}')


if __name__ == '__main__':
    two_processes_of_every_variant(sys.argv[1:])

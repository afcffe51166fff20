"""What a long run must not do: grow."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT, TINY


MEMORY = '''
import sys
import torch
import train
torch.set_num_threads(1)
step, seen = train.step, {}
def watched(run, replica):
    loss = step(run, replica)
    if run.iter_num in (2000, 20000):
        lines = open('/proc/self/status').read().splitlines()
        seen[run.iter_num] = next(int(line.split()[1]) for line in lines if line.startswith('VmRSS'))
    return loss
train.step = watched
assert train.main(sys.argv[1:]) == 0
print('kB', seen[2000], seen[20000])
'''


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='reads /proc')
@pytest.mark.parametrize('options', ['', '--optimizer=muon --use_svd=True --svd_rank=2'])
def test_memory_after_20000_steps_is_that_after_2000(here, options):
    """Resident memory, within 2%; evaluations and checkpoints included."""
    run = [*TINY, '--max_iters=20000', '--lr_decay_iters=20000', '--eval_interval=500', *options.split()]
    done = subprocess.run([sys.executable, '-c', MEMORY, *run], capture_output=True, text=True, timeout=900,
                          env=os.environ | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr[-2000:]
    early, late = map(int, done.stdout.splitlines()[-1].split()[1:])
    print(f'{early} kB after 2,000 steps, {late} kB after 20,000')
    assert late < 1.02 * early

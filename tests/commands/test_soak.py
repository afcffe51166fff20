"""The memory of a long run does not grow."""

import os
import subprocess
import sys

import pytest

from helpers import ROOT, TINY

MEMORY = '''
import sys
import torch
import train
from torch.optim.optimizer import register_optimizer_step_post_hook
torch.set_num_threads(1)
kilobytes = []
def look(optimizer, *_):
    if isinstance(optimizer, torch.optim.AdamW):
        lines = open('/proc/self/status').read().splitlines()
        kilobytes.append(next(int(line.split()[1]) for line in lines if line.startswith('VmRSS')))
register_optimizer_step_post_hook(look)
assert train.main(sys.argv[1:]) == 0
print(kilobytes[499], kilobytes[1999])
'''


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='reads /proc')
def test_memory_after_2000_steps_is_that_after_500(here):
    """Resident memory grows by less than 2% between steps 500 and 2,000, with evaluations,
    checkpoints, Muon, AdamW and the SVD."""
    run = [
        *TINY, '--max_iters=2000', '--lr_decay_iters=2000', '--eval_interval=500',
        '--optimizer=muon', '--use_svd=True', '--svd_rank=2', '--svd_scope=causal', '--svd_block=4']
    done = subprocess.run([sys.executable, '-c', MEMORY, *run], capture_output=True, text=True,
                          timeout=900,
                          env=os.environ | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr[-2000:]
    early, late = map(int, done.stdout.splitlines()[-1].split())
    assert late < 1.02 * early

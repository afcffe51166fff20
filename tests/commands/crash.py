"""
Kill a run with SIGKILL at random moments and check that nothing is lost.

    python tests/commands/crash.py --kills=50 --seed=0      # about four minutes on two cores

The run is killed and resumed `--kills` times and then ends by itself. Its parameters, optimizer
state, best loss and metrics must be bit-identical to those of a run that was not killed. After each
kill the checkpoint must load and its step must not have decreased. Exit code: 0 if all of this
holds, 1 with the first difference if not.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

from helpers import TEXT, assert_same_run
from runtime import checkpoint as ckpt
from runtime.data import write_dataset

OPTIONS = (
    '--dataset=mine --device=cpu --n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --batch_size=4 '
    '--dropout=.1 --gradient_accumulation_steps=2 --optimizer=muon --use_svd=True --svd_rank=4 '
    '--svd_scope=causal --svd_block=8 --learning_rate=1e-2 --eval_interval=2 --eval_iters=1'
).split()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=50)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_dataset(Path('data/mine'), TEXT, 'char', source='tests')
        options = [
            *OPTIONS, f'--max_iters={20 * args.kills}', f'--lr_decay_iters={20 * args.kills}']
        assert start(*options, '--out_dir=whole').wait() == 0
        kill_training(args.kills, random.Random(args.seed), options)
        assert start(*options).wait() == 0
        assert_same_run('whole', 'out')
    print(
        f'{args.kills} of {args.kills} kills survived; the result is bit-identical to that of the '
        'undisturbed run')


def start(*options):
    """Start train.py in its own process and return it. It resumes if there is a checkpoint."""
    resume = '--init_from=resume', '--device=cpu'
    return subprocess.Popen([sys.executable, str(ROOT / 'train.py'),
                             *(resume if Path('out/ckpt.pt').exists() else options)],
                            stdout=subprocess.DEVNULL, env=os.environ | {'OMP_NUM_THREADS': '1'})


def kill_training(kills, draw, options):
    """Start and kill the run `kills` times.

    A third of the kills come at the start, a third at random moments of training, and a third while
    a checkpoint of a new step is written. draw: random.Random; options: of train.py.
    """
    saved, metrics = 0, Path('out/metrics.jsonl')
    for number in range(kills):
        new = max(2, metrics.read_text().count('\n') if metrics.exists() else 0) + 2
        when = [lambda: True, lambda: metrics.exists() and metrics.read_text().count('\n') > new,
                lambda: when[1]() and any(Path('out').glob('ckpt.pt.*.tmp'))]
        process = start(*options)
        while not when[number % 3]() and process.poll() is None:
            time.sleep(.0002)
        time.sleep(draw.uniform(0, (3, .3, .003)[number % 3]))
        process.kill()
        process.wait()
        step = ckpt.load('out/ckpt.pt')['iter_num'] if Path('out/ckpt.pt').exists() else 0
        assert step >= saved, f'the checkpoint went back from step {saved} to {step}'
        saved = step
        print(f'kill {number + 1}: the checkpoint of step {step} loads', flush=True)


if __name__ == '__main__':
    main()

"""
SIGKILL at random moments, also while a checkpoint is written; is anything ever lost?

    python tests/commands/crash.py --kills=50 --seed=0                    # about four minutes on two cores

A run is killed and resumed until all kills are spent, then left to end. Its parameters, optimizer state,
best loss and
metrics must be those of an undisturbed run, to the bit; after every kill the checkpoint must load, and its
step must
not go back. Exit code 0 if so, 1 with the first difference if not.
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

from helpers import TEXT, same, untimed
from runtime import checkpoint as ckpt
from runtime.dataset import write_dataset

OPTIONS = ('--dataset=mine --device=cpu --n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --batch_size=4 '
           '--dropout=.1 --gradient_accumulation_steps=2 --optimizer=muon --use_svd=True --svd_rank=4 --svd_scope=causal '
           '--svd_block=8 --learning_rate=1e-2 --eval_interval=2 --eval_iters=1').split()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=50)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_dataset(Path('data/mine'), TEXT, 'char', source='tests')
        options = [*OPTIONS, f'--max_iters={20 * args.kills}', f'--lr_decay_iters={20 * args.kills}']
        finish('train.py', *options, '--out_dir=whole')
        kill_training(args.kills, draw, options)
        finish(*resume(options))
        whole, killed = ckpt.load('whole/ckpt.pt'), ckpt.load('out/ckpt.pt')
        for key in whole.keys() - {'config', 'path', 'stamp'}:
            assert same(whole[key], killed[key]), f'{key} differs from the undisturbed run'
        assert untimed('whole') == untimed('out'), 'metrics.jsonl differs from the undisturbed run'
    print(f'{args.kills} of {args.kills} kills survived; the end is that of the undisturbed run to the bit')


def start(script, *argv):
    with open('err', 'w') as err:
        return subprocess.Popen([sys.executable, str(ROOT / script), *argv], stdout=subprocess.DEVNULL,
                                stderr=err,
                                env=os.environ | {'OMP_NUM_THREADS': '1'})


def finish(*command):
    assert start(*command).wait() == 0, Path('err').read_text()[-1000:]


def resume(options):
    """A command: from scratch until there is a checkpoint, which needs no more than its name."""
    return 'train.py', *(('--init_from=resume', '--device=cpu') if Path('out/ckpt.pt').exists() else options)


def kill_when(process, condition, seconds):
    while not condition() and process.poll() is None:
        time.sleep(.0002)
    time.sleep(seconds)
    process.kill()
    process.wait()


def kill_training(kills, draw, options):
    """A third at the start, a third at random moments of training, a third while a checkpoint of a new step
    is being
    written."""
    saved, metrics = 0, Path('out/metrics.jsonl')
    for number in range(kills):
        new = max(2, metrics.read_text().count('\n') if metrics.exists() else 0) + 2
        when = [lambda: True, lambda: metrics.exists() and metrics.read_text().count('\n') > new,
                lambda: when[1]() and any(Path('out').glob('ckpt.pt.*.tmp'))]
        kill_when(start(*resume(options)), when[number % 3], draw.uniform(0, (3, .3, .003)[number % 3]))
        step = ckpt.load('out/ckpt.pt')['iter_num'] if Path('out/ckpt.pt').exists() else 0
        assert step >= saved, f'the checkpoint went back from step {saved} to {step}'
        saved = step
        print(f'\rkill {number + 1}: checkpoint of step {step} is good ', end='', flush=True)


if __name__ == '__main__':
    try:
        main()
    except AssertionError as e:
        sys.exit(f'FAILED: {e}')

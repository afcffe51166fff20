"""
SIGKILL at random moments, also while a checkpoint is written and while data is prepared; is anything ever lost?

    python tests/commands/crash.py --kills=50 --seed=0                    # about four minutes on two cores

A run is killed and resumed until all kills are spent, then left to end. Its parameters, optimizer state, best loss and
metrics must be those of an undisturbed run, to the bit; after every kill the checkpoint must load and the data set must
be whole or prepare itself anew. Exit code 0 if so, 1 with the first difference if not.
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
from runtime.dataset import Dataset, is_prepared

OPTIONS = ('--dataset=mine --device=cpu --n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --batch_size=4 --dropout=.1 '
           '--gradient_accumulation_steps=2 --optimizer=muon --use_svd=True --svd_rank=4 --svd_scope=causal '
           '--svd_block=8 --learning_rate=1e-2 --eval_interval=2 --eval_iters=1').split()
PREPARE = f'''import sys
sys.path.insert(0, {str(ROOT)!r})
from data.shakespeare_text import prepare
from pathlib import Path
sys.exit(prepare('char', Path(__file__).parent, ['--input', 'text.txt']))
'''


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=50)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path('text.txt').write_text(TEXT * 1000)
        Path('data/mine').mkdir(parents=True)
        Path('data/mine/prepare.py').write_text(PREPARE)
        steps = 20 * args.kills
        options = [*OPTIONS, f'--max_iters={steps}', f'--lr_decay_iters={steps}']
        started = time.perf_counter()
        run('train.py', *options, '--out_dir=whole')
        print(f'undisturbed: {steps} steps in {time.perf_counter() - started:.0f} s')
        of_data = args.kills // 5
        kill_preparations(of_data, draw)
        counts = kill_training(args.kills - of_data, draw, options)
        run(*resume(options))
        compare()
    words = ', '.join(f'{count} {place}' for place, count in counts.items())
    print(f'{args.kills} of {args.kills} kills survived: {of_data} while data was prepared, {words}; parameters, '
          f'optimizer, best loss and metrics are those of the undisturbed run to the bit (seed {args.seed})')


def run(script, *argv):
    done = start(script, *argv).wait()
    assert done == 0, f'{script} ended with {done}: {Path("err").read_text()[-1000:]}'


def start(script, *argv):
    with open('err', 'w') as err:
        return subprocess.Popen([sys.executable, str(ROOT / script), *argv], stdout=subprocess.DEVNULL, stderr=err,
                                env=os.environ | {'OMP_NUM_THREADS': '1'})


def resume(options):
    """Scratch until there is a checkpoint. Then it needs no more than its name."""
    there = Path('out/ckpt.pt').exists()
    return ('train.py', *(('--init_from=resume', '--device=cpu') if there else options))


def kill_preparations(kills, draw):
    """Each from an empty folder; half of the kills when a temporary file is seen. Then the data set is whole or known
    not to be."""
    whole = {f: Path('data/mine', f).read_bytes() for f in ('train.bin', 'val.bin', 'meta.json')}
    for number in range(kills):
        for path in Path('data/mine').iterdir():
            if path.suffix in ('.bin', '.json', '.tmp'):
                path.unlink()
        process = start(Path.cwd() / 'data/mine/prepare.py')
        if number % 2:
            wait_for(process, lambda: any(Path('data/mine').glob('*.tmp')))
        kill(process, draw.uniform(0, .003) if number % 2 else draw.uniform(.5, 4))
        if is_prepared(Path('data/mine')):
            Dataset('data/mine')
            assert all(Path('data/mine', f).read_bytes() == content for f, content in whole.items())
    run(Path.cwd() / 'data/mine/prepare.py')
    assert all(Path('data/mine', f).read_bytes() == content for f, content in whole.items())


def kill_training(kills, draw, options):
    """A third at the start, a third at random moments of training, a third while a checkpoint of a new step is being
    written. No checkpoint may be lost: the step saved never goes back. -> {where: number}"""
    counts, saved = {'at the start': 0, 'in training': 0, 'while a checkpoint was written': 0}, 0
    for number in range(kills):
        place = list(counts)[number % 3]
        before = rows_written()
        process = start(*resume(options))
        if place != 'at the start':
            wait_for(process, lambda: rows_written() > max(before, 2) + 2)      # steps that were not taken before
        if place == 'while a checkpoint was written':
            wait_for(process, lambda: any(Path('out').glob('ckpt.pt.*.tmp')))
        kill(process, {'at the start': draw.uniform(0, 3), 'in training': draw.uniform(0, .3)}.get(
            place, draw.uniform(0, .003)))
        counts[place] += 1
        step = ckpt.load('out/ckpt.pt')['iter_num'] if Path('out/ckpt.pt').exists() else 0
        assert step >= saved, f'the checkpoint went back from step {saved} to {step}'
        saved = step
        print(f'\rkill {number + 1}: checkpoint of step {step} is good ', end='', flush=True)
    print()
    return counts


def rows_written():
    path = Path('out/metrics.jsonl')
    return path.read_text().count('\n') if path.exists() else 0


def wait_for(process, condition):
    until = time.perf_counter() + 100
    while not condition() and process.poll() is None:
        assert time.perf_counter() < until, Path('err').read_text()[-1000:]
        time.sleep(.0002)


def kill(process, seconds):
    time.sleep(seconds)
    process.kill()
    process.wait()


def compare():
    whole, killed = ckpt.load('whole/ckpt.pt'), ckpt.load('out/ckpt.pt')
    for key in whole.keys() - {'config', 'path', 'stamp'}:
        assert same(whole[key], killed[key]), f'{key} differs from the undisturbed run'
    assert untimed('whole') == untimed('out'), 'metrics.jsonl differs from the undisturbed run'


if __name__ == '__main__':
    try:
        main()
    except AssertionError as e:
        sys.exit(f'FAILED: {e}')

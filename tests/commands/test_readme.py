"""The commands in README.md and docs/ name files and options that exist, with values that pass the checks."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bench
import compare
import compress
import export
import plot_adaptive
import sample
import train
from helpers import TEXT
from runtime import config as configuration

ROOT = Path(__file__).resolve().parents[2]
TEXTS = {p.relative_to(ROOT).as_posix(): p.read_text()
         for p in (ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md')))}
CLASSES = {'train.py': train.TrainConfig, 'sample.py': sample.SampleConfig, 'bench.py': bench.BenchConfig,
           'export.py': export.ExportConfig, 'compress.py': compress.CompressConfig,
           'plot_adaptive.py': plot_adaptive.PlotConfig, 'compare.py': compare.CompareConfig}
NAMES = '|'.join(CLASSES).replace('.py', '')
COMMAND = rf'python ((?:{NAMES})\.py(?: +(?:--[\w=.,/-]+|config/\w+\.py))*)'
COMMANDS = sorted({match for text in TEXTS.values() for match in re.findall(COMMAND, text)})


def test_the_commands_are_found():
    assert len(COMMANDS) > 8 and 'train.py config/train_svd_test.py' in COMMANDS


@pytest.mark.parametrize('command', COMMANDS)
def test_commands_are_valid(command, tmp_path, monkeypatch):
    shutil.copytree(ROOT / 'config', tmp_path / 'config')
    (tmp_path / 'NANOGPT').mkdir()                                  # stands for a checkout in --peer=NANOGPT
    (tmp_path / 'NANOGPT' / 'model.py').touch()
    (tmp_path / 'FOLDER').mkdir()                                   # and for a model in --init_from=FOLDER
    (tmp_path / 'FOLDER' / 'config.json').touch()
    for run in re.findall(r'--init_from=(out[\w-]+|BASE)', command):   # and for the run that an earlier command made
        (tmp_path / run).mkdir()
        (tmp_path / run / 'ckpt.pt').touch()
    monkeypatch.chdir(tmp_path)
    script, *argv = shlex.split(command.replace('../nanoGPT', 'NANOGPT'))
    placeholders = ('--help', '--key=value', '--seed=SEED', 'config/FILE.py')
    argv = [arg for arg in argv if arg not in placeholders]
    if script == 'compare.py' and any(not arg.startswith('--sweep=') for arg in argv):      # its options take lists
        cfg, lists, set_by, plain = compare.read(argv)
        assert compare.plan(cfg, lists, set_by, plain, print)
    else:
        configuration.load(CLASSES[script], argv)


def test_all_options_of_the_table_exist():
    rows = re.findall(r'^\| ((?:`\w+`(?:, )?)+) \|', TEXTS['README.md'], re.M)
    named = {name for row in rows for name in re.findall(r'`(\w+)`', row)} - {'sequence', 'causal', 'weight'}
    assert {'use_svd', 'svd_basis_grad', 'optimizer'} <= named <= set(train.TrainConfig.__dataclass_fields__)


def test_no_placeholder_is_left():
    assert not [name for name, text in TEXTS.items() if re.search(r'@[A-Z0-9_]+@', text)]


# ----------------------------------------------------------------------------------------------------------------------
# the README's commands, run in its order on a model that takes no time

SHAPE = '--dataset=toy --n_layer=1 --n_head=2 --n_embd=64 --block_size=32 --batch_size=2'.split()
SHORT = ('--max_iters=2 --lr_decay_iters=2 --warmup_iters=1 --eval_interval=2 --eval_iters=1 --adaptive_svd_interval=2 '
         '--device=cpu').split()
# before a command's own options, and in their place
SMALL = {'train.py': SHORT, 'sample.py': ['--num_samples=2', '--device=cpu'], 'bench.py': ['--pairs=2', '--device=cpu'],
         'compress.py': ['--calibration_tokens=64', '--device=cpu'], 'compare.py': SHORT}
INSTEAD = {'--finetune_iters': '2', '--max_new_tokens': '4', '--seeds': '2', '--dataset': 'toy', '--start': 'the'}
# downloads and other repositories, the suites of tests, hours; bench.py's self-test has tests/commands/test_check.py
ELSEWHERE = ('pip ', '=gpt2', 'finetune_shakespeare', 'pytest', '--check', 'tests/', 'experiments/', 'openwebtext')


def readme_commands():
    """As lists of words, from the script on."""
    blocks = re.findall(r'```sh\n(.*?)```', TEXTS['README.md'], re.S)
    lines = [command.partition('#')[0].strip() for block in blocks for line in block.splitlines()
             for command in line.split('&&')]
    return [shlex.split(line)[1:] for line in lines
            if '--to=gpt2' in line or line and not any(word in line for word in ELSEWHERE)]


@pytest.mark.slow
def test_the_commands_of_the_readme_run(here, call, monkeypatch):
    """In its order, each on the runs that those before it left, with a model that takes no time: exit code 0."""
    monkeypatch.setattr(compare, 'TIMED_SECONDS', 0.1)
    shutil.copytree(ROOT / 'config', 'config')
    Path('my.txt').write_text(TEXT * 4)
    commands = readme_commands()
    assert len(commands) > 30 and {script for script, *_ in commands} >= {*CLASSES}
    for script, *argv in commands:
        if script.startswith('example'):
            done = subprocess.run([sys.executable, ROOT / script], capture_output=True, text=True)
            assert done.returncode == 0, (script, done.stderr)
            continue
        configs = [arg for arg in argv if not arg.startswith('--')]
        own = [f'{name}={INSTEAD.get(name, value)}' if value and value != 'my.txt' else arg for arg in argv
               if arg not in configs for name, _, value in [arg.partition('=')]]
        small = [] if script == 'compare.py' and not configs else SMALL.get(script, [])
        shape = SHAPE if configs and not any('finetune' in name for name in configs) else []
        result = call(sys.modules[script.removesuffix('.py')].main, *configs, *shape, *small, *own)
        assert result.code == 0, (script, argv, result.err)

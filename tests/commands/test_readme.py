"""The commands and links in README.md, CONTRIBUTING.md and docs/ work, and docs/OPTIONS.md is
current."""

import importlib
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest

import compare
from helpers import ROOT, TEXT
from runtime import config as configuration
from tools import sweep

# a command may go on in the next line
TEXTS = {p.relative_to(ROOT).as_posix(): re.sub(r' *\\\n *', ' ', p.read_text())
         for p in (*sorted(ROOT.glob('*.md')), *sorted((ROOT / 'docs').glob('*.md')))}
CLASSES = {'train.py': 'TrainConfig', 'sample.py': 'SampleConfig', 'bench.py': 'BenchConfig',
           'export.py': 'ExportConfig', 'compress.py': 'CompressConfig',
           'compare.py': 'CompareConfig'}
COMMANDS = sorted({match for text in TEXTS.values() for match in re.findall(
    rf'python ((?:{"|".join(CLASSES)})(?: +(?:--[\w=.,/-]+|config/\w+\.py))*)', text)})


def module_of(script):
    return importlib.import_module(script.removesuffix('.py'))


def test_commands_are_valid(tmp_path, monkeypatch):
    """What earlier commands made, or a placeholder stands for, is there as an empty file."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / 'config', 'config')
    runs = re.findall(r'--init_from=(out[\w-]+|BASE)', ' '.join(COMMANDS))
    for file in ('nanoGPT/model.py', 'NANOGPT/model.py', 'FOLDER/config.json',
                 *(f'{run}/ckpt.pt' for run in runs)):
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).touch()
    for command in COMMANDS:
        script, *argv = shlex.split(command.replace('../nanoGPT', 'nanoGPT'))
        argv = [
            arg for arg in argv
            if arg not in ('--help', '--key=value', '--seed=SEED', 'config/FILE.py')]
        # its options take lists
        if script == 'compare.py' and any(not arg.startswith('--sweep=') for arg in argv):
            values, lists, set_by, rest = compare.read_lists(argv)
            assert sweep.expand_grid(compare.CompareConfig, values, lists, set_by, rest)
        else:
            assert configuration.load(getattr(module_of(script), CLASSES[script]), argv)
    assert len(COMMANDS) > 8 and 'train.py config/train_svd_test.py' in COMMANDS  # they are found


def test_links_lead_to_files():
    links = [(page, link) for page, text in TEXTS.items()
             for link in re.findall(r'\]\(([^)#]+)(?:#[^)]*)?\)', text) if '://' not in link]
    assert len(links) > 15                                                          # they are found
    assert not [(page, link) for page, link in links if not (ROOT / page).parent.joinpath(
        link).exists()]


def test_the_page_of_options_is_what_its_command_writes():
    assert runpy.run_path(str(ROOT / 'docs/options.py'))['page']() == TEXTS['docs/OPTIONS.md'], (
        'run python docs/options.py')


# --------------------------------------------------------------------------------------------------
# the README's commands, run in its order on a model that takes no time

SHORT = ('--max_iters=2 --lr_decay_iters=2 --warmup_iters=1 --eval_interval=2 --eval_iters=1 '
         '--adaptive_svd_interval=2 --device=cpu').split()
# before a command's own options, and in their place
SMALL = {'train.py': SHORT, 'sample.py': ['--num_samples=2', '--device=cpu'],
         'bench.py': ['--pairs=2', '--device=cpu'],
         'compress.py': ['--calibration_tokens=64', '--device=cpu'], 'compare.py': SHORT}
INSTEAD = {'--finetune_iters': '2', '--max_new_tokens': '4', '--seeds': '1', '--dataset': 'toy',
           '--start': 'the', '--max_iters': '2',
           **dict.fromkeys(('None,2,16', 'None,4,16', 'None,4,8,16'), 'None,8')}
# downloads and other repositories, the suites of tests, hours
ELSEWHERE = ('pip ', '=gpt2', 'finetune_shakespeare', 'pytest', 'tests/', 'experiments/',
             'openwebtext')


@pytest.mark.slow
def test_the_commands_of_the_readme_run(here, call, monkeypatch):
    """In its order, each on the runs that those before it left, with a model that takes no time:
    exit code 0."""
    monkeypatch.setattr(sweep, 'PAIRS', 2)
    monkeypatch.setattr(importlib.import_module('example_mla_usage'), 'STEPS', 2)
    shutil.copytree(ROOT / 'config', 'config')
    Path('my.txt').write_text(TEXT * 4)
    lines = [command.partition('#')[0].strip()
             for block in re.findall(r'```sh\n(.*?)```', TEXTS['README.md'], re.S)
             for line in block.splitlines() for command in line.split('&&')]
    commands = [shlex.split(line)[1:] for line in lines
                if '--to=gpt2' in line or line and not any(word in line for word in ELSEWHERE)]
    assert len(commands) > 15 and {script for script, *_ in commands} >= {*CLASSES}
    for script, *argv in commands:
        if script.startswith('example'):
            module_of(script).main()
            continue
        configs = [arg for arg in argv if not arg.startswith('--')]
        own = [
            f'{name}={INSTEAD.get(name, INSTEAD.get(value, value))}'
            if value and value != 'my.txt' else arg for arg in argv if arg not in configs
            for name, _, value in [arg.partition('=')]]
        small = [] if script == 'compare.py' and not configs else SMALL.get(script, [])
        shape = ('--dataset=toy --n_layer=1 --n_head=2 --n_embd=64 --block_size=32 --batch_size=2'.
                 split() if configs and not any('finetune' in name for name in configs) else [])
        result = call(module_of(script).main, *configs, *shape, *small, *own)
        assert result.code == 0, (script, argv, result.err)

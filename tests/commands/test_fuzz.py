"""Any options, config files and folders give a run, or a one-line error and exit code 2. No example
may give a traceback, hang or lose a file."""

import functools
import os
import shutil
import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import bench
import sample
import train
from helpers import TEXT, TINY
from runtime import config as configuration
from runtime import download
from runtime.data import locate, write_dataset

pytestmark = pytest.mark.usefixtures('one_thread')
QUICK = [*TINY, '--max_iters=2', '--eval_interval=1', '--out_dir=out']
SAMPLE = ['--num_samples=2', '--max_new_tokens=3', '--device=cpu', '--out_dir=run']


SCRIPTS = [(train.main, train.TrainConfig, QUICK, [])] * 8 + [
    (sample.main, sample.SampleConfig, SAMPLE, []),
    (bench.main, bench.BenchConfig, QUICK, ['--peer=data'])
]


# --------------------------------------------------------------------------------------------------
# values and lines: valid, at the limit, of a wrong type, absurd

ODD = [
    '', ' ', '0', '-1', '1', '2', '3', '3.5', '1e-300', '1e30', '1e300', '-1e300', '1e999', 'nan',
    '-inf', '1' + '0' * 18, '9' * 400, '1' + '0' * 5000, 'True', 'no', 'None', 'auto', "'", '"',
    '(', '[' * 3000, '-' * 9000 + '1', '0x3', '1j', '\x1b[31m', 'a\nb', 'a\rb', '\u2028', 'größe',
    '🙂', '"\\d"', '1or 2', '{[]: 1}', "b'x'", '--', '-h', '%s', '{}', '*', '~', 'x' * 252,
    'x' * 300, 'x' * 100_000, 'cpu:', 'cpu:0', 'cpu:²', 'cpu:00', 'auto:0'
]
PATHS = [
    'out', 'run', 'link', 'loop', 'dangling', 'notes.txt', 'notes.txt/run', 'data', 'data/toy',
    'data/toy/x', 'mine', 'run/ckpt.pt', 'twisted', '.', '..', '../x', './out/', 'run/../out',
    'a/b/c', 'toy', 'one.txt', 'latin1.txt', 'empty.txt', 'my.txt', 'locked', 'locked/x',
    'FILE:notes.txt', 'FILE:run', 'new\nline', 'größer 🙂'
]
GOOD = {
    'out_dir': ['out', 'run', 'run', 'link', 'dangling', 'a/b/c', 'new\nline', 'größer 🙂', '../x'],
    'device': ['auto', 'cpu', 'cpu:0'], 'start': ['the', '\n', 'FILE:my.txt']
}
# values that only cost time are small, or so large that they are refused
ABSURD = [str(10 ** n) for n in (12, 18, 30, 120)]
LONG = {
    'max_iters': 3, 'eval_iters': 3, 'batch_size': 5, 'gradient_accumulation_steps': 3,
    'n_layer': 3, 'n_embd': 24, 'block_size': 20, 'vocab_size': 300, 'num_samples': 3,
    'max_new_tokens': 4
}
ENDLESS = ('max_iters', 'eval_iters', 'gradient_accumulation_steps')  # no value of these is refused


def harmless(key, text):
    """Return whether a run with this value ends soon, with or without an error."""
    try:
        number = int(text, 0)
    except ValueError:
        return True
    return key not in LONG or number <= LONG[key] or key not in ENDLESS and 10 ** 12 <= number


def values(key, hint):
    """Return texts for an option: mostly of its type, some at its limits, and a few of no type at
    all."""
    kinds = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    kinds = [kinds] if get_origin(kinds) in (None, Literal) else get_args(kinds)
    of_kind = {bool: ['True', 'False'], str: GOOD.get(key, PATHS),
               float: '0 1e-300 1e-3 .5 .9 .999999999 1e9 1e38 1e300 1.7e308'.split(),
               int: [*map(str, range(LONG.get(key, 12) + 1)), *ABSURD[key in ENDLESS:]]}
    own = [
        st.sampled_from([str(choice)
                         for choice in get_args(kind)] or of_kind.get(kind, ['None']))
        for kind in kinds]
    # only text that a shell can pass, and no path outside the working directory
    text = st.text(st.characters(exclude_characters='/\0', codec='utf-8'), max_size=12)
    return st.one_of(*own * 6, st.sampled_from(ODD), text).filter(lambda s: harmless(key, s))


@functools.cache
def options(cls):
    """Return pairs of an option and its text. bench.py always gets an invalid --peer, so it stops
    before it times anything."""
    hints = get_type_hints(cls, include_extras=True)
    keys = [f.name for f in fields(cls) if f.name != 'peer']
    return st.sampled_from(keys).flatmap(
        lambda key: st.tuples(st.just(key), values(key, hints[key])))


malformed = st.one_of(
    st.sampled_from([
        '', '-', '--', '---', '--=', '--=1', '--seed', '-seed=1', '--Seed=1', '--max_iter=3',
        '--n-layer=1', '--a\nb=1', '--\u2028=1', '-\x1b', '--__class__=1', 'seed=1', 'nowhere.py',
        'no\nwhere.py', 'data', 'notes.txt', 'loop', 'run/ckpt.pt', '\0.py', '\udcff.py', 'x' * 300,
        'latin1.txt', 'run/config.py'
    ]),
    st.text(max_size=8).map(lambda s: '--' + s))
LINES = [
    'import math', 'import no_such_module', 'from os import *', 'n_layer = = 1', ' n_layer = 1',
    'n_embd', '1 / 0', 'sys.exit(3)', 'exit()', 'raise SystemExit',
    'raise ValueError("two\\nlines")', 'raise ValueError("\\x1b\\u2028")', 'assert 0, "\\ud800"',
    'def f(): f()\nf()', 'n_embd = 10 ** 400', 'learning_rate = -1e308 * 10',
    'import numpy as np\nn_layer = np.zeros((9, 9))', 'import numpy as np\nn_layer = np.int64(1)',
    'warmup = 3', 'import numpy as np\nlearning_rate = np.float32("nan")', 'seed = None',
    'seed = lambda: 1', 'out_dir = object()', 'out_dir = "a\\nb"', 'out_dir = __file__', 'del seed',
    'del __file__', 'globals()["a b"] = 4', '_x = 3', 'min_lr = learning_rate / 10',
    'dataset = ["toy"]', '"\\d"', 'seed = 1or 2', '(' * 999, 'x' * 99999, 'print()', '"""', '\\',
    'é = 1', 'lambda: (yield)', 'return', 'await f()', 'from __future__ import x', 'seed: int = 3',
    'global seed', 'for seed in range(3): pass', 'type(seed)()', 'class seed: pass',
    'dtype = "float16"; use_svd = True; svd_rank = 2', 'seed = True', 'svd_rank = 2.', b'# \xe9',
    b'\0', b'\xff\xfe', b'\xef\xbb\xbfseed = 2', b'seed = 2\r\n', b'# coding: latin-1'
]


@st.composite
def examples(draw):
    """Draw an example: main, its options class, argv, and a dict of the config files in argv, name
    -> lines."""
    main, cls, first, last = draw(st.sampled_from(SCRIPTS))
    if cls is train.TrainConfig and draw(st.integers(0, 2)) == 0:
        first = [*first, '--init_from=resume',
                 f'--out_dir={draw(st.sampled_from(["run", "run", "run", *PATHS]))}']
    chosen = draw(st.lists(options(cls).map(lambda option: '--{}={}'.format(*option)), max_size=4))
    extra = draw(st.lists(malformed, min_size=0, max_size=draw(st.sampled_from([0, 0, 0, 1]))))
    setting = options(cls).map(lambda option: '{} = {!r}'.format(*option))
    line = st.one_of(setting, setting.map(lambda text: text.replace("'", '')),
                     st.sampled_from(LINES))
    names = st.sampled_from([[], [], ['a.py'], ['b.py', 'a.py']])
    files = {name: draw(st.lists(line, max_size=2)) for name in draw(names)}
    return main, cls, [*first, *draw(st.permutations([*chosen, *extra, *files])), *last], files


# --------------------------------------------------------------------------------------------------
# the folder for the examples, and the checks

@pytest.fixture(scope='module')
def world(tmp_path_factory, one_thread):
    """A folder with data sets, a run and unrelated files. Nothing is compiled and no network is
    used."""
    root = tmp_path_factory.mktemp('world')
    work = root / 'work'
    for folder in ('mine', 'twisted/ckpt.pt'):
        (work / folder).mkdir(parents=True)
    (work / 'locked').mkdir(mode=0o555)                             # root may still write there
    write_dataset(work / 'data' / 'toy', TEXT, 'char', source='tests')
    for name, content in {
            'notes.txt': b'mine', 'one.txt': b'a', 'empty.txt': b'', 'latin1.txt': b'\xe9' * 99,
            'my.txt': TEXT.encode(), 'mine/config.py': b'MINE = 1\n', 'mine/eval.jsonl': b'mine'
    }.items():
        (work / name).write_bytes(content)
    for name, target in {'link': 'run', 'loop': 'loop', 'dangling': 'nowhere',
                         'twisted/last.pt': 'loop'}.items():
        (work / name).symlink_to(target)
    download.gpt2_encoding.cache_clear()
    with pytest.MonkeyPatch.context() as patch, torch.compiler.set_stance('force_eager'):
        patch.chdir(work)
        patch.setenv('HOME', str(work))                             # '~' is among the values
        for module in ('wandb', 'tiktoken'):
            patch.setitem(sys.modules, module, None)
        for text in ('my.txt', 'notes.txt'):  # otherwise they would go to the repo's data/
            locate(text, 'char', (Path('data'),))
        assert train.main([*QUICK, '--out_dir=run']) == 0
        yield root


def tree(root):
    """Return a dict of every path below root: its bytes, the target of a link, or None for a
    folder."""
    return {str(p.relative_to(root)):
            os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else None
            for p in sorted(root.rglob('*'))}


def check(world, call, main, cls, argv, files):
    """Run one example in a copy of the world. Lines of a progress bar are ignored."""
    root, script = world.with_name('copy'), main.__module__
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(world, root, symlinks=True)
    os.chdir(root / 'work')
    for name, lines in files.items():
        Path(name).write_bytes(b'\n'.join(
            x if isinstance(x, bytes) else x.encode(errors='replace') for x in lines))
    before = tree(root)
    result = call(main, *argv)
    lines = [line for line in result.err.splitlines() if line.strip() and line[:6] != 'train:']
    begins = {0: '', 1: 'train.py: ', 2: f'{script}.py: '}[result.code]
    assert len(lines) == min(result.code, 1), (result.code, lines)
    assert all(line.startswith(begins) for line in lines), (result.code, lines)
    if result.code == 2 or script != 'train' or '--help' in argv or '-h' in argv:
        assert tree(root) == before
    else:
        keep_all_but_the_run(root, before, tree(root), configuration.parse(cls, argv)[0])


def keep_all_but_the_run(root, before, after, said):
    """Check that only OUT_DIR has changed, and OUT_DIR.1 if a run was moved aside. The content of
    every other file still exists somewhere."""
    out = os.path.relpath(os.path.realpath(root / 'work' / said['out_dir']), root)
    inside = tuple(f'{place}{os.sep}' for place in (out, f'{out}.1'))
    for path in (path for path in before.keys() | after.keys()
                 if before.get(path, 0) != after.get(path, 0)):
        content = before.get(path)
        assert f'{path}{os.sep}'.startswith(inside) or f'{out}{os.sep}'.startswith(
            f'{path}{os.sep}'), path
        own = said['init_from'] == 'resume' and Path(path).name in (
            'ckpt.pt', 'metrics.jsonl', 'config.py', 'environment.json', 'curves.png')
        appended = said['eval_only'] and Path(path).name == 'eval.jsonl' and (
            after[path].startswith(content or b''))
        assert own or appended or content in (None, *after.values()), path


# --------------------------------------------------------------------------------------------------
# the tests

LIMITS = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))


@settings(max_examples=12, derandomize=True, **LIMITS)
@given(example=examples())
def test_any_command_line_runs_or_is_refused(world, call, example):
    check(world, call, *example)


@pytest.mark.slow
@seed(int(os.environ.get('FUZZ_SEED', 0)))
@settings(max_examples=200, **LIMITS)
@given(example=examples())
def test_any_of_200_command_lines_runs_or_is_refused(world, call, example):
    check(world, call, *example)

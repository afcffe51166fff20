"""Any options, config files and folders: a run, or one line and exit code 2; never a traceback, a hang, a lost file."""

import functools
import io
import os
import shutil
import signal
import sys
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from hypothesis import HealthCheck, event, given, seed, settings
from hypothesis import strategies as st

import bench
import sample
import train
from helpers import TEXT, TINY
from model import GPT
from runtime import config as configuration
from runtime import download, evaluation
from runtime.config import UserError
from runtime.dataset import write_dataset

pytestmark = pytest.mark.usefixtures('one_thread')
SECONDS = 20                                                        # an example takes a tenth of one; then it hangs
QUICK = [*TINY, '--max_iters=2', '--eval_interval=1', '--out_dir=out']
SAMPLE = ['--num_samples=2', '--max_new_tokens=3', '--device=cpu', '--out_dir=run']


# ----------------------------------------------------------------------------------------------------------------------
# values and lines: right, at the border, of another type, absurd

ODD = ['', ' ', '0', '-1', '1', '2', '3', '3.5', '1e-300', '1e30', '1e300', '-1e300', '1e999', 'nan', '-inf',
       '1' + '0' * 18, '9' * 400, '1' + '0' * 5000, 'True', 'no', 'None', 'auto', "'", '"', '(', '[' * 3000,
       '-' * 9000 + '1', '0x3', '1j', '\x1b[31m', 'a\nb', 'a\rb', '\u2028', '\ud800', '\udcff', '\0', 'größe', '🙂',
       '"\\d"', '1or 2', '{[]: 1}', "b'x'", '--', '-h', '%s', '{}', '*', '~', 'x' * 252, 'x' * 300, 'x' * 100_000,
       'cpu:', 'cpu:0', 'cpu:²', 'cpu:00', 'auto:0']
PATHS = ['out', 'run', 'link', 'loop', 'dangling', 'notes.txt', 'notes.txt/run', 'data', 'data/toy', 'data/toy/x',
         'mine', 'run/ckpt.pt', 'twisted', '.', '..', '../x', './out/', 'run/../out', 'a/b/c', 'toy', 'one.txt',
         'latin1.txt', 'empty.txt', 'my.txt', 'locked', 'locked/x', 'FILE:notes.txt', 'FILE:run', 'new\nline',
         'größer 🙂']
GOOD = {'out_dir': ['out', 'run', 'run', 'link', 'dangling', 'a/b/c', 'new\nline', 'größer 🙂', '../x'],
        'device': ['auto', 'cpu', 'cpu:0'], 'start': ['the', '\n', 'FILE:my.txt']}
# what would only take long is small, or so large that it cannot be
ABSURD = [str(10 ** n) for n in (12, 18, 30, 120)]
LONG = {'max_iters': 3, 'eval_iters': 3, 'batch_size': 5, 'gradient_accumulation_steps': 3, 'n_layer': 3, 'n_embd': 24,
        'block_size': 20, 'vocab_size': 300, 'num_samples': 3, 'max_new_tokens': 4}
ENDLESS = ('max_iters', 'eval_iters')                               # time is all that they take: no size is refused


def harmless(key, text):
    """Whether a run with this value ends soon, one way or the other."""
    try:
        number = int(text, 0)
    except ValueError:
        return True
    return key not in LONG or number <= LONG[key] or key not in ENDLESS and 10 ** 12 <= number


def values(key, hint, tame):
    """Texts for an option, of its type, at its borders; where not `tame`, others too."""
    kinds = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    kinds = [kinds] if get_origin(kinds) in (None, Literal) else get_args(kinds)
    own = []
    for kind in kinds:
        if get_origin(kind) is Literal:
            own.append(st.sampled_from([str(a) for a in get_args(kind)]))
        else:
            own.append({bool: st.sampled_from(['True', 'False']),
                        str: st.sampled_from(GOOD.get(key, ['a']) if tame else PATHS),
                        float: st.sampled_from('0 1e-300 1e-3 .5 .9 .999999999 1e9 1e38 1e300 1.7e308'.split()),
                        int: st.sampled_from([*map(str, range(1, LONG.get(key, 12) + 1)), *['0', *ABSURD][4 * tame:]])
                        }.get(kind, st.just('None')))
    text = st.text(max_size=12).map(lambda s: s.replace('/', '_'))  # nothing outside the working directory
    wild = [] if tame else [st.sampled_from(ODD), text]
    return st.one_of(*own, *own, *wild).filter(lambda s: harmless(key, s))


@functools.cache
def options(cls, tame, without=''):
    hints = get_type_hints(cls, include_extras=True)
    refused = ('dataset', 'tokenizer', 'wandb_log', 'init_from') if tame else ()
    keys = [f.name for f in fields(cls) if f.name != without and f.name not in refused]
    return st.sampled_from(keys).flatmap(lambda key: st.tuples(st.just(key), values(key, hints[key], tame)))


malformed = st.one_of(
    st.sampled_from(['', '-', '--', '---', '--=', '--=1', '--seed', '-seed=1', '--Seed=1', '--max_iter=3',
                     '--n-layer=1', '--a\nb=1', '--\u2028=1', '-\x1b', '--__class__=1', 'seed=1', 'nowhere.py',
                     'no\nwhere.py', 'data', 'notes.txt', 'loop', 'run/ckpt.pt', '\0.py', '\udcff.py', 'x' * 300,
                     'latin1.txt', 'run/config.py']),
    st.text(max_size=8).map(lambda s: '--' + s))
LINES = [
    'import math', 'import no_such_module', 'from os import *', 'n_layer = = 1', ' n_layer = 1', 'n_embd', '1 / 0',
    'sys.exit(3)', 'exit()', 'raise SystemExit', 'raise ValueError("two\\nlines")', 'raise ValueError("\\x1b\\u2028")',
    'class E(BaseException): pass\nraise E', 'raise GeneratorExit', 'assert 0, "\\ud800"', 'def f(): f()\nf()',
    'class R:\n    def __repr__(self): return 1 / 0\nseed = R()', 'class Q(Exception):\n    __str__ = 1\nraise Q',
    'seed = 10 ** 5000', 'learning_rate = 10 ** 5000', 'n_embd = 10 ** 400', 'learning_rate = -1e308 * 10',
    'import numpy as np\nn_layer = np.zeros((9, 9))', 'import numpy as np\nn_layer = np.int64(1)', 'warmup = 3',
    'import numpy as np\nlearning_rate = np.float32("nan")', 'seed = None', 'seed = lambda: 1', 'out_dir = object()',
    'out_dir = "a\\nb"', 'out_dir = "\\ud800"', 'out_dir = "\\0"', 'out_dir = __file__', 'del seed', 'del __file__',
    'globals()[3] = 4', 'globals()["a b"] = 4', '_x = 3', 'min_lr = learning_rate / 10', 'dataset = ["toy"]', '"\\d"',
    'seed = 1or 2', '-' * 99999 + '1', '(' * 999, 'x' * 99999, 'print()', '"""', '\\', 'é = 1', 'lambda: (yield)',
    'return', 'await f()', 'from __future__ import x', 'seed: int = 3', 'global seed', 'for seed in range(3): pass',
    'type(seed)()', 'class seed: pass', 'dtype = "float16"; use_svd = True; svd_rank = 2', 'seed = True',
    'svd_rank = 2.', b'# \xe9', b'\0', b'\xff\xfe', b'\xef\xbb\xbfseed = 2', b'seed = 2\r\n', b'# coding: latin-1']


@st.composite
def command_lines(draw, cls):
    """-> argv, and the config files that it names: name -> content."""
    tame = draw(st.booleans())
    chosen = [draw(options(cls, tame)) for _ in range(draw(st.sampled_from([0, 1, 2, 3, 4, 8])))]
    extra = [draw(malformed)] if not tame and draw(st.integers(0, 4)) == 0 else []
    files = {}
    for name in 'ab'[:draw(st.sampled_from([0, 0, 1, 2]))]:
        setting = options(cls, tame, 'init_from')
        line = st.one_of(*[st.sampled_from(LINES)] * (not tame), setting.map(lambda o: f'{o[0]} = {o[1]}'),
                         setting.map(lambda o: f'{o[0]} = {o[1]!r}'))
        lines = draw(st.lists(line, max_size=3))
        files[f'{name}.py'] = b'\n'.join(x if isinstance(x, bytes) else x.encode(errors='replace') for x in lines)
    base = SAMPLE if cls is sample.SampleConfig else QUICK
    if cls is not sample.SampleConfig and draw(st.integers(0, 2)) == 0:
        base = [*base, '--init_from=resume', f'--out_dir={draw(st.sampled_from(["run", "run", "run", *PATHS]))}']
    if files and draw(st.booleans()):                               # so that they count
        base = [o for o in base if o[2:].partition('=')[0] in ('max_iters', 'eval_iters', 'dataset')
                or o[2:].partition('=')[0].encode() not in b''.join(files.values())]
    return [*base, *draw(st.permutations([*(f'--{k}={v}' for k, v in chosen), *extra, *files]))], files


# ----------------------------------------------------------------------------------------------------------------------
# where they run, and what must hold

class Hang(BaseException):
    """An example takes too long; no handler for Exception sees it."""


@pytest.fixture(scope='module')
def world(tmp_path_factory, one_thread):
    """A folder with a data set, a run and what else may lie about. What takes long or needs a network is cut off."""
    root = tmp_path_factory.mktemp('world')
    work = root / 'work'
    for folder in ('data', 'mine', 'twisted/ckpt.pt'):
        (work / folder).mkdir(parents=True)
    write_dataset(work / 'data' / 'toy', TEXT, 'char', source='tests')
    for name, content in {'notes.txt': b'mine', 'one.txt': b'a', 'empty.txt': b'', 'latin1.txt': b'\xe9' * 99,
                          'my.txt': TEXT.encode(), 'mine/config.py': b'MINE = 1\n', 'mine/eval.jsonl': b'mine'}.items():
        (work / name).write_bytes(content)
    for name, target in {'link': 'run', 'loop': 'loop', 'dangling': 'nowhere', 'twisted/last.pt': 'loop'}.items():
        (work / name).symlink_to(target)

    (work / 'locked').mkdir(mode=0o555)                             # but root may write everywhere

    def refuse(*args, **options):
        raise UserError('no network')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        patch.setenv('HOME', str(work))                             # '~' is a word, too
        patch.setattr(train, 'sample', lambda *args: '')
        patch.setattr(bench, 'bench', lambda cfg: 0)                # its options are what is looked at
        patch.setattr(GPT, 'from_pretrained', refuse)
        patch.setattr(GPT, 'compile', lambda self, **options: None)
        patch.setattr(torch, 'compile', lambda model, **options: model)
        patch.setattr(download, 'gpt2_encoding', refuse)
        patch.setattr(evaluation, 'FINAL_GAP_POSITIONS', 16)
        patch.setattr(evaluation, 'GAP_POSITIONS', 16)
        patch.setattr(train.devices, 'environment', lambda device, dtype: {})
        patch.setitem(sys.modules, 'wandb', None)
        texts = root.parent / f'{root.name}-texts'
        locate = train.locate
        patch.setattr(train, 'locate', lambda name, tokenizer: locate(name, tokenizer, (Path('data'), texts)))
        assert train.main([*QUICK, '--out_dir=run']) == 0
        yield root


def tree(root):
    """Every path below root -> its bytes, its target if it is a link, None for a folder."""
    return {str(p.relative_to(root)): os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else None
            for p in sorted(root.rglob('*'))}


@contextmanager
def alarm(seconds):
    def ring(number, frame):
        raise Hang
    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def call(main, argv):
    """-> code, lines on stderr, as a shell would see them: progress bars left out, warnings included."""
    out, err = (io.TextIOWrapper(io.BytesIO(), 'utf-8', errors) for errors in ('strict', 'backslashreplace'))
    with redirect_stdout(out), redirect_stderr(err), alarm(SECONDS), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('default')
        code = main(argv)
    err.flush(), out.flush()
    lines = [line for line in err.buffer.getvalue().decode().splitlines() if line.strip() and line[:6] != 'train:']
    return code, lines + [str(w.message) for w in caught if issubclass(w.category, (SyntaxWarning, DeprecationWarning))]


def check(world, main, cls, argv, files):
    """One example, in a copy of the world."""
    root = world.with_name('copy')
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(world, root, symlinks=True)
    os.chdir(root / 'work')
    try:
        for name, content in files.items():
            Path(name).write_bytes(content)
        before = tree(root)
        code, lines = call(main, argv)
        after = tree(root)
        said = settled(cls, argv)
    finally:
        os.chdir(world / 'work')
    script = main.__module__
    if code == 2:
        assert len(lines) == 1 and lines[0].startswith(f'{script}.py: '), lines
        assert after == before
    elif code == 1:
        assert script == 'train' and len(lines) == 1 and lines[0].startswith('train.py: training stopped: '), lines
    else:
        assert code == 0 and not lines, (code, lines)
    if script != 'train' or said is None:
        assert after == before
        return code
    keep_all_but(root, before, after, said)
    return code


def settled(cls, argv):
    """The values that argv gives, None if it cannot be read."""
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            return configuration.parse(cls, argv)[0]
        except UserError:
            return None


def keep_all_but(root, before, after, said):
    """Only OUT_DIR has changed, and OUT_DIR.1 where a run was moved aside; every file is still there somewhere."""
    out = os.path.relpath(os.path.realpath(root / 'work' / said['out_dir']), root)
    inside = tuple(f'{place}{os.sep}' for place in (out, f'{out}.1'))
    for path in before.keys() | after.keys():
        if before.get(path, 0) != after.get(path, 0) and path not in (out, f'{out}.1'):
            assert path.startswith(inside) or f'{out}{os.sep}'.startswith(f'{path}{os.sep}'), path
    kept = [content for content in after.values() if content is not None]
    for path, content in before.items():
        own = path.startswith(inside) and said['init_from'] == 'resume' and Path(path).name in (
            'ckpt.pt', 'metrics.jsonl', 'config.py', 'environment.json')
        appended = path == f'{out}{os.sep}eval.jsonl' and said['eval_only'] and after[path].startswith(content)
        assert content is None or own or appended or content in kept, path


# ----------------------------------------------------------------------------------------------------------------------
# the tests

LIMITS = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))
SCRIPTS = [(train.main, train.TrainConfig)] * 8 + [(sample.main, sample.SampleConfig), (bench.main, bench.BenchConfig)]
examples = st.sampled_from(SCRIPTS).flatmap(lambda script: st.tuples(st.just(script), command_lines(script[1])))


@settings(max_examples=150, derandomize=True, **LIMITS)
@given(example=examples)
def test_any_command_line_runs_or_is_refused(world, example):
    (main, cls), (argv, files) = example
    event(f'{main.__module__} {check(world, main, cls, argv, files)}')


FORMS = ['--dataset={}', '--out_dir={}', '--device={}', '--init_from=resume --out_dir={}', '--start=the --out_dir={}',
         '--eval_only=True --out_dir={}', '--init_from=resume --out_dir=run --dataset={}', '--start={}',
         '--start=FILE:{}', '--peer={}']


@pytest.mark.parametrize('form', [*FORMS[:2], *(pytest.param(form, marks=pytest.mark.slow) for form in FORMS[2:])])
def test_any_path_is_usable_or_refused(world, form):
    """One at a time, which random choice would hardly ever do."""
    main, cls = SCRIPTS[-2 if 'start' in form else -1 if 'peer' in form else 0]
    base = SAMPLE if main is sample.main else QUICK
    for value in ODD + PATHS:
        check(world, main, cls, [*base, *(part.format(value) for part in form.split())], {})


@pytest.mark.slow
@pytest.mark.parametrize('key', [f.name for f in fields(train.TrainConfig)])
def test_any_value_of_any_option_runs_or_is_refused(world, key):
    for value in ODD:
        if harmless(key, value):
            check(world, train.main, train.TrainConfig, [*QUICK, f'--{key}={value}'], {})


@pytest.mark.slow
@seed(int(os.environ.get('FUZZ_SEED', 0)))
@settings(max_examples=2000, **LIMITS)
@given(example=examples)
def test_any_of_two_thousand_command_lines_runs_or_is_refused(world, example):
    (main, cls), (argv, files) = example
    event(f'{main.__module__} {check(world, main, cls, argv, files)}')

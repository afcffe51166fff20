"""Arrows go one way: lowrank and runtime are leaves, model.py stands on them, entry points on everything."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import runtime

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ('lowrank', 'runtime', 'data', 'config')
# behind an entry point, or the model
HELPERS = {'check', 'bench_svd', 'compare_report', 'compress_layers', 'compress_spectrum', 'special_layers', 'steps'}
ENTRY_POINTS = {path.stem for path in ROOT.glob('*.py')} - {'model', 'conftest', *HELPERS}
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob('*.py'), *(
    path for package in PACKAGES for path in (ROOT / package).rglob('*.py'))))

MAY_IMPORT = {'lowrank': {'lowrank'}, 'runtime': {'runtime'}, 'data': {'data', 'runtime'}, 'config': set(),
              'special_layers': {'lowrank'}, 'model': {'special_layers', 'lowrank', 'runtime'},
              'check': {'model', 'lowrank', 'runtime', 'train'},
              'bench_svd': {'model', 'lowrank', 'runtime'},
              'compare_report': {'runtime'}, 'steps': {'model', 'runtime'},
              'compress_layers': {'special_layers', 'model', 'lowrank', 'runtime'},
              'compress_spectrum': {'lowrank', 'runtime'}}
MAY_IMPORT |= {name: {'model', 'lowrank', 'runtime', 'data', 'train'} for name in ENTRY_POINTS}
MAY_IMPORT['bench'] |= {'check', 'bench_svd', 'steps'}              # the commands behind which they stand
MAY_IMPORT['compare'] |= {'compare_report', 'steps'}
MAY_IMPORT['compress'] |= {'compress_layers', 'compress_spectrum'}
MAY_IMPORT['export'] |= {'compress_layers'}
for name in ('bench', 'export', 'sample', 'train'):
    MAY_IMPORT[name] |= {'special_layers'}


def imports(file, top_level_only=False):
    """Dotted names of all modules a file imports: in functions, too, unless only what runs when it is loaded counts."""
    pending, names = [ast.parse((ROOT / file).read_text())], set()
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = [] if not node.level else list(Path(file).parent.parts)[:1 - node.level or None]
            base = '.'.join((*package, *filter(None, [node.module])))
            names |= {base, *(f'{base}.{alias.name}' for alias in node.names)}              # a name may be a module
        elif not (top_level_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
            pending += ast.iter_child_nodes(node)
    return names


def home(name):
    """The part of the house a module or a file belongs to: 'lowrank/svd.py' and 'lowrank.svd' -> 'lowrank'."""
    return re.split(r'[./]', name)[0]


def file_of(name):
    """The file of a dotted module name, None for modules from elsewhere and for names inside a module."""
    path = name.replace('.', '/')
    return next((file for file in (f'{path}.py', f'{path}/__init__.py') if file in FILES), None)


def test_the_files_are_found():
    """Guards the tests below, which would pass on an empty list."""
    assert {'model.py', 'train.py', 'lowrank/svd.py', 'runtime/config.py', 'data/shakespeare/prepare.py'} <= {*FILES}
    assert 'lowrank.svd' in imports('model.py') and 'model' in imports('train.py')


@pytest.mark.parametrize('file', FILES)
def test_imports_go_one_way(file):
    ours = {home(name) for name in imports(file)} & {'model', 'tests', *HELPERS, *PACKAGES, *ENTRY_POINTS}
    assert ours <= MAY_IMPORT[home(file)]


def test_there_are_no_cycles():
    needs = {file: {file_of(name) for name in imports(file)} - {None} for file in FILES}
    while leaves := {file for file in needs if not needs[file] & needs.keys()}:
        needs = {file: targets for file, targets in needs.items() if file not in leaves}
    assert not needs, f'these import each other: {sorted(needs)}'


def commands():
    return sorted({'train.py', *(f for f in FILES if '__main__' in (ROOT / f).read_text())} - {'runtime/child.py'})


@pytest.mark.parametrize('missing', [['torch'], ['numpy', 'tqdm']], ids=' '.join)
@pytest.mark.parametrize('file', commands())
def test_a_missing_package_is_one_line(file, missing, tmp_path):
    script = ('import runpy, sys; sys.path[0], *sys.argv = sys.argv[1:]; '
              f'sys.modules.update(dict.fromkeys({missing})); runpy.run_path(sys.argv[0], run_name="__main__")')
    done = subprocess.run([sys.executable, '-c', script, str((ROOT / file).parent), str(ROOT / file)],
                          capture_output=True, text=True, timeout=60, cwd=tmp_path)
    words = f'{Path(file).name}: {", ".join(missing)}: not installed: pip install -r requirements.txt\n'
    assert (done.returncode, done.stdout, done.stderr) == (1, '', words)


def test_an_old_torch_is_one_line(monkeypatch):
    monkeypatch.setattr('importlib.metadata.version', lambda name: '2.8.1+cu128')
    with pytest.raises(SystemExit, match='torch 2.8.1.cu128 is too old: pip install -r requirements.txt'):
        runtime._check_machine()


def test_third_party_imports_at_load_time_are_in_requirements():
    required = {re.split(r'[^\w.-]', line)[0] for line in (ROOT / 'requirements.txt').read_text().splitlines()}
    ours = {'model', *HELPERS, *PACKAGES, *ENTRY_POINTS}
    for file in FILES:
        third_party = {home(name) for name in imports(file, top_level_only=True)} - ours - sys.stdlib_module_names
        assert third_party <= required, f'{file}: {third_party - required} missing from requirements.txt'

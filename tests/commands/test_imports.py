"""Arrows go one way: lowrank and runtime are leaves, model.py stands on them, commands on everything.
Importing needs the few required packages and does no work; what is missing or too old is one line."""

import ast
import re
import subprocess
import sys

from helpers import ROOT

PACKAGES = ('lowrank', 'runtime', 'data', 'config')
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob('*.py'), *(
    path for package in PACKAGES for path in (ROOT / package).rglob('*.py'))))
# every part of the house may import itself, and:
ARROWS = {'lowrank': '', 'runtime': '', 'data': 'runtime', 'config': '',
          'model': 'lowrank runtime', 'steps': 'model runtime',
          'svd_benchmark': 'model lowrank runtime', 'compare_report': 'runtime',
          'spectrum_report': 'lowrank runtime',
          'compress_layers': 'model lowrank runtime'}
COMMAND = 'model lowrank runtime data train'
BEHIND = {'bench': 'svd_benchmark steps', 'compare': 'compare_report steps', 'export': 'compress_layers',
          'compress': 'compress_layers spectrum_report'}
OPTIONAL = ['tiktoken', 'safetensors', 'datasets', 'wandb', 'matplotlib', 'transformers', 'peft',
            'huggingface_hub',
            'scipy', 'sklearn']


def imports(file):
    """The parts of the repository, and other packages, that a file imports, in functions too."""
    nodes = [node for node in ast.walk(ast.parse((ROOT / file).read_text()))
             if isinstance(node, (ast.Import, ast.ImportFrom))]
    return {part(getattr(node, 'module', alias.name)) for node in nodes for alias in node.names}


def part(name):
    """The part of the house that a module or a file belongs to: 'lowrank/svd.py' and 'lowrank.svd' ->
    'lowrank'."""
    return re.split(r'[./]', name)[0]


def test_imports_go_one_way():
    parts = {part(file) for file in FILES}
    for file in FILES:
        own = part(file)
        allowed = f'{own} {ARROWS.get(own, f"{COMMAND} {BEHIND.get(own)}")}'.split()
        assert imports(file) & {*parts, 'tests'} <= {*allowed}, file
    assert {'model.py', 'train.py', 'lowrank/svd.py', 'runtime/config.py',
            'data/shakespeare/prepare.py'} <= {*FILES}
    assert 'lowrank' in imports('model.py') and 'model' in imports('train.py')              # they are found


def python(code, folder, path=''):
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=folder,
                          timeout=300,
                          env={'PYTHONPATH': f'{path}:{ROOT}', 'OMP_NUM_THREADS': '1'})


def test_every_module_is_imported_without_optional_packages_and_does_no_work(tmp_path):
    """It prints nothing, writes no file, draws no number and sets no signal handler or number of threads."""
    modules = [file.removesuffix('.py').removesuffix('/__init__').replace('/', '.') for file in FILES
               if not file.startswith('config/')]
    done = python(f'''
import importlib, signal, sys, torch
def state():
    return (torch.initial_seed(), torch.get_rng_state().tolist(), torch.get_num_threads(),
            signal.getsignal(15), torch.get_default_dtype(), torch.is_grad_enabled())
before = state()
sys.modules.update(dict.fromkeys({OPTIONAL}))
for name in {modules}:
    importlib.import_module(name)
assert state() == before
''', tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '') and not list(tmp_path.iterdir())


def test_a_missing_or_old_package_is_one_line_of_every_command(tmp_path):
    """torch 2.8.1, which lacks Muon, or no torch, or neither of two others."""
    commands = [file for file in FILES if '__main__' in (ROOT / file).read_text()
                and file != 'tools/child.py']
    assert {'train.py', 'sample.py', 'bench.py', 'compare.py', 'data/shakespeare/prepare.py'} <= {*commands}
    (tmp_path / 'old' / 'torch-2.8.1.dist-info').mkdir(parents=True)
    (tmp_path / 'old' / 'torch-2.8.1.dist-info' / 'METADATA').write_text('Name: torch\nVersion: 2.8.1\n')
    for missing, path, words in ((['torch'], '', 'torch: not installed'),
                                 ([], tmp_path / 'old', 'torch 2.8.1 is too '
                                 'old'), (['numpy', 'tqdm'], '', 'numpy, tqdm: not installed')):
        done = python(f'''
import runpy, sys
sys.modules.update(dict.fromkeys({missing}))
for file in {commands}:
    sys.path[0], sys.argv[:] = '{ROOT}/' + file.rpartition('/')[0], [file]
    for name in [name for name in sys.modules if name.partition('.')[0] in {PACKAGES}]:
        del sys.modules[name]
    try:
        runpy.run_path('{ROOT}/' + file, run_name='__main__')
    except SystemExit as e:
        print(e)
''', tmp_path, path)
        lines = [f'{file.rpartition("/")[2]}: {words}: pip install -r requirements.txt' for file in commands]
        assert (done.stdout.splitlines(), done.stderr) == (lines, '')

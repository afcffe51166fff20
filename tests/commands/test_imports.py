"""Imports go in one direction. lowrank/ and runtime/ import nothing else of this repo, and model.py
imports these two. train.py, tools/ and the other commands come after it. Importing needs only the
required packages and has no side effects. A missing or old package ends in a one-line error."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter

from helpers import ROOT

PACKAGES = ('lowrank', 'runtime', 'tools', 'data', 'config', 'experiments')
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob('*.py'), *(
    path for package in PACKAGES for path in (ROOT / package).rglob('*.py'))))
DOORS = [
    'sample', 'compress', 'compare', 'export', 'bench', 'example_svd_usage', 'example_mla_usage'
]
# each part may import itself and those to its left; experiments/ may also import DOORS
LAYERS = ['lowrank', 'runtime', 'data', 'model', 'train', 'tools']
LEAVES = {
    'lowrank': [], 'runtime': [], 'config': [], 'data': ['runtime'],
    'model': ['lowrank', 'runtime']
}
# words of this model that must not appear in runtime/, except in huggingface.py (GPT-2's format)
OWN_WORDS = r'(?i)svd_|_svd|latent|lora|adaptive|transformer\.[hw]|\bmla|low_?rank'
OPTIONAL = ['tiktoken', 'safetensors', 'datasets', 'wandb', 'matplotlib', 'transformers', 'peft',
            'huggingface_hub',
            'scipy', 'sklearn']


def imports(file):
    """Return the modules that a file imports, including imports inside functions."""
    nodes = [node for node in ast.walk(ast.parse((ROOT / file).read_text()))
             if isinstance(node, (ast.Import, ast.ImportFrom))]
    return {
        name for node in nodes for alias in node.names
        for name in ([node.module, f'{node.module}.{alias.name}'] if isinstance(
            node, ast.ImportFrom) else [alias.name])}


def module(file):
    return file.removesuffix('.py').removesuffix('/__init__').replace('/', '.')


def part(name):
    """Return the package or file that a path or module belongs to: 'lowrank/svd.py' and
    'lowrank.svd' -> 'lowrank'."""
    return re.split(r'[./]', name)[0]


def test_the_root_has_nine_doors():
    """The root folder has nine Python files: model.py, train.py and seven other commands and
    examples."""
    assert sorted(file for file in FILES if '/' not in file) == sorted(
        f'{name}.py' for name in [*DOORS, 'model', 'train'])


def test_imports_go_one_way_and_in_no_circle():
    parts, graph = {part(file) for file in FILES}, {}
    for file in FILES:
        own = part(file)
        above = LAYERS[:LAYERS.
                       index(own)] if own in LAYERS else LAYERS + DOORS * (own == 'experiments')
        allowed = {own, *LEAVES.get(own, above)}
        assert {part(name) for name in imports(file)} & {*parts, 'tests'} <= allowed, file
        graph[module(file)] = imports(file) & {module(other) for other in FILES if other != file}
    assert len([*TopologicalSorter(graph).static_order()]) == len(FILES)  # raises CycleError
    # `imports` finds both forms of import
    assert {'lowrank.head_svd', 'runtime.config'} <= graph['model'] and 'model' in graph['train']


def test_runtime_names_nothing_of_this_model():
    """runtime/ does not mention SVD, latents, LoRA or layer names, except in huggingface.py."""
    for file in FILES:
        if part(file) == 'runtime' and file != 'runtime/huggingface.py':
            code = ast.unparse(ast.parse(
                (ROOT / file).read_text())).replace('config/train_svd_test.py', '')
            assert not re.findall(OWN_WORDS, code), file


def python(code, folder, path=''):
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=folder,
                          timeout=300,
                          env={'PYTHONPATH': f'{path}:{ROOT}', 'OMP_NUM_THREADS': '1'})


def test_every_module_is_imported_without_optional_packages_and_does_no_work(tmp_path):
    """Every module can be imported without the optional packages. Importing prints nothing, writes
    no file, draws no random number and leaves signal handlers and the number of threads
    unchanged."""
    modules = [module(file) for file in FILES if not file.startswith('config/')]
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
    assert (done.returncode, done.stdout, done.stderr) == (0, '',
                                                           '') and not list(tmp_path.iterdir())


def test_a_missing_or_old_package_is_one_line_of_every_command(tmp_path):
    """Every command ends in a one-line error if torch is missing or too old, or if numpy and tqdm
    are missing."""
    commands = [file for file in FILES if '__main__' in (ROOT / file).read_text()]
    assert {'train.py', 'sample.py', 'bench.py', 'compare.py',
            'data/shakespeare/prepare.py'} <= {*commands}
    (tmp_path / 'old' / 'torch-2.8.1.dist-info').mkdir(parents=True)
    (tmp_path / 'old' / 'torch-2.8.1.dist-info' /
     'METADATA').write_text('Name: torch\nVersion: 2.8.1\n')
    for missing, path, words in ((['torch'], '', 'not installed: torch'),
                                 ([], tmp_path / 'old', 'torch 2.8.1 is too old'),
                                 (['numpy', 'tqdm'], '', 'not installed: numpy, tqdm')):
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
        lines = done.stdout.splitlines()
        assert done.stderr == '' and all(
            line.startswith(file.rpartition('/')[2] + ': ') and words in line
            and 'pip install -r requirements.txt' in line
            for line, file in zip(lines, commands, strict=True)), lines

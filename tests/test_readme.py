"""The commands in README.md and docs/ name files and options that exist, with values that pass the checks."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

import bench
import compare
import compress
import export
import plot_adaptive
import sample
import train
from runtime import config as configuration

ROOT = Path(__file__).resolve().parents[1]
TEXTS = {p.relative_to(ROOT).as_posix(): p.read_text()
         for p in (ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md')))}
CLASSES = {'train.py': train.TrainConfig, 'sample.py': sample.SampleConfig, 'bench.py': bench.BenchConfig,
           'export.py': export.ExportConfig, 'compress.py': compress.CompressConfig,
           'plot_adaptive.py': plot_adaptive.PlotConfig, 'compare.py': compare.CompareConfig}
COMMAND = (r'python ((?:train|sample|bench|export|compress|compare|plot_adaptive)\.py'
           r'(?: +(?:--[\w=.,/-]+|config/\w+\.py))*)')
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

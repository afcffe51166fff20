"""What scripts of users rely on is what tests/commands/surface.json says: options with types and defaults, keys of metrics
and checkpoints, files in OUT_DIR. Who changes it on purpose changes that file, and says so in the commit."""

import importlib
import json
import re
from pathlib import Path

import pytest

from helpers import checkpoint, rows

SURFACE = json.loads(Path(__file__).with_name('surface.json').read_text())
pytestmark = pytest.mark.usefixtures('one_thread')
KINDS = {'plain': ['--optimizer=muon'], 'svd': ['--use_svd=True', '--svd_rank=2', '--svd_method=randomized'],
         'adaptive': ['--n_embd=32', '--adaptive_svd=True', '--adaptive_svd_interval=1', '--max_iters=12']}


@pytest.mark.parametrize('command', SURFACE['options'])
def test_the_options_of_a_command(call, command):
    printed = call(importlib.import_module(command).main, '--help').out
    found = re.findall(r'^  --(\w+)(?:=(.*?))?  .*\[(.+?)\]$', printed, re.MULTILINE)
    assert {name: f'{default} [{kind}]' for name, default, kind in found} == SURFACE['options'][command]


@pytest.mark.parametrize('kind', KINDS)
def test_the_files_metrics_and_checkpoint_of_a_run(trained, kind):
    folder, expected = trained(*KINDS[kind]), SURFACE['runs'][kind]
    assert sorted(p.name for p in folder.iterdir()) == expected['files']
    assert sorted({key for row in rows() for key in row}) == expected['metrics']
    saved = checkpoint()
    assert sorted(saved) == expected['checkpoint']
    assert sorted(saved['model']) == expected['model']
    assert saved['model_args'].keys() <= saved['config'].keys()
    assert sorted(saved['config']) == sorted(set(SURFACE['options']['train']))

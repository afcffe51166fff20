"""Scripts of users rely on the options with types and defaults, the keys of metrics and
checkpoints, and the files in OUT_DIR. tests/commands/surface.json lists them. A deliberate change
edits that file, and its commit message says so."""

import importlib
import json
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

from helpers import checkpoint, rows
from runtime import config as configuration

SURFACE = json.loads(Path(__file__).with_name('surface.json').read_text())
pytestmark = pytest.mark.usefixtures('one_thread')
KINDS = {
    'plain': ['--optimizer=muon'],
    'svd': ['--use_svd=True', '--svd_rank=2', '--svd_method=randomized'], 'adaptive': [
        '--n_embd=32', '--adaptive_svd=True', '--adaptive_svd_interval=1', '--max_iters=12']
}


@pytest.mark.parametrize('command', SURFACE['options'])
def test_the_options_of_a_command(command):
    config = getattr(importlib.import_module(command), f'{command.title()}Config')
    hints, describe = configuration.hints_of(config), configuration.describe
    # a switch is listed without its default, False
    assert SURFACE['options'][command] == {
        f.name: f' [{describe(hints[f.name]).replace("True or False", "given or not")}]'
        if configuration.SWITCH in get_args(hints[f.name])
        else f'{f.default!r} [{describe(hints[f.name])}]' for f in fields(config)}


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

"""experiments/: the controls train, and the record becomes a table and a figure."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import model
import train
from conftest import ROOT, TINY, rows

spec = importlib.util.spec_from_file_location('loss_against_rank', ROOT / 'experiments' / 'loss_against_rank.py')
sweep = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sweep)


@pytest.mark.parametrize('control', sweep.CONTROLS)
def test_a_control_trains_and_is_evaluated(control, call, here, monkeypatch):
    monkeypatch.setattr(model, 'CausalSelfAttention', model.CausalSelfAttention)  # the run replaces both
    monkeypatch.setattr(train, 'sample', train.sample)
    options = [*TINY, '--use_svd=True', '--svd_scope=weight', '--svd_rank=2']
    assert call(lambda argv: sweep.train_here(control, argv), *options).code == 0
    assert rows()[-1]['final']


def test_the_controls_are_what_they_say():
    c = model.GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=16, use_svd=True, svd_rank=3)
    v = torch.randn(2, 2, 8, 8)
    random = sweep.RandomProjection(c)
    assert torch.linalg.matrix_rank(random.apply_svd_to_v(v)).eq(3).all()
    torch.testing.assert_close(random.projector @ random.projector, random.projector)
    narrow = sweep.NarrowValues(c)
    q, k, values = narrow.project(torch.randn(2, 8, 16))
    assert q.shape == k.shape == (2, 2, 8, 8) and values.shape == (2, 2, 8, 3)
    assert narrow(torch.randn(2, 8, 16)).shape == (2, 8, 16)


def test_the_record_becomes_a_table_and_a_figure(call, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, 'RECORD', tmp_path / 'record.jsonl')
    monkeypatch.setattr(sweep, 'FIGURE', tmp_path / 'figure.png')
    cfg = sweep.SweepConfig(out_dir=str(tmp_path / 'runs'), steps=20, seeds=2)
    for i, (name, row, _) in enumerate(sweep.runs(cfg)):
        folder = Path(cfg.out_dir) / name
        folder.mkdir(parents=True)
        final = {'iter': 20, 'final': True, 'val/loss': 2.0 + row['seed'] - 1337}
        (folder / 'metrics.jsonl').write_text(json.dumps(final) + '\n')
        (folder / 'environment.json').write_text(json.dumps({'torch': '2', 'git_commit': 'abcdefghij'}))
    sweep.collect(cfg)
    out = call(sweep.main, '--jobs=0').out
    assert '| causal, randomized | ' + ' | '.join(['2.500 +- 0.707'] * 4) + ' |' in out
    assert (tmp_path / 'figure.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('option', ['--jobs=0', '--jobs=-1', '--steps=1', '--dataset=nowhere', '--out_dir=/proc/x'])
def test_wrong_input_is_one_line(option, refused, here, monkeypatch):
    monkeypatch.setattr(sweep, 'RECORD', here / 'none.jsonl')
    argv = [option] if 'dataset' in option else [option, '--dataset=toy']
    assert option.removeprefix('--').partition('=')[0] in refused(sweep.main, *argv)

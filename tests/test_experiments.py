"""experiments/: controls train, the record becomes a table and a figure; both ways of latent attention are timed."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import model
import train
from conftest import ROOT, TINY, rows



def experiment(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / 'experiments' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sweep, absorb = experiment('loss_against_rank'), experiment('absorb_or_expand')


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


def test_absorbed_and_expanded_are_timed_and_equal(call, monkeypatch):
    shape = ['--n_embd=16', '--n_head=2', '--latents=4,8', '--queries=1,3', '--cached=8', '--rounds=2', '--device=cpu']
    found = call(absorb.main, *shape)
    results = json.loads(found.out.splitlines()[-1])['results']
    assert found.code == 0 and [(row['latent'], row['queries']) for row in results] == [(4, 1), (4, 3), (8, 1), (8, 3)]
    assert all(row['absorbed'] > 0 and row['expanded'] > 0 and row['ratio'] > 0 for row in results)
    monkeypatch.setattr(absorb, 'absorbed', lambda q, w_k, w_v, c: 2 * absorb.expanded(q, w_k, w_v, c))
    with pytest.raises(AssertionError):                             # what is not the same is not timed
        absorb.main(shape)


@pytest.mark.parametrize('option', ['--latents=0', '--queries=1,x', '--cached=0', '--rounds=1', '--n_embd=5'])
def test_wrong_shapes_are_one_line(option, refused):
    assert option.removeprefix('--').partition('=')[0] in refused(absorb.main, option)

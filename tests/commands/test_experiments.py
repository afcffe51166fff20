"""experiments/: controls train, records become tables and figures; both ways of latent attention are timed; methods of
compression are what they are called."""

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch

import compress_layers as layers
import model
import train
from helpers import ROOT, TEXT, TINY, rows
from runtime.dataset import write_dataset


def experiment(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / 'experiments' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sweep, absorb = experiment('loss_against_rank'), experiment('absorb_or_expand')
compression = experiment('compression_table')


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


@pytest.mark.slow
def test_the_sweep_runs_what_is_missing(call, here, monkeypatch):
    """In processes, a control among them; the second call has nothing to do."""
    monkeypatch.setattr(sweep, 'RECORD', here / 'record.jsonl')
    monkeypatch.setattr(sweep, 'RANKS', (2,))
    monkeypatch.setattr(sweep, 'SCOPES', ('weight',))
    monkeypatch.setattr(sweep, 'METHODS', ('gram',))
    monkeypatch.setattr(sweep, 'plot', lambda rows: None)           # of several scopes
    write_dataset(here / 'data' / 'long', 3 * TEXT, 'char', source='tests')
    options = ['--dataset=long', '--steps=20', '--seeds=1', '--jobs=2']
    found = call(sweep.main, *options)
    assert found.code == 0, found.out
    assert '4 of 4 runs done' in found.out and 'random_projection-2-1337: ' in found.out
    again = call(sweep.main, *options)
    assert again.out.startswith('4 of 4 runs done') and again.out.count('+-') == 4
    assert len(rows('.', 'record.jsonl')) == 4


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


# ----------------------------------------------------------------------------------------------------------------------
# compression

def random_model():
    """Weights of a size that makes every one of them count, and two batches of three windows each."""
    torch.manual_seed(0)
    dense = model.GPT(model.GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=17, bias=False))
    for p in dense.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return dense.eval().requires_grad_(False), [tuple(torch.randint(17, (2, 3, 8))) for _ in range(2)]


def test_fwsvd_weighs_rows_by_the_fisher_information_of_their_weights():
    """Against autograd's gradient of each window's loss, and the plain SVD of the weighted rows."""
    dense, windows = random_model()
    _, seen, found = compression.measure(dense, compression.METHODS['FWSVD'], windows)
    weight = dense.transformer.h[1].mlp.c_fc.weight.requires_grad_(True)                        # (64, 16)
    losses = [8 * dense(x[None], y[None])[1] for xs, ys in windows for x, y in zip(xs, ys)]
    information = sum(torch.autograd.grad(loss, weight)[0].square().sum(1) for loss in losses)
    torch.testing.assert_close(seen['h.1.mlp.c_fc'].information.float(), information)
    rows = information.double().sqrt()[:, None]
    u, s, vh = torch.linalg.svd(rows * weight.detach().double(), full_matrices=False)
    up, down = found['h.1.mlp.c_fc'].factors(5)
    torch.testing.assert_close(up @ down, (u[:, :5] * s[:5] @ vh[:5]) / rows, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found['h.1.mlp.c_fc'].energies, s ** 2, rtol=1e-4, atol=0)


def test_asvd_scales_columns_by_the_root_of_their_inputs():
    dense, windows = random_model()
    _, _, found = compression.measure(dense, compression.METHODS['ASVD'], windows)
    inputs, layer = [], dense.transformer.h[1].mlp.c_proj
    layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    for x, y in windows:
        dense(x, y)
    columns = torch.cat(inputs).double().abs().mean(0).sqrt()                                   # (64)
    u, s, vh = torch.linalg.svd(layer.weight.double() * columns, full_matrices=False)
    up, down = found['h.1.mlp.c_proj'].factors(5)
    torch.testing.assert_close(up @ down, (u[:, :5] * s[:5] @ vh[:5]) / columns, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize('label, product', [
    ('plain', 'plain'), pytest.param('whitened', 'whitened', marks=pytest.mark.slow),
    pytest.param('+ anchored', 'activation', marks=pytest.mark.slow)])
def test_the_ablation_is_of_what_compress_does(label, product):
    dense, windows = random_model()
    method, expected = compression.METHODS[label], copy.deepcopy(dense)
    layers.low_rank(expected, product, method.choose(0.6), layers.MODULES, windows)
    new = compression.factored(compression.measure(dense, method, windows), method, 0.6, windows)
    assert new.config == expected.config and all(map(torch.equal, new.state_dict().values(),
                                                     expected.state_dict().values()))


def test_scales_of_zero_are_survived():
    up, down = compression.Scaled(torch.randn(4, 6), torch.zeros(4), torch.tensor([1.0] * 5 + [0.0])).factors(4)
    assert up.isfinite().all() and down.isfinite().all()


@pytest.mark.parametrize('label', [name if name in ('plain', 'whitened') else pytest.param(name, marks=pytest.mark.slow)
                                   for name in compression.METHODS])
def test_every_method_keeps_to_the_budget(label):
    """Biases included, and all numbers of a block that were there before."""
    dense, windows = random_model()
    method = compression.METHODS[label]
    new = compression.factored(compression.measure(dense, method, windows), method, 0.6, windows)
    norms = 2 * 2 * 16
    kept = (compression.block_params(new) - norms) / (compression.block_params(dense) - norms)
    assert 0.45 < kept <= 0.6                                       # ranks are whole ones
    assert new(*windows[0])[1].isfinite()


@pytest.mark.slow
def test_the_table_is_made_once_and_gone_on_with(call, here, in_process, monkeypatch):
    """Two runs that make one thing after another, then everything again: no row twice."""
    monkeypatch.setitem(compression.MODELS, 'small', [*TINY, '--n_head=1'])
    monkeypatch.setattr(compression, 'CALIBRATION_TOKENS', 128)
    for name, value in (('TUNED_KEEPS', (0.6,)), ('RECORD', here / 'record.jsonl'), ('FIGURE', here / 'figure.png')):
        monkeypatch.setattr(compression, name, value)
    options = ['--dataset=toy', '--models=small', '--keeps=0.6', '--finetune_iters=2', '--seeds=2']
    for parts in ('methods', 'finetune,scratch', 'methods,finetune,scratch'):
        found = call(compression.main, *options, f'--parts={parts}')
        assert found.code == 0, found.err
    made = rows('.', 'record.jsonl')
    assert len(made) == 1 + (1 + 2 * 8) + 2 * 2 + 2 * 2 * 2     # dense, methods, fine-tuned, from scratch
    keys = [tuple(row.get(k) for k in ('method', 'keep', 'seed', 'steps')) for row in made]
    assert len(set(keys)) == len(keys) and all(row['loss'] > 0 for row in made)
    narrow, full = (next(r['block_params'] for r in made if r['method'] == method) for method in ('narrower', 'dense'))
    assert 0.5 < narrow / full < 0.7
    assert all(f'| {label} |' in found.out for label in compression.METHODS)
    assert '| narrower, from scratch, keep 0.6 |' in found.out and '| dense |' in found.out
    assert (here / 'figure.png').read_bytes().startswith(b'\x89PNG')
    assert call(compression.main, '--run=False').out.startswith('small: ')


@pytest.mark.parametrize('option', ['--run=False', '--models=large', '--parts=all', '--keeps=0.65', '--seeds=0',
                                    '--dataset=nowhere'])
def test_wrong_input_of_the_table_is_one_line(option, refused, here, monkeypatch):
    monkeypatch.setattr(compression, 'RECORD', here / 'none.jsonl')
    assert option.removeprefix('--').partition('=')[0] in refused(compression.main, option)

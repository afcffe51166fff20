"""python bench.py --svd: every method and scope is there, the exact ones are exact, what cannot be is refused."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bench
import bench_svd
from helpers import TINY, checkpoint
from lowrank.svd import low_rank_approximation
from runtime import config as configuration
from runtime import timing

pytestmark = pytest.mark.usefixtures('one_thread')
TINY_SVD = [*TINY, '--svd', '--pairs=2', '--svd_rank=3', '--svd_block=4', '--vocab_size=17']
CASES = {(scope, method) for scope in ('sequence', 'causal', 'weight')
         for method in ('standard', 'gram', 'randomized cold', 'randomized warm')} - {('weight', 'randomized warm')}
SPECTRA = ['Gaussian', '1/i', '1/i^2', '0.9^i', 'low rank + noise']


def settings(*options):
    return configuration.load(bench.BenchConfig, [*TINY_SVD, *options])[0]


@pytest.fixture
def measured(call, here, monkeypatch):
    """measured(*options) -> what is printed before the last line, and what that says."""
    monkeypatch.setattr(timing, 'LEAST_SECONDS', 0)                 # no time is looked at

    def measured(*options):
        result = call(bench.main, *TINY_SVD, *options)
        assert result.code == 0, result.err
        *lines, last = result.out.splitlines()
        return lines, json.loads(last, parse_constant=pytest.fail)  # NaN is not JSON
    return measured


def check_quality(found, sources):
    """Every case is there for every source; nothing is better than the best; the exact methods are as good."""
    for source in sources:
        rows = [row for row in found['quality'] if row['source'] == source]
        assert {(row['scope'], row['method']) for row in rows} == CASES
        for row in rows:
            assert row['residual_worst'] >= row['residual_mean'] >= 1 - 1e-6
            cosines = [row[f'cosine_{name}_{which}'] for name in ('full', 'constant') for which in ('mean', 'min')]
            assert all(-1 <= value <= 1 + 1e-9 for value in cosines)
            if not row['method'].startswith('randomized'):
                assert row['residual_worst'] == pytest.approx(1, abs=1e-6)
                assert min(cosines) == pytest.approx(1, abs=1e-4)   # where a gap is small, float32 tells


@pytest.mark.slow
def test_every_method_and_scope_is_measured(measured, here):
    """Without a checkpoint; with a figure."""
    lines, found = measured('--plot=figure.png')
    assert [(row['scope'], row['method']) in CASES for row in found['methods']] == [True] * len(CASES)
    for row in found['methods']:
        for quantity in ('basis', 'forward', 'fwd_bwd'):
            low, high = row[f'{quantity}_quartiles_ms']
            assert 0 < low <= row[f'{quantity}_ms'] <= high
        # the result and the gradient at least: (4, 2, 16, 8), or W_v (2, 8, 16), of float32
        assert row['peak_bytes'] >= 2 * 4 * (2 * 8 * 16 if row['scope'] == 'weight' else 4 * 2 * 16 * 8)
        assert row['step'].keys() == {'a_ms', 'b_ms', 'ratio', 'ratio_quartiles'}
    check_quality(found, SPECTRA)
    counts = {row['scope']: row['matrices'] for row in found['quality']}
    assert counts == {'sequence': 4 * 2, 'causal': 4 * 2 * 2, 'weight': 2}                  # prefixes of 4 and 8 tokens
    assert {row['reference'] for row in found['references']} >= {'torch.linalg.svd', 'torch.svd_lowrank'}
    exact = [row for row in found['reference_residuals'] if row['reference'] == 'torch.linalg.svd']
    assert [row['residual_worst'] for row in exact] == pytest.approx([1] * len(SPECTRA), abs=1e-6)
    assert found['trained'] is None and any('synthetic spectra only: there is no out/ckpt.pt' in li for li in lines)
    assert lines[-1] == 'figure: figure.png'
    content = (here / 'figure.png').read_bytes()
    assert content.startswith(b'\x89PNG\r\n\x1a\n') and len(content) > 10_000
    assert sorted(path.name for path in here.iterdir()) == ['data', 'figure.png']


def test_v_of_a_trained_checkpoint_is_measured(measured, fit):
    """A run with a running basis of its own."""
    fit('--use_svd=True', '--svd_rank=3', '--svd_block=4', '--n_layer=2', '--dropout=0.1', '--svd_method=randomized',
        '--svd_scope=causal')
    lines, found = measured('--steps=False', '--batch_size=3')
    assert 'out/ckpt.pt, 4 steps' in found['trained'] and '3 validation windows of toy;' in found['trained']
    assert found['trained'].endswith('its own svd_basis') and found['timed_on'] == 'trained, layer 1'
    assert all(row['step'] is None for row in found['methods'])
    check_quality(found, ['trained, layer 0', 'trained, layer 1', *SPECTRA])


def test_a_checkpoint_without_a_basis_is_warmed_by_training_windows(here, fit, monkeypatch):
    """And never by those that are measured; in 'weight' scope the gradient is that at the cut W_v."""
    fit('--use_svd=True', '--svd_rank=3', '--svd_scope=weight')
    drawn, batch = [], bench_svd.Dataset.batch
    monkeypatch.setattr(bench_svd.Dataset, 'batch', lambda data, split, *args, **options:
                        drawn.append(split) or batch(data, split, *args, **options))
    (source,), words = bench_svd.trained_sources(settings(), 'cpu')
    assert words.endswith('starts from 8 batches of training windows') and drawn == ['train'] * 8 + ['val']
    assert source.warm.warm and not source.cold.warm
    model = bench_svd.GPT.from_checkpoint(checkpoint())
    assert torch.equal(source.w, model.transformer.h[0].attn.c_attn.value_weight()) and source.dw.abs().max() > 0


def test_the_captured_gradients_are_those_of_the_loss(here, fit):
    """Moving the cut V along its gradient changes the loss as that says, and nothing of the pass is left behind."""
    fit('--use_svd=True', '--svd_rank=3')
    model = bench_svd.GPT.from_checkpoint(checkpoint()).double().eval()
    x, y = (torch.randint(17, (2, 16), generator=torch.Generator().manual_seed(i)) for i in range(2))
    ((v, dv, w, dw),) = bench_svd.capture(model, x, y)
    attn = model.transformer.h[0].attn
    assert v.shape == dv.shape == (2, 2, 16, 8) and w.shape == dw.shape == (2, 8, 16)
    assert not {'apply_svd_to_v', 'project'} & vars(attn).keys()
    assert all(p.grad is None for p in model.parameters())
    losses = []
    for sign in (-1, 1):
        attn.apply_svd_to_v = lambda v, sign=sign: type(attn).apply_svd_to_v(attn, v) + sign * 1e-4 * dv / dv.norm()
        losses.append(model(x, y)[1].item())
    assert (losses[1] - losses[0]) / 2e-4 == pytest.approx(dv.norm().item(), rel=1e-4)


def test_a_checkpoint_of_another_shape_or_without_data_is_passed_over_with_a_line(here, fit):
    fit()
    for option, words in (('--n_head=4 --svd_rank=2', '(n_head=2)'), ('--block_size=17', '(block_size=16)')):
        found, line = bench_svd.trained_sources(settings(*option.split()), 'cpu')
        assert not found and line == f'synthetic spectra only: out/ckpt.pt has another shape {words}'
    saved = checkpoint()
    saved['config']['dataset'] = 'gone'
    torch.save(saved, 'out/ckpt.pt')
    found, line = bench_svd.trained_sources(settings('--dataset=lost'), 'cpu')
    assert not found and 'no data for out/ckpt.pt: dataset=gone' in line and 'dataset=lost' in line
    found, line = bench_svd.trained_sources(settings(), 'cpu')
    assert len(found) == 1 and 'windows of toy' in line
    saved['tokenizer']['chars'].reverse()
    torch.save(saved, 'out/ckpt.pt')
    found, line = bench_svd.trained_sources(settings(), 'cpu')
    assert not found and 'dataset=toy: has another vocabulary' in line


def test_a_method_that_is_not_the_best_is_seen(monkeypatch):
    """V cut to a tenth too little: what is left of it counts."""
    def short(x, rank, method, *args, **options):
        return low_rank_approximation(x, rank, method, *args, **options) * (0.9 if method == 'gram' else 1)
    monkeypatch.setattr(bench_svd, 'low_rank_approximation', short)
    cfg = settings()
    rows = bench_svd.source_quality(cfg, bench_svd.cases_of(cfg), bench_svd.synthetic_source(cfg, '0.9^i', 'cpu'))
    ratios = {row['method']: row['residual_mean'] for row in rows if row['scope'] == 'sequence'}
    assert ratios['gram'] > 1.01 > ratios['standard']


def test_without_causal_bases_that_scope_is_left_out(capsys):
    assert {*bench_svd.cases_of(settings('--svd_block=16'))} == {case for case in CASES if case[0] != 'causal'}
    assert capsys.readouterr().out.startswith('svd_block=16: ')


def test_steps_that_take_too_long_are_left_out_with_a_line(capsys, monkeypatch):
    monkeypatch.setattr(bench_svd, 'STEPS_SECONDS', 0)
    rows = [{}]
    bench_svd.whole_steps(settings(), 'cpu', [None], None, rows)
    assert rows == [{'step': None}] and '(--steps=True times them all the same)' in capsys.readouterr().out


def test_scikit_learn_is_a_reference_where_it_is_installed(monkeypatch):
    """Here by a fake: NumPy's SVD in its place."""
    def randomized_svd(matrix, rank, random_state):
        u, s, vh = np.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank]
    for name in ('sklearn', 'sklearn.utils', 'sklearn.utils.extmath'):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(randomized_svd=randomized_svd))
    x = torch.randn(2, 3, 9, 5, generator=torch.Generator().manual_seed(0))
    found = {name: f(x) for name, f in bench_svd.references_for(settings()).items()}
    torch.testing.assert_close(found['sklearn randomized_svd'], found['torch.linalg.svd'])
    monkeypatch.setitem(sys.modules, 'sklearn.utils.extmath', None)
    assert [*bench_svd.references_for(settings())] == ['torch.linalg.svd', 'torch.svd_lowrank']


def test_the_peak_counts_what_is_held_at_once():
    def f():
        a = torch.ones(1000)                                        # 4,000 bytes
        b = a.double()                                              # and 8,000
        del a
        return b + 1                                                # without a: 8,000 more
    assert timing.peak_bytes(f, 'cpu') == pytest.approx(16_000, abs=500)


def test_a_bare_plot_has_a_name_of_its_own():
    assert settings('--plot').plot_path() == 'bench-svd.png' and settings().plot_path() is None


@pytest.mark.parametrize('options, words', [
    (['--svd_rank=None'], 'svd_rank=None: --svd: needs a rank (valid: 1 to 7)'),
    (['--svd_rank=8'], 'svd_rank=8: --svd: at full rank nothing is cut (valid: 1 to 7)'),
    (['--block_size=3'], 'svd_rank=3: --svd: at full rank nothing is cut (valid: 1 to 2)'),
    (['--n_embd=2'], 'needs one of 2 or more'), (['--svd=False', '--plot'], 'plot=True: only with --svd'),
    (['--svd=False', '--steps=True'], 'steps=True: only with --svd'),
    (['--plot=figure.pdf'], "nearest: 'figure.pdf.png'"), (['--plot='], 'must be the name of a PNG'),
    (['--plot=nowhere/figure.png'], 'a folder that exists'), (['--decode'], 'decode=True: not together with --svd'),
    (['--check'], 'check=True: not together with --svd'), (['--pairs=1'], 'nearest: 2'),
    (['--batch_size=1000000000'], 'make one smaller'), (['--steps=maybe'], "True or False or 'auto'")])
def test_what_cannot_be_is_refused(here, refused, options, words):
    assert words in refused(bench.main, *TINY_SVD, *options)


def test_a_damaged_checkpoint_is_refused(here, refused):
    (here / 'out').mkdir()
    (here / 'out' / 'ckpt.pt').write_bytes(b'no')
    assert 'out/ckpt.pt: damaged' in refused(bench.main, *TINY_SVD)


def test_a_figure_without_matplotlib_is_refused_before_anything_is_measured(here, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    assert 'plot=True: needs a package: pip install matplotlib' in refused(bench.main, *TINY_SVD, '--plot')

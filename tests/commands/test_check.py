"""python bench.py --check: what it prints, and that each kind of wrong would be seen."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import bench
import check
import model
import train
from helpers import ROOT
from lowrank.svd import EXACT_METHODS, low_rank_approximation
from model import METHODS, SCOPES, GPTConfig

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture
def run(call, monkeypatch, tmp_path):
    """run(*groups) runs these groups of checks, by default all but the compiler's -> code, lines, JSON row by name."""
    monkeypatch.chdir(tmp_path)
    for name in ('TORCHINDUCTOR', 'TRITON'):                        # set by the check, taken back here
        monkeypatch.setenv(f'{name}_CACHE_DIR', os.environ.get(f'{name}_CACHE_DIR', ''))

    def run(*groups, options=()):
        monkeypatch.setattr(check, 'GROUPS', groups or [g for g in check.GROUPS if g is not check.compiled])
        result = call(bench.main, '--check', '--device=cpu', *options)
        *lines, last = result.out.splitlines()
        assert not result.err and not list(tmp_path.iterdir())
        return result.code, lines, {row['check']: row for row in json.loads(last)['checks']}
    return run


def wrong(value):
    """A method result that is wrong by a thousandth."""
    return lambda x, rank, method='gram', basis_grad=True, **options: value ** (
        method != 'gram') * low_rank_approximation(x, rank, method, basis_grad, **options)


def test_everything_holds_on_the_cpu(run):
    code, lines, rows = run()
    assert code == 0 and lines[0].startswith('python 3.') and torch.__version__ in lines[0] and 'cpu' in lines[1]
    assert f'{len(rows)} checks, 0 failed, 1 skipped' in lines[-1]
    assert lines[2:-1] == [f'{row["verdict"]:5} {name}: {row["detail"]}' for name, row in rows.items()]
    assert [name for name, row in rows.items() if row['verdict'] != 'ok'] == ['device = CPU']
    assert 'threads, float32, seed 1337' in lines[1]


@pytest.mark.slow
def test_dtype_and_seed_are_those_asked_for(run):
    code, lines, rows = run(check.resume, options=['--dtype=bfloat16', '--seed=3'])
    assert code == 0 and list(rows) == ['resumed run = uninterrupted run, bfloat16']
    assert lines[1].endswith('bfloat16, seed 3')


def test_a_method_wrong_by_a_thousandth_fails(run, monkeypatch):
    monkeypatch.setattr(model, 'low_rank_approximation', wrong(1.001))
    monkeypatch.setattr(check, 'low_rank_approximation', wrong(1.001))
    code, lines, rows = run(check.methods)
    failed = {name for name, row in rows.items() if row['verdict'] == 'FAIL'}
    assert code == 1 and failed == {"standard = gram, 'sequence'", "standard = gram, 'weight'",
                                    'standard = float64 torch.linalg.svd'}
    assert f'{len(rows)} checks, 3 failed, 0 skipped' in lines[-1]
    assert sum(line.startswith('FAIL ') for line in lines) == 3


def test_a_wrong_gradient_fails(run, monkeypatch):
    monkeypatch.setattr(check, 'low_rank_approximation', lambda x, rank, method: low_rank_approximation(x, rank, method,
                                                                                                      basis_grad=False))
    _, _, rows = run(check.methods)
    assert rows['gram = float64 torch.linalg.svd']['verdict'] == 'FAIL'


@pytest.mark.parametrize('scope', ['causal', 'sequence'])
def test_a_scope_that_sees_the_wrong_tokens_fails(run, monkeypatch, scope):
    """'causal' that leaks; 'sequence' that sees nothing, so that the check could not tell."""
    if scope == 'causal':
        monkeypatch.setattr(model, 'causal_low_rank_approximation', lambda x, block, **options:
                            low_rank_approximation(x, **options))
    else:
        monkeypatch.setattr(model, 'low_rank_approximation', lambda x, **options: x)
    code, _, rows = run(check.causality)
    assert code == 1 and [name for name, row in rows.items() if row['verdict'] == 'FAIL'] == [
        {'causal': "no token sees a later one, 'causal'", 'sequence': "'sequence' sees later tokens"}[scope]]


def test_a_full_rank_that_changes_something_fails(run, monkeypatch):
    monkeypatch.setattr(model, 'low_rank_approximation', lambda x, **options: x * (1 + 2e-7))
    monkeypatch.setattr(GPTConfig, 'svd_truncates', property(
        lambda config: config.use_svd and config.svd_method in EXACT_METHODS))           # the other needs a rank
    code, _, rows = run(check.no_truncation)
    assert code == 1 and rows["full rank = baseline, 'sequence'"]['verdict'] == 'FAIL'
    assert rows['SVD off = baseline']['verdict'] == rows["full rank = baseline, 'causal'"]['verdict'] == 'ok'


def test_a_gradient_that_is_not_finite_fails(run, monkeypatch):
    def by_autograd(x, rank, method='gram'):
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        return u[..., :rank] * s[..., None, :rank] @ vh[..., :rank, :]
    monkeypatch.setattr(check, 'low_rank_approximation', by_autograd)
    code, _, rows = run(check.degenerate)
    assert code == 1 and rows['degenerate V, zeros']['verdict'] == 'FAIL'


def test_a_resume_that_loses_the_random_state_fails(run, monkeypatch):
    """By more than is allowed where kernels add in no fixed order."""
    def forgetful(argv, real=train.main):
        if '--init_from=resume' in argv:
            path = Path(next(arg for arg in argv if arg.startswith('--out_dir=')).partition('=')[2]) / 'ckpt.pt'
            saved = torch.load(path, weights_only=True)
            saved['random'][0]['torch'] = torch.Generator().manual_seed(0).get_state()
            torch.save(saved, path)
        return real(argv)
    monkeypatch.setattr(train, 'main', forgetful)
    code, _, rows = run(check.resume)
    (row,) = rows.values()
    assert (code, row['verdict']) == (1, 'FAIL')
    assert float(re.search(r'differ by (\S+)', row['detail'])[1]) > 0.1


def test_an_svd_in_half_precision_fails(run, monkeypatch):
    def careless(x, rank, method):
        """X P, with the product left to autocast."""
        w = torch.linalg.eigh((x.mT @ x).double())[1][..., -rank:].to(x.dtype)
        return x @ (w @ w.mT)
    monkeypatch.setattr(check, 'low_rank_approximation', careless)
    code, _, rows = run(check.autocast)
    assert code == 1 and rows['bfloat16: SVD in float32']['verdict'] == 'FAIL'


def test_a_check_that_raises_fails_in_one_line_and_the_others_run(run, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError('no kernel\nfor this device')
    monkeypatch.setattr(train, 'build_optimizer', broken)
    monkeypatch.setattr(model.CausalSelfAttention, 'value_weight', broken)
    code, lines, rows = run(check.optimizers, check.causality)
    assert code == 1 and 'FAIL  one step of muon: RuntimeError: no kernel for this device' in lines
    assert rows["no token sees a later one, 'weight'"]['verdict'] == 'FAIL'
    assert rows["no token sees a later one, 'causal'"]['verdict'] == 'ok'


def test_a_training_run_that_ends_badly_fails_with_its_last_line(run, monkeypatch):
    monkeypatch.setattr(train, 'main', lambda argv: print('train.py: too bad', file=sys.stderr) or 2)
    code, lines, _ = run(check.resume)
    assert code == 1 and lines[2].endswith('FAIL  resumed run = uninterrupted run, float32: RuntimeError: train.py '
                                           'ended with 2: train.py: too bad')


def test_values_that_are_not_finite_are_never_near():
    nan = torch.tensor([1.0, float('nan')])
    assert not check.within(check.difference([torch.ones(2), nan], [torch.ones(2), torch.ones(2)]), 1.0)[0]
    assert not check.within(check.difference([nan, torch.ones(2)], [torch.ones(2), torch.ones(2)]), 1.0)[0]


@pytest.mark.parametrize('kind', ['cuda', 'mps'])
@pytest.mark.slow
def test_what_is_only_checked_elsewhere_holds_here_too(tmp_path, kind):
    """The CPU under another kind's name: the comparison with the CPU, the wider bounds, float16 with its scaler."""
    setup = check.Setup('cpu', kind, 'float32', 1337, tmp_path, 0)
    rows = {name: f() for group in (check.methods, check.device_against_cpu, check.causality, check.no_truncation,
                                    check.resume) for name, f in group(setup)}
    assert all(ok for ok, _ in rows.values()), rows
    assert sum(name.startswith('cpu = CPU') for name in rows) == 4 + len(METHODS) * len(SCOPES)      # two with latents
    assert ('resumed run = uninterrupted run, float16' in rows) == (kind == 'cuda')


# ----------------------------------------------------------------------------------------------------------------------
# torch.compile

def test_compilation_is_skipped_with_the_reason_where_nothing_compiles(run, monkeypatch):
    def compile(*args, **options):
        raise RuntimeError('No working C++ compiler found')
    monkeypatch.setattr(torch, 'compile', compile)
    code, _, rows = run(check.compiled)
    assert code == 0 and {row['detail'] for row in rows.values()} == {
        'not even x + 1 compiles here (RuntimeError: No working C++ compiler found)'}
    assert len(rows) == 4 + len(METHODS) * len(SCOPES) and {row['verdict'] for row in rows.values()} == {'skip'}


def test_a_model_that_does_not_compile_where_others_do_fails(run, monkeypatch):
    def compile(f, fullgraph=False):
        if fullgraph:
            raise RuntimeError('graph break')
        return f
    monkeypatch.setattr(torch, 'compile', compile)
    code, _, rows = run(check.compiled)
    assert code == 1 and {row['verdict'] for row in rows.values()} == {'FAIL'}


@pytest.mark.parametrize('kind', ['cpu', 'mps'])
def test_what_the_compiler_of_mps_cannot_do_is_skipped(monkeypatch, tmp_path, kind):
    def compile(f, fullgraph=False):
        if fullgraph:
            raise torch._dynamo.exc.BackendCompilerFailed(compile, NotImplementedError('no such kernel'), None)
        return f
    monkeypatch.setattr(torch, 'compile', compile)
    _, baseline = next(check.compiled(check.Setup('cpu', kind, 'float32', 1337, tmp_path, time.perf_counter())))
    expected = check.Skip if kind == 'mps' else torch._dynamo.exc.BackendCompilerFailed
    with pytest.raises(expected, match='no such kernel'):
        baseline()


def test_compilation_does_not_begin_late(run, monkeypatch):
    monkeypatch.setattr(check, 'COMPILE_UNTIL', 0)
    code, _, rows = run(check.compiled)
    assert code == 0 and {row['detail'] for row in rows.values()} == {'not begun: 0 s have passed'}


@pytest.mark.slow
def test_the_command(tmp_path):
    """The compiler included; alone in its process, for inductor remembers folders that are gone."""
    result = subprocess.run([sys.executable, ROOT / 'bench.py', '--check', '--device=cpu'], cwd=tmp_path,
                            capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert all(line.startswith(('ok    ', 'skip  ')) for line in lines[2:-2]), result.stdout
    assert 'compiled = eager, baseline' in result.stdout and ' 0 failed' in lines[-2]
    assert len(json.loads(lines[-1])['checks']) == len(lines) - 4 and not list(tmp_path.iterdir())

"""Checkpoints and exports of earlier versions, made by tests/fixtures/make.py, can still be loaded,
with the same loss, and trained further."""

import shutil

import pytest

import sample
import train
from helpers import ROOT, checkpoint, rows

FIXTURES = ROOT / 'tests' / 'fixtures'
RUNS = ['plain', 'muon', 'svd_basis', 'mla', 'factored', 'lora', 'adaptive']
EXPORTS = {
    'export_gpt2': 'plain', 'export_nanogpt': 'plain', 'export_safetensors': 'mla',
    'export_dense': 'adaptive'
}


@pytest.fixture(autouse=True)
def fixtures(here, one_thread):
    shutil.copytree(FIXTURES, here, dirs_exist_ok=True)


def loss_of(call, *options):
    result = call(train.main, *options, '--dataset=toy', '--eval_only=True', '--out_dir=out',
                  '--device=cpu')
    assert result.code == 0, result.err
    return rows('out', 'eval.jsonl')[-1]['val/loss']


@pytest.mark.parametrize('name', RUNS)
def test_a_run_has_its_loss_and_goes_on(call, name):
    """A run of an earlier version has its recorded loss, resumes and gives samples."""
    steps, trained = checkpoint(name)['iter_num'], rows(name)[-1]['val/loss']
    resumed = ['--init_from=resume', f'--out_dir={name}', '--device=cpu']
    assert call(train.main, *resumed, '--eval_only=True').code == 0
    assert rows(name, 'eval.jsonl')[-1]['val/loss'] == pytest.approx(trained, rel=1e-5)
    result = call(train.main, *resumed, f'--max_iters={steps + 2}')
    assert result.code == 0, result.err
    assert checkpoint(name)['iter_num'] == steps + 2
    assert call(sample.main, f'--out_dir={name}', '--max_new_tokens=5', '--device=cpu').code == 0


def test_the_adaptive_run_is_in_low_rank_mode_and_stays_there(call):
    assert checkpoint('adaptive')['model_args']['adaptive_svd_ranks'] == {'h.0.attn.c_attn.c_q': 17}
    assert call(train.main, '--init_from=resume', '--out_dir=adaptive', '--device=cpu',
                '--max_iters=15').code == 0
    key = 'svd/block0.attn.c_q/mode'
    assert [row[key] for row in rows('adaptive') if key in row and row['iter'] == 15] == ['lowrank']


def test_a_stopped_run_goes_on_from_last_pt(call):
    """A run that was stopped by Ctrl-C resumes from last.pt, not from the older ckpt.pt."""
    best, before = checkpoint('last')['iter_num'], rows('last')
    result = call(train.main, '--init_from=resume', '--out_dir=last', '--device=cpu',
                  '--max_iters=13')
    assert result.code == 0, result.err
    # a resume from ckpt.pt, of step 10, would repeat steps 11 and 12 with other times in the rows
    assert best == 10 and rows('last')[:len(before)] == before and rows('last')[-1]['iter'] == 13


@pytest.mark.parametrize('name', EXPORTS)
def test_an_export_has_the_loss_of_its_run(call, name):
    assert loss_of(call, f'--init_from={name}') == pytest.approx(
        rows(EXPORTS[name])[-1]['val/loss'], rel=1e-5)


def test_adapters_have_the_loss_of_their_run(call):
    """Exported adapters on their base have the recorded loss. Without a base they end in a one-line
    error."""
    loss = loss_of(call, '--init_from=plain', '--lora_adapter=export_lora')
    assert loss == pytest.approx(rows('lora')[-1]['val/loss'], rel=1e-5)
    refused = call(train.main, '--init_from=export_lora', '--dataset=toy', '--device=cpu')
    assert refused.code == 2 and '--lora_adapter=export_lora' in refused.err

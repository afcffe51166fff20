"""LoRA and adaptive SVD from one script to the next: train.py --init_from=FOLDER, sample.py, export.py, compress.py,
bench.py, plot_adaptive.py."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

import bench
import compress
import export
import plot_adaptive
import sample
import special_layers
import train
from helpers import TINY, checkpoint, equal, folder_bytes, rows
from lowrank.lora import INITS
from model import GPT
from runtime import pretrained
from runtime.dataset import Dataset
from runtime.files import write_atomically
from test_adaptive_training import PLAN, RUN, assert_same_run, plain_names, planned, resume

pytestmark = pytest.mark.usefixtures('one_thread', 'here')
BASE = ['--out_dir=base', '--n_layer=2', '--bias=True']
LORA = ['--init_from=base', '--lora_rank=3']
WORDS = ['c_q', 'c_k', 'c_v', 'c_proj', 'c_fc', 'mlp.c_proj']
FIRST = ['--dataset=toy', '--batch_size=4', '--gradient_accumulation_steps=1', '--max_iters=4', '--lr_decay_iters=4',
         '--learning_rate=1e-2', '--eval_interval=2', '--eval_iters=2', '--device=cpu']


@pytest.fixture
def tuned(call, monkeypatch):
    """tuned(*options) trains what another folder holds, whose shape it has -> what is printed."""
    monkeypatch.setattr(train, 'sample', lambda *args: '')

    def tuned(*options):
        result = call(train.main, *FIRST, *options)
        assert result.code == 0, result.err
        return result.out
    return tuned


def interim(folder):
    """The losses of evaluations on the way."""
    return [(row['train/loss'], row['val/loss']) for row in rows(folder) if 'train/loss' in row]


def final(folder):
    return [row['val/loss'] for row in rows(folder) if 'final' in row][-1]


def loss_of(model):
    """Over all of val, as at the end of a run."""
    return compress.loss_of(model, Dataset('data/toy'), 'cpu', 1337)


def loss_in(folder):
    """Of a checkpoint, or of a model that --init_from takes."""
    return loss_of(GPT.from_pretrained(str(folder)))


def started(*, folder='base', **options):
    """The model as train.py begins with it."""
    model = GPT.from_pretrained(folder, dict(dropout=0.0))
    torch.manual_seed(1337)
    special_layers.add(model, special_layers.NONE | options)
    return model


def is_adapter(name):
    return name.endswith(('.A.weight', '.B.weight'))


# ----------------------------------------------------------------------------------------------------------------------
# LoRA: what is trained

@pytest.mark.parametrize('init', INITS)
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_lora_trains_its_adapters_alone(fit, tuned, init, optimizer):
    """From the base's loss; all else stays to the bit, the folder of the base as well."""
    fit(*BASE)
    before = folder_bytes('base')
    out = tuned(*LORA, f'--lora_init={init}', f'--optimizer={optimizer}', '--lora_targets=c_q,mlp.c_proj')
    assert folder_bytes('base') == before
    assert f'LoRA, {init!r}: rank 3 in 4 layers, {2 * 3 * (16 + 16 + 64 + 16):,} trained parameters' in out
    assert interim('out')[0] == pytest.approx(interim('base')[-1], abs=1e-5)
    begun, saved = started(lora_rank=3, lora_init=init, lora_targets='c_q,mlp.c_proj'), checkpoint()
    assert saved['model'].keys() == begun.state_dict().keys()
    for name, w in begun.state_dict().items():
        assert torch.equal(w, saved['model'][name]) != is_adapter(name), name
    if init == 'lora':
        plain = {name: w for name, w in saved['model'].items() if not is_adapter(name)}
        assert equal(plain_names(plain), checkpoint('base')['model'])
    states = saved['optimizer'].values() if optimizer == 'muon' else [saved['optimizer']]
    assert sum(len(state['state']) for state in states) == 8
    losses = [row['loss'] for row in rows() if 'loss' in row]
    assert len(losses) == 4 and final('out') < final('base')
    assert final('out') == pytest.approx(loss_in('out'), abs=1e-6)


@pytest.mark.parametrize('kind', ['safetensors', 'gpt2'])
def test_lora_on_weights_in_safetensors(fit, tuned, call, kind):
    fit(*BASE)
    assert call(export.main, '--out_dir=base', f'--to={kind}', '--save_dir=folder').code == 0
    before = folder_bytes('folder')
    tuned('--init_from=folder', '--lora_rank=3', '--out_dir=out')
    tuned(*LORA, '--out_dir=same')
    assert folder_bytes('folder') == before
    assert equal(checkpoint()['model'], checkpoint('same')['model'])


@pytest.mark.parametrize('words, names', [
    *((word, [special_layers.TARGETS[word]]) for word in WORDS), (','.join(WORDS), WORDS),
    (' c_fc , c_q', ['c_q', 'c_fc']),
    ('query', ['query']), ('query,c_proj,c_fc,mlp.c_proj', ['c_proj', 'query', 'c_fc', 'mlp.c_proj'])])
def test_lora_targets(fit, tuned, words, names):
    mla = ['--use_mla=True'] if 'query' in words else []
    fit(*BASE, *mla)
    tuned(*LORA, f'--lora_targets={words}', '--max_iters=1', '--eval_iters=1')
    model = GPT.from_checkpoint(checkpoint())
    expected = [f'h.{i}.{special_layers.TARGETS.get(name, name)}' for i in range(2) for name in names]
    assert model.config.lora_layers == expected
    found = {name for name, layer in model.transformer.named_modules() if hasattr(layer, 'change')}
    assert found == set(expected)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f'transformer.{name}.{factor}.weight' for name in expected for factor in 'AB'}


def test_lora_with_a_shorter_context_trains_no_positions(fit, tuned):
    fit(*BASE)
    out = tuned(*LORA, '--block_size=8')
    assert 'rank 3 in 4 layers, 384 trained parameters' in out
    assert torch.equal(checkpoint()['model']['transformer.wpe.weight'],
                       checkpoint('base')['model']['transformer.wpe.weight'][:8])


def test_lora_alpha_counts(fit, tuned):
    fit(*BASE)
    tuned(*LORA, '--lora_alpha=12')
    layer = GPT.from_checkpoint(checkpoint()).get_layer('h.1.attn.c_attn.c_v')
    assert (layer.scale, layer.rank) == (4, 3)


def test_the_file_of_the_repository(fit, call, monkeypatch):
    monkeypatch.setattr(train, 'sample', lambda *args: '')
    fit(*BASE)
    config = Path(train.__file__).with_name('config') / 'finetune_lora.py'
    result = call(train.main, config, '--init_from=base', '--dataset=toy', '--device=cpu', '--max_iters=2')
    assert result.code == 0, result.err
    saved = checkpoint('out-lora')['model_args']
    assert (saved['lora_rank'], saved['lora_alpha'], saved['n_embd'], saved['n_layer']) == (8, 16, 16, 2)
    assert interim('out-lora')[0][1] == pytest.approx(final('base'), abs=.3)


@pytest.mark.parametrize('option', ['--lora_targets=query', '--lora_targets=query,c_fc'])
def test_the_shape_need_not_be_given_again(fit, tuned, option):
    """Which words are valid, how many blocks and how large ranks may be is for the weights to say."""
    fit(*BASE, '--use_mla=True')
    tuned(*LORA, option, '--max_iters=1')
    assert checkpoint()['model_args']['use_mla'] is True


def test_more_blocks_than_by_default(fit, tuned, refused):
    fit('--out_dir=base', '--n_layer=14', '--n_embd=32', '--max_iters=1')
    tuned('--init_from=base', '--adaptive_svd=True', '--adaptive_svd_target_layer=13', '--max_iters=1')
    assert checkpoint()['model_args']['adaptive_svd_target_layer'] == 13
    assert 'must be 0 to 13' in refused(train.main, *FIRST, '--init_from=base', '--adaptive_svd=True',
                                        '--adaptive_svd_target_layer=14')


# ----------------------------------------------------------------------------------------------------------------------
# LoRA: resuming

@pytest.mark.parametrize('options', ['', '--optimizer=muon --lora_init=pissa --gradient_accumulation_steps=2'])
@pytest.mark.parametrize('stop', [4, pytest.param(5, marks=pytest.mark.slow)])
def test_a_resumed_lora_run_is_the_undisturbed_one(fit, call, tuned, options, stop):
    fit(*BASE, '--dropout=.1')
    options = [*LORA, *options.split(), '--dropout=.2', '--lora_dropout=.3', '--lora_alpha=5', '--lr_decay_iters=9',
               '--lora_targets=c_q,c_proj,c_fc']
    tuned(*options, '--max_iters=9', '--out_dir=whole')
    tuned(*options, f'--max_iters={stop}')
    resume(call, 9)
    assert_same_run('out', 'whole', config=True)


def test_the_config_of_a_lora_run_can_be_run(fit, tuned, call):
    fit(*BASE)
    tuned(*LORA, '--lora_init=milora', '--lora_dropout=.1')
    assert call(train.main, 'out/config.py', '--out_dir=again').code == 0
    assert_same_run('out', 'again', config=True)


def test_lora_where_the_base_is_moves_it_aside(fit, tuned):
    """As every run does with one that is in its folder."""
    fit(*BASE)
    before = folder_bytes('base')
    out = tuned(*LORA, '--out_dir=base')
    assert 'base holds a run: moved to base.1' in out and folder_bytes('base.1') == before


@pytest.mark.parametrize('init', INITS)
def test_adapters_alone_come_back(fit, tuned, call, init):
    """To the bit where they began with the base's weights; PiSSA's and MiLoRA's as plain ones of twice the rank."""
    fit(*BASE)
    tuned(*LORA, f'--lora_init={init}', '--lora_alpha=7')
    result = call(export.main, '--out_dir=out', '--to=lora', '--save_dir=adapter')
    assert result.code == 0, result.err
    model, options = GPT.from_pretrained('base'), pretrained.read_adapter('adapter')
    special_layers.load_adapters(model, *options)
    for to in ('gpt2', 'nanogpt', 'safetensors'):                   # whatever they are stored as, and cropped
        assert call(export.main, '--out_dir=base', f'--to={to}').code == 0
        stored = GPT.from_pretrained(f'base-{to}')
        stored.crop_block_size(3)
        assert special_layers.base_sha256(stored) == options[2]['base_sha256']
    assert model.config.lora_rank == (3 if init == 'lora' else 6) and options[0]['lora_targets'] == 'c_q,c_v'
    assert loss_of(model) == pytest.approx(loss_in('out'), abs=1e-5)
    own = GPT.from_checkpoint(checkpoint())
    for name in model.config.lora_layers:
        mine, theirs = model.get_layer(name), own.get_layer(name)
        assert mine.scale == pytest.approx(theirs.scale) and torch.allclose(mine.weight, theirs.weight, atol=1e-5)
        if init == 'lora':
            assert equal(mine.state_dict(), theirs.state_dict())
    tuned('--init_from=base', '--lora_adapter=adapter', '--eval_only=True', '--out_dir=evaluated')
    assert rows('evaluated', 'eval.jsonl')[-1]['val/loss'] == pytest.approx(final('out'), abs=1e-5)
    tuned('--init_from=base', '--lora_adapter=adapter', '--max_iters=1', '--out_dir=again')
    result = call(train.main, '--init_from=resume', '--out_dir=again', '--max_iters=2', '--device=cpu')
    assert result.code == 0, result.err
    result = call(sample.main, '--out_dir=base', '--lora_adapter=adapter', '--device=cpu', '--max_new_tokens=5')
    assert result.code == 0 and 'with adapter' in result.out


def test_adapters_that_do_not_fit(fit, tuned, call, refused):
    fit(*BASE)
    fit('--out_dir=wider', '--n_layer=2', '--n_embd=32')
    tuned(*LORA)
    assert call(export.main, '--out_dir=out', '--to=lora', '--save_dir=adapter').code == 0
    own = ['--dataset=toy', '--device=cpu', '--out_dir=new', '--lora_adapter=adapter']
    assert 'lora_adapter: h.0.attn.c_attn.c_q.A is (3, 16), must be (3, 32)' in refused(
        train.main, *own, '--init_from=wider')
    assert 'lora_adapter: out has adapters already' in refused(train.main, *own, '--init_from=out')
    fit(*BASE, '--out_dir=other', '--seed=1')
    for main, argv in ((train.main, [*own, '--init_from=other']), (sample.main, [*own[1:], '--out_dir=other'])):
        line = refused(main, *argv)
        assert "lora_adapter='adapter': was made on other weights, of base, than other has (nearest: " in line
    write_atomically(Path('adapter/model.safetensors'), save(load_file('adapter/model.safetensors')))
    result = call(sample.main, '--out_dir=other', '--lora_adapter=adapter', '--device=cpu', '--max_new_tokens=5')
    assert result.code == 0 and "lora_adapter='adapter': does not say which" in result.out      # as older ones
    assert "lora_adapter='adapter': goes with the weights" in refused(train.main, *own)
    assert call(export.main, '--out_dir=base', '--to=safetensors', '--save_dir=whole').code == 0
    assert 'not of an adapter' in refused(train.main, *own, '--init_from=base', '--lora_adapter=whole')
    assert 'has no LoRA (nearest: --to=safetensors)' in refused(export.main, '--out_dir=base', '--to=lora')
    assert 'cannot be read' in refused(train.main, *own, '--init_from=base', '--lora_adapter=nowhere')


def test_a_lora_run_as_the_start_of_another(fit, tuned, refused):
    """It stays one, with its adapters."""
    fit(*BASE)
    tuned(*LORA, '--out_dir=first')
    out = tuned('--init_from=first', '--out_dir=second')
    assert 'LoRA' in out and interim('second')[0] == pytest.approx(interim('first')[-1], abs=1e-6)
    for name, w in checkpoint('first')['model'].items():
        assert torch.equal(w, checkpoint('second')['model'][name]) != is_adapter(name), name
    tuned('--init_from=first', '--lora_rank=3', '--out_dir=third')
    assert equal(checkpoint('second')['model'], checkpoint('third')['model'])
    assert 'has lora_rank=3, which is fixed (nearest: python export.py --to=dense --out_dir=first)' in refused(
        train.main, *FIRST, '--init_from=first', '--lora_rank=2')
    assert 'adaptive_svd' in refused(train.main, *FIRST, '--init_from=first', '--adaptive_svd=True')


# ----------------------------------------------------------------------------------------------------------------------
# LoRA: what is refused

@pytest.mark.parametrize('base, options, words', [
    ([], ['--lora_rank=17'], ['lora_rank=17', 'must be 1 to 16']), ([], ['--lora_rank=0'], ['lora_rank=0']),
    ([], ['--lora_rank=-1'], ['lora_rank=-1']), ([], ['--lora_rank=1.5'], ['lora_rank']),
    ([], ['--lora_rank=2', '--lora_targets=c_x'], ["'c_x' is none of c_q, c_k, c_v, c_proj, c_fc, mlp.c_proj"]),
    ([], ['--lora_rank=2', '--lora_targets='], ["'' is none of"]),
    ([], ['--lora_rank=2', '--lora_targets=query'], ["'query' is none of"]),
    ([], ['--lora_rank=2', '--lora_targets=c_attn'], ["'c_attn' is none of"]),
    (['--use_mla=True'], ['--lora_rank=2', '--use_mla=True'], ["'c_q' is none of c_proj, query, c_fc, mlp.c_proj"]),
    (['--use_mla=True'], ['--lora_rank=2', '--use_mla=True', '--lora_targets=c_fc,c_v'], ["'c_v' is none of"]),
    ([], ['--lora_rank=2', '--lora_init=pisa'], ['lora_init', 'pissa']),
    ([], ['--lora_rank=2', '--lora_alpha=0'], ['lora_alpha=0']),
    ([], ['--lora_rank=2', '--lora_alpha=-1'], ['lora_alpha=-1']),
    ([], ['--lora_rank=2', '--lora_alpha=inf'], ['lora_alpha=', 'inf']),
    ([], ['--lora_rank=2', '--lora_dropout=1'], ['lora_dropout=1']),
    ([], ['--lora_rank=2', '--lora_dropout=-.1'], ['lora_dropout=-0.1']),
    ([], ['--lora_rank=2', '--adaptive_svd=True'], ['lora_rank=2', 'not together with adaptive_svd']),
    (["--layer_ranks={'h.0.attn.c_attn.c_q':3}"], ['--lora_rank=2'],
     ["layer_ranks={'h.0.attn.c_attn.c_q': ..}", 'product of two']),
    (["--layer_ranks={'h.1.mlp.c_fc':3}"], ['--lora_rank=2', '--lora_targets=c_fc'], ['layer_ranks=', 'h.1.mlp.c_fc']),
    (['--adaptive_svd=True'], ['--lora_rank=2'], ['lora_rank=2', 'base has']),
    ([], ['--lora_alpha=0'], ['lora_alpha=0']), ([], ['--lora_init=pisa'], ['lora_init', 'pissa'])])
def test_refused_lora_options(fit, refused, base, options, words):
    fit(*BASE, '--max_iters=1', '--eval_iters=1', '--n_embd=16', *base)
    before = folder_bytes('.')
    line = refused(train.main, *FIRST, '--init_from=base', *options)
    assert all(word in line for word in words), line
    assert folder_bytes('.') == before


def test_lora_needs_trained_weights(refused):
    line = refused(train.main, *TINY, '--lora_rank=2')
    assert 'lora_rank=2: adapts trained weights (nearest: --init_from=FOLDER)' in line and not Path('out').exists()


def test_a_plain_run_is_not_resumed_with_lora(fit, refused):
    """It would be overwritten."""
    fit(*BASE)
    before = folder_bytes('base')
    line = refused(train.main, '--init_from=resume', '--out_dir=base', '--device=cpu', '--lora_rank=2', '--max_iters=9')
    assert 'lora_rank=2' in line and 'which is fixed' in line and folder_bytes('base') == before


def test_options_of_a_resumed_lora_run_are_fixed(fit, tuned, refused):
    fit(*BASE)
    tuned(*LORA)
    before = folder_bytes('out')
    for option in ('--lora_rank=2', '--lora_alpha=1', '--lora_targets=c_q', '--lora_init=pissa', '--adaptive_svd=True'):
        refused(train.main, '--init_from=resume', '--device=cpu', '--max_iters=9', option)
    assert folder_bytes('out') == before


# ----------------------------------------------------------------------------------------------------------------------
# sample.py, export.py, compress.py, bench.py

def finished(kind, fit, tuned, monkeypatch):
    """A run in out/, of the kind; its final loss."""
    if kind.startswith('adaptive'):
        planned(monkeypatch)
        mla = ['--use_mla=True', '--adaptive_svd_targets=query,c_proj'] if 'MLA' in kind else []
        fit(*RUN, *PLAN, '--bias=True', *mla)
        assert len(checkpoint()['model_args']['adaptive_svd_ranks']) == 2
    else:
        mla = ['--use_mla=True'] if 'MLA' in kind else []
        fit(*BASE, *mla)
        words = 'query,c_proj,c_fc' if mla else ','.join(WORDS)
        tuned(*LORA, '--lora_init=pissa', f'--lora_targets={words}', '--lora_alpha=6', *mla)
    return final('out')


KINDS = ['LoRA', 'LoRA, MLA', 'adaptive', 'adaptive, MLA']
each_kind = pytest.mark.parametrize('kind', KINDS)
each_kind_slowly = pytest.mark.parametrize('kind', [pytest.param(kind, marks=[pytest.mark.slow] * (kind in KINDS[1:3]))
                                                    for kind in KINDS])


@each_kind
def test_exports_have_the_loss_of_the_run(fit, tuned, call, monkeypatch, kind):
    expected = finished(kind, fit, tuned, monkeypatch)
    assert loss_in('out') == pytest.approx(expected, abs=1e-6)
    for to in ('dense', 'gpt2', 'nanogpt', 'safetensors'):
        result = call(export.main, '--out_dir=out', f'--to={to}')
        assert result.code == 0, result.err
        assert ('merged into the weights: adaptive SVD or LoRA of' in result.out) == (to != 'safetensors')
        assert loss_in(f'out-{to}') == pytest.approx(expected, abs=1e-5), to
        model = GPT.from_pretrained(f'out-{to}')
        own = {key: getattr(model.config, key) for key in special_layers.NONE}
        assert (own == special_layers.NONE) == (to != 'safetensors')
        assert all(p.requires_grad for p in model.parameters()) or to == 'safetensors'
    same, ours = GPT.from_pretrained('out-safetensors'), GPT.from_pretrained('out')
    assert same.config == ours.config and equal(same.state_dict(), ours.state_dict())
    assert [p.requires_grad for p in same.parameters()] == [p.requires_grad for p in ours.parameters()]


@each_kind_slowly
@pytest.mark.slow
def test_exports_can_be_trained(fit, tuned, call, monkeypatch, kind):
    """From the folder, and a dense one also by resuming it; it begins with the run's loss."""
    finished(kind, fit, tuned, monkeypatch)
    for to in ('dense', 'safetensors', 'gpt2'):
        assert call(export.main, '--out_dir=out', f'--to={to}').code == 0
        tuned(f'--init_from=out-{to}', f'--out_dir=from-{to}', '--max_iters=0')
        assert final(f'from-{to}') == pytest.approx(final('out'), abs=1e-5), to
    steps = checkpoint('out-dense')['iter_num']
    before = checkpoint('out-dense')['model']
    resume(call, steps + 2, '--out_dir=out-dense')
    after = checkpoint('out-dense')
    assert after['iter_num'] == steps + 2
    assert not any(torch.equal(w, after['model'][name]) for name, w in before.items() if name.endswith('.weight'))


def test_a_dense_export_of_a_plain_run_is_the_run(fit, call):
    fit(*BASE)
    assert call(export.main, '--out_dir=base', '--to=dense').code == 0
    assert equal(checkpoint('base-dense')['model'], checkpoint('base')['model'])
    assert checkpoint('base-dense')['model_args'] == checkpoint('base')['model_args']


@each_kind
def test_samples_are_those_of_the_merged_weights(fit, tuned, call, monkeypatch, kind):
    finished(kind, fit, tuned, monkeypatch)
    assert call(export.main, '--out_dir=out', '--to=dense').code == 0
    draw = ['--device=cpu', '--num_samples=2', '--max_new_tokens=30', '--start=the', '--temperature=0']
    texts = [call(sample.main, *draw, *options).out for options in (
        ['--out_dir=out'], ['--out_dir=out-dense'], ['--init_from=out'], ['--init_from=out-dense'])]
    assert len({text.split('\n', 1)[1] for text in texts}) == 1
    assert 'nan' not in texts[0] and texts[2].startswith('out; SVD on V off')


@each_kind_slowly
@pytest.mark.slow
def test_compress_takes_them(fit, tuned, call, refused, monkeypatch, kind):
    expected = finished(kind, fit, tuned, monkeypatch)
    before, ways = folder_bytes('out'), ['--keep=.5', '--keep=.5 --method=plain', '--to=mla --mla_latent_dim=4']
    for number, options in enumerate(ways):
        argv = [*options.split(), '--out_dir=out', f'--save_dir=to{number}', '--device=cpu', '--calibration_tokens=256']
        if 'to=mla' in options and 'MLA' in kind:
            assert 'is MLA already' in refused(compress.main, *argv)
            continue
        result = call(compress.main, *argv)
        assert result.code == 0, result.err
        report = json.loads(Path(f'to{number}/compress.json').read_text())
        assert report['val_loss'][0] == pytest.approx(expected, abs=1e-5)
        assert loss_in(f'to{number}') == pytest.approx(report['val_loss'][1], abs=1e-5)
        args = checkpoint(f'to{number}')['model_args']
        assert {key: args[key] for key in special_layers.NONE} == special_layers.NONE
        resume(call, 1, f'--out_dir=to{number}')
    assert folder_bytes('out') == before


@pytest.mark.parametrize('kind', [KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
def test_compress_by_init_from_and_spectrum(fit, tuned, call, monkeypatch, kind):
    expected = finished(kind, fit, tuned, monkeypatch)
    assert call(export.main, '--out_dir=out', '--to=safetensors').code == 0
    for name in ('out', 'out-safetensors'):
        result = call(compress.main, f'--init_from={name}', '--dataset=toy', '--keep=.5', f'--save_dir={name}-small',
                      '--device=cpu', '--calibration_tokens=256')
        assert result.code == 0, result.err
        report = json.loads(Path(f'{name}-small/compress.json').read_text())
        assert report['val_loss'][0] == pytest.approx(expected, abs=1e-5)
    result = call(compress.main, '--spectrum', '--out_dir=out')
    assert result.code == 0, result.err
    assert Path('out-spectrum/spectrum.png').read_bytes().startswith(b'\x89PNG')
    assert 'base' not in result.out.replace('out_dir=base', '') and '.A' not in result.out


@each_kind_slowly
@pytest.mark.parametrize('decode', [False, True])
@pytest.mark.slow
def test_bench_takes_them(fit, tuned, call, monkeypatch, kind, decode):
    finished(kind, fit, tuned, monkeypatch)
    before = folder_bytes('out')
    options = ['--decode', '--tokens=2', '--contexts=3'] if decode else ['--svd_rank=3', '--svd_block=4']
    result = call(bench.main, '--init_from=resume', '--out_dir=out', '--device=cpu', '--pairs=2', *options)
    assert result.code == 0, result.err
    assert json.loads(result.out.splitlines()[-1])['results']
    assert folder_bytes('out') == before
    result = call(bench.main, '--init_from=resume', '--out_dir=out', '--device=cpu', '--pairs=2', *options[:3],
                  '--svd_rank=None')
    assert result.code in (0, 2) and 'Traceback' not in result.err


def test_an_adaptive_run_in_low_rank_mode_as_the_start_of_another(fit, tuned, monkeypatch):
    finished('adaptive', fit, tuned, monkeypatch)
    out = tuned('--init_from=out', '--out_dir=more', '--adaptive_svd_interval=2', '--max_iters=8')
    assert out.count('=== SVD Analysis at step') == 4 and interim('more')[0][1] < 3
    assert final('more') < final('out') + .1
    saved = checkpoint('more')
    assert GPT.from_checkpoint(saved).config.adaptive_svd_ranks == saved['model_args']['adaptive_svd_ranks'] is not None


# ----------------------------------------------------------------------------------------------------------------------
# init_from a run's folder

def test_a_run_as_the_start_of_another(fit, tuned):
    """All is trained, from step 0."""
    fit(*BASE)
    tuned('--init_from=base')
    assert interim('out')[0] == pytest.approx(interim('base')[-1], abs=1e-6)
    before, after = checkpoint('base')['model'], checkpoint()
    assert not any(torch.equal(w, after['model'][name]) for name, w in before.items()) and after['iter_num'] == 4


def test_its_shape_is_fixed(fit, refused):
    fit(*BASE)
    for option in ('--n_layer=1', '--n_embd=32', '--use_mla=True', '--bias=False', '--gelu=tanh', '--block_size=32'):
        line = refused(train.main, *FIRST, '--init_from=base', option)
        assert option[2:] in line and not Path('out').exists()


def test_tokens_of_another_text_are_refused(fit, refused):
    fit(*BASE)
    Path('other.txt').write_text('quick brown foxes jump over lazy dogs\n' * 40)
    line = refused(train.main, *FIRST, '--init_from=base', '--dataset=other.txt')
    assert "dataset=other.txt: its characters are not those of base; new: 'jkm" in line and not Path('out').exists()
    line = refused(compress.main, '--init_from=base', '--dataset=other.txt', '--device=cpu')
    assert 'its characters are not those of base' in line


def test_svd_options_are_taken_from_the_command_line(fit, tuned):
    svd = ['--use_svd=True', '--svd_rank=3', '--svd_scope=weight']
    fit(*BASE, *svd)
    tuned('--init_from=base', '--out_dir=kept', '--max_iters=0')
    assert final('kept') == pytest.approx(final('base'), abs=1e-6)
    tuned('--init_from=base', '--out_dir=changed', '--svd_rank=2', '--svd_scope=causal', '--svd_block=4',
          '--max_iters=1')
    args = checkpoint('changed')['model_args']
    assert (args['use_svd'], args['svd_rank'], args['svd_scope'], args['svd_block']) == (True, 2, 'causal', 4)
    out = tuned('--init_from=base', '--lora_rank=2', '--out_dir=lora', '--max_iters=1')
    assert 'SVD on V: rank 3' in out and checkpoint('lora')['model_args']['svd_scope'] == 'weight'
    assert interim('lora')[0] == pytest.approx(interim('base')[-1], abs=1e-5)


def test_the_basis_of_randomized_comes_along(fit, tuned):
    """Else its loss would be another one."""
    fit(*BASE, '--use_svd=True', '--svd_rank=2', '--svd_scope=causal', '--svd_block=4', '--svd_method=randomized')
    tuned('--init_from=base', '--max_iters=0')
    assert final('out') == pytest.approx(final('base'), abs=1e-6)


@pytest.mark.parametrize('damage', [
    lambda saved: saved['model'].pop('transformer.h.0.mlp.c_fc.weight'),
    lambda saved: saved['model_args'].update(n_layer=3), lambda saved: saved['model_args'].update(n_embd='x'),
    lambda saved: saved['model_args'].update(unknown=1), lambda saved: saved['model_args'].update(lora_rank=2),
    lambda saved: saved['model_args'].update(lora_rank=2, lora_targets='c_x'),
    lambda saved: saved['model_args'].update(lora_rank=99), lambda saved: saved['model_args'].update(adaptive_svd=True),
    lambda saved: saved['model'].update(x=torch.full((2,), math.nan)), lambda saved: saved.pop('model_args'),
    lambda saved: saved.update(tokenizer=3), lambda saved: saved.update(tokenizer=dict(tokenizer='char'))])
def test_a_damaged_checkpoint_is_one_line(fit, refused, damage):
    fit(*BASE, '--max_iters=1', '--eval_iters=1')
    saved = checkpoint('base')
    damage(saved)
    torch.save(saved, 'base/ckpt.pt')
    for options in ([], ['--lora_rank=2']):
        line = refused(train.main, *FIRST, '--init_from=base', *options)
        assert 'base' in line, line
    assert 'base' in refused(sample.main, '--init_from=base', '--device=cpu')
    assert 'base' in refused(compress.main, '--init_from=base', '--dataset=toy', '--device=cpu')
    assert not Path('out').exists() and not Path('base-lowrank').exists()


@pytest.mark.parametrize('content', [b'', b'PK\x03\x04', b'no checkpoint', 'half'])
def test_a_damaged_file_is_one_line(fit, refused, content):
    fit(*BASE, '--max_iters=1', '--eval_iters=1')
    path = Path('base/ckpt.pt')
    path.write_bytes(path.read_bytes()[:len(path.read_bytes()) // 2] if content == 'half' else content)
    for main, options in ((train.main, [*FIRST, '--lora_rank=2']), (sample.main, ['--device=cpu'])):
        assert 'base/ckpt.pt: damaged' in refused(main, '--init_from=base', *options)
    assert not Path('out').exists()


def test_a_folder_that_holds_nothing(refused):
    Path('empty').mkdir()
    assert "init_from='empty': has no ckpt.pt" in refused(train.main, *FIRST, '--init_from=empty', '--lora_rank=2')
    Path('empty/ckpt.pt').mkdir()
    assert "init_from='empty': has no ckpt.pt" in refused(train.main, *FIRST, '--init_from=empty', '--lora_rank=2')


# ----------------------------------------------------------------------------------------------------------------------
# plot_adaptive.py

PNG = b'\x89PNG\r\n\x1a\n'


@pytest.mark.parametrize('options', [
    [], ['--max_iters=3', '--log_interval=1000'], pytest.param(['--log_interval=1000'], marks=pytest.mark.slow)])
def test_a_figure_of_a_run(fit, call, monkeypatch, options):
    """Also where no loss was noted, and of a first analysis alone."""
    planned(monkeypatch)
    fit(*RUN, *PLAN, '--n_layer=2', '--adaptive_svd_target_layer=-1', '--max_iters=8', *options)
    before = folder_bytes('out')
    result = call(plot_adaptive.main, '--out_dir=out')
    assert (result.code, result.out) == (0, 'figure: out/adaptive_svd.png\n'), result.err
    assert Path('out/adaptive_svd.png').read_bytes().startswith(PNG)
    assert folder_bytes('out').keys() - before.keys() == {'adaptive_svd.png'}
    assert call(plot_adaptive.main, '--out_dir=out').code == 0


def test_a_figure_of_latent_attention_and_of_a_resumed_run(fit, call, monkeypatch):
    planned(monkeypatch)
    fit(*RUN, *PLAN, '--use_mla=True', '--adaptive_svd_targets=query', '--max_iters=5')
    resume(call, 9)
    assert call(plot_adaptive.main, '--out_dir=out').code == 0


def test_no_figure_without_a_run_or_analyses(fit, refused):
    assert "out_dir='out-adaptive-svd': no run there" in refused(plot_adaptive.main)
    Path('empty').mkdir()
    assert "out_dir='empty': no run there" in refused(plot_adaptive.main, '--out_dir=empty')
    fit('--use_svd=True', '--svd_rank=3')
    before = folder_bytes('out')
    assert 'out/metrics.jsonl: has no analysis' in refused(plot_adaptive.main, '--out_dir=out')
    assert folder_bytes('out') == before
    Path('empty/metrics.jsonl').touch()
    assert 'empty/metrics.jsonl: has no analysis' in refused(plot_adaptive.main, '--out_dir=empty')
    Path('folder/metrics.jsonl').mkdir(parents=True)
    assert 'folder/metrics.jsonl: cannot be read' in refused(plot_adaptive.main, '--out_dir=folder')


ROW = '{"iter": 20, "svd/block0.attn.c_q/mode": "full", "svd/block0.attn.c_q/r": 3}\n'


@pytest.mark.parametrize('content', [
    b'\xff\xfe', b'{"iter": 1', b'nonsense\n', b'3\n', b'[]\n', b'null\n', b'"svd/x/mode"\n', b'[["svd/x/mode"]]\n',
    ROW.encode() + b'{"iter": 1, "lo', ROW.replace('"iter": 20, ', '').encode(), ROW.replace('20', '"x"').encode(),
    ROW.replace('block0', 'x').encode(), ROW.replace(': 3', ': "x"').encode(), ROW.replace(': 3', ': [3, 4]').encode(),
    ROW.replace(': 3', ': null').encode(), ROW.encode() + b'{"loss": 1}\n',
    ROW.encode() + b'{"iter": 1, "loss": "x"}\n',
    b'{"iter": 1, "svd/mode": "full"}\n', b'[' * 100_000, ROW.replace('20', '{}').encode()])
def test_no_figure_of_a_damaged_file(refused, content):
    Path('out').mkdir()
    Path('out/metrics.jsonl').write_bytes(content)
    assert refused(plot_adaptive.main, '--out_dir=out').startswith('plot_adaptive.py: out/metrics.jsonl: ')
    assert not Path('out/adaptive_svd.png').exists()


def test_no_figure_where_it_cannot_be_written(refused):
    Path('out/adaptive_svd.png').mkdir(parents=True)
    Path('out/metrics.jsonl').write_text(ROW)
    assert 'out/adaptive_svd.png: cannot be written' in refused(plot_adaptive.main, '--out_dir=out')

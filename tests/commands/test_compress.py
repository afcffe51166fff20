"""compress.py, the command: what it writes, says and refuses, and what its methods lose of a trained
model."""

import csv
import json
import math
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

import compress
import compress_layers as layers
import export
import sample
import train
from helpers import TEXT, checkpoint, equal, folder_bytes, rows
from model import GPT, GPTConfig
from runtime.dataset import Dataset, write_dataset
from runtime.run import lock

pytestmark = pytest.mark.usefixtures('one_thread')
# runs that have learnt something
LEARN = ('--max_iters=100', '--lr_decay_iters=100', '--eval_interval=100', '--learning_rate=2e-2',
         '--optimizer=muon')
NO_BIAS, BIAS = (*LEARN, '--bias=False'), (*LEARN, '--bias=True')
QUICK = ('--device=cpu', '--calibration_tokens=512')
PARTS = [f'h.0.{part}' for part in ('attn.c_attn.c_q', 'attn.c_attn.c_k', 'attn.c_attn.c_v', 'attn.c_proj',
                                    'mlp.c_fc', 'mlp.c_proj')]


def report_of(folder):
    # NaN is not JSON
    return json.loads(Path(folder, 'compress.json').read_text(), parse_constant=pytest.fail)


@pytest.fixture
def shrink(call, monkeypatch):
    """shrink(*options, save_dir) -> the report of compress.py. The samples are left out: they take longer
    than the compression."""
    monkeypatch.setattr(compress, 'text_of', lambda *args: 'a text')

    def shrink(*options, save_dir='small'):
        result = call(compress.main, *QUICK, f'--save_dir={save_dir}', *options)
        assert result.code == 0, result.err
        return report_of(save_dir)
    return shrink


def change(folder='out', without=(), **changes):
    """Change a checkpoint on disk."""
    saved = checkpoint(folder) | changes
    torch.save({key: value for key, value in saved.items() if key not in without}, Path(folder, 'ckpt.pt'))


def model_of(folder):
    return GPT.from_checkpoint(checkpoint(folder)).eval()


def loss_in(folder):
    return compress.loss_of(model_of(folder), Dataset('data/toy'), 'cpu', 1337)


# ------------------------------------------------------------------------------------------------------------
# what is lost

@pytest.mark.parametrize('run, options, methods', [
    (NO_BIAS, ['--keep=.5'], ['activation', 'whitened', 'plain']),
    (BIAS, ['--keep=.3'], ['activation', 'whitened']),
    (NO_BIAS, ['--to=mla', '--mla_latent_dim=4'], ['activation', 'plain']),
    (BIAS, ['--to=mla', '--mla_latent_dim=2'], ['activation', 'plain'])])
def test_text_helps_and_gradients_help_more(trained, shrink, run, options, methods):
    trained(*run)
    found = [shrink(*options, f'--method={method}', save_dir=method)['val_loss'] for method in methods]
    losses = [after for _, after in found]
    assert losses == sorted(losses) and found[0][0] - .01 < losses[0]


def test_the_seed_decides_and_the_validation_split_teaches_nothing(trained, shrink):
    """Another split gives the same model and another loss, another seed another model."""
    trained(*NO_BIAS)
    losses, models = [], []
    for seed in (1, 1, 2):
        losses += shrink('--finetune_iters=3', f'--seed={seed}', '--out_dir=out',
                         save_dir=str(len(losses)))['val_loss'][:1]
        models.append(checkpoint(str(len(losses) - 1))['model'])
        np.roll(np.fromfile('data/toy/val.bin', np.uint16)[::-1], 5).tofile('data/toy/val.bin')
    assert equal(models[0], models[1]) and not equal(models[0], models[2]) and losses[1] > losses[0] + .1


def test_where_v_sees_the_future_the_loss_is_prefix_only(trained, shrink):
    """And there is no cache to report on."""
    trained(*NO_BIAS)
    change(model_args=checkpoint()['model_args'] | dict(use_svd=True, svd_rank=2))
    report = shrink('--keep=0.5')
    assert report['prefix_only'] and report['cache_bytes'] == [0, 0]
    assert report['val_loss'] == pytest.approx([loss_in('out'), loss_in('small')], abs=1e-6)


# ------------------------------------------------------------------------------------------------------------
# what is written

def check_checkpoint(folder, **changed):
    """It starts a run at step 0, with the settings of the run that it was made from and these changes."""
    saved, old = checkpoint(folder), checkpoint('out')
    assert saved.keys() == {*'model optimizer model_args iter_num best_val_loss config tokenizer'.split()}
    assert (saved['iter_num'], saved['optimizer']['state'], saved['tokenizer']) == (0, {}, old['tokenizer'])
    assert saved['model_args'] == old['model_args'] | changed
    assert saved['config'] == old['config'] | changed | dict(out_dir=folder)
    assert [saved['best_val_loss']] * 2 == pytest.approx([loss_in(folder), report_of(folder)['val_loss'][1]],
                                                         abs=1e-6)
    numbers = sum(w.numel() for name, w in saved['model'].items() if name != 'lm_head.weight')
    # and no larger tensors
    for size in (report_of(folder)['bytes'][1], Path(folder, 'ckpt.pt').stat().st_size):
        assert 4 * numbers < size < 4 * numbers + 40_000


@pytest.mark.parametrize('run, options, keep',
                         [(NO_BIAS, [], .6), (BIAS, ['--method=whitened', '--keep=.3'], .3)])
def test_the_report_is_what_the_checkpoint_says(trained, call, run, options, keep):
    trained(*run)
    result = call(compress.main, *QUICK, '--out_dir=out', *options)
    assert result.code == 0 and sorted(os.listdir('out-lowrank')) == ['ckpt.pt', 'compress.json']
    report, models = report_of('out-lowrank'), (model_of('out'), model_of('out-lowrank'))
    ranks, loss = {name: layer['rank'] for name, layer in report['layers'].items()}, report['val_loss']
    check_checkpoint('out-lowrank', layer_ranks=ranks)
    blocks = [sum(p.numel() for p in m.transformer.h.parameters()) for m in models]
    expected = dict(params=[sum(p.numel() for p in m.parameters()) for m in models], block_params=blocks,
                    attention_params=[m.attention_params() for m in models], finetune_seconds=None,
                    prefix_only=False,
                    cache_bytes=[m.kv_cache_bytes(1, 16) for m in models], latent_dim=None,
                    block_size=[16, 16],
                    val_loss_before_finetuning=None)
    assert report == report | expected
    assert [loss[0], *report['perplexity']] == pytest.approx([loss_in('out'), *map(math.exp, loss)], abs=1e-5)
    shapes = {name: models[0].config.layer_shape(name) for name in ranks}
    saved = sum(m * n - ranks[name] * (m + n) for name, (m, n) in shapes.items())
    assert keep - .1 < 1 - saved / (12 * 16 * 16) <= keep and saved == blocks[0] - blocks[1]
    assert all(layer['of'] == 16 and 0 < layer['lost'] < 1 for layer in report['layers'].values())
    for speed in (report['speed'][kind] for kind in ('prefill', 'decode')):
        assert 0 < min(speed['tokens_per_s'])
        assert speed['quartiles'][0] <= speed['ratio'] <= speed['quartiles'][1]
    assert min(map(len, report['samples'])) > 150 and report['samples'][0] != report['samples'][1]
    words = [f'{blocks[0]:,} before, {blocks[1]:,} after', f'{loss[0]:.4f} before, {loss[1]:.4f} after',
             'out-lowrank',
             f'mlp.c_fc {ranks["h.0.mlp.c_fc"]}', *(text.split()[0] for text in report['samples'])]
    assert [word for word in words if word not in result.out] == []


def test_mla_is_written_with_a_latent_of_a_quarter_of_the_width(trained, call):
    trained(*NO_BIAS)
    result = call(compress.main, *QUICK, '--out_dir=out', '--to=mla')
    check_checkpoint('out-mla', use_mla=True, mla_latent_dim=4)
    assert report_of('out-mla')['cache_bytes'] == [2048, 256] and '2,048 before, 256 after' in result.out
    assert (report_of('out-mla')['latent_dim'], report_of('out-mla')['layers']) == (4, {})


@pytest.mark.parametrize('method', ['activation', 'whitened', 'plain'])
def test_ranks_that_are_asked_for(trained, shrink, method):
    trained(*BIAS)
    ranks = {}
    for options in ('--keep=1', '--rank=7', '--rank=8 --modules=attn', '--keep=.5 --modules=mlp',
                    '--energy=.8'):
        found = shrink(f'--method={method}', *options.split(), '--out_dir=out', save_dir=options)['layers']
        ranks[options] = {name: layer['rank'] for name, layer in found.items()}
    assert ranks['--keep=1'] == ranks['--rank=8 --modules=attn'] == {}  # square: break-even at 8
    assert equal(checkpoint('--keep=1')['model'], checkpoint()['model'])
    assert ranks['--rank=7'] == dict.fromkeys(PARTS, 7) and [*ranks['--keep=.5 --modules=mlp']] == PARTS[4:]
    for name, layer in found.items():  # the energy is of inputs as they were, to the ridge
        assert layer['lost'] <= .2 + 1e-6 and layer['rank'] < (8 if 'attn' in name else 13)


@pytest.mark.parametrize('method, option', [('activation', '--keep=1'), ('whitened', '--keep=.9'),
                                            ('plain', '--rank=5'), ('activation', '--energy=1')])
def test_a_product_keeps_at_most_its_rank(trained, shrink, method, option):
    """Whatever is asked for the second time: nothing is lost, and no file grows."""
    trained(*NO_BIAS)
    shrink('--rank=3', f'--method={method}', '--out_dir=out', save_dir='three')
    report = shrink('--out_dir=three', f'--method={method}', option, save_dir='same')
    assert checkpoint('same')['model_args']['layer_ranks'] == dict.fromkeys(PARTS, 3)
    before, after = zip(report['val_loss'], report['params'])
    assert after == pytest.approx(before, abs=1e-4)
    shrink('--out_dir=three', f'--method={method}', '--rank=2', '--modules=mlp')
    assert checkpoint('small')['model_args']['layer_ranks'] == {name: 2 if 'mlp' in name else 3
                                                                for name in PARTS}


# ------------------------------------------------------------------------------------------------------------
# fine-tuning, and what goes on from the new checkpoint

@pytest.mark.parametrize('run', [NO_BIAS, BIAS])
def test_fine_tuning_lowers_the_loss(trained, shrink, run):
    trained(*run)
    options = '--keep=0.2', '--method=plain', '--out_dir=out'
    tuned = shrink(*options, '--finetune_iters=40', '--batch_size=8', '--learning_rate=0.01')
    before, after = tuned['val_loss_before_finetuning'], tuned['val_loss'][1]
    assert after < before - .1 and loss_in('small') == pytest.approx(after, abs=1e-6)
    untuned = shrink(*options, save_dir='untuned')
    assert untuned['val_loss'][1] == pytest.approx(before, abs=1e-6) and untuned['layers'] == tuned['layers']


def test_the_teacher_has_no_dropout(trained, shrink, monkeypatch):
    """Of the two passes of a step one alone drops anything, though an evaluation leaves a model in training
    mode."""
    dropout, dropped = torch.nn.functional.dropout, []
    trained(*NO_BIAS)
    change(model_args=checkpoint()['model_args'] | dict(dropout=.5))
    monkeypatch.setattr(torch.nn.functional, 'dropout', lambda x, p, training, inplace: (
        dropped.append(training) or dropout(x, p, training, inplace)))
    shrink('--method=plain', '--finetune_iters=5')
    assert dropped.count(True) == 5 * 3  # embeddings, attention's output, the MLP's


@pytest.mark.parametrize('options', [['--keep=0.5'], ['--to=mla']])
def test_train_and_sample_and_export_take_it(trained, shrink, call, options):
    trained(*NO_BIAS)
    loss, own = shrink(*options)['val_loss'][1], ['--out_dir=small', '--device=cpu']
    result = call(train.main, '--eval_only=True', '--init_from=resume', *own)
    assert result.code == 0 and f'val loss {loss:.4f}' in result.out
    assert call(sample.main, *own, '--max_new_tokens=5', '--start=the').code == 0
    assert call(export.main, '--out_dir=small', '--save_dir=mine').code == 0
    result = call(train.main, '--init_from=resume', *own, '--max_iters=20', '--lr_decay_iters=20',
                  '--optimizer=adamw',
                  '--learning_rate=1e-3')
    assert result.code == 0 and [row['iter'] for row in rows('small') if 'lr' in row] == [*range(1, 21)]
    assert rows('small')[-1]['val/loss'] < loss


def test_factors_are_compressed_again_and_become_latents(trained, shrink):
    trained(*NO_BIAS)
    first = shrink('--keep=0.5', '--out_dir=out')
    report = shrink('--out_dir=small', '--keep=0.3', save_dir='less')
    assert report['params'][0] == first['params'][1] > report['params'][1]
    report = shrink('--out_dir=small', '--to=mla', '--mla_latent_dim=16', save_dir='latents')
    ranks = {name.replace('c_q', 'query'): layer['rank'] for name, layer in first['layers'].items()}
    assert report['val_loss'] == pytest.approx([first['val_loss'][1]] * 2, abs=1e-4)
    assert checkpoint('latents')['model_args']['layer_ranks'] == {
        name: rank for name, rank in ranks.items() if not name.endswith(('c_k', 'c_v'))}
    assert 'h.0.attn.c_attn.query' in shrink('--out_dir=latents', '--keep=0.4', save_dir='fewer')['layers']


def test_spectra_are_of_dense_weights_and_of_products(trained, shrink, call, refused):
    trained(*NO_BIAS)
    shrink('--rank=3', '--modules=mlp')
    spectrum, before = ['--spectrum', '--out_dir=small'], folder_bytes('small')
    result = call(compress.main, *spectrum)
    assert result.code == 0 and sorted(os.listdir('small-spectrum')) == ['spectrum.csv', 'spectrum.png']
    weight = checkpoint()['model']['transformer.h.0.attn.c_attn.weight'].double().chunk(3)[1]
    with open('small-spectrum/spectrum.csv') as file:
        found = [float(row['singular_value']) for row in csv.DictReader(file) if row['name'] == PARTS[1]]
    assert found == pytest.approx(torch.linalg.svdvals(weight).tolist(), rel=1e-9)
    cells = {line.split()[0]: line.split()[1:] for line in result.out.splitlines() if line.startswith('h.0')}
    assert [*cells] == PARTS and cells[PARTS[4]][:3] == ['64', 'x', '16'] and cells[PARTS[4]][4] == '3'
    for options in ([], ['--save_dir=small']):                      # is there already, has the model in it
        assert 'save_dir' in refused(compress.main, *spectrum, *options) and folder_bytes('small') == before


@pytest.mark.parametrize('options, kinds', [
    (dict(use_mla=True), ('query', 'kv_down', 'k_up', 'v_up')),
    (dict(use_svd=True, svd_scope='weight', svd_rank=2), ('c_q', 'c_k', 'c_v'))])
def test_spectra_are_of_every_weight(options, kinds):
    """Those of MLA's latents, too, and W_v where 'weight' scope cuts it."""
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=31, **options))
    parts = ['attn.c_proj', 'mlp.c_fc', 'mlp.c_proj', *(f'attn.c_attn.{kind}' for kind in kinds)]
    assert layers.weights_of(model).keys() == {f'h.{i}.{part}' for i in range(2) for part in parts}
    mlp = layers.weights_of(model, ['mlp'])
    assert mlp.keys() == {f'h.{i}.{part}' for i in range(2) for part in parts[1:3]}


# ------------------------------------------------------------------------------------------------------------
# other sources

def test_a_checkpoint_of_nanogpt_needs_its_text(trained, shrink, refused):
    trained(*NO_BIAS)
    change(without=['tokenizer', 'random', 'scaler'], config=checkpoint()['config'] | dict(dataset='gone'))
    assert 'dataset=gone' in refused(compress.main, *QUICK)
    shrink('--dataset=toy')
    assert checkpoint('small')['config']['dataset'] == 'toy' and 'chars' in checkpoint('small')['tokenizer']


def test_a_run_is_only_replaced_when_asked_to_and_as_a_whole(trained, shrink, call, refused):
    trained(*NO_BIAS)
    shrink('--out_dir=out')
    first, again = folder_bytes('small'), [*QUICK, '--out_dir=out', '--save_dir=small', '--overwrite=True',
                                           '--to=mla']
    assert 'save_dir' in refused(compress.main, *again, '--overwrite=False')
    held = lock('small')
    assert 'save_dir' in refused(compress.main, *again)             # a run is going on there
    os.close(held)
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, most))
    try:
        result = call(compress.main, *again)                        # there is no room
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    assert (result.code, folder_bytes('small'), sorted(os.listdir())) == (2, first, ['data', 'out', 'small'])
    shrink(*again)
    assert folder_bytes('small.1') == first and checkpoint('small')['model_args']['use_mla']


# ------------------------------------------------------------------------------------------------------------
# wrong input

@pytest.mark.parametrize('argv, words', [
    ('--mla_latent_dim=0', 'mla_latent_dim=0: |nearest: 1'),
    ('--to=mla --mla_latent_dim=17', 'latent_dim=17: |nearest: 16'),
    ('--calibration_tokens=0', 'calibration_tokens=0: '), ('--seed=-1', 'seed=-1: '),
    (f'--seed={2 ** 63}', 'seed='),
    ('--finetune_iters=-1', 'finetune_iters=-1: '), ('--batch_size=0', 'batch_size=0: '),
    ('--learning_rate=-1', 'learning_rate=-1.0: '), ('--rank=0', 'rank=0: '),
    ('--rank=17', 'rank=17: |nearest: 16'),
    ('--to=svd', "'lowrank' or 'mla'"), ('--method=best', "'activation' or 'whitened' or 'plain'"),
    ('--to=mla --method=whitened', "method='whitened': |nearest: 'activation'"),
    ('--out_dir=nowhere', 'nowhere|nearest: '), ('--to=mla --out_dir=latent', 'latent/ckpt.pt: |nearest: '),
    ('--out_dir=large', 'large/ckpt.pt: '),
    ('--save_dir=data', "save_dir='data': "), ('--save_dir=data --overwrite=True', "save_dir='data': "),
    ('--save_dir=.', "save_dir='.': "), ('--save_dir=~ --overwrite=True', 'save_dir='),
    ('--save_dir=.. --overwrite=True', 'save_dir='), ('--save_dir=out --overwrite=True', "save_dir='out': "),
    ('--save_dir=file/below', "save_dir='file/below': "),
    ('--init_from=gpt2 --dataset=toy', "out_dir='out': "),
    ('--init_from=gpt2', 'init_from=gpt2: |--dataset='), ('--init_from=gpt3', 'gpt3'),
    ('--dataset=short.txt', 'dataset=short.txt: |block_size=16'),
    ('--dataset=other.txt', 'other.txt|out/ckpt.pt'),
    ('--keep=1.5', 'keep=1.5: |nearest: 1'), ('--keep=0', 'keep=0.0: '), ('--energy=0', 'energy=0.0: '),
    ('--energy=1.1', 'energy=1.1: |nearest: 1'), ('--keep=nan', 'keep='), ('--keep=half', 'keep='),
    ('--keep=0.01', 'out/ckpt.pt: keep=0.01: |nearest: 0.'),
    ('--keep=0.01 --method=plain', 'keep=0.01: |nearest: 0.125'),
    ('--keep=0.5 --rank=3', 'rank=3: '), ('--energy=.5 --keep=.5', 'energy=0.5: |keep'),
    ('--keep=0.5 --to=mla', 'keep=0.5: |--to=mla'), ('--modules=attn --to=mla', "modules='attn': |--to=mla"),
    ('--mla_latent_dim=4', 'mla_latent_dim=4: |--to=lowrank'),
    ('--modules=head', "'head'|nearest: 'attn,mlp'"),
    ('--modules=', "modules=''"), ('--optimizer=adamw', "optimizer='adamw': |--finetune_iters"),
    ('--spectrum --rank=2', 'rank=2: |--spectrum'), ('--spectrum --to=mla', "to='mla': |--spectrum"),
    ('--spectrum --dataset=toy', "dataset='toy': |--spectrum"), ('--device=cuda:77', 'cuda:77'),
    ('--latent=4', '--latent')])
def test_wrong_input_is_one_line_and_writes_nothing(trained, refused, argv, words):
    """Which names what is wrong, and what is valid."""
    trained(*NO_BIAS)
    latent, large = (checkpoint(trained(*NO_BIAS, folder=folder)) for folder in ('latent', 'large'))
    latent['model_args'] |= dict(use_mla=True)
    change('latent', model_args=latent['model_args'],
           model=GPT(GPTConfig(**latent['model_args'])).state_dict())
    large['model']['transformer.h.0.mlp.c_fc.weight'] *= 1e38
    change('large', model=large['model'])
    for name, text in (('short.txt', ''.join(sorted({*TEXT}))), ('other.txt', TEXT.upper())):
        write_dataset(f'data/{name}', text, 'char', source='tests')
    Path('file').touch()
    before = folder_bytes('.')
    line = refused(compress.main, '--device=cpu', '--out_dir=out', *argv.split())
    assert all(word in line for word in words.split('|')) and folder_bytes('.') == before

"""compress.py as a command: what it writes and prints, what it refuses, and how much loss its
methods add to a trained model."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import compress
import export
import sample
import train
from helpers import TEXT, change, checkpoint, equal, folder_bytes, rows, slow
from model import GPT, GPTConfig
from runtime.data import Dataset, write_dataset
from runtime.files import locked_folder
from tools import model_compression

pytestmark = pytest.mark.usefixtures('one_thread')
# enough training to beat chance clearly
LEARN = ('--max_iters=100', '--lr_decay_iters=100', '--eval_interval=100', '--learning_rate=2e-2',
         '--optimizer=muon')
NO_BIAS, BIAS = (*LEARN, '--bias=False'), (*LEARN, '--bias=True')
QUICK = ('--device=cpu', '--calibration_tokens=512')
PARTS = [
    f'h.0.{part}' for part in ('attn.c_attn.c_q', 'attn.c_attn.c_k', 'attn.c_attn.c_v',
                               'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')
]


def report_of(folder):
    # NaN is not JSON
    return json.loads(Path(folder, 'compress.json').read_text(), parse_constant=pytest.fail)


@pytest.fixture
def shrink(call, monkeypatch):
    """shrink(*options, save_dir) runs compress.py and returns its report. It leaves the samples
    out, which take longer than the compression."""
    monkeypatch.setattr(model_compression, 'sample_text', lambda *args: 'a text')

    def shrink(*options, save_dir='small'):
        result = call(compress.main, *QUICK, f'--save_dir={save_dir}', *options)
        assert result.code == 0, result.err
        return report_of(save_dir)
    return shrink


def model_of(folder):
    return GPT.from_checkpoint(checkpoint(folder)).eval()


def loss_in(folder):
    return model_compression.validation_loss(model_of(folder), Dataset('data/toy'), 'cpu', 1337)


# --------------------------------------------------------------------------------------------------
# added loss

@pytest.mark.parametrize('run, options, methods', [
    (NO_BIAS, ['--keep=.5'], ['activation', 'whitened', 'plain']),
    slow(BIAS, ['--keep=.3'], ['activation', 'whitened']),
    (NO_BIAS, ['--to=mla', '--mla_latent_dim=4'], ['activation', 'plain']),
    slow(BIAS, ['--to=mla', '--mla_latent_dim=2'], ['activation', 'plain']),
    (BIAS, ['--to=lowrank_heads', '--keep=.25'], ['activation', 'plain'])])
def test_text_helps_and_gradients_help_more(trained, shrink, run, options, methods):
    """A method that uses more of the calibration data adds less loss. 'activation' uses inputs and
    gradients, 'whitened' uses inputs, and 'plain' uses neither."""
    trained(*run)
    found = [
        shrink(*options, f'--method={method}', save_dir=method)['val_loss'] for method in methods]
    losses = [after for _, after in found]
    assert losses == sorted(losses) and found[0][0] - .01 < losses[0]


def test_the_seed_decides_and_the_validation_split_teaches_nothing(trained, shrink):
    """The result depends on the seed but not on the validation split. Another split changes the
    reported loss only, and another seed changes the model."""
    trained(*NO_BIAS)
    first = shrink('--finetune_iters=3', '--seed=1', '--out_dir=out', save_dir='a')
    np.roll(np.fromfile('data/toy/val.bin', np.uint16)[::-1], 5).tofile('data/toy/val.bin')
    second = shrink('--finetune_iters=3', '--seed=1', '--out_dir=out', save_dir='b')
    shrink('--finetune_iters=3', '--seed=2', '--out_dir=out', save_dir='c')
    a, b, c = (checkpoint(folder)['model'] for folder in 'abc')
    assert equal(a, b) and not equal(a, c) and second['val_loss'][0] > first['val_loss'][0] + .1


@pytest.mark.slow
def test_where_v_sees_the_future_the_loss_is_prefix_only(trained, shrink):
    """In 'sequence' scope the reported loss is the prefix-only loss, and the report has no
    cache."""
    trained(*NO_BIAS)
    change(model_args=checkpoint()['model_args'] | dict(use_svd=True, svd_rank=2))
    report = shrink('--keep=1')                                     # all layers stay dense
    assert report['prefix_only'] and report['cache_bytes'] == [0, 0]
    assert report['val_loss'] == pytest.approx([loss_in('out'), loss_in('small')], abs=1e-6)


# --------------------------------------------------------------------------------------------------
# checkpoint and report

def check_checkpoint(folder, **changed):
    """Check that the new checkpoint starts a run at step 0 with the settings of the original run
    and these changes."""
    saved, old, report = checkpoint(folder), checkpoint('out'), report_of(folder)
    assert saved == saved | {'iter_num': 0, 'tokenizer': old['tokenizer'],
                             'model_args': old['model_args'] | changed,
                             'config': old['config'] | changed | dict(out_dir=folder)}
    assert saved['optimizer']['state'] == {}
    assert [saved['best_val_loss'], report['val_loss'][1]] == pytest.approx([loss_in(folder)] * 2,
                                                                            abs=1e-6)
    numbers = sum(w.numel() for name, w in saved['model'].items() if name != 'lm_head.weight')
    size = Path(folder, 'ckpt.pt').stat().st_size
    assert report['bytes'][1] == 4 * numbers < size < 4 * numbers + 40_000  # no larger tensors


@pytest.mark.parametrize('run, options, keep',
                         [(NO_BIAS, [], .6), slow(BIAS, ['--method=whitened', '--keep=.3'], .3)])
def test_the_report_is_what_the_checkpoint_says(trained, call, run, options, keep):
    """Parameters, losses, perplexities, ranks, widths and bytes in the report equal those of the
    two checkpoints."""
    trained(*run)
    result = call(compress.main, *QUICK, '--out_dir=out', *options)
    report, models = report_of('out-lowrank'), (model_of('out'), model_of('out-lowrank'))
    ranks, loss = {name: layer['rank']
                   for name, layer in report['layers'].items()}, report['val_loss']
    widths = {name: report[name] for name in ('qk_head_dim', 'v_head_dim', 'mlp_dim')}
    check_checkpoint('out-lowrank', layer_ranks=ranks or None, **widths)
    blocks = [sum(p.numel() for p in m.transformer.h.parameters()) for m in models]
    assert report == report | dict(
        params=[sum(p.numel() for p in m.parameters()) for m in models], block_params=blocks,
        attention_params=[m.attention_params()
                          for m in models], finetune_seconds=None, prefix_only=False, cache_bytes=[
                              m.kv_cache_bytes(1, 16) for m in models
                          ], latent_dim=None, block_size=[16, 16], val_loss_before_finetuning=None)
    assert keep - .1 < 1 - (blocks[0] - blocks[1]) / (12 * 16 * 16) <= keep
    assert [loss[0], *report['perplexity']] == pytest.approx([loss_in('out'), *map(math.exp, loss)],
                                                             abs=1e-5)
    assert all(layer['of'] == 16 for layer in report['layers'].values())
    assert any(widths.values()) == (not options)
    assert min(map(len, report['samples'])) > 150 and report['samples'][0] != report['samples'][1]
    words = ' '.join(result.out.split())
    shape = (f'mlp.c_fc {ranks["h.0.mlp.c_fc"]}' if options else
             f'widths of queries and keys per block: {widths["qk_head_dim"][0]}')
    for found in (f'parameters of the blocks {blocks[0]:,} {blocks[1]:,}', shape, 'out-lowrank',
                  f'validation loss {loss[0]:.4f} {loss[1]:.4f}',
                  ' '.join(report['samples'][1].split())):
        assert found in words


def test_mla_is_written_with_a_mean_latent_of_a_quarter_of_the_width(trained, call):
    """--to=mla writes a model with latents of n_embd / 4 in the mean by default, and reports their
    sizes and the smaller cache. The model generates and can be exported."""
    trained(*NO_BIAS)
    out = call(compress.main, *QUICK, '--out_dir=out', '--to=mla').out
    report = report_of('out-mla')
    sizes, words = report['latent_dim'], ' '.join(out.split())
    check_checkpoint('out-mla', use_mla=True, mla_latent_dim=sizes)
    assert sum(sizes) == 4 * model_of('out').config.n_layer and report == report | dict(
        cache_bytes=[2048, 256], layers={})
    assert 'context 2,048 256' in words and (
        f'sizes of the latents per block: {", ".join(map(str, sizes))}' in words)
    for main, *argv in ((sample.main, '--num_samples=1', '--max_new_tokens=20', '--device=cpu'),
                        (export.main, '--to=nanogpt', '--save_dir=plain')):
        assert call(main, '--out_dir=out-mla', *argv).code == 0


def test_narrower_and_fewer_heads_are_written(trained, call):
    """--to=lowrank_heads and --to=gqa halve the cache by default and write a model that generates,
    and that can be converted again."""
    trained(*BIAS)
    out = call(compress.main, *QUICK, '--out_dir=out', '--to=lowrank_heads').out
    assert 'context 2,048 1,024' in ' '.join(out.split())
    report = report_of('out-lowrank_heads')
    widths = {name: report[name] for name in ('qk_head_dim', 'v_head_dim')}
    assert sum(sum(dims) for dims in widths.values()) == 8
    check_checkpoint('out-lowrank_heads', **widths)
    result = call(compress.main, *QUICK, '--out_dir=out-lowrank_heads', '--to=gqa')
    assert result.code == 0 and 'context 1,024 512' in ' '.join(result.out.split())
    assert '2 query heads share 1 key/value heads' in result.out
    found = checkpoint('out-lowrank_heads-gqa')['model_args']
    assert found == found | widths | dict(n_kv_head=1)
    for folder in ('out-lowrank_heads', 'out-lowrank_heads-gqa'):
        assert call(sample.main, f'--out_dir={folder}', '--device=cpu', '--num_samples=1',
                    '--max_new_tokens=20').code == 0


def test_int8_weights_take_a_quarter_of_the_bytes_and_load_everywhere(trained, shrink, call):
    """--int8 stores the matrices of the blocks as int8. The reported loss is that of the stored
    model, which train.py and sample.py load, and it is close to the loss without rounding."""
    trained(*NO_BIAS)
    float32 = shrink('--keep=0.5', '--out_dir=out', save_dir='float32')
    report = shrink('--keep=0.5', '--out_dir=out', '--int8=True')
    saved = torch.load('small/ckpt.pt')
    matrices = {name: w for name, w in saved['model'].items() if w.dtype == torch.int8}
    assert {*matrices} == {*saved['scales']} == {
        name for name, w in saved['model'].items() if '.h.' in name and w.dim() > 1}
    assert float32['disk_bytes'][1] == float32['bytes'][1]
    assert report['disk_bytes'][1] == float32['bytes'][1] - sum(
        3 * w.numel() - 4 * len(w) for w in matrices.values())
    assert report['val_loss'][1] == pytest.approx(float32['val_loss'][1], abs=.01)
    out = call(train.main, '--eval_only=True', '--init_from=resume', '--out_dir=small').out
    assert f'val loss {report["val_loss"][1]:.4f}' in out
    assert call(sample.main, '--out_dir=small', '--device=cpu', '--max_new_tokens=5').code == 0


@pytest.mark.parametrize('method, option', [('activation', '--keep=1'), ('whitened', '--keep=.9'),
                                            ('plain', '--rank=5'), ('activation', '--energy=1')])
def test_a_product_keeps_at_most_its_rank(trained, shrink, method, option):
    """Compressing a compressed model again adds no loss and increases no rank, whatever is
    requested."""
    trained(*NO_BIAS)
    shrink('--rank=3', f'--method={method}', '--out_dir=out', save_dir='three')
    report = shrink('--out_dir=three', f'--method={method}', option)
    assert checkpoint('small')['model_args']['layer_ranks'] == dict.fromkeys(PARTS, 3)
    before, after = zip(report['val_loss'], report['params'])
    assert after == pytest.approx(before, abs=1e-4)


# --------------------------------------------------------------------------------------------------
# fine-tuning, and use of the new checkpoint

@pytest.mark.parametrize('run', [NO_BIAS, slow(BIAS)])
def test_fine_tuning_lowers_the_loss(trained, shrink, run):
    trained(*run)
    untuned = shrink('--keep=0.2', '--method=plain', '--out_dir=out', save_dir='untuned')
    tuned = shrink('--keep=0.2', '--method=plain', '--out_dir=out', '--finetune_iters=40',
                   '--batch_size=8', '--learning_rate=0.01')
    assert tuned['val_loss_before_finetuning'] == pytest.approx(untuned['val_loss'][1], abs=1e-6)
    assert loss_in('small') == pytest.approx(tuned['val_loss'][1], abs=1e-6)
    assert tuned['val_loss'][1] < untuned['val_loss'][1] - .1


@pytest.mark.parametrize('options', [['--keep=0.5'], slow(['--to=mla'])])
def test_train_and_sample_and_export_take_it(trained, shrink, call, options):
    """train.py, sample.py and export.py accept the new checkpoint, with the reported loss."""
    trained(*NO_BIAS)
    loss, own = shrink(*options)['val_loss'][1], ['--out_dir=small', '--device=cpu']
    result = call(train.main, '--eval_only=True', '--init_from=resume', *own)
    assert result.code == 0 and f'val loss {loss:.4f}' in result.out
    for main, argv in ((sample.main, [*own, '--max_new_tokens=5', '--start=the']),
                       (export.main, ['--out_dir=small', '--save_dir=mine']), (train.main, [
                           '--init_from=resume', *own, '--max_iters=20', '--lr_decay_iters=20',
                           '--optimizer=adamw', '--learning_rate=1e-3'])):
        assert call(main, *argv).code == 0
    assert rows('small')[-1]['iter'] == 20 and rows('small')[-1]['val/loss'] < loss


def test_factors_are_compressed_again_and_become_latents(trained, shrink):
    """A compressed model can be converted to MLA and compressed again. The conversion multiplies
    out the products of keys and values and keeps the others, including those of queries."""
    trained(*NO_BIAS)
    first = shrink('--keep=0.5', '--method=whitened', '--out_dir=out')
    report = shrink('--out_dir=small', '--to=mla', '--mla_latent_dim=16', save_dir='latents')
    assert report['val_loss'] == pytest.approx([first['val_loss'][1]] * 2, abs=1e-4)
    assert checkpoint('latents')['model_args']['layer_ranks'] == {
        name.replace('c_q', 'query'): layer['rank'] for name, layer in first['layers'].items()
        if not name.endswith(('c_k', 'c_v'))}
    fewer = shrink('--out_dir=latents', '--keep=0.4', save_dir='fewer')
    assert fewer['params'][0] == report['params'][1] > fewer['params'][1]


@pytest.mark.slow
def test_spectra_are_of_dense_weights_and_of_products(trained, shrink, call, refused):
    """--spectrum reports dense weights and products, and writes into a new folder only."""
    trained(*NO_BIAS)
    shrink('--rank=3', '--modules=mlp')
    before = folder_bytes('small')
    result = call(compress.main, '--spectrum', '--out_dir=small')
    assert result.code == 0 and sorted(
        os.listdir('small-spectrum')) == ['spectrum.csv', 'spectrum.png']
    cells = {
        line.split()[0]: line.split()[1:]
        for line in result.out.splitlines()
        if line.startswith('h.0')}
    assert [*cells] == PARTS and cells[PARTS[4]][:3] == ['64', 'x', '16'
                                                         ] and cells[PARTS[4]][4] == '3'
    for options in ([], ['--save_dir=small']):  # the first exists, the second holds the model
        assert 'save_dir' in refused(compress.main, '--spectrum', '--out_dir=small', *options)
    assert folder_bytes('small') == before


@pytest.mark.parametrize('options, kinds', [
    (dict(use_mla=True), {'query', 'kv_down', 'k_up', 'v_up'}),
    (dict(use_svd=True, svd_scope='weight', svd_rank=2), {'c_q', 'c_k', 'c_v'})])
def test_spectra_are_of_every_weight(options, kinds):
    """The spectra include the weights of latents, and also W_v if 'weight' scope truncates it."""
    weights = model_compression.weights_of(
        GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=31, **options)))
    parts = {'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj', *(f'attn.c_attn.{kind}' for kind in kinds)}
    assert weights.keys() == {f'h.0.{part}' for part in parts}


# --------------------------------------------------------------------------------------------------
# other sources

def test_a_checkpoint_of_nanogpt_needs_its_text(trained, shrink, refused):
    """A checkpoint of nanoGPT needs --dataset if its own data set is missing."""
    trained(*NO_BIAS)
    change(without=['tokenizer', 'random', 'scaler'],
           config=checkpoint()['config'] | dict(dataset='gone'))
    assert 'dataset=gone' in refused(compress.main, *QUICK)
    shrink('--dataset=toy')
    assert checkpoint('small')['config']['dataset'] == 'toy' and 'chars' in checkpoint(
        'small')['tokenizer']


def test_a_run_is_only_replaced_when_asked_to_and_as_a_whole(trained, shrink, refused):
    """An existing run is only replaced with --overwrite=True. It is moved aside as a whole, and
    never while a run is active in its folder."""
    trained(*NO_BIAS)
    shrink('--out_dir=out')
    first = folder_bytes('small')
    again = ['--out_dir=out', '--save_dir=small', '--overwrite=True', '--to=mla']
    assert 'save_dir' in refused(compress.main, *QUICK, *again, '--overwrite=False')
    with locked_folder('small'):                                    # as if a run were active there
        assert 'save_dir' in refused(compress.main, *QUICK, *again)
    assert folder_bytes('small') == first and sorted(os.listdir()) == ['data', 'out', 'small']
    shrink(*again)
    assert folder_bytes('small.1') == first and checkpoint('small')['model_args']['use_mla']


# --------------------------------------------------------------------------------------------------
# wrong input


@pytest.mark.parametrize(
    'argv, words', [('--mla_latent_dim=0', 'mla_latent_dim=0: |nearest: 1'),
                    ('--to=mla --mla_latent_dim=17', 'latent_dim=17: |nearest: 16'),
                    ('--calibration_tokens=0', 'calibration_tokens=0: '),
                    (f'--seed={2 ** 63}', 'seed='), ('--finetune_iters=-1', 'finetune_iters=-1: '),
                    ('--rank=17', 'rank=17: |nearest: 16'), ('--to=svd', "'lowrank' or 'mla'"),
                    ('--method=best', "'activation' or 'whitened' or 'plain'"),
                    ('--to=mla --method=whitened', "method='whitened': |nearest: 'activation'"),
                    ('--to=gqa --method=plain', "method='plain': |--to=gqa"),
                    ('--to=lowrank_heads --rank=2', 'rank=2: |--to=lowrank_heads'),
                    ('--to=lowrank_heads --out_dir=latent', 'MLA'),
                    ('--n_kv_head=1', 'n_kv_head=1: |--to=lowrank'),
                    ('--out_dir=nowhere', 'nowhere|nearest: '),
                    ('--to=mla --out_dir=latent', 'latent/ckpt.pt: |nearest: '),
                    ('--out_dir=large', 'large/ckpt.pt: '),
                    ('--save_dir=data --overwrite=True', "save_dir='data': "),
                    ('--save_dir=~ --overwrite=True', 'save_dir='),
                    ('--save_dir=.. --overwrite=True', 'save_dir='),
                    ('--save_dir=out --overwrite=True', "save_dir='out': "),
                    ('--init_from=gpt2 --dataset=toy', "out_dir='out': |--init_from"),
                    ('--init_from=gpt2 --out_dir=None', 'init_from=gpt2: |--dataset='),
                    ('--init_from=gpt3', 'gpt3'), ('--dataset=short.txt', 'short|block_size=16'),
                    ('--dataset=other.txt', 'other.txt|out/ckpt.pt'),
                    ('--keep=1.5', 'keep=1.5: |nearest: 1'), ('--energy=0', 'energy=0.0: '),
                    ('--keep=60', 'keep=60.0: |nearest: 0.6'),
                    ('--energy=95', 'energy=95.0: |nearest: 0.95'), ('--keep=nan', 'keep='),
                    ('--keep=0.01', 'out/ckpt.pt: keep=0.01: |nearest: 0.'),
                    ('--energy=.5 --keep=.5', 'energy=0.5: |keep'),
                    ('--keep=0.5 --to=mla', 'keep=0.5: |--to=mla'),
                    ('--mla_latent_dim=4', 'mla_latent_dim=4: |--to=lowrank'),
                    ('--modules=head', "'head'|nearest: 'attn,mlp'"),
                    ('--optimizer=adamw', "optimizer='adamw': |--finetune_iters"),
                    ('--spectrum --rank=2', 'rank=2: |--spectrum'),
                    ('--spectrum --dataset=toy', "dataset='toy': |--spectrum"),
                    ('--device=cuda:77', 'cuda:77')])
def test_wrong_input_is_one_line_and_writes_nothing(trained, refused, argv, words):
    """Wrong input ends in a one-line error that names what is wrong and what is valid, and nothing
    is written."""
    for folder in ('out', 'latent', 'large'):
        trained(*NO_BIAS, folder=folder)
    args, weights = checkpoint()['model_args'] | dict(use_mla=True), checkpoint()['model']
    change('latent', model_args=args, model=GPT(GPTConfig(**args)).state_dict())
    change('large',
           model={name: w * 1e38 if 'mlp.c_fc' in name else w for name, w in weights.items()})
    write_dataset('data/short.txt', ''.join(sorted({*TEXT})), 'char', source='tests')
    write_dataset('data/other.txt', TEXT.upper(), 'char', source='tests')
    before = folder_bytes('.')
    line = refused(compress.main, '--device=cpu', '--out_dir=out', *argv.split())
    assert all(word in line for word in words.split('|')) and folder_bytes('.') == before

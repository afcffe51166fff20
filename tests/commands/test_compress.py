"""compress.py, the command: what it writes, says and refuses, and what its methods lose of a trained model."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import compress
import compress_layers as layers
import export
import sample
import train
from helpers import TEXT, TINY, checkpoint, equal, folder_bytes, rows
from model import GPT, GPTConfig
from runtime.dataset import Dataset, write_dataset
from runtime.run import lock
from test_compress_layers import difference

pytestmark = pytest.mark.usefixtures('one_thread')
MLA = ('--to=mla', '--device=cpu', '--calibration_tokens=512')
LEARN = '--max_iters=100 --lr_decay_iters=100 --eval_interval=100 --learning_rate=2e-2 --optimizer=muon'.split()


TEXT_OF = compress.text_of


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Timings and samples, which take longer than all else, are only looked at where the report is."""
    monkeypatch.setattr(compress, 'ROUNDS', 2)
    monkeypatch.setattr(compress, 'text_of', lambda *args: 'a text')


@pytest.fixture(scope='module')
def learned(tmp_path_factory, toy, one_thread):
    """Folders of runs that have learnt something, without biases and with, each trained once."""
    folder = tmp_path_factory.mktemp('learned')
    for bias in (False, True):
        assert train.main([*TINY, *LEARN, f'--dataset={toy}', f'--out_dir={folder / str(bias)}', f'--bias={bias}']) == 0
    return folder


@pytest.fixture
def run(here, learned):
    """run(name, bias, without, **changes) puts a trained checkpoint, changed, below the working directory."""
    def run(name='out', bias=False, without=(), **changes):
        saved = torch.load(learned / str(bias) / 'ckpt.pt', weights_only=True) | changes
        saved['config']['dataset'] = 'toy'
        (here / name).mkdir(exist_ok=True)
        torch.save({k: v for k, v in saved.items() if k not in without}, here / name / 'ckpt.pt')
        (here / name / 'config.py').touch()                         # a run comes before what was made from it
        return name
    return run


@pytest.fixture
def convert(call):
    """convert(*options) -> what compress.py prints."""
    def convert(*options):
        result = call(compress.main, *MLA, *options)
        assert result.code == 0, result.err
        return result.out
    return convert


@pytest.fixture
def shrink(call):
    """shrink(*options) -> what compress.py prints, and its report, which must be strict JSON."""
    def shrink(*options, save_dir='out-lowrank'):
        result = call(compress.main, '--device=cpu', '--calibration_tokens=512', f'--save_dir={save_dir}', *options)
        assert result.code == 0, result.err
        return result.out, report_of(save_dir)
    return shrink


def report_of(folder):
    def refuse(word):
        raise ValueError(f'{word} is not JSON')
    return json.loads(Path(folder, 'compress.json').read_text(), parse_constant=refuse)


def untimed(report):
    return {k: v for k, v in report.items() if k not in ('seconds', 'finetune_seconds', 'speed', 'options')}


def loss_in(folder):
    return compress.loss_of(model_of(folder), Dataset('data/toy'), 'cpu', 0)


def model_of(folder):
    return GPT.from_checkpoint(checkpoint(folder)).eval()


# ----------------------------------------------------------------------------------------------------------------------
# what is lost

@pytest.mark.parametrize('bias', [False, True])
def test_the_loss_says_that_gradients_and_inputs_count(run, convert, bias):
    run(bias=bias)
    before = compress.loss_of(model_of('out'), Dataset('data/toy'), 'cpu', 0)
    for latent in (8, 4, 2):
        losses = []
        for method in ('activation', 'plain'):
            convert(f'--method={method}', f'--mla_latent_dim={latent}', f'--save_dir={method}{latent}')
            losses.append(checkpoint(f'{method}{latent}')['best_val_loss'])
        assert before - .01 < losses[0] < losses[1]


@pytest.mark.parametrize('bias', [False, True])
def test_text_helps_and_gradients_help_more(run, shrink, bias):
    """In trainings from other seeds, too, which part as those of two machines do."""
    run(bias=bias)
    for keep in (.3, .5):
        losses = {}
        for method in ('activation', 'whitened', 'plain'):
            losses[method] = shrink(f'--method={method}', f'--keep={keep}', save_dir=f'{method}-{keep}')[1]['val_loss']
        before, activation = losses['activation']
        whitened, plain = losses['whitened'][1], losses['plain'][1]
        assert before - .01 < activation < min(whitened, plain) - .01 and (keep == .3 or whitened < plain - .1), losses


# ----------------------------------------------------------------------------------------------------------------------
# what is written

def test_the_checkpoint_starts_a_run_at_step_0(run, convert):
    run()
    out, saved, old = convert(), checkpoint('out-mla'), checkpoint('out')
    assert set(saved) == {'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config', 'tokenizer'}
    assert (saved['iter_num'], saved['optimizer']['state'], saved['tokenizer']) == (0, {}, old['tokenizer'])
    assert saved['model_args'] == old['model_args'] | dict(use_mla=True, mla_latent_dim=4)
    assert saved['config'] == old['config'] | dict(use_mla=True, mla_latent_dim=4, out_dir='out-mla')
    model, new = model_of('out'), model_of('out-mla')
    loss = compress.loss_of(new, Dataset('data/toy'), 'cpu', 0)
    assert saved['best_val_loss'] == pytest.approx(loss, abs=1e-6)
    assert f'{loss:.4f} after' in out
    assert f'{model.attention_params():,} before, {new.attention_params():,} after' in out
    assert '2,048 before, 256 after' in out and new.kv_cache_bytes(1, 16) == 256
    numbers = sum(w.numel() for name, w in saved['model'].items() if name != 'lm_head.weight')
    assert Path('out-mla/ckpt.pt').stat().st_size < 4 * numbers + 40_000                        # and no larger tensors


@pytest.mark.parametrize('bias, options', [(False, []), (True, ['--method=whitened', '--keep=0.3'])])
def test_the_report_is_what_the_checkpoint_says(run, shrink, monkeypatch, bias, options):
    monkeypatch.setattr(compress, 'text_of', TEXT_OF)
    run(bias=bias)
    out, report = shrink(*options)
    assert sorted(os.listdir('out-lowrank')) == ['ckpt.pt', 'compress.json']
    saved, old, keep = checkpoint('out-lowrank'), checkpoint('out'), .3 if options else .6
    models, ranks = (model_of('out'), model_of('out-lowrank')), saved['model_args']['layer_ranks']
    assert saved['model_args'] == old['model_args'] | dict(layer_ranks=ranks) and ranks
    assert saved['config'] == old['config'] | dict(layer_ranks=ranks, out_dir='out-lowrank')
    assert (saved['iter_num'], saved['optimizer']['state'], saved['tokenizer']) == (0, {}, old['tokenizer'])
    assert report['val_loss'] == pytest.approx([loss_in('out'), loss_in('out-lowrank')], abs=1e-6)
    assert saved['best_val_loss'] == report['val_loss'][1] and report['val_loss_before_finetuning'] is None
    assert report['perplexity'] == pytest.approx([math.exp(loss) for loss in report['val_loss']])
    numbers = [sum(p.numel() for p in m.parameters()) for m in models]
    assert report['params'] == numbers and report['attention_params'] == [m.attention_params() for m in models]
    blocks = [sum(p.numel() for name, p in m.named_parameters() if '.h.' in name) for m in models]
    assert report['block_params'] == blocks and report['cache_bytes'] == [m.kv_cache_bytes(1, 16) for m in models]
    for size, n in zip((*report['bytes'], Path('out-lowrank/ckpt.pt').stat().st_size), (*numbers, numbers[1])):
        assert 4 * n < size < 4 * n + 40_000
    dense, total = {name: model_of('out').config.layer_shape(f'h.0.{name}') for name in (
        'attn.c_attn.c_q', 'attn.c_attn.c_k', 'attn.c_attn.c_v', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')}, 12 * 16 * 16
    assert sum(m * n for m, n in dense.values()) == total
    spent = total - sum(math.prod(dense[name[4:]]) - r * sum(dense[name[4:]]) for name, r in ranks.items())
    assert keep - .1 < spent / total <= keep and blocks[0] - blocks[1] == total - spent
    assert {name: layer['rank'] for name, layer in report['layers'].items()} == ranks
    assert all(layer['of'] == 16 and 0 < layer['lost'] < 1 for layer in report['layers'].values())
    assert all(len(text) > 150 for text in report['samples']) and report['samples'][0] != report['samples'][1]
    assert report['options']['keep'] == (.3 if options else None) and report['latent_dim'] is None
    for kind in ('prefill', 'decode'):
        speed = report['speed'][kind]
        assert min(speed['tokens_per_s']) > 0 and speed['quartiles'][0] <= speed['ratio'] <= speed['quartiles'][1]
    for words in (f'{len(ranks)} layers as products of two', f'{numbers[0]:,} before, {numbers[1]:,} after',
                  f'{blocks[0]:,} before, {blocks[1]:,} after ({blocks[1] / blocks[0]:.1%})', 'written to out-lowrank',
                  f'val loss: {report["val_loss"][0]:.4f} before, {report["val_loss"][1]:.4f} after',
                  f'mlp.c_fc {ranks["h.0.mlp.c_fc"]}', *(text.split()[0] for text in report['samples'])):
        assert words in out, words


def test_all_of_it_is_the_model_itself(run, shrink):
    run(bias=True)
    for method in ('activation', 'whitened', 'plain'):
        _, report = shrink('--keep=1', f'--method={method}', save_dir=method)
        assert report['layers'] == {} and checkpoint(method)['model_args'] == checkpoint('out')['model_args']
        assert equal(checkpoint(method)['model'], checkpoint('out')['model'])


@pytest.mark.parametrize('method', ['activation', 'whitened', 'plain'])
def test_ranks_that_are_asked_for(run, shrink, method):
    run()
    _, report = shrink('--rank=7', f'--method={method}', save_dir='rank')
    assert {layer['rank'] for layer in report['layers'].values()} == {7} and len(report['layers']) == 6
    out, report = shrink('--rank=8', '--modules=attn', f'--method={method}', save_dir='none')
    assert 'no layer would be smaller as a product: all stay as they were' in out
    assert report['layers'] == {}                                   # square layers break even at 8
    _, report = shrink('--keep=0.5', '--modules=mlp', f'--method={method}', save_dir='mlp')
    assert set(report['layers']) == {'h.0.mlp.c_fc', 'h.0.mlp.c_proj'}
    _, report = shrink('--energy=0.8', f'--method={method}', save_dir='energy')
    for name, layer in report['layers'].items():
        # the energy is of inputs as they were, to the ridge
        assert layer['lost'] <= .2 + 1e-6 and layer['rank'] < (8 if 'attn' in name else 13)
    assert len(report['layers']) > 1


def test_the_same_seed_gives_the_same_bits(run, shrink):
    run()
    reports, models = {}, {}
    for name, seed in (('a', 1), ('b', 1), ('c', 2)):
        options = [f'--seed={seed}', '--calibration_tokens=64', '--finetune_iters=3']
        reports[name], models[name] = shrink(*options, save_dir=name)[1], checkpoint(name)['model']
    assert equal(models['a'], models['b']) and untimed(reports['a']) == untimed(reports['b'])
    assert any(not torch.equal(t, models['c'].get(key, t)) for key, t in models['a'].items())


def test_nothing_is_learnt_from_the_validation_split(run, shrink):
    """Another one gives the same model, and another loss."""
    run()
    options = '--keep=0.4', '--finetune_iters=3'
    shrink(*options)
    path = Path('data/toy/val.bin')
    path.write_bytes(np.roll(np.fromfile(path, np.uint16)[::-1], 5).tobytes())
    shrink(*options, save_dir='again')
    assert equal(checkpoint('out-lowrank')['model'], checkpoint('again')['model'])
    assert report_of('again')['val_loss'][0] > report_of('out-lowrank')['val_loss'][0] + .1


@pytest.mark.parametrize('bias', [False, True])
def test_fine_tuning_lowers_the_loss(run, shrink, bias):
    run(bias=bias)
    options = '--keep=0.2', '--method=plain'
    out, report = shrink(*options, '--finetune_iters=40', '--batch_size=8', '--learning_rate=0.01')
    before, after = report['val_loss_before_finetuning'], report['val_loss'][1]
    assert after < before - .1 and loss_in('out-lowrank') == pytest.approx(after, abs=1e-6)
    assert all(t.isfinite().all() for t in checkpoint('out-lowrank')['model'].values())
    assert 'then 40 steps in' in out and f'({before:.4f} before fine-tuning)' in out
    _, plain = shrink(*options, save_dir='plain')
    assert plain['val_loss'][1] == pytest.approx(before, abs=1e-6) and plain['finetune_seconds'] is None
    assert plain['layers'] == report['layers']


def test_the_teacher_has_no_dropout(run, shrink, monkeypatch):
    """Though an evaluation leaves a model in training mode: of two passes a step one alone drops anything."""
    dropout, dropped = torch.nn.functional.dropout, []
    run(model_args=checkpoint(run())['model_args'] | dict(dropout=.5))
    monkeypatch.setattr(torch.nn.functional, 'dropout', lambda x, p=.5, training=True, inplace=False: (
        dropped.append(training) or dropout(x, p, training, inplace)))
    shrink('--method=plain', '--finetune_iters=5')
    assert dropped.count(True) == 5 * 3                             # embeddings, attention's output, the MLP's


def test_where_v_sees_the_future_the_loss_is_prefix_only(run, shrink):
    """And there is no cache to report on."""
    run(model_args=checkpoint(run())['model_args'] | dict(use_svd=True, svd_rank=2))
    out, report = shrink('--keep=0.5')
    assert report['prefix_only'] and report['cache_bytes'] == [0, 0]
    assert 'prefix-only val loss: ' in out and 'cache bytes at 16 tokens: 0 before, 0 after\n' in out


def test_everything_takes_factors(run, shrink, call):
    """sample.py, train.py, and compress.py again: fewer numbers, MLA."""
    run()
    shrink('--keep=0.5')
    before, own = checkpoint('out-lowrank'), ['--out_dir=out-lowrank', '--device=cpu']
    result = call(train.main, '--eval_only=True', '--init_from=resume', *own)
    assert result.code == 0 and f'val loss {before["best_val_loss"]:.4f}' in result.out
    assert call(sample.main, *own, '--max_new_tokens=5', '--start=the').code == 0
    _, report = shrink('--out_dir=out-lowrank', '--keep=0.3', save_dir='less')
    assert report['params'][1] < report['params'][0] and report['val_loss'][0] == pytest.approx(
        before['best_val_loss'], abs=1e-5)
    _, report = shrink('--out_dir=out-lowrank', '--to=mla', '--mla_latent_dim=16', save_dir='latents')
    assert report['val_loss'] == pytest.approx([before['best_val_loss']] * 2, abs=1e-4)
    ranks = checkpoint('latents')['model_args']['layer_ranks']
    assert ranks == {name.replace('c_q', 'query'): r for name, r in before['model_args']['layer_ranks'].items()
                     if 'c_k' not in name and 'c_v' not in name}
    assert loss_in('latents') == pytest.approx(report['val_loss'][1], abs=1e-6)
    _, report = shrink('--out_dir=latents', '--keep=0.4', save_dir='fewer-latents')
    assert 'h.0.attn.c_attn.query' in report['layers']
    result = call(train.main, '--init_from=resume', *own, '--max_iters=20', '--lr_decay_iters=20', '--optimizer=adamw',
                  '--learning_rate=1e-3')
    assert result.code == 0, result.err
    assert rows('out-lowrank')[-1]['val/loss'] < before['best_val_loss']
    assert checkpoint('out-lowrank')['model_args'] == before['model_args']


def test_spectra(run, call, refused):
    run()
    before = folder_bytes('out')
    result = call(compress.main, '--spectrum', '--out_dir=out')
    assert result.code == 0, result.err
    assert sorted(os.listdir('out-spectrum')) == ['spectrum.csv', 'spectrum.png'] and folder_bytes('out') == before
    lines = Path('out-spectrum/spectrum.csv').read_text().splitlines()
    weight = checkpoint('out')['model']['transformer.h.0.attn.c_attn.weight'].double().chunk(3)[1]
    found = [float(line.split(',')[4]) for line in lines if line.startswith('h.0.attn.c_attn.c_k,')]
    assert found == pytest.approx(torch.linalg.svdvals(weight).tolist(), rel=1e-9)
    assert len(lines) == 1 + 6 * 16
    assert 'h.0.attn.c_attn.c_k' in result.out and 'all 6 weights' in result.out and 'written to out' in result.out
    before = folder_bytes('.')
    for options in ([], ['--save_dir=out']):
        line = refused(compress.main, '--spectrum', '--out_dir=out', *options)
        assert 'is there already' in line or 'has the model itself in it' in line
    assert folder_bytes('.') == before


@pytest.mark.parametrize('method', ['activation', 'whitened', 'plain'])
def test_a_product_keeps_at_most_its_rank(run, shrink, method):
    """Whatever is asked for the second time: nothing is lost, and no file grows."""
    run()
    shrink('--rank=3', f'--method={method}')
    ranks = checkpoint('out-lowrank')['model_args']['layer_ranks']
    for i, options in enumerate((['--keep=1'], ['--keep=.9'], ['--rank=5'], ['--energy=1'])):
        _, report = shrink('--out_dir=out-lowrank', f'--method={method}', *options, save_dir=f'again{i}')
        assert checkpoint(f'again{i}')['model_args']['layer_ranks'] == ranks
        assert report['params'][0] == report['params'][1]
        assert report['val_loss'][1] == pytest.approx(report['val_loss'][0], abs=1e-4)
    _, report = shrink('--out_dir=out-lowrank', f'--method={method}', '--rank=2', '--modules=mlp', save_dir='less')
    assert checkpoint('less')['model_args']['layer_ranks'] == {
        name: 2 if 'mlp' in name else rank for name, rank in ranks.items()}


def test_spectra_are_of_every_weight():
    """Those of MLA's latents, too, and W_v where 'weight' scope cuts it."""
    shape = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=31)
    for options, kinds in ((dict(use_mla=True), ('query', 'kv_down', 'k_up', 'v_up')),
                           (dict(use_svd=True, svd_scope='weight', svd_rank=2), ('c_q', 'c_k', 'c_v'))):
        found = layers.weights_of(GPT(GPTConfig(**shape | options)))
        assert {*found} == {f'h.{i}.{part}' for i in range(2) for part in (
            'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj', *(f'attn.c_attn.{kind}' for kind in kinds))}
        found = layers.weights_of(GPT(GPTConfig(**shape | options)), ['mlp'])
        assert {*found} == {f'h.{i}.mlp.{part}' for i in range(2) for part in ('c_fc', 'c_proj')}


@pytest.mark.slow
def test_spectra_of_factors(run, shrink, call):
    run()
    shrink('--rank=3', '--modules=mlp')
    result = call(compress.main, '--spectrum', '--out_dir=out-lowrank')
    assert result.code == 0, result.err
    cells = {line.split()[0]: line.split()[1:] for line in result.out.splitlines() if line.startswith('h.0.')}
    assert cells['h.0.mlp.c_fc'][:3] == ['64', 'x', '16'] and cells['h.0.mlp.c_fc'][4] == '3' and len(cells) == 6


def test_train_sample_and_export_take_it(run, convert, call):
    run()
    convert()
    before = checkpoint('out-mla')['best_val_loss']
    result = call(train.main, '--eval_only=True', '--init_from=resume', '--out_dir=out-mla', '--device=cpu')
    assert result.code == 0 and f'val loss {before:.4f}' in result.out
    assert call(sample.main, '--out_dir=out-mla', '--device=cpu', '--max_new_tokens=5', '--start=the').code == 0
    assert call(export.main, '--out_dir=out-mla', '--save_dir=mine').code == 0
    result = call(train.main, '--init_from=resume', '--out_dir=out-mla', '--max_iters=20', '--lr_decay_iters=20',
                  '--optimizer=adamw', '--learning_rate=1e-3', '--device=cpu')
    assert result.code == 0 and 'the optimizer starts anew' in result.out
    assert [row['iter'] for row in rows('out-mla') if 'lr' in row] == list(range(1, 21))
    assert rows('out-mla')[-1]['val/loss'] < before


def test_the_seed_decides(run, convert):
    run()
    for name, seed in (('a', 1), ('b', 1), ('c', 2)):
        convert(f'--seed={seed}', f'--save_dir={name}', '--calibration_tokens=64')
    a, b, c = (checkpoint(name)['model'] for name in 'abc')
    assert equal(a, b) and not equal(a, c)


def test_a_nanogpt_checkpoint_needs_its_text(run, convert, refused):
    run(without=['tokenizer', 'random', 'scaler'], config=dict(dataset='gone', device='cuda'))
    saved = checkpoint('out')
    saved['config']['dataset'] = 'gone'
    torch.save(saved, 'out/ckpt.pt')
    assert 'dataset=gone: no such data set' in refused(compress.main, *MLA)
    convert('--dataset=toy')
    assert checkpoint('out-mla')['config']['dataset'] == 'toy' and 'chars' in checkpoint('out-mla')['tokenizer']


def test_a_folder_in_hugging_faces_format(run, convert, call, refused):
    run(bias=True)
    assert call(export.main, '--out_dir=out', '--save_dir=mine').code == 0
    assert 'init_from=mine: needs a text' in refused(compress.main, '--init_from=mine')
    convert('--init_from=mine', '--dataset=toy', '--mla_latent_dim=16')
    assert difference(model_of('out'), model_of('mine-mla')) < 1e-4
    assert call(train.main, '--eval_only=True', '--init_from=resume', '--out_dir=mine-mla', '--device=cpu').code == 0


def test_a_run_is_only_replaced_when_asked_to(run, convert):
    run()
    convert()
    first = folder_bytes('out-mla')
    convert('--overwrite=True', '--mla_latent_dim=2')
    assert folder_bytes('out-mla.1') == first and checkpoint('out-mla')['model_args']['mla_latent_dim'] == 2


# ----------------------------------------------------------------------------------------------------------------------
# wrong input

@pytest.mark.parametrize('argv, words', [
    (['--mla_latent_dim=0'], 'mla_latent_dim=0: must be at least 1 (nearest: 1)'),
    (['--to=mla', '--mla_latent_dim=17'], 'mla_latent_dim=17: must be at most n_embd (nearest: 16)'),
    (['--calibration_tokens=0'], 'calibration_tokens=0: must be at least 1'), (['--seed=-1'], 'seed=-1'),
    (['--to=svd'], "'lowrank' or 'mla'"), (['--to=mla', '--method=whitened'], "(nearest: 'activation')"),
    (['--out_dir=nowhere'], 'no such checkpoint (nearest: '),
    (['--to=mla', '--out_dir=latent'], 'latent/ckpt.pt: is MLA already'),
    (['--save_dir=data'], 'is there already'), (['--save_dir=data', '--overwrite=True'], 'is there already'),
    (['--save_dir=.'], 'must be another folder'), (['--save_dir=~', '--overwrite=True'], 'must be another folder'),
    (['--save_dir=..', '--overwrite=True'], 'must be another folder'),
    (['--save_dir=out', '--overwrite=True'], 'has the model itself in it'),
    (['--init_from=gpt2', '--dataset=toy'], "out_dir='out': not together"),
    (['--save_dir=file/below'], 'cannot be written'), (['--dataset=short.txt'], 'too few for block_size=16'),
    (['--dataset=other.txt'], 'its characters are not those of out/ckpt.pt'), (['--dataset=none'], 'no such data set'),
    (['--init_from=gpt3'], 'gpt3'), (['--init_from=gpt2'], 'init_from=gpt2: needs a text'),
    (['--keep=1.5'], 'keep=1.5: must be above 0 and at most 1 (nearest: 1)'), (['--keep=0'], 'keep=0.0: must be above'),
    (['--keep=0.01'], 'out/ckpt.pt: keep=0.01: leaves less than rank 1 a layer (nearest: 0.'),
    (['--keep=0.01', '--method=plain'], 'keep=0.01: leaves no rank at all (nearest: 0.125)'),
    (['--rank=0'], 'rank=0: must be at least 1'), (['--rank=17'], 'rank=17: a layer has no more than 16 (nearest: 16)'),
    (['--energy=0'], 'energy=0.0: must be above 0'), (['--energy=1.1'], 'at most 1 (nearest: 1)'),
    (['--keep=0.5', '--rank=3'], 'rank=3: not together with keep'),
    (['--rank=3', '--energy=.5'], 'not together with rank'), (['--energy=.5', '--keep=.5'], 'not together with keep'),
    (['--keep=0.5', '--to=mla'], 'keep=0.5: not with --to=mla'),
    (['--rank=2', '--spectrum'], 'rank=2: not with --spectrum'), (['--modules=attn', '--to=mla'], 'not with --to=mla'),
    (['--optimizer=adamw'], "optimizer='adamw': only with --finetune_iters"),
    (['--learning_rate=1e-3', '--to=mla'], 'learning_rate=0.001: only with --finetune_iters'),
    (['--spectrum', '--method=whitened'], "method='whitened': not with --spectrum"),
    (['--spectrum', '--to=mla'], "to='mla': not with --spectrum"),
    (['--spectrum', '--dataset=toy'], "dataset='toy': not with --spectrum"),
    (['--modules=head'], "'head' is none of attn, mlp (nearest: 'attn,mlp')"), (['--modules='], "'' is none of"),
    (['--mla_latent_dim=4'], 'mla_latent_dim=4: not with --to=lowrank'), (['--learning_rate=-1'], 'learning_rate=-1.0'),
    (['--finetune_iters=-1'], 'finetune_iters=-1: must be at least 0'), (['--batch_size=0'], 'batch_size=0'),
    (['--method=best'], "'activation' or 'whitened' or 'plain'"), (['--keep=nan'], 'keep='), (['--keep=half'], 'keep='),
    (['--device=cuda:77'], 'not on this machine'), (['--latent=4'], '--latent: no such option')])
def test_wrong_input_is_one_line_and_writes_nothing(run, refused, here, monkeypatch, argv, words):
    run(), run('latent')
    latent = checkpoint('latent')
    latent['model_args']['use_mla'] = True
    latent['model'] = GPT(GPTConfig(**latent['model_args'])).state_dict()
    torch.save(latent, 'latent/ckpt.pt')
    monkeypatch.setattr('runtime.dataset.DATA_ROOTS', (here / 'data',))
    monkeypatch.setattr('runtime.dataset.locate.__defaults__', ((here / 'data',),))
    write_dataset('data/short.txt', TEXT[:18], 'char', source='tests')
    write_dataset('data/other.txt', TEXT.upper(), 'char', source='tests')
    meta = (here / 'data' / 'toy' / 'meta.json').read_bytes()
    (here / 'data' / 'short.txt' / 'meta.json').write_bytes(meta.replace(b'_tokens', b'_old'))
    Path('file').touch()
    before = folder_bytes('.')
    assert words in refused(compress.main, '--device=cpu', '--out_dir=out', *argv)
    assert folder_bytes('.') == before


def test_a_run_that_goes_on_is_not_replaced(run, convert, refused, monkeypatch):
    run()
    convert()
    before, held = folder_bytes('out-mla'), lock('out-mla')
    monkeypatch.setattr(compress, 'load_model', None)               # refused before that
    try:
        assert "save_dir='out-mla': a run is going on there" in refused(compress.main, *MLA, '--overwrite=True')
    finally:
        os.close(held)
    assert folder_bytes('out-mla') == before and not Path('out-mla.1').exists()


def test_a_replacement_that_fails_leaves_what_was_there(run, convert, refused, monkeypatch):
    run()
    convert()
    before = folder_bytes('.')
    monkeypatch.setattr('compress.ckpt.save', lambda *_: (_ for _ in ()).throw(OSError(13, 'denied')))
    assert "save_dir='out-mla': cannot be written: denied" in refused(compress.main, *MLA, '--overwrite=True')
    assert folder_bytes('.') == before


def test_fine_tuning_keeps_dtype_and_compile(run, convert):
    run()
    saved = checkpoint('out')
    saved['config'] |= dict(dtype='bfloat16', compile=False)
    torch.save(saved, 'out/ckpt.pt')
    convert()
    cfg, _, _ = train.load_config(['--init_from=resume', '--out_dir=out-mla'])
    assert (cfg.dtype, cfg.compile) == ('bfloat16', False)


def test_short_texts(run, convert, refused):
    """All there is to measure on; a prefix-only loss needs a window of the validation split."""
    run()
    write_dataset('data/toy', TEXT[:300], 'char', source='tests')
    convert('--calibration_tokens=1000000000000000000')
    saved = checkpoint('out')
    saved['model_args'] |= dict(use_svd=True, svd_rank=2)
    torch.save(saved, 'out/ckpt.pt')
    write_dataset('data/toy', 7 * ''.join(sorted(set(TEXT))), 'char', source='tests')
    assert 'val.bin has 12 tokens, too few for block_size=16' in refused(compress.main, *MLA, '--save_dir=other')


@pytest.mark.parametrize('kind, options, layer', [('Statistics', MLA, 'c_attn: '), ('Statistics', [], 'c_attn.c_q: '),
                                                  ('Shift', [], 'c_attn.c_q: ')])
def test_what_overflows_is_one_line(run, refused, monkeypatch, kind, options, layer):
    """Squares of activations, float64, name the layer; of weights too large for float32 there is no loss."""
    saved, add = checkpoint(run()), getattr(layers, kind).add
    with monkeypatch.context() as patch:
        patch.setattr(getattr(layers, kind), 'add', lambda self, x, *others: add(self, x.double() * 1e200, *others))
        assert f'out/ckpt.pt: h.0.attn.{layer}' in refused(compress.main, '--device=cpu', *options)
    saved['model']['transformer.h.0.mlp.c_fc.weight'] *= 1e38
    torch.save(saved, 'out/ckpt.pt')
    assert 'out/ckpt.pt: its loss is nan' in refused(compress.main, *MLA)

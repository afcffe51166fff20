"""compress.py: ordinary attention to MLA; exact at full width, better than the SVD of the weights below it."""

import os
from pathlib import Path

import pytest
import torch

import compress
import export
import sample
import train
from conftest import TEXT, TINY, checkpoint, equal, folder_bytes, rows
from model import GPT, GPTConfig
from runtime.dataset import Dataset, write_dataset
from runtime.run import lock
from test_compress_layers import difference

pytestmark = pytest.mark.usefixtures('one_thread')
MLA = ('--to=mla', '--device=cpu', '--calibration_tokens=512')
LEARN = '--max_iters=100 --lr_decay_iters=100 --eval_interval=100 --learning_rate=2e-2 --optimizer=muon'.split()


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
    (['--mla_latent_dim=17'], 'mla_latent_dim=17: must be at most n_embd (nearest: 16)'),
    (['--calibration_tokens=0'], 'calibration_tokens=0: must be at least 1'), (['--seed=-1'], 'seed=-1'),
    (['--to=svd'], "(nearest: 'mla')"), (['--method=whitened'], "'activation' or 'plain'"),
    (['--out_dir=nowhere'], 'no such checkpoint (nearest: '), (['--out_dir=latent'], 'latent/ckpt.pt: is MLA already'),
    (['--save_dir=data'], 'is there already'), (['--save_dir=data', '--overwrite=True'], 'is there already'),
    (['--save_dir=.'], 'must be another folder'), (['--save_dir=..', '--overwrite=True'], 'must be another folder'),
    (['--save_dir=out', '--overwrite=True'], 'has the model itself in it'),
    (['--init_from=gpt2', '--dataset=toy'], "out_dir='out': not together"),
    (['--save_dir=file/below'], 'cannot be written'), (['--dataset=short.txt'], 'too few for block_size=16'),
    (['--dataset=other.txt'], 'its characters are not those of out/ckpt.pt'), (['--dataset=none'], 'no such data set'),
    (['--init_from=gpt3'], 'gpt3'), (['--init_from=gpt2'], 'init_from=gpt2: needs a text'),
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


def test_a_folder_around_the_run_is_not_replaced(run, refused, here):
    run('outer'), run('outer/inner')
    before = folder_bytes('.')
    options = ['--device=cpu', '--out_dir=outer/inner', '--save_dir=outer', '--overwrite=True']
    assert 'has the model itself in it' in refused(compress.main, *options)
    assert folder_bytes('.') == before


def test_a_run_that_goes_on_is_not_replaced(run, convert, refused):
    run()
    convert()
    before, held = folder_bytes('out-mla'), lock('out-mla')
    try:
        assert "save_dir='out-mla': a run is going on there" in refused(compress.main, *MLA, '--overwrite=True')
    finally:
        os.close(held)
    assert folder_bytes('out-mla') == before and not Path('out-mla.1').exists()


def test_a_replacement_that_fails_leaves_what_was_there(run, convert, refused, monkeypatch):
    run()
    convert()
    before = folder_bytes('.')
    monkeypatch.setattr('runtime.checkpoint.torch.save', lambda *_: (_ for _ in ()).throw(OSError(28, 'full')))
    assert "save_dir='out-mla': cannot be written: full" in refused(compress.main, *MLA, '--overwrite=True')
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


@pytest.mark.parametrize('error, code', [(OSError(28, 'No space left on device'), 2), (KeyboardInterrupt(), 130)])
def test_a_full_disk_or_ctrl_c_leaves_nothing(run, call, monkeypatch, error, code):
    run()

    def fail(descriptor):
        raise error
    monkeypatch.setattr('runtime.files.os.fsync', fail)
    before = folder_bytes('.')
    result = call(compress.main, *MLA, '--save_dir=a/b')
    assert result.code == code and 'Traceback' not in result.err and folder_bytes('.') == before
    assert code == 130 or 'No space left on device' in result.err and not Path('a').exists()


def test_weights_that_overflow_are_one_line(run, refused):
    run()
    saved = checkpoint('out')
    saved['model']['transformer.h.0.mlp.c_fc.weight'] *= 1e38
    torch.save(saved, 'out/ckpt.pt')
    assert 'out/ckpt.pt: gradients: not finite' in refused(compress.main, *MLA)


def test_help_names_every_option(call):
    result = call(compress.main, '--help')
    assert result.code == 0 and all(f'--{name}=' in result.out for name in compress.CompressConfig.__dataclass_fields__)

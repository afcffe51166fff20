"""compress.py: ordinary attention to MLA; exact at full width, better than the SVD of the weights below it."""

import os
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

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


def settings(**changes):
    return SimpleNamespace(**dict(calibration_tokens=128, seed=1337) | changes)


def random_model(dtype=torch.float32, **options):
    """Weights and biases of a size that makes every one of them count."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**dict(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=17) | options))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=.3)
    return model.to(dtype).eval().requires_grad_(False)


def converted(model, latent, statistics):
    return compress.to_mla(model, GPTConfig(**asdict(model.config) | dict(use_mla=True, mla_latent_dim=latent)),
                           statistics).eval()


def difference(a, b):
    """Largest difference of logits on tokens nobody calibrated on."""
    idx = torch.randint(17, (8, 16), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return (a(idx, idx)[0] - b(idx, idx)[0]).abs().max().item()


def model_of(folder):
    return GPT.from_checkpoint(checkpoint(folder)).eval()


# ----------------------------------------------------------------------------------------------------------------------
# the conversion

@pytest.mark.parametrize('svd', [{}, dict(svd_scope='weight'), dict(svd_scope='causal', svd_block=4),
                                 dict(svd_scope='sequence', svd_method='randomized')])
@pytest.mark.parametrize('dtype, most', [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('tokens', [None, 1, 512])
def test_at_full_width_the_logits_stay(toy, tokens, bias, dtype, most, svd):
    """On any input, with one calibration window of 16 too; tokens None: plain."""
    model = random_model(dtype, bias=bias, **svd, **(dict(use_svd=True, svd_rank=3) if svd else {}))
    statistics = tokens and compress.calibrate(model, Dataset(toy), settings(calibration_tokens=tokens), 'cpu')
    new = converted(model, 16, statistics)
    most = max(most, 1e-5) if svd else most                         # SVD of V works in float32 here and there
    assert difference(model, new) < most < 1e-3 < difference(model, converted(model, 8, statistics))


def test_weight_scope_finds_nothing_more_to_cut(toy):
    model = random_model(use_svd=True, svd_rank=3, svd_scope='weight')
    new = converted(model, 6, compress.calibrate(model, Dataset(toy), settings(), 'cpu'))
    assert new.config.svd_truncates
    uncut = GPT.from_checkpoint(dict(model_args=asdict(new.config), model=new.state_dict()), use_svd=False).eval()
    assert difference(new, uncut) < 1e-4


def test_a_running_basis_comes_along():
    """From which 'randomized' starts: without it, another approximation."""
    model = random_model(use_svd=True, svd_rank=3, svd_method='randomized', svd_power_iters=0)
    model.svd_basis = torch.linalg.qr(torch.randn(2, 2, 8, 3, generator=torch.Generator().manual_seed(1)))[0]
    new = converted(model, 16, None)
    assert torch.equal(new.svd_basis, model.svd_basis) and difference(model, new) < 1e-4
    new.svd_basis = None
    assert difference(model, new) > 1e-3


def test_a_bias_takes_the_mean_of_what_is_lost(toy):
    """The mean value over the calibration tokens stays; without statistics it moves."""
    model = random_model(bias=True, n_layer=1)
    statistics = compress.calibrate(model, Dataset(toy), settings(), 'cpu')
    mean = (statistics[0].input_sum / statistics[0].tokens).float()[None, None]                 # (1, 1, C)
    values = [m.transformer.h[0].attn.c_attn(mean)[2] for m in (model, *(converted(model, 4, s) for s in (
        statistics, None)))]
    assert torch.allclose(values[0], values[1], atol=1e-5) and not torch.allclose(values[0], values[2], atol=1e-2)


@pytest.mark.parametrize('bias', [False, True])
def test_a_mean_costs_no_direction_where_a_bias_takes_it(bias):
    """Inputs that are all shifted have the same factors then, else others."""
    attn, factors = random_model(bias=bias).transformer.h[0].attn, []
    x, g = (torch.randn(200, n, generator=torch.Generator().manual_seed(n)) for n in (16, 32))
    for shift in (0, 3):
        statistics = compress.Statistics()
        statistics.add(x + shift, g)
        parts = compress.latent_projection(attn, 4, statistics)
        factors.append(parts['k_up.weight'] @ parts['kv_down.weight'])
    assert torch.allclose(*factors, atol=1e-4) == bias


def test_the_statistics_are_those_of_inputs_and_gradients(toy):
    """Against hooks on the residual stream and autograd's own gradients of keys and values."""
    model, data, seen = random_model(torch.float64), Dataset(toy), []
    x, y = data.batch('train', 8, 16, torch.Generator().manual_seed(1337), 'cpu')
    found = compress.calibrate(model, data, settings(), 'cpu')

    def keep(layer, inputs, output):
        for t in output:
            t.retain_grad()
        seen.append((inputs[0], output))
    for block in model.transformer.h:
        block.attn.c_attn.register_forward_hook(keep)
    model.requires_grad_(True)
    (model(x, y)[1] * y.numel()).backward()
    assert len(seen) == len(found) == 2
    for (inputs, (_, k, v)), statistics in zip(seen, found):
        inputs, k, v = inputs.flatten(0, 1), *(t.grad.transpose(1, 2).reshape(128, 16) for t in (k, v))
        g = torch.cat((k, v), dim=1)
        assert statistics.tokens == 128 and torch.allclose(statistics.input_sum, inputs.sum(0))
        assert torch.allclose(statistics.inputs, inputs.mT @ inputs) and torch.allclose(statistics.gradients, g.mT @ g)


def test_dropout_and_the_running_basis_are_left_out_of_it(toy):
    """Evaluations leave a model in training mode; the statistics are those of the model as it is used."""
    model = random_model(dropout=.5, use_svd=True, svd_rank=3, svd_method='randomized')
    a, b = (compress.calibrate(model.train(mode), Dataset(toy), settings(), 'cpu') for mode in (True, False))
    assert all(torch.equal(x.gradients, y.gradients) and torch.equal(x.inputs, y.inputs) for x, y in zip(a, b))
    model.advance_svd_basis()
    assert model.svd_basis is None


def test_only_the_training_split_is_measured(toy, monkeypatch):
    splits, tokens = set(), Dataset.tokens
    data = Dataset(toy)
    monkeypatch.setattr(Dataset, 'tokens', lambda self, split: splits.add(split) or tokens(self, split))
    compress.calibrate(random_model(), data, settings(), 'cpu')
    assert splits == {'train'}


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

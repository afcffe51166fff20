"""LoRA and adaptive SVD across the commands: train.py --init_from=FOLDER, sample.py, export.py,
compress.py and bench.py."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
import export
import sample
import train
from helpers import TINY, checkpoint, equal, folder_bytes, rows, same, slow, untimed
from lowrank.layers import LoRALinear
from model import ADAPTER_DEFAULTS, GPT, TARGETS, GPTConfig
from runtime.data import Dataset
from tools.model_compression import validation_loss

pytestmark = pytest.mark.usefixtures('one_thread', 'here')
BASE = ['--n_layer=2', '--bias=True']
LORA = [*BASE, '--init_from=base', '--lora_rank=3']
WORDS = ['c_q', 'c_k', 'c_v', 'c_proj', 'c_fc', 'mlp.c_proj']
ADAPTIVE = [
    '--n_embd=20', '--adaptive_svd=True', '--adaptive_svd_interval=1', '--learning_rate=1e-3',
    '--seed=1', '--max_iters=26', '--lr_decay_iters=26', '--eval_interval=100', '--eval_iters=1',
    '--bias=True'
]
KINDS = ['LoRA', 'LoRA, MLA', 'adaptive', 'adaptive, MLA']
DATA = ['--dataset=toy', '--device=cpu']


@pytest.fixture
def finished(trained, trained_once):
    """finished(kind) copies a finished run of that kind into out/ and returns its final loss."""
    def finished(kind):
        mla = ['--use_mla=True'] if 'MLA' in kind else []
        words = 'query,c_proj,c_fc' if mla else ','.join(WORDS)
        if 'adaptive' in kind:
            trained(*ADAPTIVE, *mla,
                    f'--adaptive_svd_targets={"query" if mla else "c_q,c_k,c_v"},c_proj')
            assert checkpoint()['model_args']['adaptive_svd_ranks']
        else:
            trained(*BASE, *mla, f'--init_from={trained_once(*BASE, *mla)}', '--lora_rank=3',
                    '--lora_init=pissa', f'--lora_targets={words}', '--lora_alpha=6')
        return final('out')
    return finished


@pytest.fixture
def done(call):
    """done(main, *argv) runs a command that must succeed, and returns its output."""
    def done(main, *argv):
        result = call(main, *argv)
        assert result.code == 0, result.err
        return result.out
    return done


def interim(folder):
    """Return the training and validation losses of all evaluations before the final one."""
    return [(row['train/loss'], row['val/loss']) for row in rows(folder) if 'train/loss' in row]


def final(folder):
    return [row['val/loss'] for row in rows(folder) if 'final' in row][-1]


def loss_in(folder):
    """Return the loss on the whole validation split, as at the end of a run."""
    return validation_loss(GPT.from_pretrained(str(folder)), Dataset('data/toy'), 'cpu', 1337)


# --------------------------------------------------------------------------------------------------
# LoRA: trained parameters


@pytest.mark.parametrize('init, optimizer', [('lora', 'adamw'), ('pissa', 'muon'),
                                             ('milora', 'adamw')])
def test_lora_trains_its_adapters_alone(trained, fit, init, optimizer):
    """LoRA starts with the loss of its base and changes the adapters alone. All other weights stay
    bit-identical, and so does the folder of the base."""
    before = folder_bytes(trained(*BASE, folder='base'))
    fit(*LORA, f'--lora_init={init}', f'--optimizer={optimizer}', '--lora_targets=c_q,mlp.c_proj')
    assert folder_bytes('base') == before
    assert interim('out')[0] == pytest.approx(interim('base')[-1], abs=1e-5)
    begun, saved = GPT.from_pretrained('base'), checkpoint()
    torch.manual_seed(1337)
    begun.add_adapters(lora_rank=3, lora_init=init, lora_targets='c_q,mlp.c_proj')
    assert saved['model'].keys() == begun.state_dict().keys()
    for name, w in begun.state_dict().items():
        assert torch.equal(w, saved['model'][name]) != name.endswith(
            ('.A.weight', '.B.weight')), name
    states = saved['optimizer'].values() if optimizer == 'muon' else [saved['optimizer']]
    assert sum(len(state['state']) for state in states) == 8 and final('out') < final('base')
    assert final('out') == pytest.approx(loss_in('out'), abs=1e-6)


@pytest.mark.parametrize('words, names', [
    *((word, [word]) for word in WORDS), (','.join(WORDS), WORDS), (' c_fc , c_q', ['c_q', 'c_fc']),
    ('query', ['query']),
    ('query,c_proj,c_fc,mlp.c_proj', ['query', 'c_proj', 'c_fc', 'mlp.c_proj'])
])
def test_lora_targets(words, names):
    """lora_targets selects the layers that get adapters, in every block, and nothing else is
    trained."""
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=11, block_size=8,
                          use_mla='query' in words, lora_rank=3, lora_targets=words))
    expected = [f'h.{i}.{TARGETS[name]}' for i in range(2) for name in names]
    found = [
        name for name, layer in model.transformer.named_modules() if isinstance(layer, LoRALinear)]
    assert model.config.lora_layers == expected and sorted(found) == sorted(expected)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {
        f'transformer.{name}.{factor}.weight' for name in expected for factor in 'AB'}


def test_lora_with_a_shorter_context_trains_no_positions(trained, fit):
    """A shorter block_size crops the position embedding without training it. A LoRA run into the
    folder of its base moves the base aside first."""
    before = folder_bytes(trained(*BASE, folder='base'))
    out = fit(*LORA, '--block_size=8', '--lora_alpha=12', '--out_dir=base')
    assert '384 trained parameters' in out and folder_bytes('base.1') == before
    ours, whole = (checkpoint(folder)['model']['transformer.wpe.weight']
                   for folder in ('base', 'base.1'))
    assert torch.equal(ours, whole[:8]) and len(whole) == 16
    assert GPT.from_pretrained('base').get_layer('h.1.attn.c_attn.c_v').scale == 4


# --------------------------------------------------------------------------------------------------
# LoRA: resuming and exporting

@pytest.mark.parametrize('options, stop', [
    slow([], 4), (['--optimizer=muon', '--lora_init=pissa', '--gradient_accumulation_steps=2'], 3),
    slow(['--lora_init=milora'], 5)])
def test_a_resumed_lora_run_is_the_undisturbed_one(trained, fit, options, stop):
    """A LoRA run that was stopped and resumed equals the uninterrupted run, bit by bit."""
    trained(*BASE, folder='base')
    options = [
        *LORA, *options, '--dropout=.2', '--lora_dropout=.3', '--lora_alpha=5',
        '--lr_decay_iters=7', '--lora_targets=c_q,c_proj,c_fc', '--max_iters=7']
    fit(*options, '--out_dir=whole')
    fit(*options, f'--max_iters={stop}')
    fit(*options, '--init_from=resume')
    ours, whole = checkpoint(), checkpoint('whole')
    assert all(same(ours[key], whole[key]) for key in whole.keys() - {'config'})
    assert {k for k, v in whole['config'].items()
            if v != ours['config'][k]} == {'init_from', 'out_dir'}
    steps = [[row
              for row in untimed(folder)
              if 'val/loss' not in row]
             for folder in ('out', 'whole')]
    assert steps[0] == steps[1]


@pytest.mark.parametrize('init, rank, form', [slow('lora', 3, 'gpt2'), ('pissa', 6, 'nanogpt'),
                                              slow('milora', 6, 'safetensors')])
def test_exported_adapters_make_the_same_model_of_the_base(trained, fit, done, init, rank, form):
    """Exported adapters on the base give the model that was trained, for every format of the base.
    They are bit-identical with init 'lora'. Those of PiSSA and MiLoRA have twice the rank."""
    trained(*BASE, folder='base')
    fit(*LORA, f'--lora_init={init}', '--lora_alpha=7')
    done(export.main, '--out_dir=out', '--to=lora', '--save_dir=adapter')
    done(export.main, '--out_dir=base', f'--to={form}')
    adapted = [f'--init_from=base-{form}', '--lora_adapter=adapter', *DATA]
    done(train.main, *adapted, '--eval_only=True', '--out_dir=evaluated')
    assert rows('evaluated', 'eval.jsonl')[-1]['val/loss'] == pytest.approx(final('out'), abs=1e-5)
    fit(*BASE, *adapted, '--max_iters=1', '--learning_rate=0', '--block_size=8', '--out_dir=again')
    theirs, own = GPT.from_pretrained('again'), GPT.from_pretrained('out')
    assert (theirs.config.lora_rank, theirs.config.lora_targets) == (rank, 'c_q,c_v')
    for a, b in ((theirs.get_layer(name), own.get_layer(name)) for name in own.config.lora_layers):
        assert a.scale == pytest.approx(b.scale) and torch.allclose(a.weight, b.weight, atol=1e-5)
        assert init != 'lora' or equal(a.state_dict(), b.state_dict())
    assert 'with adapter' in done(sample.main, '--out_dir=base', '--lora_adapter=adapter',
                                  '--device=cpu', '--max_new_tokens=5')


def test_adapters_that_do_not_fit_are_refused(trained, fit, done, refused):
    """Adapters of another base, or folders without adapters, end in a one-line error. An adapter
    file without a checksum gives a warning instead."""
    trained(*BASE, folder='base')
    trained('--n_layer=2', '--n_embd=32', folder='wider')
    trained(*BASE, '--seed=1', folder='other')
    fit(*LORA)
    done(export.main, '--out_dir=out', '--to=lora', '--save_dir=adapter')
    done(export.main, '--out_dir=base', '--to=safetensors', '--save_dir=whole')
    drawn = ['--device=cpu', '--lora_adapter=adapter']
    own = [*drawn, '--dataset=toy', '--out_dir=new']
    for main, argv, words in ((train.main, [*own, '--init_from=wider'], [
            'h.0.attn.c_attn.c_q.A', '(3, 16)', '(3, 32)'
    ]), (train.main, [*own, '--init_from=out'],
         ['already has adapters', '--to=dense']), (train.main, [*own, '--init_from=other'], [
             "='adapter'", 'of base', '--init_from=base'
         ]), (train.main, own, ["lora_adapter='adapter'"]), (train.main, [
             *own, '--init_from=base', '--lora_adapter=nowhere'
         ], ['nowhere',
             'cannot be read']), (train.main, [*own, '--init_from=base',
                                               '--lora_adapter=whole'], ['whole', 'adapter']),
                              (sample.main, [*drawn, '--out_dir=other'],
                               ["lora_adapter='adapter'",
                                'of base']), (export.main, ['--out_dir=base',
                                                            '--to=lora'], ['--to=safetensors'])):
        line = refused(main, *argv)
        assert all(word in line for word in words), line
    # without a checksum, as in older exports
    save_file(load_file('adapter/model.safetensors'), 'adapter/model.safetensors')
    out = done(sample.main, *drawn, '--out_dir=other', '--max_new_tokens=5')
    assert "lora_adapter='adapter': " in out


# --------------------------------------------------------------------------------------------------
# LoRA: invalid options


@pytest.mark.parametrize('base, options, words', [
    ([], '--lora_rank=17', ['lora_rank=17', 'must be 1 to 16']),
    ([], '--lora_rank=0', ['lora_rank=0']), ([], '--lora_rank=-1', ['lora_rank=-1']),
    ([], '--lora_rank=1.5', ['lora_rank']),
    ([], '--lora_rank=2 --lora_targets=c_x', ["'c_x'", 'c_q, c_k, c_v, c_proj, c_fc, mlp.c_proj']),
    ([], '--lora_rank=2 --lora_targets=', ["''"]),
    ([], '--lora_rank=2 --lora_targets=query', ["'query'"]),
    ([], '--lora_rank=2 --lora_targets=c_attn', ["'c_attn'"]),
    (['--use_mla=True'], '--lora_rank=2', ["'c_q'", 'query, c_proj, c_fc, mlp.c_proj']),
    (['--use_mla=True'], '--lora_rank=2 --lora_targets=c_fc,c_v', ["'c_v'"]),
    ([], '--lora_rank=2 --lora_init=pisa', ['lora_init', 'pissa']),
    *(slow(*case)
      for case in [([], '--lora_init=pisa',
                    ['lora_init', 'pissa']), ([], '--lora_rank=2 --lora_alpha=0', ['lora_alpha=0']),
                   ([], '--lora_alpha=0',
                    ['lora_alpha=0']), ([], '--lora_rank=2 --lora_alpha=-1', ['lora_alpha=-1']),
                   ([], '--lora_rank=2 --lora_alpha=inf', ['lora_alpha=', 'inf']),
                   ([], '--lora_rank=2 --lora_dropout=1', ['lora_dropout=1']),
                   ([], '--lora_rank=2 --lora_dropout=-.1', ['lora_dropout=-0.1']),
                   ([], '--lora_rank=2 --adaptive_svd=True', ['lora_rank=2', 'adaptive_svd']),
                   (["--layer_ranks={'h.0.attn.c_attn.c_q':3}"], '--lora_rank=2',
                    ["layer_ranks={'h.0.attn.c_attn.c_q'"]),
                   (["--layer_ranks={'h.1.mlp.c_fc':3}"], '--lora_rank=2 --lora_targets=c_fc',
                    ['layer_ranks', 'h.1.mlp']),
                   (['--adaptive_svd=True'], '--lora_rank=2', ['lora_rank=2', 'base'])])
])
def test_invalid_lora_options_are_refused(trained, refused, base, options, words):
    """Invalid LoRA options end in a one-line error with the valid choices, and nothing is
    written."""
    before = folder_bytes(trained(*BASE, *base, folder='base'))
    line = refused(train.main, *TINY, '--n_layer=2', '--init_from=base', *options.split())
    assert all(word in line for word in words), line
    assert folder_bytes('base') == before and not Path('out').exists()


@pytest.mark.slow
def test_what_a_run_has_stays_when_it_goes_on(trained, finished, refused):
    """LoRA needs a trained base, and a run's LoRA options, shape and characters cannot change
    later. Each attempt ends in a one-line error and writes nothing."""
    trained(*BASE, folder='base')
    finished('LoRA')
    Path('other.txt').write_text('quick brown foxes jump over lazy dogs\n' * 40)
    before, start = folder_bytes('.'), [*DATA, '--out_dir=new']
    resume = ['--init_from=resume', '--device=cpu', '--max_iters=9']
    for argv, words in (([*TINY, '--out_dir=new',
                          '--lora_rank=2'], ['lora_rank=2', '--init_from=FOLDER']),
                        ([*resume, '--out_dir=base', '--lora_rank=2'], ['lora_rank=2', 'base']),
                        *(([*resume, option], [option[2:6]])
                          for option in ('--lora_rank=2', '--lora_alpha=1', '--lora_targets=c_q',
                                         '--lora_init=lora', '--adaptive_svd=True')),
                        ([*start, '--init_from=out',
                          '--lora_rank=2'], ['lora_rank=3', '--to=dense --out_dir=out']),
                        ([*start, '--init_from=out', '--adaptive_svd=True'], ['adaptive_svd']),
                        *(([*start, '--init_from=base', option], [option[2:]])
                          for option in ('--n_layer=1', '--n_embd=32', '--use_mla=True',
                                         '--bias=False', '--gelu=tanh', '--block_size=32')), ([
                                             *start, '--init_from=base', '--dataset=other.txt'
                                         ], ['dataset=other.txt', 'base', "'jkm"])):
        line = refused(train.main, *argv)
        assert all(word in line for word in words), line
    assert {k: v for k, v in folder_bytes('.').items() if not k.startswith('data/other')} == before


# --------------------------------------------------------------------------------------------------
# sample.py, export.py, compress.py, bench.py

@pytest.mark.parametrize('kind', ['LoRA', *(slow(kind) for kind in KINDS if kind != 'LoRA')])
def test_exports_have_the_loss_and_samples_of_the_run(finished, done, kind):
    """Every export of a LoRA or adaptive run has the loss and the samples of that run."""
    expected, args = finished(kind), [
        '--device=cpu', '--max_new_tokens=30', '--start=the', '--temperature=0']
    assert loss_in('out') == pytest.approx(expected, abs=1e-6)
    for to in ('dense', 'gpt2', 'nanogpt', 'safetensors'):
        out = done(export.main, '--out_dir=out', f'--to={to}')
        model, keeps = GPT.from_pretrained(f'out-{to}'), to == 'safetensors'
        assert ('adaptive SVD or LoRA of' in out) != keeps
        assert loss_in(f'out-{to}') == pytest.approx(expected, abs=1e-5), to
        plain = {key: getattr(model.config, key) for key in ADAPTER_DEFAULTS} == ADAPTER_DEFAULTS
        assert plain != keeps and (keeps or all(p.requires_grad for p in model.parameters()))
    ours = GPT.from_pretrained('out')
    assert model.config == ours.config and equal(model.state_dict(), ours.state_dict())
    assert [p.requires_grad
            for p in model.parameters()] == [p.requires_grad for p in ours.parameters()]
    texts = {done(sample.main, *args, option).split('\n', 1)[1] for option in (
        '--out_dir=out', '--out_dir=out-dense', '--init_from=out', '--init_from=out-dense')}
    assert len(texts) == 1


@pytest.mark.parametrize(
    'kind, options',
    [('LoRA', ['--out_dir=out', '--method=plain', '--keep=.5']),
     *(pytest.param(kind, ['--init_from=out', '--dataset=toy', '--keep=.5'], marks=pytest.mark.slow)
       for kind in KINDS), *(pytest.param(kind, ['--out_dir=out', '--to=mla', '--mla_latent_dim=4'],
                                          marks=pytest.mark.slow)
                             for kind in ('LoRA', 'adaptive'))])
def test_compress_makes_plain_layers_of_them(finished, done, kind, options):
    """compress.py merges adapters into plain layers and leaves the run as it is."""
    expected, before = finished(kind), folder_bytes('out')
    done(compress.main, *options, '--save_dir=small', '--device=cpu', '--calibration_tokens=256')
    report, args = json.loads(
        Path('small/compress.json').read_text()), checkpoint('small')['model_args']
    assert report['val_loss'] == pytest.approx([expected, loss_in('small')], abs=1e-5)
    assert {key: args[key] for key in ADAPTER_DEFAULTS} == ADAPTER_DEFAULTS
    assert folder_bytes('out') == before


# --------------------------------------------------------------------------------------------------
# --init_from=FOLDER of a run


@pytest.mark.parametrize('kind, options',
                         [('plain', BASE), ('LoRA', BASE),
                          ('adaptive', [
                              *ADAPTIVE, '--adaptive_svd_targets=c_q,c_k,c_v,c_proj',
                              '--adaptive_svd_interval=50', '--max_iters=4'])])
def test_a_run_as_the_start_of_another(trained, finished, fit, kind, options):
    """A run that starts from another one begins with its loss at step 0, and trains the parameters
    that were trained last."""
    trained(*BASE) if kind == 'plain' else finished(kind)
    fit(*options, '--init_from=out', '--out_dir=more')
    assert interim('more')[0] == pytest.approx(interim('out')[-1], abs=1e-6)
    before, after = checkpoint()['model'], checkpoint('more')
    trainable = {
        name for name, p in GPT.from_pretrained('out').named_parameters() if p.requires_grad}
    moved = {name for name, w in before.items() if not torch.equal(w, after['model'][name])}
    assert moved - {'lm_head.weight'} == trainable and after['iter_num'] == 4


def test_its_svd_comes_along_unless_the_command_line_has_another(trained, fit):
    """A run that starts from another one keeps its SVD and the basis of 'randomized', so the loss
    is the same. Options on the command line replace them."""
    trained(*BASE, '--use_svd=True', '--svd_rank=3', '--svd_scope=causal', '--svd_block=4',
            '--svd_method=randomized', folder='base')
    fit(*BASE, '--init_from=base', '--out_dir=kept', '--max_iters=0')
    assert final('kept') == pytest.approx(final('base'), abs=1e-6)
    fit(*BASE, '--init_from=base', '--svd_rank=2', '--svd_scope=weight', '--max_iters=1')
    args = checkpoint()['model_args']
    assert (args['use_svd'], args['svd_rank'], args['svd_scope'],
            args['svd_block']) == (True, 2, 'weight', 4)
    assert 'SVD on V: rank 3' in fit(*LORA, '--out_dir=lora', '--max_iters=0')


@pytest.mark.parametrize('damage', [
    lambda saved: saved['model'].pop('transformer.h.0.mlp.c_fc.weight'),
    lambda saved: saved['model_args'].update(n_layer=3),
    lambda saved: saved['model_args'].update(n_embd='x'),
    lambda saved: saved['model_args'].update(unknown=1),
    lambda saved: saved['model_args'].update(lora_rank=2),
    *map(slow, (lambda saved: saved['model_args'].update(lora_rank=2, lora_targets='c_x'),
                lambda saved: saved['model_args'].update(lora_rank=99),
                lambda saved: saved['model_args'].update(adaptive_svd=True),
                lambda saved: saved['model'].update(x=torch.full((2, ), math.nan)),
                lambda saved: saved.pop('model_args'), lambda saved: saved.update(tokenizer=3),
                lambda saved: saved.update(tokenizer=dict(tokenizer='char'))))
])
def test_a_damaged_checkpoint_is_refused_by_all_commands(trained, refused, damage):
    """A damaged checkpoint as --init_from ends in a one-line error in every command, and nothing is
    written."""
    trained(*BASE, folder='base')
    saved = checkpoint('base')
    damage(saved)
    torch.save(saved, 'base/ckpt.pt')
    for main, options in ((train.main, DATA), (train.main, [*DATA, '--lora_rank=2']),
                          (compress.main, DATA), (sample.main, ['--device=cpu'])):
        assert 'base' in refused(main, '--init_from=base', *options)
    assert not Path('out').exists() and not Path('base-lowrank').exists()

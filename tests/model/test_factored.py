"""model.py with layer_ranks: layers that are products of two, from configuration to cache, operations and training."""

import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import sample
import train
from helpers import TINY, checkpoint, counted, equal, error, make, optimizer_of, rows, svd, tokens
from lowrank.layers import LowRankLinear, SplitProjection
from model import GPT, GPTConfig, QKVProjection
from runtime.optim import gpt_groups
from test_mla import mla, train_steps

pytestmark = pytest.mark.usefixtures('one_thread')
# of layers (8, 8), (8, 8), (32, 8) and (8, 32): other layers and ranks in each block
RANKS = {'h.0.attn.c_attn.c_q': 3, 'h.0.attn.c_attn.c_v': 1, 'h.0.attn.c_proj': 2, 'h.0.mlp.c_fc': 5,
         'h.1.attn.c_attn.c_k': 2, 'h.1.mlp.c_fc': 4, 'h.1.mlp.c_proj': 8}
MLA_RANKS = {'h.0.attn.c_attn.query': 3, 'h.0.mlp.c_proj': 2, 'h.1.attn.c_proj': 5}
VARIANTS = {'no SVD': {}, 'weight': svd('weight'), 'causal': svd('causal'), 'sequence': svd('sequence'),
            'MLA': mla(), 'MLA, weight': mla(**svd('weight')), 'MLA, causal': mla(**svd('causal'))}
each_variant = pytest.mark.parametrize('options', VARIANTS.values(), ids=VARIANTS)
ON_THE_LINE = "--layer_ranks={'h.0.mlp.c_fc': 3, 'h.0.attn.c_attn.c_v': 2, 'h.0.attn.c_proj': 5}"


def factored(**options):
    return make(**dict(layer_ranks=MLA_RANKS if options.get('use_mla') else RANKS) | options)


def multiplied_out(model):
    """The same function in dense layers, by hand."""
    state = model.state_dict()
    for name in model.config.layer_ranks:
        name = f'transformer.{name}'
        state[f'{name}.weight'] = state.pop(f'{name}.B.weight') @ state.pop(f'{name}.A.weight')
        if f'{name}.B.bias' in state:
            state[f'{name}.bias'] = state.pop(f'{name}.B.bias')
    for kind in ('weight', 'bias'):
        for c_attn in [f'transformer.h.{i}.attn.c_attn' for i in range(model.config.n_layer)]:
            if f'{c_attn}.c_q.{kind}' in state:
                state[f'{c_attn}.{kind}'] = torch.cat([state.pop(f'{c_attn}.c_{part}.{kind}') for part in 'qkv'])
    dense = GPT(GPTConfig(**asdict(model.config) | dict(layer_ranks=None))).to(next(model.parameters()).dtype).eval()
    dense.load_state_dict(state)
    return dense


# ----------------------------------------------------------------------------------------------------------------------
# configuration

@pytest.mark.parametrize('name, rank, words, options', [
    ('h.0.mlp.c_fc', 0, 'must be 1 to 8', {}), ('h.0.mlp.c_fc', -2, 'must be 1 to 8', {}),
    ('h.1.mlp.c_proj', 9, 'must be 1 to 8', {}), ('h.2.mlp.c_fc', 1, 'no such layer', {}),
    ('h.00.mlp.c_fc', 1, 'no such layer', {}), ('h.-1.mlp.c_fc', 1, 'no such layer', {}),
    ('h.².mlp.c_fc', 1, 'no such layer', {}), ('h.٠.mlp.c_fc', 1, 'no such layer', {}),
    ('0.mlp.c_fc', 1, 'no such layer', {}), ('h.h.0.mlp.c_fc', 1, 'no such layer', {}),
    ('h.0.attn.c_attn', 1, 'no such layer', {}), ('lm_head', 1, 'no such layer', {}), ('', 1, 'no such layer', {}),
    ('transformer.h.0.mlp.c_fc', 1, 'no such layer', {}), ('h.0.attn.c_attn.query', 1, 'no such layer', {}),
    ('h.0.attn.c_attn.c_q', 1, 'no such layer', mla()), ('h.0.attn.c_attn.kv_down', 1, 'no such layer', mla())])
def test_layers_and_ranks_that_cannot_be(name, rank, words, options):
    with pytest.raises(ValueError, match='^layer_ranks=') as e:
        GPTConfig(n_layer=2, n_embd=8, n_head=2, layer_ranks={'h.0.attn.c_proj': 1, name: rank}, **options)
    assert repr(name) in str(e.value) and str(rank) in str(e.value) and words in str(e.value)


def test_every_layer_that_can_be_named_is_there():
    """With the shape that is said, in a model of any kind; the others keep theirs."""
    for options, count in (({}, 6), (mla(), 4)):
        names = [f'h.{i}.{part}' for i in range(2) for part in GPTConfig(n_layer=2, n_embd=8, n_head=2,
                                                                         **options).layer_shapes]
        assert len(names) == 2 * count
        for name in names:
            model = make(layer_ranks={name: 2}, **options)
            layer = model.transformer.get_submodule(name)
            m, n = model.config.layer_shape(name)
            assert (layer.A.weight.shape, layer.B.weight.shape) == ((2, n), (m, 2))
            assert sum(isinstance(module, LowRankLinear) for module in model.modules()) == 1
            kinds = [type(block.attn.c_attn) for block in model.transformer.h]
            assert options or kinds.count(SplitProjection) == ('c_attn' in name) == 2 - kinds.count(QKVProjection)


@pytest.mark.parametrize('value', ["{'h.0.mlp.c_fc': 3.5}", "{'h.0.mlp.c_fc': True}", "{'h.0.mlp.c_fc': None}",
                                   '{1: 3}', "[('h.0.mlp.c_fc', 3)]", '3', 'h.0.mlp.c_fc', "{'h.0.mlp.c_fc': '3'}",
                                   '{0.5, 1}'])
def test_a_value_of_another_type_is_one_line(here, refused, value):
    line = refused(train.main, *TINY, f'--layer_ranks={value}')
    assert line.startswith('train.py: layer_ranks=') and '[the command line]' in line
    assert "a dict of names and whole numbers, like {'name': 1} or None" in line and not Path('out').exists()
    Path('own.py').write_text(f'layer_ranks = {value if value[0] != "h" else repr(value)}\n')
    assert '[own.py]' in refused(train.main, 'own.py', *TINY)


def test_a_layer_that_is_not_there_is_one_line(here, refused):
    line = refused(train.main, *TINY, "--layer_ranks={'h.1.mlp.c_fc': 3}")
    assert line == ("train.py: layer_ranks={'h.1.mlp.c_fc': 3}: no such layer (nearest: 'h.0.mlp.c_fc') "
                    '[the command line]')
    assert not Path('out').exists()


# ----------------------------------------------------------------------------------------------------------------------
# the model

@each_variant
@pytest.mark.parametrize('bias', [True, False])
def test_it_is_the_model_with_its_products_multiplied_out(options, bias):
    """Logits, and with a cache at every position; no more bytes of cache."""
    model, idx = factored(bias=bias, **options), tokens(3)
    dense = multiplied_out(model)
    with torch.no_grad():
        assert (model(idx, idx)[0] - dense(idx, idx)[0]).abs().max() <= 1e-9
    assert model.kv_cache_bytes(2, 9) == dense.kv_cache_bytes(2, 9)
    if options.get('svd_scope') != 'sequence':
        for prompt in (1, 5, 16):
            assert error(model, idx, prompt) <= 1e-9


def test_parameters_and_storage_are_those_of_the_factors():
    model, dense = factored(), make()
    saved = sum(m * n - r * (m + n) for (m, n), r in ((dense.config.layer_shape(name), r) for name, r in RANKS.items()))
    assert model.get_num_params() == dense.get_num_params() - saved
    assert sum(p.untyped_storage().nbytes() for p in model.parameters()) == 8 * model.get_num_params(False)


def test_model_args_alone_rebuild_it():
    for options in ({}, mla()):
        model, idx = factored(dtype=torch.float32, **options), tokens()
        again = GPT.from_checkpoint(dict(model_args=asdict(model.config), model=model.state_dict())).eval()
        assert equal(again.state_dict(), model.state_dict()) and again.config == model.config
        assert torch.equal(again(idx)[0], model(idx)[0])
        for change in (dict(layer_ranks=None), dict(layer_ranks=model.config.layer_ranks | {'h.1.mlp.c_fc': 7})):
            with pytest.raises(ValueError):
                GPT.from_checkpoint(dict(model_args=asdict(model.config) | change, model=model.state_dict()))


@pytest.mark.parametrize('T', [1, 11])
@pytest.mark.parametrize('options', [{}, mla(3)], ids=['dense', 'MLA'])
def test_operations_are_those_that_torch_counts(T, options):
    """As in test_mla.py, with other ranks in each block: torch counts attention to later tokens as well."""
    model, idx = factored(dtype=torch.float32, block_size=64, **options), tokens(2, T + 1)
    masked = 4 * 8 * T * (T - 1) // 2
    assert counted(lambda: model(idx[:, :T])) == pytest.approx(2 * (T * model.flops_per_token(T) + masked), rel=1e-12)
    cache = model.new_cache(2, T + 1)
    assert counted(lambda: model(idx[:, :T], cache=cache)) == pytest.approx(
        2 * (T * model.flops_per_token(T) + masked), rel=1e-12)
    assert counted(lambda: model(idx[:, T:], cache=cache)) == 2 * model.flops_per_token(T, decode=True)


# ----------------------------------------------------------------------------------------------------------------------
# training

@pytest.mark.parametrize('rank', [4, 40])
def test_initially_products_have_the_scale_of_a_dense_weight(rank):
    """Entries, and outputs; also where a weight writes to the residual stream."""
    shape = dict(n_layer=2, n_head=2, n_embd=96, vocab_size=16, block_size=8)
    names = [f'h.{i}.{part}' for i in range(2) for part in GPTConfig(**shape).layer_shapes]
    torch.manual_seed(0)
    model = GPT(GPTConfig(**shape, layer_ranks=dict.fromkeys(names, rank)))
    for name in names:
        layer, expected = model.transformer.get_submodule(name), .02 / (2 if name.endswith('c_proj') else 1)
        assert layer.weight.std().item() == pytest.approx(expected, rel=.2)
        outputs = layer(torch.randn(500, layer.A.in_features)) - layer.bias
        assert outputs.std().item() == pytest.approx(expected * math.sqrt(layer.A.in_features), rel=.2)
        assert layer.bias.count_nonzero() == 0
    torch.manual_seed(0)
    dense, idx = GPT(GPTConfig(**shape)), torch.randint(16, (4, 8), generator=torch.Generator().manual_seed(1))
    assert model(idx, idx)[0].std().item() == pytest.approx(dense(idx, idx)[0].std().item(), rel=.2)


@pytest.mark.parametrize('options', [{}, mla(), dict(bias=False)], ids=['dense', 'MLA', 'no bias'])
def test_optim_groups_hold_every_parameter_once(options):
    model = factored(**options)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {kind: [names[id(p)] for p in group['params']] for kind, group in gpt_groups(model, .1).items()}
    assert sorted(sum(groups.values(), [])) == sorted(names.values())
    assert {name for name in names.values() if '.A.' in name or '.B.weight' in name} <= {*groups['hidden']}
    own = model.configure_optimizers(.1, 1e-3, (.9, .95), 'cpu').param_groups
    assert sorted(names[id(p)] for group in own for p in group['params']) == sorted(names.values())


@pytest.mark.parametrize('kind', ['adamw', 'muon'])
def test_it_learns_from_scratch(kind):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=8, layer_ranks=RANKS))
    losses = train_steps(model, optimizer_of(model, kind), 40)
    assert losses[-1] < .8 * losses[0]


def test_a_run_is_trained_sampled_resumed_and_refused(here, fit, call, refused):
    fit(ON_THE_LINE, '--max_iters=30', '--lr_decay_iters=30', '--eval_interval=30', '--optimizer=muon')
    losses = [row['loss'] for row in rows() if 'loss' in row]
    assert losses[-1] < .8 * losses[0]
    saved = checkpoint()
    ranks = {'h.0.mlp.c_fc': 3, 'h.0.attn.c_attn.c_v': 2, 'h.0.attn.c_proj': 5}
    assert saved['model_args']['layer_ranks'] == saved['config']['layer_ranks'] == ranks
    assert saved['model']['transformer.h.0.mlp.c_fc.A.weight'].shape == (3, 16)
    assert call(sample.main, '--device=cpu', '--start=the', '--num_samples=1', '--max_new_tokens=5').code == 0
    resume = ['--init_from=resume', '--device=cpu', '--max_iters=32']
    line = refused(train.main, *resume, "--layer_ranks={'h.0.mlp.c_fc': 4}")
    assert 'resume has layer_ranks={' in line and line.endswith('which is fixed')
    assert 'layer_ranks=None' in refused(train.main, *resume, '--layer_ranks=None')
    assert call(train.main, *resume).code == 0 and checkpoint()['iter_num'] == 32
    assert call(train.main, 'out/config.py', '--out_dir=again', '--init_from=scratch').code == 0
    assert checkpoint('again')['model_args'] == saved['model_args']                             # of a dict in a file


def test_a_checkpoint_from_before_is_one_without(here, fit, call):
    fit()
    saved = checkpoint()
    for part in ('model_args', 'config'):
        del saved[part]['layer_ranks']
    torch.save(saved, 'out/ckpt.pt')
    assert call(train.main, '--init_from=resume', '--device=cpu', '--max_iters=5').code == 0
    assert checkpoint()['model_args']['layer_ranks'] is None

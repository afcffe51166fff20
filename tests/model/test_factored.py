"""model.py with layer_ranks: layers that are products of two, from configuration to training.
test_model.py and test_decode.py test their optimizer groups, cache and operation counts."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train
from helpers import MLA_RANKS, RANKS, TINY, error, make, mla, svd, tokens
from lowrank.layers import LowRankLinear, SplitProjection
from model import GPT, GPTConfig, QKVProjection
from tools.export_formats import plain_model

pytestmark = pytest.mark.usefixtures('one_thread')


# --------------------------------------------------------------------------------------------------
# configuration


@pytest.mark.parametrize(
    'name, rank, hint, options',
    [
        ('h.0.mlp.c_fc', 0, '1 to 8', {}),
        ('h.1.mlp.c_proj', 9, '1 to 8', {}),
        ('h.2.mlp.c_fc', 1, 'layer', {}),
        ('h.00.mlp.c_fc', 1, 'layer', {}),
        ('h.-1.mlp.c_fc', 1, 'layer', {}),
        ('h.².mlp.c_fc', 1, 'layer', {}),
        ('h.٠.mlp.c_fc', 1, 'layer', {}),
        ('0.mlp.c_fc', 1, 'layer', {}),
        ('h.h.0.mlp.c_fc', 1, 'layer', {}),
        ('h.0.attn.c_attn', 1, 'layer', {}),
        ('lm_head', 1, 'layer', {}),
        ('transformer.h.0.mlp.c_fc', 1, 'layer', {}),
        ('h.0.attn.c_attn.query', 1, 'layer', {}),
        ('h.0.attn.c_attn.c_q', 1, 'layer', mla()),
        ('h.0.attn.c_attn.kv_down', 1, 'layer', mla()),
    ],
)
def test_layers_and_ranks_that_cannot_be(name, rank, hint, options):
    """Unknown layer names and impossible ranks raise a ValueError that names them."""
    with pytest.raises(ValueError, match='^layer_ranks=') as e:
        GPTConfig(n_layer=2, n_embd=8, n_head=2, layer_ranks={'h.0.attn.c_proj': 1, name: rank},
                  **options)
    assert repr(name) in str(e.value) and str(rank) in str(e.value) and hint in str(e.value)


@pytest.mark.parametrize('options, count', [({}, 6), (mla(), 4)], ids=['dense', 'MLA'])
def test_every_layer_that_can_be_named_is_there(options, count):
    """Every name in `layer_shapes` can be factored, with the stated shape, and the other layers
    stay dense."""
    names = [*make(**options).config.layer_shapes]
    assert len(names) == 2 * count
    for name in names:
        model = make(layer_ranks={name: 2}, **options)
        layer, (m, n) = model.transformer.get_submodule(name), model.config.layer_shapes[name]
        assert (layer.A.weight.shape, layer.B.weight.shape) == ((2, n), (m, 2))
        assert model.get_num_params() == make(**options).get_num_params() - (m * n - 2 * (m + n))
        assert sum(isinstance(module, LowRankLinear) for module in model.modules()) == 1
        kinds = [type(block.attn.c_attn) for block in model.transformer.h]
        assert options or kinds.count(SplitProjection) == (
            'c_attn' in name) == 2 - kinds.count(QKVProjection)


@pytest.mark.parametrize(
    'value',
    [
        "{'h.0.mlp.c_fc': 3.5}",
        "{'h.0.mlp.c_fc': True}",
        "{'h.0.mlp.c_fc': None}",
        '{1: 3}',
        "[('h.0.mlp.c_fc', 3)]",
        '3',
        'h.0.mlp.c_fc',
        "{'h.0.mlp.c_fc': '3'}",
        '{0.5, 1}',
        "{'h.1.mlp.c_fc': 3}",
    ],
)
def test_other_values_on_the_command_line_and_in_a_file_are_one_line(here, refused, value):
    """A wrong value ends in a one-line error, on the command line and in a config file. The last
    value has the right type, but the model has one block only."""
    hint = "nearest: 'h.0.mlp.c_fc'" if 'h.1' in value else "{'name': 1} or None"
    line = refused(train.main, *TINY, f'--layer_ranks={value}')
    assert 'layer_ranks=' in line and '[the command line]' in line and hint in line
    Path('own.py').write_text(f'layer_ranks = {value if value[0] != "h" else repr(value)}\n')
    assert '[own.py]' in refused(train.main, 'own.py', *TINY) and not Path('out').exists()


# --------------------------------------------------------------------------------------------------
# the model


@pytest.mark.parametrize(
    'options',
    [
        svd('causal'),
        svd('sequence', bias=False),
        mla(**svd('causal', bias=False)),
        mla(**svd('sequence'))
    ],
    ids=str,
)
def test_where_v_is_cut_it_is_the_model_with_its_products_multiplied_out(options):
    """A factored model with an SVD on V computes what the model with dense weights computes, with a
    cache of the same size. test_mla.py tests this without an SVD on V."""
    ranks, idx = MLA_RANKS if 'use_mla' in options else RANKS, tokens(3)
    model, whole = (
        make(layer_ranks=ranks, **options),
        make(layer_ranks=ranks, **options | dict(use_svd=False)),
    )
    dense = GPT(replace(model.config, layer_ranks=None, use_mla=False)).double()
    dense.load_state_dict(plain_model(whole).state_dict())
    torch.testing.assert_close(model(idx, idx)[0], dense(idx, idx)[0], rtol=0, atol=1e-9)
    if options['svd_scope'] == 'causal':
        assert all(error(model, idx, prompt) <= 1e-9 for prompt in (1, 5, 16))
        same_kind = make(**options)
        assert model.kv_cache_bytes(2, 9) == same_kind.kv_cache_bytes(2, 9)


@pytest.mark.parametrize('rank', [4, 40])
def test_initially_products_have_the_scale_of_a_dense_weight(rank):
    """At the start a product has the standard deviation of the dense weight, also in projections to
    the residual stream."""
    shape = dict(n_layer=2, n_head=2, n_embd=96, vocab_size=16, block_size=8)
    names = [*GPTConfig(**shape).layer_shapes]
    torch.manual_seed(0)
    model = GPT(GPTConfig(**shape, layer_ranks=dict.fromkeys(names, rank)))
    for name in names:
        layer, expected = model.transformer.get_submodule(
            name), 0.02 / (2 if name.endswith('c_proj') else 1)
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.2)
        assert layer.bias.count_nonzero() == 0

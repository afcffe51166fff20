"""Multi-head latent attention against its equations, written out, and its claims: cache, parameters, operations."""

import math
from dataclasses import asdict, fields
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import export
import lowrank.cache
import sample
import train
from helpers import (ROOT, SMALL, TINY, assert_as_near_in_bfloat16, cached_logits, checkpoint, copy_of, counted,
                     cut_by_hand, equal, error, gelu_by_hand, leak, loss_by_hand, make, optimizer_of, rows, svd,
                     tokens)
from lowrank.cache import CausalValues, ExpandedValues, LatentCache
from lowrank.rows import Rows
from lowrank.svd import EXACT_METHODS, METHODS
from model import GPT, SCOPES, GPTConfig, LatentProjection
from runtime import checkpoint as ckpt
from runtime import config as configuration
from runtime.dataset import write_dataset
from runtime.optim import gpt_groups

pytestmark = pytest.mark.usefixtures('one_thread')
CONFIGS = [f'train_mla{kind}_test.py' for kind in ('', '_svd', '_rsvd')]
RUN = ['--use_mla=True', '--mla_latent_dim=5', '--bias=True']


def mla(latent=3, **options):
    """Model options; SMALL's heads are of size 4, so the latent is below that unless said otherwise."""
    return dict(use_mla=True, mla_latent_dim=latent, **options)


CACHED = {'no SVD': mla(), 'weight': mla(**svd('weight')), 'causal': mla(**svd('causal')),
          'large latent': mla(7, **svd('causal', 3, 'standard'))}
each_cached = pytest.mark.parametrize('options', CACHED.values(), ids=CACHED)


# ----------------------------------------------------------------------------------------------------------------------
# the equations

def mla_by_hand(state, idx, n_head=2, cut_v=None, cut_w_v=None):
    """GPT-2 with latents from a state dict, head by head: c = W_a x, k = U_k c, v = U_v c + b, o = sum_j a_j v_j. cut_v
    acts on V (B, nh, T, hs), cut_w_v on U_v (nh, hs, d)."""
    def weight(name):
        return state[f'{name}.weight']

    def bias(name):
        return state.get(f'{name}.bias', 0)

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * weight(name) + bias(name)

    T, C = idx.size(1), weight('transformer.wpe').size(1)
    hs = C // n_head
    x = weight('transformer.wte')[idx] + weight('transformer.wpe')[:T]
    for h in (f'transformer.h.{i}' for i in range(2)):
        a, inside = f'{h}.attn.c_attn', norm(x, f'{h}.ln_1')
        q = torch.einsum('btc,oc->bto', inside, weight(f'{a}.query')) + bias(f'{a}.query')
        c = torch.einsum('btc,dc->btd', inside, weight(f'{a}.kv_down'))
        u_v = weight(f'{a}.v_up').reshape(n_head, hs, -1)
        u_v = cut_w_v(u_v) if cut_w_v else u_v
        v = torch.einsum('btd,hsd->bhts', c, u_v)
        if f'{a}.v_up.bias' in state:
            v = v + bias(f'{a}.v_up').reshape(n_head, 1, hs)
        v = cut_v(v) if cut_v else v
        heads = []
        for i in range(n_head):
            mine = slice(i * hs, (i + 1) * hs)
            k = torch.einsum('btd,sd->bts', c, weight(f'{a}.k_up')[mine])
            outputs = []
            for t in range(T):                                      # token t sees 0 to t
                scores = torch.einsum('bs,bjs->bj', q[:, t, mine], k[:, :t + 1]) / math.sqrt(hs)
                outputs.append(torch.einsum('bj,bjs->bs', scores.softmax(-1), v[:, i, :t + 1]))
            heads.append(torch.stack(outputs, dim=1))
        x = x + torch.cat(heads, dim=-1) @ weight(f'{h}.attn.c_proj').T + bias(f'{h}.attn.c_proj')
        up = gelu_by_hand(norm(x, f'{h}.ln_2') @ weight(f'{h}.mlp.c_fc').T + bias(f'{h}.mlp.c_fc'))
        x = x + up @ weight(f'{h}.mlp.c_proj').T + bias(f'{h}.mlp.c_proj')
    return norm(x, 'transformer.ln_f') @ state['lm_head.weight'].T


@pytest.mark.parametrize('latent', [1, 3, 4, 8])
@pytest.mark.parametrize('bias', [True, False])
def test_logits_are_those_of_the_equations(latent, bias):
    """And the gradient of every parameter."""
    model, idx = make(**mla(latent, bias=bias)), tokens()
    state = copy_of(model)
    logits, loss = model(idx, idx)
    expected = mla_by_hand(state, idx)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    loss.backward()
    loss_by_hand(expected, idx).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, state[name].grad, rtol=1e-7, atol=1e-10, msg=lambda m: f'{name}: {m}')


@pytest.mark.parametrize('scope', SCOPES)
@pytest.mark.parametrize('method', EXACT_METHODS)
@pytest.mark.parametrize('bias', [True, False])
def test_with_an_svd_logits_are_those_of_the_equations(scope, method, bias):
    model, idx = make(**mla(5, bias=bias, **svd(scope, 2, method))), tokens()
    state = copy_of(model)
    logits, loss = model(idx, idx)
    expected = mla_by_hand(state, idx, **cut_by_hand(scope, 2))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    loss.backward()
    loss_by_hand(expected, idx).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, state[name].grad, rtol=1e-6, atol=1e-8, msg=lambda m: f'{name}: {m}')


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('scope', [None, 'causal', 'weight'])
def test_no_logit_depends_on_a_later_token(scope, method):
    model = make(**mla(**(svd(scope, 2, method) if scope else {})))
    assert leak(model) <= 1e-9 and not model.config.svd_sees_future


def test_sequence_scope_sees_the_future_and_is_not_cached():
    model = make(**mla(**svd('sequence')))
    assert leak(model) > 1e-3 and model.config.svd_sees_future and model.kv_cache_bytes(2, 16) == 0
    with pytest.raises(ValueError, match='cannot be cached'):
        model.new_cache(2, 16)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('scope', SCOPES)
@pytest.mark.parametrize('latent', [1, 2])
def test_a_rank_that_latents_do_not_reach_changes_nothing(method, scope, latent):
    """V of latents of two numbers has rank two, and all the singular values that are cut are zero."""
    plain, idx = make(**mla(latent, bias=False)), tokens()
    cut = make(**mla(latent, bias=False, **svd(scope, 2, method)))
    for model in (plain, cut):
        model(idx, idx)[1].backward()
    torch.testing.assert_close(cut(idx, idx)[0], plain(idx, idx)[0], rtol=0, atol=1e-9)
    for p, q in zip(cut.parameters(), plain.parameters(), strict=True):
        assert p.grad.isfinite().all()
        # 'randomized' differentiates one iteration: nothing is cut, but what its last rounding leaves
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-6)


def test_full_rank_is_no_svd_to_the_bit():
    """'weight' scope decomposes (hs, d) matrices: a rank of d cuts nothing."""
    idx = tokens()
    for scope, rank, latent in (('weight', 3, 3), ('weight', 4, 7), ('causal', 4, 3), ('sequence', None, 3)):
        model = make(**mla(latent, **svd(scope, rank)))
        assert not model.config.svd_truncates and torch.equal(model(idx, idx)[0], make(**mla(latent))(idx, idx)[0])


def test_no_bias_on_keys_for_it_would_change_nothing():
    """By hand: q (k + b) = q k + q b, and q b is the same for all keys of a query."""
    model, idx = make(**mla()), tokens()
    before = model(idx, idx)[0]
    real = LatentProjection.forward
    for b in (1., -20.):
        def shifted(self, x, w_v=None):
            q, k, v = real(self, x, w_v)
            return q, k + b * torch.arange(1., 5), v
        for block in model.transformer.h:
            block.attn.c_attn.forward = shifted.__get__(block.attn.c_attn)
        torch.testing.assert_close(model(idx, idx)[0], before, rtol=0, atol=1e-10)


def test_a_value_bias_is_an_output_bias():
    """Attention weights add up to 1; not under dropout, and not where V is cut."""
    def folded(**options):
        model, idx = make(**mla(**options)), tokens()
        before = model(idx, idx)[0].detach()
        with torch.no_grad():
            for block in model.transformer.h:
                b = block.attn.c_attn.v_up.bias
                block.attn.c_proj.bias += block.attn.c_proj.weight @ b
                b.zero_()
            return (model(idx, idx)[0] - before).abs().max()
    assert folded() <= 1e-12 and folded(**svd('weight')) <= 1e-12 and folded(**svd('causal')) > 1e-3


def test_latents_as_wide_as_the_model_are_ordinary_attention():
    """W_a = I, U_k = W_k, U_v = W_v."""
    dense, model, idx = make(), make(**mla(8)), tokens()
    with torch.no_grad():
        state = dict(dense.state_dict())
        for i in range(2):
            a = f'transformer.h.{i}.attn.c_attn'
            (q, k, v), (b_q, _, b_v) = state.pop(f'{a}.weight').chunk(3), state.pop(f'{a}.bias').chunk(3)
            state |= {f'{a}.query.weight': q, f'{a}.query.bias': b_q, f'{a}.kv_down.weight': torch.eye(8),
                      f'{a}.k_up.weight': k, f'{a}.v_up.weight': v, f'{a}.v_up.bias': b_v}
        model.load_state_dict(state)
    torch.testing.assert_close(model(idx, idx)[0], dense(idx, idx)[0], rtol=0, atol=1e-12)
    assert dense.kv_cache_bytes(2, 16) == 2 * model.kv_cache_bytes(2, 16)


# ----------------------------------------------------------------------------------------------------------------------
# parameters

def test_with_it_off_the_other_option_changes_nothing():
    for options in ({}, dict(mla_latent_dim=3)):
        assert equal(make(**options).state_dict(), make(use_mla=False).state_dict())
    assert 'transformer.h.0.attn.c_attn.weight' in make().state_dict()


def test_parameter_names_and_shapes():
    def attention(**options):
        return {name: tuple(p.shape) for name, p in make(**mla(**options)).transformer.h[1].attn.named_parameters()}
    weights = {'c_attn.query.weight': (8, 8), 'c_attn.kv_down.weight': (3, 8), 'c_attn.k_up.weight': (8, 3),
               'c_attn.v_up.weight': (8, 3), 'c_proj.weight': (8, 8)}
    biases = dict.fromkeys(('c_attn.query.bias', 'c_attn.v_up.bias', 'c_proj.bias'), (8,))
    assert attention() == weights | biases and attention(bias=False) == weights
    for scope, method in product(SCOPES, METHODS):
        assert attention(**svd(scope, 2, method)) == weights | biases and not [*make(**mla()).buffers()]


@pytest.mark.parametrize('layers, heads, width', [(12, 12, 768), (4, 4, 128), (2, 3, 96), (1, 1, 64)])
def test_parameters_of_attention_are_a_fifth_to_a_half_fewer(layers, heads, width):
    """4 C^2 become 2 C^2 + 3 C d."""
    def count(**options):
        with torch.device('meta'):
            return GPT(GPTConfig(n_layer=layers, n_head=heads, n_embd=width, vocab_size=64, **options))
    for latent in (None, 1, width):
        d = width // 4 if latent is None else latent
        for bias in (True, False):
            model, dense = count(bias=bias, use_mla=True, mla_latent_dim=latent), count(bias=bias)
            assert dense.attention_params() == layers * 4 * width * (width + bias)
            expected = layers * (2 * width ** 2 + 3 * width * d + 3 * width * bias)
            assert model.attention_params() == expected == dense.attention_params() - (
                dense.get_num_params() - model.get_num_params())
            assert d != width // 4 or .2 <= 1 - expected / dense.attention_params() <= .5


@pytest.mark.parametrize('latent', [16, 32, 64, 128])
def test_initially_keys_and_values_have_the_variance_of_ordinary_ones(latent):
    """The products have 0.02, as W_k and W_v of ordinary attention."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=128, vocab_size=64, block_size=16, **mla(latent)))
    for block in model.transformer.h:
        a = block.attn.c_attn
        down = a.kv_down.weight                                     # (d, C): orthogonal rows, entries of 1 / sqrt(d)
        torch.testing.assert_close(down @ down.T, 128 / latent * torch.eye(latent), rtol=0, atol=1e-4)
        for up in (a.k_up, a.v_up):
            assert up.weight.std().item() == pytest.approx(.02, rel=.15)
            assert (up.weight @ a.kv_down.weight).std().item() == pytest.approx(.02, rel=.05)
        assert a.query.weight.std().item() == pytest.approx(.02, rel=.05)
        assert block.attn.c_proj.weight.std().item() == pytest.approx(.02 / 2, rel=.05)
        assert a.query.bias.count_nonzero() == a.v_up.bias.count_nonzero() == 0


@pytest.mark.parametrize('bias', [True, False])
def test_optim_groups_hold_every_parameter_once(bias):
    model = make(**mla(bias=bias))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {kind: [names[id(p)] for p in group['params']] for kind, group in gpt_groups(model, .1).items()}
    assert sorted(sum(groups.values(), [])) == sorted(names.values()) and len(groups['hidden']) == 2 * 7
    own = model.configure_optimizers(.1, 1e-3, (.9, .95), 'cpu').param_groups
    assert sorted(names[id(p)] for group in own for p in group['params']) == sorted(names.values())


# ----------------------------------------------------------------------------------------------------------------------
# a cache

def test_each_scope_keeps_what_it_needs_and_a_query_is_absorbed(monkeypatch):
    """The comparisons below would hold as well if keys and values were kept, or made anew for every token."""
    made, expand = [], lowrank.cache.expand
    monkeypatch.setattr(lowrank.cache, 'expand', lambda weight, c: made.append(c.size(1)) or expand(weight, c))
    for options, kind, expected in ((mla(), ExpandedValues, []), (mla(**svd('weight')), ExpandedValues, []),
                                    (mla(**svd('causal')), CausalValues, [8, 8])):          # a basis a layer, at 8
        model, idx = make(**options), tokens()
        cache = model.new_cache(2, 16)
        assert type(cache[0]) is LatentCache and type(cache[0].values) is kind
        assert type(cache[0].latents) is Rows and cache[0].latents.kept.shape == (2, 16, 3)
        model(idx[:, :5], cache=cache)
        made.clear()
        for t in range(5, 16):
            model(idx[:, t:t + 1], cache=cache)
        assert made == expected
        with torch.no_grad():                                       # and they are the latents
            x = model.transformer.h[0].ln_1(model.transformer.wte(idx) + model.transformer.wpe.weight)
            torch.testing.assert_close(cache[0].latents.all(), x @ model.transformer.h[0].attn.c_attn.kv_down.weight.T)


def bar(dtype):
    return 1e-9 if dtype == torch.float64 else 1e-5


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('scope, method', [(None, None), *product(('causal', 'weight'), METHODS)])
def test_cached_logits_are_the_uncached_ones(scope, method, bias, dtype):
    """At every position: latents below, at and above the head size of 4, ranks below, at and above latents. Blocks of 8
    in 'causal' scope: 'randomized' wants rank + 4 rows."""
    shapes = (1, 2, 1), (2, 2, 7), (3, 1, 16), (3, 3, 9), (4, 2, 8), (4, 3, 15), (6, 2, 3), (8, 3, 2)
    for latent, rank, prompt in shapes:
        options = svd(scope, rank, method, svd_block=8) if scope else {}
        model, idx = make(latent, dtype, **mla(latent, bias=bias, **options)), tokens(3, seed=prompt)
        assert error(model, idx, prompt) <= bar(dtype), (latent, rank, prompt)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(data=st.data(), scope=st.sampled_from([None, 'causal', 'weight']), method=st.sampled_from(EXACT_METHODS),
       head_size=st.sampled_from([1, 2, 3, 4, 5, 8]), n_head=st.integers(1, 3), bias=st.booleans(),
       block_size=st.integers(1, 20), svd_block=st.integers(1, 22), batch=st.integers(1, 3), one_prompt=st.booleans(),
       seed=st.integers(0, 999))
def test_cached_logits_of_any_shape(data, scope, method, head_size, n_head, bias, block_size, svd_block, batch,
                                    one_prompt, seed):
    rank, T = data.draw(st.integers(1, head_size + 1)), data.draw(st.integers(1, block_size))
    latent, prompt = data.draw(st.integers(1, n_head * head_size)), data.draw(st.integers(1, T))
    options = svd(scope, rank, method, svd_block=svd_block) if scope else {}
    model = make(seed, n_embd=n_head * head_size, n_head=n_head, bias=bias, block_size=block_size,
                 **mla(latent, **options))
    idx = tokens(batch, T, seed)
    if one_prompt:
        idx[:, :prompt] = idx[:1, :prompt]
    with torch.no_grad():
        actual, expected = cached_logits(model, idx, prompt, one_prompt), model(idx, idx)[0]
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9 * expected.abs().max().item())


@pytest.mark.parametrize('prompt', range(1, 17))
def test_a_prompt_of_any_length_joins_all_of_a_cache_that_is_used_again(prompt):
    """One sequence for three; after clear() as if new, whatever was there."""
    for options in CACHED.values():
        model, idx = make(**options), tokens(3)
        idx[:, :prompt] = idx[:1, :prompt]
        assert error(model, idx, prompt, one_prompt=True) <= 1e-9
        with torch.no_grad():
            cache, other, expected = model.new_cache(3, 16), tokens(3, seed=1), model(idx, idx)[0]
            for t in range(16):
                model(other[:, t:t + 1], cache=cache)
            for layer in cache:
                layer.clear()
            assert cache[0].length == 0
            logits = [model(idx[:, :prompt], idx[:, :prompt], cache=cache)[0]]
            logits += [model(idx[:, t:t + 1], cache=cache)[0] for t in range(prompt, 16)]
            torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0, atol=1e-9)


@each_cached
def test_what_does_not_fit_a_cache_is_refused_and_changes_nothing(options):
    model, idx = make(**options), tokens(4, 20)
    with torch.no_grad():
        cache, expected = model.new_cache(3, 12), model(idx[:3, :12], idx[:3, :12])[0]
        for new in (idx[:3, :17], idx[:2, :4], idx[:4, :1], idx[:3, :0], idx[:3, :13]):
            with pytest.raises(ValueError):
                model(new, cache=cache)
        model(idx[:3, :4], cache=cache)
        for new in (idx[:3, 4:6], idx[:2, 4:5]):
            with pytest.raises(ValueError):
                model(new, cache=cache)
        for t in range(4, 12):
            torch.testing.assert_close(model(idx[:3, t:t + 1], cache=cache)[0][:, 0], expected[:, t], rtol=0, atol=1e-9)
        with pytest.raises(ValueError, match='no room for 1 more rows: 12 of 12 are taken'):
            model(idx[:3, 12:13], cache=cache)


@each_cached
def test_half_precision_is_as_near_with_a_cache(options):
    """bfloat16 under autocast, where latents and bases are kept in it; float64 stays float64."""
    model, idx = make(dtype=torch.float32, **options), tokens(4)
    assert_as_near_in_bfloat16(model, idx)
    with torch.autocast('cpu', torch.bfloat16):
        assert model.new_cache(2, 16)[0].latents.kept.dtype == torch.bfloat16
        assert error(make(**options), idx, 5) <= 1e-9
    for dtype in (torch.bfloat16, torch.float16):
        assert error(make(dtype=dtype, **options), tokens(), 5) <= (.05 if dtype == torch.bfloat16 else .01)


@each_cached
def test_generation_with_a_cache_is_generation_without(options):
    """Greedy and drawn, up to block_size and beyond, one prompt for all and one for each."""
    model = lively_mla(options)
    for idx, new in ((tokens(3, 3), 10), (tokens(3, 15), 5), (tokens(2, 20), 3), (tokens(1, 4).expand(3, -1), 20)):
        for draws in (dict(temperature=0), dict(temperature=1.2, top_k=6, seed=3)):
            expected = model.generate(idx, new, use_cache=False, **draws)
            assert torch.equal(model.generate(idx, new, **draws), expected)
            assert torch.equal(torch.cat([*model.stream(idx, new, **draws)], dim=1), expected[:, idx.size(1):])
        assert len(expected[0].unique()) > 2


def lively_mla(options):
    """As test_decode.lively: a model whose likeliest token varies."""
    model = make(**options)
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
        model.transformer.ln_f.bias.zero_()
        for block in model.transformer.h:
            for part in (block.attn.c_attn.query, block.attn.c_attn.v_up, block.attn.c_proj, block.mlp.c_fc):
                part.weight.mul_(3)
    return model


@pytest.mark.parametrize('use_cache', [True, False])
def test_values_that_are_not_finite_are_named(use_cache):
    model = make(**mla(**svd('causal')))
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.v_up.weight[0, 0] = math.nan
    with pytest.raises(torch.linalg.LinAlgError, match='transformer.h.1.attn: .*non-finite'):
        model.generate(tokens(columns=6), 5, use_cache=use_cache)


# ----------------------------------------------------------------------------------------------------------------------
# bytes

def bytes_held(cache, model):
    """Bytes of all storages that a cache refers to, found by walking it, but for those of the model's parameters and,
    in 'weight' scope, the truncated U_v."""
    known = {p.untyped_storage()._cdata for p in model.parameters()}
    if model.config.svd_scope == 'weight' and model.config.svd_truncates:
        known |= {layer.values.w_v.untyped_storage()._cdata for layer in cache}
    storages = {}

    def walk(x):
        if isinstance(x, torch.Tensor):
            if x.untyped_storage()._cdata not in known:
                storages[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        elif isinstance(x, (list, tuple)):
            for part in x:
                walk(part)
        elif hasattr(x, '__dict__'):
            for part in vars(x).values():
                walk(part)
    walk(cache)
    return sum(storages.values())


@pytest.mark.parametrize('dtype, cast, each', [(torch.float32, False, 4), (torch.float64, False, 8),
                                               (torch.bfloat16, False, 2), (torch.float32, True, 2)],
                         ids=['float32', 'float64', 'bfloat16', 'autocast'])
@pytest.mark.parametrize('scope', [None, 'weight', 'causal'])
def test_bytes_of_the_cache_are_those_it_allocates(scope, dtype, cast, each):
    """Latents only, whatever the heads; 'causal' scope: and a basis of rank hs numbers a head and span."""
    for head_size, latent, rank, block, T, B in ((5, 2, 2, 4, 16, 3), (4, 12, 3, 1, 16, 1), (4, 4, 1, 3, 7, 2),
                                                 (2, 1, 1, 20, 1, 4)):
        model = make(dtype=dtype, n_embd=3 * head_size, n_head=3,
                     **mla(latent, **(svd(scope, rank, svd_block=block) if scope else {})))
        starts = [block * 2 ** i for i in range(20) if rank < block * 2 ** i < T] if scope == 'causal' else []
        expected = 2 * B * each * (T * latent + len(starts) * 3 * rank * head_size)
        with torch.autocast('cpu', torch.bfloat16, enabled=cast), torch.no_grad():
            cache = model.new_cache(B, T)
            assert model.kv_cache_bytes(B, T) == expected == bytes_held(cache, model)
            idx = tokens(B, T)
            for t in range(T):
                model(idx[:, t:t + 1], cache=cache)
            assert bytes_held(cache, model) == expected
            cache[1].values.more = [torch.empty(7, dtype=torch.float64)]
            assert bytes_held(cache, model) == expected + 56        # the walk is not blind


@pytest.mark.parametrize('layers, heads, width, latent, ratio', [(12, 12, 768, 256, 6), (4, 4, 128, 32, 8),
                                                                 (4, 4, 128, None, 8), (1, 2, 8, 8, 2)])
def test_how_much_smaller_the_cache_is(layers, heads, width, latent, ratio):
    """Exactly: 2 C / d."""
    shape = dict(n_layer=layers, n_head=heads, n_embd=width, vocab_size=8, block_size=1024)
    with torch.device('meta'):
        models = GPT(GPTConfig(**shape, **mla(latent))), GPT(GPTConfig(**shape))
    ours, dense = (model.to_empty(device='cpu') for model in models)    # memory that nobody writes to costs nothing
    for batch, length in ((1, 1), (3, 100)):
        assert dense.kv_cache_bytes(batch, length) == ratio * ours.kv_cache_bytes(batch, length)
        assert ours.kv_cache_bytes(batch, length) == 4 * batch * length * layers * (2 * width // ratio)
        assert bytes_held(ours.new_cache(batch, length), ours) == ours.kv_cache_bytes(batch, length)


# ----------------------------------------------------------------------------------------------------------------------
# operations


@pytest.mark.parametrize('layers, heads, width, T, options', [
    (layers, heads, width, T, options)
    for layers, heads, width, T in ((1, 2, 8, 16), (2, 2, 8, 11), (3, 4, 32, 40), (2, 1, 12, 1))
    for options in ({}, mla(3), mla(8))], ids=str)
def test_operations_are_those_that_torch_counts(layers, heads, width, T, options):
    """A prompt without a cache and with one, and the token after it. Attention to later tokens is computed as well, and
    then masked, so it is counted by torch: T^2 pairs of query and key for T (T + 1) / 2, in all layers but the last,
    where there is a single query."""
    model = make(dtype=torch.float32, n_layer=layers, n_head=heads, n_embd=width, block_size=64, **options)
    idx = tokens(2, T + 1)
    masked = (layers - 1) * 4 * width * T * (T - 1) // 2
    expected = 2 * (T * model.flops_per_token(T) + masked)
    assert counted(lambda: model(idx[:, :T])) == pytest.approx(expected, rel=1e-12)
    cache = model.new_cache(2, T + 1)
    assert counted(lambda: model(idx[:, :T], cache=cache)) == pytest.approx(expected, rel=1e-12)
    assert counted(lambda: model(idx[:, T:], cache=cache)) == 2 * model.flops_per_token(T, decode=True)


# ----------------------------------------------------------------------------------------------------------------------
# training

def train_steps(model, optimizer, steps):
    """-> the losses; parameters and gradients stay finite."""
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        x = torch.randint(SMALL['vocab_size'] // 2, (2, 16), generator=generator)
        loss = model(x, (x * 2 + 1) % SMALL['vocab_size'])[1]
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        model.advance_svd_basis()
        losses.append(loss.item())
    assert all(p.isfinite().all() for p in model.parameters())
    return losses


@pytest.mark.parametrize('kind', ['adamw', pytest.param('muon', marks=pytest.mark.slow)])
@pytest.mark.parametrize('scope', SCOPES)
@pytest.mark.parametrize('method', METHODS)
def test_training_stays_finite_and_learns(scope, method, kind, steps=30):
    """The default latent, 4 numbers, with heads of 2 and of 16: V then has singular values that are exactly zero, where
    a gradient by autograd through torch.linalg.svd is NaN at once. Without biases, which would add a dimension."""
    for n_head, rank in ((8, 1), (1, 6)):
        torch.manual_seed(0)
        c = GPTConfig(**SMALL | dict(n_layer=1, n_head=n_head, n_embd=16, bias=False, use_mla=True),
                      **svd(scope, rank, method))
        model = GPT(c)
        assert c.latent_dim == 4
        losses = train_steps(model, optimizer_of(model, kind), steps)
        assert losses[-1] < .8 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['adamw', 'muon'])
@pytest.mark.parametrize('scope', SCOPES)
@pytest.mark.parametrize('method', METHODS)
def test_a_thousand_steps_stay_finite(scope, method, kind):
    test_training_stays_finite_and_learns(scope, method, kind, 1000)


def test_a_run_is_sampled_resumed_and_refused(here, fit, call, refused):
    """Its model_args alone rebuild the model; a contradiction is one line."""
    out = fit(*RUN)
    assert 'MLA: one latent of 5 numbers a token and layer for keys and values, of 32' in out
    saved = checkpoint()
    assert saved['model_args']['use_mla'] and saved['model_args']['mla_latent_dim'] == 5
    model = GPT(GPTConfig(**saved['model_args']))
    model.load_state_dict(saved['model'])
    assert type(model.transformer.h[0].attn.c_attn) is LatentProjection
    drawn = call(sample.main, '--device=cpu', '--start=the', '--num_samples=2', '--max_new_tokens=20')
    assert drawn.code == 0 and drawn.out.count('the') >= 2
    resume = ['--init_from=resume', '--device=cpu', '--max_iters=6']
    for option, had in (('use_mla=False', 'True'), ('mla_latent_dim=4', '5')):
        name = option.partition('=')[0]
        assert f'{option}: resume has {name}={had}, which is fixed' in refused(train.main, *resume, f'--{option}')
    assert call(train.main, *resume).code == 0 and checkpoint()['iter_num'] == 6


def test_a_checkpoint_from_before_latents_is_one_without(here, fit, call, refused):
    fit()
    saved = checkpoint()
    for part in ('model_args', 'config'):
        for key in ('use_mla', 'mla_latent_dim'):
            del saved[part][key]
    torch.save(saved, 'out/ckpt.pt')
    assert call(sample.main, '--device=cpu', '--start=the', '--num_samples=1', '--max_new_tokens=5').code == 0
    resume = ['--init_from=resume', '--device=cpu', '--max_iters=5']
    assert 'use_mla=True: resume has use_mla=False' in refused(train.main, *resume, '--use_mla=True')
    assert call(train.main, *resume).code == 0 and checkpoint()['model_args']['use_mla'] is False


def test_a_checkpoint_whose_weights_are_of_the_other_kind_is_one_line(here, fit, refused):
    fit(*RUN)
    saved = checkpoint()
    for change in (dict(use_mla=False), dict(mla_latent_dim=4)):
        torch.save(saved | {'model_args': saved['model_args'] | change}, 'out/ckpt.pt')
        assert 'its weights do not fit its model_args' in refused(sample.main, '--device=cpu', '--start=the')


@pytest.mark.parametrize('value, words', [(0, 'must be at least 1 (nearest: 1)'),
                                          (-3, 'must be at least 1 (nearest: 1)'),
                                          (17, 'must be at most n_embd (nearest: 16)')])
def test_latents_that_cannot_be(here, refused, value, words):
    line = refused(train.main, *TINY, '--use_mla=True', f'--mla_latent_dim={value}')
    assert line == f'train.py: mla_latent_dim={value}: {words} [the command line]' and not Path('out').exists()
    with pytest.raises(ValueError, match='^mla_latent_dim='):
        GPTConfig(n_embd=16, n_head=2, use_mla=True, mla_latent_dim=value)


def test_the_default_latent_is_a_quarter():
    widths = {1: 1, 3: 1, 8: 2, 128: 32, 768: 192}
    assert {w: GPTConfig(n_embd=w, n_head=1, use_mla=True).latent_dim for w in widths} == widths


# ----------------------------------------------------------------------------------------------------------------------
# export.py and configs

@pytest.mark.parametrize('dtype, bound', [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize('options', [{}, dict(bias=False), dict(mla_latent_dim=8), svd('weight'),
                                     svd('weight', 3, 'standard', bias=False)], ids=str)
def test_multiplied_out_it_is_a_plain_model(options, dtype, bound):
    model, idx = make(dtype=dtype, **{**mla(), **options}), tokens()
    plain = GPT(GPTConfig(**asdict(model.config) | dict(use_mla=False, use_svd=False))).to(dtype).eval()
    plain.load_state_dict(export.plain_state_dict(model))
    expected = model(idx, idx)[0]
    assert (plain(idx, idx)[0] - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize('to', ['gpt2', 'nanogpt'])
def test_a_run_is_exported(here, fit, call, refused, to):
    """Without its AdamW's state, which is of parameters that are no more."""
    fit(*RUN)
    result = call(export.main, f'--to={to}', '--save_dir=new')
    assert result.code == 0 and 'left out: the optimizer state' in result.out, result.out
    assert 'multiplied out' in result.out
    before, idx = GPT.from_checkpoint(ckpt.load('out/ckpt.pt')).eval(), torch.arange(16)[None]
    after = GPT.from_pretrained('new') if to == 'gpt2' else GPT.from_checkpoint(ckpt.load('new/ckpt.pt'))
    expected = before(idx, idx)[0]
    assert not after.config.use_mla
    assert (after.eval()(idx, idx)[0] - expected).abs().max() <= 1e-5 * expected.abs().max()
    if to == 'nanogpt':
        assert not checkpoint('new')['optimizer']['state']
        assert call(train.main, '--init_from=resume', '--out_dir=new', '--max_iters=6', '--device=cpu').code == 0
    fit(*RUN, '--use_svd=True', '--svd_rank=2', '--svd_scope=causal', '--svd_block=4', '--out_dir=cut')
    assert "svd_scope='causal': cuts V itself" in refused(export.main, '--out_dir=cut', f'--to={to}')


@pytest.mark.parametrize('name', CONFIGS)
def test_a_config_file_is_parsed_and_trained(name, tmp_path, monkeypatch, call):
    """A few steps of the real shape on other text: every setting is the model's and the checkpoint's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, 'sample', lambda *args: '')
    path = ROOT / 'config' / name
    write_dataset(Path('data/shakespeare_char'), ''.join(map(chr, range(32, 97))) * 20, 'char', source='tests')
    result = call(train.main, path, '--device=cpu', '--max_iters=3', '--eval_interval=3', '--eval_iters=1',
                  '--log_interval=1', '--block_size=64', '--batch_size=1')
    assert result.code == 0, result.err
    assert 'MLA: one latent of 32 numbers a token and layer for keys and values, of 256' in result.out
    cfg, _ = configuration.load(train.TrainConfig, [str(path)])
    out, = Path().glob('out*')
    saved = checkpoint(out)
    assert out.name == cfg.out_dir == 'out-' + name[6:-3].replace('_', '-') and cfg.dataset == 'shakespeare_char'
    args, changed = saved['model_args'], ('block_size', 'vocab_size')
    assert args == {f.name: getattr(cfg, f.name) for f in fields(GPTConfig)} | {key: args[key] for key in changed}
    assert (args['use_mla'], args['mla_latent_dim'], args['n_layer'], args['n_embd']) == (True, 32, 4, 128)
    assert args['use_svd'] == ('svd' in name) and args['svd_method'] == ('randomized' if 'rsvd' in name else 'gram')
    assert not args['use_svd'] or (args['svd_rank'], args['svd_scope']) == (16, 'causal')
    assert ('svd_basis' in saved) == ('rsvd' in name) and 'muon' in saved['optimizer']
    assert [row['iter'] for row in rows(out) if 'loss' in row] == [1, 2, 3]
    assert GPT.from_checkpoint(saved).kv_cache_bytes(1, 32) == 4 * 4 * 32 * 32

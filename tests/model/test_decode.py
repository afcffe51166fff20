"""model.py with a key/value cache against itself without: logits, tokens, bytes, and how much is computed."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import SMALL, assert_as_near_in_bfloat16, cached_logits, error, make, svd, tokens
from lowrank.rows import CausalRows, LowRankRows
from lowrank.svd import METHODS
from lowrank.cache import KeyValueCache
from model import GPT, GPTConfig

pytestmark = pytest.mark.usefixtures('one_thread')
CACHED = {'no SVD': {}, 'weight': svd('weight'), 'causal': svd('causal'),
          'sequence, full rank': svd('sequence', 4)}                # SMALL: 2 layers, 2 heads of 4, block_size 16
each_cached = pytest.mark.parametrize('options', CACHED.values(), ids=CACHED)


def bar(dtype, scope):
    return 1e-9 if dtype == torch.float64 else 1e-4 if scope == 'causal' else 1e-5


@pytest.fixture
def counts():
    """counts(model) -> a dict that follows how many tokens, times rows, each part of the model has computed."""
    def follow(model):
        found = {}
        parts = {'head': model.lm_head} | {f'{name} {i}': part for i, block in enumerate(model.transformer.h)
                                           for name, part in (('layer', block.ln_1), ('mlp', block.mlp))}
        for name, part in parts.items():
            def add(_, args, name=name):
                found[name] = found.get(name, 0) + args[0].shape[0] * args[0].shape[1]
            part.register_forward_pre_hook(add)
        return found
    return follow


# ----------------------------------------------------------------------------------------------------------------------
# logits

@settings(derandomize=True, deadline=None, max_examples=300)
@given(data=st.data(), scope=st.sampled_from([None, 'causal', 'weight']), method=st.sampled_from(METHODS),
       head_size=st.sampled_from([1, 2, 3, 4, 5, 8]), n_head=st.integers(1, 3), bias=st.booleans(),
       block_size=st.integers(1, 20), svd_block=st.integers(1, 22), rows=st.integers(1, 3), one_prompt=st.booleans(),
       dtype=st.sampled_from([torch.float64, torch.float32]), seed=st.integers(0, 999))
def test_cached_logits_are_the_uncached_ones(data, scope, method, head_size, n_head, bias, block_size, svd_block, rows,
                                             one_prompt, dtype, seed):
    rank = data.draw(st.integers(1, head_size + 1))
    T = data.draw(st.integers(1, block_size))
    prompt = data.draw(st.integers(1, T))
    options = svd(scope, rank, method, svd_block=svd_block) if scope else {}
    model = make(seed, dtype, n_embd=n_head * head_size, n_head=n_head, bias=bias, block_size=block_size, **options)
    idx = tokens(rows, T, seed)
    if one_prompt:
        idx[:, :prompt] = idx[:1, :prompt]
    with torch.no_grad():
        actual, expected = cached_logits(model, idx, prompt, one_prompt), model(idx, idx)[0]
        allowed = bar(dtype, scope) * expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=0, atol=allowed)
        t = data.draw(st.integers(1, T))                            # a prefix by itself
        torch.testing.assert_close(actual[:, t - 1:t], model(idx[:, :t])[0], rtol=0, atol=allowed)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('options', [{}, svd('weight', 16), svd('weight', 16, 'standard'), svd('causal', 16),
                                     svd('causal', 16, 'standard', bias=False)], ids=str)
def test_cached_logits_of_heads_as_large_as_those_of_gpt2(options, dtype):
    """Head size 64, rank 16, 200 tokens, blocks of 32."""
    model = make(1, dtype, n_embd=128, block_size=200, vocab_size=64, **{'svd_block': 32, **options})
    idx = torch.randint(64, (2, 200), generator=torch.Generator().manual_seed(2))
    assert error(model, idx, 70) <= bar(dtype, options.get('svd_scope'))


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_cached_logits_after_training_steps(dtype):
    """'randomized' then starts from the basis of the last step, in the cache as without."""
    model = make(1, dtype, n_embd=32, block_size=64, **svd('causal', 5, 'randomized', svd_block=8))
    idx = tokens(2, 64)
    cold = model(idx, idx)[0].detach()
    model.train()(idx, idx)[1].backward()
    model.advance_svd_basis()
    model.eval()
    assert not torch.equal(model(idx, idx)[0], cold)
    for prompt in (1, 8, 20, 63):
        assert error(model, idx, prompt) <= bar(dtype, 'causal')


@each_cached
@pytest.mark.parametrize('prompt', [1, 2, 15, 16])
def test_a_prompt_of_one_sequence_joins_all_of_the_cache(options, prompt):
    model, idx = make(**options), tokens(3)
    idx[:, :prompt] = idx[:1, :prompt]
    assert error(model, idx, prompt, one_prompt=True) <= 1e-9
    with torch.no_grad():
        assert model(idx[:1, :prompt], cache=model.new_cache(3, 16))[0].shape == (1, 1, 11)


@each_cached
def test_room_that_is_left_changes_nothing(options):
    model, idx = make(**options), tokens(columns=9)
    assert error(model, idx, 3, room=16) <= 1e-9


@each_cached
def test_a_cache_with_loss(options):
    """With targets the cached forward pass gives the same loss and all positions."""
    model, idx, targets = make(**options), tokens(), tokens(seed=1)
    logits, loss = model(idx, targets, cache=model.new_cache(2, 16))
    torch.testing.assert_close((logits, loss), model(idx, targets), rtol=0, atol=1e-9)


@each_cached
def test_a_cache_takes_no_gradients(options):
    """Also outside of torch.no_grad: rows are written in place, so a gradient would be wrong."""
    model, idx = make(**options), tokens()
    cache, expected = model.new_cache(2, 16), model(idx, idx)[0]
    logits = [model(idx[:, :5], idx[:, :5], cache=cache)[0]]
    logits += [model(idx[:, t:t + 1], cache=cache)[0] for t in range(5, 16)]
    assert expected.requires_grad and not any(x.requires_grad for x in logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected.detach(), rtol=0, atol=1e-9)


@each_cached
def test_half_precision_is_as_near_with_a_cache(options):
    assert_as_near_in_bfloat16(make(dtype=torch.float32, **options), tokens(4))


@each_cached
def test_float64_under_autocast_stays_float64(options):
    model, idx = make(**options), tokens()
    with torch.autocast('cpu', torch.bfloat16):
        assert error(model, idx, 5) <= 1e-9


@each_cached
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision(options, dtype):
    model, idx = make(dtype=dtype, **options), tokens()
    assert error(model, idx, 5) <= (.05 if dtype == torch.bfloat16 else .01)


# ----------------------------------------------------------------------------------------------------------------------
# value projections that are out of the ordinary

def change_values(model, change):
    """change(weight (nh, hs, C), bias (nh, hs) or None, c_proj) of every value projection, in place."""
    with torch.no_grad():
        for block in model.transformer.h:
            C, nh = model.config.n_embd, model.config.n_head
            bias = block.attn.c_attn.bias
            change(block.attn.c_attn.weight[2 * C:].unflatten(0, (nh, -1)),
                   None if bias is None else bias[2 * C:].unflatten(0, (nh, -1)), block.attn.c_proj.weight)


@pytest.mark.parametrize('scope', ['weight', 'causal'])
@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('rank', [2, 3])
def test_value_weights_of_less_than_the_rank(scope, method, bias, rank):
    """Zero, or of rank one: V has at most two dimensions, the bias's included, and the cut changes nothing."""
    for left in (0, 1):
        plain, cut = make(bias=bias), make(bias=bias, **svd(scope, rank, method))
        for model in (plain, cut):
            change_values(model, lambda w, b, _: w.copy_(left * w[:, :, :1] * w[:, :1, :]))
        idx = tokens()
        assert error(cut, idx, 3) <= 1e-9
        torch.testing.assert_close(cached_logits(cut, idx, 3), plain(idx, idx)[0].detach(), rtol=0, atol=1e-9)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('n_head', [1, 2, 4])
def test_value_weights_whose_cut_is_not_unique(dtype, method, n_head):
    """All singular values are equal, as Muon strives for: the cache takes the subspace that training takes."""
    model = make(dtype=dtype, n_embd=16, n_head=n_head, **svd('weight', 16 // n_head // 2, method))
    change_values(model, lambda w, b, _: w.copy_(torch.linalg.qr(w.mT)[0].mT))
    assert error(model, tokens(), 3) <= bar(dtype, 'weight')


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('scope', ['weight', 'causal'])
@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('scale', [1e-20, 1e20])
def test_values_of_any_size(dtype, scope, method, scale):
    """V is scaled and its output projection takes that back, so logits are those of the model as it was."""
    model, idx = make(dtype=dtype, **svd(scope, 2, method)), tokens()
    before = model(idx, idx)[0].detach()

    def change(w, b, c_proj):
        w.mul_(scale), b.mul_(scale), c_proj.div_(scale)
    change_values(model, change)
    assert error(model, idx, 3) <= bar(dtype, scope)
    torch.testing.assert_close(cached_logits(model, idx, 3), before, rtol=0, atol=bar(dtype, scope) * 10)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('scope', ['weight', 'causal'])
@pytest.mark.parametrize('scale', [1e-20, 1e15])
def test_values_so_small_or_large_that_they_are_nothing_or_all(dtype, scope, scale):
    """Beyond 1e19 squares of float32 overflow in LayerNorm, cache or no cache."""
    model = make(dtype=dtype, **svd(scope))
    change_values(model, lambda w, b, _: (w.mul_(scale), b.mul_(scale)))
    assert error(model, tokens(), 3) <= bar(dtype, scope)


@pytest.mark.parametrize('rank', [1, 2, 3])
@pytest.mark.parametrize('method', METHODS)
def test_one_token_over_and_over_without_positions(rank, method):
    """Then all rows of V are equal. Where other tokens follow, rank 1 is still determined; beyond, only finite."""
    model, idx = make(**svd('causal', rank, method)), tokens()
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
    idx[:] = 3
    assert error(model, idx, 5) <= 1e-9
    idx[:, 9:] = tokens(columns=7)
    assert cached_logits(model, idx, 5).isfinite().all()
    assert rank > 1 or error(model, idx, 5) <= 1e-9


# ----------------------------------------------------------------------------------------------------------------------
# what does not fit a cache

@each_cached
@pytest.mark.parametrize('held, rows, more, words', [
    (0, 3, 0, 'cannot forward 0 tokens: valid are 1 to block_size=16'),
    (0, 3, 17, 'cannot forward 17 tokens: valid are 1 to block_size=16'),
    (12, 3, 5, 'cannot forward 17 tokens: valid are 1 to block_size=16'),
    (4, 3, 2, 'cannot add 2 tokens to a cache that holds some: valid is 1'),
    (12, 3, 1, 'no room for 1 more rows: 12 of 12 are taken'),
    (0, 3, 13, 'no room for 13 more rows: 0 of 12 are taken'),
    (0, 2, 4, 'cannot add 2 sequences to a cache of 3'), (4, 2, 1, 'cannot add 2 sequences to a cache of 3'),
    (0, 4, 1, 'cannot add 4 sequences to a cache of 3')])
def test_what_does_not_fit_a_cache_is_refused_and_changes_nothing(options, held, rows, more, words):
    model, idx = make(**options), tokens(4, 20)
    with torch.no_grad():
        cache, expected = model.new_cache(3, 12), model(idx[:3, :12], idx[:3, :12])[0]
        if held:
            model(idx[:3, :held], cache=cache)
        with pytest.raises(ValueError) as e:
            model(idx[:rows, held:held + more], cache=cache)
        assert str(e.value) == words
        if held < 12:                                               # and it goes on as if nothing had been
            logits = model(idx[:3, held:held + 1] if held else idx[:3, :1], cache=cache)[0]
            torch.testing.assert_close(logits[:, 0], expected[:, held], rtol=0, atol=1e-9)


@pytest.mark.parametrize('size', [0, -1, 17])
def test_a_cache_has_room_for_one_to_block_size_tokens(size):
    with pytest.raises(ValueError, match=f'^cannot cache {size} tokens: valid are 1 to block_size=16$'):
        make().new_cache(2, size)


def test_sequence_scope_that_truncates_has_no_cache():
    with pytest.raises(ValueError, match="^svd_scope='sequence': .* cannot be cached$"):
        make(**svd('sequence')).new_cache(2, 16)


# ----------------------------------------------------------------------------------------------------------------------
# bytes

def bytes_held(cache):
    """Bytes of all storages that a cache refers to, found by walking it, but for the factors of W_v."""
    weights = {LowRankRows: ('basis', 'offset'), KeyValueCache: ('to_coordinates',)}
    storages = {}

    def walk(x):
        if isinstance(x, torch.Tensor):
            storages[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        elif isinstance(x, (list, tuple)):
            for part in x:
                walk(part)
        elif hasattr(x, '__dict__'):
            for name, part in vars(x).items():
                if name not in weights.get(type(x), ()):
                    walk(part)
    walk(cache)
    return sum(storages.values())


def values_by_formula(scope, T, head_size, rank, block, each):
    """Bytes of V of T tokens, per head, `each` of a number; sums of squares in float64, for halves in float32."""
    if scope == 'weight':
        return T * rank * each
    starts = [block * 2 ** i for i in range(20) if rank < block * 2 ** i < T] if scope == 'causal' else []
    if not starts:
        return T * head_size * each
    sums = (4 if each == 2 else 8) * head_size * (head_size // 2 + 1)
    return (starts[0] * head_size + (T - starts[0]) * rank + len(starts) * rank * head_size) * each + sums


@pytest.mark.parametrize('dtype, cast, each', [(torch.float32, False, 4), (torch.float64, False, 8),
                                               (torch.bfloat16, False, 2), (torch.float32, True, 2)],
                         ids=['float32', 'float64', 'bfloat16', 'autocast'])
@pytest.mark.parametrize('scope', [None, 'weight', 'causal'])
@pytest.mark.parametrize('bias', [True, False])
def test_bytes_of_the_cache_are_those_it_allocates(scope, bias, dtype, cast, each):
    for head_size, rank, block, T, B in ((5, 2, 4, 16, 3), (4, 3, 1, 16, 1), (4, 1, 3, 7, 2), (6, 5, 20, 16, 1),
                                         (2, 1, 1, 1, 4), (8, 2, 2, 2, 1)):
        model = make(dtype=dtype, n_embd=3 * head_size, n_head=3, bias=bias,
                     **(svd(scope, rank, svd_block=block) if scope else {}))
        heads = 2 * 3 * B                                           # of all layers and sequences
        expected = heads * (T * head_size * each + values_by_formula(scope, T, head_size, rank, block, each))
        with torch.autocast('cpu', torch.bfloat16, enabled=cast), torch.no_grad():
            cache = model.new_cache(B, T)
            assert model.kv_cache_bytes(B, T) == expected == bytes_held(cache)
            idx = tokens(B, T)
            for t in range(T):
                model(idx[:, t:t + 1], cache=cache)
            assert bytes_held(cache) == expected                    # nothing grows with the tokens


def test_the_walk_finds_what_a_cache_holds():
    """The walk above is not blind: one more tensor, however deep, is found."""
    cache = make(**svd('causal')).new_cache(1, 16)
    before = bytes_held(cache)
    cache[1].values.spans[0] = (cache[1].values.spans[0], [torch.empty(7, dtype=torch.float64)])
    assert bytes_held(cache) == before + 56


def test_sequence_scope_caches_nothing_unless_it_truncates_nothing():
    assert make(**svd('sequence')).kv_cache_bytes(2, 16) == 0
    full = make().kv_cache_bytes(2, 16)
    for options in (svd('sequence', 4), svd('sequence', None), {**svd('sequence'), 'use_svd': False}):
        assert make(**options).kv_cache_bytes(2, 16) == full == 2 * 2 * 2 * 16 * 8 * 8          # K, V, layers, B, T, C


def test_how_much_smaller_v_is():
    """Head size 64, rank 16, 1,024 tokens, float32."""
    def values(**options):
        model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=128, vocab_size=8, **options))
        return model.kv_cache_bytes(3, 1024) - 2 * 3 * 1024 * 128 * 4                           # less the keys
    full = values()
    assert full == 2 * 3 * 1024 * 128 * 4 and full / values(**svd('weight', 16)) == 4
    assert full / values(**svd('causal', 16)) >= 2.4


def test_bytes_are_counted_without_allocating_them():
    """A cache of petabytes."""
    assert make(**svd('causal')).kv_cache_bytes(10 ** 12, 16) > 10 ** 15


# ----------------------------------------------------------------------------------------------------------------------
# generate

def lively(**options):
    """A model whose likeliest token varies with the prompt and the position, which `make`'s hardly does."""
    model = make(**options)
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))       # not the embedding
        model.transformer.ln_f.bias.zero_()
        for block in model.transformer.h:
            for part in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc):
                part.weight.mul_(3)
    return model


def assert_same_tokens(model, idx, new, **options):
    """With cache and without; -> the tokens."""
    with_cache, without = (model.generate(idx, new, use_cache=use, seed=3, **options) for use in (True, False))
    assert with_cache.shape == (idx.size(0), idx.size(1) + new) and torch.equal(with_cache[:, :idx.size(1)], idx)
    assert torch.equal(with_cache, without)
    return with_cache


@pytest.mark.parametrize('method', METHODS)
@each_cached
@pytest.mark.parametrize('columns, new', [(1, 15), (1, 16), (3, 30), (15, 1), (15, 2), (15, 5), (16, 4), (20, 6)])
def test_the_cache_changes_no_token(options, method, columns, new):
    model = lively(**{**options, 'svd_method': method})
    for draws in (dict(), dict(temperature=0), dict(temperature=.7, top_k=5), dict(temperature=1.5, top_p=.8)):
        assert_same_tokens(model, tokens(3, columns, seed=columns), new, **draws)


@each_cached
@pytest.mark.parametrize('use_cache', [True, False])
def test_greedy_tokens_are_the_likeliest_after_the_last_block_size(options, use_cache):
    """nanoGPT's window: the last 16 tokens at positions 0 to 15."""
    model = lively(**options)
    idx = model.generate(tokens(columns=3), 30, temperature=0, use_cache=use_cache)
    assert all(len(row.unique()) > 2 for row in idx[:, 16:])
    with torch.no_grad():
        for t in range(3, 33):
            assert torch.equal(model(idx[:, max(0, t - 16):t])[0][:, -1].argmax(-1), idx[:, t])


@each_cached
@pytest.mark.parametrize('use_cache', [True, False])
def test_no_tokens_and_one(options, use_cache):
    model, idx = lively(**options), tokens()
    assert torch.equal(model.generate(idx, 0, use_cache=use_cache), idx)
    assert torch.equal(model.generate(idx, 1, temperature=0, use_cache=use_cache)[:, -1:], model(idx)[0].argmax(-1))


@each_cached
def test_a_batch_is_its_prompts_one_by_one(options):
    model, idx = lively(**options), tokens(5, 4)
    alone = [model.generate(row[None], 20, temperature=0) for row in idx]
    assert torch.equal(model.generate(idx, 20, temperature=0), torch.cat(alone))
    assert len(torch.cat(alone)[:, 4:].unique(dim=0)) > 1


@each_cached
@pytest.mark.parametrize('use_cache', [True, False])
@pytest.mark.parametrize('columns', [1, 4, 16, 19])
def test_an_expanded_prompt_is_the_prompt_repeated(options, use_cache, columns):
    model, prompt = lively(**options), tokens(1, columns)
    expanded, repeated = (model.generate(idx, 20, seed=5, use_cache=use_cache)
                          for idx in (prompt.expand(4, -1), prompt.repeat(4, 1)))
    assert torch.equal(expanded, repeated) and len(repeated.unique(dim=0)) == 4


@pytest.mark.parametrize('options', [{}, svd('sequence')], ids=str)
def test_a_seed_is_of_a_generator_of_its_own(options):
    model, idx = make(**options), tokens(columns=4)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    a = model.generate(idx, 12, seed=7, use_cache=not options)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, b = (model.generate(idx, 12, seed=seed, use_cache=not options) for seed in (7, 8))
    assert torch.equal(a, again) and not torch.equal(a, b)
    torch.manual_seed(7)                                            # without one it is the global generator
    assert torch.equal(model.generate(idx, 12, use_cache=not options), a)
    assert not torch.equal(model.generate(idx, 12, use_cache=not options), a)


def test_in_training_mode_nothing_is_cached(counts):
    """Dropout differs from pass to pass, and from row to row of an expanded prompt."""
    model = make(dropout=.5).train()
    found = counts(model)
    torch.manual_seed(0)
    model.generate(tokens(1, 3).expand(4, -1), 3, temperature=0)
    assert found['layer 0'] == 4 * (3 + 4 + 5) and model.training
    first = [model.generate(tokens(1, 3).expand(64, -1), 1, temperature=0)[:, -1] for _ in range(2)]
    assert len(first[0].unique()) > 1 and not torch.equal(*first)


def test_in_training_mode_without_dropout_tokens_are_those_of_eval():
    model = make(**svd('causal'))
    expected = model.generate(tokens(columns=3), 20, seed=1)
    assert torch.equal(model.train().generate(tokens(columns=3), 20, seed=1), expected)


def caught(f):
    """What f warns of, as warnings' default filter shows it."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('default')
        f()
    return [str(w.message) for w in found]


def test_sequence_scope_warns_once_and_recomputes(counts):
    model, idx = make(**svd('sequence')), tokens(columns=3)
    found = counts(model)
    messages = caught(lambda: [model.generate(idx, 5, temperature=0) for _ in range(3)])
    assert len(messages) == 1 and messages[0].startswith("svd_scope='sequence': ") and '\n' not in messages[0]
    assert found['layer 0'] == 3 * 2 * (3 + 4 + 5 + 6 + 7)
    assert not caught(lambda: model.generate(idx, 5, use_cache=False))


@each_cached
def test_other_scopes_do_not_warn(options):
    assert not caught(lambda: make(**options).generate(tokens(columns=3), 20))


@pytest.mark.parametrize('options', [svd('sequence', 4), svd('sequence', None), svd('sequence', 3, block_size=3)],
                         ids=str)
def test_sequence_scope_that_truncates_nothing_is_cached(options, counts):
    model = make(**options)
    found = counts(model)
    assert not caught(lambda: model.generate(tokens(columns=1), 3, temperature=0)) and found['layer 0'] == 2 * 3


# ----------------------------------------------------------------------------------------------------------------------
# how much is computed

@each_cached
def test_with_a_cache_every_token_is_computed_once(options, counts):
    """Five tokens, eleven more: fifteen pass, for nothing follows the last one. The last layer's MLP and the head see
    one position a pass."""
    model = make(**options)
    found = counts(model)
    model.generate(tokens(3, 5), 11)
    assert found == {'layer 0': 3 * 15, 'layer 1': 3 * 15, 'mlp 0': 3 * 15, 'mlp 1': 3 * 11, 'head': 3 * 11}


@each_cached
def test_without_a_cache_the_prefix_is_computed_for_each(options, counts):
    model = make(**options)
    found = counts(model)
    model.generate(tokens(3, 5), 11, use_cache=False)
    passed = 3 * sum(range(5, 16))
    assert found == {'layer 0': passed, 'layer 1': passed, 'mlp 0': passed, 'mlp 1': 3 * 11, 'head': 3 * 11}


@each_cached
def test_an_expanded_prompt_is_computed_once(options, counts):
    model = make(**options)
    found = counts(model)
    model.generate(tokens(1, 5).expand(3, -1), 11)
    assert found == {'layer 0': 5 + 3 * 10, 'layer 1': 5 + 3 * 10, 'mlp 0': 5 + 3 * 10, 'mlp 1': 1 + 3 * 10,
                     'head': 1 + 3 * 10}


@pytest.mark.parametrize('columns, new, passed', [(16, 3, 3 * 16), (20, 1, 16), (14, 5, 16 + 2 * 16), (7, 1, 7),
                                                  (7, 0, 0)])
def test_beyond_block_size_every_token_moves_the_window(counts, columns, new, passed):
    model = make()
    found = counts(model)
    model.generate(tokens(1, columns), new)
    assert found.get('layer 0', 0) == passed


@pytest.mark.parametrize('columns, new, room', [(5, 4, 8), (5, 2, 6), (5, 1, None), (5, 12, 16), (5, 40, 16),
                                                (16, 9, 16)])
def test_a_cache_has_room_for_what_is_computed_and_no_more(monkeypatch, columns, new, room):
    """Nothing follows the last token; one token needs no cache at all."""
    asked, new_cache = [], GPT.new_cache
    monkeypatch.setattr(GPT, 'new_cache', lambda self, *args: asked.append(args) or new_cache(self, *args))
    make().generate(tokens(3, columns), new)
    assert asked == ([(3, room)] if room else [])


def test_use_cache_is_the_fifth_argument(monkeypatch):
    monkeypatch.setattr(GPT, 'new_cache', None)
    model, idx = make(), tokens(columns=3)
    assert torch.equal(model.generate(idx, 5, 1.0, 1, False), model.generate(idx, 5, temperature=0, use_cache=False))


def test_beyond_block_size_w_v_is_not_decomposed_again(monkeypatch):
    """The window slides through the one cache that a generation has, with its factors of W_v."""
    made, new_cache = [], GPT.new_cache
    monkeypatch.setattr(GPT, 'new_cache', lambda *args: made.append(args[1:]) or new_cache(*args))
    monkeypatch.setattr('model.low_rank_approximation', None)
    assert len([*make(**svd('weight')).stream(tokens(columns=3), 20)]) == 20 and made == [(2, 16)]


# ----------------------------------------------------------------------------------------------------------------------
# stream

@each_cached
def test_a_stream_yields_tokens_as_they_are_drawn(options, counts):
    model, idx = make(**options), tokens(3, 5)
    expected = model.generate(idx, 20, seed=2)[:, 5:]
    found, drawn = counts(model), []
    for n, new in enumerate(model.stream(idx, 20, seed=2), 1):
        assert new.shape == (3, 1) and new.dtype == torch.int64 and found['head'] == 3 * n
        assert torch.is_grad_enabled()                              # no_grad is the stream's, not its reader's
        drawn.append(new)
    assert torch.equal(torch.cat(drawn, dim=1), expected)           # the first are still what they were


@pytest.mark.parametrize('use_cache', [True, False])
def test_a_stream_keeps_no_graph(use_cache):
    model, seen = make(), []
    model.lm_head.register_forward_hook(lambda _, args, logits: seen.append(logits.requires_grad))
    model.generate(tokens(columns=5), 3, use_cache=use_cache)
    assert seen == [False] * 3


@each_cached
def test_a_stream_can_be_abandoned(options, counts):
    model, idx = make(**options), tokens(3, 5)
    expected = model.generate(idx, 20, seed=2)
    found, stream = counts(model), model.stream(idx, 20, seed=2)
    for _ in range(3):
        next(stream)
    stream.close()
    assert found['head'] == 3 * 3 and torch.is_grad_enabled()
    assert torch.equal(model.generate(idx, 20, seed=2), expected)


def test_two_streams_do_not_disturb_each_other():
    model, a, b = make(**svd('causal')), tokens(2, 5), tokens(2, 3, seed=1)
    pairs = list(zip(model.stream(a, 15, seed=1), model.stream(b, 15, seed=2)))
    for idx, drawn, seed in zip((a, b), zip(*pairs), (1, 2)):
        assert torch.equal(torch.cat((idx, *drawn), dim=1), model.generate(idx, 15, seed=seed))


@pytest.mark.parametrize('options, words', [
    (dict(max_new_tokens=-1), 'max_new_tokens=-1: must be at least 0'), (dict(temperature=-1.), 'temperature=-1.0: '),
    (dict(top_k=0), 'top_k=0: '), (dict(top_p=0.), 'top_p=0.0: ')])
def test_options_that_cannot_be(options, words):
    with pytest.raises(ValueError, match=f'^{words}'):
        make().generate(tokens(), **{'max_new_tokens': 2, **options})


@pytest.mark.parametrize('use_cache', [True, False])
def test_no_prompt(use_cache):
    for new in (1, 5):
        with pytest.raises(ValueError, match='cannot forward 0 tokens'):
            make().generate(tokens(columns=0), new, use_cache=use_cache)


@each_cached
@pytest.mark.parametrize('use_cache', [True, False])
def test_logits_that_are_not_finite(options, use_cache):
    model = make(**options)
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = math.inf
    for temperature in (0, 1):
        with pytest.raises(FloatingPointError, match='not finite'):
            model.generate(tokens(columns=3), 5, temperature=temperature, use_cache=use_cache)


@pytest.mark.parametrize('use_cache', [True, False])
@pytest.mark.parametrize('scope', ['weight', 'causal'])
def test_values_that_are_not_finite(scope, use_cache):
    model = make(**svd(scope))
    change_values(model, lambda w, b, _: w.fill_(math.nan))
    with pytest.raises(torch.linalg.LinAlgError, match='non-finite'):
        model.generate(tokens(columns=6), 5, use_cache=use_cache)


def test_the_values_are_kept_in_the_form_of_their_scope():
    """The comparisons above would hold as well if everything were kept in full."""
    forms = {name: type(make(**options).new_cache(1, SMALL['block_size'])[0].values) for name, options in CACHED.items()}
    assert forms['weight'] is LowRankRows and forms['causal'] is CausalRows

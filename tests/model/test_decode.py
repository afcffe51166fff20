"""Generation with a cache gives what generation without a cache gives, with fewer bytes and
operations."""

import itertools
import math
from collections import Counter
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import (MLA_RANKS, RANKS, cached_logits, counted, error, make, mla, precision, svd,
                     tokens)
from lowrank.svd import METHODS
from model import GPT, SCOPES, GPTConfig

pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.filterwarnings('error:svd_scope')]
# SMALL: 2 layers, 2 heads of size 4, block_size 16
CACHED = {
    'no SVD': {},
    'weight': svd('weight'),
    'causal': svd('causal'),
    'factored': dict(layer_ranks=RANKS),
    'MLA': mla(7),
    'MLA, latents': mla([7, 2]),
    'MLA, weight': mla(**svd('weight', 2, 'randomized')),
    'MLA, causal': mla(**svd('causal', 2, 'standard')),
    'weight of q,k,v': svd('weight', svd_targets='q,k,v', svd_rank_k=1),
    'causal q,k,v': svd('causal', svd_targets='q,k,v', svd_rank_q=3),
    'MLA, causal q,k': mla(**svd('causal', svd_targets='q,k')),
    'shared keys': dict(n_kv_head=1, **svd('causal', svd_targets='k,v')),
    'narrow heads': dict(qk_head_dim=[3, 1], v_head_dim=[2, 4], n_kv_head=1),
}
each_cached = pytest.mark.parametrize('options', CACHED.values(), ids=CACHED)


# --------------------------------------------------------------------------------------------------
# logits


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    data=st.data(),
    scope=st.sampled_from([None, 'causal', 'weight']),
    method=st.sampled_from(METHODS),
    head_size=st.sampled_from([1, 2, 3, 4, 5, 8]),
    n_head=st.integers(1, 4),
    bias=st.booleans(),
    block_size=st.integers(1, 20),
    svd_block=st.integers(1, 22),
    rows=st.integers(1, 3),
    one_prompt=st.booleans(),
    latents=st.booleans(),
    targets=st.sampled_from(['v', 'k', 'q', 'q,k', 'k,v', 'q,k,v']),
    seed=st.integers(0, 999),
)
def test_cached_logits_are_the_uncached_ones(data, scope, method, head_size, n_head, bias,
                                             block_size, svd_block, rows, one_prompt, latents,
                                             targets, seed):
    """Cached logits equal uncached ones for random models, prompts and cache sizes. 'randomized' is
    left out for latents, because a latent narrower than the rank leaves columns of the basis that
    are only rounding."""
    width, T = n_head * head_size, data.draw(st.integers(1, block_size))
    prompt, room = data.draw(st.integers(1, T)), data.draw(st.integers(T, block_size))
    dims, options = st.lists(st.integers(1, head_size), min_size=2, max_size=2), {}
    if scope:
        rank = st.integers(1, head_size + 1)
        options = svd(scope, data.draw(rank), method, svd_block=svd_block, svd_targets=targets,
                      svd_rank_q=data.draw(rank), svd_rank_k=data.draw(st.none() | rank))
    if latents and method != 'randomized':
        options |= mla(data.draw(st.integers(1, width)))
    else:
        divisors = [n for n in range(1, n_head + 1) if n_head % n == 0]
        options['n_kv_head'] = data.draw(st.sampled_from(divisors))
        if not scope:
            options |= dict(qk_head_dim=data.draw(dims), v_head_dim=data.draw(st.none() | dims))
    model = make(seed, n_embd=width, n_head=n_head, bias=bias, block_size=block_size, **options)
    idx = tokens(rows, T, seed)
    idx[:, :prompt] = idx[:1, :prompt] if one_prompt else idx[:, :prompt]
    actual = cached_logits(model, idx, prompt, one_prompt, room)
    expected = model(idx, idx)[0].detach()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9 * expected.abs().max().item())


@pytest.mark.parametrize('n_kv_head', [1, 2])
@pytest.mark.parametrize('scope', [None, *SCOPES])
def test_shared_heads_equal_repeated_heads(scope, n_kv_head):
    """A model with shared key/value heads has the logits of an ordinary model in which these heads
    are repeated, and n_kv_head / n_head of the bytes of its cache."""
    cut = svd(scope, 2, 'standard', svd_targets='q,k,v') if scope else {}
    model = make(n_head=4, n_embd=16, n_kv_head=n_kv_head, **cut)
    ordinary, state = make(n_head=4, n_embd=16, **cut), model.state_dict()
    for i, block in enumerate(model.transformer.h):
        for kind in ('weight', 'bias'):
            parts = block.attn.c_attn.parts(getattr(block.attn.c_attn, kind))
            heads = [part.unflatten(0, (-1, 4)) for part in parts.values()]     # (heads, hs, ...)
            state[f'transformer.h.{i}.attn.c_attn.{kind}'] = torch.cat(
                [part.repeat_interleave(4 // len(part), dim=0).flatten(0, 1) for part in heads])
    ordinary.load_state_dict(state)
    idx = tokens(3)
    expected = ordinary(idx, idx)[0]
    bar = 1e-12 * expected.abs().max()
    assert (model(idx, idx)[0] - expected).abs().max() < bar
    if scope != 'sequence':
        assert (cached_logits(model, idx, 5) - expected).abs().max() < bar
    if scope is None:
        assert 4 * model.kv_cache_bytes(3, 16) == n_kv_head * ordinary.kv_cache_bytes(3, 16)


@pytest.mark.any_device
@each_cached
def test_a_cache_gives_logits_and_loss_without_gradients(device, options):
    """With a cache the model returns the logits and the loss of a pass without one, for prompts of
    any length, and no tensor requires gradients."""
    dtype, bar = precision(device)
    model, idx, targets = (
        make(dtype=dtype, **options).to(device),
        tokens(3).to(device),
        tokens(3, seed=1).to(device),
    )
    expected, loss = model(idx, targets)
    for prompt in (1, 4, 5, 15, 16):
        cache = model.new_cache(3, 16)
        actual = model(idx[:, :prompt], targets[:, :prompt], cache=cache)
        torch.testing.assert_close(actual, model(idx[:, :prompt], targets[:, :prompt]), rtol=bar,
                                   atol=bar)
        logits = [actual[0], *(model(idx[:, t : t + 1], cache=cache)[0] for t in range(prompt, 16))]
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=bar, atol=bar)
        assert loss.requires_grad and not any(x.requires_grad for x in (actual[1], *logits))
    # one prompt for three rows
    assert model(idx[:1, :4], cache=model.new_cache(3, 16))[0].shape == (1, 1, 11)


@each_cached
@torch.no_grad()
def test_with_a_cache_lower_precision_is_as_near_to_float64(options):
    """In half precision and under autocast a cache at most quadruples the distance to the float64
    logits. It grows because a cache rounds the rows it stores and sums are taken in another
    order."""
    idx = tokens(4)
    for dtype, cast in (
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.bfloat16),
    ):
        model = make(dtype=dtype, **options)
        truth, eps = deepcopy(model).double()(idx, idx)[0], torch.finfo(dtype).eps
        with torch.autocast('cpu', cast, enabled=bool(cast)):
            uncached, cached = model(idx, idx)[0], cached_logits(model, idx, 5)
        assert cached.dtype == uncached.dtype
        # float64 stays float64 under autocast
        bar = 1e6 * eps if dtype == torch.float64 else 4 * (uncached -
                                                            truth).norm() / truth.norm() + 4 * eps
        assert (cached - truth).norm() <= bar * truth.norm()


@pytest.mark.parametrize(
    'options',
    [
        {},
        svd('weight', 16, 'standard'),
        svd('causal', 16),
        mla(48, **svd('causal', 16, 'standard', bias=False)),
    ],
    ids=str,
)
def test_cached_logits_of_heads_of_gpt2(options):
    """Cached logits equal uncached ones for heads as in GPT-2: size 64, rank 16, 200 tokens, causal
    blocks of 32."""
    model = make(1, n_embd=128, block_size=200, vocab_size=64, **{'svd_block': 32, **options})
    assert error(model, torch.randint(64, (2, 200), generator=torch.Generator().manual_seed(2)),
                 70) <= 1e-9


@pytest.mark.parametrize('latents', [{}, mla(20)], ids=['dense', 'MLA'])
def test_randomized_starts_from_the_same_basis_with_a_cache(latents):
    """With 'randomized', cached logits equal uncached ones, from a cold start and from the basis
    that a training step left."""
    model, idx = make(1, n_embd=32, block_size=64, **svd('causal', 5, 'randomized'),
                      **latents), tokens(2, 64)
    cold = model(idx, idx)
    assert max(error(model, idx, prompt) for prompt in (1, 20)) <= 1e-9
    optimizer = model.configure_optimizers(0, 0.0, (0.9, 0.95), 'cpu')
    model.train()(idx, idx)[1].backward()
    optimizer.step()
    model.eval()
    assert not torch.equal(model(idx, idx)[0], cold[0]) and max(
        error(model, idx, prompt) for prompt in (1, 4, 20, 63)
    ) <= 1e-9


# --------------------------------------------------------------------------------------------------
# special value projections


@torch.no_grad()
def change_values(model, change):
    """Call change(weight (nh, hs, C), bias (nh, hs), c_proj) for every value projection, which it
    edits in place."""
    C, nh = model.config.n_embd, model.config.n_head
    for block in model.transformer.h:
        change(
            block.attn.c_attn.weight[2 * C :].unflatten(0, (nh, -1)),
            block.attn.c_attn.bias[2 * C :].unflatten(0, (nh, -1)),
            block.attn.c_proj.weight,
        )


@pytest.mark.parametrize('scope', ['weight', 'causal'])
@pytest.mark.parametrize('method, rank', [('standard', 3), ('gram', 2), ('randomized', 2)])
def test_value_weights_of_rank_one_and_zero_are_not_changed(scope, method, rank):
    """Value weights of rank one and zero are not changed by an SVD of a higher rank, with and
    without a cache."""
    plain, cut, idx = make(), make(**svd(scope, rank, method)), tokens()
    for left in (1, 0):
        for model in (plain, cut):
            change_values(model, lambda w, b, _: w.copy_(left * w[:, :, :1] * w[:, :1, :]))
        torch.testing.assert_close(cut(idx, idx)[0], plain(idx, idx)[0], rtol=0, atol=1e-9)
        assert error(cut, idx, 3) <= 1e-9


@pytest.mark.parametrize('method, n_head', [('standard', 1), ('gram', 2), ('randomized', 4)])
def test_a_cut_that_is_not_unique_is_that_of_training(method, n_head):
    """Decoding uses the basis of training even if all singular values are equal and the basis is
    not unique. Muon drives weights towards such spectra. Another basis would give an error of about
    1."""
    model = make(dtype=torch.float32, n_embd=16, n_head=n_head, **svd('weight', 8 // n_head,
                                                                      method))
    change_values(model, lambda w, b, _: w.copy_(torch.linalg.qr(w.mT)[0].mT))
    assert error(model, tokens(), 3) <= 1e-3


@pytest.mark.parametrize(
    'scope, method, dtype, scale',
    [
        ('weight', 'gram', torch.float32, 1e-6),
        ('weight', 'standard', torch.float64, 1e4),
        ('causal', 'randomized', torch.float32, 1e4),
        ('causal', 'gram', torch.float64, 1e-6),
        ('causal', 'standard', torch.float32, 1e-6),
        ('weight', 'randomized', torch.float32, 1e4),
    ],
)
def test_values_of_other_sizes(scope, method, dtype, scale):
    """Values 1e-6 or 1e4 times as large give the same logits if c_proj reverses the scale, with and
    without a cache."""
    model, idx = make(dtype=dtype, **svd(scope, 2, method)), tokens()
    before, bar = model(idx, idx)[0].detach(), 1e4 * torch.finfo(dtype).eps
    change_values(model, lambda w, b, c_proj: (w.mul_(scale), b.mul_(scale), c_proj.div_(scale)))
    assert error(model, idx, 3) <= bar
    torch.testing.assert_close(cached_logits(model, idx, 3), before, rtol=bar, atol=bar)


# --------------------------------------------------------------------------------------------------
# input that does not fit a cache


@each_cached
@torch.no_grad()
def test_what_does_not_fit_a_cache_is_refused_and_changes_nothing(options):
    """Input that does not fit raises a ValueError and leaves the cache unchanged. A prompt comes
    first, then one token at a time, up to the size of the cache, here 12. block_size is 16."""
    model, idx = make(**options), tokens(3, 20)
    cache, expected = model.new_cache(3, 12), model(idx[:, :12], idx[:, :12])[0]
    for t in (0, *range(4, 13)):
        wrong = {
            0: [0, 17, 13],
            4: [2, 13],
            12: [1, 5],
        }
        for columns in wrong.get(t, []):
            with pytest.raises(ValueError, match=rf'\b({columns}|{t + columns}) tokens'):
                model(idx[:, :columns], cache=cache)
        if t < 12:
            logits = model(idx[:, t : max(t + 1, 4)], cache=cache)[0]
            torch.testing.assert_close(logits[:, 0], expected[:, max(t, 3)], rtol=0, atol=1e-9)


@pytest.mark.parametrize('latents', [{}, mla()], ids=['dense', 'MLA'])
def test_values_that_later_tokens_change_have_no_cache(latents):
    """In 'sequence' scope `new_cache` raises a ValueError, because later tokens change earlier
    values."""
    with pytest.raises(ValueError, match='^svd_scope='):
        make(**svd('sequence'), **latents).new_cache(2, 16)


# --------------------------------------------------------------------------------------------------
# bytes


def bytes_held(cache, scope):
    """Return the bytes of all storages that a cache refers to, found by walking it. Weights of the
    model do not count. In 'weight' scope the basis is such a weight."""
    weights, storages = ('bias', 'down_proj', 'weight', *['basis'] * (scope == 'weight')), {}

    def walk(x):
        if isinstance(x, torch.Tensor):
            storages[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        for part in (
            x
            if isinstance(x, (list, tuple))
            else [v for k, v in getattr(x, '__dict__', {}).items() if k not in weights]):
            walk(part)

    walk(cache)
    return sum(storages.values())


def bytes_by_formula(c, T, each):
    """Return the bytes of the caches of both layers for one sequence, with `each` bytes per value.
    Gram matrices are float64, or float32 in half precision."""
    hs, kv, total = c.head_size, c.n_kv_head or c.n_head, 0
    for layer, name in itertools.product((0, 1), 'qkv'):
        heads = c.n_head if name == 'q' else kv
        widths = c.v_head_dim if name == 'v' else c.qk_head_dim
        rank, width = c.svd_ranks.get(name), widths[layer] if widths else hs
        starts = [c.svd_block * 2 ** i for i in range(20)
                  if rank < c.svd_block * 2 ** i < T] if rank and c.svd_scope == 'causal' else []
        rows = T * (rank if rank and c.svd_scope == 'weight' else width)
        if starts:
            rows = starts[0] * hs + (T - starts[0]) * rank
            total += heads * len(starts) * rank * hs * each         # bases
            if name == 'q' or not c.use_mla:
                total += heads * hs * hs * (4 if each == 2 else 8)  # Gram matrices
        if name != 'q' and not c.use_mla:
            total += heads * rows * each
    return total + (sum(c.latent_dims) * T * each if c.use_mla else 0)


@pytest.mark.parametrize('scope', [None, 'weight', 'causal'])
@pytest.mark.parametrize(
    'dtype, cast, each',
    [
        (torch.float32, False, 4),
        (torch.float64, False, 8),
        (torch.bfloat16, False, 2),
        (torch.float32, True, 2),
    ],
    ids=['float32', 'float64', 'bfloat16', 'autocast'],
)
def test_bytes_of_the_cache_are_those_it_allocates(scope, dtype, cast, each):
    """`kv_cache_bytes` equals a formula written by hand and the bytes that the cache allocates,
    before and after it is filled."""
    for head_size, rank, block, T, B, options in (
        (5, 2, 4, 16, 3, {}),
        (4, 3, 1, 16, 1, dict(svd_targets='k,v')),
        (5, 2, 4, 16, 3, mla(2 if scope else [3, 1])),
        (2, 1, 1, 1, 4, dict(n_kv_head=1)),
        (5, 2, 20, 16, 1, mla(6)),
        (8, 2, 2, 2, 1, dict(svd_targets='q,k', svd_rank_q=1)),
        (4, 3, 1, 16, 2, mla(12, svd_targets='q,k,v', svd_rank_k=1)),
        (4, 2, 2, 9, 1, mla(3)),
        (4, 1, 3, 7, 2, dict(n_kv_head=1, svd_targets='q,k,v', svd_rank_k=2)),
        (4, 1, 3, 7, 2, {} if scope else dict(qk_head_dim=[1, 3], v_head_dim=[4, 2], n_kv_head=1)),
    ):
        model = make(dtype=dtype, n_embd=3 * head_size, n_head=3, bias=rank == 2,
                     **options | (svd(scope, rank, svd_block=block) if scope else {}))
        expected = B * bytes_by_formula(model.config, T, each)
        with torch.autocast('cpu', torch.bfloat16, enabled=cast), torch.no_grad():
            cache, idx = model.new_cache(B, T), tokens(B, T)
            assert model.kv_cache_bytes(B, T) == expected == bytes_held(cache, scope)
            for t in range(T):
                model(idx[:, t : t + 1], cache=cache)
            assert bytes_held(cache, scope) == expected


def test_the_cache_shrinks_with_keys_and_values():
    """With rank 16 of 64 for keys and values in 'weight' scope, the whole cache is 4 times smaller.
    With 2 of 12 key/value heads it is 6 times smaller."""
    def cache_bytes(**options):
        return GPT(GPTConfig(n_layer=2, vocab_size=64, **options)).kv_cache_bytes(1, 1024)
    whole = 2 * 2 * 768 * 1024 * 4
    assert cache_bytes() == whole
    assert cache_bytes(**svd('weight', 16, svd_targets='k,v')) == whole / 4
    assert cache_bytes(n_kv_head=2) == whole / 6


def test_bytes_are_counted_without_being_allocated():
    """`kv_cache_bytes` allocates nothing and counts at most block_size tokens. 'sequence' scope has
    no cache if it truncates."""
    model, sequence = make(), svd('sequence')
    full = model.kv_cache_bytes(1, 16)
    assert model.kv_cache_bytes(
        10 ** 12, 99) == 10 ** 12 * full and make(**sequence).kv_cache_bytes(2, 16) == 0
    assert make(**sequence | dict(svd_rank=4)).kv_cache_bytes(1, 16) == full
    assert make(**sequence | dict(use_svd=False)).kv_cache_bytes(1, 16) == full


# --------------------------------------------------------------------------------------------------
# generation


@torch.no_grad()
def lively(**options):
    """Return a model whose likeliest token changes with the prompt and the position. In a model of
    `make` it hardly changes."""
    model = make(**options)
    # untie the head from the embedding
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.transformer.ln_f.bias.zero_()
    model.transformer.wpe.weight.mul_(4)
    return model


@pytest.mark.any_device
@each_cached
def test_the_cache_changes_no_token(device, options):
    """Generation gives the same tokens with and without a cache, up to block_size and beyond. A
    prompt expanded to several rows gives the tokens of a repeated prompt."""
    dtype, _ = precision(device)
    model = lively(dtype=dtype, **options).to(device)
    draws = [
        dict(temperature=0),
        dict(top_p=0.8),
        dict(temperature=0.7, top_k=5),
        dict(temperature=1.5)]
    for i, (columns, new) in enumerate([(1, 16), (3, 0), (20, 3), (5, 14), (15, 2), (4, 1)]):
        idx, draw = tokens(3, columns, seed=i).to(device), dict(seed=2) | draws[i % 4]
        for prompt in (idx, idx[:1].expand(3, -1)):
            expected = model.generate(prompt.contiguous(), new, use_cache=False, **draw)
            assert expected.shape == (3, columns + new) and torch.equal(
                expected[:, :columns], prompt)
            assert torch.equal(model.generate(prompt, new, **draw), expected)
            if prompt is not idx and new < 4:
                assert torch.equal(model.generate(prompt, new, use_cache=False, **draw), expected)
    assert len(model.generate(idx[:1].expand(64, -1), 5, seed=2).unique(dim=0)) > 1


@pytest.mark.parametrize('options', [{}, svd('sequence')], ids=str)
def test_a_seed_is_of_a_generator_of_its_own(options):
    """A seed makes generation repeatable and leaves torch's global generator unchanged. Without a
    seed the tokens come from the global generator."""
    model, idx = make(**options), tokens(columns=4)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    a, again, b = (model.generate(idx, 12, seed=seed, use_cache=not options) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(
        a, again) and not torch.equal(a, b)
    assert torch.equal(model.generate(idx, 12, use_cache=not options), a)


def test_in_training_mode_nothing_is_cached():
    """In training mode nothing is cached, because dropout differs between passes and between the
    rows of an expanded prompt."""
    model = make(dropout=0.5).train()
    found = counts(model)
    model.generate(tokens(1, 3).expand(4, -1), 3, temperature=0)
    assert found['layer 0'] == 4 * (3 + 4 + 5) and model.training
    first = [model.generate(tokens(1, 3).expand(64, -1), 1, temperature=0)[:, -1] for _ in range(2)]
    assert len(first[0].unique()) > 1 and not torch.equal(*first)


# --------------------------------------------------------------------------------------------------
# amount of computation


def counts(model):
    """Return a dict that counts the tokens, times rows, that each part of the model computes."""
    found, (first, last) = Counter(), model.transformer.h
    for name, part in {
        'layer 0': first.ln_1,
        'layer 1': last.ln_1,
        'mlp 0': first.mlp,
        'mlp 1': last.mlp,
        'head': model.lm_head,
    }.items():
        part.register_forward_pre_hook(
            lambda _, args, name=name: found.update({name: args[0].shape[:2].numel()}))
    return found


@pytest.mark.parametrize(
    'columns, new, use_cache, expand, layers, last',
    [
        (5, 11, True, False, 3 * 15, 3 * 11),  # the last of 16 tokens is not fed back
        (5, 11, False, False, 3 * sum(range(5, 16)), 3 * 11),
        (5, 11, True, True, 5 + 3 * 10, 1 + 3 * 10),
        (16, 3, True, False, 3 * 3 * 16, 3 * 3),
        (14, 5, True, False, 3 * (16 + 2 * 16), 3 * 5),
        (20, 1, True, False, 3 * 16, 3),
        (20, 3, True, False, 3 * 3 * 16, 3 * 3),
        (7, 1, True, True, 7, 1),
    ],
)
def test_every_token_is_computed_once(columns, new, use_cache, expand, layers, last):
    """With a cache each token passes through the layers once, up to block_size. Beyond it all
    positions shift, so the window is computed again for each token. The MLP of the last layer and
    the head compute one position per pass. One cache is made for all tokens that pass, and none if
    the prompt is longer than block_size."""
    for options in CACHED.values():
        model, prompts, asked = make(**options), tokens(3, columns), []
        found, new_cache = counts(model), model.new_cache
        model.new_cache = lambda *args: asked.append(args) or new_cache(*args)
        prompts = prompts[:1].expand(3, -1) if expand else prompts
        model.generate(prompts, new, 1.0, None, use_cache)  # the order of nanoGPT, then use_cache
        assert found == {
            'layer 0': layers, 'layer 1': layers, 'mlp 0': layers, 'mlp 1': last, 'head': last}
        assert asked == ([(3, min(16, columns + new -
                                  1))] if use_cache and new > 1 and columns <= 16 else [])


def test_sequence_scope_warns_and_recomputes():
    """'sequence' scope warns and computes the prefix again for every token. There is no warning
    with use_cache=False or if the SVD truncates nothing. `pytestmark` turns an unexpected warning
    into an error."""
    model, idx = make(**svd('sequence')), tokens(columns=3)
    found = counts(model)
    with pytest.warns(UserWarning, match='svd_scope'):
        model.generate(idx, 5, temperature=0)
    assert found['layer 0'] == 2 * (3 + 4 + 5 + 6 + 7)
    model.generate(idx, 5, use_cache=False)
    make(**svd('sequence', 2, block_size=2)).generate(idx, 5)


@pytest.mark.parametrize(
    'options', [{}, mla(), mla(8), dict(layer_ranks=RANKS), mla(layer_ranks=MLA_RANKS)], ids=str
)
def test_operations_are_those_that_torch_counts(options):
    """`flops_per_token` equals torch's FLOP counter for a prompt, with and without a cache, and for
    the next token, where latents are absorbed. Torch also counts attention to later tokens, which
    is masked. So it counts T^2 pairs instead of T (T + 1) / 2, except in the last layer, which has
    a single query."""
    for layers, heads, width, T in ((1, 2, 8, 16), (2, 2, 8, 11), (3, 4, 32, 40), (2, 1, 12, 1)):
        shape = dict(n_layer=2 if 'layer_ranks' in options else layers, n_head=heads, n_embd=width,
                     block_size=64)
        model, idx = make(dtype=torch.float32, **shape, **options), tokens(2, T + 1)
        expected = 2 * (T * model.flops_per_token(T) + (shape['n_layer'] - 1) * 4 * width * T *
                        (T - 1) // 2)
        cache = model.new_cache(2, T + 1)
        assert counted(lambda: model(idx[:, :T])) == pytest.approx(expected, rel=1e-12)
        assert counted(lambda: model(idx[:, :T], cache=cache)) == pytest.approx(expected, rel=1e-12)
        assert counted(lambda: model(idx[:, T:], cache=cache)) == 2 * model.flops_per_token(
            T, decode=True)


# --------------------------------------------------------------------------------------------------
# streams and errors


@each_cached
def test_a_stream_yields_tokens_as_they_are_drawn_and_can_be_abandoned(options):
    """A stream yields each token as soon as it is drawn, makes no graph, and can be closed early.
    The tokens are those of `generate`."""
    model, idx = make(**options), tokens(3, 5)
    expected = model.generate(idx, 20, seed=2)
    found, stream, drawn, graphs = counts(model), model.stream(idx, 20, seed=2), [], []
    model.lm_head.register_forward_hook(lambda _, args, logits: graphs.append(logits.requires_grad))
    for n, new in zip(range(1, 14), stream):
        assert new.shape == (3, 1) and new.dtype == torch.int64 and found['head'] == 3 * n
        assert torch.is_grad_enabled()  # no_grad does not leak to the caller
        drawn.append(new)
    stream.close()
    # later steps do not overwrite tokens that were already yielded
    assert torch.equal(torch.cat(drawn, dim=1), expected[:, 5:18])
    assert torch.is_grad_enabled() and not any(graphs)
    assert torch.equal(model.generate(idx, 20, seed=2), expected)


@pytest.mark.parametrize(
    'options', [dict(max_new_tokens=-1), dict(temperature=-1.0), dict(top_k=0), dict(top_p=0.0)]
)
def test_options_that_cannot_be(options):
    """Invalid sampling options and an empty prompt raise a ValueError that names the option."""
    with pytest.raises(ValueError, match=f'^{next(iter(options))}='):
        make().generate(tokens(), **{'max_new_tokens': 2, **options})
    with pytest.raises(ValueError, match='0 tokens'):
        make().generate(tokens(columns=0), options.get('top_k', 1) + 1)


@pytest.mark.parametrize('use_cache', [True, False])
@pytest.mark.parametrize('options', [svd('causal'), svd('weight'), mla(**svd('causal'))], ids=str)
def test_logits_and_values_that_are_not_finite_raise(options, use_cache):
    """NaN and inf in the logits raise FloatingPointError, and in the values
    torch.linalg.LinAlgError."""
    for temperature in (0, 1):
        model = make(**options)
        torch.nn.init.constant_(model.transformer.ln_f.weight, math.inf)
        with pytest.raises(FloatingPointError):
            model.generate(tokens(columns=6), 5, temperature=temperature, use_cache=use_cache)
    c_attn = model.transformer.h[1].attn.c_attn
    torch.nn.init.constant_(c_attn.v_up.weight if model.config.use_mla else c_attn.weight, math.nan)
    with pytest.raises(torch.linalg.LinAlgError, match='NaN or infinite'):
        model.generate(tokens(columns=6), 5, use_cache=use_cache)


@pytest.mark.parametrize('latents', [{}, mla(3)], ids=['dense', 'MLA'])
def test_a_context_cropped_to_the_rank_is_not_truncated_and_cached(latents):
    """In 'sequence' scope a model cropped to a context no longer than the rank truncates nothing,
    so it has a cache that changes no token."""
    model = make(**svd('sequence', 3, 'gram'), **latents)
    model.crop_block_size(3)
    texts = [model.generate(tokens(1, 1), 5, top_k=1, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*texts) and model.kv_cache_bytes(1, 3) > 0

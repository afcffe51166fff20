"""model.py against a GPT written by hand and against nanoGPT's conventions, and the promises of
each SVD scope."""

import math

import pytest
import torch

from helpers import (
    MLA_RANKS,
    RANKS,
    SMALL,
    checkpoint_of,
    copy_of,
    cut_by_hand,
    equal,
    leak,
    logits_by_hand,
    loss_by_hand,
    make,
    mla,
    precision,
    svd,
    tokens,
    whole_truth,
)
from lowrank.svd import EXACT_METHODS, METHODS
from model import GPT, SCOPES, GPTConfig

pytestmark = pytest.mark.usefixtures('one_thread')


# --------------------------------------------------------------------------------------------------
# the model by hand


def tanh_gelu_by_hand(x):
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def assert_same_as_by_hand(device, options, **by_hand):
    """Check the logits, the loss and the gradient of every parameter."""
    dtype, bar = precision(device)
    model, idx, targets = (
        make(dtype=dtype, **options).to(device),
        tokens().to(device),
        tokens(seed=1).to(device),
    )
    targets[0, :5] = -1  # ignored
    state = copy_of(model)
    logits, loss = model(idx, targets)
    expected = logits_by_hand(state, idx, **by_hand)
    torch.testing.assert_close(logits, expected, rtol=0, atol=10 * bar)
    torch.testing.assert_close(loss, loss_by_hand(expected, targets), rtol=0, atol=10 * bar)
    loss.backward()
    loss_by_hand(expected, targets).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            p.grad, state[name].grad, rtol=1e4 * bar, atol=10 * bar, msg=lambda m: f'{name}: {m}')
    last, no_loss = model(idx)  # without targets, only the last position
    assert no_loss is None
    torch.testing.assert_close(last, logits[:, -1:], rtol=0, atol=10 * bar)


@pytest.mark.any_device
@pytest.mark.parametrize(
    'options, by_hand',
    [
        ({}, {}),
        (dict(bias=False, gelu='tanh'), dict(gelu=tanh_gelu_by_hand)),
        (mla(1), {}),
        (mla(3, bias=False), {}),
        (mla(8, bias=False), {}),
        (dict(n_kv_head=1), dict(n_kv_head=1)),
        (dict(n_head=4, n_kv_head=2, bias=False), dict(n_head=4, n_kv_head=2)),
        (dict(qk_head_dim=[3, 2], v_head_dim=[1, 4]), dict(dims=[(3, 1), (2, 4)])),
        (dict(v_head_dim=[2, 3], n_kv_head=1), dict(dims=[(4, 2), (4, 3)], n_kv_head=1)),
    ],
)
def test_it_is_a_gpt_by_hand(device, options, by_hand):
    assert_same_as_by_hand(device, options, **by_hand)


@pytest.mark.any_device
@pytest.mark.parametrize(
    'basis_grad, kind, targets',
    [(True, {}, 'v'), (False, dict(bias=False), 'v'), (True, mla(5), 'v'), (True, {}, 'q,k,v'),
     (True, dict(n_kv_head=1), 'k'), (False, mla(5), 'q,k')],
    ids=['dense', 'constant basis', 'MLA', 'q,k,v', 'shared keys', 'MLA, q,k'],
)
@pytest.mark.parametrize('scope', SCOPES)
@pytest.mark.parametrize('method', EXACT_METHODS)
def test_with_an_svd_it_is_a_gpt_by_hand_with_truncated_values(
    device, scope, method, basis_grad, kind, targets
):
    """The SVD replaces V, W_v or U_v of each head by U_k S_k V_k^T, or queries and keys. The
    reference is torch.linalg.svd in a GPT written by hand."""
    options = svd(scope, 2, method, svd_basis_grad=basis_grad, svd_targets=targets, **kind)
    assert_same_as_by_hand(device, options, n_kv_head=kind.get('n_kv_head'),
                           **cut_by_hand(scope, 2, basis_grad, targets))


def test_the_svd_of_v_is_a_method_of_attention():
    """Attention has public methods that truncate V to the configured rank or to a given one."""
    attention, v = make(**svd('sequence', 2)).transformer.h[0].attn, torch.randn(2, 2, 16,
                                                                                 4).double()
    assert torch.linalg.matrix_rank(attention.apply_svd_to_v(v)).eq(2).all()
    torch.testing.assert_close(attention.apply_svd_to_v(v),
                               attention._standard_svd_reconstruction(v))
    assert torch.linalg.matrix_rank(attention._standard_svd_reconstruction(v, 3)).eq(3).all()


@pytest.mark.parametrize('scope', SCOPES)
@pytest.mark.parametrize(
    'latent, options',
    [(None, [(None, 'standard'), (4, 'gram'), (9, 'randomized')]),
     (3, [(None, 'gram'), (4, 'standard')])],
)
def test_full_rank_is_the_baseline_to_the_bit(scope, latent, options):
    """Full rank, rank None and use_svd=False are bit-identical to the model without SVD. In
    'weight' scope the full rank is the width of the latent if that is smaller than a head."""
    kind, idx = mla(latent) if latent else {}, tokens()
    rank = 3 if latent and scope == 'weight' else 4
    baseline = make(**kind)
    baseline(idx, idx)[1].backward()
    for cut in (
        *(svd(scope, *choice) for choice in options),
        svd(scope, rank),
        svd(scope, 1) | dict(use_svd=False),
    ):
        model = make(**cut, **kind)
        model(idx, idx)[1].backward()
        assert not model.config.svd_truncates and not model.config.is_noncausal
        assert torch.equal(model(idx, idx)[0], baseline(idx, idx)[0])
        for p, q in zip(model.parameters(), baseline.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
    assert make(**svd(scope, rank - 1), **kind).config.svd_truncates
    assert not make(**svd('sequence', 2, block_size=2), **kind).config.is_noncausal


@pytest.mark.parametrize(
    'method, scope, latent',
    [
        ('standard', 'sequence', 1),
        ('gram', 'causal', 1),
        ('randomized', 'weight', 1),
        ('gram', 'sequence', 2),
        ('randomized', 'causal', 2),
        ('randomized', 'sequence', 2),
        ('standard', 'weight', 1),
    ],
)
def test_a_rank_that_latents_do_not_reach_changes_nothing(method, scope, latent):
    """An SVD changes nothing if the latents are no wider than the rank. V then has at most that
    rank, and all discarded singular values are zero."""
    plain, idx = make(**mla(latent, bias=False)), tokens()
    cut = make(**mla(latent, bias=False, **svd(scope, 2, method)))
    for model in (plain, cut):
        model(idx, idx)[1].backward()
    torch.testing.assert_close(cut(idx, idx)[0], plain(idx, idx)[0], rtol=0, atol=1e-9)
    for p, q in zip(cut.parameters(), plain.parameters(), strict=True):
        # 'randomized' differentiates one iteration, whose rounding leaves a small gradient
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    'context, rank, block, truncates',
    [
        (32, 2, 32, False),
        (33, 2, 32, True),
        (64, 40, 32, False),
        (65, 40, 32, True),
        (64, 32, 32, False),
        (64, 31, 32, True),
        (256, 130, 32, False),
        (3, 2, 1, False),
        (4, 1, 2, True),
    ],
)
def test_causal_scope_truncates_where_a_basis_is_due(context, rank, block, truncates):
    """'causal' scope truncates only if the context is long enough for a basis of more rows than the
    rank, and `svd_truncates` says so."""
    shape = dict(block_size=context, n_head=1, n_embd=rank + 2)
    idx, cut = tokens(1, context), make(**shape | svd('causal', rank, svd_block=block))
    assert torch.equal(cut(idx, idx)[0],
                       make(**shape)(idx, idx)[0]) != truncates == cut.config.svd_truncates


@pytest.mark.parametrize('latents', [False, True], ids=['dense', 'MLA'])
@pytest.mark.parametrize('method', METHODS)
def test_only_sequence_scope_sees_the_future(method, latents):
    """Changing a token changes earlier logits in 'sequence' scope only, and `is_noncausal` says
    so."""
    for scope in (None, *SCOPES):
        model = make(**(svd(scope, 2, method) if scope else {}), **(mla() if latents else {}))
        changed = leak(model)
        assert changed > 1e-3 if scope == 'sequence' else changed <= 1e-9
        assert model.config.is_noncausal == (scope == 'sequence')


# --------------------------------------------------------------------------------------------------
# parameters


def test_parameter_names_shapes_and_order_are_those_of_nanogpt():
    """Names, shapes and order of parameters are nanoGPT's, and the head is tied to the token
    embedding. An SVD adds nothing to the state dict and does not change the initial weights."""
    block = [
        ('ln_1.weight', (8,)),
        ('ln_1.bias', (8,)),
        ('attn.c_attn.weight', (24, 8)),
        ('attn.c_attn.bias', (24,)),
        ('attn.c_proj.weight', (8, 8)),
        ('attn.c_proj.bias', (8,)),
        ('ln_2.weight', (8,)),
        ('ln_2.bias', (8,)),
        ('mlp.c_fc.weight', (32, 8)),
        ('mlp.c_fc.bias', (32,)),
        ('mlp.c_proj.weight', (8, 32)),
        ('mlp.c_proj.bias', (8,)),
    ]
    expected = [
        ('transformer.wte.weight', (11, 8)),
        ('transformer.wpe.weight', (16, 8)),
        *((f'transformer.h.0.{name}', shape) for name, shape in block),
        *((f'transformer.h.1.{name}', shape) for name, shape in block),
        ('transformer.ln_f.weight', (8,)),
        ('transformer.ln_f.bias', (8,)),
        ('lm_head.weight', (11, 8)),
    ]
    model, without = make(), make(bias=False)
    assert [(name, tuple(p.shape)) for name, p in model.state_dict().items()] == expected
    assert [*without.state_dict()] == [name for name, _ in expected if not name.endswith('bias')]
    assert model.lm_head.weight is model.transformer.wte.weight and 'lm_head.weight' not in dict(
        model.named_parameters())
    for options in (*(svd(scope, 2, 'randomized') for scope in SCOPES), dict(mla_latent_dim=3)):
        assert equal(make(**options).state_dict(), model.state_dict())
    assert not torch.equal(make(4).lm_head.weight, model.lm_head.weight)


def test_initial_weights_follow_gpt2():
    """Initial weights have the standard deviations of GPT-2: 0.02, and 0.02 / sqrt(2 n_layer) for
    projections to the residual stream."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=256, n_layer=2, n_head=2, n_embd=64))
    for name, p in model.named_parameters():
        if name.endswith('bias'):
            assert p.count_nonzero() == 0, name
        elif '.ln_' in name:
            assert (p == 1).all(), name
        else:
            std = 0.02 / math.sqrt(4) if name.endswith('c_proj.weight') else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05) and abs(
                p.mean().item()) < std / 10, name


@pytest.mark.parametrize('latent', [None, 8, 32])
def test_mimetic_initialization_attends_to_nearby_tokens(latent):
    """With weight_init='mimetic', queries are keys, and the last token attends more to the eight
    tokens before it than with GPT-2's initialization, which spreads attention evenly. GELU is not
    almost linear. All other weights are drawn as without it."""
    options = {} if latent is None else mla(latent)
    models = []
    for kind in ('gpt2', 'mimetic'):
        torch.manual_seed(0)
        models.append(GPT(GPTConfig(block_size=64, vocab_size=65, n_layer=2, n_head=4, n_embd=64,
                                    weight_init=kind, **options)))
    tokens, near = torch.randint(65, (1, 64)), []
    for t in (model.transformer for model in models):
        x = t.h[0].ln_1(t.wte(tokens) + t.wpe.weight)
        q, k, _ = t.h[0].attn.c_attn(x)                             # (1, nh, T, hs)
        near.append((q[:, :, -1:] @ k.mT / 16 ** .5).softmax(-1)[..., -8:].sum(-1).mean())
    assert torch.allclose(q, k, atol=1e-5)
    assert .11 < near[0] < .14 and near[1] > .16                    # evenly: 8 / 64
    assert 1.3 < t.h[1].mlp.c_fc(x).std() < 1.5                     # sqrt(2)
    for (name, p), other in zip(models[0].named_parameters(), models[1].parameters()):
        if not any(word in name for word in ('wpe', 'c_attn', 'c_fc')):
            assert torch.equal(p, other), name


@pytest.mark.parametrize('ranks', [(2, 2), (3, 2), (2, 3)])
def test_low_rank_queries_start_in_the_directions_of_keys(ranks):
    """With weight_init='mimetic', W_q = W_k also if both are low-rank. With different ranks
    W_q^T W_k is still symmetric and positive. Rows have the root mean square norm 0.5."""
    c = GPT(GPTConfig(**SMALL, weight_init='mimetic', layer_ranks={
        f'h.0.attn.c_attn.{name}': rank
        for name, rank in zip(('c_q', 'c_k'), ranks)})).transformer.h[0].attn.c_attn
    q, k = c.c_q.weight, c.c_k.weight
    product = q.mT @ k
    torch.testing.assert_close(product, product.mT)
    assert (torch.linalg.eigvalsh(product) > 1e-3).sum() == min(ranks)
    for weight in (q, k):
        assert weight.norm().item() / len(weight) ** 0.5 == pytest.approx(0.5)


@pytest.mark.parametrize('kv_heads', [None, 1])
def test_dense_queries_beside_low_rank_values_start_as_without_them(kv_heads):
    """W_q of each head equals W_k of its group, with orthogonal rows of norm 0.5."""
    c = GPT(GPTConfig(**SMALL, weight_init='mimetic', n_kv_head=kv_heads,
                      layer_ranks={'h.0.attn.c_attn.c_v': 2})).transformer.h[0].attn.c_attn
    q, k = c.head_weight('q'), c.head_weight('k')
    assert torch.equal(q, k.repeat_interleave(len(q) // len(k), dim=0))
    rows = k.flatten(0, 1)
    torch.testing.assert_close(rows @ rows.mT, 0.25 * torch.eye(len(rows)))


def test_number_of_parameters_and_mfu():
    """`get_num_params` and `estimate_mfu` match a count by hand with nanoGPT's formula."""
    model, a_block = make(), 2 * 16 + (24 * 8 + 24) + (8 * 8 + 8) + (32 * 8 + 32) + (8 * 32 + 8)
    assert model.get_num_params() == 11 * 8 + 2 * a_block + 16
    assert model.get_num_params(non_embedding=False) == 16 * 8 + model.get_num_params()
    # layers, heads, head size, tokens
    flops_per_token = 6 * model.get_num_params() + 12 * 2 * 2 * 4 * 16
    assert model.estimate_mfu(10, 0.5) == pytest.approx(flops_per_token * 16 * 10 / 0.5 / 312e12)
    assert model.estimate_mfu(10, 0.5, flops_promised=1e12) == pytest.approx(
        flops_per_token * 16 * 10 / 0.5 / 1e12)


def test_context_can_be_cropped_and_is_a_limit():
    """`crop_block_size` keeps the logits of shorter inputs, and inputs longer than block_size raise
    a ValueError."""
    model, idx = make(), tokens(columns=6)
    before = model(idx, idx)[0]
    for columns, limit in ((0, 16), (17, 16), (7, 6)):
        if limit == 6:
            model.crop_block_size(6)
        with pytest.raises(ValueError, match=f'{columns} tokens.*block_size={limit}'):
            model(tokens(columns=columns))
    assert model.config.block_size == 6 and model.transformer.wpe.weight.shape == (6, 8)
    assert torch.equal(model(idx, idx)[0], before) and model.transformer.wpe.weight.requires_grad


@pytest.mark.parametrize(
    'place',
    [
        'transformer.drop',
        'transformer.h.0.attn',
        'transformer.h.0.attn.resid_dropout',
        'transformer.h.0.mlp.dropout',
    ],
)
def test_dropout_acts_in_training_in_the_places_of_nanogpt(place):
    """Dropout in each of nanoGPT's places makes two training passes differ. 'attn' stands for the
    attention weights."""
    model, idx = make().train(), tokens()
    assert torch.equal(model(idx)[0], model(idx)[0])
    module, full = model.get_submodule(place), make(dropout=0.5)
    name = 'p' if isinstance(module, torch.nn.Dropout) else 'dropout'
    assert getattr(full.get_submodule(place), name) == 0.5 and torch.equal(
        full(idx)[0],
        model(idx)[0])
    setattr(module, name, 0.5)
    assert not torch.equal(model(idx)[0], model(idx)[0])


def test_each_target_has_its_energy_and_effective_rank():
    """`named_series` has the energy kept and the effective rank of each head of each target. The
    names of V have no letter, as in older runs."""
    model = make(**svd('weight', svd_targets='q,v', svd_rank_q=1, n_kv_head=1))
    found = model.named_series(tokens())
    heads = ['q.head0', 'q.head1', 'head0']
    assert found.keys() == {f'svd/block{i}.{head}/{name}' for i in (0, 1) for head in heads
                            for name in ('energy_kept', 'effective_rank')}
    x = model.transformer.h[0].ln_1(model.transformer.wte(tokens()) +
                                    model.transformer.wpe.weight[:16])
    attn = model.transformer.h[0].attn
    w, b = attn.c_attn.head_weight('q')[1], attn.c_attn.head_bias('q')[1]
    q, kept = x @ w.T + b, x @ whole_truth(w, 1).T + b
    share = 1 - (q - kept).square().sum((1, 2)) / q.square().sum((1, 2))
    assert found['svd/block0.q.head1/energy_kept'] == pytest.approx(share.mean().item())


# --------------------------------------------------------------------------------------------------
# optimizers


@pytest.mark.parametrize(
    'options, hidden',
    [
        ({}, 8),
        (dict(bias=False), 8),
        (mla(), 14),
        (dict(layer_ranks=RANKS), 19),
        (mla(layer_ranks=MLA_RANKS, bias=False), 17),
        (dict(n_kv_head=1, qk_head_dim=[3, 2]), 8),
    ],
    ids=str,
)
def test_optim_groups_hold_every_parameter_once(options, hidden):
    """The groups for Muon and for AdamW hold every trained parameter exactly once. Frozen
    parameters are in none."""
    model = make(**options)
    names = {id(p): name for name, p in model.named_parameters()}
    own = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu').param_groups
    assert sorted(names[id(p)] for group in own for p in group['params']) == sorted(names.values())
    groups = {
        kind: [names[id(p)]
               for p in group['params']]
        for kind, group in model.param_groups(0.1).items()}
    assert sorted(sum(groups.values(), [])) == sorted(names.values())
    assert groups['embedding'] == ['transformer.wte.weight', 'transformer.wpe.weight']
    assert all(
        name.startswith('transformer.h.') and name.endswith('weight') for name in groups['hidden'])
    assert len(groups['hidden']) == hidden and all(
        'ln_' in name or name.endswith('bias') for name in groups['vector'])
    assert [group['weight_decay'] for group in model.param_groups(0.1).values()] == [0.1, 0.1, 0]
    model.transformer.wpe.requires_grad_(False)
    assert [names[id(p)]
            for p in model.param_groups(0.1)['embedding']['params']] == ['transformer.wte.weight']


def test_configure_optimizers_groups_in_the_order_of_nanogpt():
    """AdamW gets matrices first and vectors second, both in the order of named_parameters, as in
    nanoGPT. Optimizer states are stored by position, so the order matters for checkpoints."""
    model = make()
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    decay, no_decay = optimizer.param_groups
    matrices = ['attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj']
    assert [names[id(p)] for p in decay['params']] == [
        'transformer.wte.weight',
        'transformer.wpe.weight',
        *(f'transformer.h.{i}.{name}.weight' for i in (0, 1) for name in matrices),
    ]
    assert [names[id(p)] for p in no_decay['params']] == [
        name for name, p in model.named_parameters() if p.dim() == 1]
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults['eps'] == 1e-8
    assert (decay['weight_decay'], no_decay['weight_decay']) == (0.1, 0)
    assert all(group['lr'] == 1e-3 and group['betas'] == (0.9, 0.95)
               for group in optimizer.param_groups)


# --------------------------------------------------------------------------------------------------
# generation


@torch.no_grad()
@pytest.mark.parametrize(
    'columns, options',
    [
        (1, {}),
        (3, dict(temperature=0.5)),
        (3, dict(temperature=3.0, top_k=4)),
        (3, dict(top_k=1)),
        (3, dict(top_k=99)),
        (14, dict(top_k=5)),  # grows beyond block_size = 16
        (20, {}),
    ],
)  # the prompt is longer than block_size
def test_generate_draws_the_tokens_of_nanogpt(columns, options):
    """With the same seed `generate` draws the tokens of nanoGPT's loop, written by hand, also
    beyond block_size."""
    model, idx = make(), tokens(columns=columns)
    torch.manual_seed(1)
    actual = model.generate(idx, 12, **options)
    torch.manual_seed(1)
    for _ in range(12):
        logits = logits_by_hand(model.state_dict(), idx[:, -16:])[:, -1] / options.get(
            'temperature', 1)
        threshold = logits.sort(descending=True).values[:, min(options.get('top_k', 11), 11) - 1]
        logits = logits.masked_fill(logits < threshold[:, None], -math.inf)
        idx = torch.cat((idx, torch.multinomial(logits.softmax(-1), 1)), dim=1)
    assert torch.equal(actual, idx)


# --------------------------------------------------------------------------------------------------
# configuration and checkpoints


@pytest.mark.parametrize(
    'field, overrides, hint',
    [
        ('block_size', dict(block_size=0), 'at least 1'),
        ('vocab_size', dict(vocab_size=-5), 'at least 1'),
        ('n_layer', dict(n_layer=0), 'at least 1'),
        ('n_head', dict(n_head=0), 'at least 1'),
        ('n_embd', dict(n_embd=0), 'at least 1'),
        ('n_embd', dict(n_embd=10, n_head=4), 'nearest: 8'),
        ('n_embd', dict(n_embd=3, n_head=8), 'nearest: 8'),
        ('dropout', dict(dropout=1.0), 'below 1'),
        ('dropout', dict(dropout=-0.1), 'at least 0'),
        ('dropout', dict(dropout=float('nan')), 'a number'),
        ('svd_rank', dict(svd_rank=0), 'nearest: 1'),
        ('svd_rank', dict(svd_rank=-2), 'at least 1'),
        ('svd_block', dict(svd_block=0), 'at least 1'),
        ('svd_method', dict(svd_method='qr'), "nearest: 'gram'"),
        ('gelu', dict(gelu='none'), 'tanh'),
        ('svd_power_iters', dict(svd_power_iters=-1), 'at least 0'),
        ('svd_oversample', dict(svd_oversample=-1), 'at least 0'),
        ('svd_scope', dict(svd_scope='token'), 'causal'),
        ('mla_latent_dim', mla(0), 'at least 1'),
        ('mla_latent_dim', mla(9), 'nearest: 8'),
        ('mla_latent_dim', mla([9]), 'nearest: [8, 8]'),
        ('mla_latent_dim', mla([3, 4], **svd('weight')), 'nearest: --use_svd=False'),
        ('mlp_dim', dict(mlp_dim=[]), 'nearest: [32, 32]'),
        ('n_kv_head', dict(n_kv_head=0), 'nearest: 1'),
        ('n_kv_head', dict(n_head=8, n_kv_head=5), 'nearest: 4'),
        ('n_kv_head', mla(n_kv_head=1), 'nearest: --n_kv_head=None'),
        ('v_head_dim', mla(v_head_dim=[2, 2]), 'use_mla'),
        ('qk_head_dim', dict(qk_head_dim=[2]), 'nearest: [2, 4]'),
        ('qk_head_dim', dict(qk_head_dim=[2, 5]), 'nearest: [2, 4]'),
        ('v_head_dim', dict(v_head_dim=[0, 2]), 'nearest: [1, 2]'),
        ('v_head_dim', svd('weight', v_head_dim=[2, 2]), 'nearest: --use_svd=False'),
        ('svd_targets', dict(svd_targets='k,w'), 'one of q, k, v'),
        ('svd_targets', dict(svd_targets='qk'), 'one of q, k, v'),
        ('svd_targets', dict(svd_targets=''), 'one of q, k, v'),
        ('svd_rank_k', dict(svd_rank_k=0), 'at least 1'),
    ],
)
def test_impossible_values_are_refused_by_name(field, overrides, hint):
    """An impossible value raises a one-line ValueError that names the field and a valid value."""
    with pytest.raises(ValueError) as e:
        GPTConfig(**{**SMALL, **overrides})
    message = str(e.value)
    assert message.startswith(
        f'{field}={overrides[field]!r}') and hint in message and '\n' not in message


@pytest.mark.parametrize(
    'options, changes',
    [
        ({},
         [dict(n_embd=16),
          dict(n_layer=3),
          dict(n_layer=1),
          dict(bias=False),
          dict(block_size=8)]),
        (svd('sequence', bias=False), [dict(bias=True)]),
        (svd('causal', dropout=0.1), [dict(use_mla=True)]),
        (mla(**svd('weight')), [dict(use_mla=False), dict(mla_latent_dim=4)]),
        (mla(layer_ranks=MLA_RANKS), [dict(layer_ranks=None)]),
        (dict(layer_ranks=RANKS),
         [dict(layer_ranks=None),
          dict(layer_ranks=RANKS | {'h.1.mlp.c_fc': 7})]),
        (dict(n_kv_head=1, v_head_dim=[3, 2]), [dict(n_kv_head=None), dict(v_head_dim=[2, 3])]),
    ],
    ids=str,
)
def test_model_args_and_weights_give_the_model_back_if_they_fit(options, changes):
    """A checkpoint gives the same model, and weights that do not fit the configuration raise a
    one-line ValueError."""
    model, idx = make(dtype=torch.float32, **options), tokens()
    saved = checkpoint_of(model)
    again = GPT.from_checkpoint(saved).eval()
    assert again.config == model.config and torch.equal(again(idx, idx)[0], model(idx, idx)[0])
    assert equal(again.state_dict(), model.state_dict())
    for change in changes:
        with pytest.raises(ValueError, match='its weights') as e:
            GPT.from_checkpoint(saved | {'model_args': saved['model_args'] | change})
        assert '\n' not in str(e.value)


def test_a_checkpoint_of_nanogpt_is_enough_and_svd_and_dropout_can_be_chosen():
    """A checkpoint with nanoGPT's fields alone can be loaded, with an SVD and dropout chosen at
    that time."""
    model, idx = make(dtype=torch.float32), tokens()
    names = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')
    saved = {
        'model': model.state_dict(),
        'model_args': {name: getattr(model.config, name) for name in names}}
    assert torch.equal(GPT.from_checkpoint(saved).eval()(idx)[0], model(idx)[0])
    cut = GPT.from_checkpoint(saved, **svd('weight', 2), dropout=0.2).eval()
    assert cut.config == GPTConfig(**saved['model_args'] | svd('weight', 2, dropout=0.2))
    expected = logits_by_hand(model.state_dict(), idx, **cut_by_hand('weight', 2))
    torch.testing.assert_close(cut(idx, idx)[0], expected, rtol=1e-3, atol=1e-3)

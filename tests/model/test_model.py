"""model.py against a GPT written out by hand, against nanoGPT's conventions, and for what each SVD scope promises."""

import math
from dataclasses import asdict

import pytest
import torch

from helpers import SMALL, checkpoint_of, copy_of, cut_by_hand, gelu_by_hand, leak, loss_by_hand, make, svd, tokens
from lowrank.svd import EXACT_METHODS, METHODS, low_rank_approximation
from model import GPT, SCOPES, GPTConfig
from runtime.optim import gpt_groups

pytestmark = pytest.mark.usefixtures('one_thread')
each_scope = pytest.mark.parametrize('scope', SCOPES)
each_method = pytest.mark.parametrize('method', METHODS)


# ----------------------------------------------------------------------------------------------------------------------
# the model by hand


def tanh_gelu_by_hand(x):
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + .044715 * x ** 3))) / 2


def logits_by_hand(state, idx, n_layer=2, n_head=2, cut_v=None, cut_w_v=None, gelu=gelu_by_hand):
    """GPT-2 from a state dict, with an explicit mask. cut_v acts on V (B, nh, T, hs), cut_w_v on W_v (nh, hs, C)."""
    def linear(x, name):
        return x @ state[f'{name}.weight'].T + state.get(f'{name}.bias', 0)

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * state[f'{name}.weight'] + state.get(f'{name}.bias', 0)

    T = idx.size(1)
    future = torch.ones(T, T).triu(1).bool()
    x = state['transformer.wte.weight'][idx] + state['transformer.wpe.weight'][:T]
    for h in (f'transformer.h.{i}' for i in range(n_layer)):
        inside = norm(x, f'{h}.ln_1')
        q, k, v = linear(inside, f'{h}.attn.c_attn').unflatten(-1, (3, n_head, -1)).permute(2, 0, 3, 1, 4)
        if cut_w_v:
            w_v = state[f'{h}.attn.c_attn.weight'].unflatten(0, (3, n_head, -1))[2]         # (nh, hs, C)
            v = v + torch.einsum('btc,hsc->bhts', inside, cut_w_v(w_v) - w_v)
        if cut_v:
            v = cut_v(v)
        attention = (q @ k.mT / math.sqrt(k.size(-1))).masked_fill(future, -math.inf).softmax(-1)
        x = x + linear((attention @ v).transpose(1, 2).flatten(2), f'{h}.attn.c_proj')
        x = x + linear(gelu(linear(norm(x, f'{h}.ln_2'), f'{h}.mlp.c_fc')), f'{h}.mlp.c_proj')
    return norm(x, 'transformer.ln_f') @ state['lm_head.weight'].T


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('gelu, by_hand', [('exact', gelu_by_hand), ('tanh', tanh_gelu_by_hand)])
def test_logits_and_loss_are_those_of_a_gpt_by_hand(bias, gelu, by_hand):
    model, idx, targets = make(bias=bias, gelu=gelu), tokens(), tokens(seed=1)
    targets[0, :5] = -1                                             # ignored
    logits, loss = model(idx, targets)
    expected = logits_by_hand(model.state_dict(), idx, gelu=by_hand)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(loss, loss_by_hand(expected, targets), rtol=1e-10, atol=1e-10)


def test_without_targets_only_the_last_position_is_computed():
    model, idx = make(), tokens()
    logits, loss = model(idx)
    assert loss is None and logits.shape == (2, 1, 11)
    torch.testing.assert_close(logits, model(idx, idx)[0][:, -1:])


@each_scope
@pytest.mark.parametrize('method', EXACT_METHODS)
@pytest.mark.parametrize('basis_grad', [True, False])
@pytest.mark.parametrize('bias', [True, False])
def test_svd_equals_the_svd_by_hand(scope, method, basis_grad, bias):
    """Logits, and the gradient of every parameter, with V (or W_v) replaced by a float64 U_k S_k V_k^T of each head."""
    model = make(bias=bias, **svd(scope, 2, method, svd_basis_grad=basis_grad))
    idx, state = tokens(), copy_of(model)
    logits, loss = model(idx, idx)
    expected = logits_by_hand(state, idx, **cut_by_hand(scope, 2, basis_grad))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    loss.backward()
    loss_by_hand(expected, idx).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, state[name].grad, rtol=1e-6, atol=1e-9, msg=lambda m: f'{name}: {m}')


@each_scope
@each_method
@pytest.mark.parametrize('rank', [None, 4, 9])
def test_full_rank_is_the_baseline_to_the_bit(scope, method, rank):
    baseline, cut, idx = make(), make(**svd(scope, rank, method)), tokens()
    for model in (baseline, cut):
        model(idx, idx)[1].backward()
    assert torch.equal(cut(idx, idx)[0], baseline(idx, idx)[0])
    for p, q in zip(cut.parameters(), baseline.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize('context, rank, block, truncates', [
    (32, 2, 32, False), (64, 40, 32, False), (256, 130, 32, False), (33, 2, 32, True), (65, 40, 32, True),
    (64, 31, 32, True), (3, 2, 1, False), (4, 1, 2, True)])
def test_causal_scope_truncates_where_a_basis_is_due(context, rank, block, truncates):
    shape = dict(block_size=context, n_head=1, n_embd=rank + 2)
    idx, cut = tokens(1, context), make(**shape | svd('causal', rank, svd_block=block))
    assert torch.equal(cut(idx, idx)[0], make(**shape)(idx, idx)[0]) != truncates == cut.config.svd_truncates


@each_scope
def test_use_svd_false_is_the_baseline_whatever_the_other_options(scope):
    idx = tokens()
    assert torch.equal(make(**{**svd(scope, 1), 'use_svd': False})(idx, idx)[0], make()(idx, idx)[0])


def test_the_two_reconstructions_are_one_matrix():
    attention = make(**svd('sequence', 2)).transformer.h[0].attn
    v = torch.randn(2, 2, 16, 4, dtype=torch.float64)
    standard = attention._standard_svd_reconstruction
    for rank in (1, 2, 3):
        torch.testing.assert_close(standard(v, rank), low_rank_approximation(v, rank, 'gram'))
        assert torch.linalg.matrix_rank(standard(v, rank)).eq(rank).all()
    assert torch.equal(standard(v), standard(v, 2))
    torch.testing.assert_close(attention.apply_svd_to_v(v), standard(v))


# ----------------------------------------------------------------------------------------------------------------------
# which positions see which


@each_method
@pytest.mark.parametrize('scope', [None, 'causal', 'weight'])
def test_no_logit_depends_on_a_later_token(scope, method):
    model = make(**svd(scope, 2, method)) if scope else make()
    assert leak(model) <= 1e-9 and not model.config.svd_sees_future


@each_method
def test_sequence_scope_does_see_the_future_and_says_so(method):
    model = make(**svd('sequence', 2, method))
    assert leak(model) > 1e-3 and model.config.svd_sees_future


@pytest.mark.parametrize('options', [svd('sequence', None), svd('sequence', 4), svd('sequence', 2, block_size=2),
                                     {**svd('sequence', 2), 'use_svd': False}])
def test_sequence_scope_that_cuts_nothing_does_not_see_the_future(options):
    assert not GPTConfig(**{**SMALL, **options}).svd_sees_future


# ----------------------------------------------------------------------------------------------------------------------
# parameters

def test_parameter_names_and_shapes_are_those_of_nanogpt():
    block = [('ln_1.weight', (8,)), ('ln_1.bias', (8,)),
             ('attn.c_attn.weight', (24, 8)), ('attn.c_attn.bias', (24,)),
             ('attn.c_proj.weight', (8, 8)), ('attn.c_proj.bias', (8,)),
             ('ln_2.weight', (8,)), ('ln_2.bias', (8,)),
             ('mlp.c_fc.weight', (32, 8)), ('mlp.c_fc.bias', (32,)),
             ('mlp.c_proj.weight', (8, 32)), ('mlp.c_proj.bias', (8,))]
    expected = [('transformer.wte.weight', (11, 8)), ('transformer.wpe.weight', (16, 8)),
                *((f'transformer.h.0.{name}', shape) for name, shape in block),
                *((f'transformer.h.1.{name}', shape) for name, shape in block),
                ('transformer.ln_f.weight', (8,)), ('transformer.ln_f.bias', (8,)),
                ('lm_head.weight', (11, 8))]

    def listing(**overrides):
        return [(name, tuple(p.shape)) for name, p in make(**overrides).state_dict().items()]

    assert listing() == expected
    assert listing(bias=False) == [(name, shape) for name, shape in expected if not name.endswith('bias')]
    for scope in SCOPES:
        assert listing(**svd(scope)) == expected


def test_initial_weights_follow_gpt2():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=256, n_layer=2, n_head=2, n_embd=64))
    for name, p in model.named_parameters():
        if name.endswith('bias'):
            assert p.count_nonzero() == 0, name
        elif '.ln_' in name:
            assert (p == 1).all(), name
        else:
            std = .02 / math.sqrt(4) if name.endswith('c_proj.weight') else .02
            assert p.std().item() == pytest.approx(std, rel=.05) and abs(p.mean().item()) < std / 10, name


def test_the_head_is_the_token_embedding():
    model = make()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert 'lm_head.weight' not in dict(model.named_parameters())   # one parameter, so one entry in an optimizer


@each_scope
def test_equal_seeds_give_equal_weights_with_and_without_svd(scope):
    for p, q in zip(make(3).parameters(), make(3, **svd(scope)).parameters(), strict=True):
        assert torch.equal(p, q)
    assert not torch.equal(make(3).lm_head.weight, make(4).lm_head.weight)


def test_number_of_parameters():
    a_block = 2 * 16 + (24 * 8 + 24) + (8 * 8 + 8) + (32 * 8 + 32) + (8 * 32 + 8)
    assert make().get_num_params() == 11 * 8 + 2 * a_block + 16
    assert make().get_num_params(non_embedding=False) == 16 * 8 + make().get_num_params()


def test_mfu_is_palms_formula():
    model = make()
    flops_per_token = 6 * model.get_num_params() + 12 * 2 * 2 * 4 * 16          # layers, heads, head size, tokens
    assert model.estimate_mfu(10, .5) == pytest.approx(flops_per_token * 16 * 10 / .5 / 312e12)
    assert model.estimate_mfu(10, .5, flops_promised=1e12) == pytest.approx(flops_per_token * 16 * 10 / .5 / 1e12)


def test_crop_block_size():
    model, idx = make(), tokens(columns=6)
    before = model(idx, idx)[0]
    model.crop_block_size(6)
    assert model.config.block_size == 6 and model.transformer.wpe.weight.shape == (6, 8)
    assert torch.equal(model(idx, idx)[0], before)
    model(idx, idx)[1].backward()
    assert model.transformer.wpe.weight.grad is not None
    with pytest.raises(ValueError, match='cannot forward 7 tokens'):
        model(tokens(columns=7))
    for size in (0, 7):
        with pytest.raises(ValueError, match=f'block_size={size}: can only be cropped to 1..6'):
            model.crop_block_size(size)


@pytest.mark.parametrize('columns', [0, 17])
def test_forward_refuses_no_tokens_and_too_many(columns):
    with pytest.raises(ValueError, match=f'cannot forward {columns} tokens: valid are 1 to block_size=16'):
        make()(tokens(columns=columns))


def test_dropout_is_for_training_only():
    model, idx = make(dropout=.5), tokens()
    assert torch.equal(model(idx)[0], make()(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


@pytest.mark.parametrize('place', ['transformer.drop', 'transformer.h.0.attn', 'transformer.h.0.attn.resid_dropout',
                                   'transformer.h.0.mlp.dropout'])
def test_dropout_acts_in_the_places_of_nanogpt(place):
    """Each of them alone makes two passes differ; 'attn' itself stands for the attention weights."""
    model, idx = make().train(), tokens()
    assert torch.equal(model(idx)[0], model(idx)[0])
    module = model.get_submodule(place)
    setattr(module, 'p' if isinstance(module, torch.nn.Dropout) else 'dropout', .5)
    assert not torch.equal(model(idx)[0], model(idx)[0])


# ----------------------------------------------------------------------------------------------------------------------
# optimizers

@pytest.mark.parametrize('bias', [True, False])
def test_optim_groups_hold_every_parameter_once(bias):
    model = make(bias=bias)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {kind: [names[id(p)] for p in group['params']] for kind, group in gpt_groups(model, .1).items()}
    assert sorted(sum(groups.values(), [])) == sorted(names.values())
    assert groups['embedding'] == ['transformer.wte.weight', 'transformer.wpe.weight']
    assert all(name.startswith('transformer.h.') and name.endswith('weight') for name in groups['hidden'])
    assert len(groups['hidden']) == 8 and all('ln_' in name or name.endswith('bias') for name in groups['vector'])
    assert [group['weight_decay'] for group in gpt_groups(model, .1).values()] == [.1, .1, 0]


def test_optim_groups_leave_out_frozen_parameters():
    model = make()
    model.transformer.wpe.requires_grad_(False)
    in_groups = [p for group in gpt_groups(model, .1).values() for p in group['params']]
    assert len(in_groups) == len(list(model.parameters())) - 1
    assert all(p is not model.transformer.wpe.weight for p in in_groups)


def test_configure_optimizers_groups_in_the_order_of_nanogpt():
    """Matrices, then vectors, both in the order of named_parameters: optimizer states are stored by position."""
    model = make()
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = model.configure_optimizers(.1, 1e-3, (.9, .95), 'cpu')
    decay, no_decay = optimizer.param_groups
    matrices = ['attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj']
    assert [names[id(p)] for p in decay['params']] == [
        'transformer.wte.weight', 'transformer.wpe.weight',
        *(f'transformer.h.{i}.{name}.weight' for i in (0, 1) for name in matrices)]
    assert [names[id(p)] for p in no_decay['params']] == [name for name, p in model.named_parameters() if p.dim() == 1]
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (decay['weight_decay'], no_decay['weight_decay']) == (.1, 0)
    assert all(group['lr'] == 1e-3 and group['betas'] == (.9, .95) for group in optimizer.param_groups)


def test_training_is_adamw_on_the_loss_by_hand():
    """Five steps against the model by hand and AdamW by hand (Loshchilov and Hutter 2019), in float64."""
    model, lr, decay, (beta1, beta2), eps = make(), .01, .1, (.9, .95), 1e-8
    state = copy_of(model)
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    optimizer = model.configure_optimizers(decay, lr, (beta1, beta2), 'cpu')
    for step in range(1, 6):
        idx, targets = tokens(seed=step), tokens(seed=-step)
        loss, expected = model(idx, targets)[1], loss_by_hand(logits_by_hand(state, idx), targets)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gradients = torch.autograd.grad(expected, [state[name] for name in moments])
        for (name, (m, v)), g in zip(moments.items(), gradients):
            m.lerp_(g, 1 - beta1)
            v.lerp_(g * g, 1 - beta2)
            update = (m / (1 - beta1 ** step)) / ((v / (1 - beta2 ** step)).sqrt() + eps)
            with torch.no_grad():
                state[name] -= lr * (update + (decay * state[name] if state[name].dim() > 1 else 0))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, state[name], rtol=0, atol=1e-8, msg=lambda m: f'{name}: {m}')


@each_scope
@each_method
def test_autocast_bfloat16_trains(scope, method):
    model, idx = make(dtype=torch.float32, **svd(scope, 2, method)), tokens()
    with torch.autocast('cpu', torch.bfloat16):
        logits, loss = model(idx, idx)
    loss.backward()
    torch.testing.assert_close(loss.float(), model(idx, idx)[1], rtol=.1, atol=0)
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# generation

def generate_by_hand(model, idx, max_new_tokens, temperature=1.0, top_k=None):
    """One token at a time as nanoGPT samples it, from logits by hand."""
    for _ in range(max_new_tokens):
        logits = logits_by_hand(model.state_dict(), idx[:, -model.config.block_size:])[:, -1] / temperature
        if top_k is not None:
            threshold = logits.sort(descending=True).values[:, min(top_k, logits.size(-1)) - 1]
            logits = logits.masked_fill(logits < threshold[:, None], -math.inf)
        idx = torch.cat((idx, torch.multinomial(logits.softmax(-1), 1)), dim=1)
    return idx


@torch.no_grad()
@pytest.mark.parametrize('columns, options', [
    (1, {}), (3, dict(temperature=.5)), (3, dict(temperature=3., top_k=4)), (3, dict(top_k=1)), (3, dict(top_k=99)),
    (14, dict(top_k=5)),                                            # grows beyond block_size = 16
    (20, {}),                                                       # starts beyond it
])
def test_generate_draws_the_tokens_of_nanogpt(columns, options):
    model, idx = make(), tokens(columns=columns)
    torch.manual_seed(1)
    expected = generate_by_hand(model, idx, 12, **options)
    torch.manual_seed(1)
    actual = model.generate(idx, 12, **options)
    assert actual.shape == (2, columns + 12) and torch.equal(actual, expected)


def test_generate_no_tokens():
    assert torch.equal(make().generate(tokens(), 0), tokens())


@each_scope
@pytest.mark.filterwarnings('ignore:svd_scope=')
def test_generate_continues_the_prefix(scope):
    """Greedy tokens are the argmax of a fresh forward pass over the prefix, whatever the scope."""
    model = make(**svd(scope))
    idx = model.generate(tokens(columns=2), 14, top_k=1)
    for t in range(2, 16):
        assert torch.equal(model(idx[:, :t])[0][:, -1].argmax(-1), idx[:, t])


# ----------------------------------------------------------------------------------------------------------------------
# configuration

@pytest.mark.parametrize('field, overrides, hint', [
    ('block_size', dict(block_size=0), 'at least 1'),
    ('vocab_size', dict(vocab_size=-5), 'at least 1'),
    ('n_layer', dict(n_layer=0), 'at least 1'),
    ('n_head', dict(n_head=0), 'at least 1'),
    ('n_embd', dict(n_embd=0), 'at least 1'),
    ('n_embd', dict(n_embd=10, n_head=4), 'nearest: 8'),
    ('n_embd', dict(n_embd=3, n_head=8), 'nearest: 8'),
    ('dropout', dict(dropout=1.0), 'below 1'),
    ('dropout', dict(dropout=-.1), 'at least 0'),
    ('dropout', dict(dropout=float('nan')), 'at least 0'),
    ('svd_rank', dict(svd_rank=0), 'valid: 1 to 4, or None'),
    ('svd_rank', dict(svd_rank=-2), 'at least 1'),
    ('svd_block', dict(svd_block=0), 'at least 1'),
    ('svd_method', dict(svd_method='qr'), 'valid: standard, gram, randomized'),
    ('gelu', dict(gelu='none'), 'valid: exact, tanh'),
    ('svd_power_iters', dict(svd_power_iters=-1), 'at least 0'),
    ('svd_oversample', dict(svd_oversample=-1), 'at least 0'),
    ('svd_scope', dict(svd_scope='token'), 'valid: sequence, causal, weight'),
])
def test_impossible_values_are_refused_by_name(field, overrides, hint):
    with pytest.raises(ValueError) as e:
        GPTConfig(**{**SMALL, **overrides})
    message = str(e.value)
    assert message.startswith(f'{field}={overrides[field]!r}') and hint in message and '\n' not in message


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints


@pytest.mark.parametrize('options', [{}, svd('sequence'), svd('causal', dropout=.1)])
def test_from_checkpoint_gives_the_model_back(options):
    model, idx = make(dtype=torch.float32, **options), tokens()
    again = GPT.from_checkpoint(checkpoint_of(model)).eval()
    assert again.config == model.config and torch.equal(again(idx, idx)[0], model(idx, idx)[0])


def test_from_checkpoint_needs_only_the_fields_of_nanogpt():
    model, idx = make(dtype=torch.float32), tokens()
    fields = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')
    saved = {'model': model.state_dict(), 'model_args': {name: getattr(model.config, name) for name in fields}}
    assert torch.equal(GPT.from_checkpoint(saved).eval()(idx)[0], model(idx)[0])


def test_from_checkpoint_overrides():
    model, idx = make(dtype=torch.float32), tokens()
    cut = GPT.from_checkpoint(checkpoint_of(model), **svd('weight', 2), dropout=.2).eval()
    assert cut.config == GPTConfig(**{**asdict(model.config), **svd('weight', 2), 'dropout': .2})
    torch.testing.assert_close(cut(idx, idx)[0], logits_by_hand(model.state_dict(), idx, **cut_by_hand('weight', 2)),
                               rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('field, value', [('n_embd', 16), ('n_layer', 3), ('n_layer', 1), ('bias', False),
                                          ('block_size', 8)])
def test_from_checkpoint_refuses_weights_that_do_not_fit(field, value):
    saved = checkpoint_of(make())
    saved['model_args'][field] = value
    with pytest.raises(ValueError, match='weights do not fit') as e:
        GPT.from_checkpoint(saved)
    assert '\n' not in str(e.value)

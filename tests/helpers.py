"""Helpers of several test modules: data and options of tiny runs, files, models, matrices."""

import functools
import itertools
import json
import math
import os
import signal
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, GPTConfig
from runtime.optimizer import MuonAdamW

ROOT = Path(__file__).resolve().parents[1]

# 2,360 characters, 17 different ones, regular enough that a model learns it in a few steps
TEXT = ''.join(f'the {animal} {verb} on the {place}\n' for _ in range(2)
               for animal in ('cat', 'hen', 'toad') for verb in ('sat', 'sang', 'lies', 'ate')
               for place in ('bed', 'roof', 'sea', 'stone'))


TINY = (
    '--dataset=toy --device=cpu --n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 '
    '--gradient_accumulation_steps=1 --max_iters=4 --lr_decay_iters=4 --learning_rate=1e-2 '
    '--eval_interval=2 --eval_iters=2').split()


def slow(*case):
    """Return a case for pytest.mark.parametrize that only runs with -m slow."""
    return pytest.param(*case, marks=pytest.mark.slow)


def rows(folder='out', file='metrics.jsonl'):
    """Return the rows of a JSON Lines file. They must be strict JSON, without NaN."""
    def refuse(word):
        raise ValueError(f'{word} is not JSON')

    return [
        json.loads(line, parse_constant=refuse)
        for line in (Path(folder) / file).read_text().splitlines()]


def checkpoint(folder='out'):
    return torch.load(Path(folder) / 'ckpt.pt', weights_only=True)


def equal(a, b):
    """Return whether two state dicts are bit-identical."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def folder_bytes(folder='out'):
    """Return path -> bytes of every file below a folder."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob('*') if p.is_file()}


def same(a, b):
    """Return whether two nested structures are equal, with bit-identical tensors."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def untimed(folder):
    """Return the rows of metrics.jsonl without times."""
    return [{k: v
             for k, v in row.items()
             if k not in ('step_ms', 'tokens_per_s')}
            for row in rows(folder)]


def assert_same_run(folder, other):
    """Assert that checkpoints and metrics of two runs are bit-identical. Times, out_dir, init_from
    and max_iters may differ."""
    a, b = checkpoint(folder), checkpoint(other)
    for key in ('out_dir', 'init_from', 'max_iters'):
        a['config'][key] = b['config'][key]
    for key in a.keys() | b.keys():
        assert same(a.get(key), b.get(key)), f'{key} differs'
    assert_same_metrics(folder, other)


def assert_same_metrics(folder, other):
    """Assert equal metrics of two runs. `folder` may have more evaluations from stops."""
    more, expected = untimed(folder), untimed(other)
    assert [row for row in more
            if 'val/loss' not in row or row in expected] == expected, 'metrics.jsonl differs'


def interrupt(monkeypatch, steps, number=signal.SIGINT):
    """Send this process a signal during the optimizer step number `steps` from now."""
    calls = itertools.count(1)
    step = torch.optim.AdamW.step                                   # runs with Muon call it too

    @functools.wraps(step)
    def interrupted(*args, **options):
        if next(calls) == steps:
            os.kill(os.getpid(), number)
        return step(*args, **options)
    monkeypatch.setattr(torch.optim.AdamW, 'step', interrupted)


@contextmanager
def before_forward(action):
    """Context manager that calls action(model) before each forward pass of a GPT."""
    def look(module, args):
        if isinstance(module, GPT):
            action(module)
    hook = register_module_forward_pre_hook(look)
    try:
        yield
    finally:
        hook.remove()


def change(folder='out', without=(), **changes):
    """Change a checkpoint on disk: remove the keys `without` and set others."""
    saved = checkpoint(folder) | changes
    torch.save({key: value for key, value in saved.items() if key not in without},
               Path(folder, 'ckpt.pt'))


# --------------------------------------------------------------------------------------------------
# models

# the head size is 4
SMALL = dict(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=8, svd_block=4)


def make(seed=0, dtype=torch.float64, **overrides):
    """Return a small model in eval mode. Each parameter is far from its initial value."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**SMALL, **overrides})).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=.3)
    return model


def svd(scope, rank=2, method='gram', **overrides):
    return dict(use_svd=True, svd_scope=scope, svd_rank=rank, svd_method=method, **overrides)


def tokens(rows=2, columns=16, seed=0):
    return torch.randint(SMALL['vocab_size'], (rows, columns),
                         generator=torch.Generator().manual_seed(seed))


def copy_of(model):
    """Return copies of a model's parameters by name, with gradients. The tied matrix is one tensor.
    """
    state = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    return {**state, 'lm_head.weight': state['transformer.wte.weight']}


def gelu_by_hand(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def loss_by_hand(logits, targets):
    chosen = logits.log_softmax(-1).gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return -chosen[targets != -1].mean()


def cut_by_hand(scope, rank, basis_grad=True, targets='v'):
    """Return the keyword arguments of `logits_by_hand` for the SVD of a scope. targets: 'v' or a
    text such as 'q,k'."""
    def projected(x, basis_of):
        vh = torch.linalg.svd(basis_of if basis_grad else basis_of.detach(),
                              full_matrices=False)[2][..., :rank, :]
        return x @ vh.mT @ vh

    def causal(v):
        rows = [v[..., :4, :]]
        for s in (4, 8):  # svd_block = 4: bases from rows [0, 4) and [0, 8)
            rows.append(projected(v[..., s:2 * s, :], v[..., :s, :]))
        return torch.cat(rows, dim=-2)

    name, f = {'sequence': ('cut', lambda v: projected(v, v)), 'causal': ('cut', causal),
               'weight': ('cut_w', lambda w: projected(w.mT, w.mT).mT)}[scope]
    return {name: dict.fromkeys(targets.split(','), f)}


def leak(model):
    """Return the largest change of a logit at a position before j if token j changes, over all j.
    """
    idx = tokens(1)
    before = model(idx, idx)[0]
    worst = 0
    for j in range(1, idx.size(1)):
        changed = idx.clone()
        changed[0, j] = (idx[0, j] + 1) % SMALL['vocab_size']
        difference = (model(changed, changed)[0] - before).abs()[0]
        assert difference[j].max() > 1e-6                           # the change has an effect
        worst = max(worst, difference[:j].max().item())
    return worst


def checkpoint_of(model):
    return {'model_args': asdict(model.config), 'model': model.state_dict()}


@torch.no_grad()
def cached_logits(model, idx, prompt, one_prompt=False, room=None):
    """Return logits of all positions (B, T, vocab), computed with a cache.

    The first `prompt` tokens are given at once, the others one by one. one_prompt: they are the
    same in all rows and computed once; room: tokens that fit in the cache.
    """
    B, T = idx.shape
    cache = model.new_cache(B, room or T)
    first = idx[:1, :prompt] if one_prompt else idx[:, :prompt]
    logits = [model(first, first, cache=cache)[0].expand(B, -1, -1)]
    logits += [model(idx[:, t:t + 1], cache=cache)[0] for t in range(prompt, T)]
    return torch.cat(logits, dim=1)


@torch.no_grad()
def error(model, idx, prompt, **options):
    """Return the largest difference from the uncached logits, relative to the largest logit."""
    expected = model(idx, idx)[0]
    return ((cached_logits(model, idx, prompt, **options) - expected).abs().max() /
            expected.abs().max()).item()


def counted(f):
    """Return the FLOPs that torch counts in f(). Attention runs as two matrix products, because
    torch counts these on every device."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops()


def optimizer_of(model, kind):
    betas = (.9, .95)
    if kind == 'muon':
        return model.register_step_hook(
            MuonAdamW(model, .1, 1e-2, betas, 'cpu', torch.float32))
    return model.configure_optimizers(.1, 1e-2, betas, 'cpu')


def mla(latent=3, **options):
    """Return options for MLA. The default latent is smaller than the head size of SMALL, 4."""
    return dict(use_mla=True, mla_latent_dim=latent, **options)


# different layers and ranks per block of SMALL, whose layers are (8, 8), (32, 8) and (8, 32)
RANKS = {
    'h.0.attn.c_attn.c_q': 3, 'h.0.attn.c_attn.c_v': 1, 'h.0.attn.c_proj': 2, 'h.0.mlp.c_fc': 5,
    'h.1.attn.c_attn.c_k': 2, 'h.1.mlp.c_fc': 4, 'h.1.mlp.c_proj': 8
}
MLA_RANKS = {'h.0.attn.c_attn.query': 3, 'h.0.mlp.c_proj': 2, 'h.1.attn.c_proj': 5}


def precision(device):
    """Return the widest dtype of a device and the relative error allowed in it.

    The error is at least 1e4 eps, because the eigenvalue gap at the rank of a truncated SVD is at
    least 1e-4 of the largest eigenvalue.
    """
    return (torch.float32, 2e-3) if torch.device(device).type == 'mps' else (torch.float64, 1e-10)


def logits_by_hand(state, idx, n_head=2, n_kv_head=None, dims=None, cut=None, cut_w=None,
                   gelu=gelu_by_hand):
    """Return the logits of a GPT-2 of two blocks from its state dict, with an explicit mask.

    With latents c = W_a x, keys are U_k c and values U_v c + b. Keys and values of n_kv_head heads
    are repeated for all heads. dims: widths of keys and values per block. cut: 'q', 'k' or 'v' ->
    function that truncates rows (B, heads, T, hs). cut_w: the same for weights (heads, hs, C or d).
    """
    def linear(x, name):
        return x @ state[f'{name}.weight'].T + state.get(f'{name}.bias', 0)

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * state[f'{name}.weight'] + state.get(f'{name}.bias', 0)

    T, C = idx.size(1), state['transformer.wpe.weight'].size(1)
    future = torch.ones(T, T, device=idx.device).triu(1).bool()
    x = state['transformer.wte.weight'][idx] + state['transformer.wpe.weight'][:T]
    heads = dict(q=n_head, k=n_kv_head or n_head, v=n_kv_head or n_head)
    for i, h in enumerate(('transformer.h.0', 'transformer.h.1')):
        inside, c_attn, parts = norm(x, f'{h}.ln_1'), f'{h}.attn.c_attn', {}
        if f'{c_attn}.kv_down.weight' in state:
            c = linear(inside, f'{c_attn}.kv_down')
            for name, layer, y in (('q', 'query', inside), ('k', 'k_up', c), ('v', 'v_up', c)):
                parts[name] = y, *(state.get(f'{c_attn}.{layer}.{kind}')
                                   for kind in ('weight', 'bias'))
        else:
            qk, v = dims[i] if dims else [C // n_head] * 2
            rows = [n_head * qk, heads['k'] * qk, heads['v'] * v]
            w, b = state[f'{c_attn}.weight'].split(rows), state.get(f'{c_attn}.bias')
            b = [None] * 3 if b is None else b.split(rows)
            parts = {name: (inside, *pair) for name, *pair in zip('qkv', w, b)}
        for name, (y, w, b) in parts.items():
            w = w.unflatten(0, (heads[name], -1))
            w = cut_w[name](w) if name in (cut_w or {}) else w
            rows = torch.einsum('btc,hsc->bhts', y, w)
            rows = rows if b is None else rows + b.view(heads[name], 1, -1)
            rows = cut[name](rows) if name in (cut or {}) else rows
            parts[name] = rows.repeat_interleave(n_head // heads[name], dim=1)
        q, k, v = parts.values()
        attention = (q @ k.mT / math.sqrt(C // n_head)).masked_fill(future, -math.inf).softmax(-1)
        x = x + linear((attention @ v).transpose(1, 2).flatten(2), f'{h}.attn.c_proj')
        x = x + linear(gelu(linear(norm(x, f'{h}.ln_2'), f'{h}.mlp.c_fc')), f'{h}.mlp.c_proj')
    return norm(x, 'transformer.ln_f') @ state['lm_head.weight'].T


# --------------------------------------------------------------------------------------------------
# matrices


def whole_truth(x, rank):
    """Return U_k S_k V_k^T by torch.linalg.svd."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]


def projector(x, rank):
    """Return V_k V_k^T by torch.linalg.svd."""
    vh = torch.linalg.svd(x, full_matrices=False)[2][..., :rank, :]
    return vh.mT @ vh


def causal_truth(x, rank, block=4, basis_of=None):
    """Return the truncation of 'causal' scope, computed row by row. Row t in [s, 2s), for s =
    block, 2 block, 4 block, ..., uses the SVD of rows [0, s) if s > rank."""
    basis_of = x if basis_of is None else basis_of
    rows = []
    for t in range(x.shape[-2]):
        row, s = x[..., t:t + 1, :], block
        while 2 * s <= t:
            s *= 2
        if t >= block and s > rank:
            row = row @ projector(basis_of[..., :s, :], rank)
        rows.append(row)
    return torch.cat(rows, dim=-2)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_singular_values(sigma, rows, columns, seed=0):
    """Return a random float64 matrix (rows, columns) with the singular values sigma."""
    u, v = (torch.linalg.qr(normal(side, len(sigma), seed=seed + i))[0]
            for i, side in enumerate((rows, columns)))
    return u * torch.as_tensor(sigma, dtype=torch.float64) @ v.mT


def value_and_gradient(f, x, dy):
    x = x.clone().requires_grad_()
    y = f(x)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


def assert_close(actual, expected, bar):
    """Assert that the Frobenius error, relative to the expected norm, is at most `bar`."""
    error = torch.linalg.norm(actual.double() - expected.double()) / torch.linalg.norm(
        expected.double())
    assert error <= bar, f'relative error {error:.1e}, allowed {bar}'

"""What several test modules share: the data set and options of tiny runs, files read back, models, matrices."""

import itertools
import json
import math
import os
import signal
from dataclasses import asdict
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from model import GPT, GPTConfig
from runtime.optim import MuonAdamW, gpt_groups

ROOT = Path(__file__).resolve().parents[1]

# 2,360 characters of 17 kinds, as regular as text can be: a model that learns anything learns this
TEXT = ''.join(f'the {animal} {verb} on the {place}\n' for _ in range(2) for animal in ('cat', 'hen', 'toad')
               for verb in ('sat', 'sang', 'lies', 'ate') for place in ('bed', 'roof', 'sea', 'stone'))


TINY = ('--dataset=toy --device=cpu --n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 '
        '--gradient_accumulation_steps=1 --max_iters=4 --lr_decay_iters=4 --learning_rate=1e-2 '
        '--eval_interval=2 --eval_iters=2').split()


def rows(folder='out', file='metrics.jsonl'):
    """The rows of a JSON Lines file, which must be strict JSON: NaN is not."""
    def refuse(word):
        raise ValueError(f'{word} is not JSON')
    return [json.loads(line, parse_constant=refuse) for line in (Path(folder) / file).read_text().splitlines()]


def checkpoint(folder='out'):
    return torch.load(Path(folder) / 'ckpt.pt', weights_only=True)


def equal(a, b):
    """Whether two state dicts are the same to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def folder_bytes(folder='out'):
    """Every file below a folder -> its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob('*') if p.is_file()}


def same(a, b):
    """Whether two nested structures are the same, tensors to the bit."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def untimed(folder):
    """The rows of metrics.jsonl without what a clock says."""
    return [{k: v for k, v in row.items() if k not in ('step_ms', 'tokens_per_s')} for row in rows(folder)]


def interrupt(monkeypatch, steps, number=signal.SIGINT):
    """A signal arrives while step `steps` is computed."""
    calls = itertools.count(1)
    step = train.step

    def interrupted(*args):
        if next(calls) == steps:
            os.kill(os.getpid(), number)
        return step(*args)
    monkeypatch.setattr(train, 'step', interrupted)


def change(folder='out', without=(), **changes):
    """Change a checkpoint on disk."""
    saved = checkpoint(folder) | changes
    torch.save({key: value for key, value in saved.items() if key not in without}, Path(folder, 'ckpt.pt'))


# ----------------------------------------------------------------------------------------------------------------------
# models

SMALL = dict(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=8, svd_block=4)       # head size 4


def make(seed=0, dtype=torch.float64, **overrides):
    """A small model with every parameter well away from its initial value, in eval mode."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**SMALL, **overrides})).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=.3)
    return model


def svd(scope, rank=2, method='gram', **overrides):
    return dict(use_svd=True, svd_scope=scope, svd_rank=rank, svd_method=method, **overrides)


def tokens(rows=2, columns=16, seed=0):
    return torch.randint(SMALL['vocab_size'], (rows, columns), generator=torch.Generator().manual_seed(seed))


def copy_of(model):
    """A model's parameters by name, as leaves that autograd follows; the tied matrix is one tensor."""
    state = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    return {**state, 'lm_head.weight': state['transformer.wte.weight']}


def gelu_by_hand(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def loss_by_hand(logits, targets):
    chosen = logits.log_softmax(-1).gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return -chosen[targets != -1].mean()


def cut_by_hand(scope, rank, basis_grad=True):
    """The keyword arguments that give `logits_by_hand` the SVD of a scope."""
    def projected(x, basis_of):
        vh = torch.linalg.svd(basis_of if basis_grad else basis_of.detach(), full_matrices=False)[2][..., :rank, :]
        return x @ vh.mT @ vh

    def causal(v):
        rows = [v[..., :4, :]]
        for s in (4, 8):                                            # svd_block = 4: bases from rows [0, 4) and [0, 8)
            rows.append(projected(v[..., s:2 * s, :], v[..., :s, :]))
        return torch.cat(rows, dim=-2)

    return {'sequence': dict(cut_v=lambda v: projected(v, v)),
            'causal': dict(cut_v=causal),
            'weight': dict(cut_w_v=lambda w_v: projected(w_v.mT, w_v.mT).mT)}[scope]


def leak(model):
    """Largest change of a logit before position j when token j changes, over all j."""
    idx = tokens(1)
    before = model(idx, idx)[0]
    worst = 0
    for j in range(1, idx.size(1)):
        changed = idx.clone()
        changed[0, j] = (idx[0, j] + 1) % SMALL['vocab_size']
        difference = (model(changed, changed)[0] - before).abs()[0]
        assert difference[j].max() > 1e-6                           # the change does arrive
        worst = max(worst, difference[:j].max().item())
    return worst


def checkpoint_of(model):
    return {'model_args': asdict(model.config), 'model': model.state_dict()}


@torch.no_grad()
def cached_logits(model, idx, prompt, one_prompt=False, room=None):
    """Logits of every position (B, T, vocab), the first `prompt` tokens given at once and the others one by one.
    one_prompt: the first part is the same in all rows, and computed once."""
    B, T = idx.shape
    cache = model.new_cache(B, room or T)
    first = idx[:1, :prompt] if one_prompt else idx[:, :prompt]
    logits = [model(first, first, cache=cache)[0].expand(B, -1, -1)]
    logits += [model(idx[:, t:t + 1], cache=cache)[0] for t in range(prompt, T)]
    return torch.cat(logits, dim=1)


@torch.no_grad()
def error(model, idx, prompt, **options):
    """Largest difference to the uncached logits, relative to the largest of these."""
    expected = model(idx, idx)[0]
    return ((cached_logits(model, idx, prompt, **options) - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def assert_as_near_in_bfloat16(model, idx):
    """Under autocast the cached logits are not much further from float32's than the uncached ones."""
    truth = model(idx, idx)[0]
    with torch.autocast('cpu', torch.bfloat16):
        uncached, cached = model(idx, idx)[0], cached_logits(model, idx, 5)
    assert cached.dtype == uncached.dtype == torch.bfloat16
    assert (cached - truth).norm() <= 2 * (uncached - truth).norm() <= .1 * truth.norm()


def counted(f):
    """Operations that torch counts in f; attention is made of two products, so that it is counted everywhere."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops()


def optimizer_of(model, kind):
    betas = (.9, .95)
    if kind == 'muon':
        return MuonAdamW(gpt_groups(model, .1), 1e-2, betas, 'cpu', torch.float32)
    return model.configure_optimizers(.1, 1e-2, betas, 'cpu')


# ----------------------------------------------------------------------------------------------------------------------
# matrices


def whole_truth(x, rank):
    """U_k S_k V_k^T by torch.linalg.svd."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]


def projector(x, rank):
    """V_k V_k^T by torch.linalg.svd."""
    vh = torch.linalg.svd(x, full_matrices=False)[2][..., :rank, :]
    return vh.mT @ vh


def causal_truth(x, rank, block=4, basis_of=None):
    """One row at a time: row t in [s, 2s), s = block, 2 block, 4 block ..., uses the SVD of rows [0, s) if s > rank."""
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
    """A random float64 matrix (rows, columns) with singular values sigma, min(rows, columns) of them."""
    u, v = (torch.linalg.qr(normal(side, len(sigma), seed=seed + i))[0] for i, side in enumerate((rows, columns)))
    return u * torch.as_tensor(sigma, dtype=torch.float64) @ v.mT


def value_and_gradient(f, x, dy):
    x = x.clone().requires_grad_()
    y = f(x)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


def assert_close(actual, expected, bar):
    """Frobenius error below bar, relative to the expected norm."""
    error = torch.linalg.norm(actual.double() - expected.double()) / torch.linalg.norm(expected.double())
    assert error <= bar, f'relative error {error:.1e}, allowed {bar}'

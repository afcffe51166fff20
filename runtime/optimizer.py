"""Learning rate and optimizers: nanoGPT's AdamW, or AdamW with Muon for hidden matrices.

A model provides its parameters with `param_groups(weight_decay)`, a dict from names to parameter
groups. The groups 'hidden' (matrices of the blocks) and 'embedding' decay. The group 'vector'
(biases, LayerNorm) does not. The optional group 'halved' holds pairs of factors and decays by half
as much, because the decay of either factor shrinks the product. Every trainable parameter is in
exactly one group. For Muon, groups have the lists 'matrices' and 'rates', too (see `Muon`), and
`param_groups(weight_decay, per_head)` says whether each head is a matrix.
"""

import math
from itertools import groupby

import torch

from runtime import device as devices
from runtime.config import one_line

NANOGPT_LENGTH = 600000  # nanoGPT's default lr_decay_iters; older checkpoints hold it, too


def schedule_length(cfg):
    """Return the schedule length that limits the warm-up: lr_decay_iters, or max_iters if
    lr_decay_iters is nanoGPT's default."""
    return cfg.max_iters if cfg.lr_decay_iters == NANOGPT_LENGTH else cfg.lr_decay_iters


def warmup_iters(cfg):
    """Return the number of warm-up steps. This is the option warmup_iters, or a tenth of the
    schedule length if the option is not below that length."""
    length = schedule_length(cfg)
    return cfg.warmup_iters if cfg.warmup_iters < length else length // 10


def get_lr(it, cfg):
    """Return the learning rate of step `it`: linear warm-up, then cosine decay to min_lr at step
    lr_decay_iters, then min_lr. Without decay_lr the rate is learning_rate at all steps."""
    warmup = warmup_iters(cfg)
    if not cfg.decay_lr:
        return cfg.learning_rate
    if it < warmup:
        return cfg.learning_rate * (it + 1) / (warmup + 1)
    if it >= cfg.lr_decay_iters:
        return cfg.min_lr
    ratio = (it - warmup) / (cfg.lr_decay_iters - warmup)               # 0 to 1
    return cfg.min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (cfg.learning_rate - cfg.min_lr)


def build_optimizer(cfg, model, device):
    """Return the optimizer that `cfg` names, with the hook of model.register_step_hook. The hook
    runs after each step."""
    return model.register_step_hook(new_optimizer(cfg, model, device))


def new_optimizer(cfg, model, device):
    """Return the optimizer that `cfg` names, without the model's hook."""
    device_type, betas = torch.device(device).type, (cfg.beta1, cfg.beta2)
    if cfg.optimizer == 'muon':
        dtype = torch.bfloat16 if devices.has_native_bfloat16(device) else torch.float32
        return MuonAdamW(model, cfg.weight_decay, cfg.learning_rate, betas, device_type, dtype,
                         cfg.muon_per_head)
    return adamw(model.param_groups(cfg.weight_decay), cfg.learning_rate, betas, device_type)


def adamw_groups(groups):
    """Return the list of AdamW's groups: parameters that decay, parameters that do not decay, and
    parameters that decay by half. The first two groups are nanoGPT's, in the same order, so that
    each of the two repos can load the optimizer state of the other repo."""
    decay = groups['hidden'] | {
        'params': groups['embedding']['params'] + groups['hidden']['params']}
    return [{key: group[key] for key in ('params', 'weight_decay')}
            for group in (decay, groups['vector'], groups.get('halved')) if group]


def adamw(groups, learning_rate, betas, device_type):
    """Return AdamW for the groups of a model's `param_groups`."""
    return torch.optim.AdamW(adamw_groups(groups), lr=learning_rate, betas=betas,
                             fused=device_type in ('cpu', 'cuda', 'mps'))


# coefficients (a, b, c) of the first three steps of Polar Express (Amsel et al., arXiv:2505.16932)
POLAR_EXPRESS = ((8.28721201814563, -23.595886519098837, 17.300387312530933),
                 (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
                 (3.9486908534822946, -2.908902115962949, 0.5518191394370137))


def orthogonalize(g, dtype):
    """Orthogonalize each matrix in g (batch, m, n) approximately, in `dtype`. Returns a tensor of
    the same shape and dtype.

    The result for a matrix U S V^T is U f(S) V^T, where f(S) is about 1. The step
    X -> (a I + b X X^T + c (X X^T)^2) X is made three times. This maps singular values above 0.15%
    of the Frobenius norm to values between 0.18 and 1.87, and smaller ones to smaller values.
    """
    x = g.to(dtype)
    if g.size(-2) > g.size(-1):
        x = x.mT                                                    # (batch, small, large)
    # 1.01: rounding must not lift a singular value above 1, where the polynomials grow
    x = x / x.norm(dim=(-2, -1), keepdim=True).mul(1.01).clamp(min=1e-7)
    small, large = x.shape[-2:]
    # the Gram form makes the steps with small x small matrices. Rounding grows, so not in bfloat16
    if large >= 2 * small and dtype == torch.float32:
        gram = x @ x.mT
        product = step = polynomial(gram, *POLAR_EXPRESS[0])
        for coefficients in POLAR_EXPRESS[1:]:
            gram = step @ gram @ step
            step = polynomial(gram, *coefficients)
            product = step @ product
        x = product @ x
    else:
        for a, b, c in POLAR_EXPRESS:
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if g.size(-2) > g.size(-1) else x).to(g.dtype)


def polynomial(gram, a, b, c):
    """Return a I + b G + c G^2 for the matrices G in gram (batch, n, n)."""
    result = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    result.diagonal(dim1=-2, dim2=-1).add_(a)
    return result


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): steps are orthogonalized momenta.

    A parameter may hold several matrices below each other, such as W_q, W_k and W_v in nanoGPT's
    c_attn. Each of them is orthogonalized on its own. A group has two lists with one entry per
    parameter: 'matrices', the numbers of rows of its matrices, and 'rates', a factor of the
    learning rate that does not change the weight decay. Matrices of one shape are orthogonalized in
    one batch, because a sequence of small products uses little of a processor. `dtype` is the dtype
    of the orthogonalization. torch.optim.Muon has no such lists, batches and dtype. Learning rates
    have the scale of AdamW's: the entries of a step have a root mean square of about 0.2 times the
    rate (Liu et al., arXiv:2502.16982).
    """

    def __init__(self, params, lr, weight_decay, dtype, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        """Update all parameters that have a gradient. `closure` is ignored."""
        for group in self.param_groups:
            by_shape = {}                       # shape -> (rows of p, of its gradient and buffer)
            for p, heights, rate in zip(
                    group['params'], group['matrices'], group['rates'], strict=True):
                if p.grad is None:
                    continue
                if 'momentum_buffer' not in self.state[p]:
                    self.state[p]['momentum_buffer'] = torch.zeros_like(p.grad)
                end = 0
                for height, equal in groupby(heights):              # matrices of one shape
                    start, end = end, end + sum(equal)
                    by_shape.setdefault((height, p.size(1)), []).append((
                        *(t[start:end] for t in (p, p.grad, self.state[p]['momentum_buffer'])),
                        rate))
            for shape, entries in by_shape.items():
                heights = [len(p) for p, *_ in entries]
                batch = entries[0][0].new_empty(sum(heights) // shape[0], *shape)
                for (_, grad, buffer, _), update in zip(
                        entries, batch.flatten(0, 1).split(heights)):
                    buffer.lerp_(grad, 1 - group['momentum'])
                    torch.lerp(grad, buffer, group['momentum'], out=update)         # Nesterov
                steps = orthogonalize(batch, self.dtype).flatten(0, 1).split(heights)
                for (p, _, _, rate), step in zip(entries, steps):
                    p.mul_(1 - group['lr'] * group['weight_decay'])
                    p.add_(step, alpha=-group['lr'] * rate * 0.2 * max(shape) ** 0.5)


class MuonAdamW:
    """Muon and AdamW behind the interface of one optimizer. Of the groups of model.param_groups,
    Muon gets 'hidden' and 'halved', AdamW gets the rest. `muon_dtype` is the dtype of Muon's
    orthogonalization. per_head: whether each head of queries, keys and values is a matrix."""

    def __init__(self, model, weight_decay, lr, betas, device_type, muon_dtype, per_head=False):
        groups, self.per_head = model.param_groups(weight_decay, per_head), per_head
        own = [groups[name] for name in ('hidden', 'halved') if name in groups]
        rest = [{key: groups[name][key] for key in ('params', 'weight_decay')}
                for name in ('embedding', 'vector')]
        fused = device_type in ('cpu', 'cuda', 'mps')
        self.optimizers = (Muon(own, lr, 0.0, muon_dtype),          # each group has its own decay
                           torch.optim.AdamW(rest, lr=lr, betas=betas, fused=fused))

    @property
    def param_groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self):
        return {p: state for optimizer in self.optimizers for p, state in optimizer.state.items()}

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def register_step_post_hook(self, hook):
        return self.optimizers[-1].register_step_post_hook(hook)

    def zero_grad(self, set_to_none=True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self):
        return {'muon': self.optimizers[0].state_dict(), 'adamw': self.optimizers[1].state_dict()}

    def load_state_dict(self, state):
        self.optimizers[0].load_state_dict(state['muon'])
        self.optimizers[1].load_state_dict(state['adamw'])


def swap_params(optimizer, model, old):
    """Give an optimizer the current parameters of its model. The state of the parameters in the
    list `old`, which were replaced or changed, is deleted. New parameters start without state in
    AdamW, and with zero momentum in Muon."""
    for part in getattr(optimizer, 'optimizers', (optimizer,)):
        for p in old:
            part.state.pop(p, None)
    muon = isinstance(optimizer, MuonAdamW)
    groups = (model.param_groups(0.0, optimizer.per_head).values() if muon else
              adamw_groups(model.param_groups(0.0)))
    for group, own in zip(optimizer.param_groups, groups):
        group.update({key: own[key] for key in ('params', 'matrices', 'rates') if key in group})
    if muon:  # a GradScaler may skip this step, but a checkpoint needs the state of all parameters
        for p in (p for group in optimizer.optimizers[0].param_groups for p in group['params']):
            optimizer.optimizers[0].state[p].setdefault('momentum_buffer', torch.zeros_like(p))


def restore_optimizer(optimizer, saved, cropped):
    """Load the state dict `saved` into an optimizer. The optimizer keeps its own options
    (weight decay, betas). `cropped` is a parameter that may have fewer rows than when it was saved.
    Raises ValueError if the state does not fit the optimizer."""
    options = [{key: value for key, value in group.items() if key != 'params'}
               for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(saved)
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError) as e:
        raise ValueError(
            f'its optimizer state does not fit: {type(e).__name__}: {one_line(e)[:100]}') from None
    for group, own in zip(optimizer.param_groups, options):
        group.update(own)
    state = optimizer.state.get(cropped, {})
    for key, value in state.items():
        if value.dim() == 2:
            state[key] = value[:len(cropped)].clone()

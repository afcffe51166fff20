"""Learning rate and optimizers: nanoGPT's AdamW, or AdamW with Muon for hidden matrices.

A model provides its parameters with `param_groups(weight_decay)`, a dict from names to parameter
groups. The groups 'hidden' (matrices of the blocks) and 'embedding' decay. The group 'vector'
(biases, LayerNorm) does not. The optional group 'halved' holds pairs of factors and decays by half
as much, because the decay of either factor shrinks the product. Every trainable parameter is in
exactly one group.
"""

import math

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
    groups = model.param_groups(cfg.weight_decay)
    if cfg.optimizer == 'muon':
        dtype = torch.bfloat16 if devices.has_native_bfloat16(device) else torch.float32
        return MuonAdamW(groups, cfg.learning_rate, betas, device_type, dtype)
    return adamw(groups, cfg.learning_rate, betas, device_type)


def adamw_groups(groups):
    """Return the list of AdamW's groups: parameters that decay, parameters that do not decay, and
    parameters that decay by half. The first two groups are nanoGPT's, in the same order, so that
    each of the two repos can load the optimizer state of the other repo."""
    decay = groups['hidden'] | {
        'params': groups['embedding']['params'] + groups['hidden']['params']}
    return [decay, groups['vector'], *([groups['halved']] if 'halved' in groups else [])]


def adamw(groups, learning_rate, betas, device_type):
    """Return AdamW for the groups of a model's `param_groups`."""
    return torch.optim.AdamW(adamw_groups(groups), lr=learning_rate, betas=betas,
                             fused=device_type in ('cpu', 'cuda', 'mps'))


class Muon(torch.optim.Muon):
    """torch.optim.Muon (Jordan et al. 2024) with a choice of the dtype of the orthogonalization.

    torch's Muon always uses bfloat16, which is slow on devices that emulate bfloat16. Matrices of
    one shape are orthogonalized in one batch, because a sequence of small products uses little of a
    processor. Learning rates have the scale of AdamW's learning rates (`match_rms_adamw`, Liu et
    al., arXiv:2502.16982).
    """

    def __init__(self, params, lr, weight_decay, dtype):
        super().__init__(params, lr=lr, weight_decay=weight_decay, momentum=0.95,
                         adjust_lr_fn='match_rms_adamw')
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        """Update all parameters that have a gradient. `closure` is ignored."""
        for group in self.param_groups:
            by_shape = {}
            for p in group['params']:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                updates = []
                for p in params:
                    if 'momentum_buffer' not in self.state[p]:
                        self.state[p]['momentum_buffer'] = torch.zeros_like(p.grad)
                    buffer = self.state[p]['momentum_buffer']
                    buffer.lerp_(p.grad, 1 - group['momentum'])
                    updates.append(p.grad.lerp(buffer, group['momentum']))  # Nesterov
                updates = self._orthogonalize(torch.stack(updates), group)  # (params, m, n)
                for p, update in zip(params, updates):
                    p.mul_(1 - group['lr'] * group['weight_decay'])
                    # torch raises an error for a factor beyond float32; training with the largest
                    # float32 diverges, too
                    p.add_(update, alpha=-min(group['lr'] * 0.2 * max(shape) ** 0.5,
                                              torch.finfo(p.dtype).max))

    def _orthogonalize(self, g, group):
        """Orthogonalize each matrix U S V^T in g (params, m, n) by Newton-Schulz iterations. The
        result approximates U V^T and has singular values of about 0.7 to 1.2."""
        a, b, c = group['ns_coefficients']
        x = g.to(self.dtype)
        if g.size(-2) > g.size(-1):
            x = x.mT
        x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=group['eps'])
        for _ in range(group['ns_steps']):
            gram = x @ x.mT                                         # (params, small, small)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return (x.mT if g.size(-2) > g.size(-1) else x).to(g.dtype)


class MuonAdamW:
    """Muon and AdamW behind the interface of one optimizer. `groups` is the dict of a model's
    `param_groups`. Muon gets 'hidden' and 'halved', AdamW gets the rest. `muon_dtype` is the dtype
    of Muon's orthogonalization."""

    def __init__(self, groups, lr, betas, device_type, muon_dtype):
        own = [groups[name] for name in ('hidden', 'halved') if name in groups]
        rest = [groups[name] for name in ('embedding', 'vector')]
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
    muon, groups = isinstance(optimizer, MuonAdamW), model.param_groups(0.0)
    for group, own in zip(optimizer.param_groups,
                          groups.values() if muon else adamw_groups(groups)):
        group['params'] = own['params']
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

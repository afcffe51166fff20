"""The optimizer and its learning rate: AdamW as in nanoGPT, or Muon for the hidden matrices and
AdamW for the rest.

A model hands over its parameters by `param_groups(weight_decay)`: name -> parameter group, where
'hidden' (matrices of blocks) and 'embedding' decay, 'vector' (biases, LayerNorm) does not, and
'halved', if there is one, decays by half as much: factors that both shrink their product. Every
trainable parameter is in exactly one.
"""

import math

import torch

from runtime import device as devices
from runtime.config import one_line

NANOGPT_LENGTH = 600000  # nanoGPT's lr_decay_iters by default, in its checkpoints and older ones


def schedule_length(cfg):
    """lr_decay_iters, or max_iters where that was left at its default. Stopped early, a run keeps
    its schedule."""
    return cfg.max_iters if cfg.lr_decay_iters == NANOGPT_LENGTH else cfg.lr_decay_iters


def warmup_iters(cfg):
    """Steps of warm-up: as asked for if the schedule is longer than that, else a tenth of it."""
    length = schedule_length(cfg)
    return cfg.warmup_iters if cfg.warmup_iters < length else length // 10


def get_lr(it, cfg):
    """Learning rate of step `it`: linear warm-up, cosine to min_lr at lr_decay_iters, min_lr after
    it."""
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
    """The optimizer of a model that cfg names, with the model's own hook after each step
    (`register_step_hook`)."""
    return model.register_step_hook(new_optimizer(cfg, model, device))


def new_optimizer(cfg, model, device):
    """The optimizer that cfg names, without the model's hook."""
    device_type, betas = torch.device(device).type, (cfg.beta1, cfg.beta2)
    groups = model.param_groups(cfg.weight_decay)
    if cfg.optimizer == 'muon':
        dtype = torch.bfloat16 if devices.has_native_bfloat16(device) else torch.float32
        return MuonAdamW(groups, cfg.learning_rate, betas, device_type, dtype)
    return adamw(groups, cfg.learning_rate, betas, device_type)


def adamw_groups(groups):
    """What decays, what does not, and what decays by half -> list of groups. The first two are
    nanoGPT's, in its order, so that optimizer states move between the two repos."""
    decay = groups['hidden'] | {
        'params': groups['embedding']['params'] + groups['hidden']['params']}
    return [decay, groups['vector'], *([groups['halved']] if 'halved' in groups else [])]


def adamw(groups, learning_rate, betas, device_type):
    """groups: of a model's `param_groups`."""
    return torch.optim.AdamW(adamw_groups(groups), lr=learning_rate, betas=betas,
                             fused=device_type in ('cpu', 'cuda', 'mps'))


class Muon(torch.optim.Muon):
    """torch.optim.Muon (Jordan et al. 2024) whose orthogonalisation may run in float32.

    torch fixes it to bfloat16, which crawls where that is emulated. Matrices of one shape are
    orthogonalised in one batch: a dozen small products in a row leave most of a processor idle.
    Learning rates mean what they mean for AdamW (`match_rms_adamw`, Liu et al. 2025,
    arXiv:2502.16982).
    """

    def __init__(self, params, lr, weight_decay, dtype):
        super().__init__(params, lr=lr, weight_decay=weight_decay, momentum=0.95,
                         adjust_lr_fn='match_rms_adamw')
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
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
                    # a factor that float32 does not hold is an error to torch; the largest one
                    # diverges as well
                    p.add_(
                        update, alpha=-min(group['lr'] * 0.2 * max(shape) ** 0.5,
                                           torch.finfo(p.dtype).max))

    def _orthogonalize(self, g, group):
        """g (params, m, n) -> about U V^T of each: Newton-Schulz, singular values end near 0.7 to
        1.2."""
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
    """Muon and AdamW as one: param_groups, step, zero_grad, state_dict, load_state_dict, as
    train.py uses them.

    groups: of a model's `param_groups`; 'hidden' and 'halved' go to Muon.
    """

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
    """Let an optimizer have the parameters that its model has now. Those in the list `old`, which
    were replaced or have other values now, lose their state; new ones begin with none, or with
    momenta of 0."""
    for part in getattr(optimizer, 'optimizers', (optimizer,)):
        for p in old:
            part.state.pop(p, None)
    muon, groups = isinstance(optimizer, MuonAdamW), model.param_groups(0.0)
    for group, own in zip(optimizer.param_groups,
                          groups.values() if muon else adamw_groups(groups)):
        group['params'] = own['params']
    if muon:  # a GradScaler may skip this step: a checkpoint then needs every parameter's state
        for p in (p for group in optimizer.optimizers[0].param_groups for p in group['params']):
            optimizer.optimizers[0].state[p].setdefault('momentum_buffer', torch.zeros_like(p))


def restore_optimizer(optimizer, saved, cropped):
    """Load the state dict `saved` of an optimizer. Its options (weight decay, betas) do not count:
    those that `optimizer` was made with do. cropped: a parameter that may have lost its last rows
    since. Raises ValueError for a state that is not this optimizer's."""
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

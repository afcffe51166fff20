"""Muon for the hidden matrices, AdamW for everything else, behind one optimizer's interface."""

import torch

from runtime import device as devices
from runtime.config import one_line


def build_optimizer(cfg, model, device):
    """The optimizer of a GPT that cfg names, whose steps the model follows (`GPT.update_bases_after_steps_of`)."""
    return model.update_bases_after_steps_of(new_optimizer(cfg, model, device))


def new_optimizer(cfg, model, device):
    """The same without the model's hook."""
    device_type, betas = torch.device(device).type, (cfg.beta1, cfg.beta2)
    if cfg.optimizer == 'muon':
        dtype = torch.bfloat16 if devices.has_native_bfloat16(device) else torch.float32
        return MuonAdamW(gpt_groups(model, cfg.weight_decay), cfg.learning_rate, betas, device_type, dtype)
    return adamw(model, cfg.weight_decay, cfg.learning_rate, betas, device_type)


def gpt_groups(model, weight_decay):
    """A GPT's parameters in groups for Muon: 'hidden' (matrices of blocks) and 'embedding' (wte, wpe) decay, 'vector'
    (biases, LayerNorm) does not, 'halved' by half as much (`factor_params`). Every trainable parameter is in exactly
    one. -> dict name -> group."""
    halved = factor_params(model)
    decays = dict(hidden=weight_decay, halved=weight_decay / 2, embedding=weight_decay, vector=0.0)
    if halved is None:
        del decays['halved']
    groups = {name: {'params': [], 'weight_decay': decay} for name, decay in decays.items()}
    for name, p in model.named_parameters():                        # tied weights appear once
        if p.requires_grad:
            kind = 'vector' if p.dim() < 2 else 'halved' if p in (halved or ()) else (
                'hidden' if name.startswith('transformer.h.') else 'embedding')
            groups[kind]['params'].append(p)
    return groups


def adamw_groups(model, weight_decay):
    """For AdamW: what has two dimensions and decays, and what does not, each in the model's order: nanoGPT's, so that
    optimizer states move between the two repos. A third group decays by half as much (`factor_params`). -> list."""
    halved = factor_params(model)
    params = [p for p in model.parameters() if p.requires_grad and p not in (halved or ())]
    groups = [{'params': [p for p in params if (p.dim() >= 2) == decays], 'weight_decay': weight_decay * decays}
              for decays in (True, False)]
    return groups if halved is None else [*groups, {'params': [*halved], 'weight_decay': weight_decay / 2}]


def factor_params(model):
    """The parameters of all modules with a method `factor_params`, in order, as the keys of a dict; None: the model has
    no such module. They may have none now and some later."""
    modules = [module for module in model.modules() if hasattr(module, 'factor_params')]
    return dict.fromkeys(p for module in modules for p in module.factor_params()) if modules else None


def adamw(model, weight_decay, learning_rate, betas, device_type):
    return torch.optim.AdamW(adamw_groups(model, weight_decay), lr=learning_rate, betas=betas,
                             fused=device_type in ('cpu', 'cuda', 'mps'))


class Muon(torch.optim.Muon):
    """torch.optim.Muon (Jordan et al. 2024) whose orthogonalisation may run in float32.

    torch fixes it to bfloat16, which crawls where that is emulated. Matrices of one shape are orthogonalised in one
    batch: a dozen small products in a row leave most of a processor idle. Learning rates mean what they mean for AdamW
    (`match_rms_adamw`, Liu et al. 2025, arXiv:2502.16982).
    """

    def __init__(self, params, lr, weight_decay, dtype):
        super().__init__(params, lr=lr, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn='match_rms_adamw')
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
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
                    updates.append(p.grad.lerp(buffer, group['momentum']))                      # Nesterov
                updates = self._orthogonalize(torch.stack(updates), group)                      # (params, m, n)
                for p, update in zip(params, updates):
                    p.mul_(1 - group['lr'] * group['weight_decay'])
                    # a factor that float32 does not hold is an error to torch; the largest one diverges as well
                    p.add_(update, alpha=-min(group['lr'] * 0.2 * max(shape) ** 0.5, torch.finfo(p.dtype).max))

    def _orthogonalize(self, g, group):
        """g (params, m, n) -> about U V^T of each: Newton-Schulz, singular values end near 0.7 to 1.2."""
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
    """Muon and AdamW as one: param_groups, step, zero_grad, state_dict, load_state_dict, as train.py uses them.

    groups: dict name -> parameter group, as `gpt_groups` makes it; 'hidden' and 'halved' go to Muon.
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
    """Let a GPT's optimizer, of `adamw` or MuonAdamW, have the parameters that its model has now. Those in the list
    `old`, which were replaced or have other values now, lose their state; new ones begin with none, or momenta of 0."""
    for part in getattr(optimizer, 'optimizers', (optimizer,)):
        for p in old:
            part.state.pop(p, None)
    muon = isinstance(optimizer, MuonAdamW)
    now = gpt_groups(model, 0.0).values() if muon else adamw_groups(model, 0.0)
    for group, own in zip(optimizer.param_groups, now):
        group['params'] = own['params']
    if muon:                        # a GradScaler may skip this step: a checkpoint then needs every parameter's state
        for p in (p for group in optimizer.optimizers[0].param_groups for p in group['params']):
            optimizer.optimizers[0].state[p].setdefault('momentum_buffer', torch.zeros_like(p))


def restore_optimizer(optimizer, saved, steps, cropped):
    """Load the state dict `saved` of an optimizer that took `steps` steps. Its options (weight decay, betas) do not
    count: those that `optimizer` was made with do. cropped: a parameter that may have lost its last rows since. Raises
    ValueError, where torch would load what fails later, for a state that is not this optimizer's."""
    options = [{k: v for k, v in group.items() if k != 'params'} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(saved)
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError) as e:
        raise ValueError(f'{type(e).__name__}: {one_line(e)[:100]}') from None
    for group, own in zip(optimizer.param_groups, options):
        group.update(own)
    kinds, states = ({'momentum_buffer'}, {'step', 'exp_avg', 'exp_avg_sq'}), optimizer.state
    for p in (p for group in optimizer.param_groups for p in group['params']):
        state = states.get(p, {})
        if not steps and not state:
            continue
        if set(state) not in kinds or not all(torch.is_tensor(value) for value in state.values()):
            raise ValueError(f'a parameter has {", ".join(map(str, state)) or "nothing"} in it')
        for key, value in state.items():
            if p is cropped and value.dim() == 2 and value.shape[0] > p.shape[0]:
                state[key] = value = value[:p.shape[0]].clone()
            if value.shape != (p.shape if key != 'step' else ()) or not value.isfinite().all() or (
                    key in ('step', 'exp_avg_sq') and value.min() < 0):
                raise ValueError(f'{key} of shape {tuple(value.shape)}, or with impossible values, for a parameter of '
                                 f'shape {tuple(p.shape)}')

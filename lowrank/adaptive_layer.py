"""Adaptive SVD: a linear layer that can protect its leading singular directions
(`AdaptiveSVDLinear`), and the controller that switches such layers (`AdaptiveSVD`).

Every few steps the controller analyzes each layer with the functions of lowrank/adaptive_svd.py.

Letters: weight W (m, n) = U S V^T, g = min(m, n), r minor components, which are trained, and
k = g - r principal components, which are protected.
"""

import torch
from torch.nn import functional as F

from lowrank.adaptive_svd import (DANGER_ALIGNMENT, DANGER_EXCESS, FIRST_PRINCIPAL,
                                  compute_gradient_alignment, should_use_lowrank_training)
from lowrank.layers import AdaptedLinear, FactoredLinear, empty_linear
from lowrank.svd import balanced_factors

PROTECTIONS = ('left', 'none')
# panels of the figure of a run: label -> metric, guide lines
CURVES = {'gradient in the\nprincipal space': ('principal_alignment',
                                               {'danger': DANGER_ALIGNMENT}),
          'gradient in the\nminor space': ('minor_alignment', {}),
          'beyond chance': ('excess', {'chance': 0.0, 'danger': DANGER_EXCESS}),
          'mode': ('mode', {}), 'trained\ncomponents r': ('r', {})}
# times sigma_1: floor of `balanced_factors`, so that no row of A starts near zero
FLOOR = 1e-3
PATIENCE = 3                # analyses in a row that must propose a smaller r before r shrinks
# analyses in a row without a reason for low-rank mode after which it ends
STABLE_ANALYSES = 5
# what an analysis does to a layer, as text
ACTIONS = {'initial': 'Initial SVD computed', 'none': 'full mode - {reason}',
           'lowrank': 'SWITCHED TO LOW-RANK (r={r}) - Reason: {reason}',
           'refactored': 'low-rank mode (r={r}) - {reason}',
           'full': f'SWITCHED TO FULL - Reason: nothing to protect in {STABLE_ANALYSES} analyses '
                   'in a row'}


class AdaptiveSVDLinear(AdaptedLinear):
    """Linear layer y = W x + b that trains W in one of two modes.

    Full mode trains W, as nn.Linear does. Low-rank mode writes W = W_p + B A. It freezes W_p (m, n)
    and trains B (m, r) and A (r, n). B A starts as the sum of the r minor singular components of W.
    The buffer `protected` (m, k) holds U_p, the k principal left singular vectors.

    With protection 'left', `project_factors` removes from B the part in the span of U_p. U_p^T W
    therefore stays equal to its value at the switch. B itself is projected, because AdamW's
    element-wise scaling would undo a projection of the gradient. With protection 'none', B A can
    change any component, as in MiLoRA (arXiv:2406.09044).

    A switch does not change the output, because W_p is set to W - B A. Low-rank mode saves no
    memory. With r = 246 and g = 256, the layer holds 2.9 times as many parameters as in full mode.
    """

    def __init__(self, linear, protection='left'):
        """Wrap an nn.Linear and keep its parameters. The layer starts in full mode."""
        super().__init__()
        self.base, self.protection = linear, protection
        self.A = self.B = None
        self.register_buffer('protected', None)

    def allocate_factors(self, r):
        """Enter low-rank mode with 1 <= r < g. This allocates A and B. Their values are set later.
        If the layer has factors of this r already, the parameters stay the same objects, so that an
        optimizer still knows them."""
        like, (m, n) = self.base.weight, self.base.weight.shape
        if self.r != r:
            self.A, self.B = empty_linear(n, r, False, like), empty_linear(r, m, False, like)
            self.protected = like.new_zeros(m, min(m, n) - r)
        like.requires_grad_(False)

    def forward(self, x):
        """x (..., n) -> (..., m). For at least m n / (m + n) rows of x, W_p + B A is computed
        first, because this costs no more than B (A x)."""
        (m, n), rows = self.base.weight.shape, x.numel() // x.size(-1)
        if self.A is not None and rows * (m + n) < m * n:
            return self.base(x) + self.B(self.A(x))
        return F.linear(x, self.weight, self.bias)

    r = FactoredLinear.rank                                         # None in full mode

    def factor_params(self) -> list[torch.nn.Parameter]:
        """Return the weights of A and B, or [] in full mode. The weight decay of each factor is
        halved, because the decay of either factor shrinks the product."""
        return [] if self.A is None else [self.A.weight, self.B.weight]

    def track_weight_grad(self, on):
        """Choose whether backward passes in low-rank mode store dL/dW in `base.weight.grad`. There
        `base.weight` is W_p, which no optimizer updates. Full mode always stores dL/dW."""
        self.base.weight.requires_grad_(on or self.A is None)

    @torch.no_grad()
    def switch_to_lowrank(self, r, usv: tuple | None = None):
        """Train the r minor components of the current W. A layer that is in low-rank mode already
        is decomposed again. usv: `thin_svd` of W, or None to compute it here. If `base.weight.grad`
        holds dL/dW, the gradients of A and B are computed from dL/dW, which is then deleted."""
        W, like = self.merged_weight(), self.base.weight
        U, S, V = usv or thin_svd(self.weight)
        k = len(S) - r
        self.allocate_factors(r)
        self.set_factors(*balanced_factors(U[:, k:], S[k:], V[:, k:].mT, FLOOR * S[0]))
        self.protected.copy_(U[:, :k])
        like.copy_((W - self.product()).to(like.dtype))             # B A after rounding
        if like.grad is not None:
            self.B.weight.grad = like.grad @ self.A.weight.mT
            self.A.weight.grad = self.B.weight.mT @ like.grad
            like.grad = None

    @torch.no_grad()
    def switch_to_full(self):
        """Train all of W from now on."""
        self.base.weight.copy_(self.merged_weight().to(self.base.weight.dtype))
        self.A = self.B = self.protected = None
        self.base.weight.requires_grad_(True)

    @torch.no_grad()
    def project_factors(self):
        """Remove the protected directions from B. Call this after each optimizer step."""
        if self.A is not None and self.protection == 'left':
            self.B.weight -= self.protected @ (self.protected.mT @ self.B.weight)   # (m, k) (k, r)


def to_float32(tensor):
    """Return a detached CPU tensor in at least float32. The result may share memory with the
    input."""
    return tensor.detach().cpu().to(torch.promote_types(tensor.dtype, torch.float32))


def thin_svd(weight):
    """SVD of a weight (m, n) in at least float32 on the CPU -> U (m, g), S (g), V (n, g)."""
    U, S, Vh = torch.linalg.svd(to_float32(weight), full_matrices=False)
    return U, S, Vh.mT


def switch(layer, r: int | None, swap_params, usv: tuple | None = None):
    """Switch a layer to low-rank mode with r minor components, also from another r. r=None switches
    to full mode. swap_params(old) gives the optimizer the new parameters, whose momenta start from
    zero. In tests with an analysis every 20 steps, keeping the old momenta did not change the loss
    (docs/ADAPTIVE.md)."""
    old = layer.factor_params() or [layer.base.weight]
    if r is None:
        layer.switch_to_full()
    else:
        layer.switch_to_lowrank(r, usv)
    swap_params(old)


# --------------------------------------------------------------------------------------------------
# the controller

class AdaptiveSVD:
    """Controller that analyzes layers every `interval` steps and switches their modes.

    layers: name -> layer. The state for a checkpoint is one dict per layer: U and S of the last
    analysis, the last r, and two counts. 'patience' counts the last analyses in a row that proposed
    a smaller r. 'calm' counts those that gave no reason for low-rank mode. `diagnostics` holds the
    results and the action of the last analysis per layer.
    """

    def __init__(self, layers: dict[str, AdaptiveSVDLinear], interval):
        self.layers, self.interval = layers, interval
        self.memory = {name: dict(U=None, S=None, r=None, patience=0, calm=0) for name in layers}
        self.diagnostics, self._analyzed = {}, {}

    def state_dict(self):
        return {name: dict(memory) for name, memory in self.memory.items()}

    def load_state_dict(self, state):
        self.memory = {name: dict(state[name]) for name in self.layers}

    def is_analysis_step(self, step):
        """Return whether the layers are analyzed at a step, counted from 1."""
        return step % self.interval == 0

    def track_weight_grads(self):
        """Make all layers store dL/dW. Call this before the backward passes of an analysis step."""
        for layer in self.layers.values():
            layer.track_weight_grad(True)

    @torch.no_grad()
    def analyze(self, step, swap_params, mean=lambda tensor: tensor, on_main=lambda f: f()):
        """Analyze all layers with the gradients of this step and switch modes. Call this before the
        optimizer's step.

        swap_params(old) replaces the parameters `old` in the optimizer by those that the layers
        have now. With several processes, mean(tensor) averages a tensor over the processes, and
        on_main(f) returns the f() of process 0. Returns whether any layer got new parameters.
        `report` and `metrics` give the results.
        """
        for layer in self.layers.values():
            weight = layer.base.weight
            if layer.r is not None and weight.grad is not None:     # DDP averages it in full mode
                weight.grad = mean(weight.grad)
        analyses = on_main(lambda: [self._analysis(name, step) for name in self.layers])
        for layer in self.layers.values():
            layer.track_weight_grad(False)                          # before parameters are swapped
        ranks = [layer.r for layer in self.layers.values()]
        for name, analysis in zip(self.layers, analyses):
            self._act(name, *analysis, swap_params)
        return ranks != [layer.r for layer in self.layers.values()]

    @torch.no_grad()
    def project_factors(self):
        """Remove the protected directions from all factors. Call this after each optimizer step."""
        for layer in self.layers.values():
            layer.project_factors()
        for name, (W, r) in self._analyzed.items():         # the step after an analysis
            update, memory = to_float32(self.layers[name].weight) - W, self.memory[name]
            self.diagnostics[name]['update_alignment'], _ = compute_gradient_alignment(
                update, memory['U'], memory['S'], r)
        self._analyzed = {}

    def report(self, step) -> list[str]:
        """Return the last analysis as lines of text."""
        lines = [f'[{name}] {ACTIONS[found["action"]].format(**found)}'
                 for name, found in self.diagnostics.items()]
        return [f'=== SVD Analysis at step {step} ===', *lines, '=== SVD Analysis complete ===']

    def metrics(self):
        """Return the last analysis for metrics.jsonl: {'svd/block0.attn.c_q/mode': 'full', ...}."""
        return {f'svd/{name}/{key}': value for name, found in self.diagnostics.items()
                for key, value in found.items() if value is not None}

    def _analysis(self, name, step):
        """Analyze one layer. Returns the result of `should_use_lowrank_training`, the r that the
        analysis assumed, and the SVD of W: U, S and, if the layer gets factors, V."""
        layer, memory = self.layers[name], self.memory[name]
        W = to_float32(layer.weight)                                # (m, n)
        r = layer.r or memory['r'] or max(1, min(W.shape) - FIRST_PRINCIPAL)
        usv = thin_svd(W)
        decision, r_next, found = should_use_lowrank_training(
            W, *usv, None, memory['U'], memory['S'], None, layer.base.weight.grad, r, step,
            in_lowrank_mode=layer.r is not None)
        return decision, r_next, found, r, usv if decision or layer.r is not None else usv[:2]

    def _act(self, name, decision, r_next, found, r, usv, swap_params):
        """Switch a layer if needed, and store its mode, r and action in `diagnostics`."""
        layer, memory = self.layers[name], self.memory[name]
        action = 'initial' if memory['S'] is None else 'none'
        memory['U'], memory['S'] = (t.float().cpu() for t in usv[:2])
        if layer.r is None and decision:
            memory['patience'] = memory['calm'] = 0
            action = 'lowrank'
            switch(layer, r, swap_params, usv)
        elif layer.r is not None:
            informative = found['lift'] is not None     # a zero gradient has no information
            memory['calm'] = 0 if decision else memory['calm'] + informative
            memory['patience'] = memory['patience'] + 1 if r_next < layer.r else 0
            action, new_r = 'full', None
            if memory['calm'] < STABLE_ANALYSES:
                action, new_r = 'refactored', r_next if memory['patience'] >= PATIENCE else layer.r
                memory['patience'] %= PATIENCE
            switch(layer, new_r, swap_params, usv)
        memory['r'] = layer.r or memory['r']            # r if low-rank mode starts again
        mode, r_now = ('full', len(usv[1])) if layer.r is None else ('lowrank', layer.r)
        self.diagnostics[name] = found | dict(mode=mode, r=r_now, action=action)
        self._analyzed[name] = to_float32(layer.weight).clone(), r

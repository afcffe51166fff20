"""A linear layer that can protect what it has learned (`AdaptiveSVDLinear`), and when it does so
(`AdaptiveSVD`): an analysis of each layer every so many steps, by lowrank/adaptive_svd.py.

Letters: weight W (m, n) = U S V^T, g = min(m, n), r trained minor components, k = g - r principal.
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
FLOOR = 1e-3           # of sigma_1: rows of A are no shorter than its root, so no direction is dead
PATIENCE = 3                # analyses in a row that propose a smaller r, before r becomes smaller
STABLE_ANALYSES = 5         # analyses in a row without a reason for low-rank mode, before it ends
# what an analysis does to a layer, as text
ACTIONS = {'initial': 'Initial SVD computed', 'none': 'full mode - {reason}',
           'lowrank': 'SWITCHED TO LOW-RANK (r={r}) - Reason: {reason}',
           'refactored': 'low-rank mode (r={r}) - {reason}',
           'full': f'SWITCHED TO FULL - Reason: nothing to protect from in {STABLE_ANALYSES} '
                   'analyses'}


class AdaptiveSVDLinear(AdaptedLinear):
    """y = W x + b in one of two modes.

    full: W is trained, as in nn.Linear.
    low-rank: W = W_p + B A. B (m, r) and A (r, n) begin as the r minor components and are trained;
    W_p (m, n), the rest, is frozen. `protected` (m, k), U_p, has the k principal left singular
    vectors. With protection 'left', `project_factors` removes from B what lies in their span, so
    U_p^T W stays what it was at the switch. The parameters are projected, not the gradient, because
    AdamW's element-wise scaling would undo the latter. With 'none' the factors are free and can
    rebuild and cancel any component: MiLoRA (arXiv:2406.09044).

    Switches keep the function, W_p := W - B A. At r = 246 of g = 256 low-rank mode holds 2.9 times
    the numbers of full mode: it protects, and saves nothing.
    """

    def __init__(self, linear, protection='left'):
        """In full mode, with the parameters of an nn.Linear."""
        super().__init__()
        self.base, self.protection = linear, protection
        self.A = self.B = None
        self.register_buffer('protected', None)

    def allocate_factors(self, r):
        """Low-rank mode with 1 <= r < g, for values that are set later. Parameters keep their
        identity, which an optimizer may know, where r stays."""
        like, (m, n) = self.base.weight, self.base.weight.shape
        if self.r != r:
            self.A, self.B = empty_linear(n, r, False, like), empty_linear(r, m, False, like)
            self.protected = like.new_zeros(m, min(m, n) - r)
        like.requires_grad_(False)

    def forward(self, x):
        """x (..., n) -> (..., m). W_p + B A is computed where x has many rows: from m n / (m + n)
        of them on that costs no more than B A x."""
        (m, n), rows = self.base.weight.shape, x.numel() // x.size(-1)
        if self.A is not None and rows * (m + n) < m * n:
            return self.base(x) + self.B(self.A(x))
        return F.linear(x, self.weight, self.bias)

    r = FactoredLinear.rank                                         # None in full mode

    def factor_params(self) -> list[torch.nn.Parameter]:
        """The factors, whose weight decay is halved: both shrink the product."""
        return [] if self.A is None else [self.A.weight, self.B.weight]

    def track_weight_grad(self, on):
        """Whether backward passes leave dL/dW in `base.weight.grad`, which they always do in full
        mode. W_p is a parameter that no optimizer has, and its gradient is that of W."""
        self.base.weight.requires_grad_(on or self.A is None)

    @torch.no_grad()
    def switch_to_lowrank(self, r, usv: tuple | None = None):
        """From here on train the r minor components; in low-rank mode, decompose what W is now.

        usv: `thin_svd` of W, computed here if None. Where `base.weight.grad` has dL/dW, A and B get
        theirs and it is dropped.
        """
        W, like = self.merged_weight(), self.base.weight
        U, S, V = usv or thin_svd(self.weight)
        k = len(S) - r
        self.allocate_factors(r)
        self.set_factors(*balanced_factors(U[:, k:], S[k:], V[:, k:].mT, FLOOR * S[0]))
        self.protected.copy_(U[:, :k])
        like.copy_((W - self.product()).to(like.dtype))             # of the rounded factors
        if like.grad is not None:
            self.B.weight.grad = like.grad @ self.A.weight.mT
            self.A.weight.grad = self.B.weight.mT @ like.grad
            like.grad = None

    @torch.no_grad()
    def switch_to_full(self):
        """Train all of W from here on."""
        self.base.weight.copy_(self.merged_weight().to(self.base.weight.dtype))
        self.A = self.B = self.protected = None
        self.base.weight.requires_grad_(True)

    @torch.no_grad()
    def project_factors(self):
        """Remove from B what lies in the protected space; to be called after each optimizer
        step."""
        if self.A is not None and self.protection == 'left':
            self.B.weight -= self.protected @ (self.protected.mT @ self.B.weight)   # (m, k) (k, r)


def to_float32(tensor):
    """In at least float32 on the CPU, detached; may share memory."""
    return tensor.detach().cpu().to(torch.promote_types(tensor.dtype, torch.float32))


def thin_svd(weight):
    """U (m, g), S (g) descending and V (n, g) of a weight (m, n), in at least float32 on the
    CPU."""
    U, S, Vh = torch.linalg.svd(to_float32(weight), full_matrices=False)
    return U, S, Vh.mT


def switch(layer, r: int | None, swap_params, usv: tuple | None = None):
    """Low-rank mode with r, also from another r, or full mode for r None. The optimizer has the new
    parameters from here on, without a state: carrying momenta from one to the other changed no loss
    with an analysis every 20 steps (docs/ADAPTIVE.md)."""
    old = layer.factor_params() or [layer.base.weight]
    if r is None:
        layer.switch_to_full()
    else:
        layer.switch_to_lowrank(r, usv)
    swap_params(old)


# --------------------------------------------------------------------------------------------------
# the controller

class AdaptiveSVD:
    """Decides the mode of layers, by name, by an analysis every `interval` steps.

    The state for a checkpoint is a dict of tensors and numbers per layer: the last basis U and S,
    the last r, and how many analyses in a row proposed a smaller r ('patience') or saw no reason
    for low-rank mode ('calm'). `diagnostics` has what the last analysis found and did, per layer.
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
        """Whether a step, counted from 1, has an analysis."""
        return step % self.interval == 0

    def track_weight_grads(self):
        """To be called before the backward passes of an analysis step."""
        for layer in self.layers.values():
            layer.track_weight_grad(True)

    @torch.no_grad()
    def analyze(self, step, swap_params, mean=lambda tensor: tensor, on_main=lambda f: f()):
        """Decide and switch, from the gradients of this step, before the optimizer's.

        swap_params(old): the optimizer forgets these parameters and has the layers' new ones. Over
        several processes: mean averages a tensor, on_main returns the main process's result of a
        function. Returns whether any layer has other parameters now. `report` and `metrics` say
        what was found and done.
        """
        for layer in self.layers.values():
            weight = layer.base.weight
            if layer.r is not None and weight.grad is not None:     # in full mode it is a mean
                weight.grad = mean(weight.grad)
        analyses = on_main(lambda: [self._analysis(name, step) for name in self.layers])
        for layer in self.layers.values():
            layer.track_weight_grad(False)                        # not while parameters are swapped
        ranks = [layer.r for layer in self.layers.values()]
        for name, analysis in zip(self.layers, analyses):
            self._act(name, *analysis, swap_params)
        return ranks != [layer.r for layer in self.layers.values()]

    @torch.no_grad()
    def project_factors(self):
        """To be called after each optimizer step."""
        for layer in self.layers.values():
            layer.project_factors()
        for name, (W, r) in self._analyzed.items():         # the optimizer's step after an analysis
            update, memory = to_float32(self.layers[name].weight) - W, self.memory[name]
            self.diagnostics[name]['update_alignment'], _ = compute_gradient_alignment(
                update, memory['U'], memory['S'], r)
        self._analyzed = {}

    def report(self, step) -> list[str]:
        """The last analysis as lines of text."""
        lines = [f'[{name}] {ACTIONS[found["action"]].format(**found)}'
                 for name, found in self.diagnostics.items()]
        return [f'=== SVD Analysis at step {step} ===', *lines, '=== SVD Analysis complete ===']

    def metrics(self):
        """The last analysis for metrics.jsonl: 'svd/block0.attn.c_q/mode' -> 'full', and so on."""
        return {f'svd/{name}/{key}': value for name, found in self.diagnostics.items()
                for key, value in found.items() if value is not None}

    def _analysis(self, name, step):
        """-> what `should_use_lowrank_training` says of a layer, for which r, and W's SVD: U, S
        and, where the layer gets factors, V."""
        layer, memory = self.layers[name], self.memory[name]
        W = to_float32(layer.weight)                                # (m, n)
        r = layer.r or memory['r'] or max(1, min(W.shape) - FIRST_PRINCIPAL)
        usv = thin_svd(W)
        decision, r_next, found = should_use_lowrank_training(
            W, *usv, None, memory['U'], memory['S'], None, layer.base.weight.grad, r, step,
            in_lowrank_mode=layer.r is not None)
        return decision, r_next, found, r, usv if decision or layer.r is not None else usv[:2]

    def _act(self, name, decision, r_next, found, r, usv, swap_params):
        """Switch a layer, or not, and note its mode, its r and the action in the diagnostics."""
        layer, memory = self.layers[name], self.memory[name]
        action = 'initial' if memory['S'] is None else 'none'
        memory['U'], memory['S'] = (t.float().cpu() for t in usv[:2])
        if layer.r is None and decision:
            memory['patience'] = memory['calm'] = 0
            action = 'lowrank'
            switch(layer, r, swap_params, usv)
        elif layer.r is not None:
            informative = found['lift'] is not None                 # a zero gradient says nothing
            memory['calm'] = 0 if decision else memory['calm'] + informative
            memory['patience'] = memory['patience'] + 1 if r_next < layer.r else 0
            action, new_r = 'full', None
            if memory['calm'] < STABLE_ANALYSES:
                action, new_r = 'refactored', r_next if memory['patience'] >= PATIENCE else layer.r
                memory['patience'] %= PATIENCE
            switch(layer, new_r, swap_params, usv)
        memory['r'] = layer.r or memory['r']                 # where low-rank mode would begin again
        mode, r_now = ('full', len(usv[1])) if layer.r is None else ('lowrank', layer.r)
        self.diagnostics[name] = found | dict(mode=mode, r=r_now, action=action)
        self._analyzed[name] = to_float32(layer.weight).clone(), r

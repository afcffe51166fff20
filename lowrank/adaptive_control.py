"""When layers of `AdaptiveSVDLinear` change their mode: an analysis of each, every so many training steps, by
lowrank/adaptive_svd.py. What has to be remembered from one analysis to the next is here; the functions there have no
state."""

import torch

from lowrank.adaptive_layer import at_hand, left_basis, right_basis, wide
from lowrank.adaptive_svd import (FIRST_PRINCIPAL, WATCHED_PART, compute_gradient_alignment,
                                  should_use_lowrank_training)

PATIENCE = 3                        # analyses in a row that want a smaller r, before it becomes smaller
CALM = 5                            # analyses in a row without a reason for low-rank mode, before it ends


class AdaptiveSVD:
    """The analyses of layers: name -> AdaptiveSVDLinear, every `interval` steps. The state, for a checkpoint, is a dict
    of tensors and numbers."""

    def __init__(self, layers, interval):
        self.layers, self.interval = layers, interval
        self.memory = {name: dict(U=None, S=None, r=None, patience=0, calm=0) for name in layers}
        self.seen, self._before = {}, {}

    def state_dict(self):
        return {name: dict(memory) for name, memory in self.memory.items()}

    def load_state_dict(self, state):
        """Raises ValueError for other layers, or what does not fit them."""
        if set(state) != set(self.memory):
            raise ValueError(f'it is of the layers {", ".join(sorted(map(str, state)))}')
        for name, layer in self.layers.items():
            saved, (m, n) = state[name], layer.base.weight.shape
            shapes = {'U': (m, min(m, n)), 'S': (min(m, n),)}
            if not isinstance(saved, dict) or set(saved) != set(self.memory[name]) or not all(
                    saved[key] is None or is_basis(saved[key], shape) for key, shape in shapes.items()) or not all(
                    type(saved[key]) is int and saved[key] >= 0 for key in ('patience', 'calm')) or (
                    saved['U'] is None) != (saved['S'] is None) or not (
                    saved['r'] is None or type(saved['r']) is int and 1 <= saved['r'] < min(m, n)):
                raise ValueError(f'that of {name} does not fit the layer')
            self.memory[name] = dict(saved)

    def due(self, step):
        """Whether there is an analysis in that step, counted from 1."""
        return step % self.interval == 0

    def watch(self):
        """Before the backward passes of such a step: gradients of W are wanted."""
        for layer in self.layers.values():
            layer.watch(True)

    @torch.no_grad()
    def analyse(self, step, exchange, mean=None, first=None):
        """Decide, and switch, from the gradients of this step, before the optimizer makes it. exchange(old, new,
        convert): to give the optimizer other parameters, the list `new` in the place of `old`, with convert(states of
        old) -> states of new. mean: of a tensor over processes; first: of a function, its result on the first process
        -> whether any layer has other parameters now. What was seen and done: `report`, `metrics`."""
        for layer in self.layers.values():
            weight = layer.base.weight
            if mean is not None and layer.r is not None and weight.grad is not None:
                weight.grad = mean(weight.grad)                     # in full mode it is one already

        def look():
            return [self._look(name, step) for name in self.layers]
        looks = first(look) if first else look()
        self.seen, bases = ({name: look[i] for name, look in zip(self.layers, looks)} for i in range(2))
        before = {name: layer.r for name, layer in self.layers.items()}
        for layer in self.layers.values():
            layer.watch(False)                                      # none is an optimizer's while lists are exchanged
        for name, layer in self.layers.items():
            self._act(name, bases[name], exchange)
            layer.base.weight.grad = layer.base.weight.grad if layer.r is None else None
        self._before = {name: at_hand(layer.weight).clone() for name, layer in self.layers.items()}
        return any(layer.r != before[name] for name, layer in self.layers.items())

    @torch.no_grad()
    def protect(self):
        """After every optimizer step."""
        for name, layer in self.layers.items():
            layer.protect()
        for name, W in self._before.items():                        # what the optimizer made of the gradient
            seen, memory = self.seen[name], self.memory[name]
            seen['update_alignment'] = compute_gradient_alignment(
                at_hand(self.layers[name].weight) - W, memory['U'], memory['S'], seen['r_seen'])[0]
        self._before = {}

    def report(self, step):
        """The last analysis in words, line by line."""
        lines = [f'=== SVD Analysis at step {step} ===']
        for name, seen in self.seen.items():
            r, reason = seen['r'], seen['reason']
            words = {'initial': 'Initial SVD computed', 'none': f'full mode - {reason}',
                     'lowrank': f'SWITCHED TO LOW-RANK (r={r}) - Reason: {reason}',
                     'refactored': f'low-rank mode (r={r}) - {reason}',
                     'full': f'SWITCHED TO FULL - Reason: nothing to protect from in {CALM} analyses'}[seen['action']]
            lines.append(f'[{name}] {words}')
        return [*lines, '=== SVD Analysis complete ===']

    def metrics(self):
        """The same for metrics.jsonl: 'svd/block0.attn.c_q/mode' -> 'full', and so on."""
        return {f'svd/{name}/{key}': value for name, seen in self.seen.items() for key, value in seen.items()
                if key != 'r_seen' and value is not None}

    def _look(self, name, step):
        """-> what `should_use_lowrank_training` says of a layer, as a dict of numbers and words, and W's left basis."""
        layer, memory = self.layers[name], self.memory[name]
        W = at_hand(layer.weight)                                   # (m, n)
        r = layer.r or memory['r'] or max(1, min(W.shape) - FIRST_PRINCIPAL)
        k = min(W.shape) - r                                        # more columns of V are not looked at
        U, S = left_basis(W)
        if is_steep(S, k):
            W = wide(W)
            U, S = left_basis(W)
        decision, r_next, seen = should_use_lowrank_training(
            W, U, S, right_basis(W, U[:, :k], S[:k]), None, memory['U'], memory['S'], None, layer.base.weight.grad, r,
            step, in_lowrank_mode=layer.r is not None)
        return seen | dict(decision=decision, r_next=r_next, r_seen=r), (U, S)

    def _act(self, name, basis, exchange):
        """Switch a layer, or not, and note in `seen` its mode, r and what was done."""
        layer, memory, seen = self.layers[name], self.memory[name], self.seen[name]
        action = 'initial' if memory['S'] is None else 'none'
        memory['U'], memory['S'] = (t.float().cpu() for t in basis)
        decision, r_next = seen.pop('decision'), seen.pop('r_next')
        if layer.r is None and decision:
            memory['patience'] = memory['calm'] = 0
            to_factors(layer, seen['r_seen'], basis, exchange)
            action = 'lowrank'
        elif layer.r is not None:
            informative = seen['lift'] is not None                  # else the gradient says nothing: not calm either
            memory['calm'] = 0 if decision else memory['calm'] + informative
            memory['patience'] = memory['patience'] + 1 if r_next < layer.r else 0
            if memory['calm'] >= CALM:
                to_full(layer, exchange)
                action = 'full'
            else:
                r = r_next if memory['patience'] >= PATIENCE else layer.r
                memory['patience'] %= PATIENCE
                to_factors(layer, r, basis, exchange)
                action = 'refactored'
        memory['r'] = layer.r or memory['r']                        # it starts there when low-rank mode comes again
        seen |= dict(mode='full' if layer.r is None else 'lowrank', r=layer.r or len(memory['S']), action=action)


def is_steep(S, k):
    """Whether float32, whose eigh knows sigma^2 to some 1e-7 of the largest, is too rough for these singular values S
    (g): to tell the space of the first k directions from the next one, or the smallest ones, which decide on r."""
    energies = (S / S[0]).square()
    return bool(energies[k - 1] - energies[k] < 1e-5 or energies[-max(1, len(S) // WATCHED_PART)] < 1e-4)


def is_basis(value, shape):
    return torch.is_tensor(value) and value.shape == shape and value.is_floating_point() and bool(
        value.isfinite().all())


# ----------------------------------------------------------------------------------------------------------------------
# what an optimizer knows of a layer: a dict of tensors a parameter, momenta, means of squares ('exp_avg_sq'), 'step'

def to_factors(layer, r, basis, exchange):
    """`switch_to_lowrank`, the optimizer's state carried through; in low-rank mode already: by way of W."""
    old = layer.half_decayed() or [layer.base.weight]
    before = [p.detach().clone() for p in layer.half_decayed()]     # A, B
    layer.switch_to_lowrank(r, basis)
    new = layer.half_decayed()

    def convert(states):
        of_weight = state_of_weight(*states, *before) if before else states[0]
        return state_of_factors(of_weight, *(p.detach() for p in new))
    exchange(old, new, convert)


def to_full(layer, exchange):
    """`switch_to_full`, the same way."""
    (A, B), grad = layer.half_decayed(), layer.base.weight.grad
    layer.switch_to_full()
    layer.base.weight.grad = grad
    exchange([A, B], [layer.base.weight], lambda states: [state_of_weight(*states, A.detach(), B.detach())])


def state_of_factors(state, A, B):
    """Of W (m, n) -> of A (r, n) and B (m, r). As W = W_p + B A, dL/dB = G A^T and dL/dA = B^T G, which holds for
    means of gradients G as well; those of their squares as if the numbers of G were independent."""
    kinds = {key: (lambda t: (B.square().mT @ t, t @ A.square().mT)) if key == 'exp_avg_sq' else
             (lambda t: (t.clone(), t.clone())) if t.dim() == 0 else (lambda t: (B.mT @ t, t @ A.mT))
             for key, t in state.items()}
    pairs = {key: kinds[key](t) for key, t in state.items()}
    return [{key: pair[i] for key, pair in pairs.items()} for i in range(2)]


def state_of_weight(of_A, of_B, A, B):
    """The other way round: the least G with dL/dB = G A^T, dL/dA = B^T G; of squares, rows and columns are known alone
    (as in Adafactor, arXiv:1804.04235)."""
    A, B, tiny, state = at_hand(A), at_hand(B), torch.finfo(torch.float64).tiny, {}
    for key, like in of_B.items():
        b, a = at_hand(like), at_hand(of_A[key])                    # (m, r) and (r, n), or numbers
        if b.dim() == 0:
            state[key] = like.clone()
            continue
        if key == 'exp_avg_sq':
            rows = wide(b).sum(1) / wide(A).square().sum()          # float32 has no room for squares of squares
            columns = wide(a).sum(0) / wide(B).square().sum().clamp_min(tiny)
            state[key] = torch.outer(rows, columns) / rows.mean().clamp_min(tiny)
        else:
            from_A = B @ solve_gram(B.mT, a)                        # (m, n)
            state[key] = from_A + solve_gram(A, b.mT - A @ from_A.mT).mT @ A        # and what that lacks of b
        state[key] = state[key].to(like)
    return state


def solve_gram(A, right):
    """(A A^T)^-1 right, with a ridge well above the rounding of A A^T."""
    gram, limits = A @ A.mT, torch.finfo(A.dtype)
    gram.diagonal().add_(limits.eps ** 0.5 * gram.diagonal().mean() + limits.tiny)
    return torch.cholesky_inverse(torch.linalg.cholesky(gram)) @ right

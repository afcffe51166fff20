"""When layers of `AdaptiveSVDLinear` change their mode: an analysis of each, every so many training steps, by
lowrank/adaptive_svd.py. What has to be remembered from one analysis to the next is here; the functions there have no
state."""

import torch

from lowrank.adaptive_layer import left_basis, right_basis, wide
from lowrank.adaptive_svd import should_use_lowrank_training

START = 10                          # components that are protected first: r = g - 10
R_MIN = 8
PATIENCE = 3                        # analyses in a row that want a smaller r, before it becomes smaller
CALM = 5                            # analyses in a row without danger, before low-rank mode ends
RIDGE = 1e-6                        # of the mean of a Gram matrix, to invert it


class AdaptiveSVD:
    """The analyses of layers: name -> AdaptiveSVDLinear, every `interval` steps. The state, for a checkpoint, is a dict
    of tensors and numbers."""

    def __init__(self, layers, interval):
        self.layers, self.interval = layers, interval
        self.memory = {name: dict(U=None, S=None, patience=0, calm=0) for name in layers}

    def state_dict(self):
        return {name: dict(memory) for name, memory in self.memory.items()}

    def load_state_dict(self, state):
        """Raises ValueError for other layers, or what does not fit them."""
        if set(state) != set(self.memory):
            raise ValueError(f'it is of the layers {", ".join(sorted(map(str, state)))}')
        for name, layer in self.layers.items():
            saved, (m, n) = state[name], layer.base.weight.shape
            shapes = {'U': (m, min(m, n)), 'S': (min(m, n),)}
            if set(saved) != set(self.memory[name]) or any(
                    saved[key] is not None and tuple(getattr(saved[key], 'shape', ())) != shape
                    for key, shape in shapes.items()) or any(
                    type(saved[key]) is not int or saved[key] < 0 for key in ('patience', 'calm')):
                raise ValueError(f'that of {name} does not fit the layer')
            self.memory[name] = dict(saved)

    def due(self, step):
        """Whether there is an analysis in that step, counted from 1."""
        return step % self.interval == 0

    def watch(self, on):
        """Before the backward passes of a step in which an analysis is due: on; after it: off."""
        for layer in self.layers.values():
            layer.watch(on)

    def protect(self):
        """After every optimizer step."""
        for layer in self.layers.values():
            layer.protect()

    @torch.no_grad()
    def analyse(self, step, exchange, mean=None, first=None):
        """Decide, and switch, from the gradients of this step, before the optimizer makes it. exchange(old, new,
        convert): to give the optimizer other parameters, the list `new` in the place of `old`, with convert(states of
        old) -> states of new. mean: of a tensor over processes; first: of a function, its result on the first process
        -> name -> what was seen and done, whether any layer has other parameters now."""
        seen, changed = {}, False
        for name, layer in self.layers.items():
            W, grad, before = layer.base.weight, layer.base.weight.grad, layer.r
            if mean is not None and before is not None and grad is not None:
                W.grad = grad = mean(grad)                          # in full mode it is one already
            look = lambda: self._look(name, layer, grad, step)
            seen[name], basis = look() if first is None else first(look)
            self._act(layer, self.memory[name], seen[name], basis, exchange)
            changed |= layer.r != before
        return seen, changed

    def _look(self, name, layer, grad, step):
        """-> what `should_use_lowrank_training` says of a layer, as a dict of numbers and words, and W's left basis."""
        memory, weight = self.memory[name], wide(layer.weight)
        U, S = left_basis(weight)
        decision, r_next, seen = should_use_lowrank_training(
            weight, U, S, right_basis(weight, U, S), None, memory['U'], memory['S'], None, grad,
            layer.r or max(1, len(S) - START), step)
        return seen | dict(decision=decision, r_next=r_next), (U, S)

    def _act(self, layer, memory, seen, basis, exchange):
        """Switch a layer, or not, and note in `seen` its mode, r and what was done."""
        first = memory['S'] is None
        memory['U'], memory['S'] = basis
        decision, r_next = seen.pop('decision'), seen.pop('r_next')
        action = 'initial' if first else 'none'
        if layer.r is None and decision:
            memory['patience'] = memory['calm'] = 0
            to_factors(layer, r_next, basis, exchange)
            action = 'lowrank'
        elif layer.r is not None:
            memory['calm'] = 0 if decision else memory['calm'] + 1
            memory['patience'] = memory['patience'] + 1 if r_next < layer.r else 0
            if memory['calm'] >= CALM:
                to_full(layer, exchange)
                action = 'full'
            else:
                r = layer.r
                if memory['patience'] >= PATIENCE:
                    r, memory['patience'] = r_next, 0
                to_factors(layer, r, basis, exchange)
                action = 'refactored'
        seen |= dict(mode='full' if layer.r is None else 'lowrank', r=layer.r or 0, action=action)


# ----------------------------------------------------------------------------------------------------------------------
# what an optimizer knows of a layer: a dict of tensors a parameter, momenta, means of squares ('exp_avg_sq'), 'step'

def to_factors(layer, r, basis, exchange):
    """`switch_to_lowrank`, the optimizer's state carried through; in low-rank mode already: by way of W."""
    old = [layer.base.weight] if layer.r is None else layer.half_decayed()
    A, B = None if layer.r is None else (layer.A.weight.clone(), layer.B.weight.clone())
    layer.switch_to_lowrank(r, basis)
    A_new, B_new = layer.half_decayed()

    def convert(states):
        of_weight = states[0] if A is None else state_of_weight(*states, A, B)
        return state_of_factors(of_weight, A_new.detach(), B_new.detach())
    exchange(old, [A_new, B_new], convert)


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
    state = {}
    for key, b in of_B.items():                                     # (m, r), or a number
        a = of_A[key]                                               # (r, n)
        if b.dim() == 0:
            state[key] = b.clone()
        elif key == 'exp_avg_sq':
            rows, columns = b.sum(1) / A.square().sum(), a.sum(0) / B.square().sum()            # (m), (n)
            state[key] = torch.outer(rows, columns) / rows.mean().clamp_min(torch.finfo(b.dtype).tiny)
        else:
            from_B, from_A = solve(A @ A.mT, b.mT).mT @ A, B @ solve(B.mT @ B, a)               # (m, n) each
            state[key] = from_B + from_A - solve(A @ A.mT, A @ from_A.mT).mT @ A
    return state


def solve(gram, right):
    """gram^-1 right, with a ridge."""
    ridge = RIDGE * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram + ridge * torch.eye(len(gram)).to(gram)))

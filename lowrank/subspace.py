"""Leading eigenvectors of batches of symmetric positive semidefinite matrices, to a few per cent of what is cut, by
matrix products and Cholesky factors alone: subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4) with
Cholesky QR in place of Householder's, because `eigh` of a batch of small matrices takes them one after another, and
MPS has no `eigh` at all.

    Y = G Q,   Y^T Y = R^T R,   Q <- Y R^-1,   again and again; a wanted direction gains lambda_k / lambda_{k+1} a turn.

From a random start some directions at the cut come in late. A cold start therefore carries GUARD columns more than
wanted, and the weakest directions of the last Y are taken out again (`_drop_weakest`). From a good guess, such as the
basis of the last training step (`RunningBasis`), one iteration and the last product are enough.

Letters: n matrix side, k rank, l columns of a start; "..." any batch dimensions.
"""

import torch
from torch import nn

# Residual over the best at n = 32, k = 4 to 16, two iterations, worst of some 500 matrices, spectra from flat to 0.8^i:
# 1.25 without guard columns, 1.08 with 4 and 4 rounds. More columns cost more than they bring
GUARD, DROP_ROUNDS = 4, 4
WARM_ITERATIONS = 1                 # residual 1.007 of the best on V of the main job's model, 1.015 with 0
NUDGE = 1e-3                        # of a running basis: a direction that dies out, as where V is zero, can come back


def leading_subspace(gram, rank, start, iterations):
    """Q (..., n, k) with nearly orthonormal columns, its R^-1 (..., k, k) and Q' (..., n, k) such that Q = G Q' R^-1.

    gram G (..., n, n), float64, or float32 where there is no other; start (..., n, l), l >= k, a guess of full rank, if
    l > k a random one, or with the best columns first; `iterations` products precede the last one. Directions below
    1e-6 of the largest eigenvalue of a float64 G may be damped (float32: 1e-5); a zero G gives a zero Q. Nothing fails:
    what R would lack is added to Y^T Y. Raises ValueError for a start that is too narrow and negative iterations.
    """
    if start.shape[-1] < rank or iterations < 0:
        raise ValueError(f'a start of {start.shape[-1]} columns for rank {rank}, {iterations} iterations: valid are as '
                         'many columns or more, and 0 iterations or more')
    q, inverse = start, None
    for _ in range(iterations):
        q, inverse = _orthonormal(gram @ q)                         # (..., n, l), (..., l, l)
    if q.shape[-1] > rank:
        q = q[..., :rank] if inverse is None else _drop_weakest(q, inverse, rank)
    basis, inverse = _orthonormal(gram @ q)
    return basis, inverse, q


@torch.compiler.assume_constant_result                              # a graph cannot hold a generator
def gaussian_start(n, rank, oversample=0):
    """The start (n, l) where nothing is known, l = k + GUARD + oversample or n: the same one each time, of a generator
    of its own. float64, on the CPU."""
    columns = min(n, rank + GUARD + oversample)
    return torch.randn(n, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device='cpu')


class RunningBasis(nn.Module):
    """Where the iterations for one layer's matrices start: the Gaussian guess, and after a training step that was noted
    the leading subspace of all matrices of that step, one a head. No parameters, and nothing in the state dict."""

    def __init__(self, heads, n, rank, power_iters, oversample):
        super().__init__()
        self.rank, self.power_iters = rank, power_iters
        self.warm = self.noted = False
        gaussian = gaussian_start(n, rank, oversample).to(torch.get_default_dtype())
        self.register_buffer('gaussian', gaussian, persistent=False)                            # (n, l)
        self.register_buffer('basis', gaussian[:, :rank].repeat(heads, 1, 1), persistent=False)     # (heads, n, k)
        self.register_buffer('pooled', torch.zeros(heads, n, n), persistent=False)              # G of a step, summed

    def start(self):
        """-> start, iterations of `leading_subspace`."""
        return (self.basis, WARM_ITERATIONS) if self.warm else (self.gaussian, self.power_iters)

    def note(self, grams):
        """Add the matrices G (B, heads, n, n) of one micro-batch of a training step."""
        self.pooled += grams.sum(0)
        self.noted = True


def running_bases(model):
    """Every RunningBasis of a module, in order, as a list. All of a model are of one shape, and warm together."""
    return [module for module in model.modules() if isinstance(module, RunningBasis)]


@torch.no_grad()
def advance(bases, average=None, completed=True):
    """After a training step: move every RunningBasis of a list to the leading subspace of what it noted, from where it
    was, or where the step was not completed, forget that. average: of a tensor over processes, called with all sums
    (bases, heads, n, n). Where nothing was noted, or what is not finite, a basis stays; all stay cold until every head
    has something."""
    if completed and bases and all(own.noted for own in bases):
        pooled = torch.stack([own.pooled for own in bases])
        pooled = pooled if average is None else average(pooled)
        wide = pooled if pooled.device.type == 'mps' else pooled.double()
        start, iterations = bases[0].start()
        before = torch.stack([own.basis for own in bases])          # (bases, heads, n, k)
        start = before if bases[0].warm else start
        found, _, _ = leading_subspace(wide, bases[0].rank, start.to(wide), iterations)
        n, rank = found.shape[-2:]
        finite = found.isfinite().all(-1).all(-1)                   # (bases, heads)
        if bases[0].warm or _holds(finite & found.any(-1).any(-1)):
            found = (found + NUDGE * n ** -0.5 * bases[0].gaussian[:, :rank]).to(before)
            load_state(bases, torch.where(finite[..., None, None], found, before))
    for own in bases:
        own.pooled.zero_()
        own.noted = False


def _holds(conditions):
    return bool(conditions.all())                                   # waits for the device


def saved_state(bases):
    """-> (bases, heads, n, k), None where no step has been made."""
    return torch.stack([own.basis for own in bases]) if bases and bases[0].warm else None


def load_state(bases, saved):
    """The inverse: None, and what has another shape, is a cold start."""
    fits = saved is not None and bases and saved.shape == (len(bases), *bases[0].basis.shape)
    for i, own in enumerate(bases):
        own.basis.copy_(saved[i] if fits else own.gaussian[:, :own.rank])
        own.warm = bool(fits)


class RunningBases:
    """What a model has of its layers' RunningBasis: to be inherited from beside nn.Module."""

    def advance_svd_basis(self, average=None, completed=True):
        """To be called after every optimizer step: 'randomized' starts the next one from this one's V, else every step
        from the same random basis. average: of a tensor over processes; completed: False if nothing was updated."""
        advance(running_bases(self), average, completed)

    @property
    def svd_basis(self):
        """Where 'randomized' starts, (n_layer, nh, hs, k), None before the first step. None, or another shape: cold."""
        return saved_state(running_bases(self))

    @svd_basis.setter
    def svd_basis(self, bases):
        load_state(running_bases(self), bases)


def _orthonormal(y, passes=1):
    """Cholesky QR: y (..., n, l) -> q (..., n, l) and r^-1 (..., l, l), upper triangular, with q = y r^-1. The jitter
    makes up for rounding, so that the factor exists; directions of y that it outweighs come out short, unless a second
    pass lengthens them (CholeskyQR2, Yamamoto et al. 2015). In float32 these would be all below 1e-3 of the largest,
    hence two passes there."""
    total, info, eye = None, torch.finfo(y.dtype), torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)
    for _ in range(passes if y.dtype == torch.float64 else 2):
        c = y.mT @ y                                                # (..., l, l)
        diagonal = c.diagonal(dim1=-2, dim2=-1)
        # the second term is for y = 0: its root and the inverse of that, squared, are within the type's range
        diagonal += 4 * info.eps * diagonal.sum(-1, keepdim=True) + info.tiny ** 0.25
        factor, _ = torch.linalg.cholesky_ex(c)
        inverse = torch.linalg.solve_triangular(factor, eye.expand(c.shape), upper=False).mT
        y, total = y @ inverse, inverse if total is None else total @ inverse
    return y, total


def _drop_weakest(q, inverse, rank):
    """q (..., n, l), orthonormal, of Y = q R, R^-1 the inverse -> (..., n, k): q's span without the l - k weakest left
    singular vectors of Y, which are found by inverse iteration on R R^T (l x l), from the last columns, for the columns
    of q come out roughly in order. R^-1 spans up to 1e7 where G has lower rank than l, hence the second passes."""
    inverse = inverse / inverse.abs().amax((-2, -1), keepdim=True)  # its squares count
    columns = q.shape[-1]
    weakest = torch.eye(columns, dtype=q.dtype, device=q.device)[:, rank:].expand(*q.shape[:-2], -1, -1)
    for _ in range(DROP_ROUNDS):
        weakest, _ = _orthonormal(inverse @ weakest, passes=2)      # (..., l, l - k)
        weakest, _ = _orthonormal(inverse.mT @ weakest, passes=2)
    return q[..., :rank] - (q @ weakest) @ weakest[..., :rank, :].mT

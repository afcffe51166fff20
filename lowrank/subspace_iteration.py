"""Leading eigenvectors of batches of symmetric positive semidefinite matrices by subspace iteration
(Halko, Martinsson and Tropp 2011, algorithm 4.4): matrix products and Cholesky factors only.

`eigh` takes the small matrices of a batch one after another, and MPS has no `eigh` before torch
2.14. An iteration orthonormalizes by Cholesky QR,

    Y = G Q,   Y^T Y = R^T R,   Q <- Y R^-1,

and gains a factor lambda_k / lambda_{k+1} for the k-th direction. A random start carries
GUARD_COLUMNS more columns than are wanted, because the directions at the cut converge last; the
weakest are removed at the end (`truncate_basis`). A good guess, such as the basis of the last
training step (`WarmStartBasis`), needs a single product.

Letters: n side of a matrix, k rank, l columns of a start, nh heads; "..." any batch dimensions.
"""

import torch
from torch import nn

# Residual over the best at n = 32, k = 4 to 16, two iterations, worst of some 500 matrices with
# spectra from flat to 0.8^i: 1.25 without guard columns, 1.08 with 4 of them and 4 rounds
GUARD_COLUMNS, TRUNCATION_ROUNDS = 4, 4
PERTURBATION = 1e-3         # of a warm basis: a direction that vanishes, as V = 0 makes it, returns


def leading_subspace(gram, rank, start, iterations):
    """Leading eigenvectors of G, approximately.

    gram: G (..., n, n) in float64, or float32 on a device without float64. start (..., n, l) with
    l >= k: a guess of full rank; if l > k a random one, or one with its best columns first.
    iterations: products before the last one.

    Returns Q (..., n, k) with nearly orthonormal columns, its R^-1 (..., k, k) and Q' (..., n, k),
    such that Q = G Q' R^-1. Directions below 1e-6 of the largest eigenvalue (float32: 1e-5) may be
    damped; a zero G gives a zero Q.
    """
    q, inverse = start, None
    for _ in range(iterations):
        q, inverse = _cholesky_qr(gram @ q)                         # (..., n, l), (..., l, l)
    if q.shape[-1] > rank:
        q = q[..., :rank] if inverse is None else truncate_basis(q, inverse, rank)
    basis, inverse = _cholesky_qr(gram @ q)
    return basis, inverse, q


@torch.compiler.assume_constant_result                             # a graph cannot hold a generator
def gaussian_start(n, rank, oversample=0):
    """A Gaussian start (n, l), l = min(n, k + GUARD_COLUMNS + oversample): the same one on each
    call, from a generator of its own. float64, on the CPU."""
    columns = min(n, rank + GUARD_COLUMNS + oversample)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, columns, generator=generator, dtype=torch.float64, device='cpu')


class WarmStartBasis(nn.Module):
    """Where the iterations for one layer's matrices start.

    Cold: from a Gaussian guess. Warm, after the first training step: from the leading subspace of
    the sum of that step's matrices, one basis per head. In training mode it is cold, and collects
    nothing, unless `followed` says that an optimizer's hook calls `update_bases`. It has no
    parameters and no entries in the state dict; `get_bases` and `set_bases` are what a checkpoint
    stores.
    """

    def __init__(self, heads, n, rank, power_iters, oversample, warm_power_iters=0):
        """power_iters, oversample: of a cold start; warm_power_iters: of a warm one."""
        super().__init__()
        self.rank, self.power_iters, self.warm_power_iters = rank, power_iters, warm_power_iters
        self.warm = self.has_gram = self.followed = False
        gaussian = gaussian_start(n, rank, oversample).to(torch.get_default_dtype())
        for name, value in (('gaussian', gaussian),                             # (n, l)
                            ('basis', gaussian[:, :rank].repeat(heads, 1, 1)),  # (nh, n, k)
                            ('gram_sum', torch.zeros(heads, n, n))):
            self.register_buffer(name, value, persistent=False)

    def start(self):
        """Options of a randomized SVD: its start and the number of products before the last."""
        if self.warm and (self.followed or not self.training):
            return dict(start=self.basis, power_iters=self.warm_power_iters)
        return dict(start=self.gaussian, power_iters=self.power_iters)

    def accumulate_gram(self, gram):
        """Add the matrices G (B, nh, n, n) of one micro-batch of a training step."""
        self.gram_sum += gram.sum(0)
        self.has_gram = True


def follow_optimizer(bases, optimizer, mean):
    """After each step of the optimizer, update the bases by the matrices of that step's forward
    passes; a step that a GradScaler skips leaves them as they are. mean: as in `update_bases`."""
    def hook(optimizer, *_):
        found_inf = getattr(optimizer, 'found_inf', None)          # a GradScaler's, of a fused step
        if found_inf is not None and found_inf.item():
            clear_grams(bases)
        else:
            update_bases(bases, mean)
    if bases:
        optimizer.register_step_post_hook(hook)
    for basis in bases:
        basis.followed = True


@torch.no_grad()
def update_bases(bases, mean=lambda tensor: tensor):
    """Move each WarmStartBasis of a list, all of one shape, to the leading subspace of its sums.

    To be called after an optimizer step. mean: averages a tensor over processes; it gets all sums
    (bases, nh, n, n). A basis whose sum is not finite stays. All stay cold until every head of
    every layer has a sum that is not zero, and where a layer saw no training forward all stay.
    """
    if bases and all(basis.has_gram for basis in bases):
        sums = mean(torch.stack([basis.gram_sum for basis in bases]))           # (bases, nh, n, n)
        wide = sums if sums.device.type == 'mps' else sums.double()
        first, old = bases[0], torch.stack([basis.basis for basis in bases])    # (bases, nh, n, k)
        start = old if first.warm else first.gaussian               # of all layers
        new, _, _ = leading_subspace(wide, first.rank, start.to(wide), first.start()['power_iters'])
        finite = new.isfinite().all(-1).all(-1)                     # (bases, nh)
        # bool() waits for the device, but only while the bases are cold
        if first.warm or bool((finite & new.any(-1).any(-1)).all()):
            perturbation = PERTURBATION * new.size(-2) ** -0.5 * first.gaussian[:, :first.rank]
            new = (new + perturbation).to(old)
            set_bases(bases, torch.where(finite[..., None, None], new, old))
    clear_grams(bases)


def clear_grams(bases):
    """Forget the sums, which is also what a step that was not completed asks for."""
    for basis in bases:
        basis.gram_sum.zero_()
        basis.has_gram = False


def get_bases(bases: list[WarmStartBasis]) -> torch.Tensor | None:
    """The bases as one tensor (bases, nh, n, k), or None where they are cold."""
    return torch.stack([basis.basis for basis in bases]) if bases and bases[0].warm else None


def set_bases(bases: list[WarmStartBasis], saved: torch.Tensor | None):
    """The inverse of `get_bases`. None, and bases of another shape, make a cold start."""
    fits = torch.is_tensor(saved) and bases and saved.shape == (len(bases), *bases[0].basis.shape)
    for i, basis in enumerate(bases):
        basis.basis.copy_(saved[i] if fits else basis.gaussian[:, :basis.rank])
        basis.warm = bool(fits)


def _cholesky_qr(y, passes=1):
    """Cholesky QR: y (..., n, l) -> q (..., n, l) and r^-1 (..., l, l) upper triangular, q = y
    r^-1.

    A jitter makes up for rounding, so the factor exists. Directions of y that are smaller than the
    jitter come out short unless a second pass lengthens them (CholeskyQR2, Yamamoto et al. 2015);
    in float32 these would be all below 1e-3 of the largest, hence two passes there.
    """
    total, info = None, torch.finfo(y.dtype)
    eye = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)
    for _ in range(passes if y.dtype == torch.float64 else 2):
        c = y.mT @ y                                                # (..., l, l)
        diagonal = c.diagonal(dim1=-2, dim2=-1)
        # the second term is for y = 0; the inverse of its root, squared, does not overflow
        diagonal += 4 * info.eps * diagonal.sum(-1, keepdim=True) + info.tiny ** 0.9
        factor, _ = torch.linalg.cholesky_ex(c)
        inverse = torch.linalg.solve_triangular(factor, eye.expand(c.shape), upper=False).mT
        y, total = y @ inverse, inverse if total is None else total @ inverse
    return y, total


def truncate_basis(q, inverse, rank):
    """Remove the l - k weakest directions of Y = q R from q (..., n, l), orthonormal -> (..., n,
    k).

    inverse: R^-1 (..., l, l). The weakest left singular vectors of Y come from inverse iteration
    on R R^T, started from the last columns, because the columns of q are roughly in order. R^-1
    spans up to 1e7 where G has a rank below l, hence the second passes.
    """
    inverse = inverse / inverse.abs().amax((-2, -1), keepdim=True)  # its square must not overflow
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    weakest = eye[:, rank:].expand(*q.shape[:-2], -1, -1)           # (..., l, l - k)
    for _ in range(TRUNCATION_ROUNDS):
        weakest, _ = _cholesky_qr(inverse @ weakest, passes=2)
        weakest, _ = _cholesky_qr(inverse.mT @ weakest, passes=2)
    return q[..., :rank] - (q @ weakest) @ weakest[..., :rank, :].mT

"""Leading eigenvectors of batches of symmetric positive semidefinite matrices by subspace iteration
(Halko, Martinsson and Tropp 2011, algorithm 4.4), with matrix products and Cholesky factors only.

The iteration replaces `eigh`. `eigh` decomposes the small matrices of a batch one after another,
and does not exist on MPS before torch 2.14. Each iteration multiplies a basis Q by a matrix G and
orthonormalizes the product by Cholesky QR:

    Y = G Q,   Y^T Y = R^T R,   Q <- Y R^-1,

This reduces the error of the k-th direction by a factor lambda_{k+1} / lambda_k, where
lambda_1 >= lambda_2 >= ... are the eigenvalues of G. A cold start begins with random Gaussian
columns, GUARD_COLUMNS more than the rank, because the k-th direction converges last. The weakest
directions are removed at the end (`truncate_basis`). A good start needs a single product with G,
for example the basis of the last training step (`WarmStartBasis`).

Letters: n side of a matrix, k rank, l columns of a start, nh heads; "..." any batch dimensions.
"""

import torch
from torch import nn

# worst residual relative to the best, of about 500 matrices with n = 32, k = 4 to 16, spectra from
# flat to 0.8^i, two iterations: 1.25 without guard columns, 1.08 with 4 of them and 4 rounds
GUARD_COLUMNS, TRUNCATION_ROUNDS = 4, 4
# size of the perturbation of a warm basis, by which directions that V = 0 removed can return
PERTURBATION = 1e-3


def leading_subspace(gram, rank, start, iterations):
    """Approximate the leading eigenvectors of G.

    gram: G (..., n, n) in float64, or float32 on a device without float64. start: columns of full
    rank (..., n, l), l >= k = rank. If l > k, the columns are random or the best columns come
    first. iterations: number of products with G before the last product.

    Returns Q (..., n, k), R^-1 (..., k, k) and Q' (..., n, k) such that Q = G Q' R^-1. The columns
    of Q are nearly orthonormal. Q' is the basis before the last product. Columns of Q may be too
    short where the eigenvalue is below 1e-6 of the largest one (float32: 1e-5). A zero G gives a
    zero Q.
    """
    q, inverse = start, None
    for _ in range(iterations):
        q, inverse = _cholesky_qr(gram @ q)                         # (..., n, l), (..., l, l)
    if q.shape[-1] > rank:
        q = q[..., :rank] if inverse is None else truncate_basis(q, inverse, rank)
    basis, inverse = _cholesky_qr(gram @ q)
    return basis, inverse, q


@torch.compiler.assume_constant_result                  # a graph cannot hold a generator
def gaussian_start(n, rank, oversample=0):
    """Return a Gaussian start (n, l), l = min(n, rank + GUARD_COLUMNS + oversample), float64 on the
    CPU. Each call returns the same values, because they come from a separate generator."""
    columns = min(n, rank + GUARD_COLUMNS + oversample)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, columns, generator=generator, dtype=torch.float64, device='cpu')


class WarmStartBasis(nn.Module):
    """Start of the subspace iterations of one layer, cold or warm.

    A cold start is a Gaussian matrix. A warm start, after the first training step, is one basis per
    head: the leading eigenvectors of the sum of the Gram matrices of the last step. In training
    mode the start stays cold unless `followed` is True. `followed` means that a hook of the
    optimizer calls `update_bases` after each step. The module has no parameters and no entries in
    the state dict. A checkpoint stores what `get_bases` returns.
    """

    def __init__(self, heads, n, rank, power_iters, oversample, warm_power_iters=0):
        """power_iters, oversample: for a cold start. warm_power_iters: for a warm start."""
        super().__init__()
        self.rank, self.power_iters, self.warm_power_iters = rank, power_iters, warm_power_iters
        self.warm = self.has_gram = self.followed = False
        gaussian = gaussian_start(n, rank, oversample).to(torch.get_default_dtype())
        for name, value in (('gaussian', gaussian),                             # (n, l)
                            ('basis', gaussian[:, :rank].repeat(heads, 1, 1)),  # (nh, n, k)
                            ('gram_sum', torch.zeros(heads, n, n))):
            self.register_buffer(name, value, persistent=False)

    def start(self):
        """Return the start and the number of power iterations, as options of
        `low_rank_approximation`."""
        if self.warm and (self.followed or not self.training):
            return dict(start=self.basis, power_iters=self.warm_power_iters)
        return dict(start=self.gaussian, power_iters=self.power_iters)

    def accumulate_gram(self, gram):
        """Add the Gram matrices G (B, nh, n, n) of one micro-batch of a training step."""
        self.gram_sum += gram.sum(0)
        self.has_gram = True


def follow_optimizer(bases, optimizer, mean):
    """Register a hook that updates the bases after each step of the optimizer, from the Gram
    matrices of that step's forward passes. A step that a GradScaler skips does not change the
    bases. mean(tensor) averages a tensor over processes."""
    def hook(optimizer, *_):
        found_inf = getattr(optimizer, 'found_inf', None)       # set by GradScaler if fused
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
    """Move each WarmStartBasis to the leading eigenvectors of its summed Gram matrices.

    Call this after an optimizer step. All bases have the same shape. mean(tensor) averages the sums
    (bases, nh, n, n) over processes. A basis does not change if its sum is not finite. If any layer
    had no forward pass in training, all bases stay as they are. Bases stay cold until the sum of
    every head of every layer is nonzero.
    """
    if bases and all(basis.has_gram for basis in bases):
        sums = mean(torch.stack([basis.gram_sum for basis in bases]))           # (bases, nh, n, n)
        wide = sums if sums.device.type == 'mps' else sums.double()
        first, old = bases[0], torch.stack([basis.basis for basis in bases])    # (bases, nh, n, k)
        start = old if first.warm else first.gaussian
        new, _, _ = leading_subspace(wide, first.rank, start.to(wide), first.start()['power_iters'])
        finite = new.isfinite().all(-1).all(-1)                     # (bases, nh)
        # bool() waits for the device, but only while the bases are cold
        if first.warm or bool((finite & new.any(-1).any(-1)).all()):
            perturbation = PERTURBATION * new.size(-2) ** -0.5 * first.gaussian[:, :first.rank]
            new = (new + perturbation).to(old)
            set_bases(bases, torch.where(finite[..., None, None], new, old))
    clear_grams(bases)


def clear_grams(bases):
    """Delete the summed Gram matrices, including those of a training step that was not
    completed."""
    for basis in bases:
        basis.gram_sum.zero_()
        basis.has_gram = False


def get_bases(bases: list[WarmStartBasis]) -> torch.Tensor | None:
    """Return the bases as one tensor (bases, nh, n, k), or None if they are cold."""
    return torch.stack([basis.basis for basis in bases]) if bases and bases[0].warm else None


def set_bases(bases: list[WarmStartBasis], saved: torch.Tensor | None):
    """Restore the result of `get_bases`. None or another shape gives a cold start."""
    fits = torch.is_tensor(saved) and bases and saved.shape == (len(bases), *bases[0].basis.shape)
    for i, basis in enumerate(bases):
        basis.basis.copy_(saved[i] if fits else basis.gaussian[:, :basis.rank])
        basis.warm = bool(fits)


def _cholesky_qr(y, passes=1):
    """Cholesky QR of y (..., n, l) -> q = y r^-1 (..., n, l), upper triangular r^-1 (..., l, l).

    A small number is added to the diagonal of y^T y, so that the Cholesky factor exists despite
    rounding. As a result, columns of q for weak directions of y are too short unless a second pass
    lengthens them (CholeskyQR2, Yamamoto et al. 2015). In float32, all directions below 1e-3 of the
    largest one are weak, so float32 always takes two passes.
    """
    total, info = None, torch.finfo(y.dtype)
    eye = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)
    for _ in range(passes if y.dtype == torch.float64 else 2):
        c = y.mT @ y                                                # (..., l, l)
        diagonal = c.diagonal(dim1=-2, dim2=-1)
        # the second term is for y = 0; the square of its inverse root does not overflow
        diagonal += 4 * info.eps * diagonal.sum(-1, keepdim=True) + info.tiny ** 0.9
        factor, _ = torch.linalg.cholesky_ex(c)
        inverse = torch.linalg.solve_triangular(factor, eye.expand(c.shape), upper=False).mT
        y, total = y @ inverse, inverse if total is None else total @ inverse
    return y, total


def truncate_basis(q, inverse, rank):
    """Remove the l - k weakest directions of Y = Q R, k = rank: orthonormal q (..., n, l) ->
    (..., n, k).

    inverse: R^-1 (..., l, l). Inverse iteration on R R^T gives the weakest left singular vectors of
    Y. The iteration starts from the last columns, because the columns of q are roughly in
    descending order. If the rank of G is below l, the entries of R^-1 differ by factors of up to
    1e7. Each factorization therefore takes two passes.
    """
    inverse = inverse / inverse.abs().amax((-2, -1), keepdim=True)  # its square must not overflow
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    weakest = eye[:, rank:].expand(*q.shape[:-2], -1, -1)           # (..., l, l - k)
    for _ in range(TRUNCATION_ROUNDS):
        weakest, _ = _cholesky_qr(inverse @ weakest, passes=2)
        weakest, _ = _cholesky_qr(inverse.mT @ weakest, passes=2)
    return q[..., :rank] - (q @ weakest) @ weakest[..., :rank, :].mT

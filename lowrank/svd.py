"""Truncated SVD of batches of small matrices, with a gradient that stays finite.

The best rank-k approximation of X (Eckart and Young 1936) is X_k = X P, where P projects onto the
span of the k leading eigenvectors W_k of the Gram matrix G:

    X_k = X P,   P = W_k W_k^T,   G = X^T X = W diag(lambda) W^T,   lambda_i = sigma_i^2.

sigma_1 >= sigma_2 >= ... are the singular values of X. X_k is unique if sigma_k > sigma_{k+1}. The
singular vectors are not unique, because their signs are free and vectors of equal singular values
can be rotated. The gradient is therefore taken through X_k as a whole. For a loss L, let
D = dL/dX_k and M = X^T D, and let W_r hold the eigenvectors other than W_k. Indices i <= k belong
to W_k, indices j > k to W_r:

    dL/dX = D P + X (Z + Z^T),   Z = W_k A W_r^T,
    A_ij = [W_k^T (M + M^T) W_r]_ij / (lambda_i - lambda_j).

Autograd through torch.linalg.svd divides by all differences lambda_i - lambda_j instead. It returns
NaN if two singular values are equal, for example if several are zero.

Methods: 'standard' is torch.linalg.svd of X, 'gram' is eigh of G. Both methods decompose in
float64. In float32, G would lose small singular values, because G has their squares
(docs/RESULTS.md). All other steps are in float32. MPS has no float64, so G is summed in float32
there and decomposed on the CPU.

'randomized' computes P = Q Q^T by subspace iteration on a float32 G (subspace_iteration.py). The
last iteration computes the basis Q from the basis Q' of the iteration before, by the QR
factorization G Q' = Q R. Only this iteration is differentiated, and Q' is held constant (one-step
differentiation, Bolte, Pauwels and Vaiter 2023):

    dL/dX = D P + X (Z + Z^T),   Z = (I - P) (M + M^T) F,   F = Q R^-T Q'^T.

At convergence F is the pseudo-inverse of P G. The product with F divides by lambda_i, where the
exact A_ij divides by lambda_i - lambda_j.

Letters: m rows, n columns, k rank, N matrices; "..." any batch dimensions. Tests use
float32 inputs with largest singular values of about 1e-5 and 1e5.
"""

from itertools import accumulate

import torch
from torch.nn import functional as F

from lowrank.spectrum import energy, rank_for_energy                # noqa: F401  (importable here)
from lowrank.subspace_iteration import gaussian_start, leading_subspace

EXACT_METHODS = ('standard', 'gram')
METHODS = (*EXACT_METHODS, 'randomized')


# --------------------------------------------------------------------------------------------------
# factors, not differentiable

def truncated_svd(x, rank: int | None, method='gram', *, power_iters=2, oversample=0):
    """Leading singular triplets of x, without a gradient.

    x (..., m, n) -> U (..., m, k), S (..., k) descending, Vh (..., k, n). U diag(S) Vh is the best
    rank-k approximation of x, or nearly so with 'randomized'. The SVD is computed in float64, on
    the CPU if the device has no float64. rank None or above min(m, n) gives min(m, n) triplets.
    With 'randomized', rows of Vh have norms below 1 if sigma_k is below 1e-3 sigma_1. Raises
    ValueError for rank < 1 or an unknown method, and torch.linalg.LinAlgError for values that are
    not finite. Use `low_rank_approximation` if a gradient is needed.
    """
    _check(rank, method)
    if x.shape[-2] < x.shape[-1]:
        u, s, vh = truncated_svd(x.mT, rank, method, power_iters=power_iters, oversample=oversample)
        return vh.mT, s, u.mT
    with torch.autocast(x.device.type, enabled=False):
        wide = _to_float64(x)
        if method == 'standard':
            u, s, vh = _decompose(torch.linalg.svd, wide, full_matrices=False)
        else:                                                       # SVD of x in the basis W_k
            gram = wide.mT @ wide
            w = leading_eigenvectors(gram, rank, method, power_iters=power_iters,
                                     oversample=oversample)
            u, s, vh = torch.linalg.svd(wide @ w, full_matrices=False)
            vh = vh @ w.mT                                          # (..., k, k) x (..., k, n)
        return tuple(part.to(x.dtype).to(x.device)
                     for part in (u[..., :rank], s[..., :rank], vh[..., :rank, :]))


def leading_right_vectors(x, rank, method='gram', *, power_iters=2, oversample=0,
                          start: torch.Tensor | None = None):
    """Return the basis W_k (..., n, k) of x (..., m, n), m >= n. x W_k W_k^T is the result of
    `low_rank_approximation`. The precision is the same. W_k has no gradient. Raises
    torch.linalg.LinAlgError for values that are not finite."""
    rows = x.detach().to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    with torch.autocast(x.device.type, enabled=False):
        if method == 'randomized':
            return _iterate(rows.mT @ rows, rank, power_iters, oversample, start)[0].to(x)
        return _exact_spectrum(rows, method, (x.shape[-2],))[1][0][..., -rank:].to(x)


def leading_eigenvectors(gram, rank, method='gram', *, power_iters=2, oversample=0,
                         start: torch.Tensor | None = None):
    """Orthonormal basis W_k (..., n, k) of the eigenvectors of the k largest eigenvalues of gram.

    gram (..., n, n): symmetric, positive semidefinite. 'randomized' computes W_k by subspace
    iteration, and its options are those of `low_rank_approximation`. The other methods use eigh in
    float64. Raises torch.linalg.LinAlgError for values that are not finite.
    """
    if method == 'randomized':
        return _iterate(gram, rank, power_iters, oversample, start)[0].to(gram)
    return _decompose(torch.linalg.eigh, _to_float64(gram))[1][..., -rank:].to(gram)


def balanced_factors(u, s, vh, floor):
    """Split u (m, k) diag(s) vh (k, n) into two factors, b (m, k) and a (k, n):

        b = u diag(s / sqrt(t)),   a = diag(sqrt(t)) vh,   t = max(s, floor).

    Values of s above the floor are split evenly, with sqrt(s) in each factor. The floor keeps rows
    of a away from zero. If a row of a and the matching column of b were both zero, their gradients
    would be zero too, and they would never be trained. floor=0 is for a zero matrix and gives
    t = 1.
    """
    root = s.clamp_min(float(floor) or 1.0).sqrt()
    return u * (s / root), root[:, None] * vh


# --------------------------------------------------------------------------------------------------
# projections of rank k, differentiable

def low_rank_approximation(x, rank: int | None, method='gram', basis_grad=True, *, power_iters=2,
                           oversample=0, start: torch.Tensor | None = None, return_gram=False):
    """Best rank-k approximation X_k of each matrix x (..., m, n), differentiable once.

    rank None or >= min(m, n) returns x itself. The computation is in float32, or in float64 if x is
    float64, with autocast off. The result has x's dtype. The gradient is exact if the eigenvalue
    gap lambda_k - lambda_{k+1} is at least n * eps * lambda_1 (3.8e-6 lambda_1 for n = 32 in
    float32). For a smaller eigenvalue gap X_k is ill-conditioned, and the bound n * eps * lambda_1
    replaces the gap so that gradients stay finite. With basis_grad=False the projector P is held
    constant, and the gradient is D P, where D = dL/dX_k.

    The residual of 'randomized' is within a few percent of the best one if sigma_k is above 1e-3
    sigma_1 (3e-3 without float64). The iteration begins with `start` (..., n, l), l >= k. `start`
    has the batch dimensions of x or fewer. If m < n, it may be (..., m, l), because G is then the
    smaller x x^T. start=None takes k + 4 + oversample Gaussian columns.
    `power_iters` products with G precede the last product. power_iters=0 is enough if `start` comes
    from a similar matrix. With return_gram=True the result is (X_k, G), G (..., n, n), or (X_k,
    None) if no G was computed. Other methods ignore these options.

    Raises ValueError for rank < 1 or an unknown method. On the CPU, raises torch.linalg.LinAlgError
    if a matrix to decompose is not finite. CUDA has no such check, because it would wait for the
    device, and torch.compile has none either.
    """
    _check(rank, method)
    m, n = x.shape[-2:]
    options = dict(power_iters=power_iters, oversample=oversample)
    spans = () if rank is None or rank >= min(m, n) else ((m, 0, m),)
    if spans and m < n and not return_gram and (start is None or start.size(-2) == m):
        return low_rank_approximation(x.mT, rank, method, basis_grad, start=start, **options).mT
    return _project(x, rank, method, spans, basis_grad, return_gram, start=start, **options)


def causal_low_rank_approximation(x, rank: int | None, method='gram', block=32, basis_grad=True, *,
                                  power_iters=2, oversample=0, start: torch.Tensor | None = None,
                                  return_gram=False):
    """Project the rows of x (..., T, n) so that no row of the result depends on a later row of x.

    Rows [s, 2s) for s = block, 2 block, 4 block, ... are projected onto the leading k right
    singular vectors of rows [0, s). T rows need at most log2(T / block) bases, rounded up. The
    first `block` rows do not change, nor do rows whose basis would come from `rank` rows or fewer.
    If no row is projected, or rank is None or >= n, the result is x itself. The result is not the
    best rank-k approximation of x, and its rank can exceed k.

    Gradient, other arguments and errors are those of `low_rank_approximation`. With
    return_gram=True the result is a pair, as there. Its second element is the Gram matrix of the
    rows from which the last basis comes, or None if no Gram matrix was computed.
    """
    _check(rank, method)
    rows, n = x.shape[-2:]
    starts = [] if rank is None or rank >= n else causal_starts(rows, rank, block)
    spans = tuple((s, s, min(2 * s, rows)) for s in starts)
    return _project(x, rank, method, spans, basis_grad, return_gram, power_iters=power_iters,
                    oversample=oversample, start=start)


def causal_starts(rows, rank, block) -> list[int]:
    """Return the first row s of each span [s, 2s) of `causal_low_rank_approximation`, ascending."""
    doubled = (block << i for i in range(rows.bit_length()))
    return [start for start in doubled if rank < start < rows]


def _project(x, rank, method, spans, basis_grad, return_gram, start, **options):
    """Project the rows of each span (s, a, b). Without spans, return x itself."""
    if not spans:
        return (x, None) if return_gram else x
    wide = torch.promote_types(x.dtype, torch.float32)              # no half precision
    flat = x.to(wide).reshape(-1, *x.shape[-2:]).contiguous()       # (N, T, n)
    if start is not None and start.dim() > 2:                       # one start per matrix
        start = start.detach().expand(*x.shape[:-2], -1, -1).flatten(0, -3)     # (N, n, l)
    with torch.autocast(x.device.type, enabled=False):
        y, gram = _ProjectRows.apply(flat, rank, method, spans, basis_grad,
                                     dict(start=start, **options))
        y = y.view(x.shape).to(x.dtype)
    if not return_gram:
        return y
    return y, None if gram is None else gram.view(*x.shape[:-2], *gram.shape[-2:])


class _ProjectRows(torch.autograd.Function):
    """y[a:b] = x[a:b] P_s for each span (s, a, b), where P_s is the projector of the prefix x[:s].

    x (N, T, n). Rows outside all spans do not change. One span (T, 0, T) is the plain truncated
    SVD. Returns y and the Gram matrix G (N, n, n) of the longest prefix. G has no gradient, and is
    None unless the method is 'randomized'.

    The backward pass sums a formula at the top of this file over the spans. For the exact methods
    the formula is written as Z + Z^T = W [F o (W^T (M + M^T) W)] W^T, where o is the element-wise
    product and F is symmetric. F_ij = 1 / |lambda_i - lambda_j| for i <= k < j or j <= k < i, else
    0.
    """

    @staticmethod
    def forward(ctx, x, rank, method, spans, basis_grad, options):
        stops, basis, gram = [s for s, _, _ in spans], (), None
        if method == 'randomized':
            grams = _prefix_grams(x, stops)                         # (spans, N, n, n)
            q, inverse, before = _iterate(grams, rank, **options)
            projectors, gram = (q @ q.mT).to(x.dtype), grams[-1]
            if basis_grad and ctx.needs_input_grad[0]:
                basis = x, (q @ (inverse.mT @ before.mT)).to(x.dtype)
            ctx.mark_non_differentiable(gram)
        else:
            eigenvalues, w = _exact_spectrum(x, method, stops)
            w = w.to(x.dtype).to(x.device)                          # (spans, N, n, n), ascending
            projectors = w[..., -rank:] @ w[..., -rank:].mT
            basis = (x, eigenvalues, w) if basis_grad else ()
        ctx.save_for_backward(projectors, *basis)
        ctx.rank, ctx.spans = rank, spans
        return _apply_projectors(x, projectors, spans), gram

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, _):
        projectors, *basis = ctx.saved_tensors
        with torch.autocast(dy.device.type, enabled=False):
            dx = _apply_projectors(dy.contiguous(), projectors, ctx.spans)
            if basis:
                x, *basis = basis
                m = _stack([torch.bmm(x[:, a:b].mT, dy[:, a:b]) for _, a, b in ctx.spans])
                m = m + m.mT                                        # M + M^T (spans, N, n, n)
                if len(basis) == 1:
                    z = m @ basis[0]
                    z = z - projectors @ z                          # (I - P) (M + M^T) F
                    z = z + z.mT
                else:
                    eigenvalues, w = basis
                    f = _divided_differences(eigenvalues, ctx.rank, x)
                    z = w @ (f * (w.mT @ m @ w)) @ w.mT
                for (s, _, _), z_s in zip(ctx.spans, z):
                    dx[:, :s].baddbmm_(x[:, :s], z_s)
        return dx, None, None, None, None, None


def _apply_projectors(x, projectors, spans):
    """Multiply rows [a, b) of x (N, T, n) by the projector of each span (spans, N, n, n)."""
    if spans[0][1:] == (0, x.shape[1]):
        return torch.bmm(x, projectors[0])
    y = x.clone()
    for (_, a, b), p in zip(spans, projectors):
        y[:, a:b] = torch.bmm(x[:, a:b], p)
    return y


def _divided_differences(eigenvalues, rank, x):
    """Return the F of the exact methods in `_ProjectRows` (spans, N, n, n), in x's dtype.
    eigenvalues: (spans, N, n), ascending."""
    n, info = x.shape[-1], torch.finfo(x.dtype)
    # the second bound is for zero prefixes, because M also holds the rows after them
    least = (n * info.eps * eigenvalues[..., -1:]).clamp_min(info.tiny ** 0.75)
    eigenvalues, least = (t.to(x.dtype).to(x.device) for t in (eigenvalues, least))
    gap = (eigenvalues.unsqueeze(-1) - eigenvalues.unsqueeze(-2)).abs()
    # numbers, because inductor fails on bool != bool
    kept = (torch.arange(n, device=x.device) >= n - rank).to(x.dtype)
    return (kept.unsqueeze(-1) - kept).abs() / gap.maximum(least.unsqueeze(-1))


# --------------------------------------------------------------------------------------------------
# helpers

def _exact_spectrum(x, method, stops):
    """Return the spectrum of the Gram matrix of each prefix x[:stop]: eigenvalues (stops, ..., n),
    ascending, and eigenvectors (stops, ..., n, n). Both are in float64, on the CPU if the device
    has no float64."""
    if method == 'gram':
        grams = _prefix_grams(x if _lacks_float64(x.device) else x.double(), stops)
        eigenvalues, w = _decompose(torch.linalg.eigh, _to_float64(grams))
        return eigenvalues.clamp_min(0), w
    n, wide = x.shape[-1], _to_float64(x)
    rows = (wide[..., :stop, :] for stop in stops)                  # zero rows keep the row space
    padded = (F.pad(x_s, (0, 0, 0, max(0, n - x_s.shape[-2]))) for x_s in rows)     # Vh is (n, n)
    _, s, vh = zip(*(_decompose(torch.linalg.svd, x_s, full_matrices=False) for x_s in padded))
    return torch.stack(s).square().flip(-1), torch.stack([w.mT.flip(-1) for w in vh])


def _prefix_grams(x, stops):
    """Return the Gram matrix of each prefix x[:stop], (stops, ..., n, n). Each row enters a single
    product."""
    rows = [x[..., a:b, :] for a, b in zip((0, *stops), stops)]
    return _stack([*accumulate((r.mT @ r for r in rows), torch.add)])


def _iterate(grams, rank, power_iters, oversample, start):
    """Call `leading_subspace` for grams (..., n, n), in float64 if the device has it."""
    start = gaussian_start(grams.shape[-1], rank, oversample) if start is None else start
    _check_finite(grams)
    wide = grams if _lacks_float64(grams.device) else grams.double()
    return leading_subspace(wide, rank, start.to(wide.dtype).to(wide.device), power_iters)


def _decompose(f, a, **options):
    """Return f(a) for eigh or svd, or raise a clear error if a is not finite."""
    _check_finite(a)
    return f(a, **options)


def _check_finite(a):
    if a.device.type == 'cpu' and not torch.compiler.is_compiling() and not a.sum().isfinite():
        raise torch.linalg.LinAlgError('the input of the SVD has NaN or infinite values, or its '
                                       'squares overflow float32')


def _stack(tensors):
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0].unsqueeze(0)    # no copy


def _to_float64(x):
    """x in float64, on the CPU if the device has no float64."""
    return (x.cpu() if _lacks_float64(x.device) else x).double()


def _lacks_float64(device):
    return device.type == 'mps'


def _check(rank, method):
    if method not in METHODS:
        raise ValueError(f'unknown SVD method {method!r}; valid: {", ".join(METHODS)}')
    if rank is not None and rank < 1:
        raise ValueError(f'rank={rank}: must be at least 1')

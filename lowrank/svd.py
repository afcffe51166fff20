"""Truncated SVD of batches of small matrices, with a gradient that stays finite. Pure linear algebra: no GPT in here.

Everything rests on one identity. The best rank-k approximation of X (Eckart and Young 1936) is X_k = X P, where P
projects on the top-k eigenvectors W_k of the Gram matrix G = X^T X:

    X_k = X P,   P = W_k W_k^T,   G = W diag(lambda) W^T,   lambda_i = sigma_i^2.

X_k is unique whenever sigma_k > sigma_{k+1}; U, S, Vh are not (signs, rotations in repeated values). So all that is
differentiated is X_k, and only pairs i <= k < j enter its gradient. Given dL/dX_k = D and M = X^T D:

    dL/dX = D P + X (Z + Z^T),   Z = W_k A W_r^T,   A_ij = [W_k^T (M + M^T) W_r]_ij / (lambda_i - lambda_j).

Autograd through torch.linalg.svd divides by every lambda_i - lambda_j instead and gives NaN as soon as two singular
values are equal, which happens whenever X has rank below its width (zero rows, fewer rows than columns).

Letters: m rows, n columns, k rank; "..." any batch dimensions. Methods: 'standard' is torch.linalg.svd of X, 'gram' is
eigh of G. Both decompose in float64, since a float32 G, which squares the condition number, loses V_k where the gap at
the cut is small (measured: error 1e-3 at a gap of 2%, against 2e-7); everything else is float32. MPS has no float64,
hence a float32 sum for G there, and no eigh or svd before torch 2.14: those two move to the CPU and back.
"""

import torch

METHODS = ('standard', 'gram')


# ----------------------------------------------------------------------------------------------------------------------
# spectra

def truncated_svd(x, rank, method='gram'):
    """Leading singular triplets: x (..., m, n) -> U (..., m, k), S (..., k) descending, Vh (..., k, n), k = rank.

    U diag(S) Vh is the best rank-k approximation of x. For looking at spectra and for factoring weights; where a
    gradient is needed use `low_rank_approximation`. With 'gram', columns of U whose singular value is below what x's
    precision and G's can tell from zero are zero: their direction is not determined.
    Raises ValueError for a rank outside 1..min(m, n) or an unknown method.
    """
    _check(x, rank, method)
    if rank > min(x.shape[-2:]):
        raise ValueError(f'rank {rank} is more than the smaller side of {tuple(x.shape[-2:])}; '
                         f'valid: 1 to {min(x.shape[-2:])}')
    if x.shape[-2] < x.shape[-1]:
        u, s, vh = truncated_svd(x.mT, rank, method)
        return vh.mT, s, u.mT
    with _full_precision(x):
        xn, scale = _normalize(x)                                   # (..., m, n), (..., 1, 1)
        if method == 'standard':
            u, s, vh = _svd(xn)                                     # (..., m, n), (..., n), (..., n, n)
            u, s, vh = u[..., :rank], s[..., :rank], vh[..., :rank, :]
        else:
            gram = _gram(xn)                                        # (..., n, n)
            eigenvalues, w = _eigh_descending(gram, xn.dtype)       # (..., n), (..., n, n)
            s, w = eigenvalues[..., :rank].clamp_min(0).sqrt(), w[..., :rank]                   # (..., k), (..., n, k)
            n, eps = x.shape[-1], torch.finfo
            floor = s[..., :1] * max(n * eps(xn.dtype).eps, (n * eps(gram.dtype).eps) ** 0.5)
            u = torch.where((s > floor).unsqueeze(-2), xn @ w / s.clamp_min(eps(s.dtype).tiny).unsqueeze(-2), 0)
            vh = w.mT                                               # (..., k, n)
        return u.to(x.dtype), (s * scale.squeeze(-1)).to(x.dtype), vh.to(x.dtype)


def energy(s):
    """Cumulative share of the squared Frobenius norm: singular values s (..., n) descending -> (..., n) rising to 1.

    All-zero s gives ones: nothing is lost at any rank.
    """
    tiny = torch.finfo(torch.float64).tiny
    s = s.detach().cpu().double()                                   # MPS has no float64
    cumulative = (s / s.amax(-1, keepdim=True).clamp_min(tiny)).square().cumsum(-1)
    return torch.where(cumulative[..., -1:] > 0, cumulative / cumulative[..., -1:].clamp_min(tiny), 1.0)


def rank_for_energy(s, fraction):
    """Smallest rank whose cumulative energy reaches `fraction` (0 < fraction <= 1): s (..., n) -> int64 (...)."""
    if not 0 < fraction <= 1:
        raise ValueError(f'energy fraction must be above 0 and at most 1, got {fraction}')
    # one rounding error of the sum below the fraction still counts as reaching it, else fraction=1 may ask for n + 1
    reached = energy(s) >= fraction - s.shape[-1] * torch.finfo(torch.float64).eps
    return s.shape[-1] - reached.sum(-1) + 1


# ----------------------------------------------------------------------------------------------------------------------
# best rank-k approximation, differentiable

def low_rank_approximation(x, rank, method='gram'):
    """Best rank-k approximation X_k of every matrix: x (..., m, n) -> (..., m, n), differentiable once.

    rank None or >= min(m, n) returns x itself. The gradient is exact except where the gap at the cut,
    lambda_k - lambda_{k+1}, is below n * eps * lambda_1 (3.8e-6 lambda_1 for n = 32 in float32): there X_k is not
    unique and the gap is replaced by that bound, so gradients stay finite. Computed in float32 (float64 stays float64)
    whatever autocast says; the result has x's dtype. Each matrix is scaled to magnitude 1 first: X^T X would
    overflow at 1e30 and vanish at 1e-30. Raises ValueError for rank < 1 or an unknown method, and
    torch.linalg.LinAlgError for non-finite input.
    """
    _check(x, rank, method)
    m, n = x.shape[-2:]
    if rank is None or rank >= min(m, n):
        return x
    if m < n:                                                       # keep the Gram matrix the small one
        return low_rank_approximation(x.mT, rank, method).mT
    return _project(x, rank, method, ((m, 0, m),))


def causal_low_rank_approximation(x, rank, method='gram', block=32):
    """Rank-k projection in which no row depends on a later one: x (..., T, n) -> (..., T, n), differentiable once.

    Rows [s, 2s) for s = block, 2 block, 4 block, ... are projected on the top-k right singular vectors of rows [0, s):
    doubling blocks, so T rows need log2(T / block) bases. The first `block` rows, and rows whose basis would come from
    `rank` rows or fewer, pass unchanged. rank None or >= n returns x itself (T must not enter this rule: appending a
    row must not change an earlier one). Precision, gradient and errors as in `low_rank_approximation`.
    """
    _check(x, rank, method)
    if block < 1:
        raise ValueError(f'block must be at least 1 row, got {block}')
    rows, n = x.shape[-2:]
    if rank is None or rank >= n:
        return x
    spans, start = [], block
    while start < rows:
        if start > rank:
            spans.append((start, start, min(2 * start, rows)))
        start *= 2
    return _project(x, rank, method, tuple(spans)) if spans else x


def _project(x, rank, method, spans):
    with _full_precision(x):
        return _ProjectRows.apply(x.to(_working_dtype(x)), rank, method, spans).to(x.dtype)


class _ProjectRows(torch.autograd.Function):
    """y[a:b] = x[a:b] P_s for each span (s, a, b), P_s the projector on the top-k right singular vectors of x[:s].

    Rows outside every span pass unchanged. One span (T, 0, T) is the plain truncated SVD. The backward is the formula
    at the top of this file, summed over spans; it works on the scaled x: the scale cancels.
    """

    @staticmethod
    def forward(ctx, x, rank, method, spans):
        xn, _ = _normalize(x)                                       # (..., T, n)
        eigenvalues, w = _row_space(xn, method, spans)              # (spans, ..., n), (spans, ..., n, n)
        wk = w[..., :rank]                                          # (spans, ..., n, k)
        projectors = wk @ wk.mT                                     # (spans, ..., n, n)
        if spans[0][1:] == (0, x.shape[-2]):
            y = x @ projectors[0]                                   # (..., T, n), without a copy of x
        else:
            y = x.clone()
            for (_, a, b), p in zip(spans, projectors):
                y[..., a:b, :] = x[..., a:b, :] @ p
        ctx.save_for_backward(xn, eigenvalues, w, projectors)
        ctx.rank, ctx.spans = rank, spans
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        xn, eigenvalues, w, projectors = ctx.saved_tensors
        k, n = ctx.rank, xn.shape[-1]
        with torch.autocast(dy.device.type, enabled=False):
            m = torch.stack([xn[..., a:b, :].mT @ dy[..., a:b, :] for _, a, b in ctx.spans])    # (spans, ..., n, n)
            wk, wr = w[..., :k], w[..., k:]                         # (spans, ..., n, k), (spans, ..., n, n - k)
            gap = eigenvalues[..., :k, None] - eigenvalues[..., None, k:]                       # (spans, ..., k, n - k)
            bound = n * torch.finfo(gap.dtype).eps * eigenvalues[..., :1, None]
            gap = torch.maximum(gap, bound).clamp_min(torch.finfo(gap.dtype).tiny)
            z = wk @ (wk.mT @ (m + m.mT) @ wr / gap) @ wr.mT        # (spans, ..., n, n)
            z = z + z.mT
            if ctx.spans[0][1:] == (0, xn.shape[-2]):
                dx = dy @ projectors[0] + xn @ z[0]                 # (..., T, n)
            else:
                dx = dy.clone()
                for (_, a, b), p in zip(ctx.spans, projectors):
                    dx[..., a:b, :] = dy[..., a:b, :] @ p
                for (s, _, _), zs in zip(ctx.spans, z):
                    dx[..., :s, :] += xn[..., :s, :] @ zs
        return dx, None, None, None


# ----------------------------------------------------------------------------------------------------------------------
# the pieces

def _row_space(xn, method, spans):
    """Eigenvalues (spans, ..., n), descending, and eigenvectors (spans, ..., n, n) of G_s = x[:s]^T x[:s] per span."""
    if method == 'standard':
        values, vectors = [], []
        for s, _, _ in spans:
            rows = xn[..., :s, :]
            if s < xn.shape[-1]:                                    # zero rows leave the row space; Vh becomes (n, n)
                rows = torch.nn.functional.pad(rows, (0, 0, 0, xn.shape[-1] - s))
            _, sigma, vh = _svd(rows)                               # (..., n), (..., n, n)
            values.append(sigma.square())
            vectors.append(vh.mT)
        return torch.stack(values), torch.stack(vectors)
    grams, seen = [], 0
    for s, _, _ in spans:                                           # each row enters one product: G_2s = G_s + new rows
        new = _gram(xn[..., seen:s, :])                             # (..., n, n)
        grams.append(grams[-1] + new if grams else new)
        seen = s
    return _eigh_descending(torch.stack(grams), xn.dtype)


def _gram(x):
    """x^T x of x (..., m, n), in float64 where the device has it."""
    x = x if x.device.type == 'mps' else x.double()
    return x.mT @ x


def _eigh_descending(g, dtype):
    """eigh of symmetric g (..., n, n) in float64, largest eigenvalue first, as `dtype`: (..., n), (..., n, n)."""
    device = g.device
    eigenvalues, w = torch.linalg.eigh((g.cpu() if device.type == 'mps' else g).double())
    return eigenvalues.flip(-1).to(dtype).to(device), w.flip(-1).to(dtype).to(device)


def _svd(x):
    """torch.linalg.svd of tall x (..., m, n) in float64, reduced, as x's dtype: (..., m, n), (..., n), (..., n, n)."""
    parts = torch.linalg.svd((x.cpu() if x.device.type == 'mps' else x).double(), full_matrices=False)
    return tuple(part.to(x.dtype).to(x.device) for part in parts)


def _normalize(x):
    """x (..., m, n) in float32 or float64, divided by the power of two below its largest magnitude (so that dividing
    rounds nothing); and that power (..., 1, 1)."""
    x = x.to(_working_dtype(x))
    scale = x.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny).log2().floor().exp2()
    return x / scale, scale


def _working_dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32   # torch has no SVD in half precision


def _full_precision(x):
    return torch.autocast(x.device.type, enabled=False)


def _check(x, rank, method):
    if method not in METHODS:
        raise ValueError(f'unknown SVD method {method!r}; valid: {", ".join(METHODS)}')
    if rank is not None and rank < 1:
        raise ValueError(f'rank must be at least 1, got {rank}')
    if x.dim() < 2:
        raise ValueError(f'a matrix needs two dimensions, got shape {tuple(x.shape)}')

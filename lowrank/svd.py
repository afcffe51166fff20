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
eigh of G. Both decompose in float64: a float32 G squares the condition number and loses X_k where the gap at the cut is
small (docs/RESULTS.md, section 4), and overflows at 1e30. Everything else is float32. MPS has
no float64, hence a float32 sum for G there, and no eigh or svd before torch 2.14: those two run on the CPU.
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
        dtype, x = x.dtype, x.to(_working_dtype(x))
        if method == 'standard':
            u, s, vh = _svd(x)                                      # (..., m, n), (..., n), (..., n, n)
            u, s, vh = u[..., :rank], s[..., :rank], vh[..., :rank, :]
        else:
            s, w = (part.flip(-1)[..., :rank] for part in _gram_spectrum(x, (x.shape[-2],)))
            s, w = s[0], w[0]                                       # (..., k), (..., n, k)
            eps = torch.finfo(torch.float32 if x.device.type == 'mps' else torch.float64).eps
            floor = s[..., :1] * max(x.shape[-1] * torch.finfo(x.dtype).eps, (x.shape[-1] * eps) ** 0.5)
            u = torch.where((s > floor).unsqueeze(-2), x @ w.to(x.dtype) / s.clamp_min(torch.finfo(s.dtype).tiny).unsqueeze(-2), 0)
            vh = w.mT                                               # (..., k, n)
        return u.to(dtype), s.to(dtype), vh.to(dtype)


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

def low_rank_approximation(x, rank, method='gram', basis_grad=True):
    """Best rank-k approximation X_k of every matrix: x (..., m, n) -> (..., m, n), differentiable once.

    rank None or >= min(m, n) returns x itself. The gradient is exact except where the gap at the cut,
    lambda_k - lambda_{k+1}, is below n * eps * lambda_1 (3.8e-6 lambda_1 for n = 32 in float32): there X_k is hardly
    determined, and the gap is replaced by that bound, so gradients stay finite. basis_grad=False takes P for a constant: the
    gradient is D P alone. Computed in float32 (float64 stays float64)
    whatever autocast says; the result has x's dtype. Raises ValueError for rank < 1 or an unknown method, and
    torch.linalg.LinAlgError for non-finite input.
    """
    _check(x, rank, method)
    m, n = x.shape[-2:]
    if rank is None or rank >= min(m, n):
        return x
    if m < n:                                                       # keep the Gram matrix the small one
        return low_rank_approximation(x.mT, rank, method, basis_grad).mT
    return _project(x, rank, method, ((m, 0, m),), basis_grad)


def causal_low_rank_approximation(x, rank, method='gram', block=32, basis_grad=True):
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
    return _project(x, rank, method, tuple(spans), basis_grad) if spans else x


def _project(x, rank, method, spans, basis_grad):
    flat = x.to(_working_dtype(x)).reshape(-1, *x.shape[-2:]).contiguous()      # (N, T, n); a strided V is 4 x slower
    with _full_precision(x):
        return _ProjectRows.apply(flat, rank, method, spans, basis_grad).view(x.shape).to(x.dtype)


class _ProjectRows(torch.autograd.Function):
    """y[a:b] = x[a:b] P_s for each span (s, a, b), P_s the projector on the top-k right singular vectors of x[:s].

    x (N, T, n). Rows outside every span pass unchanged. One span (T, 0, T) is the plain truncated SVD. The backward is
    the formula at the top of this file summed over spans, written with the symmetric F, F_ij = 1 / |lambda_i -
    lambda_j| for i <= k < j or j <= k < i and 0 elsewhere: Z + Z^T = W [F o (W^T (M + M^T) W)] W^T. Lambda is in units
    of sigma_1^2, and one sigma_1 is divided out of each factor X, so that nothing in between overflows.
    """

    @staticmethod
    def forward(ctx, x, rank, method, spans, basis_grad):
        stops = tuple(s for s, _, _ in spans)
        sigma, w = _svd_spectrum(x, stops) if method == 'standard' else _gram_spectrum(x, stops)
        sigma, w = sigma.to(x.dtype), w.to(x.dtype)                 # (spans, N, n), (spans, N, n, n), smallest first
        wk = w[..., -rank:]                                         # (spans, N, n, k)
        projectors = wk @ wk.mT                                     # (spans, N, n, n)
        if basis_grad:
            ctx.save_for_backward(projectors, x, sigma, w)
        else:
            ctx.save_for_backward(projectors)
        ctx.rank, ctx.spans = rank, spans
        return _apply_projectors(x, projectors, spans)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        projectors, *basis = ctx.saved_tensors
        with _full_precision(dy):
            dx = _apply_projectors(dy.contiguous(), projectors, ctx.spans)
            if basis:
                _add_basis_gradient(dx, dy, *basis, ctx.rank, ctx.spans)
        return dx, None, None, None, None


def _apply_projectors(x, projectors, spans):
    """x (N, T, n), projectors (spans, N, n, n) -> (N, T, n): rows [a, b) of each span times its projector."""
    if spans[0][1:] == (0, x.shape[1]):
        return torch.bmm(x, projectors[0])
    y = x.clone()
    for (_, a, b), p in zip(spans, projectors):
        y[:, a:b] = torch.bmm(x[:, a:b], p)
    return y


def _add_basis_gradient(dx, dy, x, sigma, w, rank, spans):
    """dx[:s] += x[:s] (Z + Z^T) for every span, in place: dx, dy, x (N, T, n), sigma (spans, N, n), w (spans, N, n, n)."""
    n = x.shape[-1]
    floor = 1e-15 * x.abs().amax((-2, -1))                          # (N); the rows behind a basis may all be 0
    unit = torch.maximum(sigma[..., -1], floor).clamp_min(torch.finfo(x.dtype).tiny ** 0.75).unsqueeze(-1)  # (spans, N, 1)
    relative = (sigma / unit).square()                              # (spans, N, n)
    gap = (relative.unsqueeze(-1) - relative.unsqueeze(-2)).abs()   # (spans, N, n, n)
    kept = (torch.arange(n, device=x.device) >= n - rank).to(x.dtype)   # (n); 0 and 1, for inductor fails on bool != bool
    f = (kept.unsqueeze(-1) - kept).abs() / gap.clamp_min(n * torch.finfo(x.dtype).eps)              # (spans, N, n, n)
    m = torch.stack([torch.bmm(x[:, a:b].mT, dy[:, a:b]) for _, a, b in spans]) / unit.unsqueeze(-1)
    z = w @ (f * (w.mT @ (m + m.mT) @ w)) @ w.mT / unit.unsqueeze(-1)                           # (spans, N, n, n)
    for (s, _, _), zs in zip(spans, z):
        dx[:, :s].baddbmm_(x[:, :s], zs)


# ----------------------------------------------------------------------------------------------------------------------
# the pieces

def _gram_spectrum(x, stops):
    """Singular values (stops, ..., n), smallest first, and right singular vectors (stops, ..., n, n) of every x[:stop],
    in float64, from G = x[:stop]^T x[:stop]. Each row enters one product: G of a longer prefix adds the new rows."""
    if x.device.type == 'mps':                                      # no float64: a float32 G of x scaled to magnitude 1
        scale = x.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)       # (..., 1, 1)
        grams = _prefix_grams(x / scale, stops).cpu().double() * scale.cpu().double().square()
    else:
        grams = _prefix_grams(x.double(), stops)                    # (stops, ..., n, n)
    eigenvalues, w = torch.linalg.eigh(grams)
    sigma = eigenvalues.clamp_min(0).sqrt()
    return _back_to(x, sigma), _back_to(x, w)


def _prefix_grams(x, stops):
    rows = (x[..., a:b, :] for a, b in zip((0, *stops), stops))
    grams = torch.stack([r.mT @ r for r in rows])
    return grams.cumsum(0) if len(stops) > 1 else grams


def _svd_spectrum(x, stops):
    """The same from torch.linalg.svd of every x[:stop]."""
    spectra = []
    for stop in stops:
        rows = x[..., :stop, :]
        if stop < x.shape[-1]:                                      # zero rows leave the row space; Vh becomes (n, n)
            rows = torch.nn.functional.pad(rows, (0, 0, 0, x.shape[-1] - stop))
        _, sigma, vh = _svd(rows)                                   # (..., n), (..., n, n)
        spectra.append((sigma.flip(-1), vh.mT.flip(-1)))
    return tuple(torch.stack(parts) for parts in zip(*spectra))


def _svd(x):
    """torch.linalg.svd of tall x (..., m, n), reduced, in float64: (..., m, n), (..., n), (..., n, n)."""
    parts = torch.linalg.svd((x.cpu() if x.device.type == 'mps' else x).double(), full_matrices=False)
    return tuple(_back_to(x, part) for part in parts)


def _back_to(x, part):
    """A float64 result on x's device; MPS gets it in float32."""
    return part.float().to(x.device) if x.device.type == 'mps' else part


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

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
small (docs/RESULTS.md, section 4), and overflows at 1e19. Everything else is float32. MPS has no float64, hence float32
sums for G there, and no eigh or svd before torch 2.14: those two run on the CPU.

Scales: X times a power of two has the same P, to the bit, so squares are taken of X in units of a power of two near its
largest element or singular value, unless float64 holds them anyway, as it does those of every float32.
"""

import torch

METHODS = ('standard', 'gram')


# ----------------------------------------------------------------------------------------------------------------------
# spectra

def truncated_svd(x, rank, method='gram'):
    """Leading singular triplets: x (..., m, n) -> U (..., m, k), S (..., k) descending, Vh (..., k, n), k = rank.

    U diag(S) Vh is the best rank-k approximation of x. For looking at spectra and for factoring weights, hence float64
    inside (on the CPU where the device has none); where a gradient is needed use `low_rank_approximation`. With 'gram',
    columns of U whose singular value is below what x's precision and G's can tell from zero are zero: their direction
    is not determined. Raises ValueError for a rank outside 1..min(m, n) or an unknown method, and
    torch.linalg.LinAlgError where x has non-finite values.
    """
    _check(x, rank, method)
    m, n = x.shape[-2:]
    if rank is None or rank > min(m, n):
        fault = 'is missing' if rank is None else f'{rank} is more than the smaller side of {(m, n)}'
        raise ValueError(f'rank {fault}; valid: 1 to {min(m, n)}')
    if m < n:
        u, s, vh = truncated_svd(x.mT, rank, method)
        return vh.mT, s, u.mT
    with _full_precision(x):
        wide = (x.cpu() if _lacks_float64(x.device) else x).double()
        if method == 'standard':
            u, s, vh = _decompose(torch.linalg.svd, wide, method, full_matrices=False)
            u, s, vh = u[..., :rank], s[..., :rank], vh[..., :rank, :]                          # vh (..., k, n)
        else:
            spectrum = _gram_spectrum(wide, (m,))
            s, w = (part[0].flip(-1)[..., :rank] for part in spectrum)                          # (..., k), (..., n, k)
            # errors relative to sigma_1: n eps of x's own digits, and of G's, which are those of sigma^2, the root
            floor = s[..., :1] * max(n * torch.finfo(_working_dtype(x)).eps, (n * torch.finfo(wide.dtype).eps) ** 0.5)
            # where s is near 0 so is its column of x w, and all of its digits count: in float64
            divisor = s.clamp_min(torch.finfo(s.dtype).tiny).unsqueeze(-2)                      # (..., 1, k)
            u = torch.where((s > floor).unsqueeze(-2), wide @ w / divisor, 0)                   # (..., m, k)
            vh = w.mT                                               # (..., k, n)
        return tuple(part.to(x.dtype).to(x.device) for part in (u, s, vh))


def energy(s):
    """Cumulative share of the squared Frobenius norm: singular values s (..., n) descending -> (..., n) rising to 1.

    All-zero s gives ones: nothing is lost at any rank. Raises ValueError for NaN and inf.
    """
    tiny = torch.finfo(torch.float64).tiny
    s = s.detach().cpu().double()                                   # MPS has no float64
    if not s.isfinite().all():
        raise ValueError('singular values must be finite, got NaN or inf')
    cumulative = (s / s.amax(-1, keepdim=True).clamp_min(tiny)).square().cumsum(-1)
    return torch.where(cumulative[..., -1:] > 0, cumulative / cumulative[..., -1:].clamp_min(tiny), 1.0)


def rank_for_energy(s, fraction):
    """Smallest rank whose cumulative energy reaches `fraction` (0 < fraction <= 1): s (..., n) -> int64 (...).

    Raises ValueError for another fraction and for NaN and inf in s.
    """
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
    determined, and the gap is replaced by that bound, so gradients stay finite. basis_grad=False takes P for a
    constant: the gradient is D P alone. Computed in float32 (float64 stays float64) whatever autocast says; the result
    has x's dtype.

    Raises ValueError for rank < 1 or an unknown method, and torch.linalg.LinAlgError where a matrix to decompose has
    non-finite values. What is not decomposed passes NaN and inf on: x at full rank, and rows that no basis comes from.
    On CUDA eigh and svd may return NaN instead of raising: to look for it, the processor would have to wait for the
    device. Nothing is looked for under torch.compile.
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
    spans = tuple((start, start, min(2 * start, rows)) for start in causal_starts(rows, rank, block))
    return _project(x, rank, method, spans, basis_grad) if spans else x


def causal_starts(rows, rank, block):
    """Where the spans [s, 2s) of `causal_low_rank_approximation` begin that hold any of `rows` rows: ascending list."""
    starts, start = [], block
    while start < rows:
        if start > rank:
            starts.append(start)
        start *= 2
    return starts


def leading_eigenvectors(gram, rank):
    """Orthonormal W_k (..., n, k), eigenvectors of the k largest eigenvalues of symmetric gram (..., n, n), the largest
    last. Decomposed in float64, as above. Raises torch.linalg.LinAlgError for NaN and inf."""
    wide = (gram.cpu() if _lacks_float64(gram.device) else gram).double()
    return _decompose(torch.linalg.eigh, wide, 'gram')[1][..., -rank:].to(gram)


def low_rank_factors(x, rank, method='gram'):
    """A (..., m, k) and B (..., k, n) such that A B is the best rank-k approximation of x (..., m, n), even where it is
    not unique the one of `low_rank_approximation`: m < n: A orthonormal columns, the leading left singular vectors, and
    B = A^T x; else B orthonormal rows, the right ones, and A = x B^T. Not differentiable; precision and errors as
    there, but for rank > min(m, n), which is a ValueError, too."""
    _check(x, rank, method)
    if rank > min(x.shape[-2:]):
        raise ValueError(f'rank {rank} is more than the smaller side of {tuple(x.shape[-2:])}')
    if x.shape[-2] < x.shape[-1]:
        a, b = low_rank_factors(x.mT, rank, method)
        return b.mT, a.mT
    wide = x.detach().to(_working_dtype(x)).contiguous()
    spectrum = _svd_spectrum if method == 'standard' else _gram_spectrum
    with _full_precision(x):
        _, vectors = spectrum(wide, (x.shape[-2],))                 # (1, ..., n, n), smallest first
        w = vectors[0][..., -rank:].to(wide)
        return (wide @ w).to(x.dtype), w.mT.to(x.dtype)


def _project(x, rank, method, spans, basis_grad):
    flat = x.to(_working_dtype(x)).reshape(-1, *x.shape[-2:]).contiguous()      # (N, T, n); a strided V is 4 x slower
    with _full_precision(x):
        return _ProjectRows.apply(flat, rank, method, spans, basis_grad).view(x.shape).to(x.dtype)


class _ProjectRows(torch.autograd.Function):
    """y[a:b] = x[a:b] P_s for each span (s, a, b), P_s the projector on the top-k right singular vectors of x[:s].

    x (N, T, n). Rows outside every span pass unchanged. One span (T, 0, T) is the plain truncated SVD. The backward is
    the formula at the top of this file summed over spans, written with the symmetric F, F_ij = 1 / |lambda_i -
    lambda_j| for i <= k < j or j <= k < i and 0 elsewhere: Z + Z^T = W [F o (W^T (M + M^T) W)] W^T.
    """

    @staticmethod
    def forward(ctx, x, rank, method, spans, basis_grad):
        stops = tuple(s for s, _, _ in spans)
        sigma, w = _svd_spectrum(x, stops) if method == 'standard' else _gram_spectrum(x, stops)
        w = w.to(x.dtype).to(x.device)                              # (spans, N, n, n), smallest first
        wk = w[..., -rank:]                                         # (spans, N, n, k)
        projectors = wk @ wk.mT                                     # (spans, N, n, n)
        if basis_grad:
            ctx.save_for_backward(projectors, x, sigma, w)          # sigma (spans, N, n) stays in float64
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
    """dx[:s] += x[:s] (Z + Z^T) for every span, in place: dx, dy, x (N, T, n), sigma (spans, N, n), w (spans, N, n, n).

    X and sigma in units of a power of two near sigma_1, which cancels: nothing in between over- or underflows."""
    n, info = x.shape[-1], torch.finfo(x.dtype)
    top = sigma[..., -1:]                                           # (spans, N, 1)
    if spans[0][0] < x.shape[1]:
        # a basis may come from rows that are zero or nearly so: sigma_1 then counts as 1e-15 of the largest element of
        # all rows, so that later rows in that unit, and their products, stay within float32
        top = top.maximum(1e-15 * x.abs().amax((-2, -1)).to(sigma).unsqueeze(-1))
    shrink = 1 / _power_of_two(top, x.dtype)                        # (spans, N, 1)
    least = (n * info.eps * (top * shrink).square()).clamp_min(info.tiny)
    relative, least, shrink = (t.to(x.dtype).to(x.device) for t in ((sigma * shrink).square(), least, shrink))
    gap = (relative.unsqueeze(-1) - relative.unsqueeze(-2)).abs()   # (spans, N, n, n)
    kept = (torch.arange(n, device=x.device) >= n - rank).to(x.dtype)   # (n); 0 and 1: inductor fails on bool != bool
    f = (kept.unsqueeze(-1) - kept).abs() / gap.maximum(least.unsqueeze(-1))                    # (spans, N, n, n)
    scaled = [x[:, :b] * shrink[i].unsqueeze(-1) for i, (_, _, b) in enumerate(spans)]
    m = torch.stack([torch.bmm(rows[:, a:].mT, dy[:, a:b]) for rows, (_, a, b) in zip(scaled, spans)])
    z = w @ (f * (w.mT @ (m + m.mT) @ w)) @ w.mT                    # (spans, N, n, n)
    for (s, _, _), rows, zs in zip(spans, scaled, z):
        dx[:, :s].baddbmm_(rows[:, :s], zs)


# ----------------------------------------------------------------------------------------------------------------------
# the pieces

def _gram_spectrum(x, stops):
    """Singular values (stops, ..., n), smallest first, and right singular vectors (stops, ..., n, n) of every x[:stop],
    in float64, from G = x[:stop]^T x[:stop]. Each row enters one product: G of a longer prefix adds the new rows.
    Where the device has no float64 they are on the CPU."""
    rows = [x[..., a:b, :] for a, b in zip((0, *stops), stops)]
    if x.dtype == torch.float32 and not _lacks_float64(x.device):
        unit = None
        grams = torch.stack([r.mT @ r for r in (r.double() for r in rows)])                     # (stops, ..., n, n)
        grams = grams.cumsum(0) if len(stops) > 1 else grams
    else:
        grams, unit = _scaled_grams(rows)
    eigenvalues, w = _decompose(torch.linalg.eigh, grams, 'gram')
    sigma = eigenvalues.clamp_min(0).sqrt()
    return (sigma if unit is None else sigma * unit), w


def _scaled_grams(rows):
    """G of every prefix of a list of blocks of rows (..., m, n), and the power of two that is the unit of its rows:
    (blocks, ..., n, n) and (blocks, ..., 1), float64. Every block has its own unit and is summed before it meets
    another, so that no G depends on a later row, not even by rounding."""
    units = [_power_of_two(r.abs().amax((-2, -1), keepdim=True), r.dtype) for r in rows]
    grams = torch.stack([r.mT @ r for r in (r / unit for r, unit in zip(rows, units))])
    units = torch.stack(units)                                      # (blocks, ..., 1, 1)
    if _lacks_float64(grams.device):
        grams, units = grams.cpu(), units.cpu()
    grams, units = [*grams.double()], [*units.double()]
    for i in range(1, len(grams)):
        unit = torch.maximum(units[i - 1], units[i])
        grams[i] = grams[i - 1] * (units[i - 1] / unit).square() + grams[i] * (units[i] / unit).square()
        units[i] = unit
    return torch.stack(grams), torch.stack(units).squeeze(-1)


def _power_of_two(x, dtype):
    """A power of two at most x >= 0 and within a factor of 2 of it, or the nearest that dtype and its inverse hold."""
    limit = 126 if dtype == torch.float32 else 1022
    return torch.exp2(x.log2().floor().clamp(-limit, limit))


def _svd_spectrum(x, stops):
    """The same from torch.linalg.svd of every x[:stop]."""
    x = (x.cpu() if _lacks_float64(x.device) else x).double()
    spectra = []
    for stop in stops:
        rows = x[..., :stop, :]
        if stop < x.shape[-1]:                                      # zero rows leave the row space; Vh becomes (n, n)
            rows = torch.nn.functional.pad(rows, (0, 0, 0, x.shape[-1] - stop))
        _, sigma, vh = _decompose(torch.linalg.svd, rows, 'standard', full_matrices=False)      # (..., n), (..., n, n)
        spectra.append((sigma.flip(-1), vh.mT.flip(-1)))
    return tuple(torch.stack(parts) for parts in zip(*spectra))


def _decompose(f, a, method, **options):
    """f(a), with a plain word where a is not finite: eigh and svd either blame something else or return NaN."""
    if torch.compiler.is_compiling():
        return f(a, **options)
    try:
        parts = f(a, **options)
        # the eigenvalues or singular values are the smallest part, and NaN if any is
        if a.device.type != 'cpu' or _finite(min(parts, key=torch.Tensor.numel)):
            return parts
    except torch.linalg.LinAlgError:
        if _finite(a):
            raise
    raise torch.linalg.LinAlgError(f'the input has non-finite values (NaN or inf); SVD method {method!r}')


def _finite(x):
    return bool(x.isfinite().all())                                 # waits for a device


def _lacks_float64(device):
    """MPS; it has no eigh or svd before torch 2.14 either."""
    return device.type == 'mps'


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

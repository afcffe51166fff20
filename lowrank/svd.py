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

'randomized' has neither: P = Q Q^T comes from subspace iteration on G (subspace.py), a float32 product, and is nearly
the best projector, of rank k. No eigenvalue is ever computed, so its gradient is another: that of the last iteration
Q R = G Q', the basis Q' before it held constant (one-step differentiation, Bolte, Pauwels and Vaiter 2023),

    dL/dX = D P + X (Z + Z^T),   Z = (I - P) (M + M^T) F,   F = Q R^-T Q'^T,

exact for the function that is computed where Q' comes from elsewhere, without small denominators: at convergence F is
the pseudo-inverse of P G, and what the exact A_ij divides by lambda_i - lambda_j is here divided by lambda_i.

Scales: X times a power of two has the same P, to the bit, so squares are taken of X in units of a power of two near its
largest element or singular value, unless float64 holds them anyway, as it does those of every float32.
"""

from itertools import accumulate

import torch

from lowrank.subspace import gaussian_start, leading_subspace

EXACT_METHODS = ('standard', 'gram')
METHODS = (*EXACT_METHODS, 'randomized')


# ----------------------------------------------------------------------------------------------------------------------
# spectra

def truncated_svd(x, rank, method='gram', *, power_iters=2, oversample=0):
    """Leading singular triplets: x (..., m, n) -> U (..., m, k), S (..., k) descending, Vh (..., k, n), k = rank.

    U diag(S) Vh is the best rank-k approximation of x, with 'randomized' nearly so. For looking at spectra and for
    factoring weights, hence float64 inside (on the CPU where the device has none); where a gradient is needed use
    `low_rank_approximation`. With 'gram', columns of U whose singular value is below what x's precision and G's can
    tell from zero are zero: their direction is not determined; with 'randomized' those rows of Vh are short,
    and so they are where sigma_k is below 1e-3 sigma_1. Raises
    ValueError for a rank outside 1..min(m, n) or an unknown method, and torch.linalg.LinAlgError where x has non-finite
    values.
    """
    _check(x, rank, method)
    m, n = x.shape[-2:]
    if rank is None or rank > min(m, n):
        fault = 'is missing' if rank is None else f'{rank} is more than the smaller side of {(m, n)}'
        raise ValueError(f'rank {fault}; valid: 1 to {min(m, n)}')
    if m < n:
        u, s, vh = truncated_svd(x.mT, rank, method, power_iters=power_iters, oversample=oversample)
        return vh.mT, s, u.mT
    with _full_precision(x):
        wide = (x.cpu() if _lacks_float64(x.device) else x).double()
        if method == 'standard':
            u, s, vh = _decompose(torch.linalg.svd, wide, method, full_matrices=False)
            u, s, vh = u[..., :rank], s[..., :rank], vh[..., :rank, :]                          # vh (..., k, n)
        elif method == 'randomized':                                # the SVD of x projected on the basis Q (..., n, k)
            q = _iterate(_working_grams(wide, (m,))[0][0], rank, power_iters, oversample, None)[0]
            u, s, vh = _decompose(torch.linalg.svd, wide @ q.to(wide), method, full_matrices=False)
            vh = vh @ q.to(wide).mT                                 # (..., k, k) x (..., k, n)
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


def energy_kept(x, y):
    """Share of x's squared Frobenius norm that is left in an approximation y of it: both (..., m, n) -> float64 (...).
    1 where x is zero."""
    x, y = (t.detach().cpu().double() for t in (x, y))
    unit = x.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    norm = torch.linalg.matrix_norm(x / unit).clamp_min(torch.finfo(x.dtype).tiny)
    return 1 - (torch.linalg.matrix_norm((x - y) / unit) / norm).square()


def effective_rank(x):
    """exp of the entropy of the singular values, taken as shares of their sum (Roy and Vetterli 2007): x (..., m, n) ->
    float64 (...), 1 for a rank-one matrix or zero, n where all are equal. NaN where x is not finite."""
    x = x.detach().cpu().double()
    x = x / x.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    finite = x.isfinite().all(-1).all(-1)                           # (...)
    x = torch.where(finite[..., None, None], x, 0)
    squares = torch.linalg.eigvalsh(x.mT @ x if x.shape[-2] > x.shape[-1] else x @ x.mT)
    s = squares.clamp_min(0).sqrt()                                 # (..., n)
    shares = s / s.sum(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    rank = torch.special.entr(shares).sum(-1).exp()
    return torch.where(finite, rank, torch.nan)


# ----------------------------------------------------------------------------------------------------------------------
# best rank-k approximation, differentiable

def split_evenly(u, s, vh, floor):
    """Factors b (m, k) and a (k, n) of u (m, k) diag(s) vh (k, n), with the roots of s on either side but next to zero:

        b = u diag(s / sqrt(t)),   a = diag(sqrt(t)) vh,   t = max(s, floor),

    for if both were zero neither would ever get a gradient, which is a multiple of the other. A floor of 0, that of the
    matrix 0, has no scale to give: t is 1 then."""
    root = s.clamp_min(float(floor) or 1.0).sqrt()
    return u * (s / root), root[:, None] * vh


def low_rank_approximation(x, rank, method='gram', basis_grad=True, *, power_iters=2, oversample=0, start=None,
                           note=None):
    """Best rank-k approximation X_k of every matrix: x (..., m, n) -> (..., m, n), differentiable once.

    rank None or >= min(m, n) returns x itself. The gradient is exact except where the gap at the cut,
    lambda_k - lambda_{k+1}, is below n * eps * lambda_1 (3.8e-6 lambda_1 for n = 32 in float32): there X_k is hardly
    determined, and the gap is replaced by that bound, so gradients stay finite. basis_grad=False takes P for a
    constant: the gradient is D P alone. Computed in float32 (float64 stays float64) whatever autocast says; the result
    has x's dtype.

    'randomized' is the best one to a few per cent of the residual, as long as sigma_k is above 1e-3 sigma_1 (3e-3 on a
    device without float64), and has the gradient at the top of this file. The iteration starts from `start`
    (..., n, l), l >= k, its batch dimensions those of x or fewer; None: a fixed Gaussian one of k + 4 + oversample
    columns. `power_iters` products with G precede the last one, 0 for a start that is a basis of something near. note:
    called with G (..., n, n), of matrices out of the ordinary in a unit of their own, for who wants to make a start of
    it. The other methods have no use for the four.

    Raises ValueError for rank < 1 or an unknown method, and torch.linalg.LinAlgError where a matrix to decompose has
    non-finite values. What is not decomposed passes NaN and inf on: x at full rank, and rows that no basis comes from.
    On CUDA eigh and svd may return NaN instead of raising: to look for it, the processor would have to wait for the
    device. Nothing is looked for under torch.compile.
    """
    _check(x, rank, method)
    m, n = x.shape[-2:]
    if rank is None or rank >= min(m, n):
        return x
    if m < n and start is None and note is None:                    # keep the Gram matrix the small one
        return low_rank_approximation(x.mT, rank, method, basis_grad, power_iters=power_iters, oversample=oversample).mT
    return _project(x, rank, method, ((m, 0, m),), basis_grad, power_iters, oversample, start, note)


def causal_low_rank_approximation(x, rank, method='gram', block=32, basis_grad=True, *, power_iters=2, oversample=0,
                                  start=None, note=None):
    """Rank-k projection in which no row depends on a later one: x (..., T, n) -> (..., T, n), differentiable once.

    Rows [s, 2s) for s = block, 2 block, 4 block, ... are projected on the top-k right singular vectors of rows [0, s):
    doubling blocks, so T rows need log2(T / block) bases. The first `block` rows, and rows whose basis would come from
    `rank` rows or fewer, pass unchanged. rank None or >= n returns x itself (T must not enter this rule: appending a
    row must not change an earlier one). The rest as in `low_rank_approximation`; note gets G of all rows that a basis
    comes from.
    """
    _check(x, rank, method)
    if block < 1:
        raise ValueError(f'block must be at least 1 row, got {block}')
    rows, n = x.shape[-2:]
    if rank is None or rank >= n:
        return x
    spans = tuple((start, start, min(2 * start, rows)) for start in causal_starts(rows, rank, block))
    return _project(x, rank, method, spans, basis_grad, power_iters, oversample, start, note) if spans else x


def causal_starts(rows, rank, block):
    """Where the spans [s, 2s) of `causal_low_rank_approximation` begin that hold any of `rows` rows: ascending list."""
    starts, start = [], block
    while start < rows:
        if start > rank:
            starts.append(start)
        start *= 2
    return starts


def leading_eigenvectors(gram, rank, method='gram', *, power_iters=2, oversample=0, start=None):
    """Orthonormal W_k (..., n, k) that spans the eigenvectors of the k largest eigenvalues of gram (..., n, n),
    symmetric and positive semidefinite: by eigh in float64, or with 'randomized' as in `low_rank_approximation`. Raises
    torch.linalg.LinAlgError for NaN and inf."""
    if method == 'randomized':
        if gram.device.type == 'cpu' and not _finite(gram):
            raise _non_finite(method)
        unit = _power_of_two(gram.diagonal(dim1=-2, dim2=-1).amax(-1), gram.dtype)
        return _iterate(gram / unit[..., None, None], rank, power_iters, oversample, start)[0].to(gram)
    wide = (gram.cpu() if _lacks_float64(gram.device) else gram).double()
    return _decompose(torch.linalg.eigh, wide, method)[1][..., -rank:].to(gram)


def low_rank_factors(x, rank, method='gram', *, power_iters=2, oversample=0, start=None):
    """A (..., m, k) and B (..., k, n) such that A B is the best rank-k approximation of x (..., m, n), even where it is
    not unique the one of `low_rank_approximation`: m < n: A orthonormal columns, the leading left singular vectors, and
    B = A^T x; else B orthonormal rows, the right ones, and A = x B^T. Not differentiable; precision, options and errors
    as there, but for rank > min(m, n), which is a ValueError, too; of a matrix of lower rank 'randomized' leaves some
    of the orthonormal ones short."""
    _check(x, rank, method)
    if rank > min(x.shape[-2:]):
        raise ValueError(f'rank {rank} is more than the smaller side of {tuple(x.shape[-2:])}')
    if x.shape[-2] < x.shape[-1] and start is None:
        a, b = low_rank_factors(x.mT, rank, method, power_iters=power_iters, oversample=oversample)
        return b.mT, a.mT
    wide = x.detach().to(_working_dtype(x)).contiguous()
    stops = (x.shape[-2],)
    with _full_precision(x):
        if method == 'randomized':
            w = _iterate(_working_grams(wide, stops)[0][0], rank, power_iters, oversample, start)[0].to(wide)
        else:
            _, vectors = (_svd_spectrum if method == 'standard' else _gram_spectrum)(wide, stops)
            w = vectors[0][..., -rank:].to(wide)                    # of (1, ..., n, n), smallest first
        return (wide @ w).to(x.dtype), w.mT.to(x.dtype)


def _project(x, rank, method, spans, basis_grad, power_iters, oversample, start, note):
    flat = x.to(_working_dtype(x)).reshape(-1, *x.shape[-2:]).contiguous()      # (N, T, n); a strided V is 4 x slower
    with _full_precision(x):
        if method != 'randomized':
            return _ProjectRows.apply(flat, rank, method, spans, basis_grad).view(x.shape).to(x.dtype)
        if start is not None:                                       # a constant; one for each matrix if it has a batch
            start = start.detach()
            start = start if start.dim() == 2 else start.expand(*x.shape[:-2], -1, -1).flatten(0, -3)       # (N, n, l)
        y, grams = _ProjectRowsOneStep.apply(flat, rank, spans, basis_grad, power_iters, oversample, start)
        if note is not None:
            note(grams.view(*x.shape[:-2], *grams.shape[-2:]))
        return y.view(x.shape).to(x.dtype)


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
                x, sigma, w = basis
                unit, f = _divided_differences(x, sigma, ctx.rank, ctx.spans)
                _add_basis_gradient(dx, dy, x, unit, ctx.spans, lambda m: w @ (f * (w.mT @ m @ w)) @ w.mT)
        return dx, None, None, None, None


class _ProjectRowsOneStep(torch.autograd.Function):
    """The same with P_s = Q Q^T of 'randomized' and its one-step gradient. -> y (N, T, n), and G of the longest prefix
    (N, n, n), in units of a power of two where its elements are out of the ordinary."""

    @staticmethod
    def forward(ctx, x, rank, spans, basis_grad, power_iters, oversample, start):
        grams, unit = _working_grams(x, tuple(s for s, _, _ in spans))      # (spans, N, n, n), (spans, N, 1) or None
        if start is not None and start.dim() > 2:
            start = start.repeat(len(spans), 1, 1)                  # (spans N, n, l)
        q, inverse, before = _iterate(grams.flatten(0, 1), rank, power_iters, oversample, start)
        projectors = (q @ q.mT).to(x.dtype).view(grams.shape)       # (spans, N, n, n)
        if basis_grad and ctx.needs_input_grad[0]:
            f = (q @ (inverse.mT @ before.mT)).to(x.dtype)          # (spans N, n, n)
            ctx.save_for_backward(projectors, x, f.view(grams.shape), unit)
        else:
            ctx.save_for_backward(projectors)
        ctx.spans = spans
        last = grams[-1]
        ctx.mark_non_differentiable(last)
        return _apply_projectors(x, projectors, spans), last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, _):
        projectors, *basis = ctx.saved_tensors
        with _full_precision(dy):
            dx = _apply_projectors(dy.contiguous(), projectors, ctx.spans)
            if basis:
                x, f, unit = basis                                  # f (spans, N, n, n)
                if unit is not None:
                    safe = _unit_for_all_rows(unit, x, ctx.spans)
                    f, unit = f * (unit / safe).square().unsqueeze(-1), safe

                def one_step(m):
                    z = m @ f
                    z = z - projectors @ z                          # (I - P) (M + M^T) F
                    return z + z.mT
                _add_basis_gradient(dx, dy, x, unit, ctx.spans, one_step)
        return dx, None, None, None, None, None, None


def _apply_projectors(x, projectors, spans):
    """x (N, T, n), projectors (spans, N, n, n) -> (N, T, n): rows [a, b) of each span times its projector."""
    if spans[0][1:] == (0, x.shape[1]):
        return torch.bmm(x, projectors[0])
    y = x.clone()
    for (_, a, b), p in zip(spans, projectors):
        y[:, a:b] = torch.bmm(x[:, a:b], p)
    return y


def _add_basis_gradient(dx, dy, x, unit, spans, z_of):
    """dx[:s] += x[:s] Z' for every span, in place, Z' = z_of(M + M^T) symmetric (spans, N, n, n): dx, dy, x (N, T, n).
    X in units (spans, N, 1), powers of two, or None: nothing in between over- or underflows."""
    scaled = [x[:, :b] if unit is None else x[:, :b] / unit[i].unsqueeze(-1) for i, (_, _, b) in enumerate(spans)]
    m = _stack([torch.bmm(rows[:, a:].mT, dy[:, a:b]) for rows, (_, a, b) in zip(scaled, spans)])
    for (s, _, _), rows, z in zip(spans, scaled, z_of(m + m.mT)):
        dx[:, :s].baddbmm_(rows[:, :s], z)


def _divided_differences(x, sigma, rank, spans):
    """The unit of X in which F is, a power of two near sigma_1 (spans, N, 1), and F (spans, N, n, n), in x's dtype."""
    n, info = x.shape[-1], torch.finfo(x.dtype)
    top = _unit_for_all_rows(sigma[..., -1:], x, spans)             # (spans, N, 1)
    unit = _power_of_two(top, x.dtype)
    least = (n * info.eps * (top / unit).square()).clamp_min(info.tiny)
    relative, least, unit = (t.to(x.dtype).to(x.device) for t in ((sigma / unit).square(), least, unit))
    gap = (relative.unsqueeze(-1) - relative.unsqueeze(-2)).abs()   # (spans, N, n, n)
    kept = (torch.arange(n, device=x.device) >= n - rank).to(x.dtype)   # (n); 0 and 1: inductor fails on bool != bool
    return unit, (kept.unsqueeze(-1) - kept).abs() / gap.maximum(least.unsqueeze(-1))


def _unit_for_all_rows(unit, x, spans):
    """A basis may come from rows that are zero or nearly so: its unit (spans, N, 1) then counts as 1e-15 of the largest
    element of all rows, so that later rows in that unit, and their products, stay within float32."""
    if spans[0][0] == x.shape[1]:
        return unit
    return unit.maximum(1e-15 * x.abs().amax((-2, -1)).to(unit).unsqueeze(-1))


# ----------------------------------------------------------------------------------------------------------------------
# the pieces

def _gram_spectrum(x, stops):
    """Singular values (stops, ..., n), smallest first, and right singular vectors (stops, ..., n, n) of every x[:stop],
    in float64, from G = x[:stop]^T x[:stop]. Each row enters one product: G of a longer prefix adds the new rows.
    Where the device has no float64 they are on the CPU."""
    if x.dtype == torch.float32 and not _lacks_float64(x.device):
        grams, unit = _plain_grams(x.double(), stops), None
    else:
        grams, unit = _scaled_grams(x, stops)
        if _lacks_float64(x.device):
            grams, unit = grams.cpu().double(), unit.cpu().double()
    eigenvalues, w = _decompose(torch.linalg.eigh, grams, 'gram')
    sigma = eigenvalues.clamp_min(0).sqrt()
    return (sigma if unit is None else sigma * unit), w


def _working_grams(x, stops):
    """G of every x[:stop] (stops, ..., n, n) in x's dtype, and the unit of its rows (stops, ..., 1), None: 1. On the
    CPU, where looking at values costs no waiting, units are only taken where squares might not do without."""
    if x.device.type == 'cpu' and x.numel() and not torch.compiler.is_compiling():
        grams = _plain_grams(x, stops)
        if _is_ordinary(x, grams[0]):
            return grams, None
        if not _finite(x[..., :stops[-1], :]):
            raise _non_finite('randomized')
    return _scaled_grams(x, stops)


def _is_ordinary(x, gram):
    """Whether x does without units: from 1e-6 to 1e6 there is room in float32 for gradients up to 1e30. gram: G of the
    first rows of x, which a basis comes from."""
    (low, high), least = x.aminmax(), gram.diagonal(dim1=-2, dim2=-1).sum(-1).amin()
    return low > -2.0 ** 20 and high < 2.0 ** 20 and least > 2.0 ** -40                         # NaN is neither


def _plain_grams(x, stops):
    """Each row enters one product: G of a longer prefix adds the new rows. Not by cumsum, which has more digits inside
    than `_scaled_grams`: later rows decide which of the two it is."""
    rows = [x[..., a:b, :] for a, b in zip((0, *stops), stops)]
    return _stack([*accumulate((r.mT @ r for r in rows), torch.add)])   # (stops, ..., n, n)


def _scaled_grams(x, stops):
    """G of every x[:stop] (stops, ..., n, n) and the power of two that is the unit of its rows (stops, ..., 1). Every
    block of rows has its own unit and is summed before it meets another, so that no G depends on a later row, not even
    by rounding."""
    rows = [x[..., a:b, :] for a, b in zip((0, *stops), stops)]
    units = [_power_of_two(r.abs().amax((-2, -1), keepdim=True), r.dtype) for r in rows]        # (..., 1, 1) each
    grams = [r.mT @ r for r in (r / unit for r, unit in zip(rows, units))]
    for i in range(1, len(grams)):
        unit = torch.maximum(units[i - 1], units[i])
        grams[i] = grams[i - 1] * (units[i - 1] / unit).square() + grams[i] * (units[i] / unit).square()
        units[i] = unit
    return torch.stack(grams), torch.stack(units).squeeze(-1)


def _iterate(grams, rank, power_iters, oversample, start):
    """`leading_subspace` of grams (..., n, n), in float64 where the device has it."""
    if power_iters < 0 or oversample < 0:
        raise ValueError(f'power_iters and oversample must be at least 0, got {power_iters} and {oversample}')
    wide = grams if _lacks_float64(grams.device) else grams.double()
    if start is None:
        start = gaussian_start(grams.shape[-1], rank, oversample)
    return leading_subspace(wide, rank, start.to(wide.dtype).to(wide.device), power_iters)


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
    raise _non_finite(method)


def _non_finite(method):
    return torch.linalg.LinAlgError(f'the input has non-finite values (NaN or inf); SVD method {method!r}')


def _stack(tensors):
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0].unsqueeze(0)                # without a copy


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

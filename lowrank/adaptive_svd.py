"""When a weight should train through its minor components alone: six measurements and decisions, without any state.

A weight W (m, n) = U diag(S) V^T has g = min(m, n) singular triplets. Low-rank mode freezes the k = g - r principal
ones, which hold what has been learned, and trains the r minor ones (MiLoRA, arXiv:2406.09044). Gradients have low rank,
and their subspace turns slowly (GaLore, arXiv:2403.03507): so what is asked here every few steps is whether the
protected subspace has come to rest, and whether the gradient runs into it. Mode and patience are the caller's.

Letters: m outputs, n inputs, g = min(m, n), r minor components, k = g - r principal ones; r above g counts as g. U
and V have orthonormal columns in the order of S (g), descending: (m, g) and (n, g), or the k leading ones alone. V is
V, not V^T. Everything is computed in float64 on the CPU (MPS has none) and comes back as Python numbers. NaN and inf in
a weight or its SVD are a ValueError, and so are fewer than k columns; in a gradient they are no information.
"""

import math

import torch

from lowrank.svd import rank_for_energy

WARMUP_STEPS = 10                   # before that W is mostly its initialisation, which has nothing to protect
FIRST_PRINCIPAL = 10                # k at first: little is protected until training has settled what is worth it
LEAST_RANK = 8                      # with r below it a layer could hardly learn any more
SHRINK = 0.8                        # of r at a decrease: from 246 to 8 in 15 of them
STABLE_CHANGE = 0.1                 # relative change of the smallest singular values up to which r may decrease
WATCHED_PART = 4                    # these are at most g // 4: among more, the large ones would hide the small
ENERGY = 0.95                       # of the sum of sigma^2, at which a spectrum's concentration is read
SAFE_ERROR = 0.01                   # relative: the principal part has 99.99% of the energy of W
DANGER_ALIGNMENT = 0.4              # share of the gradient's energy in the protected space
DANGER_EXCESS = 0.25                # the same bar at k/m = 0.2; with more protected, 0.4 is near chance and this rises
CALM_ANGLE = 0.1                    # radians, 5.7 degrees: the protected space has come to rest
CALM_MINOR = 0.6                    # 1 - DANGER_ALIGNMENT: never calm and in danger at once

DIAGNOSTICS = ('reason', 'why', 'principal_alignment', 'minor_alignment', 'chance', 'lift', 'excess', 'subspace_angle',
               'reconstruction_error', 'reconstruction_safe', 'dropped_error', 'concentration', 'concentration_rank')


def compute_subspace_angle(U1, U2, k):
    """Largest principal angle, in radians from 0 to pi/2, between the spans of the k leading columns of U1 and U2
    (m, >= k); 0 for k = 0. By cosines above pi/4 (Bjoerck and Golub 1973), by sines below it (Knyazev and Argentati
    2002), where the cosine is flat: acos in float32 finds 1e-3 between a space and itself."""
    first, second = _leading('U1', U1, k), _leading('U2', U2, k)
    if k == 0:
        return 0.0
    # float32 columns are orthonormal to 3e-6 only, which would count as an angle; those of Q have the same span
    first, second = torch.linalg.qr(first).Q, torch.linalg.qr(second).Q                         # (m, k)
    shared = first.mT @ second                                      # (k, k)
    sine = torch.linalg.matrix_norm(second - first @ shared, 2).item()
    if sine < math.sqrt(0.5):
        return math.asin(sine)
    return math.acos(torch.linalg.svdvals(shared)[-1].item())


def compute_singular_value_concentration(S, percentile=ENERGY):
    """How few of the singular values S (g) have `percentile` of the sum of their squares -> (rank / g, rank); (0.0, 0)
    where all are zero. Raises ValueError unless 0 < percentile <= 1."""
    S = _wide('S', S)
    rank = rank_for_energy(S, percentile).item() if S.any() else 0
    return rank / max(len(S), 1), rank


def compute_reconstruction_error(W, U, S, V, r):
    """Relative Frobenius error of the principal components alone, |W - U_k S_k V_k^T| / |W|, and whether it is below
    SAFE_ERROR: W (m, n), U (m, >= k), S (g), V (n, >= k) -> (float, bool); 0 for W = 0. Low-rank mode drops nothing:
    this is no damage done, it says how much of W is protected."""
    W, S = _wide('W', W), _wide('S', S)
    k = _principal_count(S, r)
    principal = _leading('U', U, k) * S[:k] @ _leading('V', V, k).mT    # (m, k) x (k, n)
    error = math.sqrt(_energy_share(W - principal, W))
    return error, error < SAFE_ERROR


def compute_gradient_alignment(grad_W, U, S, r):
    """Shares of a gradient's energy inside the protected space, |U_k^T G|^2 / |G|^2, and outside: grad_W (m, n), U
    (m, >= k), S (g), which counts the components -> (principal, minor), of sum 1; (0.0, 0.0) for a gradient that is
    None, zero or not finite. To be read beside its `chance`, `lift` and `excess`. The step an optimizer makes of the
    gradient has another alignment: it may be passed in its place."""
    principal_space = _leading('U', U, _principal_count(_wide('S', S), r))                      # (m, k)
    if grad_W is None or not is_finite(grad_W) or not grad_W.any():
        return 0.0, 0.0
    gradient = grad_W.detach().cpu().double()                       # (m, n)
    principal = min(_energy_share(principal_space.mT @ gradient, gradient), 1.0)    # float32 columns may be too long
    return principal, 1 - principal


def chance(k, m):
    """Mean principal alignment of random gradients (m, n), c = k/m. With independent Gaussian entries it is distributed
    as Beta(k n / 2, (m - k) n / 2), whose variance is 2 c (1 - c) / (m n + 2)."""
    return k / m


def lift(principal, c):
    """Principal alignment in multiples of its chance level c; 1 for c = 0, where nothing is protected."""
    return principal / c if c > 0 else 1.0


def excess(principal, c):
    """Principal alignment where chance is 0, below it negative, and a gradient wholly inside the protected space 1;
    0 for c = 1, where every gradient is."""
    return (principal - c) / (1 - c) if c < 1 else 0.0


def determine_next_r(S, S_prev, r_current, r_min=LEAST_RANK):
    """The next r and, in words, why: S, S_prev (g), the singular values now and at the last analysis (None: the first)
    -> (r, why), min(r_min, g - 1) <= r <= g - 1. At first it is g - FIRST_PRINCIPAL. Then, while the smallest
    min(r, g // 4) of them, but one at least, change by more than STABLE_CHANGE, as a vector relative to what it was,
    r stays; else it decreases, and so at every call: patience is the caller's. Raises ValueError where S is empty or
    S_prev has another length."""
    S, g = _wide('S', S), len(S)
    if g == 0 or S_prev is not None and len(S_prev) != g:
        raise ValueError(f'{g} singular values in S, before it {S_prev if S_prev is None else len(S_prev)}; valid: as '
                         'many as before, at least 1')
    if S_prev is None:
        r, why = g - FIRST_PRINCIPAL, f'Initial r: protects {FIRST_PRINCIPAL} components'
    else:
        watched = max(min(r_current, g // WATCHED_PART), 1)
        before = _wide('S_prev', S_prev)[-watched:]
        change = math.sqrt(_energy_share(S[-watched:] - before, before))
        if change > STABLE_CHANGE:
            r, why = r_current, f'minor singular values changing by {change:.1%}'
        else:
            r, why = int(SHRINK * r_current), f'minor singular values stable, decrease r: changed by {change:.1%}'
    return max(min(r, g - 1), min(r_min, g - 1)), why


def should_use_lowrank_training(W, U, S, V, W_prev, U_prev, S_prev, V_prev, grad_W, r_current, step, *,
                                in_lowrank_mode=False):
    """Whether W should train in low-rank mode -> (True, False or None: as before; r_next; diagnostics). The first row
    that applies decides:

        step < WARMUP_STEPS                                             False   warmup_period
        grad_W is None                                                  None    no_gradient_yet
        U_prev or S_prev is None                                        None    initial_svd_computation
        principal > DANGER_ALIGNMENT and excess > DANGER_EXCESS         True    gradient_clobbering_risk
        angle < CALM_ANGLE, minor > CALM_MINOR and error < SAFE_ERROR   True    optimal_lowrank_conditions
        error >= SAFE_ERROR, unless in low-rank mode                    False   reconstruction_unsafe
        otherwise                                                       None    continue_current_mode

    W (m, n), its SVD U (m, >= k), S (g), V (n, >= k) for k = g - r_current, and those of the last analysis; W_prev and
    V_prev are not looked at and need not be kept. grad_W (m, n); one that is zero or not finite is neither danger nor
    calm. in_lowrank_mode is how W trains now: a large error is no reason to leave that mode. r_next is r_current in the
    first two rows, else what `determine_next_r` proposes.

    diagnostics has the keys DIAGNOSTICS: the reason, `why` r_next is what it is, and the metrics, None where they were
    not due or, lift and excess, mean nothing. dropped_error is the relative error of W without its FIRST_PRINCIPAL
    smallest components, 0.007 even for a Gaussian 256 x 256: not to be taken for reconstruction_error."""
    seen = dict.fromkeys(DIAGNOSTICS)

    def decided(decision, reason, r_next=r_current):
        return decision, r_next, seen | {'reason': reason}

    if step < WARMUP_STEPS:
        return decided(False, 'warmup_period')
    if grad_W is None:
        return decided(None, 'no_gradient_yet')
    first = U_prev is None or S_prev is None
    r_next, seen['why'] = determine_next_r(S, None if first else S_prev, r_current)
    if first:
        return decided(None, 'initial_svd_computation', r_next)

    S = _wide('S', S)
    k = _principal_count(S, r_current)
    principal, minor = compute_gradient_alignment(grad_W, U, S, r_current)
    c, informative = chance(k, len(U)), principal + minor > 0
    angle = compute_subspace_angle(U_prev, U, k)
    error, safe = compute_reconstruction_error(W, U, S, V, r_current)
    ratio, rank = compute_singular_value_concentration(S)
    seen |= dict(principal_alignment=principal, minor_alignment=minor, chance=c,
                 lift=lift(principal, c) if informative else None, excess=excess(principal, c) if informative else None,
                 subspace_angle=angle, reconstruction_error=error, reconstruction_safe=safe,
                 dropped_error=math.sqrt(_energy_share(S[-FIRST_PRINCIPAL:], S)),
                 concentration=ratio, concentration_rank=rank)

    if principal > DANGER_ALIGNMENT and seen['excess'] > DANGER_EXCESS:
        return decided(True, 'gradient_clobbering_risk', r_next)
    if angle < CALM_ANGLE and minor > CALM_MINOR and safe:
        return decided(True, 'optimal_lowrank_conditions', r_next)
    if not safe and not in_lowrank_mode:
        return decided(False, 'reconstruction_unsafe', r_next)
    return decided(None, 'continue_current_mode', r_next)


def _wide(name, x):
    """x in float64 on the CPU. Raises ValueError for NaN and inf."""
    x = x.detach().cpu()
    if not is_finite(x):
        raise ValueError(f'{name} must be finite, got NaN or inf')
    return x.double()


def is_finite(x):
    """Whether all of x is; a third of the time of x.isfinite().all(), which makes a mask."""
    return x.numel() == 0 or all(math.isfinite(bound) for bound in x.detach().aminmax())


def _leading(name, basis, k):
    """Its k leading columns, in float64. Raises ValueError where it has fewer."""
    if not 0 <= k <= basis.size(1):
        raise ValueError(f'{name} has {basis.size(1)} columns, too few for k = {k}')
    return _wide(name, basis[:, :k])


def _principal_count(S, r):
    """k = g - r, 0 at least. A negative r asks for more columns than there are, which `_leading` refuses."""
    return max(len(S) - r, 0)


def _energy_share(part, whole):
    """|part|^2 / |whole|^2; where whole is zero 0 for nothing, else inf."""
    unit = max(abs(bound.item()) for bound in whole.aminmax()) if whole.numel() else 0.0
    if unit == 0:
        return math.inf if part.any() else 0.0
    if not 1e-100 < unit < 1e100:                                   # float64 may not hold squares of that
        part, whole = part / unit, whole / unit
    part, whole = part.flatten(), whole.flatten()
    return (part @ part / (whole @ whole)).item()

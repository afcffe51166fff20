"""When a weight should train through its minor components alone: six measurements and decisions,
without any state.

W (m, n) = U diag(S) V^T has g = min(m, n) singular triplets. Low-rank mode freezes the k = g - r
principal ones, which hold what has been learned, and trains the r minor ones (MiLoRA,
arXiv:2406.09044). Gradients have low rank, and their subspace turns slowly (GaLore,
arXiv:2403.03507). An analysis every few steps therefore asks whether the protected subspace has
come to rest, and whether the gradient points into it. The caller keeps the mode and counts
analyses.

Letters: m outputs, n inputs, r minor components, k = g - r principal ones; r above g counts as g.
U (m, g) and V (n, g), not V^T, have orthonormal columns in the order of S (g), descending; their k
leading columns are enough. Everything is computed in float64 on the CPU and returned as Python
numbers. NaN and inf in a weight or its SVD raise ValueError; a gradient with NaN or inf counts as
no information.
"""

import math

import torch

from lowrank.spectrum import rank_for_energy, to_float64

WARMUP_STEPS = 10           # before them W is mostly its initialization, with nothing to protect
FIRST_PRINCIPAL = 10    # k at first: little is protected until training has settled what to protect
LEAST_RANK = 8              # with a smaller r a layer could hardly learn any more
SHRINK = 0.8                # of r at a decrease: from 246 to 8 in 15 of them
STABLE_CHANGE = 0.1       # relative change of the smallest singular values up to which r may shrink
WATCHED_PART = 4         # these are at most g // 4: among more, the large ones would hide the small
ENERGY = 0.95               # of the sum of sigma^2, at which a spectrum's concentration is read
SAFE_ERROR = 0.01           # relative: the principal part has 99.99% of the energy of W
DANGER_ALIGNMENT = 0.4      # share of the gradient's energy in the protected space
DANGER_EXCESS = 0.25   # the same at k/m = 0.2; with more protected, 0.4 is near the random baseline
CALM_ANGLE = 0.1            # radians, 5.7 degrees: the protected space has come to rest
CALM_MINOR = 0.6            # 1 - DANGER_ALIGNMENT: never calm and in danger at once

DIAGNOSTICS = ('reason', 'why', 'principal_alignment', 'minor_alignment', 'chance', 'lift',
               'excess', 'subspace_angle', 'reconstruction_error', 'reconstruction_safe',
               'dropped_error', 'concentration', 'concentration_rank')


def compute_subspace_angle(U1, U2, k):
    """Largest principal angle between the spans of the k leading columns of U1 and U2 (m, >= k), in
    radians from 0 to pi/2; 0 for k = 0.

    By cosines above pi/4 (Bjoerck and Golub 1973), by sines below it (Knyazev and Argentati 2002),
    where the cosine is flat: acos in float32 finds 1e-3 between a space and itself.
    """
    first, second = to_float64(U1[:, :k], 'U1'), to_float64(U2[:, :k], 'U2')    # (m, k)
    if k == 0:
        return 0.0
    # float32 columns are orthonormal to 3e-6, which would count as an angle; Q has the same span
    first, second = torch.linalg.qr(first).Q, torch.linalg.qr(second).Q
    shared = first.mT @ second                                      # (k, k)
    sine = torch.linalg.matrix_norm(second - first @ shared, 2).item()
    if sine < math.sqrt(0.5):
        return math.asin(sine)
    return math.acos(torch.linalg.svdvals(shared)[-1].item())


def compute_singular_value_concentration(S, percentile=ENERGY):
    """How few of the singular values S (g) have `percentile` of the sum of their squares:
    (rank / g, rank); (0.0, 0) where all are zero. Raises ValueError unless 0 < percentile <= 1."""
    S = to_float64(S, 'S')
    rank = rank_for_energy(S, percentile).item() if S.any() else 0
    return rank / max(len(S), 1), rank


def compute_reconstruction_error(W, U, S, V, r):
    """Relative Frobenius error of the principal components alone, |W - U_k S_k V_k^T| / |W|, and
    whether it is below SAFE_ERROR.

    W (m, n), U (m, >= k), S (g), V (n, >= k) -> (float, bool); 0 for W = 0. Low-rank mode drops
    nothing, so this is no damage: it says how much of W is protected.
    """
    W, S = to_float64(W, 'W'), to_float64(S, 'S')
    k = max(len(S) - r, 0)
    U, V = to_float64(U[:, :k], 'U'), to_float64(V[:, :k], 'V')
    principal = U * S[:k] @ V.mT                                    # (m, k) x (k, n)
    error = math.sqrt(_energy_share(W - principal, W))
    return error, error < SAFE_ERROR


def compute_gradient_alignment(grad_W: torch.Tensor | None, U, S, r) -> tuple[float, float]:
    """Shares of a gradient's energy inside the protected space, |U_k^T G|^2 / |G|^2, and outside
    it.

    grad_W (m, n), U (m, >= k), S (g), which counts the components -> (principal, minor), of sum 1;
    (0.0, 0.0) for a gradient that is None, zero or not finite. Compare with `random_baseline`. An
    optimizer's step has another alignment than its gradient and may be passed instead.
    """
    principal_space = to_float64(U[:, :max(len(S) - r, 0)], 'U')    # (m, k)
    if grad_W is None or not grad_W.isfinite().all() or not grad_W.any():
        return 0.0, 0.0
    gradient = to_float64(grad_W)                                   # (m, n)
    # 1 at most: float32 columns may be too long
    principal = min(_energy_share(principal_space.mT @ gradient, gradient), 1.0)
    return principal, 1 - principal


def random_baseline(k, m):
    """Mean principal alignment of random gradients (m, n), k/m. With independent Gaussian entries
    it is distributed as Beta(k n / 2, (m - k) n / 2), of variance 2 c (1 - c) / (m n + 2), c =
    k/m."""
    return k / m


def lift(principal, baseline):
    """Principal alignment as a multiple of its random baseline; 1 where nothing is protected."""
    return principal / baseline if baseline > 0 else 1.0


def normalized_alignment(principal, baseline):
    """Principal alignment on a scale where the random baseline is 0 and a gradient wholly inside
    the protected space 1; 0 where everything is protected."""
    return (principal - baseline) / (1 - baseline) if baseline < 1 else 0.0


def determine_next_r(S, S_prev: torch.Tensor | None, r_current, r_min=LEAST_RANK):
    """The next r, and why as text.

    S, S_prev (g): the singular values now and at the last analysis (None: the first) -> (r, why)
    with min(r_min, g - 1) <= r <= g - 1. The first r is g - FIRST_PRINCIPAL. Later r stays while
    the smallest min(r, g // 4) singular values, at least one, change by more than STABLE_CHANGE, as
    a vector relative to what it was; otherwise it shrinks, in each call: patience is the caller's.
    """
    S, g = to_float64(S, 'S'), len(S)
    if S_prev is None:
        r, why = g - FIRST_PRINCIPAL, f'Initial r: protects {FIRST_PRINCIPAL} components'
    else:
        watched = max(min(r_current, g // WATCHED_PART), 1)
        before = to_float64(S_prev, 'S_prev')[-watched:]
        change = math.sqrt(_energy_share(S[-watched:] - before, before))
        if change > STABLE_CHANGE:
            r, why = r_current, f'minor singular values changing by {change:.1%}'
        else:
            r = int(SHRINK * r_current)
            why = f'minor singular values stable, decrease r: changed by {change:.1%}'
    return max(min(r, g - 1), min(r_min, g - 1)), why


def should_use_lowrank_training(
        W, U, S, V, W_prev, U_prev: torch.Tensor | None, S_prev: torch.Tensor | None, V_prev,
        grad_W: torch.Tensor | None, r_current: int, step: int, *, in_lowrank_mode=False):
    """Whether W should train in low-rank mode: (True, False or None for no change; r_next;
    diagnostics). The first row that applies decides:

        step < WARMUP_STEPS                                         False  warmup_period
        grad_W is None                                              None   no_gradient_yet
        U_prev or S_prev is None                                    None   initial_svd_computation
        principal > DANGER_ALIGNMENT and excess > DANGER_EXCESS     True   gradient_clobbering_risk
        angle < CALM_ANGLE, minor > CALM_MINOR, error < SAFE_ERROR  True  optimal_lowrank_conditions
        error >= SAFE_ERROR, unless in low-rank mode                False  reconstruction_unsafe
        otherwise                                                   None   continue_current_mode

    W (m, n), its SVD U (m, >= k), S (g), V (n, >= k) for k = g - r_current, and those of the last
    analysis, of which W_prev and V_prev are not used. grad_W (m, n); zero or non-finite is neither
    danger nor calm. in_lowrank_mode: how W trains now; a large error is no reason to leave that
    mode. r_next is r_current in the first two rows, otherwise what `determine_next_r` proposes.

    diagnostics has the keys DIAGNOSTICS: the reason, `why` r_next, and the measurements, None where
    they were not due or (lift and excess) mean nothing. chance is `random_baseline`, excess
    `normalized_alignment`. dropped_error is the relative error of W without its FIRST_PRINCIPAL
    smallest components, 0.007 even for a Gaussian 256 x 256: not to be confused with
    reconstruction_error.
    """
    found = dict.fromkeys(DIAGNOSTICS)

    def decided(decision, reason, r_next=r_current):
        return decision, r_next, found | {'reason': reason}

    if step < WARMUP_STEPS:
        return decided(False, 'warmup_period')
    if grad_W is None:
        return decided(None, 'no_gradient_yet')
    first = U_prev is None or S_prev is None
    r_next, found['why'] = determine_next_r(S, None if first else S_prev, r_current)
    if first:
        return decided(None, 'initial_svd_computation', r_next)

    S = to_float64(S, 'S')
    k = max(len(S) - r_current, 0)
    principal, minor = compute_gradient_alignment(grad_W, U, S, r_current)
    c, informative = random_baseline(k, len(U)), principal + minor > 0
    angle = compute_subspace_angle(U_prev, U, k)
    error, safe = compute_reconstruction_error(W, U, S, V, r_current)
    ratio, rank = compute_singular_value_concentration(S)
    found |= dict(principal_alignment=principal, minor_alignment=minor, chance=c,
                  lift=lift(principal, c) if informative else None,
                  excess=normalized_alignment(principal, c) if informative else None,
                  subspace_angle=angle, reconstruction_error=error, reconstruction_safe=safe,
                  dropped_error=math.sqrt(_energy_share(S[-FIRST_PRINCIPAL:], S)),
                  concentration=ratio, concentration_rank=rank)

    if principal > DANGER_ALIGNMENT and found['excess'] > DANGER_EXCESS:
        return decided(True, 'gradient_clobbering_risk', r_next)
    if angle < CALM_ANGLE and minor > CALM_MINOR and safe:
        return decided(True, 'optimal_lowrank_conditions', r_next)
    if not safe and not in_lowrank_mode:
        return decided(False, 'reconstruction_unsafe', r_next)
    return decided(None, 'continue_current_mode', r_next)


def _energy_share(part, whole):
    """|part|^2 / |whole|^2; where whole is zero, 0 for a zero part and inf otherwise."""
    part, whole = part.flatten(), whole.flatten()
    total = (whole @ whole).item()
    if total == 0:
        return math.inf if part.any() else 0.0
    return (part @ part).item() / total

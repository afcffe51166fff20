"""Decide whether a weight should train in low-rank mode. The functions here measure and decide.
They keep no state.

W (m, n) = U diag(S) V^T has g = min(m, n) singular triplets. Low-rank mode freezes the k = g - r
principal triplets, because they hold what has been learned. It trains the r minor triplets (MiLoRA,
arXiv:2406.09044). The protected subspace is the span of the k principal left singular vectors.
Gradients have low rank, and their subspace turns slowly (GaLore, arXiv:2403.03507). An analysis
every few steps therefore asks whether the protected subspace has stopped turning and whether the
gradient points into it. The caller, `adaptive_layer.AdaptiveSVD`, stores the mode.

Letters: m outputs, n inputs, r minor components, k = g - r principal components. An r above g
counts as g. S (g) is descending. U (m, g) and V (n, g) have orthonormal columns in the same order.
V is not transposed. The k leading columns of U and V are enough. Results are computed in float64 on
the CPU and returned as Python numbers. A weight or an SVD that is not finite raises ValueError. A
gradient that is not finite counts as no information.
"""

import math

import torch

from lowrank.spectrum import rank_for_energy, to_float64

WARMUP_STEPS = 10           # before that, W is mostly its initialization
FIRST_PRINCIPAL = 10        # k at first; little is protected until training has settled
LEAST_RANK = 8              # a layer with a smaller r learns too little
SHRINK = 0.8                # factor of a decrease of r; 15 decreases lead from 246 to 8
STABLE_CHANGE = 0.1         # r may shrink if the smallest singular values change by at most this
WATCHED_PART = 4            # only g // 4 values are compared, because large ones hide small ones
ENERGY = 0.95               # fraction of the sum of sigma^2 for the concentration of a spectrum
SAFE_ERROR = 0.01           # relative error; the principal part then has 99.99% of the energy
DANGER_ALIGNMENT = 0.4      # fraction of the gradient's energy in the protected subspace
DANGER_EXCESS = 0.25        # equals alignment 0.4 at k/m = 0.2; for larger k/m 0.4 is near chance
CALM_ANGLE = 0.1            # radians (5.7 degrees); below it the protected subspace is stable
CALM_MINOR = 0.6            # 1 - DANGER_ALIGNMENT, so that calm and danger exclude each other

DIAGNOSTICS = ('reason', 'why', 'principal_alignment', 'minor_alignment', 'chance', 'lift',
               'excess', 'subspace_angle', 'reconstruction_error', 'reconstruction_safe',
               'dropped_error', 'concentration', 'concentration_rank')


def compute_subspace_angle(U1, U2, k):
    """Return the largest principal angle between the spans of the k leading columns of U1 and U2
    (m, >= k). The angle is in radians from 0 to pi/2, and 0 for k = 0. Angles above pi/4 are
    computed from cosines (Bjoerck and Golub 1973), smaller angles from sines (Knyazev and Argentati
    2002), because acos is inaccurate near 1. In float32, acos gives an angle of 1e-3 between a
    subspace and itself."""
    first, second = to_float64(U1[:, :k], 'U1'), to_float64(U2[:, :k], 'U2')    # (m, k)
    if k == 0:
        return 0.0
    # float32 columns are orthonormal only to 3e-6, which would count as an angle; QR keeps the span
    first, second = torch.linalg.qr(first).Q, torch.linalg.qr(second).Q
    shared = first.mT @ second                                      # (k, k)
    sine = torch.linalg.matrix_norm(second - first @ shared, 2).item()
    if sine < math.sqrt(0.5):
        return math.asin(sine)
    return math.acos(torch.linalg.svdvals(shared)[-1].item())


def compute_singular_value_concentration(S, percentile=ENERGY):
    """Return (rank / g, rank), where rank is the smallest number of leading singular values that
    hold the fraction `percentile` of the energy of S (g). The energy is the sum of squares. Returns
    (0.0, 0) if S is zero. Raises ValueError unless 0 < percentile <= 1."""
    S = to_float64(S, 'S')
    rank = rank_for_energy(S, percentile).item() if S.any() else 0
    return rank / max(len(S), 1), rank


def compute_reconstruction_error(W, U, S, V, r):
    """Return the relative error of the k principal components, |W - U_k S_k V_k^T| / |W|
    (Frobenius), and whether this error is below SAFE_ERROR. W (m, n), U (m, >= k), S (g),
    V (n, >= k) -> (float, bool). The error is 0 for W = 0. A small error means that nearly all of W
    is protected. Low-rank mode does not cause this error, because it keeps the minor components."""
    W, S = to_float64(W, 'W'), to_float64(S, 'S')
    k = max(len(S) - r, 0)
    U, V = to_float64(U[:, :k], 'U'), to_float64(V[:, :k], 'V')
    principal = U * S[:k] @ V.mT                                    # (m, k) x (k, n)
    error = math.sqrt(_energy_share(W - principal, W))
    return error, error < SAFE_ERROR


def compute_gradient_alignment(grad_W: torch.Tensor | None, U, S, r) -> tuple[float, float]:
    """Return two fractions of the energy of a gradient G: the fraction inside the protected
    subspace, |U_k^T G|^2 / |G|^2, and the fraction outside.

    grad_W: G (m, n). U: (m, >= k). S: (g), only its length is used. Energy is the squared Frobenius
    norm. The fractions add up to 1. They are (0.0, 0.0) if the gradient is None, zero or not
    finite. Compare the first fraction with `random_baseline`. grad_W may also be an optimizer's
    step, but the alignment of a step differs from that of the gradient.
    """
    principal_space = to_float64(U[:, :max(len(S) - r, 0)], 'U')    # (m, k)
    if grad_W is None or not grad_W.isfinite().all() or not grad_W.any():
        return 0.0, 0.0
    gradient = to_float64(grad_W)                                   # (m, n)
    # float32 columns may be slightly longer than 1
    principal = min(_energy_share(principal_space.mT @ gradient, gradient), 1.0)
    return principal, 1 - principal


def random_baseline(k, m):
    """Return c = k/m, the mean principal alignment of random gradients (m, n): the mean fraction of
    their energy in the protected subspace. For independent Gaussian entries the alignment is
    distributed as Beta(k n / 2, (m - k) n / 2), whose variance is 2 c (1 - c) / (m n + 2)."""
    return k / m


def lift(principal, baseline):
    """Return principal / baseline: how many times more of a gradient lies in the protected subspace
    than of a random gradient. The result is 1 if baseline is 0."""
    return principal / baseline if baseline > 0 else 1.0


def normalized_alignment(principal, baseline):
    """Rescale the principal alignment so that the random baseline becomes 0 and a gradient inside
    the protected subspace becomes 1. The result is 0 if everything is protected."""
    return (principal - baseline) / (1 - baseline) if baseline < 1 else 0.0


def determine_next_r(S, S_prev: torch.Tensor | None, r_current, r_min=LEAST_RANK):
    """Propose the next r. Returns (r, why), where why is a text.

    S (g): the singular values now; S_prev: those of the last analysis, or None at the first
    analysis. The first r is g - FIRST_PRINCIPAL. Later the vector of the smallest min(r, g // 4)
    singular values, at least one, is watched. If its relative change is at most STABLE_CHANGE, r is
    multiplied by SHRINK. Otherwise r stays. The proposed r is from min(r_min, g - 1) to g - 1. The
    caller decides when a proposal takes effect.
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
    """Decide whether W should train in low-rank mode. Returns (decision, r_next, diagnostics).

    The decision is True, False, or None for no change. It comes from the first row that applies:

        step < WARMUP_STEPS                                        False  warmup_period
        grad_W is None                                             None   no_gradient_yet
        U_prev or S_prev is None                                   None   initial_svd_computation
        principal > DANGER_ALIGNMENT and excess > DANGER_EXCESS    True   gradient_clobbering_risk
        angle < CALM_ANGLE, minor > CALM_MINOR, error < SAFE_ERROR True   optimal_lowrank_conditions
        error >= SAFE_ERROR, unless in low-rank mode               False  reconstruction_unsafe
        otherwise                                                  None   continue_current_mode

    W (m, n) has the SVD U (m, >= k), S (g), V (n, >= k) with k = g - r_current. principal and minor
    are the fractions from `compute_gradient_alignment`, excess is from `normalized_alignment`,
    error from `compute_reconstruction_error`, and angle from `compute_subspace_angle`. U_prev and
    S_prev are U and S of the last analysis. W_prev and V_prev are not used. If grad_W (m, n) is
    zero or not finite, neither row with True applies. in_lowrank_mode: whether W trains in low-rank
    mode now. r_next is r_current in the first two rows and the proposal of `determine_next_r` in
    the others.

    diagnostics has the keys DIAGNOSTICS: the reason, `why` for r_next, and the measurements. A
    measurement is None if it was not made. lift and excess are also None if the gradient is zero or
    not finite. chance is from `random_baseline`. dropped_error is the relative error of W without
    its FIRST_PRINCIPAL smallest components, 0.007 even for a Gaussian 256 x 256 matrix.
    reconstruction_error is the relative error of W without all r minor components.
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
    """Return |part|^2 / |whole|^2. If whole is zero: 0 for a zero part, otherwise inf."""
    part, whole = part.flatten(), whole.flatten()
    total = (whole @ whole).item()
    if total == 0:
        return math.inf if part.any() else 0.0
    return (part @ part).item() / total

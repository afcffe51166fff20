"""When a weight should train through its minor components alone: six measurements and a decision, all without state.

A weight W (m, n) = U diag(S) V^T has g = min(m, n) singular triplets. Low-rank training freezes the k = g - r leading,
principal ones, which hold what has been learned, and trains the r minor ones (MiLoRA, arXiv:2406.09044). GaLore
(arXiv:2403.03507) has the observation behind it: gradients have low rank, and their subspace turns slowly. What is
asked here is whether the protected subspace has come to rest, and whether the gradient runs into it. Mode, patience
and counters are the caller's.

Letters: m outputs, n inputs, g = min(m, n), r trainable minor components, k = g - r protected ones. U (m, g) and
V (n, g) have orthonormal columns in the order of S (g), descending; the leading k columns are enough. V is V, not V^T.
r above g counts as g: nothing is protected. Tensors may be of any floating type, on any device; all is computed in
float64 on the CPU, as MPS has none, and comes back as Python numbers.
"""

import math

import torch

from lowrank.svd import rank_for_energy

WARMUP_STEPS = 10                   # before that a random matrix turns into another: its SVD says nothing
FIRST_PRINCIPAL = 10                # k at the start: few directions, but those of the largest singular values
LEAST_RANK = 8                      # r below that leaves a layer hardly anything to learn with
SHRINK = 0.8                        # of r at a decrease: 246 to 8 in 15 of them
STABLE_CHANGE = 0.1                 # relative change of the smallest singular values up to which r may shrink
WATCHED_SHARE = 4                   # those are at most g // 4: of more, the large ones would drown the rest
ENERGY = 0.95                       # of sigma^2, by which a spectrum's concentration is told
SAFE_ERROR = 0.01                   # relative: the principal part is then 99.99% of the energy of W
DANGER_ALIGNMENT = 0.4              # share of the gradient's energy in the protected space ...
DANGER_EXCESS = 0.25                # ... which above k/m = 0.2 is not far from chance, and must exceed it by that, too
CALM_ANGLE = 0.1                    # radians, 5.7 degrees: the protected space has come to rest
CALM_MINOR = 0.6                    # 1 - DANGER_ALIGNMENT

DIAGNOSTICS = ('reason', 'principal_alignment', 'minor_alignment', 'chance', 'lift', 'excess', 'subspace_angle',
               'reconstruction_error', 'reconstruction_safe', 'dropped_error', 'concentration', 'concentration_rank',
               'why')


# ----------------------------------------------------------------------------------------------------------------------
# what is measured

def compute_subspace_angle(U1, U2, k):
    """Largest principal angle, in radians from 0 to pi/2, between the spans of the k leading columns of U1 (m, >= k)
    and U2 (m, >= k); 0 for k = 0.

    By cosines (Bjoerck and Golub 1973) above pi/4 and by sines (Knyazev and Argentati 2002) below, where the cosine is
    flat: acos in float32 takes a space for 1e-3 from itself. Raises ValueError for fewer than k columns, for a negative
    k and for NaN and inf.
    """
    first, second = _leading('U1', U1, k), _leading('U2', U2, k)
    if k == 0:
        return 0.0
    # float32 columns are orthonormal to 3e-6 only, which would count as an angle; those of Q are, in the same span
    first, second = torch.linalg.qr(first).Q, torch.linalg.qr(second).Q                         # (m, k)
    shared = first.mT @ second                                      # (k, k)
    sine = torch.linalg.matrix_norm(second - first @ shared, 2).item()
    if sine < math.sqrt(0.5):
        return math.asin(sine)
    return math.acos(min(torch.linalg.svdvals(shared)[-1].item(), 1.0))


def compute_singular_value_concentration(S, percentile=ENERGY):
    """How few of the singular values S (g) hold `percentile` (0 < percentile <= 1) of their energy, the sum of sigma^2
    -> (rank / g, rank), (0.0, 0) where all are zero. Raises ValueError for another percentile, NaN and inf."""
    S = _wide('S', S)
    rank = rank_for_energy(S, percentile).item() if S.any() else 0
    return rank / max(len(S), 1), rank


def compute_reconstruction_error(W, U, S, V, r):
    """Relative Frobenius error of the k = g - r principal components alone, |W - U_k S_k V_k^T| / |W|, and whether it
    is below SAFE_ERROR: W (m, n), U (m, >= k), S (g), V (n, >= k) -> (float, bool); 0 for W = 0.

    Low-rank mode drops nothing, so this is no damage done; it says how much of W the protected part is. Raises
    ValueError for fewer than k columns and for NaN and inf.
    """
    W, S = _wide('W', W), _wide('S', S)
    k = _protected(S, r)
    principal = _leading('U', U, k) * S[:k] @ _leading('V', V, k).mT    # (m, k) x (k, n)
    error = math.sqrt(_energy_share(W - principal, W))
    return error, error < SAFE_ERROR


def compute_gradient_alignment(grad_W, U, S, r):
    """Shares of the gradient's energy inside the protected space, |U_k^T G|^2 / |G|^2, and outside of it: grad_W (m, n),
    U (m, >= k), S (g) -> (principal, minor), of sum 1; (0.0, 0.0) for a gradient that is None, zero or not finite.

    Only g is taken from S. Instead of the gradient it may be the optimizer's step, whose alignment is another. Of a
    gradient without any preference `principal` is `chance(k, m)`: to be read beside `lift` and `excess`. Raises
    ValueError for fewer than k columns, and NaN and inf in U or S.
    """
    k = _protected(_wide('S', S), r)
    principal_space = _leading('U', U, k)                           # (m, k)
    if grad_W is None:
        return 0.0, 0.0
    gradient = grad_W.detach().cpu().double()                       # (m, n)
    if not gradient.isfinite().all() or not gradient.any():
        return 0.0, 0.0
    principal = min(_energy_share(principal_space.mT @ gradient, gradient), 1.0)    # float32 columns may be too long
    return principal, 1 - principal


def chance(k, m):
    """Expected principal alignment of a random gradient with m rows, k/m. For independent Gaussian entries in n columns
    it is Beta(k n / 2, (m - k) n / 2), whose variance is 2 c (1 - c) / (m n + 2), c = k/m."""
    return k / m


def lift(principal, c):
    """Principal alignment in multiples of its chance level c; 1 for c = 0, where nothing is protected."""
    return principal / c if c > 0 else 1.0


def excess(principal, c):
    """Principal alignment on a scale on which chance is 0 and a gradient all inside the protected space 1; negative
    below chance, and 0 for c = 1, where every gradient is inside."""
    return (principal - c) / (1 - c) if c < 1 else 0.0


# ----------------------------------------------------------------------------------------------------------------------
# what follows from it

def determine_next_r(S, S_prev, r_current, r_min=LEAST_RANK):
    """The next r, and in words why: S (g) and S_prev (g), the singular values now and at the last analysis (None: there
    was none) -> (r, why), min(r_min, g - 1) <= r <= g - 1, which is 0 for g = 1.

    At first g - FIRST_PRINCIPAL. Then r stays while the smallest min(r, g // 4) values, one at least, change by more
    than STABLE_CHANGE, as a vector and relative to what it was, and else shrinks. It does so on every call: patience is
    the caller's. Raises ValueError for no singular values, for two numbers of them, NaN and inf.
    """
    S = _wide('S', S)
    g = len(S)
    if g == 0:
        raise ValueError('S: no singular values; valid: at least 1')
    if S_prev is None:
        r, why = g - FIRST_PRINCIPAL, f'Initial r: all but {FIRST_PRINCIPAL} components'
    else:
        S_prev = _wide('S_prev', S_prev)
        if len(S_prev) != g:
            raise ValueError(f'S_prev: {len(S_prev)} singular values; valid: {g}, as in S')
        watched = max(min(r_current, g // WATCHED_SHARE), 1)
        before, now = S_prev[-watched:], S[-watched:]
        change = math.sqrt(_energy_share(now - before, before))
        if change > STABLE_CHANGE:
            r, why = r_current, f'minor singular values changing: {change:.1%}'
        else:
            r, why = int(SHRINK * r_current), f'minor singular values stable, decrease r: {change:.1%}'
    return max(min(r, g - 1), min(r_min, g - 1)), why


def should_use_lowrank_training(W, U, S, V, W_prev, U_prev, S_prev, V_prev, grad_W, r_current, step, *,
                                in_lowrank_mode=False):
    """Whether W (m, n) should train in low-rank mode -> (decision, r_next, diagnostics), True: yes, False: no, None:
    go on as before.

    U (m, >= k), S (g), V (n, >= k): the SVD of W, with k = g - r_current; U_prev, S_prev: that of the last analysis,
    None where there was none (W_prev and V_prev belong to it and are not looked at: they need not be kept); grad_W
    (m, n) or None; step counts from 0; in_lowrank_mode: how W trains now, as a bad reconstruction only keeps a layer
    out of that mode. The first that holds decides:

        step < WARMUP_STEPS                         False   warmup_period
        no gradient                                 None    no_gradient_yet
        no previous SVD                             None    initial_svd_computation
        principal > DANGER_ALIGNMENT
            and excess > DANGER_EXCESS              True    gradient_clobbering_risk
        angle < CALM_ANGLE, minor > CALM_MINOR
            and error < SAFE_ERROR                  True    optimal_lowrank_conditions
        error not, and not in low-rank mode         False   reconstruction_unsafe
        otherwise                                   None    continue_current_mode

    A gradient that is zero or not finite counts as one without alignment, which is neither a danger nor a calm one.
    r_next is r_current up to 'no_gradient_yet' and then that of `determine_next_r`, for the caller to take or leave.
    diagnostics has the keys DIAGNOSTICS: reason, the metrics, and the why of r_next; None where it was decided before
    they were due, and for a lift and excess that there is no gradient for. dropped_error is |W - W'| / |W| for a W'
    without its FIRST_PRINCIPAL smallest components: what logs with errors of 0.003 have as their reconstruction error.
    Raises ValueError as the functions above; in the warm-up nothing is looked at.
    """
    seen = dict.fromkeys(DIAGNOSTICS)

    def decide(decision, reason, r_next=r_current):
        return decision, r_next, seen | {'reason': reason}

    if step < WARMUP_STEPS:
        return decide(False, 'warmup_period')
    if grad_W is None:
        return decide(None, 'no_gradient_yet')
    if U_prev is None or S_prev is None:
        r_next, seen['why'] = determine_next_r(S, None, r_current)
        return decide(None, 'initial_svd_computation', r_next)

    r_next, seen['why'] = determine_next_r(S, S_prev, r_current)
    k = _protected(S, r_current)
    principal, minor = compute_gradient_alignment(grad_W, U, S, r_current)
    angle = compute_subspace_angle(U_prev, U, k)
    error, safe = compute_reconstruction_error(W, U, S, V, r_current)
    c = chance(k, U.size(0))
    beyond = excess(principal, c)
    ratio, rank = compute_singular_value_concentration(S)
    sigma = _wide('S', S)
    seen |= {'principal_alignment': principal, 'minor_alignment': minor, 'chance': c, 'subspace_angle': angle,
             'reconstruction_error': error, 'reconstruction_safe': safe,
             'dropped_error': math.sqrt(_energy_share(sigma[-FIRST_PRINCIPAL:], sigma)),
             'concentration': ratio, 'concentration_rank': rank}
    if principal + minor > 0:
        seen |= {'lift': lift(principal, c), 'excess': beyond}

    if principal > DANGER_ALIGNMENT and beyond > DANGER_EXCESS:
        return decide(True, 'gradient_clobbering_risk', r_next)
    if angle < CALM_ANGLE and minor > CALM_MINOR and safe:
        return decide(True, 'optimal_lowrank_conditions', r_next)
    if not safe and not in_lowrank_mode:
        return decide(False, 'reconstruction_unsafe', r_next)
    return decide(None, 'continue_current_mode', r_next)


# ----------------------------------------------------------------------------------------------------------------------
# the pieces

def _wide(name, x):
    """x in float64 on the CPU. Raises ValueError for NaN and inf."""
    x = x.detach().cpu().double()
    if not x.isfinite().all():
        raise ValueError(f'{name} must be finite, got NaN or inf')
    return x


def _leading(name, basis, k):
    """The k leading columns, (m, k) in float64. Raises ValueError where there are fewer."""
    if not 0 <= k <= basis.size(1):
        raise ValueError(f'{name} has {basis.size(1)} columns, k = {k} are asked for; valid: 0 to {basis.size(1)}')
    return _wide(name, basis[:, :k])


def _protected(S, r):
    """k = g - r, within 0 and g."""
    return min(max(len(S) - r, 0), len(S))


def _energy_share(part, whole):
    """|part|^2 / |whole|^2; of zero, 0 for nothing and inf for anything. In a unit in which squares neither over- nor
    underflow."""
    unit = whole.abs().max()
    if unit == 0:
        return math.inf if part.any() else 0.0
    return ((part / unit).square().sum() / (whole / unit).square().sum()).item()

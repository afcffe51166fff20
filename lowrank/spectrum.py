"""Measures of singular values: energy, rank for a fraction of the energy, and effective rank."""

import torch


def to_float64(x, name: str | None = None):
    """Return x detached and in float64 on the CPU, because MPS has no float64. The result may share
    memory with x. If a name is given, raises ValueError if x is not finite."""
    if name and not x.isfinite().all():
        raise ValueError(f'{name} must be finite, got NaN or inf')
    return x.detach().cpu().double()


def energy(s):
    """Return the fraction of the squared Frobenius norm that the k leading singular values hold,
    for each k.

    s (..., n): singular values, descending -> float64 (..., n) on the CPU, rising to 1. If all s
    are zero, the result is 1, because no rank loses anything. Raises ValueError if s is not finite.
    """
    s = to_float64(s, 'singular values')
    cumulative, tiny = s.square().cumsum(-1), torch.finfo(s.dtype).tiny
    total = cumulative[..., -1:]
    return torch.where(total > 0, cumulative / total.clamp_min(tiny), 1.0)


def rank_for_energy(s, fraction):
    """Smallest rank whose cumulative energy reaches `fraction`.

    s (..., n): singular values, descending -> int64 (...). Raises ValueError unless
    0 < fraction <= 1, and if s is not finite.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f'energy fraction must be above 0 and at most 1, got {fraction}')
    # values that are below the fraction only by rounding count; otherwise fraction=1 could give
    # rank n + 1
    reached = energy(s) >= fraction - s.shape[-1] * torch.finfo(torch.float64).eps
    return s.shape[-1] - reached.sum(-1) + 1


def energy_kept(x, y):
    """Return the fraction of x's squared Frobenius norm that an approximation y keeps, 1 - |x -
    y|^2 / |x|^2.

    x, y (..., m, n) -> float64 (...) on the CPU. The fraction is 1 if x is zero.
    """
    x, y = to_float64(x), to_float64(y)
    total = x.square().sum((-2, -1))
    return 1 - (x - y).square().sum((-2, -1)) / total.clamp_min(torch.finfo(x.dtype).tiny)


def effective_rank(x):
    """Return the effective rank, exp of the entropy of sigma / sum(sigma), where sigma are the
    singular values of x (Roy and Vetterli 2007).

    x (..., m, n) -> float64 (...) on the CPU. The effective rank is 1 for a matrix of rank one or
    zero, and min(m, n) if all singular values are equal. Raises torch.linalg.LinAlgError if x is
    not finite.
    """
    x = to_float64(x)
    squares = torch.linalg.eigvalsh(x.mT @ x if x.shape[-2] > x.shape[-1] else x @ x.mT)
    s = squares.clamp_min(0).sqrt()                                 # (..., min(m, n))
    shares = s / s.sum(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    return torch.special.entr(shares).sum(-1).exp()

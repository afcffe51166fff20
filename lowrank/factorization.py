"""Low-rank factors of trained weights, given statistics of inputs and outputs, and rank allocation.

A layer y = W x, W (m, n), becomes y = U A x, U (m, r), A (r, n). With C = E[x x^T] of its inputs
and G = E[g g^T] of the loss's gradients g = dL/dy at its outputs, the error that counts is

    E ~ tr(G (W - U A) C (W - U A)^T),

the second-order change of the loss where x and g are independent (Kronecker-factored Fisher:
Martens and Grosse, arXiv:1503.05671). With square roots R^T R = G and L L^T = C it is the squared
norm of R W L - R U A L, so Eckart and Young's theorem gives the optimum: with E_r the first r left
singular vectors of R W L,

    U = R^-1 E_r,   A = E_r^T R W,

and the loss is the sum of the other squared singular values, for all r at once. G = I is SVD-LLM's
criterion (arXiv:2403.07378), the output error; C = G = I is the plain SVD.

Statistics are singular where tokens are few or an input is constant, hence a ridge on both: in
directions that the calibration text has not shown it decides as the plain SVD would. Full rank is W
itself, whatever the statistics.
"""

import torch

from lowrank.spectrum import to_float64

RIDGE = 1e-6                # of the mean of a diagonal; 1e-2 gives the same losses to 1e-4 nats


class Factorization:
    """All best approximations of a weight (m, n), in float64 on the CPU, from one
    eigendecomposition of size s = min(m, n): the singular vectors of R W L on the smaller side.

                near    far
    m >= n      C       W^T G W
    m <  n      G       W C W^T

    near: the statistic of the smaller side; far: what W makes of the other side's, both (s, s);
    None: that of an identity. ridge: a share of each one's mean. `energies` (s), descending, are
    the squared singular values of R W L. Raises ValueError for non-finite values.
    """

    def __init__(self, weight, near: torch.Tensor | None = None, far: torch.Tensor | None = None,
                 ridge=RIDGE):
        self.weight = to_float64(weight, 'weight')
        near, far = (None if t is None else to_float64(t, 'inputs or gradients')
                     for t in (near, far))
        self.tall, self.size = weight.size(0) >= weight.size(1), min(weight.shape)
        self.root, self.inverse, near_level = psd_sqrt(near, self.size, ridge)
        gram = self.weight.mT @ self.weight if self.tall else self.weight @ self.weight.mT  # (s, s)
        level = gram.trace()
        far_level = 1.0 if far is None else float(far.trace() / level) if level > 0 else 0.0
        far = gram if far is None or not far_level > 0 else far / far_level + ridge * gram
        energies, vectors = torch.linalg.eigh(self.root @ far @ self.root)      # ascending
        self.vectors = vectors.flip(1)                                          # (s, s)
        self.energies = energies.flip(0).clamp_min(0) * near_level * far_level  # (s)

    def factors(self, rank) -> tuple[torch.Tensor, torch.Tensor]:
        """U (m, r) and A (r, n) with U^T U = A A^T, for a rank r of at most s."""
        if rank >= self.size:                                       # W itself, whatever was seen
            return balance(self.weight, torch.eye(self.weight.size(1), dtype=torch.float64), rank)
        leading = self.vectors[:, :rank]                            # (s, r)
        down, up = leading.mT @ self.inverse, self.root @ leading   # (r, s), (s, r)
        if self.tall:
            return balance(self.weight @ up, down, rank)            # (m, r), (r, n)
        return balance(down.mT, up.mT @ self.weight, rank)


def psd_sqrt(statistic, size, ridge):
    """The symmetric root (size, size) of a positive semidefinite statistic in units of its mean
    diagonal, with a ridge; the inverse of the root; that mean. None: identities and 1. All zeros,
    which say as little: identities and 0."""
    level = 1.0 if statistic is None else statistic.diagonal().mean().item()
    if statistic is None or not level > 0:
        identity = torch.eye(size, dtype=torch.float64)
        return identity, identity, max(level, 0.0)
    values, vectors = torch.linalg.eigh(statistic / level)
    roots = (values.clamp_min(0) + ridge).sqrt()                    # (size)
    inverses = torch.where(roots > 0, 1 / roots, 0)              # ridge=0: unseen directions vanish
    return vectors * roots @ vectors.mT, vectors * inverses @ vectors.mT, level


def balance(up, down, rank):
    """The best factors of up (m, k) @ down (k, n), U (m, r) and A (r, n), that have U^T U = A A^T,
    so that neither loses more to float32 than the other."""
    (q_up, r_up), (q_down, r_down) = torch.linalg.qr(up), torch.linalg.qr(down.mT)
    u, s, vh = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)          # of size k at most
    root = s[:rank].sqrt()
    return q_up @ u[:, :rank] * root, root[:, None] * (vh[:rank] @ q_down.mT)


def ridge_refit(before, inputs, cross, ridge=RIDGE):
    """The M (k, n) for which M x^ is closest to u = P x, after x has become x^.

    Least squares with a ridge that holds M at P = before (k, n) in directions without data. inputs:
    E[x^ x^^T] (n, n); cross: E[u x^^T] (k, n); float64. Raises ValueError for non-finite values.
    """
    inputs, cross = to_float64(inputs, 'inputs'), to_float64(cross, 'inputs')
    _, inverse, level = psd_sqrt(inputs, len(inputs), ridge)
    if not level > 0:
        return before
    return before + (cross - before @ inputs) / level @ inverse @ inverse


# --------------------------------------------------------------------------------------------------
# rank allocation

def factored_size(shape, rank: int | None) -> int:
    """Numbers in a layer (m, n) as a product of that rank; rank None: as it is."""
    m, n = shape
    return m * n if rank is None else rank * (m + n)


def beneficial_rank(shape, rank) -> int | None:
    """The rank, or None where its factors are no smaller than the layer (m, n)."""
    return rank if factored_size(shape, rank) < factored_size(shape, None) else None


def allocate_ranks(energies: dict, shapes: dict, budget, step=1) -> dict[str, int | None]:
    """The ranks that lose least together, with sizes within `budget` numbers, per name; None: the
    layer stays dense.

    energies: name -> (s), descending, what each component is worth, in one unit for all layers;
    shapes: name -> (m, n). A layer's ranks are multiples of `step`, and the last of them leaves no
    error: the dense layer, or the rank above which all energies are zero. Its error is a convex
    function of its size, but for the large step to the dense layer, so ranks just before that are
    left out. Then the steepest steps of all layers are taken first. Raises ValueError where even
    the least ranks do not fit.
    """
    ranks, spent, segments = {}, 0, []
    for name, shape in shapes.items():
        lost = energies[name].double().flip(0).cumsum(0).flip(0).tolist()       # [r]: at rank r
        least = min(step, len(lost))
        exact = beneficial_rank(shape, max(least, sum(error > 0 for error in lost)))
        points = [(factored_size(shape, r), lost[r], r)
                  for r in range(least, exact or len(lost), step) if beneficial_rank(shape, r)]
        last = factored_size(shape, exact), 0.0, exact
        while len(points) > 1 and _slope(points[-2], points[-1]) >= _slope(points[-1], last):
            points.pop()
        points.append(last)
        ranks[name], spent = points[0][2], spent + points[0][0]
        for place, (a, b) in enumerate(zip(points, points[1:])):
            segments.append((_slope(a, b), place, name, b[0] - a[0], b[2]))
    if spent > budget:
        raise ValueError(f'{budget:,.0f} numbers are too few for the smallest ranks '
                         f'(nearest: {spent:,})')
    full = set()                                             # layers whose next segment did not fit
    for slope, _, name, size, rank in sorted(segments, key=lambda segment: segment[:2]):
        if name not in full and spent + size <= budget and slope < 0:
            ranks[name], spent = rank, spent + size
        else:
            full.add(name)
    return ranks


def _slope(a, b):
    return (b[1] - a[1]) / (b[0] - a[0])

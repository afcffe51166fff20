"""Low-rank factors of trained weights, given statistics of inputs and outputs. Pure linear algebra: no GPT in here.

A layer y = W x, W (m, n), is to become y = U A x, U (m, r), A (r, n). With C = E[x x^T] of its inputs and G = E[g g^T]
of the loss's gradients g = dL/dy at its outputs, the error that counts is

    E ~ tr(G (W - U A) C (W - U A)^T),

the second-order change of the loss where x and g are independent (Kronecker-factored Fisher: Martens and Grosse,
arXiv:1503.05671). With square roots R^T R = G and L L^T = C it is the norm of R W L - R U A L, so that Eckart and
Young's theorem gives the optimum: with E_r the first r left singular vectors of R W L,

    U = R^-1 E_r,   A = E_r^T R W,

and what is lost is the sum of the other squared singular values, for all r at once. G = I is SVD-LLM's criterion
(arXiv:2403.07378), the output error; C = G = I the plain SVD.

Statistics are singular where tokens are few or an input is constant, hence a ridge on both: it settles the directions
that the calibration text has not shown, as the plain SVD would. Full rank is W itself, whatever the statistics.
"""

import torch

RIDGE = 1e-6                        # of the mean of a diagonal; 1e-2 gives the same losses to 1e-4 nats


class Factorization:
    """All best approximations of weight (m, n), in float64 on the CPU, from one eigendecomposition of the size of its
    smaller side, s = min(m, n): the singular vectors of R W L on that side. So of that side a statistic is needed,
    `near`, and of the other only what W makes of it, `far`, both (s, s) and positive semi-definite:

                  near    far
        m >= n    C       W^T G W
        m <  n    G       W C W^T

    None: that of an identity. ridge: of each, in shares of its mean. `energies` (s), descending, are the squared
    singular values of R W L. Raises ValueError for what is not finite."""

    def __init__(self, weight, near=None, far=None, ridge=RIDGE):
        weight, near, far = finite('weight', weight), *(finite('inputs or gradients', t) for t in (near, far))
        self.weight, self.tall = weight, weight.size(0) >= weight.size(1)
        self.size = min(weight.shape)
        self.root, self.inverse, near_level = square_root(near, self.size, ridge)
        gram = weight.mT @ weight if self.tall else weight @ weight.mT                          # (s, s), plain far
        level = gram.trace()
        far_level = 1.0 if far is None else float(far.trace() / level) if level > 0 else 0.0
        far = gram if far is None or not far_level > 0 else far / far_level + ridge * gram
        energies, vectors = torch.linalg.eigh(self.root @ far @ self.root)                      # ascending
        self.vectors = vectors.flip(1)                              # (s, s)
        self.energies = energies.flip(0).clamp_min(0) * near_level * far_level                  # (s)

    def error(self, rank):
        """tr(G (W - U A) C (W - U A)^T) at that rank: the energies that are cut."""
        return self.energies[rank:].sum().item()

    def factors(self, rank):
        """U (m, r) and A (r, n), balanced: U^T U = A A^T. r above s: zeros fill up. Raises ValueError below 1."""
        if rank < 1:
            raise ValueError(f'rank={rank}: must be at least 1 (nearest: 1)')
        if rank >= self.size:                                       # the weight itself, whatever was seen
            return balanced(self.weight, torch.eye(self.weight.size(1), dtype=self.weight.dtype), rank)
        leading = self.vectors[:, :rank]                            # (s, r)
        into, out_of = leading.mT @ self.inverse, self.root @ leading                           # (r, s), (s, r)
        if self.tall:
            return balanced(self.weight @ out_of, into, rank)       # (m, r), (r, n)
        return balanced(into.mT, out_of.mT @ self.weight, rank)


def finite(name, tensor):
    """The tensor in float64 on the CPU; None: None. Raises ValueError with that name where an entry is not finite."""
    if tensor is not None and not tensor.isfinite().all():
        raise ValueError(f'{name}: not finite')
    return None if tensor is None else tensor.detach().cpu().double()


def square_root(statistic, size, ridge):
    """Symmetric root (size, size) of a statistic in units of its mean diagonal, with a ridge; the root's inverse; that
    mean. None: identities and 1; nothing but zeros, which say as little: identities and 0."""
    identity = torch.eye(size, dtype=torch.float64)
    level = 1.0 if statistic is None else statistic.diagonal().mean().item()
    if statistic is None or not level > 0:
        return identity, identity, max(level, 0.0)
    values, vectors = torch.linalg.eigh(statistic / level)
    roots = (values.clamp_min(0) + ridge).sqrt()                    # (size)
    inverses = torch.where(roots > 0, 1 / roots, 0)                 # no ridge: as if what was never seen were not there
    return vectors * roots @ vectors.mT, vectors * inverses @ vectors.mT, level


def balanced(up, down, rank):
    """Other factors of up (m, k) @ down (k, n), of that rank at least: U (m, r), A (r, n) with U^T U = A A^T, the roots
    of its singular values on either side, so that neither loses more to float32 than the other."""
    (q_up, r_up), (q_down, r_down) = torch.linalg.qr(up), torch.linalg.qr(down.mT)
    u, s, vh = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)                          # of size k at most
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    new_up, new_down = up.new_zeros(len(up), rank), up.new_zeros(rank, down.size(1))
    new_up[:, :kept], new_down[:kept] = q_up @ u[:, :kept] * root, root[:, None] * (vh[:kept] @ q_down.mT)
    return new_up, new_down


def refit(before, inputs, cross, ridge=RIDGE):
    """The matrix M (k, n) for which M x^ is closest to u = P x, now that x has become x^: least squares, with a ridge
    that holds M to P = before (k, n) in directions where there is nothing. inputs E[x^ x^^T] (n, n), cross E[u x^^T]
    (k, n), float64. No factorization can fail: eigenvalues of `inputs` that rounding makes negative count as 0. Raises
    ValueError for what is not finite."""
    inputs, cross = finite('inputs', inputs), finite('inputs', cross)
    _, inverse, level = square_root(inputs, len(inputs), ridge)
    return before + (cross - before @ inputs) / level @ inverse @ inverse if level > 0 else before


def factored_size(shape, rank):
    """Numbers in a layer (m, n) as a product of rank r; rank None: as it is."""
    m, n = shape
    return m * n if rank is None else rank * (m + n)


def saving_rank(shape, rank):
    """The rank, or None where factors of it are no smaller than the layer (m, n)."""
    return rank if factored_size(shape, rank) < factored_size(shape, None) else None


def budgeted_ranks(energies, shapes, budget, step=1):
    """The ranks that lose least together, their sizes within `budget` numbers: dict name -> rank, None: dense.

    energies: name -> (s), descending, what each component is worth in one unit for all layers; shapes: name -> (m, n).
    Each layer's error over its size is cut down to its convex hull, of which the dense layer, or the rank above which
    all energies are zero, is the last point, without an error; then the steepest stretches are bought first: components
    of layers where sigma^2 / (m + n) is large. Other ranks are multiples of `step`, and all are `step` at least. Raises
    ValueError where even those do not fit.
    """
    ranks, spent, stretches = {}, 0, []
    for name, shape in shapes.items():
        cut = energies[name].double().flip(0).cumsum(0).flip(0).tolist()                        # [r]: lost at rank r
        least = min(step, len(cut))
        exact = saving_rank(shape, max(least, sum(lost > 0 for lost in cut)))
        points = [(factored_size(shape, r), cut[r], r) for r in range(least, exact or len(cut), step)
                  if saving_rank(shape, r)]
        hull = convex_hull([*points, (factored_size(shape, exact), 0.0, exact)])
        ranks[name], spent = hull[0][2], spent + hull[0][0]
        for place, (a, b) in enumerate(zip(hull, hull[1:])):
            stretches.append((_slope(a, b), place, name, b[0] - a[0], b[2]))
    if spent > budget:
        raise ValueError(f'{budget:,.0f} numbers are too few for the smallest ranks (nearest: {spent:,})')
    full = set()                                                    # layers whose next stretch did not fit
    for slope, _, name, size, rank in sorted(stretches, key=lambda stretch: stretch[:2]):
        if name not in full and spent + size <= budget and slope < 0:                           # 0: worth nothing
            ranks[name], spent = rank, spent + size
        else:
            full.add(name)
    return ranks


def convex_hull(points):
    """The lower convex hull of points (size, error, ...) in order of size, from first to last."""
    hull = []
    for point in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a, b):
    return (b[1] - a[1]) / (b[0] - a[0])

"""Low-rank factors of trained weights from statistics of inputs and gradients, and rank allocation.

A layer y = W x with W (m, n) becomes y = U A x with U (m, r) and A (r, n). Let C = E[x x^T] for its
inputs x, and G = E[g g^T] for the gradients g = dL/dy at its outputs. The factors minimize

    tr(G (W - U A) C (W - U A)^T).

This is the second-order change of the loss if x and g are independent (Kronecker-factored Fisher:
Martens and Grosse, arXiv:1503.05671). With square roots R^T R = G and L L^T = C, it equals the
squared norm of R W L - R U A L. The theorem of Eckart and Young gives the optimum. Let E_r hold the
first r left singular vectors of R W L. Then

    U = R^-1 E_r,   A = E_r^T R W.

The error is the sum of the remaining squared singular values, so one SVD serves every r. G = I
gives the error of the outputs, which SVD-LLM minimizes (arXiv:2403.07378). C = G = I gives the
plain SVD of W.

C or G is singular if there are few tokens or constant inputs, so a ridge is added to both. In
directions that do not occur in the calibration text, the result is then that of the plain SVD. Full
rank gives W itself, whatever the statistics.
"""

import math
from typing import NamedTuple

import torch

from lowrank.spectrum import to_float64

RIDGE = 1e-6                # relative to the mean diagonal; 1e-2 gives the same losses to 1e-4 nats
# the same, for InputSelection: float32 sums over 3,072 inputs have eigenvalues down to -3e-5
SELECTION_RIDGE = 1e-4


class Factorization:
    """Best approximations of a weight (m, n) for all ranks, by one eigendecomposition.

    All results are computed in float64 on the CPU. The decomposed matrix is (s, s), where
    s = min(m, n) is the smaller side of the weight. Its eigenvectors are singular vectors of R W L.
    It is computed from two arguments, near and far:

                    near    far
        m >= n      C       W^T G W
        m <  n      G       W C W^T

    near (s, s) is the statistic of the smaller side. far (s, s) is the statistic of the larger
    side, multiplied by W on both sides. None means that the statistic is the identity. ridge is
    relative to the mean diagonal of each statistic. `energies` (s) are the squared singular values
    of R W L, descending. Raises ValueError for values that are not finite.
    """

    def __init__(self, weight, near: torch.Tensor | None = None, far: torch.Tensor | None = None,
                 ridge=RIDGE):
        self.weight, weight = weight, to_float64(weight, 'weight')  # kept as given, not in float64
        near, far = (None if t is None else to_float64(t, 'inputs or gradients')
                     for t in (near, far))
        self.tall, self.size = weight.size(0) >= weight.size(1), min(weight.shape)
        root, inverse, near_level = psd_sqrt(near, self.size, ridge)
        gram = weight.mT @ weight if self.tall else weight @ weight.mT          # (s, s)
        level = gram.trace()
        far_level = 1.0 if far is None else float(far.trace() / level) if level > 0 else 0.0
        far = gram if far is None or not far_level > 0 else far / far_level + ridge * gram
        energies, vectors = torch.linalg.eigh(root @ far @ root)                # ascending
        vectors = vectors.flip(1)                                               # (s, s)
        self.left, self.right = root @ vectors, vectors.mT @ inverse            # (s, s)
        self.energies = energies.flip(0).clamp_min(0) * near_level * far_level  # (s)

    def factors(self, rank) -> tuple[torch.Tensor, torch.Tensor]:
        """Return U (m, r) and A (r, n) with U^T U = A A^T. At full rank U A is W itself."""
        weight = to_float64(self.weight)
        if rank >= self.size:
            return balance(weight, torch.eye(self.weight.size(1), dtype=torch.float64), rank)
        up, down = self.split(rank)
        if self.tall:
            return balance(weight @ up, down, rank)                 # (m, r), (r, n)
        return balance(down.mT, up.mT @ weight, rank)

    def split(self, rank) -> tuple[torch.Tensor, torch.Tensor]:
        """Return L (s, r) and R (r, s), not balanced: U A is W L R if m >= n, else (L R)^T W. At
        full rank L R is the identity."""
        return self.left[:, :rank], self.right[:rank]


def psd_sqrt(statistic, size, ridge):
    """Return the symmetric square root of a positive semidefinite statistic (size, size), the
    inverse of the root, and the mean diagonal of the statistic. Before the root, the statistic is
    divided by this mean, and the ridge is added. None gives identities and 1. A zero statistic
    gives identities and 0."""
    level = 1.0 if statistic is None else statistic.diagonal().mean().item()
    if statistic is None or not level > 0:
        identity = torch.eye(size, dtype=torch.float64)
        return identity, identity, max(level, 0.0)
    values, vectors = torch.linalg.eigh(statistic / level)
    roots = (values.clamp_min(0) + ridge).sqrt()                    # (size)
    inverses = torch.where(roots > 0, 1 / roots, 0)     # ridge=0: drop directions without data
    return vectors * roots @ vectors.mT, vectors * inverses @ vectors.mT, level


def balance(up, down, rank):
    """Return U (m, r) and A (r, n) such that U A is the best approximation of up (m, k) @ down
    (k, n) of rank r, and U^T U = A A^T. Factors of equal size lose equally little when they are
    rounded to float32."""
    (q_up, r_up), (q_down, r_down) = torch.linalg.qr(up), torch.linalg.qr(down.mT)
    u, s, vh = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)          # of size k at most
    root = s[:rank].sqrt()
    return q_up @ u[:, :rank] * root, root[:, None] * (vh[:rank] @ q_down.mT)


class InputSelection:
    """Choice of the most important inputs of a weight W (m, n), for all numbers of inputs.

    If only the inputs x_S remain, their best weight is M = W C[:, S] C[S, S]^-1 (Nystrom). It
    minimizes tr(G E C E^T), where E x = W x - M x_S, whatever G is. Inputs are removed in rounds.
    Each round removes a fifth of the inputs that are left, those whose removal adds the least error
    (optimal brain surgeon, Hassibi and Stork, 1993).

    inputs: C = E[x x^T] (n, n); gradients: G = E[g g^T] (m, m) of the loss's gradients at the
    outputs. `order` (n) lists the inputs, the most important one first. `energies` (n) estimate
    the errors that they save, descending. Computed in float64 on the CPU, but C is kept in float32.
    Raises ValueError for values that are not finite.
    """

    def __init__(self, weight, inputs, gradients):
        self.weight, weight = weight, to_float64(weight, 'weight')
        inputs, gradients = (to_float64(t, 'inputs or gradients') for t in (inputs, gradients))
        level, identity = inputs.diagonal().mean().item(), torch.eye(len(inputs)).double()
        inputs = inputs / level + SELECTION_RIDGE * identity if level > 0 else identity
        self.inputs = inputs.float()            # half the memory, rounding is far below the ridge
        root, _, gradient_level = psd_sqrt(gradients, len(gradients), RIDGE)
        fitted = root @ weight                                      # R W (m, n)
        cross = fitted @ inputs                                     # R W C (m, n)
        left, order, energies, lost = torch.arange(len(inputs)), [], [], 0.0
        total, inverse = (fitted * cross).sum().item(), self.inverse(left)
        while len(left):
            scores, ranked = (fitted.square().sum(0) / inverse.diagonal()).sort()
            count = math.ceil(len(left) / 5)
            order, left = order + [left[ranked[:count]]], left[ranked[count:].sort().values]
            inverse, target = self.inverse(left), cross[:, left]
            fitted = target @ inverse
            before, lost = lost, total - (fitted * target).sum().item()
            # the scores leave out how the neurons of a round replace each other
            scale = max(lost - before, 0.0) / scores[:count].sum().clamp_min(1e-300)
            energies.append(scale * scores[:count])
        self.order = torch.cat(order).flip(0)
        scale = max(level, 0.0) * gradient_level
        self.energies = scale * torch.cat(energies).cummax(0).values.flip(0)                # (n)

    def inverse(self, chosen):
        """Return C[S, S]^-1 (|S|, |S|) for the chosen inputs S."""
        return torch.cholesky_inverse(torch.linalg.cholesky(
            self.inputs[chosen][:, chosen].double()))

    def select(self, count):
        """Return the indices of the chosen inputs (count), ascending, and their weight
        (m, count)."""
        chosen = self.order[:count].sort().values
        weight = to_float64(self.weight) @ self.inputs[:, chosen].double()
        return chosen, weight @ self.inverse(chosen)


# --------------------------------------------------------------------------------------------------
# rank allocation

class Curve(NamedTuple):
    """What the components of a part of a model cost and save.

    energies (s): how much the error falls with each component, descending, in the same unit for all
    parts; unit: parameters of a component; full: parameters of the whole part, which has no error;
    step: the number of components is a multiple of it, unless the rest has no energy.
    """
    energies: torch.Tensor
    unit: int
    full: int
    step: int = 1

    def size(self, rank: int | None) -> int:
        """Parameters of `rank` components, or of the whole part if rank is None."""
        return self.full if rank is None else rank * self.unit

    def lost(self, keep):
        """Error if the fraction `keep` of the parameters remains."""
        return self.energies[int(keep * self.full / self.unit):].sum().item()


def beneficial_rank(shape, rank) -> int | None:
    """Return the rank, or None if its factors are not smaller than the layer (m, n)."""
    return rank if rank * sum(shape) < math.prod(shape) else None


def allocate_ranks(curves: dict[str, Curve], budget) -> dict[str, int | None]:
    """Choose the numbers of components with the least total error within a budget of parameters.
    Returns name -> number, where None means that the whole part stays. Raises ValueError if even
    the smallest numbers exceed the budget.

    The largest choice for a part has no error. This choice is the whole part, or the number of
    components above which all energies are zero. The error is a convex function of the size, except
    for the jump to the whole part. The numbers just before the jump are left out, which makes the
    function convex. Parameters are then spent first where they reduce the error most.
    """
    ranks, spent, segments = {}, 0, []
    for name, curve in curves.items():
        lost = curve.energies.double().flip(0).cumsum(0).flip(0).tolist()       # [r]: at rank r
        least, size = min(curve.step, len(lost)), curve.size
        exact = max(least, sum(error > 0 for error in lost))
        exact = exact if size(exact) < curve.full else None
        points = [(size(r), lost[r], r) for r in range(least, exact or len(lost), curve.step)
                  if size(r) < curve.full]
        last = size(exact), 0.0, exact
        has_jump = size(len(lost)) > curve.full
        while has_jump and len(points) > 1 and (
                _slope(points[-2], points[-1]) >= _slope(points[-1], last)):
            points.pop()
        points.append(last)
        ranks[name], spent = points[0][2], spent + points[0][0]
        slope = -math.inf
        for place, (a, b) in enumerate(zip(points, points[1:])):
            slope = max(slope, _slope(a, b))            # rounding must not change the order
            segments.append((slope, place, name, b[0] - a[0], b[2]))
    if spent > budget:
        raise ValueError(f'{budget:,.0f} parameters are too few for the smallest ranks '
                         f'(nearest: {spent:,})')
    full = set()                                        # parts whose next segment did not fit
    for slope, _, name, size, rank in sorted(segments, key=lambda segment: segment[:2]):
        if name not in full and spent + size <= budget and slope < 0:
            ranks[name], spent = rank, spent + size
        else:
            full.add(name)
    return ranks


def _slope(a, b):
    return (b[1] - a[1]) / (b[0] - a[0])

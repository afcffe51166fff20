"""A linear layer that can be told to protect what it has learned: see `AdaptiveSVDLinear`."""

import torch
import torch.nn as nn
from torch.nn import functional as F

from lowrank.layers import filled, unfilled
from lowrank.svd import split_evenly

PROTECTIONS = ('left', 'none')
FLOOR = 1e-3                        # of sigma_1: rows of A are no shorter than its root, so that no direction is dead


class AdaptiveSVDLinear(nn.Module):
    """y = W x + b in one of two modes, with W (m, n) = U S V^T and g = min(m, n).

    full: W is trained, as in nn.Linear.
    low-rank: W = W_p + B A, where B (m, r) and A (r, n) begin as the r minor components and are trained, and W_p (m,
    n), the rest, is frozen. `protected` (m, k), U_p, has the other k = g - r left singular vectors; with protection
    'left' `protect`, called after every optimizer step, removes from B what lies in their span, so that U_p^T W stays
    what it was at the switch. The projection is of the parameters: AdamW's element-wise scaling would undo that of a
    gradient. 'none' leaves B and A free, which can then rebuild and cancel any component: MiLoRA (arXiv:2406.09044).

    Switches keep the function, W_p := W - B A. At r = 246 of g = 256 low-rank mode holds 2.9 times the numbers of full
    mode: it protects, and saves nothing.
    """

    def __init__(self, linear, protection='left'):
        """In full mode, with the very parameters of an nn.Linear. Raises ValueError for an unknown protection."""
        super().__init__()
        if protection not in PROTECTIONS:
            raise ValueError(f'protection={protection!r}: unknown (valid: {", ".join(PROTECTIONS)})')
        self.base, self.protection = linear, protection
        self.A = self.B = None
        self.register_buffer('protected', None)

    def make_lowrank(self, r):
        """Low-rank mode with factors of zeros, for values that are loaded later. Raises ValueError for an r outside
        1..g - 1."""
        self._check(r)
        (m, n), new = self.base.weight.shape, self.base.weight.new_zeros
        self._hold(new(m, r), new(r, n), new(m, min(m, n) - r))

    def forward(self, x):
        """x (..., n) -> (..., m). W_p + B A is made where x has rows enough: that costs as much as B A x for m n / (m +
        n) of them."""
        (m, n), rows = self.base.weight.shape, x.numel() // x.size(-1)
        if self.A is not None and rows * (m + n) < m * n:
            return self.base(x) + self.B(self.A(x))
        return F.linear(x, self.weight, self.bias)

    @property
    def r(self):
        """The number of components that are trained, None in full mode."""
        return None if self.A is None else self.A.out_features

    @property
    def weight(self):
        """W (m, n), in low-rank mode made anew at each look."""
        return self.base.weight if self.A is None else self.base.weight + self.B.weight @ self.A.weight

    @property
    def bias(self):
        return self.base.bias

    def half_decayed(self):
        """The parameters that weight decay is halved for: both shrink the product."""
        return [] if self.A is None else [self.A.weight, self.B.weight]

    def watch(self, on):
        """Whether the next backward passes have to leave dL/dW in `base.weight.grad`. In full mode they always do; W_p
        is a parameter that no optimizer has, and its gradient is that of W."""
        self.base.weight.requires_grad_(on or self.A is None)

    @torch.no_grad()
    def switch_to_lowrank(self, r, basis=None):
        """Train the r minor components alone from here on; in low-rank mode: decompose what W has become anew. basis:
        `left_basis` of W, made here if None. Where `base.weight.grad` has dL/dW, A and B get theirs, and it is
        dropped. Raises ValueError for an r outside 1..g - 1."""
        self._check(r)
        W = at_hand(self.weight)                                    # (m, n)
        U, S = left_basis(W) if basis is None else basis
        k = len(S) - r
        B, A = minor_factors(W, U.to(W), S.to(W), k)                # (m, r), (r, n)
        like = self.base.weight
        self._hold(B.to(like), A.to(like), U[:, :k].to(like))
        product = wide(self.B.weight) @ wide(self.A.weight)         # of the rounded factors: the function stays
        like.copy_((W - product).to(like.dtype))
        if like.grad is not None:
            self.B.weight.grad, self.A.weight.grad = like.grad @ self.A.weight.mT, self.B.weight.mT @ like.grad
            like.grad = None
        like.requires_grad_(False)

    @torch.no_grad()
    def switch_to_full(self):
        """Train all of W from here on."""
        like = self.base.weight
        like.copy_((wide(like) + wide(self.B.weight) @ wide(self.A.weight)).to(like.dtype))
        self.A = self.B = self.protected = None
        like.requires_grad_(True)

    @torch.no_grad()
    def protect(self):
        """To be called after every optimizer step."""
        if self.A is not None and self.protection == 'left':
            self.B.weight -= self.protected @ (self.protected.mT @ self.B.weight)               # (m, k) (k, r)

    @torch.no_grad()
    def merge(self):
        """The plain layer with weight W."""
        W = wide(self.base.weight)
        if self.A is not None:
            W = W + wide(self.B.weight) @ wide(self.A.weight)
        return filled(W, self.bias, self.base.weight)

    def _hold(self, B, A, protected):
        """Factors and protected space with these values. Parameters of these shapes stay the same objects, which an
        optimizer may know."""
        if self.r != len(A):
            like = self.base.weight
            self.A, self.B = (unfilled(n, m, False, like) for m, n in (A.shape, B.shape))
        with torch.no_grad():
            self.A.weight.copy_(A)
            self.B.weight.copy_(B)
        self.protected = protected.contiguous()                     # as it is loaded: products are the same to the bit
        self.base.weight.requires_grad_(False)

    def _check(self, r):
        g = min(self.base.weight.shape)
        if not 1 <= r < g:
            raise ValueError(f'r={r}: must be 1 to {g - 1} for a layer of {self.base.out_features} x '
                             f'{self.base.in_features}')


def at_hand(tensor):
    """Its values, without gradients, in float32 at least, where there is linear algebra: MPS has none."""
    tensor = (tensor.cpu() if tensor.device.type == 'mps' else tensor).detach()
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def wide(tensor):
    """The same in float64."""
    return at_hand(tensor).double()


def left_basis(weight):
    """U (m, g) and singular values S (g), descending, of a weight (m, n), in its own precision, float32 at least. For m
    <= n U is that of eigh(W W^T), half the time of an SVD, and S is |W^T u|: directions with sigma below sqrt(eps)
    sigma_1, 3e-4 of it in float32, are mixed with each other."""
    W = at_hand(weight)
    if W.size(0) > W.size(1):
        U, S, _ = torch.linalg.svd(W, full_matrices=False)
        return U, S
    unit = W.abs().max() or 1
    W = W / unit                                                    # there is room for its squares
    _, U = torch.linalg.eigh(W @ W.mT)
    S, order = (W.mT @ U).norm(dim=0).sort(descending=True)
    return U[:, order], S * unit


def right_basis(W, U, S):
    """V (n, g) of W = U S V^T, or its k leading columns for those of U and S; where S is too small to tell, any
    orthonormal vectors that complete the others."""
    known = int((S > torch.finfo(S.dtype).eps ** 0.5 * S[:1]).sum())
    V = W.mT @ U[:, :known] / S[:known]                             # (n, known)
    if known == len(S):
        return V
    return torch.cat((V, torch.linalg.qr(V, mode='complete')[0][:, known:len(S)]), dim=1)


def minor_factors(W, U, S, k):
    """B (m, r) and A (r, n) whose product is all of W but its first k components."""
    return split_evenly(U[:, k:], S[k:], right_basis(W, U, S)[:, k:].mT, FLOOR * S[0])

"""Low-rank adapters: what fine-tuning trains in the place of a weight (m, n), which stays as it is.

    y = W x + b + s B A x,   A (r, n), B (m, r),   s = alpha / r

LoRA (Hu et al., arXiv:2106.09685) starts from a random A and B = 0. PiSSA (Meng et al., arXiv:2404.02948) and MiLoRA
(Wang et al., arXiv:2406.09044) start from a part of the weight W_0 itself, its r largest or its r smallest singular
values, and freeze the rest, W = W_0 - s B_0 A_0. Such an adapter is worth nothing without that W; for W_0 it is

    W + s B A = W_0 + s [B, B_0] [A; -A_0],

a plain LoRA of twice the rank, or of the layer's full rank if that is less (`plain_adapter`).
"""

import torch
import torch.nn as nn

from lowrank.layers import filled
from lowrank.svd import split_evenly, truncated_svd

INITS = ('lora', 'pissa', 'milora')
# of sigma_1, the smallest value that is split evenly (a random 1,000 x 1,000 matrix has none below some 5e-4): no row
# of A begins below 1e-2 of what the first would be
FLOOR = 1e-4
ROUNDING = 2                        # eps of the norm of W_0: what may be left of W_0 - W beyond rank r; measured: 0.25


class LoRALinear(nn.Module):
    """y = W x + b + s B A dropout(x): x (..., n) -> y (..., m), s = alpha / r. W (m, n) and b (m) of the linear layer
    `base` are frozen; A (r, n) and B (m, r), linear layers without bias, are trained: r (m + n) parameters."""

    def __init__(self, in_features, out_features, rank, alpha, dropout=0.0, bias=True):
        """W and b as nn.Linear's, the adapter as LoRA's: to be loaded into. dropout: share of x that the adapter does
        not see in training. Raises ValueError for a rank outside 1..min(m, n), an alpha that is not above 0 and
        finite, and a dropout outside [0, 1)."""
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(f'rank={rank}: must be 1 to {min(in_features, out_features)} for a layer of '
                             f'{out_features} x {in_features}')
        if not 0 < alpha < float('inf'):
            raise ValueError(f'alpha={alpha}: must be above 0 and finite')
        if not 0 <= dropout < 1:
            raise ValueError(f'dropout={dropout}: must be at least 0 and below 1')
        super().__init__()
        self.base = nn.Linear(in_features, out_features, bias).requires_grad_(False)
        self.alpha = alpha
        self.dropout = nn.Dropout(dropout)
        self.A = nn.Linear(in_features, rank, bias=False)           # Kaiming-uniform, a = sqrt(5), as LoRA's own code
        self.B = nn.Linear(rank, out_features, bias=False)
        nn.init.zeros_(self.B.weight)

    def forward(self, x):                                           # (..., n) -> (..., m), by way of (..., r)
        return self.base(x) + self.B(self.scale * self.A(self.dropout(x)))

    @property
    def weight(self):
        """W + s B A (m, n), made anew at each look."""
        return self.base.weight + self.scale * self.B.weight @ self.A.weight

    @property
    def bias(self):
        return self.base.bias

    @property
    def rank(self):
        return self.A.out_features

    @property
    def scale(self):
        return self.alpha / self.rank

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear, rank, alpha, dropout=0.0, init='lora'):
        """The layer that computes what an nn.Linear does until it is trained, with its device, kind of numbers, bias
        and mode. init: 'lora', A from torch's global generator; 'pissa', 'milora', from the SVD in float64 on the CPU.
        Raises ValueError as the constructor and for an unknown init, and torch.linalg.LinAlgError where an SVD is to be
        made of what is not finite."""
        if init not in INITS:
            raise ValueError(f'init={init!r}: must be one of {", ".join(INITS)}')
        m, n = linear.weight.shape
        layer = cls(n, m, rank, alpha, dropout, linear.bias is not None).to(linear.weight).train(linear.training)
        layer.base.weight.copy_(linear.weight)
        if linear.bias is not None:
            layer.base.bias.copy_(linear.bias)
        if init != 'lora':
            whole = linear.weight.cpu().double()                    # (m, n)
            b, a = components(whole, slice(rank) if init == 'pissa' else slice(-rank, None), layer.scale)
            layer.A.weight.copy_(a.to(linear.weight.dtype))         # first the type: MPS has no float64
            layer.B.weight.copy_(b.to(linear.weight.dtype))
            layer.base.weight.copy_((whole - layer.change()).to(linear.weight.dtype))    # of rounded A and B
        return layer

    @torch.no_grad()
    def change(self):
        """s B A (m, n), in float64 on the CPU."""
        return self.scale * (self.B.weight.cpu().double() @ self.A.weight.cpu().double())

    @torch.no_grad()
    def merge(self):
        """The plain layer with the weight W + s B A, added in float64."""
        return filled(self.base.weight.cpu().double() + self.change(), self.bias, self.base.weight)


def components(matrix, kept, scale):
    """Factors b (m, k) and a (k, n): scale b a is what a float64 matrix (m, n) has of the singular values in `kept`, a
    slice of them in descending order. Raises torch.linalg.LinAlgError for what is not finite."""
    u, sigma, vh = truncated_svd(matrix, min(matrix.shape), 'standard')
    b, a = split_evenly(u[:, kept], sigma[kept], vh[kept], FLOOR * sigma[0])
    return b / scale ** 0.5, a / scale ** 0.5


@torch.no_grad()
def plain_adapter(layer, original):
    """A (r', n) and B (m, r'), r' = min(2 r, m, n), that make of W_0 = original (m, n), the weight a LoRALinear was
    made of, what the layer is now: W_0 + s B A, with the layer's s, hence with r' / r times its alpha. Where W is W_0,
    as from 'lora', these are its own A (r, n) and B (m, r). Copies, with its device and kind of numbers.

    B_0 and A_0 are neither kept nor made again, for an SVD is not everywhere the same to the bit: s B_0 A_0 is W_0 - W,
    which has rank r but for the rounding of W. Raises ValueError for a W_0 of which that is not true, and
    torch.linalg.LinAlgError for one that is not finite."""
    a, b, w = layer.A.weight, layer.B.weight, layer.base.weight
    if original.shape != w.shape:
        raise ValueError(f'original: has the shape {tuple(original.shape)}, the layer {tuple(w.shape)}')
    whole = original.cpu().double()
    removed = whole - w.cpu().double()                              # (m, n)
    if not removed.any():
        return a.clone(), b.clone()
    b_0, a_0 = components(removed, slice(layer.rank), layer.scale)
    rest = (removed - layer.scale * b_0 @ a_0).norm() / whole.norm()
    # never less than float32's: a layer made in float32 may since have been converted
    if not rest <= ROUNDING * max(torch.finfo(w.dtype).eps, torch.finfo(torch.float32).eps):
        raise ValueError(f'original: is not what the layer was made of, {rest:.1e} of it is left beyond the '
                         f'{layer.rank} components that the layer has taken out')
    both = torch.cat((a.cpu().double(), -a_0)), torch.cat((b.cpu().double(), b_0), dim=1)
    if len(both[0]) > min(w.shape):                                 # more than any matrix of this shape needs
        b_0, a_0 = components(layer.scale * both[1] @ both[0], slice(None), layer.scale)
        both = a_0, b_0
    return tuple(factor.to(w.dtype).to(w.device) for factor in both)

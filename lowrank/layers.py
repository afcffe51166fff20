"""Linear layers in other forms: a product of two smaller ones, and apart where others have them in one."""

import torch
import torch.nn as nn
from torch.nn import functional as F

from lowrank.cache import KeyValueCache
from lowrank.svd import truncated_svd


class LowRankLinear(nn.Module):
    """y = B (A x) + b, a linear layer whose weight (m, n) has rank r at most: r (m + n) parameters instead of m n, and
    as many multiplications for a row of x. A (r, n) and B (m, r) are linear layers, of which B has the bias."""

    def __init__(self, in_features, out_features, rank, bias=True):
        """Raises ValueError for a rank outside 1..min(m, n)."""
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(f'rank={rank}: must be 1 to {min(in_features, out_features)} for a layer of '
                             f'{out_features} x {in_features}')
        self.A = nn.Linear(in_features, rank, bias=False)
        self.B = nn.Linear(rank, out_features, bias=bias)

    def forward(self, x):                                           # (..., n) -> (..., r) -> (..., m)
        return self.B(self.A(x))

    @classmethod
    def from_linear(cls, linear, rank):
        """The layer whose B A is the best rank-r approximation of an nn.Linear's weight (Eckart and Young): A = sqrt(S)
        V^T, B = U sqrt(S), so that both factors have the same scale; the bias is kept. Raises ValueError for a rank
        outside 1..min(m, n)."""
        with torch.no_grad():
            u, s, vh = truncated_svd(linear.weight.cpu().double(), rank, 'standard')            # (m, r), (r), (r, n)
        return cls.from_factors(u * s.sqrt(), s.sqrt()[:, None] * vh, linear)

    @classmethod
    @torch.no_grad()
    def from_factors(cls, b, a, like):
        """b (m, r), a (r, n), with the bias, the kind of numbers and the device of the layer `like`."""
        layer = cls(a.size(1), len(b), len(a), like.bias is not None).to(like.weight)
        layer.A.weight.copy_(a.to(like.weight.dtype))               # first the type: MPS has no float64
        layer.B.weight.copy_(b.to(like.weight.dtype))
        if like.bias is not None:
            layer.bias.copy_(like.bias)
        return layer.requires_grad_(like.weight.requires_grad)

    @torch.no_grad()
    def merge(self):
        """The dense layer with the weight B A, multiplied in float64."""
        product = self.B.weight.cpu().double() @ self.A.weight.cpu().double()                   # (m, n)
        return filled(product, self.bias, self.A.weight).requires_grad_(self.A.weight.requires_grad)

    @property
    def weight(self):
        """B A (m, n), made anew at each look."""
        return self.B.weight @ self.A.weight

    @property
    def bias(self):
        return self.B.bias

    @property
    def rank(self):
        return self.A.out_features


@torch.no_grad()
def split(linear, parts):
    """A linear layer (p m, n) as p = parts layers (m, n), whose outputs side by side are its own."""
    biases = [None] * parts if linear.bias is None else linear.bias.chunk(parts)
    return [filled(weight, bias, weight).requires_grad_(linear.weight.requires_grad)           # a view would keep all
            for weight, bias in zip(linear.weight.chunk(parts), biases)]


def fuse(layers):
    """The inverse of `split`: weight (p m, n) and bias (p m), or None, of layers or of products of two."""
    weight, biases = torch.cat([layer.weight for layer in layers]), [layer.bias for layer in layers]
    return weight, None if biases[0] is None else torch.cat(biases)


class SplitProjection(nn.Module):
    """Queries, keys and values of all heads from W_q, W_k and W_v (C, C), each a layer of its own that can be a product
    of two: in the place of the model's `QKVProjection`, from which it is made, and whose methods it has."""

    def __init__(self, fused):
        super().__init__()
        self.n_head = fused.n_head
        self.c_q, self.c_k, self.c_v = split(fused, 3)

    def forward(self, x, w_v=None):
        """As `QKVProjection.forward`."""
        v = self.c_v(x) if w_v is None else F.linear(x, w_v.flatten(0, 1), self.c_v.bias)         # (B, T, C)
        return split_heads(self.n_head, self.c_q(x), self.c_k(x), v)

    def value_weight(self):
        """As `QKVProjection.value_weight`."""
        return self.c_v.weight.unflatten(0, (self.n_head, -1))

    def to_cache(self, x, cache):
        """As `QKVProjection.to_cache`."""
        v = self.c_v(x) if cache.to_coordinates is None else F.linear(x, cache.to_coordinates)    # (B, T, C or nh k)
        return split_heads(self.n_head, self.c_q(x), self.c_k(x), v)

    def new_cache(self, shape, factors, causal, **kind):
        """As `QKVProjection.new_cache`."""
        return KeyValueCache(shape, self.c_v.bias, factors, causal, **kind)


def unfilled(in_features, out_features, bias, like):
    """An nn.Linear with the device and dtype of the tensor `like`. No values are drawn: other draws stay the same."""
    return nn.utils.skip_init(nn.Linear, in_features, out_features, bias=bias, device=like.device, dtype=like.dtype)


@torch.no_grad()
def filled(weight, bias, like):
    """An nn.Linear with copies of weight (m, n) and bias (m), or None, with the device and dtype of `like`."""
    layer = unfilled(weight.size(1), len(weight), bias is not None, like)
    layer.weight.copy_(weight.to(like.dtype))                       # first the type: MPS has no float64
    if bias is not None:
        layer.bias.copy_(bias)
    return layer


def split_heads(n_head, *tensors):
    """Each (B, T, nh n) -> (B, nh, T, n)."""
    return tuple(t.unflatten(2, (n_head, -1)).transpose(1, 2) for t in tensors)

"""nn.Linear for decoding on a CPU."""

import torch
import torch.nn as nn
from torch.nn import functional as F

FEW_ROWS = 16                       # of x; beyond that a product is bound by arithmetic, not by reading the weights
VERY_FEW_ROWS = 4                   # up to here the BLAS is fastest with the weight as the left factor
LARGE = 2 ** 17                     # elements of a weight: below, splitting costs more than it saves


def linear(x, weight, bias=None):
    """F.linear(x, weight, bias): x (..., n), weight (m, n) -> (..., m). For a few rows of x the BLAS behind it reads
    the whole weight with one thread; here each thread takes its share of the weight's rows, at up to the memory's
    speed: 1.0 to 3.6 times faster on two cores (docs/RESULTS.md), equal but for the order of sums. F.linear itself
    where gradients are recorded."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.device.type != 'cpu':
        return F.linear(x, weight, bias)
    (m, n), threads = weight.shape, torch.get_num_threads()
    rows = x.numel() // n
    if (rows > FEW_ROWS or weight.numel() < LARGE or x.dtype != weight.dtype or not weight.is_contiguous()
            or torch.is_autocast_enabled('cpu')):
        return F.linear(x, weight, bias)
    even = m // threads * threads                                   # rows of the weight that can be shared out
    parts = weight[:even].view(threads, -1, n)                      # (threads, share, n)
    offsets = None if bias is None else bias[:even].view(threads, -1, 1)                        # (threads, share, 1)
    copies = x.reshape(1, rows, n).expand(threads, rows, n)
    if rows <= VERY_FEW_ROWS:
        y = _product(parts, copies.mT, offsets).mT                  # (threads, rows, share)
    else:
        y = _product(copies, parts.mT, None if bias is None else offsets.mT)                    # (threads, rows, share)
    y = y.transpose(0, 1).reshape(*x.shape[:-1], even)              # (..., even)
    if even == m:
        return y
    return torch.cat((y, F.linear(x, weight[even:], None if bias is None else bias[even:])), dim=-1)


def _product(a, b, offsets):
    return torch.bmm(a, b) if offsets is None else torch.baddbmm(offsets, a, b)


class Linear(nn.Linear):
    """Parameters as nn.Linear's."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


def unfilled(in_features, out_features, bias, like):
    """A Linear with the device and kind of numbers of the tensor `like`, for values that are copied into it: none are
    drawn, so that no random number comes out of turn."""
    return nn.utils.skip_init(Linear, in_features, out_features, bias=bias, device=like.device, dtype=like.dtype)


@torch.no_grad()
def filled(weight, bias, like):
    """A Linear with copies of weight (m, n) and bias (m), or None, with the device and kind of numbers of `like`."""
    layer = unfilled(weight.size(1), len(weight), bias is not None, like)
    layer.weight.copy_(weight.to(like.dtype))                       # first the type: MPS has no float64
    if bias is not None:
        layer.bias.copy_(bias)
    return layer

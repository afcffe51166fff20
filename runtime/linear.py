"""nn.Linear for decoding on a CPU."""

import torch
import torch.nn as nn
from torch.nn import functional as F

FEW_ROWS = 16                       # of x; beyond that a product is bound by arithmetic, not by reading the weights
LARGE = 2 ** 17                     # elements of a weight: below, splitting costs more than it saves


def linear(x, weight, bias=None):
    """F.linear(x, weight, bias): x (..., n), weight (m, n) -> (..., m). For a few rows of x the BLAS behind it reads
    the whole weight with one thread; here each thread takes its share of the weight's rows: 1.5 to 1.8 times faster on
    two cores, equal but for the order of sums. F.linear itself where gradients are recorded."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.device.type != 'cpu':
        return F.linear(x, weight, bias)
    (m, n), threads = weight.shape, torch.get_num_threads()
    rows = x.numel() // n
    if (rows > FEW_ROWS or weight.numel() < LARGE or threads == 1 or x.dtype != weight.dtype
            or not weight.is_contiguous() or torch.is_autocast_enabled('cpu')):
        return F.linear(x, weight, bias)
    share = m // threads
    even = share * threads
    parts = weight[:even].view(threads, share, n).mT                # (threads, n, share)
    copies = x.reshape(1, rows, n).expand(threads, rows, n)
    if bias is None:
        y = torch.bmm(copies, parts)                                # (threads, rows, share)
    else:
        y = torch.baddbmm(bias[:even].view(threads, 1, share), copies, parts)
    y = y.transpose(0, 1).reshape(*x.shape[:-1], even)              # (..., even)
    if even == m:
        return y
    return torch.cat((y, F.linear(x, weight[even:], None if bias is None else bias[even:])), dim=-1)


class Linear(nn.Linear):
    """Parameters as nn.Linear's."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)

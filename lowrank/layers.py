"""Linear layers in other forms: low-rank, with a LoRA adapter, or split into three.

Letters: m outputs, n inputs, r rank; in attention also B batch, T tokens, C model width, nh heads,
hs head size.
"""

import torch
import torch.nn as nn
from torch.nn import functional as F

from lowrank.spectrum import to_float64
from lowrank.svd import balanced_factors, truncated_svd

INITS = ('lora', 'pissa', 'milora')
# singular values below FLOOR sigma_1 are not split evenly between the factors, so that no row of A
# starts shorter than 1e-2 of the longest row; a random 1,000 x 1,000 matrix has no values below
# about 5e-4 sigma_1
FLOOR = 1e-4


class FactoredLinear(nn.Module):
    """Base class of layers with two nn.Linear factors, A (r, n) and B (m, r)."""

    def add_factors(self, in_features, out_features, rank, bias):
        self.A = nn.Linear(in_features, rank, bias=False)
        self.B = nn.Linear(rank, out_features, bias=bias)

    @property
    def rank(self) -> int | None:
        """r, or None if the layer has no factors."""
        return None if self.A is None else self.A.out_features

    @torch.no_grad()
    def set_factors(self, b, a):
        # dtype first, because MPS has no float64
        self.A.weight.copy_(a.to(self.A.weight.dtype))
        self.B.weight.copy_(b.to(self.B.weight.dtype))

    @torch.no_grad()
    def product(self):
        """Return B A (m, n), multiplied in float64 on the CPU."""
        return to_float64(self.B.weight) @ to_float64(self.A.weight)


class LowRankLinear(FactoredLinear):
    """Linear layer y = B (A x) + b, whose weight B A (m, n) has at most rank r.

    The bias b belongs to B. Apart from b, the layer has r (m + n) parameters instead of m n. It
    needs one multiplication per parameter and row of x.
    """

    def __init__(self, in_features, out_features, rank, bias=True):
        super().__init__()
        self.add_factors(in_features, out_features, rank, bias)

    def forward(self, x):                               # (..., n) -> (..., r) -> (..., m)
        return self.B(self.A(x))

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear, rank):
        """Return a layer in which B A is the best rank-r approximation of the weight of an
        nn.Linear (Eckart and Young 1936). From the truncated SVD U S V^T of the weight,
        A = sqrt(S) V^T and B = U sqrt(S). The bias is copied. A rank above min(m, n) counts as
        min(m, n). Raises ValueError for rank < 1 and torch.linalg.LinAlgError for weights that are
        not finite."""
        u, s, vh = truncated_svd(to_float64(linear.weight), rank, 'standard')
        return cls.from_factors(u * s.sqrt(), s.sqrt()[:, None] * vh, linear)

    @classmethod
    @torch.no_grad()
    def from_factors(cls, b, a, like):
        """Return a layer with the factors B = b (m, r) and A = a (r, n). Bias, dtype, device and
        requires_grad are those of the layer `like`."""
        layer = cls(a.size(1), len(b), len(a), like.bias is not None).to(like.weight)
        layer.set_factors(b, a)
        if like.bias is not None:
            layer.bias.copy_(like.bias)
        return layer.requires_grad_(like.weight.requires_grad)

    def merge(self) -> nn.Linear:
        """Return an nn.Linear with the weight B A, multiplied in float64."""
        return linear_from_tensors(self.product(), self.bias, self.A.weight)

    @property
    def weight(self):
        """B A (m, n), recomputed on each access."""
        return self.B.weight @ self.A.weight

    @property
    def bias(self):
        return self.B.bias


class AdaptedLinear(FactoredLinear):
    """Base class of layers that add a product to the weight W of a linear layer `base`. The weight
    becomes W + s B A, with s = `scale`. The bias is that of `base`. If A is None, there is no
    product."""

    scale = 1.0                                                     # s

    @property
    def weight(self):
        """W + s B A (m, n), recomputed on each access. Without factors, the parameter W itself."""
        W = self.base.weight
        return W if self.A is None else W + self.scale * self.B.weight @ self.A.weight

    @property
    def bias(self):
        return self.base.bias

    def merged_weight(self):
        """Return W + s B A (m, n), computed in float64 on the CPU."""
        W = to_float64(self.base.weight)
        return W if self.A is None else W + self.scale * self.product()

    def merge(self) -> nn.Linear:
        """Return an nn.Linear with the weight W + s B A."""
        return linear_from_tensors(self.merged_weight(), self.bias, self.base.weight)


class LoRALinear(AdaptedLinear):
    """Linear layer with an adapter: y = W x + b + s B A dropout(x) with s = alpha / r.

    Maps x (..., n) to y (..., m). W (m, n) and b (m) of the layer `base` are frozen. A (r, n) and
    B (m, r) are trained. LoRA (Hu et al., arXiv:2106.09685) starts from a random A and B = 0. PiSSA
    (Meng et al., arXiv:2404.02948) starts from the r largest singular components of the weight W_0
    of the wrapped layer. MiLoRA (Wang et al., arXiv:2406.09044) starts from the r smallest
    components of W_0. PiSSA and MiLoRA freeze the rest, W = W_0 - s B_0 A_0, where A_0 and B_0 are
    the first A and B.
    """

    def __init__(self, linear, rank, alpha, dropout=0.0, init='lora'):
        """Wrap an nn.Linear, which becomes `base`. Outputs do not change until the layer is
        trained. dropout: probability of dropping an input of the adapter in training. init: 'lora'
        draws A from torch's global generator. 'pissa' and 'milora' compute an SVD in float64 on the
        CPU, which raises torch.linalg.LinAlgError for weights that are not finite."""
        super().__init__()
        self.add_factors(linear.in_features, linear.out_features, rank, bias=False)
        nn.init.zeros_(self.B.weight)
        self.base, self.dropout, self.scale = linear, nn.Dropout(dropout), alpha / rank
        self.to(linear.weight).train(linear.training)
        linear.requires_grad_(False)
        if init != 'lora':
            W = to_float64(linear.weight)                           # W_0 (m, n)
            components = slice(rank) if init == 'pissa' else slice(-rank, None)
            self.set_factors(*svd_factors(W, components, self.scale))
            rest = W - self.scale * self.product()                  # of the rounded A and B
            linear.weight.copy_(rest.to(linear.weight.dtype))

    def forward(self, x):                                           # (..., n) -> (..., m)
        return self.base(x) + self.B(self.scale * self.A(self.dropout(x)))


def svd_factors(matrix, components, scale):
    """Return b (m, k) and a (k, n) such that scale b a is the sum of the chosen singular components
    of a float64 matrix (m, n). components: slice of the k components to choose, in descending
    order."""
    u, s, vh = truncated_svd(matrix, min(matrix.shape), 'standard')
    b, a = balanced_factors(u[:, components], s[components], vh[components], FLOOR * s[0])
    return b / scale ** 0.5, a / scale ** 0.5


def fuse(layers):
    """Stack p layers (m, n): return the weight (p m, n) and the bias (p m), or None."""
    weight, biases = torch.cat([layer.weight for layer in layers]), [layer.bias for layer in layers]
    return weight, None if biases[0] is None else torch.cat(biases)


class SplitProjection(nn.Module):
    """Projection to queries, keys and values of all heads by three layers, each of which can be
    replaced. The methods are those of the model's `QKVProjection`. The weights are copies of the
    weights of `fused`, a `QKVProjection`."""

    def __init__(self, fused):
        super().__init__()
        self.heads, self.rows, weight = fused.heads, fused.rows, fused.weight
        biases = [None] * 3 if fused.bias is None else fused.bias.split(self.rows)
        self.c_q, self.c_k, self.c_v = (                            # copies, so that fused is freed
            linear_from_tensors(w, b, weight) for w, b in zip(weight.split(self.rows), biases))

    def forward(self, x, weights=()):
        """See `QKVProjection.forward`."""
        # values first: in this order older versions summed the gradients of x
        parts = {name: F.linear(x, weights[name].flatten(0, 1), self.layer(name).bias)
                 if name in weights else self.layer(name)(x) for name in ('v', 'q', 'k')}
        return split_heads(self.heads, {name: parts[name] for name in self.heads})

    def project_for_cache(self, x, down_proj):
        """See `QKVProjection.project_for_cache`."""
        return split_heads(self.heads, {
            name: F.linear(x, down_proj[name]) if name in down_proj else self.layer(name)(x)
            for name in self.heads})

    @torch.no_grad()
    def init_mimetic(self):
        """Draw a dense W_k, and a dense W_q beside it, as `QKVProjection` does. If both are
        low-rank and of one shape, they get the same singular vectors and rows of root mean square
        norm 0.5, so equal ranks mean equal weights. Otherwise W_q and W_k keep their weights."""
        q, k = self.c_q, self.c_k
        if isinstance(k, nn.Linear):
            nn.init.orthogonal_(k.weight, gain=0.5)
            if isinstance(q, nn.Linear):
                group = self.heads['q'] // self.heads['k']
                q.weight.copy_(self.head_weight('k').repeat_interleave(group, dim=0).flatten(0, 1))
        elif isinstance(q, LowRankLinear) and q.weight.shape == k.weight.shape:
            small, large = sorted((q, k), key=lambda layer: layer.rank)
            init_weight(large, 0.5 / large.weight.size(1) ** 0.5)
            r, scale = small.rank, (large.rank / small.rank) ** 0.25        # keeps the norm of B A
            small.set_factors(scale * large.B.weight[:, :r], scale * large.A.weight[:r])

    def layer(self, name):
        """Return the layer that makes the queries 'q', keys 'k' or values 'v'."""
        return getattr(self, f'c_{name}')

    def head_weight(self, name):
        """See `QKVProjection.head_weight`."""
        return self.layer(name).weight.unflatten(0, (self.heads[name], -1))

    def head_bias(self, name):
        """See `QKVProjection.head_bias`."""
        return bias_per_head(self.heads[name], self.layer(name).bias)


def init_weight(layer, std):
    """Draw the weight of a linear layer from N(0, std). In a `LowRankLinear` all singular values of
    the product B A are equal, its root mean square is std, and both factors have the same singular
    values, so that steps of either factor change the product alike."""
    if isinstance(layer, LowRankLinear):
        gain = (std ** 2 * layer.B.out_features * layer.A.in_features / layer.rank) ** 0.25
        for factor in (layer.A, layer.B):
            nn.init.orthogonal_(factor.weight, gain)
    else:
        nn.init.normal_(layer.weight, std=std)


def split_heads(heads, parts):
    """Split the heads of queries, keys and values.

    heads: name -> number of heads. parts: name -> tensor (B, T, heads n). Returns a tuple of
    tensors (B, heads, T, n)."""
    return tuple(x.unflatten(2, (heads[name], -1)).transpose(1, 2) for name, x in parts.items())


def bias_per_head(heads, bias):
    """Split the bias of all heads: bias (heads n) -> (heads, 1, n). None gives None."""
    return None if bias is None else bias.view(heads, 1, -1)


def empty_linear(in_features, out_features, bias, like):
    """Return an uninitialized nn.Linear on the device and in the dtype of the tensor `like`,
    without drawing random numbers."""
    return nn.utils.skip_init(nn.Linear, in_features, out_features, bias=bias, device=like.device,
                              dtype=like.dtype)


@torch.no_grad()
def linear_from_tensors(weight, bias, like):
    """Return an nn.Linear with copies of weight (m, n) and bias (m). bias may be None. Device,
    dtype and requires_grad are those of the tensor `like`."""
    layer = empty_linear(weight.size(1), len(weight), bias is not None, like)
    layer.weight.copy_(weight.to(like.dtype))           # dtype first, because MPS has no float64
    if bias is not None:
        layer.bias.copy_(bias)
    return layer.requires_grad_(like.requires_grad)

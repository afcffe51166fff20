"""Key/value caches of an attention layer, and attention of new tokens to the cached ones.

`KeyValueCache` keeps keys and values. `LatentCache` keeps one latent per token, from which MLA
computes keys and values. Values are stored in full (`DenseValues`), as coordinates in one basis
(`FactoredValues`), or in one basis per span (`BlockCausalValues`). A span is a block of rows with
the same basis, or the rows before the first basis.

Letters: B batch, T tokens so far, N capacity in tokens, nh heads, hs head size, n values per row, C
model width, d latent size, k rank; "..." any batch dimensions. Memory is allocated once and written
in place, so there are no gradients. `nbytes` counts what is kept per token and per sequence, not
weights.
"""

import torch
from torch.nn import functional as F

from lowrank.svd import causal_starts


# --------------------------------------------------------------------------------------------------
# append-only values

class DenseValues:
    """Append-only rows of n values, stored in full."""

    # (nh k, C) maps x to cached coordinates; None: V itself is cached
    down_proj = None

    def __init__(self, shape, dtype, device):
        """shape: (..., N, n) for N tokens of n values."""
        self.data = torch.empty(shape, dtype=dtype, device=device)
        self.nbytes, self.capacity, self.length = self.data.nbytes, shape[-2], 0

    def append(self, x):
        """Add rows x (..., m, n), at most N in all."""
        end = self.length + x.shape[-2]
        self.data[..., self.length:end, :] = x
        self.length = end

    def all(self):
        """Return all rows (..., T, n)."""
        return self.data[..., :self.length, :]

    def weighted_sum(self, weights):
        """weights (..., 1, T) -> weighted sum of the rows (..., 1, n)."""
        return weights @ self.data[..., :self.length, :]            # all() of a subclass expands


class FactoredValues(DenseValues):
    """Append-only rows W c + b with a basis W (n, k). Only the k coordinates c of each row are
    stored.

    `append` takes coordinates. `weighted_sum` sums coordinates, then computes W c + b once. If
    there is a bias, the weights must therefore add up to 1.
    """

    def __init__(self, shape, basis, bias: torch.Tensor | None, down_proj: torch.Tensor | None,
                 dtype, device):
        """shape: (..., N, n) for N tokens of n values. basis: W (..., n, k). bias: b (..., 1, n) or
        None. down_proj: weight (nh k, C) that maps inputs of width C to the coordinates of all
        heads, or None."""
        super().__init__((*shape[:-1], basis.shape[-1]), dtype, device)
        self.basis, self.bias, self.down_proj = basis.to(dtype), bias, down_proj

    def all(self):
        return self._expand(super().all())

    def weighted_sum(self, weights):
        return self._expand(super().weighted_sum(weights))          # (..., 1, k) -> (..., 1, n)

    def _expand(self, coordinates):
        rows = coordinates @ self.basis.mT
        return rows if self.bias is None else rows + self.bias


class BlockCausalValues:
    """Append-only rows, truncated as by `svd.causal_low_rank_approximation`.

    The rows before the first span with a basis are stored in full. Rows of each span [s, 2s) are
    stored as k coordinates in the basis of the span. The basis is computed when the span begins,
    from the Gram matrix G of all rows before s. Coordinates do not determine G, so each new row is
    added to G. For float32 rows, G is summed in float64, because in float32 a basis would be off by
    up to 1e-3 (docs/RESULTS.md).
    """

    down_proj = None

    def __init__(self, shape, rank, block, eigensolver, dtype, device):
        """shape: (..., N, n) for N tokens of n values. eigensolver: function that maps
        G (..., n, n) to its leading eigenvectors (..., n, k)."""
        *batch, capacity, n = shape
        starts, kind = causal_starts(capacity, rank, block), dict(dtype=dtype, device=device)
        edges, self.eigensolver = [*starts, capacity], eigensolver
        self.bases = torch.empty(*batch, n, len(starts) * rank, **kind)     # W_k of each span
        self.spans = [DenseValues((*batch, edges[0], n), **kind), *(
            FactoredValues((*batch, b - a, n), basis, None, None, **kind)
            for a, b, basis in zip(edges, edges[1:], self.bases.split(rank, dim=-1)))]
        side = n if starts else 0
        self.gram = torch.zeros(*batch, side, side, dtype=gram_dtype(dtype, device), device=device)
        self.nbytes = sum(part.nbytes for part in (*self.spans, self.bases, self.gram))

    def append(self, x):
        """Add rows x (..., m, n), at most N in all. Raises torch.linalg.LinAlgError if a basis
        would come from rows that are not finite."""
        while x.shape[-2]:
            span = next(s for s in self.spans if s.length < s.capacity)
            room = span.capacity - span.length
            rows, x = x[..., :room, :], x[..., room:, :]
            if span is self.spans[0]:
                span.append(rows)
            else:
                if span.length == 0:
                    span.basis.copy_(self.eigensolver(self.gram))
                span.append(rows.to(span.basis.dtype) @ span.basis)             # (..., m, k)
            if span is not self.spans[-1]:              # for the bases of later spans
                rows = rows.to(self.gram.dtype)
                # autocast would round float32
                with torch.autocast(rows.device.type, enabled=False):
                    self.gram += rows.mT * rows if rows.shape[-2] == 1 else rows.mT @ rows

    def all(self):
        """Return all rows (..., T, n)."""
        return torch.cat([span.all() for span in self.spans], dim=-2)

    def weighted_sum(self, weights):
        """weights (..., 1, T) -> weighted sum of the rows (..., 1, n). The sums of all spans are
        expanded by one product."""
        parts = weights.split([span.length for span in self.spans if span.length], dim=-1)
        first, *sums = (part @ span.data[..., :span.length, :]
                        for part, span in zip(parts, self.spans))
        if not sums:
            return first
        sums = torch.cat(sums, dim=-1)                              # (..., 1, spans k)
        return first + sums @ self.bases[..., :sums.shape[-1]].mT


def gram_dtype(dtype, device):
    """Return the dtype of a Gram matrix: float64, or float32 for half precision and on MPS."""
    wide = dtype in (torch.float32, torch.float64) and torch.device(device).type != 'mps'
    return torch.float64 if wide else torch.float32


# --------------------------------------------------------------------------------------------------
# values of latents

class LatentValues:
    """Values U_v c + b, computed from cached latents c. Nothing is stored."""

    nbytes, down_proj = 0, None

    def __init__(self, w_v, bias):
        """w_v: U_v (nh, hs, d); bias: b (nh, 1, hs) or None."""
        self.w_v, self.bias = w_v, bias

    def all(self, c):
        """c (B, T, d) -> values (B, nh, T, hs)."""
        v = expand(self.w_v, c)
        return v if self.bias is None else v + self.bias

    def weighted_sum(self, weights, c):
        """weights (B, nh, T) of sum 1, c (B, T, d) -> weighted sum of values (B, nh, 1, hs)."""
        y = (weights @ c).transpose(0, 1) @ self.w_v.mT             # (nh, B, d) x (nh, d, hs)
        return (y if self.bias is None else y + self.bias).transpose(0, 1).unsqueeze(2)


class BlockCausalLatentValues(LatentValues):
    """Values of latents, truncated as by `svd.causal_low_rank_approximation`.

    The cache has the latents of all earlier tokens, so each basis is computed when its span begins.
    Only the bases are stored: k hs values per head and span.
    """

    def __init__(self, w_v, bias, shape, rank, block, eigensolver, dtype, device):
        """shape: (B, nh, N, hs). eigensolver: function that maps G (..., hs, hs) to the basis of a
        span (..., hs, k)."""
        super().__init__(w_v, bias)
        B, nh, capacity, hs = shape
        self.starts, self.eigensolver = causal_starts(capacity, rank, block), eigensolver
        self.bases = torch.empty(len(self.starts), B, nh, hs, rank, dtype=dtype, device=device)
        self.nbytes, self.made = self.bases.nbytes, 0               # number of bases computed

    def all(self, c):
        rows = super().all(c)
        for a, b, w in self._spans(c)[1:]:                          # c may be a batch of one
            rows[:, :, a:b] = rows[:, :, a:b] @ w[:len(c)] @ w[:len(c)].mT
        return rows

    def weighted_sum(self, weights, c):
        """Sum the latents of each span, expand each sum to values, then project the values."""
        total = 0
        for a, b, w in self._spans(c):
            part = weights[..., a:b]                                # (B, nh, b - a)
            y = super().weighted_sum(part, c[:, a:b])               # (B, nh, 1, hs)
            if self.bias is not None:   # the weights of a span add up to less than 1
                y = y + (part.sum(-1)[..., None, None] - 1) * self.bias
            total = total + (y if w is None else y @ w @ w.mT)
        return total

    def _spans(self, c):
        """Compute the basis of each span that has rows in c and no basis yet. Return (first row,
        last row + 1, W_k) per span of c (B, T, d). W_k comes from V^T V of the rows before the
        span. W_k is None for the first span, which has no basis."""
        for start in (start for start in self.starts[self.made:] if start < c.size(1)):
            v = super().all(c[:, :start])                           # (B, nh, start, hs)
            with torch.autocast(v.device.type, enabled=False):
                v = v.to(gram_dtype(v.dtype, v.device))
                self.bases[self.made] = self.eigensolver(v.mT @ v)
            self.made += 1
        edges = [0, *self.starts[:self.made], c.size(1)]
        return list(zip(edges, edges[1:], [None, *self.bases[:self.made]]))


# --------------------------------------------------------------------------------------------------
# caches

class KeyValueCache:
    """Keys and values of all heads of one attention layer."""

    def __init__(self, keys: DenseValues, values):
        """keys (B, nh, N, hs). values: DenseValues, FactoredValues or BlockCausalValues."""
        self.stored, self.values = keys, values
        self.nbytes = keys.nbytes + values.nbytes

    @property
    def length(self):
        return self.stored.length

    @torch.compiler.disable                                         # shapes change with each token
    def attend(self, q, k, v):
        """Add k and v of m new tokens, both (B, nh, m, hs), then attend to all tokens with queries
        q (B, nh, 1 or m, hs). If `values.down_proj` is set, v holds coordinates (B, nh, m, k)
        instead. Returns outputs in the shape of q. If k and v have batch size 1, they are added to
        every sequence of the cache."""
        self.stored.append(k)
        self.values.append(v)
        if k.size(2) == self.length:                                # a prompt: as in training
            v = self.values.all()[:len(k)]
            return F.scaled_dot_product_attention(q, k, v, is_causal=q.size(2) > 1)
        # (B, nh, T, hs) x (B, nh, hs, 1)
        scores = self.stored.all() @ (q * q.size(-1) ** -0.5).mT
        return self.values.weighted_sum(F.softmax(scores.mT, dim=-1))


class LatentCache(KeyValueCache):
    """One latent c of d values per token. Keys U_k c and values U_v c + b of all heads are computed
    from c (DeepSeek-V2, arXiv:2405.04434, section 2.1.2).

    The keys and values of a prompt are computed once. For a single query q, no key or value is
    computed, because U_k and U_v are absorbed. The scores are q^T U_k times the latents, and U_v is
    applied to the weighted sum of latents.
    """

    def __init__(self, latents: DenseValues, w_k, values: LatentValues):
        """latents: storage of shape (B, N, d). w_k: U_k (nh, hs, d)."""
        super().__init__(latents, values)
        self.w_k = w_k

    @torch.compiler.disable
    def attend(self, q, c):
        """Add latents c (B, m, d) of m new tokens, then attend as `KeyValueCache.attend` does."""
        self.stored.append(c)
        if c.size(1) == self.length:                                # a prompt: as in training
            k, v = expand(self.w_k, c), self.values.all(c)          # (B, nh, T, hs)
            return F.scaled_dot_product_attention(q, k, v, is_causal=q.size(2) > 1)
        c = self.stored.all()                                       # (B, T, d)
        # absorb U_k: (nh, B, hs) x (nh, hs, d)
        q = (q * q.size(-1) ** -0.5).squeeze(2).transpose(0, 1) @ self.w_k
        scores = q.transpose(0, 1) @ c.mT                           # (B, nh, d) x (B, d, T)
        return self.values.weighted_sum(F.softmax(scores, dim=-1), c)


def expand(weight, c):
    """Compute keys or values of latents c (B, T, d) with weight (nh, hs, d) -> (B, nh, T, hs)."""
    return F.linear(c, weight.flatten(0, 1)).unflatten(2, weight.shape[:2]).transpose(1, 2)


def validate_positions(cache: list[KeyValueCache] | None, idx, block_size) -> int:
    """Return the position of the first token of idx (B, T). This is the number of tokens in the
    cache, or 0 without a cache. Raises ValueError if the tokens exceed block_size or the capacity
    of the cache, and if several tokens are added to a cache that is not empty."""
    T, start = idx.size(1), cache[0].length if cache else 0
    most = min(block_size, cache[0].stored.capacity) if cache else block_size
    if not 1 <= T <= most - start:
        raise ValueError(f'cannot forward {start + T} tokens: must be 1 to {most}, with '
                         f'block_size={block_size}')
    if start and T > 1:
        raise ValueError(f'cannot add {T} tokens to a cache that is not empty: must be 1')
    return start

"""Key/value caches of an attention layer, and attention: of all tokens, and of new tokens to the
cached ones.

`KeyValueCache` keeps keys and values. `LatentCache` keeps one latent per token, from which MLA
computes keys and values. Keys and values are rows of a matrix per head. Rows are stored in full
(`DenseValues`), as coordinates in one basis (`FactoredValues`), or in one basis per span
(`BlockCausalValues`). A span is a block of rows with the same basis, or the rows before the first
basis.

Letters: B batch, T tokens so far, N capacity in tokens, nh heads, nkv key/value heads, g queries
per key/value head, hs head size, n values per row, C model width, d latent size, k rank; "..." any
batch dimensions. Memory is allocated once and written in place, so there are no gradients. `nbytes`
counts what is kept per token and per sequence, not weights.
"""

from bisect import bisect

import torch
from torch.nn import functional as F

from lowrank.svd import causal_starts


# --------------------------------------------------------------------------------------------------
# append-only rows

class DenseValues:
    """Append-only rows of n values, stored in full. The rows are the keys or the values of a
    head."""

    # (heads k, C) maps x to cached coordinates; None: the rows themselves are cached
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

    def scores(self, q):
        """q (..., g, n) -> products with all rows (..., g, T)."""
        return (self.data[..., :self.length, :] @ q.mT).mT          # all() of a subclass expands

    def weighted_sum(self, weights):
        """weights (..., g, T) -> weighted sums of the rows (..., g, n)."""
        return weights @ self.data[..., :self.length, :]


class FactoredValues(DenseValues):
    """Append-only rows W c + b with a basis W (n, k). Only the k coordinates c of each row are
    stored.

    `append` takes coordinates. `scores` multiplies W into the queries and leaves out b, which adds
    the same number to all scores of a query, so that softmax cancels it. `weighted_sum` sums
    coordinates, then computes W c + b once. If there is a bias, the weights must therefore add up
    to 1.
    """

    def __init__(self, shape, basis, bias: torch.Tensor | None, down_proj: torch.Tensor | None,
                 dtype, device):
        """shape: (..., N, n) for N tokens of n values. basis: W (..., n, k). bias: b (..., 1, n) or
        None. down_proj: weight (heads k, C) that maps inputs of width C to the coordinates of all
        heads, or None."""
        super().__init__((*shape[:-1], basis.shape[-1]), dtype, device)
        self.expand, self.down_proj = FactoredQueries(basis.to(dtype), bias, down_proj), down_proj

    def all(self):
        return self.expand(super().all())

    def scores(self, q):
        return super().scores(q @ self.expand.basis)                # (..., g, n) -> (..., g, k)

    def weighted_sum(self, weights):
        return self.expand(super().weighted_sum(weights))           # (..., g, k) -> (..., g, n)


class BlockCausalBases:
    """Bases of rows that arrive one after another, as in `svd.causal_low_rank_approximation`.

    The rows before the first span have no basis. The basis of each span [s, 2s) is computed when
    the span begins, from the Gram matrix G of all rows before s. Coordinates do not determine G, so
    each new row is added to G. For float32 rows, G is summed in float64, because in float32 a basis
    would be off by up to 1e-3 (docs/RESULTS.md).
    """

    down_proj = None

    def __init__(self, shape, rank, block, eigensolver, dtype, device):
        """shape: (..., N, n) for N tokens of n values. eigensolver: function that maps
        G (..., n, n) to its leading eigenvectors (..., n, k)."""
        *batch, capacity, n = shape
        starts, kind = causal_starts(capacity, rank, block), dict(dtype=dtype, device=device)
        self.edges, self.eigensolver, self.length = [0, *starts, capacity], eigensolver, 0
        self.packed = torch.empty(*batch, n, len(starts) * rank, **kind)
        self.bases = self.packed.split(rank, dim=-1) if starts else ()          # W_k of each span
        side = n if starts else 0
        self.gram = torch.zeros(*batch, side, side, dtype=gram_dtype(dtype, device), device=device)
        self.nbytes = self.packed.nbytes + self.gram.nbytes

    def project(self, x):
        """Add rows x (..., m, n), at most N in all. Yield pairs of a span and the rows in it: the
        rows themselves for span 0, which has no basis, or their coordinates (..., m', k). Raises
        torch.linalg.LinAlgError if a basis would come from rows that are not finite."""
        while x.shape[-2]:
            span = bisect(self.edges, self.length) - 1
            room = self.edges[span + 1] - self.length
            rows, x = x[..., :room, :], x[..., room:, :]
            if span:
                basis = self.bases[span - 1]
                if self.length == self.edges[span]:
                    basis.copy_(self.eigensolver(self.gram))
            yield span, rows.to(basis.dtype) @ basis if span else rows
            self.length += rows.shape[-2]
            if span < len(self.bases):                  # for the bases of later spans
                rows = rows.to(self.gram.dtype)
                # autocast would round float32
                with torch.autocast(rows.device.type, enabled=False):
                    self.gram += rows.mT * rows if rows.shape[-2] == 1 else rows.mT @ rows


class BlockCausalValues(BlockCausalBases):
    """Append-only rows, truncated as by `svd.causal_low_rank_approximation`. The rows before the
    first span with a basis are stored in full. Rows of later spans are stored as k coordinates in
    the basis of the span."""

    def __init__(self, shape, rank, block, eigensolver, dtype, device):
        super().__init__(shape, rank, block, eigensolver, dtype, device)
        (*batch, self.capacity, n), kind = shape, dict(dtype=dtype, device=device)
        sizes = [b - a for a, b in zip(self.edges, self.edges[1:])]
        self.spans = [DenseValues((*batch, sizes[0], n), **kind), *(
            FactoredValues((*batch, size, n), basis, None, None, **kind)
            for size, basis in zip(sizes[1:], self.bases))]
        self.nbytes += sum(span.nbytes for span in self.spans)

    def append(self, x):
        """Add rows x (..., m, n), at most N in all. Raises torch.linalg.LinAlgError if a basis
        would come from rows that are not finite."""
        for span, rows in self.project(x):
            self.spans[span].append(rows)

    def all(self):
        """Return all rows (..., T, n)."""
        return torch.cat([span.all() for span in self.spans], dim=-2)

    def scores(self, q):
        """q (..., g, n) -> products with all rows (..., g, T)."""
        return torch.cat([span.scores(q) for span in self.spans if span.length], dim=-1)

    def weighted_sum(self, weights):
        """weights (..., g, T) -> weighted sums of the rows (..., g, n). The sums of all spans are
        expanded by one product."""
        parts = weights.split([span.length for span in self.spans if span.length], dim=-1)
        first, *sums = (part @ span.data[..., :span.length, :]
                        for part, span in zip(parts, self.spans))
        if not sums:
            return first
        sums = torch.cat(sums, dim=-1)                              # (..., g, spans k)
        return first + sums @ self.packed[..., :sums.shape[-1]].mT


def gram_dtype(dtype, device):
    """Return the dtype of a Gram matrix: float64, or float32 for half precision and on MPS."""
    wide = dtype in (torch.float32, torch.float64) and torch.device(device).type != 'mps'
    return torch.float64 if wide else torch.float32


# --------------------------------------------------------------------------------------------------
# queries of new tokens, which are not stored

class Queries:
    """Unchanged queries."""

    down_proj, nbytes = None, 0                                     # as in DenseValues

    def __call__(self, q):
        """Queries of new tokens (B, nh, m, hs), or their coordinates (B, nh, m, k) if down_proj is
        set -> queries (B, nh, m, hs)."""
        return q


class FactoredQueries(Queries):
    """Queries W c + b, from coordinates c. The arguments are those of FactoredValues."""

    def __init__(self, basis, bias, down_proj):
        self.basis, self.bias, self.down_proj = basis, bias, down_proj

    def __call__(self, q):
        rows = q @ self.basis.mT
        return rows if self.bias is None else rows + self.bias


class BlockCausalQueries(BlockCausalBases):
    """Queries, truncated as by `svd.causal_low_rank_approximation`. Only the bases are stored, and
    the Gram matrix that the next basis comes from."""

    @torch.compiler.disable                                         # shapes change with each token
    def __call__(self, q):
        # q may be a batch of one, but there is a basis for each sequence of the cache
        rows = [(x @ self.bases[span - 1].mT)[:len(q)] if span else x
                for span, x in self.project(q)]
        return torch.cat(rows, dim=-2)


# --------------------------------------------------------------------------------------------------
# keys and values of latents

class LatentValues:
    """Rows U c + b, computed from cached latents c. Nothing is stored. The rows are keys, with
    U = U_k and no bias, or values, with U = U_v."""

    nbytes, down_proj = 0, None

    def __init__(self, weight, bias):
        """weight: U (nh, hs, d); bias: b (nh, 1, hs) or None."""
        self.weight, self.bias = weight, bias

    def all(self, c):
        """c (B, T, d) -> rows (B, nh, T, hs)."""
        rows = expand(self.weight, c)
        return rows if self.bias is None else rows + self.bias

    def scores(self, q, c):
        """q (B, nh, 1, hs), c (B, T, d) -> products with all rows (B, nh, T). U is absorbed: it is
        multiplied into the queries. Rows must have no bias."""
        q = q.squeeze(2).transpose(0, 1) @ self.weight              # (nh, B, hs) x (nh, hs, d)
        return q.transpose(0, 1) @ c.mT                             # (B, nh, d) x (B, d, T)

    def weighted_sum(self, weights, c):
        """weights (B, nh, T) of sum 1, c (B, T, d) -> weighted sum of rows (B, nh, 1, hs)."""
        y = (weights @ c).transpose(0, 1) @ self.weight.mT          # (nh, B, d) x (nh, d, hs)
        return (y if self.bias is None else y + self.bias).transpose(0, 1).unsqueeze(2)


class BlockCausalLatentValues(LatentValues):
    """Rows of latents, truncated as by `svd.causal_low_rank_approximation`.

    The cache has the latents of all earlier tokens, so each basis is computed when its span begins.
    Only the bases are stored: k hs values per head and span.
    """

    def __init__(self, weight, bias, shape, rank, block, eigensolver, dtype, device):
        """shape: (B, nh, N, hs). eigensolver: function that maps G (..., hs, hs) to the basis of a
        span (..., hs, k)."""
        super().__init__(weight, bias)
        B, nh, capacity, hs = shape
        self.starts, self.eigensolver = causal_starts(capacity, rank, block), eigensolver
        self.bases = torch.empty(len(self.starts), B, nh, hs, rank, dtype=dtype, device=device)
        self.nbytes, self.made = self.bases.nbytes, 0               # number of bases computed

    def all(self, c):
        rows = super().all(c)
        for a, b, w in self._spans(c)[1:]:                          # c may be a batch of one
            rows[:, :, a:b] = rows[:, :, a:b] @ w[:len(c)] @ w[:len(c)].mT
        return rows

    def scores(self, q, c):
        """Project the queries instead of the rows, once for each span."""
        return torch.cat([super(BlockCausalLatentValues, self).scores(
            q if w is None else q @ w @ w.mT, c[:, a:b]) for a, b, w in self._spans(c)], dim=-1)

    def weighted_sum(self, weights, c):
        """Sum the latents of each span, expand each sum to rows, then project the rows."""
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
        last row + 1, W_k) per span of c (B, T, d). W_k comes from the rows before the span. W_k is
        None for the first span, which has no basis."""
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
    """Keys and values of all key/value heads of one attention layer, and the queries of new tokens.

    Each key/value head serves g = nh / nkv query heads (grouped-query attention).
    """

    def __init__(self, keys, values, queries, scale):
        """keys (B, nkv, N, hs), values: DenseValues, FactoredValues or BlockCausalValues. queries:
        one of the classes of queries. scale: factor of the scores."""
        self.keys, self.values, self.queries, self.scale = keys, values, queries, scale
        self.stored = keys                                          # has a row per token
        self.nbytes = sum(part.nbytes for part in (keys, values, queries))

    @property
    def length(self):
        return self.stored.length

    @property
    def capacity(self):
        return self.stored.capacity

    @property
    def down_proj(self):
        """Target 'q', 'k' or 'v' -> weight (heads k, C) that maps x to coordinates, where those
        take the place of queries, keys or values."""
        parts = dict(q=self.queries, k=self.keys, v=self.values)
        return {name: part.down_proj for name, part in parts.items() if part.down_proj is not None}

    @torch.compiler.disable                                         # shapes change with each token
    def attend(self, q, k, v):
        """Add k and v of m new tokens, both (B, nkv, m, hs), then attend to all tokens with queries
        q (B, nh, 1 or m, hs). If `down_proj` names 'k' or 'v', k or v holds coordinates
        (B, nkv, m, k) instead. Returns outputs (B, nh, 1 or m, hs). If k and v have batch size 1,
        they are added to every sequence of the cache."""
        self.keys.append(k)
        self.values.append(v)
        if k.size(2) == self.length:                                # a prompt: as in training
            k, v = (part.all()[:len(k)] for part in (self.keys, self.values))
            return attention(q, k, v, self.scale, is_causal=q.size(2) > 1)
        q = (q * self.scale).reshape(len(q), k.size(1), -1, q.size(3))          # (B, nkv, g, hs)
        y = self.values.weighted_sum(F.softmax(self.keys.scores(q), dim=-1))    # (B, nkv, g, hs)
        return y.flatten(1, 2).unsqueeze(2)


class LatentCache(KeyValueCache):
    """One latent c of d values per token. Keys U_k c and values U_v c + b of all heads are computed
    from c (DeepSeek-V2, arXiv:2405.04434, section 2.1.2).

    The keys and values of a prompt are computed once. For a single query q, no key or value is
    computed, because U_k and U_v are absorbed. The scores are q^T U_k times the latents, and U_v is
    applied to the weighted sum of latents.
    """

    def __init__(self, latents: DenseValues, keys: LatentValues, values: LatentValues, queries,
                 scale):
        """latents: storage of shape (B, N, d)."""
        super().__init__(keys, values, queries, scale)
        self.stored, self.nbytes = latents, self.nbytes + latents.nbytes

    @torch.compiler.disable
    def attend(self, q, c):
        """Add latents c (B, m, d) of m new tokens, then attend as `KeyValueCache.attend` does."""
        self.stored.append(c)
        if c.size(1) == self.length:                                # a prompt: as in training
            k, v = self.keys.all(c), self.values.all(c)             # (B, nh, T, hs)
            return attention(q, k, v, self.scale, is_causal=q.size(2) > 1)
        c = self.stored.all()                                       # (B, T, d)
        scores = self.keys.scores(q * self.scale, c)                # (B, nh, T)
        return self.values.weighted_sum(F.softmax(scores, dim=-1), c)


def expand(weight, c):
    """Compute keys or values of latents c (B, T, d) with weight (nh, hs, d) -> (B, nh, T, hs)."""
    return F.linear(c, weight.flatten(0, 1)).unflatten(2, weight.shape[:2]).transpose(1, 2)


def attention(q, k, v, scale, dropout=0.0, is_causal=True):
    """Attention of queries q (B, nh, T or 1, p) to keys k (B, nkv, T, p) and values v
    (B, nkv, T, n) -> (B, nh, T or 1, n)."""
    n, width = v.size(3), max(k.size(3), v.size(3))
    # torch's fast kernels need p = n: without zeros a CPU takes 4 times as long
    q, k, v = (t if t.size(3) == width else F.pad(t, (0, width - t.size(3))) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=is_causal,
                                          scale=scale, enable_gqa=q.size(1) > k.size(1))[..., :n]


def validate_positions(cache: list[KeyValueCache] | None, idx, block_size) -> int:
    """Return the position of the first token of idx (B, T). This is the number of tokens in the
    cache, or 0 without a cache. Raises ValueError if the tokens exceed block_size or the capacity
    of the cache, and if several tokens are added to a cache that is not empty."""
    T, start = idx.size(1), cache[0].length if cache else 0
    most = min(block_size, cache[0].capacity) if cache else block_size
    if not 1 <= T <= most - start:
        raise ValueError(f'cannot forward {start + T} tokens: must be 1 to {most}, with '
                         f'block_size={block_size}')
    if start and T > 1:
        raise ValueError(f'cannot add {T} tokens to a cache that is not empty: must be 1')
    return start

"""What one attention layer keeps of the tokens so far, and attention from the newest of them: keys and values
(`KeyValueCache`), or one latent that both are made of (`LatentCache`).

Letters: B batch, T tokens so far, nh heads, hs head size, d latent. No gradients: rows are written in place.
"""

import torch
from torch.nn import functional as F

from lowrank.rows import CausalRows, LowRankRows, Rows, gram_dtype
from lowrank.svd import causal_starts


class KeyValueCache:
    """Keys and values of every head, the values in the form that lowrank/rows.py has for the scope of their SVD."""

    def __init__(self, shape, bias, factors, causal, dtype, device):
        """shape (B, nh, N, hs), room for N tokens; bias (nh hs) or None: of the values. factors: 'weight' scope, A
        (nh, hs, k) and B (nh, k, C) of W_v; causal: 'causal' scope, rank, block and leading of `CausalRows`."""
        kind, self.to_coordinates = dict(dtype=dtype, device=device), None
        self.keys = Rows(shape, **kind)
        if factors:                                                 # B x is kept, A expands it
            basis, b = factors
            # (nh k, C), what makes a token's coordinates; a weight, not counted here
            self.to_coordinates = b.flatten(0, 1)
            offset = None if bias is None else bias.view(shape[1], 1, -1)                       # (nh, 1, hs)
            self.values = LowRankRows((*shape[:3], basis.size(2)), basis, offset, **kind)
        else:
            self.values = CausalRows(shape, *causal, **kind) if causal else Rows(shape, **kind)

    @property
    def length(self):
        return self.keys.length

    @property
    def batch(self):
        return self.keys.batch

    @property
    def nbytes(self):
        return self.keys.nbytes + self.values.nbytes

    def clear(self):
        self.keys.clear()
        self.values.clear()

    @torch.compiler.disable                                         # shapes change every token, spans now and then
    def attend(self, q, k, v):
        """Add k and v of new tokens, and attend from the last tokens, those of q: -> like q, (B, nh, .., hs). A batch
        of one joins every sequence of the cache."""
        self.keys.append(k)
        self.values.append(v)
        if k.size(2) == self.length:                                # a prompt: expanded once, attended as in training
            v = self.values.all()[:len(k)]
            return F.scaled_dot_product_attention(q, k, v, is_causal=q.size(2) > 1)
        scores = self.keys.all() @ (q * q.size(-1) ** -0.5).mT      # (B, nh, T, hs) x (B, nh, hs, 1)
        return self.values.weighted_sum(F.softmax(scores.mT, dim=-1))


class LatentCache:
    """One latent c a token for keys and values of all heads, k = U_k c, v = U_v c + b (DeepSeek-V2, arXiv:2405.04434,
    section 2.1.2): d numbers a token. A prompt is expanded, once; a single query is absorbed: q^T U_k c needs no key,
    and U_v sum_j a_j c_j no value."""

    def __init__(self, shape, w_k, w_v, bias, causal, dtype, device):
        """shape (B, nh, N, hs), room for N tokens. Weights, not counted here: w_k and w_v (nh, hs, d), U_k and U_v, the
        second as it acts; bias (nh hs) or None: b. causal as for `KeyValueCache`."""
        (B, nh, room, hs), kind = shape, dict(dtype=dtype, device=device)
        self.latents, self.w_k = Rows((B, room, w_k.size(2)), **kind), w_k
        offset = None if bias is None else bias.view(nh, 1, hs)
        self.values = CausalValues(w_v, offset, shape, *causal, **kind) if causal else ExpandedValues(w_v, offset)

    @property
    def length(self):
        return self.latents.length

    @property
    def batch(self):
        return self.latents.batch

    @property
    def nbytes(self):
        return self.latents.nbytes + self.values.nbytes

    def clear(self):
        self.latents.clear()
        self.values.clear()

    @torch.compiler.disable
    def attend(self, q, c):
        """Add c (B, .., d) of new tokens, and attend from the last tokens, those of q: -> like q, (B, nh, .., hs). A
        batch of one joins every sequence of the cache."""
        self.latents.append(c)
        if c.size(1) == self.length:                                # a prompt: expanded once, attended as in training
            k = expand(self.w_k, c)                                 # (B, nh, T, hs)
            v = self.values.all(c)                                  # (B, nh, T, hs)
            return F.scaled_dot_product_attention(q, k, v, is_causal=q.size(2) > 1)
        c = self.latents.all()                                      # (B, T, d)
        return self.values.weighted_sum(F.softmax(absorbed_scores(q, self.w_k, c), dim=-1), c)


def expand(weight, c):
    """Keys or values of every head of latents: weight (nh, hs, d), c (B, T, d) -> (B, nh, T, hs)."""
    return F.linear(c, weight.flatten(0, 1)).unflatten(2, weight.shape[:2]).transpose(1, 2)


def absorbed_scores(q, w_k, c):
    """q (B, nh, 1, hs) against the keys of latents c (B, T, d), which are not made -> (B, nh, T)."""
    q = (q * q.size(-1) ** -0.5).squeeze(2).transpose(0, 1) @ w_k   # (nh, B, hs) x (nh, hs, d)
    return q.transpose(0, 1) @ c.mT                                 # (B, nh, d) x (B, d, T)


class ExpandedValues:
    """Values U_v c + b of latents, nothing kept of them."""

    nbytes = 0

    def __init__(self, w_v, offset):
        """w_v (nh, hs, d); offset b (nh, 1, hs) or None."""
        self.w_v, self.offset = w_v, offset

    def clear(self):
        pass

    def all(self, c):
        """c (B, T, d) -> (B, nh, T, hs)."""
        v = expand(self.w_v, c)
        return v if self.offset is None else v + self.offset

    def weighted_sum(self, weights, c):
        """weights (B, nh, T) that add up to 1, c (B, T, d) -> (B, nh, 1, hs)."""
        y = self._up(weights @ c)                                   # (B, nh, T) x (B, T, d)
        return (y if self.offset is None else y + self.offset).transpose(0, 1).unsqueeze(2)

    def _up(self, sums):
        """Sums of latents (B, nh, d) -> (nh, B, hs)."""
        return sums.transpose(0, 1) @ self.w_v.mT                   # (nh, B, d) x (nh, d, hs)


class CausalValues(ExpandedValues):
    """The values as `svd.causal_low_rank_approximation` cuts them: those of a span [s, 2s) are projected on a basis
    made of all before s. As the latents of these are there, each basis is made when its span begins, and only the bases
    are kept, k hs numbers each."""

    def __init__(self, w_v, offset, shape, rank, block, leading, dtype, device):
        """shape: (B, nh, N, hs) with room for N tokens; rank, block and leading as for `rows.CausalRows`."""
        super().__init__(w_v, offset)
        B, nh, room, hs = shape
        self.starts, self.leading = causal_starts(room, rank, block), leading
        self.bases = torch.empty(len(self.starts), B, nh, hs, rank, dtype=dtype, device=device)
        self.nbytes, self.known = self.bases.nbytes, 0              # bases made so far

    def clear(self):
        self.known = 0

    def all(self, c):
        """c (B, T, d) -> (B, nh, T, hs), cut."""
        self._make_bases(c)
        v, bases = super().all(c), self.bases[:, :len(c)]           # a batch of one has the bases of the first
        return torch.cat([part if i == 0 else part @ bases[i - 1] @ bases[i - 1].mT
                          for i, part in enumerate(v.split(self._lengths(c.size(1)), dim=2))], dim=2)

    def weighted_sum(self, weights, c):
        """The sum of every span is taken of latents, expanded, then projected."""
        self._make_bases(c)
        lengths, total = self._lengths(c.size(1)), 0
        for i, (w, part) in enumerate(zip(weights.split(lengths, dim=2), c.split(lengths, dim=1))):
            y = self._up(w @ part)                                  # (nh, B, hs)
            if self.offset is not None:
                y = y + w.sum(-1).T.unsqueeze(-1) * self.offset     # (nh, B, 1) x (nh, 1, hs)
            y = y.transpose(0, 1).unsqueeze(2)                      # (B, nh, 1, hs)
            total = total + (y if i == 0 else y @ self.bases[i - 1] @ self.bases[i - 1].mT)
        return total

    def _lengths(self, tokens):
        """Of the spans that `tokens` tokens fill, the last in part; the first has no basis."""
        edges = [0, *(start for start in self.starts if start < tokens), tokens]
        return [stop - start for start, stop in zip(edges, edges[1:])]

    def _make_bases(self, c):
        """Those that c (B, T, d) makes due, of V^T V."""
        for start in self.starts[self.known:]:
            if start >= c.size(1):
                break
            v = super().all(c[:, :start])                           # (B, nh, start, hs)
            with torch.autocast(v.device.type, enabled=False):
                v = v.to(gram_dtype(v.dtype, v.device))
                self.bases[self.known] = self.leading(v.mT @ v)
            self.known += 1


def check_room(cache, idx, block_size):
    """The number of tokens in the layers' caches, 0 without: where idx (B, T) starts. Raises ValueError where that does
    not fit: a prompt comes first, then one token at a time, block_size in all."""
    T, start = idx.size(1), cache[0].length if cache else 0
    if not 1 <= T <= block_size - start:
        raise ValueError(f'cannot forward {start + T} tokens: valid are 1 to block_size={block_size}')
    if start and T > 1:
        raise ValueError(f'cannot add {T} tokens to a cache that holds some: valid is 1')
    if cache and len(idx) not in (1, cache[0].batch):
        raise ValueError(f'cannot add {len(idx)} sequences to a cache of {cache[0].batch}')
    return start

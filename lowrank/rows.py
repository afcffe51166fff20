"""Matrices that grow by rows and are only read through weighted sums of all their rows, which is what attention does
with V: kept in full (`Rows`), or in as few numbers as their rank allows (`LowRankRows`, `CausalRows`).

Letters: "..." any batch dimensions, N rows there is room for, T rows there are, n columns, k rank. Room is allocated
once; `nbytes` is what the rows take in it. No gradients: rows are written in place.
"""

from collections import namedtuple

import torch

from lowrank.svd import causal_starts

Span = namedtuple('Span', 'start stop kept basis')                  # of `CausalRows`: rows [start, stop)


def _check_room(length, more, room):
    if length + more > room:
        raise ValueError(f'no room for {more} more rows: {length} of {room} are taken')


def gram_dtype(dtype, device):
    """Of a Gram matrix of rows: float64; float32 for half precision and on MPS, which has no float64."""
    wide = dtype in (torch.float32, torch.float64) and torch.device(device).type != 'mps'
    return torch.float64 if wide else torch.float32


class Rows:
    """Kept as they are: N n numbers."""

    def __init__(self, shape, dtype, device):
        """shape: (..., N, n)."""
        self.kept = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0                                             # T

    @property
    def nbytes(self):
        return self.kept.nbytes

    @property
    def batch(self):
        return len(self.kept)

    def append(self, x):
        """x (..., m, n): m more rows. Raises ValueError where there is no room for them."""
        _check_room(self.length, x.shape[-2], self.kept.shape[-2])
        self.kept[..., self.length:self.length + x.shape[-2], :] = x
        self.length += x.shape[-2]

    def clear(self):
        self.length = 0

    def all(self):
        """-> (..., T, n)."""
        return self.kept[..., :self.length, :]

    def weighted_sum(self, weights):
        """weights (..., 1, T) -> (..., 1, n)."""
        return weights @ self.all()


class LowRankRows(Rows):
    """Rows c A^T + b whose coordinates c come in: N k numbers. A (..., n, k) and b (..., 1, n) or None are weights of
    the model and count elsewhere. The sum is taken of coordinates and expanded once; its weights must add up to 1."""

    def __init__(self, shape, basis, offset, dtype, device):
        """shape: (..., N, k); basis A; offset b."""
        super().__init__(shape, dtype, device)
        self.basis, self.offset = basis, offset

    def all(self):
        return self._expand(super().all())

    def weighted_sum(self, weights):
        return self._expand(weights @ super().all())                # (..., 1, k) -> (..., 1, n)

    def _expand(self, c):
        x = c @ self.basis.mT
        return x if self.offset is None else x + self.offset


class CausalRows:
    """What `svd.causal_low_rank_approximation` makes of the rows, row by row. The first rows, which it leaves as they
    are, are kept in full, the others as k coordinates, each span [s, 2s) with a basis of its own, k n numbers, made of
    the Gram matrix G of all rows before s. G cannot be had from what is kept, so it is summed on the way, half of it in
    float64: in float32 a basis would be off by up to 1e-3 (docs/RESULTS.md, section 4). For rows in half precision,
    which are further off themselves, and on MPS, which has no float64, G is float32, and rows should be neither above
    1e15 nor all below 1e-15 (float64 rows: 1e150, 1e-150).

    A basis is what `leading(G)` says, (..., n, k), a svd.leading_eigenvectors of that rank.
    """

    def __init__(self, shape, rank, block, leading, dtype, device):
        """shape: (..., N, n); rank and block as in `causal_low_rank_approximation`."""
        *batch, room, n = shape
        self.starts = causal_starts(room, rank, block)
        edges = [*self.starts, room]
        first, count = edges[0], len(self.starts)
        full = torch.empty(*batch, first, n, dtype=dtype, device=device)
        coordinates = torch.empty(*batch, room - first, rank, dtype=dtype, device=device)
        self.bases = torch.empty(*batch, count * rank, n, dtype=dtype, device=device)           # W_k^T, stacked
        # spans[0] are the first rows, in full; kept: the rows of each in turn, basis: views of self.bases
        self.spans = [Span(0, first, full, None)]
        for i, (start, stop) in enumerate(zip(edges, edges[1:])):
            self.spans.append(Span(start, stop, coordinates[..., start - first:stop - first, :],
                                   self.bases[..., i * rank:(i + 1) * rank, :]))
        self.rank, self.leading, self.length = rank, leading, 0
        # G_ij = G_ji once each, by diagonals that wrap around: gram[d, i] = G[i, (i + d) mod n], d = 0 ... n / 2. A
        # new row is then added by one multiplication of it with views of itself, 8 times faster than via a triangle
        self.gram = torch.zeros(*batch, n // 2 + 1 if count else 0, n, dtype=gram_dtype(dtype, device), device=device)
        self.nbytes = sum(t.nbytes for t in (full, coordinates, self.bases, self.gram))

    def append(self, x):
        """x (..., m, n): m more rows. Raises ValueError where there is no room for them, and torch.linalg.LinAlgError
        where a basis would come from non-finite rows."""
        _check_room(self.length, x.shape[-2], self.spans[-1].stop)
        while x.shape[-2]:
            span = self.spans[self._span_of(self.length)]
            m = min(span.stop - self.length, x.shape[-2])
            rows, x = x[..., :m, :], x[..., m:, :]
            if span.basis is None:
                kept = rows
            else:
                if self.length == span.start:
                    span.basis.copy_(self.leading(self._gram_matrix()).mT)
                kept = rows.to(self.bases.dtype) @ span.basis.mT    # (..., m, k)
            span.kept[..., self.length - span.start:self.length - span.start + m, :] = kept
            if span is not self.spans[-1]:                          # a later span needs G of these rows
                self._add_to_gram(rows.to(self.gram.dtype))
            self.length += m

    def clear(self):
        self.length = 0
        self.gram.zero_()

    def all(self):
        """The rows as projected: (..., T, n)."""
        return torch.cat([kept if span.basis is None else kept @ span.basis for span, kept in self._filled()], dim=-2)

    def weighted_sum(self, weights):
        """weights (..., 1, T) -> (..., 1, n): summed in coordinates, span by span, then expanded once."""
        filled = self._filled()
        weights = weights.split([kept.shape[-2] for _, kept in filled], dim=-1)
        first, *sums = [w @ kept for w, (_, kept) in zip(weights, filled)]                      # (..., 1, n or k) each
        if not sums:
            return first
        return first + torch.cat(sums, dim=-1) @ self.bases[..., :self.rank * len(sums), :]

    def _filled(self):
        """The spans that have rows, each with what is kept of these."""
        *whole, last = self.spans[:self._span_of(self.length - 1) + 1]
        return [*((span, span.kept) for span in whole), (last, last.kept[..., :self.length - last.start, :])]

    def _span_of(self, row):
        return sum(start <= row for start in self.starts)

    def _add_to_gram(self, rows):
        count, n = self.gram.shape[-2:]
        if rows.shape[-2] == 1:
            shifted = torch.cat((rows, rows), dim=-1).squeeze(-2).unfold(-1, n, 1)              # (..., n + 1, n)
            self.gram.addcmul_(rows, shifted[..., :count, :])
        else:
            with torch.autocast(rows.device.type, enabled=False):   # would round the float32 of MPS
                self.gram += (rows.mT @ rows)[(..., *self._diagonals())]

    def _gram_matrix(self):
        """-> (..., n, n)."""
        n = self.gram.shape[-1]
        i, j = self._diagonals()
        matrix = self.gram.new_empty(*self.gram.shape[:-2], n, n)
        matrix[..., i, j] = self.gram
        matrix[..., j, i] = self.gram
        return matrix

    def _diagonals(self):
        """Row and column in G of each entry of `gram`, (n / 2 + 1, n) each."""
        count, n = self.gram.shape[-2:]
        i = torch.arange(n, device=self.gram.device).expand(count, n)
        return i, (i + torch.arange(count, device=self.gram.device).unsqueeze(-1)) % n

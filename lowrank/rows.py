"""Matrices that grow by rows and are only read through weighted sums of all their rows, which is what attention does
with V: kept in full (`Rows`), or in as few numbers as their rank allows (`LowRankRows`, `CausalRows`).

Letters: "..." any batch dimensions, N rows there is room for, T rows there are, n columns, k rank. Room is allocated
once; `nbytes` is what the rows take in it. No gradients: rows are written in place.
"""

import torch

from lowrank.svd import causal_starts, leading_eigenvectors


class Rows:
    """Kept as they are: N n numbers."""

    def __init__(self, shape, dtype, device):
        """shape: (..., N, n)."""
        self.kept = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0                                             # T

    @property
    def nbytes(self):
        return self.kept.nbytes

    def append(self, x):
        """x (..., m, n): m more rows."""
        self.kept[..., self.length:self.length + x.shape[-2], :] = x
        self.length += x.shape[-2]

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
    the Gram matrix G of all rows before s. G cannot be had from what is kept, so it is summed on the way, n (n + 1) / 2
    numbers in float64: in float32 a basis would be off by up to 1e-3 (docs/RESULTS.md, section 4). MPS has no float64;
    there G is float32, and rows should be neither above 1e15 nor all below 1e-15.

    A basis comes from eigh of G whatever the method: torch.linalg.svd would need the rows.
    """

    def __init__(self, shape, rank, block, dtype, device):
        """shape: (..., N, n); rank and block as in `causal_low_rank_approximation`."""
        *batch, room, n = shape
        self.starts = causal_starts(room, rank, block)
        first = self.starts[0] if self.starts else room
        self.full = torch.empty(*batch, first, n, dtype=dtype, device=device)
        self.coordinates = torch.empty(*batch, room - first, rank, dtype=dtype, device=device)
        self.bases = torch.empty(*batch, len(self.starts) * rank, n, dtype=dtype, device=device)     # W_k^T, stacked
        self.rank, self.length = rank, 0
        # G_ij = G_ji once each, by diagonals that wrap around: gram[d, i] = G[i, (i + d) mod n], d = 0 ... n / 2. A
        # new row is then added by one multiplication of it with views of itself, 8 times faster than via a triangle
        kind = torch.float32 if torch.device(device).type == 'mps' else torch.float64
        self.gram = torch.zeros(*batch, n // 2 + 1 if self.starts else 0, n, dtype=kind, device=device)

    @property
    def nbytes(self):
        return sum(t.nbytes for t in (self.full, self.coordinates, self.bases, self.gram))

    def append(self, x):
        """x (..., m, n): m more rows. Raises torch.linalg.LinAlgError where a basis would come from non-finite rows."""
        end = self.length + x.shape[-2]
        with torch.autocast(x.device.type, enabled=False):
            for span, start, stop in self._spans(self.length, end):
                rows = x[..., start - self.length:stop - self.length, :]
                if span < 0:
                    self.full[..., start:stop, :] = rows
                else:
                    if start == self.starts[span]:
                        self._basis(span).copy_(leading_eigenvectors(self._gram_matrix(), self.rank).mT)
                    self._coordinates(start, stop).copy_(rows.to(self.bases.dtype) @ self._basis(span).mT)
                if span + 1 < len(self.starts):                     # a later span needs G of these rows
                    self._add_to_gram(rows.to(self.gram.dtype))
        self.length = end

    def all(self):
        """The rows as projected: (..., T, n)."""
        return torch.cat([self.full[..., a:b, :] if span < 0 else self._coordinates(a, b) @ self._basis(span)
                          for span, a, b in self._spans(0, self.length)], dim=-2)

    def weighted_sum(self, weights):
        """weights (..., 1, T) -> (..., 1, n): summed in coordinates, span by span, then expanded once."""
        first = self.full.shape[-2]
        y = weights[..., :first] @ self.full[..., :self.length, :]
        if self.length > first:
            sums = torch.cat([weights[..., a:b] @ self._coordinates(a, b)                       # (..., 1, k) each
                              for span, a, b in self._spans(first, self.length)], dim=-1)       # (..., 1, spans k)
            y = y + sums @ self.bases[..., :sums.shape[-1], :]
        return y

    def _spans(self, start, stop):
        """The pieces (span, a, b) of rows [start, stop); span -1 is the first rows, kept in full."""
        edges = [0, *self.starts, max(stop, *self.starts, 0)]
        pieces = ((span - 1, max(a, start), min(b, stop)) for span, (a, b) in enumerate(zip(edges, edges[1:])))
        return [piece for piece in pieces if piece[1] < piece[2]]

    def _coordinates(self, a, b):
        first = self.starts[0]
        return self.coordinates[..., a - first:b - first, :]        # (..., b - a, k)

    def _basis(self, span):
        return self.bases[..., span * self.rank:(span + 1) * self.rank, :]                      # (..., k, n)

    def _add_to_gram(self, rows):
        n = rows.shape[-1]
        if rows.shape[-2] == 1:
            row = rows.squeeze(-2)
            shifted = torch.cat((row, row), dim=-1).unfold(-1, n, 1)[..., :self.gram.shape[-2], :]  # (..., n/2 + 1, n)
            self.gram.addcmul_(rows, shifted)
        else:
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

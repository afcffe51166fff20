"""What attention does to each head's V: nothing, or a truncated SVD in one of three scopes.

A model builds one of these modules per layer, with `build_head_svd`. Each has
    forward(v)                      V (B, nh, T, hs) -> the V that attention sums
    truncate_weight(w_v)            W_v (nh, hs, C), or U_v (nh, hs, d) of MLA -> the same
    new_values, new_latent_values   the form in which a cache keeps such values (kv_cache.py)

'sequence' truncates V of the whole sequence, so each position depends on later ones; 'causal'
projects rows on a basis of earlier rows; 'weight' truncates W_v: one small SVD per forward pass,
independent of B and T, in which no token sees another. The bias is kept, so V - b has rank k.
"""

import torch
from torch import nn

from lowrank.kv_cache import (BlockCausalLatentValues, BlockCausalValues, DenseValues,
                              FactoredValues, LatentValues)
from lowrank.subspace_iteration import WarmStartBasis
from lowrank.svd import (causal_low_rank_approximation, causal_starts, leading_eigenvectors,
                         leading_right_vectors, low_rank_approximation)


class NoSVD(nn.Module):
    """V as it is."""

    def forward(self, v):
        return v

    def truncate_weight(self, w_v):
        return w_v

    def new_values(self, shape, w_v, bias, **kind):
        """A cache of values (B, nh, N, hs) that W_v (nh, hs, C) and bias (nh, 1, hs) or None make;
        kind: its dtype and device."""
        return DenseValues(shape, **kind)

    def new_latent_values(self, shape, w_v, bias, **kind):
        """The same where latents are cached: w_v is U_v (nh, hs, d)."""
        return LatentValues(self.truncate_weight(w_v), bias)


class HeadSVD(NoSVD):
    """What the scopes share: the options and, where 'randomized' has one, the warm start."""

    warm_power_iters: int | None = None     # of a warm start; None: every forward pass starts cold

    def __init__(self, heads, head_size, block, basis_grad, rank, method, power_iters, oversample):
        """block: rows before the first basis of 'causal'; what follows: as in lowrank/svd.py."""
        super().__init__()
        self.block, self.basis_grad, self.warm_start = block, basis_grad, None
        self.options = dict(rank=rank, method=method, power_iters=power_iters,
                            oversample=oversample)
        if method == 'randomized' and self.warm_power_iters is not None:
            self.warm_start = WarmStartBasis(heads, head_size, rank, power_iters, oversample,
                                             self.warm_power_iters)


class SequenceSVD(HeadSVD):
    """The best rank-k approximation of V (T x hs) as a whole."""

    approximate = staticmethod(low_rank_approximation)
    warm_power_iters = 0          # residual 1.005 of the best on V of the main job's model, trained

    def forward(self, v):
        warm = self.warm_start
        if warm is None:
            return self.approximate(v, basis_grad=self.basis_grad, **self.options)
        v, gram = self.approximate(v, basis_grad=self.basis_grad, return_gram=True,
                                   **self.options | warm.start())
        if gram is not None and self.training and warm.followed and torch.is_grad_enabled():
            warm.accumulate_gram(gram)
        return v


class CausalSVD(SequenceSVD):
    """Rows of V projected on bases of earlier rows, in doubling blocks."""

    warm_power_iters = 1            # one basis for all prefixes is a poorer guess: docs/RESULTS.md

    def approximate(self, v, **options):
        return causal_low_rank_approximation(v, block=self.block, **options)

    def eigensolver(self, gram):
        """G (..., n, n) -> the basis of the next block (..., n, k)."""
        warm = {} if self.warm_start is None else self.warm_start.start()
        return leading_eigenvectors(gram, **self.options | warm)

    def new_values(self, shape, w_v, bias, **kind):
        return BlockCausalValues(shape, self.options['rank'], self.block, self.eigensolver, **kind)

    def new_latent_values(self, shape, w_v, bias, **kind):
        return BlockCausalLatentValues(w_v, bias, shape, self.options['rank'], self.block,
                                       self.eigensolver, **kind)


class WeightSVD(HeadSVD):
    """The projection that makes V, truncated per head. 'randomized' starts cold: one small
    problem."""

    def truncate_weight(self, w_v):
        return low_rank_approximation(w_v.mT, basis_grad=self.basis_grad, **self.options).mT

    def new_values(self, shape, w_v, bias, **kind):
        """V - b is W W^T W_v x, with the basis W that `truncate_weight` projects W_v on."""
        basis = leading_right_vectors(w_v.mT, **self.options)       # (nh, hs, k)
        down_proj = (basis.mT @ w_v).flatten(0, 1)                  # (nh k, C)
        return FactoredValues(shape, basis, bias, down_proj, **kind)


MODULES = dict(sequence=SequenceSVD, causal=CausalSVD, weight=WeightSVD)
SCOPES = tuple(MODULES)


def build_head_svd(scope, **options):
    """The module of a scope, or of None."""
    return NoSVD() if scope is None else MODULES[scope](**options)


def why_off(use_svd, rank, scope, block, rows, columns, weight_rows) -> str:
    """'off' and why an SVD of matrices (rows, columns), in 'weight' scope (weight_rows, columns),
    changes nothing; '' where it truncates."""
    if not use_svd or rank is None:
        return ('off' if not use_svd and rank is None else
                f'off (use_svd={use_svd}, svd_rank={rank})')
    full = min(weight_rows if scope == 'weight' else rows, columns)
    if rank >= full:
        return f'off (svd_rank={rank}: full rank is {full})'
    if scope == 'causal' and not causal_starts(rows, rank, block):
        return (f"off (svd_scope='causal' with svd_block={block}: no basis of rank {rank} is due "
                f'in block_size={rows} tokens)')
    return ''

"""Truncated SVD of V, and of queries Q and keys K, in attention: one module per scope, and one
without SVD.

`build_head_svd` makes one module per attention layer and target (Q, K or V). For V, a module has

    forward(v)                      V (B, nh, T, hs) -> the V that attention uses, same shape
    truncate_weight(w_v)            W_v (nh, hs, C), or U_v (nh, hs, d) with MLA -> same shape
    new_values, new_latent_values   storage for V in a cache (kv_cache.py)
    new_queries                     object that truncates the queries of new tokens

'sequence' takes the best rank-k approximation of V of the whole sequence, so each position depends
on later ones. 'causal' projects V of each token onto a basis of earlier tokens. 'weight' truncates
W_v, by one small SVD per head and forward pass. The size of this SVD does not depend on B or T, and
its result does not depend on the tokens. The bias b of V is not truncated, so V - b has rank k. Q
and K are truncated in the same way. Q is not cached.
"""

import torch
from torch import nn

from lowrank.kv_cache import (BlockCausalLatentValues, BlockCausalQueries, BlockCausalValues,
                              DenseValues, FactoredQueries, FactoredValues, LatentValues, Queries)
from lowrank.subspace_iteration import WarmStartBasis, gaussian_start
from lowrank.svd import (causal_low_rank_approximation, causal_starts, leading_eigenvectors,
                         leading_right_vectors, low_rank_approximation)


class NoSVD(nn.Module):
    """Unchanged V and W_v, or Q and W_q, or K and W_k."""

    def forward(self, v):
        return v

    def truncate_weight(self, w_v):
        return w_v

    def new_values(self, shape, w_v, bias, **kind):
        """Return empty storage for values (B, nh, N, hs).

        w_v (nh, hs, C) and bias (nh, 1, hs) or None: the values of inputs x are w_v x + bias. kind:
        dtype and device.
        """
        return DenseValues(shape, **kind)

    def new_latent_values(self, shape, w_v, bias, **kind):
        """Return the object that computes V from cached latents, for MLA. w_v: U_v (nh, hs, d)."""
        return LatentValues(self.truncate_weight(w_v), bias)

    def new_queries(self, shape, w_q, bias, **kind):
        """Return the function of the queries of new tokens. Arguments as for `new_values`."""
        return Queries()


class HeadSVD(NoSVD):
    """Base class of the three scopes. It holds their options and, with 'randomized', the warm
    start."""

    warm_power_iters: int | None = None     # iterations of a warm start; None: no warm start

    def __init__(self, heads, head_size, inputs, block, basis_grad, rank, method, power_iters,
                 oversample):
        """inputs: columns of W_v, C, or d with MLA. block: number of first rows that are not
        projected in 'causal' scope. The other arguments are those of `low_rank_approximation`."""
        super().__init__()
        self.block, self.basis_grad, self.warm_start = block, basis_grad, None
        self.options = dict(rank=rank, method=method, power_iters=power_iters,
                            oversample=oversample)
        if method == 'randomized' and self.warm_power_iters is None:
            # made here, because torch.compile can make only one in a graph
            self.options['start'] = gaussian_start(min(head_size, inputs), rank, oversample)
        elif method == 'randomized':
            self.warm_start = WarmStartBasis(heads, head_size, rank, power_iters, oversample,
                                             self.warm_power_iters)


class SequenceSVD(HeadSVD):
    """Best rank-k approximation of V (T, hs) of the whole sequence."""

    approximate = staticmethod(low_rank_approximation)
    warm_power_iters = 0    # residual 1.005 times the best, on V of a run of the main config

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
    """Rows of V projected onto bases of earlier rows, in blocks of doubling length."""

    warm_power_iters = 1            # one basis fits all prefixes less well (docs/RESULTS.md)

    def approximate(self, v, **options):
        return causal_low_rank_approximation(v, block=self.block, **options)

    def eigensolver(self, gram):
        """Return the basis of the next block, (..., n, k), from the Gram matrix (..., n, n) of the
        rows so far."""
        warm = {} if self.warm_start is None else self.warm_start.start()
        return leading_eigenvectors(gram, **self.options | warm)

    def new_values(self, shape, w_v, bias, **kind):
        return BlockCausalValues(shape, self.options['rank'], self.block, self.eigensolver, **kind)

    def new_latent_values(self, shape, w_v, bias, **kind):
        return BlockCausalLatentValues(w_v, bias, shape, self.options['rank'], self.block,
                                       self.eigensolver, **kind)

    def new_queries(self, shape, w_q, bias, **kind):
        return BlockCausalQueries(shape, self.options['rank'], self.block, self.eigensolver, **kind)


class WeightSVD(HeadSVD):
    """Truncated W_v per head. 'randomized' always starts cold, because the problem is small."""

    def truncate_weight(self, w_v):
        return low_rank_approximation(w_v.mT, basis_grad=self.basis_grad, **self.options).mT

    def new_values(self, shape, w_v, bias, **kind):
        """Return storage for the coordinates W^T W_v x of inputs x, where W is the basis of the
        truncated W_v. The truncated V is W (W^T W_v x) + bias."""
        return FactoredValues(shape, *self.factors(w_v, bias), **kind)

    def new_queries(self, shape, w_q, bias, dtype, device):
        basis, bias, down_proj = self.factors(w_q, bias)
        return FactoredQueries(basis.to(dtype), bias, down_proj)

    def factors(self, w, bias):
        """Return the basis W (nh, hs, k), the bias, and W^T w (nh k, C) of a weight (nh, hs, C)."""
        basis = leading_right_vectors(w.mT, **self.options)
        return basis, bias, (basis.mT @ w).flatten(0, 1)


MODULES = dict(sequence=SequenceSVD, causal=CausalSVD, weight=WeightSVD)
SCOPES = tuple(MODULES)


def build_head_svd(scope, **options):
    """Return the module of a scope, or NoSVD if scope is None."""
    return NoSVD() if scope is None else MODULES[scope](**options)


def why_off(use_svd, rank, scope, block, rows, columns, weight_rows) -> str:
    """Return 'off' and the reason why an SVD changes nothing, or '' if it truncates. The SVD is of
    matrices (rows, columns), or of matrices (weight_rows, columns) in 'weight' scope."""
    if not use_svd or rank is None:
        return ('off' if not use_svd and rank is None else
                f'off (use_svd={use_svd}, svd_rank={rank})')
    full = min(weight_rows if scope == 'weight' else rows, columns)
    if rank >= full:
        return f'off (rank {rank}: full rank is {full})'
    if scope == 'causal' and not causal_starts(rows, rank, block):
        return (f"off (svd_scope='causal' with svd_block={block}: the first basis of rank {rank} "
                f'would come after block_size={rows} tokens)')
    return ''

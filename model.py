"""
A GPT in one file, nanoGPT's parameter for parameter (github.com/karpathy/nanoGPT, MIT), whose attention can replace
its value matrix V by a truncated SVD of it, make keys and values from one latent a token (MLA), and factor its layers.

Where the SVD happens: `CausalSelfAttention.apply_svd_to_v` ('sequence', 'causal': on V) and `.value_weight` ('weight':
on the projection). It makes training slower, never faster; full rank is exact: docs/SVD.md. Where MLA happens:
`LatentProjection` in the place of `QKVProjection`: d numbers a token cached instead of 2C, expanded in training and for
a prompt, absorbed for single tokens (lowrank/cache.py), the same up to rounding: docs/MLA.md.

Letters in shape comments: B batch, T tokens, C n_embd, nh heads, hs = C / nh head size, k svd_rank, d latent.
"""

import math
import warnings
from dataclasses import dataclass, fields
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn as nn
from torch.nn import functional as F

import special_layers
from lowrank import subspace
from lowrank.cache import KeyValueCache, LatentCache, check_room
from lowrank.layers import LowRankLinear, SplitProjection, split_heads
from lowrank.svd import (METHODS, causal_low_rank_approximation, causal_starts, effective_rank, energy_kept,
                         leading_eigenvectors, low_rank_approximation, low_rank_factors)
from runtime import pretrained
from runtime.checkpoint import fitting_weights, load_weights
from runtime.config import UserError, at_least, check_all
from runtime.draw import stream
from runtime.optim import adamw

SCOPES, GELUS = ('sequence', 'causal', 'weight'), ('exact', 'tanh')


@dataclass
class GPTConfig(special_layers.LayerConfig):
    """Everything that shapes the model; a checkpoint's `model_args` is this as a dict. Raises ValueError, its message
    starting with the field's name, for values that cannot be. The strings are the help texts of the command line."""
    block_size: Annotated[int, 'context length in tokens'] = 1024
    vocab_size: Annotated[int, 'number of token ids'] = 50304  # GPT-2's 50257 rounded up to a multiple of 64, for speed
    n_layer: Annotated[int, 'number of transformer blocks'] = 12
    n_head: Annotated[int, 'attention heads a block'] = 12
    n_embd: Annotated[int, 'width of the model; a multiple of n_head'] = 768
    dropout: Annotated[float, 'dropout probability; for pretraining 0 is good, for fine-tuning try 0.1 or more'] = 0.0
    bias: Annotated[bool, 'biases in Linear and LayerNorm, as in GPT-2; False is a bit better and faster'] = True
    gelu: Annotated[Literal[GELUS], "GELU of the MLP: 'exact' as in nanoGPT, 'tanh' as in OpenAI's GPT-2"] = 'exact'
    use_svd: Annotated[bool, 'replace V in attention by its best rank-svd_rank approximation'] = False
    svd_rank: Annotated[int | None, 'rank kept of at most n_embd / n_head; None or full rank changes nothing'] = None
    svd_method: Annotated[Literal[METHODS],
                          "how: 'standard' is torch.linalg.svd, 'gram' eigh of V^T V, faster, 'randomized' subspace "
                          'iteration, residual 1 to 4% above the best, faster still'] = 'gram'
    svd_scope: Annotated[Literal[SCOPES], "which matrix: 'sequence' V of the whole sequence (sees the future), "
                         "'causal' only rows already seen, 'weight' the value projection"] = 'sequence'
    svd_block: Annotated[int, "'causal' scope: rows that pass before the first basis; blocks double after it"] = 32
    svd_basis_grad: Annotated[bool, 'whether gradients reach the basis; False takes it for constant, which in '
                              "'sequence' scope removes the reward for hiding the future in it"] = True
    svd_power_iters: Annotated[int, "'randomized': products with V^T V before the last, from a random start"] = 2
    svd_oversample: Annotated[int, "'randomized': more columns in a random start than rank + 4"] = 0
    use_mla: Annotated[bool, 'multi-head latent attention: keys and values from one latent a token'] = False
    mla_latent_dim: Annotated[int | None, 'numbers in a latent, at most n_embd; None: n_embd / 4'] = None

    def __post_init__(self):
        at_least(self, block_size=1, vocab_size=1, n_layer=1, n_head=1, n_embd=1, svd_block=1, svd_power_iters=0,
                 svd_oversample=0, mla_latent_dim=1)
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd={self.n_embd}: not a multiple of n_head={self.n_head} (nearest: '
                             f'{max(1, round(self.n_embd / self.n_head)) * self.n_head})')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout={self.dropout}: must be at least 0 and below 1')
        if self.svd_rank is not None and self.svd_rank < 1:
            raise ValueError(f'svd_rank={self.svd_rank}: must be at least 1 (valid: 1 to '
                             f'{self.n_embd // self.n_head}, or None)')
        if self.use_mla and self.latent_dim > self.n_embd:
            raise ValueError(f'mla_latent_dim={self.mla_latent_dim}: must be at most n_embd (nearest: {self.n_embd})')
        for name, valid in (('gelu', GELUS), ('svd_method', METHODS), ('svd_scope', SCOPES)):
            if getattr(self, name) not in valid:
                raise ValueError(f'{name}={getattr(self, name)!r}: unknown (valid: {", ".join(valid)})')
        self.check_values()
        self.check_layers()

    @property
    def latent_dim(self):
        return max(1, self.n_embd // 4) if self.mla_latent_dim is None else self.mla_latent_dim

    @property
    def svd_truncates(self):
        """False where the SVD changes nothing: `svd_idle` says why."""
        return not self.svd_idle

    @property
    def svd_idle(self):
        """'off', and why the SVD changes nothing where that was not asked for; '' where it truncates."""
        if not self.use_svd or self.svd_rank is None:
            asked = self.use_svd or self.svd_rank is not None
            return 'off' + f' (use_svd={self.use_svd}, svd_rank={self.svd_rank})' * asked
        rows = self.block_size if self.svd_scope != 'weight' else self.latent_dim if self.use_mla else self.n_embd
        full = min(rows, self.n_embd // self.n_head)
        if self.svd_rank >= full:
            return f'off (svd_rank={self.svd_rank}: full rank is {full})'
        if self.svd_scope == 'causal' and not causal_starts(self.block_size, self.svd_rank, self.svd_block):
            return (f"off (svd_scope='causal' with svd_block={self.svd_block}: no basis of rank {self.svd_rank} is due "
                    f'in block_size={self.block_size} tokens)')
        return ''

    @property
    def svd_summary(self):
        """What is done to V, for a line of output."""
        return self.svd_idle or (f'rank {self.svd_rank} of {self.n_embd // self.n_head}, {self.svd_method}, '
                                 f'{self.svd_scope}')

    @property
    def svd_sees_future(self):
        """True where outputs depend on later tokens, so that the parallel loss is not what generation gets."""
        return self.svd_scope == 'sequence' and self.svd_truncates


# change no parameter: any checkpoint takes them
FREE_FIELDS = [f.name for f in fields(GPTConfig) if f.name.startswith(('dropout', 'use_svd', 'svd_')) or
               f.name in ('lora_dropout', 'adaptive_svd_protection')]


class QKVProjection(nn.Linear):
    """Queries, keys and values of all heads: W_q, W_k and W_v stacked, (3C, C), nanoGPT's c_attn."""

    def __init__(self, config):
        super().__init__(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.n_head = config.n_head

    def forward(self, x, w_v=None):
        """x (B, T, C) -> q, k, v, each (B, nh, T, hs). w_v (nh, hs, C): in place of `value_weight`."""
        weight = self.weight if w_v is None else torch.cat((*self.weight.chunk(3)[:2], w_v.flatten(0, 1)))
        return split_heads(self.n_head, *F.linear(x, weight, self.bias).chunk(3, dim=2))        # each (B, T, C)

    def value_weight(self):
        """What makes V of x, head by head: (nh, hs, C)."""
        return self.weight.chunk(3)[2].unflatten(0, (self.n_head, -1))

    def to_cache(self, x, cache):
        """x (B, T, C) -> q, k, and v or in 'weight' scope its k coordinates, each (B, nh, T, ..), for cache.attend."""
        if cache.to_coordinates is None:
            return self(x)
        C = x.size(2)
        q, k = F.linear(x, self.weight[:2 * C], None if self.bias is None else self.bias[:2 * C]).split(C, dim=2)
        return split_heads(self.n_head, q, k, F.linear(x, cache.to_coordinates))                # the last (B, T, nh k)

    def new_cache(self, shape, factors, causal, **kind):
        """The layer's cache; the arguments are those of lowrank/cache.py."""
        return KeyValueCache(shape, None if self.bias is None else self.bias.chunk(3)[2], factors, causal, **kind)


class LatentProjection(nn.Module):
    """The same for multi-head latent attention: keys and values of all heads come from one latent a token, c = W_a x of
    d numbers (DeepSeek-V2, arXiv:2405.04434, equations 9 to 11; positions are learned, so nothing is rotary)."""

    def __init__(self, config):
        super().__init__()
        C, d, self.n_head = config.n_embd, config.latent_dim, config.n_head
        self.query = nn.Linear(C, C, bias=config.bias)
        self.kv_down = nn.Linear(C, d, bias=False)                  # W_a
        self.k_up = nn.Linear(d, C, bias=False)                     # U_k; a bias would change no attention weight
        self.v_up = nn.Linear(d, C, bias=config.bias)               # U_v

    def forward(self, x, w_v=None):
        """x (B, T, C) -> q, k, v, each (B, nh, T, hs), expanded. w_v (nh, hs, d): in place of `value_weight`."""
        c = self.kv_down(x)                                         # (B, T, d)
        v = F.linear(c, self.v_up.weight if w_v is None else w_v.flatten(0, 1), self.v_up.bias)     # (B, T, C)
        return split_heads(self.n_head, self.query(x), self.k_up(c), v)

    def value_weight(self):
        """What makes V of latents, head by head: (nh, hs, d)."""
        return self.v_up.weight.unflatten(0, (self.n_head, -1))

    def to_cache(self, x, cache):
        """x (B, T, C) -> q (B, nh, T, hs) and the latents (B, T, d), for cache.attend."""
        return *split_heads(self.n_head, self.query(x)), self.kv_down(x)

    def new_cache(self, shape, factors, causal, **kind):
        """As `QKVProjection.new_cache`; whatever the SVD, what is kept of a token is its latent."""
        w_v = self.value_weight() if factors is None else factors[0] @ factors[1]               # (nh, hs, d)
        return LatentCache(shape, self.k_up.weight.unflatten(0, (self.n_head, -1)), w_v, self.v_up.bias, causal, **kind)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = (LatentProjection if config.use_mla else QKVProjection)(config)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.head_size, self.dropout = config.n_head, config.n_embd // config.n_head, config.dropout
        # None: nothing to truncate. A sequence shorter than the rank is left alone in lowrank/svd.py
        self.svd_scope = config.svd_scope if config.svd_truncates else None
        self.svd_rank, self.svd_method, self.svd_block = config.svd_rank, config.svd_method, config.svd_block
        self.svd_basis_grad, self.running_basis = config.svd_basis_grad, None
        self.svd_sketch = dict(power_iters=config.svd_power_iters, oversample=config.svd_oversample)
        if self.svd_scope in ('sequence', 'causal') and self.svd_method == 'randomized':
            self.running_basis = subspace.RunningBasis(self.n_head, self.head_size, self.svd_rank, **self.svd_sketch)

    def forward(self, x, cache=None, only_last=False):
        """x (B, T, C) -> (B, T, C); only_last: the last position's alone, (B, 1, C). With a cache (`new_cache`), x
        follows the tokens in it and joins them: a whole prompt first, then one token at a time."""
        q, *kept = self.project(x) if cache is None else self.c_attn.to_cache(x, cache)         # q (B, nh, T, hs)
        q = q[:, :, -1:] if only_last else q
        if cache is None:
            k, v = kept[0], self.apply_svd_to_v(kept[1])            # (B, nh, T, hs)
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout * self.training, is_causal=not only_last)
        else:
            y = cache.attend(q, *kept)                              # (B, nh, T, hs)
        y = y.transpose(1, 2).flatten(2)                            # (B, nh, T, hs) -> (B, T, C), heads side by side
        return self.resid_dropout(self.c_proj(y))                   # (B, T, C)

    def project(self, x):
        """x (B, T, C) -> q, k, v, each (B, nh, T, hs)."""
        return self.c_attn(x, self.value_weight() if self.svd_scope == 'weight' else None)

    def value_weight(self):
        """'weight' scope: what makes every head's V, W_v (nh, hs, C) or U_v (nh, hs, d), cut to rank k. One small SVD a
        forward pass, independent of B and T; the bias is kept, so V - bias has rank k and no token sees another."""
        return low_rank_approximation(self.c_attn.value_weight(), basis_grad=self.svd_basis_grad, **self.svd_options())

    def apply_svd_to_v(self, v):
        """Best rank-k approximation of every head's V: (B, nh, T, hs) -> (B, nh, T, hs). Float32 inside, v's dtype out.

        'sequence': of the T x hs matrix as a whole, the classic definition; position t then depends on tokens after t.
        'causal': rows only use a basis made of earlier rows. 'weight' and no SVD: v itself (see `value_weight`).
        """
        options = dict(basis_grad=self.svd_basis_grad, **self.svd_options())
        if self.running_basis is not None and self.training and torch.is_grad_enabled():
            options['note'] = self.running_basis.note               # a training step: the next one starts from its V
        if self.svd_scope == 'sequence':
            return low_rank_approximation(v, **options)
        if self.svd_scope == 'causal':
            return causal_low_rank_approximation(v, block=self.svd_block, **options)
        return v

    def _standard_svd_reconstruction(self, v, rank=None):
        """U_k S_k V_k^T by torch.linalg.svd: (B, nh, T, hs) -> (B, nh, T, hs). rank None: svd_rank."""
        return low_rank_approximation(v, rank or self.svd_rank, 'standard', self.svd_basis_grad)

    def svd_options(self):
        """Rank, method, and where 'randomized' starts: 'weight' scope, one small problem a step, always cold."""
        options = dict(rank=self.svd_rank, method=self.svd_method, **self.svd_sketch)
        if self.running_basis is not None:
            options['start'], options['power_iters'] = self.running_basis.start()
        return options

    @torch.no_grad()
    def value_statistics(self, x):
        """x (B, T, C) -> what the SVD leaves of V, {'energy_kept': (nh), 'effective_rank': (nh), of V before it}."""
        v, cut = self.c_attn(x)[2], self.apply_svd_to_v(self.project(x)[2])                     # (B, nh, T, hs)
        return {'energy_kept': energy_kept(v, cut).mean(0), 'effective_rank': effective_rank(v).mean(0)}

    @torch.no_grad()
    def new_cache(self, batch, tokens, device=None):
        """Room for `tokens` tokens of `batch` sequences (lowrank/cache.py), in the dtype that keys and values will
        have. Not for 'sequence' scope that truncates. device None: the weights'."""
        weight, factors, causal = next(self.parameters()), None, None
        cast = torch.is_autocast_enabled(weight.device.type) and weight.dtype != torch.float64  # which it leaves alone
        dtype = torch.get_autocast_dtype(weight.device.type) if cast else weight.dtype
        shape = (batch, self.n_head, tokens, self.head_size)
        if self.svd_scope == 'weight':
            factors = low_rank_factors(self.c_attn.value_weight(), **self.svd_options())        # A, B of each head
        elif self.svd_scope == 'causal':
            causal = self.svd_rank, self.svd_block, partial(leading_eigenvectors, **self.svd_options())
        return self.c_attn.new_cache(shape, factors, causal, dtype=dtype, device=device or weight.device)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.approximate = 'tanh' if config.gelu == 'tanh' else 'none'

    def forward(self, x):                                           # (B, T, C) -> (B, T, 4C) -> (B, T, C)
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, only_last=False):
        """x (B, T, C) -> (B, T, C), or (B, 1, C) if only_last: of the others only keys and values are needed."""
        y = self.attn(self.ln_1(x), cache, only_last)
        x = (x[:, -1:] if only_last else x) + y
        return x + self.mlp(self.ln_2(x))


class GPT(subspace.RunningBases, nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight           # tied, as in GPT-2
        for name, rank in (config.layer_ranks or {}).items():
            self.set_layer(name, LowRankLinear(*config.layer_shape(name)[::-1], rank, config.bias))
        self.init_weights()
        special_layers.install(self)

    def get_layer(self, name):
        """One that config.layer_ranks can name; a fused c_attn is split for it."""
        attn = self.transformer.h[int(name.split('.')[1])].attn
        if '.c_attn.' in name and isinstance(attn.c_attn, QKVProjection):
            attn.c_attn = SplitProjection(attn.c_attn)
        return self.transformer.get_submodule(name)

    def set_layer(self, name, layer):
        """Put another in its place."""
        self.get_layer(name)
        self.transformer.set_submodule(name, layer)

    def init_weights(self):
        """GPT-2's initialisation: weights N(0, 0.02), biases 0, LayerNorm 1 and 0; the projections that write to the
        residual stream (attn.c_proj, mlp.c_proj) N(0, 0.02 / sqrt(2 n_layer)), one factor for each of its 2 n_layer
        additions. Draws in nanoGPT's order, so equal seeds give equal weights. In a product that is the second's, the
        first (MLA's W_a, a LowRankLinear's A) has orthogonal rows with entries of 1 / sqrt(rank): so the product has
        it, too, and moves as far with the second as a single weight would."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, mean=0.0, std=0.02)
                if getattr(module, 'bias', None) is not None:
                    nn.init.zeros_(module.bias)
        for block in self.transformer.h:
            for module in (block.attn, block.mlp):
                last = getattr(module.c_proj, 'B', module.c_proj)
                nn.init.normal_(last.weight, mean=0.0, std=0.02 / math.sqrt(2 * self.config.n_layer))
            for module in block.modules():
                if isinstance(module, (LowRankLinear, LatentProjection)):
                    first = module.A if isinstance(module, LowRankLinear) else module.kv_down
                    nn.init.orthogonal_(first.weight, math.sqrt(first.in_features / first.out_features))

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) token ids, targets (B, T) or None (-1 is ignored) -> logits, loss.

        With targets: logits (B, T, vocab_size) and the mean cross-entropy in nats. Without: logits of the last
        position only (B, 1, vocab_size), and None. With a cache (`new_cache`) idx follows the tokens in it and joins
        them: a prompt first, then one token at a time, without gradients. Raises ValueError for more than block_size
        tokens and for what does not fit the cache.
        """
        if cache and torch.is_grad_enabled():                       # its rows are written in place
            with torch.no_grad():
                return self.forward(idx, targets, cache)
        T, start = idx.size(1), check_room(cache, idx, self.config.block_size)
        pos = torch.arange(start, start + T, device=idx.device)     # (T)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))        # (B, T, C)
        for i, block in enumerate(self.transformer.h):
            try:
                x = block(x, cache and cache[i], only_last=targets is None and i == self.config.n_layer - 1)
            except torch.linalg.LinAlgError as e:                   # its V is not finite
                raise torch.linalg.LinAlgError(f'transformer.h.{i}.attn: {e}') from None
        x = self.transformer.ln_f(x)
        logits = self.lm_head(x)                                    # (B, T, vocab), or (B, 1, vocab)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, use_cache=True, top_p=None, seed=None):
        """Continue idx (B, T) by max_new_tokens tokens -> (B, T + max_new_tokens); `stream` has the rest."""
        return torch.cat((idx, *self.stream(idx, max_new_tokens, temperature, top_k, use_cache, top_p, seed)), dim=1)

    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, use_cache=True, top_p=None, seed=None):
        """The next tokens of idx (B, T), each (B, 1), as they are drawn: see `runtime.draw.stream`. 'sequence' scope
        computes the whole prefix for each (a warning says so once), as does training mode, where dropout differs."""
        if use_cache and self.config.svd_sees_future:
            warnings.warn("svd_scope='sequence': a new token changes V of all earlier ones, so no cache is used and "
                          'the prefix is recomputed for each', stacklevel=2)
        cached = use_cache and not self.config.svd_sees_future and not self.training
        return stream(self, idx, max_new_tokens, temperature, top_k, top_p, seed, use_cache=cached)

    def new_cache(self, batch, tokens):
        """Room for `tokens` tokens of `batch` sequences: a list of the layers' caches. Raises ValueError for more than
        block_size tokens and for 'sequence' scope that truncates."""
        if not 1 <= tokens <= self.config.block_size:
            raise ValueError(f'cannot cache {tokens} tokens: valid are 1 to block_size={self.config.block_size}')
        if self.config.svd_sees_future:
            raise ValueError("svd_scope='sequence': V of earlier tokens changes with each new one and cannot be cached")
        return [block.attn.new_cache(batch, tokens) for block in self.transformer.h]

    def kv_cache_bytes(self, batch, tokens):
        """Bytes of the cache when `batch` sequences have `tokens` tokens, of which it keeps block_size at most; 0 in
        'sequence' scope, which has none. Weights that it refers to, factors of W_v in 'weight' scope, do not count."""
        if self.config.svd_sees_future:
            return 0
        tokens = min(tokens, self.config.block_size)
        return batch * self.config.n_layer * self.transformer.h[0].attn.new_cache(1, tokens, 'meta').nbytes

    def flops_per_token(self, tokens, decode=False):
        """Floating-point operations of the forward pass for one token, additions and multiplications: the mean of a
        prompt of `tokens` tokens, or decode: of the token after as many. Matrices and attention; not the SVD."""
        c, h = self.config, self.transformer.h
        *blocks, last, projection = (sum(p.numel() for p in part.parameters() if p.dim() == 2)
                                     for part in (*h, h[-1].attn.c_attn))
        head, pairs = self.lm_head.weight.numel(), tokens * (tokens + 1) // 2                   # of query and key
        if decode:                                                  # absorbed: each head meets the whole latent
            width = c.n_head * c.latent_dim if c.use_mla else c.n_embd
            return 2 * (sum(blocks) + last + head) + 4 * c.n_layer * width * (tokens + 1)
        once = last - projection + head + 2 * c.n_embd * tokens     # last layer: only the last position goes on
        return 2 * (sum(blocks) + 2 * c.n_embd * pairs / tokens * len(blocks) + projection + once / tokens)

    def attention_params(self):
        """Number of parameters of all attention layers."""
        return sum(p.numel() for block in self.transformer.h for p in block.attn.parameters())

    def get_num_params(self, non_embedding=True):
        """Number of parameters, without the position embeddings by default (the token embeddings are the head)."""
        return sum(p.numel() for p in self.parameters()) - non_embedding * self.transformer.wpe.weight.numel()

    def crop_block_size(self, block_size):
        """Shorten the context in place, for example of a GPT-2 checkpoint (1024), by dropping late positions."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f'block_size={block_size}: can only be cropped to 1..{self.config.block_size}')
        self.config.block_size = block_size
        self.transformer.wpe = nn.Embedding.from_pretrained(self.transformer.wpe.weight[:block_size].detach().clone(),
                                                            freeze=not self.transformer.wpe.weight.requires_grad)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """nanoGPT's AdamW: what has two dimensions decays. Fused where the device has the kernel."""
        return adamw(self, weight_decay, learning_rate, betas, device_type)

    def estimate_mfu(self, fwdbwd_per_iter, dt, flops_promised=312e12):
        """Model FLOPs utilisation of fwdbwd_per_iter sequences in dt seconds, as a fraction of flops_promised a second
        (default: an A100 in bfloat16). FLOPs after PaLM (arXiv:2204.02311), appendix B; the SVD is not counted."""
        c = self.config
        flops_per_token = 6 * self.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size
        return flops_per_token * c.block_size * fwdbwd_per_iter / dt / flops_promised

    @classmethod
    def from_checkpoint(cls, saved, **overrides):
        """The model of a checkpoint dict, this repo's or nanoGPT's: its `model_args` and `model` (a state dict) are all
        that is needed. overrides: fields that add no parameters. Raises ValueError where the three do not fit."""
        check_all(GPTConfig, saved['model_args'], saved.get('path', 'model_args'))
        args, state = fitting_weights(saved, GPTConfig.__dataclass_fields__)
        model = cls(GPTConfig(**{**args, **overrides}))
        load_weights(model, state)
        model.svd_basis = saved.get('svd_basis')
        return model

    @classmethod
    def from_pretrained(cls, name_or_folder, override_args=None):
        """GPT-2's published weights: 'gpt2', 'gpt2-medium', 'gpt2-large' or 'gpt2-xl', from the Hugging Face cache or
        hub, a run's folder, or one in their format, whose resid_pdrop is the dropout, or in export.py's. override_args:
        of FREE_FIELDS. Raises ValueError for other names and fields, and what cannot be had or used."""
        for key in (key for key in override_args or {} if key not in FREE_FIELDS):
            raise ValueError(f'{key}={override_args[key]}: the shape of {name_or_folder} is fixed' if key in
                             GPTConfig.__dataclass_fields__ else f'{key}: no such field')
        args, state, basis = pretrained.read(name_or_folder)
        saved = dict(model_args=args, model=state, path=name_or_folder, svd_basis=basis)
        try:
            return cls.from_checkpoint(saved, **override_args or {})
        except ValueError as e:
            raise e if isinstance(e, UserError) else UserError(f'init_from={name_or_folder!r}: {e}') from None

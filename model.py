"""
A GPT in one file, nanoGPT's parameter for parameter (github.com/karpathy/nanoGPT, MIT), whose attention can replace
its value matrix V by a truncated SVD of it.

Where the SVD happens: `CausalSelfAttention.apply_svd_to_v` (scopes 'sequence' and 'causal', on V) and
`CausalSelfAttention.value_weight` (scope 'weight', on the projection that makes V). What it costs and what is exact:
docs/SVD.md. The linear algebra, gradient included: lowrank/svd.py. Decoding (`GPT.stream`) keeps keys and values in a
`LayerCache`, the values in as few numbers as the rank allows: lowrank/rows.py.

Letters in shape comments: B batch, T tokens, C n_embd, nh heads, hs = C / nh head size, k svd_rank.
"""

import math
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn as nn
from torch.nn import functional as F

from lowrank import subspace
from lowrank.rows import CausalRows, LowRankRows, Rows
from lowrank.svd import (METHODS, causal_low_rank_approximation, effective_rank, energy_kept, leading_eigenvectors,
                         low_rank_approximation, low_rank_factors)
from runtime import pretrained
from runtime.checkpoint import fitting_weights
from runtime.draw import check_draw, draw
from runtime.linear import Linear, linear

SCOPES = ('sequence', 'causal', 'weight')
GELUS = ('exact', 'tanh')


@dataclass
class GPTConfig:
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

    def __post_init__(self):
        for name, least in dict(block_size=1, vocab_size=1, n_layer=1, n_head=1, n_embd=1, svd_block=1,
                                svd_power_iters=0, svd_oversample=0).items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f'{name}={getattr(self, name)}: must be at least {least}')
        if self.n_embd % self.n_head:
            nearest = max(1, round(self.n_embd / self.n_head)) * self.n_head
            raise ValueError(f'n_embd={self.n_embd}: not a multiple of n_head={self.n_head} (nearest: {nearest})')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout={self.dropout}: must be at least 0 and below 1')
        if self.svd_rank is not None and self.svd_rank < 1:
            raise ValueError(f'svd_rank={self.svd_rank}: must be at least 1, or None for full rank '
                             f'(valid: 1 to {self.n_embd // self.n_head}, or None)')
        for name, valid in (('gelu', GELUS), ('svd_method', METHODS), ('svd_scope', SCOPES)):
            if getattr(self, name) not in valid:
                raise ValueError(f'{name}={getattr(self, name)!r}: unknown (valid: {", ".join(valid)})')

    @property
    def svd_truncates(self):
        """False where the SVD changes nothing: off, or at full rank."""
        full = self.n_embd // self.n_head
        full = full if self.svd_scope == 'weight' else min(self.block_size, full)
        return self.use_svd and self.svd_rank is not None and self.svd_rank < full

    @property
    def svd_sees_future(self):
        """True where a position's output depends on later tokens, so that the parallel loss is not what generation
        gets: 'sequence' scope at a rank that truncates anything."""
        return self.svd_scope == 'sequence' and self.svd_truncates


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)   # W_q, W_k, W_v stacked: (3C, C)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.dropout = config.n_head, config.dropout
        # None: nothing to truncate. A sequence shorter than the rank is left alone in lowrank/svd.py
        self.svd_scope = config.svd_scope if config.svd_truncates else None
        self.svd_rank, self.svd_block, self.svd_basis_grad = config.svd_rank, config.svd_block, config.svd_basis_grad
        self.svd_method, self.running_basis = config.svd_method, None
        self.svd_sketch = dict(power_iters=config.svd_power_iters, oversample=config.svd_oversample)
        if self.svd_scope in ('sequence', 'causal') and config.svd_method == 'randomized':
            self.running_basis = subspace.RunningBasis(config.n_head, config.n_embd // config.n_head, config.svd_rank,
                                                       **self.svd_sketch)

    def forward(self, x, cache=None, only_last=False):
        """x (B, T, C) -> (B, T, C); only_last: the last position's alone, (B, 1, C). With a cache (`new_cache`), x
        follows the tokens in it and joins them: a whole prompt first, then one token at a time."""
        q, k, v = self.project(x, cache)                            # each (B, nh, T, hs)
        q = q[:, :, -1:] if only_last else q
        if cache is None:
            v = self.apply_svd_to_v(v)                              # (B, nh, T, hs)
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=not only_last)
        else:
            y = cache.attend(q, k, v)
        y = y.transpose(1, 2).flatten(2)                            # (B, nh, T, hs) -> (B, T, C), heads side by side
        return self.resid_dropout(self.c_proj(y))                   # (B, T, C)

    def project(self, x, cache=None):
        """x (B, T, C) -> q, k, v, each (B, nh, T, hs); 'weight' scope with a cache: v's coordinates, (B, nh, T, k)."""
        C = x.size(2)
        weight, bias = self.c_attn.weight, self.c_attn.bias
        if self.svd_scope == 'weight' and cache is not None:
            q, k = linear(x, weight[:2 * C], None if bias is None else bias[:2 * C]).split(C, dim=2)
            v = linear(x, cache.to_coordinates)                     # (B, T, nh k)
        else:
            q, k, v = linear(x, self.effective_weight(), bias).split(C, dim=2)                  # each (B, T, C)
        return tuple(t.unflatten(2, (self.n_head, -1)).transpose(1, 2) for t in (q, k, v))

    def effective_weight(self):
        """c_attn's weight as it acts (3C, C): in 'weight' scope the rows that make V are `value_weight`."""
        weight = self.c_attn.weight
        return torch.cat((*weight.chunk(3)[:2], self.value_weight())) if self.svd_scope == 'weight' else weight

    def value_weight(self):
        """'weight' scope: every head's value projection W_v (hs, C), cut to rank k; (C, C), heads stacked. One small
        SVD a forward pass, independent of B and T; the bias is kept, so V - bias has rank k and no token sees another.
        """
        low = low_rank_approximation(self._heads_of_w_v(), basis_grad=self.svd_basis_grad, **self.svd_options())
        return low.flatten(0, 1)                                    # (nh, hs, C) -> (C, C)

    def _heads_of_w_v(self):
        return self.c_attn.weight.chunk(3)[2].unflatten(0, (self.n_head, -1))                   # (nh, hs, C)

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
        """U_k S_k V_k^T by torch.linalg.svd: (B, nh, T, hs) -> (B, nh, T, hs). rank None: the configured one."""
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
        v = F.linear(x, self.c_attn.weight, self.c_attn.bias).chunk(3, dim=2)[2]                # (B, T, C)
        v = v.unflatten(2, (self.n_head, -1)).transpose(1, 2)       # (B, nh, T, hs)
        cut = self.apply_svd_to_v(self.project(x)[2])
        return {'energy_kept': energy_kept(v, cut).mean(0), 'effective_rank': effective_rank(v).mean(0)}

    @torch.no_grad()
    def new_cache(self, batch, tokens, device=None):
        """LayerCache with room for `tokens` tokens of `batch` sequences, in the dtype that keys and values will have.
        Not for 'sequence' scope that truncates. device None: the weights'."""
        weight, bias = self.c_attn.weight, self.c_attn.bias
        C, here = weight.size(1), weight.device.type
        cast = torch.is_autocast_enabled(here) and weight.dtype != torch.float64                # which it leaves alone
        kind = dict(dtype=torch.get_autocast_dtype(here) if cast else weight.dtype, device=device or weight.device)
        shape = (batch, self.n_head, tokens, C // self.n_head)
        keys, to_coordinates = Rows(shape, **kind), None
        if self.svd_scope == 'weight':                              # W_v = A B: B x is kept, A expands it
            basis, b = low_rank_factors(self._heads_of_w_v(), **self.svd_options())             # A (nh, hs, k)
            to_coordinates = b.flatten(0, 1)                        # (nh, k, C) -> (nh k, C)
            offset = None if bias is None else bias[2 * C:].view(self.n_head, 1, -1)            # (nh, 1, hs)
            values = LowRankRows((*shape[:3], self.svd_rank), basis, offset, **kind)
        elif self.svd_scope == 'causal':
            leading = partial(leading_eigenvectors, **self.svd_options())
            values = CausalRows(shape, self.svd_rank, self.svd_block, leading, **kind)
        else:
            values = Rows(shape, **kind)
        return LayerCache(keys, values, to_coordinates)


class LayerCache:
    """Keys and values of one layer's tokens so far, the values in the form that lowrank/rows.py has for the scope."""

    def __init__(self, keys, values, to_coordinates=None):
        """to_coordinates (nh k, C): 'weight' scope, what makes a token's coordinates; a weight, not counted here."""
        self.keys, self.values, self.to_coordinates = keys, values, to_coordinates

    @property
    def nbytes(self):
        return self.keys.nbytes + self.values.nbytes

    def clear(self):
        self.keys.clear()
        self.values.clear()

    @torch.compiler.disable                                         # shapes change every token, spans now and then
    def attend(self, q, k, v):
        """Add k and v of T new tokens, and attend from the last tokens, those of q: -> like q, (B, nh, .., hs). A batch
        of one joins every sequence of the cache."""
        self.keys.append(k)
        self.values.append(v)
        if k.size(2) == self.keys.length:                           # a prompt: expanded once, attended as in training
            v = self.values.all()[:len(k)]
            return F.scaled_dot_product_attention(q, k, v, is_causal=q.size(2) > 1)
        scores = self.keys.all() @ (q * q.size(-1) ** -0.5).mT      # (B, nh, T, hs) x (B, nh, hs, 1)
        return self.values.weighted_sum(F.softmax(scores.mT, dim=-1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
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
        """x (B, T, C) -> (B, T, C), or (B, 1, C) if only_last: keys and values are needed of all positions, nothing
        else is."""
        y = self.attn(self.ln_1(x), cache, only_last)
        x = (x[:, -1:] if only_last else x) + y
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
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
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight           # tied, as in GPT-2
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's initialisation: weights N(0, 0.02), biases 0, LayerNorm 1 and 0; the projections that write to the
        residual stream (attn.c_proj, mlp.c_proj) N(0, 0.02 / sqrt(2 n_layer)), one factor for each of its 2 n_layer
        additions. Draws in nanoGPT's order, so equal seeds give equal weights."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, mean=0.0, std=0.02)
                if getattr(module, 'bias', None) is not None:
                    nn.init.zeros_(module.bias)
        for block in self.transformer.h:
            for module in (block.attn, block.mlp):
                nn.init.normal_(module.c_proj.weight, mean=0.0, std=0.02 / math.sqrt(2 * self.config.n_layer))

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
        T, start = idx.size(1), cache[0].keys.length if cache else 0
        if not 1 <= T <= self.config.block_size - start:
            raise ValueError(f'cannot forward {start + T} tokens: valid are 1 to block_size={self.config.block_size}')
        if start and T > 1:
            raise ValueError(f'cannot add {T} tokens to a cache that holds some: valid is 1')
        if cache and len(idx) not in (1, cache[0].keys.batch):
            raise ValueError(f'cannot add {len(idx)} sequences to a cache of {cache[0].keys.batch}')
        pos = torch.arange(start, start + T, device=idx.device)     # (T)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))        # (B, T, C)
        last = self.config.n_layer - 1
        for i, block in enumerate(self.transformer.h):
            try:
                x = block(x, cache and cache[i], only_last=i == last and targets is None)
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

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, use_cache=True, top_p=None, seed=None):
        """Yield max_new_tokens next tokens of idx (B, T), each (B, 1), as they are drawn (see runtime/draw.py).

        The context is the last block_size tokens; up to there keys and values are cached, unless use_cache is False.
        Beyond, each token shifts the window and with it all learned positions, so nothing cached is true any more: as
        in nanoGPT, the whole window is computed for each token, but for what only earlier positions of the last layer
        would need. 'sequence' scope computes the whole prefix from the start, for a new token changes V of all earlier
        ones (a warning says so once), and so does a model in training mode, whose dropout a cache would freeze.

        One prompt that is expanded to B rows (`Tensor.expand`) is computed once. seed: of a generator of its own; None:
        torch's global one. Raises ValueError for options that cannot be, FloatingPointError for logits that are not
        finite.
        """
        check_draw(temperature, top_k, top_p)
        if max_new_tokens < 0:
            raise ValueError(f'max_new_tokens={max_new_tokens}: must be at least 0')
        if use_cache and self.config.svd_sees_future:
            warnings.warn("svd_scope='sequence': a new token changes V of all earlier ones, so no cache is used and "
                          'the prefix is recomputed for each')
        (B, T), block_size = idx.shape, self.config.block_size
        generator = None if seed is None else torch.Generator(idx.device).manual_seed(seed)
        cache, one_prompt = None, False
        if not self.training:                                       # where dropout differs from row to row, too
            one_prompt = B > 1 and idx.stride(0) == 0
            if use_cache and max_new_tokens > 1 and not self.config.svd_sees_future:
                cache = self.new_cache(B, min(T + max_new_tokens - 1, block_size))  # nothing follows the last token
        ids = torch.cat((idx, idx.new_empty(B, max_new_tokens)), dim=1)
        for n in range(T, T + max_new_tokens):                      # n tokens so far
            window = ids[:1 if one_prompt and n == T else B, max(0, n - block_size):n]
            if cache and n > block_size:                            # all positions shift
                for layer in cache:
                    layer.clear()
            new = window[:, cache[0].keys.length:] if cache else window
            logits = self(new, cache=cache)[0][:, -1].expand(B, -1)                             # (B, vocab)
            ids[:, n:n + 1] = token = draw(logits, temperature, top_k, top_p, generator)
            yield token

    def new_cache(self, batch, tokens):
        """Room for keys and values of `batch` sequences of `tokens` tokens: a list of LayerCache, in the parameters'
        dtype, or autocast's where it is on. Raises ValueError for more than block_size tokens and for 'sequence' scope
        that truncates."""
        if not 1 <= tokens <= self.config.block_size:
            raise ValueError(f'cannot cache {tokens} tokens: valid are 1 to block_size={self.config.block_size}')
        if self.config.svd_sees_future:
            raise ValueError("svd_scope='sequence': V of earlier tokens changes with each new one and cannot be cached")
        return [block.attn.new_cache(batch, tokens) for block in self.transformer.h]

    def kv_cache_bytes(self, batch, tokens):
        """Bytes of the cache when `batch` sequences have `tokens` tokens, of which it keeps block_size at most; 0 where
        nothing is cached, in 'sequence' scope. The factors of W_v that 'weight' scope decodes with, as large whatever
        the tokens, are weights and not among them."""
        if self.config.svd_sees_future:
            return 0
        tokens = min(tokens, self.config.block_size)
        return batch * self.config.n_layer * self.transformer.h[0].attn.new_cache(1, tokens, 'meta').nbytes

    def get_num_params(self, non_embedding=True):
        """Number of parameters, without the position embeddings by default (the token embeddings are the head)."""
        n_params = sum(p.numel() for p in self.parameters())
        return n_params - self.transformer.wpe.weight.numel() if non_embedding else n_params

    def crop_block_size(self, block_size):
        """Shorten the context in place, for example of a GPT-2 checkpoint (1024), by dropping late positions."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f'block_size={block_size}: can only be cropped to 1..{self.config.block_size}')
        self.config.block_size = block_size
        self.transformer.wpe = nn.Embedding.from_pretrained(self.transformer.wpe.weight[:block_size].detach().clone(),
                                                            freeze=False)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """nanoGPT's AdamW: one group that decays (everything with two dimensions), one that does not, in its order of
        parameters, so optimizer states move between the two repos. Fused where the device has the kernel."""
        decay = [p for p in self.parameters() if p.requires_grad and p.dim() >= 2]
        no_decay = [p for p in self.parameters() if p.requires_grad and p.dim() < 2]
        groups = [{'params': decay, 'weight_decay': weight_decay}, {'params': no_decay, 'weight_decay': 0.0}]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=device_type in ('cpu', 'cuda', 'mps'))

    def estimate_mfu(self, fwdbwd_per_iter, dt, flops_promised=312e12):
        """Model FLOPs utilisation of fwdbwd_per_iter sequences in dt seconds, as a fraction of flops_promised a second
        (default: an A100 in bfloat16). FLOPs after PaLM (arXiv:2204.02311), appendix B; the SVD is not counted."""
        cfg = self.config
        flops_per_token = 6 * self.get_num_params() + 12 * cfg.n_layer * cfg.n_embd * cfg.block_size
        return flops_per_token * cfg.block_size * fwdbwd_per_iter / dt / flops_promised

    @classmethod
    def from_checkpoint(cls, saved, **overrides):
        """The model of a checkpoint dict, this repo's or nanoGPT's: its `model_args` and `model` (a state dict) are all
        that is needed. overrides: fields that add no parameters. Raises ValueError where the three do not fit."""
        args, state = fitting_weights(saved, GPTConfig.__dataclass_fields__)
        model = cls(GPTConfig(**{**args, **overrides}))
        try:
            model.load_state_dict(state)
        except RuntimeError as e:                                   # names and shapes, over many lines
            raise ValueError(f'its weights do not fit its model_args: {" ".join(str(e).split())[:300]}') from None
        model.svd_basis = saved.get('svd_basis')
        return model

    @classmethod
    def from_pretrained(cls, name_or_folder, override_args=None):
        """GPT-2's published weights: 'gpt2', 'gpt2-medium', 'gpt2-large' or 'gpt2-xl', from the Hugging Face cache or
        hub, or a folder in their format, whose resid_pdrop is the dropout. override_args: fields that add no parameters
        (dropout, the SVD options). Raises ValueError for other names and fields, and what cannot be had or used."""
        for key in override_args or {}:
            if key not in GPTConfig.__dataclass_fields__:
                raise ValueError(f'{key}: no such field')
            if key != 'dropout' and 'svd' not in key:
                raise ValueError(f'{key}={override_args[key]}: the shape of {name_or_folder} is fixed')
        args, state = pretrained.read(name_or_folder)
        return cls.from_checkpoint({'model_args': args, 'model': state}, **override_args or {})

    def advance_svd_basis(self, average=None, completed=True):
        """To be called after every optimizer step: 'randomized' starts the next one from this one's V, else every step
        from the same random basis. average: of a tensor over processes; completed: False if nothing was updated."""
        subspace.advance(subspace.running_bases(self), average, completed)

    @property
    def svd_basis(self):
        """Where 'randomized' starts, (n_layer, nh, hs, k), None before the first step. A checkpoint keeps it. Set
        to None, or to what has another shape, of another rank say: a cold start."""
        return subspace.saved_state(subspace.running_bases(self))

    @svd_basis.setter
    def svd_basis(self, bases):
        subspace.load_state(subspace.running_bases(self), bases)

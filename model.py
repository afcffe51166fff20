"""
A GPT in one file. Its parameters have nanoGPT's names and shapes (github.com/karpathy/nanoGPT,
MIT). Options add a truncated SVD of the value matrix V of each head, grouped and narrower heads,
multi-head latent attention (MLA: keys and values from one latent vector per token), low-rank
layers, adaptive SVD and LoRA.

Where the SVD happens: each attention layer has a module `head_svd['v']` (lowrank/head_svd.py). In
'sequence' and 'causal' scope it truncates V itself (CausalSelfAttention.apply_svd_to_v). In
'weight' scope it truncates W_v, the weight that makes V (CausalSelfAttention.head_weight). The
module also builds the part of the cache that holds V. `head_svd['q']` and `head_svd['k']` truncate
queries and keys in the same way, if `svd_targets` names them. Queries are not cached.

What the SVD costs: it makes training slower and saves no memory in training (docs/SVD.md). In
decoding, 'causal' and 'weight' save memory. Per token and head the cache keeps hs values of K, and
of V

    no SVD       hs values
    'causal'     hs values before the first basis, then k; a basis per block of tokens, and V^T V
    'weight'     k values
    'sequence'   no cache: a new token changes V of all earlier tokens, so the whole prefix is
                 recomputed for each new token

At full rank nothing changes. 'sequence' takes the best rank-k approximation of V, and 'weight'
takes the best rank-k approximation of W_v. 'causal' projects V of each token onto k directions that
come from earlier tokens. This is not the best approximation of V, but no token depends on later
tokens. 'randomized' has a few percent more error. Decoding with a cache computes the same function
as a forward pass over the whole prefix, up to rounding.

Where MLA happens: `LatentProjection` replaces `QKVProjection`. `LatentProjection` computes keys
U_k c and values U_v c from a latent c of d values per token. The cache keeps c instead of 2C values
per token and layer, and in 'causal' scope also the bases of V. Training and prompts compute all
keys and values. A single new token attends to the latents directly: U_k is multiplied into its
query, and U_v is applied to the weighted sum (lowrank/kv_cache.py). Both ways agree up to rounding
(docs/MLA.md).

With n_kv_head = nkv < nh, each head of keys and values serves nh / nkv heads of queries
(grouped-query attention, arXiv:2305.13245). With qk_head_dim and v_head_dim, the heads of a layer
are narrower than hs, while the scores are still divided by sqrt(hs) (docs/HEADS.md). With mlp_dim,
the MLPs have fewer neurons than 4C (docs/COMPRESSION.md).

Letters: B batch, T tokens, C = n_embd, nh heads, nkv key/value heads, hs = C / nh head size,
k = svd_rank, d latent size.
"""

import math
import warnings
from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal

import torch
import torch.nn as nn
from torch.nn import functional as F

from lowrank.adapters import AdapterTargets, adaptive_layers, inject_adapters, split_words
from lowrank.adaptive_layer import PROTECTIONS
from lowrank.head_svd import SCOPES, WeightSVD, build_head_svd, why_off
from lowrank.kv_cache import (DenseValues, KeyValueCache, LatentCache, attention,
                              validate_positions)
from lowrank.layers import (INITS, LowRankLinear, SplitProjection, bias_per_head, init_weight,
                            split_heads)
from lowrank.spectrum import effective_rank, energy_kept
from lowrank.subspace_iteration import WarmStartBasis, follow_optimizer, get_bases, set_bases
from lowrank.svd import METHODS, low_rank_approximation
from runtime import checkpoint, huggingface
from runtime.config import (OVERRIDABLE, Needs, Range, Section, UserError, check_all, marked,
                            validate)
from runtime.distributed import mean_over_processes
from runtime.generation import stream as sample_stream
from runtime.optimizer import adamw

SVD = Needs(use_svd=True), OVERRIDABLE
CAUSAL = Needs(use_svd=True, svd_scope='causal'), OVERRIDABLE
RANDOMIZED = Needs(use_svd=True, svd_method='randomized'), OVERRIDABLE
ADAPTIVE, LORA = Needs(adaptive_svd=True), Needs(has_lora=True)
# target of the SVD -> key of its warm-start bases in a checkpoint
BASIS_KEYS = dict(v='svd_basis', q='svd_basis_q', k='svd_basis_k')
# layer with the rows of several heads -> which of queries, keys and values it makes
HEAD_PARTS = dict(c_q='q', c_k='k', c_v='v', query='q', k_up='k', v_up='v')
# word of adaptive_svd_targets or lora_targets -> layer of a block
TARGETS = {'c_q': 'attn.c_attn.c_q', 'c_k': 'attn.c_attn.c_k', 'c_v': 'attn.c_attn.c_v',
           'query': 'attn.c_attn.query', 'c_proj': 'attn.c_proj', 'c_fc': 'mlp.c_fc',
           'mlp.c_proj': 'mlp.c_proj'}


@dataclass
class GPTConfig(AdapterTargets):
    """Configuration of a `GPT`, stored in checkpoints as the dict `model_args`. Fields marked
    OVERRIDABLE change no parameter and may differ from the values in a checkpoint. Raises
    ValueError for an impossible value, with a message that starts with the name of the field."""
    block_size: Annotated[int, 'context length in tokens', Range(1), Section('model')] = 1024
    vocab_size: Annotated[int, 'number of token ids', Range(1)] = 50304  # GPT-2's 50257, padded
    n_layer: Annotated[int, 'number of transformer blocks', Range(1, below=10000)] = 12
    n_head: Annotated[int, 'attention heads per block', Range(1)] = 12
    n_kv_head: Annotated[int | None, 'heads of keys and values; None: n_head',
                         Range(1)] = None
    n_embd: Annotated[int, 'embedding size; a multiple of n_head', Range(1)] = 768
    dropout: Annotated[float, 'dropout probability', Range(0, below=1), OVERRIDABLE] = 0.0
    bias: Annotated[bool, 'biases in Linear and LayerNorm; False is slightly faster'] = True
    gelu: Annotated[Literal['exact', 'tanh'], "GELU: 'exact' (nanoGPT) or 'tanh' (GPT-2)"] = 'exact'
    weight_init: Annotated[Literal['gpt2', 'mimetic'], "'gpt2'; 'mimetic': attention to nearby "
                           'tokens, larger c_fc'] = 'gpt2'
    use_svd: Annotated[bool, 'truncate V of each attention head by an SVD', OVERRIDABLE,
                       Section('SVD on V')] = False
    svd_targets: Annotated[str, "what to truncate: any of q,k,v", *SVD] = 'v'
    svd_rank: Annotated[int | None, 'rank kept per head; None: full rank', Range(1), *SVD] = None
    svd_rank_q: Annotated[int | None, 'rank of queries; None: svd_rank', Range(1),
                          Needs(svd_on_q=True), *SVD] = None
    svd_rank_k: Annotated[int | None, 'rank of keys; None: svd_rank', Range(1),
                          Needs(svd_on_k=True), *SVD] = None
    svd_method: Annotated[Literal[METHODS], "'gram': eigh; 'standard': svd, slower; 'randomized': "
                          'approximate', *SVD] = 'gram'
    svd_scope: Annotated[Literal[SCOPES], "'sequence': truncate V, sees later tokens; "
                         "'causal': project V onto a basis of earlier tokens; 'weight': truncate "
                         'W_v', *SVD] = 'sequence'
    svd_block: Annotated[int, "'causal' scope: tokens before the first basis", Range(1),
                         *CAUSAL] = 32
    svd_basis_grad: Annotated[bool, "False: no gradient through the basis; for 'sequence'",
                              *SVD] = True
    svd_power_iters: Annotated[int, "'randomized': power iterations of a cold start",
                               Range(0), *RANDOMIZED] = 2
    svd_oversample: Annotated[int, "'randomized': columns of a cold start beyond svd_rank + 4",
                              Range(0), *RANDOMIZED] = 0
    use_mla: Annotated[bool, 'multi-head latent attention: K and V from one latent per token',
                       Section('MLA and low-rank layers')] = False
    mla_latent_dim: Annotated[int | list[int] | None, 'size; None: n_embd / 4', Range(1),
                              Needs(use_mla=True)] = None
    qk_head_dim: Annotated[list[int] | None,
                           'q and k width per layer, set by compress.py'] = None
    v_head_dim: Annotated[list[int] | None, 'v width per layer, set by compress.py'] = None
    mlp_dim: Annotated[list[int] | None, 'MLP neurons per layer, set by compress.py'] = None
    layer_ranks: Annotated[dict[str, int] | None, 'low-rank layers, set by compress.py'] = None
    adaptive_svd: Annotated[bool, 'protect learned weights from gradients that overwrite them',
                            Section('adaptive SVD')] = False
    adaptive_svd_target_layer: Annotated[int, 'index of the block to protect; -1: all blocks',
                                         Range(-1), ADAPTIVE] = 0
    adaptive_svd_targets: Annotated[str, 'layers out of c_q,c_k,c_v,c_proj; with MLA out of '
                                    'query,c_proj', ADAPTIVE] = 'c_q'
    adaptive_svd_protection: Annotated[Literal[PROTECTIONS], "'left': protected directions cannot "
                                       "change; 'none': they can", ADAPTIVE, OVERRIDABLE] = 'left'
    adaptive_svd_ranks: Annotated[dict[str, int] | None, 'low-rank mode: ranks, set by training',
                                  ADAPTIVE] = None
    lora_rank: Annotated[int | None, 'adapter rank; weights are frozen; None: no LoRA', Range(1),
                         Section('LoRA')] = None
    lora_alpha: Annotated[float | None, 'adapters are scaled by alpha / rank; None: by 1',
                          Range(above=0), LORA] = None
    lora_dropout: Annotated[float, 'dropout of adapter inputs; not where '
                            "'weight' scope truncates", Range(0, below=1), LORA, OVERRIDABLE] = 0.0
    lora_targets: Annotated[str, 'out of c_q,c_k,c_v (MLA: query),c_proj,c_fc,mlp.c_proj',
                            LORA] = 'c_q,c_v'
    lora_init: Annotated[Literal[INITS], "adapters start from zero ('lora'), or from the largest "
                         "('pissa') or smallest ('milora') singular components of the weights",
                         LORA] = 'lora'

    def __post_init__(self):
        validate(self)
        self.check_shape()
        self.check_layers()

    def check_shape(self):
        if self.n_embd % self.n_head:
            nearest = max(1, round(self.n_embd / self.n_head)) * self.n_head
            raise ValueError(f'n_embd={self.n_embd}: not a multiple of n_head={self.n_head} '
                             f'(nearest: {nearest})')
        if self.use_mla and not isinstance(self.mla_latent_dim, list) and (
                self.latent_dims[0] > self.n_embd):
            raise ValueError(f'mla_latent_dim={self.mla_latent_dim}: must be at most n_embd '
                             f'(nearest: {self.n_embd})')
        self.check_heads()

    def check_heads(self):
        if self.n_kv_head and self.n_head % self.n_kv_head:
            divisors = [n for n in range(1, self.n_head + 1) if self.n_head % n == 0]
            nearest = min(divisors, key=lambda n: abs(n - self.n_kv_head))
            raise ValueError(f'n_kv_head={self.n_kv_head}: must divide n_head={self.n_head} '
                             f'(nearest: {nearest})')
        for name in ('n_kv_head', 'qk_head_dim', 'v_head_dim'):
            if self.use_mla and getattr(self, name) is not None:
                raise ValueError(f'{name}={getattr(self, name)}: cannot be combined with '
                                 f'use_mla=True (nearest: --{name}=None)')
        for name in ['mla_latent_dim'] if self.use_mla else ['qk_head_dim', 'v_head_dim']:
            if self.use_svd and isinstance(getattr(self, name), list):
                raise ValueError(f'{name}={getattr(self, name)}: cannot be combined with '
                                 'use_svd=True (nearest: --use_svd=False)')
        for name, most in dict(qk_head_dim=self.head_size, v_head_dim=self.head_size,
                               mlp_dim=4 * self.n_embd, mla_latent_dim=self.n_embd).items():
            dims = getattr(self, name)
            if isinstance(dims, list) and not (
                    len(dims) == self.n_layer and all(1 <= dim <= most for dim in dims)):
                nearest = [min(max(dim, 1), most) for dim in [*dims, *[most] * self.n_layer]]
                raise ValueError(f'{name}={dims}: must be {self.n_layer} numbers from 1 to {most} '
                                 f'(nearest: {nearest[:self.n_layer]})')
        self.svd_target_names                           # raises ValueError for other words

    @property
    def latent_dims(self) -> list[int]:
        """Latent size of each layer."""
        size = self.mla_latent_dim or max(1, self.n_embd // 4)
        return size if isinstance(size, list) else [size] * self.n_layer

    @property
    def latent_summary(self):
        """Latent sizes of all layers, as text for a line of output, such as '16 or 24'."""
        return ' or '.join(map(str, sorted({*self.latent_dims})))

    @property
    def head_size(self):
        return self.n_embd // self.n_head

    @property
    def heads(self) -> dict[str, int]:
        """Numbers of heads of queries 'q', keys 'k' and values 'v'."""
        kv = self.n_kv_head or self.n_head
        return dict(q=self.n_head, k=kv, v=kv)

    @property
    def is_grouped(self):
        """Whether several heads of queries share a head of keys and values."""
        return self.heads['k'] < self.n_head

    def head_inputs(self, name):
        """Return the number of inputs of queries 'q', keys 'k' or values 'v': C, or the largest d
        for keys and values of MLA."""
        return max(self.latent_dims) if self.use_mla and name != 'q' else self.n_embd

    def head_dims(self, layer) -> dict[str, int]:
        """Widths of queries, keys and values of a head in a layer."""
        qk, v = (dims[layer] if dims else self.head_size
                 for dims in (self.qk_head_dim, self.v_head_dim))
        return dict(q=qk, k=qk, v=v)

    def neurons(self, layer):
        """Number of neurons of the MLP of a layer."""
        return self.mlp_dim[layer] if self.mlp_dim else 4 * self.n_embd

    @property
    def attention_widths(self) -> list[int]:
        """Multiplications per query and key, in all heads of each layer."""
        dims = map(self.head_dims, range(self.n_layer))
        return [self.n_head * (width['k'] + width['v']) for width in dims]

    @property
    def targets(self):
        """Words of adaptive_svd_targets and lora_targets -> layers of a block."""
        absent = ('c_q', 'c_k', 'c_v') if self.use_mla else ('query',)
        return {word: part for word, part in TARGETS.items() if word not in absent}

    @property
    def layer_shapes(self):
        """Layers that options can name, such as 'h.0.mlp.c_fc' -> weight shape (m, n)."""
        C, shapes = self.n_embd, {}
        for i in range(self.n_layer):
            rows = {name: heads * self.head_dims(i)[name] for name, heads in self.heads.items()}
            block = {'c_q': (rows['q'], C), 'c_k': (rows['k'], C), 'c_v': (rows['v'], C),
                     'query': (C, C), 'c_proj': (C, self.n_head * self.head_dims(i)['v']),
                     'c_fc': (self.neurons(i), C), 'mlp.c_proj': (C, self.neurons(i))}
            shapes |= {f'h.{i}.{part}': block[word] for word, part in self.targets.items()}
        return shapes

    @property
    def svd_target_names(self):
        """Targets of the SVD, out of 'q', 'k' and 'v'."""
        words = split_words('svd_targets', self.svd_targets, ('q', 'k', 'v'))
        return [name for name in 'qkv' if name in words]

    @property
    def svd_on_q(self):
        return 'q' in self.svd_target_names

    @property
    def svd_on_k(self):
        return 'k' in self.svd_target_names

    def rank_of(self, name):
        """Return the rank of the SVD of queries 'q', keys 'k' or values 'v', or None."""
        return dict(q=self.svd_rank_q, k=self.svd_rank_k).get(name) or self.svd_rank

    def why_svd_off(self, name):
        """'off' and the reason why the SVD does not change a target, or '' if it truncates."""
        return why_off(self.use_svd, self.rank_of(name), self.svd_scope, self.svd_block,
                       self.block_size, self.head_size, self.head_inputs(name))

    @property
    def svd_ranks(self) -> dict[str, int]:
        """Targets that the SVD truncates -> rank."""
        return {name: self.rank_of(name) for name in self.svd_target_names
                if not self.why_svd_off(name)}

    @property
    def svd_off(self):
        """'off' and the reason why the SVD changes nothing, or '' if it truncates."""
        return '' if self.svd_ranks else self.why_svd_off(self.svd_target_names[-1])

    @property
    def svd_truncates(self):
        return bool(self.svd_ranks)

    @property
    def svd_summary(self):
        """What the SVD does to the targets, as text for a line of output."""
        ranks = [str(self.svd_ranks.get(name, 'full')) for name in self.svd_target_names]
        ranks = ranks[:1] if len({*ranks}) == 1 else ranks
        return self.svd_off or (f'rank {", ".join(ranks)} of {self.head_size}, {self.svd_method}, '
                                f'{self.svd_scope}')

    @property
    def svd_names(self):
        """Targets of the SVD, as text for a line of output, such as 'K, V'."""
        return ', '.join(self.svd_target_names).upper()

    @property
    def is_noncausal(self):
        """Whether outputs depend on later tokens. Parallel and prefix-only loss then differ."""
        return self.svd_scope == 'sequence' and self.svd_truncates


class QKVProjection(nn.Linear):
    """Queries, keys and values of all heads from one layer, nanoGPT's c_attn. Its weight is W_q
    (nh width, C), W_k and W_v (nkv width, C), stacked. `heads` and `rows` are the numbers of heads
    and of rows of the three."""

    def __init__(self, config, layer=0):
        heads, dims = config.heads, config.head_dims(layer)
        rows = [heads[name] * dims[name] for name in 'qkv']
        super().__init__(config.n_embd, sum(rows), bias=config.bias)
        self.heads, self.rows = heads, rows

    def forward(self, x, weights=()):
        """x (B, T, C) -> q (B, nh, T, hs), k and v (B, nkv, T, hs). weights: 'q', 'k' or 'v' -> the
        weight per head (heads, hs, C) that is used in place of the layer's own weight."""
        weight = self.weight
        if weights:
            parts = self.parts(weight) | {name: w.flatten(0, 1) for name, w in weights.items()}
            weight = torch.cat([*parts.values()])
        return split_heads(self.heads, self.parts(F.linear(x, weight, self.bias), dim=2))

    def project_for_cache(self, x, down_proj):
        """x (B, T, C) -> q, k, v for a KeyValueCache. down_proj: in 'weight' scope, 'q', 'k' or 'v'
        -> weight (heads k, C) that gives coordinates (B, heads, T, k) in place of q, k or v. They
        need k / hs of the multiplications and memory."""
        if not down_proj:
            return self(x)
        w, b = self.parts(self.weight), {} if self.bias is None else self.parts(self.bias)
        return split_heads(self.heads, {
            name: F.linear(x, down_proj[name]) if name in down_proj else
            F.linear(x, w[name], b.get(name)) for name in self.heads})

    def parts(self, tensor, dim=0):
        """Split a tensor into the parts of queries, keys and values, along dim."""
        return dict(zip(self.heads, tensor.split(self.rows, dim)))

    @torch.no_grad()
    def init_mimetic(self):
        """Draw W_k with orthogonal rows of norm 0.5. W_q of each head equals W_k."""
        w = self.parts(self.weight)
        nn.init.orthogonal_(w['k'], gain=0.5)
        group = self.heads['q'] // self.heads['k']
        w['q'].copy_(self.head_weight('k').repeat_interleave(group, dim=0).flatten(0, 1))

    def head_weight(self, name):
        """Return the weight per head (heads, hs, C) of queries 'q', keys 'k' or values 'v', not
        truncated."""
        return self.parts(self.weight)[name].unflatten(0, (self.heads[name], -1))

    def head_bias(self, name):
        """Return the bias per head (heads, 1, hs) of 'q', 'k' or 'v', or None."""
        bias = None if self.bias is None else self.parts(self.bias)[name]
        return bias_per_head(self.heads[name], bias)


class LatentProjection(nn.Module):
    """Queries, keys and values of all heads with MLA. The methods are those of QKVProjection. Keys
    and values of all heads come from one latent c = W_a x of d values per token (DeepSeek-V2,
    arXiv:2405.04434, equations 9 to 11). Positions are learned, so there is no rotary part."""

    def __init__(self, config, layer=0):
        super().__init__()
        C, d, self.heads = config.n_embd, config.latent_dims[layer], config.heads
        self.query = nn.Linear(C, C, bias=config.bias)
        self.kv_down = nn.Linear(C, d, bias=False)                  # W_a
        self.k_up = nn.Linear(d, C, bias=False)                     # U_k; softmax cancels a bias
        self.v_up = nn.Linear(d, C, bias=config.bias)               # U_v

    def forward(self, x, weights=()):
        """x (B, T, C) -> q, k, v, each (B, nh, T, hs). weights: 'q', 'k' or 'v' -> the weight per
        head, W_q (nh, hs, C), U_k or U_v (nh, hs, d), that is used in place of the layer's own."""
        c = self.kv_down(x)                                         # (B, T, d)
        return split_heads(self.heads, {name: self.layer(name)(y) if name not in weights else
                                        F.linear(y, weights[name].flatten(0, 1),
                                                 self.layer(name).bias)
                                        for name, y in dict(q=x, k=c, v=c).items()})

    def project_for_cache(self, x, down_proj):
        """x (B, T, C) -> q (B, nh, T, hs), or its coordinates by down_proj['q'] (nh k, C), and
        latents (B, T, d), for a LatentCache."""
        q = F.linear(x, down_proj['q']) if 'q' in down_proj else self.query(x)
        return *split_heads(self.heads, dict(q=q)), self.kv_down(x)

    def layer(self, name):
        """Return the layer that makes queries 'q', keys 'k' or values 'v'."""
        return dict(q=self.query, k=self.k_up, v=self.v_up)[name]

    @torch.no_grad()
    def init_mimetic(self):
        """Draw U_k and U_v with orthogonal rows or columns in each head. Entries of U_v have the
        root mean square 0.02. Rows of U_k W_a have the root mean square norm 0.5, and a dense W_q
        is this product."""
        _, hs, d = self.head_weight('v').shape
        for up in (self.k_up, self.v_up):
            for head in up.weight.split(hs):
                nn.init.orthogonal_(head, gain=0.02 * max(hs, d) ** 0.5)
        keys = self.k_up.weight @ self.kv_down.weight               # (C, C)
        self.k_up.weight *= 0.5 * len(keys) ** 0.5 / keys.norm()
        if isinstance(self.query, nn.Linear):                       # else low-rank
            self.query.weight.copy_(self.k_up.weight @ self.kv_down.weight)

    def head_weight(self, name):
        """Return W_q (nh, hs, C), U_k or U_v (nh, hs, d) per head, not truncated."""
        return self.layer(name).weight.unflatten(0, (self.heads[name], -1))

    def head_bias(self, name):
        """Return the bias per head (nh, 1, hs) of 'q', 'k' or 'v', or None."""
        return bias_per_head(self.heads[name], self.layer(name).bias)


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer=0):
        super().__init__()
        dims = config.head_dims(layer)
        self.c_attn = (LatentProjection if config.use_mla else QKVProjection)(config, layer)
        self.c_proj = nn.Linear(config.n_head * dims['v'], config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.dropout, self.svd_rank = config.dropout, config.svd_rank
        self.scale = 1 / math.sqrt(config.head_size)    # also for heads narrower than head_size
        self.head_svd = nn.ModuleDict({name: build_head_svd(
            config.svd_scope if name in config.svd_ranks else None, heads=config.heads[name],
            head_size=config.head_size, inputs=config.head_inputs(name), block=config.svd_block,
            basis_grad=config.svd_basis_grad, rank=config.svd_ranks.get(name),
            method=config.svd_method, power_iters=config.svd_power_iters,
            oversample=config.svd_oversample) for name in 'qkv'})

    def forward(self, x, cache=None, only_last=False):
        """x (B, T, C) -> (B, T, C), or the last position (B, 1, C) if only_last. With a cache, x
        continues the cached tokens, and the keys and values of x are added to the cache. The first
        call takes the whole prompt, each later call one token."""
        # kv is (k, v) without a cache. With a cache it is what `attend` adds to the cache: (k, v),
        # or their coordinates in 'weight' scope, or (latents,) with MLA
        q, *kv = self.project(x) if cache is None else (
            self.c_attn.project_for_cache(x, cache.down_proj))
        q = (self.head_svd['q'] if cache is None else cache.queries)(q)         # (B, nh, T, hs)
        q = q[:, :, -1:] if only_last else q
        if cache is None:
            k, v = self.head_svd['k'](kv[0]), self.apply_svd_to_v(kv[1])        # (B, nkv, T, hs)
            y = attention(q, k, v, self.scale, self.dropout * self.training, not only_last)
        else:
            y = cache.attend(q, *kv)
        y = y.transpose(1, 2).flatten(2)                            # -> (B, T or 1, nh width)
        return self.resid_dropout(self.c_proj(y))

    def project(self, x):
        """x (B, T, C) -> q (B, nh, T, hs), k and v (B, nkv, T, hs). In 'weight' scope, they come
        from truncated weights."""
        return self.c_attn(x, {name: self.head_weight(name) for name, svd in self.head_svd.items()
                               if isinstance(svd, WeightSVD)})

    def head_weight(self, name):
        """Return the weight per head that makes queries 'q', keys 'k' or values 'v': (heads, hs,
        C), or (nh, hs, d) for U_k and U_v of MLA. In 'weight' scope, targets of the SVD are
        truncated to their rank per head. `c_attn.head_weight` is never truncated."""
        return self.head_svd[name].truncate_weight(self.c_attn.head_weight(name))

    def apply_svd_to_v(self, v):
        """Truncate V (B, nkv, T, hs) -> same shape and dtype. 'sequence' scope returns the best
        rank-k approximation per head. 'causal' projects V of each token onto k directions from
        earlier tokens. 'weight' scope, and attention without SVD on V, return V itself. The
        computation is in at least float32."""
        return self.head_svd['v'](v)

    def _standard_svd_reconstruction(self, v, rank=None):
        """Return the best rank-k approximation of V by torch.linalg.svd, for tests. rank=None means
        svd_rank."""
        return low_rank_approximation(v, rank or self.svd_rank, 'standard')

    @torch.no_grad()
    def head_statistics(self, x, name):
        """x (B, T, C) -> {'energy_kept': (heads), 'effective_rank': (heads)}. These are the
        fraction of the energy of Q, K or V (name 'q', 'k' or 'v') that the SVD keeps, and the
        effective rank before the SVD, per head, averaged over the batch."""
        i = 'qkv'.index(name)
        before, after = self.c_attn(x)[i], self.head_svd[name](self.project(x)[i])
        return {'energy_kept': energy_kept(before, after).mean(0),
                'effective_rank': effective_rank(before).mean(0)}

    @torch.no_grad()
    def new_cache(self, batch, tokens, device=None):
        """Return an empty cache for `tokens` tokens of `batch` sequences, in the dtype of keys and
        values. device=None means the device of the weights."""
        weight = next(self.parameters())
        place, dtype = weight.device.type, weight.dtype
        if torch.is_autocast_enabled(place) and dtype != torch.float64:     # autocast skips float64
            dtype = torch.get_autocast_dtype(place)
        kind, c, svd = dict(dtype=dtype, device=device or weight.device), self.c_attn, self.head_svd
        weights = [c.head_weight(name) for name in 'qkv']           # (heads, hs, C or d) each
        q, k, v = (((batch, *w.shape[:1], tokens, w.size(1)), w, c.head_bias(name))
                   for name, w in zip('qkv', weights))
        queries = svd['q'].new_queries(*q, **kind)
        if isinstance(c, LatentProjection):
            latents = DenseValues((batch, tokens, c.kv_down.out_features), **kind)
            return LatentCache(latents, svd['k'].new_latent_values(*k, **kind),
                               svd['v'].new_latent_values(*v, **kind), queries, self.scale)
        return KeyValueCache(svd['k'].new_values(*k, **kind), svd['v'].new_values(*v, **kind),
                             queries, self.scale)


class MLP(nn.Module):
    def __init__(self, config, layer=0):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.neurons(layer), bias=config.bias)
        self.c_proj = nn.Linear(config.neurons(layer), config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.approximate = 'tanh' if config.gelu == 'tanh' else 'none'

    def forward(self, x):                                           # (B, T, C) -> (B, T, C)
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate)))


class Block(nn.Module):
    def __init__(self, config, layer=0):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config, layer)

    def forward(self, x, cache=None, only_last=False):
        """x (B, T, C) -> (B, T, C), or the last position (B, 1, C) if only_last."""
        y = self.attn(self.ln_1(x), cache, only_last)
        x = (x[:, -1:] if only_last else x) + y
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config, i) for i in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight           # tied, as in GPT-2
        for name, rank in (config.layer_ranks or {}).items():
            m, n = config.layer_shapes[name]
            self.set_layer(name, LowRankLinear(n, m, rank, config.bias))
        self.init_weights()
        inject_adapters(self)

    def get_layer(self, name) -> nn.Module:
        """Return a layer of config.layer_shapes by name. If the name is a part of a fused c_attn,
        c_attn is split first."""
        attn = self.transformer.h[int(name.split('.')[1])].attn
        if '.c_attn.' in name and isinstance(attn.c_attn, QKVProjection):
            attn.c_attn = SplitProjection(attn.c_attn)
        return self.transformer.get_submodule(name)

    def set_layer(self, name, layer):
        self.get_layer(name)
        self.transformer.set_submodule(name, layer)

    def add_adapters(self, **options):
        """Add adaptive SVD or LoRA to trained weights. Do nothing if the options ask for neither,
        or if the model has one of them already. options: fields of GPTConfig. Raises ValueError for
        options that do not fit."""
        wanted = options.get('adaptive_svd') or options.get('lora_rank') is not None
        if wanted and not (self.config.adaptive_svd or self.config.has_lora):
            self.config = replace(self.config, **options | dict(adaptive_svd_ranks=None))
            inject_adapters(self, from_trained=True)

    def init_weights(self):
        """Initialize as GPT-2: weights N(0, 0.02), biases 0, LayerNorm weights 1. The 2 n_layer
        projections that write to the residual stream (attn.c_proj, mlp.c_proj) get a standard
        deviation of 0.02 / sqrt(2 n_layer). Random numbers are drawn in nanoGPT's order, so equal
        seeds give equal weights. With MLA, U_k and U_v are drawn as above, and W_a gets orthogonal
        rows with entries of about 1 / sqrt(d). The products then have the standard deviation of a
        single weight, and a step of U_v changes its product as much as the same step changes a
        single weight."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, mean=0.0, std=0.02)
                if getattr(module, 'bias', None) is not None:
                    nn.init.zeros_(module.bias)
        for block in self.transformer.h:
            last = block.attn.c_proj, block.mlp.c_proj
            for layer in last:
                init_weight(layer, 0.02 / math.sqrt(2 * self.config.n_layer))
            for module in block.modules():
                if isinstance(module, LatentProjection):
                    gain = math.sqrt(module.kv_down.in_features / module.kv_down.out_features)
                    nn.init.orthogonal_(module.kv_down.weight, gain)
                elif isinstance(module, LowRankLinear) and module not in last:
                    init_weight(module, 0.02)
        if self.config.weight_init == 'mimetic':
            self.init_mimetic()

    @torch.no_grad()
    def init_mimetic(self):
        """Initialize positions, queries and keys so that attention starts at nearby tokens, as in
        trained models (mimetic initialization, Trockman and Kolter, arXiv:2305.09828), and c_fc so
        that GELU is not almost linear.

        Position embeddings are sinusoids (Vaswani et al., arXiv:1706.03762) in the first quarter
        of the columns, with amplitude 0.2 and wavelengths from 6 to below 630 tokens. W_q equals
        W_k, so that the score of two tokens is larger if they are more similar. c_fc has the
        standard deviation sqrt(2 / n_embd) (He et al., arXiv:1502.01852)."""
        wpe = self.transformer.wpe.weight[:, :max(2, self.config.n_embd // 4)]      # (T, m)
        column = torch.arange(wpe.size(1))
        angles = torch.arange(len(wpe))[:, None] / 100 ** (column // 2 * 2 / wpe.size(1))
        wpe.copy_(0.2 * torch.where(column % 2 == 0, angles.sin(), angles.cos()))
        for block in self.transformer.h:
            block.attn.c_attn.init_mimetic()
            init_weight(block.mlp.c_fc, math.sqrt(2 / self.config.n_embd))

    def forward(self, idx, targets=None, cache=None):
        """Predict the next tokens: idx (B, T) token ids, targets (B, T) or None -> logits, loss.

        With targets: logits (B, T, vocab_size) and the mean cross-entropy in nats per token, where
        targets of -1 do not count. Without targets: logits of the last position (B, 1, vocab_size)
        and None. With a cache (`new_cache`), idx continues the cached tokens, and the keys and
        values of idx are added to the cache. The first call takes the whole prompt, each later call
        one token. With a cache there are no gradients. Raises ValueError for more than block_size
        tokens and for tokens that do not fit into the cache.
        """
        if cache and torch.is_grad_enabled():                       # the cache is written in place
            with torch.no_grad():
                return self.forward(idx, targets, cache)
        T, start = idx.size(1), validate_positions(cache, idx, self.config.block_size)
        pos = torch.arange(start, start + T, device=idx.device)     # (T)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
        for i, block in enumerate(self.transformer.h):              # x (B, T, C)
            only_last = targets is None and i == self.config.n_layer - 1
            x = block(x, cache and cache[i], only_last)
        logits = self.lm_head(self.transformer.ln_f(x))             # (B, T or 1, vocab_size)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1),
                                       ignore_index=-1)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k: int | None = None,
                 use_cache=True, top_p: float | None = None, seed: int | None = None):
        """Continue idx (B, T) by max_new_tokens tokens -> (B, T + max_new_tokens). See `stream`."""
        return torch.cat((idx, *self.stream(idx, max_new_tokens, temperature, top_k, use_cache,
                                            top_p, seed)), dim=1)

    def stream(self, idx, max_new_tokens, temperature=1.0, top_k: int | None = None,
               use_cache=True, top_p: float | None = None, seed: int | None = None):
        """Yield the tokens that continue idx (B, T), each (B, 1), by `runtime.generation.stream`.
        In 'sequence' scope and in training mode, the whole prefix is recomputed for each token.
        'sequence' scope warns about the recomputation."""
        if use_cache and self.config.is_noncausal:
            warnings.warn(f"svd_scope='sequence': a new token changes {self.config.svd_names} of "
                          'all earlier tokens, so the whole prefix is recomputed for each new '
                          'token', stacklevel=2)
        return sample_stream(self, idx, max_new_tokens, temperature, top_k, top_p, seed,
                             use_cache and not self.config.is_noncausal and not self.training)

    def new_cache(self, batch, tokens) -> list[KeyValueCache]:
        """Return a list with one empty cache per layer, for `tokens` tokens of `batch` sequences.
        Raises ValueError if an SVD in 'sequence' scope truncates V."""
        if self.config.is_noncausal:
            raise ValueError("svd_scope='sequence': a new token changes "
                             f'{self.config.svd_names} of all earlier tokens, so nothing can be '
                             'cached')
        return [block.attn.new_cache(batch, tokens) for block in self.transformer.h]

    def kv_cache_bytes(self, batch, tokens) -> int:
        """Return the bytes of a cache for `tokens` tokens (at most block_size) of `batch`
        sequences. Weights to which the cache refers do not count. The result is 0 if an SVD in
        'sequence' scope truncates V, because there is no cache then."""
        if self.config.is_noncausal:
            return 0
        tokens = min(tokens, self.config.block_size)
        return batch * sum(block.attn.new_cache(1, tokens, 'meta').nbytes
                           for block in self.transformer.h)

    def flops_per_token(self, tokens, decode=False) -> float:
        """Return the floating-point operations of the forward pass per token. The result is the
        mean over a prompt of `tokens` tokens. With decode=True it is the number for one new token
        after `tokens` cached tokens. Matrix products and attention count. The SVD does not
        count."""
        c, h = self.config, self.transformer.h
        *blocks, last, projection = (sum(p.numel() for p in part.parameters() if p.dim() == 2)
                                     for part in (*h, h[-1].attn.c_attn))
        head = self.lm_head.weight.numel()
        widths = c.attention_widths
        if decode:
            if c.use_mla:                                           # each head attends to latents
                widths = [2 * c.n_head * d for d in c.latent_dims]
            return 2 * (sum(blocks) + last + head + sum(widths) * (tokens + 1))
        once = last - projection + head + widths[-1] * tokens       # the last layer, one position
        pairs = sum(widths[:-1]) * (tokens + 1) / 2                 # (T + 1) / 2 keys per query
        return 2 * (sum(blocks) + pairs + projection + once / tokens)

    def estimate_mfu(self, fwdbwd_per_iter, dt, flops_promised=312e12):
        """Return the model FLOPs utilization (PaLM, arXiv:2204.02311, appendix B). It is the number
        of operations for fwdbwd_per_iter sequences in dt seconds, as a fraction of flops_promised
        per second (default: an A100 in bfloat16). The SVD does not count."""
        c = self.config
        flops_per_token = 6 * (self.get_num_params() + sum(c.attention_widths) * c.block_size)
        return flops_per_token * c.block_size * fwdbwd_per_iter / dt / flops_promised

    def get_num_params(self, non_embedding=True):
        """Return the number of parameters. Position embeddings do not count by default."""
        positions = self.transformer.wpe.weight.numel()
        return sum(p.numel() for p in self.parameters()) - non_embedding * positions

    def attention_params(self):
        """Return the number of parameters of all attention layers."""
        return sum(p.numel() for block in self.transformer.h for p in block.attn.parameters())

    def crop_block_size(self, block_size):
        """Shorten the context to block_size tokens, in place. Later positions are dropped."""
        assert 1 <= block_size <= self.config.block_size
        self.config.block_size, wpe = block_size, self.transformer.wpe.weight
        self.transformer.wpe = nn.Embedding.from_pretrained(wpe[:block_size].detach().clone(),
                                                            freeze=not wpe.requires_grad)

    def param_groups(self, weight_decay, per_head=False) -> dict[str, dict]:
        """Sort the trainable parameters into groups for an optimizer. Returns name -> group.
        Matrices of blocks ('hidden') and embeddings ('embedding') have weight_decay. Factors of
        adaptive layers, if there are any ('halved'), have weight_decay / 2. Biases and LayerNorms
        ('vector') have no decay. For Muon, each group has two lists, with one entry per parameter.
        'matrices' lists the numbers of rows of the matrices in the parameter. c_attn holds W_q, W_k
        and W_v. With per_head, the rows of each head in c_attn, query, k_up and v_up are a matrix.
        'rates' is a factor of the learning rate. It is 2 for a dense c_fc with
        weight_init='mimetic', which lowers the loss (docs/RESULTS.md), else 1."""
        adaptive = adaptive_layers(self).values()
        factors = {p for layer in adaptive for p in layer.factor_params()}
        decays = {'hidden': weight_decay, 'halved': weight_decay / 2, 'embedding': weight_decay,
                  'vector': 0.0}
        groups = {name: {'params': [], 'matrices': [], 'rates': [], 'weight_decay': decay}
                  for name, decay in decays.items() if name != 'halved' or adaptive}
        mimetic = self.config.weight_init == 'mimetic'
        for name, p in self.named_parameters():                     # tied weights appear once
            if p.requires_grad:
                kind = 'vector' if p.dim() < 2 else 'halved' if p in factors else (
                    'hidden' if name.startswith('transformer.h.') else 'embedding')
                path = name.removesuffix('.weight').removesuffix('.base')
                groups[kind]['params'].append(p)
                groups[kind]['matrices'].append(self.matrix_rows(path, p, per_head))
                groups[kind]['rates'].append(2.0 if mimetic and path.endswith('.c_fc') else 1.0)
        return groups

    def matrix_rows(self, path, p, per_head):
        """Return the numbers of rows of the matrices in a parameter p of the layer `path`. See
        `param_groups`."""
        layer, heads = path.split('.')[-1], self.config.heads
        parts = [(HEAD_PARTS.get(layer), len(p))]
        if layer == 'c_attn':
            parts = zip(heads, self.get_submodule(path).rows)
        counts = [(rows, heads[name] if name and per_head else 1) for name, rows in parts]
        return [rows // count for rows, count in counts for _ in range(count)]

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type: str):
        """Build nanoGPT's AdamW and register the step hook. Parameters with two dimensions decay.
        AdamW is fused if the device supports it."""
        optimizer = adamw(self.param_groups(weight_decay), learning_rate, betas, device_type)
        return self.register_step_hook(optimizer)

    def register_step_hook(self, optimizer):
        """Register a hook for the SVD method 'randomized', and return the optimizer. The hook
        updates the bases after each step of the optimizer. With the hook, a training step starts
        from the basis of the step before (warm start). Without the hook, each forward pass of
        training starts from the same random columns (cold start)."""
        for bases in self.warm_starts().values():
            follow_optimizer(bases, optimizer, mean_over_processes)
        return optimizer

    def warm_starts(self) -> dict[str, list[WarmStartBasis]]:
        """Return the warm starts of 'randomized' in all layers, by the key under which a checkpoint
        has their bases: 'svd_basis' for V, 'svd_basis_q' and 'svd_basis_k'."""
        found = {key: [module for block in self.transformer.h
                       for module in block.attn.head_svd[name].modules()
                       if isinstance(module, WarmStartBasis)] for name, key in BASIS_KEYS.items()}
        return {key: bases for key, bases in found.items() if bases}

    def extra_state(self) -> dict[str, torch.Tensor]:
        """Return what a checkpoint holds besides the weights: the bases of the warm start of
        'randomized', such as {'svd_basis': tensor}, or {} for a cold start."""
        bases = {key: get_bases(bases) for key, bases in self.warm_starts().items()}
        return {key: basis for key, basis in bases.items() if basis is not None}

    def load_extra_state(self, saved: dict):
        """Restore the result of `extra_state`. Missing bases and other shapes give a cold start."""
        for key, bases in self.warm_starts().items():
            set_bases(bases, saved.get(key))

    @torch.no_grad()
    def named_series(self, idx) -> dict[str, float]:
        """Measure values of each head on a batch idx (B, T), to be plotted over training. Returns a
        dict such as {'svd/block0.head1/energy_kept': 0.9}."""
        row = {}

        def record(i, attn, x):
            for target in self.config.svd_target_names:
                part = '' if target == 'v' else f'{target}.'        # block0.head1, block0.k.head1
                for name, heads in attn.head_statistics(x, target).items():
                    row.update({f'svd/block{i}.{part}head{head}/{name}': value
                                for head, value in enumerate(heads.tolist())})

        hooks = [block.attn.register_forward_pre_hook(lambda attn, inputs, i=i:
                                                      record(i, attn, inputs[0]))
                 for i, block in enumerate(self.transformer.h)]
        self(idx)
        for hook in hooks:
            hook.remove()
        return row

    @classmethod
    def from_checkpoint(cls, saved: dict, **overrides) -> 'GPT':
        """Build the model of a checkpoint dict of this repo or of nanoGPT, from its `model_args`,
        `model` and bases (see `extra_state`). overrides: new values for fields marked OVERRIDABLE.
        Raises ValueError if options or weights do not fit."""
        unknown = saved['model_args'].keys() - GPTConfig.__dataclass_fields__.keys()
        if unknown:
            raise ValueError('model_args has unknown fields: '
                             f'{", ".join(sorted(map(str, unknown)))}')
        args = check_all(GPTConfig, saved['model_args'], saved.get('path', 'model_args'))
        model = cls(GPTConfig(**args | overrides))
        checkpoint.load_weights(model, saved['model'])
        model.load_extra_state(saved)
        return model

    @classmethod
    def from_pretrained(cls, name_or_folder, override_args: dict | None = None) -> 'GPT':
        """Build the model of a name ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl') or of a
        folder: a run, an export of export.py, or Hugging Face's GPT-2 format. override_args: new
        values for fields marked OVERRIDABLE. Raises ValueError for other names or fields, and for
        files that cannot be read or used."""
        for key in override_args or {}:
            if key not in OVERRIDABLE_FIELDS:
                raise ValueError(f'{key}: is fixed by the weights of {name_or_folder}')
        saved = huggingface.read(name_or_folder)
        try:
            return cls.from_checkpoint(saved, **override_args or {})
        except ValueError as e:
            raise UserError(f'init_from={name_or_folder!r}: {e}') from None


OVERRIDABLE_FIELDS = marked(GPTConfig, OVERRIDABLE)
ADAPTER_DEFAULTS = {f.name: f.default for f in fields(GPTConfig)
                    if f.name.startswith(('adaptive', 'lora'))}

"""Convert ordinary attention in a trained model, so that its cache becomes smaller.

to_mla: multi-head latent attention. A layer computes keys and values [W_k; W_v] x from an input x
(C). After the conversion it computes [U_k; U_v] W_a x. W_a (d, C) maps x to a latent of d values.

to_gqa: grouped-query attention. Each group of key/value heads becomes their mean (GQA, Ainslie et
al., arXiv:2305.13245).

to_lowrank_heads: narrower heads. A score is q^T k, and a head adds W_o v to the output. Both are
bilinear, so N = L R^T of rank r can be put between the factors: q^T N k = (L^T q)^T (R^T k), and
W_o N v = (W_o L) (R^T v). L and R^T are multiplied into the weights and biases of q, k, v and W_o.
The cache then holds R^T k and R^T v, of r values each. N minimizes tr(G (I - N) S (I - N)^T), where
S is the covariance of k or v (lowrank/factorization.py). G is the mean of two metrics, scaled to
equal traces: E[g g^T] for the loss's gradients g at k or v, which gives the estimated increase of
the loss for small errors, and E[q q^T] or W_o^T W_o, which gives the error of scores or outputs.
Neither alone is best for all models (docs/RESULTS.md). Without calibration text, S and G come from
the weights, and N gives the SVD of W_q^T W_k and of W_o W_v (CLOVER, arXiv:2411.17426).
"""

from collections import Counter
from dataclasses import replace

import torch

from lowrank.factorization import Factorization, balance
from lowrank.layers import LowRankLinear
from model import GPT
from runtime import tracking
from tools.model_compression import (LayerStats, calibrate, check_share, dense_layers, sync_config)

HEADS_KEEP = 0.5                    # default fraction of the cache kept by narrower heads


def check_source(model, to):
    """Raise ValueError if a conversion does not support the attention of a model."""
    c = model.config
    if c.use_mla:
        raise ValueError(f'to={to!r}: the model has MLA already, with latents of {c.latent_dim} '
                         'values (nearest: the run before conversion)')
    if to == 'mla' and (c.is_grouped or c.qk_head_dim or c.v_head_dim):
        raise ValueError(f'to={to!r}: the model has grouped or narrower heads (nearest: the run '
                         'before conversion)')
    if to == 'lowrank_heads' and c.svd_truncates:
        nearest = ('merge it by export.py --to=nanogpt' if c.svd_scope == 'weight' else
                   'a run without SVD')
        raise ValueError(f'to={to!r}: the model has an SVD with svd_scope={c.svd_scope!r} '
                         f'(nearest: {nearest})')


def dense_attention(model, names):
    """Make the named layers of all blocks dense and fuse c_attn, in place. names: such as
    'c_attn'."""
    dense_layers(model, [name for name in model.config.layer_shapes
                         if name.split('.')[3] in names and name.split('.')[2] == 'attn'])
    return sync_config(model)


def rebuild(model, config, state):
    """Return a model with a new configuration. state: the tensors that differ from those of the
    given model, by name. All of c_attn must be in it."""
    kept = {name: w for name, w in model.state_dict().items() if '.c_attn.' not in name}
    like = model.lm_head.weight
    new = GPT(config).to(like).eval()
    # dtype first, because MPS has no float64
    new.load_state_dict(kept | {name: w.to(like.dtype) for name, w in state.items()})
    new.load_extra_state(model.extra_state())
    return new


def projections_of(model):
    """Return name -> c_attn of all blocks."""
    return {f'transformer.h.{i}.attn.c_attn': block.attn.c_attn
            for i, block in enumerate(model.transformer.h)}


# --------------------------------------------------------------------------------------------------
# multi-head latent attention

@torch.no_grad()
def to_mla(model, latent_dim, windows=()):
    """Return an MLA model with latents of latent_dim values per token.

    The given model is changed and cannot be used afterwards. Low-rank query layers stay low-rank.
    windows: from `calibration_windows`. The factors minimize the estimated increase of the loss on
    these windows. Without windows the factors come from the SVD of the weights. Raises ValueError
    if the model has MLA already or latent_dim does not fit.
    """
    check_source(model, 'mla')
    query_ranks = {name.replace('c_q', 'query'): rank for name, rank
                   in (model.config.layer_ranks or {}).items() if name.endswith('c_q')}
    dense_attention(model, ['c_attn'])
    config = replace(model.config, use_mla=True, mla_latent_dim=latent_dim, n_kv_head=None)
    stats, state, projections = {}, {}, projections_of(model)
    for name, block in zip(projections, model.transformer.h):
        # after 'weight' scope has truncated them, so that the factors do not exceed its rank
        weights = [block.attn.head_weight(part).flatten(0, 1) for part in 'kv']
        stats[name] = LayerStats(torch.cat(weights), config.bias)               # (2C, C)
    calibrate(model, projections, stats, windows, gradients=True)
    for name, c_attn in tracking.brief_bar(projections.items(), desc='convert', unit='layer'):
        for part, weight in latent_projection(c_attn, latent_dim, stats[name]).items():
            state[f'{name}.{part}'] = weight
    new = rebuild(model, config, state)
    for name, rank in query_ranks.items():
        new.set_layer(name, LowRankLinear.from_linear(new.transformer.get_submodule(name), rank))
    return sync_config(new)


def latent_projection(c_attn, latent_dim, stats):
    """Return the state dict of the `LatentProjection` that replaces a `QKVProjection`.

    stats: `LayerStats` of the stacked weight of keys and values. The bias of the values compensates
    for the mean error. Keys get no bias, because a bias of keys would not change the attention
    weights.
    """
    up, down = stats.factorization().factors(latent_dim)            # (2C, d), (d, C)
    k_up, v_up = up.chunk(2)
    parts = {'query.weight': c_attn.weight.chunk(3)[0], 'kv_down.weight': down,
             'k_up.weight': k_up, 'v_up.weight': v_up}
    if c_attn.bias is not None:
        b_q, _, b_v = c_attn.bias.cpu().double().chunk(3)
        lost = (stats.weight.chunk(2)[1] - v_up @ down) @ stats.mean                        # (C)
        parts |= {'query.bias': b_q, 'v_up.bias': b_v + lost}
    return parts


# --------------------------------------------------------------------------------------------------
# grouped-query attention

@torch.no_grad()
def to_gqa(model, n_kv_head: int | None = None):
    """Return a model with n_kv_head key/value heads, each the mean of a group of the model's heads.

    The given model is changed and cannot be used afterwards. Low-rank layers of c_attn become
    dense. None: half as many heads, or the next smaller divisor. Raises ValueError if the model has
    MLA or n_kv_head is not a smaller divisor of its number of key/value heads.
    """
    check_source(model, 'gqa')
    dense_attention(model, ['c_attn'])
    old, state = model.config.heads['k'], {}
    divisors = [n for n in range(1, old) if old % n == 0]
    if not divisors:
        raise ValueError("to='gqa': the model has a single key/value head (nearest: "
                         '--to=lowrank_heads)')
    new = n_kv_head or divisors[-1]
    if new not in divisors:
        nearest = min(divisors, key=lambda n: abs(n - new))
        raise ValueError(f'n_kv_head={new}: must be a divisor of {old}, the number of key/value '
                         f'heads, and smaller (nearest: {nearest})')
    for name, c_attn in projections_of(model).items():
        for kind, tensor in c_attn.named_parameters():
            parts = c_attn.parts(tensor)
            for part in 'kv':
                heads = parts[part].unflatten(0, (new, old // new, -1))     # (new, group, hs, ...)
                parts[part] = heads.mean(1).flatten(0, 1)
            state[f'{name}.{kind}'] = torch.cat([*parts.values()])
    return rebuild(model, replace(model.config, n_kv_head=new), state)


# --------------------------------------------------------------------------------------------------
# narrower heads

class HeadStats:
    """Statistics of keys and values per head over calibration tokens, and the weights of the layer,
    in float64 on the CPU."""

    def __init__(self, attn):
        def double(tensor):
            return None if tensor is None else tensor.detach().cpu().double()
        self.weights = {name: double(attn.c_attn.head_weight(name)) for name in 'qkv'}
        self.biases = {name: double(attn.c_attn.head_bias(name)) for name in 'qkv'}
        w_o, self.bias_o = double(attn.c_proj.weight), double(attn.c_proj.bias)
        self.w_o = w_o.unflatten(1, (attn.c_attn.heads['q'], -1)).transpose(0, 1)   # (nh, C, hs)
        self.query_gram = 0                                         # sum of q q^T (nh, hs, hs)
        # a bias of c_proj compensates for the mean error of values; a mean of keys has no effect
        centred = dict(k=True, v=self.bias_o is not None)
        self.stats = {name: [LayerStats(torch.eye(w.size(1)), centred[name]) for _ in w]
                      for name, w in self.weights.items() if name in centred}

    def add(self, x, g):
        """Add a batch of inputs x (N, C) and of gradients g (N, rows of W_k and W_v) at keys and
        values."""
        gradients = g.split([self.weights[name].shape[:2].numel() for name in 'kv'], dim=1)
        rows = {name: x.cpu().double() @ w.mT for name, w in self.weights.items()}
        if self.bias_o is not None:
            rows = {name: x + self.biases[name] for name, x in rows.items()}        # (heads, N, hs)
        self.query_gram = self.query_gram + rows['q'].mT @ rows['q']
        for (name, heads), g in zip(self.stats.items(), gradients):
            for stats, *pair in zip(heads, rows[name], g.unflatten(1, (len(heads), -1)).unbind(1)):
                stats.add(*pair)

    def factorizations(self, name):
        """Return the `Factorization` of N for each key/value head. name: 'k' or 'v'."""
        heads, w_q, w, found = self.stats[name], self.weights['q'], self.weights[name], []
        if self.bias_o is not None:                                 # the bias is one more input
            w_q = torch.cat((w_q, self.biases['q'].mT), dim=2)
        queries = self.query_gram if heads[0].tokens else w_q @ w_q.mT
        partner = queries if name == 'k' else self.w_o.mT @ self.w_o                # (nh, hs, hs)
        partner = partner.unflatten(0, (len(heads), -1)).sum(1)                     # (nkv, hs, hs)
        for stats, near, far in zip(heads, w @ w.mT, partner):
            if stats.tokens:
                near, g = stats.moments(), stats.gradients / stats.tokens
                far = (g + far * (g.trace() / far.trace().clamp_min(1e-300))) / 2
            found.append(Factorization(stats.weight, near, far))
        return found

    def narrow(self, factors):
        """Return the tensors of attention with narrower heads, name -> tensor.

        factors: 'k' and 'v' -> L (hs, r) and R^T (r, hs) of each key/value head. c_proj gets a bias
        that compensates for the mean error of the values.
        """
        group = len(self.weights['q']) // len(self.weights['k'])
        (up_k, down_k), (up_v, down_v) = (map(torch.stack, zip(*factors[name])) for name in 'kv')
        up_k, up_v = (up.repeat_interleave(group, dim=0) for up in (up_k, up_v))    # (nh, hs, r)
        cuts = dict(q=up_k.mT, k=down_k, v=down_v)                                  # (heads, r, hs)
        weights = [(cuts[name] @ w).flatten(0, 1) for name, w in self.weights.items()]
        tensors = {'c_attn.weight': torch.cat(weights),
                   'c_proj.weight': (self.w_o @ up_v).transpose(0, 1).flatten(1)}   # (C, nh r)
        if self.bias_o is not None:
            biases = [(b @ cuts[name].mT).flatten() for name, b in self.biases.items()]
            tensors['c_attn.bias'] = torch.cat(biases)
            mean = self.biases['v'].mT                              # without text: inputs of mean 0
            if self.stats['v'][0].tokens:
                mean = torch.stack([stats.mean for stats in self.stats['v']])[..., None]
            mean, kept = (x.repeat_interleave(group, dim=0) for x in (mean, down_v @ mean))
            lost = self.w_o @ (mean - up_v @ kept)                                  # (nh, C, 1)
            tensors['c_proj.bias'] = self.bias_o + lost.sum(0).squeeze(1)
        return tensors


@torch.no_grad()
def to_lowrank_heads(model, keep: float | None = None, windows=()):
    """Return a model with narrower heads, whose cache has at most the fraction `keep` of the bytes.

    The given model is changed and cannot be used afterwards. Layers of attention become dense.
    keep: None means HEADS_KEEP. windows: from `calibration_windows`. With windows, all layers share
    one budget of widths (`allocate_widths`). Without windows, each width becomes the same fraction
    of the old one. Raises ValueError if the model has MLA or an SVD, or for an impossible
    fraction.
    """
    check_source(model, 'lowrank_heads')
    dense_attention(model, ['c_attn', 'c_proj'])
    projections, state = projections_of(model), {}
    layers = {name: HeadStats(block.attn) for name, block in zip(projections, model.transformer.h)}
    sizes = {(name, part): stats.weights[part].size(1)
             for name, stats in layers.items() for part in 'kv'}
    keep = HEADS_KEEP if keep is None else keep
    check_share(keep, len(sizes) / sum(sizes.values()) if windows else
                1 / min(sizes.values()), 'cache')
    calibrate(model, projections, layers, windows, gradients=True)
    found = {(name, part): layers[name].factorizations(part) for name, part in sizes}
    widths = {key: int(keep * size + 1e-9) for key, size in sizes.items()}
    if windows:
        energies = {key: sum(head.energies for head in heads) for key, heads in found.items()}
        widths = allocate_widths(energies, int(keep * sum(sizes.values()) + 1e-9))
    for name, stats in tracking.brief_bar(layers.items(), desc='convert', unit='layer'):
        factors = {part: [balance(*head.split(widths[name, part]), widths[name, part])
                          for head in found[name, part]] for part in 'kv'}
        for part, tensor in stats.narrow(factors).items():
            state[f'{name.removesuffix(".c_attn")}.{part}'] = tensor
    qk, v = ([widths[name, part] for name in layers] for part in 'kv')
    return rebuild(model, replace(model.config, use_svd=False, qk_head_dim=qk, v_head_dim=v), state)


def allocate_widths(energies: dict, total) -> dict:
    """Return the widths that keep the most energy and sum up to `total`. energies: name -> tensor
    (hs), descending. Each width is at least 1. As in `best_share`, energies are divided by the root
    of their sum."""
    scaled = {name: e / e.sum().clamp_min(1e-300).sqrt() for name, e in energies.items()}
    ranked = sorted((i > 0, -energy, i, name) for name, values in scaled.items()
                    for i, energy in enumerate(values.tolist()))
    return Counter(name for *_, name in ranked[:total])

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

from dataclasses import replace

import torch
from torch.func import functional_call

from lowrank.factorization import Curve, allocate_ranks
from lowrank.layers import LowRankLinear
from runtime import tracking
from tools.calibration import HeadStats, LayerStats, calibrate
from tools.model_compression import (RANK_STEP, RANK_STEP_FROM, best_share, check_share,
                                     dense_attention, head_curve, narrow_heads, projections_of,
                                     rebuild, sync_config)

HEADS_KEEP = 0.5                    # default fraction of the cache kept by narrower heads
MEASURABLE = 1e-4                   # changes of the loss below it, in nats per token, are noise


def check_source(model, to):
    """Raise ValueError if a conversion does not support the attention of a model."""
    c = model.config
    if c.use_mla:
        raise ValueError(f'to={to!r}: the model has MLA already, with latents of '
                         f'{c.latent_summary} values (nearest: the run before conversion)')
    if to == 'mla' and (c.is_grouped or c.qk_head_dim or c.v_head_dim):
        raise ValueError(f'to={to!r}: the model has grouped or narrower heads (nearest: the run '
                         'before conversion)')
    if to == 'lowrank_heads' and c.svd_truncates:
        nearest = ('merge it by export.py --to=nanogpt' if c.svd_scope == 'weight' else
                   'a run without SVD')
        raise ValueError(f'to={to!r}: the model has an SVD with svd_scope={c.svd_scope!r} '
                         f'(nearest: {nearest})')


# --------------------------------------------------------------------------------------------------
# multi-head latent attention

@torch.no_grad()
def to_mla(model, latent_dim, windows=()):
    """Return an MLA model with latents of at most latent_dim values per token, in the mean over the
    layers.

    The given model is changed and cannot be used afterwards. Low-rank query layers stay low-rank.
    windows: from `calibration_windows`. The factors minimize the estimated increase of the loss on
    these windows, and so do the latent sizes (`latent_sizes`). Without windows the factors come
    from the SVD of the weights, and all latents have latent_dim values. So have they with use_svd,
    because it needs equal sizes. Raises ValueError if the model has MLA already or latent_dim does
    not fit.
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
    calibrate(model, projections, stats, windows, 1)
    found = {name: stats[name].factorization()
             for name in tracking.brief_bar(stats, desc='decompose', unit='layer')}
    sizes = dict.fromkeys(found, latent_dim)
    if windows and not config.use_svd:
        sizes = latent_sizes(model, found, stats, latent_dim, windows)
        config = replace(config, mla_latent_dim=[*sizes.values()])
    for name, c_attn in projections.items():
        for part, weight in latent_projection(c_attn, found[name], stats[name],
                                              sizes[name]).items():
            state[f'{name}.{part}'] = weight
    new = rebuild(model, config, state)
    for name, rank in query_ranks.items():
        new.set_layer(name, LowRankLinear.from_linear(new.transformer.get_submodule(name), rank))
    return sync_config(new)


def latent_sizes(model, found, stats, mean_dim, windows):
    """Return name of c_attn -> latent size, for the least estimated increase of the loss. The mean
    of the sizes is at most mean_dim. Sizes are multiples of 8 if mean_dim is 128 or more.

    The estimate is far too low for large errors of a layer on which many others depend. So the
    energies of a layer are multiplied by the root of the measured increase over the estimated one,
    both in nats per token, if only this layer has a latent of mean_dim values. The root is a
    compromise between the two (docs/RESULTS.md). A layer is measured on a part of the windows,
    which is about one pass over the text for all layers. found, stats: name -> `Factorization` and
    `LayerStats`.
    """
    batches, curves = windows[:max(1, len(windows) // len(found))], {}
    step = RANK_STEP if mean_dim >= RANK_STEP_FROM else 1

    def loss(state):
        return sum(functional_call(model, state, xy)[1].item() for xy in batches) / len(batches)
    original = loss({})
    for name, factorization in tracking.brief_bar(found.items(), desc='measure', unit='layer'):
        c_attn = model.transformer.get_submodule(name)
        parts = latent_projection(c_attn, factorization, stats[name], mean_dim)
        # dtype first, because MPS has no float64
        increase = loss({
            f'transformer.{name}.{kind}': tensor.to(c_attn.weight.dtype).to(c_attn.weight.device)
            for kind, tensor in multiplied_out(parts).items()}) - original
        estimate = factorization.energies[mean_dim:].sum().item()
        scale = max(1, increase / max(estimate, MEASURABLE)) ** 0.5
        curves[name] = Curve(scale * factorization.energies, 1, factorization.size, step)
    sizes = allocate_ranks(curves, mean_dim * len(found))
    return {name: size or found[name].size for name, size in sizes.items()}


def multiplied_out(parts):
    """Return the state dict of the `QKVProjection` with the outputs of a `LatentProjection`, in
    float64. parts: from `latent_projection`."""
    up = torch.cat((parts['k_up.weight'], parts['v_up.weight']))                    # (2C, d)
    state = dict(weight=torch.cat((parts['query.weight'].cpu().to(up.dtype),
                                   up @ parts['kv_down.weight'])))                  # (3C, C)
    if 'query.bias' in parts:
        b_q, b_v = parts['query.bias'], parts['v_up.bias']
        state['bias'] = torch.cat((b_q, torch.zeros_like(b_q), b_v))                # (3C)
    return state


def latent_projection(c_attn, factorization, stats, latent_dim):
    """Return the state dict of the `LatentProjection` that replaces a `QKVProjection`.

    factorization, stats: `Factorization` and `LayerStats` of the stacked weight of keys and values.
    The bias of the values compensates for the mean error. Keys get no bias, because a bias of keys
    would not change the attention weights.
    """
    up, down = factorization.factors(latent_dim)                    # (2C, d), (d, C)
    k_up, v_up = up.chunk(2)
    parts = {'query.weight': c_attn.weight.chunk(3)[0], 'kv_down.weight': down,
             'k_up.weight': k_up, 'v_up.weight': v_up}
    if c_attn.bias is not None:
        b_q, _, b_v = c_attn.bias.cpu().double().chunk(3)
        lost = (stats.weight.chunk(2)[1].double() - v_up @ down) @ stats.mean               # (C)
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

@torch.no_grad()
def to_lowrank_heads(model, keep: float | None = None, windows=()):
    """Return a model with narrower heads, whose cache has at most the fraction `keep` of the bytes.

    The given model is changed and cannot be used afterwards. Layers of attention become dense.
    keep: None means HEADS_KEEP. windows: from `calibration_windows`. With windows, all layers share
    one budget of widths (`best_share`). Without windows, each width becomes the same fraction
    of the old one. Raises ValueError if the model has MLA or an SVD, or for an impossible
    fraction.
    """
    check_source(model, 'lowrank_heads')
    dense_attention(model, ['c_attn', 'c_proj'])
    keep, projections = HEADS_KEEP if keep is None else keep, projections_of(model)
    heads = {name: HeadStats(block.attn) for name, block in zip(projections, model.transformer.h)}
    sizes = {(name, part): stats.weights[part].size(1)
             for name, stats in heads.items() for part in 'kv'}
    if not windows:
        check_share(keep, 1 / min(sizes.values()), 'cache')
    calibrate(model, projections, heads, windows, 1)
    found = {(name, part): heads[name].factorizations(part) for name, part in sizes}
    widths = {key: int(keep * size + 1e-9) for key, size in sizes.items()}
    if windows:
        widths = best_share({key: head_curve(one, 1) for key, one in found.items()}, keep, 'cache')
    state, fields = narrow_heads(heads, found, widths, model.config.head_size)
    return rebuild(model, replace(model.config, use_svd=False, **fields), state)

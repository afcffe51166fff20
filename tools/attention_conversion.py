"""Convert ordinary attention in a trained model to multi-head latent attention (MLA).

A layer computes keys and values [W_k; W_v] x (2C) from an input x (C). After the conversion it
computes [U_k; U_v] W_a x. W_a (d, C) maps x to a latent vector of d values.
tools/model_compression.py collects the statistics from which the stacked weight [W_k; W_v] is
factored.
"""

from dataclasses import replace

import torch

from lowrank.layers import LowRankLinear
from model import GPT
from runtime import tracking
from tools.model_compression import LayerStats, calibrate, dense_layers, sync_config


@torch.no_grad()
def to_mla(model, latent_dim, windows=()):
    """Return an MLA model with latents of latent_dim values per token.

    The given model is changed and cannot be used afterwards. Low-rank query layers stay low-rank.
    windows: from `calibration_windows`. The factors minimize the estimated increase of the loss on
    these windows. Without windows the factors come from the SVD of the weights. Raises ValueError
    if the model has MLA already or latent_dim does not fit.
    """
    if model.config.use_mla:
        raise ValueError("to='mla': the model has MLA already, with latents of "
                         f'{model.config.latent_dim} values (nearest: the run before conversion)')
    query_ranks = {name.replace('c_q', 'query'): rank for name, rank
                   in (model.config.layer_ranks or {}).items() if name.endswith('c_q')}
    dense_layers(model, [name for name in model.config.layer_shapes if '.c_attn.' in name])
    sync_config(model)                                              # fuses c_attn in all blocks
    config = replace(model.config, use_mla=True, mla_latent_dim=latent_dim)
    stats, projections = {}, {f'transformer.h.{i}.attn.c_attn': block.attn.c_attn
                              for i, block in enumerate(model.transformer.h)}
    for name, block in zip(projections, model.transformer.h):
        # W_v after 'weight' scope has truncated it, so that the factors do not exceed its rank
        W_k, W_v = projections[name].weight.chunk(3)[1], block.attn.value_weight().flatten(0, 1)
        stats[name] = LayerStats(torch.cat((W_k, W_v)), config.bias)                # (2C, C)
    calibrate(model, projections, stats, windows, gradients=True)
    state = {name: w for name, w in model.state_dict().items() if '.c_attn.' not in name}
    for name, c_attn in tracking.brief_bar(projections.items(), desc='convert', unit='layer'):
        for part, weight in latent_projection(c_attn, latent_dim, stats[name]).items():
            state[f'{name}.{part}'] = weight.to(c_attn.weight.dtype)    # MPS has no float64
    new = GPT(config).to(model.lm_head.weight).eval()
    new.load_state_dict(state)
    for name, rank in query_ranks.items():
        new.set_layer(name, LowRankLinear.from_linear(new.transformer.get_submodule(name), rank))
    new.load_extra_state(model.extra_state())
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

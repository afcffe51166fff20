"""Compress a trained model: make its layers smaller, refine or fine-tune it, and compare it with
the original model.

A layer becomes a low-rank layer with factors U (m, r) and A (r, n) in place of a weight (m, n), or
attention gets narrower heads, or an MLP fewer neurons. The linear algebra is in
lowrank/factorization.py, the statistics are in tools/calibration.py.

Letters: m outputs, n inputs, s = min(m, n), r rank, N tokens, B batch, T tokens per window,
C model width.
"""

import math
from dataclasses import replace
from functools import partial
from itertools import groupby, product
from types import SimpleNamespace

import torch
from torch.nn import functional as F

from lowrank.factorization import (Curve, Factorization, InputSelection, allocate_ranks, balance,
                                   beneficial_rank)
from lowrank.layers import LowRankLinear, SplitProjection, fuse
from lowrank.spectrum import rank_for_energy
from model import ADAPTER_DEFAULTS, GPT, QKVProjection
from runtime import device as devices
from runtime import tracking
from runtime.evaluation import Evaluation
from runtime.generation import sample
from runtime.optimizer import get_lr
from tools.calibration import HeadStats, Inputs, LayerStats, NeuronStats, calibrate
from tools.tables import format_table
from tools.timing import generation, interleave
from train import TrainConfig, language_model_loss, new_state, train_step

MODULES = ('attn', 'mlp')
RANK_STEP, RANK_STEP_FROM = 8, 128  # multiples of 8 are faster; only if no layer is narrower
GRADIENT_EVERY = 2                  # every how many batches of the text give gradients
# Adam of refinement; the rate is for a divergence of 1 nat. The few steps need short memories
REFINE_RATE, REFINE_BETAS = 1.5e-3, (0.7, 0.9)
KEEP = 0.6                          # default fraction of the weights kept
LEARNING_RATE = 1e-3                # default for fine-tuning
BENCHMARK_ROUNDS = 5                # odd, so that a measured round is the median


# --------------------------------------------------------------------------------------------------
# layers

def parse_modules(modules):
    """Return a list of 'attn' and 'mlp' from a comma-separated str, a list, or None for both.
    Raises ValueError for other words."""
    words = MODULES if modules is None else (
        modules.replace(' ', '').split(',') if isinstance(modules, str) else modules)
    if not {*words} <= {*MODULES}:
        raise ValueError(f"modules={modules!r}: must name some of {', '.join(MODULES)} (nearest: "
                         f"'{','.join(MODULES)}')")
    return words


def layer_names(model, modules=None):
    """Return the names of the layers that can become low-rank, block by block.

    Weights that 'weight' scope truncates are left out, because the truncation needs the full
    weight, so that factors would save nothing. modules: as for `parse_modules`.
    """
    c, modules = model.config, parse_modules(modules)
    truncated = tuple(f'.c_{target}' for target in c.svd_ranks if c.svd_scope == 'weight')
    return [name for name in c.layer_shapes
            if name.split('.')[2] in modules and not name.endswith(truncated)]


def dense_layers(model, names):
    """Make each named layer a separate nn.Linear, in place. Returns name -> nn.Linear. Low-rank
    layers and adapters are multiplied out, and a fused c_attn is split."""
    for name in names:
        layer = model.get_layer(name)
        if hasattr(layer, 'merge'):
            model.set_layer(name, layer.merge())
    return {name: model.transformer.get_submodule(name) for name in names}


def without_adapters(model):
    """Merge adaptive SVD and LoRA into the weights, in place. Returns the model, in which all
    parameters are trainable."""
    dense_layers(model, [*model.config.adaptive_layers, *model.config.lora_layers])
    model.config = replace(model.config, **ADAPTER_DEFAULTS)
    return sync_config(model).requires_grad_(True)


def weights_of(model, modules=None):
    """Return every weight matrix of the blocks: name -> (m, n). The model is changed in place:
    fused layers are split, and low-rank layers are multiplied out."""
    modules = parse_modules(modules)
    dense_layers(model, model.config.layer_shapes)
    return {name: layer.weight for name, layer in model.transformer.named_modules()
            if isinstance(layer, torch.nn.Linear) and name.split('.')[2] in modules}


def dense_attention(model, names):
    """Make the named layers of all blocks dense and fuse c_attn, in place. names: such as
    'c_attn'."""
    dense_layers(model, [name for name in model.config.layer_shapes
                         if name.split('.')[3] in names and name.split('.')[2] == 'attn'])
    return sync_config(model)


def projections_of(model):
    """Return name -> c_attn of all blocks."""
    return {f'h.{i}.attn.c_attn': block.attn.c_attn for i, block in enumerate(model.transformer.h)}


def rebuild(model, config, state):
    """Return a model with a new configuration. state: the tensors in which it differs from the
    given model, by name, such as 'h.0.attn.c_attn.weight'."""
    like, old = model.lm_head.weight, model.state_dict()
    state = {f'transformer.{name}': tensor for name, tensor in state.items()}
    new = GPT(config).to(like).eval()
    # dtype first, because MPS has no float64
    new.load_state_dict({name: state[name].to(like.dtype) if name in state else old[name]
                         for name in new.state_dict()})
    new.load_extra_state(model.extra_state())
    return new.requires_grad_(like.requires_grad)


@torch.no_grad()
def sync_config(model):
    """Update the configuration after layers were replaced, in place. Returns the model. Writes the
    ranks of low-rank layers to layer_ranks. Fuses each c_attn without low-rank layers."""
    ranks = {name: layer.rank for name, layer in model.transformer.named_modules()
             if isinstance(layer, LowRankLinear)}
    model.config = replace(model.config, layer_ranks=ranks or None)
    for i, attn in enumerate(block.attn for block in model.transformer.h):
        parts = [*attn.c_attn.children()]
        if isinstance(attn.c_attn, SplitProjection) and not any(
                isinstance(part, LowRankLinear) for part in parts):
            weight, bias = fuse(parts)
            attn.c_attn = QKVProjection(model.config, i)
            attn.c_attn.weight = torch.nn.Parameter(weight)
            attn.c_attn.bias = None if bias is None else torch.nn.Parameter(bias)
            attn.c_attn.requires_grad_(parts[0].weight.requires_grad)
    return model


def apply_svd_compression(model, rank, modules=None):
    """Replace layers of a GPT's blocks by low-rank layers from the SVD of their weights, in place.

    A layer stays dense if its factors would not save parameters. A layer that is low-rank already,
    with this rank or less, does not change. No data is needed. modules: as for `parse_modules`.
    Returns the model. Raises ValueError for a rank outside 1 to n_embd, for unknown modules, and
    for NaN or infinite weights.
    """
    if type(rank) is not int or not 1 <= rank <= model.config.n_embd:
        raise ValueError(f'rank={rank!r}: must be a whole number from 1 to '
                         f'n_embd={model.config.n_embd}')
    known = model.config.layer_ranks or {}
    names = [name for name in layer_names(model, modules) if known.get(name, rank + 1) > rank]
    for name, layer in dense_layers(model, names).items():
        if beneficial_rank(layer.weight.shape, rank):
            model.set_layer(name, LowRankLinear.from_linear(layer, rank))
    return sync_config(model)


@torch.no_grad()
def replace_linear(model, name, factors, mean):
    """Replace a dense layer by a low-rank layer, in place.

    factors: U (m, r) and A (r, n), float64; mean: mean input (n) of the layer. If the layer has a
    bias, the bias is shifted so that the mean output stays the same.
    """
    dense, (up, down) = model.get_layer(name), factors
    layer = LowRankLinear.from_factors(up, down, dense)
    if dense.bias is not None:
        shift = dense.weight.cpu().double() @ mean - up @ (down @ mean)             # (m)
        # convert before the copy because MPS has no float64
        layer.bias.copy_((dense.bias.cpu().double() + shift).to(layer.bias.dtype))
    model.set_layer(name, layer)


# --------------------------------------------------------------------------------------------------
# compression

def compress_model(model, method, windows, modules=None, keep=None, rank=None, energy=None):
    """Return a GPT with smaller layers. The given model is changed and cannot be used afterwards.

    method: 'plain', 'whitened' or 'activation'; windows: from `calibration_windows`, or () for
    'plain'; modules: as for `parse_modules`; keep: fraction of the weights kept, None for KEEP;
    rank, energy: as for `rank_policy`, in place of keep. With a fraction, 'activation' decides what
    each layer becomes (`narrow_layers`). Otherwise all layers become low-rank (`factor_layers`).
    'activation' then trains the new layers on the predictions of the original model (`refine`) and
    freezes the model. Raises ValueError for wrong options and for values that are not finite.
    """
    modules, has_gradients = parse_modules(modules), method == 'activation'
    inputs = Inputs()                                               # of the last LayerNorm
    if has_gradients and rank is None and energy is None:
        keep = KEEP if keep is None else keep
        model = narrow_layers(model, windows, modules, keep, inputs)
    else:
        model = factor_layers(model, windows, modules, has_gradients, inputs, keep=keep, rank=rank,
                              energy=energy)
    if has_gradients:
        refine(model, windows, inputs.batches, modules)
    return model


@torch.no_grad()
def factor_layers(model, windows, modules, has_gradients, inputs, **options):
    """Replace layers by low-rank layers of least error, in place, and return the model. Without
    gradients, this is the error of their outputs, or without windows that of the weights. inputs:
    `Inputs` to add those of the last LayerNorm to; options and errors: as for `rank_policy`."""
    known = model.config.layer_ranks or {}              # low-rank layers keep at most this rank
    layers = dense_layers(model, layer_names(model, modules))
    shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items()}
    # placeholder energies: refuse wrong options before calibration
    rank_policy({name: torch.ones(min(shape)) for name, shape in shapes.items()}, shapes, **options)
    stats = {name: LayerStats(layer.weight, layer.bias is not None)
             for name, layer in layers.items()}
    calibrate(model, layers | dict(ln_f=model.transformer.ln_f), stats | dict(ln_f=inputs), windows,
              GRADIENT_EVERY if has_gradients else 0)
    means = {name: one.mean for name, one in stats.items()}
    found = {name: factorization(stats.pop(name), known.get(name))          # frees memory
             for name in tracking.brief_bar([*stats], desc='decompose', unit='layer')}
    ranks = rank_policy({name: one.energies for name, one in found.items()}, shapes, **options)
    for name, rank in ranks.items():
        if rank is not None or name in known:
            rank = min(rank or math.inf, known.get(name, math.inf))
            replace_linear(model, name, found[name].factors(rank), means[name])
    return sync_config(model)


def factorization(stats, rank):
    """Return the `Factorization` of a layer. stats: its `LayerStats`; rank: of a low-rank layer,
    beyond which energies are rounding errors and become 0, or None."""
    found = stats.factorization()
    if rank is not None:
        found.energies[rank:] = 0
    return found


@torch.no_grad()
def narrow_layers(model, windows, modules, keep, inputs):
    """Return a model with narrower heads, and in each MLP fewer neurons or low-rank layers.

    All parts share one budget, the fraction `keep` of their weights. Attention with MLA, an SVD or
    low-rank layers gets no narrower heads, its layers become low-rank. inputs: `Inputs` to add
    those of the last LayerNorm to. Raises ValueError as `best_share` does, and for values that are
    not finite.
    """
    c, known = model.config, model.config.layer_ranks or {}
    has_heads = 'attn' in modules and not (
        c.use_mla or c.use_svd or any('.attn.' in name for name in known))
    if has_heads:
        dense_attention(model, ['c_attn', 'c_proj'])
    layers = dense_layers(model, layer_names(
        model, [word for word in modules if word == 'mlp' or not has_heads]))
    projections = projections_of(model) if has_heads else {}
    heads = {name: HeadStats(block.attn) for name, block in zip(projections, model.transformer.h)}
    stats = {name: (NeuronStats if name.endswith('mlp.c_proj') else LayerStats)(
        layer.weight, layer.bias is not None) for name, layer in layers.items()}
    calibrate(model, layers | projections | dict(ln_f=model.transformer.ln_f),
              stats | heads | dict(ln_f=inputs), windows, GRADIENT_EVERY)

    means = {name: one.mean for name, one in stats.items()}
    found, curves = choose_parts(stats, known, keep)
    for name, part in product(heads, 'kv'):
        found[name, part] = heads[name].factorizations(part)
        curves[name, part] = head_curve(found[name, part],
                                        c.n_embd * (c.heads['q'] + c.heads[part]))
    ranks = best_share(curves, keep)

    state, fields = narrow_heads(heads, found, ranks, c.head_size) if heads else ({}, {})
    neurons = [*map(c.neurons, range(c.n_layer))]
    for name, selection in found.items():
        if isinstance(selection, InputSelection) and ranks[name] is not None:
            state |= select_neurons(model, name, selection, ranks[name], means[name])
            neurons[int(name.split('.')[1])] = ranks[name]
    fields['mlp_dim'] = neurons if min(neurons) < 4 * c.n_embd else None
    model = rebuild(model, replace(sync_config(model).config, **fields), state)
    for name, one in found.items():
        if isinstance(one, Factorization) and (ranks[name] is not None or name in known):
            rank = min(ranks[name] or math.inf, known.get(name, math.inf))
            replace_linear(model, name, one.factors(rank), means[name])
    return sync_config(model)


def choose_parts(stats, known, keep):
    """Choose between fewer neurons and two low-rank layers for each MLP.

    The errors of both are in one unit, so the smaller one at the fraction `keep` decides. An MLP
    with a low-rank layer keeps its kind, because neurons could only make it larger. stats: name ->
    `LayerStats`, taken out one by one, which frees memory; known: name -> rank of a low-rank layer.
    Returns two dicts: name -> `Factorization`, or name of c_proj -> `InputSelection`; and the same
    names -> `Curve`.
    """
    narrowest = min((min(one.weight.shape) for one in stats.values()), default=1)
    step, found, curves = RANK_STEP if narrowest >= RANK_STEP_FROM else 1, {}, {}
    for name in tracking.brief_bar([*stats], desc='decompose', unit='layer'):
        layer = stats.pop(name)
        one = found[name] = factorization(layer, known.get(name))
        curves[name] = Curve(one.energies, sum(one.weight.shape), one.weight.numel(), step)
        pair = name.replace('c_proj', 'c_fc'), name
        if name.endswith('mlp.c_proj') and not known.keys() & {*pair}:
            selection = layer.selection()
            unit = 2 * len(selection.weight)                        # a row of c_fc, a column here
            neurons = Curve(selection.energies, unit, unit * len(selection.order), step)
            if neurons.lost(keep) <= sum(curves[part].lost(keep) for part in pair):
                del found[pair[0]], curves[pair[0]]
                found[name], curves[name] = selection, neurons
    return found, curves


def head_curve(factorizations, unit):
    """Return the `Curve` of the width that the heads of a layer share. factorizations: of each
    head; unit: size of one direction of all heads."""
    energies = sum(one.energies for one in factorizations)
    return Curve(energies, unit, unit * len(energies))


def narrow_heads(heads, found, widths, head_size):
    """Return the tensors of narrower heads, name -> tensor, and the fields of their configuration.

    heads: name of c_attn -> `HeadStats`; found: (name, 'k' or 'v') -> `Factorization` of each head;
    widths: the same keys -> width, or None for the present width; head_size: width of heads that
    are not narrower.
    """
    state, fields = {}, dict(qk_head_dim=[], v_head_dim=[])
    for name, stats in tracking.brief_bar(heads.items(), desc='narrow heads', unit='layer'):
        factors = {}
        for part, field in dict(k='qk_head_dim', v='v_head_dim').items():
            width = widths[name, part] or found[name, part][0].size
            factors[part] = [balance(*one.split(width), width) for one in found[name, part]]
            fields[field].append(width)
        for part, tensor in stats.narrow(factors).items():
            state[f'{name.removesuffix(".c_attn")}.{part}'] = tensor
    return state, {field: widths if min(widths) < head_size else None
                   for field, widths in fields.items()}


def select_neurons(model, name, selection, count, mean):
    """Return the tensors of an MLP with fewer neurons, name -> tensor. name: of its c_proj;
    selection: `InputSelection` of c_proj; mean: mean output (n) of the neurons, whose error the
    bias of c_proj compensates for."""
    chosen, weight = selection.select(count)            # (count), (C, count)
    path = name.removesuffix('c_proj')
    mlp = model.transformer.get_submodule(path[:-1])
    state = {f'{path}c_fc.weight': mlp.c_fc.weight[chosen], f'{path}c_proj.weight': weight}
    if mlp.c_proj.bias is not None:
        lost = selection.weight.double() @ mean - weight @ mean[chosen]             # (C)
        state |= {f'{path}c_fc.bias': mlp.c_fc.bias[chosen],
                  f'{path}c_proj.bias': mlp.c_proj.bias.cpu().double() + lost}
    return state


def refine(model, windows, inputs, modules):
    """Train the matrices of the given modules in place, on the predictions of the original model.
    Afterwards the model is frozen.

    A step minimizes the mean Kullback-Leibler divergence from the predictions of the original
    model, plus the absolute change of the mean loss. Both are zero for the original model, so this
    brings the model back to it, but does not train it further. The text is read once, one batch per
    step. The learning rate is proportional to the root of the mean divergence so far, so that steps
    are small if the model is close to the original. It warms up for a tenth of the steps and then
    falls linearly.

    windows: from `calibration_windows`; inputs: of the last LayerNorm in the original model, (N, C)
    per batch. Raises ValueError if the divergence is not finite.
    """
    trained = [p.requires_grad_() for block in model.transformer.h for word in modules
               for p in getattr(block, word).parameters() if p.dim() > 1]
    optimizer = torch.optim.Adam(trained, betas=REFINE_BETAS)
    total, steps = 0.0, len(windows)
    for step, ((x, y), last) in enumerate(zip(
            tracking.brief_bar(windows, desc='refine', unit='step'), inputs)):
        with torch.no_grad():
            target = F.log_softmax(model.lm_head(model.transformer.ln_f(last)), dim=-1)
        found = F.log_softmax(model(x, y)[0], dim=-1).flatten(0, 1)                 # (N, vocab)
        divergence = F.kl_div(found, target, reduction='none', log_target=True).sum(-1).mean()
        change = (target - found).gather(1, y.reshape(-1, 1)).mean()
        total += divergence.item()
        if not math.isfinite(total):
            raise ValueError('the divergence from the original model is not finite')
        rate = REFINE_RATE * max(total / (step + 1), 0.0) ** 0.5    # rounding may be negative
        optimizer.param_groups[0]['lr'] = rate * min(1, 10 * (step + 1) / steps) * (
            1 - step / steps)
        (divergence + change.abs()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# ranks. energies: name -> (s), descending; shapes: name -> (m, n). The functions return name ->
# rank, or None for a layer that stays as it is because its parts would not be smaller.

def rank_policy(energies, shapes, keep=None, rank=None, energy=None):
    """Return the rank of each layer from one of three options.

    rank: the same rank for all layers. energy: each layer gets the smallest rank that keeps this
    fraction of its energy. keep: each layer keeps at most this fraction of its weights. Without any
    option, keep is KEEP. A layer that its rank does not make smaller gets None and stays dense.

    Raises ValueError if rank is above the full rank of a layer, if the fraction keep is not
    possible, and if energy is not above 0 and at most 1.
    """
    if rank is not None:
        most = min(min(shape) for shape in shapes.values())
        if rank > most:
            raise ValueError(f'rank={rank}: above {most}, the full rank of the smallest layer '
                             f'(nearest: {most})')
        return {name: beneficial_rank(shape, rank) for name, shape in shapes.items()}
    if energy is not None:
        return {name: beneficial_rank(shape, rank_for_energy(energies[name].sqrt(), energy))
                for name, shape in shapes.items()}
    return uniform_share(shapes, KEEP if keep is None else keep)


def uniform_share(shapes, keep):
    """Return the ranks at which each layer keeps at most the fraction `keep` of its parameters.
    Raises ValueError if a rank would be below 1."""
    check_share(keep, max((m + n) / (m * n) for m, n in shapes.values()))
    if keep == 1:                       # any rank that saves parameters loses energy
        return dict.fromkeys(shapes)
    return {name: beneficial_rank((m, n), math.floor(keep * m * n / (m + n) + 1e-9))
            for name, (m, n) in shapes.items()}


def best_share(curves, keep, of='weights'):
    """Return the ranks that keep at most the fraction `keep` of all parameters and lose the least
    energy (`allocate_ranks`). curves: name -> `Curve`; of: what `keep` is a fraction of.

    Energies estimate the second-order change of the loss. The estimate is valid for small errors
    only. Used directly, it gives parts with little influence on the loss too low a rank. The
    energies of a part are therefore divided by the square root of their sum, a compromise between
    absolute and relative energies (docs/RESULTS.md). Raises ValueError for an impossible fraction.
    """
    scaled = {name: curve._replace(energies=curve.energies / curve.energies.sum().clamp_min(
        1e-300).sqrt()) for name, curve in curves.items()}
    total = sum(curve.full for curve in curves.values())
    least = sum(min(curve.full, curve.size(min(curve.step, len(curve.energies))))
                for curve in curves.values())
    check_share(keep, least / total, of)
    return allocate_ranks(scaled, keep * total)


def check_share(keep, least, of='weights'):
    """Raise ValueError unless least <= keep <= 1. of: what `keep` is a fraction of."""
    if not least <= keep <= 1:
        raise ValueError(f'keep={keep}: not a possible fraction of the {of} (nearest: '
                         f'{1 if keep > 1 else math.ceil(least * 1e4) / 1e4})')


# --------------------------------------------------------------------------------------------------
# fine-tuning

def finetune(model, data, options, saved, device, teacher=None):
    """Train all parameters in place on random windows of the training split.

    The learning rate warms up for 5% of the steps and then follows a cosine to a tenth. There is no
    weight decay, because it would shrink both factors of a low-rank layer.

    options: object with the fields finetune_iters, seed, optimizer, learning_rate and batch_size.
    The last three fields may be None for the default. saved: checkpoint whose config gives the
    default batch size and betas, or {}. teacher: model for `distillation_loss`, or None. Leaves the
    model in training mode. Raises ValueError if the loss is not finite.
    """
    rate = LEARNING_RATE if options.learning_rate is None else options.learning_rate
    own = {key: value for key, value in saved.get('config', {}).items()
           if key in ('batch_size', 'beta1', 'beta2')}
    own |= {'batch_size': options.batch_size} if options.batch_size else {}
    cfg = TrainConfig(optimizer=options.optimizer or 'muon', learning_rate=rate, min_lr=rate / 10,
                      weight_decay=0.0, max_iters=options.finetune_iters, seed=options.seed,
                      warmup_iters=options.finetune_iters // 20,
                      block_size=model.config.block_size, **own)
    loss_of = language_model_loss if teacher is None else partial(distillation_loss, teacher)
    state = new_state(cfg, model.requires_grad_(True).train(), device)
    torch.manual_seed(cfg.seed)                                     # for dropout
    try:
        for step in tracking.brief_bar(range(cfg.max_iters), desc='fine-tune', unit='step'):
            for group in state.optimizer.param_groups:
                group['lr'] = get_lr(step, cfg)
            batch = data.batch('train', cfg.batch_size, cfg.block_size, state.data_rng, device)
            train_step(state, [batch], loss_of)
    except FloatingPointError as e:
        raise ValueError(f'learning_rate={rate}: fine-tuning failed after step {state.iter_num}: '
                         f'{e} (nearest: a smaller learning rate)') from None


def distillation_loss(teacher, model, x, y):
    """Return cross-entropy plus KL divergence from the teacher's predictions (Hinton, Vinyals and
    Dean, arXiv:1503.02531, at temperature 1), in nats per token. x, y: (B, T)."""
    logits, loss = model(x, y)                                      # (B, T, vocab)
    with torch.no_grad():
        target = F.log_softmax(teacher(x, y)[0], dim=-1)
    divergence = F.kl_div(F.log_softmax(logits, dim=-1), target, reduction='none', log_target=True)
    return loss + divergence.sum(-1).mean()


# --------------------------------------------------------------------------------------------------
# comparison of the original and the compressed model

def validation_loss(model, data, device, seed):
    """Return the loss in nats per token over the whole validation split. If the model is not
    causal, this is the prefix-only loss. Leaves the model in evaluation mode."""
    options = SimpleNamespace(batch_size=1, block_size=model.config.block_size, seed=seed)
    row = Evaluation(options, model, data, device, devices.autocast(device, 'float32'),
                     model.config.is_noncausal).final()
    model.eval()
    return row.get('val/prefix_loss', row['val/loss'])


def compare_models(models, data, device, seed):
    """Return a dict of sizes and samples of two models, and 'speed' from `benchmark_pair`.

    models: [original, compressed]; sizes and samples are lists in this order. 'params' counts
    position embeddings. 'bytes' counts parameters and buffers.
    """
    measures = dict(
        block_params=lambda m: sum(p.numel() for p in m.transformer.h.parameters()),
        attention_params=GPT.attention_params,
        params=lambda m: m.get_num_params(non_embedding=False),
        bytes=lambda m: sum(p.nbytes for p in (*m.parameters(), *m.buffers())),
        block_size=lambda m: m.config.block_size,
        cache_bytes=lambda m: m.kv_cache_bytes(1, m.config.block_size),
        samples=lambda m: sample_text(m, data, device, seed))
    return dict(speed=benchmark_pair(models, data, device, seed),
                **{name: [measure(m) for m in models] for name, measure in measures.items()})


def shape_of(c):
    """Return the shape of a converted model, for the report of compress.py: what attention caches,
    the neurons of each MLP, and 'layers', name of a low-rank layer -> rank and full rank."""
    return dict(n_head=c.n_head, n_kv_head=c.heads['k'], qk_head_dim=c.qk_head_dim,
                v_head_dim=c.v_head_dim, mlp_dim=c.mlp_dim,
                latent_dim=c.latent_dims if c.use_mla else None,
                layers={name: dict(rank=rank, of=min(c.layer_shapes[name]))
                        for name, rank in (c.layer_ranks or {}).items()})


def sample_text(model, data, device, seed):
    torch.manual_seed(seed)
    return sample(model, data, device, devices.autocast(device, 'float32'))


def benchmark_pair(models, data, device, seed):
    """Time generation of two models in turn.

    Returns a dict of settings and of two results, 'prefill' for the prompt and 'decode' for later
    tokens. Each result is a dict. Its key 'tokens_per_s' has the median rates [first, second].
    'ratio' is the median over rounds of the second rate divided by the first rate. 'quartiles' has
    the quartiles of that ratio.
    """
    T = models[0].config.block_size
    tokens = max(2, min(32, T // 8))
    prompt, _ = data.batch('val', 1, max(1, T - tokens), torch.Generator().manual_seed(seed),
                           device)
    rounds = interleave({i: partial(generation, model, prompt, tokens, device)
                         for i, model in enumerate(models)}, BENCHMARK_ROUNDS)
    seconds = torch.tensor([rounds[0], rounds[1]], dtype=torch.float64)     # (model, round, part)
    rates = torch.tensor([prompt.size(1), 1]) / seconds.median(dim=1).values        # (model, part)
    quartiles = (seconds[0] / seconds[1]).quantile(seconds.new_tensor([0.25, 0.5, 0.75]), dim=0)
    parts = {part: dict(tokens_per_s=rates[:, i].tolist(), ratio=quartiles[1, i].item(),
                        quartiles=quartiles[::2, i].tolist())
             for i, part in enumerate(('prefill', 'decode'))}
    return parts | dict(prompt=prompt.size(1), tokens=tokens, rounds=BENCHMARK_ROUNDS)


# label and format of each row of the report
ROWS = dict(val_loss=('validation loss', '.4f'), perplexity=('perplexity', '.4g'),
            block_params=('parameters of the blocks', ','),
            attention_params=('parameters of attention', ','),
            params=('parameters with position embeddings', ','),
            bytes=('bytes of parameters and buffers', ','),
            disk_bytes=('bytes of the weights on disk', ','),
            cache_bytes=('cache bytes of a full context', ','))


def describe(report):
    """Return the report of compress.py as text."""
    tuned, speed = report['options']['finetune_iters'], report['speed']
    made = dict(
        lowrank='layers are smaller',
        mla='keys and values of each token share a latent',
        gqa=f'{report["n_head"]} query heads share {report["n_kv_head"]} key/value heads',
        lowrank_heads='heads are narrower')[report['to']]
    method = f', method {report["method"]!r}' * (report['to'] != 'gqa')
    lines = [f'{made}{method}, {report["seconds"]:.1f} s']
    for key, label in dict(latent_dim='sizes of the latents', mlp_dim='neurons of the MLPs',
                           qk_head_dim='widths of queries and keys',
                           v_head_dim='widths of values').items():
        if report[key]:
            lines.append(f'{label} per block: {", ".join(map(str, report[key]))}')
    lines += [f'ranks in block {block}: ' + ', '.join(
        f'{name.split(".", 2)[2]} {layer["rank"]}' for name, layer in layers)
        for block, layers in groupby(report['layers'].items(), lambda item: item[0].split('.')[1])]
    if tuned:
        lines.append(f'{tuned} steps of fine-tuning in {report["finetune_seconds"]:.1f} s, which '
                     f'began at a loss of {report["val_loss_before_finetuning"]:.4f}')
    rows = [['losses: prefix-only, nats per token' if report['prefix_only'] else
             'losses: nats per token', 'before', 'after', 'after / before']]
    for key, (label, form) in ROWS.items():
        before, after = report[key]
        rows.append([label, f'{before:{form}}', f'{after:{form}}',
                     f'{after / before:.1%}' if before else ''])    # 'sequence' scope has no cache
    for part, label in (('prefill', f'tokens/s, prompt of {speed["prompt"]} tokens'),
                        ('decode', f'tokens/s, next {speed["tokens"] - 1} tokens')):
        ratio = '{:.2f} ({:.2f} to {:.2f})'.format(speed[part]['ratio'], *speed[part]['quartiles'])
        rows.append([label, *(f'{rate:,.0f}' for rate in speed[part]['tokens_per_s']), ratio])
    before, after = report['samples']
    return '\n'.join([*lines, *format_table(rows), (
        'tokens/s: the last column has the median of the ratios of paired rounds and their '
        'quartiles,\nnot the ratio of the medians.\nsample before:'),
        before, 'sample after:', after])

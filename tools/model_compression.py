"""Compress a trained model: calibrate on training text, replace layers by low-rank layers,
fine-tune, and compare with the original model.

A low-rank layer has two factors, U (m, r) and A (r, n), in place of a weight (m, n). The linear
algebra is in lowrank/factorization.py.

Letters: m outputs, n inputs, s = min(m, n), r rank, N tokens, B batch, T tokens per window.
"""

import copy
import math
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import groupby, islice
from types import SimpleNamespace

import torch
from torch.nn import functional as F

from lowrank.factorization import (
    Factorization,
    allocate_ranks,
    beneficial_rank,
    factored_size,
    ridge_refit,
)
from lowrank.layers import LowRankLinear, SplitProjection, fuse
from lowrank.spectrum import rank_for_energy
from model import ADAPTER_DEFAULTS, GPT, QKVProjection
from runtime import device as devices
from runtime import tracking
from runtime.evaluation import Evaluation
from runtime.generation import sample
from runtime.optimizer import get_lr
from tools.tables import format_table
from tools.timing import generation, interleave
from train import TrainConfig, language_model_loss, new_state, train_step

BATCH_TOKENS = 4096                 # per forward pass of calibration
MODULES = ('attn', 'mlp')
STAGES = ('attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')   # of a block, in forward order
ROUNDING = torch.finfo(torch.float32).eps           # error of an activation, relative to its mean
RANK_STEP, RANK_STEP_FROM = 8, 128  # multiples of 8 are faster; only if no layer is narrower
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
def replace_linear(model, name, factors, mean, mean_before):
    """Replace a dense layer by a low-rank layer, in place.

    factors: U (m, r) and A (r, n). mean: mean input (n) of the new layer; mean_before: mean input
    (n) of the dense layer; both float64. If the layer has a bias, the bias is shifted so that the
    mean output stays the same.
    """
    dense, (up, down) = model.transformer.get_submodule(name), factors
    layer = LowRankLinear.from_factors(up, down, dense)
    if dense.bias is not None:
        shift = dense.weight.cpu().double() @ mean_before - up @ (down @ mean)              # (m)
        # convert before the copy because MPS has no float64
        layer.bias.copy_((dense.bias.cpu().double() + shift).to(layer.bias.dtype))
    model.set_layer(name, layer)


# --------------------------------------------------------------------------------------------------
# statistics

class LayerStats:
    """Statistics of a layer over calibration tokens, for `Factorization`.

    The statistics are E[x x^T] of inputs x and E[g g^T] of loss gradients g at the outputs. Both
    are mapped to the smaller side of the weight, which gives matrices (s, s). They are in float64
    on the CPU.

    If the layer has a bias, it compensates for the mean error. Then only the covariance of the
    inputs counts. The covariance is a sum of squared deviations within and between batches (Chan,
    Golub and LeVeque, 1983). Unlike a difference of moments, it is positive semidefinite.
    """

    def __init__(self, weight, centred, inputs=1):
        """weight: (m, n); centred: whether the layer has a bias; inputs: number of inputs that are
        concatenated in the argument of `add`."""
        self.weight, self.centred = weight.detach().cpu().double(), centred
        self.tall = weight.size(0) >= weight.size(1)
        self.tokens, self.sum, self.gradients = 0, 0, None
        self.mean = self.weight.new_zeros(inputs * weight.size(1))

    def reduce(self, x):
        """Map inputs x (N, n) to the smaller side of the weight, (N, s): x itself or W x."""
        return x if self.tall else x @ self.weight.mT

    def factors(self, x):
        """Map inputs x (N, n) to a (N, p) and b (N, q), both linear in x. The statistic is the mean
        of a^T b."""
        return self.reduce(x), self.reduce(x)

    def add(self, x, g=None):
        """Add a batch of inputs x (N, n) and of gradients g (N, m) at the outputs. g may be
        None."""
        x = x.cpu().double()                                        # MPS has no float64
        count, mean = len(x), x.mean(0)
        step = mean - self.mean
        if self.centred:                                # one more row for the change of the mean
            weight = (self.tokens * count / (self.tokens + count)) ** 0.5
            x = torch.cat((x - mean, weight * step[None]))
        self.tokens += count
        self.mean = self.mean + step * (count / self.tokens)
        a, b = self.factors(x)
        self.sum = self.sum + a.mT @ b                              # (p, q)
        if g is not None:
            g = g.cpu().double() @ self.weight if self.tall else g.cpu().double()           # (N, s)
            self.gradients = (0 if self.gradients is None else self.gradients) + g.mT @ g   # (s, s)

    def moments(self):
        """Return the mean of a^T b over tokens (p, q), with a and b from `factors`, plus the
        variance of float32 rounding errors of the inputs. Without this variance, rounding errors of
        a constant input would count as signal."""
        n = self.weight.size(1)
        a, b = self.factors(torch.diag(ROUNDING * self.mean[:n]).repeat(1, len(self.mean) // n))
        return self.sum / self.tokens + a.mT @ b

    def factorization(self):
        """Return the `Factorization` of the weight. If no tokens were added, it is the plain
        SVD."""
        if not self.tokens:
            return Factorization(self.weight)
        inputs, g = self.moments(), None if self.gradients is None else self.gradients / self.tokens
        return Factorization(self.weight, *((inputs, g) if self.tall else (g, inputs)))


class InputShiftStats(LayerStats):
    """Statistics of a layer whose inputs have changed because earlier layers were replaced.

    x^ is an input in the compressed model and x the same input in the original model. `add` takes
    x^ and x concatenated, (N, 2n). `mean` (2n) is the mean of the concatenation. The statistic is
    E[x^ x^^T] (n, n), stacked on E[x x^^T] (s, n), with W x in place of x if m < n.
    """

    def factors(self, x):
        now, before = x.chunk(2, dim=1)
        return torch.cat((now, self.reduce(before)), dim=1), now

    def refitted_factorization(self, stats):
        """Return the `Factorization` of the weight that maps x^ as close as possible to W x, the
        output of the dense layer. stats: `LayerStats` of the dense layer. Its gradients define the
        distance."""
        weight, gradients, n = stats.weight, stats.gradients / stats.tokens, stats.weight.size(1)
        inputs, cross = self.moments().split((n, len(gradients)))
        dense = torch.eye(n, dtype=torch.float64) if self.tall else weight
        refitted = ridge_refit(dense, inputs, cross)                # (s, n)
        if self.tall:
            return Factorization(weight @ refitted, inputs, refitted.mT @ gradients @ refitted)
        return Factorization(refitted, gradients, refitted @ inputs @ refitted.mT)


def calibration_windows(data, tokens, block_size, seed, device):
    """Return random windows of the training split as a list of batches x, y (B, T).

    data: Dataset; tokens: number of tokens, rounded up to whole windows, at most the whole split;
    block_size: tokens per window; seed: seed of the random draw.
    """
    split = data.tokens('train')
    count = math.ceil(min(tokens, len(split)) / block_size)
    starts = data.sample_offsets('train', count, block_size, torch.Generator().manual_seed(seed))
    return [data.windows(split, part.tolist(), block_size, 'train', device)
            for part in starts.split(max(1, BATCH_TOKENS // block_size))]


@contextmanager
def record(modules):
    """Context manager that records modules in forward passes. modules: name -> module. Yields a
    dict, name -> (input, output) of the last forward pass."""
    seen = {}

    def hook(name, module, args, output):
        seen[name] = args[0], output

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_hook(partial(hook, name)))
        yield seen


def calibrate(model, modules, stats, windows, gradients):
    """Run windows through the model and add what each module sees to its statistics.

    model: in evaluation mode with frozen parameters; modules: name -> module of the model; stats:
    name -> object with `LayerStats.add`; windows: from `calibration_windows`; gradients: whether to
    add loss gradients at the outputs besides inputs. For a module that returns q, k, v, the
    gradients at k and v are added. The loss is the loss on the text. The Fisher matrix uses labels
    drawn from the model instead. With such labels, losses after the conversion differ by 0.001 nats
    or less.
    """
    def start_graph(module, args, output):              # the graph starts at the embeddings
        return output.detach().requires_grad_(gradients)

    with record(modules) as seen, model.transformer.drop.register_forward_hook(start_graph):
        for x, y in tracking.brief_bar(windows, desc='calibrate', unit='batch'):
            with torch.set_grad_enabled(gradients):
                loss = model(x, y)[1] * y.numel()
            outputs = {name: output[1:] if isinstance(output, tuple) else (output,)
                       for name, (_, output) in seen.items()}
            wanted = [t for tensors in outputs.values() for t in tensors]
            found = iter(torch.autograd.grad(loss, wanted) if gradients else ())
            for name, (inputs, _) in seen.items():
                # (B, T, m), or per head (B, nh, T, hs)
                g = [t if t.dim() == 3 else t.transpose(1, 2).flatten(2)
                     for t in islice(found, len(outputs[name]))]
                stats[name].add(inputs.detach().flatten(0, 1),
                                torch.cat(g, dim=2).flatten(0, 1) if g else None)


# --------------------------------------------------------------------------------------------------
# low-rank layers

def compress_model(model, method, windows, modules=None, **options):
    """Replace layers of a GPT by low-rank layers, in place.

    method: 'plain', 'whitened' or 'activation'; windows: from `calibration_windows`, or () for
    'plain'; modules: as for `parse_modules`; options: keep, rank or energy, as for `rank_policy`.
    Returns name -> dict for each low-rank layer, with the keys 'rank', 'of' (the full rank) and
    'lost'. 'lost' is the fraction of the layer's energy that is cut, as the method measures energy,
    or None if the layer belongs to other modules. Raises ValueError for wrong options and for
    values that are not finite.
    """
    known = model.config.layer_ranks or {}              # low-rank layers keep at most this rank
    layers = dense_layers(model, layer_names(model, modules))
    shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items()}
    # placeholder energies: refuse wrong options before calibration
    rank_policy({name: torch.ones(min(shape)) for name, shape in shapes.items()}, shapes, method,
                **options)
    sequential = method == 'activation'
    stats = {name: LayerStats(layer.weight, layer.bias is not None)
             for name, layer in layers.items()}
    calibrate(model, layers, stats, windows, gradients=sequential)
    energies, factorizations = {}, {}
    for name in tracking.brief_bar(layers, desc='decompose', unit='layer'):
        found = stats[name].factorization()
        # energies beyond a known rank are rounding errors
        found.energies[known.get(name, found.size):] = 0
        energies[name] = found.energies
        # 'activation' factors its layers again later, so nothing is kept
        if not sequential:
            factorizations[name] = found
    ranks = rank_policy(energies, shapes, method, **options)
    ranks = {name: min(rank or math.inf, known.get(name, math.inf)) for name, rank in ranks.items()
             if rank is not None or name in known}
    if sequential:
        compress_sequentially(model, copy.deepcopy(model), stats, ranks, windows)
    else:
        for name, rank in ranks.items():
            replace_linear(model, name, factorizations[name].factors(rank), stats[name].mean,
                           stats[name].mean)
    c = sync_config(model).config
    lost = {name: (energies[name][rank:].sum() / energies[name].sum().clamp_min(1e-300)).item()
            for name, rank in ranks.items()}
    return {name: dict(rank=rank, of=min(c.layer_shapes[name]), lost=lost.get(name))
            for name, rank in (c.layer_ranks or {}).items()}


@torch.no_grad()
def compress_sequentially(model, dense, stats, ranks, windows):
    """Replace layers by low-rank layers one after another, in forward order.

    The inputs of a new layer come from the compressed model. The layer is fitted so that its
    outputs are as close as possible to the outputs of the dense layer in the original model
    (`InputShiftStats`). model: changed in place; dense: a copy of the original model, which is not
    changed; stats: name -> `LayerStats` of the original model; ranks: name -> rank; windows: from
    `calibration_windows`.
    """
    now = [model.transformer.wte(x) + model.transformer.wpe.weight[:x.size(1)]
           for x, _ in windows]                                                     # (B, T, C) each
    before, blocks = list(now), [*zip(model.transformer.h, dense.transformer.h)]
    for i, (block, original) in enumerate(tracking.brief_bar(blocks, desc='replace', unit='block')):
        for stage in STAGES:
            names = [name for name in ranks if name.startswith(f'h.{i}.{stage}')]   # share inputs
            if not names:
                continue
            # tall layers need only the input x, which they share; others need W x
            keys = {name: 'x' if stats[name].tall else name for name in names}
            shifts = {key: InputShiftStats(stats[name].weight, stats[name].centred, inputs=2)
                      for name, key in keys.items()}
            with record({0: block.get_submodule(stage), 1: original.get_submodule(stage)}) as seen:
                for x_now, x_before in zip(now, before):
                    block(x_now)
                    original(x_before)
                    for shift in shifts.values():
                        shift.add(torch.cat((seen[0][0], seen[1][0]), dim=2).flatten(0, 1))
            for name in names:
                shift = shifts[keys[name]]
                factors = shift.refitted_factorization(stats[name]).factors(ranks[name])
                replace_linear(model, name, factors, *shift.mean.chunk(2))
        now, before = [block(x) for x in now], [original(x) for x in before]


# --------------------------------------------------------------------------------------------------
# ranks. energies: name -> (s), descending; shapes: name -> (m, n). The functions return name ->
# rank, or None for a layer that stays dense because factors would not be smaller.

def rank_policy(energies, shapes, method, keep=None, rank=None, energy=None):
    """Return the rank of each layer from one of three options.

    rank: the same rank for all layers. energy: each layer gets the smallest rank that keeps this
    fraction of its energy. keep: fraction of the weights kept; the ranks come from `best_share` if
    method is 'activation', else from `uniform_share`. Without any option, keep is KEEP. A layer
    that its rank does not make smaller gets None and stays dense.

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
    return (best_share if method == 'activation' else uniform_share)(energies, shapes, keep or KEEP)


def uniform_share(energies, shapes, keep):
    """Return the ranks at which each layer keeps at most the fraction `keep` of its parameters.
    Raises ValueError if a rank would be below 1."""
    check_share(keep, max((m + n) / (m * n) for m, n in shapes.values()))
    if keep == 1:                       # any rank that saves parameters loses energy
        return dict.fromkeys(shapes)
    return {name: beneficial_rank((m, n), math.floor(keep * m * n / (m + n) + 1e-9))
            for name, (m, n) in shapes.items()}


def best_share(energies, shapes, keep):
    """Return the ranks that keep at most the fraction `keep` of all parameters of the given layers
    and lose the least energy. `allocate_ranks` finds these ranks.

    Energies estimate the second-order change of the loss. The estimate is valid for small errors
    only. Used directly, it gives layers with little influence on the loss too low a rank. Each
    layer's energies are therefore divided by the square root of that layer's total energy, a
    compromise between absolute and relative energies (docs/RESULTS.md).
    """
    energies = {name: e / e.sum().clamp_min(1e-300).sqrt() for name, e in energies.items()}
    total = sum(factored_size(shape, None) for shape in shapes.values())
    step = RANK_STEP if min(min(shape) for shape in shapes.values()) >= RANK_STEP_FROM else 1
    check_share(keep, sum(factored_size(shape, step) for shape in shapes.values()) / total)
    return allocate_ranks(energies, shapes, keep * total, step)


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


def cache_shape(c):
    """Return the numbers that determine what attention caches, for the report of compress.py."""
    return dict(n_head=c.n_head, n_kv_head=c.heads['k'], qk_head_dim=c.qk_head_dim,
                v_head_dim=c.v_head_dim, latent_dim=c.latent_dim if c.use_mla else None)


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
            cache_bytes=('cache bytes of a full context', ','))


def describe(report):
    """Return the report of compress.py as text."""
    tuned, speed = report['options']['finetune_iters'], report['speed']
    made = dict(
        lowrank=f'{len(report["layers"])} layers are low-rank',
        mla=f'keys and values of each token share a latent of {report["latent_dim"]} values',
        gqa=f'{report["n_head"]} query heads share {report["n_kv_head"]} key/value heads',
        lowrank_heads=f'heads are narrower: widths of keys {report["qk_head_dim"]}, of values '
                      f'{report["v_head_dim"]}')[report['to']]
    method = f', method {report["method"]!r}' * (report['to'] != 'gqa')
    lines = [f'{made}{method}, {report["seconds"]:.1f} s']
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

"""Low-rank layers in a trained model: statistics on training text, factors in place of weights,
fine-tuning, and a comparison with the model before. The linear algebra is in
lowrank/factorization.py.

Letters: m outputs and n inputs of a layer, s = min(m, n), r rank, N tokens, B batch, T tokens of a
window.
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

BATCH_TOKENS = 4096                 # of a forward pass
MODULES = ('attn', 'mlp')
STAGES = ('attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')   # of a block, in forward order
ROUNDING = torch.finfo(torch.float32).eps           # of an activation, as a share of its mean
RANK_STEP, RANK_STEP_FROM = 8, 128  # ranks are multiples of 8 if all layers are 128 wide: faster
KEEP = 0.6                          # unless keep, rank or energy is given
LEARNING_RATE = 1e-3                # of fine-tuning
BENCHMARK_ROUNDS = 5                # odd, so that one of them is the median


# --------------------------------------------------------------------------------------------------
# layers in place

def parse_modules(modules):
    """'attn,mlp', a list of such words or None, which means all -> list. Raises ValueError for
    other words."""
    words = MODULES if modules is None else (
        modules.replace(' ', '').split(',') if isinstance(modules, str) else modules)
    if not {*words} <= {*MODULES}:
        raise ValueError(f"modules={modules!r}: must be of {', '.join(MODULES)} (nearest: "
                         f"'{','.join(MODULES)}')")
    return words


def layer_names(model, modules=None):
    """The layers that can be factored, block by block. Not W_v if 'weight' scope truncates it at
    each step: that would undo what a product saves."""
    c, modules = model.config, parse_modules(modules)
    truncated = c.svd_truncates and c.svd_scope == 'weight'
    return [name for name in c.layer_shapes
            if name.split('.')[2] in modules and not (truncated and name.endswith('c_v'))]


def dense_layers(model, names):
    """Make each of these layers an nn.Linear of its own, in place: products are multiplied out, and
    a fused c_attn is split. Returns name -> nn.Linear."""
    for name in names:
        layer = model.get_layer(name)
        if hasattr(layer, 'merge'):
            model.set_layer(name, layer.merge())
    return {name: model.transformer.get_submodule(name) for name in names}


def without_adapters(model):
    """Merge adaptive SVD and LoRA into the weights, in place. Returns the model, trainable."""
    dense_layers(model, [*model.config.adaptive_layers, *model.config.lora_layers])
    model.config = replace(model.config, **ADAPTER_DEFAULTS)
    return sync_config(model).requires_grad_(True)


def weights_of(model, modules=None):
    """Every weight matrix of the blocks: name -> (m, n). Changes the model: fused layers are split
    and products multiplied out."""
    modules = parse_modules(modules)
    dense_layers(model, model.config.layer_shapes)
    return {name: layer.weight for name, layer in model.transformer.named_modules()
            if isinstance(layer, torch.nn.Linear) and name.split('.')[2] in modules}


@torch.no_grad()
def sync_config(model):
    """After layers were replaced: write the ranks of products to the configuration, and fuse each
    c_attn that has none. In place; returns the model."""
    ranks = {name: layer.rank for name, layer in model.transformer.named_modules()
             if isinstance(layer, LowRankLinear)}
    model.config = replace(model.config, layer_ranks=ranks or None)
    for attn in (block.attn for block in model.transformer.h):
        parts = [*attn.c_attn.children()]
        if isinstance(attn.c_attn, SplitProjection) and not any(
                isinstance(part, LowRankLinear) for part in parts):
            weight, bias = fuse(parts)
            attn.c_attn = QKVProjection(model.config)
            attn.c_attn.weight = torch.nn.Parameter(weight)
            attn.c_attn.bias = None if bias is None else torch.nn.Parameter(bias)
            attn.c_attn.requires_grad_(parts[0].weight.requires_grad)
    return model


def apply_svd_compression(model, rank, modules=None):
    """Replace weights of a GPT's blocks by their best approximations of this rank, as products of
    two, wherever that saves parameters. Products of this rank or less stay. Needs no data.

    modules: 'attn', 'mlp', 'attn,mlp', or a list of these words; None: all. In place; returns the
    model. Raises ValueError for a rank outside 1..n_embd, for other modules, and for weights that
    are not finite.
    """
    if type(rank) is not int or not 1 <= rank <= model.config.n_embd:
        raise ValueError(f'rank={rank!r}: must be 1 to n_embd={model.config.n_embd}')
    known = model.config.layer_ranks or {}
    names = [name for name in layer_names(model, modules) if known.get(name, rank + 1) > rank]
    for name, layer in dense_layers(model, names).items():
        if beneficial_rank(layer.weight.shape, rank):
            model.set_layer(name, LowRankLinear.from_linear(layer, rank))
    return sync_config(model)


@torch.no_grad()
def replace_linear(model, name, factors, mean, mean_before):
    """Put a product in place of a dense layer.

    factors: U (m, r) and A (r, n). A bias, if the layer has one, keeps the mean output for inputs
    with this mean (n), which was mean_before; for zeros it stays as it is.
    """
    dense, (up, down) = model.transformer.get_submodule(name), factors
    layer = LowRankLinear.from_factors(up, down, dense)
    if dense.bias is not None:
        shift = dense.weight.cpu().double() @ mean_before - up @ (down @ mean)              # (m)
        # dtype first: MPS has no float64
        layer.bias.copy_((dense.bias.cpu().double() + shift).to(layer.bias.dtype))
    model.set_layer(name, layer)


# --------------------------------------------------------------------------------------------------
# statistics

class LayerStats:
    """Statistics of a layer over calibration tokens, as `Factorization` takes them: E[x x^T] of the
    inputs and E[g g^T] of the loss's gradients g at the outputs, both on the smaller side of the
    weight, (s, s), in float64 on the CPU.

    centred: the layer has a bias, which takes the mean error, so that only deviations from the mean
    count. They are summed up within batches and then between batches (Chan, Golub and LeVeque,
    1983), never as a difference of moments, so the result is positive semi-definite.
    """

    def __init__(self, weight, centred, inputs=1):
        """weight (m, n); inputs: how many of them `add` gets, side by side."""
        self.weight, self.centred = weight.detach().cpu().double(), centred
        self.tall = weight.size(0) >= weight.size(1)
        self.tokens, self.sum, self.gradients = 0, 0, None
        self.mean = self.weight.new_zeros(inputs * weight.size(1))

    def reduce(self, x):
        """x (N, n) on the smaller side of the weight, (N, s): x itself or W x."""
        return x if self.tall else x @ self.weight.mT

    def factors(self, x):
        """The rows a (N, p) and b (N, q), linear in x, whose a^T b is summed up."""
        return self.reduce(x), self.reduce(x)

    def add(self, x, g=None):
        """x (N, n), g (N, m) or None."""
        x = x.cpu().double()                                        # MPS has no float64
        count, mean = len(x), x.mean(0)
        step = mean - self.mean
        if self.centred:                                # the step between batches is one more row
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
        """E[a^T b] (p, q), plus noise of the size of float32's rounding on each input: what
        rounding leaves of a constant input does not count beside it."""
        n = self.weight.size(1)
        a, b = self.factors(torch.diag(ROUNDING * self.mean[:n]).repeat(1, len(self.mean) // n))
        return self.sum / self.tokens + a.mT @ b

    def factorization(self):
        """The `Factorization` of the weight for these statistics; without tokens, its SVD."""
        if not self.tokens:
            return Factorization(self.weight)
        inputs, g = self.moments(), None if self.gradients is None else self.gradients / self.tokens
        return Factorization(self.weight, *((inputs, g) if self.tall else (g, inputs)))


class InputShiftStats(LayerStats):
    """Statistics of inputs that change as the layers before are replaced: E[x^ x^^T] (n, n) above
    E[x x^^T] (s, n) of the inputs x^ now and x before. `add` takes them side by side (N, 2n), and
    `mean` (2n) is of both."""

    def factors(self, x):
        now, before = x.chunk(2, dim=1)
        return torch.cat((now, self.reduce(before)), dim=1), now

    def refitted_factorization(self, stats):
        """The `Factorization` of the weight that makes of x^ what is closest to the output for x,
        for the gradients of a layer's `LayerStats`. Covariances instead of moments if `centred`."""
        weight, gradients, n = stats.weight, stats.gradients / stats.tokens, stats.weight.size(1)
        inputs, cross = self.moments().split((n, len(gradients)))
        dense = torch.eye(n, dtype=torch.float64) if self.tall else weight
        refitted = ridge_refit(dense, inputs, cross)                # (s, n)
        if self.tall:
            return Factorization(weight @ refitted, inputs, refitted.mT @ gradients @ refitted)
        return Factorization(refitted, gradients, refitted @ inputs @ refitted.mT)


def calibration_windows(data, tokens, block_size, seed, device):
    """Random windows of the training split with `tokens` tokens, or all there are, in batches:
    list of x, y (B, T)."""
    split = data.tokens('train')
    count = math.ceil(min(tokens, len(split)) / block_size)
    starts = data.sample_offsets('train', count, block_size, torch.Generator().manual_seed(seed))
    return [data.windows(split, part.tolist(), block_size, 'train', device)
            for part in starts.split(max(1, BATCH_TOKENS // block_size))]


@contextmanager
def record(modules):
    """Within the block: name -> (input, output) in the last forward pass, of name -> module."""
    seen = {}

    def hook(name, module, args, output):
        seen[name] = args[0], output

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_hook(partial(hook, name)))
        yield seen


def calibrate(model, modules, stats, windows, gradients):
    """Add inputs, and gradients of the loss if `gradients`, to the statistics of layers.

    model: in evaluation mode, with frozen parameters; modules: name -> module of it; stats: name ->
    what has `LayerStats.add`; windows: of `calibration_windows`. Of a projection that returns
    q, k, v, the gradients at k and v are taken. The loss is that of the text itself. With labels
    drawn from the model, as the Fisher matrix has them, losses differ by 0.001 nats or less
    (docs/MLA.md).
    """
    def start_graph(module, args, output):              # at the embeddings
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
                # (B, T, m), or of heads (B, nh, T, hs)
                g = [t if t.dim() == 3 else t.transpose(1, 2).flatten(2)
                     for t in islice(found, len(outputs[name]))]
                stats[name].add(inputs.detach().flatten(0, 1),
                                torch.cat(g, dim=2).flatten(0, 1) if g else None)


# --------------------------------------------------------------------------------------------------
# low-rank layers

def compress_model(model, method, windows, modules=None, **options):
    """Factor a GPT's layers in place.

    method: 'plain', 'whitened' or 'activation'; windows: of `calibration_windows`, none for
    'plain'; options: keep, rank or energy, see `rank_policy`. Returns the products of the model:
    name -> {'rank', 'of': the full rank, 'lost': the share of the layer's energy in the method's
    measure, None for a layer of other modules}. Raises ValueError.
    """
    known = model.config.layer_ranks or {}              # products have no more than their rank
    layers = dense_layers(model, layer_names(model, modules))
    shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items()}
    # with any energies: options that do not fit are refused before the work
    rank_policy({name: torch.ones(min(shape)) for name, shape in shapes.items()}, shapes, method,
                **options)
    sequential = method == 'activation'
    stats = {name: LayerStats(layer.weight, layer.bias is not None)
             for name, layer in layers.items()}
    calibrate(model, layers, stats, windows, gradients=sequential)
    energies, factorizations = {}, {}
    for name in tracking.brief_bar(layers, desc='decompose', unit='layer'):
        found = stats[name].factorization()
        found.energies[known.get(name, found.size):] = 0            # rounding
        energies[name] = found.energies
        if not sequential:                              # other inputs need another one: save memory
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
    """Replace layer after layer, each for the inputs it gets from the products before it, to give
    what the dense model's layer gives for its own (`InputShiftStats`).

    The windows run through both models side by side, block by block. stats: name -> `LayerStats` of
    the dense model; ranks: name -> rank.
    """
    now = [model.transformer.wte(x) + model.transformer.wpe.weight[:x.size(1)]
           for x, _ in windows]                                                     # (B, T, C) each
    before, blocks = list(now), [*zip(model.transformer.h, dense.transformer.h)]
    for i, (block, original) in enumerate(tracking.brief_bar(blocks, desc='replace', unit='block')):
        for stage in STAGES:
            names = [name for name in ranks if name.startswith(f'h.{i}.{stage}')]   # of one input
            if not names:
                continue
            shift = InputShiftStats(stats[names[0]].weight, stats[names[0]].centred, inputs=2)
            with record({0: block.get_submodule(stage), 1: original.get_submodule(stage)}) as seen:
                for x_now, x_before in zip(now, before):
                    block(x_now)
                    original(x_before)
                    shift.add(torch.cat((seen[0][0], seen[1][0]), dim=2).flatten(0, 1))
            for name in names:
                factors = shift.refitted_factorization(stats[name]).factors(ranks[name])
                replace_linear(model, name, factors, *shift.mean.chunk(2))
        now, before = [block(x) for x in now], [original(x) for x in before]


# --------------------------------------------------------------------------------------------------
# ranks: energies (name -> (s), descending), shapes (name -> (m, n)) -> name -> rank, or None for a
# layer that stays dense because a product would be no smaller

def rank_policy(energies, shapes, method, keep=None, rank=None, energy=None):
    """The ranks of one option. rank: the same one for all layers; energy: the smallest rank that
    keeps this fraction of a layer's energy; keep: a share of all numbers, `best_share` for the
    method 'activation', else `uniform_share`; none of them: a share of KEEP. Raises ValueError for
    values that do not fit."""
    if rank is not None:
        most = min(min(shape) for shape in shapes.values())
        if rank > most:
            raise ValueError(f'rank={rank}: a layer has no more than {most} (nearest: {most})')
        return {name: beneficial_rank(shape, rank) for name, shape in shapes.items()}
    if energy is not None:
        return {name: beneficial_rank(shape, rank_for_energy(energies[name].sqrt(), energy))
                for name, shape in shapes.items()}
    return (best_share if method == 'activation' else uniform_share)(energies, shapes, keep or KEEP)


def uniform_share(energies, shapes, keep):
    """The rank at which each layer keeps this share of its numbers. Raises ValueError if that is
    below 1."""
    check_share(keep, max((m + n) / (m * n) for m, n in shapes.values()))
    if keep == 1:                       # the largest rank that saves would lose something
        return dict.fromkeys(shapes)
    return {name: beneficial_rank((m, n), math.floor(keep * m * n / (m + n) + 1e-9))
            for name, (m, n) in shapes.items()}


def best_share(energies, shapes, keep):
    """The ranks that lose least together and keep this share of all numbers (`allocate_ranks`).

    Energies are divided by the root of each layer's total. That is halfway between the second-order
    change of the loss and equal shares of each layer's energy: the former holds for small errors
    only, and takes too much from layers that the loss hardly feels yet (docs/RESULTS.md).
    """
    energies = {name: e / e.sum().clamp_min(1e-300).sqrt() for name, e in energies.items()}
    total = sum(factored_size(shape, None) for shape in shapes.values())
    step = RANK_STEP if min(min(shape) for shape in shapes.values()) >= RANK_STEP_FROM else 1
    check_share(keep, sum(factored_size(shape, step) for shape in shapes.values()) / total)
    return allocate_ranks(energies, shapes, keep * total, step)


def check_share(keep, least):
    """Raise ValueError unless a share is at least the least that is possible and at most 1."""
    if not least <= keep <= 1:
        raise ValueError(f'keep={keep}: no possible share of these layers (nearest: '
                         f'{1 if keep > 1 else math.ceil(least * 1e4) / 1e4})')


# --------------------------------------------------------------------------------------------------
# fine-tuning

def finetune(model, data, options, saved, device, teacher=None):
    """Train all parameters in place on random windows of the training split, with a teacher by
    `distillation_loss`: 5% warm-up, then cosine to a tenth of the learning rate. No weight decay,
    which would shrink both factors of a product.

    options: finetune_iters, seed, and optimizer, learning_rate and batch_size, None for the
    default; saved: a checkpoint, for batch size and betas, or {}. Leaves the model in training
    mode. Raises ValueError if the loss is not finite.
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
    torch.manual_seed(cfg.seed)                                     # of dropout
    try:
        for step in tracking.brief_bar(range(cfg.max_iters), desc='fine-tune', unit='step'):
            for group in state.optimizer.param_groups:
                group['lr'] = get_lr(step, cfg)
            batch = data.batch('train', cfg.batch_size, cfg.block_size, state.data_rng, device)
            train_step(state, [batch], loss_of)
    except FloatingPointError as e:
        raise ValueError(f'learning_rate={rate}: fine-tuning failed after step {state.iter_num}: '
                         f'{e} (nearest: a smaller one)') from None


def distillation_loss(teacher, model, x, y):
    """Cross-entropy plus the Kullback-Leibler divergence of the predictions from the teacher's
    (arXiv:1503.02531, at temperature 1). x, y (B, T)."""
    logits, loss = model(x, y)                                      # (B, T, vocab)
    with torch.no_grad():
        target = F.log_softmax(teacher(x, y)[0], dim=-1)
    divergence = F.kl_div(F.log_softmax(logits, dim=-1), target, reduction='none', log_target=True)
    return loss + divergence.sum(-1).mean()


# --------------------------------------------------------------------------------------------------
# before and after

def validation_loss(model, data, device, seed):
    """Nats per token over the whole validation split; the prefix-only loss if V sees the future.
    Leaves the model in evaluation mode."""
    options = SimpleNamespace(batch_size=1, block_size=model.config.block_size, seed=seed)
    row = Evaluation(options, model, data, device, devices.autocast(device, 'float32'),
                     model.config.is_noncausal).final()
    model.eval()
    return row.get('val/prefix_loss', row['val/loss'])


def compare_models(models, data, device, seed):
    """Sizes, samples and speeds of two models: name -> [of the first, of the second], and 'speed'
    as from `benchmark_pair`."""
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


def sample_text(model, data, device, seed):
    torch.manual_seed(seed)
    return sample(model, data, device, devices.autocast(device, 'float32'))


def benchmark_pair(models, data, device, seed):
    """Time generation of two models in turn.

    Returns for 'prefill' (a prompt) and 'decode' (each token after it) tokens_per_s, medians of
    [the first, the second], and the ratio second over first, paired, with its quartiles.
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


# label and format of numbers before and after
ROWS = dict(val_loss=('validation loss', '.4f'), perplexity=('perplexity', '.4g'),
            block_params=('parameters of the blocks', ','),
            attention_params=('parameters of attention', ','),
            params=('parameters with position embeddings', ','),
            bytes=('bytes of the weights', ','),
            cache_bytes=('cache bytes of a full context', ','))


def describe(report):
    """The report of compress.py as text."""
    tuned, speed = report['options']['finetune_iters'], report['speed']
    made = (f'{len(report["layers"])} layers are products of two' if report['to'] == 'lowrank' else
            f'keys and values of each layer from a latent of {report["latent_dim"]} numbers')
    lines = [f'{made}, method {report["method"]!r}, {report["seconds"]:.1f} s']
    lines += [f'ranks in block {block}: ' + ', '.join(
        f'{name.split(".", 2)[2]} {layer["rank"]}' for name, layer in layers)
        for block, layers in groupby(report['layers'].items(), lambda item: item[0].split('.')[1])]
    if tuned:
        lines.append(f'{tuned} steps of fine-tuning in {report["finetune_seconds"]:.1f} s, from a '
                     f'loss of {report["val_loss_before_finetuning"]:.4f}')
    rows = [['prefix-only losses' if report['prefix_only'] else '', 'before', 'after',
             'after / before']]
    for key, (label, form) in ROWS.items():
        before, after = report[key]
        rows.append([label, f'{before:{form}}', f'{after:{form}}',
                     f'{after / before:.1%}' if before else ''])    # 'sequence' scope: no cache
    for part, label in (('prefill', f'tokens/s of a prompt of {speed["prompt"]}'),
                        ('decode', f'tokens/s of the {speed["tokens"] - 1} after it')):
        ratio = '{:.2f} ({:.2f} to {:.2f})'.format(speed[part]['ratio'], *speed[part]['quartiles'])
        rows.append([label, *(f'{rate:,.0f}' for rate in speed[part]['tokens_per_s']), ratio])
    before, after = report['samples']
    return '\n'.join([
        *lines, *format_table(rows),
        "after / before of tokens/s: the median of the rounds' ratios, with quartiles, which can\n"
        'differ from the ratio of the two medians\nsample before:', before,
        'sample after:', after])

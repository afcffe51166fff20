"""
What compress.py does to a model in memory: statistics of its layers on training text, low-rank factors in their place,
and multi-head latent attention in the place of ordinary attention. The linear algebra is lowrank/factorization.py's.
"""

import copy
import math
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lowrank.factorization import (Factorization, allocate_ranks, beneficial_rank, factored_size,
                                   ridge_refit)
from lowrank.layers import LowRankLinear, SplitProjection, fuse
from lowrank.spectrum import rank_for_energy
from model import ADAPTER_DEFAULTS, GPT, QKVProjection
from runtime import tracking

BATCH_TOKENS = 4096                 # of a forward pass
MODULES = ('attn', 'mlp')
STAGES = ('attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')   # of a block, each fed by those before it
ROUNDING = torch.finfo(torch.float32).eps               # of an activation, as a share of its mean
STEP, STEP_FROM = 8, 128            # ranks are multiples of 8, which hardware likes, where layers are as wide as that


# ----------------------------------------------------------------------------------------------------------------------
# layers in place

def layer_names(model, modules=MODULES):
    """The layers that can be factored, block by block. Not W_v where 'weight' scope cuts it at each step: what a layer
    of factors saves would be lost there."""
    c = model.config
    cut = c.svd_truncates and c.svd_scope == 'weight'
    return [name for name in c.layer_shapes if name.split('.')[2] in modules and not (cut and name.endswith('c_v'))]


def dense_layers(model, names):
    """Make each of these layers a dense one of its own, in place: products are multiplied out, a fused c_attn is split
    -> name -> Linear."""
    for name in names:
        layer = model.get_layer(name)
        if hasattr(layer, 'merge'):
            model.set_layer(name, layer.merge())
    return {name: model.transformer.get_submodule(name) for name in names}


def without_adapters(model):
    """Adaptive SVD and LoRA become part of the weights, in place -> the model, all of it trainable."""
    c = model.config
    dense_layers(model, [*c.adaptive_layers, *c.lora_layers])
    model.config = replace(c, **ADAPTER_DEFAULTS)
    return settle(model).requires_grad_(True)


def weights_of(model, modules=MODULES):
    """Every weight matrix of the blocks, fused ones apart and products multiplied out, which changes the model: name
    -> (m, n)."""
    dense_layers(model, [*model.config.layer_shapes])
    return {name: layer.weight for name, layer in model.transformer.named_modules()
            if isinstance(layer, torch.nn.Linear) and name.split('.')[2] in modules}


@torch.no_grad()
def settle(model):
    """After layers were replaced: the configuration says which are products, and a c_attn without any is fused."""
    ranks = {name: layer.rank for name, layer in model.transformer.named_modules() if isinstance(layer, LowRankLinear)}
    model.config = replace(model.config, layer_ranks=ranks or None)
    for i, block in enumerate(model.transformer.h):
        c_attn = block.attn.c_attn
        if isinstance(c_attn, SplitProjection) and not any(name.startswith(f'h.{i}.attn.c_attn.') for name in ranks):
            weight, bias = fuse((c_attn.c_q, c_attn.c_k, c_attn.c_v))
            trained = any(p.requires_grad for p in c_attn.parameters())
            block.attn.c_attn = QKVProjection(model.config).to(weight).requires_grad_(trained)
            block.attn.c_attn.weight.copy_(weight)
            if bias is not None:
                block.attn.c_attn.bias.copy_(bias)
    return model


def apply_svd_compression(model, rank, modules=MODULES):
    """Replace the weights of a GPT's blocks by their best rank-`rank` approximations, as products of two, wherever that
    saves parameters; products of that rank or less stay. No data needed. modules: of MODULES, a list or like
    'attn,mlp'. In place -> the model. Raises ValueError for a rank outside 1..n_embd, other modules, and weights that
    are not finite."""
    modules = modules.split(',') if isinstance(modules, str) else modules
    if set(modules) - set(MODULES):
        raise ValueError(f'modules={list(modules)}: valid are {", ".join(MODULES)}')
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= model.config.n_embd:
        raise ValueError(f'rank={rank!r}: must be 1 to n_embd={model.config.n_embd}')
    known = model.config.layer_ranks or {}
    names = [name for name in layer_names(model, modules) if known.get(name, rank + 1) > rank]
    for name, layer in dense_layers(model, names).items():
        if beneficial_rank(layer.weight.shape, rank):
            model.set_layer(name, LowRankLinear.from_linear(layer, rank))
    return settle(model)


# ----------------------------------------------------------------------------------------------------------------------
# statistics

class Moments:
    """Means of a layer's inputs over calibration tokens, and sums of a^T b for rows a (N, p) and b (N, q) that are
    linear in these inputs; float64, on the CPU. Centred: of deviations from the means, batch by batch and then between
    batches (Chan, Golub and LeVeque, 1983), never a difference of moments: with a = b, positive semi-definite."""

    def __init__(self, weight, centred):
        """weight (m, n), s = min(m, n). centred: a bias will take the mean error, so only deviations count."""
        self.weight, self.centred = weight.detach().cpu().double(), centred
        self.tall = len(weight) >= weight.size(1)
        self.tokens, self.means, self.inputs = 0, (0, 0), 0         # means: (n) of each input that `rows` takes

    def small(self, x):
        """x (N, n) on the layer's smaller side, (N, s): x itself, or W x."""
        return x if self.tall else x @ self.weight.mT

    def add(self, *inputs):
        """inputs: what `rows` takes, (N, n) each."""
        inputs = [x.cpu().double() for x in inputs]                 # MPS has no float64
        count, means = len(inputs[0]), [x.mean(0) for x in inputs]
        steps = [mean - known for mean, known in zip(means, self.means)]
        if self.centred:                                            # the step between batches is one more row
            weight = (self.tokens * count / (self.tokens + count)) ** 0.5
            inputs = [torch.cat((x - mean, weight * step[None])) for x, mean, step in zip(inputs, means, steps)]
        self.tokens += count
        self.means = [known + step * (count / self.tokens) for known, step in zip(self.means, steps)]
        a, b = self.rows(*inputs)
        self.inputs = self.inputs + a.mT @ b                        # (p, q)

    def moments(self):
        """E[a^T b] (p, q), with noise of the size of float32's rounding on each input, the same now and before: beside
        it what rounding leaves of a constant input does not count."""
        noise = torch.diag(ROUNDING * self.means[0])                # (n, n)
        a, b = self.rows(*[noise] * len(self.means))
        return self.inputs / self.tokens + a.mT @ b


class Statistics(Moments):
    """Of a layer's inputs x, and of the loss's gradients g at its outputs, both on its smaller side, as `Factorization`
    takes them."""
    gradients = None

    def rows(self, x):
        return self.small(x), self.small(x)

    def add(self, x, g=None):
        """x (N, n), g (N, m) or None."""
        super().add(x)
        if g is not None:
            g = g.cpu().double()
            g = g @ self.weight if self.tall else g                 # (N, s)
            self.gradients = (0 if self.gradients is None else self.gradients) + g.mT @ g       # (s, s)

    def mean(self):
        """Of x: (n)."""
        return self.means[0]

    def factorization(self):
        """Of the weight, for inputs and gradients as they were."""
        inputs, gradients = self.moments(), None if self.gradients is None else self.gradients / self.tokens
        return Factorization(self.weight, *((inputs, gradients) if self.tall else (gradients, inputs)))


def batches(data, tokens, block_size, seed, device):
    """Random windows of the training split, `tokens` tokens or all there are -> list of x, y (B, T)."""
    split = data.tokens('train')
    count = math.ceil(min(tokens, len(split)) / block_size)
    starts = data.sample_offsets('train', count, block_size, torch.Generator().manual_seed(seed))
    return [data.windows(split, part.tolist(), block_size, 'train', device)
            for part in starts.split(max(1, BATCH_TOKENS // block_size))]


def calibrate(model, modules, statistics, windows, gradients):
    """Fill the statistics: name -> `Statistics` of modules: name -> module of the model. gradients: whether those are
    wanted, of the loss on the text itself; with labels drawn from the model, as the Fisher matrix has it, losses differ
    by 0.001 nats or less (docs/MLA.md). Of a projection that gives q, k, v those at k and v are taken."""
    seen = {}
    model.eval()                                                    # an evaluation leaves it in training mode

    def look(module, args, output, name):
        if not gradients:
            seen[name] = args[0], []
            return None
        outputs = output[1:] if isinstance(output, tuple) else (output,)
        probes = [torch.zeros_like(t, requires_grad=True) for t in outputs]                     # what is added to them
        seen[name] = args[0], probes
        moved = [t + probe for t, probe in zip(outputs, probes)]
        return (output[0], *moved) if isinstance(output, tuple) else moved[0]

    hooks = [module.register_forward_hook(lambda *args, name=name: look(*args, name))
             for name, module in modules.items()]
    try:
        for x, y in tracking.brief_bar(windows, desc='calibrate', unit='batch'):
            for attention in (nullcontext(), sdpa_kernel(SDPBackend.MATH)):
                with attention, torch.set_grad_enabled(gradients):
                    loss = model(x, y)[1] * y.numel()
                found = [p for _, probes in seen.values() for p in probes]
                found = torch.autograd.grad(loss, found) if gradients else ()
                if all(g.isfinite().all() for g in found):          # flash attention's are not where softmax saturates
                    break
            found = iter(found)
            for name, (inputs, probes) in seen.items():
                g = [next(found) for _ in probes]                   # (B, T, m), or of heads (B, nh, T, hs)
                g = [t.transpose(1, 2).flatten(2) if t.dim() == 4 else t for t in g]            # (B, T, m)
                statistics[name].add(inputs.detach().flatten(0, 1), torch.cat(g, dim=2).flatten(0, 1) if g else None)
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def naming(layer):
    """A factorization that fails in here, of what is not finite, is a ValueError that names the layer."""
    try:
        yield
    except (ValueError, torch.linalg.LinAlgError) as e:
        raise ValueError(f'{layer}: {e}') from None


# ----------------------------------------------------------------------------------------------------------------------
# low-rank layers

def low_rank(model, method, choose, modules, windows):
    """Factor a GPT's layers in place. method: 'plain', 'whitened' or 'activation'; choose: name -> energies (s), name
    -> shape (m, n) -> name -> rank or None, which a layer that is a product already need not have; windows: of
    `batches`, for all methods but 'plain' -> what was lost of each layer's energy, in the method's measure: name ->
    share."""
    known = model.config.layer_ranks or {}                          # products have no more than their rank to keep
    layers = dense_layers(model, layer_names(model, modules))
    shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items()}
    choose({name: torch.ones(min(shape)) for name, shape in shapes.items()}, shapes)        # refuses before the work
    measured, in_turn = method != 'plain', method == 'activation'
    statistics = {}
    if measured:
        statistics = {name: Statistics(layer.weight, layer.bias is not None) for name, layer in layers.items()}
        calibrate(model, layers, statistics, windows, gradients=in_turn)
    energies, factorizations = {}, {}
    for name, layer in tracking.brief_bar(layers.items(), desc='decompose', unit='layer'):
        with naming(name):
            found = statistics[name].factorization() if measured else Factorization(layer.weight)
        found.energies[known.get(name, found.size):] = 0            # rounding
        energies[name] = found.energies
        if not in_turn:                                             # else made anew, of other inputs: room for one only
            factorizations[name] = found
    ranks = choose(energies, shapes)
    ranks = {name: min(rank or math.inf, known.get(name, math.inf)) for name, rank in ranks.items()
             if rank is not None or name in known}
    if in_turn:
        replace_in_turn(model, copy.deepcopy(model), statistics, ranks, windows)
    else:
        for name, rank in ranks.items():
            mean = statistics[name].mean() if measured else None
            put(model, name, *factorizations[name].factors(rank), mean, mean)
    settle(model)
    return {name: (energies[name][rank:].sum() / energies[name].sum().clamp_min(1e-300)).item()
            for name, rank in ranks.items()}


@torch.no_grad()
def put(model, name, up, down, mean_before, mean_now):
    """The product up (m, r) @ down (r, n) in the place of a dense layer, whose bias, if it has one, keeps the mean
    output: for inputs (n) with these means before and now; None: it stays."""
    dense = model.transformer.get_submodule(name)
    layer = LowRankLinear.from_factors(up, down, dense)
    if dense.bias is not None and mean_before is not None:
        shift = dense.weight.cpu().double() @ mean_before - up @ (down @ mean_now)              # (m)
        layer.bias.copy_((dense.bias.cpu().double() + shift).to(layer.bias.dtype))              # MPS has no float64
    model.set_layer(name, layer)


@torch.no_grad()
def replace_in_turn(model, dense, statistics, ranks, windows):
    """`put` layer after layer, each made for the inputs it gets now that those before it are replaced, to give what the
    dense model's layer gives for its own (`Shift`). windows of `batches` run through both models side by side, a block
    at a time. statistics, ranks: name -> `Statistics` of the dense model, rank."""
    bar = tracking.brief_bar(total=len(ranks), desc='replace', unit='layer')
    model.eval(), dense.eval()
    now = [input_of(model, model.transformer.h[0], x) for x, _ in windows]                      # (B, T, C) each
    before = list(now)
    for i, (block, original) in enumerate(zip(model.transformer.h, dense.transformer.h)):
        for stage in STAGES:
            names = [name for name in ranks if name.startswith(f'h.{i}.{stage}')]               # all with one input
            shift = Shift(statistics[names[0]]) if names else None
            for x_now, x_before in zip(now, before) if names else ():
                shift.add(*(input_of(part, part.get_submodule(stage), x).flatten(0, 1)
                            for part, x in ((block, x_now), (original, x_before))))             # (N, n) each
            for name in names:
                with naming(name):
                    factors = shift.factorization(statistics[name]).factors(ranks[name])
                put(model, name, *factors, *reversed(shift.means))
                bar.update()
        now, before = [block(x) for x in now], [original(x) for x in before]
    bar.close()


class Shift(Moments):
    """Of a layer's inputs as they are now, x^, and as they were, x: E[x^ x^^T] (n, n) above E[x x^^T] (s, n)."""
    def __init__(self, statistics):
        super().__init__(statistics.weight, statistics.centred)

    def rows(self, now, before):
        return torch.cat((now, self.small(before)), dim=1), now

    def factorization(self, statistics):
        """Of the weight that best makes of x^ what the layer made of x, for the gradients in `statistics` of the layer
        or, where n <= m, of another one with the same inputs. Covariances only, where a bias takes the means."""
        weight, gradients, n = statistics.weight, statistics.gradients / statistics.tokens, self.weight.size(1)
        both = self.moments()
        inputs, cross = both[:n], both[n:]
        as_it_was = torch.eye(n, dtype=torch.float64) if self.tall else weight
        refitted = ridge_refit(as_it_was, inputs, cross)                  # (s, n)
        if self.tall:
            return Factorization(weight @ refitted, inputs, refitted.mT @ gradients @ refitted)
        return Factorization(refitted, gradients, refitted @ inputs @ refitted.mT)


class _Reached(Exception):
    pass


def input_of(module, layer, x):
    """What `layer` inside the module gets when that gets x; what comes after it is not computed."""
    def stop(_, args):
        raise _Reached(args[0])
    hook = layer.register_forward_pre_hook(stop)
    try:
        module(x)
    except _Reached as e:
        return e.args[0]
    finally:
        hook.remove()
    raise AssertionError('the layer was not reached')


def fixed_rank(rank):
    """`choose` of `low_rank`: the same rank for all layers that it makes smaller. Raises ValueError above a layer's."""
    def choose(energies, shapes):
        most = min(min(shape) for shape in shapes.values())
        if rank > most:
            raise ValueError(f'rank={rank}: a layer has no more than {most} (nearest: {most})')
        return {name: beneficial_rank(shape, rank) for name, shape in shapes.items()}
    return choose


def rank_of_energy(fraction):
    """The smallest rank that keeps this fraction of each layer's energy, where it makes the layer smaller."""
    return lambda energies, shapes: {name: beneficial_rank(shape, rank_for_energy(energies[name].sqrt(), fraction))
                                     for name, shape in shapes.items()}


def uniform_share(keep):
    """The rank at which each layer keeps this share of its numbers. Raises ValueError where that is below 1."""
    def choose(energies, shapes):
        if keep >= 1:                                               # not the largest rank that saves: a layer loses it
            return dict.fromkeys(shapes)
        ranks = {name: math.floor(keep * m * n / (m + n) + 1e-9) for name, (m, n) in shapes.items()}
        if min(ranks.values()) < 1:
            least = max((m + n) / (m * n) for m, n in shapes.values())
            raise ValueError(f'keep={keep}: leaves no rank at all (nearest: {min(1, math.ceil(least * 1e4) / 1e4)})')
        return {name: beneficial_rank(shapes[name], rank) for name, rank in ranks.items()}
    return choose


def best_share(keep):
    """`allocate_ranks` that keep this share of all numbers, of energies over the root of each layer's total: halfway
    between what the second-order change of the loss says and the same share of each layer's energy. The former holds
    for small errors only; by itself it takes too much from layers that the loss hardly feels yet (docs/RESULTS.md)."""
    def choose(energies, shapes):
        energies = {name: e / e.sum().clamp_min(1e-300).sqrt() for name, e in energies.items()}
        total = sum(factored_size(shape, None) for shape in shapes.values())
        step = STEP if min(min(shape) for shape in shapes.values()) >= STEP_FROM else 1
        try:
            return allocate_ranks(energies, shapes, keep * total, step)
        except ValueError:
            least = sum(factored_size(shape, step) for shape in shapes.values()) / total
            raise ValueError(f'keep={keep}: leaves less than rank {step} a layer (nearest: '
                             f'{min(1, math.ceil(least * 1e4) / 1e4)})') from None
    return choose


# ----------------------------------------------------------------------------------------------------------------------
# ordinary attention -> MLA

@torch.no_grad()
def to_mla(model, latent_dim, windows):
    """The model with multi-head latent attention. Keys and values of each layer, [W_k; W_v] x, become [U_k; U_v] W_a x;
    windows: of `batches`, for the factors that are best for what the loss makes of their errors there; None: for the
    SVD of the weights."""
    known = model.config.layer_ranks or {}
    queries = {f'h.{i}.attn.c_attn.query': known.get(f'h.{i}.attn.c_attn.c_q') for i in range(model.config.n_layer)}
    dense_layers(model, [name for name in model.config.layer_shapes if '.c_attn.' in name])
    settle(model)                                                   # fused, whatever they were
    config = replace(model.config, use_mla=True, mla_latent_dim=latent_dim)     # refused before the work, if at all
    attentions = {i: block.attn for i, block in enumerate(model.transformer.h)}
    statistics = {i: Statistics(key_value_weight(attn), attn.c_attn.bias is not None) for i, attn in attentions.items()}
    if windows is not None:
        calibrate(model, {i: attn.c_attn for i, attn in attentions.items()}, statistics, windows, gradients=True)
    state = model.state_dict()
    new = GPT(config).to(state['lm_head.weight'])
    for i, attn in tracking.brief_bar(attentions.items(), desc='convert', unit='layer'):
        prefix = f'transformer.h.{i}.attn.c_attn.'
        with naming(f'h.{i}.attn.c_attn'):
            parts = latent_projection(attn, latent_dim, statistics[i])
        state = {name: w for name, w in state.items() if not name.startswith(prefix)}
        state |= {prefix + name: part.to(attn.c_attn.weight.dtype) for name, part in parts.items()}
    new.load_state_dict(state)
    for name, rank in queries.items():
        if rank is not None:                                        # a product it was, and is
            new.set_layer(name, LowRankLinear.from_linear(new.transformer.get_submodule(name), rank))
    new.svd_basis = model.svd_basis
    return settle(new)


def key_value_weight(attn):
    """[W_k; W_v] (2C, C). 'weight' scope: the W_v that it leaves, whose rank its factors do not exceed, so that it
    finds nothing more to cut."""
    W_v = attn.value_weight().flatten(0, 1)
    return torch.cat((attn.c_attn.weight.chunk(3)[1], W_v))


def latent_projection(attn, latent_dim, statistics):
    """State dict of the `LatentProjection` in the place of a `QKVProjection`, biases where that has them. statistics
    without tokens: the plain SVD.

    A bias can take the mean error, so only the covariance of the inputs counts then, else their second moment. A key's
    bias changes no attention weight."""
    weight, bias, seen = statistics.weight, attn.c_attn.bias, statistics.tokens > 0             # (2C, C)
    factorization = statistics.factorization() if seen else Factorization(weight)
    up, down = factorization.factors(latent_dim)                                                # (2C, d), (d, C)
    k_up, v_up = up.chunk(2)
    parts = {'query.weight': attn.c_attn.weight.chunk(3)[0], 'kv_down.weight': down, 'k_up.weight': k_up,
             'v_up.weight': v_up}
    if bias is not None:
        b_q, _, b_v = bias.cpu().double().chunk(3)
        lost = (weight.chunk(2)[1] - v_up @ down) @ statistics.mean() if seen else 0            # (C)
        parts |= {'query.bias': b_q, 'v_up.bias': b_v + lost}
    return parts

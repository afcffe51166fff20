"""Low-rank layers and MLA in a model have the least error that linear algebra allows."""

import copy
from dataclasses import replace
from functools import partial
from itertools import product
from unittest import mock

import pytest
import torch

from helpers import RANKS, TEXT, cached_logits, equal, mla, normal, svd, tokens, whole_truth
from lowrank.factorization import RIDGE, Curve
from model import GPT, GPTConfig
from runtime.data import Dataset, write_dataset
from tools import attention_conversion, calibration
from tools import model_compression as layers
from tools.attention_conversion import to_gqa, to_lowrank_heads, to_mla

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def windows(toy):
    """windows(tokens, device) returns calibration windows of the training split."""
    return lambda tokens=512, device='cpu': calibration.calibration_windows(
        Dataset(toy), tokens, 16, 1337, device)


def random_model(dtype=torch.float32, device='cpu', **options):
    """Return a model whose weights and biases are large enough that each affects the logits."""
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(**dict(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=17) | options))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=.3)
    return model.to(torch.float32 if device == 'mps' else dtype).to(device).eval().requires_grad_(
        False)


def reloaded(model, **changes):
    """Return a new model with the same weights and a changed configuration."""
    new = GPT(replace(model.config, **changes)).to(model.lm_head.weight)
    new.load_state_dict(model.state_dict())
    return new.eval()


@torch.no_grad()
def difference(a, b):
    """Return the largest difference of logits, on tokens that no calibration has seen."""
    idx = torch.randint(17, (8, 16),
                        generator=torch.Generator().manual_seed(5)).to(a.lm_head.weight.device)
    return (a(idx, idx)[0] - b(idx, idx)[0]).abs().max().item()


def rounding(model):
    """Return the largest difference of logits that rounding can cause. The SVD of V works in
    float32."""
    return 1000 * torch.finfo(
        torch.float32 if model.config.svd_truncates else model.lm_head.weight.dtype).eps


def seen(model, names, windows):
    """Return what hooks record for each layer: name -> inputs (N, n), outputs (N, m) and gradients
    of the loss at the outputs (N, m). For a projection to queries, keys and values the outputs are
    keys and values."""
    model, found = copy.deepcopy(model).requires_grad_(True), {}

    def look(name, module, args, output):
        found[name] = args[0], output[1:] if isinstance(output, tuple) else (output,)
        for t in found[name][1]:
            t.retain_grad()

    def rows(*tensors):  # (B, T, m), or of heads (B, nh, T, hs)
        return torch.cat([(t.transpose(1, 2) if t.dim() == 4 else t).flatten(2) for t in tensors],
                         2).flatten(0, 1)
    for name in names:
        model.transformer.get_submodule(name).register_forward_hook(partial(look, name))
    (x, y), = windows
    (model(x, y)[1] * y.numel()).backward()
    return {name: (rows(x.detach()), rows(*outputs).detach(), rows(*(t.grad for t in outputs)))
            for name, (x, outputs) in found.items()}


def centred(x):
    return x - x.mean(0)


# --------------------------------------------------------------------------------------------------
# statistics

def test_calibration_windows_are_drawn_from_the_training_split_by_the_seed(tmp_path):
    """The seed decides which windows of the training split are used for calibration. There are as
    many whole windows as the requested tokens need, at most all, in batches of 512 tokens."""
    write_dataset(tmp_path / 'data', 5 * TEXT, 'char', source='tests')
    data = Dataset(tmp_path / 'data')
    for asked, seed, counts in ((1, 1, [1]), (16, 1, [1]), (17, 1, [2]), (513, 2, [32, 1]),
                                (10 ** 18, 1, [*[32] * 20, 24])):
        found, again = (calibration.calibration_windows(data, asked, 16, s, 'cpu')
                        for s in (seed, 1))
        x, y = map(torch.cat, zip(*found))
        assert [len(x) for x, _ in found] == counts and torch.equal(x[:, 1:], y[:, :-1])
        assert torch.equal(found[0][0], again[0][0]) == (seed == 1)


# --------------------------------------------------------------------------------------------------
# SVD without calibration

def cut_by_hand(model, rank):
    """Truncate each weight in place by torch.linalg.svd if that saves parameters."""
    for i, part in product(range(2), ('attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')):
        weight = model.transformer.h[i].get_submodule(part).weight.data
        for own in weight.chunk(3 if part == 'attn.c_attn' else 1):
            if rank * sum(own.shape) < own.numel():
                own.copy_(whole_truth(own.cpu().double(), rank))
    return model


@pytest.mark.any_device
@pytest.mark.parametrize('bias, dtype', [(False, torch.float32), (True, torch.float64)])
def test_svd_compression_is_the_svd_by_hand(device, bias, dtype):
    """`apply_svd_compression` equals a truncation by torch.linalg.svd, and works in place. Square
    layers (16, 16) stay dense from rank 8, those of the MLP (64, 16) from rank 13."""
    for rank, factored in ((1, 12), (7, 12), (8, 4), (12, 4), (13, 0), (16, 0)):
        model, before = random_model(dtype, device,
                                     bias=bias), random_model(dtype, device, bias=bias)
        assert layers.apply_svd_compression(model, rank) is model
        assert (model.config == before.config) == equal(model.state_dict(),
                                                        before.state_dict()) == (factored == 0)
        assert difference(model, cut_by_hand(before, rank)) < rounding(model)
        assert [*(model.config.layer_ranks or {}).values()] == [rank] * factored
        assert difference(reloaded(model), model) == 0


@pytest.mark.parametrize('trained', [True, False])
def test_svd_compression_of_some_modules_and_of_what_is_compressed(trained):
    """`modules` selects the layers. Products of at most the given rank stay, none grows, and
    requires_grad does not change."""
    model = layers.apply_svd_compression(random_model().requires_grad_(trained), 6, ['mlp'])
    names, mlp = layers.layer_names(model), model.transformer.h[0].mlp.state_dict()
    assert model.config.layer_ranks == dict.fromkeys((name for name in names if 'mlp' in name), 6)
    for rank, modules, attn in ((6, 'attn,mlp', 6), (7, None, 6), (16, ['mlp'], 6), (2, 'attn', 2)):
        layers.apply_svd_compression(model, rank, modules)
        assert model.config.layer_ranks == {name: 6 if 'mlp' in name else attn for name in names}
    assert equal(model.transformer.h[0].mlp.state_dict(), mlp)
    layers.dense_layers(model, names)
    assert {p.requires_grad for p in layers.sync_config(model).parameters()} == {trained}


@pytest.mark.parametrize('rank, modules, words', [
    *((rank, 'attn', f'rank={rank!r}: .*16') for rank in (0, 17, 2.0, True)),
    (2, 'attn,head', 'head')
])
def test_ranks_and_modules_that_do_not_exist_are_refused(rank, modules, words):
    with pytest.raises(ValueError, match=words):
        layers.apply_svd_compression(random_model(), rank, modules)


# --------------------------------------------------------------------------------------------------
# calibration with inputs and gradients

def least_loss(x, targets, R, rank):
    """Return the least |(Y - X A^T B^T) R^T|^2 of all B A of that rank, by reduced-rank
    regression."""
    fitted = x @ torch.linalg.lstsq(x, targets, driver='gelsd').solution
    cut = torch.linalg.svdvals(fitted @ R.mT)[rank:]
    return ((targets - fitted) @ R.mT).square().sum() + cut.square().sum()


@pytest.mark.parametrize('bias, options', [(False, {}), (True, {}), (False, dict(use_mla=True)),
                                           (True, svd('causal', 3, svd_block=4))], ids=str)
def test_each_layer_is_the_best_for_its_inputs(windows, bias, options):
    """Each low-rank layer has the least error of its rank, over the inputs and weighted by the
    gradients of the loss in the original model. The reference is reduced-rank regression, in which
    the ridge counts as extra samples. A bias keeps the mean output."""
    model, dense = (random_model(torch.float64, bias=bias, **options) for _ in range(2))
    names, (batch,) = [*layers.dense_layers(dense, layers.layer_names(dense))], windows()
    parts = [[t[part] for t in batch] for part in (slice(0, 12), slice(12, None))]
    with mock.patch.object(layers, 'GRADIENT_EVERY', 1):
        layers.factor_layers(model, parts, None, True, calibration.Inputs(), rank=4)
    for name, (x, targets, g) in seen(dense, names, windows()).items():
        old, new = (m.get_layer(name) for m in (dense, model))
        assert not bias or torch.allclose(new(x).mean(0), targets.mean(0), atol=1e-9)
        x = centred(x) if bias else x
        ridge = torch.eye(x.size(1), dtype=x.dtype) * (RIDGE * x.square().sum() / x.size(1)).sqrt()
        x, R = torch.cat((x, ridge)), torch.linalg.qr(g).R
        loss = ((x @ (old.weight - new.weight).mT) @ R.mT).square().sum().item()
        assert loss == pytest.approx(least_loss(x, x @ old.weight.mT, R, 4).item(),
                                     rel=100 * RIDGE)


def test_gradients_come_from_every_second_batch(windows):
    """The default takes gradients from half of the batches, and inputs from all."""
    model, (batch,) = random_model(torch.float64), windows()
    parts = [[t[part] for t in batch] for part in (slice(0, 12), slice(12, None))]
    linears = layers.dense_layers(model, ['h.0.mlp.c_fc'])
    stats = {name: calibration.LayerStats(linear.weight, True) for name, linear in linears.items()}
    calibration.calibrate(model, linears, stats, parts, 2)
    (one,) = stats.values()
    assert (one.gradient_tokens, one.tokens) == (12 * 16, len(batch[0]) * 16)


SCALES = torch.logspace(-4, 4, 16)


@pytest.mark.parametrize(
    'spoil',
    [
        lambda norm, layer: layer.weight.zero_(
        ),  # only biases are left, so everything that follows is constant
        lambda norm, layer: norm.weight.mul_(1e-7) + norm.bias.fill_(1),
        lambda norm, layer: layer.weight[8:].copy_(layer.weight[:-8].clone()),
        lambda norm, layer: layer.weight.copy_(layer.weight[:, :1] * layer.weight[:1]),
        lambda norm, layer:
        (norm.weight.mul_(SCALES), norm.bias.mul_(SCALES), layer.weight.div_(SCALES))
    ],
    ids='constant 1e-7 duplicates deficient scales'.split())
def test_the_default_method_takes_what_whitened_does(windows, spoil):
    """The default method works for every kind of activation that 'whitened' works for, and adds no
    more loss."""
    models = [random_model(bias=True) for _ in range(3)]
    for block in (block for model in models for block in model.transformer.h):
        spoil(block.ln_1, block.attn.c_attn), spoil(block.ln_2, block.mlp.c_fc)
    models[1:] = [layers.compress_model(model, method, windows(), keep=.6)
                  for model, method in zip(models[1:], ('whitened', 'activation'))]
    before, whitened, activation = (sum(m(x, y)[1].item() for x, y in windows()) for m in models)
    assert activation < max(before, whitened) + .01


# --------------------------------------------------------------------------------------------------
# ranks

SHAPES = {'a': (16, 16), 'b': (64, 16), 'c': (16, 64)}
ENERGIES = {
    name: normal(16, seed=i).square().sort(descending=True)[0] for i, name in enumerate(SHAPES)
}
STEEP = dict.fromkeys(SHAPES, torch.tensor([8.0, 1, 1, *[0] * 13]))


def curves(energies, shapes, step=1):
    return {name: Curve(energies[name], m + n, m * n, step) for name, (m, n) in shapes.items()}


def kept(ranks, shapes):
    """Return the fraction of parameters that layers of these ranks have. None stands for dense."""
    return (sum(m * n if ranks[name] is None else ranks[name] * (m + n)
                for name, (m, n) in shapes.items()) / sum(m * n for m, n in shapes.values()))


@pytest.mark.parametrize('options, energies, expected', [
    (dict(rank=7), ENERGIES, (7, 7, 7)), (dict(rank=9), ENERGIES, (None, 9, 9)),
    (dict(rank=16), ENERGIES, (None, None, None)), (dict(keep=.5), ENERGIES, (4, 6, 6)),
    (dict(keep=1), ENERGIES, (None, None, None)),
    (dict(energy=1), ENERGIES, (None, None, None)), (dict(energy=1), STEEP, (3, 3, 3)),
    *((dict(energy=share), STEEP, (rank,) * 3)
      for share, rank in ((.79, 1), (.81, 2), (.89, 2), (.91, 3)))], ids=str)
def test_ranks_are_those_asked_for_where_they_save(options, energies, expected):
    """A layer gets the requested rank, or the one that keeps the requested fraction or energy, if
    that saves parameters. Otherwise it stays dense."""
    assert layers.rank_policy(energies, SHAPES, **options) == dict(zip(SHAPES, expected))


@pytest.mark.parametrize('choose, least', [
    (lambda keep: layers.uniform_share(SHAPES, keep), .125),
    (lambda keep: layers.best_share(curves(ENERGIES, SHAPES), keep), .0834)], ids=['equal', 'best'])
def test_shares_are_kept(choose, least):
    """The kept fraction is never above the requested one and at most 0.1 below it. An impossible
    fraction raises a ValueError that names the nearest possible one."""
    for keep in (.2, .25, .5, .8, .99):
        assert keep - .1 < kept(choose(keep), SHAPES) <= keep
    assert {*choose(least).values()} <= {1, None}
    for keep, nearest in ((least - 1e-3, least), (1.5, 1)):
        with pytest.raises(ValueError, match=f'^keep={keep}: .*nearest: {nearest}'):
            choose(keep)


# --------------------------------------------------------------------------------------------------
# narrower heads, fewer neurons and low-rank layers from one budget

def block_weights(model):
    return sum(p.numel() for p in model.transformer.h.parameters() if p.dim() > 1)


@pytest.mark.parametrize('options', [
    {}, dict(bias=False), dict(n_head=4, n_kv_head=2), dict(layer_ranks=RANKS), mla(4),
    svd('weight', 3), svd('causal', 3, svd_block=4), dict(n_embd=128, vocab_size=40)], ids=str)
def test_the_default_keeps_the_fraction_asked_for(windows, options):
    """Of the weights in the blocks, at most the fraction asked for remains, and little less. The
    result loads from its configuration with the same logits, with and without a cache."""
    model = random_model(**options)
    dense = layers.dense_layers(copy.deepcopy(model), layers.layer_names(model))
    total = sum(layer.weight.numel() for layer in dense.values())
    rest = block_weights(model) - sum(
        p.numel() for name in dense for p in model.get_layer(name).parameters() if p.dim() > 1)
    for keep in (.7, .4):
        new = layers.compress_model(copy.deepcopy(model), 'activation', windows(), keep=keep)
        assert block_weights(new) - rest <= keep * total
        assert options.get('layer_ranks') or block_weights(new) - rest > (keep - .06) * total
        assert difference(reloaded(new), new) == 0
        idx = tokens().clamp_max(new.config.vocab_size - 1)
        assert (cached_logits(new, idx, 5) - new(idx, idx)[0]).abs().max() < 1e-3
    has_factors = model.config.use_mla or model.config.use_svd or model.config.layer_ranks
    assert bool(new.config.qk_head_dim) != bool(has_factors)


@pytest.mark.parametrize('keep', [1, .9, .8])
def test_a_low_rank_layer_does_not_become_larger(windows, keep):
    """A model with one low-rank layer in each MLP has no more weights after compression."""
    model = random_model(layer_ranks={'h.0.mlp.c_fc': 3, 'h.1.mlp.c_proj': 2})
    new = layers.compress_model(copy.deepcopy(model), 'activation', windows(), keep=keep)
    assert block_weights(new) <= block_weights(model)
    assert new.config.layer_ranks.items() >= model.config.layer_ranks.items()


def test_all_weights_kept_is_the_same_model(windows):
    """With keep=1 the configuration and the logits stay."""
    model = random_model()
    new = layers.compress_model(copy.deepcopy(model), 'activation', windows(), keep=1)
    assert new.config == model.config and difference(model, new) < 1e-4


def test_a_single_batch_refines(windows):
    """One batch of text is enough for refinement to change the weights of the chosen modules."""
    model, (batch, *_) = random_model(), windows()
    new = layers.compress_model(copy.deepcopy(model), 'activation', [batch], 'mlp', keep=.5)
    with mock.patch.object(layers, 'refine'):
        start = layers.compress_model(copy.deepcopy(model), 'activation', [batch], 'mlp', keep=.5)
    changed = {name for name, tensor in new.state_dict().items()
               if not torch.equal(tensor, start.state_dict()[name])}
    assert changed and all('.mlp.' in name and name.endswith('weight') for name in changed)


def test_wrong_ranks_are_refused_before_calibration(windows):
    with mock.patch.object(layers, 'calibrate', side_effect=AssertionError):
        for options in (dict(rank=17), dict(keep=1e-4)):
            with pytest.raises(ValueError, match=f'^{[*options][0]}='):
                layers.compress_model(random_model(), 'whitened', windows(), **options)


@pytest.mark.parametrize('modules, kept', [('attn', ['mlp']), ('mlp', ['attn'])])
def test_other_modules_stay(windows, modules, kept):
    """Layers of other modules keep their weights, and so do embeddings and LayerNorms."""
    model = random_model()
    new = layers.compress_model(copy.deepcopy(model), 'activation', windows(), modules, keep=.5)
    for name, tensor in model.state_dict().items():
        if '.h.' not in name or 'ln_' in name or any(f'.{word}.' in name for word in kept):
            assert torch.equal(tensor, new.state_dict()[name]), name


@pytest.mark.parametrize('bias', [False, True])
def test_an_mlp_loses_the_neurons_that_it_does_not_need(windows, bias):
    """A model with MLPs that only need a quarter of their neurons, because the others are copies of
    them or are not read, keeps its logits with half of the neurons."""
    model = random_model(bias=bias)
    for mlp in (block.mlp for block in model.transformer.h):
        mlp.c_fc.weight[16:32] = mlp.c_fc.weight[:16]
        if bias:
            mlp.c_fc.bias[16:32] = mlp.c_fc.bias[:16]
        mlp.c_proj.weight[:, 32:] = 0
    with mock.patch.object(layers, 'refine'):
        new = layers.compress_model(copy.deepcopy(model), 'activation', windows(), 'mlp', keep=.5)
    assert sum(new.config.mlp_dim) == 64 and not new.config.layer_ranks
    assert difference(model, new) < .02 * model(*windows()[0])[0].std()


@torch.no_grad()
def divergence(model, other):
    """Return the mean KL divergence of another model's predictions from those of the model."""
    idx = tokens(64)
    a, b = (m(idx, idx)[0].log_softmax(-1) for m in (model, other))
    return (a.exp() * (a - b)).sum(-1).mean().item()


def test_refinement_leaves_the_original_model_alone_and_brings_others_back(windows):
    """Refining the original model changes nothing. Refining a changed one reduces the divergence
    from the original model, also on text that the refinement has not seen."""
    model, generator = random_model(), torch.Generator().manual_seed(0)
    # next tokens from the model, so that its loss is the least possible
    text = [(x, torch.multinomial(model(x, x)[0].flatten(0, 1).softmax(-1), 1,
                                  generator=generator).view_as(x)) for x, _ in windows(4096)]
    inputs = calibration.Inputs()
    calibration.calibrate(model, dict(ln_f=model.transformer.ln_f), dict(ln_f=inputs), text, 0)
    models = same, changed = copy.deepcopy(model), random_model()
    for p in changed.transformer.h.parameters():
        p += .1 * torch.randn(p.shape, generator=generator)
    before = divergence(model, changed)
    for one in models:
        layers.refine(one, text, inputs.batches, ['attn', 'mlp'])
    assert abs(divergence(model, same)) < 1e-6 and divergence(model, changed) < .97 * before


# --------------------------------------------------------------------------------------------------
# MLA

def converted(model, latent, windows=()):
    return to_mla(copy.deepcopy(model), latent, windows)


@pytest.mark.any_device
@pytest.mark.parametrize('tokens, bias, dtype, options, basis', [
    (None, False, torch.float32, {}, None), (1, True, torch.float64, {}, None),
    (512, False, torch.float64, {}, None), (512, True, torch.float32, svd('weight', 3), None),
    (1, False, torch.float32, svd('causal', 3, svd_block=4), None),
    (None, True, torch.float32, svd('sequence', 3, 'randomized', svd_power_iters=0),
     torch.linalg.qr(normal(2, 2, 8, 3))[0].float())], ids=str)
def test_at_full_width_the_logits_stay(windows, device, tokens, bias, dtype, options, basis):
    """With latents of full width the logits do not change for any input, even after a single
    calibration window of 16 tokens. tokens=None means conversion by the SVD of the weights. A
    running basis is kept, because without it 'randomized' would find another approximation."""
    model, found = random_model(dtype, device, bias=bias,
                                **options), windows(tokens, device) if tokens else ()
    model.load_extra_state({'svd_basis': basis if basis is None else basis.to(device)})
    new = converted(model, 16, found)
    assert difference(model, new) < rounding(model) < 1e-3 < difference(
        model, converted(model, 8, found))
    assert new.config == replace(model.config, use_mla=True, mla_latent_dim=[16, 16] if found and (
        not model.config.use_svd) else 16)


@pytest.mark.parametrize('bias', [False, True])
def test_latents_are_the_best_for_keys_and_values(windows, bias):
    """The error E of [W_k; W_v] has the least possible tr(G E C E^T), for the gradients G at keys
    and values and the second moment C of the inputs. A bias keeps the mean of the values, so with a
    bias C is the covariance of the inputs."""
    model = random_model(torch.float64, bias=bias)
    new, names = converted(model, 4, windows()), [f'h.{i}.attn.c_attn' for i in range(2)]
    for name, size, (x, outputs, g) in zip(names, new.config.mla_latent_dim,
                                           seen(model, names, windows()).values()):
        latents, R = new.transformer.get_submodule(name), torch.linalg.qr(g).R
        inputs, weight = centred(x) if bias else x, model.transformer.get_submodule(
            name).weight[16:]
        error = weight - torch.cat(
            (latents.k_up.weight, latents.v_up.weight)) @ latents.kv_down.weight
        powers = torch.linalg.svdvals(inputs @ weight.mT @ R.mT).square()
        assert (inputs @ error.mT @ R.mT).square().sum().item() == pytest.approx(
            powers[size:].sum().item(), abs=10 * RIDGE * powers.sum().item())
        values = latents.v_up(latents.kv_down(x))
        assert not bias or torch.allclose(values.mean(0), outputs[:, 16:].mean(0), atol=1e-9)


@pytest.mark.parametrize('important', [0, 1])
def test_an_important_layer_gets_a_larger_latent(windows, important):
    """The sizes of the latents have the given mean. Predictions are closer to those of the original
    than with equal latents."""
    model = random_model(bias=important == 1)
    model.transformer.h[important].attn.c_proj.weight *= 10
    new = converted(model, 5, windows())
    with mock.patch.object(attention_conversion, 'latent_sizes',
                           lambda model, found, *others: dict.fromkeys(found, 5)):
        equal = converted(model, 5, windows())
    sizes = new.config.mla_latent_dim
    assert sum(sizes) == 10 and sizes[important] > 5 and equal.config.mla_latent_dim == [5, 5]
    x = tokens(8, 16)
    original, found, other = (m(x, x)[0].log_softmax(-1) for m in (model, new, equal))
    assert (found - original).square().mean() < (other - original).square().mean()


def test_weight_scope_finds_nothing_more_to_cut(windows):
    """A conversion truncates value products to the rank of 'weight' scope, so the scope has nothing
    left to truncate. Without MLA, W_v can only be factored if the rank of 'weight' scope is full.
    Otherwise the scope truncates W_v at each step."""
    model = reloaded(layers.apply_svd_compression(random_model(), 5), **svd('weight', 3))
    new = converted(model, 6, windows(128))
    assert new.config.svd_truncates and difference(new, reloaded(new,
                                                                 use_svd=False)) < rounding(new)
    assert [len(layers.layer_names(random_model(**svd('weight', rank))))
            for rank in (3, 8)] == [10, 12]


# --------------------------------------------------------------------------------------------------
# narrower and fewer heads

def narrowed(model, keep, windows=()):
    return to_lowrank_heads(copy.deepcopy(model), keep, windows)


@pytest.mark.any_device
@pytest.mark.parametrize('count', [None, 1, 512])
@pytest.mark.parametrize('options', [
    {}, dict(bias=False), dict(n_head=4, n_kv_head=2), dict(layer_ranks=RANKS),
    dict(qk_head_dim=[3, 8], v_head_dim=[1, 5])], ids=str)
def test_heads_of_full_width_are_other_weights_with_the_same_logits(windows, device, count,
                                                                    options):
    """With heads of full width the logits do not change for any input, with and without a cache,
    after calibration on one window, on many or on none. The weights are those of the factors, not
    the original ones."""
    model = random_model(torch.float64, device, **options)
    new = narrowed(model, 1.0, windows(count, device) if count else ())
    assert new.config.qk_head_dim == model.config.qk_head_dim
    assert new.kv_cache_bytes(1, 16) == model.kv_cache_bytes(1, 16)
    idx = tokens().to(device)
    expected = model(idx, idx)[0]
    bar = (1e-3 if device == 'mps' else 1e-10) * expected.abs().max()
    assert (new(idx, idx)[0] - expected).abs().max() < bar
    assert (cached_logits(new, idx, 5) - expected).abs().max() < bar
    for name in 'qkv':
        old, found = (m.transformer.h[1].attn.head_weight(name) for m in (model, new))
        assert (old - found).abs().max() > 1e-3


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('heads', [dict(n_head=2), dict(n_head=4, n_kv_head=2)], ids=str)
def test_narrow_heads_are_the_best_for_scores_and_outputs(windows, bias, heads):
    """N, the product of the factors between q and k, has the least possible tr(G (I - N) S
    (I - N)^T), for the covariance S of the keys of a head and the mean G of two metrics of equal
    trace: the gradients at the keys, and the queries. So has N between W_o and v. The whole budget
    is spent."""
    model = random_model(torch.float64, bias=bias, **heads)
    new, hs, nkv = narrowed(model, .5, windows()), model.config.head_size, 2
    assert new.kv_cache_bytes(1, 16) == model.kv_cache_bytes(1, 16) / 2
    group = model.config.n_head // nkv
    for i, (x, rows, g) in enumerate(
            seen(model, [f'h.{i}.attn.c_attn' for i in range(2)], windows()).values()):
        before, after = (m.transformer.h[i].attn for m in (model, new))
        parts = [t.unflatten(1, (2 * nkv, hs)).unbind(1) for t in (rows, g)]
        for j, (values, g) in enumerate(zip(*parts)):
            name, head = 'kv'[j // nkv], j % nkv
            share = slice(head * group, (head + 1) * group)
            if name == 'k':                             # rows W_q: q^T N are the new queries
                partner, cut = (a.head_weight('q')[share].mT.flatten(0, 1) for a in (before, after))
                other = before.c_attn(x[None])[0][0, share].flatten(0, 1)
            else:
                partner, cut = (a.c_proj.weight.unflatten(1, (-1, size))[:, share].flatten(0, 1)
                                for a, size in ((before, hs), (after, new.config.v_head_dim[i])))
                other = partner
            G = sum(m.mT @ m / m.square().sum() for m in (g, other))
            down, old = (a.head_weight(name)[head] for a in (after, before))
            kept = torch.linalg.lstsq(partner, cut).solution @ (
                torch.linalg.lstsq(old.mT, down.mT).solution.mT)                # N (hs, hs)
            values = centred(values) if name == 'k' or bias else values
            R = torch.linalg.cholesky(G)                                        # G = R R^T
            powers = torch.linalg.svdvals(values @ R).square()
            assert (values @ (torch.eye(hs) - kept).mT @ R).square().sum().item() == pytest.approx(
                powers[len(down):].sum().item(), abs=10 * RIDGE * powers.sum().item())


@pytest.mark.parametrize('options', [
    dict(n_head=4, n_kv_head=1), dict(qk_head_dim=[3, 5], v_head_dim=[4, 2], bias=False)], ids=str)
def test_layers_of_shared_and_narrow_heads_are_compressed(windows, options):
    """Low-rank layers of projections with fewer rows than columns keep the logits at full rank. At
    half of the rank, a method that uses more of the text adds less error."""
    model, errors = random_model(torch.float64, **options), []
    idx = tokens(4)
    for method in ('activation', 'plain'):
        full, half = copy.deepcopy(model), copy.deepcopy(model)
        text = windows() if method == 'activation' else ()
        full = layers.compress_model(full, method, text, 'attn', energy=1.0)
        assert difference(model, full) < (1e-3 if method == 'activation' else 1e-8)
        half = layers.compress_model(half, method, text, 'attn', rank=2)
        assert half.config.layer_ranks
        errors.append((half(idx, idx)[0] - model(idx, idx)[0]).square().mean().item())
    assert errors[0] < errors[1]


def test_equal_widths_are_never_above_the_budget():
    """Without text all widths become the same fraction, and a fraction below one direction is
    refused."""
    model = random_model(qk_head_dim=[2, 8], v_head_dim=[8, 4])
    new = to_lowrank_heads(copy.deepcopy(model), .5)
    assert (new.config.qk_head_dim, new.config.v_head_dim) == ([1, 4], [4, 2])
    with pytest.raises(ValueError, match='keep=0.4: not a possible fraction of the cache .*0.5'):
        to_lowrank_heads(model, .4)


def test_shared_heads_are_means():
    """--to=gqa gives each group of key/value heads its mean. Queries and all other weights
    stay."""
    model = random_model(torch.float64, n_head=8)
    new, C = to_gqa(copy.deepcopy(model), 2), 16
    assert new.config == replace(model.config, n_kv_head=2)
    for kind in ('weight', 'bias'):
        for name, tensor in new.state_dict().items():
            old = model.state_dict()[name]
            if name.endswith(f'c_attn.{kind}'):
                means = [part.unflatten(0, (2, 4, 2)).mean(1).flatten(0, 1)
                         for part in old[C:].chunk(2)]
                old = torch.cat((old[:C], *means))
            assert kind not in name or torch.allclose(tensor, old, atol=1e-12)
    # equal heads lose nothing
    for block in model.transformer.h:
        c_attn = block.attn.c_attn
        for t in (c_attn.weight, c_attn.bias):
            heads = t[C:].unflatten(0, (2, 2, 4, 2))                # k or v, group, head, hs
            heads.copy_(heads[:, :, :1].expand_as(heads))
    assert difference(model, to_gqa(copy.deepcopy(model), 2)) < 1e-10
    assert to_gqa(model).config.n_kv_head == 4


@pytest.mark.parametrize('convert, argument, options, words', [
    ('to_gqa', 1, mla(4), "to='gqa': the model has MLA"),
    ('to_lowrank_heads', .5, mla(4), "to='lowrank_heads': the model has MLA"),
    ('to_lowrank_heads', .5, svd('causal', 2, svd_block=4), "_heads': .*'causal'.*without SVD"),
    ('to_lowrank_heads', .5, svd('weight', 2, svd_targets='k'), "_heads': .*'weight'.*export"),
    ('to_gqa', 3, dict(n_head=8), 'n_kv_head=3: .*nearest: 2'),
    ('to_gqa', 2, {}, 'n_kv_head=2: .*nearest: 1'),
    ('to_gqa', None, dict(n_kv_head=1), "to='gqa': .*--to=lowrank_heads"),
    ('to_lowrank_heads', .05, {}, 'keep=0.05: .*nearest: 0.125'),
    ('to_lowrank_heads', 1.5, {}, 'keep=1.5: .*nearest: 1'),
    ('to_mla', 4, dict(n_kv_head=1), "to='mla': .*grouped")], ids=str)
def test_attention_that_cannot_be_converted_is_refused(convert, argument, options, words):
    with pytest.raises(ValueError, match=words):
        getattr(attention_conversion, convert)(random_model(**options), argument)

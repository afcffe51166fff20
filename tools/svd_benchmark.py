"""
The measurements of `python bench.py --svd`: cost and accuracy of each SVD method.

A case is a scope with one of METHODS. 'randomized cold' starts from a random Gaussian matrix.
'randomized warm' starts from a basis that was computed from other V, as every training step but the
first does. 'weight' scope has no warm start. For each case these quantities are measured:

    forward     time of the model's head-SVD module of one layer, without gradients
    fwd+bwd     time of the same module with gradients and the configured svd_basis_grad
    peak        peak bytes of fwd+bwd, with its result and gradient, without V and the upstream
                gradient of V
    residual    Frobenius norm of the approximation error, divided by that of the best
                approximation (Eckart and Young 1936), per matrix. In 'causal' scope the matrices
                are the prefixes from which the bases are computed.
    cosine      between the gradient and that of 'standard' in float64, per matrix. 'full': the
                basis is differentiated, 'constant': it is held constant.

The quantities are measured on V of a trained checkpoint with the gradient of its loss, and on V
with known spectra and Gaussian gradients. The basis of the warm start is read from the checkpoint,
or computed here from other V than those that are measured.

Letters: B batch, nh heads, T tokens, hs head size, C width, k rank; W_v is (nh, hs, C).
"""

import json
import statistics
from collections import namedtuple
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import groupby, repeat
from pathlib import Path

import torch
from torch.nn import functional as F

from lowrank.head_svd import build_head_svd
from lowrank.subspace_iteration import get_bases, set_bases, update_bases
from lowrank.svd import causal_starts, low_rank_approximation
from model import GPT
from runtime import checkpoint as ckpt
from runtime import device as devices
from runtime import huggingface, plots
from runtime.config import UserError
from runtime.data import Dataset, locate
from tools.step_benchmark import header, truncating_scopes
from tools.timing import peak_bytes, print_line, quartiles, time_interleaved

METHODS = ('standard', 'gram', 'randomized cold', 'randomized warm')
WARM_STEPS = 8                      # updates of the basis of the warm start if none was saved
ROUNDING = 1e-6                     # float32 error of a residual, as a fraction of the matrix norm
SPECTRA = {'Gaussian': lambda i, rank: torch.ones_like(i), '1/i': lambda i, rank: 1 / i,
           '1/i^2': lambda i, rank: 1 / i ** 2, '0.9^i': lambda i, rank: 0.9 ** i,
           'low rank + noise': lambda i, rank: torch.where(i <= rank, 1.0, 0.1)}

Case = namedtuple('Case', 'scope method')
# V and W_v with upstream gradients: v, dv (B, nh, T, hs); w, dw (nh, hs, C); basis (nh, hs, k)
Source = namedtuple('Source', 'name v dv w dw basis')


def run(cfg, device):
    """Measure and print tables. The last line of output is JSON with all results.

    cfg: BenchConfig; device: str. Raises UserError if svd_rank truncates nothing, or if a figure is
    wanted and matplotlib is missing.
    """
    if cfg.plot:
        plots.require_matplotlib(f'plot={cfg.plot!r}', cfg.plot)
    cases = [Case(scope, method) for scope in truncating_scopes(replace(cfg, svd_targets='v'))
             for method in METHODS if (scope, method) != ('weight', 'randomized warm')]
    if not cases:
        raise UserError(f'svd_rank={cfg.svd_rank}: truncates nothing, so there is nothing to '
                        f'compare (nearest: a rank from 1 to {cfg.n_embd // cfg.n_head - 1})')
    words = f'{header(cfg, device)}; seed {cfg.seed}, {cfg.pairs} rounds'
    print(words)
    trained, remark = trained_sources(cfg, device)
    print(remark, flush=True)
    synthetic = [synthetic_source(cfg, name, device) for name in SPECTRA]
    timed_on = trained[len(trained) // 2] if trained else synthetic[1]
    print(f'timing a layer, {len(cases)} cases, on {timed_on.name}', flush=True)
    costs, quality = timings(cfg, device, cases, timed_on), []
    print("cost per layer, medians; over gram: time divided by gram's time in the same round")
    print_line('', ('forward ms', 'over gram', 'fwd+bwd ms', 'over gram', 'peak bytes'))
    for row in costs:
        print_line(label(row), (row['forward_ms'], row['forward_over_gram'], row['fwd_bwd_ms'],
                                row['fwd_bwd_over_gram'], row['peak_bytes']))
    print("quality in float32, mean and worst over matrices: residual in % above the best "
          "approximation's;\n1 - cosine between the gradient and the exact one, with the basis "
          'differentiated (full) or held constant (constant)')
    for source in (*trained, *synthetic):
        quality += source_quality(cfg, cases, source)
    if cfg.plot:
        names = [source.name for source in trained or [timed_on]]
        matrices = 'trained V of all layers' if trained else f'V with spectrum {timed_on.name}'
        draw(cfg.plot, costs, [row for row in quality if row['source'] in names],
             f'residual: {matrices}; time: {timed_on.name}; {words}')
        print(f'figure: {cfg.plot}')
    print(json.dumps({
        'device': device, 'torch': torch.__version__, 'threads': torch.get_num_threads(),
        'seed': cfg.seed, 'rounds': cfg.pairs,
        'shape': {'batch_size': cfg.batch_size, 'n_head': cfg.n_head, 'block_size': cfg.block_size,
                  'head_size': cfg.n_embd // cfg.n_head, 'svd_rank': cfg.svd_rank},
        'trained': remark if trained else None, 'timed_on': timed_on.name,
        'methods': costs, 'quality': quality}))


# --------------------------------------------------------------------------------------------------
# modules and matrices

def head_svd(cfg, case, source=None, basis_grad=True):
    """Return the model's head-SVD module for a case. A warm case starts from the basis of the
    Source `source`."""
    module = build_head_svd(
        case.scope, heads=cfg.heads['v'], head_size=cfg.head_size,
        inputs=cfg.n_embd if source is None else source.w.size(2), block=cfg.svd_block,
        basis_grad=basis_grad, rank=cfg.svd_rank, method=case.method.split()[0],
        power_iters=cfg.svd_power_iters, oversample=cfg.svd_oversample).eval()
    if case.method == 'randomized warm':
        set_bases([module.warm_start], source.basis[None])
    return module if source is None else module.to(source.v.device)


def truncation(cfg, case, source, basis_grad):
    """Return a function that truncates V, the V of the source, and the upstream gradient of the
    truncated V. In 'weight' scope W_v takes the place of V."""
    module = head_svd(cfg, case, source, basis_grad)
    if case.scope == 'weight':
        return module.truncate_weight, source.w, source.dw
    return module, source.v, source.dv


def gradient(f, x, dy):
    """Return the gradient of sum(f(x) dy) with respect to x, in the shape of x."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(f(x), x, dy)[0]


def decomposed(cfg, scope, source):
    """Return a list of the batches of matrices from which bases are computed. In 'causal' scope the
    list has one batch per prefix. In the other scopes it has one batch."""
    if scope == 'causal':
        starts = causal_starts(source.v.shape[-2], cfg.svd_rank, cfg.svd_block)
        return [source.v[..., :start, :] for start in starts]
    return [source.w if scope == 'weight' else source.v]


def converted(source, convert):
    """Return the source with convert() applied to its matrices and gradients."""
    return source._replace(**{name: convert(getattr(source, name)) for name in 'v dv w dw'.split()})


# --------------------------------------------------------------------------------------------------
# sources: synthetic spectra and a trained checkpoint

@torch.no_grad()
def warm_bases(cfg, layers, draw):
    """Return bases of warm starts (layers, nh, hs, k) after WARM_STEPS updates. For each update,
    draw() returns V (B, nh, T, hs) of each layer."""
    starts = [head_svd(cfg, Case('sequence', 'randomized cold')).warm_start for _ in range(layers)]
    for _ in range(WARM_STEPS):
        for start, v in zip(starts, draw()):
            start.to(v.device).accumulate_gram(v.mT @ v)
        update_bases(starts)
    return get_bases(starts)


def synthetic_source(cfg, name, device):
    """Return a Source with random V of the spectrum `name`.

    Rows of V are drawn from N(0, H diag(s^2) H^T), where s is the spectrum and H is orthogonal, one
    per head. Sequences of a head therefore differ but share a subspace, as in a trained model.
    W_v^T is drawn in the same way. The basis comes from other draws of V.
    """
    B, nh, T, hs = cfg.batch_size, cfg.heads['v'], cfg.block_size, cfg.head_size
    gaussian = partial(torch.randn, generator=torch.Generator().manual_seed(cfg.seed))
    axes = torch.linalg.qr(gaussian(nh, hs, hs))[0]                 # (nh, hs, hs), columns scaled
    axes *= SPECTRA[name](torch.arange(1.0, hs + 1), cfg.svd_rank)

    def draw_v():
        v = (gaussian(B, nh, T, hs) * T ** -0.5 @ axes.mT).transpose(1, 2).contiguous()
        return v.to(device).transpose(1, 2)                         # memory layout as in a model

    w = (gaussian(nh, cfg.n_embd, hs) * cfg.n_embd ** -0.5 @ axes.mT).mT.contiguous().to(device)
    basis = warm_bases(cfg, 1, lambda: [draw_v()])[0]
    return Source(name, draw_v(), gaussian(B, nh, T, hs).to(device), w,
                  gaussian(*w.shape).to(device), basis)


def trained_sources(cfg, device):
    """Return a Source for each layer of OUT_DIR/ckpt.pt, and a line of text about them. The list is
    empty if the checkpoint or its data set is missing or does not fit cfg."""
    path = Path(cfg.out_dir) / 'ckpt.pt'
    try:
        saved = ckpt.load(path)
        model = GPT.from_checkpoint(saved).to(device).eval()
        c, data = model.config, Dataset(locate(cfg.dataset, cfg.tokenizer))
        huggingface.check_tokenizer(cfg, {}, saved, data, print)
        if ((c.heads, c.n_embd, c.v_head_dim) != (cfg.heads, cfg.n_embd, None)
                or c.block_size < cfg.block_size):
            raise UserError(f'{path} has a different shape (n_head={c.n_head}, '
                            f'n_kv_head={c.heads["v"]}, n_embd={c.n_embd}, '
                            f'v_head_dim={c.v_head_dim}, block_size={c.block_size})')
    except ValueError as e:
        return [], f'synthetic spectra only: {e}'
    batch = partial(data.batch, batch_size=cfg.batch_size, block_size=cfg.block_size,
                    generator=torch.Generator().manual_seed(cfg.seed), device=device)
    bases, origin = saved.get('svd_basis'), 'its own svd_basis'
    if bases is None or bases.shape[-1] != cfg.svd_rank:
        origin = f'{WARM_STEPS} batches of training windows'
        bases = warm_bases(cfg, c.n_layer,
                           lambda: [v for v, *_ in capture(model, *batch('train'))])
    layers = [Source(f'trained, layer {i}', *layer, bases[i])
              for i, layer in enumerate(capture(model, *batch('val')))]
    return layers, (f'trained V: {path}, {saved["iter_num"]} steps, svd '
                    f'{c.svd_scope if c.svd_truncates else "off"}, '
                    f'{cfg.batch_size} validation windows of {data.folder.name}; '
                    f"'randomized warm' starts from {origin}")


@torch.enable_grad()
def capture(model, x, y):
    """Return matrices and gradients of each layer from one pass over tokens x, y (B, T).

    Per layer these are V before truncation and the loss gradient at the truncated V, both
    (B, nh, T, hs), and W_v before truncation and the loss gradient at the truncated W_v, both
    (nh, hs, C). With MLA, U_v (nh, hs, d) takes the place of W_v.
    """
    attentions, values = [block.attn for block in model.transformer.h], []

    def keep_value(module, args, cut):
        values.append((args[0], cut))

    weights = [attn.head_weight('v').detach().requires_grad_() for attn in attentions]
    with ExitStack() as hooks:
        for attn, weight in zip(attentions, weights):
            hooks.enter_context(attn.c_attn.register_forward_pre_hook(
                lambda module, args, weight=weight: (args[0], {**args[1], 'v': weight})))
            hooks.enter_context(attn.head_svd['v'].register_forward_hook(keep_value))
        loss = model(x, y)[1]
    before, after = zip(*values)
    gradients = torch.autograd.grad(loss, (*after, *weights))
    return [(v.detach(), dv, attn.c_attn.head_weight('v').detach(), dw) for attn, v, dv, dw in
            zip(attentions, before, gradients, gradients[len(after):])]


# --------------------------------------------------------------------------------------------------
# cost

def timings(cfg, device, cases, source):
    """Return a dict per case, with times in ms, their ratio to the time of 'gram' in the same
    round, and peak bytes."""
    dtype = getattr(torch, devices.pick_dtype(cfg.dtype, device))
    source = converted(source, lambda x: x.to(dtype))
    rows = {case: case._asdict() for case in cases}
    forward, both = {}, {}
    for case in cases:
        f, x, dy = truncation(cfg, case, source, cfg.svd_basis_grad)
        forward[case] = torch.no_grad()(partial(f, x))
        both[case] = partial(gradient, f, x, dy)
        rows[case]['peak_bytes'] = peak_bytes(both[case], device)
    for quantity, functions in (('forward', forward), ('fwd_bwd', both)):
        seconds = time_interleaved(functions, cfg.pairs, device)
        for key, own in seconds.items():
            gram = seconds[Case(key.scope, 'gram')]
            low, ms, high = quartiles([1e3 * t for t in own])
            rows[key] |= {f'{quantity}_ms': ms, f'{quantity}_quartiles_ms': [low, high]}
            low, ratio, high = quartiles([a / b for a, b in zip(own, gram)])
            rows[key] |= {f'{quantity}_over_gram': ratio,
                          f'{quantity}_over_gram_quartiles': [low, high]}
    return list(rows.values())


# --------------------------------------------------------------------------------------------------
# accuracy, in float32 against float64 on the CPU, because some devices have no float64

def source_quality(cfg, cases, source):
    """Print a table with one row per case for the matrices of a source, and return the rows. The
    columns are residuals relative to the best approximation and cosines of gradients."""
    print_line(source.name, ('residual', 'worst', 'full', 'worst', 'constant', 'worst', 'matrices'))
    source, k, rows = converted(source, torch.Tensor.float), cfg.svd_rank, []
    exact_source = converted(source, lambda x: x.cpu().double())
    for scope, own in groupby(cases, lambda case: case.scope):
        best = [(x, *smallest_residual(x, k)) for x in decomposed(cfg, scope, source)]
        exact = {grad: gradient(*truncation(cfg, Case(scope, 'standard'), exact_source, grad))
                 for grad in (True, False)}
        for case in own:
            module = head_svd(cfg, case, source)
            start = module.warm_start.start() if module.warm_start else {}
            solve = partial(low_rank_approximation, **module.options | start)
            row = {'source': source.name, **case._asdict(), **residuals(solve, best)}
            for name, grad in (('full', True), ('constant', False)):
                cosines = cosine(gradient(*truncation(cfg, case, source, grad)), exact[grad])
                row |= {f'cosine_{name}_mean': cosines.mean().item(),
                        f'cosine_{name}_min': cosines.min().item()}
            print_line(label(row), (100 * (row['residual_mean'] - 1),
                                    100 * (row['residual_worst'] - 1),
                                    *(1 - row[key] for key in row if key.startswith('cosine')),
                                    row['matrices']))
            rows.append(row)
    return rows


def smallest_residual(x, rank):
    """Return the smallest residuals of x (..., m, n) at a rank, and their rounding levels. Both are
    Frobenius norms (...), in float64 on the CPU. A residual below its rounding level is only
    rounding error."""
    squares = torch.linalg.svdvals(x.detach().cpu().double()).square()
    floor = (ROUNDING * squares.sum(-1).sqrt()).clamp_min(torch.finfo(torch.float64).tiny)
    return squares[..., rank:].sum(-1).sqrt(), floor


@torch.no_grad()
def residuals(f, best):
    """Return the number, mean and maximum of the ratios between the residual of f and the smallest
    residual.

    best: list of (x, *smallest_residual(x, rank)), one per batch x (..., m, n). A ratio is 1 if
    both residuals are only rounding error.
    """
    ratios = torch.cat([(torch.linalg.matrix_norm(x.cpu().double() - f(x).cpu().double())
                         .maximum(floor) / least.maximum(floor)).flatten()
                        for x, least, floor in best])
    return {'matrices': ratios.numel(), 'residual_mean': ratios.mean().item(),
            'residual_worst': ratios.max().item()}


def cosine(a, b):
    """Return the cosine (...) of matrices a and b (..., m, n), each taken as one vector."""
    a, b = (x.cpu().double().flatten(-2) for x in (a, b))
    # the default eps would distort the cosine of small gradients
    return F.cosine_similarity(a, b, dim=-1, eps=torch.finfo(torch.float64).tiny)


# --------------------------------------------------------------------------------------------------
# output

def label(row):
    return f'{row["method"]}, {row["scope"]}'


def draw(path, costs, quality, caption):
    """Draw residual / best residual - 1 against the time of the forward pass, one panel per scope.
    The residual is the mean over the rows of `quality`. caption: text below the panels."""
    best = plots.Curve('exact up to rounding', None, [ROUNDING], plots.LEVEL)
    looks = dict(zip(METHODS, zip(plots.COLOURS, plots.MARKERS, repeat(''))))
    charts = []
    for scope, own in groupby(costs, lambda row: row['scope']):
        curves = [best]
        for row in own:
            above = [other['residual_mean'] - 1 for other in quality if label(other) == label(row)]
            curves.append(plots.Curve(row['method'], [row['forward_ms']],
                                      [max(ROUNDING, statistics.fmean(above))],
                                      looks[row['method']]))
        charts.append(plots.Chart(f'{scope!r} scope', 'forward pass, ms per layer', curves,
                                  log=True))
    plots.charts(path, charts, 'residual / best residual - 1', caption, y_scale='log', sharex=True)

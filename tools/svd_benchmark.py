"""
Behind `python bench.py --svd`: what every SVD method costs and how near it comes to the best, in every scope.

Cases are scopes times 'standard', 'gram', 'randomized cold' (from the Gaussian start) and 'randomized warm' (from a
running basis, as every training step but the first; 'weight' scope has none). Measured for each:

    basis       the leading subspace from the Gram matrices, their product excluded; 'standard': torch.linalg.svd of V
    forward     the reconstruction without gradients; fwd+bwd with them, svd_basis_grad as configured
    peak        bytes that fwd+bwd holds at once, its result and gradient included, V and its upstream gradient not
    step        a whole training step over one without SVD, pairs in turn
    residual    Frobenius norm of what is cut over that of the best cut (Eckart and Young 1936), matrix by matrix; in
                'causal' scope of the prefixes that the bases come from
    cosine      of the gradient and that of 'standard' in float64, matrix by matrix: 'full' with the basis
                differentiated, 'constant' without

on V of a trained checkpoint, with the gradient of its loss, and on V with known spectra and Gaussian gradients. A
running basis never comes from the V that is measured: it is the checkpoint's, or made of other windows.

Letters: B batch, nh heads, T tokens, hs head size, C width, k rank; W_v is (nh, hs, C).
"""

import json
import statistics
from collections import namedtuple
from functools import partial

import torch
from torch.nn import functional as F

from lowrank.head_svd import CausalSVD, SequenceSVD
from lowrank.subspace_iteration import WarmStartBasis, set_bases, update_bases
from lowrank.svd import causal_low_rank_approximation, causal_starts, leading_eigenvectors, low_rank_approximation
from model import GPT, SCOPES, GPTConfig
from runtime import checkpoint as ckpt
from runtime import config as configuration
from runtime import device as devices
from runtime import plots
from runtime.config import UserError, one_line
from runtime.data import Dataset, locate
from tools.timing import paired_benchmark, peak_bytes, quartiles, time_interleaved

KINDS = {'standard': ('standard', False), 'gram': ('gram', False), 'randomized cold': ('randomized', False),
         'randomized warm': ('randomized', True)}                   # name -> svd_method, from a running basis
WARM_STEPS = 8                      # draws of other matrices that a running basis is made of, where none was saved
STEPS_SECONDS = 600                 # --steps=auto leaves whole training steps out beyond that
NEGLIGIBLE = 1e-6                   # residuals below this part of a matrix are float32's rounding
EXACT_BELOW = 1e-6                  # of the figure: residuals nearer to the best are drawn together

Case = namedtuple('Case', 'scope kind')             # kind: a key of KINDS
# v, dv (B, nh, T, hs) and w, dw (nh, hs, C): matrices and upstream gradients; warm, cold: WarmStartBasis for v
Source = namedtuple('Source', 'name v dv w dw warm cold')


def run(cfg, device, step_of):
    """Measure, print the tables, and all of it as one line of JSON last. step_of(cfg, device, warm, **changes) ->
    a function that runs one training step of that model. -> exit code 0. Raises UserError."""
    if cfg.plot:
        plots.require_matplotlib(f'plot={cfg.plot!r}', cfg.plot_path())
    torch.manual_seed(cfg.seed)                                     # svd_lowrank draws from it
    print(header(cfg, device), flush=True)
    trained, why = trained_sources(cfg, device)
    print(why, flush=True)
    cases = cases_of(cfg)
    sources = [*trained, *(synthetic_source(cfg, name, device) for name in spectra(1, 1))]
    timed_on = sources[len(trained) // 2] if trained else next(s for s in sources if s.name == '1/i')
    print(f'timing a layer, {len(cases)} cases', flush=True)
    rows, references = timings(cfg, device, cases, timed_on)
    whole_steps(cfg, device, cases, step_of, rows)
    print_timings(cfg, device, rows, references, timed_on)
    found = [row for source in sources for row in source_quality(cfg, cases, source)]
    compared = [row for source in sources for row in reference_residuals(cfg, source)]
    print_quality(found, compared)
    result = {'device': device, 'torch': torch.__version__, 'threads': torch.get_num_threads(), 'seed': cfg.seed,
              'rounds': cfg.pairs, 'shape': shape_of(cfg), 'trained': why if trained else None,
              'timed_on': timed_on.name, 'methods': rows, 'references': references, 'quality': found,
              'reference_residuals': compared}
    if cfg.plot:
        draw(cfg, device, result, [s.name for s in trained] or [timed_on.name])
        print(f'figure: {cfg.plot_path()}')
    print(json.dumps(result))
    return 0


def shape_of(cfg):
    return {'batch_size': cfg.batch_size, 'n_head': cfg.n_head, 'block_size': cfg.block_size,
            'head_size': cfg.n_embd // cfg.n_head, 'svd_rank': cfg.svd_rank}


def header(cfg, device):
    """Shape, machine, options and what the words below mean."""
    B, nh, T, hs, k = shape_of(cfg).values()
    dtype = devices.pick_dtype(cfg.dtype, device)
    return (f'V {B} x {nh} x {T} x {hs} (batch, heads, tokens, head size), W_v {nh} x {hs} x {cfg.n_embd}, rank {k}, '
            f'svd_block {cfg.svd_block}\n{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, '
            f'{dtype} in and out, seed {cfg.seed}, {cfg.pairs} rounds, svd_basis_grad {cfg.svd_basis_grad}, '
            f"'randomized': {cfg.svd_power_iters} iterations cold, oversample {cfg.svd_oversample}")


def cases_of(cfg):
    """Every scope and kind there is, as a list of Case; says what is left out."""
    scopes = [scope for scope in SCOPES if scope != 'causal' or causal_starts(cfg.block_size, cfg.svd_rank,
                                                                               cfg.svd_block)]
    if 'causal' not in scopes:
        print(f"svd_block={cfg.svd_block}: at {cfg.block_size} tokens and rank {cfg.svd_rank} no basis is due in "
              "'causal' scope, which is left out")
    print("'weight' scope has no warm start, hence no 'randomized warm'")
    return [Case(scope, kind) for scope in scopes for kind in KINDS if scope != 'weight' or not KINDS[kind][1]]


# ----------------------------------------------------------------------------------------------------------------------
# what is cut

def reconstruct(cfg, case, source, x, basis_grad):
    """x, V or W_v of the case's scope, cut to rank k as the model does it: same shape."""
    options = dict(basis_grad=basis_grad, **start_of(cfg, case, source))
    if case.scope == 'causal':
        return causal_low_rank_approximation(x, cfg.svd_rank, KINDS[case.kind][0], cfg.svd_block, **options)
    return low_rank_approximation(x, cfg.svd_rank, KINDS[case.kind][0], **options)


def start_of(cfg, case, source):
    """Where 'randomized' starts, as options of lowrank/svd.py; {} for the others."""
    method, is_warm = KINDS[case.kind]
    if method != 'randomized':
        return {}
    if case.scope == 'weight':
        return dict(power_iters=cfg.svd_power_iters, oversample=cfg.svd_oversample)
    scope = CausalSVD if case.scope == 'causal' else SequenceSVD
    return source.warm.start() | dict(power_iters=scope.warm_power_iters) if is_warm else source.cold.start()


def input_of(case, source):
    """The matrices of the scope and their upstream gradient."""
    return (source.w, source.dw) if case.scope == 'weight' else (source.v, source.dv)


def decomposed(cfg, scope, source):
    """The batches of matrices that bases come from: a list, one batch a prefix in 'causal' scope."""
    if scope == 'causal':
        starts = causal_starts(source.v.shape[-2], cfg.svd_rank, cfg.svd_block)
        return [source.v[..., :start, :] for start in starts]
    return [source.w] if scope == 'weight' else [source.v]


def new_basis(cfg, device):
    return WarmStartBasis(cfg.n_head, cfg.n_embd // cfg.n_head, cfg.svd_rank, cfg.svd_power_iters,
                          cfg.svd_oversample).to(device).eval()


@torch.no_grad()
def make_warm(bases, draw):
    """A list of WarmStartBasis, moved on as by WARM_STEPS training steps: draw() -> V for each, (B, nh, T, hs)."""
    for _ in range(WARM_STEPS):
        for basis, v in zip(bases, draw()):
            basis.accumulate_gram(v.mT @ v)
        update_bases(bases)


# ----------------------------------------------------------------------------------------------------------------------
# synthetic spectra

def spectra(n, rank):
    """Name -> n scales, largest first."""
    i = torch.arange(1.0, n + 1)
    return {'Gaussian': torch.ones(n), '1/i': 1 / i, '1/i^2': 1 / i ** 2, '0.9^i': 0.9 ** i,
            'low rank + noise': torch.where(i <= rank, 1.0, 0.1)}


def synthetic_source(cfg, name, device):
    """V whose rows are drawn from N(0, H diag(s^2) H^T), s the spectrum and H orthogonal, a head's own: sequences of a
    head differ and share a subspace, as in a model. The running basis comes from other draws. W_v^T is drawn alike."""
    B, nh, T, hs, k = shape_of(cfg).values()
    generator = torch.Generator().manual_seed(cfg.seed)
    gaussian = partial(torch.randn, generator=generator)
    scales = spectra(hs, k)[name]
    axes = torch.linalg.qr(gaussian(nh, hs, hs))[0] * scales        # (nh, hs, hs), columns scaled

    def v():
        drawn = (gaussian(B, nh, T, hs) * T ** -0.5 @ axes.mT).transpose(1, 2).contiguous()     # (B, T, nh, hs)
        return drawn.to(device).transpose(1, 2)                     # as in the model: heads side by side in memory

    w = (gaussian(nh, cfg.n_embd, hs) * cfg.n_embd ** -0.5 @ axes.mT).mT.contiguous().to(device)
    bases = [new_basis(cfg, device)]
    make_warm(bases, lambda: [v()])
    return Source(name, v(), gaussian(B, nh, T, hs).to(device), w, gaussian(*w.shape).to(device), bases[0],
                  new_basis(cfg, device))


# ----------------------------------------------------------------------------------------------------------------------
# a trained checkpoint

def trained_sources(cfg, device):
    """-> a Source for each layer of OUT_DIR/ckpt.pt, none where that or its data cannot be used, and a line about it.
    Raises UserError for a damaged checkpoint."""
    path, without = f'{cfg.out_dir}/ckpt.pt', 'synthetic spectra only: '
    try:
        saved = ckpt.load(path)
    except UserError as e:
        if 'no such checkpoint' not in str(e):
            raise
        return [], f'{without}there is no {path} (--out_dir=RUN names a run)'
    configuration.check_all(GPTConfig, saved['model_args'], path)
    try:
        model = GPT.from_checkpoint(saved).to(device).eval()
    except ValueError as e:
        raise UserError(f'{path}: {e}') from None
    other = [f'{name}={getattr(model.config, name)}' for name in ('n_head', 'n_embd')
             if getattr(model.config, name) != getattr(cfg, name)]
    if model.config.block_size < cfg.block_size:
        other.append(f'block_size={model.config.block_size}')
    if other:
        return [], f'{without}{path} has another shape ({", ".join(other)})'
    data, words = find_data(cfg, saved, model)
    if data is None:
        return [], f'{without}no data for {path}: {words}'
    generator = torch.Generator().manual_seed(cfg.seed)
    batch = partial(data.batch, batch_size=cfg.batch_size, block_size=cfg.block_size, generator=generator,
                    device=device)
    cold, warm = ([new_basis(cfg, device) for _ in range(model.config.n_layer)] for _ in range(2))
    set_bases(warm, saved.get('svd_basis'))
    started = 'its own svd_basis'
    if not warm[0].warm:
        started = f'{WARM_STEPS} batches of training windows'
        make_warm(warm, lambda: [v for v, *_ in capture(model, *batch('train'))])
    layers = [Source(f'trained, layer {i}', *part, warm[i], cold[i])
              for i, part in enumerate(capture(model, *batch('val')))]
    return layers, (f'trained V: {path}, {saved["iter_num"]} steps, svd '
                    f'{"off" if not model.config.svd_truncates else model.config.svd_scope}, {cfg.batch_size} '
                    f"validation windows of {words}; 'randomized warm' starts from {started}")


def find_data(cfg, saved, model):
    """The data set of a checkpoint, else that of cfg if its vocabulary fits, or None; and its name or what is wrong."""
    old, wrong = saved.get('config', {}), []
    for name, tokenizer in dict.fromkeys([(old.get('dataset'), old.get('tokenizer', 'char')),
                                          (cfg.dataset, cfg.tokenizer)]):
        try:
            if not isinstance(name, str) or tokenizer not in ('char', 'gpt2'):
                raise UserError('its configuration names none')
            data = Dataset(locate(name, tokenizer))
            data.check_length(cfg.block_size)
            known = saved.get('tokenizer', data.meta)
            if data.vocab_size > model.config.vocab_size or any(
                    known.get(key) != data.meta.get(key) for key in ('tokenizer', 'chars')):
                raise UserError(f'dataset={name}: has another vocabulary')
            return data, data.folder.name
        except (UserError, OSError) as e:
            wrong.append(one_line(e)[:200])
    return None, '; '.join(wrong)


def capture(model, x, y):
    """One pass over tokens x, y (B, T) -> for each layer V before the cut, the gradient of the loss at the cut V, W_v
    and the gradient at W_v as it acts, (B, nh, T, hs) twice and (nh, hs, C) twice (MLA: U_v, (nh, hs, d))."""
    kept = {}

    def keep(name, f, *args):
        """Call f and note its result, whose gradient is wanted."""
        kept[name] = (args, f(*args))
        kept[name][1].retain_grad()
        return kept[name][1]

    attentions = [block.attn for block in model.transformer.h]
    for i, attn in enumerate(attentions):                           # on the instances, for this pass
        attn.apply_svd_to_v = partial(keep, ('v', i), attn.apply_svd_to_v)
        attn.project = lambda x, i=i, attn=attn: attn.c_attn(x, keep(('w', i), attn.value_weight))
    try:
        with torch.enable_grad():
            model(x, y)[1].backward()
    finally:
        for attn in attentions:
            del attn.apply_svd_to_v, attn.project
    layers = []
    for i, attn in enumerate(attentions):
        (v,), cut = kept['v', i]
        w = attn.c_attn.value_weight()
        layers.append((v.detach(), cut.grad.clone(), w.detach().clone(), kept['w', i][1].grad.clone()))
    model.zero_grad(set_to_none=True)
    return layers


# ----------------------------------------------------------------------------------------------------------------------
# references

def references_for(cfg):
    """Name -> function V (..., T, hs) -> V of rank k or nearly, by other means."""
    k = cfg.svd_rank

    def full(x):
        u, s, vh = torch.linalg.svd(x.float(), full_matrices=False)
        return u[..., :k] * s[..., None, :k] @ vh[..., :k, :]

    def svd_lowrank(x):
        u, s, v = torch.svd_lowrank(x.float(), q=k, niter=2)
        return u * s.unsqueeze(-2) @ v.mT

    found = {'torch.linalg.svd': full, 'torch.svd_lowrank': svd_lowrank}
    try:
        from sklearn.utils.extmath import randomized_svd
    except ImportError:
        return found

    def sklearn(x):
        """One matrix after another, on the CPU."""
        low = []
        for matrix in x.float().cpu().flatten(0, -3).numpy():
            u, s, vh = randomized_svd(matrix, k, random_state=cfg.seed % 2 ** 32)
            low.append(torch.from_numpy(u * s @ vh))
        return torch.stack(low).view(x.shape).to(x.device)

    return found | {'sklearn randomized_svd': sklearn}


# ----------------------------------------------------------------------------------------------------------------------
# cost

def timings(cfg, device, cases, source):
    """-> rows of the methods and of the references: {..., 'forward_ms', 'forward_quartiles_ms', ...}."""
    dtype = getattr(torch, devices.pick_dtype(cfg.dtype, device))
    source = source._replace(**{name: getattr(source, name).to(dtype) for name in ('v', 'dv', 'w', 'dw')})
    references = {name: partial(f, source.v) for name, f in references_for(cfg).items()}
    quantities = {'basis': {case: basis_only(cfg, case, source) for case in cases},
                  'forward': {case: forward_only(cfg, case, source) for case in cases} | references,
                  'fwd_bwd': {case: forward_backward(cfg, case, source) for case in cases}}
    rows = {key: {'scope': key.scope, 'method': key.kind} if key in cases else {'reference': key}
            for key in quantities['forward']}
    for quantity, functions in quantities.items():
        seconds = time_interleaved(functions, cfg.pairs, device)
        for key, own in seconds.items():
            low, middle, high = quartiles([1e3 * t for t in own])
            rows[key] |= {f'{quantity}_ms': middle, f'{quantity}_quartiles_ms': [low, high],
                          f'{quantity}_least_ms': 1e3 * min(own)}   # what a busy machine disturbs least
            gram = seconds[Case(key.scope if key in cases else 'sequence', 'gram')]
            low, middle, high = quartiles([a / b for a, b in zip(own, gram)])
            rows[key] |= {f'{quantity}_over_gram': middle, f'{quantity}_over_gram_quartiles': [low, high]}
    for case in cases:
        rows[case]['peak_bytes'] = peak_bytes(quantities['fwd_bwd'][case], device)
    return [rows[case] for case in cases], [rows[name] for name in references]


@torch.no_grad()
def basis_only(cfg, case, source):
    """-> a function that finds the bases, from float32 Gram matrices; 'standard': that decomposes V itself."""
    batches = [x.float() for x in decomposed(cfg, case.scope, source)]
    batches = [(x.mT if case.scope == 'weight' else x).contiguous() for x in batches]       # (nh, C, hs): hs <= C
    method = KINDS[case.kind][0]
    if method == 'standard':
        wide = [(x.cpu() if x.device.type == 'mps' else x).double() for x in batches]       # MPS has no float64
        return lambda: [torch.linalg.svd(x, full_matrices=False) for x in wide]
    grams = torch.stack([x.mT @ x for x in batches])                # (spans, ..., n, n)
    return lambda: leading_eigenvectors(grams, cfg.svd_rank, method, **start_of(cfg, case, source))


def forward_only(cfg, case, source):
    x, _ = input_of(case, source)

    def forward():
        with torch.no_grad():
            reconstruct(cfg, case, source, x, cfg.svd_basis_grad)
    return forward


def forward_backward(cfg, case, source):
    x, dy = input_of(case, source)
    x = x.detach().requires_grad_()
    return lambda: torch.autograd.grad(reconstruct(cfg, case, source, x, cfg.svd_basis_grad), x, dy)


def whole_steps(cfg, device, cases, step_of, rows):
    """Add to the rows how long a training step takes over one without SVD, or None, with a line that says why."""
    why = '--steps=False' if cfg.steps is False else None
    if cfg.steps == 'auto':
        least = least_seconds(cfg, device) * (cfg.pairs + 3) * 2 * len(cases)
        if least > STEPS_SECONDS:
            why = f'they would take {least / 60:.0f} minutes or more here (--steps=True times them all the same)'
    if why:
        print(f'whole training steps are left out: {why}')
        for row in rows:
            row['step'] = None
        return
    print(f'timing whole training steps, {cfg.n_layer} layers, {len(cases)} cases against none', flush=True)
    baseline = step_of(cfg, device, use_svd=False)
    for case, row in zip(cases, rows):
        method, is_warm = KINDS[case.kind]
        # 'weight' scope has no warm start
        step = step_of(cfg, device, warm=is_warm, use_svd=True, svd_method=method, svd_scope=case.scope)
        row['step'] = paired_benchmark(step, baseline, cfg.pairs, device)


def least_seconds(cfg, device):
    """Of one training step: its products, at the speed of a large product on this device."""
    n = 1024
    a = torch.randn(n, n, device=device, dtype=getattr(torch, devices.pick_dtype(cfg.dtype, device)))
    speed = 2 * n ** 3 / min(time_interleaved({'product': lambda: a @ a}, 3, device)['product'])        # FLOPs a second
    weights = 12 * cfg.n_layer * cfg.n_embd ** 2 + cfg.vocab_size * cfg.n_embd
    attention = 2 * cfg.n_layer * cfg.n_embd * cfg.block_size
    return 6 * cfg.batch_size * cfg.block_size * (weights + attention) / speed


# ----------------------------------------------------------------------------------------------------------------------
# quality, in float32 against float64 on the CPU, which every device can move to

def source_quality(cfg, cases, source):
    """-> a row a case: residual over the best one, and cosine of the gradients, over the matrices of a source."""
    source = source._replace(**{name: getattr(source, name).float() for name in ('v', 'dv', 'w', 'dw')})
    rows, best, exact = [], {}, {}
    for case in cases:
        if case.scope not in best:
            best[case.scope] = [smallest_residual(x, cfg.svd_rank) for x in decomposed(cfg, case.scope, source)]
            exact[case.scope] = exact_gradients(cfg, case, source)
        ratios = residual_ratios(cfg, case, source, best[case.scope])
        row = {'source': source.name, 'scope': case.scope, 'method': case.kind, 'matrices': ratios.numel(),
               'residual_mean': ratios.mean().item(), 'residual_worst': ratios.max().item()}
        for name, basis_grad in (('full', True), ('constant', False)):
            cosines = cosine(gradient(cfg, case, source, basis_grad), exact[case.scope][name])
            row |= {f'cosine_{name}_mean': cosines.mean().item(), f'cosine_{name}_min': cosines.min().item()}
        rows.append(row)
    return rows


def smallest_residual(x, rank):
    """x (..., m, n) -> Frobenius norms (...) of what the best cut to this rank leaves, and of x; float64, CPU."""
    s = torch.linalg.svdvals(x.detach().cpu().double())
    return s[..., rank:].square().sum(-1).sqrt(), s.square().sum(-1).sqrt()


def residual_over_best(x, low, best):
    """x, low (..., m, n) -> (...): 1 where low is the best, or where neither leaves anything."""
    least, norm = best
    floor = (NEGLIGIBLE * norm).clamp_min(torch.finfo(norm.dtype).tiny)
    residual = torch.linalg.matrix_norm(x.cpu().double() - low.cpu().double())
    return residual.maximum(floor) / least.maximum(floor)


@torch.no_grad()
def residual_ratios(cfg, case, source, best):
    """-> (matrices) float64: of every matrix that a basis comes from, in 'causal' scope the prefixes."""
    cut = partial(low_rank_approximation, rank=cfg.svd_rank, method=KINDS[case.kind][0],
                  **start_of(cfg, case, source))
    batches = decomposed(cfg, case.scope, source)
    return torch.cat([residual_over_best(x, cut(x), own).flatten() for x, own in zip(batches, best)])


def gradient(cfg, case, source, basis_grad):
    """Of the matrices of the scope: (..., m, n)."""
    x, dy = input_of(case, source)
    x = x.detach().requires_grad_()
    return torch.autograd.grad(reconstruct(cfg, case, source, x, basis_grad), x, dy)[0]


def exact_gradients(cfg, case, source):
    """'standard' in float64: {'full', 'constant': (..., m, n)}."""
    wide = source._replace(**{name: getattr(source, name).cpu().double() for name in ('v', 'dv', 'w', 'dw')})
    case = case._replace(kind='standard')
    return {name: gradient(cfg, case, wide, basis_grad) for name, basis_grad in (('full', True), ('constant', False))}


def cosine(a, b):
    """Of matrices (..., m, n), each as one vector -> (...)."""
    return F.cosine_similarity(a.cpu().double().flatten(-2), b.cpu().double().flatten(-2), dim=-1,
                               eps=torch.finfo(torch.float64).tiny)                          # gradients may be small


@torch.no_grad()
def reference_residuals(cfg, source):
    """-> a row a reference, on V of a source as 'sequence' scope cuts it."""
    best = smallest_residual(source.v.float(), cfg.svd_rank)
    rows = []
    for name, f in references_for(cfg).items():
        ratios = residual_over_best(source.v, f(source.v), best)
        rows.append({'source': source.name, 'reference': name, 'matrices': ratios.numel(),
                     'residual_mean': ratios.mean().item(), 'residual_worst': ratios.max().item()})
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# output

def print_table(header, rows, words):
    """Columns as wide as they must be, the first `words` of them to the left, the others, numbers, to the right."""
    cells = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        print('  '.join(cell.ljust(width) if i < words else cell.rjust(width)
                        for i, (cell, width) in enumerate(zip(row, widths))).rstrip())
    print(flush=True)


def print_timings(cfg, device, rows, references, source):
    """Tables of the methods' costs and the references'."""
    how = {'cuda': 'torch.cuda.max_memory_allocated', 'cpu': "allocations that torch's profiler notes"}
    print(f'\ncost, on {source.name}: medians; ratios are medians of a round, with their quartiles. Peak: '
          f'{how.get(torch.device(device).type, "not measured on this device")}, without V and its upstream gradient')
    table = []
    for row in rows:
        peak, step = row['peak_bytes'], row['step']
        table.append([row['scope'], row['method'], *(ms(row[f'{q}_ms']) for q in ('basis', 'forward', 'fwd_bwd')),
                      ratio(row['fwd_bwd_over_gram'], row['fwd_bwd_over_gram_quartiles']),
                      '-' if peak is None else f'{peak / 1e6:.3f}', ms(step['a_ms']) if step else '-',
                      ratio(step['ratio'], step['ratio_quartiles']) if step else '-'])
    print_table(['scope', 'method', 'basis ms', 'forward ms', 'fwd+bwd ms', 'fwd+bwd / gram', 'peak MB', 'step ms',
                 'step / no SVD'], table, words=2)
    print("references, on the same V: forward only, float32, the whole V ('sequence')"
          + ('' if any('sklearn' in row['reference'] for row in references) else '; scikit-learn is not installed'))
    print_table(['reference', 'forward ms', 'forward / gram'],
                [[row['reference'], ms(row['forward_ms']),
                  ratio(row['forward_over_gram'], row['forward_over_gram_quartiles'])] for row in references], words=1)


def print_quality(found, compared):
    """Tables of residuals and cosines, a row a source and case."""
    print('quality, float32: residual over the best, minus 1, in %; 1 minus the cosine of the gradient and the exact '
          "one, 'full' with the basis differentiated, 'const' without; mean and worst over matrices")
    columns = [f'cosine_{name}_{which}' for name in ('full', 'constant') for which in ('mean', 'min')]
    table = [[row['source'], row['scope'], row['method'], str(row['matrices']), percent(row['residual_mean']),
              percent(row['residual_worst']), *(f'{max(0.0, 1 - row[column]):.1e}' for column in columns)]
             for row in found]
    print_table(['V', 'scope', 'method', 'matrices', 'residual %', 'worst', '1-cos full', 'worst', '1-cos const',
                 'worst'], table, words=3)
    print("references, on V as 'sequence' scope cuts it")
    print_table(['V', 'reference', 'matrices', 'residual %', 'worst'],
                [[row['source'], row['reference'], str(row['matrices']), percent(row['residual_mean']),
                  percent(row['residual_worst'])] for row in compared], words=2)


def ms(value):
    return f'{value:.3f}' if value < 100 else f'{value:.0f}'


def ratio(middle, ends):
    return f'{middle:.2f} ({ends[0]:.2f}-{ends[1]:.2f})'


def percent(value):
    return f'{max(0.0, 100 * (value - 1)):.3f}'


def draw(cfg, device, result, names):
    """The figure: residual over the best, minus 1, mean over the matrices of the sources `names`, against the time of
    the forward pass; a panel a scope, references in that of the whole V."""
    def excess(rows, **wanted):
        own = [row['residual_mean'] for row in rows
               if row['source'] in names and all(row.get(key) == value for key, value in wanted.items())]
        return statistics.fmean(own) - 1

    panels = {}
    for row in result['methods']:
        point = plots.Point(row['forward_ms'], excess(result['quality'], scope=row['scope'], method=row['method']),
                            row['method'], 'method of this repo')
        panels.setdefault(f"'{row['scope']}' scope", []).append(point)
    panels["'sequence' scope"] += [
        plots.Point(row['forward_ms'], excess(result['reference_residuals'], reference=row['reference']),
                    row['reference'], 'reference') for row in result['references']]
    B, nh, T, hs, k = shape_of(cfg).values()
    measured = f'trained, {len(names)} layers' if names[0].startswith('trained') else f'synthetic, {names[0]}'
    kind = 'GPU' if torch.device(device).type != 'cpu' else f'CPU, {result["threads"]} threads'
    plots.scatter_panels(cfg.plot_path(), panels, 'forward pass, ms a layer (median)',
                         'residual / best residual - 1 (mean)', EXACT_BELOW, 'the best, to rounding',
                         f'V {B} x {nh} x {T} x {hs} ({measured}), rank {k}; {kind}; seed {cfg.seed}; '
                         f'{result["rounds"]} rounds')

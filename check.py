"""
The self-test behind `python bench.py --check`: equalities that must hold on any machine, run on the one at hand.

A group of checks yields names and functions that return whether the check holds and the words for its line. Each bound
says why it is what it is; differences are relative to the largest entry of what is compared.
"""

import math
import os
import platform
import tempfile
import time
from collections import namedtuple
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from itertools import combinations
from pathlib import Path

import torch

import train
from lowrank.svd import EXACT_METHODS, causal_low_rank_approximation, low_rank_approximation
from model import GPT, METHODS, SCOPES, GPTConfig
from runtime import device as devices
from runtime.config import one_line
from runtime.dataset import write_dataset

SHAPE = dict(block_size=32, vocab_size=17, n_layer=2, n_head=2, n_embd=32, svd_rank=4, svd_block=8)     # head size 16
HALVES = ('bfloat16', 'float16')
COMPILE_UNTIL = 80                  # seconds after the start: no compilation begins later, so that all take two minutes

Setup = namedtuple('Setup', 'device kind dtype seed folder started')    # kind: of device; started: time.perf_counter()


class Skip(Exception):
    """A check that says nothing here; the text says why."""


def run(device, dtype, seed):
    """Print versions, one line a check and the count -> rows [{'check', 'verdict', 'detail'}], exit code 0 or 1. A
    check that raises has failed; the others still run. Nothing is written outside a temporary folder."""
    started = time.perf_counter()
    print(versions(device, dtype, seed), flush=True)
    rows = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:     # Windows keeps what is loaded
        os.environ |= {f'{name}_CACHE_DIR': str(Path(folder) / name) for name in ('TORCHINDUCTOR', 'TRITON')}
        setup = Setup(device, torch.device(device).type, dtype, seed, Path(folder), started)
        for name, check in (pair for group in GROUPS for pair in group(setup)):
            torch.backends.cuda.matmul.allow_tf32 = False           # its 10 bits would hide what is looked for
            try:
                ok, detail = check()
                verdict = 'ok' if ok else 'FAIL'
            except Skip as e:
                verdict, detail = 'skip', str(e)
            except Exception as e:                                  # whatever an unknown device raises
                verdict, detail = 'FAIL', f'{type(e).__name__}: {one_line(e)[:300]}'
            print(f'{verdict:5} {name}: {detail}', flush=True)
            rows.append({'check': name, 'verdict': verdict, 'detail': detail})
    failed, skipped = (sum(row['verdict'] == verdict for row in rows) for verdict in ('FAIL', 'skip'))
    print(f'{len(rows)} checks, {failed} failed, {skipped} skipped ({time.perf_counter() - started:.0f} s)')
    return rows, int(failed > 0)


def versions(device, dtype, seed):
    here = devices.environment(device, dtype)
    kind = torch.device(device).type
    extra = {'cuda': f', CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}',
             'mps': f', MPS of macOS {platform.mac_ver()[0]}'}.get(kind, '')
    return (f'python {here["python"]}, torch {here["torch"]}, {here["platform"]}, {here["processor"]}\n'
            f'{device} ({here["device_name"]}{extra}), {here["threads"]} threads, {dtype}, seed {seed}')


# ----------------------------------------------------------------------------------------------------------------------
# what the checks share

def svd(scope, method='gram', **overrides):
    """Model options; scope None: no SVD."""
    return dict(use_svd=scope is not None, svd_scope=scope or SCOPES[0], svd_method=method, **overrides)


# latents of 8 for heads of 16; layers of the first block as products of two, where a model may have no other
FACTORS = {'h.0.attn.c_attn.c_v': 8, 'h.0.attn.c_proj': 8, 'h.0.mlp.c_fc': 16, 'h.0.mlp.c_proj': 16}
EVERY = [svd(None), *(svd(scope, method) for scope in SCOPES for method in METHODS),
         svd(None, use_mla=True), svd('causal', use_mla=True), svd(None, layer_ranks=FACTORS)]


def label(options):
    parts = ['latents'] * options.get('use_mla', False) + ['factors'] * ('layer_ranks' in options)
    cut = [repr(options['svd_method']), repr(options['svd_scope'])] * options['use_svd']
    return ', '.join(parts + cut) or 'baseline'


def make(setup, device=None, **overrides):
    """A small model in eval mode, its parameters well away from zero, where errors would not show. Each of a head's
    value projections is half the one before: the singular values of V fall as fast, the gap at the cut is wide, and
    what differs is rounding, not the cut's condition."""
    torch.manual_seed(setup.seed)
    model = GPT(GPTConfig(**SHAPE | overrides)).eval()
    c = model.config
    hs = c.n_embd // c.n_head
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
        for block in model.transformer.h:
            block.attn.c_attn.value_weight().mul_(2.0 ** -torch.arange(hs).unsqueeze(-1))       # (nh, hs, C or latent)
    return model.to(device or setup.device)


def tokens(setup, rows=4):
    """x, y (rows, block_size), on the CPU."""
    generator = torch.Generator().manual_seed(setup.seed)
    return (torch.randint(SHAPE['vocab_size'], (rows, SHAPE['block_size']), generator=generator) for _ in range(2))


def outcome(model, x, y, dtype='float32'):
    """-> [logits, loss, every gradient as one vector], float32 on the CPU."""
    device = next(model.parameters()).device
    # the loss is scaled in float16, as in train.py on CUDA, but by less: 2^16 would overflow these gradients
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0 ** 10, enabled=dtype == 'float16')
    model.zero_grad()
    with devices.autocast(device, dtype):
        logits, loss = model(x.to(device), y.to(device))
    scaler.scale(loss).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()]) / scaler.get_scale()
    return [t.detach().float().cpu() for t in (logits, loss, gradient)]


def difference(a, b):
    """Largest |a - b| relative to the largest |b|, over lists of tensors; inf if anything is not finite (max would lose
    a nan). One scale for all gradients: those of the key biases are zero but for rounding, and have no scale of their
    own."""
    return max(((s - t).abs().max() / t.abs().max().clamp_min(1e-30)).item() if (s + t).isfinite().all() else math.inf
               for s, t in zip(a, b))


def within(value, bound):
    return value <= bound, f'largest difference {value:.1e} (bound {bound:.0e})'


# ----------------------------------------------------------------------------------------------------------------------
# the checks

def methods(setup):
    """The exact methods against each other, each against the definition, and 'randomized' against the best there is."""
    # Both decompose in float64 and project in float32, so they differ by a few float32 roundings. MPS sums V^T V in
    # float32, which costs a gradient up to 1 / gap^2 roundings. Measured over 100 seeds: at most 6e-7, with such a sum
    # 1.2e-5
    bound = 1e-3 if setup.kind == 'mps' else 1e-5
    x, y = tokens(setup)
    for a, b in combinations(EXACT_METHODS, 2):
        for scope in SCOPES:
            yield f'{a} = {b}, {scope!r}', lambda a=a, b=b, scope=scope: within(difference(
                *(outcome(make(setup, **svd(scope, method)), x, y) for method in (a, b))), bound)

    def against_float64(method):
        generator = torch.Generator().manual_seed(setup.seed)
        spectrum = 2.0 ** -torch.arange(16, dtype=torch.float64)    # a wide gap, as in `make`
        v, dy = (torch.randn(8, 64, 16, generator=generator, dtype=torch.float64) * spectrum for _ in range(2))
        v = v.float().double().requires_grad_()                     # what float32 can hold
        u, s, vh = torch.linalg.svd(v, full_matrices=False)
        expected = u[..., :4] * s[..., None, :4] @ vh[..., :4, :]
        expected.backward(dy)
        ours = v.detach().float().to(setup.device).requires_grad_()
        low = low_rank_approximation(ours, 4, method)
        low.backward(dy.float().to(setup.device))
        return within(difference([low.detach().cpu(), ours.grad.cpu()], [expected.detach(), v.grad]), bound)

    def residual():
        """Mean over 64 matrices of Gaussian numbers, whose spectrum has no gap to find the cut by."""
        generator = torch.Generator().manual_seed(setup.seed)
        v = torch.randn(64, 128, 32, generator=generator)
        low = low_rank_approximation(v.to(setup.device), 16, 'randomized').cpu()
        best = torch.linalg.svdvals(v)[:, 16:].square().sum(1).sqrt()
        ratio = (torch.linalg.matrix_norm(v - low) / best).mean().item()
        return ratio <= 1.04, f'residual {ratio:.3f} of the best (bound 1.04)'

    for method in EXACT_METHODS:
        yield f'{method} = float64 torch.linalg.svd', lambda method=method: against_float64(method)
    yield 'randomized near the best approximation', residual


def device_against_cpu(setup):
    """The same weights on the device and on the CPU, float32."""
    if setup.kind == 'cpu':
        def on_the_cpu():
            raise Skip('the device is the CPU')
        yield 'device = CPU', on_the_cpu
        return
    # sums in another order: a few roundings of a gradient through two layers. MPS: see `methods`
    bound = 1e-3 if setup.kind == 'mps' else 1e-4
    x, y = tokens(setup)
    for options in EVERY:
        yield f'{setup.device} = CPU, {label(options)}', lambda options=options: within(difference(
            outcome(make(setup, **options), x, y),
            outcome(make(setup, device='cpu', **options), x, y)), bound)


def causality(setup):
    """Later tokens leave earlier logits alone, except in 'sequence' scope."""
    # 0 on the CPU, where LAPACK takes one matrix at a time. Elsewhere a batch may be iterated until the last of it has
    # converged, so one matrix gets another sweep for another's sake: rounding in float64. A leak is 1e-2 and more
    bound = 0.0 if setup.kind == 'cpu' else 1e-5
    x, y = tokens(setup)
    half = SHAPE['block_size'] // 2
    changed = torch.cat((x[:, :half], (x[:, half:] + 1) % SHAPE['vocab_size']), dim=1)

    def moved(scope):
        """Largest change of the first half's logits, of any method."""
        change = 0.0
        for method in METHODS:
            model = make(setup, **svd(scope, method))
            with torch.no_grad():
                first, second = (model(i.to(setup.device), y.to(setup.device))[0][:, :half].cpu() for i in (changed, x))
            change = max(change, difference([first], [second]))
        return change

    for scope in (None, 'causal', 'weight'):
        name = repr(scope) if scope else 'baseline'
        yield f'no token sees a later one, {name}', lambda scope=scope: within(moved(scope), bound)

    def leaks():
        change = moved('sequence')
        return change > 1e-3, f'later tokens move earlier logits by {change:.1e} (at least 1e-03, or this cannot tell)'
    yield "'sequence' sees later tokens", leaks


def no_truncation(setup):
    """Full rank, no rank and SVD off are the baseline to the bit."""
    # the same kernels on the same numbers; but the backward pass of some CUDA and MPS kernels adds in no fixed order
    bound = 0.0 if setup.kind == 'cpu' else 1e-5
    x, y = tokens(setup)
    full = SHAPE['n_embd'] // SHAPE['n_head']

    def same(*variants):
        baseline = outcome(make(setup, **svd(None)), x, y)
        worst = 0.0
        for options in variants:
            ours = outcome(make(setup, **options), x, y)
            if not all(torch.equal(a, b) for a, b in zip(ours[:2], baseline)):
                return False, f'{options}: logits or loss differ by {difference(ours[:2], baseline):.1e} (bound 0)'
            worst = max(worst, difference(ours[2:], baseline[2:]))
        return worst <= bound, f'logits and loss to the bit, gradients to {worst:.1e} (bound {bound:.0e})'

    yield 'SVD off = baseline', lambda: same(
        *({**svd(scope, method), 'use_svd': False} for scope in SCOPES for method in METHODS))
    for scope in SCOPES:
        yield f'full rank = baseline, {scope!r}', lambda scope=scope: same(
            *(svd(scope, method, svd_rank=rank) for method in METHODS for rank in (full, None)))


def decoding(setup):
    """A prompt and then token after token with the cache: the logits of the whole at once."""
    # the same sums in another order; a basis in 'causal' scope passes them on divided by the gap, which is wide here.
    # MPS sums V^T V in float32
    bound = 1e-3 if setup.kind == 'mps' else 1e-5
    x, _ = tokens(setup)
    prompt = 5

    def same(options):
        model, idx = make(setup, **options), x.to(setup.device)
        cache = model.new_cache(*idx.shape)
        with torch.no_grad():
            expected = model(idx, idx)[0][:, prompt - 1:]
            ours = [model(idx[:, :prompt], cache=cache)[0]]
            ours += [model(idx[:, t:t + 1], cache=cache)[0] for t in range(prompt, idx.size(1))]
        return within(difference([torch.cat(ours, dim=1).cpu()], [expected.cpu()]), bound)

    for options in EVERY:
        if not (options['use_svd'] and options['svd_scope'] == 'sequence'):
            yield f'cached = uncached, {label(options)}', lambda options=options: same(options)


def degenerate(setup):
    """Gradients stay finite where a singular value is zero or repeated at the cut."""
    generator = torch.Generator().manual_seed(setup.seed)
    zeros = torch.zeros(2, 24, 8)
    few_rows = torch.randn(2, 6, 8, generator=generator)
    repeated = torch.linalg.qr(torch.randn(2, 24, 8, generator=generator))[0]

    def finite(v):
        for method in METHODS:
            for f in (lambda x: low_rank_approximation(x, 3, method),
                      lambda x: causal_low_rank_approximation(x, 3, method, block=4)):
                x = v.to(setup.device).requires_grad_()
                y = f(x)
                (gradient,) = torch.autograd.grad(y, x, torch.randn(v.shape, generator=generator).to(setup.device))
                if not (y.isfinite().all() and gradient.isfinite().all()):
                    return False, f'{method!r}: not finite'
        return True, 'values and gradients finite'

    for name, v in (('zeros', zeros), ('fewer rows than columns', few_rows), ('repeated singular values', repeated)):
        yield f'degenerate V, {name}', lambda v=v: finite(v)


def resume(setup):
    """train.main: six steps straight against three, then --init_from=resume, with Muon, dropout and SVD."""
    # To the bit on the CPU. Elsewhere a backward pass may add in no fixed order. Measured: changing every weight by a
    # rounding becomes 1e-5 in float32 and 5e-3 in bfloat16; lost dropout 0.3, lost batches 0.4, a lost optimizer 0.9
    bound = 0.0 if setup.kind == 'cpu' else 1e-1
    options = dict(dataset=setup.folder / 'data', device=setup.device, seed=setup.seed, compile=False,
                   n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=4, gradient_accumulation_steps=2,
                   dropout=0.2, use_svd=True, svd_rank=3, optimizer='muon', learning_rate=1e-2, warmup_iters=0,
                   lr_decay_iters=6, eval_interval=3, eval_iters=1)

    def steps(max_iters, out_dir, **more):
        """-> the weights after max_iters, as one vector."""
        more |= options | {'max_iters': max_iters, 'out_dir': setup.folder / out_dir}
        argv = [f'--{key}={value}' for key, value in more.items()]
        printed = StringIO()
        with redirect_stdout(printed), redirect_stderr(printed):
            code = train.main(argv)
        if code:
            raise RuntimeError(f'train.py ended with {code}: {printed.getvalue().splitlines()[-1]}')
        weights = torch.load(setup.folder / out_dir / 'ckpt.pt', map_location='cpu', weights_only=True)['model']
        return torch.cat([w.float().flatten() for w in weights.values()])

    def compare(dtype):
        text = ''.join(f'line {i}: {i * i} is the square of {i}\n' for i in range(100))
        write_dataset(setup.folder / 'data', text, 'char', source='check')
        straight = steps(6, f'{dtype}-straight', dtype=dtype)
        first = steps(3, f'{dtype}-parts', dtype=dtype)
        second = steps(6, f'{dtype}-parts', dtype=dtype, init_from='resume')
        value = ((second - straight).norm() / (straight - first).norm()).item()
        return value <= bound, f'weights differ by {value:.1e} of what three steps change (bound {bound:.0e})'

    scaled = {'float16'} if setup.kind == 'cuda' else set()         # with a GradScaler, which must be resumed too
    for dtype in sorted({setup.dtype} | scaled):
        yield f'resumed run = uninterrupted run, {dtype}', lambda dtype=dtype: compare(dtype)


def autocast(setup):
    """Half precision outside the SVD, float32 inside it."""
    x, y = tokens(setup)

    def close(dtype, bound, variants):
        worst = 0.0
        for options in variants:
            model = make(setup, **options)
            worst = max(worst, difference(outcome(model, x, y, dtype), outcome(model, x, y)))
        return within(worst, bound)

    def float32_inside(dtype):
        """In half precision and under autocast: what float32 gives, rounded once, to the bit."""
        generator = torch.Generator().manual_seed(setup.seed)
        v, dy = (torch.randn(8, 64, 16, generator=generator).to(setup.device, getattr(torch, dtype)) for _ in range(2))
        for method in METHODS:
            ours, reference = v.clone().requires_grad_(), v.clone().requires_grad_()
            with devices.autocast(setup.device, dtype):
                low = low_rank_approximation(ours, 4, method)
                low.backward(dy)
            expected = low_rank_approximation(reference.float(), 4, method).to(v.dtype)
            expected.backward(dy)
            if low.dtype != v.dtype or not (torch.equal(low, expected) and torch.equal(ours.grad, reference.grad)):
                return False, f'{method!r} is not the float32 result, rounded once'
        return True, 'the float32 result, rounded once'

    # a rounding is 2^-9 in bfloat16, 2^-12 in float16; some dozens add up through two layers and back. Measured, over
    # 100 seeds: at most 0.1 and 0.007, 0.015 and 0.002 without SVD, whose gradient divides by the gap
    for dtype, bound in zip(HALVES, (0.2, 0.03)):
        for scope in (None, *SCOPES):
            variants = [svd(scope, method) for method in METHODS] if scope else [svd(None)]
            name = repr(scope) if scope else 'baseline'
            yield f'{dtype} near float32, {name}', lambda dtype=dtype, bound=bound, variants=variants: close(
                dtype, bound, variants)
        yield f'{dtype}: SVD in float32', lambda dtype=dtype: float32_inside(dtype)


def optimizers(setup):
    """One step of each: every parameter moves and stays finite."""
    x, y = tokens(setup)

    def step(name):
        model = make(setup)
        before = [p.detach().clone() for p in model.parameters()]
        cfg = train.TrainConfig(optimizer=name, out_dir=str(setup.folder / 'unused'))
        optimizer = train.build_optimizer(cfg, model, setup.device)
        model(x.to(setup.device), y.to(setup.device))[1].backward()
        optimizer.step()
        if not all(p.isfinite().all() for p in model.parameters()):
            return False, 'a parameter is not finite'
        return not any(torch.equal(a, b) for a, b in zip(before, model.parameters())), 'all parameters move, all finite'

    for name in ('adamw', 'muon'):
        yield f'one step of {name}', lambda name=name: step(name)


def compiled(setup):
    """torch.compile against eager, as one graph, in the chosen dtype; last, because a compiler takes seconds each."""
    # inductor fuses and adds in another order; in half precision it also rounds less often: bounds as in `autocast`
    bound = {'float32': 1e-4, 'bfloat16': 0.2, 'float16': 0.03}[setup.dtype]
    x, y = tokens(setup, rows=2)
    unable = []

    def probe():
        try:
            with redirect_stderr(StringIO()):
                torch.compile(lambda x: x + 1)(torch.ones(2, device=setup.device))
        except Exception as e:
            reason = one_line(e).partition(' Set TORCHDYNAMO')[0][:200]
            unable.append(f'not even x + 1 compiles here ({type(e).__name__}: {reason})')

    def same(options):
        if setup.started + COMPILE_UNTIL < time.perf_counter():
            raise Skip(f'not begun: {COMPILE_UNTIL} s have passed')
        if options == EVERY[0]:
            probe()
        if unable:
            raise Skip(*unable)
        torch._dynamo.reset()                                       # one function, many models: else its limit is hit
        model = make(setup, n_layer=1, n_embd=16, **options)
        expected = outcome(model, x, y, setup.dtype)
        try:
            ours = outcome(torch.compile(model, fullgraph=True), x, y, setup.dtype)
        except torch._dynamo.exc.BackendCompilerFailed as e:
            if setup.kind != 'mps':
                raise
            raise Skip(f'torch cannot compile this for MPS ({one_line(e)[:200]})') from None     # a prototype there
        return within(difference(ours, expected), bound)

    for options in sorted(EVERY, key=lambda options: options['svd_method'] != 'gram'):      # time may run out
        yield f'compiled = eager, {label(options)}', lambda options=options: same(options)


GROUPS = (methods, device_against_cpu, causality, no_truncation, decoding, degenerate, resume, autocast, optimizers,
          compiled)

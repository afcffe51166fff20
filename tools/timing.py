"""Paired timing, peak memory and table rows.

Functions that are compared run in turn, so that a slower phase of the machine affects all of them.
"""

import itertools
import math
import os
import statistics
import time

import torch

from runtime import device as devices

LEAST_SECONDS = 5e-3                # shorter work is repeated because reading the clock takes time


def time_it(f, device, repeats=1):
    """Return the mean seconds per call of f() over `repeats` calls, including its device work."""
    devices.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        f()
    devices.synchronize(device)
    return (time.perf_counter() - start) / repeats


def interleave(runs, rounds, warmup=1):
    """Call functions in turn, in reverse order in every second round.

    runs: name -> function. Returns name -> list of `rounds` results. `warmup` additional rounds
    come first. Their results are dropped.
    """
    results = {name: [] for name in runs}
    for i in range(warmup + rounds):
        for name in list(runs)[::1 if i % 2 else -1]:
            results[name].append(runs[name]())
    return {name: found[warmup:] for name, found in results.items()}


def time_interleaved(functions, rounds, device):
    """Time functions in turn. functions: name -> function that takes at least a few microseconds.
    Returns name -> list of seconds per call, one value per round."""
    def timed(f):
        f()                                                         # the first call may be slower
        repeats = math.ceil(LEAST_SECONDS / max(time_it(f, device), 1e-6))
        return lambda: time_it(f, device, repeats)
    return interleave({name: timed(f) for name, f in functions.items()}, rounds)


def quartiles(values):
    """Return the lower quartile, the median and the upper quartile of two or more numbers."""
    return statistics.quantiles(values, n=4, method='inclusive')


def paired_benchmark(a, b, pairs, device):
    """Time a() and b() in turn, after three warm-up rounds.

    Returns a dict. 'a_ms' and 'b_ms' are the median milliseconds. 'ratio' is the median of (time of
    a) / (time of b), taken pair by pair. 'ratio_quartiles' holds the lower and the upper quartile
    of this ratio.
    """
    runs = {'a': lambda: time_it(a, device), 'b': lambda: time_it(b, device)}
    rounds = interleave(runs, pairs, warmup=3)
    low, ratio, high = quartiles([ta / tb for ta, tb in zip(rounds['a'], rounds['b'])])
    a_ms, b_ms = (1e3 * statistics.median(rounds[side]) for side in 'ab')
    return {'a_ms': a_ms, 'b_ms': b_ms, 'ratio': ratio, 'ratio_quartiles': [low, high]}


def peak_bytes(f, device):
    """Return the peak number of bytes that f() allocates in addition to the bytes allocated before,
    or None on MPS.

    On CUDA, torch's allocator counts the bytes. On the CPU, torch's profiler records allocations,
    so workspace inside an operator counts only if torch allocates it.
    """
    kind = torch.device(device).type
    f()                                                     # some workspaces are allocated once
    if kind == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        f()
        return torch.cuda.max_memory_allocated(device) - before
    if kind != 'cpu':
        return None
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')                 # no profiler output on stderr
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        f()
    changes = sorted((event.start_ns(), event.nbytes())
                     for event in profile.kineto_results.events() if event.name() == '[memory]')
    return max(itertools.accumulate(size for _, size in changes), default=0)


def generation(model, prompt, tokens, device):
    """Generate `tokens` tokens greedily after a prompt (B, T), and time it. Returns the seconds for
    the prompt with the first token, and the seconds per later token."""
    stream = model.stream(prompt, tokens, temperature=0, use_cache=not model.config.is_noncausal)
    return (time_it(lambda: next(stream), device),
            time_it(lambda: [*stream], device) / (tokens - 1))


def print_line(name, values):
    """Print a table row: a name, then numbers to four digits, strings as they are, '-' for None."""
    cells = ['-' if value is None else value if isinstance(value, str) else f'{value:.4g}'
             for value in values]
    print(f'{name:32}' + ''.join(f'{cell:>13}' for cell in cells), flush=True)

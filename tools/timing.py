"""Clocks under which a drifting machine slows everything compared alike, peak memory, and the lines
of a table."""

import itertools
import math
import os
import statistics
import time

import torch

from runtime import device as devices

LEAST_SECONDS = 5e-3                # shorter work is repeated: reading the clock takes time, too


def time_it(f, device, repeats=1):
    """Seconds that f() takes, including all its work on the device; mean of `repeats` calls."""
    devices.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        f()
    devices.synchronize(device)
    return (time.perf_counter() - start) / repeats


def interleave(runs, rounds, warmup=1):
    """Call the functions of a dict in turn, every other round backwards.

    `rounds` counts after `warmup` rounds, whose results are dropped. Returns name -> list of
    results.
    """
    results = {name: [] for name in runs}
    for i in range(warmup + rounds):
        for name in list(runs)[::1 if i % 2 else -1]:
            results[name].append(runs[name]())
    return {name: found[warmup:] for name, found in results.items()}


def time_interleaved(functions, rounds, device):
    """Name -> function of a few microseconds or more; returns name -> seconds, one per round."""
    def timed(f):
        f()                                                         # what only the first call does
        repeats = math.ceil(LEAST_SECONDS / max(time_it(f, device), 1e-6))
        return lambda: time_it(f, device, repeats)
    return interleave({name: timed(f) for name, f in functions.items()}, rounds)


def quartiles(values):
    """Lower quartile, median and upper quartile of two or more numbers."""
    return statistics.quantiles(values, n=4, method='inclusive')


def paired_benchmark(a, b, pairs, device):
    """Time a and b in turn.

    Returns {'a_ms', 'b_ms': medians, 'ratio': median over pairs of a / b, 'ratio_quartiles'}.
    """
    runs = {'a': lambda: time_it(a, device), 'b': lambda: time_it(b, device)}
    rounds = interleave(runs, pairs, warmup=3)
    low, ratio, high = quartiles([ta / tb for ta, tb in zip(rounds['a'], rounds['b'])])
    a_ms, b_ms = (1e3 * statistics.median(rounds[side]) for side in 'ab')
    return {'a_ms': a_ms, 'b_ms': b_ms, 'ratio': ratio, 'ratio_quartiles': [low, high]}


def peak_bytes(f, device):
    """Most bytes that f() holds at once beyond those held before: int, None on MPS.

    CUDA: by torch's allocator. CPU: from the allocations that torch's profiler records, so work
    space inside an operator counts only if torch allocates it.
    """
    kind = torch.device(device).type
    f()                                                             # work spaces that are made once
    if kind == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        f()
        return torch.cuda.max_memory_allocated(device) - before
    if kind != 'cpu':
        return None
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')                 # else it reports on stderr
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        f()
    changes = sorted((event.start_ns(), event.nbytes())
                     for event in profile.kineto_results.events() if event.name() == '[memory]')
    return max(itertools.accumulate(size for _, size in changes), default=0)



def generation(model, prompt, tokens, device):
    """Continue prompt (B, T) greedily. Returns seconds for the prompt and the first token, and
    seconds per token for the other `tokens` - 1."""
    stream = model.stream(prompt, tokens, temperature=0, use_cache=not model.config.is_noncausal)
    return (time_it(lambda: next(stream), device),
            time_it(lambda: [*stream], device) / (tokens - 1))


def print_line(name, values):
    """One line of a table: a name, then numbers with four digits, other words, '-' for None."""
    cells = ['-' if value is None else value if isinstance(value, str) else f'{value:.4g}'
             for value in values]
    print(f'{name:32}' + ''.join(f'{cell:>13}' for cell in cells), flush=True)

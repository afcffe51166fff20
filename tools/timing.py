"""Times of functions, taken so that a drifting machine slows all that is compared, and the memory they need."""

import itertools
import json
import math
import os
import statistics
import tempfile
import time

import torch

from runtime import device as devices

LEAST_SECONDS = 5e-3                # shorter work is repeated until it takes as long: reading the clock takes time, too


def time_it(f, device, repeats=1):
    """Seconds that f() takes, all its work on the device included; mean of `repeats` calls."""
    devices.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        f()
    devices.synchronize(device)
    return (time.perf_counter() - start) / repeats


def interleave(runs, rounds, warmup=1):
    """Call the functions of a dict in turn, `rounds` times after the warm-up, every other round backwards, so that a
    drifting machine slows all -> name -> list of results."""
    results = {name: [] for name in runs}
    for i in range(warmup + rounds):
        for name in list(runs)[::1 if i % 2 else -1]:
            result = runs[name]()
            if i >= warmup:
                results[name].append(result)
    return results


def time_interleaved(functions, rounds, device):
    """Name -> function of a few microseconds or more; -> name -> list of seconds, one a round, taken in turn."""
    repeats = {}
    for name, f in functions.items():
        f()                                                         # what only the first call does
        repeats[name] = max(1, math.ceil(LEAST_SECONDS / max(time_it(f, device), 1e-6)))
    return interleave({name: lambda name=name, f=f: time_it(f, device, repeats[name]) for name, f in functions.items()},
                      rounds)


def quartiles(values):
    """Lower quartile, median and upper quartile of two numbers or more."""
    return statistics.quantiles(values, n=4, method='inclusive')


def paired_benchmark(a, b, pairs, device):
    """Time a and b in turn -> {'a_ms', 'b_ms': medians, 'ratio': median of a / b a pair, 'ratio_quartiles'}."""
    rounds = interleave({'a': lambda: time_it(a, device), 'b': lambda: time_it(b, device)}, pairs, warmup=3)
    low, ratio, high = quartiles([ta / tb for ta, tb in zip(rounds['a'], rounds['b'])])
    a_ms, b_ms = (1e3 * statistics.median(rounds[side]) for side in 'ab')
    return {'a_ms': a_ms, 'b_ms': b_ms, 'ratio': ratio, 'ratio_quartiles': [low, high]}


def peak_bytes(f, device):
    """Most bytes that f() holds at once beyond what was held before -> int, or None where nothing counts them (MPS).
    On CUDA by torch's allocator; on the CPU from the allocations that torch's profiler notes, so that work space inside
    an operator counts only where torch allocates it."""
    kind = torch.device(device).type
    f()                                                             # work spaces that are made once
    if kind == 'cuda':
        devices.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        f()
        devices.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if kind != 'cpu':
        return None
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')                 # else it writes to stderr that it starts and stops
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        f()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f'{folder}/trace.json')
        with open(f'{folder}/trace.json', encoding='utf-8') as file:
            events = [event for event in json.load(file)['traceEvents'] if event.get('name') == '[memory]']
    return max(itertools.accumulate(event['args']['Bytes'] for event in sorted(events, key=lambda e: e['ts'])),
               default=0)


def generation(model, prompt, tokens, device):
    """Continue prompt (B, T) by the likeliest tokens -> seconds for the prompt and the first one, seconds for each of
    the other tokens - 1."""
    stream = model.stream(prompt, tokens, temperature=0, use_cache=not model.config.is_noncausal)
    return time_it(lambda: next(stream), device), time_it(lambda: [*stream], device) / (tokens - 1)

"""
Time whole training steps, paired: this repo's model without SVD against every SVD method and scope, and against
another checkout's model.py. Or time decoding. Or test that what must be equal is equal on this machine.

    python bench.py config/train_svd_test.py                     # the main job's model
    python bench.py config/train_svd_test.py --peer=../nanoGPT   # also against nanoGPT's GPT and its optimizer
    python bench.py config/train_svd_test.py --decode            # tokens/s and cache bytes; takes --peer, too
    python bench.py --check                                      # the self-test; takes --device, --dtype and --seed
    python bench.py --help

A step is forward, backward, clipping and the optimizer, on random tokens. Decoding is greedy, batch_size prompts of
random tokens at a time; its prefill is timed apart. What is compared takes turns, in alternating order, so that a
drifting machine slows all. The self-test prints ok, FAIL or skip for each equality, in under two minutes, and ends with
exit code 1 if one failed. The last line is JSON.
"""

import importlib.util
import json
import re
import statistics
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import torch

from check import run
from model import GPT, METHODS, SCOPES, GPTConfig
from runtime import config as configuration
from runtime import device as devices
from runtime.config import SWITCH, UserError
from train import TrainConfig, build_optimizer


@dataclass
class BenchConfig(TrainConfig):
    """train.py's options, of which the model's, the batch's and the optimizer's matter here."""
    check: Annotated[bool, 'test on this device that what must be equal is equal, and time nothing', SWITCH] = False
    decode: Annotated[bool, 'time decoding instead of training steps', SWITCH] = False
    contexts: Annotated[str | None, "--decode: prompt lengths, as '16,128'; None: 3, 6, 14 16ths of block_size"] = None
    tokens: Annotated[int, '--decode: tokens after each prompt; a sixteenth where nothing is cached'] = 32
    pairs: Annotated[int, 'timed pairs a comparison'] = 30
    peer: Annotated[str | None, 'folder with another model.py (nanoGPT) to time against'] = None

    def __post_init__(self):
        super().__post_init__()
        if self.pairs < 2:
            raise ValueError(f'pairs={self.pairs}: must be at least 2 (nearest: 2)')
        if self.tokens < 2:
            raise ValueError(f'tokens={self.tokens}: must be at least 2 (nearest: 2)')
        if self.decode:
            self.lengths()
        if self.peer and not (Path(self.peer) / 'model.py').is_file():
            raise ValueError(f'peer={self.peer!r}: has no model.py')

    def lengths(self):
        """`contexts` as a list of int."""
        most = self.block_size - self.tokens                        # beyond that the window slides: not this table's
        # within the spans of 'causal' scope; at their edges a basis is due, which lasts for as many tokens again
        usual = ','.join(str(min(most, self.block_size * sixteenths // 16)) for sixteenths in (3, 6, 14))
        words = (usual if self.contexts is None else self.contexts).split(',')
        if not all(re.fullmatch('[1-9][0-9]{0,8}', word) and int(word) <= most for word in words):
            raise ValueError(f"contexts={','.join(words)!r}: must be whole numbers, like '16,128', of at most "
                             f'block_size - tokens = {most}')
        return [int(word) for word in words]


def main(argv=None):
    """-> exit code: 0 done, 1 a check failed, 2 wrong input (one line on stderr)."""
    argv = sys.argv[1:] if argv is None else argv
    if '--help' in argv or '-h' in argv:
        print(configuration.help_text(BenchConfig, __doc__.strip()))
        return 0
    try:
        cfg, _ = configuration.load(BenchConfig, argv)
        return (check if cfg.check else bench_decoding if cfg.decode else bench_steps)(cfg)
    except UserError as e:
        print(f'bench.py: {e}', file=sys.stderr)
        return 2


def bench_steps(cfg):
    """Print a table of step times and ratios, then the same as one line of JSON. -> exit code 0."""
    device = devices.pick_device(cfg.device)
    context = devices.autocast(device, devices.pick_dtype(cfg.dtype, device))
    cfg.vocab_size = cfg.vocab_size or 50304
    generator = torch.Generator().manual_seed(cfg.seed)
    shape = (cfg.batch_size, cfg.block_size)
    x, y = (torch.randint(cfg.vocab_size, shape, generator=generator).to(device) for _ in range(2))
    print(f'{cfg.n_layer} layers, {cfg.n_head} heads, {cfg.n_embd} wide, batch {shape[0]} x {shape[1]}, rank '
          f'{cfg.svd_rank}, {cfg.optimizer}, {device}, {torch.get_num_threads()} threads, {cfg.pairs} pairs')

    def step_of(**changes):
        torch.manual_seed(cfg.seed)
        args = {f.name: getattr(cfg, f.name) for f in fields(GPTConfig)}
        model = GPT(GPTConfig(**args | changes)).to(device)
        return train_step(model, build_optimizer(cfg, model, device), x, y, context, cfg.grad_clip)

    baseline = step_of(use_svd=False)
    others = {}
    if cfg.svd_rank is not None:
        others = {f'{method}, {scope}': step_of(use_svd=True, svd_method=method, svd_scope=scope)
                  for scope in SCOPES for method in METHODS}
    results = {}
    for name, step in others.items():
        results[name] = compare(name, step, baseline, cfg.pairs, device, 'baseline')
    if cfg.peer:
        cfg.optimizer = 'adamw'                                     # the peer has no other
        results['peer'] = compare('this repo without SVD, AdamW', step_of(use_svd=False),
                                  peer_step(cfg, device, x, y, context), cfg.pairs, device, 'peer')
    print(json.dumps({'device': device, 'torch': torch.__version__, 'pairs': cfg.pairs, 'seed': cfg.seed,
                      'results': results}))
    return 0


@torch.no_grad()
def bench_decoding(cfg):
    """Print tokens/s and cache bytes at several context lengths, then the same as one line of JSON. -> exit code 0."""
    device = devices.pick_device(cfg.device)
    cfg.vocab_size = cfg.vocab_size or 50304
    models = decoding_models(cfg, device)
    peer = peer_model(cfg, device).eval() if cfg.peer else None
    print(f'{cfg.n_layer} layers, {cfg.n_head} heads, {cfg.n_embd} wide, batch {cfg.batch_size}, rank {cfg.svd_rank}, '
          f'{device}, {torch.get_num_threads()} threads, {cfg.tokens} tokens ({uncached_tokens(cfg)} where nothing is '
          f'cached), {cfg.pairs} rounds')
    results = []
    for length in cfg.lengths():
        print(f'after {length} tokens:')
        generator = torch.Generator().manual_seed(cfg.seed)
        prompt = torch.randint(cfg.vocab_size, (cfg.batch_size, length), generator=generator).to(device)
        with devices.autocast(device, devices.pick_dtype(cfg.dtype, device)):
            rounds = take_turns(decoding_runs(cfg, models, peer, prompt, device), cfg.pairs)
            for name, times in rounds.items():
                cache = models[name].kv_cache_bytes(cfg.batch_size, length + cfg.tokens - 1) if name in models else None
                results.append({'context': length} | decoding_row(name, times, rounds['no SVD'], cfg.batch_size, cache))
    print(json.dumps({'device': device, 'torch': torch.__version__, 'rounds': cfg.pairs, 'seed': cfg.seed,
                      'batch': cfg.batch_size, 'tokens': cfg.tokens, 'tokens_uncached': uncached_tokens(cfg),
                      'results': results}))
    return 0


def uncached_tokens(cfg):
    return max(1, cfg.tokens // 16)                                 # recomputing the prefix takes its time


def decoding_models(cfg, device):
    """Name -> model: without SVD, and with the same weights every scope at cfg.svd_rank."""
    args = {f.name: getattr(cfg, f.name) for f in fields(GPTConfig)}
    variants = {'no SVD': dict(use_svd=False)}
    if cfg.svd_rank is not None:
        variants |= {f"'{scope}'": dict(use_svd=True, svd_scope=scope) for scope in SCOPES}
    models = {}
    for name, changes in variants.items():
        torch.manual_seed(cfg.seed)
        models[name] = GPT(GPTConfig(**args | changes)).to(device).eval()
    return models


def decoding_runs(cfg, models, peer, prompt, device):
    """Name -> function that continues prompt (B, T) -> seconds for the prefill, seconds a token after it."""
    few = uncached_tokens(cfg)

    def continues(model):
        use_cache = not model.config.svd_sees_future
        n = cfg.tokens - 1 if use_cache else few
        stream = model.stream(prompt, n + 1, temperature=0, use_cache=use_cache)
        return timed(lambda: next(stream), device), timed(lambda: [*stream], device) / n

    def forwards():
        return 0.0, timed(lambda: [models['no SVD'](prompt[:, :1]) for _ in range(cfg.tokens)], device) / cfg.tokens

    runs = {name: lambda model=model: continues(model) for name, model in models.items()}
    runs['bare one-token forward'] = forwards
    if peer:
        runs['peer'] = lambda: (0.0, timed(lambda: peer.generate(prompt, few, top_k=1), device) / few)
    return runs


def decoding_row(name, times, baseline, batch, cache_bytes):
    """Print what rounds of (prefill, a token) seconds come to -> row of the JSON. cache_bytes None: there is none."""
    prefill, a_token = (statistics.median(column) for column in zip(*times))
    low, ratio, high = statistics.quantiles([b[1] / own[1] for own, b in zip(times, baseline)], n=4, method='inclusive')
    words = f'  {name:22} {batch / a_token:10.1f} tokens/s, {ratio:.3g} of no SVD ({low:.3g} to {high:.3g})'
    if cache_bytes is not None:
        words += f', prefill {prefill:.3f} s, cache {cache_bytes / 1e6:.2f} MB'
    print(words, flush=True)
    return {'name': name, 'tokens_per_s': batch / a_token, 'rate_over_no_svd': ratio, 'quartiles': [low, high],
            'prefill_s': prefill, 'cache_bytes': cache_bytes}


def check(cfg):
    """The self-test of check.py, then its rows as one line of JSON. -> exit code."""
    device = devices.pick_device(cfg.device)
    dtype = devices.pick_dtype(cfg.dtype, device)
    rows, code = run(device, dtype, cfg.seed)
    print(json.dumps({**devices.environment(device, dtype), 'seed': cfg.seed, 'checks': rows}))
    return code


def train_step(model, optimizer, x, y, context, grad_clip):
    """-> a function that runs one training step."""
    def step():
        with context:
            _, loss = model(x, y)
        loss.backward()
        if grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        optimizer.step()
        if isinstance(model, GPT):                                  # no peer's
            model.advance_svd_basis()
        optimizer.zero_grad(set_to_none=True)
    return step


def peer_model(cfg, device):
    """The GPT in PEER/model.py, with nanoGPT's constructor."""
    spec = importlib.util.spec_from_file_location('peer_model', Path(cfg.peer) / 'model.py')
    peer = importlib.util.module_from_spec(spec)
    sys.modules['peer_model'] = peer                                # dataclasses look their module up
    spec.loader.exec_module(peer)
    keys = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias')
    return peer.GPT(peer.GPTConfig(**{k: getattr(cfg, k) for k in keys})).to(device)


def peer_step(cfg, device, x, y, context):
    """One step of it, with nanoGPT's configure_optimizers."""
    model = peer_model(cfg, device)
    optimizer = model.configure_optimizers(cfg.weight_decay, cfg.learning_rate, (cfg.beta1, cfg.beta2),
                                           torch.device(device).type)
    return train_step(model, optimizer, x, y, context, cfg.grad_clip)


def timed(f, device):
    """Seconds that f() takes, all its work on the device included."""
    devices.synchronize(device)
    start = time.perf_counter()
    f()
    devices.synchronize(device)
    return time.perf_counter() - start


def take_turns(runs, rounds, warmup=1):
    """Call the functions of a dict in turn, `rounds` times after the warm-up, every other round backwards, so that a
    drifting machine slows all -> name -> list of results."""
    results = {name: [] for name in runs}
    for i in range(warmup + rounds):
        for name in list(runs)[::1 if i % 2 else -1]:
            result = runs[name]()
            if i >= warmup:
                results[name].append(result)
    return results


def compare(name, a, b, pairs, device, b_name):
    """Time a and b in turn -> {'a_ms', 'b_ms': medians, 'ratio': median of a / b a pair, 'ratio_quartiles'}."""
    rounds = take_turns({'a': lambda: timed(a, device), 'b': lambda: timed(b, device)}, pairs, warmup=3)
    low, ratio, high = statistics.quantiles([ta / tb for ta, tb in zip(rounds['a'], rounds['b'])], n=4,
                                            method='inclusive')
    a_ms, b_ms = (1e3 * statistics.median(rounds[side]) for side in 'ab')
    print(f'{name:32} {a_ms:8.1f} ms   {b_name} {b_ms:8.1f} ms   ratio {ratio:.3f} (quartiles {low:.3f} to {high:.3f})')
    return {'a_ms': a_ms, 'b_ms': b_ms, 'ratio': ratio, 'ratio_quartiles': [low, high]}


if __name__ == '__main__':
    sys.exit(main())

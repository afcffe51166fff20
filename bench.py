"""
Time whole training steps, paired: this repo's model without SVD against every SVD method and scope, and against
another checkout's model.py. Or test that what must be equal is equal on this machine.

    python bench.py config/train_svd_test.py                     # the main job's model
    python bench.py config/train_svd_test.py --peer=../nanoGPT   # also against nanoGPT's GPT and its optimizer
    python bench.py --check                                      # the self-test; takes --device, --dtype and --seed
    python bench.py --help

A step is forward, backward, clipping and the optimizer, on random tokens. The two sides of a ratio take turns, in
alternating order, so that a drifting machine slows both. The self-test prints ok, FAIL or skip for each equality, in
under two minutes, and ends with exit code 1 if one failed. The last line is JSON.
"""

import importlib.util
import json
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
    pairs: Annotated[int, 'timed pairs a comparison'] = 30
    peer: Annotated[str | None, 'folder with another model.py (nanoGPT) to time against'] = None

    def __post_init__(self):
        super().__post_init__()
        if self.pairs < 2:
            raise ValueError(f'pairs={self.pairs}: must be at least 2 (nearest: 2)')
        if self.peer and not (Path(self.peer) / 'model.py').is_file():
            raise ValueError(f'peer={self.peer!r}: has no model.py')


def main(argv=None):
    """-> exit code: 0 done, 1 a check failed, 2 wrong input (one line on stderr)."""
    argv = sys.argv[1:] if argv is None else argv
    if '--help' in argv or '-h' in argv:
        print(configuration.help_text(BenchConfig, __doc__.strip()))
        return 0
    try:
        cfg, _ = configuration.load(BenchConfig, argv)
        return check(cfg) if cfg.check else bench(cfg)
    except UserError as e:
        print(f'bench.py: {e}', file=sys.stderr)
        return 2


def bench(cfg):
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
        optimizer.zero_grad(set_to_none=True)
    return step


def peer_step(cfg, device, x, y, context):
    """One step of the GPT in PEER/model.py, with nanoGPT's constructor and configure_optimizers."""
    spec = importlib.util.spec_from_file_location('peer_model', Path(cfg.peer) / 'model.py')
    peer = importlib.util.module_from_spec(spec)
    sys.modules['peer_model'] = peer                                # dataclasses look their module up
    spec.loader.exec_module(peer)
    keys = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias')
    model = peer.GPT(peer.GPTConfig(**{k: getattr(cfg, k) for k in keys})).to(device)
    optimizer = model.configure_optimizers(cfg.weight_decay, cfg.learning_rate, (cfg.beta1, cfg.beta2),
                                           torch.device(device).type)
    return train_step(model, optimizer, x, y, context, cfg.grad_clip)


def compare(name, a, b, pairs, device, b_name):
    """Time a and b in turn -> {'a_ms', 'b_ms': medians, 'ratio': median of a / b a pair, 'ratio_quartiles'}."""
    def seconds(step):
        devices.synchronize(device)
        start = time.perf_counter()
        step()
        devices.synchronize(device)
        return time.perf_counter() - start

    for _ in range(3):
        a(), b()
    times = []
    for i in range(pairs):
        pair = (seconds(a), seconds(b)) if i % 2 else (seconds(b), seconds(a))[::-1]
        times.append(pair)
    low, ratio, high = statistics.quantiles([ta / tb for ta, tb in times], n=4, method='inclusive')
    a_ms, b_ms = (1e3 * statistics.median(column) for column in zip(*times))
    print(f'{name:32} {a_ms:8.1f} ms   {b_name} {b_ms:8.1f} ms   ratio {ratio:.3f} (quartiles {low:.3f} to {high:.3f})')
    return {'a_ms': a_ms, 'b_ms': b_ms, 'ratio': ratio, 'ratio_quartiles': [low, high]}


if __name__ == '__main__':
    sys.exit(main())

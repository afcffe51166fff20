"""
Time two ways to compute multi-head latent attention for m new tokens after T cached tokens.

'expanded' computes keys and values from the latents. 'absorbed' multiplies the up-projections into
queries and outputs, so that heads attend to the latents themselves. Both are timed in paired
rounds, on one layer:

    python experiments/absorb_or_expand.py                      # GPT-2's shape, docs/MLA.md's table
    python experiments/absorb_or_expand.py --n_embd=128 --n_head=4 --latents=16,32,64 --cached=256
"""

import json
import statistics
import sys
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))                                       # run from anywhere

from runtime import cli             # before torch: reports missing packages

import torch
from torch.nn import functional as F

from lowrank.kv_cache import expand
from runtime import config as configuration
from runtime import device as devices
from runtime.config import Range
from tools.timing import print_line, quartiles, time_interleaved


@dataclass
class Config:
    n_embd: Annotated[int, 'embedding size', Range(1)] = 768
    n_head: Annotated[int, 'attention heads', Range(1)] = 12
    latents: Annotated[str, 'sizes of the latent per token'] = '64,128,256,512'
    queries: Annotated[str, 'numbers of new tokens'] = '1,4,16,64,256,1024'
    cached: Annotated[int, 'cached tokens that each new token attends to', Range(1)] = 1024
    batch_size: Annotated[int, 'sequences in the batch', Range(1)] = 1
    rounds: Annotated[int, 'rounds per comparison', Range(2)] = 10
    seed: Annotated[int, 'random seed of inputs and weights', Range(0)] = 1337
    device: Annotated[str, "'auto', 'cpu', 'cuda', 'mps'"] = 'auto'

    def __post_init__(self):
        configuration.validate(self)
        if self.n_embd % self.n_head:
            near = max(1, round(self.n_embd / self.n_head)) * self.n_head
            raise ValueError(f'n_embd={self.n_embd}: not a multiple of n_head={self.n_head} '
                             f'(nearest: {near})')
        for name in ('latents', 'queries'):
            self.numbers(name)

    def numbers(self, name):
        """Return the option `name` as a list of int. Raises ValueError if it is not one."""
        words = getattr(self, name)
        numbers = [int(word) if word.isdecimal() else 0 for word in words.split(',')]
        if not all(numbers):
            raise ValueError(f'{name}={words!r}: must be positive whole numbers, separated by '
                             "commas (nearest: '16,128')")
        return numbers


def main(argv=None):
    """Run the command. Returns the exit code: 0 done, 2 wrong input, 130 or 143 stopped."""
    return cli.run('absorb_or_expand.py', Config, __doc__, measure, argv)


@torch.no_grad()
def measure(cfg):
    """Print times per latent size and number of queries, then the same times as one line of
    JSON."""
    device, nh, hs = devices.pick_device(cfg.device), cfg.n_head, cfg.n_embd // cfg.n_head
    print(f'{nh} heads of {hs}, {cfg.cached} cached tokens, batch {cfg.batch_size}, {device}, '
          f'{torch.get_num_threads()} threads, {cfg.rounds} rounds')
    print_line('', ('expanded ms', 'absorbed ms', 'ratio', 'quartiles', ''))
    rows = []
    for d, m in product(cfg.numbers('latents'), cfg.numbers('queries')):
        torch.manual_seed(cfg.seed)
        q = torch.randn(cfg.batch_size, nh, m, hs, device=device)
        c = torch.randn(cfg.batch_size, cfg.cached, d, device=device)
        w_k, w_v = (torch.randn(nh, hs, d, device=device) / d ** 0.5 for _ in range(2))
        assert torch.allclose(expanded(q, w_k, w_v, c), absorbed(q, w_k, w_v, c), atol=1e-3)
        times = time_interleaved({f.__name__: partial(f, q, w_k, w_v, c)
                                  for f in (expanded, absorbed)}, cfg.rounds, device)
        low, ratio, high = quartiles([a / e for a, e in zip(times['absorbed'], times['expanded'])])
        ms = {name: statistics.median(t) * 1e3 for name, t in times.items()}
        print_line(f'latent {d}, {m} queries', (*ms.values(), ratio, low, high))
        rows.append({'latent': d, 'queries': m, 'ratio': ratio, 'quartiles': [low, high]} | ms)
    print(json.dumps({'device': device, 'torch': torch.__version__, 'rounds': cfg.rounds,
                      'results': rows}))


def expanded(q, w_k, w_v, c):
    """Return attention outputs (B, nh, m, hs). Keys and values are expanded from the latents. q:
    queries (B, nh, m, hs). w_k, w_v: up-projections (nh, hs, d). c: latents (B, T, d)."""
    return F.scaled_dot_product_attention(q, expand(w_k, c), expand(w_v, c))


def absorbed(q, w_k, w_v, c):
    """Return the outputs of `expanded`, computed on the latents without keys and values. The
    arguments are those of `expanded`."""
    q = (q * q.size(-1) ** -0.5 @ w_k).flatten(1, 2)                # (B, nh, m, d) -> (B, nh m, d)
    sums = F.softmax(q @ c.mT, dim=-1) @ c                          # (B, nh m, T) x (B, T, d)
    return sums.unflatten(1, (w_k.size(0), -1)) @ w_v.mT            # (B, nh, m, d) x (nh, d, hs)


if __name__ == '__main__':
    sys.exit(main())

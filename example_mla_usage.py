"""
A tour of multi-head latent attention in this repo, under a minute on a CPU, nothing downloaded:

    python example_mla_usage.py

1 attention kinds side by side: parameters, cache, decoding, loss after a short run; 2 cached and absorbed is the same
as uncached and expanded.
"""

import math
import time
from pathlib import Path

from runtime.cli import unfailing_output                             # before torch: says what is not installed

import torch

from model import GPT, GPTConfig

SMALL = dict(block_size=128, n_layer=2, n_head=4, n_embd=64, bias=False)                        # trained here
WIDE = dict(block_size=1024, n_layer=2, n_head=8, n_embd=512, bias=False)                       # timed, not trained
STEPS = 150                         # of each short training run
KINDS = {
    'ordinary': {},
    'ordinary, SVD on V': dict(use_svd=True, svd_rank=8, svd_scope='causal'),
    'MLA, latent n_embd / 2': dict(use_mla=True, divisor=2),
    'MLA, latent n_embd / 4': dict(use_mla=True),                   # the default
    'MLA, standard SVD on V': dict(use_mla=True, use_svd=True, svd_rank=8, svd_scope='causal', svd_method='standard'),
    'MLA, randomized SVD': dict(use_mla=True, use_svd=True, svd_rank=8, svd_scope='causal', svd_method='randomized'),
}


@unfailing_output()                                                     # | head
def main():
    torch.manual_seed(1337)
    side_by_side()
    two_ways()


def config(shape, options, vocab_size):
    """The configuration of a kind in a shape; divisor: of the width, for the latent."""
    options = dict(options)
    if 'divisor' in options:
        options['mla_latent_dim'] = shape['n_embd'] // options.pop('divisor')
    return GPTConfig(**shape, **options, vocab_size=vocab_size)


def side_by_side():
    train, validation, chars = text()
    print('1. Attention kinds. Parameters, cache and tokens/s: 2 layers, 512 wide, 8 sequences after 992 tokens, timed '
          f'once.\n   Losses of two seeds: 2 layers, 64 wide, {STEPS} steps on this repo\'s own code (chance '
          f'{math.log(chars):.2f})')
    print(f'   {"":24}{"parameters":>11}{"of attention":>14}{"cache":>11}{"tokens/s":>10}{"losses":>14}')
    for name, options in KINDS.items():
        wide = GPT(config(WIDE, options, chars)).eval()
        losses = [short_run(config(SMALL, options, chars), seed, train, validation) for seed in (1337, 1338)]
        print(f'   {name:24}{wide.get_num_params():11,}{wide.attention_params():14,}'
              f'{wide.kv_cache_bytes(8, 1008) / 1e6:8.1f} MB{decoding_rate(wide):10.0f}'
              f'{losses[0]:8.3f}{losses[1]:7.3f}')
    print('   Latents of n_embd / 4 are 8 times smaller than keys and values. The SVD on V makes V itself smaller,\n'
          '   but no latent, which keys need, too: with MLA its bases come on top.\n')


def text():
    """-> token ids of the repo's code, the first nine tenths and the rest, and the number of characters."""
    root = Path(__file__).resolve().parent
    code = ''.join((root / name).read_text(encoding='utf-8') for name in ('model.py', 'train.py', 'lowrank/svd.py'))
    chars = sorted(set(code))
    ids = torch.tensor([chars.index(c) for c in code])
    return ids[:len(ids) * 9 // 10], ids[len(ids) * 9 // 10:], len(chars)


def short_run(configuration, seed, train, validation):
    """-> mean loss on 20 batches of the validation part after STEPS of AdamW."""
    torch.manual_seed(seed)
    model, generator = GPT(configuration), torch.Generator().manual_seed(seed)
    optimizer = model.configure_optimizers(0.01, 2e-3, (0.9, 0.999), 'cpu')

    def batch(ids):
        starts = torch.randint(len(ids) - 129, (8,), generator=generator)
        rows = torch.stack([ids[i:i + 129] for i in starts])        # (8, 129)
        return rows[:, :-1], rows[:, 1:]

    for _ in range(STEPS):
        model(*batch(train))[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        return sum(model(*batch(validation))[1].item() for _ in range(20)) / 20


@torch.no_grad()
def decoding_rate(model, batch=8, prompt=992, tokens=16):
    """-> tokens a second, all sequences together, after a prompt that they share."""
    cache = model.new_cache(batch, prompt + tokens)
    ids = model(torch.zeros(1, prompt, dtype=torch.long), cache=cache)[0].argmax(-1).expand(batch, 1)
    ids = model(ids, cache=cache)[0].argmax(-1)                     # the first makes what only the first makes
    start = time.perf_counter()
    for _ in range(tokens - 1):
        ids = model(ids, cache=cache)[0].argmax(-1)                 # (8, 1)
    return batch * (tokens - 1) / (time.perf_counter() - start)


@torch.no_grad()
def two_ways():
    print('2. Cached, token by token, against uncached: largest difference over the largest logit')
    for name, options in KINDS.items():
        for dtype in (torch.float32, torch.float64):
            model = GPT(config(SMALL, options, 65)).to(dtype).eval()
            idx = torch.randint(65, (2, 128))
            expected, cache = model(idx, idx)[0], model.new_cache(2, 128)                       # (2, 128, 65)
            ours = [model(idx[:, :32], idx[:, :32], cache=cache)[0]]
            ours += [model(idx[:, t:t + 1], cache=cache)[0] for t in range(32, 128)]
            difference = (torch.cat(ours, dim=1) - expected).abs().max() / expected.abs().max()
            print(f'   {name:24} {str(dtype)[6:]} {difference.item():.1e}')


if __name__ == '__main__':
    main()

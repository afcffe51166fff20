"""
A tour of multi-head latent attention (MLA) in this repo. It takes under a minute on a CPU and
downloads nothing:

    python example_mla_usage.py

1. Variants of attention: parameters, cache size, decoding speed and loss after a short run.
2. Decoding with a cache gives the same logits as a forward pass over all tokens.
"""

from pathlib import Path

from runtime.cli import unfailing_output                # before torch: reports missing packages

import torch

from model import GPT, GPTConfig
from tools.timing import generation

# SMALL is trained, WIDE is timed; each byte is a token
SMALL = dict(block_size=128, vocab_size=256, n_layer=2, n_head=4, n_embd=64, bias=False)
WIDE = dict(block_size=1024, vocab_size=256, n_layer=2, n_head=8, n_embd=512, bias=False)
STEPS = 150                                             # of each short training run


def kinds(n_embd):
    """Return variant -> options of GPTConfig. The default latent size is n_embd / 4."""
    svd = dict(use_svd=True, svd_rank=8, svd_scope='causal')
    return {'ordinary': {},
            'ordinary, SVD on V': svd,
            'MLA, latent n_embd / 2': dict(use_mla=True, mla_latent_dim=n_embd // 2),
            'MLA, latent n_embd / 4': dict(use_mla=True),
            'MLA, standard SVD on V': dict(use_mla=True, svd_method='standard', **svd),
            'MLA, randomized SVD': dict(use_mla=True, svd_method='randomized', **svd)}


@unfailing_output()                                     # a closed output is no error
@torch.no_grad()
def main():
    torch.manual_seed(1337)
    text = torch.tensor(list(Path(__file__).with_name('model.py').read_bytes()))
    print('1. Variants of attention. Parameters, cache and tokens/s: 2 layers, width 512, 8\n'
          '   sequences after 992 tokens, timed once. Losses (nats per byte) of two seeds: 2\n'
          f'   layers, width 64, after {STEPS} steps on the text of model.py\n\n   {"":24}'
          f'{"parameters":>11}{"of attention":>14}{"cache":>11}{"tokens/s":>10}{"losses":>14}')
    for name, small in kinds(64).items():
        model = GPT(GPTConfig(**WIDE, **kinds(512)[name])).eval()
        prompt = torch.zeros(1, 992, dtype=torch.long).expand(8, -1)
        _, seconds = generation(model, prompt, 16, 'cpu')       # seconds: prompt, per token
        losses = [short_run(GPTConfig(**SMALL, **small), text, seed) for seed in (1337, 1338)]
        print(f'   {name:24}{model.get_num_params():11,}{model.attention_params():14,}'
              f'{model.kv_cache_bytes(8, 1008) / 1e6:8.1f} MB{8 / seconds:10.0f}'
              f'{losses[0]:8.3f}{losses[1]:7.3f}')
    print('\n   Latents of n_embd / 4 values are 8 times smaller than keys and values. The\n'
          '   SVD makes a cached V smaller. It cannot make latents smaller, because keys are\n'
          '   computed from them, too, so with MLA the cache grows by the bases.\n')

    print('2. Logits computed token by token with a cache, and all at once: largest difference\n'
          '   relative to the largest logit')
    for name, options in kinds(64).items():
        for dtype in (torch.float32, torch.float64):
            model = GPT(GPTConfig(**SMALL, **options)).to(dtype).eval()
            cache, idx = model.new_cache(2, 128), torch.randint(256, (2, 128))
            uncached = model(idx, idx)[0]                                       # (2, 128, 256)
            cached = torch.cat([model(new, cache=cache)[0] for new in idx.split(1, dim=1)], dim=1)
            difference = (cached - uncached).abs().max() / uncached.abs().max()
            print(f'   {name:24} {str(dtype)[6:]} {difference.item():.1e}')


@torch.enable_grad()
def short_run(config, text, seed):
    """Train for STEPS steps on nine tenths of the text and return the mean loss on the rest."""
    torch.manual_seed(seed)
    model, windows = GPT(config), text.unfold(0, 129, 1)                        # (number, 129)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    split = len(windows) * 9 // 10
    for _ in range(STEPS):
        rows = windows[torch.randint(split, (8,))]                              # (8, 129)
        model(rows[:, :-1], rows[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    rows = windows[split + 128::128]
    with torch.no_grad():
        return model.eval()(rows[:, :-1], rows[:, 1:])[1].item()


if __name__ == '__main__':
    main()

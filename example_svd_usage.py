"""
A tour of the truncated SVD in this repo, under a minute on a CPU, nothing downloaded:

    python example_svd_usage.py

1 what rank k keeps of a matrix; 2 a layer of rank k as two smaller ones; 3 why the gradient is our own; 4 which scope
sees the future; 5 a small model trained on this repo's model.py, then run at several ranks.
"""

from pathlib import Path

from runtime.cli import unfailing_output                             # before torch: says what is not installed

import torch
import torch.nn as nn

from lowrank.layers import LowRankLinear
from lowrank.svd import METHODS, energy, low_rank_approximation, rank_for_energy, truncated_svd
from model import GPT, SCOPES, GPTConfig


@unfailing_output()                                                     # | head
def main():
    torch.manual_seed(1337)
    best_approximation()
    two_smaller_layers()
    gradient()
    causality()
    train_and_truncate()


def best_approximation():
    """Eckart-Young: the squared error of the best rank-k approximation is the energy of what is cut."""
    print('1. A 64 x 32 matrix with singular values 1, 1/2, 1/4, ...: rank, energy kept, relative error')
    u, v = (torch.linalg.qr(torch.randn(n, 32, dtype=torch.float64))[0] for n in (64, 32))
    x = u * 0.5 ** torch.arange(32) @ v.mT                          # (64, 32)
    _, s, _ = truncated_svd(x, 32)
    for rank in (1, 2, 4, 8):
        error = torch.linalg.norm(x - low_rank_approximation(x, rank)) / torch.linalg.norm(x)
        kept = energy(s)[rank - 1].item()
        print(f'   {rank:2}   {kept:.6f}   {error:.6f} = sqrt(1 - energy) = {(1 - kept) ** 0.5:.6f}')
    print(f'   99% of the energy needs rank {rank_for_energy(s, 0.99)}')
    x = torch.randn(64, 32)                                         # the hard case: no gap to find the cut by
    errors = {method: torch.linalg.norm(x - low_rank_approximation(x, 8, method)).item() for method in METHODS}
    print('   Gaussian numbers, rank 8, error of ' + ', '.join(f'{name} {e:.4f}' for name, e in errors.items()) + '\n')


def two_smaller_layers():
    """y = W x + b, W (m, n) of rank k, is B (A x) + b with B (m, k) and A (k, n): k (m + n) numbers instead of m n."""
    linear, x = nn.Linear(10, 10), torch.randn(10)
    with torch.no_grad():
        w = linear.weight.copy_(torch.randn(10, 2) @ torch.randn(2, 10))
        _, s, _ = truncated_svd(w, 10)
        rank = int((s > 10 * torch.finfo(w.dtype).eps * s[0]).sum())    # below that there is only rounding
        print(f'2. A layer with W 10 x 10: {rank} of its 10 singular values are not zero')
        layer = LowRankLinear.from_linear(linear, rank)
        dense, factored = linear(x), layer(x)
        product = layer.B.weight @ layer.A.weight                   # (10, k) x (k, 10)
    for name, y in (('y = W x + b', dense), ('y = B (A x) + b', factored)):
        print(f'   {name:16}' + ''.join(f'{value:8.4f}' for value in y[:6].tolist()) + ' ...')
    apart = [(a - b).abs().max().item() for a, b in ((dense, factored), (w, product))]
    print(f'   largest difference {apart[0]:.1e}, of W and B A {apart[1]:.1e}; parameters without b: {w.numel()} -> '
          f'{layer.A.weight.numel() + layer.B.weight.numel()}')
    print('   relative error at rank    ' + ''.join(f'{k:10}' for k in (1, 2, 3, 4)))
    for name, matrix in (('this W', w.detach()), ('Gaussian numbers', torch.randn(10, 10))):
        errors = [torch.linalg.norm(matrix - low_rank_approximation(matrix, k)) / torch.linalg.norm(matrix)
                  for k in (1, 2, 3, 4)]
        print(f'   {name:26}' + ''.join(f'{error.item():10.1e}' for error in errors))
    print()


def gradient():
    """A V whose rank is below its width has several singular values of zero, where autograd through the SVD divides
    by their difference."""
    print('3. Gradient of the rank-2 approximation of a matrix of rank 3, 8 x 6')
    x = (torch.randn(8, 6) * (torch.arange(6) < 3)).requires_grad_()
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    direct, = torch.autograd.grad((u[:, :2] * s[:2] @ vh[:2]).square().sum(), x)
    ours, = torch.autograd.grad(low_rank_approximation(x, 2).square().sum(), x)
    print(f'   autograd through torch.linalg.svd: largest entry {direct.abs().max().item():.3g} '
          f'({int((~direct.isfinite()).sum())} of {direct.numel()} not finite)')
    print(f'   this repo: largest entry {ours.abs().max().item():.3g}; the truth, 2 X_k: '
          f'{2 * low_rank_approximation(x, 2).abs().max().item():.3g}\n')


def causality():
    """Change the last token and see whether the outputs before it move."""
    print('4. Change the last of 128 tokens: largest change of any logit before it')
    idx = torch.randint(65, (1, 128))
    changed = idx.clone()
    changed[0, -1] = (idx[0, -1] + 1) % 65
    for scope in SCOPES:
        torch.manual_seed(0)
        model = GPT(GPTConfig(block_size=128, vocab_size=65, n_layer=2, n_head=4, n_embd=64, use_svd=True, svd_rank=4,
                              svd_scope=scope)).double().eval()
        with torch.no_grad():
            before, after = model(idx, idx)[0], model(changed, idx)[0]
        print(f'   {scope:9} {(before - after)[:, :-1].abs().max().item():.1e}')
    print()


def train_and_truncate():
    """A model trained without SVD, evaluated at several ranks: the same weights, only V changes."""
    text = (Path(__file__).resolve().parent / 'model.py').read_text(encoding='utf-8')
    chars = sorted(set(text))
    data = torch.tensor([chars.index(c) for c in text])
    shape = dict(block_size=64, vocab_size=len(chars), n_layer=2, n_head=4, n_embd=64)
    model = GPT(GPTConfig(**shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    print(f'5. {model.get_num_params():,} parameters trained for 300 steps on the {len(text):,} characters of model.py')

    def batch():
        starts = torch.randint(len(data) - 65, (16,))
        rows = torch.stack([data[i:i + 65] for i in starts])        # (16, 65)
        return rows[:, :-1], rows[:, 1:]

    for _ in range(300):
        _, loss = model(*batch())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    evaluation = [batch() for _ in range(20)]
    print('   loss on 20 batches by scope and rank, of a head size of 16 (seen text: about V, not generalisation)')
    print('   rank      ' + ''.join(f'{rank!s:>8}' for rank in (1, 2, 4, 8, None)))
    for scope in SCOPES:
        losses = []
        for rank in (1, 2, 4, 8, None):
            truncated = GPT(GPTConfig(**shape, use_svd=True, svd_rank=rank, svd_scope=scope, svd_block=8)).eval()
            truncated.load_state_dict(model.state_dict())           # SVD adds no parameters
            with torch.no_grad():
                losses.append(sum(truncated(x, y)[1].item() for x, y in evaluation) / len(evaluation))
        print(f'   {scope:9} ' + ''.join(f'{loss:8.3f}' for loss in losses))


if __name__ == '__main__':
    main()

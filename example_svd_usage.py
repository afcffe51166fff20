"""
A tour of the truncated SVD in this repo. It takes under a minute on a CPU and downloads nothing:

    python example_svd_usage.py

1. How much of a matrix rank k keeps.
2. A linear layer of rank k is two smaller layers.
3. Why this repo computes the gradient of the truncation itself.
4. Which scope sees later tokens.
5. A small model, trained without SVD, evaluated at several ranks.
"""

from pathlib import Path

from runtime.cli import unfailing_output                # before torch: reports missing packages

import torch

from lowrank.layers import LowRankLinear
from lowrank.svd import METHODS, energy, low_rank_approximation, rank_for_energy, truncated_svd
from model import GPT, SCOPES, GPTConfig

# each byte is a token
SHAPE = dict(block_size=64, vocab_size=256, n_layer=2, n_head=4, n_embd=64)


@unfailing_output()                                     # a closed output is no error
def main():
    torch.manual_seed(1337)

    # Eckart and Young: the squared error of the best rank-k approximation is the energy it drops
    print('1. A 64 x 32 matrix with singular values 1, 1/2, 1/4, ...: rank, energy kept, error')
    u, v = (torch.linalg.qr(torch.randn(n, 32, dtype=torch.float64))[0] for n in (64, 32))
    x = u * 0.5 ** torch.arange(32) @ v.mT                                      # (64, 32)
    _, s, _ = truncated_svd(x, 32)
    for rank in (1, 2, 4, 8):
        kept = energy(s)[rank - 1].item()
        print(f'   {rank:2}   {kept:.6f}   {relative_error(x, rank):.6f} = sqrt(1 - energy) = '
              f'{(1 - kept) ** 0.5:.6f}')
    print(f'   99% of the energy needs rank {rank_for_energy(s, 0.99)}.')
    x = torch.randn(64, 32)                             # hard: small gaps between singular values
    print('   Error at rank 8 of a Gaussian matrix: ' + ', '.join(
        f'{method} {relative_error(x, 8, method):.4f}' for method in METHODS))

    # with W (m, n) of rank k, y = W x + b is B (A x) + b with B (m, k) and A (k, n), which have
    # k (m + n) parameters instead of m n
    linear, x = torch.nn.Linear(10, 10), torch.randn(10)
    linear.weight.data = torch.randn(10, 2) @ torch.randn(2, 10)
    print('\n2. y = W x + b with W 10 x 10 of rank 2, as y = B (A x) + b')
    for rank in (1, 2, 3):
        layer = LowRankLinear.from_linear(linear, rank)
        difference = (linear(x) - layer(x)).abs().max().item()
        print(f'   rank {rank}: {layer.A.weight.numel() + layer.B.weight.numel()} parameters '
              f'instead of {linear.weight.numel()}, largest difference of y {difference:.1e}')

    # if the rank of V is below its width, several singular values are zero, and autograd through
    # the SVD divides by their differences
    print('\n3. Gradient of the rank-2 approximation of an 8 x 6 matrix of rank 3: largest entry')
    x = (torch.randn(8, 6) * (torch.arange(6) < 3)).requires_grad_()
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    approximations = {'autograd through torch.linalg.svd': u[:, :2] * s[:2] @ vh[:2],
                      'this repo': low_rank_approximation(x, 2)}
    for name, x_k in approximations.items():
        grad, = torch.autograd.grad(x_k.square().sum(), x)
        print(f'   {name:34} {grad.abs().max().item():.3g}')
    print(f'   {"exact gradient, 2 X_k":34} {2 * x_k.abs().max().item():.3g}')

    print('\n4. The last of 64 tokens changes: largest change of a logit at an earlier position')
    idx = torch.randint(256, (1, 64))
    changed = torch.cat((idx[:, :-1], (idx[:, -1:] + 1) % 256), dim=1)
    for scope in SCOPES:
        model = GPT(GPTConfig(**SHAPE, use_svd=True, svd_rank=4, svd_scope=scope)).double().eval()
        difference = model(idx, idx)[0] - model(changed, idx)[0]                # (1, 64, 256)
        print(f'   {scope:9} {difference[:, :-1].abs().max().item():.1e}')

    # all evaluations use the same weights; only V differs
    text = torch.tensor(list(Path(__file__).with_name('model.py').read_bytes()))
    windows = text.unfold(0, 65, 1)                                             # (number, 65)
    model = GPT(GPTConfig(**SHAPE))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        rows = windows[torch.randint(len(windows), (16,))]                      # (16, 65)
        model(rows[:, :-1], rows[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f'\n5. A model of {model.get_num_params():,} parameters after 300 steps on the '
          f'{len(text):,} bytes of model.py:\n   loss (nats per byte) on a part of this text, by '
          'scope and rank; heads have size 16')
    ranks, rows = (1, 2, 4, 8, None), windows[::128]
    print('   rank      ' + ''.join(f'{rank!s:>8}' for rank in ranks))
    for scope in SCOPES:
        losses = [truncated_loss(model, scope, rank, rows) for rank in ranks]
        print(f'   {scope:9} ' + ''.join(f'{loss:8.3f}' for loss in losses))


def relative_error(x, rank, method='gram'):
    error = torch.linalg.norm(x - low_rank_approximation(x, rank, method)) / torch.linalg.norm(x)
    return error.item()


def truncated_loss(model, scope, rank, rows):
    svd = dict(use_svd=True, svd_rank=rank, svd_scope=scope, svd_block=8)
    truncated = GPT(GPTConfig(**SHAPE, **svd)).eval()
    truncated.load_state_dict(model.state_dict())       # the SVD adds no parameters
    return truncated(rows[:, :-1], rows[:, 1:])[1].item()


if __name__ == '__main__':
    main()

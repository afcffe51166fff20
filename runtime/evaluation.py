"""Losses in nats per token. Evaluations draw their windows from a separate generator, so that they
do not change the training batches."""

import math

import torch
from torch.nn import functional as F

# number of tokens whose prefix-only loss is measured: during training, and at the end
GAP_POSITIONS, FINAL_GAP_POSITIONS = 128, 1024
SERIES_WINDOWS = 4                  # windows for the model's own metrics


@torch.no_grad()
def estimate_loss(model, data, batches, batch_size, block_size, device, context, seed,
                  poll=lambda: None):
    """Return the mean loss over `batches` random batches of each split, in nats per token.

    The result is {'train': loss, 'val': loss}. `seed` fixes the windows, so that all calls measure
    the same tokens. `context` is the context manager for forward passes. poll() is called before
    each batch and may raise.
    """
    model.eval()
    losses = {}
    for split in ('train', 'val'):
        generator = torch.Generator().manual_seed(seed)
        total = 0.0
        for _ in range(batches):
            poll()
            x, y = data.batch(split, batch_size, block_size, generator, device)
            with context:
                total += model(x, y)[1].item()
        losses[split] = total / batches
    model.train()
    return losses


@torch.no_grad()
def split_loss(model, data, split, batch_size, block_size, device, context):
    """Return the mean loss over a whole split, in nats per token, and the number of predicted
    tokens. All tokens but the first are predicted. The split is cut into consecutive windows of
    block_size tokens. The last window may be shorter."""
    model.eval()
    tokens = data.tokens(split)
    predicted = len(tokens) - 1
    whole = predicted // block_size
    batches = [(range(i, min(i + batch_size, whole)), block_size)
               for i in range(0, whole, batch_size)]
    if predicted % block_size:
        batches.append(([whole], predicted % block_size))
    total = 0.0
    for windows, length in batches:
        x, y = data.windows(tokens, [i * block_size for i in windows], length, split, device)
        with context:
            total += model(x, y)[1].item() * y.numel()
    model.train()
    return total / predicted, predicted


@torch.no_grad()
def prefix_gap(model, data, split, positions, block_size, device, context, seed, group=8,
               poll=lambda: None):
    """Compare the parallel loss with the prefix-only loss at the same tokens, in nats per token.

    The parallel loss is computed over whole windows, as in training. The prefix-only loss predicts
    each token from its prefix alone, as in generation. The two losses differ if the model sees
    later tokens.

    At least `positions` random tokens are measured, each in its own window at a uniformly drawn
    position. `group` windows share a position so that they run as one batch. Groups are
    independent, so the standard error is computed from their means. poll() is called before each
    group and may raise.

    Returns a dict: the mean losses 'parallel' and 'prefix', 'gap' = prefix - parallel, its standard
    error 'gap_se', and the number of tokens 'positions'.
    """
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    parallel, prefix = [], []
    for _ in range(math.ceil(positions / group)):
        poll()
        x, y = data.batch(split, group, block_size, generator, device)  # (group, T) each
        t = torch.randint(block_size, (1,), generator=generator).item()
        with context:
            seen_all = model(x, y)[0][:, t]  # (group, vocab)
            seen_prefix = model(x[:, :t + 1])[0][:, -1]  # (group, vocab)
        parallel.append(F.cross_entropy(seen_all.float(), y[:, t]).item())
        prefix.append(F.cross_entropy(seen_prefix.float(), y[:, t]).item())
    model.train()
    parallel, prefix = (torch.tensor(parallel, dtype=torch.float64),
                        torch.tensor(prefix, dtype=torch.float64))
    gap = prefix - parallel
    return {
        'parallel': parallel.mean().item(), 'prefix': prefix.mean().item(),
        'gap': gap.mean().item(), 'gap_se': gap.std().item() / math.sqrt(len(gap)),
        'positions': len(gap) * group}


class Evaluation:
    """Losses of the current model, with the prefix-only loss if the model sees later tokens.

    The prefix-only loss of a few hundred tokens is noisy. The gap, the difference between this loss
    and the parallel loss of the same tokens, is not. The reported prefix-only loss is therefore the
    parallel loss of all evaluated tokens plus the gap.
    """

    def __init__(self, cfg, model, data, device, context, sees_future):
        self.cfg, self.model, self.data = cfg, model, data
        self.device, self.context, self.sees_future = device, context, sees_future

    def interim(self, poll=lambda: None):
        """Return a row for metrics.jsonl, measured on eval_iters random batches per split. poll()
        is called before each batch and may raise."""
        c = self.cfg
        losses = estimate_loss(self.model, self.data, c.eval_iters, c.batch_size, c.block_size,
                               self.device, self.context, c.seed, poll)
        row = self._with_gap({'train/loss': losses['train'], 'val/loss': losses['val']},
                             GAP_POSITIONS, poll)
        windows = self.data.batch('val', min(c.batch_size, SERIES_WINDOWS), c.block_size,
                                  torch.Generator().manual_seed(c.seed), self.device)[0]
        self.model.eval()
        with self.context:
            row |= self.model.named_series(windows)
        self.model.train()
        return row

    def final(self):
        """Return a row for metrics.jsonl, measured on the whole validation split."""
        c = self.cfg
        batch_size = max(c.batch_size, 4096 // c.block_size)
        loss, tokens = split_loss(self.model, self.data, 'val', batch_size, c.block_size,
                                  self.device, self.context)
        return self._with_gap({'final': True, 'val/loss': loss, 'val/tokens': tokens},
                              FINAL_GAP_POSITIONS)

    def _with_gap(self, row, positions, poll=lambda: None):
        if self.sees_future:
            gap = prefix_gap(self.model, self.data, 'val', positions, self.cfg.block_size,
                             self.device, self.context, self.cfg.seed, poll=poll)
            row |= {
                'val/prefix_loss': row['val/loss'] + gap['gap'], 'val/prefix_gap': gap['gap'],
                'val/prefix_gap_se': gap['gap_se'], 'val/prefix_positions': gap['positions'],
                'val/parallel_loss_at_positions': gap['parallel'],
                'val/prefix_loss_at_positions': gap['prefix']}
        return row

    def describe(self, row):
        """Return the losses in a row as text."""
        words = f'train loss {row["train/loss"]:.4f}, ' if 'train/loss' in row else ''
        if 'val/prefix_loss' not in row:
            return words + f'val loss {row["val/loss"]:.4f}'
        gap, se = row['val/prefix_gap'], row['val/prefix_gap_se']
        words += (
            f'val loss {row["val/loss"]:.4f} parallel, {row["val/prefix_loss"]:.4f} prefix-only '
            f'(gap {gap:+.4f} +- {se:.4f})')
        if abs(gap) > 2 * se:
            words += ('\nwarning: the two losses differ by more than two standard errors: trust '
                      'the prefix-only one')
        return words

    def describe_final(self, row):
        """Return the losses in a row of `final` as text."""
        losses, *warning = self.describe(row).split('\n')
        if 'val/prefix_positions' in row:
            losses += f', gap measured on {row["val/prefix_positions"]:,} tokens'
        final = f'final, all {row["val/tokens"]:,} validation tokens: {losses}'
        return '\n'.join([final, *warning])

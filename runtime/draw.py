"""The next token from a model's logits."""

import torch
from torch.nn import functional as F


def check_draw(temperature, top_k, top_p):
    """Raise ValueError, its message starting with the option's name, for what `draw` cannot take."""
    if not 0 <= temperature < float('inf'):
        raise ValueError(f'temperature={temperature}: must be at least 0, which takes the likeliest (nearest: 0)')
    if top_k is not None and top_k < 1:
        raise ValueError(f'top_k={top_k}: must be at least 1, or None for all (nearest: 1)')
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f'top_p={top_p}: must be above 0 and at most 1 (nearest: {1.0 if top_p > 1 else 0.01})')


def draw(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Token ids (B, 1) drawn from softmax(logits / temperature), logits (B, vocab); temperature 0: the likeliest.
    Only the top_k likeliest can come, and of these only as many as are needed for a probability of top_p together
    (nucleus sampling, arXiv:1904.09751). Raises FloatingPointError where logits are not finite."""
    if not _finite(logits):
        raise FloatingPointError('the logits of the next token are not finite')
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    limits = torch.finfo(logits.dtype)
    if top_k is not None:
        kept, _ = torch.topk(logits, min(top_k, logits.size(-1)))   # (B, top_k)
        logits = logits.masked_fill(logits < kept[:, [-1]], -float('inf'))
    # the largest becomes 0, so that no temperature takes it out of range; -inf / inf would be NaN
    logits = (logits - logits.amax(-1, keepdim=True)) / min(max(temperature, limits.tiny), limits.max)
    p = F.softmax(logits, dim=-1)                                   # (B, vocab)
    if top_p is not None and top_p < 1:
        ranked, order = p.sort(dim=-1, descending=True)
        # those before it have top_p already; a top_p that rounds to 0 would leave nothing
        unneeded = ranked.cumsum(-1) - ranked >= max(top_p, limits.tiny)
        p = p.masked_fill(torch.empty_like(unneeded).scatter_(-1, order, unneeded), 0)
    return torch.multinomial(p, num_samples=1, generator=generator)


def _finite(x):
    return bool(x.isfinite().all())                                 # waits for a device; multinomial would crash it

"""Text generation: drawing the next token from logits, and generating one token at a time."""

import math

import torch
from torch.nn import functional as F

from runtime.data import Tokenizer


def validate_sampling(temperature, top_k, top_p):
    """Check the options of `sample_token`. For an invalid option, raises ValueError with a message
    that starts with the name of the option."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f'temperature={temperature}: must be at least 0, where 0 takes the '
                         'most likely token (nearest: 0)')
    if top_k is not None and top_k < 1:
        raise ValueError(f'top_k={top_k}: must be at least 1, or None for all tokens (nearest: 1)')
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f'top_p={top_p}: must be above 0 and at most 1 '
                         f'(nearest: {1.0 if top_p > 1 else 0.01})')


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw token ids (B, 1) from softmax(logits / temperature), with logits (B, vocab).

    Temperature 0 takes the most likely token. Only the top_k most likely tokens can be drawn. Of
    these, only the fewest whose probabilities sum to top_p can be drawn (nucleus sampling,
    arXiv:1904.09751). Raises FloatingPointError if a logit is NaN or infinite.
    """
    if not logits.isfinite().all():  # waits for the device, but multinomial would crash
        raise FloatingPointError('the logits of the next token are not finite')
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    limits = torch.finfo(logits.dtype)
    if top_k is not None:
        kept, _ = torch.topk(logits, min(top_k, logits.size(-1)))               # (B, top_k)
        logits = logits.masked_fill(logits < kept[:, [-1]], -math.inf)
    # with a maximum of 0 no temperature causes an overflow; the bounds prevent -inf / inf = NaN
    logits = logits - logits.amax(-1, keepdim=True)
    p = F.softmax(logits / min(max(temperature, limits.tiny), limits.max), dim=-1)  # (B, vocab)
    if top_p is not None and top_p < 1:
        ranked, order = p.sort(dim=-1, descending=True)
        # more likely tokens sum to top_p already; limits.tiny keeps one if top_p rounds to 0
        unneeded = ranked.cumsum(-1) - ranked >= max(top_p, limits.tiny)
        p = p.masked_fill(torch.empty_like(unneeded).scatter_(-1, order, unneeded), 0)
    return torch.multinomial(p, num_samples=1, generator=generator)


@torch.no_grad()
def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=None,
           use_cache=True):
    """Generate the tokens that follow idx (B, T) and yield each, (B, 1), as soon as it is drawn.

    model(idx, cache=None) returns logits (B, ..., vocab) and the loss. model.new_cache(B, tokens)
    returns a cache. `sample_token` draws the tokens. The context is the last block_size tokens.
    With use_cache, the cache is used until the context is full. From then on each token shifts the
    window, so the learned position of every token changes and cached values are invalid. The whole
    window is then computed for each token, as in nanoGPT.

    A prompt that `Tensor.expand` repeats in B rows is computed once. `seed` seeds a separate
    generator. None uses torch's global generator. Raises ValueError for invalid options, when the
    first token is requested. Raises FloatingPointError if a logit is NaN or infinite.
    """
    validate_sampling(temperature, top_k, top_p)
    if max_new_tokens < 0:
        raise ValueError(f'max_new_tokens={max_new_tokens}: must be at least 0 (nearest: 0)')
    (B, T), block_size, cache = idx.shape, model.config.block_size, None
    generator = None if seed is None else torch.Generator(idx.device).manual_seed(seed)
    one_prompt = B > 1 and idx.stride(0) == 0 and not model.training  # dropout masks differ per row
    if use_cache and max_new_tokens > 1 and T <= block_size:
        cache = model.new_cache(B, min(T + max_new_tokens - 1, block_size))  # not the last token
    ids = torch.cat((idx, idx.new_empty(B, max_new_tokens)), dim=1)
    for n in range(T, T + max_new_tokens):                                      # n tokens so far
        window = ids[:1 if one_prompt and n == T else B, max(0, n - block_size):n]
        cache = cache if n <= block_size else None  # a longer text shifts all positions
        new = window[:, cache[0].length:] if cache else window
        logits = model(new, cache=cache)[0][:, -1].expand(B, -1)                # (B, vocab)
        ids[:, n:n + 1] = token = sample_token(logits, temperature, top_k, top_p, generator)
        yield token


def sample(model, data, device, context):
    """Return a short sample text. `data` has the tokenizer. `context` is a context manager for the
    forward passes, such as `autocast`."""
    tokenizer = Tokenizer(data.meta)
    newline = data.meta['tokenizer'] == 'gpt2' or '\n' in tokenizer.chars
    start = torch.tensor([tokenizer.encode('\n' if newline else tokenizer.chars[0])], device=device)
    model.eval()
    with context:
        ids = model.generate(start, 200, temperature=0.8, top_k=200,
                             use_cache=not model.config.is_noncausal)
    return tokenizer.decode(ids[0].tolist())

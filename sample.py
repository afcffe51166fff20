"""
Generate text from a trained model:

    python sample.py                                             # the newest run below this folder
    python sample.py --out_dir=out-svd-test --start="ROMEO:" --num_samples=3
    python sample.py --use_svd=True --svd_rank=8                 # switch SVD on for a model trained without it
    python sample.py --init_from=gpt2-xl --start="What is the answer?"       # or a folder: a run's, or Hugging Face's
    python sample.py --help                                      # every option with default and meaning
"""

import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from runtime import cli                                            # before torch: says what is not installed

import torch

from model import GPT, METHODS, SCOPES
from runtime import checkpoint as ckpt
from runtime import config as configuration
from runtime import device as devices
from runtime import huggingface
from runtime.config import PATH, Range, UserError
from runtime.data import GPT2_META, Tokenizer
from runtime.generation import validate_sampling


END = '\n---------------\n'


@dataclass
class SampleConfig:
    """nanoGPT's options and defaults; the model's own SVD options come from the checkpoint unless given here."""
    init_from: Annotated[str, "'resume' (a run's checkpoint), GPT-2 weights ('gpt2', 'gpt2-medium', 'gpt2-large', "
                         "'gpt2-xl') or a folder: a run's, or in Hugging Face's GPT-2 format", PATH] = 'resume'
    out_dir: Annotated[str | None, 'folder of the run; None: the newest one below this folder', PATH] = None
    lora_adapter: Annotated[str | None, 'folder of adapters on these weights, from export.py --to=lora', PATH] = None
    start: Annotated[str, 'prompt, or FILE:prompt.txt'] = '\n'
    num_samples: Annotated[int, 'samples to draw, as one batch', Range(1)] = 10
    max_new_tokens: Annotated[int, 'tokens to add to the prompt', Range(1)] = 500
    temperature: Annotated[float, 'below 1 less random, above 1 more; 0: always the likeliest token'] = 0.8
    top_k: Annotated[int | None, 'draw from the top_k likeliest tokens; None: from all'] = 200
    top_p: Annotated[float | None, 'of these, from the fewest that have this probability together; None: all'] = None
    seed: Annotated[int, 'of the draws', Range(0, below=2 ** 63)] = 1337
    device: Annotated[str, "'auto' (cuda, then mps, then cpu), 'cpu', 'cuda', 'cuda:1', 'mps'"] = 'auto'
    dtype: Annotated[Literal['auto', 'float32', 'bfloat16', 'float16'], 'autocast type'] = 'auto'
    compile: Annotated[bool, 'torch.compile the model first'] = False
    use_svd: Annotated[bool | None, 'SVD on V on or off; this and the next four, None: as trained'] = None
    svd_rank: Annotated[int | None, 'rank kept'] = None
    svd_method: Annotated[Literal[METHODS] | None, 'how'] = None
    svd_scope: Annotated[Literal[SCOPES] | None, 'which matrix'] = None
    svd_block: Annotated[int | None, "'causal' scope: rows before the first basis"] = None

    def __post_init__(self):
        huggingface.check_name(self.init_from, ('resume',))
        configuration.validate(self)
        validate_sampling(self.temperature, self.top_k, self.top_p)


def main(argv=None):
    """-> exit code: 0 done, 2 wrong input (one line on stderr), 130 / 143 stopped."""
    return cli.run('sample.py', SampleConfig, __doc__, show, argv, partial(configuration.load, SampleConfig))


def show(loaded):
    """Print the samples, as long as somebody reads. loaded: configuration, and the keys that the user set."""
    for piece in samples(*loaded):
        print(piece, end='', flush=True)
        if getattr(sys.stdout, 'silent', False):                        # | head
            break


def samples(cfg, set_by):
    """Yield num_samples texts, prompt included, each followed by a line of dashes: the first token by token, while it
    and the others are made as one batch, the others whole."""
    device = devices.pick_device(cfg.device)
    torch.manual_seed(cfg.seed)
    model, meta = load_model(cfg, {k: getattr(cfg, k) for k in set_by
                                   if k == 'svd_rank' or 'svd' in k and getattr(cfg, k) is not None})
    model.to(device).eval()
    cached = not model.config.is_noncausal                       # load_model has said so
    if cfg.compile:
        if not cached:                                              # inductor fails as the length crosses the rank
            raise UserError("compile=True: not with svd_scope='sequence': its prefix grows (nearest: --compile=False)")
        model.compile(dynamic=True)                                 # the context grows by a token a step
    if meta['vocab_size'] > model.config.vocab_size:                # a nanoGPT checkpoint away from its data folder
        raise UserError(f'the model has {model.config.vocab_size} token ids and no tokenizer for them was found; put '
                        'the meta.pkl of its data set into data/DATASET')
    tokenizer = Tokenizer(meta)
    start = prompt_text(cfg.start)
    ids = tokenizer.encode(start)
    if not ids:
        raise UserError('start: a prompt needs at least one character (nearest: leave it out for a line break)')
    context = devices.autocast(device, devices.pick_dtype(cfg.dtype, device))
    prompt = torch.tensor(ids, device=device).expand(cfg.num_samples, -1)                       # (num_samples, T)
    columns = []                                                    # of token ids, num_samples each

    def first_sample():
        with context:
            for new in model.stream(prompt, cfg.max_new_tokens, cfg.temperature, cfg.top_k, cached, cfg.top_p):
                columns.append(new[:, 0].tolist())
                yield columns[-1][0]

    try:
        for i, piece in enumerate(tokenizer.decode_stream(first_sample())):
            yield piece if i else start + piece
    except (FloatingPointError, torch.linalg.LinAlgError) as e:
        raise UserError(f'the next token has no probabilities ({configuration.one_line(e)[:100]}): the weights take '
                        'the numbers out of range') from None
    yield END
    for row in list(zip(*columns))[1:]:
        yield start + tokenizer.decode(row) + END


def prompt_text(start):
    """The option, or the file that it names."""
    if not start.startswith('FILE:'):
        return start
    try:
        return Path(os.path.expanduser(start[5:])).read_text(encoding='utf-8-sig')
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f'start={start}: not a readable UTF-8 text file ({type(e).__name__})') from None


def load_model(cfg, svd):
    """The model, its SVD options replaced by those given in `svd`, and the tokenizer's meta; says which model it is."""
    path = saved = None
    try:
        if cfg.init_from == 'resume':
            path = ckpt.find(cfg.out_dir)
            saved = ckpt.load(path)
            model = GPT.from_checkpoint(saved, **svd)
            meta = ckpt.tokenizer_of(saved, model.config.vocab_size)
            best = float(saved.get('best_val_loss', float('nan')))
            words = f'{path}: {saved["iter_num"]} steps, validation loss {best:.4f}'
        else:
            model, meta = GPT.from_pretrained(cfg.init_from, svd), huggingface.read_tokenizer(cfg.init_from)
            ids = (meta or GPT2_META)['vocab_size']                 # without one it is taken for OpenAI's
            if ids > model.config.vocab_size:
                raise UserError(f'init_from={cfg.init_from!r}: ' + ('has no tokenizer.json' if meta is None else (
                    f'its tokenizer has {ids} token ids, its model {model.config.vocab_size}')))
            meta, words = meta or GPT2_META, cfg.init_from
        if cfg.lora_adapter is not None:
            huggingface.load_adapter(model, cfg.lora_adapter, str(path.parent) if path else cfg.init_from)
            words += f', with {cfg.lora_adapter}'
    except ValueError as e:
        raise e if isinstance(e, UserError) else UserError(f'{path}: {e}' if saved else str(e)) from None
    c = model.config
    print(f'{words}; SVD on V {c.svd_summary}' + (' (switched here)' if svd else '')
          + (': each token changes V of all earlier ones, so nothing is cached' if c.is_noncausal else ''))
    return model, meta


if __name__ == '__main__':
    sys.exit(main())

"""
Generate text from a trained model:

    python sample.py                                        # the newest run below this folder
    python sample.py --out_dir=out-svd-test --start="ROMEO:" --num_samples=3
    python sample.py --use_svd=True --svd_rank=8            # SVD on, for a model trained without it
    python sample.py --init_from=gpt2-xl --start="What is the answer?"      # or from a folder
    python sample.py --help                                 # every option with default and meaning
"""

import itertools
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from runtime import cli                                 # before torch: says what is not installed

import torch

from model import GPT, METHODS, SCOPES
from runtime import checkpoint as ckpt
from runtime import device as devices
from runtime import huggingface
from runtime.config import PATH, Range, Section, UserError, load, one_line, validate
from runtime.data import GPT2_META, Tokenizer
from runtime.generation import validate_sampling

END = '\n---------------\n'


@dataclass
class SampleConfig:
    """nanoGPT's options and defaults, and those of the model that may change after training."""
    init_from: Annotated[str, "'resume' (a run's checkpoint), 'gpt2', 'gpt2-medium', 'gpt2-large', "
                         "'gpt2-xl', or a folder (a run, or Hugging Face's)", PATH,
                         Section('model')] = 'resume'
    out_dir: Annotated[str | None, 'folder of the run; None: the newest one below this folder',
                       PATH] = None
    lora_adapter: Annotated[str | None, 'folder of adapters on these weights (export.py --to=lora)',
                            PATH] = None
    start: Annotated[str, 'prompt, or FILE:prompt.txt', Section('text')] = '\n'
    num_samples: Annotated[int, 'samples to draw, as one batch', Range(1, below=2 ** 31)] = 10
    max_new_tokens: Annotated[int, 'tokens to add to the prompt', Range(1)] = 500
    temperature: Annotated[float, 'below 1 less random, above 1 more; 0: the likeliest token'] = 0.8
    top_k: Annotated[int | None, 'draw from the top_k likeliest tokens; None: from all'] = 200
    top_p: Annotated[float | None, 'of these, draw from the fewest with this probability in total; '
                     'None: from all'] = None
    seed: Annotated[int, 'of the draws', Range(0, below=2 ** 63)] = 1337
    device: Annotated[str, "'cpu', 'cuda', 'cuda:1', 'mps'; 'auto': cuda, else mps or cpu",
                      Section('system')] = 'auto'
    dtype: Annotated[Literal['auto', 'float32', 'bfloat16', 'float16'],
                     "autocast to 'float32', 'bfloat16' or 'float16'; 'auto': bfloat16 on CUDA "
                     '(float16 if it lacks that), else float32'] = 'auto'
    compile: Annotated[bool, 'torch.compile the model first'] = False
    use_svd: Annotated[bool | None, 'SVD on V on or off; None: as trained',
                       Section('SVD on V')] = None
    svd_rank: Annotated[int | None, 'rank kept per head; not given: as trained; None: all'] = None
    svd_method: Annotated[Literal[METHODS] | None, 'how; None: as trained'] = None
    svd_scope: Annotated[Literal[SCOPES] | None, 'of which matrix; None: as trained'] = None
    svd_block: Annotated[int | None, "'causal': first rows that stay whole; None: as trained"
                         ] = None

    def __post_init__(self):
        huggingface.check_name(self.init_from, ('resume',))
        validate(self)
        validate_sampling(self.temperature, self.top_k, self.top_p)


def main(argv=None):
    """-> exit code: 0 done, 2 wrong input (one line on stderr), 130 / 143 stopped."""
    return cli.run('sample.py', SampleConfig, __doc__, sample, argv,
                   lambda argv: load(SampleConfig, argv))


def sample(loaded):
    """Print num_samples texts, each the prompt, what follows it and a line of dashes: the first
    text token by token, while the batch of all is drawn, then the others.

    loaded: configuration, and the keys that the user set.
    """
    cfg, set_by = loaded
    device = devices.pick_device(cfg.device)
    torch.manual_seed(cfg.seed)
    model, tokenizer = load_model(cfg, set_by)
    model.to(device).eval()
    cached = not model.config.is_noncausal              # load_model has said so
    if cfg.compile:
        if not cached:                                  # inductor fails as T crosses the rank
            raise UserError("compile=True: not with svd_scope='sequence': its prefix grows "
                            '(nearest: --compile=False)')
        model.compile(dynamic=True)                     # the context grows by a token per step
    start = prompt_text(cfg.start)
    prompt = torch.tensor(tokenizer.encode(start), device=device).expand(cfg.num_samples, -1)
    stream = model.stream(prompt, cfg.max_new_tokens, cfg.temperature, cfg.top_k, cached, cfg.top_p)
    shown, drawn = itertools.tee(stream)                # of token ids (num_samples, 1)
    print(start, end='')
    try:
        with devices.autocast(device, devices.pick_dtype(cfg.dtype, device)):
            for piece in tokenizer.decode_stream(tokens[0].item() for tokens in shown):
                print(piece, end='', flush=True)
                if getattr(sys.stdout, 'silent', False):            # nobody reads on: | head
                    return
    except (FloatingPointError, torch.linalg.LinAlgError) as e:
        raise UserError(f'the next token has no probabilities ({one_line(e)[:100]}): the weights '
                        'take the numbers out of range') from None
    print(end=END)
    for row in torch.cat(list(drawn), dim=1)[1:].tolist():
        print(start + tokenizer.decode(row), end=END)


def prompt_text(start: str) -> str:
    """The option, or the text of the file that it names."""
    if start.startswith('FILE:'):
        try:
            start = Path(os.path.expanduser(start[5:])).read_text(encoding='utf-8-sig')
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f'start={start}: not a readable UTF-8 text file ({type(e).__name__})'
                            ) from None
    if not start:
        raise UserError('start: a prompt needs at least one character (nearest: leave it out for '
                        'a line break)')
    return start


def load_model(cfg, set_by) -> tuple[GPT, Tokenizer]:
    """The model, its SVD options replaced by those that the user set, and its tokenizer. Prints
    which model it is."""
    # for the rank None is a value, elsewhere it means: as trained
    svd = {key: getattr(cfg, key) for key in set_by
           if key == 'svd_rank' or 'svd' in key and getattr(cfg, key) is not None}
    source, where = cfg.init_from, f'init_from={cfg.init_from!r}'
    try:
        if source == 'resume':
            where = ckpt.find(cfg.out_dir)
            source, saved = str(where.parent), ckpt.load(where)
            model = GPT.from_checkpoint(saved, **svd)
            meta = ckpt.tokenizer_of(saved, model.config.vocab_size)
            about = (f'{where}: {saved["iter_num"]} steps, validation loss '
                     f'{saved.get("best_val_loss", float("nan")):.4f}')
        else:
            model, about = GPT.from_pretrained(source, svd), source
            meta = huggingface.read_tokenizer(source) or GPT2_META      # without one: OpenAI's
        if cfg.lora_adapter is not None:
            huggingface.load_adapter(model, cfg.lora_adapter, source)
            about += f', with {cfg.lora_adapter}'
    except ValueError as e:
        raise e if isinstance(e, UserError) else UserError(f'{where}: {e}') from None
    c = model.config
    if meta['vocab_size'] > c.vocab_size:
        raise UserError(f'{where}: its tokenizer has {meta["vocab_size"]} token ids, its model '
                        f'{c.vocab_size}; put its tokenizer.json into the folder, or the meta.pkl '
                        'of its data set into data/DATASET')
    print(f'{about}; SVD on V {c.svd_summary}' + ' (switched here)' * bool(svd)
          + ': each token changes V of all earlier ones, so nothing is cached' * c.is_noncausal)
    return model, Tokenizer(meta)


if __name__ == '__main__':
    sys.exit(main())

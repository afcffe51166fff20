"""
Generate text from a trained model:

    python sample.py                                # the newest run in the working directory
    python sample.py --out_dir=out-svd-test --start="ROMEO:" --num_samples=3
    python sample.py --use_svd=True --svd_rank=8    # truncate V, even if training did not
    python sample.py --init_from=gpt2-xl --start="What is the answer?" # GPT-2, or a model folder
    python sample.py --help                         # every option, its default and meaning
"""

import itertools
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from runtime import cli                                 # before torch: reports missing packages

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
    """Options of sample.py: nanoGPT's, top_p, lora_adapter, and SVD options, which may differ from
    those used in training. For a value that is not valid, raises ValueError with a message that
    starts with the option's name."""
    init_from: Annotated[str, "'resume', 'gpt2', 'gpt2-medium', 'gpt2-large', "
                         "'gpt2-xl', or a folder: a run's, Hugging Face's or export.py's",
                         PATH, Section('model')] = 'resume'
    out_dir: Annotated[str | None, 'run folder; None: the newest in the working directory',
                       PATH] = None
    lora_adapter: Annotated[str | None, 'folder that export.py --to=lora made, for init_from',
                            PATH] = None
    start: Annotated[str, 'prompt, or FILE:prompt.txt to read it from a file',
                     Section('text')] = '\n'
    num_samples: Annotated[int, 'samples to draw, in one batch', Range(1, below=2 ** 31)] = 10
    max_new_tokens: Annotated[int, 'tokens to generate per sample', Range(1)] = 500
    temperature: Annotated[float, 'below 1: less random; above 1: more; 0: the most likely '
                           'token'] = 0.8
    top_k: Annotated[int | None, 'draw from the top_k most likely tokens; None: all'] = 200
    top_p: Annotated[float | None, 'of these, draw from the fewest most likely tokens whose '
                     'probabilities sum to at least top_p; None: all'] = None
    seed: Annotated[int, 'random seed', Range(0, below=2 ** 63)] = 1337
    device: Annotated[str, "'cpu', 'cuda', 'cuda:1', 'mps'; 'auto': cuda, else mps, else cpu",
                      Section('system')] = 'auto'
    dtype: Annotated[Literal['auto', 'float32', 'bfloat16', 'float16'],
                     "autocast to 'float32', 'bfloat16' or 'float16'; 'auto': bfloat16 on CUDA "
                     '(float16 on GPUs without it), else float32'] = 'auto'
    compile: Annotated[bool, 'use torch.compile'] = False
    use_svd: Annotated[bool | None, 'truncate V by an SVD; None: as trained',
                       Section('SVD on V')] = None
    svd_targets: Annotated[str | None, "what to truncate: any of q,k,v; None: as trained"] = None
    svd_rank: Annotated[int | None, 'rank kept per head; not given: as trained; None: full '
                       'rank'] = None
    svd_rank_q: Annotated[int | None, 'rank of queries; None: as trained'] = None
    svd_rank_k: Annotated[int | None, 'rank of keys; None: as trained'] = None
    svd_method: Annotated[Literal[METHODS] | None, 'SVD method; None: as trained'] = None
    svd_scope: Annotated[Literal[SCOPES] | None, 'what to truncate: the scope; None: as '
                         'trained'] = None
    svd_block: Annotated[int | None, "'causal': tokens whose V is not truncated; None: as trained"
                         ] = None

    def __post_init__(self):
        huggingface.check_name(self.init_from, ('resume',))
        validate(self)
        validate_sampling(self.temperature, self.top_k, self.top_p)


def main(argv=None):
    """Run sample.py. argv: its arguments, by default those of the command line.

    Returns the exit code: 0 done, 2 wrong input, 130 after Ctrl-C, 143 after SIGTERM. An error is
    one line on stderr.
    """
    return cli.run('sample.py', SampleConfig, __doc__, sample, argv,
                   lambda argv: load(SampleConfig, argv))


def sample(loaded):
    """Print num_samples texts, each with its prompt before it and a line of dashes after it.

    All texts are drawn as one batch. The first is printed while it is drawn, the others follow.
    loaded: the configuration, and the options that the user set. Raises UserError.
    """
    cfg, set_by = loaded
    device = devices.pick_device(cfg.device)
    torch.manual_seed(cfg.seed)
    model, tokenizer = load_model(cfg, set_by)
    model.to(device).eval()
    cached = not model.config.is_noncausal              # load_model prints why nothing is cached
    if cfg.compile:
        if not cached:                                  # inductor fails when T crosses the rank
            raise UserError("compile=True: does not work with svd_scope='sequence' "
                            '(nearest: --compile=False)')
        model.compile(dynamic=True)                     # the context grows by one token per step
    start = prompt_text(cfg.start)
    prompt = torch.tensor(tokenizer.encode(start), device=device).expand(cfg.num_samples, -1)
    stream = model.stream(prompt, cfg.max_new_tokens, cfg.temperature, cfg.top_k, cached, cfg.top_p)
    shown, drawn = itertools.tee(stream)                # each yields ids (num_samples, 1)
    print(start, end='')
    try:
        with devices.autocast(device, devices.pick_dtype(cfg.dtype, device)):
            for piece in tokenizer.decode_stream(tokens[0].item() for tokens in shown):
                print(piece, end='', flush=True)
                if getattr(sys.stdout, 'silent', False):            # stdout is closed, as by | head
                    return
    except (FloatingPointError, torch.linalg.LinAlgError) as e:
        raise UserError(f'the next token has no finite probabilities ({one_line(e)[:100]}), '
                        'because the weights of the model are too large') from None
    print(end=END)
    for row in torch.cat(list(drawn), dim=1)[1:].tolist():
        print(start + tokenizer.decode(row), end=END)


def prompt_text(start: str) -> str:
    """Return the prompt: `start`, or the text of the file that FILE:PATH names. Raises UserError if
    the file cannot be read or the prompt is empty."""
    if start.startswith('FILE:'):
        try:
            start = Path(os.path.expanduser(start[5:])).read_text(encoding='utf-8-sig')
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f'start={start}: not a readable UTF-8 text file ({type(e).__name__})'
                            ) from None
    if not start:
        raise UserError('start: the prompt is empty, but needs at least one character (nearest: '
                        'leave --start out)')
    return start


def load_model(cfg, set_by) -> tuple[GPT, Tokenizer]:
    """Return the model and its tokenizer, and print which model was loaded. SVD options that the
    user set replace the options used in training. Raises UserError."""
    # svd_rank=None means full rank; None in the other options means: as trained
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
            meta = huggingface.read_tokenizer(source) or GPT2_META  # a folder without one: GPT-2's
        if cfg.lora_adapter is not None:
            huggingface.load_adapter(model, cfg.lora_adapter, source)
            about += f', with {cfg.lora_adapter}'
    except ValueError as e:
        raise e if isinstance(e, UserError) else UserError(f'{where}: {e}') from None
    c = model.config
    if meta['vocab_size'] > c.vocab_size:
        raise UserError(f'{where}: its tokenizer has {meta["vocab_size"]} token ids, but its model '
                        f'only {c.vocab_size}; put the right tokenizer.json into the folder, or '
                        'the meta.pkl of its data set into data/DATASET')
    print(f'{about}; SVD on {c.svd_names} {c.svd_summary}'
          + ' (set by an option)' * bool(svd)
          + f'; a new token changes {c.svd_names} of all earlier tokens, so nothing is cached'
          * c.is_noncausal)
    return model, Tokenizer(meta)


if __name__ == '__main__':
    sys.exit(main())

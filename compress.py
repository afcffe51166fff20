"""
Make a trained model smaller, without training or with short fine-tuning:

    python compress.py --out_dir=OUT --keep=0.6                  # keep 60% of the blocks' weights
    python compress.py --out_dir=OUT --keep=0.4 --finetune_iters=300        # and fine-tune
    python compress.py --out_dir=OUT --rank=64 --modules=mlp --method=plain # MLPs at rank 64
    python compress.py --spectrum --out_dir=OUT                  # only report the singular values
    python compress.py --to=mla --mla_latent_dim=32 --out_dir=OUT           # convert to MLA
    python compress.py --to=lowrank_heads --keep=0.5 --out_dir=OUT          # half of the cache
    python compress.py --to=gqa --n_kv_head=2 --out_dir=OUT                 # fewer key/value heads
    python compress.py --init_from=gpt2 --dataset=my.txt --keep=0.8   # GPT-2, or a model folder
    python compress.py --help                                    # every option and its meaning

SAVE_DIR (default: OUT-lowrank, OUT-mla, ...) gets ckpt.pt, which the other scripts take, and
compress.json, the report. The report counts all parameters; train.py counts all but the position
embeddings. Generation is timed in rounds, each with both models in turn. Speeds are medians over
the rounds, and the ratio of speeds is the median of their ratios. More: docs/COMPRESSION.md.
"""

import copy
import json
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from runtime import cli  # before torch: reports missing packages

from model import GPT
from runtime import checkpoint as ckpt
from runtime import config as configuration
from runtime import device as devices
from runtime import huggingface
from runtime.config import PATH, SWITCH, Range, UserError, one_line
from runtime.data import GPT2_META, Dataset, locate, name_of
from runtime.files import (archive_run, check_save_dir, locked_folder, named, new_folder,
                           write_atomically)
from tools import model_compression as compression
from tools.attention_conversion import HEADS_KEEP, to_gqa, to_lowrank_heads, to_mla
from tools.calibration import calibration_windows
from tools.model_compression import apply_svd_compression  # noqa: F401
from tools.spectrum_report import report_spectrum

RANKS, TUNING = ('keep', 'rank', 'energy'), ('optimizer', 'learning_rate', 'batch_size')


@dataclass
class CompressConfig:
    """Options of compress.py. For a value that is not valid, raises ValueError with a message that
    starts with the option's name."""
    out_dir: Annotated[str | None, 'run folder; None: the newest in the working directory',
                       PATH] = None
    save_dir: Annotated[str | None, 'new folder; None: OUT_DIR-lowrank, OUT_DIR-mla, ...',
                        PATH] = None
    overwrite: Annotated[bool, 'move a run in save_dir to SAVE_DIR.1, .2, ...; False: refuse '
                         'to replace it'] = False
    to: Annotated[Literal['lowrank', 'mla', 'gqa', 'lowrank_heads'], "'lowrank': smaller layers of "
                  "any kind, see method; 'mla': multi-head latent attention, keys and "
                  "values from one latent per token; 'gqa': fewer key/value heads, each the mean "
                  "of several; 'lowrank_heads': narrower heads"] = 'lowrank'
    keep: Annotated[float | None, "fraction kept of the modules' weights, or of the cache with "
                    f'lowrank_heads; None: {compression.KEEP} unless rank or energy is given, or '
                    f'{HEADS_KEEP} of the cache', Range(above=0)] = None
    rank: Annotated[int | None, 'one rank for all layers; layers that it does not make smaller '
                    'stay dense', Range(1)] = None
    energy: Annotated[float | None, "per layer, the smallest rank that keeps this fraction of the "
                      'energy that the method measures', Range(above=0)] = None
    modules: Annotated[str | None, "which layers of the blocks: 'attn', 'mlp' or 'attn,mlp'; "
                       'None: all'] = None
    mla_latent_dim: Annotated[int | None, 'size of a latent, at most n_embd; None: n_embd / 4. '
                              "With method 'activation' each layer gets its own, and this is the "
                              'largest mean', Range(1)] = None
    n_kv_head: Annotated[int | None, 'key/value heads of gqa; None: half of those of the model',
                         Range(1)] = None
    method: Annotated[Literal['activation', 'whitened', 'plain'] | None,
                      "what to minimize; 'activation': the estimated increase of the training "
                      'loss, which also decides between narrower heads, fewer neurons and low-rank '
                      "layers; 'whitened': the error of each layer's outputs, in low-rank layers; "
                      "'plain': the error of the weights, the same; None: 'activation'"] = None
    int8: Annotated[bool, 'store the matrices of the blocks as 8-bit integers with one scale per '
                    'row; in memory they are float32'] = False
    finetune_iters: Annotated[int, 'steps of fine-tuning all parameters afterwards, on the text '
                              'and on predictions of the original model', Range(0)] = 0
    optimizer: Annotated[Literal['adamw', 'muon'] | None, "optimizer of fine-tuning; None: "
                         "'muon'"] = None
    learning_rate: Annotated[float | None, 'learning rate of fine-tuning, which decays to a tenth; '
                             'None: 1e-3, for n_embd of a few hundred', Range(0)] = None
    batch_size: Annotated[int | None, 'sequences per fine-tuning step; None: as in the run, or 12',
                          Range(1)] = None
    spectrum: Annotated[bool, 'only report the singular values of every weight in the blocks',
                        SWITCH] = False
    init_from: Annotated[str, "'resume', 'gpt2', 'gpt2-medium', 'gpt2-large', "
                         "'gpt2-xl', or a folder: a run's, Hugging Face's or export.py's",
                         PATH] = 'resume'
    dataset: Annotated[str | None, "data to measure on, as for train.py; None: the run's",
                       PATH] = None
    calibration_tokens: Annotated[int, 'training tokens to measure on, rounded up to whole '
                                  'windows', Range(1)] = 16384
    seed: Annotated[int, 'random seed', Range(0, below=2 ** 63)] = 1337
    device: Annotated[str, "'cpu', 'cuda', 'cuda:1', 'mps'; 'auto': cuda, else mps, "
                      'else cpu'] = 'auto'

    def __post_init__(self):
        huggingface.check_name(self.init_from, ('resume',))
        configuration.validate(self)
        compression.parse_modules(self.modules)
        # option -> (whether it is given, options that have no effect with it)
        unused = {
            '--spectrum': (self.spectrum, ('to', 'overwrite', 'dataset', 'method', 'finetune_iters',
                                           'int8', 'mla_latent_dim', 'n_kv_head', *RANKS)),
            '--to=mla': (self.to == 'mla', ('modules', 'n_kv_head', *RANKS)),
            '--to=gqa': (self.to == 'gqa', ('modules', 'mla_latent_dim', 'method', *RANKS)),
            '--to=lowrank_heads': (self.to == 'lowrank_heads', (
                'modules', 'mla_latent_dim', 'n_kv_head', 'rank', 'energy')),
            '--to=lowrank': (self.to == 'lowrank', ('mla_latent_dim', 'n_kv_head')),
            '--finetune_iters=0': (not self.finetune_iters, TUNING),
            '--init_from': (self.init_from != 'resume', ('out_dir',)),
            '--keep': (self.keep is not None, ('rank', 'energy')),
            '--rank': (self.rank is not None, ('energy',))}
        for option, (is_given, names) in unused.items():
            for name in names if is_given else ():
                if getattr(self, name) != getattr(CompressConfig, name):
                    raise ValueError(f'{name}={getattr(self, name)!r}: has no effect with {option} '
                                     f'(nearest: leave --{name} out)')
        for name in ('keep', 'energy'):
            value = getattr(self, name) or 0
            if value > 1:                                           # 60 stands for 60%
                raise ValueError(f'{name}={value}: must be a fraction, above 0 and at most 1 '
                                 f'(nearest: {value / 100 if 2 <= value <= 100 else 1:g})')
        if self.to != 'lowrank' and self.method == 'whitened':
            raise ValueError(f"method='whitened': cannot be combined with --to={self.to} (nearest: "
                             "'activation')")
        if self.init_from != 'resume' and self.dataset is None and not self.spectrum:
            raise ValueError(f'init_from={self.init_from}: needs a text to measure on (nearest: '
                             '--dataset=my.txt)')
        self.method = self.method or 'activation'


def main(argv=None):
    """Run compress.py. argv: its arguments, by default those of the command line.

    Returns the exit code: 0 done, 1 full disk, 2 wrong input, 130 after Ctrl-C, 143 after SIGTERM.
    An error is one line on stderr, and nothing is written then.
    """
    return cli.run('compress.py', CompressConfig, __doc__, compress, argv)


def compress(cfg):
    """Load, convert and save a model. An error leaves save_dir as it was. Raises UserError."""
    is_run = cfg.init_from == 'resume'
    path = ckpt.find(cfg.out_dir) if is_run else Path(cfg.init_from)
    source, kind = named(path.parent if is_run else path), 'spectrum' if cfg.spectrum else cfg.to
    save_dir = Path(cfg.save_dir or f'{source}-{kind}')
    check_save_dir(save_dir, source, kind, None if cfg.spectrum else cfg.overwrite)
    with (locked_folder(save_dir, 'save_dir') if (save_dir / 'ckpt.pt').exists() else
          nullcontext()):
        try:
            saved = ckpt.load(path) if is_run else {}
            model = compression.without_adapters(
                GPT.from_checkpoint(saved) if is_run else GPT.from_pretrained(cfg.init_from))
            if cfg.spectrum:
                with new_folder(save_dir) as folder:
                    print(report_spectrum(compression.weights_of(model, cfg.modules), folder,
                                          f'Weights of {path}'))
            else:
                checkpoint, report = convert(cfg, model, saved, save_dir)
                print(f'{path}: {compression.describe(report)}')
                with new_folder(save_dir) as folder:
                    ckpt.save(checkpoint, folder / 'ckpt.pt')
                    write_atomically(folder / 'compress.json',
                                     (json.dumps(report, indent=1) + '\n').encode())
                    archive_run(save_dir, print)
        except (ValueError, FloatingPointError) as e:
            raise e if isinstance(e, UserError) else UserError(f'{path}: {one_line(e)}') from None
    print(f'written to {save_dir}')


def convert(cfg, model, saved, save_dir):
    """Convert, fine-tune and measure a model.

    Returns a checkpoint and a report. Training from the checkpoint starts at step 0, with the
    settings of the original run. Pairs in the report are [before, after]. Raises ValueError or
    FloatingPointError.
    """
    device = devices.pick_device(cfg.device)
    options = asdict(cfg)                                           # as the user gave them
    cfg.dataset = cfg.dataset or str(saved.get('config', {}).get('dataset', ''))
    data = find_data(cfg, saved, model.config)
    model.to(device).requires_grad_(False)
    losses = [compression.validation_loss(model, data, device, cfg.seed)]

    start, new = time.perf_counter(), copy.deepcopy(model)
    windows = () if cfg.method == 'plain' or cfg.to == 'gqa' else calibration_windows(
        data, cfg.calibration_tokens, model.config.block_size, cfg.seed, device)
    if cfg.to == 'mla':
        new = to_mla(new, cfg.mla_latent_dim or max(1, model.config.n_embd // 4), windows)
    elif cfg.to == 'gqa':
        new = to_gqa(new, cfg.n_kv_head)
    elif cfg.to == 'lowrank_heads':
        new = to_lowrank_heads(new, cfg.keep, windows)
    else:
        new = compression.compress_model(new, cfg.method, windows, cfg.modules, cfg.keep,
                                         rank=cfg.rank, energy=cfg.energy)
    seconds = [time.perf_counter() - start, None]
    losses.append(compression.validation_loss(new, data, device, cfg.seed))

    if cfg.finetune_iters:
        start = time.perf_counter()
        compression.finetune(new, data, cfg, saved, device, teacher=model)
        seconds[1] = time.perf_counter() - start
        losses.append(compression.validation_loss(new, data, device, cfg.seed))

    state, scales = new.cpu().state_dict(), {}          # no tensors of a GPU in the file
    if cfg.int8:
        state, scales = ckpt.to_int8(state, 'transformer.h.')
        new.load_state_dict(ckpt.from_int8(state, scales))
        losses.append(compression.validation_loss(new.to(device), data, device, cfg.seed))
    new.to(device)

    both = [losses[0], losses[-1]]
    report = dict(to=cfg.to, method=None if cfg.to == 'gqa' else cfg.method, options=options,
                  val_loss=both, machine=devices.environment(device, 'float32'),
                  seconds=seconds[0], finetune_seconds=seconds[1],
                  prefix_only=model.config.is_noncausal,
                  val_loss_before_finetuning=losses[1] if cfg.finetune_iters else None,
                  # exp overflows above 709
                  perplexity=[math.exp(min(loss, 700)) for loss in both],
                  disk_bytes=[ckpt.tensor_bytes(model.state_dict()),
                              ckpt.tensor_bytes(state) + ckpt.tensor_bytes(scales)],
                  **compression.shape_of(new.config),
                  **compression.compare_models([model, new], data, device, cfg.seed))
    args, new = asdict(new.config), new.cpu().requires_grad_(True)
    optimizer = new.configure_optimizers(1e-1, 6e-4, (0.9, 0.95), 'cpu')
    settings = saved.get('config', {}) | args | dict(
        out_dir=str(save_dir), dataset=name_of(data.folder, cfg.dataset),
        tokenizer=data.meta['tokenizer'])
    return dict(model=state, **dict(scales=scales) if scales else {}, model_args=args, iter_num=0,
                optimizer=optimizer.state_dict(), best_val_loss=both[1], config=settings,
                tokenizer=saved.get('tokenizer', data.meta), **new.extra_state()), report


def find_data(cfg, saved, c):
    """Return the data set on which to measure. c: configuration of the model. Raises UserError if
    the data set has other tokens than the model, or too few tokens."""
    is_bpe = c.vocab_size >= GPT2_META['vocab_size']
    data = Dataset(locate(cfg.dataset, 'gpt2' if is_bpe else 'char'))
    huggingface.check_tokenizer(cfg, {}, saved, data, print)
    if data.vocab_size > c.vocab_size:
        raise UserError(f'dataset={cfg.dataset}: has {data.vocab_size} token ids, but the model '
                        f'only {c.vocab_size} (nearest: the data set of the model)')
    data.check_length(c.block_size)
    return data


if __name__ == '__main__':
    sys.exit(main())

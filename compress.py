"""
Make a trained model smaller without training it again:

    python compress.py --out_dir=OUT --keep=0.6                  # blocks keep 60% of their numbers
    python compress.py --out_dir=OUT --keep=0.4 --finetune_iters=300        # and train the factors
    python compress.py --out_dir=OUT --rank=64 --modules=mlp --method=plain # MLP at rank 64, by SVD
    python compress.py --spectrum --out_dir=OUT                  # singular values: table and figure
    python compress.py --to=mla --mla_latent_dim=32 --out_dir=OUT           # attention to MLA
    python compress.py --init_from=gpt2 --dataset=my.txt --keep=0.8         # or a folder
    python compress.py --help                                    # every option, and its meaning

SAVE_DIR (default: OUT-lowrank, OUT-mla, OUT-spectrum) gets ckpt.pt, which sample.py, train.py,
bench.py, export.py and this script take, and compress.json with all that is printed. How it works
and what it costs: docs/COMPRESSION.md.
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

from runtime import cli  # before torch: says what is not installed

# isort: split
from model import GPT
from runtime import checkpoint as ckpt
from runtime import config as configuration
from runtime import device as devices
from runtime import huggingface
from runtime.config import PATH, SWITCH, Range, UserError, one_line
from runtime.data import GPT2_META, Dataset, locate, name_of
from runtime.files import (
    archive_run,
    check_save_dir,
    locked_folder,
    named,
    new_folder,
    write_atomically,
)
from tools import model_compression as compression
from tools.attention_conversion import to_mla
from tools.model_compression import apply_svd_compression  # noqa: F401
from tools.spectrum_report import report_spectrum

RANKS, TUNING = ('keep', 'rank', 'energy'), ('optimizer', 'learning_rate', 'batch_size')


@dataclass
class CompressConfig:
    out_dir: Annotated[str | None, 'folder of the run; None: the newest one below this folder',
                       PATH] = None
    save_dir: Annotated[str | None, 'folder to make; None: OUT_DIR-lowrank, -mla or -spectrum',
                        PATH] = None
    overwrite: Annotated[bool, 'a run in save_dir moves to SAVE_DIR.1, .2, ...; False: it is '
                         'refused'] = False
    to: Annotated[Literal['lowrank', 'mla'], "'lowrank': products of two layers in place of one; "
                  "'mla': multi-head latent attention, one latent per token for keys and "
                  'values'] = 'lowrank'
    keep: Annotated[float | None, "share of the numbers in the modules' weights to keep, above 0, "
                    f'at most 1; None: {compression.KEEP} unless rank or energy is given',
                    Range(above=0)] = None
    rank: Annotated[int | None, 'the same rank for all layers that it makes smaller',
                    Range(1)] = None
    energy: Annotated[float | None, "the smallest rank that keeps this share of a layer's energy, "
                      'as the method measures it', Range(above=0)] = None
    modules: Annotated[str | None, "which layers of the blocks: 'attn', 'mlp' or 'attn,mlp'; "
                       'None: all'] = None
    mla_latent_dim: Annotated[int | None, 'numbers in a latent, at most n_embd; None: n_embd / 4',
                              Range(1)] = None
    method: Annotated[Literal['activation', 'whitened', 'plain'] | None,
                      "'activation': what the loss makes of errors on the training split decides, "
                      "on the ranks too; 'whitened': the error of each layer's outputs there; "
                      "'plain': the SVD of the weights; None: 'activation'"] = None
    finetune_iters: Annotated[int, 'steps of training all parameters afterwards, on the text and '
                              'to agree with the model as it was', Range(0)] = 0
    optimizer: Annotated[Literal['adamw', 'muon'] | None, "of these steps; None: 'muon'"] = None
    learning_rate: Annotated[float | None, 'of these steps, a tenth of it at the end; None: 1e-3, '
                             'which suits models a few hundred wide', Range(0)] = None
    batch_size: Annotated[int | None, 'sequences in such a step; None: as the run had, or 12',
                          Range(1)] = None
    spectrum: Annotated[bool, 'only look: the singular values of every weight of the blocks',
                        SWITCH] = False
    init_from: Annotated[str, "'resume' (a run's checkpoint), GPT-2 weights ('gpt2', "
                         "'gpt2-medium', 'gpt2-large', 'gpt2-xl') or a folder with safetensors, "
                         "in Hugging Face's format or as export.py writes them", PATH] = 'resume'
    dataset: Annotated[str | None, "as for train.py; None: the run's", PATH] = None
    calibration_tokens: Annotated[int, 'training tokens to measure on, in whole windows; at most '
                                  'all', Range(1)] = 16384
    seed: Annotated[int, 'of the windows, and of training', Range(0, below=2 ** 63)] = 1337
    device: Annotated[str, "'auto' (cuda, then mps, then cpu), 'cpu', 'cuda', 'cuda:1', "
                      "'mps'"] = 'auto'

    def __post_init__(self):
        huggingface.check_name(self.init_from, ('resume',))
        configuration.validate(self)
        compression.parse_modules(self.modules)
        unused = {          # beside an option that is given: others that would change nothing
            '--spectrum': (self.spectrum, ('to', 'overwrite', 'dataset', 'method', 'finetune_iters',
                                           'mla_latent_dim', *RANKS)),
            '--to=mla': (self.to == 'mla', ('modules', *RANKS)),
            '--to=lowrank': (self.to == 'lowrank', ('mla_latent_dim',)),
            '--finetune_iters=0': (not self.finetune_iters, TUNING),
            '--init_from': (self.init_from != 'resume', ('out_dir',)),
            '--keep': (self.keep is not None, ('rank', 'energy')),
            '--rank': (self.rank is not None, ('energy',))}
        for option, (is_given, names) in unused.items():
            for name in names if is_given else ():
                if getattr(self, name) != getattr(CompressConfig, name):
                    raise ValueError(f'{name}={getattr(self, name)!r}: not with {option}')
        if self.to == 'mla' and self.method == 'whitened':
            raise ValueError("method='whitened': not with --to=mla (nearest: 'activation')")
        if self.init_from != 'resume' and self.dataset is None and not self.spectrum:
            raise ValueError(f'init_from={self.init_from}: needs a text to measure on (nearest: '
                             '--dataset=my.txt)')
        self.method = self.method or 'activation'


def main(argv=None):
    """-> exit code: 0 done, 1 a full disk, 2 wrong input (one line on stderr, nothing written),
    130 / 143 stopped."""
    return cli.run('compress.py', CompressConfig, __doc__, compress, argv)


def compress(cfg):
    """Load, convert, save. save_dir is written whole or not at all."""
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
    """Convert, fine-tune and measure. Returns a checkpoint, from which training starts at step 0
    with the run's own settings, and the report, with [before, after] where it has two numbers."""
    device, is_mla = devices.pick_device(cfg.device), cfg.to == 'mla'
    options = asdict(cfg)                                           # as they were given
    cfg.dataset = cfg.dataset or str(saved.get('config', {}).get('dataset', ''))
    data = find_data(cfg, saved, model.config)
    model.to(device).requires_grad_(False)
    losses = [compression.validation_loss(model, data, device, cfg.seed)]

    start, new, layers = time.perf_counter(), copy.deepcopy(model), {}
    windows = () if cfg.method == 'plain' else compression.calibration_windows(
        data, cfg.calibration_tokens, model.config.block_size, cfg.seed, device)
    if is_mla:
        new = to_mla(new, cfg.mla_latent_dim or model.config.latent_dim, windows)
    else:
        layers = compression.compress_model(new, cfg.method, windows, cfg.modules, keep=cfg.keep,
                                            rank=cfg.rank, energy=cfg.energy)
    seconds = [time.perf_counter() - start, None]
    losses.append(compression.validation_loss(new, data, device, cfg.seed))

    if cfg.finetune_iters:
        start = time.perf_counter()
        compression.finetune(new, data, cfg, saved, device, teacher=model)
        seconds[1] = time.perf_counter() - start
        losses.append(compression.validation_loss(new, data, device, cfg.seed))

    both = [losses[0], losses[-1]]
    report = dict(to=cfg.to, method=cfg.method, options=options, layers=layers, val_loss=both,
                  machine=devices.environment(device, 'float32'), seconds=seconds[0],
                  finetune_seconds=seconds[1], prefix_only=model.config.is_noncausal,
                  val_loss_before_finetuning=losses[1] if cfg.finetune_iters else None,
                  perplexity=[math.exp(min(loss, 700)) for loss in both],     # of float's range
                  latent_dim=new.config.latent_dim if is_mla else None,
                  **compression.compare_models([model, new], data, device, cfg.seed))
    args, new = asdict(new.config), new.cpu().requires_grad_(True)
    optimizer = new.configure_optimizers(1e-1, 6e-4, (0.9, 0.95), 'cpu')
    settings = saved.get('config', {}) | args | dict(
        out_dir=str(save_dir), dataset=name_of(data.folder, cfg.dataset),
        tokenizer=data.meta['tokenizer'])
    return dict(model=new.state_dict(), optimizer=optimizer.state_dict(), model_args=args,
                iter_num=0, best_val_loss=both[1], config=settings,
                tokenizer=saved.get('tokenizer', data.meta), **new.extra_state()), report


def find_data(cfg, saved, c):
    """The data set to measure on. Raises UserError unless it has the tokens of a model of
    configuration c, and enough of them."""
    is_bpe = c.vocab_size >= GPT2_META['vocab_size']
    data = Dataset(locate(cfg.dataset, 'gpt2' if is_bpe else 'char'))
    huggingface.check_tokenizer(cfg, {}, saved, data, print)
    if data.vocab_size > c.vocab_size:
        raise UserError(f'dataset={cfg.dataset}: has {data.vocab_size} token ids, the model '
                        f'{c.vocab_size}')
    data.check_length(c.block_size)
    return data


if __name__ == '__main__':
    sys.exit(main())

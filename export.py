"""
Take a trained model elsewhere:

    python export.py --out_dir=out-svd-test --to=gpt2          # for transformers, with tokenizer
    python export.py --out_dir=out-svd-test --to=nanogpt       # for nanoGPT: ckpt.pt and meta.pkl
    python export.py --out_dir=out-svd-test --to=safetensors   # any model as it is, for --init_from
    python export.py --out_dir=out-adaptive-svd --to=dense     # without adaptive SVD or LoRA
    python export.py --out_dir=out-lora --to=lora              # its adapters, for --lora_adapter
    python export.py                                           # the newest run, for transformers
    python export.py --help                                    # every option, default and meaning

For transformers and nanoGPT, SVD in 'weight' scope becomes part of the weights, and so do MLA's
latents and low-rank layers. 'sequence' and 'causal' scope truncate V itself: neither format can
represent that. The work is in tools/export_formats.py.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from runtime import cli                                             # first: says what is missing

from model import GPT
from runtime import checkpoint as ckpt
from runtime.config import PATH, UserError
from runtime.files import check_save_dir, named, new_folder, unwritable
from tools.export_formats import FORMATS, changes


@dataclass
class ExportConfig:
    out_dir: Annotated[str | None, 'folder of the run; None: the newest one below this folder',
                       PATH] = None
    to: Annotated[Literal['gpt2', 'nanogpt', 'safetensors', 'dense', 'lora'],
                  "'gpt2': Hugging Face's format; 'nanogpt': its checkpoint; 'safetensors': this "
                  "repo's own, with all that its models can be; 'dense': a checkpoint here, "
                  "adaptive SVD and LoRA part of the weights; 'lora': adapters alone"] = 'gpt2'
    base: Annotated[str | None, "'lora' of PiSSA and MiLoRA: weights they began with, as "
                    '--init_from; None: what the run says', PATH] = None
    save_dir: Annotated[str | None, 'folder to make; None: OUT_DIR-gpt2, OUT_DIR-nanogpt, ...',
                        PATH] = None

    def __post_init__(self):
        if self.base is not None and self.to != 'lora':
            raise ValueError(f'base={self.base!r}: has no effect with to={self.to!r} (nearest: '
                             '--to=lora)')


def main(argv=None):
    """-> exit code: 0 done, 2 wrong input or a full disk (one line on stderr, nothing written),
    130 / 143 stopped."""
    return cli.run('export.py', ExportConfig, __doc__, lambda cfg: print(export(cfg)), argv)


def export(cfg):
    """Writes save_dir whole or not at all -> what was written, in words."""
    path = ckpt.find(cfg.out_dir)
    run = named(path.parent)
    save_dir = Path(f'{run}-{cfg.to}' if cfg.save_dir is None else cfg.save_dir)
    check_save_dir(save_dir, run, cfg.to, overwrite=None)
    fill, reader = FORMATS[cfg.to]
    try:
        saved = ckpt.load(path)
        model = GPT.from_checkpoint(saved)
        lines = changes(model.config, cfg.to)
        meta = ckpt.tokenizer_of(saved, model.config.vocab_size)
        if meta['vocab_size'] > model.config.vocab_size:            # no more than a guess
            meta = None
            lines.append('left out: the tokenizer, which is not in the checkpoint; put the '
                         'meta.pkl of its data set into data/DATASET')
        saved['base'] = cfg.base or saved.get('config', {}).get('init_from')
        with new_folder(save_dir) as folder:
            fill(folder, model, saved, meta, lines)
            files = [f'  {file.name}: {file.stat().st_size:,} bytes'
                     for file in sorted(folder.iterdir())]
    except OSError as e:
        raise unwritable(f'save_dir={str(save_dir)!r}: cannot be written', e) from None
    except ValueError as e:
        raise e if isinstance(e, UserError) else UserError(f'{path}: {e}') from None
    return '\n'.join([f'{path}: {saved["iter_num"]} steps, written to {save_dir} for {reader}',
                      *files, *lines])


if __name__ == '__main__':
    sys.exit(main())

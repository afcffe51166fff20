"""
Export a trained model for other programs, or in another form for this repo:

    python export.py --out_dir=out-svd-test --to=gpt2          # Hugging Face, with tokenizer
    python export.py --out_dir=out-svd-test --to=nanogpt       # for nanoGPT: ckpt.pt and meta.pkl
    python export.py --out_dir=out-svd-test --to=safetensors   # any model, for --init_from
    python export.py --out_dir=out-adaptive-svd --to=dense     # LoRA or adaptive SVD merged
    python export.py --out_dir=out-lora --to=lora              # adapters, for --lora_adapter
    python export.py                                           # the newest run, --to=gpt2
    python export.py --help                                    # every option and its meaning

With 'gpt2' and 'nanogpt', the SVD of 'weight' scope, MLA's latents and low-rank layers become
ordinary weights. 'sequence' and 'causal' scope are refused, because they truncate V itself.
Ordinary weights cannot represent this.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from runtime import cli  # before torch: reports missing packages

from model import GPT
from runtime import checkpoint as ckpt
from runtime.config import PATH, UserError
from runtime.files import check_save_dir, named, new_folder, unwritable
from tools.export_formats import FORMATS, changes


@dataclass
class ExportConfig:
    """Options of export.py. Raises ValueError if `base` is given without to='lora'."""
    out_dir: Annotated[str | None, 'run folder; None: the newest in the working directory',
                       PATH] = None
    to: Annotated[Literal['gpt2', 'nanogpt', 'safetensors', 'dense', 'lora'],
                  "'gpt2': Hugging Face's format; 'nanogpt': nanoGPT's checkpoint; 'safetensors': "
                  "this repo's format, for every model; 'dense': a checkpoint with adaptive SVD "
                  "or LoRA merged into the weights; 'lora': the adapters alone"] = 'gpt2'
    base: Annotated[str | None, "'lora' with PiSSA or MiLoRA: the weights before training, as "
                    'for --init_from; None: as saved in the run', PATH] = None
    save_dir: Annotated[str | None, 'new folder; None: OUT_DIR-gpt2, OUT_DIR-nanogpt, ...',
                        PATH] = None

    def __post_init__(self):
        if self.base is not None and self.to != 'lora':
            raise ValueError(f'base={self.base!r}: has no effect with to={self.to!r} (nearest: '
                             '--to=lora)')


def main(argv=None):
    """Run export.py. argv: its arguments, by default those of the command line.

    Returns the exit code: 0 done, 1 full disk, 2 wrong input, 130 after Ctrl-C, 143 after SIGTERM.
    An error is one line on stderr, and nothing is written then.
    """
    return cli.run('export.py', ExportConfig, __doc__, lambda cfg: print(export(cfg)), argv)


def export(cfg):
    """Export a run. Returns a description of what was written, as text. After an error, save_dir
    does not exist. Raises UserError, or Failure for a full disk."""
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
        if meta['vocab_size'] > model.config.vocab_size:    # GPT-2's, assumed without metadata
            meta = None
            lines.append('left out: the tokenizer, which is not in the checkpoint; to '
                         'include it, put the meta.pkl of its data set into data/DATASET')
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

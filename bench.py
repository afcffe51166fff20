"""
Time training steps, or decoding (--decode), or measure each SVD method (--svd).

    python bench.py config/train_svd_test.py                     # each method and scope
    python bench.py config/train_svd_test.py --peer=../nanoGPT   # also nanoGPT's GPT
    python bench.py config/train_svd_test.py --decode            # tokens/s and cache bytes
    python bench.py config/train_mla_test.py --decode            # MLA against ordinary attention
    python bench.py config/train_svd_test.py --svd --plot        # cost and accuracy, with a figure
    python bench.py --help                                       # every option and its meaning

A training step is a forward pass, a backward pass, clipping and an optimizer step, on random
tokens. Each SVD method and scope is timed against the baseline, which is the same model without
SVD, MLA, grouped or narrower heads, low-rank layers and adapters. A config with any of these but
the SVD is also timed without SVD. "optimizer left out" is the baseline without the step of its
optimizer. Decoding is greedy, from batch_size prompts of random tokens. The prefill is timed
separately. Models are timed in turn, so that a slower phase of the machine affects all of them.
--svd measures on V of OUT_DIR/ckpt.pt, if that run has the config's shape, and on matrices with
known spectra. tools/svd_benchmark.py explains the columns. The last line is JSON.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from runtime import cli  # before torch: reports missing packages

from runtime import checkpoint as ckpt
from runtime import config as configuration
from runtime import device as devices
from runtime import huggingface
from runtime.config import PATH, SWITCH, Range
from runtime.data import LARGE, Dataset, locate
from tools import step_benchmark, svd_benchmark
from train import RUN_LOCAL_FIELDS, TrainConfig


@dataclass
class BenchConfig(TrainConfig):
    """Options of bench.py: the options of train.py and those of the benchmark. Of the options of
    train.py, only model, batch and optimizer matter here. Raises ValueError as TrainConfig does."""
    decode: Annotated[bool, 'time decoding instead of training steps', SWITCH,
                      configuration.Section('benchmark')] = False
    contexts: Annotated[str | None, "--decode: prompt lengths, as '16,128'; None: 3/16, 6/16 and "
                        '14/16 of block_size'] = None
    tokens: Annotated[int | None, '--decode: tokens to generate after each prompt, a sixteenth '
                      'of them without a cache; None: 32, but at most half of block_size',
                      Range(2)] = None
    svd: Annotated[bool, 'measure cost and accuracy of each SVD method', SWITCH] = False
    plot: Annotated[bool | str, '--svd: draw error against time in bench-svd.png, or in the file '
                    'of --plot=FILE.png', SWITCH, PATH] = False
    pairs: Annotated[int, 'timed pairs per comparison; --decode, --svd: rounds', Range(2)] = 30
    peer: Annotated[str | None, "folder with another model.py to time, such as nanoGPT's",
                    PATH] = None

    def __post_init__(self):
        super().__post_init__()
        self.check_layers()                             # no weights are loaded
        if self.tokens is None:
            self.tokens = max(2, min(32, self.block_size // 2))
        for name, default, fits, why in (
                ('plot', False, self.svd, 'needs --svd (nearest: --svd --plot)'),
                ('decode', False, not self.svd,
                 'cannot be combined with --svd (nearest: leave one of them out)'),
                ('peer', None, not self.svd,
                 'cannot be combined with --svd (nearest: leave one of them out)')):
            if getattr(self, name) != default and not fits:
                raise ValueError(f'{name}={getattr(self, name)!r}: {why}')
        if self.plot is True:
            self.plot = 'bench-svd.png'
        path = Path(self.plot or '.')
        if self.plot and (path.suffix.lower() != '.png' or not path.parent.is_dir()):
            raise ValueError(f'plot={self.plot!r}: must be a PNG in a folder that exists (nearest: '
                             f"'{path.stem}.png')")
        if self.peer and not (Path(self.peer) / 'model.py').is_file():
            raise ValueError(f'peer={self.peer!r}: is not a folder with a model.py (nearest: a '
                             'checkout of nanoGPT)')


def main(argv=None):
    """Run bench.py. argv: its arguments, by default those of the command line.

    Returns the exit code: 0 done, 2 wrong input, 130 after Ctrl-C, 143 after SIGTERM. An error is
    one line on stderr.
    """
    return cli.run('bench.py', BenchConfig, __doc__, bench, argv, load_config)


def load_config(argv):
    """Return the configuration for argv. Options that are not set come from the model of init_from
    and from lora_adapter. The weights of that model and adapter are not used, because times do not
    depend on weights.

    Raises UserError.
    """
    values, set_by = configuration.parse(BenchConfig, argv)
    where, theirs = values['init_from'], {}
    if where != 'scratch':
        saved = (ckpt.load(Path(values['out_dir']) / 'ckpt.pt') if where == 'resume' else
                 huggingface.read(where))
        theirs = {key: value for key, value in saved.get('config', {}).items()
                  if key not in RUN_LOCAL_FIELDS} | saved['model_args']
    if values['lora_adapter'] is not None:
        theirs |= huggingface.read_adapter(values['lora_adapter'])[0]
    theirs = configuration.check_all(BenchConfig, theirs, where)
    values, set_by = configuration.parse(BenchConfig, argv, theirs)
    return configuration.build(BenchConfig, values, set_by, where if theirs else 'default')


def bench(cfg):
    """Run the benchmark that the options name and print its results. Raises UserError."""
    device = devices.pick_device(cfg.device)
    if cfg.vocab_size is None:                          # LARGE data sets take hours to prepare
        cfg.vocab_size = 50304 if cfg.dataset in LARGE else Dataset(
            locate(cfg.dataset, cfg.tokenizer)).padded_vocab_size
    measure = svd_benchmark.run if cfg.svd else (
        step_benchmark.decoding if cfg.decode else step_benchmark.steps)
    measure(cfg, device)


if __name__ == '__main__':
    sys.exit(main())

"""
Time whole training steps, paired: this repo's model without SVD against each SVD method and scope,
and against MLA, low-rank layers and adapters if the configuration has them, or against another
checkout's model.py. Or time decoding. Or measure what each SVD method costs and how good it is.

    python bench.py config/train_svd_test.py                     # the main job's model
    python bench.py config/train_svd_test.py --peer=../nanoGPT   # also against nanoGPT's GPT
    python bench.py config/train_svd_test.py --decode            # tokens/s and cache bytes
    python bench.py config/train_mla_test.py --decode            # MLA against ordinary attention
    python bench.py config/train_svd_test.py --svd --plot        # each SVD method, with a figure
    python bench.py --help

A step is forward, backward, clipping and the optimizer, on random tokens of the data set's
vocabulary. Decoding is greedy, from batch_size prompts of random tokens; the prefill is timed
apart. Everything compared is interleaved, so that a drifting machine slows all alike. --svd
measures on V of OUT_DIR/ckpt.pt, if there is a run of this shape, and on synthetic spectra;
tools/svd_benchmark.py explains its columns. The last line is JSON.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from runtime import cli             # before torch: says what is not installed

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
    """train.py's options, of which the model's, the batch's and the optimizer's matter here."""
    decode: Annotated[bool, 'time decoding instead of training steps', SWITCH,
                      configuration.Section('benchmark')] = False
    contexts: Annotated[str | None, "--decode: prompt lengths, as '16,128'; None: 3, 6, 14 16ths "
                        'of block_size'] = None
    tokens: Annotated[int | None, '--decode: tokens after each prompt, a sixteenth where nothing '
                      'is cached; None: 32, at most half of block_size', Range(2)] = None
    svd: Annotated[bool, 'cost and quality of each SVD method', SWITCH] = False
    plot: Annotated[bool | str, '--svd: a figure of error against time, as --plot=FILE.png or in '
                    'bench-svd.png', SWITCH, PATH] = False
    pairs: Annotated[int, 'timed pairs per comparison, or rounds', Range(2)] = 30
    peer: Annotated[str | None, 'folder with another model.py (nanoGPT) to time against',
                    PATH] = None

    def __post_init__(self):
        super().__post_init__()
        self.check_layers()                                         # no weights know better
        if self.tokens is None:
            self.tokens = max(2, min(32, self.block_size // 2))
        for name, default, fits, why in (
                ('plot', False, self.svd, 'only with --svd'),
                ('decode', False, not self.svd, 'not together with --svd'),
                ('peer', None, not self.svd, 'not together with --svd')):
            if getattr(self, name) != default and not fits:
                raise ValueError(f'{name}={getattr(self, name)!r}: {why}')
        if self.plot is True:
            self.plot = 'bench-svd.png'
        path = Path(self.plot or '.')
        if self.plot and (path.suffix.lower() != '.png' or not path.parent.is_dir()):
            raise ValueError(f'plot={self.plot!r}: must be a PNG in a folder that exists (nearest: '
                             f"'{path.stem}.png')")
        if self.peer and not (Path(self.peer) / 'model.py').is_file():
            raise ValueError(f'peer={self.peer!r}: has no model.py')


def main(argv=None):
    """-> exit code: 0 done, 2 wrong input (one line on stderr), 130 / 143 stopped."""
    return cli.run('bench.py', BenchConfig, __doc__, bench, argv, load_config)


def load_config(argv):
    """argv -> configuration, its defaults those of the run, folder or GPT-2 of init_from and of
    lora_adapter. Only shapes are taken from there: times do not depend on weights."""
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
    device = devices.pick_device(cfg.device)
    if cfg.vocab_size is None:                                      # BPE data take hours to prepare
        cfg.vocab_size = 50304 if cfg.dataset in LARGE else Dataset(
            locate(cfg.dataset, cfg.tokenizer)).padded_vocab_size
    measure = svd_benchmark.run if cfg.svd else (
        step_benchmark.decoding if cfg.decode else step_benchmark.steps)
    measure(cfg, device)


if __name__ == '__main__':
    sys.exit(main())

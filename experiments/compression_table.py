"""
Measure the loss that compression adds, by method and by fraction of the blocks' weights kept.

    python experiments/compression_table.py --dataset=input.txt  # run what is missing, draw
    python experiments/compression_table.py --run=False          # draw what is recorded

The models are 'small', nanoGPT's CPU recipe; 'wide', with 13 times as many parameters; and 'plays',
config/train_baseline_test.py on another text with a byte-level BPE, on which nothing was chosen.
train.py trains those that are not in out_dir yet. All methods get the same weights and the same
calibration text, without fine-tuning. experiments/equal_budget.py measures fine-tuning and smaller
models. The methods:

    plain               the SVD of the weights, method 'plain' of compress.py
    whitened            least error of each layer's outputs, method 'whitened' of compress.py
    SVD-LLM, MoDeGPT, Basis Sharing     published methods, see experiments/compression_peers.py
    ..., refined        a published method and then the refinement of the default
    default             method 'activation' of compress.py
    default, not refined        the same without its last step

'attention' rows keep a fraction of the weights of attention, and all of the MLPs: CLOVER, another
published method, and the default with --modules=attn.

Each line of experiments/compression_table.jsonl is a finished result. Finished results are not
computed again, so an interrupted run can be continued. All losses are over the whole validation
split. The figure is docs/compression.png.
"""

import copy
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from runtime import cli  # before torch: reports missing packages

import train
from model import GPT
from runtime import checkpoint as ckpt
from runtime import config as configuration
from runtime import plots
from runtime.config import PATH, Range, UserError
from runtime.data import Dataset, locate
from runtime.files import check_writable
from runtime.tracking import read_json_lines
from tools import model_compression as layers
from tools import sweep
from tools.calibration import Inputs, calibrate, calibration_windows
from tools.tables import format_table
from experiments.compression_peers import PEERS
from experiments.result_cache import Record

RECORD = Path(__file__).with_suffix('.jsonl')
FIGURE = ROOT / 'docs' / 'compression.png'
RECIPE = str(ROOT / 'config' / 'train_shakespeare_char.py')
MODELS = {
    'small': [
        RECIPE, '--block_size=64', '--batch_size=12', '--n_layer=4', '--n_head=4', '--n_embd=128',
        '--dropout=0', '--max_iters=2000', '--lr_decay_iters=2000', '--eval_iters=20',
        '--always_save_checkpoint=True'],
    'wide': [
        RECIPE, '--block_size=256', '--batch_size=8', '--n_layer=6', '--n_head=6', '--n_embd=384',
        '--dropout=0', '--max_iters=1000', '--lr_decay_iters=1000', '--warmup_iters=50',
        '--optimizer=muon', '--learning_rate=5e-3', '--min_lr=5e-4', '--beta2=0.95',
        '--eval_iters=8', '--always_save_checkpoint=True'],
    'plays': [str(ROOT / 'config' / 'train_baseline_test.py')]}
DATASETS = {'plays': 'plays'}       # of models that do not take the option dataset
KEEPS = (0.8, 0.6, 0.4)
CALIBRATION_TOKENS = 16384
SEED = 1337                         # of the original models; calibrations use 0, 1, ...
DEFAULT = 'default'


@dataclass
class TableConfig:
    """Options of the experiment."""
    dataset: Annotated[str, "text of 'small' and 'wide', as for train.py; the recorded results are "
                       'of Tiny Shakespeare', PATH] = 'shakespeare_char'
    out_dir: Annotated[str, 'folder of the trained models', PATH] = 'out-compression'
    models: Annotated[str, "some of 'small,wide,plays'"] = ','.join(MODELS)
    keeps: Annotated[str, 'fractions of the weights kept'] = ','.join(map(str, KEEPS))
    seeds: Annotated[int, 'calibrations per method', Range(1)] = 3
    run: Annotated[bool, 'False: only tables and figure'] = True

    def __post_init__(self):
        configuration.validate(self)
        for name, valid in (('models', tuple(MODELS)), ('keeps', tuple(map(str, KEEPS)))):
            wrong = [word for word in getattr(self, name).split(',') if word not in valid]
            if wrong:
                raise ValueError(
                    f'{name}={getattr(self, name)!r}: {wrong[0]!r} is not one of '
                    f'{", ".join(valid)} (nearest: {",".join(valid)!r})')


# --------------------------------------------------------------------------------------------------
# methods: functions of a copy of the model, of windows and of the fraction kept

def plain(model, windows, keep):
    return layers.compress_model(model, 'plain', (), keep=keep)


def own(method, model, windows, keep, modules=None):
    return layers.compress_model(model, method, windows, modules, keep)


def not_refined(model, windows, keep):
    return layers.narrow_layers(model, windows, layers.MODULES, keep, Inputs())


def refined(peer, model, windows, keep):
    inputs = Inputs()
    calibrate(model, dict(ln_f=model.transformer.ln_f), dict(ln_f=inputs), windows, 0)
    new = peer(model, windows, keep)
    layers.refine(new, windows, inputs.batches, layers.MODULES)
    return new


METHODS = {'plain': plain, 'whitened': partial(own, 'whitened')}
METHODS |= {name: peer for name, peer in PEERS.items() if name != 'CLOVER'}
METHODS |= {f'{name}, refined': partial(refined, PEERS[name])
            for name in ('SVD-LLM', 'MoDeGPT, SVD of q k')}
METHODS |= {'default, not refined': not_refined, DEFAULT: partial(own, 'activation')}
ATTENTION = {'attention: CLOVER': PEERS['CLOVER'],
             'attention: default': partial(own, 'activation', modules='attn')}
RIVALS = [name for name in METHODS if name in PEERS]    # the published methods of the first table


# --------------------------------------------------------------------------------------------------
# results

def block_params(model):
    return sum(p.numel() for p in model.transformer.h.parameters())


def loss_of(model, data):
    return layers.validation_loss(model, data, 'cpu', SEED)


def trained(cfg, name):
    """Return the original model of this name, trained by train.py if it is not in out_dir yet.
    Raises UserError if the training fails."""
    folder = Path(cfg.out_dir) / f'{name}-dense-{SEED}'
    argv = [*MODELS[name], f'--dataset={DATASETS.get(name, cfg.dataset)}',
            f'--out_dir={folder}', f'--seed={SEED}', '--device=cpu']
    steps = configuration.parse(train.TrainConfig, argv)[0]['max_iters']
    failures = []
    job = sweep.Job(folder.name, folder, steps, [str(ROOT / 'train.py'), *argv], None)
    if sweep.run_all([job], 1, lambda job, code, seconds: failures.append(
            sweep.failure(job, code))):
        raise UserError(failures[0])
    return GPT.from_checkpoint(ckpt.load(folder / 'ckpt.pt')).eval().requires_grad_(False)


def make(cfg, record, name):
    """Add all rows of a model to the record."""
    data = Dataset(locate(DATASETS.get(name, cfg.dataset), 'char'))
    dense = trained(cfg, name)
    record.make(lambda: {'loss': loss_of(dense, data), 'block_params': block_params(dense)},
                model=name, method='dense', seed=SEED)
    for seed in range(cfg.seeds):
        windows = calibration_windows(data, CALIBRATION_TOKENS, dense.config.block_size, seed,
                                      'cpu')
        for keep in map(float, cfg.keeps.split(',')):
            for label, method in {**METHODS, **ATTENTION}.items():
                if label == 'plain' and seed:                       # the seed has no effect
                    continue

                def result():
                    start = time.perf_counter()
                    new = method(copy.deepcopy(dense), windows, keep)
                    seconds = time.perf_counter() - start
                    return {'loss': loss_of(new, data), 'block_params': block_params(new),
                            'compress_seconds': round(seconds, 2)}
                record.make(result, model=name, method=label, keep=keep, seed=seed)


# --------------------------------------------------------------------------------------------------
# tables and figure

def found(rows, name, label, keep, field='loss'):
    """Return seed -> value of a field of a method's rows. Losses are relative to the original
    model's."""
    base = row_of(rows, name)['loss'] if field == 'loss' else 0
    return {row['seed']: row[field] - base for row in rows
            if (row['model'], row['method'], row.get('keep')) == (name, label, keep)}


def row_of(rows, name):
    """Return the row of the original model."""
    return next(row for row in rows if (row['model'], row['method']) == (name, 'dense'))


def cell(values):
    """Return the mean of losses added, and their standard deviation over seeds, as text."""
    values = [*values.values()]
    if not values:
        return ''
    mean = f'{round(statistics.mean(values), 4) + 0.0:.4f}'                     # + 0: no -0
    return mean + (f' +- {statistics.stdev(values):.4f}' if len(values) > 1 else '')


def table(rows, name):
    """Return the losses that the methods add to a model, and their seconds, as text."""
    head = row_of(rows, name)
    cells = [['loss added, nats per token', *(f'keep {keep}' for keep in KEEPS), 'seconds']]
    for label in (*METHODS, *ATTENTION):
        seconds = found(rows, name, label, KEEPS[-1], 'compress_seconds').values()
        cells.append([label, *(cell(found(rows, name, label, keep)) for keep in KEEPS),
                      f'{statistics.median(seconds):.1f}' if seconds else ''])
    return '\n'.join([
        f'{name}: {head["block_params"]:,} parameters in the blocks, loss {head["loss"]:.4f}; '
        'seconds: median', *format_table(cells), *margins(rows, name)])


def margins(rows, name):
    """Return lines that compare the default with the best published method, paired by seed."""
    lines = []
    for keep in KEEPS:
        losses = {label: found(rows, name, label, keep) for label in (*RIVALS, DEFAULT)}
        if not all(len(one) > 1 for one in losses.values()):
            continue
        best = min(RIVALS, key=lambda label: statistics.mean(losses[label].values()))
        gains = [losses[best][seed] - loss for seed, loss in losses[DEFAULT].items()]
        seconds = [statistics.median(found(rows, name, label, keep, 'compress_seconds').values())
                   for label in (DEFAULT, best)]
        lines.append(
            f'keep {keep}: {statistics.mean(gains):.4f} (standard error '
            f'{statistics.stdev(gains) / len(gains) ** 0.5:.4f}) less than {best}, in '
            f'{seconds[0] / seconds[1]:.2f} times its seconds')
    return lines


def plot(rows, names):
    """Draw loss added against the fraction kept, one panel per model, and write it to FIGURE."""
    figure, axes = plots.page(1, len(names), (4.2 * len(names), 4.2))
    for axis, name in zip(axes[0], names):
        for i, label in enumerate(METHODS):
            points = {keep: [*found(rows, name, label, keep).values()] for keep in KEEPS}
            # the axis is logarithmic
            points = {keep: values for keep, values in points.items()
                      if values and statistics.mean(values) > 0}
            axis.plot([*points], [statistics.mean(values) for values in points.values()],
                      'o-' if label == DEFAULT else '.--', color=f'C{i}', label=label,
                      lw=2 if label == DEFAULT else 1.2)
        axis.set(yscale='log', xlabel="fraction of the blocks' weights kept", xlim=(0.83, 0.37),
                 title=f"'{name}', {row_of(rows, name)['block_params'] / 1e6:.2f} million")
        axis.set_xticks(KEEPS, KEEPS)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel('validation loss added, nats per token')
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside right center', fontsize=8)
    figure.suptitle('Loss added by compression, mean over calibration seeds (no point: the loss '
                    'fell)', fontsize=10)
    plots.save(figure, FIGURE)


def main(argv=None):
    """Run the command. Returns the exit code: 0 done, 2 wrong input or failed training, 130 or 143
    stopped by a signal."""
    return cli.run('compression_table.py', TableConfig, __doc__, experiment, argv)


def experiment(cfg):
    """Run what is missing, print the tables and draw the figure. Raises UserError."""
    plots.require_matplotlib(f'the figure {FIGURE}', FIGURE)
    if not cfg.run and not RECORD.exists():
        raise UserError(f'run=False: {RECORD} does not exist yet (nearest: --run=True)')
    if cfg.run:
        check_writable(Path(cfg.out_dir) / 'ckpt.pt', f'out_dir={cfg.out_dir!r}')
        record = Record(RECORD)
        for name in cfg.models.split(','):
            make(cfg, record, name)
    rows = read_json_lines(RECORD)
    names = [name for name in MODELS if any(row['model'] == name for row in rows)]
    print('\n\n'.join(table(rows, name) for name in names))
    plot(rows, names)
    print(f'figure: {FIGURE}')


if __name__ == '__main__':
    sys.exit(main())

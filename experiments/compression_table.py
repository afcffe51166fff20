"""
Measure the loss that low-rank layers add, by method and by fraction of the blocks' weights kept.

    python experiments/compression_table.py --dataset=input.txt  # run what is missing, draw
    python experiments/compression_table.py --run=False          # draw what is recorded

The models are 'small', nanoGPT's CPU recipe, and 'wide', which has 13 times as many parameters.
train.py trains the models that are not in out_dir yet. The tables compare methods on the same
weights, without fine-tuning. experiments/equal_budget.py measures fine-tuning and smaller models.
The methods:

    plain               the SVD of the weights
    FWSVD               rows weighted by the root of their Fisher information (arXiv:2207.00112)
    ASVD                columns scaled by the root of the mean absolute value of their input
                        (arXiv:2312.05821)
    whitened            least error of each layer's outputs (SVD-LLM, arXiv:2403.07378), method
                        'whitened' of compress.py
    + bias              whitened, and each layer gets a bias that compensates for the mean error;
                        the biases count as weights kept
    + output metric     whitened, with errors weighted by the loss's gradients at the outputs
    + budgeted ranks    '+ output metric' with ranks chosen over all layers together
    + anchored          '+ budgeted ranks' with each layer fitted to the inputs that it gets in the
                        compressed model, method 'activation' of compress.py
    anchored, uniform ranks     '+ anchored' without the choice of ranks

Each line of experiments/compression_table.jsonl is a finished result. Finished results are not
computed again, so an interrupted run can be continued. All losses are over the whole validation
split. The figure is docs/compression.png.
"""

import copy
import statistics
import sys
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from runtime import cli  # before torch: reports missing packages

import torch
from torch import nn

import train
from lowrank.factorization import Factorization
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
        '--eval_iters=8', '--always_save_checkpoint=True']}
KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
CALIBRATION_TOKENS = 16384
SEED = 1337                         # of the original models; calibrations use 0, 1, ...


@dataclass
class TableConfig:
    """Options of the experiment."""
    dataset: Annotated[str, 'as for train.py; the recorded results are of Tiny Shakespeare',
                       PATH] = 'shakespeare_char'
    out_dir: Annotated[str, 'folder of the trained models', PATH] = 'out-compression'
    models: Annotated[str, "'small', 'wide' or 'small,wide'"] = 'small,wide'
    keeps: Annotated[str, 'fractions of the weights kept'] = ','.join(
        map(str, KEEPS))
    seeds: Annotated[int, 'calibrations per method', Range(1)] = 3
    run: Annotated[bool, 'False: only tables and figure'] = True

    def __post_init__(self):
        configuration.validate(self)
        for name, valid in (('models', tuple(MODELS)),
                            ('keeps', tuple(map(str, KEEPS)))):
            wrong = [word for word in getattr(self, name).split(',') if word not in valid]
            if wrong:
                raise ValueError(
                    f'{name}={getattr(self, name)!r}: {wrong[0]!r} is not one of '
                    f'{", ".join(valid)} (nearest: {",".join(valid)!r})')


# --------------------------------------------------------------------------------------------------
# methods

class Scaled:
    """SVD of a weight (m, n) whose rows and columns are scaled. The interface is that of
    `Factorization`.

    rows (m), columns (n): nonnegative scales, or None if all are 1. `energies` (s) are the squared
    singular values of the scaled weight. The factors contain the inverse scales.
    """

    def __init__(self, weight, rows=None, columns=None):
        weight = weight.detach().double()                           # (m, n)
        self.rows, self.columns = (
            torch.ones(size, dtype=torch.float64) if scales is None else positive(scales)
            for scales, size in zip((rows, columns), weight.shape))
        self.u, self.s, self.vh = torch.linalg.svd(self.rows[:, None] * weight * self.columns,
                                                   full_matrices=False)
        self.energies = self.s.square()

    def factors(self, rank):
        """Return U (m, r) and A (r, n) for a rank r."""
        root = self.s[:rank].sqrt()
        return (self.u[:, :rank] * root / self.rows[:, None],
                root[:, None] * self.vh[:rank] / self.columns)


def positive(scales):
    """Return scales with zeros replaced by a millionth of the mean, because scales are divisors."""
    return scales.double().clamp_min(scales.double().mean().clamp_min(1e-300) * 1e-6)


class Weights:
    """The weight of a layer without calibration statistics, for the plain SVD."""

    def __init__(self, layer, block_size):
        self.weight, self.mean = (
            layer.weight, torch.zeros(layer.weight.size(1), dtype=torch.float64))

    def factorization(self):
        return Factorization(self.weight)


class FisherRows(Weights):
    """FWSVD: scale rows by the root of the Fisher information, summed over the weights of the row.
    Fisher information is the squared gradient of a window's loss, summed over windows."""

    def __init__(self, layer, block_size):
        super().__init__(layer, block_size)
        self.block_size, self.information = block_size, 0

    def add(self, x, g):
        """Add inputs x (N, n) and gradients g (N, m) at the tokens of whole windows."""
        x, g = (t.unflatten(0, (-1, self.block_size)) for t in (x, g))  # (B, T, n), (B, T, m)
        gradients = g.mT @ x                                        # (B, m, n)
        self.information = self.information + gradients.double().square().sum((0, 2))  # (m)

    def factorization(self):
        return Scaled(self.weight, rows=self.information.sqrt())


class InputSizes(Weights):
    """ASVD: scale columns by the root of the mean absolute value of their input (alpha = 1/2)."""

    def __init__(self, layer, block_size):
        super().__init__(layer, block_size)
        self.tokens, self.sizes = 0, 0

    def add(self, x, g=None):
        """Add inputs x (N, n)."""
        self.tokens, self.sizes = self.tokens + len(x), self.sizes + x.double().abs().sum(0)  # (n)

    def factorization(self):
        return Scaled(self.weight, columns=(self.sizes / self.tokens).sqrt())


def whitening(layer, block_size):
    return layers.LayerStats(layer.weight, layer.bias is not None)


def share_with_biases(energies, shapes, keep):
    """Return ranks as `uniform_share` does, with the biases of `add_biases` counted in `keep`."""
    biases = sum(m for m, _ in shapes.values()) / sum(m * n for m, n in shapes.values())
    return layers.uniform_share(energies, shapes, keep - biases)


Method = namedtuple('Method', 'statistics gradients choose biases anchored',
                    defaults=(False, False))
METHODS = {
    'plain': Method(Weights, None, layers.uniform_share),           # None: no calibration
    'FWSVD': Method(FisherRows, True, layers.uniform_share),
    'ASVD': Method(InputSizes, False, layers.uniform_share),
    'whitened': Method(whitening, False, layers.uniform_share),
    '+ bias': Method(whitening, False, share_with_biases, biases=True),
    '+ output metric': Method(whitening, True, layers.uniform_share),
    '+ budgeted ranks': Method(whitening, True, layers.best_share),
    '+ anchored': Method(whitening, True, layers.best_share, anchored=True),
    'anchored, uniform ranks': Method(whitening, True, layers.uniform_share, anchored=True),
}
DEFAULT = '+ anchored'


def add_biases(linears):
    """Give each layer without a bias a bias of zeros."""
    for layer in linears:
        if layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros_like(layer.weight[:, 0]), requires_grad=False)


def measure(dense, method, windows):
    """Calibrate a copy of the original model. Returns three objects: the copy, in which fused
    layers are split; a dict name -> statistics; and a dict name -> factorization."""
    model = copy.deepcopy(dense)
    linears = layers.dense_layers(model, layers.layer_names(model))
    if method.biases:
        add_biases(linears.values())
    seen = {name: method.statistics(layer, model.config.block_size)
            for name, layer in linears.items()}
    if method.gradients is not None:
        layers.calibrate(model, linears, seen, windows, method.gradients)
    return model, seen, {name: one.factorization() for name, one in seen.items()}


def factored(measured, method, keep, windows):
    """Return a low-rank copy of the model of `measure` that keeps this fraction of the weights."""
    model, seen, factorizations = measured
    new = copy.deepcopy(model)
    energies = {name: one.energies for name, one in factorizations.items()}
    shapes = {name: tuple(one.weight.shape) for name, one in seen.items()}
    ranks = method.choose(energies, shapes, keep)
    ranks = {name: rank for name, rank in ranks.items() if rank is not None}
    if method.anchored:
        layers.compress_sequentially(new, model, seen, ranks, windows)
    for name in () if method.anchored else ranks:
        mean = seen[name].mean
        layers.replace_linear(new, name, factorizations[name].factors(ranks[name]), mean, mean)
    return layers.sync_config(new)


# --------------------------------------------------------------------------------------------------
# results

class Results(Record):
    """Record of model losses. A function result() returns a loss, its model and a dict of other
    fields."""

    def make(self, result, **key):
        def fields():
            loss, model, more = result()
            return {'loss': loss, 'block_params': block_params(model)} | more
        return super().make(fields, **key)


def block_params(model):
    return sum(p.numel() for p in model.transformer.h.parameters())


def loss_of(model, data):
    return layers.validation_loss(model, data, 'cpu', SEED)


def trained(cfg, name):
    """Return the original model of this name, trained by train.py if it is not in out_dir yet.
    Raises UserError if the training fails."""
    folder = Path(cfg.out_dir) / f'{name}-dense-{SEED}'
    argv = [*MODELS[name], f'--dataset={cfg.dataset}', f'--out_dir={folder}', f'--seed={SEED}',
            '--device=cpu']
    steps = configuration.parse(train.TrainConfig, argv)[0]['max_iters']
    failures = []
    job = sweep.Job(folder.name, folder, steps, [str(ROOT / 'train.py'), *argv], None)
    if sweep.run_all([job], 1, lambda job, code, seconds: failures.append(
            sweep.failure(job, code))):
        raise UserError(failures[0])
    return GPT.from_checkpoint(ckpt.load(folder / 'ckpt.pt')).eval().requires_grad_(False)


def methods(cfg, record, name, dense, data):
    """Add the rows of all methods at all fractions of the weights kept. Methods with the same
    statistics share one calibration."""
    for seed in range(cfg.seeds):
        windows, known = layers.calibration_windows(
            data, CALIBRATION_TOKENS, dense.config.block_size, seed, 'cpu'), {}
        for label, method in METHODS.items():
            if method.gradients is None and seed:                   # the seed has no effect
                continue
            for keep in map(float, cfg.keeps.split(',')):
                def result():
                    measures = method[:2] + (method.biases,)
                    if measures not in known:
                        known[measures] = measure(dense, method, windows)
                    new = factored(known[measures], method, keep, windows)
                    return (loss_of(new, data), new,
                            {'ranks': new.config.layer_ranks} if label == DEFAULT else {})
                record.make(result, model=name, method=label, keep=keep, seed=seed)


def make(cfg, record, name, data):
    """Add all rows of a model to the record."""
    dense = trained(cfg, name)
    record.make(lambda: (loss_of(dense, data), dense, {}), model=name, method='dense', seed=SEED)
    methods(cfg, record, name, dense, data)


# --------------------------------------------------------------------------------------------------
# tables and figure

def added(rows, name, **key):
    """Return the loss that the rows with this key add to the original model's, or None without
    rows. The result is (mean, standard deviation over seeds, number of seeds). The deviation of one
    seed is 0."""
    base = row_of(rows, name)['loss']
    key = dict(key, model=name)
    found = [row['loss'] - base for row in rows if all(row.get(k) == v for k, v in key.items())]
    return (statistics.mean(found), statistics.stdev(found) if len(found) > 1 else 0.0,
            len(found)) if found else None


def cell(found):
    if found is None:
        return ''
    mean, spread, count = found
    return f'{round(mean, 4) + 0.0:.4f}' + (f' +- {spread:.4f}' if count > 1 else '')  # + 0: no -0


def table(rows, name):
    """Return a Markdown table with one row per method and one column per fraction kept."""
    head, line = row_of(rows, name), '|---' * (len(KEEPS) + 1) + '|'
    lines = [
        f'{name}: {head["block_params"]:,} parameters in the blocks, loss {head["loss"]:.4f}; loss '
        'added in nats per character, without fine-tuning', '',
        '| fraction kept | ' + ' | '.join(map(str, KEEPS)) + ' |', line]
    for label in METHODS:
        cells = [cell(added(rows, name, method=label, keep=keep)) for keep in KEEPS]
        lines += [f'| {label} | ' + ' | '.join(cells) + ' |'] if any(cells) else []
    return '\n'.join(lines)


def row_of(rows, name):
    """Return the row of the original model."""
    return next(row for row in rows if (row['model'], row['method']) == (name, 'dense'))


def plot(rows, names):
    """Draw loss added against the fraction kept, one panel per model, and write it to FIGURE."""
    figure, axes = plots.page(1, len(names), (5.2 * len(names), 4.6))
    for axis, name in zip(axes[0], names):
        draw(axis, rows, name)
    axes[0, 0].set_ylabel('validation loss added, nats per character')
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside right center', fontsize=8)
    seeds = ', '.join(map(str, sorted({row['seed'] for row in rows
                                       if row['method'] == DEFAULT})))
    figure.suptitle(
        f'Loss added by compression: mean and standard deviation over calibration seeds {seeds} '
        '(no bar: one seed; no point: the loss fell)', fontsize=10)
    plots.save(figure, FIGURE)


def draw(axis, rows, name):
    """Draw the panel of a model: the loss that each method adds."""
    for i, label in enumerate(METHODS):
        found = {keep: added(rows, name, method=label, keep=keep) for keep in KEEPS}
        # the axis is logarithmic
        found = {keep: one for keep, one in found.items() if one is not None and one[0] > 0}
        low = [min(spread, 0.9 * mean) for mean, spread, _ in found.values()]
        axis.errorbar([keep + 0.002 * (i - 4) for keep in found],
                      [mean for mean, _, _ in found.values()],
                      [low, [spread for _, spread, _ in found.values()]], fmt='o-', color=f'C{i}',
                      capsize=2, markersize=3.5, lw=1.3, label=label)
    axis.set(
        yscale='log', xlabel="fraction of the blocks' weights kept", xlim=(0.93, 0.37),
        title=f"'{name}', {row_of(rows, name)['block_params'] / 1e6:.2f} million block parameters")
    axis.set_xticks(KEEPS, KEEPS)
    axis.grid(alpha=0.3)


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
        data = Dataset(locate(cfg.dataset, 'char'))
        record = Results(RECORD)
        for name in cfg.models.split(','):
            make(cfg, record, name, data)
    rows = read_json_lines(RECORD)
    names = [name for name in MODELS if any(row['model'] == name for row in rows)]
    print('\n\n'.join(table(rows, name) for name in names))
    plot(rows, names)
    print(f'figure: {FIGURE}')


if __name__ == '__main__':
    sys.exit(main())

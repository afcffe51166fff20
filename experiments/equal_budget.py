"""
Compare dense and low-rank models at equal bytes and at equal training compute.

    python experiments/equal_budget.py --dataset=input.txt  # run what is missing, draw
    python experiments/equal_budget.py --run=False          # draw what is recorded
    python experiments/equal_budget.py --dataset=input.txt --arms=gqa-1,mla-16 --budgets=steps \\
        --record=again.jsonl --out_dir=out-again            # repeat two arms

All models are variants of config/train_baseline_test.py, called dense-4x128: 4 layers of width 128.
The families of arms:

    dense       other numbers of layers and other widths, heads of 32
    gqa         fewer heads of keys and values
    mla         multi-head latent attention
    weight      SVD of the weights of V, or of K and V, in every forward pass
    causal      the same of V itself, with a basis from earlier tokens
    factored    low-rank layers with the ranks of 'compressed', trained from scratch
    to-mla, to-gqa, to-heads, compressed        dense-4x128 after training, changed by compress.py;
                with '-tuned', TUNING_STEPS steps of fine-tuning follow

Arms are trained from scratch for as many steps as dense-4x128 ('steps'), and for the steps that
cost as much compute as dense-4x128 ('compute') or half of it ('half'). FLOPs are counted in a real
training step with the optimizer: all matrix products, attention over all T x T pairs, and 9 n^3 per
eigendecomposition (Golub and Van Loan, 8.3). Evaluation does not count.

Losses are prefix-only, over the whole validation split. Intervals are 95% intervals of Student's t
distribution over seeds. Differences are paired by seed, which fixes the batches.

Each line of experiments/equal_budget.jsonl is a finished run. Finished runs are not repeated, so an
interrupted experiment can be continued. Checkpoints stay in out_dir, one folder per text and run,
and sample.py can load them. A conversion needs the checkpoint of dense-4x128 with the same seed,
which is trained again if it is missing. The figure is docs/frontier.png.
"""

import json
import math
import sys
from collections import namedtuple
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from runtime import cli  # before torch: reports missing packages

import torch
from torch.utils.flop_counter import (FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count)

from model import GPT
from runtime import checkpoint as ckpt
from runtime import config as configuration
from runtime import plots
from runtime.config import PATH, Range, UserError
from runtime.data import Dataset, locate
from runtime.files import check_writable
from runtime.tracking import read_json_lines
from tools import sweep
from tools.step_benchmark import new_model, random_tokens, step_of
from tools.sweep_report import t_interval
from tools.tables import format_table
from train import TrainConfig
from experiments.result_cache import Record

RECORD = Path(__file__).with_suffix('.jsonl')
FIGURE = ROOT / 'docs' / 'frontier.png'
RECIPE = str(ROOT / 'config' / 'train_baseline_test.py')
BASE, STEPS, RATE = 'dense-4x128', 1200, 3.5e-3
RATES = {}                          # family -> learning rate, where it is not RATE
RATE_SEED = 11                      # learning rates are chosen on a seed that counts nowhere else
TUNING_STEPS = 120                  # 10% more
CALIBRATION_STEPS = 16              # steps with as many tokens as compress.py's calibration
SHARES = {'compute': 1, 'half': 0.5}            # budget -> fraction of the compute of BASE
TOLERANCE = 0.02                    # of the steps; budgets that differ by less share their runs

TEXT = '86c4e6aa'                   # of the figure: start of the sha256 of Tiny Shakespeare
# cost, limit: fraction of the cost of BASE, or for 'flops' a budget
LIMITS = (('cache_bytes', 1 / 4), ('cache_bytes', 1 / 8), ('parameter_bytes', 0.6),
          ('parameter_bytes', 0.44), ('flops', 'compute'), ('flops', 'half'))
LABELS = {'cache_bytes': 'cache bytes', 'parameter_bytes': 'parameter bytes',
          'flops': 'training compute'}
HIGHEST = 0.2                       # of the figure, nats above BASE
# family -> color, marker, line; a conversion has the color of the family that it makes
LOOKS = {'dense': ('0.25', 'o', '-'),
         **{family: (colour, marker, '-') for family, colour, marker in zip(
             ('gqa', 'mla', 'weight', 'causal', 'factored'), plots.COLOURS, plots.MARKERS[1:])},
         'to-gqa': (plots.COLOURS[0], 's', ':'), 'to-mla': (plots.COLOURS[1], '^', ':'),
         'to-heads': (plots.COLOURS[5], 'X', ':'), 'compressed': (plots.COLOURS[4], 'P', ':')}

# Ranks of low-rank layers that are trained from scratch, one row per block, 0: dense. They are
# those of compressed-0.55, ... with seed 1337. Equal ranks in all layers were worse
# (docs/RESULTS.md).
FACTORED_LAYERS = ('attn.c_attn.c_q', 'attn.c_attn.c_k', 'attn.c_attn.c_v', 'attn.c_proj',
                   'mlp.c_fc', 'mlp.c_proj')
FACTORED_RANKS = {
    0.55: ((40, 32, 40, 0, 64, 0), (16, 16, 24, 16, 80, 64), (16, 16, 24, 16, 80, 40),
           (16, 16, 24, 16, 64, 24)),
    0.4: ((32, 32, 32, 56, 56, 64), (8, 16, 16, 8, 56, 48), (8, 16, 16, 16, 56, 24),
          (8, 8, 16, 16, 40, 24)),
    0.25: ((16, 24, 24, 48, 40, 40), (8, 8, 8, 8, 32, 24), (8, 8, 8, 8, 32, 16),
           (8, 8, 8, 8, 24, 16))}


def svd(scope, targets, rank):
    return dict(use_svd=True, svd_scope=scope, svd_targets=targets, svd_rank=rank)


def layer_ranks(blocks):
    return dict(layer_ranks={f'h.{i}.{name}': rank for i, ranks in enumerate(blocks)
                             for name, rank in zip(FACTORED_LAYERS, ranks) if rank})


# family -> name -> options of train.py
TRAINED = {
    'dense': {'4x128': {},
              '4x160': dict(n_embd=160, n_head=5),
              '4x96': dict(n_embd=96, n_head=3),
              '4x64': dict(n_embd=64, n_head=2),
              '3x128': dict(n_layer=3),
              '3x96': dict(n_layer=3, n_embd=96, n_head=3),
              '2x128': dict(n_layer=2),
              '2x64': dict(n_layer=2, n_embd=64, n_head=2)},
    'gqa': {'2': dict(n_kv_head=2),
            '1': dict(n_kv_head=1),
            '1-of-8': dict(n_head=8, n_kv_head=1)},                 # heads of 16
    'mla': {size: dict(use_mla=True, mla_latent_dim=size) for size in (64, 32, 16)},
    'weight': {'v-8': svd('weight', 'v', 8),
               **{f'kv-{rank}': svd('weight', 'k,v', rank) for rank in (16, 8, 4)}},
    'causal': {'v-8': svd('causal', 'v', 8),
               'kv-8': svd('causal', 'k,v', 8)},
    'factored': {keep: layer_ranks(blocks) for keep, blocks in FACTORED_RANKS.items()}}
# family -> name -> options of compress.py
CONVERTED = {
    'to-mla': {size: dict(to='mla', mla_latent_dim=size) for size in (64, 32, 16)},
    'to-gqa': {heads: dict(to='gqa', n_kv_head=heads) for heads in (2, 1)},
    'to-heads': {keep: dict(to='lowrank_heads', keep=keep) for keep in (0.5, 0.25, 0.125)},
    'compressed': {keep: dict(keep=keep) for keep in (0.55, 0.4, 0.25)}}

# An arm. options: of train.py, or of compress.py for a conversion of BASE
Arm = namedtuple('Arm', 'family options is_conversion')
ARMS = {f'{family}-{name}': Arm(family, options, False)
        for family, arms in TRAINED.items() for name, options in arms.items()}
ARMS |= {f'{family}-{name}{suffix}': Arm(family, options | tuning, True)
         for family, arms in CONVERTED.items() for name, options in arms.items()
         for suffix, tuning in (('', {}), ('-tuned', dict(finetune_iters=TUNING_STEPS)))}
# the control of fine-tuning: keep=1 leaves all layers dense
ARMS[f'{BASE}-tuned'] = Arm('dense', dict(keep=1.0, finetune_iters=TUNING_STEPS), True)
# arms that are also trained with the compute of BASE, and with half of it
COMPUTE_ARMS = ('dense-4x128', 'dense-4x160', 'dense-4x96', 'dense-4x64', 'dense-3x128',
                'dense-2x128', 'gqa-1', 'gqa-1-of-8', 'mla-64', 'mla-32', 'weight-v-8',
                'weight-kv-16', 'causal-v-8', 'factored-0.55', 'factored-0.4')

# A training run of an arm
Run = namedtuple('Run', 'arm steps learning_rate seed')


@dataclass
class BudgetConfig:
    """Options of the experiment."""
    dataset: Annotated[str, 'as for train.py; the recorded results are of Tiny Shakespeare',
                       PATH] = 'shakespeare_char'
    tokenizer: Annotated[Literal['char', 'gpt2'], 'tokens of a text file'] = 'char'
    out_dir: Annotated[str, 'folder of the runs', PATH] = 'out-budget'
    record: Annotated[str | None, 'file of the results; None: experiments/equal_budget.jsonl, from '
                      'which the figure is drawn', PATH] = None
    arms: Annotated[str, "'all' or names, separated by commas"] = 'all'
    budgets: Annotated[str, "'steps', 'compute', 'half', or several of them; COMPUTE_ARMS have "
                       "all, the others 'steps'"] = 'steps,compute,half'
    seeds: Annotated[str, 'seeds, separated by commas'] = '1337,1338,1339,1340,1341'
    rates: Annotated[str | None, f'learning rates to try with --seeds={RATE_SEED}, separated by '
                     "commas; None: the arms' own"] = None
    jobs: Annotated[int, 'runs at a time, which share the threads', Range(1)] = 2
    run: Annotated[bool, 'False: only tables and figure'] = True

    def __post_init__(self):
        configuration.validate(self)
        for name, valid in (('arms', ['all', *ARMS]), ('budgets', ['steps', *SHARES])):
            wrong = [word for word in getattr(self, name).split(',') if word not in valid]
            if wrong:
                raise ValueError(f'{name}={getattr(self, name)!r}: {wrong[0]!r} is not one of '
                                 f'{", ".join(valid)} (nearest: {valid[0]!r})')
        for name, kind in (('seeds', int), ('rates', float)):
            self.numbers(name, kind)

    def numbers(self, name, kind):
        """Return the option `name` as a list of int or float. Raises ValueError."""
        words = (getattr(self, name) or '').split(',')
        try:
            return [kind(word) for word in words if word or name == 'seeds']
        except ValueError:
            raise ValueError(
                f'{name}={getattr(self, name)!r}: must be numbers, separated by commas (nearest: '
                f'{getattr(BudgetConfig, name)})') from None

    def planned(self, data):
        """Return the Runs that the options ask for, from-scratch ones first."""
        runs = []
        for seed, name in product(self.numbers('seeds', int), ARMS):
            if self.arms != 'all' and name not in self.arms.split(','):
                continue
            budgets = [budget for budget in self.budgets.split(',')
                       if budget == 'steps' or name in COMPUTE_ARMS]
            ratio = 1 if budgets == ['steps'] else step_flops(settings(name, data)) / step_flops(
                settings(BASE, data))
            runs += [Run(name, steps_for(budget, ratio), rate, seed) for budget, rate in product(
                budgets, self.numbers('rates', float) or [rate_of(name)])]
        return sorted(dict.fromkeys(runs), key=lambda run: ARMS[run.arm].is_conversion)


def rate_of(name):
    """Return the learning rate of an arm. Conversions have that of BASE."""
    return RATES.get(ARMS[name].family, RATE)


def steps_for(budget, ratio):
    """Return the steps of an arm in a budget. ratio: FLOPs per step of the arm / those of BASE."""
    share = SHARES.get(budget, 1)
    is_equal = budget == 'steps' or abs(1 / ratio - 1) <= TOLERANCE
    return round(STEPS * share / (1 if is_equal else ratio))


# --------------------------------------------------------------------------------------------------
# costs

# The shapes of the arguments -> FLOPs, of operations that FlopCounterMode does not know
FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *others, **more: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *others, **more: sdpa_backward_flop_count(grad, q, k, v),
    torch.ops.aten._linalg_eigh:
        lambda a, *others, **more: 9 * math.prod(a[:-2]) * a[-1] ** 3}


def settings(name, data):
    """Return the TrainConfig of an arm, or that of BASE for a conversion."""
    options = {} if ARMS[name].is_conversion else ARMS[name].options
    return configuration.load(TrainConfig, [
        RECIPE, f'--vocab_size={data.padded_vocab_size}', *options_of(options)])[0]


def options_of(options):
    return [f'--{key}={value!r}' for key, value in options.items()]


def count_flops(f):
    """Return the FLOPs of f()."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        f()
    return counter.get_total_flops()


def step_flops(cfg):
    """Return the FLOPs of a training step with its optimizer. cfg: TrainConfig."""
    return count_flops(step_of(cfg, 'cpu'))


def forward_flops(cfg):
    """Return the FLOPs of a forward pass of one batch. cfg: TrainConfig."""
    model, (x, y) = new_model(cfg, 'cpu'), random_tokens(cfg, 'cpu')
    with torch.no_grad():
        return count_flops(lambda: model(x, y))


def costs(run, saved, data):
    """Return the costs of a finished run as a dict. saved: its checkpoint.

    flops: of all training, for a conversion with that of BASE, the calibration, and the teacher of
    fine-tuning; parameter_bytes: with position embeddings; cache_bytes: per token of a full
    context, float32.
    """
    arm, cfg, model = ARMS[run.arm], settings(run.arm, data), GPT.from_checkpoint(saved)
    flops = run.steps * step_flops(cfg)
    if arm.is_conversion:
        calibration = 0 if arm.options.get('to') == 'gqa' else CALIBRATION_STEPS * step_flops(cfg)
        own = replace(cfg, **saved['model_args'])
        flops += calibration + arm.options.get('finetune_iters', 0) * (
            step_flops(own) + forward_flops(cfg))
    return dict(flops=flops, parameter_bytes=sum(p.nbytes for p in model.parameters()),
                cache_bytes=model.kv_cache_bytes(1, cfg.block_size) / cfg.block_size)


# --------------------------------------------------------------------------------------------------
# running

def donor(run):
    """Return the Run of BASE whose model a conversion changes."""
    return run._replace(arm=BASE)


def job_of(cfg, text, run):
    """Return the Job of a run. text: what identifies the text, the name of a folder in out_dir."""
    def folder(run):
        return Path(cfg.out_dir) / text / (
            f'{run.arm},steps={run.steps},rate={run.learning_rate:g},seed={run.seed}')
    arm, out = ARMS[run.arm], folder(run)
    argv = [*options_of(arm.options), f'--seed={run.seed}', '--device=cpu']
    if arm.is_conversion:
        return sweep.Job(out.name, out, None, [
            str(ROOT / 'compress.py'), f'--out_dir={str(folder(donor(run)))!r}',
            f'--save_dir={str(out)!r}', *argv], None)
    here = [f'--out_dir={str(out)!r}', '--device=cpu']
    return sweep.Job(out.name, out, run.steps, [
        str(ROOT / 'train.py'), RECIPE, *argv, *here, f'--dataset={cfg.dataset!r}',
        f'--tokenizer={cfg.tokenizer}', f'--max_iters={run.steps}',
        f'--warmup_iters={run.steps // 20}', f'--learning_rate={run.learning_rate}',
        f'--min_lr={run.learning_rate / 10}', '--eval_iters=1', f'--eval_interval={run.steps}',
        '--log_interval=100'], [str(ROOT / 'train.py'), '--init_from=resume', *here])


def run_missing(cfg, record, data):
    """Run what the record lacks, in parallel, and add it. Raises UserError if a run fails."""
    text = data.meta['sha256'][:8]

    def key(run):
        return run._asdict() | {'text': text}
    todo = [run for run in cfg.planned(data) if record.find(**key(run)) is None]
    conversions = [run for run in todo if ARMS[run.arm].is_conversion]
    trained = [run for run in todo if run not in conversions]
    trained += dict.fromkeys(donor(run) for run in conversions if donor(run) not in trained)
    print(f'{len(todo)} runs to do, {cfg.jobs} at a time', flush=True)
    failures = []
    for runs in (trained, conversions):
        jobs = [job_of(cfg, text, run) for run in runs]
        runs = {job.name: run for job, run in zip(jobs, runs)}

        def add(job, seconds=None):
            saved, run = ckpt.load(job.folder / 'ckpt.pt'), runs[job.name]
            record.make(lambda: dict(loss=loss_of(job), **costs(run, saved, data),
                                     seconds=seconds), **key(run))

        def ended(job, code, seconds):
            if sweep.is_done(job):
                add(job, round(seconds, 1))
            else:
                failures.append(sweep.failure(job, code))
                print(failures[-1], flush=True)
        for job in filter(sweep.is_done, jobs):         # ended, but was not recorded
            add(job)
        sweep.run_all(jobs, cfg.jobs, ended)
        if failures:
            raise UserError(failures[0])


def loss_of(job):
    """Return the prefix-only loss of a finished run on the validation split."""
    if job.steps is None:
        return json.loads((job.folder / 'compress.json').read_text())['val_loss'][1]
    row = sweep.result(job.folder, job.steps)
    return row.get('val/prefix_loss', row['val/loss'])


def describe(row, key):
    return ', '.join(f'{k}={v}' for k, v in row.items() if k in (*key, 'loss', 'seconds'))


# --------------------------------------------------------------------------------------------------
# tables and figure

class Results:
    """Finished runs of one text. A key is a tuple (arm, steps, learning rate).

    losses: key -> seed -> loss; costs: key -> a row of the record; tried: key -> loss of RATE_SEED.
    """

    def __init__(self, rows):
        self.losses, self.costs, self.tried = {}, {}, {}
        for row in rows:
            key = row['arm'], row['steps'], row['learning_rate']
            if row['seed'] == RATE_SEED:
                self.tried[key] = row['loss']
            else:
                self.losses.setdefault(key, {})[row['seed']] = row['loss']
                self.costs[key] = row

    def in_budget(self, budget):
        """Return arm -> its key, of the arms that have runs in this budget."""
        found = {}
        for arm, steps, rate in self.losses:
            ratio = self.step_flops(arm) / self.step_flops(BASE)
            if (steps, rate) == (steps_for(budget, ratio), rate_of(arm)) and (
                    budget == 'steps' or not ARMS[arm].is_conversion):
                found[arm] = arm, steps, rate
        return {arm: found[arm] for arm in ARMS if arm in found}

    def step_flops(self, arm):
        """Return the FLOPs per step of an arm, 1 if it has no runs."""
        return next((row['flops'] / row['steps'] for key, row in self.costs.items()
                     if key[0] == arm), 1)

    def loss(self, key):
        """Return the mean loss and the ends of its interval over seeds."""
        return t_interval([*self.losses[key].values()])

    def difference(self, key, other):
        """Return the mean difference of two losses, paired by seed, and the ends of its
        interval."""
        own, theirs = self.losses[key], self.losses.get(other, {})
        return t_interval([own[seed] - theirs[seed] for seed in own if seed in theirs])

    def contest(self, cost, limit):
        """Return the best arm of each family within a limit, best first, as a list of keys.

        cost: 'cache_bytes', 'parameter_bytes', or 'flops', where only arms with the compute of the
        budget `limit` compete; limit: fraction of the cost of BASE.
        """
        if cost == 'flops':
            keys = self.in_budget(limit)
        else:
            keys = self.in_budget('steps')
            keys = {arm: key for arm, key in keys.items() if BASE in keys
                    and self.costs[key][cost] <= limit * self.costs[keys[BASE]][cost]}
        best = {}
        for arm, key in sorted(keys.items(), key=lambda item: self.loss(item[1])[0]):
            best.setdefault(ARMS[arm].family, key)
        return list(best.values())


def interval_text(mean, low, high, form='.4f'):
    return '' if mean is None else f'{mean:{form}}' + (
        '' if low is None else f' ({low:{form}} to {high:{form}})')


def loss_table(results):
    """Return a Markdown table of the costs of the arms as fractions of those of BASE, and of their
    losses in each budget, minus that of BASE."""
    budgets = {'steps': f'{STEPS:,} steps', 'compute': 'equal compute', 'half': 'half of it'}
    keys = {budget: results.in_budget(budget) for budget in budgets}
    base = {budget: found.get(BASE) for budget, found in keys.items()}
    lines = []
    for arm, key in keys['steps'].items():
        row, whole = results.costs[key], results.costs[base['steps']]
        losses = [
            '' if arm not in keys[budget] else interval_text(*results.loss(keys[budget][arm]))
            if arm == BASE else interval_text(*results.difference(keys[budget][arm], base[budget]),
                                              form='+.3f') for budget in budgets]
        lines.append([arm, str(len(results.losses[key])), *(f'{row[cost] / whole[cost]:.3f}'
                                                            for cost in LABELS), *losses])
    return '\n'.join([f'Losses of {BASE}, others minus it (95% intervals)', '', *format_table(
        [['arm', 'seeds', *LABELS.values(), *budgets.values()], *lines], 1, markdown=True)])


def contest_table(results):
    """Return a Markdown table of the best family and the next one in each of LIMITS."""
    head = ['budget', 'best', 'loss', 'next family', 'it loses (95% interval)', 'clear']
    lines = []
    for cost, limit in LIMITS:
        first, second, *_ = [*results.contest(cost, limit), None, None]
        if second:
            mean, low, high = results.difference(second, first)
            title = f'{LABELS[cost]}: ' + f'{SHARES.get(limit, limit):g}'
            lines.append([title, first[0], f'{results.loss(first)[0]:.4f}', second[0],
                          interval_text(mean, low, high, '+.4f'),
                          'yes' if low is not None and low > 0 else 'no'])
    return '\n'.join([f'Best families, budgets as fractions of {BASE}', '', *format_table(
        [head, *lines], 1, markdown=True)]) if lines else ''


def rate_table(results):
    """Return a Markdown table of the losses at several learning rates, or ''."""
    rates = sorted({rate for _, _, rate in results.tried})
    lines = [[arm, *(f'{results.tried[arm, STEPS, rate]:.4f}'
                     if (arm, STEPS, rate) in results.tried else '' for rate in rates)]
             for arm in ARMS if any(key[0] == arm for key in results.tried)]
    return '\n'.join([f'Learning rates, seed {RATE_SEED}', '', *format_table(
        [['arm', *(f'{rate:g}' for rate in rates)], *lines], 1, markdown=True)]) if lines else ''


def draw(results, path):
    """Draw loss against each cost, one line per family, and write it to `path`.

    A line has the arms of its family that no cheaper arm of the family beats. Left out are
    conversions without fine-tuning, losses above HIGHEST, and costs close to those of BASE. For
    compute a line has the best arm of each budget.
    """
    keys = results.in_budget('steps')
    base = curve(results, 'dense', [(1, keys[BASE])])
    points = {cost: {family: [] for family in LOOKS} for cost in LABELS}
    for cost, most in (('cache_bytes', 0.7), ('parameter_bytes', 0.8)):
        for arm, key in keys.items():
            fraction = results.costs[key][cost] / results.costs[keys[BASE]][cost]
            if (fraction <= most and results.loss(key)[0] <= base.y[0] + HIGHEST
                    and (not ARMS[arm].is_conversion or arm.endswith('-tuned'))):
                points[cost][ARMS[arm].family].append((fraction, key))
    for budget, share in SHARES.items():
        for key in results.contest('flops', budget):
            points['flops'][ARMS[key[0]].family].append((share, key))
    panels = [plots.Chart(
        LABELS[cost], f'fraction of {BASE}',
        [base._replace(label=BASE, x=None, look=plots.LEVEL)] + [
            curve(results, family, frontier(results, found)) for family, found in families.items()
            if found],
        True, {2.0 ** -i: f'1/{2 ** i}' if i else '1' for i in range(2 if cost == 'flops' else 5)})
        for cost, families in points.items()]
    seeds = ', '.join(map(str, sorted(results.losses[keys[BASE]])))
    plots.charts(path, panels, 'validation loss, nats per character',
                 f'Mean and 95% interval over seeds {seeds}; {STEPS:,} steps; right: the steps '
                 'that the compute allows. Dotted: a trained model, converted and tuned. Losses '
                 f'more than {HIGHEST} above {BASE} are left out.')


def frontier(results, points):
    """Return the points (x, key) that no point with a smaller x beats, in the order of x."""
    best, kept = math.inf, []
    for x, key in sorted(points, key=lambda point: (point[0], results.loss(point[1])[0])):
        if results.loss(key)[0] < best:
            best = results.loss(key)[0]
            kept.append((x, key))
    return kept


def curve(results, family, points):
    """Return the Curve of a family. points: list of (x, key)."""
    found = [results.loss(key) for _, key in sorted(points)]
    return plots.Curve(family, [x for x, _ in sorted(points)], [mean for mean, _, _ in found],
                       LOOKS[family], [high and high - mean for mean, _, high in found])


def main(argv=None):
    """Run the command. Returns the exit code: 0 done, 2 wrong input or a failed run, 130 or 143
    stopped by a signal."""
    return cli.run('equal_budget.py', BudgetConfig, __doc__, experiment, argv)


def experiment(cfg):
    """Run what is missing, print the tables and draw the figure. Raises UserError."""
    plots.require_matplotlib(f'the figure {FIGURE}', FIGURE)
    path = Path(cfg.record or RECORD)
    if cfg.run:
        check_writable(Path(cfg.out_dir) / 'ckpt.pt', f'out_dir={cfg.out_dir!r}')
        data = Dataset(locate(cfg.dataset, cfg.tokenizer))
        run_missing(cfg, Record(path, describe), data)
    elif not path.exists():
        raise UserError(f'run=False: {path} does not exist yet (nearest: --run=True)')
    texts = {}
    for row in read_json_lines(path):
        texts.setdefault(row['text'], []).append(row)
    for text, rows in texts.items():
        results = Results(rows)
        tables = [rate_table(results)]
        if BASE in results.in_budget('steps'):
            tables += [loss_table(results), contest_table(results)]
        print('\n\n'.join([f'Text {text}', *filter(None, tables)]), end='\n\n')
    if cfg.record is None and TEXT in texts:
        draw(Results(texts[TEXT]), FIGURE)
        print(f'figure: {FIGURE}')


if __name__ == '__main__':
    sys.exit(main())

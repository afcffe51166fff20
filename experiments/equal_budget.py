"""
Compare dense and low-rank models at equal bytes and at equal training compute.

    python experiments/equal_budget.py --dataset=input.txt  # run what is missing, draw
    python experiments/equal_budget.py --run=False          # draw what is recorded
    python experiments/equal_budget.py --dataset=plays      # another text
    python experiments/equal_budget.py --dataset=input.txt --arms=gqa-1,mla-16 --budgets=steps \\
        --record=again.jsonl --out_dir=out-again            # repeat two arms

All models are variants of config/train_baseline_test.py, called dense-4x128: 4 layers of width 128.
The families of arms:

    dense       dense-4x128, and other numbers of layers and widths, heads of 32
    gqa         fewer heads of keys and values
    mla         multi-head latent attention
    weight      truncated SVD of W_v, or of W_k and W_v, in every forward pass
    causal      V, or K and V, projected onto a basis of earlier tokens
    factored    low-rank layers with one rank per layer, trained from scratch
    to-mla, to-gqa, to-heads, compressed        dense-4x128 after training, changed by compress.py;
                with '-tuned', 120 steps of fine-tuning follow

Arms are trained from scratch for as many steps as dense-4x128 ('steps'), and for the steps that
cost as much compute as dense-4x128 ('compute') or half of it ('half'). FLOPs are counted in a real
training step with the optimizer: all matrix products, attention over all T x T pairs (its backward
pass computes the scores again), and 9 n^3 per eigendecomposition (Golub and Van Loan, 8.3).
Evaluation does not count, and the calibration of a conversion is an estimate.

Losses are over the whole validation split. No arm sees later tokens. Intervals are 95% intervals of
Student's t distribution over seeds. Differences are paired by seed, which fixes the batches. A
'-tuned' arm is compared with dense-4x128-tuned, which had the same fine-tuning.

Each line of experiments/equal_budget.jsonl is a finished run. Finished runs are not repeated, so an
interrupted experiment can be continued. Checkpoints stay in out_dir, one folder per run, and
sample.py can load them. A conversion needs the checkpoint of dense-4x128 with the same seed, which
is trained again if it is missing. The figure is docs/frontier.png.
"""

import functools
import hashlib
import json
import math
import statistics
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
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from model import GPT
from runtime import checkpoint as ckpt
from runtime import config as configuration
from runtime import plots
from runtime.config import PATH, Failure, Range, UserError
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
BASE, TUNED_BASE = 'dense-4x128', 'dense-4x128-tuned'
STEPS, RATE = 1200, 3.5e-3
RATE_SEED = 11                      # learning rates are chosen on a seed that counts nowhere else
TUNING_STEPS = 120                  # 10% more
SWEEP_STEPS = 16                    # steps with as many tokens as compress.py's calibration text
COMPUTE_FRACTIONS = {'compute': 1, 'half': 0.5}         # budget -> fraction of the compute of BASE
BUDGETS = ('steps', *COMPUTE_FRACTIONS)
TOLERANCE = 0.02                    # costs that differ by less are equal
TEXT = 'char-65-86c4e6aa'           # the text of the figure, Tiny Shakespeare; see `text_id`
# a cost, its limit as a fraction of the cost of BASE, and the budget of the runs that compete
LIMITS = (('cache_bytes', 1 / 4, 'steps'), ('cache_bytes', 1 / 8, 'steps'),
          ('parameter_bytes', 0.6, 'steps'), ('parameter_bytes', 0.44, 'steps'),
          *(('flops', fraction, budget) for budget, fraction in COMPUTE_FRACTIONS.items()))
LABELS = {'cache_bytes': 'cache bytes', 'parameter_bytes': 'parameter bytes',
          'flops': 'training compute'}
# of the figure: fractions of the cost of BASE, nats above BASE
MAX_COST, MAX_EXCESS = {'cache_bytes': 0.7, 'parameter_bytes': 0.8}, 0.2
# family -> color, marker, line; a conversion has the color of the family that it makes
LOOKS = {'dense': ('0.25', 'o', '-'),
         **{family: (colour, marker, '-') for family, colour, marker in zip(
             ('gqa', 'mla', 'weight', 'causal', 'factored'), plots.COLOURS, plots.MARKERS[1:])},
         'to-gqa': (plots.COLOURS[0], '<', ':'), 'to-mla': (plots.COLOURS[1], '>', ':'),
         'to-heads': (plots.COLOURS[5], 'X', ':'), 'compressed': (plots.COLOURS[4], 'd', ':')}

# Ranks of low-rank layers that are trained from scratch, one row per block, 0: dense. They come
# from the estimated increase of the loss of a trained dense-4x128 with seed 1337, at 0.55, ... of
# the weights. Equal ranks in all layers were worse (docs/RESULTS.md).
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
ARMS[TUNED_BASE] = Arm('dense', dict(keep=1.0, finetune_iters=TUNING_STEPS), True)
# arms that are also trained with the compute of BASE, and with half of it
COMPUTE_ARMS = ('dense-4x128', 'dense-4x160', 'dense-4x96', 'dense-3x128', 'dense-2x128',
                'gqa-1-of-8', 'mla-32', 'weight-kv-16', 'factored-0.55')

# A training run of an arm. definition: from `digest`
Run = namedtuple('Run', 'arm definition steps learning_rate seed')


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
    budgets: Annotated[str, "'steps', 'compute', 'half', or several of them; only these arms have "
                       f"'compute' and 'half': {', '.join(COMPUTE_ARMS)}"] = 'steps,compute,half'
    seeds: Annotated[str, 'seeds, separated by commas'] = '1337,1338,1339,1340,1341'
    rates: Annotated[str | None, f'learning rates to try with --seeds={RATE_SEED} and '
                     f'--budgets=steps, separated by commas; None: {RATE}'] = None
    jobs: Annotated[int, 'runs at a time, which share the threads', Range(1)] = 2
    run: Annotated[bool, 'False: only tables and figure'] = True

    def __post_init__(self):
        configuration.validate(self)
        for name, valid in (('arms', ['all', *ARMS]), ('budgets', BUDGETS)):
            wrong = [word for word in getattr(self, name).split(',') if word not in valid]
            if wrong:
                raise ValueError(f'{name}={getattr(self, name)!r}: {wrong[0]!r} is not one of '
                                 f'{", ".join(valid)} (nearest: {valid[0]!r})')
        for name, kind, nearest in (('seeds', int, '1337,1338'), ('rates', float, '2.5e-3,5e-3')):
            try:
                is_valid = all(0 <= number < math.inf
                               for number in numbers(getattr(self, name), kind))
            except ValueError:
                is_valid = False
            if not is_valid:
                raise ValueError(f'{name}={getattr(self, name)!r}: must be numbers of at least 0, '
                                 f'separated by commas (nearest: {nearest!r})')
        if self.rates is not None and (self.seeds, self.budgets) != (str(RATE_SEED), 'steps'):
            raise ValueError(f'rates={self.rates!r}: are tried with --seeds={RATE_SEED} and '
                             "--budgets='steps' only (nearest: add both)")

    def planned(self, data):
        """Return the Runs that the options ask for. Raises UserError if there are none."""
        wanted, runs = self.arms.split(','), []
        names = [name for name in ARMS if name in wanted or 'all' in wanted]
        for seed, name, budget in product(numbers(self.seeds, int), names, self.budgets.split(',')):
            if budget == 'steps' or name in COMPUTE_ARMS:
                ratio = 1 if budget == 'steps' else flops_of(name, data) / flops_of(BASE, data)
                runs += [Run(name, digest(name), steps_for(budget, ratio), rate, seed)
                         for rate in numbers(self.rates, float) or [RATE]]
        if not runs:
            raise UserError(f'budgets={self.budgets!r}: these arms run with equal steps only '
                            "(nearest: 'steps')")
        return list(dict.fromkeys(runs))


def numbers(words, kind):
    """Return the numbers in a text, separated by commas; [] for None. kind: int or float."""
    return [] if words is None else [kind(word) for word in words.split(',')]


def digest(name):
    """Return a hash of what defines an arm. Runs of another definition do not count."""
    arm, (values, set_by) = ARMS[name], configuration.parse(TrainConfig, [RECIPE])
    recipe = {key: values[key] for key in set_by}
    return hashlib.sha256(json.dumps([recipe, arm.options, arm.is_conversion],
                                     sort_keys=True).encode()).hexdigest()[:8]


def text_id(data):
    """Return a name for a text and its tokens. data: Dataset."""
    meta = data.meta
    return (f'{meta["tokenizer"]}-{meta["vocab_size"]}-'
            f'{meta.get("sha256", str(len(data.tokens("train"))))[:8]}')


def steps_for(budget, ratio):
    """Return the steps of an arm in a budget. ratio: FLOPs per step of the arm / those of BASE.

    If the costs differ by at most TOLERANCE, these are STEPS or the steps of BASE in this budget,
    so that fewer runs are needed."""
    if budget == 'steps':
        return STEPS
    base_steps = STEPS * COMPUTE_FRACTIONS[budget]
    exact = base_steps / ratio
    return round(next((n for n in (STEPS, base_steps) if abs(n / exact - 1) <= TOLERANCE), exact))


# --------------------------------------------------------------------------------------------------
# costs

# FLOPs of operations that FlopCounterMode does not know, from the shapes of their arguments
FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *others, **more: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *others, **more: sdpa_backward_flop_count(grad, q, k, v),
    torch.ops.aten.baddbmm_: lambda out, a, b, **more: 2 * math.prod(a) * b[-1],
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


@functools.cache
def flops_of(name, data):
    """Return the FLOPs of a training step of an arm that is trained from scratch."""
    return step_flops(settings(name, data))


def forward_flops(cfg):
    """Return the FLOPs of a forward pass of one batch. cfg: TrainConfig."""
    model, (x, y) = new_model(cfg, 'cpu'), random_tokens(cfg, 'cpu')
    with torch.no_grad():
        return count_flops(lambda: model(x, y))


def costs(run, saved, data):
    """Return the costs of a finished run as a dict. saved: its checkpoint.

    flops: of all training. For a conversion: of training BASE, of the calibration, and of the
    refinement of 'compressed', estimated as SWEEP_STEPS steps each, and of fine-tuning with its
    teacher. parameter_bytes: with position embeddings. cache_bytes: per token of a full context,
    float32.
    """
    arm, cfg, model = ARMS[run.arm], settings(run.arm, data), GPT.from_checkpoint(saved)
    if arm.is_conversion:
        calibrated = SWEEP_STEPS * (arm.options.get('to') != 'gqa')
        flops = (run.steps + calibrated) * flops_of(BASE, data)
        tuned = replace(cfg, muon_per_head=False, **saved['model_args'])
        refined = SWEEP_STEPS * (arm.family == 'compressed')
        flops += (refined + arm.options.get('finetune_iters', 0)) * (
            step_flops(tuned) + forward_flops(cfg))
    else:
        flops = run.steps * flops_of(run.arm, data)
    return dict(flops=flops, parameter_bytes=sum(p.nbytes for p in model.parameters()),
                cache_bytes=model.kv_cache_bytes(1, cfg.block_size) / cfg.block_size)


# --------------------------------------------------------------------------------------------------
# running

def source(run):
    """Return the Run of BASE whose model a conversion changes."""
    return run._replace(arm=BASE, definition=digest(BASE))


def job_of(cfg, data, run):
    """Return the Job of a run."""
    def folder(run):
        return Path(cfg.out_dir) / text_id(data) / (
            f'{run.arm},{run.definition},steps={run.steps},rate={run.learning_rate},'
            f'seed={run.seed}')
    arm, out = ARMS[run.arm], folder(run)
    argv = [*options_of(arm.options), f'--seed={run.seed}', '--device=cpu']
    if arm.is_conversion:
        return sweep.Job(out.name, out, None, [
            str(ROOT / 'compress.py'), f'--out_dir={str(folder(source(run)))!r}',
            f'--save_dir={str(out)!r}', *argv], None)
    here = f'--out_dir={str(out)!r}'
    return sweep.Job(out.name, out, run.steps, [
        str(ROOT / 'train.py'), RECIPE, *argv, here, f'--dataset={str(data.folder.resolve())!r}',
        f'--max_iters={run.steps}', f'--warmup_iters={run.steps // 20}',
        f'--learning_rate={run.learning_rate}', f'--min_lr={run.learning_rate / 10}',
        '--eval_iters=1', f'--eval_interval={run.steps}', '--log_interval=100'],
        [str(ROOT / 'train.py'), '--init_from=resume', here, '--device=cpu'])


def run_missing(cfg, record, data):
    """Run what the record lacks, in parallel, and add it. Raises Failure if a run fails, after the
    others have ended."""
    todo = [run for run in cfg.planned(data)
            if record.find(**run._asdict(), text=text_id(data)) is None]
    conversions = [run for run in todo if ARMS[run.arm].is_conversion]
    trained = dict.fromkeys([run for run in todo if run not in conversions]
                            + [source(run) for run in conversions])
    print(f'{len(todo)} runs to do, {cfg.jobs} at a time', flush=True)
    failures = run_phase(cfg, record, data, trained)
    failures += run_phase(cfg, record, data, [
        run for run in conversions if sweep.is_done(job_of(cfg, data, source(run)))])
    if failures:
        raise Failure('; '.join(failures))


def run_phase(cfg, record, data, runs):
    """Run these runs and add them to the record. Returns the messages of those that failed."""
    failures, jobs = [], [job_of(cfg, data, run) for run in runs]
    run_of = {job.name: run for job, run in zip(jobs, runs)}
    threads = max(1, torch.get_num_threads() // cfg.jobs)

    def ended(job, code, seconds):
        if sweep.is_done(job):
            run = run_of[job.name]
            record.make(lambda: losses_of(job) | costs(run, ckpt.load(job.folder / 'ckpt.pt'), data)
                        | dict(seconds=seconds and round(seconds, 1), threads=threads),
                        **run._asdict(), text=text_id(data))
        else:
            failures.append(sweep.failure(job, code))
            print(failures[-1], flush=True)
    for job in jobs:
        if sweep.is_done(job):                                      # but it may not be recorded
            ended(job, 0, None)
    sweep.run_all(jobs, cfg.jobs, ended)
    return failures


def losses_of(job):
    """Return the loss of a finished run on the validation split, and for a conversion that of its
    source, as a dict."""
    if job.steps is not None:
        return dict(loss=sweep.result(job.folder, job.steps)['val/loss'])
    losses = json.loads((job.folder / 'compress.json').read_text())['val_loss']
    return dict(loss=losses[1], source_loss=losses[0])


# --------------------------------------------------------------------------------------------------
# tables and figure

# An arm in a budget. losses: seed -> loss; excess: seed -> loss minus that of the dense model, see
# `collect`; costs: cost -> mean over seeds, as a fraction of the cost of BASE
Result = namedtuple('Result', 'arm losses excess costs')


def collect(rows):
    """Return budget -> arm -> Result of the rows of one text, or {} if BASE is missing.

    An arm is compared with BASE at equal steps or equal compute. A conversion is compared with the
    model that it was made from. After fine-tuning it is compared with TUNED_BASE, which had as many
    steps of fine-tuning.
    """
    runs, results = {}, {}
    for row in sorted(rows, key=lambda row: [*ARMS].index(row['arm'])):
        if row['learning_rate'] == RATE and row['seed'] != RATE_SEED:
            runs.setdefault((row['arm'], row['steps']), {})[row['seed']] = row
    if (BASE, STEPS) not in runs:
        return {}
    base_costs = mean_costs(runs[BASE, STEPS])
    tuned = loss_changes(runs.get((TUNED_BASE, STEPS), {}))
    for budget in BUDGETS:
        base = loss_changes(runs.get((BASE, steps_for(budget, 1)), {}))
        results[budget] = {}
        for (arm, steps), by_seed in runs.items():
            fractions = {cost: value / base_costs[cost]
                         for cost, value in mean_costs(by_seed).items()}
            if budget == 'steps':
                is_member = steps == STEPS
            else:
                is_member = arm in COMPUTE_ARMS and abs(
                    fractions['flops'] / COMPUTE_FRACTIONS[budget] - 1) <= TOLERANCE
            dense = base
            if ARMS[arm].is_conversion:
                dense = tuned if is_tuned(arm) else dict.fromkeys(by_seed, 0)
            excess = {seed: change - dense[seed] for seed, change in loss_changes(by_seed).items()
                      if seed in dense}
            if is_member and excess:
                losses = {seed: row['loss'] for seed, row in by_seed.items()}
                results[budget][arm] = Result(arm, losses, excess, fractions)
    return results


def is_tuned(arm):
    return 'finetune_iters' in ARMS[arm].options


def loss_changes(by_seed):
    """Return seed -> loss, for a conversion minus the loss of the model that it was made from.
    by_seed: seed -> row of the record."""
    return {seed: row['loss'] - row.get('source_loss', 0) for seed, row in by_seed.items()}


def mean_costs(by_seed):
    """Return cost -> mean over seeds. by_seed: seed -> row of the record."""
    return {cost: statistics.mean(row[cost] for row in by_seed.values()) for cost in LABELS}


def average(by_seed):
    return statistics.mean(by_seed.values())


def best_by_family(results, cost, limit, budget):
    """Return the best Result of each family within a limit of LIMITS, best first.
    results: budget -> arm -> Result."""
    best = {}
    for result in sorted(results[budget].values(), key=lambda one: average(one.excess)):
        if result.costs[cost] <= limit * (1 + TOLERANCE):
            best.setdefault(ARMS[result.arm].family, result)
    return list(best.values())


def interval_text(by_seed, form):
    """Return the mean and the 95% interval of seed -> value as text. form: format of a number."""
    middle, low, high = t_interval([*by_seed.values()])
    return f'{middle:{form}}' + ('' if low is None else f' ({low:{form}} to {high:{form}})')


def loss_table(results):
    """Return a Markdown table of the arms. results: budget -> arm -> Result."""
    lines = [[
        arm, str(len(result.losses)), *(f'{result.costs[cost]:.3f}' for cost in LABELS),
        interval_text(result.losses, '.4f'),
        *(interval_text(results[budget][arm].excess, '+.3f')
          if arm in results[budget] and arm != BASE else '' for budget in BUDGETS)]
        for arm, result in results['steps'].items()]
    return '\n'.join([
        f'Costs are fractions of those of {BASE}. The last columns are losses minus that of '
        f'{BASE}, or of {TUNED_BASE} for tuned arms. In brackets: 95% intervals over seeds, paired '
        'for differences.', '', *format_table(
            [['arm', 'seeds', *LABELS.values(), 'loss', 'equal steps', 'equal compute',
              'half compute'], *lines], 1, markdown=True)])


def contest_table(results):
    """Return a Markdown table of the best family and the next one in each of LIMITS.
    results: budget -> arm -> Result."""
    lines = []
    for cost, limit, budget in LIMITS:
        two = best_by_family(results, cost, limit, budget)[:2]
        if len(two) == 2:
            own, other = (result.excess for result in two)
            lead = {seed: other[seed] - own[seed] for seed in own if seed in other}
            _, low, _ = t_interval([*lead.values()])
            lines.append([f'{LABELS[cost]}: {limit:g}',
                          *(f'{result.arm} ({average(result.excess):+.4f})' for result in two),
                          interval_text(lead, '+.4f') if lead else 'no common seed',
                          'yes' if low is not None and low > 0 else 'no'])
    return '\n'.join([
        'The best arm of the best family and of the next one, with losses minus that of the dense '
        'model as above.', '',
        *format_table([['budget', 'best', 'next', 'next minus best', 'interval above 0'], *lines],
                      1, markdown=True)])


def rate_table(rows):
    """Return a Markdown table of the losses at several learning rates, or ''."""
    tried = {(row['arm'], row['learning_rate']): f'{row["loss"]:.4f}' for row in rows
             if row['seed'] == RATE_SEED and row['steps'] == STEPS}
    rates = sorted({rate for _, rate in tried})
    lines = [[arm, *(tried.get((arm, rate), '') for rate in rates)]
             for arm in dict.fromkeys(arm for arm, _ in tried)]
    return '\n'.join([f'Learning rates, seed {RATE_SEED}', '', *format_table(
        [['arm', *(f'{rate:g}' for rate in rates)], *lines], 1, markdown=True)]) if lines else ''


def draw(results, path):
    """Draw the difference to the dense model against each cost, one line per family, and write it
    to `path`.

    A line has the arms of its family that no cheaper arm of the family beats. Left out are
    conversions without fine-tuning, differences above MAX_EXCESS, and costs above MAX_COST.
    For compute a line has the best arm of each budget, and differences are to BASE after STEPS
    steps. results: budget -> arm -> Result.
    """
    points = {cost: {family: [] for family in LOOKS} for cost in LABELS}
    for cost, most in MAX_COST.items():
        for arm, result in results['steps'].items():
            if result.costs[cost] <= most and (not ARMS[arm].is_conversion or is_tuned(arm)):
                points[cost][ARMS[arm].family].append((result.costs[cost], result.excess))
    base = results['steps'][BASE].losses
    for budget, fraction in COMPUTE_FRACTIONS.items():
        for result in best_by_family(results, 'flops', fraction, budget):
            points['flops'][ARMS[result.arm].family].append((fraction, {
                seed: loss - base[seed] for seed, loss in result.losses.items() if seed in base}))
    panels = [plots.Chart(LABELS[cost], f'fraction of {BASE}', [
        plots.Curve(BASE, None, [0], plots.LEVEL),
        *(curve(family, found) for family, found in families.items() if frontier(found))],
        True, {2.0 ** -i: f'1/{2 ** i}' if i else '1' for i in range(2 if cost == 'flops' else 5)})
        for cost, families in points.items()]
    seeds = ', '.join(map(str, sorted(base)))
    plots.charts(path, panels, 'loss minus that of the dense model, nats per character',
                 f'Mean and 95% interval over seeds {seeds}, paired; {STEPS:,} steps; right: the '
                 'steps that the compute allows. Dotted: trained models, converted and tuned, '
                 'minus the dense model with the same tuning. Differences above '
                 f'{MAX_EXCESS} are left out.')


def curve(family, points):
    """Return the plots.Curve of a family. points: pairs (x, seed -> difference)."""
    x, differences = zip(*frontier(points))
    means, _, highs = zip(*(t_interval([*by_seed.values()]) for by_seed in differences))
    return plots.Curve(family, x, means, LOOKS[family],
                       [high and high - mean for mean, high in zip(means, highs)])


def frontier(points):
    """Return the points that no point with a smaller x beats, in the order of x. points: pairs
    (x, seed -> difference). Points above MAX_EXCESS are left out."""
    kept, best = [], MAX_EXCESS
    for x, by_seed in sorted(points, key=lambda point: (point[0], average(point[1]))):
        if average(by_seed) < best:
            best = average(by_seed)
            kept.append((x, by_seed))
    return kept


def main(argv=None):
    """Run the command. Returns the exit code: 0 done, 1 a run failed, 2 wrong input, 130 or 143
    stopped by a signal."""
    return cli.run('equal_budget.py', BudgetConfig, __doc__, experiment, argv)


def experiment(cfg):
    """Run what is missing, print the tables and draw the figure. Raises UserError."""
    if cfg.record is None:
        plots.require_matplotlib(f'the figure {FIGURE}', FIGURE)
    path = Path(cfg.record or RECORD)
    if cfg.run:
        check_writable(Path(cfg.out_dir) / 'ckpt.pt', f'out_dir={cfg.out_dir!r}')
        data = Dataset(locate(cfg.dataset, cfg.tokenizer))
        run_missing(cfg, Record(path), data)
    elif not path.is_file():
        raise UserError(f'run=False: {path} is not a file (nearest: --run=True)')
    texts, rows = {}, read_json_lines(path)
    for row in rows:
        if row.get('arm') in ARMS and row.get('definition') == digest(row['arm']):
            texts.setdefault(row['text'], []).append(row)
    left_out = len(rows) - sum(map(len, texts.values()))
    if left_out:
        print(f'{path}: {left_out} rows of arms with another definition are left out')
    for text, rows in texts.items():
        results = collect(rows)
        tables = [loss_table(results), contest_table(results)] if results else []
        print('\n\n'.join(filter(None, [f'Text {text}', rate_table(rows), *tables])), end='\n\n')
        if not results:
            print(f'no comparison: {BASE} with {STEPS} steps is not recorded')
        elif cfg.record is None and text == TEXT:
            draw(results, FIGURE)
            print(f'figure: {FIGURE}')


if __name__ == '__main__':
    sys.exit(main())

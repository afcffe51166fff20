"""
Measure the loss of the main config's model at ranks 2, 4, 8 and 16 of 32, for every scope and
method, and compare it with controls.

    python experiments/loss_against_rank.py --dataset=input.txt  # run what is missing, draw
    python experiments/loss_against_rank.py --jobs=0             # draw what is recorded

A run is config/train_svd_test.py with the options of its variant, in its own folder below out_dir.
RECIPE has the options of this config when the record was made. Muon's steps have changed since, so
the record must not be extended: start a new one.
Finished runs are not repeated, so an interrupted sweep can be continued. 'sequence' scope keeps the
config's svd_basis_grad=False, because with the gradient its parallel loss is meaningless
(docs/RESULTS.md). The other scopes are causal and use the gradient.

The controls have the same rank k without SVD. 'random projection' multiplies the V of each head by
a random projector of rank k, drawn once from the run's seed. 'narrow values' gives the V of each
head only k values, so that the cache is as small. This model has fewer parameters.

Jobs that run at the same time share the CPU's threads. The record is
experiments/loss_against_rank.jsonl, the figure is docs/loss_against_rank.png.
"""

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from runtime import cli  # before torch: reports missing packages

import torch
from torch import nn

import model
import train
from lowrank.head_svd import NoSVD
from lowrank.layers import split_heads
from runtime import config as configuration
from runtime import plots
from tools import sweep
from runtime.config import PATH, Range, UserError
from runtime.data import locate
from runtime.files import check_writable, write_atomically
from runtime.tracking import read_json_lines

RECORD = Path(__file__).with_suffix('.jsonl')
FIGURE = ROOT / 'docs' / 'loss_against_rank.png'
RANKS = (2, 4, 8, 16)
SCOPES = ('sequence', 'causal', 'weight')
METHODS = ('gram', 'randomized')


@dataclass
class SweepConfig:
    """Options of the sweep. `runs` defines the runs."""
    dataset: Annotated[str, 'as for train.py; the recorded results are of Tiny Shakespeare',
                       PATH] = 'shakespeare_char'
    out_dir: Annotated[str, 'folder of the runs', PATH] = 'out-rank'
    steps: Annotated[int, 'steps of each run, and length of its learning rate schedule',
                     Range(20)] = 500
    seeds: Annotated[int, 'runs per variant, with seeds 1337, 1338, ...', Range(1)] = 3
    jobs: Annotated[int, 'runs at a time; 0: only table and figure', Range(0)] = 2

    def __post_init__(self):
        configuration.validate(self)


class RandomProjection(model.CausalSelfAttention):
    """Attention whose V is multiplied by a fixed random projector of rank k per head."""

    def __init__(self, config):
        super().__init__(config)
        self.head_svd, hs = NoSVD(), config.n_embd // config.n_head
        basis, _ = torch.linalg.qr(torch.randn(config.n_head, hs, config.svd_rank))  # (nh, hs, k)
        self.register_buffer('projector', basis @ basis.mT, persistent=False)  # (nh, hs, hs)

    def apply_svd_to_v(self, v):
        return v @ self.projector

    def value_statistics(self, x):
        return {}


class NarrowValues(model.CausalSelfAttention):
    """Attention heads with queries and keys of size hs and values of size k."""

    def __init__(self, config):
        super().__init__(config)
        self.head_svd, width = NoSVD(), config.n_head * config.svd_rank
        self.c_attn = nn.ModuleDict({
            name: nn.Linear(config.n_embd, rows, bias=config.bias)
            for name, rows in (('c_q', config.n_embd), ('c_k', config.n_embd), ('c_v', width))})
        self.c_proj = nn.Linear(width, config.n_embd, bias=config.bias)

    def project(self, x):
        """Return q and k (B, nh, T, hs) and v (B, nh, T, svd_rank) for x (B, T, C)."""
        return split_heads(self.n_head, *(layer(x) for layer in self.c_attn.values()))

    def value_statistics(self, x):
        return {}


RECIPE = ['--weight_init=gpt2', '--muon_per_head=False', '--beta1=0.9', '--learning_rate=5e-3',
          '--min_lr=5e-4']
CONTROLS = {'random projection': RandomProjection, 'narrow values': NarrowValues}


def runs(cfg):
    """Yield per run the folder name, the row of the record without results, and the options of
    train.py."""
    for seed in range(1337, 1337 + cfg.seeds):
        arms = [('no SVD', None, ['--use_svd=False'])]
        arms += [(f'{scope}, {method}', rank, [
            f'--svd_scope={scope}', f'--svd_method={method}', f'--svd_rank={rank}',
            f'--svd_basis_grad={scope != "sequence"}'])
            for method in METHODS for scope in SCOPES for rank in RANKS]
        # the classes above replace the SVD of 'weight' scope
        arms += [(name, rank, ['--svd_scope=weight', f'--svd_rank={rank}'])
                 for name in CONTROLS for rank in RANKS]
        for arm, rank, options in arms:
            name = f'{arm}, {rank}, {seed}'.replace(', ', '-').replace(' ', '_')
            yield (name, {'arm': arm, 'rank': rank, 'seed': seed, 'steps': cfg.steps},
                   [*options, f'--seed={seed}'])


def jobs(cfg):
    """Yield the Jobs for sweep.run_all. Interrupted runs start again from step 0, because their
    checkpoint may come from a run with other `steps`."""
    for name, row, options in runs(cfg):
        folder = Path(cfg.out_dir) / name
        argv = [
            str(ROOT / 'config' / 'train_svd_test.py'), f'--dataset={cfg.dataset}',
            f'--out_dir={folder}', *RECIPE, *options, f'--max_iters={cfg.steps}',
            f'--lr_decay_iters={cfg.steps}', f'--warmup_iters={cfg.steps // 20}',
            f'--eval_interval={cfg.steps}', '--device=cpu']
        yield sweep.Job(name, folder, cfg.steps, [__file__, '--train', row['arm'], *argv], None)


def ended(job, code, seconds):
    """Print the loss of a finished run, or why it failed."""
    final = sweep.result(job.folder, job.steps)
    print(sweep.failure(job, code) if code or not final else
          f'{job.name}: {final["val/loss"]:.4f}', flush=True)


def train_here(arm, argv):
    """Run train.py in this process, with the attention of the control if `arm` names one."""
    if arm in CONTROLS:
        model.CausalSelfAttention = CONTROLS[arm]
    train.sample = lambda *_: '(none)'
    return train.main(argv)


def check(cfg):
    """Check, before any run, that the folder, the record and the figure can be written and that the
    data set exists. Raises UserError."""
    plots.require_matplotlib(f'the figure {FIGURE}', FIGURE)
    if not cfg.jobs and not RECORD.exists():
        raise UserError(f'jobs=0: {RECORD} does not exist yet (nearest: --jobs=1)')
    if cfg.jobs:
        check_writable(Path(cfg.out_dir) / 'ckpt.pt', f'out_dir={cfg.out_dir!r}')
        check_writable(RECORD, RECORD)
        locate(cfg.dataset, 'char')


def collect(cfg):
    """Write the results of all finished runs to RECORD and return them as a list of dict."""
    rows = []
    for name, row, _ in runs(cfg):
        folder = Path(cfg.out_dir) / name
        final = sweep.result(folder, cfg.steps)
        if final:
            here = json.loads((folder / 'environment.json').read_text())
            rows.append(row | {
                'loss': final.get('val/prefix_loss', final['val/loss']),
                'parallel': final['val/loss'], 'gap_se': final.get('val/prefix_gap_se', 0.0),
                'torch': here['torch'], 'git_commit': here['git_commit'][:7]})
    write_atomically(RECORD, ''.join(json.dumps(row) + '\n' for row in rows).encode())
    return rows


def summary(rows):
    """Return a dict from variant and rank, (arm, rank), to statistics over seeds.

    They are mean and standard deviation of the prefix-only loss, mean parallel loss, and number of
    seeds. Losses are in nats per character.
    """
    groups = {}
    for row in rows:
        groups.setdefault((row['arm'], row['rank']), []).append(row)
    return {
        key: (statistics.mean(r['loss'] for r in group),
              statistics.stdev(r['loss'] for r in group) if len(group) > 1 else 0.0,
              statistics.mean(r['parallel'] for r in group),
              len(group))
        for key, group in groups.items()}


def table(rows):
    """Return a Markdown table of the prefix-only loss, one row per variant, one column per rank.

    Cells have mean and standard deviation over seeds, and in brackets the mean parallel loss if the
    variant is not causal.
    """
    means = summary(rows)
    lines = [
        '| | ' + ' | '.join(f'rank {rank}' for rank in RANKS) + ' |',
        '|---' * (len(RANKS) + 1) + '|']
    for arm in dict.fromkeys(arm for arm, rank in means if rank):
        cells = []
        for rank in RANKS:
            mean, spread, parallel, _ = means.get((arm, rank), (None,) * 4)
            cells.append('' if mean is None else f'{mean:.3f} +- {spread:.3f}'
                         + (f' ({parallel:.3f})' if 'sequence' in arm else ''))
        lines.append(f'| {arm} | ' + ' | '.join(cells) + ' |')
    mean, spread, _, seeds = means['no SVD', None]
    return '\n'.join(lines + [f'| no SVD | {mean:.3f} +- {spread:.3f} |' + ' |' * (len(RANKS) - 1)])


def plot(rows):
    """Draw loss against rank with one panel per scope, and write it to FIGURE."""
    means = summary(rows)
    figure, (axes,) = plots.page(1, len(SCOPES), (10, 4), sharey=True)
    styles = {
        'gram': ('C0', 'o-'), 'randomized': ('C1', 's--'), 'random projection': ('0.45', '^:'),
        'narrow values': ('0.65', 'v:')}
    for axis, scope in zip(axes, SCOPES):
        base, spread, _, _ = means['no SVD', None]
        axis.axhspan(base - spread, base + spread, color='C2', alpha=0.3, label='no SVD')
        for shift, name in enumerate((*METHODS, *CONTROLS)):
            arm = f'{scope}, {name}' if name in METHODS else name
            ranks = [rank for rank in RANKS if (arm, rank) in means]
            color, style = styles[name]
            axis.errorbar([rank * 1.03 ** (shift - 1.5) for rank in ranks],
                          [means[arm, rank][0] for rank in ranks],
                          [means[arm, rank][1] for rank in ranks], fmt=style, color=color,
                          capsize=2, markersize=4, label=f"'{name}'" if name in METHODS else name)
        axis.set_xscale('log', base=2)
        axis.set_xticks(RANKS, RANKS)
        axis.set_title(f"'{scope}'" + (', prefix-only' if scope == 'sequence' else ''), fontsize=11)
        axis.set_xlabel('rank of V (head size 32)')
        axis.grid(alpha=0.3)
    axes[0].set_ylabel('validation loss, nats per character')
    axes[-1].legend(fontsize=8)
    seeds = ', '.join(map(str, sorted({row['seed'] for row in rows})))
    figure.suptitle(
        f'Loss after {rows[0]["steps"]} steps, mean and standard deviation over seeds {seeds}',
        fontsize=11)
    plots.save(figure, FIGURE)


def main(argv=None):
    """Run the command. Returns the exit code: 0 done, 1 a run failed, 2 wrong input, 130 or 143
    stopped by a signal."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ['--train']:
        return train_here(argv[1], argv[2:])
    return cli.run('loss_against_rank.py', SweepConfig, __doc__, experiment, argv)


def experiment(cfg):
    """Run what is missing, print the table and draw the figure. Returns 0, or 1 if a run failed.
    Raises UserError."""
    check(cfg)
    if cfg.jobs:
        todo = list(jobs(cfg))
        failed = sweep.run_all(todo, cfg.jobs, ended)
        print(f'{len(todo) - len(failed)} of {len(todo)} runs done')
        if failed:
            return 1
        rows = collect(cfg)
    else:
        rows = read_json_lines(RECORD)
    print(table(rows))
    plot(rows)
    print(f'figure: {FIGURE}')
    return 0


if __name__ == '__main__':
    sys.exit(main())

"""
What the rank of V costs: the main job's model at ranks 2, 4, 8 and 16 of 32, every scope and
method, against controls.

    python experiments/loss_against_rank.py --dataset=input.txt  # run what is missing, draw
    python experiments/loss_against_rank.py --jobs=0             # draw what is recorded

A run is config/train_svd_test.py with the options of its row, in a folder of its own below out_dir;
finished ones are not repeated, so an interrupted sweep goes on. 'sequence' scope keeps the config's
svd_basis_grad=False, for with the gradient its parallel loss means nothing (docs/RESULTS.md); the
other scopes, which cannot see the future, take it.

The controls say what a rank costs without any SVD: 'random projection', every head's V times a
random projector of that rank, drawn once from the run's seed; 'narrow values', heads whose values
are only that wide from the start, which has as many coordinates a token and fewer parameters.

Jobs at a time share the processor's threads out. The record is experiments/loss_against_rank.jsonl,
the figure docs/loss_against_rank.png.
"""

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from runtime import cli  # before torch: says what is not installed

import torch
from torch import nn

import model
import train
from lowrank.head_svd import NoSVD
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
    """Options of the sweep; what a run is stands in `runs`."""
    dataset: Annotated[str, "as for train.py; the record's is Tiny Shakespeare",
                       PATH] = 'shakespeare_char'
    out_dir: Annotated[str, 'folder of the runs', PATH] = 'out-rank'
    steps: Annotated[int, 'of each run, the schedule included', Range(20)] = 500
    seeds: Annotated[int, 'runs a row: 1337, 1338, ...', Range(1)] = 3
    jobs: Annotated[int, 'runs at a time; 0: only table and figure', Range(0)] = 2

    def __post_init__(self):
        configuration.validate(self)


class RandomProjection(model.CausalSelfAttention):
    """V times a random projector of rank k a head, the same for every token: (B, nh, T, hs) -> (B,
    nh, T, hs)."""

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
    """Heads of hs wide queries and keys, and k wide values."""

    def __init__(self, config):
        super().__init__(config)
        self.head_svd, width = NoSVD(), config.n_head * config.svd_rank
        self.c_attn = nn.Linear(config.n_embd, 2 * config.n_embd + width, bias=config.bias)
        self.c_proj = nn.Linear(width, config.n_embd, bias=config.bias)

    def project(self, x):
        """x (B, T, C) -> q, k (B, nh, T, hs), v (B, nh, T, k)."""
        C = x.size(2)
        q, k, v = self.c_attn(x).split((C, C, self.c_proj.in_features), dim=2)
        return tuple(t.unflatten(2, (self.n_head, -1)).transpose(1, 2) for t in (q, k, v))

    def value_statistics(self, x):
        return {}


CONTROLS = {'random projection': RandomProjection, 'narrow values': NarrowValues}


def runs(cfg):
    """Every run: (folder name, row of the record without results, options of train.py)."""
    for seed in range(1337, 1337 + cfg.seeds):
        arms = [('no SVD', None, ['--use_svd=False'])]
        arms += [(f'{scope}, {method}', rank, [
            f'--svd_scope={scope}', f'--svd_method={method}', f'--svd_rank={rank}',
            f'--svd_basis_grad={scope != "sequence"}'
        ]) for method in METHODS for scope in SCOPES for rank in RANKS]
        # 'weight' in name only: the classes above put themselves in its place
        arms += [(name, rank, ['--svd_scope=weight', f'--svd_rank={rank}'])
                 for name in CONTROLS
                 for rank in RANKS]
        for arm, rank, options in arms:
            name = f'{arm}, {rank}, {seed}'.replace(', ', '-').replace(' ', '_')
            yield name, {'arm': arm, 'rank': rank, 'seed': seed,
                         'steps': cfg.steps}, [*options, f'--seed={seed}']


def jobs(cfg):
    """Jobs for sweep.run_all. What was interrupted begins again: the checkpoint there may be of
    other `steps`."""
    for name, row, options in runs(cfg):
        folder = Path(cfg.out_dir) / name
        argv = [
            str(ROOT / 'config' / 'train_svd_test.py'), f'--dataset={cfg.dataset}',
            f'--out_dir={folder}', *options, f'--max_iters={cfg.steps}',
            f'--lr_decay_iters={cfg.steps}', f'--warmup_iters={cfg.steps // 20}',
            f'--eval_interval={cfg.steps}', '--device=cpu']
        yield sweep.Job(name, folder, cfg.steps, [__file__, '--train', row['arm'], *argv], None)


def ended(job, code, seconds):
    """One line about a run."""
    final = sweep.result(job.folder, job.steps)
    print(
        sweep.failure(job, code) if code or not final else f'{job.name}: {final["val/loss"]:.4f}',
        flush=True)


def train_here(arm, argv):
    """In a process of its own: train.py's main, with a control's attention if the arm is one."""
    if arm in CONTROLS:
        model.CausalSelfAttention = CONTROLS[arm]
    train.sample = lambda *_: '(none)'
    return train.main(argv)


def check(cfg):
    """Before hours are spent: what all runs need. Raises UserError."""
    plots.require_matplotlib(f'the figure {FIGURE}', FIGURE)
    if not cfg.jobs and not RECORD.exists():
        raise UserError(f'jobs=0: there is no {RECORD} yet (nearest: --jobs=1)')
    if cfg.jobs:
        check_writable(Path(cfg.out_dir) / 'ckpt.pt', f'out_dir={cfg.out_dir!r}')
        check_writable(RECORD, RECORD)
        locate(cfg.dataset, 'char')


def collect(cfg):
    """The record of all finished runs, written to RECORD -> list of rows."""
    rows = []
    for name, row, _ in runs(cfg):
        folder = Path(cfg.out_dir) / name
        final = sweep.result(folder, cfg.steps)
        if final:
            here = json.loads((folder / 'environment.json').read_text())
            rows.append(
                row | {
                    'loss': final.get('val/prefix_loss', final['val/loss']),
                    'parallel': final['val/loss'], 'gap_se': final.get('val/prefix_gap_se', 0.0),
                    'torch': here['torch'], 'git_commit': here['git_commit'][:7]})
    write_atomically(RECORD, ''.join(json.dumps(row) + '\n' for row in rows).encode())
    return rows


def summary(rows):
    """(arm, rank) -> mean and standard deviation over seeds of the prefix-only loss, mean parallel
    loss, seeds."""
    groups = {}
    for row in rows:
        groups.setdefault((row['arm'], row['rank']), []).append(row)
    return {
        key: (statistics.mean(r['loss']
                              for r in group),
              statistics.stdev(r['loss']
                               for r in group) if len(group) > 1 else 0.0,
              statistics.mean(r['parallel']
                              for r in group), len(group))
        for key, group in groups.items()}


def table(rows):
    """Markdown: an arm a line, a rank a column, prefix-only loss and its standard deviation over
    seeds; in brackets the parallel loss, where it is another."""
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
    """Loss against rank, a panel a scope, to FIGURE."""
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
            axis.errorbar([rank * 1.03 ** (shift - 1.5)
                           for rank in ranks], [means[arm, rank][0] for rank in ranks],
                          [means[arm, rank][1] for rank in ranks], fmt=style, color=color,
                          capsize=2, markersize=4, label=f"'{name}'" if name in METHODS else name)
        axis.set_xscale('log', base=2)
        axis.set_xticks(RANKS, RANKS)
        axis.set_title(f"'{scope}'" + (', prefix-only' if scope == 'sequence' else ''), fontsize=11)
        axis.set_xlabel('rank of V (head size 32)')
        axis.grid(alpha=0.3)
    axes[0].set_ylabel('validation loss, nats a character')
    axes[-1].legend(fontsize=8)
    seeds = ', '.join(map(str, sorted({row['seed'] for row in rows})))
    figure.suptitle(
        f'Loss after {rows[0]["steps"]} steps, mean and standard deviation of seeds {seeds}',
        fontsize=11)
    plots.save(figure, FIGURE)


def main(argv=None):
    """-> exit code: 0 done, 1 a run failed, 2 wrong input, 130 / 143 stopped."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ['--train']:
        return train_here(argv[1], argv[2:])
    return cli.run('loss_against_rank.py', SweepConfig, __doc__, experiment, argv)


def experiment(cfg):
    """Run what is missing, print the table, draw the figure. -> exit code. Raises UserError."""
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

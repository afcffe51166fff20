"""
What adaptive SVD saw and did in a run, over its steps, a column a projection and a line a block:

    python plot_adaptive.py --out_dir=out-adaptive-svd           # OUT_DIR/adaptive_svd.png, from OUT_DIR/metrics.jsonl
    python plot_adaptive.py --help

Rows: the share of the gradient's energy in the protected space, chance dotted, and outside of it; how far the first is
beyond chance, on a scale where chance is 0 and everything is 1; the mode; the components that are trained, all of them
in full mode; the training loss.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from runtime import command, plots                                      # before torch: says what is not installed
from runtime.config import PATH, UserError

from lowrank.adaptive_svd import DANGER_ALIGNMENT, DANGER_EXCESS

ROWS = {'principal_alignment': ('principal share\n(chance dotted)', {'danger': DANGER_ALIGNMENT}),
        'minor_alignment': ('minor share', {}),
        'excess': ('beyond chance', {'chance': 0.0, 'danger': DANGER_EXCESS}), 'mode': ('low-rank mode', {}),
        'r': ('r', {})}
MODES = {'full': 0, 'lowrank': 1}

ANALYSED = r'svd/(block[0-9]{1,6}\.[^/]+)/r'
DRAWN = r'svd/[^/]+/(principal_alignment|minor_alignment|chance|excess|r)'


@dataclass
class PlotConfig:
    out_dir: Annotated[str, 'folder of the run', PATH] = 'out-adaptive-svd'


def main(argv=None):
    """-> exit code: 0 done, 1 a full disk, 2 wrong input (one line on stderr)."""
    return command.run('plot_adaptive.py', PlotConfig, __doc__, lambda cfg: print(plot(cfg)), argv)


def plot(cfg):
    """Writes the figure -> where it is, in words."""
    path, target = Path(cfg.out_dir) / 'metrics.jsonl', Path(cfg.out_dir) / 'adaptive_svd.png'
    plots.require_matplotlib(f'the figure {target}', target)
    try:
        rows = [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
    except FileNotFoundError:
        raise UserError(f"out_dir='{cfg.out_dir}': no run there; first: python train.py config/train_adaptive_svd.py, "
                        'or name one: --out_dir=DIR') from None
    except OSError as e:
        raise UserError(f'{path}: cannot be read: {e.strerror} (nearest: the out_dir of a run)') from None
    except (ValueError, RecursionError):
        raise UserError(f'{path}: damaged: not JSON, line by line') from None
    if not all(map(is_row, rows)):
        raise UserError(f'{path}: damaged: lines that no run writes')
    names = {found[1]: None for row in rows for key in row if (found := re.fullmatch(ANALYSED, key))}
    if not names:
        raise UserError(f'{path}: has no analysis (nearest: a run of config/train_adaptive_svd.py)')
    kinds = {kind: [name for name in names if name.endswith(f'.{kind}')]
             for kind in dict.fromkeys(name.rpartition('.')[2] for name in names)}
    panels = [plots.PanelRow(label, 'linear', {kind: panel(rows, key, own, level) for kind, own in kinds.items()})
              for key, (label, level) in ROWS.items()]
    losses = [(row['iter'], row['loss']) for row in rows if 'loss' in row]
    panels.append(plots.PanelRow('training loss', 'linear', {
        kind: plots.Panel([plots.Line(*zip(*losses), block_of(own[0]))] if losses else [], {}, {})
        for kind, own in kinds.items()}))
    plots.line_panels(target, panels, 'step', 'block', f'Adaptive SVD: {cfg.out_dir}')
    return f'figure: {target}'


def is_row(row):
    """Whether a line is one of a run's: a step, and numbers where they are drawn, or modes."""
    return isinstance(row, dict) and type(row.get('iter')) is int and all(
        type(value) in (int, float) for key, value in row.items() if key == 'loss' or re.fullmatch(DRAWN, key)) and all(
        value in [*MODES] for key, value in row.items() if key.startswith('svd/') and key.endswith('/mode'))


def panel(rows, key, names, level):
    """The curves of a projection: a line a block, a point an analysis that has this number."""
    lines = []
    for name in names:
        for kind, style in ((key, '-'), ('chance', ':')) if key == 'principal_alignment' else ((key, '-'),):
            points = [(row['iter'], MODES.get(value, value)) for row in rows
                      if (value := row.get(f'svd/{name}/{kind}')) is not None]
            if key in ('mode', 'r'):
                points = stairs(points)
            if points:
                lines.append(plots.Line(*map(list, zip(*points)), block_of(name), style))
    return plots.Panel(lines, level, {})


def stairs(points):
    """What was decided at an analysis holds until the next one."""
    held = [(step, y) for (x, y), (x_next, _) in zip(points, points[1:]) for step in (x, x_next)]
    return held + points[-1:]


def block_of(name):
    return int(name.partition('.')[0].removeprefix('block'))


if __name__ == '__main__':
    sys.exit(main())

"""What a sweep of compare.py has come to: its folder -> a table, files, figures."""

import csv
import io
import json
import math
import statistics
from pathlib import Path

from runtime import plots, tracking
from tools import sweep
from runtime.config import UserError
from runtime.files import write_atomically

SWEEP = dict(lists=dict, seeds=list, arms=dict)                     # what sweep.json has, and each of its arms
ARM = dict(options=dict, baseline=str, config=dict, parameters=int, chance=float, cache_bytes=int | None)
TIMES = dict(baseline=str, ratio=float, ratio_quartiles=list)
MOST_PANELS = 6


def words(options):
    """In a name of a run, as short as it can be: its folder's, too."""
    def short(value):
        return ''.join(c if c.isalnum() or c in '.+-_' else '_' for c in str(value))[-60:]
    return ','.join(f'{key}={short(value)}' for key, value in options.items())


def run_name(arm, seed):
    return f'{arm},seed={seed}'


def losses(final):
    prefix = f' parallel, {final["val/prefix_loss"]:.4f} prefix-only' if 'val/prefix_loss' in final else ''
    return f'val loss {final["val/loss"]:.4f}{prefix}'


def duration(seconds):
    if seconds < 90:
        return f'{seconds:.0f} s'
    return f'{seconds / 60:.0f} min' if seconds < 5400 else f'{seconds / 3600:.1f} h'


def read_json(path):
    """Raises UserError where it cannot be read as JSON."""
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        raise UserError(f'{path}: no such file; is its folder that of a sweep?') from None
    except OSError as e:
        raise UserError(f'{path}: cannot be read: {e.strerror}') from None
    except (ValueError, RecursionError):
        raise UserError(f'{path}: damaged: not JSON') from None


def load(folder):
    """sweep.json: the lists, seeds and arms. Raises UserError."""
    path = folder / 'sweep.json'
    if not path.exists():
        near = sorted(p.parent.name for p in Path('.').glob('*/sweep.json'))
        raise UserError(f"sweep={str(folder)!r}: holds no sweep (" + (f'nearest: {near[0]!r}' if near else 'nearest: '
                        'python compare.py config/train_svd_test.py --svd_rank=None,4,8,16 --seeds=3') + ')')
    record = read_json(path)
    if not is_like(record, SWEEP) or not all(is_like(arm, ARM) for arm in record['arms'].values()) or not all(
            type(seed) is int for seed in record['seeds']):
        raise UserError(f'{path}: damaged: not what compare.py writes')
    return record


def is_like(value, kinds):
    """Whether it is a dict that has these keys with values of these kinds."""
    return isinstance(value, dict) and all(isinstance(value.get(key), kind) for key, kind in kinds.items())


def read_times(folder):
    """timing.json: of each arm what `paired` says, its baseline beside it; {} where nothing was timed yet."""
    path = folder / 'timing.json'
    times = read_json(path) if path.exists() else {}
    if not isinstance(times, dict) or not all(is_like(row, TIMES) for row in times.values()):
        raise UserError(f'{path}: damaged: not what compare.py writes (nearest: delete it, to have it measured anew)')
    return times


def show(folder, say):
    """Print the table of a sweep, write its files and figures. -> name of a figure -> its file. Raises UserError."""
    record = load(folder)
    rows, missing = collect(folder, record)
    for line in missing:
        say(line)
    if not any(row['seeds'] for row in rows):
        raise UserError(f'{folder}: has no finished run')
    text = table(rows, record)
    say(text)
    try:
        plots.require_matplotlib('figures')
        drawn, not_drawn = figures(folder, record, rows)
        for line in not_drawn:
            say(line)
    except UserError as e:
        drawn = []
        say(str(e))
    pictures = ''.join(f'\n![{caption}]({path.name})\n' for path, caption in drawn)
    files = {'results.json': json.dumps({'seeds': record['seeds'], 'rows': rows}, indent=1), 'results.csv':
             csv_text(rows, record), 'results.md': f'{text}\n{pictures}'}
    for name, content in files.items():
        write_atomically(folder / name, content.encode())
    say(f'{folder}: ' + ', '.join([*files, *(path.name for path, _ in drawn)]))
    return {path.stem: path for path, _ in drawn}


# ----------------------------------------------------------------------------------------------------------------------
# numbers

def collect(folder, record):
    """-> a row an arm, of the runs that are finished, and a line for each that is not."""
    times, rows, missing = read_times(folder), [], []
    for name, arm in record['arms'].items():
        found = {}
        for seed in record['seeds']:
            path = folder / 'runs' / run_name(name, seed)
            final = sweep.result(path, arm['config']['max_iters'])
            if final:
                found[seed] = final
            else:
                missing.append(f'{path}: not finished, left out' if path.exists() else f'{path}: missing, left out')
        own, baseline = times.get(name), arm['baseline']
        step = own if own and own['baseline'] == baseline else None
        if name == baseline:
            step = {'ratio': 1.0, 'ratio_quartiles': None}
        parallel = [final['val/loss'] for final in found.values()]
        prefix = [final.get('val/prefix_loss', final['val/loss']) for final in found.values()]
        rows.append({'name': name, 'options': arm['options'], 'baseline': baseline, 'seeds': list(found),
                     'parallel': parallel, 'prefix_only': prefix, 'parallel_mean': mean(parallel),
                     'parallel_se': standard_error(parallel), 'prefix_only_mean': mean(prefix),
                     'prefix_only_se': standard_error(prefix), 'step_time': step, 'chance': arm['chance'],
                     'cache_bytes': arm['cache_bytes'], 'parameters': arm['parameters']})
    return rows, missing


def mean(values):
    return statistics.mean(values) if values else None


def standard_error(values):
    """Of the mean; None of one value, or none."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def table(rows, record):
    """Markdown, columns as wide as their cells, and what they mean."""
    keys = [key for key in record['lists'] if any(key in row['options'] for row in rows)]
    head = [*keys, 'parallel loss', 'prefix-only loss', 'step time / baseline', 'cache bytes', 'parameters']
    few = any(len(row['seeds']) < len(record['seeds']) for row in rows)
    if few:
        head.insert(len(keys), 'seeds')
    lines = [head]
    for row in rows:
        cells = [str(row['options'].get(key, '')) for key in keys] + [str(len(row['seeds']))] * few
        cells += [with_error(row[f'{kind}_mean'], row[f'{kind}_se']) for kind in ('parallel', 'prefix_only')]
        cells += [ratio(row['step_time']), 'none' if row['cache_bytes'] is None else f'{row["cache_bytes"]:,}',
                  f'{row["parameters"]:,}']
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ['-' * width for width in widths])
    drawn = ['| ' + ' | '.join(cell.ljust(width) for cell, width in zip(line, widths)) + ' |' for line in lines]
    return '\n'.join([*drawn, '', *notes(rows, record)])


def with_error(mean, error):
    return '' if mean is None else f'{mean:.4f}' + ('' if error is None else f' +- {error:.4f}')


def ratio(step):
    """Median, and quartiles in brackets; '' where it was not measured."""
    if step is None:
        return ''
    low, high = step['ratio_quartiles'] or (None, None)
    return f'{step["ratio"]:.3f}' + ('' if low is None else f' ({low:.3f} to {high:.3f})')


def notes(rows, record):
    """What the columns are."""
    count, names = len(record['seeds']), list(dict.fromkeys(row['baseline'] for row in rows))
    chances = ', '.join(f'{chance:.2f}' for chance in dict.fromkeys(row['chance'] for row in rows))
    spread = 'mean +- standard error over seeds' if count > 1 else 'one seed, hence no standard error,'
    lines = [f'Losses: validation, nats a token, {spread} {", ".join(map(str, record["seeds"]))}; chance: {chances}. '
             'Prefix-only is what generation gets.',
             'Baseline: ' + names[0] if len(names) == 1 else
             'Baseline: the ordinary model with the same other options: ' + '; '.join(names)]
    lines[-1] += ('. Step time: median of pairs of steps of a micro-batch, taken in turn after the runs, times the '
                  'micro-batches of a step; quartiles in brackets.')
    sizes = {arm['config']['block_size'] for arm in record['arms'].values()}
    lines.append(f'Cache: float32, of one sequence of {" or ".join(map(str, sorted(sizes)))} tokens' + (
        "; none: 'sequence' scope cannot cache" if any(row['cache_bytes'] is None for row in rows) else '') + '.')
    return lines


def csv_text(rows, record):
    """A line an arm."""
    out, keys = io.StringIO(), list(record['lists'])
    writer = csv.writer(out, lineterminator='\n')
    columns = ('parallel_mean', 'parallel_se', 'prefix_only_mean', 'prefix_only_se')
    writer.writerow(['name', *keys, 'seeds', *columns, 'step_ratio', 'step_ratio_low', 'step_ratio_high', 'baseline',
                     'cache_bytes', 'parameters'])
    for row in rows:
        step = row['step_time'] or {'ratio': None, 'ratio_quartiles': None}
        writer.writerow([row['name'], *(str(row['options'].get(key, '')) for key in keys), len(row['seeds']),
                         *(row[column] for column in columns), step['ratio'], *(step['ratio_quartiles'] or ('', '')),
                         row['baseline'], row['cache_bytes'], row['parameters']])
    return out.getvalue()


# ----------------------------------------------------------------------------------------------------------------------
# figures

def axis_of(record):
    """The option along the horizontal axis, svd_rank if it varies, else the first that has several numbers, else the
    first; None: nothing varies. And whether it is of numbers."""
    def numbers(key):
        return len({v for v in record['lists'][key] if type(v) in (int, float)}) > 1
    numeric = [key for key in record['lists'] if numbers(key)]
    varied = [key for key, values in record['lists'].items() if len(values) > 1]
    key = next(iter([key for key in numeric if key == 'svd_rank'] + numeric + varied), None)
    return key, key in numeric


def groups_of(rows, record):
    """-> option along the axis, whether it is of numbers, group -> its rows in order, and the rows beside all groups,
    which have no place along the axis, as those without SVD have no rank."""
    key, numeric = axis_of(record)
    groups, beside = {}, []
    for row in (row for row in rows if row['seeds']):
        value = row['options'].get(key)
        if key not in row['options'] or numeric and type(value) not in (int, float):
            beside.append(row)
        else:
            others = {k: v for k, v in row['options'].items() if k != key}
            groups.setdefault(', '.join(f'{k}={v}' for k, v in others.items()) or key, []).append(row)
    for group in groups.values():
        if numeric:
            group.sort(key=lambda row: row['options'][key])
    return key, numeric, groups, beside


def figures(folder, record, rows):
    """Draw what makes sense -> (path, caption) of the figures, and a line for each that does not."""
    drawn, not_drawn = [], []
    for name, draw in (('loss', draw_losses), ('curves', draw_curves), ('pareto', draw_pareto)):
        path = folder / f'{name}.png'
        caption, why_not = draw(path, folder, record, rows)
        not_drawn += [f'{path.name}: {line}' for line in why_not]
        if caption:
            drawn.append((path, caption))
        else:
            path.unlink(missing_ok=True)                            # one of an earlier look
    return drawn, not_drawn


def over_seeds(record, rows):
    """The end of a caption."""
    seeds = record['seeds']
    named = f'{seeds[0]} to {seeds[-1]}' if seeds == list(range(seeds[0], seeds[-1] + 1)) and len(seeds) > 2 else (
        ', '.join(map(str, seeds)))
    fewer = ', of those that are finished' if any(len(row['seeds']) < len(seeds) for row in rows) else ''
    return f'mean and standard error of seeds {named}{fewer}' if len(seeds) > 1 else f'one seed, {named}'


def level(row, label, kind, look=plots.LEVEL):
    """The curve of a row that has no place along an axis."""
    return plots.Curve(label, None, [row[f'{kind}_mean']], look, [row[f'{kind}_se']])


def looks(names):
    """Name -> colour, marker, line."""
    return {name: (plots.COLOURS[i % len(plots.COLOURS)], plots.MARKERS[i % len(plots.MARKERS)], '-')
            for i, name in enumerate(names)}


def guides(beside):
    """Row beside all groups -> its look."""
    lines = ('--', ':', '-.')
    return [(row, ('0.25', '*', lines[i % len(lines)])) for i, row in enumerate(beside)]


def draw_losses(path, folder, record, rows):
    """Loss against the option along the axis -> caption, or None, and why it is not drawn."""
    key, numeric, groups, beside = groups_of(rows, record)
    if not groups:
        return None, ['not drawn: no option varies']
    values = list(dict.fromkeys(row['options'][key] for group in groups.values() for row in group))
    place = {value: value if numeric else i for i, value in enumerate(values)}
    wide = numeric and min(values) > 0 and max(values) >= 4 * min(values)
    span = max(place.values()) - min(place.values())

    def beside_it(x, aside):                                        # so that error bars do not cover each other
        return x * 1.03 ** aside if wide else x + 0.012 * span * aside
    kinds = {'parallel': 'parallel', 'prefix_only': 'prefix-only: what generation gets'}
    if all(row['parallel'] == row['prefix_only'] for row in rows):
        kinds = {'prefix_only': ''}
    panels, own = [], looks(groups)
    for kind, title in kinds.items():
        curves = [level(row, row['name'], kind, look) for row, look in guides(beside)]
        for i, (name, group) in enumerate(groups.items()):
            look, aside = own[name] if numeric else (*own[name][:2], None), i - (len(groups) - 1) / 2
            curves.append(plots.Curve(name, [beside_it(place[row['options'][key]], aside) for row in group],
                                      [row[f'{kind}_mean'] for row in group], look,
                                      [row[f'{kind}_se'] for row in group]))
        ticks = {place[v]: f'{v:g}' if numeric else str(v) for v in values} if len(values) < 9 or not numeric else None
        panels.append(plots.Chart(title, key, curves, wide, ticks))
    caption = f'Validation loss against {key}: {over_seeds(record, rows)}, after {steps(record)} steps.'
    plots.charts(path, panels, 'validation loss, nats a token', caption)
    return caption, []


def steps(record):
    return ' or '.join(sorted({f'{arm["config"]["max_iters"]:,}' for arm in record['arms'].values()}))


def draw_curves(path, folder, record, rows):
    """Loss over the steps, a panel a group."""
    key, numeric, groups, beside = groups_of(rows, record)
    groups = groups or {'': []}
    if len(groups) > MOST_PANELS:
        return None, [f'not drawn: {len(groups)} panels would be too many (nearest: fewer options at a time)']
    values = sorted({row['options'][key] for group in groups.values() for row in group}, key=values_order)
    shades = plots.shades(len(values)) if numeric else plots.COLOURS
    look = {value: (shades[i % len(shades)], None if numeric else plots.MARKERS[i % len(plots.MARKERS)], '-')
            for i, value in enumerate(values)}
    panels = []
    for name, group in groups.items():
        curves = [curve(folder, row, row['name'], (look[0], None, look[2])) for row, look in guides(beside)]
        curves += [curve(folder, row, f'{key}={row["options"][key]}', look[row['options'][key]]) for row in group]
        panels.append(plots.Chart(name if len(groups) > 1 else '', 'step', [one for one in curves if one]))
    if not any(panel.curves for panel in panels):
        return None, ['not drawn: no two evaluations after the first step']
    caption = ('Validation loss on the way, random batches, prefix-only where that differs: '
               f'{over_seeds(record, rows)}; step 0 is left out.')
    plots.charts(path, panels, 'validation loss, nats a token', caption, bands=True)
    return caption, []


def values_order(value):
    return (0, value, '') if type(value) in (int, float) else (1, 0, str(value))


def curve(folder, row, label, look):
    """Mean over seeds of the evaluations after the first step; None: there are no two."""
    at = {}
    for seed in row['seeds']:
        for one in tracking.read_metrics(folder / 'runs' / run_name(row['name'], seed)):
            if 'val/loss' in one and 'final' not in one and one['iter']:
                at.setdefault(one['iter'], []).append(one.get('val/prefix_loss', one['val/loss']))
    x = sorted(step for step, values in at.items() if len(values) == len(row['seeds']))
    if len(x) < 2:
        return None
    return plots.Curve(label, x, [mean(at[step]) for step in x], look, [standard_error(at[step]) for step in x])


def draw_pareto(path, folder, record, rows):
    """Loss against what an arm costs in memory and time, a panel each."""
    key, numeric, groups, beside = groups_of(rows, record)
    costs = {'cache of a whole context, kB': lambda row: row['cache_bytes'] and row['cache_bytes'] / 1000,
             'step time / baseline': lambda row: row['step_time'] and row['step_time']['ratio']}
    panels, why_not, own = [], [], looks(groups)
    for title, cost in costs.items():
        known = [row for group in groups.values() for row in group if cost(row) is not None]
        extra = [(row, look) for row, look in guides(beside) if cost(row) is not None]
        if len({cost(row) for row in known + [row for row, _ in extra]}) < 2:
            why_not.append(f'no panel of {title}: fewer than two different ones are known')
            continue
        points = sorted((cost(row), row['prefix_only_mean']) for row in known + [row for row, _ in extra])
        curves = [plots.Curve('lowest loss up to that cost', *front(points), ('0.6', None, '-'))]
        curves += [points_of([row], row['name'], cost, (*look[:2], None), None) for row, look in extra]
        curves += [points_of([row for row in group if row in known], name, cost, (*own[name][:2], None), key)
                   for name, group in groups.items()]
        span = points[-1][0] / points[0][0]
        panels.append(plots.Chart('', title, [one for one in curves if one.x], span >= 4))
    if not panels:
        return None, why_not
    caption = (f'Prefix-only validation loss against cost, {key} beside the points: {over_seeds(record, rows)}; time: '
               'quartiles.')
    plots.charts(path, panels, 'validation loss, nats a token', caption)
    return caption, why_not


def points_of(group, label, cost, look, key):
    """The curve of a group, unjoined."""
    timed = bool(group) and all(row['step_time'] and cost(row) == row['step_time']['ratio'] for row in group)
    across = [row['step_time']['ratio_quartiles'] or (1, 1) for row in group] if timed else None
    return plots.Curve(label, [cost(row) for row in group], [row['prefix_only_mean'] for row in group], look,
                       [row['prefix_only_se'] for row in group], across,
                       key and [str(row['options'][key]) for row in group])


def front(points):
    """The stairs below which there is no point: x, y of their corners."""
    x, y = [], []
    for a, b in points:
        if not y or b < y[-1]:
            x, y = x + [a] * (1 + bool(y)), y + [y[-1], b] if y else [b]
    return x + [points[-1][0]], y + [y[-1]]

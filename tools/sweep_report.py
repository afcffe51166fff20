"""What a sweep of compare.py has come to: its folder -> a table, files, figures."""

import csv
import io
import json
import statistics
from collections import namedtuple
from itertools import accumulate

from runtime import plots
from runtime.config import UserError
from runtime.files import write_atomically
from runtime.tracking import read_metrics
from tools import sweep

# key: the option along the horizontal axis; is_numeric: whether it has numbers, else words; groups:
# label of the other options -> place along the axis -> row; baselines: rows that have no place
# there, as models without SVD have no rank
Axis = namedtuple('Axis', 'key is_numeric groups baselines')


def show(folder):
    """Print the table of a sweep, write results.md, .csv and .json, and draw the figures -> name of
    a figure -> its file. Raises UserError."""
    record = sweep.load(folder)
    rows = collect(folder, record)
    if not any(row['seeds'] for row in rows):
        raise UserError(f'{folder}: has no finished run')
    text = table(rows, record)
    print(text)
    captions = draw(folder, record, [row for row in rows if row['seeds']])
    pictures = ''.join(f'\n![{caption}]({path.name})\n' for path, caption in captions.items())
    files = {'results.json': json.dumps({'seeds': record['seeds'], 'rows': rows}, indent=1),
             'results.csv': csv_text(rows, record), 'results.md': f'{text}\n{pictures}'}
    for name, content in files.items():
        write_atomically(folder / name, content.encode())
    print(f'{folder}: ' + ', '.join([*files, *(path.name for path in captions)]))
    return {path.stem: path for path in captions}


# --------------------------------------------------------------------------------------------------
# numbers

def collect(folder, record):
    """-> one row per variant, of its runs that are finished. What is missing is printed."""
    times, rows = sweep.read_json(folder / 'timing.json'), []
    for name, arm in record['arms'].items():
        finals = {seed: sweep.result(folder / 'runs' / sweep.run_name(name, seed),
                                     arm['config']['max_iters']) for seed in record['seeds']}
        missing = [seed for seed, final in finals.items() if not final]
        if missing:
            print(f'{name}: not finished, left out: seed {", ".join(map(str, missing))}')
        finals = {seed: final for seed, final in finals.items() if final}
        row = {'name': name, 'options': arm['options'], 'baseline': arm['baseline'],
               'seeds': list(finals), 'chance': arm['chance'], 'cache_bytes': arm['cache_bytes'],
               'parameters': arm['parameters'],
               'parallel': [final['val/loss'] for final in finals.values()],
               'prefix_only': [final.get('val/prefix_loss', final['val/loss'])
                               for final in finals.values()]}
        for kind in ('parallel', 'prefix_only'):
            row[f'{kind}_mean'], row[f'{kind}_se'] = mean_and_error(row[kind])
        time = times.get(name, {})
        if time.get('baseline') != arm['baseline']:     # not timed, or before the sweep grew
            time = {'ratio': 1.0 if name == arm['baseline'] else None,
                    'ratio_quartiles': [None, None]}
        row['step_ratio'] = time['ratio']
        row['step_ratio_low'], row['step_ratio_high'] = time['ratio_quartiles']
        rows.append(row)
    return rows


def mean_and_error(values):
    """Mean and its standard error. None: there are too few values."""
    return (statistics.mean(values) if values else None,
            statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None)


def table(rows, record):
    """Markdown, columns as wide as their cells, and below what they mean."""
    columns = {key: [str(row['options'].get(key, '')) for row in rows] for key in record['lists']
               if any(key in row['options'] for row in rows)}
    if any(len(row['seeds']) < len(record['seeds']) for row in rows):
        columns['seeds'] = [str(len(row['seeds'])) for row in rows]
    columns |= {
        'parallel loss': [format_loss(row, 'parallel') for row in rows],
        'prefix-only loss': [format_loss(row, 'prefix_only') for row in rows],
        'step time / baseline': [
            fill('{:.3f}', row['step_ratio'])
            + fill(' ({:.3f} to {:.3f})', row['step_ratio_low'], row['step_ratio_high'])
            for row in rows],
        'cache bytes': [fill('{:,}', row['cache_bytes']) or 'none' for row in rows],
        'parameters': [f'{row["parameters"]:,}' for row in rows]}
    padded = []
    for head, cells in columns.items():
        width = max(map(len, (head, *cells)))
        padded.append([cell.ljust(width) for cell in (head, '-' * width, *cells)])
    lines = ['| ' + ' | '.join(line) + ' |' for line in zip(*padded)]
    return '\n'.join([*lines, '', *notes(rows, record)])


def format_loss(row, kind):
    return fill('{:.4f}', row[f'{kind}_mean']) + fill(' +- {:.4f}', row[f'{kind}_se'])


def fill(pattern, *values):
    """The values in str.format's pattern; '' if one is None."""
    return '' if None in values else pattern.format(*values)


def notes(rows, record):
    """What the columns are."""
    baselines = '; '.join(dict.fromkeys(row['baseline'] for row in rows))
    chances = ', '.join(dict.fromkeys(f'{row["chance"]:.2f}' for row in rows))
    sizes = ' or '.join({str(arm['config']['block_size']): None for arm in record['arms'].values()})
    return [
        f'Losses: validation, nats per token, {over_seeds(record)}; chance: {chances}. Prefix-only '
        'is what generation gets.',
        f'Baseline: {baselines}. Step time: median of pairs of steps of a micro-batch, taken in '
        'turn after the runs, times the micro-batches of a step; quartiles in brackets; not of '
        'adaptive SVD, whose steps differ.',
        f"Cache: float32, of one sequence of {sizes} tokens; none: 'sequence' scope cannot cache."]


def over_seeds(record):
    seeds = ', '.join(map(str, record['seeds']))
    return (f'mean +- standard error over seeds {seeds}' if len(record['seeds']) > 1 else
            f'one seed, {seeds}, hence no standard error')


def csv_text(rows, record):
    """One line per variant."""
    file = io.StringIO()
    writer = csv.DictWriter(file, [
        'name', *record['lists'], 'seeds', 'parallel_mean', 'parallel_se', 'prefix_only_mean',
        'prefix_only_se', 'step_ratio', 'step_ratio_low', 'step_ratio_high', 'baseline',
        'cache_bytes', 'parameters'], extrasaction='ignore', lineterminator='\n')
    writer.writeheader()
    for row in rows:
        options = {key: str(value) for key, value in row['options'].items()}
        writer.writerow({**row, **options, 'seeds': len(row['seeds'])})
    return file.getvalue()


# --------------------------------------------------------------------------------------------------
# figures

def draw(folder, record, rows):
    """Draw the figures that make sense, and print why others do not -> path -> caption."""
    try:
        plots.require_matplotlib('figures')
    except UserError as e:
        print(e)
        return {}
    axis, captions = arrange(record, rows), {}
    for name, (charts, text) in {'loss': loss_charts(axis), 'curves': progress_charts(axis, folder),
                                 'pareto': pareto_charts(axis)}.items():
        path = folder / f'{name}.png'
        if charts:
            captions[path] = f'{text}; {over_seeds(record)}.'
            plots.charts(path, charts, 'validation loss, nats per token', captions[path],
                         bands=name == 'curves')
        else:
            print(f'{path.name}: not drawn: {text}')
            path.unlink(missing_ok=True)                # an earlier one
    return captions


def arrange(record, rows):
    """Where each row is in the figures -> Axis.

    Along the horizontal axis is svd_rank if it varies, else the first option that has several
    numbers, else the first that varies, its values in the order of the list.
    """
    def is_number(value):
        return type(value) in (int, float)
    varied = {key: values for key, values in record['lists'].items() if len(values) > 1}
    numeric = [key for key, values in varied.items() if sum(map(is_number, values)) > 1]
    key = next(iter(sorted(numeric, key='svd_rank'.__ne__) + list(varied)), None)
    groups, baselines = {}, []
    for row in rows:
        others = dict(row['options'])
        value = others.pop(key, None)
        if key not in row['options'] or key in numeric and not is_number(value):
            baselines.append(row)
            continue
        place = value if key in numeric else varied[key].index(value)
        label = ', '.join(f'{name}={other}' for name, other in others.items()) or key
        groups.setdefault(label, {})[place] = row
    return Axis(key, key in numeric, {label: dict(sorted(group.items()))
                                      for label, group in groups.items()}, baselines)


def group_look(i, line='-'):
    return plots.COLOURS[i % len(plots.COLOURS)], plots.MARKERS[i % len(plots.MARKERS)], line


def baseline_look(i):
    return '0.25', None, ('--', ':', '-.')[i % 3]


def curve(label, x, rows, look, kind='prefix_only', **more):
    """The mean losses of rows at places x. None: as a level."""
    return plots.Curve(label, x, [row[f'{kind}_mean'] for row in rows], look,
                       [row[f'{kind}_se'] for row in rows], **more)


def loss_charts(axis):
    """Loss against the option along the axis -> Charts, caption; or none, and why."""
    ticks = {place: str(row['options'][axis.key]) for group in axis.groups.values()
             for place, row in group.items()}
    if not ticks:
        return [], 'no option varies'
    log = axis.is_numeric and min(ticks) > 0 and max(ticks) >= 4 * min(ticks)
    shift = 0.01 * (max(ticks) - min(ticks))            # so that error bars do not cover each other
    kinds = {'parallel': 'parallel', 'prefix_only': 'prefix-only: what generation gets'}
    if all(row['parallel'] == row['prefix_only'] for group in axis.groups.values()
           for row in group.values()):
        kinds = {'prefix_only': ''}
    charts = []
    for kind, title in kinds.items():
        curves = [curve(row['name'], None, [row], baseline_look(i), kind)
                  for i, row in enumerate(axis.baselines)]
        for i, (label, group) in enumerate(axis.groups.items()):
            x = [place * 1.03 ** i if log else place + shift * i for place in group]
            look = group_look(i, '-' if axis.is_numeric else None)
            curves.append(curve(label, x, group.values(), look, kind))
        charts.append(plots.Chart(title, axis.key, curves, log,
                                  ticks if len(ticks) < 9 or not axis.is_numeric else None))
    return charts, f'Validation loss against {axis.key}'


def progress_charts(axis, folder):
    """Loss over the steps, a Chart per group -> Charts, caption; or none, and why."""
    places = sorted({place for group in axis.groups.values() for place in group})
    colours = plots.shades(len(places)) if axis.is_numeric else plots.COLOURS
    levels = [progress(folder, row, row['name'], baseline_look(i))
              for i, row in enumerate(axis.baselines)]
    charts = []
    for label, group in (axis.groups or {'': {}}).items():
        curves = levels + [
            progress(folder, row, f'{axis.key}={row["options"][axis.key]}',
                     (colours[places.index(place) % len(colours)], None, '-'))
            for place, row in group.items()]
        title = label if len(axis.groups) > 1 else ''
        charts.append(plots.Chart(title, 'step', [one for one in curves if len(one.x) > 1]))
    if not any(chart.curves for chart in charts):
        return [], 'no two evaluations after the first step'
    return charts, 'Validation loss on the way, random batches, prefix-only where that differs'


def progress(folder, row, label, look):
    """The Curve of the evaluations that all seeds have, without that at step 0."""
    runs = []
    for seed in row['seeds']:
        found = read_metrics(folder / 'runs' / sweep.run_name(row['name'], seed))
        runs.append({one['iter']: one.get('val/prefix_loss', one['val/loss']) for one in found
                     if 'val/loss' in one and 'final' not in one and one['iter']})
    steps = sorted(set.intersection(*map(set, runs)))
    points = [mean_and_error([run[step] for run in runs]) for step in steps]
    return plots.Curve(label, steps, [mean for mean, _ in points], look,
                       [error for _, error in points])


def pareto_charts(axis):
    """Loss against costs in memory and time -> Charts, caption; or none, and why."""
    series = [(row['name'], [row], ('0.25', '*', None)) for row in axis.baselines] + [
        (label, group.values(), group_look(i, None))
        for i, (label, group) in enumerate(axis.groups.items())]
    charts = []
    for title, cost, unit in (('cache of a whole context, kB', 'cache_bytes', 1000),
                              ('step time / baseline', 'step_ratio', 1)):
        curves, points = [], []
        for label, rows, look in series:
            rows = [row for row in rows if row[cost] is not None]
            x = [row[cost] / unit for row in rows]
            spread = [(row['step_ratio_low'] or 1, row['step_ratio_high'] or 1) for row in rows]
            notes = [str(row['options'].get(axis.key, '')) for row in rows]
            points += [(cost, row['prefix_only_mean']) for cost, row in zip(x, rows)]
            if rows:
                curves.append(curve(label, x, rows, look, notes=notes,
                                    across=spread if cost == 'step_ratio' else None))
        costs = {x for x, _ in points}
        if len(costs) > 1:
            front = plots.Curve('lowest loss up to that cost', *pareto_front(points),
                                ('0.6', None, '-'))
            charts.append(plots.Chart('', title, [front, *curves], max(costs) >= 4 * min(costs)))
    if not charts:
        return [], 'fewer than two different costs are known'
    return charts, (f'Prefix-only validation loss against cost, {axis.key} beside the points; '
                    'time: quartiles')


def pareto_front(points):
    """The stairs below which there is no point -> x, y of their corners."""
    costs, losses = zip(*sorted(points))
    lowest = accumulate(losses, min)
    return ([cost for cost in costs for _ in range(2)][1:],
            [loss for loss in lowest for _ in range(2)][:-1])

"""Turn the folder of a compare.py sweep into a table, result files and figures."""

import csv
import json
import statistics
from collections import namedtuple
from itertools import accumulate

from runtime import plots
from runtime.config import UserError
from runtime.files import write_atomically
from runtime.tracking import read_metrics
from tools import sweep
from tools.tables import format_table

# 97.5% quantiles of Student's t distribution for 1, 2, ... 30 degrees of freedom
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
               2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
               2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)

# key: the option on the x axis; is_numeric: whether its values are numbers; ticks: x -> value as
# text; groups: label of the other options -> x -> row; baselines: rows without an x, such as models
# without SVD, which have no rank
Axis = namedtuple('Axis', 'key is_numeric ticks groups baselines')


def show(folder):
    """Print the table of a sweep, write results.md, .csv and .json, and draw the figures.

    folder: Path of the sweep. Returns name of a figure -> its Path. Raises UserError if the folder
    holds no sweep or no finished run, or if a file is damaged.
    """
    record = sweep.load(folder)
    rows = collect(folder, record)
    finished = [row for row in rows if row['seeds']]
    if not finished:
        raise UserError(f"sweep='{folder}': no run has finished (nearest: run the command that "
                        'started the sweep again)')
    text = table(rows, record)
    print(text)
    captions = draw(folder, record, finished)
    pictures = ''.join(f'\n![{caption}]({path.name})\n' for path, caption in captions.items())
    write_atomically(folder / 'results.md', f'{text}\n{pictures}'.encode())
    write_atomically(folder / 'results.json', json.dumps(
        {'seeds': record['seeds'], 'rows': rows}, indent=1).encode())
    with open(folder / 'results.csv', 'w', encoding='utf-8', newline='') as file:
        writer = csv.DictWriter(file, [*record['lists'], *rows[0]], lineterminator='\n')
        writer.writeheader()
        writer.writerows(row['options'] | row for row in rows)
    print(', '.join([f'{folder}: results.md, .csv, .json', *(path.name for path in captions)]))
    return {path.stem: path for path in captions}


# --------------------------------------------------------------------------------------------------
# numbers

def collect(folder, record):
    """Return one row per variant, from its finished runs. Print which runs are missing."""
    times, rows = sweep.read_json(folder / 'timing.json'), []
    for name, arm in record['arms'].items():
        found = {seed: sweep.result(sweep.run_folder(folder, name, seed),
                                    arm['config']['max_iters']) for seed in record['seeds']}
        finals = {seed: final for seed, final in found.items() if final}
        if len(finals) < len(found):
            print(f'{name}: not finished and left out: seeds {sorted(found.keys() - finals)}')
        time = times.get(name, {})
        if time.get('baseline') != arm['baseline']:     # not timed, or against an earlier baseline
            time = {'ratio': 1.0 if name == arm['baseline'] else None,
                    'ratio_quartiles': [None, None]}
        low, high = time['ratio_quartiles']
        row = {'name': name, 'options': arm['options'], 'baseline': arm['baseline'],
               'seeds': list(finals), 'chance': arm['chance'], 'cache_bytes': arm['cache_bytes'],
               'parameters': arm['parameters'], 'step_ratio': time['ratio'],
               'step_ratio_low': low, 'step_ratio_high': high,
               'parallel': [final['val/loss'] for final in finals.values()],
               'prefix_only': [final.get('val/prefix_loss', final['val/loss'])
                               for final in finals.values()]}
        for kind in ('parallel', 'prefix_only'):
            row[f'{kind}_mean'], row[f'{kind}_se'] = mean_and_error(row[kind])
        rows.append(row)
    named = {row['name']: row for row in rows}
    for row in rows:
        row['difference'], row['difference_low'], row['difference_high'] = paired_difference(
            row, named[row['baseline']])
    return rows


def paired_difference(row, baseline):
    """Return the mean difference of the prefix-only losses of two rows, over the seeds that both
    have, and the ends of its 95% confidence interval (paired t-test). A seed fixes the initial
    weights and the order of the data, so a part of its effect cancels in the difference. The values
    are None for the baseline itself or without common seeds, the ends also for one seed."""
    own, theirs = (dict(zip(one['seeds'], one['prefix_only'])) for one in (row, baseline))
    return t_interval([] if row is baseline else [
        own[seed] - theirs[seed] for seed in own if seed in theirs])


def t_interval(values):
    """Return the mean and the ends of its 95% confidence interval (Student's t). The mean is None
    without values, the ends if there are fewer than two."""
    mean, error = mean_and_error(values)
    if error is None:
        return mean, None, None
    freedom = len(values) - 1
    # beyond the table: the first two terms of the expansion for many degrees of freedom
    half = error * (T_QUANTILES[freedom - 1] if freedom <= len(T_QUANTILES)
                    else 1.960 + 2.372 / freedom)
    return mean, mean - half, mean + half


def mean_and_error(values):
    """Return the mean and its standard error. The mean is None without values, the standard error
    if there are fewer than two."""
    return (statistics.mean(values) if values else None,
            statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None)


def table(rows, record):
    """Return the table in Markdown, with an explanation of its columns below."""
    columns = {key: [str(row['options'].get(key, '')) for row in rows] for key in record['lists']
               if any(key in row['options'] for row in rows)}
    if any(len(row['seeds']) < len(record['seeds']) for row in rows):
        columns['seeds'] = [str(len(row['seeds'])) for row in rows]
    columns |= {
        f'{kind.replace("_", "-")} loss': [fill('{:.4f}', row[f'{kind}_mean'])
                                           + fill(' +- {:.4f}', row[f'{kind}_se']) for row in rows]
        for kind in ('parallel', 'prefix_only')}
    columns |= {
        'minus baseline (95% interval)': [
            fill('{:+.4f}', row['difference'])
            + fill(' ({:+.4f} to {:+.4f})', row['difference_low'], row['difference_high'])
            for row in rows],
        'step time / baseline': [
            fill('{:.3f}', row['step_ratio'])
            + fill(' ({:.3f} to {:.3f})', row['step_ratio_low'], row['step_ratio_high'])
            for row in rows],
        'cache bytes': [fill('{:,}', row['cache_bytes']) or 'none' for row in rows],
        'parameters': [f'{row["parameters"]:,}' for row in rows]}
    chances = ', '.join(dict.fromkeys(f'{row["chance"]:.2f}' for row in rows))
    baselines = '; '.join(dict.fromkeys(row['baseline'] for row in rows))
    return '\n'.join([
        *format_table([list(columns), *zip(*columns.values())], len(columns), markdown=True), '',
        f'Losses: validation, nats per token, {over_seeds(record)}; loss at chance: {chances}. The '
        'prefix-only loss is the loss in generation.',
        f'Baseline: {baselines}. Minus baseline: mean difference of the prefix-only losses with '
        'equal seeds, with the 95% interval of a paired t-test. Step time / baseline: median of '
        'the ratios of paired steps, with quartiles in brackets; adaptive SVD is not timed because '
        'its steps differ.',
        "Cache: float32, one sequence of block_size tokens; none: 'sequence' scope cannot cache. "
        'Parameters: without position embeddings.'])


def fill(pattern, *values):
    """Return pattern.format(*values), or '' if a value is None."""
    return '' if None in values else pattern.format(*values)


def over_seeds(record):
    """Return the seeds and the steps of the runs as text for captions."""
    seeds = ', '.join(map(str, record['seeds']))
    steps = ' or '.join(sorted({f'{arm["config"]["max_iters"]:,}' for arm in
                                record['arms'].values()}))
    average = 'mean +- standard error over seeds' if ', ' in seeds else 'one run with seed'
    return f'{average} {seeds}, after {steps} steps'


# --------------------------------------------------------------------------------------------------
# figures

def draw(folder, record, rows):
    """Draw the figures for which there are data, and print what the other figures need. Returns
    path -> caption of the figures drawn."""
    try:
        plots.require_matplotlib('figures')
    except UserError as e:
        print(e)
        return {}
    axis, captions = arrange(record, rows), {}
    for name, charts, text, needs in (
            ('loss', loss_charts(axis), f'Validation loss against {axis.key}',
             'an option with several values'),
            ('curves', progress_charts(axis, folder), 'Validation loss during training on random '
             'batches; prefix-only loss if the two differ', 'two evaluations after step 0'),
            ('pareto', pareto_charts(axis), 'Prefix-only validation loss against cost; the points '
             f'are labelled with {axis.key}; horizontal bars: quartiles of the step time',
             'two variants of different cost')):
        path = folder / f'{name}.png'
        if charts:
            captions[path] = f'{text}; {over_seeds(record)}.'
            plots.charts(path, charts, 'validation loss, nats per token', captions[path],
                         bands=name == 'curves')
        else:
            print(f'{path.name}: not drawn because it needs {needs}')
            path.unlink(missing_ok=True)                # an outdated figure
    return captions


def arrange(record, rows):
    """Return the Axis that places the rows in the figures.

    The x axis is svd_rank if svd_rank varies, else the first option with several numbers. If no
    option has several numbers, the x axis is the first option that varies, with its values in the
    order of the list.
    """
    varied = {key: values for key, values in record['lists'].items() if len(values) > 1}
    numbers = {key: [value for value in values if type(value) in (int, float)]
               for key, values in varied.items()}
    key = min(varied, key=lambda key: (key != 'svd_rank', len(numbers[key]) < 2), default=None)
    is_numeric = len(numbers.get(key, ())) > 1
    places = ({str(number): number for number in sorted(numbers[key])} if is_numeric else
              {str(word): i for i, word in enumerate(varied.get(key, ()))})
    groups, baselines = {}, []
    for row in rows:
        place = places.get(str(row['options'].get(key, '')))
        if place is None:
            baselines.append(row)
        else:
            label = ', '.join(f'{name}={value}' for name, value in row['options'].items()
                              if name != key)
            groups.setdefault(label or key, {})[place] = row
    return Axis(key, is_numeric, {place: text for text, place in places.items()},
                {label: dict(sorted(group.items())) for label, group in groups.items()}, baselines)


def group_look(i, line='-'):
    return plots.COLOURS[i % len(plots.COLOURS)], plots.MARKERS[i % len(plots.MARKERS)], line


def baseline_look(i):
    return '0.25', None, ('--', ':', '-.')[i % 3]


def curve(label, x, rows, look, kind='prefix_only', **more):
    """Return a Curve with the rows' mean losses as y over x. x=None makes a horizontal line."""
    return plots.Curve(label, x, [row[f'{kind}_mean'] for row in rows], look,
                       [row[f'{kind}_se'] for row in rows], **more)


def loss_charts(axis):
    """Return Charts of loss against the option on the x axis."""
    if not axis.groups:
        return []
    low, high = min(axis.ticks), max(axis.ticks)
    log = axis.is_numeric and low > 0 and high >= 4 * low
    differ = any(row['parallel'] != row['prefix_only'] for group in axis.groups.values()
                 for row in group.values())
    kinds = {'parallel': 'parallel loss', 'prefix_only': 'prefix-only loss, as in generation'}
    charts = []
    for kind, title in kinds.items() if differ else [('prefix_only', '')]:
        curves = [curve(row['name'], None, [row], baseline_look(i), kind)
                  for i, row in enumerate(axis.baselines)]
        # shifted, so that error bars do not overlap
        for i, (label, group) in enumerate(axis.groups.items()):
            x = [place * 1.03 ** i if log else place + 0.01 * i * (high - low) for place in group]
            curves.append(curve(label, x, group.values(),
                                group_look(i, '-' if axis.is_numeric else None), kind))
        charts.append(plots.Chart(
            title, axis.key, curves, log,
            axis.ticks if len(axis.ticks) < 9 or not axis.is_numeric else None))
    return charts


def progress_charts(axis, folder):
    """Return Charts of loss over the steps, one per group."""
    colours = dict(zip(axis.ticks, plots.shades(len(axis.ticks))))
    levels = [progress(folder, row, row['name'], baseline_look(i))
              for i, row in enumerate(axis.baselines)]
    charts = []
    for label, group in (axis.groups or {'': {}}).items():
        curves = levels + [
            progress(folder, row, f'{axis.key}={axis.ticks[place]}', (colours[place], None, '-'))
            for place, row in group.items()]
        charts.append(plots.Chart(label if len(axis.groups) > 1 else '', 'step',
                                  [one for one in curves if len(one.x) > 1]))
    return [chart for chart in charts if chart.curves]


def progress(folder, row, label, look):
    """Return the Curve of the evaluations after step 0 that all seeds have."""
    runs = [{one['iter']: one.get('val/prefix_loss', one['val/loss'])
             for one in read_metrics(sweep.run_folder(folder, row['name'], seed))
             if 'val/loss' in one and 'final' not in one and one['iter']} for seed in row['seeds']]
    steps = sorted(set.intersection(*map(set, runs)))
    points = [mean_and_error([run[step] for run in runs]) for step in steps]
    return plots.Curve(label, steps, [mean for mean, _ in points], look,
                       [error for _, error in points])


def pareto_charts(axis):
    """Return Charts of loss against cache size and against step time."""
    series = [(row['name'], [row], ('0.25', '*', None)) for row in axis.baselines] + [
        (label, list(group.values()), group_look(i, None))
        for i, (label, group) in enumerate(axis.groups.items())]
    charts = []
    for title, cost, unit in (('cache of a full context, kB', 'cache_bytes', 1000),
                              ('step time / baseline', 'step_ratio', 1)):
        curves, points = [], []
        for label, rows, look in series:
            rows = [row for row in rows if row[cost] is not None]
            x = [row[cost] / unit for row in rows]
            points += [(cost, row['prefix_only_mean']) for cost, row in zip(x, rows)]
            if rows:
                ends = [(row['step_ratio_low'] or 1, row['step_ratio_high'] or 1) for row in rows]
                notes = [str(row['options'].get(axis.key, '')) for row in rows]
                curves.append(curve(label, x, rows, look, notes=notes,
                                    across=ends if cost == 'step_ratio' else None))
        if len({x for x, _ in points}) > 1:
            costs, losses = zip(*sorted(points))
            corners = ([x for x in costs for _ in range(2)][1:],    # corners of a step function
                       [y for y in accumulate(losses, min) for _ in range(2)][:-1])
            front = plots.Curve('lowest loss up to this cost', *corners, ('0.6', None, '-'))
            charts.append(plots.Chart('', title, [front, *curves], costs[-1] >= 4 * costs[0]))
    return charts

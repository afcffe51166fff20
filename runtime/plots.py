"""Figures. matplotlib is imported where it is used: nothing else needs it."""

import importlib
import math
import textwrap
from collections import namedtuple
from contextlib import nullcontext
from pathlib import Path

from runtime.config import UserError
from runtime.files import atomic_open, check_writable, unwritable
from runtime.tracking import read_metrics

Point = namedtuple('Point', 'x y label kind')       # kind: points of one look the same
# where a label may stand beside its point: offset in points, alignments
PLACES = [(0, 8, 'center', 'bottom'), (0, -8, 'center', 'top'), (8, 0, 'left', 'center'), (-8, 0, 'right', 'center'),
          (6, 8, 'left', 'bottom'), (-6, 8, 'right', 'bottom'), (6, -8, 'left', 'top'), (-6, -8, 'right', 'top'),
          (0, 22, 'center', 'bottom'), (0, -22, 'center', 'top'), (0, 36, 'center', 'bottom'),
          (0, -36, 'center', 'top')]
BESIDE = [*PLACES[4:8], *PLACES[:4], None]          # off the error bars first
LOOKS = ('o', 's', '^', 'D')

Line = namedtuple('Line', 'x y number style', defaults=('-',))      # number: a whole one, which gives the colour
Panel = namedtuple('Panel', 'lines level upright')  # level, upright: guide lines, label -> their y or x
PanelRow = namedtuple('PanelRow', 'y_label y_scale panels')         # panels: title -> Panel

# told apart with any kind of colour vision (Okabe and Ito), and in print
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X')
LEVEL = ('0.25', None, '--')        # colour, marker, line

# x None: a level. spread: half of an error bar or of a band's height, a number a point; across: of bars along x, lows
# and highs; notes: a word beside each point; look: colour, marker, line
Curve = namedtuple('Curve', 'label x y look spread across notes', defaults=(None, None, None))
Chart = namedtuple('Chart', 'title x_label curves log ticks', defaults=(False, None))   # ticks: place -> word


def require_matplotlib(option, *paths):
    """Raises UserError where there is none, and as check_writable for the figures that are to be `paths`."""
    try:
        importlib.import_module('matplotlib')
    except ImportError:
        raise UserError(f'{option}: needs a package: pip install matplotlib') from None
    for path in paths:
        check_writable(path, option)


def scatter_panels(path, panels, x_label, y_label, floor, floor_label, caption):
    """Write a PNG: title -> list of Points, a panel each, side by side, both axes logarithmic and shared. Each point is
    labelled; what lies below `floor` is drawn on it, in a band named floor_label. Raises UserError where the file
    cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure                            # no pyplot: no state, no window
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter
    figure = Figure(figsize=(4.6 * len(panels), 5.2), dpi=150, layout='constrained')
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    kinds = list(dict.fromkeys(point.kind for points in panels.values() for point in points))
    for ax, (title, points) in zip(axes, panels.items()):
        ax.set(xscale='log', yscale='log', title=title, xlabel=x_label)
        ax.grid(True, which='major', color='0.9')
        ax.set_axisbelow(True)
        ax.axhspan(floor / 10, floor * 2, color='0.93', zorder=0)
        ax.text(0.02, floor / 8, floor_label, transform=ax.get_yaxis_transform(), fontsize=8, color='0.4', va='bottom')
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))      # less than a decade has labels, too
        ax.xaxis.set_major_formatter(FormatStrFormatter('%g'))
        ax.xaxis.set_minor_formatter(NullFormatter())
        for point in points:
            i = kinds.index(point.kind)
            ax.plot(point.x, max(point.y, floor), LOOKS[i % len(LOOKS)], color=f'C{i}', ms=7, zorder=3)
    _share_limits(axes[0], panels, floor)
    axes[0].set_ylabel(y_label)
    handles = [axes[0].plot([], [], LOOKS[i % len(LOOKS)], color=f'C{i}', label=kind)[0]
               for i, kind in enumerate(kinds)]
    figure.legend(handles=handles, loc='outside upper center', ncols=len(kinds), frameon=False, fontsize=9)
    figure.supxlabel(caption, fontsize=9, color='0.3')
    canvas.draw()                                                   # labels need the places of all points
    for ax, points in zip(axes, panels.values()):
        _label(ax, points, floor, canvas.get_renderer())
    save(figure, path)


def line_panels(path, rows, x_label, number_label, title):
    """Write a PNG, path may be a binary file, too: PanelRows below each other with the same titles, axes shared along
    rows and columns. Lines are coloured from the smallest number to the largest. Level guide lines are dashed and
    labelled at the right end of the row, upright ones dotted and labelled at the bottom, left of them. Raises UserError
    where the file cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, MaxNLocator
    width = len(rows[0].panels)
    height = 2.7 if len(rows) < 4 else 1.9
    figure = Figure(figsize=(1.4 + 2.3 * width, 0.9 + height * len(rows)), dpi=150, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), width, sharex=True, sharey='row', squeeze=False)
    numbers = [line.number for row in rows for panel in row.panels.values() for line in panel.lines]
    first, count = min(numbers), max(numbers) - min(numbers) + 1
    colours = ListedColormap(shades(count))
    for row, own in zip(rows, axes):
        for ax, panel in zip(own, row.panels.values()):
            ax.set_yscale(row.y_scale)
            ax.margins(x=0.02)
            ax.xaxis.set_major_formatter(FormatStrFormatter('%g'))  # short ones: the next panel is near
            ax.grid(True, which='major', color='0.9')
            ax.set_axisbelow(True)
            for x, y, number, style in panel.lines:
                ax.plot(x, y, style, color=colours(number - first), lw=1.2, marker='o' if len(x) == 1 else None)
            for label, y in panel.level.items():
                ax.axhline(y, color='0.35', ls='--', lw=0.8)
                if ax is own[-1]:
                    ax.annotate(label, (1, y), (3, 0), xycoords=ax.get_yaxis_transform(), textcoords='offset points',
                                va='center', fontsize=7, color='0.35')
            for label, x in panel.upright.items():
                ax.axvline(x, color='0.35', ls=':', lw=1.2)
                ax.annotate(label, (x, 0), (-3, 4), xycoords=ax.get_xaxis_transform(), textcoords='offset points',
                            rotation=90, ha='right', va='bottom', fontsize=8, color='0.35')
        own[0].set_ylabel(row.y_label)
    for ax, name in zip(axes[0], rows[0].panels):
        ax.set_title(name, fontsize=10)
    if count > 1:
        scale = ScalarMappable(BoundaryNorm([first - 0.5 + i for i in range(count + 1)], count), colours)
        bar = figure.colorbar(scale, ax=axes, label=number_label, ticks=MaxNLocator(integer=True), aspect=40, pad=0.01)
        bar.minorticks_off()
    figure.supxlabel(x_label, fontsize=10)
    figure.suptitle(title, fontsize=11)
    save(figure, path)


def charts(path, panels, y_label, caption, bands=False):
    """Write a PNG: Charts side by side, three in a row, one y axis for all, one legend above and a caption below.
    bands: a spread is drawn as a band, not as bars. Raises UserError where the file cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patheffects import Normal, Stroke
    from matplotlib.ticker import FormatStrFormatter, MaxNLocator, NullFormatter
    columns = min(3, len(panels))
    lines, height = math.ceil(len(panels) / columns), 3.3
    figure = Figure(figsize=(8.3, height * lines + 1.2), dpi=150, layout='constrained')    # a README is 830 pixels wide
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten()
    for ax in axes[len(panels):]:
        ax.set_visible(False)
    handles = {}
    for ax, chart in zip(axes, panels):
        ax.set_title(textwrap.fill(chart.title, 84 // columns), fontsize=10)
        ax.set_xlabel(chart.x_label)
        ax.grid(True, which='major', color='0.9')
        ax.set_axisbelow(True)
        if chart.log:
            ax.set_xscale('log', base=2)
        for curve in chart.curves:
            handles.setdefault(curve.label, _draw(ax, curve, bands))
        if chart.ticks:
            ax.set_xticks(list(chart.ticks), list(chart.ticks.values()))
        elif chart.log:
            ax.xaxis.set_major_formatter(FormatStrFormatter('%g'))
        else:
            ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.margins(x=0.08, y=0.12)
    for ax in axes[:len(panels):columns]:
        ax.set_ylabel(y_label)
    figure.legend(handles=list(handles.values()), labels=list(handles), loc='outside upper center', frameon=False,
                  ncols=_columns(handles), fontsize=9)
    width = len(caption) / math.ceil(len(caption) / 115)            # of lines about as long as each other
    figure.supxlabel(textwrap.fill(caption, int(width) + 8), fontsize=9, color='0.3')
    canvas.draw()                                                   # notes need the places of all points
    for ax, chart in zip(axes, panels):
        _label(ax, [Point(*point, None) for curve in chart.curves if curve.notes
                    for point in zip(curve.x, curve.y, curve.notes)], -math.inf, canvas.get_renderer(), BESIDE,
               path_effects=[Stroke(linewidth=3, foreground='w'), Normal()], zorder=4)
    save(figure, path)


def training_curves(folder, series):
    """Write FOLDER/curves.png from FOLDER/metrics.jsonl: losses, learning rate, and the named series of the model that
    the run has, a line per layer.

    series: label of a panel -> (keys, guides), such as {'rank': (['r'], {'full': 32})}: it shows what the rows call
    '.../LAYER/r', with dashed guide lines. Numbers, or words as 'on', which make stairs. Nothing is drawn of a run that
    has no losses yet. Raises UserError where the file cannot be written or matplotlib is missing.
    """
    require_matplotlib('curves.png')
    from matplotlib.ticker import MaxNLocator
    rows = read_metrics(folder)
    losses = {'training': 'loss', 'train split': 'train/loss', 'validation': 'val/loss', 'prefix-only': 'val/prefix_loss'}
    panels = {'loss, nats per token': ({label: _points(rows, key) for label, key in losses.items()}, {}),
              'learning rate': ({'': _points(rows, 'lr')}, {})}
    for label, (keys, guides) in series.items():
        names = sorted({key for row in rows for key in row if key.rpartition('/')[2] in keys})
        panels[label] = {name.split('/', 1)[1]: _points(rows, name) for name in names}, guides
    panels = {label: panel for label, panel in panels.items() if any(panel[0].values())}
    if not panels:
        return
    figure, axes = page(len(panels), 1, (8.3, 0.6 + 1.9 * len(panels)), sharex=True)
    for ax, (label, (lines, guides)) in zip(axes[:, 0], panels.items()):
        lines = {name: points for name, points in lines.items() if points}
        for colour, (name, points) in zip(shades(len(lines)), lines.items()):
            x, y = zip(*points)
            steps = 'steps-post' if isinstance(y[0], (str, int)) else 'default'
            ax.plot(x, y, color=colour, label=name, lw=1, marker='.' if len(x) < 50 else None, drawstyle=steps)
        for name, y in guides.items():
            ax.axhline(y, color='0.35', ls='--', lw=0.8)
            ax.annotate(name, (1, y), (3, 0), xycoords=ax.get_yaxis_transform(), textcoords='offset points',
                        va='center', fontsize=7, color='0.35')
        ax.set_ylabel(label, fontsize=9)
        ax.grid(True, color='0.9')
        if 1 < len(lines) < 9:
            ax.legend(fontsize=7, frameon=False)
    axes[-1, 0].set_xlabel('step')
    axes[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    save(figure, Path(folder) / 'curves.png')


def _points(rows, key):
    """(step, value) of the rows that have this key, without the final evaluation."""
    return [(row['iter'], row[key]) for row in rows if key in row and not row.get('final')]


def shades(count):
    """Colours in an order, dark to light, without the last tenth, a yellow that white paper swallows."""
    from matplotlib import colormaps
    return [colormaps['viridis'](0.9 * i / max(1, count - 1)) for i in range(count)]


def _draw(ax, curve, bands):
    """-> what stands for the curve in a legend."""
    colour, marker, line = curve.look
    spread = curve.spread and [one or 0 for one in curve.spread]
    if curve.x is None:
        if spread:
            ax.axhspan(curve.y[0] - spread[0], curve.y[0] + spread[0], color=colour, alpha=0.15, lw=0)
        return ax.axhline(curve.y[0], color=colour, ls=line, lw=1.2)
    style = dict(color=colour, marker=marker, ls=line or 'none', lw=1.4, ms=10 if marker == '*' else 5, zorder=3)
    if bands:
        if spread:
            ax.fill_between(curve.x, [y - s for y, s in zip(curve.y, spread)], [y + s for y, s in zip(curve.y, spread)],
                            color=colour, alpha=0.2, lw=0)
        return ax.plot(curve.x, curve.y, **style)[0]
    across = curve.across and [[x - low for x, (low, _) in zip(curve.x, curve.across)],
                               [high - x for x, (_, high) in zip(curve.x, curve.across)]]
    bars = ax.errorbar(curve.x, curve.y, spread, across, capsize=3, elinewidth=1, **style)
    for bar in bars[2] if across else ():                           # long ones, in each other's way
        bar.set_alpha(0.5)
    return bars[0]


def _columns(labels):
    """As many as fit side by side."""
    return max(1, min(len(labels), 110 // (8 + max(map(len, labels)))))


def page(rows, columns, size, **options):
    """-> figure of this size in inches, axes (rows, columns), to draw on and to `save`. options: of subplots."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=size, dpi=110, layout='constrained')
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save(figure, path):
    """Write a PNG, path may be a binary file, too. Raises UserError where the file cannot be written."""
    try:
        with nullcontext(path) if hasattr(path, 'write') else atomic_open(path) as file:
            figure.savefig(file, format='png')
    except OSError as e:
        raise unwritable(f'{path}: cannot be written', e) from None


def _share_limits(ax, panels, floor):
    """Room around the points for their labels."""
    points = [point for points in panels.values() for point in points]
    low, high = min(p.x for p in points), max(p.x for p in points)
    margin = max(2.0, (high / low) ** 0.25)
    ax.set_xlim(low / margin, high * margin)
    ax.set_ylim(floor / 10, max(floor * 100, 8 * max(p.y for p in points)))


def _label(ax, points, floor, renderer, places=PLACES, **style):
    """Each point's label at the first place where it meets no other label, no point and no edge; else the last place,
    or, where that is None, nowhere."""
    frame = ax.get_window_extent(renderer)
    at = [ax.transData.transform((p.x, max(p.y, floor))) for p in points]
    taken = []
    for point in sorted(points, key=lambda p: p.x):
        for dx, dy, ha, va in filter(None, places):
            text = ax.annotate(point.label, (point.x, max(point.y, floor)), (dx, dy), textcoords='offset points',
                               ha=ha, va=va, fontsize=9, **style)
            box = text.get_window_extent(renderer)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken) and not any(box.contains(*xy) for xy in at):
                break
            if (dx, dy, ha, va) != places[-1]:
                text.remove()
        else:
            if places[-1] is None:
                continue
        taken.append(box)

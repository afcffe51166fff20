"""Figures. matplotlib is imported within functions, because it is an optional package."""

import math
import textwrap
from collections import namedtuple
from pathlib import Path

from runtime.config import UserError
from runtime.files import atomic_open, check_writable, unwritable
from runtime.tracking import read_metrics

# distinct with any kind of color vision (Okabe and Ito) and in print
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X')
LEVEL = ('0.25', None, '--')        # color, marker, line style
GUIDE = dict(color='0.35')          # a guide line and its label

# x None: a level, which is a horizontal line. spread: half the height of an error bar or a band,
# one number per point; notes: a label per point; across: ends of a horizontal bar, (low, high) per
# point; look: color, marker, line style
Curve = namedtuple('Curve', 'label x y look spread notes across', defaults=(None, None, None))
# log: whether x is logarithmic, base 2; ticks: position -> label
Chart = namedtuple('Chart', 'title x_label curves log ticks', defaults=(False, None))

Line = namedtuple('Line', 'x y name')
Panel = namedtuple('Panel', 'lines level upright')  # level, upright: guide lines, label -> y or x
PanelRow = namedtuple('PanelRow', 'y_label y_scale panels')         # panels: title -> Panel

LOSSES = {'training': 'loss', 'train split': 'train/loss', 'validation': 'val/loss',
          'prefix-only': 'val/prefix_loss'}         # of `training_curves`, label -> key
LEGEND_LINES = 8                    # per row of `line_panels`


def require_matplotlib(option, *paths):
    """Raise a UserError that names `option` if matplotlib is not installed or one of the figures
    `paths` cannot be written."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(f'{option}: needs matplotlib; run: pip install matplotlib') from None
    for path in paths:
        check_writable(path, option)


# --------------------------------------------------------------------------------------------------
# new figures, saving

def page(rows, columns, size, dpi=110, grid=False, **options):
    """Return (figure, axes). axes is an array (rows, columns). size: (width, height) in inches.
    `grid` draws grid lines behind the data. `options` are options of Figure.subplots."""
    from matplotlib.figure import Figure  # pyplot would keep state and open windows
    figure = Figure(figsize=size, dpi=dpi, layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat if grid else ():
        ax.grid(color='0.9')
        ax.set_axisbelow(True)
    return figure, axes


def save(figure, path):
    """Write a figure as PNG. Raises UserError if it cannot be written."""
    try:
        with atomic_open(path) as file:
            figure.savefig(file, format='png')
    except OSError as e:
        raise unwritable(f'{path}: cannot be written', e) from None


def shades(count):
    """Return `count` colors from dark to light, without yellow, which is hard to see on white."""
    from matplotlib import colormaps
    return [colormaps['viridis'](0.9 * i / max(1, count - 1)) for i in range(count)]


# --------------------------------------------------------------------------------------------------
# figures

def charts(path, panels, y_label, caption, bands=False, y_scale='linear', sharex=False):
    """Write a PNG of `panels`, a list of Charts, three per row. The panels share a y axis, a legend
    and a caption. With `bands`, a spread is drawn as a band instead of error bars. Raises UserError
    if the file cannot be written."""
    from matplotlib.ticker import FormatStrFormatter, NullFormatter
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = page(rows, columns, (8.3, 3.3 * rows + 1.2), dpi=150, grid=True, sharex=sharex,
                        sharey=True)  # a README is 830 pixels wide
    handles = {}
    for ax, chart in zip(axes.flat, panels):
        ax.set_title(textwrap.fill(chart.title, 84 // columns), fontsize=10)
        ax.set(xlabel=chart.x_label, yscale=y_scale, xmargin=0.08, ymargin=0.12)
        if chart.log:
            ax.set_xscale('log', base=2)
        for curve in chart.curves:
            handles.setdefault(curve.label, draw_curve(ax, curve, bands))
        if chart.ticks:
            ax.set_xticks(list(chart.ticks), list(chart.ticks.values()))
        elif chart.log:
            ax.xaxis.set_major_formatter(FormatStrFormatter('%g'))
        ax.xaxis.set_minor_formatter(NullFormatter())
    figure.supylabel(y_label, fontsize=10)
    for ax in axes.flat[len(panels):]:
        ax.set_visible(False)
    figure.legend(handles.values(), handles, loc='outside upper center', frameon=False, fontsize=9,
                  ncols=max(1, min(len(handles), 110 // (8 + max(map(len, handles))))))
    figure.supxlabel(textwrap.fill(caption, 115), fontsize=9, color='0.3')
    save(figure, path)


def draw_curve(ax, curve, bands):
    """Draw a Curve and return its handle for a legend."""
    from matplotlib.patheffects import withStroke
    colour, marker, line = curve.look
    spread = curve.spread and [one or 0 for one in curve.spread]
    if curve.x is None:
        y = curve.y[0]
        if spread:
            ax.axhspan(y - spread[0], y + spread[0], color=colour, alpha=0.15, lw=0)
        return ax.axhline(y, color=colour, ls=line, lw=1.2)
    for x, y, note in zip(curve.x, curve.y, curve.notes or ()):
        ax.annotate(note, (x, y), (6, 8), textcoords='offset points', fontsize=9, zorder=4,
                    path_effects=[withStroke(linewidth=3, foreground='w')])
    style = dict(color=colour, marker=marker, ls=line or 'none', lw=1.4, zorder=3,
                 ms=10 if marker == '*' else 5)
    if bands and spread:
        low, high = zip(*((y - s, y + s) for y, s in zip(curve.y, spread)))
        ax.fill_between(curve.x, low, high, color=colour, alpha=0.2, lw=0)
        spread = None
    for y, ends in zip(curve.y, curve.across or ()):
        ax.plot(ends, (y, y), color=colour, lw=1, alpha=0.5)
    return ax.errorbar(curve.x, curve.y, spread, capsize=3, elinewidth=1, **style)[0]


def line_panels(path, rows, x_label, line_label, title=None):
    """Write a PNG of PanelRows. The panels have the same titles in each row.

    Panels share axes along rows and columns. Each row has a legend with the title `line_label`. If
    there are many lines, the legend omits some. Horizontal guide lines are dashed, vertical guide
    lines are dotted. Raises UserError if the file cannot be written.
    """
    titles = list(rows[0].panels)
    size = 3.1 + 2.3 * max(3, len(titles)), 0.9 + (2.7 if len(rows) < 3 else 1.7) * len(rows)
    figure, axes = page(len(rows), len(titles), size, grid=True, sharex=True, sharey='row')
    for row, own in zip(rows, axes):
        names = list(dict.fromkeys(line.name for panel in row.panels.values()
                                   for line in panel.lines))
        shown = names[::math.ceil(len(names) / LEGEND_LINES)]
        colours = dict(zip(names, COLOURS if len(names) <= len(COLOURS) else shades(len(names))))
        handles = {}
        for ax, panel in zip(own, row.panels.values()):
            ax.set(yscale=row.y_scale, xmargin=0.02)
            for x, y, name in panel.lines:  # words and whole numbers are drawn as steps
                handles[name], = ax.plot(x, y, color=colours[name], lw=1.2,
                                         marker='.' if len(x) < 20 else None,
                                         drawstyle='steps-post' if y and type(y[0]) in (str, int)
                                         else None)
            for label, y in panel.level.items():
                ax.axhline(y, **GUIDE, ls='--', lw=0.8)
                ax.annotate(label, (1, y), (-3, -1), xycoords=ax.get_yaxis_transform(), fontsize=7,
                            textcoords='offset points', ha='right', va='top', **GUIDE)
            for label, x in panel.upright.items():
                ax.axvline(x, **GUIDE, ls=':', lw=1.2)
                ax.annotate(label, (x, 0), (-3, 4), xycoords=ax.get_xaxis_transform(), fontsize=7,
                            textcoords='offset points', rotation=90, ha='right', **GUIDE)
        own[0].set_ylabel(row.y_label)
        if len(names) > 1:
            own[-1].legend([handles[name] for name in shown], shown, title=line_label, fontsize=8,
                           loc='center left', bbox_to_anchor=(1.02, 0.5), frameon=False)
    for ax, name in zip(axes[0], titles):
        ax.set_title(name, fontsize=10)
        ax.xaxis.get_major_locator().set_params(integer=x_label == 'step')
    figure.supxlabel(x_label, fontsize=10)
    figure.suptitle(title, fontsize=11)
    figure.align_ylabels()
    save(figure, path)


def training_curves(folder, series):
    """Draw FOLDER/curves.png from FOLDER/metrics.jsonl: the losses, the learning rate, and the
    model's own series with one line per layer.

    `series` has the panels of the model's series as label -> (key, guides), such as {'rank':
    ('r', {'full': 32})}. A panel with the key 'r' shows the values of '.../LAYER/r', which are
    numbers or words. The guides are dashed lines. Nothing is drawn if the run has not logged a
    loss. Raises UserError if matplotlib is not installed or the file cannot be written.
    """
    require_matplotlib('curves.png')
    rows = [row for row in read_metrics(folder) if not row.get('final')]
    wanted = {'loss,\nnats per token': (LOSSES, {}), 'learning rate': ({'lr': 'lr'}, {})}
    for label, (key, guides) in series.items():
        names = sorted({name for row in rows for name in row if name.endswith(f'/{key}')})
        wanted[label] = {name.split('/')[-2]: name for name in names}, guides
    drawn = []
    for label, (names, guides) in wanted.items():
        points = {name: [(row['iter'], row[key]) for row in rows if key in row]
                  for name, key in names.items()}
        lines = [Line(*zip(*found), name) for name, found in points.items() if found]
        if lines:
            drawn.append(PanelRow(label, 'linear', {'': Panel(lines, guides, {})}))
    if drawn:
        line_panels(Path(folder) / 'curves.png', drawn, 'step', None)

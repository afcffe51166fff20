"""Figures. matplotlib is imported where it is used: nothing else needs it."""

import importlib
from collections import namedtuple

from runtime.config import UserError

Point = namedtuple('Point', 'x y label kind')       # kind: points of one look the same
# where a label may stand beside its point: offset in points, alignments
PLACES = [(0, 8, 'center', 'bottom'), (0, -8, 'center', 'top'), (8, 0, 'left', 'center'), (-8, 0, 'right', 'center'),
          (6, 8, 'left', 'bottom'), (-6, 8, 'right', 'bottom'), (6, -8, 'left', 'top'), (-6, -8, 'right', 'top'),
          (0, 22, 'center', 'bottom'), (0, -22, 'center', 'top'), (0, 36, 'center', 'bottom'),
          (0, -36, 'center', 'top')]
LOOKS = ('o', 's', '^', 'D')


def require_matplotlib(option):
    """Raises UserError where there is none."""
    try:
        importlib.import_module('matplotlib')
    except ImportError:
        raise UserError(f'{option}: needs a package: pip install matplotlib') from None


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
    try:
        figure.savefig(path, format='png')
    except OSError as e:
        raise UserError(f'{path}: cannot be written: {e.strerror}') from None


def _share_limits(ax, panels, floor):
    """Room around the points for their labels."""
    points = [point for points in panels.values() for point in points]
    low, high = min(p.x for p in points), max(p.x for p in points)
    margin = max(2.0, (high / low) ** 0.25)
    ax.set_xlim(low / margin, high * margin)
    ax.set_ylim(floor / 10, max(floor * 100, 8 * max(p.y for p in points)))


def _label(ax, points, floor, renderer):
    """Each point's label at the first place where it meets no other label, no point and no edge; else the last."""
    frame = ax.get_window_extent(renderer)
    at = [ax.transData.transform((p.x, max(p.y, floor))) for p in points]
    taken = []
    for point in sorted(points, key=lambda p: p.x):
        for dx, dy, ha, va in PLACES:
            text = ax.annotate(point.label, (point.x, max(point.y, floor)), (dx, dy), textcoords='offset points',
                               ha=ha, va=va, fontsize=9)
            box = text.get_window_extent(renderer)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken) and not any(box.contains(*xy) for xy in at):
                break
            if (dx, dy, ha, va) != PLACES[-1]:
                text.remove()
        taken.append(box)

"""
Behind `python compress.py --spectrum`: the singular values of every weight of a model's blocks, and what cutting them
off would save.

A layer W (m, n) of rank r is B (m, r) times A (r, n): r (m + n) parameters instead of m n, fewer below the break-even
rank m n / (m + n) alone. Energy is the sum of the squared singular values. The numerical rank counts those above
max(m, n) eps(float32) sigma_1: below that they are what rounding the weights to float32 leaves. A weight of zeros has
numerical rank 0 and keeps all of its energy, which is none, at rank 1, as there is no layer of rank 0.
"""

import csv
import io
from collections import namedtuple

import torch

from lowrank.spectrum import energy, rank_for_energy
from runtime import plots, tracking
from runtime.files import write_atomically

FRACTIONS = (0.90, 0.95)            # of the energy, to keep
WIDTH = 120                         # of the table, at most

Spectrum = namedtuple('Spectrum', 'name m n sigma energy')          # sigma descending, energy cumulative: (min(m, n))


def write(weights, folder, title):
    """Write folder/spectrum.csv and folder/spectrum.png -> the table, as text.

    weights: 'h.<block>.<kind>' -> (m, n), the figure has a column a kind. Raises ValueError for a weight that is not
    finite, UserError without matplotlib, and OSError."""
    plots.require_matplotlib('--spectrum')
    spectra = [spectrum(name, weight) for name, weight in
               tracking.brief_bar(weights.items(), desc='spectra', unit='weight')]
    write_atomically(folder / 'spectrum.csv', as_csv(spectra).encode())
    write_atomically(folder / 'spectrum.png', figure(spectra, title))
    return table(spectra)


def spectrum(name, weight):
    """weight (m, n) -> Spectrum, in float64 on the CPU."""
    weight = weight.detach().cpu().double()                         # MPS has no float64
    if not weight.isfinite().all():
        raise ValueError(f'{name}: has non-finite values (NaN or inf)')
    sigma = torch.linalg.svdvals(weight)
    return Spectrum(name, *weight.shape, sigma, energy(sigma))


def numerical_rank(s):
    return int((s.sigma > max(s.m, s.n) * torch.finfo(torch.float32).eps * s.sigma[0]).sum())


def break_even(s):
    """The largest rank r with r (m + n) < m n; 0: there is none."""
    return (s.m * s.n - 1) // (s.m + s.n)


def as_csv(spectra):
    """A line a singular value; index 1 is the largest, so that cumulative_energy is what that rank keeps."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(['name', 'm', 'n', 'index', 'singular_value', 'cumulative_energy'])
    for s in spectra:
        for i, (value, kept) in enumerate(zip(s.sigma.tolist(), s.energy.tolist()), 1):
            writer.writerow([s.name, s.m, s.n, i, repr(value), repr(kept)])
    return text.getvalue()


# ----------------------------------------------------------------------------------------------------------------------
# table

def table(spectra):
    """A row a weight, and one of totals, in which a layer that would not save stays dense."""
    percents = [f'{fraction:.0%}' for fraction in FRACTIONS]
    header = ['weight', 'shape', 'sigma', 'rank', *percents, 'even', 'dense']
    header += [cell for percent in percents for cell in (f'at {percent}', 'saves')]
    rows, dense, factored = [], 0, [0] * len(FRACTIONS)
    for s in spectra:
        ranks, own = [int(rank_for_energy(s.sigma, fraction)) for fraction in FRACTIONS], s.m * s.n
        row = [s.name, f'{s.m} x {s.n}', f'{s.sigma[0].item():#.3g}', str(numerical_rank(s)), *map(str, ranks),
               str(break_even(s)), f'{own:,}']
        for i, rank in enumerate(ranks):
            row += saving(own, rank * (s.m + s.n))
            factored[i] += min(own, rank * (s.m + s.n))
        rows.append(row)
        dense += own
    rows.append([f'all {len(rows)} weights', *[''] * (len(header) - 2 - 2 * len(FRACTIONS)), f'{dense:,}',
                 *(cell for total in factored for cell in saving(dense, total))])
    return '\n'.join([
        f'sigma: the largest singular value; rank: how many are more than rounding; {", ".join(percents)}: ranks that '
        'keep so much',
        'energy; even: the largest rank that saves anything; then parameters, dense and as factors of those ranks',
        *aligned([header, *rows], words=2)])


def saving(dense, factored):
    """Two cells: parameters as factors, and what that saves."""
    return f'{factored:,}', f'{1 - factored / dense:.1%}' if factored < dense else 'nothing'


def aligned(cells, words):
    """Rows of cells -> lines. The first `words` columns to the left, the others, numbers, to the right."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    gap = '  ' if sum(widths) + 2 * (len(widths) - 1) <= WIDTH else ' '
    return [gap.join(cell.ljust(width) if i < words else cell.rjust(width)
                     for i, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in cells]


# ----------------------------------------------------------------------------------------------------------------------
# figure

def figure(spectra, title):
    """-> the bytes of a PNG: above the singular values, below their energy, a column a kind and a line a block."""
    values, kept = {}, {}
    for s in spectra:
        _, block, kind = s.name.split('.', 2)
        index = [i / len(s.sigma) for i in range(len(s.sigma) + 1)]
        above = values.setdefault(kind, plots.Panel([], {}, {}))
        below = kept.setdefault(kind, plots.Panel([], {f'{f:.0%}': f for f in FRACTIONS}, {}))
        real = numerical_rank(s)                                    # next to rounding errors all else would look flat
        above.lines.append(plots.Line(index[1:real + 1], (s.sigma / s.sigma[0])[:real].tolist(), int(block)))
        below.lines.append(plots.Line(index, [0, *s.energy.tolist()], int(block)))
        below.upright['break-even'] = max(s.m, s.n) / (s.m + s.n)   # m n / (m + n) of min(m, n)
    png = io.BytesIO()
    plots.line_panels(png, [plots.PanelRow('singular value / largest', 'log', values),
                            plots.PanelRow('cumulative energy', 'linear', kept)], 'index / min(m, n)', 'block', title)
    return png.getvalue()

"""Singular values of the weights of a model's blocks, and what cutting them off would save.

A weight W (m, n) as a product of rank r, B (m, r) times A (r, n), has r (m + n) parameters instead
of m n: fewer only below the break-even rank m n / (m + n). Energy is the sum of the squared
singular values. The numerical rank is the number of singular values above
max(m, n) eps(float32) sigma_1: rounding the weight to float32 leaves smaller ones. A weight of
zeros has numerical rank 0; it keeps all of its energy at rank 1, the smallest rank of a layer.
"""

from collections import namedtuple

import torch

from lowrank.spectrum import energy, rank_for_energy, to_float64
from runtime import plots, tracking
from runtime.files import write_atomically
from tools.tables import format_table

FRACTIONS = (0.90, 0.95)            # of the energy, to keep
NOTES = '''\
sigma: the largest singular value; rank: number of singular values that are more than rounding
90%, 95%: the smallest rank that keeps so much energy; even: the largest rank that saves parameters
dense, at 90%, at 95%: parameters as it is, and as factors of these ranks'''

# sigma (s): singular values, descending; energy (s): cumulative share; s = min(m, n)
Spectrum = namedtuple('Spectrum', 'name m n sigma energy rank')


def report_spectrum(weights, folder, title):
    """Write folder/spectrum.csv and folder/spectrum.png; return the table as text.

    weights: 'h.<block>.<kind>' -> (m, n). The figure has one column per kind. Raises ValueError for
    a weight that is not finite, UserError without matplotlib, and OSError.
    """
    plots.require_matplotlib('--spectrum')
    spectra = [spectrum(name, weight) for name, weight in
               tracking.brief_bar(weights.items(), desc='spectra', unit='weight')]
    write_atomically(folder / 'spectrum.csv', csv_text(spectra).encode())
    plot(folder / 'spectrum.png', spectra, title)
    return table(spectra)


def spectrum(name, weight):
    """The Spectrum of a weight (m, n), in float64 on the CPU."""
    sigma, (m, n) = torch.linalg.svdvals(to_float64(weight, name)), weight.shape
    rank = int((sigma > max(m, n) * torch.finfo(torch.float32).eps * sigma[0]).sum())
    return Spectrum(name, m, n, sigma, energy(sigma), rank)


def csv_text(spectra):
    """One line per singular value. Index 1 is the largest, so that cumulative_energy is what this
    rank keeps."""
    lines = [f'{s.name},{s.m},{s.n},{i},{value!r},{kept!r}' for s in spectra
             for i, (value, kept) in enumerate(zip(s.sigma.tolist(), s.energy.tolist()), 1)]
    return '\n'.join(['name,m,n,index,singular_value,cumulative_energy', *lines, ''])


def table(spectra):
    """One row per weight and one of totals, for which a weight stays dense if factors save
    nothing."""
    percents = [f'{fraction:.0%}' for fraction in FRACTIONS]
    rows = [['weight', 'shape', 'sigma', 'rank', *percents, 'even', 'dense',
             *(cell for percent in percents for cell in (f'at {percent}', 'saves'))]]
    dense, factored = 0, [0] * len(FRACTIONS)
    for s in spectra:
        ranks, own = [int(rank_for_energy(s.sigma, f)) for f in FRACTIONS], s.m * s.n
        sizes = [rank * (s.m + s.n) for rank in ranks]
        rows.append([s.name, f'{s.m} x {s.n}', f'{s.sigma[0].item():#.3g}', str(s.rank),
                     *map(str, ranks), str((own - 1) // (s.m + s.n)), f'{own:,}',
                     *savings(own, sizes)])
        dense += own
        factored = [total + min(own, size) for total, size in zip(factored, sizes)]
    rows.append([f'all {len(spectra)} weights', *[''] * (4 + len(FRACTIONS)), f'{dense:,}',
                 *savings(dense, factored)])
    return '\n'.join([NOTES, *format_table(rows, left=2)])


def savings(dense, factored):
    """Two cells for each size: the parameters, and the share that is saved."""
    return [cell for size in factored for cell in
            (f'{size:,}', f'{1 - size / dense:.1%}' if size < dense else 'nothing')]


def plot(path, spectra, title):
    """Write a PNG: singular values above, their energy below, one column per kind of layer and one
    line per block."""
    values, kept = {}, {}
    for s in spectra:
        _, block, kind = s.name.split('.', 2)
        index = [i / len(s.sigma) for i in range(len(s.sigma) + 1)]
        above = values.setdefault(kind, plots.Panel([], {}, {}))
        below = kept.setdefault(kind, plots.Panel([], {f'{f:.0%}': f for f in FRACTIONS}, {}))
        # without rounding errors, next to which all else would look flat
        above.lines.append(plots.Line(index[1:s.rank + 1],
                                      (s.sigma / s.sigma[0])[:s.rank].tolist(), int(block)))
        below.lines.append(plots.Line(index, [0, *s.energy.tolist()], int(block)))
        below.upright['break-even'] = max(s.m, s.n) / (s.m + s.n)   # m n / (m + n) of min(m, n)
    plots.line_panels(path, [plots.PanelRow('singular value / largest', 'log', values),
                             plots.PanelRow('cumulative energy', 'linear', kept)],
                      'index / min(m, n)', 'block', title)

"""Singular values of the weights of a model's blocks, and the parameters that low rank would save.

Two factors B (m, r) and A (r, n) in place of a weight W (m, n) have r (m + n) parameters instead of
m n. The factors have fewer parameters only below the break-even rank m n / (m + n). The energy of a
weight is the sum of its squared singular values. Its numerical rank is the number of singular
values above max(m, n) eps(float32) sigma_1, because smaller ones can come from rounding to float32.
A weight of zeros has numerical rank 0 and keeps all of its energy at rank 1, the smallest rank of a
layer.
"""

from collections import namedtuple

import torch

from lowrank.spectrum import energy, rank_for_energy, to_float64
from runtime import plots, tracking
from runtime.files import write_atomically
from tools.tables import format_table

FRACTIONS = (0.90, 0.95)            # of the energy that a rank keeps
NOTES = '''\
sigma: largest singular value; rank: number of singular values above rounding error
90%, 95%: smallest rank that keeps this fraction of the energy
even: largest rank at which two factors have fewer parameters than the dense weight
dense: parameters of the dense weight; at 90%, at 95%: parameters of two factors of that rank
saves: fraction of the parameters that the factors save'''

# sigma (s): singular values, descending; energy (s): cumulative fraction; s = min(m, n)
Spectrum = namedtuple('Spectrum', 'name m n sigma energy rank')


def report_spectrum(weights, folder, title):
    """Write folder/spectrum.csv and folder/spectrum.png, and return the table as text.

    weights: 'h.<block>.<kind>' -> weight (m, n); title: title of the figure. Raises ValueError if a
    weight is not finite, UserError if matplotlib is missing, and OSError.
    """
    plots.require_matplotlib('--spectrum')
    spectra = [spectrum(name, weight) for name, weight in
               tracking.brief_bar(weights.items(), desc='spectra', unit='weight')]
    write_atomically(folder / 'spectrum.csv', csv_text(spectra).encode())
    plot(folder / 'spectrum.png', spectra, title)
    return table(spectra)


def spectrum(name, weight):
    """Return the Spectrum of a weight (m, n), computed in float64 on the CPU."""
    sigma, (m, n) = torch.linalg.svdvals(to_float64(weight, name)), weight.shape
    rank = int((sigma > max(m, n) * torch.finfo(torch.float32).eps * sigma[0]).sum())
    return Spectrum(name, m, n, sigma, energy(sigma), rank)


def csv_text(spectra):
    """Return the CSV text with one line per singular value. Index 1 is the largest value.
    cumulative_energy is therefore the energy that the rank `index` keeps."""
    lines = [f'{s.name},{s.m},{s.n},{i},{value!r},{kept!r}' for s in spectra
             for i, (value, kept) in enumerate(zip(s.sigma.tolist(), s.energy.tolist()), 1)]
    return '\n'.join(['name,m,n,index,singular_value,cumulative_energy', *lines, ''])


def table(spectra):
    """Return NOTES, which explain the columns, and a text table with one row per weight and a row
    of totals. A weight whose factors would not save parameters counts as dense in the totals."""
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
    """Return two table cells per factored size: the number of parameters, and the fraction of
    `dense` that is saved."""
    return [cell for size in factored for cell in
            (f'{size:,}', f'{1 - size / dense:.1%}' if size < dense else 'nothing')]


def plot(path, spectra, title):
    """Write a PNG with one column of panels per kind of layer and one line per block. The upper
    panels show singular values, the lower ones their cumulative energy."""
    values, kept = {}, {}
    for s in spectra:
        _, block, kind = s.name.split('.', 2)
        index = [i / len(s.sigma) for i in range(len(s.sigma) + 1)]
        above = values.setdefault(kind, plots.Panel([], {}, {}))
        below = kept.setdefault(kind, plots.Panel([], {f'{f:.0%}': f for f in FRACTIONS}, {}))
        # values at rounding level would stretch the axis and make all others look flat
        above.lines.append(plots.Line(index[1:s.rank + 1],
                                      (s.sigma / s.sigma[0])[:s.rank].tolist(), int(block)))
        below.lines.append(plots.Line(index, [0, *s.energy.tolist()], int(block)))
        below.upright['break-even'] = max(s.m, s.n) / (s.m + s.n)   # m n / (m + n) of min(m, n)
    plots.line_panels(path, [plots.PanelRow('singular value / largest', 'log', values),
                             plots.PanelRow('cumulative energy', 'linear', kept)],
                      'index / min(m, n)', 'block', title)

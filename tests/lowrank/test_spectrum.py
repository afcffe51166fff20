"""python compress.py --spectrum: ranks, parameters and files for weights with known spectra."""

import csv

import pytest
import torch

from tools import spectrum_report
from helpers import normal

pytestmark = pytest.mark.usefixtures('one_thread')


def written(weights, folder):
    """Return the rows of the table, name -> cells, and the rows of the CSV file as dicts."""
    table = spectrum_report.report_spectrum(weights, folder, 'title').splitlines()
    with open(folder / 'spectrum.csv', newline='') as f:
        lines = list(csv.DictReader(f))
    # 'm x n' is three cells
    rows = [line.split() for line in table if line.startswith(('h.', 'all'))]
    return {name: cells for name, *cells in rows}, lines


def test_ranks_and_parameters_of_known_spectra(tmp_path):
    """The table and the CSV file match a count by hand. Ranks depend on the energy of the singular
    values, not on their number. Here two of them hold 80% of the energy."""
    sigma = torch.tensor([8., 4, 2, *[1.] * 15, 0, 0])              # squares 64 + 16 + 4 + 15 = 99
    v = torch.linalg.qr(torch.randn(60, 20, generator=torch.Generator().manual_seed(0)))[0]
    uneven = torch.diag(torch.tensor([2.] + [1.] * 19))             # squares 4 + 19 = 23
    rows, lines = written(
        {'h.0.mlp.c_fc': v * sigma, 'h.0.mlp.c_proj': (v * sigma).mT, 'h.1.mlp.c_proj': uneven},
        tmp_path)
    # 84 + 6 is 90% of 99, and 84 + 11 is 95%; each rank costs 80 of the 1,200 parameters
    found = ['8.00', '18', '9', '14', '14', '1,200', '720', '40.0%', '1,120', '6.7%']
    assert rows == {
        'h.0.mlp.c_fc': ['60', 'x', '20', *found],
        'h.0.mlp.c_proj': ['20', 'x', '60', *found],
        # 20 x 20 breaks even at rank 10, so 9 is the largest rank that saves parameters
        'h.1.mlp.c_proj': [
            '20', 'x', '20', '2.00', '20', '18', '19', '9', '400', '720', 'nothing', '760',
            'nothing'
        ],
        # the last layer stays dense: 2 x 720 + 400 and 2 x 1,120 + 400 of 2,800
        'all': ['3', 'weights', '2,800', '1,840', '34.3%', '2,640', '5.7%']}
    assert [(line['m'], line['n'], line['index']) for line in lines[:20]] == [
        ('60', '20', f'{i}') for i in range(1, 21)]
    assert [float(line['singular_value'])
            for line in lines[:20]] == pytest.approx(sigma.tolist(), abs=1e-5)
    assert [99 * float(line['cumulative_energy']) for line in lines[:20]] == pytest.approx(
        [64, 80, *range(84, 100), 99, 99], abs=1e-4)
    assert len(
        (tmp_path / 'spectrum.png').read_bytes()) > 10_000 and len(list(tmp_path.iterdir())) == 2


def test_weights_of_low_rank_of_zeros_and_of_one_row(tmp_path):
    """Weights of low rank, of zeros and of one row have the ranks computed by hand. A zero weight
    has rank 0, and a product of rank 1 reproduces it. No rank saves parameters for one row. The CSV
    file has full precision. It shows singular values above zero beyond the rank, because the
    entries of the weight are rounded to float32."""
    product = normal(40, 3).float() @ normal(3, 30, seed=1).float()
    rows, lines = written({'h.0.attn.c_attn': product, 'h.0.attn.c_proj': torch.zeros(6, 4),
                           'h.0.mlp.c_fc': torch.full((1, 9), 2.0)}, tmp_path)
    assert rows['h.0.attn.c_attn'][4] == '3'
    assert rows['h.0.attn.c_proj'][3:] == [
        '0.00', '0', '1', '1', '2', '24', '10', '58.3%', '10', '58.3%']
    assert rows['h.0.mlp.c_fc'][3:] == [
        '6.00', '1', '1', '1', '0', '9', '10', 'nothing', '10', 'nothing']
    expected = torch.linalg.svdvals(product.double()).tolist()
    assert [float(line['singular_value']) for line in lines[:30]] == expected and expected[-1] > 0


def test_a_weight_that_is_not_finite_is_named_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match=r'h\.1\.mlp\.c_fc.*finite'):
        written({'h.0.mlp.c_fc': torch.ones(2, 2), 'h.1.mlp.c_fc': torch.tensor([[1, torch.nan]])},
                tmp_path)
    assert not any(tmp_path.iterdir())


def test_the_table_of_a_large_model_stays_within_the_width():
    """The table fits in 120 columns for GPT-2 XL with latents, whose names and figures are the
    longest."""
    sigma = torch.linspace(12, 1e-9, 1600, dtype=torch.float64)
    spectra = [spectrum_report.Spectrum(f'h.{i}.attn.c_attn.kv_down', 6400, 1600, sigma, None, 1600)
               for i in range(240)]
    assert max(map(len, spectrum_report.table(spectra).splitlines())) <= 120

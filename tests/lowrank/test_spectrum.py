"""What stands behind python compress.py --spectrum: ranks, parameters and files, from weights with known spectra."""

import csv

import pytest
import torch

import compress_spectrum
from runtime import plots
from runtime.config import UserError

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture
def write(tmp_path):
    """write(weights) -> the table's rows, name -> cells, and the CSV's, name -> list of dicts."""
    def write(weights):
        text = compress_spectrum.write(weights, tmp_path, 'title')
        assert all(len(line) <= 120 for line in text.splitlines())
        assert sorted(path.name for path in tmp_path.iterdir()) == ['spectrum.csv', 'spectrum.png']
        content = (tmp_path / 'spectrum.png').read_bytes()
        assert content.startswith(b'\x89PNG\r\n\x1a\n') and len(content) > 10_000
        lines = {}
        with open(tmp_path / 'spectrum.csv', newline='') as f:
            for line in csv.DictReader(f):
                lines.setdefault(line['name'], []).append(line)
        assert list(lines) == list(weights)
        table = [line.split() for line in text.splitlines()[3:]]    # a shape 'm x n' is three cells
        return {row[0]: row[1:] for row in table}, lines
    return write


def test_ranks_and_parameters_of_known_spectra(write):
    """Two of the values are 80% of the energy: that counts, not their number."""
    sigma = torch.tensor([8., 4, 2, *[1.] * 15, 0, 0])              # squares 64 + 16 + 4 + 15 = 99
    v = torch.linalg.qr(torch.randn(60, 20, generator=torch.Generator().manual_seed(0)))[0]
    uneven = torch.eye(20)
    uneven[0, 0] = 2                                                # squares 4 + 19 = 23
    rows, lines = write({'h.0.mlp.c_fc': v * sigma, 'h.0.mlp.c_proj': (v * sigma).mT, 'h.1.mlp.c_proj': uneven})
    # 84 + 6 of the ones are 90% of 99, 84 + 11 are 95%; a rank costs 80 of 1,200 parameters
    found = ['8.00', '18', '9', '14', '14', '1,200', '720', '40.0%', '1,120', '6.7%']
    assert rows['h.0.mlp.c_fc'] == ['60', 'x', '20', *found] and rows['h.0.mlp.c_proj'] == ['20', 'x', '60', *found]
    # 20 x 20 breaks even at rank 10, so that 9 is the largest that saves anything
    assert rows['h.1.mlp.c_proj'][3:] == ['2.00', '20', '18', '19', '9', '400', '720', 'nothing', '760', 'nothing']
    # the last layer stays dense: 2 x 720 + 400 and 2 x 1,120 + 400 of 2,800
    assert rows['all'] == ['3', 'weights', '2,800', '1,840', '34.3%', '2,640', '5.7%']
    values = [float(line['singular_value']) for line in lines['h.0.mlp.c_fc']]
    assert values == pytest.approx(sigma.tolist(), abs=1e-5)
    kept = [float(line['cumulative_energy']) for line in lines['h.0.mlp.c_fc']]
    assert kept == pytest.approx([i / 99 for i in (64, 80, *range(84, 100), 99, 99)], abs=1e-6)
    assert [line['index'] for line in lines['h.0.mlp.c_fc']] == [str(i) for i in range(1, 21)]
    assert {(line['m'], line['n']) for line in lines['h.0.mlp.c_fc']} == {('60', '20')}


def test_full_precision_is_written(write):
    weight = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    _, lines = write({'h.0.attn.c_proj': weight})
    expected = torch.linalg.svdvals(weight.double()).tolist()
    assert [float(line['singular_value']) for line in lines['h.0.attn.c_proj']] == expected


def test_the_numerical_rank_of_a_product_is_found(write):
    """Its entries are rounded to float32, so that no singular value is zero."""
    generator = torch.Generator().manual_seed(0)
    product = torch.randn(40, 3, generator=generator) @ torch.randn(3, 30, generator=generator)
    rows, lines = write({'h.0.attn.c_proj': product})
    assert rows['h.0.attn.c_proj'][4] == '3' and float(lines['h.0.attn.c_proj'][-1]['singular_value']) > 0


def test_weights_of_zeros_and_of_one_row(write):
    """Zeros have rank 0 and a layer of rank 1 does; one row saves at no rank."""
    rows, lines = write({'h.0.attn.c_proj': torch.zeros(6, 4), 'h.0.mlp.c_fc': torch.full((1, 9), 2.0)})
    assert rows['h.0.attn.c_proj'][3:] == ['0.00', '0', '1', '1', '2', '24', '10', '58.3%', '10', '58.3%']
    assert rows['h.0.mlp.c_fc'][3:] == ['6.00', '1', '1', '1', '0', '9', '10', 'nothing', '10', 'nothing']
    assert [line['cumulative_energy'] for line in lines['h.0.attn.c_proj']] == ['1.0'] * 4


def test_a_weight_that_is_not_finite_is_named(tmp_path):
    with pytest.raises(ValueError, match=r'^h\.1\.mlp\.c_fc: has non-finite values'):
        compress_spectrum.write({'h.0.mlp.c_fc': torch.ones(2, 2), 'h.1.mlp.c_fc': torch.tensor([[1, float('nan')]])},
                                tmp_path, 'title')
    assert not any(tmp_path.iterdir())


def test_the_table_of_a_large_model_stays_within_the_width():
    """GPT-2 XL with latents: the widest names and numbers there are here."""
    sigma = torch.linspace(12, 1e-9, 1600, dtype=torch.float64)
    spectra = [compress_spectrum.Spectrum(f'h.{i}.attn.c_attn.kv_down', 6400, 1600, sigma, None) for i in range(240)]
    assert max(map(len, compress_spectrum.table(spectra).splitlines())) <= 120


def test_a_figure_that_cannot_be_written_is_refused(tmp_path):
    rows = [plots.PanelRow('y', 'linear', {'title': plots.Panel([plots.Line([0, 1], [0, 1], 0)], {}, {})})]
    with pytest.raises(UserError, match='nowhere/figure.png: cannot be written: No such file'):
        plots.line_panels(tmp_path / 'nowhere' / 'figure.png', rows, 'x', 'number', 'title')

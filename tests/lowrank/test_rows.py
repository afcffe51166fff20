"""lowrank/rows.py, rows that come in pieces, against lowrank/svd.py, which gets them at once; and the pieces of svd.py
that only rows are made with."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import assert_close, causal_truth, normal, whole_truth, with_singular_values
from lowrank.rows import CausalRows, LowRankRows, Rows
from lowrank.svd import (causal_low_rank_approximation, causal_starts, leading_eigenvectors, low_rank_approximation,
                         low_rank_factors)
from test_svd import each_method, exact_method

pytestmark = pytest.mark.usefixtures('one_thread')
DOUBLE = dict(dtype=torch.float64, device='cpu')


def leading(rank, method='gram'):
    return partial(leading_eigenvectors, rank=rank, method=method)


def fill(kept, x, lengths=None):
    """Append the rows of x in pieces of these lengths, or one by one."""
    for piece in x.split(lengths or 1, dim=-2):
        kept.append(piece)
    return kept


def causal_rows(x, rank, block, lengths=None, room=None, method='gram'):
    """CausalRows that hold x."""
    shape = (*x.shape[:-2], room or x.shape[-2], x.shape[-1])
    return fill(CausalRows(shape, rank, block, leading(rank, method), dtype=x.dtype, device='cpu'), x, lengths)


def assert_sums(kept, bar=1e-12):
    """A weighted sum is that of `all()`."""
    rows = kept.all()
    weights = normal(*rows.shape[:-2], 1, rows.shape[-2], seed=5).softmax(-1).to(rows.dtype)
    torch.testing.assert_close(kept.weighted_sum(weights), weights @ rows, rtol=0, atol=bar * rows.abs().max().item())


# ----------------------------------------------------------------------------------------------------------------------
# as they are, and as coordinates

@pytest.mark.parametrize('batch', [(), (2,), (2, 3)])
def test_rows_come_back_as_they_are(batch):
    x, kept = normal(*batch, 7, 3), Rows((*batch, 9, 3), **DOUBLE)
    for length, piece in zip((4, 5, 7), x.split([4, 1, 2], dim=-2)):
        kept.append(piece)
        assert kept.length == length and torch.equal(kept.all(), x[..., :length, :])
        assert_sums(kept)


@pytest.mark.parametrize('with_offset', [True, False])
def test_low_rank_rows_are_expanded_coordinates(with_offset):
    c, basis = normal(4, 2, 7, 3), normal(2, 5, 3, seed=1)
    offset = normal(2, 1, 5, seed=2) if with_offset else None
    kept = fill(LowRankRows((4, 2, 9, 3), basis, offset, **DOUBLE), c, [3, 1, 1, 2])
    expected = torch.einsum('bhtk,hnk->bhtn', c, basis) + (offset if with_offset else 0)
    torch.testing.assert_close(kept.all(), expected, rtol=0, atol=1e-12)
    assert_sums(kept)
    assert kept.nbytes == 8 * 4 * 2 * 9 * 3                         # the basis and the offset are weights


@pytest.mark.parametrize('make', [
    lambda room: Rows((2, room, 4), **DOUBLE),
    lambda room: LowRankRows((2, room, 4), normal(2, 6, 4), None, **DOUBLE),
    lambda room: CausalRows((2, room, 4), 2, 3, leading(2), **DOUBLE),
    lambda room: CausalRows((2, room, 4), 2, 99, None, **DOUBLE)],
    ids=['rows', 'low rank', 'causal', 'causal, no basis'])
@pytest.mark.parametrize('held, more', [(0, 6), (5, 1), (3, 3), (4, 9)])
def test_there_is_no_more_room_than_there_is(make, held, more):
    """What does not fit leaves what is there as it was."""
    kept = fill(make(5), normal(2, held, 4))
    before = kept.all().clone() if held else None
    with pytest.raises(ValueError, match=f'^no room for {more} more rows: {held} of 5 are taken$'):
        kept.append(normal(2, more, 4))
    assert kept.length == held and (not held or torch.equal(kept.all(), before))


# ----------------------------------------------------------------------------------------------------------------------
# causal

@settings(derandomize=True, deadline=None, max_examples=150)
@given(data=st.data(), rows=st.integers(1, 40), columns=st.integers(2, 9), block=st.integers(1, 12),
       batch=st.sampled_from([(), (1,), (2, 3)]), spare=st.integers(0, 30), seed=st.integers(0, 99),
       method=st.sampled_from(('gram', 'randomized')))
def test_causal_rows_in_any_pieces_are_the_rows_at_once(data, rows, columns, block, batch, spare, seed, method):
    rank = data.draw(st.integers(1, columns - 1))
    lengths = []
    while sum(lengths) < rows:
        lengths.append(data.draw(st.integers(1, rows - sum(lengths))))
    x = normal(*batch, rows, columns, seed=seed)
    expected = causal_low_rank_approximation(x, rank, method, block)
    kept, length = CausalRows((*batch, rows + spare, columns), rank, block, leading(rank, method), **DOUBLE), 0
    for piece in x.split(lengths, dim=-2):
        kept.append(piece)
        length += piece.shape[-2]
        assert kept.length == length and kept.all().shape == (*batch, length, columns)
        assert_close(kept.all(), expected[..., :length, :], 1e-11)
        assert_sums(kept)
    if method == 'gram':
        assert_close(kept.all(), causal_truth(x, rank, block), 1e-12)


@pytest.mark.parametrize('prompt', [1, 31, 32, 33, 63, 64, 65, 128, 199])
def test_causal_rows_of_a_head_of_gpt2(prompt):
    x = normal(2, 200, 64)
    kept = causal_rows(x, 16, 32, [prompt] + [1] * (200 - prompt))
    assert_close(kept.all(), causal_low_rank_approximation(x, 16), 1e-12)
    assert_sums(kept)


def test_rows_of_one_sequence_join_all():
    """A prompt that several sequences share comes once; then every sequence goes on by itself."""
    prompt, later = normal(1, 11, 4), normal(3, 9, 4, seed=1)
    x = torch.cat((prompt.expand(3, -1, -1), later), dim=1)
    for kept in (CausalRows((3, 20, 4), 2, 4, leading(2), **DOUBLE), Rows((3, 20, 4), **DOUBLE)):
        fill(kept, prompt, [10, 1])
        fill(kept, later)
        expected = x if isinstance(kept, Rows) else causal_truth(x, 2)
        assert_close(kept.all(), expected, 1e-12)
        assert_sums(kept)


@pytest.mark.parametrize('columns', [2, 3, 4, 5, 8, 33])
@pytest.mark.parametrize('lengths', [None, [3, 1, 1, 7, 5, 2], [19]])
def test_the_gram_matrix_is_that_of_all_rows(columns, lengths):
    x = normal(3, 2, 19, columns)
    kept = causal_rows(x, 1, 4, lengths, room=40)
    assert_close(kept._gram_matrix(), x.mT @ x, 1e-14)
    assert kept.gram.numel() == 6 * (columns // 2 + 1) * columns    # hardly more than a triangle


def test_the_gram_matrix_ends_where_no_basis_comes_after():
    """Rows of the last span that there is room for cost no sums."""
    kept = causal_rows(normal(16, 4), 2, 4, room=16)
    assert_close(kept._gram_matrix(), normal(16, 4)[:8].mT @ normal(16, 4)[:8], 1e-14)


def test_float32_rows_keep_the_precision_of_the_uncached_function():
    """sigma_1 / sigma_k = 100 and a gap of 2% at the cut: with G in float32 the error would be 50 times as large."""
    sigma = [1] * 8 + [.01, .0098] + [.005] * 22
    for seed in range(0, 50, 10):
        early = with_singular_values(sigma, 128, 32, seed)
        x = torch.cat((early, normal(128, 128, seed=seed + 2) @ early)).float()     # later rows are mixtures of these
        truth = causal_truth(x.double(), 9, 128)
        late = torch.linalg.norm(truth[128:])
        cached, uncached = (torch.linalg.norm((y.double() - truth)[128:]) / late for y in (
            causal_rows(x, 9, 128).all(), causal_low_rank_approximation(x, 9, block=128)))
        assert cached <= 2 * uncached and cached <= 1e-6, (cached, uncached)


@pytest.mark.parametrize('scale', [1e-30, 1e-20, 1e20, 1e30])
def test_float32_rows_of_any_size(scale):
    x = normal(2, 40, 8).float()
    expected = causal_truth(scale * x.double(), 3)
    assert_close(causal_rows(scale * x, 3, 4, [7] + [1] * 33).all() / scale, expected / scale, 1e-6)


@pytest.mark.parametrize('dtype, bar', [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision_rows(dtype, bar):
    x = normal(2, 40, 8).to(dtype)
    kept = causal_rows(x, 3, 4, [7] + [1] * 33)
    assert kept.all().dtype == dtype and kept.gram.dtype == torch.float32
    assert_close(kept.all(), causal_truth(x.double(), 3), bar)
    assert_sums(kept, bar)


def test_autocast_does_not_round_the_basis():
    x = normal(2, 40, 8).float()
    with torch.autocast('cpu', torch.bfloat16):
        kept = causal_rows(x, 3, 4, [7] + [1] * 33)
    assert torch.equal(kept.bases, causal_rows(x, 3, 4, [7] + [1] * 33).bases)


DEGENERATE = {
    'zero': torch.zeros(20, 6),
    'one direction': torch.outer(torch.arange(1., 21), torch.tensor([1., -2, 0, 3, 1, 1])),
    'equal rows': torch.tensor([1., 2, 3, 4, 5, 6]).expand(20, 6),
    'two rows in turn': normal(2, 6).repeat(10, 1),
    'zero columns': normal(20, 6) * torch.tensor([1., 0, 0, 1, 0, 0]),
}


@pytest.mark.parametrize('rank', [2, 3, 5])
@pytest.mark.parametrize('x', DEGENERATE.values(), ids=DEGENERATE)
def test_rows_of_no_more_dimensions_than_the_rank_pass(x, rank):
    """The basis is not unique, what it does to such rows is."""
    kept = causal_rows(x.double(), rank, 4, [5] + [1] * 15)
    torch.testing.assert_close(kept.all(), x.double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize('rank', [2, 3])
def test_what_early_rows_determine_of_later_ones_is_kept(rank):
    """Eight equal rows determine one direction of `rank`. Later rows keep what they have in it; of the rest, no more
    can be promised than a projection."""
    x = torch.cat((normal(1, 6).expand(8, 6), normal(8, 6, seed=1)))
    y, direction = causal_rows(x, rank, 8).all(), x[0] / x[0].norm()
    assert torch.equal(y[:8], x[:8])
    torch.testing.assert_close(y @ direction, x @ direction, rtol=0, atol=1e-12)
    torch.testing.assert_close((y * (x - y)).sum(-1), torch.zeros(16).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('lengths', [[20], [1] * 20, [6, 14]])
def test_no_basis_comes_from_rows_that_are_not_finite(value, lengths):
    for bad in range(20):
        x = normal(2, 20, 4)
        x[1, bad, 2] = value
        if bad < 16:                                                # bases come from rows [0, 4), [0, 8), [0, 16)
            with pytest.raises(torch.linalg.LinAlgError, match='non-finite'):
                causal_rows(x, 2, 4, lengths)
        else:
            finite = causal_rows(x, 2, 4, lengths).all().isfinite()
            assert not finite[1, bad].any() and finite.sum() == finite.numel() - 4


# ----------------------------------------------------------------------------------------------------------------------
# what they are made with

def test_causal_starts():
    for rows in range(1, 70):
        for rank in (1, 2, 5, 8):
            for block in (1, 2, 3, 8, 100):
                doubled = [block * 2 ** i for i in range(8)]
                assert causal_starts(rows, rank, block) == [s for s in doubled if rank < s < rows]


@exact_method
@pytest.mark.parametrize('shape', [(3, 8), (8, 3), (5, 5), (2, 4, 12), (2, 1, 6)])
def test_factors_are_the_best_approximation(shape, method):
    x, least = normal(*shape), min(shape[-2:])
    for rank in range(1, least + 1):
        a, b = low_rank_factors(x, rank, method)
        assert a.shape == (*shape[:-1], rank) and b.shape == (*shape[:-2], rank, shape[-1])
        assert_close(a @ b, whole_truth(x, rank), 1e-12)
        orthonormal = a.mT @ a if shape[-2] < shape[-1] else b @ b.mT
        torch.testing.assert_close(orthonormal, torch.eye(rank).double().expand_as(orthonormal))


@each_method
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('rows, columns', [(4, 12), (6, 6), (16, 64), (12, 4), (32, 32)])
def test_factors_are_those_of_the_approximation_where_several_are_best(method, dtype, rows, columns):
    """All singular values are 1. A model that decodes with the one must not have been trained with the other."""
    x = with_singular_values([1] * min(rows, columns), rows, columns).to(dtype).expand(3, -1, -1)
    for rank in (1, min(rows, columns) // 2):
        a, b = low_rank_factors(x, rank, method)
        assert_close(a @ b, low_rank_approximation(x, rank, method), 1e-14 if dtype == torch.float64 else 1e-6)


@each_method
@pytest.mark.parametrize('x', [torch.zeros(4, 9), torch.outer(torch.arange(4.), torch.arange(9.)),
                               1e-20 * normal(4, 9).float(), 1e20 * normal(4, 9).float()],
                         ids=['zero', 'rank one', '1e-20', '1e20'])
def test_factors_of_degenerate_matrices(method, x):
    a, b = low_rank_factors(x, 3, method)
    unit = x.abs().max().clamp_min(1e-30)
    torch.testing.assert_close(a @ b / unit, low_rank_approximation(x, 3, method) / unit, rtol=0, atol=1e-6)


@each_method
def test_factors_are_not_differentiated(method):
    assert not any(part.requires_grad for part in low_rank_factors(normal(4, 9).requires_grad_(), 2, method))


@pytest.mark.parametrize('rank, method, message', [
    (4, 'gram', r'rank 4 is more than the smaller side of \(3, 8\)'), (0, 'gram', 'rank must be at least 1'),
    (2, 'qr', "unknown SVD method 'qr'")])
def test_factors_that_cannot_be(rank, method, message):
    with pytest.raises(ValueError, match=message):
        low_rank_factors(normal(3, 8), rank, method)


@each_method
def test_factors_of_what_is_not_finite(method):
    with pytest.raises(torch.linalg.LinAlgError, match='non-finite'):
        low_rank_factors(torch.full((3, 8), float('nan')), 2, method)


def test_leading_eigenvectors():
    x = normal(2, 9, 5)
    w = leading_eigenvectors(x.mT @ x, 3)
    sigma, vh = torch.linalg.svd(x)[1:]
    torch.testing.assert_close((x @ w).norm(dim=-2), sigma[:, :3].flip(-1))
    torch.testing.assert_close(w @ w.mT, vh[:, :3].mT @ vh[:, :3])
    assert leading_eigenvectors((x.mT @ x).float(), 3).dtype == torch.float32
    with pytest.raises(torch.linalg.LinAlgError, match='non-finite'):
        leading_eigenvectors(torch.full((3, 3), float('inf')), 1)

"""The value caches of lowrank/kv_cache.py, which get rows in pieces, against lowrank/svd.py, which
gets all rows at once. Also the functions of svd.py that the caches use."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import assert_close, causal_truth, normal, with_singular_values
from lowrank.kv_cache import BlockCausalValues, DenseValues, FactoredValues
from lowrank.svd import (METHODS, causal_low_rank_approximation, leading_eigenvectors,
                         leading_right_vectors, low_rank_approximation)

pytestmark = pytest.mark.usefixtures('one_thread')
DOUBLE = dict(dtype=torch.float64, device='cpu')


def causal_rows(x, rank, block, lengths=1, method='gram', spare=0):
    """Return BlockCausalValues that got x in pieces of these lengths and have room for `spare` more
    rows."""
    *batch, rows, columns = x.shape
    leading = partial(leading_eigenvectors, rank=rank, method=method)
    kept = BlockCausalValues((*batch, rows + spare, columns), rank, block, leading, dtype=x.dtype,
                             device=x.device)
    for piece in x.split(lengths, dim=-2):
        kept.append(piece)
    return kept


def assert_sums(kept, bar=1e-12):
    """Check that `weighted_sum` equals the weighted sum of the rows of `all()`."""
    rows = kept.all()
    weights = normal(*rows.shape[:-2], 1, rows.shape[-2], seed=5).softmax(-1).to(rows)
    torch.testing.assert_close(kept.weighted_sum(weights), weights @ rows, rtol=0,
                               atol=bar * rows.abs().max().item())


W, BIAS = normal(2, 6, 4, seed=1), normal(2, 1, 6, seed=2)


@pytest.mark.parametrize(
    'make, truth, nbytes',
    [
        (DenseValues, lambda x: x, 8 * 2 * 7 * 4),
        (partial(FactoredValues, basis=W, bias=None,
                 down_proj=None), lambda x: x @ W.mT, 8 * 2 * 7 * 4),
        (partial(FactoredValues, basis=W, bias=BIAS,
                 down_proj=None), lambda x: x @ W.mT + BIAS, 8 * 2 * 7 * 4),
        # 3 unchanged rows, 4 rows of coordinates, bases for rows [3, 6) and [6, 7), G
        (partial(BlockCausalValues, rank=2, block=3, eigensolver=partial(
            leading_eigenvectors, rank=2)), lambda x: causal_truth(x, 2, 3), 8 * 2 *
         (3 * 4 + 4 * 2 + 2 * 2 * 4 + 4 * 4)),
        (partial(BlockCausalValues, rank=2, block=99, eigensolver=None), lambda x: x, 8 * 2 * 7 * 4)
    ],
    ids=['dense', 'factored', 'factored, bias', 'causal', 'causal, no basis'])
def test_rows_come_back(make, truth, nbytes):
    """Each kind of cache returns the rows that were appended, projected as in training. `nbytes`
    matches a count by hand. The basis and bias of FactoredValues are weights of the model and do
    not count."""
    kept, x = make((1, 2, 7, 4), **DOUBLE), normal(1, 2, 7, 4)
    for start, end in ((0, 2), (2, 4), (4, 5), (5, 7)):
        kept.append(x[:, :, start:end])
        torch.testing.assert_close(kept.all(), truth(x[:, :, :end]), rtol=0, atol=1e-12)
        assert_sums(kept)
    assert kept.nbytes == nbytes


@settings(derandomize=True, deadline=None, max_examples=100)
@given(rows=st.integers(1, 40), columns=st.integers(2, 9), rank=st.integers(1, 8),
       block=st.integers(1, 12), batch=st.sampled_from([(), (1, ),
                                                        (2, 3)]), lengths=st.integers(1, 40),
       spare=st.integers(0, 30), seed=st.integers(0, 99), method=st.sampled_from(
           ('gram', 'randomized')))
def test_rows_in_pieces_are_the_rows_at_once(rows, columns, rank, block, batch, lengths, spare,
                                             seed, method):
    """Rows appended in pieces of any length equal `causal_low_rank_approximation` of all rows at
    once."""
    x, rank = normal(*batch, rows, columns, seed=seed), min(rank, columns - 1)
    kept = causal_rows(x, rank, block, lengths, method, spare)
    assert_close(kept.all(), causal_low_rank_approximation(x, rank, method, block), 1e-11)
    assert_sums(kept)


# sigma_1 / sigma_k = 100 and a gap of 2% at the cut, where G in float32 would make the error 50
# times as large
STEEP = with_singular_values([1] * 8 + [.01, .0098] + [.005] * 22, 128, 32)
X = normal(2, 40, 8)


@pytest.mark.parametrize('lengths', [1, 7, 999])
@pytest.mark.parametrize(
    'x, rank, block, bar',
    [
        pytest.param(
            normal(2, 200, 64).float(), 16, 32, 1e-4, marks=pytest.mark.any_device, id='GPT-2'),
        pytest.param(
            torch.cat((STEEP, normal(128, 128, seed=2) @ STEEP)).float(), 9, 128, 1e-6, id='steep'),
        *(pytest.param(scale * X.float(), 3, 4, 1e-6, id=f'{scale}') for scale in (1e-6, 1e4)),
        pytest.param(X.bfloat16(), 3, 4, 2e-2, id='bfloat16'),
        pytest.param(X.half(), 3, 4, 3e-3, id='float16'),
        # rows that span at most `rank` dimensions do not change, although the basis is not unique
        *(pytest.param(x, 2, 4, 1e-12, id=f'degenerate {i}')
          for i, x in enumerate((0 * X, X[:, :1].expand_as(X), X[:, :2].repeat(1, 20, 1),
                                 X * torch.tensor([1., 0, 0, 1, 0, 0, 0, 0]))))])
def test_causal_rows_have_the_precision_of_their_dtype(x, rank, block, bar, lengths, device):
    """Cached rows are as exact as their dtype allows. The reference is float64. Autocast does not
    round the Gram matrix that bases come from. That matrix is float64, except for half
    precision."""
    kept, expected = causal_rows(x.to(device), rank, block,
                                 lengths), causal_truth(x.double(), rank, block)
    assert ((kept.all().cpu().double() - expected).norm() <= bar * expected.norm()
            and kept.all().dtype == x.dtype)
    assert_sums(kept, bar)
    with torch.autocast(device, torch.bfloat16):
        gram = causal_rows(x.to(device), rank, block, lengths).gram
    assert torch.equal(gram, kept.gram)
    assert (gram.dtype == torch.float64) == (x.element_size() > 2 and device != 'mps')


@pytest.mark.parametrize('lengths', [20, 1, [6, 14]])
@pytest.mark.parametrize('value, bad', [(float('nan'), 0), (float('inf'), 3), (-float('inf'), 7),
                                        (float('nan'), 15), (float('inf'), 16), (float('nan'), 19)])
def test_no_basis_comes_from_rows_that_are_not_finite(value, bad, lengths):
    """NaN and inf raise an error if a basis would be computed from their row. Otherwise they stay
    in their row."""
    x = normal(2, 20, 4)
    x[1, bad, 2] = value
    if bad < 16:  # bases come from rows [0, 4), [0, 8), [0, 16)
        with pytest.raises(torch.linalg.LinAlgError, match='NaN or infinite'):
            causal_rows(x, 2, 4, lengths)
    else:
        assert (~causal_rows(x, 2, 4, lengths).all().isfinite().all(-1)).nonzero().tolist() == [[
            1, bad]]


# --------------------------------------------------------------------------------------------------
# functions of svd.py

@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('x, bar', [
    *((normal(*shape), 1e-12) for shape in ((3, 8), (8, 3), (5, 5), (2, 4, 12))),
    *((with_singular_values([1] * min(shape), *shape).expand(3, -1, -1), 1e-13)
      for shape in ((4, 12), (6, 6), (12, 4))), (normal(4, 9).float(), 1e-6),
    (torch.zeros(4, 9), 0), (torch.outer(torch.arange(4.), torch.arange(9.)), 1e-6),
    (1e-6 * normal(4, 9).float(), 1e-6), (1e4 * normal(4, 9).float(), 1e-6)])
def test_the_basis_is_that_of_the_approximation_even_where_several_are_best(method, x, bar):
    """`leading_right_vectors` and `low_rank_approximation` use the same basis even if all singular
    values are 1 and several are best. Otherwise a model would decode with another basis than it was
    trained with."""
    x = x if x.shape[-2] >= x.shape[-1] else x.mT
    for rank in range(1, x.shape[-1] + 1):
        basis = leading_right_vectors(x.clone().requires_grad_(), rank, method)
        assert basis.shape == (*x.shape[:-2], x.shape[-1], rank) and not basis.requires_grad
        found = x @ basis @ basis.mT
        assert ((found - low_rank_approximation(x, rank, method)).abs()
                <= 10 * bar * x.abs().max()).all()
        gram = basis.mT @ basis
        assert method == 'randomized' or torch.allclose(gram, torch.eye(rank, dtype=x.dtype),
                                                        atol=1e-5)

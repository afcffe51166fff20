"""runtime/generation.py: which tokens can be drawn and how often, and options at their limits."""

import math

import pytest
import torch

from runtime.generation import sample_token, validate_sampling

pytestmark = pytest.mark.usefixtures('one_thread')
P = torch.tensor([.2, .3, .1, .4])                                  # likeliest first: 3, 1, 0, 2
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OPTIONS = [dict(temperature=0), dict(top_k=1), dict(temperature=1e-300), {}, dict(temperature=100.),
           dict(top_k=2), dict(top_p=.9), dict(top_k=2, top_p=.9)]


def drawn(logits, count=1000, **options):
    """Return how often each id occurs in `count` draws from a row of logits: (vocab)."""
    generator = torch.Generator(logits.device).manual_seed(0)
    ids = sample_token(logits.expand(count, -1), generator=generator, **options)
    assert ids.shape == (count, 1) and ids.dtype == torch.int64
    return torch.bincount(ids[:, 0].cpu(), minlength=len(logits))


def assert_follows(counts, p):
    """Check counts against p, which is proportional to probabilities, by a chi-squared test.

    Only 1 in 10,000 samples exceeds the bound, about dof + 5 sqrt(2 dof) for the few degrees of
    freedom (dof) here. Ids with p = 0 must not occur."""
    expected = torch.as_tensor(p, dtype=torch.float64) * counts.sum() / sum(p)
    dof = (expected > 0).sum().item() - 1
    assert (counts[expected == 0] == 0).all()
    assert ((counts - expected) ** 2 / expected)[expected > 0].sum() <= dof + 5 * math.sqrt(2 * dof)


# --------------------------------------------------------------------------------------------------
# which tokens are drawn, and how often


@pytest.mark.any_device
@pytest.mark.parametrize(
    'dtype, options, p',
    [(torch.float32, {}, P), (torch.float64, dict(temperature=.5), P ** 2),
     (torch.bfloat16, dict(temperature=2.), P ** .5),
     (torch.float16, dict(temperature=1e300), [1, 1, 1, 1]),
     (torch.float32, dict(top_k=3), [.2, .3, 0, .4]),
     (torch.float32, dict(top_p=.6), [0, .3, 0, .4]),
     (torch.float32, dict(temperature=2., top_k=3, top_p=.6), [0, .3 ** .5, 0, .4 ** .5])], ids=str)
def test_draws_follow_the_softmax_of_what_is_left(device, dtype, options, p):
    """Draws follow softmax(logits / temperature) over the tokens that top_k and top_p keep, by a
    chi-squared test."""
    dtype = torch.float32 if (device, dtype) == ('mps', torch.float64) else dtype
    assert_follows(drawn(P.log().to(device, dtype), 20000, **options), p)


@pytest.mark.any_device
@pytest.mark.parametrize('options, left', [
    (dict(top_p=.01), {3}), (dict(top_p=.3999), {3}), (dict(top_p=.4001), {3, 1}),
    (dict(top_p=.6999), {3, 1}), (dict(top_p=.7001), {3, 1, 0}),
    (dict(top_p=.9001), {0, 1, 2, 3}), (dict(top_p=1), {0, 1, 2, 3}),
    (dict(top_k=1), {3}), (dict(top_k=2), {3, 1}), (dict(top_k=4), {0, 1, 2, 3}),
    (dict(top_k=99), {0, 1, 2, 3}), (dict(top_k=2, top_p=.5), {3}),
    (dict(top_k=2, top_p=.52, temperature=9.), {3, 1}),
    (dict(top_p=.39, temperature=9.), {3, 1})], ids=str)
def test_top_k_counts_after_the_temperature_and_top_p_after_both(device, options, left):
    """top_k and top_p keep exactly the expected tokens. top_p applies after top_k and the
    temperature."""
    assert set(drawn(P.log().to(device), **options).nonzero()[:, 0].tolist()) == left


def test_of_equally_likely_tokens_top_k_leaves_all_and_top_p_as_many_as_it_needs():
    """If tokens are equally likely, top_k keeps all of them, as in nanoGPT, and top_p keeps no more
    than it needs."""
    assert drawn(torch.tensor([1., 2, 1, 0, 1]), top_k=2).nonzero()[:, 0].tolist() == [0, 1, 2, 4]
    assert drawn(torch.zeros(8), top_p=.5).count_nonzero() == 4
    counts = drawn(torch.tensor([1., 0, 0, 0, 0]), top_p=.6)        # .40, .15, .15, ...
    assert counts[0] and counts.count_nonzero() == 3


@pytest.mark.any_device
def test_rows_are_drawn_each_from_its_own_logits_which_stay_as_they_are(device):
    """Each row is drawn from its own logits, which are not modified."""
    rows = [[0., 9, 0], [9, 0, 0], [0, 0, 9]]
    logits = torch.tensor(rows, device=device)
    for options in (dict(temperature=0), dict(temperature=.01), dict(top_k=1), dict(top_p=.5)):
        assert sample_token(logits, **options).tolist() == [[1], [0], [2]
                                                            ] and logits.tolist() == rows
    assert sample_token(torch.tensor([[-3.], [1e30]], device=device)).tolist() == [[0], [0]]


# --------------------------------------------------------------------------------------------------
# options at their limits

@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('scale', [1, 1e-4, 1e4])
def test_a_temperature_or_top_p_of_nearly_nothing_is_the_likeliest(dtype, scale):
    """A temperature or top_p near zero gives the likeliest token, down to the smallest float64."""
    logits = (torch.tensor([1., 3, 2, -6]) * scale).to(dtype)
    for tiny in (5e-324, 1e-300, 1e-45, 1e-40, 1e-37):
        for options in (dict(temperature=tiny), dict(temperature=tiny, top_k=2, top_p=.5),
                        dict(top_p=tiny), dict(top_p=tiny, top_k=3, temperature=1.)):
            assert drawn(logits, 50, **options).tolist() == [0, 50, 0, 0]
        assert drawn(torch.zeros(6, dtype=dtype), top_p=tiny).count_nonzero() == 1


@pytest.mark.parametrize('logits, temperature', [
    *((torch.tensor([1., 30, 2, -60]).to(dtype), huge)
      for dtype in DTYPES
      for huge in (1e30, 1e39, 1.7e308)), *((scale * torch.tensor([1., 3, 2, -6]), 1.)
                                            for scale in (1e-30, 1e-45, 0))
])
def test_at_a_huge_temperature_all_that_is_left_is_equally_likely(logits, temperature):
    assert_follows(drawn(logits, temperature=temperature), [1, 1, 1, 1])
    assert_follows(
        drawn(logits, temperature=temperature, top_k=4, top_p=.5).sort().values, [0, 0, 1, 1])


@pytest.mark.parametrize('logits', [
    torch.tensor([3e38, 1e38, -3e38]),
    torch.tensor([-1e38, -2e38, -3e38]),
    torch.tensor([65504., 6e4, -65504]).half(),
    torch.tensor([3e38, 1e38, -3e38]).bfloat16(),
    torch.tensor([1e300, -1e300, 0], dtype=torch.float64),
    torch.tensor([1e39, .9e39, -1e308], dtype=torch.float64),
    torch.tensor([-1e300, -1.7e308, -2e300], dtype=torch.float64),
    torch.tensor([1 + 1e-12, 1, 1], dtype=torch.float64)
], ids=lambda x: f'{x.dtype}, {x[0]:.0e}')
def test_huge_logits_and_those_that_float32_does_not_tell_apart(logits):
    """Logits near the limits of their dtype, and float64 logits that float32 cannot tell apart,
    give the likeliest token."""
    for options in OPTIONS if logits[0].abs() > 2 else OPTIONS[:2]:
        assert drawn(logits, 20, **options).tolist() == [20, 0, 0]


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16])
def test_logits_that_are_not_finite_are_refused(value, dtype):
    """NaN or inf in the logits raises FloatingPointError, in any row and even for an unlikely
    token."""
    logits = torch.zeros(3, 4).to(dtype)
    logits[1, 2] = value
    for options in OPTIONS:
        with pytest.raises(FloatingPointError):
            sample_token(logits, **options)


@pytest.mark.parametrize('name, value, nearest', [
    *(('temperature', value, 0) for value in (-1e-300, -1., math.nan, math.inf)),
    ('top_k', 0, 1), ('top_k', -3, 1),
    *(('top_p', value, .01) for value in (0., -.5, math.nan)),
    ('top_p', 1.0001, 1.), ('top_p', math.inf, 1.)])
def test_options_that_cannot_be_are_refused_with_the_nearest(name, value, nearest):
    """An invalid option raises a ValueError that names the nearest valid value."""
    right = dict(temperature=1e300, top_k=None, top_p=None)
    with pytest.raises(ValueError, match=f'^{name}={value}: .*nearest: {nearest}\\)$'):
        validate_sampling(**right | {name: value})
    validate_sampling(**right | {name: nearest})

"""runtime/draw.py: which tokens can come, how often they do, and logits and options at the ends of their ranges."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.draw import check_draw, draw

pytestmark = pytest.mark.usefixtures('one_thread')


def probabilities(logits, **options):
    """What `draw` draws from: (B, vocab), rows adding up to 1."""
    with mock.patch.object(torch, 'multinomial', side_effect=lambda p, **_: p[:, :1]) as multinomial:
        draw(logits, **options)
    p = multinomial.call_args.args[0]
    assert (p >= 0).all()
    return p / p.sum(-1, keepdim=True)


def possible(logits, **options):
    """The ids that can come, of a single row of logits."""
    return set(probabilities(torch.as_tensor(logits)[None], **options)[0].nonzero()[:, 0].tolist())


def logits_of(*p):
    return torch.tensor(p).double().log().float()


def drawn(logits, count=20000, seed=0, **options):
    """How often each id comes in `count` draws: (vocab)."""
    generator = torch.Generator().manual_seed(seed)
    ids = draw(torch.as_tensor(logits).expand(count, -1), generator=generator, **options)
    assert ids.shape == (count, 1) and ids.dtype == torch.int64
    return torch.bincount(ids[:, 0], minlength=len(logits))


def assert_follows(counts, p):
    """Chi-squared against probabilities p: at most what one in 10,000 right samples exceeds, about dof + 5 sqrt(2 dof)
    for the few degrees of freedom here; where p is 0 nothing may come."""
    p = torch.as_tensor(p, dtype=torch.float64)
    expected = p[p > 0] * counts.sum()
    assert not counts[p == 0].any() and (expected > 5).all()
    dof = len(expected) - 1
    assert ((counts[p > 0] - expected) ** 2 / expected).sum() <= dof + 5 * math.sqrt(2 * dof)


# ----------------------------------------------------------------------------------------------------------------------
# how often

@pytest.mark.parametrize('temperature', [1, .5, 2., 1e300])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_draws_follow_the_softmax(temperature, dtype):
    logits = torch.tensor([2., 1.5, 0, .5, -1, -1.5, 1]).to(dtype)
    assert_follows(drawn(logits, temperature=temperature), (logits.double() / temperature).softmax(-1))


def test_draws_follow_the_softmax_of_what_is_left():
    logits = logits_of(.1, .4, .05, .25, .2)
    assert_follows(drawn(logits, top_k=3), [0, .4 / .85, 0, .25 / .85, .2 / .85])
    assert_follows(drawn(logits, top_p=.6), [0, .4 / .65, 0, .25 / .65, 0])
    tempered = torch.tensor([0, .4 ** .5, 0, .25 ** .5, 0]).double()
    assert_follows(drawn(logits, temperature=2., top_k=3, top_p=.6), tempered / tempered.sum())


def test_rows_are_drawn_each_from_its_own_logits():
    logits = torch.tensor([[0., 9, 0], [9, 0, 0], [0, 0, 9]])
    for options in (dict(temperature=0), dict(temperature=.01), dict(top_k=1), dict(top_p=.5)):
        assert draw(logits, **options).tolist() == [[1], [0], [2]]


def test_a_generator_of_its_own():
    logits = torch.zeros(50, 9)
    state = torch.get_rng_state()
    a, again, b = (draw(logits, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, again) and not torch.equal(a, b) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(draw(logits), draw(logits)) and not torch.equal(torch.get_rng_state(), state)


# ----------------------------------------------------------------------------------------------------------------------
# which

def nucleus(p, top_p):
    """How many of the likeliest reach top_p together, and the probability of the least of them."""
    ranked, total = sorted(p, reverse=True), 0
    for count, x in enumerate(ranked, 1):
        total += x
        if total >= top_p:
            return count, x
    return len(ranked), ranked[-1]


@settings(derandomize=True, deadline=None, max_examples=200)
@given(weights=st.lists(st.integers(1, 12), min_size=1, max_size=12), top_p=st.floats(1e-3, 1), scale=st.floats(.2, 3),
       top_k=st.none() | st.integers(1, 14))
def test_top_p_leaves_the_fewest_likeliest_that_reach_it(weights, top_p, scale, top_k):
    """Ties included: any of the equally likely may be the last one, but not one more of them."""
    logits = torch.tensor(weights).double().log() * scale
    p = logits.softmax(-1)
    if top_k is not None and top_k < len(p):                        # applied first
        p = torch.where(logits >= logits.sort(descending=True).values[top_k - 1], p, 0)
        p = p / p.sum()
    left = possible(logits, top_p=top_p, top_k=top_k)
    counts = {nucleus(p.tolist(), x)[0] for x in (top_p - 1e-9, top_p + 1e-9)}       # sums round
    least = min(nucleus(p.tolist(), x)[1] for x in (top_p - 1e-9, top_p + 1e-9))
    assert len(left) in counts and all(p[i] >= least - 1e-12 for i in left)
    assert {i for i in range(len(p)) if p[i] > p[list(left)].min() + 1e-12} <= left
    kept = torch.zeros(len(p)).double()
    kept[list(left)] = p[list(left)]
    torch.testing.assert_close(probabilities(logits[None], top_p=top_p, top_k=top_k)[0], kept / kept.sum())


@pytest.mark.parametrize('top_p, left', [(.01, {3}), (.4, {3}), (.41, {3, 1}), (.7, {3, 1}), (.71, {3, 1, 0}),
                                         (.9, {3, 1, 0}), (.95, {0, 1, 2, 3}), (1, {0, 1, 2, 3}), (None, {0, 1, 2, 3})])
def test_top_p(top_p, left):
    """Probabilities .2, .3, .1, .4; one that is reached exactly, up to rounding from below, is reached."""
    assert possible(logits_of(.2, .3, .1, .4), top_p=top_p and top_p - 1e-6 * (top_p < 1)) == left


@pytest.mark.parametrize('top_p', [5e-324, 1e-300, 1e-46, 1e-45, 1e-38, 1e-9])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_a_tiny_top_p_is_the_likeliest(top_p, dtype):
    logits = torch.tensor([.5, 3, 2, 2.5]).to(dtype)
    assert possible(logits, top_p=top_p) == {1} == possible(logits, top_p=top_p, temperature=1e300, top_k=2)
    assert len(possible(torch.zeros(6), top_p=top_p)) == 1          # one of those equally likely


def test_of_equally_likely_tokens_top_p_leaves_a_part():
    assert len(possible(torch.zeros(8), top_p=.5)) == 4
    left = possible(torch.tensor([1., 0, 0, 0, 0]), top_p=.6)       # .40, .15, .15, ...
    assert 0 in left and len(left) == 3


def test_top_p_counts_after_top_k():
    """.4 and .3 are .57 and .43 of what top_k=2 leaves, so .5 needs one and not two."""
    logits = logits_of(.2, .3, .1, .4)
    assert possible(logits, top_k=2, top_p=.5) == {3} and possible(logits, top_p=.5) == {3, 1}


def test_top_p_counts_after_the_temperature():
    logits = logits_of(.2, .3, .1, .4)
    assert possible(logits, top_p=.39, temperature=1.) == {3} and possible(logits, top_p=.39, temperature=9.) == {3, 1}


@pytest.mark.parametrize('top_k, left', [(1, {3}), (2, {3, 1}), (3, {3, 1, 0}), (4, {0, 1, 2, 3}), (99, {0, 1, 2, 3}),
                                         (None, {0, 1, 2, 3})])
def test_top_k(top_k, left):
    assert possible(logits_of(.2, .3, .1, .4), top_k=top_k) == left


def test_top_k_leaves_all_that_are_as_likely_as_the_last():
    """nanoGPT's definition."""
    assert possible(torch.tensor([1., 2, 1, 0, 1]), top_k=2) == {0, 1, 2, 4}


def test_float64_logits_are_told_apart_where_float32_could_not():
    logits = torch.tensor([1., 1 + 1e-12, 1], dtype=torch.float64)
    assert possible(logits, top_k=1) == {1} and draw(logits[None], temperature=0).item() == 1


@pytest.mark.parametrize('options', [{}, dict(temperature=0), dict(temperature=.1), dict(top_k=1), dict(top_k=5),
                                     dict(top_p=.1), dict(top_p=1, top_k=3, temperature=1e300)], ids=str)
def test_a_vocabulary_of_one(options):
    assert draw(torch.tensor([[-3.], [1e30]]), **options).tolist() == [[0], [0]]


# ----------------------------------------------------------------------------------------------------------------------
# ends of ranges

@pytest.mark.parametrize('temperature', [0, 5e-324, 1e-300, 1e-45, 1e-40, 1e-37])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('scale', [1, 1e-4, 1e4])
@pytest.mark.parametrize('options', [{}, dict(top_k=2), dict(top_p=.5), dict(top_k=3, top_p=1e-9)], ids=str)
def test_a_temperature_of_nothing_is_the_likeliest(temperature, dtype, scale, options):
    logits = (torch.tensor([[1., 3, 2, -6]]) * scale).to(dtype)
    assert drawn(logits[0], 50, temperature=temperature, **options).tolist() == [0, 50, 0, 0]


@pytest.mark.parametrize('temperature', [1e30, 1e38, 1e39, 1e300, 1.7e308])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_at_a_huge_temperature_all_that_is_left_is_equally_likely(temperature, dtype):
    logits = torch.tensor([[1., 30, 2, -60]]).to(dtype)
    for options, left in (({}, [1, 1, 1, 1]), (dict(top_k=2), [0, 1, 1, 0]), (dict(top_k=3), [1, 1, 1, 0])):
        p = probabilities(logits, temperature=temperature, **options)[0].double()
        torch.testing.assert_close(p, torch.tensor(left).double() / sum(left), rtol=0, atol=1e-6)
    assert len(possible(logits[0], temperature=temperature, top_p=.5)) == 2


@pytest.mark.parametrize('logits', [
    torch.tensor([3e38, 1e38, -3e38]), torch.tensor([-1e38, -2e38, -3e38]), torch.tensor([65504., 6e4, -65504]).half(),
    torch.tensor([3e38, 1e38, -3e38]).bfloat16(), torch.tensor([1e300, -1e300, 0], dtype=torch.float64),
    torch.tensor([1e39, .9e39, -1e308], dtype=torch.float64),
    torch.tensor([-1e300, -1.7e308, -2e300], dtype=torch.float64)],
    ids=lambda x: f'{x.dtype}, {x[0]:.0e}')
@pytest.mark.parametrize('options', [{}, dict(temperature=0), dict(temperature=1e-300), dict(temperature=100.),
                                     dict(top_k=2), dict(top_p=.9), dict(top_k=2, top_p=.9)], ids=str)
def test_huge_logits(logits, options):
    assert drawn(logits, 20, **options).tolist() == [20, 0, 0]


@pytest.mark.parametrize('scale', [1e-30, 1e-45, 0])
def test_tiny_logits_are_equally_likely(scale):
    assert_follows(drawn(scale * torch.tensor([1., -2, 3])), [1 / 3] * 3)


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('options', [{}, dict(temperature=0), dict(top_k=1), dict(top_p=.5)], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16])
def test_logits_that_are_not_finite(value, options, dtype):
    """In any row, and also where it would not be the likeliest."""
    logits = torch.zeros(3, 4).to(dtype)
    draw(logits, **options)
    logits[1, 2] = value
    with pytest.raises(FloatingPointError, match='^the logits of the next token are not finite$'):
        draw(logits, **options)


def test_logits_stay_as_they_were():
    logits = torch.tensor([[1., 3, 2, -6]])
    before = logits.clone()
    draw(logits, .5, top_k=2, top_p=.5)
    assert torch.equal(logits, before)


# ----------------------------------------------------------------------------------------------------------------------
# what cannot be

@pytest.mark.parametrize('options', [dict(temperature=-1e-300), dict(temperature=-1.), dict(temperature=math.nan),
                                     dict(temperature=math.inf), dict(top_k=0), dict(top_k=-3), dict(top_p=0.),
                                     dict(top_p=-.5), dict(top_p=1.0001), dict(top_p=math.nan), dict(top_p=math.inf)],
                         ids=str)
def test_check_draw_refuses(options):
    (name, value), = options.items()
    with pytest.raises(ValueError) as e:
        check_draw(**{**dict(temperature=1., top_k=None, top_p=None), **options})
    message = str(e.value)
    assert message.startswith(f'{name}={value}: must be ') and '\n' not in message
    nearest = float(message.partition('(nearest: ')[2].rstrip(')'))
    check_draw(**{**dict(temperature=1., top_k=None, top_p=None), name: nearest})       # which it would take
    assert name != 'top_p' or nearest == (1 if value > 1 else .01)


@pytest.mark.parametrize('temperature', [0, 1e-300, 1., 1e300])
@pytest.mark.parametrize('top_k', [None, 1, 10 ** 9])
@pytest.mark.parametrize('top_p', [None, 1, 1., 1e-300])
def test_what_check_draw_takes_can_be_drawn(temperature, top_k, top_p):
    check_draw(temperature, top_k, top_p)
    assert 0 <= draw(torch.tensor([[0., 1, -1]]), temperature, top_k, top_p).item() < 3

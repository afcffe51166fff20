"""experiments/continual_learning.py: arms start from the same function and are what they are called; matched losses and
ROC curves have known answers; the record is made once and becomes tables and a figure."""

import pytest
import torch

import special_layers
from helpers import TEXT, rows
from lowrank.adaptive_svd import FIRST_PRINCIPAL
from lowrank.adaptive_layer import AdaptiveSVDLinear
from model import GPT, GPTConfig
from runtime.config import UserError
from runtime.dataset import Dataset, write_dataset
from test_experiments import experiment

continual = experiment('continual_learning')
SHAPE = dict(n_layer=1, n_head=2, n_embd=24, block_size=16, bias=False)


@pytest.fixture
def tiny(monkeypatch, here, one_thread):
    """A model of one layer, and evaluations and analyses every two steps."""
    for name, value in dict(MODEL=SHAPE, BATCH=4, WARMUP=2, INTERVAL=2, EVAL_WINDOWS=4, GRADIENTS=3, LORA_RANK=4,
                            TEXT_B=5000, SPACES=(FIRST_PRINCIPAL, 12), RECORD=here / 'record.jsonl',
                            FIGURE=here / 'figure.png',
                            RATES={'everything': (1e-3,), 'attention': (3e-3,)}).items():
        monkeypatch.setattr(continual, name, value)


@pytest.fixture
def texts(tiny):
    return continual.Texts(Dataset('data/toy'), 'def f(x):\n    return x\n' * 100)


@pytest.fixture
def saved(texts):
    """A model whose weights all count."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE, vocab_size=len(texts.chars)))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return dict(model=model.state_dict(), model_args=vars(model.config), iter_num=0)


# ----------------------------------------------------------------------------------------------------------------------
# known answers

def test_a_matched_loss_is_on_the_line_between_evaluations():
    curve = [[0, 2.0, 4.0], [20, 3.0, 3.0], [40, 3.5, 2.0], [60, 3.1, 2.5], [80, 3.2, 1.5]]
    assert continual.matched(curve, 3.0) == 3.0 and continual.matched(curve, 2.5) == 3.25
    assert continual.matched(curve, 2.0) == 3.5                     # the first time, not the last
    assert continual.matched(curve, 1.75) == pytest.approx(3.175)
    assert continual.matched(curve, 1.4) is None and continual.matched(curve, 4.5) is None


@pytest.mark.parametrize('positive, negative, area', [([3., 4.], [1., 2.], 1.0), ([1., 2.], [3., 4.], 0.0),
                                                      ([1., 1.], [1., 1.], 0.5), ([1., 2., 3.], [1., 2., 3.], 0.5),
                                                      ([2., 2.], [1., 2.], 0.75)])
def test_auc_and_roc_have_known_answers(positive, negative, area):
    positive, negative = torch.tensor(positive), torch.tensor(negative)
    assert continual.auc(positive, negative) == area
    curve = continual.roc(positive, negative)
    assert len(curve) == continual.GRID + 1 and curve[-1] == 1 and curve == sorted(curve)
    if area in (0.0, 1.0):
        assert curve[0] == area
    if len(set(positive.tolist() + negative.tolist())) == 1:        # one threshold: the diagonal
        assert curve == pytest.approx([i / continual.GRID for i in range(continual.GRID + 1)], abs=1e-4)


def test_auc_is_the_area_under_the_roc_curve():
    torch.manual_seed(0)
    positive, negative = torch.randn(300) + 1, torch.randn(200)
    curve = continual.roc(positive, negative)
    area = sum(a + b for a, b in zip(curve, curve[1:])) / 2 / continual.GRID
    assert continual.auc(positive, negative) == pytest.approx(area, abs=0.01)
    pairs = (positive[:, None] > negative).double().mean().item()
    assert continual.auc(positive, negative) == pytest.approx(pairs)


def test_within_one_space_lift_and_excess_rank_as_the_alignment(monkeypatch):
    """So that one AUC is enough there."""
    monkeypatch.setattr(continual, 'SPACES', (3,))
    torch.manual_seed(0)
    found = {text: (torch.rand(1, 2, 20, dtype=torch.float64), torch.ones(2, 20)) for text in 'AB'}
    row = continual.detection(found, 12)
    assert row['auc_all_lift'] == row['auc_all_excess'] == row['auc_all_principal'] == row['spaces']['3']['auc_pooled']
    assert row['auc_norm_pooled'] == 0.5


def test_levels_are_what_every_arm_reaches():
    def row(arm, rate, seed, end):
        return dict(kind='curve', arm=arm, rate=rate, seed=seed, trained=5, curve=[[0, 2.0, 4.0], [20, 3.0, end]])
    slow, _, fast = continual.RATES['everything']
    made = [row('full training', slow, 0, 3.0), row('full training', slow, 1, 3.02), row('timer', slow, 0, 3.3),
            row('timer', slow, 1, 3.5), row('timer', fast, 0, 3.2), row('timer', fast, 1, 3.22)]
    assert continual.levels(made, 'everything') == pytest.approx([3.65, 3.45, 3.25])
    assert continual.levels(made, 'attention') == []
    assert continual.best_rate(made, 'timer', 3.25) == fast and continual.best_rate(made, 'LoRA', 3.0) is None
    lines = continual.table(made, 'everything').splitlines()
    first = next(line.split(' | ') for line in lines if line.startswith(f'| timer | {slow:g}'))
    assert first[5] == ''                                           # one of two seeds does not reach it
    less = [0.35 / 0.7 - 0.35 / 1.0, 0.35 / 0.5 - 0.35 / 0.98]      # at 3.65, by seeds
    assert first[3].endswith(f'({sum(less) / 2:+.3f} +- {abs(less[0] - less[1]) / 2:.3f})')


# ----------------------------------------------------------------------------------------------------------------------
# arms

@pytest.mark.parametrize('name', continual.ARMS)
def test_an_arm_starts_where_a_ended_and_trains_what_it_says(name, texts, saved):
    arm, x = continual.ARMS[name], texts.fixed('B')[0]
    model, control = continual.prepare(saved, arm, 0, lambda name, count: 14)
    torch.testing.assert_close(model(x)[0], GPT.from_checkpoint(saved)(x)[0], atol=2e-5, rtol=1e-4)
    if control:
        for layer in control.layers.values():
            layer.switch_to_lowrank(14)
        torch.testing.assert_close(model(x)[0], GPT.from_checkpoint(saved)(x)[0], atol=2e-5, rtol=1e-4)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all('.attn.' in name for name in trained) == (arm.setting == 'attention')
    if arm.lora:
        assert sum(model.get_parameter(name).numel() for name in trained) == 4 * 4 * 2 * 24


@pytest.mark.parametrize('name', ['half from the start', 'attention, half, random space'])
def test_what_is_protected_stays(name, texts, saved):
    """In the space of the first switch, before the next analysis chooses another; the rest moves."""
    arm = continual.ARMS[name]
    model, control = continual.prepare(saved, arm, 0, None)
    before = {name: layer.weight.detach().clone() for name, layer in control.layers.items()}
    curve, ranks = continual.go_on(model, control, True, texts, 0, 1e-2, 1)
    assert len(curve) == 2 and set(map(tuple, ranks.values())) == {(12,)}
    for name, layer in control.layers.items():
        change, U = layer.weight.detach() - before[name], layer.protected
        assert (U.mT @ U - torch.eye(12)).abs().max() < 1e-5
        assert (U.mT @ change).norm() < 1e-4 * change.norm() and change.norm() > 1e-3
        kept = U.mT @ torch.linalg.svd(before[name])[0][:, :12]
        assert (torch.linalg.svdvals(kept).min() > 0.999) != arm.random


def test_random_directions_stay_the_same_ones(texts, saved):
    model, control = continual.prepare(saved, continual.ARMS['timer, random space'], 0, None)
    layer = next(iter(control.layers.values()))
    assert isinstance(layer, continual.RandomlyProtected)
    layer.switch_to_lowrank(14)
    first = layer.protected.clone()
    layer.switch_to_lowrank(10)
    assert first.shape == (24, 10) and torch.equal(first, layer.protected[:, :10])


def test_a_replay_switches_where_the_detector_did(texts, saved):
    plan = {'block0.attn.c_q': [0, 14, 12, 0], 'block0.attn.c_k': [14, 14, 14, 14]}
    model, control = continual.prepare(saved, continual.ARMS['adaptive, random space'], 0,
                                       lambda name, count: plan.get(name, [0] * 4)[count])
    curve, ranks = continual.go_on(model, control, False, texts, 0, 1e-3, 8)
    assert ranks == {name: plan.get(name, [0] * 4) for name in control.layers} and len(ranks) == 4
    assert [step for step, _, _ in curve] == [0, 2, 4, 6, 8] and all(a > 0 and b > 0 for _, a, b in curve)
    table = continual.switch_table([dict(kind='curve', arm='adaptive', rate=1e-3, ranks=ranks)])
    assert '| adaptive | 0.001 | 2.0 | 4 | 1.0 | 1.0 | 38% |' in table


def test_the_detector_may_switch_at_its_first_analysis(texts, saved, monkeypatch):
    monkeypatch.setattr(continual, 'INTERVAL', 10)                  # after its warm-up
    monkeypatch.setattr('lowrank.adaptive_svd.DANGER_ALIGNMENT', 0.0)
    monkeypatch.setattr('lowrank.adaptive_svd.DANGER_EXCESS', -1.0)
    model, control = continual.prepare(saved, continual.ARMS['adaptive'], 0, None)
    _, ranks = continual.go_on(model, control, False, texts, 0, 1e-3, 10)
    assert [*ranks.values()] == [[14]] * 4


def test_arms_of_a_seed_have_the_same_batches(texts, saved):
    """A timer that never comes is full training, up to rounding; another seed is another run."""
    ends = []
    for name, seed in (('full training', 0), ('adaptive, random space', 0), ('full training', 1)):
        model, control = continual.prepare(saved, continual.ARMS[name], seed, lambda name, count: 0)
        ends.append(torch.tensor(continual.go_on(model, control, False, texts, seed, 1e-3, 5)[0]))
    torch.testing.assert_close(ends[0], ends[1], atol=1e-4, rtol=1e-4)
    assert (ends[0] - ends[2]).abs().max() > 1e-3


# ----------------------------------------------------------------------------------------------------------------------
# texts and the command

def test_texts_share_a_vocabulary(texts):
    own, other = Dataset('data/toy'), 'def f(x):\n    return x\n' * 100
    assert set(texts.chars) == set(TEXT) | set(other)
    written = ''.join(texts.chars[i] for part in texts.splits['A'] for i in part.tolist())
    assert written == TEXT and len(own.tokens('train')) == len(texts.splits['A'][0])
    assert ''.join(texts.chars[i] for part in texts.splits['B'] for i in part.tolist()) == other
    x, y = texts.fixed('A')
    assert x.shape == (4, 16) and torch.equal(x[:, 1:], y[:, :-1])
    assert continual.Texts(own, other).stamp == texts.stamp != continual.Texts(own, other[1:]).stamp


def test_python_source_is_ascii_and_of_that_size():
    text = continual.python_source(30000)
    assert len(text) == 30000 and text.isascii() and 'import' in text and text == continual.python_source(40000)[:30000]


def test_too_short_a_text_is_refused(texts):
    with pytest.raises(UserError, match='dataset'):
        continual.Texts(Dataset('data/toy'), 'x' * 20)


def test_the_record_is_made_once_and_becomes_tables_and_a_figure(call, tiny, here):
    options = ['--dataset=toy', '--learn_steps=4', '--steps=6', '--out_dir=runs']
    names = ['full training', 'adaptive', 'adaptive, no protection', 'half from the start', 'all of attention',
             'MiLoRA']
    for seeds, arms in (('0', 'none'), ('1', 'adaptive, no protection'), ('0,1', ';'.join(names))):
        found = call(continual.main, *options, f'--seeds={seeds}', f'--arms={arms}')
        assert found.code == 0, found.err
    made = rows('.', 'record.jsonl')
    assert len(made) == 2 + 2 * len(names) and len(list((here / 'runs').glob('*.pt'))) == 2
    keys = [tuple(row.get(k) for k in ('kind', 'arm', 'rate', 'seed')) for row in made]
    assert len(set(keys)) == len(keys) and all(row['python'].startswith('3.') for row in made)
    same = [row for row in made if 'same_as' in row]                # ten steps of warm-up: no switch in six
    assert {row['arm'] for row in same} == {'adaptive, no protection'} and len(same) == 2
    starts = {(row['seed'], *(round(x, 3) for x in row['curve'][0])) for row in made if 'curve' in row}
    assert len(starts) == 2                                         # one for each seed: all arms begin there
    assert all(f'| {name} |' in found.out for name in names) and 'AUC' in found.out
    assert (here / 'figure.png').read_bytes().startswith(b'\x89PNG')
    assert call(continual.main, '--run=False').out.startswith('everything is trained')
    other = call(continual.main, *options[:2], '--steps=8', '--out_dir=runs')
    assert other.code == 2 and 'steps=6' in other.err and len(other.err.splitlines()) == 1


@pytest.mark.parametrize('option', ['--run=False', '--seeds=x', '--seeds=', '--arms=all of it', '--steps=0',
                                    '--learn_steps=0', '--dataset=nowhere'])
def test_wrong_input_is_one_line(option, refused, tiny):
    assert option.removeprefix('--').partition('=')[0] in refused(continual.main, option)


def test_a_data_set_of_other_tokens_is_refused(refused, tiny, here, byte_bpe):
    write_dataset(here / 'data' / 'bpe', TEXT, 'gpt2', source='tests')
    assert 'dataset' in refused(continual.main, '--dataset=bpe')


def test_layers_are_adaptive_ones(texts, saved):
    model, control = continual.prepare(saved, continual.ARMS['timer'], 0, None)
    assert len(control.layers) == 4 == len(special_layers.adaptive_layers(model))
    assert all(isinstance(layer, AdaptiveSVDLinear) for layer in control.layers.values())

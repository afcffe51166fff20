"""experiments/, on tiny models: controls compute what their names say, and records are made once
and become tables and figures. Wrong input ends in a one-line error."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sample
from helpers import ROOT, TEXT, rows
from runtime.data import write_dataset
from runtime.tracking import read_json_lines
from experiments.result_cache import Record

SHAPE = dict(n_layer=1, n_head=2, n_embd=24, block_size=16, bias=False)


def experiment(name, **constants):
    """Return a fresh copy of experiments/NAME.py with these constants replaced."""
    spec = importlib.util.spec_from_file_location(name, ROOT / 'experiments' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module).update(RECORD=Path('record.jsonl'), FIGURE=Path('figure.png'), **constants)
    return module


def tiny_continual():
    """Return continual_learning.py with evaluations and analyses every two steps and one learning
    rate per kind of training."""
    return experiment('continual_learning', MODEL=SHAPE, BATCH=4, WARMUP=2, INTERVAL=2,
                      EVAL_WINDOWS=4, GRADIENTS=3, LORA_RANK=4, TEXT_B=5000, SPACES=(10, 12),
                      RATES={'everything': (1e-3, ), 'attention': (3e-3, )})


@pytest.mark.parametrize(
    'name, options',
    [('absorb_or_expand', ['latents=0', 'queries=1,x', 'cached=0', 'rounds=1', 'n_embd=5']),
     ('compression_table',
      ['run=False', 'models=large', 'keeps=0.65', 'seeds=0', 'dataset=nowhere']),
     ('equal_budget', ['run=False', 'arms=gqa', 'budgets=time', 'seeds=', 'seeds=x', 'seeds=-1',
                       'rates=fast', 'rates=nan', 'rates=1e-3', 'jobs=0', 'dataset=nowhere']),
     ('continual_learning', [
         'run=False', 'seeds=x', 'seeds=', 'arms=all of it', 'steps=0', 'learn_steps=0',
         'dataset=nowhere', 'dataset=bpe'])])
def test_wrong_input_is_one_line(name, options, refused, here, byte_bpe):
    write_dataset('data/bpe', TEXT, 'gpt2', source='tests')
    for option in options:
        dataset = [] if option.startswith('dataset') or name == 'absorb_or_expand' else [
            '--dataset=toy']
        assert option.partition('=')[0] in refused(experiment(name).main, *dataset, f'--{option}')


# --------------------------------------------------------------------------------------------------
# absorb_or_expand.py, records


def test_a_result_is_made_once_and_never_beside_those_of_other_settings(here):
    """A result is computed once and then read from the record, also if a crash left the line before
    it incomplete. A record made with other settings raises a ValueError."""
    Path('record.jsonl').write_text('{"seed": 1, "lo')
    for _ in range(2):
        record = Record(Path('record.jsonl'), lambda row, key: 'made', steps=3)
        made = record.make(lambda: {'loss': 2.}, seed=1)
    assert [made] == read_json_lines('record.jsonl')
    assert made.items() >= {'loss': 2., 'steps': 3, 'seed': 1}.items()
    with pytest.raises(ValueError, match='steps=3'):
        Record(Path('record.jsonl'), None, steps=4)


@pytest.mark.any_device
def test_absorbed_and_expanded_are_equal_and_timed(call, device):
    """The absorbed and the expanded form of latent attention give the same result, and both are
    timed."""
    absorb, generator = experiment('absorb_or_expand'), torch.Generator().manual_seed(0)
    q, w_k, w_v, c = (torch.randn(*shape, generator=generator).to(device) / 2
                      for shape in ((2, 3, 4, 8), (3, 8, 5), (3, 8, 5), (2, 7, 5)))
    torch.testing.assert_close(absorb.absorbed(q, w_k, w_v, c), absorb.expanded(q, w_k, w_v, c))
    out = call(absorb.main, '--n_embd=16', '--n_head=2', '--latents=4,8', '--queries=1,3',
               '--cached=8', '--rounds=2', f'--device={device}').out
    results = json.loads(out.splitlines()[-1])['results']
    assert [(row['latent'], row['queries']) for row in results] == [(4, 1), (4, 3), (8, 1), (8, 3)]
    assert all(row['absorbed'] > 0 and row['expanded'] > 0 and row['ratio'] > 0 for row in results)


# --------------------------------------------------------------------------------------------------
# compression_table.py

TABLE = [dict(model='small', method='dense', seed=1337, loss=2.0, block_params=1000)]
TABLE += [dict(model='small', method=method, keep=keep, seed=seed, loss=2.0 + added + seed / 1000,
               block_params=400, compress_seconds=seconds)
          for keep in (.8, .6, .4) for seed in (0, 1)
          for method, added, seconds in (
              ('SVD-LLM', .03, 1), ('MoDeGPT', .02, 2), ('MoDeGPT, SVD of q k', .01, 4),
              ('Basis Sharing', .04, 1), ('default', .004 - seed / 1000, 6))]


def test_a_recorded_table_compares_the_default_with_the_best_published_method(here, call):
    """Losses are relative to the original model. Differences are paired by calibration seed."""
    Path('record.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in TABLE))
    out = call(experiment('compression_table').main, '--run=False').out
    assert 'MoDeGPT, SVD of q k 0.0105 +- 0.0007' in ' '.join(out.split())
    assert Path('figure.png').exists()
    assert ('keep 0.4: 0.0065 (standard error 0.0005) less than MoDeGPT, SVD of q k, in 1.50 '
            'times its seconds') in out


@pytest.mark.slow
def test_a_method_that_is_recorded_is_not_run_again(here, call):
    """Each method adds one row per seed and fraction. A second call adds none."""
    write_dataset('data/tiny', TEXT, 'char', source='tests')
    table = experiment('compression_table', MODELS={'small': [
        str(ROOT / 'config/train_shakespeare_char.py'), '--n_layer=2', '--n_head=2', '--n_embd=16',
        '--block_size=16', '--max_iters=2', '--eval_iters=1', '--always_save_checkpoint=True']})
    for _ in range(2):
        call(table.main, '--dataset=tiny', '--models=small', '--keeps=0.6', '--seeds=2')
        found = read_json_lines('record.jsonl')
        assert len(found) == 2 * len({**table.METHODS, **table.ATTENTION})      # plain once, dense
    assert {row['method'] for row in found} == {'dense', *table.METHODS, *table.ATTENTION}


# --------------------------------------------------------------------------------------------------
# continual_learning.py


@pytest.mark.parametrize('positive, negative, area', [
    ([3., 4.], [1., 2.], 1), ([1., 2.], [3., 4.], 0), ([1., 1.], [1., 1.], .5),
    ([1., 2., 3.], [1., 2., 3.], .5), ([2., 2.], [1., 2.], .75)], ids=str)
def test_auc_and_roc_have_known_answers(positive, negative, area):
    """The area under the ROC curve and the curve match values computed by hand."""
    continual, scores = experiment('continual_learning'), (torch.tensor(positive),
                                                           torch.tensor(negative))
    curve = continual.roc(*scores)
    assert continual.auc(*scores) == area
    assert len(curve) == 51 and curve[-1] == 1 and curve == sorted(curve)
    assert sum(a + b for a, b in zip(curve, curve[1:])) / 100 == pytest.approx(area, abs=.02)


@pytest.mark.slow
def test_the_record_of_arms_is_made_once_and_becomes_tables_and_a_figure(call, here, one_thread):
    """Several calls train each variant once per seed, and the record becomes tables and a figure.
    Variants that are the same run share one record, and all start at the same losses."""
    continual, options = tiny_continual(), [
        '--dataset=toy', '--learn_steps=4', '--steps=6', '--out_dir=runs']
    names = ['full training', 'adaptive', 'adaptive, no protection', 'half from the start',
             'all of attention',
             'MiLoRA']
    for seeds, arms in (('0', 'none'), ('1', 'adaptive, no protection'), ('0,1', ';'.join(names))):
        found = call(continual.main, *options, f'--seeds={seeds}', f'--arms={arms}')
    made = rows('.', 'record.jsonl')
    keys = {tuple(row.get(k) for k in ('kind', 'arm', 'rate', 'seed')) for row in made}
    assert len(keys) == len(made) == 2 + 2 * len(names) and len(list(
        Path('runs').glob('*.pt'))) == 2
    # without a switch in six steps, adaptive training with and without protection is the same run
    assert [row['arm'] for row in made if 'same_as' in row] == ['adaptive, no protection'] * 2
    assert len({(row['seed'], *(round(x, 3) for x in row['curve'][0]))
                for row in made if 'curve' in row}) == 2
    assert all(f'| {name} |' in found.out
               for name in names) and 'AUC' in found.out and Path('figure.png').exists()
    assert call(continual.main, '--run=False').out.startswith('everything is trained')


# --------------------------------------------------------------------------------------------------
# equal_budget.py

def tiny_budget(**constants):
    """Return equal_budget.py with a tiny model, two arms and two conversions."""
    Path('tiny.py').write_text("n_layer = 1\nn_head = 2\nn_embd = 16\nblock_size = 16\n"
                               "batch_size = 2\ngradient_accumulation_steps = 1\n"
                               "optimizer = 'muon'\n")
    module = experiment('equal_budget', RECIPE='tiny.py', STEPS=6, **constants)
    arms = {'dense-4x128': module.Arm('dense', {}, False),
            'gqa-1': module.Arm('gqa', dict(n_kv_head=1), False),
            'to-gqa-1': module.Arm('to-gqa', dict(to='gqa', n_kv_head=1, finetune_iters=2), True),
            module.TUNED_BASE: module.Arm('dense', dict(keep=1.0, finetune_iters=2), True)}
    module.ARMS = arms
    return module


def test_flops_of_a_step_are_those_of_its_products(here):
    """The FLOPs of a training step with AdamW are 6 per weight and token, and 14 T C per token and
    layer for attention, whose backward pass computes the scores again. An eigendecomposition of
    n x n counts 9 n^3."""
    budget = tiny_budget()
    cfg = replace(budget.configuration.load(budget.TrainConfig, ['tiny.py'])[0],
                  optimizer='adamw', vocab_size=10)
    B, T, C, L = cfg.batch_size, cfg.block_size, cfg.n_embd, cfg.n_layer
    weights = 12 * L * C * C + 10 * C
    assert budget.step_flops(cfg) == B * T * (6 * weights + 14 * T * C * L)
    x = torch.randn(3, 5, 5)
    assert budget.count_flops(lambda: torch.linalg.eigh(x @ x.mT)) == 3 * (2 * 125 + 9 * 125)
    assert budget.count_flops(lambda: x.baddbmm_(x[:, :, :2], x[:, :2])) == 3 * 2 * 5 * 2 * 5


def test_equal_compute_means_steps_in_inverse_proportion_to_flops():
    """A model with half of the FLOPs per step gets twice the steps. A difference of at most 2% is
    ignored, and with equal steps the FLOPs do not matter."""
    budget = experiment('equal_budget')
    assert [budget.steps_for('compute', ratio) for ratio in (0.5, 0.99, 1, 1.25)] == [
        2400, 1200, 1200, 960]
    assert [budget.steps_for('half', ratio) for ratio in (0.495, 0.6, 1.01)] == [
        1200, 1000, 600]
    assert budget.steps_for('steps', 0.5) == 1200


def budget_results(budget, losses, caches, **more):
    """Return budget -> arm -> Result. losses: arm -> one loss per seed; caches: arm -> bytes."""
    return budget.collect([
        dict(arm=arm, steps=1200, learning_rate=budget.RATE, seed=seed, loss=loss, flops=1e12,
             parameter_bytes=10, cache_bytes=caches[arm]) | more.get(arm, {})
        for arm, found in losses.items() for seed, loss in enumerate(found)])


def test_the_best_family_is_the_one_with_the_lowest_mean_within_the_budget():
    """Arms over the budget do not compete, each family competes with its best arm, and differences
    are paired by seed."""
    budget = experiment('equal_budget')
    results = budget_results(budget, {
        'dense-4x128': (1.0, 2.0, 3.0), 'gqa-1': (1.3, 2.3, 3.3),
        'gqa-1-of-8': (1.1, 2.1, 3.1), 'mla-64': (1.2, 2.2, 3.5), 'mla-32': (1.4, 2.3, 3.6)}, {
        'dense-4x128': 4096, 'gqa-1': 1024, 'gqa-1-of-8': 2048, 'mla-64': 1024, 'mla-32': 512})
    for limit, best in ((('cache_bytes', 0.25, 'steps'), ['gqa-1', 'mla-64']),
                        (('flops', 1, 'compute'), ['dense-4x128', 'gqa-1-of-8', 'mla-32'])):
        assert [one.arm for one in budget.best_by_family(results, *limit)] == best
    # gqa-1 loses to mla-64 by 0.1, 0.1, -0.2: standard error 0.1, quantile 4.303
    assert '| gqa-1 (+0.3000) | mla-64 (+0.3000) | +0.0000 (-0.4303 to +0.4303) |' in ' '.join(
        budget.contest_table(results).split())


def test_a_conversion_is_compared_with_a_dense_model_that_had_the_same_steps():
    """A conversion is paired with the loss of the model that it was made from, which can differ
    from the recorded loss of the same seed on another machine. After fine-tuning the gain of the
    dense model from the same fine-tuning is taken off."""
    budget = experiment('equal_budget')
    names = 'dense-4x128', 'to-gqa-2', 'to-gqa-2-tuned', 'dense-4x128-tuned'
    results = budget_results(
        budget, dict(zip(names, ((1.0, 2.0), (1.6, 2.6), (1.3, 2.4), (1.2, 1.9)))),
        dict.fromkeys(names, 1), **dict(zip(names[1:], (
            dict(source_loss=1.5), dict(source_loss=1.4), dict(source_loss=1.4)))))
    for name, excess in (('to-gqa-2', (0.1, 1.1)), ('to-gqa-2-tuned', (0.1, 0.5))):
        assert results['steps'][name].excess == pytest.approx(dict(enumerate(excess)))


def test_results_without_the_dense_model_are_not_compared(call, here):
    budget = tiny_budget()
    row = dict(arm='gqa-1', definition=budget.digest('gqa-1'), text='any', seed=1, steps=6,
               learning_rate=budget.RATE, loss=2.0, flops=1, parameter_bytes=1, cache_bytes=1)
    Path('record.jsonl').write_text(json.dumps(row) + '\n')
    assert 'no comparison: dense-4x128' in call(budget.main, '--run=False').out


@pytest.mark.slow
def test_arms_are_trained_once_per_seed_and_converted(call, here):
    """Each arm has one row per seed. A conversion starts from the dense model of its seed, which is
    trained again if its checkpoint is missing. The tables come from the record."""
    budget, options = tiny_budget(), ['--dataset=toy', '--out_dir=runs', '--budgets=steps']
    call(budget.main, *options, '--seeds=1,2', '--arms=dense-4x128,gqa-1')
    shutil.rmtree('runs')
    budget.TEXT = rows('.', 'record.jsonl')[0]['text']
    out = call(budget.main, *options, '--seeds=1').out
    made = rows('.', 'record.jsonl')
    assert sorted((row['arm'], row['seed']) for row in made) == [
        ('dense-4x128', 1), ('dense-4x128', 2), ('dense-4x128-tuned', 1), ('gqa-1', 1),
        ('gqa-1', 2), ('to-gqa-1', 1)]
    costs = {row['arm']: row for row in made if row['seed'] == 1}
    assert costs['to-gqa-1']['cache_bytes'] == costs['gqa-1']['cache_bytes'] == 64
    assert costs['to-gqa-1']['flops'] > costs['dense-4x128']['flops'] > costs['gqa-1']['flops']
    assert all(f'| {arm} ' in out for arm in costs) and Path('figure.png').exists()
    folders = [str(path) for path in Path('runs').glob('*/[!.]*/')]
    assert len(folders) == 3
    assert costs['to-gqa-1']['source_loss'] == pytest.approx(costs['dense-4x128']['loss'], abs=1e-5)
    budget.ARMS['gqa-1'] = budget.Arm('gqa', dict(n_kv_head=1, n_embd=32), False)
    out = call(budget.main, '--run=False').out
    assert '2 rows of arms with another definition' in out and '| gqa-1 ' not in out
    assert call(sample.main, f'--out_dir={folders[0]}', '--num_samples=1',
                                      '--max_new_tokens=2').code == 0

"""experiments/, on tiny models: controls compute what their names say, and records are made once
and become tables and figures. Wrong input ends in a one-line error."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from helpers import ROOT, TEXT, rows, whole_truth
from model import GPT, GPTConfig
from runtime.data import write_dataset
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
      ['run=False', 'models=large', 'parts=all', 'keeps=0.65', 'seeds=0', 'dataset=nowhere']),
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
    """A result is computed once and then read from the record. A record made with other settings
    raises a ValueError."""
    for _ in range(2):
        record = Record(Path('record.jsonl'), lambda row, key: 'made', steps=3)
        made = record.make(lambda: {'loss': 2.}, seed=1)
    assert [made] == rows(
        '.', 'record.jsonl') and made.items() >= {'loss': 2., 'steps': 3, 'seed': 1}.items()
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

def test_fwsvd_weighs_rows_by_fisher_information_and_asvd_columns_by_the_root_of_their_inputs():
    """The controls FWSVD and ASVD match their definitions. The references are autograd's gradient
    of each window's loss, the recorded inputs of the layer, and the SVD of the scaled weight, over
    two batches of three windows."""
    torch.manual_seed(0)
    dense = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=17,
                          bias=False)).eval()
    for p in dense.requires_grad_(False).parameters():
        torch.nn.init.normal_(p, std=0.3)                           # so that all weights matter
    windows = [tuple(torch.randint(17, (2, 3, 8))) for _ in range(2)]
    compression, layer, inputs = experiment(
        'compression_table'), dense.transformer.h[1].mlp.c_fc, []
    found = {name: compression.measure(dense, compression.METHODS[name], windows)[2]['h.1.mlp.c_fc']
             for name in ('FWSVD', 'ASVD')}
    layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().flatten(0, 1)))
    weight = layer.weight.requires_grad_(True)  # (64, 16)
    losses = [8 * dense(x[None], y[None])[1] for xs, ys in windows for x, y in zip(xs, ys)]
    information = sum(torch.autograd.grad(loss, weight)[0].square().sum(1) for loss in losses)
    rows, columns = information.double().sqrt()[:, None], torch.cat(inputs).double().abs().mean(
        0).sqrt()
    for name, scale in (('FWSVD', rows), ('ASVD', columns)):
        up, down = found[name].factors(5)
        expected = whole_truth(weight.detach().double() * scale, 5) / scale
        torch.testing.assert_close(up @ down, expected, atol=1e-4, rtol=1e-4)


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

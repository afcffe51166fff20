"""Adaptive SVD in train.py: what is printed and logged, refused words, the same bits where nothing switches and after a
resume, several processes, torch.compile."""

import os
import re
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import special_layers
import train
from helpers import ROOT, TINY, checkpoint, equal, interrupt, rows, same, untimed
from lowrank import adaptive_control, adaptive_svd
from lowrank.adaptive_layer import left_basis
from model import GPT

pytestmark = pytest.mark.usefixtures('one_thread', 'here')
RUN = [*TINY, '--n_embd=32', '--adaptive_svd=True', '--eval_interval=100', '--eval_iters=1']
KEYS = ('mode r principal_alignment minor_alignment subspace_angle reconstruction_error chance excess action '
        'reason').split()
# low-rank mode, a smaller r, full and low-rank again in few steps: analyses in every second one
PLAN = ['--adaptive_svd_interval=2', '--max_iters=22', '--lr_decay_iters=22', '--adaptive_svd_targets=c_q,c_proj',
        '--learning_rate=3e-3']
MODES = [(2, 32, 'initial'), (4, 22, 'lowrank'), (6, 22, 'refactored'), (8, 22, 'refactored'), (10, 17, 'refactored'),
         (12, 17, 'refactored'), (14, 32, 'full'), (16, 17, 'lowrank'), (18, 17, 'refactored'), (20, 17, 'refactored'),
         (22, 13, 'refactored')]


def planned(patch):
    """Decisions by plan: danger at steps 4 and 16, a smaller r wanted always. All else is real."""
    real = adaptive_control.should_use_lowrank_training

    def decide(*args, **options):
        r, step = args[9:11]
        _, _, seen = real(*args, **options)
        danger = step in (4, 16)
        return (True if danger else None, max(8, int(.8 * r)), seen | {
            'reason': 'gradient_clobbering_risk' if danger else 'continue_current_mode', 'lift': 1.0})
    patch.setattr(adaptive_control, 'should_use_lowrank_training', decide)


def never(patch):
    """No danger, and nothing optimal."""
    patch.setattr(adaptive_svd, 'DANGER_ALIGNMENT', 2)
    patch.setattr(adaptive_svd, 'CALM_MINOR', 2)


def pulled(patch, name='h.0.attn.c_attn.c_q', strength=100):
    """A loss that pulls a layer along the principal components that it had at first."""
    forward, bases = GPT.forward, {}

    def with_pull(self, idx, targets=None, cache=None):
        logits, loss = forward(self, idx, targets, cache)
        if loss is not None and self.training and torch.is_grad_enabled():
            layer = self.get_layer(name)
            U = bases.setdefault(id(self), left_basis(layer.weight)[0][:, :10].float())
            loss = loss + strength * (U.mT @ layer.weight).sum()
        return logits, loss
    patch.setattr(GPT, 'forward', with_pull)


def analyses(folder='out'):
    return [row for row in rows(folder) if any(re.match('svd/.*/mode$', key) for key in row)]


# ----------------------------------------------------------------------------------------------------------------------
# what is said

def test_a_gradient_in_the_principal_space_is_met_by_a_switch(fit, monkeypatch):
    """The lines, the rows of metrics.jsonl, the checkpoint; the real decision."""
    pulled(monkeypatch)
    out = fit(*RUN, '--max_iters=61', '--lr_decay_iters=61', '--learning_rate=1e-5', '--bias=True')
    blocks = re.findall(r'^=== SVD Analysis at step (\d+) ===\n(.*?)^=== SVD Analysis complete ===$', out, re.M | re.S)
    assert [(int(step), *lines.splitlines()) for step, lines in blocks] == [
        (20, '[block0.attn.c_q] Initial SVD computed'),
        (40, '[block0.attn.c_q] SWITCHED TO LOW-RANK (r=22) - Reason: gradient_clobbering_risk'),
        (60, '[block0.attn.c_q] low-rank mode (r=22) - gradient_clobbering_risk')]
    first, second, third = analyses()
    assert [row['iter'] for row in (first, second, third)] == [20, 40, 60]
    prefix = 'svd/block0.attn.c_q/'
    assert all(key.startswith(prefix) for row in (first, second, third) for key in row if key != 'iter')
    for row in (second, third):
        assert {prefix + key for key in KEYS} <= row.keys()
        assert row[prefix + 'mode'] == 'lowrank' and row[prefix + 'r'] == 22
        assert row[prefix + 'principal_alignment'] > .9 and row[prefix + 'chance'] == 10 / 32
        assert 0 <= row[prefix + 'update_alignment'] <= 1
        assert row[prefix + 'principal_alignment'] + row[prefix + 'minor_alignment'] == pytest.approx(1)
    assert first[prefix + 'mode'] == 'full' and first[prefix + 'reason'] == 'initial_svd_computation'
    assert [row['iter'] for row in rows() if 'loss' in row] == list(range(1, 62))
    saved = checkpoint()
    ranks = {'h.0.attn.c_attn.c_q': 22}
    assert saved['model_args']['adaptive_svd_ranks'] == ranks and saved['adaptive_svd'].keys() == {'block0.attn.c_q'}
    prefix = 'transformer.h.0.attn.c_attn.c_q.'
    shapes = {name.removeprefix(prefix): tuple(w.shape) for name, w in saved['model'].items() if prefix in name}
    assert shapes == {'base.weight': (32, 32), 'base.bias': (32,), 'A.weight': (22, 32), 'B.weight': (32, 22),
                      'protected': (32, 10)}
    model = GPT.from_checkpoint(saved)
    assert special_layers.lowrank_modes(model) == ranks and equal(model.state_dict(), saved['model'])


def test_what_was_learned_stays_where_the_pull_wants_it_gone(fit, call, monkeypatch):
    """Within the space that the switch protects, until the next analysis refactors it. The same run with the factors
    free loses it."""
    pulled(monkeypatch)
    lost = {}
    for protection in ('left', 'none'):
        options = [*RUN, '--learning_rate=1e-3', '--decay_lr=False', f'--adaptive_svd_protection={protection}',
                   f'--out_dir={protection}', '--weight_decay=0']
        fit(*options, '--max_iters=40')
        before = GPT.from_checkpoint(checkpoint(protection)).get_layer('h.0.attn.c_attn.c_q')
        resume(call, 59, f'--out_dir={protection}')
        after = GPT.from_checkpoint(checkpoint(protection)).get_layer('h.0.attn.c_attn.c_q')
        assert before.r == after.r == 22
        U = before.protected.double()
        change = U.mT @ (after.weight - before.weight).detach().double()
        lost[protection] = (change.norm() / (U.mT @ before.weight.detach().double()).norm()).item()
    assert lost['left'] < 1e-5 and lost['none'] > .05, lost


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_modes_come_and_go(fit, monkeypatch, optimizer):
    """Every step is taken and logged, none disturbed: the loss goes down across all switches."""
    planned(monkeypatch)
    out = fit(*RUN, *PLAN, f'--optimizer={optimizer}')
    for name in ('block0.attn.c_q', 'block0.attn.c_proj'):
        assert [(row['iter'], row[f'svd/{name}/r'], row[f'svd/{name}/action']) for row in analyses()] == MODES
        assert f'[{name}] SWITCHED TO FULL - Reason: nothing to protect from in 5 analyses' in out
    losses = [row['loss'] for row in rows() if 'loss' in row]
    assert len(losses) == 22 and losses[-1] < losses[0] - .3
    assert max(b - a for a, b in zip(losses, losses[1:])) < .2
    saved = checkpoint()
    assert saved['model_args']['adaptive_svd_ranks'] == {'h.0.attn.c_attn.c_q': 13, 'h.0.attn.c_proj': 13}
    state = saved['optimizer']['adamw'] if optimizer == 'muon' else saved['optimizer']
    assert {float(s['step']) for s in state['state'].values()} == {22}


def test_what_is_frozen_counts_neither_for_clipping_nor_for_the_optimizer(fit, monkeypatch):
    """Also in the steps of analyses, which need its gradient."""
    planned(monkeypatch)
    seen, step, norm = [], train.step, torch.nn.utils.get_total_norm
    monkeypatch.setattr(torch.nn.utils, 'get_total_norm', lambda grads: seen.append(len(grads)) or norm(grads))

    def checked(run, replica):
        result = step(run, replica)
        trainable = [p for p in run.model.parameters() if p.requires_grad]
        groups = [p for group in run.optimizer.param_groups for p in group['params']]
        assert seen[-1] == len(trainable) == len(groups) and {*groups} == {*trainable}
        assert all((layer.base.weight in {*trainable}) == (layer.r is None)
                   for layer in special_layers.adaptive_layers(run.model).values())
        assert all(p.grad is None for p in run.model.parameters())
        return result
    monkeypatch.setattr(train, 'step', checked)
    fit(*RUN, *PLAN)
    assert len(seen) == 22 and {*seen} == {11, 13}                   # both layers have another parameter, or none


@pytest.mark.parametrize('targets, layer, names', [
    ('c_q', 0, ['block0.attn.c_q']), ('c_q', 1, ['block1.attn.c_q']),
    ('c_v', -1, ['block0.attn.c_v', 'block1.attn.c_v']),
    ('c_q,c_k,c_v,c_proj', 0, [f'block0.attn.{word}' for word in ('c_q', 'c_k', 'c_v', 'c_proj')]),
    (' c_proj, c_q ', -1, [f'block{i}.attn.{word}' for i in range(2) for word in ('c_q', 'c_proj')])])
def test_which_layers_are_watched(fit, targets, layer, names):
    fit(*RUN, '--n_layer=2', f'--adaptive_svd_targets={targets}', f'--adaptive_svd_target_layer={layer}',
        '--adaptive_svd_interval=2')
    assert list(checkpoint()['adaptive_svd']) == names
    found = [key.split('/')[1] for key in analyses()[0] if key.endswith('/mode')]
    assert found == names
    assert len(analyses()) == 2                                     # of four steps


def test_latent_attention_has_targets_of_its_own(fit, refused):
    fit(*RUN, '--use_mla=True', '--adaptive_svd_targets=query,c_proj', '--adaptive_svd_interval=2')
    assert list(checkpoint()['adaptive_svd']) == ['block0.attn.query', 'block0.attn.c_proj']
    assert "'c_q' is none of c_proj, query" in refused(train.main, *RUN, '--use_mla=True')


@pytest.mark.parametrize('options, words', [
    (['--adaptive_svd_target_layer=1'], ['adaptive_svd_target_layer=1', 'must be 0 to 0, or -1 for all']),
    (['--adaptive_svd_target_layer=-2'], ['adaptive_svd_target_layer=-2', 'must be 0 to 0']),
    (['--adaptive_svd_target_layer=0.5'], ['adaptive_svd_target_layer=0.5']),
    (['--adaptive_svd_targets=c_fc'], ["'c_fc' is none of c_q, c_k, c_v, c_proj"]),
    (['--adaptive_svd_targets=query'], ["'query' is none of"]), (['--adaptive_svd_targets='], ["'' is none of"]),
    (['--adaptive_svd_targets=c_q,,c_k'], ["'' is none of"]), (['--adaptive_svd_targets=C_Q'], ["'C_Q' is none of"]),
    (['--adaptive_svd_protection=right'], ['adaptive_svd_protection', 'left', 'none']),
    (['--adaptive_svd_interval=0'], ['adaptive_svd_interval=0']),
    (['--adaptive_svd=maybe'], ['adaptive_svd']),
    (['--lora_rank=2'], ['lora_rank=2', 'not together with adaptive_svd']),
    (["--layer_ranks={'h.0.attn.c_attn.c_q': 3}"], ['layer_ranks=', 'product of two']),
    (["--adaptive_svd_ranks={'h.0.mlp.c_fc': 3}"], ['adaptive_svd_ranks=', 'which is fixed']),
    (["--adaptive_svd_ranks={'h.0.attn.c_attn.c_q': 32}"], ['adaptive_svd_ranks=', 'must be 1 to 31'])])
def test_wrong_words_are_one_line(refused, options, words):
    line = refused(train.main, *RUN, *options)
    assert all(word in line for word in words), line
    assert not Path('out').exists()


# ----------------------------------------------------------------------------------------------------------------------
# what does not change

def plain_names(state):
    """A state dict as it would be with no layer wrapped and c_attn in one piece."""
    state = {name.replace('.base.', '.'): w for name, w in state.items()}
    for name in [name for name in state if '.c_attn.c_q.' in name]:
        parts = [state.pop(name.replace('.c_q.', f'.c_{part}.')) for part in 'qkv']
        state[name.replace('.c_q.', '.')] = torch.cat(parts)
    return state


@pytest.mark.parametrize('options', ['', '--optimizer=muon',
                                     '--dropout=.2 --bias=True --gradient_accumulation_steps=3'])
def test_without_a_switch_it_trains_to_the_same_bits(fit, monkeypatch, options):
    """A layer of its own; watched, it is the same, analyses or not."""
    never(monkeypatch)
    options = [*options.split(), '--max_iters=9', '--lr_decay_iters=9']
    fit(*RUN, *options, '--adaptive_svd=False', '--out_dir=plain')
    fit(*RUN, *options, '--adaptive_svd_targets=c_proj', '--adaptive_svd_interval=3', '--n_layer=1')
    assert equal(plain_names(checkpoint()['model']), checkpoint('plain')['model'])
    assert [row for row in untimed('out') if 'loss' in row] == [row for row in untimed('plain') if 'loss' in row]
    assert len(analyses()) == 3 and {row['svd/block0.attn.c_proj/mode'] for row in analyses()} == {'full'}


@pytest.mark.parametrize('options', ['', '--dropout=.2 --bias=True'])
def test_without_a_switch_it_trains_the_same_where_attention_is_split(fit, monkeypatch, options):
    """Queries, keys and values are then three products: sums are rounded in another order. Dropout is the same. Not for
    Muon, to which c_attn is one matrix and its parts are three."""
    never(monkeypatch)
    options = [*options.split(), '--max_iters=9', '--lr_decay_iters=9']
    fit(*RUN, *options, '--adaptive_svd=False', '--out_dir=plain')
    fit(*RUN, *options, '--adaptive_svd_interval=3')
    ours, plain = plain_names(checkpoint()['model']), checkpoint('plain')['model']
    assert ours.keys() == plain.keys()
    for name, w in plain.items():
        torch.testing.assert_close(ours[name], w, rtol=0, atol=1e-4)


def test_off_leaves_no_trace(fit):
    out = fit()
    saved = checkpoint()
    assert 'SVD Analysis' not in out and not analyses()
    assert saved.keys() == {'model', 'optimizer', 'iter_num', 'model_args', 'best_val_loss', 'interim_best_val_loss',
                            'config', 'tokenizer', 'random', 'scaler'}
    assert not [name for name in saved['model'] if 'base' in name or '.A.' in name or 'protected' in name]
    assert 'transformer.h.0.attn.c_attn.weight' in saved['model'] and len(saved['optimizer']['param_groups']) == 2
    assert saved['model_args']['adaptive_svd_ranks'] is None and saved['model_args']['adaptive_svd'] is False


def test_a_checkpoint_from_before_is_one_without(fit, call):
    fit()
    saved = checkpoint()
    for part in ('model_args', 'config'):
        for key in [key for key in saved[part] if key.startswith(('adaptive', 'lora'))]:
            del saved[part][key]
    torch.save(saved, 'out/ckpt.pt')
    assert call(train.main, '--init_from=resume', '--device=cpu', '--max_iters=5').code == 0
    assert checkpoint()['model_args']['adaptive_svd'] is False


# ----------------------------------------------------------------------------------------------------------------------
# resuming

def resume(call, steps, *options):
    result = call(train.main, '--init_from=resume', '--device=cpu', f'--max_iters={steps}', *options)
    assert result.code == 0, result.err


def assert_same_run(folder, other, config=False):
    """As in test_resume.py."""
    a, b = checkpoint(folder), checkpoint(other)
    for key in a.keys() - {'config'}:
        assert same(a[key], b[key]), key
    if config:
        here = ('out_dir', 'init_from', 'max_iters')
        assert {k: v for k, v in a['config'].items() if k not in here} == {
            k: v for k, v in b['config'].items() if k not in here}
    finals = [[row for row in untimed(x) if 'final' not in row and 'val/loss' not in row] for x in (folder, other)]
    assert finals[0] == finals[1]


@pytest.mark.parametrize('stops', [(4, 9), (13, 14), *(pytest.param(stops, marks=pytest.mark.slow) for stops in (
    (3, 16), (5, 10), (15,), (2, 21)))], ids=str)
@pytest.mark.parametrize('options', ['', '--optimizer=muon --gradient_accumulation_steps=2 --grad_clip=.1 --dropout=.2 '
                                     '--bias=True'])
def test_a_resumed_run_is_the_undisturbed_one(fit, call, monkeypatch, options, stops):
    """In full mode, in low-rank mode, at the step of an analysis and between two, before and after r shrinks."""
    planned(monkeypatch)
    options = [*RUN, *PLAN, *options.split()]
    fit(*options, '--out_dir=whole')
    fit(*options, f'--max_iters={stops[0]}')
    for stop in stops[1:]:
        resume(call, stop)
    resume(call, 22)
    assert_same_run('out', 'whole')


def test_the_saved_configuration_is_that_of_the_undisturbed_run_too(fit, call, monkeypatch):
    planned(monkeypatch)
    fit(*RUN, *PLAN, '--out_dir=whole')
    fit(*RUN, *PLAN, '--max_iters=7')
    resume(call, 22)
    assert_same_run('out', 'whole', config=True)


def test_ctrl_c_in_low_rank_mode(fit, call, monkeypatch):
    planned(monkeypatch)
    fit(*RUN, *PLAN, '--out_dir=whole')
    for steps in (6, 5):                                            # at an analysis; between two
        with monkeypatch.context() as patch:
            interrupt(patch, steps)
            assert call(train.main, *RUN, *PLAN).code == 130
        resume(call, 22)
        assert_same_run('out', 'whole')


def test_a_bfloat16_run_switches_and_resumes(fit, call, monkeypatch):
    planned(monkeypatch)
    fit(*RUN, *PLAN, '--dtype=bfloat16', '--out_dir=whole')
    fit(*RUN, *PLAN, '--dtype=bfloat16', '--max_iters=11')
    resume(call, 22)
    assert_same_run('out', 'whole')
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in checkpoint()['model'].values())


def test_options_of_a_resumed_run_are_fixed(fit, refused, monkeypatch):
    planned(monkeypatch)
    fit(*RUN, *PLAN, '--max_iters=7')
    for option in ('--adaptive_svd=False', '--adaptive_svd_targets=c_q', '--adaptive_svd_target_layer=-1'):
        assert 'which is fixed (nearest: python export.py --to=dense --out_dir=out)' in refused(
            train.main, '--init_from=resume', '--device=cpu', option)


def test_protection_may_change_on_the_way(fit, call, monkeypatch):
    planned(monkeypatch)
    fit(*RUN, *PLAN, '--max_iters=5')
    resume(call, 7, '--adaptive_svd_protection=none')
    assert checkpoint()['model_args']['adaptive_svd_protection'] == 'none'
    layer = GPT.from_checkpoint(checkpoint()).get_layer('h.0.attn.c_attn.c_q')
    assert layer.protection == 'none' and (layer.protected.mT @ layer.B.weight).abs().max() > 1e-5


def test_a_switch_that_a_plain_run_does_not_have(fit, refused):
    """Not even from a config file: it would train everything, unwatched."""
    fit('--out_dir=plain', '--max_iters=1')
    Path('c.py').write_text('adaptive_svd = True')
    for words in (['c.py'], ['--adaptive_svd=True']):
        assert 'adaptive_svd=True: resume has adaptive_svd=False, which is fixed (nearest: plain/config.py --in' in (
            refused(train.main, *words, '--init_from=resume', '--out_dir=plain'))


def test_options_without_their_switch_are_named(fit):
    out = fit('--adaptive_svd_targets=c_v', '--lora_alpha=3')
    assert "no effect without adaptive_svd or lora_rank: adaptive_svd_targets='c_v', lora_alpha=3.0" in out


def test_the_config_of_a_resumed_run_can_be_run(fit, call, monkeypatch):
    """From the start, though it says which layers were in low-rank mode."""
    planned(monkeypatch)
    fit(*RUN, *PLAN, '--max_iters=7')
    resume(call, 9)
    assert call(train.main, 'out/config.py', '--out_dir=again', '--init_from=scratch').code == 0
    fit(*RUN, *PLAN, '--max_iters=9', '--out_dir=whole')
    assert same(checkpoint('again')['model'], checkpoint('whole')['model'])


def test_eval_only_of_a_run_in_low_rank_mode(fit, call, monkeypatch):
    planned(monkeypatch)
    fit(*RUN, *PLAN, '--max_iters=7')
    assert call(train.main, '--init_from=resume', '--device=cpu', '--eval_only=True').code == 0
    expected = [row for row in rows() if 'final' in str(row)]
    assert expected and rows(file='eval.jsonl')[0]['val/loss'] == expected[-1]['val/loss']


def test_a_plain_run_goes_on_with_it(fit, call):
    """In a folder of its own: an optimizer's state of c_attn cannot go on for its parts."""
    fit('--n_embd=32')
    result = call(train.main, '--init_from=resume', '--device=cpu', '--adaptive_svd=True', '--max_iters=6')
    assert result.code == 2 and 'adaptive_svd=True: resume has adaptive_svd=False, which is fixed' in result.err


@pytest.mark.parametrize('damage', [
    lambda s: s['adaptive_svd'].clear(), lambda s: s['adaptive_svd']['block0.attn.c_q'].pop('S'),
    lambda s: s['adaptive_svd']['block0.attn.c_q'].update(calm='x'),
    lambda s: s['adaptive_svd'].update({'block0.attn.c_q': 3}),
    lambda s: s['adaptive_svd']['block0.attn.c_q'].update(S=torch.full((32,), torch.nan)),
    lambda s: s['adaptive_svd']['block0.attn.c_q'].update(U=torch.full((32, 32), torch.inf)),
    lambda s: s['adaptive_svd']['block0.attn.c_q'].update(U='U'),
    lambda s: s['model_args'].update(adaptive_svd_ranks=None),
    lambda s: s['model_args'].update(adaptive_svd_ranks={'h.0.attn.c_attn.c_q': 3}),
    lambda s: s['model'].pop('transformer.h.0.attn.c_attn.c_q.protected')])
def test_a_damaged_state_is_one_line(fit, refused, monkeypatch, damage):
    planned(monkeypatch)
    fit(*RUN, *PLAN, '--max_iters=5')
    saved = checkpoint()
    damage(saved)
    torch.save(saved, 'out/ckpt.pt')
    assert 'out/ckpt.pt' in refused(train.main, '--init_from=resume', '--device=cpu', '--max_iters=22')


# ----------------------------------------------------------------------------------------------------------------------
# several processes, torch.compile

MANY = [*RUN, *PLAN, '--gradient_accumulation_steps=4', '--dropout=0']


@pytest.mark.slow
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_two_processes_train_what_one_does(fit, monkeypatch, optimizer):
    """And have the same parameters as each other, to the bit, after every step."""
    env = os.environ | dict(WORLD_SIZE='2', MASTER_ADDR='localhost', OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT))
    with socket.socket() as s:
        s.bind(('localhost', 0))
        env['MASTER_PORT'] = str(s.getsockname()[1])
    jobs = [subprocess.Popen([sys.executable, __file__, optimizer], env=env | dict(RANK=rank, LOCAL_RANK=rank),
                             stdout=subprocess.DEVNULL, stderr=open(f'err-{rank}', 'w')) for rank in '01']
    try:
        for rank, job in enumerate(jobs):
            assert job.wait(100) == 0, Path(f'err-{rank}').read_text()[-2000:]
    finally:
        for job in jobs:
            job.kill()
    first, second = (torch.load(f'steps-{rank}.pt', weights_only=True) for rank in (0, 1))
    assert len(first) == 22
    for a, b in zip(first, second):
        assert a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    planned(monkeypatch)
    fit(*MANY, f'--optimizer={optimizer}', '--out_dir=one')
    one, two = checkpoint('one'), checkpoint('two')
    assert one['model_args'] == two['model_args']
    for key, value in one['model'].items():
        if 'protected' not in key and not key.endswith(('.A.weight', '.B.weight')):
            # a float32 basis makes factors of them, and steps of 3e-3 start from sums in another order
            close = 1e-4 if key.endswith('base.weight') else 1e-5
            torch.testing.assert_close(value, two['model'][key], rtol=0, atol=close, msg=lambda m: f'{key}: {m}')
    weights = [GPT.from_checkpoint(saved) for saved in (one, two)]
    for name in one['model_args']['adaptive_svd_ranks']:
        a, b = (model.get_layer(name).weight for model in weights)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert [row['iter'] for row in rows('one')] == [row['iter'] for row in rows('two')]
    for a, b in zip(rows('one'), rows('two')):
        assert all(a[k] == pytest.approx(b[k], abs=1e-5) for k in a.keys() & {'loss', 'train/loss', 'val/loss'})
        for key in (key for key in a if key.startswith('svd/') and not key.endswith('/why')):      # a rounded per cent
            assert a[key] == (b[key] if isinstance(a[key], (str, bool)) else pytest.approx(b[key], abs=2e-3)), key


def one_of_two(optimizer):
    """What each of the two processes runs; all that it has after every step goes into a file."""
    patch, seen, step = pytest.MonkeyPatch(), [], train.step

    def noted(run, replica):
        result = step(run, replica)
        names = {p: name for name, p in run.model.named_parameters()}
        parts = getattr(run.optimizer, 'optimizers', (run.optimizer,))
        seen.append({name: t.clone() for name, t in run.model.state_dict().items()} | {
            f'{names[p]} {key}': t.clone() for part in parts for p, s in part.state.items() for key, t in s.items()})
        return result
    planned(patch)
    patch.setattr(train, 'step', noted)
    patch.setattr(train, 'sample', lambda *args: '')
    assert train.main([*MANY, f'--optimizer={optimizer}', '--out_dir=two']) == 0
    torch.save(seen, f'steps-{os.environ["RANK"]}.pt')


@pytest.fixture
def aot_eager(monkeypatch):
    """torch.compile traces forward and backward and runs them in torch's own kernels: quick, and to the bit."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend='aot_eager'))
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize('options', ['', '--optimizer=muon --bias=True --n_layer=2 --adaptive_svd_target_layer=-1'])
def test_compiled_it_trains_the_same(fit, monkeypatch, aot_eager, options):
    """fullgraph; over all switches, with analyses in between."""
    planned(monkeypatch)
    fit(*RUN, *PLAN, *options.split(), '--out_dir=eager')
    fit(*RUN, *PLAN, *options.split(), '--compile=True')
    assert equal(checkpoint()['model'], checkpoint('eager')['model'])
    assert untimed('out') == untimed('eager')


@pytest.mark.slow
def test_many_analyses_do_not_reach_the_limit_of_recompilations(fit, monkeypatch, aot_eager):
    """In low-rank mode W_p has a gradient in some steps and not in others."""
    monkeypatch.setattr(adaptive_svd, 'DANGER_ALIGNMENT', -1)
    monkeypatch.setattr(adaptive_svd, 'DANGER_EXCESS', -10)
    fit(*RUN, '--compile=True', '--max_iters=60', '--adaptive_svd_interval=2', '--n_embd=64')
    assert len(analyses()) == 30 and analyses()[-1]['svd/block0.attn.c_q/r'] < 54


if __name__ == '__main__':
    one_of_two(sys.argv[1])

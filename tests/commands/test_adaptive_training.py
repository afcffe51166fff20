"""Adaptive SVD in train.py: logging, invalid options, runs without a switch, resuming, several
processes and torch.compile. The switches are real, because the gradients of a 20 x 20 layer soon
conflict with its weight."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import train
from lowrank.adapters import adaptive_layers
from helpers import ROOT, TINY, checkpoint, equal, rows, same, slow, untimed
from model import GPT, GPTConfig

pytestmark = pytest.mark.usefixtures('one_thread', 'here')
RUN = [
    '--n_embd=20', '--adaptive_svd=True', '--adaptive_svd_interval=1', '--learning_rate=1e-3',
    '--seed=1', '--adaptive_svd_targets=c_q,c_k,c_v,c_proj', '--max_iters=26',
    '--lr_decay_iters=26', '--eval_interval=100', '--eval_iters=1'
]
RESUME = ['--init_from=resume', '--device=cpu']
C_PROJ = 'h.0.attn.c_proj'


def resume(call, steps, *options):
    result = call(train.main, *RESUME, f'--max_iters={steps}', *options)
    assert result.code == 0, result.err
    return result.out


def actions(name, folder='out'):
    """Return (step, r, action) of the analyses of a layer, without those that repeat the previous
    one."""
    seen = [(row['iter'], row[f'svd/{name}/r'], row[f'svd/{name}/action']) for row in rows(folder)
            if f'svd/{name}/r' in row]
    return [seen[0], *(b for a, b in zip(seen, seen[1:]) if a[1:] != b[1:])]


# --------------------------------------------------------------------------------------------------
# logging and options

def test_layers_in_danger_are_switched_and_it_is_logged(trained):
    """A layer switches to low-rank mode, then to a smaller r, to full mode and to low-rank mode
    again. The metrics and the checkpoint say so, and the loss has no jumps."""
    trained(*RUN)
    assert actions('block0.attn.c_proj') == [(1, 20, 'initial'), (2, 20, 'none'),
                                             (15, 10, 'lowrank'), (16, 10, 'refactored'),
                                             (18, 8, 'refactored'), (20, 20, 'full'),
                                             (21, 20, 'none'), (23, 8, 'lowrank'),
                                             (24, 8, 'refactored')]
    for row in (row for row in rows() if row.get('svd/block0.attn.c_proj/action') == 'lowrank'):
        seen = {
            key.rpartition('/')[2]: value
            for key, value in row.items()
            if '/block0.attn.c_proj/' in key}
        assert {'mode', 'reason', 'subspace_angle', 'reconstruction_error', 'excess'} <= seen.keys()
        assert seen['mode'] == 'lowrank' and seen['reason'] == 'gradient_clobbering_risk'
        assert seen['excess'] > .25 and seen['chance'] == 1 - seen['r'] / 20
        assert seen['update_alignment'] < 1e-6                      # protected
    saved, losses = checkpoint(), [row['loss'] for row in rows() if 'loss' in row]
    ranks = {f'h.0.attn.c_attn.c_{part}': 8 for part in 'qkv'} | {C_PROJ: 8}
    assert saved['model_args']['adaptive_svd_ranks'] == saved['config'][
        'adaptive_svd_ranks'] == ranks
    assert len(losses) == 26 and losses[-1] < losses[0]
    assert max(b - a for a, b in zip(losses, losses[1:])) < .2     # no jump at a switch
    # each analysis gives factors a new optimizer state: with one analysis per step its count is 1
    assert {float(state['step']) for state in saved['optimizer']['state'].values()} == {1, 26}


@pytest.mark.parametrize('protection, least, most', [('left', 0, 1e-5), ('none', .02, 9)])
def test_what_is_protected_stays_until_the_next_analysis(trained, call, protection, least, most):
    """Between analyses U_p^T W, the protected part of a weight, changes by at most 1e-5. With
    protection 'none', which a resume may choose, it changes by 2% or more."""
    trained(*RUN)
    before = GPT.from_checkpoint(checkpoint()).get_layer(C_PROJ)
    resume(call, 40, f'--adaptive_svd_protection={protection}', '--adaptive_svd_interval=50',
           '--learning_rate=1e-2', '--decay_lr=False')
    after, U = GPT.from_checkpoint(checkpoint()).get_layer(C_PROJ), before.protected
    assert (before.r, after.r, after.protection) == (8, 8, protection)
    change = (U.mT @ (after.weight - before.weight)).norm() / (U.mT @ before.weight).norm()
    assert least <= change < most


@pytest.mark.parametrize('targets, block, names', [
    ('c_q', 0, ['block0.attn.c_q']), ('c_q', 1, ['block1.attn.c_q']),
    ('c_v', -1, ['block0.attn.c_v', 'block1.attn.c_v']),
    ('c_q,c_k,c_v,c_proj', 0, [f'block0.attn.{word}' for word in ('c_q', 'c_k', 'c_v', 'c_proj')]),
    (' c_proj, c_q ', -1, [f'block{i}.attn.{word}' for i in range(2)
                           for word in ('c_q', 'c_proj')]),
    ('query,c_proj', 1, ['block1.attn.query', 'block1.attn.c_proj'])
])
def test_which_layers_are_watched(targets, block, names):
    """adaptive_svd_targets and adaptive_svd_target_layer select the layers, and -1 means every
    block."""
    model = GPT(
        GPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=11, block_size=8, adaptive_svd=True,
                  use_mla='query' in targets, adaptive_svd_targets=targets,
                  adaptive_svd_target_layer=block))
    assert list(adaptive_layers(model)) == names


@pytest.mark.parametrize(
    'options, words',
    [(['--adaptive_svd_target_layer=1'], ['adaptive_svd_target_layer=1', 'must be 0 to 0', '-1']),
     (['--adaptive_svd_target_layer=-2'], ['adaptive_svd_target_layer=-2', 'nearest: -1']),
     (['--adaptive_svd_target_layer=0.5'], ['adaptive_svd_target_layer=0.5']),
     (['--adaptive_svd_targets=c_fc'], ["'c_fc'", 'c_q, c_k, c_v, c_proj']),
     (['--adaptive_svd_targets=query'], ["'query'"]), (['--adaptive_svd_targets=c_q,,c_k'], ["''"]),
     (['--adaptive_svd_targets=C_Q'], ["'C_Q'"]), (['--use_mla=True'], ["'c_q'", 'query, c_proj']),
     (['--adaptive_svd_protection=right'], ['adaptive_svd_protection', 'left', 'none']),
     (['--adaptive_svd_interval=0'], ['adaptive_svd_interval=0']),
     (['--adaptive_svd=maybe'], ['adaptive_svd']),
     (['--lora_rank=2'], ['lora_rank=2', 'adaptive_svd']),
     (["--layer_ranks={'h.0.attn.c_attn.c_q': 3}"], ['layer_ranks=', 'c_q']),
     (["--adaptive_svd_ranks={'h.0.mlp.c_fc': 3}"], ['adaptive_svd_ranks=', 'cannot change']),
     (["--adaptive_svd_ranks={'h.0.attn.c_attn.c_q': 20}"
       ], ['adaptive_svd_ranks=', 'must be 1 to 19'])])
def test_invalid_options_are_refused(refused, options, words):
    """Invalid options end in a one-line error with the valid choices, and nothing is written."""
    line = refused(train.main, *TINY, *RUN, *options)
    assert all(word in line for word in words), line
    assert not Path('out').exists()


# --------------------------------------------------------------------------------------------------
# analyses without a switch


@pytest.mark.parametrize('options', [
    slow([]),
    slow(['--optimizer=muon']), ['--dropout=.2', '--bias=True', '--gradient_accumulation_steps=3']
])
def test_analyses_without_a_switch_change_nothing(trained, options):
    """Analyses without a switch leave training bit-identical. The first nine steps are a warmup, in
    which nothing switches."""
    options = [*RUN, '--adaptive_svd_targets=c_proj', '--max_iters=9', *options]
    trained(*options, '--adaptive_svd=False', folder='plain')
    trained(*options)
    assert [action for _, _, action in actions('block0.attn.c_proj')] == ['initial', 'none']
    assert 'adaptive_svd' in checkpoint() and 'adaptive_svd' not in checkpoint('plain')
    ours = {name.replace('.base.', '.'): w for name, w in checkpoint()['model'].items()}
    losses = [[row for row in untimed(folder) if 'loss' in row] for folder in ('out', 'plain')]
    assert equal(ours, checkpoint('plain')['model']) and losses[0] == losses[1]


# --------------------------------------------------------------------------------------------------
# resuming

def assert_same_run(folder, other):
    a, b = checkpoint(folder), checkpoint(other)
    own = {k for k, v in b.pop('config').items() if v != a['config'][k]}
    assert own <= {'out_dir', 'init_from', 'max_iters'} and b.keys() == a.keys() - {'config'}
    assert all(same(a[key], b[key]) for key in b)
    steps = [[row for row in untimed(out) if 'val/loss' not in row] for out in (folder, other)]
    assert steps[0] == steps[1]


@pytest.mark.parametrize('options, stops',
                         [(['--dtype=bfloat16'], (17, )),
                          slow([], (12, 22)),
                          slow([
                              '--optimizer=muon', '--gradient_accumulation_steps=2',
                              '--grad_clip=.1', '--dropout=.2', '--bias=True'
                          ], (20, 23)), *(slow(['--optimizer=muon'], stops)
                                          for stops in ((9, 14), (18, 25), (3, )))])
def test_a_resumed_run_is_the_undisturbed_one(fit, trained, call, options, stops):
    """A run that was stopped in any mode and resumed is bit-identical to the uninterrupted run. The
    stops come in full mode, in low-rank mode, before and after r shrinks, and after a return to
    full mode."""
    trained(*RUN, *options, folder='whole')
    modes = {
        value for row in rows('whole') for key, value in row.items() if key.endswith('/action')}
    assert modes == {'initial', 'none', 'lowrank', 'refactored', 'full'}
    fit(*RUN, *options, f'--max_iters={stops[0]}')
    for stop in (*stops[1:], 26):
        resume(call, stop)
    assert_same_run('out', 'whole')
    assert all(p.dtype == torch.float32 and p.isfinite().all()
               for p in checkpoint()['model'].values())


def test_the_saved_configuration_repeats_the_run(trained, call):
    """The saved config.py repeats the run from the start, although it lists the layers that ended
    in low-rank mode."""
    trained(*RUN, folder='whole')
    assert call(train.main, 'whole/config.py', '--out_dir=out', '--init_from=scratch').code == 0
    assert_same_run('out', 'whole')


def test_an_evaluation_of_a_run_in_low_rank_mode_is_its_last_one(trained, call):
    """--eval_only gives the final loss of a run that ended in low-rank mode. Options without effect
    are named."""
    trained(*RUN)
    out = resume(call, 26, '--eval_only=True', '--lora_alpha=3')
    assert rows(file='eval.jsonl')[0]['val/loss'] == [row for row in rows()
                                                      if 'final' in row][-1]['val/loss']
    assert 'lora_alpha=3.0' in out and 'adaptive_svd_targets=' not in out


@pytest.mark.parametrize(
    'folder, option, way_out',
    [('out', '--adaptive_svd=False', 'python export.py --to=dense --out_dir=out'),
     ('out', '--adaptive_svd_targets=c_q', '--to=dense'),
     ('out', '--adaptive_svd_target_layer=-1', '--to=dense'),
     ('plain', '--adaptive_svd=True', 'plain/config.py --in'),
     ('plain', 'c.py', 'plain/config.py --in')])
def test_options_of_a_resumed_run_are_fixed(trained, refused, folder, option, way_out):
    """Adaptive SVD cannot be turned on or off in a resumed run, or moved to other layers. This
    holds for options in a config file too, because ignoring them would train without any
    analysis."""
    trained(*(RUN if folder == 'out' else []), folder=folder)
    Path('c.py').write_text('adaptive_svd = True')
    line = refused(train.main, option, *RESUME, f'--out_dir={folder}')
    assert 'adaptive_svd' in line and way_out in line


@pytest.mark.parametrize('damage', [
    lambda s: s['adaptive_svd'].clear(),
    lambda s: s['model_args'].update(adaptive_svd_ranks=None),
    lambda s: s['model_args'].update(adaptive_svd_ranks={'h.0.attn.c_attn.c_q': 3}),
    lambda s: s['model'].pop('transformer.h.0.attn.c_attn.c_q.protected')])
def test_a_damaged_state_is_refused(trained, refused, damage):
    """A checkpoint whose adaptive state is damaged ends in a one-line error."""
    trained(*RUN)
    saved = checkpoint()
    damage(saved)
    torch.save(saved, 'out/ckpt.pt')
    assert 'out/ckpt.pt' in refused(train.main, *RESUME, '--max_iters=30')


# --------------------------------------------------------------------------------------------------
# several processes, torch.compile


@pytest.mark.slow
@pytest.mark.parametrize('options',
                         [['--optimizer=adamw', '--seed=1'], ['--optimizer=muon', '--seed=4']])
def test_two_processes_train_what_one_does(trained, options):
    """Two processes train as one process does, up to rounding, with the same switches. With these
    seeds no alignment is so close to its threshold that rounding could change a decision."""
    options = [*RUN, '--gradient_accumulation_steps=2', *options]
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    result = subprocess.run([*command, ROOT / 'train.py', *TINY, *options, '--out_dir=two'],
                            timeout=200, capture_output=True, text=True,
                            env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert result.returncode == 0, result.stderr[-2000:]
    trained(*options, folder='one')
    one, two = checkpoint('one'), checkpoint('two')
    assert one['model_args'] == two['model_args']
    weights = [GPT.from_checkpoint(saved) for saved in (one, two)]
    for name in one['model_args']['adaptive_svd_ranks']:  # factors may differ more
        torch.testing.assert_close(*(model.get_layer(name).weight for model in weights), rtol=0,
                                   atol=1e-4)
    for a, b in zip(rows('one'), rows('two'), strict=True):
        for key in a.keys() - {
                'step_ms', 'tokens_per_s', *(key for key in a if key.endswith('/why'))}:
            expected = b[key] if isinstance(a[key],
                                            (str, bool)) else pytest.approx(b[key], abs=2e-3)
            assert a[key] == expected, key


@pytest.fixture
def aot_eager(monkeypatch):
    """Make torch.compile trace forward and backward and run torch's own kernels, which is fast and
    bit-identical."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend='aot_eager'))
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize('options', [[], ['--optimizer=muon', '--bias=True']])
def test_a_compiled_run_is_the_eager_one(fit, trained, aot_eager, options):
    """A compiled run is bit-identical to the eager one over all switches, as one graph. 40 analyses
    do not reach the limit of recompilations."""
    trained(*RUN, *options, '--max_iters=40', folder='eager')
    fit(*RUN, *options, '--max_iters=40', '--compile=True')
    assert equal(checkpoint()['model'], checkpoint('eager')['model'])
    assert untimed('out') == untimed('eager')

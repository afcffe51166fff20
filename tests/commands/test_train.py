"""train.py and runtime/: what a run writes, what its metrics mean, what it resumes and what it
refuses."""

import json
import math
import re
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

import train
from helpers import ROOT, TEXT, TINY, checkpoint, equal, folder_bytes, interrupt, rows, slow
from model import GPT, SCOPES, GPTConfig
from runtime import device as devices
from runtime.config import UserError
from runtime.data import Dataset, locate, name_of, write_dataset
from runtime.evaluation import Evaluation, prefix_gap
from runtime.optimizer import POLAR_EXPRESS, Muon

pytestmark = pytest.mark.usefixtures('one_thread', 'here')
SVD = ('--use_svd=True', '--svd_rank=2')                            # of 8
LONG = ('--max_iters=60', '--lr_decay_iters=60', '--eval_interval=60', '--learning_rate=3e-2')
RESUME = ('--init_from=resume', '--device=cpu')


def losses(name='loss'):
    return [row[name] for row in rows() if name in row]


# --------------------------------------------------------------------------------------------------
# files of a run


def test_a_run_has_a_row_per_step_and_evaluation_describes_its_machine_and_closes_with_a_sample(
        call):
    """A run writes one row per logged step and evaluation and a description of its machine, and
    ends with a sample."""
    out = call(train.main, *TINY, '--log_interval=2', '--dataset=data/toy/').out
    *found, last = rows()
    assert [(row['iter'], 'lr' in row, 'val/loss' in row) for row in found] == [
        (0, False, True), (2, True, False), (2, False, True), (4, True, False), (4, False, True)]
    assert {f'svd/block0.head{head}/effective_rank' for head in (0, 1)} <= found[0].keys()
    assert (last['iter'], last['final']) == (4, True) and f'{last["val/loss"]:.4f}' in out
    assert json.loads(Path('out/environment.json').read_text()).keys() >= {
        'command', 'python', 'torch', 'platform', 'cpus', 'threads', 'device', 'dtype',
        'git_commit', 'git_changes'}
    sample = out.partition('sample:\n')[2]
    assert len(sample) == 1 + 200 + 2 and sample[0] == '\n' and set(sample) <= set(TEXT)


def test_a_checkpoint_has_the_best_loss_and_the_written_configuration_repeats_the_run(
        trained, call):
    """The checkpoint has the tokenizer and the best loss. Training again from the written config.py
    gives bit-identical weights and moves the first run aside."""
    trained(*SVD, '--vocab_size=None')
    first, saved = folder_bytes(), checkpoint()                     # weights_only=True
    assert saved['tokenizer']['chars'] == sorted(set(TEXT))
    assert saved['iter_num'] == 4 and saved['best_val_loss'] == min(
        r['val/loss'] for r in rows() if 'train/loss' in r)
    assert GPTConfig(**saved['model_args']).svd_rank == saved['config']['svd_rank'] == 2
    assert call(train.main, 'out/config.py').code == 0 and equal(checkpoint()['model'],
                                                                 saved['model'])
    assert folder_bytes('out.1') == first and first['config.py'] == Path(
        'out/config.py').read_bytes()


def test_an_old_run_is_moved_aside_and_one_line_says_so(trained, fit):
    """A new run moves the old one aside and prints where. If OUT_DIR is a symbolic link, for
    example to a larger disk, both runs go to its target and the link stays."""
    place = trained(folder='disk')
    Path('out').symlink_to(place, target_is_directory=True)
    for n in (1, 2):
        before = folder_bytes(place)
        assert f'{place}.{n}\n' in fit(f'--seed={n}') and folder_bytes(f'{place}.{n}') == before
        assert checkpoint(place)['config']['seed'] == n and Path('out').is_symlink()


@pytest.mark.parametrize('options, words',
                         [('--n_embd=15', 'n_embd=15'), ('nowhere.py', 'nowhere.py'),
                          ('--device=tpu', 'nearest: cpu'),
                          ('--dataset=nowhere', 'dataset=nowhere'),
                          ('--tokenizer=gpt2', 'tokenizer'), ('--vocab_size=1', 'nearest: 17'),
                          ('--vocab_size=16', 'nearest: 17'), ('--block_size=236', 'nearest: 235'),
                          ('--block_size=5000', 'nearest: 235'),
                          ('--init_from=resume --n_layer=7', 'n_layer=7'),
                          ('--init_from=resume --gelu=tanh', 'gelu=tanh'),
                          ('--init_from=resume --dataset=capitals', 'dataset=capitals'),
                          ('--out_dir=data/toy', "out_dir='data/toy'"),
                          ('--out_dir=notes.txt', "out_dir='notes.txt'"),
                          ('--out_dir=notes.txt/run', "out_dir='notes.txt/run'"),
                          ('--out_dir=/proc/run', "out_dir='/proc/run'"),
                          ('--out_dir=data', "out_dir='data'"),
                          ('--out_dir=other', "out_dir='other'")])
def test_wrong_input_is_named_and_nothing_is_moved_or_written(trained, refused, options, words):
    """Wrong input ends in a one-line error that names it, and no file changes. A data set with as
    many characters as the checkpoint's but different ones is refused too, because every id would
    mean another character."""
    trained()
    write_dataset('data/capitals', TEXT.replace('a', 'A'), 'char', source='tests')
    Path('notes.txt').write_text('mine')
    Path('other/config.py').mkdir(parents=True)                     # a folder cannot be replaced
    before = folder_bytes('.')
    assert words in refused(train.main, *TINY, *options.split()) and folder_bytes('.') == before


# --------------------------------------------------------------------------------------------------
# training itself


@pytest.mark.parametrize('options',
                         [[],
                          slow(['--optimizer=muon']),
                          slow([*SVD, '--dtype=bfloat16']),
                          [*SVD, '--svd_scope=causal', '--svd_block=4', '--dtype=bfloat16'],
                          slow([*SVD, '--svd_scope=weight', '--dtype=bfloat16'])], ids=' '.join)
def test_the_loss_falls(trained, options):
    """Every scope and optimizer learns the toy text. Chance is log(17) = 2.83 nats per
    character."""
    trained(*LONG, *options)
    first, *_, a, b, c = losses()
    assert 2.6 < first < 3.1 and (a + b + c) / 3 < 2.2 and rows()[-1]['val/loss'] < 2.2
    # only the sequence scope has it
    assert ('val/prefix_loss' in rows()[-1]) == (options == [*SVD, '--dtype=bfloat16'])
    assert all(p.dtype == torch.float32 for p in checkpoint()['model'].values())


def test_an_evaluation_uses_the_same_windows_each_time_and_other_seeds_change_weights_and_data(
        trained_once):
    """Every evaluation uses the same windows and no dropout, so all losses are equal if the
    learning rate is 0. Another seed gives other initial weights and another data order."""
    still = '--learning_rate=0', '--min_lr=0', '--dropout=.2'
    found = [
        row['train/loss'] + row['val/loss']
        for row in rows(trained_once(*still))
        if 'train/loss' in row]
    assert len(found) == 3 and len(set(found)) == 1
    one, two = (checkpoint(trained_once(*still, *seed)) for seed in ([], ['--seed=2']))
    assert not equal(one['model'], two['model'])
    assert not torch.equal(one['random'][0]['batches'], two['random'][0]['batches'])


@pytest.mark.parametrize('options', [
    '--svd_rank=2 --use_svd=False', '--svd_rank=None --svd_method=standard',
    slow('--svd_rank=8 --svd_method=randomized'),
    slow('--svd_rank=99 --svd_scope=causal --svd_method=standard'),
    '--svd_rank=8 --svd_scope=weight',
    slow('--svd_rank=99 --svd_scope=weight --svd_method=randomized'),
    '--svd_rank=2 --svd_scope=causal --svd_block=16'
])
def test_svd_off_and_full_rank_train_to_the_bits_of_the_baseline(trained_once, fit, options):
    """Training without SVD, at full rank or with a context too short for a basis is bit-identical
    to the baseline."""
    baseline, truncating = trained_once('--dropout=.1'), trained_once('--dropout=.1', *SVD)
    out = fit('--use_svd=True', '--dropout=.1', *options.split())
    assert equal(checkpoint()['model'], checkpoint(baseline)['model']) and 'SVD on V: off (' in out
    assert not equal(checkpoint(truncating)['model'], checkpoint(baseline)['model'])


@pytest.mark.parametrize(
    'options',
    [slow(SVD), (*SVD, '--svd_method=randomized', '--svd_scope=causal', '--svd_block=4')],
    ids=['sequence', 'randomized'])
def test_evaluating_more_often_changes_no_parameter_and_dropout_acts_after_it(
        trained_once, fit, options):
    """Evaluating more often does not change the trained weights or the random state, and dropout
    stays on after an evaluation."""
    fit('--dropout=.2', *options, '--eval_interval=1', '--eval_iters=3')
    often = checkpoint()
    assert not equal(often['model'], checkpoint(trained_once(*options))['model'])
    fit('--dropout=.2', *options, '--eval_interval=100', '--eval_iters=1')
    assert equal(checkpoint()['model'], often['model'])
    assert torch.equal(checkpoint()['random'][0]['torch'], often['random'][0]['torch'])


@pytest.mark.any_device
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_two_micro_batches_of_four_are_one_batch_of_eight(fit, optimizer, device):
    """Two micro-batches of four train like one batch of eight, up to rounding. The generator draws
    the same eight windows either way."""
    # float32 without SVD would use TF32 on CUDA
    options = f'--device={device}', '--dtype=float32', '--use_svd=True', f'--optimizer={optimizer}'
    fit('--gradient_accumulation_steps=2', *options)
    expected, weights = losses(), checkpoint()['model']
    fit('--batch_size=8', *options)
    assert losses() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(checkpoint()['model'], weights, rtol=1e-3, atol=1e-4)


def test_gradients_are_clipped_to_grad_clip_and_0_means_not_at_all(fit):
    """The gradient norm is clipped to grad_clip, and 0 turns clipping off. After one step AdamW's
    exp_avg is 1 - beta1 times the gradient."""
    norms = []
    for grad_clip in (1e-3, 0, 1e9):
        fit('--max_iters=1', '--beta1=.9', f'--grad_clip={grad_clip}')
        moments = [
            state['exp_avg'].flatten() for state in checkpoint()['optimizer']['state'].values()]
        norms.append(torch.cat(moments).norm().item() / .1)
    assert norms[0] == pytest.approx(1e-3, rel=1e-3) and norms[1] == norms[2] > .1


# --------------------------------------------------------------------------------------------------
# learning rate

def schedule(**changes):
    return SimpleNamespace(**dict(decay_lr=True, learning_rate=6e-4, min_lr=6e-5, warmup_iters=20,
                                  lr_decay_iters=100,
                                  max_iters=100) | changes)


def nanogpt_lr(it, c):
    """nanoGPT's get_lr."""
    if it < c.warmup_iters:
        return c.learning_rate * (it + 1) / (c.warmup_iters + 1)
    decay_ratio = min((it - c.warmup_iters) / (c.lr_decay_iters - c.warmup_iters), 1)
    return c.min_lr + 0.5 * (1.0 + math.cos(math.pi * decay_ratio)) * (c.learning_rate - c.min_lr)


@pytest.mark.parametrize('changes, warmup', [({}, 20), (dict(warmup_iters=0), 0),
                                             (dict(warmup_iters=99), 99), (dict(min_lr=0), 20),
                                             (dict(lr_decay_iters=60), 20),
                                             (dict(lr_decay_iters=200), 20),
                                             (dict(warmup_iters=100), 10),
                                             (dict(warmup_iters=2000), 10),
                                             (dict(warmup_iters=5, lr_decay_iters=3), 0)], ids=str)
def test_the_learning_rate_is_nanogpts_and_a_warm_up_that_does_not_fit_is_a_tenth_of_the_run(
        changes, warmup):
    """The learning rate follows nanoGPT's schedule. A warmup that does not fit is shortened to a
    tenth of the run."""
    expected = [
        nanogpt_lr(it, schedule(**changes | dict(warmup_iters=warmup))) for it in range(121)]
    assert [train.get_lr(it, schedule(**changes)) for it in range(121)] == pytest.approx(expected)
    assert train.get_lr(50, schedule(**changes, decay_lr=False)) == 6e-4


def test_the_schedule_is_max_iters_long_fits_its_warm_up_and_a_resume_keeps_it(fit, call):
    """By default the schedule is max_iters long and a warmup that does not fit is shortened. A
    resume with a larger max_iters keeps the schedule."""
    out = fit('--max_iters=20', '--warmup_iters=50', '--eval_interval=20', '--min_lr=1e-3',
              '--lr_decay_iters=None')
    assert 'warmup_iters=50 ' in out and ' 2\n' in out and 'lr_decay_iters' not in out
    out = call(train.main, *RESUME, '--max_iters=25').out
    assert 'lr_decay_iters=20' in out and 'max_iters=25' in out
    c = schedule(learning_rate=1e-2, min_lr=1e-3, warmup_iters=2, lr_decay_iters=20)
    assert [row['lr'] for row in rows() if 'lr' in row] == [nanogpt_lr(it, c)
                                                            for it in range(20)] + [1e-3] * 5


def test_a_schedule_that_outlasts_the_run_is_said(fit):
    """nanoGPT's config files set lr_decay_iters=600000. The learning rate of a short run then
    stays near its maximum, and a line says why."""
    out = fit('--max_iters=2', '--lr_decay_iters=600000')
    assert 'lr_decay_iters=600000' in out and '--lr_decay_iters=2)' in out


# --------------------------------------------------------------------------------------------------
# evaluation


@pytest.mark.any_device
@pytest.mark.parametrize('options',
                         [('--block_size=235', '--max_iters=1', '--use_svd=True', '--svd_rank=8'),
                          ('--block_size=13', '--batch_size=1', *SVD)], ids=' '.join)
def test_the_final_loss_is_that_of_every_validation_token(trained, options, device):
    """The final loss covers every validation token once, also with a block as long as the data. The
    reference is a sum over windows by hand."""
    trained(*options, f'--device={device}', '--dtype=float32')      # the SVD turns TF32 off
    model, last = GPT.from_checkpoint(checkpoint()).eval(), rows()[-1]
    ids = torch.frombuffer(bytearray(Path('data/toy/val.bin').read_bytes()),
                           dtype=torch.uint16).long()
    windows = zip(*(part.split(model.config.block_size) for part in (ids[:-1], ids[1:])))
    total = sum(len(y) * model(x[None], y[None])[1].item() for x, y in windows)
    assert last['val/tokens'] == len(ids) - 1 == 235
    assert last['val/loss'] == pytest.approx(total / 235, rel=1e-4)


def test_a_prefix_loss_is_reported_where_a_token_sees_the_future(fit):
    """In 'sequence' scope every evaluation also reports the prefix-only loss and its gap to the
    parallel loss."""
    out = fit(*SVD)
    for row in [row for row in rows() if 'val/loss' in row]:
        assert row['val/prefix_loss'] == pytest.approx(row['val/loss'] + row['val/prefix_gap'])
        assert row['val/prefix_gap'] == pytest.approx(
            row['val/prefix_loss_at_positions'] - row['val/parallel_loss_at_positions'], abs=1e-6)
    assert row['final'] and row[
        'val/prefix_positions'] >= 512 and f'{row["val/prefix_loss"]:.4f}' in out


class Reader(torch.nn.Module):
    """A model that predicts the next token with certainty if it can see it (`peeks`), and otherwise
    repeats the current token."""
    peeks = False

    def forward(self, idx, targets=None):
        seen = torch.cat((idx[:, 1:], idx[:, -1:]), dim=1) if self.peeks else idx       # (B, T)
        return 5. * torch.eye(17)[seen], None  # (B, T, vocab)


def test_the_prefix_gap_is_zero_for_a_causal_model_and_for_one_that_peeks_scatters_as_estimated():
    """The gap of a causal model is exactly 0. For a model that sees later tokens the gaps of 60
    seeds scatter as the estimated standard error says."""
    data, reader = Dataset('data/toy'), Reader()
    causal = prefix_gap(reader, data, 'val', 200, 16, 'cpu', nullcontext(), seed=0)
    assert causal['gap'] == causal['gap_se'] == 0 and causal['parallel'] == causal['prefix'] > 3
    reader.peeks = True
    draws = [
        prefix_gap(reader, data, 'val', 160, 16, 'cpu', nullcontext(), seed) for seed in range(60)]
    assert min(d['gap'] for d in draws) > 3 and max(d['parallel'] for d in draws) < 1
    assert causal['positions'] == 200 and draws[0]['positions'] == 160
    scatter = torch.tensor([d['gap'] for d in draws]).std().item()
    assert .7 < scatter / torch.tensor([d['gap_se'] for d in draws]).mean().item() < 1.4


@pytest.mark.parametrize('gap, se, warns', [(.021, .01, True),
                                            (-.021, .01, True), (.019, .01, False), (0., 0., False),
                                            (-.019, .01, False), (1e-9, 0., True)])
def test_a_warning_appears_exactly_when_the_gap_exceeds_two_standard_errors(gap, se, warns):
    row = {
        'val/loss': 2., 'val/prefix_loss': 2. + gap, 'val/prefix_gap': gap, 'val/prefix_gap_se': se}
    text = Evaluation(None, None, None, None, None, True).describe(row)
    assert ('warning' in text) == warns and f'{gap:+.4f} +- {se:.4f}' in text


@pytest.mark.parametrize('scope', SCOPES)
def test_eval_only_measures_what_a_rank_costs_and_leaves_the_run_alone(trained, fit, scope):
    """--eval_only measures the loss with another rank, appends it to eval.jsonl and changes no
    other file."""
    trained(*LONG)
    before, loss = folder_bytes(), rows()[-1]['val/loss']
    for rank in (1, 8):
        fit('--eval_only=True', *RESUME, '--use_svd=True', f'--svd_scope={scope}', '--svd_block=2',
            f'--svd_rank={rank}')
    cut, full = rows(file='eval.jsonl')
    assert full['val/loss'] == pytest.approx(loss, abs=1e-6) and abs(cut['val/loss'] - loss) > 1e-3
    assert (cut['config']['svd_rank'], cut['config']['svd_scope']) == (1, scope)
    Path('out/eval.jsonl').unlink()
    assert folder_bytes() == before and not Path('out.1').exists()


def test_eval_only_prints_the_loss_that_it_cannot_write(trained, call):
    trained()
    Path('out/eval.jsonl').mkdir()
    result = call(train.main, *RESUME, '--eval_only=True', '--device=cpu')
    assert result.code == 1 and 'val loss' in result.out and 'out/eval.jsonl' in result.err


# --------------------------------------------------------------------------------------------------
# Muon

@pytest.mark.any_device
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_a_muon_step_orthogonalizes_the_momentum_of_each_matrix(dtype, device):
    """Muon's steps are torch.optim.Muon's, with the momentum of each matrix orthogonalized apart,
    by the SVD and the polynomials of Polar Express. The shapes are wide, tall and square, single
    and stacked."""
    torch.manual_seed(0)
    counts = {(24, 16): 1, (16, 48): 2, (8, 48): 1, (48, 8): 6, (8, 64): 1}  # two of (8, 48)
    params = [torch.nn.Parameter(torch.randn(shape).to(device)) for shape in counts]
    start = [p.detach().double().cpu() for p in params]
    expected, momenta = [*start], [torch.zeros_like(p) for p in start]
    rates = [1., .5, 2., 1., 1.]
    heights = [[len(p) // n] * n for p, n in zip(params, counts.values())]
    optimizer = Muon([{'params': params, 'matrices': heights, 'rates': rates}],
                     dtype=dtype, lr=.1, weight_decay=.1)
    for _ in range(3):
        for i, (p, n) in enumerate(zip(params, counts.values())):
            p.grad = torch.randn_like(p)
            momenta[i] = .95 * momenta[i] + .05 * p.grad.double().cpu()
            update = .05 * p.grad.double().cpu() + .95 * momenta[i]
            parts = []
            for part in update.chunk(n):
                u, s, vh = torch.linalg.svd(part, full_matrices=False)
                s = s / part.norm() / 1.01
                for x, y, z in POLAR_EXPRESS:
                    s = x * s + y * s ** 3 + z * s ** 5
                parts.append(.2 * max(part.shape) ** .5 * (u * s) @ vh)
            expected[i] = expected[i] * .99 - .1 * rates[i] * torch.cat(parts)
        optimizer.step()
    for p, q, p0 in zip(params, expected, start):
        error = (p.detach().double().cpu() - q).norm() / (q - p0).norm()
        # three steps enlarge rounding up to 8.3 x 4.1 x 3.9 = 133 times; bfloat16 rounds by 2^-9
        assert error < (133 * 2 ** -9 if dtype == torch.bfloat16 else 133 * 2 ** -24)


@pytest.mark.parametrize('options, whole, per_head', [
    ({}, [[8] * 3, [8], [32], [8]], [[4] * 6, [8], [32], [8]]),
    (dict(use_mla=True, mla_latent_dim=3), [[8], [3], [8], [8], [8], [32], [8]],
     [[4, 4], [3], [4, 4], [4, 4], [8], [32], [8]]),
    (dict(adaptive_svd=True, adaptive_svd_targets='c_q'), [[8], [8], [8], [8], [32], [8]],
     [[4, 4], [4, 4], [4, 4], [8], [32], [8]]),
    (dict(n_kv_head=1, v_head_dim=[2]), [[8, 4, 2], [8], [32], [8]],
     [[4, 4, 4, 2], [8], [32], [8]])],
    ids=['c_attn', 'MLA', 'split', 'narrow heads'])
def test_muon_splits_queries_keys_and_values(options, whole, per_head):
    """The matrices in a parameter are W_q, W_k and W_v, or their heads. Only c_fc has another rate,
    and only after the larger initialization."""
    for flag, init in ((False, 'gpt2'), (True, 'mimetic')):
        model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=9,
                              weight_init=init, **options))
        found = {p: pair for kind, group in model.param_groups(.1, flag).items()
                 if kind in ('hidden', 'halved') for p, *pair in zip(
                     group['params'], group['matrices'], group['rates'], strict=True)}
        named = {name: found[p] for name, p in model.named_parameters() if p in found}
        assert [rows for rows, _ in named.values()] == (per_head if flag else whole)
        assert all(rate == 1 + (flag and 'c_fc' in name) for name, (_, rate) in named.items())


# --------------------------------------------------------------------------------------------------
# resuming

def test_a_checkpoint_of_nanogpt_resumes(trained, call):
    """A checkpoint as nanoGPT writes it after torch.compile on a GPU resumes. It has no gelu
    option, which means the exact gelu."""
    trained()
    before = checkpoint()
    args = {k: before['model_args'][k] for k in (
        'n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')}
    config = {
        k: before['config'][k] for k in
        ('out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint '
         'init_from wandb_log wandb_project wandb_run_name dataset gradient_accumulation_steps '
         'batch_size block_size n_layer n_head n_embd dropout bias learning_rate max_iters '
         'weight_decay beta1 beta2 grad_clip decay_lr warmup_iters lr_decay_iters min_lr '
         'backend').split()}
    weights = {f'_orig_mod.{name}': w for name, w in before['model'].items()}
    torch.save(
        dict(model=weights, optimizer=before['optimizer'], model_args=args, iter_num=4,
             best_val_loss=torch.tensor(before['best_val_loss']),
             config=config | dict(device='cuda', dtype='float16', compile=True)), 'out/ckpt.pt')
    assert call(train.main, *RESUME, '--max_iters=5').code == 0
    saved = checkpoint()
    assert saved['iter_num'] == saved['optimizer']['state'][0]['step'] == 5
    assert type(saved['best_val_loss']) is float and saved['model_args']['gelu'] == 'exact'
    moved = [(saved['model'].pop(name) - w).abs().max() for name, w in before['model'].items()]
    # one step with a learning rate of at most 0.01
    assert 0 < max(moved) < .02 and not saved['model']


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_at_resume_a_shape_is_fixed_but_the_context_can_be_cropped_and_svd_changed(
        trained, call, optimizer):
    """On resume the shape is fixed, but block_size can be cropped, and SVD and dropout changed.
    Another shape in a config file is ignored with a message, and the same shape on the command line
    is accepted."""
    trained('--gelu=tanh', f'--optimizer={optimizer}')
    Path('two.py').write_text('n_layer = 2\nmax_iters = 6\n')
    changes = dict(svd_rank=3, use_svd=True, svd_scope='causal', dropout=.5, n_embd=16,
                   block_size=8)
    result = call(train.main, 'two.py', *RESUME,
                  *(f'--{key}={value}' for key, value in changes.items()))
    assert result.code == 0 and result.out.count('n_layer=2 of two.py') == 1
    saved = checkpoint()
    assert saved['model_args'].items() >= (changes | dict(n_layer=1, gelu='tanh')).items()
    assert saved['iter_num'] == 6 and len(saved['model']['transformer.wpe.weight']) == 8
    moments = saved['optimizer'].get('adamw', saved['optimizer'])['state'].values()
    assert [each['exp_avg'].shape for each in moments].count((8, 16)) == 1


# --------------------------------------------------------------------------------------------------
# data sets

@pytest.mark.parametrize('tokenizer, end, vocab_size', [('char', '\n', 17), ('char', '\r\n', 17),
                                                        # 50257 rounded up to a multiple of 64
                                                        ('gpt2', '\n', 50304)])
def test_a_run_on_a_text_file_goes_on_without_it_from_another_folder(
        fit, call, capsys, here, monkeypatch, byte_bpe, tokenizer, end, vocab_size):
    """A run on a text file resumes without that file and from another folder. The text is encoded
    once, here below the working directory instead of the repository's data/."""
    Path('my text.txt').write_bytes(TEXT.replace('\n', end).encode())
    folder = locate('my text.txt', tokenizer, roots=(here / 'data',))
    assert '2,360 characters' in capsys.readouterr().out
    assert '2,360 characters' not in fit('--dataset=my text.txt', f'--tokenizer={tokenizer}')
    saved = checkpoint()
    assert (saved['tokenizer']['tokenizer'], saved['model_args']['vocab_size']) == (tokenizer,
                                                                                    vocab_size)
    assert saved['config']['dataset'] == str(folder) and rows()[-1]['val/tokens'] == 235
    assert name_of(ROOT / 'data' / folder.name, 'my text.txt') == folder.name
    Path('my text.txt').unlink()
    monkeypatch.chdir('data')
    result = call(train.main, *RESUME, f'--out_dir={here}/out', '--max_iters=5')
    assert result.code == 0 and str(folder) in result.out


# --------------------------------------------------------------------------------------------------
# wandb

@pytest.mark.slow
def test_wandb_offline_writes_below_out_dir(fit, monkeypatch):
    wandb = pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    fit('--wandb_log=True')
    wandb.teardown()
    assert list(Path('out/wandb').glob('offline-run-*/run-*.wandb'))


@pytest.fixture
def wandb(monkeypatch):
    """The mock that a run imports as wandb."""
    wandb = MagicMock()
    wandb.init.return_value = wandb
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    return wandb


def test_wandb_gets_the_rows_of_metrics_and_the_resolved_options(fit, wandb):
    """wandb gets the resolved options and exactly the rows of metrics.jsonl."""
    fit('--wandb_log=True', '--wandb_project=ours', '--wandb_run_name=7', '--wandb_group=sweep',
        '--wandb_tags=a, b')
    options, resolved = wandb.init.call_args.kwargs, asdict(train.load_config(['out/config.py'])[0])
    assert [options[name]
            for name in ('project', 'name', 'group', 'tags')] == ['ours', '7', 'sweep', ['a', 'b']]
    assert options['config'] == resolved and resolved['vocab_size'] == 17
    assert [each.args[0] for each in wandb.log.call_args_list] == rows()


def test_a_resumed_run_goes_on_in_the_same_wandb_run_which_gets_the_exit_code(
        fit, call, wandb, monkeypatch):
    """A resumed run continues the same wandb run, which gets the exit code. A damaged run id is
    replaced by a new one."""
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        assert call(train.main, *TINY, '--wandb_log=True').code == 130
    assert call(train.main, *RESUME).code == 0
    Path('out/wandb/run-id').write_bytes(b'\xff../x')               # no valid id
    fit(*RESUME, '--wandb_log=True')
    first, second, other = [each.kwargs['id'] for each in wandb.init.call_args_list]
    assert first == second != other == Path('out/wandb/run-id').read_text()
    assert re.fullmatch('[0-9a-f]{8}', other)
    assert wandb.init.call_args.kwargs.items() >= {'resume': 'allow',
                                                   'allow_val_change': True}.items()
    # wandb's own step may only grow; with 'iter' as axis a step can be logged again after a resume
    wandb.define_metric.assert_called_with('*', step_metric='iter')
    spoilt = '--learning_rate=1e35', '--grad_clip=0', '--warmup_iters=0', '--wandb_log=True'
    assert call(train.main, *TINY, *spoilt).code == 1
    assert [each.kwargs['exit_code'] for each in wandb.finish.call_args_list] == [130, 0, 0, 1]


@pytest.mark.parametrize('name, effect, words', [
    ('init', RuntimeError('No API\nkey.'), 'RuntimeError: No API key.'),
    ('log', OSError(28, 'No space left'), 'OSError: [Errno 28] No space left'),
    ('finish', ValueError('why'), 'ValueError: why')])
def test_a_wandb_that_breaks_does_not_stop_training(fit, wandb, name, effect, words):
    """An error in wandb gives one line and does not stop training."""
    getattr(wandb, name).side_effect = effect
    out = fit('--wandb_log=True')
    assert out.count(
        'wandb') == 1 and words in out and 'metrics.jsonl' in out and rows()[-1]['final']


@pytest.mark.parametrize('module', [None, SimpleNamespace()],
                         ids=['not installed', 'a folder named wandb'])
def test_a_missing_wandb_does_not_stop_training(fit, monkeypatch, module):
    monkeypatch.setitem(sys.modules, 'wandb', module)
    assert 'pip install wandb' in fit('--wandb_log=True') and rows()[-1]['final']


# --------------------------------------------------------------------------------------------------
# devices, with fake hardware

@pytest.fixture
def machine(monkeypatch):
    """machine(cuda=number of GPUs, mps, name, bf16) sets what torch reports about the hardware."""
    def machine(cuda=0, mps=False, name='NVIDIA A100-SXM4-80GB', bf16=True):
        monkeypatch.setattr('torch.cuda.is_available', lambda: cuda > 0)
        monkeypatch.setattr('torch.cuda.device_count', lambda: cuda)
        monkeypatch.setattr('torch.backends.mps.is_available', lambda: mps)
        monkeypatch.setattr('torch.cuda.get_device_name', lambda device=None: name)
        monkeypatch.setattr('torch.cuda.is_bf16_supported', lambda including_emulation=True:
                            bf16 or including_emulation)
    return machine


@pytest.mark.parametrize('here_is, wanted, device, dtype',
                         [(dict(cuda=1, mps=True), 'auto', 'cuda', 'bfloat16'),
                          (dict(mps=True), 'auto', 'mps', 'float32'),
                          ({}, 'auto', 'cpu', 'float32'),
                          (dict(cuda=2, bf16=False), 'cuda:1', 'cuda:1', 'float16'),
                          (dict(cuda=2), 'cpu', 'cpu', 'float32'),
                          (dict(cuda=1), 'cuda', 'cuda', 'bfloat16'),
                          (dict(cuda=2), 'cuda:2', None, None), (dict(cuda=1), 'mps', None, None),
                          ({}, 'cuda', None, None), (dict(cuda=1), 'cuda:x', None, None)])
def test_cuda_comes_before_mps_and_the_cpu_with_the_dtype_of_the_hardware(
        machine, here_is, wanted, device, dtype):
    """'auto' chooses CUDA, then MPS, then the CPU, with a dtype that the hardware supports. A
    device that does not exist is an error."""
    machine(**here_is)
    with nullcontext() if device else pytest.raises(UserError, match=f'device={wanted}: '):
        assert devices.pick_device(wanted) == device and devices.pick_dtype('auto', device) == dtype


def test_peak_flops_are_the_data_sheets_and_unknown_names_have_none(machine):
    """The peak FLOPS of a GPU are those of its data sheet. Unknown names and float32 have none."""
    for name, tera in (('NVIDIA A100-SXM4-80GB', 312), ('NVIDIA A100-PCIE-40GB', 312),
                       ('NVIDIA H100 80GB HBM3', 989), ('NVIDIA H100 PCIe',
                                                        756), ('NVIDIA GeForce RTX 4090', 165),
                       ('NVIDIA GeForce RTX 3090', 71), ('NVIDIA L4', 121), ('NVIDIA L40S', 362),
                       ('NVIDIA A10', 125), ('NVIDIA A10G', 70), ('Tesla T4', None),
                       ('NVIDIA RTX A1000', None), ('NVIDIA GeForce RTX 4090 Laptop GPU', None),
                       ('NVIDIA A100-SXM4-80GB MIG 1g.10gb', None), ('NVIDIA H200', 989)):
        machine(cuda=1, name=name)
        assert devices.peak_flops('cuda', 'bfloat16') == (tera and tera * 1e12)
    assert devices.peak_flops('cuda', 'float32') is devices.peak_flops('cpu', 'bfloat16') is None

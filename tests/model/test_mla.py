"""Multi-head latent attention: parameters, training, runs, export and config files. test_model.py
tests its logits, test_decode.py its cache."""

import pytest
import torch

import export
import sample
import train
from helpers import MLA_RANKS, RANKS, SMALL, checkpoint, make, mla, optimizer_of, svd, tokens
from lowrank.svd import METHODS
from model import GPT, SCOPES, GPTConfig
from runtime import checkpoint as ckpt
from tools.export_formats import plain_model

pytestmark = pytest.mark.usefixtures('one_thread')
RUN = ['--use_mla=True', '--mla_latent_dim=5', '--bias=True']
CUT = ['--use_svd=True', '--svd_rank=2', '--svd_scope=causal', '--svd_block=4']


# --------------------------------------------------------------------------------------------------
# parameters


def test_parameter_names_and_shapes():
    """Parameters have the documented names and shapes. Keys have no bias, because it would not
    change the attention weights, and an SVD adds no parameter."""
    weights = {
        'c_attn.query.weight': (8, 8),
        'c_attn.kv_down.weight': (3, 8),
        'c_attn.k_up.weight': (8, 3),
        'c_attn.v_up.weight': (8, 3),
        'c_proj.weight': (8, 8),
    }
    biases = dict.fromkeys(('c_attn.query.bias', 'c_attn.v_up.bias', 'c_proj.bias'), (8,))
    for options, expected in (
        (mla(), weights | biases),
        (mla(bias=False), weights),
        (mla([5, 3]), weights | biases),
        *((mla(**svd(scope, 2, 'randomized')), weights | biases) for scope in SCOPES),
    ):
        state = make(**options).transformer.h[1].attn.state_dict()
        assert {name: tuple(p.shape) for name, p in state.items()} == expected
    widths = {1: 1, 3: 1, 8: 2, 128: 32, 768: 192}  # the default latent is a quarter
    assert {w: GPTConfig(n_embd=w, n_head=1, use_mla=True).latent_dims[0]
            for w in widths} == widths


@pytest.mark.parametrize('bias', [True, False])
def test_attention_has_a_fifth_to_a_half_fewer_parameters(bias):
    """Attention has 2 C^2 + 3 C d parameters instead of 4 C^2, and no other count changes. With the
    default d = C / 4 that is 20% to 50% fewer."""
    for layers, heads, width, latent in (
        (12, 12, 768, None),
        (4, 4, 128, None),
        (2, 3, 96, 1),
        (1, 1, 64, 64),
    ):
        shape = dict(n_layer=layers, n_head=heads, n_embd=width, vocab_size=64, bias=bias)
        with torch.device('meta'):
            model, dense = (
                GPT(GPTConfig(**shape, use_mla=True, mla_latent_dim=latent)),
                GPT(GPTConfig(**shape)),
            )
        expected = layers * (2 * width**2 + 3 * width * (latent or width // 4) + 3 * width * bias)
        assert model.attention_params() == expected and dense.attention_params(
        ) == layers * 4 * width * (width + bias)
        assert dense.get_num_params() - model.get_num_params() == dense.attention_params(
        ) - expected
        assert latent or 0.2 <= 1 - expected / dense.attention_params() <= 0.5


@pytest.mark.parametrize('latent', [16, 128])
def test_initially_keys_and_values_have_the_variance_of_ordinary_ones(latent):
    """At the start U_k W_a and U_v W_a have a standard deviation of 0.02, as W_k and W_v in
    ordinary attention."""
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(n_layer=2, n_head=2, n_embd=128, vocab_size=64, block_size=16, **mla(latent)))
    for block in model.transformer.h:
        a = block.attn.c_attn
        down = a.kv_down.weight  # (d, C): orthogonal rows, entries of 1 / sqrt(d)
        torch.testing.assert_close(down @ down.T, 128 / latent * torch.eye(latent), rtol=0,
                                   atol=1e-4)
        for weight, std in (
            (a.query.weight, 0.02),
            (a.k_up.weight, 0.02),
            (a.k_up.weight @ down, 0.02),
            (a.v_up.weight @ down, 0.02),
            (block.attn.c_proj.weight, 0.02 / 2),
        ):
            assert weight.std().item() == pytest.approx(std, rel=0.1)
        assert a.query.bias.count_nonzero() == a.v_up.bias.count_nonzero() == 0


# --------------------------------------------------------------------------------------------------
# training


@pytest.mark.parametrize(
    'method, scope, kind, steps',
    [
        ('standard', 'sequence', 'adamw', 30),
        ('gram', 'causal', 'muon', 30),
        ('randomized', 'weight', 'adamw', 30),
        *(
            pytest.param(method, scope, ('adamw', 'muon')[(i + j) % 2], 400, marks=pytest.mark.slow)
            for i, method in enumerate(METHODS)
            for j, scope in enumerate(SCOPES)
        ),
    ],
)
def test_training_stays_finite_and_learns(method, scope, kind, steps):
    """Training with latents and an SVD keeps every gradient finite and lowers the loss by a fifth
    or more. The latent has 4 values and the heads have size 2 and 16, so V has singular values of
    exactly zero. Autograd through torch.linalg.svd gives NaN there at once. Biases are off because
    they would add a dimension."""
    for n_head, rank in ((8, 1), (1, 6)):
        torch.manual_seed(0)
        model = GPT(
            GPTConfig(
                **SMALL | dict(n_layer=1, n_head=n_head, n_embd=16, bias=False, use_mla=True),
                **svd(scope, rank, method),
            ))
        optimizer, losses = optimizer_of(model, kind), []
        for step in range(steps):
            x = tokens(seed=step) % 5
            loss = model(x, x * 2 + 1)[1]
            optimizer.zero_grad()
            loss.backward()
            assert all(p.grad.isfinite().all() for p in model.parameters())
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0] and all(p.isfinite().all() for p in model.parameters())


def test_a_checkpoint_from_before_latents_and_factors_is_one_without(trained, call, refused):
    """A checkpoint written before latents and layer_ranks existed loads as a model without them."""
    trained()
    saved, new = checkpoint(), dict(use_mla=False, mla_latent_dim=None, layer_ranks=None)
    old = saved | {
        part: {key: value for key, value in saved[part].items() if key not in new}
        for part in ('model_args', 'config')}
    torch.save(old, 'out/ckpt.pt')
    assert call(sample.main, '--device=cpu', '--start=the', '--num_samples=1',
                '--max_new_tokens=5').code == 0
    resume = ['--init_from=resume', '--device=cpu', '--max_iters=5']
    assert 'use_mla=False' in refused(train.main, *resume, '--use_mla=True')
    assert call(train.main, *resume).code == 0 and checkpoint()['model_args'] == saved['model_args']


# --------------------------------------------------------------------------------------------------
# export.py and configs


@pytest.mark.parametrize(
    'options',
    [
        mla(),
        mla(8, bias=False),
        mla(**svd('weight')),
        mla(bias=False, **svd('weight', 3, 'standard')),
        svd('weight'),
        dict(layer_ranks=RANKS),
        dict(layer_ranks=RANKS, bias=False, **svd('weight')),
        mla(layer_ranks=MLA_RANKS),
        mla(**svd('weight', svd_targets='q,k', svd_rank_k=1)),
        svd('weight', svd_targets='q,k,v', n_kv_head=1),
        dict(n_kv_head=1, bias=False, qk_head_dim=[1, 3], v_head_dim=[4, 2]),
    ],
    ids=str,
)
def test_multiplied_out_it_is_a_plain_model(options):
    """`plain_model` turns latents, layers of two factors and the SVD of 'weight' scope into dense
    weights with the same logits."""
    for dtype in (torch.float64, torch.float32):
        model, idx = make(dtype=dtype, **options), tokens()
        expected = model(idx, idx)[0]
        plain = plain_model(model).eval()
        c = plain.config
        assert not (c.use_mla or c.use_svd or c.layer_ranks or c.n_kv_head or c.qk_head_dim)
        assert (plain(idx, idx)[0] - expected).abs().max() <= 1e4 * torch.finfo(
            dtype
        ).eps * expected.abs().max()


@pytest.mark.parametrize('to', ['gpt2', 'nanogpt'])
def test_a_run_is_exported(trained, call, refused, to):
    """A run with latents can be exported with the same logits. The AdamW state is left out because
    its parameters no longer exist. Scopes that truncate V itself end in a one-line error."""
    trained(*RUN)
    result = call(export.main, f'--to={to}', '--save_dir=new')
    assert result.code == 0 and 'optimizer state' in result.out, result.out
    before, idx = GPT.from_checkpoint(ckpt.load('out/ckpt.pt')).eval(), torch.arange(16)[None]
    after = GPT.from_pretrained('new') if to == 'gpt2' else GPT.from_checkpoint(
        ckpt.load('new/ckpt.pt'))
    expected = before(idx, idx)[0]
    assert not after.config.use_mla
    assert (after.eval()(idx, idx)[0] - expected).abs().max() <= 1e-5 * expected.abs().max()
    if to == 'nanogpt':
        assert not checkpoint('new')['optimizer']['state']
        assert (call(train.main, '--init_from=resume', '--out_dir=new', '--max_iters=6',
                     '--device=cpu').code == 0)
    trained(*RUN, *CUT, folder='cut')
    assert 'svd_scope=' in refused(export.main, '--out_dir=cut', f'--to={to}')


@pytest.mark.parametrize('to', ['gpt2', 'nanogpt'])
def test_shared_heads_are_repeated_in_an_export_that_can_be_trained(trained, call, to):
    """The export of a run with shared heads has its logits. nanoGPT's AdamW state would have other
    shapes, so it is left out, and training goes on."""
    trained('--bias=True', '--n_kv_head=1')
    result = call(export.main, f'--to={to}', '--save_dir=new')
    assert result.code == 0 and 'repeated: 1 key/value heads' in result.out, result.out
    before, idx = GPT.from_checkpoint(ckpt.load('out/ckpt.pt')).eval(), torch.arange(16)[None]
    after = GPT.from_pretrained('new').eval()
    assert not after.config.is_grouped
    assert (after(idx, idx)[0] - before(idx, idx)[0]).abs().max() <= 1e-5
    if to == 'nanogpt':
        assert not checkpoint('new')['optimizer']['state']
        assert call(train.main, '--init_from=resume', '--out_dir=new', '--max_iters=6',
                    '--device=cpu').code == 0

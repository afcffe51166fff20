"""The published methods in experiments/compression_peers.py do what their papers promise."""

import copy

import pytest
import torch
from torch.nn import functional as F

from experiments import compression_peers as peers
from lowrank.factorization import Factorization
from model import GPT, GPTConfig
from tools.attention_conversion import to_lowrank_heads
from tools.model_compression import compress_model

pytestmark = pytest.mark.usefixtures('one_thread')
KEEP = 0.5


@pytest.fixture(params=[False, True], ids=['no bias', 'bias'])
def dense(request):
    """Model with large random weights, the inputs of whose layers are correlated."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=4, n_head=2, n_embd=32, block_size=16, vocab_size=17,
                          bias=request.param)).eval().requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=.2)
    for table in (model.transformer.wte, model.transformer.wpe):
        table.weight *= torch.linspace(0, 1, 32).square()
    return model


@pytest.fixture
def windows():
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randint(17, (2, 32, 16), generator=generator)) for _ in range(2)]


def weights(model, part=''):
    """Return the number of weights in the linear layers of the blocks. Shared ones count once."""
    return sum(p.numel() for name, p in model.transformer.h.named_parameters()
               if p.dim() == 2 and part in name)


@torch.no_grad()
def outputs(model, windows):
    return torch.cat([model(x, y)[0] for x, y in windows])


def inputs(model, windows, path):
    """Return the inputs (N, n) of a layer of the blocks."""
    seen = []
    hook = model.transformer.get_submodule(path).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].flatten(0, 1).double()))
    outputs(model, windows)
    hook.remove()
    return torch.cat(seen)


def error(weight, low_rank, x):
    return ((weight - low_rank) @ x.mT).square().sum().item()


@pytest.mark.parametrize('name', peers.PEERS)
def test_the_weights_kept_are_at_most_the_fraction_asked_for_and_close_to_it(name, dense, windows):
    """Of the weights that a method counts, it keeps at most the fraction asked for, and no more
    than one rank or one width less. Losses and logits of the result are finite."""
    part = 'attn' if name == 'CLOVER' else ''
    before = weights(dense, part)
    model = peers.PEERS[name](copy.deepcopy(dense), windows, KEEP)
    assert (KEEP - .04) * before <= weights(model, part) <= KEEP * before
    logits, loss = model(*windows[0])
    assert logits.isfinite().all() and loss.isfinite()
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize('name', peers.PEERS)
def test_if_all_weights_are_kept_the_logits_are_those_of_the_dense_model(name, dense, windows):
    model = peers.PEERS[name](copy.deepcopy(dense), windows, 1)
    rounding = 1000 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(outputs(model, windows), outputs(dense, windows), atol=rounding,
                               rtol=rounding)


@pytest.mark.parametrize('part', ['c_fc', 'c_proj'], ids=['tall', 'wide'])
def test_whitened_truncation_and_update_are_the_optima_of_the_output_error(part, dense, windows):
    """SVD-LLM's truncation is the singular value decomposition of W S, multiplied by S^-1, and its
    error is that of the remaining singular values. The update is the least squares solution."""
    layer = dense.transformer.h[1].mlp.get_submodule(part)
    weight, rank = layer.weight.double(), 9
    x = inputs(dense, windows, f'h.1.mlp.{part}')
    x = x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))     # full rank
    shifted = x + 0.3 * x.roll(1, dims=1)
    tall = weight.size(0) >= weight.size(1)
    first, second = (z.mT @ z for z in ((x, shifted) if tall else (
        x @ weight.mT, shifted @ weight.mT)))
    basis = peers.output_basis(weight, torch.linalg.eigh(first), rank)
    root = torch.linalg.cholesky(x.mT @ x)
    u, s, vh = torch.linalg.svd(weight @ root, full_matrices=False)
    best = u[:, :rank] * s[:rank] @ vh[:rank] @ torch.linalg.inv(root)
    torch.testing.assert_close(basis @ basis.mT @ weight, best, rtol=1e-6, atol=1e-6)
    assert error(weight, best, x) == pytest.approx(s[rank:].square().sum().item())
    down = basis.mT @ weight
    fit = torch.linalg.lstsq(shifted @ down.mT, shifted @ weight.mT).solution.mT
    torch.testing.assert_close(peers.updated(weight, basis, second), fit, rtol=1e-6, atol=1e-6)


def test_svd_llm_differs_from_whitening_by_its_update_of_later_blocks(dense, windows):
    """The first block equals that of method 'whitened'. In later blocks the outputs for the inputs
    of the compressed model are closer to those of the dense layer."""
    new, plain = copy.deepcopy(dense), copy.deepcopy(dense)
    for block in plain.transformer.h:                   # 'whitened' would centre inputs for a bias
        for layer in block.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.bias = None
    reference = copy.deepcopy(plain)
    plain = compress_model(plain, 'whitened', windows, keep=KEEP)
    new = peers.svd_llm(reference, windows, KEEP)
    first, later = 'h.0.mlp.c_fc', 'h.3.attn.c_attn.c_v'
    a, b = (model.transformer.get_submodule(first).weight for model in (new, plain))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    weight = dense.transformer.h[3].attn.c_attn.weight.chunk(3)[2].double()
    x = inputs(new, windows, later)
    a, b = (model.transformer.get_submodule(later).weight.double() for model in (new, plain))
    assert error(weight, a, x) < error(weight, b, x)


def test_pairs_of_blocks_share_the_basis_with_the_least_error_of_both(dense, windows):
    """Both layers of a pair have the same parameter A, and no other choice of A has a smaller error
    of outputs. Layers with other roles share nothing."""
    x = {i: inputs(dense, windows, f'h.{i}.mlp.c_fc') for i in (2, 3)}
    stacked = torch.cat([dense.transformer.h[i].mlp.c_fc.weight for i in (2, 3)]).double()
    model = peers.basis_sharing(copy.deepcopy(dense), windows, 0.7)         # without the update
    h = model.transformer.h
    for part in ('attn.c_attn.c_q', 'attn.c_attn.c_k', 'attn.c_attn.c_v', 'mlp.c_fc'):
        a = [block.get_submodule(part).A.weight for block in h]
        assert a[0] is a[1] and a[2] is a[3] and a[0] is not a[2]
    for part in ('attn.c_proj', 'mlp.c_proj'):
        assert h[0].get_submodule(part).A.weight is not h[1].get_submodule(part).A.weight
    both = torch.cat([x[2], x[3]])
    shared = torch.cat([h[i].mlp.c_fc.weight for i in (2, 3)]).double()
    rank = h[2].mlp.c_fc.rank
    least = Factorization(stacked, both.mT @ both, ridge=0).energies[rank:].sum().item()
    assert error(stacked, shared, both) == pytest.approx(least, rel=1e-3)
    up, down = Factorization(stacked).factors(rank)
    assert error(stacked, shared, both) < error(stacked, up @ down, both)


def test_modegpt_keeps_the_best_dimensions_and_refits_the_layers_after_them(
        dense, windows, monkeypatch):
    """In the first block, queries and keys are dimensions of the dense ones with the largest root
    mean squares. With SVD in place of this choice, the error of scores is the least possible.
    c_proj of the MLP is the least squares fit to the remaining neurons. W_o W_v of a head is closer
    to the dense output than the plain SVD of the product."""
    model = peers.modegpt(copy.deepcopy(dense), windows, 0.6)
    old, new = dense.transformer.h[0], model.transformer.h[0]
    x, width = inputs(dense, windows, 'h.0.attn.c_attn'), model.config.qk_head_dim[0]

    def made(block, name):
        """Return queries, keys or values of the second head (N, w)."""
        c_attn = copy.deepcopy(block.attn.c_attn).double()
        return c_attn(x[None])['qkv'.index(name)][0, 1]
    sizes = [made(old, name).square().mean(0).sqrt() for name in 'qk']
    chosen = (sizes[0] * sizes[1]).topk(width).indices.sort().values
    for name in 'qk':
        assert torch.equal(new.attn.c_attn.head_weight(name)[1],
                           old.attn.c_attn.head_weight(name)[1][chosen])
    monkeypatch.setattr(peers, 'TEMPERATURE_JOINT', peers.TEMPERATURE)      # equal widths
    joint = peers.modegpt_joint(copy.deepcopy(dense), windows, 0.6).transformer.h[0]
    target = made(old, 'q') @ made(old, 'k').mT                     # scores of all pairs (N, N)
    lost = [(target - made(block, 'q') @ made(block, 'k').mT).square().sum().item()
            for block in (joint, new)]
    roots = [torch.linalg.qr(made(old, name)).R for name in 'qk']
    least = torch.linalg.svdvals(roots[0] @ roots[1].mT)[width:].square().sum().item()
    assert lost[0] == pytest.approx(least, rel=1e-3) and lost[0] < lost[1]

    x = inputs(dense, windows, 'h.0.mlp.c_fc')
    before, after = (copy.deepcopy(block.mlp).double() for block in (old, new))
    before.c_proj.bias = after.c_proj.bias = None                   # the same in both
    hidden, target = F.gelu(after.c_fc(x)), before(x)               # (N, neurons), (N, C)
    least = (target - hidden @ torch.linalg.lstsq(hidden, target).solution).square().sum().item()
    left = (target - after(x)).square().sum().item()
    assert left <= 1.001 * least + 1e-8 * target.square().sum().item()

    def product(block, head):
        out = block.attn.c_proj.weight.double().unflatten(1, (2, -1))[:, head]
        return out @ block.attn.c_attn.head_weight('v')[head].double()
    x, width = inputs(dense, windows, 'h.0.attn.c_attn'), model.config.v_head_dim[0]
    up, down = Factorization(product(old, 0)).factors(width)
    assert error(product(old, 0), product(new, 0), x) < error(product(old, 0), up @ down, x)


def test_modegpt_cuts_most_from_blocks_that_change_their_inputs_least():
    """The fractions kept rise with the influence of a block, have the mean asked for, and leave at
    least a fifth of each block."""
    for keep in (0.9, 0.6, 0.4, 0.2):
        kept = peers.kept_by_block(torch.tensor([0.9, 0.1, 0.2, 0.05]), keep, 0.3)
        assert sum(kept) / 4 == pytest.approx(keep)
        assert kept[0] >= kept[2] >= kept[1] >= kept[3] >= 0.2 - 1e-9


def test_clover_is_the_conversion_to_narrower_heads_without_text(dense):
    """At a fraction that gives whole widths, CLOVER equals `to_lowrank_heads` without windows. Its
    heads are the best approximations of W_o W_v."""
    model = peers.clover(copy.deepcopy(dense), (), KEEP)
    reference = to_lowrank_heads(copy.deepcopy(dense), KEEP)
    assert model.config == reference.config
    for (name, a), b in zip(model.state_dict().items(), reference.state_dict().values()):
        torch.testing.assert_close(a, b, msg=name)
    old, new = (m.transformer.h[2].attn for m in (dense, model))
    products = [attn.c_proj.weight.unflatten(1, (2, -1)).transpose(0, 1).double()
                @ attn.c_attn.head_weight('v').double() for attn in (old, new)]
    s = torch.linalg.svdvals(products[0])                           # (nh, C)
    lost = (products[0] - products[1]).square().sum((1, 2))
    torch.testing.assert_close(lost, s[:, model.config.v_head_dim[2]:].square().sum(1), rtol=1e-3,
                               atol=1e-6)

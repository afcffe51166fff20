"""Four published methods that compress a trained model without fine-tuning, for comparisons.

    SVD-LLM         truncated SVD of whitened weights, then an update for changed inputs
                    (arXiv:2403.07378)
    MoDeGPT         fewer neurons and narrower heads (arXiv:2408.09632); 'MoDeGPT, SVD of q k' is a
                    variant for models without rotary positions
    Basis Sharing   layers of neighbouring blocks share a factor (arXiv:2410.03765)
    CLOVER          narrower heads by the SVD of products of weights (arXiv:2411.17426)

Each method is a function of a model, of calibration windows and of the fraction `keep` of the
weights that may remain. `PEERS` lists them. The weights are those of the linear layers in the
blocks, without biases. CLOVER leaves the MLP as it is, and its `keep` counts weights of attention
only. The model must be dense, in evaluation mode, frozen, on the CPU in float32, and have as many
heads of keys and values as of queries. It may be changed in place. The model that Basis Sharing
returns cannot be saved, because its configuration does not describe shared factors.

All statistics and factors are computed in float64. The authors' code uses float32 in part.

Letters: m outputs, n inputs, s = min(m, n), r rank, N tokens; in attention also B batch, T tokens,
C model width, nh heads, hs head size, w width of a narrower head.
"""

import sys
from dataclasses import replace
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn import functional as F

from lowrank.factorization import balance
from lowrank.layers import LowRankLinear
from tools.calibration import HeadStats, record
from tools.model_compression import dense_layers, layer_names, rebuild

GROUP = 2                           # Basis Sharing: number of blocks that share a basis
SHARED = ('attn.c_attn.c_q', 'attn.c_attn.c_k', 'attn.c_attn.c_v', 'mlp.c_fc')  # layers with it
UPDATE_AT = 0.6                     # Basis Sharing: the update is for this fraction kept or less
# MoDeGPT: epsilon of `modegpt` and `modegpt_joint`; the larger, the more alike are all blocks. Of
# 0.1, 0.15, 0.3, 0.5, 1 and infinity, these gave the least validation loss on two models
TEMPERATURE, TEMPERATURE_JOINT = 0.5, 1.0
MOST_CUT = 0.8                      # MoDeGPT: largest fraction cut from a block
LEVERAGE_RIDGE = 1e-2               # MoDeGPT: lambda, relative to the mean square of a neuron
REFIT_RIDGE = 1e-9                  # MoDeGPT: the same for the refitted c_proj


def gram(x):
    """x (..., N, s) -> x^T x (..., s, s) in float64."""
    return x.double().mT @ x.double()


# --------------------------------------------------------------------------------------------------
# least error of outputs: SVD-LLM and Basis Sharing

def statistic_of(name, weight):
    """Return the name of the statistic that a layer needs. Layers with m >= n need the sum of x x^T
    over inputs x, which W_q, W_k and W_v share. Other layers need the sum of (W x) (W x)^T. Both
    are matrices (s, s)."""
    return name.rpartition('.c_')[0] if weight.size(0) >= weight.size(1) else name


def observe(layers, weights, run, batches):
    """Run batches and collect the statistics of layers.

    layers: name -> module, which may be low-rank; weights: name -> weight of the dense layer (m, n)
    in float64; run: function of a batch that calls the layers. Returns two objects: a dict, name of
    a statistic -> tensor (s, s), and the list of results of `run`.
    """
    wanted = {statistic_of(name, weights[name]): name for name in layers}
    sums, results = dict.fromkeys(wanted, 0), []
    with record(layers) as seen:
        for batch in batches:
            results.append(run(batch))
            for key, name in wanted.items():
                x = seen[name][0].flatten(0, 1)                                 # (N, n)
                x = x @ weights[name].to(x).mT if key == name else x            # (N, s)
                sums[key] = sums[key] + gram(x)
    return sums, results


def output_basis(weight, decomposed, rank):
    """Return E (m, r) with orthonormal columns, such that E E^T W has the least error of outputs.

    This is SVD-LLM's truncation of W S, multiplied by S^-1, where S S^T is the sum of x x^T. The
    optimum does not depend on the choice of S, and E needs no inverse of S, so the sum may be
    singular. decomposed: `torch.linalg.eigh` of the layer's statistic.
    """
    values, vectors = decomposed
    if weight.size(0) < weight.size(1):
        return vectors.flip(1)[:, :rank]                # of W S S^T W^T
    whitened = weight @ (vectors * values.clamp_min(0).sqrt())                  # W S (m, n)
    right = torch.linalg.eigh(whitened.mT @ whitened)[1].flip(1)[:, :rank]      # (n, r)
    return torch.linalg.qr(whitened @ right).Q


def updated(weight, basis, statistic):
    """Return U (m, r), such that the outputs U E^T W x are closest to W x over inputs x.

    This is a closed-form least squares fit. basis: E; statistic: of the inputs x, which differ from
    those that E is for.
    """
    tall = weight.size(0) >= weight.size(1)
    down = basis.mT @ weight if tall else basis.mT                              # (r, s)
    cross = (weight @ statistic if tall else statistic) @ down.mT               # (m, r)
    return cross @ torch.linalg.pinv(down @ statistic @ down.mT, rtol=1e-13, hermitian=True)


@torch.no_grad()
def svd_llm(model, windows, keep):
    """Compress by SVD-LLM: truncation-aware whitening and the layer-wise closed-form update of U.

    Wang et al., arXiv:2403.07378, section 3. The code is `whitening_local_update` in SVDLLM.py,
    whose option --step=2 runs both stages. Ranks are floor(keep m n / (m + n)) in all layers.
    Whitening uses the inputs of layers in the dense model. Then the blocks are replaced one after
    another. The inputs of a block come from the compressed blocks before it, and U is fitted so
    that the outputs of each layer are closest to those of the dense layer for these inputs. All
    layers of a block are updated together, as in the authors' code.

    Deviations: factors are computed by eigendecompositions of matrices (s, s), without the Cholesky
    factor and its inverse. The products are the same. Both stages use all windows, where the
    authors' defaults are 256 for whitening and 16 for the update. A bias is not part of the fit.
    The authors' code for OPT fits outputs with bias and then adds the bias again. With keep=1 the
    model stays dense.
    """
    if keep == 1:
        return model
    dense = dense_layers(model, layer_names(model))
    weights = {name: layer.weight.double() for name, layer in dense.items()}
    blocks = model.transformer.h
    before = now = [model.transformer.wte(x) + model.transformer.wpe.weight[:x.size(1)]
                    for x, _ in windows]                                        # (B, T, C) each
    for i, names in groupby(dense, lambda name: int(name.split('.')[1])):
        layers = {name: dense[name] for name in names}
        now = [blocks[i - 1](x) for x in now] if i else now
        sums, outputs = observe(layers, weights, blocks[i], before)
        shifted = observe(layers, weights, blocks[i], now)[0] if i else sums
        decomposed = {key: torch.linalg.eigh(total) for key, total in sums.items()}
        for name, layer in layers.items():
            key, weight = statistic_of(name, weights[name]), weights[name]
            basis = output_basis(weight, decomposed[key], rank_of(weight, keep))
            up = updated(weight, basis, shifted[key]) if i else basis
            model.set_layer(name, LowRankLinear.from_factors(up, basis.mT @ weight, layer))
        before = outputs
    return model


def rank_of(weight, keep):
    """Return the largest rank at which the factors have at most this fraction of the numbers of a
    weight (m, n)."""
    return max(1, int(keep * weight.numel() / sum(weight.shape) + 1e-9))


@torch.no_grad()
def basis_sharing(model, windows, keep):
    """Compress by Basis Sharing: pairs of neighbouring blocks share the factor A of their layers.

    Wang et al., arXiv:2410.03765, sections 3.1 to 3.3, and github.com/TUDa-HWAI/Basis_Sharing. The
    weights W_q of both blocks are stacked to a matrix (2m, n) and truncated as in SVD-LLM, with the
    sum of both blocks' statistics. W_k, W_v and c_fc are treated alike. Both c_proj are compressed
    on their own. Ranks are floor(keep 2m n / (2m + n)), or floor(keep m n / (m + n)) without
    sharing. The shared factor is one parameter of both layers. With keep <= 0.6, the factors U are
    then fitted to the inputs that all layers have in the compressed model, in one pass, as in the
    authors' configurations for 40% compression and more.

    Deviations: a last block without a partner gets the rank of a single layer. The authors' code
    gives it the rank of a pair, which exceeds the budget. With keep=1 the model stays dense. The
    authors' configuration for GPT-2 also shares attn.c_proj, and it stacks W_q, W_k and W_v.
    """
    if keep == 1:
        return model
    dense = dense_layers(model, layer_names(model))
    weights = {name: layer.weight.double() for name, layer in dense.items()}
    groups, bases, decomposed = sharing_groups(dense), [], {}
    sums, _ = observe(dense, weights, lambda batch: model(*batch)[1], windows)
    for names in groups:
        weight, keys, total = pooled(names, weights, sums)
        if keys not in decomposed:                      # W_q, W_k and W_v have the same
            decomposed[keys] = torch.linalg.eigh(total)
        bases.append(output_basis(weight, decomposed[keys], rank_of(weight, keep)))
        for name, up in zip(names, bases[-1].split([len(weights[name]) for name in names])):
            layer = LowRankLinear.from_factors(up, bases[-1].mT @ weight, dense[name])
            model.set_layer(name, layer)
            layer.A = model.transformer.get_submodule(names[0]).A
    if keep <= UPDATE_AT:
        layers = {name: model.transformer.get_submodule(name) for name in dense}
        sums, _ = observe(layers, weights, lambda batch: model(*batch)[1], windows)
        for names, basis in zip(groups, bases):
            weight, _, total = pooled(names, weights, sums)
            parts = updated(weight, basis, total).split([len(weights[name]) for name in names])
            for name, up in zip(names, parts):
                layers[name].B.weight.copy_(up)
    return model


def sharing_groups(names):
    """Return lists of the names of layers that share a basis."""
    groups = {}
    for name in names:
        _, block, part = name.split('.', 2)
        place = int(block) // GROUP if part in SHARED else int(block)
        groups.setdefault((part, place), []).append(name)
    return [*groups.values()]


def pooled(names, weights, sums):
    """Return the stacked weights of layers (m, n), the names of their statistics and the sum of
    these statistics."""
    keys = tuple(statistic_of(name, weights[name]) for name in names)
    return torch.cat([weights[name] for name in names]), keys, sum(sums[key] for key in keys)


# --------------------------------------------------------------------------------------------------
# fewer neurons and narrower heads: MoDeGPT and CLOVER

@torch.no_grad()
def modegpt(model, windows, keep, joint=False):
    """Compress by MoDeGPT: each block gets narrower heads and fewer neurons.

    Lin et al., arXiv:2408.09632, algorithms 1 to 3 and the global sparsity allocation. All
    statistics are of the dense model. The fractions kept come from `kept_by_block`. In a block they
    are equal for queries and keys, values and outputs, and neurons. Widths of heads are rounded to
    the nearest whole number. The number of neurons then uses what remains of the block's weights.

        neurons     Those with the largest ridge leverage scores diag(C (C + lambda I)^-1) remain,
                    where C is the mean of h h^T over outputs h of GELU. c_proj is refitted
                    (algorithm 1, Nystrom).
        q, k        In each head, the dimensions i with the largest product of the norms of columns
                    i of C_q^1/2 and C_k^1/2 remain. These norms are root mean squares of q and k
                    (algorithm 2, CR).
        v, c_proj   In each head, the product W_o W_v becomes the product of rank w with the least
                    error of outputs (algorithm 3, SVD). The biases of values are moved to the bias
                    of c_proj, which is exact.

    Deviations and choices: lambda is relative to the mean square of neurons. The refit of c_proj
    has a ridge towards its old weights in place of a pseudo-inverse, so keep=1 gives the model
    itself. Algorithm 3 is computed without the inverse of a root of C, with the same product. The
    cap of the allocation is that of github.com/cbacary/MoDeGPT, because the authors published no
    code. The constants TEMPERATURE were chosen on validation text, in favour of the method. With
    joint=True, queries and keys are not selected but projected, see `modegpt_joint`.
    """
    c, n = model.config, len(model.transformer.h)
    layers = {(i, part): block.get_submodule(part) for i, block in enumerate(model.transformer.h)
              for part in ('', 'attn.c_attn', 'mlp.c_proj')}
    sums = [{} for _ in range(n)]
    with record(layers) as seen:
        for batch in windows:
            model(*batch)
            for i, block in enumerate(model.transformer.h):
                _, (q, k, v) = seen[i, 'attn.c_attn']                           # (B, nh, T, hs)
                bias, h = block.attn.c_attn.head_bias('v'), seen[i, 'mlp.c_proj'][0]
                heads = dict(q=q, k=k, v=v if bias is None else v - bias)
                moments = {name: gram(x.transpose(0, 1).flatten(1, 2))          # (nh, hs, hs)
                           for name, x in heads.items()} | {'h': gram(h.flatten(0, 1))}
                cosine = F.cosine_similarity(*seen[i, ''], dim=2).sum()
                for name, value in {**moments, 'cosine': cosine}.items():
                    sums[i][name] = sums[i].get(name, 0) + value
    tokens = sum(y.numel() for _, y in windows)
    influence = torch.tensor([1 - float(one['cosine']) / tokens for one in sums])
    shares = kept_by_block(influence, keep, TEMPERATURE_JOINT if joint else TEMPERATURE)
    state, fields = {}, dict(qk_head_dim=[], v_head_dim=[], mlp_dim=[])
    for i, (block, share) in enumerate(zip(model.transformer.h, shares)):
        qk, v = (block.attn.c_attn.head_weight(name).size(1) for name in 'qv')
        neurons = block.mlp.c_fc.out_features
        budget = share * c.n_embd * 2 * (c.n_head * (qk + v) + neurons)
        qk, v = (max(1, round(share * width)) for width in (qk, v))
        neurons = min(neurons, int(budget / (2 * c.n_embd) + 1e-9) - c.n_head * (qk + v))
        for part, tensors in (('attn', narrow_heads(block.attn, qk, v, sums[i], joint)),
                              ('mlp', fewer_neurons(block.mlp, neurons, sums[i]['h'] / tokens))):
            state |= {f'h.{i}.{part}.{name}': tensor for name, tensor in tensors.items()}
        for field, size in zip(fields, (qk, v, neurons)):
            fields[field].append(size)
    return rebuild(model, replace(c, **fields), state).requires_grad_(False)


def kept_by_block(influence, keep, temperature):
    """Return the fraction of the weights that each block keeps, with the mean `keep`.

    The fraction cut is proportional to softmax(-influence / temperature). Influence (blocks) is one
    minus the mean cosine similarity of a block's inputs and outputs. No fraction cut exceeds
    MOST_CUT, or 1 - keep if that is larger. What exceeds it is divided among the other blocks in
    the same proportions.
    """
    weights = torch.softmax(-influence.double() / temperature, dim=0)
    most, cut = max(MOST_CUT, 1 - keep), len(weights) * (1 - keep) * weights
    while (cut > most + 1e-9).any():
        full = cut >= most - 1e-9
        cut = torch.where(full, most, weights * ((1 - keep) * len(cut) - most * full.sum())
                          / weights[~full].sum())
    return (1 - cut).tolist()


def fewer_neurons(mlp, count, moments):
    """Return the tensors of an MLP with this number of neurons, name -> tensor. moments: mean of
    h h^T (4C, 4C)."""
    up, down = mlp.c_fc.weight, mlp.c_proj.weight.double()                      # (4C, C), (C, 4C)
    level, eye = moments.diagonal().mean(), torch.eye(len(moments), dtype=torch.float64)
    ridge = LEVERAGE_RIDGE * level
    scores = 1 - ridge * torch.cholesky_inverse(
        torch.linalg.cholesky(moments + ridge * eye)).diagonal()                # (4C)
    chosen = scores.topk(count).indices.sort().values
    ridge = REFIT_RIDGE * level
    cross = down @ moments[:, chosen] + ridge * down[:, chosen]                 # (C, count)
    root = torch.linalg.cholesky((moments + ridge * eye)[chosen][:, chosen])
    tensors = {'c_fc.weight': up[chosen], 'c_proj.weight': torch.cholesky_solve(cross.mT, root).mT}
    return tensors if mlp.c_fc.bias is None else tensors | {'c_fc.bias': mlp.c_fc.bias[chosen]}


def narrow_heads(attn, qk, v, moments, joint):
    """Return the tensors of attention with heads of width qk and v, name -> tensor.

    moments: 'q', 'k' and 'v' -> sum of x x^T over queries, keys, and values without biases
    (nh, hs, hs); joint: as for `modegpt`.
    """
    weights = {name: attn.c_attn.head_weight(name).double() for name in 'qkv'}  # (nh, hs, C)
    out = attn.c_proj.weight.double().unflatten(1, (len(weights['v']), -1)).transpose(0, 1)
    roots = {}                                                      # R R^T = moments
    for name in 'qkv':
        values, vectors = torch.linalg.eigh(moments[name])
        roots[name] = vectors * values.clamp_min(0).sqrt()[:, None]             # (nh, hs, hs)
    if joint:
        left, s, right = torch.linalg.svd(roots['q'].mT @ roots['k'])
        scale = s[:, :qk, None].clamp_min(1e-12 * s.max() + 1e-200).rsqrt()     # (nh, w, 1)
        cuts = dict(q=scale * (right[:, :qk] @ roots['k'].mT),
                    k=scale * (left[:, :, :qk].mT @ roots['q'].mT))             # (nh, w, hs)
    else:
        scores = moments['q'].diagonal(dim1=1, dim2=2) * moments['k'].diagonal(dim1=1, dim2=2)
        chosen = scores.topk(qk, dim=1).indices.sort(1).values                  # (nh, w)
        cuts = dict.fromkeys('qk', torch.eye(scores.size(1), dtype=torch.float64)[chosen])
    basis = torch.linalg.svd(out @ roots['v'], full_matrices=False).U[:, :, :v]         # (nh, C, w)
    rows = [cuts[name] @ weights[name] for name in 'qk'] + [basis.mT @ out @ weights['v']]
    tensors = {'c_attn.weight': torch.cat([part.flatten(0, 1) for part in rows]),
               'c_proj.weight': basis.transpose(0, 1).flatten(1)}               # (C, nh w)
    if attn.c_proj.bias is not None:
        biases = {name: attn.c_attn.head_bias(name).double().mT for name in 'qkv'}  # (nh, hs, 1)
        kept = [(cuts[name] @ biases[name]).flatten() for name in 'qk']
        tensors['c_attn.bias'] = torch.cat([*kept, kept[0].new_zeros(len(out) * v)])
        tensors['c_proj.bias'] = attn.c_proj.bias + (out @ biases['v']).sum(0)[:, 0]
    return tensors


def modegpt_joint(model, windows, keep):
    """Compress by a variant of MoDeGPT that suits this model better: SVD for queries and keys.

    MoDeGPT selects dimensions of queries and keys, because rotary positions rotate pairs of them.
    Learned positions do not, so a matrix N of rank w can be put between queries and keys, as
    between values and c_proj. N minimizes the mean square error of scores q^T N k over independent
    q and k. This is not in the paper. A re-implementation, github.com/cbacary/MoDeGPT, has
    `compress_qk_svd` for OPT, which uses the statistics of queries only. All else is as in
    `modegpt`.
    """
    return modegpt(model, windows, keep, joint=True)


@torch.no_grad()
def clover(model, windows, keep):
    """Compress attention by CLOVER: the SVD of W_q^T W_k and of W_o W_v in each head.

    Meng et al., arXiv:2411.17426, section 3, and github.com/fxmeng/CLOVER. The directions with the
    largest singular values remain. All heads of all layers get the same widths, as in the authors'
    structure_pruning.ipynb. A global threshold for the singular values, as in their
    weight_pruning_clover.ipynb, would give the heads of a layer different widths. The width of
    queries and keys is floor(keep hs). Values get one dimension more if that is within `keep`.
    windows are not used. `tools.attention_conversion.HeadStats` computes the factors, as for
    `to_lowrank_heads` without windows.

    Deviations: the authors' code adds the biases of q, k and v to the weights as one more column.
    Here this is done for q only. A bias of k does not change the attention weights, and that of v
    is moved to the bias of c_proj.
    """
    state, n = {}, len(model.transformer.h)
    for i, block in enumerate(model.transformer.h):
        heads = HeadStats(block.attn)
        k = max(1, int(keep * heads.weights['k'].size(1) + 1e-9))
        v = max(1, int(2 * keep * heads.weights['v'].size(1) + 1e-9) - k)
        factors = {part: [balance(*head.split(width), width) for head in heads.factorizations(part)]
                   for part, width in dict(k=k, v=v).items()}
        for name, tensor in heads.narrow(factors).items():
            state[f'h.{i}.attn.{name}'] = tensor
    new = rebuild(model, replace(model.config, qk_head_dim=[k] * n, v_head_dim=[v] * n), state)
    return new.requires_grad_(False)


PEERS = {'SVD-LLM': svd_llm, 'MoDeGPT': modegpt, 'MoDeGPT, SVD of q k': modegpt_joint,
         'Basis Sharing': basis_sharing, 'CLOVER': clover}

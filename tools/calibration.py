"""Statistics of the layers of a model over calibration text.

Letters: m outputs, n inputs, s = min(m, n), N tokens, B batch, T tokens per window; in attention
also C model width, nh heads, hs head size.
"""

import math
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice

import torch

from lowrank.factorization import Factorization, InputSelection
from runtime import tracking

BATCH_TOKENS = 512                  # per forward pass of calibration
ROUNDING = torch.finfo(torch.float32).eps           # error of an activation, relative to its mean


# --------------------------------------------------------------------------------------------------
# statistics

class LayerStats:
    """Statistics of a layer over calibration tokens, for `Factorization`.

    The statistics are E[x x^T] of inputs x and E[g g^T] of loss gradients g at the outputs. Both
    are mapped to the smaller side of the weight, which gives matrices (s, s), summed up in float64
    on the CPU.

    If the layer has a bias, it compensates for the mean error. Then only the covariance of the
    inputs counts. The covariance is a sum of squared deviations within and between batches (Chan,
    Golub and LeVeque, 1983). Unlike a difference of moments, it is positive semidefinite.
    """

    dtype = torch.float64               # of x^T x

    def __init__(self, weight, centred):
        """weight: (m, n); centred: whether the layer has a bias."""
        self.weight, self.centred = weight.detach().cpu(), centred
        self.tall = weight.size(0) >= weight.size(1)
        self.tokens, self.gradient_tokens, self.sum, self.gradients = 0, 0, 0, None
        self.mean = torch.zeros(weight.size(1)).double()

    def reduce(self, x):
        """Map inputs x (N, n) to the smaller side of the weight, (N, s): x itself or W x."""
        return x if self.tall else x @ self.weight.to(x.dtype).mT

    def reduce_gradients(self, g):
        """Map gradients g (N, m) to the smaller side of the weight, (N, s): W^T g or g itself."""
        return g @ self.weight.to(g.dtype) if self.tall else g

    def add(self, x, g=None):
        """Add a batch of inputs x (..., N, n) and of gradients g (..., N, m) at the outputs. g may
        be None. Leading dimensions stay apart in all statistics."""
        x = x.cpu().to(self.dtype)                                  # MPS has no float64
        count, mean = x.size(-2), x.mean(-2, keepdim=True)
        step = mean.squeeze(-2).double() - self.mean
        if self.centred:                                # one more row for the change of the mean
            weight = (self.tokens * count / (self.tokens + count)) ** 0.5
            x = torch.cat((x - mean, weight * step.unsqueeze(-2).to(x.dtype)), dim=-2)
        self.tokens += count
        self.mean = self.mean + step * (count / self.tokens)
        x = self.reduce(x)
        self.sum = self.sum + x.mT @ x
        if g is not None:
            g = self.reduce_gradients(g.cpu()).double()
            self.gradients = (0 if self.gradients is None else self.gradients) + g.mT @ g
            self.gradient_tokens += g.size(-2)

    def moments(self):
        """Return the mean of x x^T over tokens, plus the variance of float32 rounding errors of the
        inputs. Without this variance, rounding errors of a constant input would count as
        signal."""
        x = self.reduce(torch.diag_embed(ROUNDING * self.mean).to(self.dtype))
        return (self.sum / self.tokens + x.mT @ x).double()

    def output_metric(self):
        """Return the mean of g g^T over tokens, or None without gradients."""
        return None if self.gradients is None else self.gradients / self.gradient_tokens

    def factorization(self):
        """Return the `Factorization` of the weight. If no tokens were added, it is the plain
        SVD."""
        if not self.tokens:
            return Factorization(self.weight)
        statistics = self.moments(), self.output_metric()
        return Factorization(self.weight, *(statistics if self.tall else statistics[::-1]))


class Inputs:
    """List of the inputs of a module, (N, n) per batch."""

    def __init__(self):
        self.batches = []

    def add(self, x, g=None):
        self.batches.append(x)


class NeuronStats(LayerStats):
    """Statistics of the layer that reads the neurons of an MLP. They are not mapped, because the
    choice of neurons needs E[x x^T] (n, n) and E[g g^T] (m, m) themselves. The products of the many
    neurons take time. So they are in float32, and batches without gradients are left out, also in
    the mean."""

    dtype = torch.float32

    def reduce(self, x):
        return x

    def add(self, x, g=None):
        """Add a batch as `LayerStats.add` does, if it has gradients."""
        if g is not None:
            super().add(x, g)

    def reduce_gradients(self, g):
        return g

    def factorization(self):
        near, far, weight = self.moments(), self.output_metric(), self.weight.double()
        if not self.tall:
            return Factorization(self.weight, far, weight @ near @ weight.mT)
        return Factorization(self.weight, near, weight.mT @ far @ weight)

    def selection(self):
        """Return the `InputSelection` of the weight."""
        return InputSelection(self.weight, self.moments(), self.output_metric())


class HeadStats:
    """Statistics of keys and values per head over calibration tokens, in float64, and the weights
    of the layer, on the CPU."""

    def __init__(self, attn):
        def double(tensor):
            return None if tensor is None else tensor.detach().cpu().double()
        self.weights = {name: attn.c_attn.head_weight(name).detach().cpu() for name in 'qkv'}
        self.biases = {name: double(attn.c_attn.head_bias(name)) for name in 'qkv'}
        w_o, self.bias_o = attn.c_proj.weight.detach().cpu(), double(attn.c_proj.bias)
        self.w_o = w_o.unflatten(1, (attn.c_attn.heads['q'], -1)).transpose(0, 1)   # (nh, C, hs)
        self.query_gram = 0                                         # sum of q q^T (nh, hs, hs)
        # a bias of c_proj compensates for the mean error of values; a mean of keys has no effect
        centred = dict(k=True, v=self.bias_o is not None)
        self.stats = {name: LayerStats(torch.eye(self.weights[name].size(1)), centred[name])
                      for name in centred}

    def add(self, x, g=None):
        """Add a batch of inputs x (N, C) and of gradients g (N, rows of W_k and W_v) at keys and
        values. g may be None."""
        sizes = [self.weights[name].shape[:2].numel() for name in 'kv']
        gradients = [None] * 2 if g is None else g.split(sizes, dim=1)
        x = x.cpu()
        rows = {name: (x @ w.mT.to(x.dtype)).double() for name, w in self.weights.items()}
        if self.bias_o is not None:
            rows = {name: x + self.biases[name] for name, x in rows.items()}        # (heads, N, hs)
        self.query_gram = self.query_gram + rows['q'].mT @ rows['q']
        for (name, stats), g in zip(self.stats.items(), gradients):
            if g is not None:
                g = g.unflatten(1, (len(rows[name]), -1)).transpose(0, 1)           # (nkv, N, hs)
            stats.add(rows[name], g)

    def factorizations(self, name):
        """Return the `Factorization` of N for each key/value head. name: 'k' or 'v'."""
        stats = self.stats[name]
        w_q, w, w_o = (t.double() for t in (self.weights['q'], self.weights[name], self.w_o))
        if self.bias_o is not None:                                 # the bias is one more input
            w_q = torch.cat((w_q, self.biases['q'].mT), dim=2)
        queries = self.query_gram if stats.tokens else w_q @ w_q.mT
        far = queries if name == 'k' else w_o.mT @ w_o              # (nh, hs, hs)
        near, far = w @ w.mT, far.unflatten(0, (len(w), -1)).sum(1)                 # (nkv, hs, hs)
        if stats.tokens:
            near, g = stats.moments(), stats.output_metric()
            level, other = (t.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] for t in (g, far))
            far = (g + far * (level / other.clamp_min(1e-300))) / 2
        return [Factorization(stats.weight, *pair) for pair in zip(near, far)]

    def narrow(self, factors):
        """Return the tensors of attention with narrower heads, name -> tensor.

        factors: 'k' and 'v' -> L (hs, r) and R^T (r, hs) of each key/value head. c_proj gets a bias
        that compensates for the mean error of the values.
        """
        group = len(self.weights['q']) // len(self.weights['k'])
        (up_k, down_k), (up_v, down_v) = (map(torch.stack, zip(*factors[name])) for name in 'kv')
        up_k, up_v = (up.repeat_interleave(group, dim=0) for up in (up_k, up_v))    # (nh, hs, r)
        cuts = dict(q=up_k.mT, k=down_k, v=down_v)                                  # (heads, r, hs)
        weights = [(cuts[name] @ w.double()).flatten(0, 1) for name, w in self.weights.items()]
        w_o = self.w_o.double()
        tensors = {'c_attn.weight': torch.cat(weights),
                   'c_proj.weight': (w_o @ up_v).transpose(0, 1).flatten(1)}        # (C, nh r)
        if self.bias_o is not None:
            biases = [(b @ cuts[name].mT).flatten() for name, b in self.biases.items()]
            tensors['c_attn.bias'] = torch.cat(biases)
            mean = self.biases['v'].mT                              # without text: inputs of mean 0
            if self.stats['v'].tokens:
                mean = self.stats['v'].mean[..., None]
            mean, kept = (x.repeat_interleave(group, dim=0) for x in (mean, down_v @ mean))
            lost = w_o @ (mean - up_v @ kept)                                       # (nh, C, 1)
            tensors['c_proj.bias'] = self.bias_o + lost.sum(0).squeeze(1)
        return tensors


# --------------------------------------------------------------------------------------------------
# calibration

def calibration_windows(data, tokens, block_size, seed, device):
    """Return random windows of the training split as a list of batches x, y (B, T).

    data: Dataset; tokens: number of tokens, rounded up to whole windows, at most the whole split;
    block_size: tokens per window; seed: seed of the random draw.
    """
    split = data.tokens('train')
    count = math.ceil(min(tokens, len(split)) / block_size)
    starts = data.sample_offsets('train', count, block_size, torch.Generator().manual_seed(seed))
    return [data.windows(split, part.tolist(), block_size, 'train', device)
            for part in starts.split(max(1, BATCH_TOKENS // block_size))]


@contextmanager
def record(modules):
    """Context manager that records modules in forward passes. modules: name -> module. Yields a
    dict, name -> (input, output) of the last forward pass."""
    seen = {}

    def hook(name, module, args, output):
        seen[name] = args[0], output

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_hook(partial(hook, name)))
        yield seen


def calibrate(model, modules, stats, windows, gradient_every):
    """Run windows through the model and add what each module sees to its statistics.

    model: in evaluation mode with frozen parameters; modules: name -> module of the model; stats:
    name -> object with `LayerStats.add`; windows: from `calibration_windows`; gradient_every: every
    how many batches also give loss gradients at the outputs, 0 for none. For a module that returns
    q, k, v, the gradients at k and v are added. The loss is the loss on the text. The Fisher matrix
    uses labels drawn from the model instead. With such labels, losses after the conversion differ
    by 0.001 nats or less.
    """
    with record(modules) as seen:
        for i, (x, y) in enumerate(tracking.brief_bar(windows, desc='calibrate', unit='batch')):
            wants_gradients = bool(gradient_every) and i % gradient_every == 0
            # the graph starts at the embeddings
            start = model.transformer.drop.register_forward_hook(
                lambda module, args, output: output.detach().requires_grad_(wants_gradients))
            with start, torch.set_grad_enabled(wants_gradients):
                loss = model(x, y)[1] * y.numel()
            outputs = {name: output[1:] if isinstance(output, tuple) else (output,)
                       for name, (_, output) in seen.items()}
            wanted = [t for tensors in outputs.values() for t in tensors]
            found = iter(torch.autograd.grad(loss, wanted) if wants_gradients else ())
            for name, (inputs, _) in seen.items():
                # (B, T, m), or per head (B, nh, T, hs)
                g = [t if t.dim() == 3 else t.transpose(1, 2).flatten(2)
                     for t in islice(found, len(outputs[name]))]
                stats[name].add(inputs.detach().flatten(0, 1),
                                torch.cat(g, dim=2).flatten(0, 1) if g else None)

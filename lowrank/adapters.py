"""Find the layers of a model that the options name, and give them low-rank factors, adaptive SVD or
LoRA.

Low-rank layers (layers.py) replace an nn.Linear. Adaptive SVD (adaptive_layer.py) and LoRA
(layers.py) wrap a trained nn.Linear. A model here is a module whose `config` is an AdapterTargets.
The model has the methods get_layer(name) and set_layer(name, layer) for the names in
`config.layer_shapes`.
"""

import difflib

import torch

from lowrank.adaptive_layer import AdaptiveSVDLinear
from lowrank.layers import LoRALinear, svd_factors
from lowrank.spectrum import to_float64


class AdapterTargets:
    """Base class of a configuration that finds the layers its options name.

    The configuration has the fields n_layer, layer_ranks, adaptive_svd* and lora_*. It also has
    `layer_shapes` (layer name -> weight shape (m, n)) and `targets` (word in an option -> name of
    the layer inside a block).
    """

    @property
    def has_lora(self):
        return self.lora_rank is not None

    @property
    def adaptive_layers(self) -> list[str]:
        """Names of the layers with adaptive SVD."""
        block = self.adaptive_svd_target_layer
        blocks = range(self.n_layer) if block < 0 else (block,)
        return self._named('adaptive_svd_targets', blocks, 'attn.') if self.adaptive_svd else []

    @property
    def lora_layers(self) -> list[str]:
        """Names of the layers with LoRA."""
        return self._named('lora_targets', range(self.n_layer)) if self.has_lora else []

    def _named(self, option, blocks, prefix=''):
        valid = {word: part for word, part in self.targets.items() if part.startswith(prefix)}
        words = split_words(option, getattr(self, option), valid)
        return [f'h.{i}.{part}' for i in blocks for word, part in valid.items() if word in words]

    def check_layers(self):
        """Raise ValueError if the options name layers or ranks that the model cannot have."""
        shapes = self.layer_shapes
        for option, less in (('layer_ranks', 0), ('adaptive_svd_ranks', 1)):
            for name, rank in (getattr(self, option) or {}).items():
                if name not in shapes:
                    close = difflib.get_close_matches(name, shapes, 1, 0)[0]
                    raise ValueError(f'{option}={{{name!r}: {rank}}}: no such layer (nearest: '
                                     f'{close!r})')
                most = min(shapes[name]) - less
                if not 1 <= rank <= most:
                    raise ValueError(f'{option}={{{name!r}: {rank}}}: must be 1 to {most}')
        if self.adaptive_svd and self.has_lora:
            raise ValueError(f'lora_rank={self.lora_rank}: cannot be combined with '
                             'adaptive_svd (nearest: --lora_rank=None)')
        if self.adaptive_svd_target_layer >= self.n_layer:
            raise ValueError(f'adaptive_svd_target_layer={self.adaptive_svd_target_layer}: must be '
                             f'0 to {self.n_layer - 1}, or -1 for all')
        for name in (*self.adaptive_layers, *self.lora_layers):
            if name in (self.layer_ranks or {}):
                raise ValueError(f'layer_ranks={{{name!r}: ..}}: is a low-rank layer, '
                                 'which cannot have adaptive SVD or LoRA')
            most = min(shapes[name])
            if self.has_lora and self.lora_rank > most:
                raise ValueError(f'lora_rank={self.lora_rank}: must be 1 to {most} for {name}')


def split_words(option, text, valid) -> list[str]:
    """Split a comma-separated text. Raises ValueError for a word that is not valid."""
    words = [word.strip() for word in text.split(',')]
    for word in words:
        if word not in valid:
            raise ValueError(f'{option}={text!r}: {word!r} is not one of {", ".join(valid)}')
    return words


def inject_adapters(model, from_trained=False):
    """Wrap the layers that model.config names for adaptive SVD and LoRA, in place. With LoRA, all
    other parameters are frozen. from_trained: whether the weights are trained, so that adapters
    start from them as `lora_init` says. If not, adapters start from zero, because their values are
    loaded later."""
    c = model.config
    for name in c.adaptive_layers:
        layer = AdaptiveSVDLinear(model.get_layer(name), c.adaptive_svd_protection)
        if name in (c.adaptive_svd_ranks or {}):
            layer.allocate_factors(c.adaptive_svd_ranks[name])
        model.set_layer(name, layer)
    if c.has_lora:
        model.requires_grad_(False)
    for name in c.lora_layers:
        model.set_layer(name, LoRALinear(
            model.get_layer(name), c.lora_rank, c.lora_alpha or c.lora_rank, c.lora_dropout,
            c.lora_init if from_trained else 'lora'))


def adaptive_layers(model) -> dict[str, AdaptiveSVDLinear]:
    """Return a dict from names in metrics, such as 'block0.attn.c_q', to AdaptiveSVDLinear
    layers."""
    return {'block{}.attn.{}'.format(name.split('.')[1], name.rpartition('.')[2]): layer
            for name, layer in model.transformer.named_modules()
            if isinstance(layer, AdaptiveSVDLinear)}


def lowrank_ranks(model) -> dict[str, int] | None:
    """Return the current value of `adaptive_svd_ranks`: name -> r, or None if no layer is in
    low-rank mode."""
    layers = {name: model.get_layer(name) for name in model.config.adaptive_layers}
    return {name: layer.r for name, layer in layers.items() if layer.r is not None} or None


# --------------------------------------------------------------------------------------------------
# adapters without their model

def standard_lora(model, base=None) -> tuple[dict, dict[str, torch.Tensor]]:
    """Convert the adapters of a model to standard LoRA, which is added to the original weights:
    those before the adapters were trained.

    PiSSA and MiLoRA subtract the initial value of each adapter from the original weights. Their
    conversion doubles the rank, up to full rank, and needs `base`, a model with the original
    weights. Returns the LoRA options, and a dict of tensors such as 'h.0.attn.c_attn.c_q.A' (r, n)
    and 'h.0.attn.c_attn.c_q.B' (m, r). Raises ValueError if the adapters do not belong to the
    weights of `base`.
    """
    c, tensors, rank = model.config, {}, model.config.lora_rank
    for name in c.lora_layers:
        layer = model.get_layer(name)
        A, B = layer.A.weight, layer.B.weight
        if c.lora_init != 'lora':
            A, B = to_standard_lora(layer, base.get_layer(name).weight)
        tensors |= {f'{name}.A': A.detach(), f'{name}.B': B.detach()}
        rank = len(A)
    alpha = (c.lora_alpha or c.lora_rank) * rank / c.lora_rank      # same scale
    return dict(lora_rank=rank, lora_alpha=float(alpha), lora_targets=c.lora_targets), tensors


@torch.no_grad()
def to_standard_lora(layer: LoRALinear, original):
    """Return A' (r', n) and B' (m, r') such that W_0 + s B' A' is the current weight of a
    LoRALinear.

    original: W_0 (m, n), the weight from which the layer was made. s is the layer's scale. PiSSA
    and MiLoRA freeze W = W_0 - s B_0 A_0, where A_0 and B_0 are the first factors. The current
    weight is therefore

        W + s B A = W_0 + s B' A',   B' = [B, B_0],   A' = [A; -A_0],   r' = min(2 r, m, n).

    If 2 r exceeds min(m, n), an SVD reduces B' and A' to that rank. 'lora' freezes W = W_0, so
    A' = A and B' = B. B_0 and A_0 are computed from W_0 - W, because a second SVD of W_0 is not
    bit-identical to the first. Raises ValueError if W_0 - W is not of rank r up to rounding, and
    torch.linalg.LinAlgError if W_0 is not finite.
    """
    w, whole = layer.base.weight, to_float64(original)
    removed = whole - to_float64(w)                                 # (m, n)
    if not removed.any():
        return layer.A.weight.clone(), layer.B.weight.clone()
    b_0, a_0 = svd_factors(removed, slice(layer.rank), layer.scale)
    rest = (removed - layer.scale * b_0 @ a_0).norm() / whole.norm()
    # tolerance: 2 eps relative to W_0 (measured: 0.25 eps). It is at least that of float32, because
    # the layer may have been converted to float64
    if not rest <= 2 * max(torch.finfo(w.dtype).eps, torch.finfo(torch.float32).eps):
        raise ValueError(f'original: is not the weight that the layer was made from: {rest:.1e} '
                         f'of it differs beyond the {layer.rank} components of the adapter')
    a = torch.cat((to_float64(layer.A.weight), -a_0))
    b = torch.cat((to_float64(layer.B.weight), b_0), dim=1)
    if len(a) > min(w.shape):                                       # never above full rank
        b, a = svd_factors(layer.scale * b @ a, slice(None), layer.scale)
    return a.to(w), b.to(w)

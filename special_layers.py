"""
Layers of a GPT that are something else than nn.Linear: products of two (lowrank/layers.py), adaptive SVD
(lowrank/adaptive_layer.py), LoRA (lowrank/lora.py). The options, which layers they mean, and the way into a model; out
of it again: compress_layers.py.
"""

import hashlib
import shlex
from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal

import torch

from lowrank.adaptive_layer import PROTECTIONS, AdaptiveSVDLinear
from lowrank.lora import INITS, LoRALinear, plain_adapter

ATTENTION = {'c_q': 'attn.c_attn.c_q', 'c_k': 'attn.c_attn.c_k', 'c_v': 'attn.c_attn.c_v', 'c_proj': 'attn.c_proj'}
TARGETS = ATTENTION | {'query': 'attn.c_attn.query', 'c_fc': 'mlp.c_fc', 'mlp.c_proj': 'mlp.c_proj'}


@dataclass(kw_only=True)
class LayerConfig:
    """The options among GPTConfig's."""
    layer_ranks: Annotated[dict[str, int] | None, 'layers that are products of two smaller ones -> their rank, like '
                           "{'h.0.mlp.c_fc': 64}; compress.py makes them"] = None
    adaptive_svd: Annotated[bool, 'watch whether gradients attack what layers have learned, and protect it'] = False
    adaptive_svd_target_layer: Annotated[int, 'in this block; -1: in all'] = 0
    adaptive_svd_targets: Annotated[str, "which projections of its attention: of 'c_q,c_k,c_v,c_proj', with MLA of "
                                    "'query,c_proj'"] = 'c_q'
    adaptive_svd_protection: Annotated[Literal[PROTECTIONS], "'left': nothing is written into the protected space; "
                                       "'none': the factors are free (MiLoRA)"] = 'left'
    adaptive_svd_ranks: Annotated[dict[str, int] | None, 'layers that are in low-rank mode -> components that are '
                                  'trained; training sets it'] = None
    lora_rank: Annotated[int | None, 'train adapters of this rank alone, on trained weights; None: everything'] = None
    lora_alpha: Annotated[float | None, 'they count alpha / rank times; None: once'] = None
    lora_dropout: Annotated[float, "dropout of their inputs; of c_v in svd_scope='weight' none"] = 0.0
    lora_targets: Annotated[str, "which layers: of 'c_q,c_k,c_v,c_proj,c_fc,mlp.c_proj', with MLA 'query' for the "
                            'first three'] = 'c_q,c_v'
    lora_init: Annotated[Literal[INITS], "'lora': zero; 'pissa', 'milora': the largest or smallest singular "
                         'components of the weights'] = 'lora'

    @property
    def layer_shapes(self):
        """The layers of a block that options can name -> shape (m, n) of their weight."""
        C, square = self.n_embd, ('query',) if self.use_mla else ('c_q', 'c_k', 'c_v')
        shapes = {f'attn.c_attn.{name}': (C, C) for name in square} | {'attn.c_proj': (C, C)}
        return shapes | {'mlp.c_fc': (4 * C, C), 'mlp.c_proj': (C, 4 * C)}

    def layer_shape(self, name):
        """The same of one by its whole name, like 'h.0.mlp.c_fc'; None: there is no such layer."""
        layer, _, part = name.removeprefix('h.').partition('.')
        known = layer.isdecimal() and name == f'h.{int(layer)}.{part}' and int(layer) < self.n_layer
        return self.layer_shapes.get(part) if known else None

    def check_values(self):
        """Raise ValueError, its message starting with a field's name, for values that no model can have."""
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f'lora_dropout={self.lora_dropout}: must be at least 0 and below 1')
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise ValueError(f'lora_alpha={self.lora_alpha}: must be above 0 (nearest: None)')
        for name, valid in (('adaptive_svd_protection', PROTECTIONS), ('lora_init', INITS)):
            if getattr(self, name) not in valid:
                raise ValueError(f'{name}={getattr(self, name)!r}: unknown (valid: {", ".join(valid)})')

    def check_layers(self):
        """The same for those that this one cannot."""
        for name, rank in (self.layer_ranks or {}).items():
            shape = self.layer_shape(name)
            if shape is None or not 1 <= rank <= min(shape):
                valid = f'must be 1 to {min(shape)}' if shape else "no such layer (nearest: 'h.0.mlp.c_fc')"
                raise ValueError(f'layer_ranks={{{name!r}: {rank}}}: {valid}')
        if self.adaptive_svd and self.lora_rank is not None:
            raise ValueError(f'lora_rank={self.lora_rank}: not together with adaptive_svd (nearest: --lora_rank=None)')
        if not -1 <= self.adaptive_svd_target_layer < self.n_layer:
            raise ValueError(f'adaptive_svd_target_layer={self.adaptive_svd_target_layer}: must be 0 to '
                             f'{self.n_layer - 1}, or -1 for all')
        for name in (*self.adaptive_layers, *self.lora_layers):
            if name in (self.layer_ranks or {}):
                raise ValueError(f'layer_ranks={{{name!r}: ..}}: is a product of two, which nothing can wrap')
        for name in self.lora_layers:
            if not 1 <= self.lora_rank <= min(self.layer_shape(name)):
                raise ValueError(f'lora_rank={self.lora_rank}: must be 1 to {min(self.layer_shape(name))} for {name}')
        for name, r in (self.adaptive_svd_ranks or {}).items():
            shape = self.layer_shape(name)
            if shape is None or not 1 <= r < min(shape):
                valid = f'must be 1 to {min(shape) - 1}' if shape else "no such layer (nearest: 'h.0.attn.c_proj')"
                raise ValueError(f'adaptive_svd_ranks={{{name!r}: {r}}}: {valid}')

    @property
    def adaptive_layers(self):
        """Names, like 'h.0.attn.c_attn.c_q'."""
        if not self.adaptive_svd:
            return []
        blocks = range(self.n_layer) if self.adaptive_svd_target_layer < 0 else [self.adaptive_svd_target_layer]
        return self._named('adaptive_svd_targets', blocks, lambda part: part.startswith('attn.'))

    @property
    def lora_layers(self):
        """The same."""
        return self._named('lora_targets', range(self.n_layer)) if self.lora_rank is not None else []

    def _named(self, option, blocks, wanted=lambda part: True):
        words = [word.strip() for word in getattr(self, option).split(',')]
        valid = {word: part for word, part in TARGETS.items() if part in self.layer_shapes and wanted(part)}
        for word in words:
            if word not in valid:
                raise ValueError(f'{option}={getattr(self, option)!r}: {word!r} is none of {", ".join(valid)}')
        return [f'h.{i}.{part}' for i in blocks for word, part in valid.items() if word in words]


NONE = {field.name: field.default for field in fields(LayerConfig) if field.name != 'layer_ranks'}


def without_effect(options, config):
    """The options, attributes of a LayerConfig, that were given for what a model of `config` does not have."""
    return [name for name in NONE if getattr(options, name) != NONE[name] and name not in ('adaptive_svd', 'lora_rank')
            and not (config.adaptive_svd if name.startswith('adaptive') else config.lora_rank is not None)]


def nearest(name, config, run, anew=''):
    """In brackets, what to do where the model of `config`, in the folder `run`, contradicts an option: merge its
    adapters; without any, `anew`."""
    if name not in NONE:
        return ''
    adapted = config.adaptive_svd or config.lora_rank is not None
    merge = f'python export.py --to=dense {shlex.quote(f"--out_dir={run}")}'
    return f' (nearest: {merge if adapted else anew})'


def describe(model, interval):
    """Lines. interval: steps between analyses."""
    c, trained = model.config, sum(p.numel() for p in model.parameters() if p.requires_grad)
    if c.adaptive_svd:
        yield f'adaptive SVD: {len(c.adaptive_layers)} layers, an analysis every {interval} steps'
    if c.lora_rank is not None:
        yield (f'LoRA, {c.lora_init!r}: rank {c.lora_rank} in {len(c.lora_layers)} layers, {trained:,} trained '
               'parameters')


def install(model, trained=False):
    """Wrap the layers that model.config says, in place. trained: their weights are; else they are loaded later, and
    LoRA's start does not matter."""
    c = model.config
    for name in c.adaptive_layers:
        layer, r = model.get_layer(name), (c.adaptive_svd_ranks or {}).get(name)
        wrapped = AdaptiveSVDLinear(layer, c.adaptive_svd_protection)
        if r is not None:
            wrapped.make_lowrank(r)
        model.set_layer(name, wrapped)
    if c.lora_rank is not None:
        model.requires_grad_(False)
    for name in c.lora_layers:
        layer, options = model.get_layer(name), (c.lora_rank, c.lora_alpha or c.lora_rank, c.lora_dropout)
        wrapped = (LoRALinear.from_linear(layer, *options, c.lora_init) if trained else
                   LoRALinear(layer.in_features, layer.out_features, *options, bias=c.bias))
        model.set_layer(name, wrapped.to(layer.weight))


def add(model, options):
    """`install` into a trained model, if `options` ask for adaptive SVD or LoRA and it has neither. options: of
    LayerConfig, name -> value. Raises ValueError where they do not fit it."""
    c = model.config
    if (options['adaptive_svd'] or options['lora_rank'] is not None) and not c.adaptive_svd and c.lora_rank is None:
        model.config = replace(c, **options | dict(adaptive_svd_ranks=None))
        install(model, trained=True)


def adapters(model, base=None):
    """A LoRA model's adapters as plain ones of the weights they began with: options of LayerConfig, and name -> tensor,
    'h.0.attn.c_attn.c_q.A' (r, n) and '.B' (m, r). base: a model with those weights, which PiSSA and MiLoRA need, whose
    rank doubles. Raises ValueError where they are of other weights."""
    c, tensors, rank = model.config, {}, model.config.lora_rank
    for name in c.lora_layers:
        layer = model.get_layer(name)
        A, B = layer.A.weight, layer.B.weight
        if c.lora_init != 'lora':
            A, B = plain_adapter(layer, base.get_layer(name).weight)
        tensors |= {f'{name}.A': A.detach(), f'{name}.B': B.detach()}
        rank = len(A)
    alpha = (c.lora_alpha or c.lora_rank) * rank / c.lora_rank      # the scale stays
    return dict(lora_rank=rank, lora_alpha=float(alpha), lora_targets=c.lora_targets), tensors


@torch.no_grad()
def base_sha256(model):
    """The checksum of a model's weights without its adapters, for c_attn as one layer or three. Positions do not count,
    which a run may crop."""
    digest, own = hashlib.sha256(), [f'{name}.{part}.weight' for name in model.config.lora_layers for part in 'AB']
    for kind in ('weight', 'bias'):                                 # so the bytes of three are those of one
        for name, w in model.transformer.state_dict().items():
            if name.endswith(kind) and name not in (*own, 'wpe.weight'):
                digest.update(w.float().cpu().contiguous().numpy())
    return digest.hexdigest()


@torch.no_grad()
def load_adapters(model, options, tensors, source=None, whose='this model', say=print):
    """The inverse, in place, on a model with the weights they began with. source: what `read_adapter` says of it;
    whose: the model's name. Raises ValueError where they do not fit."""
    if model.config.adaptive_svd or model.config.lora_rank is not None:
        raise ValueError(f'lora_adapter: {whose} has adapters already{nearest("lora_rank", model.config, whose)}')
    add(model, NONE | options)
    names = [f'{name}.{part}' for name in model.config.lora_layers for part in 'AB']
    if sorted(names) != sorted(tensors):
        raise ValueError(f'lora_adapter: has other layers than {options["lora_targets"]!r} of {model.config.n_layer} '
                         'blocks')
    for name in names:
        weight = model.get_layer(name[:-2]).get_submodule(name[-1]).weight
        if weight.shape != tensors[name].shape:
            raise ValueError(f'lora_adapter: {name} is {tuple(tensors[name].shape)}, must be {tuple(weight.shape)}')
        weight.copy_(tensors[name])
    source = source or {}
    where, base = f'lora_adapter={source.get("folder")!r}', source.get('base', whose)
    if 'base_sha256' not in source:
        say(f'{where}: does not say which weights it was made on')
    elif source['base_sha256'] != base_sha256(model):
        near = '' if base == whose else f' (nearest: {shlex.quote(f"--init_from={base}")})'
        raise ValueError(f'{where}: was made on other weights, of {base}, than {whose} has{near}')


def lowrank_modes(model):
    """`adaptive_svd_ranks` as they are."""
    found = {name: layer.r for name, layer in model.transformer.named_modules() if isinstance(layer, AdaptiveSVDLinear)}
    return {name: r for name, r in found.items() if r is not None} or None


def adaptive_layers(model):
    """Name -> layer, like 'block0.attn.c_q'."""
    found = {name: layer for name, layer in model.transformer.named_modules() if isinstance(layer, AdaptiveSVDLinear)}
    return {'block{}.attn.{}'.format(name.split('.')[1], name.rpartition('.')[2]): layer
            for name, layer in found.items()}

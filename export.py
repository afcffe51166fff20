"""
Take a trained model to where others work:

    python export.py --out_dir=out-svd-test --to=gpt2            # for transformers: AutoModelForCausalLM, AutoTokenizer
    python export.py --out_dir=out-svd-test --to=nanogpt --save_dir=DIR     # ckpt.pt for nanoGPT, meta.pkl for its data
    python export.py --out_dir=out-svd-test --to=safetensors     # any model as it is, for --init_from here
    python export.py --out_dir=out-adaptive-svd --to=dense       # a checkpoint without adaptive SVD or LoRA
    python export.py --out_dir=out-lora --to=lora                # its adapters alone, for --lora_adapter
    python export.py                                             # the newest run below this folder, for transformers
    python export.py --help                                      # every option with default and meaning

For others SVD in 'weight' scope becomes part of the weights, and so do MLA's latents and layers of two factors.
'sequence' and 'causal' cut V itself, which neither of their formats can say.
"""

import pickle
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from runtime import cli                                             # before torch: says what is not installed

import torch

from lowrank.adapters import standard_lora
from lowrank.layers import LowRankLinear, SplitProjection, fuse
from model import GPT, GPTConfig, QKVProjection
from runtime import checkpoint as ckpt
from runtime import config as configuration
from runtime import download, huggingface
from runtime.config import PATH, UserError
from runtime.files import check_save_dir, named, new_folder, unwritable, write_atomically
from runtime.optimizer import restore_optimizer
from tools.model_compression import without_adapters
from train import TrainConfig

NANOGPT_SHAPE = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')
NANOGPT_CONFIG = (
    'out_dir', 'eval_interval', 'log_interval', 'eval_iters', 'eval_only', 'always_save_checkpoint', 'init_from',
    'wandb_log', 'wandb_project', 'wandb_run_name', 'dataset', 'gradient_accumulation_steps', 'batch_size',
    'block_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias', 'learning_rate', 'max_iters', 'weight_decay',
    'beta1', 'beta2', 'grad_clip', 'decay_lr', 'warmup_iters', 'lr_decay_iters', 'min_lr', 'backend', 'device', 'dtype',
    'compile')


@dataclass
class ExportConfig:
    out_dir: Annotated[str | None, 'folder of the run; None: the newest one below this folder', PATH] = None
    to: Annotated[Literal['gpt2', 'nanogpt', 'safetensors', 'dense', 'lora'],
                  "'gpt2': Hugging Face's format; 'nanogpt': its checkpoint; 'safetensors': this repo's own, with all "
                  "that its models can be; 'dense': a checkpoint here, adaptive SVD and LoRA part of the weights; "
                  "'lora': adapters alone"] = 'gpt2'
    base: Annotated[str | None, "'lora' of PiSSA and MiLoRA: weights they began with, as --init_from; None: what the "
                    'run says', PATH] = None
    save_dir: Annotated[str | None, 'folder to make; None: OUT_DIR-gpt2, OUT_DIR-nanogpt, ...', PATH] = None

    def __post_init__(self):
        if self.base is not None and self.to != 'lora':
            raise ValueError(f'base={self.base!r}: nothing looks at it with to={self.to!r} (nearest: --to=lora)')


def main(argv=None):
    """-> exit code: 0 done, 2 wrong input or a full disk (one line on stderr, nothing written), 130 / 143 stopped."""
    return cli.run('export.py', ExportConfig, __doc__, lambda cfg: print(export(cfg)), argv)


def export(cfg):
    """Writes save_dir whole or not at all -> what was written, in words."""
    path = ckpt.find(cfg.out_dir)
    run = named(path.parent)
    save_dir = Path(f'{run}-{cfg.to}' if cfg.save_dir is None else cfg.save_dir)
    check_save_dir(save_dir, run, cfg.to, overwrite=None)
    try:
        saved = ckpt.load(path)
        model = GPT.from_checkpoint(saved)
        merged = [] if cfg.to in ('safetensors', 'lora') else model.config.adaptive_layers + model.config.lora_layers
        model = without_adapters(model) if merged else model
        meta, remarks = ckpt.tokenizer_of(saved, model.config.vocab_size), []
        if meta['vocab_size'] > model.config.vocab_size:            # no more than a guess
            meta = None
            remarks.append('left out: the tokenizer, which is not in the checkpoint; put the meta.pkl of its data set '
                           'into data/DATASET')
        saved['base'] = cfg.base or saved.get('config', {}).get('init_from')
        formats = dict(gpt2=to_gpt2, nanogpt=to_nanogpt, safetensors=to_safetensors, dense=to_dense, lora=to_lora)
        fill = formats[cfg.to](model, saved, meta, remarks)
        with new_folder(save_dir) as folder:
            fill(folder)
            files = {p.name: p.stat().st_size for p in sorted(folder.iterdir())}
    except OSError as e:
        raise unwritable(f'save_dir={str(save_dir)!r}: cannot be written', e) from None
    except ValueError as e:
        raise e if isinstance(e, UserError) else UserError(f'{path}: {e}') from None
    c = model.config
    plain = cfg.to in ('gpt2', 'nanogpt')
    if merged:
        remarks.insert(0, f'merged into the weights: adaptive SVD or LoRA of {len(merged)} layers')
    if plain and c.layer_ranks:
        remarks.insert(0, f'multiplied out: {len(c.layer_ranks)} layers of two factors; the weights are as many as '
                       'before compression')
    if plain and c.use_mla:
        remarks.insert(0, f'multiplied out: latents of {c.latent_dim}; keys and values are cached in full there')
    if plain and c.svd_truncates:
        remarks.insert(0, f'baked into the weights: SVD of W_v, rank {c.svd_rank} of {c.n_embd // c.n_head}')
    readers = dict(gpt2='transformers', nanogpt='nanoGPT', safetensors='--init_from here', dense='all scripts here',
                   lora='--lora_adapter')
    lines = [f'{path}: {saved["iter_num"]} steps, written to {save_dir} for {readers[cfg.to]}']
    return '\n'.join(lines + [f'  {name}: {size:,} bytes' for name, size in files.items()] + remarks)


@torch.no_grad()
def plain_state_dict(model):
    """The state dict of the same model without an SVD, latents or layers of two factors: 'weight' scope becomes part of
    the weights, factors become their products. Raises ValueError for scopes that cut V itself, which no weights do."""
    c, state = model.config, model.state_dict()
    if c.svd_truncates and c.svd_scope != 'weight':
        raise ValueError(f"svd_scope={c.svd_scope!r}: cuts V itself at rank {c.svd_rank}, which no weights do "
                         "(nearest: 'weight' when it is trained, or --to=safetensors)")
    with torch.device('meta'):                                      # only for its names, in their order
        names = GPT(GPTConfig(**asdict(c) | dict(use_svd=False, use_mla=False, layer_ranks=None))).state_dict()
    for i, block in enumerate(model.transformer.h):
        factored = {name: layer for name, layer in block.named_modules() if isinstance(layer, LowRankLinear)}
        dense = {name: (layer.weight, layer.bias) for name, layer in factored.items()}
        for name, (weight, bias) in (dense | {'attn.c_attn': dense_projection(block.attn)}).items():
            state |= {f'transformer.h.{i}.{name}.weight': weight, f'transformer.h.{i}.{name}.bias': bias}
    return {name: state[name] for name in names}


def dense_projection(attn):
    """nanoGPT's c_attn that does what this attention's does: weight (3C, C), and bias, (3C) or None."""
    c_attn = attn.c_attn
    w_v = attn.value_weight().flatten(0, 1)
    if isinstance(c_attn, SplitProjection):
        weight, bias = fuse((c_attn.c_q, c_attn.c_k, c_attn.c_v))
        return torch.cat((*weight.chunk(3)[:2], w_v)), bias
    if isinstance(c_attn, QKVProjection):
        return torch.cat((*c_attn.weight.chunk(3)[:2], w_v)), c_attn.bias
    b = c_attn.query.bias
    weight = torch.cat((c_attn.query.weight, torch.cat((c_attn.k_up.weight, w_v)) @ c_attn.kv_down.weight))
    return weight, None if b is None else torch.cat((b, torch.zeros_like(b), c_attn.v_up.bias))


def to_gpt2(model, saved, meta, remarks):
    """-> function that fills a folder; remarks are added. Raises ValueError."""
    config, state = huggingface.to_gpt2(asdict(model.config), plain_state_dict(model))
    remarks.append('left out: the optimizer state')
    if meta and meta['tokenizer'] == 'gpt2':
        config |= dict(bos_token_id=meta['vocab_size'] - 1, eos_token_id=meta['vocab_size'] - 1)    # <|endoftext|>
        try:
            download.gpt2_encoding()
        except UserError as e:
            meta = None
            remarks.append(f'left out: the tokenizer, which is that of gpt2 on the hub ({e})')
    return lambda folder: huggingface.write(folder, config, state, meta)


def to_safetensors(model, saved, meta, remarks):
    """-> function that fills a folder; remarks are added."""
    config, state = huggingface.to_own(asdict(model.config), model.state_dict())
    remarks.append('left out: the optimizer state' + ('' if model.svd_basis is None else ', and the basis from which '
                                                      "'randomized' starts"))
    return lambda folder: huggingface.write(folder, config, state, meta)


def to_lora(model, saved, meta, remarks):
    """-> function that fills a folder; remarks are added. Raises ValueError."""
    c, base = model.config, None
    if c.lora_rank is None:
        raise ValueError('has no LoRA (nearest: --to=safetensors)')
    if c.lora_init != 'lora':
        if saved['base'] in ('resume', None):
            raise ValueError(f'lora_init={c.lora_init!r}: needs the weights it began with, which a resumed run does '
                             'not name (nearest: --base=FOLDER)')
        base = GPT.from_pretrained(saved['base'])
        remarks.append(f'{c.lora_init!r} of rank {c.lora_rank} as plain LoRA for the weights of {saved["base"]}')
    options, tensors = standard_lora(model, base)
    notes = dict(base_sha256=huggingface.base_sha256(base or model))
    if saved['base'] not in ('resume', None):
        notes['base'] = saved['base']
    return lambda folder: huggingface.write(folder, dict(model_type=huggingface.ADAPTER, adapter=options), tensors, None,
                                           **notes)


def to_dense(model, saved, meta, remarks):
    """-> function that fills a folder; remarks are added."""
    args = asdict(model.config)
    optimizer = model.configure_optimizers(1e-1, 6e-4, (0.9, 0.95), 'cpu')                      # of step 0
    kept = {key: saved[key] for key in ('iter_num', 'best_val_loss', 'tokenizer', 'svd_basis') if key in saved}
    checkpoint = kept | dict(model=model.state_dict(), optimizer=optimizer.state_dict(), model_args=args,
                             config=saved.get('config', {}) | args)
    remarks.append('left out: the optimizer state')
    return lambda folder: ckpt.save(checkpoint, folder / 'ckpt.pt')


def to_nanogpt(model, saved, meta, remarks):
    """-> function that fills a folder; remarks are added. Raises ValueError."""
    c, chars = model.config, meta and meta.get('chars')
    if c.gelu != 'exact':
        raise ValueError(f"gelu={c.gelu!r}: nanoGPT has only 'exact' (nearest: --to=gpt2)")
    old, args = saved.get('config', {}), {key: getattr(c, key) for key in NANOGPT_SHAPE}
    dataset = Path(str(old.get('dataset', ''))).name.removesuffix('.txt') or 'DATASET'
    config = {key: old[key] for key in NANOGPT_CONFIG if key in old} | dict(dataset=dataset)
    checkpoint = dict(model=plain_state_dict(model), optimizer=adamw_state(model, saved, remarks), model_args=args,
                      iter_num=saved['iter_num'], best_val_loss=float(saved.get('best_val_loss', 1e9)),
                      config=config | {key: value for key, value in args.items() if key in NANOGPT_CONFIG})
    if meta:
        checkpoint['tokenizer'] = meta                              # nanoGPT does not look, this repo does
    if chars:
        remarks.append(f'nanoGPT looks for meta.pkl as data/{dataset}/meta.pkl: put it there')

    def fill(folder):
        ckpt.save(checkpoint, folder / 'ckpt.pt')
        if chars:
            content = dict(vocab_size=len(chars), itos=dict(enumerate(chars)), stoi={c: i for i, c in enumerate(chars)})
            write_atomically(folder / 'meta.pkl', pickle.dumps(content))
    return fill


def adamw_state(model, saved, remarks):
    """The state dict of nanoGPT's optimizer: the run's own if it was AdamW, on these weights, else one of step 0."""
    options = dict(weight_decay=1e-1, learning_rate=6e-4, beta1=0.9, beta2=0.95)
    options |= configuration.check_all(TrainConfig, {k: v for k, v in saved.get('config', {}).items() if k in options},
                                       saved['path'])
    betas = options['beta1'], options['beta2']
    fresh, own = (model.configure_optimizers(options['weight_decay'], options['learning_rate'], betas, 'cpu')
                  for _ in range(2))
    try:
        c, merged = model.config, model.state_dict().keys() != saved['model'].keys()
        if c.svd_truncates or c.use_mla or c.layer_ranks or merged:
            raise ValueError('it belongs to the weights before that')
        if 'optimizer' not in saved:
            raise ValueError('the checkpoint has none')
        if 'muon' in saved['optimizer']:
            raise ValueError("it is Muon's")
        restore_optimizer(own, saved['optimizer'], saved['iter_num'], cropped=None)
        return own.state_dict()
    except ValueError as e:
        remarks.append(f'left out: the optimizer state ({e}); nanoGPT starts its AdamW anew')
        return fresh.state_dict()


if __name__ == '__main__':
    sys.exit(main())

"""
The formats that export.py writes. Each function in FORMATS writes a run to an empty folder:

    to_gpt2(folder, model, saved, meta, lines)

model: the GPT of the run, which cannot be used afterwards; saved: the checkpoint of the run, in
which 'base' names the weights that the adapters started from; meta: the metadata of the run's
tokenizer, or None; lines: a list to which messages for the user are appended. The functions raise
ValueError if the format cannot represent the model, UserError if a package is missing, and OSError.
"""

import pickle
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.nn import functional as F

from lowrank.adapters import standard_lora
from lowrank.layers import linear_from_tensors
from model import GPT, LatentProjection
from runtime import checkpoint as ckpt
from runtime import huggingface
from runtime.config import UserError
from runtime.data import has_end
from runtime.files import write_atomically
from tools.model_compression import dense_layers, without_adapters

NANOGPT_SHAPE = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')
NANOGPT_CONFIG = (
    'out_dir', 'eval_interval', 'log_interval', 'eval_iters', 'eval_only', 'always_save_checkpoint',
    'init_from', 'wandb_log', 'wandb_project', 'wandb_run_name', 'dataset',
    'gradient_accumulation_steps', 'batch_size', 'block_size', 'n_layer', 'n_head', 'n_embd',
    'dropout', 'bias', 'learning_rate', 'max_iters', 'weight_decay', 'beta1', 'beta2', 'grad_clip',
    'decay_lr', 'warmup_iters', 'lr_decay_iters', 'min_lr', 'backend', 'device', 'dtype', 'compile')


# --------------------------------------------------------------------------------------------------
# models and optimizers

@torch.no_grad()
def plain_model(model):
    """Convert a model to a nanoGPT model with the same outputs.

    Low-rank layers, adapters, the latents of MLA, and the SVD in scope 'weight' become part of the
    weights. Key/value heads are repeated for each query head. Narrower heads and MLPs are filled up
    with zeros. The given model cannot be used afterwards. Raises ValueError for scopes that
    truncate V itself, because no weights have the same effect.
    """
    c = model.config
    if c.svd_truncates and c.svd_scope != 'weight':
        raise ValueError(f"svd_scope={c.svd_scope!r}: truncates {c.svd_names} itself, "
                         "which no weights can represent (nearest: 'weight', set before training, "
                         'or --to=safetensors)')
    dense_layers(model, c.layer_ranks or ())
    model = without_adapters(model)                                 # also fuses c_attn again
    like = model.lm_head.weight
    for attn in (block.attn for block in model.transformer.h):
        w_o = attn.c_proj.weight.unflatten(1, (c.n_head, -1))       # (C, nh, width of v)
        w_o = F.pad(w_o, (0, c.head_size - w_o.size(2))).flatten(1)
        attn.c_attn = linear_from_tensors(*dense_projection(attn, c), like)
        attn.c_proj = linear_from_tensors(w_o, attn.c_proj.bias, like)
    for mlp in (block.mlp for block in model.transformer.h if c.mlp_dim):
        w, b = mlp.c_fc.weight, mlp.c_fc.bias                       # (neurons, C), (neurons)
        more = 4 * c.n_embd - len(w)
        mlp.c_fc = linear_from_tensors(F.pad(w, (0, 0, 0, more)),
                                       None if b is None else F.pad(b, (0, more)), like)
        mlp.c_proj = linear_from_tensors(F.pad(mlp.c_proj.weight, (0, more)), mlp.c_proj.bias, like)
    plain = GPT(replace(model.config, use_svd=False, use_mla=False, n_kv_head=None,
                        qk_head_dim=None, v_head_dim=None, mlp_dim=None)).to(like)
    plain.load_state_dict(model.state_dict())
    return plain


def dense_projection(attn, c):
    """Return the weight (3C, C) and the bias (3C) of a nanoGPT c_attn with the same outputs. The
    bias may be None. c: configuration of the model."""
    weights, biases = [], []
    for name in 'qkv':
        w, bias = attn.head_weight(name), attn.c_attn.head_bias(name)   # (heads, width, C or d)
        if isinstance(attn.c_attn, LatentProjection) and name != 'q':
            w = w @ attn.c_attn.kv_down.weight
        bias = w.new_zeros(*w.shape[:2], 1) if bias is None else bias.mT        # (heads, width, 1)
        for parts, x in ((weights, w), (biases, bias)):
            x = F.pad(x, (0, 0, 0, c.head_size - x.size(1)))        # (heads, hs, C or 1)
            parts.append(x.repeat_interleave(c.n_head // len(x), dim=0).flatten(0, 1))
    return torch.cat(weights), torch.cat(biases).squeeze(1) if c.bias else None


def changes(c, to):
    """Return messages about what becomes part of the weights of a model with configuration c."""
    plain, adapted = to in ('gpt2', 'nanogpt'), len(c.adaptive_layers + c.lora_layers)
    return [line for applies, line in (
        (plain and c.svd_truncates,
         'merged into the weights: SVD of ' + ', '.join(
             f'W_{name}, rank {rank} of {c.head_size}' for name, rank in c.svd_ranks.items())),
        (plain and c.is_grouped, f'repeated: {c.n_kv_head} key/value heads for {c.n_head} query '
                                'heads; the exported model caches full keys and values'),
        (plain and (c.qk_head_dim or c.v_head_dim),
         'filled up with zeros: narrower heads; the exported model caches full keys and values'),
        (plain and c.mlp_dim, 'filled up with zeros: the neurons that the MLPs lack'),
        (plain and c.use_mla, f'multiplied out: latents of {c.latent_summary} values; the exported '
                              'model caches full keys and values'),
        (plain and c.layer_ranks, f'multiplied out: {len(c.layer_ranks or ())} low-rank layers; '
                                  'the exported model has as many parameters as before '
                                  'compression'),
        (adapted and (plain or to == 'dense'), 'merged into the weights: adaptive SVD or LoRA of '
                                               f'{adapted} layers')) if applies]


def new_adamw(model, saved):
    """Return the state dict of a new AdamW for the model. Its options come from the config of the
    checkpoint `saved`. Options that are missing there get nanoGPT's defaults."""
    c = dict(weight_decay=1e-1, learning_rate=6e-4, beta1=0.9, beta2=0.95) | saved.get('config', {})
    return model.configure_optimizers(c['weight_decay'], c['learning_rate'],
                                      (c['beta1'], c['beta2']), 'cpu').state_dict()


# --------------------------------------------------------------------------------------------------
# formats

def to_gpt2(folder, model, saved, meta, lines):
    """Write GPT-2 for Hugging Face's transformers."""
    plain = plain_model(model)
    huggingface.write_gpt2(folder, asdict(plain.config), plain.state_dict(),
                           end=meta['vocab_size'] - 1 if meta and has_end(meta) else None)
    lines.append('left out: the optimizer state')
    try:
        if meta:
            huggingface.write_tokenizer(folder, meta, plain.config.block_size)
    except UserError as e:                                          # no tiktoken, or no network
        lines.append(f"left out: the tokenizer ({e}); its tokens are those of 'gpt2' on Hugging "
                     "Face's hub")


def to_safetensors(folder, model, saved, meta, lines):
    """Write safetensors for --init_from of this repo: any model, unchanged."""
    huggingface.write(folder, dict(model_type=huggingface.OWN, model_args=asdict(model.config),
                                   tokenizer=meta), model.state_dict())
    lines.append('left out: the optimizer state' + (
        ", and the bases for warm starts of 'randomized'" if model.extra_state() else ''))


def to_lora(folder, model, saved, meta, lines):
    """Write only the adapters, as standard LoRA, for --lora_adapter of this repo."""
    c, original = model.config, None
    base = None if saved['base'] == 'resume' else saved['base']
    if c.lora_rank is None:
        raise ValueError("to='lora': the model has no LoRA adapters (nearest: --to=safetensors)")
    if c.lora_init != 'lora':
        if base is None:
            raise ValueError(f'lora_init={c.lora_init!r}: export needs the weights from before '
                             'training, and this run was resumed and does not record where they '
                             'are (nearest: --base=FOLDER)')
        original = GPT.from_pretrained(base)
        lines.append(f'converted: {c.lora_init!r} of rank {c.lora_rank} to standard LoRA for '
                     f'the weights of {base}')
    options, tensors = standard_lora(model, original)
    notes = dict(base=base) if base else {}
    huggingface.write(folder, dict(model_type=huggingface.ADAPTER, adapter=options), tensors,
                      base_sha256=huggingface.base_sha256(original or model), **notes)


def to_dense(folder, model, saved, meta, lines):
    """Write a checkpoint without adapters for all commands of this repo."""
    model = without_adapters(model)
    args = asdict(model.config)
    kept = {key: saved[key] for key in ('iter_num', 'best_val_loss', 'tokenizer')
            if key in saved} | model.extra_state()
    ckpt.save(kept | dict(
        model=model.state_dict(), optimizer=new_adamw(model, {}), model_args=args,
        config=saved.get('config', {}) | args), folder / 'ckpt.pt')
    lines.append('left out: the optimizer state')


def to_nanogpt(folder, model, saved, meta, lines):
    """Write ckpt.pt for nanoGPT, and meta.pkl if the tokens are characters."""
    c = model.config
    if c.gelu != 'exact':
        raise ValueError(f"gelu={c.gelu!r}: nanoGPT has only 'exact' (nearest: --to=gpt2)")
    plain, optimizer = plain_model(model), saved.get('optimizer', {})
    weights = plain.state_dict()
    shapes = [{name: w.shape for name, w in state.items()} for state in (weights, saved['model'])]
    if c.svd_truncates or shapes[0] != shapes[1] or 'state' not in optimizer:
        optimizer = new_adamw(plain, saved)
        lines.append("left out: the optimizer state, because it is Muon's or belongs to other "
                     'weights; nanoGPT starts with a new AdamW state')
    args, old = {key: getattr(c, key) for key in NANOGPT_SHAPE}, saved.get('config', {})
    for group in optimizer['param_groups']:
        group['lr'] = old.get('learning_rate', group['lr'])         # not the decayed rate
    dataset = Path(str(old.get('dataset', ''))).name.removesuffix('.txt') or 'DATASET'
    config = {key: value for key, value in (old | args).items() if key in NANOGPT_CONFIG}
    kept = dict(tokenizer=meta) if meta else {}                     # nanoGPT ignores it
    ckpt.save(kept | dict(
        model=weights, optimizer=optimizer, model_args=args, iter_num=saved['iter_num'],
        best_val_loss=float(saved.get('best_val_loss', 1e9)),
        config=config | dict(dataset=dataset)), folder / 'ckpt.pt')
    if meta and meta['tokenizer'] == 'char':
        ids = {char: i for i, char in enumerate(meta['chars'])}
        content = dict(vocab_size=len(ids), itos=dict(enumerate(ids)), stoi=ids)
        write_atomically(folder / 'meta.pkl', pickle.dumps(content))
        lines.append(f'nanoGPT reads meta.pkl from data/{dataset}/meta.pkl, so move it there')


FORMATS = dict(gpt2=(to_gpt2, 'transformers'), nanogpt=(to_nanogpt, 'nanoGPT'),
               safetensors=(to_safetensors, '--init_from of this repo'),
               dense=(to_dense, 'all commands of this repo'), lora=(to_lora, '--lora_adapter'))

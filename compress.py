"""
Make a trained model smaller without training it again:

    python compress.py --to=mla --mla_latent_dim=32 --out_dir=OUT           # ordinary attention to MLA, into OUT-mla
    python compress.py --init_from=gpt2 --dataset=my.txt --to=mla           # or a folder in Hugging Face's format
    python train.py config/finetune_mla.py --out_dir=OUT-mla                # fine-tune the result, for 120 steps
    python compress.py --help                                               # every option with default and meaning

Keys and values of each layer, [W_k; W_v] x, become [U_k; U_v] W_a x, of which only the latent W_a x is cached. The
factors are the best ones for what the loss makes of their errors on the training split (lowrank/compression.py).
"""

import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import torch
from tqdm import tqdm

from lowrank.compression import factor
from model import GPT, GPTConfig
from runtime import checkpoint as ckpt
from runtime import config as configuration
from runtime import device as devices
from runtime import pretrained
from runtime.config import UserError, one_line
from runtime.dataset import GPT2_META, Dataset, locate
from runtime.evaluation import Evaluation
from runtime.files import new_folder
from runtime.output import unfailing_output
from runtime.run import lock, move_aside
from runtime.stopping import Stop
from train import check_tokenizer

BATCH_TOKENS = 4096                 # of a forward pass


@dataclass
class CompressConfig:
    to: Annotated[Literal['mla'], "'mla': multi-head latent attention, one latent a token for keys and values"] = 'mla'
    mla_latent_dim: Annotated[int | None, 'numbers in a latent, at most n_embd; None: n_embd / 4'] = None
    method: Annotated[Literal['activation', 'plain'],
                      "'activation': errors count as far as the loss feels them on the training split; 'plain': SVD "
                      'of the weights'] = 'activation'
    init_from: Annotated[str, "'resume' (a run's checkpoint), GPT-2 weights ('gpt2', 'gpt2-medium', 'gpt2-large', "
                         "'gpt2-xl') or a folder in Hugging Face's GPT-2 format"] = 'resume'
    out_dir: Annotated[str | None, 'folder of the run; None: the newest one below this folder'] = None
    save_dir: Annotated[str | None, 'folder to make; None: OUT_DIR-mla, or INIT_FROM-mla'] = None
    overwrite: Annotated[bool, 'a run in save_dir moves to SAVE_DIR.1, .2, ...; False: it is refused'] = False
    dataset: Annotated[str | None, "as for train.py; None: the run's"] = None
    calibration_tokens: Annotated[int, 'training tokens to measure on, in whole windows; at most all'] = 16384
    seed: Annotated[int, 'of the windows'] = 1337
    device: Annotated[str, "'auto' (cuda, then mps, then cpu), 'cpu', 'cuda', 'cuda:1', 'mps'"] = 'auto'

    def __post_init__(self):
        pretrained.check_name(self.init_from, ('resume',))
        configuration.at_least(self, mla_latent_dim=1, calibration_tokens=1, seed=0)
        if self.seed >= 2 ** 63:
            raise ValueError(f'seed={self.seed}: must be below 2**63')
        if self.init_from != 'resume' and self.dataset is None:
            raise ValueError(f'init_from={self.init_from}: needs a text to measure on (nearest: --dataset=my.txt)')
        if self.init_from != 'resume' and self.out_dir is not None:
            raise ValueError(f'out_dir={self.out_dir!r}: not together with init_from={self.init_from!r}')


def main(argv=None):
    """-> exit code: 0 done, 2 wrong input or a full disk (one line on stderr, nothing written), 130 / 143 stopped."""
    argv = sys.argv[1:] if argv is None else argv
    if '--help' in argv or '-h' in argv:
        print(configuration.help_text(CompressConfig, __doc__.strip()))
        return 0
    try:
        with unfailing_output(), Stop(under_torchrun=False):
            cfg, _ = configuration.load(CompressConfig, argv)
            print(describe(compress(cfg)))
        return 0
    except UserError as e:
        print(f'compress.py: {e}', file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        return 128 + getattr(e, 'signal', signal.SIGINT)


def compress(cfg):
    """Writes save_dir whole or not at all -> a dict of what it cost and saved, see `describe`."""
    path = ckpt.find(cfg.out_dir) if cfg.init_from == 'resume' else Path(cfg.init_from)
    run = path.parent if cfg.init_from == 'resume' else path
    run = run if run.name not in ('', '..') else Path(os.path.realpath(run))
    save_dir = Path(f'{run}-{cfg.to}' if cfg.save_dir is None else cfg.save_dir)
    check_save_dir(save_dir, run, cfg.overwrite)
    try:
        saved, model = load_model(cfg, path)
        data = find_data(cfg, saved, model)
        new, report = convert(cfg, model, data)
        if not math.isfinite(report['val_loss'][1]):
            raise UserError(f'{path}: after the conversion the loss is {report["val_loss"][1]}')
        save(checkpoint_of(new, saved, data, cfg, save_dir, report['val_loss'][1]), save_dir, cfg.overwrite)
    except OSError as e:
        raise UserError(f'{e.filename or path}: {e.strerror or one_line(e)}') from None
    except (ValueError, FloatingPointError, torch.linalg.LinAlgError) as e:
        words = one_line(e) if cfg.init_from != 'resume' else f'{path}: {one_line(e)}'
        raise e if isinstance(e, UserError) else UserError(words) from None
    return report | dict(path=str(path), save_dir=str(save_dir))


def convert(cfg, model, data):
    """-> the new model, on the CPU, and what it cost and saved. The loss is the prefix-only one where V sees the
    future."""
    device = devices.pick_device(cfg.device)
    target = GPTConfig(**asdict(model.config) | dict(use_mla=True, mla_latent_dim=cfg.mla_latent_dim))
    target.mla_latent_dim = target.latent_dim                       # the number itself, for model_args to say it
    model.to(device).eval().requires_grad_(False)
    before = loss_of(model, data, device, cfg.seed)
    started = time.perf_counter()
    statistics = None if cfg.method == 'plain' else calibrate(model, data, cfg, device)
    new = to_mla(model, target, statistics).to(device).eval()
    seconds = time.perf_counter() - started
    losses = before, loss_of(new, data, device, cfg.seed)
    costs = {name: (cost(model), cost(new)) for name, cost in
             dict(attention_params=GPT.attention_params, parameters=GPT.get_num_params,
                  cache_bytes=lambda m: m.kv_cache_bytes(1, m.config.block_size)).items()}
    return new.cpu(), dict(method=cfg.method, latent_dim=target.latent_dim, block_size=target.block_size,
                           seconds=seconds, val_loss=losses, prefix_only=model.config.svd_sees_future, **costs)


def describe(report):
    """The report in words."""
    names = dict(attention_params='parameters of attention', parameters='parameters',
                 cache_bytes=f'cache bytes at {report["block_size"]} tokens')
    lines = [f'{report["path"]}: keys and values of each layer from a latent of {report["latent_dim"]} numbers, method '
             f'{report["method"]!r}, {report["seconds"]:.1f} s']
    which = 'prefix-only val loss' if report['prefix_only'] else 'val loss'
    lines += [f'  {which}: {report["val_loss"][0]:.4f} before, {report["val_loss"][1]:.4f} after']
    lines += [f'  {word}: {report[name][0]:,} before, {report[name][1]:,} after' for name, word in names.items()]
    return '\n'.join([*lines, f'written to {report["save_dir"]}'])


# ----------------------------------------------------------------------------------------------------------------------
# in and out

def check_save_dir(save_dir, run, overwrite):
    """Raises UserError for a folder that must not be replaced, before any work is done."""
    real, own = (Path(os.path.realpath(folder)) for folder in (save_dir, run))
    where = f'save_dir={str(save_dir)!r}'
    try:
        if real in (Path.cwd(), *Path.cwd().parents):
            raise UserError(f"{where}: must be another folder than this one (nearest: '{save_dir / 'mla'}')")
        if real in (own, *own.parents):
            raise UserError(f"{where}: has the model itself in it (nearest: '{run}-mla')")
        free = not os.path.lexists(save_dir) or os.path.isdir(save_dir) and not any(save_dir.iterdir())
        a_run = (save_dir / 'ckpt.pt').exists()
    except OSError as e:
        raise UserError(f'{where}: cannot be used: {e.strerror}') from None
    if not free and not (overwrite and a_run):
        raise UserError(f"{where}: is there already, and no empty folder (nearest: '{save_dir}-2'"
                        + (', or --overwrite=True, which moves it aside)' if a_run else ')'))


def save(checkpoint, save_dir, overwrite):
    """Write save_dir/ckpt.pt; a run that is there is moved aside when everything else is done. Raises UserError where
    that goes on, or the disk does not take it."""
    try:
        held = lock(save_dir, 'save_dir') if overwrite and os.path.isdir(save_dir) else None
        try:
            with new_folder(save_dir) as folder:
                ckpt.save(checkpoint, folder / 'ckpt.pt')
                if overwrite:
                    move_aside(save_dir, print)
        finally:
            if held is not None:
                os.close(held)
    except OSError as e:
        raise UserError(f'save_dir={str(save_dir)!r}: cannot be written: {e.strerror or one_line(e)}') from None


def load_model(cfg, path):
    """The checkpoint, an empty dict for GPT-2's weights, and its model."""
    if cfg.init_from != 'resume':
        return {}, GPT.from_pretrained(cfg.init_from)
    saved = ckpt.load(path)
    configuration.check_all(GPTConfig, saved['model_args'], path)
    model = GPT.from_checkpoint(saved)
    if model.config.use_mla:
        raise UserError(f'{path}: is MLA already, with latents of {model.config.latent_dim} numbers (nearest: the run '
                        'it was made from)')
    return saved, model


def find_data(cfg, saved, model):
    """The data set to measure on. Raises UserError unless it is in the model's tokens and long enough."""
    c, name = model.config, cfg.dataset or str(saved.get('config', {}).get('dataset', ''))
    if not name:
        raise UserError(f'{saved["path"]}: does not say what it was trained on (nearest: --dataset=my.txt)')
    meta = saved.get('tokenizer', {}) if saved else pretrained.read_tokenizer(cfg.init_from) or GPT2_META
    tokenizer = meta.get('tokenizer', 'char' if c.vocab_size < GPT2_META['vocab_size'] else 'gpt2')
    data = Dataset(locate(name, tokenizer))
    check_tokenizer(SimpleNamespace(dataset=name, init_from=cfg.init_from), {}, saved, data, print)
    if data.vocab_size > c.vocab_size:
        raise UserError(f'dataset={name}: has {data.vocab_size} token ids, the model {c.vocab_size}')
    for split, least in (('train', c.block_size + 1), ('val', c.block_size + 1 if c.svd_sees_future else 2)):
        if len(data.tokens(split)) < least:
            raise UserError(f'dataset={name}: its {split}.bin has {len(data.tokens(split))} tokens, too few for '
                            f'block_size={c.block_size} (nearest: {least})')
    return data


def loss_of(model, data, device, seed):
    """Over the whole validation split, the prefix-only one where that differs."""
    c = model.config
    windows = SimpleNamespace(batch_size=1, block_size=c.block_size, seed=seed)
    row = Evaluation(windows, model, data, device, devices.autocast(device, 'float32'), c.svd_sees_future).final()
    return row.get('val/prefix_loss', row['val/loss'])


def checkpoint_of(new, saved, data, cfg, save_dir, loss):
    """A checkpoint from which training starts at step 0, with the run's own settings and a fresh optimizer."""
    args = asdict(new.config)
    config = saved.get('config', {}) | args | dict(out_dir=str(save_dir), tokenizer=data.meta['tokenizer'])
    if cfg.dataset:
        config['dataset'] = cfg.dataset
    optimizer = new.configure_optimizers(weight_decay=1e-1, learning_rate=6e-4, betas=(0.9, 0.95), device_type='cpu')
    return dict(model=new.state_dict(), optimizer=optimizer.state_dict(), model_args=args, iter_num=0,
                best_val_loss=loss, config=config, tokenizer=saved.get('tokenizer', data.meta),
                **({} if new.svd_basis is None else {'svd_basis': new.svd_basis}))


# ----------------------------------------------------------------------------------------------------------------------
# statistics

class Statistics:
    """Sums over calibration tokens of one attention layer, float64 on the CPU: of its inputs x (N, C) and of the loss's
    gradients g (N, 2C) at its keys and values."""

    def __init__(self):
        self.tokens, self.input_sum, self.inputs, self.gradients = 0, 0, 0, 0

    def add(self, x, g):
        """x (N, C), g (N, 2C)."""
        x, g = x.cpu().double(), g.cpu().double()                   # MPS has no float64
        self.tokens += len(x)
        self.input_sum = self.input_sum + x.sum(0)                  # (C)
        self.inputs = self.inputs + x.mT @ x                        # (C, C)
        self.gradients = self.gradients + g.mT @ g                  # (2C, 2C)


def calibrate(model, data, cfg, device):
    """`Statistics` of every layer over random windows of the training split. The gradients are those of the loss on the
    text itself; with labels drawn from the model, as the Fisher matrix has it, losses differ by 0.001 nats or less (two
    models, 32,768 tokens, a latent of 32 or 16 numbers for 256)."""
    T, layers = model.config.block_size, [Statistics() for _ in model.transformer.h]
    tokens = min(cfg.calibration_tokens, len(data.tokens('train')))
    starts = data.draw('train', math.ceil(tokens / T), T, torch.Generator().manual_seed(cfg.seed))
    batches = starts.split(max(1, BATCH_TOKENS // T))
    seen = {}
    model.eval()                                                    # an evaluation leaves it in training mode

    def look(attention, args, qkv, layer):
        q, k, v = qkv                                               # (B, nh, T, hs) each
        probes = [torch.zeros_like(t, requires_grad=True) for t in (k, v)]                      # what is added to k, v
        seen[layer] = args[0], probes
        return q, *(t + probe for t, probe in zip((k, v), probes))

    hooks = [block.attn.c_attn.register_forward_hook(lambda *args, layer=layer: look(*args, layer))
             for layer, block in enumerate(model.transformer.h)]
    try:
        for batch in tqdm(batches, desc='calibrate', unit='batch', leave=False, disable=None):
            x, y = data.windows(data.tokens('train'), batch.tolist(), T, 'train', device)
            loss = model(x, y)[1] * y.numel()
            gradients = iter(torch.autograd.grad(loss, [p for inputs, probes in seen.values() for p in probes]))
            for (inputs, _), statistics in zip(seen.values(), layers):
                g = torch.cat([next(gradients).transpose(1, 2).flatten(2) for _ in 'kv'], dim=2)    # (B, T, 2C)
                statistics.add(inputs.detach().flatten(0, 1), g.flatten(0, 1))
    finally:
        for hook in hooks:
            hook.remove()
    return layers


# ----------------------------------------------------------------------------------------------------------------------
# ordinary attention -> MLA

@torch.no_grad()
def to_mla(model, target, statistics):
    """The model with the configuration `target`, whose keys and values come from latents. statistics: of each layer, or
    None for the SVD of the weights."""
    model.cpu()
    state = model.state_dict()
    new = GPT(target).to(state['lm_head.weight'].dtype)
    for i, block in enumerate(tqdm(model.transformer.h, desc='convert', unit='layer', leave=False, disable=None)):
        prefix = f'transformer.h.{i}.attn.c_attn.'
        parts = latent_projection(block.attn, target.latent_dim, statistics and statistics[i])
        state = {name: w for name, w in state.items() if not name.startswith(prefix)}
        state |= {prefix + name: part for name, part in parts.items()}
    new.load_state_dict(state)
    new.svd_basis = model.svd_basis
    return new


def latent_projection(attn, latent_dim, statistics):
    """State dict of the `LatentProjection` in the place of a `QKVProjection`, biases where that has them.

    A bias can take the mean error, so only the covariance of the inputs counts then, else their second moment. A key's
    bias changes no attention weight. 'weight' scope: factors of the W_v that it leaves, whose rank theirs does not
    exceed, so that it finds nothing more to cut."""
    W_q, W_k, W_v = attn.c_attn.weight.double().chunk(3)            # (C, C) each
    bias = attn.c_attn.bias
    if attn.svd_scope == 'weight':
        W_v = attn.value_weight().flatten(0, 1).double()
    mean = inputs = gradients = None
    if statistics:
        mean = statistics.input_sum / statistics.tokens             # (C)
        inputs, gradients = statistics.inputs / statistics.tokens, statistics.gradients / statistics.tokens
        if bias is not None:
            inputs = inputs - torch.outer(mean, mean)
    up, down = factor(torch.cat((W_k, W_v)), latent_dim, inputs, gradients)                     # (2C, d), (d, C)
    k_up, v_up = up.chunk(2)
    parts = {'query.weight': W_q, 'kv_down.weight': down, 'k_up.weight': k_up, 'v_up.weight': v_up}
    if bias is not None:
        b_q, _, b_v = bias.double().chunk(3)
        parts |= {'query.bias': b_q, 'v_up.bias': b_v if mean is None else b_v + (W_v - v_up @ down) @ mean}
    return parts


if __name__ == '__main__':
    sys.exit(main())

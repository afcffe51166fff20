"""
Make a trained model smaller without training it again:

    python compress.py --out_dir=OUT --keep=0.6                  # weights of the blocks as products, 60% of the numbers
    python compress.py --out_dir=OUT --keep=0.4 --finetune_iters=300        # and train the factors to agree with it
    python compress.py --out_dir=OUT --rank=64 --modules=mlp --method=plain # both layers of the MLP at rank 64, by SVD
    python compress.py --spectrum --out_dir=OUT                  # singular values: a table, a figure and a CSV file
    python compress.py --to=mla --mla_latent_dim=32 --out_dir=OUT           # ordinary attention to MLA
    python compress.py --init_from=gpt2 --dataset=my.txt --keep=0.8         # or a folder with safetensors
    python compress.py --help                                    # every option with default and meaning

SAVE_DIR (default: OUT-lowrank, OUT-mla, OUT-spectrum) gets ckpt.pt, which sample.py, train.py, bench.py, export.py and
this script take, and compress.json with all that is printed. How it works and what it costs: docs/COMPRESSION.md.
"""

import copy
import io
import json
import math
import os
import sys
import textwrap
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

from runtime import cli                                             # before torch: says what is not installed

import torch
from torch.nn import functional as F

from model import GPT
from runtime import checkpoint as ckpt
from runtime import config as configuration
from runtime import device as devices
from runtime import huggingface, tracking
from runtime.config import PATH, SWITCH, Range, UserError, one_line
from runtime.data import GPT2_META, Dataset, locate, name_of
from runtime.generation import sample
from runtime.evaluation import Evaluation
from runtime.files import archive_run, check_save_dir, locked_folder, named, new_folder, unwritable, write_atomically
from runtime.optimizer import get_lr
from tools import model_compression as layers
from tools import spectrum_report as spectrum
from tools.timing import generation, quartiles, interleave
from train import TrainConfig, new_state, train_step

KEEP = 0.6                          # where nothing else is asked for
LEARNING_RATE = 1e-3                # of fine-tuning
ROUNDS = 5                          # of both models in turn, to time them
apply_svd_compression = layers.apply_svd_compression


@dataclass
class CompressConfig:
    out_dir: Annotated[str | None, 'folder of the run; None: the newest one below this folder', PATH] = None
    save_dir: Annotated[str | None, 'folder to make; None: OUT_DIR-lowrank, -mla or -spectrum', PATH] = None
    overwrite: Annotated[bool, 'a run in save_dir moves to SAVE_DIR.1, .2, ...; False: it is refused'] = False
    to: Annotated[Literal['lowrank', 'mla'], "'lowrank': products of two layers in the place of one; 'mla': multi-head "
                  'latent attention, one latent a token for keys and values'] = 'lowrank'
    keep: Annotated[float | None, "share of the numbers in the modules' weights to keep, above 0, at most 1; None: "
                    f'{KEEP} unless rank or energy is given'] = None
    rank: Annotated[int | None, 'the same rank for all layers that it makes smaller', Range(1)] = None
    energy: Annotated[float | None, "the smallest rank that keeps this share of a layer's energy, as the method "
                      'measures it'] = None
    modules: Annotated[str | None, "which layers of the blocks: 'attn', 'mlp' or 'attn,mlp'; None: all"] = None
    mla_latent_dim: Annotated[int | None, 'numbers in a latent, at most n_embd; None: n_embd / 4', Range(1)] = None
    method: Annotated[Literal['activation', 'whitened', 'plain'] | None,
                      "'activation': what the loss makes of errors on the training split decides, on the ranks, too; "
                      "'whitened': the error of each layer's outputs there; 'plain': the SVD of the weights; None: "
                      "'activation'"] = None
    finetune_iters: Annotated[int, 'steps of training all parameters afterwards, on the text and to agree with the '
                              'model as it was', Range(0)] = 0
    optimizer: Annotated[Literal['adamw', 'muon'] | None, "of these steps; None: 'muon'"] = None
    learning_rate: Annotated[float | None, 'of these steps, a tenth of it at the end; None: 1e-3, which suits models a '
                             'few hundred wide', Range(0)] = None
    batch_size: Annotated[int | None, 'sequences in such a step; None: as the run had, or 12', Range(1)] = None
    spectrum: Annotated[bool, 'only look: the singular values of every weight of the blocks', SWITCH] = False
    init_from: Annotated[str, "'resume' (a run's checkpoint), GPT-2 weights ('gpt2', 'gpt2-medium', 'gpt2-large', "
                         "'gpt2-xl') or a folder with safetensors, in Hugging Face's format or as export.py writes "
                         'them', PATH] = 'resume'
    dataset: Annotated[str | None, "as for train.py; None: the run's", PATH] = None
    calibration_tokens: Annotated[int, 'training tokens to measure on, in whole windows; at most all', Range(1)] = 16384
    seed: Annotated[int, 'of the windows, and of training', Range(0, below=2 ** 63)] = 1337
    device: Annotated[str, "'auto' (cuda, then mps, then cpu), 'cpu', 'cuda', 'cuda:1', 'mps'"] = 'auto'

    def __post_init__(self):
        huggingface.check_name(self.init_from, ('resume',))
        configuration.validate(self)
        for name in ('keep', 'energy'):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise ValueError(f'{name}={share}: must be above 0 and at most 1 (nearest: {1 if share > 1 else 0.1})')
        self.check_combination()
        self.method = self.method or 'activation'
        wrong = [word for word in self.module_names() if word not in layers.MODULES]
        if wrong:
            raise ValueError(f"modules={self.modules!r}: {wrong[0]!r} is none of {', '.join(layers.MODULES)} (nearest: "
                             "'attn,mlp')")
        if self.init_from != 'resume' and self.dataset is None and not self.spectrum:
            raise ValueError(f'init_from={self.init_from}: needs a text to measure on (nearest: --dataset=my.txt)')
        if self.init_from != 'resume' and self.out_dir is not None:
            raise ValueError(f'out_dir={self.out_dir!r}: not together with init_from={self.init_from!r}')

    def check_combination(self):
        """Raise ValueError for options that would have no effect beside others."""
        ranks, training = ('keep', 'rank', 'energy'), ('optimizer', 'learning_rate', 'batch_size')
        given = [name for name in (*ranks, 'modules', 'mla_latent_dim', 'method', *training)
                 if getattr(self, name) is not None] + ['finetune_iters'] * (self.finetune_iters > 0)
        given += [name for name in ('to', 'dataset', 'overwrite') if self.spectrum and getattr(self, name) != getattr(
            CompressConfig, name)]
        kind = '--spectrum' if self.spectrum else f'--to={self.to}'
        takes = {'--spectrum': ('modules',), '--to=mla': ('mla_latent_dim', 'method', 'finetune_iters', *training),
                 '--to=lowrank': ('modules', *ranks, 'method', 'finetune_iters', *training)}[kind]
        for name in given:
            if name not in takes:
                raise ValueError(f'{name}={getattr(self, name)!r}: not with {kind}')
            if name in training and not self.finetune_iters:
                raise ValueError(f'{name}={getattr(self, name)!r}: only with --finetune_iters')
        given = [name for name in ranks if name in given]
        if len(given) > 1:
            raise ValueError(f'{given[1]}={getattr(self, given[1])}: not together with {given[0]}')
        if self.to == 'mla' and self.method == 'whitened':
            raise ValueError("method='whitened': not with --to=mla (nearest: 'activation')")

    def module_names(self):
        """`modules` as a list."""
        return list(layers.MODULES) if self.modules is None else [word.strip() for word in self.modules.split(',')]


def main(argv=None):
    """-> exit code: 0 done, 1 a full disk, 2 wrong input (one line on stderr, nothing written), 130 / 143 stopped."""
    return cli.run('compress.py', CompressConfig, __doc__, lambda cfg: print(compress(cfg)), argv)


def compress(cfg):
    """Writes save_dir whole or not at all -> what it cost and saved, in words."""
    path = ckpt.find(cfg.out_dir) if cfg.init_from == 'resume' else Path(cfg.init_from)
    source = named(path.parent if cfg.init_from == 'resume' else path)
    kind = 'spectrum' if cfg.spectrum else cfg.to
    save_dir = Path(f'{source}-{kind}' if cfg.save_dir is None else cfg.save_dir)
    check_save_dir(save_dir, source, kind, None if cfg.spectrum else cfg.overwrite)
    replaced = cfg.overwrite and os.path.isdir(save_dir)
    try:
        with locked_folder(save_dir, 'save_dir') if replaced else nullcontext():                # before the work
            saved, model = load_model(cfg, path)
            if cfg.spectrum:
                return look(model, cfg.module_names(), save_dir, path)
            data = find_data(cfg, saved, model)
            new, report = convert(cfg, model, data, saved)
            words = describe(report | dict(path=str(path), save_dir=str(save_dir)))
            save(checkpoint_of(new, saved, data, cfg, save_dir, report['val_loss'][1]), report, save_dir, replaced)
            return words
    except OSError as e:
        raise unwritable(e.filename or path, e) from None
    except (ValueError, FloatingPointError, torch.linalg.LinAlgError) as e:
        raise e if isinstance(e, UserError) else UserError(f'{path}: {one_line(e)}') from None


def look(model, modules, save_dir, path):
    """The table of spectrum_report.py, whose files go to save_dir."""
    weights = layers.weights_of(model, modules)
    with new_folder(save_dir) as folder:
        table = spectrum.write(weights, folder, f'Weights of {path}')
    return f'{table}\nwritten to {save_dir}: spectrum.png, spectrum.csv'


def convert(cfg, model, data, saved):
    """-> the new model, on the CPU, and what it cost and saved, [before, after] where that is two numbers. The loss is
    the prefix-only one where V sees the future."""
    device = devices.pick_device(cfg.device)
    tuning = cfg.finetune_iters and finetune_config(cfg, saved, model)
    model.to(device).eval().requires_grad_(False)
    losses, clock = [loss_of(model, data, device, cfg.seed)], [time.perf_counter()]
    if not math.isfinite(losses[0]):
        raise ValueError(f'its loss is {losses[0]}')
    new, lost = smaller(cfg, copy.deepcopy(model.eval()), data, device)
    clock.append(time.perf_counter())
    losses.append(loss_of(new, data, device, cfg.seed))
    if cfg.finetune_iters:
        clock.append(time.perf_counter())
        finetune(new, model, data, tuning, device)
        clock.append(time.perf_counter())
        losses.append(loss_of(new, data, device, cfg.seed))
    if not math.isfinite(losses[-1]):
        raise ValueError(f'the loss is {losses[0]} before and {losses[-1]} after')
    both = model.eval(), new.eval()
    report = dict(to=cfg.to, method=cfg.method, options=asdict(cfg), machine=devices.environment(device, 'float32'),
                  seconds=clock[1] - clock[0], finetune_seconds=clock[-1] - clock[-2] if cfg.finetune_iters else None,
                  prefix_only=model.config.is_noncausal, val_loss=[losses[0], losses[-1]],
                  val_loss_before_finetuning=losses[1] if cfg.finetune_iters else None,
                  perplexity=[math.exp(min(loss, 700)) for loss in (losses[0], losses[-1])],        # of float's range
                  latent_dim=new.config.latent_dim if cfg.to == 'mla' else None, layers=lost,
                  speed=speeds(both, data, device, cfg.seed),
                  samples=[text_of(m, data, device, cfg.seed) for m in both])
    return new.cpu(), report | sizes(both)


def smaller(cfg, model, data, device):
    """-> the new model, and of each layer of factors its rank, of how many, and the share of energy that is lost. The
    model given is used up."""
    windows = None if cfg.method == 'plain' else layers.batches(data, cfg.calibration_tokens, model.config.block_size,
                                                                cfg.seed, device)
    if cfg.to == 'mla':
        latent_dim = model.config.latent_dim if cfg.mla_latent_dim is None else cfg.mla_latent_dim
        return layers.to_mla(model, latent_dim, windows).to(device).eval(), {}
    lost = layers.low_rank(model, cfg.method, choice_of(cfg), cfg.module_names(), windows)
    c = model.config
    return model.to(device).eval(), {name: dict(rank=rank, of=min(c.layer_shapes[name]), lost=lost.get(name))
                                     for name, rank in (c.layer_ranks or {}).items()}


def sizes(models):
    """Name -> [of the first, of the second]."""
    counts = dict(block_params=lambda m: sum(p.numel() for p in m.transformer.h.parameters()),
                  attention_params=GPT.attention_params, params=lambda m: m.get_num_params(non_embedding=False),
                  bytes=bytes_on_disk, block_size=lambda m: m.config.block_size,
                  cache_bytes=lambda m: m.kv_cache_bytes(1, m.config.block_size))
    return {name: [count(m) for m in models] for name, count in counts.items()}


def choice_of(cfg):
    """How `layers.low_rank` chooses ranks."""
    if cfg.rank is not None:
        return layers.fixed_rank(cfg.rank)
    if cfg.energy is not None:
        return layers.rank_of_energy(cfg.energy)
    keep = KEEP if cfg.keep is None else cfg.keep
    return layers.best_share(keep) if cfg.method == 'activation' else layers.uniform_share(keep)


# ----------------------------------------------------------------------------------------------------------------------
# fine-tuning

def finetune_config(cfg, saved, model):
    """The configuration of these steps: warm-up over a twentieth, cosine to a tenth; batch size and betas as in the
    run. No weight decay, which would pull the product of two factors down twice."""
    kept = ('batch_size', 'beta1', 'beta2')
    own = configuration.check_all(TrainConfig, {k: v for k, v in saved.get('config', {}).items() if k in kept},
                                  saved.get('path'))
    if cfg.batch_size is not None:
        own['batch_size'] = cfg.batch_size
    learning_rate = LEARNING_RATE if cfg.learning_rate is None else cfg.learning_rate
    return TrainConfig(optimizer=cfg.optimizer or 'muon', learning_rate=learning_rate, min_lr=learning_rate / 10,
                       weight_decay=0.0, max_iters=cfg.finetune_iters,
                       warmup_iters=cfg.finetune_iters // 20, seed=cfg.seed, block_size=model.config.block_size, **own)


def finetune(model, teacher, data, cfg, device):
    """Train all parameters in place for cfg.max_iters steps on random windows of the training split: cross-entropy plus
    the Kullback-Leibler divergence of its predictions from the teacher's (distillation, arXiv:1503.02531, temperature
    1); teacher None: cross-entropy alone. Raises FloatingPointError where the loss is not finite."""
    state = new_state(cfg, model.requires_grad_(True), device)
    model.train()
    if teacher is not None:
        teacher.eval()                                              # an evaluation leaves it in training mode
    torch.manual_seed(cfg.seed)                                     # of dropout

    def loss_of(model, x, y):
        logits, loss = model(x, y)                                  # (B, T, vocab)
        if teacher is None:
            return loss
        with torch.no_grad():
            target = F.log_softmax(teacher(x, y)[0], dim=-1)
        divergence = F.kl_div(F.log_softmax(logits, dim=-1), target, reduction='none', log_target=True).sum(-1)
        return loss + divergence.mean()

    for step in tracking.brief_bar(range(cfg.max_iters), desc='fine-tune', unit='step'):
        for group in state.optimizer.param_groups:
            group['lr'] = get_lr(step, cfg)
        try:
            train_step(state, [data.batch('train', cfg.batch_size, cfg.block_size, state.data_rng, device)], loss_of)
        except FloatingPointError as e:
            raise FloatingPointError(f'fine-tuning, step {step + 1}: {e} (nearest: a smaller --learning_rate than '
                                     f'{cfg.learning_rate})') from None
    model.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------------
# what is reported

def speeds(models, data, device, seed):
    """Two models in turn -> tokens/s of a prompt and after it, [of the first, of the second], and the ratio second over
    first with its quartiles, paired."""
    T = models[0].config.block_size
    tokens = max(2, min(32, T // 8))
    prompt = data.batch('val', 1, max(1, T - tokens), torch.Generator().manual_seed(seed), device)[0] if len(
        data.tokens('val')) > T else torch.zeros(1, max(1, T - tokens), dtype=torch.int64, device=device)
    runs = {i: lambda m=m: generation(m, prompt, tokens, device) for i, m in enumerate(models)}
    with torch.no_grad():
        rounds = interleave(runs, ROUNDS)
    result = {'prompt': prompt.size(1), 'tokens': tokens, 'rounds': ROUNDS}
    for i, (name, per_call) in enumerate((('prefill', prompt.size(1)), ('decode', 1))):
        before, after = ([per_call / times[i] for times in rounds[m]] for m in (0, 1))
        low, ratio, high = quartiles([b / a for a, b in zip(before, after)])
        medians = [quartiles(rates)[1] for rates in (before, after)]
        result[name] = dict(tokens_per_s=medians, ratio=ratio, quartiles=[low, high])
    return result


def text_of(model, data, device, seed):
    """200 tokens of the model, from one seed for both models."""
    torch.manual_seed(seed)
    return sample(model, data, device, devices.autocast(device, 'float32'))


def bytes_on_disk(model):
    """Of its weights as a checkpoint, without an optimizer's state."""
    file = io.BytesIO()
    torch.save(dict(model=model.state_dict(), model_args=asdict(model.config), iter_num=0), file)
    return file.tell()


def describe(report):
    """The report in words."""
    def pair(name, form=',', share=True):
        before, after = report[name]
        ratio = f' ({after / before:.1%})' if share and before else ''              # 'sequence' scope caches 0
        return f'{before:{form}} before, {after:{form}} after{ratio}'

    made = (f'{len(report["layers"])} layers as products of two' if report['to'] == 'lowrank' else
            f'keys and values of each layer from a latent of {report["latent_dim"]} numbers')
    tuned, speed = report['options']['finetune_iters'], report['speed']
    lines = [f'{report["path"]}: {made}, method {report["method"]!r}, {report["seconds"]:.1f} s'
             + (f', then {tuned} steps in {report["finetune_seconds"]:.1f} s' if tuned else '')]
    if report['to'] == 'lowrank':
        lines += rank_lines(report['layers'])
    which = 'prefix-only val loss' if report['prefix_only'] else 'val loss'
    lines += [f'  {which}: {pair("val_loss", ".4f", False)}'
              + (f' ({report["val_loss_before_finetuning"]:.4f} before fine-tuning)' if tuned else ''),
              f'  perplexity: {pair("perplexity", ".4g", False)}',
              f'  parameters of the blocks: {pair("block_params")}',
              f'  parameters of attention: {pair("attention_params")}',
              f'  parameters: {pair("params")}',
              f'  bytes on disk, weights alone: {pair("bytes")}',
              f'  cache bytes at {report["block_size"][0]} tokens: {pair("cache_bytes")}']
    for name, words in (('prefill', f'a prompt of {speed["prompt"]} tokens'),
                        ('decode', f'the {speed["tokens"] - 1} after it, one by one')):
        (before, after), (low, high) = speed[name]['tokens_per_s'], speed[name]['quartiles']
        lines.append(f'  tokens/s, {words}: {before:,.0f} before, {after:,.0f} after, ratio {speed[name]["ratio"]:.2f} '
                     f'(quartiles {low:.2f} to {high:.2f}, {speed["rounds"]} pairs)')
    lines += [*side_by_side(*report['samples']), f'written to {report["save_dir"]}']
    return '\n'.join(lines)


def rank_lines(ranked):
    """A line a block: its layers' ranks."""
    blocks = {}
    for name, layer in ranked.items():
        _, block, part = name.split('.', 2)
        blocks.setdefault(block, []).append(f'{part.removeprefix("attn.c_attn.")} {layer["rank"]}')
    if not blocks:
        return ['  no layer would be smaller as a product: all stay as they were']
    return ['  ranks, the other layers stay dense:', *(f'    block {block}: {", ".join(parts)}'
                                                     for block, parts in blocks.items())]


def side_by_side(before, after, width=56, height=14):
    """Two texts as lines of two columns."""
    columns = [[piece for line in text.splitlines() for piece in textwrap.wrap(line, width) or ['']][:height]
               for text in (before, after)]
    longest = max(map(len, columns))
    left, right = (column + [''] * (longest - len(column)) for column in columns)
    return ['  ' + 'before'.ljust(width + 2) + 'after', *(f'  {a:{width}}  {b}'.rstrip() for a, b in zip(left, right))]


# ----------------------------------------------------------------------------------------------------------------------
# in and out

def save(checkpoint, report, save_dir, overwrite):
    """Write save_dir/ckpt.pt and compress.json; a run that is there is moved aside when everything else is done. Raises
    UserError where that goes on, or the disk does not take it."""
    try:
        with new_folder(save_dir) as folder:
            ckpt.save(checkpoint, folder / 'ckpt.pt')
            write_atomically(folder / 'compress.json', (json.dumps(report, indent=1) + '\n').encode())
            if overwrite:
                archive_run(save_dir, print)
    except OSError as e:
        raise unwritable(f'save_dir={str(save_dir)!r}: cannot be written', e) from None


def load_model(cfg, path):
    """The checkpoint, an empty dict for weights alone, and its model."""
    saved = ckpt.load(path) if cfg.init_from == 'resume' else {}
    model = layers.without_adapters(GPT.from_checkpoint(saved) if saved else GPT.from_pretrained(cfg.init_from))
    if model.config.use_mla and cfg.to == 'mla' and not cfg.spectrum:
        raise UserError(f'{path}: is MLA already, with latents of {model.config.latent_dim} numbers (nearest: the run '
                        'it was made from)')
    return saved, model


def find_data(cfg, saved, model):
    """The data set to measure on. Raises UserError unless it is in the model's tokens and long enough."""
    c, name = model.config, cfg.dataset or str(saved.get('config', {}).get('dataset', ''))
    if not name:
        raise UserError(f'{saved["path"]}: does not say what it was trained on (nearest: --dataset=my.txt)')
    meta = saved.get('tokenizer', {}) if saved else huggingface.read_tokenizer(cfg.init_from) or {}
    tokenizer = meta.get('tokenizer', 'char' if c.vocab_size < GPT2_META['vocab_size'] else 'gpt2')
    data = Dataset(locate(name, tokenizer))
    huggingface.check_tokenizer(SimpleNamespace(dataset=name, init_from=cfg.init_from), {}, saved, data, print)
    if data.vocab_size > c.vocab_size:
        raise UserError(f'dataset={name}: has {data.vocab_size} token ids, the model {c.vocab_size}')
    for split, least in (('train', c.block_size + 1), ('val', c.block_size + 1 if c.is_noncausal else 2)):
        if len(data.tokens(split)) < least:
            raise UserError(f'dataset={name}: its {split}.bin has {len(data.tokens(split))} tokens, too few for '
                            f'block_size={c.block_size}, which needs {least}')
    return data


def loss_of(model, data, device, seed):
    """Over the whole validation split, the prefix-only one where that differs."""
    c = model.config
    windows = SimpleNamespace(batch_size=1, block_size=c.block_size, seed=seed)
    row = Evaluation(windows, model, data, device, devices.autocast(device, 'float32'), c.is_noncausal).final()
    return row.get('val/prefix_loss', row['val/loss'])


def checkpoint_of(new, saved, data, cfg, save_dir, loss):
    """A checkpoint from which training starts at step 0, with the run's own settings and a fresh optimizer."""
    args = asdict(new.config)
    config = saved.get('config', {}) | args | dict(out_dir=str(save_dir), tokenizer=data.meta['tokenizer'])
    if cfg.dataset:
        config['dataset'] = name_of(data.folder, cfg.dataset)
    optimizer = new.requires_grad_(True).configure_optimizers(1e-1, 6e-4, (0.9, 0.95), 'cpu')
    return dict(model=new.state_dict(), optimizer=optimizer.state_dict(), model_args=args, iter_num=0,
                best_val_loss=loss, config=config, tokenizer=saved.get('tokenizer', data.meta),
                **({} if new.svd_basis is None else {'svd_basis': new.svd_basis}))


if __name__ == '__main__':
    sys.exit(main())

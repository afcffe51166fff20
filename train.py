"""
Train a GPT, with or without a truncated SVD on V:

    python train.py config/train_svd_test.py                     # the main job: SVD on V, minutes on two CPU cores
    python train.py config/train_svd_test.py --svd_rank=8        # any option can be overridden
    python train.py --help                                       # every option with default and meaning
    python train.py --eval_only=True --init_from=resume --out_dir=OUT --use_svd=True --svd_rank=8
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

Option names and defaults are nanoGPT's. OUT_DIR gets ckpt.pt, config.py (resolved; can be run again), environment.json
and metrics.jsonl.
"""

import json
import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import GPT, GPTConfig
from runtime import checkpoint as ckpt
from runtime import config as configuration
from runtime import device as devices
from runtime.config import UserError
from runtime.dataset import Dataset, Tokenizer, locate
from runtime.evaluation import Evaluation
from runtime.optim import MuonAdamW


@dataclass
class TrainConfig(GPTConfig):
    """GPTConfig's fields and the run's; nanoGPT's names and defaults."""
    # model: where train.py's defaults differ from GPTConfig's
    vocab_size: Annotated[int | None, "number of token ids; None: the data set's, rounded up to 64s for BPE"] = None
    bias: Annotated[bool, 'biases in Linear and LayerNorm, as in GPT-2; False is a bit better and faster'] = False
    # input and output
    out_dir: Annotated[str, 'folder of the run; a run already there is moved aside, never overwritten'] = 'out'
    eval_interval: Annotated[int, 'steps between evaluations, each followed by a checkpoint'] = 2000
    log_interval: Annotated[int, 'steps between lines of metrics.jsonl'] = 1
    eval_iters: Annotated[int, 'random batches a split and evaluation; the final one covers all of val'] = 200
    eval_only: Annotated[bool, 'run the final evaluation and stop'] = False
    always_save_checkpoint: Annotated[bool, 'save at every evaluation; False: only when the val loss improved'] = True
    init_from: Annotated[Literal['scratch', 'resume', 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'],
                         "'scratch', 'resume' (OUT_DIR/ckpt.pt and its settings) or GPT-2 weights"] = 'scratch'
    # wandb
    wandb_log: Annotated[bool, 'log to Weights & Biases; WANDB_MODE=offline keeps it on this machine'] = False
    wandb_project: Annotated[str, 'wandb project'] = 'owt'
    wandb_run_name: Annotated[str, 'wandb run name'] = 'gpt2'
    # data
    dataset: Annotated[str, 'folder below data/, path of a prepared folder, or a text file'] = 'openwebtext'
    tokenizer: Annotated[Literal['char', 'gpt2'], 'how to encode if dataset is a text file'] = 'char'
    gradient_accumulation_steps: Annotated[int, 'micro-batches a step, over all processes'] = 5 * 8
    batch_size: Annotated[int, 'sequences a micro-batch'] = 12
    # optimizer
    optimizer: Annotated[Literal['adamw', 'muon'], "'muon': Muon on the blocks' matrices, AdamW on the rest"] = 'adamw'
    learning_rate: Annotated[float, 'maximal learning rate'] = 6e-4
    max_iters: Annotated[int, 'optimizer steps'] = 600000
    weight_decay: Annotated[float, 'decay of everything with two dimensions'] = 1e-1
    beta1: Annotated[float, 'AdamW'] = 0.9
    beta2: Annotated[float, 'AdamW'] = 0.95
    grad_clip: Annotated[float, 'largest gradient norm; 0: no clipping'] = 1.0
    # learning rate schedule
    decay_lr: Annotated[bool, 'warm up, then cosine to min_lr; False: constant'] = True
    warmup_iters: Annotated[int, 'steps of linear warm-up; a tenth of max_iters where it would not fit'] = 2000
    lr_decay_iters: Annotated[int, 'step at which min_lr is reached; usually max_iters'] = 600000
    min_lr: Annotated[float, 'final learning rate, usually learning_rate / 10'] = 6e-5
    # system
    backend: Annotated[Literal['nccl', 'gloo'], 'torchrun: how processes talk; gloo is used on the CPU anyway'] = 'nccl'
    device: Annotated[str, "'auto' (cuda, then mps, then cpu), 'cpu', 'cuda', 'cuda:1', 'mps'"] = 'auto'
    dtype: Annotated[Literal['auto', 'float32', 'bfloat16', 'float16'],
                     "autocast type; 'auto': bfloat16 on CUDA (float16 where it lacks that), else float32"] = 'auto'
    compile: Annotated[bool | Literal['auto'], "torch.compile; 'auto': on CUDA only"] = 'auto'
    seed: Annotated[int, 'of weights, data order, dropout and evaluation windows'] = 1337

    def __post_init__(self):
        super().__post_init__()
        for name, least in dict(eval_interval=1, log_interval=1, eval_iters=1, gradient_accumulation_steps=1, seed=0,
                                batch_size=1, max_iters=0, warmup_iters=0, lr_decay_iters=0, learning_rate=0, min_lr=0,
                                weight_decay=0, grad_clip=0).items():
            if getattr(self, name) < least:
                raise ValueError(f'{name}={getattr(self, name)}: must be at least {least} (nearest: {least})')
        for name in ('beta1', 'beta2'):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)}: must be at least 0 and below 1')
        if self.seed >= 2 ** 63:
            raise ValueError(f'seed={self.seed}: must be below 2**63')
        out = Path(self.out_dir).resolve()
        if not self.out_dir or out == Path.cwd() or out in Path.cwd().parents:
            raise ValueError(f"out_dir={self.out_dir!r}: must be a folder for one run (nearest: 'out')")
        try:
            if out.exists() and not out.is_dir():
                raise ValueError(f'out_dir={self.out_dir!r}: is a file (nearest: {self.out_dir + "-run"!r})')
        except OSError as e:
            raise ValueError(f'out_dir={self.out_dir[:40]!r}: {e.strerror}') from None


MODEL_KEYS = [f.name for f in fields(GPTConfig)]
FREE_KEYS = [k for k in MODEL_KEYS if k == 'dropout' or 'svd' in k]     # change no parameter: any checkpoint takes them
HERE_KEYS = ('out_dir', 'init_from', 'eval_only', 'device', 'dtype', 'compile', 'backend')    # not taken from a checkpoint


def main(argv=None):
    """-> exit code: 0 done, 2 wrong input (one line on stderr), 1 training failed (one line)."""
    argv = sys.argv[1:] if argv is None else argv
    if '--help' in argv or '-h' in argv:
        print(configuration.help_text(TrainConfig, __doc__.strip()))
        return 0
    try:
        cfg, set_by, saved = load_config(argv)
        with Processes(cfg) as processes:
            train(cfg, set_by, saved, processes)
        return 0
    except UserError as e:
        print(f'train.py: {e}', file=sys.stderr)
        return 2
    except (torch.linalg.LinAlgError, FloatingPointError) as e:
        print(f'train.py: training stopped: {configuration.one_line(e)}', file=sys.stderr)
        return 1


def load_config(argv):
    """argv -> configuration, the keys the user set -> where, and the checkpoint if one is resumed, else None. A
    resumed run starts from the checkpoint's own settings, so that they need not be given again."""
    cfg, set_by = configuration.load(TrainConfig, argv)
    if cfg.init_from != 'resume':
        return cfg, set_by, None
    path = Path(cfg.out_dir) / 'ckpt.pt'
    saved = ckpt.load(path)
    if 'best_val_loss' not in saved:
        raise UserError(f'{path}: has no best_val_loss, so training cannot go on from it')
    hints = {f.name: f.type for f in fields(TrainConfig)}
    base = {k: v for k, v in saved.get('config', {}).items() if k in hints and k not in HERE_KEYS}
    base |= {k: v for k, v in saved['model_args'].items() if k in hints}
    base = {k: configuration.check(k, v, hints[k], path) for k, v in base.items()}
    cfg, set_by = configuration.load(TrainConfig, argv, base)
    return cfg, set_by, saved


class Processes:
    """torchrun's processes, or one: rank, world_size, is_main, device. A context manager: leaves the group at the end."""

    def __init__(self, cfg):
        self.distributed = 'RANK' in os.environ and 'WORLD_SIZE' in os.environ
        self.rank, self.world_size = (int(os.environ[k]) if self.distributed else d
                                      for k, d in (('RANK', 0), ('WORLD_SIZE', 1)))
        self.is_main = self.rank == 0
        self.device = devices.pick_device(cfg.device)
        if cfg.gradient_accumulation_steps % self.world_size:
            nearest = math.ceil(cfg.gradient_accumulation_steps / self.world_size) * self.world_size
            raise UserError(f'gradient_accumulation_steps={cfg.gradient_accumulation_steps}: not a multiple of the '
                            f'{self.world_size} processes (nearest: {nearest})')
        self.backend = cfg.backend if self.device.startswith('cuda') else 'gloo'

    def __enter__(self):
        if self.distributed:
            if self.device.startswith('cuda'):
                self.device = f'cuda:{os.environ["LOCAL_RANK"]}'
                torch.cuda.set_device(self.device)
            distributed.init_process_group(self.backend, timeout=timedelta(hours=2))  # rank 0 evaluates, others wait
        return self

    def __exit__(self, *_):
        if self.distributed:
            distributed.destroy_process_group()

    def main_first(self, work):
        """Run `work` on rank 0, then on the others, which find it done."""
        result = work() if self.is_main else None
        if self.distributed:
            distributed.barrier()
        return work() if result is None else result

    def print(self, text):
        if self.is_main:
            tqdm.write(text)


def train(cfg, set_by, saved, processes):
    """One run from start to end: model, optimizer, loop, final evaluation, sample."""
    device, say = processes.device, processes.print
    dtype = devices.pick_dtype(cfg.dtype, device)
    context = devices.autocast(device, dtype)
    # TF32 keeps 10 bits, too few for a projection that claims float32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not cfg.use_svd
    torch.manual_seed(cfg.seed + processes.rank)

    data = Dataset(processes.main_first(lambda: locate(cfg.dataset, cfg.tokenizer)))
    if 'tokenizer' in set_by and cfg.tokenizer != data.meta['tokenizer']:
        raise UserError(f'tokenizer={cfg.tokenizer}: {data.folder} is encoded with {data.meta["tokenizer"]!r}; '
                        'only text files can be encoded anew')
    try:
        model = build_model(cfg, set_by, saved, data, say)
    except ValueError as e:
        raise UserError(f'{cfg.out_dir}/ckpt.pt: {e}' if saved and not isinstance(e, UserError) else str(e)) from None
    data.check_length(cfg.block_size)
    model.to(device)
    describe(cfg, model, data, device, dtype, processes)
    evaluate = Evaluation(cfg, model, data, device, context, sees_future=cfg.svd_sees_future)
    if cfg.eval_only:
        if processes.is_main:
            result = evaluate.final()
            say(evaluate.describe_final(result))
            append_json(make_folder(cfg.out_dir) / 'eval.jsonl', {'config': asdict(cfg), **result})
        return

    # optimizer, and where a resumed run stood
    optimizer = build_optimizer(cfg, model, device)
    scaler = torch.amp.GradScaler('cuda', enabled=dtype == 'float16' and device.startswith('cuda'))
    order = torch.Generator().manual_seed(cfg.seed + processes.rank)    # of training batches, and nothing else
    iter_num, best_val_loss = 0, 1e9
    if saved is not None:
        iter_num, best_val_loss = saved['iter_num'], float(saved['best_val_loss'])
        restore_optimizer(optimizer, saved, cfg)
        if 'random' in saved and not processes.distributed:
            ckpt.set_random_state(saved['random'], order)
        if scaler.is_enabled() and saved.get('scaler'):
            scaler.load_state_dict(saved['scaler'])
        saved = None                                                    # free the memory

    wandb = import_wandb() if cfg.wandb_log and processes.is_main else None
    if processes.is_main:
        try:
            prepare_out_dir(cfg, device, dtype, say)
        except OSError as e:
            raise UserError(f'out_dir={cfg.out_dir!r}: cannot be written: {e.strerror}') from None
    if wandb:
        wandb.init(project=cfg.wandb_project, name=cfg.wandb_run_name, config=asdict(cfg), dir=cfg.out_dir)
    compiled = torch.compile(model) if cfg.compile is True or cfg.compile == 'auto' and 'cuda' in device else model
    replica = compiled
    if processes.distributed:
        replica = DistributedDataParallel(compiled, device_ids=[device] if 'cuda' in device else None)

    def log(row):
        append_json(Path(cfg.out_dir) / 'metrics.jsonl', row)
        if wandb:
            wandb.log({k: v for k, v in row.items() if k != 'iter'}, step=row['iter'])

    def save():
        ckpt.save({'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'iter_num': iter_num,
                   'model_args': {k: getattr(model.config, k) for k in MODEL_KEYS}, 'best_val_loss': best_val_loss,
                   'config': asdict(cfg), 'tokenizer': data.meta, 'random': ckpt.random_state(order),
                   'scaler': scaler.state_dict()}, Path(cfg.out_dir) / 'ckpt.pt')

    micro_steps = cfg.gradient_accumulation_steps // processes.world_size
    tokens_per_iter = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size
    peak = devices.peak_flops(device, dtype)
    bar = tqdm(total=cfg.max_iters, initial=iter_num, desc='train', unit='step', disable=not processes.is_main,
               dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 10)
    timed_steps, clock = 0, time.perf_counter()
    while True:
        lr = get_lr(iter_num, cfg)
        for group in optimizer.param_groups:
            group['lr'] = lr

        last = iter_num >= cfg.max_iters
        if (iter_num % cfg.eval_interval == 0 or last) and processes.is_main:
            started = time.perf_counter()
            result = evaluate.interim()
            log({'iter': iter_num, **result})
            say(f'step {iter_num}: {evaluate.describe(result)}')
            improved = result['val/loss'] < best_val_loss
            best_val_loss = min(best_val_loss, result['val/loss'])
            if iter_num > 0 and (improved or cfg.always_save_checkpoint):
                save()
            clock += time.perf_counter() - started                      # evaluation is not training time
        if last:
            break

        # forward and backward; the loss is the mean over all micro-batches of this process
        loss_sum = torch.zeros((), device=device)
        for micro_step in range(micro_steps):
            x, y = data.batch('train', cfg.batch_size, cfg.block_size, order, device)
            sync = processes.distributed and micro_step < micro_steps - 1
            with replica.no_sync() if sync else nullcontext():          # gradients travel once a step
                with context:
                    _, loss = replica(x, y)
                    loss = loss / micro_steps
                scaler.scale(loss).backward()
            loss_sum += loss.detach()
        if cfg.grad_clip > 0:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        iter_num += 1
        timed_steps += 1

        bar.update()
        if iter_num % cfg.log_interval == 0 and processes.is_main:
            lossf = loss_sum.item()                                     # waits for the device
            if not math.isfinite(lossf):
                raise FloatingPointError(f'step {iter_num}: the loss is {lossf}; the last checkpoint is kept')
            seconds = (time.perf_counter() - clock) / timed_steps
            row = {'iter': iter_num, 'loss': lossf, 'lr': lr, 'step_ms': seconds * 1e3,
                   'tokens_per_s': tokens_per_iter / seconds}
            if peak:
                row['mfu'] = model.estimate_mfu(cfg.batch_size * micro_steps, seconds, peak)
            log(row)
            bar.set_postfix_str(f'loss {lossf:.4f}, {row["tokens_per_s"]:,.0f} tokens/s'
                                + (f', mfu {row["mfu"]:.1%}' if peak else ''), refresh=False)
            timed_steps, clock = 0, time.perf_counter()
    bar.close()
    if processes.is_main:
        result = evaluate.final()
        log({'iter': iter_num, **result})
        say(evaluate.describe_final(result))
        say('sample:\n' + sample(model, data, device, context) + '\n')
    if wandb:
        wandb.finish()


def build_model(cfg, set_by, saved, data, say):
    """The model of init_from. Its shape is fixed by a checkpoint or GPT-2: options that contradict it are an error on
    the command line and a remark in a config file (nanoGPT's files carry the shape when they resume)."""
    free = {k: getattr(cfg, k) for k in FREE_KEYS}
    if cfg.init_from == 'scratch':
        if cfg.vocab_size is None:                                      # GPT-2's 50257 becomes 50304: faster products
            cfg.vocab_size = data.vocab_size if data.meta['tokenizer'] == 'char' else math.ceil(data.vocab_size / 64) * 64
        model = GPT(GPTConfig(**{k: getattr(cfg, k) for k in MODEL_KEYS}))
    elif cfg.init_from == 'resume':
        model = GPT.from_checkpoint(saved, **free)
    else:
        model = GPT.from_pretrained(cfg.init_from, free)
    shape = asdict(model.config)
    for key in set(MODEL_KEYS) - set(FREE_KEYS):
        if key in set_by and getattr(cfg, key) != shape[key] and not (key == 'block_size' and cfg.block_size < shape[key]):
            if set_by[key] == 'the command line':
                raise UserError(f'{key}={getattr(cfg, key)}: {cfg.init_from} has {key}={shape[key]}, which is fixed')
            say(f'{key}={getattr(cfg, key)} of {set_by[key]} gives way: {cfg.init_from} has {key}={shape[key]}')
    if cfg.block_size < shape['block_size']:
        model.crop_block_size(cfg.block_size)
    for key in MODEL_KEYS:                                              # from here on cfg says what is
        setattr(cfg, key, getattr(model.config, key))
    if data.vocab_size > cfg.vocab_size:
        raise UserError(f'vocab_size={cfg.vocab_size}: the data set {data.folder} has {data.vocab_size} token ids '
                        f'(nearest: {data.vocab_size})')
    return model


def build_optimizer(cfg, model, device):
    device_type, betas = torch.device(device).type, (cfg.beta1, cfg.beta2)
    if cfg.optimizer == 'muon':
        dtype = torch.bfloat16 if devices.has_native_bfloat16(device) else torch.float32
        return MuonAdamW(model.optim_groups(cfg.weight_decay), cfg.learning_rate, betas, device_type, dtype)
    return model.configure_optimizers(cfg.weight_decay, cfg.learning_rate, betas, device_type)


def restore_optimizer(optimizer, saved, cfg):
    try:
        optimizer.load_state_dict(saved['optimizer'])
    except (KeyError, ValueError, TypeError, AttributeError) as e:
        raise UserError(f'optimizer={cfg.optimizer}: the checkpoint holds the state of another optimizer '
                        f'({configuration.one_line(e)[:80]})') from None


def warmup_iters(cfg):
    """Steps of warm-up: as asked for if the run is longer than that, else a tenth of the run."""
    return cfg.warmup_iters if cfg.warmup_iters < cfg.max_iters else cfg.max_iters // 10


def get_lr(it, cfg):
    """Learning rate of step `it`: linear warm-up, cosine to min_lr at lr_decay_iters, min_lr after it."""
    warmup = warmup_iters(cfg)
    if not cfg.decay_lr:
        return cfg.learning_rate
    if it < warmup:
        return cfg.learning_rate * (it + 1) / (warmup + 1)
    if it >= cfg.lr_decay_iters:
        return cfg.min_lr
    ratio = (it - warmup) / (cfg.lr_decay_iters - warmup)               # 0 to 1
    return cfg.min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (cfg.learning_rate - cfg.min_lr)


def describe(cfg, model, data, device, dtype, processes):
    """What is about to happen, in a few lines."""
    say = processes.print
    c = model.config
    say(f'model: {c.n_layer} layers, {c.n_head} heads, {c.n_embd} wide, context {c.block_size}, vocabulary '
        f'{c.vocab_size}: {model.get_num_params():,} parameters; {device}, {dtype}, seed {cfg.seed}')
    say(f'data: {data.folder}, {len(data.tokens("train")):,} + {len(data.tokens("val")):,} tokens '
        f'({data.meta.get("source", "source unknown")}); '
        f'{cfg.gradient_accumulation_steps * cfg.batch_size * c.block_size:,} tokens a step')
    if c.use_svd and c.svd_rank is not None:
        say(f'SVD on V: rank {c.svd_rank} of {c.n_embd // c.n_head}, method {c.svd_method!r}, scope {c.svd_scope!r}')
    elif c.use_svd or c.svd_rank is not None:
        say(f'no SVD: use_svd={c.use_svd} with svd_rank={c.svd_rank} changes nothing')
    if cfg.decay_lr and warmup_iters(cfg) != cfg.warmup_iters and not cfg.eval_only:
        say(f'warmup_iters={cfg.warmup_iters} does not fit max_iters={cfg.max_iters}: using {warmup_iters(cfg)}')
    if processes.distributed and processes.backend != cfg.backend:
        say(f'backend={cfg.backend} needs CUDA: using {processes.backend}')


def import_wandb():
    try:
        import wandb
        return wandb
    except ImportError:
        raise UserError('wandb_log=True: needs a package: pip install wandb (nearest: --wandb_log=False)') from None


def prepare_out_dir(cfg, device, dtype, say):
    """An empty OUT_DIR for a new run: whatever run is there moves to OUT_DIR.1, .2, ... Then config and environment."""
    out = Path(cfg.out_dir)
    if cfg.init_from != 'resume' and any((out / name).exists() for name in ('ckpt.pt', 'metrics.jsonl')):
        aside = next(p for p in (Path(f'{out}.{n}') for n in range(1, 10 ** 6)) if not p.exists())
        out.rename(aside)
        say(f'{out} holds a run: moved to {aside}')
    make_folder(out)
    (out / 'config.py').write_text(configuration.dump(cfg, '# this run, resolved; can be given to train.py again\n'))
    (out / 'environment.json').write_text(json.dumps(devices.environment(device, dtype), indent=1), encoding='utf-8')


def make_folder(path):
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f'out_dir={str(path)!r}: cannot be made: {e.strerror}') from None
    return Path(path)


def append_json(path, row):
    with open(path, 'a', encoding='utf-8') as f:
        f.write(json.dumps(row) + '\n')


def sample(model, data, device, context, tokens=200):
    """A short text of the model, to look at."""
    tokenizer = Tokenizer(data.meta)
    newline = data.meta['tokenizer'] == 'gpt2' or '\n' in tokenizer.chars
    start = tokenizer.encode('\n' if newline else tokenizer.chars[0])
    model.eval()
    with context:
        ids = model.generate(torch.tensor([start], device=device), tokens, temperature=0.8, top_k=200)
    return tokenizer.decode(ids[0].tolist())


if __name__ == '__main__':
    sys.exit(main())

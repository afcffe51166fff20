"""
Train a GPT, with or without a truncated SVD on V:

    python train.py config/train_svd_test.py                     # the main job: SVD on V, minutes on two CPU cores
    python train.py config/train_svd_test.py --svd_rank=8        # any option can be overridden
    python train.py --help                                       # every option with default and meaning
    python train.py --init_from=resume --out_dir=OUT             # go on where a run stopped, to the same bits
    python train.py --eval_only=True --init_from=resume --out_dir=OUT --use_svd=True --svd_rank=8
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

Option names and defaults are nanoGPT's. OUT_DIR gets ckpt.pt, config.py (resolved; can be run again), environment.json
and metrics.jsonl. Ctrl-C and SIGTERM save after the step at hand; what is promised beyond that: docs/RELIABILITY.md.
"""

import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

from runtime.output import unfailing_output                             # before torch: says what is not installed

import torch
from torch.nn.parallel import DistributedDataParallel

from lowrank.adapters import adaptive_layers, lowrank_ranks
from lowrank.adaptive_layer import AdaptiveSVD
from lowrank.subspace_iteration import clear_grams
from model import ADAPTER_DEFAULTS, GPT, OVERRIDABLE_FIELDS, GPTConfig
from runtime import checkpoint as ckpt
from runtime import config as configuration
from runtime import device as devices
from runtime import pretrained, progress
from runtime.config import PATH, Needs, Range, UserError, one_line
from runtime.dataset import Dataset, locate, name_of
from runtime.draw import sample
from runtime.evaluation import Evaluation
from runtime.files import FULL, begin_from, check_writable, in_words, is_shared, unused
from runtime.optim import build_optimizer, swap_params
from runtime.processes import LostProcess, Processes
from runtime.run import Run, TrainingStopped, append_json, make_folder
from runtime.schedule import get_lr, schedule_length, warmup_iters
from runtime.stopping import Interrupted, Stop


@dataclass
class TrainConfig(GPTConfig):
    """GPTConfig's fields and the run's; nanoGPT's names and defaults."""
    # model: where train.py's defaults differ from GPTConfig's
    vocab_size: Annotated[int | None, "number of token ids; None: the data set's, rounded up to 64s for BPE", Range(1)] = None
    bias: Annotated[bool, 'biases in Linear and LayerNorm, as in GPT-2; False is a bit better and faster'] = False
    # input and output
    out_dir: Annotated[str, 'folder of the run; a run already there is moved aside, never overwritten', PATH] = 'out'
    eval_interval: Annotated[int, 'steps between evaluations, each followed by a checkpoint', Range(1)] = 2000
    log_interval: Annotated[int, 'steps between lines of metrics.jsonl', Range(1)] = 1
    eval_iters: Annotated[int, 'random batches a split and evaluation; the final one covers all of val', Range(1)] = 200
    eval_only: Annotated[bool, 'run the final evaluation and stop'] = False
    always_save_checkpoint: Annotated[bool, 'save at every evaluation; False: ckpt.pt stays the best'] = True
    init_from: Annotated[str, "'scratch', 'resume' (OUT_DIR/ckpt.pt and its settings), GPT-2 weights ('gpt2', "
                         "'gpt2-medium', 'gpt2-large', 'gpt2-xl'), or a folder: another run's, or in Hugging Face's "
                         'format', PATH] = 'scratch'
    lora_adapter: Annotated[str | None, 'folder of adapters on these weights, from export.py --to=lora', PATH] = None
    # wandb
    wandb_log: Annotated[bool, 'log to Weights & Biases; WANDB_MODE=offline keeps it on this machine'] = False
    wandb_project: Annotated[str, 'wandb project'] = 'owt'
    wandb_run_name: Annotated[str, 'wandb run name'] = 'gpt2'
    wandb_group: Annotated[str | None, 'wandb group, of the runs of a sweep'] = None
    wandb_tags: Annotated[str | None, "wandb tags, as 'svd,rank 4'"] = None
    # data
    dataset: Annotated[str, 'folder below data/, path of a prepared folder, or a text file', PATH] = 'openwebtext'
    tokenizer: Annotated[Literal['char', 'gpt2'], 'how to encode if dataset is a text file'] = 'char'
    gradient_accumulation_steps: Annotated[int, 'micro-batches a step, over all processes', Range(1)] = 5 * 8
    batch_size: Annotated[int, 'sequences a micro-batch', Range(1)] = 12
    # optimizer
    optimizer: Annotated[Literal['adamw', 'muon'], "'muon': Muon on the blocks' matrices, AdamW on the rest"] = 'adamw'
    learning_rate: Annotated[float, 'maximal learning rate', Range(0)] = 6e-4
    max_iters: Annotated[int, 'optimizer steps', Range(0)] = 600000
    weight_decay: Annotated[float, 'decay of everything with two dimensions', Range(0)] = 1e-1
    beta1: Annotated[float, 'AdamW', Range(0, below=1)] = 0.9
    beta2: Annotated[float, 'AdamW', Range(0, below=1)] = 0.95
    grad_clip: Annotated[float, 'largest gradient norm; 0: no clipping', Range(0)] = 1.0
    adaptive_svd_interval: Annotated[int, 'adaptive_svd: steps between analyses', Range(1), Needs(adaptive_svd=True)] = 20
    # learning rate schedule
    decay_lr: Annotated[bool, 'warm up, then cosine to min_lr; False: constant'] = True
    warmup_iters: Annotated[int, 'steps of linear warm-up; a tenth of the schedule where it would not fit', Range(0), Needs(decay_lr=True)] = 2000
    lr_decay_iters: Annotated[int | None, 'step at which min_lr is reached; None: max_iters', Range(0), Needs(decay_lr=True)] = None
    min_lr: Annotated[float, 'final learning rate, usually learning_rate / 10', Range(0), Needs(decay_lr=True)] = 6e-5
    # system
    backend: Annotated[Literal['nccl', 'gloo'], 'torchrun: how processes talk; gloo is used on the CPU anyway'] = 'nccl'
    device: Annotated[str, "'auto' (cuda, then mps, then cpu), 'cpu', 'cuda', 'cuda:1', 'mps'"] = 'auto'
    dtype: Annotated[Literal['auto', 'float32', 'bfloat16', 'float16'],
                     "autocast type; 'auto': bfloat16 on CUDA (float16 where it lacks that), else float32"] = 'auto'
    compile: Annotated[bool | Literal['auto'], "torch.compile; 'auto': on CUDA only"] = 'auto'
    seed: Annotated[int, 'of weights, data order, dropout and evaluation windows', Range(0, below=2 ** 63)] = 1337

    def __post_init__(self):
        configuration.validate(self)
        self.check_shape()
        if self.init_from in ('scratch', 'resume'):                     # otherwise the weights say which layers there are
            self.check_layers()
        if self.lr_decay_iters is None:                                 # a number in the checkpoint: a resume keeps it
            self.lr_decay_iters = self.max_iters
        pretrained.check_name(self.init_from, ('scratch', 'resume'))
        if self.lora_adapter is not None and self.init_from in ('scratch', 'resume'):
            raise ValueError(f'lora_adapter={self.lora_adapter!r}: goes with the weights it was made on (nearest: '
                             '--init_from=FOLDER, of these)')
        out = Path(os.path.realpath(self.out_dir))                      # Path.resolve raises for links in a circle
        if not self.out_dir or is_shared(out):
            raise ValueError(f"out_dir={self.out_dir!r}: must be a folder for one run (nearest: 'out')")
        try:
            if any(any(out.glob(place + name)) for name in ('train.bin', 'prepare.py') for place in ('', '*/')):
                raise ValueError(f"out_dir={self.out_dir!r}: is a data set's folder, or holds one (nearest: 'out')")
            if out.exists() and not out.is_dir():
                raise ValueError(f'out_dir={self.out_dir!r}: is a file (nearest: {unused(Path(self.out_dir))})')
        except OSError as e:
            raise ValueError(f'out_dir={self.out_dir[:40]!r}: {e.strerror}') from None


MODEL_KEYS = [f.name for f in fields(GPTConfig)]
RUN_LOCAL_FIELDS = ('out_dir', 'init_from', 'lora_adapter', 'eval_only', 'device', 'backend')     # not a checkpoint's


@unfailing_output()
def main(argv=None):
    """-> exit code: 0 done, 2 wrong input, 1 training failed, 130 / 143 after Ctrl-C / SIGTERM; one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    if '--help' in argv or '-h' in argv:
        print(configuration.help_text(TrainConfig, __doc__.strip()))
        return 0
    with Stop(under_torchrun='RANK' in os.environ) as stop:
        try:
            cfg, set_by, saved = load_config(argv)
            with Processes(cfg) as processes:
                train(cfg, set_by, saved, processes, stop)
            return 0
        except UserError as e:
            code, words = e.code, str(e)
        except (TrainingStopped, LostProcess, torch.linalg.LinAlgError, torch.OutOfMemoryError, OSError) as e:
            code, words = 1, f'training stopped: {in_words(e)}'
        except KeyboardInterrupt as e:
            number = getattr(e, 'signal', signal.SIGINT)
            code, words = 128 + number, f'stopped by {signal.Signals(number).name}'
        who = f'process {os.environ["RANK"]}: ' if 'RANK' in os.environ else ''
        print(f'train.py: {who}{words}', file=sys.stderr)
        return code


def load_config(argv):
    """argv -> configuration, the keys the user set -> where, and the checkpoint if one is resumed, else None. A
    resumed run starts from the checkpoint's own settings, so that they need not be given again."""
    values, set_by = configuration.parse(TrainConfig, argv)
    if values['init_from'] != 'resume':
        return configuration.build(TrainConfig, values, set_by), set_by, None
    path = Path(values['out_dir']) / 'ckpt.pt'
    later = path.with_name('last.pt')                                   # where ckpt.pt is to stay the best
    if values['eval_only'] or not os.path.exists(later):
        saved = ckpt.load(path)
    else:
        saved = max((ckpt.load(p) for p in (later, path) if p.exists()), key=lambda saved: saved['iter_num'])
    path = saved['path']
    if 'best_val_loss' not in saved:
        raise UserError(f'{path}: has no best_val_loss, so training cannot go on from it')
    foreign = () if 'tokenizer' in saved else ('dtype', 'compile')      # nanoGPT's defaults are a GPU's
    config = {k: v for k, v in saved.get('config', {}).items() if k not in (*RUN_LOCAL_FIELDS, *foreign)}
    base = configuration.check_all(TrainConfig, config | saved['model_args'], path)
    values, set_by = configuration.parse(TrainConfig, argv, base)
    return configuration.build(TrainConfig, values, set_by, otherwise=path), set_by, saved


def train(cfg, set_by, saved, processes, stop):
    """One run from start to end: model, optimizer, loop, final evaluation, sample."""
    device, say = processes.device, processes.print
    dtype = devices.pick_dtype(cfg.dtype, device)
    context = devices.autocast(device, dtype)
    # TF32 keeps 10 bits, too few for a projection that claims float32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not cfg.use_svd
    torch.manual_seed(cfg.seed + processes.rank)

    if not cfg.eval_only:
        processes.in_turn(lambda: processes.is_main and check_writable(f'{cfg.out_dir}/config.py',
                                                                       f'out_dir={cfg.out_dir!r}'))
    data = Dataset(processes.in_turn(lambda: locate(cfg.dataset, cfg.tokenizer)))
    pretrained.check_tokenizer(cfg, set_by, saved, data, say)
    cfg.dataset, cfg.tokenizer = name_of(data.folder, cfg.dataset), data.meta['tokenizer']      # the text may go
    try:
        model = build_model(cfg, set_by, saved, data, device, say)
    except ValueError as e:
        raise e if isinstance(e, UserError) else UserError(f'{saved["path"]}: {e}' if saved else str(e)) from None
    model.to(device)
    describe(cfg, model, data, device, dtype, processes)
    evaluate = Evaluation(cfg, model, data, device, context, sees_future=cfg.is_noncausal)
    if cfg.eval_only:
        if processes.is_main:
            result = evaluate.final()
            say(evaluate.describe_final(result))
            if not math.isfinite(result['val/loss']):
                raise TrainingStopped(f'the loss is {result["val/loss"]}')
            try:
                append_json(make_folder(cfg.out_dir) / 'eval.jsonl', {'config': asdict(cfg), **result})
            except (UserError, OSError) as e:                           # the folder may be someone else's
                if getattr(e, 'errno', None) in FULL:
                    raise
                say(f'not written: {in_words(e)}')
        return

    adaptive = AdaptiveSVD(adaptive_layers(model), cfg.adaptive_svd_interval) if cfg.adaptive_svd else None
    with Run(cfg, model, build_optimizer(cfg, model, device), data, dtype, processes, adaptive) as run:
        if saved:
            run.restore(saved)
            saved.clear()                                               # main() still holds it: free the memory
        if processes.is_main:
            run.open_files()
        with stop.noted(), progress.bar(total=cfg.max_iters, initial=run.iter_num, desc='train', unit='step',
                                        disable=not processes.is_main) as bar:
            loop(run, evaluate, stop, bar)
        if processes.is_main:
            result = evaluate.final()
            run.log({'iter': run.iter_num, **result})
            say(evaluate.describe_final(result))
            say('sample:\n' + sample(model, data, device, context) + '\n')


def replicate(run):
    """The model as training calls it: compiled, one of the processes' replicas. Anew when it has other parameters."""
    cfg, replica, device = run.cfg, run.model, run.processes.device
    if cfg.compile is True or cfg.compile == 'auto' and 'cuda' in device:
        torch.compiler.reset()                                          # else the limit of recompilations comes near
        replica = torch.compile(replica, fullgraph=True)
    if run.processes.distributed:
        ids = [device] if 'cuda' in device else None
        own = [name for name, _ in replica.named_buffers()]             # sums of V of the process's own batches
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(replica, own)
        replica = DistributedDataParallel(replica, device_ids=ids)
    return replica


def loop(run, evaluate, stop, bar):
    """Steps until max_iters or until a signal asks to stop: learning rate, evaluation and checkpoint, step, log."""
    cfg, processes = run.cfg, run.processes
    tokens_per_iter = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size
    peak = devices.peak_flops(processes.device, run.dtype)
    replica, timed_steps, clock = replicate(run), 0, time.perf_counter()
    while True:
        lr = get_lr(run.iter_num, cfg)
        for group in run.optimizer.param_groups:
            group['lr'] = lr

        last, due = run.iter_num >= cfg.max_iters, run.iter_num % cfg.eval_interval == 0
        if due or last:
            started = time.perf_counter()
            evaluate_and_save(run, evaluate, due, stop)
            clock += time.perf_counter() - started                      # evaluation is not training time
        signal_here = stop.signal or (signal.SIGTERM if processes.orphaned() else 0)
        number = processes.largest(signal_here)                         # all stop at the same step
        if number:
            save_interrupted(run)
            raise Interrupted(number)
        if last:
            break

        loss, changed = step(run, replica)
        replica = replicate(run) if changed else replica
        timed_steps += 1
        bar.update()
        if run.iter_num % cfg.log_interval == 0 and processes.is_main:
            seconds = (time.perf_counter() - clock) / timed_steps
            row = {'iter': run.iter_num, 'loss': loss, 'lr': lr, 'step_ms': seconds * 1e3,
                   'tokens_per_s': tokens_per_iter / seconds}
            if peak:
                micro_steps = cfg.gradient_accumulation_steps // processes.world_size
                row['mfu'] = run.model.estimate_mfu(cfg.batch_size * micro_steps, seconds, peak)
            run.log(row)
            bar.set_postfix_str(f'loss {loss:.4f}, {row["tokens_per_s"]:,.0f} tokens/s'
                                + (f', mfu {row["mfu"]:.1%}' if peak else ''), refresh=False)
            timed_steps, clock = 0, time.perf_counter()


def evaluate_and_save(run, evaluate, due, stop):
    """All processes come here, for their random states; process 0 does the work. A signal ends the evaluation: after a
    resume it is made again. due: whether the step is on the grid of eval_interval, or only the last."""
    cfg, random = run.cfg, run.random_states()
    if not run.processes.is_main:
        return
    try:
        result = evaluate.interim(stop.raise_if_noted)
    except Interrupted:
        return
    except torch.linalg.LinAlgError:                                    # SVD of what is not finite
        result = {'train/loss': math.nan, 'val/loss': math.nan}
    if not math.isfinite(result['train/loss'] + result['val/loss']):
        batch = run.data.batch('val', cfg.batch_size, cfg.block_size, torch.Generator(), run.processes.device)
        raise run.stopped(f'step {run.iter_num}: at evaluation the loss is {result["val/loss"]}', [batch])
    run.log({'iter': run.iter_num, **result})
    run.processes.print(f'step {run.iter_num}: {evaluate.describe(result)}')
    improved, best = result['val/loss'] < run.best_interim_loss, min(result['val/loss'], run.best_interim_loss)
    if due:
        run.best_interim_loss = best
    if run.iter_num > 0 and (improved or cfg.always_save_checkpoint):
        run.save('ckpt.pt', random, best)


def save_interrupted(run):
    """The state as it is: in ckpt.pt, unless that is to stay the best one."""
    random = run.random_states()
    if run.processes.is_main:
        keep = (run.out / 'ckpt.pt').exists() and not run.cfg.always_save_checkpoint
        name = 'last.pt' if keep else 'ckpt.pt'
        run.save(name, random, min(run.best_interim_loss, run.best_at_end))
        run.processes.print(f'interrupted after step {run.iter_num}, saved to {run.out / name}; to go on: {run.resume}')


def step(run, replica):
    """One optimizer step -> the loss, the mean over all micro-batches of all processes, and whether layers have other
    parameters now. Raises TrainingStopped, before the optimizer touches anything, where the loss or the gradient is not
    finite."""
    cfg, model, processes, scaler = run.cfg, run.model, run.processes, run.scaler
    micro_steps, batches = cfg.gradient_accumulation_steps // processes.world_size, []
    loss_sum, adaptive = torch.zeros((), device=processes.device), run.adaptive
    analysed = adaptive is not None and adaptive.is_analysis_step(run.iter_num + 1)
    if analysed:
        adaptive.track_weight_grads()
    for micro_step in range(micro_steps):
        # all processes draw the windows of all, in the order in which a single process would take them
        starts = run.data.draw('train', processes.world_size * cfg.batch_size, cfg.block_size, run.order)
        own = starts.view(processes.world_size, cfg.batch_size)[processes.rank].tolist()
        x, y = run.data.windows(run.data.tokens('train'), own, cfg.block_size, 'train', processes.device)
        batches.append((x, y))
        alone = processes.distributed and micro_step < micro_steps - 1
        try:
            with replica.no_sync() if alone else nullcontext():         # gradients travel once a step
                with run.context:
                    _, loss = replica(x, y)
                    loss = loss / micro_steps
                scaler.scale(loss).backward()
        except torch.linalg.LinAlgError as e:
            raise run.stopped(f'step {run.iter_num + 1}: {one_line(e)}', batches) from None
        loss_sum += loss.detach()

    scaler.unscale_(run.optimizer)
    loss = processes.mean(loss_sum)
    changed = analysed and bool(loss.isfinite()) and analyse(run)       # of NaN there is no analysis
    params = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in params])
    loss, norm_value = torch.stack((loss, norm)).tolist()   # waits for the device
    scaler_skips = scaler.is_enabled() and scaler.get_scale() >= 1      # float16: an overflow at first is no fault
    if not math.isfinite(loss) or not math.isfinite(norm_value) and not scaler_skips:
        raise run.stopped(f'step {run.iter_num + 1}: the loss is {loss}, the gradient norm {norm_value}', batches)
    if cfg.grad_clip > 0:
        torch.nn.utils.clip_grads_with_norm_(params, cfg.grad_clip, norm)
    scaler.step(run.optimizer)
    scaler.update()
    if adaptive is not None:
        adaptive.project_factors()
    if not math.isfinite(norm_value):                                   # float16: the scaler made no step
        clear_grams(model.warm_starts())
    run.optimizer.zero_grad(set_to_none=True)
    run.iter_num += 1
    if analysed and processes.is_main:
        processes.print('\n'.join(adaptive.report(run.iter_num)))
        run.log({'iter': run.iter_num, **adaptive.metrics()})
    return loss, changed


def analyse(run):
    """The analysis of adaptive layers in this step, from its gradients -> whether layers have other parameters now."""
    scale = run.scaler.get_scale() if run.scaler.is_enabled() else 1.0  # still on what the optimizer does not have
    changed = run.adaptive.analyze(
        run.iter_num + 1, swap_params=lambda old: swap_params(run.optimizer, run.model, old),
        mean=lambda grad: run.processes.mean(grad / scale), on_main=run.processes.first)
    run.cfg.adaptive_svd_ranks = lowrank_ranks(run.model)
    run.model.config = replace(run.model.config, adaptive_svd_ranks=run.cfg.adaptive_svd_ranks)
    return changed


def build_model(cfg, set_by, saved, data, device, say):
    """The model of init_from. Its shape is fixed by a checkpoint or GPT-2: options that contradict it are an error on
    the command line and a remark in a config file (nanoGPT's files carry the shape when they resume)."""
    free = {k: getattr(cfg, k) for k in OVERRIDABLE_FIELDS}
    if cfg.init_from == 'scratch':
        if cfg.vocab_size is None:
            cfg.vocab_size = data.padded_vocab_size
        data.check_length(cfg.block_size)
        devices.check_memory(cfg, device)
        if cfg.lora_rank is not None:
            raise UserError(f'lora_rank={cfg.lora_rank}: adapts trained weights (nearest: --init_from=FOLDER)')
        model = GPT(GPTConfig(**{k: getattr(cfg, k) for k in MODEL_KEYS} | {'adaptive_svd_ranks': None}))
    elif cfg.init_from == 'resume':
        model = GPT.from_checkpoint(saved, **free)
    else:                                                               # a folder may say what its SVD is
        model = GPT.from_pretrained(cfg.init_from, {k: free[k] for k in free if k in set_by or k == 'dropout'})
        if cfg.lora_adapter is not None:
            pretrained.load_adapter(model, cfg.lora_adapter, cfg.init_from, say)
    if cfg.init_from != 'resume':
        model.add_adapters(**{k: getattr(cfg, k) for k in ADAPTER_DEFAULTS})
    shape, unused = asdict(model.config), configuration.unused_options(cfg, model.config)
    if unused:
        say(f'no effect here: {", ".join(f"{k}={getattr(cfg, k)!r}" for k in unused)}')
    for key in sorted(set(MODEL_KEYS) - set(free) - set(unused)):
        cropped = key == 'block_size' and cfg.block_size < shape[key]
        if key in set_by and getattr(cfg, key) != shape[key] and not cropped:
            if set_by[key] == 'the command line' or key in ('adaptive_svd', 'lora_rank'):       # it would train all
                run = Path(cfg.out_dir if saved else cfg.init_from)
                adapted = model.config.adaptive_svd or model.config.has_lora
                near = pretrained.merge_command(run) if adapted else begin_from(run, cfg.dataset)
                raise UserError(f'{key}={getattr(cfg, key)}: {cfg.init_from} has {key}={shape[key]}, which is fixed'
                                + f' (nearest: {near})' * (key in ADAPTER_DEFAULTS))
            say(f'{key}={getattr(cfg, key)} of {set_by[key]} gives way: {cfg.init_from} has {key}={shape[key]}')
    if cfg.block_size < shape['block_size']:
        model.crop_block_size(cfg.block_size)
    for key in MODEL_KEYS:                                              # from here on cfg says what is
        setattr(cfg, key, getattr(model.config, key))
    if data.vocab_size > cfg.vocab_size:
        raise UserError(f'vocab_size={cfg.vocab_size}: the data set {data.folder} has {data.vocab_size} token ids '
                        f'(nearest: {data.vocab_size if cfg.init_from == "scratch" else "its own data set"})')
    data.check_length(cfg.block_size)
    if cfg.init_from != 'scratch':
        devices.check_memory(cfg, device)
    return model


def describe(cfg, model, data, device, dtype, processes):
    """What is about to happen, in a few lines."""
    say, c = processes.print, model.config
    factored = f', {len(c.layer_ranks)} layers of two factors' if c.layer_ranks else ''
    say(f'model: {c.n_layer} layers, {c.n_head} heads, {c.n_embd} wide, context {c.block_size}, vocabulary '
        f'{c.vocab_size}: {model.get_num_params():,} parameters{factored}; {device}, {dtype}, seed {cfg.seed}')
    say(f'data: {data.folder}, {len(data.tokens("train")):,} + {len(data.tokens("val")):,} tokens '
        f'({data.meta.get("source", "source unknown")}); '
        f'{cfg.gradient_accumulation_steps * cfg.batch_size * c.block_size:,} tokens a step')
    if c.adaptive_svd:
        say(f'adaptive SVD: {len(c.adaptive_layers)} layers, an analysis every {cfg.adaptive_svd_interval} steps')
    if c.has_lora:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        say(f'LoRA, {c.lora_init!r}: rank {c.lora_rank} in {len(c.lora_layers)} layers, {trained:,} trained parameters')
    if c.use_mla:
        say(f'MLA: one latent of {c.latent_dim} numbers a token and layer for keys and values, of {2 * c.n_embd}')
    if c.use_svd or c.svd_rank is not None:
        say(f'SVD on V: {c.svd_summary}')
    decays = cfg.decay_lr and not cfg.eval_only
    if decays and schedule_length(cfg) != cfg.max_iters:
        say(f'learning rate: the schedule is lr_decay_iters={cfg.lr_decay_iters} steps long, the run '
            f'max_iters={cfg.max_iters} (--lr_decay_iters={cfg.max_iters} makes them one)')
    if decays and warmup_iters(cfg) != cfg.warmup_iters:
        say(f'warmup_iters={cfg.warmup_iters} does not fit {schedule_length(cfg)} steps: using {warmup_iters(cfg)}')
    if processes.distributed and processes.backend != cfg.backend:
        say(f'backend={cfg.backend} needs CUDA: using {processes.backend}')


if __name__ == '__main__':
    sys.exit(main())

"""
Train a GPT, with or without a truncated SVD on the values V of attention:

    python train.py config/train_svd_test.py               # SVD on V, minutes on two CPU cores
    python train.py config/train_svd_test.py --svd_rank=8  # any option can be overridden
    python train.py --help                                 # every option, its default and meaning
    python train.py --init_from=resume --out_dir=OUT       # continue a run that was stopped
    python train.py --eval_only=True --init_from=resume --out_dir=OUT --use_svd=True --svd_rank=8
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

Names and defaults of options are nanoGPT's. The run folder OUT_DIR gets ckpt.pt, config.py (the
value of every option; `python train.py OUT_DIR/config.py` repeats the run), environment.json,
metrics.jsonl and curves.png. Ctrl-C and SIGTERM save after the current step: docs/RELIABILITY.md.
"""

import json
import math
import os
import shlex
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from runtime import cli  # before torch: reports missing packages

import torch
from torch.nn.parallel import DistributedDataParallel

from lowrank.adapters import adaptive_layers, lowrank_ranks
from lowrank.adaptive_layer import CURVES, AdaptiveSVD
from lowrank.subspace_iteration import clear_grams
from model import ADAPTER_DEFAULTS, GPT, OVERRIDABLE_FIELDS, GPTConfig
from runtime import checkpoint as ckpt
from runtime import config as configuration
from runtime import device as devices
from runtime import huggingface, plots, tracking
from runtime.config import PATH, Failure, Needs, Range, Section, UserError, one_line
from runtime.data import Dataset, locate, name_of
from runtime.distributed import Processes, broadcast_result, gather, mean_over_processes
from runtime.evaluation import Evaluation
from runtime.files import (FULL, archive_run, check_writable, is_shared, locked_folder, make_folder,
                           remove_leftovers, unused, unwritable, write_atomically)
from runtime.generation import sample
from runtime.nan_check import first_nonfinite_layer
from runtime.optimizer import (build_optimizer, get_lr, restore_optimizer, schedule_length,
                               swap_params, warmup_iters)


@dataclass
class TrainConfig(GPTConfig):
    """Options of train.py: the options of GPTConfig and the options of a run. For a value that is
    not valid, raises ValueError with a message that starts with the option's name."""
    # model: where train.py's defaults differ from GPTConfig's
    vocab_size: Annotated[int | None, "token ids; None: the data's, padded for BPE",
                          Range(1)] = None
    bias: Annotated[bool, 'biases in Linear and LayerNorm; True: as in GPT-2'] = False
    # input and output
    out_dir: Annotated[str, 'run folder; an older run in it is moved to OUT_DIR.1, .2, ...', PATH,
                       Section('input and output')] = 'out'
    eval_interval: Annotated[int, 'steps between evaluations and checkpoints', Range(1)] = 2000
    log_interval: Annotated[int, 'steps between lines of metrics.jsonl', Range(1)] = 1
    eval_iters: Annotated[int, 'batches per split and evaluation; at the end the whole val split',
                          Range(1)] = 200
    eval_only: Annotated[bool, 'only evaluate, on the whole validation split'] = False
    always_save_checkpoint: Annotated[bool, 'ckpt.pt is always the latest checkpoint; False: the '
                                      'best one'] = True
    init_from: Annotated[str, "'scratch', 'resume', 'gpt2' to 'gpt2-xl', or a model folder",
                         PATH] = 'scratch'
    lora_adapter: Annotated[str | None, 'folder that export.py --to=lora made, for init_from',
                            PATH] = None
    # wandb
    wandb_log: Annotated[bool, 'log to Weights & Biases; WANDB_MODE=offline logs to OUT_DIR',
                         Section('wandb')] = False
    wandb_project: Annotated[str, 'name of the project'] = 'owt'
    wandb_run_name: Annotated[str, 'name of the run'] = 'gpt2'
    wandb_group: Annotated[str | None, 'name of the group of runs'] = None
    wandb_tags: Annotated[str | None, "tags, for example 'svd,rank 4'"] = None
    # data
    dataset: Annotated[str, 'folder in data/, another prepared folder, or a text file', PATH,
                       Section('data')] = 'openwebtext'
    tokenizer: Annotated[Literal['char', 'gpt2'], "tokens of a text file: 'char' or 'gpt2' (BPE)"
                         ] = 'char'
    gradient_accumulation_steps: Annotated[int, 'micro-batches per step, summed over processes',
                                           Range(1)] = 5 * 8
    batch_size: Annotated[int, 'sequences per micro-batch', Range(1)] = 12
    # optimizer
    optimizer: Annotated[Literal['adamw', 'muon'], "'adamw'; 'muon': Muon for matrices of blocks, "
                         'AdamW for the rest', Section('optimizer')] = 'adamw'
    learning_rate: Annotated[float, 'highest learning rate, after the warm-up',
                             Range(0, below=1e36)] = 6e-4
    muon_per_head: Annotated[bool, 'Muon: orthogonalize queries, keys and values per head',
                             Needs(optimizer='muon')] = False
    max_iters: Annotated[int, 'optimizer steps', Range(0)] = 600000
    weight_decay: Annotated[float, 'weight decay of matrices; none for vectors', Range(0)] = 1e-1
    beta1: Annotated[float, 'AdamW: decay of the mean gradient', Range(0, below=1)] = 0.9
    beta2: Annotated[float, 'AdamW: decay of the mean squared gradient', Range(0, below=1)] = 0.95
    grad_clip: Annotated[float, 'clip the gradient norm to this; 0: no clipping', Range(0)] = 1.0
    adaptive_svd_interval: Annotated[int, 'steps between analyses of the layers', Range(1),
                                     Needs(adaptive_svd=True), Section('adaptive SVD')] = 20
    # learning rate schedule
    decay_lr: Annotated[bool, 'linear warm-up, cosine decay to min_lr; False: constant',
                        Section('learning rate')] = True
    warmup_iters: Annotated[int, 'steps of warm-up; if too many, a tenth of the schedule',
                            Range(0), Needs(decay_lr=True)] = 2000
    lr_decay_iters: Annotated[int | None, 'step that reaches min_lr; None: the last step', Range(0),
                              Needs(decay_lr=True)] = None
    min_lr: Annotated[float, 'final learning rate, usually learning_rate / 10', Range(0),
                      Needs(decay_lr=True)] = 6e-5
    # system
    backend: Annotated[Literal['nccl', 'gloo'], "for torchrun: 'nccl' or 'gloo'; the CPU always "
                       "uses 'gloo'", Section('system')] = 'nccl'
    device: Annotated[str, "'cpu', 'cuda', 'cuda:1', 'mps'; 'auto': cuda, else mps, "
                      'else cpu'] = 'auto'
    dtype: Annotated[Literal['auto', 'float32', 'bfloat16', 'float16'],
                     "autocast to 'float32', 'bfloat16' or 'float16'; 'auto': bfloat16 on CUDA "
                     '(float16 on GPUs without it), else float32'] = 'auto'
    compile: Annotated[bool | Literal['auto'], "use torch.compile; 'auto': on CUDA only"] = 'auto'
    seed: Annotated[int, 'random seed of weights, data order, dropout, evaluation',
                    Range(0, below=2 ** 63)] = 1337

    def __post_init__(self):
        configuration.validate(self)
        self.check_shape()
        if self.init_from in ('scratch', 'resume'):     # other models are checked when loaded
            self.check_layers()
        if self.lr_decay_iters is None:  # stored as a number, so that a resume keeps it
            self.lr_decay_iters = self.max_iters
        huggingface.check_name(self.init_from, ('scratch', 'resume'))
        if self.lora_adapter is not None and self.init_from in ('scratch', 'resume'):
            raise ValueError(
                f'lora_adapter={self.lora_adapter!r}: needs the weights that it was trained '
                'on (nearest: --init_from=FOLDER with these weights)')
        out = os.path.realpath(self.out_dir)
        if not self.out_dir or is_shared(Path(out)):
            raise ValueError(
                f'out_dir={self.out_dir!r}: must be a folder for this run alone, not the working '
                "or home folder or one above them (nearest: 'out')")
        if os.path.exists(f'{out}/train.bin') or os.path.exists(f'{out}/prepare.py'):
            raise ValueError(f"out_dir={self.out_dir!r}: holds a data set (nearest: 'out')")
        if os.path.isfile(out):
            raise ValueError(
                f'out_dir={self.out_dir!r}: is a file (nearest: {unused(Path(self.out_dir))})')


MODEL_KEYS = [f.name for f in fields(GPTConfig)]
# options that a resumed run does not take from its checkpoint
RUN_LOCAL_FIELDS = ('out_dir', 'init_from', 'lora_adapter', 'eval_only', 'device', 'backend')
# first line of a run's config.py; older runs are recognized by it, so it must not change
HEAD = '# this run, resolved; can be given to train.py again\n'
# files of a run that ended before it wrote config.py or a checkpoint
RUN_FILES = {'environment.json', 'eval.jsonl', 'curves.png', 'wandb'}


def main(argv=None):
    """Run train.py. argv: its arguments, by default those of the command line.

    Returns the exit code: 0 done, 2 wrong input, 1 training failed, 130 after Ctrl-C, 143 after
    SIGTERM. An error is one line on stderr.
    """
    return cli.run('train.py', TrainConfig, __doc__, train, argv, load_config,
                   again='to continue a saved run: --init_from=resume --out_dir=OUT_DIR')


# --------------------------------------------------------------------------------------------------
# a run

def train(loaded):
    """Run one training from start to end. loaded: what `load_config` returns."""
    cfg, set_by, saved = loaded
    with Processes(cfg) as processes:
        run_training(cfg, set_by, saved, processes)     # DDP must end before the process group


def run_training(cfg, set_by, saved, processes):
    """Set up, train, evaluate on the whole validation split, print a sample."""
    device, say = processes.device, processes.print
    out, dtype = Path(cfg.out_dir), devices.pick_dtype(cfg.dtype, device)
    # the SVD needs float32 products, but TF32 keeps 10 bits of the mantissa
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not cfg.use_svd
    torch.manual_seed(cfg.seed + processes.rank)
    if not cfg.eval_only:
        processes.main_process_first(lambda: processes.is_main and check_writable(
            out / 'config.py', f'out_dir={cfg.out_dir!r}'))
    data = Dataset(processes.main_process_first(lambda: locate(cfg.dataset, cfg.tokenizer)))
    huggingface.check_tokenizer(cfg, set_by, saved, data, say)
    # a later resume finds the prepared data even if the text file is gone
    cfg.dataset, cfg.tokenizer = name_of(data.folder, cfg.dataset), data.meta['tokenizer']
    model = build_model(cfg, set_by, saved, data, say).to(device)
    describe(cfg, model, data, dtype, processes)
    evaluation = Evaluation(cfg, model, data, device, devices.autocast(device, dtype),
                            cfg.is_noncausal)
    if cfg.eval_only:
        return evaluate_only(cfg, evaluation, out, processes)

    state = new_state(cfg, model, device, data, processes.distributed)
    if saved:
        restore(state, saved, processes)
        saved.clear()                                   # frees memory; the caller holds the dict
    with open_out_dir(state, dtype, say) if processes.is_main else nullcontext() as log:
        try:
            with cli.signals.deferred(), tracking.bar(
                    total=cfg.max_iters, initial=state.iter_num, desc='train', unit='step',
                    disable=not processes.is_main) as bar:
                loop(state, evaluation, log, processes, bar)
            if processes.is_main:
                row = evaluation.final()
                log({'iter': state.iter_num, **row})
                say(evaluation.describe_final(row))
                draw_curves(out, say)
                say('sample:\n' + sample(model, data, device, state.context) + '\n')
        except (OSError, FloatingPointError, torch.linalg.LinAlgError) as e:
            raise stopped(state, e, processes) from None


def stopped(state, error, processes):
    """Return the Failure for an error that ends training. Its message names the step and the
    checkpoint that is kept, and says what to do."""
    words = f'training stopped after step {state.iter_num}: {one_line(error)}'
    if processes.is_main:                               # only process 0 knows what is saved
        words += '; no checkpoint had been saved' if state.saved_at is None else (
            f'; the checkpoint of step {state.saved_at} is kept')
    if isinstance(error, OSError) and error.errno in FULL:
        again = ('start again' if state.saved_at is None else
                 f'python train.py {resume_options(state.cfg.out_dir)}')
        words += f'; make room there, then {again}'
    return Failure(words)


def loop(state, evaluation, log, processes, bar):
    """Train until step max_iters or a signal. log(row) writes a row of metrics on process 0."""
    cfg = state.cfg
    micro_steps = cfg.gradient_accumulation_steps // processes.world_size
    tokens_per_iter = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size
    peak = devices.peak_flops(state.device, devices.pick_dtype(cfg.dtype, state.device))
    timed_steps, clock = 0, time.perf_counter()
    while True:
        lr = get_lr(state.iter_num, cfg)
        for group in state.optimizer.param_groups:
            group['lr'] = lr

        is_last = state.iter_num >= cfg.max_iters
        if state.iter_num % cfg.eval_interval == 0 or is_last:  # evaluation is not part of step_ms
            started = time.perf_counter()
            evaluate_and_save(state, evaluation, log, processes)
            clock += time.perf_counter() - started
        received = cli.signals.received or signal.SIGTERM * processes.parent_exited()
        received = processes.all_reduce_max(received)   # all processes stop at the same step
        if received:
            save_interrupted(state, processes)
            raise cli.Interrupted(received)
        if is_last:
            break

        batches = [next_batch(state, processes) for _ in range(micro_steps)]
        try:
            loss = train_step(state, batches)
        except (FloatingPointError, torch.linalg.LinAlgError) as e:
            raise bad_layer(state, batches, one_line(e)) from None

        timed_steps += 1
        bar.update()
        if not processes.is_main:
            continue
        if state.adaptive and state.adaptive.is_analysis_step(state.iter_num):
            processes.print('\n'.join(state.adaptive.report(state.iter_num)))
            log({'iter': state.iter_num, **state.adaptive.metrics()})
        if state.iter_num % cfg.log_interval == 0:
            seconds = (time.perf_counter() - clock) / timed_steps
            row = {'iter': state.iter_num, 'loss': loss, 'lr': lr, 'step_ms': seconds * 1e3,
                   'tokens_per_s': tokens_per_iter / seconds}
            if peak:
                row['mfu'] = state.model.estimate_mfu(cfg.batch_size * micro_steps, seconds, peak)
            log(row)
            bar.set_postfix_str(f'loss {loss:.4f}, {row["tokens_per_s"]:,.0f} tokens/s'
                                + (f', mfu {row["mfu"]:.1%}' if peak else ''), refresh=False)
            timed_steps, clock = 0, time.perf_counter()


def next_batch(state, processes):
    """Draw x and y (B, T) for this process. Each process draws the windows of all processes, so
    that the order of the data is the same as with a single process."""
    cfg, data = state.cfg, state.data
    starts = data.sample_offsets('train', processes.world_size * cfg.batch_size, cfg.block_size,
                                 state.data_rng)
    own = starts.view(processes.world_size, cfg.batch_size)[processes.rank].tolist()
    return data.windows(data.tokens('train'), own, cfg.block_size, 'train', state.device)


# --------------------------------------------------------------------------------------------------
# a training step

@dataclass
class TrainState:
    """State of a run in progress. A checkpoint holds the states of model, optimizer, scaler,
    adaptive and data_rng, with iter_num and best_val_loss."""
    cfg: TrainConfig
    model: GPT
    optimizer: Any
    device: str
    context: Any                            # autocast
    scaler: torch.amp.GradScaler
    data: Dataset | None                    # None if the caller makes the batches
    data_rng: torch.Generator               # draws training batches and nothing else
    distributed: bool = False
    adaptive: AdaptiveSVD | None = None
    replica: Any = None                     # model, compiled and wrapped in DDP
    iter_num: int = 0
    best_val_loss: float = 1e9
    saved_at: int | None = None             # step of the last checkpoint


def new_state(cfg, model, device, data=None, distributed=False):
    """Return the state of a run before its first step."""
    dtype = devices.pick_dtype(cfg.dtype, device)
    scales = dtype == 'float16' and device.startswith('cuda')
    state = TrainState(
        cfg=cfg, model=model, optimizer=build_optimizer(cfg, model, device), device=device,
        context=devices.autocast(device, dtype), data=data, distributed=distributed,
        scaler=torch.amp.GradScaler('cuda', enabled=scales),
        data_rng=torch.Generator().manual_seed(cfg.seed))
    if cfg.adaptive_svd:
        state.adaptive = AdaptiveSVD(adaptive_layers(model), cfg.adaptive_svd_interval)
    state.replica = replicate(state)
    return state


def replicate(state):
    """Return the model compiled and wrapped in DDP, as the options say. Call it again after
    parameters of the model were replaced."""
    replica = state.model
    if state.cfg.compile is True or state.cfg.compile == 'auto' and 'cuda' in state.device:
        torch.compiler.reset()  # otherwise repeated calls hit the recompile limit
        replica = torch.compile(replica, fullgraph=True)
    if state.distributed:
        # buffers are sums over the batches of one process, so DDP must not synchronize them
        own = [name for name, _ in replica.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(replica, own)
        replica = DistributedDataParallel(
            replica, device_ids=[state.device] if 'cuda' in state.device else None)
    return replica


def language_model_loss(model, x, y):
    """Return the loss of model for inputs x and targets y (B, T)."""
    return model(x, y)[1]


def train_step(state, batches, loss_of=language_model_loss):
    """Take one training step: forward and backward over micro-batches, clip, optimizer step.

    batches: list of pairs x, y, both (B, T). loss_of(model, x, y) returns the loss. Returns the
    mean loss over all processes. Raises FloatingPointError or torch.linalg.LinAlgError if the loss
    or a gradient is not finite, before the optimizer changes anything.
    """
    model, optimizer, scaler, adaptive = state.model, state.optimizer, state.scaler, state.adaptive
    analyze = adaptive is not None and adaptive.is_analysis_step(state.iter_num + 1)
    if analyze:
        adaptive.track_weight_grads()
    loss_sum = 0.0
    for i, (x, y) in enumerate(batches):
        waits = state.distributed and i + 1 < len(batches)  # DDP reduces gradients once per step
        with state.replica.no_sync() if waits else nullcontext():
            with state.context:
                loss = loss_of(state.replica, x, y) / len(batches)
            scaler.scale(loss).backward()
        loss_sum += loss.detach()

    scaler.unscale_(optimizer)
    loss = mean_over_processes(loss_sum)
    if analyze and loss.isfinite():
        analyze_gradients(state)
    params = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in params])
    loss, norm_value = torch.stack((loss, norm)).tolist()               # waits for the device
    # float16: the scaler skips the step
    scaler_skips = scaler.is_enabled() and scaler.get_scale() >= 1
    if not math.isfinite(loss) or not math.isfinite(norm_value) and not scaler_skips:
        raise FloatingPointError(f'the loss is {loss}, the gradient norm {norm_value}')
    if state.cfg.grad_clip > 0:
        torch.nn.utils.clip_grads_with_norm_(params, state.cfg.grad_clip, norm)
    scaler.step(optimizer)
    scaler.update()
    if adaptive is not None:
        adaptive.project_factors()
    if not math.isfinite(norm_value):                       # the scaler skipped the step
        for bases in model.warm_starts().values():
            clear_grams(bases)
    optimizer.zero_grad(set_to_none=True)
    state.iter_num += 1
    return loss


def analyze_gradients(state):
    """Choose the modes of the adaptive layers by the gradients of this step. A layer that changes
    its mode gets new parameters. The model is then compiled and wrapped again (`replicate`)."""
    # the scaler unscales only the gradients of the optimizer's parameters
    scale = state.scaler.get_scale() if state.scaler.is_enabled() else 1.0
    changed = state.adaptive.analyze(
        state.iter_num + 1, swap_params=lambda old: swap_params(state.optimizer, state.model, old),
        mean=lambda grad: mean_over_processes(grad / scale), on_main=broadcast_result)
    state.cfg.adaptive_svd_ranks = lowrank_ranks(state.model)
    state.model.config = replace(state.model.config,
                                 adaptive_svd_ranks=state.cfg.adaptive_svd_ranks)
    if changed:
        state.replica = replicate(state)


# --------------------------------------------------------------------------------------------------
# evaluation and checkpoints

def evaluate_and_save(state, evaluation, log, processes):
    """Evaluate on process 0 and save a checkpoint with the random states of all processes. A signal
    ends the evaluation early. A resumed run repeats the evaluation. Raises FloatingPointError if a
    training or validation loss is not finite."""
    random_states = gather(ckpt.random_state(state.data_rng, state.device))
    if not processes.is_main:
        return
    try:
        row = evaluation.interim(cli.signals.raise_if_received)
    except cli.Interrupted:
        return
    except torch.linalg.LinAlgError:                                    # SVD of NaN or infinity
        row = {'train/loss': math.nan, 'val/loss': math.nan}
    if not math.isfinite(row['train/loss'] + row['val/loss']):
        batch = state.data.batch('val', state.cfg.batch_size, state.cfg.block_size,
                                 torch.Generator(), state.device)
        raise bad_layer(state, [batch], f'the validation loss is {row["val/loss"]}')
    log({'iter': state.iter_num, **row})
    processes.print(f'step {state.iter_num}: {evaluation.describe(row)}')
    # equal if a resumed run repeats the evaluation
    improved = row['val/loss'] <= state.best_val_loss
    state.best_val_loss = min(row['val/loss'], state.best_val_loss)
    if state.iter_num > 0:
        save(state, random_states, is_best=improved)


def save_interrupted(state, processes):
    """Save a checkpoint after a signal and print how to continue."""
    random_states = gather(ckpt.random_state(state.data_rng, state.device))
    if processes.is_main:
        path = save(state, random_states)
        processes.print(f'interrupted after step {state.iter_num}, saved to {path}; to continue: '
                        f'python train.py {resume_options(path.parent)}')
        draw_curves(path.parent, processes.print)


def save(state, random_states, is_best=False):
    """Write a checkpoint and return its path. The path is ckpt.pt, or last.pt if ckpt.pt must stay
    the best checkpoint. After ckpt.pt is written, last.pt is deleted. Raises OSError if the file
    cannot be written, FloatingPointError if a value is not finite."""
    out, model = Path(state.cfg.out_dir), state.model
    is_best = is_best or state.cfg.always_save_checkpoint or not (out / 'ckpt.pt').exists()
    path = out / ('ckpt.pt' if is_best else 'last.pt')
    checkpoint = {
        'model': model.state_dict(), 'model_args': asdict(model.config), **model.extra_state(),
        'optimizer': state.optimizer.state_dict(), 'scaler': state.scaler.state_dict(),
        'iter_num': state.iter_num, 'best_val_loss': state.best_val_loss,
        'config': asdict(state.cfg), 'tokenizer': state.data.meta, 'random': random_states}
    if state.adaptive is not None:
        checkpoint['adaptive_svd'] = state.adaptive.state_dict()
    ckpt.save(checkpoint, path)
    state.saved_at = state.iter_num
    if is_best:
        (out / 'last.pt').unlink(missing_ok=True)
    return path


def bad_layer(state, batches, error):
    """Return a FloatingPointError that names the first layer whose values are not finite."""
    layer = first_nonfinite_layer(state.model, batches, state.context)
    return FloatingPointError(
        f'{error}; first bad layer: {layer or "none when the step was repeated"}')


def evaluate_only(cfg, evaluation, out, processes):
    """Evaluate on the whole validation split and append the result to OUT_DIR/eval.jsonl. Raises
    Failure if the loss is not finite."""
    if not processes.is_main:
        return
    row = evaluation.final()
    processes.print(evaluation.describe_final(row))
    if not math.isfinite(row['val/loss']):
        raise Failure(f'the validation loss is {row["val/loss"]}')
    tracking.append_json(make_folder(out) / 'eval.jsonl', {'config': asdict(cfg), **row})


# --------------------------------------------------------------------------------------------------
# resume, and OUT_DIR

def load_config(argv):
    """Read the options of a run from argv, config files and, to resume, the checkpoint.

    Returns three objects: the configuration, a dict from each option that the user set to where the
    option was set, and the checkpoint of a resumed run or None. A resumed run takes its options
    from the checkpoint, unless they are set again. Raises UserError.
    """
    values, set_by = configuration.parse(TrainConfig, argv)
    if values['init_from'] != 'resume':
        return configuration.build(TrainConfig, values, set_by), set_by, None
    path = Path(values['out_dir']) / 'ckpt.pt'
    both = [path.with_name('last.pt'), path]            # last.pt exists if ckpt.pt is the best one
    paths = [] if values['eval_only'] else [p for p in both if os.path.exists(p)]
    saved = max(map(ckpt.load, paths or [path]), key=lambda saved: saved['iter_num'])
    path = saved['path']
    foreign = () if 'tokenizer' in saved else ('dtype', 'compile')  # nanoGPT's defaults need a GPU
    config = {key: value for key, value in saved.get('config', {}).items()
              if key not in (*RUN_LOCAL_FIELDS, *foreign)}
    base = configuration.check_all(TrainConfig, config | saved['model_args'], path)
    values, set_by = configuration.parse(TrainConfig, argv, base)
    return configuration.build(TrainConfig, values, set_by, otherwise=path), set_by, saved


def resume_options(out):
    """Return the options that continue a run, quoted for a shell."""
    return shlex.join(['--init_from=resume', f'--out_dir={out}'])


def begin_from(run, dataset):
    """Return the options for a new run from the weights of the run folder `run`, quoted for a
    shell. `dataset` is used if the folder has no config.py."""
    settings = f'{run}/config.py' if os.path.isfile(f'{run}/config.py') else f'--dataset={dataset}'
    options = shlex.join([settings, f'--init_from={run}', '--lora_adapter=None'])
    return f'{options} --out_dir={unused(run)}'


def restore(state, saved, processes):
    """Put the state of a checkpoint into a new run. Raises UserError if the state does not fit."""
    cfg, path = state.cfg, saved['path']
    states, optimizer = saved.get('random'), saved.get('optimizer')
    if states is None:
        processes.print(f'{path} has no random state, so the data order starts again')
    elif len(states) != processes.world_size:
        raise UserError(
            f'{path}: was saved by {len(states)} processes, but this run has '
            f'{processes.world_size}, which would change the data order (nearest: torchrun '
            f'--nproc_per_node={len(states)} train.py {resume_options(cfg.out_dir)})')
    theirs = 'muon' if 'muon' in (optimizer or {}) else 'adamw'
    if optimizer and theirs != cfg.optimizer and optimizer.get('state') != {}:
        raise UserError(
            f'{path}: its optimizer state is that of {theirs!r}, not of optimizer={cfg.optimizer} '
            f'(nearest: --optimizer={theirs}, or from its weights: '
            f'{begin_from(cfg.out_dir, cfg.dataset)})')
    try:
        if state.adaptive is not None and 'adaptive_svd' in saved:
            state.adaptive.load_state_dict(saved['adaptive_svd'])
        # an exported checkpoint has no random states and an empty optimizer state
        if states is None and isinstance(optimizer, dict) and optimizer.get('state') == {}:
            processes.print(f'{path} has no optimizer state, so the optimizer starts again')
        else:
            restore_optimizer(state.optimizer, optimizer,
                              cropped=state.model.transformer.wpe.weight)
        if states:
            ckpt.set_random_state(states[processes.rank], state.data_rng, state.device)
        if state.scaler.is_enabled() and saved.get('scaler'):
            state.scaler.load_state_dict(saved['scaler'])
        state.iter_num = state.saved_at = saved['iter_num']
        state.best_val_loss = float(saved['best_val_loss'])
        if state.iter_num >= cfg.max_iters:
            processes.print(f'{path} is at step {state.iter_num} and max_iters={cfg.max_iters}, so '
                            'nothing is left to train (a larger --max_iters trains on)')
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as e:
        raise UserError(f'{path}: cannot be resumed: {one_line(e)[:200]}') from None


@contextmanager
def open_out_dir(state, dtype, say):
    """Context manager that locks OUT_DIR, moves an older run in it aside, and writes config.py and
    environment.json. Yields a function log(row). It appends a row of metrics to metrics.jsonl and
    wandb, and raises FloatingPointError for a value that is not finite. If OUT_DIR cannot be used,
    the context manager raises UserError."""
    cfg, out = state.cfg, Path(state.cfg.out_dir)
    with locked_folder(out):
        try:
            config, names = out / 'config.py', {p.name for p in out.iterdir() if p.suffix != '.tmp'}
            if not (config.read_bytes().startswith(HEAD.encode()) if config.exists() else
                    names <= RUN_FILES or names & {'ckpt.pt', 'last.pt', 'metrics.jsonl'}):
                raise UserError(f"out_dir='{out}': is not a run folder, but holds {min(names)} "
                                f'(nearest: {unused(out)})')
            if state.saved_at is None:
                archive_run(out, say)
            else:
                again = state.iter_num % cfg.eval_interval == 0 or state.iter_num >= cfg.max_iters
                tracking.truncate_metrics(out, state.iter_num, again)
            remove_leftovers(out)
            environment = devices.environment(state.device, dtype)
            write_atomically(config, configuration.dump(cfg, HEAD).encode())
            write_atomically(out / 'environment.json', json.dumps(environment, indent=1).encode())
        except OSError as e:
            raise unwritable(f'out_dir={cfg.out_dir!r}: cannot be written', e) from None
        tags = [tag.strip() for tag in (cfg.wandb_tags or '').split(',') if tag.strip()]
        tracker = cfg.wandb_log and tracking.Tracking(
            out, say, project=cfg.wandb_project, name=cfg.wandb_run_name, tags=tags or None,
            group=cfg.wandb_group, config=asdict(cfg))

        def log(row):
            if any(isinstance(value, float) and not math.isfinite(value) for value in row.values()):
                raise FloatingPointError('a value for metrics.jsonl is not finite')
            tracking.append_json(out / 'metrics.jsonl', row)
            if tracker:
                tracker.log(row)
        code = 1
        try:
            yield log
            code = 0
        except cli.Interrupted as e:
            code = 128 + e.signal
            raise
        finally:
            if tracker:
                tracker.finish(code)


def draw_curves(out, say):
    """Draw OUT_DIR/curves.png from metrics.jsonl. An error is printed and does not stop the run."""
    try:
        plots.training_curves(out, CURVES)
    except Exception as e:                              # matplotlib raises many kinds
        say(f'curves.png could not be drawn: {one_line(e)}')


# --------------------------------------------------------------------------------------------------
# the model

def build_model(cfg, set_by, saved, data, say):
    """Return the model that init_from names, and copy its shape into cfg. Raises UserError for
    options that do not fit the model."""
    try:
        model = make_model(cfg, set_by, saved, data, say)
    except UserError:
        raise
    except ValueError as e:
        raise UserError(f'{saved["path"]}: {e}' if saved else str(e)) from None
    check_fixed_options(cfg, set_by, saved, model.config, say)
    if cfg.block_size < model.config.block_size:
        model.crop_block_size(cfg.block_size)
    for key in MODEL_KEYS:
        setattr(cfg, key, getattr(model.config, key))
    if data.vocab_size > cfg.vocab_size:
        raise UserError(
            f'vocab_size={cfg.vocab_size}: the data set {data.folder} needs {data.vocab_size} '
            'token ids (nearest: '
            f'{data.vocab_size if cfg.init_from == "scratch" else "the data set of the model"})')
    data.check_length(cfg.block_size)
    return model


def make_model(cfg, set_by, saved, data, say):
    """Return a new model, or load one, with the adapters of cfg. Raises ValueError."""
    free = {k: getattr(cfg, k) for k in OVERRIDABLE_FIELDS}
    if cfg.init_from == 'scratch':
        if cfg.vocab_size is None:
            cfg.vocab_size = data.padded_vocab_size
        if cfg.lora_rank is not None:
            raise UserError(
                f'lora_rank={cfg.lora_rank}: needs trained weights (nearest: --init_from=FOLDER)')
        data.check_length(cfg.block_size)
        shape = {k: getattr(cfg, k) for k in MODEL_KEYS} | {'adaptive_svd_ranks': None}
        model = GPT(GPTConfig(**shape))
    elif cfg.init_from == 'resume':
        model = GPT.from_checkpoint(saved, **free)
    else:                                                       # a folder may have its own SVD
        given = {k: free[k] for k in free if k in set_by or k == 'dropout'}
        model = GPT.from_pretrained(cfg.init_from, given)
        if cfg.lora_adapter is not None:
            huggingface.load_adapter(model, cfg.lora_adapter, cfg.init_from, say)
    if cfg.init_from != 'resume':
        model.add_adapters(**{k: getattr(cfg, k) for k in ADAPTER_DEFAULTS})
    return model


def check_fixed_options(cfg, set_by, saved, fixed, say):
    """Check the options against the shape of the loaded model. This shape cannot change.

    Raises UserError for another shape on the command line, and for other adapters. Another shape in
    a config file is only reported, because nanoGPT's config files repeat the shape when they
    resume. Options without effect are reported, too.
    """
    unused = configuration.unused_options(cfg, fixed)
    if unused:
        say(f'options without effect: {", ".join(f"{k}={getattr(cfg, k)!r}" for k in unused)}')
    for key in sorted(set_by.keys() & {*MODEL_KEYS} - {*OVERRIDABLE_FIELDS} - {*unused}):
        cropped = key == 'block_size' and cfg.block_size < fixed.block_size
        if getattr(cfg, key) == getattr(fixed, key) or cropped:
            continue
        # always an error: a model without its adapters would train all weights
        if set_by[key] == 'the command line' or key in ('adaptive_svd', 'lora_rank'):
            run = Path(cfg.out_dir if saved else cfg.init_from)
            adapted = fixed.adaptive_svd or fixed.has_lora
            near = huggingface.merge_command(run) if adapted else begin_from(run, cfg.dataset)
            raise UserError(
                f'{key}={getattr(cfg, key)}: cannot change, because the model of '
                f'init_from={cfg.init_from} has {key}={getattr(fixed, key)}'
                + f' (nearest: {near})' * (key in ADAPTER_DEFAULTS))
        say(f'{key}={getattr(cfg, key)} of {set_by[key]} is ignored: the model of '
            f'init_from={cfg.init_from} has {key}={getattr(fixed, key)}')


def describe(cfg, model, data, dtype, processes):
    """Print the model, the data and the options that matter, as lines of text."""
    say, c = processes.print, model.config
    factored = f', {len(c.layer_ranks)} low-rank layers' if c.layer_ranks else ''
    shared = f', {c.n_kv_head} key/value heads' if c.is_grouped else ''
    say(f'model: {c.n_layer} layers, {c.n_head} heads{shared}, width {c.n_embd}, '
        f'context {c.block_size}, vocabulary {c.vocab_size}: {model.get_num_params():,} '
        f'parameters without position embeddings{factored}; {processes.device}, {dtype}, '
        f'seed {cfg.seed}')
    say(f'data: {data.folder}, {len(data.tokens("train")):,} training and '
        f'{len(data.tokens("val")):,} validation tokens '
        f'({data.meta.get("source", "source unknown")}); '
        f'{cfg.gradient_accumulation_steps * cfg.batch_size * c.block_size:,} tokens per step')
    if c.adaptive_svd:
        say(f'adaptive SVD: {len(c.adaptive_layers)} layers, analyzed every '
            f'{cfg.adaptive_svd_interval} steps')
    if c.has_lora:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        say(f'LoRA, {c.lora_init!r}: rank {c.lora_rank} in {len(c.lora_layers)} layers, '
            f'{trained:,} trained parameters')
    if c.use_mla:
        say('MLA: keys and values of a layer come from one latent per token, of '
            f'{c.latent_summary} instead of {2 * c.n_embd} values')
    if c.use_svd or c.svd_rank is not None:
        say(f'SVD on {c.svd_names}: {c.svd_summary}')
    decays = cfg.decay_lr and not cfg.eval_only
    if decays and cfg.lr_decay_iters != cfg.max_iters:
        say(f'learning rate: reaches min_lr at step lr_decay_iters={cfg.lr_decay_iters}, but the '
            f'run ends at step max_iters={cfg.max_iters} (nearest: '
            f'--lr_decay_iters={cfg.max_iters})')
    if decays and warmup_iters(cfg) != cfg.warmup_iters:
        say(f'warmup_iters={cfg.warmup_iters} is too long for {schedule_length(cfg)} steps: using '
            f'{warmup_iters(cfg)}')


if __name__ == '__main__':
    sys.exit(main())

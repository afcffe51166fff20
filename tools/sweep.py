"""Sweeps: expand a grid of options into runs, train them, and time their training steps.

Each run has its own process and folder. Finished runs are not repeated and interrupted runs are
resumed. When the process of the sweep ends, each run finishes its current step or evaluation,
writes a checkpoint and ends too. The folder of a sweep holds sweep.json (what is compared),
timing.json (step times) and runs/.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import namedtuple
from itertools import count, product
from pathlib import Path

import torch

from runtime import config as configuration
from runtime import huggingface
from runtime.config import ROOT, UserError
from runtime.data import Dataset, locate
from runtime.distributed import STOP_WITH_PARENT
from runtime.files import check_writable, locked_folder, unused, write_atomically
from runtime.tracking import read_metrics
from tools.step_benchmark import run_seconds, step_of
from tools.timing import paired_benchmark
from train import TrainConfig, build_model

POLL = 0.05                         # seconds between polls of the processes
PAIRS = 20                          # timed pairs of steps, per variant

# A combination of options, trained once per seed. options: those that distinguish it from the
# others; cfg: configuration of the first seed; argv: arguments for train.py, without seed and
# folder; data, costs: from `dry_build`
Variant = namedtuple('Variant', 'name options cfg argv data costs', defaults=(None, None))
# A run. steps: of training, None for a command that writes its folder as a whole when it is done;
# argv: script and options for a new start; resume: the same for a start from the checkpoint, or
# None if the run cannot be resumed
Job = namedtuple('Job', 'name folder steps argv resume')


# --------------------------------------------------------------------------------------------------
# which runs

def expand_grid(cls, values, lists, set_by, argv):
    """Return a list of Variants, one per combination of the lists.

    Combinations that make the same run become one Variant. cls: TrainConfig or a subclass; values:
    option -> value, for all options; lists: option -> values; set_by: option -> where it was set;
    argv: arguments for train.py, without the lists. Raises UserError for invalid options.
    """
    groups = {}                                         # effective options -> combinations
    for combination in product(*lists.values()):
        options = dict(zip(lists, combination))
        cfg = configuration.build(cls, values | options, set_by)
        key = json.dumps(effective_config(cfg), sort_keys=True)
        groups.setdefault(key, []).append((options, cfg))
    variants = {}
    for group in groups.values():
        first, cfg = group[0]
        effective = effective_config(cfg)
        # name the options that have an effect or on which the group agrees, or else all of them
        shown = {key: value for key, value in first.items() if key in effective
                 or all(options[key] == value for options, _ in group)} or first
        name = ','.join(key + '=' + re.sub(r'[^\w.+-]', '_', str(value))[-60:]
                        for key, value in shown.items())[:140] or 'run'
        if name in variants:                # values that differ in replaced characters only
            name += f'-{len(variants)}'
        variants[name] = Variant(name, shown, cfg, [*argv, *(
            f'--{option}={value!r}' for option, value in first.items())])
    return list(variants.values())


def run_folder(folder, variant, seed):
    """Return the run folder of a variant and a seed. folder: folder of the sweep; variant: name of
    the variant."""
    return folder / 'runs' / f'{variant},seed={seed}'


def effective_config(cfg):
    """Return option -> value of the options that tell variants apart. Left out are seed, out_dir,
    backend, the wandb options, and options without effect in this configuration."""
    known = {key: getattr(cfg, key) for key in TrainConfig.__dataclass_fields__}
    is_new = cfg.init_from == 'scratch'
    # the model in init_from may have an SVD or MLA that cfg does not show
    known = {key: value for key, value in known.items() if configuration.has_effect(cfg, key)
             or not is_new and key.startswith(('svd_', 'mla_'))}
    idle = ['out_dir', 'seed', 'backend', 'wandb_']     # prefixes of option names
    if is_new and not cfg.svd_truncates:
        idle += ['use_svd', 'svd_']
    if cfg.use_mla:
        known['mla_latent_dim'] = cfg.latent_dims
    known['n_kv_head'] = cfg.heads['k']
    if cfg.svd_truncates:
        known |= {'svd_targets': ','.join(cfg.svd_ranks),
                  **{f'svd_rank_{name}': cfg.svd_ranks.get(name) for name in 'qk'}}
    return {key: value for key, value in known.items() if not key.startswith(tuple(idle))}


def find_baseline(variant, variants):
    """Return the baseline of a variant: the ordinary variant that shares the most options.

    An ordinary variant has no SVD, MLA, shared or narrower heads, narrower MLPs, low-rank layers or
    adapters. If all variants are ordinary or none is, the baseline is the first one.
    """
    ordinary = [v for v in variants if not (
        v.cfg.svd_truncates or v.cfg.use_mla or v.cfg.is_grouped
        or v.cfg.qk_head_dim or v.cfg.v_head_dim or v.cfg.mlp_dim or v.cfg.layer_ranks
        or v.cfg.adaptive_svd or v.cfg.lora_rank is not None)]
    candidates = ordinary if len(ordinary) < len(variants) else []
    return max(candidates or variants[:1], key=lambda other: sum(
        other.options.get(key) == value for key, value in variant.options.items()))


def dry_build(variant, set_by):
    """Prepare the data set and build the model as train.py does.

    Returns the Variant with data and costs. Fills in the fields of its cfg that the data or a
    loaded model determine, such as vocab_size. Raises UserError as train.py does.
    """
    cfg, data = variant.cfg, Dataset(locate(variant.cfg.dataset, variant.cfg.tokenizer))
    huggingface.check_tokenizer(cfg, set_by, None, data, lambda text: None)
    model = build_model(cfg, set_by, None, data, lambda text: None)
    return variant._replace(data=data, costs={
        'parameters': model.get_num_params(), 'chance': math.log(data.vocab_size),
        'cache_bytes': None if cfg.is_noncausal else model.kv_cache_bytes(1, cfg.block_size),
        'text': data.meta.get('sha256') or [len(data.tokens(split)) for split in ('train', 'val')]})


def describe(variants, lists, seeds):
    """Return the content of sweep.json."""
    return {'lists': lists, 'seeds': seeds, 'arms': {variant.name: {
        'options': variant.options, 'baseline': find_baseline(variant, variants).name,
        **variant.costs, 'config': effective_config(variant.cfg)} for variant in variants}}


def job_of(variant, seed, folder):
    """Return the Job that trains a variant with this seed. folder: folder of the sweep."""
    out, cfg, script = run_folder(folder, variant.name, seed), variant.cfg, str(ROOT / 'train.py')
    here = [f'--out_dir={str(out)!r}', f'--device={cfg.device!r}']
    return Job(out.name, out, cfg.max_iters,
               [script, *variant.argv, f'--seed={seed}', *here, f'--wandb_run_name={out.name!r}',
                f'--wandb_group={cfg.wandb_group or folder.name!r}'],
               [script, '--init_from=resume', *here])


# --------------------------------------------------------------------------------------------------
# the folder of a sweep

def check_folder(name):
    """Return the folder as a Path. Raises UserError if it holds files but no sweep."""
    folder = Path(name)
    check_writable(folder / 'sweep.json', f'sweep={name!r}')
    # a sweep that was killed at its start leaves a temporary file
    others = [path.name for path in folder.glob('[!.]*') if path.suffix != '.tmp']
    if others and 'sweep.json' not in others:
        raise UserError(f"sweep={name!r}: the folder holds other files: {min(others)} "
                        f"(nearest: --sweep={unused(folder if folder.name else 'out-compare')})")
    return folder


def read_json(path):
    """Return the content of a JSON file, {} if it is missing. Raises UserError if damaged."""
    try:
        return json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}
    except ValueError:
        nearest = 'delete it' if path.name == 'timing.json' else 'another --sweep=FOLDER'
        raise UserError(f'{path}: damaged (nearest: {nearest})') from None


def load(folder):
    """Return the content of sweep.json, made by `describe`. Raises UserError if it is missing."""
    record = read_json(folder / 'sweep.json')
    if set(record) != {'lists', 'seeds', 'arms'}:
        raise UserError(f'sweep={str(folder)!r}: the folder holds no sweep (nearest: start one, '
                        'python compare.py config/train_svd_test.py --svd_rank=None,4,8,16 '
                        '--seeds=3)')
    return record


def check_same_sweep(folder, record):
    """Raise UserError unless this sweep equals the sweep in the folder, or adds variants or seeds
    to it. record: this sweep, from `describe`."""
    def flat(sweep):
        return {f'seed {seed}': 'present' for seed in sweep['seeds']} | {
            f'{name}: {key}': value for name, arm in sweep['arms'].items()
            for key, value in {**arm['config'], 'text': arm.get('text')}.items()}
    old, new = flat(load(folder) if (folder / 'sweep.json').exists() else record), flat(record)
    changed = [key for key in old if key not in new or new[key] != old[key]]
    if changed:
        raise UserError(f'sweep={str(folder)!r}: the folder holds a different sweep: {changed[0]} '
                        f'is {old[changed[0]]!r} there and {new.get(changed[0], "absent")!r} in '
                        f'this command (nearest: --sweep={unused(folder)})')


# --------------------------------------------------------------------------------------------------
# running

def result(folder, steps):
    """Return the final metrics of a run that finished after `steps` steps, or None."""
    return next((row for row in read_metrics(folder)
                 if row.get('final') and row['iter'] == steps and 'val/loss' in row), None)


def has_checkpoint(folder):
    """Return whether the folder holds a checkpoint from which a run can resume."""
    return any((Path(folder) / name).exists() for name in ('ckpt.pt', 'last.pt'))


def is_done(job):
    """Return whether a job has finished."""
    return (has_checkpoint(job.folder) if job.steps is None else
            result(job.folder, job.steps) is not None)


def state(job):
    """Return 'done', 'to resume' (there is a checkpoint, and the job may resume) or 'to do'."""
    if is_done(job):
        return 'done'
    return 'to resume' if has_checkpoint(job.folder) and job.resume else 'to do'


def log_of(job):
    """Return the path of the file with the run's printed output. It is not in the run folder,
    because train.py may move that folder."""
    return Path(f'{job.folder}.log')


def failure(job, code):
    """Return the message about a run that failed. code: exit code of its process."""
    how = f'killed by {signal.Signals(-code).name}' if code < 0 else f'exit code {code}'
    printed = log_of(job).read_text(encoding='utf-8', errors='replace').strip().splitlines()
    return (f'{job.name}: failed, {how}: {printed[-1].strip() if printed else "no output"} '
            f'(full output: {log_of(job)}; to start again from step 0, delete {job.folder})')


def thread_limits(at_once):
    """Return environment variables that share this process's threads among `at_once` processes."""
    names = ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'VECLIB_MAXIMUM_THREADS')
    return dict.fromkeys(names, str(max(1, torch.get_num_threads() // at_once)))


def gpu_environments(device):
    """Return a list of environments for processes, one per GPU for the device 'cuda'. A device with
    a number, such as 'cuda:1', is shared by all processes."""
    if device != 'cuda':
        return [{}]
    every = ','.join(map(str, range(torch.cuda.device_count())))
    gpus = os.environ.get('CUDA_VISIBLE_DEVICES') or every
    return [{'CUDA_VISIBLE_DEVICES': gpu} for gpu in gpus.split(',')]


def train_all(jobs, at_once, device):
    """Run the unfinished jobs, `at_once` at a time, and print one line per run. Returns the names
    of the failed jobs."""
    states, threads = [state(job) for job in jobs], thread_limits(at_once)['OMP_NUM_THREADS']
    counts = ', '.join(f'{states.count(name)} {name}' for name in ('done', 'to resume', 'to do'))
    print(f'{len(jobs)} runs in {jobs[0].folder.parent}: {counts}; {at_once} at a time, {threads} '
          'threads each', flush=True)
    numbers = count(states.count('done') + 1)

    def ended(job, code, seconds):
        final = result(job.folder, job.steps) or {}
        losses = [f'{key} {final[key]:.4f}' for key in ('val/loss', 'val/prefix_loss')
                  if key in final]
        text = f'{job.name}: {", ".join(losses)}, {seconds:.0f} s' if final else failure(job, code)
        print(f'[{next(numbers)}/{len(jobs)}] {text}', flush=True)
    return run_all(jobs, at_once, ended, gpu_environments(device))


def run_all(jobs, at_once, ended, environments=({},)):
    """Run the unfinished jobs, `at_once` at a time.

    ended(job, code, seconds) is called after each job; environments: list of environment variables,
    which the processes get in turn. Returns the names of the failed jobs, which are not done when
    their processes have ended. On an exception such as Interrupted, run_all stops the runs and
    waits until they have saved. A second exception ends the wait.
    """
    waiting = [job for job in jobs if not is_done(job)]
    running = {}                                        # slot -> job, process, start
    try:
        while waiting or running:
            free = [slot for slot in range(at_once) if slot not in running]
            for slot in free[:len(waiting)]:
                job, own = waiting.pop(0), environments[slot % len(environments)]
                running[slot] = job, start(job, thread_limits(at_once) | own), time.monotonic()
            for slot, (job, process, begun) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    ended(job, process.returncode, time.monotonic() - begun)
            time.sleep(POLL)
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.wait()
    return [job.name for job in jobs if not is_done(job)]


def start(job, environment):
    """Start the process of a job and return it. When the calling process has ended, the new process
    stops too. environment: variables to add to the environment of the calling process."""
    log_of(job).parent.mkdir(parents=True, exist_ok=True)
    with locked_folder(job.folder, wait=True):          # a run of a killed sweep may be saving
        saved = has_checkpoint(job.folder)
        if not saved:               # without a checkpoint these metrics belong to no run
            (Path(job.folder) / 'metrics.jsonl').unlink(missing_ok=True)
    argv, mode = (job.resume, 'ab') if saved and job.resume else (job.argv, 'wb')
    with open(log_of(job), mode) as log:
        return subprocess.Popen(
            [sys.executable, *argv], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            env=os.environ | {STOP_WITH_PARENT: str(os.getpid())} | environment)


# --------------------------------------------------------------------------------------------------
# times

def measure(runs, folder, device):
    """Time training steps of each variant against its baseline and add them to timing.json.

    runs: list of (Variant, Job). A variant is skipped if it or its baseline has no finished run, if
    it has adaptive SVD, or if it was timed on this device before.
    """
    times = read_json(folder / 'timing.json')
    variants = {variant.name: variant for variant, _ in runs}
    finished = {variant.name for variant, job in runs if state(job) == 'done'}
    for name, variant in variants.items():
        baseline = find_baseline(variant, list(variants.values()))
        if (variant is baseline or not {name, baseline.name} <= finished
                or variant.cfg.adaptive_svd             # only some of its steps run the analysis
                or times.get(name, {}).items() >= {('baseline', baseline.name),
                                                   ('device', device)}):
            continue
        print(f'timing steps of {name} against {baseline.name}', flush=True)
        found = paired_benchmark(step_of(variant.cfg, device), step_of(baseline.cfg, device), PAIRS,
                                 device)
        micro_batches = (variant.cfg.gradient_accumulation_steps
                         / baseline.cfg.gradient_accumulation_steps)
        times[name] = found | {
            'ratio': micro_batches * found['ratio'],
            'ratio_quartiles': [micro_batches * ratio for ratio in found['ratio_quartiles']],
            'baseline': baseline.name, 'pairs': PAIRS, 'device': device,
            'threads': torch.get_num_threads()}
        write_atomically(folder / 'timing.json', json.dumps(times, indent=1).encode())


def list_runs(runs, device):
    """Print the state of each run (Variant, Job) and an estimate of the time left. For the
    estimate, training steps are timed now."""
    seconds, total = {}, 0.0
    for variant, job in runs:
        text, step = state(job), 0
        if text == 'to resume':
            step = max((row['iter'] for row in read_metrics(job.folder)), default=0)
        if text != 'done':
            if variant.name not in seconds:
                seconds[variant.name] = run_seconds(variant.cfg, variant.data, device)
            left = seconds[variant.name] * (1 - step / max(1, job.steps))
            total += left
            text += f', {step} of {job.steps} steps taken, about {left / 60:.1f} min left'
        print(f'{job.name}: {text}')
    print(f'{len(runs)} runs, about {total / 60:.1f} min left if they run one at a time, estimated '
          f'from steps timed now with {torch.get_num_threads()} threads')

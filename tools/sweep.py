"""Sweeps: which runs a grid of options makes, how they are trained, and what their steps take.

A run is a process and a folder of its own. What is finished is not repeated, what was interrupted
is resumed, and no run outlives the process that started it by more than a step (or an evaluation)
and a checkpoint. The folder of a sweep holds sweep.json (what is compared), timing.json (step
times) and runs/.
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

POLL = 0.05                         # seconds between looks at the processes
PAIRS = 20                          # of steps, per variant

# A combination of options, trained once per seed. options: those that tell it from the others; cfg:
# of the first seed; argv: of train.py, without seed and folder; data and costs: of `dry_build`
Variant = namedtuple('Variant', 'name options cfg argv data costs', defaults=(None, None))
# A run. argv: script and options of a start; resume: those of a start from its checkpoint, or None
Job = namedtuple('Job', 'name folder steps argv resume')


# --------------------------------------------------------------------------------------------------
# which runs

def expand_grid(cls, values, lists, set_by, argv):
    """Every combination of the lists, those that are the same run once -> list of Variants.

    cls: TrainConfig, or a class that extends it; values: of all its options; lists: option ->
    values; set_by: option -> who set it; argv: of train.py, without the lists. Raises UserError.
    """
    groups = {}                                         # effective options -> the combinations
    for combination in product(*lists.values()):
        options = dict(zip(lists, combination))
        cfg = configuration.build(cls, values | options, set_by)
        key = json.dumps(effective_config(cfg), sort_keys=True)
        groups.setdefault(key, []).append((options, cfg))
    variants = {}
    for group in groups.values():
        first, cfg = group[0]
        effective = effective_config(cfg)
        # an option without effect is named if all agree on it; if that leaves none, all are named
        shown = {key: value for key, value in first.items() if key in effective
                 or all(options[key] == value for options, _ in group)} or first
        name = ','.join(key + '=' + re.sub(r'[^\w.+-]', '_', str(value))[-60:]
                        for key, value in shown.items())[:140] or 'run'
        if name in variants:                            # alike in letters of a file's name
            name += f'-{len(variants)}'
        variants[name] = Variant(name, shown, cfg, [*argv, *(
            f'--{option}={value!r}' for option, value in first.items())])
    return list(variants.values())


def run_folder(folder, variant, seed):
    """The folder of a run in that of a sweep; variant: its name."""
    return folder / 'runs' / f'{variant},seed={seed}'


def effective_config(cfg):
    """The options that a run's result depends on -> value, without those that have no effect beside
    the others."""
    known = {key: getattr(cfg, key) for key in TrainConfig.__dataclass_fields__}
    is_new = cfg.init_from == 'scratch'
    # other weights may have an SVD or MLA that cfg does not know of
    known = {key: value for key, value in known.items() if configuration.has_effect(cfg, key)
             or not is_new and key.startswith(('svd_', 'mla_'))}
    idle = ['out_dir', 'seed', 'backend', 'wandb_']     # beginnings of names
    if is_new and not cfg.svd_truncates:
        idle += ['use_svd', 'svd_']
    if cfg.use_mla:
        known['mla_latent_dim'] = cfg.latent_dim
    return {key: value for key, value in known.items() if not key.startswith(tuple(idle))}


def find_baseline(variant, variants):
    """The ordinary model that shares most options with the variant. The first variant if all models
    are ordinary, or none."""
    ordinary = [v for v in variants if not (
        v.cfg.svd_truncates or v.cfg.use_mla or v.cfg.layer_ranks or v.cfg.adaptive_svd
        or v.cfg.lora_rank is not None)]
    candidates = ordinary if len(ordinary) < len(variants) else []
    return max(candidates or variants[:1], key=lambda other: sum(
        other.options.get(key) == value for key, value in variant.options.items()))


def dry_build(variant, set_by):
    """Prepare the data set and build the model as train.py does -> the Variant with data and costs.
    The model's decisions go to its cfg, the vocabulary for one. Raises UserError as train.py does.
    """
    cfg, data = variant.cfg, Dataset(locate(variant.cfg.dataset, variant.cfg.tokenizer))
    huggingface.check_tokenizer(cfg, set_by, None, data, lambda text: None)
    model = build_model(cfg, set_by, None, data, lambda text: None)
    return variant._replace(data=data, costs={
        'parameters': model.get_num_params(), 'chance': math.log(data.vocab_size),
        'cache_bytes': None if cfg.is_noncausal else model.kv_cache_bytes(1, cfg.block_size),
        'text': data.meta.get('sha256') or [len(data.tokens(split)) for split in ('train', 'val')]})


def describe(variants, lists, seeds):
    """What sweep.json holds."""
    return {'lists': lists, 'seeds': seeds, 'arms': {variant.name: {
        'options': variant.options, 'baseline': find_baseline(variant, variants).name,
        **variant.costs, 'config': effective_config(variant.cfg)} for variant in variants}}


def job_of(variant, seed, folder):
    """The Job that trains a variant with this seed in the folder of a sweep."""
    out, cfg, script = run_folder(folder, variant.name, seed), variant.cfg, str(ROOT / 'train.py')
    here = [f'--out_dir={str(out)!r}', f'--device={cfg.device!r}']
    return Job(out.name, out, cfg.max_iters,
               [script, *variant.argv, f'--seed={seed}', *here, f'--wandb_run_name={out.name!r}',
                f'--wandb_group={cfg.wandb_group or folder.name!r}'],
               [script, '--init_from=resume', *here])


# --------------------------------------------------------------------------------------------------
# the folder of a sweep

def check_folder(name):
    """The folder as a Path. Raises UserError if it holds something other than a sweep."""
    folder = Path(name)
    check_writable(folder / 'sweep.json', f'sweep={name!r}')
    # a sweep that is killed at its start leaves a temporary file
    others = [path.name for path in folder.glob('[!.]*') if path.suffix != '.tmp']
    if others and 'sweep.json' not in others:
        raise UserError(f"sweep={name!r}: holds something else: {min(others)} "
                        f"(nearest: {unused(folder if folder.name else 'out-compare')})")
    return folder


def read_json(path):
    """What is in a JSON file; {} if there is none. Raises UserError."""
    try:
        return json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}
    except ValueError:
        raise UserError(f'{path}: damaged (nearest: delete it, then the same command again)'
                        ) from None


def load(folder):
    """What `describe` made, from sweep.json. Raises UserError."""
    record = read_json(folder / 'sweep.json')
    if set(record) != {'lists', 'seeds', 'arms'}:
        raise UserError(f'sweep={str(folder)!r}: holds no sweep (nearest: python compare.py '
                        'config/train_svd_test.py --svd_rank=None,4,8,16 --seeds=3)')
    return record


def check_same_sweep(folder, record):
    """Raise UserError if the folder holds a sweep that is no part of this one."""
    def flat(sweep):
        return {f'seed {seed}': 'a run' for seed in sweep['seeds']} | {
            f'{name}: {key}': value for name, arm in sweep['arms'].items()
            for key, value in {**arm['config'], 'text': arm.get('text')}.items()}
    old, new = flat(load(folder) if (folder / 'sweep.json').exists() else record), flat(record)
    changed = [key for key in old if key not in new or new[key] != old[key]]
    if changed:
        raise UserError(f'sweep={str(folder)!r}: holds another sweep: {changed[0]}: '
                        f'{old[changed[0]]!r} there, {new.get(changed[0], "nothing")!r} here '
                        f'(nearest: {unused(folder)})')


# --------------------------------------------------------------------------------------------------
# running

def result(folder, steps):
    """The final row of a run that has finished after as many steps, or None."""
    return next((row for row in read_metrics(folder)
                 if row.get('final') and row['iter'] == steps and 'val/loss' in row), None)


def has_checkpoint(folder):
    """Whether a run can go on from what is in its folder."""
    return any((Path(folder) / name).exists() for name in ('ckpt.pt', 'last.pt'))


def state(job):
    """'done', 'to resume' or 'to do'."""
    if result(job.folder, job.steps):
        return 'done'
    return 'to resume' if has_checkpoint(job.folder) and job.resume else 'to do'


def log_of(job):
    """What the process prints. It is beside the folder, which train.py may move."""
    return Path(f'{job.folder}.log')


def failure(job, code):
    """What to say of a run that failed."""
    how = f'killed by {signal.Signals(-code).name}' if code < 0 else f'exit code {code}'
    printed = log_of(job).read_text(encoding='utf-8', errors='replace').strip().splitlines()
    return (f'{job.name}: failed, {how}: {printed[-1].strip() if printed else "no output"} '
            f'(all of it: {log_of(job)}; without {job.folder} it starts again)')


def thread_limits(at_once):
    """Environment of each of several processes that share this one's threads."""
    names = ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'VECLIB_MAXIMUM_THREADS')
    return dict.fromkeys(names, str(max(1, torch.get_num_threads() // at_once)))


def gpu_environments(device):
    """Environments of processes, to be taken in turn. On 'cuda' each has one GPU; a device with a
    number, 'cuda:1', is for all."""
    if device != 'cuda':
        return [{}]
    every = ','.join(map(str, range(torch.cuda.device_count())))
    gpus = os.environ.get('CUDA_VISIBLE_DEVICES') or every
    return [{'CUDA_VISIBLE_DEVICES': gpu} for gpu in gpus.split(',')]


def train_all(jobs, at_once, device):
    """Run what is not finished and print a line per run -> names of the jobs that failed."""
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
    """Run what is not finished -> the names of the jobs that failed: they have no final row.

    ended(job, code, seconds) is called after each; environments: variables of the processes, in
    turn. After an exception, such as Interrupted, the runs are told to stop, and save; another one
    ends the wait for them.
    """
    waiting = [job for job in jobs if result(job.folder, job.steps) is None]
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
    return [job.name for job in jobs if result(job.folder, job.steps) is None]


def start(job, environment):
    """-> the process of a job, which stops when this process has ended."""
    log_of(job).parent.mkdir(parents=True, exist_ok=True)
    with locked_folder(job.folder, wait=True):          # a run of a killed sweep may be saving
        saved = has_checkpoint(job.folder)
        if not saved:                                   # a beginning that no run can go on from
            (Path(job.folder) / 'metrics.jsonl').unlink(missing_ok=True)
    argv, mode = (job.resume, 'ab') if saved and job.resume else (job.argv, 'wb')
    with open(log_of(job), mode) as log:
        return subprocess.Popen(
            [sys.executable, *argv], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            env=os.environ | {STOP_WITH_PARENT: str(os.getpid())} | environment)


# --------------------------------------------------------------------------------------------------
# times

def measure(runs, folder, device):
    """Time the step of each variant that has a finished run against its baseline's, and write it to
    timing.json if it is not there. runs: (Variant, Job) each."""
    times = read_json(folder / 'timing.json')
    variants = {variant.name: variant for variant, _ in runs}
    finished = {variant.name for variant, job in runs if state(job) == 'done'}
    for name, variant in variants.items():
        baseline = find_baseline(variant, list(variants.values()))
        if (variant is baseline or not {name, baseline.name} <= finished
                or variant.cfg.adaptive_svd             # its costs are in some of the steps only
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
    """Print the state of each run (Variant, Job) and the time left, from steps timed now."""
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
    print(f'{len(runs)} runs, about {total / 60:.1f} min left, one run after the other, from steps '
          f'timed here with {torch.get_num_threads()} threads')

"""Many runs of a script, each in a process and a folder of its own, some at a time: what is finished is not repeated,
what was interrupted goes on, and no run outlives the process that started it."""

import os
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import torch

from runtime.config import UserError
from runtime.distributed import STOP_WITH_PARENT
from runtime.files import check_writable, is_shared, locked_folder, unused
from runtime.tracking import read_metrics

POLL = 0.05                         # seconds between looks at the processes

# argv: script and options of a start from scratch; resume: of one from the folder's checkpoint, None: never
Job = namedtuple('Job', 'name folder steps argv resume')


def result(folder, steps):
    """The final row of a run that is finished after as many steps, or None."""
    losses = ('val/loss', 'val/prefix_loss')
    return next((row for row in read_metrics(folder) if row.get('final') and row['iter'] == steps and 'val/loss' in row and all(
        type(row.get(name, 0.0)) is float for name in losses)), None)


def has_checkpoint(folder):
    return any((Path(folder) / name).exists() for name in ('ckpt.pt', 'last.pt'))


def log_of(job):
    """Beside the folder, which train.py may move aside while it writes there."""
    return Path(f'{job.folder}.log')


def last_line(job):
    lines = log_of(job).read_text(encoding='utf-8', errors='replace').split('\n')
    return next((line.rpartition('\r')[2].strip() for line in reversed(lines) if line.strip()), 'no output')


def shared_threads(at_once):
    """Environment of each of several processes that share this one's threads out."""
    share = str(max(1, torch.get_num_threads() // at_once))
    return dict.fromkeys(('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'VECLIB_MAXIMUM_THREADS'),
                         share)


def check_folder(name):
    """The folder of a sweep, whose mark is a sweep.json in it. Raises UserError where something else is."""
    folder, real = Path(name), Path(os.path.realpath(name))
    if not name or is_shared(real):
        raise UserError(f"sweep={name!r}: must be a folder for one sweep (nearest: {unused('out-compare')})")
    check_writable(folder / 'sweep.json', f'sweep={name!r}')
    try:
        # not what a sweep leaves that is killed at its start
        other = real.exists() and [p.name for p in real.iterdir() if p.suffix != '.tmp' and not (
            p.name == 'runs' and p.is_dir() and not any(p.iterdir()))]
        if other and not (real / 'sweep.json').exists():
            raise UserError(f"sweep={name!r}: holds something else: {min(other)} (nearest: {unused(folder)})")
    except OSError as e:
        raise UserError(f"sweep={name!r}: cannot be used: {e.strerror} (nearest: {unused(folder)})") from None
    return folder


def gpus(asked, device, at_once, say):
    """For run_all's `environment`: on CUDA the GPUs one after the other, unless the option `asked` names one. device:
    what it comes to here."""
    visible = [None]
    if asked in ('auto', 'cuda') and device == 'cuda':
        named = os.environ.get('CUDA_VISIBLE_DEVICES')
        visible = named.split(',') if named else [str(i) for i in range(torch.cuda.device_count())]
    if device != 'cpu' and at_once > len(visible):
        say(f'jobs={at_once}: share {len(visible)} GPU{"s" * (len(visible) > 1)}, the memory, too')
    return lambda slot: {} if visible == [None] else {'CUDA_VISIBLE_DEVICES': visible[slot % len(visible)]}


def run_all(jobs, at_once, ended, environment=lambda slot: {}):
    """Run what is not finished -> the names of jobs that failed. ended(job, code, seconds): called after each.
    environment(slot): variables of the process in a slot, 0 to at_once - 1. An exception, such as Interrupted, stops
    them all first: they save; the next one kills them."""
    waiting = [job for job in jobs if result(job.folder, job.steps) is None]
    running, failed = {}, []                                        # slot -> job, process, start
    try:
        while waiting or running:
            for slot in [slot for slot in range(at_once) if slot not in running][:len(waiting)]:
                job = waiting.pop(0)
                running[slot] = job, start(job, shared_threads(at_once) | environment(slot)), time.monotonic()
            for slot, (job, process, begun) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    if process.returncode or result(job.folder, job.steps) is None:
                        failed.append(job.name)
                    ended(job, process.returncode, time.monotonic() - begun)
            time.sleep(POLL)
    finally:
        stop([process for _, process, _ in running.values()])
    return failed


def start(job, environment):
    """-> the process of a job, which stops when this one ends."""
    log_of(job).parent.mkdir(parents=True, exist_ok=True)
    with locked_folder(job.folder, wait=True):                      # a run that a killed sweep left is about to save
        saved = has_checkpoint(job.folder)
        resumed = saved and job.resume is not None
        if not saved:                                               # a beginning that nothing can go on from
            (Path(job.folder) / 'metrics.jsonl').unlink(missing_ok=True)
    with open(log_of(job), 'ab' if resumed else 'wb') as log:
        return subprocess.Popen([sys.executable, *(job.resume if resumed else job.argv)], stdin=subprocess.DEVNULL,
                                stdout=log, stderr=log, env=os.environ | {STOP_WITH_PARENT: '1'} | environment)


def stop(processes):
    """Ask them to save and end, and wait; kill them if that is interrupted."""
    try:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
    except BaseException:
        for process in processes:
            process.kill()
            process.wait()
        raise


def why(job, code):
    """A failure in words."""
    how = f'killed by {signal.Signals(-code).name}' if code < 0 else f'exit code {code}'
    anew = f'; without {job.folder} it starts anew' if has_checkpoint(job.folder) else ''
    return f'{job.name}: failed, {how}: {last_line(job)} (all of it: {log_of(job)}{anew})'

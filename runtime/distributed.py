"""The process group: one process, or several processes that torchrun started. Functions here
exchange values between the processes. DistributedDataParallel exchanges the gradients."""

import math
import os
import sys
from datetime import timedelta

import torch
from torch import distributed
from tqdm import tqdm

from runtime import device as devices
from runtime.config import Failure, UserError, one_line

# timeout of an exchange, because the other processes wait while process 0 evaluates; a killed
# process is noticed at once, because its connection closes
PATIENCE = timedelta(hours=2)
LOST = ('connection', 'gloo', 'nccl', 'timed out')  # torch's words for a lost process
STOP_WITH_PARENT = 'STOP_WITH_PARENT'  # environment variable with a sweep's process id


def mean_over_processes(value):
    """Return the mean of a tensor over all processes, or the tensor itself with one process."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    total = value.clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()


def gather(value):
    """Return the list of the `value` of every process, in the order of their ranks."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def broadcast_result(work):
    """Call work() on process 0 and return its result on all processes."""
    is_main = int(os.environ.get('RANK', 0)) == 0
    return gather(work() if is_main else None)[0]


class Processes:
    """Context manager that joins the process group at the start and leaves it at the end. `rank`,
    `world_size`, `is_main` and `device` describe this process. Raises UserError if the environment
    variables, the configuration and the machine do not fit together."""

    def __init__(self, cfg):
        self.distributed = 'RANK' in os.environ and 'WORLD_SIZE' in os.environ
        missing = [name for name in ('LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')
                   if not os.environ.get(name)]
        if self.distributed and missing:
            raise UserError(
                f'{missing[0]}=: not set, but RANK and WORLD_SIZE are; torchrun sets them all '
                '(nearest: unset RANK)')
        self.rank, self.world_size, self.local_rank = (
            int(os.environ[name]) if self.distributed else alone
            for name, alone in (('RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_RANK', 0)))
        self.is_main = self.rank == 0
        self.parent = int(os.environ.get(STOP_WITH_PARENT, os.getppid()))
        if self.parent_exited():  # it may have ended during the imports
            raise Failure('stopped, because the sweep that started this run has ended')
        self.device = devices.pick_device(cfg.device)
        self.on_cuda = self.device.startswith('cuda')
        if cfg.gradient_accumulation_steps % self.world_size:
            nearest = math.ceil(cfg.gradient_accumulation_steps / self.world_size) * self.world_size
            raise UserError(
                f'gradient_accumulation_steps={cfg.gradient_accumulation_steps}: must be a '
                f'multiple of the number of processes, {self.world_size} (nearest: {nearest})')
        here = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
        if self.distributed and self.on_cuda and here > torch.cuda.device_count():
            raise UserError(
                f'--nproc_per_node={here}: every process needs its own GPU, and this machine has '
                f'{torch.cuda.device_count()} (nearest: '
                f'--nproc_per_node={torch.cuda.device_count()})')
        self.backend = cfg.backend if self.on_cuda else 'gloo'  # exchanges the gradients

    def __enter__(self):
        if self.distributed:
            if self.on_cuda:
                self.device = f'cuda:{self.local_rank}'
                torch.cuda.set_device(self.device)
            # other values, such as random states, are exchanged on the CPU
            backend = f'cpu:gloo,cuda:{self.backend}' if self.on_cuda else 'gloo'
            distributed.init_process_group(backend, timeout=PATIENCE)
        return self

    def __exit__(self, kind, error, _):
        if not self.distributed:
            return
        if kind is None:  # after an error, other processes may never get here
            distributed.destroy_process_group()
        elif issubclass(kind, RuntimeError) and any(word in str(error).lower() for word in LOST):
            raise Failure(f'lost contact with another process ({one_line(error)[:120]})') from None

    def main_process_first(self, work):
        """Call work() on process 0, then on the first process of every other machine, then on the
        rest, so that only one process per machine has to prepare anything. Returns the result of
        work() on this process. A UserError on one process is raised on all processes."""
        turn = 0 if self.is_main else 1 if self.local_rank == 0 else 2
        for now in range(3):
            fault = None
            if now == turn:
                try:
                    result = work()
                except UserError as e:
                    fault = e
            for fault in gather(fault):  # all processes wait here in each turn
                if fault is not None:
                    raise fault
        return result

    def parent_exited(self):
        """Return whether torchrun, or the sweep that started this run, has ended. In that case
        nothing else stops this process."""
        watched = 'TORCHELASTIC_RUN_ID' in os.environ or STOP_WITH_PARENT in os.environ
        return watched and os.getppid() != self.parent

    def all_reduce_max(self, number):
        """Return the maximum of a whole number over all processes, on each of them."""
        if not self.distributed:
            return number
        tensor = torch.tensor(number)
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
        return tensor.item()

    def print(self, text):
        """Print on process 0 only."""
        if self.is_main:
            tqdm.write(text)
            sys.stdout.flush()                                      # pipes are buffered

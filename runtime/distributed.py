"""One process, or those that torchrun started: their ranks, and what they exchange besides
gradients."""

import math
import os
import sys
from datetime import timedelta

import torch
from torch import distributed
from tqdm import tqdm

from runtime import device as devices
from runtime.config import Failure, UserError, one_line

# the others wait while process 0 evaluates; a killed process is noticed at once, by its closed
# connection
PATIENCE = timedelta(hours=2)
LOST = ('connection', 'gloo', 'nccl', 'timed out')  # words of torch's errors when a process is gone
STOP_WITH_PARENT = 'STOP_WITH_PARENT'  # environment: the process whose end stops a run of a sweep


def mean_over_processes(value):
    """The mean of the processes' tensors, on all of them; the tensor itself where there is one
    process."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    total = value.clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()


def gather(value):
    """Every process's `value`, in order, as a list."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def broadcast_result(work):
    """The result of work() on process 0, on all processes."""
    is_main = int(os.environ.get('RANK', 0)) == 0
    return gather(work() if is_main else None)[0]


class Processes:
    """rank, world_size, is_main, device of this process. A context manager: joins the group, and
    leaves it at the end. Raises UserError for an environment or a configuration that does not
    fit."""

    def __init__(self, cfg):
        self.distributed = 'RANK' in os.environ and 'WORLD_SIZE' in os.environ
        missing = [name for name in ('LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')
                   if not os.environ.get(name)]
        if self.distributed and missing:
            raise UserError(
                f'{missing[0]}=: RANK and WORLD_SIZE are set, as for one of several processes, '
                'which torchrun starts (nearest: unset RANK)')
        self.rank, self.world_size, self.local_rank = (
            int(os.environ[name]) if self.distributed else alone
            for name, alone in (('RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_RANK', 0)))
        self.is_main = self.rank == 0
        self.parent = int(os.environ.get(STOP_WITH_PARENT, os.getppid()))
        if self.parent_exited():                        # it can end while this imports torch
            raise Failure('the sweep that started this run is gone')
        self.device = devices.pick_device(cfg.device)
        self.on_cuda = self.device.startswith('cuda')
        if cfg.gradient_accumulation_steps % self.world_size:
            nearest = math.ceil(cfg.gradient_accumulation_steps / self.world_size) * self.world_size
            raise UserError(
                f'gradient_accumulation_steps={cfg.gradient_accumulation_steps}: not a multiple of '
                f'the {self.world_size} processes (nearest: {nearest})')
        here = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
        if self.distributed and self.on_cuda and here > torch.cuda.device_count():
            raise UserError(
                f'{here} processes on this machine need a GPU each, and it has '
                f'{torch.cuda.device_count()} (nearest: '
                f'--nproc_per_node={torch.cuda.device_count()})')
        self.backend = cfg.backend if self.on_cuda else 'gloo'      # of the gradients

    def __enter__(self):
        if self.distributed:
            if self.on_cuda:
                self.device = f'cuda:{self.local_rank}'
                torch.cuda.set_device(self.device)
            # numbers such as random states are exchanged on the CPU
            backend = f'cpu:gloo,cuda:{self.backend}' if self.on_cuda else 'gloo'
            distributed.init_process_group(backend, timeout=PATIENCE)
        return self

    def __exit__(self, kind, error, _):
        if not self.distributed:
            return
        if kind is None:  # after an error another process may never come
            distributed.destroy_process_group()
        elif issubclass(kind, RuntimeError) and any(word in str(error).lower() for word in LOST):
            raise Failure(f'no contact with another process ({one_line(error)[:120]})') from None

    def main_process_first(self, work):
        """work() on process 0, then on the first of every other machine, then on the rest, who find
        it done. A UserError of one of them is raised on all."""
        turn = 0 if self.is_main else 1 if self.local_rank == 0 else 2
        for now in range(3):
            fault = None
            if now == turn:
                try:
                    result = work()
                except UserError as e:
                    fault = e
            for fault in gather(fault):  # all wait here for those whose turn it is
                if fault is not None:
                    raise fault
        return result

    def parent_exited(self):
        """Whether torchrun, or the sweep that started this run, is gone: nobody else would end this
        process."""
        watched = 'TORCHELASTIC_RUN_ID' in os.environ or STOP_WITH_PARENT in os.environ
        return watched and os.getppid() != self.parent

    def all_reduce_max(self, number):
        """The largest of the processes' whole numbers, on all of them."""
        if not self.distributed:
            return number
        tensor = torch.tensor(number)
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
        return tensor.item()

    def print(self, text):
        if self.is_main:
            tqdm.write(text)
            sys.stdout.flush()                                      # a pipe keeps it back

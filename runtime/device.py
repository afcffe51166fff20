"""Choice of the device (CUDA, Apple's MPS or the CPU) and of the precision."""

import os
import platform
import re
import subprocess
import sys
from contextlib import nullcontext

import torch

from runtime.config import UserError

# peak FLOPs per second of dense bfloat16 or float16 products, from the vendors' data sheets; if
# several names match, the longest one counts
PEAK_FLOPS = {
    'A100': 312e12, 'H100': 989e12, 'H100 PCIe': 756e12, 'H200': 989e12, 'B200': 2250e12,
    'L40S': 362e12, 'L4': 121e12, 'A10': 125e12, 'A10G': 70e12, 'RTX 4090': 165e12,
    'RTX 3090': 71e12}


def pick_device(name):
    """Return the device `name`, or for 'auto' the first available one of cuda, mps and cpu. Raises
    UserError if this machine does not have the device."""
    available = {
        'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(), 'cpu': True}
    if name == 'auto':
        return next(kind for kind, there in available.items() if there)
    kind, _, index = name.partition(':')
    count = torch.cuda.device_count() if kind == 'cuda' else 1
    numbered = name == kind or re.fullmatch('0|[1-9][0-9]{0,3}', index) and int(index) < count
    if not available.get(kind) or not numbered:
        here = [k for k, there in available.items() if there]
        raise UserError(f'device={name}: not on this machine (available: {", ".join(here)}; '
                        f'nearest: {here[0]})')
    return name


def pick_dtype(name, device):
    """Return the dtype `name`. 'auto' gives 'bfloat16' on GPUs with native bfloat16, 'float16' on
    older GPUs, and 'float32' on MPS and the CPU."""
    if name != 'auto':
        return name
    if not device.startswith('cuda'):
        return 'float32'
    return 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'


def autocast(device, dtype):
    """Return the context manager that autocasts to `dtype`. For float32 it has no effect."""
    if dtype == 'float32':
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=getattr(torch, dtype))


def has_native_bfloat16(device):
    """Return whether small bfloat16 matrix products are fast on `device`. CPUs emulate these
    products, or gain from them in large models only (docs/RESULTS.md)."""
    return torch.device(device).type == 'cuda' and torch.cuda.is_bf16_supported(
        including_emulation=False)


def peak_flops(device, dtype):
    """Return the peak FLOPs per second of `device` in `dtype`, or None if it is unknown. In that
    case no MFU (model FLOPs utilization) is reported."""
    if torch.device(device).type != 'cuda' or dtype == 'float32':
        return None
    name = torch.cuda.get_device_name(device)
    if 'Laptop' in name or 'MIG' in name:  # slower chips and slices with the same name
        return None
    matches = [key for key in PEAK_FLOPS
               if all(word in name.replace('-', ' ').split() for word in key.split())]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


def synchronize(device):
    """Wait for all queued work on `device`, so that a clock can be read."""
    kind = torch.device(device).type
    if kind == 'cuda':
        torch.cuda.synchronize(device)
    elif kind == 'mps':
        torch.mps.synchronize()


def environment(device, dtype):
    """Return the versions, machine, device, commit and command of a run, as a dict."""
    def git(*args):
        here = os.path.dirname(os.path.abspath(__file__))
        try:
            return subprocess.run(['git', *args], cwd=here, capture_output=True, text=True,
                                  timeout=10).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return ''
    kind = torch.device(device).type
    return {
        'command': sys.argv, 'python': platform.python_version(), 'torch': torch.__version__,
        'platform': platform.platform(), 'processor': platform.processor() or platform.machine(),
        'cpus': os.cpu_count(), 'threads': torch.get_num_threads(), 'device': device,
        'dtype': dtype,
        'device_name': torch.cuda.get_device_name(device) if kind == 'cuda' else kind,
        'git_commit': git('rev-parse', '--verify', '-q', 'HEAD'),
        'git_changes': bool(git('status', '--porcelain', '-uno'))}

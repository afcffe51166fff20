"""Checkpoints: a plain dict of tensors, numbers, strings and containers, written whole or not at all."""

import zipfile
from pathlib import Path

import torch

from runtime.config import UserError
from runtime.files import replacing

REQUIRED = ('model', 'model_args', 'iter_num')


def save(checkpoint, path):
    """A crash while saving leaves the old checkpoint."""
    with replacing(path) as f:
        torch.save(checkpoint, f)


def load(path):
    """A checkpoint of this repo or of nanoGPT, on the CPU. Nothing in the file is executed (weights_only). Raises
    UserError, one line, for a missing, truncated or foreign file. torch.compile's name prefix is removed."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f'{path}: no such checkpoint{_nearest_checkpoint(path)}')
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:                                          # torch raises half a dozen kinds for damaged files
        whole = 'not a whole PyTorch file' if not zipfile.is_zipfile(path) else 'not loadable with weights_only=True'
        raise UserError(f'{path}: {whole} ({type(e).__name__})') from None
    if not isinstance(checkpoint, dict) or any(key not in checkpoint for key in REQUIRED):
        raise UserError(f'{path}: not a checkpoint of this repo or nanoGPT; it needs the keys {", ".join(REQUIRED)}')
    for key, kind in dict(model=dict, model_args=dict, iter_num=int, config=dict).items():
        if not isinstance(checkpoint.get(key, {}), kind) and key in checkpoint:
            raise UserError(f'{path}: its {key} is {type(checkpoint[key]).__name__}, not {kind.__name__}')
    checkpoint['model'] = {k.removeprefix('_orig_mod.'): v for k, v in checkpoint['model'].items()}
    return checkpoint


def newest(root='.'):
    """The most recently written */ckpt.pt below `root`, or None: which run `python sample.py` alone means."""
    return max(Path(root).glob('*/ckpt.pt'), key=lambda p: p.stat().st_mtime, default=None)


def _nearest_checkpoint(path):
    found = newest(path.parent.parent)
    return f' (nearest: {found})' if found else ''


def random_state(batches):
    """Everything random: torch's generators and the one that orders training batches."""
    state = {'torch': torch.get_rng_state(), 'batches': batches.get_state()}
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state['mps'] = torch.mps.get_rng_state()
    return state


def set_random_state(state, batches):
    """The inverse of `random_state`; generators of devices that are not here are left alone."""
    torch.set_rng_state(state['torch'])
    batches.set_state(state['batches'])
    if 'cuda' in state and torch.cuda.is_available() and len(state['cuda']) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state['cuda'])
    if 'mps' in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state['mps'])

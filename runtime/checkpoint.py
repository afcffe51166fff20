"""Checkpoints: a plain dict of tensors, numbers, strings and containers, written whole or not at
all."""

import shlex
import zipfile
from pathlib import Path

import torch

from runtime.config import UserError
from runtime.data import DATA_ROOTS, check_meta, read_meta
from runtime.files import atomic_open
from runtime.nan_check import first_nonfinite_tensor

REQUIRED = dict(model=dict, model_args=dict, iter_num=int)
OPTIONAL = dict(config=dict, tokenizer=dict, optimizer=dict, scaler=dict, random=list,
                best_val_loss=(int, float, torch.Tensor))            # nanoGPT's is a tensor


def save(checkpoint, path):
    """A crash or an error while saving leaves the old checkpoint. Raises OSError where the disk
    does not take it, and FloatingPointError, before anything is written, for weights or an
    optimizer state that are not finite."""
    bad = first_nonfinite_tensor(
        {key: value for key, value in checkpoint.items() if key != 'random'}, '')
    if bad:
        raise FloatingPointError(f'{bad.removeprefix(".")} is not finite')
    try:
        with atomic_open(path) as f:
            torch.save(checkpoint, f)
    except RuntimeError as e:  # torch's own complaint hides the disk's
        raise e.__context__ if isinstance(e.__context__, OSError) else e from None


def load(path):
    """A checkpoint of this repo or of nanoGPT, on the CPU. Nothing in the file is executed
    (weights_only). Raises UserError, one line, for a missing, damaged or foreign file.
    torch.compile's name prefix is removed, the file's 'path' is added."""
    path = Path(path)
    checkpoint = _read(path)
    _check(checkpoint, path)
    checkpoint['model'] = {
        name.removeprefix('_orig_mod.'): w for name, w in checkpoint['model'].items()}
    return checkpoint | {'path': str(path)}


def _read(path):
    """Whatever torch finds in the file."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip() is None:                              # checksums: torch skips them
                return torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise UserError(f'{path}: no such checkpoint{_nearest_checkpoint(path)}') from None
    except OSError as e:
        raise UserError(f'{path}: cannot be read: {e.strerror}') from None
    except Exception as e:  # torch and zipfile raise a dozen kinds
        raise UserError(f'{path}: damaged, or no PyTorch file that loads with weights_only=True '
                        f'({type(e).__name__})') from None
    raise UserError(f'{path}: damaged')


def _check(checkpoint, path):
    """Raise UserError unless everything that is read later is there and of its kind."""
    if not isinstance(checkpoint, dict) or any(key not in checkpoint for key in REQUIRED):
        raise UserError(
            f'{path}: not a checkpoint of this repo or nanoGPT; it needs the keys '
            f'{", ".join(REQUIRED)}')
    for key, kind in (REQUIRED | OPTIONAL).items():
        if key in checkpoint and not isinstance(checkpoint[key], kind):
            raise UserError(
                f'{path}: its {key} is {type(checkpoint[key]).__name__}, which cannot be used')
    if 'tokenizer' in checkpoint:
        check_meta(checkpoint['tokenizer'], path)
    bad = first_nonfinite_tensor(checkpoint['model'], 'its weights')
    if bad:
        raise UserError(f'{path}: {bad} is not finite')


def load_weights(model, state):
    """Load a state dict into a model. Raises ValueError, one line, where it does not fit."""
    # before it used flash attention, nanoGPT stored its causal mask
    state = {name: w for name, w in state.items() if not name.endswith('.attn.bias')}
    try:
        model.load_state_dict(state)
    except RuntimeError as e:                                       # over many lines
        raise ValueError(
            f'its weights do not fit its model_args: {" ".join(str(e).split())[:300]}') from None


def find(out_dir):
    """The checkpoint of a run, None: of the newest one below this folder. Raises UserError if there
    is none."""
    path = Path(out_dir) / 'ckpt.pt' if out_dir else newest()
    if path is None:
        raise UserError('no run below this folder (no */ckpt.pt); train one first: python train.py '
                        'config/train_svd_test.py, or name it: --out_dir=DIR')
    return path


def tokenizer_of(saved, vocab_size):
    """The meta of the tokenizer that a loaded checkpoint, of a model with vocab_size ids, was
    trained on: its own, or the one beside the data of a nanoGPT checkpoint."""
    if 'tokenizer' in saved:
        if saved['tokenizer']['vocab_size'] > vocab_size:
            raise UserError(
                f'{saved["path"]}: its tokenizer has {saved["tokenizer"]["vocab_size"]} token ids, '
                f'its model {vocab_size}')
        return saved['tokenizer']
    dataset = str(saved.get('config', {}).get('dataset', ''))
    return read_meta(
        next((root / dataset for root in DATA_ROOTS if (root / dataset).is_dir()), dataset))


def newest(root='.'):
    """The most recently written */ckpt.pt below `root`, or None: which run `python sample.py` alone
    means. Runs of this repo, which have a config.py, come before what was brought or exported;
    hidden folders are no runs."""
    found = (path for path in Path(root).glob('*/ckpt.pt') if not path.parent.name.startswith('.'))
    return max(found, key=lambda p: (p.with_name('config.py').exists(), p.stat().st_mtime),
               default=None)


def _nearest_checkpoint(path):
    found = newest(path.parent.parent)
    return f' (nearest: {shlex.quote(f"--out_dir={found.parent}")})' if found else ''


def random_state(batches, device):
    """Everything random in this process: torch's generators and the one that orders training
    batches."""
    kind = torch.device(device).type
    state = {'torch': torch.get_rng_state(), 'batches': batches.get_state()}
    if kind != 'cpu':
        state[kind] = (torch.cuda.get_rng_state(device) if kind == 'cuda' else
                       torch.mps.get_rng_state())
    return state


def set_random_state(state, batches, device):
    """The inverse of `random_state`. A run that moves to another kind of device keeps its data
    order and draws other dropout masks there. Raises KeyError, TypeError or RuntimeError for what
    is no such state."""
    kind = torch.device(device).type
    torch.set_rng_state(state['torch'])
    batches.set_state(state['batches'])
    if kind == 'cuda' and kind in state:
        torch.cuda.set_rng_state(state[kind], device)
    elif kind == 'mps' and kind in state:
        torch.mps.set_rng_state(state[kind])

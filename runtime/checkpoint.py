"""Checkpoints: plain dicts of tensors, numbers, strings and containers, written atomically."""

import shlex
import zipfile
from pathlib import Path

import torch

from runtime.config import UserError
from runtime.data import DATA_ROOTS, check_meta, read_meta
from runtime.files import atomic_open
from runtime.nan_check import first_nonfinite_tensor

REQUIRED = dict(model=dict, model_args=dict, iter_num=int)
OPTIONAL = dict(config=dict, scales=dict, tokenizer=dict, optimizer=dict, scaler=dict, random=list,
                best_val_loss=(int, float, torch.Tensor))           # nanoGPT saves a tensor


def save(checkpoint, path):
    """Write a checkpoint dict to `path`. An error or a crash leaves the old file intact. Raises
    FloatingPointError, before anything is written, if the weights or the optimizer state contain
    NaN or infinite values. Raises OSError if the file cannot be written."""
    bad = first_nonfinite_tensor(
        {key: value for key, value in checkpoint.items() if key != 'random'}, '')
    if bad:
        raise FloatingPointError(f'{bad.removeprefix(".")} contains NaN or infinite values')
    try:
        with atomic_open(path) as f:
            torch.save(checkpoint, f)
    except RuntimeError as e:  # torch's error hides the OSError
        raise e.__context__ if isinstance(e.__context__, OSError) else e from None


def load(path):
    """Load a checkpoint of this repo or of nanoGPT onto the CPU and return its dict.

    No code in the file is executed (weights_only=True). The prefix that torch.compile adds to the
    names of weights is removed, int8 weights become float32, and the key 'path' is added. Raises
    UserError if the file is missing, damaged or not a checkpoint.
    """
    path = Path(path)
    checkpoint = _read(path)
    _check(checkpoint, path)
    state = from_int8(checkpoint['model'], checkpoint.pop('scales', {}))
    checkpoint['model'] = {name.removeprefix('_orig_mod.'): w for name, w in state.items()}
    return checkpoint | {'path': str(path)}


def to_int8(state, prefix):
    """Return a state dict in which the matrices (m, n) whose names start with `prefix` are int8,
    and a dict of their scales, name -> (m, 1). A row is rounded to multiples of its scale, which is
    its largest absolute value divided by 127."""
    scales = {name: w.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
              for name, w in state.items() if name.startswith(prefix) and w.dim() == 2}
    return {name: (w / scales[name]).round().to(torch.int8) if name in scales else w
            for name, w in state.items()}, scales


def from_int8(state, scales):
    """Return a state dict in which the matrices of `to_int8` are float again."""
    return {name: w * scales[name] if name in scales else w for name, w in state.items()}


def tensor_bytes(state):
    """Return the bytes of the tensors of a state dict. Tied tensors count once."""
    return sum({w.data_ptr(): w.nbytes for w in state.values()}.values())


def _read(path):
    """Check the checksums of a file and return what torch loads from it."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip() is None:                              # torch ignores the checksums
                return torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise UserError(f'{path}: no such checkpoint{_nearest_checkpoint(path)}') from None
    except OSError as e:
        raise UserError(f'{path}: cannot be read: {e.strerror}') from None
    except Exception as e:  # torch and zipfile raise many kinds
        raise UserError(f'{path}: damaged, or not a PyTorch file that loads with weights_only=True '
                        f'({type(e).__name__})') from None
    raise UserError(f'{path}: damaged (a checksum does not match)')


def _check(checkpoint, path):
    """Raise UserError unless all keys that are read later exist and have the right type."""
    if not isinstance(checkpoint, dict) or any(key not in checkpoint for key in REQUIRED):
        raise UserError(
            f'{path}: not a checkpoint of this repo or nanoGPT: must have the keys '
            f'{", ".join(REQUIRED)}')
    for key, kind in (REQUIRED | OPTIONAL).items():
        if key in checkpoint and not isinstance(checkpoint[key], kind):
            raise UserError(
                f'{path}: damaged: its {key} has the wrong type, {type(checkpoint[key]).__name__}')
    if 'tokenizer' in checkpoint:
        check_meta(checkpoint['tokenizer'], path)
    bad = first_nonfinite_tensor(checkpoint['model'], 'model')
    if bad:
        raise UserError(f'{path}: {bad} contains NaN or infinite values')


def load_weights(model, state):
    """Load a state dict into a model. Raises ValueError if names or shapes differ."""
    # nanoGPT saved its causal mask before it used flash attention
    state = {name: w for name, w in state.items() if not name.endswith('.attn.bias')}
    try:
        model.load_state_dict(state)
    except RuntimeError as e:  # torch's message has many lines
        raise ValueError(
            f'its weights do not match its model_args: {" ".join(str(e).split())[:300]}') from None


def find(out_dir):
    """Return the path of the checkpoint in `out_dir`. If out_dir is None, return the checkpoint of
    the newest run in the working directory. Raises UserError if there is no checkpoint."""
    path = Path(out_dir) / 'ckpt.pt' if out_dir else newest()
    if path is None:
        raise UserError('no run found in the working directory (no */ckpt.pt); train one first: '
                        'python train.py config/train_svd_test.py, or name one: --out_dir=DIR')
    return path


def tokenizer_of(saved, vocab_size):
    """Return the metadata of the tokenizer that a loaded checkpoint was trained with. A nanoGPT
    checkpoint does not contain this metadata. Then it is read from the folder of the data set.
    `vocab_size` is the number of token ids of the model. Raises UserError if the tokenizer has more
    ids."""
    if 'tokenizer' in saved:
        if saved['tokenizer']['vocab_size'] > vocab_size:
            raise UserError(
                f'{saved["path"]}: its tokenizer has {saved["tokenizer"]["vocab_size"]} token ids, '
                f'but its model only {vocab_size}')
        return saved['tokenizer']
    dataset = str(saved.get('config', {}).get('dataset', ''))
    return read_meta(
        next((root / dataset for root in DATA_ROOTS if (root / dataset).is_dir()), dataset))


def newest(root='.'):
    """Return the path of the most recently written */ckpt.pt below `root`, or None. Hidden folders
    are skipped. Runs of this repo are preferred to copies and exports, which have no config.py."""
    found = (path for path in Path(root).glob('*/ckpt.pt') if not path.parent.name.startswith('.'))
    return max(found, key=lambda p: (p.with_name('config.py').exists(), p.stat().st_mtime),
               default=None)


def _nearest_checkpoint(path):
    found = newest(path.parent.parent)
    return f' (nearest: {shlex.quote(f"--out_dir={found.parent}")})' if found else ''


def random_state(batches, device):
    """Return the random states of this process as a dict: the states of torch's generators and of
    `batches`, the generator that draws the training batches."""
    kind = torch.device(device).type
    state = {'torch': torch.get_rng_state(), 'batches': batches.get_state()}
    if kind != 'cpu':
        state[kind] = (torch.cuda.get_rng_state(device) if kind == 'cuda' else
                       torch.mps.get_rng_state())
    return state


def set_random_state(state, batches, device):
    """Restore the dict that `random_state` returned. If the state was saved on another kind of
    device, the same batches are drawn, but the dropout masks differ. Raises KeyError, TypeError or
    RuntimeError if `state` is not such a dict."""
    kind = torch.device(device).type
    torch.set_rng_state(state['torch'])
    batches.set_state(state['batches'])
    if kind == 'cuda' and kind in state:
        torch.cuda.set_rng_state(state[kind], device)
    elif kind == 'mps' and kind in state:
        torch.mps.set_rng_state(state[kind])

"""Token data sets: a folder with train.bin, val.bin (token ids, uint16 or uint32) and meta.json.

meta.json holds `tokenizer` ('char' or 'gpt2'), `vocab_size`, `dtype`, `chars` (for 'char', in id order) and where the
text came from. Folders that nanoGPT prepared work too: meta.pkl is read by an unpickler that can make nothing but
plain containers, and no meta at all means GPT-2 BPE in uint16.
"""

import codecs
import hashlib
import json
import math
import os
import pickle
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from runtime import download
from runtime.config import UserError, did_you_mean, one_line
from runtime.files import FULL, lock_file, locked, remove_leftovers, unwritable, write_atomically

END = '<|endoftext|>'
WITH_END = f'{{}}: {END} in the text becomes ordinary tokens, not 50256 as in a prompt'
GPT2_META = dict(tokenizer='gpt2', vocab_size=50257, dtype='uint16')
DATA_ROOTS = (Path('data'), Path(__file__).resolve().parents[1] / 'data')     # below this folder first, then the repo's
UNFINISHED = b'{"unfinished": "prepare again"}'
AGAIN = '; prepare the data set again: with its prepare.py, or delete this folder and name its text, --dataset=FILE.txt'
HELD = 'DATASET_LOCKED'             # environment: the folder whose lock the parent process holds
SCAN_LIMIT = 2 ** 28                # ids of larger files are not all read at start; each batch is checked anyway


class Tokenizer:
    """Text to token ids and back, from a data set's meta: encode(str) -> list of int, decode(ids) -> str."""

    def __init__(self, meta):
        self.kind, self.vocab_size = meta['tokenizer'], meta['vocab_size']
        if self.kind == 'char':
            self.chars = meta['chars']
            self.ids = {c: i for i, c in enumerate(self.chars)}
        else:
            self.bpe = download.gpt2_encoding()

    def encode(self, text):
        """Raises UserError for characters outside the vocabulary."""
        if self.kind == 'gpt2':
            return self.bpe.encode(text, allowed_special={END})
        unknown = sorted(set(text) - set(self.ids))
        if unknown:
            raise UserError(f'characters {"".join(unknown[:20])!r} are not in this model\'s vocabulary of '
                            f'{len(self.chars)}, leave them out: {"".join(self.chars)[:100]!r}')
        return [self.ids[c] for c in text]

    def decode(self, ids):
        ids = [i for i in ids if i < self.vocab_size]               # a rounded-up vocabulary has ids without a text
        return self.bpe.decode(ids) if self.kind == 'gpt2' else ''.join(self.chars[i] for i in ids)

    def decode_stream(self, ids):
        """Yield the text of an iterable of ids as they come: a piece for each, and one more; joined, what `decode`
        gives. A character that several tokens make up comes with the last of them."""
        decoder = codecs.getincrementaldecoder('utf-8')('replace')
        for i in ids:
            known = i < self.vocab_size
            if self.kind == 'char':
                yield self.chars[i] if known else ''
            else:
                yield decoder.decode(self.bpe.decode_single_token_bytes(i) if known else b'')
        yield decoder.decode(b'', final=True)


def write_dataset(folder, text, tokenizer, source):
    """Encode text, the first 90% of its characters for training and the rest for validation, into `folder`.

    tokenizer 'char' (vocabulary: the text's own characters) or 'gpt2'; source: words for meta.json. meta.json comes
    last; until then a marker stands in its place that `read_meta` refuses: without one, a folder left half-written
    would pass for nanoGPT's. Returns the meta dict.
    """
    if len(text) < 2:
        raise UserError(f'{source}: {len(text)} characters are too few for a training and a validation split')
    chars = sorted(set(text)) if tokenizer == 'char' else None
    meta = dict(tokenizer=tokenizer, vocab_size=len(chars) if chars else GPT2_META['vocab_size'])
    meta['dtype'] = 'uint16' if meta['vocab_size'] <= 2 ** 16 else 'uint32'
    if chars:
        meta['chars'] = chars
    meta.update(source=source, sha256=hashlib.sha256(text.encode()).hexdigest(), characters=len(text))
    encoder = Tokenizer(meta)
    cut = int(len(text) * 0.9)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    if not chars and END in text:
        print(WITH_END.format(source))
    write_atomically(folder / 'meta.json', UNFINISHED)
    for split, part in (('train', text[:cut]), ('val', text[cut:])):
        ids = encoder.encode(part) if chars else encoder.bpe.encode_ordinary(part)
        meta[f'{split}_tokens'] = len(ids)
        write_atomically(folder / f'{split}.bin', np.array(ids, dtype=meta['dtype']).tobytes())
    write_atomically(folder / 'meta.json', json.dumps(meta, indent=1, ensure_ascii=False).encode())
    return meta


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'it asks for {module}.{name}, and only plain containers are allowed')


def read_meta(folder):
    """The meta dict of a data set folder, nanoGPT's included."""
    folder = Path(folder)
    try:
        if (folder / 'meta.json').exists():
            if (folder / 'meta.json').read_bytes() == UNFINISHED:
                with preparing(folder):                             # by another process: when it is done
                    pass
            meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
        elif (folder / 'meta.pkl').exists():
            with open(folder / 'meta.pkl', 'rb') as f:
                old = _PlainUnpickler(f).load()
            meta = dict(tokenizer='char', vocab_size=old['vocab_size'], dtype='uint16',
                        chars=[old['itos'][i] for i in range(old['vocab_size'])])
        else:
            return dict(GPT2_META)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, EOFError, ImportError,
            OverflowError, MemoryError, RecursionError, pickle.UnpicklingError) as e:
        raise UserError(f'{folder}: its meta file cannot be used: {type(e).__name__}: {one_line(e)[:200]}'
                        + AGAIN) from None
    return check_meta(meta, folder, AGAIN)


def check_meta(meta, where, remedy=''):
    """The meta dict itself, or UserError that starts with `where` and ends with `remedy`."""
    try:
        kind, size, dtype = meta['tokenizer'], meta['vocab_size'], meta['dtype']
        right = kind in ('char', 'gpt2') and dtype in ('uint16', 'uint32') and type(size) is int and size > 0
        right = right and size <= 2 ** (8 * np.dtype(dtype).itemsize)
        if right and kind == 'char':
            chars = meta['chars']
            right = type(chars) is list and len(chars) == len(set(chars)) == size
            right = right and all(type(c) is str and len(c) == 1 for c in chars)
        elif right:
            right = size == GPT2_META['vocab_size']
        json.dumps(meta, ensure_ascii=False).encode()               # half characters cannot be printed, say
    except (KeyError, TypeError, ValueError, RuntimeError):         # RecursionError too
        right = False
    if not right:
        raise UserError(f'{where}: tokenizer, vocab_size, dtype and chars of its meta do not fit together{remedy}')
    return meta


class Dataset:
    """Batches of token windows from a prepared folder. Raises UserError for missing, damaged or foreign files."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.meta = read_meta(folder)
        self.vocab_size = self.meta['vocab_size']
        self.dtype = np.dtype(self.meta['dtype'])
        for split in ('train', 'val'):
            path = self.folder / f'{split}.bin'
            if not path.is_file():
                raise UserError(f'{path}: missing{AGAIN}')
            if path.stat().st_size == 0 or path.stat().st_size % self.dtype.itemsize:
                raise UserError(f'{path}: {path.stat().st_size} bytes are no whole number of {self.dtype} token ids')
            tokens = self.tokens(split)
            self._check_ids(tokens[:SCAN_LIMIT], split)
            if self.meta.get(f'{split}_tokens', len(tokens)) != len(tokens):
                raise UserError(f'{path}: has {len(tokens)} token ids, and its meta.json says '
                                f'{str(self.meta[f"{split}_tokens"])[:20]}{AGAIN}')

    def tokens(self, split):
        """All ids of a split (N,), memory-mapped. Opened anew each time: a long-lived map leaks (nanoGPT#428)."""
        return np.memmap(self.folder / f'{split}.bin', dtype=self.dtype, mode='r')

    @property
    def padded_vocab_size(self):
        """Token ids of a model on it: for BPE rounded up to 64s, 50257 to 50304, which makes products faster."""
        step = 1 if self.meta['tokenizer'] == 'char' else 64
        return math.ceil(self.vocab_size / step) * step

    def _check_ids(self, ids, split):
        top = int(ids.max())
        if top >= self.vocab_size:
            raise UserError(f'{self.folder}/{split}.bin: token id {top} is outside its vocabulary of {self.vocab_size}')

    def check_length(self, block_size):
        """A window is block_size tokens and the one after."""
        n, split = min((len(self.tokens(split)), split) for split in ('train', 'val'))
        if n <= block_size:
            raise UserError(f'block_size={block_size}: {self.folder}/{split}.bin has only {n} tokens (nearest: '
                            + (f'{n - 1})' if n > 1 else 'a longer text)'))

    def sample_offsets(self, split, count, block_size, generator):
        """Where `count` random windows start: int64 (count)."""
        return torch.randint(len(self.tokens(split)) - block_size, (count,), generator=generator)

    def batch(self, split, batch_size, block_size, generator, device):
        """Random windows: x (B, T) token ids, y (B, T) the ids that follow; int64, on `device`."""
        starts = self.sample_offsets(split, batch_size, block_size, generator)
        return self.windows(self.tokens(split), starts.tolist(), block_size, split, device)

    def windows(self, tokens, starts, block_size, split, device):
        """The windows at `starts`: x (B, T), y (B, T)."""
        rows = np.stack([tokens[i:i + block_size + 1] for i in starts])                         # (B, T + 1)
        self._check_ids(rows, split)
        rows = torch.from_numpy(rows.astype(np.int64))
        if torch.device(device).type == 'cuda':
            rows = rows.pin_memory().to(device, non_blocking=True)
        else:
            rows = rows.to(device)
        return rows[:, :-1], rows[:, 1:]


# data sets that take hours and tens of gigabytes: never started by the way
LARGE = {'openwebtext': 'about 24 GB of downloads'}


def is_prepared(folder):
    """Whether both splits are there and no preparation was cut off."""
    meta = folder / 'meta.json'
    try:
        return (folder / 'train.bin').exists() and (folder / 'val.bin').exists() and not (
            meta.exists() and meta.read_bytes() == UNFINISHED)
    except OSError:                                                 # unreadable: read_meta will say so
        return True


def preparing(folder):
    """Context manager: a block that prepares a folder while other processes wait."""
    if os.environ.get(HELD) == os.path.realpath(folder):
        return nullcontext()
    return locked(lock_file(folder), lambda: print(f'{folder}: waiting until another process has prepared it',
                                                   flush=True))


def locate(name, tokenizer, roots=DATA_ROOTS):
    """The prepared folder of a data set, prepared first if need be: by one process, for which the others wait.

    name: a folder below one of `roots` (searched in order), a path to a prepared folder, or a text file, which is
    encoded by `tokenizer` into STEM-TOKENIZER-HASH below the last of `roots` that can be written. Raises UserError
    where there is no such thing.
    """
    try:
        is_file = Path(name).is_file()
    except OSError as e:
        raise UserError(f'dataset={name}: {e.strerror}') from None
    if is_file:
        try:
            content = Path(name).read_bytes()
            text = content.decode('utf-8-sig').replace('\r\n', '\n')
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f'dataset={name}: not a readable UTF-8 text file ({type(e).__name__})') from None
        own = f'{Path(name).stem}-{tokenizer}-{hashlib.sha256(content).hexdigest()[:8]}'
        folders = [root / own for root in reversed(roots)]
    else:
        folders = [*(root / name for root in roots), Path(name)]
    for folder in folders:
        if is_prepared(folder):
            return folder
    for folder in folders:
        script, files = folder / 'prepare.py', [folder / f for f in ('train.bin', 'val.bin')]
        if script.exists() and name in LARGE and not is_prepared(folder):
            raise UserError(f'dataset={name}: not prepared: python {script} does so ({LARGE[name]}); for a first look, '
                            'minutes on a CPU: python train.py config/train_svd_test.py')
        if not is_file and not any(file.exists() for file in (script, *files)):
            continue
        with preparing(folder):
            if is_prepared(folder):
                return folder
            if is_file:
                try:
                    meta = write_dataset(folder, text, tokenizer, source=str(name))
                except OSError as e:
                    if e.errno not in FULL and folder != folders[-1]:
                        continue
                    way = '' if e.errno in FULL else ' (nearest: start in a folder whose data/ can be)'
                    raise unwritable(f'dataset={name}: {e.filename}: cannot be written{way}', e) from None
                print(f'{name}: {len(text):,} characters -> {meta["train_tokens"]:,} + {meta["val_tokens"]:,} tokens '
                      f'({tokenizer}, vocabulary {meta["vocab_size"]:,}) in {folder}')
            elif script.exists():
                print(f'data set {name} is not prepared yet: running {script}', flush=True)
                held = {HELD: os.path.realpath(folder)}
                if subprocess.run([sys.executable, str(script)], env=os.environ | held).returncode:
                    raise UserError(f'dataset={name}: {script} failed; the line above says why')
            else:
                missing = [file.name for file in files if not file.exists()]
                what = f'{missing[0]} is missing' if missing else 'its meta.json says so'
                raise UserError(f'dataset={name}: {folder} was left half-prepared ({what}){AGAIN}')
            return folder
    known = sorted({f.parent.name for root in roots for f in [*root.glob('*/prepare.py'), *root.glob('*/train.bin')]})
    hint = did_you_mean(name, known, other='known: ' + ', '.join(known))
    raise UserError(f'dataset={name}: no such data set or text file{hint}')


def name_of(folder, name):
    """What finds the folder that `locate` returned for `name`, without the text and from any working directory: its
    path below the repo's data/, which may move, or else its absolute path. A name below data/ stays as it is."""
    path, root = Path(os.path.realpath(folder)), DATA_ROOTS[-1]
    if folder in [root / name for root in DATA_ROOTS]:
        return name
    return str(path.relative_to(root) if path.is_relative_to(root) else path)

"""Token data sets: a folder with train.bin, val.bin (token ids, uint16 or uint32) and meta.json.

meta.json holds `tokenizer` ('char' or 'gpt2'), `vocab_size`, `dtype`, `chars` (for 'char', in id
order) and where the text came from. Folders that nanoGPT prepared work too: meta.pkl is read by an
unpickler that can make nothing but plain containers, and no meta at all means GPT-2 BPE in uint16.

train.bin is written last and removed first, so that a folder is a whole data set if it has both
.bin files.
"""

import codecs
import hashlib
import json
import os
import pickle
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from runtime import download
from runtime.config import UserError, did_you_mean, one_line
from runtime.files import (
    atomic_open, check_writable, lock_file, locked, remove_leftovers, write_atomically)

END = '<|endoftext|>'
WITH_END = f'{{}}: {END} in the text becomes ordinary tokens, not 50256 as in a prompt'
GPT2_META = dict(tokenizer='gpt2', vocab_size=50257, dtype='uint16')
# The working directory's data/ is searched first, then the repository's.
DATA_ROOTS = (Path('data'), Path(__file__).resolve().parents[1] / 'data')
# Data sets that take hours and tens of gigabytes are only prepared by their own command.
LARGE = {'openwebtext': 'about 24 GB of downloads'}


class Tokenizer:
    """Text to token ids and back, from a data set's meta dict."""

    def __init__(self, meta):
        self.kind, self.vocab_size = meta['tokenizer'], meta['vocab_size']
        if self.kind == 'char':
            self.chars = meta['chars']
            self.ids = {c: i for i, c in enumerate(self.chars)}
            self.token_bytes = lambda i: self.chars[i].encode()
        else:
            self.bpe = download.gpt2_encoding()
            self.token_bytes = self.bpe.decode_single_token_bytes

    def encode(self, text):
        """The ids of a str, a list of int. Raises UserError for characters without an id."""
        if self.kind == 'gpt2':
            return self.bpe.encode(text, allowed_special={END})
        unknown = sorted(set(text) - set(self.ids))
        if unknown:
            raise UserError(f'characters {"".join(unknown[:20])!r} are not in this model\'s '
                            f'vocabulary of {len(self.chars)}, leave them out: '
                            f'{"".join(self.chars)[:100]!r}')
        return [self.ids[c] for c in text]

    def decode(self, ids):
        """The text of an iterable of ids."""
        return ''.join(self.decode_stream(ids))

    def decode_stream(self, ids):
        """Yield the text of an iterable of ids, one piece per id as it comes, and one at the end.

        A character that several tokens make up comes with the last of them.
        """
        decoder = codecs.getincrementaldecoder('utf-8')('replace')
        for i in ids:                               # a rounded-up vocabulary has ids without a text
            yield decoder.decode(self.token_bytes(i) if i < self.vocab_size else b'')
        yield decoder.decode(b'', final=True)


def read_text(path):
    """The text of a UTF-8 file, without a byte order mark, '\\r\\n' as '\\n'. Raises UserError."""
    try:
        return Path(path).read_bytes().decode('utf-8-sig').replace('\r\n', '\n')
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f'{path}: cannot be read as UTF-8 text: {one_line(e)}') from None


def write_dataset(folder, text, tokenizer, source):
    """Encode text, 90% of its characters for training and the rest for validation, into `folder`.

    tokenizer: 'char' (its vocabulary is the text's own characters) or 'gpt2'; source: words for
    meta.json. Prints one line. Raises UserError for a text that is too short, and OSError.
    """
    if len(text.strip()) < 2:
        raise UserError(f'{source}: {len(text.strip())} characters are too few for a training and '
                        'a validation split')
    meta = dict(GPT2_META)
    if tokenizer == 'char':
        chars = sorted(set(text))
        meta = dict(tokenizer='char', vocab_size=len(chars),
                    dtype='uint16' if len(chars) <= 2 ** 16 else 'uint32', chars=chars)
    elif END in text:
        print(WITH_END.format(source))
    encoder, cut = Tokenizer(meta), int(len(text) * 0.9)
    encode = encoder.encode if tokenizer == 'char' else encoder.bpe.encode_ordinary
    train, val = (np.array(encode(part), meta['dtype']) for part in (text[:cut], text[cut:]))
    meta |= dict(source=source, sha256=hashlib.sha256(text.encode()).hexdigest(),
                 characters=len(text), train_tokens=len(train), val_tokens=len(val))
    folder = Path(folder)
    with preparing(folder / 'train.bin'):
        write_files(folder, meta, train=[train.tobytes()], val=[val.tobytes()])
    print(f'{source}: {len(text):,} characters, {len(set(text))} distinct, sha256 {meta["sha256"]} '
          f'-> {len(train):,} + {len(val):,} tokens ({tokenizer}, vocabulary '
          f'{meta["vocab_size"]:,}) in {folder}')


def write_files(folder, meta, train, val):
    """Write the files of a data set into `folder`, which the caller has locked. Raises OSError.

    train, val: the pieces of train.bin and val.bin, iterables of bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    (folder / 'train.bin').unlink(missing_ok=True)
    write_atomically(folder / 'meta.json',
                     json.dumps(meta, indent=1, ensure_ascii=False).encode())
    for name, pieces in (('val.bin', val), ('train.bin', train)):
        with atomic_open(folder / name) as f:
            f.writelines(pieces)


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'{module}.{name}: only plain containers are allowed')


def read_meta(folder):
    """The meta dict of a data set folder, nanoGPT's included. Raises UserError."""
    folder = Path(folder)
    try:
        if (folder / 'meta.json').exists():
            meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
        elif (folder / 'meta.pkl').exists():
            with open(folder / 'meta.pkl', 'rb') as f:
                old = _PlainUnpickler(f).load()
            meta = dict(tokenizer='char', vocab_size=old['vocab_size'], dtype='uint16',
                        chars=[old['itos'][i] for i in range(old['vocab_size'])])
        else:
            meta = dict(GPT2_META)
        return check_meta(meta, folder)
    except Exception:                               # a damaged pickle raises nearly any of them
        raise damaged(f'{folder}/meta.json or meta.pkl') from None


def check_meta(meta, where):
    """Return the meta dict. Raises UserError, which begins with `where`, if it is damaged."""
    with suppress(AttributeError, KeyError, TypeError):
        size, chars = meta['vocab_size'], meta.get('chars', [])
        sizes = dict(char=len(set(chars)), gpt2=GPT2_META['vocab_size'])
        if (type(size) is int and size == sizes[meta['tokenizer']]
                and list(''.join(chars)) == chars and meta['dtype'] in ('uint16', 'uint32')):
            return meta
    raise UserError(f'{where}: tokenizer, vocab_size, dtype and chars of its meta do not fit '
                    'together')


def damaged(path):
    """The UserError for a file of a data set that cannot be used."""
    return UserError(f'{path}: missing or damaged; prepare the data set again: with its '
                     'prepare.py, or delete this folder and name its text, --dataset=FILE.txt')


class Dataset:
    """Batches of token windows from a prepared folder.

    Raises UserError for missing, damaged or foreign files.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.meta = read_meta(folder)
        self.vocab_size = self.meta['vocab_size']
        for split in ('train', 'val'):
            path = self.folder / f'{split}.bin'
            count = (path.stat().st_size / np.dtype(self.meta['dtype']).itemsize
                     if path.is_file() else 0)
            if (count == 0 or count != self.meta.get(f'{split}_tokens', int(count))
                    or self.tokens(split)[:2 ** 28].max() >= self.vocab_size):
                raise damaged(path)

    def tokens(self, split):
        """All ids of a split (N,), memory-mapped.

        The file is opened at each call: a long-lived map leaks (nanoGPT#428).
        """
        return np.memmap(self.folder / f'{split}.bin', dtype=self.meta['dtype'], mode='r')

    @property
    def padded_vocab_size(self):
        """Number of token ids of a model trained on it.

        For BPE it is rounded up to a multiple of 64, 50257 to 50304, which makes products faster.
        """
        return (-(-self.vocab_size // 64) * 64 if self.meta['tokenizer'] == 'gpt2'
                else self.vocab_size)

    def check_length(self, block_size):
        """Raise UserError unless each split has a window: block_size tokens and the one after."""
        n, split = min((len(self.tokens(split)), split) for split in ('train', 'val'))
        if n <= block_size:
            raise UserError(f'block_size={block_size}: {self.folder}/{split}.bin has only {n} '
                            f'tokens (nearest: {n - 1 if n > 1 else "a longer text"})')

    def sample_offsets(self, split, count, block_size, generator):
        """Where `count` random windows start: int64 (count)."""
        return torch.randint(len(self.tokens(split)) - block_size, (count,), generator=generator)

    def batch(self, split, batch_size, block_size, generator, device):
        """Random windows: x (B, T) token ids, y (B, T) the ids that follow; int64, on `device`."""
        starts = self.sample_offsets(split, batch_size, block_size, generator)
        return self.windows(self.tokens(split), starts.tolist(), block_size, split, device)

    def windows(self, tokens, starts, block_size, split, device):
        """The windows at `starts`: x (B, T), y (B, T)."""
        rows = np.stack([tokens[i:i + block_size + 1] for i in starts])             # (B, T + 1)
        if rows.max() >= self.vocab_size:           # __init__ looked at the first 2^28 only
            raise damaged(self.folder / f'{split}.bin')
        rows = torch.from_numpy(rows.astype(np.int64))
        if torch.device(device).type == 'cuda':
            rows = rows.pin_memory().to(device, non_blocking=True)
        else:
            rows = rows.to(device)
        return rows[:, :-1], rows[:, 1:]


def is_prepared(folder):
    """Whether a folder holds a whole data set."""
    return all(os.path.exists(folder / f'{split}.bin') for split in ('train', 'val'))


def preparing(path):
    """Context manager: a block that makes a file or a folder while other processes wait."""
    return locked(lock_file(path), lambda: print(
        f'{path}: waiting until another process has made it', flush=True))


def locate(name, tokenizer, roots=DATA_ROOTS):
    """The prepared folder of a data set. If it is not prepared yet, one process does so.

    name: a folder below one of `roots` (searched in order), the path of a folder, or a text file,
    which `tokenizer` encodes into STEM-TOKENIZER-HASH below the last of `roots` that can be
    written. Raises UserError.
    """
    if os.path.isfile(name):
        return _locate_text(name, tokenizer, roots)
    folders = [*(root / name for root in roots), Path(name)]
    found = [*filter(is_prepared, folders),
             *(folder for folder in folders if os.path.exists(folder / 'prepare.py'))]
    if not found:
        known = sorted({path.parent.name for root in roots for path in root.glob('*/*')
                        if path.name in ('prepare.py', 'train.bin')})
        raise UserError(f'dataset={name}: no text file, nor a folder with train.bin and val.bin or '
                        'with prepare.py' + did_you_mean(name, known,
                                                         other='known: ' + ', '.join(known)))
    folder, script = found[0], found[0] / 'prepare.py'
    if is_prepared(folder):
        return folder
    if folder.name in LARGE:
        raise UserError(f'dataset={name}: not prepared: python {script} does so '
                        f'({LARGE[folder.name]}); for a first look, minutes on a CPU: python '
                        'train.py config/train_svd_test.py')
    with preparing(folder):
        if not is_prepared(folder):
            print(f'data set {name} is not prepared yet: running {script}', flush=True)
            if subprocess.run([sys.executable, str(script)]).returncode:
                raise UserError(f'dataset={name}: {script} failed; the line above says why')
    return folder


def _locate_text(name, tokenizer, roots):
    """The folder of a text file, which is encoded by the first process that needs it."""
    text, digest = read_text(name), hashlib.sha256(Path(name).read_bytes()).hexdigest()
    own = f'{Path(name).stem}-{tokenizer}-{digest[:8]}'
    writable = next((root for root in reversed(roots) if os.access(root, os.W_OK)), roots[0])
    folder = next((root / own for root in roots if is_prepared(root / own)), writable / own)
    with preparing(folder):
        if not is_prepared(folder):
            check_writable(folder / 'train.bin', f'dataset={name}: {folder}')
            write_dataset(folder, text, tokenizer, source=str(name))
    return folder


def name_of(folder, name):
    """A name by which `locate` finds the folder it returned for `name`, without the text and from
    any working directory.

    It is the path below the repository's data/, which may move, or else the absolute path. A name
    below data/ stays as it is.
    """
    path, root = Path(os.path.realpath(folder)), DATA_ROOTS[-1]
    if folder in [root / name for root in DATA_ROOTS]:
        return name
    return str(path.relative_to(root) if path.is_relative_to(root) else path)

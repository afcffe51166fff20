"""Data sets: a folder with train.bin, val.bin (token ids as uint16 or uint32) and meta.json.

meta.json, the metadata, holds `tokenizer` ('char', or 'gpt2' for the first `vocab_size` tokens of
GPT-2's BPE), `vocab_size`, `dtype`, `chars` (for 'char', in the order of their ids) and the source
of the text. Folders that nanoGPT prepared can be read too. The meta.pkl of such a folder is
unpickled safely: only plain containers are created. A folder without metadata is taken to hold
GPT-2 BPE as uint16.

train.bin is written last and removed first. A folder with both .bin files is therefore complete.
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
WITH_END = f'{{}}: {END} in this text becomes ordinary tokens; in a prompt it is token 50256'
GPT2_META = dict(tokenizer='gpt2', vocab_size=50257, dtype='uint16')
# the working directory's data/ is searched first, then the repository's
DATA_ROOTS = (Path('data'), Path(__file__).resolve().parents[1] / 'data')
# data sets that take hours and tens of gigabytes are not prepared automatically
LARGE = {'openwebtext': 'about 24 GB of downloads'}


class Tokenizer:
    """Convert text to token ids and back. `meta` is the metadata dict of a data set."""

    def __init__(self, meta):
        self.kind, self.vocab_size = meta['tokenizer'], meta['vocab_size']
        if self.kind == 'char':
            self.chars = meta['chars']
            self.ids = {c: i for i, c in enumerate(self.chars)}
            self.token_bytes = lambda i: self.chars[i].encode()
        else:
            self.bpe = download.gpt2_encoding()
            if not has_end(meta):
                self.bpe = first_tokens(self.bpe, self.vocab_size)
            self.token_bytes = self.bpe.decode_single_token_bytes

    def encode(self, text):
        """Return the token ids of a text, a list of int. Raises UserError for characters that are
        not in the vocabulary."""
        if self.kind == 'gpt2':
            return self.bpe.encode(text, allowed_special={END})
        unknown = sorted(set(text) - set(self.ids))
        if unknown:
            raise UserError(f'characters {"".join(unknown[:20])!r} are not in this model\'s '
                            f'vocabulary (nearest: only its {len(self.chars)} characters, '
                            f'{"".join(self.chars)[:100]!r})')
        return [self.ids[c] for c in text]

    def decode(self, ids):
        """Return the text of an iterable of token ids."""
        return ''.join(self.decode_stream(ids))

    def decode_stream(self, ids):
        """Yield the text of an iterable of token ids, one piece per id and one at the end. A
        character that consists of several tokens comes with its last token."""
        decoder = codecs.getincrementaldecoder('utf-8')('replace')
        for i in ids:                               # a padded vocabulary has ids without text
            yield decoder.decode(self.token_bytes(i) if i < self.vocab_size else b'')
        yield decoder.decode(b'', final=True)


def has_end(meta):
    """Return whether <|endoftext|>, the last token of GPT-2's BPE, is in the vocabulary."""
    return meta['tokenizer'] == 'gpt2' and meta['vocab_size'] == GPT2_META['vocab_size']


def first_tokens(bpe, count):
    """Return the tiktoken.Encoding of the first `count` tokens of GPT-2's BPE, which are the 256
    bytes and the first merges."""
    import tiktoken
    return tiktoken.Encoding(
        f'gpt2-{count}', pat_str=download.BPE_PATTERN, special_tokens={}, mergeable_ranks={
            token: rank for token, rank in bpe._mergeable_ranks.items() if rank < count})


def read_text(path):
    """Return the text of a UTF-8 file without byte order mark and with '\\n' for '\\r\\n'. Raises
    UserError if it cannot be read."""
    try:
        return Path(path).read_bytes().decode('utf-8-sig').replace('\r\n', '\n')
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f'{path}: cannot be read as UTF-8 text: {one_line(e)}') from None


def write_dataset(folder, text, tokenizer, source, vocab_size=GPT2_META['vocab_size']):
    """Encode a text into `folder`: 90% of its characters for training, the rest for validation.

    `tokenizer` is 'char' (the vocabulary is the set of characters in the text) or 'gpt2' (the first
    `vocab_size` tokens of GPT-2's BPE, at least 256), and `source` describes the text in meta.json.
    Prints a summary. Raises UserError if the text is too short and OSError if it cannot be written.
    """
    if len(text.strip()) < 2:
        raise UserError(f'{source}: {len(text.strip())} characters are too few for a training and '
                        'a validation split (nearest: 2)')
    meta = dict(GPT2_META, vocab_size=vocab_size)
    if tokenizer == 'char':
        chars = sorted(set(text))
        meta = dict(tokenizer='char', vocab_size=len(chars),
                    dtype='uint16' if len(chars) <= 2 ** 16 else 'uint32', chars=chars)
    elif has_end(meta) and END in text:
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
    """Write the files of a data set into `folder`. The caller has locked the folder. `train` and
    `val` are iterables of bytes, the parts of train.bin and val.bin. Raises OSError."""
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
    """Return the metadata of a data set folder. Raises UserError if the metadata is damaged."""
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
    except Exception:  # a damaged pickle can raise any exception
        raise damaged(f'{folder}/meta.json or meta.pkl') from None


def check_meta(meta, where):
    """Check the metadata `meta` and return it. If it is damaged, raises a UserError that names
    `where`."""
    with suppress(AttributeError, KeyError, TypeError):
        size, chars = meta['vocab_size'], meta.get('chars', [])
        sizes = dict(char=[len(set(chars))], gpt2=range(256, GPT2_META['vocab_size'] + 1))
        if (type(size) is int and size in sizes[meta['tokenizer']]
                and list(''.join(chars)) == chars and meta['dtype'] in ('uint16', 'uint32')):
            return meta
    raise UserError(f'{where}: damaged: its tokenizer, vocab_size, dtype and chars contradict '
                    'each other')


def damaged(path):
    """Return the UserError for a missing or damaged file of a data set."""
    return UserError(f'{path}: missing or damaged; prepare the data set again with its prepare.py, '
                     'or delete its folder and give its text: --dataset=FILE.txt')


class Dataset:
    """Windows of tokens from a prepared folder. Raises UserError if a file is missing or damaged,
    or has ids that are not in the vocabulary."""

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
        """Return all token ids of a split, a memory-mapped array (N,). The file is opened on each
        call, because a long-lived memory map leaks (nanoGPT#428)."""
        return np.memmap(self.folder / f'{split}.bin', dtype=self.meta['dtype'], mode='r')

    @property
    def padded_vocab_size(self):
        """Number of token ids of a model that is trained on this data set. For BPE the number is
        rounded up from 50257 to 50304, a multiple of 64, so that matrix products are faster."""
        return (-(-self.vocab_size // 64) * 64 if self.meta['tokenizer'] == 'gpt2'
                else self.vocab_size)

    def check_length(self, block_size):
        """Raise UserError unless each split has at least block_size + 1 tokens, which is one
        window."""
        n, split = min((len(self.tokens(split)), split) for split in ('train', 'val'))
        if n <= block_size:
            raise UserError(f'block_size={block_size}: {self.folder}/{split}.bin has only {n} '
                            f'tokens (nearest: {n - 1 if n > 1 else "a longer text"})')

    def sample_offsets(self, split, count, block_size, generator):
        """Return the start positions of `count` random windows, int64 (count,)."""
        return torch.randint(len(self.tokens(split)) - block_size, (count,), generator=generator)

    def batch(self, split, batch_size, block_size, generator, device):
        """Return random windows on `device`: token ids x (B, T) and, for each of them, the next
        token id, y (B, T). Both are int64. `generator` draws the positions."""
        starts = self.sample_offsets(split, batch_size, block_size, generator)
        return self.windows(self.tokens(split), starts.tolist(), block_size, split, device)

    def windows(self, tokens, starts, block_size, split, device):
        """Return the windows of `tokens` at the positions `starts`: x and y as in `batch`."""
        rows = np.stack([tokens[i:i + block_size + 1] for i in starts])             # (B, T + 1)
        if rows.max() >= self.vocab_size:           # __init__ checked the first 2^28 only
            raise damaged(self.folder / f'{split}.bin')
        rows = torch.from_numpy(rows.astype(np.int64))
        if torch.device(device).type == 'cuda':
            rows = rows.pin_memory().to(device, non_blocking=True)
        else:
            rows = rows.to(device)
        return rows[:, :-1], rows[:, 1:]


def is_prepared(folder):
    """Return whether a folder holds a complete data set."""
    return all(os.path.exists(folder / f'{split}.bin') for split in ('train', 'val'))


def preparing(path):
    """Context manager that prepares a file or folder while other processes wait."""
    return locked(lock_file(path), lambda: print(
        f'{path}: waiting until another process has prepared it', flush=True))


def locate(name, tokenizer, roots=DATA_ROOTS):
    """Return the folder of a data set. If the data set is not prepared yet, one process prepares
    it.

    `name` is a text file, a folder below one of `roots` (searched in order), or the path of a
    folder. A text file is encoded with `tokenizer` into the folder STEM-TOKENIZER-HASH below the
    last writable one of `roots`. Raises UserError if the data set is missing or cannot be prepared.
    """
    if os.path.isfile(name):
        return _locate_text(name, tokenizer, roots)
    folders = [*(root / name for root in roots), Path(name)]
    found = [*filter(is_prepared, folders),
             *(folder for folder in folders if os.path.exists(folder / 'prepare.py'))]
    if not found:
        known = sorted({path.parent.name for root in roots for path in root.glob('*/*')
                        if path.name in ('prepare.py', 'train.bin')})
        raise UserError(f'dataset={name}: neither a text file nor a data set, which is a folder '
                        'with train.bin and val.bin, or with prepare.py' + did_you_mean(
                            name, known, other='available: ' + ', '.join(known)))
    folder, script = found[0], found[0] / 'prepare.py'
    if is_prepared(folder):
        return folder
    if folder.name in LARGE:
        raise UserError(f'dataset={name}: not prepared yet; to prepare it: python {script} '
                        f'({LARGE[folder.name]}); for a quick first run (a few minutes on a CPU): '
                        'python train.py config/train_svd_test.py')
    with preparing(folder):
        if not is_prepared(folder):
            print(f'data set {name} is not prepared yet; running {script}', flush=True)
            if subprocess.run([sys.executable, str(script)]).returncode:
                raise UserError(f'dataset={name}: {script} failed; the line above says why')
    return folder


def _locate_text(name, tokenizer, roots):
    """Return the data set folder of a text file. The first process that needs the folder encodes
    the text."""
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
    """Return a name under which `locate` finds `folder` again, from any working directory and
    without the text file. `name` is the name under which `locate` found the folder. A folder
    directly below data/ keeps `name`. Another folder gets its path relative to the repository's
    data/, or its absolute path."""
    path, root = Path(os.path.realpath(folder)), DATA_ROOTS[-1]
    if folder in [root / name for root in DATA_ROOTS]:
        return name
    return str(path.relative_to(root) if path.is_relative_to(root) else path)

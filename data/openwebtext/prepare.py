"""OpenWebText, FineWeb-Edu or local files as GPT-2 BPE, for training from scratch:

    python data/openwebtext/prepare.py [--source NAME | --files 'GLOB'] [--max_tokens N] [--out_dir DIR]

The documents are streamed and each ends with the end-of-text token. OpenWebText's 9 billion tokens need 18 GB of disk,
and as much again for the shards on the way; FineWeb-Edu's sample has 10 billion. Whenever the run is stopped, the same
command goes on after the last complete shard and ends with the same bytes.
"""

import argparse
import glob
import hashlib
import itertools
import json
import os
import shutil
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

from runtime import cli                                            # before numpy: says what is not installed

import numpy as np
from tqdm import tqdm

from runtime import download, tracking
from runtime.config import UserError, one_line
from runtime.data import END, GPT2_META, UNFINISHED, WITH_END, preparing
from runtime.files import remove_leftovers, atomic_open, write_atomically

# Fixed revisions, in parquet: a changed file between two runs of one preparation would go unnoticed.
SOURCES = {
    'openwebtext': dict(path='Skylion007/openwebtext', revision='b4325f019c648b1641a1784748667e8b74e5e064'),
    'fineweb-edu': dict(path='HuggingFaceFW/fineweb-edu', name='sample-10BT',
                        revision='87f09149ef4734204d70ed1d046ddc9ca3f2b8f9'),
}
SHARD_CHARACTERS = 2 ** 24          # about 4 million tokens and a few seconds of work; bounds memory too
VAL_ONE_IN = 2000                   # 0.05%, as nanoGPT


def main(argv=None):
    """Returns the exit code: 0, 1 when the source cannot be reached or the disk is full, 2 for wrong input, 130."""
    parser = argparse.ArgumentParser(prog='python data/openwebtext/prepare.py', allow_abbrev=False)
    where = parser.add_mutually_exclusive_group()
    where.add_argument('--source', choices=SOURCES, default='openwebtext', help='default: openwebtext')
    where.add_argument('--files', metavar='GLOB', type=os.path.expanduser,
                       help='local .parquet (column "text") or .txt (one document each)')
    parser.add_argument('--max_tokens', metavar='N', type=int, help='stop after N training tokens')
    parser.add_argument('--out_dir', metavar='DIR', type=cli.path, default=FOLDER, help='default: this folder')
    return cli.parse(parser, argv, alone, 'goes on')


def alone(args):
    with preparing(args.out_dir):
        prepare(args)


def prepare(args):
    """Documents -> shards -> train.bin, val.bin, meta.json. Raises UserError, OSError."""
    if args.max_tokens is not None and args.max_tokens < 1:
        raise UserError(f'--max_tokens={args.max_tokens}: must be 1 or more')
    what = find_source(args)
    try:
        import datasets
    except ImportError as e:
        raise UserError(f'{e.name or e} is missing: pip install datasets') from None
    encoding = download.gpt2_encoding()
    shards, meta_file = args.out_dir / 'shards', args.out_dir / 'meta.json'
    progress_file = shards / 'progress.json'
    # What the result depends on; besides, a position in the stream is understood by the same version of datasets only.
    settings = dict(what, max_tokens=args.max_tokens, datasets=datasets.__version__)
    settings_sha256 = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    done = read_json(progress_file) or dict(settings=settings, position=None, documents=0, shards=0,
                                            train_tokens=0, val_tokens=0, complete=False)
    if done['settings'] != settings:
        begun = {key: done['settings'].get(key) for key in ('source', 'max_tokens', 'datasets')}
        raise UserError(f'{shards}: another preparation was begun here, with {begun}; finish it with the same options, '
                        'or delete this folder to give it up')
    if read_json(meta_file).get('settings_sha256') == settings_sha256:
        shutil.rmtree(shards, ignore_errors=True)           # a kill may have come before this
        print(f'{args.out_dir}: already prepared; delete {meta_file} to do it again')
        return
    documents = open_documents(datasets, what)
    try:
        shards.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f'--out_dir={args.out_dir}: {e.strerror}') from None
    with tracking.bar(total=args.max_tokens, initial=done['train_tokens'], unit=' tokens', unit_scale=True) as bar:
        for done in write_shards(documents, done, shards, encoding):
            write_atomically(progress_file, json.dumps(done).encode())
            bar.update(done['train_tokens'] - bar.n)
    if not done['train_tokens']:
        shutil.rmtree(shards)
        raise UserError(f'{what["source"]}: a training and a validation split need two documents (a .txt file is one), '
                        f'found {done["documents"]}')
    # The old data set ends here. Until the new one is whole, its meta.json says so to whoever opens it.
    write_atomically(meta_file, UNFINISHED)
    remove_leftovers(args.out_dir)
    for split in ('train', 'val'):
        concatenate([shards / f'{split}-{i:05}.bin' for i in range(done['shards'])], args.out_dir / f'{split}.bin')
    counts = {key: done[key] for key in ('documents', 'train_tokens', 'val_tokens')}
    meta = dict(GPT2_META, source=what['source'], **counts, settings_sha256=settings_sha256)
    write_atomically(meta_file, json.dumps(meta, indent=1).encode())
    shutil.rmtree(shards)
    print(f'{what["source"]}: {counts["documents"]:,} documents, {counts["train_tokens"]:,} tokens for training, '
          f'{counts["val_tokens"]:,} for validation -> {args.out_dir}')


def read_json(path):
    """The dict in a file, {} when it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def find_source(args):
    """The options -> dict(source=words, load=arguments for load_dataset, files=[[path, bytes], ...] when local)."""
    if args.files is None:
        load = SOURCES[args.source]
        return dict(source=f'{load["path"]} at {load["revision"][:8]}', load=load)
    folder, name = os.path.split(args.files)                # what is there is no pattern, brackets or not
    name = glob.escape(name) if os.path.isfile(args.files) else name
    pattern = os.path.join(glob.escape(folder) if os.path.isdir(folder) else folder, name)
    files = sorted(f for f in glob.glob(pattern, recursive=True) if os.path.isfile(f))
    kinds = {Path(f).suffix for f in files}
    if not files:
        raise UserError(f'--files={args.files}: no such files')
    if len(kinds) > 1 or not kinds <= {'.parquet', '.txt'}:
        raise UserError(f'--files={args.files}: must be all .parquet or all .txt, found {", ".join(sorted(kinds))}')
    load = dict(path='parquet') if kinds == {'.parquet'} else dict(
        path='text', sample_by='document', encoding='utf-8-sig')
    return dict(source=f'--files {args.files}', load=load, files=[[f, os.path.getsize(f)] for f in files])


def open_documents(datasets, what):
    """-> an IterableDataset of {'text': str}. Raises UserError for local files, OSError for a source on the network."""
    local = dict(data_files=[glob.escape(f) for f, _ in what['files']]) if 'files' in what else {}
    try:
        return datasets.load_dataset(**what['load'], **local, split='train', streaming=True).select_columns(['text'])
    except Exception as e:                                  # datasets raises its own, pyarrow's, the hub's and others
        place = what['files'][0][0] if local else what['source']            # only the first is looked into here
        message = f'{place}: cannot be opened: {type(e).__name__}: {one_line(e)}'
        hint = "; local files can be given with --files 'GLOB'"
        raise (UserError(message) if local else OSError(message + hint)) from None


def write_shards(documents, progress, shards, encoding):
    """Write train-00000.bin, val-00000.bin, ... into the folder `shards`, yielding `progress` after each pair.

    A document's split depends on nothing but its number; number 0 is always for validation, so there is at least one.
    """
    max_tokens = progress['settings']['max_tokens'] or float('inf')
    if progress['position']:
        documents.load_state_dict(progress['position'])
    stream, told = iter(documents), False
    while not progress['complete']:
        texts = read_shard(stream, progress, documents)
        if not told and any(END in text for text in texts):
            tqdm.write(WITH_END.format(progress['settings']['source']))
            told = True
        parts = {'train': [], 'val': []}
        left = max_tokens - progress['train_tokens']
        number = progress['documents']
        for ids in encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count()):
            if left == 0:
                break
            ids.append(encoding.eot_token)
            if is_validation(number):
                parts['val'].append(ids)
            else:
                parts['train'].append(ids[:left] if len(ids) > left else ids)
                left -= len(parts['train'][-1])
            number += 1
        for split, lists in parts.items():
            ids = np.fromiter(itertools.chain.from_iterable(lists), dtype=np.uint16)
            write_atomically(shards / f'{split}-{progress["shards"]:05}.bin', ids.tobytes())
            progress = dict(progress, **{f'{split}_tokens': progress[f'{split}_tokens'] + len(ids)})
        progress = dict(progress, position=documents.state_dict(), documents=number, shards=progress['shards'] + 1,
                        complete=not texts or left == 0)
        yield progress


def read_shard(stream, progress, documents):
    """The next texts, SHARD_CHARACTERS or a little more together; [] at the end. Raises as open_documents."""
    texts, size = [], 0
    try:
        while size < SHARD_CHARACTERS:
            texts.append(next(stream)['text'] or '')
            size += len(texts[-1]) + 1
    except StopIteration:
        pass
    except Exception as e:                                  # a damaged file, or the network and all its libraries
        settings = progress['settings']
        position, place = documents.state_dict(), settings['source']
        if 'files' in settings:
            while 'shard_idx' not in position:
                position = position['examples_iterable']
            place = settings['files'][position['shard_idx']][0]
        message = f'{place}: reading stopped: {type(e).__name__}: {one_line(e)}'
        hint = f'; the same command goes on after {progress["documents"]:,} documents'
        raise (UserError(message) if 'files' in settings else OSError(message + hint)) from None
    return texts


def is_validation(number):
    digest = hashlib.sha256(str(number).encode()).digest()
    return number == 0 or int.from_bytes(digest[:8], 'big') % VAL_ONE_IN == 0


def concatenate(parts, path):
    """Files -> one file."""
    with atomic_open(path) as out:
        for part in parts:
            with open(part, 'rb') as f:
                shutil.copyfileobj(f, out)


if __name__ == '__main__':
    sys.exit(main())

"""OpenWebText, FineWeb-Edu or local files as GPT-2 BPE, for training from scratch:

    python data/openwebtext/prepare.py [--source NAME | --files 'GLOB'] [--max_tokens N]
                                       [--out_dir DIR]

The documents are streamed and each ends with the end-of-text token. OpenWebText's 9 billion tokens
need 18 GB of disk, and as much again for the shards on the way; FineWeb-Edu's sample has 10
billion. Whenever the run is stopped, the same command goes on after the last complete shard and
ends with the same bytes.
"""

import argparse
import glob
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

from runtime import cli                                 # before numpy: says what is not installed

import numpy as np

from runtime import download, tracking
from runtime.config import Failure, UserError, one_line
from runtime.data import END, GPT2_META, WITH_END, is_prepared, preparing
from runtime.files import atomic_open, check_writable, remove_leftovers, write_atomically

# Fixed revisions, in parquet: a file that changes between two runs of one preparation would go
# unnoticed.
SOURCES = {
    'openwebtext': dict(path='Skylion007/openwebtext',
                        revision='b4325f019c648b1641a1784748667e8b74e5e064'),
    'fineweb-edu': dict(path='HuggingFaceFW/fineweb-edu', name='sample-10BT',
                        revision='87f09149ef4734204d70ed1d046ddc9ca3f2b8f9')}
SHARD_CHARACTERS = 2 ** 24          # about 4 million tokens, a few seconds of work; bounds memory
VAL_ONE_IN = 2000                   # 0.05%, as nanoGPT


def main(argv=None):
    """Run the command -> exit code. 1: the source cannot be reached or the disk is full."""
    parser = argparse.ArgumentParser(prog='python data/openwebtext/prepare.py', allow_abbrev=False)
    where = parser.add_mutually_exclusive_group()
    where.add_argument('--source', choices=SOURCES, default='openwebtext',
                       help='default: openwebtext')
    where.add_argument('--files', metavar='GLOB', type=os.path.expanduser,
                       help='local .parquet (column "text") or .txt (one document each)')
    parser.add_argument('--max_tokens', metavar='N', type=int, help='stop after N training tokens')
    parser.add_argument('--out_dir', metavar='DIR', type=cli.path, default=FOLDER,
                        help='default: this folder')
    return cli.parse(parser, argv, prepare, 'goes on')


def prepare(args):
    """Documents -> shards -> train.bin, val.bin, meta.json. Raises UserError, OSError."""
    if args.max_tokens is not None and args.max_tokens < 1:
        raise UserError(f'--max_tokens={args.max_tokens}: must be 1 or more')
    source = find_source(args)
    try:
        import datasets
    except ImportError as e:
        raise UserError(f'{e.name or e} is missing: pip install datasets') from None
    encoding = download.gpt2_encoding()
    # What the result depends on. Only the same version of datasets understands a position, too.
    settings = dict(source, max_tokens=args.max_tokens, datasets=datasets.__version__)
    settings_sha256 = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    shards, meta_file = args.out_dir / 'shards', args.out_dir / 'meta.json'
    check_writable(shards / 'progress.json', f'--out_dir={args.out_dir}')
    with preparing(shards):
        progress = read_json(shards / 'progress.json') or dict(
            settings=settings, position=None, documents=0, shards=0, train_tokens=0, val_tokens=0)
        begun = progress['settings']
        if begun != settings:
            raise UserError(f'{shards}: another preparation was begun here ({begun["source"]}, '
                            f'max_tokens {begun["max_tokens"]}, datasets {begun["datasets"]}); '
                            'finish it, or delete this folder to give it up')
        if is_prepared(args.out_dir) and (
                read_json(meta_file).get('settings_sha256') == settings_sha256):
            shutil.rmtree(shards, ignore_errors=True)       # a kill may have come before this
            print(f'{args.out_dir}: already prepared; delete {meta_file} to do it again')
            return
        progress = write_shards(datasets.load_dataset, progress, shards, encoding)
        if not progress['train_tokens']:
            shutil.rmtree(shards)
            raise UserError(f'{source["source"]}: a training and a validation split need two '
                            f'documents (a .txt file is one), found {progress["documents"]}')
        meta = dict(GPT2_META, source=source['source'], documents=progress['documents'],
                    train_tokens=progress['train_tokens'], val_tokens=progress['val_tokens'],
                    settings_sha256=settings_sha256)
        remove_leftovers(args.out_dir)
        (args.out_dir / 'train.bin').unlink(missing_ok=True)        # the last one, as in data.py
        concatenate(sorted(shards.glob('val-*.bin')), args.out_dir / 'val.bin')
        write_atomically(meta_file, json.dumps(meta, indent=1).encode())
        concatenate(sorted(shards.glob('train-*.bin')), args.out_dir / 'train.bin')
        shutil.rmtree(shards)
    print(f'{source["source"]}: {meta["documents"]:,} documents, {meta["train_tokens"]:,} tokens '
          f'for training, {meta["val_tokens"]:,} for validation -> {args.out_dir}')


def read_json(path):
    """The dict in a JSON file, {} if there is no file."""
    return json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}


def find_source(args):
    """The source that the options name, a dict.

    source: words for meta.json; load: arguments for load_dataset; files: [[path, bytes], ...] of
    local files. Raises UserError.
    """
    if args.files is None:
        load = SOURCES[args.source]
        return dict(source=f'{load["path"]} at {load["revision"][:8]}', load=load)
    found = [args.files] if os.path.isfile(args.files) else glob.glob(args.files, recursive=True)
    files = sorted(filter(os.path.isfile, found))
    kinds = {Path(f).suffix for f in files}
    if kinds not in ({'.parquet'}, {'.txt'}):
        raise UserError(f'--files={args.files}: must be all .parquet or all .txt, found '
                        f'{", ".join(sorted(kinds)) or "no such files"}')
    load = dict(path='parquet') if kinds == {'.parquet'} else dict(
        path='text', sample_by='document', encoding='utf-8-sig')
    return dict(source=f'--files {args.files}', load=load,
                files=[[f, os.path.getsize(f)] for f in files])


def read_shards(load_dataset, settings, position):
    """Yield lists of texts, SHARD_CHARACTERS or a little more each, and the position after them.

    The last list may be short, or empty. position: where to begin, None at the first document.
    Raises UserError for unreadable local files, Failure for a source on the network.
    """
    documents, files = None, [file for file, _ in settings.get('files', [])]
    try:
        documents = load_dataset(**settings['load'], split='train', streaming=True, data_files=[
            glob.escape(file) for file in files] or None).select_columns(['text'])
        if position:
            documents.load_state_dict(position)
        texts, size = [], 0
        for document in documents:
            texts.append(document['text'] or '')
            size += len(texts[-1]) + 1
            if size >= SHARD_CHARACTERS:
                yield texts, documents.state_dict()
                texts, size = [], 0
        yield texts, documents.state_dict()
    except Exception as e:                  # datasets raises its own, pyarrow's, the hub's, others
        place = settings['source']
        if files and documents is not None:
            state = documents.state_dict()
            while 'shard_idx' not in state:
                state = state['examples_iterable']
            place = files[state['shard_idx']]
        hint = '' if files else "; the same command goes on, or give local files: --files 'GLOB'"
        raise (UserError if files else Failure)(
            f'{place}: cannot be read: {type(e).__name__}: {one_line(e)}{hint}') from None


def write_shards(load_dataset, progress, shards, encoding):
    """Write train-00000.bin, val-00000.bin, ... and progress.json into the folder `shards`.

    progress: what progress.json says, or would say before the first shard. Returns the last one.
    """
    settings = progress['settings']
    shards.mkdir(parents=True, exist_ok=True)
    with tracking.bar(total=settings['max_tokens'], initial=progress['train_tokens'],
                      unit=' tokens', unit_scale=True) as bar:
        for texts, position in read_shards(load_dataset, settings, progress['position']):
            if any(END in text for text in texts):
                bar.write(WITH_END.format(f'{settings["source"]}, shard {progress["shards"]}'))
            left = (settings['max_tokens'] or sys.maxsize) - progress['train_tokens']
            number, train, val = progress['documents'], [], []
            for ids in encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count()):
                if len(train) == left:
                    break
                ids.append(encoding.eot_token)
                if is_validation(number):
                    val += ids
                else:
                    train += ids[:left - len(train)]
                number += 1
            for split, ids in (('train', train), ('val', val)):
                write_atomically(shards / f'{split}-{progress["shards"]:05}.bin',
                                 np.array(ids, np.uint16).tobytes())
            progress = dict(
                settings=settings, position=position, documents=number,
                shards=progress['shards'] + 1, train_tokens=progress['train_tokens'] + len(train),
                val_tokens=progress['val_tokens'] + len(val))
            write_atomically(shards / 'progress.json', json.dumps(progress).encode())
            bar.update(len(train))
            if len(train) == left:
                break
    return progress


def is_validation(number):
    """Whether a document belongs to the validation split. Its number alone says so; 0 always does,
    so that there is one."""
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

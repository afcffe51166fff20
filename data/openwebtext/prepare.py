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
from runtime.data import (END, GPT2_META, WITH_END, is_prepared, preparing, read_meta,
                          write_files)
from runtime.files import check_writable, write_atomically

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
    import datasets
    # What the result depends on. Only the same version of datasets understands a position, too.
    settings = dict(find_source(args), max_tokens=args.max_tokens, datasets=datasets.__version__)
    settings_sha256 = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    shards = args.out_dir / 'shards'
    file = shards / 'progress.json'
    check_writable(file, f'--out_dir={args.out_dir}')
    with preparing(shards):
        progress = json.loads(file.read_text()) if file.exists() else dict(
            settings=settings, position=None, documents=0, shards=0, train_tokens=0, val_tokens=0)
        if progress['settings'] != settings:
            raise UserError(f'{file}: begun with other options, or another version of datasets; '
                            f'finish that, or delete {shards}')
        if is_prepared(args.out_dir) and (
                read_meta(args.out_dir).get('settings_sha256') == settings_sha256):
            print(f'{args.out_dir}: already prepared; delete its meta.json to do it again')
        else:
            progress = write_shards(datasets.load_dataset, progress, shards,
                                    download.gpt2_encoding())
            meta = dict(GPT2_META, source=settings['source'], documents=progress['documents'],
                        train_tokens=progress['train_tokens'], val_tokens=progress['val_tokens'],
                        settings_sha256=settings_sha256)
            write_files(args.out_dir, meta, **{
                split: (part.read_bytes() for part in sorted(shards.glob(f'{split}-*.bin')))
                for split in ('train', 'val')})
            print(f'{meta["source"]}: {meta["documents"]:,} documents, {meta["train_tokens"]:,} '
                  f'tokens for training, {meta["val_tokens"]:,} for validation -> {args.out_dir}')
        shutil.rmtree(shards, ignore_errors=True)           # a kill may have come before this


def find_source(args):
    """The source that the options name, a dict.

    source: words for meta.json; load: arguments for load_dataset; files: [[path, bytes], ...] of
    local files. Raises UserError.
    """
    if args.files is None:
        load = SOURCES[args.source]
        return dict(source=f'{load["path"]} at {load["revision"][:8]}', load=load)
    files = [args.files] if os.path.isfile(args.files) else sorted(
        filter(os.path.isfile, glob.glob(args.files, recursive=True)))
    kinds = {Path(f).suffix for f in files}
    if kinds != {'.parquet'} and (kinds != {'.txt'} or len(files) == 1):    # one has no split
        raise UserError(f'--files={args.files}: must be all .parquet, or two or more .txt (one '
                        f'document each), found {len(files)} files {" ".join(sorted(kinds))}')
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
        raise (UserError if files else Failure)(
            f'{place}: cannot be read: {type(e).__name__}: {one_line(e)}' + ('' if files else (
                "; the same command goes on, or give local files: --files 'GLOB'"))) from None


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
            number, tokens = progress['documents'], {'train': [], 'val': []}
            for ids in encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count()):
                if len(tokens['train']) >= left:
                    break
                # The number alone says which split; 0 is in val, so that there is one.
                digest = hashlib.sha256(str(number).encode()).hexdigest()
                in_val = number == 0 or int(digest[:16], 16) % VAL_ONE_IN == 0
                tokens['val' if in_val else 'train'] += [*ids, encoding.eot_token]
                number += 1
            del tokens['train'][left:]              # --max_tokens may end within a document
            for split, ids in tokens.items():
                write_atomically(shards / f'{split}-{progress["shards"]:05}.bin',
                                 np.array(ids, np.uint16).tobytes())
            progress = dict(settings=settings, position=position, documents=number,
                            shards=progress['shards'] + 1,
                            train_tokens=progress['train_tokens'] + len(tokens['train']),
                            val_tokens=progress['val_tokens'] + len(tokens['val']))
            write_atomically(shards / 'progress.json', json.dumps(progress).encode())
            bar.update(len(tokens['train']))
            if len(tokens['train']) == left:
                break
    return progress


if __name__ == '__main__':
    sys.exit(main())

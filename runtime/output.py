"""stdout and stderr of a program that may outlive whoever reads them."""

import os
import sys
from contextlib import contextmanager


class _Stream:
    """A text stream that falls silent where it would fail: its reader (tee, head, a terminal) is gone, or the disk it
    is written to is full. Characters that its encoding lacks become question marks."""

    def __init__(self, stream):
        self._stream = stream
        self.silent = False

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        try:
            try:
                return self._stream.write(text)
            except UnicodeEncodeError:
                return self._stream.write(text.encode(self.encoding, 'replace').decode(self.encoding))
        except BlockingIOError:                                         # a slow reader: this text is lost, no more
            return len(text)
        except OSError:
            self._fall_silent()
            return len(text)

    def flush(self):
        try:
            self._stream.flush()
        except OSError:
            self._fall_silent()

    def _fall_silent(self):
        """What is still in the buffer goes to the null device, too, or Python complains when it ends."""
        self.silent = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


@contextmanager
def unfailing_output():
    """Within the block, print never raises: a run does not end because nobody listens. A stream that failed stays
    silent after the block, too."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Stream(s) if s else open(os.devnull, 'w') for s in before)   # None: closed by the caller
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before

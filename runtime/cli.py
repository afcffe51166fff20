"""Common entry point of all commands: --help, one-line errors, exit codes and signals.

Exit codes: 0 success, 2 wrong input, 1 any other expected error (full disk, no network, out of
memory), 128 + n stopped by signal n.
"""

import os
import signal
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from runtime import config
from runtime.config import UserError
from runtime.files import format_error


# --------------------------------------------------------------------------------------------------
# entry

def run(script, cls, usage, action, argv=None, load=None, again=''):
    """Run a command and return its exit code.

    `script` is the command's name in error messages and `cls` the dataclass of its options. --help
    prints `usage` and the options. action(options) does the work and returns an exit code or None.
    load(argv) returns the options. Without it, they are an instance of `cls`. `again` tells the
    user what to do after a signal.
    """
    argv = sys.argv[1:] if argv is None else argv

    def work():
        if '--help' in argv or '-h' in argv:
            print(config.help_text(cls, usage.strip()))
            return 0
        return action(load(argv) if load else config.load(cls, argv)[0])
    return guard(script, work, again)


def parse(parser, argv, action, again=''):
    """Run a command whose options an argparse.ArgumentParser defines, and return its exit code.
    action(namespace) does the work. `again` is as in `run`."""
    def refuse(message):  # argparse would print its usage and exit
        raise UserError(f'{message}; --help lists the options')
    parser.error = refuse
    return guard(parser.prog, lambda: action(parser.parse_args(argv)), again)


def path(text):
    """Return a Path with ~ expanded; the `type` of paths in an ArgumentParser."""
    return Path(os.path.expanduser(text))


def guard(script, work, again=''):
    """Call work() and return the exit code. Expected errors become one line on stderr."""
    with unfailing_output():
        try:
            with signals:
                return work() or 0
        except UserError as e:
            code, words = e.code, str(e)
        except (OSError, RuntimeError) as e:
            foreseen = isinstance(e, (OSError, torch.linalg.LinAlgError, torch.OutOfMemoryError))
            if not foreseen and 'DefaultCPUAllocator' not in str(e):    # out of memory
                raise
            code, words = 1, format_error(e)
        except ModuleNotFoundError as e:
            code, words = 1, f'{e.name} is not installed; run: pip install {e.name}'
        except KeyboardInterrupt as e:
            number = getattr(e, 'signal', signal.SIGINT)
            code, words = 128 + number, '; '.join(filter(None, (
                f'stopped by {signal.Signals(number).name}', again)))
        rank = f'process {os.environ["RANK"]}: ' if 'RANK' in os.environ else ''
        print(f'{script}: {rank}{words}', file=sys.stderr)
        return code


# --------------------------------------------------------------------------------------------------
# signals

class Interrupted(KeyboardInterrupt):
    """A signal stopped the command. `signal` is its number; the exit code is 128 + signal."""

    def __init__(self, number):
        self.signal = number


class Signals:
    """Context manager that catches SIGINT, SIGTERM and, unless nohup ignores it, SIGHUP.

    `received` is the number of the first signal, or 0. The first signal raises Interrupted. Within
    `deferred()` the signal is only recorded. A second Ctrl-C always raises, except under torchrun,
    where a process gets each Ctrl-C twice: from the terminal and from torchrun.
    """

    def __init__(self):
        self.received, self._deferred, self._handlers = 0, False, []  # _handlers is a stack

    def __enter__(self):
        self.received, self._deferred, numbers = 0, False, []
        # Python lets only the main thread set handlers
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                numbers.append(signal.SIGHUP)
        self._handlers.append({n: signal.signal(n, self._receive) for n in numbers})
        return self

    def __exit__(self, *_):
        for number, handler in self._handlers.pop().items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: not set from Python

    def _receive(self, number, frame):
        first, by_hand = not self.received, number == signal.SIGINT and 'RANK' not in os.environ
        self.received = self.received or number
        if by_hand and not first or first and not self._deferred:
            raise Interrupted(self.received)
        if by_hand:
            with suppress(OSError):  # the signal may have interrupted print()
                os.write(2, b'\nsaving after this step; Ctrl-C once more stops without saving\n')

    @contextmanager
    def deferred(self):
        """Context manager in which signals do not raise. The code in the block reads `received` at
        points where it can stop without loss. If a signal came, Interrupted is raised at the end of
        the block."""
        self._deferred = True
        yield
        self._deferred = False  # not after an error, which is raised instead
        self.raise_if_received()

    def raise_if_received(self):
        if self.received:
            raise Interrupted(self.received)


signals = Signals()  # a process has one set of handlers


# --------------------------------------------------------------------------------------------------
# output

class _Stream:
    """Text stream that discards all text once its reader (tee, head, a terminal) has exited or the
    disk is full. Characters that the encoding of the stream lacks become question marks."""

    def __init__(self, stream):
        self._stream, self.silent = stream, False

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            return self.write(text.encode(self.encoding, 'replace').decode(self.encoding))
        except OSError:
            self._silence()
        return len(text)

    def flush(self):
        try:
            self._stream.flush()
        except OSError:
            self._silence()

    def _silence(self):
        """Redirect the stream to the null device. Otherwise Python would print an error at exit
        about text that could not be written."""
        self.silent = True
        with open(os.devnull, 'w') as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())


@contextmanager
def unfailing_output():
    """Context manager in which print never raises, so that a closed output does not stop a run."""
    before = sys.stdout, sys.stderr
    # a stream is None if the parent process closed it
    sys.stdout, sys.stderr = (_Stream(s) if s else open(os.devnull, 'w') for s in before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before

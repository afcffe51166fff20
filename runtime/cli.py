"""The entry that all commands share: help, one line for each error, exit codes, signals.

Exit codes: 0 done, 2 wrong input, 1 any other error that can be foreseen (a full disk, no network,
no memory), 128 + n stopped by signal n.
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
    """Run a command -> exit code.

    cls: the dataclass of its options; usage: text above their list in --help; action: called with
    the options, returns an exit code or None; load(argv) makes the options, by default an instance
    of cls; again: what to do after a signal, for the user.
    """
    argv = sys.argv[1:] if argv is None else argv

    def work():
        if '--help' in argv or '-h' in argv:
            print(config.help_text(cls, usage.strip()))
            return 0
        return action(load(argv) if load else config.load(cls, argv)[0])
    return guard(script, work, again)


def parse(parser, argv, action, again=''):
    """Run a command whose options are those of an argparse.ArgumentParser -> exit code. action is
    called with its namespace."""
    def refuse(message):  # in place of usage text and exit
        raise UserError(f'{message}; --help lists the options')
    parser.error = refuse
    return guard(parser.prog, lambda: action(parser.parse_args(argv)), again)


def path(text):
    """The type of a path for an ArgumentParser."""
    return Path(os.path.expanduser(text))


def guard(script, work, again=''):
    """Call work() and turn its errors into one line on stderr -> exit code."""
    with unfailing_output():
        try:
            with signals:
                return work() or 0
        except UserError as e:
            code, words = e.code, str(e)
        except (OSError, RuntimeError) as e:
            foreseen = isinstance(e, (OSError, torch.linalg.LinAlgError, torch.OutOfMemoryError))
            if not foreseen and 'DefaultCPUAllocator' not in str(e):    # no memory
                raise
            code, words = 1, format_error(e)
        except ModuleNotFoundError as e:
            code, words = 1, f'{e.name} is not installed: pip install {e.name}'
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
    """A signal ended the work. `signal`: its number; a shell expects the exit code 128 + signal."""

    def __init__(self, number):
        self.signal = number


class Signals:
    """Context manager that catches SIGINT, SIGTERM and SIGHUP (a terminal that closes, unless nohup
    ignores it). `received`: the number of the first one, 0 before.

    The first signal raises Interrupted; within `deferred()` it is only recorded. Another Ctrl-C
    always raises, except under torchrun, where each Ctrl-C reaches a process twice: from the
    terminal and from torchrun.
    """

    def __init__(self):
        self.received, self._deferred, self._handlers = 0, False, []    # of each entry, nested

    def __enter__(self):
        self.received, self._deferred, numbers = 0, False, []
        # Python allows handlers nowhere else
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                numbers.append(signal.SIGHUP)
        self._handlers.append({n: signal.signal(n, self._receive) for n in numbers})
        return self

    def __exit__(self, *_):
        for number, handler in self._handlers.pop().items():
            signal.signal(number, handler or signal.SIG_DFL)            # None: not set from Python

    def _receive(self, number, frame):
        first, by_hand = not self.received, number == signal.SIGINT and 'RANK' not in os.environ
        self.received = self.received or number
        if by_hand and not first or first and not self._deferred:
            raise Interrupted(self.received)
        if by_hand:
            with suppress(OSError):  # not print(), which it may have interrupted
                os.write(2, b'\nsaving after this step; Ctrl-C once more stops without saving\n')

    @contextmanager
    def deferred(self):
        """A block that looks at `received` itself, where it can stop without loss. Raises
        Interrupted at its end if it did not."""
        self._deferred = True
        yield
        self._deferred = False  # not after an error, which has the last word
        self.raise_if_received()

    def raise_if_received(self):
        if self.received:
            raise Interrupted(self.received)


signals = Signals()  # a process has one set of handlers


# --------------------------------------------------------------------------------------------------
# output

class _Stream:
    """A text stream that becomes silent instead of failing: its reader (tee, head, a terminal) is
    gone, or the disk it is written to is full. Characters that its encoding lacks become question
    marks."""

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
        """Send everything to the null device from now on, or Python complains about the buffer when
        it ends."""
        self.silent = True
        with open(os.devnull, 'w') as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())


@contextmanager
def unfailing_output():
    """A closed output stream does not stop a run: within the block print never raises."""
    before = sys.stdout, sys.stderr
    # None: closed by the caller
    sys.stdout, sys.stderr = (_Stream(s) if s else open(os.devnull, 'w') for s in before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before

"""Ctrl-C, SIGTERM, SIGHUP: at once where nothing can be lost, else as a request that is answered after a step."""

import os
import signal
import threading
from contextlib import contextmanager, suppress


class Interrupted(KeyboardInterrupt):
    """A signal ended what was going on. `signal`: its number; a shell expects the exit code 128 + signal."""

    def __init__(self, number):
        super().__init__()
        self.signal = number


class Stop:
    """Context manager that catches SIGINT, SIGTERM and SIGHUP (a terminal that closes, unless nohup has it ignored).
    `signal`: the number of the first that came, 0 before.

    The first signal raises Interrupted; within `noted()` it is only noted. Ctrl-C after that always raises, unless
    under_torchrun: there it reaches every process twice, from the terminal and from torchrun.
    """

    def __init__(self, under_torchrun):
        self.signal, self._under_torchrun, self._only_note = 0, under_torchrun, False
        self._handlers = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():       # Python allows handlers nowhere else
            numbers = [signal.SIGINT, signal.SIGTERM]
            if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                numbers.append(signal.SIGHUP)
            self._handlers = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self._handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)            # None: it was not set from Python

    def _note(self, number, frame):
        first, by_hand = not self.signal, number == signal.SIGINT and not self._under_torchrun
        self.signal = self.signal or number
        if by_hand and not first or first and not self._only_note:
            raise Interrupted(self.signal)
        if by_hand:
            with suppress(OSError):                                     # not print(), which it may have interrupted
                os.write(2, b'\nsaving after this step; Ctrl-C once more stops without saving\n')

    @contextmanager
    def noted(self):
        """A block that looks at `signal` itself, where stopping does no harm. What it did not answer ends it."""
        self._only_note = True
        yield
        self._only_note = False                                         # not after an error, which has the last word
        self.raise_if_noted()

    def raise_if_noted(self):
        if self.signal:
            raise Interrupted(self.signal)

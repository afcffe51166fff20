"""Ctrl-C and SIGTERM: at once where nothing can be lost, else as a request that is answered after a step."""

import os
import signal
import threading
from contextlib import contextmanager


class Interrupted(KeyboardInterrupt):
    """A signal ended what was going on. `signal`: its number; a shell expects the exit code 128 + signal."""

    def __init__(self, number):
        super().__init__()
        self.signal = number


class Stop:
    """Context manager that catches SIGINT and SIGTERM. `signal`: the number of the first that came, 0 before.

    A signal raises Interrupted. Within `noted()` it is only noted, and a second one raises, unless `patient`: under
    torchrun Ctrl-C reaches every process twice, from the terminal and from torchrun, which kills after 30 seconds
    whatever has not ended.
    """

    def __init__(self, patient):
        self.signal, self.patient, self._deferred = 0, patient, False
        self._handlers = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():       # Python allows handlers nowhere else
            self._handlers = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self._handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)            # None: it was not set from Python

    def _note(self, number, frame):
        again, self.signal = bool(self.signal), self.signal or number
        if not self._deferred or again and not self.patient:
            raise Interrupted(self.signal)
        if not self.patient:                                            # print() may be what the signal interrupted
            os.write(2, b'\nsaving after this step; Ctrl-C once more stops without saving\n')

    @contextmanager
    def noted(self):
        """A block that looks at `signal` itself, where stopping does no harm. What it did not answer ends it."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.signal:
            raise Interrupted(self.signal)

    @contextmanager
    def at_once(self):
        """Within `noted`, a block that a signal ends right away, to go on behind it: for work that can be repeated."""
        try:
            self._deferred = False
            yield
        except Interrupted:
            pass
        finally:
            self._deferred = True

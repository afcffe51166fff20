"""Ctrl-C and SIGTERM: at once where nothing can be lost, else as a request that the training loop answers after a step."""

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

    A signal raises Interrupted, except after `deferred = True`: then it is only noted, and a second one raises.
    `patient`: only ever note it then. Under torchrun, Ctrl-C reaches every process twice: from the terminal and from
    torchrun, which kills what has not ended after 30 seconds anyway.
    """

    def __init__(self, patient):
        self.signal, self.deferred, self.patient = 0, False, patient
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
        if not self.deferred or again and not self.patient:
            raise Interrupted(self.signal)
        if not self.patient:                                            # print() may be what the signal interrupted
            os.write(2, b'\nsaving after this step; Ctrl-C once more stops without saving\n')

    @contextmanager
    def at_once(self):
        """A block that a signal ends right away, and the program goes on behind it: for work that can be repeated."""
        try:
            self.deferred = False
            yield
        except Interrupted:
            pass
        finally:
            self.deferred = True

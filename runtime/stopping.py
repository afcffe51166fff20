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

    A signal raises Interrupted. Within `noted()` it is only noted, and Ctrl-C after that raises, unless `patient`:
    under torchrun it reaches every process twice, from the terminal and from torchrun, which kills after 30 seconds
    whatever has not ended.
    """

    def __init__(self, patient):
        self.signal, self.patient, self._deferred = 0, patient, False
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
        again, self.signal = bool(self.signal), self.signal or number
        by_hand = number == signal.SIGINT and not self.patient
        if not self._deferred or again and by_hand:
            raise Interrupted(self.signal)
        if by_hand:
            with suppress(OSError):                                     # not print(), which it may have interrupted
                os.write(2, b'\nsaving after this step; Ctrl-C once more stops without saving\n')

    @contextmanager
    def noted(self):
        """A block that looks at `signal` itself, where stopping does no harm. What it did not answer ends it."""
        self._deferred = True
        yield
        self._deferred = False                                          # not after an error, which has the last word
        self.answer()

    def answer(self):
        """Raise Interrupted if a signal was noted."""
        if self.signal:
            raise Interrupted(self.signal)

    @contextmanager
    def at_once(self):
        """Within `noted`, a block that a signal ends right away, to go on behind it: for work that can be repeated. It
        begins with `answer()`, for a signal that came before."""
        try:
            self._deferred = False
            yield
        except Interrupted:
            pass
        finally:
            self._deferred = True

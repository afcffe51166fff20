"""
python runtime/child.py SCRIPT ARGUMENTS: the script, which stops as after SIGTERM when stdin ends: at the latest when
the process that started it, and holds the other end of that pipe, is gone, in whatever way. So no run outlives its
sweep unseen. On its own, before anything is imported that takes time.
"""

import os
import runpy
import signal
import sys
import threading


def stop_when_stdin_ends():
    while os.read(0, 1):                                            # not sys.stdin, whose lock Python wants at the end
        pass
    if hasattr(signal, 'pthread_kill'):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)      # also out of a sleep
    else:                                                           # Windows
        signal.raise_signal(signal.SIGTERM)


if __name__ == '__main__':
    threading.Thread(target=stop_when_stdin_ends, daemon=True).start()
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))     # as if it had been started itself
    runpy.run_path(sys.argv[0], run_name='__main__')

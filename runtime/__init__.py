"""Infrastructure of a training repository; nothing in it depends on low-rank methods. Commands
import it before torch and numpy, so that a missing package is reported in one line."""

import importlib.util
import os
import sys
from importlib import metadata


def _check_machine():
    lacking = [name for name in ('torch', 'numpy', 'tqdm')
               if importlib.util.find_spec(name) is None]
    if sys.version_info < (3, 11):
        trouble = f'Python {sys.version.split()[0]} is too old; install 3.11 or later'
    elif lacking:
        trouble = f'not installed: {", ".join(lacking)}; run: pip install -r requirements.txt'
    # nothing older was tested
    elif tuple(map(int, metadata.version('torch').split('.')[:2])) < (2, 9):
        trouble = (f'torch {metadata.version("torch")} is too old; '
                   'run: pip install -r requirements.txt')
    else:
        return
    raise SystemExit(f'{os.path.basename(sys.argv[0])}: {trouble}')


_check_machine()

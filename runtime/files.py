"""Files that are written whole or not at all."""

import os
import re
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path):
    """A binary file to write that takes `path`'s place when the block ends: temporary file in the same folder, flush to
    disk, rename. A crash or an error leaves what was there before. Raises OSError."""
    path = Path(path)
    temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')    # another process may write the same file
    try:
        with open(temporary, 'wb') as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == 'posix':                                          # the rename itself must reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_atomically(path, content):
    """bytes -> file, by `replacing`."""
    with replacing(path) as f:
        f.write(content)


def remove_leftovers(folder):
    """Delete the temporary files of processes that were killed while `replacing`; not those of living ones."""
    for path in Path(folder).glob('*.tmp'):
        number = re.fullmatch(r'.+\.(\d+)\.tmp', path.name)
        if number and not _is_alive(int(number[1])):
            path.unlink(missing_ok=True)


def _is_alive(process):
    if os.name != 'posix':
        return True                                                 # asking would end it there
    try:
        os.kill(process, 0)
        return True
    except PermissionError:
        return True                                                 # somebody else's
    except (ProcessLookupError, OverflowError):
        return False

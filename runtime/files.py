"""Files and folders that are written whole or not at all."""

import errno
import os
import re
import shlex
import shutil
import tempfile
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path

from runtime.config import UserError, one_line

FULL = (errno.ENOSPC, getattr(errno, 'EDQUOT', errno.ENOSPC))
ROOM = '; make room there, then the same command again'


class DiskFull(UserError):
    """No fault of the user's input: exit code 1."""
    code = 1


def unwritable(where, error):
    """The exception, DiskFull or UserError, to raise for an OSError; where: option or file, as text."""
    words = f'{where}: {error.strerror or one_line(error)}'
    return DiskFull(words + ROOM) if error.errno in FULL else UserError(words)


def in_words(error):
    """An exception on one line; of a full disk also what to do."""
    return one_line(error) + (ROOM if isinstance(error, OSError) and error.errno in FULL else '')


def unused(path):
    """The first of PATH, PATH-2, PATH-3, ... that is not there, in quotes for a shell."""
    free = next(p for p in chain([str(path)], (f'{path}-{n}' for n in count(2))) if not os.path.lexists(p))
    return "'" + free.replace("'", "'\\''") + "'"


def is_shared(path):
    """Whether a real path is the working directory, the home folder, or one that holds either: no folder for one run,
    which could be moved aside."""
    return any(path in (own, *own.parents) for own in (Path.cwd(), Path.home()))


@contextmanager
def naming(path):
    """A block whose OSErrors name the file, as those of open() do and those of write() do not."""
    try:
        yield
    except OSError as e:
        e.filename = str(path)
        raise


@contextmanager
def replacing(path):
    """A binary file to write that takes `path`'s place when the block ends: temporary file in the same folder, flush to
    disk, rename. A crash or an error leaves what was there before. Raises OSError."""
    path = Path(path)
    temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')    # another process may write the same file
    try:
        with naming(path), open(temporary, 'wb') as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _flush_folder(path.parent)


def _flush_folder(path):
    """A rename in it must reach the disk too."""
    if os.name == 'posix':
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_atomically(path, content):
    """bytes -> file, by `replacing`."""
    with replacing(path) as f:
        f.write(content)


@contextmanager
def new_folder(path):
    """A folder to fill by `replacing`, which becomes `path` when the block ends: hidden folder beside it, rename. A
    crash leaves no `path`, an error nothing at all. What a crash leaves stays: beside `path` are the user's own files.
    Raises OSError, also where `path` is more than an empty folder."""
    path = Path(os.path.realpath(path))
    made = [folder for folder in path.parents if not folder.exists()]
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        try:
            yield temporary
            if path.exists():
                path.rmdir()                                        # Windows renames over no folder
            os.rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except BaseException:
        with suppress(OSError):                                     # somebody else's file is in it
            for folder in made:
                folder.rmdir()
        raise
    _flush_folder(path.parent)


def begin_from(run, dataset):
    """The options with which train.py begins another run from the weights of `run`, as a shell takes them."""
    settings = f'{run}/config.py' if os.path.isfile(f'{run}/config.py') else f'--dataset={dataset}'
    return shlex.join([settings, f'--init_from={run}', '--lora_adapter=None']) + f' --out_dir={unused(run)}'


def check_writable(path, where):
    """Before work whose result goes there: raise UserError or DiskFull, which begin with `where`, unless a file can be
    written at `path`, its folders made. It is tried, and leaves nothing: access rights say nothing of a full disk."""
    path = Path(os.path.realpath(path))
    try:
        there = next(folder for folder in path.parents if folder.exists())
        with tempfile.TemporaryDirectory(prefix='.trial-', dir=there) as trial:
            new = Path(trial) / path.relative_to(there)
            new.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(new, b'trial')
    except OSError as e:
        raise unwritable(f'{where}: cannot be written', e) from None


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

"""Atomic writes of files and folders, locks, and checks of output folders."""

import errno
import os
import re
import shutil
import tempfile
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path

from filelock import FileLock, Timeout

from runtime.config import Failure, UserError, one_line

FULL = (errno.ENOSPC, getattr(errno, 'EDQUOT', errno.ENOSPC))
ROOM = '; free space on that disk, then run the same command again'


def unwritable(where, error):
    """Return the exception to raise for an OSError: Failure if the disk is full, else UserError.
    The message starts with `where`, an option or a file."""
    words = f'{where}: {error.strerror or one_line(error)}'
    return Failure(words + ROOM) if error.errno in FULL else UserError(words)


def format_error(error):
    """Return an exception as one line, which also says what to do if the disk is full."""
    return one_line(error) + (ROOM if isinstance(error, OSError) and error.errno in FULL else '')


def unused(path):
    """Return the first of PATH, PATH-2, PATH-3, ... that does not exist, quoted for a shell."""
    free = next(p for p in chain([str(path)], (f'{path}-{n}' for n in count(2)))
                if not os.path.lexists(p))
    return "'" + free.replace("'", "'\\''") + "'"


def is_shared(path):
    """Return whether a resolved path is the working directory, the home folder or a parent of one.
    A run cannot use such a folder, because a run folder may be moved aside."""
    return any(path in (own, *own.parents) for own in (Path.cwd(), Path.home()))


@contextmanager
def with_path(path):
    """Context manager that adds the path to an OSError, because errors of write() do not name the
    path."""
    try:
        yield
    except OSError as e:
        e.filename = str(path)
        raise


@contextmanager
def atomic_open(path):
    """Context manager that opens a binary file and lets it replace `path` when the block ends. It
    writes a temporary file in the same folder, flushes it to disk and renames it. A crash or an
    error leaves the old file intact. Raises OSError."""
    path = Path(path)
    # with the process id, because another process may write the same file
    temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
    try:
        with with_path(path), open(temporary, 'wb') as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _flush_folder(path.parent)


def _flush_folder(path):
    """Flush a folder to disk, so that a rename in the folder is not lost. Does nothing on systems
    that are not POSIX."""
    if os.name == 'posix':
        folder = os.open(path, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def write_atomically(path, content):
    """Write the bytes `content` to a file with `atomic_open`. Raises OSError."""
    with atomic_open(path) as f:
        f.write(content)


@contextmanager
def new_folder(path):
    """Context manager that creates a folder and renames it to `path` when the block ends.

    The block fills a hidden folder beside `path` with `atomic_open`. After an error or a crash,
    `path` does not exist. Raises OSError, also if `path` exists and is not an empty folder.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            path.rmdir()  # Windows cannot rename onto an existing folder
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _flush_folder(path.parent)


def check_writable(path, where):
    """Check before long work that a file can be written at `path`. Its folders may be missing. A
    test file is written and removed, because access rights do not tell whether the disk is full.
    Raises UserError or Failure with a message that starts with `where`."""
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
    """Delete the temporary files that `atomic_open` of other processes left in a folder. Folders
    stay. The caller has locked the folder."""
    for path in Path(folder).glob('*.tmp'):
        process = re.fullmatch(r'.+\.(\d+)\.tmp', path.name)
        if process and int(process[1]) != os.getpid() and not path.is_dir():
            path.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# run folders

@contextmanager
def locked(file, busy):
    """Context manager that holds the lock `file`, a path whose folder is created if needed.

    The operating system releases the lock when the process ends. If another process holds the lock,
    busy() is called. If busy() raises, the error is passed on. If it returns, the context manager
    waits for the lock. The block runs without a lock if the file cannot be written or locked, as on
    some network disks.
    """
    lock = FileLock(file)
    with suppress(OSError, NotImplementedError):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            busy()
            lock.acquire()
    try:
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):  # Windows cannot delete an open file
                Path(file).unlink()
        lock.release()


def locked_folder(folder, option='out_dir', wait=False):
    """Context manager that locks a run folder or sweep folder and creates it if needed. If another
    process has the lock, waits if `wait` is True, else raises a UserError that names `option`."""
    def busy():
        if wait:
            print(f'{folder}: waiting until the other run in this folder has saved', flush=True)
            return
        raise UserError(
            f"{option}='{folder}': another run uses this folder; wait until it has ended, or use "
            f'another folder (nearest: {unused(folder)})')
    return locked(lock_file(make_folder(folder, option)), busy)


def lock_file(folder):
    """Return the lock file of a folder, .NAME.lock. It is beside the folder, because the folder may
    be moved."""
    real = Path(os.path.realpath(folder))
    return real.with_name(f'.{real.name}.lock')


def make_folder(path, option='out_dir'):
    """Create a folder, or the target of a link, if needed, and return the folder as a Path. Raises
    UserError that names the option."""
    try:
        Path(os.path.realpath(path)).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f'{option}={str(path)!r}: cannot be created: {e.strerror}') from None
    return Path(path)


def archive_run(out, say):
    """Move the run in the folder `out`, if there is one, to OUT_DIR.1, .2, ... and leave an empty
    folder in its place. If `out` is a symbolic link, its target is moved. say(text) reports the
    move. Raises OSError."""
    if not any((out / name).exists() for name in ('ckpt.pt', 'last.pt', 'metrics.jsonl')):
        return
    real = Path(os.path.realpath(out))
    archive = next(p for p in (Path(f'{real}.{n}') for n in count(1)) if not p.exists())
    real.rename(archive)
    real.mkdir()
    say(f'{out} contained a run, which was moved to '
        f'{archive if out.is_symlink() else out.with_name(archive.name)}')


def named(folder):
    """Return a folder as a path whose name can get a suffix. '.' and 'out/..' have no such name, so
    they are resolved."""
    return folder if folder.name not in ('', '..') else Path(os.path.realpath(folder))


def check_save_dir(save_dir, source, kind, overwrite=False):
    """Raise UserError if the folder `save_dir` must not be created or replaced.

    These folders are: the working directory, the home folder and their parents; a folder that
    contains the model folder `source`; an existing folder, unless it is empty, or it is a run
    folder and `overwrite` is True; and a folder that cannot be written. `kind` is the suffix of the
    name to suggest. overwrite=None means that the command has no such option.
    """
    real, own = (Path(os.path.realpath(folder)) for folder in (save_dir, source))
    where = f'save_dir={str(save_dir)!r}'
    if is_shared(real):
        raise UserError(
            f'{where}: must not be or contain the working directory or the home folder '
            f'(nearest: {unused(save_dir / kind)})')
    if real in (own, *own.parents):
        raise UserError(
            f"{where}: contains the model itself (nearest: {unused(f'{source}-{kind}')})")
    free = not os.path.lexists(save_dir) or os.path.isdir(save_dir) and not os.listdir(save_dir)
    a_run = overwrite is not None and os.path.exists(save_dir / 'ckpt.pt')
    if not free and not (overwrite and a_run):
        raise UserError(
            f"{where}: exists and is not an empty folder (nearest: {unused(save_dir)}" +
            (', or --overwrite=True, which moves it aside)' if a_run else ')'))
    # new_folder fills a hidden folder beside it
    check_writable(real.with_name(f'.{real.name}'), where)

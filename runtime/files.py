"""Files and folders that are written whole or not at all."""

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
ROOM = '; make room there, then the same command again'


def unwritable(where, error):
    """The exception, Failure or UserError, to raise for an OSError; where: option or file, as
    text."""
    words = f'{where}: {error.strerror or one_line(error)}'
    return Failure(words + ROOM) if error.errno in FULL else UserError(words)


def format_error(error):
    """An exception on one line; of a full disk also what to do."""
    return one_line(error) + (ROOM if isinstance(error, OSError) and error.errno in FULL else '')


def unused(path):
    """The first of PATH, PATH-2, PATH-3, ... that is not there, in quotes for a shell."""
    free = next(p for p in chain([str(path)], (f'{path}-{n}' for n in count(2)))
                if not os.path.lexists(p))
    return "'" + free.replace("'", "'\\''") + "'"


def is_shared(path):
    """Whether a real path is the working directory, the home folder, or one that holds either: no
    folder for one run, which could be moved aside."""
    return any(path in (own, *own.parents) for own in (Path.cwd(), Path.home()))


@contextmanager
def with_path(path):
    """A block whose OSErrors name the file, as those of open() do and those of write() do not."""
    try:
        yield
    except OSError as e:
        e.filename = str(path)
        raise


@contextmanager
def atomic_open(path):
    """A binary file to write that takes `path`'s place when the block ends: temporary file in the
    same folder, flush to disk, rename. A crash or an error leaves what was there before. Raises
    OSError."""
    path = Path(path)
    # another process may write the same file
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
    """A rename in it must reach the disk too."""
    if os.name == 'posix':
        folder = os.open(path, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def write_atomically(path, content):
    """bytes -> file, by `atomic_open`."""
    with atomic_open(path) as f:
        f.write(content)


@contextmanager
def new_folder(path):
    """A folder to fill by `atomic_open`, which becomes `path` when the block ends: hidden folder
    beside it, rename. After an error or a crash there is no `path`. Raises OSError, also where
    `path` is more than an empty folder."""
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            path.rmdir()                                            # Windows renames over no folder
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _flush_folder(path.parent)


def check_writable(path, where):
    """Before work whose result goes there: raise UserError or Failure, which begin with `where`,
    unless a file can be written at `path`, its folders made. It is tried, and leaves nothing:
    access rights say nothing of a full disk."""
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
    """Delete the temporary files of `atomic_open` that other processes left in a folder, which this
    one has locked."""
    for path in Path(folder).glob('*.tmp'):
        process = re.fullmatch(r'.+\.(\d+)\.tmp', path.name)
        if process and int(process[1]) != os.getpid():
            path.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# folders of a run

@contextmanager
def locked(file, busy):
    """Hold the lock FILE within the block; its folder is made if need be. The lock is the system's
    and ends with the process. While another process has it, busy() is called: it raises, or returns
    to wait. Where there are no locks, as on some network disks, or where nothing can be written,
    the block runs without one."""
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
            with suppress(OSError):                                 # on Windows
                Path(file).unlink()
        lock.release()


def locked_folder(folder, option='out_dir', wait=False):
    """`locked` for the folder of a run, or of a sweep. Raises UserError, which names the option, if
    another process has it, unless it is to wait."""
    def busy():
        if wait:
            print(f'{folder}: waiting until the run there has saved', flush=True)
            return
        raise UserError(
            f"{option}='{folder}': a run is going on there; wait (nearest: {unused(folder)})")
    return locked(lock_file(make_folder(folder, option)), busy)


def lock_file(folder):
    """.NAME.lock beside the folder, which may be moved while it is locked."""
    real = Path(os.path.realpath(folder))
    return real.with_name(f'.{real.name}.lock')


def make_folder(path, option='out_dir'):
    """The folder as a Path, made if need be; a link's target too. Raises UserError, which names the
    option."""
    try:
        Path(os.path.realpath(path)).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f'{option}={str(path)!r}: cannot be made: {e.strerror}') from None
    return Path(path)


def archive_run(out, say):
    """Move a run that is in the folder to OUT_DIR.1, .2, ... as a whole. Of a symbolic link the
    target moves, and an empty folder takes its place. Raises OSError."""
    if not any((out / name).exists() for name in ('ckpt.pt', 'last.pt', 'metrics.jsonl')):
        return
    real = Path(os.path.realpath(out))
    archive = next(p for p in (Path(f'{real}.{n}') for n in count(1)) if not p.exists())
    real.rename(archive)
    real.mkdir()
    say(f'{out} holds a run: moved to '
        f'{archive if out.is_symlink() else out.with_name(archive.name)}')


def named(folder):
    """The folder under a name of its own: '.' and 'out/..' have none that another name can be made
    from."""
    return folder if folder.name not in ('', '..') else Path(os.path.realpath(folder))


def check_save_dir(save_dir, source, kind, overwrite=False):
    """Raise UserError for a folder that must not be made or replaced: one that exists, unless it is
    empty or, with overwrite, a run; the working directory; one that holds `source`; one that cannot
    be written.

    kind: suffix of the name to suggest. overwrite None: the command has no such option.
    """
    real, own = (Path(os.path.realpath(folder)) for folder in (save_dir, source))
    where = f'save_dir={str(save_dir)!r}'
    if is_shared(real):
        raise UserError(
            f'{where}: must be another folder than this one or home (nearest: '
            f'{unused(save_dir / kind)})')
    if real in (own, *own.parents):
        raise UserError(
            f"{where}: has the model itself in it (nearest: {unused(f'{source}-{kind}')})")
    free = not os.path.lexists(save_dir) or os.path.isdir(save_dir) and not os.listdir(save_dir)
    a_run = overwrite is not None and os.path.exists(save_dir / 'ckpt.pt')
    if not free and not (overwrite and a_run):
        raise UserError(
            f"{where}: is there already, and no empty folder (nearest: {unused(save_dir)}" +
            (', or --overwrite=True, which moves it aside)' if a_run else ')'))
    # under this name new_folder fills it
    check_writable(real.with_name(f'.{real.name}'), where)

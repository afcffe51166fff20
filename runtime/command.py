"""What commands share: their way in and out, and where those that make a folder from a run may write."""

import os
import signal
import sys
from pathlib import Path

from runtime import config as configuration
from runtime.config import UserError
from runtime.files import check_writable, in_words, is_shared, unused
from runtime.output import unfailing_output
from runtime.stopping import Stop


@unfailing_output()
def run(script, cls, usage, action, argv=None, load=None):
    """Build the dataclass `cls` from argv (None: sys.argv's), or load(argv) does, and call action with it -> exit code:
    what action returns, 0 for None; 1 a full disk, 2 wrong input (one line on stderr), 130 / 143 stopped."""
    argv = sys.argv[1:] if argv is None else argv
    if '--help' in argv or '-h' in argv:
        print(configuration.help_text(cls, usage.strip()))
        return 0
    try:
        with Stop(under_torchrun=False):
            return action(load(argv) if load else configuration.load(cls, argv)[0]) or 0
    except UserError as e:
        print(f'{script}: {e}', file=sys.stderr)
        return e.code
    except KeyboardInterrupt as e:
        return 128 + getattr(e, 'signal', signal.SIGINT)


def path(text):
    return Path(os.path.expanduser(text))


@unfailing_output()
def parse(parser, argv, action, again):
    """Call action with what an ArgumentParser makes of argv -> exit code: 0 done, 1 no network or a full disk, 2 wrong
    input, 130 Ctrl-C. again: what the same command does after that."""
    def refuse(message):                                            # in place of usage text and exit
        raise UserError(f'{message}; --help lists the options')
    parser.error = refuse
    try:
        action(parser.parse_args(argv))
        return 0
    except (UserError, OSError) as e:
        print(in_words(e), file=sys.stderr)
        return 2 if isinstance(e, UserError) else 1
    except KeyboardInterrupt:
        print(f'interrupted; the same command {again}', file=sys.stderr)
        return 130


def named(folder):
    """The folder under a name of its own: '.' and 'out/..' have none that another name can be made from."""
    return folder if folder.name not in ('', '..') else Path(os.path.realpath(folder))


def check_save_dir(save_dir, source, kind, overwrite=False):
    """Raise UserError for a folder that must not be made or replaced: one that is there, unless it is empty or, with
    overwrite, a run; this one; one that holds `source`; or cannot be made. kind: a word for the name of another one.
    overwrite None: there is no such option."""
    real, own = (Path(os.path.realpath(folder)) for folder in (save_dir, source))
    where = f'save_dir={str(save_dir)!r}'
    try:
        if is_shared(real):
            raise UserError(f'{where}: must be another folder than this one or home (nearest: '
                            f'{unused(save_dir / kind)})')
        if real in (own, *own.parents):
            raise UserError(f"{where}: has the model itself in it (nearest: {unused(f'{source}-{kind}')})")
        free = not os.path.lexists(save_dir) or os.path.isdir(save_dir) and not any(save_dir.iterdir())
        a_run = overwrite is not None and (save_dir / 'ckpt.pt').exists()
    except OSError as e:
        raise UserError(f'{where}: cannot be used: {e.strerror}') from None
    if not free and not (overwrite and a_run):
        raise UserError(f"{where}: is there already, and no empty folder (nearest: {unused(save_dir)}"
                        + (', or --overwrite=True, which moves it aside)' if a_run else ')'))
    check_writable(real.with_name(f'.{real.name}'), where)          # new_folder's name for it, while it is filled

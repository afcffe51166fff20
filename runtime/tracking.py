"""Logging of a run: metrics.jsonl, progress bars, Weights & Biases (wandb).

wandb never stops a run. If it is not installed, has no key or network, or fails, a one-line message
is printed and training continues. WANDB_MODE=offline keeps the data on this machine for `wandb
sync`.
"""

import json
import os
import re
import sys
import uuid
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from runtime.config import one_line
from runtime.files import with_path, write_atomically

# wandb's timeouts in seconds, unless the environment sets them
WANDB_LIMITS = dict(WANDB_INIT_TIMEOUT='60', WANDB_LOGIN_TIMEOUT='30', WANDB_FINISH_TIMEOUT='300')


def bar(**options):
    """Return a tqdm bar on stderr, updated less often if stderr is a pipe or a file."""
    return tqdm(mininterval=0.5 if sys.stderr.isatty() else 10, dynamic_ncols=True, **options)


def brief_bar(work=None, **options):
    """Return a tqdm bar that is shown on terminals only and disappears when the work is done."""
    return tqdm(work, leave=False, disable=None, **options)


# --------------------------------------------------------------------------------------------------
# metrics.jsonl

def append_json(path, row):
    """Append one line of JSON to a file, also after a line that a crash left incomplete. Raises
    OSError."""
    with with_path(path), open(path, 'ab+') as f:
        f.seek(max(0, f.seek(0, 2) - 1))
        start = '' if f.read(1) in (b'', b'\n') else '\n'
        f.write((start + json.dumps(row, allow_nan=False) + '\n').encode())


def read_json_lines(path):
    """Return the objects in a JSON Lines file, or [] if there is no file. Lines that a crash left
    incomplete are skipped."""
    rows = []
    with suppress(OSError):
        for line in Path(path).read_text(encoding='utf-8', errors='replace').splitlines():
            with suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def read_metrics(folder):
    """Return the rows of a run's metrics.jsonl. Each row has its step as 'iter'."""
    return [row for row in read_json_lines(Path(folder) / 'metrics.jsonl')
            if type(row.get('iter')) is int]


def truncate_metrics(folder, iter_num, again):
    """Cut metrics.jsonl back to its state after step `iter_num`, for a run that resumes there. Rows
    of later steps and the final evaluation at that step are removed. `again`: whether the resumed
    run repeats the evaluation at that step. If so, the row of this evaluation is removed too.
    Raises OSError."""
    rows = [row for row in read_metrics(folder) if row['iter'] < iter_num
            or row['iter'] == iter_num and 'final' not in row and not (again and 'val/loss' in row)]
    write_atomically(
        Path(folder) / 'metrics.jsonl', ''.join(json.dumps(row) + '\n' for row in rows).encode())


# --------------------------------------------------------------------------------------------------
# Weights & Biases

class Tracking:
    """A wandb run. Its methods never raise."""

    def __init__(self, folder, say, **options):
        """Start or continue a wandb run with the options of wandb.init. The files and the id of the
        run are in FOLDER/wandb, so that the same folder continues the same run. say(text) reports
        errors."""
        self._wandb, self._run, self._say = None, None, say
        for name, seconds in WANDB_LIMITS.items():
            os.environ.setdefault(name, seconds)
        self._attempt('start', lambda: self._start(folder, options))

    def _start(self, folder, options):
        try:
            import wandb
            init = wandb.init  # fails if 'wandb' is a folder without the package
        except (ImportError, AttributeError):
            raise ImportError('not installed; run: pip install wandb') from None
        place = Path(folder) / 'wandb' / 'run-id'
        place.parent.mkdir(parents=True, exist_ok=True)
        known = place.read_text(encoding='utf-8', errors='replace') if place.exists() else ''
        name = known if re.fullmatch('[0-9a-f]{8}', known) else uuid.uuid4().hex[:8]
        write_atomically(place, name.encode())
        run = init(id=name, resume='allow', dir=str(folder), allow_val_change=True, **options)
        # 'iter' is the x axis, because wandb's own step refuses steps that a resumed run repeats
        run.define_metric('iter')
        run.define_metric('*', step_metric='iter')
        self._wandb, self._run = wandb, run

    def log(self, row):
        """Log a row: a dict from names to numbers or words, with the step as 'iter'."""
        self._attempt('log', lambda: self._run.log(row))

    def figures(self, paths):
        """Log figures: a dict from names to PNG files."""
        self._attempt('log figures', lambda: self._run.log(
            {name: self._wandb.Image(str(path)) for name, path in paths.items()}))

    def finish(self, code=0):
        """End the wandb run. It is marked as failed unless the exit code is 0."""
        self._attempt('finish', lambda: self._run.finish(exit_code=code))
        self._run = None

    def _attempt(self, what, work):
        if self._run is None and what != 'start':
            return
        try:
            work()
        except Exception as e:
            self._run = None
            kind = '' if isinstance(e, ImportError) else f'{type(e).__name__}: '
            self._say(f'wandb: failed to {what} ({kind}{one_line(e)[:200]}); all metrics are '
                      'still in metrics.jsonl')

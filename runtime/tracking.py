"""What a run reports: metrics.jsonl, progress bars, Weights & Biases.

wandb never stops a run: if it is absent, without a key or a network, or broken, a line says so, and
training goes on. WANDB_MODE=offline keeps all on this machine, for `wandb sync` later.
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

# wandb's own limits in seconds, unless the environment has others
WANDB_LIMITS = dict(WANDB_INIT_TIMEOUT='60', WANDB_LOGIN_TIMEOUT='30', WANDB_FINISH_TIMEOUT='300')


def bar(**options):
    """tqdm's bar on stderr, rarely drawn in a pipe or a file."""
    return tqdm(mininterval=0.5 if sys.stderr.isatty() else 10, dynamic_ncols=True, **options)


def brief_bar(work=None, **options):
    """tqdm's bar on a terminal, gone when the work is done; nothing in a pipe or a file."""
    return tqdm(work, leave=False, disable=None, **options)


# --------------------------------------------------------------------------------------------------
# metrics.jsonl

def append_json(path, row):
    """Append one line of JSON to a file. Raises OSError."""
    with with_path(path), open(path, 'a', encoding='utf-8') as f:
        f.write(json.dumps(row, allow_nan=False) + '\n')


def read_json_lines(path):
    """The objects in a file of JSON Lines, [] without one; a line that a crash left unfinished is
    left out."""
    rows = []
    with suppress(OSError):
        for line in Path(path).read_text(encoding='utf-8', errors='replace').splitlines():
            with suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def read_metrics(folder):
    """The rows of a run's metrics.jsonl, each with its step 'iter'."""
    return [
        row for row in read_json_lines(Path(folder) / 'metrics.jsonl')
        if type(row.get('iter')) is int]


def truncate_metrics(folder, iter_num, again):
    """Cut metrics.jsonl back to what the run had written when step `iter_num` was done: without
    later rows, final evaluations, and, if the resumed run makes it `again`, the evaluation at that
    step. Raises OSError."""
    rows = [row for row in read_metrics(folder) if row['iter'] < iter_num
            or row['iter'] == iter_num and 'final' not in row and not (again and 'val/loss' in row)]
    write_atomically(
        Path(folder) / 'metrics.jsonl', ''.join(json.dumps(row) + '\n' for row in rows).encode())


# --------------------------------------------------------------------------------------------------
# Weights & Biases

class Tracking:
    """A wandb run. No method raises."""

    def __init__(self, folder, say, **options):
        """options: wandb.init's. Its files and its id are kept in FOLDER/wandb: with the same
        folder the same run goes on. say(text): where trouble is reported."""
        self._wandb, self._run, self._say = None, None, say
        for name, seconds in WANDB_LIMITS.items():
            os.environ.setdefault(name, seconds)
        self._attempt('start', lambda: self._start(folder, options))

    def _start(self, folder, options):
        try:
            import wandb
            init = wandb.init  # a folder wandb/ makes an empty module
        except (ImportError, AttributeError):
            raise ImportError('not installed: pip install wandb') from None
        place = Path(folder) / 'wandb' / 'run-id'
        place.parent.mkdir(parents=True, exist_ok=True)
        known = place.read_text(encoding='utf-8', errors='replace') if place.exists() else ''
        name = known if re.fullmatch('[0-9a-f]{8}', known) else uuid.uuid4().hex[:8]
        write_atomically(place, name.encode())
        run = init(id=name, resume='allow', dir=str(folder), allow_val_change=True, **options)
        # 'iter' is the axis: wandb's own step never goes back, so steps that are taken again would
        # be refused
        run.define_metric('iter')
        run.define_metric('*', step_metric='iter')
        self._wandb, self._run = wandb, run

    def log(self, row):
        """row: name -> number or word, with 'iter'."""
        self._attempt('log', lambda: self._run.log(row))

    def figures(self, paths):
        """paths: name -> PNG file."""
        self._attempt('take figures', lambda: self._run.log(
            {name: self._wandb.Image(str(path)) for name, path in paths.items()}))

    def finish(self, code=0):
        """code: the exit code; other than 0 the run has failed."""
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
            self._say(f'wandb does not {what} ({kind}{one_line(e)[:200]}); metrics.jsonl has '
                      'everything')

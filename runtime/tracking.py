"""Weights & Biases beside metrics.jsonl. Absent, without a key or a network, broken or hanging: a line says so, and
training goes on. WANDB_MODE=offline keeps all on this machine, for `wandb sync` later."""

import os
import re
import sys
import uuid
from pathlib import Path

from runtime.config import one_line
from runtime.files import write_atomically
from runtime.waiting import within

# wandb's own limits in seconds, unless the environment says otherwise; what does not keep them gets GRACE more
LIMITS = dict(WANDB_INIT_TIMEOUT=60, WANDB_FINISH_TIMEOUT=300)
GRACE = 15


class Tracking:
    """A wandb run. No method raises, but for KeyboardInterrupt while it waits."""

    def __init__(self, folder, say, **options):
        """options: wandb.init's. Its files and its id are kept in FOLDER/wandb: with the same folder it goes on in the
        same run. say(text): where trouble is told."""
        self._wandb, self._run, self._say = None, None, say
        for name, seconds in LIMITS.items():
            os.environ.setdefault(name, str(seconds))
        self._attempt('start', lambda: self._start(folder, options))

    def _start(self, folder, options):
        try:
            import wandb
            init = wandb.init                                           # a folder wandb/ makes an empty module
        except (ImportError, AttributeError):
            raise ImportError('not installed: pip install wandb') from None
        place = Path(folder) / 'wandb' / 'run-id'
        place.parent.mkdir(parents=True, exist_ok=True)
        known = place.read_text(encoding='utf-8', errors='replace') if place.exists() else ''
        name = known if re.fullmatch('[0-9a-f]{8}', known) else uuid.uuid4().hex[:8]
        write_atomically(place, name.encode())
        stdin = sys.stdin
        with open(os.devnull, encoding='utf-8') as sys.stdin:           # at a terminal it would ask for a key, and wait
            try:
                # a resumed run may have other options
                run = within(_limit('WANDB_INIT_TIMEOUT'), lambda: init(
                    id=name, resume='allow', dir=str(folder), allow_val_change=True, **options))
            finally:
                sys.stdin = stdin
        # 'iter' is the axis, for wandb's own step never goes back: steps that are taken again would be refused
        run.define_metric('iter')
        run.define_metric('*', step_metric='iter')
        self._wandb, self._run = wandb, run

    def log(self, row):
        """row: name -> number or word, with 'iter'."""
        self._attempt('log', lambda: self._run.log(row))

    def figures(self, paths):
        """name -> PNG file."""
        self._attempt('take figures', lambda: self._run.log(
            {name: self._wandb.Image(str(path)) for name, path in paths.items()}))

    def finish(self, code=0):
        """code: the exit code; other than 0 the run has failed."""
        self._attempt('finish', lambda: within(_limit('WANDB_FINISH_TIMEOUT'),
                                               lambda: self._run.finish(exit_code=code)))
        self._run = None

    def _attempt(self, what, work):
        if self._run is None and what != 'start':
            return
        try:
            work()
        except Exception as e:
            self._run = None
            words = one_line(e)[:200] if isinstance(e, ImportError) else f'{type(e).__name__}: {one_line(e)[:200]}'
            self._say(f'wandb does not {what} ({words}); metrics.jsonl has everything')


def _limit(name):
    try:
        return float(os.environ[name]) + GRACE
    except ValueError:
        return LIMITS[name] + GRACE

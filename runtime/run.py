"""A run in progress: what its checkpoints hold, and the files in OUT_DIR."""

import json
import math
import os
import shlex
import shutil
import signal
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

try:
    import fcntl
except ImportError:                                                     # Windows
    fcntl = None

import torch

from runtime import checkpoint as ckpt
from runtime import config as configuration
from runtime import device as devices
from runtime.config import UserError, one_line
from runtime.files import FULL, begin_from, naming, remove_leftovers, replacing, unused, unwritable, write_atomically
from runtime.finite import first_bad_layer
from runtime.optim import restore_optimizer
from runtime.tracking import Tracking

HEAD = '# this run, resolved; can be given to train.py again\n'       # tells a run's config.py from a user's own


class TrainingStopped(Exception):
    """A run that cannot go on, through no fault of its input: one line and exit code 1."""


class Run:
    """Model, optimizer, position in the data and best loss, as saved and restored together. A context manager, which
    keeps other runs out of OUT_DIR. Raises TrainingStopped where files cannot be written, or would hold numbers that
    are not finite."""

    def __init__(self, cfg, model, optimizer, data, dtype, processes, adaptive=None):
        self.cfg, self.model, self.optimizer, self.data, self.processes = cfg, model, optimizer, data, processes
        self.adaptive = adaptive                                        # state beside the model's, None: none
        self.dtype, self.context = dtype, devices.autocast(processes.device, dtype)
        on_cuda = processes.device.startswith('cuda')
        self.scaler = torch.amp.GradScaler('cuda', enabled=dtype == 'float16' and on_cuda)
        self.order = torch.Generator().manual_seed(cfg.seed)            # of training batches, and of nothing else
        self.iter_num, self.saved_at = 0, None
        # best over evaluations on the grid of eval_interval, and of one that was only made because the run ended there
        self.best_interim_loss, self.best_at_end, self.ended_off_grid = 1e9, 1e9, False
        self.out, self._tracking, self._lock, self._loaded = Path(cfg.out_dir), None, None, None
        self.resume = shlex.join(['--init_from=resume', f'--out_dir={self.out}'])      # options with which it goes on

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        try:
            if self._tracking is not None:
                by_hand = isinstance(error, KeyboardInterrupt)
                self._tracking.finish(128 + getattr(error, 'signal', signal.SIGINT) if by_hand else int(bool(kind)))
        finally:
            if self._lock is not None:
                os.close(self._lock)

    def restore(self, saved):
        """Go on where the checkpoint stood. Raises UserError where it does not fit."""
        states, here, path = saved.get('random'), self.processes.world_size, saved['path']
        if states is None:
            self.processes.print(f'{path} has no random state: the order of the data starts anew')
        elif len(states) != here:
            raise UserError(f'{path}: its run has {len(states)} processes, and here are {here}: the data would come in '
                            f'another order (nearest: torchrun --nproc_per_node={len(states)} train.py {self.resume})')
        optimizer = saved.get('optimizer')
        try:
            if self.adaptive is not None and 'adaptive_svd' in saved:
                self.adaptive.load_state_dict(saved['adaptive_svd'])
        except (ValueError, TypeError, AttributeError) as e:
            raise UserError(f'{path}: its adaptive_svd does not fit: {e}') from None
        try:
            if states is None and isinstance(optimizer, dict) and optimizer.get('state') == {}:     # as exported
                self.processes.print(f'{path} has no optimizer state: the optimizer starts anew')
            else:
                restore_optimizer(self.optimizer, optimizer, saved['iter_num'],
                                  cropped=self.model.transformer.wpe.weight)
        except ValueError as e:
            theirs = 'muon' if 'muon' in (optimizer or {}) else 'adamw'
            if optimizer and theirs != self.cfg.optimizer:
                anew = begin_from(self.out, self.cfg.dataset)
                e = f'it is of {theirs!r} (nearest: --optimizer={theirs}, or from its weights: {anew})'
            raise UserError(f'{path}: its optimizer state does not fit optimizer={self.cfg.optimizer}: {e}') from None
        try:
            if states:
                ckpt.set_random_state(states[self.processes.rank], self.order, self.processes.device)
            if self.scaler.is_enabled() and saved.get('scaler'):
                self.scaler.load_state_dict(saved['scaler'])
        except (KeyError, TypeError, RuntimeError) as e:
            raise UserError(f'{path}: its random or scaler state cannot be used: {one_line(e)[:200]}') from None
        self.iter_num = self.saved_at = saved['iter_num']
        self.best_interim_loss = float(saved.get('interim_best_val_loss', saved['best_val_loss']))
        self.ended_off_grid = self.iter_num % (saved.get('config', {}).get('eval_interval') or 1) > 0
        if saved['best_val_loss'] < self.best_interim_loss:
            self.best_at_end = float(saved['best_val_loss'])
        self._loaded = saved['path'], saved['stamp']

    def open_files(self):
        """OUT_DIR and wandb, on process 0."""
        cfg, say = self.cfg, self.processes.print
        texts = {'config.py': configuration.dump(cfg, HEAD),
                 'environment.json': json.dumps(devices.environment(self.processes.device, self.dtype), indent=1)}
        try:
            self._lock = lock(self.out)
            if self._loaded and ckpt.stamp(self._loaded[0]) != self._loaded[1]:
                raise UserError(f'{self._loaded[0]}: another run has just saved it; start again')
            config = self.out / 'config.py'
            if config.exists() and not config.read_bytes().startswith(HEAD.encode()):
                raise UserError(f"out_dir='{self.out}': its config.py is no run's (nearest: {unused(self.out)})")
            if self.saved_at is None and move_aside(self.out, say):
                moved, self._lock = self._lock, lock(self.out)
                os.close(moved)
            remove_leftovers(self.out)
            for name, text in texts.items():
                write_atomically(self.out / name, text.encode())
            if self.saved_at is not None and (self.out / 'metrics.jsonl').exists():
                again = self.iter_num % cfg.eval_interval == 0 or self.iter_num >= cfg.max_iters or self.ended_off_grid
                forget_after(self.out / 'metrics.jsonl', self.iter_num, again)
        except OSError as e:
            raise unwritable(f'out_dir={cfg.out_dir!r}: cannot be written', e) from None
        if cfg.wandb_log:
            tags = [tag.strip() for tag in (cfg.wandb_tags or '').split(',') if tag.strip()]
            self._tracking = Tracking(self.out, say, project=cfg.wandb_project, name=cfg.wandb_run_name,
                                      group=cfg.wandb_group, tags=tags or None, config=asdict(cfg))

    def log(self, row):
        """A line of metrics.jsonl, and to wandb."""
        if any(isinstance(value, float) and not math.isfinite(value) for value in row.values()):
            raise self.stopped(f'after step {self.iter_num}: a loss is not finite')
        try:
            append_json(self.out / 'metrics.jsonl', row)
        except OSError as e:
            raise self._unwritten(f'{self.out}/metrics.jsonl', e) from None
        if self._tracking is not None:
            self._tracking.log(row)

    def random_states(self):
        """Of every process, as a list; all have to call it."""
        return self.processes.gather(ckpt.random_state(self.order, self.processes.device))

    def save(self, name, random, best_val_loss):
        """OUT_DIR/name. best_val_loss counts every evaluation; interim_best_val_loss leaves out one that only took
        place because the run ended there: a longer run, or this one when it is resumed, does not know it."""
        model = self.model
        try:
            if name == 'ckpt.pt' and self.best_at_end < best_val_loss and not self.cfg.always_save_checkpoint:
                self._keep_best_at_end()
            ckpt.save({'model': model.state_dict(), 'optimizer': self.optimizer.state_dict(), 'iter_num': self.iter_num,
                       'model_args': asdict(model.config), 'best_val_loss': best_val_loss,
                       'interim_best_val_loss': self.best_interim_loss, 'config': asdict(self.cfg),
                       'tokenizer': self.data.meta, 'random': random, 'scaler': self.scaler.state_dict(),
                       **({} if self.adaptive is None else {'adaptive_svd': self.adaptive.state_dict()}),
                       **({} if model.svd_basis is None else {'svd_basis': model.svd_basis})}, self.out / name)
        except OSError as e:
            raise self._unwritten(f'{self.out / name} was not saved', e) from None
        except FloatingPointError as e:
            raise self.stopped(f'step {self.iter_num}: {e}') from None
        self.saved_at = self.iter_num
        if name == 'ckpt.pt':
            self.best_at_end = 1e9
            with suppress(OSError):                                     # an older one does no harm
                (self.out / 'last.pt').unlink(missing_ok=True)

    def _keep_best_at_end(self):
        """A longer run replaces a ckpt.pt that it does not know to be the best: under another name that stays."""
        kept = self.out / f'best-{self.best_at_end:.4f}.pt'
        if not kept.exists():
            try:
                os.link(self.out / 'ckpt.pt', kept)
            except OSError:                                             # a file system without links
                with open(self.out / 'ckpt.pt', 'rb') as old, replacing(kept) as new:
                    shutil.copyfileobj(old, new)
        self.processes.print(f'{self.out}/ckpt.pt, the best of a shorter run, stays as {kept}')

    def stopped(self, why, batches=None):
        """TrainingStopped to raise: why, the first bad layer if `batches` are given, and what is kept."""
        if batches is not None:
            bad = first_bad_layer(self.model, batches, self.context)
            why += f'; first bad layer: {bad or "none, it did not happen again"}'
        if not self.processes.is_main:                                  # which knows what is saved
            return TrainingStopped(why)
        if self.saved_at is None:
            return TrainingStopped(f'{why}; no checkpoint had been saved')
        return TrainingStopped(f'{why}; the checkpoint of step {self.saved_at} is kept')

    def _unwritten(self, what, error):
        """TrainingStopped to raise where the disk does not take a file."""
        stopped = self.stopped(f'after step {self.iter_num}: {what}: {error.strerror}')
        if error.errno not in FULL:
            return stopped
        again = 'start again' if self.saved_at is None else f'{self.resume} goes on'
        return TrainingStopped(f'{stopped}; make room there, then {again}')


def lock(folder, option='out_dir'):
    """A descriptor that keeps other runs out of the folder, made if need be, until it is closed, at the latest with the
    process; None where there are no such locks. Raises UserError if another run has it, and OSError."""
    while fcntl:
        descriptor = os.open(make_folder(folder, option), os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(f"{option}='{folder}': a run is going on there; wait (nearest: {unused(folder)})") from None
        except FileNotFoundError:
            pass
        except OSError:                                                 # some network file systems
            os.close(descriptor)
            return None
        os.close(descriptor)                                            # of a folder that was just moved aside
    make_folder(folder, option)
    return None


def move_aside(out, say):
    """A run that is in the folder moves to OUT_DIR.1, .2, ... as a whole -> whether there was one. A symbolic link
    stays: its target is what moves. Raises OSError."""
    if not any((out / name).exists() for name in ('ckpt.pt', 'last.pt', 'metrics.jsonl')):
        return False
    real = Path(os.path.realpath(out))
    aside = next(p for p in (Path(f'{real}.{n}') for n in range(1, 10 ** 6)) if not p.exists())
    real.rename(aside)
    say(f'{out} holds a run: moved to {aside if out.is_symlink() else out.with_name(aside.name)}')
    return True


def make_folder(path, option='out_dir'):
    """The folder as a Path, made if need be; a link's target too. Raises UserError, which names the option."""
    try:
        Path(os.path.realpath(path)).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f'{option}={str(path)!r}: cannot be made: {e.strerror}') from None
    return Path(path)


def append_json(path, row):
    """One more line of JSON. Raises OSError."""
    with naming(path), open(path, 'a', encoding='utf-8') as f:
        f.write(json.dumps(row, allow_nan=False) + '\n')


def forget_after(path, iter_num, again):
    """Cut metrics.jsonl back to what an undisturbed run had written when step `iter_num` was done: no later rows, no
    final ones, no line that a crash left unfinished, and, if it is made `again`, no evaluation at that step."""
    kept = []
    for line in path.read_text(encoding='utf-8', errors='replace').splitlines():
        try:
            row = json.loads(line)
            here = row['iter'] == iter_num and ('val/loss' not in row or not again and 'final' not in row)
            if row['iter'] < iter_num or here:
                kept.append(line + '\n')
        except (ValueError, KeyError, TypeError):
            pass
    write_atomically(path, ''.join(kept).encode())

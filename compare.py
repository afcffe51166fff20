"""
Train one config at several values of any options and seeds, and compare: a table, figures.

    python compare.py config/train_svd_test.py --svd_rank=None,4,8,16 --seeds=3
    python compare.py config/train_svd_test.py --svd_rank=None,4,8,16 --seeds=3 --dry_run
    python compare.py --sweep=out-compare       # table and figures of what is there, no training
    python compare.py --help                    # every option with default and meaning

Every option of train.py takes a list with commas, and every combination is trained with every seed.
A comma within a value stands in quotes or brackets, as in --lora_targets="'c_q,c_v'" or
--layer_ranks="{'h.0.mlp.c_fc':8,'h.1.mlp.c_fc':8}",None. Combinations that are the same run are
trained once. --dry_run lists the runs and the time they need; for that it prepares the data set and
times a few steps.

The same command goes on after an interruption: finished runs stay, the others resume to the same
bits. A list may grow; another sweep needs another --sweep=FOLDER. --jobs=N runs at a time share the
CPU's threads, or the GPUs; another N can change a loss in its last digits, as any number of threads
does. When all is done, each combination's step, not compiled, is timed against the baseline's, in
turn: one micro-batch, counted gradient_accumulation_steps times.

FOLDER gets results.md, results.csv, results.json, figures, and runs/, whose folders train.py and
sample.py take. With --wandb_log=True the runs and the figures are a group at Weights & Biases,
called FOLDER unless --wandb_group is given.
"""

import ast
import csv
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from runtime import cli  # before torch: says what is not installed
from runtime import config as configuration
from runtime.config import PATH, SWITCH, Range, UserError
from runtime.device import pick_device
from runtime.files import locked_folder, remove_leftovers, write_atomically
from runtime.tracking import Tracking
from tools import sweep, sweep_report
from train import TrainConfig


@dataclass
class CompareConfig(TrainConfig):
    """train.py's options, and those of the sweep."""
    sweep: Annotated[str, 'folder of the sweep', PATH,
                     configuration.Section('sweep')] = 'out-compare'
    seeds: Annotated[int, "runs of each combination: of the config's seed, and the ones after it",
                     Range(1)] = 1
    jobs: Annotated[int, 'runs at a time', Range(1)] = 1
    dry_run: Annotated[bool, 'list the runs and the time they need, and train nothing',
                       SWITCH] = False


OWN = ('sweep', 'seeds', 'jobs', 'dry_run')
# options that are one for all runs: a comma is part of the value
NO_LIST = (*OWN, 'out_dir', 'device', 'backend', 'log_interval', 'wandb_log', 'wandb_project',
           'wandb_run_name', 'wandb_group', 'wandb_tags')


def main(argv=None):
    """-> exit code: 0 done, 1 a run failed, 2 wrong input, 130 / 143 stopped."""
    return cli.run('compare.py', CompareConfig, __doc__, compare, argv, load=lambda argv: argv,
                   again='what was trained is kept, and the same command goes on')


def compare(argv):
    """Plan, check, train, time, show. -> exit code."""
    if all(arg.partition('=')[0] == '--sweep' for arg in argv):
        sweep_report.show(Path(configuration.load(CompareConfig, argv)[0].sweep))
        return 0
    values, lists, set_by, train_argv = read_lists(argv)
    cfg = configuration.build(CompareConfig, values, set_by)
    check_options(cfg, lists, set_by)
    folder, device = sweep.check_folder(cfg.sweep), pick_device(cfg.device)
    seeds = lists.pop('seed', None) or list(range(cfg.seed, cfg.seed + cfg.seeds))
    variants = [sweep.dry_build(variant, set_by) for variant in         # before hours are spent
                sweep.expand_grid(CompareConfig, values, lists, set_by, train_argv)]
    record = sweep.describe(variants, lists, seeds)
    sweep.check_same_sweep(folder, record)
    runs = [(variant, sweep.job_of(variant, seed, folder))
            for seed in seeds for variant in variants]
    if cfg.dry_run:
        sweep.list_runs(runs, device)
        return 0
    with locked_folder(folder, 'sweep'):
        remove_leftovers(folder)
        write_atomically(folder / 'sweep.json', json.dumps(record, indent=1).encode())
        failed = sweep.train_all([job for _, job in runs], cfg.jobs, device)
        if len(failed) < len(runs):
            sweep.measure(runs, folder, device)
            figures = sweep_report.show(folder)
            if cfg.wandb_log:
                tracking = Tracking(folder, print, project=cfg.wandb_project, name=folder.name,
                                    group=cfg.wandb_group or folder.name)
                tracking.figures(figures)
                tracking.finish()
    return 1 if failed else 0


def split_list(text):
    """The values of a list, as texts: 'None,8' -> ['None', '8']. They are Python's literals, or
    words of which those with a comma stand in single quotes."""
    try:
        return [repr(value) for value in ast.literal_eval(f'[{text}]')]
    except (ValueError, SyntaxError):
        return next(csv.reader([text], quotechar="'", skipinitialspace=True))


def read_lists(argv):
    """Command line -> values of all options, of a list the first; option -> list; option -> who set
    it; the arguments for train.py, with the first of each list. Raises UserError."""
    hints, lists, single = configuration.hints_of(CompareConfig), {}, []
    for arg in argv:
        word, _, text = arg.partition('=')
        key, parts = word.removeprefix('--'), split_list(text)
        lists.pop(key, None)                            # the last one counts
        if key in hints and key not in NO_LIST and len(parts) > 1:
            found = [configuration.parse_option(f'{word}={part}', hints)[1] for part in parts]
            lists[key] = list({repr(value): value for value in found}.values())
            arg = f'{word}={parts[0]}'
        single.append(arg)
    values, set_by = configuration.parse(CompareConfig, single)
    return values, lists, set_by, [
        arg for arg in single if arg.partition('=')[0].removeprefix('--') not in OWN]


def check_options(cfg, lists, set_by):
    """Raise UserError for what makes no sense in a sweep."""
    by_hand = [key for key, place in set_by.items() if place == 'the command line']
    in_file = [key for key in OWN if key in set_by and key not in by_hand]
    refused = [
        ('RANK' in os.environ,
         'RANK is set, as for one of several processes, and compare.py starts its own (nearest: '
         'unset RANK, or --jobs=N)'),
        (in_file,
         f'{", ".join(in_file)}: in a config file, which train.py reads, too (nearest: '
         f'{" ".join(f"--{key}={getattr(cfg, key)}" for key in in_file)})'),
        (set(set_by) <= set(OWN),
         f'{", ".join(by_hand)}: of what? Needs a config file or options of train.py (nearest: '
         'config/train_svd_test.py)'),
        ('out_dir' in by_hand,
         'out_dir: every run has a folder of its own (nearest: --sweep=FOLDER)'),
        ('wandb_run_name' in by_hand,
         'wandb_run_name: every run has a name of its own (nearest: --wandb_group=NAME)'),
        ('resume' in (cfg.init_from, *lists.get('init_from', ())),
         "init_from='resume': a sweep resumes its runs by itself (nearest: the same command again, "
         'or --init_from=FOLDER to start all runs from a model)'),
        (True in (cfg.eval_only, *lists.get('eval_only', ())),
         'eval_only=True: compare.py compares training (nearest: python train.py --eval_only=True '
         '--init_from=resume --out_dir=FOLDER)'),
        ('seed' in lists and 'seeds' in set_by,
         f'seeds={cfg.seeds}: not together with a list in --seed (nearest: leave one of them out)')]
    for wrong, message in refused:
        if wrong:
            raise UserError(message)


if __name__ == '__main__':
    sys.exit(main())

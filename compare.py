"""
Train one config with several values of some options and several seeds, and compare the results.

    python compare.py config/train_svd_test.py --svd_rank=None,4,8,16 --seeds=3
    python compare.py config/train_svd_test.py --svd_rank=None,4,8,16 --seeds=3 --dry_run
    python compare.py --sweep=out-compare       # table and figures again, no training
    python compare.py --help                    # every option, its default and meaning

Most options of train.py take a comma-separated list of values. Each combination of values is one
variant, which is trained once per seed. Variants that are the same run are trained once. A value
that contains a comma must be in quotes or brackets: --lora_targets="'c_q,c_v'",c_q or
--layer_ranks="{'h.0.mlp.c_fc':8,'h.1.mlp.c_fc':8}",None. --dry_run lists the runs and estimates
their time. For the estimate it prepares the data set and times a few steps.

To continue after an interruption, run the same command again. Finished runs are kept, the others
resume, and the results are bit-identical. Values may be added to a list. Other changes need a new
--sweep=FOLDER. --jobs=N trains N runs at a time, which share the CPU's threads or the GPUs. A
different N may change the last digits of a loss, because sums depend on the number of threads.
After training, a step of each variant and of its baseline are timed in turn, without torch.compile.
The time of a step is that of one micro-batch, multiplied by gradient_accumulation_steps.

FOLDER gets results.md, results.csv, results.json, figures and runs/, which holds the run folders.
With --wandb_log=True, runs and figures form a group at Weights & Biases. --wandb_group names the
group. Its default is FOLDER.
"""

import ast
import csv
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from runtime import cli  # before torch: reports missing packages
from runtime import config as configuration
from runtime.config import PATH, SWITCH, Range, UserError
from runtime.device import pick_device
from runtime.files import locked_folder, remove_leftovers, write_atomically
from runtime.tracking import Tracking
from tools import sweep, sweep_report
from train import TrainConfig


@dataclass
class CompareConfig(TrainConfig):
    """Options of compare.py: the options of train.py and those of the sweep. Raises ValueError as
    TrainConfig does."""
    sweep: Annotated[str, 'folder of the runs and the results', PATH,
                     configuration.Section('sweep')] = 'out-compare'
    seeds: Annotated[int, 'runs per variant, with seeds SEED, SEED + 1, ...', Range(1)] = 1
    jobs: Annotated[int, 'runs that are trained at the same time', Range(1)] = 1
    dry_run: Annotated[bool, 'only list the runs and estimate their time', SWITCH] = False


OWN = ('sweep', 'seeds', 'jobs', 'dry_run')
# options that take no list: a comma is part of their value
NO_LIST = (*OWN, 'out_dir', 'device', 'backend', 'log_interval', 'wandb_log', 'wandb_project',
           'wandb_run_name', 'wandb_group', 'wandb_tags')


def main(argv=None):
    """Run compare.py. argv: its arguments, by default those of the command line.

    Returns the exit code: 0 done, 1 a run failed, 2 wrong input, 130 after Ctrl-C, 143 after
    SIGTERM. An error is one line on stderr.
    """
    return cli.run('compare.py', CompareConfig, __doc__, compare, argv, load=lambda argv: argv,
                   again='finished steps are kept; to continue, run the same command again')


def compare(argv):
    """Plan, train, time and report a sweep. Returns the exit code. Raises UserError for wrong
    input, before anything is trained."""
    if all(arg.partition('=')[0] == '--sweep' for arg in argv):
        sweep_report.show(Path(configuration.load(CompareConfig, argv)[0].sweep))
        return 0
    values, lists, set_by, train_argv = read_lists(argv)
    cfg = configuration.build(CompareConfig, values, set_by)
    check_options(cfg, lists, set_by)
    folder, device = sweep.check_folder(cfg.sweep), pick_device(cfg.device)
    seeds = lists.pop('seed', None) or list(range(cfg.seed, cfg.seed + cfg.seeds))
    variants = [sweep.dry_build(variant, set_by) for variant in         # finds errors early
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
    """Split a list at its commas: 'None,8' -> ['None', '8']. Values are Python literals or words. A
    word that contains a comma must be in single quotes."""
    try:
        return [repr(value) for value in ast.literal_eval(f'[{text}]')]
    except (ValueError, SyntaxError):
        return next(csv.reader([text], quotechar="'", skipinitialspace=True))


def read_lists(argv):
    """Read a command line with lists.

    Returns four objects: a dict of the values of all options, with the first value of each list; a
    dict from option to list; a dict from option to where the option was set; and the arguments for
    train.py, with the first value of each list. Raises UserError.
    """
    hints, lists, single = configuration.hints_of(CompareConfig), {}, []
    for arg in argv:
        word, _, text = arg.partition('=')
        key, parts = word.removeprefix('--'), split_list(text)
        lists.pop(key, None)                            # the last list counts
        if key in hints and key not in NO_LIST and len(parts) > 1:
            found = [configuration.parse_option(f'{word}={part}', hints)[1] for part in parts]
            lists[key] = list({repr(value): value for value in found}.values())
            arg = f'{word}={parts[0]}'
        single.append(arg)
    values, set_by = configuration.parse(CompareConfig, single)
    return values, lists, set_by, [
        arg for arg in single if arg.partition('=')[0].removeprefix('--') not in OWN]


def check_options(cfg, lists, set_by):
    """Raise UserError for options that make no sense in a sweep."""
    by_hand = [key for key, place in set_by.items() if place == 'the command line']
    in_file = [key for key in OWN if key in set_by and key not in by_hand]
    refused = [
        ('RANK' in os.environ,
         'RANK: is set in the environment, as by torchrun, but compare.py starts its own processes '
         '(nearest: unset RANK, or --jobs=N)'),
        (in_file,
         f'{", ".join(in_file)}: cannot be in a config file, because train.py reads it (nearest: '
         f'{" ".join(f"--{key}={getattr(cfg, key)}" for key in in_file)})'),
        (set(set_by) <= set(OWN),
         f'{", ".join(by_hand)}: needs a config file or options of train.py, too (nearest: '
         'config/train_svd_test.py)'),
        ('out_dir' in by_hand,
         'out_dir: cannot be set, because each run has its own folder (nearest: --sweep=FOLDER)'),
        ('wandb_run_name' in by_hand,
         'wandb_run_name: cannot be set, because each run has its own name (nearest: '
         '--wandb_group=NAME)'),
        ('resume' in (cfg.init_from, *lists.get('init_from', ())),
         "init_from='resume': a sweep resumes its own runs (nearest: run the same command "
         'again, or --init_from=FOLDER to start all runs from a model)'),
        (True in (cfg.eval_only, *lists.get('eval_only', ())),
         'eval_only=True: compare.py always trains (nearest: python train.py --eval_only=True '
         '--init_from=resume --out_dir=FOLDER)'),
        ('seed' in lists and 'seeds' in set_by,
         f'seeds={cfg.seeds}: cannot be combined with a list in --seed (nearest: leave one of them '
         'out)')]
    for wrong, message in refused:
        if wrong:
            raise UserError(message)


if __name__ == '__main__':
    sys.exit(main())

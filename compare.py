"""
Train one config at several values of any options and seeds, and compare: a table, figures.

    python compare.py config/train_svd_test.py --svd_rank=None,4,8,16 --seeds=3    # every combination, three seeds each
    python compare.py config/train_svd_test.py --svd_rank=None,4,8,16 --seeds=3 --dry_run     # which runs, how long
    python compare.py --sweep=out-compare                        # table and figures of what is there; nothing is run
    python compare.py --help                                     # every option with default and meaning

Every option of train.py takes a list with commas; a comma within a value stands in quotes or brackets, as in
--layer_ranks="{'h.0.mlp.c_fc':8,'h.1.mlp.c_fc':8}",None or --lora_targets="'c_q,c_v'". Combinations that are the same
run are made once. The same command goes on after an interruption: finished runs stay, the others resume to the same
bits. A list may grow; another sweep needs another --sweep=FOLDER. Training's clock is not compared: when all is done
each combination's step, uncompiled, is timed against the baseline's, in turn: one micro-batch, counted
gradient_accumulation_steps times. --jobs=N runs at a
time share the CPU's threads, or the GPUs, out; another N can change a loss in its last digits, as any number of threads
does. --dry_run prepares the data set, and times a few steps.

FOLDER gets results.md, results.csv, results.json, figures, and runs/, whose folders train.py and sample.py take. With
--wandb_log=True the runs and the figures are a group at Weights & Biases, called FOLDER unless --wandb_group is given.
"""

import hashlib
import json
import math
import os
import statistics
import sys
from collections import namedtuple
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Annotated, get_type_hints

from runtime import cli                                                 # before torch: says what is not installed

import torch

from runtime import config as configuration
from runtime import device as devices
from runtime import huggingface, tracking
from runtime.config import PATH, SWITCH, Range, UserError
from runtime.data import Dataset, locate
from runtime.files import locked_folder, remove_leftovers, unused, write_atomically
from runtime.tracking import Tracking, append_json
from tools import sweep
from tools import sweep_report as report
from tools.step_benchmark import run_seconds, step_of
from tools.timing import paired_benchmark, time_it
from train import TrainConfig, build_model

TIMED_SECONDS = 6                   # of pairs of steps, each combination; at least MIN_PAIRS
MIN_PAIRS, MAX_PAIRS = 5, 40
REFUSED = {'out_dir': 'every run has a folder of its own (nearest: --sweep=FOLDER)',
           'wandb_run_name': 'every run has a name of its own (nearest: --wandb_project=NAME)'}
NO_LIST = ('device', 'backend', 'wandb_log', 'wandb_project', 'wandb_group', 'wandb_tags', 'log_interval')

# options: those that tell it from the others; cfg: of its first seed; argv: of train.py, without seed and folder
Arm = namedtuple('Arm', 'name options cfg argv')


@dataclass
class CompareConfig(TrainConfig):
    """train.py's options, and those of the sweep."""
    sweep: Annotated[str, 'folder of the sweep', PATH] = 'out-compare'
    seeds: Annotated[int, "runs of each combination: of the config's seed, and the ones after it", Range(1)] = 1
    jobs: Annotated[int, 'runs at a time', Range(1)] = 1
    dry_run: Annotated[bool, 'list the runs and the time they need, and train nothing', SWITCH] = False


OWN = [f.name for f in fields(CompareConfig) if f.name not in TrainConfig.__dataclass_fields__]


def main(argv=None):
    """-> exit code: 0 done, 1 a run failed, 2 wrong input, 130 / 143 stopped; one line each on stderr."""
    return cli.run('compare.py', CompareConfig, __doc__, compare, argv, load=lambda argv: argv,
                   again='what was trained is kept, and the same command goes on')


def compare(argv):
    """Plan, check, run, time, show. -> exit code."""
    if all(arg.partition('=')[0] == '--sweep' for arg in argv):     # of what is there
        report.show(Path(configuration.load(CompareConfig, argv)[0].sweep), print)
        return 0
    cfg, lists, set_by, plain = read(argv)
    folder, seeds = sweep.check_folder(cfg.sweep), lists.pop('seed', None) or range(cfg.seed, cfg.seed + cfg.seeds)
    arms = plan(cfg, lists, set_by, plain, print)
    device, costs, data = devices.pick_device(cfg.device), {}, {}
    for arm in arms:                                                # before hours are spent: as train.py would
        costs[arm.name], data[arm.name] = examine(arm, set_by, device)
    record = {'lists': lists, 'seeds': list(seeds), 'arms': {arm.name: {
        'options': arm.options, 'baseline': baseline_of(arm, arms).name, **costs[arm.name],
        'config': shaping(arm.cfg)} for arm in arms}}
    check_same_sweep(folder, record)
    runs = [(arm, job_of(arm, seed, folder, group_of(cfg))) for seed in record['seeds'] for arm in arms]
    if cfg.dry_run:
        return list_runs(runs, data, folder, device)
    with locked_folder(folder, 'sweep'):
        remove_leftovers(folder)
        write_atomically(folder / 'sweep.json', json.dumps(record, indent=1).encode())
        failed = train_all([job for _, job in runs], cfg, folder, device)
        if len(failed) < len(runs):
            measure(arms, runs, record, folder, device)
            figures = report.show(folder, print)
            if cfg.wandb_log:
                tracking = Tracking(folder, print, project=cfg.wandb_project, name=folder.name, group=group_of(cfg))
                tracking.figures(figures)
                tracking.finish()
    return 1 if failed else 0


def group_of(cfg):
    return cfg.wandb_group or Path(cfg.sweep).name


# ----------------------------------------------------------------------------------------------------------------------
# what is compared

def split(text):
    """A value's text at its commas, not at those within quotes or brackets -> list of texts."""
    parts, closing = [''], []                                       # closing: what each open bracket or quote waits for
    for c in text:
        quoted = closing and closing[-1] in '\'"'
        if closing and c == closing[-1]:
            closing.pop()
        elif not quoted and c in '([{':
            closing.append(')]}'['([{'.index(c)])
        elif not quoted and c in '\'"' and (closing or not parts[-1].strip()):
            closing.append(c)                                       # not the apostrophe of a file's name
        if c == ',' and not closing:
            parts.append('')
        else:
            parts[-1] += c
    return parts


def read(argv):
    """argv -> configuration with the first value of each list, the lists (option -> values), who set what, and the
    arguments without lists, out_dir and this script's own options."""
    hints, lists, single, plain = get_type_hints(CompareConfig, include_extras=True), {}, [], []
    for arg in argv:
        word, equals, text = arg.partition('=')
        key, parts = word.removeprefix('--'), split(text)
        if arg.startswith('-') and key in REFUSED:
            raise UserError(f'{key}={text!r}: {REFUSED[key]} [the command line]')
        lists.pop(key, None)                                        # the last one counts
        if not arg.startswith('--') or len(parts) == 1 or key in OWN or key not in hints:
            single.append(arg)
            plain += [arg] if key not in OWN else []
            continue
        if key in NO_LIST:
            raise UserError(f'{key}={text!r}: must be one for all runs (nearest: {parts[0]}) [the command line]')
        if not all(part.strip() for part in parts):
            raise UserError(f'{key}={text!r}: an empty value between commas [the command line]')
        lists[key] = list({repr(value): value for value in (
            configuration.parse_option(f'{word}={part.strip()}', hints)[1] for part in parts)}.values())
        single.append(f'{word}={parts[0]}')
    values, set_by = configuration.parse(CompareConfig, single)
    values['out_dir'] = str(Path(values['sweep']) / 'runs')         # a config file's is for one run
    cfg = configuration.build(CompareConfig, values, set_by)
    if 'RANK' in os.environ:
        raise UserError('RANK is set, as for one of several processes, and compare.py starts its own (nearest: unset '
                        'RANK, or --jobs=N)')
    for key in (key for key in OWN if key in set_by and key != 'sweep'):
        if set_by[key] != 'the command line':
            raise UserError(f'{set_by[key]}: {key}: train.py has no such option (nearest: --{key}={values[key]})')
        if set(set_by) <= set(OWN):
            raise UserError(f'{key}={values[key]!r}: of what? Needs a config file or options of train.py (nearest: '
                            'config/train_svd_test.py)')
    if cfg.init_from == 'resume' or 'resume' in lists.get('init_from', ()):
        raise UserError("init_from='resume': a sweep resumes its runs by itself (nearest: the same command again, or "
                        '--init_from=FOLDER to start all runs from a model)')
    if cfg.eval_only or True in lists.get('eval_only', ()):
        raise UserError('eval_only=True: compare.py compares training (nearest: python train.py --eval_only=True '
                        '--init_from=resume --out_dir=FOLDER)')
    if 'seed' in lists and 'seeds' in set_by:
        raise UserError(f'seeds={cfg.seeds}: not together with a list in --seed (nearest: leave one of them out)')
    return cfg, lists, set_by, plain


def plan(cfg, lists, set_by, plain, say):
    """Every combination of the lists, those that are the same run once -> list of Arm."""
    values = {key: value for key, value in asdict(cfg).items() if key not in OWN}
    if 'lr_decay_iters' not in set_by:
        values['lr_decay_iters'] = None                             # of each combination's own max_iters
    same = {}                                                       # what shapes a run -> the combinations
    for combination in product(*lists.values()):
        options = dict(zip(lists, combination))
        one = configuration.build(TrainConfig, values | options, set_by)
        same.setdefault(json.dumps(shaping(one), sort_keys=True), []).append((options, one))
    arms = {}
    for shape, group in same.items():
        first, one = group[0]
        # an option without effect is named where all agree on it; if that leaves none, all are named
        effect = shaping(one)
        shown = {key: v for key, v in first.items() if key in effect or all(o[key] == v for o, _ in group)} or first
        name = report.words(shown) or 'run'
        if name in arms or len(name) > 150:                         # alike in letters of a file's name, or too long
            name = f'{name[:140]}-{hashlib.sha256(shape.encode()).hexdigest()[:8]}'
        arms[name] = Arm(name, shown, one, plain + [f'--{key}={value!r}' for key, value in first.items()])
        if one.init_from == 'scratch' and one.use_svd and one.svd_rank is not None and one.svd_off:
            say(f'{name}: SVD on V {one.svd_off}')
        for other, _ in group[1:]:
            say(f'{report.words(other)} is the same run as {report.words(first)}')
    return list(arms.values())


def shaping(cfg):
    """The options that a run's result depends on -> value: not those that its others leave without effect."""
    known, new = asdict(cfg), cfg.init_from == 'scratch'
    idle = {'out_dir', 'seed', 'backend'} | {key for key in known if key.startswith('wandb_')}
    # other weights may have an SVD or MLA that cfg does not know of
    idle |= {key for key in known if not configuration.has_effect(cfg, key) and (
        new or not key.startswith(('svd_', 'mla_')))}
    if new and not cfg.svd_truncates:
        idle |= {key for key in known if key.startswith(('use_svd', 'svd_'))}
    if not Path(cfg.dataset).is_file():
        idle.add('tokenizer')
    return {key: value for key, value in known.items() if key not in idle} | (
        {'mla_latent_dim': cfg.latent_dim} if cfg.use_mla else {})


def baseline_of(arm, arms):
    """The ordinary model of the sweep that shares most of this one's options; the first arm where there is none, or
    nothing else."""
    ordinary = [a for a in arms if not (a.cfg.svd_truncates or a.cfg.use_mla or a.cfg.layer_ranks or
                                        a.cfg.adaptive_svd or a.cfg.lora_rank is not None)]
    if len(ordinary) in (0, len(arms)):
        return arms[0]
    return max(ordinary, key=lambda other: sum(other.options.get(key) == v for key, v in arm.options.items()))


def examine(arm, set_by, device):
    """Build the arm's model as train.py does, its data set prepared first -> its costs, and the data. Raises UserError
    as train.py does. The arm's cfg then has what the model decided, the vocabulary for one."""
    cfg = arm.cfg
    data = Dataset(locate(cfg.dataset, cfg.tokenizer))
    huggingface.check_tokenizer(cfg, set_by, None, data, lambda words: None)
    try:
        model = build_model(cfg, set_by, None, data, lambda words: None)
    except ValueError as e:
        raise UserError(str(e)) from None
    c = model.config
    text = data.meta.get('sha256') or [len(data.tokens(split)) for split in ('train', 'val')]
    return {'parameters': model.get_num_params(), 'chance': math.log(data.vocab_size), 'text': text,
            'cache_bytes': None if c.is_noncausal else model.kv_cache_bytes(1, c.block_size)}, data


def check_same_sweep(folder, record):
    """A sweep that is in the folder may be a part of this one, with the same runs. Raises UserError if it is not."""
    if not (folder / 'sweep.json').exists():
        return
    there, arms = report.load(folder), record['arms']
    difference = [f'seed {seed} there, not here' for seed in there['seeds'] if seed not in record['seeds']]
    for name, arm in there['arms'].items():
        if name not in arms:
            difference.append(f'{name} there, not here')
            continue
        here = json.loads(json.dumps(arms[name]['config']))
        if arm.get('text') != arms[name]['text']:
            difference.append(f'{name} has another text there than {here["dataset"]!r} is now')
        same = ['dataset'] if isinstance(arm.get('text'), str) else []                          # by its checksum
        difference += [f'{key}={arm["config"].get(key)!r} there, {here.get(key)!r} here' for key in {
            **here, **arm['config']} if key not in same and here.get(key) != arm['config'].get(key)]
    if difference:
        raise UserError(f"sweep={str(folder)!r}: holds another sweep: {difference[0]} (nearest: {unused(folder)})")


# ----------------------------------------------------------------------------------------------------------------------
# running and timing

def job_of(arm, seed, folder, group):
    name = report.run_name(arm.name, seed)
    out, script = folder / 'runs' / name, str(Path(__file__).with_name('train.py'))
    here = [f'--out_dir={str(out)!r}', f'--device={arm.cfg.device!r}']
    run_name = [f'--wandb_run_name={name!r}', f'--wandb_group={group!r}'] if arm.cfg.wandb_log else []
    return sweep.Job(name, out, arm.cfg.max_iters, [script, *arm.argv, f'--seed={seed}', *here, *run_name],
                     [script, '--init_from=resume', *here])


def train_all(jobs, cfg, folder, device):
    """Run what is not finished -> names of those that failed."""
    done = [job for job in jobs if sweep.result(job.folder, job.steps)]
    started = {job.name for job in jobs if sweep.has_checkpoint(job.folder)} - {job.name for job in done}
    print(f'{len(jobs)} runs in {folder / "runs"}: {len(done)} done, {len(started)} to resume, '
          f'{len(jobs) - len(done) - len(started)} to do; {cfg.jobs} at a time, '
          f'{sweep.shared_threads(cfg.jobs)["OMP_NUM_THREADS"]} threads each', flush=True)
    count = len(done)

    def ended(job, code, seconds):
        nonlocal count
        count += 1
        final = sweep.result(job.folder, job.steps)
        append_json(folder / 'runs.jsonl', {'name': job.name, 'code': code, 'seconds': round(seconds, 2),
                                            'resumed': job.name in started, 'jobs': cfg.jobs})
        words = f'{job.name}: {report.losses(final)}, {seconds:.0f} s' if final and not code else sweep.why(job, code)
        print(f'[{count}/{len(jobs)}] {words}', flush=True)
    return sweep.run_all(jobs, cfg.jobs, ended, sweep.gpus(cfg.device, device, cfg.jobs, print))


def measure(arms, runs, record, folder, device):
    """Each arm's step against its baseline's, in turn, alone on the machine, to timing.json, where it is not there."""
    known, by_name = report.read_times(folder), {arm.name: arm for arm in arms}
    for arm in arms:
        baseline = record['arms'][arm.name]['baseline']
        finished = any(sweep.result(job.folder, job.steps) for other, job in runs if other is arm)
        if arm.cfg.adaptive_svd:                                    # what it costs is in some steps only
            print(f'{arm.name}: steps not timed, those with an analysis take longer', flush=True)
            continue
        if arm.name == baseline or not finished or known.get(arm.name, {}).get('baseline') == baseline:
            continue
        print(f'timing steps of {arm.name} against {baseline}', flush=True)
        own, other = (step_of(one.cfg, device) for one in (arm, by_name[baseline]))
        own(), other()                                              # what only the first one does
        pairs = int(TIMED_SECONDS / (time_it(own, device) + time_it(other, device)))
        pairs = min(max(pairs, MIN_PAIRS), MAX_PAIRS)
        times, more = paired_benchmark(own, other, pairs, device), micro_steps(arm.cfg) / micro_steps(by_name[baseline].cfg)
        known[arm.name] = times | {
            'ratio': more * times['ratio'], 'ratio_quartiles': [more * ratio for ratio in times['ratio_quartiles']],
            'baseline': baseline, 'pairs': pairs, 'device': device, 'threads': torch.get_num_threads()}
        write_atomically(folder / 'timing.json', json.dumps(known, indent=1).encode())


def micro_steps(cfg):
    return cfg.gradient_accumulation_steps


def list_runs(runs, data, folder, device):
    """Print the runs (arm, job), what they have come to, and the time that is left. -> exit code 0."""
    ended, left, seconds, sources = tracking.read_json_lines(folder / 'runs.jsonl'), 0.0, {}, set()
    for arm, job in runs:
        share, state = 1.0, 'to do'
        if sweep.result(job.folder, job.steps):
            share, state = 0.0, 'done'
        elif sweep.has_checkpoint(job.folder):
            step = max((row['iter'] for row in tracking.read_metrics(job.folder)), default=0)
            share, state = 1 - step / max(1, job.steps), f'to resume, after step {step} or before'
        if share and arm.name not in seconds:
            names = [one.name for other, one in runs if other is arm]
            own = [row['seconds'] / row['jobs'] for row in ended
                   if row['name'] in names and not row['resumed'] and not row['code']]
            seconds[arm.name] = statistics.mean(own) if own else run_seconds(arm.cfg, data[arm.name], device)
            sources.add('finished runs of the same options' if own else f'steps timed here, {torch.get_num_threads()} '
                        'threads, one run after the other, starts not counted')
        left += share * seconds.get(arm.name, 0)
        print(f'{job.name}: {state}' + (f', about {report.duration(share * seconds[arm.name])}' if share else ''))
    print(f'{len(runs)} runs, about {report.duration(left)} left' + ''.join(f'; from {s}' for s in sorted(sources)))
    return 0


if __name__ == '__main__':
    sys.exit(main())

"""compare.py: every variant is trained once and named, an interrupted sweep ends as an
uninterrupted one, and wrong input ends in a one-line error before anything is trained."""

import csv
import itertools
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import compare
import train
from helpers import ROOT, TEXT, TINY, interrupt, rows
from runtime.data import write_dataset
from runtime.files import locked_folder
from tools import sweep, sweep_report

pytestmark = pytest.mark.usefixtures('one_thread', 'here')
SVD = [*TINY, '--use_svd=True']
LIST = '--svd_rank=None,2,4'


@pytest.fixture
def inline(in_process, monkeypatch, call):
    """inline(*argv) runs compare.py in this process, one run after the other, and returns code,
    out, err and the names of the trained runs. Step times are fake: the first timed variant takes
    as long as the baseline, the second twice as long, and so on."""
    def inline(*argv):
        in_process.clear()
        ratios = itertools.count(1.0)
        monkeypatch.setattr(sweep, 'paired_benchmark',
                            lambda *args: dict(ratio=next(ratios), ratio_quartiles=[.5, 4.0]))
        return SimpleNamespace(**vars(call(compare.main, *argv)), names=list(in_process))
    return inline


@pytest.fixture
def swept(inline, trained_once):
    """`inline` with a finished sweep of LIST in out-compare, which is made once per session."""
    kept = trained_once().parent / 'out-compare'
    if not kept.exists():
        assert inline(*SVD, LIST).code == 0
        shutil.copytree('out-compare', kept)
    shutil.copytree(kept, 'out-compare', dirs_exist_ok=True)
    return inline


@pytest.fixture
def no_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)


def results(folder='out-compare'):
    """Return the rows of results.json without times."""
    rows = json.loads(Path(folder, 'results.json').read_text())['rows']
    return [{key: value
             for key, value in row.items()
             if not key.startswith('step_')}
            for row in rows]


def pictures():
    return {path.stem for path in Path('out-compare').glob('*.png')
            if path.read_bytes().startswith(b'\x89PNG')}


# --------------------------------------------------------------------------------------------------
# planning the runs

@pytest.mark.parametrize('text, parts', [
    ('4', ['4']), ('None,4', ['None', '4']), ("'a,b',c", ['a,b', 'c']), ('"a,b"', ["'a,b'"]),
    ("'a,b','c'", ["'a,b'", "'c'"]), ('gram, randomized', ['gram', 'randomized']),
    ("{'c':8,'d':8},None", ["{'c': 8, 'd': 8}", 'None']), ('', []), ('4,,8', ['4', '', '8'])])
def test_values_are_split_at_commas_of_their_own(text, parts):
    """A list is split at commas, except inside quotes and brackets."""
    assert compare.split_list(text) == parts


def variants_of(*argv):
    values, lists, set_by, rest = compare.read_lists([*TINY, *argv])
    return sweep.expand_grid(compare.CompareConfig, values, lists, set_by, rest)


@pytest.mark.parametrize(
    'argv, names',
    [('', ['run']), ('--use_svd=True ' + LIST, ['svd_rank=None', 'svd_rank=2', 'svd_rank=4']),
     ('--use_svd=True --svd_rank=None,8,2 --svd_method=gram,randomized', [
         'svd_rank=None,svd_method=gram', 'svd_rank=2,svd_method=gram',
         'svd_rank=2,svd_method=randomized'
     ]),
     ('--use_svd=True --svd_rank=None,2 --svd_method=gram,randomized',
      ['svd_rank=None', 'svd_rank=2,svd_method=gram', 'svd_rank=2,svd_method=randomized']),
     ('--svd_rank=2,4 --use_svd=False,True',
      ['use_svd=False', 'svd_rank=2,use_svd=True', 'svd_rank=4,use_svd=True']),
     ('--use_mla=False,True --mla_latent_dim=None,4,8',
      ['use_mla=False', 'use_mla=True,mla_latent_dim=None', 'use_mla=True,mla_latent_dim=8']),
     ('--use_svd=True --svd_rank=2 --svd_method=gram,randomized --svd_power_iters=1,2', [
         'svd_method=gram', 'svd_method=randomized,svd_power_iters=1',
         'svd_method=randomized,svd_power_iters=2'
     ]),
     ('--layer_ranks=None,{"h.0.mlp.c_fc":3,"h.0.attn.c_proj":2}',
      ['layer_ranks=None', 'layer_ranks=__h.0.mlp.c_fc___3___h.0.attn.c_proj___2_']),
     ('--use_svd=True --svd_scope=causal --svd_rank=None,2 --svd_block=2,16',
      ['svd_rank=None,svd_block=2', 'svd_rank=2,svd_block=2']),
     ("--use_svd=True --svd_rank=2 --svd_targets='k,v','v,k',v --n_kv_head=None,2",
      ['svd_targets=k_v,n_kv_head=None', 'svd_targets=v,n_kv_head=None']),
     ('--learning_rate=1e-2,.01,2e-2', ['learning_rate=0.01', 'learning_rate=0.02'])])
def test_combinations_that_are_the_same_run_are_one(argv, names):
    """Variants that are the same run are trained once. Heads are 8 wide, so rank 8 is full and
    means no SVD. A latent of 4 is the default, n_embd / 4."""
    assert [variant.name for variant in variants_of(*argv.split())] == names


@pytest.mark.parametrize('argv', [[LIST, '--svd_method=gram,randomized', '--use_svd=True'],
                                  ["--adaptive_svd_targets='c_q,c_v',c_q", '--adaptive_svd=True'],
                                  ['--layer_ranks=None,{"h.0.mlp.c_fc":3,"h.0.mlp.c_proj":2}',
                                   '--dtype=auto,bfloat16'],
                                  ['config.py', '--n_embd=32,16', '--svd_rank=3']])
def test_train_py_is_given_what_was_planned(argv):
    """train.py gets exactly the options of the planned variant, with the seed, folder and names of
    its run."""
    Path('config.py').write_text('use_svd = True\nsvd_scope = "causal"\n')
    for variant in variants_of(*argv):
        name = f'{variant.name},seed=7'
        cfg, _, _ = train.load_config(sweep.job_of(variant, 7, Path('out-x')).argv[1:])
        own = dict(seed=7, out_dir=f'out-x/runs/{name}', wandb_run_name=name, wandb_group='out-x')
        assert vars(cfg) == {key: (vars(variant.cfg) | own)[key] for key in vars(cfg)}


@pytest.mark.parametrize(
    'argv, baselines',
    [([LIST, '--use_svd=True'], ['svd_rank=None'] * 3),
     (['--svd_rank=2,4', '--use_svd=True'], ['svd_rank=2'] * 2),
     (['--learning_rate=.1,.2'], ['learning_rate=0.1'] * 2),
     (['--svd_rank=2,None', '--learning_rate=.1,.2', '--use_svd=True'
       ], ['svd_rank=None,learning_rate=0.1', 'svd_rank=None,learning_rate=0.2'] * 2),
     (['--use_mla=True,False', '--use_svd=True', '--svd_rank=2,None'
       ], ['use_mla=False,svd_rank=None'] * 4),
     (['--n_kv_head=1,None'], ['n_kv_head=None'] * 2)])
def test_the_baseline_is_the_ordinary_model_with_the_same_other_options(argv, baselines):
    """The baseline of a variant is the model without SVD or MLA and with the same other options."""
    variants = variants_of(*argv)
    assert [sweep.find_baseline(variant, variants).name for variant in variants] == baselines


@pytest.mark.parametrize('argv, words', [
    *(([*TINY, *option.split()], words) for option, words in (
        ('--svd_rank=4,x', 'svd_rank'), ('--svd_rank=4,0', 'svd_rank=0: '),
        ('--svd_rank=4,,8', 'svd_rank'), ('--svd_method=gram,randomised', "nearest: 'randomized'"),
        ('--svd_rnk=4,8', 'nearest: --svd_rank'), ('--n_embd=16,17', 'n_embd=17'),
        ('--dataset=toy,nowhere', 'dataset=nowhere'), ('--out_dir=x', 'nearest: --sweep=FOLDER'),
        ('--wandb_run_name=mine', 'wandb_run_name'), ('--init_from=scratch,resume', 'init_from='),
        ('--eval_only=True', 'eval_only=True'), ('--seeds=0', 'seeds=0'), ('--jobs=1,2', 'jobs'),
        ('--device=cpu,cuda', 'device'), ('--seed=1,2 --seeds=2', 'seeds=2: '),
        ('--lora_rank=2,4', 'lora_rank=2'), ('--sweep=', 'sweep='), ('--sweep=.', "sweep='.'"),
        ('--sweep=own.py', "sweep='own.py'"), ('--sweep=theirs', 'runs'), ('own.py', '--seeds=3'),
        ('none.py', 'none.py'))), ([], 'sweep='), (['--sweep=out-none'], 'out-none'),
    (['--sweep'], 'sweep'), (['--seeds=3'], 'seeds: '), (['--sweep=out', '--dry_run'], 'dry_run: ')
], ids=str)
def test_wrong_input_is_one_line_before_anything_is_trained(argv, words, refused):
    Path('own.py').write_text('seeds = 3\n')
    theirs = Path('theirs/runs/run,seed=1337/metrics.jsonl')
    theirs.parent.mkdir(parents=True)
    theirs.write_text('{}')
    assert words in refused(compare.main, *argv)
    assert not Path('out-compare').exists() and theirs.read_text() == '{}'


def test_a_value_that_a_loaded_model_cannot_have_is_refused(trained, refused):
    trained()
    assert 'lora_rank=9999' in refused(compare.main, '--init_from=out', '--dataset=toy',
                                       '--device=cpu', '--block_size=8', '--lora_rank=2,9999')
    assert not Path('out-compare').exists()


def test_torchrun_is_refused(refused, monkeypatch):
    monkeypatch.setenv('RANK', '0')
    assert 'RANK' in refused(compare.main, *TINY)


def test_a_folder_with_a_sweep_going_on_is_refused(refused):
    with locked_folder('out-compare', 'sweep'):
        assert "sweep='out-compare'" in refused(compare.main, *SVD, LIST)


# --------------------------------------------------------------------------------------------------
# results

@pytest.mark.slow
def test_a_finished_sweep_is_not_repeated_but_grows(swept, refused):
    """A finished sweep is not trained again. It can get more values and seeds, and nothing else can
    change."""
    first = results()
    for argv in ([*SVD, LIST], ['--sweep=out-compare']):
        again = swept(*argv)
        assert (again.code, again.names, results()) == (0, [],
                                                        first) and 'timing steps' not in again.out
    assert '+-' not in again.out and first[0]['parallel_se'] is None
    grown = swept(*SVD, LIST + ',5', '--seeds=2')
    assert grown.code == 0 and len(grown.names) == 5 and grown.out.count('timing steps') == 1
    assert [row['parallel'][:1] for row in results()[:3]] == [row['parallel'] for row in first]
    check_table(grown.out)
    for other in ([LIST, '--seeds=2'], [LIST + ',5'], [LIST + ',5', '--seeds=2', '--max_iters=3']):
        assert "sweep='out-compare'" in refused(compare.main, *SVD, *other)
    write_dataset('data/toy', TEXT[::-1], 'char', source='tests')   # another text
    assert "sweep='out-compare'" in refused(compare.main, *SVD, LIST + ',5', '--seeds=2')


def check_table(printed):
    """Check the means and standard errors of two seeds in every result file."""
    finals = [rows(f'out-compare/runs/svd_rank=2,seed={seed}')[-1] for seed in (1337, 1338)]
    prefix = [final['val/prefix_loss'] for final in finals]
    mean, error, row = statistics.mean(prefix), statistics.stdev(prefix) / 2 ** .5, results()[1]
    assert row == row | dict(
        parallel=[final['val/loss'] for final in finals], prefix_only=prefix, prefix_only_mean=mean,
        prefix_only_se=pytest.approx(error), options={'svd_rank': 2}, seeds=[1337, 1338])
    assert [row['cache_bytes'] for row in results()] == [2 * 16 * 16 * 4] + [None] * 3
    base = [rows(f'out-compare/runs/svd_rank=None,seed={seed}')[-1]['val/loss']
            for seed in (1337, 1338)]
    own = [a - b for a, b in zip(prefix, base)]
    assert row['difference'] == pytest.approx(statistics.mean(own))
    assert row['difference_high'] - row['difference'] == pytest.approx(
        12.706 * abs(own[0] - own[1]) / 2)
    for words in (f'| {mean:.4f} +- {error:.4f} |', f'| {statistics.mean(own):+.4f} (',
                  'Baseline: svd_rank=None',
                  f'chance: {math.log(17):.2f}'):
        assert words in printed and words in Path('out-compare/results.md').read_text()
    table = [*csv.DictReader(Path('out-compare/results.csv').read_text().splitlines())]
    assert [(row['svd_rank'], float(row['step_ratio'])) for row in table] == [('', 1), ('2', 1),
                                                                              ('4', 2), ('5', 1)]


@pytest.mark.parametrize('n, quantile', [(2, 12.7062), (3, 4.3027), (10, 2.2622), (31, 2.0423),
                                         (32, 2.0395), (101, 1.9840)])
def test_differences_to_the_baseline_are_paired_by_seed(n, quantile):
    """The interval is that of a paired t-test over the seeds that both variants have. quantile:
    scipy.stats.t.ppf(0.975, n - 1)."""
    differences = [.1 + .01 * (i % 3) for i in range(n)]
    baseline = {'seeds': [7, *range(n)], 'prefix_only': [9., *(i / 10 for i in range(n))]}
    row = {'seeds': [*range(n)][::-1],
           'prefix_only': [i / 10 + differences[i] for i in range(n)][::-1]}
    mean, low, high = sweep_report.paired_difference(row, baseline)
    half = quantile * statistics.stdev(differences) / n ** .5
    assert (mean, low, high) == pytest.approx(
        (statistics.mean(differences), mean - half, mean + half), rel=1e-4)
    assert sweep_report.paired_difference(baseline, baseline) == (None, None, None)
    row['seeds'] = row['seeds'][:1]
    assert sweep_report.paired_difference(row, baseline) == (pytest.approx(differences[-1]), None,
                                                             None)


@pytest.mark.usefixtures('no_matplotlib')
def test_what_was_interrupted_ends_as_what_was_not(swept, monkeypatch):
    """A sweep that was interrupted by SIGTERM ends with the results of an uninterrupted one."""
    Path('out-compare').rename('whole')
    interrupt(monkeypatch, 7, signal.SIGTERM)  # in the third step of the second run
    stopped = swept(*SVD, LIST)
    assert stopped.code in (1,
                            143) and sweep.has_checkpoint('out-compare/runs/svd_rank=2,seed=1337')
    again = swept(*SVD, LIST)
    assert again.code == 0 and again.names[0] == 'svd_rank=2,seed=1337' and results() == results(
        'whole')


@pytest.mark.usefixtures('no_matplotlib')
def test_a_failed_run_is_named_and_the_rest_is_compared(inline):
    """A failed run is named with its last line, and the other runs are compared. With a learning
    rate of 1e30 the loss is not finite. Seeds may be given as a list."""
    for trained in (4, 2):
        found = inline(*TINY, '--learning_rate=1e-2,1e30', '--seed=5,9', '--grad_clip=0')
        assert found.code == 1 and len(found.names) == trained
        assert 'learning_rate=1e+30,seed=9: failed, exit code 1: its last line' in found.out
    assert [row['seeds'] for row in results()] == [[5, 9], []]
    assert inline(*TINY, '--learning_rate=1e30', '--grad_clip=0', '--sweep=none').code == 1


@pytest.mark.usefixtures('no_matplotlib')
def test_a_dry_run_lists_states_and_times_and_changes_nothing(swept):
    """--dry_run lists the state and the estimated time of each run, and changes no file."""
    new = swept(*SVD, LIST, '--dry_run', '--sweep=new')
    assert (new.code, new.out.count(': to do, 0 of '), Path('new').exists()) == (0, 3, False)
    Path('out-compare/runs/svd_rank=4,seed=1337/metrics.jsonl').write_text(
        '{"iter": 2, "loss": 1.0}\n')
    found = swept(*SVD, LIST, '--dry_run', '--seeds=2')
    assert 'svd_rank=2,seed=1337: done' in found.out
    assert 'svd_rank=4,seed=1337: to resume, 2 of ' in found.out
    assert found.names == [] and found.out.count(', about ') == 5


@pytest.mark.usefixtures('no_matplotlib')
def test_a_folder_that_lacks_files_is_read_as_far_as_it_goes(swept):
    """A sweep folder with missing files gives a table of what is left and names the unfinished
    runs."""
    for number, name in enumerate(
        ('runs/svd_rank=2,seed=1337', 'runs/svd_rank=4,seed=1337/metrics.jsonl', 'timing.json',
         *(f'{name}.png' for name in pictures()))):
        Path('out-compare', name).rename(f'lost{number}')
    found = swept('--sweep=out-compare')
    assert found.code == 0 and not pictures() and [len(row['seeds'])
                                                   for row in results()] == [1, 0, 0]
    for words in ('svd_rank=2: not finished', 'svd_rank=4: not finished', 'pip install matplotlib'):
        assert words in found.out


@pytest.mark.parametrize('name, text', [('sweep.json', '{'), ('sweep.json', '[1]'),
                                        ('sweep.json', '{"seeds": []}'), ('timing.json', '{'),
                                        ('sweep.json', None), ('runs', None)])
def test_a_damaged_folder_is_one_line(name, text, swept, refused):
    """A damaged sweep folder ends in a one-line error."""
    Path('out-compare', name).rename('lost')
    if text:
        Path('out-compare', name).write_text(text)
    words = f'out-compare/{name}: damaged' if text == '{' else 'out-compare'
    assert words in refused(compare.main, '--sweep=out-compare')


@pytest.mark.usefixtures('no_matplotlib')
@pytest.mark.parametrize('lists, step', [
    ('--gradient_accumulation_steps=1,3', [3, 1.5, 12]), ('--adaptive_svd=False,True', [None] * 3)])
def test_micro_batches_count_and_adaptive_steps_are_not_timed(inline, lists, step):
    """Step times count all micro-batches of a step. Adaptive SVD is not timed."""
    inline(*TINY, lists)
    one, other = ([row[f'step_ratio{end}'] for end in ('', '_low', '_high')]
                  for row in json.loads(Path('out-compare/results.json').read_text())['rows'])
    assert one == [1, None, None] and other == step


@pytest.mark.slow
def test_a_sweep_at_wandb_is_a_group_with_the_figures(swept, monkeypatch):
    """On wandb a sweep is a group of its trained runs and one more run with the figures."""
    made, logged = [], {}
    run = SimpleNamespace(define_metric=lambda *args, **options: None,
                          finish=lambda exit_code: None, log=logged.update)
    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(
        Image=Path, init=lambda **options: made.append(options) or run))
    assert swept(*SVD, LIST + ',5', '--wandb_log=True', '--wandb_group=ours').code == 0
    names = [(options['name'], options['group']) for options in made]
    assert names == [('svd_rank=5,seed=1337', 'ours'), ('out-compare', 'ours')]
    assert pictures() == {'loss', 'curves', 'pareto'} <= logged.keys()


@pytest.mark.parametrize(
    'argv, drawn', [(['--n_embd=16,32', '--eval_interval=4'], {'loss', 'pareto'}), ([], {'curves'}),
                    pytest.param(['--layer_ranks=None,{"h.0.mlp.c_fc":3}', '--gelu=exact,tanh'],
                                 {'loss', 'curves', 'pareto'}, marks=pytest.mark.slow)])
def test_figures_that_make_no_sense_are_not_drawn(argv, drawn, inline):
    """A figure is only drawn if the data allow it. Otherwise a line says why not."""
    found = inline(*TINY, *argv)
    assert found.code == 0 and pictures() == drawn
    assert all(f'{name}.png: ' in found.out for name in {'loss', 'curves', 'pareto'} - drawn)


# --------------------------------------------------------------------------------------------------
# as a separate process

def start(*argv):
    real = [*SVD, '--svd_rank=None,2', '--seeds=2', '--max_iters=200', '--lr_decay_iters=200',
            '--eval_interval=20']
    return subprocess.Popen([sys.executable, ROOT / 'compare.py', *real, *argv],
                            start_new_session=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {'OMP_NUM_THREADS': '1'})


@pytest.mark.slow
def test_a_sweep_killed_at_three_random_moments_ends_with_the_same_table():
    """A sweep that is killed three times at random moments ends with the same table. The kills hit
    compare.py alone, then its whole process group with all runs, then compare.py alone again. They
    come within a third of the sweep's duration, so that some work is left each time."""
    began, whole = time.monotonic(), start('--sweep=whole', '--jobs=2')
    output = whole.communicate()[0]
    assert whole.returncode == 0, output
    duration = time.monotonic() - began
    for kill in (os.kill, os.killpg, os.kill):
        process = start('--jobs=2')
        time.sleep(random.uniform(0, duration / 3))
        kill(process.pid, signal.SIGKILL)
        process.wait()
    last = start('--jobs=2')
    output = last.communicate()[0]
    assert last.returncode == 0, output
    assert results() == results('whole') and not list(Path('out-compare').rglob('*.tmp'))

"""compare.py: every combination once, each named; tables of known numbers; interrupted sweeps end as undisturbed ones;
old ones are read back; wrong input is one line before anything is trained."""

import csv
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

import compare
import compare_report as report
import train
from helpers import ROOT, TINY, rows
from runtime import config as configuration
from runtime import plots, sweep
from runtime.config import UserError

pytestmark = pytest.mark.usefixtures('one_thread', 'here')
SVD = [*TINY, '--use_svd=True']
LIST = '--svd_rank=None,2,4'


@pytest.fixture
def inline(in_process, monkeypatch, call):
    """inline(*argv) is compare.py whose runs are trained in this process, one after the other -> code, out, err, and
    the names of the runs that were trained."""
    monkeypatch.setattr(compare, 'TIMED_SECONDS', 0)

    def inline(*argv):
        in_process.clear()
        result = call(compare.main, *argv)
        result.names = list(in_process)
        return result
    return inline


def results(folder='out-compare'):
    """results.json without what a clock says."""
    found = json.loads(Path(folder, 'results.json').read_text())
    for row in found['rows']:
        del row['step_time']
    return found


def results_with_times(folder='out-compare'):
    return [row['step_time'] for row in json.loads(Path(folder, 'results.json').read_text())['rows']]


# ----------------------------------------------------------------------------------------------------------------------
# which runs

@pytest.mark.parametrize('text, parts', [
    ('4', ['4']), ('None,4', ['None', '4']), ("'a,b',c", ["'a,b'", 'c']), ('"a,b"', ['"a,b"']),
    ("it's,b", ["it's", 'b']),
    ("{'h.0.mlp.c_fc':8,'h.1.mlp.c_fc':8},None", ["{'h.0.mlp.c_fc':8,'h.1.mlp.c_fc':8}", 'None']),
    ('(1,[2,3]),4', ['(1,[2,3])', '4']), ("{'a]':1,'b':2},3", ["{'a]':1,'b':2}", '3']), ('', ['']), ('a,', ['a', '']),
    ('1),2', ['1)', '2'])])
def test_values_are_split_at_commas_of_their_own(text, parts):
    assert compare.split(text) == parts


def arms_of(*argv):
    cfg, lists, set_by, plain = compare.read([*TINY, *argv])
    said = []
    return compare.plan(cfg, lists, set_by, plain, said.append), said


@pytest.mark.parametrize('argv, names', [
    ([], ['run']),
    (['--use_svd=True', LIST], ['svd_rank=None', 'svd_rank=2', 'svd_rank=4']),
    (['--use_svd=True', '--svd_rank=None,8,2', '--svd_method=gram,randomized'],
     ['svd_rank=None,svd_method=gram', 'svd_rank=2,svd_method=gram', 'svd_rank=2,svd_method=randomized']),
    (['--use_svd=True', '--svd_rank=None,2', '--svd_method=gram,randomized'],
     ['svd_rank=None', 'svd_rank=2,svd_method=gram', 'svd_rank=2,svd_method=randomized']),
    (['--svd_rank=2,4', '--use_svd=False,True'],
     ['use_svd=False', 'svd_rank=2,use_svd=True', 'svd_rank=4,use_svd=True']),
    (['--use_mla=False,True', '--mla_latent_dim=None,4,8'],
     ['use_mla=False', 'use_mla=True,mla_latent_dim=None', 'use_mla=True,mla_latent_dim=8']),
    (['--use_svd=True', '--svd_rank=2', '--svd_method=gram,randomized', '--svd_power_iters=1,2'],
     ['svd_method=gram', 'svd_method=randomized,svd_power_iters=1', 'svd_method=randomized,svd_power_iters=2']),
    (['--layer_ranks=None,{"h.0.mlp.c_fc":3,"h.0.attn.c_proj":2}'],
     ['layer_ranks=None', 'layer_ranks=__h.0.mlp.c_fc___3___h.0.attn.c_proj___2_']),
    (['--use_svd=True', '--svd_scope=causal', '--svd_rank=None,2', '--svd_block=2,16'],
     ['svd_rank=None,svd_block=2', 'svd_rank=2,svd_block=2']),
    (['--learning_rate=1e-2,.01,2e-2'], ['learning_rate=0.01', 'learning_rate=0.02'])])
def test_combinations_that_are_the_same_run_are_one(argv, names):
    """A full rank is no SVD: heads are 8 wide. A latent of n_embd / 4 is the default."""
    arms, said = arms_of(*argv)
    assert [arm.name for arm in arms] == names
    lists = compare.read([*TINY, *argv])[1]
    combinations = 1
    for values in lists.values():
        combinations *= len(values)
    assert len(said) == combinations - len(names)


@pytest.mark.parametrize('argv', [[LIST, '--svd_method=gram,randomized', '--use_svd=True'],
                                  ["--adaptive_svd_targets='c_q,c_v',c_q", '--adaptive_svd=True'],
                                  ['--layer_ranks=None,{"h.0.mlp.c_fc":3,"h.0.mlp.c_proj":2}', '--dtype=auto,bfloat16'],
                                  ['config.py', '--n_embd=32,16', '--svd_rank=3']])
def test_train_py_is_given_what_was_planned(argv):
    Path('config.py').write_text('use_svd = True\nsvd_scope = "causal"\n')
    arms, _ = arms_of(*argv)
    assert len(arms) > 1
    for arm in arms:
        job = compare.job_of(arm, 7, Path('out-x'), 'group')
        cfg, _, _ = train.load_config(job.argv[1:])
        folder = str(Path('out-x', 'runs', f'{arm.name},seed=7'))
        assert cfg == configuration.build(train.TrainConfig, vars(arm.cfg) | dict(seed=7, out_dir=folder), {})


@pytest.mark.parametrize('argv, baselines', [
    ([LIST, '--use_svd=True'], ['svd_rank=None'] * 3),
    (['--svd_rank=2,4', '--use_svd=True'], ['svd_rank=2'] * 2),
    (['--learning_rate=.1,.2'], ['learning_rate=0.1'] * 2),
    (['--svd_rank=2,None', '--learning_rate=.1,.2', '--use_svd=True'],
     ['svd_rank=None,learning_rate=0.1', 'svd_rank=None,learning_rate=0.2'] * 2),
    (['--use_mla=True,False', '--use_svd=True', '--svd_rank=2,None'], ['use_mla=False,svd_rank=None'] * 4)])
def test_the_baseline_is_the_ordinary_model_with_the_same_other_options(argv, baselines):
    arms, _ = arms_of(*argv)
    assert [compare.baseline_of(arm, arms).name for arm in arms] == baselines


WRONG = [
    ('--svd_rank=4,x', 'svd_rank'), ('--svd_rank=4,0', 'svd_rank=0: must be at least 1'),
    ('--svd_method=gram,randomised', "nearest: 'randomized'"), ('--svd_rnk=4,8', 'nearest: --svd_rank'),
    ('--svd_rank=4,,8', 'empty value'), ('--n_embd=16,17', 'n_embd=17'), ('--dataset=toy,nowhere', 'dataset=nowhere'),
    ('--block_size=16,100000', 'block_size=100000'), ('--out_dir=x', 'nearest: --sweep=FOLDER'),
    ('--init_from=resume', 'resumes its runs by itself'), ('--init_from=scratch,resume', 'resumes its runs by itself'),
    ('--eval_only=True', 'compares training'), ('--seeds=0', 'seeds=0'), ('--jobs=0', 'jobs=0'),
    ('--jobs=1,2', 'jobs'), ('--device=cpu,cuda', 'device'), ('--wandb_log=True,False', 'wandb_log'),
    ('--wandb_run_name=mine', 'wandb_run_name'), ('--seed=1,2 --seeds=2', 'not together'),
    ('--lora_rank=2,4', 'lora_rank=2'),
    ('--sweep=.', 'sweep'), ('--sweep=~', 'sweep'),
    ('--sweep=data', 'holds something else'), ('--seed=-1,2', 'seed=-1'),
    ('own.py', 'nearest: --seeds=3'), ('none.py', 'no such config file')]


@pytest.mark.parametrize('option, words', WRONG)
def test_wrong_input_is_one_line_before_anything_is_trained(option, words, refused, monkeypatch):
    monkeypatch.setattr(sweep, 'run_all', None)
    Path('own.py').write_text('seeds = 3\n')
    assert words in refused(compare.main, *TINY, *option.split())
    assert not Path('out-compare').exists()


@pytest.mark.parametrize('argv, words', [
    ([], 'holds no sweep'), (['--sweep=out-none'], 'holds no sweep'), (['--sweep'], 'needs a value'),
    (['--seeds=3'], 'seeds=3: of what?'), (['--sweep=out', '--dry_run'], 'dry_run=True: of what?')])
def test_nothing_to_compare_is_one_line(argv, words, refused):
    assert words in refused(compare.main, *argv)


def test_it_is_not_for_torchrun(refused, monkeypatch):
    monkeypatch.setenv('RANK', '0')
    assert 'starts its own' in refused(compare.main, *TINY)


# ----------------------------------------------------------------------------------------------------------------------
# what comes of them

def test_a_sweep_is_made_once_grows_and_is_read_back(inline, refused):
    found = inline(*SVD, LIST, '--svd_method=gram,randomized', '--seeds=2')
    assert found.code == 0, found.err
    assert len(found.names) == 10
    assert found.names[:2] == ['svd_rank=None,seed=1337', 'svd_rank=2,svd_method=gram,seed=1337']
    assert 'svd_rank=None,svd_method=randomized is the same run as svd_rank=None,svd_method=gram' in found.out
    first, runs = results(), Path('out-compare', 'runs')
    row = first['rows'][1]
    finals = [rows(runs / f'svd_rank=2,svd_method=gram,seed={seed}')[-1] for seed in (1337, 1338)]
    prefix = [final['val/prefix_loss'] for final in finals]
    assert row['parallel'] == [final['val/loss'] for final in finals] and row['prefix_only'] == prefix
    assert row['prefix_only_se'] == statistics.stdev(prefix) / 2 ** .5
    assert f'| {statistics.mean(prefix):.4f} +- {row["prefix_only_se"]:.4f} |' in found.out
    assert [row['cache_bytes'] for row in first['rows']] == [2 * 16 * 16 * 4] + [None] * 4
    assert 'Baseline: svd_rank=None.' in found.out and 'chance: 2.83' in found.out
    assert Path('out-compare', 'results.md').read_text().startswith('| svd_rank | svd_method |')
    with open('out-compare/results.csv') as file:
        table = list(csv.DictReader(file))
    assert [line['svd_rank'] for line in table] == ['None', '2', '2', '4', '4']
    assert float(table[1]['prefix_only_mean']) == statistics.mean(prefix) and float(table[1]['step_ratio']) > 0
    for name in ('loss', 'curves', 'pareto'):
        assert Path('out-compare', f'{name}.png').read_bytes().startswith(b'\x89PNG')

    again = inline(*SVD, LIST, '--svd_method=gram,randomized', '--seeds=2')
    assert again.code == 0 and again.names == [] and 'timing steps' not in again.out and results() == first
    back = inline('--sweep=out-compare')
    assert back.code == 0 and back.names == [] and results() == first
    grown = inline(*SVD, '--svd_rank=None,2,4,5', '--svd_method=gram,randomized', '--seeds=2')
    assert grown.code == 0 and len(grown.names) == 4 and grown.out.count('timing steps') == 2
    assert [row for row in results()['rows'] if row['options']['svd_rank'] != 5] == first['rows']
    for other in ([LIST, '--seeds=3'], [LIST, '--svd_method=gram,randomized'],
                  [LIST, '--svd_method=gram,randomized', '--seeds=2', '--max_iters=3']):
        assert 'holds another sweep' in refused(compare.main, *SVD, *other)


def test_one_seed_has_no_standard_error_and_seeds_may_be_listed(inline):
    assert '+-' not in inline(*SVD, LIST).out and results()['rows'][0]['parallel_se'] is None
    found = inline(*TINY, '--seed=5,9', '--learning_rate=1e-2,2e-2', '--sweep=out-b')
    assert found.names[::2] == ['learning_rate=0.01,seed=5', 'learning_rate=0.01,seed=9']
    assert results('out-b')['seeds'] == [5, 9]


def test_what_was_interrupted_ends_as_what_was_not(inline, monkeypatch):
    """After the first evaluation of the second run, and then within its final one."""
    inline(*SVD, LIST, '--sweep=whole')
    evaluate, final = train.evaluate_and_save, train.Evaluation.final
    calls = []

    def stop_at(count, f):
        def stopping(*args, **kwargs):
            calls.append(1)
            if len(calls) == count:
                os.kill(os.getpid(), signal.SIGTERM)
            return f(*args, **kwargs)
        return stopping
    monkeypatch.setattr(train, 'evaluate_and_save', stop_at(5, evaluate))
    stopped = inline(*SVD, LIST)
    # in this process it is the run that gets the signal
    assert stopped.code in (1, 143) and sweep.has_checkpoint('out-compare/runs/svd_rank=2,seed=1337')
    monkeypatch.setattr(train, 'evaluate_and_save', evaluate)
    calls.clear()
    monkeypatch.setattr(train.Evaluation, 'final', stop_at(1, final))
    inline(*SVD, LIST)
    monkeypatch.setattr(train.Evaluation, 'final', final)
    assert inline(*SVD, LIST).code == 0 and results() == results('whole')


def test_a_failed_run_is_named_and_the_rest_is_compared(inline, monkeypatch):
    main = train.main
    monkeypatch.setattr(train, 'main', lambda argv: 1 if any('svd_rank=2' in arg for arg in argv) else main(argv))
    found = inline(*SVD, LIST, '--seeds=2')
    assert found.code == 1 and 'svd_rank=2,seed=1337: failed, exit code 1: its last line' in found.out
    assert [len(row['seeds']) for row in results()['rows']] == [2, 0, 2]
    assert found.out.count('missing, left out') == 2 and '| 2        | 0     |' in found.out
    monkeypatch.setattr(train, 'main', main)
    again = inline(*SVD, LIST, '--seeds=2')
    assert again.code == 0 and again.names == ['svd_rank=2,seed=1337', 'svd_rank=2,seed=1338']


def test_if_all_fail_it_says_so(inline, monkeypatch):
    monkeypatch.setattr(train, 'main', lambda argv: 1)
    found = inline(*SVD, LIST)
    assert found.code == 1 and found.out.count('failed, exit code 1') == 3


def test_a_dry_run_lists_states_and_times_and_changes_nothing(inline):
    found = inline(*SVD, LIST, '--dry_run')
    assert found.code == 0 and found.names == [] and not Path('out-compare').exists()
    assert found.out.count(': to do, about ') == 3 and 'from steps timed here' in found.out
    inline(*SVD, LIST)
    Path('out-compare/runs/svd_rank=4,seed=1337/metrics.jsonl').write_text('{"iter": 2, "loss": 1.0}\n')
    with open('out-compare/runs.jsonl', 'a') as file:
        file.write('{"name": "torn by a cra')
    found = inline(*SVD, LIST, '--dry_run', '--seeds=2')
    assert 'svd_rank=2,seed=1337: done' in found.out and 'svd_rank=4,seed=1337: to resume, after step 2' in found.out
    assert 'finished runs of the same options' in found.out and 'timed here' not in found.out


@pytest.mark.parametrize('lost, words', [
    (['runs/svd_rank=2,seed=1337'], 'svd_rank=2,seed=1337: missing, left out'),
    (['runs/svd_rank=2,seed=1337/metrics.jsonl'], 'svd_rank=2,seed=1337: not finished, left out'),
    (['timing.json'], '| 2        | '), (['runs'], 'has no finished run'), (['sweep.json'], 'holds no sweep')])
def test_a_folder_that_lacks_files_is_read_as_far_as_it_goes(lost, words, inline):
    inline(*SVD, LIST)
    for name in lost:
        Path('out-compare', name).rename(Path('out-compare', name).parent / 'lost')
    found = inline('--sweep=out-compare')
    assert words in found.out + found.err
    assert found.code == (2 if lost in (['runs'], ['sweep.json']) else 0)


@pytest.mark.parametrize('name', ['sweep.json', 'timing.json'])
@pytest.mark.parametrize('text', ['{', '[1]', '{"seeds": []}'])
def test_a_damaged_folder_is_one_line(name, text, inline, refused):
    inline(*SVD, LIST)
    Path('out-compare', name).write_text(text)
    assert 'damaged' in refused(compare.main, '--sweep=out-compare')


@pytest.mark.parametrize('text', ['{"lists": {}, "seeds": 1, "arms": {}}', '{"lists": {}, "seeds": [], "arms": []}',
                                  '{"lists": {}, "seeds": [1], "arms": {"a": {}}}'])
def test_a_record_of_another_shape_is_one_line(text, inline, refused):
    inline(*SVD, LIST)
    Path('out-compare/sweep.json').write_text(text)
    assert 'sweep.json: damaged' in refused(compare.main, '--sweep=out-compare')


def test_another_text_is_another_sweep(inline, refused):
    text = Path('my.txt')
    text.write_text('the cat sat on the mat\n' * 40)
    assert inline(*SVD, '--dataset=my.txt', '--svd_rank=2').code == 0
    text.write_text('the mat sat on the cat\n' * 40)
    assert "has another text there than 'my.txt' is now" in refused(
        compare.main, *SVD, '--dataset=my.txt', '--svd_rank=2', '--seeds=2')


def test_micro_batches_count_and_adaptive_steps_are_not_timed(inline, monkeypatch):
    equal = dict(a_ms=1.0, b_ms=1.0, ratio=1.0, ratio_quartiles=[0.5, 2.0])
    monkeypatch.setattr(compare, 'paired', lambda *args: equal)
    inline(*TINY, '--gradient_accumulation_steps=1,3')
    one, three = results_with_times()
    assert one['ratio'] == 1 and three['ratio'] == 3 and three['ratio_quartiles'] == [1.5, 6]
    out = inline(*TINY, '--adaptive_svd=False,True', '--sweep=other').out
    assert 'adaptive_svd=True: steps not timed' in out and results_with_times('other')[1] is None


def test_what_a_folder_called_runs_holds_is_not_touched(refused):
    row = Path('theirs/runs/run,seed=1337/metrics.jsonl')
    row.parent.mkdir(parents=True)
    row.write_text('{}')
    assert "holds something else: runs" in refused(compare.main, *SVD, LIST, '--sweep=theirs')
    assert row.read_text() == '{}'


def test_without_matplotlib_there_is_a_table(inline, monkeypatch):
    def missing(what):
        raise UserError(f'{what}: needs a package: pip install matplotlib')
    monkeypatch.setattr(plots, 'require_matplotlib', missing)
    found = inline(*SVD, LIST)
    assert found.code == 0 and 'figures: needs a package: pip install matplotlib' in found.out
    assert results() and not list(Path('out-compare').glob('*.png'))


def test_a_sweep_at_wandb_is_a_group_with_the_figures(inline, monkeypatch):
    made, jobs, real = [], [], compare.job_of

    class Told:
        def __init__(self, folder, say, **options):
            made.append((folder, options))

        def figures(self, paths):
            made.append({name: path.stat().st_size > 0 for name, path in paths.items()})

        def finish(self):
            made.append('finished')
    monkeypatch.setattr(compare, 'Tracking', Told)
    monkeypatch.setattr(compare, 'job_of', lambda *args: jobs.append(real(*args)) or jobs[-1])
    assert inline(*SVD, LIST).code == 0 and not made                # off by default
    result = inline(*SVD, LIST, '--wandb_log=True', '--wandb_project=ours')
    assert result.code == 0 and not result.names                    # the same runs: nothing is trained again
    assert made[0] == (Path('out-compare'), dict(project='ours', name='out-compare', group='out-compare'))
    assert made[1] == dict.fromkeys(('loss', 'curves', 'pareto'), True) and made[2:] == ['finished']
    assert {"--wandb_group='out-compare'", "--wandb_run_name='svd_rank=4,seed=1337'"} <= {*jobs[-1].argv}
    inline(*SVD, LIST, '--wandb_log=True', '--wandb_group=mine')
    assert made[3][1]['group'] == 'mine' and "--wandb_group='mine'" in jobs[-1].argv


@pytest.mark.parametrize('lists, axis', [
    ({'svd_rank': [None, 4, 8], 'learning_rate': [.1, .2]}, ('svd_rank', True)),
    ({'n_embd': [16, 32]}, ('n_embd', True)),
    ({'optimizer': ['adamw', 'muon'], 'n_layer': [1, 2]}, ('n_layer', True)), ({}, (None, False)),
    ({'svd_rank': [None, 4], 'gelu': ['exact', 'tanh']}, ('svd_rank', False)),
    ({'bias': [True, False]}, ('bias', False))])
def test_the_axis_is_the_rank_or_what_has_numbers(lists, axis):
    assert report.axis_of({'lists': lists}) == axis


def test_the_front_is_what_no_other_point_is_below_and_left_of():
    assert report.front([(1, 5.), (2, 6.), (3, 4.), (4, 4.), (5, 1.)]) == ([1, 3, 3, 5, 5, 5], [5., 5., 4., 4., 1., 1.])


@pytest.mark.parametrize('argv, drawn', [
    (['--optimizer=adamw,muon', '--gelu=exact,tanh'], {'loss', 'curves', 'pareto'}),
    (['--n_embd=16,32', '--eval_interval=4'], {'loss', 'pareto'}), ([], {'curves'})])
def test_figures_that_make_no_sense_are_not_drawn(argv, drawn, inline):
    found = inline(*TINY, *argv)
    assert found.code == 0 and {path.stem for path in Path('out-compare').glob('*.png')} == drawn
    assert all(f'{name}.png: ' in found.out for name in {'loss', 'curves', 'pareto'} - drawn)


# ----------------------------------------------------------------------------------------------------------------------
# as users start and stop it

REAL = [*SVD, '--svd_rank=None,2', '--seeds=2', '--max_iters=400', '--lr_decay_iters=400', '--eval_interval=20']


def start(*argv):
    return subprocess.Popen([sys.executable, ROOT / 'compare.py', *REAL, *argv], start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {'OMP_NUM_THREADS': '1'})


def wait_for(condition, process):
    until = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < until and process.poll() is None, process.stdout.read()
        time.sleep(.02)


@pytest.mark.slow
def test_a_sweep_killed_at_five_random_moments_ends_with_the_same_table():
    """By turns compare.py alone, and the whole process group, its runs with it. A third of the time that the sweep
    needs is the most between two kills, so that there is work left to disturb."""
    seed = random.randrange(10 ** 6)
    draw = random.Random(seed)
    began = time.monotonic()
    whole = start('--sweep=whole', '--jobs=2')
    assert whole.wait() == 0, whole.stdout.read()
    duration, moments = time.monotonic() - began, []
    for number in range(5):
        process = start('--jobs=2')
        moments.append(round(draw.uniform(0, duration / 3), 2))
        with suppress(subprocess.TimeoutExpired):
            process.wait(moments[-1])
        with suppress(ProcessLookupError):
            (os.killpg if number % 2 else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
    print(f'seed {seed}: killed after {moments} s of {duration:.0f} s')
    last = start('--jobs=2')
    output = last.communicate()[0]
    assert last.returncode == 0, output
    assert results() == results('whole') and results()['rows'][1]['parallel_se'] > 0
    assert not list(Path('out-compare').rglob('*.tmp'))


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(number):
    process, run = start(), Path('out-compare', 'runs', 'svd_rank=None,seed=1337')
    wait_for(lambda: len(sweep.rows(run)) > 30, process)
    process.send_signal(number)
    assert process.wait() == 128 + number
    assert f'stopped by {number.name}; what was trained is kept, and the same command goes on' in process.stdout.read()
    assert sweep.has_checkpoint(run) and 'saved to' in sweep.log_of(sweep.Job('', run, 0, (), ())).read_text()

"""tools/sweep.py: finished runs are not repeated, interrupted runs continue, failed runs are named,
and no process outlives its parent. The runs here are short scripts."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

import train
from helpers import ROOT, TINY, rows
from runtime import tracking
from runtime.cli import Interrupted, signals
from runtime.distributed import STOP_WITH_PARENT
from runtime.files import locked_folder
from tools import sweep

SCRIPT = '''
import beside
import json, os, signal, sys, time
from pathlib import Path
folder, what = Path(sys.argv[1]), sys.argv[2]
folder.mkdir(parents=True, exist_ok=True)
print('starts', what, os.environ['OMP_NUM_THREADS'], os.environ.get('SLOT'))

def save(number, frame):
    time.sleep(.5)
    (folder / 'ckpt.pt').write_text('saved')
    sys.exit(128 + number)

if what == 'fails':
    print('a bar: 1%\\r2%\\rthe reason')
    sys.exit(3)
if what == 'dies':
    os.kill(os.getpid(), signal.SIGKILL)
if what in ('waits', 'stops its parent'):
    signal.signal(signal.SIGTERM, save)
    (folder / 'ready').touch()
    if what == 'stops its parent':
        while len([*folder.parent.glob('*/ready')]) < 2:
            time.sleep(.01)
        os.kill(os.getppid(), signal.SIGTERM)
    for _ in range(10_000):                             # one long sleep may miss a signal
        time.sleep(.01)
with open(folder / 'metrics.jsonl', 'a') as f:
    f.write(json.dumps({'iter': 5, 'final': True, 'val/loss': 1.0}) + '\\n')
'''


@pytest.fixture
def job(tmp_path):
    """job(name, what) returns a Job whose script does `what`. Its resume ends well."""
    (tmp_path / 'script.py').write_text(SCRIPT)
    (tmp_path / 'beside.py').touch()  # scripts can import files next to them

    def job(name, what='ends', resume='ends'):
        folder, script = tmp_path / 'sweep' / 'runs' / name, str(tmp_path / 'script.py')
        return sweep.Job(name, folder, 5, [script, str(folder), what],
                         resume and [script, str(folder), resume])
    return job


def run(jobs, at_once=1, **others):
    """Return the names of the failed jobs, and of the ended jobs with their exit codes."""
    ended = []
    return sweep.run_all(jobs, at_once, lambda job, code, seconds: ended.append((job.name, code)),
                         **others), ended


def test_what_is_finished_is_not_repeated_and_a_failed_run_is_named(job):
    """A second call repeats failed runs only, and a failure is reported with its last line or
    signal. A run without the metrics of its last step counts as failed."""
    jobs = [job('a'), job('b', 'fails'), job('c', 'dies'), job('d')._replace(steps=6)]
    assert run(jobs) == (['b', 'c', 'd'], [('a', 0), ('b', 3), ('c', -signal.SIGKILL), ('d', 0)])
    assert sweep.failure(jobs[1], 3).startswith('b: failed, exit code 3: the reason (')
    assert 'SIGKILL' in sweep.failure(jobs[2], -signal.SIGKILL)
    assert [name for name, _ in run(jobs)[1]] == ['b', 'c', 'd'] and len(rows(jobs[0].folder)) == 1


@pytest.mark.parametrize('saved, what, resume, steps', [
    ('last.pt', 'fails', 'ends', 2), ('other', 'ends', 'fails', 1), ('ckpt.pt', 'ends', None, 2)])
def test_what_has_a_checkpoint_goes_on_and_what_has_none_begins(job, saved, what, resume, steps):
    """A run with a checkpoint is resumed and keeps its metrics and its log. A run without one
    starts again."""
    one = job('one', what, resume)
    one.folder.mkdir(parents=True)
    (one.folder / saved).touch()
    (one.folder / 'metrics.jsonl').write_text(json.dumps({'iter': 1, 'loss': 1}) + '\n{"iter"')
    sweep.log_of(one).write_text('earlier\n')
    assert tracking.read_metrics(one.folder) == [{'iter': 1, 'loss': 1}] and run(
        [one])[1] == [('one', 0)]
    assert len((one.folder / 'metrics.jsonl').read_text().splitlines()) == steps
    assert sweep.log_of(one).read_text().startswith('earlier') == (saved == 'last.pt')


def test_threads_and_slots_are_shared_out(job, one_thread):
    """Parallel runs share the CPU's threads, and each has its own environment."""
    torch.set_num_threads(7)
    jobs = [job(name) for name in 'abc']
    assert run(jobs, 3, environments=[{'SLOT': f'slot{i}'} for i in range(3)])[0] == []
    assert sorted(sweep.log_of(one).read_text() for one in jobs) == [f'starts ends 2 slot{i}\n'
                                                                     for i in range(3)]


@pytest.mark.parametrize('device, named, gpus', [
    ('cpu', '', [None]), ('mps', '', [None]), ('cuda', '', ['0', '1']), ('cuda', '5,7', ['5', '7']),
    ('cuda:1', '', [None])])
def test_gpus_are_given_out_in_turn(device, named, gpus, monkeypatch):
    """Each run gets one of the visible GPUs."""
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', named)
    assert [one.get('CUDA_VISIBLE_DEVICES') for one in sweep.gpu_environments(device)] == gpus


def test_a_signal_stops_the_runs_which_save_and_the_next_call_goes_on(job):
    """A signal to the sweep lets its runs save and stop, and the next call continues them."""
    jobs = [job('a', 'waits'), job('b', 'stops its parent'), job('c')]
    with signals, pytest.raises(Interrupted) as stopped:
        run(jobs, 2)
    assert stopped.value.signal == signal.SIGTERM
    assert all(
        (one.folder / 'ckpt.pt').exists() for one in jobs[:2]) and not jobs[2].folder.exists()
    assert run(jobs, 2)[0] == []


@pytest.mark.slow
def test_after_sigkill_a_run_saves_and_ends_and_the_next_sweep_waits_for_it(here):
    """If a sweep is killed its run, here of train.py without an end, saves and ends. The next sweep
    waits for that."""
    folder, endless = here / 'out', ['--max_iters=1000000', '--eval_interval=1000000']
    one = sweep.Job('out', folder, 1000000, [str(ROOT / 'train.py'), *TINY, *endless], None)
    code = (f'import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import PosixPath\nfrom '
            f'tools import sweep\nfrom tools.sweep import Job\nsweep.run_all([{one!r}], 1, '
            'print)\n')
    with subprocess.Popen([sys.executable, '-c', code]) as parent:
        try:
            while len(tracking.read_metrics(folder)) < 5:
                assert parent.poll() is None
                time.sleep(.02)
        finally:
            parent.kill()
    with locked_folder(folder, wait=True):
        assert (folder / 'ckpt.pt').exists()


def test_a_run_that_starts_after_the_end_of_its_sweep_ends_at_once(call, here, monkeypatch):
    monkeypatch.setenv(STOP_WITH_PARENT, '0')            # no process has this id
    found = call(train.main, *TINY)
    assert (found.code, (here / 'out').exists()) == (1, False) and 'sweep' in found.err

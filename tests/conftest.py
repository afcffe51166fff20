"""Options and fixtures of the tests: devices, a small data set, tiny runs in this process."""

import io
import os
import shutil
import signal
import subprocess
import time
from contextlib import redirect_stdout, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from helpers import TEXT, TINY
from lowrank import svd
from runtime import download
from tools import sweep
from runtime.config import UserError
from runtime.data import write_dataset
from runtime.device import pick_device


def pytest_addoption(parser):
    parser.addoption('--device', choices=('cpu', 'cuda', 'mps'),
                     help='run only the tests marked any_device, on this device')


def pytest_collection_modifyitems(config, items):
    if config.getoption('--device'):
        try:
            pick_device(config.getoption('--device'))
        except UserError as e:
            raise pytest.UsageError(str(e)) from None
        config.hook.pytest_deselected(
            items=[item for item in items if not item.get_closest_marker('any_device')])
        items[:] = [item for item in items if item.get_closest_marker('any_device')]


def pytest_runtest_setup():
    # train.py allows TF32, whose 10-bit mantissa is too coarse for the comparisons
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(scope='session')
def device(request):
    """The device on which the tests marked any_device run."""
    return request.config.getoption('--device') or 'cpu'


@pytest.fixture(scope='module')
def one_thread():
    """One thread, because tiny matrices are slower on many."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def float64_here(request, monkeypatch):
    """Run a test with and without float64. False does what a device without float64 does."""
    if request.param and request.config.getoption('--device') == 'mps':
        pytest.skip('MPS has no float64')
    monkeypatch.setattr(svd, '_lacks_float64', lambda device: not request.param)
    return request.param


@pytest.fixture(scope='session')
def toy(tmp_path_factory):
    """Folder of the data set `toy`, which is prepared once."""
    folder = tmp_path_factory.mktemp('toy') / 'toy'
    write_dataset(folder, TEXT, 'char', source='tests')
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, toy):
    """Working directory with nothing in it but data/toy."""
    shutil.copytree(toy, tmp_path / 'data' / 'toy')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(capsys):
    """call(main, *argv) runs a command and returns its exit code, out and err."""
    def call(main, *argv):
        capsys.readouterr()
        code = main([str(arg) for arg in argv])
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())
    return call


@pytest.fixture
def refused(call):
    """refused(main, *argv) asserts exit code 2 and returns the one line on stderr."""
    def refused(main, *argv):
        result = call(main, *argv)
        lines = result.err.splitlines()
        assert (result.code, len(lines)) == (2, 1), (result.code, lines)
        return lines[0]
    return refused


@pytest.fixture
def fit(call, monkeypatch):
    """fit(*options) trains the tiny model in out/ and returns what it printed.

    `options` replace those of TINY. The sample and the figure at the end are left out, because they
    take longer than the training.
    """
    monkeypatch.setattr(train, 'sample', lambda *args: '')
    monkeypatch.setattr(train, 'draw_curves', lambda *args: None)

    def fit(*options):
        result = call(train.main, *TINY, *options)
        assert result.code == 0, result.err
        return result.out
    return fit


@pytest.fixture(scope='session')
def trained_once(tmp_path_factory, toy):
    """trained_once(*options) returns the run folder of the tiny model with these options. Each
    model is trained once per session."""
    folders = {}

    def trained_once(*options):
        if options not in folders:
            work, before = tmp_path_factory.mktemp('trained'), os.getcwd()
            shutil.copytree(toy, work / 'data' / 'toy')
            os.chdir(work)
            try:
                with redirect_stdout(io.StringIO()):
                    assert train.main([*TINY, *options]) == 0
            finally:
                os.chdir(before)
            folders[options] = work / 'out'
        return folders[options]
    return trained_once


@pytest.fixture
def trained(here, trained_once):
    """trained(*options) copies a run of `trained_once` to out/ or to `folder`."""
    def trained(*options, folder='out'):
        return shutil.copytree(trained_once(*options), Path(folder))
    return trained


@pytest.fixture
def endless(here):
    """endless(command, *options) starts training that does not end, and returns the process. It
    returns after five steps. The process group is killed at the end of the test."""
    started = []

    def endless(command, *options):
        process = subprocess.Popen(
            [*command, *TINY, '--max_iters=1000000', '--eval_interval=1000000', *options],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env=os.environ | {'OMP_NUM_THREADS': '1'})
        started.append(process)
        until, metrics = time.monotonic() + 100, Path('out/metrics.jsonl')
        while not (metrics.exists() and metrics.read_text().count('\n') > 5):
            assert process.poll() is None, process.stderr.read()[-2000:]
            assert time.monotonic() < until, 'no training steps after 100 s'
            time.sleep(.05)
        return process
    yield endless
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def in_process(monkeypatch):
    """Train the runs of a sweep in this process, without the sample at the end. The fixture is the
    list of the names of these runs."""
    monkeypatch.setattr(train, 'sample', lambda *args: '')
    names = []

    def start(job, environment):
        names.append(job.name)
        sweep.log_of(job).parent.mkdir(parents=True, exist_ok=True)
        sweep.log_of(job).write_text('its last line')
        with redirect_stdout(io.StringIO()):
            code = train.main((job.resume if sweep.has_checkpoint(job.folder) else job.argv)[1:])
        return SimpleNamespace(returncode=code, poll=lambda: code)
    monkeypatch.setattr(sweep, 'start', start)
    return names


@pytest.fixture
def byte_bpe(monkeypatch):
    """Replace GPT-2's BPE by one token per byte. Other ids stand for bytes that no text has."""
    import tiktoken
    ranks = {bytes([i]): i
             for i in range(256)} | {i.to_bytes(3, 'big'): i for i in range(256, 50256)}
    encoding = tiktoken.Encoding('bytes', pat_str='(?s).', mergeable_ranks=ranks,
                                 special_tokens={'<|endoftext|>': 50256})
    monkeypatch.setattr(download, 'gpt2_encoding', lambda: encoding)
    return encoding

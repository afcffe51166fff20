"""Numbers that go bad, disks that are full, networks that nobody asked for."""

import copy
import errno
import importlib
import io
import json
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import runtime.checkpoint
import runtime.files
import runtime.run
import train
from helpers import ROOT, TEXT, TINY, checkpoint, folder_bytes, rows, same
from model import GPT, METHODS, SCOPES
from runtime import plots, progress
from runtime.dataset import locate
from runtime.files import DiskFull

pytestmark = pytest.mark.usefixtures('one_thread', 'here')
needs_full = pytest.mark.skipif(not Path('/dev/full').exists(), reason='a disk that is full by nature: Linux')
TWO_LAYERS = [*TINY, '--n_layer=2', '--max_iters=8']


# ----------------------------------------------------------------------------------------------------------------------
# numbers

@pytest.fixture
def in_step(monkeypatch):
    """in_step(number, spoil): before the forward pass of training step `number`, spoil(model) is called."""
    def in_step(number, spoil):
        class Spoilt(GPT):
            steps = 0

            def forward(self, idx, targets=None):
                if self.training and torch.is_grad_enabled():
                    Spoilt.steps += 1
                    if Spoilt.steps == number:
                        spoil(self)
                return super().forward(idx, targets)
        monkeypatch.setattr(train, 'GPT', Spoilt)
    return in_step


def poison(name, value=float('nan')):
    def spoil(model):
        with torch.no_grad():
            model.get_parameter(name).view(-1)[-1] = value
    return spoil


def poison_gradient(name):
    return lambda model: model.get_parameter(name).register_hook(lambda g: g / 0)


def overflow(name):
    return lambda model: torch.nn.init.constant_(model.get_parameter(name), 1e38)


NAMES = ['transformer.wpe.weight', 'transformer.h.0.attn.c_attn.weight', 'transformer.h.1.ln_2.weight',
         'transformer.h.1.mlp.c_fc.weight', 'transformer.ln_f.weight']


@pytest.mark.parametrize('spoil, bad', [
    *((poison(name), f'{name} (the parameter)') for name in NAMES),
    *((poison_gradient(name), f'{name} (its gradient)') for name in NAMES),
    (overflow('transformer.h.1.mlp.c_fc.weight'), 'transformer.h.1.mlp.c_fc (its output)'),
    (overflow('transformer.h.0.mlp.c_proj.weight'), 'transformer.h.1.ln_1 (its output)'),     # 1e37 still is a number,
    (overflow('transformer.h.0.attn.c_proj.weight'), 'transformer.h.0.ln_2 (its output)')])   # its square is not
def test_a_step_that_is_not_finite_is_not_taken_and_its_first_bad_layer_is_named(call, in_step, spoil, bad):
    in_step(5, spoil)
    result = call(train.main, *TWO_LAYERS)
    line = result.err.splitlines()[-1]
    assert result.code == 1 and 'Traceback' not in result.err
    assert line.startswith('train.py: training stopped: step 5: the loss is ')
    assert f'first bad layer: {bad}; the checkpoint of step 4 is kept' in line
    assert checkpoint()['iter_num'] == 4 and rows()[-1]['iter'] == 4
    assert all(p.isfinite().all() for p in checkpoint()['model'].values())


@pytest.mark.parametrize('scope', SCOPES)
@pytest.mark.parametrize('method', METHODS)
def test_a_decomposition_that_fails_is_a_step_that_is_not_finite(call, in_step, scope, method):
    in_step(5, overflow('transformer.h.1.attn.c_attn.weight'))
    result = call(train.main, *TWO_LAYERS, '--use_svd=True', '--svd_rank=2', f'--svd_scope={scope}', '--svd_block=4',
                  f'--svd_method={method}')
    assert result.code == 1 and 'training stopped: step 5: ' in result.err and 'Traceback' not in result.err
    assert 'first bad layer: transformer.h.1.attn' in result.err and checkpoint()['iter_num'] == 4


@pytest.mark.parametrize('options', [[], ['--optimizer=muon'], ['--grad_clip=0']],
                         ids=' '.join)
def test_neither_parameters_nor_optimizer_are_touched_by_a_bad_step(call, in_step, monkeypatch, options):
    seen, step = [], train.step

    def watched(run, replica):
        seen[:] = run, copy.deepcopy(state_of(run))
        return step(run, replica)

    def state_of(run):
        return {'model': run.model.state_dict(), 'optimizer': run.optimizer.state_dict()}
    monkeypatch.setattr(train, 'step', watched)
    in_step(4, poison_gradient('transformer.ln_f.weight'))
    assert call(train.main, *TWO_LAYERS, *options).code == 1
    run, before = seen
    assert same(before, state_of(run))


def test_a_loss_that_only_the_evaluation_sees_stops_before_the_checkpoint(call, monkeypatch):
    """Step 4 spoils the weights; its own loss was fine."""
    step = train.step

    def spoiling(run, replica):
        loss = step(run, replica)
        if run.iter_num == 4:
            poison('transformer.h.0.mlp.c_fc.weight')(run.model)
        return loss
    monkeypatch.setattr(train, 'step', spoiling)
    result = call(train.main, *TWO_LAYERS)
    assert result.code == 1 and 'first bad layer: transformer.h.0.mlp.c_fc.weight (the parameter)' in result.err
    assert 'the checkpoint of step 2 is kept' in result.err and checkpoint()['iter_num'] == 2


def test_an_optimizer_state_that_is_not_finite_is_never_saved(call, monkeypatch):
    step = train.step

    def spoiling(run, replica):
        loss = step(run, replica)
        if run.iter_num == 4:
            run.optimizer.state[run.model.transformer.wpe.weight]['exp_avg_sq'][0] = float('inf')
        return loss
    monkeypatch.setattr(train, 'step', spoiling)
    result = call(train.main, *TWO_LAYERS)
    words = 'optimizer.state.1.exp_avg_sq is not finite; the checkpoint of step 2 is kept'
    assert result.code == 1 and words in result.err


def test_float16_overflow_is_the_scalers_business(fit, monkeypatch):
    """On CUDA the gradient scaler starts too high on purpose: its first overflows are skipped steps, no fault."""
    class Scaler:
        """Half of torch.amp.GradScaler, on the CPU: finds an overflow in the first step and skips it."""
        def __init__(self, device, enabled):
            self.steps = 0

        def is_enabled(self):
            return True

        def get_scale(self):
            return 65536.

        def scale(self, loss):
            return loss * (float('inf') if self.steps == 0 else 1)

        def unscale_(self, optimizer):
            pass

        def step(self, optimizer):
            if self.steps:
                optimizer.step()

        def update(self):
            self.steps += 1

        def state_dict(self):
            return {}
    monkeypatch.setattr(torch.amp, 'GradScaler', Scaler)
    fit('--max_iters=4')
    assert checkpoint()['iter_num'] == 4 and checkpoint()['optimizer']['state'][0]['step'] == 3


# ----------------------------------------------------------------------------------------------------------------------
# disks

def test_a_disk_that_is_full_keeps_the_last_checkpoint_and_says_so(fit):
    """A limit on the size of files stands for it: the checkpoint of a larger model does not fit any more."""
    script = ('import resource, sys, train; resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000)); '
              'sys.exit(train.main(sys.argv[1:]))')
    fit('--max_iters=4')
    size, before = Path('out/ckpt.pt').stat().st_size, folder_bytes()['ckpt.pt']
    assert 60000 < size
    done = subprocess.run([sys.executable, '-c', script, '--init_from=resume', '--device=cpu', '--max_iters=8'],
                          capture_output=True, text=True, timeout=60, env=os.environ | {'PYTHONPATH': str(ROOT)})
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert 'out/ckpt.pt was not saved: File too large; the checkpoint of step 4 is kept' in done.stderr
    assert folder_bytes()['ckpt.pt'] == before and not list(Path('out').glob('*.tmp'))


@pytest.mark.parametrize('error', [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize('place', ['checkpoint', 'metrics'])
def test_an_out_dir_that_stops_taking_files_ends_the_run_in_order(call, monkeypatch, place, error):
    calls, module, name = [0], *((runtime.checkpoint, 'replacing') if place == 'checkpoint' else
                                 (runtime.run, 'append_json'))
    real = getattr(module, name)

    def fails(*args):
        calls[0] += 1
        if calls[0] > (1 if place == 'checkpoint' else 5):          # after the checkpoint of step 2
            raise OSError(error, os.strerror(error))
        return real(*args)
    monkeypatch.setattr(module, name, fails)
    result = call(train.main, *TWO_LAYERS)
    assert result.code == 1 and 'Traceback' not in result.err
    assert f'{os.strerror(error)}; the checkpoint of step 2 is kept' in result.err.splitlines()[-1]
    assert checkpoint()['iter_num'] == 2


@needs_full
@pytest.mark.parametrize('place, words', [
    ('metrics.jsonl', "out/metrics.jsonl: No space left on device; no checkpoint had been saved; make room there, then "
     'start again'),
    ('ckpt.pt', 'out/ckpt.pt was not saved: No space left on device; no checkpoint had been saved; make room there, '
     'then start again'),
    ('ckpt.pt of a resumed run', 'the checkpoint of step 4 is kept; make room there, then --init_from=resume '
     '--out_dir=out goes on'),
    ('config.py', "out_dir='out': cannot be written: No space left on device; make room there, then the same command "
     'again'),
    ('eval.jsonl', "No space left on device: 'out/eval.jsonl'; make room there, then the same command again")])
def test_a_full_disk_is_no_wrong_input_and_says_what_to_do(call, fit, monkeypatch, place, words):
    """Exit code 1, one line, and what was there before stays."""
    name, resumed = place.split()[0], place.endswith('run') or place == 'eval.jsonl'
    if resumed:
        fit()
    before = folder_bytes().get('ckpt.pt') if resumed else None
    full_for(monkeypatch, name)
    options = ['--init_from=resume', '--device=cpu', '--max_iters=8'] if resumed else TINY
    result = call(train.main, *options, f'--eval_only={name == "eval.jsonl"}')
    line = [line for line in result.err.splitlines() if 'step/s' not in line]
    assert result.code == 1 and len(line) == 1 and line[0].endswith(words), result.err
    assert (folder_bytes().get('ckpt.pt') if Path('out').exists() else None) == before
    assert not list(Path('.').rglob('*.tmp'))


def full_for(monkeypatch, name):
    """Writing a file of this name, or a temporary one that becomes it, finds the disk full."""
    def opened(path, mode='r', *args, **options):
        file = open(path, mode, *args, **options)
        if Path(path).name.startswith(name) and mode != 'r':
            file.close()
            return open('/dev/full', mode, 0) if 'b' in mode else FullText()
        return file

    class FullText(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(runtime.files, 'open', opened, raising=False)
    monkeypatch.setattr(runtime.run, 'open', opened, raising=False)


@pytest.mark.parametrize('place', ['file/below', 'new/' + 'x' * 300, '/proc/new'])
@pytest.mark.parametrize('command, argv, work', [
    ('train', [*TINY, '--out_dir={}'], 'train.locate'), ('export', ['--save_dir={}'], 'runtime.checkpoint.load'),
    ('compress', ['--finetune_iters=1500', '--save_dir={}'], 'runtime.checkpoint.load'),
    ('compare', [*TINY, '--sweep={}'], 'compare.plan'),
    ('bench', [*TINY, '--svd', '--svd_rank=2', '--plot={}.png'], 'bench_svd.trained_sources'),
    *((f'experiments.{name}', ['--out_dir={}'], f'experiments.{name}.locate')
      for name in ('loss_against_rank', 'continual_learning', 'compression_table'))])
def test_what_cannot_be_written_is_refused_before_work_begins(refused, monkeypatch, command, argv, work, place):
    main = importlib.import_module(command).main
    monkeypatch.setattr(work, lambda *args, **options: pytest.fail('work has begun'))
    Path('file').touch(), Path('out').mkdir(), Path('out/ckpt.pt').touch()
    before, option = sorted(Path('.').rglob('*')), argv[-1].strip('-').partition('=')[0]
    assert option in refused(main, *argv[:-1], argv[-1].format(place)) and sorted(Path('.').rglob('*')) == before


@needs_full
def test_a_text_that_cannot_be_prepared_for_a_full_disk_is_one_line(call, monkeypatch):
    Path('mine.txt').write_text(TEXT)
    monkeypatch.setattr(train, 'locate', lambda *args: locate(*args, roots=(Path('data'),)))
    full_for(monkeypatch, 'train.bin')
    result = call(train.main, *TINY, '--dataset=mine.txt')
    assert result.code == 1 and result.err.startswith('train.py: dataset=mine.txt: data/mine-char-')
    assert result.err.endswith('train.bin: cannot be written: No space left on device; make room there, then the same '
                               'command again\n')


@needs_full
def test_a_figure_that_does_not_fit_leaves_the_old_one(monkeypatch):
    Path('figure.png').write_bytes(b'old')
    full_for(monkeypatch, 'figure.png')
    panel = plots.Panel([plots.Line([1, 2], [1, 2], 0)], {}, {})
    with pytest.raises(DiskFull, match='figure.png: cannot be written: No space left on device; make room there'):
        plots.line_panels('figure.png', [plots.PanelRow('loss', 'linear', {'a': panel})], 'step', 'block', 'title')
    assert Path('figure.png').read_bytes() == b'old' and not list(Path('.').glob('*.tmp'))


# ----------------------------------------------------------------------------------------------------------------------
# pipes

def test_bars_are_lines_in_a_pipe(call):
    """No carriage return, and what is said between does not draw them again."""
    err = call(train.main, *TINY).err
    bars = err.splitlines()
    assert '\r' not in err and len(bars) == 2
    assert bars[0].startswith('train:   0%|') and bars[1].startswith('train: 100%|##########| 4/4 ')
    assert 'loss ' in bars[1] and bars[1] == bars[1].rstrip()


def test_bars_are_drawn_over_themselves_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True
    monkeypatch.setattr(sys, 'stderr', Terminal())
    with progress.bar(total=2, desc='train') as bar:
        bar.update(2)
    assert sys.stderr.getvalue().count('\r') >= 2 and sys.stderr.getvalue().count('\n') == 1


def test_what_is_said_reaches_a_pipe_at_once(endless, monkeypatch):
    monkeypatch.delenv('PYTHONUNBUFFERED', raising=False)
    process = endless([sys.executable, str(ROOT / 'train.py')])         # it has no end
    assert select.select([process.stdout], [], [], 10)[0] and process.stdout.readline().startswith('model: ')


@needs_full
@pytest.mark.parametrize('module', ['train', 'sample', 'bench', 'compress', 'export', 'plot_adaptive'])
@pytest.mark.parametrize('options, code', [(['--help'], 0), (['--no_such_option'], 2)])
def test_nobody_has_to_listen(module, options, code):
    """A pipe that is closed, a disk that is full: no traceback, and the same exit code."""
    main = importlib.import_module(module).main
    streams = sys.stdout, sys.stderr
    try:
        with open('/dev/full', 'w') as sys.stdout, open('/dev/full', 'w') as sys.stderr:
            assert main(options) == code
    finally:
        sys.stdout, sys.stderr = streams


# ----------------------------------------------------------------------------------------------------------------------
# networks

OFFLINE = '''
import json, os, sys
def no_network(event, args):
    if event.startswith('socket.'):
        print('a socket:', event, args, flush=True)
        os._exit(99)
sys.addaudithook(no_network)
for name, *argv in json.loads(sys.argv[1]):
    module = __import__(name)
    assert not (module.main(argv) if argv else getattr(module, 'main', getattr(module, 'socket', None))())
'''


def offline(*commands):
    return subprocess.run([sys.executable, '-c', OFFLINE, json.dumps(commands)], capture_output=True, text=True,
                          timeout=250, env=os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)})


def test_the_socket_alarm_works():
    assert offline(['socket']).returncode == 99                     # socket.socket()


@pytest.mark.slow
def test_no_socket_is_opened_by_anything_on_local_data():
    done = offline(['train', *TINY, '--use_svd=True', '--svd_rank=2', '--optimizer=muon'],
                   ['train', '--init_from=resume', '--device=cpu', '--max_iters=6'],
                   ['train', '--init_from=resume', '--device=cpu', '--eval_only=True'],
                   ['sample', '--device=cpu', '--num_samples=1', '--max_new_tokens=5'],
                   ['bench', *TINY, '--use_svd=True', '--svd_rank=2', '--pairs=2', '--vocab_size=17'],
                   ['train', *TINY, '--out_dir=plain'], ['export', '--out_dir=plain', '--save_dir=theirs'],
                   ['sample', '--device=cpu', '--init_from=theirs', '--start=the', '--max_new_tokens=5'],
                   ['compress', '--device=cpu', '--out_dir=plain', '--save_dir=mla'], ['example_svd_usage'])
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]

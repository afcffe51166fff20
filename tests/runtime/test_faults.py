"""Values that are not finite, full disks and missing networks."""

import copy
import importlib
import itertools
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

import train
from data.shakespeare_char import prepare as shakespeare_char
from helpers import ROOT, TEXT, TINY, before_forward, checkpoint, rows
from model import METHODS, SCOPES
from runtime import plots
from runtime.config import Failure

pytestmark = pytest.mark.usefixtures('one_thread', 'here')
needs_full = pytest.mark.skipif(not Path('/dev/full').exists(),
                                reason='a disk that is full by nature: Linux')
TWO_LAYERS = [*TINY, '--n_layer=2', '--max_iters=8']


# --------------------------------------------------------------------------------------------------
# values that are not finite

def in_step(number, spoil):
    """Within the block, spoil(model) runs before the forward pass of training step `number`."""
    steps = itertools.count(1)

    def look(model):
        if model.training and torch.is_grad_enabled() and next(steps) == number:
            spoil(model)
    return before_forward(look)


def poison(name, value=float('nan')):
    return lambda model: model.get_parameter(name).data.view(-1)[-1:].fill_(value)


def poison_gradient(name):
    return lambda model: model.get_parameter(name).register_hook(lambda g: g / 0)


def overflow(name):
    return lambda model: model.get_parameter(name).data.fill_(1e38)


SVD = ['--use_svd=True', '--svd_rank=2', '--svd_block=4']


@pytest.mark.parametrize(
    'spoil, bad, options',
    [
        (poison('transformer.h.0.attn.c_attn.weight'),
         'transformer.h.0.attn.c_attn.weight (the parameter)', []),
        (poison('transformer.ln_f.weight',
                float('inf')), 'transformer.ln_f.weight (the parameter)', []),
        (poison_gradient('transformer.wpe.weight'), 'transformer.wpe.weight (its gradient)', []),
        (poison_gradient('transformer.ln_f.weight'), 'transformer.ln_f.weight (its gradient)',
         ['--grad_clip=0']),
        (poison_gradient('transformer.h.1.mlp.c_fc.weight'),
         'transformer.h.1.mlp.c_fc.weight (its gradient)', ['--optimizer=muon']),
        (overflow('transformer.h.1.mlp.c_fc.weight'), 'transformer.h.1.mlp.c_fc (its output)', []),
        # 1e37 is finite in float32, its square is not
        (overflow('transformer.h.0.mlp.c_proj.weight'), 'transformer.h.1.ln_1 (its output)', []),
        (overflow('transformer.h.0.attn.c_proj.weight'), 'transformer.h.0.ln_2 (its output)', []),
        # the SVD refuses the values
        *((overflow('transformer.h.1.attn.c_attn.weight'), 'transformer.h.1.attn',
           [*SVD, f'--svd_method={method}', f'--svd_scope={scope}'])
          for method, scope in zip(METHODS, SCOPES))])
def test_a_step_that_is_not_finite_is_not_taken_and_its_first_bad_layer_is_named(
        call, spoil, bad, options):
    """A step with NaN or inf is not taken. The run ends with a one-line error that names the first
    bad layer, and keeps the last checkpoint."""
    seen = []

    def look(model):
        spoil(model)
        seen.extend([model, copy.deepcopy(model.state_dict())])
    with in_step(5, look):
        result = call(train.main, *TWO_LAYERS, *options)
    line = result.err.splitlines()[-1]
    assert result.code == 1 and 'Traceback' not in result.err and line.startswith('train.py: ')
    assert 'after step 4: ' in line and bad in line and 'the checkpoint of step 4 is kept' in line
    torch.testing.assert_close(seen[0].state_dict(), seen[1], rtol=0, atol=0, equal_nan=True)
    assert checkpoint()['iter_num'] == rows()[-1]['iter'] == 4
    assert all(p.isfinite().all() for p in checkpoint()['model'].values())


def test_weights_that_no_step_has_found_spoilt_are_not_saved(call):
    """Weights that become NaN in a step with a finite loss are found by the next evaluation, here
    at step 4, and not saved."""
    bad = 'transformer.ln_f.weight (the parameter)'

    def spoil(model):
        if not model.training and Path('out/ckpt.pt').exists():
            poison('transformer.ln_f.weight')(model)
    with before_forward(spoil):
        result = call(train.main, *TWO_LAYERS)
    assert result.code == 1 and bad in result.err
    assert 'the checkpoint of step 2 is kept' in result.err
    assert checkpoint()['iter_num'] == 2


def test_float16_overflow_is_the_scalers_business(fit, monkeypatch):
    """A float16 overflow is a skipped step, not an error. The gradient scaler on CUDA starts too
    high on purpose."""
    scaler = torch.amp.GradScaler('cpu', init_scale=2. ** 127, backoff_factor=2. ** -99)
    monkeypatch.setattr(torch.amp, 'GradScaler', lambda *_, **__: scaler)     # overflows once
    fit('--max_iters=4')
    assert checkpoint()['iter_num'] == 4 and checkpoint()['optimizer']['state'][0]['step'] == 3


# --------------------------------------------------------------------------------------------------
# disks

def temporary(name):
    """Return the temporary file that becomes `name` when this process has written it."""
    return Path(f'{name}.{os.getpid()}.tmp')


def full_disk(path):
    path.symlink_to('/dev/full')


@needs_full
@pytest.mark.parametrize('make, words',
                         [(full_disk, 'No space left on device'), (Path.mkdir, 'Is a directory'),
                          (lambda path: path.symlink_to(path.name), 'symbolic links')])
@pytest.mark.parametrize(
    'path', [temporary('out/ckpt.pt'), Path('out/metrics.jsonl')], ids=['ckpt.pt', 'metrics.jsonl'])
def test_an_out_dir_that_stops_taking_files_ends_the_run_in_order(call, path, make, words):
    """If OUT_DIR stops accepting files during a run, the run ends with a one-line error that names
    the last checkpoint. If the disk is full the error also gives the command to resume."""
    def stop(model):
        path.unlink(missing_ok=True)
        make(path)
    with in_step(3, stop):
        result = call(train.main, *TWO_LAYERS)
    line = result.err.splitlines()[-1]
    assert result.code == 1 and 'Traceback' not in result.err
    assert path.name[:7] in line and words in line
    assert 'the checkpoint of step 2 is kept' in line and checkpoint()['iter_num'] == 2
    assert ('--init_from=resume --out_dir=out' in line) == (make is full_disk)


@needs_full
@pytest.mark.parametrize(
    'main, path, options, words',
    [(train.main, temporary('out/ckpt.pt'), TINY, 'no checkpoint had been saved'),
     (train.main, temporary('out/config.py'), TINY, 'out_dir='),
     (train.main, Path('out/eval.jsonl'),
      ['--init_from=resume', '--eval_only=True', '--device=cpu'], 'out/eval.jsonl'),
     (shakespeare_char.main, temporary('new/train.bin'), ['--input=my.txt', '--out_dir=new'
                                                          ], 'new/train.bin')],
    ids=['checkpoint', 'options', 'evaluation', 'data set'])
def test_a_full_disk_is_no_wrong_input_and_says_what_to_do(call, trained, main, path, options,
                                                           words):
    """A full disk ends any command with exit code 1 and a one-line error that asks for space."""
    trained(folder='out' if path.name == 'eval.jsonl' else 'another')
    Path('my.txt').write_text(TEXT)
    path.parent.mkdir(exist_ok=True)
    full_disk(path)
    result = call(main, *options)
    line = result.err.splitlines()[-1]
    assert result.code == 1 and 'Traceback' not in result.err and words in line
    assert 'No space left on device' in line and 'again' in line


@needs_full
def test_a_figure_that_does_not_fit_leaves_the_old_one():
    """If a figure cannot be written the old one stays."""
    Path('figure.png').write_bytes(b'old')
    full_disk(temporary('figure.png'))
    with pytest.raises(Failure, match='figure.png: .*again'):
        plots.save(Figure(), 'figure.png')
    assert Path('figure.png').read_bytes() == b'old' and not list(Path('.').rglob('*.tmp'))


@pytest.mark.parametrize('command, argv', [
    ('train', [*TINY, '--dataset=none', '--out_dir={}']), ('export', ['--save_dir={}']),
    ('compress', ['--finetune_iters=1500', '--save_dir={}']),
    ('compare', [*TINY, '--dataset=none', '--sweep={}']),
    ('bench', [*TINY, '--svd', '--svd_rank=2', '--plot={}.png']),
    ('experiments.continual_learning', ['--dataset=none', '--out_dir={}']),
    ('experiments.compression_table', ['--dataset=none', '--out_dir={}'])])
def test_what_cannot_be_written_is_refused_before_work_begins(refused, command, argv):
    """A place that cannot be written ends in a one-line error before the work starts. Otherwise the
    error would be about the data set, which is missing here, or the checkpoint, which is empty."""
    main, option = importlib.import_module(command).main, argv[-1].strip('-').partition('=')[0]
    Path('file').touch(), Path('out').mkdir(), Path('out/ckpt.pt').touch()
    before = sorted(Path('.').rglob('*'))
    for place in ('file/below', 'new/' + 'x' * 300, '/proc/new'):
        assert option in refused(main, *argv[:-1], argv[-1].format(place))
    assert sorted(Path('.').rglob('*')) == before


# --------------------------------------------------------------------------------------------------
# pipes and networks

@needs_full
@pytest.mark.parametrize('module', ['train', 'sample', 'bench', 'compress', 'export'])
def test_nobody_has_to_listen(module):
    """A command whose output cannot be written, here because the disk is full, ends with the usual
    exit code and no traceback."""
    main = importlib.import_module(module).main
    for options, code in ((['--help'], 0), (['--no_such_option'], 2)):
        with open('/dev/full', 'w') as full, redirect_stdout(full), redirect_stderr(full):
            assert main(options) == code


OFFLINE = '''
import json, os, sys
def no_network(event, args):
    if event.startswith('socket.'):
        print('a socket:', event, args, flush=True)
        os._exit(99)
sys.addaudithook(no_network)
for name, *argv in json.loads(sys.argv[1]):
    module = __import__(name)
    alone = getattr(module, 'main', getattr(module, 'socket', None))
    assert not (module.main(argv) if argv else alone())
'''


@pytest.mark.slow
@pytest.mark.parametrize(
    'code, commands',
    [
        (99, [['socket']]),  # socket.socket() ends with 99
        (0,
         [['train', *TINY, '--use_svd=True', '--svd_rank=2', '--optimizer=muon'],
          ['train', '--init_from=resume', '--device=cpu', '--max_iters=6'],
          ['train', '--init_from=resume', '--device=cpu', '--eval_only=True'],
          ['sample', '--device=cpu', '--num_samples=1', '--max_new_tokens=5'],
          ['bench', *TINY, '--use_svd=True', '--svd_rank=2', '--pairs=2', '--vocab_size=17'],
          ['train', *TINY, '--out_dir=plain'], ['export', '--out_dir=plain', '--save_dir=theirs'],
          ['sample', '--device=cpu', '--init_from=theirs', '--start=the', '--max_new_tokens=5'],
          ['compress', '--device=cpu', '--out_dir=plain', '--save_dir=mla'],
          ['example_svd_usage']])])
def test_no_socket_is_opened_by_anything_on_local_data(code, commands):
    """No command opens a socket if all data are local. The first case shows that a socket would be
    noticed."""
    done = subprocess.run(
        [sys.executable, '-c', OFFLINE, json.dumps(commands)], capture_output=True, text=True,
        timeout=250, env=os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)})
    assert done.returncode == code, done.stdout[-500:] + done.stderr[-2000:]

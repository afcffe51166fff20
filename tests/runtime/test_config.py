"""Options: defaults < config files < --key=value; whatever is wrong with them is one line that names the way out."""

from dataclasses import asdict, fields
from typing import get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bench
import compare
import compress
import export
import sample
import train
from helpers import ROOT, TINY
from runtime import config as configuration
from runtime.config import UserError
from train import TrainConfig

each_main = pytest.mark.parametrize('main, config', [(train.main, TrainConfig), (sample.main, sample.SampleConfig),
                                                     (bench.main, bench.BenchConfig)], ids=['train', 'sample', 'bench'])


@pytest.fixture(autouse=True)
def workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def config_file(workdir):
    """config_file(text or bytes, name) -> name, written into the working directory."""
    def write(content, name='my.py'):
        (workdir / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return name
    return write


def load(*argv):
    return configuration.load(TrainConfig, list(argv))[0]


def refuse(*argv):
    """The one line with which these arguments are refused."""
    with pytest.raises(UserError) as e:
        load(*argv)
    assert '\n' not in str(e.value)
    return str(e.value)


# ----------------------------------------------------------------------------------------------------------------------
# who wins, and which types pass

def test_defaults_give_way_to_files_in_their_order_and_files_to_the_command_line(config_file):
    first = config_file('batch_size = 2\nblock_size = 2\nn_layer = 2\n', 'first.py')
    second = config_file('block_size = 3\nn_layer = 3\n', 'second.py')
    cfg, set_by = configuration.load(TrainConfig, ['--n_layer=4', first, second])
    assert (cfg.n_head, cfg.batch_size, cfg.block_size, cfg.n_layer) == (12, 2, 3, 4)
    assert set_by == {'batch_size': first, 'block_size': second, 'n_layer': 'the command line'}


def test_the_last_of_two_equal_options_wins():
    assert load('--n_layer=4', '--n_layer=5').n_layer == 5


@pytest.mark.parametrize('option, value', [
    ('learning_rate=1', 1.0), ('learning_rate=1e-3', 1e-3), ('dropout=0', 0.0), ('max_iters=100_000', 100000),
    ('svd_rank=8', 8), ('svd_rank=None', None), ('use_svd=True', True), ('compile=False', False),
    ('compile=auto', 'auto'),
    ('svd_method=standard', 'standard'), ("svd_method='standard'", 'standard'), ('out_dir=123', '123'),
    ('out_dir=1e3', '1e3'), ('out_dir=None', 'None'), ('out_dir=[1, 2]', '[1, 2]'), ('wandb_run_name=True', 'True'),
    ('wandb_run_name=a=b', 'a=b'), ('wandb_run_name=', ''), ('dataset=007', '007')])
def test_a_value_arrives_in_the_type_of_its_option(option, value):
    """A whole number passes for a float; what is meant as text stays text even if it looks like a number."""
    got = getattr(load(f'--{option}'), option.partition('=')[0])
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize('option, words', [
    ('max_iters=1e3', 'must be a whole number (nearest: 1000)'), ('max_iters=2.6', '(nearest: 3)'),
    ('max_iters=True', 'must be a whole number'), ('max_iters=', 'must be a whole number'),
    ('max_iters=1e999', 'must be a whole number'), ('learning_rate=True', 'must be a number'),
    ('learning_rate=fast', 'must be a number'), ('learning_rate=1j', 'must be a number'),
    ('use_svd=1', 'must be True or False (nearest: True)'), ('use_svd=no', '(nearest: False)'),
    ('compile=2', "must be True or False or 'auto'"), ('svd_rank=half', 'must be a whole number or None'),
    ('svd_scope=sequense', "'causal' or 'weight' (nearest: 'sequence')"), ('svd_method=Gram', "(nearest: 'gram')"),
    ('svd_method=randomised', "'gram' or 'randomized' (nearest: 'randomized')"),
    ('init_from=gpt3', "(nearest: 'gpt2')"),
    *[(f'{key}={bad}', 'must be a number') for key in ('learning_rate', 'dropout', 'beta2', 'grad_clip')
      for bad in ('nan', 'inf', '-inf', '1e999')],
    pytest.param('learning_rate=1' + '0' * 400, 'must be a number')])
def test_another_type_is_refused_with_the_nearest_value(option, words):
    line = refuse(f'--{option}')
    assert line.startswith(option.partition('=')[0]) and words in line and line.endswith('[the command line]')


@pytest.mark.parametrize('option, words', [
    ('svd_rank=0', '1 to 64, or None'), ('svd_rank=-3', '1 to 64, or None'), ('n_embd=100', '(nearest: 96)'),
    ('n_embd=4', '(nearest: 12)'), ('block_size=0', 'at least 1'), ('n_layer=-1', 'at least 1'),
    ('vocab_size=0', 'at least 1'), ('batch_size=0', 'nearest: 1'), ('gradient_accumulation_steps=0', 'nearest: 1'),
    ('eval_interval=0', 'nearest: 1'), ('log_interval=0', 'nearest: 1'), ('eval_iters=0', 'nearest: 1'),
    ('max_iters=-1', 'nearest: 0'), ('learning_rate=-1', 'nearest: 0'), ('dropout=1.0', 'below 1'),
    ('dropout=-.1', 'at least 0'), ('beta2=1', 'below 1'), ('seed=-1', 'nearest: 0'),
    ('seed=9' + '9' * 20, 'below 2**63'),
    ('svd_block=0', 'at least 1'), ('out_dir=.', "nearest: 'out'"), ('out_dir=', "nearest: 'out'"),
    ('out_dir=..', "nearest: 'out'"), ('out_dir=a/..', "nearest: 'out'"), ('out_dir=~', "nearest: 'out'"),
    pytest.param('out_dir=' + 'a' * 5000, 'File name too long')])
def test_a_value_that_cannot_be_is_refused_with_one_that_can(option, words):
    line = refuse(f'--{option}')
    assert line.startswith(option.partition('=')[0]) and words in line and line.endswith('[the command line]')


def test_the_place_that_set_a_wrong_value_is_named(config_file):
    assert refuse(config_file('n_head = 5\n')).endswith('(nearest: 770) [default]')     # n_embd = 768 is to blame
    assert refuse(config_file('n_embd = 5\n')).endswith('(nearest: 12) [my.py]')
    assert refuse(config_file('n_embd = True\n')).endswith('must be a whole number [my.py]')
    assert refuse(config_file('n_embd = 5\n'), '--n_embd=7').endswith('(nearest: 12) [the command line]')


@pytest.mark.parametrize('option, words', [
    ('--max_iter=3', '--max_iter: no such option (nearest: --max_iters)'),
    ('--svdrank=3', '--svdrank: no such option (nearest: --svd_rank)'),
    ('--MAX_ITERS=3', '(nearest: --max_iters)'), ('--qqq=3', '(--help lists the options)'),
    ('--use_svd', '--use_svd: needs a value, written --use_svd=VALUE, which is True or False'),
    ('-n_layer=3', 'options are written --key=value'), ('--', 'options are written --key=value'),
    ('--=3', 'options are written --key=value'),
    ('max_iters=3', 'max_iters=3: no such config file (nearest: --max_iters=3)'),
    ('max-iters=3', '(nearest: --max_iters=3)'), ('use_svd', '(nearest: --use_svd=VALUE)'),
    ('help', 'help: no such config file (options are written --key=value; --help lists them)')])
def test_a_mistyped_option_is_answered_with_the_nearest(option, words):
    assert words in refuse(option)


@pytest.mark.parametrize('main', [train.main, bench.main], ids=['train', 'bench'])
@pytest.mark.parametrize('device', ['cuda', 'cuda:1', 'mps', 'tpu', 'cpu:1', ''])
def test_a_device_that_is_not_here_is_refused_with_those_that_are(here, refused, monkeypatch, main, device):
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    monkeypatch.setattr('torch.backends.mps.is_available', lambda: False)
    line = refused(main, *TINY, f'--device={device}')
    assert f'device={device}: not on this machine (available: cpu; nearest: cpu)' in line


def test_an_unknown_data_set_is_answered_with_the_nearest(here, refused):
    assert 'no such data set or text file (nearest: toy)' in refused(train.main, *TINY, '--dataset=toys')


@pytest.mark.parametrize('option, words', [
    ('temperature=-1', 'at least 0'), ('temperature=nan', 'a number'),
    ('top_p=0', 'nearest: 0.01'), ('top_p=1.5', 'nearest: 1'),
    ('top_k=0', 'nearest: 1'), ('num_samples=0', 'nearest: 1'), ('max_new_tokens=0', 'nearest: 1'),
    ('seed=-1', 'nearest: 0'), ('svd_scope=rows', "'sequence' or 'causal' or 'weight' or None"),
    pytest.param('seed=9' + '9' * 20, 'below 2**63')])
def test_sampling_values_that_cannot_be_are_refused(refused, option, words):
    assert words in refused(sample.main, f'--{option}')


# ----------------------------------------------------------------------------------------------------------------------
# switches

@pytest.mark.parametrize('arguments, value', [
    ([], False), (['--check'], True), (['--check=True'], True), (['--check=False'], False),
    (['--check', '--check=False'], False), (['my.py'], True), (['my.py', '--check=False'], False)])
def test_a_switch_may_be_written_bare(config_file, arguments, value):
    config_file('check = True\n')
    cfg, set_by = configuration.load(bench.BenchConfig, arguments)
    assert cfg.check is value and ('check' in set_by) == bool(arguments)


@pytest.mark.parametrize('arguments, words', [
    (['--check=1'], 'check=1: must be True or False (nearest: True)'), (['--check='], 'must be True or False'),
    (['--chek'], '--chek: no such option (nearest: --check)'), (['-check'], 'options are written --key=value'),
    (['--check', '--use_svd'], '--use_svd: needs a value')])
def test_a_switch_is_checked_and_makes_none_of_other_options(refused, arguments, words):
    assert words in refused(bench.main, *arguments)


# ----------------------------------------------------------------------------------------------------------------------
# config files

@pytest.mark.parametrize('source, key, value', [
    ('max_iters = 7\nlr_decay_iters = max_iters\n', 'lr_decay_iters', 7),
    ('min_lr = learning_rate / 10\n', 'min_lr', 6e-4 / 10),
    ('learning_rate = 1\n', 'learning_rate', 1.0),
    ('import math\nlearning_rate = math.sqrt(1e-4)\n', 'learning_rate', 1e-2),
    ('import numpy as np\nlearning_rate = np.float64(0.5)\nmax_iters = np.int64(3)\n', 'learning_rate', 0.5),
    ('def steps(epochs):\n    return 10 * epochs\nmax_iters = steps(3)\n', 'max_iters', 30),
    ('_width, _heads = 64, 4\nn_embd = _width * _heads\nn_head = _heads\n', 'n_embd', 256),
    ('for _i in range(3):\n    n_layer = _i\nn_layer += 1\n', 'n_layer', 3),
    ('out_dir = "größer"\n', 'out_dir', 'größer'),
    ('# nothing but a comment\n', 'n_layer', 12)])
def test_a_config_file_is_python(config_file, source, key, value):
    """It may import modules, define functions, use _underscore helpers and read the values before its own."""
    assert getattr(load(config_file(source)), key) == value


def test_a_config_file_reads_what_an_earlier_one_set(config_file):
    first, second = config_file('max_iters = 7\n', 'a.py'), config_file('lr_decay_iters = max_iters\n', 'b.py')
    assert load(first, second).lr_decay_iters == 7


@pytest.mark.parametrize('content', [b'n_layer = 3\r\nn_embd = 24\r\n',
                                     pytest.param(b'\xef\xbb\xbfn_layer = 3\r\nn_embd = 24\r\n')],
                         ids=['line ends', 'byte order mark'])
def test_a_config_file_may_come_from_windows(config_file, content):
    cfg = load(config_file(content))
    assert (cfg.n_layer, cfg.n_embd) == (3, 24)


@pytest.mark.parametrize('source, words', [
    ('n_layer = 2\n1 / 0\n', 'my.py, line 2: ZeroDivisionError: division by zero'),
    ('def f():\n    return 1 / 0\n\nn_layer = f()\n', 'my.py, line 2: ZeroDivisionError'),
    ('raise ValueError("two\\nlines")\n', 'my.py, line 1: ValueError: two lines'),
    ('exit()\n', 'my.py, line 1: SystemExit'),
    ('import sys\nsys.exit(3)\n', 'my.py, line 2: SystemExit: 3'),
    ('n_layer = = 2\n', 'my.py, line 1: invalid syntax'),
    ('n_layer = 2\n    n_head = 2\n', 'my.py, line 2: unexpected indent'),
    ('n_layer = "2"\n', "n_layer='2': must be a whole number [my.py]"),
    ('n_layer = lambda: 2\n', 'must be a whole number [my.py]'),
    ('max_iter = 3\n', 'my.py: max_iter: no such option (nearest: max_iters)'),
    ('width = 3\n', 'a helper variable may start with an underscore'),
    (b'out_dir = "gr\xf6\xdfer"\n', 'my.py: cannot be read as a Python file'),
    (b'n_layer = 2\0\n', 'null bytes')])
def test_a_broken_config_file_is_one_line_with_its_place(config_file, source, words):
    assert words in refuse(config_file(source))


def test_a_missing_config_file_is_answered_with_the_nearest(workdir, config_file):
    (workdir / 'config').mkdir()
    config_file('', 'config/train_small.py')
    for missing in ('config/train_smal.py', 'config/train-small.py'):
        assert refuse(missing).startswith(f'{missing}: no such config file (nearest: config/train_small.py)')


def test_a_folder_is_no_config_file(workdir):
    assert refuse(str(workdir)).startswith(f'{workdir}: no such config file')


def test_the_folder_of_a_run_is_taken_for_one(workdir):
    (workdir / 'run').mkdir()
    (workdir / 'run' / 'ckpt.pt').touch()
    assert '(nearest: --out_dir=run)' in refuse('run')


def test_the_scripts_are_not_offered_as_config_files(monkeypatch):
    monkeypatch.chdir(ROOT)
    for word in ('help', 'models', 'train_.py', 'bench'):
        assert 'nearest: config/' in refuse(word) or 'nearest' not in refuse(word)


def test_a_value_after_a_space_is_told_from_a_config_file():
    assert refuse('--svd_rank', '4').startswith('--svd_rank: needs a value, written --svd_rank=VALUE')


# ----------------------------------------------------------------------------------------------------------------------
# the three scripts

@each_main
@pytest.mark.parametrize('arguments, words', [
    (['--sed=1'], 'nearest: --seed'), (['--seed'], 'needs a value'), (['--seed=1.5'], 'nearest: 2'),
    (['--seed=-1'], 'nearest: 0'), (['my.py', '--seed=-1'], 'nearest: 0'), (['nowhere.py'], 'no such config file'),
    (['.'], 'no such config file'), (['raises.py'], 'raises.py, line 1: NameError'), (['exits.py'], 'exits.py, line 1'),
    (['syntax.py'], 'syntax.py, line 1'), (['latin1.py'], 'cannot be read'), (['typo.py'], 'nearest: seed'),
    (['type.py'], 'must be a whole number [type.py]')])
def test_wrong_input_is_one_line_and_exit_code_2(refused, config_file, main, config, arguments, words):
    for name, content in dict(my='', raises='nothing', exits='exit(0)', syntax='seed == (', latin1=b'# \xe9',
                              typo='sead = 1', type='seed = None').items():
        config_file(content, f'{name}.py')
    line = refused(main, *arguments)
    assert words in line and line.startswith(f'{main.__module__}.py: ')


@pytest.mark.parametrize('main, config', [(train.main, TrainConfig), (sample.main, sample.SampleConfig),
                                          (bench.main, bench.BenchConfig), (export.main, export.ExportConfig),
                                          (compress.main, compress.CompressConfig)])
@pytest.mark.parametrize('argument', ['--help', '-h'])
def test_help_lists_every_option_with_its_default_and_meaning(call, main, config, argument):
    result = call(main, '--seed=nonsense', argument)
    assert result.code == 0 and not result.err
    for f in fields(config):
        written = f'--{f.name} ' if configuration.is_switch(f.type) else f'--{f.name}={f.default!r} '
        described = [line for line in result.out.splitlines() if line.lstrip().startswith(written)]
        assert len(described) == 1 and get_args(f.type)[1] in described[0], f.name


@pytest.mark.parametrize('config', [bench.BenchConfig, compare.CompareConfig, compress.CompressConfig,
                                    export.ExportConfig, sample.SampleConfig])
def test_a_tilde_is_the_home_folder_in_paths_alone(config, monkeypatch):
    monkeypatch.setenv('HOME', '/home/me')
    hints = get_type_hints(config, include_extras=True)
    paths = {'out_dir', 'save_dir', 'dataset', 'init_from', 'lora_adapter', 'base', 'sweep', 'peer', 'plot'}
    for key in (key for key, hint in hints.items() if configuration.matches('~/a b', hint)[0]):
        assert configuration.parse_option(f'--{key}=~/a b', hints)[1] == ('/home/me/a b' if key in paths else '~/a b')


# ----------------------------------------------------------------------------------------------------------------------
# nanoGPT, dumping, fuzz

def test_names_and_defaults_are_nanogpts():
    nanogpt = dict(
        out_dir='out', eval_interval=2000, log_interval=1, eval_iters=200, eval_only=False, always_save_checkpoint=True,
        init_from='scratch', wandb_log=False, wandb_project='owt', wandb_run_name='gpt2', dataset='openwebtext',
        gradient_accumulation_steps=40, batch_size=12, block_size=1024, n_layer=12, n_head=12, n_embd=768, dropout=0.0,
        bias=False, learning_rate=6e-4, max_iters=600000, weight_decay=1e-1, beta1=0.9, beta2=0.95, grad_clip=1.0,
        decay_lr=True, warmup_iters=2000, lr_decay_iters=600000, min_lr=6e-5, backend='nccl')
    ours = asdict(load())
    assert nanogpt == {key: ours[key] for key in nanogpt}
    assert [ours[key] for key in ('device', 'dtype', 'compile')] == ['auto'] * 3        # where it names a machine


@pytest.mark.parametrize('path', sorted((ROOT / 'config').glob('*.py')), ids=lambda path: path.stem)
def test_the_config_files_that_come_along_are_valid(path):
    cfg, set_by = configuration.load(TrainConfig, [str(path)])
    assert set(set_by.values()) == {str(path)} and (cfg.init_from != 'scratch' or cfg.lr_decay_iters == cfg.max_iters)


@pytest.mark.parametrize('options', [
    [], ['--use_svd=True', '--svd_rank=3', '--learning_rate=1', f'--min_lr={1 / 3!r}', '--compile=True'],
    ['--out_dir=it\'s "C:\\new"\tgrößer', '--wandb_run_name=\n', '--weight_decay=1e-300',
     '--max_iters=1' + '0' * 30]])
def test_a_dumped_configuration_is_a_config_file_that_gives_it_back(config_file, options):
    cfg = load(*options)
    text = configuration.dump(cfg, '# a comment\n')
    assert text.startswith('# a comment\n') and load(config_file(text)) == cfg


PLAUSIBLE = {bool: st.booleans(), int: st.integers(1, 12), float: st.floats(0, .9),
             type(None): st.sampled_from([None, 3])}
plausible = st.sampled_from(fields(TrainConfig)).flatmap(lambda f: st.builds(
    f'--{f.name}={{}}'.format, PLAUSIBLE.get(type(f.default), st.just(f.default))))
keys = st.sampled_from([f.name for f in fields(TrainConfig)] + ['max_iter', 'svd', '', 'help', '__class__', 'n-layer'])
values = st.one_of(
    st.text(max_size=20), st.integers().map(str), st.floats().map(repr), st.text('()[]{}\'"\\,:0 ', max_size=60),
    st.sampled_from(['True', 'None', 'auto', 'gram', 'causal', '1', '0', '-1', '12', '1e3', '.5', '{1: 2}', "b'x'"]))
soup = st.builds('--{}={}'.format, keys, values)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(argv=st.one_of(st.lists(plausible), st.lists(st.one_of(plausible, soup), max_size=4)))
def test_any_options_give_a_valid_configuration_or_one_line(argv):
    try:
        cfg, set_by = configuration.load(TrainConfig, argv)
    except UserError as e:
        assert len(str(e).splitlines()) == 1
        return
    assert set(set_by) == {arg[2:].partition('=')[0] for arg in argv}
    for f in fields(cfg):
        assert configuration.matches(getattr(cfg, f.name), f.type) == (True, getattr(cfg, f.name))
    TrainConfig(**asdict(cfg))

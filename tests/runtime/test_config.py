"""Options: config files replace defaults, and --key=value replaces both. A wrong option ends in a
one-line error that names a valid choice."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

import bench
import compare
import compress
import export
import sample
import train
from helpers import ROOT
from runtime import config as configuration
from runtime.config import SWITCH
from train import TrainConfig

MAINS = {'train': train.main, 'sample': sample.main, 'bench': bench.main}
FILES = {
    'first.py': b'batch_size = 2\nblock_size = 2\nn_layer = 2\n',
    'second.py': b'block_size = 3 * batch_size\nn_layer = 3\n', 'switch.py': b'decode = True\n',
    'heads.py': b'n_head = 5\n', 'width.py': b'n_embd = 5\n', 'width7.py': b'n_embd = 7\n',
    'bool.py': b'n_embd = True\n', 'text.py': b'n_layer = "2"\n',
    'function.py': b'n_layer = lambda: 2\n', 'seed.py': b'seed = -1\n',
    'divides.py': b'n_layer = 2\n1 / 0\n',
    'below.py': b'def f():\n    return 1 / 0\n\nn_layer = f()\n',
    'lines.py': b'raise ValueError("two\\nlines")\n', 'exit.py': b'exit()\n',
    'exit3.py': b'import sys\nsys.exit(3)\n', 'syntax.py': b'n_layer = = 2\n',
    'indent.py': b'n_layer = 2\n    n_head = 2\n', 'typo.py': b'sead = 3\n',
    'unknown.py': b'width = 3\n', 'latin1.py': b'out_dir = "gr\xf6\xdfer"\n',
    'yaml.py': b'n_layer: 2\n', 'json.py': b'{"n_layer": 2}\n',
    'null.py': b'n_layer = 2\0\n', 'config/train_small.py': b'', 'run/ckpt.pt': b''
}


@pytest.fixture(autouse=True)
def workdir(tmp_path, monkeypatch):
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)


# --------------------------------------------------------------------------------------------------
# precedence and types

def test_defaults_give_way_to_files_in_their_order_and_files_to_the_last_option():
    """Later config files replace earlier ones, the last option on the command line wins, and
    `set_by` names the place of each value."""
    cfg, set_by = configuration.load(TrainConfig,
                                     ['--n_layer=5', '--n_layer=4', 'first.py', 'second.py'])
    assert (cfg.n_head, cfg.batch_size, cfg.block_size, cfg.n_layer) == (12, 2, 6, 4)
    assert set_by == {
        'batch_size': 'first.py', 'block_size': 'second.py', 'n_layer': 'the command line'}


@pytest.mark.parametrize('option, value', [('learning_rate=1', 1.0), ('learning_rate=1e-3', 1e-3),
                                           ('dropout=0', 0.0), ('max_iters=100_000', 100000),
                                           ('svd_rank=8', 8), ('svd_rank=None', None),
                                           ('use_svd=True', True), ('compile=False', False),
                                           ('compile=auto', 'auto'),
                                           ('svd_method=standard', 'standard'),
                                           ("svd_method='standard'", 'standard'),
                                           ('out_dir=123', '123'), ('out_dir=1e3', '1e3'),
                                           ('out_dir=None', 'None'), ('out_dir=[1, 2]', '[1, 2]'),
                                           ('wandb_run_name=True', 'True'),
                                           ('wandb_run_name=a=b', 'a=b'), ('wandb_run_name=', ''),
                                           ('dataset=007', '007')])
def test_a_value_arrives_in_the_type_of_its_option(option, value):
    """A value gets the type of its option. A whole number is a valid float, and a text option keeps
    text that looks like a number."""
    cfg, key = configuration.load(TrainConfig, [f'--{option}'])[0], option.partition('=')[0]
    assert (getattr(cfg, key), type(getattr(cfg, key))) == (value, type(value))


WRONG = {
    # wrong types
    'train': [
        ('max_iters=1e3', 'a whole number (nearest: 1000)'),
        ('max_iters=2.6', '(nearest: 3)'),
        ('max_iters=True', 'a whole number'),
        ('max_iters=', 'a whole number'),
        ('max_iters=1e999', 'a whole number'),
        ('learning_rate=True', 'a number'),
        ('learning_rate=fast', 'a number'),
        ('learning_rate=1j', 'a number'),
        *((f'{key}={bad}', 'a number')
          for key in ('learning_rate', 'dropout', 'beta2', 'grad_clip')
          for bad in ('nan', 'inf', '-inf', '1e999', '1' + '0' * 400)),
        ('use_svd=1', 'True or False'),
        ('use_svd=no', 'True or False'),
        ('compile=2', "True or False or 'auto'"),
        ('svd_rank=half', 'a whole number or None'),
        ('svd_scope=sequense', "'causal' or 'weight' (nearest: 'sequence')"),
        ('svd_method=Gram', "(nearest: 'gram')"),
        ('svd_method=randomised', "(nearest: 'randomized')"),
        ('init_from=gpt3', "(nearest: 'gpt2')"),
        # impossible values
        ('svd_rank=0', 'nearest: 1'),
        ('svd_rank=-3', 'nearest: 1'),
        ('n_embd=100', '(nearest: 96)'),
        ('n_embd=4', '(nearest: 12)'),
        ('dropout=1.0', 'below 1'),
        ('dropout=-.1', 'at least 0'),
        ('beta2=1', 'below 1'),
        ('max_iters=-1', '(nearest: 0)'),
        ('learning_rate=-1', '(nearest: 0)'),
        *((f'{key}=0', '(nearest: 1)')
          for key in ('block_size', 'vocab_size', 'batch_size', 'gradient_accumulation_steps',
                      'eval_interval', 'log_interval', 'eval_iters', 'svd_block')),
        ('n_layer=-1', '(nearest: 1)'),
        *((f'out_dir={folder}', "(nearest: 'out')") for folder in ('.', '', '..', 'a/..', '~'))
    ],
    'sample': [('temperature=-1', '(nearest: 0)'), ('temperature=nan', 'a number'),
               ('top_p=0', '(nearest: 0.01)'), ('top_p=1.5', '(nearest: 1.0)'),
               ('top_k=0', '(nearest: 1)'), ('num_samples=0', '(nearest: 1)'),
               ('max_new_tokens=0', '(nearest: 1)'),
               ('svd_scope=rows', "'sequence' or 'causal' or 'weight' or None")],
    'bench': [('decode=1', 'True or False'), ('decode=', 'True or False')]
}


@pytest.mark.parametrize('script', MAINS)
def test_a_value_that_cannot_be_is_refused_with_its_option_and_one_that_can(refused, script):
    """A wrong value ends in a one-line error with the option, a valid value and the place where it
    was set."""
    for option, words in WRONG[script]:
        line = refused(MAINS[script], f'--{option}')
        assert line.startswith(f'{script}.py: {option.partition("=")[0]}=') and words in line, line
        assert line.endswith('[the command line]'), line


ARGUMENTS = {
    'train options': [
        ('--max_iter=3', '--max_iter: no such option (nearest: --max_iters)'),
        ('--svdrank=3', '(nearest: --svd_rank)'),
        ('--MAX_ITERS=3', '(nearest: --max_iters)'),
        ('--qqq=3', '--help'),
        ('--use_svd', '--use_svd=VALUE'),
        ('-n_layer=3', '(nearest: --n_layer)'),
        ('--', '--key=value'),
        ('--=3', '--key=value'),
        ('max_iters=3', '(nearest: --max_iters=3)'),
        ('max-iters=3', '(nearest: --max_iters=3)'),
        # scripts such as train.py are not suggested as config files
        (f'{ROOT}/train_.py', '(nearest: config/train_small.py)'),
        ('use_svd', '(nearest: --use_svd=VALUE)'),
        ('--svd_rank 4', '--svd_rank=VALUE')
    ],
    'train places to be': [('--dataset=shakespear --device=cpu', '(nearest: shakespeare)'),
                           *((f'--dataset=shakespeare_char --device={device}', 'nearest: cpu)')
                             for device in ('tpu', 'cpu:1', 'cuda:77', ''))],
    'bench places to be': [('--device=tpu', 'nearest: cpu)')],
    'train files': [('config/train_smal.py', '(nearest: config/train_small.py)'),
                    ('config/train-small.py', '(nearest: config/train_small.py)'),
                    ('config', 'config: no such config file'), ('run', '(nearest: --out_dir=run)'),
                    ('divides.py', 'divides.py, line 2: ZeroDivisionError'),
                    ('below.py', 'below.py, line 2: ZeroDivisionError'),
                    ('lines.py', 'line 1: ValueError: two lines'),
                    ('exit.py', 'exit.py, line 1: SystemExit'),
                    ('exit3.py', 'exit3.py, line 2: SystemExit: 3'),
                    ('yaml.py', 'yaml.py, line 1: '), ('json.py', 'json.py, line 1: '),
                    ('syntax.py', 'syntax.py, line 1: '), ('indent.py', 'indent.py, line 2: '),
                    ('typo.py', '(nearest: seed)'), ('unknown.py', 'underscore'),
                    ('latin1.py', 'latin1.py: '), ('null.py', 'null.py')],
    'train places': [
        ('heads.py', '(nearest: 770) [default]'),  # n_embd = 768 is the wrong value
        ('width.py', '(nearest: 12) [width.py]'),
        ('width7.py width.py', '(nearest: 12) [width.py]'),
        ('width.py --n_embd=7', '(nearest: 12) [the command line]'),
        ('bool.py', 'a whole number [bool.py]'),
        ('text.py', "n_layer='2': must be a whole number [text.py]"),
        ('function.py', 'a whole number [function.py]')
    ],
    **{
        script: [('--sed=1', '(nearest: --seed)'), ('--seed', '--seed=VALUE'),
                 ('--seed=1.5', '(nearest: 2)'), ('--seed=-1', '(nearest: 0)'),
                 ('--seed=9' + '9' * 20, f'below {2 ** 63}'), ('no.py', 'no.py'),
                 ('seed.py', '(nearest: 0) [seed.py]'), ('typo.py', '(nearest: '
                                                                    'seed)')] for script in MAINS}
}


@pytest.mark.parametrize('what', ARGUMENTS)
def test_wrong_arguments_and_config_files_are_refused_with_their_place_and_the_nearest(
        refused, what):
    """A wrong argument or config file ends in a one-line error with its place and the nearest valid
    choice."""
    script = what.split()[0]
    for arguments, words in ARGUMENTS[what]:
        line = refused(MAINS[script], *arguments.split())
        assert line.startswith(f'{script}.py: ') and words in line, line


@pytest.mark.parametrize('arguments, value', [([], False), (['--decode'], True),
                                              (['--decode=True'], True),
                                              (['--decode=False'], False),
                                              (['--decode', '--decode=False'], False),
                                              (['switch.py'], True),
                                              (['switch.py', '--decode=False'], False)])
def test_a_switch_may_be_written_bare(arguments, value):
    cfg, set_by = configuration.load(bench.BenchConfig, arguments)
    assert cfg.decode is value and ('decode' in set_by) == bool(arguments)


# --------------------------------------------------------------------------------------------------
# config files


@pytest.mark.parametrize(
    'source, key, value',
    [('max_iters = 7\nlr_decay_iters = max_iters\n', 'lr_decay_iters', 7),
     ('min_lr = learning_rate / 10\n', 'min_lr', 6e-4 / 10),
     ('learning_rate = 1\n', 'learning_rate', 1.0),
     ('import math\nlearning_rate = math.sqrt(1e-4)\n', 'learning_rate', 1e-2),
     ('import numpy as np\nlearning_rate = np.float64(0.5)\nmax_iters = np.int64(3)\n',
      'learning_rate', 0.5),
     ('def steps(epochs):\n    return 10 * epochs\nmax_iters = steps(3)\n', 'max_iters', 30),
     ('_width, _heads = 64, 4\nn_embd = _width * _heads\nn_head = _heads\n', 'n_embd', 256),
     ('for _i in range(3):\n    n_layer = _i\nn_layer += 1\n', 'n_layer', 3),
     ('out_dir = "größer"\n', 'out_dir', 'größer'), ('# nothing but a comment\n', 'n_layer', 12),
     (b'n_layer = 3\r\nn_embd = 24\r\n', 'n_embd', 24),
     (b'\xef\xbb\xbfn_layer = 3\r\n', 'n_layer', 3)])
def test_a_config_file_is_python(source, key, value):
    """A config file is Python. It may import modules, define functions, use _underscore helpers and
    read values set before its own. Line ends and the byte order mark of Windows are allowed."""
    Path('my.py').write_bytes(source if isinstance(source, bytes) else source.encode())
    assert getattr(configuration.load(TrainConfig, ['my.py'])[0], key) == value


@pytest.mark.parametrize('path', sorted((ROOT / 'config').glob('*.py')), ids=lambda path: path.stem)
def test_the_config_files_that_come_along_are_valid(path):
    """Every file in config/ is valid, and a run from scratch decays its learning rate until its
    last step."""
    cfg, set_by = configuration.load(TrainConfig, [str(path)])
    assert set(set_by.values()) == {str(path)}
    assert cfg.init_from != 'scratch' or cfg.lr_decay_iters == cfg.max_iters


# --------------------------------------------------------------------------------------------------
# the commands

CONFIGS = [bench.BenchConfig, compress.CompressConfig, export.ExportConfig, sample.SampleConfig]


@pytest.mark.parametrize('main, config', [
    (train.main, TrainConfig),
    *zip((bench.main, compress.main, export.main, sample.main), CONFIGS, strict=True)])
def test_help_lists_every_option_with_its_default_and_meaning(call, main, config):
    """--help lists every option once, with its default, meaning and choices. train.py's help has at
    most 100 lines of at most 100 characters."""
    result = call(main, '--seed=nonsense', '--help')
    assert result.out == call(main, '-h').out and result.code == 0 and not result.err
    printed, hints = ' '.join(result.out.split()) + ' ', get_type_hints(config, include_extras=True)
    if main is train.main:
        assert len(result.out.splitlines()) <= 100 >= max(map(len, result.out.splitlines()))
    for f in fields(config):
        _, about, *marks = get_args(hints[f.name])
        written = f'--{f.name}' if SWITCH in marks else f'--{f.name}={f.default!r}'
        assert printed.count(f' {written} {about} ') == 1, f.name
        assert f.default is None or all(
            repr(choice) in about for kind in configuration.alternatives(hints[f.name])
            if get_origin(kind) is Literal for choice in get_args(kind)), f.name


@pytest.mark.parametrize('config', [*CONFIGS, compare.CompareConfig])
def test_a_tilde_is_the_home_folder_in_paths_alone(config, monkeypatch):
    """In options that are paths, '~' stands for the home folder. In other text options it is an
    ordinary character."""
    monkeypatch.setenv('HOME', '/home/me')
    hints = get_type_hints(config, include_extras=True)
    paths = {
        'out_dir', 'save_dir', 'dataset', 'init_from', 'lora_adapter', 'base', 'sweep', 'peer',
        'plot'}
    for key in (key for key, hint in hints.items() if configuration.coerce('~/a b', hint)[0]):
        value = configuration.parse_option(f'--{key}=~/a b', hints)[1]
        assert value == ('/home/me/a b' if key in paths else '~/a b')


def test_names_and_defaults_are_nanogpts():
    """Names and defaults of nanoGPT's options are unchanged, except device, dtype and compile,
    which are 'auto'."""
    nanogpt = dict(out_dir='out', eval_interval=2000, log_interval=1, eval_iters=200,
                   eval_only=False, always_save_checkpoint=True, init_from='scratch',
                   wandb_log=False, wandb_project='owt', wandb_run_name='gpt2',
                   dataset='openwebtext', gradient_accumulation_steps=40, batch_size=12,
                   block_size=1024, n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=False,
                   learning_rate=6e-4, max_iters=600000, weight_decay=1e-1, beta1=0.9, beta2=0.95,
                   grad_clip=1.0, decay_lr=True, warmup_iters=2000, lr_decay_iters=600000,
                   min_lr=6e-5, backend='nccl')
    ours = asdict(TrainConfig())
    assert nanogpt == {key: ours[key] for key in nanogpt}
    # nanoGPT's defaults name one kind of machine
    assert [ours[key] for key in ('device', 'dtype', 'compile')] == ['auto'] * 3


@pytest.mark.parametrize('options', [[],
                                     [
                                         '--use_svd=True', '--svd_rank=3', '--learning_rate=1',
                                         f'--min_lr={1 / 3!r}', '--compile=True'
                                     ],
                                     [
                                         '--out_dir=it\'s "C:\\new"\tgrößer', '--wandb_run_name=\n',
                                         '--weight_decay=1e-300', '--max_iters=1' + '0' * 30]])
def test_a_dumped_configuration_is_a_config_file_that_gives_it_back(options):
    """A dumped configuration is a config file that loads to the same configuration."""
    cfg = configuration.load(TrainConfig, options)[0]
    Path('my.py').write_text(configuration.dump(cfg, '# a comment\n'))
    assert configuration.load(TrainConfig, ['my.py'])[0] == cfg

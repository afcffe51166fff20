"""Damaged checkpoints and data sets end in a one-line error that names them, and nothing in them is
executed."""

import copy
import functools
import io
import json
import operator
import os
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch

import export
import sample
import train
from helpers import TEXT, checkpoint, folder_bytes, same
from runtime import checkpoint as ckpt
from runtime.config import UserError

pytestmark = [pytest.mark.usefixtures('one_thread', 'here'), pytest.mark.filterwarnings('ignore')]
PATH = Path('out/ckpt.pt')
RESUME = (train.main, '--init_from=resume', '--out_dir=out', '--device=cpu', '--max_iters=3')
EXPORT = (export.main, '--out_dir=out', '--to=nanogpt')
SAMPLE = (sample.main, '--out_dir=out', '--device=cpu', '--num_samples=1', '--max_new_tokens=1')
NAN, INFINITY, REMOVED = float('nan'), float('inf'), object()


@pytest.fixture
def good(trained):
    """Put a checkpoint at PATH, to be damaged, and return its content."""
    trained('--max_iters=2')
    return checkpoint()


@pytest.fixture
def check(refused):
    """check(words, *commands): each command ends in a one-line error with `words` and changes no
    file."""
    def check(words, *commands):
        before = folder_bytes('.')
        for command in commands:
            assert words in refused(*command)
        assert folder_bytes('.') == before and not Path('EXECUTED').exists()
    return check


def put(tree, place, value):
    """Return a copy of the tree with `value` at the place. A function computes the new value from
    the old one."""
    tree = copy.deepcopy(tree)
    *way, last = [int(key) if key.isdigit() else key for key in place.split('/')]
    inner = functools.reduce(operator.getitem, way, tree)
    inner[last] = value(inner[last]) if callable(value) else value
    if value is REMOVED:
        del inner[last]
    return tree


# --------------------------------------------------------------------------------------------------
# the bytes of a checkpoint

@pytest.mark.parametrize('stride', [37, pytest.param(3, marks=pytest.mark.slow)])
def test_a_cut_is_refused_and_a_flipped_bit_too_unless_it_changes_nothing(good, check, stride):
    """A truncated checkpoint ends in a one-line error. So does a flipped bit, unless no value
    changes, because times, padding and attributes of the zip file have no checksum. The damaged
    places are a grid over the file, each local header of the zip, and its whole directory."""
    content, harmless = PATH.read_bytes(), []
    places = {
        *range(0, len(content),
               len(content) // 60), *range(content.index(b'PK\1\2'), len(content), 23),
        *(header.start() + n % 45 for n, header in enumerate(re.finditer(b'PK\3\4', content)))}
    for n, place in enumerate(sorted(places)[::stride]):
        PATH.write_bytes(content[:place])
        check('out/ckpt.pt: ', RESUME, SAMPLE)
        PATH.write_bytes(content[:place] + bytes([content[place] ^ 1 << n % 8]) +
                         content[place + 1:])
        try:
            harmless.append(same(ckpt.load(PATH), good | {'path': str(PATH)}))
        except UserError:
            check('out/ckpt.pt: ', RESUME, SAMPLE)
    assert all(harmless) and len(harmless) < n / 2


def rewrite(change):
    """Write the checkpoint's zip file again with the content of each file changed."""
    content = io.BytesIO(PATH.read_bytes())
    with zipfile.ZipFile(content) as old, zipfile.ZipFile(PATH, 'w') as new:
        for piece in old.infolist():
            new.writestr(piece.filename, change(piece.filename, old.read(piece)))


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path('EXECUTED'),)


FILES = {
    'empty': lambda good: PATH.write_bytes(b''), 'text': lambda good: PATH.write_text(TEXT),
    'zeros': lambda good: PATH.write_bytes(bytes(len(good))),
    'a pickle': lambda good: PATH.write_bytes(pickle.dumps({})),
    'code': lambda good: PATH.write_bytes(pickle.dumps(Bomb())),
    'without data.pkl': lambda good: PATH.write_bytes(good.replace(b'data.pkl', b'data.pk_')),
    'a hole': lambda good: PATH.write_bytes(good[:len(good) // 2] + bytes(512) + good[len(
        good) // 2 + 512:]), 'another zip': lambda good: rewrite(lambda name, c: b'?'),
    'code in a zip': lambda good: rewrite(lambda name, c: pickle.dumps([Bomb()], 2)
                                          if 'data.pkl' in name else c),
    'other sizes': lambda good: rewrite(lambda name, c: c + b'1234' if '/data/' in name else c),
    'legacy': lambda good: torch.save(checkpoint(), PATH, _use_new_zipfile_serialization=False),
    'legacy code': lambda good: torch.save(Bomb(), PATH, _use_new_zipfile_serialization=False),
    'a list': lambda good: torch.save([checkpoint()], PATH),
    'nothing': lambda good: torch.save({}, PATH),
    'weights alone': lambda good: torch.save(checkpoint()['model'], PATH)
}


@pytest.mark.parametrize('spoil', FILES.values(), ids=FILES)
def test_a_file_that_is_no_checkpoint_is_refused(good, check, spoil):
    """A file that is no checkpoint ends in a one-line error in every command, and code in it does
    not run."""
    spoil(PATH.read_bytes())
    check('out/ckpt.pt: ', RESUME, SAMPLE, EXPORT)


# --------------------------------------------------------------------------------------------------
# the content of a checkpoint

HUGE = [10 ** n for n in (9, 18, 300)]
SPOILT = {f'model_args/{key}': [REMOVED, None, 'two', 1.5, True, 0, -1, torch.tensor(2), 3,
                                *HUGE * (key == 'n_head')]
          for key in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd')}
SPOILT |= {
    f'model/{name}.weight': [
        REMOVED, None, lambda w: w * NAN, lambda w: w / 0, lambda w: torch.cat((w, w)),
        lambda w: w.flatten()[:-1], lambda w: w[None], lambda w: w[:0], lambda w: w.tolist()
    ] for name in ('transformer.wte', 'transformer.wpe', 'transformer.h.0.ln_1', 'lm_head',
                   'transformer.h.0.attn.c_attn', 'transformer.h.0.mlp.c_proj', 'transformer.ln_f')
}
SPOILT |= {
    'model': [REMOVED, None, 'x', [1], torch.ones(3), 1.5, {},
              {'x': 1}], 'model_args': [REMOVED, None, 'x', [1],
                                        torch.ones(3), 1.5],
    'iter_num': [REMOVED, None, 'x', [1], 1.5], **{
        key: [None, 'x', torch.ones(3), {1}] for key in ('config', 'optimizer', 'scaler', 'random')
    }, 'tokenizer': [
        None, 'x',
        torch.ones(3), {1}, {
            'tokenizer': 'char', 'dtype': 'uint16', 'vocab_size': 18,
            'chars': [*'abcdefghijklmnopqr']}
    ], 'best_val_loss': [None, 'x', {1}], 'model_args/n_moe': [8], 'model_args/5': [8],
    'model_args/bias': [True, 'yes', 1, None], 'model_args/dropout': [1., -.1, NAN, 'x', None],
    'model_args/use_svd': ['yes', None,
                           1], 'model_args/svd_rank': [0, 'x',
                                                       .5], 'model_args/svd_block': [0, None],
    'model_args/gelu': ['none', None,
                        True], 'model_args/svd_method': ['qr',
                                                         None], 'model_args/svd_scope': ['rows', 2],
    'model/extra': [torch.ones(2)], 'model/lm_head.weight': [*SPOILT['model/lm_head.weight']],
    'tokenizer/tokenizer': [REMOVED, 'word', None, ['char'],
                            'gpt2'], 'tokenizer/dtype': [REMOVED, 'int8', None],
    'tokenizer/vocab_size': [REMOVED, 16, '17', 17., True, *HUGE], 'tokenizer/chars': [
        REMOVED, None, 17, ['a'], 'abcdefghijklmnopq', ['a'] * 17, [f'{n:02}' for n in range(17)],
        list(range(17)), lambda chars: chars + ['z']]
}
SPOILT_FOR_TRAINING = {
    'best_val_loss': [REMOVED], 'optimizer': [REMOVED, {}, {'muon': {}, 'adamw': {}}],
    'optimizer/state': [REMOVED, None], 'optimizer/param_groups': [
        REMOVED, None, [], lambda g: g[:1], lambda g: [*g, g[0]], 'x', [1, 2], [{}, {}],
        lambda g: [g[0] | {'params': [0]}, g[1]]
    ], 'random': [[], lambda r: r * 2, [None], ['x'], [{}]], **{
        f'random/0/{key}': [
            REMOVED, None, 'x',
            torch.ones(5056), *(torch.zeros(n, dtype=torch.uint8) for n in (0, 9, 5056))
        ] for key in ('torch', 'batches')
    }, 'config/batch_size': [0, 'x', None], 'config/learning_rate': [-1., 'x', NAN],
    'config/beta1': [1., 'x'], 'config/seed': [-1, 2 ** 63,
                                               1.5], 'config/optimizer': ['sgd', 'muon'],
    'config/grad_clip': [[1.]], 'config/dataset': ['nowhere', 3, '\0', '\ud800'],
    'config/always_save_checkpoint': ['x'], 'config/eval_interval': [0]
}
QUICK = [
    'model_args/n_layer', 'model_args/n_head', 'model_args/n_moe', 'model/lm_head.weight', 'model',
    'iter_num', 'best_val_loss', 'tokenizer', 'tokenizer/vocab_size', 'random', 'config/dataset',
    'optimizer'
]
CASES = [*((place, values, (RESUME, SAMPLE, EXPORT)) for place, values in SPOILT.items()),
         *((place, values, (RESUME,)) for place, values in SPOILT_FOR_TRAINING.items())]


@pytest.mark.parametrize('place, values, commands', [
    pytest.param(*case, marks=[] if case[0] in QUICK else pytest.mark.slow, id=case[0])
    for case in CASES
])
def test_spoilt_content_is_refused(good, check, place, values, commands):
    """A checkpoint with a missing or impossible entry ends in a one-line error that names the file
    or the option."""
    for value in values:
        torch.save(put(good, place, value), PATH)
        check(place.removeprefix('config/') if 'config/' in place else 'out/ckpt.pt', *commands)


def test_what_is_not_finite_is_not_saved(good):
    """Saving NaN or inf raises FloatingPointError and leaves the old checkpoint."""
    before = folder_bytes()
    for place in ('model/lm_head.weight', 'optimizer/state/0/exp_avg_sq', 'svd_basis'):
        with pytest.raises(FloatingPointError, match=place.replace('/', '.')):
            ckpt.save(put(good, place, torch.tensor([1., INFINITY])), PATH)
    assert folder_bytes() == before


def test_a_checkpoint_of_nanogpt_is_read(good, call):
    """A checkpoint of nanoGPT gives the same samples as our own. It has the name prefix of
    torch.compile, a stored causal mask, a loss that is a tensor, and no tokenizer, which is read
    from the data set. A padded vocabulary does not change the tokenizer."""
    expected = call(*SAMPLE, '--start=the').out
    for dataset in ('toy', 'data/toy'):
        theirs = {f'_orig_mod.{name}': w for name, w in good['model'].items()}
        theirs['_orig_mod.transformer.h.0.attn.bias'] = torch.ones(1, 1, 16, 16)
        torch.save({'model': theirs, 'model_args': good['model_args'], 'iter_num': 2,
                    'config': {'dataset': dataset},
                    'best_val_loss': torch.tensor(good['best_val_loss'])}, PATH)
        assert call(*SAMPLE, '--start=the').out == expected
    padded = put(good, 'model_args/vocab_size', 18)
    for name in ('lm_head.weight', 'transformer.wte.weight'):
        padded = put(padded, f'model/{name}', lambda w: torch.cat((w, w[:1])))
    assert ckpt.tokenizer_of(padded, 18)['vocab_size'] == 17 == ckpt.tokenizer_of(good,
                                                                                  17)['vocab_size']


def test_the_newest_run_is_found_before_what_was_brought_or_hidden(here, refused):
    """Without --out_dir, sample.py takes the newest run. Folders without config.py, which are no
    runs of train.py, come after runs, and hidden folders are ignored."""
    assert 'train_svd_test.py' in refused(*SAMPLE[:1], '--num_samples=1') and ckpt.newest() is None
    for age, name in enumerate(('exported', 'new', 'old', '.hidden/x', '.hid')):
        Path(name).mkdir(parents=True)
        Path(name, 'ckpt.pt').touch()
        os.utime(Path(name, 'ckpt.pt'), (0, 10 ** 9 - age))
    assert ckpt.find(None) == Path('exported/ckpt.pt') and ckpt.find('old') == Path('old/ckpt.pt')
    for name in ('old', 'new', '.hid'):
        Path(name, 'config.py').touch()
    assert ckpt.find(None) == Path('new/ckpt.pt') and '--out_dir=new' in refused(*RESUME)


@pytest.mark.any_device
def test_a_random_state_gives_the_same_numbers_again(device):
    """Restoring a random state repeats the numbers of torch's generators on the CPU and the device,
    and of the data order."""
    order, drawn = torch.Generator().manual_seed(5), []
    state = ckpt.random_state(order, device)
    for _ in range(2):
        drawn.append([torch.rand(9), torch.rand(9, device=device), torch.rand(9, generator=order)])
        ckpt.set_random_state(state, order, device)
    assert same(drawn[0], drawn[1])


# --------------------------------------------------------------------------------------------------
# data sets

CHARS = sorted(set(TEXT))
OLD = {
    'vocab_size': 17, 'itos': dict(enumerate(CHARS)), 'stoi': {c: n for n, c in enumerate(CHARS)}
}


TEXTS = ['null', '[]', '1' + '0' * 400, '1' + '0' * 5000, '[' * 100_000, 'NaN', '{}', '{}{}',
         '{"tokenizer": "\xff',
         '{"unfinished": "prepare again"}']
METAS = {
    'tokenizer': (REMOVED, None, 'gpt2', 'word', ['char']),
    'train_tokens': (1, 10 ** 30, 'x', None),
    'vocab_size': (REMOVED, None, 0, -1, 2, 16, 18, 17., True, '17', 10 ** 9, 10 ** 400),
    'dtype': (REMOVED, None, 'uint32', 'int8', 'object', 'float64', 16),
    'chars': (REMOVED, None, [], 17, 'abcdefghijklmnopq', ['a'] * 17, [1] * 17, ['ab'] * 17,
              CHARS[::-1], {c: 1 for c in CHARS})
}


PICKLES = [
    Bomb(), [Bomb()], {**OLD, 'itos': Bomb()}, {**OLD, 'itos': {n: Bomb()
                                                                for n in range(17)}}, None, [], 'x',
    {}, *(put(OLD, 'vocab_size', value) for value in (REMOVED, '17', 18, -1, 10 ** 300)),
    Path('x'), *(put(OLD, 'itos/3', value) for value in (REMOVED, 'ab', None, 'e')),
    *(put(OLD, 'itos', value) for value in (REMOVED, [], dict(enumerate(CHARS[::-1]))))
]
STREAMS = [
    b"cposix\nsystem\n(S'touch EXECUTED'\ntR.", b'cbuiltins\neval\n(Vopen("EXECUTED", "w")\ntR.',
    b'i__main__\nX\n.', b'Px\n.', b'\x80\x7f.', b'(lp0\ng9\n.', b'\x8c\xff', b'\x8e' + b'\xff' * 8,
    b'\x82\1.', b'{}'
]


def spoilt(name, whole):
    """Return contents that may replace a file of the data set."""
    cuts = [whole[:cut] for cut in range(0, len(whole) - 1, 9)]
    if name == 'meta.pkl':
        return [*map(pickle.dumps, PICKLES), *STREAMS, *cuts]
    if name == 'meta.json':
        changed = [put(json.loads(whole), key, value) for key in METAS for value in METAS[key]]
        return [*(text.encode() for text in [*TEXTS, *map(json.dumps, changed)]), *cuts]
    # ids beyond the vocabulary
    foreign = [whole[:place] + top.to_bytes(2, 'little') + whole[place:][2:]
               for place, top in ((0, 17), (200, 2 ** 15), (-2, 2 ** 16 - 1), (-2, 17))]
    return [
        b'', whole[:1], whole[:2], whole[:4], whole[:235], whole + b'\0', whole + b'\0\0',
        whole[:-2], whole * 2,
        TEXT.encode()[:len(whole)], b'\1' + whole[:-1], *foreign]


@pytest.mark.parametrize('name, stride', [
    ('train.bin', 1), ('val.bin', 1), ('meta.json', 5), ('meta.pkl', 5),
    *(pytest.param(name, 2, marks=pytest.mark.slow) for name in ('meta.json', 'meta.pkl'))])
def test_a_spoilt_data_set_is_refused(good, check, name, stride):
    """A damaged or missing file of a data set ends in a one-line error that names the data set."""
    path = Path('data/toy', name)
    if name == 'meta.pkl':
        os.remove('data/toy/meta.json')
        path.write_bytes(pickle.dumps(OLD))
    for content in spoilt(name, path.read_bytes())[::stride]:
        path.write_bytes(content)
        check('toy', RESUME)
    path.unlink()
    check('toy', RESUME)

"""Damaged checkpoints and data sets: each is refused in one line that names it; nothing in it runs, no file changes."""

import io
import json
import os
import pickle
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import export
import sample
import train
from helpers import TEXT, TINY, folder_bytes
from runtime import checkpoint as ckpt
from runtime.config import UserError

pytestmark = [pytest.mark.usefixtures('one_thread', 'here'), pytest.mark.filterwarnings('ignore')]
PATH = Path('out/ckpt.pt')
RESUME = (train.main, '--init_from=resume', '--out_dir=out', '--device=cpu', '--max_iters=3')
EXPORT = (export.main, '--out_dir=out', '--to=nanogpt')
SAMPLE = (sample.main, '--out_dir=out', '--device=cpu', '--num_samples=1', '--max_new_tokens=1')


@pytest.fixture(scope='module')
def good(tmp_path_factory, toy, one_thread):
    """The bytes of a checkpoint."""
    folder = tmp_path_factory.mktemp('good')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / 'data').mkdir()
        (folder / 'data' / 'toy').symlink_to(toy)
        patch.setattr(train, 'sample', lambda *args: '')
        assert train.main([*TINY, '--max_iters=2', '--out_dir=out']) == 0
    return (folder / PATH).read_bytes()


@pytest.fixture
def run(here, good):
    """The checkpoint at PATH, to be damaged -> what is in it."""
    PATH.parent.mkdir()
    PATH.write_bytes(good)
    return torch.load(PATH, weights_only=True)


@pytest.fixture
def check(refused):
    """check(words, *commands): each command is refused in a line with `words`, and leaves all files as they are."""
    def check(words, *commands):
        before = folder_bytes('.')
        for command in commands:
            assert words in refused(*command), words
        assert folder_bytes('.') == before and not Path('EXECUTED').exists()
    return check


def same(a, b):
    """Whether two trees of containers and tensors are equal to the bit."""
    for kind in (dict, list):
        if isinstance(a, kind) and isinstance(b, kind):
            pairs = [(a[k], b.get(k)) for k in a] if kind is dict else zip(a, b)
            return len(a) == len(b) and all(same(x, y) for x, y in pairs)
    return torch.is_tensor(b) and torch.equal(a, b) if torch.is_tensor(a) else a == b


# ----------------------------------------------------------------------------------------------------------------------
# the bytes of a checkpoint

def places(good):
    """Offsets of every structure of the zip, and a grid."""
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        found, end = {0, len(good) - 22, len(good) - 1, archive.start_dir}, archive.start_dir
        for piece in archive.infolist():                            # local header, name, padding, content, directory
            start, name = piece.header_offset, len(piece.filename)
            found |= {start, start + 12, start + 27, start + 31, start + 30 + name + 5, end, end + 20, end + 44}
            end += 46 + name + len(piece.extra) + len(piece.comment)
        found |= {good.index(archive.read(piece)) for piece in archive.infolist()}
    return sorted(found | set(range(0, len(good), len(good) // 60)))


def test_a_checkpoint_cut_off_anywhere_is_refused(run, good, check):
    cuts = places(good)
    assert len(cuts) > 200
    for cut in cuts:
        PATH.write_bytes(good[:cut])
        check('out/ckpt.pt: ', RESUME, SAMPLE)


def test_a_flipped_bit_is_refused_or_changes_nothing(run, good, check):
    """What is not covered by a checksum: times, padding, attributes of the zip."""
    harmless = 0
    for n, place in enumerate(places(good)):
        PATH.write_bytes(good[:place] + bytes([good[place] ^ 1 << n % 8]) + good[place + 1:])
        try:
            assert same(ckpt.load(PATH), run | {'path': str(PATH), 'stamp': ckpt.stamp(PATH)}), place
            harmless += 1
        except UserError:
            check('out/ckpt.pt: ', RESUME, SAMPLE)
    assert len(places(good)) - harmless > 150


def zipped(good, change=lambda name, content: content, **options):
    """The checkpoint's zip, written anew."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as old, zipfile.ZipFile(out, 'w', **options) as new:
        for piece in old.infolist():
            new.writestr(piece.filename, change(piece.filename, old.read(piece)))
    return out.getvalue()


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path('EXECUTED'),)


def legacy(content):
    out = io.BytesIO()
    torch.save(content, out, _use_new_zipfile_serialization=False)
    return out.getvalue()


def pickled(kind):
    """data.pkl replaced by a pickle that asks for code."""
    return lambda good: zipped(good, lambda name, c: pickle.dumps(kind, 2) if name.endswith('data.pkl') else c)


FILES = {
    'empty': lambda good: b'', 'text': lambda good: TEXT.encode(), 'zeros': lambda good: bytes(len(good)),
    'another zip': lambda good: zipped(good, lambda name, content: b'?'), 'a pickle': lambda good: pickle.dumps({}),
    'code': lambda good: pickle.dumps(Bomb()), 'code in a zip': pickled(Bomb()), 'code inside': pickled([Bomb()]),
    'legacy': lambda good: legacy(torch.load(io.BytesIO(good), weights_only=True)),
    'legacy code': lambda good: legacy(Bomb()),
    'other sizes': lambda good: zipped(good, lambda name, c: c + b'1234' if '/data/' in name else c),
    'without data.pkl': lambda good: zipped(good).replace(b'data.pkl', b'data.pk_'),
    'a hole': lambda good: good[:len(good) // 2] + bytes(512) + good[len(good) // 2 + 512:]}


@pytest.mark.parametrize('spoil', FILES.values(), ids=FILES)
def test_a_file_that_is_no_checkpoint_is_refused(run, good, check, spoil):
    PATH.write_bytes(spoil(good))
    check('out/ckpt.pt: ', RESUME, SAMPLE, EXPORT)


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may read everything')
def test_a_checkpoint_that_may_not_be_read_is_refused(run, refused):
    PATH.chmod(0)
    for command in (RESUME, SAMPLE):
        assert 'out/ckpt.pt: cannot be read: Permission denied' in refused(*command)


def test_a_folder_in_its_place_is_refused(run, check):
    PATH.unlink()
    PATH.mkdir()
    check('out/ckpt.pt: ', RESUME, SAMPLE)


# ----------------------------------------------------------------------------------------------------------------------
# the content of a checkpoint

def put(tree, *way_and_value):
    """The tree with one place replaced, or removed if the value is `put` itself."""
    first, *way, value = way_and_value
    tree = dict(tree) if isinstance(tree, dict) else list(tree)
    if way:
        tree[first] = put(tree[first], *way, value)
    elif value is put:
        del tree[first]
    else:
        tree[first] = value(tree.get(first)) if callable(value) else value
    return tree


def at(*ways, **named):
    """name -> function that puts each of the named values there."""
    return {f'{".".join(map(str, ways))} {name}': lambda good, value=value: put(good, *ways, value)
            for name, value in named.items()}


SHAPE = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd')
WEIGHTS = ('transformer.wte.weight', 'transformer.wpe.weight', 'transformer.h.0.ln_1.weight', 'lm_head.weight',
           'transformer.h.0.attn.c_attn.weight', 'transformer.h.0.mlp.c_proj.weight', 'transformer.ln_f.weight')
HUGE = {f'1e{n}': 10 ** n for n in (9, 18, 300)}
BOTH = {}                                                           # what sample.py reads, too
for key in ('model', 'model_args', 'iter_num'):
    BOTH |= at(key, missing=put, none=None, text='x', list=[1], tensor=torch.ones(3), half=1.5)
for key in ('tokenizer', 'config', 'optimizer', 'scaler', 'random', 'best_val_loss', 'interim_best_val_loss'):
    BOTH |= at(key, none=None, text='x', tensor=torch.ones(3), set={1})
for key in ('best_val_loss', 'interim_best_val_loss'):
    BOTH |= at(key, nan=float('nan'), infinite=torch.tensor(float('-inf')), bool=True, complex=1j)
BOTH |= at('model', empty={}, number={'x': 1})
for key in SHAPE:
    BOTH |= at('model_args', key, missing=put, none=None, text='two', half=1.5, bool=True, zero=0, negative=-1,
               tensor=torch.tensor(2), **HUGE if key != 'n_head' else {'three': 3})
BOTH |= at('model_args', 'n_moe', new=8) | at('model_args', 5, new=8)
BOTH |= at('model_args', 'bias', wrong=True, text='yes', number=1, none=None)
BOTH |= at('model_args', 'dropout', one=1., negative=-.1, nan=float('nan'), text='x', none=None)
BOTH |= at('model_args', 'use_svd', text='yes', none=None, number=1)
BOTH |= at('model_args', 'svd_rank', zero=0, text='x', half=.5) | at('model_args', 'svd_block', zero=0, none=None)
BOTH |= at('model_args', 'gelu', other='none', none=None, bool=True)
BOTH |= at('model_args', 'svd_method', other='qr', none=None) | at('model_args', 'svd_scope', other='rows', number=2)
for key in WEIGHTS:
    BOTH |= at('model', key, missing=put, none=None, int64=lambda w: w.long(), nan=lambda w: w * float('nan'),
               infinite=lambda w: w / 0, longer=lambda w: torch.cat((w, w)), flat=lambda w: w.flatten()[:-1],
               deeper=lambda w: w[None], empty=lambda w: w[:0], list=lambda w: w.tolist())
BOTH |= at('model', 'extra', weight=torch.ones(2))
BOTH |= at('model', 'lm_head.weight', other=lambda w: w + 1)
BOTH |= at('tokenizer', 'tokenizer', missing=put, other='word', none=None, list=['char'], gpt2='gpt2')
BOTH |= at('tokenizer', 'vocab_size', missing=put, other=16, text='17', half=17., bool=True, **HUGE)
BOTH |= at('tokenizer', 'dtype', missing=put, other='int8', none=None)
BOTH |= at('tokenizer', 'chars', missing=put, none=None, number=17, few=['a'], text='abcdefghijklmnopq',
           equal=['a'] * 17, long=[f'{n:02}' for n in range(17)], numbers=list(range(17)),
           half=list('abcdefghijklmnop\ud800'))
BOTH |= {'two': lambda good: [good, good], 'weights alone': lambda good: good['model'], 'nothing': lambda good: {}}
BOTH |= {'a larger tokenizer': lambda good: good | {'tokenizer': dict(
    tokenizer='char', vocab_size=99, dtype='uint16', chars=[chr(200 + n) for n in range(99)])}}
TRAIN = at('best_val_loss', missing=put) | at('optimizer', missing=put, empty={}, two={'muon': {}, 'adamw': {}})
for key in ('step', 'exp_avg', 'exp_avg_sq'):
    TRAIN |= at('optimizer', 'state', 0, key, missing=put, none=None, text='x', longer=torch.ones(3, 3),
                nan=lambda v: v * float('nan'))
TRAIN |= at('optimizer', 'state', 0, 'exp_avg_sq', negative=lambda v: v - 1) | at('optimizer', 'state', 0, 'new', new=1)
TRAIN |= at('optimizer', 'state', 0, 'step', negative=torch.tensor(-3.))
TRAIN |= at('optimizer', 'state', 1, missing=put, none=None)
TRAIN |= at('optimizer', 'state', missing=put, none=None, list=[], empty={})
TRAIN |= at('optimizer', 'param_groups', missing=put, none=None, empty=[], one=lambda g: g[:1],
            three=lambda g: [*g, g[0]], text='x', numbers=[1, 2], bare=[{}, {}],
            few=lambda g: [g[0] | {'params': [0]}, g[1]])
TRAIN |= at('random', empty=[], two=lambda r: r * 2, none=[None], text=['x'], bare=[{}])
for key in ('torch', 'batches'):
    TRAIN |= at('random', 0, key, missing=put, none=None, text='x', float=torch.ones(5056),
                **{f'{n} bytes': torch.zeros(n, dtype=torch.uint8) for n in (0, 9, 5056)})
for key, *bad in (('batch_size', 0, 'x', None, 10 ** 12), ('learning_rate', -1., 'x', float('nan')), ('beta1', 1., 'x'),
                  ('seed', -1, 2 ** 63, 1.5), ('optimizer', 'sgd', 'muon'), ('dataset', 'nowhere', 3, '\0', '\ud800'),
                  ('always_save_checkpoint', 'x'), ('eval_interval', 0), ('grad_clip', [1.])):
    TRAIN |= {f'config {key} {n}': lambda good, key=key, value=value: put(good, 'config', key, value)
              for n, value in enumerate(bad)}


@pytest.mark.parametrize('spoil', BOTH.values(), ids=BOTH)
def test_spoilt_content_is_refused(run, check, spoil):
    torch.save(spoil(run), PATH)
    check('out/ckpt.pt', RESUME, SAMPLE, EXPORT)


@pytest.mark.parametrize('name', TRAIN)
def test_spoilt_content_that_only_training_needs_is_refused(run, check, name):
    torch.save(TRAIN[name](run), PATH)
    check('dataset=nowhere' if name == 'config dataset 0' else 'batch_size' if name == 'config batch_size 3' else
          'out/ckpt.pt', RESUME)


@pytest.mark.parametrize('name', TRAIN)
def test_spoilt_content_that_only_training_needs_is_exported_without_it_or_refused(run, call, name):
    torch.save(TRAIN[name](run), PATH)
    result = call(*EXPORT)
    assert (result.code, result.err) == (0, '') or result.code == 2 and len(result.err.splitlines()) == 1
    if result.code == 0:
        optimizer = torch.load('out-nanogpt/ckpt.pt', weights_only=True)['optimizer']
        left_out = 'left out: the optimizer state' in result.out
        assert left_out == (not optimizer['state']) == (not same(optimizer['state'], run['optimizer']['state']))
    else:
        assert not Path('out-nanogpt').exists()


# ----------------------------------------------------------------------------------------------------------------------
# data sets

META = json.dumps({'tokenizer': 'char', 'vocab_size': 17, 'dtype': 'uint16', 'chars': sorted(set(TEXT)), 'source': 'x'})
CHARS = sorted(set(TEXT))
OLD = {'vocab_size': 17, 'itos': dict(enumerate(CHARS)), 'stoi': {c: n for n, c in enumerate(CHARS)}}


def foreign(place, top):
    """A token id beyond the vocabulary, at a place of the file."""
    def spoil(content):
        ids = np.frombuffer(content, np.uint16).copy()
        ids[int(place * (len(ids) - 1))] = top
        return ids.tobytes()
    return spoil


def folder(path):
    path.unlink()
    path.mkdir()


BINS = {'missing': Path.unlink, 'a folder': folder} | {
    name: lambda path, change=change: path.write_bytes(change(path.read_bytes())) for name, change in {
        'empty': lambda c: b'', 'one byte': lambda c: c[:1], 'one token': lambda c: c[:2], 'two': lambda c: c[:4],
        **{f'odd at {n}': lambda c, n=n: c[:n] for n in (3, 99, 235, 471)}, 'a byte more': lambda c: c + b'\0',
        'a token more': lambda c: c + b'\0\0', 'a token less': lambda c: c[:-2], 'half': lambda c: c[:len(c) // 4 * 2],
        'twice': lambda c: c * 2, 'text': lambda c: TEXT.encode()[:len(c)], 'shifted': lambda c: b'\1' + c[:-1],
        **{f'id {top} at {place}': foreign(place, top) for place in (0, .5, 1)
           for top in (17, 2 ** 15, 2 ** 16 - 1)}}.items()}


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize('spoil', BINS.values(), ids=BINS)
def test_spoilt_tokens_are_refused(run, check, spoil, split):
    spoil(Path(f'data/toy/{split}.bin'))
    check('toy', RESUME)


@pytest.mark.parametrize('name', ['meta.json', 'meta.pkl'])
def test_a_meta_file_cut_off_anywhere_is_refused(run, check, name):
    path = Path('data/toy/meta.json')
    content = path.read_bytes() if name == 'meta.json' else pickle.dumps(OLD)
    path.unlink()
    for cut in range(0, len(content) - 1, 9):
        path.with_name(name).write_bytes(content[:cut])
        check('data/toy', RESUME)


METAS = {'a folder': folder, 'not UTF-8': lambda path: path.write_bytes(b'\xff' + path.read_bytes())} | {
    name: lambda path, text=text: path.write_text(text) for name, text in {
        'null': 'null', 'a list': '[]', 'a number': '1' + '0' * 400, 'digits': '1' + '0' * 5000, 'deep': '[' * 100_000,
        'NaN': 'NaN', 'empty': '{}', 'two': META + META, 'unfinished': '{"unfinished": "prepare again"}'}.items()} | {
    f'{key} {n}': lambda path, way=(key, value): path.write_text(json.dumps(put(json.loads(path.read_text()), *way)))
    for key, values in {'tokenizer': (put, None, 'gpt2', 'word', ['char']), 'train_tokens': (1, 10 ** 30, 'x', None),
                        'vocab_size': (put, None, 0, -1, 2, 16, 18, 17., True, '17', 10 ** 9, 10 ** 400),
                        'dtype': (put, None, 'uint32', 'int8', 'object', 'float64', 16), 'source': ('\ud800', ),
                        'chars': (put, None, [], 17, 'abcdefghijklmnopq', ['a'] * 17, [1] * 17, ['ab'] * 17,
                                  CHARS[::-1], {c: 1 for c in set(TEXT)})}.items()
    for n, value in enumerate(values)}


@pytest.mark.parametrize('spoil', METAS.values(), ids=METAS)
def test_a_spoilt_meta_json_is_refused(run, check, spoil):
    spoil(Path('data/toy/meta.json'))
    check('toy', RESUME)


PICKLES = [pickle.dumps(content) for content in (
    Bomb(), [Bomb()], {**OLD, 'itos': Bomb()}, {**OLD, 'itos': {n: Bomb() for n in range(17)}}, None, [], 'x', {},
    *(put(OLD, 'vocab_size', value) for value in (put, '17', 18, -1, 10 ** 300)), Path('x'),
    *(put(OLD, 'itos', 3, value) for value in (put, 'ab', None, 'e')),
    *(put(OLD, 'itos', value) for value in (put, [], dict(enumerate(CHARS[::-1])))))] + [
    b"cposix\nsystem\n(S'touch EXECUTED'\ntR.", b'cbuiltins\neval\n(Vopen("EXECUTED", "w")\ntR.', b'i__main__\nX\n.',
    b'Px\n.', b'\x80\x7f.', b'(lp0\ng9\n.', b'\x8c\xff', b'\x8e' + b'\xff' * 8, b'\x82\1.', META.encode()]


@pytest.mark.parametrize('content', PICKLES, ids=range(len(PICKLES)))
def test_a_spoilt_meta_pkl_is_refused(run, check, content):
    Path('data/toy/meta.json').unlink()
    Path('data/toy/meta.pkl').write_bytes(content)
    check('toy', RESUME)


@pytest.mark.parametrize('content', [b'', b'a', b'\xff\xfe', TEXT.encode('utf-16'), TEXT.encode() + b'\xe9',
                                     b'\xed\xa0\x80', b'\xef\xbb\xbf', b'\xef\xbb\xbfa', b'\r\n', b'\x1f\x8b\x08'])
def test_a_spoilt_text_is_refused(here, check, monkeypatch, content):
    monkeypatch.setattr(train, 'locate', partial(train.locate, roots=(here / 'data',)))
    Path('my.txt').write_bytes(content)
    check('my.txt', (train.main, *TINY, '--dataset=my.txt'))

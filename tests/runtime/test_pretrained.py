"""Models in Hugging Face's GPT-2 format against transformers, both ways; what is refused; export.py."""

import json
import os
import pickle
import random
import signal
import sys
from dataclasses import asdict
from itertools import count
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

import export
import helpers
import sample
import train
from helpers import checkpoint, equal, folder_bytes
from model import GPT, METHODS, GPTConfig
from runtime import checkpoint as ckpt
from runtime import download, pretrained
from runtime.config import UserError
from runtime.dataset import GPT2_META, Tokenizer

pytestmark = [pytest.mark.usefixtures('one_thread', 'hub'), pytest.mark.filterwarnings('ignore')]
SMALL = dict(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=8)
each_shape = pytest.mark.parametrize('shape', [
    SMALL, dict(SMALL, gelu='tanh', bias=False, dropout=.2),
    dict(block_size=7, vocab_size=3, n_layer=1, n_head=3, n_embd=6, gelu='tanh'),
    dict(block_size=33, vocab_size=130, n_layer=3, n_head=1, n_embd=5, bias=False)], ids=range(4))
CHARS = '\n abcdefghi'                                              # as many as SMALL has ids
SAMPLE = ('--device=cpu', '--num_samples=1', '--max_new_tokens=3')


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(name, model) puts a model into the Hugging Face cache, laid out as theirs, and its sizes into the table of
    known names. The cache is empty at first, and the hub is out of reach."""
    constants = pytest.importorskip('huggingface_hub.constants')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))

    def cached(name, model, prefix='transformer.'):
        root, commit = tmp_path / 'hub' / f'models--openai-community--{name}', '0123456789abcdef' * 2 + '01234567'
        for folder in ('refs', 'blobs', f'snapshots/{commit}'):
            (root / folder).mkdir(parents=True)
        (root / 'refs' / 'main').write_text(commit)
        config, weights = gpt2_of(model)
        weights = {name.replace('transformer.', prefix): w.contiguous() for name, w in weights.items()}
        for i in range(model.config.n_layer):                       # as in OpenAI's files: buffers, not weights
            weights |= {f'{prefix}h.{i}.attn.bias': torch.ones(1, 1, 16, 16).tril(),
                        f'{prefix}h.{i}.attn.masked_bias': torch.tensor(-1e4)}
        save_file(weights, root / 'blobs' / 'abc')
        (root / 'snapshots' / commit / 'model.safetensors').symlink_to('../../blobs/abc')
        sizes = ('n_layer', 'n_head', 'n_embd', 'vocab_size', 'n_positions')
        monkeypatch.setitem(pretrained.MODELS, name, {key: config[key] for key in sizes})
    return cached


@pytest.fixture(scope='module')
def hf():
    """transformers, which takes seconds to load."""
    return pytest.importorskip('transformers')


def make(**config):
    """A small float32 model with every parameter well away from its initial value."""
    return helpers.make(dtype=torch.float32, **dict(svd_block=GPTConfig.svd_block) | config)


def tokens(config, rows=3):
    return torch.randint(config.vocab_size, (rows, config.block_size), generator=torch.Generator().manual_seed(1))


def char_meta(chars):
    return dict(tokenizer='char', vocab_size=len(chars), dtype='uint16', chars=list(chars))


def gpt2_of(model):
    return pretrained.to_gpt2(asdict(model.config), export.plain_state_dict(model))


def write(folder, model, meta=None):
    """The model in Hugging Face's format -> the folder, as text."""
    Path(folder).mkdir(exist_ok=True)
    pretrained.write(Path(folder), *gpt2_of(model), meta)
    return str(folder)


def edit_config(folder, **changes):
    path = Path(folder) / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_same_logits(ours, theirs, dtypes=(torch.float32, torch.float64)):
    """To 100 times eps of the largest logit, and some more in float64, where both round gelu's constants."""
    idx = tokens(ours.config)
    for dtype in dtypes:
        with torch.no_grad():
            a, b = ours.to(dtype)(idx, idx)[0], theirs.eval().to(dtype)(idx).logits
        assert (a - b).abs().max() < {torch.float32: 1e-5, torch.float64: 1e-10}[dtype] * a.abs().max()
    ours.float(), theirs.float()


# ----------------------------------------------------------------------------------------------------------------------
# against transformers

@each_shape
def test_transformers_computes_and_generates_the_same_from_what_is_written(hf, tmp_path, shape):
    model = make(**shape)
    theirs, report = hf.GPT2LMHeadModel.from_pretrained(write(tmp_path, model), output_loading_info=True)
    assert not any(report.values()), report
    assert_same_logits(model, theirs)
    idx, new = tokens(model.config)[:, :2], model.config.block_size - 2
    expected = theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=new, do_sample=False)
    assert torch.equal(model.generate(idx, new, top_k=1), expected)


@each_shape
def test_what_transformers_saves_in_shards_is_read(hf, tmp_path, shape):
    config = GPTConfig(**shape)
    torch.manual_seed(0)
    theirs = hf.GPT2LMHeadModel(hf.GPT2Config(
        n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd, vocab_size=config.vocab_size,
        n_positions=config.block_size, bos_token_id=None, eos_token_id=None,
        activation_function='gelu' if config.gelu == 'exact' else 'gelu_new'))
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p), alpha=.3)
    theirs.save_pretrained(tmp_path, max_shard_size=1000)
    assert len(list(tmp_path.glob('*.safetensors'))) > 1 and (tmp_path / 'model.safetensors.index.json').exists()
    ours = GPT.from_pretrained(str(tmp_path)).eval()
    assert ours.config == GPTConfig(**shape | dict(bias=True, dropout=.1))
    assert_same_logits(ours, theirs)


@each_shape
def test_a_round_trip_changes_no_bit(tmp_path, shape):
    model = make(**shape)
    again = GPT.from_pretrained(write(tmp_path / 'a', model))
    assert again.config == model.config and equal(again.state_dict(), model.state_dict())
    assert again.lm_head.weight is again.transformer.wte.weight
    write(tmp_path / 'b', again)
    assert folder_bytes(tmp_path / 'a') == folder_bytes(tmp_path / 'b')


def test_weights_without_biases_that_were_given_some_have_them(hf, tmp_path):
    """"bias": false outlives transformers' training, in which all biases take part."""
    theirs = hf.GPT2LMHeadModel.from_pretrained(write(tmp_path, make(bias=False)))
    theirs.save_pretrained(tmp_path)
    assert GPT.from_pretrained(str(tmp_path)).config.bias is False
    with torch.no_grad():
        theirs.transformer.h[1].mlp.c_fc.bias[3] = 1
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path)).eval()
    assert ours.config.bias is True
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(tmp_path, dtype):
    model = make().to(dtype)
    read = GPT.from_pretrained(write(tmp_path, model)).state_dict()
    assert equal(read, {name: w.float() for name, w in model.state_dict().items()})


@pytest.mark.parametrize('method, dtype', zip(METHODS, [torch.float64, torch.float32, torch.float64], strict=True))
def test_weight_scope_becomes_part_of_the_weights(hf, tmp_path, method, dtype):
    model = make(use_svd=True, svd_rank=2, svd_scope='weight', svd_method=method).to(dtype)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    theirs = hf.GPT2LMHeadModel.from_pretrained(write(tmp_path, model), dtype=dtype)
    assert equal(model.state_dict(), before)
    assert_same_logits(model, theirs, [dtype])
    read = GPT.from_pretrained(str(tmp_path))
    assert read.config == GPTConfig(**SMALL)
    w_v = read.transformer.h[0].attn.c_attn.weight[-8:].view(2, 4, 8)
    assert torch.linalg.matrix_rank(w_v, rtol=1e-5).tolist() == [2, 2]


@pytest.mark.parametrize('options', [dict(use_svd=False, svd_rank=2), dict(svd_rank=None), dict(svd_rank=4),
                                     dict(svd_rank=4, svd_scope='causal'), dict(svd_rank=4, svd_scope='weight')])
def test_an_svd_that_changes_nothing_is_left_out(tmp_path, options):
    model = make(**dict(use_svd=True) | options)
    read = GPT.from_pretrained(write(tmp_path, model))
    assert read.config == GPTConfig(**SMALL) and equal(read.state_dict(), model.state_dict())


# ----------------------------------------------------------------------------------------------------------------------
# names

@pytest.mark.parametrize('prefix', ['', 'transformer.'])
def test_a_name_is_found_in_the_cache_without_a_network(hub, prefix):
    model, idx = make(gelu='tanh'), tokens(make().config)
    hub('gpt2', model, prefix)
    read = GPT.from_pretrained('gpt2').eval()
    assert torch.equal(read(idx, idx)[0], model(idx, idx)[0]) and read.config == model.config
    assert read.lm_head.weight is read.transformer.wte.weight
    with_svd = dict(dropout=.1, use_svd=True, svd_rank=3, svd_scope='causal')
    assert GPT.from_pretrained('gpt2', with_svd).config == GPTConfig(**asdict(model.config) | with_svd)


@pytest.mark.parametrize('name, parameters', [('gpt2', 124_439_808), ('gpt2-medium', 354_823_168),
                                              ('gpt2-large', 774_030_080), ('gpt2-xl', 1_557_611_200)])
def test_the_four_sizes_are_the_published_ones(name, parameters):
    sizes = pretrained.DEFAULTS | pretrained.MODELS[name]
    args = {ours: sizes[theirs] for ours, theirs in pretrained.FIELDS.items()}
    with torch.device('meta'):
        model = GPT(GPTConfig(**args, bias=True))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert args['n_embd'] == 64 * args['n_head'] and (args['vocab_size'], args['block_size']) == (50257, 1024)


def test_a_folder_comes_before_a_known_name(hub, tmp_path, monkeypatch):
    hub('gpt2', make())
    monkeypatch.chdir(tmp_path)
    write('gpt2', make(n_layer=1), char_meta(CHARS))
    assert GPT.from_pretrained('gpt2').config.n_layer == 1
    assert pretrained.read_tokenizer('gpt2') == char_meta(CHARS)
    assert pretrained.read_tokenizer('gpt2-xl') == GPT2_META


@pytest.mark.parametrize('name, overrides, words', [
    ('gpt3', {}, ["init_from='gpt3'", "'gpt2-xl'", "(nearest: 'gpt2')"]),
    ('.', {}, ["init_from='.'", 'ckpt.pt', 'config.json']),
    ('gpt2', {}, ["init_from='gpt2'", 'Hugging Face cache']),       # which is empty
    ('gpt2', dict(n_layer=3), ['n_layer=3', 'gpt2']), ('gpt2', dict(gelu='exact'), ['gelu=exact', 'gpt2'])])
def test_what_has_no_weights_or_another_shape_is_refused(tmp_path, monkeypatch, name, overrides, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as e:
        GPT.from_pretrained(name, overrides)
    assert '\n' not in str(e.value) and str(e.value).startswith(words[0]) and all(word in str(e.value) for word in words)


@pytest.mark.parametrize('package, name', [('safetensors', 'good'), ('huggingface_hub', 'gpt2')])
def test_a_missing_package_is_named(good, monkeypatch, package, name):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"^init_from='{name}': .*: pip install {package}$"):
        GPT.from_pretrained(name)


# ----------------------------------------------------------------------------------------------------------------------
# damage

@pytest.fixture
def good(tmp_path, monkeypatch):
    """A folder 'good' in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    write('good', make(), char_meta(CHARS))
    return Path('good')


@pytest.fixture
def bad(refused):
    """bad(words): sampling from 'good' is refused in a line with `words`."""
    def bad(words=''):
        line = refused(sample.main, *SAMPLE, '--init_from=good')
        assert line.startswith("sample.py: init_from='good': ") and words in line and len(line) < 500, line
    return bad


def test_a_good_folder_gives_a_sample_without_transformers(good, call, monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    result = call(sample.main, *SAMPLE, '--init_from=good', '--start=abc')
    assert result.code == 0 and result.out.startswith('good; SVD on V off\nabc')


@pytest.mark.parametrize('cuts', [6, pytest.param(60, marks=pytest.mark.slow)])
def test_weights_cut_off_anywhere_are_refused(good, bad, cuts):
    path = good / 'model.safetensors'
    content = path.read_bytes()
    for cut in [0, 7, 8, *range(64, len(content), len(content) // cuts), len(content) - 1]:
        path.write_bytes(content[:cut])
        bad('model.safetensors')


@pytest.mark.parametrize('stride', [209, pytest.param(11, marks=pytest.mark.slow)])
def test_a_flipped_bit_in_the_header_is_refused_or_changes_nothing(good, stride):
    path, refusals = good / 'model.safetensors', 0
    content = path.read_bytes()
    places = range(0, 8 + int.from_bytes(content[:8], 'little'), stride)
    for place in places:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1:])
        try:
            assert equal(GPT.from_pretrained('good').state_dict(), make().state_dict())
        except UserError as e:
            assert str(e).startswith("init_from='good': ")
            refusals += 1
    assert refusals > .8 * len(places)


@pytest.mark.parametrize('name', ['config.json', 'tokenizer.json', 'model.safetensors.index.json'])
def test_a_file_that_is_no_json_object_is_refused(good, bad, name):
    if 'index' in name:
        (good / 'model.safetensors').unlink()
    for content in (b'', b'null', b'[]', b'hello', b'{"n_layer": 2', b'[' * 100_000, b'\xff\xfe{}',
                    b'{"n_layer": 1' + b'0' * 5000 + b'}'):
        (good / name).write_bytes(content)
        bad(name)


VALUES = {key: [10 ** 9, 10 ** 300, 0, -1, '2', None, True, 2.0, float('nan'), float('inf'), [2], {}]
          for key in ('n_layer', 'n_head', 'n_embd', 'vocab_size', 'n_positions')}
VALUES['n_layer'] += [1, 3]                                         # possible, and not those of the weights
VALUES['n_head'] += [3]
VALUES['vocab_size'] += [12]
VALUES['n_positions'] += [8]
VALUES |= dict(n_inner=[31, 'x'], layer_norm_epsilon=[1e-6, None], scale_attn_weights=[False],
               scale_attn_by_inverse_layer_idx=[True], add_cross_attention=[True],
               model_type=['llama', None, ['gpt2']], tie_word_embeddings=[False],
               activation_function=['relu', 'silu', None, 3, ['gelu'], {}],
               resid_pdrop=[1, 1.5, -.1, float('nan'), '0.1', None, True, 10 ** 400])


@pytest.mark.parametrize('key', VALUES)
def test_a_config_that_cannot_be_is_refused(good, bad, key):
    for value in VALUES[key]:
        edit_config(good, **{key: value})
        bad()


def test_what_changes_nothing_in_a_config_is_read(hf, good):
    edit_config(good, n_inner=32, reorder_and_upcast_attn=True, attn_pdrop=.5, torch_dtype='float16',
                activation_function='gelu_pytorch_tanh', summary_type='mean')
    ours = GPT.from_pretrained('good').eval()
    assert ours.config == make(gelu='tanh').config
    assert_same_logits(ours, hf.GPT2LMHeadModel.from_pretrained('good', dtype=torch.float32))


W = 'transformer.wte.weight'
C_ATTN = 'transformer.h.1.attn.c_attn.weight'
SPOILS = {
    'lacks wte': (lambda s: s.pop(W), 'wte.weight'),
    'lacks a bias': (lambda s: s.pop('transformer.ln_f.bias'), 'ln_f.bias'),
    'lacks a layer': (lambda s: [s.pop(k) for k in list(s) if '.h.1.' in k], 'n_layer=2 in config.json, and 1 layers'),
    'lacks much': (lambda s: [s.pop(k) for k in list(s) if '.mlp.' in k], 'and 5 more'),
    'nothing': (lambda s: s.clear(), 'and 0 layers'),
    'strange name': (lambda s: s.update(h=s[W] + 1), 'weights: h'),
    'more': (lambda s: s.update(score=torch.ones(2)), 'score'),
    'cross': (lambda s: s.update({'transformer.h.0.crossattention.c_attn.weight': s[C_ATTN] + 1}), 'h.0.crossattention'),
    'short': (lambda s: s.update({W: s[W][:9].clone()}), 'wte.weight: shape (9, 8) in the file, (11, 8) in the model'),
    'not transposed': (lambda s: s.update({C_ATTN: s[C_ATTN].t().contiguous()}), 'h.1.attn.c_attn.weight: shape (24, 8)'),
    'flat': (lambda s: s.update({W: s[W].flatten()}), 'wte.weight: shape (88,)'),
    'scalar': (lambda s: s.update({W: torch.tensor(1.)}), 'wte.weight: shape ()'),
    'whole': (lambda s: s.update({W: s[W].long()}), 'wte.weight: numbers of type I64'),
    'eighth': (lambda s: s.update({W: s[W].to(torch.float8_e4m3fn)}), 'wte.weight: numbers of type F8'),
    'nan': (lambda s: s[C_ATTN].view(-1)[5].fill_(float('nan')), 'h.1.attn.c_attn.weight is not finite'),
    'infinite': (lambda s: s['transformer.ln_f.bias'][0].fill_(float('-inf')), 'ln_f.bias is not finite'),
    'twice': (lambda s: s.update({'wte.weight': s[W] + 1}), 'wte.weight'),
    'untied': (lambda s: s.update({'lm_head.weight': s[W] + 1}), 'lm_head.weight and wte.weight')}


@pytest.mark.parametrize('spoil, words', SPOILS.values(), ids=SPOILS)
def test_weights_that_do_not_fit_are_refused(good, bad, spoil, words):
    state = {name: w.clone() for name, w in load_file(good / 'model.safetensors').items()}
    spoil(state)
    (good / 'model.safetensors').write_bytes(save(state))
    bad(words)


def test_a_head_that_is_equal_is_no_second_tensor(good):
    state = load_file(good / 'model.safetensors')
    (good / 'model.safetensors').write_bytes(save(state | {'lm_head.weight': state[W].clone()}))
    edit_config(good, tie_word_embeddings=False)
    assert equal(GPT.from_pretrained('good').state_dict(), make().state_dict())


def test_a_spoilt_index_is_refused(good, bad):
    (good / 'model.safetensors').rename(good / 'shard')
    for weight_map, words in [
            (None, 'index.json'), ({}, 'index.json'), ([], 'index.json'), ({'wte.weight': 3}, 'index.json'),
            ({'wte.weight': '../good/shard'}, 'index.json'), ({'wte.weight': '/etc/passwd'}, 'index.json'),
            ({'wte.weight': 'nowhere'}, 'nowhere'), ({'wte.weight': 'config.json'}, 'config.json')]:
        (good / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': weight_map}))
        bad(words)


def test_missing_and_foreign_files_are_refused(good, bad, refused):
    (good / 'model.safetensors').unlink()
    bad('model.safetensors')
    (good / 'pytorch_model.bin').write_bytes(pickle.dumps('x'))
    bad('pytorch_model.bin is a pickle')
    (good / 'model.safetensors').mkdir()
    bad('model.safetensors ')
    (good / 'config.json').unlink()
    for main in (sample.main, train.main):
        assert 'config.json' in refused(main, '--init_from=good')
        assert "(nearest: 'gpt2')" in refused(main, '--init_from=gpt3')


# ----------------------------------------------------------------------------------------------------------------------
# tokenizers

HARD = '\n\r\t \u00a0\u3000ĠĊ▁#\'"\\{}<|>[UNK]éa\u0301\u0308🙂👩\u200d👧\x00\x7f\x85\u2028ß\u0130İΣ日本'
TEXTS = ['Hello  world', '  \n\n\t x', "it's I'll we've can't 'S", 'naïve café 日本語 🙂👩\u200d👩 a\u0301',
         '12 345,6.7 $%^&*(){}<>|`~',
         '\u2003\u00a0x\u3000y\x85z\u200bq\u2028r\x1cs', '<|endoftext|> in a<|endoftext|>b', ' \r\n\r\n \r', 'ſKÅª²Ⅷ٣१',
         '\x00\x01\x7f\x80', 'א ב ר', ' ' * 20 + 'the' + ' ' * 20, 'th the thethe',
         'def f(x):\n    return the  # and\n\n\n']


@settings(derandomize=True, max_examples=15, deadline=None)
@given(data=st.data(), chars=st.just(set(HARD)) | st.sets(
    st.sampled_from(HARD) | st.characters(exclude_categories=['Cs']), min_size=1, max_size=40))
def test_a_vocabulary_of_characters_encodes_and_decodes_as_in_transformers(hf, tmp_path_factory, data, chars):
    meta, folder = char_meta(sorted(chars)), tmp_path_factory.mktemp('chars')
    pretrained.write(folder, dict(model_type='gpt2', n_positions=16), {}, meta)
    theirs, ours = hf.AutoTokenizer.from_pretrained(folder), Tokenizer(meta)
    texts = data.draw(st.lists(st.text(st.sampled_from(meta['chars']), max_size=30), min_size=3, max_size=3))
    for text in [*texts, ''.join(meta['chars']), meta['chars'][0] * 3]:
        ids = ours.encode(text)
        assert theirs.encode(text) == ids and theirs.decode(ids) == text == ours.decode(ids)
    assert pretrained.read_tokenizer(str(folder)) == meta
    theirs.save_pretrained(folder)
    assert pretrained.read_tokenizer(str(folder)) == meta


@pytest.fixture
def small_bpe(monkeypatch):
    """An encoding with a few real merges, in place of GPT-2's, which is a download."""
    tiktoken = pytest.importorskip('tiktoken')
    merged = [b'th', b'the', b' t', b' the', b'an', b'and', b' a', b' and', b'\xf0\x9f', b'\xf0\x9f\x99', b'\n\n',
              b'  ', b'    ', b'\'s', b'\xc3\xa9', b'12', b're', b'\xe6\x97']
    ranks = {token: rank for rank, token in enumerate([*(bytes([byte]) for byte in range(256)), *merged])}
    encoding = tiktoken.Encoding('small', pat_str=download.BPE_PATTERN, mergeable_ranks=ranks,
                                 special_tokens={'<|endoftext|>': len(ranks)})
    monkeypatch.setattr(download, 'gpt2_encoding', lambda: encoding)
    return encoding


@pytest.fixture(scope='module')
def gpt2_files():
    """GPT-2's own vocabulary and merges, if an earlier command of this user has downloaded them."""
    files = [Path.home() / '.cache' / 'gpt2-bpe' / name for name in download.BPE_FILES]
    if not all(file.exists() for file in files):
        pytest.skip("GPT-2's BPE is not on this machine, and tests do without a network")
    return files


def assert_same_tokens(hf, folder, encoding):
    theirs, draw = hf.AutoTokenizer.from_pretrained(folder), random.Random(0)
    kinds = ['the', ' and', '\n', '  ', "'s", '1', 'é', '🙂', '\u00a0', *map(chr, range(33, 127))]
    for text in TEXTS + [''.join(draw.choices(kinds, k=20)) for _ in range(200)]:
        ids = encoding.encode(text, allowed_special={'<|endoftext|>'})
        assert theirs.encode(text) == ids and theirs.decode(ids) == encoding.decode(ids)
    assert (theirs.eos_token_id, len(theirs)) == (encoding.eot_token, encoding.n_vocab)
    return theirs


def test_a_bpe_encodes_and_decodes_as_in_transformers_and_is_not_taken_for_gpt2s(hf, good, bad, small_bpe):
    write('good', make(), GPT2_META)
    assert_same_tokens(hf, 'good', small_bpe)
    bad("GPT-2's BPE")


@pytest.mark.slow
def test_gpt2s_bpe_is_known_with_added_special_tokens_and_not_with_words(hf, good, bad, gpt2_files):
    write('good', make(), GPT2_META)
    theirs = assert_same_tokens(hf, 'good', download.gpt2_encoding())
    assert pretrained.read_tokenizer('good') == GPT2_META
    theirs.add_special_tokens({'pad_token': '[PAD]'})
    theirs.save_pretrained('good')
    assert pretrained.read_tokenizer('good') == GPT2_META
    theirs.add_tokens(['word'])
    theirs.save_pretrained('good')
    bad("GPT-2's BPE")


def test_gpt2s_bpe_is_known_by_its_older_files(good, bad, gpt2_files):
    (good / 'tokenizer.json').unlink()
    for file, name in zip(gpt2_files, ('merges.txt', 'vocab.json'), strict=True):
        (good / name).write_bytes(file.read_bytes())
    assert pretrained.read_tokenizer('good') == GPT2_META
    (good / 'merges.txt').write_text('#version: 0.2\na b\n')
    bad("GPT-2's BPE")


@pytest.mark.parametrize('changes', [
    dict(normalizer=dict(type='Lowercase')), dict(pre_tokenizer=dict(type='Whitespace')), dict(decoder=None),
    dict(added_tokens=[dict(id=11, content='<s>', special=True)]), dict(model=None),
    dict(model=dict(type='Unigram', vocab=[['a', 0.1]])), dict(model=dict(type='WordLevel', vocab={})),
    *(dict(model=dict(type='WordLevel', vocab=vocab, unk_token='<unk>'))
      for vocab in ({'a': 0, 'b': 7}, {'ab': 0}, {'a': 'x', 'b': 1}, {'\ud800': 0})),
    *(dict(model=dict(type='BPE', vocab={'a': 0}, merges=merges)) for merges in ([], [3])),
    dict(model=dict(type='BPE', vocab=['a'], merges=['a b']), pre_tokenizer=[])], ids=str)
def test_other_tokenizers_are_refused(good, bad, changes):
    path = good / 'tokenizer.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    bad('its tokenizer ')


def test_a_folder_without_a_tokenizer_is_taken_for_openais_if_it_has_its_ids(good, bad, call, byte_bpe):
    (good / 'tokenizer.json').unlink()
    assert pretrained.read_tokenizer('good') is None
    bad('tokenizer.json')
    write('large', make(vocab_size=50257))
    assert call(sample.main, *SAMPLE, '--init_from=large').code == 0


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(good, bad):
    write('good', make(vocab_size=5), char_meta(CHARS))
    bad('its tokenizer has 11 token ids, its model 5')


# ----------------------------------------------------------------------------------------------------------------------
# train.py

def test_training_goes_on_from_a_folder(trained, call, refused):
    trained('--gelu=tanh', '--dropout=.1')
    assert call(export.main, '--out_dir=out', '--save_dir=mine').code == 0
    options = ('--dataset=toy', '--device=cpu')
    assert call(train.main, *options, '--init_from=mine', '--out_dir=all', '--max_iters=2', '--eval_iters=1',
                '--batch_size=1', '--gradient_accumulation_steps=1').code == 0
    assert checkpoint('all')['model_args'] == checkpoint()['model_args'] | dict(dropout=0.0)
    assert call(train.main, '--init_from=resume', '--out_dir=all', '--max_iters=3').code == 0
    assert checkpoint('all')['iter_num'] == 3
    line = refused(train.main, *options, '--init_from=mine', '--gelu=exact')
    assert 'gelu=exact' in line and 'gelu=tanh' in line


def test_data_in_other_tokens_than_the_models_are_refused(here, refused):
    write('mine', make(vocab_size=17), char_meta('abcdefghijklmnopq'))
    for name in ('mine', 'gpt2'):
        line = refused(train.main, f'--init_from={name}', '--dataset=toy', '--device=cpu')
        assert 'dataset=toy: ' in line and name in line


# ----------------------------------------------------------------------------------------------------------------------
# export.py

def test_a_run_is_exported_for_transformers(hf, trained, call):
    trained()
    result = call(export.main)
    assert (result.code, result.err) == (0, '') and result.out.startswith('out/ckpt.pt: 4 steps, written to out-gpt2 ')
    written = {path.name: path.stat().st_size for path in Path('out-gpt2').iterdir()}
    assert written.keys() == {'config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json'}
    assert all(f'{name}: {size:,} bytes' in result.out for name, size in written.items())
    assert 'left out: the optimizer state' in result.out and not list(Path().glob('*.tmp'))
    model, tokenizer = (kind.from_pretrained('out-gpt2') for kind in (hf.AutoModelForCausalLM, hf.AutoTokenizer))
    ids = tokenizer('the cat', return_tensors='pt')
    assert set(ids) == {'input_ids', 'attention_mask'}
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=8, do_sample=False)[0])
    ours = GPT.from_checkpoint(ckpt.load('out/ckpt.pt')).eval()
    assert_same_logits(ours, model)
    assert text == tokenizer.decode(ours.generate(ids['input_ids'], 8, top_k=1)[0])
    assert call(sample.main, *SAMPLE, '--init_from=out-gpt2', '--start=the cat').out.startswith(
        'out-gpt2; SVD on V off\nthe cat')


def test_a_run_is_exported_for_nanogpt(trained, call):
    trained()
    result = call(export.main, '--out_dir=out', '--to=nanogpt', '--save_dir=nano/gpt')
    assert result.code == 0 and 'data/toy/meta.pkl' in result.out and 'left out' not in result.out
    saved, own = checkpoint('nano/gpt'), checkpoint()
    assert list(saved['model_args']) == ['n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout']
    assert equal(saved['model'], own['model']) and type(saved['best_val_loss']) is float
    assert (saved['iter_num'], saved['best_val_loss']) == (4, own['best_val_loss'])
    assert set(saved['config']) == set(export.NANOGPT_CONFIG) and saved['config']['dataset'] == 'toy'
    parameters = list(GPT.from_checkpoint(saved).parameters())
    theirs = torch.optim.AdamW([{'params': [p for p in parameters if p.dim() >= 2]},
                                {'params': [p for p in parameters if p.dim() < 2]}])
    theirs.load_state_dict(saved['optimizer'])                      # in nanoGPT's order, or shapes would not fit
    assert all(s['exp_avg'].shape == p.shape and s['step'] == 4 for p, s in theirs.state.items())
    chars = own['tokenizer']['chars']
    assert pickle.loads(Path('nano/gpt/meta.pkl').read_bytes()) == dict(
        vocab_size=17, itos=dict(enumerate(chars)), stoi={c: i for i, c in enumerate(chars)})
    assert call(sample.main, *SAMPLE, '--out_dir=nano/gpt', '--start=the').out.count('\nthe') == 1
    assert call(train.main, '--init_from=resume', '--out_dir=nano/gpt', '--max_iters=5', '--device=cpu').code == 0


@pytest.mark.parametrize('to', ['gpt2', 'nanogpt'])
def test_weight_scope_and_muons_state_are_not_exported_and_that_is_said(trained, call, to):
    trained('--use_svd=True', '--svd_scope=weight', '--svd_rank=2', '--optimizer=muon')
    result = call(export.main, f'--to={to}', '--save_dir=new')
    assert result.code == 0 and 'SVD of W_v, rank 2 of 8' in result.out and 'left out: the optimizer state' in result.out
    before, idx = GPT.from_checkpoint(ckpt.load('out/ckpt.pt')).eval(), torch.arange(16)[None]
    after = GPT.from_pretrained('new').eval()
    assert torch.equal(before(idx, idx)[0], after(idx, idx)[0]) and not after.config.use_svd
    assert to == 'gpt2' or not checkpoint('new')['optimizer']['state']


def test_a_muon_run_goes_on_in_nanogpts_format_with_a_new_optimizer(trained, fit, call):
    trained('--optimizer=muon')
    assert 'Muon' in call(export.main, '--to=nanogpt').out
    assert not checkpoint('out-nanogpt')['optimizer']['state']
    out = fit('--init_from=resume', '--out_dir=out-nanogpt', '--max_iters=6')
    assert 'no optimizer state' in out and checkpoint('out-nanogpt')['iter_num'] == 6


@pytest.mark.parametrize('to, changes, words', [
    ('gpt2', dict(use_svd=True, svd_rank=2), ["svd_scope='sequence'", "nearest: 'weight'"]),
    ('nanogpt', dict(use_svd=True, svd_rank=2, svd_scope='causal', svd_block=4), ["svd_scope='causal'", "nearest: 'weight'"]),
    ('nanogpt', dict(gelu='tanh'), ["gelu='tanh'", '--to=gpt2'])])
def test_what_a_format_cannot_say_is_refused(trained, refused, to, changes, words):
    trained()
    saved = checkpoint()
    torch.save(saved | dict(model_args=saved['model_args'] | changes), 'out/ckpt.pt')
    before = folder_bytes('.')
    line = refused(export.main, f'--to={to}')
    assert all(word in line for word in words)
    assert folder_bytes('.') == before and not list(Path().glob('out-*'))


def test_a_bpe_run_takes_gpt2s_tokenizer_along_if_it_can_be_had(hf, here, fit, call, small_bpe, monkeypatch):
    (here / 'data' / 'bpe').mkdir()
    for split in ('train', 'val'):                                  # without a meta file: nanoGPT's GPT-2 tokens
        (here / 'data' / 'bpe' / f'{split}.bin').write_bytes(bytes(range(100)))
    fit('--dataset=bpe', '--max_iters=1', '--n_embd=4')
    assert call(export.main).code == 0
    config = json.loads(Path('out-gpt2/config.json').read_text())
    assert (config['eos_token_id'], config['vocab_size']) == (50256, 50304)
    assert dict(hf.AutoTokenizer.from_pretrained('out-gpt2')('the')) == dict(
        input_ids=small_bpe.encode('the'), attention_mask=[1])
    monkeypatch.undo()                                              # of small_bpe, and of the working directory
    monkeypatch.chdir(here)
    download.gpt2_encoding.cache_clear()
    monkeypatch.setitem(sys.modules, 'tiktoken', None)
    assert 'left out: the tokenizer' in call(export.main, '--out_dir=out', '--save_dir=without').out
    assert not list(Path('without').glob('tokenizer*'))


def test_a_nanogpt_checkpoint_without_its_data_leaves_out_the_tokenizer(trained, call):
    trained()
    saved = checkpoint()
    del saved['tokenizer']
    saved['config']['dataset'] = 'gone'
    torch.save(saved, 'out/ckpt.pt')
    assert 'left out: the tokenizer' in call(export.main).out
    assert not list(Path('out-gpt2').glob('tokenizer*'))


@pytest.mark.parametrize('argument, words', [
    ('--save_dir=data', "'data-2'"), ('--save_dir=out', "'out-gpt2'"), ('--save_dir=file', "'file-2'"),
    ('--save_dir=link', "'link-2'"), ('--save_dir=.', "'gpt2'"), ('--save_dir=', "'gpt2'"),
    ('--out_dir=nowhere', '--out_dir=out'), ('--to=onnx', "'nanogpt'"), ('--too=gpt2', '--to'), ('gpt2', '--help')])
def test_wrong_input_is_one_line_and_writes_nothing(trained, refused, argument, words):
    trained()
    Path('file').touch(), Path('link').symlink_to('nowhere')
    before = folder_bytes('.')
    line = refused(export.main, argument)
    assert argument.partition('=')[0].removeprefix('--') in line and words in line
    assert folder_bytes('.') == before and {p.name for p in Path().iterdir()} == {'data', 'out', 'file', 'link'}


@pytest.mark.parametrize('inside, out_dir', [('out', '.'), ('out/sub', '..')])
def test_the_default_folder_is_beside_the_run_from_inside_it_too(trained, call, monkeypatch, here, inside, out_dir):
    trained()
    Path(inside).mkdir(exist_ok=True)
    monkeypatch.chdir(inside)
    assert call(export.main, f'--out_dir={out_dir}').code == 0 and (here / 'out-gpt2' / 'config.json').exists()


def test_an_empty_folder_is_filled_and_nothing_beside_it_is_removed(trained, call):
    """Whoever has folders named like those of a killed export may need them."""
    trained()
    others = ['mine.4194305.tmp', '.mine.4194305.tmp', 'other.4194305.tmp']     # larger than any process number
    for name in ('mine', *others):
        Path(name).mkdir()
    assert call(export.main, '--save_dir=mine').code == 0 and Path('mine/config.json').exists()
    assert {p.name for p in Path().iterdir()} == {'data', 'out', 'mine', *others}


@pytest.mark.parametrize('to, flushes, number, code', [('gpt2', 2, None, 1), ('gpt2', 5, signal.SIGINT, 130),
                                                       ('nanogpt', 4, None, 1), ('nanogpt', 2, signal.SIGTERM, 143)])
def test_a_full_disk_or_a_signal_leaves_nothing(trained, call, monkeypatch, to, flushes, number, code):
    """After so many flushes to disk: two are of the trial before the work, and each file has two."""
    trained()
    before, calls = folder_bytes('.'), count()

    def fsync(descriptor):
        if next(calls) == flushes and number is None:
            raise OSError(28, 'No space left on device')
        if next(calls) > flushes and number is not None:
            signal.raise_signal(number)
    monkeypatch.setattr(os, 'fsync', fsync)
    result = call(export.main, f'--to={to}', '--save_dir=a/b/c')
    assert (result.code, result.out) == (code, '') and 'Traceback' not in result.err
    assert number or 'No space left on device' in result.err.splitlines()[0]
    assert folder_bytes('.') == before and {p.name for p in Path().iterdir()} == {'data', 'out'}

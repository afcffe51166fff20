"""Models in Hugging Face's GPT-2 format against transformers, both ways; what is refused; export.py."""

import json
import pickle
import random
import socket
import sys
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

import export
import sample
import train
from helpers import checkpoint, equal, folder_bytes
from model import GPT, METHODS, GPTConfig
from runtime import checkpoint as ckpt
from runtime import download, pretrained
from runtime.config import UserError
from runtime.dataset import GPT2_META, Tokenizer
from runtime.files import new_folder

pytestmark = [pytest.mark.usefixtures('one_thread', 'offline'), pytest.mark.filterwarnings('ignore')]
SMALL = dict(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=8)
SHAPES = [SMALL, dict(SMALL, bias=False), dict(SMALL, gelu='tanh'), dict(SMALL, gelu='tanh', bias=False, dropout=.2),
          dict(block_size=7, vocab_size=3, n_layer=1, n_head=3, n_embd=6, gelu='tanh'),
          dict(block_size=33, vocab_size=130, n_layer=3, n_head=1, n_embd=5, bias=False)]
each_shape = pytest.mark.parametrize('shape', SHAPES, ids=range(len(SHAPES)))
SAMPLE = ('--device=cpu', '--num_samples=1', '--max_new_tokens=3')


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **options):
        raise OSError('no network in tests')
    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)


@pytest.fixture(scope='module')
def hf():
    """transformers, which takes seconds to load."""
    return pytest.importorskip('transformers')


def make(seed=0, **config):
    """A model with every parameter well away from its initial value, in eval mode."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SMALL | config)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=.3)
    return model


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


TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}             # of the largest logit


def assert_same_logits(ours, theirs, dtypes=TOLERANCE):
    idx = tokens(ours.config)
    for dtype in dtypes:
        with torch.no_grad():
            a, b = ours.to(dtype)(idx, idx)[0], theirs.eval().to(dtype)(idx).logits
        assert (a - b).abs().max() < TOLERANCE[dtype] * a.abs().max()
    ours.float(), theirs.float()


# ----------------------------------------------------------------------------------------------------------------------
# against transformers

@each_shape
def test_transformers_loads_what_is_written(hf, tmp_path, shape):
    model = make(**shape)
    theirs, report = hf.GPT2LMHeadModel.from_pretrained(write(tmp_path, model), output_loading_info=True)
    assert not any(report.values()), report
    assert_same_logits(model, theirs)


@each_shape
def test_what_transformers_saves_is_read(hf, tmp_path, shape):
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
def test_greedy_tokens_are_those_of_transformers(hf, tmp_path, shape):
    model = make(**shape)
    theirs = hf.GPT2LMHeadModel.from_pretrained(write(tmp_path, model))
    idx, new = tokens(model.config)[:, :2], model.config.block_size - 2
    expected = theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=new, do_sample=False)
    assert torch.equal(model.generate(idx, new, top_k=1), expected)


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
    model = make(bias=False)
    theirs = hf.GPT2LMHeadModel.from_pretrained(write(tmp_path, model))
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
    read = GPT.from_pretrained(write(tmp_path, model))
    assert all(p.dtype is torch.float32 for p in read.parameters())
    assert equal(read.state_dict(), {name: w.float() for name, w in model.state_dict().items()})


# ----------------------------------------------------------------------------------------------------------------------
# SVD

@pytest.mark.parametrize('method', METHODS)
def test_weight_scope_becomes_part_of_the_weights(hf, tmp_path, method):
    for dtype in TOLERANCE:
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


@pytest.mark.parametrize('scope', ['sequence', 'causal'])
def test_an_svd_of_v_itself_is_refused(scope):
    with pytest.raises(ValueError, match=f"svd_scope='{scope}'.*nearest: 'weight'"):
        export.plain_state_dict(make(use_svd=True, svd_rank=2, svd_scope=scope, svd_block=4))


# ----------------------------------------------------------------------------------------------------------------------
# names

@pytest.fixture
def cache(tmp_path, monkeypatch):
    """cache(name, model) puts a model into an empty Hugging Face cache, laid out as theirs; 'gpt2' is as small as it
    is. The hub is out of reach."""
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    monkeypatch.chdir(tmp_path)

    def cache(name, model, prefix='transformer.'):
        root, commit = tmp_path / 'hub' / f'models--openai-community--{name}', '0123456789abcdef' * 2 + '01234567'
        for folder in ('refs', 'blobs', f'snapshots/{commit}'):
            (root / folder).mkdir(parents=True)
        (root / 'refs' / 'main').write_text(commit)
        state = {k.replace('transformer.', prefix): w.contiguous() for k, w in gpt2_of(model)[1].items()}
        for i in range(model.config.n_layer):                       # as in OpenAI's files: buffers, not weights
            state |= {f'{prefix}h.{i}.attn.bias': torch.ones(1, 1, 16, 16).tril(),
                      f'{prefix}h.{i}.attn.masked_bias': torch.tensor(-1e4)}
        save_file(state, root / 'blobs' / 'abc')
        (root / 'snapshots' / commit / 'model.safetensors').symlink_to('../../blobs/abc')
        c = model.config
        monkeypatch.setitem(pretrained.MODELS, name, dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd,
                                                          vocab_size=c.vocab_size, n_positions=c.block_size))
    return cache


@pytest.mark.parametrize('prefix', ['', 'transformer.'])
def test_a_name_is_found_in_the_cache_without_a_network(cache, prefix):
    model, idx = make(gelu='tanh'), tokens(make().config)
    cache('gpt2', model, prefix)
    read = GPT.from_pretrained('gpt2').eval()
    assert torch.equal(read(idx, idx)[0], model(idx, idx)[0]) and read.config == model.config
    assert read.lm_head.weight is read.transformer.wte.weight
    with_svd = dict(dropout=.1, use_svd=True, svd_rank=3, svd_scope='causal')
    assert GPT.from_pretrained('gpt2', with_svd).config == GPTConfig(**asdict(model.config) | with_svd)


@pytest.mark.parametrize('name, layers, heads, width', [
    ('gpt2', 12, 12, 768), ('gpt2-medium', 24, 16, 1024), ('gpt2-large', 36, 20, 1280), ('gpt2-xl', 48, 25, 1600)])
def test_the_four_sizes(monkeypatch, name, layers, heads, width):
    asked = []
    monkeypatch.setattr('huggingface_hub.hf_hub_download', lambda *args: asked.append(args) or 'a file')
    monkeypatch.setattr(pretrained, '_read_weights', lambda files, config: {'wte.weight': files})
    monkeypatch.setattr(GPT, 'from_checkpoint', lambda saved, **overrides: (saved['model_args'], overrides))
    args, overrides = GPT.from_pretrained(name, dict(dropout=.1, svd_rank=3))
    assert asked == [(f'openai-community/{name}', 'model.safetensors')] and overrides == dict(dropout=.1, svd_rank=3)
    assert GPTConfig(**args) == GPTConfig(n_layer=layers, n_head=heads, n_embd=width, vocab_size=50257,
                                          block_size=1024, bias=True, gelu='tanh', dropout=0.0)


def test_a_folder_comes_before_a_known_name(cache, tmp_path):
    cache('gpt2', make())
    write(tmp_path / 'gpt2', make(n_layer=1), char_meta('abcdefghijk'))
    assert GPT.from_pretrained('gpt2').config.n_layer == 1
    assert pretrained.read_tokenizer('gpt2') == char_meta('abcdefghijk')
    assert pretrained.read_tokenizer('gpt2-xl') == GPT2_META


def test_a_cached_file_of_another_shape_is_refused(cache, monkeypatch):
    cache('gpt2', make(n_embd=16))
    monkeypatch.setitem(pretrained.MODELS, 'gpt2', pretrained.MODELS['gpt2'] | dict(n_embd=8))
    with pytest.raises(ValueError, match=r'wte.weight: shape \(11, 16\) in the file, \(11, 8\) in the model'):
        GPT.from_pretrained('gpt2')


@pytest.mark.parametrize('name, overrides, message', [
    ('gpt3', {}, "init_from='gpt3': must be 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', or a folder with a "
                 "ckpt.pt or config.json (nearest: 'gpt2')"),
    ('.', {}, "init_from='.': has no ckpt.pt, so it is no run, and no config.json, so it is no model in Hugging "
          "Face's format"),
    ('gpt2', dict(n_layer=3), 'n_layer=3: the shape of gpt2 is fixed'),
    ('gpt2', dict(gelu='exact'), 'gelu=exact: the shape of gpt2 is fixed')])
def test_other_names_and_shapes_are_refused(tmp_path, monkeypatch, name, overrides, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as e:
        GPT.from_pretrained(name, overrides)
    assert str(e.value) == message


@pytest.mark.parametrize('package', ['safetensors', 'huggingface_hub'])
def test_a_missing_package_is_named(monkeypatch, package):
    class Absent:
        def find_spec(name, *_):
            if name == package:
                raise ModuleNotFoundError(f'No module named {name!r}', name=name)

    monkeypatch.setattr('huggingface_hub.hf_hub_download', lambda *args: 'a file')
    for name in [name for name in sys.modules if name.partition('.')[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, 'meta_path', [Absent, *sys.meta_path])
    with pytest.raises(ValueError, match=f"^init_from='gpt2': needs a package: pip install {package}$"):
        GPT.from_pretrained('gpt2')


@pytest.mark.parametrize('kind', [OSError, RuntimeError, ValueError, 'httpx', 'empty cache'])
def test_without_a_hub_one_line_says_so(monkeypatch, cache, kind):
    words = 'We couldn\'t connect to the hub\nand found no cached file.\nCheck your connection.'
    if kind == 'httpx':
        kind = pytest.importorskip('httpx').ConnectError

    def unreachable(repository, filename):
        raise kind(words)

    if kind != 'empty cache':
        monkeypatch.setattr('huggingface_hub.hf_hub_download', unreachable)
    with pytest.raises(ValueError, match="^init_from='gpt2': its weights are neither") as e:
        GPT.from_pretrained('gpt2')
    assert '\n' not in str(e.value) and (kind == 'empty cache' or "couldn't connect" in str(e.value))


# ----------------------------------------------------------------------------------------------------------------------
# damage

@pytest.fixture
def good(tmp_path, monkeypatch):
    """A folder 'good' in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    write('good', make(), char_meta('\n abcdefghi'))
    return Path('good')


@pytest.fixture
def bad(refused):
    """Sampling from 'good' is refused in a line with `words`."""
    def bad(words=''):
        line = refused(sample.main, *SAMPLE, '--init_from=good')
        assert line.startswith("sample.py: init_from='good': ") and words in line, line
        assert len(line) < 500
    return bad


def test_a_good_folder_gives_a_sample(good, call):
    result = call(sample.main, *SAMPLE, '--init_from=good', '--start=abc')
    assert result.code == 0 and result.out.startswith('good; SVD on V off\nabc')


def test_weights_cut_off_anywhere_are_refused(good, bad):
    path = good / 'model.safetensors'
    content = path.read_bytes()
    for cut in [*range(0, 64, 7), *range(64, len(content), len(content) // 50), len(content) - 1]:
        path.write_bytes(content[:cut])
        bad('model.safetensors is damaged')


def test_a_flipped_bit_in_the_header_is_refused_or_changes_nothing(good):
    path = good / 'model.safetensors'
    content, refusals = path.read_bytes(), 0
    for place in range(0, 8 + int.from_bytes(content[:8], 'little'), 11):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1:])
        try:
            GPT.from_pretrained('good')
        except UserError as e:
            assert str(e).startswith("init_from='good': ")
            refusals += 1
    assert refusals > 200


JSONS = {'empty': '', 'null': 'null', 'list': '[]', 'text': 'hello', 'unfinished': '{"n_layer": 2',
         'deep': '[' * 100_000, 'digits': '{"n_layer": 1' + '0' * 5000 + '}', 'not UTF-8': b'\xff\xfe{}'}
VALUES = [(key, value) for key in ('n_layer', 'n_head', 'n_embd', 'vocab_size', 'n_positions')
          for value in (10 ** 9, 10 ** 300, 0, -1, '2', None, True, 2.0, float('nan'), float('inf'), [2], {})]
VALUES += [('n_inner', 31), ('n_inner', 'x'), ('layer_norm_epsilon', 1e-6), ('layer_norm_epsilon', None),
           ('scale_attn_weights', False), ('scale_attn_by_inverse_layer_idx', True), ('add_cross_attention', True),
           ('model_type', 'llama'), ('model_type', None), ('model_type', ['gpt2']), ('tie_word_embeddings', False),
           ('n_head', 3), ('n_layer', 1), ('n_layer', 3), ('vocab_size', 12), ('n_positions', 8)]
VALUES += [('activation_function', value) for value in ('relu', 'silu', None, 3, ['gelu'], {})]
VALUES += [('resid_pdrop', value) for value in (1, 1.5, -.1, float('nan'), '0.1', None, True, 10 ** 400)]


@pytest.mark.parametrize('text', JSONS.values(), ids=JSONS)
@pytest.mark.parametrize('name', ['config.json', 'tokenizer.json', 'model.safetensors.index.json'])
def test_a_file_that_is_no_json_object_is_refused(good, bad, name, text):
    if 'index' in name:
        (good / 'model.safetensors').unlink()
    (good / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    bad(name if 'tokenizer' not in name else 'its tokenizer cannot be used: tokenizer.json')


@pytest.mark.parametrize('key, value', VALUES, ids=str)
def test_a_config_that_cannot_be_is_refused(good, bad, key, value):
    config = json.loads((good / 'config.json').read_text()) | {key: value}
    (good / 'config.json').write_text(json.dumps(config))
    bad()


@pytest.mark.parametrize('key, value', [
    ('n_inner', 32), ('reorder_and_upcast_attn', True), ('attn_pdrop', .5),
    ('activation_function', 'gelu_pytorch_tanh'), ('torch_dtype', 'float16'), ('summary_type', 'mean')], ids=str)
def test_what_changes_nothing_or_can_be_had_is_read(hf, good, key, value):
    config = json.loads((good / 'config.json').read_text()) | {key: value}
    (good / 'config.json').write_text(json.dumps(config))
    ours = GPT.from_pretrained('good').eval()
    assert ours.config.dropout == 0 and ours.config.gelu == ('exact' if key != 'activation_function' else 'tanh')
    assert_same_logits(ours, hf.GPT2LMHeadModel.from_pretrained('good', dtype=torch.float32))


W = 'transformer.wte.weight'
C_ATTN = 'transformer.h.1.attn.c_attn.weight'
SPOILS = {
    'lacks wte': (lambda s: s.pop(W), 'lacks weights: wte.weight'),
    'lacks a bias': (lambda s: s.pop('transformer.ln_f.bias'), 'lacks weights: ln_f.bias'),
    'lacks a layer': (lambda s: [s.pop(k) for k in list(s) if '.h.1.' in k], 'n_layer=2 in config.json, and 1 layers'),
    'lacks much': (lambda s: [s.pop(k) for k in list(s) if '.mlp.' in k], 'and 5 more'),
    'nothing': (lambda s: s.clear(), 'and 0 layers'),
    'strange names': (lambda s: s.update(h=s[W] + 1), 'unknown weights: h'),
    'more': (lambda s: s.update(score=torch.ones(2)), 'has unknown weights: score'),
    'cross': (lambda s: s.update({'transformer.h.0.crossattention.c_attn.weight': s[C_ATTN] + 1}),
              'has unknown weights: h.0.cr'),
    'short': (lambda s: s.update({W: s[W][:9].clone()}), 'wte.weight: shape (9, 8) in the file, (11, 8) in the model'),
    'not transposed': (lambda s: s.update({C_ATTN: s[C_ATTN].t().contiguous()}),
                       'h.1.attn.c_attn.weight: shape (24, 8)'),
    'flat': (lambda s: s.update({W: s[W].flatten()}), 'wte.weight: shape (88,)'),
    'scalar': (lambda s: s.update({W: torch.tensor(1.)}), 'wte.weight: shape ()'),
    'whole': (lambda s: s.update({W: s[W].long()}), 'wte.weight: numbers of type I64'),
    'eighth': (lambda s: s.update({W: s[W].to(torch.float8_e4m3fn)}), 'wte.weight: numbers of type F8'),
    'nan': (lambda s: s[C_ATTN].view(-1)[5].fill_(float('nan')), 'h.1.attn.c_attn.weight is not finite'),
    'infinite': (lambda s: s['transformer.ln_f.bias'][0].fill_(float('-inf')), 'ln_f.bias is not finite'),
    'twice': (lambda s: s.update({'wte.weight': s[W] + 1}), 'wte.weight a second time'),
    'untied': (lambda s: s.update({'lm_head.weight': s[W] + 1}), 'lm_head.weight and wte.weight differ')}


@pytest.mark.parametrize('spoil, words', SPOILS.values(), ids=SPOILS)
def test_weights_that_do_not_fit_are_refused(good, bad, spoil, words):
    state = load_file(good / 'model.safetensors')
    state = {name: w.clone() for name, w in state.items()}
    spoil(state)
    (good / 'model.safetensors').write_bytes(save(state))
    bad(words)


def test_a_head_that_is_equal_is_no_second_tensor(good):
    state = load_file(good / 'model.safetensors')
    (good / 'model.safetensors').write_bytes(save(state | {'lm_head.weight': state[W].clone()}))
    config = json.loads((good / 'config.json').read_text()) | dict(tie_word_embeddings=False)
    (good / 'config.json').write_text(json.dumps(config))
    assert equal(GPT.from_pretrained('good').state_dict(), make().state_dict())


def test_nothing_is_built_before_its_weights_are_there(good, monkeypatch, bad):
    """A gigantic config.json costs nothing."""
    monkeypatch.setattr(GPT, '__init__', None)
    for key in ('n_layer', 'n_embd', 'vocab_size', 'n_positions'):
        config = json.loads((good / 'config.json').read_text())
        (good / 'config.json').write_text(json.dumps(config | {key: 2 * 10 ** 9}))
        bad()
        (good / 'config.json').write_text(json.dumps(config))


@pytest.mark.parametrize('weight_map, words', [
    (None, 'damaged'), ({}, 'damaged'), ([], 'damaged'), ({'wte.weight': 3}, 'damaged'),
    ({'wte.weight': '../good/shard'}, 'damaged'), ({'wte.weight': '/etc/passwd'}, 'damaged'),
    ({'wte.weight': 'nowhere'}, 'nowhere is missing'), ({'wte.weight': 'config.json'}, 'config.json is damaged')])
def test_a_spoilt_index_is_refused(good, bad, weight_map, words):
    (good / 'model.safetensors').rename(good / 'shard')
    (good / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': weight_map}))
    bad(words)


def test_missing_and_foreign_files_are_refused(good, bad, refused):
    (good / 'model.safetensors').unlink()
    bad('has no model.safetensors')
    (good / 'pytorch_model.bin').write_bytes(pickle.dumps('x'))
    bad('pytorch_model.bin is a pickle, which is not read')
    (good / 'model.safetensors').mkdir()
    bad('model.safetensors ')
    (good / 'config.json').unlink()
    for main in (sample.main, train.main):
        assert 'no config.json' in refused(main, '--init_from=good')
        assert "(nearest: 'gpt2')" in refused(main, '--init_from=gpt3')


# ----------------------------------------------------------------------------------------------------------------------
# tokenizers

HARD = '\n\r\t \u00a0\u3000ĠĊ▁#\'"\\{}<|>[UNK]éa\u0301\u0308🙂👩\u200d👧\x00\x7f\x85\u2028ß\u0130İΣ日本'


@settings(derandomize=True, max_examples=40, deadline=None)
@given(data=st.data())
def test_a_vocabulary_of_characters_encodes_and_decodes_as_in_transformers(hf, tmp_path_factory, data):
    chars = sorted(data.draw(st.sets(st.one_of(st.sampled_from(HARD), st.characters(exclude_categories=['Cs'])),
                                     min_size=1, max_size=40)))
    meta, folder = char_meta(chars), tmp_path_factory.mktemp('chars')
    pretrained.write(folder, dict(model_type='gpt2', n_positions=16), {}, meta)
    theirs, ours = hf.AutoTokenizer.from_pretrained(folder), Tokenizer(meta)
    texts = data.draw(st.lists(st.text(st.sampled_from(chars), max_size=30), min_size=3, max_size=3))
    for text in [*texts, ''.join(chars), chars[0] * 3]:
        ids = ours.encode(text)
        assert theirs.encode(text) == ids and theirs.decode(ids) == text == ours.decode(ids)
    assert pretrained.read_tokenizer(str(folder)) == meta
    theirs.save_pretrained(folder)
    assert pretrained.read_tokenizer(str(folder)) == meta


TEXTS = ['Hello  world', '  \n\n\t x', "it's I'll we've can't 'S", 'naïve café 日本語 🙂👩\u200d👩 a\u0301',
         '12 345,6.7 $%^&*(){}<>|`~',
         '\u2003\u00a0x\u3000y\x85z\u200bq\u2028r\x1cs', '<|endoftext|> in a<|endoftext|>b', ' \r\n\r\n \r', 'ſKÅª²Ⅷ٣१',
         '\x00\x01\x7f\x80', 'א ב ר', ' ' * 20 + 'the' + ' ' * 20, 'th the thethe',
         'def f(x):\n    return the  # and\n\n\n']


def small_bpe():
    """An encoding with a few real merges."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    for token in (b'th', b'the', b' t', b' the', b'an', b'and', b' a', b' and', b'\xf0\x9f', b'\xf0\x9f\x99', b'\n\n',
                  b'  ', b'    ', b'\'s', b'\xc3\xa9', b'12', b're', b'\xe6\x97'):
        ranks[token] = len(ranks)
    return tiktoken.Encoding('small', pat_str=download.BPE_PATTERN, mergeable_ranks=ranks,
                             special_tokens={'<|endoftext|>': len(ranks)})


def real_bpe():
    pytest.importorskip('tiktoken')
    folder = Path.home() / '.cache' / 'gpt2-bpe'
    if not download._bpe_cached(folder):
        pytest.skip("GPT-2's BPE is not on this machine, and tests do without a network")
    return download.gpt2_encoding()


@pytest.mark.parametrize('bpe', [small_bpe, real_bpe])
def test_a_bpe_encodes_and_decodes_as_in_transformers(hf, tmp_path, monkeypatch, bpe):
    encoding = bpe()
    monkeypatch.setattr(download, 'gpt2_encoding', lambda: encoding)
    write(tmp_path, make(), GPT2_META)
    theirs, draw = hf.AutoTokenizer.from_pretrained(tmp_path), random.Random(0)
    kinds = ['the', ' and', '\n', '  ', "'s", '1', 'é', '🙂', '\u00a0', *map(chr, range(33, 127))]
    for text in TEXTS + [''.join(draw.choices(kinds, k=20)) for _ in range(200)]:
        ids = encoding.encode(text, allowed_special={'<|endoftext|>'})
        assert theirs.encode(text) == ids and theirs.decode(ids) == encoding.decode(ids)
    assert (theirs.eos_token_id, len(theirs)) == (encoding.eot_token, encoding.n_vocab)
    if bpe is small_bpe:                                            # which is not GPT-2's
        with pytest.raises(UserError, match='neither one of single characters nor'):
            pretrained.read_tokenizer(str(tmp_path))
        return
    assert pretrained.read_tokenizer(str(tmp_path)) == GPT2_META
    theirs.add_special_tokens({'pad_token': '[PAD]'})
    theirs.save_pretrained(tmp_path)
    assert pretrained.read_tokenizer(str(tmp_path)) == GPT2_META
    theirs.add_tokens(['word'])
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UserError, match='neither one of single characters nor'):
        pretrained.read_tokenizer(str(tmp_path))


def spec(**changes):
    return pretrained._char_spec(list('\n abcdefghi')) | changes


TOKENIZERS = {'lower case': spec(normalizer=dict(type='Lowercase')), 'nothing': {},
              'words': spec(pre_tokenizer=dict(type='Whitespace')),
              'spaces': spec(decoder=None), 'added': spec(added_tokens=[dict(id=11, content='<s>', special=True)]),
              'no model': spec(model=None), 'vocab list': spec(model=dict(type='Unigram', vocab=[['a', 0.1]])),
              'empty': spec(model=dict(type='WordLevel', vocab={})),
              'holes': spec(model=dict(type='WordLevel', vocab={'a': 0, 'b': 7}, unk_token='<unk>')),
              'words in it': spec(model=dict(type='WordLevel', vocab={'ab': 0}, unk_token='<unk>')),
              'texts for ids': spec(model=dict(type='WordLevel', vocab={'a': 'x', 'b': 1}, unk_token='<unk>')),
              'half': spec(model=dict(type='WordLevel', vocab={'\ud800': 0}, unk_token='<unk>')),
              'bpe': spec(model=dict(type='BPE', vocab={'a': 0}, merges=[])),
              'bpe of numbers': spec(model=dict(type='BPE', vocab={'a': 0}, merges=[3])),
              'bpe list': spec(model=dict(type='BPE', vocab=['a'], merges=['a b']), pre_tokenizer=[])}


@pytest.mark.parametrize('content', TOKENIZERS.values(), ids=TOKENIZERS)
def test_other_tokenizers_are_refused(good, bad, content):
    (good / 'tokenizer.json').write_text(json.dumps(content))
    bad('its tokenizer ')


def test_a_folder_without_a_tokenizer(good, bad, call, byte_bpe):
    """It is taken for OpenAI's where the model has its ids."""
    for path in good.glob('tokenizer*'):
        path.unlink()
    assert pretrained.read_tokenizer('good') is None
    bad('has no tokenizer.json')
    write('large', make(vocab_size=50257))
    assert call(sample.main, *SAMPLE, '--init_from=large').code == 0


def test_the_files_of_older_tokenizers_are_read(good, bad, monkeypatch):
    (good / 'tokenizer.json').unlink()
    vocab, merges = {'a': 0, 'b': 1, 'ab': 2}, ['a b']
    (good / 'vocab.json').write_text(json.dumps(vocab))
    (good / 'merges.txt').write_text('#version: 0.2\na b\n')
    bad('neither one of single characters nor')
    monkeypatch.setattr(pretrained, 'GPT2_BPE', pretrained._bpe_hash(vocab, merges))
    assert pretrained.read_tokenizer('good') == GPT2_META


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(good, bad):
    write('good', make(vocab_size=5), char_meta('\n abcdefghi'))
    bad('its tokenizer has 11 token ids, its model 5')


# ----------------------------------------------------------------------------------------------------------------------
# train.py

def test_training_goes_on_from_a_folder(fit, call, refused, here):
    fit('--gelu=tanh', '--dropout=.1')
    assert call(export.main, '--out_dir=out', '--save_dir=mine').code == 0
    fit('--init_from=mine', '--out_dir=more', '--max_iters=0', '--n_layer=1', '--learning_rate=0')
    assert call(train.main, '--init_from=mine', '--out_dir=all', '--max_iters=2', '--dataset=toy', '--device=cpu',
                '--eval_iters=1', '--batch_size=1', '--gradient_accumulation_steps=1').code == 0
    args = checkpoint('all')['model_args']
    assert args == checkpoint('out')['model_args'] | dict(dropout=0.0, bias=True) or args['bias'] is False
    assert (args['gelu'], args['n_embd'], args['vocab_size']) == ('tanh', 16, 17)
    assert 'gelu=exact: mine has gelu=tanh, which is fixed' in refused(
        train.main, '--init_from=mine', '--gelu=exact', '--dataset=toy', '--device=cpu')
    assert call(train.main, '--init_from=resume', '--out_dir=all', '--max_iters=3').code == 0


def test_data_in_other_tokens_than_the_folders_are_refused(good, refused, here, monkeypatch):
    write('mine', make(vocab_size=17), char_meta('abcdefghijklmnopq'))
    for name in ('mine', 'gpt2'):
        assert f'dataset=toy: its characters are not those of {name}' in refused(
            train.main, f'--init_from={name}', '--dataset=toy', '--device=cpu')


# ----------------------------------------------------------------------------------------------------------------------
# export.py

@pytest.fixture
def trained(here, fit):
    fit('--max_iters=2')
    return Path('out')


def test_a_run_is_exported_for_transformers(hf, trained, call):
    result = call(export.main)
    assert (result.code, result.err) == (0, '') and result.out.startswith('out/ckpt.pt: 2 steps, written to out-gpt2 ')
    written = {path.name: path.stat().st_size for path in Path('out-gpt2').iterdir()}
    assert written.keys() == {'config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json'}
    assert all(f'{name}: {size:,} bytes' in result.out for name, size in written.items())
    assert 'left out: the optimizer state' in result.out and not list(Path().glob('*.tmp'))
    model, tokenizer = (kind.from_pretrained('out-gpt2') for kind in (hf.AutoModelForCausalLM, hf.AutoTokenizer))
    ids = tokenizer('the cat', return_tensors='pt')
    assert set(ids) == {'input_ids', 'attention_mask'}
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=8, do_sample=False)[0])
    ours = GPT.from_checkpoint(ckpt.load('out/ckpt.pt')).eval()
    logits, expected = model(**ids).logits, ours(ids['input_ids'], ids['input_ids'])[0]
    assert (logits - expected).abs().max() < TOLERANCE[torch.float32] * expected.abs().max()
    encoder = Tokenizer(checkpoint()['tokenizer'])
    assert text == encoder.decode(ours.generate(torch.tensor([encoder.encode('the cat')]), 8, top_k=1)[0].tolist())
    assert call(sample.main, *SAMPLE, '--init_from=out-gpt2', '--start=the cat').out.startswith(
        'out-gpt2; SVD on V off\nthe cat')


def test_a_run_is_exported_for_nanogpt(trained, call):
    result = call(export.main, '--out_dir=out', '--to=nanogpt', '--save_dir=nano/gpt')
    assert result.code == 0 and 'data/toy/meta.pkl' in result.out and 'left out' not in result.out
    saved, own = checkpoint('nano/gpt'), checkpoint()
    assert list(saved['model_args']) == ['n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout']
    assert equal(saved['model'], own['model']) and type(saved['best_val_loss']) is float
    assert (saved['iter_num'], saved['best_val_loss']) == (2, own['best_val_loss'])
    assert set(saved['config']) == set(export.NANOGPT_CONFIG) and saved['config']['dataset'] == 'toy'
    theirs = torch.optim.AdamW([{'params': [p for p in GPT.from_checkpoint(saved).parameters() if p.dim() >= 2]},
                                {'params': [p for p in GPT.from_checkpoint(saved).parameters() if p.dim() < 2]}])
    theirs.load_state_dict(saved['optimizer'])                      # in nanoGPT's order, or shapes would not fit
    for p, state in theirs.state.items():
        assert state['exp_avg'].shape == p.shape and state['step'] == 2
    meta = pickle.loads(Path('nano/gpt/meta.pkl').read_bytes())
    assert meta == dict(vocab_size=17, itos=dict(enumerate(own['tokenizer']['chars'])),
                        stoi={c: i for i, c in enumerate(own['tokenizer']['chars'])})
    assert call(sample.main, *SAMPLE, '--out_dir=nano/gpt', '--start=the').out.count('\nthe') == 1
    assert call(train.main, '--init_from=resume', '--out_dir=nano/gpt', '--max_iters=3', '--device=cpu').code == 0


@pytest.mark.parametrize('to', ['gpt2', 'nanogpt'])
def test_weight_scope_is_baked_and_said(trained, fit, call, to):
    fit('--use_svd=True', '--svd_scope=weight', '--svd_rank=2', '--optimizer=muon', '--out_dir=svd')
    result = call(export.main, '--out_dir=svd', f'--to={to}', '--save_dir=new')
    assert result.code == 0 and 'baked into the weights: SVD of W_v, rank 2 of 8' in result.out
    before, idx = GPT.from_checkpoint(ckpt.load('svd/ckpt.pt')).eval(), torch.arange(16)[None]
    after = GPT.from_pretrained('new') if to == 'gpt2' else GPT.from_checkpoint(ckpt.load('new/ckpt.pt'))
    assert torch.equal(before(idx, idx)[0], after.eval()(idx, idx)[0]) and not after.config.use_svd
    if to == 'nanogpt':
        assert 'left out: the optimizer state (it belongs to' in result.out
        assert not checkpoint('new')['optimizer']['state']


def test_a_muon_run_leaves_out_its_optimizer(here, fit, call):
    fit('--optimizer=muon')
    assert "left out: the optimizer state (it is Muon's)" in call(export.main, '--to=nanogpt').out
    assert not checkpoint('out-nanogpt')['optimizer']['state']
    out = fit('--init_from=resume', '--out_dir=out-nanogpt', '--max_iters=6')
    assert 'no optimizer state: the optimizer starts anew' in out and checkpoint('out-nanogpt')['iter_num'] == 6


def test_what_cannot_be_said_is_refused(trained, fit, refused):
    before = None
    for options, to, words in (
            (('--use_svd=True', '--svd_rank=2'), 'gpt2', "svd_scope='sequence'"),
            (('--use_svd=True', '--svd_rank=2', '--svd_scope=causal', '--svd_block=4'), 'nanogpt', "svd_scope='causal'"),
            (('--gelu=tanh',), 'nanogpt', "gelu='tanh': nanoGPT has only 'exact'")):
        fit(*options, '--out_dir=run')
        before = folder_bytes('.')
        assert words in refused(export.main, '--out_dir=run', f'--to={to}')
        assert folder_bytes('.') == before and not list(Path().glob('run-*'))


def test_bpe_runs_take_gpt2s_tokenizer_along_or_say_why_not(hf, here, fit, call, byte_bpe, monkeypatch):
    Path('my.txt').write_text('the cat sat\n' * 30)
    monkeypatch.setattr(train, 'locate', partial(train.locate, roots=(here / 'data',)))
    fit('--dataset=my.txt', '--tokenizer=gpt2')
    monkeypatch.setattr(download, 'gpt2_encoding', small_bpe)
    assert call(export.main).code == 0
    config = json.loads(Path('out-gpt2/config.json').read_text())
    assert (config['eos_token_id'], config['vocab_size']) == (50256, 50304)
    assert dict(hf.AutoTokenizer.from_pretrained('out-gpt2')('the')) == dict(
        input_ids=small_bpe().encode('the'), attention_mask=[1])

    def unreachable():
        raise UserError('no network')
    monkeypatch.setattr(download, 'gpt2_encoding', unreachable)
    assert 'left out: the tokenizer' in call(export.main, '--out_dir=out', '--save_dir=without').out
    assert not list(Path('without').glob('tokenizer*'))


def test_a_nanogpt_checkpoint_without_its_data_leaves_out_the_tokenizer(trained, call):
    saved = checkpoint()
    del saved['tokenizer']
    saved['config']['dataset'] = 'gone'
    torch.save(saved, 'out/ckpt.pt')
    assert 'left out: the tokenizer, which is not in the checkpoint' in call(export.main).out


@pytest.mark.parametrize('argv, words', [
    (['--save_dir=data'], 'is there already'), (['--save_dir=out'], 'has the model itself in it'),
    (['--save_dir=file'], 'is there already'), (['--save_dir=link'], 'is there already'),
    (['--save_dir=.'], 'must be another folder'), (['--save_dir='], 'must be another folder'),
    (['--out_dir=nowhere'], 'no such checkpoint (nearest: --out_dir=out)'), (['--to=onnx'], "(nearest: 'nanogpt')"),
    (['--too=gpt2'], '--to'), (['gpt2'], 'no such config file')])
def test_wrong_input_is_one_line_and_writes_nothing(trained, refused, argv, words):
    Path('file').touch(), Path('link').symlink_to('nowhere')
    before = folder_bytes('.')
    assert words in refused(export.main, *argv)
    assert folder_bytes('.') == before and {p.name for p in Path().iterdir()} == {'data', 'out', 'file', 'link'}


@pytest.mark.parametrize('inside, out_dir', [('out', '.'), ('out/sub', '..')])
def test_the_default_folder_is_beside_the_run_from_inside_it_too(trained, call, monkeypatch, inside, out_dir):
    Path(inside).mkdir(exist_ok=True)
    root = Path.cwd()
    monkeypatch.chdir(inside)
    assert call(export.main, f'--out_dir={out_dir}').code == 0 and (root / 'out-gpt2' / 'config.json').exists()


def test_an_empty_folder_is_filled(trained, call):
    Path('empty').mkdir()
    assert call(export.main, '--save_dir=empty').code == 0 and (Path('empty') / 'config.json').exists()


@pytest.mark.parametrize('to', ['gpt2', 'nanogpt'])
@pytest.mark.parametrize('error, code', [(OSError(28, 'No space left on device'), 1), (KeyboardInterrupt(), 130)])
def test_a_full_disk_or_ctrl_c_leaves_nothing(trained, call, monkeypatch, to, error, code):
    calls = count()

    def fail(descriptor):
        if next(calls) > 1:                                         # two are of the trial, before work begins
            raise error
    monkeypatch.setattr('runtime.files.os.fsync', fail)
    before = folder_bytes('.')
    result = call(export.main, f'--to={to}', '--save_dir=a/b/c')
    assert result.code == code and result.out == '' and 'Traceback' not in result.err
    assert code == 130 or 'No space left on device' in result.err.splitlines()[0]
    assert folder_bytes('.') == before and {p.name for p in Path().iterdir()} == {'data', 'out'}


def test_a_new_folder_removes_nothing_beside_it(tmp_path):
    """Whoever has folders named like ours may need them."""
    names = ['new.4194305.tmp', '.new.4194305.tmp', 'other.4194305.tmp']    # larger than any process number
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / 'config.json').touch()
    with new_folder(tmp_path / 'new') as folder:
        assert folder.name.startswith('.')
        (folder / 'file').touch()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names, 'new'])


def test_nothing_of_the_product_needs_transformers():
    root = Path(__file__).resolve().parents[2]
    assert not [path for folder in ('.', 'runtime', 'lowrank') for path in (root / folder).glob('*.py')
                if 'import transformers' in path.read_text() or 'from transformers' in path.read_text()]

"""Models in Hugging Face's GPT-2 format, compared with transformers in both directions. Also
damaged folders and export.py."""

import copy
import json
import os
import pickle
import sys
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

import export
import helpers
import sample
import train
from helpers import TEXT, TINY, checkpoint, checkpoint_of, equal, folder_bytes, slow
from model import GPT, METHODS, GPTConfig
from runtime import download, huggingface
from runtime.data import GPT2_META, Tokenizer, write_dataset
from tools.export_formats import NANOGPT_CONFIG, to_gpt2, to_safetensors

pytestmark = [pytest.mark.usefixtures('one_thread', 'hub'), pytest.mark.filterwarnings('ignore')]
SMALL = dict(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=8)
CHARS = '\n abcdefghi'                                              # one per id of SMALL
SAMPLE = ('--device=cpu', '--num_samples=1', '--max_new_tokens=3')


@pytest.fixture
def hub(tmp_path, monkeypatch, hf):
    """Make the Hugging Face cache an empty folder and the hub unreachable, and return the cache
    folder of 'gpt2'."""
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    for name, value in (('_is_offline_mode', True), ('TRANSFORMERS_CACHE', str(tmp_path / 'hub'))):
        monkeypatch.setattr(hf.utils.hub, name, value, raising=False)           # transformers 4
    return tmp_path / 'hub' / 'models--openai-community--gpt2'


@pytest.fixture(scope='module')
def hf():
    """The transformers package, which takes seconds to import."""
    return pytest.importorskip('transformers')


def make(**config):
    """Return a small float32 model with every parameter far from its initial value."""
    return helpers.make(dtype=torch.float32, **dict(svd_block=GPTConfig.svd_block) | config)


def tokens(config):
    return torch.arange(3 * config.block_size).view(3, -1) ** 2 % config.vocab_size


def char_meta(chars):
    return dict(tokenizer='char', vocab_size=len(chars), dtype='uint16', chars=list(chars))


def write(folder, model, meta=None, to=to_gpt2):
    """Write the model in Hugging Face's format and return the folder as text."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    to(Path(folder), copy.deepcopy(model), {}, meta, [])
    return str(folder)


def assert_same_logits(ours, theirs):
    """Compare logits in float64. Another gelu or order of weights would differ far more than the
    bound."""
    idx = tokens(ours.config)
    with torch.no_grad():
        a, b = ours.double()(idx, idx)[0], theirs.eval().double()(idx).logits
    assert (a - b).abs().max() < 1e-10 * a.abs().max()


# --------------------------------------------------------------------------------------------------
# against transformers


@pytest.mark.parametrize('shape', [
    SMALL,
    dict(SMALL, gelu='tanh', bias=False, dropout=.2),
    slow(dict(block_size=7, vocab_size=3, n_layer=1, n_head=3, n_embd=6, gelu='tanh')),
    slow(dict(block_size=33, vocab_size=130, n_layer=3, n_head=1, n_embd=5, bias=False))
], ids=range(4))
def test_transformers_computes_and_generates_the_same_and_what_it_saves_is_read(
        hf, tmp_path, shape):
    """transformers loads an exported model with the same logits and greedy tokens. What it saves,
    also in several shards, gives the same weights here."""
    model = make(**shape)
    theirs, report = hf.GPT2LMHeadModel.from_pretrained(write(tmp_path / 'a', model),
                                                        output_loading_info=True)
    assert not any(report.values()), report
    assert_same_logits(model, theirs)
    idx, new = tokens(model.config)[:, :2], model.config.block_size - 2
    expected = theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=new,
                               do_sample=False)
    assert torch.equal(model.generate(idx, new, top_k=1), expected)
    theirs.save_pretrained(tmp_path / 'shards', max_shard_size=1000)
    assert len(list((tmp_path / 'shards').glob('*.safetensors'))) > 1
    for folder in ('a', 'shards'):
        again = GPT.from_pretrained(str(tmp_path / folder))
        assert again.config == model.config and equal(again.state_dict(),
                                                      model.float().state_dict())
        assert again.lm_head.weight is again.transformer.wte.weight


def test_a_model_that_transformers_makes_is_read_with_biases_unless_a_mark_says_that_all_are_0(
        hf, tmp_path):
    """A model made by transformers loads here, without biases if they are all zero and its config
    has bias=False."""
    theirs = hf.GPT2LMHeadModel(
        hf.GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=16, bias=False))
    theirs.save_pretrained(tmp_path)
    expected = GPTConfig(**SMALL, gelu='tanh', dropout=.1, bias=False)
    assert GPT.from_pretrained(str(tmp_path)).config == expected
    theirs.transformer.h[1].mlp.c_fc.bias.data[3] = 1               # as after training there
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path)).eval()
    assert ours.config.bias is True
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize(
    'options, dtype',
    [({}, torch.float16), ({}, torch.bfloat16), ({}, torch.float64),
     (dict(svd_rank=2), torch.float32),
     *((dict(use_svd=True) | options, torch.float32)
       for options in (dict(svd_rank=None), dict(svd_rank=4), dict(svd_rank=4, svd_scope='causal'),
                       dict(svd_rank=4, svd_scope='weight')))])
def test_what_is_written_is_float32_without_an_svd_that_changes_nothing(tmp_path, options, dtype):
    """An export is float32 whatever the model's dtype, and an SVD that truncates nothing is left
    out."""
    model = make(**options).to(dtype)
    read = GPT.from_pretrained(write(tmp_path, model))
    assert read.config == GPTConfig(**SMALL)
    assert equal(read.state_dict(), {name: w.float() for name, w in model.state_dict().items()})


@pytest.mark.parametrize('method', METHODS)
def test_weight_scope_becomes_part_of_the_weights(hf, tmp_path, method):
    """An export contains the SVD of 'weight' scope in its weights, so transformers gives the same
    logits."""
    model = make(use_svd=True, svd_rank=2, svd_scope='weight', svd_method=method).double()
    assert_same_logits(
        model, hf.GPT2LMHeadModel.from_pretrained(write(tmp_path, model), dtype=torch.float64))
    read = GPT.from_pretrained(str(tmp_path))
    w_v = read.transformer.h[0].attn.c_attn.weight[-8:].view(2, 4, 8)
    assert read.config == GPTConfig(**SMALL) and torch.linalg.matrix_rank(
        w_v, rtol=1e-5).tolist() == [2, 2]


# --------------------------------------------------------------------------------------------------
# names

def test_a_name_is_a_folder_here_or_found_in_the_cache(hub, good):
    """A name such as 'gpt2' means a folder here if there is one, and otherwise the model in the
    Hugging Face cache."""
    model, commit = make(gelu='tanh', dropout=.3), '0123456789' * 4
    write(hub / 'snapshots' / commit, model)
    (hub / 'refs').mkdir()
    (hub / 'refs' / 'main').write_text(commit)
    for overrides, dropout in (({}, 0), (dict(dropout=.1), .1)):    # 0 as in nanoGPT
        read = GPT.from_pretrained('gpt2', overrides)
        assert read.config == GPTConfig(**SMALL, gelu='tanh', dropout=dropout)
        assert equal(read.state_dict(), model.state_dict())
    assert huggingface.read_tokenizer('gpt2') == GPT2_META
    good.rename('gpt2')
    assert GPT.from_pretrained('gpt2').config == GPTConfig(**SMALL)
    assert huggingface.read_tokenizer('gpt2') == char_meta(CHARS)


@pytest.mark.parametrize(
    'name, overrides, words',
    [
        ('gpt3', {}, "(nearest: 'gpt2')"),
        ('.', {}, 'config.json'),
        ('gpt2', {}, 'cache'),  # which is empty
        ('gpt2', dict(n_layer=3), 'n_layer'),
        ('gpt2', dict(gelu='exact'), 'gelu')])
def test_what_has_no_weights_or_another_shape_is_refused(tmp_path, monkeypatch, name, overrides,
                                                         words):
    """An unknown name, a missing model, and an option that contradicts the model's shape raise a
    one-line ValueError."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='^.*$') as e:              # one line
        GPT.from_pretrained(name, overrides)
    assert name in str(e.value) and words in str(e.value)


@pytest.mark.parametrize('package, name', [('safetensors', 'own'), ('transformers', 'good'),
                                           ('transformers', 'gpt2')])
def test_a_missing_package_is_named(good, monkeypatch, package, name):
    """If a package is missing the error gives the pip command."""
    write('own', make(), to=to_safetensors)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"^init_from='{name}': .*: pip install {package}$"):
        GPT.from_pretrained(name)


# --------------------------------------------------------------------------------------------------
# damage

@pytest.fixture
def good(tmp_path, monkeypatch):
    """A valid folder 'good' in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    write('good', make(), char_meta(CHARS))
    return Path('good')


@pytest.fixture
def bad(refused):
    """bad(words): sampling from 'good' ends in a one-line error with `words`."""
    def bad(words):
        line = refused(sample.main, *SAMPLE, '--init_from=good')
        assert line.startswith("sample.py: init_from='good': ") and words in line and len(
            line) < 500, line
    return bad


@pytest.mark.parametrize('stride', [199, pytest.param(11, marks=pytest.mark.slow)])
def test_weights_cut_off_anywhere_or_with_a_flipped_bit_in_the_header_are_refused_or_the_same(
        good, stride):
    """A truncated file of weights or a flipped bit in its header raises a ValueError, or the
    weights are unchanged."""
    path = good / 'model.safetensors'
    content = path.read_bytes()
    places = range(0, 8 + int.from_bytes(content[:8], 'little'), stride)
    flipped = (content[:i] + bytes([content[i] ^ 1 << i % 8]) + content[i + 1:] for i in places)
    for damaged in (*flipped, *(content[:i]
                                for i in range(0, len(content), 10 * stride)), content[:-1]):
        path.write_bytes(damaged)
        with suppress(ValueError):
            assert equal(GPT.from_pretrained('good').state_dict(), make().state_dict())


DAMAGED = [b'', b'null', b'hello', b'{"n_layer": 2', b'\xff\xfe{}']
CHANGED = dict(n_layer=[1, 3, '2', None], n_head=[3, 0], n_embd=[12, None], vocab_size=[12],
               n_positions=[8], n_inner=[31], layer_norm_epsilon=[1e-6], scale_attn_weights=[False],
               scale_attn_by_inverse_layer_idx=[True], add_cross_attention=[True],
               model_type=['llama', None], tie_word_embeddings=[False],
               activation_function=['relu', None], resid_pdrop=[1, -.1, '0.1'])
NAMED = ('n_inner', 'layer_norm_epsilon', 'scale_attn_weights', 'scale_attn_by_inverse_layer_idx',
         'add_cross_attention', 'activation_function')


@pytest.mark.parametrize('name, changes, words', [
    *((name, DAMAGED, '') for name in ('config.json', 'tokenizer.json')),
    *(('config.json', [{key: value} for value in values], key if key in NAMED else '')
      for key, values in CHANGED.items()),
    ('tokenizer.json', [dict(model=model) for model in (
        None, dict(vocab=[['a', 0.1]]), dict(vocab={'ab': 0}),
        dict(vocab={'a': 0}, merges=[]))], '')])
def test_a_damaged_or_foreign_json_file_is_refused(good, bad, name, changes, words):
    """A damaged config.json or tokenizer.json, or one of another architecture, ends in a one-line
    error."""
    before = json.loads((good / name).read_text())
    for change in changes:
        content = change if isinstance(change, bytes) else json.dumps(before | change).encode()
        (good / name).write_bytes(content)
        bad(words)


def test_what_changes_nothing_in_a_folder_is_read(good):
    """Config entries without effect, a tied head that is stored twice, and the names in OpenAI's
    files do not prevent loading."""
    config = json.loads((good / 'config.json').read_text())
    state = {name: w.clone() for name, w in load_file(good / 'model.safetensors').items()}
    (good / 'config.json').write_text(
        json.dumps(config | dict(n_inner=32, reorder_and_upcast_attn=True, attn_pdrop=.5,
                                 activation_function='gelu_pytorch_tanh', summary_type='mean')))
    assert GPT.from_pretrained('good').config == make(gelu='tanh').config
    # an equal head stored separately; OpenAI's files have no name prefix and extra buffers
    openai = {name.removeprefix('transformer.'): w for name, w in state.items()} | {
        'h.0.attn.bias': torch.ones(1, 1, 16, 16), 'h.0.attn.masked_bias': -torch.ones(1)}
    for tied, weights in ((False, state | {'lm_head.weight': state[W].clone()}), (True, openai)):
        (good / 'config.json').write_text(json.dumps(config | dict(tie_word_embeddings=tied)))
        (good / 'model.safetensors').write_bytes(save(weights))
        assert equal(GPT.from_pretrained('good').state_dict(), make().state_dict())


W = 'transformer.wte.weight'
C_ATTN = 'transformer.h.1.attn.c_attn.weight'
SPOILS = {
    'lacks wte': (lambda s: s.pop(W), 'wte.weight'),
    'lacks a bias': (lambda s: s.pop('transformer.ln_f.bias'), 'ln_f.bias'),
    'lacks a layer': (lambda s: [s.pop(k) for k in list(s) if '.h.1.' in k], 'h.1.attn'),
    'strange name': (lambda s: s.update(h=s[W] + 1), "['h']"),
    'short': (lambda s: s.update({W: s[W][:9].clone()}), 'wte.weight'),
    'not transposed': (lambda s: s.update({C_ATTN: s[C_ATTN].t().contiguous()}),
                       'h.1.attn.c_attn.weight'),
    'scalar': (lambda s: s.update({W: torch.tensor(1.)}), 'wte.weight')}


@pytest.mark.parametrize('spoil, words', SPOILS.values(), ids=SPOILS)
def test_weights_that_do_not_fit_are_refused(good, bad, spoil, words):
    """Weights with missing, unknown or wrongly shaped tensors end in a one-line error that names
    the tensor."""
    state = {name: w.clone() for name, w in load_file(good / 'model.safetensors').items()}
    spoil(state)
    (good / 'model.safetensors').write_bytes(save(state))
    bad(words)


def test_missing_and_foreign_files_are_refused(hf, good, bad):
    """A missing file, a pickle of weights or an untied head ends in a one-line error. Pickles are
    never read."""
    config = hf.GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=16,
                           tie_word_embeddings=False)
    hf.GPT2LMHeadModel(config).save_pretrained('good')
    bad('lm_head.weight')
    weights = good / 'model.safetensors'
    weights.rename(good / 'pytorch_model.bin')                      # a pickle, which is not read
    bad('model.safetensors')
    weights.mkdir()
    bad('model.safetensors')
    (good / 'config.json').unlink()
    bad('config.json')


# --------------------------------------------------------------------------------------------------
# tokenizers

HARD = ('\n\r\t \u00a0\u3000ĠĊ▁#\'"\\{}<|>[UNK]éa\u0301\u0308🙂👩\u200d👧\x00\x7f\x85\u2028ß'
        '\u0130İΣ日本')
TEXTS = [
    'Hello  world', '  \n\n\t x', "it's I'll we've can't 'S",
    'naïve café 日本語 🙂👩\u200d👩 a\u0301',
    '12 345,6.7 $%^&*(){}<>|`~', '\u2003\u00a0x\u3000y\x85z\u200bq\u2028r\x1cs',
    '<|endoftext|> in a<|endoftext|>b', ' \r\n\r\n \r', 'ſKÅª²Ⅷ٣१', '\x00\x01\x7f\x80', 'א ב ר',
    ' ' * 20 + 'the' + ' ' * 20, 'th the thethe', 'def f(x):\n    return the  # and\n\n\n'
]


@settings(derandomize=True, max_examples=15, deadline=None)
@given(
    data=st.data(), chars=st.just(set(HARD)) | st.sets(
        st.sampled_from(HARD) | st.characters(exclude_categories=['Cs']), min_size=1, max_size=40))
def test_a_vocabulary_of_characters_encodes_and_decodes_as_in_transformers(
        hf, tmp_path_factory, data, chars):
    """An exported character vocabulary encodes and decodes in transformers as it does here, for any
    characters, and can be read back."""
    meta, folder = char_meta(sorted(chars)), tmp_path_factory.mktemp('chars')
    (folder / 'config.json').write_text('{"model_type": "gpt2"}')
    huggingface.write_tokenizer(folder, meta, 16)
    theirs, ours = hf.AutoTokenizer.from_pretrained(folder), Tokenizer(meta)
    texts = data.draw(st.lists(st.text(meta['chars']), min_size=3, max_size=3))
    for text in [*texts, ''.join(meta['chars'])]:
        ids = ours.encode(text)
        assert theirs.encode(text) == ids and theirs.decode(ids) == text == ours.decode(ids)
    theirs.save_pretrained(folder)
    assert huggingface.read_tokenizer(str(folder)) == meta


def test_a_bpe_encodes_as_in_transformers_and_is_not_taken_for_gpt2s(hf, good, bad, monkeypatch):
    """An exported BPE encodes in transformers as in tiktoken. Sampling from an export with another
    BPE than GPT-2's ends in a one-line error. An encoding with a few real merges stands in for
    GPT-2's, which would need a download."""
    tiktoken = pytest.importorskip('tiktoken')
    merged = [
        b'th', b'the', b' t', b' the', b'an', b'and', b' a', b' and', b'\xf0\x9f', b'\xf0\x9f\x99',
        b'\n\n', b'  ', b'    ', b'\'s', b'\xc3\xa9', b'12', b're', b'\xe6\x97']
    ranks = {
        token: rank
        for rank, token in enumerate([*(bytes([byte]) for byte in range(256)), *merged])}
    encoding = tiktoken.Encoding('small', pat_str=download.BPE_PATTERN, mergeable_ranks=ranks,
                                 special_tokens={'<|endoftext|>': len(ranks)})
    monkeypatch.setattr(download, 'gpt2_encoding', lambda: encoding)
    write('good', make(), GPT2_META)
    theirs = hf.AutoTokenizer.from_pretrained('good')
    for text in [*TEXTS, *(a + b for a in TEXTS for b in TEXTS)]:
        ids = encoding.encode(text, allowed_special={'<|endoftext|>'})
        assert theirs.encode(text) == ids and theirs.decode(ids) == encoding.decode(ids)
    assert (theirs.eos_token_id, len(theirs)) == (encoding.eot_token, encoding.n_vocab)
    bad("GPT-2's BPE")
    small = GPT2_META | dict(vocab_size=260)
    write('small', make(), small)
    theirs = hf.AutoTokenizer.from_pretrained('small')
    assert len(theirs) == 260
    for text in TEXTS:
        assert theirs.encode(text) == Tokenizer(small).encode(text)


def test_a_tokenizer_needs_as_many_ids_as_the_model_has_and_openais_needs_no_file(
        good, bad, call, byte_bpe):
    """A tokenizer that does not match the model's vocabulary size, or no tokenizer, ends in a
    one-line error. A vocabulary of 50,257 tokens means GPT-2's tokenizer and needs no file."""
    write('good', make(vocab_size=5), char_meta(CHARS))
    bad('its tokenizer has 11 token ids, but its model only 5')
    (good / 'tokenizer.json').unlink()
    bad('tokenizer.json')
    write('good', make(vocab_size=50257))
    assert call(sample.main, *SAMPLE, '--init_from=good').code == 0


# --------------------------------------------------------------------------------------------------
# train.py and export.py

def test_training_goes_on_from_a_folder_in_its_tokens(trained, call, refused):
    """train.py can start from an exported folder and its tokenizer. A data set with another
    tokenizer, or another gelu, ends in a one-line error."""
    trained('--gelu=tanh', '--dropout=.1')
    assert call(export.main, '--out_dir=out', '--save_dir=mine').code == 0
    data, options = ('--dataset=toy', '--device=cpu'), ('--max_iters=2', '--eval_iters=1',
                                                        '--batch_size=1')
    assert call(train.main, *data, *options, '--gradient_accumulation_steps=1',
                '--init_from=mine').code == 0
    assert (checkpoint()['iter_num'], checkpoint()['model_args']['gelu']) == (2, 'tanh')
    assert 'gelu=tanh' in refused(train.main, *data, '--init_from=mine', '--gelu=exact')
    assert 'dataset=toy: ' in refused(train.main, *data, '--init_from=gpt2')


def test_a_model_of_a_small_bpe_is_not_trained_on_more_tokens_of_it(here, call, refused, byte_bpe):
    for name, size in (('small', 300), ('large', 400)):
        write_dataset(f'data/{name}', TEXT, 'gpt2', 'tests', size)
    assert call(train.main, *TINY, '--dataset=small', '--out_dir=run').code == 0
    line = refused(train.main, *TINY, '--dataset=large', '--init_from=run')
    assert 'dataset=large' in line and '300' in line and '400' in line


def test_a_run_is_exported_for_transformers_into_an_empty_folder(hf, trained, call, monkeypatch):
    """An export runs in transformers and here, with the text that the run itself generates. It may
    go to an existing empty folder. Folders beside it stay, even if their names look like leftovers
    of a killed export."""
    trained()
    # larger than any process id
    others = ['mine.4194305.tmp', '.mine.4194305.tmp', 'other.4194305.tmp']
    for name in ('mine', *others):
        Path(name).mkdir()
    result = call(export.main, '--save_dir=mine')
    assert result.out.startswith('out/ckpt.pt: 4 steps, written to mine ') and not result.err
    written = {path.name: path.stat().st_size for path in Path('mine').iterdir()}
    assert written.keys() == {
        'config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json'}
    assert all(f'{name}: {size:,} bytes' in result.out for name, size in written.items())
    assert {p.name for p in Path().iterdir()} == {'data', 'out', 'mine', *others}
    model, tokenizer = (kind.from_pretrained('mine')
                        for kind in (hf.AutoModelForCausalLM, hf.AutoTokenizer))
    ids = tokenizer('the cat', return_tensors='pt')
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=3, do_sample=False)[0])
    assert call(export.main, '--to=safetensors', '--save_dir=own').code == 0
    for name in ('mine', 'out', 'own'):
        if name != 'mine':
            monkeypatch.setitem(sys.modules, 'transformers', None)  # only 'mine' needs it
        result = call(sample.main, *SAMPLE, f'--init_from={name}', '--start=the cat',
                      '--temperature=0')
        assert result.out.startswith(f'{name}; SVD on V off\n{text}\n')


def test_a_run_is_exported_for_nanogpt(trained, call):
    """An export for nanoGPT has its checkpoint keys, its options, its order of optimizer states and
    a meta.pkl."""
    trained()
    result = call(export.main, '--out_dir=out', '--to=nanogpt', '--save_dir=nano/gpt')
    assert result.code == 0 and 'data/toy/meta.pkl' in result.out and 'left out' not in result.out
    saved, own = checkpoint('nano/gpt'), checkpoint()
    assert saved['model_args'].keys() == SMALL.keys() | {'bias', 'dropout'}
    assert equal(saved['model'], own['model'])
    assert (saved['iter_num'], saved['best_val_loss']) == (4, float(own['best_val_loss']))
    assert set(saved['config']) == set(NANOGPT_CONFIG) and saved['config']['dataset'] == 'toy'
    # in nanoGPT's order: parameters with weight decay come first
    shapes = [
        p.shape for p in sorted(GPT.from_checkpoint(saved).parameters(), key=lambda p: p.dim() < 2)]
    states = [saved['optimizer']['state'][i] for i in range(len(shapes))]
    assert [state['exp_avg'].shape for state in states] == shapes and states[0]['step'] == 4
    chars = own['tokenizer']['chars']
    assert pickle.loads(Path('nano/gpt/meta.pkl').read_bytes()) == dict(
        vocab_size=17, itos=dict(enumerate(chars)), stoi={c: i for i, c in enumerate(chars)})


@pytest.mark.parametrize(
    'to, options, words',
    [('gpt2', ('--use_svd=True', '--svd_rank=2', '--svd_scope=weight'), 'SVD of W_v, rank 2 of 8'),
     ('nanogpt',
      ('--use_svd=True', '--svd_rank=2', '--svd_scope=weight'), 'SVD of W_v, rank 2 of 8'),
     ('nanogpt', ('--optimizer=muon', ), 'Muon')])
def test_what_a_format_cannot_say_of_a_run_is_left_out_and_that_is_said(
        trained, call, to, options, words):
    """export.py says what it leaves out because the format cannot store it, and the logits are
    bit-identical."""
    trained(*options)
    result = call(export.main, f'--to={to}')
    assert result.code == 0 and words in result.out
    assert 'left out: the optimizer state' in result.out
    before, after = (GPT.from_pretrained(folder).eval() for folder in ('out', f'out-{to}'))
    idx = tokens(before.config)
    assert torch.equal(before(idx, idx)[0], after(idx, idx)[0]) and not after.config.use_svd
    assert to == 'gpt2' or not checkpoint('out-nanogpt')['optimizer']['state']


@pytest.mark.parametrize('vocab_size, extra, end', [(50304, dict(tokenizer=GPT2_META), 50256),
                                                    (17, dict(config=dict(dataset='gone')), None)])
def test_a_tokenizer_that_cannot_be_had_is_left_out(here, call, monkeypatch, vocab_size, extra,
                                                    end):
    """An export without its tokenizer says so. GPT-2's needs tiktoken, and the one of a nanoGPT
    checkpoint needs its data set."""
    download.gpt2_encoding.cache_clear()
    monkeypatch.setitem(sys.modules, 'tiktoken', None)
    Path('out').mkdir()
    model = make(vocab_size=vocab_size, n_layer=1, n_embd=2)
    torch.save(checkpoint_of(model) | dict(iter_num=0, **extra), 'out/ckpt.pt')
    assert 'left out: the tokenizer' in call(export.main).out
    assert not list(Path('out-gpt2').glob('tokenizer*'))
    config = json.loads(Path('out-gpt2/config.json').read_text())
    assert (config['bos_token_id'], config['eos_token_id'], config['vocab_size']) == (end, end,
                                                                                      vocab_size)


@pytest.mark.parametrize(
    'options, argument, words',
    [(('--use_svd=True', '--svd_rank=2'), '--to=gpt2', "svd_scope='sequence'"),
     (('--use_svd=True', '--svd_rank=2'), '--to=nanogpt', "(nearest: 'weight'"),
     (('--gelu=tanh', '--dropout=.1'), '--to=nanogpt', "gelu='tanh'"),
     *(((), argument, words)
       for argument, words in [('--save_dir=data', "'data-2'"), ('--save_dir=out', "'out-gpt2'"),
                               ('--save_dir=file', "'file-2'"), ('--save_dir=link', "'link-2'"),
                               ('--save_dir=.', "'gpt2'"), ('--save_dir=', "'gpt2'"),
                               ('--out_dir=nowhere', '--out_dir=out'), ('--to=onnx', "'nanogpt'"),
                               ('--too=gpt2', '--to'), ('gpt2', '--help')])])
def test_what_cannot_be_exported_is_refused_and_nothing_written(trained, refused, options, argument,
                                                                words):
    """What cannot be exported ends in a one-line error with a valid choice, and nothing is
    written."""
    trained(*options)
    Path('file').touch(), Path('link').symlink_to('nowhere')
    before = folder_bytes('.')
    assert words in refused(export.main, argument)
    assert folder_bytes('.') == before
    assert {p.name for p in Path().iterdir()} == {'data', 'out', 'file', 'link'}


@pytest.mark.parametrize('error, code', [(OSError(28, 'full'), 1), (KeyboardInterrupt(), 130)])
@pytest.mark.parametrize('to, flushes', [('gpt2', 2), ('gpt2', 5), ('nanogpt', 4)])
def test_a_full_disk_or_ctrl_c_leaves_nothing(trained, call, monkeypatch, to, flushes, error, code):
    """A full disk or Ctrl-C during an export leaves no file. The first two flushes belong to a
    trial write before the work starts, and each file has two."""
    trained()
    before = folder_bytes('.')
    monkeypatch.setattr(os, 'fsync', mock.Mock(side_effect=[None] * flushes + [error]))
    result = call(export.main, f'--to={to}', '--save_dir=new')
    assert (result.code, result.out, len(result.err.splitlines())) == (code, '', 1)
    assert folder_bytes('.') == before and {p.name for p in Path().iterdir()} == {'data', 'out'}

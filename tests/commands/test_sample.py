"""sample.py and bench.py: which run, which prompt, which SVD; what a comparison prints."""

import io
import itertools
import json
import os
import pickle
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench
import export
import runtime.draw as draw_module
import sample
import train
from helpers import TINY, checkpoint
from model import GPT, METHODS, SCOPES
from runtime import timing
from runtime.dataset import Tokenizer

pytestmark = pytest.mark.usefixtures('one_thread')
SHORT = ('--device=cpu', '--num_samples=2', '--max_new_tokens=30')


@pytest.fixture(scope='module')
def trained(tmp_path_factory, toy, one_thread):
    """A checkpoint that has learnt something, trained once without SVD."""
    folder = tmp_path_factory.mktemp('trained')
    options = '--max_iters=150 --lr_decay_iters=150 --eval_interval=150 --learning_rate=2e-2 --optimizer=muon'.split()
    assert train.main([*TINY, *options, f'--dataset={toy}', f'--out_dir={folder / "out"}']) == 0
    return folder / 'out' / 'ckpt.pt'


@pytest.fixture
def run(here, trained):
    """run(name, changes, without) puts the trained checkpoint into a folder below the working directory."""
    def run(name='out', without=(), **changes):
        (here / name).mkdir(parents=True, exist_ok=True)
        saved = torch.load(trained, weights_only=True) | changes
        torch.save({k: v for k, v in saved.items() if k not in without}, here / name / 'ckpt.pt')
        return name
    return run


@pytest.fixture
def texts(call):
    """texts(*options) -> the samples that sample.py prints, after the line that says which model it is."""
    def texts(*options):
        result = call(sample.main, *SHORT, *options)
        assert result.code == 0, result.err
        head, _, body = result.out.partition('\n')
        assert 'validation loss' in head
        return body.removesuffix('\n---------------\n').split('\n---------------\n')
    return texts


# ----------------------------------------------------------------------------------------------------------------------
# which model

def test_the_newest_run_is_taken_and_named(run, call):
    for age, name in ((300, 'old'), (100, 'newest'), (200, 'older')):
        os.utime(Path(run(name, iter_num=age)) / 'ckpt.pt', (1e9 - age, 1e9 - age))
    out = call(sample.main, *SHORT).out
    assert out.startswith('newest/ckpt.pt: 100 steps, validation loss ') and 'SVD on V off' in out
    assert call(sample.main, *SHORT, '--out_dir=old').out.startswith('old/ckpt.pt: 300 steps')


def test_a_run_comes_before_what_was_exported_from_it(run, call):
    for age, name in ((300, 'mine'), (100, 'mine-nanogpt'), (50, '.mine-nanogpt.123.tmp')):
        os.utime(Path(run(name)) / 'ckpt.pt', (1e9 - age, 1e9 - age))
    Path('mine/config.py').touch()
    assert call(sample.main, *SHORT).out.startswith('mine/ckpt.pt')
    Path('mine/config.py').unlink()
    assert call(sample.main, *SHORT).out.startswith('mine-nanogpt/ckpt.pt')


def test_without_any_run_one_line_says_how_to_get_one(here, refused):
    assert 'python train.py config/' in refused(sample.main)


def test_it_is_found_from_another_folder(run, texts, here, monkeypatch):
    run()
    inside = texts()
    (here / 'elsewhere').mkdir()
    monkeypatch.chdir(here / 'elsewhere')
    assert texts(f'--out_dir={here / "out"}') == texts('--out_dir=../out') == inside


@pytest.mark.parametrize('spoil, words', [
    (dict(model={}), 'do not fit its model_args'), (dict(model_args={'n_expert': 8}), 'n_expert'),
    (dict(without=['model_args']), 'it needs the keys'), (dict(without=['model']), 'it needs the keys'),
    pytest.param(dict(model=3), 'out/ckpt.pt')])
def test_a_foreign_checkpoint_is_refused(run, refused, spoil, words):
    run(**spoil)
    assert words in refused(sample.main)


def test_a_truncated_checkpoint_is_refused(run, refused):
    path = Path(run()) / 'ckpt.pt'
    path.write_bytes(path.read_bytes()[:3000])
    assert 'out/ckpt.pt: damaged, or not a PyTorch file' in refused(sample.main)


def test_gpt2_samples_through_its_own_tokenizer(here, call, monkeypatch, byte_bpe):
    torch.manual_seed(0)
    gpt2 = GPT(train.GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=16, vocab_size=50257))
    monkeypatch.setattr(GPT, 'from_pretrained', lambda name, override: gpt2)
    result = call(sample.main, *SHORT, '--init_from=gpt2', '--start=a prompt')
    assert result.code == 0 and result.out.count('a prompt') == 2


# ----------------------------------------------------------------------------------------------------------------------
# which text

def test_samples_come_from_one_batch_and_keep_the_prompt(run, texts, monkeypatch):
    run()
    shapes = []
    stream = GPT.stream

    def record(self, idx, *args, **options):
        shapes.append(idx.shape)
        return stream(self, idx, *args, **options)
    monkeypatch.setattr(GPT, 'stream', record)
    found = texts('--start=the cat', '--num_samples=5')
    assert shapes == [(5, 7)] and len(found) == 5 and len(set(found)) > 1
    assert all(text.startswith('the cat') and len(text) == 7 + 30 for text in found)


def test_a_trained_model_continues_the_text(run, texts):
    """Every line of the data starts with 'the '."""
    run()
    assert all(text.startswith('the cat sat on the bed\nthe ') for text in texts('--start=the cat sat on the bed\n'))


def test_a_prompt_may_be_longer_than_the_context(run, texts):
    run()
    prompt = 'the hen sang on the stone\n' * 3                       # 78 characters, context 16
    assert all(text.startswith(prompt) and len(text) == 78 + 30 for text in texts(f'--start={prompt}'))


@pytest.mark.parametrize('content', [b'the toad\nlies', b'the toad\r\nlies',
                                     pytest.param(b'\xef\xbb\xbfthe toad\nlies')],
                         ids=['unix', 'windows', 'byte order mark'])
def test_a_prompt_may_come_from_a_file(run, texts, here, content):
    run()
    (here / 'my prompt.txt').write_bytes(content)
    assert all(text.startswith('the toad\nlies') for text in texts('--start=FILE:my prompt.txt'))


@pytest.mark.parametrize('start, words', [
    ('ROMEO', "characters 'EMOR' are not in this model's vocabulary of 17"), ('', 'at least one character'),
    ('FILE:nowhere.txt', 'FileNotFoundError'), ('FILE:', 'not a readable'), ('FILE:latin1.txt', 'UnicodeDecodeError'),
    ('FILE:empty.txt', 'at least one character')])
def test_a_prompt_that_cannot_be_encoded_is_refused(run, refused, here, start, words):
    run()
    (here / 'latin1.txt').write_bytes(b'\xe9')
    (here / 'empty.txt').write_bytes(b'')
    assert words in refused(sample.main, f'--start={start}')


def test_what_cannot_fit_is_refused(run, refused):
    run()
    assert 'make one of them smaller' in refused(sample.main, f'--num_samples={10 ** 100}')


def test_equal_seeds_give_equal_texts_and_other_seeds_do_not(run, texts):
    run()
    a, again, b = texts('--seed=1'), texts('--seed=1'), texts('--seed=2')
    assert a == again != b


def test_top_k_of_one_and_a_low_temperature_are_the_likeliest_text(run, texts):
    run()
    greedy = texts('--top_k=1')
    assert greedy[0] == greedy[1] and texts('--temperature=1e-3', '--top_k=None') == greedy


@pytest.mark.parametrize('temperature', ['1e-300', '1e-40', '0'])
def test_a_temperature_of_nothing_is_the_likeliest_text(run, texts, temperature):
    run()
    assert texts(f'--temperature={temperature}') == texts('--top_k=1')


# ----------------------------------------------------------------------------------------------------------------------
# which SVD

@pytest.mark.parametrize('scope', SCOPES)
@pytest.mark.parametrize('method', METHODS)
def test_svd_can_be_switched_on_for_a_model_trained_without(run, texts, call, scope, method):
    """Rank 2 of 8 changes the text; full rank, None and off leave it as it was."""
    run()
    options = (f'--svd_scope={scope}', f'--svd_method={method}', '--svd_block=2')
    plain = texts()
    assert texts(*options, '--use_svd=True', '--svd_rank=2') != plain
    for off in (['--use_svd=True', '--svd_rank=8'], ['--use_svd=True', '--svd_rank=99'], ['--use_svd=True'],
                ['--use_svd=False', '--svd_rank=2']):
        assert texts(*options, *off) == plain
    assert 'SVD on V off (svd_rank=99' in call(sample.main, *SHORT, '--use_svd=True', '--svd_rank=99').out
    assert f'SVD on V rank 2 of 8, {method}, {scope} (switched here)' in call(
        sample.main, *SHORT, *options, '--use_svd=True', '--svd_rank=2').out


def test_a_model_trained_with_svd_keeps_it_unless_told_otherwise(run, texts, call):
    args = checkpoint(run())['model_args']
    plain = texts()
    run(model_args=args | dict(use_svd=True, svd_rank=2))
    assert 'SVD on V rank 2 of 8, gram, sequence: ' in call(sample.main, *SHORT).out
    assert texts() != plain == texts('--use_svd=False')


def test_gpt2_says_what_is_cut_too(here, call, monkeypatch, byte_bpe):
    gpt2 = GPT(train.GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=16, vocab_size=50257, use_svd=True,
                               svd_rank=2))
    monkeypatch.setattr(GPT, 'from_pretrained', lambda name, override: gpt2)
    out = call(sample.main, *SHORT, '--init_from=gpt2', '--use_svd=True', '--svd_rank=2', '--start=a').out
    assert out.startswith('gpt2; SVD on V rank 2 of 4, gram, sequence (switched here): ') and 'nothing is cached' in out


def test_a_prefix_that_is_recomputed_is_not_compiled(run, refused):
    run()
    assert 'nearest: --compile=False' in refused(sample.main, '--use_svd=True', '--svd_rank=2', '--compile=True')


def test_a_reader_who_leaves_ends_the_sampling(run, monkeypatch):
    """| head"""
    class Left(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

        def fileno(self):
            return os.open(os.devnull, os.O_WRONLY)
    drawn, draw = [], draw_module.draw
    run()
    monkeypatch.setattr('runtime.draw.draw', lambda *args: drawn.append(1) or draw(*args))
    monkeypatch.setattr(sys, 'stdout', Left())
    assert sample.main(['--device=cpu', '--max_new_tokens=100']) == 0 and len(drawn) < 3


@pytest.mark.parametrize('option', ['--use_svd=None', '--svd_method=None', '--svd_scope=None'])
def test_none_means_as_trained(run, texts, option):
    args = checkpoint(run())['model_args']
    run(model_args=args | dict(use_svd=True, svd_rank=2))
    assert texts(option) == texts()


@pytest.mark.parametrize('option, words', [('svd_rank=0', '1 to 8, or None'), ('svd_rank=-3', '1 to 8, or None'),
                                           ('svd_block=0', 'at least 1'), ('svd_method=randomised', 'nearest: ')])
def test_an_svd_that_cannot_be_is_refused(run, refused, option, words):
    run()
    assert words in refused(sample.main, '--use_svd=True', f'--{option}')


# ----------------------------------------------------------------------------------------------------------------------
# nanoGPT's checkpoints carry no tokenizer

def test_a_checkpoint_without_tokenizer_finds_meta_pkl_below_data(run, texts, here):
    run()
    expected = texts()
    config, chars = checkpoint()['config'], checkpoint()['tokenizer']['chars']
    (here / 'data' / 'their_char').mkdir()
    (here / 'data' / 'their_char' / 'meta.pkl').write_bytes(pickle.dumps({
        'vocab_size': 17, 'itos': dict(enumerate(chars)), 'stoi': {c: i for i, c in enumerate(chars)}}))
    run(without=['tokenizer', 'random', 'scaler'], config=config | {'dataset': 'their_char', 'device': 'cuda'},
        best_val_loss=torch.tensor(1.5))
    assert texts() == expected


def test_a_checkpoint_without_any_tokenizer_is_refused_with_what_it_needs(run, refused):
    config = checkpoint(run())['config']
    run(without=['tokenizer'], config=config | {'dataset': 'their_char'})
    assert 'meta.pkl' in refused(sample.main)


def test_a_meta_pkl_that_would_run_code_is_refused(run, refused, here):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (Path('EXECUTED'),)
    run(without=['tokenizer'], config=checkpoint(run())['config'] | {'dataset': 'theirs'})
    (here / 'data' / 'theirs').mkdir()
    (here / 'data' / 'theirs' / 'meta.pkl').write_bytes(pickle.dumps(Bomb()))
    assert 'data/theirs' in refused(sample.main) and not Path('EXECUTED').exists()


# ----------------------------------------------------------------------------------------------------------------------
# as it is drawn

class Screen(io.StringIO):
    """A stdout that remembers what could be seen of it: its content at every flush."""

    def __init__(self):
        super().__init__()
        self.seen = ['']

    def flush(self):
        if self.getvalue() != self.seen[-1]:
            self.seen.append(self.getvalue())


@pytest.fixture
def screen(monkeypatch):
    """screen() -> a new one, in place of stdout until the test ends."""
    def screen():
        monkeypatch.setattr(sys, 'stdout', Screen())
        return sys.stdout
    return screen


def before_each_token(monkeypatch, act):
    """act(n) is called before the n-th token is drawn, n = 0, 1, ..."""
    stream = GPT.stream

    def watched(*args, **options):
        tokens = stream(*args, **options)
        for n in itertools.count():
            act(n)
            try:
                new = next(tokens)
            except StopIteration:
                return
            yield new
    monkeypatch.setattr(GPT, 'stream', watched)


@pytest.mark.parametrize('svd', [{}, dict(use_svd=True, svd_rank=2, svd_scope='causal', svd_block=4),
                                 dict(use_svd=True, svd_rank=2, svd_scope='sequence')], ids=str)
def test_all_that_is_printed_is_the_texts_and_their_lines(run, call, svd):
    """Byte for byte what it was before it streamed: texts that `generate` makes, each with a line of dashes."""
    saved = checkpoint(run())
    out = call(sample.main, *SHORT, '--num_samples=3', '--start=the toad', *(f'--{k}={v}' for k, v in svd.items())).out
    torch.manual_seed(1337)                                         # making a model draws from it, too
    model, tokenizer = GPT.from_checkpoint(saved, **svd).eval(), Tokenizer(saved['tokenizer'])
    idx = torch.tensor(tokenizer.encode('the toad')).repeat(3, 1)
    texts = [tokenizer.decode(row) for row in
             model.generate(idx, 30, .8, 200, use_cache=not model.config.svd_sees_future).tolist()]
    assert out.partition('\n')[2] == ''.join(f'{text}\n---------------\n' for text in texts)


def test_the_first_sample_appears_token_by_token(run, screen, monkeypatch):
    run()
    shown, screen = [], screen()
    before_each_token(monkeypatch, lambda n: shown.append(screen.seen[-1].partition('\n')[2]))
    assert sample.main([*SHORT, '--num_samples=3', '--start=the toad', '--seed=3']) == 0
    body = screen.getvalue().partition('\n')[2]
    first = body.partition('\n---------------\n')[0]
    assert body.count('\n---------------\n') == 3 and len(first) == 8 + 30
    assert shown == ['', *(first[:8 + n] for n in range(1, 31))]


def test_a_character_of_several_tokens_appears_with_the_last(here, screen, monkeypatch, byte_bpe):
    """GPT-2's tokenizer, a byte a token; the model wants to say 'né€😀' over and over."""
    ids, screen = iter('né€😀'.encode() * 2), screen()
    monkeypatch.setattr(GPT, 'from_pretrained', lambda name, override: GPT(train.GPTConfig(
        n_layer=1, n_head=2, n_embd=8, block_size=16, vocab_size=50257)))
    monkeypatch.setattr('runtime.draw.draw', lambda logits, *_: torch.full((len(logits), 1), next(ids)))
    assert sample.main([*SHORT, '--init_from=gpt2', '--start=a', '--max_new_tokens=20', '--num_samples=1']) == 0
    head, said = 'gpt2; SVD on V off\n', 'né€😀' * 2
    assert screen.seen[1:] == [f'{head}a{said[:n]}' for n in range(1, 9)] + [screen.getvalue()]
    assert screen.getvalue() == f'{head}a{said}\n---------------\n'


def test_a_character_that_is_cut_off_is_a_question_mark(here, call, monkeypatch, byte_bpe):
    ids = iter('é€'.encode()[:4] + b'\xff')
    monkeypatch.setattr(GPT, 'from_pretrained', lambda name, override: GPT(train.GPTConfig(
        n_layer=1, n_head=2, n_embd=8, block_size=16, vocab_size=50257)))
    monkeypatch.setattr('runtime.draw.draw', lambda logits, *_: torch.full((len(logits), 1), next(ids)))
    out = call(sample.main, '--device=cpu', '--init_from=gpt2', '--start=a', '--max_new_tokens=5',
               '--num_samples=2').out
    assert out == 'gpt2; SVD on V off\n' + 2 * 'aé��\n---------------\n'


@pytest.mark.parametrize('tokens', [0, 1, 17])
def test_ctrl_c_leaves_what_was_printed(run, screen, monkeypatch, tokens):
    run()
    whole = screen()
    assert sample.main([*SHORT, '--start=the toad']) == 0
    head, _, body = whole.getvalue().partition('\n')
    screen = screen()
    before_each_token(monkeypatch, lambda n: n == tokens and signal.raise_signal(signal.SIGINT))
    assert sample.main([*SHORT, '--start=the toad']) == 130
    assert screen.getvalue() == f'{head}\n' + (body[:8 + tokens] if tokens else '')
    assert sys.stdout is screen                                     # and no longer what hides its errors


@pytest.mark.parametrize('fault', [FloatingPointError('not\nfinite'), torch.linalg.LinAlgError('NaN\nor inf')],
                         ids=repr)
def test_numbers_out_of_range_end_in_one_line(run, refused, monkeypatch, capsys, fault):
    run()

    def act(n):
        if n == 5:
            raise fault
    before_each_token(monkeypatch, act)
    line = refused(sample.main, *SHORT)
    assert line.startswith('sample.py: the next token has no probabilities (') and 'out of range' in line


@pytest.mark.parametrize('options', [[], ['--use_svd=True', '--svd_rank=2', '--svd_scope=causal', '--svd_block=2'],
                                     ['--use_svd=True', '--svd_rank=2', '--svd_scope=weight'],
                                     ['--use_svd=True', '--svd_rank=2']], ids=str)
@pytest.mark.parametrize('name', ['lm_head.weight', 'transformer.h.0.attn.c_attn.weight'])
def test_weights_that_take_the_numbers_out_of_range(run, refused, options, name):
    """Each weight is a number; the logits are not."""
    state = checkpoint(run())['model']
    state[name].mul_(1e38 / state[name].abs().max())
    if name == 'lm_head.weight':
        state['transformer.wte.weight'] = state[name]
    run(model=state)
    assert 'the next token has no probabilities (' in refused(sample.main, *SHORT, *options)


def test_top_p_of_nearly_nothing_is_the_likeliest_text(run, texts):
    run()
    assert texts('--top_p=1e-300') == texts('--top_p=1e-6', '--top_k=None') == texts('--temperature=0')
    assert texts('--top_p=1') == texts('--top_p=None') == texts() != texts('--top_p=.5')


@pytest.mark.parametrize('option', ['--top_p=.9', '--temperature=1e300', '--temperature=0'])
def test_a_text_of_any_option_is_as_long_as_asked_for(run, texts, option):
    run()
    assert [len(text) for text in texts(option, '--start=the')] == [33, 33]


# ----------------------------------------------------------------------------------------------------------------------
# bench.py

BENCH = [option for option in TINY if 'dataset' not in option] + ['--pairs=2', '--vocab_size=17', '--svd_block=4']
PEER = '''
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)

    def forward(self, idx, targets=None):
        logits = self.table(idx)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        return torch.cat((idx, idx[:, :1].expand(-1, max_new_tokens)), dim=1)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas, weight_decay=weight_decay)
'''


@pytest.fixture
def results(call, here):
    """results(*options) -> what bench.py's last line says."""
    def results(*options):
        result = call(bench.main, *BENCH, *options)
        assert result.code == 0, result.err
        return json.loads(result.out.splitlines()[-1])
    return results


def test_bench_compares_every_method_and_scope_with_the_baseline(results):
    found = results('--svd_rank=2')
    assert found.keys() == {'header', 'device', 'torch', 'pairs', 'seed', 'results'} and found['pairs'] == 2
    assert found['results'].keys() == {f'{method}, {scope}' for method in METHODS for scope in SCOPES}
    for row in found['results'].values():
        assert row.keys() == {'a_ms', 'b_ms', 'ratio', 'ratio_quartiles'}
        assert min(row['a_ms'], row['b_ms'], row['ratio']) > 0


def test_bench_times_a_peers_model(results, here):
    (here / 'peer').mkdir()
    (here / 'peer' / 'model.py').write_text(PEER)
    assert results('--peer=peer', '--optimizer=muon')['results'].keys() == {'peer'}
    sys.modules.pop('peer_model', None)


def test_bench_times_decoding(results, here):
    """A row for each context and model; bytes as the models say; the peer has no cache."""
    (here / 'peer').mkdir()
    (here / 'peer' / 'model.py').write_text(PEER)
    found = results('--decode', '--svd_rank=2', '--contexts=3,8', '--tokens=4', '--peer=peer', '--batch_size=2')
    names = ['no SVD', *(repr(scope) for scope in SCOPES), 'bare one-token forward', 'peer']
    assert [(row['context'], row['name']) for row in found['results']] == [(c, name) for c in (3, 8) for name in names]
    for row in found['results']:
        assert row['tokens_per_s'] > 0 and row['quartiles'][0] <= row['rate_over_no_svd'] <= row['quartiles'][1]
    # 1 layer, 2 heads of 8, batch 2, room for 3 + 4 - 1 tokens: keys, and values of 8 or, in 'weight' scope, 2 numbers
    sizes = {row['name']: row['cache_bytes'] for row in found['results'] if row['context'] == 3}
    assert sizes['no SVD'] == 4 * 2 * 2 * 6 * (8 + 8) and sizes["'weight'"] == 4 * 2 * 2 * 6 * (8 + 2)
    assert sizes["'sequence'"] == 0 and sizes['peer'] is None
    sys.modules.pop('peer_model', None)


def test_bench_times_the_models_that_it_is_told(results, fit, call):
    """The vocabulary is the data set's, 17; a run, its export and a continued one have a shape of their own."""
    assert ', 16 wide, vocabulary 17, ' in results('--dataset=toy', '--vocab_size=None', '--svd_rank=2')['header']
    fit('--n_layer=3', '--n_embd=24', '--vocab_size=19')
    assert call(export.main, '--to=safetensors', '--save_dir=mine').code == 0
    for source in (['--init_from=out'], ['--init_from=mine', '--batch_size=4'], ['--init_from=resume']):
        result = call(bench.main, *source, '--pairs=2', '--svd_rank=4', '--device=cpu')
        assert json.loads(result.out.splitlines()[-1])['header'].startswith(
            '3 layers, 2 heads, 24 wide, vocabulary 19, context 16, batch 4, '), result.err


def test_bench_leaves_out_scopes_that_truncate_nothing(results):
    assert results('--svd_rank=2', '--svd_block=16')['results'].keys() == {
        f'{method}, {scope}' for method in METHODS for scope in ('sequence', 'weight')}


def test_bench_writes_no_file(results, here):
    results('--svd_rank=2')
    assert [p.name for p in here.iterdir()] == ['data']


@pytest.mark.parametrize('option, words', [('peer=nowhere', 'has no model.py'), ('pairs=1', 'nearest: 2'),
                                           ('svd_rank=0', '1 to 8, or None'), ('tokens=1', 'nearest: 2'),
                                           ('contexts=3,x', 'whole numbers'), ('contexts=14', 'at most'),
                                           ('contexts=0', 'whole numbers'), ('tokens=16', 'leave no room'),
                                           ('contexts=', 'whole numbers')])
def test_bench_refuses_what_cannot_be(here, refused, option, words):
    assert words in refused(bench.main, *BENCH, '--decode', '--tokens=4', f'--{option}')


def test_bench_says_that_an_ordinary_model_has_no_rival(here, refused):
    assert 'nothing to compare (nearest: --svd_rank=4)' in refused(bench.main, *BENCH)


def test_quartiles_of_a_ratio_lie_between_its_extremes(monkeypatch):
    """Two pairs: a takes 1 s and 3 s, b always 1 s. No quartile of the ratio is below 1, let alone below 0."""
    warm_up = [0, 9] * 6
    clock = iter([*warm_up, 0, 1, 0, 1, 0, 1, 0, 3])                # a, b, then b, a
    monkeypatch.setattr(timing, 'time', SimpleNamespace(perf_counter=lambda: next(clock)))
    found = bench.compare('a', lambda: None, lambda: None, 2, 'cpu', 'b')
    assert (found['a_ms'], found['b_ms'], found['ratio']) == (2000, 1000, 2)
    low, high = found['ratio_quartiles']
    assert 1 <= low <= 2 <= high <= 3

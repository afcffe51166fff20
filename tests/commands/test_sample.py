"""sample.py and bench.py: which run, prompt and SVD they use, and what a comparison prints."""

import io
import json
import os
import signal
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

import bench
import export
import sample
from helpers import TINY, checkpoint
from model import GPT, METHODS, SCOPES
from runtime.data import Tokenizer

pytestmark = pytest.mark.usefixtures('one_thread')
SHORT = ('--device=cpu', '--num_samples=2', '--max_new_tokens=30')
END = '\n---------------\n'


@pytest.fixture
def run(trained):
    """The checkpoint of a trained run in out/."""
    return checkpoint(trained('--max_iters=150', '--lr_decay_iters=150', '--eval_interval=150',
                              '--learning_rate=2e-2', '--optimizer=muon'))


@pytest.fixture
def texts(call, run):
    """texts(*options) returns the samples that sample.py prints, without the line about the
    model."""
    def texts(*options):
        result = call(sample.main, *SHORT, *options)
        assert result.code == 0, result.err
        return result.out.partition('\n')[2].removesuffix(END).split(END)
    return texts


# --------------------------------------------------------------------------------------------------
# the model

def test_a_run_is_named_and_found_from_another_folder(texts, call, here, monkeypatch):
    """The first line names the run, and a run can be sampled from another working directory."""
    assert call(sample.main, *SHORT).out.startswith('out/ckpt.pt: 150 steps, ')
    inside = texts()
    monkeypatch.chdir('data')
    for option in ('--init_from=../out', '--out_dir=../out', f'--out_dir={here}/out'):
        assert texts(option) == inside


def test_a_checkpoint_of_nanogpt_away_from_its_data_set_says_what_is_missing(run, refused):
    """A checkpoint of nanoGPT without its data set ends in a one-line error that names meta.pkl."""
    del run['tokenizer']
    torch.save(run | {'config': {'dataset': 'theirs'}}, 'out/ckpt.pt')
    assert 'meta.pkl' in refused(sample.main)


# --------------------------------------------------------------------------------------------------
# the text


@pytest.mark.parametrize('svd', [{},
                                 dict(use_svd=True, svd_rank=2, svd_scope='causal', svd_block=4),
                                 dict(use_svd=True, svd_rank=2, svd_scope='sequence')], ids=str)
def test_what_is_printed_is_the_texts_that_generate_makes_and_their_lines(run, call, svd):
    """sample.py prints the texts that `model.generate` makes from the same seed, each followed by a
    line."""
    out = call(sample.main, *SHORT, '--num_samples=3', '--start=the toad',
               *(f'--{k}={v}' for k, v in svd.items())).out
    torch.manual_seed(1337)  # a new model draws from the generator, too
    model, tokenizer = GPT.from_checkpoint(run, **svd).eval(), Tokenizer(run['tokenizer'])
    idx = torch.tensor(tokenizer.encode('the toad')).repeat(3, 1)
    rows = model.generate(idx, 30, .8, 200, use_cache=not model.config.is_noncausal).tolist()
    assert out.partition('\n')[2] == ''.join(tokenizer.decode(row) + END for row in rows)
    assert len({*map(tuple, rows)}) > 1


@pytest.mark.parametrize('content', [
    b'the hen sang on the stone\n' * 3, b'the toad\nate on the sea\r\n',
    b'\xef\xbb\xbfthe toad ate on the sea\n'
])
def test_a_trained_model_continues_a_prompt_from_a_file_that_may_be_longer_than_its_context(
        texts, content):
    """A prompt may come from a file, with any line ends and a byte order mark, and may exceed the
    context of 16 characters. Every line of the data starts with 'the ', so a trained model must
    continue a prompt that ends with a line break by 'the '."""
    Path('my prompt.txt').write_bytes(content)
    start = content.decode('utf-8-sig').replace('\r\n', '\n')
    for text in texts('--start=FILE:my prompt.txt'):
        assert text.startswith(start + 'the ') and len(text) == len(start) + 30


@pytest.mark.parametrize('options, words',
                         [('--start=ROMEO', 'EMOR'), ('--start=', 'start'),
                          ('--start=FILE:nowhere.txt', 'nowhere.txt'),
                          ('--start=FILE:', 'start=FILE:'),
                          ('--start=FILE:latin1.txt', 'latin1.txt'),
                          ('--start=FILE:empty.txt', 'start'),
                          ('--num_samples=10000000000', 'num_samples'),
                          ('--use_svd=True --svd_rank=0', 'nearest: 1'),
                          ('--use_svd=True --svd_rank=-3', 'nearest: 1'),
                          ('--use_svd=True --svd_block=0', 'svd_block=0'),
                          ('--svd_method=randomised', "nearest: 'randomized'"),
                          ('--use_svd=True --svd_rank=2 --compile=True', '--compile=False'),
                          ('--out_dir=data', 'data/ckpt.pt')])
def test_what_cannot_be_is_refused(run, refused, options, words):
    Path('latin1.txt').write_bytes(b'\xe9')
    Path('empty.txt').touch()
    assert words in refused(sample.main, *options.split())


def test_seeds_and_options_choose_the_draws_and_the_likeliest_text_needs_none(texts):
    """Seed, temperature, top_k and top_p change the samples. All ways to ask for the likeliest text
    give the same one."""
    plain, greedy = texts('--seed=1'), texts('--top_k=1')
    assert texts('--seed=1', '--top_p=1') == plain and greedy[0] == greedy[1] and len(
        greedy[0]) == 31
    assert plain not in (texts('--seed=2'), texts('--seed=1', '--top_p=.5'),
                         texts('--seed=1', '--temperature=1e300'))
    for options in ('--temperature=0', '--temperature=1e-3 --top_k=None',
                    '--top_p=1e-6 --top_k=None'):
        assert texts(*options.split()) == greedy, options


# --------------------------------------------------------------------------------------------------
# the SVD

@pytest.mark.parametrize('scope, method',
                         [('sequence', 'gram'), ('causal', 'standard'), ('weight', 'randomized')])
def test_svd_is_as_trained_unless_it_is_switched_on_or_off(run, texts, call, scope, method):
    """sample.py uses the SVD of the run unless an option changes it. Rank 2 of 8 changes the text.
    Full rank, None and use_svd=False give the text without SVD."""
    options, plain = (f'--svd_scope={scope}', f'--svd_method={method}', '--svd_block=2'), texts()
    out = call(sample.main, *SHORT, *options, '--use_svd=True', '--svd_rank=2').out
    assert f'SVD on V rank 2 of 8, {method}, {scope} (' in out and plain[0] not in out
    assert ('nothing is cached' in out) == (scope == 'sequence')
    for off in ('--use_svd=True --svd_rank=8', '--use_svd=True --svd_rank=99', '--use_svd=True',
                '--use_svd=False --svd_rank=2'):
        assert texts(*options, *off.split()) == plain
    svd = dict(use_svd=True, svd_rank=2, svd_scope=scope, svd_method=method, svd_block=2)
    torch.save(run | dict(model_args=run['model_args'] | svd), 'out/ckpt.pt')
    assert f'SVD on V rank 2 of 8, {method}, {scope}' in call(sample.main, *SHORT).out
    assert texts() == texts('--use_svd=None',
                            '--svd_method=None') != plain == texts('--use_svd=False')


@pytest.mark.parametrize('svd, name', [('', 'lm_head'),
                                       ('--svd_scope=causal --svd_block=2', 'lm_head'),
                                       ('--svd_scope=sequence', 'lm_head'),
                                       ('', 'transformer.h.0.attn.c_attn'),
                                       ('--svd_scope=weight', 'transformer.h.0.attn.c_attn'),
                                       ('--svd_scope=sequence', 'transformer.h.0.attn.c_attn')])
def test_weights_that_take_the_numbers_out_of_range_end_in_one_line(run, refused, svd, name):
    """Finite weights whose logits overflow end in a one-line error."""
    state = run['model']
    state[f'{name}.weight'].mul_(1e38 / state[f'{name}.weight'].abs().max())
    torch.save(run | dict(model=state | {'transformer.wte.weight': state['lm_head.weight']}),
               'out/ckpt.pt')
    assert 'probabilities' in refused(sample.main, *SHORT, '--svd_rank=2',
                                      f'--use_svd={bool(svd)}', *svd.split())


# --------------------------------------------------------------------------------------------------
# output while sampling

def show(*options, stop=None, code=0):
    """Run sample.py and return what it prints, and a dict with an entry per flush of new text: all
    text printed so far -> the state of torch's generator. Ctrl-C comes with flush number `stop`."""
    screen, seen = io.StringIO(), {}

    def flush():
        if screen.getvalue() not in seen:
            seen[screen.getvalue()] = torch.get_rng_state().numpy().tobytes()
            if len(seen) == stop:
                signal.raise_signal(signal.SIGINT)
    screen.flush = flush
    with redirect_stdout(screen):
        assert sample.main([*SHORT, '--start=the toad', *options]) == code
        assert sys.stdout is screen  # sample.py has restored stdout
    return screen.getvalue(), seen


def test_the_first_sample_appears_as_it_is_drawn_and_ctrl_c_leaves_it(run):
    """The first sample is shown token by token as it is drawn, and Ctrl-C keeps what is shown."""
    text, seen = show('--num_samples=3')
    head, _, body = text.partition('\n')
    first, states = body.partition(END)[0], list(seen.values())
    assert body.count(END) == 3 and len(first) == 8 + 30
    assert list(seen)[:30] == [f'{head}\n{first[:8 + n]}' for n in range(1, 31)]
    assert len(set(states[:30])) == 30  # each flush follows one more draw
    for stop in (1, 17):
        assert show('--num_samples=3', stop=stop, code=130)[0] == list(seen)[stop - 1]


def test_a_reader_who_leaves_ends_the_sampling(run):
    """Sampling stops after at most two tokens if the reader of a pipe closes it, as `| head`
    does."""
    states = list(show()[1].values())
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, 'w') as pipe, redirect_stdout(pipe):
        assert sample.main([*SHORT, '--start=the toad']) == 0
    assert torch.get_rng_state().numpy().tobytes() in states[:2]  # it drew no more than two tokens


# --------------------------------------------------------------------------------------------------
# bench.py

BENCH = [option for option in TINY if 'dataset' not in option] + ['--pairs=2', '--vocab_size=17',
                                                                  '--svd_block=4']
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
    """results(*options) runs bench.py and returns the JSON of its last line. peer/ has another
    model."""
    Path('peer').mkdir()
    Path('peer/model.py').write_text(PEER)

    def results(*options):
        result = call(bench.main, *BENCH, *options)
        assert result.code == 0, result.err
        assert {p.name for p in here.iterdir()} == {'data', 'peer'}             # it writes no file
        return json.loads(result.out.splitlines()[-1])
    return results


@pytest.mark.any_device
def test_bench_compares_every_method_and_scope_and_another_model_with_the_baseline(results, device):
    """bench.py times every method and scope and the model in --peer against the baseline."""
    found = results('--svd_rank=2', '--peer=peer', '--optimizer=muon', f'--device={device}')
    assert found.keys() == {'header', 'device', 'torch', 'pairs', 'seed', 'results'
                            } and found['pairs'] == 2
    assert found['results'].keys() == {
        'peer', 'optimizer left out',
        *(f'{method}, {scope}' for method in METHODS for scope in SCOPES)}
    for row in found['results'].values():
        assert min(row['a_ms'], row['b_ms'], row['ratio'], *row['ratio_quartiles']) > 0


@pytest.mark.any_device
def test_bench_times_decoding(results, device):
    """--decode has a row per context and model, and the bytes are those that the models report. The
    peer has no cache."""
    found = results('--decode', '--svd_rank=2', '--contexts=3,8', '--tokens=4', '--peer=peer',
                    '--batch_size=2',
                    f'--device={device}', '--dtype=float32')
    names = ['no SVD', *(repr(scope) for scope in SCOPES), 'bare one-token forward', 'peer']
    assert [(row['context'], row['name']) for row in found['results']] == [(c, name) for c in (3, 8)
                                                                           for name in names]
    for row in found['results']:
        assert row['quartiles'][0] <= row['rate_over_no_svd'] <= row['quartiles'][1]
        assert row['tokens_per_s'] > 0
    # 1 layer, 2 heads of 8, batch 2, room for 3 + 4 - 1 tokens: keys, and values of 8 or, in
    # 'weight' scope, 2 numbers
    sizes = {row['name']: row['cache_bytes'] for row in found['results'] if row['context'] == 3}
    assert sizes.items() >= {'no SVD': 4 * 2 * 2 * 6 * (8 + 8), "'weight'": 4 * 2 * 2 * 6 * (8 + 2),
                             "'sequence'": 0, 'peer': None}.items()


def test_bench_times_the_models_that_it_is_told(trained, call):
    """bench.py takes the vocabulary of the data set, here 17, or the shape of a run, an export or a
    resumed run."""
    decode = '--decode', '--contexts=3', '--tokens=2', '--pairs=2', '--device=cpu'
    assert ', width 16, vocabulary 17, ' in call(bench.main, *TINY, *decode).out
    trained('--n_layer=3', '--n_embd=24', '--vocab_size=19')
    assert call(export.main, '--to=safetensors', '--save_dir=mine').code == 0
    for source in (['--init_from=out'], ['--init_from=mine',
                                         '--batch_size=4'], ['--init_from=resume']):
        result = call(bench.main, *source, *decode)
        assert json.loads(result.out.splitlines()[-1])['header'].startswith(
            '3 layers, 2 heads, width 24, vocabulary 19, context 16, batch 4, '), result.err


def test_bench_leaves_out_scopes_that_truncate_nothing(results):
    rows = [f'{method}, {scope}' for scope in ('sequence', 'weight') for method in METHODS]
    assert {*results('--svd_rank=2', '--svd_block=16')['results']} == {*rows, 'optimizer left out'}
    assert {*results()['results']} == {'optimizer left out'}
    for row, *options in (('MLA', '--use_mla=True', '--mla_latent_dim=[3]'),
                          ('narrow heads', '--v_head_dim=[3]')):    # which refuse an SVD
        assert {*results('--svd_rank=2', *options)['results']} == {row, 'optimizer left out'}


@pytest.mark.parametrize('option, words', [('--decode --peer=nowhere', 'peer='),
                                           ('--decode --pairs=1', 'nearest: 2'),
                                           ('--decode --svd_rank=0', 'nearest: 1'),
                                           ('--decode --tokens=1', 'nearest: 2'),
                                           ('--decode --contexts=3,x', "contexts='3,x'"),
                                           ('--decode --contexts=14', '= 12'),
                                           ('--decode --contexts=0', "contexts='0'"),
                                           ('--decode --contexts=', 'contexts='),
                                           ('--decode --tokens=16', 'block_size - tokens = 0')])
def test_bench_refuses_what_cannot_be(here, refused, option, words):
    assert words in refused(bench.main, *BENCH, '--tokens=4', *option.split())

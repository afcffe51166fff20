"""
Time whole training steps, paired: this repo's model without SVD against every SVD method and scope, against
multi-head latent attention if the configuration has it, and against another checkout's model.py. Or time decoding. Or
measure what every SVD method costs and how good it is.

    python bench.py config/train_svd_test.py                     # the main job's model
    python bench.py config/train_svd_test.py --peer=../nanoGPT   # also against nanoGPT's GPT and its optimizer
    python bench.py config/train_svd_test.py --decode            # tokens/s and cache bytes; takes --peer, too
    python bench.py config/train_mla_test.py --decode            # MLA against ordinary attention; FLOPs without the SVD
    python bench.py config/train_svd_test.py --svd --plot        # every SVD method: time, memory, error, a figure
    python bench.py --help

A step is forward, backward, clipping and the optimizer, on random tokens of the data set's vocabulary. Decoding is
greedy, batch_size prompts of random tokens at a time; its prefill is timed apart. What is compared takes turns, in
alternating order, so that a drifting machine slows all. --svd measures on V of OUT_DIR/ckpt.pt, if a run of the
configuration's shape is there, and on synthetic spectra; svd_benchmark.py says what each figure is. The last line is
JSON.
"""

import importlib.util
import json
import re
import statistics
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

from runtime import cli                                            # before torch: says what is not installed

import torch

from tools import svd_benchmark
from model import ADAPTER_DEFAULTS, GPT, METHODS, SCOPES
from runtime import checkpoint as ckpt
from runtime import config as configuration
from runtime import device as devices
from runtime import huggingface
from runtime.config import PATH, SWITCH, Range, UserError
from runtime.data import LARGE, Dataset, locate
from tools.timing import generation, paired_benchmark, quartiles, interleave, time_it
from tools.step_benchmark import model_config, new_model, random_tokens, step_of
from train import RUN_LOCAL_FIELDS, TrainConfig, new_state, train_step


DENSE = dict(use_svd=False, use_mla=False, layer_ranks=None, **ADAPTER_DEFAULTS)     # what all is compared with


@dataclass
class BenchConfig(TrainConfig):
    """train.py's options, of which the model's, the batch's and the optimizer's matter here."""
    check: Annotated[bool, 'gone: python -m pytest --device=cuda is the self-test of a device', SWITCH] = False
    decode: Annotated[bool, 'time decoding instead of training steps', SWITCH] = False
    contexts: Annotated[str | None, "--decode: prompt lengths, as '16,128'; None: 3, 6, 14 16ths of block_size"] = None
    tokens: Annotated[int | None, '--decode: tokens after each prompt, a sixteenth where nothing is cached; None: 32, '
                      'at most half of block_size', Range(2)] = None
    svd: Annotated[bool, 'cost and quality of every SVD method, side by side', SWITCH] = False
    plot: Annotated[bool | str, "--svd: a figure of error against time, as --plot=FILE.png or in bench-svd.png",
                    SWITCH, PATH] = False
    steps: Annotated[bool | Literal['auto'], "--svd: time whole training steps, too; 'auto': where they take at most "
                     '10 minutes'] = 'auto'
    pairs: Annotated[int, 'timed pairs a comparison, or rounds', Range(2)] = 30
    peer: Annotated[str | None, 'folder with another model.py (nanoGPT) to time against', PATH] = None

    def __post_init__(self):
        super().__post_init__()
        self.check_layers()                                         # no weights are read that would know better
        if self.check:
            kind = devices.pick_device(self.device).partition(':')[0]
            raise ValueError('check=True: the self-test is a part of the tests (nearest: python -m pytest '
                             f'--device={kind})')
        if self.tokens is None:
            self.tokens = max(2, min(32, self.block_size // 2))
        if self.svd:
            self._check_svd()
        if self.decode:
            self.lengths()
        if self.plot is not False:
            self._check_plot()
        if self.steps != 'auto' and not self.svd:
            raise ValueError(f'steps={self.steps}: only with --svd')
        if self.peer and not (Path(self.peer) / 'model.py').is_file():
            raise ValueError(f'peer={self.peer!r}: has no model.py')

    def _check_svd(self):
        other = next((name for name in ('decode', 'peer') if getattr(self, name)), None)
        if other:
            raise ValueError(f'{other}={getattr(self, other)!r}: not together with --svd')
        full = min(self.block_size, self.n_embd // self.n_head)
        if full < 2:
            raise ValueError(f'svd_rank={self.svd_rank}: a side of V is {full}, and --svd needs one of 2 or more')
        if self.svd_rank is None or self.svd_rank >= full:
            why = 'needs a rank' if self.svd_rank is None else 'at full rank nothing is cut'
            raise ValueError(f'svd_rank={self.svd_rank}: --svd: {why} (valid: 1 to {full - 1})')

    def _check_plot(self):
        if not self.svd:
            raise ValueError(f'plot={self.plot!r}: only with --svd')
        path = self.plot_path()
        if not path.lower().endswith('.png'):
            raise ValueError(f"plot={self.plot!r}: must be the name of a PNG (nearest: '{path}.png')")
        if not Path(path).parent.is_dir() or Path(path).is_dir():
            raise ValueError(f'plot={self.plot!r}: must be a file in a folder that exists')

    def plot_path(self):
        """The figure's file, None: no figure."""
        return {True: 'bench-svd.png', False: None}.get(self.plot, self.plot)

    def lengths(self):
        """`contexts` as a list of int."""
        most = self.block_size - self.tokens                        # beyond that the window slides: not this table's
        if most < 1:
            raise ValueError(f'tokens={self.tokens}: leave no room for a prompt in block_size={self.block_size} '
                             f'(nearest: {max(2, self.block_size - 1)})')
        # within the spans of 'causal' scope; at their edges a basis is due, which lasts for as many tokens again
        usual = ','.join(str(min(most, self.block_size * sixteenths // 16)) for sixteenths in (3, 6, 14))
        words = (usual if self.contexts is None else self.contexts).split(',')
        if not all(re.fullmatch('[1-9][0-9]{0,8}', word) and int(word) <= most for word in words):
            raise ValueError(f"contexts={','.join(words)!r}: must be whole numbers, like '16,128', of at most "
                             f'block_size - tokens = {most}')
        return [int(word) for word in words]


def main(argv=None):
    """-> exit code: 0 done, 2 wrong input (one line on stderr), 130 / 143 stopped."""
    return cli.run('bench.py', BenchConfig, __doc__, bench, argv, load_config)


def load_config(argv):
    """argv -> configuration. What it leaves open is as in the run, folder or GPT-2 of init_from, and in lora_adapter.
    Only shapes are taken from there: times do not depend on weights."""
    values, set_by = configuration.parse(BenchConfig, argv)
    where, theirs = values['init_from'], {}
    if where == 'resume' or huggingface.is_run(where):
        saved = ckpt.load(Path(values['out_dir'] if where == 'resume' else where) / 'ckpt.pt')
        theirs = {k: v for k, v in saved.get('config', {}).items() if k not in RUN_LOCAL_FIELDS} | saved['model_args']
    elif where != 'scratch':
        theirs = asdict(GPT.from_pretrained(where).config)
    if values['lora_adapter'] is not None:
        theirs |= huggingface.read_adapter(values['lora_adapter'])[0]
    values, set_by = configuration.parse(BenchConfig, argv, configuration.check_all(BenchConfig, theirs, where))
    return configuration.build(BenchConfig, values, set_by, otherwise=where if theirs else 'default')


def bench(cfg):
    """-> exit code."""
    device = devices.pick_device(cfg.device)
    if cfg.vocab_size is None:                                      # what takes hours to prepare is BPE
        cfg.vocab_size = 50304 if cfg.dataset in LARGE else Dataset(
            locate(cfg.dataset, cfg.tokenizer)).padded_vocab_size
    if cfg.svd:
        return svd_benchmark.run(cfg, device, step_of)
    return (bench_decoding if cfg.decode else bench_steps)(cfg, device)


def header(cfg, device):
    """All that shapes the times: sizes, the model's options that are not at their defaults, and the machine."""
    c, dtype, on_cpu = model_config(cfg), devices.pick_dtype(cfg.dtype, device), torch.device(device).type == 'cpu'
    sizes = (f'{c.n_layer} layers, {c.n_head} heads, {c.n_embd} wide, vocabulary {c.vocab_size}, context '
             f'{c.block_size}, batch {cfg.batch_size}')
    options = [f'{f.name}={getattr(c, f.name)!r}' for f in fields(c) if getattr(c, f.name) != f.default
               and f.name not in ('n_layer', 'n_head', 'n_embd', 'vocab_size', 'block_size')]
    name = torch.backends.cpu.get_cpu_capability() if on_cpu else devices.environment(device, dtype)['device_name']
    return ', '.join([sizes, *options, f'{cfg.optimizer}, {dtype}, {device} ({name}), {torch.get_num_threads()} '
                      f'threads, torch {torch.__version__}'])


def truncating_scopes(cfg):
    """The scopes in which cfg.svd_rank changes anything; says which it does not."""
    if cfg.svd_rank is None:
        return []
    idle = {scope: model_config(cfg, use_svd=True, svd_scope=scope).svd_off for scope in SCOPES}
    for scope in filter(idle.get, SCOPES):
        print(f'{scope!r} is left out: SVD on V {idle[scope]}')
    return [scope for scope in SCOPES if not idle[scope]]


def bench_steps(cfg, device):
    """Print a table of step times and ratios, then the same as one line of JSON."""
    words, scopes = header(cfg, device), truncating_scopes(cfg)
    if not scopes and len(kinds(cfg)) == 1 and not cfg.peer:
        raise UserError(f'svd_rank={cfg.svd_rank}: of an ordinary model there is nothing to compare (nearest: '
                        f'--svd_rank={max(1, cfg.n_embd // cfg.n_head // 2)})')
    print(f'{words}; {cfg.pairs} pairs')
    baseline = step_of(cfg, device, **DENSE)
    results = {}
    for name, kind in list(kinds(cfg).items())[1:]:
        results[name] = compare(name, step_of(cfg, device, use_svd=False, **kind), baseline, cfg.pairs, device,
                                'baseline')
    for scope, method in ((s, m) for s in scopes for m in METHODS):
        name = ', '.join(filter(None, (f'{method}, {scope}', [*kinds(cfg)][-1])))               # with all else of cfg
        step = step_of(cfg, device, use_svd=True, svd_method=method, svd_scope=scope)       # one at a time: memory
        results[name] = compare(name, step, baseline, cfg.pairs, device, 'baseline')
    if cfg.peer:
        cfg.optimizer = 'adamw'                                     # the peer has no other
        results['peer'] = compare('this repo without SVD, AdamW', step_of(cfg, device, **DENSE),
                                  peer_step(cfg, device), cfg.pairs, device, 'peer')
    print(json.dumps({'header': words, 'device': device, 'torch': torch.__version__, 'pairs': cfg.pairs,
                      'seed': cfg.seed, 'results': results}))


@torch.no_grad()
def bench_decoding(cfg, device):
    """Print tokens/s and cache bytes at several context lengths, then the same as one line of JSON."""
    words, models = header(cfg, device), decoding_models(cfg, device)
    peer = peer_model(cfg, device).eval() if cfg.peer else None
    print(f'{words}; {cfg.tokens} tokens ({uncached_tokens(cfg)} where nothing is cached), {cfg.pairs} rounds')
    results = []
    for length in cfg.lengths():
        print(f'after {length} tokens:')
        generator = torch.Generator().manual_seed(cfg.seed)
        prompt = torch.randint(cfg.vocab_size, (cfg.batch_size, length), generator=generator).to(device)
        with devices.autocast(device, devices.pick_dtype(cfg.dtype, device)):
            rounds = interleave(decoding_runs(cfg, models, peer, prompt, device), cfg.pairs)
            for name, times in rounds.items():
                costs = decoding_costs(models.get(name), cfg.batch_size, length, cfg.tokens)
                results.append({'context': length} | decoding_row(name, times, rounds['no SVD'], cfg.batch_size, costs))
    print(json.dumps({'header': words, 'device': device, 'torch': torch.__version__, 'rounds': cfg.pairs,
                      'seed': cfg.seed, 'batch': cfg.batch_size, 'tokens': cfg.tokens,
                      'tokens_uncached': uncached_tokens(cfg), 'results': results}))


def kinds(cfg):
    """Name -> changes of the configuration: the ordinary model, and what cfg has beyond it, one thing after another."""
    changes = {key: value for key, value in DENSE.items() if key != 'use_svd'}
    found, words = {'': changes}, []
    for word, asked, own in (('MLA', cfg.use_mla, ['use_mla']), ('low-rank', cfg.layer_ranks, ['layer_ranks']),
                             ('LoRA' if cfg.lora_rank is not None else 'adaptive SVD',
                              cfg.adaptive_svd or cfg.lora_rank is not None, ADAPTER_DEFAULTS)):
        changes = {key: value for key, value in changes.items() if key not in own}
        if asked:
            words.append(word)
            found[', '.join(words)] = changes
    return found


def uncached_tokens(cfg):
    return max(1, cfg.tokens // 16)                                 # recomputing the prefix takes its time


def decoding_models(cfg, device):
    """Name -> model: without SVD, and with the same weights every scope at cfg.svd_rank; then all that of the other
    kinds."""
    variants, scopes = {}, truncating_scopes(cfg)
    for kind, changes in kinds(cfg).items():
        variants[kind or 'no SVD'] = dict(use_svd=False, **changes)
        variants |= {f'{kind} {scope!r}'.strip(): dict(use_svd=True, svd_scope=scope, **changes) for scope in scopes}
    return {name: new_model(cfg, device, **changes).eval() for name, changes in variants.items()}


def decoding_runs(cfg, models, peer, prompt, device):
    """Name -> function that continues prompt (B, T) -> seconds for the prefill, seconds a token after it."""
    few = uncached_tokens(cfg)

    def continues(model):
        return generation(model, prompt, 1 + few if model.config.is_noncausal else cfg.tokens, device)

    def forwards():
        return 0.0, time_it(lambda: [models['no SVD'](prompt[:, :1]) for _ in range(cfg.tokens)], device) / cfg.tokens

    runs = {name: lambda model=model: continues(model) for name, model in models.items()}
    runs['bare one-token forward'] = forwards
    if peer:
        runs['peer'] = lambda: (0.0, time_it(lambda: peer.generate(prompt, few, top_k=1), device) / few)
    return runs


def decoding_costs(model, batch, length, tokens):
    """What a model says of itself, for the last of `tokens` tokens after a prompt of `length`; model None: nothing."""
    if model is None:
        return dict.fromkeys(('cache_bytes', 'prefill_flops', 'decode_flops'))
    before = length + tokens - 2
    again = model.config.is_noncausal                            # the whole prefix, for each token
    return {'cache_bytes': model.kv_cache_bytes(batch, before + 1), 'prefill_flops': model.flops_per_token(length),
            'decode_flops': model.flops_per_token(before + 1) * (before + 1) if again else
            model.flops_per_token(before, decode=True)}


def decoding_row(name, times, baseline, batch, costs):
    """Print what rounds of (prefill, a token) seconds come to -> row of the JSON. costs: of `decoding_costs`."""
    prefill, a_token = (statistics.median(column) for column in zip(*times))
    low, ratio, high = quartiles([b[1] / own[1] for own, b in zip(times, baseline)])
    words = f'  {name:22} {batch / a_token:10.1f} tokens/s, {ratio:.3g} of no SVD ({low:.3g} to {high:.3g})'
    if costs['cache_bytes'] is not None:
        words += (f', prefill {prefill:.3f} s, cache {costs["cache_bytes"] / 1e6:.2f} MB, MFLOP a token '
                  f'{costs["prefill_flops"] / 1e6:.3g} in prefill, {costs["decode_flops"] / 1e6:.3g} after it')
    print(words, flush=True)
    return {'name': name, 'tokens_per_s': batch / a_token, 'rate_over_no_svd': ratio, 'quartiles': [low, high],
            'prefill_s': prefill} | costs


def peer_model(cfg, device):
    """The GPT in PEER/model.py, with nanoGPT's constructor."""
    spec = importlib.util.spec_from_file_location('peer_model', Path(cfg.peer) / 'model.py')
    peer = importlib.util.module_from_spec(spec)
    sys.modules['peer_model'] = peer                                # dataclasses look their module up
    spec.loader.exec_module(peer)
    keys = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias')
    return peer.GPT(peer.GPTConfig(**{k: getattr(cfg, k) for k in keys})).to(device)


def peer_step(cfg, device):
    """One step of it, with nanoGPT's configure_optimizers, on the tokens of `step_of`."""
    model = peer_model(cfg, device)
    optimizer = model.configure_optimizers(cfg.weight_decay, cfg.learning_rate, (cfg.beta1, cfg.beta2),
                                           torch.device(device).type)
    state = replace(new_state(cfg, new_model(cfg, device, **DENSE), device), model=model, replica=model,
                    optimizer=optimizer)
    batches = [random_tokens(cfg, device)]
    return lambda: train_step(state, batches)


def compare(name, a, b, pairs, device, b_name):
    """`paired`, and a line about it."""
    row = paired_benchmark(a, b, pairs, device)
    low, high = row['ratio_quartiles']
    print(f'{name:32} {row["a_ms"]:8.1f} ms   {b_name} {row["b_ms"]:8.1f} ms   ratio {row["ratio"]:.3f} (quartiles '
          f'{low:.3f} to {high:.3f})')
    return row


if __name__ == '__main__':
    sys.exit(main())

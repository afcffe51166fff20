"""Time training steps and decoding of a configuration's models.

The baseline is the same model without SVD, MLA, grouped or narrower heads, low-rank layers and
adapters. A peer can be timed
too: the model.py of another checkout.
"""

import importlib.util
import json
import statistics
import sys
from dataclasses import fields, replace
from functools import partial
from itertools import product
from pathlib import Path

import torch

from model import ADAPTER_DEFAULTS, GPT, METHODS, SCOPES, GPTConfig
from runtime import device as devices
from runtime.config import UserError
from runtime.evaluation import FINAL_GAP_POSITIONS, GAP_POSITIONS
from tools.timing import (generation, interleave, paired_benchmark, print_line, quartiles,
                          time_it)
from train import new_state, train_step

# options of the baseline, besides use_svd=False
DENSE = dict(use_mla=False, n_kv_head=None, qk_head_dim=None, v_head_dim=None, mlp_dim=None,
             layer_ranks=None, **ADAPTER_DEFAULTS)
SIZES = ('n_layer', 'n_head', 'n_embd', 'vocab_size', 'block_size')


# --------------------------------------------------------------------------------------------------
# models and steps of a configuration

def model_config(cfg, **changes):
    """Return the GPTConfig of a configuration with these changes."""
    return GPTConfig(**{f.name: getattr(cfg, f.name) for f in fields(GPTConfig)} | changes)


def new_model(cfg, device, **changes):
    """Return a new model of a configuration with these changes; cfg.seed draws its weights."""
    torch.manual_seed(cfg.seed)
    return GPT(model_config(cfg, **changes)).to(device)


def random_tokens(cfg, device):
    """Return random token ids x and y, both (B, T)."""
    generator = torch.Generator().manual_seed(cfg.seed)
    shape = cfg.batch_size, cfg.block_size
    return [torch.randint(cfg.vocab_size, shape, generator=generator).to(device) for _ in range(2)]


def step_of(cfg, device, peer=None, trains=True, **changes):
    """Return a function that runs one training step of a new model on random tokens.

    peer: a model with nanoGPT's configure_optimizers, to train in place of a new model; trains:
    whether the optimizer updates the weights; changes: options of the configuration with their new
    values.
    """
    model = new_model(cfg, device, **changes)
    state = new_state(replace(cfg, compile=False, **changes), model, device)
    if peer is not None:
        state.model = state.replica = peer
        state.optimizer = peer.configure_optimizers(
            cfg.weight_decay, cfg.learning_rate, (cfg.beta1, cfg.beta2), torch.device(device).type)
    if not trains:
        state.optimizer.step = lambda: None
    return partial(train_step, state, [random_tokens(cfg, device)])


def peer_model(cfg, device):
    """Return a GPT from PEER/model.py, which must have nanoGPT's constructor."""
    spec = importlib.util.spec_from_file_location('peer_model', Path(cfg.peer) / 'model.py')
    peer = importlib.util.module_from_spec(spec)
    sys.modules['peer_model'] = peer                                # dataclasses look it up
    spec.loader.exec_module(peer)
    keys = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias')
    return peer.GPT(peer.GPTConfig(**{key: getattr(cfg, key) for key in keys})).to(device)


def run_seconds(cfg, data, device):
    """Estimate the seconds that a run of train.py takes, from the median of five steps. A batch of
    an evaluation counts as a third of a step, because an evaluation has no backward pass."""
    step = step_of(cfg, device)
    step()
    _, seconds, _ = quartiles([time_it(step, device) for _ in range(5)])
    evaluations = cfg.max_iters // cfg.eval_interval + 1
    windows = evaluations * 2 * cfg.eval_iters * cfg.batch_size
    windows += len(data.tokens('val')) / cfg.block_size
    # a measured token costs a window and, on average, half a window for its prefix
    if cfg.is_noncausal:
        windows += 1.5 * (evaluations * GAP_POSITIONS + FINAL_GAP_POSITIONS)
    steps = cfg.max_iters * cfg.gradient_accumulation_steps + windows / cfg.batch_size / 3
    return seconds * steps


# --------------------------------------------------------------------------------------------------
# what is compared

def kind_of(cfg):
    """Return what the model has besides the SVD on V, such as 'MLA' or 'MLA, low-rank', or ''."""
    parts = {'MLA': cfg.use_mla, 'grouped heads': cfg.is_grouped,
             'narrow heads': cfg.qk_head_dim or cfg.v_head_dim, 'fewer neurons': cfg.mlp_dim,
             'low-rank': cfg.layer_ranks, 'adaptive SVD': cfg.adaptive_svd, 'LoRA': cfg.lora_rank}
    return ', '.join(name for name, present in parts.items() if present)


def truncating_scopes(cfg):
    """Return the scopes in which the SVD truncates, and print why others are left out."""
    # cannot be combined with an SVD
    if cfg.qk_head_dim or cfg.v_head_dim or cfg.use_mla and isinstance(cfg.mla_latent_dim, list):
        return []
    off = {scope: model_config(cfg, use_svd=True, svd_scope=scope).svd_off for scope in SCOPES}
    scopes = [scope for scope in SCOPES if not off[scope]]
    if cfg.svd_rank is not None:
        for scope in filter(off.get, SCOPES):
            print(f'{scope!r} scope is left out because SVD on {cfg.svd_names} is {off[scope]}')
    return scopes


def header(cfg, device):
    """Return the sizes, the options that are not the default, and the machine, as text."""
    c, dtype = model_config(cfg), devices.pick_dtype(cfg.dtype, device)
    options = ''.join(f'{f.name}={getattr(c, f.name)!r}, ' for f in fields(c)
                      if getattr(c, f.name) != f.default and f.name not in SIZES)
    machine = (torch.cuda.get_device_name(device) if torch.device(device).type == 'cuda' else
               torch.backends.cpu.get_cpu_capability())
    return (f'{c.n_layer} layers, {c.n_head} heads, width {c.n_embd}, vocabulary {c.vocab_size}, '
            f'context {c.block_size}, batch {cfg.batch_size}, {options}'
            f'{cfg.optimizer}, {dtype}, {device} ({machine}), {torch.get_num_threads()} threads, '
            f'torch {torch.__version__}')


# --------------------------------------------------------------------------------------------------
# training steps

def steps(cfg, device):
    """Print times of training steps and their ratios to the baseline, then one line of JSON."""
    kind, results = kind_of(cfg), {}
    changes = {kind: dict(use_svd=False)} if kind else {}
    scopes = truncating_scopes(cfg)
    for scope, method in product(scopes, METHODS):
        changes[', '.join(filter(None, (method, scope, kind)))] = dict(
            use_svd=True, svd_method=method, svd_scope=scope)
    words = header(cfg, device)
    print(f'{words}; {cfg.pairs} pairs')
    print_line('', ('ms', 'baseline ms', 'ratio', 'quartiles', ''))

    def compare(name, a, b):
        results[name] = row = paired_benchmark(a, b, cfg.pairs, device)
        print_line(name, (row['a_ms'], row['b_ms'], row['ratio'], *row['ratio_quartiles']))

    baseline = step_of(cfg, device, use_svd=False, **DENSE)
    compare('optimizer left out', step_of(cfg, device, trains=False, use_svd=False, **DENSE),
            baseline)
    for name, change in changes.items():                            # one at a time to save memory
        compare(name, step_of(cfg, device, **change), baseline)
    if cfg.peer:
        cfg.optimizer = 'adamw'                                     # the peer's only optimizer
        baseline = step_of(cfg, device, use_svd=False, **DENSE)
        peer = step_of(cfg, device, peer=peer_model(cfg, device), use_svd=False, **DENSE)
        print('this repo without SVD (ms) against the peer (baseline ms), both with AdamW')
        compare('peer', baseline, peer)
    print(json.dumps({'header': words, 'device': device, 'torch': torch.__version__,
                      'pairs': cfg.pairs, 'seed': cfg.seed, 'results': results}))


# --------------------------------------------------------------------------------------------------
# decoding

@torch.no_grad()
def decoding(cfg, device):
    """Print tokens/s, cache bytes and FLOPs at several context lengths, then one line of JSON."""
    lengths, scopes = context_lengths(cfg), truncating_scopes(cfg)
    words, models = header(cfg, device), {}
    for kind, changes in {'': DENSE, kind_of(cfg): {}}.items():
        models[kind or 'no SVD'] = new_model(cfg, device, use_svd=False, **changes).eval()
        for scope in scopes:
            models[f'{kind} {scope!r}'.strip()] = new_model(cfg, device, use_svd=True,
                                                            svd_scope=scope, **changes).eval()
    few = max(1, cfg.tokens // 16)                                  # slow without a cache
    runs = {name: partial(generation, model, device=device,
                          tokens=1 + few if model.config.is_noncausal else cfg.tokens)
            for name, model in models.items()}                      # seconds: prefill, per token
    runs['bare one-token forward'] = lambda prompt: (0.0, time_it(
        lambda: models['no SVD'](prompt[:, :1]), device, cfg.tokens))
    if cfg.peer:
        peer = peer_model(cfg, device).eval()
        runs['peer'] = lambda prompt: (
            0.0, time_it(lambda: peer.generate(prompt, few, top_k=1), device) / few)
    print(f'{words}; {cfg.tokens} tokens ({few} without a cache), {cfg.pairs} rounds')
    rows = []
    for length in lengths:
        print_line(f'after {length} tokens', ('tokens/s', 'over no SVD', 'quartiles', '',
                                             'prefill s', 'cache bytes', 'prefill FLOP',
                                             'decode FLOP'))
        prompt = random_tokens(cfg, device)[0][:, :length]
        with devices.autocast(device, devices.pick_dtype(cfg.dtype, device)):
            rounds = interleave({name: partial(run, prompt) for name, run in runs.items()},
                                cfg.pairs)
            for name, times in rounds.items():
                low, ratio, high = quartiles([
                    base / own for (_, own), (_, base) in zip(times, rounds['no SVD'])])
                prefill, per_token = (statistics.median(column) for column in zip(*times))
                row = {'tokens_per_s': cfg.batch_size / per_token, 'rate_over_no_svd': ratio,
                       'quartiles': [low, high], 'prefill_s': prefill,
                       **costs(models.get(name), cfg.batch_size, length, cfg.tokens)}
                rows.append({'context': length, 'name': name, **row})
                rate, ratio, between, *others = row.values()
                print_line(name, (rate, ratio, *between, *others))
    print(json.dumps({'header': words, 'device': device, 'torch': torch.__version__,
                      'rounds': cfg.pairs, 'seed': cfg.seed, 'batch': cfg.batch_size,
                      'tokens': cfg.tokens, 'tokens_uncached': few, 'results': rows}))


def context_lengths(cfg):
    """Return the prompt lengths in cfg.contexts as a list. Raises UserError if one is wrong."""
    most = cfg.block_size - cfg.tokens                              # longer ones crop the context
    if cfg.contexts is None:            # inside blocks of 'causal' scope; a new block takes longer
        lengths = [max(1, min(most, cfg.block_size * part // 16)) for part in (3, 6, 14)]
    else:
        lengths = [int(word) if word.isdecimal() else 0 for word in cfg.contexts.split(',')]
    if not all(1 <= length <= most for length in lengths):
        raise UserError(f"contexts={cfg.contexts!r}: must be whole numbers, such as '16,128', from "
                        f'1 to block_size - tokens = {most} (nearest: None)')
    return lengths


def costs(model, batch, length, tokens):
    """Return cache bytes and FLOPs per token as a dict. If model is None, the values are None.

    The FLOPs of prefill are for a prompt of `length` tokens. `tokens` tokens follow the prompt. The
    cache bytes and the FLOPs of decoding are for the last of these tokens.
    """
    if model is None:
        return dict.fromkeys(('cache_bytes', 'prefill_flops', 'decode_flops'))
    before = length + tokens - 2
    flops = (model.flops_per_token(before + 1) * (before + 1)       # each token repeats its prefix
             if model.config.is_noncausal else model.flops_per_token(before, decode=True))
    return {'cache_bytes': model.kv_cache_bytes(batch, before + 1),
            'prefill_flops': model.flops_per_token(length), 'decode_flops': flops}


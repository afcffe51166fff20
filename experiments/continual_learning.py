"""
Measure whether adaptive SVD protects what a model has learned. A small GPT is trained on text A and
then on text B. Variants are compared by their loss on A at equal loss on B.

    python experiments/continual_learning.py --dataset=input.txt  # run what is missing, draw
    python experiments/continual_learning.py --run=False          # draw what is recorded

Text B is Python, the standard library of the running interpreter. Tokens are characters, and the
vocabulary covers both texts. For each seed one model is trained on A. Every variant then continues
from it on B with the same batches and without weight decay. Variants that train all parameters:

    full training               the reference
    adaptive                    adaptive SVD of the four attention projections in all blocks
    adaptive, no protection     'adaptive' without protection, adaptive_svd_protection='none'
    adaptive, random space      layers switch at the same analyses and to the same ranks as in
                                'adaptive', but random directions are protected
    timer                       all layers switch at the first analysis, without a detector, and 10
                                directions are protected
    timer, random space         'timer' with random directions
    half from the start         half of all directions are protected from the first step on
    half, random space          'half from the start' with random directions

Other variants train only the attention projections: 'all of attention', which is the reference,
LoRA, PiSSA, MiLoRA, and some of the variants above with 'attention' before their names. The
detector, which decides when layers switch to low-rank mode, starts with the SVD of the model that
was trained on A. Therefore it can switch layers at its first analysis on B.

Less forgetting counts only at the same loss on B, so losses on A are interpolated at one loss on B.
The detector is also tested alone, on the model that was trained on A: a ROC curve compares its
scores of gradients on B and on unseen text of A. The baseline, the gradient norm, needs no SVD.

Each line of experiments/continual_learning.jsonl is a finished result. Finished results are not
computed again, so an interrupted run can be continued, and processes can share the work with
--seeds. The figure is docs/adaptive_forgetting.png.
"""

import hashlib
import json
import math
import os
import statistics
import sys
from collections import namedtuple
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from runtime import cli  # before torch: reports missing packages

import numpy as np
import torch

from lowrank.adapters import adaptive_layers
from lowrank.adaptive_layer import AdaptiveSVD, AdaptiveSVDLinear, switch, thin_svd
from lowrank.adaptive_svd import (DANGER_ALIGNMENT, DANGER_EXCESS, FIRST_PRINCIPAL,
                                  compute_gradient_alignment, lift, normalized_alignment,
                                  random_baseline)
from model import GPT, GPTConfig
from runtime import checkpoint as ckpt
from runtime import config as configuration
from runtime import plots
from runtime.config import PATH, Range, UserError
from runtime.data import Dataset, locate
from runtime.optimizer import swap_params
from runtime.files import check_writable, make_folder
from runtime.tracking import read_json_lines
from experiments.result_cache import Record

RECORD = Path(__file__).with_suffix('.jsonl')
FIGURE = ROOT / 'docs' / 'adaptive_forgetting.png'
MODEL = dict(n_layer=4, n_head=4, n_embd=96, block_size=64, bias=False)
BATCH = 8                           # windows per step
LEARN = dict(rate=3e-3, warmup=50, weight_decay=0.1)  # on A: cosine to a tenth of the rate
WARMUP = 10  # steps of warm-up on B; the learning rate is constant afterwards
INTERVAL = 20  # steps between analyses, train.py's default, and between evaluations
TARGETS = 'c_q,c_k,c_v,c_proj'
LORA_RANK = 16
TEXT_B = 10 ** 6                    # characters
EVAL_WINDOWS = 48                   # of each text, the same ones in each evaluation
GRADIENTS = 100                     # batches of each text, for the ROC curve
GRID = 50                           # intervals from 0 to 1 at which ROC curves are saved
SPREAD = (0.4, 0.2, 0.0)  # compared losses on B, above the lowest that all variants reach, nats
SETTINGS = {'everything': 'everything is trained', 'attention': 'only attention is trained'}

# One variant. control says what switches layers: None, 'detector', 'replay' (as in 'adaptive'),
# 'timer' or 'start'; share: protected fraction of the directions, None for FIRST_PRINCIPAL of them
Arm = namedtuple('Arm', 'setting control protection random share lora',
                 defaults=(None, 'left', False, None, None))
ARMS = {
    'full training': Arm('everything'),
    'adaptive': Arm('everything', 'detector'),
    'adaptive, no protection': Arm('everything', 'detector', 'none'),
    'adaptive, random space': Arm('everything', 'replay', random=True),
    'timer': Arm('everything', 'timer'),
    'timer, random space': Arm('everything', 'timer', random=True),
    'half from the start': Arm('everything', 'start', share=0.5),
    'half, random space': Arm('everything', 'start', random=True, share=0.5),
    'all of attention': Arm('attention'),
    'LoRA': Arm('attention', lora='lora'),
    'PiSSA': Arm('attention', lora='pissa'),
    'MiLoRA': Arm('attention', lora='milora'),
    'attention, adaptive': Arm('attention', 'detector'),
    'attention, timer': Arm('attention', 'timer'),
    'attention, half from the start': Arm('attention', 'start', share=0.5),
    'attention, half, random space': Arm('attention', 'start', random=True, share=0.5),
}
REFERENCE = {'everything': 'full training', 'attention': 'all of attention'}
# fewer trained parameters need larger steps
RATES = {'everything': (3e-4, 1e-3, 3e-3), 'attention': (1e-3, 3e-3, 1e-2)}
# numbers of protected directions for ROC curves; protection grows as r shrinks
SPACES = (FIRST_PRINCIPAL, 24, 48)


@dataclass
class ContinualConfig:
    """Options of the experiment."""
    dataset: Annotated[str, 'text A, as for train.py, with characters as tokens; the recorded '
                       'results are of Tiny Shakespeare', PATH] = 'shakespeare_char'
    out_dir: Annotated[str, 'folder of the models that were trained on A', PATH] = 'out-continual'
    seeds: Annotated[str, 'of weights and batches, one run of each variant per seed'] = '0,1,2'
    arms: Annotated[str, "variants: 'all', names separated by semicolons, or 'none' for the ROC "
                    'curve only'] = 'all'
    learn_steps: Annotated[int, 'steps on A', Range(1)] = 1500
    steps: Annotated[int, 'steps on B', Range(1)] = 240
    run: Annotated[bool, 'False: only tables and figure'] = True

    def __post_init__(self):
        configuration.validate(self)
        for word in self.seeds.split(','):
            if not word.strip().isdecimal():
                raise ValueError(f"seeds={self.seeds!r}: {word!r} is not a whole number of 0 or "
                                 "more (nearest: '0,1,2')")
        for word in self.arms.split(';') if self.arms not in ('all', 'none') else ():
            if word.strip() not in ARMS:
                raise ValueError(
                    f'arms={self.arms!r}: {word.strip()!r} is not one of {"; ".join(ARMS)} '
                    '(nearest: all)')

    @property
    def chosen(self):
        """Names of the chosen variants in the order of ARMS: 'adaptive' comes before replays."""
        words = [word.strip() for word in self.arms.split(';')]
        return [name for name in ARMS if name in words or self.arms == 'all']


# --------------------------------------------------------------------------------------------------
# two texts

class Texts:
    """Texts A and B in one vocabulary. `splits`: 'A' or 'B' -> [training, validation] token ids."""

    def __init__(self, data, text_b):
        """data: Dataset of text A; text_b: text B as str. Raises UserError if tokens of `data` are
        not characters, or if a split is shorter than a window."""
        if data.meta['tokenizer'] != 'char':
            raise UserError(f'dataset={data.folder}: tokens are not characters (nearest: '
                            '--dataset=shakespeare_char)')
        own = data.meta['chars']
        self.chars = sorted(set(own) | set(text_b))
        ids = {c: i for i, c in enumerate(self.chars)}
        table = torch.tensor([ids[c] for c in own])
        whole, cut = torch.tensor([ids[c] for c in text_b]), int(0.9 * len(text_b))
        parts = [table[torch.from_numpy(data.tokens(split).astype(np.int64))]
                 for split in ('train', 'val')]
        self.splits = {'A': parts, 'B': [whole[:cut], whole[cut:]]}
        for tokens in (part for parts in self.splits.values() for part in parts):
            if len(tokens) <= MODEL['block_size']:
                raise UserError(
                    f'dataset={data.folder}: a split has only {len(tokens)} characters and needs '
                    f'{MODEL["block_size"] + 1} (nearest: a longer text)')
        digest = hashlib.sha256(''.join(self.chars).encode())
        for parts in self.splits.values():
            digest.update(torch.cat(parts).numpy().tobytes())
        self.stamp = digest.hexdigest()[:8]

    def draw(self, text, split, generator):
        """Return a random batch of windows: x and y (BATCH, T)."""
        tokens = self.splits[text][split == 'val']
        return windows(tokens, torch.randint(len(tokens) - MODEL['block_size'], (BATCH,),
                                             generator=generator))

    def fixed(self, text):
        """Return x and y (EVAL_WINDOWS, T) of validation windows, spread evenly over the split."""
        tokens = self.splits[text][1]
        return windows(tokens, torch.linspace(0, len(tokens) - MODEL['block_size'] - 1,
                                              EVAL_WINDOWS).long())


def windows(tokens, starts):
    rows = tokens[starts[:, None] + torch.arange(MODEL['block_size'] + 1)]  # (B, T + 1)
    return rows[:, :-1], rows[:, 1:]


def python_source(size):
    """Return the first `size` ASCII characters of the standard library's files, sorted by name."""
    folder, found, length = Path(os.__file__).parent, [], 0
    for path in sorted(folder.glob('*.py')):
        text = path.read_bytes().replace(b'\r\n', b'\n').decode('ascii', 'ignore')
        found.append(text)
        length += len(text)
        if length >= size:
            break
    return ''.join(found)[:size]


# --------------------------------------------------------------------------------------------------
# variants

class RandomlyProtected(AdaptiveSVDLinear):
    """Adaptive layer that protects random output directions instead of the principal ones."""

    def __init__(self, linear, protection, seed):
        super().__init__(linear, protection)
        m = len(linear.weight)
        normal = torch.randn(m, m, generator=torch.Generator().manual_seed(seed),
                             dtype=torch.float64)
        self.directions = torch.linalg.qr(normal).Q  # (m, m), of which the first k are protected

    def switch_to_lowrank(self, r, usv=None):
        """Split W into the protected Q Q^T W and B A, the r leading components of the rest."""
        W = self.merged_weight()                                    # (m, n)
        Q = self.directions[:, :min(W.shape) - r]                   # (m, k)
        U, S, Vh = torch.linalg.svd(W - Q @ (Q.mT @ W))
        # the base class uses only the largest of the first k singular values, as a scale, and none
        # of the first k columns of V, so that these need not belong to Q
        super().switch_to_lowrank(r, (torch.cat((Q, U[:, :r]), 1),
                                      torch.cat((S[:1].expand(Q.size(1)), S[:r])),
                                      torch.cat((Vh[:Q.size(1)], Vh[:r])).mT))


class Planned(AdaptiveSVD):
    """Controller that switches layers by a plan instead of a detector. plan(name, analysis) returns
    r, or 0 for full mode. Analyses are counted from 0."""

    def __init__(self, layers, interval, plan):
        super().__init__(layers, interval)
        self.plan, self.count = plan, 0

    @torch.no_grad()
    def analyze(self, step, swap_params, **others):
        for name, layer in self.layers.items():
            r = self.plan(name, self.count)
            if r:
                switch(layer, r, swap_params)
            elif layer.r is not None:
                switch(layer, None, swap_params)
            layer.track_weight_grad(False)
            if layer.r is not None:
                layer.base.weight.grad = None
        self.count += 1

    def project_factors(self):
        for layer in self.layers.values():
            layer.project_factors()


def layer_names(model):
    """Return the names of the four attention projections in all blocks."""
    words = TARGETS.split(',')
    return [f'h.{i}.{model.config.targets[word]}'
            for i in range(model.config.n_layer) for word in words]


def prepare(saved, arm, seed, plan):
    """Prepare the model that was trained on A for a variant.

    saved: checkpoint of that model; arm: the variant; plan: for `Planned`, used by 'replay'.
    Returns the model and the AdaptiveSVD that switches the model's layers. The AdaptiveSVD may be
    None.
    """
    model = GPT.from_checkpoint(saved)
    if arm.lora:
        torch.manual_seed(seed)
        model.add_adapters(lora_rank=LORA_RANK, lora_targets=TARGETS, lora_init=arm.lora)
        return model, None
    names = layer_names(model)
    if arm.setting == 'attention':
        model.requires_grad_(False)
        for name in names:
            model.get_layer(name).requires_grad_(True)
    if not arm.control:
        return model, None
    for i, name in enumerate(names):
        layer = model.get_layer(name)
        model.set_layer(name, RandomlyProtected(layer, arm.protection, 1000 * seed + i)
                        if arm.random else AdaptiveSVDLinear(layer, arm.protection))
    layers, width = adaptive_layers(model), model.config.n_embd
    k = FIRST_PRINCIPAL if arm.share is None else round(arm.share * width)
    if arm.control == 'detector':
        control = AdaptiveSVD(layers, INTERVAL)
        bases = {name: thin_svd(layer.weight) for name, layer in layers.items()}
        control.load_state_dict({name: dict(U=U.float(), S=S.float(), r=None, patience=0, calm=0)
                                 for name, (U, S, _) in bases.items()})
        return model, control
    return model, Planned(layers, INTERVAL,
                          plan if arm.control == 'replay' else lambda name, count: width - k)


def losses(model, fixed):
    """Return the losses on A and on B, in nats per character. fixed: text -> x, y."""
    model.eval()
    with torch.no_grad():
        found = [model(*fixed[text])[1].item() for text in 'AB']
    model.train()
    return found


def go_on(model, control, at_once, texts, seed, rate, steps):
    """Train a model on B, in place.

    control: an AdaptiveSVD or None; at_once: whether to analyze before the first step. Returns the
    curve and the ranks. The curve is a list of [step, loss on A, loss on B] every INTERVAL steps.
    The ranks are name of an adaptive layer -> r after each analysis, 0 in full mode.
    """
    optimizer = model.configure_optimizers(0.0, rate, (0.9, 0.95), 'cpu')
    swap, order = (
        partial(swap_params, optimizer, model), torch.Generator().manual_seed(10 ** 6 + seed))
    fixed = {text: texts.fixed(text) for text in 'AB'}
    curve, ranks = (
        [[0, *losses(model, fixed)]], {name: [] for name in (control.layers if control else ())})
    model.train()

    def note():
        for name in ranks:
            ranks[name].append(control.layers[name].r or 0)
    if control and at_once:
        control.analyze(0, swap_params=swap)
        note()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group['lr'] = rate * min(1.0, step / WARMUP)
        analysed = control is not None and control.is_analysis_step(step)
        if analysed:
            control.track_weight_grads()
        model(*texts.draw('B', 'train', order))[1].backward()
        if analysed:
            control.analyze(step, swap_params=swap)
            note()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        if control:
            control.project_factors()
        optimizer.zero_grad()
        if step % INTERVAL == 0 or step == steps:
            curve.append([step, *losses(model, fixed)])
    return curve, ranks


def learned(cfg, texts, seed):
    """Return the checkpoint of a model trained on A. If the model is not in out_dir yet, train
    it."""
    shape = MODEL | dict(vocab_size=len(texts.chars))
    setup = hashlib.sha256(
        json.dumps([shape, BATCH, LEARN, cfg.learn_steps, texts.stamp]).encode()).hexdigest()[:8]
    path = Path(cfg.out_dir) / f'A-{setup}-{seed}.pt'
    if not path.exists():
        torch.manual_seed(seed)
        model, order = GPT(GPTConfig(**shape)), torch.Generator().manual_seed(seed)
        optimizer = model.configure_optimizers(LEARN['weight_decay'], LEARN['rate'], (0.9, 0.95),
                                               'cpu')
        for step in range(cfg.learn_steps):
            warm, part = min(1.0, (step + 1) / LEARN['warmup']), step / cfg.learn_steps
            for group in optimizer.param_groups:
                group['lr'] = LEARN['rate'] * warm * (0.55 + 0.45 * math.cos(math.pi * part))
            model(*texts.draw('A', 'train', order))[1].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        ckpt.save(dict(model=model.state_dict(), model_args=asdict(model.config),
                       iter_num=cfg.learn_steps), path)
        print(f'seed {seed}: trained on A', flush=True)
    return ckpt.load(path)


# --------------------------------------------------------------------------------------------------
# the detector alone

def auc(positive, negative):
    """Return the area under the ROC curve of the scores `positive` (p) and `negative` (n). The area
    is the probability that a positive score is above a negative score. Ties count half."""
    negative = negative.sort().values
    below = torch.searchsorted(negative, positive)                  # (p): how many are smaller
    up_to = torch.searchsorted(negative, positive, right=True)
    return ((below + up_to).double().mean() / (2 * len(negative))).item()


def roc(positive, negative):
    """Return the true-positive rates at the false-positive rates 0, 1 / GRID, ..., 1. The ROC curve
    is interpolated linearly between its corners."""
    thresholds = torch.cat((positive, negative)).unique().flip(0)
    false, true = ([0.0] + [(scores >= t).double().mean().item() for t in thresholds]
                   for scores in (negative, positive))
    grid, found = np.linspace(0, 1, GRID + 1), []
    for x in grid:
        above = next(i for i, f in enumerate(false) if f > x or i == len(false) - 1)
        if false[above] <= x or false[above] == false[above - 1]:
            found.append(true[above])
        else:
            part = (x - false[above - 1]) / (false[above] - false[above - 1])
            found.append(true[above - 1] + part * (true[above] - true[above - 1]))
    return [round(one, 4) for one in found]


def gradients(model, texts, names, seed):
    """Return alignments (spaces, layers, batches) and norms (layers, batches) of gradients.

    The result is a dict with the keys 'A', for the validation split of A, and 'B', for the training
    split of B. Alignment is the fraction of the gradient's energy in the principal directions.
    """
    layers = [model.get_layer(name) for name in names]
    bases, order = [thin_svd(layer.weight) for layer in layers], torch.Generator().manual_seed(seed)
    found = {}
    for text, split in (('A', 'val'), ('B', 'train')):
        principal = torch.zeros(len(SPACES), len(layers), GRADIENTS, dtype=torch.float64)
        norms = torch.zeros(len(layers), GRADIENTS, dtype=torch.float64)
        for batch in range(GRADIENTS):
            model.zero_grad()
            model(*texts.draw(text, split, order))[1].backward()
            for i, (layer, (U, S, _)) in enumerate(zip(layers, bases)):
                norms[i, batch] = layer.weight.grad.norm()
                for j, k in enumerate(SPACES):
                    principal[j, i, batch] = compute_gradient_alignment(
                        layer.weight.grad, U, S, len(S) - k)[0]
        found[text] = principal, norms
    return found


def detection(found, m):
    """Return the fields of a 'roc' row. found: from `gradients`; m: number of outputs per layer."""
    (a, norm_a), (b, norm_b) = found['A'], found['B']
    row = {'auc_norm': [round(auc(y, x), 4) for x, y in zip(norm_a, norm_b)],
           'auc_norm_pooled': round(auc(norm_b.flatten(), norm_a.flatten()), 4), 'spaces': {}}
    scores = {'principal': lambda p, c: p, 'lift': lift, 'excess': normalized_alignment}
    for j, k in enumerate(SPACES):
        c = random_baseline(k, m)
        own = row['spaces'][str(k)] = {
            'chance': c, 'auc': [round(auc(y, x), 4) for x, y in zip(a[j], b[j])],
            'auc_pooled': round(auc(b[j].flatten(), a[j].flatten()), 4),
            'roc': roc(b[j].flatten(), a[j].flatten())}
        for text, p in (('A', a[j]), ('B', b[j])):
            danger = (p > DANGER_ALIGNMENT) & (normalized_alignment(p, c) > DANGER_EXCESS)
            own |= {f'mean_{text}': [round(one, 4) for one in p.mean(1).tolist()],
                    f'danger_{text}': danger.double().mean().item()}
    # for one number of directions, lift and excess are monotonic in the alignment; they rank
    # gradients differently only if several numbers are pooled
    for name, score in scores.items():
        both = [torch.cat([score(x[j], random_baseline(k, m)).flatten()
                           for j, k in enumerate(SPACES)]) for x in (b, a)]
        row[f'auc_all_{name}'] = round(auc(*both), 4)
    return row


# --------------------------------------------------------------------------------------------------
# results

def describe(row, key):
    end = row['curve'][-1][1:] if 'curve' in row else [row['auc_all_principal']]
    return ', '.join(map(str, (*key.values(), *(round(x, 3) for x in end), row['seconds'])))


def make(cfg, record, texts, seed):
    """Add all rows of a seed to the record."""
    saved = learned(cfg, texts, seed)

    def detector():
        model = GPT.from_checkpoint(saved)
        return detection(gradients(model, texts, layer_names(model), 10 ** 7 + seed),
                         model.config.n_embd)
    record.make(detector, kind='roc', seed=seed)
    for name in cfg.chosen:
        arm = ARMS[name]
        for rate in RATES[arm.setting]:
            key = dict(kind='curve', arm=name, rate=rate, seed=seed)
            record.make(lambda: run(cfg, record, texts, saved, key), **key)


def run(cfg, record, texts, saved, key):
    """Return the fields of a 'curve' row from one run on B."""
    arm, seed, rate = ARMS[key['arm']], key['seed'], key['rate']
    followed = None
    if arm.control == 'replay' or arm.protection == 'none':
        first = key | {'arm': 'adaptive'}
        followed = record.make(lambda: run(cfg, record, texts, saved, first), **first)
        if not any(any(ranks) for ranks in followed['ranks'].values()):
            # without a switch this run is identical to 'adaptive'
            return {k: followed[k] for k in ('trained', 'curve', 'ranks')} | {'same_as': 'adaptive'}
    model, control = prepare(saved, arm, seed, lambda name, count: followed['ranks'][name][count])
    curve, ranks = go_on(model, control, arm.control == 'start', texts, seed, rate, cfg.steps)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {'trained': trained, 'curve': curve, 'ranks': ranks}


def matched(curve, level):
    """Return the loss on A when the loss on B first falls to `level`, by linear interpolation.
    Returns None if the loss on B starts below the level or never reaches it."""
    for (_, a, b), (_, a_next, b_next) in zip(curve, curve[1:]):
        if b > level >= b_next:
            return a + (b - level) / (b - b_next) * (a_next - a)
    return None


def curves(rows, arm, rate):
    """Return seed -> curve of a variant at a learning rate."""
    return {row['seed']: row['curve'] for row in rows
            if row['kind'] == 'curve' and (row['arm'], row['rate']) == (arm, rate)}


def levels(rows, setting):
    """Return the losses on B at which forgetting is compared, or [] without rows.

    They are SPREAD above the lowest loss, rounded up to 0.05, that every recorded variant reaches
    with all seeds at one of its learning rates.
    """
    arms = [name for name in ARMS if ARMS[name].setting == setting
            and any(curves(rows, name, rate) for rate in RATES[setting])]
    if not arms:
        return []
    reached = [
        min(max(min(b for _, _, b in curve) for curve in found.values())
            for found in (curves(rows, arm, rate) for rate in RATES[setting]) if found)
        for arm in arms]
    deepest = math.ceil(max(reached) / 0.05 - 1e-9) * 0.05
    return [round(deepest + above, 4) for above in SPREAD]


def summary(values):
    """Return the mean and the standard error, which is None for one value."""
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.mean(values), spread


def cell(values, sign=''):
    """Return 'mean +- standard error', or '' if a value is missing."""
    if not values or None in values:
        return ''
    mean, spread = summary(values)
    return f'{mean:{sign}.3f}' + ('' if spread is None else f' +- {spread:.3f}')


def best_rate(rows, arm, level):
    """Return the learning rate with the lowest mean loss on A at a loss on B. Only rates at which
    all seeds reach that loss on B count. Returns None if there is no such rate."""
    found = {}
    for rate in RATES[ARMS[arm].setting]:
        values = [matched(curve, level) for curve in curves(rows, arm, rate).values()]
        if values and None not in values:
            found[rate] = statistics.mean(values)
    return min(found, key=found.get) if found else None


def table(rows, setting):
    """Return a Markdown table of losses on A at losses on B, one row per variant and rate.

    Brackets have the paired difference from the reference with the same seed and rate. Both runs
    had the same batches in the same order.
    """
    at, reference = levels(rows, setting), REFERENCE[setting]
    if not at:
        return ''
    lines = [
        f'{SETTINGS[setting]}: loss on A at a loss on B, nats per character, mean and standard '
        f'error over seeds; in brackets: minus {reference} with the same rate and seed', '',
        '| | learning rate | trained parameters at the end | ' +
        ' | '.join(f'A at {level:.2f}' for level in at) + ' | B at the end | A at the end |',
        '|---' * (len(at) + 5) + '|']
    for arm, rate in ((name, rate) for name in ARMS if ARMS[name].setting == setting
                      for rate in RATES[setting]):
        found, base = curves(rows, arm, rate), curves(rows, reference, rate)
        if not found:
            continue
        cells = []
        for level in at:
            values = {seed: matched(curve, level) for seed, curve in found.items()}
            beside = {seed: matched(base[seed], level) if seed in base else None for seed in found}
            less = None not in (*values.values(), *beside.values()) and arm != reference
            cells.append(cell([*values.values()]) + (
                f' ({cell([value - beside[seed] for seed, value in values.items()], "+")})'
                if less else ''))
        count = statistics.mean(row['trained'] for row in rows
                                if (row.get('arm'), row.get('rate')) == (arm, rate))
        ends = [cell([curve[-1][i] for curve in found.values()]) for i in (2, 1)]
        lines.append(f'| {arm} | {rate:g} | {count:,.0f} | ' + ' | '.join((*cells, *ends)) + ' |')
    starts = [row['curve'][0] for row in rows if row['kind'] == 'curve']
    lines += [
        '', f'before B: {statistics.mean(a for _, a, _ in starts):.3f} on A, '
        f'{statistics.mean(b for _, _, b in starts):.3f} on B; empty: not reached in every seed']
    return '\n'.join(lines)


def switch_table(rows):
    """Return a Markdown table of how often layers switched, '' if no variant could switch."""
    lines = [
        'switches to low-rank mode, mean over seeds', '',
        '| | learning rate | layers that switched | of | first analysis with a switch '
        '| returns to full mode | fraction of analyses in low-rank mode |', '|---' * 7 + '|']
    empty = len(lines)
    for arm in ARMS:
        for rate in RATES[ARMS[arm].setting]:
            runs = [list(row['ranks'].values()) for row in rows
                    if row.get('ranks') and (row['arm'], row['rate']) == (arm, rate)]
            if runs:
                switched = [sum(any(r) for r in ranks) for ranks in runs]
                first = [min(next(i for i, one in enumerate(r) if one) for r in ranks if any(r)) + 1
                         for ranks in runs if any(map(any, ranks))]
                back = [sum(x > 0 == y for r in ranks for x, y in zip(r, r[1:])) for ranks in runs]
                share = [statistics.mean(one > 0 for r in ranks for one in r) for ranks in runs]
                lines.append(
                    f'| {arm} | {rate:g} | {statistics.mean(switched):.1f} | {len(runs[0])} | '
                    f'{f"{statistics.mean(first):.1f}" if first else "none"} | '
                    f'{statistics.mean(back):.1f} | {statistics.mean(share):.0%} |')
    return '\n'.join(lines) if len(lines) > empty else ''


def detector_table(rows):
    """Return a Markdown table of the detector's scores, '' without rows."""
    found = [row for row in rows if row['kind'] == 'roc']
    if not found:
        return ''
    lines = [
        'the detector on gradients of the model that was trained on A, mean and standard error '
        f'over seeds; danger: alignment > {DANGER_ALIGNMENT}, excess > {DANGER_EXCESS}', '',
        '| directions protected | chance level | alignment on A | on B | AUC, pooled (chance .5) '
        '| AUC per layer, lowest to highest | danger on A: false positives | danger on B '
        '|', '|---' * 8 + '|']
    for k in map(str, SPACES):
        own = [row['spaces'][k] for row in found]
        by_layer = [statistics.mean(one) for one in zip(*(o['auc'] for o in own))]
        values = ([statistics.mean(o['mean_A']) for o in own],
                  [statistics.mean(o['mean_B']) for o in own], [o['auc_pooled'] for o in own])
        lines.append(f'| {k} | {own[0]["chance"]:.3f} | ' + ' | '.join(map(cell, values)) +
                     f' | {min(by_layer):.3f} to {max(by_layer):.3f} | ' +
                     ' | '.join(cell([o[f'danger_{text}'] for o in own]) for text in 'AB') + ' |')
    pooled = ', '.join(f'{name} {cell([row[f"auc_all_{name}"] for row in found])}'
                       for name in ('principal', 'lift', 'excess'))
    return '\n'.join([
        *lines, '', f'AUC with all numbers of directions pooled, by score: {pooled}',
        f"AUC of the gradient norm: {cell([row['auc_norm_pooled'] for row in found])}"])


# --------------------------------------------------------------------------------------------------
# figure

LOOKS = dict(zip(ARMS, ('k', 'C0', 'C9', 'C4', 'C1', 'C6', 'C2', 'C8',
                        'k', 'C3', 'C5', 'C7', 'C0', 'C1', 'C2', 'C8')))


def plot(rows):
    """Save FIGURE. Upper panels: loss on text A against loss on text B, one panel per setting.
    Lower panels: scores of the detector."""
    figure, axes = plots.page(2, 2, (9.5, 10.6))
    for axis, setting in zip(axes[0], SETTINGS):
        draw_curves(axis, rows, setting)
    draw_roc(axes[1, 0], rows)
    draw_layers(axes[1, 1], rows)
    seeds = sorted({row['seed'] for row in rows})
    figure.supxlabel(
        f'Mean and standard error over seeds {", ".join(map(str, seeds))}. Upper panels: training '
        'goes from left to right. Each variant has the learning rate\nin brackets, at which it '
        'forgets least at the middle loss on B of the tables.',
        fontsize=9, color='0.3')
    plots.save(figure, FIGURE)


def draw_curves(axis, rows, setting):
    """Draw mean and standard error of each variant where all seeds have values. For each variant
    the learning rate is the one that is best at the middle of `levels`."""
    at = levels(rows, setting)
    for arm in (name for name in ARMS if ARMS[name].setting == setting and at):
        rate = best_rate(rows, arm, at[len(at) // 2])
        found = list(curves(rows, arm, rate).values())
        if found:
            low, high = max(min(b for _, _, b in c) for c in found), min(c[0][2] for c in found)
            grid = [level for level in np.arange(
                math.ceil(low / 0.05) * 0.05, min(high, at[0] + 0.5), 0.1)]
            values = [[matched(curve, level) for curve in found] for level in grid]
            points = [(level, *summary(v)) for level, v in zip(grid, values) if None not in v]
            if points:
                x, mean, spread = zip(*points)
                axis.errorbar(x, mean, [one or 0 for one in spread],
                              fmt='o-' if not ARMS[arm].random else 's--', color=LOOKS[arm],
                              capsize=2, markersize=3.5, lw=1.3,
                              label=f'{arm.removeprefix("attention, ")} ({rate:g})')
    axis.set(title=SETTINGS[setting], xlabel='loss on B (Python), nats per character',
             ylabel='loss on A (Shakespeare), nats per character')
    axis.invert_xaxis()
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8, loc='upper center', bbox_to_anchor=(0.5, -0.13), ncols=2)


def draw_roc(axis, rows):
    found = [row for row in rows if row['kind'] == 'roc']
    grid = np.linspace(0, 1, GRID + 1)
    for i, k in enumerate(map(str, SPACES) if found else ()):
        own = [row['spaces'][k] for row in found]
        curve = np.array([o['roc'] for o in own])                   # (seeds, GRID + 1)
        axis.plot(grid, curve.mean(0), color=f'C{i}',
                  label=f'{k} directions, AUC {cell([o["auc_pooled"] for o in own])}')
        if len(own) > 1:
            error = curve.std(0, ddof=1) / math.sqrt(len(own))
            axis.fill_between(grid, curve.mean(0) - error, curve.mean(0) + error,
                              color=f'C{i}', alpha=0.2)
        shipped = [statistics.mean(o[f'danger_{text}'] for o in own) for text in 'AB']
        axis.plot(*shipped, '*', color=f'C{i}', markersize=12, clip_on=False, zorder=5)
    axis.plot([], [], 'k*', markersize=9, label='default thresholds')
    axis.plot([0, 1], [0, 1], 'k:', lw=1, label='chance')
    axis.set(title='The detector: all layers pooled',
             xlabel='false-positive rate (unseen text of A)', ylabel='true-positive rate (B)',
             xlim=(0, 1), ylim=(0, 1))
    axis.legend(fontsize=8, loc='lower right')
    axis.grid(alpha=0.3)


def draw_layers(axis, rows):
    """Draw the AUC of each layer."""
    found = [row for row in rows if row['kind'] == 'roc']
    words = TARGETS.split(',')
    names = [f'{i} {word}' for i in range(len(found[0]['auc_norm']) // len(words))
             for word in words] if found else []
    kinds = [(f'{k} directions', f'C{i}', [row['spaces'][str(k)]['auc'] for row in found])
             for i, k in enumerate(SPACES)] + [
        ("gradient's norm", '0.5', [row['auc_norm'] for row in found])]
    for i, (label, colour, values) in enumerate(kinds if found else ()):
        values = [summary(list(one)) for one in zip(*values)]
        axis.errorbar([mean for mean, _ in values],
                      [y + 0.15 * (i - 1.5) for y in range(len(names))],
                      xerr=[spread or 0 for _, spread in values],
                      fmt='o', color=colour, markersize=3.5, capsize=2, label=label)
    axis.axvline(0.5, color='k', ls=':', lw=1)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set(title='The detector: each layer', xlabel='AUC (chance: 0.5)', xlim=(0, 1.02))
    if found:
        axis.legend(fontsize=8, loc='upper center', bbox_to_anchor=(0.5, -0.13), ncols=4,
                    columnspacing=1, handletextpad=0.3)
    axis.grid(alpha=0.3)


def main(argv=None):
    """Run the command. Returns the exit code: 0 done, 2 wrong input, 130 or 143 stopped."""
    return cli.run('continual_learning.py', ContinualConfig, __doc__, experiment, argv)


def experiment(cfg):
    """Run what is missing, print the tables and draw the figure. Raises UserError."""
    plots.require_matplotlib(f'the figure {FIGURE}', FIGURE)
    if not cfg.run and not RECORD.exists():
        raise UserError(f'run=False: {RECORD} does not exist yet (nearest: --run=True)')
    if cfg.run:
        check_writable(Path(cfg.out_dir) / 'ckpt.pt', f'out_dir={cfg.out_dir!r}')
        texts = Texts(Dataset(locate(cfg.dataset, 'char')), python_source(TEXT_B))
        make_folder(cfg.out_dir)
        record = Record(RECORD, describe, learn_steps=cfg.learn_steps, steps=cfg.steps,
                        texts=texts.stamp)
        for seed in map(int, cfg.seeds.split(',')):
            make(cfg, record, texts, seed)
    rows = read_json_lines(RECORD)
    print('\n\n'.join(filter(None, (
        *(table(rows, setting) for setting in SETTINGS), switch_table(rows),
        detector_table(rows)))))
    plot(rows)
    print(f'figure: {FIGURE}')


if __name__ == '__main__':
    sys.exit(main())

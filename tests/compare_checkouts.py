"""
Check that two checkouts of this repository compute bit-identical results on this machine:

    python tests/compare_checkouts.py                     # BEFORE and MOVED against this tree
    python tests/compare_checkouts.py OLD NEW             # commits or folders
    python tests/compare_checkouts.py OLD NEW --only=mla  # configurations with this in their name

Both trees train, resume, adapt, export and sample the same small models. The comparison covers all
metrics, the logits of every forward pass, generated tokens with and without a cache, and the
contents of checkpoints and exports. No result is stored, because bits differ between processors. A
value that a file holds under a new name is listed as renamed and counts as equal. Options that only
one tree has are ignored. Exit code: 0 equal, 1 different, 2 wrong input.

Not compared are interrupted runs (last.pt), SVD options of sample.py, float16, cropped contexts,
and config.json of exports, which transformers writes. The loss of an export is compared.

The script relies only on main(argv) and the options of the commands, on GPT, and on the files in
OUT_DIR.
"""

import array
import contextlib
import functools
import hashlib
import importlib
import io
import json
import os
import pickle
import random
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

BEFORE = 'd773c8a'                  # the last commit before the redesign
# words in the names of configurations whose results changed on purpose -> the commit. The changes
# are: Muon's steps; one product from a warm start; another order of sums over a cache; random
# numbers of LoRA; momenta and decompositions of adaptive layers
MOVED = {'mla muon': '70bb7a3', **dict.fromkeys(('muon', 'compressed'), '6ea406a'),
         'sequence randomized': 'f503e89',
         **dict.fromkeys(('causal', 'weight'), 'b2a212d'),
         **dict.fromkeys(('lora', 'adaptive'), 'f7eeaf6')}
ROOT = Path(__file__).resolve().parents[1]
CLOCK = ('step_ms', 'tokens_per_s', 'mfu')
# values that changed on purpose since BEFORE -> how
CHANGED = {
    'energy_kept': 'last digits, because the largest element no longer scales it',
    'effective_rank': 'last digits, for the same reason',
    'interim_best_val_loss': 'removed, because best_val_loss counts every evaluation'
}
BASE = (
    '--dataset=toy --device=cpu --n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --batch_size=4 '
    '--max_iters=20 --lr_decay_iters=20 --gradient_accumulation_steps=2 --learning_rate=1e-2 '
    '--eval_interval=10 --eval_iters=2'
)
SVD = '--use_svd=True --svd_rank=4 --svd_block=8'
LORA = '--init_from=base --lora_rank=2 --lora_targets=c_q,c_v,c_fc'
ADAPTIVE = '--adaptive_svd=True --adaptive_svd_target_layer=-1 --adaptive_svd_targets=c_q,c_proj ' \
           '--adaptive_svd_interval=1'  # so that layers reach low-rank mode within 20 steps
FACTORED = "--layer_ranks={'h.0.mlp.c_fc':3,'h.0.attn.c_attn.c_v':2,'h.1.attn.c_proj':5}"

# name -> options of train.py. Words in a name select more commands, see `commands`
TRAINED = {
    'plain': '',
    'plain dropout': '--dropout=0.2 --bias=True',
    'plain muon': '--optimizer=muon',
    'plain bfloat16': '--dtype=bfloat16',
    'plain compiled': '',
    'plain two processes': '',
    **{f'{scope} {method}': f'{SVD} --svd_scope={scope} --svd_method={method}'
       for scope in ('sequence', 'causal', 'weight')
       for method in ('standard', 'gram', 'randomized')},
    'causal constant basis': f'{SVD} --svd_scope=causal --svd_basis_grad=False',
    'causal randomized muon resumed': f'{SVD} --svd_scope=causal --svd_method=randomized '
                                      '--optimizer=muon --dropout=0.1',
    'sequence randomized two processes': f'{SVD} --svd_method=randomized',
    'causal gram compiled': f'{SVD} --svd_scope=causal',
    'mla': '--use_mla=True',
    'mla muon resumed': '--use_mla=True --mla_latent_dim=12 --optimizer=muon --bias=True',
    'mla causal': f'--use_mla=True {SVD} --svd_scope=causal',
    'mla weight': f'--use_mla=True {SVD} --svd_scope=weight',
    'mla compiled': '--use_mla=True',
    'factored': FACTORED,
    'factored muon resumed': f'{FACTORED} --optimizer=muon',
    'lora': LORA,
    'lora dropout muon resumed': f'{LORA} --lora_dropout=0.2 --optimizer=muon',
    'lora pissa': f'{LORA} --lora_init=pissa',
    'lora milora': f'{LORA} --lora_init=milora --lora_alpha=4',
    'adaptive': ADAPTIVE,
    'adaptive muon': f'{ADAPTIVE} --optimizer=muon',
    'adaptive resumed': f'{ADAPTIVE} --adaptive_svd_protection=none',
    'adaptive two processes': ADAPTIVE,
    'exported nanogpt': '',
    'exported gpt2': '--bias=True --gelu=tanh',
    'exported mla safetensors': '--use_mla=True',
    'exported lora': LORA,
    'exported adaptive dense': ADAPTIVE,
    'compressed': '',
    'compressed to mla': '',
}


def commands(name, options):
    """Return the commands of a configuration as a list of (script, argv). They write the folder
    `run`, and others that later commands read."""
    train = [*BASE.split(), *options.split(), '--out_dir=run']
    lines = [('train', train)]
    if '--init_from=base' in train:
        lines.insert(0, ('train', [*BASE.split(), '--out_dir=base']))
    if 'resumed' in name:
        lines[-1:] = [('train', [*train, '--max_iters=10']),
                      ('train',
                       ['--init_from=resume', '--out_dir=run', '--device=cpu', '--max_iters=20'])]
    if 'exported' in name:
        lines.append(('export', ['--out_dir=run', f'--to={name.split()[-1]}', '--save_dir=other']))
    if name == 'compressed':
        lines.append(
            ('compress', ['--out_dir=run', '--save_dir=other', '--keep=0.6', '--finetune_iters=3']))
    if name == 'compressed to mla':
        lines.append(
            ('compress', ['--out_dir=run', '--save_dir=other', '--to=mla', '--mla_latent_dim=8']))
    if lines[-1][0] != 'train':                                 # evaluate what was written
        base = ['--init_from=base', '--lora_adapter=other'
                ] if name == 'exported lora' else ['--init_from=other']
        lines.append(
            ('train',
             [*base, '--eval_only=True', '--dataset=toy', '--out_dir=again', '--device=cpu']))
    return lines


# --------------------------------------------------------------------------------------------------
# record one tree

def record(tree, name):
    """Run a configuration with the code of `tree` in the working directory. Returns name of a value
    -> the value as text."""
    sys.path[:] = [str(tree), *(p for p in sys.path if Path(p or '.').resolve() != ROOT / 'tests')]
    import torch
    model = importlib.import_module('model')
    torch.set_num_threads(1)
    if 'compiled' in name:
        torch.compile = functools.partial(torch.compile, backend='aot_eager')
    values, seen = {}, []  # seen: the model of the last forward pass
    forward = model.GPT.forward

    @functools.wraps(forward)
    def recorded(self, *args, **kwargs):
        result = forward(self, *args, **kwargs)
        if not torch.compiler.is_compiling() and torch.is_tensor(result[0]):
            seen[:] = [self]
            values[f'{len(values):05} logits'] = digest(result[0].detach())
        return result
    model.GPT.forward = recorded

    for script, argv in commands(name, TRAINED[name]):
        if script == 'train' and 'two processes' in name:
            argv = [*argv, '--backend=gloo']
        run(script, argv, values)
    if int(os.environ.get('RANK', 0)):
        return values  # only process 0 writes files and generates
    for option in ('--temperature=0', '--top_k=3', '--top_p=0.7'):
        run('sample', [
            '--out_dir=run', '--num_samples=2', '--max_new_tokens=40', '--device=cpu', '--start=ab',
            option
        ], values)
    for use_cache in (True, False):
        torch.manual_seed(1)
        with contextlib.suppress(ValueError):           # a model that is not causal has no cache
            ids = seen[0].generate(torch.tensor([[1, 2, 3]]), 40, use_cache=use_cache)
            values[f'{len(values):05} tokens, use_cache={use_cache}'] = digest(ids)
    for file in sorted(Path().glob('*/*.jsonl')):
        for i, line in enumerate(file.read_text().splitlines()):
            flatten(json.loads(line), f'{file} {i}', values)
    for file in sorted(Path().glob('*/*.pt')):
        flatten(torch.load(file, map_location='cpu', weights_only=True), file, values)
    for file in sorted(Path().glob('*/*.safetensors')):
        from safetensors.torch import load_file
        flatten(load_file(file), file, values)
    return values


def run(script, argv, values):
    """Call main(argv) of a command. Keep its output if it is generated text."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = importlib.import_module(script).main(argv)
    if code:
        raise SystemExit(f'{script}.py {" ".join(argv)}: exit code {code}')
    if script == 'sample':
        # the first line describes the run, in words that may change
        values[f'{len(values):05} text'] = printed.getvalue().partition('\n')[2]


def flatten(value, name, values):
    """Add everything in nested dicts and lists to `values`, with the path of keys as the name."""
    if isinstance(value, dict) and value:
        for key, part in value.items():
            if key not in CLOCK:
                flatten(part, f'{name} {key}', values)
    elif isinstance(value, (list, tuple)) and value:
        for i, part in enumerate(value):
            flatten(part, f'{name} {i}', values)
    else:
        values[name] = digest(value) if hasattr(value, 'numpy') else repr(value)


def digest(tensor):
    import torch
    content = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return f'{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(content).hexdigest()[:16]}'


def make_data(folder):
    """Write data/toy in nanoGPT's format: words in random order, 16 different characters."""
    words = random.Random(0).choices(['ab', 'cde', 'fgh ', 'i j', 'klm', 'no '], k=2000)
    text = ''.join(words)
    chars = sorted(set(text))
    ids = array.array('H', map(chars.index, text))
    (folder / 'data' / 'toy').mkdir(parents=True)
    (folder / 'data' / 'toy' / 'train.bin').write_bytes(ids[:-600].tobytes())
    (folder / 'data' / 'toy' / 'val.bin').write_bytes(ids[-600:].tobytes())
    (folder / 'data' / 'toy' / 'meta.pkl').write_bytes(
        pickle.dumps({
            'vocab_size': len(chars), 'itos': dict(enumerate(chars)),
            'stoi': {c: i for i, c in enumerate(chars)}}))


# --------------------------------------------------------------------------------------------------
# compare two trees

def start(tree, name, work):
    """Start a process that records a configuration in the folder `work`, and return it."""
    make_data(work)
    python = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    command = [
        *(python if 'two processes' in name else [sys.executable]),
        str(Path(__file__).resolve()), '--record',
        str(tree), name]
    environment = os.environ | {'OMP_NUM_THREADS': '1', 'WANDB_MODE': 'disabled', 'HOME': str(work)}
    return subprocess.Popen(command, cwd=work, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def differences(old, new):
    """Return the names of values that differ, in the order of computation, and the renamed values.
    A renamed value is a pair (old name, new name) of equal values in files."""
    added, renamed = {}, []
    for name in new:
        if name not in old:
            added.setdefault(new[name], []).append(name)
    for name in old:
        if name not in new and added.get(old[name]) and ('.pt ' in name or '.safetensors ' in name):
            renamed.append((name, added[old[name]].pop(0)))
    known = {name for pair in renamed for name in pair}
    # 'matrices' of Muon's groups were numbers of matrices and are lists of their rows
    known |= {name for name in {*old} ^ {*new}
              if any(word in name for word in (' config ', ' model_args ', ' matrices '))}
    return [name for name in {**old, **new} if name not in known and old.get(name) != new.get(name)
            and not name.endswith(tuple(CHANGED))], renamed


def compare(name, trees, work):
    """Compare a configuration in both trees and print the verdict. Return whether they agree."""
    folders = [work / f'{name} {i}'.replace(' ', '-') for i in range(2)]
    processes = [start(tree, name, folder) for tree, folder in zip(trees, folders)]
    try:
        said = [process.communicate()[0].strip()[-1500:] for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        print(f'FAIL  {name}:', *said, sep='\n', flush=True)
        return False
    old, new = (json.loads((folder / 'values.json').read_text()) for folder in folders)
    different, renamed = differences(old, new)
    verdict = f'{len(old)} values'
    if different:
        first = different[0]
        verdict = (f'{len(different)} of {len(old)} values differ, the first: {first}: '
                   f'{old.get(first, "missing")} -> {new.get(first, "missing")}')
    print(f'{"DIFF " if different else "equal"} {name}: {verdict}', flush=True)
    for pair in renamed:
        print('      renamed:', ' -> '.join(pair))
    return not different


def checkout(source, work):
    """Return the folder of a tree. source: a folder, or a commit, which is unpacked below `work`.
    Raises ValueError if it is neither."""
    if (Path(source) / 'model.py').is_file():
        return Path(source).resolve()
    archive = subprocess.run(['git', '-C', str(ROOT), 'archive', source], capture_output=True)
    if archive.returncode:
        raise ValueError(f'{source}: not a folder with a model.py and not a commit (nearest: HEAD)')
    tree = work / f'tree-{source.replace("/", "-")}'
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as f:
        f.extractall(tree, filter='data')
    return tree


def main(argv):
    if argv[:1] == ['--record']:
        values = record(*argv[1:])
        if int(os.environ.get('RANK', 0)) == 0:
            Path('values.json').write_text(json.dumps(values))
        return 0
    words = [arg.removeprefix('--only=') for arg in argv if arg.startswith('--only=')]
    sources = [arg for arg in argv if not arg.startswith('--')]
    names = [name for name in TRAINED if all(word in name for word in words)]
    if len(sources) not in (0, 2) or len(sources) + len(words) != len(argv) or not names:
        print(
            'usage: python tests/compare_checkouts.py [OLD NEW] [--only=WORD], where WORD is in '
            f'the name of a configuration: {", ".join(TRAINED)}',
            file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        try:
            old, new = sources or (BEFORE, ROOT)
            trees = {
                source: checkout(source, Path(folder)) for source in (old, new, *MOVED.values())}
        except ValueError as e:
            print(f'compare_checkouts.py: {e}', file=sys.stderr)
            return 2
        equal = [
            compare(name, (trees[next(
                (commit for word, commit in MOVED.items() if word in name and old == BEFORE),
                old)], trees[new]), Path(folder)) for name in names]
    print(f'{sum(equal)} of {len(equal)} configurations are equal')
    return int(not all(equal))


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

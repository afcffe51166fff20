"""Models in folders of config.json and model.safetensors: GPT-2 in Hugging Face's format, and this
repo's own format.

GPT-2, in a folder or by name, is read and written with `transformers`; what this GPT cannot be is
refused. The repo's own format holds every other model (an SVD of V, latents, low-rank layers) and
adapters, and needs `safetensors` alone. Nothing is unpickled and no code of a folder is run.
Whatever is wrong with a folder raises UserError, one line.
"""

import difflib
import hashlib
import importlib
import json
import os
import shlex
from contextlib import contextmanager
from pathlib import Path

import torch

from runtime import checkpoint, download
from runtime.config import UserError, one_line
from runtime.data import END, GPT2_META, check_meta
from runtime.files import write_atomically

MODELS = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
WEIGHTS = 'model.safetensors'
OWN, ADAPTER = 'lowrank-gpt', 'lowrank-gpt-adapter'                 # model_type of the repo's own
# nanoGPT's names of the sizes and Hugging Face's, and the weights that its Conv1D has transposed
FIELDS = dict(n_layer='n_layer', n_head='n_head', n_embd='n_embd', vocab_size='vocab_size',
              block_size='n_positions')
CONV1D = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')
# field of a GPT2Config -> the values that this GPT can represent; the last two gelus are the same
SUPPORTED = dict(model_type=['gpt2'], layer_norm_epsilon=[1e-5], scale_attn_weights=[True],
                 scale_attn_by_inverse_layer_idx=[False], add_cross_attention=[False],
                 activation_function=['gelu', 'gelu_new', 'gelu_pytorch_tanh'])
# sha256 of the 50256 tokens of GPT-2's BPE in the order of their ids, without <|endoftext|>
GPT2_VOCAB = '3a1f1c010d179f036be1992bc14b861e326341438633869c694dc4dccfe153d3'


# ------------------------------------------------------------------------------------------------
# which model

def is_folder(name):
    return os.path.isfile(os.path.join(name, 'config.json'))        # Path's fails for long names


def is_run(name):
    return os.path.isfile(os.path.join(name, 'ckpt.pt')) and not is_folder(name)


def check_name(name, others=()):
    """Raise UserError unless `name` is one of MODELS, a folder with a config.json or a ckpt.pt, or
    one of `others`."""
    names = [*others, *MODELS]
    if name not in names and not is_folder(name) and not is_run(name):
        raise UserError(f'init_from={name!r}: must be {", ".join(map(repr, names))}, or a folder '
                        'with a ckpt.pt or config.json (nearest: '
                        f'{difflib.get_close_matches(name.lower(), names, 1, 0)[0]!r})')


# ------------------------------------------------------------------------------------------------
# reading

@contextmanager
def _reading(option):
    """Any error within the block becomes a UserError that begins with the option. The packages
    raise a dozen kinds for damaged files."""
    try:
        yield
    except Exception as e:
        kind = '' if isinstance(e, (ValueError, OSError)) else f'{type(e).__name__}: '
        raise UserError(f'{option}: {kind}{one_line(e)[:400]}') from None


def _import(module):
    """A package that only some formats need. Raises UserError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f'needs a package: pip install {module.partition(".")[0]}') from None


def _transformers():
    """The package, which prints nothing: what matters is raised."""
    transformers = _import('transformers')
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def read(name):
    """A model by name or folder, as a checkpoint dict: model_args and state dict (float32), both
    with nanoGPT's names, its path, and what else a run's checkpoint has. transformers looks for a
    name in the Hugging Face cache, then on the hub. Raises UserError."""
    check_name(name)
    if is_run(name):
        return checkpoint.load(Path(name) / 'ckpt.pt') | {'path': name}
    with _reading(f'init_from={name!r}'):
        config = _read_json(Path(name) / 'config.json') if is_folder(name) else {}
        if config.get('model_type') == ADAPTER:
            raise ValueError('holds adapters, not a model (nearest: --init_from=BASE '
                             f'--lora_adapter={name})')
        if config.get('model_type') == OWN:
            args, state = config['model_args'], _read_weights(name)[0]
            state['lm_head.weight'] = state['transformer.wte.weight']
        else:
            args, state = _read_gpt2(name if config else f'openai-community/{name}')
        return dict(model_args=args, model=state, path=name)


def _read_json(path):
    """The content of a JSON file. Raises ValueError that names it."""
    try:
        return json.loads(path.read_text(encoding='utf-8-sig'))
    except (OSError, ValueError) as e:
        raise ValueError(f'{path.name} cannot be read: {one_line(e)}') from None


def _read_weights(folder):
    """name -> float32 tensor, and the notes beside them, of the repo's own format."""
    with _import('safetensors').safe_open(Path(folder) / WEIGHTS, 'pt') as f:
        return {name: f.get_tensor(name).float() for name in f.keys()}, f.metadata() or {}


def _read_gpt2(source):
    """A folder or a name on the hub -> model_args, state dict. A model that `write_gpt2` gave zeros
    as biases comes back without, unless somebody has trained them. Raises ValueError for what this
    GPT cannot represent."""
    hf = _transformers()
    config = hf.AutoConfig.from_pretrained(source, trust_remote_code=False)
    for key, values in (SUPPORTED | dict(n_inner=[None, 4 * config.hidden_size])).items():
        if getattr(config, key, None) not in values:
            raise ValueError(f'its config.json has {key}={getattr(config, key, None)!r}, must be '
                             f'{" or ".join(map(repr, values))}')
    model, report = hf.GPT2LMHeadModel.from_pretrained(
        source, config=config, use_safetensors=True, dtype=torch.float32, output_loading_info=True,
        ignore_mismatched_sizes=True)
    for kind, found in report.items():
        wrong = sorted(name for name in found                       # older files hold masks
                       if not str(name).endswith(('.attn.bias', '.attn.masked_bias')))
        if wrong:
            raise ValueError(f'its weights have {kind.replace("_", " ")}: {wrong}')
    state = {name: w.t() if name.endswith(CONV1D) else w for name, w in model.state_dict().items()}
    if not state['lm_head.weight'].equal(state['transformer.wte.weight']):
        raise ValueError('lm_head.weight and wte.weight differ, which are one tensor here')
    biases = [name for name in state if name.endswith('.bias')]
    args = {ours: getattr(config, theirs) for ours, theirs in FIELDS.items()} | dict(
        gelu='exact' if config.activation_function == 'gelu' else 'tanh',
        bias=getattr(config, 'bias', True) or any(state[name].any() for name in biases),
        dropout=config.resid_pdrop if is_folder(source) else 0.0)   # by name nanoGPT's, not 0.1
    return args, {name: w for name, w in state.items() if args['bias'] or name not in biases}


# ------------------------------------------------------------------------------------------------
# adapters

def read_adapter(name):
    """A folder that export.py --to=lora made -> the adapter's options, name -> float32 tensor, and
    notes on the weights it was made on: `base_sha256` and `base`, a name for --init_from. Raises
    UserError."""
    with _reading(f'lora_adapter={name!r}'):
        config = _read_json(Path(name) / 'config.json')
        if config.get('model_type') != ADAPTER:
            raise ValueError('is no folder of adapters, as export.py --to=lora makes it')
        return config['adapter'], *_read_weights(name)


def load_adapter(model, folder, base, say=print):
    """Add the LoRA adapters of a folder to the model that they were made on, in place. base: the
    model's name. Raises ValueError where they do not fit."""
    options, tensors, notes = read_adapter(folder)
    where = f'lora_adapter={folder!r}'
    if model.config.adaptive_svd or model.config.has_lora:
        raise ValueError(f'{where}: {base} has adapters already (nearest: {merge_command(base)})')
    model.add_adapters(**options)
    weights = {f'{name}.{part}': getattr(model.get_layer(name), part).weight.data
               for name in model.config.lora_layers for part in 'AB'}
    here, there = ({name: tuple(w.shape) for name, w in w.items()} for w in (weights, tensors))
    for name in sorted({*here, *there}):
        if here.get(name) != there.get(name):
            raise ValueError(f'{where}: {name} is {there.get(name, "not in it")}, must be '
                             f'{here.get(name, "left out")}')
        weights[name].copy_(tensors[name])
    if 'base_sha256' not in notes:
        say(f'{where}: does not say which weights it was made on')
    elif notes['base_sha256'] != base_sha256(model):
        made_on = notes.get('base', 'another model')
        raise ValueError(f'{where}: was made on the weights of {made_on}, and {base} has others '
                         f'(nearest: {shlex.quote(f"--init_from={made_on}")})')


def merge_command(run):
    """The command that merges the adapters of a run into its weights."""
    return f'python export.py --to=dense {shlex.quote(f"--out_dir={run}")}'


def base_sha256(model):
    """The checksum of a GPT's weights without LoRA adapters. It is the same for c_attn as one layer
    or as three: weights come before biases. Position embeddings, which a run may crop, do not
    count."""
    adapters = [f'{name}.{part}.weight' for name in model.config.lora_layers for part in 'AB']
    digest = hashlib.sha256()
    for kind in ('weight', 'bias'):
        for name, w in model.transformer.state_dict().items():
            if name.endswith(kind) and name not in (*adapters, 'wpe.weight'):
                digest.update(w.float().cpu().contiguous().numpy())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------
# tokenizers

def read_tokenizer(name):
    """The tokenizer of a model that `check_name` takes, as a data set's meta; None for a folder
    without a tokenizer.json. Raises UserError for other tokenizers than `Tokenizer` has."""
    if is_run(name):
        return checkpoint.load(Path(name) / 'ckpt.pt').get('tokenizer')
    if not is_folder(name):
        return dict(GPT2_META)
    with _reading(f'init_from={name!r}'):
        config, file = _read_json(Path(name) / 'config.json'), Path(name) / 'tokenizer.json'
        if config.get('model_type') == OWN and config.get('tokenizer'):
            return check_meta(config['tokenizer'], 'config.json')
        return _meta_of(_read_json(file)['model']) if file.exists() else None


def _meta_of(model):
    """The model of a tokenizer.json -> a data set's meta. Raises ValueError."""
    tokens = sorted(model['vocab'], key=model['vocab'].get)
    if hashlib.sha256('\n'.join(tokens[:50256]).encode()).hexdigest() == GPT2_VOCAB:
        return dict(GPT2_META)
    if 'merges' in model or any(len(token) != 1 for token in tokens):
        raise ValueError("its tokenizer is neither one of single characters nor GPT-2's BPE")
    return check_meta(dict(tokenizer='char', vocab_size=len(tokens), chars=tokens,
                           dtype='uint16' if len(tokens) <= 2 ** 16 else 'uint32'),
                      'tokenizer.json')


def check_tokenizer(cfg, set_by, saved, data, say):
    """Raise UserError for data in other tokens than those asked for, or than those that the model
    was trained on: `saved`, the checkpoint of a run, or cfg.init_from."""
    if 'tokenizer' in set_by and cfg.tokenizer != data.meta['tokenizer']:
        raise UserError(f'tokenizer={cfg.tokenizer}: {data.folder} is encoded with '
                        f'{data.meta["tokenizer"]!r}; only text files can be encoded again')
    if cfg.init_from in ('scratch', 'resume'):
        theirs, whose = (saved or {}).get('tokenizer'), saved and saved['path']
    else:
        theirs, whose = read_tokenizer(cfg.init_from), cfg.init_from
    if theirs and any(theirs.get(key) != data.meta.get(key) for key in ('tokenizer', 'chars')):
        here, there = ({*meta.get('chars', ())} for meta in (data.meta, theirs))
        new, missing = (''.join(sorted(chars))[:20] for chars in (here - there, there - here))
        raise UserError(f'dataset={cfg.dataset}: its characters are not those of {whose}; new: '
                        f'{new!r}, missing: {missing!r} (nearest: a text of the same ones with '
                        f'--tokenizer={theirs["tokenizer"]}, or train.py --init_from=scratch)')
    if saved and theirs and theirs.get('sha256') != data.meta.get('sha256'):
        say(f'dataset={cfg.dataset}: another text than the one of {saved["path"]}')


# ------------------------------------------------------------------------------------------------
# writing into an empty folder: raises OSError, and UserError for a missing package

def write(folder, config, weights, **notes):
    """config.json, and name -> tensor with notes (texts) beside them. Not by save_pretrained, which
    does not flush to disk and for a full one raises no OSError."""
    save = _import('safetensors.torch').save
    tensors = {name: w.contiguous() for name, w in weights.items() if name != 'lm_head.weight'}
    write_atomically(folder / WEIGHTS, save(tensors, dict(format='pt', **notes)))
    _write_json(folder / 'config.json', config)


def _write_json(path, content):
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + '\n').encode())


def write_gpt2(folder, args, state, end=None):
    """model_args and the state dict of a model without an SVD, as a GPT2LMHeadModel. A model
    without biases gets zeros, and "bias": false in its config. end: id of <|endoftext|>."""
    weights = {name: w.t() if name.endswith(CONV1D) else w for name, w in state.items()}
    if not args['bias']:
        weights |= {name.removesuffix('weight') + 'bias': w.new_zeros(w.shape[-1])
                    for name, w in weights.items()
                    if name.startswith(('transformer.h', 'transformer.ln'))}
    config = _transformers().GPT2Config(
        **{theirs: args[ours] for ours, theirs in FIELDS.items()}, bias=args['bias'],
        **dict.fromkeys(('resid_pdrop', 'embd_pdrop', 'attn_pdrop'), args['dropout']),
        activation_function='gelu' if args['gelu'] == 'exact' else 'gelu_new',
        bos_token_id=end, eos_token_id=end, architectures=['GPT2LMHeadModel'])
    write(folder, config.to_diff_dict(), weights)


def write_tokenizer(folder, meta, length):
    """A data set's meta as the tokenizer beside what `write_gpt2` writes; length: the most tokens
    of a text. Raises UserError if GPT-2's BPE cannot be loaded."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode, generate_merges
    if meta['tokenizer'] == 'char':
        ids = {c: i for i, c in enumerate(meta['chars'])}
        tokenizer, special = Tokenizer(models.WordLevel(ids, unk_token='<unk>')), {}
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
        tokenizer.decoder = decoders.Fuse()                         # joined by nothing
    else:
        letters, ranks = bytes_to_unicode(), download.gpt2_encoding()._mergeable_ranks
        ids = {''.join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
        tokenizer = Tokenizer(models.BPE(ids, generate_merges(ids, None)))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([END])
        special = dict.fromkeys(('bos_token', 'eos_token', 'unk_token'), END)
    write_atomically(folder / 'tokenizer.json', tokenizer.to_str().encode())
    # Without model_input_names transformers 4 adds token_type_ids, which GPT-2 embeds as tokens.
    _write_json(folder / 'tokenizer_config.json', dict(
        tokenizer_class='PreTrainedTokenizerFast', model_max_length=length,
        clean_up_tokenization_spaces=False, model_input_names=['input_ids', 'attention_mask'],
        **special))

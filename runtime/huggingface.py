"""Model folders with config.json and model.safetensors, in Hugging Face's or this repo's format.

Hugging Face's format holds GPT-2 models. These models are written, and read by folder or by name,
with `transformers`. Models that this GPT cannot represent are refused. The repo's own format holds
all other models (SVD on V, latent attention, low-rank layers) and adapters. It needs only
`safetensors`. Nothing is unpickled and no code in a folder is run. Invalid folders raise UserError.
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
from runtime.data import END, GPT2_META, check_meta, has_end
from runtime.files import write_atomically

MODELS = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
WEIGHTS = 'model.safetensors'
OWN, ADAPTER = 'lowrank-gpt', 'lowrank-gpt-adapter'  # model_type in this repo's format
# nanoGPT's name of each size -> Hugging Face's name
FIELDS = dict(n_layer='n_layer', n_head='n_head', n_embd='n_embd', vocab_size='vocab_size',
              block_size='n_positions')
# weights that Hugging Face stores transposed
CONV1D = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')
# field of a GPT2Config -> values that this GPT can represent; the last two gelus are the same
SUPPORTED = dict(model_type=['gpt2'], layer_norm_epsilon=[1e-5], scale_attn_weights=[True],
                 scale_attn_by_inverse_layer_idx=[False], add_cross_attention=[False],
                 activation_function=['gelu', 'gelu_new', 'gelu_pytorch_tanh'])
# sha256 of the 50256 tokens of GPT-2's BPE in the order of their ids, without <|endoftext|>
GPT2_VOCAB = '3a1f1c010d179f036be1992bc14b861e326341438633869c694dc4dccfe153d3'


# --------------------------------------------------------------------------------------------------
# which model

def is_folder(name):
    """Return whether `name` is a folder with a config.json."""
    return os.path.isfile(os.path.join(name, 'config.json'))  # Path.is_file fails for long names


def is_run(name):
    """Return whether `name` is a run folder: it has a ckpt.pt and no config.json."""
    return os.path.isfile(os.path.join(name, 'ckpt.pt')) and not is_folder(name)


def check_name(name, others=()):
    """Raise UserError unless `name` is in MODELS or `others`, or a folder with config.json, or a
    folder with ckpt.pt."""
    names = [*others, *MODELS]
    if name not in names and not is_folder(name) and not is_run(name):
        raise UserError(f'init_from={name!r}: must be {", ".join(map(repr, names))}, or a folder '
                        'with a ckpt.pt or config.json (nearest: '
                        f'{difflib.get_close_matches(name.lower(), names, 1, 0)[0]!r})')


# --------------------------------------------------------------------------------------------------
# reading

@contextmanager
def _reading(option):
    """Turn every error in the block into a UserError that starts with the option. Damaged files
    raise many kinds of errors."""
    try:
        yield
    except Exception as e:
        kind = '' if isinstance(e, (ValueError, OSError)) else f'{type(e).__name__}: '
        raise UserError(f'{option}: {kind}{one_line(e)[:400]}') from None


def _import(module):
    """Import an optional package, or raise a UserError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f'needs a package; run: pip install {module.partition(".")[0]}') from None


def _transformers():
    """Import transformers and silence its messages and progress bars."""
    transformers = _import('transformers')
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def read(name):
    """Read a model by name or from a folder and return it as a checkpoint dict.

    Its keys are `model_args`, `model` (the state dict, in float32) and `path`. `model_args` and
    `model` use nanoGPT's names. For a run, the dict also has all other keys of the checkpoint.
    transformers looks up a name in the Hugging Face cache and then on the hub. Raises UserError if
    the model cannot be read.
    """
    check_name(name)
    if is_run(name):
        return checkpoint.load(Path(name) / 'ckpt.pt') | {'path': name}
    with _reading(f'init_from={name!r}'):
        config = _read_json(Path(name) / 'config.json') if is_folder(name) else {}
        if config.get('model_type') == ADAPTER:
            raise ValueError('contains adapters, not a model (nearest: --init_from=BASE '
                             f'--lora_adapter={name}, where BASE is the adapted model)')
        if config.get('model_type') == OWN:
            args, state = config['model_args'], _read_weights(name)[0]
            state['lm_head.weight'] = state['transformer.wte.weight']
        else:
            args, state = _read_gpt2(name if config else f'openai-community/{name}')
        return dict(model_args=args, model=state, path=name)


def _read_json(path):
    """Return the content of a JSON file, or raise ValueError that names the file."""
    try:
        return json.loads(path.read_text(encoding='utf-8-sig'))
    except (OSError, ValueError) as e:
        raise ValueError(f'{path.name} cannot be read: {one_line(e)}') from None


def _read_weights(folder):
    """Read model.safetensors in the repo's own format. Returns a dict from names to float32
    tensors, and the metadata of the file."""
    with _import('safetensors').safe_open(Path(folder) / WEIGHTS, 'pt') as f:
        return {name: f.get_tensor(name).float() for name in f.keys()}, f.metadata() or {}


def _read_gpt2(source):
    """Read GPT-2 from a folder or by name. Returns model_args and the state dict, without the zero
    biases that `write_gpt2` added. Raises ValueError for a model that this GPT cannot represent."""
    hf = _transformers()
    config = hf.AutoConfig.from_pretrained(source, trust_remote_code=False)
    for key, values in (SUPPORTED | dict(n_inner=[None, 4 * config.hidden_size])).items():
        if getattr(config, key, None) not in values:
            raise ValueError(f'its config.json has {key}={getattr(config, key, None)!r}, which is '
                             f'not supported (nearest: {" or ".join(map(repr, values))})')
    model, report = hf.GPT2LMHeadModel.from_pretrained(
        source, config=config, use_safetensors=True, dtype=torch.float32, output_loading_info=True,
        ignore_mismatched_sizes=True)
    for kind, found in report.items():
        wrong = sorted(name for name in found  # old files also hold masks
                       if not str(name).endswith(('.attn.bias', '.attn.masked_bias')))
        if wrong:
            raise ValueError(f'its weights have {kind.replace("_", " ")}: {wrong}')
    state = {name: w.t() if name.endswith(CONV1D) else w for name, w in model.state_dict().items()}
    if not state['lm_head.weight'].equal(state['transformer.wte.weight']):
        raise ValueError('lm_head.weight and wte.weight differ, but must be the same weights')
    biases = [name for name in state if name.endswith('.bias')]
    args = {ours: getattr(config, theirs) for ours, theirs in FIELDS.items()} | dict(
        gelu='exact' if config.activation_function == 'gelu' else 'tanh',
        bias=getattr(config, 'bias', True) or any(state[name].any() for name in biases),
        dropout=config.resid_pdrop if is_folder(source) else 0.0)  # by name 0.0, as in nanoGPT
    return args, {name: w for name, w in state.items() if args['bias'] or name not in biases}


# --------------------------------------------------------------------------------------------------
# adapters

def read_adapter(name):
    """Read a folder that export.py --to=lora wrote. Returns the adapter's options, a dict from
    names to float32 tensors, and notes on the weights that the adapter was trained on:
    `base_sha256` and `base`, a value for --init_from. Raises UserError if the folder cannot be
    read."""
    with _reading(f'lora_adapter={name!r}'):
        config = _read_json(Path(name) / 'config.json')
        if config.get('model_type') != ADAPTER:
            raise ValueError('is not a folder of adapters (nearest: one from export.py --to=lora)')
        return config['adapter'], *_read_weights(name)


def load_adapter(model, folder, base, say=print):
    """Add the LoRA adapters in a folder to a model, in place. `base` is the model's name for
    messages. If the folder does not name the weights that the adapters were trained on, say(text)
    reports this. Raises ValueError if the adapters do not fit the model or were trained on other
    weights."""
    options, tensors, notes = read_adapter(folder)
    where = f'lora_adapter={folder!r}'
    if model.config.adaptive_svd or model.config.has_lora:
        raise ValueError(f'{where}: {base} already has adapters (nearest: {merge_command(base)})')
    model.add_adapters(**options)
    weights = {f'{name}.{part}': getattr(model.get_layer(name), part).weight.data
               for name in model.config.lora_layers for part in 'AB'}
    here, there = ({name: tuple(w.shape) for name, w in w.items()} for w in (weights, tensors))
    for name in sorted({*here, *there}):
        if here.get(name) != there.get(name):
            raise ValueError(f'{where}: the shape of {name} is {there.get(name, "none")}, but '
                             f'{here.get(name, "none")} in the model')
        weights[name].copy_(tensors[name])
    if 'base_sha256' not in notes:
        say(f'{where}: does not name the weights it was trained on, so they are not checked')
    elif notes['base_sha256'] != base_sha256(model):
        made_on = notes.get('base', 'another model')
        raise ValueError(f'{where}: was trained on the weights of {made_on}, not of {base} '
                         f'(nearest: {shlex.quote(f"--init_from={made_on}")})')


def merge_command(run):
    """Return the command that merges the adapters of a run into its weights."""
    return f'python export.py --to=dense {shlex.quote(f"--out_dir={run}")}'


def base_sha256(model):
    """Return the sha256 of a GPT's weights without its LoRA adapters.

    Queries, keys and values can be one layer (c_attn) or three. All weights are hashed first and
    then all biases, so that both forms give the same hash. Position embeddings are left out,
    because a run may crop them.
    """
    adapters = [f'{name}.{part}.weight' for name in model.config.lora_layers for part in 'AB']
    digest = hashlib.sha256()
    for kind in ('weight', 'bias'):
        for name, w in model.transformer.state_dict().items():
            if name.endswith(kind) and name not in (*adapters, 'wpe.weight'):
                digest.update(w.float().cpu().contiguous().numpy())
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------
# tokenizers

def read_tokenizer(name):
    """Return the tokenizer of a model that `check_name` accepts, as the metadata of a data set, or
    None if its folder has no tokenizer. Raises UserError if `Tokenizer` does not support the
    tokenizer."""
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
    """Convert the model in a tokenizer.json to the metadata of a data set."""
    tokens = sorted(model['vocab'], key=model['vocab'].get)
    if hashlib.sha256('\n'.join(tokens[:50256]).encode()).hexdigest() == GPT2_VOCAB:
        return dict(GPT2_META)
    if 'merges' in model or any(len(token) != 1 for token in tokens):
        raise ValueError("its tokenizer must be GPT-2's BPE or have single characters as tokens")
    return check_meta(dict(tokenizer='char', vocab_size=len(tokens), chars=tokens,
                           dtype='uint16' if len(tokens) <= 2 ** 16 else 'uint32'),
                      'tokenizer.json')


def check_tokenizer(cfg, set_by, saved, data, say):
    """Raise UserError if the data set has another tokenizer than the options or the model. `set_by`
    has the options that the user set. The model comes from `saved`, the checkpoint of a resumed
    run, or from cfg.init_from. If a resumed run gets another text, say(text) reports this."""
    if 'tokenizer' in set_by and cfg.tokenizer != data.meta['tokenizer']:
        raise UserError(f'tokenizer={cfg.tokenizer}: {data.folder} is already encoded (nearest: '
                        f'--tokenizer={data.meta["tokenizer"]}, or a text file as --dataset)')
    if cfg.init_from in ('scratch', 'resume'):
        theirs, whose = (saved or {}).get('tokenizer'), saved and saved['path']
    else:
        theirs, whose = read_tokenizer(cfg.init_from), cfg.init_from
    if theirs and any(theirs.get(key) != data.meta.get(key) for key in ('tokenizer', 'chars')):
        here, there = ({*meta.get('chars', ())} for meta in (data.meta, theirs))
        new, missing = (''.join(sorted(chars))[:20] for chars in (here - there, there - here))
        raise UserError(f'dataset={cfg.dataset}: its characters differ from those of {whose}; '
                        f'new: {new!r}, missing: {missing!r} (nearest: a text with the same '
                        f'characters and --tokenizer={theirs["tokenizer"]}, or train.py '
                        '--init_from=scratch)')
    if theirs and theirs.get('vocab_size', data.vocab_size) != data.vocab_size:
        raise UserError(f"dataset={cfg.dataset}: has the first {data.vocab_size} tokens of GPT-2's "
                        f'BPE, {whose} the first {theirs["vocab_size"]} (nearest: train.py '
                        '--init_from=scratch)')
    if saved and theirs and theirs.get('sha256') != data.meta.get('sha256'):
        say(f'dataset={cfg.dataset}: not the text that {saved["path"]} was trained on')


# --------------------------------------------------------------------------------------------------
# writing into an empty folder: raises OSError, and UserError for a missing package

def write(folder, config, weights, **notes):
    """Write config.json and model.safetensors. `weights` is a dict from names to tensors. `notes`
    are texts that are stored with the weights. transformers' save_pretrained is not used, because
    it does not flush to disk and raises no OSError if the disk is full."""
    save = _import('safetensors.torch').save
    tensors = {name: w.contiguous() for name, w in weights.items() if name != 'lm_head.weight'}
    write_atomically(folder / WEIGHTS, save(tensors, dict(format='pt', **notes)))
    _write_json(folder / 'config.json', config)


def _write_json(path, content):
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + '\n').encode())


def write_gpt2(folder, args, state, end=None):
    """Write model_args and the state dict of a model without SVD as a GPT2LMHeadModel. A model
    without biases gets zero biases, and "bias": false in its config. `end` is the id of
    <|endoftext|>, or None."""
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
    """Write the tokenizer of a data set's metadata beside the files of `write_gpt2`. `length` is
    the maximal number of tokens in a text. Raises UserError if GPT-2's BPE cannot be loaded."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode, generate_merges
    if meta['tokenizer'] == 'char':
        ids = {c: i for i, c in enumerate(meta['chars'])}
        tokenizer, special = Tokenizer(models.WordLevel(ids, unk_token='<unk>')), {}
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
        tokenizer.decoder = decoders.Fuse()  # without spaces between tokens
    else:
        letters, ranks = bytes_to_unicode(), download.gpt2_encoding()._mergeable_ranks
        ids = {''.join(letters[byte] for byte in token): rank for token, rank in ranks.items()
               if rank < meta['vocab_size']}
        tokenizer = Tokenizer(models.BPE(ids, generate_merges(ids, None)))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        special = {}
        if has_end(meta):
            tokenizer.add_special_tokens([END])
            special = dict.fromkeys(('bos_token', 'eos_token', 'unk_token'), END)
    write_atomically(folder / 'tokenizer.json', tokenizer.to_str().encode())
    # without model_input_names transformers 4 adds token_type_ids, which GPT-2 embeds as tokens
    _write_json(folder / 'tokenizer_config.json', dict(
        tokenizer_class='PreTrainedTokenizerFast', model_max_length=length,
        clean_up_tokenization_spaces=False, model_input_names=['input_ids', 'attention_mask'],
        **special))

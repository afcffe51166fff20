"""Models as config.json, model.safetensors and tokenizer.json: Hugging Face's GPT-2 format, in a folder or by name, and
this repo's own, in a folder, for what no GPT-2 has (an SVD of V, latents, products in the place of layers).

What is read of the first has one shape only, OpenAI's: everything else that such a config.json can ask for, and files
that are damaged, incomplete or of another model, raise UserError. Nothing is unpickled and no code of a folder is run.
"""

import difflib
import functools
import hashlib
import json
import math
import os
import shlex
from contextlib import ExitStack, contextmanager
from pathlib import Path

from runtime import checkpoint, download
from runtime.config import UserError, one_line, safe_repr
from runtime.data import END, GPT2_META
from runtime.files import write_atomically

MODELS = {'gpt2': dict(n_layer=12, n_head=12, n_embd=768),                  # 124M parameters
          'gpt2-medium': dict(n_layer=24, n_head=16, n_embd=1024),          # 350M
          'gpt2-large': dict(n_layer=36, n_head=20, n_embd=1280),           # 774M
          'gpt2-xl': dict(n_layer=48, n_head=25, n_embd=1600)}              # 1558M
# what a config.json that lacks them means; and what it must mean
DEFAULTS = dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50257, n_positions=1024, n_inner=None,
                activation_function='gelu_new', resid_pdrop=0.1, tie_word_embeddings=True)
ONLY = dict(model_type='gpt2', layer_norm_epsilon=1e-5, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
            add_cross_attention=False)
ACTIVATIONS = ('gelu', 'gelu_new', 'gelu_pytorch_tanh')                     # the last two are one function
# nanoGPT's names of the sizes and Hugging Face's; and what its Conv1D stores transposed
FIELDS = dict(n_layer='n_layer', n_head='n_head', n_embd='n_embd', vocab_size='vocab_size', block_size='n_positions',
              dropout='resid_pdrop')
CONV1D = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')
WEIGHTS, INDEX = 'model.safetensors', 'model.safetensors.index.json'
BUFFERS = ('.attn.bias', '.attn.masked_bias')                               # causal masks, in older files
# sha256 of GPT-2's tokens in the order of their ids, then its merges, a line each
GPT2_BPE = '9e52e2d09323136cf31fca11e3a80463fe013e9ccfa1c04ac36c8bb825af904d'
OWN = 'lowrank-gpt'                                                         # the model_type of this repo's own format
ADAPTER = 'lowrank-gpt-adapter'                                             # and of its adapters
ADAPTER_OPTIONS = dict(lora_rank=int, lora_alpha=float, lora_targets=str)


# ----------------------------------------------------------------------------------------------------------------------
# which model

def is_folder(name):
    return os.path.isfile(os.path.join(name, 'config.json'))        # Path.is_file raises for names that are too long


def is_run(name):
    return os.path.isfile(os.path.join(name, 'ckpt.pt')) and not is_folder(name)


def check_name(name, others=()):
    """Raise UserError unless `name` is one of MODELS, a folder with a config.json or a ckpt.pt, or one of `others`."""
    if name in MODELS or name in others or is_folder(name) or is_run(name):
        return
    names = [*others, *MODELS]
    if os.path.isdir(name):
        raise UserError(f"init_from={name!r}: has no ckpt.pt, so it is no run, and no config.json, so it is no model "
                        "in Hugging Face's format")
    raise UserError(f'init_from={name!r}: must be {", ".join(map(repr, names))}, or a folder with a ckpt.pt or '
                    f'config.json (nearest: {difflib.get_close_matches(name.lower(), names, 1, 0)[0]!r})')


# ----------------------------------------------------------------------------------------------------------------------
# reading

def read(name):
    """A model by name or folder, as a checkpoint dict: model_args and state dict (float32), both with nanoGPT's names,
    and what else a run's checkpoint has. A name is looked up in the Hugging Face cache, then on the hub. Of Hugging
    Face's format every size is checked before a weight is read. Raises UserError."""
    check_name(name)
    if is_run(name):
        return checkpoint.load(Path(name) / 'ckpt.pt') | {'path': name}
    try:
        if is_folder(name):
            config = _read_json(Path(name) / 'config.json')
            if config.get('model_type') == OWN:
                args, state = _read_own(config, Path(name) / WEIGHTS)
                return dict(model_args=args, model=state, path=name)
            config = DEFAULTS | config
            files = _files(Path(name))
        else:
            config, files = DEFAULTS | dict(resid_pdrop=0.0) | MODELS[name], [_from_hub(name)]
        _check_config(config)
        args, state = _from_gpt2(config, _read_weights(files, config))
        return dict(model_args=args, model=state, path=name)
    except ImportError as e:
        raise UserError(f'init_from={name!r}: needs a package: pip install {e.name.partition(".")[0]}') from None
    except ValueError as e:
        raise UserError(f'init_from={name!r}: {one_line(e)[:400]}') from None


def _read_json(path):
    """A JSON file's object. Raises ValueError."""
    try:
        content = json.loads(path.read_text(encoding='utf-8-sig'))
    except OSError as e:
        raise ValueError(f'{path.name} cannot be read: {e.strerror}') from None
    except (ValueError, RecursionError, MemoryError) as e:
        raise ValueError(f'{path.name} is damaged, or not JSON ({type(e).__name__})') from None
    if not isinstance(content, dict):
        raise ValueError(f'{path.name} is damaged: no object')
    return content


def _read_own(config, file):
    """-> model_args, state dict. Whether they fit each other is for the model to say. Raises ValueError."""
    args, weights = config.get('model_args'), {}
    if not isinstance(args, dict):
        raise ValueError('its config.json has no model_args')
    with _opened(file) as f:
        for name in f.keys():
            weights[name] = _checked(name, f.get_slice(name).get_dtype(), f.get_tensor(name))
    if 'transformer.wte.weight' not in weights:
        raise ValueError(f'{file.name} lacks weights: transformer.wte.weight')
    return args, weights | {'lm_head.weight': weights['transformer.wte.weight']}


def load_adapter(model, folder, base, say=print):
    """Add the LoRA adapters in a folder, as export.py --to=lora makes it, to the model that they were made on, in place.
    base: the model's name. Raises ValueError where they do not fit."""
    options, tensors, source = read_adapter(folder)
    where = f'lora_adapter={folder!r}'
    if model.config.adaptive_svd or model.config.has_lora:
        raise ValueError(f'{where}: {base} has adapters already (nearest: {merge_command(base)})')
    model.add_adapters(**options)
    names = {f'{name}.{part}': f'{name}.{part}.weight' for name in model.config.lora_layers for part in 'AB'}
    if sorted(names) != sorted(tensors):
        raise ValueError(f'{where}: has other layers than {options["lora_targets"]!r} of {model.config.n_layer} blocks')
    weights = model.transformer.state_dict()                        # the tensors themselves
    for name, key in names.items():
        if weights[key].shape != tensors[name].shape:
            raise ValueError(f'{where}: {name} is {tuple(tensors[name].shape)}, must be {tuple(weights[key].shape)}')
        weights[key].copy_(tensors[name])
    made_on = source.get('base', base)
    if 'base_sha256' not in source:
        say(f'{where}: does not say which weights it was made on')
    elif source['base_sha256'] != base_sha256(model):
        near = '' if made_on == base else f' (nearest: {shlex.quote(f"--init_from={made_on}")})'
        raise ValueError(f'{where}: was made on other weights, of {made_on}, than {base} has{near}')


def merge_command(run):
    """What merges the adapters of a run into its weights."""
    return f'python export.py --to=dense {shlex.quote(f"--out_dir={run}")}'


def base_sha256(model):
    """The checksum of a GPT's weights without LoRA adapters, for c_attn as one layer or three. Positions do not count,
    which a run may crop."""
    digest, own = hashlib.sha256(), [f'{name}.{part}.weight' for name in model.config.lora_layers for part in 'AB']
    for kind in ('weight', 'bias'):                                 # so the bytes of three are those of one
        for name, w in model.transformer.state_dict().items():
            if name.endswith(kind) and name not in (*own, 'wpe.weight'):
                digest.update(w.float().cpu().contiguous().numpy())
    return digest.hexdigest()


def read_adapter(name):
    """A folder that `write` made with ADAPTER -> its options, name -> float32 tensor, and as a dict what it says of its
    base, `base_sha256` and `base`, a name for --init_from. Raises UserError."""
    try:
        config, tensors = _read_json(Path(name) / 'config.json'), {}
        options = config.get('adapter')
        if config.get('model_type') != ADAPTER or not isinstance(options, dict) or {
                key: type(value) for key, value in options.items()} != ADAPTER_OPTIONS:
            raise ValueError('its config.json is not of an adapter, as export.py --to=lora makes it')
        with _opened(Path(name) / WEIGHTS) as f:
            for key in f.keys():
                tensors[key] = _checked(key, f.get_slice(key).get_dtype(), f.get_tensor(key))
            return options, tensors, f.metadata() or {}
    except ImportError as e:
        raise UserError(f'lora_adapter={name!r}: needs a package: pip install {e.name.partition(".")[0]}') from None
    except ValueError as e:
        raise UserError(f'lora_adapter={name!r}: {one_line(e)[:400]}') from None


@contextmanager
def _opened(file):
    """A safetensors file. Raises ValueError for one that is damaged or cannot be read, also within the block."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(file, 'pt') as f:
            yield f
    except SafetensorError as e:
        raise ValueError(f'{Path(file).name} is damaged, or not in safetensors format: {one_line(e)}') from None
    except OSError as e:
        raise ValueError(f'{Path(file).name} cannot be read: {e.strerror or one_line(e)}') from None


def _checked(name, dtype, tensor):
    """The tensor in float32. Raises ValueError for what is no weight."""
    if dtype not in ('F64', 'F32', 'F16', 'BF16'):
        raise ValueError(f'{name}: numbers of type {dtype} in the file, must be floating-point')
    tensor = tensor.float()
    if not tensor.isfinite().all():
        raise ValueError(f'{name} is not finite')
    return tensor


def _files(folder):
    """The safetensors files of a folder. Raises ValueError."""
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        if not (folder / WEIGHTS).exists():
            raise ValueError(f'has no {WEIGHTS}' + (': its pytorch_model.bin is a pickle, which is not read' if (
                folder / 'pytorch_model.bin').exists() else ''))
        return [folder / WEIGHTS]
    shards = _read_json(folder / INDEX).get('weight_map')
    shards = list(shards.values()) if isinstance(shards, dict) else []
    if not shards or not all(isinstance(name, str) and Path(name).name == name for name in shards):
        raise ValueError(f'{INDEX} is damaged: no files in its weight_map')
    missing = sorted(name for name in set(shards) if not os.path.isfile(folder / name))
    if missing:
        raise ValueError(f'{missing[0]} is missing')
    return [folder / name for name in sorted(set(shards))]


def _from_hub(name):
    from huggingface_hub import hf_hub_download
    try:
        return hf_hub_download(f'openai-community/{name}', WEIGHTS)
    except Exception as e:                                          # the hub's own, and its network library's
        raise ValueError(f'its weights are neither in the Hugging Face cache nor to be had: '
                         f'{one_line(e)[:200] or type(e).__name__}') from None


def _check_config(config):
    """Raise ValueError for what is not OpenAI's GPT-2, but for its sizes."""
    for key in ('n_layer', 'n_head', 'n_embd', 'vocab_size', 'n_positions'):
        if type(config[key]) is not int or config[key] < 1:
            raise ValueError(f'its config.json has {key}={safe_repr(config[key])[:40]}: must be a whole number from 1')
    if config['n_embd'] % config['n_head']:
        raise ValueError(f'its config.json has n_head={safe_repr(config["n_head"])[:40]}, of which '
                         f'n_embd={safe_repr(config["n_embd"])[:40]} is no multiple')
    for key, value in ONLY.items():
        if config.get(key, value) != value:
            raise ValueError(f'its config.json has {key}={safe_repr(config[key])[:40]}: only {value} can be had')
    if config['n_inner'] not in (None, 4 * config['n_embd']):
        raise ValueError(f'its config.json has n_inner={safe_repr(config["n_inner"])[:40]}: only None, which is 4 n_embd, '
                         'can be had')
    if config['activation_function'] not in ACTIVATIONS:
        raise ValueError(f'its config.json has activation_function={safe_repr(config["activation_function"])[:40]}: only '
                         f'{", ".join(ACTIVATIONS)} can be had')
    if type(config['resid_pdrop']) not in (int, float) or not 0 <= config['resid_pdrop'] < 1:
        raise ValueError(f'its config.json has resid_pdrop={safe_repr(config["resid_pdrop"])[:40]}: must be at least 0 and '
                         'below 1')


def _shapes(config):
    """Name of every weight -> its shape, but for lm_head."""
    C = config['n_embd']
    shapes = {'wte.weight': (config['vocab_size'], C), 'wpe.weight': (config['n_positions'], C)}
    norms = ['ln_f', *(f'h.{i}.{name}' for i in range(config['n_layer']) for name in ('ln_1', 'ln_2'))]
    linear = {'attn.c_attn': (C, 3 * C), 'attn.c_proj': (C, C), 'mlp.c_fc': (C, 4 * C), 'mlp.c_proj': (4 * C, C)}
    for name in norms:
        shapes |= {f'{name}.weight': (C,), f'{name}.bias': (C,)}
    for i in range(config['n_layer']):
        for name, shape in linear.items():
            shapes |= {f'h.{i}.{name}.weight': shape, f'h.{i}.{name}.bias': shape[1:]}
    return shapes


def _read_weights(files, config):
    """Name -> float32 tensor: all that config asks for, without the prefix 'transformer.', and without lm_head, which
    is wte. Raises ValueError for what is missing, unknown, of another shape, or not finite."""
    with ExitStack() as stack:
        found = {}                                                  # name -> file, name there
        for file in files:
            f = stack.enter_context(_opened(file))
            for stored in f.keys():
                name = stored.removeprefix('transformer.')
                if name in found:
                    raise ValueError(f'{Path(file).name} has {name} a second time')
                if not name.endswith(BUFFERS):
                    found[name] = f, stored
        layers = len({name.split('.')[1] for name in found if name.startswith('h.')})
        if layers != config['n_layer']:                             # before a name is made for each of 10 ** 9
            raise ValueError(f'n_layer={safe_repr(config["n_layer"])[:40]} in config.json, and {layers} layers in the '
                             'file')
        shapes = _shapes(config)
        if 'lm_head.weight' in found or config['tie_word_embeddings'] is False:
            shapes['lm_head.weight'] = shapes['wte.weight']
        for what, names in (('lacks', shapes.keys() - found), ('has unknown', found.keys() - shapes)):
            if names:
                raise ValueError(f'{Path(files[0]).name} {what} weights: {", ".join(sorted(names)[:3])}'
                                 + (f' and {len(names) - 3} more' if len(names) > 3 else ''))
        for name in shapes:
            f, stored = found[name]
            shape = tuple(f.get_slice(stored).get_shape())
            if shape != shapes[name]:
                raise ValueError(f'{name}: shape {shape} in the file, {shapes[name]} in the model')
        weights = {name: _checked(name, f.get_slice(stored).get_dtype(), f.get_tensor(stored))
                   for name, (f, stored) in found.items()}
    if not weights.get('lm_head.weight', weights['wte.weight']).equal(weights['wte.weight']):
        raise ValueError('lm_head.weight and wte.weight differ, which are one tensor here')
    weights.pop('lm_head.weight', None)
    return weights


def read_tokenizer(name):
    """The tokenizer of a model that `check_name` takes, as a data set's meta; None for a folder without one. Raises
    UserError for all but tokenizers of single characters, as `write` makes them, and GPT-2's BPE."""
    if is_run(name):
        return checkpoint.load(Path(name) / 'ckpt.pt').get('tokenizer')
    if not is_folder(name):
        return dict(GPT2_META)
    folder = Path(name)
    try:
        if (folder / 'tokenizer.json').exists():
            meta = _meta_of(_read_json(folder / 'tokenizer.json'))
        elif (folder / 'vocab.json').exists() and (folder / 'merges.txt').exists():
            merges = (folder / 'merges.txt').read_text(encoding='utf-8').split('\n')
            merges = [line for line in merges if line and not line.startswith('#version')]
            meta = GPT2_META if _bpe_hash(_read_json(folder / 'vocab.json'), merges) == GPT2_BPE else None
        else:
            return None
        if meta:
            return dict(meta)
    except (KeyError, TypeError, AttributeError, ValueError, OSError, RecursionError) as e:
        raise UserError(f'init_from={name!r}: its tokenizer cannot be used: {one_line(e)[:200]}') from None
    raise UserError(f"init_from={name!r}: its tokenizer is neither one of single characters nor GPT-2's BPE, which are "
                    'the two that can be had')


def _meta_of(spec):
    """A tokenizer.json -> meta, or None. Raises KeyError, TypeError, AttributeError or ValueError."""
    vocab, merges = spec['model']['vocab'], spec['model'].get('merges')
    if merges is None:
        chars = sorted(vocab, key=vocab.get)
        ours, what = _char_spec(chars), ('added_tokens', 'normalizer', 'pre_tokenizer', 'decoder', 'model')
        if not chars or any(len(c) != 1 for c in chars) or any(spec.get(key) != ours[key] for key in what):
            return None
        ''.join(chars).encode()                                     # half characters cannot be printed
        return dict(tokenizer='char', vocab_size=len(chars), dtype='uint16' if len(chars) <= 2 ** 16 else 'uint32',
                    chars=chars)
    split = spec['pre_tokenizer'] or {}
    plain = spec.get('normalizer') is None and split.get('type') == 'ByteLevel' and not split.get('add_prefix_space')
    # tokens that were added (for padding, say) stand for no text
    plain = plain and split.get('use_regex', True) and all(t['special'] for t in spec.get('added_tokens') or [])
    merges = [pair if isinstance(pair, str) else ' '.join(pair) for pair in merges]
    return GPT2_META if plain and _bpe_hash(vocab, merges) == GPT2_BPE else None


def _bpe_hash(vocab, merges):
    """What tells GPT-2's BPE from another: vocab (token -> id), merges ('a b', in order)."""
    tokens = sorted((t for t in vocab if vocab[t] < GPT2_META['vocab_size']), key=vocab.get)
    return hashlib.sha256('\n'.join([*tokens, *merges]).encode(errors='replace')).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# nanoGPT's names and Hugging Face's; this repo's own format has nanoGPT's

def _from_gpt2(config, weights):
    """-> model_args, state dict. Models without biases come back without: `to_gpt2` leaves a mark, and it holds as long
    as nobody has trained the zeros."""
    args = {ours: config[theirs] for ours, theirs in FIELDS.items()}
    args['gelu'] = 'exact' if config['activation_function'] == 'gelu' else 'tanh'
    biases = {name: w for name, w in weights.items() if name.endswith('.bias')}
    args['bias'] = config.get('bias') is not False or any(w.any() for w in biases.values())
    state = {f'transformer.{name}': w.t() if name.endswith(CONV1D) else w for name, w in weights.items()
             if args['bias'] or name not in biases}
    return args, state | {'lm_head.weight': state['transformer.wte.weight']}


def to_gpt2(args, state):
    """model_args and the state dict of a model without an SVD -> config, weights as GPT2LMHeadModel has them. A model
    without biases has zeros there, and "bias": false in its config."""
    weights = {name: w.t() if name.endswith(CONV1D) else w for name, w in state.items() if name != 'lm_head.weight'}
    config = {theirs: args[ours] for ours, theirs in FIELDS.items()}
    config |= dict(architectures=['GPT2LMHeadModel'], model_type='gpt2', n_inner=None, embd_pdrop=args['dropout'],
                   attn_pdrop=args['dropout'], activation_function='gelu' if args['gelu'] == 'exact' else 'gelu_new',
                   layer_norm_epsilon=1e-5, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None)
    if not args['bias']:
        config['bias'] = False
        weights |= {name.removesuffix('weight') + 'bias': w.new_zeros(w.shape[-1]) for name, w in weights.items()
                    if not name.startswith('transformer.w')}        # wte, wpe
    return config, weights


# ----------------------------------------------------------------------------------------------------------------------
# writing

def to_own(args, state):
    """model_args and the state dict of any model of this repo -> config, weights for `write`."""
    return (dict(model_type=OWN, model_args=args, n_positions=args['block_size']),
            {name: w for name, w in state.items() if name != 'lm_head.weight'})


def check_tokenizer(cfg, set_by, saved, data, say):
    """Refuse data in other tokens than those asked for, or those that the model was trained on."""
    if 'tokenizer' in set_by and cfg.tokenizer != data.meta['tokenizer']:
        raise UserError(f'tokenizer={cfg.tokenizer}: {data.folder} is encoded with {data.meta["tokenizer"]!r}; '
                        'only text files can be encoded anew')
    if cfg.init_from in ('scratch', 'resume'):
        theirs, whose = (saved or {}).get('tokenizer'), saved and saved['path']
    else:
        theirs, whose = read_tokenizer(cfg.init_from), cfg.init_from
    if theirs and any(theirs.get(key) != data.meta.get(key) for key in ('tokenizer', 'chars')):
        here, there = (set(meta.get('chars', ())) for meta in (data.meta, theirs))
        new, missing = (''.join(sorted(chars))[:20] for chars in (here - there, there - here))
        words = (f'; new: {new!r}, missing: {missing!r} (nearest: a text of just the same ones, or train.py '
                 '--init_from=scratch)' if here and there else f' (nearest: a text, --tokenizer={theirs["tokenizer"]})')
        raise UserError(f'dataset={cfg.dataset}: its characters are not those of {whose}{words}')
    if saved and theirs and theirs.get('sha256') != data.meta.get('sha256'):
        say(f'dataset={cfg.dataset}: another text than the one of {saved["path"]}')


def write(folder, config, weights, meta, **notes):
    """Fill an empty folder: config.json, model.safetensors and, unless meta is None, the two files of its tokenizer.
    weights: name -> tensor; notes: texts beside them. Raises UserError for a missing package and OSError."""
    try:
        from safetensors.torch import save
    except ImportError as e:
        raise UserError(f'needs a package: pip install {e.name.partition(".")[0]}') from None
    # not save_file, whose files are flushed nowhere and private to their owner
    content = save({name: w.contiguous() for name, w in weights.items()}, metadata=dict(format='pt', **notes))
    write_atomically(folder / WEIGHTS, content)
    files = {'config.json': config}
    if meta:
        # transformers before 5 adds token_type_ids to what it is not told, and GPT-2 looks them up in its embedding
        limit = dict(model_max_length=config['n_positions'], clean_up_tokenization_spaces=False,
                     model_input_names=['input_ids', 'attention_mask'])
        if meta['tokenizer'] == 'char':
            files['tokenizer.json'] = _char_spec(meta['chars'])
            files['tokenizer_config.json'] = dict(tokenizer_class='PreTrainedTokenizerFast', **limit)
        else:
            files['tokenizer.json'] = _bpe_spec(download.gpt2_encoding())
            files['tokenizer_config.json'] = dict(tokenizer_class='GPT2Tokenizer', add_prefix_space=False,
                                                  bos_token=END, eos_token=END, unk_token=END, **limit)
    for name, content in files.items():
        write_atomically(folder / name, (json.dumps(content, indent=2, ensure_ascii=False) + '\n').encode())


def _char_spec(chars):
    """tokenizer.json of a vocabulary of single characters: each is a token, and tokens are joined by nothing."""
    return dict(version='1.0', truncation=None, padding=None, added_tokens=[], normalizer=None,
                pre_tokenizer=dict(type='Split', pattern=dict(Regex=r'[\s\S]'), behavior='Isolated', invert=False),
                post_processor=None, decoder=dict(type='Fuse'),
                model=dict(type='WordLevel', vocab={c: i for i, c in enumerate(chars)}, unk_token='<unk>'))


def _bpe_spec(encoding):
    """tokenizer.json of a tiktoken.Encoding whose pattern is GPT-2's."""
    ranks, letters = encoding._mergeable_ranks, _byte_letters()

    def written(token):
        return ''.join(letters[byte] for byte in token)

    vocab = {written(token): rank for token, rank in sorted(ranks.items(), key=lambda item: item[1])}
    merges = [[written(a), written(b)] for a, b in _merges(ranks)]
    level = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True, use_regex=True)
    end = dict(id=encoding.eot_token, content=END, single_word=False, lstrip=False, rstrip=False, normalized=False,
               special=True)
    return dict(version='1.0', truncation=None, padding=None, added_tokens=[end], normalizer=None, pre_tokenizer=level,
                post_processor=level | dict(trim_offsets=False), decoder=level,
                model=dict(type='BPE', dropout=None, unk_token=None, continuing_subword_prefix='',
                           end_of_word_suffix='', fuse_unk=False, byte_fallback=False, ignore_merges=False,
                           vocab=vocab | {END: encoding.eot_token}, merges=merges))


def _merges(ranks):
    """Mergeable ranks (bytes -> rank) -> pairs of bytes in order: a token's last merge is that of the two parts that
    the merges before it leave."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], math.inf))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            yield parts


@functools.cache
def _byte_letters():
    """GPT-2's letter for each byte: itself where it is printed, else one from 256 on."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printed else next(others)) for byte in range(256)]

"""Configuration: the fields of a dataclass, set by defaults, config files and --key=value options.

Config files override the defaults, and options override config files. A field is declared as
`name: Annotated[type, 'help', ...] = default`. The type is bool, int, float, str, None,
Literal[...], dict[str, int], list[int] or a union of these. Marks can follow the help text:
`Range`, `Needs`, `Section`, OVERRIDABLE, SWITCH and PATH.

Config files are Python and run from top to bottom. They can read earlier values by name, import
modules and use helper variables whose names start with an underscore. Wrong input raises UserError
with a one-line message: what is wrong, where, and the nearest valid choice.
"""

import ast
import difflib
import functools
import math
import numbers
import os
import sys
import textwrap
import traceback
import types
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parents[1]              # scripts in it are not config files
SWITCH = 'switch'                                       # a bool that can be given as --name
PATH = 'path'                                           # a leading ~ is the home folder
OVERRIDABLE = 'overridable'                             # may differ from a checkpoint's value
WORDS = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'text',
         type(None): 'None', dict[str, int]: "a dict like {'name': 1}",
         list[int]: 'a list like [8, 8]'}
OPTION_SYNTAX = 'options are written --key=value; --help lists them'
NUMBERS = {int: numbers.Integral, float: numbers.Real}  # numpy's numbers are included


@dataclass(frozen=True)
class Range:
    """Bounds of a number: least <= value < below, and value > above. None and the numbers of
    a list are always valid."""
    least: float = -math.inf
    below: float = math.inf
    above: float = -math.inf

    def fault(self, value) -> str:
        """Return what is wrong with a value, or '' if it is valid."""
        if value is None or isinstance(value, list) or (
                self.least <= value < self.below and value > self.above):
            return ''
        bounds = {'at least': self.least, 'above': self.above, 'below': self.below}
        words = ' and '.join(f'{w} {bound}' for w, bound in bounds.items() if math.isfinite(bound))
        return f'must be {words}' + f' (nearest: {self.least})' * (value < self.least)


class Needs(dict):
    """Values of other fields without which an option has no effect, as Needs(decay_lr=True)."""


class Section(str):
    """Heading in --help of a field and of the fields after it, up to the next Section."""


class UserError(ValueError):
    """Wrong input. Commands print the message as one line and exit with code 2. Characters that
    would break the line or control a terminal are escaped."""
    code = 2

    def __init__(self, text):
        super().__init__(''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text))


class Failure(UserError):
    """An error that the input did not cause: a full disk, a lost process, NaN or infinite values.
    Commands exit with code 1."""
    code = 1


# --------------------------------------------------------------------------------------------------
# reading: command line, config files, other files

def load(cls, argv: list[str]):
    """Return an instance of dataclass `cls` from argv, and a dict from each key that the user set
    to where it was set. Raises UserError."""
    values, set_by = parse(cls, argv)
    return build(cls, values, set_by), set_by


def parse(cls, argv: list[str], base: dict | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    """Parse config files and --key=value options, in any order. Options override files.

    Returns a dict of all values, each in its type, and a dict from each key that the user set to
    where it was set. Raises UserError. The values in `base`, such as a checkpoint's options,
    replace the defaults.
    """
    hints, set_by = hints_of(cls), {}
    values = {f.name: f.default for f in fields(cls)} | (base or {})
    # parsed before the files, so that the error of '--key value' names --key
    options = [parse_option(arg, hints) for arg in argv if arg.startswith('-')]
    for path in (arg for arg in argv if not arg.startswith('-')):
        for key, value in run_config_file(path, values, hints).items():
            values[key], set_by[key] = check(key, value, hints[key], path), path
    values |= dict(options)
    return values, set_by | {key: 'the command line' for key, _ in options}


def build(cls, values: dict, set_by: dict, otherwise='default'):
    """Return an instance of `cls`. A ValueError whose message starts with "key=" becomes a
    UserError that says where the key was set. If the user did not set the key, the message says
    `otherwise`."""
    try:
        return cls(**values)
    except (ValueError, OSError) as e:  # OSError: a path could not be checked
        key = str(e).partition('=')[0]
        raise UserError(f'{e} [{set_by.get(key, otherwise)}]' if key in values else str(e)
                        ) from None


def parse_option(arg: str, hints: dict) -> tuple[str, Any]:
    """Parse '--key=value' into the key and the checked value. Raises UserError."""
    name, equals, text = arg.partition('=')
    key = name.removeprefix('--')
    if key not in hints or name == key:
        raise UserError(f'{name}: no such option{did_you_mean(key, hints, "--")}')
    if not equals and SWITCH in get_args(hints[key]):
        return key, True
    if not equals:
        raise UserError(f'--{key}: has no value (nearest: --{key}=VALUE, where VALUE is '
                        f'{describe(hints[key])})')
    try:
        value = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        value = text                                    # literal_eval documents these errors
    if not coerce(value, hints[key])[0] and coerce(text, hints[key])[0]:
        value = text                                    # a folder may be called 123
    return key, check(key, value, hints[key], 'the command line')


def run_config_file(path: str, values: dict, hints: dict) -> dict[str, Any]:
    """Run a config file and return the values that it sets, without checking them. The file can
    read `values` by name. Raises UserError if the file fails or sets an unknown option."""
    try:
        tree = ast.parse(Path(path).read_text(encoding='utf-8-sig'), filename=path)
        code = compile(tree, path, 'exec')
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f'{path}: no such config file{suggest_option(path, hints)}') from None
    except SyntaxError as e:
        raise UserError(f'{path}, line {e.lineno}: {e.msg}') from None
    except (OSError, ValueError) as e:
        raise UserError(f'{path}: cannot be read as a Python file: {one_line(e)}') from None
    for node in tree.body:                                          # YAML and JSON are Python, too
        if (isinstance(node, ast.AnnAssign) and node.value is None
                or isinstance(node, ast.Expr) and isinstance(node.value, ast.Dict)):
            raise UserError(f'{path}, line {node.lineno}: sets no option (options are written '
                            'key = value)')
    namespace = dict(values, __name__='config', __file__=path)
    try:
        exec(code, namespace)
    except (Exception, SystemExit) as e:
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == path]
        raise UserError(f'{path}, line {lines[-1]}: {type(e).__name__}: {one_line(e)}') from None
    for key, value in namespace.items():
        if not (key in hints or key.startswith('_') or callable(value)
                or isinstance(value, types.ModuleType)):
            raise UserError(f'{path}: {key}: no such option{did_you_mean(key, hints)}'
                            '; helper variables start with an underscore')
    # assigning the current value counts as setting it; `from other import *` has no assignment
    assigned = {node.id for node in ast.walk(tree)
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return {key: value for key, value in namespace.items()
            if key in hints and (key in assigned or value is not values[key])}


def check_all(cls, values: dict, where) -> dict[str, Any]:
    """Convert the values read from a file to the types of the fields of `cls`. Keys that are not
    fields are dropped. Raises a UserError that names `where`."""
    return {key: check(key, value, hints_of(cls)[key], where) for key, value in values.items()
            if key in hints_of(cls)}


def check(key: str, value, hint, where=''):
    """Return a value in the type of `hint`, or raise a UserError that names `where`."""
    ok, converted = coerce(value, hint)
    if not ok:
        raise UserError(f'{key}={value!r}: must be {describe(hint)}{nearest(value, hint)}'
                        + (f' [{where}]' if where else ''))
    is_path = PATH in get_args(hint) and isinstance(converted, str)
    return os.path.expanduser(converted) if is_path else converted


def coerce(value, hint) -> tuple[bool, Any]:
    """Convert a value to the type of `hint`. Return (True, the value), or (False, None) if the
    value does not fit. An int fits a float, but True does not fit an int. Numbers must be
    finite."""
    for kind in alternatives(hint):
        if get_origin(kind) is Literal:
            ok = any(type(value) is type(a) and value == a for a in get_args(kind))
        elif kind == dict[str, int]:
            ok = isinstance(value, dict) and all(
                type(k) is str and type(v) is int for k, v in value.items())
        elif kind == list[int]:
            ok = isinstance(value, list) and all(type(v) is int for v in value)
        elif kind in NUMBERS:
            ok = (isinstance(value, NUMBERS[kind]) and not isinstance(value, bool)
                  and abs(value) <= sys.float_info.max)
        else:
            ok = isinstance(value, kind)
        if ok:
            return True, kind(value) if kind in NUMBERS else value
    return False, None


# --------------------------------------------------------------------------------------------------
# fields and their marks

@functools.cache
def hints_of(cls) -> dict[str, Any]:
    """Return a dict from the fields of a dataclass to their annotations."""
    return get_type_hints(cls, include_extras=True)


def alternatives(hint) -> tuple:
    """Return the types of an annotation: (int, NoneType) for Annotated[int | None, ...]."""
    kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return get_args(kind) if get_origin(kind) in (types.UnionType, Union) else (kind,)


def marked(cls, mark) -> list[str]:
    """Return the names of the fields that have a mark, for example OVERRIDABLE."""
    return [key for key, hint in hints_of(cls).items() if mark in get_args(hint)]


def validate(cfg):
    """Convert each field of a dataclass instance to its type. For a value of another type or out of
    range, raises ValueError with a message that starts with "name="."""
    for key, hint in hints_of(type(cfg)).items():
        value = check(key, getattr(cfg, key), hint)
        setattr(cfg, key, value)
        for fault in (mark.fault(value) for mark in get_args(hint) if isinstance(mark, Range)):
            if fault:
                raise ValueError(f'{key}={value}: {fault}')


def has_effect(cfg, key: str, cls=None) -> bool:
    """Return whether an option has an effect, given the other options in `cfg`. cls: the dataclass
    whose `Needs` marks are read; None: type(cfg)."""
    return all(getattr(cfg, name) == value for needs in get_args(hints_of(cls or type(cfg))[key])
               if isinstance(needs, Needs) for name, value in needs.items())


def unused_options(options, cfg) -> list[str]:
    """Return the fields of `options` that differ from their defaults but have no effect on a model
    with the configuration `cfg`."""
    settings = {key: getattr(cfg, key) for key in dir(cfg) if key[0] != '_'}        # properties too
    both = types.SimpleNamespace(**vars(options) | settings)
    return [f.name for f in fields(options) if getattr(options, f.name) != f.default
            and not has_effect(both, f.name, type(options))]


# --------------------------------------------------------------------------------------------------
# words

def describe(hint) -> str:
    """Return a type in words, such as "a whole number or None"."""
    return ' or '.join(WORDS[kind] if kind in WORDS else ' or '.join(map(repr, get_args(kind)))
                       for kind in alternatives(hint))


def nearest(value, hint) -> str:
    """Return ' (nearest: ...)' for a value of the wrong type, or '' if no choice is similar."""
    kinds = alternatives(hint)
    choices = [a for kind in kinds if get_origin(kind) is Literal for a in get_args(kind)
               if isinstance(a, str)]
    if choices and isinstance(value, str):
        return f' (nearest: {difflib.get_close_matches(value.lower(), choices, 1, 0)[0]!r})'
    if int in kinds and isinstance(value, float) and math.isfinite(value):
        return f' (nearest: {round(value)})'
    return ''


def suggest_option(word: str, hints: dict) -> str:
    """Suggest a correction for an argument that is not a config file: an option without its
    dashes, the folder of a run, or a config file with a similar name."""
    key, equals, value = word.partition('=')
    option = key.replace('-', '_')
    if option in hints:
        return f' (nearest: --{option}={value if equals else "VALUE"})'
    if 'out_dir' in hints and os.path.exists(os.path.join(word, 'ckpt.pt')):
        return f' (nearest: --out_dir={word})'
    scripts = {p.stem.lower(): p for folder in (Path('config'), Path(word).parent)
               for p in folder.glob('*.py') if p.resolve().parent != ROOT}
    close = difflib.get_close_matches(Path(word).stem.lower(), scripts, 1, 0.5)
    return f' (nearest: {scripts[close[0]]})' if close else f' ({OPTION_SYNTAX})'


def did_you_mean(word, choices, prefix='', other=OPTION_SYNTAX) -> str:
    """Return ' (nearest: CHOICE)' for the choice most similar to a word, or ' (OTHER)'."""
    close = difflib.get_close_matches(str(word).lower(), list(choices), 1, 0.5)
    return f' (nearest: {prefix}{close[0]})' if close else f' ({other})'


def one_line(error) -> str:
    """Return the text of an exception without line breaks."""
    return ' '.join(str(error).split())


def option_groups(cls) -> dict[str, list[tuple[str, str, str]]]:
    """Return a dict: heading -> (name, default, meaning) of each option under it. The default of a
    switch is ''. The meaning ends with the type if the default is None."""
    heading, groups = 'options', {}
    for f in fields(cls):
        hint = hints_of(cls)[f.name]
        marks = get_args(hint)
        heading = next((mark for mark in marks if isinstance(mark, Section)), heading)
        kind = '' if f.default is not None else f' [{describe(hint).removesuffix(" or None")}]'
        default = '' if SWITCH in marks else repr(f.default)
        groups.setdefault(heading, []).append((f.name, default, marks[1] + kind))
    return groups


def help_text(cls, usage: str) -> str:
    """Return the text of --help: the usage, then each option under its heading."""
    lines = [usage, '', 'Options, as --key=value or as a line "key = value" of a config file:']
    for heading, options in option_groups(cls).items():
        lines += [f'{heading}:', *(textwrap.fill(
            meaning, 100, initial_indent=f'  --{name}{default and "="}{default} '.ljust(36),
            subsequent_indent=' ' * 36, break_on_hyphens=False, break_long_words=False)
            for name, default, meaning in options)]
    return '\n'.join(lines)


def dump(cfg, comment='') -> str:
    """Return a configuration as the text of a config file that sets every option."""
    return comment + ''.join(f'{f.name} = {getattr(cfg, f.name)!r}\n' for f in fields(cfg))

"""Configuration: defaults < config files < --key=value, checked against a dataclass's annotations.

A field reads `name: Annotated[type, 'help', ...] = default`. type is bool, int, float, str, None,
Literal[...], dict[str, int] or a union of these. Marks after the help say more: `Range`, `Needs`,
`Section`, OVERRIDABLE, SWITCH and PATH.

Config files are Python, run from top to bottom. They may read the values before them by name,
import modules and use names that start with an underscore. Wrong input raises UserError, whose text
is one line: what, where, the nearest valid choice.
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

ROOT = Path(__file__).resolve().parents[1]              # its scripts are not config files
SWITCH = 'switch'                                       # a bool that may be written bare, --name
PATH = 'path'                                           # a leading ~ stands for the home folder
OVERRIDABLE = 'overridable'                             # may differ from a loaded checkpoint's
WORDS = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'text',
         type(None): 'None', dict[str, int]: "a dict of names and whole numbers, like {'name': 1}"}
NUMBERS = {int: numbers.Integral, float: numbers.Real}  # numpy's numbers pass


@dataclass(frozen=True)
class Range:
    """Bounds of a number: least <= value, above < value < below. None passes."""
    least: float = -math.inf
    below: float = math.inf
    above: float = -math.inf

    def fault(self, value) -> str:
        """What is wrong with a value; '' if nothing is."""
        if value is None or self.least <= value < self.below and value > self.above:
            return ''
        bounds = {'at least': self.least, 'above': self.above, 'below': self.below}
        words = ' and '.join(f'{w} {bound}' for w, bound in bounds.items() if math.isfinite(bound))
        return f'must be {words}' + f' (nearest: {self.least})' * (value < self.least)


class Needs(dict):
    """Values of other fields without which an option changes nothing: Needs(decay_lr=True)."""


class Section(str):
    """The heading in --help of a field and of those after it, up to the next mark."""


class UserError(ValueError):
    """The user's input was wrong. Commands print it as one line and exit with code 2; characters
    that would break the line, or steer a terminal, are escaped."""
    code = 2

    def __init__(self, text):
        super().__init__(''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text))


class Failure(UserError):
    """A command cannot go on, but its input was right: a full disk, a lost process, numbers that
    are not finite."""
    code = 1


# --------------------------------------------------------------------------------------------------
# reading: command line, config files, other files

def load(cls, argv: list[str]):
    """argv -> an instance of dataclass `cls`, and a dict: keys that the user set -> where."""
    values, set_by = parse(cls, argv)
    return build(cls, values, set_by), set_by


def parse(cls, argv: list[str], base: dict | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    """argv (config files and --key=value in any order; files count first) -> a dict of all values,
    each of its type, and a dict: keys that the user set -> where. `base` replaces defaults (a
    checkpoint's configuration). Raises UserError."""
    hints, set_by = hints_of(cls), {}
    values = {f.name: f.default for f in fields(cls)} | (base or {})
    # options before files: the error of '--key value' is about --key
    options = [parse_option(arg, hints) for arg in argv if arg.startswith('-')]
    for path in (arg for arg in argv if not arg.startswith('-')):
        for key, value in run_config_file(path, values, hints).items():
            values[key], set_by[key] = check(key, value, hints[key], path), path
    values |= dict(options)
    return values, set_by | {key: 'the command line' for key, _ in options}


def build(cls, values: dict, set_by: dict, otherwise='default'):
    """The instance of `cls`. A ValueError that starts with "key=" becomes a UserError that says
    where key was set."""
    try:
        return cls(**values)
    except (ValueError, OSError) as e:                  # OSError: of a path that was looked at
        key = str(e).partition('=')[0]
        raise UserError(f'{e} [{set_by.get(key, otherwise)}]' if key in values else str(e)
                        ) from None


def parse_option(arg: str, hints: dict) -> tuple[str, Any]:
    """'--key=value' -> key, checked value."""
    name, equals, text = arg.partition('=')
    key = name.removeprefix('--')
    if key not in hints or name == key:
        raise UserError(f'{name}: no such option{did_you_mean(key, hints, "--")}')
    if not equals and SWITCH in get_args(hints[key]):
        return key, True
    if not equals:
        raise UserError(f'--{key}: needs a value, written --{key}=VALUE, which is '
                        f'{describe(hints[key])}')
    try:
        value = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):   # as it documents
        value = text
    if not coerce(value, hints[key])[0] and coerce(text, hints[key])[0]:
        value = text                                    # --out_dir=123 names a folder
    return key, check(key, value, hints[key], 'the command line')


def run_config_file(path: str, values: dict, hints: dict) -> dict[str, Any]:
    """Run a config file with the current values visible -> the values that it sets, unchecked."""
    try:
        tree = ast.parse(Path(path).read_text(encoding='utf-8-sig'), filename=path)
        code = compile(tree, path, 'exec')
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f'{path}: no such config file{suggest_option(path, hints)}') from None
    except SyntaxError as e:
        raise UserError(f'{path}, line {e.lineno}: {e.msg}') from None
    except (OSError, ValueError) as e:
        raise UserError(f'{path}: cannot be read as a Python file: {one_line(e)}') from None
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
                            ' (a helper variable may start with an underscore)')
    # a value that is set to what it was counts as set; `from other import *` assigns no name
    assigned = {node.id for node in ast.walk(tree)
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return {key: value for key, value in namespace.items()
            if key in hints and (key in assigned or value is not values[key])}


def check_all(cls, values: dict, where) -> dict[str, Any]:
    """The values of a file for fields of `cls`, each of its type; other keys are left out."""
    return {key: check(key, value, hints_of(cls)[key], where) for key, value in values.items()
            if key in hints_of(cls)}


def check(key: str, value, hint, where=''):
    """The value in the hint's type. Raises UserError that says where it was set."""
    ok, converted = coerce(value, hint)
    if not ok:
        raise UserError(f'{key}={value!r}: must be {describe(hint)}{nearest(value, hint)}'
                        + (f' [{where}]' if where else ''))
    is_path = PATH in get_args(hint) and isinstance(converted, str)
    return os.path.expanduser(converted) if is_path else converted


def coerce(value, hint) -> tuple[bool, Any]:
    """(True, the value in the hint's type) or (False, None). A whole number passes for a float,
    True does not pass for 1; numbers are finite."""
    for kind in alternatives(hint):
        if get_origin(kind) is Literal:
            ok = any(type(value) is type(a) and value == a for a in get_args(kind))
        elif kind == dict[str, int]:
            ok = isinstance(value, dict) and all(
                type(k) is str and type(v) is int for k, v in value.items())
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
    """Field of a dataclass -> its annotation."""
    return get_type_hints(cls, include_extras=True)


def alternatives(hint) -> tuple:
    """The types of an annotation: Annotated[int | None, ...] -> (int, NoneType)."""
    kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return get_args(kind) if get_origin(kind) in (types.UnionType, Union) else (kind,)


def marked(cls, mark) -> list[str]:
    """Names of the fields that have a mark, for example OVERRIDABLE."""
    return [key for key, hint in hints_of(cls).items() if mark in get_args(hint)]


def validate(cfg):
    """Give each field of a dataclass instance its type. Raises ValueError, its message starting
    with "name=", for a value of another type or out of its range."""
    for key, hint in hints_of(type(cfg)).items():
        value = check(key, getattr(cfg, key), hint)
        setattr(cfg, key, value)
        for fault in (mark.fault(value) for mark in get_args(hint) if isinstance(mark, Range)):
            if fault:
                raise ValueError(f'{key}={value}: {fault}')


def has_effect(cfg, key: str, cls=None) -> bool:
    """Whether an option changes anything beside the others of `cfg`. cls: where `Needs` are read;
    None: the type of cfg."""
    return all(getattr(cfg, name) == value for needs in get_args(hints_of(cls or type(cfg))[key])
               if isinstance(needs, Needs) for name, value in needs.items())


def unused_options(options, cfg) -> list[str]:
    """Fields of `options` that are not at their default, but change nothing in a model of
    configuration cfg."""
    settings = {key: getattr(cfg, key) for key in dir(cfg) if key[0] != '_'}        # properties too
    both = types.SimpleNamespace(**vars(options) | settings)
    return [f.name for f in fields(options) if getattr(options, f.name) != f.default
            and not has_effect(both, f.name, type(options))]


# --------------------------------------------------------------------------------------------------
# words

def describe(hint) -> str:
    """A type in words: "a whole number or None"."""
    return ' or '.join(WORDS[kind] if kind in WORDS else ' or '.join(map(repr, get_args(kind)))
                       for kind in alternatives(hint))


def nearest(value, hint) -> str:
    """' (nearest: ...)' for a value of the wrong type; '' if nothing is near."""
    kinds = alternatives(hint)
    choices = [a for kind in kinds if get_origin(kind) is Literal for a in get_args(kind)
               if isinstance(a, str)]
    if choices and isinstance(value, str):
        return f' (nearest: {difflib.get_close_matches(value.lower(), choices, 1, 0)[0]!r})'
    if int in kinds and isinstance(value, float) and math.isfinite(value):
        return f' (nearest: {round(value)})'
    return ''


def suggest_option(word: str, hints: dict) -> str:
    """A correction for an argument that is not a config file: an option without its dashes, the
    folder of a run, or a config file of a similar name."""
    key, equals, value = word.partition('=')
    option = key.replace('-', '_')
    if option in hints:
        return f' (nearest: --{option}={value if equals else "VALUE"})'
    if 'out_dir' in hints and os.path.exists(os.path.join(word, 'ckpt.pt')):
        return f' (nearest: --out_dir={word})'
    scripts = (p for folder in (Path(word).parent, Path('config')) for p in folder.glob('*.py'))
    return did_you_mean(word, sorted(str(p) for p in scripts if p.resolve().parent != ROOT))


def did_you_mean(word, choices, prefix='',
                 other='options are written --key=value; --help lists them') -> str:
    """The choice that is nearest to a word, in brackets; `other` if none is near."""
    close = difflib.get_close_matches(str(word).lower(), list(choices), 1, 0.5)
    return f' (nearest: {prefix}{close[0]})' if close else f' ({other})'


def one_line(error) -> str:
    """The text of an exception, without line breaks."""
    return ' '.join(str(error).split())


def option_groups(cls) -> dict[str, list]:
    """Heading -> the fields of `cls` under it, in their order."""
    heading, groups = 'options', {}
    for f in fields(cls):
        marks = get_args(hints_of(cls)[f.name])
        heading = next((mark for mark in marks if isinstance(mark, Section)), heading)
        groups.setdefault(heading, []).append(f)
    return groups


def help_text(cls, usage: str) -> str:
    """Every option under its heading, with default and meaning, and its type if the default does
    not show it."""
    lines = [usage, '', 'Options, as --key=value or as a line "key = value" of a config file:']
    for heading, group in option_groups(cls).items():
        lines.append(f'{heading}:')
        for f in group:
            hint = hints_of(cls)[f.name]
            written = f'  --{f.name}' if SWITCH in get_args(hint) else f'  --{f.name}={f.default!r}'
            kind = '' if f.default is not None else f' [{describe(hint).removesuffix(" or None")}]'
            lines.append(textwrap.fill(
                get_args(hint)[1] + kind, 100, initial_indent=f'{written} '.ljust(36),
                subsequent_indent=' ' * 36, break_on_hyphens=False, break_long_words=False))
    return '\n'.join(lines)


def dump(cfg, comment='') -> str:
    """A configuration as the text of a config file that sets every key."""
    return comment + ''.join(f'{f.name} = {getattr(cfg, f.name)!r}\n' for f in fields(cfg))

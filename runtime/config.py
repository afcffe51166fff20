"""Configuration: defaults < config files < --key=value, checked against the annotations of a dataclass.

A field reads `name: Annotated[type, 'help', ...] = default`. type is bool, int, float, str, None, Literal[...],
dict[str, int] or a union of these. What else there is to know of an option follows its help: its `Range`, what it
`Needs` to have an effect, OVERRIDABLE, SWITCH (a bool that may be written bare, --name) and PATH (a leading ~ stands
for the home folder). Config files are Python run from top to bottom; they may read the values before them by name,
import modules and use names that start with an underscore. Everything wrong raises UserError, whose text is one line:
what, where, the nearest valid choice.
"""

import ast
import difflib
import functools
import math
import numbers
import os
import shlex
import types
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parents[1]                          # its scripts are no config files
SWITCH, PATH = 'switch', 'path'
OVERRIDABLE = 'overridable'         # may differ from the checkpoint whose weights are loaded


@dataclass(frozen=True)
class Range:
    """Bounds of a number; None passes."""
    least: float = -math.inf
    below: float = math.inf
    above: float = -math.inf

    def fault(self, value):
        """What is wrong with a value, '' if nothing is."""
        if value is None or self.least <= value < self.below and value > self.above:
            return ''
        bounds = [f'{word} {bound}' for word, bound in (('at least', self.least), ('above', self.above),
                                                        ('below', self.below)) if math.isfinite(bound)]
        near = f' (nearest: {self.least})' if value < self.least else ''
        return f'must be {" and ".join(bounds)}{near}'


class Needs:
    """The values, of attributes of a configuration, without which an option changes nothing."""

    def __init__(self, **conditions):
        self.conditions = conditions


class UserError(ValueError):
    """The user's input was wrong. The entry points print it as one line and exit with code 2: what could break that
    line, or steer a terminal, is escaped."""
    code = 2

    def __init__(self, text):
        super().__init__(''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text))


class Failure(UserError):
    """A command cannot go on, through no fault of its input: a full disk, a lost process, numbers that are not
    finite."""
    code = 1


def load(cls, argv):
    """argv -> an instance of dataclass `cls`, and a dict of the keys the user set -> where."""
    values, set_by = parse(cls, argv)
    return build(cls, values, set_by), set_by


def parse(cls, argv, base=None):
    """argv (config files and --key=value, in any order; files count first) -> dict of all values, each of its type, and
    a dict of the keys the user set -> where. `base` replaces defaults (a checkpoint's configuration)."""
    values = {f.name: f.default for f in fields(cls)} | (base or {})
    hints = hints_of(cls)
    options = [parse_option(arg, hints) for arg in argv if arg.startswith('-')]     # before a file: '--key value'
    set_by = {}
    for path in (arg for arg in argv if not arg.startswith('-')):
        for key, value in run_config_file(path, values, hints).items():
            values[key], set_by[key] = check(key, value, hints[key], path), path
    for key, value in options:
        values[key], set_by[key] = value, 'the command line'
    return values, set_by


def build(cls, values, set_by, otherwise='default'):
    """The instance of `cls`. Its ValueError that starts with "key=" is reported with the place that set key."""
    try:
        return cls(**values)
    except OSError as e:                                            # of a path that was looked at
        raise UserError(f'{e.filename}: {e.strerror}') from None
    except ValueError as e:
        key = str(e).partition('=')[0]
        where = f' [{set_by.get(key, otherwise)}]' if key in values else ''
        raise UserError(f'{e}{where}') from None


@functools.cache
def hints_of(cls):
    """The annotation of each field of a dataclass."""
    return get_type_hints(cls, include_extras=True)


def marked(cls, mark):
    """The names of the fields whose annotation holds a mark, for example OVERRIDABLE."""
    return [key for key, hint in hints_of(cls).items() if mark in get_args(hint)[2:]]


def validate(cfg):
    """Give each field of a dataclass instance its type. Raises ValueError, its message starting with the field's name,
    for a value of another type or out of its range."""
    for key, hint in hints_of(type(cfg)).items():
        value = getattr(cfg, key)
        ok, converted = coerce(value, hint)
        if not ok:
            raise ValueError(f'{key}={safe_repr(value)}: must be {describe(hint)}{nearest(value, hint)}')
        setattr(cfg, key, converted)
        for fault in (bounds.fault(converted) for bounds in get_args(hint)[2:] if isinstance(bounds, Range)):
            if fault:
                raise ValueError(f'{key}={value}: {fault}')


def has_effect(cfg, key, cls=None):
    """Whether an option of a configuration, of cls if cfg is not, does anything beside its others."""
    return all(getattr(cfg, name) == value for needs in get_args(hints_of(cls or type(cfg))[key])[2:]
               if isinstance(needs, Needs) for name, value in needs.conditions.items())


def unused_options(options, cfg):
    """The fields of `options` that are not at their default and change nothing for a model of configuration cfg."""
    both = types.SimpleNamespace(**vars(options) | {key: getattr(cfg, key) for key in dir(cfg) if key[0] != '_'})
    return [f.name for f in fields(options) if getattr(options, f.name) != f.default
            and not has_effect(both, f.name, type(options))]


def check_all(cls, values, where):
    """What a file says of fields of `cls` -> the same in their types; other keys are left out. Raises UserError."""
    hints = hints_of(cls)
    return {key: check(key, value, hints[key], where) for key, value in values.items() if key in hints}


def parse_option(arg, hints):
    """'--key=value' -> key, checked value."""
    name, equals, text = arg.partition('=')
    key = name.removeprefix('--')
    if not arg.startswith('--') or not key:
        raise UserError(f'{arg}: options are written --key=value; --help lists them')
    if key not in hints:
        raise UserError(f'--{key}: no such option{did_you_mean(key, hints, "--")}')
    if not equals and is_switch(hints[key]):
        return key, True
    if not equals:
        raise UserError(f'--{key}: needs a value, written --{key}=VALUE, which is {describe(hints[key])}')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')                         # '1or 2' and '"\\d"' are text, and no news
            value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        value = text
    if not isinstance(value, str) and not coerce(value, hints[key])[0] and coerce(text, hints[key])[0]:
        value = text                                                # --out_dir=123 names a folder
    return key, check(key, value, hints[key], 'the command line')


def suggest_option(word, hints):
    """Where a word is no config file: what it may have been meant for."""
    key, equals, value = word.partition('=')
    if key.replace('-', '_') in hints:
        option = shlex.quote(f'--{key.replace("-", "_")}={value if equals else "VALUE"}')
        return f' (nearest: {option})'
    if 'out_dir' in hints and os.path.exists(os.path.join(word, 'ckpt.pt')):
        return f' (nearest: {shlex.quote(f"--out_dir={word}")})'
    siblings = [str(p) for folder in dict.fromkeys((Path(word).parent, Path('config'))) if folder.resolve() != ROOT
                for p in sorted(folder.glob('*.py'))]
    return did_you_mean(word, siblings, other='options are written --key=value; --help lists them')


def run_config_file(path, values, hints):
    """Run one Python config file with the current values visible -> the keys it sets."""
    try:
        source = Path(path).read_text(encoding='utf-8-sig')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')                         # about a string's backslashes, say: not errors
            tree = ast.parse(source, filename=path)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f'{path}: no such config file{suggest_option(path, hints)}') from None
    except SyntaxError as e:
        raise UserError(f'{path}, line {e.lineno}: {e.msg}') from None
    except (OSError, ValueError, RecursionError, MemoryError) as e:
        raise UserError(f'{path}: cannot be read as a Python file: {one_line(e) or type(e).__name__}') from None
    namespace = dict(values, __name__='config', __file__=str(path))
    try:
        exec(compile(tree, path, 'exec'), namespace)
    except KeyboardInterrupt:
        raise
    except BaseException as e:                                      # SystemExit too
        tb, line = e.__traceback__, None
        while tb is not None:
            line = tb.tb_lineno if tb.tb_frame.f_code.co_filename == path else line
            tb = tb.tb_next
        raise UserError(f'{path}, line {line}: {type(e).__name__}: {one_line(e)}') from None
    assigned = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    found = {}
    for key, value in namespace.items():
        if key in hints:
            if key in assigned or value is not values[key]:
                found[key] = value
        elif not str(key).startswith('_') and not callable(value) and not isinstance(value, types.ModuleType):
            raise UserError(f'{path}: {key}: no such option{did_you_mean(key, hints)}'
                            ' (a helper variable may start with an underscore)')
    return found


def check(key, value, hint, where):
    """The value in the hint's type, or UserError."""
    ok, converted = coerce(value, hint)
    if ok:
        is_path = PATH in get_args(hint)[2:] and isinstance(converted, str)
        return os.path.expanduser(converted) if is_path else converted
    raise UserError(f'{key}={safe_repr(value)}: must be {describe(hint)}{nearest(value, hint)} [{where}]')


def safe_repr(value):
    """repr on one line, if it has one: that of 10 ** 5000 is a ValueError, and a config file can make anything."""
    try:
        return ' '.join(repr(value).split(chr(10)))
    except Exception:
        return f'<{type(value).__name__}>'


def coerce(value, hint):
    """(True, the value as the hint's type) or (False, None). A whole number passes for a float, True never for 1."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) in (types.UnionType, Union):
        return next((m for m in (coerce(value, h) for h in get_args(hint)) if m[0]), (False, None))
    if get_origin(hint) is Literal:
        return any(type(value) is type(a) and value == a for a in get_args(hint)), value
    if hint is type(None):
        return value is None, None
    if get_origin(hint) is dict:
        if not isinstance(value, dict) or not all(coerce(v, h)[0] for item in value.items()
                                                  for v, h in zip(item, get_args(hint))):
            return False, None
        return True, {k: coerce(v, get_args(hint)[1])[1] for k, v in value.items()}
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool, value
    try:
        if hint is int and isinstance(value, numbers.Integral):
            return math.isfinite(value), int(value)
        if hint is float and isinstance(value, numbers.Real):
            return math.isfinite(value), float(value)
    except OverflowError:                                           # a whole number of hundreds of digits
        return False, None
    if hint is str and isinstance(value, str):
        return '\0' not in value and value == value.encode(errors='ignore').decode(), value    # no half characters
    return False, None


def is_switch(hint):
    return SWITCH in get_args(hint)[2:]


def describe(hint):
    """A type in words: "a whole number or None"."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) in (types.UnionType, Union):
        return ' or '.join(describe(h) for h in get_args(hint))
    if get_origin(hint) is Literal:
        return ' or '.join(repr(a) for a in get_args(hint))
    if get_origin(hint) is dict:
        return "a dict of names and whole numbers, like {'name': 1}"
    return {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'text'}.get(hint, 'None')


def nearest(value, hint):
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    options = get_args(hint) if get_origin(hint) in (types.UnionType, Union) else (hint,)
    choices = [a for h in options if get_origin(h) is Literal for a in get_args(h) if isinstance(a, str)]
    if bool in options and str(value).lower() in ('true', 'yes', 'on', '1', 'false', 'no', 'off', '0'):
        return f' (nearest: {str(value).lower() in ("true", "yes", "on", "1")})'
    if choices and isinstance(value, str):
        return f' (nearest: {difflib.get_close_matches(value.lower(), choices, 1, 0)[0]!r})'
    if int in options and isinstance(value, float) and math.isfinite(value):
        return f' (nearest: {round(value)})'
    return ''


def did_you_mean(word, choices, prefix='', other='--help lists the options'):
    close = difflib.get_close_matches(str(word).lower(), list(choices), 1, 0.5)
    return f' (nearest: {prefix}{close[0]})' if close else f' ({other})'


def one_line(error):
    try:
        return ' '.join(str(error).split())
    except Exception:                                               # a config file's own, without a text
        return type(error).__name__


def help_text(cls, usage):
    """Every option with type, default and meaning."""
    lines = [usage, '', 'Options, as --key=value or as a line "key = value" of a config file:']
    for f in sorted(fields(cls), key=lambda f: f.kw_only):
        hint = hints_of(cls)[f.name]
        written, values = f'--{f.name}={f.default!r}', describe(hint)
        if is_switch(hint):
            written, values = f'--{f.name}', values.replace('True or False', 'given or not')
        lines.append(f'  {written}'.ljust(42) + f' {get_args(hint)[1]} [{values}]')
    return '\n'.join(lines)


def dump(cfg, comment=''):
    """The resolved configuration as the text of a config file that sets every key."""
    return comment + ''.join(f'{f.name} = {getattr(cfg, f.name)!r}\n'
                             for f in sorted(fields(cfg), key=lambda f: f.kw_only))

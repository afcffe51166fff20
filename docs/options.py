"""
Write docs/OPTIONS.md from the fields of the commands' options:

    python docs/options.py

A test checks that the page in the repository is what this command writes.
"""

import importlib
import sys
from pathlib import Path
from typing import get_args

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model import GPTConfig
from runtime.config import OVERRIDABLE, Needs, hints_of, option_groups
from train import TrainConfig

COMMANDS = 'train', 'sample', 'compress', 'compare', 'export', 'bench'
HEAD = """# Options

All options of all commands. `python docs/options.py` writes this page from the source code, and
`python train.py --help` prints the same list for one command.

Write an option as `--key=value` on the command line or as `key = value` in a config file. The
command line wins over the config file. Options that nanoGPT has keep their names. Their defaults
are nanoGPT's too, except those of `lr_decay_iters`, `device`, `dtype`, `compile` and sample.py's
`out_dir`.

A resumed run takes its options from the checkpoint. Options that you give again win, except those
marked "Fixed by a checkpoint". A smaller `block_size` is possible, and `--init_from=FOLDER` can add
LoRA or adaptive SVD to a model without adapters.
"""


def page():
    """Return the text of docs/OPTIONS.md."""
    lines = [HEAD]
    for command in COMMANDS:
        cls = getattr(importlib.import_module(command), f'{command.title()}Config')
        inherited = hints_of(TrainConfig) if command in ('compare', 'bench') else {}
        lines.append(f'## {command}.py\n')
        if inherited:
            lines.append('All options of train.py, and:\n')
        for heading, options in option_groups(cls).items():
            rows = [row(cls, *option) for option in options if option[0] not in inherited]
            title = [] if inherited or heading == 'options' else [f'### {heading}\n']
            if rows:
                lines += [*title, '| option | default | meaning |', '|---|---|---|', *rows, '']
    return '\n'.join(lines)


def row(cls, name, default, meaning):
    """Return an option's row of the table, with its conditions and whether a checkpoint fixes
    it."""
    marks = get_args(hints_of(cls)[name])
    needs = [f'`{key}={value!r}`' for need in marks if isinstance(need, Needs)
             for key, value in need.items()]
    if needs:
        conditions = ' and '.join(needs)
        for field, words in (('has_lora', '`lora_rank`'), ('svd_on_q', '`q` in `svd_targets`'),
                            ('svd_on_k', '`k` in `svd_targets`')):
            conditions = conditions.replace(f'`{field}=True`', words)
        meaning += f'. Only with {conditions}'
    if issubclass(cls, GPTConfig) and name in hints_of(GPTConfig) and OVERRIDABLE not in marks:
        meaning += '. Fixed by a checkpoint'
    return f'| `{name}` | {f"`{default}`" if default else ""} | {meaning} |'


if __name__ == '__main__':
    (ROOT / 'docs/OPTIONS.md').write_text(page())

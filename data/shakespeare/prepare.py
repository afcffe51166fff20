"""Shakespeare, GPT-2's BPE: python data/shakespeare/prepare.py [--input FILE] [--out_dir DIR]

Writes train.bin, val.bin (the last tenth of the text) and meta.json; data/shakespeare_text.py finds the text.
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

from data.shakespeare_text import prepare


def main(argv=None):
    return prepare('gpt2', FOLDER, argv)


if __name__ == '__main__':
    sys.exit(main())

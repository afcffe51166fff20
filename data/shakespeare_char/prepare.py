"""Shakespeare, encoded with one token per character:

    python data/shakespeare_char/prepare.py [--input FILE] [--out_dir DIR]

Writes train.bin, val.bin (the last tenth) and meta.json. data/shakespeare_text.py finds the text.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.shakespeare_text import prepare

main = partial(prepare, 'shakespeare_char', 'char')


if __name__ == '__main__':
    sys.exit(main())

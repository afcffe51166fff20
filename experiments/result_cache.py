"""A JSON Lines cache of results that take long to make: what is in the file is not made again."""

import platform
import time

from runtime import device as devices
from runtime.config import UserError
from runtime.files import check_writable
from runtime.tracking import append_json, read_json_lines


class Record:
    """The rows of a file, and how more are made.

    describe(row, key): the text to print of a new row; settings: what all rows must share. Raises
    UserError if the file has rows of other settings, or cannot be written.
    """

    def __init__(self, path, describe, **settings):
        check_writable(path, path)
        self.path, self.rows = path, read_json_lines(path)
        self.describe, self.settings = describe, settings
        others = {f'{key}={row[key]}' for row in self.rows for key in settings
                  if row[key] != settings[key]}
        if others:
            raise UserError(f'{path}: was made with {", ".join(sorted(others))}, not {settings}; '
                            'move it away to begin another')
        here = devices.environment('cpu', 'float32')
        self.machine = {'python': platform.python_version(), 'torch': here['torch'],
                        'cpus': here['cpus'], 'threads': here['threads'],
                        'git_commit': here['git_commit'][:7]}

    def make(self, result, **key):
        """The row with this key. If there is none, result() makes its other fields."""
        row = next((row for row in self.rows
                    if all(row.get(k) == v for k, v in key.items())), None)
        if row is None:
            started = time.perf_counter()
            row = key | result() | {'seconds': round(time.perf_counter() - started, 1)}
            row |= self.settings | self.machine
            append_json(self.path, row)
            self.rows.append(row)
            print(self.describe(row, key), flush=True)
        return row

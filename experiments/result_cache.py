"""JSON Lines cache of finished results. A result that is in the file is not computed again."""

import platform
import time

from runtime import device as devices
from runtime.config import UserError
from runtime.files import check_writable
from runtime.tracking import append_json, read_json_lines


def loss_and_time(row, key):
    return ', '.join(f'{k}={v}' for k, v in row.items() if k in (*key, 'loss', 'seconds'))


class Record:
    """Rows of results in a JSON Lines file.

    path: the file; describe(row, key): returns the text to print about a new row, by default its
    key, loss and seconds; settings: fields that all rows must share. Raises UserError for rows with
    other settings and for a file that cannot be written.
    """

    def __init__(self, path, describe=loss_and_time, **settings):
        check_writable(path, path)
        self.path, self.rows = path, read_json_lines(path)
        self.describe, self.settings = describe, settings
        others = {f'{key}={row.get(key)}' for row in self.rows for key in settings
                  if row.get(key) != settings[key]}
        if others:
            raise UserError(f'{path}: holds results for {", ".join(sorted(others))}, not for '
                            f'{settings} (nearest: move the file away to start a new record)')
        here = devices.environment('cpu', 'float32')
        self.machine = {'python': platform.python_version(), 'torch': here['torch'],
                        'cpus': here['cpus'], 'threads': here['threads'],
                        'git_commit': here['git_commit'][:7]}

    def find(self, **key):
        """Return the row with this key, or None."""
        return next((row for row in self.rows
                     if all(row.get(k) == v for k, v in key.items())), None)

    def make(self, result, **key):
        """Return the row with this key. If it is missing, add it with the fields of result()."""
        row = self.find(**key)
        if row is None:
            started = time.perf_counter()
            fields = result()
            row = (key | {'seconds': round(time.perf_counter() - started, 1)} | self.settings
                   | self.machine | fields)
            append_json(self.path, row)
            self.rows.append(row)
            print(self.describe(row, key), flush=True)
        return row

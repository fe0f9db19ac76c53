# SPDX-License-Identifier: Apache-2.0
"""One process at a time makes or fetches a file; the next ones wait and find it there."""

import contextlib
import os
from pathlib import Path


@contextlib.contextmanager
def locked(path: Path):
    """Hold the lock file `path`, which goes away in the end. A process that dies lets go of it."""
    try:
        import fcntl
    except ImportError:  # Windows: no lock
        yield
        return
    while True:
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"another process is at work on {path.stem.lstrip('.')}: waiting", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            # The one before may have removed the file while this one waited for it.
            held = os.fstat(file.fileno())
            if not path.exists() or not os.path.samestat(held, path.stat()):
                continue
            try:
                yield
            finally:
                path.unlink()
            return

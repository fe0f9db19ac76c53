# SPDX-License-Identifier: Apache-2.0
"""One process at a time in a run folder; one makes or fetches a file, the next ones find it."""

import contextlib
import fcntl
import os
import sys
import time
from pathlib import Path


def taken(lock, folder, again=True):
    """Whether the open file `lock` is this process's now, for as long as it is open."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(0.1)  # a look at it by another process is over after that
        return again and taken(lock, folder, again=False)
    except OSError as error:
        print(f"WARNING: {folder}: this disk has no locks ({error.strerror})", file=sys.stderr)
    return True


@contextlib.contextmanager
def locked(path: Path):
    """Hold the lock file `path`, which goes away in the end. A process that dies lets go of it."""
    ours = False
    while not ours:
        file = path.open("w")
        if not taken(file, path):
            print(f"another process is at work on {path.stem.lstrip('.')}: waiting", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):  # the one before may have removed it
            ours = os.path.samestat(os.fstat(file.fileno()), path.stat())
    with file:
        try:
            yield
        finally:
            path.unlink()

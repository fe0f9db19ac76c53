# SPDX-License-Identifier: Apache-2.0
"""Files that are written whole or not at all, and locks between processes."""

import contextlib
import os
import sys
from pathlib import Path

PATIENCE = 0.1  # seconds; another process that only looks whether a lock is free lets go of it


def write(path: Path, text: str) -> None:
    """Write the whole file or nothing of it."""
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as out:
        out.write(text)
        sync(out)
    part.replace(path)


def sync(out) -> None:
    """Put what was written into an open file on the disk, before anything relies on it."""
    out.flush()
    os.fsync(out.fileno())


def sync_folder(folder: Path) -> None:
    """The same for every file and folder in a folder, and for the folder's own name."""
    for path in (*folder.rglob("*"), folder, folder.parent):
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def try_lock(path: Path):
    """The lock of that file, held until its `release` or the process's end; None where it is taken.

    Where the disk has no locks, a warning says so and the lock counts as held.

    Raises:
        OSError: the file cannot be written.
    """
    import filelock

    # The same error on every disk, where the file cannot be written.
    with path.open("a", encoding="utf-8"):
        lock = _lock(path)
    try:
        lock.acquire(timeout=PATIENCE)
    except filelock.Timeout:
        return None
    except (OSError, NotImplementedError) as error:
        why = getattr(error, "strerror", None) or error
        print(f"WARNING: {path.parent}: this disk has no locks ({why})", file=sys.stderr)
    return lock


def _lock(path):
    import filelock

    # Its fallback for disks without locks counts a file that exists as a lock that is taken.
    return filelock.FileLock(path, fallback_to_soft=False)


@contextlib.contextmanager
def locked(path: Path):
    """Hold the lock file `path` inside; it is removed at the end. A process that dies frees it."""
    lock = try_lock(path)
    if lock is None:
        print(f"another process is at work on {path.stem.lstrip('.')}: waiting", flush=True)
        lock = _lock(path)
        lock.acquire()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before the release, so that no other process holds it
        lock.release()

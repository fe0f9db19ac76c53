# SPDX-License-Identifier: Apache-2.0
"""Disks that take no more or give back something else: one line, no traceback of a thread."""

import asyncio
import contextlib
import errno
import os
import re

from common import fail

FAILING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
FAILING |= {errno.ESTALE, errno.EACCES, errno.ETIMEDOUT}  # of file servers


@contextlib.contextmanager
def storage(folder):
    """A full, read-only or failing disk, whichever library met it, is one line and exit code 2."""
    try:
        with quiet_loops():
            yield
    except (OSError, ValueError) as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))  # of tensorstore
        number = int(code[1]) if code else getattr(error, "errno", None)
        if number not in FAILING:
            raise
        fail(
            f"{folder}: cannot be written ({os.strerror(number)}); once it can, go on with the "
            "same command and --resume"
        )


def write(path, text):
    """Write a whole file or nothing of it."""
    part = path.with_name(f"{path.name}.part")
    with part.open("w") as out:
        out.write(text)
        settle(out)
    part.replace(path)


def settle(out):
    """On the disk before anything that counts on it, as checkpoints are."""
    out.flush()
    os.fsync(out.fileno())


def settle_all(folder):
    """The same for all files and folders of a folder, and for its name."""
    for path in (*folder.rglob("*"), folder, folder.parent):
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


@contextlib.contextmanager
def quiet_loops():
    """Orbax's event loops inside take late calls in silence.

    After a read or write that failed, orbax closes its loop while tensorstore's threads still have
    parts of the checkpoint under way. Each that ends then calls the closed loop and would print a
    traceback about it under the line that tells what failed.
    """
    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(_Policy())
    try:
        yield
    finally:
        asyncio.set_event_loop_policy(before)


class _Loop(asyncio.SelectorEventLoop):
    def call_soon_threadsafe(self, *args, **kwargs):
        try:
            return super().call_soon_threadsafe(*args, **kwargs)
        except RuntimeError:
            if not self.is_closed():
                raise


class _Policy(asyncio.DefaultEventLoopPolicy):
    _loop_factory = _Loop

# SPDX-License-Identifier: Apache-2.0
"""A disk that is full, read-only or failing ends a run with one line and without tracebacks."""

import contextlib
import errno
import os
import re
import sys

from common import fail

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
DISK_ERRORS |= {errno.ESTALE, errno.EACCES, errno.ETIMEDOUT}  # of file servers


@contextlib.contextmanager
def storage(folder):
    """Inside, an error of the disk that holds `folder` becomes one line and exit code 2.

    It does not matter which library met the error. All other errors pass through.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        if (code := number(error)) not in DISK_ERRORS:
            raise
        fail(
            f"{folder}: cannot be written ({os.strerror(code)}); when it can be written again, "
            "continue with the same command and --resume"
        )


def number(error):
    """The system's number of an error, which may be of tensorstore; None where it has none."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return int(code[1]) if code else getattr(error, "errno", None)


def silence_closed_loops():
    """Do not print the tracebacks of threads that call an event loop which orbax has closed.

    After a read or write that failed, orbax closes its event loop while tensorstore's threads still
    work on parts of the checkpoint. Each of them calls the closed loop when it ends, and Python
    would print a traceback about that below the line that says what failed.

    The hook stays until the process ends, since nobody knows when the last thread does. It passes
    everything else on to the hook that was there before.
    """
    before = sys.unraisablehook
    if getattr(before, "silences_closed_loops", False):
        return

    def hook(unraisable):
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            before(unraisable)

    hook.silences_closed_loops = True
    sys.unraisablehook = hook

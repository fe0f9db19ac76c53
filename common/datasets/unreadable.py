# SPDX-License-Identifier: Apache-2.0
"""Why a data file could not be read: its bytes are bad, or something else is in the way."""

import errno
import json
import zipfile
import zlib

from common import one_line


class Incomplete(ValueError):
    """A data set holds less than it says."""


def obstacle(error: BaseException) -> str | None:
    """What keeps a file from being read, with the remedy; None where it may be the file itself."""
    text = one_line(error)
    if isinstance(error, ImportError):
        return f"a package is missing: {text}"
    if isinstance(error, MemoryError):
        return f"its arrays need more memory than is free ({text})"
    if isinstance(error, PermissionError):
        return f"permission denied; make it readable for this user ({text})"
    busy = isinstance(error, OSError) and error.errno in (errno.EAGAIN, errno.EACCES)
    if busy or "unable to lock file" in text or "already open for" in text:
        return f"another program has it open for writing; close it there ({text})"
    if isinstance(error, OSError) and error.errno not in (None, 0, errno.EINVAL):
        return f"the system cannot read it ({text})"
    return None


def is_damage(error: BaseException) -> bool:
    """Whether an error proves that bytes are missing or wrong."""
    if obstacle(error) is not None:
        return False
    kinds = OSError | EOFError | zlib.error | zipfile.BadZipFile | Incomplete
    if isinstance(error, kinds | json.JSONDecodeError | UnicodeDecodeError):
        return True
    # h5py and pyarrow use Python's own types for what they find in a file.
    return "Unable to" in str(error) or type(error).__module__.startswith("pyarrow")


def check_memory(rows: int, columns: int, arrays: int = 2) -> None:
    """Raise MemoryError where float32 arrays of that size do not fit.

    Linux would give the memory all the same, and end the process when it is used.
    """
    import psutil

    needed, free = 4 * rows * columns * arrays, psutil.virtual_memory().available
    if needed > free:
        raise MemoryError(f"{needed / 1e9:,.1f} GB for observations, {free / 1e9:,.1f} GB are free")

# SPDX-License-Identifier: Apache-2.0
"""What a paper would not mention: data sets, evaluation, run plumbing. No learning in here."""

import sys
from typing import NoReturn


def fail(message: str) -> NoReturn:
    """Print one line that names the bad value and the remedy, and leave with exit code 2.

    Raises:
        SystemExit: always, with code 2 and the message as its cause.
    """
    line = " ".join(message.split())
    line = line if len(line) < 1500 else f"{line[:1400]} ... {line[-80:]}"
    print(f"error: {line}".encode("utf-8", "backslashreplace").decode(), file=sys.stderr)
    raise SystemExit(2) from ValueError(message)


def one_line(error: BaseException) -> str:
    """What an exception says, in one line and short enough for a message of ours."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def told(error: BaseException) -> str:
    """The same after the exception's type, which its text alone does not always tell."""
    return f"{type(error).__name__}: {one_line(error)}"

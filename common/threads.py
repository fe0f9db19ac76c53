# SPDX-License-Identifier: Apache-2.0
"""What belongs to the whole process, for programs that train in several threads of it.

Standard error, the warning filters, environment variables, Gymnasium's registry, NumPy's global
generator and the parser of Python before 3.11.8 exist once
(https://github.com/python/cpython/issues/106905: "AST constructor recursion depth mismatch"). A
thread that changes one of them for a moment, or fails where another one does the same, holds ALONE
meanwhile. Modules of common/ do so by what is in here; a test reads them for other changes.
"""

import contextlib
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

ALONE = threading.RLock()  # held for seconds at most, never while something is downloaded


@contextlib.contextmanager
def captured_errors() -> Iterator[io.StringIO]:
    """Inside, what this thread writes to sys.stderr is kept. Others write to it as before.

    The lock keeps two captures from restoring each other's stream, after which nothing would be
    shown any more: not even why the program ends.
    """
    with ALONE:
        before, ours = sys.stderr, _OfThisThread(sys.stderr)
        sys.stderr = ours
        try:
            yield ours.kept
        finally:
            ours.thread = None  # whoever still has it writes to the stream that was there before
            if sys.stderr is ours:
                sys.stderr = before


class _OfThisThread:
    """A stream that keeps what the thread that made it writes, and passes on what others do."""

    def __init__(self, stream):
        self.stream = io.StringIO() if stream is None else stream  # as pythonw has it
        self.kept, self.thread = io.StringIO(), threading.get_ident()

    def __getattr__(self, name):
        mine = threading.get_ident() == self.thread
        return getattr(self.kept if mine else self.stream, name)


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Inside, no warning is shown. The filters are as before at the end."""
    with ALONE, warnings.catch_warnings(action="ignore"):
        yield


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Inside, that environment variable has this value. Other threads that read it hold ALONE."""
    with ALONE:
        before = os.environ.get(name)
        os.environ[name] = value
        try:
            yield
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


def is_main() -> bool:
    """Whether this is the main thread, the only one that may handle signals."""
    return threading.current_thread() is threading.main_thread()


def handle(number: int, handler: Callable[..., Any]) -> None:
    """Let `handler` handle a signal, where this is the main thread. Elsewhere nothing changes."""
    if is_main():
        signal.signal(number, handler)

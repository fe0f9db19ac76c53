# SPDX-License-Identifier: Apache-2.0
"""What every command does with its output and its end: closed pipes, encodings, Ctrl-C."""

import argparse
import codecs
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from common import fail, threads


class Parser(argparse.ArgumentParser):
    """Words that it cannot read are one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        fail(f"{self.prog}: {message}; --help lists the words")


PLAIN = {"±": "+-", "…": "..."}


def run(main: Callable[[], None]) -> None:
    """Run a command so that Ctrl-C, SIGTERM and a closed pipe end it without a traceback.

    It may read its words from sys.argv, where `~` is replaced.
    """
    threads.handle(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.argv = [at_home(word) for word in sys.argv]
    use_plain_letters()
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def at_home(word: str) -> str:
    """A word of the command line with its `~` replaced: no shell does that in `--plot=~/x.png`."""
    flag, sign, value = word.partition("=")
    return f"{flag}={os.path.expanduser(value)}" if flag.startswith("--") and sign else word


# --- Encodings ----------------------------------------------------------------------------------
def use_plain_letters():
    """Where the output's encoding lacks a letter, print a plain one ("+-" for "±") or its number.

    Without this, an output in ASCII would end the program with a UnicodeEncodeError.
    """
    codecs.register_error("atoll.plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not every stream of a notebook or a test has it
            stream.reconfigure(errors="atoll.plain")


def _plain(error):
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    plain = [PLAIN.get(x) or x.encode("ascii", "backslashreplace").decode() for x in letters]
    return "".join(plain), error.end


# --- Readers that go away -----------------------------------------------------------------------
def outlive_the_reader():
    """From now on a closed pipe or a full disk behind the output does not end this program.

    A run that trains for hours must not die because `head` or `tee` has ended, or the connection to
    the terminal.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Lasting):
            setattr(sys, name, _Lasting(stream))


class _Lasting:
    """A stream that drops what is written once nothing takes it any more."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        try:
            return self._stream.write(text)
        except OSError:
            self._drop()
            return len(text)

    def flush(self):
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def _drop(self):
        """Send the rest to the null device: the stream still holds the text that failed."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)

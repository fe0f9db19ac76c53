# SPDX-License-Identifier: Apache-2.0
"""Signals of a run: the first one asks to save at the next chunk boundary, a second one quits.

Python runs a signal's handler between two bytecodes, so not while it waits for a chunk. The wakeup
file descriptor tells a thread at any moment.
"""

import os
import signal
import socket
import sys
import threading

from common import threads


def interrupted(*_):
    """The handler of Ctrl-C before there is a run to save."""
    print("interrupted before training began; start again with --resume", file=sys.stderr)
    raise SystemExit(128 + signal.SIGINT)


class Signals:
    """`number` is the signal that asked to save, None if none has."""

    def __init__(self):
        self.number, self.handlers = None, {}

    def listen(self):
        """Handle the signals that end a run, where this is the main thread."""
        if not threads.is_main():
            return
        reader, self.wakeup = socket.socketpair()
        self.wakeup.setblocking(False)
        signal.set_wakeup_fd(self.wakeup.fileno())
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            self.handlers[number] = signal.signal(number, lambda *_: None)

        def watch():
            while byte := reader.recv(1):
                if byte[0] not in self.handlers:
                    continue
                if self.number is not None:
                    os._exit(128 + byte[0])
                self.number = byte[0]
                name = signal.Signals(byte[0]).name
                print(
                    f"{name}: saving at the next chunk boundary; a second signal quits at once",
                    flush=True,
                )

        threading.Thread(target=watch, daemon=True).start()

    def close(self):
        """Restore the handlers that were there before."""
        if self.handlers:
            signal.set_wakeup_fd(-1)
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
            self.wakeup.close()

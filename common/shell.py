# SPDX-License-Identifier: Apache-2.0
"""How the command lines of `python -m common.datasets` and `common.recipes` end."""

import os
import signal
import sys
from collections.abc import Callable


def run(main: Callable[[], None]) -> None:
    """Run a command line that Ctrl-C, SIGTERM and a closed pipe end without a traceback."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

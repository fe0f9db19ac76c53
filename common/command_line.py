# SPDX-License-Identifier: Apache-2.0
"""How the commands `python -m common.datasets` and `python -m common.recipes` end."""

import os
import signal
import sys
from collections.abc import Callable


def run(main: Callable[[], None]) -> None:
    """Run a command so that Ctrl-C, SIGTERM and a closed pipe end it without a traceback."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

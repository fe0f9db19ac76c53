# SPDX-License-Identifier: Apache-2.0
"""This machine's processor, and this process's share of it."""

import contextlib
import os
import platform
import re
from pathlib import Path


def cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def processor():
    """Number and model of this machine's cores, and how many of them this process may use."""
    model = platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        model = found[1] if found else model
    count = os.cpu_count()
    return f"{'' if cores() == count else f'{cores()} of '}{count} cores of {model}"

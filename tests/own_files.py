# SPDX-License-Identifier: Apache-2.0
"""The project's own algorithm files and configs: those of the methods in README's table.

Tests of "every algorithm" go over these names. A user's own file in algorithms/ or configs/ is not
among them, so it cannot make a test fail. `python tests/missing.py` says what a new file of the
project still needs.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def in_readme(text):
    """Names of the algorithm files that a row of a table links to."""
    return sorted({*re.findall(r"^\|.*\(algorithms/(\w+)\.py\)", text, re.MULTILINE)})


NAMES = in_readme((ROOT / "README.md").read_text(encoding="utf-8"))
FILES = [ROOT / "algorithms" / f"{name}.py" for name in NAMES]
YAMLS = [x for x in sorted((ROOT / "configs").glob("*/*.yaml")) if x.parent.name in NAMES]

# SPDX-License-Identifier: Apache-2.0
"""Data sets: from an id to a `Dataset` of transitions, with an environment to evaluate in.

`load(id)` reads one; reading.py lists the forms of an id, and each family of data sets has a reader
of its own (minari.py, d4rl.py, hdf5.py, ogbench.py, local.py). transitions.py has the rules that
turn recorded rows into transitions, checks.py what is refused. views.py serves methods that need
more than transitions: episodes, returns-to-go, chunks of several steps, the best episodes.
`python -m common.datasets ID [--plot FILE.png]` shows what a data set holds.
"""

from common.datasets.dataset import Dataset, Transitions
from common.datasets.loading import load
from common.datasets.mirrors import chosen as mirror
from common.datasets.mirrors import use as use_mirror
from common.datasets.names import config_name, refuse_missing_version, slug, suite
from common.datasets.transitions import cut
from common.datasets.views import (
    by_seed,
    chunks,
    episodes,
    filter_by_return,
    return_range,
    return_span,
    returns_to_go,
)

__all__ = [
    "Dataset",
    "Transitions",
    "by_seed",
    "chunks",
    "config_name",
    "cut",
    "episodes",
    "filter_by_return",
    "load",
    "mirror",
    "refuse_missing_version",
    "return_range",
    "return_span",
    "returns_to_go",
    "slug",
    "suite",
    "use_mirror",
]

# SPDX-License-Identifier: Apache-2.0
"""The folders in which data sets are stored."""

import os
from pathlib import Path


def minari(dataset_id: str = "") -> Path:
    """Minari's local root, or the folder of one of its data sets."""
    return _root("MINARI_DATASETS_PATH", "~/.minari/datasets") / dataset_id


def ogbench(part: str = "") -> Path:
    """The folder of OGBench's npz files; those made on this machine are in its part `local`."""
    return _root("OGBENCH_DATASET_DIR", "~/.ogbench/data") / part


def d4rl() -> Path:
    """The folder of D4RL's HDF5 files."""
    return _root("D4RL_DATASET_DIR", "~/.d4rl/datasets")


def _root(variable, default):
    return Path(os.path.expanduser(os.environ.get(variable) or default))

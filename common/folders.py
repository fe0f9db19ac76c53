# SPDX-License-Identifier: Apache-2.0
"""The folders in which data sets and compiled programs are stored."""

import os
import tempfile
from pathlib import Path

from common import fail, threads


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
    with threads.ALONE:  # another thread may have set it for a moment
        folder = os.path.expanduser(os.environ.get(variable) or default)
    if folder.startswith("~"):
        fail(f"{folder}: this user has no home folder; set {variable} to a folder of the data")
    return Path(folder)


def compiled_programs() -> Path | None:
    """Where compiled programs are kept between starts; None where no folder can be written.

    That is ~/.cache/atoll/xla. A user without a home folder, as in some containers, has a private
    folder in the folder of temporary files.
    """
    home = os.path.expanduser("~")
    if not home.startswith("~"):
        folder = Path(home) / ".cache" / "atoll" / "xla"
        if _is_ours(folder):
            return folder
    folder = Path(tempfile.gettempdir()) / f"atoll-{os.getuid()}"
    return folder / "xla" if _is_ours(folder) and _is_ours(folder / "xla") else None


def _is_ours(folder):
    """Whether the folder is there, belongs to this user, and can be written. It is made here."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        return False

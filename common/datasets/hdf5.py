# SPDX-License-Identifier: Apache-2.0
"""HDF5 files: arrays at the top level, facts about them as attributes."""

import difflib
import math
from pathlib import Path

import numpy as np

from common import fail, one_line
from common.datasets import unreadable


def is_hdf5(path: Path) -> bool:
    """Whether a file is HDF5, by its first bytes."""
    import h5py

    return bool(h5py.is_hdf5(path))


def read(path: Path, wanted: tuple, needed: tuple) -> tuple[dict, dict]:
    """Those arrays of `wanted` that the file has, and all its attributes.

    Raises:
        SystemExit: code 2 after one line, where it is no such file or lacks one of `needed`.
    """
    import h5py

    if path.is_dir():
        fail(f"{path}: a directory; pass an HDF5 file")
    if not path.exists():
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        names = [name for name in names if name.endswith((".hdf5", ".h5"))]
        near = difflib.get_close_matches(path.name, names, 3, 0.4)
        fail(f"{path}: no such file" + (f"; near it: {', '.join(near)}" if near else ""))
    try:
        with h5py.File(path) as file:
            arrays = [name for name in file if isinstance(file[name], h5py.Dataset)]
            groups = [f"{name}/" for name in file if name not in arrays]
            rows = {name: file[name][()] for name in wanted if name in arrays}
            facts = {name: _plain(value) for name, value in file.attrs.items()}
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, MemoryError) as error:
        if hindrance := unreadable.obstacle(error):
            fail(f"{path}: cannot be read as HDF5: {hindrance}")
        fail(f"{path}: cannot be read as HDF5, truncated or another format ({one_line(error)})")
    for name in needed:
        if name not in rows:
            found = ", ".join(map(str, [*arrays, *groups][:20])) or "nothing"
            fail(f"{path}: no array {name!r} at the top level, only {found}")
        if np.ndim(rows[name]) == 0:
            fail(f"{path}: {name} is not an array of numbers but a single value")
    return rows, facts


def check_attributes(path: Path, facts: dict, numbers: tuple) -> None:
    """Exit with code 2 after one line where `env_id` or one of `numbers` has a wrong value."""
    for name in ("env_id", *numbers):
        value = facts.get(name)
        text = name == "env_id"
        if isinstance(value, int | float) and not text:
            good = math.isfinite(value) and (name[0] == "r" or value >= 1)
        else:
            good = isinstance(value, str) and text and ":" not in value  # only --env may name code
        if value is not None and not good:
            kind = "a finite number" + ", 1 or more" * (name[0] == "m")
            if text:
                kind = "a name; the env of a module can be named by --env MODULE:NAME"
            fail(f"{path}: attribute {name} {value!r}: must be {kind}")


def _plain(value):
    value = value.item() if isinstance(value, np.generic) else value
    value = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value

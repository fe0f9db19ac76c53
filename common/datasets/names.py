# SPDX-License-Identifier: Apache-2.0
"""What a data set's name tells: its suite of configs, its name in folders and tables."""

import difflib
import json
import os
import re
from pathlib import Path
from typing import NoReturn

from common import fail, folders, recipes, threads
from common.datasets import hdf5, reference_scores, unreadable

METADATA = "**/data/metadata.json"  # of each data set in Minari's local root
MINARI_ID = re.compile(r"[\w.-]+(/[\w.-]+)+-v\d+")
OGBENCH_ID = re.compile(r"((?:\w+-)+\w+)-singletask(-task[1-5])?-v0")
OGBENCH_ENVS = ("pointmaze", "antmaze", "humanoidmaze", "antsoccer", "cube", "scene", "puzzle")
SUITES = {  # suite of configs -> how the names of its data sets begin; the first match counts
    "online": r"env/",  # no rows but those of the online phase
    "ogbench": r"[\w-]+-singletask-v0$",
    "classic": r"local/cartpole/|.*cartpole",  # integer actions
    "v4": r"(hopper|halfcheetah|walker2d)-[a-z-]+-v4$",  # small files rolled out in v4 envs
    "mujoco_local": r"local/mujoco/",
    "pointmaze": r"local/pointmaze/",
    "maze2d": r"maze2d-|D4RL/pointmaze/",
    "antmaze": r"antmaze-\w+(-\w+)?-v|D4RL/antmaze/",
    "adroit": r"(pen|door|hammer|relocate|adroit)-|D4RL/(pen|door|hammer|relocate)/",
    "kitchen": r"kitchen-|D4RL/kitchen/",
    "mujoco": r"(hopper|halfcheetah|walker2d|ant)-|mujoco/",
}


def slug(dataset_id: str) -> str:
    """The name of a data set in run folders and config tables: its id, or its file's stem."""
    path = Path(os.path.expanduser(dataset_id))
    return path.stem if is_file(path) else dataset_id


def is_file(path: Path) -> bool:
    """Whether an id is meant as the path of a data file.

    It is by its suffix. Any other path of a file is one where the file is HDF5, so that neither a
    folder nor a log that happens to be called like a data set stands in its way.
    """
    return path.suffix in (".hdf5", ".h5") or (path.is_file() and hdf5.is_hdf5(path))


def config_name(dataset_id: str) -> str:
    """The name under which configs have this data set's row.

    For a file of D4RL it is the id, for a task of OGBench the data set of all its tasks.
    """
    name = slug(dataset_id)
    name = reference_scores.row_of(name).get("dataset", name)
    if name.startswith("local/ogbench/"):
        name = re.sub(r"-v0$", "-singletask-v0", name.removeprefix("local/ogbench/"))
    return re.sub(r"-singletask-task\d-", "-singletask-", name)


def suite(dataset_id: str) -> str | None:
    """The suite of configs that a data set belongs to, None if its name belongs to none."""
    name = config_name(dataset_id)
    return next((suite for suite, words in SUITES.items() if re.match(words, name)), None)


def minari_ids() -> list[str]:
    """The data sets in Minari's local root."""
    root = folders.minari()
    return sorted(str(file.parents[1].relative_to(root)) for file in root.glob(METADATA))


def refuse_url(dataset_id: str) -> None:
    """Exit with one line on an address: a data set is an id or a file on this machine."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", dataset_id):
        fail(f"{dataset_id}: an address, not a file; download it and pass the path of the copy")


def fail_unreadable(dataset_id: str, path: Path) -> NoReturn:
    """Exit with one line on a path that is there but is no data set that can be read."""
    if (path / "data" / "metadata.json").exists():
        root = _minari_root(path)
        name = path.resolve().relative_to(root)
        fail(f"{path}: a data set of Minari's; pass its id {name} and MINARI_DATASETS_PATH={root}")
    if path.is_dir():
        fail(f"{path}: a directory; pass an HDF5 file")
    if path.suffix == ".npz" and path.stem.endswith("-v0"):
        task = f"{path.stem.removesuffix('-v0')}-singletask-v0"
        folder = path.resolve().parent
        fail(
            f"{path}: not an HDF5 file; OGBench's files are read by a task's name: pass {task} "
            f"and OGBENCH_DATASET_DIR={folder}"
        )
    try:
        path.open("rb").close()
    except OSError as error:
        fail(f"{path}: cannot be read as HDF5: {unreadable.obstacle(error)}")
    fail(f"{dataset_id}: cannot be read as HDF5, truncated or another format")


def _minari_root(path):
    """The folder from which the id of a data set counts; the id is in its metadata."""
    path = path.resolve()
    try:
        named = json.loads((path / "data" / "metadata.json").read_text(encoding="utf-8"))[
            "dataset_id"
        ]
        if str(path).endswith(f"/{named}"):
            return path.parents[named.count("/")]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        pass
    return path.parent


def versions(name: str) -> list[str]:
    """The names of D4RL's data sets that are this name and a version."""
    return [
        known
        for known in reference_scores.table()
        if re.fullmatch(rf"{re.escape(name)}-v\d+", known)
    ]


def refuse_missing_version(dataset_id: str) -> None:
    """Exit with one line where a name of D4RL lacks its version, which says what versions exist."""
    found = versions(dataset_id)
    if found and not Path(os.path.expanduser(dataset_id)).exists():
        fail(f"{dataset_id!r} lacks the version of a D4RL data set; there is {' and '.join(found)}")


def fail_unknown(dataset_id: str) -> NoReturn:
    """Exit with one line that says the data set is unknown and names similar ones."""
    refuse_missing_version(dataset_id)
    local = [f"local/ogbench/{name}" for name in recipes.OGBENCH_RECIPES]
    tasks = [f"{name.removesuffix('-v0')}-singletask-v0" for name in recipes.OGBENCH_RECIPES]
    table = reference_scores.table()
    minari = [row["minari_id"] for row in table.values() if row["minari_id"]]
    here = minari_ids()
    known = [*here, *recipes.IDS, *local, *table, *minari, *tasks]
    known = [*dict.fromkeys(name for name in known if name != dataset_id)]
    near = difflib.get_close_matches(dataset_id, known, 3, 0.5)
    versions = [name for name in known if re.fullmatch(re.escape(dataset_id) + r"-v\d+", name)]
    like_minari = re.fullmatch(r"[\w.-]+(/[\w.-]+)+", dataset_id)
    if versions:
        near = versions
    elif (
        like_minari and not MINARI_ID.fullmatch(dataset_id) and not dataset_id.startswith("local/")
    ):
        near = [f"{dataset_id}-v0"]  # Minari's ids end in a version
    if _is_env(dataset_id):  # of a method that begins without data, most likely
        near = [f"env/{dataset_id}"]
    hint = f"did you mean {' or '.join(near)}?" if near else "docs/data.md lists the forms of an id"
    fail(f"{dataset_id!r}: no such data set; {hint}")


def _is_env(name):
    """Whether Gymnasium knows an env of that id, without importing what an id may name."""
    import gymnasium

    with threads.ALONE:
        return name in gymnasium.registry

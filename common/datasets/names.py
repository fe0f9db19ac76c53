# SPDX-License-Identifier: Apache-2.0
"""What a data set's name tells: its suite of configs, its name in folders and tables."""

import difflib
import os
import re
from pathlib import Path
from typing import NoReturn

from common import fail, recipes
from common.datasets import reference_scores

MINARI_ID = re.compile(r"[\w.-]+(/[\w.-]+)+-v\d+")
OGBENCH_ID = re.compile(r"((?:\w+-)+\w+)-singletask(-task[1-5])?-v0")
OGBENCH_ENVS = ("pointmaze", "antmaze", "humanoidmaze", "antsoccer", "cube", "scene", "puzzle")
SUITES = {  # suite of configs -> how the names of its data sets begin; the first match counts
    "ogbench": r"[\w-]+-singletask-v0$",
    "classic": r"local/cartpole/|.*cartpole",  # integer actions
    "v4": r"(hopper|halfcheetah|walker2d)-[a-z-]+-v4$",  # small files rolled out in v4 envs
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
    return path.stem if path.suffix in (".hdf5", ".h5") or path.is_file() else dataset_id


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
    known = [*recipes.IDS, *local, *table, *minari, *tasks]
    near = difflib.get_close_matches(dataset_id, known, 3, 0.5)
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)+", dataset_id) and not MINARI_ID.fullmatch(dataset_id):
        # Looks like an id of Minari, whose ids end in a version.
        versions = [name for name in minari if name.startswith(f"{dataset_id}-v")]
        if versions:
            near = versions
        elif not dataset_id.startswith("local/"):
            near = [f"{dataset_id}-v0"]
    hint = f"did you mean {' or '.join(near)}?" if near else "docs/data.md lists the forms of an id"
    fail(f"{dataset_id!r}: no such data set; {hint}")

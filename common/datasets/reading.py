# SPDX-License-Identifier: Apache-2.0
"""Which family a data set id belongs to, and so which reader reads it.

local/pointmaze/umaze-v0            made on this machine when first used, see common/recipes/
local/cartpole/mixed-v0             the same, with integer actions
local/ogbench/cube-single-play-v0   the same, by OGBench's scripted controllers
mujoco/hopper/medium-v0, ...        any Minari id: from Minari's local root, else downloaded
my-recording-v0                     one without a namespace, where Minari's local root has it
hopper-medium-v2, ...               D4RL's names: its files, in ~/.d4rl/datasets
cube-single-play-singletask-v0, ... OGBench's names: its files, in ~/.ogbench/data
path/to/file.hdf5                   a file in D4RL's layout
env/Hopper-v4, ...                  no rows: they come in the online phase
"""

import os
from pathlib import Path

from common import fail, folders
from common.datasets import d4rl, env_only, local, minari, names, ogbench, reference_scores
from common.datasets.source import Source


def read(dataset_id: str, env: str | None, env_steps: int | None) -> Source:
    """The recorded rows of a data set.

    Args:
        dataset_id: one of the forms above.
        env: Gymnasium id to evaluate in instead of the recorded one.
        env_steps: step limit of that env.

    Raises:
        SystemExit: code 2 after one clear line.
    """
    if not dataset_id.strip() or not dataset_id.isprintable():
        fail(f"{dataset_id!r} is no data set id; docs/data.md lists the forms of an id")
    names.refuse_url(dataset_id)
    path = Path(os.path.expanduser(dataset_id))
    if names.is_file(path):
        source = d4rl.read_file(path, env, env_steps, reference_scores.row_of(path.stem))
        return source._replace(is_own=True)
    if dataset_id.startswith(env_only.PREFIX):
        return env_only.read(dataset_id, env, env_steps)
    if dataset_id.startswith("local/"):
        return local.read(dataset_id, env, env_steps)
    if dataset_id in reference_scores.table() and not only_in_minari(dataset_id):
        return d4rl.read(dataset_id, env, env_steps)
    task = names.OGBENCH_ID.fullmatch(dataset_id)
    task = task and task[1].split("-")[0] in names.OGBENCH_ENVS
    if task and not only_in_minari(dataset_id):
        return ogbench.read(dataset_id, folders.ogbench(), env, env_steps)
    if names.MINARI_ID.fullmatch(dataset_id) or minari.is_there(dataset_id):
        return minari.read(dataset_id, env, env_steps)
    if path.exists():
        names.fail_unreadable(dataset_id, path)
    names.fail_unknown(dataset_id)


def only_in_minari(dataset_id: str) -> bool:
    """Whether Minari's folder on this machine has a data set under a name of D4RL's or OGBench's.

    What D4RL or OGBench has under that name comes first once its file is on this machine.
    """
    if not minari.is_there(dataset_id) or d4rl.is_there(dataset_id):
        return False
    task = names.OGBENCH_ID.fullmatch(dataset_id)
    if task and (folders.ogbench() / f"{task[1]}-v0.npz").exists():
        return False
    print(f"{dataset_id}: the Minari data set of that name on this machine")
    return True

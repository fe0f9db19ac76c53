# SPDX-License-Identifier: Apache-2.0
"""Make one of the data sets that are stored as Minari data sets."""

import difflib

from common.envs import MAZES
from common.recipes import cartpole, pointmaze

IDS = (*(f"local/pointmaze/{name}-v0" for name in MAZES), cartpole.ID)


def make(dataset_id: str, episodes: int | None = None) -> None:
    """Make one of `IDS` under Minari's local root; do nothing where it is there already.

    The data set appears whole or not at all, and two processes may make the same one at once.

    Args:
        dataset_id: one of `IDS`.
        episodes: how many, if not the recipe's number.

    Raises:
        ValueError: no recipe has that id; the message names similar ones.
        OSError: the root cannot be written, or something else lies where the data set belongs.
    """
    if dataset_id not in IDS:
        near = difflib.get_close_matches(dataset_id, IDS) or IDS
        raise ValueError(f"no recipe makes {dataset_id}; did you mean {' or '.join(near)}?")
    if dataset_id == cartpole.ID:
        cartpole.make(dataset_id, episodes or cartpole.EPISODES)
    else:
        name = list(MAZES)[IDS.index(dataset_id)]
        pointmaze.make(dataset_id, name, episodes or MAZES[name].episodes)

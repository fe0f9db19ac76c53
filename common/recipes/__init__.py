# SPDX-License-Identifier: Apache-2.0
"""Data sets that are made on this machine, by scripted controllers, when they are first used.

    local/pointmaze/{umaze,medium,large}-v0   D4RL's maze2d, see pointmaze.py
    local/cartpole/mixed-v0                   integer actions, see cartpole.py
    local/ogbench/cube-single-play-v0, ...    OGBench's scripted data, see ogbench.py
    local/mujoco/hopper-medium-v0, ...        by benchmarks/collect.py, see mujoco.py

`make` makes those of `IDS`, stored as Minari data sets; `make_ogbench` makes those of
`OGBENCH_RECIPES`, stored as OGBench's npz files. `python -m common.recipes ID` makes any of them.
Importing this package needs NumPy only.
"""

# Data sets recorded before this package had modules name their environment by
# "common.recipes:point_maze", and Gymnasium imports it from here.
from common.envs.pointmaze import point_maze
from common.recipes import mujoco
from common.recipes.making import IDS, make
from common.recipes.ogbench import RECIPES as OGBENCH_RECIPES
from common.recipes.ogbench import make as make_ogbench

__all__ = ["IDS", "OGBENCH_RECIPES", "make", "make_ogbench", "mujoco", "point_maze"]

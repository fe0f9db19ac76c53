# SPDX-License-Identifier: Apache-2.0
"""Environments in which policies are evaluated.

`make` builds one from its Gymnasium id. `flat_and_scaled` wraps it for the algorithms: observations
become flat float32 arrays and actions lie in [-1, 1]. `columns` writes out the values of a space as
such arrays, for recorded data as well (spaces.py). `healthy_range` tells where an episode ends
(ends.py). `reset`, `step` and `close` play an env (playing.py). Behind these names are the point
maze that this project registers (pointmaze.py), the wrappers that give Gymnasium's environments
D4RL's behaviour (d4rl.py). What a run records of its env is in again.py.
"""

from common.envs.again import Translator, make_remembered, remembered
from common.envs.ends import healthy_range
from common.envs.making import make
from common.envs.playing import check_shape, close, is_finite, name, reset, step, success
from common.envs.pointmaze import MAZES, point_maze, register
from common.envs.quiet import make_quietly
from common.envs.spaces import (
    action_space,
    columns,
    flat_and_scaled,
    kinds,
    unusable,
    unusable_action,
    width,
)

__all__ = [
    "MAZES",
    "Translator",
    "action_space",
    "check_shape",
    "close",
    "columns",
    "flat_and_scaled",
    "healthy_range",
    "is_finite",
    "kinds",
    "make",
    "make_quietly",
    "make_remembered",
    "name",
    "point_maze",
    "register",
    "remembered",
    "reset",
    "step",
    "success",
    "unusable",
    "unusable_action",
    "width",
]

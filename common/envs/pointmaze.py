# SPDX-License-Identifier: Apache-2.0
"""D4RL's maze2d as registered Gymnasium environments: a point mass in a maze, one fixed goal.

Observation: position and velocity, no goal. Reward: 1 within 0.5 of the goal. Importing this module
needs NumPy only.
"""

import os
from typing import Any, NamedTuple

import numpy as np

from common import threads
from common.envs import quiet

ENTRY_POINT = "common.envs:point_maze"  # Minari stores it with a data set and imports it by name
FORMER_ENTRY_POINT = "common.recipes:point_maze"  # in data sets recorded by earlier versions


class Maze(NamedTuple):
    layout: str  # name of the map in gymnasium-robotics; the walls are D4RL's
    env_id: str
    goal: tuple[int, int]  # row and column of the G in D4RL's map
    horizon: int  # steps per episode
    episodes: int  # in the data set
    random_return: float  # of uniformly random actions: score 0
    controller_return: float  # of the controller without action noise: score 100


# Mean returns measured over 1000 episodes (seeds 0 to 999, mujoco 3.11.0) by
# python -c "from common.recipes import pointmaze as p;
# [print(m, p.reference_returns(m)) for m in p.MAZES]"
# The mean returns of the data sets: 25.08, 11.94 and 4.69.
MAZES = {
    "umaze": Maze("U_MAZE", "atoll/PointMaze_UMaze-v0", (1, 1), 300, 334, 36.33, 221.7),
    "medium": Maze("MEDIUM_MAZE", "atoll/PointMaze_Medium-v0", (6, 6), 600, 334, 23.07, 424.36),
    "large": Maze("LARGE_MAZE", "atoll/PointMaze_Large-v0", (7, 9), 800, 500, 13.07, 554.44),
}


def register() -> None:
    """Register the environments with Gymnasium. A second call changes nothing."""
    import gymnasium

    with threads.ALONE:
        for name, maze in MAZES.items():
            if maze.env_id not in gymnasium.registry:
                gymnasium.register(
                    maze.env_id,
                    entry_point=ENTRY_POINT,
                    max_episode_steps=maze.horizon,
                    kwargs={"name": name},
                )


def point_maze(name: str, render_mode: str | None = None, **kwargs: Any):
    """The environment: it starts in any free cell, has one fixed goal and never terminates.

    `info["success"]`: this step ended within 0.5 of the goal. `kwargs` go to Gymnasium's MujocoEnv.

    Raises:
        KeyError: `name` is not in `MAZES`.
    """
    import gymnasium

    quiet.robotics()
    from gymnasium_robotics.envs.maze import maps
    from gymnasium_robotics.envs.maze.point_maze import PointMazeEnv

    class PointMaze(gymnasium.Env):
        metadata = PointMazeEnv.metadata

        def __init__(self):
            layout = getattr(maps, MAZES[name].layout)
            world = PointMazeEnv(layout, render_mode, continuing_task=True, **kwargs)
            os.remove(world.tmp_xml_file_path)  # parsed already; gymnasium-robotics leaves it
            self.render_mode, self.maze, self.point = render_mode, world.maze, world.point_env
            self.cells = [tuple(cell) for cell in np.argwhere(np.equal(layout, 0)).tolist()]
            self.action_space = world.action_space
            self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float32)
            self.goal = world.goal = self.maze.cell_rowcol_to_xy(MAZES[name].goal)
            world.update_target_site_pos()  # the goal as drawn
            self.render, self.close = world.render, world.close

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            cell = self.cells[self.np_random.integers(len(self.cells))]
            noise = self.np_random.uniform(-0.1, 0.1, 2)
            self.point.init_qpos[:] = self.maze.cell_rowcol_to_xy(cell) + noise
            self.point.init_qvel[:] = 0.1 * self.np_random.standard_normal(2)
            observation, success = self.observe(self.point.reset()[0])
            return observation, {"success": success}

        def step(self, action):
            observation, success = self.observe(self.point.step(action)[0])  # clips speed to 5
            return observation, float(success), False, False, {"success": success}

        def observe(self, state):
            observation = state.astype(np.float32)  # first, so that stored rows agree with rewards
            return observation, bool(np.linalg.norm(observation[:2] - self.goal) <= 0.5)

    return PointMaze()

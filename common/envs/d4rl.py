# SPDX-License-Identifier: Apache-2.0
"""Gymnasium's environments made to behave as D4RL's.

Each wrapper has a reason: the counterpart differs from D4RL's environment in its observation, its
reward, the end of an episode or the strength of the ant. Facts from D4RL@89141a6.
"""

import numpy as np

from common.envs import quiet


def options(row: dict[str, str]) -> dict:
    """Options for `gymnasium.make` of the counterpart, by the row of the table of D4RL's data."""
    if row.get("suite") == "antmaze":
        maps = quiet.robotics().envs.maze.maps
        name = row["dataset"].split("-")[1]
        layout = getattr(maps, {"umaze": "U"}.get(name, name.upper()) + "_MAZE")
        # Rows upside down: y grows with the row in D4RL and falls with it in gymnasium-robotics.
        return {"maze_map": [list(line) for line in layout[::-1]]}
    if row.get("suite") == "kitchen":
        return {
            "tasks_to_complete": KITCHEN[row["dataset"]],
            "robot_noise_ratio": 0.1,
            "object_noise_ratio": 0.1,
        }
    return {}


def flipped(env_id: str | None, rows: dict[str, np.ndarray]) -> bool:
    """Whether recorded rewards fall with the palm's distance, as in D4RL; the env's rise with it.

    The first steps of the episodes tell: the hand moves there and nothing else does.
    """
    if env_id not in PALM or np.ndim(rows["observations"]) != 2:
        return False
    ends = np.asarray(rows["terminals"]).reshape(-1) > 0
    ends = ends | (np.asarray(rows.get("timeouts", ends)).reshape(-1) > 0)
    starts = np.append(0, np.flatnonzero(ends)[:-1] + 1)
    row = (starts[:, None] + np.arange(12)).reshape(-1)
    row = row[row < len(ends) - 2]
    distance = np.linalg.norm(PALM[env_id](np.asarray(rows["observations"], np.float64)), axis=-1)
    reward = np.asarray(rows["rewards"], np.float64).reshape(-1)
    rise = (distance[row + 2] - distance[row + 1]) * (reward[row + 1] - reward[row])
    return bool(rise.sum() < 0)


def adapt(env, row: dict[str, str], width: int, flipped: bool):
    """The env with D4RL's observation, reward and end of episode, where they differ.

    Args:
        row: of the table of D4RL's data, {} where another env was asked for.
        width: numbers per observation in the data.
        flipped: whether the data have D4RL's sign of the palm's distance.
    """
    name, suite = env.spec.id, row.get("suite")
    if name in PALM:
        return palm_reward(env) if flipped else env
    if name == "AdroitHandPen-v1":
        return _ends_when_dropped(env)
    if suite == "antmaze" and name.startswith("AntMaze"):
        return _ant_maze(env, GOALS[row["dataset"].split("-")[1]])
    if suite == "maze2d" and name.startswith("atoll/PointMaze"):
        return _maze2d(env, dense="dense" in row["dataset"])
    if suite == "kitchen" and name.startswith("FrankaKitchen"):
        return _kitchen(env, KITCHEN[row["dataset"]])
    if name == "Ant-v4" and width == 111:
        return _padded(env, 111)
    return env


# gymnasium-robotics 1.4.2 adds 0.1 ||palm - object|| to the reward, D4RL subtracts it. The distance
# can be computed from the observation: palm - handle; palm - ball; palm and hammer.
PALM = {
    "AdroitHandDoor-v1": lambda x: x[..., 35:38],
    "AdroitHandRelocate-v1": lambda x: x[..., 30:33],
    "AdroitHandHammer-v1": lambda x: x[..., 33:36] - x[..., 36:39],
}
GOALS = {"umaze": (3, 1), "medium": (6, 6), "large": (7, 9)}  # row and column of D4RL's goal cell
_LIGHT = ["microwave", "kettle", "light switch", "slide cabinet"]
KITCHEN = {
    "kitchen-complete-v0": _LIGHT,
    "kitchen-partial-v0": _LIGHT,
    "kitchen-mixed-v0": ["microwave", "kettle", "bottom burner", "light switch"],
}


def palm_reward(env):
    """The env with D4RL's sign in front of the palm's distance."""
    import gymnasium

    palm = PALM[env.spec.id]

    class D4RLReward(gymnasium.Wrapper):
        """The reward with D4RL's sign."""

        def step(self, action):
            observation, reward, termination, truncation, info = self.env.step(action)
            reward = float(reward) - 0.2 * float(np.linalg.norm(palm(observation)))
            return observation, reward, termination, truncation, info

    return D4RLReward(env)


def _ends_when_dropped(env):
    import gymnasium

    class D4RLPen(gymnasium.Wrapper):
        """The episode ends where the pen falls; gymnasium-robotics goes on."""

        def step(self, action):
            observation, reward, _, truncation, info = self.env.step(action)
            return observation, reward, bool(observation[26] < 0.075), truncation, info

    return D4RLPen(env)


def _padded(env, size):
    import gymnasium

    space = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float64)
    rest = np.zeros(size - env.observation_space.shape[0])  # contact forces: zero in mujoco-py 2
    return gymnasium.wrappers.TransformObservation(
        env, lambda observation: np.concatenate([observation, rest]), space
    )


def _ant_maze(env, goal_cell):
    import gymnasium

    class D4RLAntMaze(gymnasium.Wrapper):
        """D4RL's ant, origin, start, goal and end of episode; 29 numbers, x and y first."""

        def __init__(self, env):
            super().__init__(env)
            maze, self.ant = env.unwrapped, env.unwrapped.ant_env
            rows, columns = maze.maze.map_length, maze.maze.map_width
            self.origin = np.array([6.0 - 2 * columns, 6.0 - 2 * rows])  # D4RL's first free cell
            self.goal_cell = 4.0 * (np.array(goal_cell[::-1]) - 1)
            self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (29,), np.float64)
            # D4RL: torques up to 30 every 0.1 s. Gymnasium's ant: up to 150, every 0.05 s.
            self.ant.model.actuator_gear[:, 0] = 30.0
            self.ant.model.opt.timestep = 0.02
            self.ant.model.geom_solimp[:, :3] = (0.8, 0.8, 0.01)

        def observe(self):
            position = self.ant.data.qpos.copy()
            position[:2] -= self.origin
            return np.concatenate([position, self.ant.data.qvel])

        def reset(self, *, seed=None, options=None):
            _, info = self.env.reset(seed=seed, options=options)
            draw, ant = self.unwrapped.np_random, self.ant
            self.goal = self.goal_cell + draw.uniform(0, 1, 2) + draw.uniform(0, 0.5, 2)
            self.unwrapped.goal = self.goal + self.origin
            self.unwrapped.update_target_site_pos()  # the goal as drawn
            position = ant.init_qpos.copy()
            position[:2] = self.origin
            position += draw.uniform(-0.1, 0.1, len(position))
            ant.set_state(position, 0.1 * draw.standard_normal(ant.model.nv))
            return self.observe(), info | {"success": False}

        def step(self, action):
            _, _, _, truncation, info = self.env.step(action)
            observation = self.observe()
            success = bool(np.linalg.norm(observation[:2] - self.goal) <= 0.5)
            return observation, float(success), success, truncation, info | {"success": success}

    return D4RLAntMaze(env)


def _maze2d(env, dense):
    import gymnasium

    class D4RLMaze2d(gymnasium.Wrapper):
        """D4RL's axes: the first grows with the row, the second with the column of the map.

        Its origin, and so every start and goal, is 0.2 off the centre of a cell.
        """

        def __init__(self, env):
            super().__init__(env)
            rows, columns = env.unwrapped.maze.map_length, env.unwrapped.maze.map_width
            self.corner = np.array([rows / 2 - 0.7, columns / 2 - 0.7])
            env.unwrapped.goal += (0.2, -0.2)

        def turn(self, observation):
            x, y, speed_x, speed_y = observation
            place = self.corner + np.array([-y, x])
            return np.concatenate([place, [-speed_y, speed_x]]).astype(np.float32)

        def reset(self, *, seed=None, options=None):
            _, info = self.env.reset(seed=seed, options=options)
            point = self.unwrapped.point
            point.set_state(point.data.qpos + np.array([0.2, -0.2]), point.data.qvel)
            state = np.concatenate([point.data.qpos, point.data.qvel])
            observation, success = self.unwrapped.observe(state)
            return self.turn(observation), info | {"success": success}

        def step(self, action):
            turned = np.array([action[1], -action[0]], np.float32)
            observation, reward, termination, truncation, info = self.env.step(turned)
            if dense:
                reward = float(np.exp(-np.linalg.norm(observation[:2] - self.unwrapped.goal)))
            return self.turn(observation), reward, termination, truncation, info

    return D4RLMaze2d(env)


def _kitchen(env, tasks):
    import gymnasium

    with_goal = np.zeros(30)
    from gymnasium_robotics.envs.franka_kitchen import kitchen_env

    for task in tasks:
        with_goal[kitchen_env.OBS_ELEMENT_INDICES[task]] = kitchen_env.OBS_ELEMENT_GOALS[task]
    space = gymnasium.spaces.Box(-np.inf, np.inf, (60,), np.float64)

    def positions(observation):  # robot, objects, goal; D4RL's observation has no velocities
        x = observation["observation"]
        return np.concatenate([x[:9], x[18:39], with_goal])

    return gymnasium.wrappers.TransformObservation(env, positions, space)

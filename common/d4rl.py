# SPDX-License-Identifier: Apache-2.0
"""D4RL's own data sets: where the files are, and Gymnasium's envs made to behave as D4RL's.

No `d4rl`, no `mujoco-py`. Facts from D4RL@89141a6 (infos.py and the envs); docs/data.md tells what
still differs. Every wrapper here has a reason: the observation's layout, the reward, the end of an
episode or the ant's strength of the counterpart is not D4RL's.
"""

import csv
import os
from pathlib import Path

import numpy as np

from common import download, environments, fail

SERVERS = (
    "https://rail.eecs.berkeley.edu/datasets/offline_rl/",
    "http://rail.eecs.berkeley.edu/datasets/offline_rl/",  # D4RL's own address
)
LICENCE = "CC BY 4.0 (D4RL: Fu et al., 2020, arXiv:2004.07219), unless its authors say otherwise"
KEYS = ("observations", "actions", "rewards", "terminals")
COLUMNS = (*KEYS, "timeouts", "next_observations")
CHUNK = 1 << 16  # rows read at once when a file is checked


def table() -> dict[str, dict[str, str]]:
    """D4RL's names -> suite, reference pair, horizon, counterpart env and file of each."""
    with (Path(__file__).parent / "reference_scores.csv").open() as file:
        return {row["dataset"]: row for row in csv.DictReader(file)}


def row_of(name: str) -> dict[str, str]:
    """The table's row of a D4RL name or of a file's stem, {} if there is none."""
    rows = table()
    if name.replace("_", "-") in rows:
        return rows[name.replace("_", "-")]
    return next((row for row in rows.values() if Path(row["file"]).stem == name), {})


def known(row: dict, env_id: str | None, facts: dict, numbers: tuple) -> dict:
    """What a name tells of its file: pair and step limit where the file is evaluated in that task.

    Args:
        row: the table's, {} for other names.
        env_id: the env that `--env` or the file asks for, if any.
        facts: the file's attributes. Half a pair there is not completed by the name's.
        numbers: which of the row's values are numbers.
    """
    found = {key: float(row[key]) if key in numbers else row[key] for key in row if row[key]}
    family = row.get("env_id", "").rpartition("-v")[0]
    if env_id and env_id.rpartition("-v")[0] != family:
        found = {key: value for key, value in found.items() if key not in numbers}
    if "ref_min_score" in facts or "ref_max_score" in facts:
        found |= {"ref_min_score": None, "ref_max_score": None}
    return found


def needed(row: dict, path: Path) -> tuple[str, ...]:
    """The arrays a file must have: AntMaze's walks go on after the goal, to a time limit."""
    if not row and path.stem.startswith("antmaze-"):
        print(f"{path}: D4RL's AntMaze data are antmaze-...-v2; this one is cut at terminals too")
    return (*KEYS, "timeouts") if row.get("suite") == "antmaze" else KEYS


def folder() -> Path:
    root = os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets"
    return Path(os.path.expanduser(root))


def file_of(name: str) -> Path:
    """The data set's file, downloaded at the first call.

    Raises:
        SystemExit: code 2 after one line, where no server delivers a usable file.
    """
    row = table()[name]
    path = folder() / Path(row["file"]).name
    if not path.exists():
        print(f"downloading {name} to {path}; licence of the data: {LICENCE}", flush=True)
        try:
            download.fetch([server + row["file"] for server in SERVERS], path, _check)
        except (OSError, download.Unusable) as error:
            reason = " ".join(str(error).split())
            fail(
                f"{name}: not in {folder()} and the download failed ({reason}); put "
                f"{SERVERS[-1]}{row['file']} there by hand or set D4RL_DATASET_DIR"
            )
    return path


def _check(path):
    import h5py

    try:
        with h5py.File(path) as file:
            missing = [key for key in KEYS if key not in file]
            lengths = {key: len(file[key]) for key in COLUMNS if key in file}
            for key, length in lengths.items():  # once through all rows: compressed parts unpack
                for start in range(0, length, CHUNK):
                    _ = file[key][start : start + CHUNK]
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise download.Unusable(f"what came is not an HDF5 file: {error}") from error
    if missing:
        raise download.Unusable(f"the file that came has no {', '.join(missing)}")
    if len(set(lengths.values())) > 1:
        raise download.Unusable(f"the file that came has rows that disagree: {lengths}")


# --- Rows ---------------------------------------------------------------------------------------
def repair(suite: str, rows: dict[str, np.ndarray]) -> bool:
    """Sets the episode ends of maze data; returns whether a termination ends an episode.

    AntMaze walks go on after they reached the goal: `terminals` there stop the bootstrap, but only
    a time limit, or a jump that no ant can make, ends the episode. Maze2d has no true end at all:
    its flags mark new targets of one long walk.
    """
    terminals = np.asarray(rows["terminals"]).reshape(-1)
    if suite == "maze2d":
        timeouts = np.asarray(rows.get("timeouts", terminals)).reshape(-1)
        rows["timeouts"] = (timeouts > 0) | (terminals > 0)
        rows["terminals"] = np.zeros(len(terminals), np.float32)
    is_ant = suite == "mujoco" and np.shape(rows["observations"])[1] == 111
    if is_ant and np.any(rows["observations"][:, 27:]):
        print("contact forces in the data are not zero, but they are in the evaluation env")
    if suite == "antmaze":
        if "timeouts" not in rows:
            fail(
                "AntMaze data of D4RL without 'timeouts': where walks end cannot be told; rename it"
            )
        timeouts = np.asarray(rows["timeouts"]).reshape(-1)
        if len(timeouts) == len(terminals) == len(rows["observations"]):
            jump = np.abs(np.diff(rows["observations"][:, :2], axis=0)).max(axis=1) > 2
            rows["timeouts"] = (timeouts > 0) | np.append(jump, True)
        return False
    return True


# --- Envs ---------------------------------------------------------------------------------------
def options(row: dict[str, str]) -> dict:
    """Arguments for `gymnasium.make` of the counterpart."""
    if row.get("suite") == "antmaze":
        maps = environments.robotics().envs.maze.maps
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


def flipped(env_id: str, rows: dict[str, np.ndarray]) -> bool:
    """Whether rewards fall with the palm's distance, as in D4RL, where the env's would rise.

    Told by the first steps of the episodes, when the hand moves and nothing else does.
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
    """The env with D4RL's observation, reward and end of episode, where they differ."""
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


# gymnasium-robotics 1.4.2 rewards a distant palm: + 0.1 ||palm - object||, D4RL - 0.1. The distance
# is in the observation: palm - handle; palm - ball; palm and hammer.
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
        """The reward with D4RL's sign of the palm's distance."""

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

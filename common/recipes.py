"""Data sets made locally on first use: `local/pointmaze/{umaze,medium,large}-v0`, D4RL's maze2d.

One noisy walk between random targets, never reset, cut into episodes as long as the evaluation's.
Observation: position and velocity, no goal. Reward: 1 within 0.5 of the maze's one fixed goal, in
the data as in the evaluation env. The walk wanders, so a learner can do far better than the data.
Unlike D4RL: fewer steps, action noise in every set, and rewards of the position after the step.
`local/cartpole/mixed-v0`, with integer actions, is in cartpole_recipe.py.

Importing this module needs NumPy only. Minari's stored env spec names `point_maze` by its path, so
that the env can be rebuilt in a process that never imported it.
"""

import argparse
import contextlib
import difflib
import io
import itertools
import os
import shutil
import tempfile
import time
import warnings
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common import cartpole_recipe


class Maze(NamedTuple):
    layout: str  # name of the map in gymnasium-robotics; the walls are D4RL's
    env_id: str
    goal: tuple[int, int]  # row and column of the G in D4RL's map
    horizon: int  # steps per episode
    episodes: int  # in the data set
    random_return: float  # of uniformly random actions: score 0
    controller_return: float  # of the controller without action noise: score 100


# Mean returns measured over 1000 episodes (seeds 0 to 999, mujoco 3.11.0) by
# python -c "from common import recipes as r; [print(m, r.reference_returns(m)) for m in r.MAZES]"
# The data's own: 25.08, 11.94 and 4.69.
MAZES = {
    "umaze": Maze("U_MAZE", "atoll/PointMaze_UMaze-v0", (1, 1), 300, 334, 36.33, 221.7),
    "medium": Maze("MEDIUM_MAZE", "atoll/PointMaze_Medium-v0", (6, 6), 600, 334, 23.07, 424.36),
    "large": Maze("LARGE_MAZE", "atoll/PointMaze_Large-v0", (7, 9), 800, 500, 13.07, 554.44),
}
IDS = (*(f"local/pointmaze/{name}-v0" for name in MAZES), cartpole_recipe.ID)


def make(dataset_id: str, episodes: int | None = None) -> None:
    """Makes one of `IDS` under Minari's local root; does nothing where it is already.

    The data set appears whole or not at all, and two processes may make the same one at once.
    `episodes`: how many, if not the recipe's number.

    Raises:
        ValueError: no recipe has that id; the message names near ones.
        OSError: the root cannot be written, or something else lies where the data set belongs.
    """
    if dataset_id not in IDS:
        near = difflib.get_close_matches(dataset_id, IDS) or IDS
        raise ValueError(f"no recipe makes {dataset_id}; did you mean {' or '.join(near)}?")
    if dataset_id == cartpole_recipe.ID:
        _store(*cartpole_recipe.recipe(episodes or cartpole_recipe.EPISODES))
    else:
        name = list(MAZES)[IDS.index(dataset_id)]
        _make_point_maze(dataset_id, name, episodes or MAZES[name].episodes)


def register() -> None:
    """Registers the evaluation envs with gymnasium; a second call changes nothing."""
    import gymnasium

    for name, maze in MAZES.items():
        if maze.env_id not in gymnasium.registry:
            gymnasium.register(
                maze.env_id,
                entry_point="common.recipes:point_maze",
                max_episode_steps=maze.horizon,
                kwargs={"name": name},
            )


def point_maze(name: str, render_mode: str | None = None, **kwargs: Any):
    """Evaluation env: start in any free cell, one fixed goal, no termination.

    `info["success"]`: this step ended within 0.5 of the goal. `kwargs` go to gymnasium's MujocoEnv.

    Raises:
        KeyError: `name` is not in `MAZES`.
    """
    import gymnasium

    with contextlib.redirect_stderr(io.StringIO()):  # it prints news about other envs at import
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


def _plan(env, generator, observation, target):
    """D4RL's waypoints: cells on a shortest path to the target cell, jittered but for the last."""
    towards, queue = {target: target}, deque([target])  # cell -> next cell on the way
    while queue:
        row, column = queue.popleft()
        for step in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            cell = (row + step[0], column + step[1])
            if cell in env.cells and cell not in towards:
                towards[cell] = (row, column)
                queue.append(cell)
    waypoints, cell = [], tuple(env.maze.cell_xy_to_rowcol(observation[:2]).tolist())
    while not waypoints or cell != target:
        cell = towards[cell]
        jitter = generator.uniform(0.0, 0.2, 2) if cell != target else 0.0
        waypoints.append(env.maze.cell_rowcol_to_xy(np.array(cell) - jitter))
    return waypoints


def _control(observation, waypoints):
    """PD control to the first waypoint, dropped when reached. Returns (action, target reached)."""
    error, velocity = waypoints[0] - observation[:2], observation[2:]
    # D4RL also wants the last step shorter than 0.1: always true at its speed limit.
    reached = np.linalg.norm(error) < 0.1
    if reached and len(waypoints) > 1:
        waypoints.pop(0)
        reached = False
    return np.clip(10.0 * error - velocity, -1.0, 1.0), reached


def reference_returns(name: str, episodes: int = 1000) -> tuple[float, float]:
    """Mean returns of random actions and of the controller without action noise, seeds 0, 1, ..."""
    env, returns = point_maze(name), np.zeros(2)
    for seed, controlled in itertools.product(range(episodes), (0, 1)):
        generator = np.random.default_rng(seed)
        observation, _ = env.reset(seed=seed)
        waypoints = _plan(env, generator, observation, MAZES[name].goal)
        for _ in range(MAZES[name].horizon):
            control, _ = _control(observation, waypoints)
            action = control if controlled else generator.uniform(-1.0, 1.0, 2)
            observation, reward, *_ = env.step(action)
            returns[controlled] += reward
    return tuple((returns / episodes).round(2).tolist())


def _walk(name, steps, horizon):
    """The data: observation [steps + 1, 4], action [steps, 2], reward [steps]."""
    from tqdm import tqdm

    env, generator = point_maze(name), np.random.default_rng(0)
    observation, reward = np.empty((steps + 1, 4), np.float32), np.empty(steps)
    action = np.empty((steps, 2), np.float32)
    observation[0], _ = env.reset(seed=0)
    reached, deadline = True, 0
    for t in tqdm(range(steps), name, disable=None, unit=" steps", leave=False):
        if reached or t == deadline:
            target = env.cells[generator.integers(len(env.cells))]
            waypoints, deadline = _plan(env, generator, observation[t], target), t + horizon
        control, reached = _control(observation[t], waypoints)
        action[t] = np.clip(control + 0.5 * generator.standard_normal(2), -1.0, 1.0)
        observation[t + 1], reward[t], *_ = env.step(action[t])
    return observation, action, reward


def _make_point_maze(dataset_id, name, episodes):
    maze, steps = MAZES[name], episodes * MAZES[name].horizon

    def play():
        observation, action, reward = _walk(name, steps, maze.horizon)
        never, last = np.zeros(maze.horizon, bool), np.arange(maze.horizon) == maze.horizon - 1
        for start in range(0, steps, maze.horizon):
            rows = slice(start, start + maze.horizon)
            yield observation[start : rows.stop + 1], action[rows], reward[rows], never, last

    register()
    _store(
        (dataset_id, maze.env_id, maze.random_return, maze.controller_return),
        "waypoint controller, action noise 0.5",
        "D4RL's maze2d made locally: one walk between random targets.",
        play(),
        steps,
    )


def _store(ids_and_pair, algorithm, description, episodes, steps):
    """Episodes: observation [T + 1, ...], action, reward, termination, truncation [T] each.

    They are an iterator, so nothing is played where the data set is there already.
    """
    from unittest import mock

    import minari
    from minari.data_collector import EpisodeBuffer
    from minari.storage import get_dataset_path

    dataset_id, env_id, low, high = ids_and_pair
    root, final = get_dataset_path(), get_dataset_path(dataset_id)
    if (final / "data").exists():
        return
    seconds = steps / 2e4  # 25,000 steps/s were measured on one core
    print(f"making {dataset_id} ({steps:,} steps, about {seconds:.0f} s) in {final}", flush=True)
    names = ("observations", "actions", "rewards", "terminations", "truncations")
    buffers = [EpisodeBuffer(**dict(zip(names, x, strict=True)), infos={}) for x in episodes]
    for folder in root.glob(".making-*"):  # left by a killed run, unless so young that it is in use
        if time.time() - folder.stat().st_mtime > 600:
            shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=root) as temporary:
        # Minari reads its root from the environment at each call, and warns of a missing author.
        with (
            mock.patch.dict(os.environ, MINARI_DATASETS_PATH=temporary),
            warnings.catch_warnings(action="ignore"),
        ):
            minari.create_dataset_from_buffers(
                dataset_id,
                buffers,
                env=env_id,
                eval_env=env_id,
                algorithm_name=algorithm,
                description=description,
                ref_min_score=low,
                ref_max_score=high,
                num_episodes_average_score=1000,
                data_format="hdf5",
            )
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.replace(Path(temporary, dataset_id), final)
        except OSError:
            if not (final / "data").exists():  # else another process was first, with the same data
                raise


def main(argv: list[str] | None = None) -> None:
    """`python -m common.recipes ID [--episodes N] [--workers W]`: makes a data set of some size."""
    from common import fail, ogbench_recipes, sources

    ids = [*IDS, *(f"local/ogbench/{name}" for name in ogbench_recipes.RECIPES)]
    parser = argparse.ArgumentParser("python -m common.recipes", description="Make a data set.")
    parser.add_argument("id", help="one of " + ", ".join(ids))
    parser.add_argument("--episodes", type=int, help="how many, for training")
    parser.add_argument("--workers", type=int, help="processes (OGBench's only)")
    args = parser.parse_args(argv)
    if args.id not in ids:
        near = " or ".join(difflib.get_close_matches(args.id, ids)) or "one that --help lists"
        fail(f"no recipe makes {args.id}; did you mean {near}?")
    for name in ("episodes", "workers"):
        if (value := getattr(args, name)) is not None and value < 1:
            fail(f"--{name} {value}: at least 1 is wanted")
    if args.id in IDS and (sources.minari_folder(args.id) / "data").exists():
        if args.episodes:
            fail(f"{args.id} is made already; delete {sources.minari_folder(args.id)} first")
        return
    local, folder = args.id in IDS, sources.ogbench_folder("local")
    folder = sources.minari_folder("") if local else folder
    try:
        if local:
            return make(args.id, args.episodes)
        ogbench_recipes.make(Path(args.id).name, folder, args.episodes, args.workers)
    except OSError as error:
        fail(f"{args.id}: cannot be made in {folder} ({error})")


if __name__ == "__main__":
    from common import recipes, shell

    shell.run(recipes.main)

# SPDX-License-Identifier: Apache-2.0
"""`local/pointmaze/{umaze,medium,large}-v0`: D4RL's maze2d, recorded on this machine.

One noisy walk between random targets, never reset, is cut into episodes as long as those of the
evaluation. The walk wanders, so a policy can do far better than the data. Unlike D4RL's data, these
have fewer steps, action noise in every set, and rewards of the position after the step. Importing
this module needs NumPy only.
"""

import itertools
from collections import deque

import numpy as np

from common.envs.pointmaze import MAZES, point_maze, register
from common.recipes import minari_store


def _plan(env, generator, observation, target):
    """D4RL's waypoints: the cells of a shortest path to the target, all but the last jittered."""
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
    """PD control to the first waypoint, which is dropped once reached. -> (action, at target)"""
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
    """The whole walk: observation [steps + 1, 4], action [steps, 2], reward [steps]."""
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


def make(dataset_id, name, episodes):
    """Record the walk through the maze `name` and store it as a Minari data set."""
    maze, steps = MAZES[name], episodes * MAZES[name].horizon

    def play():
        observation, action, reward = _walk(name, steps, maze.horizon)
        never, last = np.zeros(maze.horizon, bool), np.arange(maze.horizon) == maze.horizon - 1
        for start in range(0, steps, maze.horizon):
            rows = slice(start, start + maze.horizon)
            yield observation[start : rows.stop + 1], action[rows], reward[rows], never, last

    register()
    minari_store.store(
        dataset_id=dataset_id,
        env_id=maze.env_id,
        reference=(maze.random_return, maze.controller_return),
        algorithm="waypoint controller, action noise 0.5",
        description="D4RL's maze2d made locally: one walk between random targets.",
        episodes=play(),
        steps=steps,
    )

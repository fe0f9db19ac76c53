# SPDX-License-Identifier: Apache-2.0
"""`local/ogbench/{cube-single-play,...}-v0`: OGBench's scripted data, recorded on this machine.

The scripted controllers (OGBench's oracles), their noise and the length of an episode are OGBench's
(its data_gen_scripts at 1d41409 and the oracles in the package). The caller chooses the number of
episodes, 100 by default; OGBench's own number is `Recipe.official`. The result is two npz files,
for training and for validation, as OGBench has them.

Every episode has its own seed, so the file does not depend on interruptions or on the number of
processes. Importing this module needs NumPy only.
"""

import json
import os
import shutil
import signal
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import envs, fail, files, machine, one_line
from common.envs import graphics

STEPS = 1001  # rows per episode: 1000 transitions and the last observation
EPISODES = 100  # in the training file by default
VALIDATION = 10  # training episodes per validation episode


class Recipe(NamedTuple):
    env: str  # goal-conditioned env of the package
    kind: str  # "navigate", "stitch": noisy walks; "play": planned; "noisy": closed loop
    steps: int = STEPS
    random: float = 0.0  # share of uniformly random actions
    speed: int = 500  # steps per second and process, measured
    official: int = 1000  # training episodes of the official file
    stacking: tuple[float, float] = (0.5, 0.5)  # p_stack of an episode is uniform between these


RECIPES = {}
# From here on (name, ...) as data_gen_scripts/commands.sh calls OGBench's scripts.
for _name, _speed in (("medium", 5000), ("large", 4000), ("giant", 2500), ("teleport", 4000)):
    _env, _steps, _episodes = f"pointmaze-{_name}-v0", STEPS, 1000
    if _name == "giant":
        _steps, _episodes = 2001, 500
    RECIPES[f"pointmaze-{_name}-navigate-v0"] = Recipe(
        _env, "navigate", _steps, speed=_speed, official=_episodes
    )
    RECIPES[f"pointmaze-{_name}-stitch-v0"] = Recipe(
        _env, "stitch", 201, speed=_speed, official=5000
    )
for _name, _random, _speed, _episodes, _stacking in (
    ("cube-single", 0.1, 500, 1000, (0.0, 0.0)),
    ("cube-double", 0.1, 500, 1000, (0.0, 0.25)),
    ("cube-triple", 0.1, 400, 3000, (0.05, 0.35)),
    ("cube-quadruple", 0.1, 300, 5000, (0.1, 0.5)),
    ("scene", 0.1, 500, 1000, (0.5, 0.5)),
    ("puzzle-3x3", 0.2, 500, 1000, (0.5, 0.5)),
    ("puzzle-4x4", 0.2, 500, 1000, (0.5, 0.5)),
    ("puzzle-4x5", 0.2, 500, 3000, (0.5, 0.5)),
    ("puzzle-4x6", 0.2, 500, 5000, (0.5, 0.5)),
):
    _common = {"speed": _speed, "official": _episodes, "stacking": _stacking}
    RECIPES[f"{_name}-play-v0"] = Recipe(f"{_name}-v0", "play", **_common)
    RECIPES[f"{_name}-noisy-v0"] = Recipe(f"{_name}-v0", "noisy", random=_random, **_common)


def make(name: str, folder: Path, episodes: int | None = None, workers: int | None = None) -> None:
    """Make `name.npz` and `name-val.npz` in `folder`, unless they are there already.

    Finished episodes are kept in `.making-name` until all are there, so that a later call continues
    after one that was killed.

    Raises:
        SystemExit: code 2 after one line, where the file on disk has another number of episodes, or
            is damaged.
    """
    graphics.check()
    folder.mkdir(parents=True, exist_ok=True)
    with files.locked(folder / f".{name}.lock"):
        _make(name, folder, episodes, workers)


def _make(name, folder, episodes, workers):
    final, recipe = folder / f"{name}.npz", RECIPES[name]
    if final.exists():
        have = _episodes_in(final)
        if episodes not in (None, have):
            fail(f"{final} holds {have} episodes, not {episodes}; delete it to make another one")
        print(f"{final} is there already, with {have} episodes")
        return
    episodes, workers = episodes or EPISODES, workers or min(machine.cores(), 8)
    todo = [("train", i) for i in range(episodes)]
    todo += [("val", i) for i in range(max(1, episodes // VALIDATION))]
    parts = folder / f".making-{name}"
    parts.mkdir(parents=True, exist_ok=True)
    left = [job for job in todo if not _part(parts, job).exists()]
    seconds = len(left) * recipe.steps / recipe.speed / workers
    print(
        f"making {name} ({episodes} episodes of {recipe.steps} rows and {len(todo) - episodes} for "
        f"validation, {len(left)} to go, {workers} processes, about {seconds:.0f} s) in {folder}. "
        "If it is interrupted, the same command continues. Other sizes: "
        f"python -m common.recipes local/ogbench/{name} --episodes N, or --official",
        flush=True,
    )
    _make_parts(name, parts, left, workers)
    for split, path in (("val", folder / f"{name}-val.npz"), ("train", final)):
        _join(parts, [job for job in todo if job[0] == split], path)
        if split == "val":
            made_with = {package: version(package) for package in ("ogbench", "mujoco")}
            text = json.dumps({"episodes": episodes, **made_with}) + "\n"
            (folder / f"{name}.about.json").write_text(text, encoding="utf-8")
    shutil.rmtree(parts, ignore_errors=True)
    print(f"made: {final}")


def _episodes_in(file):
    """The number of episodes in an npz file, by their last rows."""
    try:
        with np.load(file) as columns:
            return int((columns["terminals"] > 0).sum())
    except OSError:
        raise
    except Exception as error:  # of zipfile, zlib, NumPy
        fail(f"{file} is damaged ({one_line(error)}); delete it to make it again")


def _part(parts, job):
    return parts / f"{job[0]}-{job[1]:05}.npz"


def _make_parts(name, parts, jobs, workers):
    from tqdm import tqdm

    bar = tqdm(total=len(jobs), desc=name, unit=" episodes", disable=None)
    with bar:
        if workers == 1 or len(jobs) < 2:
            with warnings.catch_warnings():
                _start(name, parts)
                for job in jobs:
                    _make_part(job)
                    bar.update()
            return
        import multiprocessing

        # Spawned, not forked: the caller may have threads, as JAX does.
        context = multiprocessing.get_context("spawn")
        with context.Pool(min(workers, len(jobs)), _start_worker, (name, parts)) as pool:
            for _ in pool.imap_unordered(_make_part, jobs):
                bar.update()


_worker: dict = {}  # of this process: the env, the oracles, the folder


def _start_worker(name, parts):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller handles Ctrl-C
    _start(name, parts)


def _start(name, parts):
    import gymnasium

    recipe = RECIPES[name]
    options = {"terminate_at_goal": False, "max_episode_steps": recipe.steps}
    if recipe.kind in ("play", "noisy"):
        options["mode"] = "data_collection"
    # Notices about a missing display and about the precision of action bounds.
    warnings.simplefilter("ignore")
    import ogbench  # noqa: F401 - registers the envs

    env = envs.make_quietly(recipe.env, gymnasium.make, recipe.env, **options)
    _worker.update(recipe=recipe, parts=parts, env=env)
    _worker["agents"] = _oracles(recipe, env) if recipe.kind in ("play", "noisy") else {}


def _make_part(job):
    split, index = job
    walks = _worker["recipe"].kind in ("navigate", "stitch")
    for attempt in range(1000):  # the official script repeats failed episodes, too
        seed = np.random.SeedSequence([split == "val", index, attempt]).generate_state(1)[0]
        np.random.seed(seed)  # noqa: NPY002 - envs and oracles draw from NumPy's global generator
        rows = _navigate(int(seed)) if walks else _manipulate(int(seed))
        if rows is not None:
            break
    path = _part(_worker["parts"], job)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    with unfinished.open("wb") as file:
        np.savez(file, **rows)
    os.replace(unfinished, path)


def _join(parts, jobs, path):
    columns = {}
    for job in jobs:
        with np.load(_part(parts, job)) as part:
            for key in part:
                columns.setdefault(key, []).append(part[key])
    unfinished = parts / f"{path.name}.{os.getpid()}.tmp"
    with unfinished.open("wb") as file:
        np.savez_compressed(file, **{key: np.concatenate(x) for key, x in columns.items()})
    os.replace(unfinished, path)


class _Rows:
    """The columns of an episode, with the types of the official files."""

    def __init__(self):
        self.columns = {}

    def add(self, observation, action, done, info):
        row = {"observations": observation, "actions": action, "terminals": done}
        row |= {key: info[f"prev_{key}"] for key in ("qpos", "qvel")}
        if "prev_button_states" in info:
            row["button_states"] = info["prev_button_states"]
        for key, value in row.items():
            self.columns.setdefault(key, []).append(value)

    def arrays(self):
        types = {"terminals": bool, "button_states": np.int64}
        return {k: np.array(x, types.get(k, np.float32)) for k, x in self.columns.items()}


# --- PointMaze ----------------------------------------------------------------------------------
def _navigate(seed):
    """A noisy walk (std 0.5) along shortest paths.

    Kind "navigate": to one far goal after the other. Kind "stitch": to one goal four cells away,
    where the walk stays.
    """
    env, rows, draw = _worker["env"], _Rows(), np.random.default_rng(seed)
    stays = _worker["recipe"].kind == "stitch"
    maze = env.unwrapped
    free = [tuple(cell) for cell in np.argwhere(maze.maze_map == 0).tolist()]
    corners = [cell for cell in free if not _hallway(maze.maze_map, *cell)]
    start = free[draw.integers(len(free))]
    goals = _cells_at(maze.maze_map, start, 4) or [start] if stays else corners
    goal = goals[draw.integers(len(goals))]
    task = {"init_ij": start, "goal_ij": goal}
    maze.action_space.seed(seed)  # sampled by the env's own reset
    observation, _ = env.reset(seed=seed, options={"task_info": task})
    done = False
    while not done:
        position = maze.get_xy()
        subgoal, _ = maze.get_oracle_subgoal(position, maze.cur_goal_xy)
        direction = (subgoal - position) / (np.linalg.norm(subgoal - position) + 1e-6)
        action = np.clip(direction + draw.normal(0, 0.5, 2), -1, 1)
        following, _, termination, truncation, info = env.step(action)
        done = termination or truncation
        if info["success"] and not stays:
            maze.set_goal(corners[draw.integers(len(corners))])
        rows.add(observation, action, done, info)
        observation = following
    return rows.arrays()


def _hallway(walls, i, j):
    """Whether a cell has walls on two opposite sides and none on the others."""
    sides = tuple(int(walls[cell]) for cell in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)))
    return sides in ((0, 0, 1, 1), (1, 1, 0, 0))


def _cells_at(walls, start, distance):
    """The free cells whose shortest path from `start` has `distance` steps."""
    reached, front = {start}, [start]
    for _ in range(distance):
        beside = [
            (i + di, j + dj) for i, j in front for di, dj in ((-1, 0), (0, -1), (1, 0), (0, 1))
        ]
        front = [cell for cell in dict.fromkeys(beside) if not walls[cell] and cell not in reached]
        reached.update(front)
    return front


# --- Manipulation -------------------------------------------------------------------------------
def _oracles(recipe, env):
    """The oracle of each kind of object, with OGBench's noise and options."""
    from importlib import import_module

    objects = {"cube": ["cube"], "puzzle": ["button"]}
    objects = objects.get(recipe.env.split("-")[0], ["cube", "button", "drawer", "window"])
    folder = "plan" if recipe.kind == "play" else "markov"
    agents = {}
    for name in objects:
        module = import_module(f"ogbench.manipspace.oracles.{folder}.{name}_{folder}")
        oracle = getattr(module, f"{name.title()}{folder.title()}Oracle")
        if recipe.kind == "play":
            options = {"noise": 0.1, "noise_smoothing": 0.5}
        else:
            options = {"min_norm": 0.4}
            if name == "cube" and len(objects) > 1:
                options["max_step"] = 100
        if recipe.env.startswith("puzzle"):
            options["gripper_always_closed"] = True
        agents[name] = oracle(env=env, **options)
    return agents


def _manipulate(seed):
    """One oracle after the other; None where the cube of a scene got out of reach."""
    env, agents, recipe, rows = _worker["env"], _worker["agents"], _worker["recipe"], _Rows()
    draw = np.random.default_rng(seed)
    observation, info = env.reset(seed=seed)
    low, high = recipe.stacking
    stack = low if low == high else draw.uniform(low, high)  # files made before stay as they are
    noise = draw.uniform(0, 0.1) * np.array([1, 1, 1, 3, 10]) * (recipe.kind == "noisy")
    agent = agents[info["privileged/target_task"]]
    agent.reset(observation, info)
    done = False
    while not done:
        if draw.uniform() < recipe.random:
            action = draw.uniform(-1, 1, 5)
        else:
            action = np.asarray(agent.select_action(observation, info)) + draw.normal(0, noise)
        action = np.clip(action, -1, 1)
        following, _, termination, truncation, info = env.step(action)
        done = termination or truncation
        if agent.done:
            target, target_info = env.unwrapped.set_new_target(p_stack=stack)
            agent = agents[target_info["privileged/target_task"]]
            agent.reset(target, target_info)
        rows.add(observation, action, done, info)
        observation = following
    arrays = rows.arrays()
    if recipe.env.startswith("scene"):
        _, y, z = arrays["qpos"][:, 14:17].T
        in_drawer = (z >= 0.06) & (z <= 0.08)
        if (y >= 0.29).any() or ((y <= -0.3) & ~in_drawer).any():
            return None
    return arrays

# SPDX-License-Identifier: Apache-2.0
"""Data set id -> `Dataset`: transitions in time order, episode ends, env, reference pair.

    local/pointmaze/umaze-v0            made on this machine at first use, see recipes.py
    local/cartpole/mixed-v0             the same, integer actions, see cartpole_recipe.py
    mujoco/hopper/medium-v0, ...        any Minari id: from Minari's local root, else downloaded
    local/ogbench/cube-single-play-v0   the same, see ogbench_recipes.py
    hopper-medium-v2, ...               D4RL's names: its files, in ~/.d4rl/datasets, see d4rl.py
    cube-single-play-singletask-v0, ... OGBench's names: its files, in ~/.ogbench/data
    path/to/file.hdf5                   a file in D4RL's layout

Rules: bootstrap through truncations, never through terminations, so `termination` is 1 only at a
true end. A row whose next observation is unknown is dropped; a terminal row without one keeps its
own observation there (masked in TD targets, useless for a dynamics model). `next_action` is the
same episode's next action, at the episode's last row that row's own. Actions reach the algorithm
in [-1, 1] (or as integers). Nothing algorithmic happens here: reward shifts, observation
normalisation and filters are visible lines of the algorithm files.
"""

import numbers
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common import d4rl, environments, fail, sources

EXCESS = 1e-3  # by how much an action may leave its box and be clipped, in units of half the box
SUITES = {  # suite of configs -> how the names of its data sets begin
    "ogbench": r"[\w-]+-singletask-v0$",
    "classic": r"local/cartpole/|.*cartpole",  # integer actions
    "v4": r"(hopper|halfcheetah|walker2d)-[a-z-]+-v4$",  # small files rolled out in v4 envs
    "pointmaze": r"local/pointmaze/",
    "maze2d": r"maze2d-|D4RL/pointmaze/",
    "antmaze": r"antmaze-\w+(-\w+)?-v|D4RL/antmaze/",
    "adroit": r"(pen|door|hammer|relocate|adroit)-|D4RL/(pen|door|hammer|relocate)/",
    "kitchen": r"kitchen-|D4RL/kitchen/",
    "mujoco": r"(hopper|halfcheetah|walker2d|ant)-|mujoco/",
}


class Transitions(NamedTuple):
    """N rows in time order, episodes contiguous; float32 unless said otherwise."""

    observation: np.ndarray  # [N, O]
    action: np.ndarray  # [N, A] in [-1, 1], or int32 [N]
    reward: np.ndarray  # [N] as recorded
    next_observation: np.ndarray  # [N, O]
    next_action: np.ndarray  # like action
    termination: np.ndarray  # [N] 1 at a true end, else 0
    truncation: np.ndarray  # [N] 1 at the last row of an episode cut by time or by the recording


@dataclass(frozen=True)
class Dataset:
    """What `load` returns. `make_env` is None where nothing is known to evaluate in."""

    id: str
    transitions: Transitions
    episode_ends: np.ndarray  # [number of episodes] row after each episode's last one
    episode_returns: np.ndarray  # [number of episodes] undiscounted, rows dropped above included
    make_env: Callable[..., Any] | None = None  # (render_mode=None) -> gymnasium.Env
    horizon: int | None = None  # environment steps of the longest evaluation episode
    ref_min_score: float | None = None  # return that scores 0
    ref_max_score: float | None = None  # return that scores 100
    num_actions: int | None = None  # for integer actions
    score_is_success: bool = False  # OGBench: the score is the success rate
    record: dict[str, Any] | None = None  # further facts for the run's config.yaml

    def score(self, returns, success=None):
        """Normalised score, 0 to 100 by the reference pair; the plain return without a pair.

        OGBench has no pair: its score is 100 times the share of successful episodes.
        """
        if self.score_is_success and success is not None:
            return 100 * success
        if self.ref_min_score is None:
            return returns
        return 100 * (returns - self.ref_min_score) / (self.ref_max_score - self.ref_min_score)


def load(dataset_id, env=None, env_steps=None, actions="continuous") -> Dataset:
    """Read a data set, check it, and print what was read in one line.

    Args:
        dataset_id: one of the forms in the module docstring.
        env: Gymnasium id to evaluate in instead of the recorded one ("package.module:Name-v0").
        env_steps: step limit of that env.
        actions: "continuous", "discrete" or "any": what the caller can learn from.

    Raises:
        SystemExit: code 2 after one clear line, for anything wrong with the id or the data.
    """
    if env_steps is not None and env_steps < 1:
        fail(f"--env-steps {env_steps}: an episode needs at least one step")
    dataset = _dataset(dataset_id, sources.read(dataset_id, env, env_steps))
    if actions == "continuous" and dataset.num_actions is not None:
        fail(f"{dataset_id}: integer actions, but this method takes continuous ones only")
    if actions == "discrete" and dataset.num_actions is None:
        fail(f"{dataset_id}: continuous actions, but this method takes integer ones only")
    print(_summary(dataset))
    return dataset


def slug(dataset_id: str) -> str:
    """The name of a data set in run folders and config tables: the id, or a file's stem."""
    path = Path(os.path.expanduser(dataset_id))
    return path.stem if path.suffix in (".hdf5", ".h5") or path.is_file() else dataset_id


def config_name(dataset_id: str) -> str:
    """The name whose config row a data set takes: a D4RL file's id, an OGBench task's data set."""
    name = slug(dataset_id)
    name = d4rl.row_of(name).get("dataset", name)
    if name.startswith("local/ogbench/"):
        name = re.sub(r"-v0$", "-singletask-v0", name.removeprefix("local/ogbench/"))
    return re.sub(r"-singletask-task\d-", "-singletask-", name)


def suite(dataset_id: str) -> str | None:
    """The suite of configs a data set belongs to by its name, None if it belongs to none."""
    name = config_name(dataset_id)
    return next((suite for suite, words in SUITES.items() if re.match(words, name)), None)


# --- Rows to transitions ------------------------------------------------------------------------
def _dataset(dataset_id, source):
    """Check the rows, scale the actions to the env's box, cut into episodes."""
    rows, make_env, pair, keys, box, horizon, ends_episode, by_success, facts = source
    rows = {name: _checked(dataset_id, name, array) for name, array in rows.items()}
    count = len(rows["rewards"])
    for name, array in rows.items():
        if len(array) != count:
            fail(f"{dataset_id}: {len(array)} rows of {name} but {count} of rewards")
    size = rows["observations"].shape[1]
    if "next_observations" in rows and rows["next_observations"].shape[1] != size:
        fail(f"{dataset_id}: next_observations and observations differ in width")
    env, spec, limit, pair = None, None, horizon, _checked_pair(dataset_id, pair)
    if make_env is not None:
        env = make_env()
        spec = env.spec
        limit = spec.max_episode_steps or horizon
        if limit is None:
            fail(f"{dataset_id}: {spec.id} has no step limit; set --env-steps")
        if pair == (None, None) and not by_success:
            pair = _family_pair(dataset_id, spec.id)
        _check_observation(dataset_id, env, keys, size)
    rows["actions"], num_actions, box = _actions(dataset_id, rows["actions"], env, box)
    if env is not None:
        env.close()
    if "timeouts" not in rows:
        where = f"and every {horizon or limit} steps" if horizon or limit else "only"
        print(f"{dataset_id}: no 'timeouts' in it, so episodes are cut at terminals {where}")
    transitions, ends, returns = cut(rows, horizon or limit, ends_episode)
    if not len(ends):
        fail(f"{dataset_id}: no row with a known next observation")
    left_out = count - len(transitions.reward)  # rows whose next observation is not known
    low_high = [] if box is None else [np.asarray(bound).tolist() for bound in box]
    return Dataset(
        id=dataset_id,
        transitions=transitions,
        episode_ends=ends,
        episode_returns=returns,
        make_env=make_env and environments.in_our_units(make_env, keys, box),
        horizon=None if limit is None else int(limit),
        ref_min_score=pair[0],
        ref_max_score=pair[1],
        num_actions=num_actions,
        score_is_success=by_success,
        record={
            "observation_keys": list(keys),
            "env": spec and _env_name(spec),
            "action_box": low_high,
            "rows_left_out": left_out,
        }
        | facts,
    )


def _env_name(spec):
    """The env's id and what changes it: "AdroitHandDoor-v1 + D4RLReward"."""
    return " + ".join([spec.id, *(wrapper.name for wrapper in spec.additional_wrappers)])


def cut(rows, horizon=None, ends_episode=True):
    """Checked D4RL-layout arrays -> (Transitions, episode ends, episode returns).

    Args:
        rows: observations [N, O], actions, rewards [N], terminals [N], and where known timeouts
            [N] and next_observations [N, O]. Without timeouts an episode ends every `horizon`.
        ends_episode: whether a termination ends the episode. Where recordings go on after the goal
            (AntMaze, OGBench) it does not: it stops the bootstrap there and nothing else.
    """
    count, action = len(rows["rewards"]), rows["actions"]
    termination = rows["terminals"] > 0
    timeout = rows["timeouts"] > 0 if "timeouts" in rows else _timeouts(termination, horizon)
    timeout[-1] = True  # an episode that the recording breaks off counts as truncated
    end = termination | timeout if ends_episode else timeout
    truncation = end & ~termination
    following = np.minimum(np.arange(count) + 1, count - 1)
    next_row = np.where(end, np.arange(count), following)  # an episode's last row: its own
    keep, known = np.ones(count, bool), "next_observations" in rows
    if not known:
        keep = ~truncation
        # The row before a dropped one is now its episode's last.
        truncation = np.append(truncation[1:], False) & ~end & ~termination
    starts = np.append(0, np.flatnonzero(end)[:-1] + 1)
    lengths = np.add.reduceat(keep, starts, dtype=np.int64)
    returns = np.add.reduceat(rows["rewards"], starts, dtype=np.float64)
    kept = slice(None) if keep.all() else np.flatnonzero(keep)  # one copy of each column, not two
    next_row = next_row[kept]
    transitions = Transitions(
        observation=rows["observations"][kept],
        action=action[kept],
        reward=rows["rewards"][kept],
        next_observation=rows["next_observations"] if known else rows["observations"][next_row],
        next_action=action[next_row],
        termination=termination[kept].astype(np.float32),
        truncation=truncation[kept].astype(np.float32),
    )
    return transitions, np.cumsum(lengths[lengths > 0]), returns[lengths > 0]


def _timeouts(termination, horizon):
    """For a file without `timeouts`: the time limit, every `horizon` steps since the last end."""
    timeout = np.zeros_like(termination)
    if horizon is not None:
        starts = np.append(0, np.flatnonzero(termination) + 1)
        for start, stop in zip(starts, np.append(starts[1:], len(termination)), strict=True):
            timeout[start + int(horizon) - 1 : stop : int(horizon)] = True
    return timeout


def _checked(dataset_id, name, array):
    """The array as float32 (actions may stay integers), or one line on what is wrong with it."""
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub" or array.ndim == 0:
        fail(f"{dataset_id}: {name} is not an array of numbers")
    if len(array) == 0:
        fail(f"{dataset_id}: {name} is empty")
    if array.ndim == 2 and array.shape[1] == 1 and name in ("rewards", "terminals", "timeouts"):
        array = array[:, 0]
    axes = 2 if name.endswith("observations") else 1
    if array.ndim != axes and not (name == "actions" and array.ndim == 2):
        fail(f"{dataset_id}: {name} has shape {list(array.shape)}, {axes} axes are wanted")
    if name == "actions" and array.dtype.kind in "iu":
        return array.astype(np.int32)
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, np.float32)
    bad = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
    if bad.any():
        fail(
            f"{dataset_id}: {name} has NaN or inf in {bad.sum()} rows, first in row {bad.argmax()}"
        )
    return array


def _actions(dataset_id, action, env, box):
    """Integer actions as they are; others scaled from the box to [-1, 1]. -> action, number, box"""
    space = None if env is None else env.action_space
    discrete = space is not None and hasattr(space, "n")
    if action.dtype.kind == "i" and (space is None or discrete):
        if action.size != len(action):
            fail(
                f"{dataset_id}: integer actions of shape {list(action.shape)}: one number per row "
                "is wanted, [N]; continuous actions as floats"
            )
        action = action.reshape(len(action)) - (int(space.start) if discrete else 0)
        number = int(space.n) if discrete else int(action.max()) + 1
        if action.min() < 0 or action.max() >= number:
            fail(f"{dataset_id}: actions {action.min()} to {action.max()}, but only {number} exist")
        return action, number, None
    if discrete:
        takes = f"{env.spec.id} takes {space.n} discrete ones; store them as integers"
        fail(f"{dataset_id}: continuous actions, but {takes}")
    action = action.astype(np.float32).reshape(len(action), -1)
    if space is not None and space.shape != action.shape[1:]:
        fail(f"{dataset_id}: {action.shape[1]} action dimensions, {env.spec.id} has {space.shape}")
    low, high = (space.low, space.high) if space else _box(dataset_id, box, action.shape[1])
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        fail(f"{dataset_id}: the action box has no bounds; wrap the env in ClipAction")
    scaled = (
        2 * (action - low) / (high - low) - 1 if (low != -1).any() or (high != 1).any() else action
    )
    excess = np.abs(scaled).max(axis=1) - 1
    if excess.max() > EXCESS:
        row = excess.argmax()
        where = f"[{low.min():g}, {high.max():g}], " + (
            "the env's box"
            if space
            else "and no env tells another box (--env, or attributes action_low and action_high)"
        )
        fail(f"{dataset_id}: actions leave {where}; row {row}: {action[row].tolist()}")
    action = scaled
    if excess.max() > 0:
        print(f"{dataset_id}: actions leave their box by up to {excess.max():.1e}: clipped")
    return action.clip(-1, 1), None, (low, high)


def _box(dataset_id, box, size):
    """Bounds of the actions as the file's attributes give them, -1 and 1 without."""
    low, high = (-1.0, 1.0) if box[0] is None and box[1] is None else box
    try:
        low, high = (np.broadcast_to(np.asarray(x, np.float32), size) for x in (low, high))
        good = (low < high).all()
    except (TypeError, ValueError):
        good = False
    if not good:
        fail(
            f"{dataset_id}: attributes action_low {box[0]} and action_high {box[1]}: two "
            f"numbers or arrays of {size} are wanted, each low below its high, or neither attribute"
        )
    return low, high


def _check_observation(dataset_id, env, keys, size):
    observation, _ = env.reset(seed=0)
    fits = isinstance(observation, dict) == bool(keys)
    shape = environments.flatten(observation, keys).shape if fits else "a dict or its parts"
    if shape != (size,):
        fail(
            f"{dataset_id}: {size} numbers per observation, {env.spec.id} gives {shape}; see --env"
        )


def _checked_pair(dataset_id, pair):
    """Both reference returns as numbers, the one for 0 below the one for 100, or neither."""
    if tuple(pair) == (None, None):
        return None, None
    good = all(isinstance(score, numbers.Real) and abs(score) < 1e300 for score in pair)
    if not good or pair[0] >= pair[1]:
        fail(
            f"{dataset_id}: reference scores {pair[0]!r} and {pair[1]!r}: two finite numbers are "
            "wanted, ref_min_score below ref_max_score, or neither of them"
        )
    return float(pair[0]), float(pair[1])


def _family_pair(dataset_id, env_id):
    """D4RL's pair of the same env family (hopper for Hopper-v5), or no pair; either is said."""
    family = re.sub(r"-v\d+$", "", env_id)
    for name, row in d4rl.table().items():
        if row["suite"] == "mujoco" and re.sub(r"-v\d+$", "", row["env_id"]) == family:
            print(f"{dataset_id}: no reference scores recorded, D4RL's of {name} are used")
            return float(row["ref_min_score"]), float(row["ref_max_score"])
    print(f"{dataset_id}: no reference scores, so the score column is the plain return")
    return None, None


def _summary(dataset):
    t, returns = dataset.transitions, dataset.episode_returns
    action = dataset.num_actions or t.action.shape[1]
    left_out = dataset.record["rows_left_out"]
    without = f" ({left_out:,} rows without a next observation left out)" if left_out else ""
    return (
        f"data {dataset.id}: {len(t.reward):,} transitions{without}, "
        f"{len(returns):,} episodes, return "
        f"{returns.min():.1f} / {returns.mean():.1f} / {returns.max():.1f} (min / mean / max), "
        f"{int(t.termination.sum()):,} terminations, {int(t.truncation.sum()):,} truncations, "
        f"O={t.observation.shape[1]} A={action}, {sum(x.nbytes for x in t) / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    from common import shell, views

    shell.run(views.main)

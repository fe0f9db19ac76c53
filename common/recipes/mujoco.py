# SPDX-License-Identifier: Apache-2.0
"""`local/mujoco/hopper-medium-v0` and the like: D4RL's five sets of three envs, made here.

`benchmarks/collect.py` trains the policies that play them. This module knows their names, what
D4RL's sets are like, and how episodes of a policy are recorded and stored. It needs NumPy only.
"""

from typing import NamedTuple, NoReturn

import numpy as np

from common import envs, fail
from common.recipes import minari_store

KINDS = ("random", "medium", "medium-replay", "expert", "medium-expert")  # in this order
TOGETHER = 50  # episodes that are played at the same time


class Task(NamedTuple):
    env_id: str
    reference: tuple[float, float]  # returns that score 0 and 100, D4RL's
    behaviour: dict[str, float]  # mean score of the episodes of D4RL's v2 sets
    minutes: int  # of one core of an AMD EPYC that collecting takes


# Reference scores: D4RL@89141a6 d4rl/infos.py. Minutes: CPU time, for hopper of the whole command,
# for the others three times that of the first 200,000 of 600,000 updates.
TASKS = {
    "hopper": Task(
        "Hopper-v4",
        (-20.272305, 3234.3),
        {"medium": 44.2, "medium-replay": 14.9, "medium-expert": 64.7},
        10,
    ),
    "halfcheetah": Task(
        "HalfCheetah-v4",
        (-280.178953, 12135.0),
        {"medium": 40.6, "medium-replay": 27.1, "medium-expert": 64.3},
        12,
    ),
    "walker2d": Task(
        "Walker2d-v4",
        (1.629008, 4592.3),
        {"medium": 62.0, "medium-replay": 14.8, "medium-expert": 82.6},
        13,
    ),
}


def dataset_id(task: str, kind: str) -> str:
    return f"local/mujoco/{task}-{kind}-v0"


IDS = tuple(dataset_id(task, kind) for task in TASKS for kind in KINDS)


def fail_missing(name: str) -> NoReturn:
    """Exit with one line that says how the data set is made."""
    task = name.removeprefix("local/mujoco/").split("-")[0]
    fail(
        f"{name}: not made yet; python benchmarks/collect.py {task} makes the five sets of "
        f"{task}, in about {TASKS[task].minutes} minutes on a fast core, longer on a slow one"
    )


def score(task: str, returns):
    """The normalised score of a return."""
    low, high = TASKS[task].reference
    return 100 * (np.asarray(returns) - low) / (high - low)


# --- Episodes -----------------------------------------------------------------------------------
class Episode(NamedTuple):
    observation: np.ndarray  # [T + 1, O]
    action: np.ndarray  # [T, A]
    reward: np.ndarray  # [T]
    termination: np.ndarray  # [T]
    truncation: np.ndarray  # [T]


def play(make_env, act, rows, seed):
    """Episodes 0, 1, ... of a policy, with `rows` steps in all; the last one is cut there.

    An episode depends on `seed` and its own number alone.

    Args:
        make_env: makes an env with actions in [-1, 1].
        act: (observation [E, O], numbers of the episodes [E], step) -> action [E, A].
    """
    worlds, count, left = [make_env() for _ in range(TOGETHER)], 0, rows
    while left > 0:
        numbers = np.arange(count, count + TOGETHER)
        for episode in _play_together(worlds, act, numbers, seed):
            if left > 0:
                yield cut(episode, left)
                left -= len(episode.reward)
        count += TOGETHER
    for world in worlds:
        world.close()


def _play_together(worlds, act, numbers, seed):
    """The episodes of these numbers, one in each env."""
    first = [np.random.SeedSequence((seed, number)).generate_state(1)[0] for number in numbers]
    observation = np.stack([envs.reset(x, int(y)) for x, y in zip(worlds, first, strict=True)])
    observations = [[x] for x in observation]
    rows = [[] for _ in worlds]  # (action, reward, termination, truncation)
    live, step = np.arange(len(worlds)), 0
    while len(live):
        action = act(observation, numbers, step)
        over = np.zeros(len(worlds), bool)
        for i in live:
            observation[i], reward, termination, truncation, _ = envs.step(worlds[i], action[i])
            observations[i].append(observation[i].copy())
            rows[i].append((action[i], reward, termination, truncation and not termination))
            over[i] = termination or truncation
        live, step = live[~over[live]], step + 1
    for seen, columns in zip(observations, rows, strict=True):
        yield Episode(np.stack(seen), *(np.array(x) for x in zip(*columns, strict=True)))


def cut(episode, steps):
    """The episode, or its first `steps` steps: the recording then breaks it off."""
    if len(episode.reward) <= steps:
        return episode
    first = [x[:steps] for x in episode[1:]]
    broken = Episode(episode.observation[: steps + 1], *first)
    broken.truncation[-1] = True
    return broken


def split(columns):
    """Rows in time order, {name: [N, ...]}, as episodes; the recording breaks off the last one."""
    numbers = {name: columns[name].reshape(-1) for name in ("reward", "termination", "truncation")}
    ends = np.flatnonzero(numbers["termination"] + numbers["truncation"]) + 1
    ends = np.union1d(ends, len(numbers["reward"])).tolist()
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        observation = columns["observation"][start:end]
        last = columns["next_observation"][end - 1 : end]
        termination = numbers["termination"][start:end] > 0
        yield Episode(
            observation=np.concatenate([observation, last]),
            action=columns["action"][start:end],
            reward=numbers["reward"][start:end],
            termination=termination,
            truncation=(np.arange(start, end) == end - 1) & ~termination,
        )


def store(task, kind, episodes, algorithm):
    """Store a list of episodes as a Minari data set."""
    minari_store.store(
        dataset_id=dataset_id(task, kind),
        env_id=TASKS[task].env_id,
        reference=TASKS[task].reference,
        algorithm=algorithm,
        description=f"{TASKS[task].env_id}, made like the {kind} set of D4RL's gym-mujoco.",
        episodes=episodes,
        steps=sum(len(episode.reward) for episode in episodes),
    )

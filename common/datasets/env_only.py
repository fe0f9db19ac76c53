# SPDX-License-Identifier: Apache-2.0
"""`env/Hopper-v4`: no rows, only an env. The rows come in the online phase of a run."""

import dataclasses

import numpy as np

from common import envs, fail
from common.datasets.dataset import Transitions
from common.datasets.source import Source

PREFIX = "env/"


def read(dataset_id: str, env: str | None, env_steps: int | None) -> Source:
    """One row of the env, which is checked as recorded ones are. `emptied` takes it away."""
    from gymnasium import spaces

    env_id = env or dataset_id.removeprefix(PREFIX)
    if not env_id:
        fail(f"{dataset_id!r}: names no env; {PREFIX}Hopper-v5 would be one")

    def make_env(render_mode=None):
        return envs.make(env_id, max_episode_steps=env_steps, render_mode=render_mode)

    world = make_env()
    space, action_space = world.observation_space, envs.action_space(world)
    if what := envs.unusable(space):
        fail(
            f"{dataset_id}: {what} has no fixed number of values; wrap the env without that part "
            "(gymnasium.wrappers.FilterObservation) or as numbers (TransformObservation)"
        )
    keys = ()
    if isinstance(space, spaces.Dict):
        keys = tuple(sorted(space.spaces, key=lambda key: (key != "observation", key)))
    if why := envs.unusable_action(action_space):
        fail(f"{dataset_id}: the action space {why}")
    columns = envs.columns(space, keys)
    observation = columns(envs.reset(world, 0), 1)
    action_space.seed(0)
    action = np.asarray(action_space.sample())[None]
    envs.close(world)
    rows = {
        "observations": observation,
        "next_observations": observation,
        "actions": action,
        "rewards": np.zeros(1, np.float32),
        "terminals": np.zeros(1, np.float32),
        "timeouts": np.ones(1, np.float32),
    }
    return Source(
        rows=rows,
        make_env=make_env,
        keys=keys,
        observation_space=space,
        action_space=action_space,
    )


def emptied(dataset):
    """The data set without its row."""
    return dataclasses.replace(
        dataset,
        transitions=Transitions(*(column[:0] for column in dataset.transitions)),
        episode_ends=dataset.episode_ends[:0],
        episode_returns=dataset.episode_returns[:0],
    )

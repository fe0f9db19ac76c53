# SPDX-License-Identifier: Apache-2.0
"""Reset, step and close an env. What it raises, or gives in place of a number, is one line."""

import os
import traceback

import numpy as np

from common import fail, threads, told


def reset(env, seed):
    """The first observation of the episode that this seed begins."""
    try:
        with threads.ALONE:
            np.random.seed(seed)  # noqa: NPY002 - ogbench envs draw from NumPy's global generator
            observation, _ = env.reset(seed=seed)
    except Exception as error:  # of the env
        _fail(env, "reset", error)
    return observation


def step(env, action):
    """(observation, reward, termination, truncation, info): reward and ends as plain values.

    The action is one as `single` gives it.
    """
    action = single(action)
    try:
        observation, reward, termination, truncation, info = env.step(action)
    except Exception as error:  # of the env
        _fail(env, "step", error)
    reward = _number(env, "reward", reward)
    termination = bool(_number(env, "termination", termination))
    truncation = bool(_number(env, "truncation", truncation))
    return observation, reward, termination, truncation, info or {}


def single(action):
    """An action of floats as float32, as data and envs have it, also under JAX_ENABLE_X64."""
    action = np.asarray(action)
    return action.astype(np.float32) if action.dtype == np.float64 else action


def _number(env, what, given):
    """What a step gives as one number, which may be an array of one."""
    try:
        return float(np.asarray(given).reshape(()))
    except (TypeError, ValueError):
        fail(f"env {name(env)}: the {what} of a step must be one number, not {given!r}")


def close(env):
    """Close an env. One that cannot be closed is said, and ends nothing: its work is done."""
    try:
        env.close()
    except Exception as error:  # of the env
        print(f"env {name(env)}: its close raised {told(error)}")


def success(info):
    """Whether a step was successful, as `success` or `is_success` of its info tells it; else None.

    Where that is an array, as with several goals, all of them must be reached. What is no number,
    or an empty array, tells nothing; NaN is no success.
    """
    for key in ("success", "is_success"):
        reported = np.asarray(info.get(key))
        if reported.dtype.kind in "biuf" and reported.size:
            return bool((reported > 0).all())
    return None


def is_finite(numbers):
    """Whether an observation or reward is made of finite numbers, as far as it has numbers."""
    numbers = np.asarray(numbers)
    return numbers.dtype.kind != "f" or bool(np.isfinite(numbers).all())


def check_shape(env, observation, first):
    """One line and exit code 2 where an observation has another shape than the first."""
    if np.shape(observation) != np.shape(first):
        shapes = f"{np.shape(observation)} after one of shape {np.shape(first)}"
        fail(f"env {name(env)}: gave an observation of shape {shapes}")


def name(env):
    spec = getattr(env, "spec", None)
    return type(env).__name__ if spec is None else spec.id


def _fail(env, call, error):
    """One line on what an env raised, with the place in its code."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{os.path.basename(place.filename)}:{place.lineno}"
    fail(f"env {name(env)}: its {call} raised {told(error)} ({where}); see --env")

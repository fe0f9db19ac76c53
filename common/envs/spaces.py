# SPDX-License-Identifier: Apache-2.0
"""Environments as an algorithm sees them: flat float32 observations, actions in [-1, 1]."""

import numpy as np


def flat_and_scaled(make_env, keys, bounds):
    """A function that makes the env with flat float32 observations and actions in [-1, 1].

    Args:
        make_env: (render_mode) -> the env as recorded.
        keys: parts of a dict observation, in this order; () where it is an array.
        bounds: (low, high) of the env's actions, None for integer actions.
    """

    def make(render_mode=None):
        import gymnasium
        from gymnasium.wrappers import RescaleAction, TransformObservation

        env = make_env(render_mode)
        if hasattr(env.unwrapped, "tasks_to_complete"):
            env = _report_success(env)
        parts = [env.observation_space[key] for key in keys] or [env.observation_space]
        size = sum(gymnasium.spaces.flatdim(part) for part in parts)
        flat = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        env = TransformObservation(env, lambda observation: flatten(observation, keys), flat)
        if bounds is None or ((bounds[0] == -1).all() and (bounds[1] == 1).all()):
            return env
        return RescaleAction(env, np.float32(-1), np.float32(1))

    return make


def _report_success(env):
    """FrankaKitchen reports the tasks that are left; success is to have none left."""
    import gymnasium

    class ReportsSuccess(gymnasium.Wrapper):
        def step(self, action):
            *rest, info = self.env.step(action)
            return *rest, info | {"success": not info["tasks_to_complete"]}

    return ReportsSuccess(env)


def flatten(observation, keys):
    """A dict or array, with or without a time axis -> a float32 array with a flat last axis."""
    if not keys:
        return np.asarray(observation, np.float32)
    return np.concatenate([np.asarray(observation[key], np.float32) for key in keys], axis=-1)

# SPDX-License-Identifier: Apache-2.0
"""Gymnasium spaces as an algorithm sees them: flat float32 observations, actions in [-1, 1].

The same functions read recorded data and live environments, so that both give the same columns:
- Box of any shape and number type: its numbers, flattened.
- Discrete and MultiDiscrete: a column for each value, with 1 for the one that holds (one-hot).
- MultiBinary: its zeros and ones.
- Tuple: the columns of its parts, one after the other.
- Dict: the same, its parts in alphabetical order. At the top level a caller may choose the parts.
Actions are a Box of floats of any shape, or Discrete, which may begin at any number.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

NUMBER = "number"  # the kind of a column that is a plain number; see `kinds`


# --- Observations -------------------------------------------------------------------------------
def unusable(space, name: str = "observation") -> str | None:
    """The first part of a space that has no fixed number of columns, as "name: Text(...)"."""
    from gymnasium import spaces

    if isinstance(space, spaces.Dict | spaces.Tuple):
        if not len(space.spaces):
            return f"{name}: {space}"
        parts = [unusable(part, f"{name}[{key!r}]") for key, part in _parts(space, ())]
        return next(filter(None, parts), None)
    if isinstance(space, spaces.Box) and space.dtype.kind in "fiub":
        return None
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        return None
    return f"{name}: {space}"


def kinds(space, keys: tuple[str, ...] = ()) -> list[tuple[str, int]]:
    """What the columns of a space are: [("number", 9), ("one of", 4)], neighbours joined.

    Two spaces with the same list have columns of the same meaning.
    """
    from gymnasium import spaces

    if isinstance(space, spaces.Dict | spaces.Tuple):
        found = []
        for _, part in _parts(space, keys):
            for kind, count in kinds(part):
                if found and kind == NUMBER == found[-1][0]:
                    count += found.pop()[1]
                found.append((kind, count))
        return found
    if isinstance(space, spaces.Discrete):
        return [("one of", int(space.n))]
    if isinstance(space, spaces.MultiDiscrete):
        return [("one of", int(count)) for count in space.nvec.flatten()]
    return [(NUMBER, spaces.flatdim(space))]


def width(space, keys: tuple[str, ...] = ()) -> int:
    """How many columns a space has."""
    return sum(count for _, count in kinds(space, keys))


def columns(space, keys: tuple[str, ...] = ()) -> Callable[[Any, int], np.ndarray]:
    """The function (values, count) -> [count, O] float32 that writes out values of a space.

    Its `values` are `count` of them, stacked as a recording has them: arrays with a first axis of
    that length, in dicts or tuples like the space's. It raises ValueError or KeyError where a value
    is not of the space.

    Args:
        space: one of which `unusable` says None.
        keys: the parts of a Dict that are used, in this order; () for all of them.
    """
    from gymnasium import spaces

    if isinstance(space, spaces.Dict | spaces.Tuple):
        parts = [(key, columns(part)) for key, part in _parts(space, keys)]

        def of_parts(values, count):
            return np.concatenate([part(values[key], count) for key, part in parts], axis=-1)

        return of_parts
    if isinstance(space, spaces.Discrete):
        return _one_hot([int(space.n)], [int(space.start)])
    if isinstance(space, spaces.MultiDiscrete):
        return _one_hot(space.nvec.flatten(), np.asarray(space.start).flatten())
    return lambda values, count: np.asarray(values, np.float32).reshape(count, -1)


def _parts(space, keys):
    """The parts of a Dict or Tuple with their names or places, in the order of the columns."""
    if isinstance(space.spaces, tuple | list):
        return list(enumerate(space.spaces))
    return [(key, space.spaces[key]) for key in keys or sorted(space.spaces)]


def _one_hot(sizes, starts):
    sizes, starts = np.asarray(sizes, np.int64), np.asarray(starts, np.int64)
    first = np.cumsum(sizes) - sizes

    def of_choices(values, count):
        values = np.asarray(values).reshape(count, -1)
        index = values.astype(np.int64) - starts
        if (index < 0).any() or (index >= sizes).any() or (values != index + starts).any():
            raise ValueError(
                f"values {values.min():g} to {values.max():g} are not all among those of the space"
            )
        marked = np.zeros((count, sizes.sum()), np.float32)
        np.put_along_axis(marked, index + first, 1, axis=1)
        return marked

    return of_choices


# --- Actions ------------------------------------------------------------------------------------
def unusable_action(space) -> str | None:
    """Why no method here can act in a space, with what could be done; None where one can."""
    from gymnasium import spaces

    if isinstance(space, spaces.Discrete):
        return None
    if isinstance(space, spaces.Box) and space.dtype.kind == "f":
        return None
    if isinstance(space, spaces.Box):
        return (
            f"{space} holds whole numbers; make it a Box of floats that the env rounds, or number "
            "its actions as a Discrete (gymnasium.wrappers.TransformAction)"
        )
    if isinstance(space, spaces.MultiDiscrete | spaces.MultiBinary):
        choices = space.nvec.flatten() if isinstance(space, spaces.MultiDiscrete) else None
        shape = np.prod(space.shape, dtype=int)
        count = 2 ** int(shape) if choices is None else int(np.prod(choices, dtype=object))
        return (
            f"{space} is several choices at once; number its {count:,} combinations as "
            f"Discrete({count}) (gymnasium.wrappers.TransformAction)"
        )
    return (
        f"{space} is neither Box nor Discrete; write its actions as one flat Box of floats or one "
        "Discrete (gymnasium.wrappers.TransformAction)"
    )


def action_space(env):
    """The env's action space. Where ClipAction has removed the bounds of a Box, the one inside."""
    import gymnasium

    space, inner = env.action_space, env
    while isinstance(inner, gymnasium.Wrapper) and inner.action_space == space:
        if isinstance(inner, gymnasium.wrappers.ClipAction):
            return action_space(inner.env)
        inner = inner.env
    return space


# --- Environments -------------------------------------------------------------------------------
def flat_and_scaled(make_env, keys, bounds):
    """A function that makes the env with flat float32 observations and actions in [-1, 1].

    Integer actions begin at 0, whatever the env's first action is.

    Args:
        make_env: (render_mode) -> the env as recorded.
        keys: parts of a dict observation, in this order; () where it is no dict, or for all.
        bounds: (low, high) of the env's actions, None for integer actions.
    """

    def make(render_mode=None):
        import gymnasium
        from gymnasium.wrappers import TransformObservation

        env = make_env(render_mode)
        if hasattr(env.unwrapped, "tasks_to_complete"):
            env = _report_success(env)
        rows = columns(env.observation_space, keys)
        size = width(env.observation_space, keys)
        flat = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        env = TransformObservation(env, lambda observation: rows(observation, 1)[0], flat)
        return _from_zero(env) if bounds is None else _scaled(env, bounds)

    return make


def _from_zero(env):
    """Discrete actions that begin at 0."""
    import gymnasium

    space = env.action_space
    if space.start == 0:
        return env
    from_zero = gymnasium.spaces.Discrete(int(space.n))
    return gymnasium.wrappers.TransformAction(env, lambda index: index + space.start, from_zero)


def _scaled(env, bounds):
    """Flat actions in [-1, 1]."""
    from gymnasium.spaces import Box
    from gymnasium.wrappers import RescaleAction, TransformAction

    space = action_space(env)
    whole = (np.asarray(bounds[0]) == -1).all() and (np.asarray(bounds[1]) == 1).all()
    plain = len(space.shape) == 1 and space is env.action_space and space.dtype.itemsize >= 4
    if whole and plain:
        return env

    def unflat(action):
        action = np.reshape(action, space.shape)
        return action.clip(space.low, space.high).astype(space.dtype)  # scaling has rounded it

    # An action with one value only would be divided by 0. `unflat` puts it back to that value.
    high = np.where(space.low == space.high, space.high + 1, space.high).astype(space.dtype)
    flat = Box(space.low.reshape(-1), high.reshape(-1), dtype=space.dtype)
    env = TransformAction(env, unflat, flat)
    return env if whole else RescaleAction(env, np.float32(-1), np.float32(1))


def _report_success(env):
    """FrankaKitchen reports the tasks that are left; success is to have none left."""
    import gymnasium

    class ReportsSuccess(gymnasium.Wrapper):
        def step(self, action):
            *rest, info = self.env.step(action)
            return *rest, info | {"success": not info["tasks_to_complete"]}

    return ReportsSuccess(env)

# SPDX-License-Identifier: Apache-2.0
"""What a run records of its env, so that its policy acts and is evaluated without the data set.

`remembered` makes plain values of it. `make_remembered` makes the env again where its id is enough
for that, and `Translator` takes observations and gives actions in the env's own terms without any
env.
"""

import contextlib
import json

import numpy as np

from common.envs import making, spaces


def remembered(env, size: int, num_actions: int | None, bounds) -> dict:
    """Plain values that tell of an env, or of the data where there is none.

    Args:
        env: the env as recorded, None where none is known.
        size: numbers per observation of the data.
        num_actions: for integer actions.
        bounds: (low, high) of the actions, None for integer actions.
    """
    facts = {"spec": None, "observation_space": {"box": [size]}}
    if env is not None:
        facts = {
            "spec": _spec(env.spec),
            "observation_space": _space(env.observation_space),
        }
    if bounds is None:
        facts["action_space"] = {"discrete": num_actions, "start": 0}
        if env is not None:
            facts["action_space"] = _space(env.action_space)
        return facts
    shape, kind = np.shape(bounds[0]), "float32"
    if env is not None:
        shape, kind = env.action_space.shape, env.action_space.dtype.name
    low, high = ([float(x) for x in np.ravel(bound)] for bound in bounds)
    facts["action_space"] = {"box": list(shape), "type": kind, "low": low, "high": high}
    return facts


def _spec(spec):
    """What makes the env of this spec again: its id, options and step limit.

    None where that is not enough: the env has wrappers of this project, or its id leads elsewhere.
    """
    import gymnasium

    if spec is None or spec.additional_wrappers:
        return None
    registered = gymnasium.registry.get(spec.id)
    if registered is None or str(registered.entry_point) != str(spec.entry_point):
        return None
    options = {name: x for name, x in spec.kwargs.items() if name != "render_mode"}
    try:
        plain = json.loads(json.dumps(options))
    except (TypeError, ValueError):
        return None
    if plain != options:
        return None
    return {"id": spec.id, "options": options, "max_episode_steps": spec.max_episode_steps}


def make_remembered(spec: dict, env: str | None = None, render_mode: str | None = None):
    """The env that a recorded spec tells of. `env` is the id that --env gave, if it did."""
    if "singletask" in spec["id"]:  # importing OGBench registers its ids
        with contextlib.suppress(ImportError):
            import ogbench  # noqa: F401
    limit = {"max_episode_steps": spec["max_episode_steps"], "render_mode": render_mode}
    return making.make(env or spec["id"], **spec["options"], **limit)


# --- Spaces -------------------------------------------------------------------------------------
def _space(space):
    """A Gymnasium space as plain values."""
    from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple

    if isinstance(space, Dict):
        return {"dict": {key: _space(part) for key, part in space.spaces.items()}}
    if isinstance(space, Tuple):
        return {"tuple": [_space(part) for part in space.spaces]}
    if isinstance(space, Box):
        return {"box": list(space.shape), "type": space.dtype.name}
    if isinstance(space, Discrete):
        return {"discrete": int(space.n), "start": int(space.start)}
    if isinstance(space, MultiDiscrete):
        return {"multi_discrete": space.nvec.tolist(), "start": space.start.tolist()}
    if isinstance(space, MultiBinary):
        return {"multi_binary": list(space.shape)}
    return {"other": str(space)}  # not used by any policy


def _space_again(facts):
    """The space of those values. A Box without bounds has infinite ones."""
    from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Text, Tuple

    if "dict" in facts:
        return Dict({key: _space_again(part) for key, part in facts["dict"].items()})
    if "tuple" in facts:
        return Tuple([_space_again(part) for part in facts["tuple"]])
    if "box" in facts:
        shape, kind = tuple(facts["box"]), np.dtype(facts.get("type", "float32"))
        if "low" in facts:
            low, high = (np.array(facts[end], kind).reshape(shape) for end in ("low", "high"))
            return Box(low, high, dtype=kind)
        if kind.kind == "f":
            return Box(-np.inf, np.inf, shape, kind)
        limits = (0, 1) if kind.kind == "b" else (np.iinfo(kind).min, np.iinfo(kind).max)
        return Box(*limits, shape, kind)
    if "discrete" in facts:
        return Discrete(facts["discrete"], start=facts["start"])
    if "multi_discrete" in facts:
        return MultiDiscrete(facts["multi_discrete"], start=facts["start"])
    if "multi_binary" in facts:
        return MultiBinary(facts["multi_binary"])
    return Text(1)


class Translator:
    """Between an env's own observations and actions and those of a policy.

    It asks the wrappers of `flat_and_scaled`, around an env that only has the recorded spaces, so
    it agrees with every evaluation.
    """

    def __init__(self, facts: dict, keys: tuple[str, ...], bounds: tuple | None):
        import gymnasium

        class Recorded(gymnasium.Env):
            observation_space = _space_again(facts["observation_space"])
            action_space = _space_again(facts["action_space"])

            def reset(self, *, seed=None, options=None):
                return self.observation, {}

            def step(self, action):
                self.action = action
                return self.observation, 0.0, False, False, {}

        self._inner = Recorded()
        if "dict" not in facts["observation_space"]:  # without an env only the columns are known
            keys = ()
        self._outer = spaces.flat_and_scaled(lambda _: self._inner, keys, bounds)()

    def flat(self, observation) -> np.ndarray:
        """[O] float32 of an observation as the env gives it."""
        self._inner.observation = observation
        return np.asarray(self._outer.reset()[0])

    def action(self, action):
        """The env's own action for one in [-1, 1], or for an integer from 0 on."""
        self._outer.step(action)
        return self._inner.action

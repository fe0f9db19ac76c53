# SPDX-License-Identifier: Apache-2.0
"""What a run records of its env, so that its policy acts and is evaluated without the data set.

`remembered` makes plain values of it. `make_remembered` makes the env again from its id, the
wrappers of Gymnasium's that were around it, and what gave it D4RL's behaviour. `Translator` takes
observations and gives actions in the env's own terms without any env.
"""

import contextlib
import json

import numpy as np

from common.envs import d4rl, making, playing, pointmaze, spaces


def remembered(env, size: int, num_actions: int | None, bounds, adapted: dict) -> dict:
    """Plain values that tell of an env, or of the data where there is none.

    Args:
        env: the env as recorded, None where none is known.
        size: numbers per observation of the data.
        num_actions: for integer actions.
        bounds: (low, high) of the actions, None for integer actions.
        adapted: what `d4rl.adapt` was given beside the env, {} where it was not called.
    """
    facts = {"spec": None, "observation_space": {"box": [size]}}
    if env is not None:
        facts = {
            "spec": _spec(env, adapted),
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


def _spec(env, adapted):
    """What makes this env again: its id, options, step limit, and what is around it.

    None where that is not enough: an option has no plain values, a wrapper is a user's own, or the
    id makes another env.
    """
    import gymnasium

    spec = env.spec
    registered = spec and gymnasium.registry.get(spec.id)
    if registered is None or _entry_point(registered) != _entry_point(spec):
        return None
    options = {name: x for name, x in spec.kwargs.items() if name != "render_mode"}
    facts = {"id": spec.id, "options": options, "max_episode_steps": spec.max_episode_steps}
    if wrappers := spec.additional_wrappers:
        facts |= {"adapted": adapted} if adapted else {}
        # Some of them belong to what the id makes. The others are put around it.
        made = make_remembered(facts)
        inside = [wrapper.entry_point for wrapper in made.spec.additional_wrappers]
        playing.close(made)
        if [wrapper.entry_point for wrapper in wrappers[: len(inside)]] != inside:
            return None
        if outside := wrappers[len(inside) :]:
            facts["wrappers"] = [
                {"entry_point": wrapper.entry_point, "options": wrapper.kwargs}
                for wrapper in outside
            ]
            if not all(_is_gymnasium(wrapper.entry_point) for wrapper in outside):
                return None
    try:
        plain = json.loads(json.dumps(facts))
    except (TypeError, ValueError):
        return None
    return plain if plain == facts else None


def _entry_point(spec):
    """What makes the env; recordings of earlier versions have a former name of ours."""
    name = str(spec.entry_point)
    return pointmaze.ENTRY_POINT if name == pointmaze.FORMER_ENTRY_POINT else name


def _is_gymnasium(entry_point):
    """Whether a wrapper is one of Gymnasium's: a run folder may name no other code to run."""
    return entry_point.startswith("gymnasium.wrappers.")


def make_remembered(facts: dict, env: str | None = None, render_mode: str | None = None):
    """The env that a recorded spec tells of. `env` is the id that --env gave, if it did."""
    from gymnasium.envs.registration import load_env_creator

    if "singletask" in facts["id"]:  # importing OGBench registers its ids
        with contextlib.suppress(ImportError):
            import ogbench  # noqa: F401
    limit = {"max_episode_steps": facts["max_episode_steps"], "render_mode": render_mode}
    made = making.make(env or facts["id"], **facts["options"], **limit)
    if facts.get("adapted"):
        made = d4rl.adapt(made, **facts["adapted"])
    for wrapper in facts.get("wrappers", ()):
        if _is_gymnasium(wrapper["entry_point"]):
            made = load_env_creator(wrapper["entry_point"])(made, **(wrapper["options"] or {}))
    return made


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
        self._outer.step(playing.single(action))
        return self._inner.action

# SPDX-License-Identifier: Apache-2.0
"""Evaluation envs as an algorithm sees them: flat float32 observations, actions in [-1, 1]."""

import contextlib
import io
import json
import os
import re
import tempfile
import warnings

import numpy as np

from common import fail, one_line, recipes

HARMLESS = r"gymnasium\.wrappers(\.\w+)*:(TimeLimit|OrderEnforcing|PassiveEnvChecker|Autoreset|"
HARMLESS += r"\w*(Action|Reward|Observation)(V\d)?)"  # the others write files or open windows


def gym_make(env_id, **options):
    import gymnasium

    if env_id not in gymnasium.registry and ":" not in env_id:
        gymnasium.register_envs(robotics())
        recipes.register()
    options = {name: value for name, value in options.items() if value is not None}
    return quiet(env_id, gymnasium.make, env_id, **options)


def robotics():
    """The package gymnasium_robotics, without what it prints at import about Adroit's rewards."""
    with contextlib.redirect_stderr(io.StringIO()):
        import gymnasium_robotics
    return gymnasium_robotics


def quiet(env_id, make, *args, **options):
    """Make an env without the news (newer versions, no display); one line if it cannot be made."""
    # Said at every look at OGBench's spaces, and at the first step in FrankaKitchen.
    for news in ("precision lowered by casting", "share an object"):
        warnings.filterwarnings("ignore", message=f".*{news}")
    try:
        with warnings.catch_warnings(action="ignore"):
            env = make(*args, **options)
    except Exception as error:  # of Gymnasium, or of the module that --env names
        fail(f"env {env_id or 'of the data set'}: cannot be made ({one_line(error)}); see --env")
    _tidy(env)
    return env


def _tidy(env):
    """Remove the model that gymnasium-robotics and OGBench write for each maze and leave behind."""
    world = env.unwrapped
    if type(world).__module__.startswith(("gymnasium_robotics", "ogbench")):
        for name in ("tmp_xml_file_path", "fullpath"):
            path = str(getattr(world, name, ""))
            if os.path.dirname(path) == tempfile.gettempdir():
                with contextlib.suppress(OSError):
                    os.remove(path)


def trusted(dataset_id, folder, env):
    """Exit code 2 after one line where a Minari data set's own env would run other code than envs.

    An env's spec names a function to import and to call. Those of packages that have registered
    envs are called, since that is what they are for; `--env` may name any other.
    """
    import gymnasium

    metadata = json.loads((folder / "data" / "metadata.json").read_text())
    if env is not None and {"observation_space", "action_space"} <= {*metadata}:
        return  # nothing of the data set's own is made
    gymnasium.register_envs(robotics())
    recipes.register()
    known = {str(spec.entry_point) for spec in gymnasium.registry.values()}
    packages = "|".join({re.escape(name.partition(".")[0]) for name in known})
    env_class = re.compile(rf"({packages})(\.\w+)*:\w*Env|{HARMLESS}")
    for text in filter(None, (metadata.get("env_spec"), metadata.get("eval_env_spec"))):
        spec = json.loads(text)
        for part in (spec, *(spec.get("additional_wrappers") or ())):
            name = str(part["entry_point"])
            if name not in known and not env_class.fullmatch(name):
                what = f"its env is {name}, of no package of envs known here"
                fail(f"{dataset_id}: {what}; --env NAME evaluates in one that you trust")


def recovered(dataset_id, source):
    """Arguments under which the eval env of a Minari data set is the data's own task."""
    text = source.storage.metadata.get("eval_env_spec")
    if dataset_id.startswith("D4RL/kitchen/"):
        # The recording's: no task is ever taken off the list, all done ones pay at every step.
        print(f"{dataset_id}: its rewards count tasks at every step, the env pays each task once")
        return {"remove_task_when_completed": True, "terminate_on_tasks_completed": True}
    if not text or source.env_spec is None:
        return {}
    data = source.env_spec.kwargs.get("maze_map")
    maze = json.loads(text).get("kwargs", {}).get("maze_map")
    if not data or not maze or _walls(maze) == _walls(data):
        return {}
    mirrored = [row[::-1] for row in maze]
    for turned in (mirrored, maze[::-1], mirrored[::-1]):
        if _walls(turned) == _walls(data):
            print(f"{dataset_id}: its eval env has the maze mirrored; turned to the data's walls")
            return {"maze_map": turned}
    print(f"{dataset_id}: its eval env has other walls than the data")
    return {}


def _walls(maze):
    return [[cell == 1 for cell in row] for row in maze]


def in_our_units(make_env, keys, box):
    """The env as the algorithm sees it: flat float32 observations, actions in [-1, 1]."""

    def make(render_mode=None):
        import gymnasium
        from gymnasium.wrappers import RescaleAction, TransformObservation

        env = make_env(render_mode)
        if hasattr(env.unwrapped, "tasks_to_complete"):
            env = _tells_success(env)
        parts = [env.observation_space[key] for key in keys] or [env.observation_space]
        size = sum(gymnasium.spaces.flatdim(part) for part in parts)
        flat = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        env = TransformObservation(env, lambda observation: flatten(observation, keys), flat)
        if box is None or ((box[0] == -1).all() and (box[1] == 1).all()):
            return env
        return RescaleAction(env, np.float32(-1), np.float32(1))

    return make


def _tells_success(env):
    """FrankaKitchen tells which tasks are left; success is to have none left."""
    import gymnasium

    class TellsSuccess(gymnasium.Wrapper):
        def step(self, action):
            *rest, info = self.env.step(action)
            return *rest, info | {"success": not info["tasks_to_complete"]}

    return TellsSuccess(env)


def flatten(observation, keys):
    """Dict or array, with or without a time axis -> float32 array with a flat last axis."""
    if not keys:
        return np.asarray(observation, np.float32)
    return np.concatenate([np.asarray(observation[key], np.float32) for key in keys], axis=-1)

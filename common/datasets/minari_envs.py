# SPDX-License-Identifier: Apache-2.0
"""The environment that a Minari data set names for its evaluation."""

import contextlib
import importlib
import json
import re

from common import fail, threads
from common.envs import pointmaze, quiet

HARMLESS = r"gymnasium\.wrappers(\.\w+)*:(TimeLimit|OrderEnforcing|PassiveEnvChecker|Autoreset|"
HARMLESS += r"RecordEpisodeStatistics|AtariPreprocessing|RenderCollection|JaxToNumpy|JaxToTorch|"
HARMLESS += r"NumpyToTorch|\w*(Action|Reward|Observation)(V\d)?)"  # others write files or windows


def trusted(dataset_id, folder, env):
    """Exit with code 2 where making a Minari data set's own env would run code that is no env's.

    The spec of an env names a function to import and to call. It is called where its package is one
    that has registered envs, since that is what such functions are for. `--env` may name any other,
    and the module that it names is one of those.
    """
    import gymnasium

    metadata = json.loads((folder / "data" / "metadata.json").read_text(encoding="utf-8"))
    if env is not None and {"observation_space", "action_space"} <= {*metadata}:
        return  # nothing of the data set's own is made
    if env is not None and ":" in env:  # Minari makes the data set's own all the same
        with contextlib.suppress(Exception):  # `make` says what is wrong
            importlib.import_module(env.partition(":")[0])
    gymnasium.register_envs(quiet.robotics())
    pointmaze.register()
    with threads.ALONE:
        known = {str(spec.entry_point) for spec in gymnasium.registry.values()}
    known.add(pointmaze.FORMER_ENTRY_POINT)
    packages = "|".join({re.escape(name.partition(".")[0]) for name in known})
    env_class = re.compile(rf"({packages})(\.\w+)*:\w*Env|{HARMLESS}")
    for text in filter(None, (metadata.get("env_spec"), metadata.get("eval_env_spec"))):
        spec = json.loads(text)
        for part in (spec, *(spec.get("additional_wrappers") or ())):
            name = str(part["entry_point"])
            if name not in known and not env_class.fullmatch(name):
                what = f"its env is {name}, of no package of envs known here"
                remedy = "--env NAME evaluates in one that you trust, --env MODULE:NAME in one "
                remedy += "that a module of yours registers"
                if env is not None:
                    remedy = "to read data without stored spaces Minari makes that env: name the "
                    remedy += "module that registers it, if you trust it, by --env MODULE:NAME"
                fail(f"{dataset_id}: {what}; {remedy}")


def recovered(dataset_id, source):
    """Options for a Minari data set's evaluation env, so that its task is the one of the data."""
    text = source.storage.metadata.get("eval_env_spec")
    if dataset_id.startswith("D4RL/kitchen/"):
        # In the recording, every task that is done pays at every step. The env pays each once.
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

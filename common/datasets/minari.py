# SPDX-License-Identifier: Apache-2.0
"""Read a Minari data set from Minari's local root; download it first where it is not there."""

import difflib
import os
import shutil
import socket
import urllib.request

import numpy as np

from common import envs, fail, folders, one_line, threads, told
from common.datasets import minari_envs, names, reference_scores, unreadable
from common.datasets.source import Source
from common.envs import d4rl

# Dict observations of D4RL's tasks: the parts that are used, in this order.
ANTMAZE = ("achieved_goal", "observation", "desired_goal")  # x and y first, as in D4RL
POINTMAZE = ("observation", "desired_goal")  # the goal moves in the data
KITCHEN = ("observation",)  # the goal is fixed


def read(dataset_id, env, env_steps):
    folder = folders.minari(dataset_id)
    if is_missing(dataset_id):
        _download(dataset_id)
    try:
        with np.errstate(over="raise"):
            return _read(dataset_id, folder, env, env_steps)
    except FloatingPointError:
        fail(f"{dataset_id}: holds numbers beyond float32, 3.4e38; store them scaled down")
    except Exception as error:  # of Minari and all that it reads with
        if hindrance := unreadable.obstacle(error):
            fail(f"{dataset_id}: {folder} cannot be read: {hindrance}")
        if unreadable.is_damage(error):
            fail(
                f"{dataset_id}: {folder} is damaged ({told(error)}); delete that folder "
                "and start again, which downloads it anew, or record it again"
            )
        fail(f"{dataset_id}: {folder} cannot be read ({told(error)})")


def _read(dataset_id, folder, env, env_steps):
    import minari

    minari_envs.trusted(dataset_id, folder, env)
    with threads.ALONE:  # Minari reads its root from the environment
        source = minari.load_dataset(dataset_id)
    metadata = source.storage.metadata
    keys, left_out = _keys(dataset_id, source)
    _check_spaces(dataset_id, source, keys)
    _tell_of_images(dataset_id, source, keys)
    rows = _rows(source, keys)
    options = {} if env else minari_envs.recovered(dataset_id, source)
    options |= {} if env_steps is None else {"max_episode_steps": env_steps}
    env_id = env or (source.env_spec and source.env_spec.id)
    flipped = d4rl.flipped(env_id, rows)
    width = rows["observations"].shape[1]
    adapted = {"row": {}, "width": width, "flipped": True} if flipped else {}

    def make_env(render_mode=None):
        render = {} if render_mode is None else {"render_mode": render_mode}
        if env is not None:
            made = envs.make(env, **options, **render)
        else:
            recover = source.recover_environment
            made = envs.make_quietly(env_id, recover, eval_env=True, **options, **render)
        return d4rl.adapt(made, **adapted) if adapted else made

    has_env = env or source.env_spec or metadata.get("eval_env_spec")
    reference = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    if reference == (None, None):
        reference = reference_scores.of_task(dataset_id)
    return Source(
        rows=rows,
        make_env=make_env if has_env else None,
        reference=reference,
        keys=keys,
        left_out=left_out,
        observation_space=source.observation_space,
        action_space=source.action_space,
        adapted=adapted,
        facts={"minari_version": str(metadata.get("minari_version", ""))},
    )


def _check_spaces(dataset_id, source, keys):
    """Exit with code 2 after one line where a space of the recording cannot be learned from."""
    space = source.observation_space
    parts = {f"observation[{key!r}]": space[key] for key in keys} or {"observation": space}
    for name, part in parts.items():
        if what := envs.unusable(part, name):
            fail(
                f"{dataset_id}: {what} has no fixed number of values; record it without that part "
                "(gymnasium.wrappers.FilterObservation) or as numbers (TransformObservation)"
            )
    if why := envs.unusable_action(source.action_space):
        fail(f"{dataset_id}: the action space {why}")


def _tell_of_images(dataset_id, source, keys):
    """Say that images of the recording are not quite those that the env gives."""
    space = source.observation_space
    used = [space[key] for key in keys] or [space]
    if getattr(source.storage, "jpeg_encoding", True) and any(_has_image(part) for part in used):
        print(
            f"{dataset_id}: its images are stored as JPEG, so they differ a little from the env's; "
            "Minari's DataCollector stores them as they are with jpeg_encoding=False"
        )


def _has_image(space):
    """Whether a part of a space is what Minari takes for an image."""
    from gymnasium.spaces import Dict, Tuple
    from minari.dataset.minari_storage import is_image_space

    if isinstance(space, Dict):
        return any(_has_image(part) for part in space.spaces.values())
    if isinstance(space, Tuple):
        return any(_has_image(part) for part in space.spaces)
    return is_image_space(space)


def _rows(source, keys):
    """All episodes, written one after the other into arrays of the final size."""
    total, at = source.total_steps, 0
    columns = envs.columns(source.observation_space, keys)
    width = envs.width(source.observation_space, keys)
    unreadable.check_memory(total, width)
    action = source.action_space
    kind = np.float32 if action.dtype.kind == "f" else action.dtype
    rows = {
        "observations": np.empty((total, width), np.float32),
        "next_observations": np.empty((total, width), np.float32),
        "actions": np.empty((total, *action.shape), kind),
        "rewards": np.empty(total, np.float32),
        "terminals": np.empty(total, np.float32),
        "timeouts": np.empty(total, np.float32),
    }
    for episode in source.iterate_episodes():
        steps = len(episode.rewards)
        part = slice(at, at + steps)
        observation = columns(episode.observations, steps + 1)
        rows["observations"][part] = observation[:-1]
        rows["next_observations"][part] = observation[1:]
        rows["actions"][part] = np.reshape(episode.actions, (steps, *action.shape))
        rows["rewards"][part] = np.reshape(episode.rewards, steps)
        rows["terminals"][part] = episode.terminations
        rows["timeouts"][part] = episode.truncations
        at = part.stop
        rows["timeouts"][at - 1] = 1  # also where the recording breaks an episode off
    if at != total or not total:
        raise unreadable.Incomplete(f"{at} of {total} steps are there")
    return rows


# --- Parts of a dict observation ----------------------------------------------------------------
def _keys(dataset_id, source):
    """(the parts of a dict observation that are used, in this order; the others); () for arrays.

    All are used, but for those that tell a policy nothing: a goal that never changes, an achieved
    goal whose numbers the observation has as well, and what cannot be written as numbers and never
    changes.
    """
    from gymnasium.spaces import Dict

    space = source.observation_space
    if not isinstance(space, Dict):
        return (), ()
    keys = _keys_of_family(dataset_id, source)
    if keys is None:
        idle = _idle_parts(source, space)
        keys = sorted({*space.spaces} - idle, key=lambda key: (key != "observation", key))
    return tuple(keys), tuple(sorted({*space.spaces} - {*keys}))


def _keys_of_family(dataset_id, source):
    """Those of one of D4RL's tasks, by the name of the data set or of its env; None for others."""
    env_id = source.env_spec.id if source.env_spec else ""
    name = f"{dataset_id} {env_id}".lower()
    if "antmaze" in name:
        keys = ANTMAZE
    elif "pointmaze" in name:
        keys = POINTMAZE
    elif "frankakitchen" in name or dataset_id.startswith("D4RL/kitchen/"):
        keys = KITCHEN
    else:
        return None
    return keys if {*keys} <= {*source.observation_space.spaces} else None


def _idle_parts(source, space):
    """The names of the parts that tell a policy nothing."""
    from gymnasium.spaces import Text

    usable = {key for key in space.spaces if envs.unusable(space[key]) is None}
    constant = {key for key in space.spaces if isinstance(space[key], Text)}
    constant |= {"desired_goal"} if {"observation", "desired_goal"} <= usable else set()
    achieved = {"observation", "achieved_goal"} <= usable
    first, repeated = {}, True  # the first value of a part; which numbers stand in which column
    for episode in source.iterate_episodes() if constant or achieved else ():
        count, values = len(episode.rewards) + 1, episode.observations
        for key in sorted(constant):
            rows = (
                values[key] if key not in usable else envs.columns(space[key])(values[key], count)
            )
            first.setdefault(key, rows[0])
            if not all(np.array_equal(row, first[key]) for row in rows):
                constant.remove(key)
        if achieved:
            goal = envs.columns(space["achieved_goal"])(values["achieved_goal"], count)
            whole = envs.columns(space["observation"])(values["observation"], count)
            repeated &= np.array([(whole == number[:, None]).all(axis=0) for number in goal.T])
            achieved = bool(repeated.any(axis=1).all())
    return constant | ({"achieved_goal"} if achieved else set())


# --- Download -----------------------------------------------------------------------------------
def is_there(dataset_id):
    """Whether Minari's local root has a data set of that name, all of it."""
    data = folders.minari(dataset_id) / "data"
    # HDF5 keeps all episodes in one file, Arrow and Parquet have a folder for each.
    return (data / "metadata.json").exists() and any(
        entry.suffix in (".hdf5", "") for entry in data.iterdir() if entry.name != ".cache"
    )


def is_missing(dataset_id):
    """Whether the data set is not there. Removes what an interrupted download left of it."""
    if is_there(dataset_id):
        return False
    folder = folders.minari(dataset_id)
    data = folder / "data"
    if data.is_dir() and {entry.name for entry in folder.iterdir()} <= {"data", ".cache"}:
        print(f"{dataset_id}: {folder} is incomplete, starting it anew")
        shutil.rmtree(folder)
    elif folder.exists():
        fail(f"{dataset_id}: {folder} is no Minari data set; move it away and start again")
    return True


def _download(dataset_id):
    import minari

    print(f"downloading {dataset_id} with Minari", flush=True)
    try:
        _reach_server()
        minari.download_dataset(dataset_id)
    except Exception as error:
        near = difflib.get_close_matches(dataset_id, names.minari_ids(), 3, 0.6)
        here = f" (there is {', '.join(near)})" if near else ""
        fail(
            f"{dataset_id}: not under {folders.minari()}{here} and the download failed "
            f"({one_line(error)}); with a network: minari download {dataset_id}"
        )


def _reach_server():
    """Fail at once where the server's name has no address. Minari itself would try for 23 s."""
    remote = os.environ.get("MINARI_REMOTE", "hf://")
    if not remote.startswith("hf://") or urllib.request.getproxies():
        return
    from huggingface_hub import constants

    address = urllib.request.urlparse(constants.ENDPOINT)
    socket.getaddrinfo(address.hostname, address.port or 443)

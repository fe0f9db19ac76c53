# SPDX-License-Identifier: Apache-2.0
"""Read a Minari data set from Minari's local root; download it first where it is not there."""

import os
import shutil
import socket
import urllib.request

import numpy as np

from common import envs, fail, folders, one_line
from common.datasets import reference_scores
from common.datasets.source import Source
from common.envs import d4rl, recorded


def read(dataset_id, env, env_steps):
    import minari

    folder = folders.minari(dataset_id)
    if is_missing(dataset_id):
        _download(dataset_id)
    try:
        recorded.trusted(dataset_id, folder, env)
        source = minari.load_dataset(dataset_id)
        metadata = source.storage.metadata
        rows, keys = _rows(dataset_id, source)
        options = {} if env else recorded.recovered(dataset_id, source)
    except Exception as error:
        fail(
            f"{dataset_id}: {folder} is damaged ({one_line(error)}); delete that folder and "
            "start again"
        )
    options |= {} if env_steps is None else {"max_episode_steps": env_steps}
    env_id = env or (source.env_spec and source.env_spec.id)
    flipped = d4rl.flipped(env_id, rows)

    def make_env(render_mode=None):
        render = {} if render_mode is None else {"render_mode": render_mode}
        if env is not None:
            made = envs.make(env, **options, **render)
        else:
            recover = source.recover_environment
            made = envs.make_quietly(env_id, recover, eval_env=True, **options, **render)
        return d4rl.palm_reward(made) if flipped else made

    has_env = env or source.env_spec or metadata.get("eval_env_spec")
    reference = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    if reference == (None, None):
        reference = reference_scores.of_task(dataset_id)
    facts = {"minari_version": str(metadata.get("minari_version", ""))}
    return Source(rows, make_env if has_env else None, reference, keys, facts=facts)


def _rows(dataset_id, source):
    """All episodes, written one after the other into arrays of the final size."""
    rows, keys, at, total = {}, (), 0, source.total_steps
    for episode in source.iterate_episodes():
        if not rows:
            keys = _observation_keys(dataset_id, episode.observations)
            width = envs.flatten(episode.observations, keys)[0].size
            action = np.asarray(episode.actions)
            kind = np.float32 if action.dtype.kind == "f" else action.dtype
            rows = {
                "observations": np.empty((total, width), np.float32),
                "next_observations": np.empty((total, width), np.float32),
                "actions": np.empty((total, *action.shape[1:]), kind),
                "rewards": np.empty(total, np.float32),
                "terminals": np.empty(total, np.float32),
                "timeouts": np.empty(total, np.float32),
            }
        observation = envs.flatten(episode.observations, keys)
        observation = observation.reshape(len(observation), -1)
        part = slice(at, at + len(episode.rewards))
        rows["observations"][part] = observation[:-1]
        rows["next_observations"][part] = observation[1:]
        rows["actions"][part] = episode.actions
        rows["rewards"][part] = episode.rewards
        rows["terminals"][part] = episode.terminations
        rows["timeouts"][part] = episode.truncations
        at = part.stop
        rows["timeouts"][at - 1] = 1  # also where the recording breaks an episode off
    if at != total or not rows:
        raise ValueError(f"{at} of {total} steps are there")
    return rows, keys


def _observation_keys(dataset_id, observations):
    """Which parts of a dict observation are used, in this order; () for plain arrays."""
    if not isinstance(observations, dict):
        return ()
    if "antmaze" in dataset_id.lower():
        return ("achieved_goal", "observation", "desired_goal")  # x and y first, as in D4RL
    if "pointmaze" in dataset_id.lower():
        return ("observation", "desired_goal")  # the goal moves in the data
    return ("observation",) if "observation" in observations else tuple(sorted(observations))


# --- Download -----------------------------------------------------------------------------------
def is_missing(dataset_id):
    """Whether the data set is not there. Removes what an interrupted download left of it."""
    folder = folders.minari(dataset_id)
    data = folder / "data"
    # HDF5 keeps all episodes in one file, Arrow and Parquet have a folder for each.
    if (data / "metadata.json").exists() and any(
        entry.suffix in (".hdf5", "") for entry in data.iterdir() if entry.name != ".cache"
    ):
        return False
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
        fail(
            f"{dataset_id}: not under {folders.minari()} and the download failed "
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

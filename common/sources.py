# SPDX-License-Identifier: Apache-2.0
"""Where data sets come from: each function reads one source and returns its rows as recorded.

The rules that turn rows into transitions are in datasets.py. Imports of minari, h5py and gymnasium
wait until something is read or made: training on arrays needs none of them.
"""

import difflib
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common import d4rl, download, environments, fail, hdf5, one_line, recipes

MINARI_ID = re.compile(r"[\w.-]+(/[\w.-]+)+-v\d+")
OGBENCH_ID = re.compile(r"((?:\w+-)+\w+)-singletask(-task[1-5])?-v0")
OGBENCH_ENVS = ("pointmaze", "antmaze", "humanoidmaze", "antsoccer", "cube", "scene", "puzzle")


class Source(NamedTuple):
    """Rows as recorded and what is known of the env. Names of rows as in D4RL's files."""

    rows: dict[str, np.ndarray]  # observations, actions, rewards, terminals, maybe timeouts, ...
    make_env: Callable[..., Any] | None  # (render_mode=None) -> the env as recorded
    pair: tuple = (None, None)  # returns that score 0 and 100
    keys: tuple[str, ...] = ()  # parts of a dict observation, in this order
    box: tuple = (None, None)  # bounds of the actions where no env tells them, else -1 and 1
    horizon: int | None = None  # step limit of the recording
    ends: bool = True  # whether a termination ends an episode, or only `timeouts` do
    by_success: bool = False  # whether the score is the success rate
    facts: dict = {}  # noqa: RUF012 - never changed; what the run's config.yaml should tell


def read(dataset_id: str, env: str | None, env_steps: int | None) -> Source:
    """The rows of a data set id or path, see datasets.py for the forms.

    Raises:
        SystemExit: code 2 after one clear line.
    """
    if not dataset_id.strip() or not dataset_id.isprintable():
        fail(f"{dataset_id!r} is no data set id; see common/datasets.py for the forms")
    path = Path(os.path.expanduser(dataset_id))
    if dataset_id.startswith("local/") and not path.exists():
        if dataset_id.startswith("local/ogbench/"):
            return _local_ogbench(dataset_id, env, env_steps)
        if dataset_id in recipes.IDS:
            _minari_part(dataset_id)  # half of one is made anew
            _make(dataset_id, recipes.make, dataset_id)
            return _minari(dataset_id, env, env_steps)
        _unknown(dataset_id)
    if dataset_id in d4rl.table() and not path.exists():
        row = d4rl.row_of(dataset_id)
        return _hdf5(d4rl.file_of(dataset_id), env, env_steps, row)
    if (match := OGBENCH_ID.fullmatch(dataset_id)) and match[1].split("-")[0] in OGBENCH_ENVS:
        return _ogbench(dataset_id, ogbench_folder(), env, env_steps)
    if path.suffix in (".hdf5", ".h5") or path.exists():
        return _hdf5(path, env, env_steps, d4rl.row_of(path.stem))
    if MINARI_ID.fullmatch(dataset_id):
        return _minari(dataset_id, env, env_steps)
    return _unknown(dataset_id)


def _make(dataset_id, make, *args):
    try:
        make(*args)
    except OSError as error:
        fail(f"{dataset_id}: cannot be made here ({one_line(error)})")


# --- Minari -------------------------------------------------------------------------------------
def _minari(dataset_id, env, env_steps):
    import minari

    folder = minari_folder(dataset_id)
    if _minari_part(dataset_id):
        _download_minari(dataset_id)
    try:
        environments.trusted(dataset_id, folder, env)
        source = minari.load_dataset(dataset_id)
        metadata = source.storage.metadata
        rows, keys = _minari_rows(dataset_id, source)
        options = {} if env else environments.recovered(dataset_id, source)
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
            made = environments.gym_make(env, **options, **render)
        else:
            recover = source.recover_environment
            made = environments.quiet(env_id, recover, eval_env=True, **options, **render)
        return d4rl.palm_reward(made) if flipped else made

    has_env = env or source.env_spec or metadata.get("eval_env_spec")
    pair = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    if pair == (None, None):
        pair = _documented_pair(dataset_id)
    facts = {"minari_version": str(metadata.get("minari_version", ""))}
    return Source(rows, make_env if has_env else None, pair, keys, facts=facts)


def _minari_rows(dataset_id, source):
    """Episodes written one after the other into arrays of the right size: one copy in memory."""
    rows, keys, at, total = {}, (), 0, source.total_steps
    for episode in source.iterate_episodes():
        if not rows:
            keys = _observation_keys(dataset_id, episode.observations)
            width = environments.flatten(episode.observations, keys)[0].size
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
        observation = environments.flatten(episode.observations, keys)
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


def _minari_part(dataset_id):
    """Whether the data set still has to be fetched; removes what an interrupted download left."""
    folder = minari_folder(dataset_id)
    data = folder / "data"
    # HDF5 keeps all episodes in one file, Arrow and Parquet have a folder for each.
    if (data / "metadata.json").exists() and any(
        entry.suffix in (".hdf5", "") for entry in data.iterdir() if entry.name != ".cache"
    ):
        return False
    if data.is_dir() and {entry.name for entry in folder.iterdir()} <= {"data", ".cache"}:
        print(f"{dataset_id}: {folder} is half a data set, begun anew")
        shutil.rmtree(folder)
    elif folder.exists():
        fail(f"{dataset_id}: {folder} is no Minari data set; move it away and start again")
    return True


def _download_minari(dataset_id):
    import minari

    print(f"downloading {dataset_id} with Minari", flush=True)
    try:
        _reach_minari()
        minari.download_dataset(dataset_id)
    except Exception as error:
        fail(
            f"{dataset_id}: not under {minari_folder('')} and the download failed "
            f"({one_line(error)}); with a network: minari download {dataset_id}"
        )


def _reach_minari():
    """Fails at once where the server has no address: Minari itself tries for 23 s before."""
    remote = os.environ.get("MINARI_REMOTE", "hf://")
    if not remote.startswith("hf://") or urllib.request.getproxies():
        return
    from huggingface_hub import constants

    address = urllib.request.urlparse(constants.ENDPOINT)
    socket.getaddrinfo(address.hostname, address.port or 443)


def _documented_pair(dataset_id):
    """D4RL's pair of the same task, for Minari data made for D4RL's tasks: Adroit and Kitchen."""
    for name, row in d4rl.table().items():
        if row["minari_id"] == dataset_id and row["suite"] in ("adroit", "kitchen"):
            print(f"{dataset_id}: no reference scores recorded, D4RL's of {name} are used")
            return float(row["ref_min_score"]), float(row["ref_max_score"])
    return None, None


# --- D4RL ---------------------------------------------------------------------------------------
def _hdf5(path, env, env_steps, row):
    if difference := path.is_file() and download.changed(path):
        fail(f"{path}: {difference}")
    numbers = ("ref_min_score", "ref_max_score", "max_episode_steps")
    rows, facts = hdf5.read(path, d4rl.COLUMNS, d4rl.needed(row, path))
    hdf5.check_attributes(path, facts, numbers)
    chosen = env or facts.get("env_id")
    facts = d4rl.known(row, chosen, facts, numbers) | facts
    chosen, env = env, env or facts.get("env_id")
    recorded = facts.get("max_episode_steps")
    limit = env_steps or recorded
    options = {} if limit is None else {"max_episode_steps": int(limit)}
    if chosen is None:
        options |= d4rl.options(row)

    def make_env(render_mode=None):
        made = environments.gym_make(env, render_mode=render_mode, **options)
        return d4rl.adapt(made, {} if chosen else row, width, flipped)

    width = np.shape(rows["observations"])[-1]
    flipped = row.get("suite") == "adroit" or d4rl.flipped(env, rows)
    try:
        ends = d4rl.repair(row.get("suite"), rows)
    except (IndexError, TypeError, ValueError):
        ends = True  # the checks of datasets.py tell what is wrong with the arrays
    pair = facts.get("ref_min_score"), facts.get("ref_max_score")
    box = facts.get("action_low"), facts.get("action_high")
    record = {"file": str(path), "file_bytes": path.stat().st_size}
    horizon = recorded or env_steps
    return Source(rows, make_env if env else None, pair, (), box, horizon, ends=ends, facts=record)


# --- OGBench ------------------------------------------------------------------------------------
def _local_ogbench(dataset_id, env, env_steps):
    """`local/ogbench/cube-single-play-v0` is the default task, `...-singletask-task3-v0` task 3."""
    from common import ogbench_recipes

    name = dataset_id.removeprefix("local/ogbench/")
    match = OGBENCH_ID.fullmatch(name)
    data = f"{match[1]}-v0" if match else name
    if data not in ogbench_recipes.RECIPES:
        _unknown(dataset_id)
    if not (ogbench_folder("local") / f"{data}.npz").exists():
        _make_ogbench(dataset_id, data)
    task = name if match else f"{name.removesuffix('-v0')}-singletask-v0"
    return _ogbench(task, ogbench_folder("local"), env, env_steps)


def _make_ogbench(dataset_id, data):
    """In a process of its own, whose workers import no JAX as this one's would."""
    command = [sys.executable, "-m", "common.recipes", f"local/ogbench/{data}"]
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    code = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}).returncode
    if code == 2:  # it said why
        raise SystemExit(2)
    if code:
        fail(f"{dataset_id}: making it ended with code {code}; the same command goes on with it")


def _ogbench(name, folder, env, env_steps):
    """Rows with rewards and masks relabelled for the task, by the package's own functions."""
    try:
        with warnings.catch_warnings(action="ignore"):  # news about a missing display
            import ogbench
        from ogbench.relabel_utils import relabel_dataset
    except ImportError as error:
        fail(f"{name}: needs ogbench ({one_line(error)}); pip install ogbench, Python below 3.13")
    data, task = OGBENCH_ID.fullmatch(name).groups(default="")
    env_id = f"{data.rpartition('-')[0]}-singletask{task}-v0"
    path = folder / f"{data}-v0.npz"
    if not path.exists():
        _download_ogbench(name, f"{ogbench.utils.DATASET_URL}/{path.name}", path)
    if difference := download.changed(path):
        fail(f"{name}: {path}: {difference}")
    options = {} if env_steps is None else {"max_episode_steps": env_steps}

    def make_env(render_mode=None):
        render = {} if render_mode is None else {"render_mode": render_mode}
        return environments.gym_make(env or env_id, **options, **render)

    task_env = environments.gym_make(env_id)
    try:
        raw = ogbench.load_dataset(str(path), add_info=True)
        relabel_dataset(env_id, task_env, raw)
    except Exception as error:  # of zipfile, zlib, NumPy, ogbench
        fail(f"{name}: {path} is damaged ({one_line(error)}); delete it and start again")
    task_env.close()
    rows = {
        "observations": raw["observations"],
        "next_observations": raw["next_observations"],
        "actions": raw["actions"],
        "rewards": raw["rewards"],
        "terminals": 1 - raw["masks"],  # at the goal the task is over
        "timeouts": raw["terminals"],  # but the recording goes on to the end of the episode
    }
    facts = {"file": str(path), "file_bytes": path.stat().st_size}
    return Source(rows, make_env, (None, None), ends=False, by_success=True, facts=facts)


def _download_ogbench(name, url, path):
    print(f"downloading {name} to {path}; licence of the data: MIT (OGBench)", flush=True)
    try:
        download.fetch([url], path, _check_npz)
    except (OSError, download.Unusable) as error:
        fail(
            f"{name}: not in {path.parent} and the download failed ({one_line(error)}); with a "
            f'network: python -c "import ogbench; ogbench.download_datasets([{path.stem!r}], '
            f'{str(path.parent)!r})"'
        )


def _check_npz(path):
    try:
        with zipfile.ZipFile(path) as file:
            broken, names = file.testzip(), {name.removesuffix(".npy") for name in file.namelist()}
    except Exception as error:  # of zipfile and zlib: there are many
        raise download.Unusable(f"what came is not an npz file: {error}") from error
    missing = {"observations", "actions", "terminals", "qpos", "qvel"} - names
    if broken or missing:
        what = f"no {', '.join(sorted(missing))}" if missing else f"a damaged {broken}"
        raise download.Unusable(f"the file that came has {what}")


def _unknown(dataset_id):
    from common import ogbench_recipes

    local = [f"local/ogbench/{name}" for name in ogbench_recipes.RECIPES]
    minari = [row["minari_id"] for row in d4rl.table().values() if row["minari_id"]]
    tasks = [f"{name.removesuffix('-v0')}-singletask-v0" for name in ogbench_recipes.RECIPES]
    near = difflib.get_close_matches(
        dataset_id, [*recipes.IDS, *local, *d4rl.table(), *minari, *tasks], 3, 0.5
    )
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)+", dataset_id) and not MINARI_ID.fullmatch(dataset_id):
        versions = [name for name in minari if name.startswith(f"{dataset_id}-v")]
        local = dataset_id.startswith("local/")
        near = versions or (near if local else [f"{dataset_id}-v0"])  # Minari's end in a version
    hint = f"did you mean {' or '.join(near)}?" if near else "see common/datasets.py for the forms"
    fail(f"{dataset_id!r}: no such data set; {hint}")


# --- Folders and words --------------------------------------------------------------------------
def _observation_keys(dataset_id, observations):
    """Which parts of a dict observation are used, in this order; () for plain arrays."""
    if not isinstance(observations, dict):
        return ()
    if "antmaze" in dataset_id.lower():
        return ("achieved_goal", "observation", "desired_goal")  # x and y first, as in D4RL
    if "pointmaze" in dataset_id.lower():
        return ("observation", "desired_goal")  # the goal moves in the data
    return ("observation",) if "observation" in observations else tuple(sorted(observations))


def minari_folder(dataset_id):
    root = os.environ.get("MINARI_DATASETS_PATH") or "~/.minari/datasets"
    return Path(os.path.expanduser(root)) / dataset_id


def ogbench_folder(part=""):
    root = os.environ.get("OGBENCH_DATASET_DIR") or "~/.ogbench/data"
    return Path(os.path.expanduser(root)) / part

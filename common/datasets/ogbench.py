# SPDX-License-Identifier: Apache-2.0
"""Read OGBench's npz files, with the rewards of one of the data set's tasks."""

import zipfile
from pathlib import Path

from common import envs, fail, one_line, threads, told
from common.datasets import download, mirrors, unreadable
from common.datasets.names import OGBENCH_ID
from common.datasets.source import Source
from common.envs import graphics


def read(name: str, folder: Path, env: str | None, env_steps: int | None) -> Source:
    """The rows with rewards and masks computed for the task by the package's own functions."""
    graphics.check()
    try:
        with threads.no_warnings():  # notices about a missing display
            import ogbench
        from ogbench.relabel_utils import relabel_dataset
    except ImportError as error:
        fail(f"{name}: needs ogbench ({one_line(error)}); pip install ogbench, Python below 3.13")
    match = OGBENCH_ID.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} is not a task of OGBench")
    data, task = match.groups(default="")
    env_id = f"{data.rpartition('-')[0]}-singletask{task}-v0"
    path = folder / f"{data}-v0.npz"
    if not path.exists():
        _download(name, mirrors.ogbench(ogbench.utils.DATASET_URL, path.name), path)
    if difference := download.changed(path):
        fail(f"{name}: {path}: {difference}")
    options = {} if env_steps is None else {"max_episode_steps": env_steps}

    def make_env(render_mode=None):
        render = {} if render_mode is None else {"render_mode": render_mode}
        return envs.make(env or env_id, **options, **render)

    task_env = envs.make(env_id)
    try:
        raw = ogbench.load_dataset(str(path), add_info=True)
        relabel_dataset(env_id, task_env, raw)
    except Exception as error:  # of zipfile, zlib, NumPy, ogbench
        if hindrance := unreadable.obstacle(error):
            fail(f"{name}: {path} cannot be read: {hindrance}")
        if unreadable.is_damage(error):
            fail(f"{name}: {path} is damaged ({told(error)}); delete it and start again")
        fail(f"{name}: {path} cannot be used ({told(error)})")
    envs.close(task_env)
    rows = {
        "observations": raw["observations"],
        "next_observations": raw["next_observations"],
        "actions": raw["actions"],
        "rewards": raw["rewards"],
        "terminals": 1 - raw["masks"],  # at the goal the task is over
        "timeouts": raw["terminals"],  # but the recording goes on to the end of the episode
    }
    facts = {"file": str(path), "file_bytes": path.stat().st_size}
    facts["episodes"] = int((raw["terminals"] > 0).sum())  # a file made here may have any number
    return Source(
        rows=rows,
        make_env=make_env,
        termination_ends_episode=False,
        score_is_success=True,
        facts=facts,
    )


def _download(name, urls, path):
    print(f"downloading {name} to {path}; licence of the data: MIT (OGBench)", flush=True)
    try:
        download.fetch(urls, path, _check)
    except (OSError, download.Unusable) as error:
        fail(
            f"{name}: not in {path.parent} and the download failed ({one_line(error)}); name a "
            f"mirror: {mirrors.OGBENCH}=URL, or with a network: "
            f'python -c "import ogbench; ogbench.download_datasets([{path.stem!r}], '
            f'{str(path.parent)!r})"'
        )


def _check(path):
    try:
        with zipfile.ZipFile(path) as file:
            broken, names = file.testzip(), {name.removesuffix(".npy") for name in file.namelist()}
    except Exception as error:  # of zipfile and zlib: there are many
        raise download.Unusable(f"what came is not an npz file: {error}") from error
    missing = {"observations", "actions", "terminals", "qpos", "qvel"} - names
    if broken or missing:
        what = f"no {', '.join(sorted(missing))}" if missing else f"a damaged {broken}"
        raise download.Unusable(f"the file that came has {what}")

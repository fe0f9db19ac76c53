# SPDX-License-Identifier: Apache-2.0
"""Read D4RL's files, and files in their layout: HDF5 with one array per column.

No `d4rl` and no `mujoco-py` is needed. docs/data.md says what still differs from D4RL.
"""

from pathlib import Path

import numpy as np

from common import envs, fail, folders
from common.datasets import download, hdf5, mirrors, reference_scores
from common.datasets.source import Source
from common.envs import d4rl as d4rl_envs

SERVERS = (
    "https://rail.eecs.berkeley.edu/datasets/offline_rl/",
    "http://rail.eecs.berkeley.edu/datasets/offline_rl/",  # D4RL's own address
)
LICENCE = "CC BY 4.0 (D4RL: Fu et al., 2020, arXiv:2004.07219), unless its authors say otherwise"
KEYS = ("observations", "actions", "rewards", "terminals")
COLUMNS = (*KEYS, "timeouts", "next_observations")
NUMBERS = ("ref_min_score", "ref_max_score", "max_episode_steps")  # among a file's attributes
BLOCK = 1 << 16  # rows that are read at once when a downloaded file is checked


def read(name: str, env: str | None, env_steps: int | None) -> Source:
    """One of D4RL's data sets by its name."""
    return read_file(file_of(name), env, env_steps, reference_scores.row_of(name))


def read_file(path: Path, env: str | None, env_steps: int | None, row: dict) -> Source:
    """A file in D4RL's layout. `row` is what the reference table has on its name, {} for others.

    The env is `env`, else the one that the file's attribute `env_id` names, else the counterpart of
    the row's task, changed to behave as D4RL's.
    """
    if difference := path.is_file() and download.changed(path):
        fail(f"{path}: {difference}")
    rows, facts = hdf5.read(path, COLUMNS, _needed(row, path))
    if env:
        facts.pop("env_id", None)
    hdf5.check_attributes(path, facts, NUMBERS)
    chosen = env or facts.get("env_id")
    facts = _known(row, chosen, facts) | facts
    env_id = chosen or facts.get("env_id")
    recorded_limit = facts.get("max_episode_steps")
    limit = env_steps or recorded_limit
    options = {} if limit is None else {"max_episode_steps": int(limit)}
    if chosen is None:
        options |= d4rl_envs.options(row)
    width = np.shape(rows["observations"])[-1]
    flipped = row.get("suite") == "adroit" or d4rl_envs.flipped(env_id, rows)
    known = {} if chosen else {key: row[key] for key in ("suite", "dataset") if key in row}
    adapted = {"row": known, "width": width, "flipped": flipped}

    def make_env(render_mode=None):
        made = envs.make(env_id, render_mode=render_mode, **options)
        return d4rl_envs.adapt(made, **adapted)

    try:
        termination_ends_episode = repair(row.get("suite"), rows)
    except (IndexError, TypeError, ValueError):
        termination_ends_episode = True  # checks.py will say what is wrong with the arrays
    return Source(
        rows=rows,
        make_env=make_env if env_id else None,
        reference=(facts.get("ref_min_score"), facts.get("ref_max_score")),
        bounds=(facts.get("action_low"), facts.get("action_high")),
        horizon=recorded_limit or env_steps,
        termination_ends_episode=termination_ends_episode,
        adapted=adapted,
        facts={"file": str(path), "file_bytes": path.stat().st_size},
    )


def _known(row: dict, env_id: str | None, facts: dict) -> dict:
    """What the table knows of a file.

    Reference scores and step limit belong to a task, so another env leaves them out. Where the file
    has one reference score of its own, the table does not supply the other.

    Args:
        row: the table's, {} for other names.
        env_id: the env that `--env` or the file asks for, if any.
        facts: the file's attributes.
    """
    found = {key: float(row[key]) if key in NUMBERS else row[key] for key in row if row[key]}
    family = row.get("env_id", "").rpartition("-v")[0]
    if env_id and env_id.rpartition("-v")[0] != family:
        found = {key: value for key, value in found.items() if key not in NUMBERS}
    if "ref_min_score" in facts or "ref_max_score" in facts:
        found |= {"ref_min_score": None, "ref_max_score": None}
    return found


def _needed(row: dict, path: Path) -> tuple[str, ...]:
    """The arrays a file must have. AntMaze needs timeouts: its walks go on after the goal."""
    if not row and path.stem.startswith("antmaze-"):
        print(f"{path}: D4RL's AntMaze data are antmaze-...-v2; this one is cut at terminals too")
    return (*KEYS, "timeouts") if row.get("suite") == "antmaze" else KEYS


def repair(suite: str | None, rows: dict[str, np.ndarray]) -> bool:
    """Correct the episode ends of maze data. Returns whether a termination ends an episode.

    In AntMaze the walk goes on after it has reached the goal. `terminals` there stop the bootstrap,
    but only a time limit ends the episode, or a jump that no ant can make. Maze2d has no true end
    at all: its flags mark the new targets of one long walk.
    """
    terminals = np.asarray(rows["terminals"]).reshape(-1)
    if suite == "maze2d":
        timeouts = np.asarray(rows.get("timeouts", terminals)).reshape(-1)
        rows["timeouts"] = (timeouts > 0) | (terminals > 0)
        rows["terminals"] = np.zeros(len(terminals), np.float32)
    is_ant = suite == "mujoco" and np.shape(rows["observations"])[1] == 111
    if is_ant and np.any(rows["observations"][:, 27:]):
        print("contact forces in the data are not zero, but they are in the evaluation env")
    if suite == "antmaze":
        if "timeouts" not in rows:
            fail(
                "AntMaze data of D4RL without 'timeouts': where walks end cannot be told; rename it"
            )
        timeouts = np.asarray(rows["timeouts"]).reshape(-1)
        if len(timeouts) == len(terminals) == len(rows["observations"]):
            jump = np.abs(np.diff(rows["observations"][:, :2], axis=0)).max(axis=1) > 2
            rows["timeouts"] = (timeouts > 0) | np.append(jump, True)
        return False
    return True


# --- Files --------------------------------------------------------------------------------------
def is_there(name: str) -> bool:
    """Whether the file of one of D4RL's data sets is on this machine."""
    row = reference_scores.table().get(name)
    return row is not None and (folders.d4rl() / Path(row["file"]).name).exists()


def file_of(name: str) -> Path:
    """The data set's file, downloaded at the first call.

    Raises:
        SystemExit: code 2 after one line, where no server delivers a usable file.
    """
    folder, row = folders.d4rl(), reference_scores.table()[name]
    path = folder / Path(row["file"]).name
    if not path.exists():
        print(f"downloading {name} to {path}; licence of the data: {LICENCE}", flush=True)
        try:
            download.fetch(mirrors.d4rl(SERVERS, row["file"]), path, _check)
        except (OSError, download.Unusable) as error:
            reason = " ".join(str(error).split())
            fail(
                f"{name}: not in {folder} and the download failed ({reason}); put "
                f"{SERVERS[-1]}{row['file']} there by hand or set D4RL_DATASET_DIR, or "
                f"name a mirror: {mirrors.D4RL}=URL"
            )
    return path


def _check(path):
    import h5py

    try:
        with h5py.File(path) as file:
            missing = [key for key in KEYS if key not in file]
            lengths = {key: len(file[key]) for key in COLUMNS if key in file}
            for key, length in lengths.items():  # read every row: only then is all unpacked
                for start in range(0, length, BLOCK):
                    _ = file[key][start : start + BLOCK]
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise download.Unusable(f"what came is not an HDF5 file: {error}") from error
    if missing:
        raise download.Unusable(f"the file that came has no {', '.join(missing)}")
    if len(set(lengths.values())) > 1:
        raise download.Unusable(f"the file that came has columns of different lengths: {lengths}")

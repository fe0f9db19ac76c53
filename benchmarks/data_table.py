# SPDX-License-Identifier: Apache-2.0
"""Write the tables of benchmarks/results/data.md: what loads, how fast, with how much memory.

    python benchmarks/data_table.py [--episodes N] [--out benchmarks/results/data.md]

Every id is loaded in a process of its own. Recorded files are read from $ATOLL_DATA and skipped if
it is not set. Recipes that were not made before are made with N episodes in a temporary folder. For
ids that need a server, the table shows the message that a user without a network gets, if this
machine has none.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

import numpy as np

from common import command_line

ROOT = Path(__file__).resolve().parents[1]
LOAD = """
import json, sys, time
import gymnasium, h5py
if "/" in sys.argv[1] and not sys.argv[1].endswith(".hdf5"):
    import minari
from common import datasets
def memory(name):  # of Linux: VmRSS now, VmHWM at its highest
    lines = dict(x.split(":") for x in open("/proc/self/status"))
    return 1024 * int(lines[name].split()[0])
base, start, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
dataset = datasets.load(sys.argv[1], actions="any")
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
t, returns = dataset.transitions, dataset.episode_returns
print("\\0" + json.dumps({
    "transitions": len(t.reward), "episodes": len(returns), "seconds": seconds, "cpu": cpu,
    "returns": [float(f()) for f in (returns.min, returns.mean, returns.std, returns.max)],
    "env": dataset.record["env"], "bytes": sum(x.nbytes for x in t),
    "memory": memory("VmHWM") - base,
    "terminations": int(t.termination.sum()), "O": t.observation.shape[1],
    "A": dataset.num_actions or t.action.shape[1],
}))
"""
SERVED = (
    "hopper-medium-v2",
    "antmaze-umaze-v2",
    "maze2d-umaze-v1",
    "pen-human-v1",
    "kitchen-complete-v0",
    "mujoco/hopper/medium-v0",
    "D4RL/antmaze/umaze-v1",
    "cube-single-play-singletask-v0",
)


def run(dataset_id, **env):
    """(facts or None, what was printed, seconds) of a load in a fresh process."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", LOAD, dataset_id],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"} | env,
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - start
    if done.returncode == 0:
        return json.loads(done.stdout.rpartition("\0")[2]), done.stdout, seconds
    return None, done.stderr.strip().splitlines()[-1], seconds


def cpu_of_children():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def shown(text):
    """The text without the paths of this machine."""
    for path, name in ((os.environ.get("ATOLL_DATA"), "$ATOLL_DATA"), (str(Path.home()), "~")):
        text = text.replace(path, name) if path else text
    return text


def row(name, facts, note=""):
    low, mean, std, high = facts["returns"]
    return (
        f"| `{shown(name)}` | {facts['transitions']:,} | {facts['episodes']:,} | "
        f"{facts['terminations']:,} | {facts['O']} / {facts['A']} | "
        f"{low:.1f} / {mean:.1f} ± {std:.1f} / {high:.1f} | {facts['env']} | "
        f"{facts['seconds']:.2f} | {facts['cpu']:.2f} | {facts['bytes'] / 1e6:.1f} | {note} |"
    )


HEAD = (
    "| id | transitions | episodes | terminations | O / A | return min / mean ± std / max | env | "
    "seconds | of CPU | MB | note |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def families(episodes, folder):
    from common import folders, recipes

    yield "## Recorded files\n\n" + HEAD
    data = os.environ.get("ATOLL_DATA")
    for path in sorted(Path(data).glob("*.hdf5")) if data else ():
        facts, text, _ = run(str(path))
        yield row(str(path), facts) if facts else f"| `{shown(str(path))}` | {shown(text)} |"
    yield "\n## Recipes\n\n" + HEAD
    for name in recipes.IDS:
        env, note = {}, ""
        if not (folders.minari(name) / "data").exists():
            env = {"MINARI_DATASETS_PATH": str(folder)}
            note = f"made here in {run(name, **env)[2]:.0f} s"
        facts, text, _ = run(name, **env)
        yield row(name, facts, note) if facts else f"| `{name}` | {shown(text)} |"
    for name, recipe in recipes.OGBENCH_RECIPES.items():
        env, note = {}, ""
        if not (folders.ogbench("local") / f"{name}.npz").exists():
            env = {"OGBENCH_DATASET_DIR": str(folder)}
            steps = (episodes + max(1, episodes // 10)) * recipe.steps
            flags = ["--episodes", str(episodes), "--workers", "1"]
            start = cpu_of_children()
            subprocess.run(
                [sys.executable, "-m", "common.recipes", f"local/ogbench/{name}", *flags],
                env=os.environ | env | {"TQDM_DISABLE": "1"},
                cwd=ROOT,
                check=True,
                capture_output=True,
            )
            seconds = cpu_of_children() - start
            note = f"a sample; {steps / seconds:,.0f} rows made per second of CPU, start included"
        facts, text, _ = run(f"local/ogbench/{name}", **env)
        name = f"local/ogbench/{name}"
        yield row(name, facts, note) if facts else f"| `{name}` | {shown(text)} |"


def served(folder):
    yield "## Ids that need a server\n\n| id | what a user without network reads | seconds |"
    yield "|---|---|---|"
    empty = {"D4RL_DATASET_DIR": "", "MINARI_DATASETS_PATH": "", "OGBENCH_DATASET_DIR": ""}
    env = empty | {"HOME": str(folder)}
    for name in SERVED:
        facts, text, seconds = run(name, **env)
        text = f"loaded: {facts['transitions']:,} transitions" if facts else shown(text)
        yield f"| `{name}` | {text.replace(str(folder), '~')} | {seconds:.1f} |"


# --- Speed --------------------------------------------------------------------------------------
def million(count=1_000_000, size=11, actions=3):
    draw = np.random.default_rng(0)
    steps = np.arange(count)
    return {
        "observations": draw.normal(size=(count, size)).astype(np.float32),
        "actions": draw.uniform(-1, 1, (count, actions)).astype(np.float32),
        "rewards": draw.normal(size=count).astype(np.float32),
        "terminals": np.zeros(count, bool),
        "timeouts": steps % 1000 == 999,
    }


def raw_read(path):
    """Seconds, and of CPU, to read every array of an HDF5 file, nothing else."""
    import h5py

    start, cpu = time.perf_counter(), time.process_time()
    with h5py.File(path) as file:
        arrays = []
        file.visititems(lambda _, x: arrays.append(x))  # a callback that returns stops the visit
        for array in arrays:
            if isinstance(array, h5py.Dataset):
                array[()]
    return time.perf_counter() - start, time.process_time() - cpu


def speed(folder):
    """One dict per layout of a million transitions: seconds to load them, beside a raw read."""
    import h5py
    import minari
    from gymnasium.spaces import Box
    from minari.data_collector import EpisodeBuffer

    rows, cases = million(), []
    with_next = rows | {"next_observations": rows["observations"]}
    for name, columns, options in (
        ("D4RL", rows, {}),
        ("D4RL, gzip", rows, {"compression": "gzip"}),
        ("D4RL with next observations", with_next, {}),
    ):
        path = folder / f"{len(cases)}.hdf5"
        with h5py.File(path, "w") as file:
            for key, array in columns.items():
                file.create_dataset(key, data=array, **options)
        cases.append((name, str(path), path, 3))
    root = folder / "minari"
    root.mkdir()
    buffers = [
        EpisodeBuffer(
            observations=rows["observations"][[*range(i, i + 1000), i]],
            actions=rows["actions"][i : i + 1000],
            rewards=rows["rewards"][i : i + 1000],
            terminations=rows["terminals"][i : i + 1000],
            truncations=rows["timeouts"][i : i + 1000],
            infos={},
        )
        for i in range(0, 1_000_000, 1000)
    ]
    box = [Box(-np.inf, np.inf, (n,), np.float32) for n in (11, 3)]
    here = {"MINARI_DATASETS_PATH": str(root)}
    with mock.patch.dict(os.environ, here), warnings.catch_warnings(action="ignore"):
        minari.create_dataset_from_buffers(
            "test/million-v0",
            buffers,
            observation_space=box[0],
            action_space=box[1],
            data_format="hdf5",
        )
    file = root / "test/million-v0/data/main_data.hdf5"
    cases.append(("Minari", "test/million-v0", file, 6))
    for name, dataset_id, path, target in cases:
        # The first run warms the file cache for all.
        best = min(
            (run(dataset_id, **here)[0] for _ in range(3)), key=lambda facts: facts["seconds"]
        )
        raw = min(raw_read(path) for _ in range(3))
        yield {
            "layout": name,
            "load, s": best["seconds"],
            "of CPU": best["cpu"],
            "target, s": target,
            "raw read, s": raw[0],
            "raw, of CPU": raw[1],
            "arrays, MB": best["bytes"] / 1e6,
            "memory / arrays": best["memory"] / best["bytes"],
        }


def speed_table(folder):
    yield "## A million transitions, 1000-step episodes, 11 + 3 numbers\n"
    for number, case in enumerate(speed(folder)):
        if number == 0:
            yield "| " + " | ".join(case) + " |\n" + "|---" * len(case) + "|"
        cells = (f"{x:.2f}" if isinstance(x, float) else str(x) for x in case.values())
        yield "| " + " | ".join(cells) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--episodes", type=int, default=2, help="episodes of a recipe that was not made"
    )
    parser.add_argument("--out", help="also write the page to this file")
    args = parser.parse_args()
    lines = []

    def say(text):
        print(text, flush=True)
        lines.append(text)

    say("# Data sets\n\nWritten by `python benchmarks/data_table.py`. How the environments behind")
    say("D4RL's names differ from D4RL's own is in [docs/data.md](../../docs/data.md).\n")
    say(
        f"Machine: {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    )
    say("If other work ran beside it, read the CPU seconds: a quiet machine needs no more.\n")
    for part in (speed_table, served, lambda folder: families(args.episodes, folder)):
        with tempfile.TemporaryDirectory() as folder:
            for text in part(Path(folder)):
                say(text)
        say("")
    if args.out:
        Path(args.out).write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    command_line.outlive_the_reader()
    main()

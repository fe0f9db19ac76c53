# SPDX-License-Identifier: Apache-2.0
"""What the episodes of a file in OGBench's layout are like; as a script, writes the .json file.

    python tests/common/ogbench_episodes.py FOLDER

adds what the NAME.npz of FOLDER are like. OGBench's own scripts made them, generate_manipspace.py
and generate_locomaze.py in data_gen_scripts of github.com/seohongpark/ogbench, with the options of
its commands.sh but `--num_episodes=20` (stitch: 100). What the file has of other names is kept.
"""

import json
import sys
from importlib import metadata
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("ogbench_episodes.json")


def statistics(name, folder):
    """{statistic: one number per episode} of NAME.npz, rewards as of the default task."""
    from common.datasets import ogbench

    task = f"{name.removesuffix('-v0')}-singletask-v0"
    rows = ogbench.read(task, Path(folder), None, None).rows
    ends = np.flatnonzero(rows["timeouts"]) + 1
    found = {"return": [], "length": [], "visits to the goal": []}
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        episode = {key: np.asarray(x[begin:end], np.float64) for key, x in rows.items()}
        moved = episode["next_observations"] - episode["observations"]
        found["return"].append(episode["rewards"].sum())
        found["length"].append(end - begin)
        found["visits to the goal"].append(episode["terminals"].sum())
        numbers = {"observation": episode["observations"], "action": episode["actions"]}
        numbers |= {"size of an action": np.abs(episode["actions"])}
        numbers |= {"size of a step": np.abs(moved)}
        for kind, columns in numbers.items():
            for index, mean in enumerate(columns.mean(axis=0)):
                found.setdefault(f"{kind} {index}", []).append(mean)
    return {key: [float(f"{x:.6g}") for x in values] for key, values in found.items()}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    made_with = {package: metadata.version(package) for package in ("ogbench", "mujoco")}
    record = json.loads(FILE.read_text())
    if record["made with"] != made_with:
        raise SystemExit(f"{FILE} was made with {record['made with']}: make all of it again")
    files = sorted(x for x in Path(sys.argv[1]).glob("*.npz") if not x.stem.endswith("-val"))
    record["episodes"] |= {path.stem: statistics(path.stem, sys.argv[1]) for path in files}
    FILE.write_text(json.dumps(record) + "\n")

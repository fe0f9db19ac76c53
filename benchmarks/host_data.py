# SPDX-License-Identifier: Apache-2.0
"""What `--data host` costs and saves: one run each way on a large synthetic data set.

    python benchmarks/host_data.py --output benchmarks/results/host_data

makes a file of random transitions in D4RL's layout, trains on it with `--data device` and with
`--data host`, each in a process of its own, and writes per run
    updates/s   the median chunk without the first, as in result.json
    device, GB  the most that JAX's arrays took at a border: data, state and what is on its way
    process, GB the most that the process took (on a CPU the device's memory is the process's)
and whether all losses of both runs are the same. There is no env, so nothing is evaluated.
"""

import dataclasses
import datetime
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np
import tyro

from common import provenance

ROOT = Path(__file__).resolve().parents[1]
OBSERVATION, ACTION, LENGTH, BLOCK = 17, 6, 1000, 100_000
RUN = """
import importlib, json, sys
import jax
from common import experiment
most, save = 0, experiment.Run.save
def watched(run, *args):
    global most
    most = max(most, sum(x.nbytes for x in jax.live_arrays()))
    return save(run, *args)
experiment.Run.save = watched
module = importlib.import_module("algorithms." + sys.argv[1])
module.train(*experiment.parse(module.Config, sys.argv[2:]))
print("\\0" + str(most))
"""


@dataclasses.dataclass(frozen=True)
class Arguments:
    algorithm: str = "rebrac"  # file of algorithms/, without .py
    transitions: int = 10_000_000  # of the data set, in episodes of 1000 steps
    num_updates: int = 5_000
    log_every: int = 1_000  # updates per chunk
    batch_size: int = 256
    output: Path | None = None  # stem of the record to write, .md and .json


def make(path, count):
    """Random transitions, written in blocks."""
    random, columns = np.random.default_rng(0), {"observations": OBSERVATION, "actions": ACTION}
    with h5py.File(path, "w") as file:
        for name, width in columns.items():
            file.create_dataset(name, (count, width), np.float32)
        file.create_dataset("rewards", data=random.standard_normal(count, np.float32))
        file.create_dataset("terminals", data=np.zeros(count, bool))
        file.create_dataset("timeouts", data=np.arange(1, count + 1) % LENGTH == 0)
        for start in range(0, count, BLOCK):
            stop = min(start + BLOCK, count)
            for name, width in columns.items():
                rows = random.random((stop - start, width), np.float32)
                file[name][start:stop] = 2 * rows - 1


def train(where, path, folder, arguments):
    """One run: its row, its losses and its result."""
    words = ["--dataset", str(path), "--data", where, "--eval-every", str(arguments.num_updates)]
    for name in ("num_updates", "log_every", "batch_size"):
        words += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    words += ["--runs-dir", str(folder), "--name", where, "--wandb", "disabled"]
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, arguments.algorithm, *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"--data {where} ended with {os.waitstatus_to_exitcode(status)}:\n{said}")
    (run,) = folder.glob(f"{arguments.algorithm}/**/{where}")
    result = json.loads((run / "result.json").read_text())
    row = {
        "--data": where,
        "updates/s": result["updates_per_second"],
        "device, GB": round(int(said.split("\0")[1]) / 1e9, 3),
        "process, GB": round(usage.ru_maxrss * 1024 / 1e9, 2),
    }
    return row, (run / "metrics.csv").read_bytes(), result


def main(arguments):
    rows, losses = [], set()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "synthetic.hdf5"
        make(path, arguments.transitions)
        for where in ("device", "host"):
            row, found, result = train(where, path, Path(folder) / "runs", arguments)
            rows.append(row)
            losses.add(found)
            print(json.dumps(row), flush=True)
    same = "the same, byte for byte" if len(losses) == 1 else "NOT the same"
    facts = {
        "command": shlex.join(["python", "benchmarks/host_data.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "hardware": result["hardware"],
        "versions": ", ".join(f"{k} {v}" for k, v in provenance.versions()),
        "data": f"{arguments.transitions:,} transitions of {OBSERVATION} + {ACTION} numbers",
        "training": f"{arguments.algorithm}, {arguments.num_updates:,} updates in chunks of "
        f"{arguments.log_every:,}, batches of {arguments.batch_size}, one seed",
        "metrics.csv of both": same,
    }
    lines = ["# Data in host memory", "", f"What the columns are: {Path(__file__).name}.", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", f"| {' | '.join(rows[0])} |", "|" + " --- |" * len(rows[0])]
    lines += [f"| {' | '.join(map(str, row.values()))} |" for row in rows]
    print("\n".join(lines))
    if arguments.output:
        arguments.output.with_suffix(".md").write_text("\n".join(lines) + "\n")
        record = facts | {"rows": rows}
        arguments.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    return len(losses) != 1


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Arguments)))

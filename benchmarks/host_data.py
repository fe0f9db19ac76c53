# SPDX-License-Identifier: Apache-2.0
"""Measure what `--data host` costs in speed and saves in device memory, on a large data set.

    python benchmarks/host_data.py --output benchmarks/results/host_data

makes a file of random transitions in D4RL's layout and trains on it with `--data device` and with
`--data host`, each in its own process. The page explains its columns. The script also checks that
all losses of both runs are the same. There is no env, so nothing is evaluated.
"""

import dataclasses
import datetime
import importlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from unittest import mock

import h5py
import jax
import numpy as np
import tyro

from common import command_line, experiment
from common.experiment import host_data, provenance

ROOT = Path(__file__).resolve().parents[1]
OBSERVATION, ACTION, LENGTH, BLOCK = 17, 6, 1000, 100_000
ROW = 4 * (2 * (OBSERVATION + ACTION) + 3)  # bytes of a transition, see datasets.Transitions
COLUMNS = """
- updates/s: the median chunk without the first, as in result.json
- device: the most memory in JAX's arrays at once (on an accelerator: as its allocator reports)
- rows: the transitions among them: the data set, or the rows of the chunks on the device
- process: the most memory of the process (on a CPU it includes the device's memory)
- training: the same from the second chunk on, after loading and compiling
"""
RUN = "import sys; from benchmarks import host_data; host_data.watched(*sys.argv[1:])"


@dataclasses.dataclass(frozen=True)
class Arguments:
    algorithm: str = "rebrac"  # file of algorithms/, without .py
    transitions: int = 10_000_000  # of the data set, in episodes of 1000 steps
    seeds: tuple[int, ...] = (0,)
    num_updates: int = 5_000
    log_every: int = 1_000  # updates per compiled chunk
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


# --- A run, watched -----------------------------------------------------------------------------
class Watch:
    """The most bytes so far. It looks when rows are put on the device and after every chunk."""

    def __init__(self):
        self.device = self.rows = self.process = 0
        self.chunks, self.lock = [], threading.Lock()  # [rows, metrics or None until it runs]

    def put(self, rows):
        with self.lock:
            self.chunks.append([rows, None])
        self.look()

    def runs(self, rows, metrics):
        """Keep a chunk's rows until it has run: the runtime holds them, but Python would not."""
        next(chunk for chunk in self.chunks if chunk[0] is rows)[1] = metrics

    def look(self):
        with self.lock:
            self.chunks = [chunk for chunk in self.chunks if not _is_over(chunk[1])]
            self.rows = max(self.rows, sum(size(rows) for rows, _ in self.chunks))
            self.device = max(self.device, size(jax.live_arrays()))

    def saved(self, number):
        self.look()
        if number == 1:  # the first chunk has run
            self.process = most_of_process(forget=True)


def _is_over(metrics):
    return metrics is not None and all(x.is_ready() for x in jax.tree.leaves(metrics))


def size(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def most_of_process(forget=False):
    """Most bytes of the process since its start or the last `forget`; Linux only."""
    lines = dict(x.split(":") for x in Path("/proc/self/status").read_text().splitlines())
    if forget:
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(lines["VmHWM"].split()[0])


def watched(name, *argv):
    """Train, then print the bytes."""
    watch, save, place = Watch(), experiment.Run.save, experiment.place
    gather, fed, saves = host_data.Feed._rows, host_data.fed, iter(range(1 << 30))

    def placed(data, options):
        found = place(data, options)
        watch.rows = size(found) if options.data == "device" else 0
        return found

    def saved(*args):
        save(*args)  # waits for the chunk
        watch.saved(next(saves))

    def gathered(feed, start):
        rows = gather(feed, start)
        watch.put(rows)
        return rows

    def fed_watched(train, feed):
        def one(state, keys, start, rows):
            after = train(state, keys, start, rows)
            watch.runs(rows, after[1])
            return after

        return fed(one, feed)

    module = importlib.import_module(f"algorithms.{name}")
    with (
        mock.patch.object(experiment, "place", placed),
        mock.patch.object(experiment.Run, "save", saved),
        mock.patch.object(host_data.Feed, "_rows", gathered),
        mock.patch.object(host_data, "fed", fed_watched),
    ):
        module.train(*experiment.parse(module.Config, argv))
    stats = jax.local_devices()[0].memory_stats() or {}  # None of a CPU
    found = {
        "device, GB": stats.get("peak_bytes_in_use", watch.device),
        "rows, GB": watch.rows,
        "process, GB": max(watch.process, most_of_process()),
        "training, GB": most_of_process(),
    }
    print("\0" + json.dumps(found))


def train(where, path, folder, arguments):
    """One run: its row, its losses and its result."""
    words = ["--dataset", str(path), "--data", where, "--eval-every", str(arguments.num_updates)]
    for name in ("num_updates", "log_every", "batch_size"):
        words += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    words += ["--seeds", *map(str, arguments.seeds)]
    words += ["--runs-dir", str(folder), "--name", where, "--wandb", "disabled"]
    done = subprocess.run(
        [sys.executable, "-c", RUN, arguments.algorithm, *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"--data {where} ended with {done.returncode}:\n{done.stdout}")
    (run,) = folder.glob(f"{arguments.algorithm}/**/{where}")
    result = json.loads((run / "result.json").read_text())
    row = {"--data": where, "updates/s": result["updates_per_second"]}
    for name, count in json.loads(done.stdout.rpartition("\0")[2]).items():
        row[name] = round(count / 1e9, 3)
    return row, (run / "metrics.csv").read_bytes(), result


# --- Record -------------------------------------------------------------------------------------
def page(record):
    """The page of a record."""
    lines = ["# Data in host memory", ""]
    lines += ["What `--data host` costs and saves: one run each way on a large data set.", ""]
    lines += [f"- {name}: {value}" for name, value in record.items() if name != "rows"]
    rows = record["rows"]
    lines += ["", "The columns, memory in GB:", COLUMNS.rstrip()]
    lines += ["", f"| {' | '.join(rows[0])} |", "|" + " --- |" * len(rows[0])]
    lines += [f"| {' | '.join(map(str, row.values()))} |" for row in rows]
    return "\n".join(lines) + "\n"


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
    batches = (arguments.log_every, arguments.batch_size, len(arguments.seeds))
    two_chunks = 2 * np.prod(batches, dtype=int) * (ROW + 4)  # four bytes for the row's number
    ratio = rows[1]["updates/s"] / rows[0]["updates/s"]
    record = {
        "command": shlex.join(["python", "benchmarks/host_data.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "hardware": result["hardware"],
        "versions": ", ".join(f"{k} {v}" for k, v in provenance.versions()),
        "data": f"{arguments.transitions:,} transitions of {OBSERVATION} + {ACTION} numbers",
        "training": f"{arguments.algorithm}, {arguments.num_updates:,} updates in chunks of "
        f"{arguments.log_every:,}, batches of {arguments.batch_size}, "
        f"{len(arguments.seeds)} seed(s)",
        "two chunks of one row per transition of a batch, GB": round(two_chunks / 1e9, 3),
        "metrics.csv of both": "the same, byte for byte" if len(losses) == 1 else "NOT the same",
        "updates/s, host to device": f"{ratio:.2f}, the ratio of one run each; other work on the "
        "machine affects it",
        "rows": rows,
    }
    print(page(record))
    if arguments.output:
        arguments.output.with_suffix(".md").write_text(page(record))
        arguments.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    return len(losses) != 1


if __name__ == "__main__":
    command_line.outlive_the_reader()
    raise SystemExit(main(tyro.cli(Arguments)))

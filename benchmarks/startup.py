# SPDX-License-Identifier: Apache-2.0
"""Measure what a run does between its command and its first update, with a warm compilation cache.

    python benchmarks/startup.py --data hopper-medium-v4.hdf5 --output STEM

starts algorithms/rebrac.py twice for the file and twice for a file of a million random rows (D4RL's
layout, 11 + 3 numbers): the first run fills the compilation cache, the second one is measured. It
writes STEM.json. Records in benchmarks/runs/speed/startup are on the page of speed, which
`python benchmarks/speed.py` writes.

CPU s are seconds of processor time of all threads, which other work on the machine changes little.
Seconds are those on the clock. Parts: Python and the imports; reading the data; the initial
parameters; making the envs and playing the evaluation at update 0; compiling or fetching the first
chunk and running its two updates; the rest (command line, run folder, first checkpoint).
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import h5py
import tyro

import data_table
import throughput
from common import command_line, fail

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("imports", "data", "parameters", "evaluation", "first chunk", "rest")
CHILD = """
import functools, json, os, sys, time
started = float(sys.argv.pop(1))
spent, open_parts, began = {}, [], []
def clock():
    return time.process_time(), time.time()
def timed(part, function):
    @functools.wraps(function)
    def call(*arguments, **named):
        if open_parts:  # inside another part
            return function(*arguments, **named)
        open_parts.append(part)
        then = clock()
        result = jax.block_until_ready(function(*arguments, **named))
        open_parts.pop()
        add(part, then)
        return result
    return call
def add(part, then):
    before = spent.get(part, (0, 0))
    spent[part] = [x + end - begin for x, end, begin in zip(before, clock(), then)]
sys.path.insert(0, os.getcwd())
from algorithms import rebrac
import jax
add("imports", (0, started))
from common import datasets, evaluation, experiment
datasets.load = timed("data", datasets.load)
def place(*arguments, original=timed("data", experiment.place)):
    placed = original(*arguments)
    began.append(clock())
    return placed
experiment.place = place
evaluation.Rollouts.run = timed("evaluation", evaluation.Rollouts.run)
def over_seeds(chunk, update=None, original=experiment.over_seeds):
    add("parameters", began.pop())
    first = timed("first chunk", original(chunk, update=update))
    def call(*arguments):
        first(*arguments)
        total = dict(zip(("CPU s", "seconds"), (time.process_time(), time.time() - started)))
        print(json.dumps({"total": total, "parts": spent}), flush=True)
        os._exit(0)
    return call
experiment.over_seeds = over_seeds
rebrac.train(*experiment.parse(rebrac.Config))
"""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Where to read and to write."""

    data: Path  # a small file of the mujoco suite, hopper-medium-v4.hdf5
    output: Path | None = None  # stem of the .json to write


def start(flags, folder):
    """(CPU s and seconds until the first update, the same of every part)."""
    sizes = ["--num-updates", "4", "--log-every", "2", "--eval-every", "4", "--wandb", "disabled"]
    words = [sys.executable, "-c", CHILD, str(time.time()), *map(str, flags), *sizes]
    words += ["--runs-dir", str(folder / "runs")]
    env = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    run = partial(subprocess.run, capture_output=True, text=True, check=False)
    done = run(words, env=env, cwd=ROOT)
    if done.returncode:
        fail(f"{flags}: {(done.stderr.strip().splitlines() or ['it failed'])[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return found["total"], found["parts"]


def measure(name, flags):
    """A row: CPU seconds of every part, and of all of them, with an empty and a warm cache."""
    with tempfile.TemporaryDirectory() as folder:
        cold, _ = start(flags, Path(folder))
        shutil.rmtree(Path(folder) / "runs", ignore_errors=True)
        warm, parts = start(flags, Path(folder))
    row = {"data": name, "cold, CPU s": cold["CPU s"], "warm, CPU s": warm["CPU s"]}
    row |= {f"{part}, CPU s": parts[part][0] for part in PARTS if part in parts}
    row["rest, CPU s"] = warm["CPU s"] - sum(cpu for cpu, _ in parts.values())
    return row | {"warm, seconds": warm["seconds"]}


def main(arguments):
    if not arguments.data.is_file():
        fail(f"--data {arguments.data}: no such file")
    rows = [measure(arguments.data.stem, ["--dataset", arguments.data.resolve()])]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.hdf5"
        with h5py.File(path, "w") as file:
            for key, array in data_table.million().items():
                file.create_dataset(key, data=array)
        flags = ["--dataset", path, "--env", "Hopper-v4"]
        rows.append(measure("1,000,000 random rows", flags))
    facts = throughput.conditions(throughput.Arguments())
    kept = ("date", "hardware", "versions")
    words = ["python benchmarks/startup.py --data", arguments.data.name]
    words += [f"--output {arguments.output}"] if arguments.output else []
    record = {"command": " ".join(words)} | {key: facts[key] for key in kept}
    record |= {"load": f"{os.getloadavg()[0]:.0f} processes wanted a core"}
    record |= {"algorithm": "rebrac", "rows": rows}
    text = json.dumps(record, indent=2) + "\n"
    print(text)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.with_suffix(".json").write_text(text)


if __name__ == "__main__":
    command_line.outlive_the_reader()
    main(tyro.cli(Arguments, description=__doc__.splitlines()[0]))

# SPDX-License-Identifier: Apache-2.0
"""Measure what an update costs with 10 to 500 critics.

    python benchmarks/ensembles.py --output benchmarks/results/ensembles

Every row is a number of critics in one of the files, with its own networks and batches and
synthetic data.

- updates/CPU s: updates per second of CPU time on one thread, the best of `repeats` chunks. Other
  work on the machine changes it little.
- GFLOP/update: the matrix products of an update.
- share of floor: of the speed at which a chain of matrix products with the layers' shape runs, the
  floor of benchmarks/throughput.py. The chunks of all files and the chain alternate. On a busy
  machine both are slower, the chain sometimes more so: then the share can exceed 1.
- memory, GB: the most that a process held which trained this number of critics and nothing else.
  Parameters, targets and the two moments of Adam are four numbers per weight.
- ratio: updates of the first file over those of this one, with as many critics.
"""

import dataclasses
import datetime
import importlib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import tyro

import throughput
from common import command_line, fail, machine
from common.experiment import provenance

ROOT = Path(__file__).resolve().parents[1]
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"
CHILD = "import ensembles, sys; ensembles.child(*sys.argv[1:])"


@dataclasses.dataclass(frozen=True)
class Arguments:
    algorithms: tuple[str, ...] = ("sac_n", "edac")  # files that have num_critics
    critics: tuple[int, ...] = (10, 50, 200, 500)  # one row each
    largest: tuple[int, ...] = (500, 50)  # most critics per file, in their order
    products: int = 100  # critics times updates of a chunk, but at least one update
    repeats: int = 3  # chunks of each; the best counts
    output: str | None = None  # files to write: this with .json and .md


def chunk_of(name, critics, updates):
    """(compiled chunk, its first arguments, GFLOP of an update), after one call."""
    module = importlib.import_module(f"algorithms.{name}")
    sizes = dict.fromkeys(("num_updates", "log_every", "eval_every"), updates)
    cfg = module.Config(num_critics=critics, batch_size=256, **sizes)
    chunk, (state, *rest) = throughput.last_chunk(module, cfg)
    state, _ = jax.block_until_ready(chunk(state, *rest))
    products = throughput.Loop(throughput.matmuls(jax.make_jaxpr(chunk)(state, *rest).jaxpr))
    return chunk, state, rest, products.flops / 1e9 / updates


def cpu_seconds(function, *arguments):
    """(result, seconds of CPU time until it was ready)"""
    start = time.process_time()
    result = jax.block_until_ready(function(*arguments))
    return result, time.process_time() - start


def measure(names, critics, updates, repeats):
    """[one row per file], in this process."""
    chunks = [chunk_of(name, critics, updates) for name in names]
    chain, start = throughput.chain(256, 256)
    cpu_seconds(chain, start)
    times = {name: [] for name in names}
    chain_times = []
    for _ in range(repeats):
        for i, name in enumerate(names):
            chunk, state, rest, gflop = chunks[i]
            (state, _), spent = cpu_seconds(chunk, state, *rest)
            chunks[i] = chunk, state, rest, gflop
            times[name].append(spent)
        chain_times.append(cpu_seconds(chain, start)[1])
    rate = 2 * throughput.CHAIN * 256**3 / 1e9 / min(chain_times)  # GFLOP/s
    rows = []
    for name, (*_, gflop) in zip(names, chunks, strict=True):
        speed = updates / min(times[name])
        rows.append(
            {
                "algorithm": name,
                "critics": critics,
                "updates/CPU s": float(f"{speed:.3g}"),
                "GFLOP/update": round(gflop, 2),
                "share of floor": round(speed * gflop / rate, 2),
            }
        )
    return rows


def child(names, critics, updates, repeats):
    """`measure`, and the most memory of this process, printed as JSON."""
    jax.config.update("jax_enable_compilation_cache", False)
    rows = measure(names.split(","), int(critics), int(updates), int(repeats))
    lines = dict(x.split(":") for x in Path("/proc/self/status").read_text().splitlines())
    memory = round(int(lines["VmHWM"].split()[0]) / 1024**2, 2)
    print("\0" + json.dumps([rows, memory]))


def in_a_process(names, critics, updates, repeats):
    """Rows and memory in GB of a process of its own."""
    words = [",".join(names), str(critics), str(updates), str(repeats)]
    flags = f"{os.environ.get('XLA_FLAGS', '')} {ONE_THREAD}"
    folders = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *words],
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": folders, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{critics} critics ended with {done.returncode}:\n{done.stdout}")
    return json.loads(done.stdout.rpartition("\0")[2])


def page(record):
    """The page of a record."""
    lines = ["# The cost of many critics", "", *__doc__.strip().splitlines()[4:], ""]
    lines += [f"- {name}: {value}" for name, value in record.items() if name != "rows"]
    rows = record["rows"]
    lines += ["", f"| {' | '.join(rows[0])} |", "|" + " --- |" * len(rows[0])]
    lines += [f"| {' | '.join(map(str, row.values()))} |" for row in rows]
    return "\n".join(lines) + "\n"


def main(arguments):
    if len(arguments.largest) != len(arguments.algorithms):
        fail(f"--largest {arguments.largest}: one number for each of {arguments.algorithms}")
    for flag in ("critics", "largest", "products", "repeats"):
        if np.min(getattr(arguments, flag) or 0) < 1:
            fail(f"--{flag} {getattr(arguments, flag)}: must be at least 1")
    rows, loads = [], []
    for critics in arguments.critics:
        pairs = zip(arguments.algorithms, arguments.largest, strict=True)
        names = [name for name, largest in pairs if critics <= largest]
        updates = max(1, arguments.products // critics)
        found, _ = in_a_process(names, critics, updates, arguments.repeats)
        for row in found:
            memory = in_a_process([row["algorithm"]], critics, updates, 1)[1]
            ratio = found[0]["updates/CPU s"] / row["updates/CPU s"]
            rows.append(row | {"memory, GB": memory, "ratio": round(ratio, 2)})
            print(json.dumps(rows[-1]), flush=True)
        loads.append(os.getloadavg()[0])
    record = {
        "command": shlex.join(["python", "benchmarks/ensembles.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "hardware": f"one thread of {machine.processor()}",
        "load": f"{min(loads):.0f} to {max(loads):.0f} processes wanted a core at the same time",
        "versions": ", ".join(f"{name} {x}" for name, x in provenance.versions()),
        "networks": "3 x 256, batches of 256, the files' defaults",
        "rows": rows,
    }
    print(page(record))
    if arguments.output:
        output = Path(arguments.output)
        output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        output.with_suffix(".md").write_text(page(record))


if __name__ == "__main__":
    command_line.outlive_the_reader()
    main(tyro.cli(Arguments, description=__doc__.splitlines()[0]))

# SPDX-License-Identifier: Apache-2.0
"""What a run imports before its first update, and the record of benchmarks/startup.py."""

import json
import subprocess
import sys
from pathlib import Path

import helpers_runs as runs
import pytest

from benchmarks import startup

ROOT = Path(__file__).resolve().parents[2]
# What only some runs need, each a good part of a second or more of a start.
LATER = ("wandb", "matplotlib", "minari", "ogbench", "pandas", "torch", "imageio", "mujoco")
LATER += ("gymnasium", "h5py", "orbax")


def imported(code):
    """Names of the packages that a process has imported after this code."""
    code += "\nimport sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_an_algorithm_file_imports_nothing_that_it_may_not_need():
    """Data, envs, logs and checkpoints bring their own packages when a run gets to them."""
    there = imported("from algorithms import rebrac")
    assert {"jax", "flax", "optax"} <= {*there} and not {*LATER} & {*there}


def test_the_parts_add_up(tmp_path, monkeypatch):
    parts = {"imports": [1.0, 9.0], "data": [0.5, 9.0], "first chunk": [2.0, 9.0]}
    totals = iter([{"CPU s": 9.0, "seconds": 99.0}, {"CPU s": 4.0, "seconds": 44.0}] * 2)
    monkeypatch.setattr(startup, "start", lambda flags, folder: (next(totals), parts))
    monkeypatch.setattr(startup.data_table, "million", lambda: {"rewards": [0.0]})
    file = tmp_path / "small.hdf5"
    file.touch()
    startup.main(startup.Arguments(file, tmp_path / "record"))
    record = json.loads((tmp_path / "record.json").read_text())
    row, large = record["rows"]
    assert row["data"] == "small" and large["data"] == "1,000,000 random rows"
    assert (row["cold, CPU s"], row["warm, CPU s"], row["warm, seconds"]) == (9.0, 4.0, 44.0)
    assert row["rest, CPU s"] == pytest.approx(4.0 - 3.5)


@runs.SLOW
def test_a_start_is_taken_apart(atoll_data, tmp_path):
    flags = ["--dataset", str(atoll_data / "hopper-medium-v4.hdf5")]
    total, parts = startup.start(flags, tmp_path)
    assert {*parts} == {*startup.PARTS} - {"rest"}
    spent = sum(cpu for cpu, _ in parts.values())
    assert all(cpu > 0 for cpu, _ in parts.values()) and 0.5 * total["CPU s"] < spent
    assert spent < total["CPU s"] < 1.1 * total["seconds"] * (startup.os.cpu_count() or 1)

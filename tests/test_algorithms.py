# SPDX-License-Identifier: Apache-2.0
"""What holds for every algorithm file: invariance, golden values, a run of the file alone."""

import dataclasses
import functools
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import golden
import h5py
import helpers_runs as runs
import jax
import numpy as np
import probes
import pytest

from common import experiment

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(path.stem for path in (ROOT / "algorithms").glob("*.py"))
TINY = {"hidden": (16,), "batch_size": 8}


def test_every_algorithm_is_known_to_the_tests():
    assert {*NAMES} <= {*probes.SMALL}, "add its small settings to SMALL in tests/probes.py"


# --- Invariance ---------------------------------------------------------------------------------
def run(module, seeds, lengths):
    """Arrays of states and metrics, [S] each, after chunks of these lengths."""
    init_keys, train_keys = experiment.streams(seeds, 2)
    rows, cfg = probes.rows_for(module.__name__.split(".")[-1]), probes.config(module, **TINY)
    data = jax.device_put(probes.prepared(module, rows, cfg))
    facts = {"num_actions": probes.NUMBER} if data.action.ndim == 1 else {}
    create = functools.partial(module.create_state, batch=rows, cfg=cfg, **facts)
    state, chunks, start = jax.jit(jax.vmap(create))(init_keys), {}, 0
    for length in lengths:
        if length not in chunks:
            chunk_cfg = dataclasses.replace(cfg, log_every=length)
            chunk = functools.partial(module.train_chunk, cfg=chunk_cfg)
            chunks[length] = experiment.over_seeds(chunk)
        state, metrics = chunks[length](state, train_keys, start, data)
        start += length
    return probes.leaves(state), {name: np.array(value) for name, value in metrics.items()}


@pytest.fixture(scope="module", params=NAMES)
def module(request):
    return importlib.import_module(f"algorithms.{request.param}")


@pytest.fixture(scope="module")
def alone(module):
    """Seed 7 alone, four chunks of 10."""
    return run(module, (7,), [10] * 4)


def test_four_chunks_of_10_equal_one_of_40(module, alone):
    once, _ = run(module, (7,), [40])
    assert all(map(np.array_equal, alone[0], once))


def test_a_seed_among_4_equals_that_seed_alone(module, alone):
    arrays, metrics = run(module, (3, 0, 7, 1), [10] * 4)
    for one, four in zip(alone[0], arrays, strict=True):
        assert np.array_equal(one[0], four[2])
    for name, values in alone[1].items():
        assert values[0] == metrics[name][2]
    floats = [x for x in arrays if x.dtype.kind == "f" and x[0].size > 1 and x.max() > x.min()]
    assert floats and all((x[0] != x[1]).any() for x in floats)  # the seeds do differ


def test_seeds_as_lanes_of_a_vmap_equal_one_after_the_other(module, alone, monkeypatch):
    """What an accelerator does."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    arrays, _ = run(module, (3, 7), [10] * 4)
    for one, two in zip(alone[0], arrays, strict=True):
        np.testing.assert_allclose(one[0], two[1], rtol=1e-3, atol=1e-5)


# --- Runs ---------------------------------------------------------------------------------------
class Stop(Exception):
    pass


@pytest.mark.parametrize(
    ("name", "discrete"), [*((name, name in runs.DISCRETE) for name in NAMES), ("bc", True)]
)
def test_a_resumed_run_equals_an_undisturbed_one(name, discrete, tmp_path, monkeypatch):
    """The rest of what runs do is tested on one file, see test_experiment.py."""
    monkeypatch.chdir(tmp_path)
    write = runs.write_cartpole if discrete else runs.write_hdf5
    argv = ["--dataset", write("data.hdf5"), *runs.TINY, *runs.ALSO_TINY.get(name, [])]
    argv += ["--seeds", "0", "1"]
    runs.start(name, [*argv, "--name", "whole"])
    original = experiment.Run.log

    def log(run, step, *args):
        if step == 12:
            raise Stop
        original(run, step, *args)

    monkeypatch.setattr(experiment.Run, "log", log)
    with pytest.raises(Stop):
        runs.start(name, [*argv, "--name", "broken"])
    monkeypatch.setattr(experiment.Run, "log", original)
    runs.start(name, [*argv, "--name", "broken", "--resume"])
    whole, broken = (tmp_path / "runs" / name / "data" / x for x in ("whole", "broken"))
    rows = (whole / "metrics.csv").read_text()
    assert rows == (broken / "metrics.csv").read_text()
    assert [row.split(",")[0] for row in rows.splitlines()[1::2]] == [*map(str, range(0, 25, 4))]
    cfg, dataset, state = experiment.load(importlib.import_module(f"algorithms.{name}"), whole)
    _, _, again = experiment.load(importlib.import_module(f"algorithms.{name}"), broken)
    assert cfg.seeds == (0, 1) and dataset.horizon == 10
    assert all(map(np.array_equal, probes.leaves(state), probes.leaves(again)))


# --- Golden values ------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_golden_values(name):
    recorded = json.loads(golden.FILE.read_text())
    assert name in recorded, "python tests/golden.py records a new algorithm"
    was, now = recorded[name]["versions"], golden.versions()
    if was["jax"] != now["jax"]:
        pytest.skip(f"recorded with jax {was['jax']}, this is {now['jax']}")
    found = golden.measure(name)
    for updates, tolerance in golden.AFTER.items():
        old, new = recorded[name]["after"][str(updates)], found[str(updates)]
        assert {*old} == {*new}
        for key in old:
            assert new[key] == pytest.approx(old[key], rel=tolerance), (
                f"{key} after {updates} updates changed (recorded with {was}, this is {now}). If "
                f"meant: python tests/golden.py {name}, and a line in CHANGELOG.md"
            )


# --- The file alone -----------------------------------------------------------------------------
def write_hdf5(path, transitions):
    """A file in D4RL's layout, without next observations and without an env."""
    with h5py.File(path, "w") as file:
        file["observations"], file["actions"] = transitions.observation, transitions.action
        file["rewards"] = transitions.reward
        file["terminals"] = transitions.termination.astype(bool)
        file["timeouts"] = transitions.truncation.astype(bool)


@pytest.mark.parametrize("name", NAMES)
def test_smoke_the_file_and_common_are_enough(tmp_path, compilation_cache, name):
    shutil.copy(ROOT / "algorithms" / f"{name}.py", tmp_path)
    shutil.copytree(ROOT / "common", tmp_path / "common", ignore=lambda *_: ["__pycache__"])
    write_hdf5(tmp_path / "tiny.hdf5", probes.rows_for(name, 64))
    command = f"{name}.py --dataset tiny.hdf5 --num-updates 4 --log-every 2 --eval-every 2"
    command += " --batch-size 8 --hidden 16 16 --wandb disabled --runs-dir made --name smoke "
    command += " ".join(runs.ALSO_TINY.get(name, []))
    with (tmp_path / "common" / "__init__.py").open("a") as file:
        file.write('\nprint("this is the copy")\n')
    paths = {"JAX_COMPILATION_CACHE_DIR": str(compilation_cache), "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, *command.split()],
        cwd=tmp_path,
        env=os.environ | paths,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "this is the copy" in done.stdout  # not the installed one
    folder = tmp_path / "made" / name / "tiny" / "smoke"
    result = json.loads((folder / "result.json").read_text())
    assert result["algorithm"] == name and result["num_updates"] == 4
    assert result["score"] == {"0": None}  # nothing to evaluate in
    rows = (folder / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["update", "0", "2", "4"]
    assert all(np.isfinite(float(cell)) for cell in rows[-1].split(",") if cell)

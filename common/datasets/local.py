# SPDX-License-Identifier: Apache-2.0
"""Read data sets whose ids begin with `local/`; make them first where they are not there."""

import os
import subprocess
import sys
from pathlib import Path

from common import fail, folders, one_line, recipes
from common.datasets import minari, names, ogbench
from common.datasets.source import Source


def read(dataset_id: str, env: str | None, env_steps: int | None) -> Source:
    if dataset_id.startswith("local/ogbench/"):
        return _read_ogbench(dataset_id, env, env_steps)
    if dataset_id in recipes.mujoco.IDS:
        if not minari.is_there(dataset_id):
            recipes.mujoco.fail_missing(dataset_id)
        return minari.read(dataset_id, env, env_steps)
    if dataset_id not in recipes.IDS:
        names.fail_unknown(dataset_id)
    if minari.is_missing(dataset_id):
        try:
            recipes.make(dataset_id)
        except OSError as error:
            fail(f"{dataset_id}: cannot be made here ({one_line(error)})")
    return minari.read(dataset_id, env, env_steps)


def _read_ogbench(dataset_id, env, env_steps):
    """`local/ogbench/cube-single-play-v0` is the default task, `...-singletask-task3-v0` task 3."""
    name = dataset_id.removeprefix("local/ogbench/")
    match = names.OGBENCH_ID.fullmatch(name)
    data = f"{match[1]}-v0" if match else name
    if data not in recipes.OGBENCH_RECIPES:
        names.fail_unknown(dataset_id)
    if not (folders.ogbench("local") / f"{data}.npz").exists():
        _make_ogbench(dataset_id, data)
    task = name if match else f"{name.removesuffix('-v0')}-singletask-v0"
    return ogbench.read(task, folders.ogbench("local"), env, env_steps)


def _make_ogbench(dataset_id, data):
    """Make it in a process of its own: its workers then import no JAX, as this one's would."""
    command = [sys.executable, "-m", "common.recipes", f"local/ogbench/{data}"]
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    code = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}).returncode
    if code == 2:  # it said why
        raise SystemExit(2)
    if code:
        fail(f"{dataset_id}: making it ended with code {code}; the same command continues it")

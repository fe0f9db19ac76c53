# SPDX-License-Identifier: Apache-2.0
"""Checkpoints whose bits flipped are never taken for whole ones."""

import random
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from common.experiment import checkpoints

STATE = {"weight": jnp.arange(2000.0).reshape(2, 1000), "count": jnp.array([3, 4])}
META = {"update": 8, "metrics": {"loss": [0.1, float("nan")]}, "diverged": {1: 4}, "best": [1e-9]}


@pytest.fixture
def saved(tmp_path):
    """Checkpoints 4 and 8 of the same State."""
    with checkpoints.manager(tmp_path) as manager:
        for step in (4, 8):
            checkpoints.save(manager, step, STATE, META | {"update": step})
    return tmp_path


def restored(folder):
    with checkpoints.manager(folder) as manager:
        return checkpoints.restore(manager, STATE)


def same(state):
    return all(np.array_equal(state[name], STATE[name]) for name in STATE)


def test_what_is_saved_comes_back(saved):
    state, meta = restored(saved)
    assert same(state) and meta["update"] == 8 and meta["best"] == [1e-9]
    assert np.isnan(meta["metrics"]["loss"][1]) and meta["diverged"] == {"1": 4}
    assert "digest" not in meta


def test_a_flipped_bit_is_noticed_or_changes_nothing(saved, tmp_path_factory, capsys):
    draw, noticed = random.Random(0), 0
    files = [
        x for x in (saved / "checkpoints" / "8").rglob("*") if x.is_file() and x.stat().st_size
    ]
    data = [x for x in files if x.parent.name == "d" or "metadata" in x.name]
    assert data
    for trial in range(24):
        folder = tmp_path_factory.mktemp("flipped") / "run"
        shutil.copytree(saved, folder)
        file = folder / draw.choice(data if trial % 2 else files).relative_to(saved)
        body = bytearray(file.read_bytes())
        body[draw.randrange(len(body))] ^= 1 << draw.randrange(8)
        file.write_bytes(body)
        state, meta = restored(folder)
        said = capsys.readouterr().err
        assert same(state) and meta["best"] == [1e-9], file
        assert meta["update"] == (4 if "checkpoint 8 cannot be read" in said else 8), file
        noticed += meta["update"] == 4
    assert noticed > 5


def test_a_digest_that_is_missing_is_damage(saved, capsys):
    with checkpoints.manager(saved) as manager:
        import orbax.checkpoint as ocp

        items = {"state": ocp.args.StandardSave(STATE), "meta": ocp.args.JsonSave(META)}
        manager.save(12, args=ocp.args.Composite(**items))
    assert restored(saved)[1]["update"] == 8
    assert "checkpoint 12 cannot be read (its digest does not match)" in capsys.readouterr().err

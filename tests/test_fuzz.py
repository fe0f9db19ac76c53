# SPDX-License-Identifier: Apache-2.0
"""Whatever a user or a broken disk hands over: it works, or one line and exit code 2.

ATOLL_SLOW=1 tries many more cases.
"""

import dataclasses
import os
import string
import typing
from pathlib import Path

import h5py
import helpers_runs as runs
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_algorithms import NAMES

from common import config, datasets

MANY = "ATOLL_SLOW" in os.environ
CALM = {"deadline": None, "suppress_health_check": [*HealthCheck], "derandomize": not MANY}


def tries(number):
    return settings(max_examples=number * (20 if MANY else 1), **CALM)


def ends_well(capsys, call):
    """Whether the call came back; otherwise it ended with one line and exit code 2."""
    capsys.readouterr()
    try:
        call()
        return True
    except SystemExit as leave:
        lines = capsys.readouterr().err.splitlines()
        assert leave.code in (0, 2), lines
        if leave.code == 2:
            errors = [line for line in lines if line.startswith("error: ")]
            assert len(errors) == 1 and len(errors[0]) < 2000, lines
            assert not any("Traceback" in line for line in lines)
        return False


# --- Configs and command lines ------------------------------------------------------------------
CONFIG = runs.module("rebrac").Config
FIELDS = sorted(vars(CONFIG()))
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["local/pointmaze/umaze-v0", "hopper-medium-v2", "", "1e-3", "-1", "nan", "x"]),
)
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=3))
MAPPINGS = st.dictionaries(
    st.one_of(st.sampled_from([*FIELDS, "datasets", "env", "record"]), st.text(max_size=6)),
    st.one_of(VALUES, st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=2)),
    max_size=4,
)


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@tries(60)
@given(values=MAPPINGS)
def test_any_mapping_as_config(empty, capsys, values):
    (empty / "own.yaml").write_text(yaml.safe_dump(values))
    ends_well(capsys, lambda: config.parse(CONFIG, ["--config", "own.yaml"]))
    assert {path.name for path in empty.iterdir()} == {"own.yaml"}


@tries(60)
@given(text=st.one_of(st.text(max_size=60), st.binary(max_size=60)))
def test_any_text_as_config(empty, capsys, text):
    (empty / "own.yaml").write_bytes(
        text if isinstance(text, bytes) else text.encode("utf-8", "ignore")
    )
    ends_well(capsys, lambda: config.parse(CONFIG, ["--config", "own.yaml"]))


WORDS = st.one_of(
    st.sampled_from([f"--{name.replace('_', '-')}" for name in FIELDS]),
    st.sampled_from(["--resume", "--name", "--runs-dir", "--wandb", "--data", "--devices", "--"]),
    st.sampled_from(["0", "1", "-1", "1e-3", "nan", "inf", "true", "None", "../..", "/", ".", ""]),
    st.text(alphabet=string.printable, max_size=6),
)


@tries(80)
@given(words=st.lists(WORDS, max_size=5))
def test_any_command_line(empty, capsys, words):
    words = [word for word in words if "\0" not in word and word not in ("-h", "--help")]
    ends_well(capsys, lambda: config.parse(CONFIG, words))
    assert not [*empty.iterdir()]  # nothing half-written


@pytest.mark.parametrize(
    "name", ["../out", "a/b", "/tmp/out", "..", ".", "", "a b", "-", "~", "a\nb"]
)
def test_no_name_leads_out_of_the_runs_folder(empty, capsys, name):
    assert not ends_well(capsys, lambda: config.parse(CONFIG, [f"--name={name}"]))


def test_yaml_tags_are_not_executed(empty, capsys):
    (empty / "own.yaml").write_text("discount: !!python/object/apply:os.mkdir ['made']\n")
    assert not ends_well(capsys, lambda: config.parse(CONFIG, ["--config", "own.yaml"]))
    assert not (empty / "made").exists()


# --- Data files ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    path = tmp_path_factory.mktemp("valid") / "data.hdf5"
    runs.write_hdf5(path)
    return path.read_bytes()


@tries(60)
@given(data=st.data())
def test_damaged_bytes(empty, capsys, valid, data):
    raw = bytearray(valid)
    for _ in range(data.draw(st.integers(0, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
    (empty / "data.hdf5").write_bytes(raw)
    if ends_well(capsys, lambda: datasets.load("data.hdf5")):
        rows = datasets.load("data.hdf5").transitions
        assert all(np.isfinite(x).all() and len(x) == len(rows.reward) for x in rows)


DTYPES = ["f2", "f4", "f8", "i1", "i8", "u1", "?", "S3", "c8"]
SHAPES = st.sampled_from([(60,), (60, 1), (60, 3), (60, 3, 2), (59, 3), (0, 3), (1, 3), ()])


@tries(60)
@given(
    name=st.sampled_from(["observations", "actions", "rewards", "terminals", "timeouts"]),
    shape=SHAPES,
    dtype=st.sampled_from(DTYPES),
    fill=st.sampled_from([0, 1, -1, 3, np.nan, np.inf]),
)
def test_any_column(empty, capsys, name, shape, dtype, fill):
    with np.errstate(all="ignore"):
        column = np.full(shape, fill if np.dtype(dtype).kind in "fc" else 1).astype(dtype)
    runs.write_hdf5("data.hdf5", **{name: column})
    if ends_well(capsys, lambda: datasets.load("data.hdf5")):
        loaded = datasets.load("data.hdf5")
        rows = loaded.transitions
        assert all(np.isfinite(x).all() and len(x) == len(rows.reward) for x in rows)
        assert rows.reward.ndim == 1 and loaded.episode_ends[-1] == len(rows.reward)


@tries(40)
@given(ends=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=20, max_size=20))
def test_any_episodes(empty, capsys, ends):
    terminals, timeouts = np.array(ends).T
    runs.write_hdf5("data.hdf5", 20, terminals=terminals, timeouts=timeouts)
    if ends_well(capsys, lambda: datasets.load("data.hdf5")):
        loaded = datasets.load("data.hdf5")
        rows = loaded.transitions
        last = np.zeros(len(rows.reward), bool)
        last[loaded.episode_ends - 1] = True
        assert (last | (rows.termination == 0)).all() and rows.termination.max() <= 1
        inside = np.flatnonzero(~last)
        assert np.array_equal(rows.next_observation[inside], rows.observation[inside + 1])


VALUES_OF_ATTRIBUTES = [b"\xff", np.zeros(3), np.nan, np.inf, "Nowhere-v0", -1, "", "Pendulum-v1"]
GOOD = {"env_id": ("Pendulum-v1",), "ref_min_score": (-1,), "ref_max_score": (-1,)}


@pytest.mark.parametrize("value", VALUES_OF_ATTRIBUTES, ids=repr)
@pytest.mark.parametrize("name", ["env_id", "max_episode_steps", "ref_min_score", "ref_max_score"])
def test_attributes_of_any_kind(empty, capsys, name, value):
    facts = {"env_id": "Pendulum-v1", "ref_min_score": -2.0, "ref_max_score": 0.0}
    runs.write_hdf5("data.hdf5", attributes=facts | {name: value})
    good = isinstance(value, str | int) and value in GOOD.get(name, ())
    assert ends_well(capsys, lambda: datasets.load("data.hdf5")) == good


def test_nothing_is_unpickled(empty, capsys):
    import pickle

    class Evil:
        def __reduce__(self):
            return os.mkdir, ("made",)

    (empty / "data.hdf5").write_bytes(pickle.dumps(Evil()))
    assert not ends_well(capsys, lambda: datasets.load("data.hdf5"))
    with h5py.File("data.hdf5", "w") as file:
        file["observations"] = np.void(pickle.dumps(Evil()))
    assert not ends_well(capsys, lambda: datasets.load("data.hdf5"))
    assert not (empty / "made").exists()


# --- Configurations -----------------------------------------------------------------------------
KEPT = ("dataset", "seeds", "num_updates", "log_every", "eval_every", "eval_episodes")
SIZES = ("hidden", "vae_hidden", "critic_hidden", "value_hidden", "actor_hidden")


def drawn(name, rng):
    """Flags of a random small configuration of an algorithm."""
    config_class, flags = runs.module(name).Config, []
    small = dict(zip(*[iter(runs.tiny(name))] * 2, strict=True))
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        flag, hint = f"--{field.name.replace('_', '-')}", hints[field.name]
        choices = [x for x in typing.get_args(hint) if x is not type(None)]
        if field.name in KEPT or rng.random() < 0.4:
            continue
        if typing.get_origin(hint) is typing.Literal:
            flags += [flag, str(rng.choice(choices))]
        elif hint is bool:
            flags.append(flag if rng.random() < 0.5 else flag.replace("--", "--no-"))
        elif field.name in SIZES:
            flags += [flag, *map(str, rng.choice([4, 8], rng.integers(1, 4)))]
        elif hint is int or choices == [int]:
            flags += [flag, str(rng.integers(1, 1 + int(small.get(flag, 4))))]
        elif (hint is float or choices == [float]) and field.default is not None:
            flags += [flag, str(field.default * rng.choice([0.5, 1.0, 1.5]))]
    return flags


@runs.SLOW
@pytest.mark.parametrize("draw", range(6))
@pytest.mark.parametrize("name", [name for name in NAMES if name not in runs.DISCRETE])
def test_configurations_drawn_at_random(empty, capsys, name, draw):
    rng = np.random.default_rng([NAMES.index(name), draw])
    argv = ["--dataset", runs.write_hdf5("data.hdf5"), *runs.tiny(name), *drawn(name, rng)]
    argv += ["--num-updates", "4", "--log-every", "4", "--eval-every", "4"]
    print(" ".join(argv))  # pytest shows it where the test fails
    if ends_well(capsys, lambda: runs.start(name, argv)):
        rows = runs.read_csv(runs.only_run("runs") / "metrics.csv")
        assert all(np.isfinite(float(cell)) for row in rows for cell in row.values() if cell)
    else:
        assert not [*Path("runs").rglob("result.json")]

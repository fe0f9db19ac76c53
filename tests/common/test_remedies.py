# SPDX-License-Identifier: Apache-2.0
"""Messages with a remedy: the remedy is applied as the message words it, and the message is gone.

Each row of the table makes a situation in an empty folder, sees the message, applies the remedy and
loads again. A last test reads every message of common/datasets and common/envs off the code, so
that none with a remedy is without a row.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces, wrappers
from test_datasets import error_of
from test_spaces import STEPS, Toy, box, record, write

from common import datasets, evaluation, recipes
from common.datasets import names

ROOT = Path(__file__).resolve().parents[2]
ID = "lab/toy-v0"


# --- Envs of a user -----------------------------------------------------------------------------
class Unbounded(Toy):
    """Its actions have no bounds."""

    def __init__(self, observation="box", low=-np.inf, high=np.inf, render_mode=None):
        super().__init__(observation)
        self.action_space = box(2, low=low, high=high)


def bounded(render_mode=None):
    """What the message on actions without bounds advises."""
    whole = box(2, low=-9, high=9)
    return wrappers.TransformAction(Unbounded(), lambda action: action, whole)


def clipped(render_mode=None):
    return wrappers.ClipAction(Unbounded(low=-1, high=1))


def flattened(render_mode=None):
    return wrappers.FlattenObservation(Toy("dict"))


class OneChoice(gymnasium.ActionWrapper):
    """The choices of an env numbered as one Discrete, as the message on them advises."""

    def __init__(self, env):
        super().__init__(env)
        self.inner = env.action_space
        shape = self.inner.nvec if hasattr(self.inner, "nvec") else [2] * self.inner.n
        self.shape = tuple(int(x) for x in shape)
        self.action_space = spaces.Discrete(int(np.prod(self.shape)))

    def action(self, index):
        return np.array(np.unravel_index(int(index), self.shape), self.inner.dtype)


class Flat(gymnasium.ActionWrapper):
    """Actions of any other kind as one Box of floats."""

    def __init__(self, env):
        super().__init__(env)
        self.action_space = box(spaces.flatdim(env.action_space))

    def action(self, action):
        inner = self.env.action_space
        if isinstance(inner, spaces.Box):
            return np.rint(action).astype(inner.dtype).reshape(inner.shape)
        return spaces.unflatten(inner, action)


class Words(gymnasium.ObservationWrapper):
    """A text as numbers."""

    def __init__(self, env):
        super().__init__(env)
        self.observation_space = spaces.Dict({"state": box(2), "mission": box(8, high=999)})

    def observation(self, observation):
        codes = [ord(letter) for letter in observation["mission"]]
        mission = np.resize(np.float32(codes or [0]), 8)
        return observation | {"mission": mission}


def wrapped(wrapper, options):
    return lambda render_mode=None: wrapper(Toy(**options))


ENTRIES = {
    "Unbounded-v0": Unbounded,
    "Bounded-v0": bounded,
    "Clipped-v0": clipped,
    "Narrow-v0": lambda render_mode=None: Unbounded(low=-1, high=1),
    "Flattened-v0": flattened,
    "InDict-v0": lambda render_mode=None: Toy("dict"),
    "Plain-v0": Toy,
    "Car-v0": lambda render_mode=None: gymnasium.make("MountainCarContinuous-v0").unwrapped,
    "Multi-v0": lambda render_mode=None: Toy(action="multi-discrete"),
    "OneChoice-v0": wrapped(OneChoice, {"action": "multi-discrete"}),
    "Binary-v0": lambda render_mode=None: Toy(action="multi-binary"),
    "OneOfBinary-v0": wrapped(OneChoice, {"action": "multi-binary"}),
    "Whole-v0": lambda render_mode=None: Toy(action="box of integers"),
    "Rounded-v0": wrapped(Flat, {"action": "box of integers"}),
    "Parts-v0": lambda render_mode=None: Toy(action="dict"),
    "FlatParts-v0": wrapped(Flat, {"action": "dict"}),
    "Words-v0": wrapped(Words, {"observation": "text in a dict"}),
    "Choice-v0": lambda render_mode=None: Toy(action="discrete"),
    "Below-v0": lambda render_mode=None: Toy(action="discrete from -2"),
    "Text-v0": lambda render_mode=None: Toy("text in a dict"),
    "Filtered-v0": lambda render_mode=None: wrappers.FlattenObservation(
        wrappers.FilterObservation(Toy("text in a dict"), ["state"])
    ),
}


class Stubborn(Toy):
    """Cannot be reset without options."""

    def reset(self, *, seed=None, options=None):
        options["goal"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty folder with empty roots of data; the users' envs are registered."""
    pytest.importorskip("minari")
    monkeypatch.chdir(tmp_path)
    for variable in ("MINARI_DATASETS_PATH", "D4RL_DATASET_DIR", "OGBENCH_DATASET_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
        (tmp_path / variable).mkdir()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, entry in ENTRIES.items():
        gymnasium.register(name, entry, max_episode_steps=STEPS, disable_env_checker=True)
    gymnasium.register("Endless-v1", Toy, disable_env_checker=True)
    gymnasium.register("Stubborn-v0", Stubborn, max_episode_steps=5, disable_env_checker=True)
    yield SimpleNamespace(folder=tmp_path, minari=tmp_path / "MINARI_DATASETS_PATH")
    for name in [*ENTRIES, "Endless-v1", "Stubborn-v0"]:
        del gymnasium.registry[name]


COUNT = 3 * STEPS
COLUMNS = {
    "observations": np.zeros((COUNT, 3)),
    "actions": np.linspace(-1, 1, 2 * COUNT).reshape(COUNT, 2),
}


def file(attributes=None, **columns):
    """Write own.hdf5, columns of None left out."""
    columns = {key: x for key, x in (COLUMNS | columns).items() if x is not None}
    write("own.hdf5", attributes, **columns)


def own(**columns):
    return lambda: file(**columns)


def with_facts(**attributes):
    return lambda: file(attributes)


def changed(column, row, value):
    array = {"rewards": np.ones(COUNT), **COLUMNS}[column].copy()
    array[row] = value
    return own(**{column: array})


def recorded(wrapper=None, **options):
    return lambda: record(ID, wrapper=wrapper, **options)


def again(wrapper=None, env=None, **options):
    """Delete the recording and record it once more; a wrapper of the user's own needs --env."""

    def remedy():
        shutil.rmtree(Path(os.environ["MINARI_DATASETS_PATH"], ID))
        record(ID, wrapper=wrapper, **options)
        return {} if env is None else {"env": env}

    return remedy


METADATA = Path("MINARI_DATASETS_PATH", ID, "data/metadata.json")


def metadata(change):
    """A recording whose metadata are changed."""

    def make():
        record(ID)
        content = json.loads(METADATA.read_text())
        change(content)
        METADATA.write_text(json.dumps(content))

    return make


def without_spaces(content):
    del content["observation_space"], content["action_space"]
    spec = json.loads(content["env_spec"]) | {"entry_point": "users_envs:Toy"}
    content["env_spec"] = json.dumps(spec)


def unknown_module(content):
    spec = json.loads(content["env_spec"]) | {"entry_point": "users_envs:Toy"}
    content["env_spec"] = json.dumps(spec)


def write_module():
    """The module that registers the env of `unknown_module`."""
    text = "from test_spaces import Toy as Toy\nimport gymnasium\n"
    text += "gymnasium.register('Users-v0', 'users_envs:Toy', max_episode_steps=5)\n"
    Path("users_envs.py").write_text(text)
    sys.path.insert(0, os.getcwd())
    return {"env": "users_envs:Users-v0"}


def cut_recording():
    record(ID)
    data = METADATA.parent / "main_data.hdf5"
    data.write_bytes(data.read_bytes()[:700])


def half_recording():
    record(ID)
    METADATA.unlink()
    (METADATA.parents[1] / "notes.txt").touch()


def moved_away():
    shutil.move(METADATA.parents[1], "away")
    record(ID)  # what starting again downloads


HELD = []


def held_open():
    """A file that a recorder has open for writing."""
    file()
    code = "import h5py, sys; f = h5py.File('own.hdf5', 'a'); print('open', flush=True); input()"
    words = [sys.executable, "-c", code]
    HELD.append(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
    HELD[-1].stdout.readline()


def closed_there():
    HELD.pop().communicate(b"\n")


def held_recording():
    record(ID)
    code = f"import h5py; f = h5py.File({str(METADATA.parent / 'main_data.hdf5')!r}, 'a')"
    words = [sys.executable, "-c", code + "; print('open', flush=True); input()"]
    HELD.append(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
    HELD[-1].stdout.readline()


def recording_elsewhere():
    record("lab/other-v0")
    shutil.move("MINARI_DATASETS_PATH/lab", "lab")


def npz():
    place = np.stack([17 + np.arange(6), np.full(6, 20)], axis=1).astype(np.float32)
    columns = dict.fromkeys(("observations", "actions", "qpos", "qvel"), place)
    columns["actions"] = columns["actions"] / 100
    np.savez("pointmaze-medium-navigate-v0.npz", **columns, terminals=np.arange(6) % 3 == 2)


def use_folder(variable):
    os.environ[variable] = os.getcwd()  # the fixture undoes it


OGBENCH_TASK = "pointmaze-medium-navigate-singletask-v0"
NARROW = {"observations": np.zeros((COUNT, 3)), "actions": np.full((COUNT, 2), 1.5)}


def by_env(name):
    return lambda: {"env": name}


# The situation, what is loaded, words of the message, its remedy. A remedy changes something or
# returns other arguments of `load`.
TABLE = {
    # Observations
    "text in the data": (
        recorded(observation="text in a dict"),
        {},
        "FilterObservation",
        again(lambda env: wrappers.FilterObservation(env, ["state"]), observation="text in a dict"),
    ),
    "text in the data as numbers": (
        recorded(observation="text in a dict"),
        {},
        "or as numbers (TransformObservation)",
        again(Words, env="Words-v0", observation="text in a dict"),
    ),
    "text in the env": (
        own(observations=np.zeros((COUNT, 2))),
        {"env": "Text-v0"},
        "(gymnasium.wrappers.FlattenObservation)",
        by_env("Filtered-v0"),
    ),
    "an env of dicts": (
        own(),
        {"env": "InDict-v0"},
        "name an env that flattens them",
        by_env("Flattened-v0"),
    ),
    "parts that the env lacks": (
        recorded(observation="dict"),
        {"env": "Plain-v0"},
        "name an env with those parts by --env",
        by_env("InDict-v0"),
    ),
    "observations of another kind": (
        recorded(observation="box"),
        {"env": "Kinds-v0"},
        "name an env with the same observations by --env",
        by_env("Plain-v0"),
    ),
    "actions of another env": (
        own(),
        {"env": "Pendulum-v1"},
        "2 action dimensions",
        by_env("Plain-v0"),
    ),
    "numbers of another env": (
        own(observations=np.zeros((COUNT, 2)), actions=np.zeros((COUNT, 1))),
        {"env": "Pendulum-v1"},
        "2 numbers per observation",
        by_env("Car-v0"),
    ),
    "an env that needs options": (
        own(),
        {"env": "Stubborn-v0"},
        "cannot be reset",
        by_env("Plain-v0"),
    ),
    "an env that is none": (own(), {"env": "Nowhere-v0"}, "cannot be made", by_env("Plain-v0")),
    "an env without a limit": (
        own(),
        {"env": "Endless-v1"},
        "set --env-steps",
        lambda: {"env": "Endless-v1", "env_steps": 5},
    ),
    "no steps": (own(), {"env_steps": 0}, "at least one step", lambda: {"env_steps": 1}),
    # Actions
    "several choices": (
        own(actions=np.zeros(COUNT, int)),
        {"env": "Multi-v0"},
        "number its 12 combinations as Discrete(12)",
        by_env("OneChoice-v0"),
    ),
    "several choices in the data": (
        recorded(action="multi-discrete"),
        {},
        "number its 12 combinations",
        again(OneChoice, env="OneChoice-v0", action="multi-discrete"),
    ),
    "switches": (
        own(actions=np.zeros(COUNT, int)),
        {"env": "Binary-v0"},
        "number its 8 combinations as Discrete(8)",
        by_env("OneOfBinary-v0"),
    ),
    "whole numbers": (
        own(actions=np.zeros((COUNT, 1))),
        {"env": "Whole-v0"},
        "make it a Box of floats that the env rounds",
        by_env("Rounded-v0"),
    ),
    "a dict of actions": (
        own(actions=np.zeros((COUNT, 4))),
        {"env": "Parts-v0"},
        "write its actions as one flat Box of floats",
        by_env("FlatParts-v0"),
    ),
    "actions without bounds": (
        own(),
        {"env": "Unbounded-v0"},
        "TransformAction with a bounded Box",
        by_env("Bounded-v0"),
    ),
    "attributes without bounds": (
        with_facts(action_low=-np.inf, action_high=1.0),
        {},
        "give finite attributes action_low and action_high, or neither",
        with_facts(action_low=-2.0, action_high=2.0),
    ),
    "attributes without bounds, neither": (
        with_facts(action_low=-np.inf, action_high=1.0),
        {},
        "or neither",
        own(),
    ),
    "attributes that are no bounds": (
        with_facts(action_low=1.0, action_high=-1.0),
        {},
        "each low below its high, or neither attribute",
        with_facts(action_low=[-1.0, -2.0], action_high=[1.0, 2.0]),
    ),
    "actions that the recording clipped": (
        own(**NARROW),
        {"env": "Narrow-v0"},
        "name an env with gymnasium.wrappers.ClipAction by --env",
        by_env("Clipped-v0"),
    ),
    "actions beyond 1, bounds in the file": (
        own(**NARROW),
        {},
        "attributes action_low and action_high",
        lambda: file({"action_low": -2.0, "action_high": 2.0}, **NARROW),
    ),
    "actions beyond 1, bounds of an env": (own(**NARROW), {}, "(--env,", by_env("Bounded-v0")),
    "other actions than recorded": (
        recorded(action="discrete"),
        {"env": "Plain-v0"},
        "name an env with the same actions by --env",
        by_env("Choice-v0"),
    ),
    "integers of two axes": (
        own(actions=np.ones((COUNT, 2), int)),
        {},
        "store continuous actions as floats",
        own(actions=np.ones((COUNT, 2))),
    ),
    "integers that are no choices": (
        own(actions=np.full(COUNT, 2**40)),
        {},
        "number the actions from 0 on, or store continuous ones as floats",
        own(actions=np.zeros(COUNT, int)),
    ),
    "integers below 0": (
        own(actions=np.full(COUNT, -2)),
        {},
        "number the actions from 0 on",
        own(actions=np.zeros(COUNT, int)),
    ),
    "integers below 0, of an env": (
        own(actions=np.full(COUNT, -2)),
        {},
        "name the env by --env, whose action space tells the first one",
        by_env("Below-v0"),
    ),
    "floats for a discrete env": (
        own(actions=np.zeros(COUNT)),
        {"env": "Choice-v0"},
        "store them as integers",
        own(actions=np.zeros(COUNT, int)),
    ),
    # Numbers and attributes of a file
    "numbers too large": (
        changed("observations", 4, 1e30),
        {},
        "store them scaled down",
        changed("observations", 4, 1.0),
    ),
    "no next observation": (
        own(timeouts=np.ones(COUNT)),
        {},
        "store next_observations too",
        own(timeouts=np.ones(COUNT), next_observations=np.zeros((COUNT, 3))),
    ),
    "half a pair of scores": (
        with_facts(ref_min_score=1.0),
        {},
        "ref_min_score below ref_max_score, or neither",
        with_facts(ref_min_score=1.0, ref_max_score=2.0),
    ),
    "half a pair of scores, neither": (
        with_facts(ref_max_score=1.0),
        {},
        "or neither of them",
        own(),
    ),
    "a module as attribute": (
        with_facts(env_id="test_spaces:Toy-v0"),
        {},
        "by --env MODULE:NAME",
        by_env("test_spaces:Toy-v0"),
    ),
    "a limit that is none": (
        with_facts(max_episode_steps=0),
        {},
        "must be a finite number, 1 or more",
        with_facts(max_episode_steps=1),
    ),
    # Files
    "a misspelt file": (
        own(),
        {"dataset_id": "onw.hdf5"},
        "near it: own.hdf5",
        lambda: {"dataset_id": "own.hdf5"},
    ),
    "a directory": (
        own(),
        {"dataset_id": "."},
        "pass an HDF5 file",
        lambda: {"dataset_id": "own.hdf5"},
    ),
    "a directory called .hdf5": (
        lambda: (file(), os.mkdir("dir.hdf5")),
        {"dataset_id": "dir.hdf5"},
        "pass an HDF5 file",
        lambda: {"dataset_id": "own.hdf5"},
    ),
    "a file open in a writer": (held_open, {}, "close it there", closed_there),
    "a recording open in a writer": (
        held_recording,
        {"dataset_id": ID},
        "close it there",
        closed_there,
    ),
    "a folder of Minari": (
        recording_elsewhere,
        {"dataset_id": "lab/other-v0/"},
        "pass its id lab/other-v0 and MINARI_DATASETS_PATH=",
        lambda: use_folder("MINARI_DATASETS_PATH") or {"dataset_id": "lab/other-v0"},
    ),
    "a file of OGBench": (
        npz,
        {"dataset_id": "pointmaze-medium-navigate-v0.npz"},
        f"pass {OGBENCH_TASK} and OGBENCH_DATASET_DIR=",
        lambda: use_folder("OGBENCH_DATASET_DIR") or {"dataset_id": OGBENCH_TASK},
    ),
    # Minari
    "a damaged recording": (
        cut_recording,
        {"dataset_id": ID},
        "delete that folder",
        again(),
    ),
    "no recording in its folder": (
        half_recording,
        {"dataset_id": ID},
        "move it away and start again",
        moved_away,
    ),
    "an env of another package": (
        metadata(unknown_module),
        {},
        "--env NAME evaluates in one that you trust",
        by_env("Plain-v0"),
    ),
    "an env of another package, data without spaces": (
        metadata(without_spaces),
        {"env": "Plain-v0"},
        "by --env MODULE:NAME",
        write_module,
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", TABLE)
def test_the_remedy_of_a_message_works(place, capsys, monkeypatch, case):
    situation, options, words, remedy = TABLE[case]
    gymnasium.register("Kinds-v0", lambda render_mode=None: Toy("discrete from 1"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for variable in ("MINARI_DATASETS_PATH", "OGBENCH_DATASET_DIR"):
        monkeypatch.setenv(variable, os.environ[variable])
    try:
        gymnasium.spec("Kinds-v0").max_episode_steps = 5
        situation()
        in_minari = (place.minari / ID).exists() and "dataset_id" not in options
        options = {"dataset_id": ID if in_minari else "own.hdf5", "actions": "any"} | options
        text = error_of(capsys, datasets.load, **options)
        assert words in text, text
        options |= remedy() or {}
        assert len(datasets.load(**options).transitions.reward)
    finally:
        del gymnasium.registry["Kinds-v0"]
        gymnasium.registry.pop("Users-v0", None)
        sys.modules.pop("users_envs", None)
        while HELD:
            closed_there()


def test_an_evaluation_without_an_env(place, capsys):
    cfg = SimpleNamespace(eval_episodes=1, eval_every=1, num_updates=1)
    key = jax.vmap(jax.random.key)(jnp.zeros(1, jnp.uint32))
    act = lambda params, observation, key: jnp.zeros((len(observation), 2))  # noqa: E731
    file()
    for env, said in ((None, True), ("Plain-v0", False)):
        with evaluation.Rollouts(datasets.load("own.hdf5", env=env), act, key, cfg) as rollouts:
            assert (rollouts.start({}, 0) is None) == said  # envs are made at the first evaluation
        assert ("(set --env)" in capsys.readouterr().out) == said


# --- Files of servers ---------------------------------------------------------------------------
def test_a_damaged_file_of_ogbench_is_to_be_deleted(place, capsys):
    pytest.importorskip("ogbench")
    use = Path(os.environ["OGBENCH_DATASET_DIR"]) / "pointmaze-medium-navigate-v0.npz"
    npz()
    use.write_bytes(Path(use.name).read_bytes()[:-300])
    text = error_of(capsys, datasets.load, OGBENCH_TASK)
    assert f"{use} is damaged" in text and "delete it and start again" in text
    use.unlink()  # what starting again downloads
    shutil.copy(use.name, use)
    assert len(datasets.load(OGBENCH_TASK).transitions.reward)


def test_a_changed_download_is_to_be_deleted(place, capsys):
    file()
    record_of = Path("own.hdf5.json")
    record_of.write_text(json.dumps({"bytes": 1, "sha256": ""}))
    text = error_of(capsys, datasets.load, "own.hdf5")
    assert "delete it and own.hdf5.json beside it" in text
    Path("own.hdf5").unlink()
    record_of.unlink()
    file()  # what starting again downloads
    assert len(datasets.load("own.hdf5").transitions.reward)


# --- What is no fault of the file ---------------------------------------------------------------
OBSTACLES = [
    (PermissionError(13, "Permission denied"), "permission denied; make it readable"),
    (MemoryError("Unable to allocate 9 TiB"), "need more memory than is free"),
    (ImportError("pyarrow is not installed"), "a package is missing: pyarrow is not installed"),
    (BlockingIOError(11, "unable to lock file, errno = 11"), "close it there"),
    (OSError(5, "Input/output error"), "the system cannot read it"),
    (OSError(24, "Too many open files"), "the system cannot read it"),
    (ValueError("does not support the dataset generated by Minari 0.1"), "cannot be read (Value"),
    (NotImplementedError("No deserialization method"), "cannot be read (NotImplementedError"),
    (AttributeError("no attribute glGetError"), "cannot be read (AttributeError"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("error", "words"), OBSTACLES, ids=[repr(row[0]) for row in OBSTACLES])
def test_deleting_is_advised_only_where_bytes_are_bad(place, monkeypatch, capsys, error, words):
    import minari

    def refuse(*_, **__):
        raise error

    record(ID)
    with monkeypatch.context() as patch:
        patch.setattr(minari, "load_dataset", refuse)
        text = error_of(capsys, datasets.load, ID)
        assert words in text and "delete" not in text and "damaged" not in text
    assert len(datasets.load(ID).transitions.reward)  # with the obstacle out of the way
    if isinstance(error, OSError | MemoryError):
        file()
        with monkeypatch.context() as patch:
            patch.setattr(h5py, "File", refuse)
            text = error_of(capsys, datasets.load, "own.hdf5")
        assert words in text and "truncated" not in text and "delete" not in text
    if not isinstance(error, ValueError):
        pytest.importorskip("ogbench")
        import ogbench

        npz()
        os.environ["OGBENCH_DATASET_DIR"] = os.getcwd()  # `place` undoes it
        with monkeypatch.context() as patch:
            patch.setattr(ogbench, "load_dataset", refuse)
            text = error_of(capsys, datasets.load, OGBENCH_TASK)
        assert "delete" not in text and "damaged" not in text


@pytest.mark.filterwarnings("ignore")
def test_arrow_data_without_pyarrow_name_the_package(place, monkeypatch, capsys):
    record(ID)
    content = json.loads(METADATA.read_text()) | {"data_format": "arrow"}
    METADATA.write_text(json.dumps(content))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "minari.dataset._storages.arrow_storage", raising=False)
    text = error_of(capsys, datasets.load, ID)
    assert "a package is missing: pyarrow" in text and 'pip install "minari[arrow]"' in text
    assert "delete" not in text


@pytest.mark.parametrize("name", ["osmesa", "nonsense"])
def test_a_renderer_that_is_not_there_is_named(place, name):
    pytest.importorskip("gymnasium_robotics")
    pytest.importorskip("ogbench")
    code = f"""if True:
        from common import datasets, envs
        for call, what in ((envs.make, "PointMaze_UMaze-v3"), (datasets.load, {OGBENCH_TASK!r})):
            try:
                call(what)
                print("made")
            except SystemExit as leave:
                print("code", leave.code)
    """
    environment = os.environ | {"MUJOCO_GL": name, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    if name == "osmesa" and "made" in done.stdout:  # this machine can render with it
        assert len(lines) == 1 and "not in" in lines[0], done.stderr
        return
    remedies = ("without pictures no MUJOCO_GL is needed", "or not set")
    assert done.stdout.count("code 2") == 2 == len(lines), done.stderr
    for line in lines:
        assert f"MUJOCO_GL={name}" in line and any(words in line for words in remedies)


# --- Names --------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("given", "there"),
    [
        ("lab/toi-v0", "lab/toy-v0"),
        ("lab/toy", "lab/toy-v0"),
        ("toy", "toy-v3"),
        ("toj-v3", "toy-v3"),
    ],
)
def test_an_id_that_is_meant_is_one_that_loads(place, capsys, given, there):
    record(there)
    if names.MINARI_ID.fullmatch(given):  # could be one that Minari's server has
        text = error_of(capsys, datasets.load, given)
        assert f"(there is {there})" in text and "minari download" in text
        assert len(datasets.load(there).transitions.reward)
        return
    text = error_of(capsys, datasets.load, given)
    meant = re.search(r"did you mean ([^ ?]+)", text)[1]
    assert meant == there and len(datasets.load(meant).transitions.reward)


def test_ids_that_are_meant_exist(capsys):
    """Every known id with a letter lost is answered with known ids, never with itself."""
    known = {*recipes.IDS, *names.reference_scores.table()}
    for name in sorted(known):
        given = name[:-5] + name[-4:]
        if given in known or names.OGBENCH_ID.fullmatch(given):
            continue
        with pytest.raises(SystemExit):
            names.fail_unknown(given)
        text = capsys.readouterr().err
        meant = re.findall(
            r"[^ ?]+", text.partition("did you mean ")[2].replace(" or ", " ").strip()
        )
        assert meant and given not in meant
        assert {*meant} <= known | {f"local/ogbench/{x}" for x in recipes.OGBENCH_RECIPES} | {
            row["minari_id"] for row in names.reference_scores.table().values()
        }


# --- No message is left out ---------------------------------------------------------------------
REMEDY = (
    r"--env|\bset |\bgive |store |delete|pass |\bname |wrap |start again|close it|make it|number"
)
REMEDY += r"|did you mean|move it|unset|install|put |or neither|near it"
# Messages with such a word whose remedy is not of a kind that a test here can apply, and why.
ELSEWHERE = {
    "the download failed": "test_sources.py serves files from a mirror and from a server",
    "needs ogbench": "the package is installed where tests run",
    "MuJoCo cannot draw with it": "test_a_renderer_that_is_not_there_is_named",
    "is damaged": "test_a_damaged_file_of_ogbench_is_to_be_deleted, and the table",
    "beside it, then start again": "test_a_changed_download_is_to_be_deleted",
    "near it": "the table",
    "lists the forms of an id": "a page to read",
    "did you mean": "test_an_id_that_is_meant_is_one_that_loads",
    "an address, not a file": "test_names.py loads the copy",
    "where walks end cannot be told": "a file of AntMaze without timeouts is refused before",
    "making it ended with code": "test_sources.py interrupts a recipe and continues it",
    "no fixed number of values": "the table",
    "is not an array of numbers": "it names what is wrong, and no remedy",
    "no number": "it names what is wrong, and no remedy",
    "return_scale": "it names what is wrong, and no remedy",
    "gives observations that are not in": "it names what is wrong, and no remedy",
    "there must be one number per row": "the table",
    "must be at least 1": "the table",
    "of a step must be one number": "it names what is wrong, and no remedy",
    "; see --env": "test_evaluation.py has envs that raise; the remedy is in the env's own code",
}


def messages():
    """The text of every `fail(...)` in the two rooms, its values left out."""
    found = []
    for path in sorted((ROOT / "common").glob("datasets/*.py")) + sorted(
        (ROOT / "common").glob("envs/*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "fail":
                parts = [x.value for x in ast.walk(node) if isinstance(x, ast.Constant)]
                text = " ".join(x for x in parts if isinstance(x, str))
                found.append((f"{path.name}:{node.lineno}", text))
    return found


def test_every_message_with_a_remedy_has_a_row():
    told = messages()
    assert len(told) > 40
    rows = [words for _, _, words, _ in TABLE.values()]
    missing = []
    for where, text in told:
        if not re.search(REMEDY, text):
            continue
        plain = re.sub(r"\W+", "", text)
        covered = any(_overlap(words, plain) for words in rows)
        if not covered and not any(words in text for words in ELSEWHERE):
            missing.append((where, text))
    assert not missing, missing


def _overlap(words, plain):
    """Whether words of a row stand in a message's text, apart from the values between them."""
    pieces = [re.sub(r"\W+", "", piece) for piece in re.split(r"\d+|lab/other-v0|point\S+", words)]
    pieces = [piece for piece in pieces if len(piece) > 5]
    return bool(pieces) and all(piece in plain for piece in pieces)

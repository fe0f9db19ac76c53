# SPDX-License-Identifier: Apache-2.0
"""Whatever a user or a broken disk hands over: it works, or one line and exit code 2.

ATOLL_SLOW=1 tries many more cases.
"""

import atexit
import contextlib
import dataclasses
import errno
import itertools
import json
import os
import pickle
import shutil
import socket
import string
import sys
import tempfile
import typing
import zlib
from pathlib import Path

import gymnasium
import h5py
import helpers_runs as runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_algorithms import NAMES

from common import datasets, experiment, recipes
from common.datasets import ogbench
from common.experiment import config, ranges

MANY = "ATOLL_SLOW" in os.environ
CALM = {"deadline": None, "suppress_health_check": [*HealthCheck], "derandomize": not MANY}


def tries(number):
    return settings(max_examples=number * (20 if MANY else 1), **CALM)


def ends_well(capsys, call):
    """Whether the call came back; otherwise it ended with one line and exit code 2."""
    capsys.readouterr()
    sys.stderr.reconfigure(errors="backslashreplace")  # as Python's own is, but not pytest's
    try:
        call()
        return True
    except SystemExit as leave:
        lines = capsys.readouterr().err.splitlines()
        assert leave.code in (0, 2), lines
        if leave.code == 2:
            errors = [line for line in lines if line.startswith("error: ")]
            assert len(errors) == 1 and len(errors[0]) < 2000, lines
            assert lines[-1] == errors[0]  # else it has more than one line
            assert not any("Traceback" in line for line in lines)
        return False


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- Configs and command lines ------------------------------------------------------------------
CONFIGS = {name: runs.module(name).Config for name in NAMES}
FIELDS = {name: sorted(vars(x())) for name, x in CONFIGS.items()}
REAL = ["local/pointmaze/umaze-v0", "hopper-medium-v2", "cube-single-play-singletask-v0", "a/b-v0"]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from([*REAL, "", "1e-3", "-1", "nan", "x", "~x/y", "..", "a:b:c"]),
)
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=3))
ALGORITHMS = st.sampled_from(NAMES)


def mappings(name):
    fields = st.sampled_from(FIELDS[name])
    keys = st.one_of(fields, st.sampled_from(["datasets", "env", "env_steps", "record"]))
    values = st.one_of(VALUES, st.dictionaries(fields, VALUES, max_size=2))
    return st.dictionaries(st.one_of(keys, st.text(max_size=6)), values, max_size=4)


def parse(*words, name="rebrac"):
    return config.parse(CONFIGS[name], [*words])


@tries(100)
@given(name=ALGORITHMS, data=st.data())
def test_any_mapping_as_config(empty, capsys, name, data):
    (empty / "own.yaml").write_text(yaml.safe_dump(data.draw(mappings(name))))
    ends_well(capsys, lambda: parse("--config", "own.yaml", name=name))
    assert {path.name for path in empty.iterdir()} == {"own.yaml"}


@tries(60)
@given(text=st.one_of(st.text(max_size=60), st.binary(max_size=60)))
def test_any_text_as_config(empty, capsys, text):
    (empty / "own.yaml").write_bytes(
        text if isinstance(text, bytes) else text.encode("utf-8", "ignore")
    )
    ends_well(capsys, lambda: parse("--config", "own.yaml"))


TAGS = ["bool", "int", "float", "null", "str", "binary", "timestamp", "set", "omap", "pairs"]
TAGS += ["seq", "map", "merge", "value", "python/name:os.mkdir", "x"]


@tries(60)
@given(
    field=st.sampled_from(FIELDS["rebrac"]),
    tag=st.sampled_from(TAGS),
    text=st.sampled_from(
        ["", "''", "x", "1", "-", "+", "0x", "0b", "[1]", "[a: 1]", "{a: 1}", "é"]
    ),
)
def test_any_tag_in_a_config(empty, capsys, field, tag, text):
    (empty / "own.yaml").write_text(f"{field}: !!{tag} {text}\n")
    ends_well(capsys, lambda: parse("--config", "own.yaml"))


def laughs(opening, closing):
    """Aliases that name the one before ten times each: a million x if written out."""
    lines = [f"a0: &a0 {opening}x{closing}"]
    for i in range(6):
        ten = ", ".join(f"k{k}: *a{i}" if opening == "{" else f"*a{i}" for k in range(10))
        lines.append(f"a{i + 1}: &a{i + 1} {opening}{ten}{closing}")
    return lines


LISTS, MAPS = laughs("[", "]"), laughs("{", "}")
RECORD = "record:\n  " + "\n  ".join(LISTS)
BAD_CONFIGS = {
    "aliases as a field": f"{RECORD}\nhidden: *a6\n",
    "aliases in a field": f"{RECORD}\nhidden: [*a6, 1]\n",
    "aliases as a number": f"{RECORD}\ndiscount: *a6\n",
    "aliases as a key": f"{RECORD}\n? *a6\n: 1\n",
    "aliases as rows": f"{RECORD}\ndatasets: *a6\n",
    "aliases in a row": f"{RECORD}\ndatasets: {{x: {{hidden: *a6}}}}\n",
    "mappings of aliases": "record:\n  " + "\n  ".join(MAPS) + "\nhidden: *a6\n",
    "merged mappings": "\n".join(MAPS) + "\n<<: *a6\n",
    "an alias of itself": "hidden: &a [*a]\n",
    "a mapping of itself": "&a {hidden: *a}\n",
    "an alias of nothing": "hidden: *a\n",
    "nested lists": "hidden: " + "[" * 300 + "]" * 300 + "\n",
    "deeply nested lists": "hidden: " + "[" * 20_000 + "]" * 20_000 + "\n",
    "deeply nested mappings": "{a: " * 20_000 + "1" + "}" * 20_000 + "\n",
    "never closed": "hidden: " + "[" * 20_000,
    "two documents": "discount: 0.9\n---\ndiscount: 0.8\n",
    "another version": "%YAML 9.9\n---\ndiscount: 0.9\n",
    "a long number": "discount: " + "9" * 5000 + "\n",
    "a long word": "discount: " + "x" * 5000 + "\n",
    "a long key": "x" * 5000 + ": 1\n",
    "a date": "discount: 2020-13-45\n",
    "a letter below space": "dataset: a\x01b\n",
    "UTF-16": "discount: 0.9\n".encode("utf-16"),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(1000),
    "nothing but zeros": bytes(1000),
    "a pickle": pickle.dumps({"discount": 0.9}),
    "a huge comment": "# x\n" * (1 << 19),
}


@pytest.mark.parametrize("text", BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_bad_configs(empty, capsys, text):
    (empty / "own.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert not ends_well(capsys, lambda: parse("--config", "own.yaml"))


def test_a_config_without_an_end():
    """In a process of its own: what reads on would take all memory."""
    code = "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 31, 1 << 31))\n"
    code += "from common.experiment import config; config.read_yaml('/dev/zero', object)"
    code, _, error = runs.call([sys.executable, "-c", code], runs.ROOT, {**os.environ})
    assert code == 2 and error.startswith("error: --config /dev/zero") and error.count("\n") == 1


@pytest.mark.parametrize(
    "name", ["../out", "a/b", "/tmp/out", "..", ".", "", "a b", "-", "~", "a\nb"]
)
def test_no_name_leads_out_of_the_runs_folder(empty, capsys, name):
    assert not ends_well(capsys, lambda: parse(f"--name={name}"))


def test_yaml_tags_are_not_executed(empty, capsys):
    (empty / "own.yaml").write_text("discount: !!python/object/apply:os.mkdir ['made']\n")
    assert not ends_well(capsys, lambda: parse("--config", "own.yaml"))
    assert not (empty / "made").exists()


# --- Starts of a run ----------------------------------------------------------------------------
def begin(name, argv):
    """What a run does before it makes its networks: all that its words can do wrong."""

    class Begun(Exception):
        pass

    cfg, options = experiment.parse(CONFIGS[name], argv)
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps, actions="any")
    experiment.place(dataset.transitions, options)
    with contextlib.suppress(Begun), experiment.Run(cfg, options, dataset):
        raise Begun


@pytest.fixture
def start(tmp_path, monkeypatch, capsys, valid):
    """`start(words)` tells whether a run begins; if not, nothing may be left of it.

    Each start has a folder of its own, two deep, with data.hdf5 in it. No data set is made,
    downloaded or elsewhere, and no other process is there.
    """

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "not in this test")

    joined = []

    def initialize(coordinator_address=None, num_processes=None, process_id=None):
        joined.append(True)
        if coordinator_address is not None:  # all that is checked before JAX is asked
            host, _, port = coordinator_address.rpartition(":")
            assert host and coordinator_address.isascii() and 0 < int(port) < 1 << 16
            assert 0 <= process_id < num_processes < 1 << 31

    class Manager:
        def __init__(self, folder, every=None):
            pass

        def close(self):
            pass

    monkeypatch.setattr(atexit, "register", lambda call: None)  # no other process to tell
    monkeypatch.setattr(recipes, "make", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(experiment.config.processes, "joined", lambda: bool(joined))
    monkeypatch.setattr(experiment.checkpoints, "manager", Manager)  # these two are slow
    monkeypatch.setattr(experiment.provenance, "code", lambda files: "code")
    for name in ("HOME", "MINARI_DATASETS_PATH", "D4RL_DATASET_DIR", "OGBENCH_DATASET_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))

    def one(*words, name="rebrac", files=()):
        top = Path(tempfile.mkdtemp(dir=tmp_path))
        here = top / "below" / "here"
        here.mkdir(parents=True)
        monkeypatch.chdir(here)
        for file, content in {"data.hdf5": valid, **dict(files)}.items():
            Path(file).write_bytes(content if isinstance(content, bytes) else content.encode())
        before = runs.tree(top)
        words = ["--wandb=disabled", *words]
        begun = ends_well(capsys, lambda: begin(name, words))
        assert begun or runs.tree(top) == before  # nothing half-written
        return begun

    return one


DATA = "--dataset=data.hdf5"
WORDS = ["--resume", "--name", "--runs-dir", "--data", "--devices", "--", "--distributed", "--env"]
WORDS += ["--env-steps", "--config", "--config=own.yaml", "--env=Pendulum-v1", "data.hdf5", "host"]
WORDS += ["0", "1", "-1", "1e-3", "nan", "inf", "true", "None", "../..", ".", "", "auto", *REAL]


def words_of(name):
    flags = st.sampled_from([f"--{field.replace('_', '-')}" for field in FIELDS[name]])
    text = st.text(alphabet=string.printable, max_size=6)
    return st.lists(st.one_of(flags, st.sampled_from(WORDS), text), max_size=5)


@tries(100)
@given(name=ALGORITHMS, data=st.data())
def test_any_command_line(start, name, data):
    words = [word for word in data.draw(words_of(name)) if word not in ("-h", "--help")]
    start(DATA, *words, name=name, files={"own.yaml": "batch_size: 4\nenv_steps: 3\n"})


TRICKS = ["", ".", "..", "../../x", "/", "~x/y", "~", "-", "None", " ", "{x}", "%s", "file:///x"]
TRICKS += ["/dev/null", "/dev/null/x", "/proc/x", "data.hdf5", "data.hdf5/x", "C:\\x", "a:b:c"]
TRICKS += ["a" * 300, "a" * 5000, "\u6f22" * 90, "\xe9", "e\u0301", "\U0001f600"]
TRICKS += ["a\nb", "\x1b[31m", "a\0b", "caf\udce9"]  # the last is how Python shows Latin-1


@pytest.mark.parametrize("trick", TRICKS, ids=lambda x: ascii(x[:20]))
@pytest.mark.parametrize("flag", ["--config", "--name", "--runs-dir", "--dataset"])
def test_tricks_as_names_and_paths(start, flag, trick):
    if (flag, trick) == ("--runs-dir", "/"):
        pytest.skip("a run in there would be fine")
    start(DATA, f"{flag}={trick}")
    if flag == "--dataset":
        start(f"{flag}={trick}.hdf5")
        start("--config=own.yaml", files={"own.yaml": yaml.safe_dump({"dataset": trick})})


@tries(60)
@given(flag=st.sampled_from(["--config", "--name", "--dataset", "--env"]), text=st.text(max_size=9))
def test_any_text_as_name_or_path(start, flag, text):
    start(DATA, f"{flag}={text}")


FILES = ["...hdf5", "..hdf5", ".hdf5", "caf\udce9.hdf5", "a\nb.hdf5", "null.hdf5", "~x.hdf5"]
FILES += ["file", "..file", "hopper-medium-v2", "\xe9.h5", "a: b # c.hdf5", "a" * 250 + ".hdf5"]
FILES += ["*.hdf5", "{x}.hdf5", "\x1b[31m.hdf5", "local", " .h5"]


@pytest.mark.parametrize("file", FILES, ids=lambda x: ascii(x[:20]))
def test_a_data_file_of_any_name(start, valid, file):
    if start(f"--dataset={file}", files={file: valid}):
        (folder,) = Path("runs/rebrac").glob("*/*/config.yaml")
        cfg, _ = config.read_run(folder.parent, CONFIGS["rebrac"])
        assert cfg.dataset == file


ENVS = [":", "a:b:c", ":X-v0", "X-v0:", "..:X-v0", "..x:Y-v0", "no.such.module:X-v0", "os:mkdir"]
ENVS += ["a b:X-v0", "\xfcn\xef-v0", "CartPole-v99", "CartPole-v1", "Pendulum-v\u0663", "-v0"]
ENVS += ["A/B-v0", "A/B/C-v0", "a\nb", "x\ny:z-v0", "caf\udce9-v0", "caf\udce9:X-v0"]
ENVS += ["Pendulum-v" + "9" * 5000, "x" * 5000, "x" * 300 + ":X-v0", "helpers_runs.x:Y-v0"]
ENVS += ["GymV21Environment-v0", "Taxi-v3", "HalfCheetah-v2", "raises:X-v0", "\0:X"]
ENVS += ["helpers_runs:Endless-v0"]  # without a step limit


@pytest.mark.parametrize("env", ENVS, ids=lambda x: ascii(x[:20]))
def test_envs_of_any_name(start, monkeypatch, env):
    monkeypatch.syspath_prepend("")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # of raises.py, by Python itself
    own = yaml.safe_dump({"env": env})
    for word in (f"--env={env}", "--config=own.yaml"):
        assert not start(DATA, word, files={"raises.py": "1 / 0", "own.yaml": own})


@tries(60)
@given(env=st.text(alphabet="\xe9:/.-_v0 \n", max_size=9))
def test_any_text_as_env(start, env):
    start(DATA, f"--env={env}")


@pytest.mark.parametrize("value", ["", "0", "-1", "1e3", "1.0", "nan", "9" * 5000, "0x10", "x"])
@pytest.mark.parametrize("flag", ["--env-steps", "--devices", "--data", "--wandb"])
def test_options_that_are_no_numbers_and_no_choices(start, flag, value):
    assert not start(DATA, f"{flag}={value}")


# --- Processes ----------------------------------------------------------------------------------
JOINS = ["auto", "node1:1234/2/0", "10.0.0.1:1/2/1", "[::1]:8476/1/0"]
NO_JOINS = ["", " auto", "AUTO", "x", ":1/2/0", "a/2/0", "a:1", "a:1/2", "a:1/2/2", "a:1/0/0"]
NO_JOINS += ["a:1/2/-1", "a:1/2/0/0", "a:1/1e3/0", "a:0/2/0", "a:99999/2/0", "a b:1/2/0"]
NO_JOINS += ["a:\u0663/2/0", "a:1/\u0662/0", "a\n:1/2/0", "a:1/2/0\n", "caf\udce9:1/2/0"]
NO_JOINS += ["a:1/99999999999/0", f"a:1/{'9' * 5000}/0"]


@pytest.mark.parametrize("words", [*JOINS, *NO_JOINS], ids=lambda x: ascii(x[:20]))
def test_distributed_of_any_form(start, words):
    assert start(DATA, f"--distributed={words}") == (words in JOINS)


@tries(60)
@given(words=st.text(alphabet="0129:/.-[]a\u0663\n ", max_size=14))
def test_any_text_as_distributed(start, words):
    start(DATA, f"--distributed={words}")


@pytest.mark.parametrize("error", [RuntimeError("a\nb"), ValueError(""), RuntimeError("x" * 5000)])
def test_what_jax_says_about_processes_is_one_line(start, monkeypatch, error):
    def initialize(**words):
        raise error

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    assert not start(DATA, "--distributed=auto")


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


@pytest.mark.parametrize("name", [b"\xff", "\u202e", "a\nb", "x" * 3000], ids=ascii)
def test_array_names_of_any_kind(empty, capsys, name):
    runs.write_hdf5("data.hdf5", rewards=None)
    with h5py.File("data.hdf5", "a") as file:
        file[name] = np.zeros(60)
        file.create_group(name * 2)
    assert not ends_well(capsys, lambda: datasets.load("data.hdf5"))


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


# --- Files that would run code ------------------------------------------------------------------
class Evil:
    def __reduce__(self):
        return os.mkdir, ("made",)


@pytest.fixture
def made(empty, monkeypatch):
    """The folder that whatever is run makes: by a pickle, or as the module evilmod is imported."""
    (empty / "modules").mkdir()
    (empty / "modules" / "evilmod.py").write_text("import os; os.mkdir('made')\n")
    monkeypatch.syspath_prepend(empty / "modules")
    yield empty / "made"
    sys.modules.pop("evilmod", None)


def test_nothing_in_an_hdf5_file_is_unpickled(made, capsys):
    Path("data.hdf5").write_bytes(pickle.dumps(Evil()))
    assert not ends_well(capsys, lambda: datasets.load("data.hdf5"))
    with h5py.File("data.hdf5", "w") as file:
        file["observations"] = np.void(pickle.dumps(Evil()))
    assert not ends_well(capsys, lambda: datasets.load("data.hdf5"))
    assert not made.exists()


def test_an_hdf5_file_names_no_module(made, capsys):
    runs.write_hdf5("data.hdf5", attributes={"env_id": "evilmod:Pendulum-v1"})
    assert not ends_well(capsys, lambda: datasets.load("data.hdf5"))
    assert not made.exists()
    ends_well(capsys, lambda: datasets.load("data.hdf5", "Pendulum-v1"))
    assert not made.exists()
    runs.write_hdf5("data.hdf5")
    assert ends_well(capsys, lambda: datasets.load("data.hdf5", "evilmod:Pendulum-v1"))
    assert made.exists()  # --env may


@pytest.mark.parametrize(
    "column", ["observations", "actions", "terminals", "qpos", "qvel", "button_states", None]
)
def test_nothing_in_an_npz_file_is_unpickled(made, monkeypatch, capsys, column):
    pytest.importorskip("ogbench")
    monkeypatch.setenv("OGBENCH_DATASET_DIR", ".")
    path = Path("pointmaze-medium-navigate-v0.npz")
    place = np.full((6, 2), 20, np.float32)
    columns = dict.fromkeys(("observations", "actions", "qpos", "qvel"), place)
    columns |= {"terminals": np.arange(6) % 3 == 2}
    if column is not None:
        np.savez(path, **columns | {column: np.array([Evil()] * 6, object)})
        ogbench._check(path)  # what comes from a server is looked at with this
    else:
        path.write_bytes(pickle.dumps(Evil()))
    assert not ends_well(capsys, lambda: datasets.load(f"{path.stem[:-3]}-singletask-v0"))
    assert not made.exists()
    with contextlib.suppress(Exception):
        np.load(path, allow_pickle=True)[column]
    assert made.exists()  # it would have worked


SPECS = {
    "a function": {"entry_point": "os:mkdir", "kwargs": {"path": "made"}},
    "a module": {"entry_point": "evilmod:X"},
    "a wrapper": {"additional_wrappers": [{"name": "X", "entry_point": "evilmod:X", "kwargs": {}}]},
    "make": {"entry_point": "gymnasium:make", "kwargs": {"id": "evilmod:CartPole-v1"}},
    "a loader": {
        "entry_point": "gymnasium.envs.registration:load_env_creator",
        "kwargs": {"name": "evilmod:X"},
    },
}


@pytest.fixture(scope="module")
def minari_data(tmp_path_factory):
    """A folder of Minari's with a data set of ten steps of CartPole."""
    minari = pytest.importorskip("minari")
    folder = tmp_path_factory.mktemp("minari")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder))
        env = minari.DataCollector(gymnasium.make("CartPole-v1"))
        env.action_space.seed(0)
        env.reset(seed=0)
        for _ in range(5):
            env.step(env.action_space.sample())
        env.create_dataset("test/cartpole-v0", algorithm_name="random")
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key", ["env_spec", "eval_env_spec", "env_spec without spaces"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_minari_data_set_runs_no_code(made, monkeypatch, capsys, minari_data, spec, key):
    shutil.copytree(minari_data, "minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", "minari")
    file = Path("minari/test/cartpole-v0/data/metadata.json")
    metadata = json.loads(file.read_text())
    text = json.dumps(json.loads(metadata["env_spec"]) | spec)
    metadata[key.split()[0]] = text
    if "without" in key:  # Minari itself makes the env, to look at its spaces
        del metadata["observation_space"], metadata["action_space"]
    file.write_text(json.dumps(metadata))
    assert not ends_well(capsys, lambda: datasets.load("test/cartpole-v0", actions="any"))
    assert not made.exists()
    ends_well(capsys, lambda: datasets.load("test/cartpole-v0", "CartPole-v1", actions="any"))
    assert not made.exists()
    with contextlib.suppress(Exception):
        gymnasium.make(gymnasium.envs.registration.EnvSpec.from_json(text))
    assert made.exists()  # it would have worked


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrapper", ["RecordVideo", "HumanRendering"])
def test_a_minari_data_set_writes_no_video_and_opens_no_window(
    made, monkeypatch, capsys, minari_data, wrapper
):
    shutil.copytree(minari_data, "minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", "minari")
    file = Path("minari/test/cartpole-v0/data/metadata.json")
    metadata = json.loads(file.read_text())
    spec = {"name": wrapper, "entry_point": f"gymnasium.wrappers.rendering:{wrapper}", "kwargs": {}}
    spec = json.loads(metadata["env_spec"]) | {"additional_wrappers": [spec]}
    file.write_text(json.dumps(metadata | {"env_spec": json.dumps(spec)}))
    with pytest.raises(SystemExit) as leave:
        datasets.load("test/cartpole-v0", actions="any")
    assert leave.value.code == 2
    assert f"its env is gymnasium.wrappers.rendering:{wrapper}, of no" in capsys.readouterr().err


def test_a_minari_data_set_of_an_env_that_is_known(empty, monkeypatch, capsys, minari_data):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(minari_data))
    assert ends_well(capsys, lambda: datasets.load("test/cartpole-v0", actions="any"))


# --- Configurations -----------------------------------------------------------------------------
KEPT = ("dataset", "seeds", "num_updates", "log_every", "eval_every", "eval_episodes")
KEPT += ("clone_updates", "model_updates", "q_updates", "online_updates", "exponent")
KEPT += ("num_models", "num_elites")  # some of the first are the second, of which mobile needs two
SIZES = ("hidden", "vae_hidden", "critic_hidden", "value_hidden", "actor_hidden", "embedding")
DIVIDE = ("policy_delay", "actor_updates", "num_heads", "updates_per_step")
ALSO_KEPT = {
    "brac": ("warm_start",),  # less than the updates of a chunk
    "combo": ("batch_size",),  # a batch has rows of the data and of the model, at least one each
    "trajectory_transformer": ("context", "plan_context"),  # the second is at most the first
}
TO_ONE = (*ranges.SHARES, "expectile", "dropout", "action_margin", "fraction")
DRAWS = 6  # with ATOLL_SLOW=1


def drawn(name, draw):
    """Flags of a small configuration of an algorithm. Choices differ from draw to draw.

    In the first one none is the default, which other tests train.
    """
    rng, flags = np.random.default_rng([zlib.crc32(name.encode()), draw]), []
    words, kept = runs.tiny(name), (*KEPT, *ALSO_KEPT.get(name, ()))
    small = {flag: value for flag, value in itertools.pairwise(words) if flag.startswith("--")}
    hints = typing.get_type_hints(CONFIGS[name])
    for field in dataclasses.fields(CONFIGS[name]):
        flag, hint = f"--{field.name.replace('_', '-')}", hints[field.name]
        choices = [x for x in typing.get_args(hint) if x is not type(None)]
        if hint is bool or typing.get_origin(hint) is typing.Literal:
            choices = choices or [False, True]
            others = choices.index(field.default) + 1 if field.default in choices else 0
            flags += [flag, str(choices[(others + draw) % len(choices)])]
        elif field.name in kept or rng.random() < 0.4:
            continue
        elif field.name in SIZES:
            many = rng.integers(1, 4) if choices else 1
            flags += [flag, *map(str, rng.choice([4, 8], many))] if MANY else []
        elif field.name in DIVIDE:
            flags += [flag, str(rng.choice([1, 2, 4]))]
        elif hint is int or choices == [int]:
            flags += [flag, str(rng.integers(1, 1 + int(small.get(flag, 4))))]
        elif hint is float or choices == [float]:
            value = (field.default or 1.0) * rng.choice([0.5, 1.0, 1.5])
            flags += [flag, str(min(value, 0.999) if field.name in TO_ONE else value)]
    return flags


def trains(folder, capsys, name, draw):
    """Whether a drawn configuration trained; if not, it was refused and wrote nothing."""
    write = runs.write_cartpole if name in runs.DISCRETE else runs.write_hdf5
    argv = ["--dataset", write("data.hdf5"), *runs.tiny(name), *drawn(name, draw)]
    first = ("clone_updates", "model_updates", "q_updates")
    phases = any(hasattr(CONFIGS[name], field) for field in first)
    end = "8" if phases else "4"  # a chunk of each phase
    argv += ["--num-updates", end, "--log-every", "4", "--eval-every", "4", "--eval-episodes", "1"]
    argv += ["--runs-dir", f"runs{draw}"]
    print(name, *argv)  # pytest shows it where the test fails
    if not ends_well(capsys, lambda: runs.start(name, argv)):
        assert not (folder / f"runs{draw}").exists()
        return False
    run = runs.only_run(f"runs{draw}")
    last = runs.read_csv(run / "metrics.csv")[-1]
    result = json.loads((run / "result.json").read_text())
    assert last["update"] == end and result["num_updates"] == int(end) and not result["diverged"]
    assert len(last) > 6 and all(np.isfinite(float(cell)) for cell in last.values() if cell)
    return True


def only_traced(monkeypatch, name):
    """What compiling takes seconds for is traced: all of a State is 1 and stays so."""
    create = runs.module(name).create_state

    def create_state(key, *args, **kwargs):
        state = jax.eval_shape(lambda key: create(key, *args, **kwargs), key)
        return jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), state)

    def over_seeds(chunk, update=None):
        def train(state, keys, start, data):
            lanes = jax.vmap(chunk, (0, 0, None, None))
            after, metrics = jax.eval_shape(lanes, state, keys, start, data)
            shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), x) for x in (state, after)]
            assert shapes[0] == shapes[1]
            return state, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), metrics)

        return train

    monkeypatch.setattr(runs.module(name), "create_state", create_state)
    monkeypatch.setattr(experiment, "over_seeds", over_seeds)


@pytest.mark.parametrize("name", NAMES)
def test_configurations_drawn_at_random(empty, monkeypatch, capsys, name):
    """Networks, losses, data and files of each; many draws and the numbers with ATOLL_SLOW=1."""
    if not MANY:
        only_traced(monkeypatch, name)
        assert trains(empty, capsys, name, 0)
        return
    trained = [trains(empty, capsys, name, draw) for draw in range(DRAWS)]
    assert sum(trained) > DRAWS / 2

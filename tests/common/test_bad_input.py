# SPDX-License-Identifier: Apache-2.0
"""Every bad input ends with exit code 2, one line that says what to do, and nothing written."""

import fcntl
import os

import helpers_runs as runs
import numpy as np
import pytest
import yaml

OTHER = "other.hdf5"  # a data file whose name no config has a row for
LEARN = ["--dataset", OTHER, *runs.TINY]


def hdf5(**columns):
    return lambda: runs.write_hdf5(OTHER, **columns)


def text(content, name="own.yaml"):
    def write():
        with open(name, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())

    return write


def changed(column, row, value):
    """A data file with one bad value."""

    def write():
        arrays = {"rewards": np.zeros(60), "actions": np.zeros((60, 1)), "terminals": np.zeros(60)}
        arrays["observations"] = np.zeros((60, 3))
        arrays[column][row] = value
        runs.write_hdf5(OTHER, **{column: arrays[column]})

    return write


def truncated():
    path = runs.write_hdf5(OTHER, rows=2000)
    os.truncate(path, os.path.getsize(path) // 2)


def existing_run():
    """The run folder that `run` starts: config.yaml as a run of rebrac.py leaves it."""
    runs.write_hdf5(OTHER)
    os.makedirs("runs/rebrac/other/a")
    values = {"dataset": OTHER, "num_updates": 24, "log_every": 4, "eval_every": 8, "hidden": [8]}
    values |= {"eval_episodes": 2, "batch_size": 4}
    with open("runs/rebrac/other/a/config.yaml", "w") as file:
        yaml.safe_dump(values, file)


HELD = []  # locks that the test process holds, as another training process would


def locked_run():
    existing_run()
    HELD.append(os.open("runs/rebrac/other/a/.lock", os.O_CREAT | os.O_WRONLY))
    fcntl.flock(HELD[-1], fcntl.LOCK_EX)


OWN = ["--config", "own.yaml"]

# name, what to write beforehand, arguments, words of the message: the value and the remedy
TABLE = [
    # Command line
    ("unknown flag", None, ["--discont", "0.9"], ["--discont", "--discount"]),
    ("stray word", None, ["0.9"], ["0.9"]),
    ("word for a number", None, ["--batch-size", "many"], ["--batch-size", "many"]),
    ("fraction for a count", None, ["--num-updates", "1e3"], ["--num-updates", "1e3"]),
    ("flag without a value", None, ["--discount"], ["--discount"]),
    ("wandb mode", None, ["--wandb", "on"], ["--wandb", "on", "offline"]),
    ("no seed", None, ["--seeds"], ["--seeds"]),
    ("seed twice", None, ["--seeds", "1", "0", "1"], ["--seeds (1, 0, 1)", "none twice"]),
    ("seed below 0", None, ["--seeds", "-1"], ["--seeds (-1,)", "from 0"]),
    ("seed too large", None, ["--seeds", "4294967296"], ["--seeds", "4294967295"]),
    ("batch size", None, ["--batch-size", "0"], ["--batch-size 0", "at least 1"]),
    ("hidden width", None, ["--hidden", "8", "0"], ["--hidden (8, 0)", "at least 1"]),
    ("no hidden layer", None, ["--hidden"], ["--hidden", "at least one"]),
    ("episodes", None, ["--eval-episodes", "0"], ["--eval-episodes 0", "at least 1"]),
    ("discount", None, ["--discount", "1.5"], ["--discount 1.5", "from 0 to 1"]),
    ("rate nan", None, ["--actor-learning-rate", "nan"], ["--actor-learning-rate nan", "finite"]),
    ("rate 0", None, ["--critic-learning-rate", "0"], ["--critic-learning-rate 0.0", "above 0"]),
    (
        "eval_every",
        None,
        ["--eval-every", "1500"],
        ["--eval-every 1500", "multiple of --log-every 1000", "2000"],
    ),
    (
        "log_every",
        None,
        ["--log-every", "125", "--eval-every", "1000"],
        ["--log-every 125", "multiple of --policy-delay 2", "124"],
    ),
    (
        "num_updates",
        None,
        ["--num-updates", "2500"],
        ["--num-updates 2500", "multiple of --log-every 1000", "2000"],
    ),
    ("save", None, ["--save-seconds", "-1"], ["--save-seconds -1.0", "0 or more"]),
    ("name escapes", None, ["--name", "../x"], ["--name '../x'", "letters"]),
    ("name empty", None, ["--name", ""], ["--name ''", "letters"]),
    ("name of dots", None, ["--name", ".."], ["--name '..'", "letters"]),
    # YAML
    ("no file", None, OWN, ["own.yaml", "No such file"]),
    ("file is a folder", None, ["--config", "."], ["--config .", "cannot be read"]),
    ("file is binary", text(b"\xff\xfe\x00\x9d"), OWN, ["own.yaml", "cannot be read"]),
    ("unknown key", text("actor_penalti: 1\n"), OWN, ["own.yaml", "actor_penalti'", "penalty'"]),
    (
        "unknown key far from all",
        text("zzz: 1\n"),
        OWN,
        ["own.yaml", "'zzz'", "known are dataset, seeds"],
    ),
    ("key twice", text("discount: 0.9\ndiscount: 0.9\n"), OWN, ["own.yaml", "'discount'", "twice"]),
    ("not a mapping", text("- discount\n"), OWN, ["own.yaml", "mapping", "list"]),
    ("broken syntax", text("hidden: [1, 2\nseeds: 3\n"), OWN, ["own.yaml", "line 2"]),
    ("tab", text("\tdiscount: 0.9\n"), OWN, ["own.yaml", "not valid YAML"]),
    ("value of a wrong type", text("discount: high\n"), OWN, ["own.yaml", "--discount", "high"]),
    (
        "row with a wrong type",
        text("datasets:\n  local/pointmaze/umaze-v0: {batch_size: 1.5}\n"),
        OWN,
        ["own.yaml: datasets: local/pointmaze/umaze-v0", "--batch-size", "1.5"],
    ),
    (
        "row with an unknown key",
        text("datasets: {x: {batchsize: 1}}\n"),
        OWN,
        ["own.yaml: datasets: x", "'batchsize'", "'batch_size'"],
    ),
    ("row without fields", text("datasets: {x: 1}\n"), OWN, ["own.yaml: datasets", "mapping"]),
    # Run folder
    ("run exists", existing_run, [*LEARN, "--name", "a"], ["other/a", "--resume", "--name"]),
    (
        "resume with another config",
        existing_run,
        [*LEARN, "--name", "a", "--resume", "--discount", "0.5"],
        ["other/a", "discount 0.99, not 0.5", "--name"],
    ),
    (
        "another process trains in it",
        locked_run,
        [*LEARN, "--name", "a", "--resume"],
        ["other/a", "another process", "--name"],
    ),
    # Data set
    (
        "unknown id",
        None,
        ["--dataset", "hoper-medium-v2"],
        ["hoper-medium-v2", "did you mean hopper-medium-v2"],
    ),
    (
        "unknown local id",
        None,
        ["--dataset", "local/pointmaze/umase-v0"],
        ["local/pointmaze/umase-v0", "did you mean local/pointmaze/umaze-v0"],
    ),
    ("id like nothing", None, ["--dataset", "qqq"], ["'qqq'", "docs/data.md"]),
    (
        "no such data file",
        hdf5(),
        ["--dataset", "othr.hdf5"],
        ["othr.hdf5", "no such file", "other.hdf5"],
    ),
    ("folder", None, ["--dataset", "."], [".: a directory", "HDF5"]),
    ("truncated", truncated, LEARN, [OTHER, "truncated"]),
    ("another format", text("a,b\n1,2\n", OTHER), LEARN, [OTHER, "HDF5"]),
    ("key missing", hdf5(rewards=None), LEARN, [OTHER, "'rewards'", "observations"]),
    ("nan", changed("rewards", 7, np.nan), LEARN, [OTHER, "rewards has NaN", "row 7"]),
    ("inf", changed("observations", 9, np.inf), LEARN, [OTHER, "observations has NaN", "row 9"]),
    ("lengths", hdf5(rewards=np.zeros(59)), LEARN, [OTHER, "60 rows", "59 of rewards"]),
    ("axes", hdf5(observations=np.zeros((60, 3, 2))), LEARN, [OTHER, "observations", "[60, 3, 2]"]),
    ("no rows", hdf5(rewards=np.zeros(0)), LEARN, [OTHER, "rewards is empty"]),
    ("words for numbers", hdf5(rewards=[b"x"] * 60), LEARN, [OTHER, "rewards is not an array"]),
    ("action leaves the box", changed("actions", 5, 2.5), LEARN, [OTHER, "actions leave", "row 5"]),
    (
        "action leaves [-1, 1]",
        hdf5(attributes={}, actions=np.full((60, 1), 1.5)),
        LEARN,
        [OTHER, "actions leave [-1, 1]", "--env"],
    ),
    # Evaluation env
    ("unknown env", hdf5(), [*LEARN, "--env", "Nowhere-v0"], ["Nowhere", "--env"]),
    ("env of no module", hdf5(), [*LEARN, "--env", "no_module:X-v0"], ["no_module", "--env"]),
    (
        "env with other observations",
        hdf5(actions=np.zeros((60, 1))),
        [*LEARN, "--env", "MountainCarContinuous-v0"],
        [OTHER, "3 numbers", "MountainCarContinuous-v0", "--env"],
    ),
    (
        "env with other actions",
        hdf5(actions=np.zeros((60, 2))),
        LEARN,
        [OTHER, "2 action dimensions", "Pendulum-v1"],
    ),
    (
        "env with integer actions",
        hdf5(observations=np.zeros((60, 4))),
        [*LEARN, "--env", "CartPole-v1"],
        [OTHER, "CartPole-v1", "discrete"],
    ),
    (
        "env without limit",
        hdf5(attributes={}, actions=np.zeros((60, 1))),
        [*LEARN, "--env", "helpers_runs:Endless-v0"],
        [OTHER, "Endless-v0 has no step limit", "--env-steps"],
    ),
    ("env steps 0", hdf5(), [*LEARN, "--env-steps", "0"], ["--env-steps 0", "at least one"]),
    ("env steps below 0", hdf5(), [*LEARN, "--env-steps", "-5"], ["--env-steps -5", "at least"]),
    (
        "Minari without a network",
        None,
        ["--dataset", "D4RL/pen/nowhere-v7", *runs.TINY],
        ["D4RL/pen/nowhere-v7", "minari download"],
    ),
]
# Those that run as a command of its own. The rest runs in this process, which is quicker.
COMMANDS = {
    "unknown flag",
    "row with a wrong type",
    "resume with another config",
    "another process trains in it",
    "truncated",
    "Minari without a network",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory, with no data sets elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield tmp_path
    while HELD:
        os.close(HELD.pop())


def refused(folder, code, before, error, words):
    assert code == 2
    (line,) = error.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line, line
    assert runs.tree(folder) == before


def rows(commands):
    chosen = [row for row in TABLE if (row[0] in COMMANDS) == commands]
    return pytest.mark.parametrize(
        ("write", "argv", "words"), [row[1:] for row in chosen], ids=[row[0] for row in chosen]
    )


@rows(commands=False)
def test_bad_input(folder, capsys, write, argv, words):
    if write is not None:
        write()
    before = runs.tree(folder)
    with pytest.raises(SystemExit) as leave:
        runs.start("rebrac", argv)
    refused(folder, leave.value.code, before, capsys.readouterr().err, words)


@rows(commands=True)
def test_bad_input_as_a_command(folder, tmp_path_factory, write, argv, words):
    if write is not None:
        write()
    before = runs.tree(folder)
    words_of_command = runs.command("rebrac", argv)
    environment = runs.environment(tmp_path_factory.getbasetemp() / "cache")
    code, _, error = runs.call(words_of_command, folder, environment)
    refused(folder, code, before, error, words)


def test_seeds_that_devices_cannot_share(folder, tmp_path_factory):
    runs.write_hdf5(OTHER)
    before = runs.tree(folder)
    three = {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}
    environment = runs.environment(tmp_path_factory.getbasetemp() / "cache", **three)
    argv = runs.command("rebrac", [*LEARN, "--seeds", "0", "1", "2", "3"])
    code, _, error = runs.call(argv, folder, environment)
    refused(folder, code, before, error, ["--seeds: 4", "3 devices", "a multiple of 3"])


@pytest.mark.parametrize("name", runs.CONTINUOUS)
def test_integer_actions_for_a_method_of_continuous_ones(folder, capsys, name):
    runs.write_hdf5(OTHER, attributes={}, actions=np.zeros(60, int))
    before = runs.tree(folder)
    with pytest.raises(SystemExit) as leave:
        runs.start(name, ["--dataset", OTHER, *runs.tiny(name)])
    words = [OTHER, "integer actions", "continuous ones only", "README's table of methods"]
    refused(folder, leave.value.code, before, capsys.readouterr().err, words)


@pytest.mark.parametrize("name", runs.DISCRETE)
def test_other_actions_for_a_method_of_integer_ones(folder, capsys, name):
    runs.write_hdf5(OTHER)
    before = runs.tree(folder)
    with pytest.raises(SystemExit) as leave:
        runs.start(name, ["--dataset", OTHER])
    words = [OTHER, "continuous actions", "integer ones only", "README's table of methods"]
    refused(folder, leave.value.code, before, capsys.readouterr().err, words)


NEGATIVE = {"rewards": -np.ones(60)}
OF_ONE_FILE = [  # name, columns of the data, flags, what the line says
    ("algaedice", {}, ["--online-share", "2"], ["--online-share 2.0", "from 0 to 1"]),
    ("diffusion_ql", NEGATIVE, ["--standardise-rewards", "True"], ["all rewards are equal"]),
    ("gfp", {}, ["--eta", "0"], ["--eta 0.0", "--eta None"]),
    ("mobile", NEGATIVE, [], ["--least-target 0.0", "no reward above 0"]),
    ("morel", {}, ["--num-models", "1", "--num-elites", "1"], ["--num-models 1", "at least 2"]),
    ("online_dt", {}, ["--eval-context", "99"], ["--eval-context 99", "at most --context"]),
    ("rlpd", {}, ["--num-target-critics", "99"], ["--num-target-critics 99", "--num-critics"]),
]


@pytest.mark.parametrize(
    ("name", "columns", "flags", "words"), OF_ONE_FILE, ids=[row[0] for row in OF_ONE_FILE]
)
def test_a_setting_of_one_file_that_cannot_work(folder, capsys, name, columns, flags, words):
    runs.write_hdf5(OTHER, **columns)
    before = runs.tree(folder)
    with pytest.raises(SystemExit) as leave:
        runs.start(name, ["--dataset", OTHER, *runs.tiny(name), *flags])
    refused(folder, leave.value.code, before, capsys.readouterr().err, words)


def test_the_table_is_long_enough():
    assert len(TABLE) >= 20
    assert {row[0] for row in TABLE} >= COMMANDS and len(COMMANDS) >= 5
    assert len({row[0] for row in TABLE}) == len(TABLE)

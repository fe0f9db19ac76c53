# SPDX-License-Identifier: Apache-2.0
"""What a user sets explicitly happens, or one line says why not: variables, flags, Python."""

import dataclasses
import json
import os
import sys
import typing
from pathlib import Path
from types import SimpleNamespace

import helpers_runs as runs
import jax
import numpy as np
import pytest
import yaml
from own_files import NAMES

from common import command_line, datasets, experiment, folders
from common.datasets import __main__ as datasets_program
from common.datasets import d4rl, mirrors, reference_scores
from common.envs import graphics
from common.experiment import config, show_config, wandb_mirror, wandb_settings


def refused(capsys, call, *args, **options):
    """The one line on which this call ends with code 2."""
    with pytest.raises(SystemExit) as leave:
        call(*args, **options)
    (line,) = capsys.readouterr().err.splitlines()
    assert leave.value.code == 2 and line.startswith("error: ")
    return line


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Arguments of a tiny run on an HDF5 file in the working directory."""
    monkeypatch.chdir(tmp_path)
    runs.write_hdf5(tmp_path / "data.hdf5")
    return ["--dataset", "data.hdf5", *runs.TINY]


# --- wandb --------------------------------------------------------------------------------------
@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """Start a Mirror with these variables; what it asked of wandb, a dict for each seed."""

    def start(variables, seeds=(0,), **flags):
        for name in [name for name in os.environ if name.startswith("WANDB")]:
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        asked = []
        fake = SimpleNamespace(
            init=lambda **options: (
                asked.append(options) or SimpleNamespace(log=print, finish=lambda: None)
            ),
            Settings=lambda **settings: settings,
            teardown=lambda: None,
        )
        monkeypatch.setitem(sys.modules, "wandb", fake)
        cfg = runs.module("rebrac").Config(dataset="x.hdf5", seeds=seeds)
        run = SimpleNamespace(cfg=cfg, options=config.Options(**flags), algorithm="rebrac")
        run.folder, run.origin = tmp_path, SimpleNamespace(code={})
        wandb_mirror.Mirror(run, {}).close()
        return asked

    return start


@pytest.mark.parametrize(
    ("variables", "flags", "mode"),
    [
        ({}, {}, "offline"),
        ({"WANDB_MODE": "online"}, {}, "online"),
        ({"WANDB_MODE": "offline"}, {}, "offline"),
        ({"WANDB_MODE": "disabled"}, {}, None),
        ({"WANDB_MODE": "dryrun"}, {}, "offline"),
        ({"WANDB_MODE": "run"}, {}, "online"),
        ({"WANDB_DISABLED": "true"}, {}, None),
        ({"WANDB_DISABLED": "false", "WANDB_MODE": "online"}, {}, "online"),
        ({"WANDB_MODE": "disabled"}, {"wandb": "offline"}, "offline"),
        ({"WANDB_MODE": "online"}, {"wandb": "disabled"}, None),
    ],
)
def test_the_mode_of_wandb(wandb, variables, flags, mode):
    asked = wandb(variables, **flags)
    assert [options["mode"] for options in asked] == ([] if mode is None else [mode])


@pytest.mark.parametrize(
    ("variables", "flags", "key", "values"),
    [
        ({}, {}, "project", ["atoll", "atoll"]),
        ({"WANDB_PROJECT": "mine"}, {}, "project", ["mine", "mine"]),
        ({"WANDB_PROJECT": "mine"}, {"wandb_project": "flag"}, "project", ["flag", "flag"]),
        ({}, {}, "entity", [None, None]),
        ({"WANDB_ENTITY": "team"}, {}, "entity", ["team", "team"]),
        ({"WANDB_ENTITY": "team"}, {"wandb_entity": "flag"}, "entity", ["flag", "flag"]),
        ({"WANDB_RUN_GROUP": "night"}, {}, "group", ["night", "night"]),
        ({"WANDB_NAME": "trial"}, {}, "name", ["trial/0", "trial/1"]),
        ({"WANDB_RUN_ID": "abc"}, {}, "id", ["abc-0", "abc-1"]),
        ({"WANDB_RESUME": "must"}, {}, "resume", ["must", "must"]),
        ({"WANDB_DIR": "/scratch"}, {}, "dir", ["/scratch", "/scratch"]),
    ],
)
def test_variables_of_wandb_go_before_our_choices(wandb, variables, flags, key, values):
    asked = wandb(variables, seeds=(0, 1), **flags)
    assert [options[key] for options in asked] == values


def test_one_seed_has_the_name_and_the_id_that_were_given(wandb):
    (asked,) = wandb({"WANDB_NAME": "trial", "WANDB_RUN_ID": "abc"})
    assert (asked["name"], asked["id"]) == ("trial", "abc")


@pytest.mark.parametrize("name", wandb_mirror.SETTINGS)
def test_settings_of_wandb_that_a_variable_makes_are_left_to_it(wandb, name):
    assert name in wandb({})[0]["settings"]
    assert name not in wandb({f"WANDB_{name.upper()}": "1"})[0]["settings"]


def test_an_unknown_mode_of_wandb_is_one_line(rows, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    argv = [word for word in rows if word not in ("--wandb", "disabled")]
    line = refused(capsys, runs.start, "rebrac", argv)
    assert "WANDB_MODE=sometimes" in line and "online, offline or disabled" in line
    assert not Path("runs").exists()


@pytest.mark.parametrize("by", ["command line", "Python"])
def test_a_sweep_agent_takes_one_seed(rows, monkeypatch, capsys, by):
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    two = runs.module("rebrac").Config(seeds=(0, 1))
    if by == "Python":
        line = refused(capsys, experiment.Run, two, config.Options(), None)
    else:
        argv = [word for word in rows if word not in ("--wandb", "disabled")]
        line = refused(capsys, runs.start, "rebrac", [*argv, "--seeds", "0", "1"])
    assert "--seeds 0 1" in line and "one seed" in line and "--wandb disabled" in line
    wandb_settings.check(two, config.Options(wandb="disabled"))  # the remedies
    wandb_settings.check(dataclasses.replace(two, seeds=(1,)), config.Options())


# --- JAX ----------------------------------------------------------------------------------------
PLATFORMS = """
import jax
import numpy as np
from jax.extend import backend
from common.experiment import devices, platforms
from common.experiment.config import Options
for asked in ("cuda", "rocm", "gpu", "tpu", "nonsense", "cuda,tpu", "cpu", "cuda,cpu", ""):
    backend.clear_backends()
    jax.config.update("jax_platforms", asked or None)
    try:
        try:
            platforms.prepare()
        except SystemExit:
            devices.place(np.zeros(1), Options())  # as a second start in this process, in Python
        print(f"{asked}: runs on {jax.devices()[0].platform}", flush=True)
    except SystemExit as leave:
        print(f"{asked}: {leave.code} {leave.__cause__}", flush=True)
"""


def test_a_platform_that_is_not_there_is_refused(tmp_path):
    """On a machine without accelerators: the tests hide them. Each is asked for twice."""
    environment = runs.environment(tmp_path, CUDA_VISIBLE_DEVICES="", TPU_SKIP_MDS_QUERY="1")
    del environment["JAX_PLATFORMS"]
    code, out, error = runs.call([sys.executable, "-c", PLATFORMS], tmp_path, environment)
    assert code == 0, error
    said = dict(line.split(": ", 1) for line in out.splitlines() if line.split(":")[0] != "WARNING")
    for asked in ("cuda", "rocm", "gpu", "tpu", "nonsense", "cuda,tpu"):
        assert said[asked].startswith(f"2 JAX_PLATFORMS={asked}"), out
        assert "JAX_PLATFORMS=cpu" in said[asked] and "\n" not in said[asked]
    assert said["cpu"] == said["cuda,cpu"] == said[""] == "runs on cpu"
    assert "JAX_PLATFORMS=cuda,cpu: there is no cuda here, so the CPU trains" in out


@pytest.mark.parametrize("name", runs.slow_but(NAMES, ["rebrac"]))
def test_runs_with_64_bits(rows, tmp_path, name, capsys):
    """A run, its resumption and its loading, where JAX_ENABLE_X64 is set."""
    if name in runs.DISCRETE:
        runs.write_cartpole(tmp_path / "data.hdf5")
    argv = ["--dataset", "data.hdf5", *runs.tiny(name), "--num-updates", "8"]
    with jax.enable_x64(True):
        scores = runs.start(name, argv)
        folder = runs.only_run("runs")
        assert "JAX_ENABLE_X64 is on" in capsys.readouterr().out
        assert json.loads((folder / "result.json").read_text())["x64"] is True
        metrics = (folder / "metrics.csv").read_text()
        forget(folder, 8)
        assert np.array_equal(runs.start(name, [*argv, "--resume"]), scores)
        assert "resuming at update 4" in capsys.readouterr().out
        assert (folder / "metrics.csv").read_text() == metrics
    *_, state = experiment.load(runs.module(name), folder)[:3]
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(state))


def forget(folder, update):
    """A run folder as if the run had been killed before this update, its last one."""
    import shutil

    shutil.rmtree(folder / "checkpoints" / str(update))
    (folder / "result.json").unlink()


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_goes_on_with_as_many_bits_as_it_began_with(rows, capsys, begun):
    argv = [*rows, "--num-updates", "8"]
    with jax.enable_x64(begun):
        scores = runs.start("rebrac", argv)
    folder = runs.only_run("runs")
    forget(folder, 8)
    before = runs.tree(folder)
    capsys.readouterr()
    with jax.enable_x64(not begun):
        line = refused(capsys, runs.start, "rebrac", [*argv, "--resume"])
        experiment.load(runs.module("rebrac"), folder)  # to act it needs no such thing
    remedy = f"JAX_ENABLE_X64={int(begun)}"
    assert remedy in line and "delete" not in line and "damaged" not in line
    assert {**runs.tree(folder), "config.yaml": before["config.yaml"]} == before
    with jax.enable_x64(begun):
        assert np.array_equal(runs.start("rebrac", [*argv, "--resume"]), scores)


def test_the_folder_of_the_compilation_cache_is_the_one_that_was_set(monkeypatch):
    """By a variable, else by Python; an empty variable sets none."""
    from common.experiment import platforms

    updated = {}
    monkeypatch.setattr(jax.config, "update", updated.__setitem__)
    for value, expected in (("/mine", "/mine"), ("", None)):
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", value)
        platforms.cache_programs()
        assert updated["jax_compilation_cache_dir"] == expected
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    platforms.cache_programs()
    assert updated["jax_compilation_cache_dir"] == jax.config.jax_compilation_cache_dir is not None


@pytest.mark.parametrize("name", ["MIN_COMPILE_TIME_SECS", "MIN_ENTRY_SIZE_BYTES"])
def test_variables_of_the_compilation_cache_are_left_alone(monkeypatch, name):
    from common.experiment import platforms

    updated = {}
    monkeypatch.setattr(jax.config, "update", updated.__setitem__)
    platforms.cache_programs()
    assert f"jax_persistent_cache_{name.lower()}" in updated
    updated.clear()
    monkeypatch.setenv(f"JAX_PERSISTENT_CACHE_{name}", "1")
    platforms.cache_programs()
    assert f"jax_persistent_cache_{name.lower()}" not in updated


# --- MuJoCo's graphics --------------------------------------------------------------------------
@pytest.mark.parametrize(
    "error",
    [
        AttributeError("'NoneType' object has no attribute 'glGetError'"),
        ImportError("Cannot initialize a EGL device display"),
        RuntimeError("invalid value for environment variable MUJOCO_GL"),
        OSError("libOSMesa.so: cannot open shared object file"),
        ModuleNotFoundError("No module named 'OpenGL'", name="OpenGL"),
    ],
)
@pytest.mark.parametrize("library", ["egl", "osmesa", "glfw", "wrong"])
def test_a_missing_graphics_library_is_one_line(monkeypatch, capsys, error, library):
    def fails(name):
        raise error

    monkeypatch.setenv("MUJOCO_GL", library)
    monkeypatch.setattr(graphics.importlib, "import_module", fails)
    line = refused(capsys, graphics.check)
    assert f"MUJOCO_GL={library}" in line and "egl" in line and "delete" not in line


def test_without_mujoco_nothing_is_said_of_graphics(monkeypatch):
    def fails(name):
        raise ModuleNotFoundError("No module named 'mujoco'", name="mujoco")

    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.setattr(graphics.importlib, "import_module", fails)
    graphics.check()
    monkeypatch.delenv("MUJOCO_GL")
    graphics.check()


# --- Home folders -------------------------------------------------------------------------------
def test_compiled_programs_have_a_place_without_a_home(monkeypatch, tmp_path):
    """A container's user may have no home, one that cannot be written, or a file in its place."""
    monkeypatch.setattr(folders.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert folders.compiled_programs() == tmp_path / "home" / ".cache" / "atoll" / "xla"
    private = tmp_path / f"atoll-{os.getuid()}" / "xla"
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert folders.compiled_programs() == private
    monkeypatch.setattr(folders.os.path, "expanduser", lambda path: path)  # no such user
    assert folders.compiled_programs() == private
    assert private.stat().st_mode & 0o077 == 0 and private.parent.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(folders.os, "getuid", lambda: private.stat().st_uid + 1)  # of another user
    (tmp_path / f"atoll-{os.getuid()}").mkdir()
    assert folders.compiled_programs() is None


@pytest.mark.parametrize(
    ("folder", "variable"),
    [
        (folders.minari, "MINARI_DATASETS_PATH"),
        (folders.ogbench, "OGBENCH_DATASET_DIR"),
        (folders.d4rl, "D4RL_DATASET_DIR"),
    ],
)
def test_a_data_folder_without_a_home_is_one_line(monkeypatch, capsys, folder, variable):
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(folders.os.path, "expanduser", lambda path: path)
    assert variable in refused(capsys, folder)
    monkeypatch.setenv(variable, "/data")  # the remedy
    assert folder() == Path("/data")


def test_a_tilde_is_the_home_folder(rows, monkeypatch, tmp_path, capsys):
    """Flags written with `=`, and Python, have no shell that replaces it."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    Path("data.hdf5").rename(tmp_path / "home" / "data.hdf5")
    (tmp_path / "home" / "my.yaml").write_text("discount: 0.5\n")
    argv = [*rows[2:], "--dataset=~/data.hdf5", "--config=~/my.yaml", "--num-updates", "4"]
    runs.start("rebrac", [*argv, "--runs-dir=~/runs", "--name", "a"])
    folder = tmp_path / "home" / "runs" / "rebrac" / "data" / "a"
    assert (folder / "result.json").exists() and not Path("~").exists()
    cfg = experiment.load(runs.module("rebrac"), "~/runs/rebrac/data/a")[0]
    assert cfg.discount == 0.5
    more = ["--dataset=~/data.hdf5", "--start-from=~/runs/rebrac/data/a", "--runs-dir=~/runs"]
    assert config.parse(runs.module("rebrac").Config, more)[1].start_from == str(folder)
    Path("more.yaml").write_text("start_from: ~/runs/rebrac/data/a\n")
    _, options = config.parse(runs.module("rebrac").Config, [more[0], "--config=more.yaml"])
    assert options.start_from == str(folder) == config.Options(start_from=str(folder)).start_from
    line = refused(capsys, config.runs_dir, config.Options(runs_dir="~no-such-user/runs"))
    assert "--runs-dir ~no-such-user/runs" in line


def test_a_tilde_in_the_words_of_a_program(rows, monkeypatch, tmp_path):
    """The programs of common/ and the report start by `command_line.run`."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.setattr(command_line.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["program", "data.hdf5", "--plot=~/look.png"])
    command_line.run(datasets_program.main)
    assert (tmp_path / "home" / "look.png").exists() and not Path("~").exists()
    assert command_line.at_home("--where=a=~/b") == "--where=a=~/b"
    assert command_line.at_home("x=~/b") == "x=~/b"


PROGRAMS = [
    str(file.relative_to(runs.ROOT))
    for room in ("benchmarks", "common")
    for file in sorted((runs.ROOT / room).rglob("*.py"))
    if 'if __name__ == "__main__":' in file.read_text()
    and file.stem not in ("peer_d3rlpy", "peers")  # run where common/ is not installed
]


def test_the_programs_are_found():
    assert len(PROGRAMS) >= 13
    assert {"benchmarks/soak.py", "benchmarks/report.py", "common/recipes/__main__.py"} <= {
        *PROGRAMS
    }


@pytest.mark.parametrize("file", PROGRAMS)
def test_every_program_survives_a_closed_pipe(file):
    """Each starts by command_line.py, whose functions test_output.py tests."""
    end = (runs.ROOT / file).read_text().partition('if __name__ == "__main__":')[2]
    first = end.split()[0]
    assert first.startswith(("command_line.run(", "command_line.outlive_the_reader("))


# --- Mirrors ------------------------------------------------------------------------------------
@pytest.fixture
def no_mirror(monkeypatch):
    """No mirror is named, and what a flag sets is undone. The original server has nothing."""
    for variable in (mirrors.D4RL, mirrors.OGBENCH):
        monkeypatch.setenv(variable, "")
    monkeypatch.setattr(d4rl, "SERVERS", ("file:///nowhere/",))


@pytest.mark.parametrize("by", ["flag", "Python"])
def test_a_run_downloads_from_the_mirror_of_its_flag(no_mirror, rows, monkeypatch, tmp_path, by):
    pytest.importorskip("mujoco")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "data"))
    (tmp_path / "copies").mkdir()
    columns = {"observations": np.ones((60, 11)), "actions": np.zeros((60, 3))}
    runs.write_hdf5(tmp_path / "copies" / "hopper_medium-v2.hdf5", attributes={}, **columns)
    url = (tmp_path / "copies").as_uri()
    argv = ["--dataset", "hopper-medium-v2", *rows[2:], "--num-updates", "4", "--env-steps", "3"]
    if by == "flag":
        runs.start("bc", [*argv, "--mirror", url, "--name", "a"])
        assert "mirror" not in (tmp_path / "runs/bc/hopper-medium-v2/a/config.yaml").read_text()
    else:
        config.Options(mirror=url)
        assert len(datasets.load("hopper-medium-v2").transitions.reward)
    assert (tmp_path / "data" / "hopper_medium-v2.hdf5").exists()


def test_show_config_names_the_mirror_and_its_source(no_mirror, monkeypatch):
    assert datasets.mirror(None) == (None, "default")
    assert datasets.mirror("file:///x") == ("file:///x", "command line")
    monkeypatch.setenv(mirrors.D4RL, "http://a/b")
    assert datasets.mirror(None) == ("http://a/b", mirrors.D4RL)
    monkeypatch.setenv(mirrors.OGBENCH, "http://c")
    assert datasets.mirror(None)[1] == f"{mirrors.D4RL} {mirrors.OGBENCH}"


# --- Python -------------------------------------------------------------------------------------
BAD = [
    ("rebrac", {"num_updates": 10, "log_every": 4}, "is no multiple of --log-every 4"),
    ("rebrac", {"eval_every": 1500}, "is no multiple of --log-every 1000"),
    ("rebrac", {"num_updates": 0}, "at least 1"),
    ("rebrac", {"log_every": -4}, "at least 1"),
    ("rebrac", {"eval_episodes": 0}, "at least 1"),
    ("rebrac", {"batch_size": 0}, "at least 1"),
    ("rebrac", {"seeds": ()}, "at least one seed"),
    ("rebrac", {"seeds": (1, 1)}, "none twice"),
    ("rebrac", {"seeds": (-1,)}, "seeds go from 0"),
    ("rebrac", {"seeds": (2**32,)}, "seeds go from 0"),
    ("rebrac", {"hidden": ()}, "at least one hidden layer"),
    ("rebrac", {"hidden": (0,)}, "at least 1"),
    ("rebrac", {"discount": 1.5}, "from 0 to 1"),
    ("rebrac", {"target_rate": float("nan")}, "finite"),
    ("rebrac", {"actor_learning_rate": float("inf")}, "finite"),
    ("rebrac", {"critic_learning_rate": 0.0}, "above 0"),
    ("rebrac", {"actor_penalty": -0.1}, "0 or more"),
    ("rebrac", {"target_noise": -0.2}, "0 or more"),
    ("td3_bc", {"log_every": 5, "policy_delay": 2}, "is no multiple of"),
    ("iql", {"expectile": 1.0}, "between 0 and 1"),
    ("iql", {"inverse_temperature": -3.0}, "0 or more"),
    ("bc", {"fraction": 0.0}, "above 0"),
    ("atac", {"residual": 1.5}, "from 0 to 1"),
    ("awr", {"max_weight": -1.0}, "above 0"),
    ("bcq", {"lam": -0.1}, "from 0 to 1"),
    ("cql", {"alpha": -5.0}, "0 or more"),
    ("dt", {"num_heads": 3}, "is no multiple of --num-heads 3"),
    ("dt", {"context": 0}, "at least 1"),
    ("idql", {"weight_decay": -0.5}, "0 or more"),
    ("ivr", {"sql_alpha": 0.0}, "above 0"),
    ("odice", {"lam": 1.2}, "from 0 to 1"),
    ("qc", {"horizon": 0}, "at least 1"),
    ("xql", {"huber_delta": -20.0}, "above 0"),
    ("rebrac", {"num_updates": 2**40 * 1000}, "below 2,147,483,648"),
    ("rebrac", {"hidden": (2**40,)}, "below 2,147,483,648"),
    ("rebrac", {"actor_penalty": 1e39}, "finite"),
    ("iql", {"inverse_temperature": 1e308}, "finite"),
    ("rebrac", {"num_updates": 1e6}, "a whole number, not float"),
    ("rebrac", {"batch_size": "8"}, "a whole number, not str"),
    ("rebrac", {"eval_episodes": True}, "a whole number, not bool"),
    ("rebrac", {"discount": "0.9"}, "a number, not str"),
    ("rebrac", {"discount": np.float32(0.9)}, "a number, not float32"),
    ("rebrac", {"seeds": np.arange(2)}, "a tuple"),
    ("rebrac", {"seeds": 3}, "a tuple"),
    ("rebrac", {"hidden": (8.5,)}, "each part a whole number, not tuple of float"),
    ("rebrac", {"dataset": None}, "text"),
    ("iql", {"extraction": "sometimes"}, "one of"),
    ("iql", {"cosine": 1}, "True or False"),
    ("mopo", {"model_decays": (-1e-4, 1e-4, 0.0, 0.0, 0.0)}, "0 or more"),
    ("mopo", {"model_hidden": ()}, "at least one hidden layer"),
    ("mobile", {"num_models": 0}, "at least 1"),
    ("trajectory_transformer", {"num_bins": 1}, "at least 2"),
]


@pytest.mark.parametrize(("name", "values", "says"), BAD)
def test_a_config_made_in_python_is_checked(capsys, name, values, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = dataclasses.replace(runs.module(name).Config(dataset="data.hdf5"), **values)
    line = refused(capsys, experiment.Run, cfg, config.Options(), None)
    assert says in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"save_seconds": -1.0}, "--save-seconds"),
        ({"save_seconds": float("nan")}, "--save-seconds"),
        ({"wandb": "sometimes"}, "--wandb sometimes"),
        ({"data": "disk"}, "--data disk"),
        ({"resume": "yes"}, "--resume yes"),
        ({"devices": 1.0}, "--devices 1.0"),
        ({"devices": 0}, "--devices 0"),
        ({"env_steps": "7"}, "--env-steps 7"),
        ({"name": "../x"}, "--name"),
        ({"runs_dir": "~nobody-here/x"}, "--runs-dir"),
        ({"config": "more.yaml"}, "--config more.yaml: only experiment.parse heeds it"),
        ({"distributed": "a:80/2/0"}, "--distributed a:80/2/0: only experiment.parse heeds it"),
    ],
)
def test_options_made_in_python_are_checked(capsys, values, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = runs.module("rebrac").Config(dataset="data.hdf5")
    assert says in refused(capsys, experiment.Run, cfg, config.Options(**values), None)
    assert not list(tmp_path.iterdir())


def impossible(kind):
    """Values of no run for a field of this type: of another type, and of its own."""
    parts = [part for part in (*typing.get_args(kind), kind) if part is not type(None)]
    own = {int: [-1, 2**32], float: [float("nan"), 1e39], str: [], bool: []}
    for part in (int, float, str, bool):
        if part is parts[0]:
            several = typing.get_origin(kind) is tuple
            return [b"", *((x,) if several else x for x in own[part])]
    return [b"", "?"]  # a choice


@pytest.mark.parametrize("name", NAMES)
def test_train_called_from_python_refuses_in_one_line(name, capsys, tmp_path, monkeypatch):
    """Of every field, before anything else in `train`, which such a value would break."""
    monkeypatch.chdir(tmp_path)
    algorithm, options = runs.module(name), config.Options(wandb="disabled")
    default = algorithm.Config(dataset="there-is-none.hdf5")
    for field in dataclasses.fields(default):
        for value in impossible(field.type):
            cfg = dataclasses.replace(default, **{field.name: value})
            line = refused(capsys, algorithm.train, cfg, options)
            assert line.startswith(f"error: --{field.name.replace('_', '-')} "), (value, line)
    bad = dataclasses.replace(options, save_seconds=-1.0)
    assert "--save-seconds" in refused(capsys, algorithm.train, default, bad)
    assert "no such file" in refused(capsys, algorithm.train, default, options)


@pytest.mark.parametrize("kind", ["two seeds", "no env"])
def test_a_finished_run_returns_its_scores_again(rows, capsys, kind):
    if kind == "no env":
        runs.write_hdf5("data.hdf5", attributes={}, actions=np.zeros((60, 1)))
    algorithm = runs.module("rebrac")
    argv = [*rows, "--num-updates", "8", "--seeds", "0", "1"]
    first = runs.start("rebrac", argv)
    before = capsys.readouterr().out.splitlines()
    cfg, options = config.parse(algorithm.Config, [*argv, "--resume"])
    capsys.readouterr()
    again = algorithm.train(cfg, options)
    after = capsys.readouterr().out.splitlines()
    assert np.array_equal(first, again, equal_nan=True) and len(again) == 2
    assert np.isnan(again).all() == (kind == "no env")
    assert after[-1] == before[-1] and after[-2] == "finished before"
    assert not [line for line in after if line.startswith("evaluation:")]


# --- --show-config ------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_show_config_prints_every_value_and_its_source(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    algorithm = runs.module(name)
    argv = ["--dataset", "hopper-medium-v2", "--seeds", "3", "4", "--env-steps=7"]
    if name in runs.DISCRETE:
        argv[1] = "local/cartpole/mixed-v0"
    with pytest.raises(SystemExit) as leave:
        runs.start(name, [*argv, "--show-config"])
    assert leave.value.code == 0 and not list(tmp_path.iterdir())
    out = capsys.readouterr().out
    cfg, options = config.parse(algorithm.Config, argv)
    lines = {line.lstrip("# ").split(":")[0]: line for line in out.splitlines()}
    for field in dataclasses.fields(algorithm.Config):
        source = lines[field.name].split("  # ")[-1]
        given = field.name in ("dataset", "seeds")
        changed = getattr(cfg, field.name) != field.default
        expected = ["command line"] if given else ["default"] if not changed else ["yaml"]
        assert any(word in source for word in [*expected, f"configs/{name}"]), lines[field.name]
    for field in dataclasses.fields(options):
        assert field.name in lines or field.name in ("config", "show_config")
    Path("shown.yaml").write_text(out)  # what is printed is a config file
    again, more = config.parse(algorithm.Config, ["--config", "shown.yaml"])
    assert again == cfg and more.env_steps == 7


def test_show_config_tells_file_row_and_command_line_apart(capsys, monkeypatch):
    monkeypatch.chdir(runs.ROOT)
    argv = ["--dataset", "hopper-medium-v2", "--batch-size", "8", "--show-config"]
    with pytest.raises(SystemExit):
        runs.start("rebrac", argv)
    lines = capsys.readouterr().out.splitlines()
    source = {line.split(":")[0]: line.split("  # ")[-1] for line in lines[1:]}
    assert source["batch_size"] == source["dataset"] == "command line"
    assert source["actor_penalty"] == "configs/rebrac/mujoco.yaml, row hopper-medium-v2"
    assert source["discount"] == "default"
    with pytest.raises(SystemExit):
        runs.start("iql", ["--dataset", "antmaze-large-play-v2", "--show-config"])
    lines = capsys.readouterr().out.splitlines()
    source = {line.split(":")[0]: line.split("  # ")[-1] for line in lines[1:]}
    assert source["expectile"] == "configs/iql/antmaze.yaml" and source["discount"] == "default"


@pytest.mark.parametrize(
    "dataset",
    ["antmaze-large-play-v2", "cube-single-play-singletask-v0", "mujoco/hopper/medium-v0"],
)
def test_show_config_needs_no_data(capsys, dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for variable in ("MINARI_DATASETS_PATH", "OGBENCH_DATASET_DIR", "D4RL_DATASET_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "none"))
    with pytest.raises(SystemExit) as leave:
        runs.start("iql", ["--dataset", dataset, "--show-config"])
    assert leave.value.code == 0 and f"dataset: {dataset}" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [(), None, 1e-5, "a: b # c", True, (1, 2), -0.5, "null"])
def test_shown_values_are_yaml(value):
    read = yaml.safe_load(f"key: {show_config._yaml(value)}  # a comment")["key"]
    assert read == (list(value) if isinstance(value, tuple) else value)


# --- Names of D4RL without their version --------------------------------------------------------
def test_every_name_of_d4rl_without_its_version_says_which_there_are(capsys):
    names = [name for name in reference_scores.table() if name.rpartition("-v")[2].isdigit()]
    assert len(names) > 60
    for name in names:
        bare = name.rpartition("-v")[0]
        line = refused(capsys, datasets.refuse_missing_version, bare)
        assert repr(bare) in line and name in line
        datasets.refuse_missing_version(name)  # the remedy


def test_a_file_of_that_name_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("hopper-medium").touch()
    datasets.refuse_missing_version("hopper-medium")


@pytest.mark.parametrize("name", ["mopo", "combo", "morel", "mobile"])
def test_dynamics_are_not_fitted_to_one_row(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    known = {"next_observations": np.zeros((1, 3))}
    argv = ["--dataset", runs.write_hdf5("data.hdf5", rows=1, **known), *runs.tiny(name)]
    with pytest.raises(SystemExit) as leave:
        runs.start(name, argv)
    said = capsys.readouterr().err
    assert leave.value.code == 2
    assert said == (
        "error: data.hdf5: one row is too few, since the fit of the dynamics holds one out\n"
    )

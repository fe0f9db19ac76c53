# SPDX-License-Identifier: Apache-2.0
"""Runs: what they leave behind, and that neither death nor company changes a number."""

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import compiler_flags
import h5py
import helpers_runs as runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from common import evaluation, experiment, machine
from common.experiment import checkpoints, config, origin, provenance, records, timing

SEEDS = ["--seeds", "0", "1"]
BORDERS = [0, 4, 8, 12, 16, 20, 24]
EVALUATIONS = [0, 8, 16, 24]


@pytest.fixture(scope="session")
def base(tmp_path_factory, compilation_cache):
    """What the runs of a session share: a data file and the compilation cache of all tests."""
    folder = tmp_path_factory.mktemp("base")
    runs.write_hdf5(folder / "data.hdf5")
    (folder / "cache").symlink_to(compilation_cache)
    return folder


@pytest.fixture(params=runs.ALGORITHMS)
def name(request):
    return request.param


@pytest.fixture
def tiny(base, tmp_path, monkeypatch):
    """Arguments of a tiny run; the working directory is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(base / "cache"))
    return ["--dataset", str(base / "data.hdf5"), *runs.TINY]


@pytest.fixture(scope="session")
def reference(base, tmp_path_factory):
    """Folder of the undisturbed run of two seeds, as a command of its own; one per algorithm."""
    made = {}

    def run(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            argv = ["--dataset", str(base / "data.hdf5"), *runs.TINY, *SEEDS]
            words = runs.command(name, argv)
            code, _, error = runs.call(words, folder, runs.environment(base / "cache"))
            assert code == 0, error
            made[name] = runs.only_run(folder)
        return made[name]

    return run


def metrics(folder):
    return (folder / "metrics.csv").read_text()


def parameters(name, folder):
    """Every number of the newest checkpoint."""
    _, _, state = experiment.load(runs.module(name), folder)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def copy_of(folder, name):
    """A copy of a run folder below this working directory, where the same command finds it."""
    return Path(shutil.copytree(folder, Path("runs") / name / "data" / folder.name))


def run(name, argv, expected=0):
    """A run in this process; its folder."""
    code = 0
    try:
        runs.start(name, argv)
    except SystemExit as leave:
        code = leave.code
    assert code == expected
    return runs.only_run("runs" if "--runs-dir" not in argv else argv[-1])


# --- What a run leaves behind -------------------------------------------------------------------
def test_run_folder(name, tiny, reference):
    folder = reference(name)
    rows = runs.read_csv(folder / "metrics.csv")
    header = list(rows[0])
    assert header[:2] == ["update", "seed"]
    assert header[-4:] == ["score", "return", "success", "length"]
    assert not [word for word in header if "second" in word or "time" in word]
    assert [(int(row["update"]), int(row["seed"])) for row in rows] == [
        (border, seed) for border in BORDERS for seed in (0, 1)
    ]
    for row in rows:
        losses = [row[word] for word in header[2:-4]]
        assert all(x == "" if row["update"] == "0" else np.isfinite(float(x)) for x in losses)
        evaluated = int(row["update"]) in EVALUATIONS
        assert all((row[word] != "") == evaluated for word in ("score", "return", "length"))
        assert row["success"] == ""  # Pendulum reports none
        if evaluated:
            assert float(row["score"]) == pytest.approx(float(row["return"]) + 100, abs=1e-4)
            assert row["length"] == "10"
    assert metrics(folder).endswith("\n") and "nan" not in metrics(folder)

    timing = runs.read_csv(folder / "timing.csv")
    assert [int(row["update"]) for row in timing] == BORDERS
    assert float(timing[-1]["train_seconds"]) > 0 < float(timing[-1]["eval_seconds"])
    saving = [float(row["checkpoint_seconds"]) for row in timing]
    assert saving[0] > 0 and np.all(np.diff(saving) > 0)  # one at every chunk boundary here

    values = yaml.safe_load((folder / "config.yaml").read_text())
    assert values["seeds"] == [0, 1] and values["hidden"] == [8]
    assert values["record"]["env"] == "Pendulum-v1"

    result = json.loads((folder / "result.json").read_text())
    last = {row["seed"]: float(row["score"]) for row in rows[-2:]}
    assert result["score"] == pytest.approx(last)
    for seed in ("0", "1"):
        scores = [float(row["score"]) for row in rows if row["seed"] == seed and row["score"]]
        assert result["best_score"][seed] == pytest.approx(max(scores[1:]))  # not the untrained
    assert result["score_mean"] == pytest.approx(np.mean([*last.values()]))
    assert result["score_std"] == pytest.approx(np.std([*last.values()]))
    assert result["versions"]["jax"] == jax.__version__
    assert result["algorithm"] == name and result["diverged"] == {}
    assert {"hardware", "matmul_precision", "updates_per_second", "eval_share"} <= set(result)
    assert result["checkpoint_seconds"] == round(saving[-1], 1)
    assert len(list((folder / "checkpoints").iterdir())) == 2
    assert {path.name for path in folder.iterdir()} == {
        *("config.yaml", "metrics.csv", "timing.csv", "checkpoints", "result.json", ".lock")
    }


def test_the_config_of_a_run_starts_the_same_run(name, tiny, reference):
    before = reference(name)
    argv = ["--config", str(before / "config.yaml"), "--wandb", "disabled"]
    folder = run(name, argv)
    assert folder.name == before.name  # the hash of an equal config
    assert metrics(folder) == metrics(before)


def test_the_name_of_another_run_is_refused_with_what_differs(name, tiny, reference, capsys):
    """The first remedy works with and without --resume."""
    folder = copy_of(reference(name), name)
    argv = [*tiny, "--seeds", "0", "2"]
    for more in ([], ["--resume"]):
        run(name, [*argv, "--name", folder.name, *more], expected=2)
        line = capsys.readouterr().err
        assert f"{folder.name} has seeds [0, 1], not [0, 2]; choose another --name" in line
    config_of = runs.module(name).Config
    assert config.run_folder(*config.parse(config_of, [*argv, "--name", "another"]))
    run(name, [*tiny, *SEEDS, "--name", folder.name], expected=2)
    assert "exists; continue it with --resume" in capsys.readouterr().err


def test_training_without_an_env(name, tiny, capsys):
    runs.write_hdf5("plain.hdf5", actions=np.zeros((60, 1)), attributes={})
    folder = run(name, [*tiny, "--dataset", "plain.hdf5"])
    rows = runs.read_csv(folder / "metrics.csv")
    assert [int(row["update"]) for row in rows] == BORDERS
    assert {row["score"] for row in rows} == {""} and rows[1]["critic_loss"]
    result = json.loads((folder / "result.json").read_text())
    assert result["score"] == result["best_score"] == {"0": None}
    assert "scores stay empty" in capsys.readouterr().out


def test_load_and_act(name, tiny, reference):
    folder, algorithm = reference(name), runs.module(name)
    cfg, dataset, state = experiment.load(algorithm, folder)
    before = runs.tree(folder)
    params = algorithm.policy_params(state)
    key = jax.random.key(0)
    env = dataset.make_env()
    observation, _ = env.reset(seed=0)
    one = jax.tree.map(lambda x: x[0], params)
    action = algorithm.policy(state.actor.apply_fn, one, observation, key)
    observation, reward, *_ = env.step(np.asarray(action))
    assert np.abs(action).max() <= 1 and np.isfinite(reward)

    def act(*args):
        return algorithm.policy(state.actor.apply_fn, *args)

    keys = experiment.streams(cfg.seeds, 3)[2]
    with evaluation.Rollouts(dataset, act, keys, cfg) as rollouts:
        returns = rollouts.run(params, cfg.num_updates)["return"]
    rows = runs.read_csv(folder / "metrics.csv")[-2:]
    assert [f"{x:.9g}" for x in returns] == [row["return"] for row in rows]
    assert runs.tree(folder) == before


def test_loading_changes_nothing_in_a_damaged_run(name, tiny, reference, capsys):
    folder = copy_of(reference(name), name)
    for checkpoint in (folder / "checkpoints").iterdir():
        damage_files(checkpoint)
    before = runs.tree(folder)
    with pytest.raises(SystemExit) as leave:
        experiment.load(runs.module(name), folder)
    assert leave.value.code == 2
    assert "no checkpoint can be read" in capsys.readouterr().err
    assert runs.tree(folder) == before


def test_between_evaluations_a_checkpoint_waits_for_its_time(
    name, tiny, reference, monkeypatch, capsys
):
    """This short run has those of its evaluations alone, and one where a signal ends it."""
    seldom = [*tiny, "--seeds", "0", "1", "--save-seconds", "1000", "--resume"]
    original = experiment.Run.log

    def dying(self, step, *args):
        if step == 12:
            raise Stop
        original(self, step, *args)

    def told(self, step, *args):
        original(self, step, *args)
        if step == 8:
            self.signals.number = signal.SIGTERM  # as if it had come

    with monkeypatch.context() as patch:
        patch.setattr(experiment.Run, "log", dying)
        with pytest.raises(Stop):
            runs.start(name, seldom)
        folder = runs.only_run("runs")
        assert sorted(int(x.name) for x in (folder / "checkpoints").iterdir()) == [0, 8]
        patch.setattr(experiment.Run, "log", told)
        capsys.readouterr()
        run(name, seldom, expected=128 + signal.SIGTERM)
        out = capsys.readouterr().out
        assert "resuming at update 8" in out and "saved at update 12" in out
    run(name, seldom)
    assert "resuming at update 12" in capsys.readouterr().out
    assert metrics(folder) == metrics(reference(name))


# --- Same numbers in any company ----------------------------------------------------------------
def test_every_seed_has_its_own_numbers(name, tiny, fused_as_users):
    together = run(name, [*tiny, "--seeds", "0", "1", "2", "3", "--runs-dir", "together"])
    lines = {seed: runs.seed_lines(together / "metrics.csv", seed) for seed in range(4)}
    assert len({tuple(row[1:]) for row in lines.values()}) == 4
    for seed in (0, 3):
        alone = run(name, [*tiny, "--seeds", str(seed), "--runs-dir", f"alone{seed}"])
        assert runs.seed_lines(alone / "metrics.csv", seed) == lines[seed]
    other = run(name, [*tiny, "--seeds", "3", "0", "2", "1", "--runs-dir", "other"])
    for seed in range(4):
        assert runs.seed_lines(other / "metrics.csv", seed) == lines[seed]
    for leaf, swapped in zip(parameters(name, together), parameters(name, other), strict=True):
        np.testing.assert_array_equal(leaf[[3, 0, 2, 1]], swapped)


def test_length_of_a_chunk_changes_nothing(name, tiny):
    four = run(name, [*tiny, "--runs-dir", "four"])
    scores = [row["score"] for row in runs.read_csv(four / "metrics.csv") if row["score"]]
    eight = run(name, [*tiny, "--log-every", "8", "--runs-dir", "eight"])
    for one, two in zip(parameters(name, four), parameters(name, eight), strict=True):
        np.testing.assert_array_equal(one, two)
    rows = runs.read_csv(eight / "metrics.csv")
    assert [row["score"] for row in rows if row["score"]] == scores


def simulated(count):
    """The variable of a command that sees so many CPU devices."""
    flag = f"--xla_force_host_platform_device_count={count}"
    return {"XLA_FLAGS": compiler_flags.as_users(flag)}


def test_simulated_devices(name, tiny, base, tmp_path, fused_as_users):
    """Eight devices give the metrics of one, also when four go on after the run's death."""
    seeds = ["--seeds", *map(str, range(8))]
    one = run(name, [*tiny, *seeds, "--runs-dir", "one"])
    argv = [*tiny, *seeds, "--resume", "--runs-dir", "many"]
    starts = [(argv, "after save 16", simulated(8)), (argv, None, simulated(4))]
    killed, resumed = runs.calls(name, starts, tmp_path, runs.environment(base / "cache"))
    assert killed[0] == -signal.SIGKILL, killed
    code, out, error = resumed
    assert code == 0, error
    assert "resuming at update 16" in out
    assert "begun on 8 x cpu, resumed on 4 x cpu" in error
    assert metrics(runs.only_run("many")) == metrics(one)
    result = json.loads((runs.only_run("many") / "result.json").read_text())
    assert result["hardware"].startswith("8 x cpu, then 4 x cpu; ")


BATCHES = [("rebrac", 4, 1), pytest.param("rebrac", 4, 4, marks=runs.SLOW)]
BATCHES += [pytest.param(name, 2, 2, marks=runs.SLOW) for name in ("rebrac", "dt", "qc", "cql")]


@pytest.mark.parametrize(("name", "count", "after"), BATCHES)
def test_devices_share_the_batches_of_one_seed(name, tiny, base, tmp_path, count, after):
    """Nearly the numbers of one device, sums in another order; resumed on `after` devices, too."""
    argv = [*tiny[:2], *runs.tiny(name), "--log-every", "8"]
    run(name, [*argv, "--runs-dir", "one"])
    argv += ["--resume", "--runs-dir", "many", "--devices"]
    starts = [([*argv, str(after)], None, simulated(after))]
    if count != after:
        starts.insert(0, ([*argv, str(count)], "after save 8", simulated(count)))
    *killed, last = runs.calls(name, starts, tmp_path, runs.environment(base / "cache"))
    assert all(code == -signal.SIGKILL for code, _, _ in killed), killed
    code, out, error = last
    assert code == 0, error
    assert ("resuming at update 8" in out) == (count != after)
    assert (f"begun on {count} x cpu, resumed on {after} x cpu" in error) == (count != after)
    rows = [runs.read_csv(runs.only_run(x) / "metrics.csv") for x in ("one", "many")]
    for mine, other in zip(*rows, strict=True):
        for key, value in mine.items():
            if value:
                assert float(other[key]) == pytest.approx(float(value), rel=1e-3, abs=1e-4), key


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--devices", "2"], "JAX sees 1"),
        (["--devices", "0"], "at least 1"),
    ],
)
def test_devices_that_are_not_there(tiny, words, says, capsys):
    with pytest.raises(SystemExit) as leave:
        runs.start("rebrac", [*tiny, *words])
    assert leave.value.code == 2 and says in capsys.readouterr().err
    assert not Path("runs").exists()


# --- Death and resuming -------------------------------------------------------------------------
DEATHS = ("start", "in save 4", "after save 8", "in log 16", "before save 24")


def test_killed_and_resumed(name, tiny, base, reference, tmp_path):
    """One run that SIGKILL meets five times, each time followed by the same with --resume."""
    argv = [*tiny, *SEEDS, "--resume"]
    starts = [(argv, point, {}) for point in (*DEATHS, None)]
    ends = runs.calls(name, starts, tmp_path, runs.environment(base / "cache"))
    for point, (code, out, error) in zip(DEATHS, ends[:-1], strict=True):
        assert code == -signal.SIGKILL, f"{point}: {error}"
        assert "final score" not in out and "finished before" not in out
    code, out, error = ends[-1]
    assert code == 0, error
    assert "resuming at update 20" in out  # so none of them left a result.json
    assert metrics(runs.only_run("runs")) == metrics(reference(name))


class Stop(Exception):
    pass


def test_stopped_at_every_border(name, tiny, reference, monkeypatch):
    """Before and after each save and after each log; every start gets one step further."""
    points = [
        (method, when, border)
        for border in (0, 4, 8, 24)
        for method, when in (("save", "before"), ("save", "after"), ("log", "after"))
    ]
    for method, when, border in points:
        original = getattr(experiment.Run, method)

        def stopping(self, step, *args, original=original, when=when, border=border):
            if step == border and when == "before":
                raise Stop
            original(self, step, *args)
            if step == border:
                raise Stop

        with monkeypatch.context() as patch:
            patch.setattr(experiment.Run, method, stopping)
            with pytest.raises(Stop):
                runs.start(name, [*tiny, *SEEDS, "--resume"])
    folder = run(name, [*tiny, *SEEDS, "--resume"])
    assert metrics(folder) == metrics(reference(name))
    again = run(name, [*tiny, *SEEDS, "--resume"])  # of a finished run
    assert metrics(again) == metrics(reference(name))
    timing = runs.read_csv(folder / "timing.csv")
    assert [int(row["update"]) for row in timing] == BORDERS
    result = json.loads((folder / "result.json").read_text())
    before = json.loads((reference(name) / "result.json").read_text())
    assert (result["score"], result["best_score"]) == (before["score"], before["best_score"])


@pytest.mark.parametrize(("cost", "between"), [(0, [4, 12, 20]), (1e6, [])])
def test_checkpoints_that_take_long_are_made_seldom(cost, between, name, tiny, monkeypatch):
    """Without --save-seconds, the next one is due after so many times what the last one took."""
    saved, original = [], checkpoints.save

    def save(manager, step, *rest):
        saved.append(step)
        original(manager, step, *rest)

    monkeypatch.setattr(checkpoints, "save", save)
    monkeypatch.setattr(timing, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(timing, "SAVE_COST", cost)
    place = tiny.index("--save-seconds")
    run(name, [*tiny[:place], *tiny[place + 2 :], "--num-updates", "24"])
    assert saved == sorted([*EVALUATIONS, *between])


def damage_files(folder):
    for root, _, files in os.walk(folder):
        for file in files:
            with open(os.path.join(root, file), "r+b") as out:
                out.truncate(os.path.getsize(out.name) // 2)


def damage_nothing_left(folder):
    shutil.rmtree(folder)
    os.mkdir(folder)


def damage_meta(folder):
    shutil.rmtree(os.path.join(folder, "meta"))


def damage_names(folder):
    """What was saved cannot be told from another State by its error alone."""
    os.remove(os.path.join(folder, "state", "_METADATA"))


def damage_noise(folder):
    for root, _, files in os.walk(folder):
        for file in files:
            path = os.path.join(root, file)
            with open(path, "r+b") as out:
                out.write(b"\xa5" * os.path.getsize(path))


def damage_manifest(folder):
    with open(os.path.join(folder, "state", "manifest.ocdbt"), "w"):
        pass


@pytest.mark.parametrize(
    "damage",
    [
        damage_files,
        damage_nothing_left,
        damage_meta,
        damage_names,
        damage_noise,
        damage_manifest,
    ],
    ids=lambda x: x.__name__,
)
def test_damaged_checkpoint(name, tiny, reference, capfd, damage):
    folder = copy_of(reference(name), name)
    newest = folder / "checkpoints" / "24"
    assert newest.exists()
    damage(newest)
    run(name, [*tiny, *SEEDS, "--resume"])
    out, error = capfd.readouterr()
    assert "WARNING: checkpoint 24 cannot be read" in out + error
    assert "resuming at update 20" in out and "Traceback" not in out + error
    assert metrics(folder) == metrics(reference(name))


LATE_CALL = """
import asyncio, sys, threading
import tensorstore
from common.experiment import disk_errors
if sys.argv[1] == "silenced":
    disk_errors.silence_closed_loops()
    hook = sys.unraisablehook
    disk_errors.silence_closed_loops()
    assert sys.unraisablehook is hook  # installed once
promise, future = tensorstore.Promise.new()
async def wait():
    await future
async def begin():
    waiting.append(asyncio.ensure_future(wait()))
    await asyncio.sleep(0.05)
waiting, loop = [], asyncio.new_event_loop()
loop.run_until_complete(begin())
loop.close()
thread = threading.Thread(target=promise.set_result, args=(1,))
thread.start()
thread.join()
waiting[0]._log_destroy_pending = False
class Noisy:
    def __del__(self):
        raise RuntimeError("another error")
Noisy()
"""


def test_late_calls_of_a_closed_loop_are_silent_and_nothing_else_is(tmp_path):
    """A thread of tensorstore that ends after orbax gave up calls the loop that orbax closed."""
    said = {}
    for mode in ("as it is", "silenced"):
        words = [sys.executable, "-c", LATE_CALL, mode]
        code, _, said[mode] = runs.call(words, tmp_path, runs.environment(tmp_path / "cache"))
        assert code == 0, said
        assert "another error" in said[mode]
    assert "Event loop is closed" in said["as it is"]  # else the hook is needed no more
    assert "Event loop is closed" not in said["silenced"]


def test_a_checkpoint_of_another_state_is_not_called_damaged(name, tiny, reference, capsys):
    folder = copy_of(reference(name), name)
    file = folder / "config.yaml"
    config = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(config | {"hidden": [3, 3]}))
    with pytest.raises(SystemExit) as leave:
        experiment.load(runs.module(name), folder)
    error = capsys.readouterr().err
    assert leave.value.code == 2
    assert "checkpoint 24 has another State" in error and "cannot be read" not in error


def test_every_checkpoint_damaged(name, tiny, reference, capsys):
    folder = copy_of(reference(name), name)
    for checkpoint in (folder / "checkpoints").iterdir():
        damage_files(checkpoint)
    before = runs.tree(folder)
    run(name, [*tiny, *SEEDS, "--resume"], expected=2)
    out, error = capsys.readouterr()
    assert error.count("cannot be read") == 2 and "no checkpoint can be read" in error
    assert "resuming" not in out
    assert runs.tree(folder) == before


# --- Disks --------------------------------------------------------------------------------------
FULL = OSError(errno.ENOSPC, "No space left on device", "metrics.csv")
READ_ONLY = OSError(errno.EROFS, "Read-only file system")
TENSORSTORE = ValueError("RESOURCE_EXHAUSTED: Failed to write 9 bytes [os_error_code='28']")


@pytest.mark.parametrize(
    ("where", "problem", "said"),
    [
        ("append", FULL, "No space left on device"),
        ("save", TENSORSTORE, "No space left on device"),
        ("_finish", READ_ONLY, "Read-only file system"),
        ("_open", FULL, "No space left on device"),
    ],
)
def test_a_disk_that_takes_no_more(
    name, tiny, reference, monkeypatch, capsys, where, problem, said
):
    owner = records.Records if where == "append" else experiment.Run
    original, calls = getattr(owner, where), []

    def failing(*args):
        calls.append(args)
        if len(calls) == 5 or where.startswith(("_f", "_o")):
            raise problem
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, where, failing)
        with pytest.raises(SystemExit) as stop:
            runs.start(name, [*tiny, *SEEDS])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and f"cannot be written ({said})" in error
    assert "--resume" in error
    folder = run(name, [*tiny, *SEEDS, "--resume"])
    assert metrics(folder) == metrics(reference(name))


def test_other_errors_are_not_taken_for_the_disk(name, tiny, monkeypatch):
    def failing(*args):
        raise ValueError("shapes do not match")

    monkeypatch.setattr(experiment.Run, "log", failing)
    with pytest.raises(ValueError, match="shapes do not match"):
        runs.start(name, [*tiny, *SEEDS])


# --- Version of the code ------------------------------------------------------------------------
def test_the_digest_is_of_what_the_code_does(tmp_path):
    file = tmp_path / "one.py"

    def digest(text):
        file.write_text(text)
        return provenance.code([file])

    first = digest('"""Text."""\ndef f(x):\n    """Says."""\n    return x + 1  # because\n')
    assert first == digest("def f(x):\n\n    return (x + 1)\n") and len(first) == 12
    assert first != digest("def f(x):\n    return x + 2\n")
    assert digest("x = 0\n") != digest("x = None\n") != digest("x = ''\n") != digest("x = 0\n")
    assert digest("f'{a!r} b'\n") != digest("f'{a!r}  b'\n")


@pytest.mark.parametrize("file", ["__init__.py", "envs/spaces.py", "experiment/run.py"])
def test_the_digest_covers_every_room(tmp_path, monkeypatch, file):
    shutil.copytree(runs.ROOT / "common", tmp_path / "common")
    monkeypatch.setattr(origin, "COMMON", tmp_path / "common")
    before = provenance.code(origin.code_of_common())
    with (tmp_path / "common" / file).open("a") as out:
        out.write("\nADDED = 1\n")
    assert provenance.code(origin.code_of_common()) != before


def test_every_python_here_makes_the_same_digest():
    files = [*sorted((runs.ROOT / "common").rglob("*.py")), runs.ROOT / "algorithms" / "fql.py"]
    names = [sys.executable]
    names += [f"python3.{minor}" for minor in range(11, 15) if shutil.which(f"python3.{minor}")]
    program = "import sys; sys.path.insert(0, sys.argv[1]); import provenance; "
    program += "from pathlib import Path; print(provenance.code(map(Path, sys.argv[2:])))"
    words = ["-I", "-c", program, str(runs.ROOT / "common" / "experiment"), *map(str, files)]
    for name in names:
        done = subprocess.run([name, *words], capture_output=True, text=True)
        if done.returncode == 0 or name == sys.executable:  # another name may lead nowhere
            assert done.stdout.strip() == provenance.code(files), name


def test_a_run_resumed_on_other_data_says_so(name, tiny, capsys):
    tiny[1] = runs.write_hdf5("mine.hdf5")
    folder = run(name, [*tiny, "--num-updates", "8"])
    shutil.rmtree(folder / "checkpoints" / "8")
    with h5py.File("mine.hdf5", "r+") as file:
        file["rewards"][3] += 1
    run(name, [*tiny, "--num-updates", "8", "--resume"])
    assert re.search(
        r"begun on digest \w+, resumed on digest \w+ \(data\)", capsys.readouterr().err
    )


def test_an_empty_config_of_a_run_is_one_line(name, tiny, reference, capsys):
    folder = copy_of(reference(name), name)
    (folder / "config.yaml").write_text("")
    run(name, [*tiny, *SEEDS, "--resume"], expected=2)
    assert "config.yaml is empty" in capsys.readouterr().err


def test_a_run_resumed_elsewhere_says_so(name, tiny, monkeypatch, capsys):
    def log(self, step, *args):
        original(self, step, *args)
        if step == 8 and versions[0] == "first":
            self.signals.number = signal.SIGTERM  # as if it had come

    original, versions = experiment.Run.log, ["first"]
    monkeypatch.setattr(provenance, "code", lambda paths: versions[0])
    monkeypatch.setattr(machine, "processor", lambda: f"the {versions[0]} processor")
    monkeypatch.setattr(experiment.Run, "log", log)
    folder = run(name, tiny, expected=128 + signal.SIGTERM)
    versions[0] = "second"
    run(name, [*tiny, "--resume"])
    error = capsys.readouterr().err
    assert "WARNING: resumed by another version" in error
    assert "begun on the first processor, resumed on the second processor" in error
    result = json.loads((folder / "result.json").read_text())
    assert result["code"] == dict.fromkeys(("algorithm", "common"), "first+second")
    assert result["hardware"].endswith("; the first processor, then the second processor")
    assert {"python", "jax"} <= result["versions"].keys() and "data" not in result["versions"]
    versions[0] = "third"
    (folder / "result.json").unlink()  # died before the last evaluation: this code makes it
    run(name, [*tiny, "--resume"])
    result = json.loads((folder / "result.json").read_text())
    assert result["code"] == dict.fromkeys(("algorithm", "common"), "first+second+third")


def test_a_finished_run_stays_as_it_is(name, tiny, reference, monkeypatch, capsys):
    folder = copy_of(reference(name), name)
    before = runs.tree(folder)
    monkeypatch.setattr(provenance, "code", lambda paths: "another")
    monkeypatch.setattr(evaluation.Rollouts, "__call__", None)  # no evaluation once more
    run(name, [*tiny, *SEEDS, "--resume"])
    out, error = capsys.readouterr()
    assert "finished before" in out and len(error.splitlines()) == 1
    assert runs.tree(folder) == before


def test_the_score_of_an_edited_file_is_that_of_another_version(
    name, tiny, reference, monkeypatch, capsys
):
    """Its settings are the same, so its run folder is."""
    folder = copy_of(reference(name), name)
    made = json.loads((folder / "result.json").read_text())["code"]["algorithm"]
    run(name, [*tiny, *SEEDS, "--resume"])
    assert not capsys.readouterr().err
    monkeypatch.setattr(provenance, "code", lambda paths: "edited")
    run(name, [*tiny, *SEEDS, "--resume"])
    other = f"another version of {name}.py ({made}, now edited)"
    (line,) = capsys.readouterr().err.splitlines()
    remedy = "give a --name to train the present one"
    assert line == f"WARNING: this score is of {other}; {remedy}"
    for _ in range(2):  # the second time the run is not finished
        run(name, [*tiny, *SEEDS], expected=2)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith(f"made by {other}; {remedy}, or continue that run with --resume")
        (folder / "result.json").unlink(missing_ok=True)
    config.run_folder(*config.parse(runs.module(name).Config, [*tiny, *SEEDS, "--name", "new"]))


def test_rows_with_other_columns_are_not_appended(name, tiny, reference, capsys):
    folder = copy_of(reference(name), name)
    shutil.rmtree(folder / "checkpoints" / "24")
    file = folder / "metrics.csv"
    file.write_text(file.read_text().replace("score", "scores", 1))
    run(name, [*tiny, *SEEDS, "--resume"], expected=2)
    error = capsys.readouterr().err
    assert "metrics.csv: has other columns (update,seed," in error


# --- Signals ------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_signal_saves_and_leaves_at_the_next_border(
    name, tiny, reference, monkeypatch, capsys, number
):
    original, handler = experiment.Run.log, signal.getsignal(number)

    def log(self, step, *args):
        original(self, step, *args)
        if step == 8:
            os.kill(os.getpid(), number)
            runs.wait_for(lambda: self.signals.number is not None)

    with monkeypatch.context() as patch:
        patch.setattr(experiment.Run, "log", log)
        folder = run(name, [*tiny, *SEEDS], expected=128 + number)
    assert signal.getsignal(number) is handler  # left as it was
    out = capsys.readouterr().out
    assert (
        f"{number.name}: saving at the next chunk boundary" in out and "saved at update 12" in out
    )
    assert not (folder / "result.json").exists()
    run(name, [*tiny, *SEEDS, "--resume"])
    assert "resuming at update 12" in capsys.readouterr().out
    assert metrics(folder) == metrics(reference(name))


SLOW = """
import time
from common import experiment
log = experiment.Run.log
def slow(run, step, *args):
    log(run, step, *args)
    for _ in range(int(SECONDS / 0.05)):  # a signal just before a long sleep waits for its end
        time.sleep(0.05)
experiment.Run.log = slow
"""


def test_signal_from_outside(name, tiny, base, reference, tmp_path):
    code = SLOW.replace("SECONDS", "0.3")
    words = runs.command(name, [*tiny, *SEEDS], code=code)
    process = subprocess.Popen(words, cwd=tmp_path, env=runs.environment(base / "cache"))
    runs.wait_for(lambda: [*tmp_path.glob("runs/*/*/*/timing.csv")])
    process.send_signal(signal.SIGTERM)
    assert process.wait(runs.HANGS) == 128 + signal.SIGTERM
    folder = run(name, [*tiny, *SEEDS, "--resume"])
    assert metrics(folder) == metrics(reference(name))


def test_ctrl_c_before_training_is_one_line(name, tiny, base, tmp_path):
    # Short sleeps: a signal that comes just before a long one is noticed at its end only.
    code = "import time; from common import datasets\ndef load(*_):\n  print('loading', flush=True)"
    code += "\n  while True: time.sleep(0.05)\ndatasets.load = load"
    process = subprocess.Popen(
        runs.command(name, tiny, code=code),
        cwd=tmp_path,
        env=runs.environment(base / "cache"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert any("loading" in line for line in process.stdout)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=runs.HANGS)
    assert process.returncode == 128 + signal.SIGINT
    assert error == "interrupted before training began; start again with --resume\n"
    assert not (tmp_path / "runs").exists()


def test_second_signal_leaves_at_once(name, tiny, base, tmp_path):
    """In the middle of what would take hours."""
    words = runs.command(name, [*tiny, *SEEDS], code=SLOW.replace("SECONDS", "9999"))
    process = subprocess.Popen(
        words,
        cwd=tmp_path,
        env=runs.environment(base / "cache"),
        stdout=subprocess.PIPE,
        text=True,
    )
    runs.wait_for(lambda: [*tmp_path.glob("runs/*/*/*/timing.csv")])
    process.send_signal(signal.SIGINT)
    while "a second signal quits at once" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGTERM)
    assert process.wait(runs.HANGS) == 128 + signal.SIGTERM
    process.stdout.close()


# --- A seed that diverges -----------------------------------------------------------------------
def poisoned(monkeypatch, lane, update, what):
    """The chunk that starts at `update` gives one seed NaN in its parameters, maybe its metrics."""
    over_seeds = runs.over_seeds

    def spoil(x):
        return x.at[lane].set(jnp.nan) if x.dtype.kind == "f" else x

    def poisoning(chunk, **options):
        train_seeds = over_seeds(chunk, **options)

        def train(state, keys, start, data):
            state, values = train_seeds(state, keys, start, data)
            if start == update:
                state = jax.tree.map(spoil, state)
                if what == "metrics":
                    values = {**values, "q": spoil(values["q"])}
            return state, values

        return train

    monkeypatch.setattr(experiment, "over_seeds", poisoning)


@pytest.mark.parametrize("what", ["metrics", "parameters"])
def test_a_seed_that_diverges(name, tiny, reference, monkeypatch, capsys, what):
    poisoned(monkeypatch, 1, 8, what)
    with jax.debug_nans(False):
        folder = run(name, [*tiny, *SEEDS], expected=1)
        error = capsys.readouterr().err
        (warning,) = [line for line in error.splitlines() if "not finite" in line]
        assert "seed 1: " in warning and "in updates 8 to 12" in warning
        assert ("q" if what == "metrics" else "a parameter") in warning
        assert all(np.isfinite(leaf).all() for leaf in parameters(name, folder))

    whole = reference(name) / "metrics.csv"
    assert runs.seed_lines(folder / "metrics.csv", 0) == runs.seed_lines(whole, 0)
    ours, theirs = runs.seed_lines(folder / "metrics.csv", 1), runs.seed_lines(whole, 1)
    assert ours[:4] == theirs[:4]  # header and updates 0, 4, 8
    rows = [row for row in runs.read_csv(folder / "metrics.csv") if row["seed"] == "1"]
    assert [row["score"] != "" for row in rows] == [border in (0, 8) for border in BORDERS]
    assert rows[3]["q"] == "nan" if what == "metrics" else np.isfinite(float(rows[3]["q"]))
    assert all(set(list(row.values())[2:]) == {""} for row in rows[4:])
    result = json.loads((folder / "result.json").read_text())
    assert result["diverged"] == {"1": 12}
    assert result["score"]["1"] is None and result["score"]["0"] is not None
    assert result["best_score"]["1"] == pytest.approx(
        max(float(row["score"]) for row in rows[1:] if row["score"])  # not the untrained policy
    )
    if what == "metrics":
        dies_and_goes_on(name, tiny, monkeypatch, metrics(folder))


def test_a_run_whose_seeds_all_diverge_has_a_result(name, tiny, monkeypatch, capsys):
    poisoned(monkeypatch, 0, 8, "metrics")
    with jax.debug_nans(False):
        folder = run(name, tiny, expected=1)
    result = json.loads((folder / "result.json").read_text())
    assert result["score"] == {"0": None} and result["diverged"] == {"0": 12}
    assert "all seeds diverged" in capsys.readouterr().out


def dies_and_goes_on(name, tiny, monkeypatch, text):
    """The seed stays given up: the same file as without that death."""
    original = experiment.Run.log

    def log(self, step, *args):
        if step == 16:
            raise Stop
        original(self, step, *args)

    argv = [*tiny, *SEEDS, "--runs-dir", "again"]
    with jax.debug_nans(False):
        with monkeypatch.context() as patch:
            patch.setattr(experiment.Run, "log", log)
            with pytest.raises(Stop):
                runs.start(name, argv)
        folder = run(name, ["--resume", *argv], expected=1)
        assert all(np.isfinite(leaf).all() for leaf in parameters(name, folder))
    assert metrics(folder) == text


# --- Compilation cache --------------------------------------------------------------------------
COUNT = """
import atexit, collections, jax
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.split("/")[-1]]))
atexit.register(lambda: print("events", events["cache_misses"], events["cache_hits"]))
"""


def test_second_start_compiles_nothing(name, tiny, tmp_path):
    environment = runs.environment(tmp_path / "fresh")
    counts = []
    for folder in ("one", "two"):
        words = runs.command(name, [*tiny, "--runs-dir", folder], code=COUNT)
        code, out, error = runs.call(words, tmp_path, environment)
        assert code == 0, error
        counts.append([int(x) for x in out.splitlines()[-1].split()[1:]])
    (first_misses, _), (misses, hits) = counts
    assert first_misses > 3 and misses == 0 and hits >= first_misses


# --- wandb --------------------------------------------------------------------------------------
class FakeWandb(SimpleNamespace):
    """Records what is asked of wandb; `fails` says which calls raise."""

    def __init__(self, fails=lambda call, **_: False):
        super().__init__(started=[], logged=[], finished=[], torn_down=0, fails=fails)

    def Settings(self, **settings):
        return settings

    def init(self, **options):
        if self.fails("init", **options):
            raise RuntimeError("api_key not configured (no-tty).\nsecond line")
        self.started.append(options)
        return SimpleNamespace(
            log=lambda values, step: self.log(options, values, step),
            finish=lambda: self.finish(options),
        )

    def finish(self, options):
        self.finished.append(options["id"])
        if self.fails("finish", **options):
            raise BrokenPipeError("the service is gone")

    def teardown(self):
        self.torn_down += 1
        if self.fails("teardown"):
            raise BrokenPipeError("the service is gone")

    def log(self, options, values, step):
        if self.fails("log", **options):
            raise ConnectionError("the service is gone")
        self.logged.append((options["id"], step, values))


@pytest.fixture
def fake(monkeypatch):
    def use(*args):
        wandb = FakeWandb(*args)
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        return wandb

    return use


def test_wandb_has_a_run_per_seed(name, tiny, fake, reference):
    wandb = fake()
    folder = run(name, [*tiny, *SEEDS, "--wandb", "offline", "--name", "mine"])
    token = (folder / "wandb.id").read_text().strip()
    assert [options["id"] for options in wandb.started] == [
        f"{name}-data-mine-0-{token}",
        f"{name}-data-mine-1-{token}",
    ]
    sent = wandb.started[0]["settings"]
    assert not (sent["save_code"] or sent["x_save_requirements"]) and sent["host"] == "-"
    assert sent["init_timeout"] <= 30  # seconds, of which a run without network loses no more
    assert all(sent[f"x_disable_{what}"] for what in ("stats", "meta", "machine_info"))
    assert wandb.finished == [options["id"] for options in wandb.started] and wandb.torn_down == 1
    for seed, options in enumerate(wandb.started):
        assert options["group"] == f"{name}/data/mine" and options["mode"] == "offline"
        assert options["config"]["seed"] == seed and options["config"]["batch_size"] == 4
        logged = [(step, values) for id, step, values in wandb.logged if id == options["id"]]
        assert [step for step, _ in logged] == BORDERS
        rows = [row for row in runs.read_csv(folder / "metrics.csv") if row["seed"] == str(seed)]
        for row, (_, values) in zip(rows, logged, strict=True):
            written = {key: row[key] for key in list(row)[2:] if row[key]}
            assert {key: f"{x:.9g}" for key, x in values.items()} == written
    assert metrics(folder) == metrics(reference(name))


def test_wandb_has_all_rows_in_the_offline_run_of_a_resumed_one(name, tiny, fake, reference):
    """Each start has an offline folder of its own, of one id: the last one is complete."""
    fake()
    folder = copy_of(reference(name), name)
    shutil.rmtree(folder / "checkpoints" / "24")
    again = fake()
    run(name, [*tiny, *SEEDS, "--wandb", "offline", "--resume"])
    for options in again.started:
        steps = [step for id, step, _ in again.logged if id == options["id"]]
        assert steps == BORDERS


def test_a_deleted_run_started_again_is_another_one_to_wandb(name, tiny, fake):
    wandb = fake()
    for _ in range(2):
        folder = run(name, [*tiny, "--wandb", "offline", "--name", "mine"])
        shutil.rmtree(folder)
    assert len({options["id"] for options in wandb.started}) == 2


def test_wandb_goes_offline_for_all_seeds_at_the_first_failure(name, tiny, fake, capsys):
    wandb = fake(lambda call, mode, id, **_: mode == "online" and "-1-" in id)
    run(name, [*tiny, *SEEDS, "--wandb", "online"])
    modes = [options["mode"] for options in wandb.started]
    assert modes == ["online", "offline", "offline"]
    assert len(wandb.finished) == 3 and len(wandb.logged) == 14
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "wandb" in line]
    assert line == "WARNING: wandb: api_key not configured (no-tty). second line; logging offline"


@pytest.mark.parametrize("call", ["init", "log", "finish", "teardown"])
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_wandb_never_ends_a_run(name, tiny, fake, capsys, reference, call):
    wandb = fake(lambda this, **_: this == call)
    folder = run(name, [*tiny, *SEEDS, "--wandb", "offline"])
    assert metrics(folder) == metrics(reference(name))
    error = capsys.readouterr().err
    assert "Traceback" not in error and error.count("WARNING: wandb") == (call in ("init", "log"))
    assert call == "init" or (len(wandb.finished) == 2 and wandb.torn_down == 1)


def test_wandb_is_not_needed(name, tiny, monkeypatch, capsys, reference):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    folder = run(name, [*tiny, *SEEDS, "--wandb", "offline"])
    assert metrics(folder) == metrics(reference(name))
    assert "WARNING: wandb" in capsys.readouterr().err


def test_wandb_itself(name, tiny, base, tmp_path):
    """Online without a key: one warning and offline runs."""
    home = tmp_path / "home"
    home.mkdir()
    environment = runs.environment(base / "cache", HOME=str(home), NETRC=str(home / "netrc"))
    words = runs.command(name, [*tiny, *SEEDS, "--wandb", "online"])
    code, _, error = runs.call(words, tmp_path, environment)
    assert code == 0, error
    assert error.count("WARNING") == 1 and "logging offline" in error
    folder = runs.only_run("runs") / "wandb"
    files = sorted(file.name for file in folder.glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    assert [file.split("-")[-2] for file in files] == ["0", "1"]
    assert not list(folder.rglob("requirements.txt"))  # nothing but what the config names
    sent = b"".join(file.read_bytes() for file in folder.rglob("*.wandb"))
    assert b"critic_loss" in sent
    host = socket.gethostname()
    hosts = [host] if len(host) > 7 else []  # a short one may be part of a word
    for what in (str(tmp_path), sys.executable, str(runs.ROOT), *hosts):
        assert what.encode() not in sent, what

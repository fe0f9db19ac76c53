# SPDX-License-Identifier: Apache-2.0
"""`--distributed`: one run over two processes of this machine, and how they end together."""

import json
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import helpers_runs as runs
import numpy as np
import pytest

from common.experiment import config, meshes, processes

SEEDS = ["--seeds", "0", "1"]


@pytest.fixture(scope="module")
def base(tmp_path_factory, compilation_cache):
    """A data file and the compilation cache of all tests."""
    folder = tmp_path_factory.mktemp("base")
    runs.write_hdf5(folder / "data.hdf5")
    (folder / "cache").symlink_to(compilation_cache)
    return folder


@pytest.fixture
def tiny(base, tmp_path, monkeypatch):
    """Arguments of a tiny run of two seeds; the working directory is empty."""
    monkeypatch.chdir(tmp_path)
    return ["--dataset", str(base / "data.hdf5"), *runs.TINY, *SEEDS]


@pytest.fixture
def start(base, tmp_path):
    """A function that runs two processes to their end. -> (exit codes, what each wrote)"""
    (tmp_path / "tmp").mkdir()

    def call(words, variables=lambda index, port: {}):
        """`words(index, address)` is the command of a process."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        files, both = [tmp_path / "out0", tmp_path / "out1"], []
        for index, file in enumerate(files):
            environment = runs.environment(base / "cache", TMPDIR=str(tmp_path / "tmp"))
            environment["PYTHONUNBUFFERED"] = "1"  # both streams go to one file, in order
            environment |= variables(index, port)
            command = words(index, f"localhost:{port}/2/{index}")
            with file.open("w") as out:
                both.append(
                    subprocess.Popen(
                        command, cwd=tmp_path, env=environment, stdout=out, stderr=subprocess.STDOUT
                    )
                )
        try:  # a process that waits in vain does so for 300 s and ends with other words
            runs.wait_for(lambda: all(process.poll() is not None for process in both))
        finally:
            for process in both:
                process.kill()
        return [process.wait() for process in both], [file.read_text() for file in files]

    return call


def left_behind(said, index):
    """One line of the process whose partner left, and no stack of C++ in either."""
    assert f"error: process {1 - index} of --distributed ended before this one" in said[index]
    assert "Traceback" not in said[index] and "stack trace" not in "".join(said)


# --- One process --------------------------------------------------------------------------------
def test_a_process_alone_asks_itself():
    tree = {"x": np.arange(3)}
    assert processes.ask({"a": 1}) == [{"a": 1}] and processes.agree(3) == 3
    assert processes.from_first(tree) is tree and processes.gather(tree) is tree


@pytest.mark.parametrize(
    ("where", "says"),
    [("node1", "HOST:PORT/COUNT/INDEX"), ("node1:80/2/2", "INDEX below COUNT")],
)
def test_distributed_wants_an_address(tiny, where, says, capsys):
    with pytest.raises(SystemExit) as leave:
        runs.start("rebrac", [*tiny, "--distributed", where])
    assert leave.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize("other", [{"a": 1, "b": [3]}, {"a": 1}])
def test_what_differs_is_named(monkeypatch, capsys, other):
    monkeypatch.setattr(processes, "ask", lambda mine: [mine, mine, other])
    with pytest.raises(SystemExit) as leave:
        processes.require_same({"a": 1, "b": [2]})
    assert leave.value.code == 2
    said = f"error: --distributed: process 2 has b {other.get('b')}, process 0 has [2]\n"
    assert capsys.readouterr().err == said


def test_devices_of_one_seed_are_of_one_process(capsys):
    options = config.Options(devices=2, distributed="auto")
    with pytest.raises(SystemExit):
        meshes.check(SimpleNamespace(seeds=(0,), batch_size=4), options, 2)
    assert "--devices 2: not with --distributed" in capsys.readouterr().err


# --- Two processes that do not come to train ----------------------------------------------------
BEGIN = """
import sys, time
import numpy as np
from algorithms import rebrac
from common import experiment, fail
cfg, options = experiment.parse(rebrac.Config, sys.argv[1:])
rows = np.zeros((8, 3), np.float32)
ACT
experiment.place({"x": rows, "y": rows[:, 0]}, options)
print("began", file=sys.stderr)
"""


def beginning(*acts, more=((), ())):
    """Each joins, compares its config, acts, compares its data."""

    def words(index, address):
        argv = ["--dataset", "x", *SEEDS, "--distributed", address, *more[index]]
        return [sys.executable, "-c", BEGIN.replace("ACT", acts[index]), *argv]

    return words


@pytest.mark.parametrize("leaver", runs.slow_but([0, 1], [0]))
def test_nobody_waits_for_a_process_without_data(start, leaver):
    acts = ["time.sleep(2)", "time.sleep(2)"]
    acts[leaver] = "fail('no data here')"
    codes, said = start(beginning(*acts))
    assert codes == [2, 2]
    assert said[leaver].endswith("error: no data here\n")
    left_behind(said, 1 - leaver)


def test_other_data(start):
    codes, said = start(beginning("pass", "rows[3, 1] = 1"))
    assert codes == [2, 2]
    for text in said:
        assert text.splitlines()[-1].startswith("error: --distributed: process 1 has data with")


@runs.SLOW
def test_another_config(start):
    codes, said = start(beginning("pass", "pass", more=((), ("--seeds", "0", "2"))))
    assert codes == [2, 2]
    for text in said:
        line = "error: --distributed: process 1 has seeds [0, 2], process 0 has [0, 1]"
        assert text.splitlines()[-1] == line


def test_as_slurm_starts_it(start):
    """`auto`, by SLURM's variables; a node with more GPUs than processes is told."""

    def variables(index, port):
        numbers = {"JOB_ID": 1, "NTASKS": 2, "PROCID": index, "LOCALID": index}
        numbers |= {"GPUS_ON_NODE": 4, "NNODES": 2, "STEP_NODELIST": "localhost"}
        slurm = {f"SLURM_{key}": str(x) for key, x in numbers.items()}
        return slurm | {"JAX_COORDINATOR_PORT": str(port)}

    words = beginning("pass", "time.sleep(2)")  # the first one has nothing left to do
    codes, said = start(lambda index, _: words(index, "auto"), variables=variables)
    assert codes == [0, 0] and all(text.endswith("began\n") for text in said)
    assert "2 processes with 2 devices in all; WARNING: 6 GPUs have no process" in said[0]


# --- Two processes that train -------------------------------------------------------------------
def training(argv, *code):
    """The two commands of a run, with code that runs first in each."""

    def words(index, address):
        distributed = [*argv, "--distributed", address]
        return runs.command("rebrac", distributed, code=code[index] if code else None)

    return words


def metrics(folder):
    return (runs.only_run(folder) / "metrics.csv").read_text()


DIE = "import helpers_runs; helpers_runs.die_at('after save {}')"


@runs.SLOW
def test_two_processes_train_one_set_of_seeds(tiny, start, tmp_path):
    """A mesh over both; killed and resumed; the numbers of one process, which the first writes."""
    runs.start("rebrac", [*tiny, "--runs-dir", "alone"])
    codes, _ = start(training(tiny, DIE.format(8), "pass"))
    assert codes[0] == -signal.SIGKILL and codes[1] != 0  # nobody is left waiting
    shutil.copytree("runs", "copy")
    shutil.rmtree(tmp_path / "tmp")
    (tmp_path / "tmp").mkdir()

    codes, said = start(training([*tiny, "--resume"]))
    assert codes == [0, 0], said
    assert metrics("runs") == metrics("alone")
    result = json.loads((runs.only_run("runs") / "result.json").read_text())
    assert result["hardware"].startswith("2 x cpu")
    assert "2 processes with 2 devices" in said[0] and "resuming at update 8" in said[0]
    assert not list((tmp_path / "tmp").iterdir())

    runs.start("rebrac", [*tiny, "--resume", "--runs-dir", "copy"])  # by one process
    assert metrics("copy") == metrics("alone")


@runs.SLOW
def test_a_run_of_one_process_goes_on_in_two(tiny, start):
    runs.start("rebrac", [*tiny, "--runs-dir", "alone"])
    words = runs.command("rebrac", tiny, die="after save 8")
    assert runs.call(words, Path.cwd(), runs.environment("cache"))[0] == -signal.SIGKILL
    codes, said = start(training([*tiny, "--resume"]))
    assert codes == [0, 0], said
    assert "resuming at update 8" in said[0] and metrics("runs") == metrics("alone")


@runs.SLOW
def test_nobody_waits_for_ever_for_a_process_that_was_killed(tiny, start):
    """The other one notices after 100 s at most, and JAX aborts it."""
    codes, _ = start(training(tiny, "pass", DIE.format(8)))
    assert codes[1] == -signal.SIGKILL and codes[0] != 0


FULL = """
import errno
from common import experiment
save = experiment.Run.save
def full(run, step, *args):
    if step == 8:
        raise OSError(errno.ENOSPC, "full")
    save(run, step, *args)
experiment.Run.save = full
"""


@runs.SLOW
@pytest.mark.parametrize("leaver", [0, 1])
def test_nobody_waits_for_a_process_without_disk(tiny, start, leaver):
    code = ["pass", "pass"]
    code[leaver] = FULL
    codes, said = start(training(tiny, *code))
    assert codes == [2, 2]
    assert "cannot be written (No space left on device)" in said[leaver].splitlines()[-1]
    left_behind(said, 1 - leaver)


@runs.SLOW
def test_nobody_waits_for_a_process_without_a_lock(tiny, start):
    """Process 0 alone meets the lock of the folder, which another run holds."""
    hold = "from common import experiment; experiment.Run.log = lambda *_: __import__('time').sleep"
    words = runs.command("rebrac", tiny, code=f"{hold}(200)")
    holder = subprocess.Popen(words, env=runs.environment("cache"), stdout=subprocess.DEVNULL)
    try:
        runs.wait_for(lambda: [*Path("runs").rglob("checkpoints/0")])
        codes, said = start(training([*tiny, "--resume"]))
    finally:
        holder.kill()
        holder.wait()
    assert codes == [2, 2]
    assert "another process trains in it" in said[0]
    left_behind(said, 1)


POISON = """
import jax
import numpy as np
from common import experiment
over_seeds = experiment.over_seeds
def poisoning(chunk, update=None):
    train = over_seeds(chunk, update=update)
    def poisoned(state, keys, start, data):
        state, metrics = train(state, keys, start, data)
        lane = {8: 1, 20: 0}.get(start)
        def spoil(x):
            x = np.array(x)
            if lane is not None and x.dtype.kind == "f":
                x[lane] = np.nan
            return x
        return jax.tree.map(spoil, state), metrics
    return poisoned
experiment.over_seeds = poisoning
"""


@runs.SLOW
def test_seeds_that_diverge_before_and_after_a_death(tiny, start):
    """Only process 0 reads that a seed was given up; both know that none is left."""
    codes, _ = start(training(tiny, POISON + DIE.format(16), POISON))
    assert codes[0] == -signal.SIGKILL
    codes, said = start(training([*tiny, "--resume"], POISON, POISON))
    assert codes == [1, 1], said
    assert "no seed is left to train after update 24" in said[1]
    result = json.loads((runs.only_run("runs") / "result.json").read_text())
    assert result["diverged"] == {"0": 24, "1": 12}


@runs.SLOW
def test_data_in_host_memory(tiny, start):
    runs.start("rebrac", [*tiny, "--runs-dir", "alone"])
    codes, said = start(training([*tiny, "--data", "host"]))
    assert codes == [0, 0], said
    assert metrics("runs") == metrics("alone")


@runs.SLOW
def test_a_signal_to_the_second_process_saves_and_ends_both(tiny, start):
    """At once in both, whichever SLURM tells first."""
    code = """
import os, signal
from common import experiment
log = experiment.Run.log
def telling(run, step, *args):
    log(run, step, *args)
    if step == 8:
        os.kill(os.getpid(), signal.SIGUSR1)
        while run.signals.number is None:
            pass
experiment.Run.log = telling
"""
    codes, said = start(training(tiny, "pass", code))
    assert codes == [128 + signal.SIGUSR1] * 2
    assert "saved at update 12" in said[0]

# SPDX-License-Identifier: Apache-2.0
"""benchmarks/reproduce.py: which commands it runs, and what becomes of cells that end badly.

Most cells here are stand-ins: a few lines of Python in the place of a run. Real runs of bc
die by SIGKILL in one test and are requeued by submitit in another.
"""

import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import helpers_runs as runs
import numpy as np
import own_files
import pytest

from benchmarks import reproduce

# submitit configures logging when it is imported, which closes absl's log handler and the stream
# that handler was made with. Imported here, before a test captures its own output, it spares that
# stream: pytest's, which all later tests need.
with contextlib.suppress(ImportError):
    import submitit  # noqa: F401

RUN = ["--suite", "v4", "--algorithms", "bc", "rebrac", "--seeds", "0", "1"]
WRITE = "import json; open('result.json', 'w').write(json.dumps({'score': {'0': 1.0, '1': 3.0}, "
WRITE += "'diverged': {}}))"


@pytest.fixture
def here(tmp_path, monkeypatch, compilation_cache):
    """An empty folder to start from, with a data file of the suite v4 in data/."""
    monkeypatch.chdir(tmp_path)
    for name, value in runs.environment(compilation_cache).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "data").mkdir()
    runs.write_hdf5(tmp_path / "data" / "hopper-tiny-v4.hdf5")
    monkeypatch.setenv("ATOLL_DATA", "data")
    return tmp_path


@pytest.fixture
def stand_ins(here, monkeypatch):
    """The function that puts code in the place of the cells; the table is left out."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None

    def replace(*codes):
        cells = []
        for i, code in enumerate(codes):
            folder = here / "runs" / f"toy{i}" / "made" / "name"
            folder.mkdir(parents=True)
            words = (sys.executable, "-S", "-c", f"import os; os.chdir({str(folder)!r}); {code}")
            cells.append(reproduce.Cell(f"toy{i}", "made", folder, words))
        monkeypatch.setattr(reproduce, "matrix", lambda *_: cells)
        monkeypatch.setattr(reproduce, "report", lambda *_, **__: ["true"])
        return cells

    yield replace
    assert cores is None or os.sched_getaffinity(0) == cores


def call(*words):
    return reproduce.main([*RUN, *words])


def lines(capsys):
    """The progress lines."""
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]


# --- Commands -----------------------------------------------------------------------------------
def test_dry_run_prints_every_command_and_writes_nothing(here, capsys):
    before = runs.tree(here)
    assert call("--dry-run", "--", "--num-updates", "7000") == 0
    *commands, table = map(shlex.split, capsys.readouterr().out.splitlines())
    assert runs.tree(here) == before
    for name, words in zip(("bc", "rebrac"), commands, strict=True):
        assert words == [
            sys.executable,
            str(runs.ROOT / "algorithms" / f"{name}.py"),
            *("--config", str(runs.ROOT / "configs" / name / "v4.yaml")),
            *("--dataset", "data/hopper-tiny-v4.hdf5", "--seeds", "0", "1", "--resume"),
            *("--num-updates", "7000"),
        ]
    assert table[1] == str(runs.ROOT / "benchmarks" / "report.py")
    assert [Path(word).parts[:2] for word in table[2:4]] == [("runs", "bc"), ("runs", "rebrac")]


@pytest.mark.parametrize(
    "name", [x.parent.name for x in own_files.YAMLS if x.name == "pointmaze.yaml"]
)
def test_the_mazes_are_listed_for(name, here, capsys):
    reproduce.main(["--suite", "pointmaze", "--algorithms", name, "--dry-run"])
    *commands, _ = capsys.readouterr().out.splitlines()
    for maze, command in zip(("umaze", "medium", "large"), commands, strict=True):
        assert f"--dataset local/pointmaze/{maze}-v0 --seeds 0 --resume" in command


def test_data_sets_can_be_chosen(here, capsys):
    call("--datasets", "hopper-tiny-v4.hdf5", "local/pointmaze/umaze-v0", "--dry-run")
    words = [shlex.split(line) for line in capsys.readouterr().out.splitlines()[:4]]
    chosen = [line[line.index("--dataset") + 1] for line in words]
    assert chosen == ["data/hopper-tiny-v4.hdf5"] * 2 + ["local/pointmaze/umaze-v0"] * 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--suite", "nix"], ["--suite nix", "bc has adroit", "v4"]),
        (["--algorithms", "rebrak"], ["--algorithms rebrak", "did you mean rebrac?"]),
        (["--algorithms", "bc", "bc"], ["--algorithms bc bc", "remove one"]),
        (["--algorithms"], ["--algorithms: name at least one of"]),
        (["--seeds", "0", "0"], ["--seeds (0, 0)", "none twice"]),
        (["--seeds", "one"], ["--seeds one", "as in `--seeds 0 1`"]),
        (["--seeds", "0,1"], ["--seeds 0,1: write `--seeds 0 1`"]),
        (["--workers", "0"], ["--workers 0", "at least 1"]),
        (["--worker", "2"], ["no flag --worker; did you mean --workers?"]),
        (["--num-updates", "8"], ["no flag --num-updates", "flags of the runs stand after --"]),
        (["--dry-run", "yes"], ["--dry-run: takes no value", "write `--dry-run` alone"]),
        (["--datasets", "absent.hdf5"], ["--datasets absent.hdf5", "$ATOLL_DATA"]),
        (["--name", "a/b"], ["--name 'a/b'"]),
        (["--slurm-options", "lab"], ["--slurm-options lab", "KEY=VALUE"]),
        (["--", "--num-update", "9"], ["bc.py", "--num-update"]),
        (["--", "--num-updates", "9"], ["--num-updates 9 is no multiple of --log-every"]),
        (["--", "--seeds", "3"], ["--seeds after '--'"]),
        (["--", "--runs-dir=x"], ["--runs-dir=x after '--'"]),
    ],
    ids=lambda x: " ".join(x),
)
def test_bad_input_is_one_line_and_exit_code_2(words, says, here, capsys):
    before = runs.tree(here)
    with pytest.raises(SystemExit) as leave:
        call(*words)
    error = capsys.readouterr().err
    assert leave.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert all(word in error for word in says), error
    assert runs.tree(here) == before


def test_files_of_a_suite_need_their_folder(here, monkeypatch, capsys):
    for value, says in (
        (None, "set $ATOLL_DATA to the folder"),
        (".", "ATOLL_DATA=.: has no file"),
    ):
        monkeypatch.delenv("ATOLL_DATA")
        if value is not None:
            monkeypatch.setenv("ATOLL_DATA", value)
        with pytest.raises(SystemExit):
            call()
        assert says in capsys.readouterr().err
        monkeypatch.setenv("ATOLL_DATA", ".")


def test_only_the_whole_matrix_goes_to_the_results(here, capsys):
    def table(*words):
        reproduce.main(["--dry-run", *words])
        return capsys.readouterr().out.splitlines()[-1]

    note = (runs.ROOT / "benchmarks" / "notes" / "v4.md").read_text()
    (command,) = re.findall("python benchmarks/reproduce.py (.*)", note)
    whole = shlex.split(command)
    for words in (whole, [*whole, "--workers", "1", "--runs-dir", "there"]):
        assert re.search(r"--output \S*benchmarks/results/v4 .*--note \S+v4.md", table(*words))
    assert f"--command 'python benchmarks/reproduce.py {command}'" in table(*whole)
    trials = [["--", "--eval-episodes", "3"], ["--datasets", "hopper-tiny-v4.hdf5"]]
    for trial in (*trials, ["--seeds", "0"], ["--algorithms", "bc"], ["--name", "mine"]):
        line = table(*whole, *trial)
        assert "--output runs/v4 " in line and "--index" not in line and "--note" not in line
    assert "--output here/mine " in table(*whole, "--output", "here/mine")


def test_a_matrix_with_a_failed_cell_does_not_go_to_the_results(here):
    note = (runs.ROOT / "benchmarks" / "notes" / "v4.md").read_text()
    words = shlex.split(re.search("python benchmarks/reproduce.py (.*)", note)[1])
    for failed in (False, True):
        made = reproduce.report([], *reproduce.parse(words), words, failed=failed)
        output = made[made.index("--output") + 1]
        assert output.endswith("runs/v4" if failed else "benchmarks/results/v4")
        assert ("--index" in made) <= (not failed)


# --- Cells that end badly -----------------------------------------------------------------------
def test_a_failed_cell_is_reported_and_does_not_stop_the_others(stand_ins, monkeypatch, capsys):
    cells = stand_ins(WRITE, "raise SystemExit('no such thing')", "os.kill(os.getpid(), 9)", WRITE)
    tables = []
    monkeypatch.setattr(reproduce, "report", lambda done, *_, **__: tables.append(done) or ["true"])
    assert call("--workers", "1") == 1
    assert tables == [cells]  # the page names those that are not finished
    done, failed, killed, last = lines(capsys)
    assert done.startswith("[1/4] toy0 made: score 2.0 ± 1.0, ") and "[4/4] toy3" in last
    log = cells[1].folder.with_name("name.log")
    failure = r"toy1 made: FAILED, exit code 1: no such thing, \d+\.\d min, log "
    assert re.search(failure + re.escape(str(log)), failed)
    assert "FAILED, killed by SIGKILL" in killed
    assert call() == 1  # the two are tried again, the others are not
    tries = [cell.beside(".log").read_text().count("$ ") for cell in cells]
    assert tries == [1, 2, 2, 1]
    assert lines(capsys)[0] == "[1/4] toy0 made: score 2.0 ± 1.0, finished before"


def test_half_a_result_is_none(stand_ins, capsys):
    (cell,) = stand_ins(WRITE)
    (cell.folder / "result.json").write_text('{"score": {')
    assert call() == 0
    assert cell.result["score"] == {"0": 1.0, "1": 3.0}


def test_updates_of_a_cell_at_work(stand_ins):
    (cell,) = stand_ins(WRITE)
    said = [reproduce.updates(cell)]
    for text in ("", "update,chunk_seconds\n", "update,chunk_seconds\n0,0.1\n4000,2.5\n"):
        (cell.folder / "timing.csv").write_text(text)
        said.append(reproduce.updates(cell))
    assert said == ["0", "0", "0", "4,000"]


def test_seeds_that_diverged_are_told(stand_ins, capsys):
    result = {"score": {"0": None, "1": 4.0}, "diverged": {"0": 8}}
    stand_ins(f"open('result.json', 'w').write({json.dumps(result)!r}); raise SystemExit(1)")
    assert call() == 0
    assert "score 4.0 (1 seeds diverged), " in lines(capsys)[0]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no affinity")
def test_workers_share_the_cores(stand_ins, capsys):
    say = "open('cores', 'w').write(f'{sorted(os.sched_getaffinity(0))} "
    say += '{os.environ["OMP_NUM_THREADS"]}\'); import glob, time\n'
    say += "while len(glob.glob('../../../*/*/*/cores')) < 2: time.sleep(0.05)\n"  # both at once
    cells = stand_ins(say + WRITE, say + WRITE)
    before = sorted(os.sched_getaffinity(0))
    assert call("--workers", "2") == 0
    size = max(1, len(before) // 2)
    shares = [before[:size], before[size:][:size] or before]
    said = [(cell.folder / "cores").read_text() for cell in cells]
    assert said == [f"{share} {size}" for share in shares]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no affinity")
def test_a_cell_has_as_many_cores_in_a_later_call(stand_ins, capsys):
    """Their number changes how sums round."""
    say = "open('cores', 'w').write(str(len(os.sched_getaffinity(0)))); "
    done, left = stand_ins(WRITE, say + WRITE)
    assert call("--workers", "2", "--dry-run") == 0
    (done.folder / "result.json").write_text('{"score": {"0": 1.0}, "diverged": {}}')
    assert call("--workers", "2") == 0
    size = max(1, len(os.sched_getaffinity(0)) // 2)
    assert (left.folder / "cores").read_text() == str(size)


def test_a_cell_that_another_process_began_first_is_waited_for(stand_ins, capsys):
    """The lock is taken some seconds after the start."""
    other = "import fcntl, time; l = open('.lock', 'w'); fcntl.flock(l, 2); open('has', 'w'); "
    other += f"time.sleep(1); {WRITE}"
    code = "import os, subprocess, time\n"
    code += f"subprocess.Popen([{sys.executable!r}, '-S', '-c', {other!r}])\n"
    code += "while not os.path.exists('has'): time.sleep(0.05)\n"
    (cell,) = stand_ins(f"{code}raise SystemExit(2)")
    assert call() == 0
    (line,) = lines(capsys)
    assert line.startswith("[1/1] toy0 made: score 2.0 ± 1.0")
    assert cell.beside(".log").read_text().count("$ ") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_runs_once_and_starts_no_other(number, stand_ins, capsys):
    wait = "import signal, time; n = []; signal.signal(15, lambda *_: n.append(15)); "
    wait += f"os.kill(os.getppid(), {int(number)})\nwhile not n: time.sleep(0.05)\n"
    wait += "time.sleep(0.6)\n"  # a second one would come by then
    cells = stand_ins(wait + "open('signals', 'w').write(str(n)); raise SystemExit(130)", WRITE)
    handler = signal.getsignal(number)
    assert call("--workers", "1") == 128 + number
    assert signal.getsignal(number) == handler
    assert (cells[0].folder / "signals").read_text() == "[15]"
    assert not cells[1].beside(".log").exists()
    out = capsys.readouterr().out
    assert f"{signal.Signals(number).name}: 0 of 2 runs are finished" in out


def test_a_cell_that_another_process_trains_is_waited_for(stand_ins, capsys):
    locked, other = stand_ins("raise SystemExit('must not start')", WRITE)
    with (locked.folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def finish():
            runs.wait_for(lambda: other.result is not None)
            shutil.copy(other.folder / "result.json", locked.folder)
            fcntl.flock(lock, fcntl.LOCK_UN)

        thread = threading.Thread(target=finish)
        thread.start()
        assert call("--workers", "1") == 0
        thread.join()
    assert [line.split()[1] for line in lines(capsys)] == ["toy1", "toy0"]
    assert not locked.beside(".log").exists()  # it was never started


# --- Real runs ----------------------------------------------------------------------------------
def test_a_killed_worker_changes_nothing_in_the_end(here, monkeypatch, capsys):
    runs.write_hdf5(here / "data" / "walker2d-tiny-v4.hdf5", rewards=np.ones(60))
    tiny = ["--algorithms", "bc", "--workers", "1", "--output", "table", "--", *runs.TINY]
    call("--runs-dir", "undisturbed", "--dry-run", *tiny)
    python, script, *by_hand = shlex.split(capsys.readouterr().out.splitlines()[0])
    assert (python, script) == (sys.executable, str(runs.ROOT / "algorithms" / "bc.py"))
    runs.start("bc", by_hand)
    capsys.readouterr()

    def dying(cell, *args):  # the first start ends by SIGKILL after its checkpoint at 8
        monkeypatch.setattr(reproduce, "start", start)
        words = (cell.words[0], str(Path(runs.__file__)), "after save 8", *cell.words[1:])
        return start(reproduce.Cell(cell.algorithm, cell.dataset, cell.folder, words), *args)

    start = reproduce.start
    monkeypatch.setattr(reproduce, "start", dying)
    with monkeypatch.context() as patch:
        patch.setattr(reproduce, "report", lambda *_, **__: ["true"])
        assert call(*tiny) == 1
    killed, other = lines(capsys)
    assert "[1/2] bc hopper-tiny-v4: FAILED, killed by SIGKILL" in killed
    assert "[2/2] bc walker2d-tiny-v4: score" in other
    assert call(*tiny) == 0
    other, mended = lines(capsys)
    assert other.endswith("finished before") and "bc hopper-tiny-v4: score" in mended
    table = Path("table.md").read_text()
    assert "hopper-tiny-v4" in table and "walker2d-tiny-v4" in table and Path("table.png").exists()
    (ours,) = (path.parent for path in Path("runs/bc/hopper-tiny-v4").rglob("result.json"))
    theirs, log = runs.only_run("undisturbed/bc"), ours.with_name(f"{ours.name}.log").read_text()
    assert log.count("$ ") == 2 and "resuming at update 8" in log
    assert (ours / "metrics.csv").read_bytes() == (theirs / "metrics.csv").read_bytes()
    results = [json.loads((folder / "result.json").read_text()) for folder in (ours, theirs)]
    for key in ("score", "best_score", "return", "num_updates"):
        assert results[0][key] == results[1][key]


@runs.SLOW
def test_a_job_is_requeued_and_goes_on(here):
    """submitit's local executor; its signal before a time limit and at a preemption is SIGUSR2."""
    pytest.importorskip("submitit")

    def preempt():
        runs.wait_for(lambda: list(Path("runs").glob("*/*/*/checkpoints/4")))
        controller = next(Path("runs").glob("*/*/*.job")).read_text().split()[1]
        (job,) = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()
        os.kill(int(job), signal.SIGUSR2)

    thread = threading.Thread(target=preempt)
    thread.start()
    longer = [*runs.TINY, "--num-updates", "160", "--eval-every", "160"]
    words = ["--algorithms", "bc", "--slurm", "--slurm-cluster", "local"]
    # In a process of its own: submitit's controller is a fork of it.
    command = [sys.executable, reproduce.__file__, *RUN, *words, "--output", "table"]
    command += ["--", *longer]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=runs.HANGS)
    assert done.returncode == 0, done.stderr
    thread.join()
    log = next(Path("runs/bc").rglob("*.log")).read_text()
    assert log.count("$ ") == 2 and "SIGINT: saving at the next chunk boundary" in log
    assert "resuming at update" in log and not list(Path("runs").glob("*/*/*.job"))
    assert "[1/1] bc hopper-tiny-v4: score" in done.stdout


# --- SLURM, without one -------------------------------------------------------------------------
@pytest.fixture
def slurm(stand_ins, monkeypatch):
    """Programs that answer in SLURM's place; sbatch keeps the script it gets."""
    pytest.importorskip("submitit")
    folder = Path("bin").resolve()
    folder.mkdir()
    for name, body in (
        ("sbatch", f"cat $1 >> {folder}/script; echo Submitted batch job 7"),
        ("squeue", f"cat {folder}/queue"),
        ("srun", "true"),
    ):
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    (folder / "queue").write_text("7_0\n7_1\n")
    return folder


def test_cells_become_one_array(slurm, stand_ins, monkeypatch, capsys):
    cells = stand_ins(WRITE, WRITE)
    monkeypatch.setattr(reproduce, "await_jobs", lambda *_: None)
    more = ["--slurm-partition", "gpu", "--slurm-gpus", "1", "--slurm-jobs", "2"]
    more += ["--slurm-options", "account=lab", "--slurm-setup", "module load cuda"]
    call("--slurm", *more)
    script = (slurm / "script").read_text()
    for line in (
        *("array=0-1%2", "requeue", "partition=gpu", "gpus-per-node=1", "account=lab"),
        *("cpus-per-task=4", "signal=USR2@90", "job-name=atoll-v4", "time=240"),
    ):
        assert f"#SBATCH --{line}\n" in script, line
    assert "\nmodule load cuda\n" in script and "--cpus-per-task=4" in script.split("srun")[1]
    assert [cell.beside(".job").read_text() for cell in cells] == ["slurm 7_0\n", "slurm 7_1\n"]
    call("--slurm")  # both still wait or run: nothing is sent again
    assert (slurm / "script").read_text() == script
    assert "0 jobs submitted, 2 were in the queue before" in capsys.readouterr().out
    (slurm / "queue").write_text("7_1\n")
    call("--slurm")
    assert "1 jobs submitted, 1 were in the queue before" in capsys.readouterr().out
    (slurm / "queue").unlink()
    with pytest.raises(SystemExit) as leave:
        call("--slurm")
    assert leave.value.code == 2 and "squeue does not answer" in capsys.readouterr().err


def test_jobs_are_followed_until_they_leave_the_queue(slurm, stand_ins, monkeypatch, capsys):
    cells = stand_ins(WRITE, WRITE)
    now = [0.0]

    def sleep(seconds):  # at 20 s the first is finished, at 40 s the second is gone
        now[0] += seconds
        if now[0] == 20:
            (cells[0].folder / "result.json").write_text('{"score": {"0": 1.0}, "diverged": {}}')
        if now[0] == 40:
            (slurm / "queue").write_text("")

    monkeypatch.setattr(reproduce.time, "sleep", sleep)
    monkeypatch.setattr(reproduce.time, "monotonic", lambda: now[0])
    assert call("--slurm") == 1
    first, second = lines(capsys)
    assert "toy0 made: score 1.0, 0.3 min" in first
    assert "toy1 made: FAILED, job 7_1 left the queue, 2.2 min" in second


@pytest.mark.parametrize(
    ("hide", "says"),
    [
        ("submitit", "submitit is not installed; pip install submitit"),
        ("sbatch", "sbatch or squeue not found"),
    ],
)
def test_what_slurm_needs_is_told(hide, says, stand_ins, monkeypatch, capsys):
    stand_ins(WRITE)
    if hide == "submitit":
        monkeypatch.setitem(sys.modules, "submitit", None)
    else:
        pytest.importorskip("submitit")
        monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit) as leave:
        call("--slurm")
    assert leave.value.code == 2 and says in capsys.readouterr().err


def test_a_queue_that_does_not_answer_says_nothing_of_a_job(slurm):
    assert reproduce.in_queue("slurm", ["7_0", "8_0"]) == {"7_0"}
    (slurm / "queue").unlink()
    assert reproduce.in_queue("slurm", ["7_0"]) is None

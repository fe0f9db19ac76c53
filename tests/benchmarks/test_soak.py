# SPDX-License-Identifier: Apache-2.0
"""benchmarks/soak.py: faults that happen, verdicts on what came of them. It trains when slow."""

import contextlib
import errno
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys

import helpers_runs as runs
import pytest

from benchmarks import soak

WHOLE = soak.Whole((), 1.0, 0.1)
ERRORS = {
    name: f"error: d: cannot be written ({os.strerror(x)}); go on" for name, x in soak.SAYS.items()
}
REFUSED = "error: d: another process trains in it; wait for it\n"


def seen(fault, code, **facts):
    """Facts of a broken process in the middle of training."""
    facts = {"when": "in time", "at": 500, "saved at": 550, "finished": False} | facts
    return {"fault": fault, "exit code": code, "stderr": ERRORS.get(fault, ""), **facts}


def second(code, code_of_second, err=REFUSED, **facts):
    return seen("second", code, finished=True, second=code_of_second, **facts) | {
        "second stderr": err
    }


# --- Verdicts -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "facts",
    [
        seen("kill", -9),
        seen("damage", -9),
        seen("term", 143),
        seen("term", -15, **{"saved at": None}),  # does not listen yet
        *(seen(fault, 2) for fault in soak.SAYS),
        seen("full", 2, stderr=f"WARNING: wandb: gone\n{ERRORS['full']}\n"),
        second(0, 2),
    ],
)
def test_what_is_expected_took_effect_without_problems(facts):
    assert soak.judge(facts) == (True, [])


@pytest.mark.parametrize(
    "facts, problem",
    [
        (seen("kill", 1), "exit code 1"),
        (seen("damage", 2), "exit code 2"),
        (seen("term", 0), "exit code 0"),
        (seen("term", 0, finished=True), "exit code 0"),  # half of the run ignored the signal
        (seen("term", -15), "exit code -15"),  # it has listened before
        (seen("term", 143, stderr="Traceback (most recent call last):"), "a traceback"),
        (seen("kill", "hung"), "exit code hung"),
        (seen("full", 0, finished=True), "exit code 0"),  # trained on with nothing written
        (seen("full", 1), "exit code 1"),
        (seen("full", 2, stderr=ERRORS["limit"]), "not one line with 'No space left on device'"),
        (seen("limit", 2, stderr=f"{ERRORS['limit']}\nmore"), "not one line with 'File too large'"),
        (seen("read-only", 2, stderr=""), "not one line with 'Read-only file system'"),
        (second(0, 0), "the second: exit code 0"),
        (second(0, 2, "error: no"), "not one line with 'another process trains in it'"),
        (second(1, 2), "exit code 1"),  # the first was disturbed
    ],
)
def test_anything_else_is_a_problem(facts, problem):
    took, problems = soak.judge(facts)
    assert took and problem in problems


@pytest.mark.parametrize(
    "facts, problems",
    [
        (seen("kill", 0, when="late"), []),
        (seen("damage", -9, when="early"), []),
        (seen("kill", -9, finished=True), []),
        (seen("term", 0, finished=True, at=soak.UPDATES - soak.LOG_EVERY), []),
        (second(0, 0, when="late"), []),
        (seen("kill", 1, when="late"), ["exit code 1 before the fault"]),
    ],
)
def test_a_fault_before_or_after_its_time_took_no_effect(facts, problems):
    assert soak.judge(facts) == (False, problems)


@pytest.mark.parametrize(
    "logged, saved, resumed, more, lost",
    [
        (None, None, 0, {}, 0),
        (500, 500, 500, {}, 0),
        (500, 550, 550, {}, 0),
        (500, 550, 500, {}, 50),  # the newest checkpoint was passed over
        (500, None, 0, {}, 500),  # nothing was ever saved
        (500, 200, 200, {}, 300),  # it stopped saving
        (500, 550, 500, {"behind": 50, "resumed stderr": "550 cannot be read"}, 0),
        (500, 550, 450, {"behind": 50, "resumed stderr": "550 cannot be read"}, 50),
        (500, 550, 500, {"behind": 50}, 50),  # took the older one without a word
    ],
)
def test_lost_updates(logged, saved, resumed, more, lost):
    facts = {"logged at": logged, "saved at": saved, "resumed at": resumed, "resumed stderr": ""}
    assert soak.lost_updates(facts | more) == lost


def test_half_a_line_is_no_boundary(tmp_path):
    run = soak.Run("bc", tmp_path / "data.hdf5", tmp_path / "runs")
    assert run.logged() is None and run.saved() == []
    (run.place / "checkpoints" / "150").mkdir(parents=True)
    (run.place / "checkpoints" / "200.orbax-checkpoint-tmp").mkdir()
    (run.place / "timing.csv").write_text("update,chunk_seconds\n0,1\n50,1\n10")
    assert run.logged() == 50 and run.saved() == [150]


# --- Trials -------------------------------------------------------------------------------------
def row(took, problems=()):
    facts = {"fault": "kill", "saved at": None, "as undisturbed": took, "problems": [*problems]}
    return facts | {"took effect": took}


def tried(monkeypatch, tmp_path, *rows):
    """`trial` with attempts that end like this."""
    rows = list(rows)

    def attempt(*_):
        if isinstance(rows[0], Exception):
            raise rows.pop(0)
        return rows.pop(0)

    monkeypatch.setattr(soak, "attempt", attempt)
    case = soak.Case("kill", "bc")
    return soak.trial(case, None, tmp_path / "trial", WHOLE, random.Random(0))


def test_a_fault_without_effect_is_drawn_again(monkeypatch, tmp_path):
    found = tried(monkeypatch, tmp_path, row(False), row(False), row(True))
    assert found["tries"] == 3 and found["took effect"] and not found["problems"]


def test_a_fault_that_never_takes_effect_fails_the_trial(monkeypatch, tmp_path):
    found = tried(monkeypatch, tmp_path, *(row(False) for _ in range(soak.TRIES)))
    assert found["problems"] == [f"took no effect at {soak.TRIES} moments"]


def test_a_fault_that_cannot_be_made_fails_the_trial(monkeypatch, tmp_path):
    found = tried(monkeypatch, tmp_path, soak.Failed("mount: busy"), row(True))
    assert found["problems"] == ["the fault could not be made: mount: busy"]
    assert found["tries"] == 1 and not found["took effect"]


def test_the_record_has_the_trials_so_far(monkeypatch, tmp_path):
    rows = [row(True), row(True, ["exit code 1"])]

    def trial(*_):
        if not rows:
            raise KeyboardInterrupt
        return rows.pop(0) | {"tries": 2}

    monkeypatch.setattr(soak, "trial", trial)
    monkeypatch.setattr(soak, "undisturbed", lambda *_: WHOLE)
    arguments = soak.Arguments(("bc",), ("kill",), times=3, output=tmp_path / "records" / "soak")
    with pytest.raises(KeyboardInterrupt):
        soak.main(arguments)
    record = json.loads((tmp_path / "records" / "soak.json").read_text())
    assert [x["problems"] for x in record["rows"]] == [[], ["exit code 1"]]
    table = (tmp_path / "records" / "soak.md").read_text()
    assert "| kill | 2 | 2 | 2 | 2 | exit code 1 (1) |" in table
    assert "moments drawn again: 2" in table


# --- Faults -------------------------------------------------------------------------------------
WRITES = """
import sys
file = open(sys.argv[1], "w")
while True:
    try:
        file.write("x" * 100), file.flush(), open(sys.argv[1] + ".too", "a").close()
    except OSError as error:
        sys.exit(error.errno)
"""


@pytest.fixture
def writer(tmp_path):
    """A Run at a folder, and a process that writes into it and exits with the errno it meets."""
    (folder := tmp_path / "runs").mkdir()
    run, processes = soak.Run("bc", tmp_path / "data.hdf5", folder), []

    def start():
        words = [sys.executable, "-c", WRITES, str(folder / "file")]
        processes.append(subprocess.Popen(words))
        runs.wait_for((folder / "file").exists)
        return processes[-1]

    yield run, start
    for process in processes:
        process.kill()
        process.wait()


def strike(fault, run, process, disk=None):
    return soak.strike(soak.Case(fault, "bc"), run, process, disk, random.Random(0))


def test_limit_reaches_a_process_under_way(writer):
    run, start = writer
    assert strike("limit", run, start())["exit code"] == errno.EFBIG
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


@pytest.mark.parametrize("fault", soak.MOUNTED)
def test_mounted_faults_reach_a_process_under_way(writer, fault):
    run, start = writer
    try:
        disk = soak.Disk(run.folder).__enter__()
    except (soak.Failed, OSError) as error:
        pytest.skip(f"no file system can be mounted: {error}")
    with contextlib.ExitStack() as stack:
        stack.push(disk)
        assert strike(fault, run, start(), disk)["exit code"] == soak.SAYS[fault]
        (run.folder / "after").write_text("x" * 10_000)  # it is over
        assert (run.folder / "file").exists()
    assert not disk.image.exists()


def test_a_process_that_has_ended_is_not_struck(writer):
    run, start = writer
    process = start()
    process.kill()
    process.wait()
    assert strike("term", run, process) == {"when": "late", "exit code": -9}


@pytest.mark.skipif(shutil.which("ps") is None, reason="this system has no ps")
def test_every_process_of_a_run_is_found():
    words = [sys.executable, "-c", "import subprocess; subprocess.run(['sleep', '60'])"]
    process = subprocess.Popen(words, start_new_session=True)
    try:
        runs.wait_for(lambda: len(soak.family(process.pid)) == 2)
    finally:
        soak.tell(soak.family(process.pid), 9)
        process.wait()


@pytest.mark.parametrize("seed", range(12))
def test_damage_is_to_one_file_of_the_newest(tmp_path, seed):
    run = soak.Run("bc", tmp_path / "data.hdf5", tmp_path / "runs")
    for step in ("50", "100"):
        for part in ("state", "meta"):
            (folder := run.place / "checkpoints" / step / part).mkdir(parents=True)
            (folder / "file").write_bytes(bytes(range(200)))
        if step == "50":
            assert soak.damage(run, random.Random(seed)) == {"when": "early"}
    before = runs.tree(run.place)
    facts = soak.damage(run, random.Random(seed))
    after = runs.tree(run.place)
    (changed,) = [x for x in before if before[x] != after.get(x)]
    assert changed.startswith("checkpoints/100/") and facts["note"].startswith(changed)
    assert facts["behind"] == 50
    if "flipped" in facts["note"]:
        content = (run.place / changed).read_bytes()
        assert sum((a ^ b).bit_count() for a, b in zip(content, range(200), strict=True)) == 1


@pytest.mark.parametrize("fault", soak.CODES)
def test_moments_are_within_the_run(fault):
    draw = random.Random(0)
    moments = [soak.moment(fault, WHOLE, draw) for _ in range(300)]
    starts = [seconds for boundary, seconds in moments if boundary is None]
    assert max(boundary or 0 for boundary, _ in moments) < soak.UPDATES
    assert bool(starts) == (fault not in ("damage", "second")) and len(starts) < 100
    assert max(seconds for _, seconds in moments) <= WHOLE.startup


@pytest.mark.parametrize("fault", soak.CODES)
def test_with_online_they_are_in_the_online_phase(fault):
    draw = random.Random(0)
    moments = [soak.moment(fault, WHOLE, draw, online=True) for _ in range(300)]
    boundaries = {boundary for boundary, _ in moments}
    assert min(boundaries) == soak.OFFLINE and max(boundaries) < soak.UPDATES


@pytest.mark.parametrize("algorithm", ["rebrac", "cal_ql", "wsrl", "rlpd"])
def test_a_run_with_an_online_phase_is_one_that_the_file_takes(algorithm, tmp_path, monkeypatch):
    """Its updates end at the same place, and it takes no first steps of thousands."""
    from common.experiment import config, phases

    soak.write_data(data := tmp_path / "data.hdf5")
    words = {}
    monkeypatch.setattr(soak.subprocess, "Popen", lambda argv, **_: words.update(argv=argv))
    soak.Run(algorithm, data, tmp_path, online=True).start()
    cfg, _ = config.parse(runs.module(algorithm).Config, words["argv"][2:])
    assert phases.last_update(cfg) == soak.UPDATES and cfg.num_updates == soak.OFFLINE
    assert phases.env_steps(cfg) <= 320


def test_rows_of_the_env_are_compared(tmp_path, monkeypatch):
    run = soak.Run("rebrac", tmp_path / "data.hdf5", tmp_path, online=True)
    monkeypatch.setattr(run, "finished", lambda: True)
    monkeypatch.setattr(run, "result", lambda: (b"", {}, [], b"01"))
    for rows, problems in ((b"01", []), (b"02", ["other rows of the env"])):
        assert soak.differences(run, soak.Whole((b"", {}, [], rows), 0, 0)) == problems


# --- All of it ----------------------------------------------------------------------------------
def test_unknown_words_are_one_line(capsys):
    wrong = [soak.Arguments(("cb",)), soak.Arguments(faults=("fire",))]
    wrong += [soak.Arguments(kills=3), soak.Arguments(online=True, kills=-1)]
    for arguments in [*wrong, soak.Arguments(("rebrac", "bc"), online=True)]:
        with pytest.raises(SystemExit) as stop:
            soak.main(arguments)
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


@runs.SLOW
def test_two_trials(tmp_path):
    words = ["--algorithms", "bc", "--faults", "kill", "damage", "--times", "2"]
    words = [sys.executable, str(runs.ROOT / "benchmarks" / "soak.py"), *words]
    done = subprocess.run(
        [*words, "--output", str(tmp_path / "soak")],
        env=runs.environment(tmp_path / "xla"),
        capture_output=True,
        text=True,
        timeout=runs.HANGS,
        check=False,
    )
    rows = json.loads((tmp_path / "soak.json").read_text())["rows"]
    assert done.returncode == 0, [x["problems"] for x in rows]
    assert [x["fault"] for x in rows] == ["kill", "damage"]
    assert all(x["took effect"] and x["as undisturbed"] for x in rows)
    assert (tmp_path / "soak.md").read_text().count("| 1 | 1 |") == 2


@runs.SLOW
def test_a_run_that_is_killed_twice_in_its_online_phase():
    words = [sys.executable, str(runs.ROOT / "benchmarks" / "soak.py"), "--online", "--kills", "2"]
    done = subprocess.run(
        [*words, "--algorithms", "rebrac"],
        capture_output=True,
        text=True,
        timeout=runs.HANGS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = done.stdout.splitlines()
    facts = re.fullmatch(
        r"rebrac: killed after updates (.*), resumed at (.*): as undisturbed", line
    )
    killed, resumed = (json.loads(x) for x in facts.groups())
    assert len(killed) == len(resumed) == 2 and min(killed) >= soak.OFFLINE
    assert all(a <= b for a, b in zip(killed, resumed, strict=True))

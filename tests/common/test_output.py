# SPDX-License-Identifier: Apache-2.0
"""What a run prints, to whatever reads it, and why a checkpoint was not read."""

import ast
import errno
import io
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import helpers_runs as runs
import numpy as np
import pytest

from common import command_line, evaluation
from common.experiment import checkpoints, progress, records, start, timing, unreadable

COMMON = runs.ROOT / "common"


# --- Readers that go away -----------------------------------------------------------------------
class Broken(io.StringIO):
    """A stream that nothing takes: every call of it fails until it points elsewhere."""

    def __init__(self, number, target):
        super().__init__()
        self.number, self.target = number, target

    def write(self, text=""):
        if not os.path.samestat(os.fstat(self.target), os.stat(os.devnull)):
            raise OSError(self.number, os.strerror(self.number))
        return len(text)

    flush = write

    def fileno(self):
        return self.target


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize(
    "number", [errno.EPIPE, errno.EIO, errno.ENOSPC, errno.EBADF, errno.ECONNRESET, errno.ESTALE]
)
def test_an_output_that_breaks_ends_nothing(monkeypatch, tmp_path, name, number):
    with (tmp_path / "out").open("w") as out:
        monkeypatch.setattr(sys, name, Broken(number, out.fileno()))
        command_line.outlive_the_reader()
        command_line.outlive_the_reader()  # once is enough
        for _ in range(3):
            print("a line", file=getattr(sys, name), flush=True)


def test_a_run_outlives_its_reader(tmp_path):
    """`... 2>&1 | head`: nothing is read from the beginning on."""
    runs.write_hdf5(tmp_path / "data.hdf5")
    words = runs.command("rebrac", ["--dataset", "data.hdf5", *runs.TINY, "--num-updates", "8"])
    reader, writer = os.pipe()
    os.close(reader)
    environment = runs.environment(os.environ["JAX_COMPILATION_CACHE_DIR"], PYTHONUNBUFFERED="1")
    pipes = {"stdout": writer, "stderr": writer}
    done = subprocess.run(words, cwd=tmp_path, env=environment, timeout=120, check=False, **pipes)
    os.close(writer)
    assert done.returncode == 0
    folder = runs.only_run(tmp_path / "runs")
    assert json.loads((folder / "result.json").read_text())["num_updates"] == 8


# --- Encodings ----------------------------------------------------------------------------------
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "cp437", "koi8-r", "utf-8"])
def test_every_encoding_of_the_output_takes_every_line(monkeypatch, encoding):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
    command_line.use_plain_letters()
    numbers = np.array([1.0, 3.0])
    progress.say_result("läufe/日本", numbers, numbers, numbers, 0)
    sys.stdout.flush()
    (line,) = written.getvalue().decode(encoding).splitlines()
    plain = encoding in ("ascii", "koi8-r")
    assert f"final score 2.0 {'+-' if plain else '±'} 1.0" in line


def test_a_run_in_an_ascii_locale(tmp_path):
    """Its files are written and read in UTF-8 whatever the locale says."""
    runs.write_hdf5(tmp_path / "data.hdf5")
    argv = ["--dataset", "data.hdf5", *runs.TINY, "--num-updates", "4", "--seeds", "0", "1"]
    plain = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    environment = runs.environment(os.environ["JAX_COMPILATION_CACHE_DIR"], **plain)
    code, out, error = runs.call(runs.command("rebrac", argv), tmp_path, environment)
    assert code == 0, error
    assert " +- " in out.splitlines()[-1]


def text_calls(tree):
    """Calls that open, read or write a file as text without naming its encoding."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name not in ("open", "read_text", "write_text"):
            continue
        owner = getattr(getattr(node.func, "value", None), "id", "")
        words = [x.value for x in (*node.args, *(k.value for k in node.keywords)) if is_word(x)]
        binary = any(re.fullmatch(r"[rwax]\+?b\+?|[rwax]b\+?|r\+b", word) for word in words)
        named = any(keyword.arg == "encoding" for keyword in node.keywords)
        if not binary and not named and owner not in ("os", "webbrowser"):
            yield node


def is_word(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


@pytest.mark.parametrize(
    "file",
    [*sorted(COMMON.rglob("*.py")), *(runs.ROOT / "benchmarks" / x for x in ("report.py",))],
    ids=lambda x: str(x.relative_to(runs.ROOT)),
)
def test_text_files_have_an_encoding(file):
    found = [node.lineno for node in text_calls(ast.parse(file.read_text(encoding="utf-8")))]
    assert not found, f"{file}: no encoding in line {found}"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("path.read_text()", 1),
        ("path.open('w')", 1),
        ("open(path)", 1),
        ("open(path, 'rb')", 0),
        ("path.open('r+b')", 0),
        ("path.write_text('x', encoding='utf-8')", 0),
        ("os.open(path, os.O_RDONLY)", 0),
    ],
)
def test_that_check_finds_what_it_looks_for(text, count):
    assert len([*text_calls(ast.parse(text))]) == count


# --- Between evaluations ------------------------------------------------------------------------
@pytest.fixture
def told(monkeypatch):
    """Go through the chunk boundaries of a run whose chunks take so long.

    -> {seconds since the start: the line printed then}
    """

    def go(chunk_seconds, evaluation_seconds=0.0, resumed=0, **values):
        clock, said = SimpleNamespace(now=0.0), {}
        monkeypatch.setattr(
            progress, "print", lambda line, **_: said.update({clock.now: line}), raising=False
        )
        monkeypatch.setattr(progress.time, "monotonic", lambda: clock.now)
        cfg = runs.module("rebrac").Config(**values)
        bar, spent = progress.Progress(cfg), timing.Timing()
        bar.start(resumed, cfg.num_updates)
        for step in range(resumed, cfg.num_updates + 1, cfg.log_every):
            if step > resumed:
                clock.now += chunk_seconds
                spent.chunks.append(chunk_seconds)
            if step % cfg.eval_every == 0:
                clock.now += evaluation_seconds
                spent.add_evaluation(evaluation_seconds)
                bar.evaluated(step, np.array([1.0]))
            bar.advance(step, spent)
        bar.close()
        return said

    return go


CHUNKS = progress.CHUNKS
SIZE = {"num_updates": 20_000, "log_every": 1000, "eval_every": 10_000}


@pytest.mark.parametrize("evaluation", [0.0, 200.0])
@pytest.mark.parametrize("seconds", [0.1, 1.0, 5.0, 7.0, 20.0, 30.0, 59.0, 60.0, 600.0])
def test_a_log_file_hears_something_every_minute(told, seconds, evaluation):
    """Without a terminal: at evaluations and, where more than a minute lies between, there."""
    said = told(seconds, evaluation, **SIZE)
    silence = np.diff(sorted(said))
    quiet = max(progress.QUIET + seconds, CHUNKS * seconds) + evaluation
    assert silence.max() <= quiet
    between = [line for line in said.values() if re.search(r"^update .*: about .* left$", line)]
    assert len(between) <= 20 * seconds / progress.QUIET  # and not oftener
    assert len([line for line in said.values() if "score" in line]) == 3


@pytest.mark.parametrize(("variable", "expected"), [(None, {"disable": None}), ("1", {})])
def test_a_variable_of_the_progress_bar_is_left_to_it(monkeypatch, variable, expected):
    import tqdm

    made = []
    monkeypatch.setattr(tqdm, "tqdm", lambda **options: made.append(options))
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    if variable is not None:
        monkeypatch.setenv("TQDM_DISABLE", variable)
    progress.Progress(None).start(0, 8)
    assert {key: x for key, x in made[0].items() if key == "disable"} == expected


def test_the_duration_is_said_once_the_speed_is_known(told):
    said = [*told(30.0, 60.0, **SIZE).values()]
    (line,) = [line for line in said if line.startswith("speed")]
    # 18 chunks of 30 s and 2 evaluations of a minute are left after 2,000 updates.
    assert line == "speed: 33 updates/s, so about 11 min to go (training 9 min, evaluation 2 min)"
    assert said.index(line) == 1  # after the evaluation at update 0


def test_a_run_of_hours_says_what_would_take_one(told):
    said = told(1000.0, **SIZE, seeds=(0, 1)).values()
    (line,) = [line for line in said if line.startswith("speed")]
    assert "speed: 1.0 updates/s of 2 seeds each, so about 5 h 0 min to go" in line
    assert "that is long on this machine" not in line  # no interval of evaluations fits an hour
    said = told(1000.0, 1.0, **SIZE | {"eval_every": 1000}).values()
    (line,) = [line for line in said if line.startswith("speed")]
    assert line.endswith("an hour is enough for about --num-updates 3000")
    said = told(1000.0, 1.0, **SIZE | {"eval_every": 1000}, resumed=10_000).values()
    assert "speed" in "".join(said)
    assert "an hour is enough" not in "".join(said)  # a resumed run cannot become shorter


def test_the_time_of_checkpoints_is_promised_too():
    """20 chunks of 30 s, 2 evaluations, a checkpoint of 5 s at each and every 100 s between."""
    cfg = runs.module("rebrac").Config(**SIZE)
    spent = timing.Timing()
    spent.chunks = [30.0, 30.0]
    assert "checkpoints" not in progress.speed_line(cfg, 2000, spent)
    assert sum(progress.seconds_left(cfg, 2000, spent)) == 18 * 30
    spent.add_checkpoint(5.0)
    assert progress.seconds_left(cfg, 2000, spent) == (18 * 30, 0.0, (2 + 18 * 30 / 100) * 5)
    line = progress.speed_line(cfg, 2000, spent)
    assert "about 10 min to go (training 9 min, evaluation 0 s, checkpoints 37 s)" in line
    spent.save_seconds = 0.0  # one at every chunk boundary
    assert progress.seconds_left(cfg, 2000, spent)[2] == 18 * 5


def test_a_slow_checkpoint_is_followed_by_a_longer_time_without_one():
    spent = timing.Timing()
    assert spent.between_checkpoints() == 10
    spent.add_checkpoint(0.1)
    assert spent.between_checkpoints() == 10
    spent.add_checkpoint(2.5)
    assert spent.between_checkpoints() == 50 and spent.checkpoints == 2.6
    asked = timing.Timing(save_seconds=3.0)
    asked.add_checkpoint(2.5)
    assert asked.between_checkpoints() == 3


def test_a_run_begun_before_checkpoints_were_timed_goes_on(tmp_path):
    """Its timing.csv gets the column, empty where nothing was measured."""
    (tmp_path / "timing.csv").write_text(
        "update,chunk_seconds,train_seconds,eval_seconds\n0,0,0,1\n4,1,1,1\n8,1,2,1\n12,1"
    )
    spent, kept = timing.Timing(), records.Records(tmp_path, (0,))
    spent.restore({"train": 2.0, "eval": 1.0})
    spent.add_checkpoint(0.5)
    kept.resume(8)
    kept.write_timing(8, spent.row())
    header, *rows = (tmp_path / "timing.csv").read_text().splitlines()
    assert header == "update,chunk_seconds,train_seconds,eval_seconds,checkpoint_seconds"
    assert rows == ["0,0,0,1,", "4,1,1,1,", "8,0.000,2.000,1.000,0.500"]


def test_a_run_of_two_chunks_says_no_duration(told):
    said = told(30.0, num_updates=2000, log_every=1000, eval_every=1000)
    assert [line for line in said.values() if not line.startswith("update")] == []


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "0 s"),
        (89, "89 s"),
        (91, "2 min"),
        (3600, "60 min"),
        (5400, "1 h 30 min"),
        (35_940, "9 h 59 min"),
        (36_000, "10 h"),
        (200_000, "56 h"),
    ],
)
def test_durations(seconds, words):
    assert progress.duration(seconds) == words


# --- The end ------------------------------------------------------------------------------------
NAN, ONE = np.array([np.nan]), np.array([1.0])
TWO, MIXED = np.array([1.0, 3.0]), np.array([1.0, np.nan])


@pytest.mark.parametrize(
    ("scores", "best", "diverged", "returns", "words"),
    [
        (ONE, ONE, 0, ONE, "final score 1.0 (best during training 1.0)"),
        (NAN, NAN, 0, NAN, "no score, since the env gave rewards that are no finite numbers"),
        (NAN, ONE, 0, NAN, "no score, since the env gave rewards that are no finite numbers"),
        (NAN, NAN, 0, None, "trained without an evaluation"),
        (NAN, NAN, 1, NAN, "all seeds diverged"),
        (MIXED, MIXED, 1, MIXED, "1 of 2 seeds"),
        (MIXED, MIXED, 0, MIXED, "1 without a score"),
        (TWO, TWO + 1, 0, TWO, "2.0 ± 1.0 (best during training 3"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_the_last_line_says_what_happened(capsys, scores, best, diverged, returns, words):
    progress.say_result("here", scores, best, returns, diverged)
    (line,) = capsys.readouterr().out.splitlines()
    assert words in line and line.endswith("in here")


@pytest.mark.parametrize(
    ("numbers", "mean", "std"),
    [
        ([1.0, 3.0], 2.0, 1.0),
        ([0.0], 0.0, 0.0),
        ([2.0, np.nan], 2.0, 0.0),
        ([np.nan, np.nan], None, None),
        ([], None, None),
    ],
)
def test_mean_and_std_over_the_seeds_that_have_a_score(numbers, mean, std):
    found = records.over_seeds("score", numbers)
    assert found == {"score_mean": mean, "score_std": std}
    json.dumps(found, allow_nan=False)


def test_the_untrained_policy_is_no_best(tmp_path, monkeypatch):
    """Scores fall from 100 at update 0: the best is that of the first evaluation after it."""
    monkeypatch.chdir(tmp_path)
    runs.write_hdf5("data.hdf5")

    def falling(rollouts, params, update):
        score = np.array([100.0 - update])
        numbers = dict.fromkeys(("score", "return", "length"), score) | {"success": None}
        return numbers | {"seconds": 0.0, "preparing": 0.0}

    monkeypatch.setattr(evaluation.Rollouts, "run", falling)
    runs.start("rebrac", ["--dataset", "data.hdf5", *runs.TINY])
    result = json.loads((runs.only_run("runs") / "result.json").read_text())
    assert result["score"] == {"0": 76.0} and result["best_score"] == {"0": 92.0}
    assert (result["score_mean"], result["score_std"]) == (76.0, 0.0)


# --- Memory -------------------------------------------------------------------------------------
OUT_OF_MEMORY = [
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 25769803776 bytes."),
    MemoryError("Unable to allocate 9.00 TiB for an array"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_memory_that_is_not_enough_is_one_line(error, monkeypatch, capsys):
    others = []
    monkeypatch.setattr(sys, "excepthook", lambda *what: others.append(what))
    start.explain_memory()
    with pytest.raises(SystemExit) as leave:
        sys.excepthook(type(error), error, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert leave.value.code == 2 and line.startswith("error: there is not enough memory (")
    another = ValueError("of another kind")
    sys.excepthook(ValueError, another, None)
    assert others == [(ValueError, another, None)]


def test_a_program_ends_with_the_code_of_its_hook():
    code = "import sys; sys.excepthook = lambda *_: sys.exit(2); raise ValueError"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 2


# --- Why a checkpoint was not read --------------------------------------------------------------
OUTSIDE = {
    "a package that is missing": ImportError("No module named 'zstandard'"),
    "no memory": MemoryError(),
    "no memory for XLA": RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"),
    "no permission": PermissionError(errno.EACCES, "Permission denied"),
    "not the owner": PermissionError(errno.EPERM, "Operation not permitted"),
    "too many open files": OSError(errno.EMFILE, "Too many open files"),
    "too many of the system": OSError(errno.ENFILE, "Too many open files in system"),
    "a failing disk": OSError(errno.EIO, "Input/output error"),
    "a file server": OSError(errno.ESTALE, "Stale file handle"),
    "a slow file server": OSError(errno.ETIMEDOUT, "Connection timed out"),
    "tensorstore": ValueError("PERMISSION_DENIED: Error opening [os_error_code='13']"),
}
DAMAGE = {
    "no file": FileNotFoundError(errno.ENOENT, "No such file"),
    "no JSON": json.JSONDecodeError("Expecting value", "", 0),
    "no text": UnicodeDecodeError("utf-8", b"\xa5", 0, 1, "invalid start byte"),
    "bits": unreadable.Changed("its digest does not match"),
    "lost data": ValueError("DATA_LOSS: CRC mismatch"),
    "a part that is missing": ValueError("NOT_FOUND: Error opening"),
    "no manifest": ValueError("FAILED_PRECONDITION: Error decoding manifest"),
}
UNKNOWN = {
    "another version": TypeError("got an unexpected keyword argument"),
    "another form": KeyError("item_handlers"),
    "a value": ValueError("not understood"),
}


@pytest.fixture
def fails(monkeypatch, tmp_path):
    """The run folder of a manager, all of whose checkpoints fail to be read with this error."""
    folder = tmp_path / "run"
    folder.mkdir()
    state = {"x": np.arange(3.0, dtype=np.float32)}

    def make(error):
        manager = checkpoints.manager(folder)
        for step in (1, 2):
            checkpoints.save(manager, step, state, {"update": step})

        def restore(step, args):
            raise error

        monkeypatch.setattr(manager, "restore", restore)
        return folder, lambda: checkpoints.restore(manager, state)

    return make


@pytest.mark.parametrize("kind", [*OUTSIDE, *DAMAGE, *UNKNOWN])
def test_deleting_is_advised_for_damage_alone(fails, capsys, kind):
    folder, restore = fails((OUTSIDE | DAMAGE | UNKNOWN)[kind])
    before = runs.tree(folder)
    with pytest.raises(SystemExit) as leave:
        restore()
    *warnings, line = capsys.readouterr().err.splitlines()
    assert leave.value.code == 2 and line.startswith("error: ")
    assert ("delete" in line) == (kind in DAMAGE), line
    assert len(warnings) == (0 if kind in OUTSIDE else 2)
    assert runs.tree(folder) == before

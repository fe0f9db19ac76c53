# SPDX-License-Identifier: Apache-2.0
"""Two threads of one process that train at the same time: what exists once per process."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import gymnasium
import helpers_runs as runs
import numpy as np
import pytest
import tyro

from algorithms import bc, rebrac, rlpd
from common import command_line, envs, experiment, folders, threads
from common.envs import making, pointmaze, quiet
from common.experiment import provenance, wandb_mirror, wrong_words

LONG = 0.3  # seconds that a thread waits for another one that must not come


class Crossing:
    """A place where threads wait for each other. `most` is how many were there at a time."""

    def __init__(self):
        self.inside, self.most = 0, 0
        self.door, self.both = threading.Lock(), threading.Barrier(2)

    def __enter__(self):
        with self.door:
            self.inside += 1
            self.most = max(self.most, self.inside)
        with contextlib.suppress(threading.BrokenBarrierError):
            self.both.wait(LONG)

    def __exit__(self, *error):
        with self.door:
            self.inside -= 1


def together(*calls):
    """What the calls return or raise, each in a thread of its own."""

    def outcome(call):
        try:
            return call()
        except BaseException as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(outcome, calls))


# --- Standard error -----------------------------------------------------------------------------
def test_a_capture_leaves_other_threads_their_standard_error(capsys):
    begun, told = threading.Event(), threading.Event()

    def capture():
        with threads.captured_errors() as kept:
            begun.set()
            assert told.wait(runs.HANGS)
            print("mine", file=sys.stderr)
            return kept.getvalue()

    def tell():
        assert begun.wait(runs.HANGS)
        print("WARNING: theirs", file=sys.stderr, flush=True)
        told.set()

    assert together(capture, tell)[0] == "mine\n"
    assert capsys.readouterr().err == "WARNING: theirs\n"


def test_two_captures_give_standard_error_back():
    before, crossing = sys.stderr, Crossing()

    def capture(name):
        with threads.captured_errors() as kept, crossing:
            print(name, file=sys.stderr)
            return kept.getvalue()

    assert together(lambda: capture("a"), lambda: capture("b")) == ["a\n", "b\n"]
    assert crossing.most == 1 and sys.stderr is before


def test_a_stream_that_somebody_puts_back_late_shows_everything(capsys, monkeypatch):
    with threads.captured_errors():
        theirs = contextlib.redirect_stderr(io.StringIO())
        theirs.__enter__()
    theirs.__exit__(None, None, None)  # ours again, whose capture is over
    stale = sys.stderr
    monkeypatch.undo()
    print("shown", file=stale)
    assert capsys.readouterr().err == "shown\n"
    sys.stderr = stale.stream


def test_standard_error_may_be_missing(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with threads.captured_errors() as kept:
        print("mine", file=sys.stderr)
    assert kept.getvalue() == "mine\n" and sys.stderr is None


# --- Command lines ------------------------------------------------------------------------------
@pytest.mark.parametrize("others", [rebrac, rlpd])
def test_one_thread_at_a_time_parses(monkeypatch, capsys, tmp_path, others):
    """tyro reads comments by way of `ast`. Each thread has its own message, and all are shown."""
    crossing, cli, before = Crossing(), tyro.cli, sys.stderr

    def crossed(*args, **settings):
        with crossing:
            return cli(*args, **settings)

    monkeypatch.setattr(wrong_words.tyro, "cli", crossed)
    words = ["--dataset", str(tmp_path / "x.hdf5")]
    first, second = together(
        lambda: experiment.parse(bc.Config, [*words, "--num-updates", "some"]),
        lambda: experiment.parse(others.Config, [*words, "--batch-sizes", "8"]),
    )
    assert crossing.most == 1 and sys.stderr is before
    assert first.code == second.code == 2
    told = capsys.readouterr().err
    assert "--num-updates some: must be" in told and "there is no flag --batch-sizes" in told


def test_one_thread_at_a_time_reads_source_code(monkeypatch):
    crossing, parse = Crossing(), provenance.ast.parse

    def crossed(text):
        with crossing:
            return parse(text)

    monkeypatch.setattr(provenance, "ast", SimpleNamespace(parse=crossed))
    trees = together(lambda: provenance.parsed("a = 1"), lambda: provenance.parsed("b = 2"))
    assert crossing.most == 1 and len(trees) == 2


def test_why_a_thread_failed_is_shown(tmp_path):
    """Not an exit code without a word, as where a capture had taken the process's stream."""
    text = f"""
import sys, threading
sys.path.insert(0, {str(runs.ROOT)!r})
from concurrent.futures import ThreadPoolExecutor
import tyro
from algorithms import bc, td3_bc
from common import experiment

both, left, came = threading.Barrier(2), threading.Event(), []

def crossed(*args, **settings):
    came.append(threading.get_ident())
    try:
        both.wait({LONG})
    except threading.BrokenBarrierError:
        pass
    if came[0] != threading.get_ident():  # the first one to come is the first one to leave
        left.wait({LONG})
    raise SystemError("AST constructor recursion depth mismatch")

def parse(module):
    try:
        experiment.parse(module.Config, ["--dataset", "x"])
    finally:
        left.set()

tyro.cli = crossed
with ThreadPoolExecutor(2) as pool:
    for future in [pool.submit(parse, module) for module in (bc, td3_bc)]:
        future.result()
"""
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert "SystemError: AST constructor recursion depth mismatch" in done.stderr


def test_a_thread_takes_its_words_from_the_program_s(monkeypatch, capsys):
    """Only the main thread may handle signals."""
    monkeypatch.setattr(sys, "argv", ["bc.py", "--batch-sizes", "8"])
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    (parsed,) = together(lambda: experiment.parse(bc.Config))
    assert parsed.code == 2 and "there is no flag --batch-sizes" in capsys.readouterr().err
    called = []
    assert together(lambda: command_line.run(lambda: called.append(1))) == [None] and called
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# --- Warnings, variables, registry, random numbers ----------------------------------------------
def test_filters_of_warnings_are_given_back():
    crossing = Crossing()

    def quietly():
        with threads.no_warnings(), crossing:
            warnings.warn("not shown", stacklevel=1)

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        assert together(quietly, quietly) == [None, None]
        assert warnings.filters == before and crossing.most == 1
        warnings.warn("shown", stacklevel=1)
    assert [str(x.message) for x in shown] == ["shown"]


@pytest.mark.parametrize("known", [True, False])
def test_a_variable_set_for_a_moment_is_not_seen_elsewhere(monkeypatch, tmp_path, known):
    variable = "MINARI_DATASETS_PATH"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv(variable, raising=False)
    if known:
        monkeypatch.setenv(variable, str(tmp_path / "data"))
    wanted, begun, done = folders.minari(), threading.Event(), threading.Event()

    def change():
        with threads.environment(variable, str(tmp_path / "for a moment")):
            begun.set()
            done.wait(LONG)
            assert folders.minari() == tmp_path / "for a moment"

    def look_at_it():
        assert begun.wait(runs.HANGS)
        os.environ["ATOLL_OF_ANOTHER_THREAD"] = "kept"
        found = folders.minari()
        done.set()
        return found

    assert together(change, look_at_it) == [None, wanted]
    assert os.environ.pop("ATOLL_OF_ANOTHER_THREAD") == "kept"
    assert os.environ.get(variable) == (str(tmp_path / "data") if known else None)


def test_ids_are_registered_once(monkeypatch, recwarn):
    """Gymnasium has some ids of a package while the others are still to come."""
    crossing, added = Crossing(), gymnasium.register
    registry = {name: spec for name, spec in gymnasium.registry.items() if "atoll/" not in name}
    monkeypatch.setattr(gymnasium, "registry", registry)
    monkeypatch.setattr(gymnasium.envs.registration, "registry", registry)

    def robotics():
        with crossing:
            return None

    def register(name, **settings):
        with crossing:
            assert name not in registry
        added(name, **settings)

    monkeypatch.setattr(quiet, "robotics", robotics)
    monkeypatch.setattr(gymnasium, "register", register)
    monkeypatch.setattr(gymnasium, "make", lambda name: SimpleNamespace(unwrapped=registry[name]))
    ids = [maze.env_id for maze in pointmaze.MAZES.values()]
    found = together(*(lambda name=name: making.make(name) for name in ids))
    assert [spec.unwrapped.id for spec in found] == ids and crossing.most == 1
    assert not list(recwarn)


def test_an_env_begins_as_its_seed_says():
    """OGBench's envs draw from NumPy's global generator."""
    crossing = Crossing()

    class Draws(gymnasium.Env):
        def reset(self, *, seed=None, options=None):
            with crossing:
                return np.random.random(3), {}  # noqa: NPY002

    first, second = Draws(), Draws()
    found = together(lambda: envs.reset(first, 1), lambda: envs.reset(second, 2))
    alone = [envs.reset(first, 1), envs.reset(second, 2)]
    assert np.array_equal(found, alone) and crossing.most == 1


# --- wandb --------------------------------------------------------------------------------------
class Wandb:
    """wandb with its one service for the process."""

    Settings = SimpleNamespace

    def __init__(self, run=None):
        self.run, self.serves, self.logged = run, False, []

    def init(self, id, **settings):
        self.serves = True
        return SimpleNamespace(log=lambda *x, **y: self.log(id), finish=lambda: None)

    def log(self, id):
        assert self.serves, "Cannot schedule tasks after join()"
        self.logged.append(id)

    def teardown(self):
        self.serves = False


def mirror(folder, seeds=(0,)):
    """A Mirror of a run in that folder."""
    folder.mkdir()
    cfg = bc.Config(dataset="x", seeds=seeds)
    options = experiment.config.Options(wandb="offline")
    run = SimpleNamespace(cfg=cfg, options=options, folder=folder, algorithm="bc")
    run.origin = SimpleNamespace(code="")
    return wandb_mirror.Mirror(run, {})


def test_a_run_that_ends_leaves_wandb_to_the_others(monkeypatch, tmp_path, capsys):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    short, long = mirror(tmp_path / "short"), mirror(tmp_path / "long", seeds=(0, 1))
    short.close()
    for seed in (0, 1):
        long.log(seed, 4, {"loss": 0.0})
    short.close()  # a second time changes nothing
    assert wandb.serves and len(wandb.logged) == 2
    long.close()
    assert not wandb.serves and not wandb_mirror.NEED_SERVICE
    assert capsys.readouterr().err == ""


def test_a_run_of_the_program_itself_keeps_its_service(monkeypatch, tmp_path):
    wandb = Wandb(run="of the user's script")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    mirror(tmp_path / "ours").close()
    assert wandb.serves


# --- Whole runs ---------------------------------------------------------------------------------
def test_two_runs_at_once_have_the_numbers_of_each_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs.write_hdf5(tmp_path / "data.hdf5")

    def train(name, seed):
        words = ["--dataset", "data.hdf5", "--seeds", seed, "--name", name, *runs.TINY]
        return bc.train(*experiment.parse(bc.Config, words)).tolist()

    calls = [lambda: train("a", "0"), lambda: train("b", "1")]
    assert together(*calls) == [train("c", "0"), train("d", "1")]
    written = {name: (path / "metrics.csv").read_text() for name, path in folders_of(tmp_path)}
    assert written["a"] == written["c"] and written["b"] == written["d"]


def folders_of(path):
    return [(x.parent.name, x.parent) for x in path.glob("runs/bc/data/*/result.json")]


def test_a_picture_leaves_a_notebook_its_backend(tmp_path):
    (tmp_path / "metrics.csv").write_text("update,seed,score,return,loss\n0,0,1,1,\n4,0,2,2,1\n")
    text = (
        f"import sys; sys.path.insert(0, {str(runs.ROOT)!r})\n"
        "from common.experiment import look\n"
        f"look.plot({str(tmp_path)!r}, {str(tmp_path / 'x.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", text], check=True, timeout=300)
    assert (tmp_path / "x.png").stat().st_size


# --- No other module does it by itself ----------------------------------------------------------
CHANGES = {  # what changes something of the process -> modules that may, since ...
    r"redirect_std\w+": (),
    r"catch_warnings|simplefilter|resetwarnings": ("recipes/ogbench.py",),  # in its own processes
    r"patch\.dict|os\.putenv|os\.environ\.(clear|update|pop)": (),
    r"os\.(chdir|umask|fchdir)\b": (),
    r"signal\.signal\(": ("experiment/signals.py", "recipes/ogbench.py"),  # in the main thread only
    r"os\.dup2": ("command_line.py",),  # where nothing takes the output any more
    r"sys\.(stdout|stderr|stdin) = ": ("experiment/processes.py",),  # for good, by --distributed
    r"sys\.excepthook = ": ("experiment/start.py",),  # for good, by a run that is a program
    r"np\.random\.seed\(": ("envs/playing.py", "recipes/ogbench.py"),  # alone; own processes
    r"ast\.(parse|literal_eval)|inspect\.getsource": ("experiment/provenance.py",),  # alone
    r"pyplot|matplotlib\.use": (),
    r"socket\.setdefaulttimeout|locale\.setlocale|np\.seterr\b|sys\.setrecursionlimit": (),
    r"\.teardown\(\)": ("experiment/wandb_mirror.py",),  # by the last one that needs it
}


@pytest.mark.parametrize("pattern", CHANGES)
def test_only_one_module_changes_what_belongs_to_the_process(pattern):
    allowed = {"threads.py", *CHANGES[pattern]}
    found = set()
    for folder in ("common", "algorithms"):
        for file in (runs.ROOT / folder).rglob("*.py"):
            code = re.sub(r"#.*", "", file.read_text(encoding="utf-8"))
            if re.search(pattern, code):
                found.add(str(file.relative_to(runs.ROOT / folder)))
    assert found <= allowed
    assert {*CHANGES[pattern]} <= found, "not needed in the list any more"

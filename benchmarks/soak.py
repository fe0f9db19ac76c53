# SPDX-License-Identifier: Apache-2.0
"""Break runs at random moments, resume them, and compare with an undisturbed run byte for byte.

    python benchmarks/soak.py --times 50 --algorithms rebrac iql bc --output benchmarks/results/soak

A trial trains on a small synthetic data set until a fault at a random moment. It then resumes with
the same command and `--resume`, and compares metrics.csv, scores and final parameters with those of
an undisturbed run. A third of the trials mirror to wandb offline, the others do not use it. With
`--online` the runs have an online phase as well, beside Pendulum-v1; the faults come in that phase,
and the rows that the run keeps of the env are compared too. With `--online --kills 5` every
algorithm has one run that is killed five times in that phase, one after the other. Faults:

    kill       SIGKILL
    term       SIGTERM, in half of the trials to wandb's process too, as SLURM does: the run saves
               at the next chunk boundary and leaves with 143 (-15 if it does not listen yet)
    full       the disk is filled: one line and exit code 2; then the disk is emptied
    limit      no file may grow beyond a size, as with a quota: the same
    read-only  the file system turns read-only as after an I/O error, for open files too: the same
    damage     SIGKILL, then one bit of the newest checkpoint flips, or one file is emptied,
               overwritten or deleted: resuming says so and takes the older checkpoint. It need not
               notice damage to bytes that nothing reads, but numbers must never change
    second     a second process in the run's folder: refused with exit code 2; the first continues

A fault that comes too late or too early to take effect is drawn again. Checkpoints are written at
every chunk boundary here (--save-seconds 0), so only the current chunk may be lost: a resumed run
starts no earlier than the newest undamaged checkpoint and, without damage, than the last boundary
in timing.csv. Needs Linux, and root for `full` and `read-only`, which mount a loop device; without
root they are left out. The record is written after every trial.
"""

import contextlib
import dataclasses
import errno
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import tyro

from common import command_line, fail, machine
from common.experiment import provenance

ROOT = Path(__file__).resolve().parents[1]
CODES = {"kill": -9, "term": 143, "full": 2, "limit": 2, "read-only": 2, "damage": -9, "second": 0}
SAYS = {"full": errno.ENOSPC, "limit": errno.EFBIG, "read-only": errno.EROFS}
MOUNTED = ("full", "read-only")  # faults that need root
STARTUP = "seconds to the first chunk boundary, and per chunk"
RENAMED = {"to the first border and between borders": STARTUP}  # what older records call it
INTRO = """Runs that were broken at a random moment, resumed, and compared byte for byte with an
undisturbed run.

- trials: faults made; took effect: the run was still training
- before a save: the fault came before the first checkpoint, so the run started anew
- as undisturbed: metrics.csv, scores and final parameters are the same
- `benchmarks/soak.py` describes the faults.

"""
DAMAGES = ("a bit flipped", "a bit flipped", "emptied", "overwritten", "deleted")
HANGS = 1800  # seconds after which a process is taken to hang; the machine may be busy
TRIES = 6  # moments drawn for a trial at most
UPDATES, LOG_EVERY = 2500, 50
SIZES = ["--num-updates", str(UPDATES), "--log-every", str(LOG_EVERY), "--eval-every", "250"]
SIZES += ["--eval-episodes", "2", "--batch-size", "32", "--hidden", "32", "32", "--seeds", "0", "1"]
SIZES += ["--save-seconds", "0"]
OFFLINE = 1000  # of the updates, with --online
SMALL = ["--warm-up-steps", "20", "--critic-hidden", "32", "32", "--num-samples", "2"]
ONLINE = {"cal_ql": SMALL, "wsrl": SMALL, "rlpd": ["--random-steps", "20"]}


@dataclasses.dataclass(frozen=True)
class Arguments:
    algorithms: tuple[str, ...] = ("rebrac", "iql", "bc")  # files of algorithms/, without .py
    faults: tuple[str, ...] = tuple(CODES)
    times: int = 50  # trials, spread over algorithms and faults in turn
    seed: int = 0  # for drawing the moments
    output: Path | None = None  # stem of the record to write, .md and .json
    online: bool = False  # runs with an online phase, which are broken in that phase
    kills: int = 0  # with --online: one run of each algorithm, which SIGKILL ends so often


class Case(NamedTuple):
    fault: str
    algorithm: str
    wandb: str = "disabled"
    every: bool = False  # the signal goes to all processes of the run
    online: bool = False  # the fault comes in the online phase


class Whole(NamedTuple):
    result: tuple  # of an undisturbed run
    startup: float  # seconds to the first chunk boundary
    chunk: float  # seconds per chunk


class Failed(Exception):
    """The fault could not be made, so nothing is known about the run."""


def write_data(path, rows=2000):
    """A file in D4RL's layout, evaluated in Pendulum-v1 for 50 steps."""
    draw = np.random.default_rng(0)
    timeouts = np.arange(rows) % 50 == 49
    with h5py.File(path, "w") as file:
        file["observations"] = draw.normal(size=(rows, 3)).astype(np.float32)
        file["actions"] = draw.uniform(-2, 2, (rows, 1)).astype(np.float32)
        file["rewards"] = draw.normal(size=rows).astype(np.float32)
        file["terminals"], file["timeouts"] = np.zeros(rows, bool), timeouts
        file.attrs.update(env_id="Pendulum-v1", max_episode_steps=50)


class Run:
    """A run of one algorithm in its own runs folder and process, which can be broken."""

    def __init__(self, algorithm, data, folder, wandb="disabled", log="log", online=False):
        self.algorithm, self.data, self.folder, self.wandb = algorithm, data, folder, wandb
        self.online = online
        self.place = folder / algorithm / data.stem / "run"
        self.files = [folder.with_name(f"{folder.name}.{log}.{x}") for x in ("out", "err")]

    def start(self, *more):
        script = str(ROOT / "algorithms" / f"{self.algorithm}.py")
        words = [sys.executable, script, "--dataset", str(self.data), *SIZES, "--name", "run"]
        words += self.phases()
        words += ["--runs-dir", str(self.folder), "--wandb", self.wandb, *more]
        keep = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
        keep |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        keep["JAX_COMPILATION_CACHE_DIR"] = str(self.data.parent / "xla")  # not the user's own
        none = subprocess.DEVNULL
        with self.files[0].open("w") as out, self.files[1].open("w") as err:
            return subprocess.Popen(words, env=keep, stdin=none, stdout=out, stderr=err)

    def phases(self):
        """The flags of both phases, later than SIZES and so instead of them."""
        if not self.online:
            return []
        words = ["--num-updates", str(OFFLINE), "--online-updates", str(UPDATES - OFFLINE)]
        return [*words, "--updates-per-step", "5", *ONLINE.get(self.algorithm, [])]

    @property
    def said(self):
        """What the last start has printed: (stdout, stderr)."""
        return tuple(file.read_text(errors="replace") for file in self.files)

    def saved(self):
        """The updates of the complete checkpoints, in order."""
        names = [path.name for path in (self.place / "checkpoints").glob("[0-9]*")]
        return sorted(int(name) for name in names if name.isdigit())

    def logged(self):
        """The last chunk boundary in timing.csv, or None."""
        if not (file := self.place / "timing.csv").exists():
            return None
        lines = file.read_text().splitlines(keepends=True)[1:]
        return max((int(x.split(",")[0]) for x in lines if x[-1] == "\n"), default=None)

    def finished(self):
        return (self.place / "result.json").exists()

    def result(self):
        """What must not depend on faults: metrics.csv, scores, parameters, rows of the env."""
        os.environ["JAX_PLATFORMS"] = "cpu"
        import jax
        import orbax.checkpoint as ocp

        numbers = json.loads((self.place / "result.json").read_text())
        names = ("score", "best_score", "return", "length", "offline_score", "regret")
        scores = {name: numbers.get(name) for name in names}
        newest = (self.place / "checkpoints" / str(UPDATES) / "state").resolve()
        with ocp.StandardCheckpointer() as checkpointer:
            leaves = jax.tree.leaves_with_path(checkpointer.restore(newest))
        arrays = [(jax.tree_util.keystr(name), np.asarray(x).tobytes()) for name, x in leaves]
        rows = (self.place / "online.rows").read_bytes() if self.online else b""
        return (self.place / "metrics.csv").read_bytes(), scores, arrays, rows


# --- Processes and disks ------------------------------------------------------------------------
def updates(words, text):
    return [int(x.replace(",", "")) for x in re.findall(rf"^{words} ([\d,]+)", text, re.M)]


def end(process, seconds=HANGS):
    """Wait for the process. -> its exit code"""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return "hung"


def call(*words):
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Failed(f"{words[0]}: {' '.join(done.stderr.split())[:200]}")
    return done.stdout


def family(pid):
    """A process and everything that it started; wandb's process has a session of its own."""
    pairs = [tuple(map(int, line.split())) for line in call("ps", "-Ao", "pid=,ppid=").splitlines()]
    found = [pid]
    for parent in found:  # grows
        found += [child for child, its in pairs if its == parent]
    return found


def tell(pids, number):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


class Disk:
    """A file system of its own at a folder, in a file beside it."""

    def __init__(self, folder):
        self.folder, self.image = folder, folder.with_suffix(".ext4")

    def __enter__(self):
        self.image.touch()
        os.truncate(self.image, 32 << 20)
        call("mkfs.ext4", "-q", "-m", "0", self.image)
        self.mount()
        return self

    def mount(self):
        call("mount", "-o", "loop,errors=remount-ro", self.image, self.folder)

    def unmount(self):
        """Unmount once wandb's process has left, which it does after the run has ended."""
        words, until = ["umount", self.folder], time.monotonic() + 60
        while subprocess.run(words, capture_output=True, check=False).returncode:
            if time.monotonic() > until:
                raise Failed("umount: busy")
            time.sleep(0.1)

    def __exit__(self, *_):
        self.unmount()
        self.image.unlink()

    def fill(self, process):
        """Keep the disk full until the process ends. -> its exit code"""
        filler, until = self.folder / "filler", time.monotonic() + HANGS
        while process.poll() is None and time.monotonic() < until:
            with filler.open("ab", buffering=0) as file:
                for size in (1 << 20, 1 << 12, 1):
                    with contextlib.suppress(OSError):
                        while file.write(b"0" * size):
                            pass
            time.sleep(0.01)
        filler.unlink()
        return end(process, 1)

    def give_up(self, process):
        """Do what ext4 does after an I/O error, then mount it again. -> the process's exit code

        All processes are stopped meanwhile, so that nothing they wrote is lost.
        """
        pids = family(process.pid)
        tell(pids, signal.SIGSTOP)
        try:
            call("sync", "-f", self.folder)
            call("mount", "-o", "remount,abort", self.folder)
        finally:
            tell(pids, signal.SIGCONT)
        code = end(process)
        self.unmount()
        self.mount()
        return code


# --- Faults -------------------------------------------------------------------------------------
def moment(fault, whole, draw, online=False):
    """(chunk boundary, seconds after it); None stands for the start of the process."""
    needs = fault in ("damage", "second")
    if not needs and not online and draw.random() < 1 / 6:
        return None, draw.uniform(0, whole.startup)
    first = OFFLINE if online else LOG_EVERY if needs else 0
    # A second one takes seconds to start.
    last = first + UPDATES // 5 if fault == "second" else UPDATES
    boundary = draw.choice(range(first, last, LOG_EVERY))
    return boundary, draw.uniform(0, 2 * whole.chunk)


def wait_for(run, process, boundary, seconds):
    until = time.monotonic() + HANGS
    while boundary is not None and process.poll() is None and time.monotonic() < until:
        if (logged := run.logged()) is not None and logged >= boundary:
            break
        time.sleep(0.005)
    time.sleep(seconds)


def strike(case, run, process, disk, draw):
    """Make one fault while a run trains. -> facts, with the exit code of its process"""
    if process.poll() is not None:
        return {"when": "late", "exit code": process.returncode}
    seen = {"when": "in time", "at": run.logged() or 0}
    if case.fault == "full":
        return seen | {"exit code": disk.fill(process)}
    if case.fault == "read-only":
        return seen | {"exit code": disk.give_up(process)}
    if case.fault == "second":
        other = Run(run.algorithm, run.data, run.folder, run.wandb, "second", run.online)
        seen |= {"second": end(other.start("--resume")), "second stderr": other.said[1]}
        seen["when"] = "in time" if process.poll() is None else "late"
    elif case.fault == "limit":
        limit = draw.choice((4_000, 8_000, 16_000))
        hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, hard))
        seen["note"] = f"limit of {limit:,} bytes"
    elif case.fault == "term":
        pids = family(process.pid) if case.every else [process.pid]
        tell(pids, signal.SIGTERM)
        seen["note"] = f"sent to {len(pids)} of its processes"
    else:
        process.kill()
    seen["exit code"] = end(process)
    return seen | (damage(run, draw) if case.fault == "damage" and not run.finished() else {})


def damage(run, draw):
    """Damage the newest checkpoint, if there is an older one."""
    if len(saved := run.saved()) < 2:
        return {"when": "early"}
    newest, how = run.place / "checkpoints" / str(saved[-1]), draw.choice(DAMAGES)
    parts = [x for x in sorted(newest.iterdir()) if x.is_dir()]  # state and meta
    files = sorted((draw.choice(parts) if "flipped" in how else newest).rglob("*"))
    files = [x for x in files if x.is_file() and x.stat().st_size]
    sizes = [x.stat().st_size for x in files]
    target = draw.choices(files, sizes if "flipped" in how else None)[0]
    content = bytearray(target.read_bytes())
    if how == "deleted":
        target.unlink()
    elif "flipped" in how:
        bit = draw.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        target.write_bytes(content)
        how = f"bit {bit:,} of {8 * len(content):,} flipped"
    else:
        target.write_bytes(b"" if how == "emptied" else draw.randbytes(len(content)))
    return {"note": f"{target.relative_to(run.place)} {how}", "behind": saved[-1] - saved[-2]}


# --- Verdicts -----------------------------------------------------------------------------------
def judge(seen):
    """(whether the fault took effect, problems) up to the end of the broken process."""
    fault, code, saved = seen["fault"], seen["exit code"], seen["saved at"]
    if seen["when"] != "in time":
        known = seen["when"] == "early" or code == 0
        return False, [] if known else [f"exit code {code} before the fault"]
    good = code == CODES[fault]
    ended = good or (code == 0 and seen["at"] >= UPDATES - 2 * LOG_EVERY)
    if fault != "second" and seen["finished"] and ended:
        return False, []
    if fault == "term" and saved in (None, UPDATES):  # not listening yet, or no longer
        good |= code == -signal.SIGTERM
    problems = [] if good else [f"exit code {code}"]
    problems += ["a traceback"] if "Traceback" in seen["stderr"] else []
    if fault in SAYS:
        problems += refusal(seen["stderr"], os.strerror(SAYS[fault]))
    if fault == "second":
        problems += [] if seen["second"] == 2 else [f"the second: exit code {seen['second']}"]
        problems += refusal(seen["second stderr"], "another process trains in it")
    return True, problems


def refusal(err, words):
    """Problems of a message that should be one line with these words; warnings may precede it."""
    lines = [x for x in err.splitlines() if not x.startswith("WARNING")]
    good = len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]
    return [] if good else [f"not one line with {words!r}"]


def lost_updates(seen):
    """Updates that the resumed run repeated, beyond the current chunk and announced damage.

    Both saved and logged updates count, so a run that stopped saving has lost updates.
    """
    reached = max(seen["saved at"] or 0, seen["logged at"] or 0)
    noticed = "cannot be read" in seen["resumed stderr"]
    return max(reached - noticed * seen.get("behind", 0) - seen["resumed at"], 0)


def differences(run, whole):
    if not run.finished():
        return ["not finished"]
    names = ("metrics.csv", "scores", "parameters", "rows of the env")
    try:
        both = zip(names, run.result(), whole.result, strict=True)
        return [f"other {name}" for name, one, two in both if one != two]
    except (OSError, ValueError, KeyError) as error:
        return [f"the result cannot be read: {str(error)[:200]}"]


def resume(run, seen):
    """Run the same command again. -> facts and problems"""
    code = end(run.start("--resume"))
    out, err = run.said
    resumed = max(updates("resuming at update", out), default=0)
    more = {"resumed at": resumed, "resumed stderr": err}
    problems = [] if code == 0 else [f"resume: exit code {code}"]
    problems += ["a traceback at resume"] if "Traceback" in err else []
    if code == 0 and (lost := lost_updates(seen | more)):
        problems.append(f"lost {lost} updates")
    if seen["fault"] == "damage" and "cannot be read" not in err:
        more["note"] = f"{seen['note']}, not noticed"
    return more, problems


# --- Trials -------------------------------------------------------------------------------------
def attempt(case, data, folder, whole, draw):
    """One row of the record: break a run; if that took effect, resume and compare."""
    folder.mkdir()
    run = Run(case.algorithm, data, folder, case.wandb, online=case.online)
    with Disk(folder) if case.fault in MOUNTED else contextlib.nullcontext() as disk:
        boundary, seconds = moment(case.fault, whole, draw, case.online)
        after = f"{'start' if boundary is None else boundary} + {seconds:.2f} s"
        seen, process = case._asdict() | {"after": after}, run.start()
        try:
            wait_for(run, process, boundary, seconds)
            seen |= strike(case, run, process, disk, draw)
        finally:
            process.kill()
            process.wait()
        out, seen["stderr"] = run.said
        saved = max([*run.saved(), *updates("saved at update", out)], default=None)
        seen |= {"saved at": saved, "logged at": run.logged(), "finished": run.finished()}
        took, problems = judge(seen)
        if took and not run.finished():
            more, wrong = resume(run, seen)
            seen, problems = seen | more, problems + wrong
        differ = differences(run, whole) if took else []
        after = "wrong numbers after damage: " if case.fault == "damage" and run.finished() else ""
        problems += [after + x for x in differ]
    for name in [x for x in seen if "stderr" in x and len(seen[x]) > 2000]:
        seen[name] = f"{seen[name][:1500]}\n[...]\n{seen[name][-500:]}"
    return seen | {"took effect": took, "as undisturbed": not differ, "problems": problems}


def trial(case, data, folder, whole, draw):
    """Attempts until the fault takes effect or something is wrong."""
    for number in range(1, TRIES + 1):
        place = folder.with_name(f"{folder.name}-{number}")
        try:
            row = attempt(case, data, place, whole, draw)
        except Failed as error:
            row = case._asdict() | {"took effect": False, "as undisturbed": False}
            row |= {"saved at": None, "problems": [f"the fault could not be made: {error}"]}
        shutil.rmtree(place, ignore_errors=True)
        if row["took effect"] or row["problems"]:
            break
    else:
        row["problems"].append(f"took no effect at {TRIES} moments")
    return row | {"tries": number}


def killed_often(algorithm, data, folder, kills, draw):
    """A line on one run that is killed again and again in its online phase. -> whether it held"""
    whole, run = (Run(algorithm, data, folder / x, online=True) for x in ("whole", "killed"))
    for each in (whole, run):
        each.folder.mkdir(parents=True)
    if end(whole.start()) != 0:
        fail(f"{algorithm}: the undisturbed run failed: {whole.said[1][-500:]}")
    at, again, problems = [], [], []
    for boundary in sorted(draw.sample(range(OFFLINE, UPDATES - LOG_EVERY, LOG_EVERY), kills)):
        process = run.start("--resume")
        wait_for(run, process, boundary, draw.uniform(0, 0.2))
        process.kill()
        at.append(run.logged())
        if (code := end(process)) != -signal.SIGKILL:
            problems.append(f"exit code {code} before kill {len(at)}")
        again += updates("resuming at update", run.said[0])
    if (code := end(run.start("--resume"))) != 0:
        problems.append(f"exit code {code} at the end")
    again += updates("resuming at update", run.said[0])
    problems += differences(run, Whole(whole.result(), 0, 0))
    print(f"{algorithm}: killed after updates {at}, resumed at {again}:", end=" ")
    print("; ".join(problems) or "as undisturbed", flush=True)
    return not problems


def undisturbed(algorithm, data, folder, online):
    """The second of two runs. As in the trials, its programs are compiled already."""
    run = Run(algorithm, data, folder, online=online)
    for _ in range(2):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        began, process = time.monotonic(), run.start()
        wait_for(run, process, 0, 0)
        startup = time.monotonic() - began
        if end(process) != 0:
            fail(f"{algorithm}: the undisturbed run failed: {run.said[1][-500:]}")
        training = time.monotonic() - began - startup
    return Whole(run.result(), startup, training * LOG_EVERY / UPDATES)


def markdown(facts, rows):
    lines = [INTRO + "The record:\n"]
    lines += [f"- {RENAMED.get(key, key)}: {value}" for key, value in facts.items()]
    lines.append(f"- moments drawn again: {sum(row['tries'] - 1 for row in rows)}\n")
    lines.append("| fault | trials | took effect | before a save | as undisturbed | problems |")
    lines.append("|---|---|---|---|---|---|")
    for fault in dict.fromkeys(row["fault"] for row in rows):
        some = [row for row in rows if row["fault"] == fault]
        took = [row for row in some if row["took effect"]]
        early = sum(row["saved at"] is None for row in took)
        good = sum(row["as undisturbed"] for row in took)
        found = Counter(problem for row in some for problem in row["problems"])
        words = "; ".join(f"{problem} ({count})" for problem, count in found.items())
        lines.append(f"| {fault} | {len(some)} | {len(took)} | {early} | {good} | {words} |")
    return "\n".join(lines) + "\n"


def write(output, facts, rows):
    """Write the record of the trials so far; a file is replaced as a whole."""
    output.parent.mkdir(parents=True, exist_ok=True)
    record = json.dumps(facts | {"rows": rows}, indent=1) + "\n"
    for suffix, text in ((".md", f"# Soak\n\n{markdown(facts, rows)}"), (".json", record)):
        part = output.with_suffix(f"{suffix}.part")
        part.write_text(text)
        part.replace(output.with_suffix(suffix))


def source(algorithm):
    return (ROOT / "algorithms" / f"{algorithm}.py").read_text()


def main(arguments):
    files = sorted(x.stem for x in (ROOT / "algorithms").glob("*.py"))
    for flag, known in (("algorithms", files), ("faults", list(CODES))):
        if unknown := sorted({*getattr(arguments, flag)} - {*known}):
            fail(f"--{flag} {unknown[0]}: choose from {', '.join(known)}")
    if arguments.online:
        without = [x for x in arguments.algorithms if "online_updates" not in source(x)]
        if without:
            fail(f"--online: {without[0]}.py has no online phase; leave it out of --algorithms")
    if arguments.kills < 0 or (arguments.kills and not arguments.online):
        fail(f"--kills {arguments.kills}: must be at least 1, with --online")
    if arguments.times < 1:
        fail(f"--times {arguments.times}: must be at least 1")
    faults = [x for x in arguments.faults if x not in MOUNTED or os.geteuid() == 0]
    if not faults:
        fail("--faults: these need root, to mount a file system")
    draw, rows = random.Random(arguments.seed), []
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        write_data(data := root / "data.hdf5")
        if arguments.kills:
            each = arguments.algorithms
            good = [killed_often(x, data, root / x, arguments.kills, draw) for x in each]
            raise SystemExit(not all(good))
        online = arguments.online
        whole = {x: undisturbed(x, data, root / x, online) for x in arguments.algorithms}
        code = sorted((ROOT / "common").rglob("*.py"))
        code += [ROOT / "algorithms" / f"{x}.py" for x in arguments.algorithms]
        seconds = (f"{name} {x.startup:.1f} s and {x.chunk:.2f} s" for name, x in whole.items())
        beside = f", the last {UPDATES - OFFLINE:,} beside Pendulum-v1" if online else ""
        facts = {
            "command": f"python benchmarks/soak.py {shlex.join(sys.argv[1:])}",
            "date": time.strftime("%Y-%m-%d"),
            "hardware": machine.processor(),
            "versions": ", ".join(f"{name} {x}" for name, x in provenance.versions()),
            "code of common/ and the algorithms": provenance.code(code),
            "run": f"{UPDATES:,} updates{beside}, two seeds, a checkpoint every {LOG_EVERY}",
            STARTUP: ", ".join(seconds),
            "left out": ", ".join(sorted({*arguments.faults} - {*faults})) or "nothing",
        }
        offline = draw.sample(range(arguments.times), -(-arguments.times // 3))
        for number in range(arguments.times):
            algorithm = arguments.algorithms[number % len(whole)]
            fault, turn = faults[number % len(faults)], number // len(faults)
            every = fault == "term" and turn % 2 == 0
            mode = "offline" if every or number in offline else "disabled"
            case = Case(fault, algorithm, mode, every, online)
            rows.append(trial(case, data, root / f"trial-{number}", whole[algorithm], draw))
            print(f"{number + 1}/{arguments.times}", json.dumps(rows[-1]), flush=True)
            if arguments.output is not None:
                write(arguments.output, facts, rows)
    print(markdown(facts, rows))
    raise SystemExit(any(row["problems"] for row in rows))


if __name__ == "__main__":
    command_line.outlive_the_reader()
    main(tyro.cli(Arguments, description=__doc__.split("\n\n")[0]))

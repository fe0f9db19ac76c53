# SPDX-License-Identifier: Apache-2.0
"""Break runs at random moments, resume them, and compare with an undisturbed run byte for byte.

    python benchmarks/soak.py --times 50 --algorithms rebrac iql bc --output benchmarks/results/soak

A trial trains on a small synthetic data set until a fault at a random moment, resumes with the same
command and `--resume` until the run is finished, and compares metrics.csv, the final parameters and
the scores with the run that nothing happened to. Faults:

    kill       SIGKILL
    term       SIGTERM: the run saves at the next border and leaves
    full       the disk is full: the run folder is on a tmpfs that is filled up, then emptied
    limit      no file may grow over a size (as a quota does), then it may
    read-only  the run folder's file system becomes read-only, then writable
    damage     SIGKILL, then the newest checkpoint is damaged: resume must say so and take the older
    second     a second process on the same folder, which must be refused with exit code 2

`full` and `read-only` mount a tmpfs and need root on Linux; without it they are left out, which the
record says. Nothing but the chunk under way may be lost: the update that a resumed run starts at is
compared with the last border that was written before the fault.
"""

import dataclasses
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import tyro

from common import fail

ROOT = Path(__file__).resolve().parents[1]
FAULTS = ("kill", "term", "full", "limit", "read-only", "damage", "second")
MOUNTED = ("full", "read-only")
UPDATES, LOG_EVERY = 1500, 50
SIZES = ["--num-updates", str(UPDATES), "--log-every", str(LOG_EVERY), "--eval-every", "250"]
SIZES += ["--eval-episodes", "2", "--batch-size", "32", "--hidden", "32", "32"]
SIZES += ["--seeds", "0", "1", "--wandb", "disabled"]


@dataclasses.dataclass(frozen=True)
class Arguments:
    algorithms: tuple[str, ...] = ("rebrac", "iql", "bc")  # files of algorithms/, without .py
    times: int = 50  # trials, dealt to algorithms and faults in turn
    seed: int = 0  # of the moments
    output: Path | None = None  # record to write, .md and .json


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
    """A run of one algorithm in its own folder of runs, in a process that can be broken."""

    def __init__(self, algorithm, data, folder):
        self.algorithm, self.data, self.folder = algorithm, data, folder
        self.log = folder.with_suffix(".log")

    def start(self, *more, limit=None):
        script = str(ROOT / "algorithms" / f"{self.algorithm}.py")
        words = [sys.executable, script, "--dataset", str(self.data), *SIZES, "--name", "run"]
        words += ["--runs-dir", str(self.folder), *more]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        self.before = self.log.stat().st_size if self.log.exists() else 0

        def quota():
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        with self.log.open("a") as out:
            return subprocess.Popen(
                words,
                env=environment,
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                preexec_fn=None if limit is None else quota,
            )

    @property
    def text(self):
        """What the last start has printed."""
        return self.log.read_text()[self.before :]

    @property
    def place(self):
        return self.folder / self.algorithm / self.data.stem / "run"

    def border(self):
        """The last border of which a checkpoint is complete."""
        saved = (self.place / "checkpoints").glob("[0-9]*")
        return max((int(path.name) for path in saved if path.name.isdigit()), default=None)

    def result(self):
        """What must not depend on faults."""
        result = json.loads((self.place / "result.json").read_text())
        names = ("score", "best_score", "return", "length")
        newest = self.place / "checkpoints" / str(UPDATES)
        arrays = subprocess.run(
            [sys.executable, "-c", DIGEST, self.algorithm, str(self.place)],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert newest.exists() and arrays.returncode == 0, arrays.stderr
        rows = (self.place / "metrics.csv").read_bytes()
        return rows, {name: result[name] for name in names}, arrays.stdout.splitlines()[-1]


DIGEST = """
import hashlib, importlib, sys
import jax, numpy as np
from common import experiment
module = importlib.import_module(f"algorithms.{sys.argv[1]}")
leaves = jax.tree.leaves(experiment.load(module, sys.argv[2])[2])
digest = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in leaves)).hexdigest()
print(digest)
"""


# --- Faults -------------------------------------------------------------------------------------
def end(process, seconds=120):
    """Its exit code."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return "hung"


def mount(folder, options):
    words = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def disturb(fault, run, moment, draw):
    """One fault `moment` seconds after a start. Returns (exit code, note) of the broken process."""
    limit = draw.choice((1_000, 4_000, 16_000)) if fault == "limit" else None
    more = ["--resume"] if run.place.exists() else []
    process = run.start(*more, limit=limit)
    if fault == "limit":
        return end(process), f"limit of {limit:,} bytes"
    time.sleep(moment)
    note = ""
    if fault == "second":
        other = Run(run.algorithm, run.data, run.folder)
        other.log = run.log.with_suffix(".second.log")
        until = time.monotonic() + 60
        while not (run.place / ".lock").exists() and time.monotonic() < until:
            time.sleep(0.05)
        code = end(other.start("--resume"))
        finished = process.poll() is not None
        said = other.text.strip().splitlines()[-1]
        note = f"the second exited with {code}: {said}"
        good = code == 2 and "another process trains in it" in said
        return end(process), note if good or finished else f"NOT REFUSED, {note}"
    if fault == "full":
        fill(run.folder)
        code = end(process)
        (run.folder / "filler").unlink()
        return code, note
    if fault == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", run.folder], check=False, capture_output=True)
        code = end(process)
        subprocess.run(["mount", "-o", "remount,rw", run.folder], check=True)
        return code, note
    process.send_signal(signal.SIGTERM if fault == "term" else signal.SIGKILL)
    code = end(process)
    if fault == "damage" and (newest := run.border()) is not None:
        files = [x for x in (run.place / "checkpoints" / str(newest)).rglob("*") if x.is_file()]
        target = draw.choice([x for x in files if x.stat().st_size])
        how = draw.choice(("truncated", "overwritten", "deleted"))
        if how == "deleted":
            target.unlink()
        else:
            size = target.stat().st_size
            target.write_bytes(b"" if how == "truncated" else os.urandom(size))
        note = f"{target.relative_to(run.place)} {how}"
    return code, note


def fill(folder):
    """Leave no byte in a file system."""
    with (folder / "filler").open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while file.write(b"0" * size):
                    pass
            except OSError:
                continue


# --- Trials -------------------------------------------------------------------------------------
def trial(fault, algorithm, data, folder, moment, expected, draw):
    """One row of the record."""
    folder.mkdir()
    if fault in MOUNTED and not mount(folder, "size=64m"):
        fail(f"--times: no tmpfs could be mounted on {folder}")
    try:
        run = Run(algorithm, data, folder)
        code, note = disturb(fault, run, moment, draw)
        traces = "Traceback" in run.text
        said = run.text.strip().splitlines()[-1:] or [""]
        saved, starts = run.border(), 0
        resumed = None
        while not (run.place / "result.json").exists() and starts < 3:
            starts += 1
            last = end(run.start("--resume"))
            found = re.search(r"^resuming at update ([\d,]+)", run.text, re.M)
            resumed = resumed or (int(found[1].replace(",", "")) if found else 0)
            traces |= "Traceback" in run.text
            if last != 0 and starts == 3:
                said = [f"resume ended with {last}: {run.text.strip().splitlines()[-1]}"]
        problems = ["a traceback"] if traces else []
        if not (run.place / "result.json").exists():
            problems.append("not finished")
        else:
            for name, one, two in zip(
                ("metrics.csv", "result", "parameters"), run.result(), expected, strict=True
            ):
                problems += [] if one == two else [f"{name} differ"]
        if code == "hung":
            problems.append("hung")
        behind = LOG_EVERY if fault == "damage" else 0
        if saved is not None and resumed is not None and resumed < saved - behind:
            problems.append(f"lost updates {resumed} to {saved}")
        if fault == "damage" and note and "cannot be read" not in run.log.read_text():
            note += ", which nothing reads"  # else the numbers above differ
            problems += ["damage not noticed"] if resumed != saved else []
        if note.startswith("NOT"):
            problems.append("the second process was not refused")
    finally:
        if fault in MOUNTED:
            subprocess.run(["umount", "-l", folder], check=False)
    return {
        "fault": fault,
        "algorithm": algorithm,
        "after, s": round(moment, 2),
        "exit code": code,
        "said": said[-1][:160],
        "saved at": saved,
        "resumed at": resumed,
        "note": note,
        "problems": problems,
    }


def markdown(facts, rows):
    lines = [f"- {key}: {value}" for key, value in facts.items()]
    lines += ["", "| fault | trials | of them before the first save | as undisturbed | problems |"]
    lines += ["|---|---|---|---|---|"]
    for fault in dict.fromkeys(row["fault"] for row in rows):
        some = [row for row in rows if row["fault"] == fault]
        early = sum(row["saved at"] is None for row in some)
        good = sum(not row["problems"] for row in some)
        found = Counter(problem for row in some for problem in row["problems"])
        words = "; ".join(f"{problem} ({count})" for problem, count in found.items())
        lines.append(f"| {fault} | {len(some)} | {early} | {good} | {words} |")
    return "\n".join(lines) + "\n"


def main(arguments):
    faults = FAULTS if os.geteuid() == 0 else tuple(x for x in FAULTS if x not in MOUNTED)
    files = {x.stem for x in (ROOT / "algorithms").glob("*.py")}
    if unknown := sorted({*arguments.algorithms} - files):
        fail(f"--algorithms {unknown[0]}: choose from {', '.join(sorted(files))}")
    if arguments.times < 1:
        fail(f"--times {arguments.times}: at least 1 is wanted")
    draw, rows = random.Random(arguments.seed), []
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        data = root / "data.hdf5"
        write_data(data)
        expected, seconds = {}, {}
        for algorithm in arguments.algorithms:
            run = Run(algorithm, data, root / f"whole-{algorithm}")
            run.folder.mkdir()
            for _ in range(2):  # the second start has the compiled programs, as the trials do
                shutil.rmtree(run.folder)
                run.folder.mkdir()
                began = time.monotonic()
                if end(run.start()) != 0:
                    fail(f"{algorithm}: the undisturbed run failed: {run.text[-500:]}")
                seconds[algorithm] = time.monotonic() - began
            expected[algorithm] = run.result()
        for number in range(arguments.times):
            algorithm = arguments.algorithms[number % len(arguments.algorithms)]
            fault = faults[number % len(faults)]
            moment = draw.uniform(0.2, 1) * seconds[algorithm]
            folder = root / f"trial-{number}"
            row = trial(fault, algorithm, data, folder, moment, expected[algorithm], draw)
            rows.append(row)
            print(f"{number + 1}/{arguments.times}", json.dumps(row), flush=True)
    facts = {
        "command": f"python benchmarks/soak.py --times {arguments.times} --seed {arguments.seed} "
        f"--algorithms {' '.join(arguments.algorithms)}",
        "date": time.strftime("%Y-%m-%d"),
        "run": f"{UPDATES:,} updates, two seeds, a checkpoint every {LOG_EVERY}; "
        + ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items()),
        "left out": ", ".join(x for x in FAULTS if x not in faults) or "nothing",
    }
    print(markdown(facts, rows))
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.with_suffix(".md").write_text("# Soak\n\n" + markdown(facts, rows))
        record = json.dumps(facts | {"rows": rows}, indent=1)
        arguments.output.with_suffix(".json").write_text(record + "\n")
    raise SystemExit(any(row["problems"] for row in rows))


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__.split("\n\n")[0]))

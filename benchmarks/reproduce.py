# SPDX-License-Identifier: Apache-2.0
"""Run a matrix of methods and data sets, and write its table.

    python benchmarks/reproduce.py --suite pointmaze --algorithms bc td3_bc --seeds 0 1 2
    python benchmarks/reproduce.py ... --dry-run                  # only print the commands
    python benchmarks/reproduce.py ... -- --num-updates 1000      # flags for every run

A cell of the matrix is one run, `python algorithms/ALGORITHM.py --config
configs/ALGORITHM/SUITE.yaml --dataset D --seeds ... --resume`, with all its seeds in one process.
The data sets come from the suite's YAML files: the rows of `datasets:`, or else `dataset:`. If that
is an HDF5 file, they are all files of the suite in $ATOLL_DATA.

Finished runs are skipped and others continue from their newest checkpoint, so the same call again
completes a matrix that was interrupted. The output of a run is in `<run folder>.log`. A failed run
does not stop the others.

Each of the `--workers` processes gets an equal share of the machine's cores, so that XLA's threads
do not compete (XLA counts the cores that its process may use). With `--slurm` the runs are jobs of
one SLURM array, see docs/scale.md.

Exit code: 0 all runs finished, 1 some failed, 2 bad input, 128 + N after signal N.
"""

import contextlib
import difflib
import fcntl
import importlib
import importlib.util
import io
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from common import command_line, datasets, fail, one_line
from common.experiment import config, provenance, wrong_words

ROOT = Path(__file__).resolve().parents[1]
OURS = ("config", "dataset", "seeds", "name", "resume", "runs-dir")  # flags set for every run
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AFTER = "flags of the runs stand after --"
LATE = 90  # seconds that a job's files may take to appear on a shared disk
FREED = 60  # seconds for saving, of the 90 between SLURM's signal and the time limit


@dataclass(frozen=True)
class Arguments:
    """Which runs, and where they run. Everything after `--` goes to every run."""

    suite: str  # configs/ALGORITHM/SUITE.yaml
    algorithms: tuple[str, ...]  # files of algorithms/, without .py
    seeds: tuple[int, ...] = (0,)  # all seeds of a run share one process
    datasets: tuple[str, ...] = ()  # instead of those in the suite's YAML files
    name: str | None = None  # name of every run (default: a hash of its resolved config)
    runs_dir: str = "runs"  # where run folders go
    output: Path | None = None  # stem of table and pictures (default: benchmarks/results/SUITE)
    workers: int | None = None  # runs at a time (default: one per core, or per GPU)
    dry_run: bool = False  # print the commands and stop
    slurm: bool = False  # submit the runs as a job array, one job each, and wait for them
    slurm_cluster: Literal["slurm", "local"] = "slurm"  # local: jobs on this machine, no SLURM
    slurm_partition: str | None = None
    slurm_minutes: int = 240  # time limit of a job; then it saves, is requeued and continues
    slurm_cpus: int = 4  # per job
    slurm_gpus: int = 0  # per job
    slurm_mem_gb: float | None = None  # per job
    slurm_jobs: int = 64  # jobs of the array at a time
    slurm_options: tuple[str, ...] = ()  # more for sbatch: account=lab constraint=a100
    slurm_setup: tuple[str, ...] = ()  # shell lines before the command: "module load cuda"


@dataclass(frozen=True)
class Cell:
    """One run of all seeds, and the command that makes it."""

    algorithm: str
    dataset: str
    folder: Path
    words: tuple[str, ...] = field(repr=False)

    @property
    def title(self):
        return f"{self.algorithm} {datasets.slug(self.dataset)}"

    def beside(self, suffix):
        """A file beside the run folder, which may not exist yet."""
        return self.folder.with_name(f"{self.folder.name}{suffix}")

    @property
    def result(self):
        """The content of result.json, None for a run that is not finished."""
        try:
            return json.loads((self.folder / "result.json").read_text())
        except (OSError, ValueError):
            return None


# --- The matrix ---------------------------------------------------------------------------------
def parse(argv):
    """Arguments and the words after `--`, checked as far as possible before a run starts."""
    split = argv.index("--") if "--" in argv else len(argv)
    description = __doc__.split("\n\n")[0] + f" {AFTER}: -- --num-updates 1000"
    kind, words = Annotated[Arguments, tyro.conf.FlagCreatePairsOff], argv[:split]
    hints = wrong_words.hints_of(Arguments)
    arguments = wrong_words.parse(
        kind, words, "reproduce.py", hints, description=description, more=f" ({AFTER})"
    )
    overrides = argv[split + 1 :]
    known = sorted(path.stem for path in (ROOT / "algorithms").glob("[!_]*.py"))
    for name in arguments.algorithms:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1) or known
            fail(f"--algorithms {name}: no algorithms/{name}.py; did you mean {' or '.join(near)}?")
        if not (ROOT / "configs" / name / f"{arguments.suite}.yaml").exists():
            suites = sorted(path.stem for path in (ROOT / "configs" / name).glob("*.yaml"))
            fail(
                f"--suite {arguments.suite}: no configs/{name}/{arguments.suite}.yaml; {name} has "
                f"{', '.join(suites)}"
            )
    for flag in ("algorithms", "datasets"):
        values = getattr(arguments, flag)
        if len(set(values)) < len(values):
            fail(f"--{flag} {' '.join(values)}: one of them appears twice; remove one")
    if not arguments.algorithms:
        fail(f"--algorithms: name at least one of {', '.join(known)}")
    for flag in ("workers", "slurm_minutes", "slurm_cpus", "slurm_jobs"):
        if getattr(arguments, flag) is not None and getattr(arguments, flag) < 1:
            flag, value = flag.replace("_", "-"), getattr(arguments, flag)
            fail(f"--{flag} {value}: must be at least 1")
    for word in arguments.slurm_options:
        if "=" not in word:
            fail(f"--slurm-options {word}: must be KEY=VALUE, as in account=lab")
    for word in overrides:
        if word.startswith("--") and word[2:].split("=")[0].replace("_", "-") in OURS:
            fail(f"{word} after '--': this script sets it for every run; give it before '--'")
    return arguments, overrides


def names(arguments, modules):
    """The data sets of the suite, in the order of its YAML files."""
    if arguments.datasets:
        return [found(dataset) for dataset in arguments.datasets]
    listed = {}  # in order, none twice
    for name, module in modules.items():
        file = ROOT / "configs" / name / f"{arguments.suite}.yaml"
        values, rows = config.read_yaml(file, module.Config)
        default = values.get("dataset", module.Config.dataset)
        if Path(default).suffix not in (".hdf5", ".h5"):
            if not rows:
                print(
                    f"{short(file)} has no datasets: table, so its dataset: {default} alone is "
                    "trained; name others with --datasets",
                    file=sys.stderr,
                )
            listed |= dict.fromkeys(rows or [default])
            continue
        folder = os.environ.get("ATOLL_DATA")
        if folder is None:
            fail(f"suite {arguments.suite}: set $ATOLL_DATA to the folder of its files, or name "
                 "them with --datasets")  # fmt: skip
        files = [str(file) for file in sorted(Path(folder).expanduser().glob("*.h*5"))]
        listed |= dict.fromkeys(x for x in files if datasets.suite(x) == arguments.suite)
        if not listed:
            fail(f"ATOLL_DATA={folder}: has no file of suite {arguments.suite}, such as {default}")
    return list(listed)


def found(dataset):
    """A data set's id, or the path of a file here or in $ATOLL_DATA."""
    if Path(dataset).suffix not in (".hdf5", ".h5") or Path(dataset).expanduser().is_file():
        return dataset
    file = Path(os.environ.get("ATOLL_DATA", ".")).expanduser() / dataset
    if not file.is_file():
        fail(f"--datasets {dataset}: no such file here or in $ATOLL_DATA")
    return str(file)


def matrix(arguments, overrides):
    """All cells, by data set. Each command is parsed here in the same way as in its run."""
    modules = {name: importlib.import_module(f"algorithms.{name}") for name in arguments.algorithms}
    cells = []
    for dataset, (name, module) in itertools.product(names(arguments, modules), modules.items()):
        words = ["--config", short(ROOT / "configs" / name / f"{arguments.suite}.yaml")]
        words += ["--dataset", dataset, "--seeds", *map(str, arguments.seeds)]
        words += ["--name", arguments.name] if arguments.name else []
        words += ["--runs-dir", arguments.runs_dir] if arguments.runs_dir != "runs" else []
        words += ["--resume", *overrides]
        with contextlib.redirect_stdout(io.StringIO()):
            folder = config.run_folder(*config.parse(module.Config, words))
        script = short(ROOT / "algorithms" / f"{name}.py")
        cells.append(Cell(name, dataset, folder, (sys.executable, script, *words)))
    folders = [cell.folder for cell in cells]
    for cell in cells:
        if folders.count(cell.folder) > 1:
            fail(f"--datasets {cell.dataset}: two files would share {cell.folder}; rename one")
    return cells


def short(path):
    """The path relative to this folder if it is inside it, so that commands stay readable."""
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


# --- Progress -----------------------------------------------------------------------------------
class Progress:
    """One line per run when it ends; on a terminal also a last line with the runs under way."""

    def __init__(self, cells):
        self.cells, self.failed, self.count, self.last = cells, [], 0, ""

    def line(self, cell, text):
        self.count += 1
        clear = "\r\033[K" if sys.stdout.isatty() else ""
        place = f"{self.count:{len(str(len(self.cells)))}}/{len(self.cells)}"
        self.last = ""
        print(f"{clear}[{place}] {cell.title}: {text}", flush=True)

    def end(self, cell, how, seconds=None):
        """The line of a run that has ended; `how` says how, if it has not finished."""
        took = "" if seconds is None else f", {seconds / 60:.1f} min"
        if (result := cell.result) is None:
            self.failed.append(cell)
            log = cell.beside(".log")
            self.line(cell, f"FAILED, {how}{last_words(log)}{took}, log {log}")
            return
        scores = [x for x in result["score"].values() if x is not None]
        text = f"{np.mean(scores):.1f}" if scores else "not evaluated"
        text += f" ± {np.std(scores):.1f}" if len(scores) > 1 else ""
        lost = f" ({len(result['diverged'])} seeds diverged)" if result["diverged"] else ""
        before = ", finished before"
        script = ROOT / "algorithms" / f"{cell.algorithm}.py"
        if seconds is None and script.exists():
            made = (result.get("code") or {}).get("algorithm")
            other = f" by another version of {cell.algorithm}.py"
            before += other * (made != provenance.code([script]))
        self.line(cell, f"score {text}{lost}{took if seconds is not None else before}")

    def working(self, cells):
        if sys.stdout.isatty():
            at = ", ".join(f"{cell.title} at {updates(cell)}" for cell in cells)
            if at != self.last:
                print(f"\r\033[K{at[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
            self.last = at


def updates(cell):
    """Updates of a run so far, from the last line of its timing.csv; 0 at a new start."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return f"{int((cell.folder / 'timing.csv').read_text().split()[-1].split(',')[0]):,}"
    return "0"


def last_words(log):
    """The last line of a run's output that is not empty."""
    with contextlib.suppress(OSError):
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
        said = [line for line in lines if line and not line.startswith("$ ")]
        return f": {said[-1][:200]}" if said else ""
    return ""


def ending(code):
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


# --- Workers on this machine --------------------------------------------------------------------
def work(cells, arguments, progress):
    """Run the cells, `workers` at a time. -> the number of the signal that stopped them, or None

    Every run gets the same number of cores in every call, because that number affects rounding.
    """
    devices = gpus()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    most = len(devices) or (1 if importlib.util.find_spec("libtpu") else len(cores) or 1)
    workers = min(arguments.workers or most, len(progress.cells))
    size = max(1, len(cores) // workers)  # the same for all
    print(f"{workers} at a time" + (f", {size} of {len(cores)} cores each" if cores else ""))
    waiting, running, stops, told = list(cells), {}, [], False
    before = {number: signal.signal(number, lambda n, _: stops.append(n)) for number in STOPS}
    try:
        while running or (waiting and not stops):
            for worker in set(range(workers)) - set(running) if not stops else ():
                cell = next((cell for cell in waiting if not locked(cell)), None)
                if cell is None:
                    if waiting and not told:
                        print(f"waiting for {len(waiting)} runs that other processes train")
                    told = told or bool(waiting)
                    break
                waiting.remove(cell)
                if cell.result is not None:  # another process finished it
                    progress.end(cell, None)
                    continue
                share = [cores[(worker * size + i) % len(cores)] for i in range(size) if cores]
                device = devices[worker % len(devices)] if devices else None
                running[worker] = [cell, start(cell, cores, share, device), time.monotonic(), 0]
            time.sleep(0.1)
            for worker, (cell, process, began, sent) in list(running.items()):
                if process.poll() is not None:
                    del running[worker]
                    if cell.result is None and locked(cell):  # another process was faster
                        waiting.append(cell)
                        continue
                    progress.end(cell, ending(process.returncode), time.monotonic() - began)
                elif sent < len(stops):  # one signal: save at the next chunk boundary; two: leave
                    process.terminate()  # not SIGINT, which a process may inherit as ignored
                    running[worker][-1] += 1
            progress.working([cell for cell, *_ in running.values()])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return stops[0] if stops else None


def start(cell, cores=(), share=(), device=None):
    """Start the run in its own process group: Ctrl-C reaches it only through `work`."""
    env = dict(os.environ, PYTHONUNBUFFERED="1")
    if share:
        env.setdefault("OMP_NUM_THREADS", str(len(share)))
    if device is not None:
        env["CUDA_VISIBLE_DEVICES"] = device
        env.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    log = cell.beside(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as out:
        out.write(f"$ {shlex.join(cell.words)}\n")
        out.flush()
        if share:  # inherited by the child
            os.sched_setaffinity(0, share)
        try:
            return subprocess.Popen(
                cell.words,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )
        finally:
            if share:
                os.sched_setaffinity(0, cores)


def gpus():
    """The GPUs that JAX would use, in the form of CUDA_VISIBLE_DEVICES."""
    platforms = os.environ.get("JAX_PLATFORMS", "cuda")
    if "cuda" not in platforms and "gpu" not in platforms:
        return []
    if not any(importlib.util.find_spec(f"jax_cuda{x}_plugin") for x in (12, 13)):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None and shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
        visible = ",".join(re.findall(r"^GPU (\d+):", listed.stdout, re.MULTILINE))
    return [x for x in (visible or "").split(",") if x]


def locked(cell):
    """Whether a process trains in the cell's run folder."""
    with contextlib.suppress(OSError), (cell.folder / ".lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


# --- SLURM --------------------------------------------------------------------------------------
class Job:
    """A run as a job. submitit pickles it, and again after a time limit or a preemption."""

    def __init__(self, cell):
        self.cell = cell

    def __call__(self):
        while locked(self.cell):  # a worker elsewhere was faster
            time.sleep(5)
        if self.cell.result is not None:
            return
        # SLURM may signal every process of a job. Only `checkpoint` tells the run, and only once.
        signals = {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        self.process = start(self.cell)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            while self.process.poll() is None:
                time.sleep(0.2)
        finally:
            self.stop(0)
        if self.cell.result is None:
            raise RuntimeError(ending(self.process.returncode))

    def stop(self, seconds):
        """Ask the run to save at its next chunk boundary; kill it if that takes too long."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            end = time.monotonic() + seconds
            while self.process.poll() is None and time.monotonic() < end:
                time.sleep(0.1)
        if seconds and self.process.poll() is None:  # the newest checkpoint has to do
            self.process.kill()

    def checkpoint(self):
        from submitit.helpers import DelayedSubmission

        self.stop(FREED)
        return DelayedSubmission(Job(self.cell))


def submit(cells, arguments, progress):
    """Submit the runs that are not in the queue yet, and wait for all. Returns as `work` does."""
    try:
        import submitit
    except ImportError:
        fail("--slurm: submitit is not installed; pip install submitit")
    cluster = arguments.slurm_cluster
    if cluster == "slurm" and not (shutil.which("sbatch") and shutil.which("squeue")):
        fail("--slurm: sbatch or squeue not found; start it on a login node, or use --workers")
    folder = Path(arguments.runs_dir).resolve() / "slurm"
    jobs = {cell: job for cell in cells if (job := queued(cell, cluster)) is not None}
    new = [cell for cell in cells if cell not in jobs]
    try:
        executor = submitit.AutoExecutor(folder / "%j", cluster, slurm_max_num_timeout=1000)
        executor.update_parameters(**parameters(arguments))
        with executor.batch() if new else contextlib.nullcontext():
            sent = [executor.submit(Job(cell)) for cell in new]
    except Exception as error:
        fail(f"--slurm: nothing was submitted: {one_line(error)}")
    for cell, job in zip(new, sent, strict=True):
        cell.folder.parent.mkdir(parents=True, exist_ok=True)
        cell.beside(".job").write_text(f"{cluster} {job.job_id}\n")
    jobs |= {cell: job.job_id for cell, job in zip(new, sent, strict=True)}
    print(f"{len(new)} jobs submitted, {len(cells) - len(new)} were in the queue before. Ctrl-C")
    print("leaves them in the queue, and the same call waits for them again.")
    print(f"SLURM's output: {short(folder)}")
    try:
        await_jobs(jobs, {job.job_id: job for job in sent}, cluster, progress)
    except KeyboardInterrupt:
        return signal.SIGINT
    return None


def parameters(arguments):
    """What a job asks for, in submitit's terms."""
    wanted = {
        "name": f"atoll-{arguments.suite}",
        "timeout_min": arguments.slurm_minutes,
        "cpus_per_task": arguments.slurm_cpus,
        "gpus_per_node": arguments.slurm_gpus or None,
        "mem_gb": arguments.slurm_mem_gb,
        "slurm_partition": arguments.slurm_partition,
        "slurm_array_parallelism": arguments.slurm_jobs,
        "slurm_setup": list(arguments.slurm_setup) or None,
        "slurm_additional_parameters": {"requeue": True}
        | dict(word.split("=", 1) for word in arguments.slurm_options),
        # Without this, srun of SLURM 22.05 and later gives a step only one of the job's CPUs.
        "slurm_srun_args": [f"--cpus-per-task={arguments.slurm_cpus}"],
    }
    return {key: value for key, value in wanted.items() if value is not None}


def queued(cell, cluster):
    """The job of an earlier call that still waits or runs, or None."""
    with contextlib.suppress(OSError, ValueError):
        kind, job = cell.beside(".job").read_text().split()
        there = in_queue(cluster, [job]) if kind == cluster else ()
        if there is None:
            fail("--slurm: squeue does not answer, so the queue is not known; try again later")
        return job if job in there else None
    return None


def in_queue(cluster, ids, own=None):
    """The jobs among `ids` that wait or run. None if SLURM does not answer.

    It asks squeue, because sacct, which submitit asks, needs an accounting database.
    """
    if cluster == "local":
        return {x for x in ids if not own[x].done()} if own else {x for x in ids if process(x)}
    done = subprocess.run(
        ["squeue", "--noheader", "--array", "--me", "--format=%i"],
        capture_output=True,
        text=True,
        check=False,
    )
    return set(done.stdout.split()) & set(ids) if done.returncode == 0 else None


def process(number):
    with contextlib.suppress(OSError):
        os.kill(int(number), 0)
        return True
    return False


def await_jobs(jobs, own, cluster, progress):
    """Report the end of every job; `own` are the jobs that this call submitted, by id."""
    began, gone = time.monotonic(), {}
    while jobs:
        time.sleep(5 if cluster == "slurm" else 0.5)
        there = in_queue(cluster, jobs.values(), own)
        progress.working([cell for cell in jobs if updates(cell) != "0"])
        for cell, job in list(jobs.items()) if there is not None else ():
            if job in there and cell.result is None:
                continue
            since = gone.setdefault(cell, time.monotonic())
            if cell.result is None and time.monotonic() - since < LATE and cluster == "slurm":
                continue
            del jobs[cell]
            cell.beside(".job").unlink(missing_ok=True)
            progress.end(cell, f"job {job} left the queue", time.monotonic() - began)


# --- The call -----------------------------------------------------------------------------------
MATRIX = ("algorithms", "seeds", "datasets", "name", "output")  # what tells matrices apart


def is_whole(arguments, overrides, note):
    """Whether this call is the command in the suite's note, so that it makes the whole matrix."""
    text = note.read_text() if note.exists() else ""
    commands = re.findall(r"^python benchmarks/reproduce\.py (.*)$", text, re.MULTILINE)
    for named, extra in (parse(shlex.split(command)) for command in commands):
        if overrides == extra and named.suite == arguments.suite:
            return all(getattr(arguments, x) == getattr(named, x) for x in MATRIX)
    return False


def report(cells, arguments, overrides, argv, failed=False):
    """The command that makes the table. Only a suite's whole matrix goes to benchmarks/results."""
    note = ROOT / "benchmarks" / "notes" / f"{arguments.suite}.md"
    whole = is_whole(arguments, overrides, note) and not failed
    place = ROOT / "benchmarks" / "results" if whole else Path(arguments.runs_dir)
    output = arguments.output or place / arguments.suite
    words = [sys.executable, short(ROOT / "benchmarks" / "report.py")]
    words += [str(cell.folder) for cell in cells]
    argv = [word for word in argv if word != "--dry-run"]
    words += ["--command", shlex.join(["python", "benchmarks/reproduce.py", *argv])]
    words += ["--output", short(output), "--title", arguments.suite]
    words += ["--note", short(note)] if whole else []
    index = ROOT / "docs" / "results.md"
    if whole and f"<!-- {output.name} -->" in index.read_text():
        words += ["--index", short(index)]
    return words


def main(argv):
    arguments, overrides = parse(argv)
    cells = matrix(arguments, overrides)
    left = [cell for cell in cells if cell.result is None]
    if arguments.dry_run:
        for cell in cells:
            print(("" if cell in left else "# finished: ") + shlex.join(cell.words))
        print(shlex.join(report(cells, arguments, overrides, argv)))
        return 0
    print(f"{len(cells)} runs, {len(cells) - len(left)} of them finished before")
    progress, stopped = Progress(cells), None
    for cell in cells:
        if cell not in left:
            progress.end(cell, None)
    if left:
        stopped = (submit if arguments.slurm else work)(left, arguments, progress)
    finished = [cell for cell in cells if cell.result is not None]
    if stopped is not None:
        name, share = signal.Signals(stopped).name, f"{len(finished)} of {len(cells)}"
        print(f"{name}: {share} runs are finished; the same call does the rest")
        return 128 + stopped
    if progress.failed:
        print(f"{len(progress.failed)} of {len(cells)} runs failed; the same call tries them again")
    if finished:  # the page names runs that were begun but are not finished
        begun = [cell for cell in cells if cell.folder.is_dir()]
        words = report(begun, arguments, overrides, argv, failed=len(finished) < len(cells))
        code = subprocess.run(words, check=False).returncode
        return 1 if progress.failed else code
    return 1


if __name__ == "__main__":
    command_line.outlive_the_reader()  # hours of work do not end with `| head`
    sys.exit(main(sys.argv[1:]))

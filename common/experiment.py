# SPDX-License-Identifier: Apache-2.0
"""Run folder, metrics, checkpoints, signals, wandb.

A run folder `<runs-dir>/<algorithm>/<data set>/<name>/` holds
    config.yaml   the resolved Config; `--config` reads it back
    metrics.csv   one row per seed and border: row t has the mean losses of the chunk ending at t
                  (empty at 0) and, at evaluation borders, the scores of the policy at t
    timing.csv    seconds; the first chunk of every start includes compiling
    checkpoints/  orbax, the newest two
    result.json   written last: final and best score per seed, versions, code, hardware, speed
    wandb/        offline runs, one per seed; wandb.id is the end of their ids
"""

import inspect
import json
import math
import signal
import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np

from common import (
    checkpoints,
    config,
    datasets,
    digests,
    disks,
    fail,
    locks,
    processes,
    provenance,
    signals,
)
from common.devices import over_seeds, place, setup, streams
from common.wandb_mirror import Mirror

__all__ = ["Run", "load", "over_seeds", "parse", "place", "streams"]
SCORES = ("score", "return", "success", "length")
THEN = ", then "  # between what a run began on and what it was resumed on


def parse(config_class, argv=None):
    """Config and Options, see `config.parse`; sets up JAX's persistent compilation cache."""
    if argv is None:  # the process is this run: until training is under way, Ctrl-C just ends it
        signal.signal(signal.SIGINT, signals.interrupted)
    cfg, options = config.parse(config_class, argv)
    options = processes.join(options)
    setup(cfg, options)
    return cfg, options


def load(module, folder):
    """Config, data set and newest saved State (arrays [S, ...]) of a run folder.

    Args:
        module: the algorithm's file, imported.
        folder: the run folder.
    """
    cfg, options = config.read_run(folder, module.Config)
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps, actions="any")
    example = jax.tree.map(lambda x: x[:1], dataset.transitions)
    facts = {} if dataset.num_actions is None else {"num_actions": dataset.num_actions}
    create = jax.vmap(lambda key: module.create_state(key, example, cfg, **facts))
    state, meta = checkpoints.restore(
        checkpoints.manager(Path(folder)), create(*streams(cfg.seeds, 1)), keep=True
    )
    if meta is None:
        fail(f"{folder}: no readable checkpoint in it")
    return cfg, dataset, state


# --- Run ----------------------------------------------------------------------------------------
class Run:
    """The run folder and all that is written into it; used as in every `train`."""

    def __init__(self, cfg, options, dataset):
        self.cfg, self.options, self.dataset = cfg, options, dataset
        self.folder = config.run_folder(cfg, options)
        self.algorithm = self.folder.relative_to(options.runs_dir).parts[0]
        script, common = Path(inspect.getfile(type(cfg))), Path(__file__).parent
        files = {"algorithm": [script], "common": sorted(common.glob("*.py"))}
        self.code = {part: provenance.code(paths) for part, paths in files.items()}  # which ran
        self.scores = np.full(len(cfg.seeds), np.nan)  # [S] of the last evaluation
        self.last = {}  # name -> [S], all numbers of the last evaluation
        self.best = np.full(len(cfg.seeds), np.nan)  # [S] over training; never called the score
        self.diverged = {}  # index of a seed -> border at which its numbers were not finite
        self.kept, self.due = None, 0.0  # the last border's state on the host; when to save again
        self.waiting = []  # rows of border 0, until the metrics have names
        self.seconds = {"train": 0.0, "eval": 0.0}
        self.chunks = []  # seconds of the chunks of this start
        self.signals, self.bar, self.done, self.lost = signals.Signals(), None, False, False
        self.world = digests.world(dataset)

    def __enter__(self):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = (self.folder / ".lock").open("w")
        except OSError as error:
            fail(f"{self.folder}: cannot be written ({error.strerror}); choose another --runs-dir")
        if not locks.taken(self.lock, self.folder):
            fail(f"{self.folder}: another process trains in it; wait for it or choose a --name")
        try:
            with disks.storage(self.folder):
                self._open()
        except BaseException:
            self.lock.close()
            raise
        return self

    def _open(self):
        import yaml

        returns = self.dataset.episode_returns
        record = {"algorithm": self.algorithm} | (self.dataset.record or {})
        record["data_return"] = {"mean": float(returns.mean()), "max": float(returns.max())}
        record["reference"] = [self.dataset.ref_min_score, self.dataset.ref_max_score]
        record["digest"] = self.world["data"]
        values = config.resolved(self.cfg, self.options) | {"record": record}
        if not (self.folder / "config.yaml").exists():
            disks.write(
                self.folder / "config.yaml",
                yaml.safe_dump(values, sort_keys=False, default_flow_style=None),
            )
        print(f"run {self.folder}")
        self.manager = checkpoints.manager(self.folder)
        self.wandb = Mirror(self, record)
        self.signals.listen()

    def __exit__(self, kind, error, trace):
        with self.lock, disks.storage(self.folder):
            if self.bar is not None:
                self.bar.close()
            self.signals.close()
            if isinstance(error, OSError | ValueError):
                raise error  # looked at by disks.storage
            self.manager.close()
            self.wandb.close()
            if not self.done and (kind is None or (kind is SystemExit and self.lost)):
                self._finish()
        if kind is None and self.diverged:
            raise SystemExit(1)

    def restore(self, state):
        """State, metrics and update of the newest readable checkpoint, else (state, None, 0)."""
        saved, meta = checkpoints.restore(self.manager, state)
        start, metrics = 0, None
        if meta is not None:
            state, start, metrics = saved, meta["update"], meta["metrics"]
            self.seconds, self.waiting = meta["seconds"], meta["waiting"]
            self.best = np.array(meta["best"], float)
            self.diverged = {int(index): border for index, border in meta["diverged"].items()}
            self.done = start == self.cfg.num_updates and (self.folder / "result.json").exists()
            print("finished before" if self.done else f"resuming at update {start:,}")
            if not self.done:
                self._compare(meta)
        elif self.options.resume:
            print(f"nothing to resume in {self.folder}: starting anew")
        if not self.done:
            (self.folder / "result.json").unlink(missing_ok=True)  # a folder with it is finished
            self._cut("metrics.csv", self.waiting[0][0] if self.waiting else start)
            self._cut("timing.csv", start)
        self.wandb.replay(self.folder / "metrics.csv")
        from tqdm import tqdm

        start, lost, self.done = processes.ask([start, [*self.diverged.items()], self.done])[0]
        self.diverged = dict(lost)
        state = processes.from_first(state)
        self.bar = tqdm(total=self.cfg.num_updates, initial=start, disable=None, unit=" updates")
        return state, metrics, start

    def _compare(self, meta):
        """Say what is not as it was when the run began; the record names both."""
        for part, now in self.code.items():
            before = meta["code"][part]
            self.code[part] = before if now in before.split("+") else f"{before}+{now}"
            if self.code[part] != before:
                what = f"resumed by another version of the {part} code, {self.code[part]}"
                print(f"WARNING: {what}", file=sys.stderr)
        for what, before in meta["world"].items():
            now = self.world.get(what)
            self.world[what] = before if now in before.split(THEN) else f"{before}{THEN}{now}"
            if self.world[what] != before:
                print(f"WARNING: begun on {before}, resumed on {now} ({what})", file=sys.stderr)

    def _cut(self, name, first):
        """Drop rows from update `first` on, and half a row: they are written again."""
        if (file := self.folder / name).exists():
            header, *rows = file.read_text().splitlines(keepends=True) or [""]
            rows = [row for row in rows if row[-1] == "\n" and int(row.split(",")[0]) < first]
            disks.write(file, "".join([header, *rows] if rows else []))

    def boundaries(self, start):
        """start, start + log_every, ..., num_updates; none where all of it is done."""
        self.clock, self.away, self.start = time.perf_counter(), 0.0, start
        yield from () if self.done else range(start, self.cfg.num_updates + 1, self.cfg.log_every)

    def evaluates(self, step):
        return step % self.cfg.eval_every == 0 or step == self.cfg.num_updates

    def save(self, step, state, metrics):
        """Wait for the chunk; freeze seeds not finite; save where it is due; leave on a signal."""
        metrics = metrics and {k: np.asarray(v, float).tolist() for k, v in metrics.items()}
        host = jax.tree.map(np.array, state)  # copies: the state is donated to the next chunk
        if step > self.start:
            self.chunks.append(time.perf_counter() - self.clock - self.away)
            self.seconds["train"] += self.chunks[-1]
        self._freeze(step, host, metrics or {})
        self.kept = host
        self.lost = len(self.diverged) == len(self.cfg.seeds)
        number, late = processes.agree(self.signals.number or 0), time.perf_counter() >= self.due
        due = number or late or self.lost or self.evaluates(step)
        if due and jax.process_index() == 0 and step not in self.manager.all_steps():
            meta = {"update": step, "metrics": metrics, "best": self.best.tolist()}
            names = ("seconds", "waiting", "diverged", "code", "world")
            checkpoints.save(self.manager, step, host, meta | {x: vars(self)[x] for x in names})
            self.due = time.perf_counter() + self.options.save_seconds
        if number:
            print(f"saved at update {step:,}; go on with the same command and --resume")
            raise SystemExit(128 + number)
        if self.lost:
            print(f"no seed is left to train after update {step:,}", file=sys.stderr)
            raise SystemExit(1)
        self.clock, self.away = time.perf_counter(), 0.0

    def log(self, step, metrics, scores):
        """Write the rows of a border, one per seed, once its evaluation is there."""
        began = time.perf_counter()
        scores = scores and scores.result()
        metrics = metrics and {k: np.asarray(v, float).tolist() for k, v in metrics.items()}
        if scores:
            # On a CPU the rollouts came before the chunk; elsewhere only waiting for them counts.
            cpu = jax.default_backend() == "cpu"
            self.away = scores["seconds"] if cpu else time.perf_counter() - began
            self.seconds["eval"] += self.away
            scores = {k: _blank(scores[k], self.diverged) for k in SCORES if scores[k] is not None}
            self.last, self.scores = scores, np.array(scores["score"])
            self.best = np.fmax(self.best, self.scores)
            self._say(step)
        for i, seed in enumerate(self.cfg.seeds):
            gone = self.diverged.get(i, step) < step
            means = {} if gone else {k: v[i] for k, v in (metrics or {}).items()}
            self.waiting.append((step, seed, means, {k: v[i] for k, v in (scores or {}).items()}))
        if metrics or step == self.cfg.num_updates:
            names, rows = list(metrics or {}), []
            for update, seed, means, numbers in self.waiting:
                cells = [_cell(means.get(name)) for name in names]
                cells += [_cell(numbers.get(name)).replace("nan", "") for name in SCORES]
                rows.append((update, seed, *cells))
                self.wandb.log(seed, update, means | numbers)
            self._append("metrics.csv", ("update", "seed", *names, *SCORES), *rows)
            self.waiting = []
        chunk = self.chunks[-1] if self.chunks else 0.0
        seconds = (f"{x:.3f}" for x in (chunk, self.seconds["train"], self.seconds["eval"]))
        header = ("update", "chunk_seconds", "train_seconds", "eval_seconds")
        self._append("timing.csv", header, (step, *seconds))
        self.bar.update(step - self.bar.n)

    def _freeze(self, step, host, metrics):
        """A seed with a loss or parameter not finite keeps its state of the border before."""
        for i, seed in enumerate(self.cfg.seeds):
            bad = [name for name, means in metrics.items() if not math.isfinite(means[i])]
            if not bad and not all(np.isfinite(x[i]).all() for x in jax.tree.leaves(host)):
                bad = ["a parameter"]
            if bad and i not in self.diverged:
                self.diverged[i] = step
                where = f"in updates {step - self.cfg.log_every:,} to {step:,}"
                print(f"WARNING: seed {seed}: {', '.join(bad)} not finite {where}", file=sys.stderr)
        if self.kept is not None:
            for i in self.diverged:
                for new, old in zip(jax.tree.leaves(host), jax.tree.leaves(self.kept), strict=True):
                    new[i] = old[i]

    def _say(self, step):
        if np.isnan(self.scores).all():
            return
        self.bar.set_postfix_str(f"score {np.nanmean(self.scores):.1f}")
        if self.bar.disable:  # a log file gets a line per evaluation instead of the bar
            each = " ".join(f"{score:.1f}" for score in self.scores)
            line = f"update {step:,}: score {np.nanmean(self.scores):.1f} (seeds: {each})"
            print(line, flush=True)

    def _append(self, name, header, *rows):
        header, *rows = (",".join(map(str, line)) + "\n" for line in (header, *rows))
        with (self.folder / name).open("a+") as out:
            out.seek(0)
            if (first := out.readline()) not in ("", header):
                fail(f"{self.folder / name}: has other columns ({first.strip()}); take --name")
            out.write("".join(rows if first else [header, *rows]))
            disks.settle(out)

    def _finish(self):
        """Write result.json and say the final score."""
        cfg, train, evaluation = self.cfg, self.seconds["train"], self.seconds["eval"]
        self.scores = np.array(_blank(self.scores, self.diverged))  # if none came to its end
        self.last = {name: _blank(x, self.diverged) for name, x in self.last.items()}
        # The first chunk compiles; the median is robust to what else runs on the machine.
        chunks = self.chunks[1:] or self.chunks or [train * cfg.log_every / cfg.num_updates]
        speed = cfg.log_every * len(cfg.seeds) / statistics.median(chunks)
        result = {
            "algorithm": self.algorithm,
            "dataset": cfg.dataset,
            "num_updates": cfg.num_updates,
            "eval_episodes": cfg.eval_episodes,
            "score": self._each(self.scores),
            "best_score": self._each(self.best),
            **{name: self._each(x) for name, x in self.last.items() if name != "score"},
            "diverged": {cfg.seeds[i]: border for i, border in self.diverged.items()},
            "updates_per_second": round(speed, 1),
            "train_seconds": round(train, 1),
            "eval_seconds": round(evaluation, 1),
            "eval_share": round(evaluation / max(train + evaluation, 1e-9), 3),
            "hardware": f"{self.world['devices']}; {self.world['processor']}",
            "matmul_precision": jax.config.jax_default_matmul_precision or "default",
            "code": self.code,
            "versions": {x: y for x, y in self.world.items() if x not in digests.NO_VERSIONS},
        }
        disks.write(self.folder / "result.json", json.dumps(result, indent=2) + "\n")
        left = len(cfg.seeds) - len(self.diverged)
        lost = f", {left} of {len(cfg.seeds)} seeds: the others diverged" if self.diverged else ""
        if not left:
            print(f"all seeds diverged, in {self.folder}")
            return
        if np.isnan(self.scores).all():
            print(f"trained without an evaluation{lost}, in {self.folder}")
            return
        spread = f" ± {np.nanstd(self.scores):.1f}" if left > 1 else ""
        best = f"best during training {np.nanmean(self.best):.1f}"
        print(f"final score {np.nanmean(self.scores):.1f}{spread} ({best}){lost}", end=", ")
        print(f"return {np.nanmean(self.last['return']):.1f}, in {self.folder}")

    def _each(self, numbers):
        """Per seed, with None for a number that is not there."""
        return {seed: _finite(float(x)) for seed, x in zip(self.cfg.seeds, numbers, strict=True)}


# --- Files --------------------------------------------------------------------------------------
def _blank(numbers, lost):
    return [math.nan if i in lost else float(x) for i, x in enumerate(numbers)]


def _cell(x):
    return "" if x is None else f"{x:.9g}"


def _finite(x):
    return x if math.isfinite(x) else None

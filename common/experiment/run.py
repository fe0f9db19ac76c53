# SPDX-License-Identifier: Apache-2.0
"""One run: the steps that every `train` takes, from one chunk boundary to the next.

A chunk is the `log_every` updates that are compiled as one program; between two chunks is a chunk
boundary. A run folder `<runs-dir>/<algorithm>/<data set>/<name>/` holds
    config.yaml   the resolved Config; `--config` reads it back
    metrics.csv   one row per seed and chunk boundary: row t has the mean losses of the chunk that
                  ends at update t (empty at 0) and, where the policy was evaluated, its scores
    timing.csv    seconds; the first chunk of every start includes compiling
    checkpoints/  orbax, the newest two
    best/         orbax, with --keep best: every seed's policy of its best evaluation
    online.rows   the rows of the online phase, see common/interaction.py
    result.json   written last: final and best score per seed, versions, code, hardware, speed
    wandb/        offline runs, one per seed; wandb.id is the end of their ids
"""

import inspect
import math
import os
import sys
import time
from pathlib import Path

import jax
import numpy as np

from common import command_line, fail, files
from common.experiment import (
    beginning,
    checkpoints,
    config,
    disk_errors,
    phases,
    processes,
    records,
    signals,
)
from common.experiment.best import Best
from common.experiment.divergence import Divergence
from common.experiment.origin import Origin, another_version
from common.experiment.progress import Progress, say_online, say_result
from common.experiment.records import SCORES, Records
from common.experiment.timing import Timing
from common.experiment.wandb_mirror import Mirror


class Run:
    """The run folder and everything that is written into it; used as in every `train`.

    `acting` has plain numbers that acting needs beside the State and the Config, if there are any:
    they are recorded, so that the policy can be loaded without the data set.
    """

    def __init__(self, cfg, options, dataset, acting=None):
        config.check(cfg, options)
        config.refuse_unread(options)
        phases.check_env(cfg, dataset)
        self.cfg, self.options, self.dataset, self.acting = cfg, options, dataset, acting
        self.script = Path(inspect.getfile(type(cfg)))
        self.folder = config.run_folder(cfg, options)
        self.algorithm = self.folder.relative_to(config.runs_dir(options)).parts[0]
        self.origin = Origin(cfg, dataset)
        self.records = Records(self.folder, cfg.seeds)
        self.divergence = Divergence(cfg)
        self.timing, self.progress = Timing(options.save_seconds), Progress(cfg)
        self.signals = signals.Signals()
        self.scores = np.full(len(cfg.seeds), np.nan)  # [S] of the last evaluation
        self.best = np.full(len(cfg.seeds), np.nan)  # [S] over training; never called the score
        self.last_evaluation = {}  # name -> [S], all numbers of the last evaluation
        self.start = 0  # the update at which this start of the run began
        self.save_due = 0.0  # when the next checkpoint is due
        self.done = False  # finished by an earlier start
        self.kept = None  # Best, with --keep best
        self.last_update = phases.last_update(cfg)
        self.interaction, self.reported = None, {}  # of the online phase, and what it reports

    def attach(self, interaction):
        """Let checkpoints save and restore the online phase, and metrics.csv have its numbers."""
        self.interaction = interaction

    # --- Opening and closing --------------------------------------------------------------------
    def __enter__(self):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = files.try_lock(self.folder / ".lock")
        except OSError as error:
            fail(f"{self.folder}: cannot be written ({error.strerror}); choose another --runs-dir")
        if self.lock is None:
            fail(f"{self.folder}: another process trains in it; wait for it or choose a --name")
        try:
            with disk_errors.storage(self.folder):
                self._open()
        except BaseException:
            self.lock.release()
            raise
        return self

    def _open(self):
        record = self._record()
        values = config.resolved(self.cfg, self.options)
        started_from = None
        if self.options.start_from is not None and jax.process_index() == 0:
            started_from = self.records.started_from()
            if started_from is None:
                started_from = beginning.facts(self.options.start_from, self.algorithm, self.cfg)
            record["started_from"] = started_from
        self.started_from = started_from
        places = {"algorithm_file": str(self.script.resolve())}
        if os.path.exists(file := os.path.expanduser(self.cfg.dataset)):
            places["data_file"] = os.path.abspath(file)
        self.records.write_config(values | {"record": record | places})
        command_line.use_plain_letters()
        print(f"run {self.folder}")
        if jax.config.jax_enable_x64:
            print("JAX_ENABLE_X64 is on: the numbers are not those of a run without it")
        every = self.cfg.eval_every if self.options.keep == "all" else None
        self.manager = checkpoints.manager(self.folder, every=every)
        if self.options.keep == "best":
            self.kept = Best(self.folder, self.cfg.seeds)
        self.wandb = Mirror(self, record)  # wandb is not told where files are on this machine
        self.signals.listen()

    def _record(self):
        """Facts about the run: for the reader, and for acting without the data set."""
        dataset, returns = self.dataset, self.dataset.episode_returns
        names = ("observation", "action")
        shapes = {name: [*getattr(dataset.transitions, name).shape[1:]] for name in names}
        data_return = {}
        if len(returns):  # an env without rows has none
            data_return = {"mean": float(returns.mean()), "max": float(returns.max())}
        return (
            {"algorithm": self.algorithm}
            | (dataset.record or {})
            | {
                "data_return": data_return,
                "reference": [dataset.ref_min_score, dataset.ref_max_score],
                "digest": self.origin.world["data"],
                "shapes": shapes,
                "num_actions": dataset.num_actions,
                "horizon": dataset.horizon,
                "score_is_success": dataset.score_is_success,
                "acting": self.acting or {},
            }
        )

    def __exit__(self, kind, error, trace):
        try:
            with disk_errors.storage(self.folder):
                self._close(kind, error)
        finally:
            self.lock.release()
        if kind is None and self.divergence.seeds:
            raise SystemExit(1)

    def _close(self, kind, error):
        self.progress.close()
        self.signals.close()
        if isinstance(error, OSError | ValueError):
            raise error  # `storage` turns an error of the disk into one line
        self.manager.close()
        if self.kept is not None:
            self.kept.close()
        self.wandb.close()
        ended_early = kind is SystemExit and self.divergence.all_lost
        if not self.done and (kind is None or ended_early):
            self._finish()

    def _finish(self):
        """Write result.json and print the final score."""
        cfg, diverged = self.cfg, self.divergence.seeds
        # Once more, since seeds may have diverged after the last evaluation.
        self.scores = np.array(self.divergence.blank(self.scores))
        last = {name: self.divergence.blank(x) for name, x in self.last_evaluation.items()}
        world = self.origin.world
        result = {
            "algorithm": self.algorithm,
            "dataset": cfg.dataset,
            "num_updates": cfg.num_updates,
            **({} if self.interaction is None else self.interaction.result()),
            "eval_episodes": cfg.eval_episodes,
            "score": self._by_seed(self.scores),
            **records.over_seeds("score", self.scores),
            "best_score": self._by_seed(self.best),
            **{name: self._by_seed(x) for name, x in last.items() if name != "score"},
            **({} if self.kept is None else {"best_kept_at": self.kept.by_seed()}),
            "diverged": {cfg.seeds[i]: step for i, step in diverged.items()},
            **self.timing.result(cfg),
            "hardware": f"{world['devices']}; {world['processor']}",
            "x64": bool(jax.config.jax_enable_x64),
            "matmul_precision": jax.config.jax_default_matmul_precision or "default",
            "code": self.origin.code,
            "versions": self.origin.versions,
        }
        if self.interaction is not None:
            result |= self._of_the_online_phase()
        self.records.write_result(result)
        say_result(self.folder, self.scores, self.best, last.get("return"), len(diverged))
        say_online(result)

    def _of_the_online_phase(self):
        """Offline score -> final score, and the regret in between, for result.json."""
        found, cfg = {"regret": self.divergence.blank(self.interaction.regret())}, self.cfg
        success = self.interaction.online_success()
        if success is not None:
            found["online_success"] = self.divergence.blank(success)
        if cfg.num_updates:
            offline = self.records.scores_at(cfg.num_updates)
            found["offline_score"] = np.array([offline.get(seed, np.nan) for seed in cfg.seeds])
        numbers = {}
        for name, by_seed in found.items():
            numbers[name] = self._by_seed(by_seed)
            numbers |= records.over_seeds(name, by_seed)
        return numbers

    def _by_seed(self, numbers):
        """{seed: number}, with None for a number that is missing."""
        found = map(float, numbers)
        return {
            seed: x if math.isfinite(x) else None
            for seed, x in zip(self.cfg.seeds, found, strict=True)
        }

    # --- Training -------------------------------------------------------------------------------
    def restore(self, state):
        """State, metrics and update of the newest readable checkpoint, else (state, None, 0)."""
        saved, meta = checkpoints.restore(self.manager, state)
        start, metrics = 0, None
        if meta is not None:
            state, start, metrics = saved, meta["update"], meta["metrics"]
            self._resume(meta)
        else:
            if self.options.resume:
                print(f"nothing to resume in {self.folder}: starting anew")
            state = self._begin(state)
        if self.interaction is not None and not self.done:
            self.interaction.restore(meta and meta.get("interaction"))
        if self.kept is not None:
            self.kept.restore(state)
        if not self.done:
            self.records.resume(start, self.interaction.METRICS if self.interaction else ())
        self.wandb.replay(self.folder / "metrics.csv")
        # Process 0 alone has a run folder: the others go on from its state.
        diverged = list(self.divergence.seeds.items())
        start, diverged, self.done = processes.ask([start, diverged, self.done])[0]
        self.divergence.seeds = dict(diverged)
        state = processes.from_first(state)
        self.progress.start(start, self.last_update)
        return state, metrics, start

    def _begin(self, state):
        """The State before the first update, with --start-from that of another run."""
        if self.started_from is None:
            return state
        update, folder = self.started_from["update"], self.started_from["folder"]
        what = "dynamics" if "algorithm" in self.started_from else "parameters"
        print(f"begins with the {what} of {folder} at update {update:,}")
        optimiser = self.options.start_optimizer
        return beginning.begin(state, self.cfg.seeds, self.started_from, optimiser)

    def _resume(self, meta):
        """Take over what an earlier start of the run has saved beside the State."""
        start = meta["update"]
        self.timing.restore(meta["seconds"])
        self.records.waiting = meta["waiting"]
        self.best = np.array(meta["best"], float)
        self.divergence.seeds = {int(index): step for index, step in meta["diverged"].items()}
        result = self.records.read_result()
        # Both may have grown since: with more episodes the last policy is scored again.
        same = all(
            result.get(key, 0) == vars(self.cfg).get(key, 0)
            for key in ("num_updates", "online_updates", "eval_episodes")
        )
        self.done = start == self.last_update and same
        print("finished before" if self.done else f"resuming at update {start:,}")
        if self.done:
            if other := another_version(self.script, result.get("code", {}).get("algorithm")):
                what = f"this score is of {other}; give a --name to train the present one"
                print(f"WARNING: {what}", file=sys.stderr)
            self._read_result()
        else:
            self.origin.compare(meta)

    def _read_result(self):
        """The scores of a run that an earlier start finished, said once more."""
        result, numbers = self.records.read_result(), {}
        for name in ("score", "best_score", "return"):
            by_seed = result.get(name, {})
            numbers[name] = np.array([by_seed.get(str(seed)) for seed in self.cfg.seeds], float)
        self.scores, self.best = numbers["score"], numbers["best_score"]
        returns = numbers["return"] if "return" in result else None
        say_result(self.folder, self.scores, self.best, returns, len(result["diverged"]))
        say_online(result)

    def boundaries(self, start):
        """The chunk boundaries start, start + log_every, ..., last_update; none if all is done."""
        self.start = start
        self.timing.begin_chunk()
        if not self.done:
            yield from range(start, self.last_update + 1, self.cfg.log_every)

    def evaluates(self, step):
        """Whether the policy is evaluated at this chunk boundary."""
        ends = (self.cfg.num_updates, self.last_update)  # of both phases
        return step % self.cfg.eval_every == 0 or step in ends

    def save(self, step, state, metrics):
        """Wait for the chunk, freeze seeds that diverged in it, save a checkpoint where one is due.

        Leaves the program here after a signal, and where every seed has diverged.
        """
        metrics = _lists(metrics)
        host_state = jax.tree.map(np.array, state)  # copied: the next chunk reuses its memory
        if step > self.start:
            self.timing.end_chunk()
        self.divergence.freeze(step, host_state, metrics or {})
        if self.interaction is not None:  # now: the next chunk begins before this one is logged
            self.reported = self.interaction.report()
        signal_number = processes.agree(self.signals.number or 0)
        late = time.perf_counter() >= self.save_due
        due = signal_number or late or self.divergence.all_lost or self.evaluates(step)
        if due and jax.process_index() == 0 and step not in self.manager.all_steps():
            began = time.perf_counter()
            meta = {
                "update": step,
                "metrics": metrics,
                "best": self.best.tolist(),
                "seconds": self.timing.saved(),
                "waiting": self.records.waiting,
                "diverged": self.divergence.seeds,
                **self.origin.saved(),
            }
            if self.interaction is not None:
                meta["interaction"] = self.interaction.saved()
            checkpoints.save(self.manager, step, host_state, meta)
            saved = time.perf_counter()
            self.timing.add_checkpoint(saved - began)
            self.save_due = saved + self.timing.between_checkpoints()
        if signal_number:
            print(f"saved at update {step:,}; continue with the same command and --resume")
            raise SystemExit(128 + signal_number)
        if self.divergence.all_lost:
            print(f"no seed is left to train after update {step:,}", file=sys.stderr)
            raise SystemExit(1)
        self.timing.begin_chunk()

    def log(self, step, metrics, scores):
        """Write the rows of a chunk boundary, one per seed, once its evaluation is there."""
        began = time.perf_counter()
        evaluation = scores and scores.result()
        if evaluation:
            # On a CPU the rollouts came before the chunk. Elsewhere they run beside it, and only
            # the time spent waiting for them counts.
            waited = time.perf_counter() - began
            on_cpu = jax.default_backend() == "cpu"
            seconds = evaluation["seconds"] if on_cpu else waited
            self.timing.add_evaluation(seconds, evaluation["preparing"])
            self.last_evaluation = {
                name: self.divergence.blank(evaluation[name])
                for name in SCORES
                if evaluation[name] is not None
            }
            self.scores = np.array(self.last_evaluation["score"])
            if step > 0:  # the untrained policy is not a result of training
                self.best = np.fmax(self.best, self.scores)
                if self.kept is not None:  # `save` was given that state last
                    self.kept.offer(step, self.divergence.last_state, self.scores)
            self.progress.evaluated(step, self.scores)
        written = self.records.write_metrics(
            step,
            metrics and _lists(metrics) | self.reported,
            self.last_evaluation if evaluation else None,
            self.divergence.seeds,
            last=step == self.last_update,
        )
        for update, seed, means, numbers in written:
            self.wandb.log(seed, update, means | numbers)
        self.records.write_timing(step, self.timing.row())
        self.progress.advance(step, self.timing)


def _lists(metrics):
    """name -> [S] floats on the host; None where there are no metrics yet."""
    return metrics and {name: np.asarray(x, float).tolist() for name, x in metrics.items()}

# SPDX-License-Identifier: Apache-2.0
"""The seconds a run spends on training, on evaluation and on checkpoints."""

import statistics
import time

from common.experiment import phases

SAVE_SECONDS = 10.0  # least time between checkpoints, where --save-seconds is not given
SAVE_COST = 20  # and then at least so many times the time that the last one took


class Timing:
    """Seconds in all, and those of the chunks of this start.

    `save_seconds` is the flag's value, None where it was not given.
    """

    def __init__(self, save_seconds=None):
        self.save_seconds = save_seconds
        self.train, self.evaluation, self.checkpoints = 0.0, 0.0, 0.0
        self.last_checkpoint = 0.0  # seconds that the last one of this start took
        self.evaluations, self.evaluation_here = 0, 0.0  # of this start: how many, their seconds
        self.chunks = []  # of this start; its first chunk includes compiling
        self.began, self.away = 0.0, 0.0  # of the present chunk: its start, seconds spent elsewhere

    def begin_chunk(self):
        self.began, self.away = time.perf_counter(), 0.0

    def end_chunk(self):
        self.chunks.append(time.perf_counter() - self.began - self.away)
        self.train += self.chunks[-1]

    def add_evaluation(self, seconds, preparing=0.0):
        """An evaluation in the time of the present chunk, which is not training.

        `preparing` went to making its environments, and counts as neither.
        """
        self.away = seconds + preparing
        self.evaluation += seconds
        self.evaluations += 1
        self.evaluation_here += seconds

    def add_checkpoint(self, seconds):
        """A checkpoint between two chunks."""
        self.checkpoints += seconds
        self.last_checkpoint = seconds

    def between_checkpoints(self):
        """Least seconds from one checkpoint to the next."""
        if self.save_seconds is not None:
            return self.save_seconds
        return max(SAVE_SECONDS, SAVE_COST * self.last_checkpoint)

    def saved(self):
        """What a checkpoint keeps of it."""
        return {"train": self.train, "eval": self.evaluation, "checkpoints": self.checkpoints}

    def restore(self, saved):
        self.train, self.evaluation = saved["train"], saved["eval"]
        self.checkpoints = saved.get("checkpoints", 0.0)  # runs of before did not measure it

    def row(self):
        """The columns of timing.csv after `update`."""
        chunk = self.chunks[-1] if self.chunks else 0.0
        columns = chunk, self.train, self.evaluation, self.checkpoints
        return tuple(f"{seconds:.3f}" for seconds in columns)

    def result(self, cfg):
        """What result.json says. The speed is summed over seeds.

        Its median is robust to what else runs on the machine. The first chunk, which compiles, is
        left out where there are others.
        """
        chunks = self.chunks[1:] or self.chunks
        chunks = chunks or [self.train * cfg.log_every / phases.last_update(cfg)]  # finished before
        speed = cfg.log_every * len(cfg.seeds) / statistics.median(chunks)
        total = max(self.train + self.evaluation, 1e-9)
        return {
            "updates_per_second": round(speed, 1),
            "train_seconds": round(self.train, 1),
            "eval_seconds": round(self.evaluation, 1),
            "eval_share": round(self.evaluation / total, 3),
            "checkpoint_seconds": round(self.checkpoints, 1),
        }

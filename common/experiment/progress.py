# SPDX-License-Identifier: Apache-2.0
"""What a run prints while it trains and when it is done."""

import os
import statistics
import time

import numpy as np

from common.experiment import phases

QUIET = 60.0  # seconds after which a log file gets a line
LONG = 3600.0  # seconds: what takes longer is said together with a number of updates that does not
CHUNKS = 2  # after so many the speed is known; the first one includes compiling


class Progress:
    """A progress bar with the score in it. A log file gets lines instead.

    Without a terminal there is a line at every evaluation and, between two, one a minute.
    """

    def __init__(self, cfg):
        self.cfg, self.bar = cfg, None
        self.spoken = time.monotonic()  # when the last line was printed
        self.speed_is_known = False

    def start(self, first, end):
        from tqdm import tqdm

        # Without a terminal there is no bar. What TQDM_DISABLE says goes before that.
        hidden = {} if "TQDM_DISABLE" in os.environ else {"disable": None}
        self.bar = tqdm(total=end, initial=first, unit=" updates", **hidden)

    def advance(self, step, timing):
        """A chunk boundary: move the bar, say how long the rest takes."""
        self.bar.update(step - self.bar.n)
        if step == phases.last_update(self.cfg) or len(timing.chunks) < CHUNKS:
            return
        if not self.speed_is_known:
            self.speed_is_known = True
            self._say(speed_line(self.cfg, step, timing))
        elif self.bar.disable and time.monotonic() - self.spoken >= QUIET:
            left = duration(sum(seconds_left(self.cfg, step, timing)))
            self._say(f"update {step:,}: about {left} left")

    def _say(self, line):
        from tqdm import tqdm

        if self.bar.disable:
            print(line, flush=True)
        else:
            tqdm.write(line)
        self.spoken = time.monotonic()

    def evaluated(self, step, scores):
        """Show the mean of the seeds' scores, [S]; without an env all of them are NaN."""
        if np.isnan(scores).all():
            return
        mean = np.nanmean(scores)
        self.bar.set_postfix_str(f"score {mean:.1f}")
        if self.bar.disable:
            each = " ".join(f"{score:.1f}" for score in scores)
            self._say(f"update {step:,}: score {mean:.1f} (seeds: {each})")

    def close(self):
        if self.bar is not None:
            self.bar.close()


# --- Durations ----------------------------------------------------------------------------------
def seconds_left(cfg, step, timing):
    """(training, evaluation, checkpoints) from this chunk boundary to the end.

    They follow from what was measured so far.
    """
    chunk = statistics.median(timing.chunks[1:] or timing.chunks)
    updates = phases.last_update(cfg)
    chunks = (updates - step) / cfg.log_every
    training = chunk * chunks
    # The last update is evaluated too, whether eval_every divides it or not.
    evaluations = -(-updates // cfg.eval_every) - step // cfg.eval_every
    done = max(timing.evaluations, 1)
    # A checkpoint at every evaluation, and between two of them where it is due.
    between = max(chunk, timing.between_checkpoints())
    count = min(chunks, evaluations + training / max(between, 1e-9))
    checkpoints = count * timing.last_checkpoint
    return training, evaluations * timing.evaluation_here / done, checkpoints


def speed_line(cfg, step, timing):
    """The speed and what follows from it, in one line."""
    training, evaluation, checkpoints = seconds_left(cfg, step, timing)
    total = training + evaluation + checkpoints
    updates = phases.last_update(cfg)
    speed = (updates - step) / max(training, 1e-9)
    seeds = f" of {len(cfg.seeds)} seeds each" if len(cfg.seeds) > 1 else ""
    digits = 1 if speed < 10 else 0
    line = (
        f"speed: {speed:,.{digits}f} updates/s{seeds}, so about {duration(total)} to go "
        f"(training {duration(training)}, evaluation {duration(evaluation)}"
    )
    if checkpoints >= 1 and checkpoints > 0.01 * total:
        line += f", checkpoints {duration(checkpoints)}"
    line += ")"
    fewer = int(LONG / max(total, LONG) * updates // cfg.eval_every) * cfg.eval_every
    begun_here = step == len(timing.chunks) * cfg.log_every
    if total > LONG and begun_here and fewer and not phases.online_updates(cfg):
        line += "; that is long on this machine, where an hour is enough for about "
        line += f"--num-updates {fewer}"
    return line


def duration(seconds):
    """Like "45 s", "12 min" or "3 h 20 min": as exact as an estimate is."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 10 else f"{hours + (minutes >= 30)} h"


# --- The end ------------------------------------------------------------------------------------
def say_result(folder, scores, best, returns, diverged):
    """Print the final score in one line.

    Args:
        scores, best, returns: [S] each, NaN for seeds that diverged or whose env gave rewards that
            are no finite numbers; `returns` is None where nothing was evaluated.
        diverged: how many seeds diverged.
    """
    left = len(scores) - diverged
    if not left:
        print(f"all seeds diverged, in {folder}")
        return
    lost = f", {left} of {len(scores)} seeds: the others diverged" if diverged else ""
    if np.isnan(scores).all():
        what = "trained without an evaluation"
        if returns is not None:
            what = "no score, since the env gave rewards that are no finite numbers"
        print(f"{what}{lost}, in {folder}")
        return
    unscored = int(np.isnan(scores).sum()) - diverged
    lost += f", {unscored} without a score" if unscored else ""
    spread = f" ± {np.nanstd(scores):.1f}" if left - unscored > 1 else ""
    print(
        f"final score {np.nanmean(scores):.1f}{spread} "
        f"(best during training {np.nanmean(best):.1f}){lost}, "
        f"return {np.nanmean(returns):.1f}, in {folder}"
    )


def say_online(result):
    """Print what the online phase brought, in one line, by what result.json says."""
    before, after = result.get("offline_score_mean"), result["score_mean"]
    parts = []
    if before is not None and after is not None:
        parts.append(f"offline score {before:.1f} -> final score {after:.1f}")
    if result.get("regret_mean") is not None:
        parts.append(f"regret of the online phase {result['regret_mean']:.3f}")
    if parts:
        print(", ".join(parts))

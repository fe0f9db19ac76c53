# SPDX-License-Identifier: Apache-2.0
"""What a run prints while it trains and when it is done."""

import numpy as np


class Progress:
    """A progress bar with the score in it. A log file gets a line per evaluation instead."""

    def __init__(self):
        self.bar = None

    def start(self, first, end):
        from tqdm import tqdm

        self.bar = tqdm(total=end, initial=first, disable=None, unit=" updates")

    def advance(self, step):
        self.bar.update(step - self.bar.n)

    def evaluated(self, step, scores):
        """Show the mean of the seeds' scores, [S]; without an env all of them are NaN."""
        if np.isnan(scores).all():
            return
        mean = np.nanmean(scores)
        self.bar.set_postfix_str(f"score {mean:.1f}")
        if self.bar.disable:
            each = " ".join(f"{score:.1f}" for score in scores)
            print(f"update {step:,}: score {mean:.1f} (seeds: {each})", flush=True)

    def close(self):
        if self.bar is not None:
            self.bar.close()


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

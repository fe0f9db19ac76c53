# SPDX-License-Identifier: Apache-2.0
"""`--keep best`: every seed's policy of its best evaluation, in the folder `best/`.

It is chosen by the evaluations during training, so its score there is too good: report the last
policy, or score this one on new start states.
"""

import jax
import numpy as np

from common.experiment import checkpoints

FOLDER = "best"


class Best:
    """`scores` and `updates`, [S] each: the best evaluation of each seed so far."""

    def __init__(self, folder, seeds):
        self.seeds = seeds
        self.scores = np.full(len(seeds), np.nan)
        self.updates = [None] * len(seeds)
        self.state = None  # arrays [S, ...]
        self.manager = checkpoints.manager(folder, FOLDER, kept=1)

    def restore(self, target):
        """Go on from what an earlier start has kept."""
        state, meta = checkpoints.restore(self.manager, target)
        if meta is not None:
            self.state = jax.tree.map(np.array, state)
            self.scores, self.updates = np.array(meta["scores"], float), meta["updates"]

    def offer(self, step, state, scores):
        """Keep the seeds whose scores, [S], are their best so far. `state` is on the host."""
        better = (scores > self.scores) | (np.isnan(self.scores) & ~np.isnan(scores))
        if not better.any():
            return
        if self.state is None:
            self.state = jax.tree.map(np.array, state)
        for i in np.flatnonzero(better):
            self.scores[i], self.updates[i] = scores[i], step
            for kept, new in zip(jax.tree.leaves(self.state), jax.tree.leaves(state), strict=True):
                kept[i] = new[i]
        number = (self.manager.latest_step() or 0) + 1
        meta = {
            "updates": self.updates,  # None: the seed has not been evaluated
            "scores": [None if np.isnan(x) else x for x in self.scores.tolist()],
            "chosen_by": "the evaluations during training",
        }
        checkpoints.save(self.manager, number, self.state, meta)

    def by_seed(self):
        """{seed: update}, for result.json."""
        return dict(zip(self.seeds, self.updates, strict=True))

    def close(self):
        self.manager.close()

# SPDX-License-Identifier: Apache-2.0
"""Seeds whose numbers are no longer finite: they are frozen and the others go on."""

import math
import sys

import jax
import numpy as np


class Divergence:
    """`seeds`: index of a seed -> the update at whose chunk boundary it was found."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.seeds = {}
        self.last_state = None  # of the chunk boundary before, in host memory

    @property
    def all_lost(self):
        return len(self.seeds) == len(self.cfg.seeds)

    def freeze(self, step, state, metrics):
        """Find the seeds that diverged in the chunk that ends at `step`.

        From then on a diverged seed keeps the state of the chunk boundary before; `state`, arrays
        [S, ...] in host memory, is changed in place. The first time a warning names the seed, the
        metrics and the updates.
        """
        for i, seed in enumerate(self.cfg.seeds):
            bad = [name for name, means in metrics.items() if not math.isfinite(means[i])]
            if not bad and not all(np.isfinite(x[i]).all() for x in jax.tree.leaves(state)):
                bad = ["a parameter"]
            if bad and i not in self.seeds:
                self.seeds[i] = step
                where = f"in updates {step - self.cfg.log_every:,} to {step:,}"
                print(f"WARNING: seed {seed}: {', '.join(bad)} not finite {where}", file=sys.stderr)
        if self.last_state is not None:
            before = jax.tree.leaves(self.last_state)
            for new, old in zip(jax.tree.leaves(state), before, strict=True):
                for i in self.seeds:
                    new[i] = old[i]
        self.last_state = state

    def blank(self, numbers):
        """[S] numbers with NaN for the seeds that diverged."""
        return [math.nan if i in self.seeds else float(x) for i, x in enumerate(numbers)]

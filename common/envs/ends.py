# SPDX-License-Identifier: Apache-2.0
"""Where an env ends an episode, as far as an observation shows it.

The numbers are those of Gymnasium's Hopper and Walker2d, the same in all of their versions (and in
D4RL's): an episode goes on while the height, the angle of the torso and every number of the state
are inside of an open range.
"""

import sys

import numpy as np

FREE = float(np.finfo(np.float32).max)
# By the beginning of the env's id: numbers per observation, {column: its range}, all other columns.
RANGES = {
    "Hopper": (11, {0: (0.7, FREE), 1: (-0.2, 0.2)}, (-100.0, 100.0)),
    "Walker2d": (17, {0: (0.8, 2.0), 1: (-1.0, 1.0)}, (-FREE, FREE)),
}


def healthy_range(make_env, rows):
    """The open range of every number of an observation in which an episode goes on.

    Args:
        make_env: () -> gymnasium.Env, or None where no env is known.
        rows: the recorded Transitions; observation [N, O] and termination [N] are looked at.

    Returns:
        (low [O], high [O]), float32. Every finite number is inside for an env of which no rule is
        known here. A line warns of that if recorded episodes terminate.
    """
    width = rows.observation.shape[1]
    low, high = np.full(width, -FREE, np.float32), np.full(width, FREE, np.float32)
    family = "its env"
    if make_env is not None:
        env = make_env()
        spec = env.unwrapped.spec
        env.close()
        family = family if spec is None else spec.name
    numbers, columns, others = RANGES.get(family, (None, {}, (-FREE, FREE)))
    if numbers == width:  # not made with other options
        low[:], high[:] = others
        for column, (least, most) in columns.items():
            low[column], high[column] = least, most
    elif rows.termination.any():
        print(
            f"WARNING: {int(rows.termination.sum()):,} recorded episodes terminate, but when "
            f"{family} ends an episode is known here for {' and '.join(RANGES)} only: a rollout "
            "of the model goes on where the env would end it",
            file=sys.stderr,
        )
    return low, high

# SPDX-License-Identifier: Apache-2.0
"""Common mistakes in files of a user's own. Each is one line of warning, and nothing is refused."""

import sys

import numpy as np

SAMPLE = 1000  # rows that are looked at, so that no size of data takes long
JUMP = 4  # a reset changes some number of an observation more than so many times the usual


def warn(dataset_id: str, rows: dict[str, np.ndarray], termination_ends_episode: bool) -> None:
    """Print a line for each mistake that checked rows in D4RL's layout look like."""
    termination = rows["terminals"] > 0
    timeout = rows["timeouts"] > 0 if "timeouts" in rows else np.zeros_like(termination)
    if "next_observations" in rows:
        _warn_of_next_episodes(dataset_id, rows, termination, timeout)
    if termination_ends_episode and not timeout.any():
        _warn_of_time_limits(dataset_id, termination)


def _warn_of_next_episodes(dataset_id, rows, termination, timeout):
    """`np.roll(observations, -1)` in place of what `env.step` returned.

    The next observation at an end is then the first one of the next episode. Where the recording
    goes on without a reset, it truly is the next row, but there it is no jump.
    """
    observations, following = rows["observations"], rows["next_observations"]
    for ends in (timeout, termination & ~timeout):
        last = _sample(ends[:-1])
        same = (following[last] == observations[last + 1]).all(axis=1)
        if len(last) < 2 or same.mean() < 0.95:
            continue
        inside = _sample(~(termination | timeout)[:-1])
        usual = _changes(observations, inside)
        jumps = _changes(observations, last[same]) > JUMP * usual
        if (jumps & (usual > 0)).any():  # what never changes inside may be a goal
            _print(
                f"{dataset_id}: next_observations cross the ends of episodes, as np.roll makes "
                "them; store what env.step returned, or leave them out"
            )
            return


def _sample(mask):
    """At most SAMPLE of the rows that a mask has, evenly over them."""
    rows = np.flatnonzero(mask)
    return rows[:: max(1, -(-len(rows) // SAMPLE))]


def _changes(observations, rows):
    """By how much each number of an observation changes from these rows to the next, [O]."""
    if not len(rows):
        return np.zeros(observations.shape[1])
    difference = observations[rows + 1].astype(np.float64) - observations[rows]
    return np.sqrt(np.square(difference).mean(axis=0))


def _warn_of_time_limits(dataset_id, termination):
    """Time limits that are stored as terminals: values would not bootstrap there."""
    ends = np.flatnonzero(termination) + 1
    if len(ends) < 3:
        return
    lengths = np.diff(np.concatenate([[0], ends]))
    rest = len(termination) - ends[-1]  # rows of an episode that the recording breaks off
    whole = lengths[:-1] if rest == 0 and lengths[-1] < lengths[0] else lengths
    steps = lengths[0]
    if len(whole) >= 3 and steps > 1 and (whole == steps).all() and rest <= steps:
        _print(
            f"{dataset_id}: no timeouts, and {len(whole):,} episodes terminate after {steps:,} "
            "steps each; if that is a time limit, store it as timeouts"
        )


def _print(line):
    print(f"WARNING: {line}", file=sys.stderr)

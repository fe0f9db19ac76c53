# SPDX-License-Identifier: Apache-2.0
"""Recorded rows become transitions, by the rules in dataset.py."""

import numpy as np

from common.datasets.dataset import Transitions


def cut(rows, horizon=None, termination_ends_episode=True):
    """Checked arrays in D4RL's layout -> (Transitions, episode ends, episode returns).

    Args:
        rows: observations [N, O], actions, rewards [N], terminals [N], and where known timeouts
            [N] and next_observations [N, O].
        horizon: without timeouts, an episode ends after that many steps.
        termination_ends_episode: False where the recording goes on after the goal (AntMaze,
            OGBench). A termination there stops the bootstrap and nothing else.
    """
    count, action = len(rows["rewards"]), rows["actions"]
    termination = rows["terminals"] > 0
    timeout = rows["timeouts"] > 0 if "timeouts" in rows else _timeouts(termination, horizon)
    timeout[-1] = True  # an episode that the recording breaks off counts as truncated
    end = termination | timeout if termination_ends_episode else timeout
    truncation = end & ~termination
    following = np.minimum(np.arange(count) + 1, count - 1)
    next_row = np.where(end, np.arange(count), following)  # an episode's last row: its own
    keep, known = np.ones(count, bool), "next_observations" in rows
    if not known:
        keep = ~truncation
        # The row before a dropped one is now its episode's last.
        truncation = np.append(truncation[1:], False) & ~end & ~termination
    starts = np.append(0, np.flatnonzero(end)[:-1] + 1)
    lengths = np.add.reduceat(keep, starts, dtype=np.int64)
    returns = np.add.reduceat(rows["rewards"], starts, dtype=np.float64)
    # Each column is copied once: a slice copies nothing, and indexing copies.
    kept = slice(None) if keep.all() else np.flatnonzero(keep)
    next_row = next_row[kept]
    transitions = Transitions(
        observation=rows["observations"][kept],
        action=action[kept],
        reward=rows["rewards"][kept],
        next_observation=rows["next_observations"] if known else rows["observations"][next_row],
        next_action=action[next_row],
        termination=termination[kept].astype(np.float32),
        truncation=truncation[kept].astype(np.float32),
    )
    return transitions, np.cumsum(lengths[lengths > 0]), returns[lengths > 0]


def _timeouts(termination, horizon):
    """For rows without `timeouts`: the time limit, `horizon` steps after each episode's start."""
    timeout = np.zeros_like(termination)
    if horizon is not None:
        starts = np.append(0, np.flatnonzero(termination) + 1)
        for start, stop in zip(starts, np.append(starts[1:], len(termination)), strict=True):
            timeout[start + int(horizon) - 1 : stop : int(horizon)] = True
    return timeout

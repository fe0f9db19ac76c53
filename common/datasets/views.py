# SPDX-License-Identifier: Apache-2.0
"""Views of a data set, for methods that need more than transitions. NumPy only.

Rows of a file without next observations end one row early at a truncation, so a return-to-go or a
chunk there lacks that row's reward.
"""

import dataclasses

import numpy as np

from common import fail
from common.datasets.dataset import Transitions


def episodes(dataset) -> tuple[np.ndarray, np.ndarray]:
    """First row of each episode and the row after its last one, [episodes] each."""
    ends = dataset.episode_ends
    return np.append(0, ends[:-1]).astype(np.int64), ends


def returns_to_go(dataset, discount: float = 1.0) -> np.ndarray:
    """Discounted sum of the rewards from each row to its episode's end or first termination, [N].

    Computed in float64, given as float32.
    """
    starts, ends = episodes(dataset)
    reward = dataset.transitions.reward.astype(np.float64)
    go_on = discount * (1.0 - dataset.transitions.termination)
    total, lengths = reward, ends - starts
    order = np.argsort(-lengths, kind="stable")  # longest first: those left are a prefix
    last = ends[order] - 1
    count = np.searchsorted(-lengths[order], -np.arange(1, lengths.max() + 1), side="right")
    for back in range(1, lengths.max()):
        row = last[: count[back]] - back
        total[row] += go_on[row] * total[row + 1]
    return total.astype(np.float32)


def return_range(dataset) -> tuple[float, float]:
    """Lowest and highest return of an episode, undiscounted."""
    return float(dataset.episode_returns.min()), float(dataset.episode_returns.max())


def return_span(dataset) -> float:
    """Highest minus lowest return of an episode; exit code 2 where there is no difference."""
    low, high = return_range(dataset)
    if low == high:
        fail(f"{dataset.id}: every episode returns {low:g}: no return_scale can be reached")
    return high - low


def chunks(dataset, steps: int, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Indices [R, steps] of the rows that follow each of `rows` (all), and their validity.

    Past the end of the episode, or of what follows a termination, the last valid row is repeated
    and the mask is 0.
    """
    transitions = dataset.transitions
    stop = np.asarray(dataset.episode_ends)
    cuts = np.union1d(stop, np.flatnonzero(transitions.termination) + 1)
    rows = np.arange(len(transitions.reward)) if rows is None else np.asarray(rows)
    last = cuts[np.searchsorted(cuts, rows, side="right")] - 1
    index = rows[:, None] + np.arange(steps)
    valid = (index <= last[:, None]).astype(np.float32)
    return np.minimum(index, last[:, None]), valid


def filter_by_return(dataset, fraction: float, fraction_of: str = "episodes"):
    """The data set with its best episodes by return, one at least, in their old order.

    Of equal returns the shorter episode is the better one.

    Args:
        dataset: what `load` returns.
        fraction: share that is kept.
        fraction_of: "episodes", or "transitions" for the best episodes that hold no more of them.

    Raises:
        ValueError: `fraction` is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"a fraction above 0 and up to 1 is wanted, not {fraction}")
    starts, ends = episodes(dataset)
    order = np.lexsort((ends - starts, -dataset.episode_returns))
    sizes = np.ones_like(ends) if fraction_of == "episodes" else (ends - starts)[order]
    count = np.searchsorted(np.cumsum(sizes), fraction * sizes.sum() + 1e-9, side="right")
    best = np.sort(order[: max(1, count)])
    keep = np.zeros(ends[-1], bool)
    for start, end in zip(starts[best], ends[best], strict=True):
        keep[start:end] = True
    return dataclasses.replace(
        dataset,
        transitions=Transitions(*(column[keep] for column in dataset.transitions)),
        episode_ends=np.cumsum((ends - starts)[best]),
        episode_returns=dataset.episode_returns[best],
    )

# SPDX-License-Identifier: Apache-2.0
"""Views of a data set, for methods that need more than transitions. NumPy only.

Where a file has no next observations, the last row of a truncated episode is missing. A
return-to-go or a chunk of such an episode lacks the reward of that row.
"""

import dataclasses

import numpy as np

from common import fail
from common.datasets.dataset import Transitions


def episodes(dataset) -> tuple[np.ndarray, np.ndarray]:
    """The first row of each episode and the row after its last row, [episodes] each."""
    ends = dataset.episode_ends
    return np.append(0, ends[:-1]).astype(np.int64), ends


def returns_to_go(dataset, discount: float = 1.0) -> np.ndarray:
    """Discounted sum of the rewards from each row on, [N] float32 (summed in float64).

    The sum ends with the episode, or before that with the first termination.
    """
    starts, ends = episodes(dataset)
    reward = dataset.transitions.reward.astype(np.float64)
    go_on = discount * (1.0 - dataset.transitions.termination)
    total, lengths = reward, ends - starts
    # All episodes at once, from their last row backwards. The longest come first, so that the
    # episodes which have a row that far back are always the first `count[back]`.
    order = np.argsort(-lengths, kind="stable")
    last = ends[order] - 1
    count = np.searchsorted(-lengths[order], -np.arange(1, lengths.max() + 1), side="right")
    for back in range(1, lengths.max()):
        row = last[: count[back]] - back
        total[row] += go_on[row] * total[row + 1]
    return total.astype(np.float32)


def return_range(dataset) -> tuple[float, float]:
    """The lowest and the highest undiscounted return of an episode."""
    return float(dataset.episode_returns.min()), float(dataset.episode_returns.max())


def return_span(dataset) -> float:
    """The highest minus the lowest return of an episode; exit code 2 if all are equal."""
    low, high = return_range(dataset)
    if low == high:
        fail(f"{dataset.id}: every episode returns {low:g}, so return_scale cannot be reached")
    return high - low


def chunks(dataset, steps: int, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The `steps` rows that begin at each of `rows` (default: all rows).

    Returns their indices [R, steps] and a mask [R, steps]. A chunk ends with its episode, or before
    that with a termination: from there on the last valid index is repeated and the mask is 0.
    """
    transitions = dataset.transitions
    stop = np.asarray(dataset.episode_ends)
    cuts = np.union1d(stop, np.flatnonzero(transitions.termination) + 1)
    rows = np.arange(len(transitions.reward)) if rows is None else np.asarray(rows)
    last = cuts[np.searchsorted(cuts, rows, side="right")] - 1
    index = rows[:, None] + np.arange(steps)
    valid = (index <= last[:, None]).astype(np.float32)
    return np.minimum(index, last[:, None]), valid


def by_seed(view, rows, dataset):
    """`view` of the rows that a run has collected, in the same layout.

    Args:
        view: Dataset -> NamedTuple of [T, ...].
        rows: Transitions [T, S, ...]. Each seed is a recording: its episodes end where they say so,
            the last one with the last row.
        dataset: the data set that the run began on, for its other facts.

    Returns:
        That NamedTuple, of [T, S, ...].
    """
    columns = []
    for i in range(rows.reward.shape[1]):
        own = Transitions(*(column[:, i] for column in rows))
        over = own.termination + own.truncation > 0
        over[-1] = True
        ends = np.flatnonzero(over) + 1
        columns.append(view(dataclasses.replace(dataset, transitions=own, episode_ends=ends)))
    return type(columns[0])(*(np.stack(column, axis=1) for column in zip(*columns, strict=True)))


def filter_by_return(dataset, fraction: float, fraction_of: str = "episodes"):
    """The data set with only its best episodes by return, at least one, in their order.

    Of two episodes with the same return the shorter one is better.

    Args:
        dataset: what `load` returns.
        fraction: the share that is kept.
        fraction_of: the share is one of "episodes" or of "transitions"; no more than it is kept.

    Raises:
        ValueError: `fraction` is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"the fraction must be above 0 and up to 1, not {fraction}")
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

# SPDX-License-Identifier: Apache-2.0
"""Statistics over seeds and data sets, after Agarwal et al., 2021, arXiv:2108.13264.

Scores are matrices [R seeds, T data sets]. Every interval is the percentile interval of a
stratified bootstrap: the seeds of each data set are resampled with replacement, the data sets are
kept. The draws come from a fixed seed, so that a page that is made twice is the same.
"""

import numpy as np
from scipy import stats

LEVEL = 0.95
DRAWS = 10_000
AT_ONCE = 2_000_000  # numbers held in memory at a time while drawing


def iqm(scores):
    """Interquartile mean over the last two axes, seeds and data sets together."""
    flat = scores.reshape(*scores.shape[:-2], -1)
    return stats.trim_mean(flat, 0.25, axis=-1)


def profile(scores, levels):
    """[..., L] share of seeds and data sets whose score is above each level [L]."""
    flat = np.sort(scores.reshape(*scores.shape[:-2], -1), axis=-1)
    if flat.ndim == 1:
        return 1 - np.searchsorted(flat, levels, side="right") / len(flat)
    return np.stack([1 - np.searchsorted(row, levels, side="right") / len(row) for row in flat])


def improvement(x, y):
    """Probability that a seed of x beats one of y on the same data set, averaged over data sets.

    Ties count half. On each data set this is the Mann-Whitney U divided by its largest value.
    """
    x, y = x[..., :, None, :], y[..., None, :, :]
    return ((x > y) + 0.5 * (x == y)).mean(axis=(-3, -2, -1))


def mean(scores):
    return scores.mean(axis=(-2, -1))


def resample(scores, draws, generator):
    """[draws, R, T]: the seeds of every data set, resampled with replacement independently."""
    index = generator.integers(len(scores), size=(draws, *scores.shape))
    return np.take_along_axis(scores[None], index, axis=1)


def interval(statistic, *scores, draws=DRAWS, level=LEVEL, seed=0):
    """(low, high) of `statistic(*scores)`, as arrays if it is one. Matrices are independent.

    Raises:
        ValueError: if a matrix has a single seed, which says nothing about variation.
    """
    if any(len(x) < 2 for x in scores):
        raise ValueError("an interval needs at least two seeds")
    generator = np.random.default_rng(seed)
    size = max(1, AT_ONCE // (scores[0].shape[1] * np.prod([len(x) for x in scores])))
    values, left = [], draws
    while left:
        count = int(min(left, size))
        values.append(statistic(*(resample(x, count, generator) for x in scores)))
        left -= count
    tail = 100 * (1 - level) / 2
    return tuple(np.percentile(np.concatenate(values), [tail, 100 - tail], axis=0))

# SPDX-License-Identifier: Apache-2.0
"""benchmarks/intervals.py against scipy, numbers by hand and rliable's stored output."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks import intervals

RLIABLE = json.loads((Path(__file__).with_name("rliable.json")).read_text())
X, Y = np.array(RLIABLE["x"]), np.array(RLIABLE["y"])
LEVELS = np.array(RLIABLE["levels"])


@pytest.mark.parametrize(("name", "scores"), [("x", X), ("y", Y)])
def test_iqm_and_mean_agree_with_rliable(name, scores):
    point, (low, high) = map(np.array, RLIABLE["iqm, mean"][name])
    for i, statistic in enumerate((intervals.iqm, intervals.mean)):
        assert statistic(scores) == pytest.approx(point[i], abs=1e-12)
        found = intervals.interval(statistic, scores, draws=50_000)
        # The quantiles of 50,000 draws are known to about a hundredth of the interval.
        assert found == pytest.approx((low[i], high[i]), abs=0.03 * (high[i] - low[i]))


@pytest.mark.parametrize(("name", "scores"), [("x", X), ("y", Y)])
def test_the_profile_agrees_with_rliable(name, scores):
    point, band = RLIABLE["profile"][name]
    assert intervals.profile(scores, LEVELS) == pytest.approx(np.array(point), abs=1e-12)
    found = intervals.interval(lambda x: intervals.profile(x, LEVELS), scores)
    step = 1 / scores.size  # shares are whole numbers of seeds: one of them at most beside
    assert np.array(found) == pytest.approx(np.array(band), abs=step + 1e-12)


def test_the_probability_of_improvement_agrees_with_rliable():
    point, (low, high) = RLIABLE["improvement"]
    assert intervals.improvement(X, Y) == pytest.approx(point, abs=1e-12)
    found = intervals.interval(intervals.improvement, X, Y)
    assert found == pytest.approx((low, high), abs=0.05 * (high - low))


def test_the_probability_of_improvement_is_mann_and_whitneys():
    pairs = zip(X.T, Y.T, strict=True)
    each = [stats.mannwhitneyu(x, y).statistic / (len(x) * len(y)) for x, y in pairs]
    assert intervals.improvement(X, Y) == pytest.approx(np.mean(each), abs=1e-12)
    assert intervals.improvement(X, X) == 0.5
    # by hand: 1 beats 0, ties with 1; 2 beats both
    assert intervals.improvement(np.array([[1.0], [2.0]]), np.array([[0.0], [1.0]])) == 3.5 / 4


def test_iqm_by_hand():
    assert intervals.iqm(np.array([[0.0, 1, 2, 3], [4, 5, 6, 700]])) == 3.5


def test_the_profile_counts_what_is_above():
    assert intervals.profile(np.array([[1.0, 2.0]]), np.array([0, 1, 1.5, 2])).tolist() == [
        *(1, 0.5, 0.5, 0)
    ]


def test_draws_stay_within_their_data_set():
    scores = np.array([[0.0, 10, 20], [1, 11, 21], [2, 12, 22]])
    drawn = intervals.resample(scores, 500, np.random.default_rng(0))
    assert drawn.shape == (500, 3, 3)
    for t in range(3):
        assert {*np.unique(drawn[..., t])} == {*scores[:, t]}
    same = [np.corrcoef(drawn[:, 0, 0], drawn[:, 0, 1])[0, 1], np.std(drawn[:, 0] - drawn[:, 1])]
    assert abs(same[0]) < 0.15 and same[1] > 0  # seeds of two data sets are drawn apart


def test_one_seed_has_no_interval():
    with pytest.raises(ValueError, match="two seeds"):
        intervals.interval(intervals.mean, np.array([[1.0, 2.0]]))


def test_chunks_of_draws_cover_what_one_chunk_does(monkeypatch):
    whole = intervals.interval(intervals.mean, X, draws=20_000)
    monkeypatch.setattr(intervals, "AT_ONCE", 700)
    parts = intervals.interval(intervals.mean, X, draws=20_000)
    assert parts == pytest.approx(whole, abs=0.1)

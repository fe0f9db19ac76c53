# SPDX-License-Identifier: Apache-2.0
"""Ratios of occupancies that the DICE methods learn, against the exact ones of a small corridor."""

import helpers_runs as runs
import numpy as np
import pytest

import occupancy


@pytest.fixture(scope="module")
def world():
    return occupancy.corridor()


def flow_error(world, ratio, starts):
    """How far w d is from an occupancy: what flows into each cell must be what leaves it."""
    share = ratio * world.occupancy
    into = (1 - occupancy.DISCOUNT) * starts
    for direction in (0, 1):
        after = occupancy.move(np.arange(occupancy.CELLS), direction)
        np.add.at(into, after, occupancy.DISCOUNT * share[:, direction])
    return np.abs(share.sum(axis=1) - into).max()


def gain(world, ratio, alpha):
    """The return of an occupancy (times 1 - gamma) minus alpha times its divergence."""
    earned = occupancy.reward(np.arange(occupancy.CELLS))[:, None]
    return (world.occupancy * (ratio * earned - alpha * (ratio - 1) ** 2 / 2)).sum()


def test_the_exact_ratio_is_that_of_the_best_policy(world):
    """It is an occupancy, that of the policy it chooses, and no other policy tried gains more."""
    alpha = occupancy.ALPHA
    exact = occupancy.best_ratio(world, world.starts, alpha)
    assert flow_error(world, exact, world.starts) < 1e-9
    share = exact * world.occupancy
    right = share[:, 1] / share.sum(axis=1)
    np.testing.assert_allclose(occupancy.policy_ratio(world, right), exact, atol=1e-6)
    best, rng = gain(world, exact, alpha), np.random.default_rng(0)
    others = [*rng.random((300, occupancy.CELLS)), np.zeros(occupancy.CELLS)]
    others += [np.clip(right + x, 0, 1) for x in 0.05 * rng.standard_normal((50, occupancy.CELLS))]
    for other in others:
        ratio = occupancy.policy_ratio(world, other)
        assert flow_error(world, ratio, world.starts) < 1e-9
        assert gain(world, ratio, alpha) < best


@pytest.mark.parametrize(
    ("title", "limit"),
    [
        ("OptiDICE", 0.12),
        pytest.param("ODICE, true gradient", 0.12, marks=runs.SLOW),
        pytest.param("AlgaeDICE", 0.4, marks=runs.SLOW),
        pytest.param("Diffusion-DICE", 0.12, marks=runs.SLOW),
    ],
)
def test_learned_ratios_are_near_the_exact_ones(world, title, limit):
    """Mean absolute errors over the data; a ratio of 1 everywhere, the data's own, is far off."""
    exact, learned = occupancy.METHODS[title](world, 3000)
    found = occupancy.error(world, exact, learned)
    unchanged = occupancy.error(world, exact, np.ones_like(exact))
    assert found < limit and found < unchanged / 3, (found, unchanged)
    np.testing.assert_allclose((world.occupancy * learned).sum(), 1, atol=0.25)

# SPDX-License-Identifier: Apache-2.0
"""Every algorithm file on data sets whose answer is known in closed form. See probes.py."""

import importlib

import numpy as np
import probes
import pytest

SHARED = {"discount": 0.9, "target_rate": 0.05}
FREE = {  # no pull towards the data
    "rebrac": {"actor_penalty": 0.0, "critic_penalty": 0.0},
}
TIED = {  # a strong one
    "rebrac": {"actor_penalty": 10.0, "critic_penalty": 1.0, "target_noise": 0.0},
}


@pytest.fixture(params=FREE)
def free(request):
    """(module, function from a data set to the trained state)"""
    module = importlib.import_module(f"algorithms.{request.param}")
    settings = SHARED | FREE[request.param]
    return module, lambda data: probes.train(module, data, 3000, **settings)


def values(state, observation):
    """Q of five actions over the whole range."""
    return [probes.q(state, observation, action) for action in (-0.9, -0.5, 0.0, 0.5, 0.9)]


def test_terminal_reward(free):
    _, train = free
    np.testing.assert_allclose(values(train(probes.terminal_reward()), 1), 1, atol=0.02)


@pytest.mark.parametrize("data", [probes.endless_reward, probes.cut_reward])
def test_endless_reward_also_through_truncations(free, data):
    _, train = free
    np.testing.assert_allclose(values(train(data()), 1), 1 / (1 - 0.9), rtol=0.02)


def test_two_steps(free):
    _, train = free
    state = train(probes.two_steps())
    np.testing.assert_allclose(values(state, 1), 0.9, atol=0.02)
    np.testing.assert_allclose(values(state, -1), 1, atol=0.02)


def test_best_action(free):
    module, train = free
    state = train(probes.best_action())
    np.testing.assert_allclose(probes.act(module, state, 1), [0.5], atol=0.05)
    expected = [1 - (action - 0.5) ** 2 for action in (-0.9, -0.5, 0.0, 0.5, 0.9)]
    np.testing.assert_allclose(values(state, 1), expected, atol=0.05)


def test_best_action_by_state(free):
    module, train = free
    state = train(probes.best_action_by_state())
    np.testing.assert_allclose(probes.act(module, state, 1), [0.5], atol=0.05)
    np.testing.assert_allclose(probes.act(module, state, -1), [-0.5], atol=0.05)


# --- Closed forms with the method's own coefficients --------------------------------------------
def test_rebrac_support():
    """beta_1 (pi + 0.5)^2 - Q(pi) / |Q(pi)| with Q = -(pi - 0.5)^2 and beta_1 = 10.

    20 (pi + 0.5) = 2 (0.5 - pi) / (0.5 - pi)^2, so 0.25 - pi^2 = 0.1.
    """
    from algorithms import rebrac

    state = probes.train(rebrac, probes.support(), 3000, **SHARED, **TIED["rebrac"])
    np.testing.assert_allclose(probes.act(rebrac, state, 1), [-(0.15**0.5)], atol=0.04)


def test_rebrac_critic_penalty():
    """pi stays at the mean of the data's actions, 0, always 0.5 away from the next actions.

    Q = 1 + 0.9 (Q - beta_2 0.5^2) with beta_2 = 1.
    """
    from algorithms import rebrac

    data = probes.endless_reward()
    data = data._replace(next_action=np.float32(0.5) * np.sign(data.next_action))
    state = probes.train(rebrac, data, 3000, **SHARED, **TIED["rebrac"])
    np.testing.assert_allclose(probes.act(rebrac, state, 1), [0], atol=0.06)
    np.testing.assert_allclose(values(state, 1), (1 - 0.9 * 0.25) / (1 - 0.9), rtol=0.02)

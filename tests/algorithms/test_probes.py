# SPDX-License-Identifier: Apache-2.0
"""Every algorithm file on data sets whose answer is known in closed form. See probes.py."""

import importlib
import os

import helpers_runs as runs
import numpy as np
import probes
import pytest

SHARED = {"discount": 0.9, "target_rate": 0.05}
FREE = {  # no pull towards the data, or as little as the method can have
    "atac": {"beta": 1e3, "warm_start": 500},
    "awac": {"inverse_temperature": 100.0},
    "awr": {"inverse_temperature": 6.0, "max_weight": 1e3, "fixed_std": None},
    "bcq": {"kl_weight": 0.01, "perturbation": 1.0},
    "brac": {"variant": "p", "alpha": 0.0, "alpha_training": "none"},
    "cal_ql": {"alpha": 0.0},
    "cql": {"alpha": 0.0},
    "diffusion_dice": {"alpha": 0.05},
    "diffusion_ql": {"eta": 10.0, "generator_steps": 5},
    "edac": {"temperature_learning_rate": 1e-2},
    "fql": {"alpha": 0.01},
    "gfp": {"alpha": 0.01, "normalize_q": False},
    "idql": {"expectile": 0.5},
    "iql": {"inverse_temperature": 10.0},
    "ivr": {"sql_alpha": 0.01},
    "lb_sac": {"temperature_learning_rate": 1e-2},
    "odice": {"gradient": "semi", "lam": 0.5, "alpha": 0.01},
    "qc": {"horizon": 1},
    "rebrac": {"actor_penalty": 0.0, "critic_penalty": 0.0},
    "rlpd": {"temperature_learning_rate": 1e-2, "backup_entropy": False},
    "sac": {"temperature_learning_rate": 1e-2},  # to 0: the values have no entropy in them
    "sac_n": {"temperature_learning_rate": 1e-2},
    "spot": {"density_weight": 0.0},
    "td3_bc": {"alpha": 1e4},
    "wsrl": {"alpha": 0.0},
    "xql": {"beta": 0.5, "inverse_temperature": 10.0},
}
TIED = {  # a strong one
    "rebrac": {"actor_penalty": 10.0, "critic_penalty": 1.0, "target_noise": 0.0},
    "td3_bc": {"alpha": 0.16},
}


# The others run with ATOLL_SLOW=1: these parts of their updates are those of a parent, or they take
# half a minute each.
SLOWER = (
    "bcq",
    "brac",
    "cal_ql",
    "combo",
    "diffusion_dice",
    "diffusion_ql",
    "edac",
    "gfp",
    "idql",
    "lb_sac",
    "mobile",
    "morel",
    "rlpd",
    "sac_n",
    "spot",
    "wsrl",
)
QUICK_ONES = [name for name in FREE if name not in SLOWER]


# Of a module, so that a file's tests follow each other.
@pytest.fixture(scope="module", params=runs.slow_but(FREE, QUICK_ONES))
def free(request):
    """(module, function from a data set to the trained state)"""
    module = importlib.import_module(f"algorithms.{request.param}")
    settings = SHARED | FREE[request.param]
    return module, lambda data: probes.train(module, data, 3000, **settings)


def act(module, state, observation):
    settings = FREE[module.__name__.split(".")[-1]] | {"num_samples": 256}  # to choose from
    return probes.act(module, state, observation, **settings)


def values(state, observation):
    """Q of five actions over the whole range, or V where there is no Q."""
    if "critic" not in state._fields:
        return probes.value(state, observation)
    return [probes.q(state, observation, action) for action in (-0.9, -0.5, 0.0, 0.5, 0.9)]


@runs.SLOW  # the second step of test_two_steps
def test_terminal_reward(free):
    _, train = free
    np.testing.assert_allclose(values(train(probes.terminal_reward()), 1), 1, atol=0.02)


ENDLESS = ("cql", "iql", "odice", "qc", "rebrac", "sac")  # one of each kind of target


@pytest.mark.parametrize(
    "data", [pytest.param(probes.endless_reward, marks=runs.SLOW), probes.cut_reward]
)
def test_endless_reward_also_through_truncations(free, data):
    module, train = free
    if module.__name__.split(".")[-1] not in ENDLESS and "ATOLL_SLOW" not in os.environ:
        pytest.skip("minutes: ATOLL_SLOW=1 runs it")
    np.testing.assert_allclose(values(train(data()), 1), 1 / (1 - 0.9), rtol=0.02)


def test_two_steps(free):
    _, train = free
    state = train(probes.two_steps())
    np.testing.assert_allclose(values(state, 1), 0.9, atol=0.02)
    np.testing.assert_allclose(values(state, -1), 1, atol=0.02)


@runs.SLOW  # one of both states of test_best_action_by_state
def test_best_action(free):
    module, train = free
    state = train(probes.best_action())
    np.testing.assert_allclose(act(module, state, 1), [0.5], atol=0.05)
    if "critic" in state._fields:
        expected = [1 - (action - 0.5) ** 2 for action in (-0.9, -0.5, 0.0, 0.5, 0.9)]
        np.testing.assert_allclose(values(state, 1), expected, atol=0.05)


def test_best_action_by_state(free):
    module, train = free
    state = train(probes.best_action_by_state())
    np.testing.assert_allclose(act(module, state, 1), [0.5], atol=0.05)
    np.testing.assert_allclose(act(module, state, -1), [-0.5], atol=0.05)


# --- Closed forms with the method's own coefficients --------------------------------------------
def test_rebrac_support():
    """beta_1 (pi + 0.5)^2 - Q(pi) / |Q(pi)| with Q = -(pi - 0.5)^2 and beta_1 = 10.

    20 (pi + 0.5) = 2 (0.5 - pi) / (0.5 - pi)^2, so 0.25 - pi^2 = 0.1.
    """
    from algorithms import rebrac

    state = probes.train(rebrac, probes.support(), 3000, **SHARED, **TIED["rebrac"])
    np.testing.assert_allclose(probes.act(rebrac, state, 1), [-(0.15**0.5)], atol=0.04)


def test_td3_bc_support():
    """(pi + 0.5)^2 - alpha Q(pi) / |Q(pi)| with Q = -(pi - 0.5)^2 and alpha = 0.16.

    2 (pi + 0.5) = 0.16 * 2 / (0.5 - pi), so 0.25 - pi^2 = 0.16.
    """
    from algorithms import td3_bc

    state = probes.train(td3_bc, probes.support(), 3000, **SHARED, **TIED["td3_bc"])
    np.testing.assert_allclose(probes.act(td3_bc, state, 1), [-0.3], atol=0.08)


def test_iql_value_is_the_expectile_of_q():
    """Rewards a uniform in [-1, 1], then the end: tau E[(a - V)+] = (1 - tau) E[(V - a)+].

    tau (1 - V)^2 = (1 - tau) (1 + V)^2, so V = (1 - x) / (1 + x) with x = sqrt((1 - tau) / tau).
    """
    from algorithms import iql

    data = probes.best_action()
    data = data._replace(reward=data.action[:, 0])
    state = probes.train(iql, data, 3000, **SHARED, expectile=0.9)
    np.testing.assert_allclose(probes.value(state, 1), 0.5, atol=0.05)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"inverse_temperature": 3.0}, 1 / np.tanh(3) - 1 / 3),
        ({"extraction": "ddpg_bc", "alpha": 4.0, "fixed_std": 1.0}, 0.5),
    ],
    ids=["awr", "ddpg_bc"],
)
def test_iql_extraction(settings, expected):
    """Actions a uniform in [-1, 1] with rewards a, then the end, so Q = a.

    awr: the mean of a under the weight exp(3 a).
    ddpg_bc: alpha mu = 1 / |mu| where the slopes of alpha log pi(a|s) and Q(mu) / |Q(mu)| meet.
    """
    from algorithms import iql

    data = probes.best_action()
    data = data._replace(reward=data.action[:, 0])
    state = probes.train(iql, data, 3000, **SHARED, **settings)
    np.testing.assert_allclose(probes.act(iql, state, 1), [expected], atol=0.06)


@pytest.mark.parametrize(
    ("settings", "value", "action"),
    [
        ({"variant": "sql", "sql_alpha": 0.125}, 0.25, 0.75),
        (
            {"variant": "eql", "eql_alpha": 1.0, "inverse_temperature": 3.0},
            np.log(np.sinh(1)),
            1 / np.tanh(3) - 1 / 3,
        ),
    ],
    ids=["sql", "eql"],
)
def test_ivr_value_and_extraction(settings, value, action):
    """Actions a uniform in [-1, 1] with rewards a, then the end, so Q = a.

    sql: E[(2 alpha + a - V)+] = 2 alpha, so (1 - V + 2 alpha)^2 = 8 alpha; the weight (a - V)+.
    eql: V = alpha log E[exp(a / alpha)]; the weight exp(3 a / alpha).
    """
    from algorithms import ivr

    data = probes.best_action()
    data = data._replace(reward=data.action[:, 0])
    state = probes.train(ivr, data, 3000, **SHARED, **settings)
    np.testing.assert_allclose(probes.value(state, 1), value, atol=0.05)
    np.testing.assert_allclose(probes.act(ivr, state, 1), [action], atol=0.06)


def test_xql_value_and_extraction():
    """The same Q = a: V = beta log E[exp(a / beta)], the weight exp(3 a)."""
    from algorithms import xql

    data = probes.best_action()
    data = data._replace(reward=data.action[:, 0])
    state = probes.train(xql, data, 3000, **SHARED, beta=1.0, inverse_temperature=3.0)
    np.testing.assert_allclose(probes.value(state, 1), np.log(np.sinh(1)), atol=0.05)
    np.testing.assert_allclose(probes.act(xql, state, 1), [1 / np.tanh(3) - 1 / 3], atol=0.06)


@pytest.mark.parametrize("discrete", [False, True])
def test_bc_is_the_mean_or_the_mode(discrete):
    from algorithms import bc

    data = probes.best_action_by_state()
    if not discrete:
        data = data._replace(action=0.3 * data.observation + 0.2 * data.action)
        state = probes.train(bc, data, 3000)
        for observation in (-1, 1):
            near = data.observation[:, 0] == observation
            mean = data.action[near].mean()
            np.testing.assert_allclose(probes.act(bc, state, observation), [mean], atol=0.04)
        return
    mode = np.where(data.observation[:, 0] > 0, 2, 1)
    action = np.where(np.random.default_rng(0).random(len(mode)) < 0.6, mode, 0).astype(np.int32)
    state = probes.train(bc, data._replace(action=action, next_action=action), 3000)
    params, observation = bc.policy_params(state), np.float32([[1], [-1]])
    chosen = bc.policy(state.actor.apply_fn, params, observation, None, discrete=True)
    assert chosen.tolist() == [2, 1]
    logits = state.actor.apply_fn(params[0], observation)
    share = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(share[[0, 1], [2, 1]], 0.6, atol=0.06)


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

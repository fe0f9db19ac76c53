# SPDX-License-Identifier: Apache-2.0
"""Cal-QL: its critic loss, the returns it is calibrated by and its mixed batches against NumPy.

Actor, temperature, multiplier, networks and the order of an update are CQL's: see test_cql.py.
"""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpy_nets as nets
import probes
import pytest
from numpy_nets import directions, dot, double, slope

from algorithms import cal_ql, cql
from common import datasets
from common.experiment import buffers, config

critic_loss = nets.compiled(cal_ql.critic_loss)
setup = functools.partial(nets.setup, cal_ql, critic_hidden=(16, 16), num_samples=4)


# --- The critic loss in NumPy -------------------------------------------------------------------
def numpy_sample(params, observation, noise):
    """Actions [B, M, A] and log pi [B, M] for noise [B, M, A]."""
    mean, log_std = np.split(nets.mlp(params, observation), 2, axis=-1)
    scale, shift = (params["params"][f"log_std_{name}"] for name in ("scale", "shift"))
    mean, log_std = mean[:, None], np.clip(scale * log_std + shift, -20, 2)[:, None]
    x = mean + np.exp(log_std) * noise
    return np.tanh(x), nets.log_normal(x, mean, log_std) + 2 * np.log(np.cosh(x)).sum(axis=-1)


def numpy_critics(params, observation, action):
    """[K, B, M] for actions [B, M, A]."""
    shape = (*action.shape[:2], observation.shape[-1])
    return nets.critics(params, np.broadcast_to(observation[:, None], shape), action)


def draws(key, cfg, size=32, dim=2):
    """What the loss draws: uniform actions [B, N, A], noise at s and s' [2B, ..., A]."""
    key_uniform, key_noise = jax.random.split(jax.random.clone(key))
    count = cfg.num_samples * 2 if cfg.max_target_backup else cfg.num_samples + 1
    uniform = jax.random.uniform(key_uniform, (size, cfg.num_samples, dim), minval=-1, maxval=1)
    return double((uniform, jax.random.normal(key_noise, (2 * size, count, dim))))


def numpy_critic_loss(params, state, batch, drawn, cfg):
    """-> loss, TD error, gap, share of the policy's values that are below the return"""
    uniform, noise = drawn
    size, dim = batch.action.shape
    n = cfg.num_samples
    actor = double(state.actor.params)
    here, log_here = numpy_sample(actor, batch.observation, noise[:size])
    there, log_there = numpy_sample(actor, batch.next_observation, noise[size:])
    target_params = double(state.critic.target_params)
    next_q = numpy_critics(target_params, batch.next_observation, there[:, n:])
    q, q_uniform, q_here, q_there = (
        numpy_critics(params, batch.observation, action)
        for action in (batch.action[:, None], uniform, here[:, :n], there[:, :n])
    )
    td_error, gap, below = 0.0, 0.0, 0
    for k in range(len(q)):
        for i in range(size):
            target = batch.reward[i]
            if not batch.termination[i]:
                target += cfg.discount * max(min(column) for column in next_q[:, i].T)
            td_error += (q[k, i, 0] - target) ** 2 / size
            terms = [] if cfg.importance_sampling else [np.exp(q[k, i, 0])]
            for j in range(n):
                weights = 0.5**dim, np.exp(log_here[i, j]), np.exp(log_there[i, j])
                if not cfg.importance_sampling:
                    weights = 1.0, 1.0, 1.0
                terms.append(np.exp(q_uniform[k, i, j]) / weights[0])  # not calibrated
                for value, weight in ((q_here, weights[1]), (q_there, weights[2])):
                    known = batch.returns_to_go[i]
                    below += value[k, i, j] < known
                    terms.append(np.exp(max(value[k, i, j], known)) / weight)
            gap += (np.log(sum(terms)) - q[k, i, 0]) / size
    multiplier = 1.0
    if cfg.target_action_gap is not None:
        multiplier = min(np.exp(double(state.log_multiplier.params["log"])), 1e6)
    loss = td_error + multiplier * cfg.alpha * gap
    return loss, td_error, gap / len(q), below / (2 * n * size * len(q))


VARIANTS = [
    {"max_target_backup": False},
    {"importance_sampling": False, "discount": 0.7, "num_samples": 1},
    {"target_action_gap": 0.8, "max_target_backup": True, "num_critics": 3},
]


@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_critic_loss_equals_numpy(overrides):
    """Its gradient, too: where the return is larger, a sampled value has none."""
    cfg, state, key, data = setup(**overrides)
    data = data._replace(returns_to_go=jnp.linspace(-1.5, 1.5, 32).at[3].set(-jnp.inf))
    batch, params, drawn = double(data), double(state.critic.params), draws(key, cfg)
    loss, metrics, grads = critic_loss(state.critic.params, state, data, key, cfg)
    expected, td_error, gap, below = numpy_critic_loss(params, state, batch, drawn, cfg)
    np.testing.assert_allclose([loss, metrics["critic_loss"]], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["td_error"], td_error, rtol=1e-4)
    np.testing.assert_allclose(metrics["conservative_gap"], gap, rtol=1e-4)
    np.testing.assert_allclose(metrics["bound_rate"], below, atol=1e-6)
    assert 0.2 < below < 0.8
    for direction in directions(params, 2):
        expected = slope(
            lambda p: numpy_critic_loss(p, state, batch, drawn, cfg)[0], params, direction
        )
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=2e-3)


def test_a_row_without_a_return_is_as_in_cql():
    cfg, state, key, data = setup()
    data = data._replace(returns_to_go=jnp.full(32, -jnp.inf))
    loss, metrics, grads = critic_loss(state.critic.params, state, data, key, cfg)
    known = {field.name for field in dataclasses.fields(cql.Config)}
    plain = cql.Config(**{name: x for name, x in vars(cfg).items() if name in known})
    compiled = nets.compiled(cql.critic_loss)
    expected, _, expected_grads = compiled(state.critic.params, state, data, key, plain)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    nets.check_close(grads, expected_grads, 1e-5, 1e-6)
    assert metrics["bound_rate"] == 0


def test_termination_stops_the_bootstrap():
    cfg, state, key, data = setup()

    def td_error(**columns):
        rows = {name: jnp.full_like(getattr(data, name), x) for name, x in columns.items()}
        args = state.critic.params, state, data._replace(**rows), key, cfg
        return critic_loss(*args)[1]["td_error"]

    for termination in (0, 1):
        here = td_error(termination=termination)
        moved = td_error(termination=termination, next_observation=0.5)
        assert (here == moved) == (termination == 1)
    assert td_error() == td_error(returns_to_go=3.0)  # the TD error is not calibrated


# --- Returns ------------------------------------------------------------------------------------
def numpy_returns(reward, termination, truncation, cfg):
    """By the sums themselves, for one seed's rows; -inf where no end follows."""
    found = []
    for start in range(len(reward)):
        total, weight = 0.0, 1.0
        for t in range(start, len(reward)):
            total += weight * reward[t]
            weight *= cfg.discount
            if termination[t]:
                break
            if truncation[t]:
                if cfg.last_reward_goes_on:
                    total += sum(weight * reward[t] * cfg.discount**n for n in range(20_000))
                break
        else:
            total = -np.inf
        found.append(total)
    return found


@pytest.mark.parametrize("goes_on", [True, False])
def test_returns_of_a_data_set(goes_on):
    """They end at terminations, also inside an episode, and a truncated reward goes on for ever."""
    rows = probes.random_transitions(12, 3, 1, termination=0, truncation=0)
    rows.termination[[2, 5]] = 1  # row 5 is a goal after which the recording goes on
    rows.truncation[[8, 11]] = 1
    cfg = cal_ql.Config(discount=0.9, last_reward_goes_on=goes_on)
    dataset = datasets.Dataset("toy", rows, np.array([3, 9, 12]), None)
    found = cal_ql.with_returns(dataset, cfg)
    expected = numpy_returns(rows.reward.astype(float), rows.termination, rows.truncation, cfg)
    np.testing.assert_allclose(found.returns_to_go, expected, rtol=1e-5)
    assert found.returns_to_go.dtype == np.float32
    for name in ("observation", "action", "reward", "next_observation", "termination"):
        assert np.array_equal(getattr(found, name), getattr(rows, name))


def test_a_failed_antmaze_episode_returns_as_if_it_never_ended():
    """As in the authors' code: r / (1 - gamma) = -500 for rewards 10 * 0 - 5, from every row on."""
    rows = probes.random_transitions(10, 3, 1, reward=-5, termination=0, truncation=0)
    rows.truncation[6] = 1
    rows.reward[9], rows.termination[9] = 5, 1
    dataset = datasets.Dataset("toy", rows, np.array([7, 10]), None)
    cfg = cal_ql.Config(last_reward_goes_on=True)
    found = cal_ql.with_returns(dataset, cfg).returns_to_go
    np.testing.assert_allclose(found[:7], -500, rtol=1e-5)
    np.testing.assert_allclose(found[7:], [-5 - 4.95 + 0.9801 * 5, -5 + 4.95, 5], rtol=1e-4)


def test_rows_of_the_env_get_their_returns_when_their_episode_is_over():
    """And then the same ones, whatever rows before them are given beside them."""
    rows = probes.random_transitions(24, 3, 1, termination=0, truncation=0)
    rows = jax.tree.map(lambda x: x.reshape(12, 2, *x.shape[1:]), rows)
    rows.termination[3, 0] = rows.truncation[8, 0] = 1  # the second seed's first episode goes on
    cfg = cal_ql.Config(
        discount=0.9, reward_scale=10.0, reward_shift=-5.0, last_reward_goes_on=True
    )
    toy = datasets.Dataset("toy", None, None, None)
    statistics = np.array([1.0, -2.0, 0.5]), np.array([2.0, 0.5, 1.0])
    for first in (0, 2, 6):
        given = jax.tree.map(lambda x, first=first: x[first:].copy(), rows)
        found = cal_ql.online_rows(given, toy, statistics, cfg)
        reward = 10.0 * given.reward.astype(float) - 5.0
        for i in (0, 1):
            ends = given.termination[:, i], given.truncation[:, i]
            expected = numpy_returns(reward[:, i], *ends, cfg)
            np.testing.assert_allclose(found.returns_to_go[:, i], expected, rtol=1e-5)
        np.testing.assert_allclose(found.reward, reward, rtol=1e-5, atol=1e-5)
        for name in ("observation", "next_observation"):
            expected = (getattr(given, name) - statistics[0]) / statistics[1]
            np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-5, atol=1e-6)
        for name in ("action", "termination"):
            assert np.array_equal(getattr(found, name), getattr(given, name))
    assert np.isinf(found.returns_to_go[:, 1]).all()


@pytest.mark.parametrize("goes_on", [False, True])
def test_training_sees_scaled_rewards_and_their_returns(goes_on, monkeypatch, tmp_path):
    raw = probes.random_transitions(20, 3, 1, termination=0, truncation=0)
    raw.truncation[[9, 19]] = 1
    overrides = {"reward_scale": 10.0, "reward_shift": -5.0, "critic_hidden": (4,)}
    overrides["last_reward_goes_on"] = goes_on
    _, data = nets.handed_over(cal_ql, monkeypatch, tmp_path, raw, (1, 2), **overrides)
    reward = 10.0 * raw.reward.astype(float) - 5.0
    cfg = probes.config(cal_ql, **overrides)
    np.testing.assert_allclose(data.reward, reward, rtol=1e-5, atol=1e-5)
    expected = numpy_returns(reward, raw.termination, raw.truncation, cfg)
    np.testing.assert_allclose(data.returns_to_go, expected, rtol=1e-4)
    assert np.array_equal(data.observation, raw.observation)  # not normalised, as the authors'


def test_an_endless_sum_needs_a_discount():
    with pytest.raises(SystemExit):
        cal_ql.train(cal_ql.Config(discount=1.0, last_reward_goes_on=True), config.Options())


# --- The online phase ---------------------------------------------------------------------------
def test_a_mixed_batch_and_the_weight_of_the_online_phase(monkeypatch):
    """Online batches have `mixing_ratio` rows of the env, offline ones have none."""
    rows = probes.random_transitions(7, 3, 1, reward=np.arange(7.0))
    new = probes.random_transitions(3, 3, 1, reward=100 + np.arange(3.0))
    toy = datasets.Dataset("toy", rows, np.array([7]), None)
    cfg = cal_ql.Config(batch_size=200, mixing_ratio=0.75, log_every=1, alpha=5.0, online_alpha=2.0)
    data = jax.device_put(cal_ql.with_returns(toy, cfg))
    buffer = buffers.empty(data, 1, 5, apart=True)
    more = cal_ql.online_rows(jax.tree.map(lambda x: x[:, None], new), toy, (0.0, 1.0), cfg)
    seen = []

    def loss(params, state, batch, key, cfg):
        seen.append((batch, cfg))
        raise StopIteration  # the batch is all that is looked at

    monkeypatch.setattr(cal_ql, "critic_loss", loss)
    monkeypatch.setattr(jax.lax, "scan", lambda f, init, xs: f(init, xs[0]))
    state = SimpleNamespace(critic=SimpleNamespace(params=jnp.zeros(1)))
    own = buffers.write(buffer, more, 0).of_seed(0)
    for chunk, rows_of in ((cal_ql.train_chunk, data), (cal_ql.online_chunk, own)):
        with pytest.raises(StopIteration):
            chunk(state, jax.random.key(0), 0, rows_of, cfg)
    (offline, offline_cfg), (online, online_cfg) = seen
    assert (offline_cfg.alpha, online_cfg.alpha) == (5.0, 2.0)
    assert offline.reward.max() < 7 and len(offline.reward) == 200
    reward = np.asarray(online.reward)
    assert (reward[:50] < 7).all() and set(reward[50:].tolist()) == {100, 101, 102}
    returns = np.asarray(online.returns_to_go)
    assert np.array_equal(
        returns[50:], np.asarray(more.returns_to_go[(reward[50:] - 100).astype(int), 0])
    )

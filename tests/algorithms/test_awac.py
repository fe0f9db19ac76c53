# SPDX-License-Identifier: Apache-2.0
"""AWAC's losses, networks and update against NumPy in float64 and hand-worked numbers."""

import functools
import math

import jax
import numpy as np
import numpy_nets as nets
import probes
import pytest
from flax.training import train_state
from numpy_nets import directions, dot, double, slope

from algorithms import awac

critic_loss = nets.compiled(awac.critic_loss)
actor_loss = nets.compiled(awac.actor_loss)
setup = functools.partial(nets.setup, awac)
MILD = {"inverse_temperature": 0.1}  # the random advantages are large: no weight at its cap


# --- The method in NumPy ------------------------------------------------------------------------
def numpy_policy(params, observation):
    mean = np.tanh(nets.mlp(params, observation))
    return mean, np.clip(params["params"]["log_std"], -5, 2)


def numpy_sample(params, observation, noise):
    mean, log_std = numpy_policy(params, observation)
    return np.clip(mean + np.exp(log_std) * noise, -1, 1)


def numpy_critic_loss(params, state, batch, noise, cfg):
    action = numpy_sample(double(state.actor.params), batch.next_observation, noise)
    q = nets.critics(double(state.critic.target_params), batch.next_observation, action)
    predicted, loss = nets.critics(params, batch.observation, batch.action), 0.0
    for i in range(len(batch.reward)):
        target = batch.reward[i]
        if not batch.termination[i]:
            target += cfg.discount * min(q[:, i])
        loss += sum((predicted[k, i] - target) ** 2 for k in range(len(q))) / len(batch.reward)
    return loss, predicted.mean()


def numpy_weight(actor_params, state, batch, noise, cfg):
    critic, count = double(state.critic.params), len(batch.reward)
    action = numpy_sample(actor_params, batch.observation, noise)
    q = nets.critics(critic, batch.observation, batch.action).min(axis=0)
    value = nets.critics(critic, batch.observation, action).min(axis=0)
    weight = [math.exp(x) for x in cfg.inverse_temperature * (q - value)]
    if cfg.weight == "softmax":
        return np.array([count * x / sum(weight) for x in weight])
    return np.array([min(x, 100.0) for x in weight])


def numpy_actor_loss(params, weight, batch):
    log_prob = nets.log_normal(batch.action, *numpy_policy(params, batch.observation))
    return -np.mean(weight * log_prob), log_prob.mean()


def normal(key):
    return np.asarray(jax.random.normal(jax.random.clone(key), (32, 2)), np.float64)


@pytest.mark.parametrize(
    "overrides",
    [
        {},  # weights from 0 to the cap
        MILD | {"discount": 0.7},
        MILD | {"weight": "softmax"},
        MILD | {"num_critics": 3, "hidden": (8, 12, 16)},
    ],
    ids=str,
)
def test_losses_equal_numpy(overrides):
    cfg, state, key, data = setup(**overrides)
    batch, noise = double(data), normal(key)
    loss, metrics, _ = critic_loss(state.critic.params, state, data, key, cfg)
    expected, q = numpy_critic_loss(double(state.critic.params), state, batch, noise, cfg)
    np.testing.assert_allclose([loss, metrics["critic_loss"]], expected, rtol=2e-5)
    np.testing.assert_allclose(metrics["q"], q, rtol=1e-4)

    loss, metrics, _ = actor_loss(state.actor.params, state, data, key, cfg)
    weight = numpy_weight(double(state.actor.params), state, batch, noise, cfg)
    expected, log_prob = numpy_actor_loss(double(state.actor.params), weight, batch)
    np.testing.assert_allclose([loss, metrics["actor_loss"]], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["log_prob"], log_prob, rtol=1e-4)
    np.testing.assert_allclose(metrics["weight"], weight.mean(), rtol=1e-4)
    if not overrides:
        assert weight.min() < 1 and weight.max() == 100


# --- By hand ------------------------------------------------------------------------------------
def linear_state(actor, critic, critic_target=(9, 9)):
    """pi(s) = N(mean * s, std), Q_k(s, a) = critic_k * a; actor is (mean, log std); O = A = 1."""

    def policy(params, observation):
        return params[0] * observation, params[1] + 0 * observation

    def critics(params, observation, action):
        return params[:, None] * action[:, 0][None]

    return awac.State(
        nets.linear_net(train_state.TrainState.create, policy, actor),
        nets.linear_net(awac.TrainState.create, critics, critic, critic_target),
        statistics=(),
    )


def rows(**columns):
    columns = {name: np.array(x)[:, None] for name, x in columns.items()}
    rest = {name: columns.pop(name)[:, 0] for name in ("reward", "termination") if name in columns}
    return probes.random_transitions(3, 1, 1, **columns, **rest)


def test_critic_loss_by_hand():
    state = linear_state((0.5, -50), (1, -1), (2, 4))  # no noise to speak of
    batch = rows(
        observation=[7, 7, 7],
        action=[1, -1, 0.5],
        reward=[1, 0, 2],
        next_observation=[4, -1, 3],
        next_action=[0.3, 0.3, 0.3],
        termination=[0, 0, 1],
    )
    # row                    1        2        3
    # a' = s' / 2, clipped   1       -0.5      not used: the end
    # target Q              2, 4    -1, -2
    # their minimum          2       -2
    # target (discount 0.5)  2       -1        2
    # Q_1                    1       -1        0.5
    # Q_2                   -1        1       -0.5
    # (Q_1 - target)^2       1        0        2.25      sum 3.25
    # (Q_2 - target)^2       9        4        6.25      sum 19.25
    cfg = awac.Config(discount=0.5)
    loss, metrics, _ = critic_loss(state.critic.params, state, batch, jax.random.key(0), cfg)
    np.testing.assert_allclose(loss, (3.25 + 19.25) / 3, rtol=1e-6)
    assert metrics["q"] == 0


@pytest.mark.parametrize(("weight", "scale"), [("exp", 1), ("softmax", 3 / 3.5)])
def test_actor_loss_by_hand(weight, scale):
    state = linear_state((0.5, -50), (1, 2))
    batch = rows(observation=[0, -1, 1], action=[1, -1, 0.5])
    # row                    1        2        3
    # min Q(s, a)            1       -2        0.5
    # a~ = s / 2             0       -0.5      0.5
    # min Q(s, a~)           0       -1        0.5
    # A                      1       -1        0
    # 2^A                    2        0.5      1         sum 3.5
    # a - s                  1        0       -0.5
    # -log N(a; s, 1)     0.5 + c     c      0.125 + c
    cfg = awac.Config(inverse_temperature=math.log(2), weight=weight)
    params, c = np.float32([1, 0]), 0.5 * math.log(2 * math.pi)
    loss, metrics, _ = actor_loss(params, state, batch, jax.random.key(0), cfg)
    np.testing.assert_allclose(loss, scale * (1 + 0.125 + 3.5 * c) / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["weight"], scale * 3.5 / 3, rtol=1e-6)


def test_weights_are_100_at_most_but_softmax_has_no_cap():
    state, batch = linear_state((0, -50), (1, 1)), rows(action=[1, 0.4, -1])
    key, weights = jax.random.key(0), np.exp([10, 4, -10])  # e^10 is 22 026
    for name, expected in (("exp", [100, *weights[1:]]), ("softmax", 3 * weights / weights.sum())):
        cfg = awac.Config(inverse_temperature=10.0, weight=name)
        params = np.float32([0, 0])
        loss, metrics, _ = actor_loss(params, state, batch, key, cfg)
        np.testing.assert_allclose(metrics["weight"], np.mean(expected), rtol=1e-5)
        costs = np.array([0.5, 0.08, 0.5]) + 0.5 * math.log(2 * math.pi)
        np.testing.assert_allclose(loss, np.mean(expected * costs), rtol=1e-5)


# --- What the losses may depend on --------------------------------------------------------------
def test_termination_stops_the_bootstrap_and_truncation_does_not():
    """Nor does the recorded next action matter: a' is the policy's, at the next observation."""
    cfg, state, key, data = setup()
    nets.check_bootstrap(lambda b: critic_loss(state.critic.params, state, b, key, cfg)[0], data)


def test_the_actor_reads_observation_and_action_only():
    cfg, state, key, data = setup(**MILD)
    here = actor_loss(state.actor.params, state, data, key, cfg)[0]
    for column in data._fields:
        rolled = data._replace(**{column: np.roll(getattr(data, column), 1, axis=0)})
        loss = actor_loss(state.actor.params, state, rolled, key, cfg)[0]
        assert (loss != here) == (column in ("observation", "action")), column


READS = {  # loss -> what it reads of the state
    "critic": {"actor.params", "critic.target_params"},
    "actor": {"actor.params", "critic.params"},
}


@pytest.mark.parametrize("name", READS)
def test_losses_read_only_the_networks_they_should(name):
    cfg, state, key, data = setup(**MILD)
    other = nets.shaken(state, seed=4)
    loss = {"critic": critic_loss, "actor": actor_loss}[name]
    params, others = getattr(state, name).params, getattr(other, name).params
    here, _, _ = loss(params, state, data, key, cfg)
    assert loss(others, state, data, key, cfg)[0] != here
    found = set()
    for net in ("actor", "critic"):
        for kind in ("params", "target_params"):
            if hasattr(getattr(state, net), kind):
                changed = getattr(state, net).replace(**{kind: getattr(getattr(other, net), kind)})
                if loss(params, state._replace(**{net: changed}), data, key, cfg)[0] != here:
                    found.add(f"{net}.{kind}")
    assert found == READS[name]
    changed = state._replace(statistics=other.statistics)  # the data is normalised already
    assert loss(params, changed, data, key, cfg)[0] == here


def test_both_losses_sample():
    cfg, state, _, data = setup(**MILD)
    for loss, net in ((critic_loss, state.critic), (actor_loss, state.actor)):
        one, other = (loss(net.params, state, data, jax.random.key(i), cfg)[0] for i in (0, 1))
        assert one != other


def test_the_target_is_a_constant_to_the_critics_gradient():
    cfg, state, key, data = setup()
    batch, params, noise = double(data), double(state.critic.params), normal(key)
    _, _, grads = critic_loss(state.critic.params, state, data, key, cfg)
    for direction in directions(params):
        expected = slope(
            lambda p: numpy_critic_loss(p, state, batch, noise, cfg)[0], params, direction
        )
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=1e-3)


@pytest.mark.parametrize(("name", "beta"), [("exp", 0.1), ("softmax", 1.0)])
def test_the_weights_are_constants_to_the_actors_gradient(name, beta):
    cfg, state, key, data = setup(weight=name, inverse_temperature=beta)
    batch, params, noise = double(data), double(state.actor.params), normal(key)
    _, _, grads = actor_loss(state.actor.params, state, data, key, cfg)
    weight = numpy_weight(params, state, batch, noise, cfg)
    distinct = []
    for direction in directions(params):
        constant = slope(lambda p: numpy_actor_loss(p, weight, batch)[0], params, direction)
        moving = slope(
            lambda p: numpy_actor_loss(p, numpy_weight(p, state, batch, noise, cfg), batch)[0],
            params,
            direction,
        )
        np.testing.assert_allclose(dot(grads, direction), constant, rtol=2e-3, atol=1e-4)
        distinct.append(abs(moving - constant) > 0.02 * abs(constant))
    assert any(distinct)  # else this test could not tell


def test_samples_are_clipped_but_not_squashed():
    key = jax.random.key(1)
    observation = np.float32([[2.0], [0.5], [-2.0]] * 100)
    actor = linear_state((1, math.log(0.3)), (1, 1)).actor
    action = np.asarray(jax.jit(awac.sample_action)(actor, observation, key))
    noise = np.asarray(jax.random.normal(jax.random.clone(key), (300, 1)), np.float64)
    np.testing.assert_allclose(action, np.clip(observation + 0.3 * noise, -1, 1), rtol=1e-5)
    assert action.max() == 1 and action.min() == -1


# --- Networks -----------------------------------------------------------------------------------
def test_the_mean_is_squashed_and_log_std_clipped():
    _, state, _, data = setup()
    params = jax.tree.map(lambda x: 20 * x, state.actor.params)
    for log_std, clipped in (([-7, 3], [-5, 2]), ([-4.5, 1.5], [-4.5, 1.5])):
        params["params"]["log_std"] = np.float32(log_std)
        mean, found = state.actor.apply_fn(params, data.observation)
        assert np.abs(mean).max() <= 1 and np.abs(mean).max() > 0.999
        assert (np.asarray(found) == clipped).all()


@functools.cache
def fresh():
    return nets.fresh(awac, statistics=(np.arange(16.0), np.arange(1.0, 17.0)))


def test_initial_parameters():
    state = fresh()
    nets.check_orthogonal_init(state.critic.params, (16 + 2, 64, 96, 1))
    layers = dict(state.actor.params["params"])
    assert layers.pop("log_std").tolist() == [0, 0]
    nets.check_orthogonal_init({"params": layers}, (16, 64, 96, 2))
    nets.check_members_differ(state.critic)


def test_the_critics_alone_have_targets_and_they_start_as_copies():
    nets.check_targets_are_copies(fresh().critic)
    assert not hasattr(fresh().actor, "target_params")


# --- Observations -------------------------------------------------------------------------------
def test_normalise():
    nets.check_normalise(awac)


def test_the_policy_is_the_mean_at_the_normalised_observation():
    mean, std = fresh().statistics
    assert mean.tolist() == [*range(16)] and std.tolist() == [*range(1, 17)]
    nets.check_policy_normalises(awac, lambda params, x: numpy_policy(params, x)[0])


def test_training_sees_normalised_observations_and_shifted_rewards(monkeypatch, tmp_path):
    raw = probes.random_transitions(20, observation=5 + np.arange(60).reshape(20, 3))
    state, data = nets.handed_over(
        awac, monkeypatch, tmp_path, raw, (1, 2), reward_shift=-1.0, seeds=(0, 1)
    )
    expected, (mean, std) = awac.normalise(raw)
    nets.check_close(data, expected._replace(reward=raw.reward - 1), atol=1e-6)
    for found, statistic in zip(state.statistics, (mean, std), strict=True):
        nets.check_close(found, np.stack([statistic] * 2), atol=1e-6)  # one per seed


# --- Update -------------------------------------------------------------------------------------
def test_order_of_two_updates():
    """The critic, the actor with the new critic, targets; each loss with a key of its own."""
    rates = {"actor_learning_rate": 0.02, "critic_learning_rate": 0.05, "target_rate": 0.3}
    cfg, state, key, data = setup(log_every=2, **rates, **MILD)
    cfg_here, here, _, _ = setup(**MILD)  # the same numbers, with the losses compiled already
    adam = {"critic": nets.Adam(0.05), "actor": nets.Adam(0.02)}
    found = {}
    for step in (6, 7):
        batch, *keys = nets.sample(key, step, data, cfg, 3)
        for name, loss, key_loss in zip(adam, (critic_loss, actor_loss), keys, strict=True):
            net = getattr(here, name)
            _, metrics, grads = loss(net.params, here, batch, key_loss, cfg_here)
            here = here._replace(**{name: net.replace(params=adam[name].step(net.params, grads))})
            for metric, x in metrics.items():
                found.setdefault(metric, []).append(x)
        target = nets.polyak(here.critic.params, here.critic.target_params, 0.3)
        here = here._replace(critic=here.critic.replace(target_params=target))

    after, metrics = nets.train_chunk(awac, state, key, 6, data, cfg)
    for name in ("actor", "critic"):
        nets.check_close(getattr(after, name).params, getattr(here, name).params)
    nets.check_close(after.critic.target_params, here.critic.target_params)
    nets.check_close(after.statistics, state.statistics, 0, 0)
    for name, numbers in found.items():
        np.testing.assert_allclose(metrics.pop(name), np.mean(numbers), rtol=1e-3)
    assert not metrics


def test_learning_rates():
    _, state, _, _ = setup(actor_learning_rate=0.02, critic_learning_rate=0.05)
    nets.check_rate(state.actor, lambda step: 0.02)
    nets.check_rate(state.critic, lambda step: 0.05)

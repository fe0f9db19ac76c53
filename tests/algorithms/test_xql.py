# SPDX-License-Identifier: Apache-2.0
"""XQL's losses, networks and update against NumPy in float64 and hand-worked numbers."""

import functools
import math

import jax
import numpy as np
import numpy_nets as nets
import probes
import pytest
from flax.training import train_state
from numpy_nets import directions, dot, double, slope

from algorithms import xql

critic_loss = nets.compiled(xql.critic_loss)
value_loss = nets.compiled(xql.value_loss)
actor_loss = nets.compiled(xql.actor_loss)
setup = functools.partial(nets.setup, xql)
MILD = {"inverse_temperature": 0.1}  # the random advantages are large: no weight at its cap


# --- The method in NumPy ------------------------------------------------------------------------
def numpy_v(params, observation):
    """V, whose LayerNorm is in front of relu."""
    x, layers = observation, params["params"]
    for i in range(2):
        x = nets.layer_norm(layers[f"LayerNorm_{i}"], nets.dense(layers[f"Dense_{i}"], x))
        x = np.maximum(x, 0)
    return nets.dense(layers["Dense_2"], x)[..., 0]


def numpy_huber(x, delta):
    return 0.5 * x**2 if abs(x) <= delta else delta * (abs(x) - 0.5 * delta)


def numpy_critic_loss(params, state, batch, cfg):
    next_value = numpy_v(double(state.value_net.params), batch.next_observation)
    predicted, loss = nets.critics(params, batch.observation, batch.action), 0.0
    for i in range(len(batch.reward)):
        target = batch.reward[i]
        if not batch.termination[i]:
            target += cfg.discount * next_value[i]
        errors = [numpy_huber(q[i] - target, cfg.huber_delta) for q in predicted]
        loss += sum(errors) / len(batch.reward)
    return loss, predicted.mean()


def numpy_rows(batch, key, cfg):
    """What V learns from: observations and actions."""
    observation, action = batch.observation, batch.action
    key_noise, key_random = jax.random.split(jax.random.clone(key))
    if cfg.action_noise is not None:
        noise = cfg.action_noise * double(jax.random.normal(key_noise, action.shape))
        action = np.clip(action + np.clip(noise, -0.5, 0.5), -1, 1)
    if cfg.random_actions is not None:
        shape = (cfg.random_actions * len(action), action.shape[1])
        uniform = double(jax.random.uniform(key_random, shape, minval=-1.0, maxval=1.0))
        action = np.concatenate([action, uniform])
        observation = np.concatenate([observation] * (1 + cfg.random_actions))
    return observation, action


def numpy_value_loss(params, state, rows, cfg, largest=None):
    """`largest`: the maximum of z, a constant for the gradient; None computes it here."""
    q = nets.critics(double(state.critic.target_params), *rows).min(axis=0)
    value = numpy_v(params, rows[0])
    z = np.array([min(x, cfg.max_clip) for x in (q - value) / cfg.beta])
    largest = max(*z, -1.0) if largest is None else largest
    return np.mean(np.exp(z) - z - 1) / np.exp(largest), value, largest


def numpy_policy(params, observation, drop=lambda i, x: x):
    mean = np.tanh(nets.mlp(params, observation, drop))
    return mean, np.clip(params["params"]["log_std"], -5, 2)


def masks(key, cfg):
    """What dropout does to the hidden units of each layer."""

    def drop(i, x):
        if cfg.dropout is None:
            return x
        keep = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - cfg.dropout, x.shape)
        return np.asarray(keep) * x / (1 - cfg.dropout)

    return drop


def numpy_actor_loss(params, state, batch, cfg, drop=lambda i, x: x):
    log_prob = nets.log_normal(batch.action, *numpy_policy(params, batch.observation, drop))
    q = nets.critics(double(state.critic.target_params), batch.observation, batch.action)
    advantage = q.min(axis=0) - numpy_v(double(state.value_net.params), batch.observation)
    weight = np.array([min(math.exp(cfg.inverse_temperature * x), 100.0) for x in advantage])
    return -np.mean(weight * log_prob), log_prob, weight


@pytest.mark.parametrize(
    "overrides", [{"discount": 0.7}, {"num_critics": 3, "huber_delta": 0.5}], ids=str
)
def test_critic_loss_and_gradient_equal_numpy(overrides):
    cfg, state, _, data = setup(**overrides)
    loss, metrics, grads = critic_loss(state.critic.params, state, data, cfg)
    params, batch = double(state.critic.params), double(data)
    expected, q = numpy_critic_loss(params, state, batch, cfg)
    np.testing.assert_allclose([loss, metrics["critic_loss"]], expected, rtol=2e-5)
    np.testing.assert_allclose(metrics["q"], q, rtol=1e-4)
    for direction in directions(params):
        moved = slope(lambda p: numpy_critic_loss(p, state, batch, cfg)[0], params, direction)
        np.testing.assert_allclose(dot(grads, direction), moved, rtol=1e-3)


@pytest.mark.parametrize(
    "overrides",
    [
        {"beta": 2.0},
        {"beta": 0.5, "max_clip": 2.0},  # some rows are clipped
        {"random_actions": 2},
        {"action_noise": 0.4, "random_actions": 1},  # some noise is clipped
    ],
    ids=str,
)
def test_value_loss_and_gradient_equal_numpy(overrides):
    """The gradient takes Q and the maximum as numbers; clipped rows have none."""
    cfg, state, key, data = setup(**overrides)
    params, rows = double(state.value_net.params), numpy_rows(double(data), key, cfg)
    loss, metrics, grads = value_loss(state.value_net.params, state, data, key, cfg)
    expected, value, largest = numpy_value_loss(params, state, rows, cfg)
    np.testing.assert_allclose([loss, metrics["value_loss"]], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["value"], value.mean(), rtol=1e-4)
    assert (largest == cfg.max_clip) == (cfg.max_clip == 2)

    def loss_at_constant_maximum(p):
        return numpy_value_loss(p, state, rows, cfg, largest)[0]

    def loss_at_moving_maximum(p):
        return numpy_value_loss(p, state, rows, cfg, None)[0]

    distinct = []
    for direction in directions(params):
        constant = slope(loss_at_constant_maximum, params, direction)
        moving = slope(loss_at_moving_maximum, params, direction)
        np.testing.assert_allclose(dot(grads, direction), constant, rtol=2e-3, atol=1e-5)
        distinct.append(abs(moving - constant) > 0.02 * abs(constant))
    assert any(distinct) or largest == cfg.max_clip  # else this test could not tell


@pytest.mark.parametrize("overrides", [{}, MILD, MILD | {"dropout": 0.3}], ids=str)
def test_actor_loss_and_gradient_equal_numpy(overrides):
    cfg, state, key, data = setup(**overrides)
    batch, params, drop = double(data), double(state.actor.params), masks(key, cfg)
    loss, metrics, grads = actor_loss(state.actor.params, state, data, key, cfg)
    expected, log_prob, weight = numpy_actor_loss(params, state, batch, cfg, drop)
    np.testing.assert_allclose([loss, metrics["actor_loss"]], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["log_prob"], log_prob.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["weight"], weight.mean(), rtol=1e-4)
    assert (weight.max() == 100) == (not overrides)
    for direction in directions(params):
        moved = slope(lambda p: numpy_actor_loss(p, state, batch, cfg, drop)[0], params, direction)
        np.testing.assert_allclose(dot(grads, direction), moved, rtol=2e-3, atol=1e-4)


# --- By hand ------------------------------------------------------------------------------------
def linear_state(actor=0.5, critic=(9, 9), critic_target=(9, 9), value=9.0):
    """mu(s) = actor * s, std 1, Q_k(s, a) = critic_k * a, V(s) = value * s; s, a of one number."""
    create = train_state.TrainState.create

    def critics(params, observation, action):
        return params[:, None] * action[:, 0][None]

    return xql.State(
        nets.linear_net(create, lambda p, s, *_: (p * s, 0 * s), actor),
        nets.linear_net(xql.TrainState.create, critics, critic, critic_target),
        nets.linear_net(create, lambda p, s: p * s[:, 0], value),
    )


def rows(count=3, **columns):
    columns = {name: np.array(x)[:, None] for name, x in columns.items()}
    rest = {name: columns.pop(name)[:, 0] for name in ("reward", "termination") if name in columns}
    return probes.random_transitions(count, 1, 1, **columns, **rest)


KEY = jax.random.key(0)


def test_critic_loss_by_hand():
    state = linear_state(critic=(1, -1), value=1.0)
    batch = rows(
        action=[1, -1, 0.5], reward=[1, 0, 30], next_observation=[2, -1, 5], termination=[0, 0, 1]
    )
    # target (discount 0.5)  2       -0.5      30
    # Q_1 - target          -1       -0.5     -29.5: 20 (29.5 - 10) = 390
    # Q_2 - target          -3        1.5     -30.5: 20 (30.5 - 10) = 410
    # halves of the squares  0.5      0.125
    #                        4.5      1.125
    loss, _, _ = critic_loss(state.critic.params, state, batch, xql.Config(discount=0.5))
    np.testing.assert_allclose(loss, (0.625 + 5.625 + 390 + 410) / 3, rtol=1e-6)


def test_value_loss_by_hand():
    state = linear_state(critic_target=(1, 2), value=1.0)
    batch = rows(observation=[0, -1, 1], action=[1, -1, 6])
    # min Q                  1       -2        6
    # V                      0       -1        1
    # z = A / 0.5            2       -2       10, clipped at 3
    cfg = xql.Config(beta=0.5, max_clip=3.0)
    loss, metrics, grads = value_loss(state.value_net.params, state, batch, KEY, cfg)
    z = np.array([2, -2, 3])
    np.testing.assert_allclose(loss, np.mean(np.exp(z) - z - 1) / math.exp(3), rtol=1e-5)
    # d / d value: -s (e^z - 1) / beta; s = 0 in the first row, the third is clipped
    np.testing.assert_allclose(grads, (math.exp(-2) - 1) / 0.5 / 3 / math.exp(3), rtol=1e-5)
    assert metrics["value"] == 0


def test_value_loss_divides_by_no_less_than_exp_of_minus_1():
    state = linear_state(critic_target=(-4, -4), value=0.0)
    batch = rows(2, observation=[1, 1], action=[1, 0.5])  # z is -4 and -2
    loss, _, _ = value_loss(state.value_net.params, state, batch, KEY, xql.Config(beta=1.0))
    expected = (math.exp(-4) + 3 + math.exp(-2) + 1) / 2 * math.e
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_weights_by_hand():
    state = linear_state(0.5, critic_target=(1, 1), value=0.0)
    batch = rows(observation=[0, 0, 0], action=[1, 0.4, -1])
    for beta in (2.0, 0.1):  # is no part of the weights
        cfg = xql.Config(inverse_temperature=10.0, beta=beta)
        loss, metrics, _ = actor_loss(state.actor.params, state, batch, KEY, cfg)
        weight = np.array([100, math.exp(4), math.exp(-10)])  # e^10 is 22 026
        minus_log_prob = 0.5 * np.array([1, 0.16, 1]) + 0.5 * math.log(2 * math.pi)
        np.testing.assert_allclose(metrics["weight"], weight.mean(), rtol=1e-5)
        np.testing.assert_allclose(loss, (weight * minus_log_prob).mean(), rtol=1e-5)


# --- What the losses may depend on --------------------------------------------------------------
def test_actions_of_the_value_loss():
    """As recorded; noisy ones within 0.5 of them and in the box; then uniform ones, row by row."""
    data = probes.random_transitions(2000, 1, 1)
    data = data._replace(action=0.9 * data.action)

    def batch(**overrides):
        cfg = xql.Config(**overrides)
        return xql.value_batch(data, jax.random.key(3), cfg)

    observation, action = batch()
    assert observation is data.observation and action is data.action
    observation, action = batch(action_noise=1.0)
    assert observation is data.observation
    moved = np.abs(action - data.action)
    assert np.abs(action).max() == 1 and 0.499 < moved.max() < 0.501 and moved.min() < 0.01
    observation, action = batch(random_actions=3)
    assert np.array_equal(action[:2000], data.action) and action.shape == (8000, 1)
    assert np.array_equal(observation, np.concatenate([data.observation] * 4))
    uniform = np.asarray(action[2000:])
    np.testing.assert_allclose([uniform.min(), uniform.max()], [-1, 1], atol=0.01)
    np.testing.assert_allclose([uniform.mean(), uniform.var()], [0, 1 / 3], atol=0.03)


def test_termination_stops_the_bootstrap_and_truncation_does_not():
    cfg, state, _, data = setup()
    nets.check_bootstrap(lambda b: critic_loss(state.critic.params, state, b, cfg)[0], data)


@pytest.mark.parametrize("name", ["value_net", "actor"])
def test_value_and_actor_read_observation_and_action_only(name):
    cfg, state, key, data = setup(**MILD)
    loss = {
        "value_net": lambda batch: value_loss(state.value_net.params, state, batch, key, cfg)[0],
        "actor": lambda batch: actor_loss(state.actor.params, state, batch, key, cfg)[0],
    }[name]
    before = loss(data)
    for column in data._fields:
        rolled = data._replace(**{column: np.roll(getattr(data, column), 1, axis=0)})
        assert (loss(rolled) != before) == (column in ("observation", "action")), column


READS = {  # loss -> what it reads of the state
    "critic": {"value_net.params"},
    "value_net": {"critic.target_params"},
    "actor": {"critic.target_params", "value_net.params"},
}


@pytest.mark.parametrize("name", READS)
def test_losses_read_only_the_networks_they_should(name):
    cfg, state, key, data = setup(**MILD)
    other = nets.shaken(state, seed=4)

    def loss(state, params=state):
        params = getattr(params, name).params
        if name == "critic":
            return critic_loss(params, state, data, cfg)[0]
        if name == "value_net":
            return value_loss(params, state, data, key, cfg)[0]
        return actor_loss(params, state, data, key, cfg)[0]

    before = loss(state)
    assert loss(state, params=other) != before
    found = set()
    for net in state._fields:
        for kind in ("params", "target_params"):
            if hasattr(getattr(state, net), kind):
                changed = getattr(state, net).replace(**{kind: getattr(getattr(other, net), kind)})
                if loss(state._replace(**{net: changed})) != before:
                    found.add(f"{net}.{kind}")
    assert found == READS[name]


# --- Networks -----------------------------------------------------------------------------------
@functools.cache
def fresh():
    return nets.fresh(xql)


def test_initial_parameters():
    state = fresh()
    nets.check_orthogonal_init(state.critic.params, (16 + 2, 64, 96, 1))
    nets.check_orthogonal_init(state.value_net.params, (16, 64, 96, 1))
    layers = dict(state.actor.params["params"])
    assert layers.pop("log_std").tolist() == [0, 0]
    nets.check_orthogonal_init({"params": layers}, (16, 64, 96, 2))
    nets.check_members_differ(state.critic)
    kernels = [net.params["params"]["Dense_0"]["kernel"] for net in (state.actor, state.value_net)]
    assert not np.isclose(*kernels).any(axis=0).all()


def test_layer_norm_is_in_v_alone():
    norms = {name: "LayerNorm_0" in getattr(fresh(), name).params["params"] for name in READS}
    assert norms == {"critic": False, "value_net": True, "actor": False}


def test_the_critics_alone_have_targets_and_they_start_as_copies():
    nets.check_targets_are_copies(fresh().critic)
    assert not hasattr(fresh().actor, "target_params")
    assert not hasattr(fresh().value_net, "target_params")


def test_policy_is_the_mean_without_dropout():
    _, state, key, data = setup(dropout=0.5)
    params = xql.policy_params(state)
    assert params is state.actor.params
    action = jax.jit(functools.partial(xql.policy, state.actor.apply_fn))(
        params, data.observation, key
    )
    expected, _ = numpy_policy(double(params), double(data).observation)
    np.testing.assert_allclose(action, expected, rtol=1e-4, atol=1e-6)


# --- Update -------------------------------------------------------------------------------------
def test_order_of_two_updates():
    """V twice on one batch, the actor with the new V, Q with the new V, targets."""
    rates = {"actor_learning_rate": 0.02, "critic_learning_rate": 0.05, "target_rate": 0.3}
    rest = MILD | {"dropout": 0.3, "random_actions": 2}
    cosine = {"cosine": True, "num_updates": 4}
    cfg, state, key, data = setup(log_every=2, value_updates=2, **rates, **rest, **cosine)
    loss_cfg, expected, _, _ = setup(**rest)
    adam = {
        "value_net": nets.Adam(0.05),
        "actor": nets.Adam(lambda step: 0.02 * (1 + math.cos(math.pi * step / 4)) / 2),
        "critic": nets.Adam(0.05),
    }
    found = {}

    def gradient_step(name, loss, *arguments):
        nonlocal expected
        net = getattr(expected, name)
        _, metrics, grads = loss(net.params, expected, *arguments, loss_cfg)
        expected = expected._replace(
            **{name: net.replace(params=adam[name].step(net.params, grads))}
        )
        return metrics

    for step in (6, 7):
        batch, key_value, key_actor = nets.sample(key, step, data, cfg, 3)
        gradient_step("value_net", value_loss, batch, jax.random.fold_in(key_value, 0))
        key_value = jax.random.clone(key_value)
        metrics = gradient_step("value_net", value_loss, batch, jax.random.fold_in(key_value, 1))
        metrics |= gradient_step("actor", actor_loss, batch, key_actor)
        metrics |= gradient_step("critic", critic_loss, batch)
        for name, x in metrics.items():
            found.setdefault(name, []).append(x)
        target = nets.polyak(expected.critic.params, expected.critic.target_params, 0.3)
        expected = expected._replace(critic=expected.critic.replace(target_params=target))

    after, metrics = nets.train_chunk(xql, state, key, 6, data, cfg)
    for name in ("value_net", "actor", "critic"):
        nets.check_close(getattr(after, name).params, getattr(expected, name).params)
    nets.check_close(after.critic.target_params, expected.critic.target_params)
    for name, numbers in found.items():
        np.testing.assert_allclose(metrics.pop(name), np.mean(numbers), rtol=1e-3)
    assert not metrics


@pytest.mark.parametrize("cosine", [False, True])
def test_learning_rates(cosine):
    """The actor's falls to 0 along a cosine, if it is to; those of Q and V stay."""
    rates = {"actor_learning_rate": 0.02, "critic_learning_rate": 0.05, "num_updates": 4}
    _, state, _, _ = setup(**rates, cosine=cosine)

    def falling(t):
        return 0.01 * (1 + math.cos(math.pi * min(t, 4) / 4))

    nets.check_rate(state.actor, falling if cosine else lambda t: 0.02, steps=6)
    nets.check_rate(state.critic, lambda t: 0.05, steps=6)
    nets.check_rate(state.value_net, lambda t: 0.05, steps=6)
    assert xql.Config().cosine


# --- Data ---------------------------------------------------------------------------------------
def test_training_sees_shifted_scaled_rewards_and_clipped_actions(monkeypatch, tmp_path):
    raw = probes.random_transitions(20)
    raw.action[:3] = [[1, -1], [1 - 1e-6, 0], [0.5, -0.25]]
    overrides = {"reward_shift": -1.0, "return_scale": 1000.0}
    _, data = nets.handed_over(xql, monkeypatch, tmp_path, raw, (-3, 5), **overrides)
    # Returns of the data as recorded span 8.
    np.testing.assert_allclose(data.reward, (raw.reward - 1) * 1000 / 8, rtol=1e-5)
    np.testing.assert_allclose(data.action, raw.action.clip(-0.99999, 0.99999), rtol=1e-7)
    for name in ("observation", "next_observation", "termination"):
        assert np.array_equal(getattr(data, name), getattr(raw, name)), name

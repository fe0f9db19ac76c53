# SPDX-License-Identifier: Apache-2.0
"""SAC's losses, networks and update against NumPy in float64 and hand-worked numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_nets as nets
import probes
import pytest
from numpy_nets import directions, dot, double, slope

from algorithms import sac

critic_loss = nets.compiled(sac.critic_loss)
actor_loss = nets.compiled(sac.actor_loss)
temperature_loss = nets.compiled(sac.temperature_loss)
setup = functools.partial(nets.setup, sac)


def noise_of(key, size=32, dim=2):
    """What a loss draws from its key."""
    return double(jax.random.normal(jax.random.clone(key), (size, dim)))


# --- The method in NumPy ------------------------------------------------------------------------
def numpy_actor(params, observation):
    """Mean and log std before tanh: the heads are the last two layers."""
    layers, x = params["params"], observation
    count = len(layers) - 2
    for i in range(count):
        x = np.maximum(nets.dense(layers[f"Dense_{i}"], x), 0)
    log_std = nets.dense(layers[f"Dense_{count + 1}"], x)
    return nets.dense(layers[f"Dense_{count}"], x), np.clip(log_std, -5, 2)


def numpy_sample(params, observation, noise):
    """Actions [B, A] and log pi [B]: the density of N(mean, std) over the slope of tanh."""
    mean, log_std = numpy_actor(params, observation)
    x = mean + np.exp(log_std) * noise
    return np.tanh(x), nets.log_normal(x, mean, log_std) + 2 * np.log(np.cosh(x)).sum(axis=-1)


def numpy_critic_loss(params, state, batch, noise, cfg):
    """-> loss, q"""
    q = nets.critics(params, batch.observation, batch.action)
    temperature = np.exp(double(state.log_temperature.params["log"]))
    action, log_prob = numpy_sample(double(state.actor.params), batch.next_observation, noise)
    next_q = nets.critics(double(state.critic.target_params), batch.next_observation, action)
    loss = 0.0
    for k in range(len(q)):
        for i in range(len(batch.reward)):
            target = batch.reward[i]
            if not batch.termination[i]:
                target += cfg.discount * (min(next_q[:, i]) - temperature * log_prob[i])
            loss += (q[k, i] - target) ** 2 / len(batch.reward)
    return loss, q.mean()


def numpy_actor_loss(params, state, batch, noise):
    """-> loss, entropy"""
    action, log_prob = numpy_sample(params, batch.observation, noise)
    q = nets.critics(double(state.critic.params), batch.observation, action).min(axis=0)
    temperature = np.exp(double(state.log_temperature.params["log"]))
    return (temperature * log_prob - q).mean(), -log_prob.mean()


VARIANTS = [{}, {"discount": 0.7, "num_critics": 3, "hidden": (12,)}, {"num_critics": 1}]


@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_losses_and_gradients_equal_numpy(overrides):
    """The target, and what the actor and the temperature are given, are constants to a gradient."""
    cfg, state, key, data = setup(**overrides)
    batch, noise = double(data), noise_of(key)
    params = double(state.critic.params)
    loss, metrics, grads = critic_loss(state.critic.params, state, data, key, cfg)
    expected, q = numpy_critic_loss(params, state, batch, noise, cfg)
    np.testing.assert_allclose([loss, metrics["critic_loss"]], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["q"], q, rtol=1e-4, atol=1e-5)
    for direction in directions(params, 3):
        expected = slope(
            lambda p: numpy_critic_loss(p, state, batch, noise, cfg)[0], params, direction
        )
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=2e-3, atol=1e-3)

    params = double(state.actor.params)
    loss, metrics, grads = actor_loss(state.actor.params, state, data, key, cfg)
    expected, entropy = numpy_actor_loss(params, state, batch, noise)
    np.testing.assert_allclose([loss, metrics["actor_loss"]], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["entropy"], entropy, rtol=1e-4)
    for direction in directions(params, 3):
        expected = slope(lambda p: numpy_actor_loss(p, state, batch, noise)[0], params, direction)
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=2e-3, atol=1e-3)

    log = double(state.log_temperature.params["log"])
    np.testing.assert_allclose(metrics["temperature"], np.exp(log), rtol=1e-5)
    params = state.log_temperature.params
    loss, metrics, grads = temperature_loss(params, state, data, key, cfg)
    excess = entropy - -2  # two action dimensions
    np.testing.assert_allclose([loss, metrics["temperature_loss"]], log * excess, rtol=1e-4)
    np.testing.assert_allclose(grads["log"], excess, rtol=1e-4)


# --- By hand ------------------------------------------------------------------------------------
def linear_state(actor, critic, critic_target, temperature):
    """pi(s) = tanh N(actor * s, 1) for s of one number, Q_k(s, a) = critic_k a."""
    linear = functools.partial(nets.linear_net, sac.train_state.TrainState.create)

    def act(p, s):
        return p[None] * s, jnp.zeros((len(s), len(p)))

    def value(p, s, a):
        return p[:, None] * a.sum(axis=-1)[None]

    return sac.State(
        linear(act, actor),
        nets.linear_net(sac.TrainState.create, value, critic, critic_target),
        linear(lambda p: jnp.exp(p["log"]), {"log": np.log(temperature)}),
    )


def log_prob_by_hand(x, mean):
    """log pi of tanh(x): log N(x; mean, 1) - log(1 - tanh(x)^2)."""
    return -0.5 * (x - mean) ** 2 - 0.5 * np.log(2 * np.pi) - np.log(1 - np.tanh(x) ** 2)


def test_critic_loss_by_hand():
    state, key = linear_state([1], [1, -2], [4, 8], 0.25), jax.random.key(0)
    batch = probes.random_transitions(
        2,
        1,
        1,
        next_observation=[[0.5], [-0.25]],
        action=[[0.75], [0.5]],
        reward=[1, 2],
        termination=[0, 1],
    )
    x = 0.5 + noise_of(key, 2, 1)[0, 0]  # in the first row
    # row                          1                        2
    # Q(s, a)                 0.75, -1.5                0.5, -1
    # target's minimum      4 a' or 8 a', a' = tanh x   the end
    next_value = min(4 * np.tanh(x), 8 * np.tanh(x)) - 0.25 * log_prob_by_hand(x, 0.5)
    target = 1 + 0.5 * next_value
    expected = ((0.75 - target) ** 2 + (-1.5 - target) ** 2 + 1.5**2 + 3**2) / 2
    found, metrics, _ = critic_loss(
        state.critic.params, state, batch, key, sac.Config(discount=0.5)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["q"], (0.75 - 1.5 + 0.5 - 1) / 4, rtol=1e-5)


def test_actor_loss_by_hand():
    state, key = linear_state([0.5], [2, -3], [9, 9], 0.5), jax.random.key(1)
    batch = probes.random_transitions(2, 1, 1, observation=[[1], [-1]])
    mean = np.array([0.5, -0.5])
    x = mean + noise_of(key, 2, 1)[:, 0]
    q = np.minimum(2 * np.tanh(x), -3 * np.tanh(x))
    log_prob = log_prob_by_hand(x, mean)
    found, metrics, _ = actor_loss(state.actor.params, state, batch, key, sac.Config())
    np.testing.assert_allclose(found, (0.5 * log_prob - q).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["entropy"], -log_prob.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["temperature"], 0.5, rtol=1e-6)


def test_log_prob_is_a_density_and_exact_far_out():
    x = np.linspace(-9, 9, 4001)[:, None]
    mean, log_std = np.full((1, 1), 0.3, np.float32), np.full((1, 1), -0.5, np.float32)
    log_prob = np.asarray(sac.squashed_log_prob(x.astype(np.float32), mean, log_std))
    np.testing.assert_allclose(np.trapezoid(np.exp(log_prob), np.tanh(x[:, 0])), 1, rtol=1e-3)


# --- What the losses may depend on --------------------------------------------------------------
def test_termination_stops_the_bootstrap_and_truncation_does_not():
    cfg, state, key, data = setup()
    nets.check_bootstrap(lambda b: critic_loss(state.critic.params, state, b, key, cfg)[0], data)


def test_losses_read_only_the_networks_they_should():
    cfg, state, key, data = setup()
    other = nets.shaken(state, seed=4)
    networks = {
        "actor": other.actor,
        "critic": state.critic.replace(params=other.critic.params),
        "targets": state.critic.replace(target_params=other.critic.target_params),
        "log_temperature": other.log_temperature,
    }
    # The loss, its own network, and what else it reads.
    cases = [
        (critic_loss, "critic", {"actor", "targets", "log_temperature"}),
        (actor_loss, "actor", {"critic", "log_temperature"}),
        (temperature_loss, "log_temperature", {"actor"}),
    ]
    for loss, own, read in cases:
        params = getattr(state, own).params
        here = loss(params, state, data, key, cfg)[0]
        assert loss(getattr(other, own).params, state, data, key, cfg)[0] != here
        for name, net in networks.items():
            field = "critic" if name == "targets" else name
            changed = loss(params, state._replace(**{field: net}), data, key, cfg)[0]
            assert (changed != here) == (name in read), (own, name)


# --- Networks -----------------------------------------------------------------------------------
@functools.cache
def fresh():
    return nets.fresh(sac)


@pytest.mark.parametrize("net", ["actor", "critic"])
def test_initial_parameters(net):
    """Hidden kernels uniform in ±1 / sqrt(fan in) with biases of 0.1; small last layers."""
    layers = dict(getattr(fresh(), net).params["params"])
    inputs, heads, bound = (16, (2, 3), 1e-3) if net == "actor" else (18, (2,), 3e-3)
    for i, fan_in in enumerate((inputs, 64)):
        layer = layers.pop(f"Dense_{i}")
        kernel = np.asarray(layer["kernel"])
        assert kernel.shape[-2] == fan_in and (np.asarray(layer["bias"]) == np.float32(0.1)).all()
        assert 0.95 * fan_in**-0.5 < np.abs(kernel).max() <= fan_in**-0.5
        np.testing.assert_allclose(kernel.std(), (3 * fan_in) ** -0.5, rtol=0.05)
    for i in heads:
        layer = layers.pop(f"Dense_{i}")
        assert layer["kernel"].shape[-2:] == (96, 2 if net == "actor" else 1)
        for name in ("kernel", "bias"):
            assert 0.2 * bound < np.abs(np.asarray(layer[name])).max() <= bound
    assert not layers


def test_initial_temperature_ensemble_and_targets():
    state = fresh()
    nets.check_members_differ(state.critic)
    nets.check_targets_are_copies(state.critic)
    assert state.log_temperature.params == {"log": 0.0}  # temperature 1


def test_log_std_is_clipped():
    _, state, _, data = setup()
    layers, act = dict(state.actor.params["params"]), jax.jit(state.actor.apply_fn)
    for bias, expected in ((-30.0, -5.0), (30.0, 2.0)):
        layers["Dense_3"] = layers["Dense_3"] | {"bias": np.full(2, bias, np.float32)}
        assert (act({"params": layers}, data.observation)[1] == expected).all()


# --- Policy -------------------------------------------------------------------------------------
def test_the_policy_is_tanh_of_the_mean_and_exploration_draws_from_pi():
    _, state, key, data = setup()
    params = sac.policy_params(state)
    assert params is state.actor.params
    act = jax.jit(functools.partial(sac.policy, state.actor.apply_fn))
    explore = jax.jit(functools.partial(sac.explore, state.actor.apply_fn))
    mean, _ = numpy_actor(double(params), double(data).observation)
    action = act(params, data.observation, key)
    np.testing.assert_allclose(action, np.tanh(mean), rtol=1e-4, atol=1e-5)
    noise = noise_of(key)
    drawn, _ = numpy_sample(double(params), double(data).observation, noise)
    found = explore(params, data.observation, jax.random.clone(key))
    np.testing.assert_allclose(found, drawn, rtol=1e-3, atol=1e-4)


# --- Update -------------------------------------------------------------------------------------
RATES = {
    "actor_learning_rate": 0.02,
    "critic_learning_rate": 0.05,
    "temperature_learning_rate": 0.04,
    "target_rate": 0.3,
}
ADAM = {"log_temperature": 0.04, "actor": 0.02, "critic": 0.05}  # in the order of the steps


def test_order_of_three_updates():
    """Temperature, actor with the new temperature, critics with both, then the targets."""
    # Large steps, so that another order would show.
    cfg, state, key, data = setup(log_every=3, **RATES)
    cfg_here, here, _, _ = setup(log_every=3)  # the same numbers, the losses compiled already
    losses = dict(zip(ADAM, (temperature_loss, actor_loss, critic_loss), strict=True))
    adam = {name: nets.Adam(rate) for name, rate in ADAM.items()}
    found = []
    for step in (6, 7, 8):
        batch, *keys = nets.sample(key, step, data, cfg, 4)
        metrics = {}
        for (name, loss), own in zip(losses.items(), keys, strict=True):
            net = getattr(here, name)
            _, more, grads = loss(net.params, here, batch, own, cfg_here)
            metrics |= more
            net = net.replace(params=adam[name].step(net.params, grads))
            here = here._replace(**{name: net})
        target = nets.polyak(here.critic.params, here.critic.target_params, 0.3)
        here = here._replace(critic=here.critic.replace(target_params=target))
        found.append(metrics)
    after, metrics = nets.train_chunk(sac, state, key, 6, data, cfg)
    for name in ADAM:
        assert getattr(after, name).step == 3
        nets.check_close(getattr(after, name).params, getattr(here, name).params)
    nets.check_close(after.critic.target_params, here.critic.target_params)
    for name in metrics:
        mean = np.mean([x[name] for x in found])
        np.testing.assert_allclose(metrics[name], mean, rtol=1e-3, atol=1e-4)


def test_learning_rates():
    _, state, _, _ = setup(**RATES)
    for name, rate in ADAM.items():
        nets.check_rate(getattr(state, name), lambda step, rate=rate: rate)

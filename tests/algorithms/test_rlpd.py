# SPDX-License-Identifier: Apache-2.0
"""RLPD's losses, batches, networks and update against NumPy in float64 and hand-worked numbers."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import numpy_nets as nets
import probes
import pytest
from numpy_nets import directions, dot, double, slope

from algorithms import rlpd, sac
from common.experiment import buffers

critic_loss = nets.compiled(rlpd.critic_loss)
actor_loss = nets.compiled(rlpd.actor_loss)
setup = functools.partial(nets.setup, rlpd)


# --- The method in NumPy ------------------------------------------------------------------------
def numpy_sample(params, observation, noise):
    """Actions [B, A] and log pi [B]: the density of N(mean, std) over the slope of tanh."""
    layers, x = params["params"], observation
    for i in range(len(layers) - 2):
        x = np.maximum(nets.dense(layers[f"Dense_{i}"], x), 0)
    mean, log_std = (nets.dense(layers[f"Dense_{len(layers) - i}"], x) for i in (2, 1))
    log_std = np.clip(log_std, -20, 2)
    x = mean + np.exp(log_std) * noise
    return np.tanh(x), nets.log_normal(x, mean, log_std) + 2 * np.log(np.cosh(x)).sum(axis=-1)


def numpy_critics(params, observation, action):
    """[K, B]: dense, layer norm, relu; ...; dense."""
    found = []
    for k in range(len(params["params"]["Dense_0"]["bias"])):
        layers = jax.tree.map(lambda x, k=k: x[k], params["params"])
        x, hidden = np.concatenate([observation, action], axis=-1), len(layers) // 2
        for i in range(hidden):
            x = nets.layer_norm(layers[f"LayerNorm_{i}"], nets.dense(layers[f"Dense_{i}"], x))
            x = np.maximum(x, 0)
        found.append(nets.dense(layers[f"Dense_{hidden}"], x)[:, 0])
    return np.stack(found)


def draws_of(key, cfg, shape=(32, 2)):
    """What the critic loss draws from its key: noise, and the critics of the target."""
    key_noise, key_members = jax.random.split(jax.random.clone(key))
    order = np.asarray(jax.random.uniform(key_members, (cfg.num_critics,))).argsort()
    return double(jax.random.normal(key_noise, shape)), order[: cfg.num_target_critics]


def numpy_critic_loss(params, state, batch, noise, members, cfg):
    action, log_prob = numpy_sample(double(state.actor.params), batch.next_observation, noise)
    next_q = numpy_critics(double(state.critic.target_params), batch.next_observation, action)
    temperature = np.exp(double(state.log_temperature.params["log"]))
    q = numpy_critics(params, batch.observation, batch.action)
    loss = 0.0
    for i in range(len(batch.reward)):
        target = batch.reward[i] + cfg.reward_shift
        if not batch.termination[i]:
            target += cfg.discount * min(next_q[k, i] for k in members)
            if cfg.backup_entropy:
                target -= cfg.discount * temperature * log_prob[i]
        loss += ((q[:, i] - target) ** 2).sum() / q.size
    return loss


def numpy_actor_loss(params, state, batch, noise):
    """-> loss, entropy"""
    action, log_prob = numpy_sample(params, batch.observation, noise)
    q = numpy_critics(double(state.critic.params), batch.observation, action).mean(axis=0)
    temperature = np.exp(double(state.log_temperature.params["log"]))
    return (temperature * log_prob - q).mean(), -log_prob.mean()


VARIANTS = [
    {"num_critics": 4, "num_target_critics": 2},
    {"num_critics": 3, "num_target_critics": 1, "backup_entropy": False}
    | {"reward_shift": -1.0, "discount": 0.7, "hidden": (12,)},
]


@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_losses_and_gradients_equal_numpy(overrides):
    """The target, and what the actor is given, are constants to a gradient."""
    cfg, state, key, data = setup(**overrides)
    batch, (noise, members) = double(data), draws_of(key, cfg)
    params = double(state.critic.params)
    loss, metrics, grads = critic_loss(state.critic.params, state, data, key, cfg)
    expected = numpy_critic_loss(params, state, batch, noise, members, cfg)
    np.testing.assert_allclose([loss, metrics["critic_loss"]], expected, rtol=1e-4)
    q = numpy_critics(params, batch.observation, batch.action)
    np.testing.assert_allclose(metrics["q"], q.mean(), rtol=1e-4, atol=1e-5)
    for direction in directions(params, 3):
        expected = slope(
            lambda p: numpy_critic_loss(p, state, batch, noise, members, cfg), params, direction
        )
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=2e-3, atol=1e-3)

    params, noise = double(state.actor.params), double(jax.random.normal(key, (32, 2)))
    key = jax.random.clone(key)
    loss, metrics, grads = actor_loss(state.actor.params, state, data, key, cfg)
    expected, entropy = numpy_actor_loss(params, state, batch, noise)
    np.testing.assert_allclose([loss, metrics["actor_loss"]], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["entropy"], entropy, rtol=1e-4)
    for direction in directions(params, 3):
        expected = slope(lambda p: numpy_actor_loss(p, state, batch, noise)[0], params, direction)
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize(("entropy", "sign"), [(-0.5, 1), (-1.5, -1)])
def test_temperature_falls_while_the_entropy_is_above_minus_half_the_number_of_actions(
    entropy, sign
):
    cfg, state, _, data = setup()  # two action dimensions: the target is -1
    params = {"log": jnp.float32(0.4)}
    loss_of = jax.value_and_grad(rlpd.temperature_loss, has_aux=True)
    (loss, metrics), grads = loss_of(params, state, data, entropy, cfg)
    expected = np.exp(0.4) * (entropy + 1)
    np.testing.assert_allclose([loss, metrics["temperature_loss"]], expected, rtol=1e-5)
    np.testing.assert_allclose(grads["log"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["temperature"], np.exp(0.4), rtol=1e-5)
    assert np.sign(grads["log"]) == sign


# --- What the losses may depend on --------------------------------------------------------------
def test_termination_stops_the_bootstrap_and_truncation_does_not():
    cfg, state, key, data = setup()
    nets.check_bootstrap(lambda b: critic_loss(state.critic.params, state, b, key, cfg)[0], data)


def test_losses_read_only_the_networks_they_should():
    cfg, state, key, data = setup()
    other = nets.shaken(state, seed=4)
    targets = state.critic.replace(target_params=other.critic.target_params)
    networks = state.critic.replace(params=other.critic.params)

    def critic(**changed):
        return critic_loss(state.critic.params, state._replace(**changed), data, key, cfg)[0]

    def actor(**changed):
        return actor_loss(state.actor.params, state._replace(**changed), data, key, cfg)[0]

    here = critic()
    assert critic(critic=networks) == here != critic(critic=targets)
    assert critic(actor=other.actor) != here != critic(log_temperature=other.log_temperature)
    here = actor()
    assert actor(critic=targets) == actor(actor=other.actor) == here
    assert actor(critic=networks) != here != actor(log_temperature=other.log_temperature)


def test_every_pair_of_critics_is_drawn_equally_often():
    cfg = rlpd.Config(num_critics=4)
    keys = jax.random.split(jax.random.key(0), 3000)
    numbers = jax.vmap(lambda key: jax.random.uniform(jax.random.split(key)[1], (4,)))(keys)
    pairs = np.sort(np.asarray(numbers).argsort(axis=1)[:, : cfg.num_target_critics])
    _, counts = np.unique(pairs, axis=0, return_counts=True)
    assert len(counts) == 6 and abs(counts / 500 - 1).max() < 0.15


# --- Batches ------------------------------------------------------------------------------------
def halves_of(seed, size):
    """(batch, buffer) where rewards are 0 in the data set, 10 with seed 0 and 20 with seed 1."""
    data = jax.device_put(probes.random_transitions(5, 2, 1, reward=0.0))
    new = probes.random_transitions(6, 2, 1, reward=[10, 20] * 3)
    new = jax.tree.map(lambda x: x.reshape(3, 2, *x.shape[1:]), new)
    buffer = buffers.empty(data, seeds=2, capacity=4, apart=True)
    buffer = buffers.write(buffer, new, 0)
    cfg = rlpd.Config(batch_size=size)
    draw = functools.partial(rlpd.sample_halves, buffer.of_seed(seed), cfg=cfg)
    return jax.jit(draw)(jax.random.key(0)), buffer


def test_rows_of_the_data_set_and_of_the_env_come_in_turns():
    """As in the authors' `combine`: even places from the data set, odd ones from the env."""
    batch, _ = halves_of(seed=1, size=9)
    assert np.array_equal(batch.reward, [0, 20] * 4 + [0])
    assert batch.observation.shape == (9, 2) and batch.action.shape == (9, 1)


def test_every_row_of_either_source_is_drawn():
    batch, buffer = halves_of(seed=0, size=200)
    rows, stored = np.asarray(batch.observation), np.asarray(buffer.rows.observation)
    for drawn, source in ((rows[::2], stored[:5]), (rows[1::2], stored[5:8])):
        assert np.array_equal(np.unique(drawn, axis=0), np.unique(source, axis=0))


# --- Networks -----------------------------------------------------------------------------------
def test_initial_state():
    """Glorot-uniform kernels, zero biases, in every layer; temperature 1."""
    state = nets.fresh(rlpd)
    nets.check_members_differ(state.critic)
    nets.check_targets_are_copies(state.critic)
    assert state.log_temperature.params == {"log": 0.0}
    for net, norms in ((state.actor, 0), (state.critic, 2)):
        layers = net.params["params"]
        assert sum(name.startswith("LayerNorm") for name in layers) == norms
        for name, layer in layers.items():
            if name.startswith("Dense"):
                limit = (6 / sum(layer["kernel"].shape[-2:])) ** 0.5
                assert 0.8 * limit < np.abs(layer["kernel"]).max() <= limit
                assert not np.asarray(layer["bias"]).any()


def test_the_rest_is_sacs():
    for name in ("policy", "explore", "policy_params", "policy_fn"):
        assert inspect.getsource(getattr(rlpd, name)) == inspect.getsource(getattr(sac, name))


# --- Update -------------------------------------------------------------------------------------
RATES = {
    "actor_learning_rate": 0.02,
    "critic_learning_rate": 0.05,
    "temperature_learning_rate": 0.04,
    "target_rate": 0.3,
}


def test_order_of_an_update_and_means_of_the_metrics():
    """Two critic steps, each followed by one of the targets; the actor on the second batch; the
    temperature with the entropy of the actor before its step."""
    cfg, state, key, data = setup(log_every=4, **RATES)
    cfg_here, here, _, _ = setup(log_every=4)
    rates = zip(("actor", "critic", "log_temperature"), (0.02, 0.05, 0.04), strict=True)
    adam = {name: nets.Adam(rate) for name, rate in rates}
    draw = jax.jit(functools.partial(rlpd.sample_batch, cfg=cfg_here))

    def place(here, name, grads, **more):
        net = getattr(here, name)
        net = net.replace(params=adam[name].step(net.params, grads), **more)
        return here._replace(**{name: net})

    found = {name: [] for name in ("critic_loss", "actor_loss", "temperature_loss")}
    for step in (6, 7, 8, 9):
        keys = jax.random.split(jax.random.fold_in(jax.random.clone(key), step), 3)
        batch = draw(data, keys[0])
        loss, _, grads = critic_loss(here.critic.params, here, batch, keys[1], cfg_here)
        here = place(here, "critic", grads)
        target = nets.polyak(here.critic.params, here.critic.target_params, 0.3)
        here = here._replace(critic=here.critic.replace(target_params=target))
        found["critic_loss"].append(loss)
        if step % 2 == 0:
            continue
        loss, metrics, grads = actor_loss(here.actor.params, here, batch, keys[2], cfg_here)
        here = place(here, "actor", grads)
        slope_of_log = np.exp(here.log_temperature.params["log"]) * (metrics["entropy"] + 1)
        here = place(here, "log_temperature", {"log": np.float32(slope_of_log)})
        found["actor_loss"].append(loss)
        found["temperature_loss"].append(slope_of_log)
    after, metrics = nets.train_chunk(rlpd, state, key, 6, data, cfg)
    for name in here._fields:
        nets.check_close(getattr(after, name).params, getattr(here, name).params)
    nets.check_close(after.critic.target_params, here.critic.target_params)
    assert (after.critic.step, after.actor.step, after.log_temperature.step) == (4, 2, 2)
    for name, losses in found.items():
        np.testing.assert_allclose(metrics[name], np.mean(losses), rtol=1e-3, atol=1e-4)


def test_learning_rates():
    _, state, _, _ = setup(**RATES)
    for name, rate in (("actor", 0.02), ("critic", 0.05), ("log_temperature", 0.04)):
        nets.check_rate(getattr(state, name), lambda step, rate=rate: rate)

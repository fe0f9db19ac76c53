# SPDX-License-Identifier: Apache-2.0
"""What LB-SAC changes of SAC-N, against NumPy in float64 and hand-worked numbers."""

import functools
import inspect

import jax
import numpy as np
import numpy_nets as nets
import pytest
import test_sac_n as sac_n_tests
from numpy_nets import directions, dot, double, slope

from algorithms import lb_sac, sac_n

setup = functools.partial(nets.setup, lb_sac)
critic_loss = nets.compiled(lb_sac.critic_loss)


# --- The method in NumPy ------------------------------------------------------------------------
def numpy_critic(params, observation, action):
    """One critic: dense, layer norm where there is one, relu; ...; dense."""
    layers, x = params["params"], np.concatenate([observation, action], axis=-1)
    hidden = sum(name.startswith("Dense") for name in layers) - 1
    for i in range(hidden):
        x = nets.dense(layers[f"Dense_{i}"], x)
        if f"LayerNorm_{i}" in layers:
            norm = layers[f"LayerNorm_{i}"]
            x = x - x.mean(axis=-1, keepdims=True)
            x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5)
            x = x * norm["scale"] + norm["bias"]
        x = np.maximum(x, 0)
    return nets.dense(layers[f"Dense_{hidden}"], x)[..., 0]


def numpy_critics(params, observation, action):
    """[K, B]"""
    count = len(params["params"]["Dense_0"]["bias"])
    members = [jax.tree.map(lambda x, k=k: x[k], params) for k in range(count)]
    return np.stack([numpy_critic(member, observation, action) for member in members])


def numpy_critic_loss(params, state, batch, noise, cfg):
    actor = double(state.actor.params)
    action, log_prob = sac_n_tests.numpy_sample(actor, batch.next_observation, noise)
    next_q = numpy_critics(double(state.critic.target_params), batch.next_observation, action)
    temperature = np.exp(double(state.log_temperature.params["log"]))
    next_value = next_q.min(axis=0) - temperature * log_prob
    target = batch.reward + cfg.discount * (1 - batch.termination) * next_value
    q = numpy_critics(params, batch.observation, batch.action)
    return ((q - target) ** 2).mean()


@pytest.mark.parametrize("layer_norm", [False, True])
def test_critic_loss_and_gradient_equal_numpy(layer_norm):
    cfg, state, key, data = setup(num_critics=3, layer_norm=layer_norm)
    batch, noise = double(data), sac_n_tests.draw(key)
    params = double(state.critic.params)
    loss, metrics, grads = critic_loss(state.critic.params, state, data, key, cfg)
    expected = numpy_critic_loss(params, state, batch, noise, cfg)
    np.testing.assert_allclose([loss, metrics["critic_loss"]], expected, rtol=1e-4)
    assert ("LayerNorm_1" in params["params"]) == layer_norm
    for direction in directions(params, 3):
        expected = slope(
            lambda p: numpy_critic_loss(p, state, batch, noise, cfg), params, direction
        )
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=2e-3, atol=1e-4)


def test_critic_loss_is_the_mean_over_the_critics_by_hand():
    key = jax.random.key(0)
    state, batch, target, q = sac_n_tests.bootstrap_by_hand(lb_sac, key)
    cfg = lb_sac.Config(discount=0.5)
    loss, metrics, _ = critic_loss(state.critic.params, state, batch, key, cfg)
    np.testing.assert_allclose(loss, ((q - target) ** 2).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["q_std"], q.std(axis=0).mean(), rtol=1e-5)


def test_losses_of_actor_and_temperature_are_the_parents():
    for name in ("actor_loss", "temperature_loss", "update"):
        ours, parents = (inspect.getsource(getattr(x, name)) for x in (lb_sac, sac_n))
        assert ours == parents


def test_the_step_grows_as_the_root_of_the_batch():
    """3e-4 for 256 rows, as in SAC-N."""
    large, small = lb_sac.Config(), sac_n.Config()
    factor = (large.batch_size / small.batch_size) ** 0.5
    for name in ("actor_learning_rate", "critic_learning_rate", "temperature_learning_rate"):
        np.testing.assert_allclose(getattr(large, name), factor * getattr(small, name), rtol=0.05)


# --- Networks and update ------------------------------------------------------------------------
def test_initial_state_is_pytorchs():
    state = nets.fresh(lb_sac)
    nets.check_uniform_init(state.critic.params, (16 + 2, 64, 96, 1))
    layers = dict(state.actor.params["params"])
    log_std = layers.pop("Dense_3")
    nets.check_uniform_init({"params": layers}, (16, 64, 96, 2))
    assert log_std["kernel"].shape == (96, 2)
    assert 0.8 * 96**-0.5 < np.abs(log_std["kernel"]).max() <= 96**-0.5
    nets.check_members_differ(state.critic)
    nets.check_targets_are_copies(state.critic)


def test_initial_state_with_edac_init():
    data = nets.probes.random_transitions(observation_dim=16)
    cfg = nets.probes.config(lb_sac, hidden=(64, 96), num_critics=3, edac_init=True)
    create = functools.partial(lb_sac.create_state, cfg=cfg)
    sac_n_tests.check_small_outputs(jax.jit(create)(jax.random.key(0), data))


def test_order_of_an_update_and_means_of_the_metrics():
    sac_n_tests.check_update(lb_sac)

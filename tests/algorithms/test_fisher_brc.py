# SPDX-License-Identifier: Apache-2.0
"""Fisher-BRC's losses, mixture and phases against NumPy in float64 and hand-worked numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_nets as nets
import probes
import pytest
from numpy_nets import directions, dot, double, slope

from algorithms import fisher_brc

critic_loss = nets.compiled(fisher_brc.critic_loss)
actor_loss = nets.compiled(fisher_brc.actor_loss)
clone_loss = nets.compiled(fisher_brc.clone_loss)
setup = functools.partial(nets.setup, fisher_brc, behaviour_hidden=(16, 16), num_components=3)


# --- The method in NumPy ------------------------------------------------------------------------
def numpy_actor(params, observation, noise):
    """Actions and log pi."""
    mean, log_std = np.split(nets.mlp(params, observation), 2, axis=-1)
    log_std = np.clip(log_std, -20, 2)
    x = mean + np.exp(log_std) * noise
    return np.tanh(x), nets.log_normal(x, mean, log_std) + 2 * np.log(np.cosh(x)).sum(axis=-1)


def numpy_mixture(params, observation, dim=2):
    """Weights, means and stds, [B, A, C] each."""
    output = nets.mlp(params, observation).reshape(len(observation), 3, dim, -1)
    weight = np.exp(output[:, 0]) / np.exp(output[:, 0]).sum(axis=-1, keepdims=True)
    return weight, output[:, 1], np.exp(np.clip(output[:, 2], -20, 2))


def numpy_log_mu(mixture, action, cfg):
    """The density of tanh(x) is that of x over 1 - tanh(x)^2."""
    weight, mean, std = mixture
    action = np.clip(action, cfg.action_margin - 1, 1 - cfg.action_margin)
    x = np.arctanh(action)[..., None]
    density = np.exp(-(((x - mean) / std) ** 2) / 2) / (std * np.sqrt(2 * np.pi))
    return np.log((weight * density).sum(axis=-1) / (1 - action**2)).sum(axis=-1)


def numpy_draws(key, *shape):
    return double(jax.random.normal(jax.random.clone(key), shape))


def numpy_critic_loss(params, state, batch, key, cfg):
    """-> loss, TD error, squared norm of the gradients, q"""
    noise = numpy_draws(key, 2, 32, 2)
    actor, behaviour = double(state.actor.params), double(state.behaviour.params)
    next_action, _ = numpy_actor(actor, batch.next_observation, noise[0])
    policy_action, _ = numpy_actor(actor, batch.observation, noise[1])
    following = numpy_mixture(behaviour, batch.next_observation)
    target_params = double(state.critic.target_params)
    offset = nets.critics(target_params, batch.next_observation, next_action).min(axis=0)
    next_q = offset + numpy_log_mu(following, next_action, cfg)
    target = cfg.reward_scale * batch.reward + cfg.survival_bonus
    target = target + cfg.discount * np.where(batch.termination, 0, next_q)
    here = numpy_mixture(behaviour, batch.observation)
    q = nets.critics(params, batch.observation, batch.action)
    q = q + numpy_log_mu(here, batch.action, cfg)
    td_error = sum(np.mean((member - target) ** 2) for member in q)
    squared_norm, step = 0.0, 1e-5
    for i in range(2):
        change = step * np.eye(2)[i]
        ends = [
            nets.critics(params, batch.observation, policy_action + sign * change)
            for sign in (1, -1)
        ]
        squared_norm += (((ends[0] - ends[1]) / (2 * step)) ** 2).mean(axis=1).sum()
    return td_error + cfg.gradient_penalty * squared_norm, td_error, squared_norm, q.mean()


def numpy_actor_loss(params, state, batch, key, cfg):
    """-> loss, entropy"""
    action, log_prob = numpy_actor(params, batch.observation, numpy_draws(key, 32, 2))
    mixture = numpy_mixture(double(state.behaviour.params), batch.observation)
    offset = nets.critics(double(state.critic.params), batch.observation, action).min(axis=0)
    q = offset + numpy_log_mu(mixture, action, cfg)
    temperature = np.exp(double(state.log_temperature.params["log"]))
    return (temperature * log_prob - q).mean(), -log_prob.mean()


def numpy_clone_loss(params, state, batch, key, cfg, chosen=None):
    """-> loss, log prob, entropy, the components of the sample"""
    key_component, key_noise = jax.random.split(jax.random.clone(key))
    position = double(jax.random.uniform(key_component, (32, 2)))
    weight, mean, std = mixture = numpy_mixture(params, batch.observation)
    if chosen is None:
        chosen = (position[..., None] > np.cumsum(weight, axis=-1)).sum(axis=-1)
    one = np.eye(weight.shape[-1])[chosen]
    x = (mean * one).sum(axis=-1) + (std * one).sum(axis=-1) * numpy_draws(key_noise, 32, 2)
    entropy = -numpy_log_mu(mixture, np.tanh(x), cfg).mean()
    log_prob = numpy_log_mu(mixture, batch.action, cfg).mean()
    temperature = np.exp(double(state.clone_temperature.params["log"]))
    return -temperature * entropy - log_prob, log_prob, entropy, chosen


SETTINGS = {"gradient_penalty": 2.0, "survival_bonus": 1.5, "action_margin": 0.05}
SETTINGS |= {"reward_scale": 3.0}


def test_losses_and_gradients_equal_numpy():
    cfg, state, key, data = setup(**SETTINGS)
    data = data._replace(action=data.action.at[0].set(jnp.array([1.0, -1.0])))  # at the bounds
    batch, params = double(data), double(state.critic.params)
    loss, metrics, grads = critic_loss(state.critic.params, state, data, key, cfg)
    expected, *parts = numpy_critic_loss(params, state, batch, key, cfg)
    np.testing.assert_allclose([loss, metrics["critic_loss"]], expected, rtol=1e-4)
    for name, part in zip(("td_error", "gradient_loss", "q"), parts, strict=True):
        np.testing.assert_allclose(metrics[name], part, rtol=1e-4)
    (direction,) = directions(params, 1)
    expected = slope(
        lambda p: numpy_critic_loss(p, state, batch, key, cfg)[0], params, direction, step=1e-5
    )
    np.testing.assert_allclose(dot(grads, direction), expected, rtol=2e-3, atol=1e-3)

    params = double(state.actor.params)
    loss, metrics, grads = actor_loss(state.actor.params, state, data, key, cfg)
    expected, entropy = numpy_actor_loss(params, state, batch, key, cfg)
    np.testing.assert_allclose([loss, metrics["actor_loss"]], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["entropy"], entropy, rtol=1e-4)
    log = double(state.log_temperature.params["log"])
    np.testing.assert_allclose(metrics["temperature"], np.exp(log), rtol=1e-5)
    for direction in directions(params, 2):
        expected = slope(
            lambda p: numpy_actor_loss(p, state, batch, key, cfg)[0], params, direction
        )
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=2e-3, atol=1e-3)


def test_clone_loss_and_its_gradient_equal_numpy():
    """The components of the sample stay as they are: their choice has no gradient."""
    cfg, state, key, data = setup(action_margin=0.05)
    batch, params = double(data), double(state.behaviour.params)
    loss, metrics, grads = clone_loss(state.behaviour.params, state, data, key, cfg)
    expected, log_prob, entropy, chosen = numpy_clone_loss(params, state, batch, key, cfg)
    assert {*chosen.ravel()} == {0, 1, 2}
    np.testing.assert_allclose([loss, metrics["clone_loss"]], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["clone_log_prob"], log_prob, rtol=1e-4)
    np.testing.assert_allclose(metrics["clone_entropy"], entropy, rtol=1e-4)
    for direction in directions(params, 2):
        expected = slope(
            lambda p: numpy_clone_loss(p, state, batch, key, cfg, chosen)[0], params, direction
        )
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=2e-3, atol=1e-3)


# --- By hand ------------------------------------------------------------------------------------
def test_the_mixture_is_a_density_and_its_samples_follow_it():
    logits = np.log(np.float32([[[0.5, 0.3, 0.2]]]))
    mean, log_std = np.float32([[[-1.0, 0.3, 1.2]]]), np.log(np.float32([[[0.2, 0.1, 0.3]]]))
    x = np.linspace(-4, 4, 4001, dtype=np.float32)
    wide = [np.broadcast_to(part, (len(x), 1, 3)) for part in (logits, mean, log_std)]
    density = np.exp(jax.jit(fisher_brc.mixture_log_prob)(np.tanh(x)[:, None], *wide))
    np.testing.assert_allclose(np.trapezoid(density, np.tanh(x)), 1, rtol=1e-3)
    many = [np.broadcast_to(part, (20_000, 1, 3)) for part in (logits, mean, log_std)]
    drawn = np.asarray(jax.jit(fisher_brc.sample_mixture)(*many, jax.random.key(0)))[:, 0]
    np.testing.assert_allclose(drawn.mean(), 0.5 * -1.0 + 0.3 * 0.3 + 0.2 * 1.2, atol=0.02)
    for edge in (-0.5, 0.3, 0.7):
        below = np.trapezoid(np.where(x < edge, density, 0), np.tanh(x))
        np.testing.assert_allclose((drawn < edge).mean(), below, atol=0.015)


def test_the_temperature_loss_by_hand():
    params = {"log": jnp.float32(np.log(2.0))}
    loss = jax.value_and_grad(fisher_brc.temperature_loss)
    found, grads = loss(params, 5.0, 3)  # entropy 5, target -3
    np.testing.assert_allclose([found, grads["log"]], [16, 16], rtol=1e-6)


# --- What the losses may depend on --------------------------------------------------------------
def test_termination_stops_the_bootstrap_and_truncation_does_not():
    cfg, state, key, data = setup(**SETTINGS)
    nets.check_bootstrap(
        lambda b: critic_loss(state.critic.params, state, b, key, cfg)[1]["td_error"], data
    )


def test_losses_read_only_the_networks_they_should():
    cfg, state, key, data = setup(**SETTINGS)
    other = nets.shaken(state, seed=4)
    targets = state.critic.replace(target_params=other.critic.target_params)
    networks = state.critic.replace(params=other.critic.params)

    def critic(**changed):
        params = state.critic.params
        return critic_loss(params, state._replace(**changed), data, key, cfg)[0]

    def actor(**changed):
        return actor_loss(state.actor.params, state._replace(**changed), data, key, cfg)[0]

    here = critic()
    assert here not in (critic(critic=targets), critic(actor=other.actor))
    assert critic(behaviour=other.behaviour) != here
    assert critic(critic=networks) == here == critic(log_temperature=other.log_temperature)
    here = actor()
    assert here not in (actor(critic=networks), actor(behaviour=other.behaviour))
    assert actor(log_temperature=other.log_temperature) != here
    assert actor(critic=targets) == here == actor(actor=other.actor)
    assert actor(clone_temperature=other.clone_temperature) == here


# --- Networks and policy ------------------------------------------------------------------------
def test_initial_parameters():
    """Orthogonal, times sqrt 2 in hidden layers and 0.01 in the last; biases 0."""
    cfg = probes.config(fisher_brc, hidden=(64, 96), behaviour_hidden=(64, 96), num_critics=3)
    data = probes.random_transitions(observation_dim=16)
    state = jax.jit(functools.partial(fisher_brc.create_state, cfg=cfg))(jax.random.key(0), data)
    sizes = {"actor": (16, 64, 96, 4), "behaviour": (16, 64, 96, 30), "critic": (18, 64, 96, 1)}
    for name, widths in sizes.items():
        layers = dict(getattr(state, name).params["params"])
        head = np.asarray(layers.pop("Dense_2")["kernel"]).reshape(-1, 96, widths[-1])
        for matrix in head:
            np.testing.assert_allclose(matrix.T @ matrix, 1e-4 * np.eye(widths[-1]), atol=1e-8)
        nets.check_orthogonal_init({"params": layers}, widths[:-1])
    nets.check_members_differ(state.critic)
    nets.check_targets_are_copies(state.critic)
    assert state.log_temperature.params == state.clone_temperature.params == {"log": 0.0}


def test_the_policy_is_tanh_of_the_mean():
    cfg, state, key, data = setup()
    act = jax.jit(fisher_brc.policy_fn(state, cfg))
    action = act(fisher_brc.policy_params(state), data.observation, key)
    mean = nets.mlp(double(state.actor.params), double(data).observation)[:, :2]
    np.testing.assert_allclose(action, np.tanh(mean), rtol=1e-4, atol=1e-5)


# --- Phases -------------------------------------------------------------------------------------
def test_each_phase_trains_its_own_networks():
    cfg, state, key, data = setup(log_every=2, clone_updates=2)
    clone = jax.jit(fisher_brc.clone_chunk, static_argnums=4)
    cloned, metrics = clone(state, jax.random.clone(key), 0, data, cfg)
    trained, more = nets.train_chunk(fisher_brc, cloned, key, 2, data, cfg)
    for name in state._fields:
        before, between, after = (getattr(x, name).params for x in (state, cloned, trained))
        same = all(map(np.array_equal, probes.leaves(before), probes.leaves(between)))
        assert same == (name in ("actor", "critic", "log_temperature")), name
        same = all(map(np.array_equal, probes.leaves(between), probes.leaves(after)))
        assert same == (name in ("behaviour", "clone_temperature")), name
    assert {*metrics} == {"clone_loss", "clone_log_prob", "clone_entropy", "clone_temperature"}
    names = "critic_loss td_error gradient_loss q log_mu actor_loss entropy temperature"
    assert {*more} == {*names.split()}


@pytest.mark.parametrize("name", ["behaviour", "clone_temperature"])
def test_learning_rate_of_the_cloning(name):
    """It falls to a tenth after 80 % of the cloning, and to a hundredth after 90 %."""
    _, state, _, _ = setup(clone_updates=10, clone_learning_rate=0.5)
    rates = [0.5] * 8 + [0.05, 0.005]
    nets.check_rate(getattr(state, name), rates.__getitem__, steps=10)

# SPDX-License-Identifier: Apache-2.0
"""SPOT's losses, networks, phases and decay against NumPy in float64 and hand-worked numbers."""

import functools
import inspect

import jax
import numpy as np
import numpy_nets as nets
import probes
import pytest
from numpy_nets import directions, dot, double, slope

from algorithms import spot, td3_bc

critic_loss = nets.compiled(spot.critic_loss)
actor_loss = nets.compiled(spot.actor_loss)
vae_loss = nets.compiled(spot.vae_loss)
setup = functools.partial(nets.setup, spot, vae_hidden=(12, 8))


# --- The method in NumPy ------------------------------------------------------------------------
def numpy_negative_elbo(params, observation, action, noise, cfg):
    """Of each row: mean squared error of the decoded action + beta KL, a mean over the latent."""
    layers = params["params"]
    code = nets.mlp({"params": layers["encoder"]}, np.concatenate([observation, action], axis=-1))
    mean, log_std = np.split(code, 2, axis=-1)
    std = np.exp(np.clip(log_std, -4, 15))
    inputs = np.concatenate([observation, mean + std * noise], axis=-1)
    decoded = np.tanh(nets.mlp({"params": layers["decoder"]}, inputs))
    kl = 0.5 * (std**2 + mean**2 - 1 - np.log(std**2))
    return ((decoded - action) ** 2).mean(axis=-1) + cfg.kl_weight * kl.mean(axis=-1)


def numpy_vae_loss(params, state, batch, noise, cfg):
    return numpy_negative_elbo(params, batch.observation, batch.action, noise[0], cfg).mean()


def numpy_actor_loss(params, state, batch, noise, cfg, q_scale=None):
    """`q_scale` is mean |Q_1| at the params whose gradient is taken: it gets none."""
    action = nets.tanh_actor(params, batch.observation)
    q = nets.critics(double(state.critic.params), batch.observation, action)[0]
    q_scale = np.abs(q).mean() if q_scale is None else q_scale
    vae = double(state.vae.params)
    samples = [numpy_negative_elbo(vae, batch.observation, action, x, cfg) for x in noise]
    return cfg.density_weight * np.mean(samples) - q.mean() / q_scale, q_scale


def noise_of(key, samples=1):
    """Latent noise of the 32 rows, of two actions and so four latents: [N, 32, 4]."""
    shape = (samples, 32, 4)
    return double(jax.random.normal(jax.random.clone(key), shape))


@pytest.mark.parametrize("overrides", [{}, {"kl_weight": 0.8}], ids=str)
def test_vae_loss_and_gradient_equal_numpy(overrides):
    cfg, state, key, data = setup(**overrides)
    batch, params = double(data), double(state.vae.params)
    noise = double(jax.random.normal(jax.random.clone(key), (32, 4)))[None]
    loss, metrics, grads = vae_loss(state.vae.params, state, data, key, cfg)
    expected = numpy_vae_loss(params, state, batch, noise, cfg)
    np.testing.assert_allclose([loss, metrics["vae_loss"]], expected, rtol=1e-4)
    total = metrics["reconstruction_mse"] + cfg.kl_weight * metrics["kl"]
    np.testing.assert_allclose(loss, total, rtol=1e-4)
    for direction in directions(params, 3):
        expected = slope(lambda p: numpy_vae_loss(p, state, batch, noise, cfg), params, direction)
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("overrides", [{"density_weight": 0.5}, {"num_samples": 3}], ids=str)
def test_actor_loss_and_gradient_equal_numpy(overrides):
    """The gradient goes through the action into Q, encoder and decoder; none into mean |Q|."""
    cfg, state, key, data = setup(**overrides)
    batch, params, noise = double(data), double(state.actor.params), noise_of(key, cfg.num_samples)
    loss, metrics, grads = actor_loss(state.actor.params, state, data, key, cfg)
    expected, q_scale = numpy_actor_loss(params, state, batch, noise, cfg)
    np.testing.assert_allclose([loss, metrics["actor_loss"]], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["density_weight"], cfg.density_weight)
    for direction in directions(params, 3):
        expected = slope(
            lambda p: numpy_actor_loss(p, state, batch, noise, cfg, q_scale)[0], params, direction
        )
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=2e-3, atol=1e-3)


def test_elbo_by_hand():
    """Latent mean 3, std 1/2 and a decoder that says 0.25: KL = (1/4 + 9 - 1 + 2 log 2) / 2."""

    def vae(params, observation, action, key):
        shape = (*action.shape[:-1], 2)
        return 0.25 + 0 * action, np.full(shape, 3.0), np.full(shape, np.log(0.5))

    batch = probes.random_transitions(2, 1, 2, action=[[0.75, 0.25], [0.25, 0.25]])
    mse, kl = spot.negative_elbo(None, vae, batch.observation, batch.action, None)
    np.testing.assert_allclose(mse, [0.125, 0], rtol=1e-6)
    np.testing.assert_allclose(kl, (8.25 + 2 * np.log(2)) / 2, rtol=1e-6)


def test_the_critics_are_those_of_td3_bc():
    for name in ("critic_loss", "update_target", "sample_batch", "mean_metrics"):
        assert inspect.getsource(getattr(spot, name)) == inspect.getsource(getattr(td3_bc, name))


# --- What the losses may depend on --------------------------------------------------------------
def test_termination_stops_the_bootstrap_and_truncation_does_not():
    cfg, state, key, data = setup()
    nets.check_bootstrap(lambda b: critic_loss(state.critic.params, state, b, key, cfg)[0], data)


def test_losses_read_only_the_networks_they_should():
    cfg, state, key, data = setup()
    other = nets.shaken(state, seed=4)
    networks = {
        "actor": state.actor.replace(params=other.actor.params),
        "critic": state.critic.replace(params=other.critic.params),
        "vae": other.vae,
    }
    targets = {
        "actor": state.actor.replace(target_params=other.actor.target_params),
        "critic": state.critic.replace(target_params=other.critic.target_params),
    }
    cases = [  # the loss, its own network, networks and targets that it reads beside it
        (critic_loss, "critic", set(), {"actor", "critic"}),
        (actor_loss, "actor", {"critic", "vae"}, set()),
        (vae_loss, "vae", set(), set()),
    ]
    for loss, own, read, read_targets in cases:
        params = getattr(state, own).params
        here = loss(params, state, data, key, cfg)[0]
        for changes, wanted in ((networks, read), (targets, read_targets)):
            for name, net in changes.items():
                changed = loss(params, state._replace(**{name: net}), data, key, cfg)[0]
                assert (changed != here) == (name in wanted), (own, name)


# --- Networks -----------------------------------------------------------------------------------
def test_initial_state():
    """Small last layers of actor and critics; PyTorch's initialisation of all others."""
    state = nets.fresh(spot)
    nets.check_members_differ(state.critic)
    for net, bound in ((state.actor, 1e-3), (state.critic, 3e-3)):
        nets.check_targets_are_copies(net)
        head = net.params["params"]["Dense_2"]
        for x in head.values():
            assert 0.2 * bound < np.abs(np.asarray(x)).max() <= bound
        for name in ("Dense_0", "Dense_1"):
            kernel = np.asarray(net.params["params"][name]["kernel"])
            assert 0.9 < np.abs(kernel).max() * kernel.shape[-2] ** 0.5 <= 1
    vae = state.vae.params["params"]
    nets.check_uniform_init({"params": vae["encoder"]}, (16 + 2, 64, 64, 8))
    nets.check_uniform_init({"params": vae["decoder"]}, (16 + 4, 64, 64, 2))


def test_exploration_adds_noise_and_clips():
    cfg, state, key, data = setup(exploration_noise=0.4)
    explore = functools.partial(spot.explore, state.actor.apply_fn, cfg=cfg)
    found = jax.jit(explore)(spot.policy_params(state), data.observation, key)
    action = nets.tanh_actor(double(state.actor.params), double(data).observation)
    noise = double(jax.random.normal(jax.random.clone(key), (32, 2)))
    np.testing.assert_allclose(found, np.clip(action + 0.4 * noise, -1, 1), rtol=1e-3, atol=1e-4)
    assert (np.abs(found) == 1).any()


# --- Update -------------------------------------------------------------------------------------
RATES = {"actor_learning_rate": 0.02, "critic_learning_rate": 0.05, "vae_learning_rate": 0.03}


def run(chunk, state, key, start, data, cfg):
    program = jax.jit(chunk, static_argnums=4)
    return program(state, jax.random.clone(key), start, data, cfg)


def test_the_first_phase_trains_the_vae_alone():
    cfg, state, key, data = setup(log_every=2, clone_updates=2, **RATES)
    here, adam, losses = state, nets.Adam(0.03), []
    for step in (0, 1):
        batch, key_vae = nets.sample(key, step, data, cfg, 2)
        loss, _, grads = vae_loss(here.vae.params, here, batch, key_vae, cfg)
        here = here._replace(vae=here.vae.replace(params=adam.step(here.vae.params, grads)))
        losses.append(loss)
    after, metrics = run(spot.clone_chunk, state, key, 0, data, cfg)
    nets.check_close(after.vae.params, here.vae.params)
    np.testing.assert_allclose(metrics["vae_loss"], np.mean(losses), rtol=1e-3)
    for name in ("actor", "critic"):
        nets.check_close(getattr(after, name).params, getattr(state, name).params, 0, 0)


def expected_update(state, key, data, cfg, target_rate):
    """State and losses after steps 6 and 7: critic, critic, actor, targets."""
    adam = {"actor": nets.Adam(0.02), "critic": nets.Adam(0.05)}
    losses = []
    for step in (6, 7):
        batch, key_noise, key_actor = nets.sample(key, step, data, cfg, 3)
        loss, _, grads = critic_loss(state.critic.params, state, batch, key_noise, cfg)
        params = adam["critic"].step(state.critic.params, grads)
        state = state._replace(critic=state.critic.replace(params=params))
        losses.append(loss)
    loss, _, grads = actor_loss(state.actor.params, state, batch, key_actor, cfg)
    params = adam["actor"].step(state.actor.params, grads)
    state = state._replace(actor=state.actor.replace(params=params))
    for name in ("actor", "critic"):
        net = getattr(state, name)
        target = nets.polyak(net.params, net.target_params, target_rate)
        state = state._replace(**{name: net.replace(target_params=target)})
    return state, {"critic_loss": np.mean(losses), "actor_loss": loss}


@pytest.mark.parametrize("phase", ["offline", "online"])
def test_order_of_an_update(phase):
    """Online, gamma is another and lambda has decayed: step 8 of 16, so 1 - (8 - 4) / 16."""
    numbers = {"density_weight": 2.0, "discount": 0.7, "num_updates": 4, "log_every": 2}
    here_numbers = dict(numbers)
    if phase == "online":
        here_numbers |= {"density_weight": 2.0 * 0.75, "discount": 0.9}
    settings = {"penalty_decay_updates": 16, "online_discount": 0.9, "target_rate": 0.3}
    cfg, state, key, data = setup(**numbers, **settings, **RATES)
    cfg_here, here, _, _ = setup(**here_numbers, **settings, **RATES)
    here, losses = expected_update(here, key, data, cfg_here, 0.3)
    chunk = spot.train_chunk if phase == "offline" else spot.online_chunk
    after, metrics = run(chunk, state, key, 6, data, cfg)
    for name in ("actor", "critic"):
        nets.check_close(getattr(after, name).params, getattr(here, name).params)
        nets.check_close(getattr(after, name).target_params, getattr(here, name).target_params)
    nets.check_close(after.vae.params, state.vae.params, 0, 0)
    np.testing.assert_allclose(metrics["density_weight"], cfg_here.density_weight, rtol=1e-6)
    for name, expected in losses.items():
        np.testing.assert_allclose(metrics[name], expected, rtol=1e-3, atol=1e-4)


def test_lambda_decays_to_its_floor():
    cfg, state, key, data = setup(
        num_updates=4, log_every=2, penalty_decay_updates=16, penalty_floor=0.5, density_weight=2.0
    )
    program = jax.jit(spot.online_chunk, static_argnums=4)
    for start, expected in ((4, 2 * (1 - 2 / 16)), (10, 2 * 0.5), (30, 2 * 0.5)):
        _, metrics = program(state, jax.random.clone(key), start, data, cfg)
        np.testing.assert_allclose(metrics["density_weight"], expected, rtol=1e-6)


def test_new_optimisers_forget_and_networks_stay():
    cfg, state, key, data = setup(log_every=2, clone_updates=2, **RATES)
    state, _ = run(spot.train_chunk, state, key, 2, data, cfg)
    new = spot.with_new_optimisers(state)
    for name in ("actor", "critic"):
        before, after = getattr(state, name), getattr(new, name)
        assert before.params is after.params and before.target_params is after.target_params
        assert any(np.asarray(x).any() for x in jax.tree.leaves(before.opt_state))
        assert not any(np.asarray(x).any() for x in jax.tree.leaves(after.opt_state))
    assert new.vae is state.vae


def test_learning_rates():
    _, state, _, _ = setup(**RATES)
    for name, rate in (("actor", 0.02), ("critic", 0.05), ("vae", 0.03)):
        nets.check_rate(getattr(state, name), lambda step, rate=rate: rate)

# SPDX-License-Identifier: Apache-2.0
"""ReBRAC's losses, networks and update against NumPy in float64 and hand-worked numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_nets as nets
import optax
import probes
import pytest
from numpy_nets import directions, dot, double, slope

from algorithms import rebrac

# Compiled as wholes: op by op every shape costs a compilation of its own.
compiled_critic_loss = jax.jit(rebrac.critic_loss, static_argnums=4)
compiled_actor_loss = jax.jit(rebrac.actor_loss, static_argnums=3)
critic_grads = jax.jit(jax.grad(rebrac.critic_loss, has_aux=True), static_argnums=4)
actor_grads = jax.jit(jax.grad(rebrac.actor_loss, has_aux=True), static_argnums=3)
setup = functools.partial(nets.setup, rebrac)


# --- The method in NumPy ------------------------------------------------------------------------
def numpy_critic_loss(params, state, batch, noise, cfg):
    noise = np.clip(cfg.target_noise * noise, -cfg.target_noise_clip, cfg.target_noise_clip)
    action = nets.tanh_actor(double(state.actor.target_params), batch.next_observation)
    action = np.clip(action + noise, -1, 1)
    q = nets.critics(double(state.critic.target_params), batch.next_observation, action)
    loss = 0.0
    predicted = nets.critics(params, batch.observation, batch.action)
    for i in range(len(batch.reward)):
        penalty = sum((action[i, j] - batch.next_action[i, j]) ** 2 for j in range(action.shape[1]))
        target = cfg.reward_scale * batch.reward[i]
        if not batch.termination[i]:
            target += cfg.discount * (min(q[:, i]) - cfg.critic_penalty * penalty)
        loss += sum((predicted[k, i] - target) ** 2 for k in range(len(q))) / len(batch.reward)
    return loss, predicted.mean()


def numpy_actor_loss(params, state, batch, cfg, scale=None):
    """`scale`: mean |Q|, a constant for the gradient; None computes it here."""
    action = nets.tanh_actor(params, batch.observation)
    q = nets.critics(double(state.critic.params), batch.observation, action).min(axis=0)
    scale = np.abs(q).mean() if scale is None else scale
    penalty = ((action - batch.action) ** 2).sum(axis=-1)
    return (cfg.actor_penalty * penalty - q / scale).mean(), penalty.mean(), scale


VARIANTS = [
    {},
    {"critic_penalty": 0.3, "actor_penalty": 0.02, "discount": 0.7},
    {"reward_scale": 100.0, "critic_penalty": 0.0},
    {"target_noise": 2.0, "target_noise_clip": 0.1},
    {"num_critics": 3, "hidden": (8, 12, 16)},
]


@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_losses_equal_numpy(overrides):
    cfg, state, key, data = setup(**overrides)
    batch = double(data)
    noise = np.asarray(jax.random.normal(key, batch.action.shape), np.float64)
    loss, metrics = compiled_critic_loss(
        state.critic.params, state, data, jax.random.clone(key), cfg
    )
    expected, q = numpy_critic_loss(double(state.critic.params), state, batch, noise, cfg)
    np.testing.assert_allclose(loss, expected, rtol=2e-5)
    np.testing.assert_allclose(metrics["critic_loss"], expected, rtol=2e-5)
    np.testing.assert_allclose(metrics["q"], q, rtol=1e-4)

    loss, metrics = compiled_actor_loss(state.actor.params, state, data, cfg)
    expected, penalty, _ = numpy_actor_loss(double(state.actor.params), state, batch, cfg)
    np.testing.assert_allclose(loss, expected, rtol=2e-5)
    np.testing.assert_allclose(metrics["actor_loss"], expected, rtol=2e-5)
    np.testing.assert_allclose(metrics["behaviour_penalty"], penalty, rtol=2e-5)


# --- By hand ------------------------------------------------------------------------------------
linear_state = functools.partial(nets.linear_td3, rebrac)


def test_critic_loss_by_hand():
    state = linear_state([9.0, 9.0], [0.5, 0.25], [1.0, -1.0], [2.0, 4.0])
    batch = probes.random_transitions(
        3,
        1,
        2,
        action=[[1, 1], [0.5, 0.5], [0, 0]],  # sums 2, 1, 0
        reward=[1, 0, 2],
        next_observation=[[1], [-1], [1]],
        next_action=[[0.5, -0.75], [-0.5, 0.25], [-1, -1]],
        termination=[0, 0, 1],
    )
    cfg = rebrac.Config(discount=0.5, reward_scale=10.0, critic_penalty=0.5, target_noise=0.0)
    # row                      1               2                  3
    # next action        (0.5, 0.25)    (-0.5, -0.25)       not used: the end
    # target Q            1.5, 3         -1.5, -3
    # their minimum       1.5            -3
    # penalty             0 + 1 = 1      0 + 0.25 = 0.25
    # minus half of it    1              -3.125
    # target     10 + 0.5 * 1 = 10.5     0 - 0.5 * 3.125 = -1.5625     20
    # Q_1                 2              1                  0
    # Q_2                -2              -1                 0
    # (Q_1 - target)^2    72.25          6.56640625         400      sum 478.81640625
    # (Q_2 - target)^2    156.25         0.31640625         400      sum 556.56640625
    loss, metrics = compiled_critic_loss(state.critic.params, state, batch, jax.random.key(0), cfg)
    np.testing.assert_allclose(loss, (478.81640625 + 556.56640625) / 3, rtol=1e-6)
    assert metrics["q"] == 0.0


def test_actor_loss_by_hand():
    state = linear_state([0.5, -0.25], [9.0, 9.0], [2.0, 4.0], [9.0, 9.0])
    batch = probes.random_transitions(
        3,
        1,
        2,
        observation=[[1], [2], [-2]],
        action=[[0.5, 0.75], [0, -0.5], [-1, 0]],
    )
    # row              1               2              3
    # pi(s)        (0.5, -0.25)    (1, -0.5)      (-1, 0.5)
    # Q_1, Q_2      0.5, 1          1, 2           -1, -2
    # minimum       0.5             1              -2             mean -1/6, mean |Q| 7/6
    # penalty       1               1              0.25           mean 0.75
    loss, metrics = compiled_actor_loss(
        state.actor.params, state, batch, rebrac.Config(actor_penalty=2.0)
    )
    np.testing.assert_allclose(loss, 2 * 0.75 + 1 / 7, rtol=1e-6)
    np.testing.assert_allclose(metrics["behaviour_penalty"], 0.75, rtol=1e-6)


@pytest.mark.parametrize("policy_action", [0.0, 0.8])
def test_target_noise_is_clipped_and_so_is_the_noisy_action(policy_action):
    cfg = rebrac.Config(target_noise=1e6, critic_penalty=0.0, num_critics=1)
    nets.check_target_noise(compiled_critic_loss, linear_state, cfg, policy_action)


# --- What the losses may depend on --------------------------------------------------------------
def loss_with(state, data, cfg, **columns):
    rows = {name: jnp.full_like(getattr(data, name), value) for name, value in columns.items()}
    batch, key = data._replace(**rows), jax.random.key(5)
    return float(compiled_critic_loss(state.critic.params, state, batch, key, cfg)[0])


def test_termination_stops_the_bootstrap_and_truncation_does_not():
    cfg, state, _, data = setup()
    for termination in (0.0, 1.0):
        fixed = {"termination": termination}
        here = loss_with(state, data, cfg, **fixed)
        assert here == loss_with(state, data, cfg, **fixed, truncation=0.0)
        assert here == loss_with(state, data, cfg, **fixed, truncation=1.0)
        for changed in ({"next_observation": 0.5}, {"next_action": 0.5}):
            elsewhere = loss_with(state, data, cfg, **fixed, **changed)
            assert (elsewhere == here) == (termination == 1.0)
    assert loss_with(state, data, cfg, termination=1.0) != loss_with(
        state, data, cfg, termination=0.0
    )


def test_losses_read_only_the_networks_they_should():
    cfg, state, _, data = setup()
    other = nets.shaken(state, seed=4)

    def critic(params, actor, actor_target, critic, critic_target):
        nets = rebrac.State(
            state.actor.replace(params=actor.params, target_params=actor_target.target_params),
            state.critic.replace(params=critic.params, target_params=critic_target.target_params),
        )
        return float(compiled_critic_loss(params, nets, data, jax.random.key(5), cfg)[0])

    a, b, c, d = state.actor, other.actor, state.critic, other.critic
    here = critic(c.params, a, a, c, c)
    assert critic(c.params, b, a, d, c) == here  # neither the actor nor state.critic.params
    assert critic(d.params, a, a, c, c) != here
    assert critic(c.params, a, b, c, c) != here
    assert critic(c.params, a, a, c, d) != here

    def actor(params, actor, critic):
        return float(compiled_actor_loss(params, rebrac.State(actor, critic), data, cfg)[0])

    here = actor(a.params, a, c)
    assert actor(a.params, b, c) == here
    assert actor(a.params, a, c.replace(target_params=d.target_params)) == here
    assert actor(b.params, a, c) != here
    assert actor(a.params, a, d) != here


def test_critic_gradient_takes_the_target_as_a_number():
    cfg, state, key, data = setup()
    batch, params = double(data), double(state.critic.params)
    noise = np.asarray(jax.random.normal(key, batch.action.shape), np.float64)
    grads, _ = critic_grads(state.critic.params, state, data, jax.random.clone(key), cfg)
    for direction in directions(params):
        expected = slope(
            lambda p: numpy_critic_loss(p, state, batch, noise, cfg)[0], params, direction
        )
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=1e-3)


def test_actor_gradient_takes_the_q_scale_as_a_number():
    cfg, state, _, data = setup()
    batch, params = double(data), double(state.actor.params)
    grads, _ = actor_grads(state.actor.params, state, data, cfg)
    scale = numpy_actor_loss(params, state, batch, cfg)[2]
    distinct = []
    for direction in directions(params):
        constant = slope(
            lambda p: numpy_actor_loss(p, state, batch, cfg, scale)[0], params, direction
        )
        moving = slope(lambda p: numpy_actor_loss(p, state, batch, cfg)[0], params, direction)
        np.testing.assert_allclose(dot(grads, direction), constant, rtol=1e-3)
        distinct.append(abs(moving - constant) > 0.02 * abs(constant))
    assert any(distinct)  # else this test could not tell


# --- Networks -----------------------------------------------------------------------------------
@functools.cache
def fresh():
    cfg = probes.config(rebrac, hidden=(64, 96), num_critics=3)
    return probes.start(rebrac, probes.random_transitions(observation_dim=16), cfg)[0]


def test_layer_norm_is_in_the_critics_only():
    state = fresh()
    assert sorted(state.actor.params["params"]) == ["Dense_0", "Dense_1", "Dense_2"]
    norms = ["LayerNorm_0", "LayerNorm_1"]
    assert sorted(state.critic.params["params"]) == ["Dense_0", "Dense_1", "Dense_2", *norms]


def test_layer_norm_follows_the_relu():
    _, state, _, data = setup()
    params, batch = double(state.critic.params), double(data)
    q = np.asarray(state.critic.apply_fn(state.critic.params, data.observation, data.action))
    np.testing.assert_allclose(
        q, nets.critics(params, batch.observation, batch.action), rtol=1e-4, atol=1e-5
    )
    layers = jax.tree.map(lambda x: x[0], params["params"])
    x = np.concatenate([batch.observation, batch.action], axis=-1)
    for i in range(2):
        x = np.maximum(
            nets.layer_norm(layers[f"LayerNorm_{i}"], nets.dense(layers[f"Dense_{i}"], x)), 0
        )
    assert np.abs(q[0] - nets.dense(layers["Dense_2"], x)[..., 0]).max() > 0.1


@pytest.mark.parametrize(
    ("net", "head_bound", "inputs"), [("actor", 1e-3, 16), ("critic", 3e-3, 16 + 2)]
)
def test_initial_parameters(net, head_bound, inputs):
    layers = getattr(fresh(), net).params["params"]
    for name, fan_in in (("Dense_0", inputs), ("Dense_1", 64)):
        kernel, bound = np.asarray(layers[name]["kernel"]), fan_in**-0.5
        assert kernel.shape[-2] == fan_in
        assert 0.98 * bound < np.abs(kernel).max() <= bound
        np.testing.assert_allclose(kernel.std(), bound / 3**0.5, rtol=0.05)  # uniform
        assert (np.asarray(layers[name]["bias"]) == np.float32(0.1)).all()
    head = layers["Dense_2"]
    assert 0.9 * head_bound < np.abs(head["kernel"]).max() <= head_bound
    assert 0 < np.abs(head["bias"]).max() <= head_bound
    if net == "critic":
        for name in ("LayerNorm_0", "LayerNorm_1"):
            assert (np.asarray(layers[name]["scale"]) == 1).all()
            assert (np.asarray(layers[name]["bias"]) == 0).all()


def test_members_of_the_ensemble_differ():
    state = fresh()
    for name in ("Dense_0", "Dense_1", "Dense_2"):
        kernel = np.asarray(state.critic.params["params"][name]["kernel"])
        assert len(kernel) == 3
        for i, j in ((0, 1), (0, 2), (1, 2)):
            assert not np.isclose(kernel[i], kernel[j]).any(axis=0).all()
    data = probes.random_transitions(observation_dim=16)
    q = np.asarray(state.critic.apply_fn(state.critic.params, data.observation, data.action))
    assert q.shape == (3, 32) and (np.ptp(q, axis=0) > 0).all()


def test_targets_start_as_copies():
    for net in fresh():
        nets.check_targets_are_copies(net)


# --- Update -------------------------------------------------------------------------------------
def test_order_of_one_update():
    """Critic, targets after the new critic and the old actor, actor; then a critic alone."""
    # Large steps, so that another order would show.
    rates = {"actor_learning_rate": 0.05, "critic_learning_rate": 0.1, "target_rate": 0.3}
    cfg, state, key, data = setup(hidden=(8,), **rates)
    actor_adam, critic_adam = optax.adam(0.05), optax.adam(0.1)
    actor, actor_target = state.actor.params, state.actor.target_params
    critic, critic_target = state.critic.params, state.critic.target_params
    actor_memory, critic_memory = actor_adam.init(actor), critic_adam.init(critic)

    def now():
        return rebrac.State(
            state.actor.replace(params=actor, target_params=actor_target),
            state.critic.replace(params=critic, target_params=critic_target),
        )

    def sample(step):
        key_batch, key_noise = jax.random.split(jax.random.fold_in(key, step))
        index = jax.random.randint(key_batch, (cfg.batch_size,), 0, len(data.reward))
        return jax.tree.map(lambda x: x[index], data), key_noise

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def descend(adam, loss, params, memory, *arguments):
        grads, _ = jax.grad(functools.partial(loss, cfg=cfg), has_aux=True)(params, *arguments)
        changes, memory = adam.update(grads, memory)
        return optax.apply_updates(params, changes), memory

    def follow(params, target):
        return jax.tree.map(lambda x, t: 0.3 * x + 0.7 * t, params, target)

    batch, key_noise = sample(6)
    critic, critic_memory = descend(
        critic_adam, rebrac.critic_loss, critic, critic_memory, now(), batch, key_noise
    )
    critic_target = follow(critic, critic_target)
    actor_target = follow(actor, actor_target)
    actor, _ = descend(actor_adam, rebrac.actor_loss, actor, actor_memory, now(), batch)
    batch, key_noise = sample(7)
    critic, _ = descend(
        critic_adam, rebrac.critic_loss, critic, critic_memory, now(), batch, key_noise
    )

    after, _ = jax.jit(rebrac.update, static_argnums=4)(state, 6, key, data, cfg)
    for net, params, target in (
        (after.actor, actor, actor_target),
        (after.critic, critic, critic_target),
    ):
        for x, expected in zip(probes.leaves(net.params), probes.leaves(params), strict=True):
            np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-4)
        for x, expected in zip(
            probes.leaves(net.target_params), probes.leaves(target), strict=True
        ):
            np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-4)


def test_actor_and_targets_move_once_per_policy_delay():
    # With frozen networks the targets' way is a geometric series in the number of their moves.
    still = {"actor_learning_rate": 0.0, "critic_learning_rate": 0.0, "target_rate": 0.3}
    cfg, state, key, data = setup(policy_delay=3, log_every=6, hidden=(4,), **still)
    after, _ = jax.jit(rebrac.train_chunk, static_argnums=4)(state, key, 0, data, cfg)
    assert (after.critic.step, after.actor.step) == (6, 2)
    for old, new in zip(state, after, strict=True):
        for x, before, now in zip(
            *map(probes.leaves, (old.params, old.target_params, new.target_params)), strict=True
        ):
            np.testing.assert_allclose(now, x + (before - x) * 0.7**2, atol=1e-5)


def test_the_policy_is_the_actor():
    _, state, key, data = setup()
    params = rebrac.policy_params(state)
    assert params is state.actor.params
    action = rebrac.policy(state.actor.apply_fn, params, data.observation, key)
    expected = nets.tanh_actor(double(params), double(data).observation)
    np.testing.assert_allclose(action, expected, rtol=1e-4, atol=1e-6)
    assert action.shape == data.action.shape and np.abs(action).max() <= 1

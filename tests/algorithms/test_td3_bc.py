# SPDX-License-Identifier: Apache-2.0
"""TD3+BC's losses, networks and update against NumPy in float64 and hand-worked numbers."""

import functools

import jax
import numpy as np
import numpy_nets as nets
import probes
import pytest
from numpy_nets import directions, dot, double, slope

from algorithms import td3_bc

critic_loss = nets.compiled(td3_bc.critic_loss)
actor_loss = nets.compiled(td3_bc.actor_loss)
setup = functools.partial(nets.setup, td3_bc)


# --- The method in NumPy ------------------------------------------------------------------------
def numpy_critic_loss(params, state, batch, noise, cfg):
    noise = np.clip(cfg.target_noise * noise, -cfg.target_noise_clip, cfg.target_noise_clip)
    action = nets.tanh_actor(double(state.actor.target_params), batch.next_observation)
    action = np.clip(action + noise, -1, 1)
    q = nets.critics(double(state.critic.target_params), batch.next_observation, action)
    predicted, loss = nets.critics(params, batch.observation, batch.action), 0.0
    for i in range(len(batch.reward)):
        target = batch.reward[i] + cfg.reward_shift
        if not batch.termination[i]:
            target += cfg.discount * min(q[:, i])
        loss += sum((predicted[k, i] - target) ** 2 for k in range(len(q))) / len(batch.reward)
    return loss, predicted.mean()


def numpy_actor_loss(params, state, batch, cfg, scale=None):
    """`scale`: mean |Q_1|, a constant for the gradient; None computes it here."""
    action = nets.tanh_actor(params, batch.observation)
    q = nets.critics(double(state.critic.params), batch.observation, action)[0]
    scale = np.abs(q).mean() if scale is None else scale
    mse = np.mean((action - batch.action) ** 2)
    return mse - cfg.alpha / scale * q.mean(), mse, scale


VARIANTS = [
    {},
    {"alpha": 0.4, "discount": 0.7, "reward_shift": -1.0},
    {"target_noise": 2.0, "target_noise_clip": 0.1},
    {"num_critics": 3, "hidden": (8, 12, 16)},
]


@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_losses_equal_numpy(overrides):
    cfg, state, key, data = setup(**overrides)
    batch = double(data)
    noise = np.asarray(jax.random.normal(key, batch.action.shape), np.float64)
    loss, metrics, _ = critic_loss(state.critic.params, state, data, key, cfg)
    expected, q = numpy_critic_loss(double(state.critic.params), state, batch, noise, cfg)
    np.testing.assert_allclose([loss, metrics["critic_loss"]], expected, rtol=2e-5)
    np.testing.assert_allclose(metrics["q"], q, rtol=1e-4)

    loss, metrics, _ = actor_loss(state.actor.params, state, data, cfg)
    expected, mse, _ = numpy_actor_loss(double(state.actor.params), state, batch, cfg)
    np.testing.assert_allclose([loss, metrics["actor_loss"]], expected, rtol=2e-5)
    np.testing.assert_allclose(metrics["behaviour_mse"], mse, rtol=2e-5)


# --- By hand ------------------------------------------------------------------------------------
linear_state = functools.partial(nets.linear_td3, td3_bc, statistics=())


def test_critic_loss_by_hand():
    state = linear_state([9, 9], [0.5, 0.25], [1, -1], [2, 4])
    batch = probes.random_transitions(
        3,
        1,
        2,
        action=[[1, 1], [0.5, 0.5], [0, 0]],  # sums 2, 1, 0
        reward=[2, 0, 2],
        next_observation=[[1], [-1], [1]],
        termination=[0, 0, 1],
    )
    cfg = td3_bc.Config(discount=0.5, reward_shift=-1.0, target_noise=0.0)
    # row                      1               2                  3
    # next action        (0.5, 0.25)    (-0.5, -0.25)       not used: the end
    # target Q            1.5, 3         -1.5, -3
    # their minimum       1.5            -3
    # target      2 - 1 + 0.75 = 1.75   -1 - 1.5 = -2.5     2 - 1 = 1
    # Q_1                 2              1                  0
    # Q_2                -2              -1                 0
    # (Q_1 - target)^2    0.0625         12.25              1         sum 13.3125
    # (Q_2 - target)^2    14.0625        2.25               1         sum 17.3125
    loss, metrics, _ = critic_loss(state.critic.params, state, batch, jax.random.key(0), cfg)
    np.testing.assert_allclose(loss, (13.3125 + 17.3125) / 3, rtol=1e-6)
    assert metrics["q"] == 0.0


def test_actor_loss_by_hand():
    state = linear_state([0.5, -0.25], [9, 9], [2, -4], [9, 9])
    batch = probes.random_transitions(
        3, 1, 2, observation=[[1], [2], [-2]], action=[[0.5, 0.75], [0, -0.5], [-1, 0]]
    )
    # row                 1               2              3
    # pi(s)          (0.5, -0.25)     (1, -0.5)      (-1, 0.5)
    # Q_1                0.5              1             -1           mean 1/6, mean |Q_1| 5/6
    # (pi - a)^2        0, 1            1, 0         0, 0.25         mean of the six 0.375
    loss, metrics, _ = actor_loss(state.actor.params, state, batch, td3_bc.Config(alpha=2.0))
    np.testing.assert_allclose(loss, 0.375 - 2 / 5, rtol=1e-5)
    np.testing.assert_allclose(metrics["behaviour_mse"], 0.375, rtol=1e-6)


@pytest.mark.parametrize("policy_action", [0.0, 0.8])
def test_target_noise_is_clipped_and_so_is_the_noisy_action(policy_action):
    cfg = td3_bc.Config(target_noise=1e6, num_critics=1)
    nets.check_target_noise(critic_loss, linear_state, cfg, policy_action)


# --- What the losses may depend on --------------------------------------------------------------
def test_termination_stops_the_bootstrap_and_truncation_does_not():
    cfg, state, key, data = setup()
    nets.check_bootstrap(lambda b: critic_loss(state.critic.params, state, b, key, cfg)[0], data)


def test_losses_read_only_the_networks_they_should():
    cfg, state, key, data = setup()
    other = nets.shaken(state, seed=4)
    a, b, c, d = state.actor, other.actor, state.critic, other.critic

    def critic(params, actor, actor_target, critic, critic_target):
        read = state._replace(
            actor=actor.replace(target_params=actor_target.target_params),
            critic=critic.replace(target_params=critic_target.target_params),
        )
        return critic_loss(params, read, data, key, cfg)[0]

    here = critic(c.params, a, a, c, c)
    assert critic(c.params, b, a, d, c) == here  # neither the actor nor state.critic.params
    assert critic(d.params, a, a, c, c) != here
    assert critic(c.params, a, b, c, c) != here
    assert critic(c.params, a, a, c, d) != here

    def actor(params, actor, critic):
        return actor_loss(params, state._replace(actor=actor, critic=critic), data, cfg)[0]

    def with_member(k):
        return c.replace(params=jax.tree.map(lambda x, y: x.at[k].set(y[k]), c.params, d.params))

    here = actor(a.params, a, c)
    assert actor(a.params, b, c) == here
    assert actor(a.params, a, c.replace(target_params=d.target_params)) == here
    assert actor(b.params, a, c) != here
    assert actor(a.params, a, with_member(0)) != here
    assert actor(a.params, a, with_member(1)) == here  # Q_1 alone


def test_critic_gradient_takes_the_target_as_a_number():
    cfg, state, key, data = setup()
    batch, params = double(data), double(state.critic.params)
    noise = np.asarray(jax.random.normal(key, batch.action.shape), np.float64)
    _, _, grads = critic_loss(state.critic.params, state, data, key, cfg)
    for direction in directions(params):
        expected = slope(
            lambda p: numpy_critic_loss(p, state, batch, noise, cfg)[0], params, direction
        )
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=1e-3)


def test_actor_gradient_takes_the_q_scale_as_a_number():
    cfg, state, _, data = setup()
    batch, params = double(data), double(state.actor.params)
    _, _, grads = actor_loss(state.actor.params, state, data, cfg)
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
    return nets.fresh(td3_bc, statistics=(np.arange(16.0), np.arange(1.0, 17.0)))


def test_initial_parameters():
    nets.check_uniform_init(fresh().actor.params, (16, 64, 96, 2))
    nets.check_uniform_init(fresh().critic.params, (16 + 2, 64, 96, 1))
    nets.check_members_differ(fresh().critic)


def test_targets_start_as_copies():
    nets.check_targets_are_copies(fresh().actor)
    nets.check_targets_are_copies(fresh().critic)


# --- Observations -------------------------------------------------------------------------------
def test_normalise():
    nets.check_normalise(td3_bc)


def test_the_policy_normalises_by_the_statistics_of_the_state():
    mean, std = fresh().statistics
    assert mean.tolist() == [*range(16)] and std.tolist() == [*range(1, 17)]
    nets.check_policy_normalises(td3_bc, nets.tanh_actor)


def test_training_sees_normalised_observations_and_raw_rewards(monkeypatch, tmp_path):
    raw = probes.random_transitions(20, observation=5 + np.arange(60).reshape(20, 3))
    state, data = nets.handed_over(
        td3_bc, monkeypatch, tmp_path, raw, (1, 2), reward_shift=-1.0, seeds=(0, 1)
    )
    expected, (mean, std) = td3_bc.normalise(raw)
    nets.check_close(data, expected, atol=1e-6)
    for found, expected in zip(state.statistics, (mean, std), strict=True):
        nets.check_close(found, np.stack([expected] * 2), atol=1e-6)  # one per seed


# --- Update -------------------------------------------------------------------------------------
def test_order_of_two_updates():
    """Critic, critic, actor, targets of both; the actor on the batch of the last critic."""
    rates = {"actor_learning_rate": 0.02, "critic_learning_rate": 0.05, "target_rate": 0.3}
    cfg, state, key, data = setup(policy_delay=2, log_every=4, **rates)
    _, here, _, _ = setup()  # the same numbers, with the losses compiled already
    actor_adam, critic_adam = nets.Adam(0.02), nets.Adam(0.05)
    found = {"critic_loss": [], "q": [], "actor_loss": [], "behaviour_mse": []}
    for step in (6, 7, 8, 9):
        batch, key_noise = nets.sample(key, step, data, cfg, 2)
        _, metrics, grads = critic_loss(here.critic.params, here, batch, key_noise, cfg)
        params = critic_adam.step(here.critic.params, grads)
        here = here._replace(critic=here.critic.replace(params=params))
        if step in (7, 9):
            _, more, grads = actor_loss(here.actor.params, here, batch, cfg)
            params = actor_adam.step(here.actor.params, grads)
            here = here._replace(actor=here.actor.replace(params=params))
            for name in ("actor", "critic"):
                net = getattr(here, name)
                target = nets.polyak(net.params, net.target_params, 0.3)
                here = here._replace(**{name: net.replace(target_params=target)})
            metrics |= more
        for name, x in metrics.items():
            found[name].append(x)

    after, metrics = nets.train_chunk(td3_bc, state, key, 6, data, cfg)
    for name in ("actor", "critic"):
        nets.check_close(getattr(after, name).params, getattr(here, name).params)
        nets.check_close(getattr(after, name).target_params, getattr(here, name).target_params)
    nets.check_close(after.statistics, state.statistics, 0, 0)
    for name, numbers in found.items():
        np.testing.assert_allclose(metrics.pop(name), np.mean(numbers), rtol=1e-3)
    assert not metrics
    # The other steps leave even the memory of the actor's optimiser alone.
    assert (after.critic.step, after.actor.step) == (4, 2)
    count, first, second = jax.tree.leaves(after.actor.opt_state[0])[0], *moments(after.actor)
    assert count == 2
    expected = [actor_adam.memory[i] for i in range(len(first))]
    nets.check_close(first, [m for m, _ in expected], atol=1e-5)
    nets.check_close(second, [v for _, v in expected], atol=1e-5)


def moments(net):
    return jax.tree.leaves(net.opt_state[0].mu), jax.tree.leaves(net.opt_state[0].nu)


def test_learning_rates():
    _, state, _, _ = setup(actor_learning_rate=0.02, critic_learning_rate=0.05)
    nets.check_rate(state.actor, lambda step: 0.02)
    nets.check_rate(state.critic, lambda step: 0.05)

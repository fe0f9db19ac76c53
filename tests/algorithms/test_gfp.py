# SPDX-License-Identifier: Apache-2.0
"""GFP's losses, networks and update against NumPy in float64 and hand-worked numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_nets as nets
import probes
import pytest
from flax.training import train_state
from numpy_nets import directions, dot, double, slope

from algorithms import fql, gfp

critic_loss = nets.compiled(gfp.critic_loss)
actor_loss = nets.compiled(gfp.actor_loss)
flow_loss = nets.compiled(gfp.flow_loss)
guidance = jax.jit(gfp.guidance, static_argnums=3)
policy_value = jax.jit(gfp.policy_value, static_argnums=(3, 4))
setup = functools.partial(nets.setup, gfp, flow_steps=3)


def normal(key, shape):
    return np.asarray(jax.random.normal(jax.random.clone(key), shape), np.float64)


# --- The method in NumPy ------------------------------------------------------------------------
def one_q(critic_params, observation, action, cfg):
    """[B]"""
    q = nets.gelu_critics(critic_params, observation, np.clip(action, -1, 1))
    return q.min(axis=0) if cfg.q_agg == "min" else q.sum(axis=0) / len(q)


def numpy_policy_value(state, observation, noise, agg, cfg):
    target = double(state.critic.target_params)
    of_actor = one_q(
        target, observation, nets.gelu_net(double(state.actor.params), observation, noise), cfg
    )
    action = nets.flow(double(state.flow.params), observation, noise, cfg.flow_steps)
    of_flow = one_q(target, observation, action, cfg)
    choices = {
        "actor": of_actor,
        "flow": of_flow,
        "min": np.minimum(of_actor, of_flow),
        "mean": 0.5 * of_actor + 0.5 * of_flow,
        "max": np.maximum(of_actor, of_flow),
    }
    return choices[agg]


def numpy_critic_loss(params, state, batch, noise, cfg):
    worth = numpy_policy_value(state, batch.next_observation, noise, cfg.target_agg, cfg)
    target = batch.reward + np.where(batch.termination == 1, 0.0, cfg.discount * worth)
    predicted = nets.gelu_critics(params, batch.observation, batch.action)
    return np.mean([(q - target) ** 2 for q in predicted]), predicted.mean()


def numpy_scale(state, batch, noise, cfg):
    """Mean |Q| of the actor's actions by the online critics."""
    action = nets.gelu_net(double(state.actor.params), batch.observation, noise)
    return np.abs(one_q(double(state.critic.params), batch.observation, action, cfg)).mean()


def numpy_actor_loss(params, state, batch, noise, cfg):
    """The scale of Q is that of the state's own actor: a constant for the gradient."""
    flow_action = nets.flow(double(state.flow.params), batch.observation, noise, cfg.flow_steps)
    action = nets.gelu_net(params, batch.observation, noise)
    distill_error = np.mean((action - flow_action) ** 2)
    q = one_q(double(state.critic.params), batch.observation, action, cfg)
    scale = numpy_scale(state, batch, noise, cfg) if cfg.normalize_q else 1.0
    return cfg.alpha * distill_error - q.mean() / scale, distill_error


def numpy_guidance(state, batch, noise, cfg):
    data_q = one_q(double(state.critic.target_params), batch.observation, batch.action, cfg)
    policy_q = numpy_policy_value(state, batch.observation, noise, cfg.guidance_agg, cfg)
    temperature = cfg.eta * numpy_scale(state, batch, noise, cfg)
    two = np.exp(np.stack([data_q, policy_q]) / temperature)
    return two[0] / two.sum(axis=0)


def numpy_flow_loss(params, batch, weight, noise, time):
    x = noise + time * (batch.action - noise)
    velocity = nets.gelu_net(params, batch.observation, x, time)
    loss = 0.0
    for i in range(len(weight)):
        loss += weight[i] * np.mean((velocity[i] - batch.action[i] + noise[i]) ** 2) / len(weight)
    return loss


def flow_draws(key, shape):
    """Noise and times of `flow_loss`."""
    key_noise, key_time = jax.random.split(jax.random.clone(key))
    noise = jax.random.normal(key_noise, shape)
    time = jax.random.uniform(key_time, (shape[0], 1))
    return np.asarray(noise, np.float64), np.asarray(time, np.float64)


@pytest.mark.parametrize(
    "overrides",
    [
        {"target_agg": "mean", "discount": 0.7},
        {"target_agg": "max", "q_agg": "min", "num_critics": 3, "hidden": (8, 12, 16)},
    ],
    ids=str,
)
def test_critic_loss_equals_numpy(overrides):
    cfg, state, key, data = setup(**overrides)
    loss, metrics, _ = critic_loss(state.critic.params, state, data, key, cfg)
    noise = normal(key, data.action.shape)
    expected, q = numpy_critic_loss(double(state.critic.params), state, double(data), noise, cfg)
    np.testing.assert_allclose([loss, metrics["critic_loss"]], expected, rtol=2e-5)
    np.testing.assert_allclose(metrics["q"], q, rtol=1e-4)


@pytest.mark.parametrize("agg", ["actor", "flow", "min", "mean", "max"])
def test_policy_values_equal_numpy(agg):
    cfg, state, key, data = setup(q_agg="min")
    noise = normal(key, data.action.shape)
    found = policy_value(state, data.observation, np.float32(noise), agg, cfg)
    expected = numpy_policy_value(state, double(data).observation, noise, agg, cfg)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "overrides",
    [{"alpha": 3.0}, {"alpha": 0.3, "normalize_q": False, "q_agg": "min", "num_critics": 3}],
    ids=str,
)
def test_actor_loss_and_gradient_equal_numpy(overrides):
    """The gradient goes through Q and its action, and takes F and the scale of Q as numbers."""
    cfg, state, key, data = setup(**overrides)
    batch, params = double(data), double(state.actor.params)
    noise = normal(key, data.action.shape)
    loss, metrics, grads = actor_loss(state.actor.params, state, data, np.float32(noise), cfg)
    expected, distill_error = numpy_actor_loss(params, state, batch, noise, cfg)
    np.testing.assert_allclose([loss, metrics["actor_loss"]], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["distill_loss"], distill_error, rtol=1e-4)
    for direction in directions(params, 3):
        expected = slope(
            lambda p: numpy_actor_loss(p, state, batch, noise, cfg)[0], params, direction
        )
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize(
    "overrides",
    [{"eta": 1.0}, {"eta": 0.3, "q_agg": "min", "guidance_agg": "mean"}],
    ids=str,
)
def test_weights_equal_numpy(overrides):
    cfg, state, key, data = setup(**overrides)
    noise = normal(key, data.action.shape)
    found = guidance(state, data, np.float32(noise), cfg)
    expected = numpy_guidance(state, double(data), noise, cfg)
    assert expected.min() < 0.4 and expected.max() > 0.6
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_without_eta_every_row_counts_in_full():
    cfg, state, key, data = setup(eta=None)
    assert (np.asarray(gfp.guidance(state, data, key, cfg)) == 1).all()


def test_flow_loss_and_gradient_equal_numpy():
    cfg, state, key, data = setup()
    batch, params = double(data), double(state.flow.params)
    weight = np.random.default_rng(0).random(len(data.reward), np.float32)
    draws = flow_draws(key, data.action.shape)
    loss, metrics, grads = flow_loss(state.flow.params, state, data, weight, key, cfg)
    expected = numpy_flow_loss(params, batch, weight, *draws)
    np.testing.assert_allclose([loss, metrics["flow_loss"]], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["guidance"], weight.mean(), rtol=1e-5)
    for direction in directions(params, 3):
        expected = slope(lambda p: numpy_flow_loss(p, batch, weight, *draws), params, direction)
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=1e-3, atol=1e-4)


def test_flow_loss_with_weights_of_one_is_that_of_fql():
    cfg, state, key, data = setup()
    ones = np.ones_like(data.reward)
    found, _, _ = flow_loss(state.flow.params, state, data, ones, key, cfg)
    theirs = nets.compiled(fql.flow_loss)
    expected, _, _ = theirs(state.flow.params, state, data, key, fql.Config())
    np.testing.assert_allclose(found, expected, rtol=1e-6)


# --- By hand ------------------------------------------------------------------------------------
def linear_state(actor=0.0, critic=(0, 0), critic_target=(0, 0), velocity=0.0):
    """mu(s, z) = actor * s, Q_k(s, a) = critic_k * a, v = velocity."""
    create = train_state.TrainState.create
    return gfp.State(
        nets.linear_net(create, lambda p, s, z: p[None, None] * s, actor),
        nets.linear_net(
            gfp.TrainState.create, lambda p, s, a: p[:, None] * a[None, :, 0], critic, critic_target
        ),
        nets.linear_net(create, lambda p, s, x, t: p[None, None] * jnp.ones_like(x), velocity),
    )


def rows(**columns):
    columns = {name: np.reshape(x, (3, -1) if np.ndim(x) else ()) for name, x in columns.items()}
    columns = {
        name: x if x.ndim == 0 or name in ("observation", "next_observation", "action") else x[:, 0]
        for name, x in columns.items()
    }
    return probes.random_transitions(3, 1, 1, **columns)


def test_target_by_hand():
    """v = 9 sends every z to 1."""
    state = linear_state(actor=0.5, critic=(1, 2), critic_target=(4, 6), velocity=9.0)
    batch = rows(
        observation=0.0,
        action=[0.5, -1, 1],
        reward=[1, 2, 3],
        next_observation=[1, -4, 4],
        termination=[0, 0, 1],
        truncation=[0, 1, 0],
    )
    # mu(s'), clipped       0.5   -1   1       F = 1
    # mean of the targets   2.5   -5   5           5
    # mean with that of F   3.75   0   5
    # r + 0.5 Q'   actor    2.25  -0.5 3
    #              mean     2.875  2   3
    #              flow     3.5   4.5  3
    targets = {"actor": [2.25, -0.5, 3], "mean": [2.875, 2, 3], "flow": [3.5, 4.5, 3]}
    for target_agg, target in targets.items():
        cfg = gfp.Config(discount=0.5, target_agg=target_agg)
        loss, _, _ = critic_loss(state.critic.params, state, batch, jax.random.key(0), cfg)
        q = np.array([[0.5, -1, 1], [1, -2, 2]])
        np.testing.assert_allclose(loss, np.mean((q - target) ** 2), rtol=1e-6)


def test_weights_by_hand():
    """The data's action 1, 0 or -1 against the actor's 0.5: Q differs by 0.5 of the targets' 4."""
    state = linear_state(actor=0.5, critic=(1, 3), critic_target=(4, 4), velocity=-9.0)
    batch = rows(observation=1.0, action=[1, 0, -1])
    noise = jnp.zeros_like(batch.action)
    # mean |Q(s, mu)| by the online critics is (0.5 + 1.5) / 2 = 1, so T = eta.
    for eta in (1.0, 4.0):
        found = gfp.guidance(state, batch, noise, gfp.Config(eta=eta))
        gap = np.array([2.0, -2.0, -6.0]) / eta
        np.testing.assert_allclose(found, 1 / (1 + np.exp(-gap)), rtol=1e-5)
    # The flow's action is -1: the third row equals it.
    found = gfp.guidance(state, batch, noise, gfp.Config(eta=1.0, guidance_agg="min"))
    np.testing.assert_allclose(found, 1 / (1 + np.exp([-8.0, -4.0, 0.0])), rtol=1e-5)
    # Tiny temperatures choose, without an overflow.
    found = gfp.guidance(state, batch, noise, gfp.Config(eta=1e-6))
    np.testing.assert_array_equal(found, [1, 0, 0])


# --- What the losses may depend on --------------------------------------------------------------
def test_termination_stops_the_bootstrap_and_truncation_does_not():
    cfg, state, key, data = setup()
    nets.check_bootstrap(lambda b: critic_loss(state.critic.params, state, b, key, cfg)[0], data)


READS = {  # loss -> what it reads of the state, and of the data
    "critic": ({"actor.params", "critic.target_params"}, None),
    "actor": ({"critic.params", "flow.params"}, {"observation"}),
    "flow": (set(), {"observation", "action"}),
    "guidance": (
        {"actor.params", "critic.params", "critic.target_params"},
        {"observation", "action"},
    ),
}


@pytest.mark.parametrize("name", READS)
def test_losses_read_only_what_they_should(name):
    cfg, state, key, data = setup(eta=1.0)
    other = nets.shaken(state, seed=4)
    noise = jax.random.normal(key, data.action.shape)
    key = jax.random.key(1)

    def loss(state, params=state, data=data):
        if name == "critic":
            return critic_loss(params.critic.params, state, data, key, cfg)[0]
        if name == "actor":
            return actor_loss(params.actor.params, state, data, noise, cfg)[0]
        if name == "flow":
            ones = np.ones_like(data.reward)
            return flow_loss(params.flow.params, state, data, ones, key, cfg)[0]
        return float(guidance(state, data, noise, cfg).sum())

    here, (reads, columns) = loss(state), READS[name]
    assert name == "guidance" or loss(state, params=other) != here
    found = set()
    for net in state._fields:
        for kind in ("params", "target_params"):
            if hasattr(getattr(state, net), kind):
                changed = getattr(state, net).replace(**{kind: getattr(getattr(other, net), kind)})
                if loss(state._replace(**{net: changed})) != here:
                    found.add(f"{net}.{kind}")
    assert found == reads
    for column in data._fields if columns else ():
        rolled = data._replace(**{column: np.roll(getattr(data, column), 1, axis=0)})
        assert (loss(state, data=rolled) != here) == (column in columns), column


# --- Policy and networks ------------------------------------------------------------------------
def test_policy_is_the_clipped_one_step_network():
    """Networks and policy are those of fql.py; tests/test_static.py holds the bodies together."""
    _, state, key, data = setup()
    params = gfp.policy_params(state)
    assert params is state.actor.params
    act = jax.jit(functools.partial(gfp.policy, state.actor.apply_fn))
    action = act(params, data.observation, key)
    noise = normal(key, data.action.shape)
    expected = nets.gelu_net(double(params), double(data).observation, noise)
    assert (np.abs(expected) > 1).any() and (np.abs(expected) < 1).any()
    np.testing.assert_allclose(action, expected.clip(-1, 1), rtol=1e-4, atol=1e-5)


def test_targets_start_as_copies():
    state = nets.fresh(gfp)
    nets.check_members_differ(state.critic)
    nets.check_targets_are_copies(state.critic)
    assert not hasattr(state.actor, "target_params") and not hasattr(state.flow, "target_params")


# --- Update -------------------------------------------------------------------------------------
def test_order_of_two_updates():
    """All gradients and weights from the state before; the targets follow before the critics."""
    rates = {"actor_learning_rate": 0.02, "critic_learning_rate": 0.05, "target_rate": 0.3}
    cfg, state, key, data = setup(log_every=2, eta=1.0, **rates)
    cfg_here, here, _, _ = setup(eta=1.0)  # the same numbers, with the losses compiled already
    adam = {"critic": nets.Adam(0.05), "actor": nets.Adam(0.02), "flow": nets.Adam(0.02)}
    found = {}
    for step in (6, 7):
        batch, key_critic, key_actor, key_flow = nets.sample(key, step, data, cfg, 4)
        noise = jax.random.normal(key_actor, batch.action.shape)
        weight = guidance(here, batch, noise, cfg_here)
        losses = {
            "critic": (critic_loss, [batch, key_critic]),
            "actor": (actor_loss, [batch, noise]),
            "flow": (flow_loss, [batch, weight, key_flow]),
        }
        after = {}
        for name, (loss, arguments) in losses.items():
            net = getattr(here, name)
            _, metrics, grads = loss(net.params, here, *arguments, cfg_here)
            after[name] = net.replace(params=adam[name].step(net.params, grads))
            for metric, x in metrics.items():
                found.setdefault(metric, []).append(x)
        target = nets.polyak(here.critic.params, here.critic.target_params, 0.3)
        after["critic"] = after["critic"].replace(target_params=target)
        here = here._replace(**after)
    after, metrics = nets.train_chunk(gfp, state, key, 6, data, cfg)
    for name in losses:
        nets.check_close(getattr(after, name).params, getattr(here, name).params)
    nets.check_close(after.critic.target_params, here.critic.target_params)
    for name, numbers in found.items():
        np.testing.assert_allclose(metrics.pop(name), np.mean(numbers), rtol=1e-3)
    assert not metrics


# --- Data ---------------------------------------------------------------------------------------
def test_training_sees_shifted_rewards_and_clipped_actions(monkeypatch, tmp_path):
    raw = probes.random_transitions(20)
    raw.action[:2] = [[1, -1], [0.5, -0.25]]
    _, data = nets.handed_over(gfp, monkeypatch, tmp_path, raw, (2, 2), reward_shift=-1.0)
    np.testing.assert_allclose(data.reward, raw.reward - 1, rtol=1e-6)
    np.testing.assert_allclose(data.action, raw.action.clip(-0.99999, 0.99999), rtol=1e-7)
    for name in ("observation", "next_observation", "termination"):
        assert np.array_equal(getattr(data, name), getattr(raw, name)), name

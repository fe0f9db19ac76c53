# SPDX-License-Identifier: Apache-2.0
"""FQL's losses, networks and update against NumPy in float64 and hand-worked numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_nets as nets
import probes
import pytest
from flax.training import train_state
from numpy_nets import directions, dot, double, slope

from algorithms import fql

critic_loss = nets.compiled(fql.critic_loss)
actor_loss = nets.compiled(fql.actor_loss)
flow_loss = nets.compiled(fql.flow_loss)
setup = functools.partial(nets.setup, fql, flow_steps=3)


def normal(key, shape):
    return np.asarray(jax.random.normal(jax.random.clone(key), shape), np.float64)


# --- The method in NumPy ------------------------------------------------------------------------
def numpy_critic_loss(params, state, batch, noise, cfg):
    action = nets.gelu_net(double(state.actor.params), batch.next_observation, noise)
    action = np.clip(action, -1, 1)
    next_q = nets.gelu_critics(double(state.critic.target_params), batch.next_observation, action)
    predicted, squares = nets.gelu_critics(params, batch.observation, batch.action), []
    for i in range(len(batch.reward)):
        target = batch.reward[i]
        if not batch.termination[i]:
            members = next_q[:, i]
            worth = min(members) if cfg.q_agg == "min" else sum(members) / len(members)
            target += cfg.discount * worth
        squares += [(q[i] - target) ** 2 for q in predicted]
    return np.mean(squares), predicted.mean()


def numpy_actor_loss(params, state, batch, noise, cfg, scale=None):
    """`scale`: mean |Q|, a constant for the gradient; None computes it here."""
    flow_action = nets.flow(double(state.flow.params), batch.observation, noise, cfg.flow_steps)
    action = nets.gelu_net(params, batch.observation, noise)
    distill_error = np.mean((action - flow_action) ** 2)
    critics = double(state.critic.params)
    q = nets.gelu_critics(critics, batch.observation, np.clip(action, -1, 1)).mean(axis=0)
    if scale is None:
        scale = np.abs(q).mean() if cfg.normalize_q else 1.0
    return cfg.alpha * distill_error - q.mean() / scale, distill_error, scale


def numpy_flow_loss(params, batch, noise, time):
    x = noise + time * (batch.action - noise)
    velocity = nets.gelu_net(params, batch.observation, x, time)
    return np.mean((velocity - batch.action + noise) ** 2)


def flow_draws(key, shape):
    """Noise and times of `flow_loss`."""
    key_noise, key_time = jax.random.split(jax.random.clone(key))
    noise = jax.random.normal(key_noise, shape)
    time = jax.random.uniform(key_time, (shape[0], 1))
    return np.asarray(noise, np.float64), np.asarray(time, np.float64)


@pytest.mark.parametrize(
    "overrides",
    [{"discount": 0.7}, {"q_agg": "min", "num_critics": 3, "hidden": (8, 12, 16)}],
    ids=str,
)
def test_critic_loss_equals_numpy(overrides):
    cfg, state, key, data = setup(**overrides)
    loss, metrics, _ = critic_loss(state.critic.params, state, data, key, cfg)
    noise = normal(key, data.action.shape)
    expected, q = numpy_critic_loss(double(state.critic.params), state, double(data), noise, cfg)
    np.testing.assert_allclose([loss, metrics["critic_loss"]], expected, rtol=2e-5)
    np.testing.assert_allclose(metrics["q"], q, rtol=1e-4)


@pytest.mark.parametrize(
    "overrides",
    [{"alpha": 3.0}, {"alpha": 0.3, "normalize_q": True, "q_agg": "min", "num_critics": 3}],
    ids=str,
)
def test_actor_loss_and_gradient_equal_numpy(overrides):
    """The gradient goes through Q and its action, and takes F and the scale of Q as numbers."""
    cfg, state, key, data = setup(**overrides)
    batch, params = double(data), double(state.actor.params)
    noise = normal(key, data.action.shape)
    loss, metrics, grads = actor_loss(state.actor.params, state, data, key, cfg)
    expected, distill_error, scale = numpy_actor_loss(params, state, batch, noise, cfg)
    np.testing.assert_allclose([loss, metrics["actor_loss"]], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["distill_loss"], distill_error, rtol=1e-4)
    for direction in directions(params):
        constant = slope(
            lambda p: numpy_actor_loss(p, state, batch, noise, cfg, scale)[0], params, direction
        )
        np.testing.assert_allclose(dot(grads, direction), constant, rtol=2e-3, atol=1e-4)


def test_flow_loss_and_gradient_equal_numpy():
    cfg, state, key, data = setup()
    batch, params = double(data), double(state.flow.params)
    draws = flow_draws(key, data.action.shape)
    loss, metrics, grads = flow_loss(state.flow.params, state, data, key, cfg)
    expected = numpy_flow_loss(params, batch, *draws)
    np.testing.assert_allclose([loss, metrics["flow_loss"]], expected, rtol=1e-4)
    for direction in directions(params):
        expected = slope(lambda p: numpy_flow_loss(p, batch, *draws), params, direction)
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=1e-3, atol=1e-4)


# --- By hand ------------------------------------------------------------------------------------
def linear_state(actor=0.0, critic=(0, 0), critic_target=(0, 0), velocity=0.0):
    """mu(s, z) = actor * s, Q_k(s, a) = critic_k * a, v = velocity."""
    create = train_state.TrainState.create
    return fql.State(
        nets.linear_net(create, lambda p, s, z: p[None, None] * s, actor),
        nets.linear_net(
            fql.TrainState.create, lambda p, s, a: p[:, None] * a[None, :, 0], critic, critic_target
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
    state = linear_state(actor=0.5, critic=(1, 2), critic_target=(4, 6))
    batch = rows(
        observation=0.0,
        action=[0.5, -1, 1],
        reward=[1, 2, 3],
        next_observation=[1, 4, 4],
        termination=[0, 0, 1],
        truncation=[0, 1, 0],
    )
    # mu(s'), clipped  0.5   1    1
    # mean of targets  2.5   5    5
    # minimum          2     4    4
    # r + 0.5 Q' mean  2.25  4.5  3       minimum  2  4  3
    # Q_1              0.5  -1    1
    # Q_2              1    -2    2
    targets = {"mean": [2.25, 4.5, 3], "min": [2, 4, 3]}
    for q_agg, target in targets.items():
        cfg = fql.Config(discount=0.5, q_agg=q_agg)
        loss, metrics, _ = critic_loss(state.critic.params, state, batch, jax.random.key(0), cfg)
        q = np.array([[0.5, -1, 1], [1, -2, 2]])
        np.testing.assert_allclose(loss, np.mean((q - target) ** 2), rtol=1e-6)
        np.testing.assert_allclose(metrics["q"], 0.25, rtol=1e-6)


def test_policy_loss_by_hand():
    """v = 9 sends every z to 1 and v = -9 to -1."""
    batch = rows(observation=[0, 0.5, 2])  # mu = s: Q sees 0, 0.5, 1, the distillation 0, 0.5, 2
    for velocity, distill_error in ((9.0, 1 + 0.25 + 1), (-9.0, 1 + 2.25 + 9)):
        state = linear_state(actor=1.0, critic=(-1, -3), velocity=velocity)
        for normalize, q_loss in ((False, 2 * 1.5), (True, 3.0)):
            cfg = fql.Config(alpha=10.0, normalize_q=normalize)
            loss, metrics, _ = actor_loss(state.actor.params, state, batch, jax.random.key(0), cfg)
            np.testing.assert_allclose(loss, (10 * distill_error + q_loss) / 3, rtol=1e-6)
            np.testing.assert_allclose(metrics["distill_loss"], distill_error / 3, rtol=1e-6)


def test_euler_steps_by_hand():
    """v = x grows by 1 + 1/n in each of n steps; v = t sums 0, 1/n, ...; the end is clipped."""
    noise, cfg = np.float32([[0.1], [-0.2], [0.9]]), fql.Config(flow_steps=4)
    integrate = functools.partial(fql.integrate, observation=None, noise=noise, cfg=cfg)
    grown = integrate(lambda _, s, x, t: x, None)
    np.testing.assert_allclose(grown, np.clip(1.25**4 * noise, -1, 1), rtol=1e-6)
    moved = integrate(lambda _, s, x, t: t, None)
    np.testing.assert_allclose(moved, [[0.475], [0.175], [1]], rtol=1e-6)


# --- What the losses may depend on --------------------------------------------------------------
def test_termination_stops_the_bootstrap_and_truncation_does_not():
    cfg, state, key, data = setup()
    nets.check_bootstrap(lambda b: critic_loss(state.critic.params, state, b, key, cfg)[0], data)


READS = {  # loss -> what it reads of the state, and of the data
    "critic": ({"actor.params", "critic.target_params"}, None),
    "actor": ({"critic.params", "flow.params"}, {"observation"}),
    "flow": (set(), {"observation", "action"}),
}


@pytest.mark.parametrize("name", READS)
def test_losses_read_only_what_they_should(name):
    cfg, state, key, data = setup()
    other = nets.shaken(state, seed=4)
    function = {"critic": critic_loss, "actor": actor_loss, "flow": flow_loss}[name]

    def loss(state, params=state, data=data, key=key):
        return function(getattr(params, name).params, state, data, key, cfg)[0]

    here, (reads, columns) = loss(state), READS[name]
    assert loss(state, params=other) != here and loss(state, key=jax.random.key(9)) != here
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
def test_policy_is_the_clipped_one_step_network_with_new_noise():
    _, state, key, data = setup()
    params = fql.policy_params(state)
    assert params is state.actor.params
    act = jax.jit(functools.partial(fql.policy, state.actor.apply_fn))
    action = act(params, data.observation, key)
    noise = normal(key, data.action.shape)
    expected = nets.gelu_net(double(params), double(data).observation, noise)
    assert (np.abs(expected) > 1).any() and (np.abs(expected) < 1).any()
    np.testing.assert_allclose(action, expected.clip(-1, 1), rtol=1e-4, atol=1e-5)
    assert not np.array_equal(action, act(params, data.observation, jax.random.key(5)))
    assert act(params, data.observation[0], jax.random.key(6)).shape == (2,)


def test_initial_parameters():
    """Glorot's uniform kernels, biases 0; layer norm in the critics only; time in the flow only."""
    state = nets.fresh(fql)
    sizes = {"actor": (18, 64, 96, 2), "critic": (18, 64, 96, 1), "flow": (19, 64, 96, 2)}
    for name, widths in sizes.items():
        layers = dict(getattr(state, name).params["params"])
        norms = [layers.pop(x) for x in ("LayerNorm_0", "LayerNorm_1") if x in layers]
        assert len(norms) == (2 if name == "critic" else 0)
        for layer, fan_in, width in zip(sorted(layers), widths, widths[1:], strict=False):
            kernel = np.asarray(layers[layer]["kernel"])
            assert kernel.shape[-2:] == (fan_in, width)
            bound = (6 / (fan_in + width)) ** 0.5
            assert 0.9 * bound < np.abs(kernel).max() <= bound
            np.testing.assert_allclose(kernel.std(), bound / 3**0.5, rtol=0.15)
            assert (np.asarray(layers[layer]["bias"]) == 0).all()
    nets.check_members_differ(state.critic)
    kernels = [net.params["params"]["Dense_1"]["kernel"] for net in (state.actor, state.flow)]
    assert not np.isclose(*kernels).any(axis=0).all()
    nets.check_targets_are_copies(state.critic)
    assert not hasattr(state.actor, "target_params") and not hasattr(state.flow, "target_params")


# --- Update -------------------------------------------------------------------------------------
def test_order_of_two_updates():
    """All gradients from the state before; the targets follow the critics before their step."""
    rates = {"actor_learning_rate": 0.02, "critic_learning_rate": 0.05, "target_rate": 0.3}
    cfg, state, key, data = setup(log_every=2, **rates)
    cfg_here, here, _, _ = setup()  # the same numbers, with the losses compiled already
    adam = {"critic": nets.Adam(0.05), "actor": nets.Adam(0.02), "flow": nets.Adam(0.02)}
    losses, found = {"critic": critic_loss, "actor": actor_loss, "flow": flow_loss}, {}
    for step in (6, 7):
        batch, *keys = nets.sample(key, step, data, cfg, 4)
        after = {}
        for (name, loss), key_loss in zip(losses.items(), keys, strict=True):
            net = getattr(here, name)
            _, metrics, grads = loss(net.params, here, batch, key_loss, cfg_here)
            after[name] = net.replace(params=adam[name].step(net.params, grads))
            for metric, x in metrics.items():
                found.setdefault(metric, []).append(x)
        target = nets.polyak(here.critic.params, here.critic.target_params, 0.3)
        after["critic"] = after["critic"].replace(target_params=target)
        here = here._replace(**after)
    after, metrics = nets.train_chunk(fql, state, key, 6, data, cfg)
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
    _, data = nets.handed_over(fql, monkeypatch, tmp_path, raw, (2, 2), reward_shift=-1.0)
    np.testing.assert_allclose(data.reward, raw.reward - 1, rtol=1e-6)
    np.testing.assert_allclose(data.action, raw.action.clip(-0.99999, 0.99999), rtol=1e-7)
    for name in ("observation", "next_observation", "termination"):
        assert np.array_equal(getattr(data, name), getattr(raw, name)), name

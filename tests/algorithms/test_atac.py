# SPDX-License-Identifier: Apache-2.0
"""ATAC's losses, projection and update against NumPy in float64 and hand-worked numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_nets as nets
import probes
import pytest
from numpy_nets import directions, dot, double, slope

from algorithms import atac

_critic_loss = nets.compiled(atac.critic_loss)
_actor_loss = nets.compiled(atac.actor_loss)
setup = functools.partial(nets.setup, atac)


def critic_loss(params, state, batch, noise, warm, cfg):
    return _critic_loss(params, state, batch, noise, np.bool_(warm), cfg)


def actor_loss(params, state, batch, noise, warm, cfg):
    return _actor_loss(params, state, batch, noise, np.bool_(warm), cfg)


def noise_of(size=32, dim=2, seed=5):
    return np.random.default_rng(seed).standard_normal((2, size, dim)).astype(np.float32)


# --- The method in NumPy ------------------------------------------------------------------------
def numpy_actor(params, observation):
    """Mean and log std before tanh: the heads are Dense_2 and Dense_3."""
    layers, x = params["params"], observation
    for name in ("Dense_0", "Dense_1"):
        x = np.maximum(nets.dense(layers[name], x), 0)
    log_std = nets.dense(layers["Dense_3"], x)
    return nets.dense(layers["Dense_2"], x), np.clip(log_std, np.log(1e-5), np.log(10))


def numpy_log_prob(x, mean, log_std):
    """log density of tanh(x)."""
    normal = -0.5 * ((x - mean) / np.exp(log_std)) ** 2 - log_std - 0.5 * np.log(2 * np.pi)
    return (normal + 2 * np.log(np.cosh(x))).sum(axis=-1)


def numpy_sample(params, observation, noise):
    mean, log_std = numpy_actor(params, observation)
    x = mean + np.exp(log_std) * noise
    return np.tanh(x), numpy_log_prob(x, mean, log_std)


def numpy_critic_loss(params, state, batch, noise, warm, cfg):
    """-> loss, TD error, residual error, pessimism, q"""
    actor, size = double(state.actor.params), len(batch.reward)
    action, _ = numpy_sample(actor, batch.observation, noise[0])
    next_action, _ = numpy_sample(actor, batch.next_observation, noise[1])
    q = nets.critics(params, batch.observation, batch.action)
    policy_q = nets.critics(params, batch.observation, action)
    next_q = nets.critics(params, batch.next_observation, next_action)
    target_params = double(state.critic.target_params)
    target_q = nets.critics(target_params, batch.next_observation, next_action)
    low = -np.inf if cfg.lowest_target is None else cfg.lowest_target
    high = np.inf if cfg.highest_target is None else cfg.highest_target
    td_error = residual_error = pessimism = 0.0
    for k in range(len(q)):
        for i in range(size):
            go_on = 0.0 if batch.termination[i] else cfg.discount
            target = min(max(batch.reward[i] + go_on * min(target_q[:, i]), low), high)
            own = min(max(batch.reward[i] + go_on * next_q[k, i], low), high)
            td_error += (q[k, i] - target) ** 2 / size
            residual_error += (q[k, i] - own) ** 2 / size
            pessimism += 0.0 if warm else (policy_q[k, i] - q[k, i]) / size
    bellman = (1 - cfg.residual) * td_error + cfg.residual * residual_error
    loss = pessimism + cfg.beta * bellman
    return loss / max(1, cfg.beta), td_error, residual_error, pessimism, q.mean()


def numpy_actor_loss(params, state, batch, noise, warm):
    """-> loss, log pi of the data's actions, entropy"""
    action, log_prob = numpy_sample(params, batch.observation, noise[0])
    bc_log_prob = numpy_log_prob(np.arctanh(batch.action), *numpy_actor(params, batch.observation))
    q = nets.critics(double(state.critic.params), batch.observation, action)[0]
    temperature = np.exp(double(state.log_temperature.params["log"]))
    loss = (temperature * log_prob - (bc_log_prob if warm else q)).mean()
    return loss / max(1, temperature), bc_log_prob.mean(), -log_prob.mean()


VARIANTS = [
    {"beta": 4.0},
    {"beta": 0.5, "discount": 0.7, "residual": 0.2, "num_critics": 3},
    {"lowest_target": -0.5, "highest_target": 0.25, "num_critics": 1},
]


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_losses_and_gradients_equal_numpy(overrides, warm):
    """The critic's gradient goes through its own backup; target and actions are constants to it.
    The actor's goes through its action; the critic and the temperature are constants to it."""
    cfg, state, _, data = setup(**overrides)
    batch, noise, params = double(data), noise_of(), double(state.critic.params)
    wide = noise.astype(np.float64)
    loss, metrics, grads = critic_loss(state.critic.params, state, data, noise, warm, cfg)
    expected, *parts = numpy_critic_loss(params, state, batch, wide, warm, cfg)
    np.testing.assert_allclose([loss, metrics["critic_loss"]], expected, rtol=1e-4)
    for name, part in zip(("td_error", "residual_error", "pessimism", "q"), parts, strict=True):
        np.testing.assert_allclose(metrics[name], part, rtol=1e-4)
    assert warm == (parts[2] == 0)
    for direction in directions(params, 2):
        expected = slope(
            lambda p: numpy_critic_loss(p, state, batch, wide, warm, cfg)[0], params, direction
        )
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=2e-3, atol=1e-3)
    if len(state.critic.params["params"]["Dense_0"]["bias"]) == 2:
        state = state._replace(log_temperature=state.log_temperature.replace(params={"log": 0.7}))
    params = double(state.actor.params)
    loss, metrics, grads = actor_loss(state.actor.params, state, data, noise, warm, cfg)
    expected, bc_log_prob, entropy = numpy_actor_loss(params, state, batch, wide, warm)
    np.testing.assert_allclose([loss, metrics["actor_loss"]], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["log_prob"], bc_log_prob, rtol=1e-4)
    np.testing.assert_allclose(metrics["entropy"], entropy, rtol=1e-4)
    log = double(state.log_temperature.params["log"])
    np.testing.assert_allclose(metrics["temperature"], np.exp(log), rtol=1e-5)
    for direction in directions(params, 2):
        expected = slope(
            lambda p: numpy_actor_loss(p, state, batch, wide, warm)[0], params, direction
        )
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=2e-3, atol=1e-3)


# --- By hand ------------------------------------------------------------------------------------
def linear_state(actor, critic, critic_target, temperature=0.0, log_std=-20.0):
    """pi(s) = tanh N(actor * s, exp(log_std)) for s of one number, Q_k(s, a) = critic_k sum a."""
    linear = functools.partial(nets.linear_net, atac.train_state.TrainState.create)

    def act(p, s):
        return p[None] * s, jnp.full((len(s), len(p)), log_std)

    def value(p, s, a):
        return p[:, None] * a.sum(axis=-1)[None]

    return atac.State(
        linear(act, actor),
        nets.linear_net(atac.TrainState.create, value, critic, critic_target),
        linear(lambda p: jnp.exp(p["log"]), {"log": temperature}),
    )


@pytest.mark.parametrize(("beta", "warm"), [(4.0, False), (0.25, False), (4.0, True)])
def test_critic_loss_by_hand(beta, warm):
    # pi(s) = s for s = tanh(arctanh s): actor 1 on observations arctanh of these numbers.
    state = linear_state([1], [1, -2], [2, 4])
    s, next_s = np.array([[0.5], [-0.25]]), np.array([[0.25], [0.5]])
    batch = probes.random_transitions(
        2,
        1,
        1,
        observation=np.arctanh(s),
        next_observation=np.arctanh(next_s),
        action=[[0.75], [0.5]],
        reward=[1, 2],
        termination=[0, 1],
    )
    # row                           1                       2
    # Q(s, a)                  0.75, -1.5                0.5, -1
    # Q(s, pi(s))              0.5, -1                 -0.25, 0.5
    # difference              -0.25, 0.5               -0.75, 1.5      means -0.5, 1: sum 0.5
    # target's minimum at s'   min(0.5, 1)               the end
    # target               1 + 0.5 / 2 = 1.25                2
    # TD error              0.25, 7.5625                2.25, 9        means 1.25, 8.28125
    # own Q at s'              0.25, -0.5                the end
    # own target              1.125, 0.75                    2
    # residual error      0.140625, 5.0625              2.25, 9        means 1.1953125, 7.03125
    td_error, residual_error, pessimism = 9.53125, 8.2265625, 0.0 if warm else 0.5
    bellman = 0.75 * td_error + 0.25 * residual_error
    cfg = atac.Config(discount=0.5, beta=beta, residual=0.25)
    loss, metrics, _ = critic_loss(
        state.critic.params, state, batch, np.ones((2, 2, 1), np.float32), warm, cfg
    )
    np.testing.assert_allclose(metrics["td_error"], td_error, rtol=1e-5)
    np.testing.assert_allclose(metrics["residual_error"], residual_error, rtol=1e-5)
    np.testing.assert_allclose(metrics["pessimism"], pessimism, atol=1e-6)
    expected = (pessimism + beta * bellman) / (4 if beta == 4 else 1)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_actor_loss_by_hand(temperature, warm):
    state = linear_state([1], [2, -9], [9, 9], np.log(temperature), log_std=0.0)
    s, action = np.array([[0.0], [1.0]]), np.tanh([[2.0], [1.0]])
    batch = probes.random_transitions(2, 1, 1, observation=s, action=action)
    noise = np.float32([[[1], [-0.5]], [[7], [7]]])
    # row                       1                           2
    # x of the sample           1                          0.5
    # log pi(a~|s)      -1/2 - c - l(1)            -1/8 - c - l(1/2)     l(x) = log(1 - tanh(x)^2)
    # x of the data             2                           1
    # log pi(a|s)         -2 - c - l(2)                -c - l(1)
    # Q_1(s, a~)           2 tanh 1                   2 tanh 0.5
    c, l = 0.5 * np.log(2 * np.pi), lambda x: np.log(1 - np.tanh(x) ** 2)  # noqa: E741
    log_prob = (-0.625 - 2 * c - l(1) - l(0.5)) / 2
    objective = (-2 - 2 * c - l(2) - l(1)) / 2 if warm else np.tanh(1) + np.tanh(0.5)
    loss, metrics, _ = actor_loss(state.actor.params, state, batch, noise, warm, atac.Config())
    expected = (temperature * log_prob - objective) / max(1, temperature)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["entropy"], -log_prob, rtol=1e-5)
    np.testing.assert_allclose(metrics["temperature"], temperature, rtol=1e-5)


def test_temperature_loss_by_hand():
    params = {"log": jnp.float32(np.log(2.0))}
    grads = jax.grad(atac.temperature_loss)(params, 5.0, 3)  # entropy 5, target -3
    np.testing.assert_allclose(atac.temperature_loss(params, 5.0, 3), 8 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(grads["log"], 8, rtol=1e-6)


def test_log_prob_is_a_density_and_exact_far_out():
    x = np.linspace(-9, 9, 4001)[:, None]
    mean, log_std = np.full((1, 1), 0.3, np.float32), np.full((1, 1), -0.5, np.float32)
    log_prob = np.asarray(atac.squashed_log_prob(x.astype(np.float32), mean, log_std))
    np.testing.assert_allclose(np.trapezoid(np.exp(log_prob), np.tanh(x[:, 0])), 1, rtol=1e-3)
    far = np.array([[-50.0], [50.0]])  # where |a| = 1 in float32
    expected = numpy_log_prob(far, 0.3, -0.5)
    log_prob = atac.squashed_log_prob(far.astype(np.float32), mean, log_std)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-5)


def test_projection_by_hand():
    kernel = np.zeros((2, 2, 2), np.float32)
    kernel[0] = [[3, 0], [0, 4]]  # norm 5
    kernel[1] = [[1, 1], [1, 1]]  # norm 2
    layer = {"kernel": jnp.array(kernel), "bias": jnp.full((2, 2), 100.0)}
    found = atac.project_weights({"params": {"Dense_0": layer}}, 2.5)["params"]["Dense_0"]
    np.testing.assert_allclose(found["kernel"], [kernel[0] / 2, kernel[1]], rtol=1e-6)
    assert (found["bias"] == 100).all()


# --- What the losses may depend on --------------------------------------------------------------
def test_termination_stops_the_bootstrap_and_truncation_does_not():
    cfg, state, _, data = setup(beta=4.0)
    for part in ("td_error", "residual_error"):
        nets.check_bootstrap(
            lambda b, part=part: critic_loss(state.critic.params, state, b, noise_of(), False, cfg)[
                1
            ][part],
            data,
        )


def test_losses_read_only_the_networks_they_should():
    cfg, state, _, data = setup(beta=4.0)
    other, noise = nets.shaken(state, seed=4), noise_of()

    def critic(warm, params=state.critic.params, **changed):
        return critic_loss(params, state._replace(**changed), data, noise, warm, cfg)[0]

    def actor(warm, params=state.actor.params, **changed):
        return actor_loss(params, state._replace(**changed), data, noise, warm, cfg)[0]

    targets = state.critic.replace(target_params=other.critic.target_params)
    networks = state.critic.replace(params=other.critic.params)
    for warm in (False, True):
        here = critic(warm)
        assert critic(warm, params=other.critic.params) != here
        assert critic(warm, critic=targets) != here and critic(warm, actor=other.actor) != here
        assert critic(warm, critic=networks) == here
        assert critic(warm, log_temperature=other.log_temperature) == here
        here = actor(warm)
        assert actor(warm, params=other.actor.params) != here
        assert actor(warm, log_temperature=other.log_temperature) != here
        assert actor(warm, critic=targets) == actor(warm, actor=other.actor) == here
        assert (actor(warm, critic=networks) == here) == warm
        # The first critic alone is the actor's.
        for k in range(2):
            lower = jax.tree.map(np.array, state.critic.params)
            lower["params"]["Dense_2"]["bias"][k] -= 100
            found = actor(warm, critic=state.critic.replace(params=lower))
            assert (found == here) == (warm or k == 1)


# --- Networks -----------------------------------------------------------------------------------
@functools.cache
def fresh():
    return nets.fresh(atac)


def test_initial_parameters():
    state = fresh()
    nets.check_uniform_init(state.critic.params, (16 + 2, 64, 96, 1))
    layers = dict(state.actor.params["params"])
    head = layers.pop("Dense_3")
    nets.check_uniform_init({"params": layers}, (16, 64, 96, 2))
    assert head["kernel"].shape == (96, 2) and not head["kernel"].any() and not head["bias"].any()
    nets.check_members_differ(state.critic)
    nets.check_targets_are_copies(state.critic)
    assert state.log_temperature.params == {"log": 0.0}


def test_std_is_clipped_and_the_policy_is_tanh_of_the_mean():
    _, state, key, data = setup()
    params = {"params": dict(state.actor.params["params"])}
    apply_fn = jax.jit(state.actor.apply_fn)
    for bias, expected in ((-30.0, 1e-5), (30.0, 10.0)):
        head = params["params"]["Dense_3"]
        params["params"]["Dense_3"] = head | {"bias": np.full(2, bias, np.float32)}
        _, log_std = apply_fn(params, data.observation)
        np.testing.assert_allclose(np.exp(log_std), expected, rtol=1e-5)
    params = atac.policy_params(state)
    action = jax.jit(functools.partial(atac.policy, state.actor.apply_fn))(
        params, data.observation, key
    )
    mean, _ = numpy_actor(double(params), double(data).observation)
    np.testing.assert_allclose(action, np.tanh(mean), rtol=1e-4, atol=1e-5)


# --- Update -------------------------------------------------------------------------------------
RATES = {"actor_learning_rate": 0.01, "critic_learning_rate": 0.05, "target_rate": 0.3}


def test_order_of_updates_through_the_start_of_the_game():
    """Critics, projection, temperature from the same actions, the actor with the new critics and
    temperature, targets. The third update resets the temperature, its Adam state and the actor's,
    and gives the actor its lower learning rate."""
    settings = {"warm_start": 2, "beta": 4.0, "weight_norm": 1.5}
    cfg, state, key, data = setup(log_every=4, **settings, **RATES)
    cfg_here, here, _, _ = setup(log_every=4, **settings)
    actor_adam = (nets.Adam(0.05), nets.Adam(0.01))
    temperature_adam = (nets.Adam(0.05), nets.Adam(0.05))
    critic_adam, found = nets.Adam(0.05), []

    def place(**changed):
        return here._replace(
            **{name: getattr(here, name).replace(**parts) for name, parts in changed.items()}
        )

    def projected(x):
        if x.ndim < 3:
            return x
        return np.stack([m * min(1, 1.5 / np.sqrt((m**2).sum())) for m in x])

    for step in range(4):
        warm, phase = step < 2, int(step >= 2)
        batch, key_noise = nets.sample(key, step, data, cfg, 2)
        noise = jax.random.normal(key_noise, (2, 32, 2))
        if step == 2:
            here = place(log_temperature={"params": {"log": np.float32(0)}})
        _, metrics, grads = critic_loss(here.critic.params, here, batch, noise, warm, cfg_here)
        params = critic_adam.step(here.critic.params, grads)
        here = place(critic={"params": jax.tree.map(projected, params)})
        _, before, _ = actor_loss(here.actor.params, here, batch, noise, warm, cfg_here)
        grads = {"log": before["entropy"] + 2}  # two action dimensions
        params = temperature_adam[phase].step(here.log_temperature.params, grads)
        here = place(log_temperature={"params": params})
        _, more, grads = actor_loss(here.actor.params, here, batch, noise, warm, cfg_here)
        here = place(actor={"params": actor_adam[phase].step(here.actor.params, grads)})
        target = nets.polyak(here.critic.params, here.critic.target_params, 0.3)
        here = place(critic={"target_params": target})
        found.append(metrics | more)
    start = dict(state.log_temperature.params)
    state = state._replace(log_temperature=state.log_temperature.replace(params=start))
    after, metrics = nets.train_chunk(atac, state, key, 0, data, cfg)
    for name in state._fields:
        nets.check_close(getattr(after, name).params, getattr(here, name).params)
    nets.check_close(after.critic.target_params, here.critic.target_params)
    assert {*metrics} == {*found[0]}
    for name in metrics:
        mean = np.mean([x[name] for x in found])
        np.testing.assert_allclose(metrics[name], mean, rtol=1e-3, atol=1e-4)
    norms = [
        np.sqrt((np.asarray(x, np.float64) ** 2).sum(axis=(1, 2)))
        for x in jax.tree.leaves(after.critic.params)
        if x.ndim == 3
    ]
    assert max(x.max() for x in norms) <= 1.5 * (1 + 1e-5)


def test_learning_rates():
    """The actor's falls to the slow one at the end of the warm start."""
    _, state, _, _ = setup(warm_start=3, **RATES)
    nets.check_rate(state.actor, lambda step: 0.05 if step < 3 else 0.01, steps=6)
    nets.check_rate(state.critic, lambda step: 0.05)
    nets.check_rate(state.log_temperature, lambda step: 0.05)


# --- Data ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("margin", [1e-6, 0.02])
def test_training_sees_clipped_actions(monkeypatch, tmp_path, margin):
    raw, settings = probes.random_transitions(20), {} if margin == 1e-6 else {"action_margin": 0.02}
    raw.action[:2] = [[1, -1], [0.5, -0.25]]
    _, data = nets.handed_over(atac, monkeypatch, tmp_path, raw, (-3, 5), **settings)
    np.testing.assert_allclose(data.action, raw.action.clip(margin - 1, 1 - margin), rtol=1e-7)
    assert np.abs(data.action).max() < 1 and np.isfinite(np.arctanh(data.action)).all()
    for name in ("observation", "next_observation", "termination", "reward"):
        assert np.array_equal(getattr(data, name), getattr(raw, name)), name

# SPDX-License-Identifier: Apache-2.0
"""WSRL's losses, networks, online update and the rows that it reads, against NumPy in float64.

The returns and the sampled actions are Cal-QL's: see test_cal_ql.py.
"""

import functools
import inspect
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpy_nets as nets
import probes
import pytest
from numpy_nets import directions, dot, double, slope

from algorithms import cal_ql, wsrl
from common import datasets
from common.experiment import buffers

critic_loss = nets.compiled(wsrl.critic_loss)
actor_loss = nets.compiled(wsrl.actor_loss)
temperature_loss = nets.compiled(wsrl.temperature_loss)
online_critic_loss = nets.compiled(wsrl.online_critic_loss)
setup = functools.partial(nets.setup, wsrl, critic_hidden=(16, 16), num_samples=4, num_critics=4)


# --- The method in NumPy ------------------------------------------------------------------------
def trunk(layers, x):
    for i in range(len(layers) // 2):
        x = nets.layer_norm(layers[f"LayerNorm_{i}"], nets.dense(layers[f"Dense_{i}"], x))
        x = np.maximum(x, 0)
    return x


def numpy_sample(params, observation, noise):
    """Actions [B, M, A] and log pi [B, M] for noise [B, M, A]."""
    layers = params["params"]
    x = trunk(layers["trunk"], observation)
    mean = nets.dense(layers["Dense_0"], x)
    log_std = layers["log_std"] if "log_std" in layers else nets.dense(layers["Dense_1"], x)
    log_std = np.broadcast_to(log_std, mean.shape).clip(np.log(1e-5), np.log(10))
    mean, log_std = mean[:, None], log_std[:, None]
    x = mean + np.exp(log_std) * noise
    return np.tanh(x), nets.log_normal(x, mean, log_std) + 2 * np.log(np.cosh(x)).sum(axis=-1)


def numpy_critics(params, observation, action):
    """[K, B, M] for actions [B, M, A]: a trunk for each of the K, one last layer for all."""
    layers, found = params["params"], []
    shape = (*action.shape[:2], observation.shape[-1])
    x = np.concatenate([np.broadcast_to(observation[:, None], shape), action], axis=-1)
    for k in range(len(layers["trunks"]["Dense_0"]["bias"])):
        one = jax.tree.map(lambda x, k=k: x[k], layers["trunks"])
        found.append(nets.dense(layers["Dense_0"], trunk(one, x))[..., 0])
    return np.stack(found)


def softplus(x):
    return np.log1p(np.exp(x))


def numpy_target(state, batch, action, drawn, cfg):
    """[B] for actions [B, M, A] of pi(s') and the numbers of the drawn critics."""
    next_q = numpy_critics(double(state.critic.target_params), batch.next_observation, action)
    target = []
    for i in range(len(batch.reward)):
        best = max(min(next_q[k, i, m] for k in drawn) for m in range(action.shape[1]))
        goes_on = 0.0 if batch.termination[i] else 1.0
        target.append(batch.reward[i] + cfg.discount * goes_on * best)
    return np.array(target)


def numpy_critic_loss(params, state, batch, drawn, cfg):
    """-> loss, TD error, gap"""
    uniform, noise, of_target, of_gap = drawn
    size, dim = batch.action.shape
    n = cfg.num_samples
    actor = double(state.actor.params)
    here, log_here = numpy_sample(actor, batch.observation, noise[:size])
    there, log_there = numpy_sample(actor, batch.next_observation, noise[size:])
    target = numpy_target(state, batch, there[:, n:], of_target, cfg)
    q, q_uniform, q_here, q_there = (
        numpy_critics(params, batch.observation, action)
        for action in (batch.action[:, None], uniform, here[:, :n], there[:, :n])
    )
    td_error = ((q[..., 0] - target) ** 2).mean()
    gap = 0.0
    for k in of_gap:
        for i in range(size):
            known = batch.returns_to_go[i] if cfg.calibrate else -np.inf
            terms = [] if cfg.importance_sampling else [np.exp(q[k, i, 0])]
            for j in range(n):
                weights = 0.5**dim, np.exp(log_here[i, j]), np.exp(log_there[i, j])
                if not cfg.importance_sampling:
                    weights = 1.0, 1.0, 1.0
                terms.append(np.exp(q_uniform[k, i, j]) / weights[0])
                terms.append(np.exp(max(q_here[k, i, j], known)) / weights[1])
                terms.append(np.exp(max(q_there[k, i, j], known)) / weights[2])
            total = np.sum(terms) if cfg.importance_sampling else np.mean(terms)
            gap += (np.log(total) - q[k, i, 0]) / size / len(of_gap)
    conservative = cfg.alpha * gap
    if cfg.target_action_gap is not None:
        multiplier = softplus(double(state.multiplier.params["raw"]))
        conservative = multiplier * (gap - cfg.target_action_gap)
    return td_error + conservative, td_error, gap


def draws(key, cfg, size=32, dim=2):
    """What the loss draws: uniform actions, noise at s and s', critics of target and of gap."""
    key, key_target, key_gap = jax.random.split(jax.random.clone(key), 3)
    key_uniform, key_noise = jax.random.split(key)
    count = cfg.num_samples * 2 if cfg.max_target_backup else cfg.num_samples + 1
    uniform = jax.random.uniform(key_uniform, (size, cfg.num_samples, dim), minval=-1, maxval=1)
    noise = jax.random.normal(key_noise, (2 * size, count, dim))
    members = (jax.random.randint(key, (2,), 0, cfg.num_critics) for key in (key_target, key_gap))
    return *double((uniform, noise)), *(np.asarray(x).tolist() for x in members)


VARIANTS = [
    {"max_target_backup": True, "target_action_gap": 0.8, "std_per_state": False},
    {"importance_sampling": False, "discount": 0.7, "calibrate": False},
]


@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_critic_loss_equals_numpy(overrides):
    """Its gradient, too: only the drawn critics have one of the gap."""
    cfg, state, key, data = setup(**overrides)
    data = data._replace(returns_to_go=jnp.linspace(-2.5, 2.5, 32).at[3].set(-jnp.inf))
    batch, params, drawn = double(data), double(state.critic.params), draws(key, cfg)
    loss, metrics, grads = critic_loss(state.critic.params, state, data, key, cfg)
    expected, td_error, gap = numpy_critic_loss(params, state, batch, drawn, cfg)
    np.testing.assert_allclose([loss, metrics["critic_loss"]], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["td_error"], td_error, rtol=1e-4)
    np.testing.assert_allclose(metrics["conservative_gap"], gap, rtol=1e-4)
    assert (metrics["bound_rate"] > 0.2) == cfg.calibrate
    for direction in directions(params, 2):
        expected = slope(
            lambda p: numpy_critic_loss(p, state, batch, drawn, cfg)[0], params, direction
        )
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=2e-3, atol=2e-3)


def doubled(data):
    return jax.tree.map(lambda x: jnp.concatenate([x, x[::-1]]), data)


def test_losses_of_the_online_phase_equal_numpy():
    """SAC's without an entropy in the target; the actor has the minimum of all critics."""
    cfg, state, key, data = setup()
    batch, params = double(data), double(state.critic.params)
    key_noise, key_members = jax.random.split(jax.random.clone(key))
    noise = double(jax.random.normal(key_noise, (32, 1, 2)))
    drawn = np.asarray(jax.random.randint(key_members, (2,), 0, 4)).tolist()
    actor = double(state.actor.params)

    def numpy_loss(params):
        action, _ = numpy_sample(actor, batch.next_observation, noise)
        target = numpy_target(state, batch, action, drawn, cfg)
        q = numpy_critics(params, batch.observation, batch.action[:, None])[..., 0]
        return ((q - target) ** 2).mean()

    loss, metrics, grads = online_critic_loss(state.critic.params, state, data, key, cfg)
    np.testing.assert_allclose([loss, metrics["td_error"]], numpy_loss(params), rtol=1e-4)
    for direction in directions(params, 2):
        expected = slope(numpy_loss, params, direction)
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=2e-3, atol=2e-3)
    other = data._replace(returns_to_go=data.returns_to_go + 5)
    assert online_critic_loss(state.critic.params, state, other, key, cfg)[0] == loss

    rows = doubled(data)
    batch, noise = double(rows), double(jax.random.normal(jax.random.clone(key), (64, 1, 2)))
    temperature = softplus(double(state.temperature.params["raw"]))

    def numpy_actor(actor):
        action, log_prob = numpy_sample(actor, batch.observation, noise)
        return (
            temperature * log_prob - numpy_critics(params, batch.observation, action).min(0)
        ).mean()

    loss, _, grads = actor_loss(state.actor.params, state, rows, key, cfg)
    np.testing.assert_allclose(loss, numpy_actor(actor), rtol=1e-4)
    for direction in directions(actor, 2):
        expected = slope(numpy_actor, actor, direction)
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=2e-3, atol=2e-3)

    _, log_prob = numpy_sample(actor, batch.next_observation, noise)  # of the next observations
    loss, metrics, _ = temperature_loss(state.temperature.params, state, rows, key, cfg)
    np.testing.assert_allclose(loss, temperature * (-log_prob.mean() + 2), rtol=1e-4)
    np.testing.assert_allclose(metrics["temperature"], temperature, rtol=1e-5)


@pytest.mark.parametrize(("gap", "sign"), [(1.3, -1), (0.3, 1)])
def test_the_multiplier_grows_while_the_gap_is_too_large(gap, sign):
    cfg = wsrl.Config(target_action_gap=0.8)
    loss, grads = jax.value_and_grad(wsrl.multiplier_loss)({"raw": jnp.float32(0.4)}, gap, cfg)
    np.testing.assert_allclose(loss, -softplus(0.4) * (gap - 0.8), rtol=1e-5)
    assert np.sign(grads["raw"]) == sign


def test_termination_stops_the_bootstrap():
    cfg, state, key, data = setup()

    def loss(**columns):
        rows = {name: jnp.full_like(getattr(data, name), x) for name, x in columns.items()}
        return online_critic_loss(state.critic.params, state, data._replace(**rows), key, cfg)[0]

    for termination in (0, 1):
        here = loss(termination=termination)
        moved = loss(termination=termination, next_observation=0.5)
        assert (here == moved) == (termination == 1)


def test_a_critic_may_be_drawn_twice():
    cfg = wsrl.Config(num_critics=3)
    keys = jax.random.split(jax.random.key(0), 3000)
    pairs = np.asarray(jax.vmap(functools.partial(wsrl.draw_critics, cfg=cfg))(keys))
    _, counts = np.unique(pairs, axis=0, return_counts=True)
    assert len(counts) == 9 and abs(counts / 3000 * 9 - 1).max() < 0.2


# --- State --------------------------------------------------------------------------------------
def test_initial_state():
    """Orthogonal kernels, a small gain in the last hidden layers; temperature and multiplier 1."""
    state = nets.fresh(wsrl)
    nets.check_targets_are_copies(state.critic)
    for net in (state.temperature, state.multiplier):
        np.testing.assert_allclose(net.apply_fn(net.params), 1.0, rtol=1e-6)
    critic = state.critic.params["params"]
    assert critic["Dense_0"]["kernel"].shape == (64, 1)  # of all three
    kernels = critic["trunks"]["Dense_1"]["kernel"]
    assert len(kernels) == 3 and not np.allclose(kernels[0], kernels[1])
    actor = state.actor.params["params"]
    found = {
        name: np.linalg.norm(actor["trunk"][name]["kernel"], 2) for name in ("Dense_0", "Dense_1")
    }
    np.testing.assert_allclose([found["Dense_0"], found["Dense_1"]], [2**0.5, 1e-2], rtol=1e-4)
    for name in ("Dense_0", "Dense_1"):
        np.testing.assert_allclose(np.linalg.norm(actor[name]["kernel"], 2), 2**0.5, rtol=1e-4)


def test_the_rest_is_cal_qls():
    for name in (
        "with_returns",
        "sample_actions",
        "sample_batch",
        "policy",
        "explore",
        "normalise",
    ):
        assert inspect.getsource(getattr(wsrl, name)) == inspect.getsource(getattr(cal_ql, name))


# --- The online phase ---------------------------------------------------------------------------
def test_an_online_update_is_that_of_sac_with_idle_steps_of_adam():
    """Two critic steps on halves of the rows, then actor and temperature on all of them."""
    rates = {"actor_learning_rate": 0.02, "critic_learning_rate": 0.05, "target_rate": 0.3}
    cfg, state, key, data = setup(updates_per_step=2, **rates)
    cfg_here, here, _, _ = setup(updates_per_step=2)
    names = {"actor": 0.02, "critic": 0.05, "temperature": 0.02}
    adam = {name: nets.Adam(rate) for name, rate in names.items()}

    def step(**grads):
        nonlocal here
        for name in names:
            net = getattr(here, name)
            moved = grads.get(name, jax.tree.map(np.zeros_like, net.params))
            net = net.replace(params=adam[name].step(net.params, moved))
            here = here._replace(**{name: net})

    rows, key_critic, key_actor, key_temperature = nets._sample(
        jax.random.clone(key), 6, data, 64, 4
    )
    for i, one in enumerate(jax.random.split(key_critic, 2)):
        batch = jax.tree.map(lambda x, i=i: x[32 * i : 32 * (i + 1)], rows)
        _, _, grads = online_critic_loss(here.critic.params, here, batch, one, cfg_here)
        step(critic=grads)
        target = nets.polyak(here.critic.params, here.critic.target_params, 0.3)
        here = here._replace(critic=here.critic.replace(target_params=target))
    _, _, actor_grads = actor_loss(here.actor.params, here, rows, key_actor, cfg_here)
    _, _, grads = temperature_loss(here.temperature.params, here, rows, key_temperature, cfg_here)
    step(actor=actor_grads, temperature=grads)

    program = jax.jit(wsrl.online_update, static_argnums=4)
    after, _ = program(state, 6, jax.random.clone(key), data, cfg)
    for name in ("actor", "critic", "temperature", "multiplier"):
        nets.check_close(getattr(after, name).params, getattr(here, name).params)
    nets.check_close(after.critic.target_params, here.critic.target_params)
    assert (after.critic.step, after.actor.step, after.multiplier.step) == (3, 3, 0)


def test_the_online_phase_reads_no_row_of_the_data_set(monkeypatch):
    """Its batches are U times as large, and its targets may take another number of actions."""
    rows = probes.random_transitions(7, 3, 1, reward=np.arange(7.0))
    new = probes.random_transitions(3, 3, 1, reward=100 + np.arange(3.0))
    toy = datasets.Dataset("toy", rows, np.array([7]), None)
    cfg = wsrl.Config(batch_size=50, log_every=4, reward_scale=2.0, reward_shift=1.0)
    data = jax.device_put(wsrl.with_returns(toy, cfg))
    statistics = np.float32([1, 2, 3]), np.float32([2, 2, 4])
    more = wsrl.online_rows(jax.tree.map(lambda x: x[:, None], new), statistics, cfg)
    for name in ("observation", "next_observation"):
        expected = (getattr(new, name) - statistics[0]) / statistics[1]
        np.testing.assert_allclose(getattr(more, name)[:, 0], expected, rtol=1e-5, atol=1e-6)
    assert np.array_equal(more.reward[:, 0], [201, 203, 205])
    seen = []

    def critics_step(state, batch_and_key, cfg):
        seen.append((batch_and_key[0], cfg))
        raise StopIteration  # the batch is all that is looked at

    monkeypatch.setattr(wsrl, "critics_step", critics_step)
    monkeypatch.setattr(
        jax.lax, "scan", lambda f, init, xs: f(init, jax.tree.map(lambda x: x[0], xs))
    )
    own = buffers.write(buffers.empty(data, 1, 5, apart=True), more, 0).of_seed(0)
    with pytest.raises(StopIteration):
        wsrl.online_chunk(SimpleNamespace(), jax.random.key(0), 0, own, cfg)
    ((batch, cfg_there),) = seen
    assert batch.reward.shape == (50,) and set(batch.reward.tolist()) == {201, 203, 205}
    assert cfg.max_target_backup and not cfg_there.max_target_backup

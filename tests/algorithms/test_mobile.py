# SPDX-License-Identifier: Apache-2.0
"""MOBILE's penalty and critics against NumPy, hand-worked numbers and mopo.py.

The dynamics, the ring and the batches are those of mopo.py, see test_mopo.py.
"""

import functools

import helpers_runs as runs
import jax
import jax.numpy as jnp
import numpy as np
import numpy_nets as nets
import probes
import pytest
import test_mopo
from numpy_nets import directions, dot, double, slope
from test_combo import numpy_sample
from test_mopo import KEY, numpy_predict

from algorithms import mobile, mopo

# The range of the targets is where some rows are raised and others are not.
MODEL = test_mopo.SMALL | {"num_samples": 3, "real_ratio": 0.25, "penalty_weight": 2.0}
MODEL |= {"num_elites": 2, "num_models": 3, "least_target": -0.5}


@functools.partial(jax.jit, static_argnums=4)
def program(params, state, batch, key, cfg):
    return jax.value_and_grad(mobile.critic_loss, has_aux=True)(params, state, batch, key, cfg)


def critic_loss(params, state, batch, key, cfg):
    """-> loss, metrics, gradient"""
    (loss, metrics), grads = program(params, state, batch, jax.random.clone(key), cfg)
    return float(loss), metrics, grads


def setup(**overrides):
    """(cfg, state with random parameters, batch: 8 rows of the data and 24 of the model)"""
    _, state, _, data = test_mopo.setup()
    cfg = probes.config(mobile, **(MODEL | overrides))
    batch = mobile.ModelRows(*[getattr(data, name) for name in mobile.ModelRows._fields])
    return cfg, mobile.State(*state), batch


def numpy_inconsistency(state, batch, key, cfg):
    """[B], elite by elite, row by row and sample by sample."""
    key_model, key_action = jax.random.split(jax.random.clone(key))
    elites = np.asarray(state.fit.elites)
    size, width = batch.observation.shape
    members = len(state.fit.best_error)
    same = [np.stack([x] * members) for x in (batch.observation, batch.action)]
    mean, log_variance = numpy_predict(double(state.dynamics.params), state, *same)
    shape = cfg.num_samples, len(elites), size
    noise = double(jax.random.normal(key_model, (*shape, width + 1)))
    action_noise = double(jax.random.normal(key_action, (*shape, 2)))
    actor, target = double(state.actor.params), double(state.critic.target_params)
    found = np.zeros(size)
    for row in range(size):
        estimates = []
        for place, member in enumerate(elites):
            values = []
            for n in range(cfg.num_samples):
                std = np.exp(log_variance[member, row] / 2)
                change = mean[member, row] + std * noise[n, place, row]
                after = batch.observation[row] + change[:-1]
                action, _ = numpy_sample(actor, after, action_noise[n, place, row])
                values.append(min(nets.critics(target, after[None], action[None])[:, 0]))
            estimates.append(np.mean(values))
        found[row] = np.sqrt(np.var(estimates) * len(elites) / (len(elites) - 1))
    return found


def numpy_critic_loss(params, state, batch, key, cfg):
    key_next, key_penalty = jax.random.split(jax.random.clone(key))
    size, num_real = len(batch.reward), int(cfg.real_ratio * len(batch.reward))
    noise = double(jax.random.normal(key_next, (size, 2)))
    next_action, _ = numpy_sample(double(state.actor.params), batch.next_observation, noise)
    target_params = double(state.critic.target_params)
    next_q = nets.critics(target_params, batch.next_observation, next_action).min(axis=0)
    rows = jax.tree.map(lambda x: x[num_real:], batch)
    penalty = np.append(np.zeros(num_real), numpy_inconsistency(state, rows, key_penalty, cfg))
    target = batch.reward - cfg.penalty_weight * penalty
    target += cfg.discount * np.where(batch.termination, 0, next_q)
    raised = target < cfg.least_target
    assert 2 < raised.sum() < size - 2
    target[raised] = cfg.least_target
    return np.mean((nets.critics(params, batch.observation, batch.action) - target) ** 2)


def test_critic_loss_and_gradient_equal_numpy():
    """Elites, samples, the data's rows and the least target, all in one."""
    cfg, state, batch = setup()
    loss, metrics, grads = critic_loss(state.critic.params, state, batch, KEY, cfg)
    params, rows = double(state.critic.params), double(batch)
    of = functools.partial(numpy_critic_loss, state=state, batch=rows, key=KEY, cfg=cfg)
    np.testing.assert_allclose(loss, of(params), rtol=1e-4)
    assert metrics["penalty"] > 0
    for direction in directions(params, 2):
        np.testing.assert_allclose(dot(grads, direction), slope(of, params, direction), rtol=2e-3)


def test_rows_of_the_data_have_no_penalty():
    """Other actions change the penalty where the model made the row, and only there."""
    cfg, state, batch = setup()
    rows, penalties = np.arange(32)[:, None], []
    for changed in (rows < 0, rows < 8, rows == 8):
        other = batch._replace(action=np.where(changed, -batch.action, batch.action))
        _, metrics, _ = critic_loss(state.critic.params, state, other, KEY, cfg)
        penalties.append(float(metrics["penalty"]))
    assert penalties[0] == penalties[1] != penalties[2]


def test_the_penalty_is_the_elites_disagreement_on_values():
    """Not their own noise: equal elites of no variance agree, a member that is no elite is not
    asked, and two that differ by d in a value disagree by d / sqrt(2)."""
    cfg, state, batch = setup()
    params = state.dynamics.params
    layers = jax.tree.map(lambda x: jnp.zeros_like(x), params["members"])
    bias = layers["params"]["Dense_2"]["bias"]  # [M, 2 (O + 1)]
    width = batch.observation.shape[-1]

    def first_column(params, observation, action):
        return params[0] * observation[None, ..., 0]

    critic = nets.linear_net(mobile.TrainState.create, first_column, [9.0], [2.0])
    compiled = jax.jit(mobile.inconsistency, static_argnums=3)

    def of(moves):
        """U of dynamics that move the first column by `moves`, with almost no noise."""
        moved = bias.at[:, 0].set(jnp.array(moves)).at[:, width + 1 :].set(-30.0)
        last = layers["params"]["Dense_2"] | {"bias": moved}
        members = {"params": layers["params"] | {"Dense_2": last}}
        narrow = {"min_log_variance": jnp.full(width + 1, -30.0), "members": members}
        dynamics = state.dynamics.replace(params=params | narrow)
        fixed = state._replace(dynamics=dynamics, critic=critic)
        return np.asarray(compiled(fixed, batch, jax.random.clone(KEY), cfg))

    np.testing.assert_allclose(of([5.0, 1.0, 1.0]), 0, atol=1e-4)  # the elites are 1 and 2
    np.testing.assert_allclose(of([5.0, 1.0, 4.0]), 2 * 3 / np.sqrt(2), rtol=1e-4)


def test_the_backup_has_no_entropy_and_stops_at_terminations():
    cfg, state, batch = setup()
    batch = batch._replace(reward=batch.reward + 100)  # no target is raised
    check = functools.partial(critic_loss, state.critic.params)
    other = state.log_temperature.replace(params={"log": jnp.float32(2.0)})
    other = state._replace(log_temperature=other)
    assert check(state, batch, KEY, cfg)[0] == check(other, batch, KEY, cfg)[0]
    moved = batch._replace(next_observation=batch.next_observation + 1)
    assert check(state, batch, KEY, cfg)[0] != check(state, moved, KEY, cfg)[0]
    batch, moved = (x._replace(termination=np.ones(32, np.float32)) for x in (batch, moved))
    assert check(state, batch, KEY, cfg)[0] == check(state, moved, KEY, cfg)[0]


def test_rollouts_are_mopos_without_the_penalty():
    cfg, state, batch = setup()
    same = probes.config(mopo, **(MODEL | {"penalty_weight": 0.0}))

    @jax.jit
    def both(state, observation):
        keys = [jax.random.clone(KEY) for _ in range(2)]
        rows = mobile.unpenalised_step(state, observation, keys[0], cfg)
        return rows, mopo.penalised_step(state, observation, keys[1], same)

    rows, expected = both(state, batch.observation[:6])
    for x, y in zip(rows, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


@functools.partial(jax.jit, static_argnums=2)
def first_temperature(key, batch, cfg):
    return mobile.create_state(key, batch, cfg).log_temperature


def test_a_fixed_temperature_stays():
    """It begins there, and its optimiser makes steps of no length; otherwise it begins at 1."""
    for fixed, begins in ((0.2, 0.2), (None, 1.0)):
        cfg, _, batch = setup(fixed_temperature=fixed, temperature_learning_rate=0.1)
        example = jax.tree.map(lambda x: x[:1], batch)
        net = first_temperature(jax.random.clone(KEY), example, cfg)
        np.testing.assert_allclose(net.apply_fn(net.params), begins, rtol=1e-6)
        after = net.apply_gradients(grads={"log": jnp.float32(1.0)})
        assert (after.params["log"] == net.params["log"]) == (fixed is not None)


@pytest.mark.parametrize("flags", [("--num-elites", "1"), ("--fixed-temperature", "0")])
def test_settings_that_cannot_be_are_refused(tmp_path, monkeypatch, capsys, flags):
    monkeypatch.chdir(tmp_path)
    argv = ["--dataset", runs.write_hdf5("data.hdf5"), *runs.tiny("mobile"), *flags]
    with pytest.raises(SystemExit) as leave:
        runs.start("mobile", argv)
    line = capsys.readouterr().err
    assert leave.value.code == 2 and line.count("\n") == 1 and flags[0] in line
    assert not (tmp_path / "runs").exists()

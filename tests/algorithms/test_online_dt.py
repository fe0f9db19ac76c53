# SPDX-License-Identifier: Apache-2.0
"""Online DT's network, losses, update, acting and episodes of the env against NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_nets as nets
import probes
import pytest
import test_dt
from numpy_nets import dense, directions, dot, double, slope

from algorithms import online_dt
from common import interaction
from common.datasets import Dataset

TINY = {"context": 4, "embedding": 8, "num_layers": 1, "num_heads": 2, "batch_size": 6}
TINY |= {"episode_length": 12, "reward_scale": 0.5, "dropout": None, "eval_context": 3}
HURRIED = {"actor_learning_rate": 0.05, "weight_decay": 0.5, "max_gradient_norm": 0.05}
HURRIED |= {"warm_up": 3, "log_every": 2, "temperature_learning_rate": 0.1}
actor_loss = nets.compiled(online_dt.actor_loss)


@functools.cache
def shapes(cfg):
    create = functools.partial(online_dt.create_state, cfg=cfg)
    return jax.eval_shape(create, jax.random.key(0), test_dt.toy().transitions)


def setup(**overrides):
    """cfg, a state of random numbers, a key, and windows of which many are padded."""
    cfg = online_dt.Config(**(TINY | overrides))
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes(cfg))
    state = nets.shaken(state, seed=8)
    params = jax.tree.map(lambda x: 2 * np.asarray(x), state.actor.params)  # so that inputs matter
    state = state._replace(actor=state.actor.replace(params=jax.device_put(params)))
    batch = test_dt.windows(test_dt.steps(), np.array([0, 1, 3, 13, 25, 38]), cfg)
    return cfg, state, jax.random.key(1), online_dt.Steps(*batch)


# --- The method in NumPy ------------------------------------------------------------------------
def numpy_forward(params, batch, cfg):
    """Mean and log std, [B, K, A] each; padding is left out, and 0 in the result."""
    layers = params["params"]
    mean, log_std = np.zeros(batch.action.shape), np.zeros(batch.action.shape)
    for b, timesteps in enumerate(batch.timestep):
        tokens, valid = [], np.flatnonzero(timesteps >= 0)
        for k in valid:
            time = 0.0
            if cfg.timestep_embedding:
                time = layers["Embed_0"]["embedding"][min(timesteps[k], cfg.episode_length - 1)]
            asked = np.array([cfg.reward_scale * batch.returns_to_go[b, k]])
            inputs = (asked, batch.observation[b, k], batch.action[b, k])
            tokens += [dense(layers[f"Dense_{i}"], x) + time for i, x in enumerate(inputs)]
        x = test_dt.norm(layers["LayerNorm_0"], np.array(tokens))
        for i in range(cfg.num_layers):
            x = test_dt.numpy_block(layers[f"Block_{i}"], x, cfg.num_heads)
        x = test_dt.norm(layers["LayerNorm_1"], x[1::3])
        mean[b, valid] = dense(layers["Dense_3"], x)
        log_std[b, valid] = -5 + 7 * (np.tanh(dense(layers["Dense_4"], x)) + 1) / 2
    return mean, log_std


def numpy_density(x, mean, log_std):
    """log of the density of tanh(x), x ~ N(mean, std), summed over the dimensions."""
    normal = -(((x - mean) / np.exp(log_std)) ** 2) / 2 - log_std - np.log(2 * np.pi) / 2
    return (normal + 2 * np.log(np.cosh(x))).sum(axis=-1)  # 1 / (1 - tanh(x)^2) = cosh(x)^2


def numpy_loss(params, batch, noise, temperature, cfg):
    """(loss, entropy), means over the steps that are no padding."""
    mean, log_std = numpy_forward(params, batch, cfg)
    step = np.asarray(batch.timestep) >= 0
    x = np.arctanh(batch.action.clip(-1 + 1e-6, 1 - 1e-6))
    log_prob = numpy_density(x[step], mean[step], log_std[step]).mean()
    drawn = mean + np.exp(log_std) * noise
    entropy = -numpy_density(drawn[step], mean[step], log_std[step]).mean()
    return -log_prob - temperature * entropy, entropy


def noise_of(key, batch):
    return np.asarray(jax.random.normal(jax.random.split(key)[1], batch.action.shape), float)


# --- Losses -------------------------------------------------------------------------------------
@pytest.mark.parametrize("timestep_embedding", [False, True])
def test_loss_and_gradient_equal_numpy(timestep_embedding):
    cfg, state, key, batch = setup(timestep_embedding=timestep_embedding)
    batch = batch._replace(action=0.9 * batch.action)
    params, data = double(state.actor.params), test_dt.wide(batch)
    noise, temperature = noise_of(key, batch), np.exp(float(state.log_temperature.params["log"]))
    loss, metrics, grads = actor_loss(state.actor.params, state, batch, key, cfg)
    expected, entropy = numpy_loss(params, data, noise, temperature, cfg)
    np.testing.assert_allclose([loss, metrics["entropy"]], [expected, entropy], rtol=1e-4)
    np.testing.assert_allclose(metrics["temperature"], temperature, rtol=1e-6)
    for direction in directions(params):
        expected = slope(
            lambda p: numpy_loss(p, data, noise, temperature, cfg)[0], params, direction
        )
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=2e-3)


def test_an_action_on_the_border_has_a_finite_density():
    """What atanh makes of 1 - 1e-6, on both sides."""
    cfg, state, key, batch = setup()
    at_the_border = batch._replace(action=jnp.sign(batch.action))
    loss, metrics, grads = actor_loss(state.actor.params, state, at_the_border, key, cfg)
    data, noise = test_dt.wide(at_the_border), noise_of(key, batch)
    temperature = float(metrics["temperature"])
    expected, _ = numpy_loss(double(state.actor.params), data, noise, temperature, cfg)
    np.testing.assert_allclose(loss, expected, rtol=0.03)  # 1 - 1e-6 in float32 is a twentieth off
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


def test_the_temperature_falls_where_the_entropy_is_above_its_target():
    """temperature (entropy + A): the gradient by its logarithm, and the sign of the step."""
    _, state, _, _ = setup()
    log_temperature = float(state.log_temperature.params["log"])
    for entropy in (-3.0, -2.0, 1.5):
        loss, grads = jax.value_and_grad(online_dt.temperature_loss, has_aux=True)(
            state.log_temperature.params, state, entropy, 2
        )
        expected = np.exp(log_temperature) * (entropy + 2)
        np.testing.assert_allclose([loss[0], grads["log"]], expected, rtol=1e-5, atol=1e-7)


def test_the_initial_temperature():
    state = jax.jit(functools.partial(online_dt.create_state, cfg=online_dt.Config(**TINY)))(
        jax.random.key(0), test_dt.toy().transitions
    )
    np.testing.assert_allclose(np.exp(state.log_temperature.params["log"]), 0.1, rtol=1e-6)
    layers = state.actor.params["params"]
    for name in ("Dense_3", "Dense_4"):  # the heads: orthogonal columns, no bias
        kernel = np.asarray(layers[name]["kernel"])
        np.testing.assert_allclose(kernel.T @ kernel, np.eye(2), atol=1e-5)
        assert not layers[name]["bias"].any()
    assert "Embed_0" not in layers


# --- Update -------------------------------------------------------------------------------------
def test_updates():
    """Two of them: clip, LAMB's trust ratio per tensor, decay, warm-up, temperature, keys."""
    cfg, state, key, _ = setup(**HURRIED)
    after, metrics = nets.train_chunk(online_dt, state, key, 6, test_dt.steps(), cfg)
    here, memory, log_temperature = state, {}, float(state.log_temperature.params["log"])
    adam, losses, temperature_losses = nets.Adam(0.1), [], []
    for count, step in enumerate((6, 7)):
        key_batch, key_actor = jax.random.split(jax.random.fold_in(jax.random.key(1), step))
        index = np.asarray(jax.random.randint(key_batch, (6,), 0, 40))
        batch = online_dt.Steps(*test_dt.windows(test_dt.steps(), index, cfg))
        loss, found, grads = actor_loss(here.actor.params, here, batch, key_actor, cfg)
        leaves, tree = jax.tree.flatten(double(here.actor.params))
        gradients = jax.tree.leaves(double(grads))
        norm = np.sqrt(sum((g**2).sum() for g in gradients))
        assert norm > 0.05
        new = []
        for i, (x, g) in enumerate(zip(leaves, gradients, strict=True)):
            g = g * 0.05 / norm
            m, v = memory.get(i, (0.0, 0.0))
            memory[i] = m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            wanted = m / (1 - 0.9 ** (count + 1))
            wanted = wanted / (np.sqrt(v / (1 - 0.999 ** (count + 1))) + 1e-8) + 0.5 * x
            trust = np.linalg.norm(x) / np.linalg.norm(wanted)
            new.append(np.float32(x - 0.05 * min((count + 1) / 3, 1) * trust * wanted))
        entropy = float(found["entropy"])
        slope_of_log = np.exp(log_temperature) * (entropy + 2)
        temperature_losses.append(slope_of_log)
        log = adam.step({"log": np.float64(log_temperature)}, {"log": np.float64(slope_of_log)})
        log_temperature = float(log["log"])
        here = here._replace(
            actor=here.actor.replace(params=tree.unflatten(new)),
            log_temperature=here.log_temperature.replace(
                params={"log": jnp.float32(log_temperature)}
            ),
        )
        losses.append(float(loss))
    nets.check_close(after.actor.params, here.actor.params, 2e-3, 2e-4)
    np.testing.assert_allclose(after.log_temperature.params["log"], log_temperature, atol=1e-5)
    np.testing.assert_allclose(metrics["actor_loss"], np.mean(losses), rtol=1e-3)
    np.testing.assert_allclose(metrics["temperature_loss"], np.mean(temperature_losses), rtol=1e-3)
    assert sorted(metrics) == sorted(
        ["actor_loss", "log_prob", "entropy", "temperature", "temperature_loss"]
    )


# --- Acting -------------------------------------------------------------------------------------
def test_acting():
    """The mean or a draw of the window's last step, both of which reach the memory."""
    cfg, state, _, _ = setup()
    rows, rng = test_dt.toy().transitions, np.random.default_rng(0)
    params, apply_fn = online_dt.policy_params(state), state.actor.apply_fn
    memory = online_dt.initial_memory(5, rows, cfg, 7.0)
    assert memory.observation.shape == (5, 3, 3)  # as many steps as eval_context
    mean, std = (np.asarray(x) for x in state.statistics)
    policy = jax.jit(functools.partial(online_dt.policy, apply_fn))
    explore = jax.jit(functools.partial(online_dt.explore, apply_fn))
    observations, rewards = rng.standard_normal((4, 5, 3)), rng.standard_normal((4, 5))
    steps, asked = [], np.full(5, 7.0)
    for t in range(4):
        reward = np.float32(rewards[t - 1] if t else np.zeros(5))
        arguments = params, np.float32(observations[t]), jax.random.key(t), memory, reward
        action, kept = policy(*arguments)
        drawn, memory = explore(*arguments)
        asked = asked - reward
        steps.append([(observations[t] - mean) / std, np.zeros((5, 2)), asked, np.full(5, t)])
        window = online_dt.Steps(*(np.stack([s[i] for s in steps[-3:]], axis=1) for i in range(4)))
        expected, log_std = (x[:, -1] for x in numpy_forward(double(params[0]), window, cfg))
        np.testing.assert_allclose(action, np.tanh(expected), rtol=1e-3, atol=1e-4)
        noise = np.asarray(jax.random.normal(jax.random.key(t), (5, 2)))
        expected = np.tanh(expected + np.exp(log_std) * noise)
        np.testing.assert_allclose(drawn, expected, rtol=1e-3, atol=1e-4)
        assert np.array_equal(kept.action[:, -1], action)
        assert np.array_equal(memory.action[:, -1], drawn)
        steps[-1][1] = np.asarray(drawn, float)


# --- Episodes -----------------------------------------------------------------------------------
def test_the_best_episodes_come_worst_first():
    rows = test_dt.toy().transitions
    dataset = Dataset("toy", rows, test_dt.ENDS, np.array([3.0, -1.0, 2.0, 9.0, -5.0]))
    best, ends = online_dt.best_episodes(test_dt.steps(), dataset, 3)
    expected = np.r_[4:15, 0:3, 15:31]
    for found, column in zip(best, test_dt.steps(), strict=True):
        assert np.array_equal(found, np.asarray(column)[expected])
    assert ends.tolist() == [11, 14, 30]
    best, ends = online_dt.best_episodes(test_dt.steps(), dataset, 100)
    assert len(best.timestep) == 40 and len(ends) == 5


def test_rows_of_the_env_get_the_returns_that_came():
    """Two seeds; a termination and a time limit end episodes, the last one is under way."""
    rows = probes.random_transitions(14, 3, 1)
    rows = jax.tree.map(lambda x: np.array(x.reshape(7, 2, *x.shape[1:])), rows)
    rows.termination[:], rows.truncation[:] = 0, 0
    rows.termination[2, 0], rows.truncation[4, 1] = 1, 1
    mean, std = np.arange(3.0), np.arange(1.0, 4.0)
    found = online_dt.online_rows(rows, test_dt.toy(), (mean, std))
    for i, end in ((0, 3), (1, 5)):
        expected = [rows.reward[t:end, i].sum() for t in range(end)]
        np.testing.assert_allclose(found.returns_to_go[:end, i], expected, rtol=1e-5, atol=1e-6)
        assert found.timestep[:, i].tolist() == [*range(end), *range(7 - end)]
    np.testing.assert_allclose(found.observation, (rows.observation - mean) / std, rtol=1e-5)
    assert np.array_equal(found.action, rows.action)


@pytest.mark.parametrize("exploration_return", [None, 3.5])
def test_what_reaches_the_online_phase(monkeypatch, tmp_path, exploration_return):
    given = {}
    original = interaction.Interaction.__init__

    def init(online, run, data, *args, **kwargs):
        given.update(kwargs, data=data)
        original(online, run, data, *args, **kwargs)

    monkeypatch.setattr(interaction.Interaction, "__init__", init)
    overrides = TINY | {"replay_episodes": 2, "exploration_return": exploration_return}
    rows, returns = test_dt.toy().transitions, (1.0, 9.0, -4.0, 2.0, 0.0)
    arguments = monkeypatch, tmp_path, rows, returns, test_dt.ENDS
    _, data = nets.handed_over(online_dt, *arguments, **overrides)
    assert len(data.timestep) == 40  # all episodes are learnt from before
    number, ends = given["replay"]
    assert number == 2 and ends.tolist() == [16, 17]  # the fourth one and the second
    assert np.array_equal(given["data"].action, np.asarray(data.action)[np.r_[15:31, 3:4]])
    best = max(np.asarray(data.returns_to_go)[np.append(0, test_dt.ENDS[:-1])])
    asked = 2 * best if exploration_return is None else exploration_return
    assert given["memory"].timestep.shape == (1, 3)
    np.testing.assert_allclose(given["memory"].returns_to_go, asked, rtol=1e-6)

# SPDX-License-Identifier: Apache-2.0
"""IDQL's losses, networks, sampling and update against NumPy in float64 and hand-worked numbers."""

import functools
import itertools
import math

import jax
import numpy as np
import numpy_nets as nets
import probes
import pytest
from numpy_nets import directions, dot, double, slope

from algorithms import idql

critic_loss = nets.compiled(idql.critic_loss)
value_loss = nets.compiled(idql.value_loss)
actor_loss = nets.compiled(idql.actor_loss)
setup = functools.partial(nets.setup, idql, actor_hidden=(8,))
FLOW = {"generator": "flow", "actor_hidden": (8, 12)}


# --- The method in NumPy ------------------------------------------------------------------------
def relu(x):
    return np.maximum(x, 0)


def swish(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def numpy_value(params, *inputs, flow=False, norm="none"):
    x, layers = np.concatenate(inputs, axis=-1), params["params"]
    norms = (layers[f"LayerNorm_{i}"] for i in itertools.count())
    if norm == "input":
        x = nets.layer_norm(next(norms), x)
    for i in range(sum(name.startswith("Dense") for name in layers) - 1):
        x = (gelu if flow else relu)(nets.dense(layers[f"Dense_{i}"], x))
        if norm == "hidden":
            x = nets.layer_norm(next(norms), x)
    return nets.dense(layers[f"Dense_{i + 1}"], x)[..., 0]


def numpy_v(params, observation, cfg):
    return numpy_value(params, observation, flow=cfg.generator == "flow", norm=cfg.layer_norm)


def numpy_q(params, observation, action, cfg):
    """[K, ...]"""
    how = {"flow": cfg.generator == "flow", "norm": cfg.layer_norm}
    how["norm"] = "none" if how["norm"] == "input" else how["norm"]
    members = [jax.tree.map(lambda x, k=k: x[k], params) for k in range(cfg.num_critics)]
    return np.stack([numpy_value(one, observation, action, **how) for one in members])


def numpy_critic_loss(params, state, batch, cfg):
    next_value = numpy_v(double(state.value_net.params), batch.next_observation, cfg)
    predicted, loss = numpy_q(params, batch.observation, batch.action, cfg), 0.0
    for i in range(len(batch.reward)):
        target = batch.reward[i]
        if not batch.termination[i]:
            target += cfg.discount * next_value[i]
        loss += sum((q[i] - target) ** 2 for q in predicted) / len(batch.reward)
    return loss, predicted.mean()


def numpy_value_loss(params, state, batch, cfg):
    q = numpy_q(double(state.critic.target_params), batch.observation, batch.action, cfg)
    value = numpy_v(params, batch.observation, cfg)
    u = q.min(axis=0) - value
    return np.mean(np.abs(cfg.expectile - (u < 0)) * u**2), value.mean()


def numpy_actor(params, observation, action, time, cfg, drop=lambda i, x: x):
    """Noise or velocity. `time` [..., 1]"""
    layers = params["params"]
    dense = (layers[f"Dense_{i}"] for i in itertools.count())
    if cfg.generator == "flow":
        x = np.concatenate([observation, action, time], axis=-1)
        for i in range(len(cfg.actor_hidden)):
            x = drop(i, gelu(nets.dense(next(dense), x)))
        return nets.dense(layers["head"], x)
    angle = 2 * np.pi * time * layers["frequency"]
    context = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)
    context = swish(nets.dense(next(dense), context))
    context = nets.dense(next(dense), context)
    x = nets.dense(next(dense), np.concatenate([action, observation, context], axis=-1))
    for i, width in enumerate(cfg.actor_hidden):
        y = nets.layer_norm(layers[f"LayerNorm_{i}"], drop(i, x))
        y = swish(nets.dense(next(dense), y))
        assert y.shape[-1] == 4 * width
        y = nets.dense(next(dense), y)
        x = y + (x if x.shape == y.shape else nets.dense(next(dense), x))
    return nets.dense(layers["head"], swish(x))


def numpy_schedule(steps):
    """alpha_t and alpha_bar_t, their running products, from the authors' formula."""
    alpha = [
        math.exp(-0.1 / steps - 0.5 * 9.9 * (2 * t - 1) / steps**2) for t in range(1, steps + 1)
    ]
    return np.array(alpha), np.cumprod(alpha)


def draws(key, cfg, shape):
    """The random numbers of an actor loss: time, noise and the masks of dropout."""
    key_time, key_noise, *keys = jax.random.split(key, 2 + len(cfg.actor_hidden))
    noise = np.asarray(jax.random.normal(key_noise, shape), np.float64)
    if cfg.generator == "flow":
        time = jax.random.uniform(key_time, (shape[0], 1))
    else:
        time = jax.random.randint(key_time, (shape[0], 1), 0, cfg.generator_steps)

    def drop(i, x):
        if cfg.dropout is None:
            return x
        keep = jax.random.bernoulli(jax.random.clone(keys[i]), 1 - cfg.dropout, x.shape)
        return np.asarray(keep) * x / (1 - cfg.dropout)

    return np.asarray(time), noise, drop


def numpy_actor_loss(params, batch, time, noise, drop, cfg):
    loss = 0.0
    if cfg.generator == "flow":
        x, target = noise + time * (batch.action - noise), batch.action - noise
    else:
        _, alpha_bar = numpy_schedule(cfg.generator_steps)
        alpha_bar = alpha_bar[time]
        x, target = np.sqrt(alpha_bar) * batch.action + np.sqrt(1 - alpha_bar) * noise, noise
    found = numpy_actor(params, batch.observation, x, time.astype(np.float64), cfg, drop)
    for one, wanted in zip(found, target, strict=True):
        loss += sum((one - wanted) ** 2) / len(found)
    return loss


@pytest.mark.parametrize(
    "overrides",
    [
        {"layer_norm": "input", "expectile": 0.9, "discount": 0.7},
        {"layer_norm": "hidden", **FLOW, "num_critics": 3, "hidden": (8, 12)},
    ],
    ids=str,
)
def test_critic_and_value_loss_equal_numpy(overrides):
    cfg, state, _, data = setup(**overrides)
    batch = double(data)
    for name, loss, numpy_loss, mean in (
        ("critic", critic_loss, numpy_critic_loss, "q"),
        ("value_net", value_loss, numpy_value_loss, "value"),
    ):
        params = double(getattr(state, name).params)
        found, metrics, grads = loss(getattr(state, name).params, state, data, cfg)
        expected, expected_mean = numpy_loss(params, state, batch, cfg)
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        np.testing.assert_allclose(metrics[mean], expected_mean, rtol=1e-3, atol=1e-4)
        for direction in directions(params, 3):  # the gradient takes the targets as numbers
            expected = slope(lambda p, f=numpy_loss: f(p, state, batch, cfg)[0], params, direction)
            np.testing.assert_allclose(dot(grads, direction), expected, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"dropout": 0.3, "actor_hidden": (8, 8, 6), "generator_steps": 3},
        FLOW | {"dropout": 0.3},
    ],
    ids=str,
)
def test_actor_loss_and_gradient_equal_numpy(overrides):
    cfg, state, key, data = setup(**overrides)
    batch, params = double(data), double(state.actor.params)
    random = draws(jax.random.clone(key), cfg, batch.action.shape)
    if cfg.generator == "ddpm":
        assert {*random[0].flat} == {*range(cfg.generator_steps)}
    loss, metrics, grads = actor_loss(state.actor.params, state, data, key, cfg)
    expected = numpy_actor_loss(params, batch, *random, cfg)
    np.testing.assert_allclose([loss, metrics["actor_loss"]], expected, rtol=1e-4)
    for direction in directions(params, 3):
        expected = slope(lambda p: numpy_actor_loss(p, batch, *random, cfg), params, direction)
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=2e-3, atol=1e-3)


# --- By hand ------------------------------------------------------------------------------------
def test_the_schedule_by_hand():
    """beta from 0.1 to 10: -log alpha_t = 0.02 + 0.198 (2 t - 1) with T = 5."""
    found = idql.vp_schedule(idql.Config())
    np.testing.assert_allclose(-np.log(found), [0.218, 0.614, 1.01, 1.406, 1.802], rtol=1e-5)
    # Their sum is 5.05, the mean of 0.1 and 10: exp(-5.05) of the action is left in the noise.
    np.testing.assert_allclose(np.prod(found), math.exp(-5.05), rtol=1e-5)


ACTIONS = np.float32([[0.5, -0.25], [-0.75, 1.0], [0.0, 0.125]])


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("generator", ["ddpm", "flow"])
def test_a_perfect_model_of_one_action_generates_it(generator, steps):
    cfg = idql.Config(generator=generator, generator_steps=steps)

    def noise(params, observation, x, time):
        alpha_bar = np.float32(numpy_schedule(steps)[1])[int(time[0])]
        return (x - np.sqrt(alpha_bar) * ACTIONS) / np.sqrt(1 - alpha_bar)

    def velocity(params, observation, x, time):
        return (ACTIONS - x) / (1 - time[0])

    model, shape = {"ddpm": noise, "flow": velocity}[generator], {"head": {"bias": np.zeros(2)}}
    found = idql.generate(model, {"params": shape}, np.zeros((3, 7)), jax.random.key(0), cfg)
    np.testing.assert_allclose(found, ACTIONS, atol=1e-5)


# --- Acting -------------------------------------------------------------------------------------
def numpy_generate(params, observation, key, cfg):
    keys = jax.random.split(key, cfg.generator_steps)
    shape = (*observation.shape[:-1], 2)
    x = np.asarray(jax.random.normal(keys[0], shape), np.float64)
    alpha, alpha_bar = numpy_schedule(cfg.generator_steps)
    for i in range(cfg.generator_steps):
        if cfg.generator == "flow":
            time = np.full((*shape[:-1], 1), i / cfg.generator_steps)
            x = x + numpy_actor(params, observation, x, time, cfg) / cfg.generator_steps
            continue
        t = cfg.generator_steps - 1 - i
        noise = numpy_actor(params, observation, x, np.full((*shape[:-1], 1), float(t)), cfg)
        x = (x - (1 - alpha[t]) / np.sqrt(1 - alpha_bar[t]) * noise) / np.sqrt(alpha[t])
        if t > 0:
            x = x + np.sqrt(1 - alpha[t]) * np.asarray(jax.random.normal(keys[t], shape))
        x = x.clip(-1, 1)
    return x.clip(-1, 1)


@functools.cache
def acting(generator):
    """cfg, state, parameters and the compiled policy with 6 samples in 3 steps."""
    overrides = {"num_samples": 6, "generator_steps": 3, "dropout": 0.3, "layer_norm": "input"}
    cfg, state, _, _ = setup(**overrides | (FLOW if generator == "flow" else {}))
    act = functools.partial(
        idql.policy, state.actor.apply_fn, apply_critics=state.critic.apply_fn, cfg=cfg
    )
    small = jax.tree.map(lambda x: 0.3 * x, idql.policy_params(state))  # few actions are clipped
    return cfg, state, small, jax.jit(act)


@pytest.mark.parametrize("generator", ["ddpm", "flow"])
@pytest.mark.parametrize("rows", [4, None])
def test_the_policy_takes_the_best_sample(generator, rows):
    cfg, _, params, act = acting(generator)
    observation = probes.random_transitions(4).observation[0 if rows is None else slice(rows)]
    action = act(params, observation, jax.random.key(3))
    assert action.shape == (*observation.shape[:-1], 2)
    actor, critic = double(params)
    repeated = np.stack([np.float64(observation)] * cfg.num_samples)
    samples = numpy_generate(actor, repeated, jax.random.key(3), cfg)
    assert np.abs(samples).max() <= 1 and (np.abs(samples) < 1).mean() > 0.1
    best = numpy_q(critic, repeated, samples, cfg).min(axis=0).argmax(axis=0)
    expected = np.take_along_axis(samples, best[None, ..., None], axis=0)[0]
    np.testing.assert_allclose(action, expected, rtol=1e-3, atol=1e-4)
    assert rows is None or len({*best}) > 1
    other = act(params, observation, jax.random.key(4))
    assert (other != action).any()


def test_averages_act():
    _, state, _, _ = acting("ddpm")
    actor, critic = idql.policy_params(state)
    assert actor is state.actor.target_params and critic is state.critic.target_params


# --- What the losses may depend on --------------------------------------------------------------
def test_termination_stops_the_bootstrap_and_truncation_does_not():
    cfg, state, _, data = setup()
    nets.check_bootstrap(lambda b: critic_loss(state.critic.params, state, b, cfg)[0], data)


READS = {  # loss -> what it reads of the state
    "critic": {"value_net.params"},
    "value_net": {"critic.target_params"},
    "actor": set(),
}


@pytest.mark.parametrize("name", READS)
def test_losses_read_only_the_networks_and_columns_they_should(name):
    cfg, state, key, data = setup()
    other = nets.shaken(state, seed=4)

    def loss(state, params=state, data=data):
        if name == "critic":
            return critic_loss(params.critic.params, state, data, cfg)[0]
        if name == "value_net":
            return value_loss(params.value_net.params, state, data, cfg)[0]
        return actor_loss(params.actor.params, state, data, key, cfg)[0]

    before = loss(state)
    assert loss(state, params=other) != before
    found = set()
    for net in state._fields:
        for kind in ("params", "target_params"):
            if hasattr(getattr(state, net), kind):
                changed = getattr(state, net).replace(**{kind: getattr(getattr(other, net), kind)})
                if loss(state._replace(**{net: changed})) != before:
                    found.add(f"{net}.{kind}")
    assert found == READS[name]
    for column in data._fields if name != "critic" else ():
        rolled = data._replace(**{column: np.roll(getattr(data, column), 1, axis=0)})
        assert (loss(state, data=rolled) != before) == (column in ("observation", "action")), column


# --- Networks -----------------------------------------------------------------------------------
@functools.cache
def fresh():
    return nets.fresh(idql)


def test_initial_parameters():
    critic, value_net = fresh().critic.params["params"], fresh().value_net.params["params"]
    sizes = {"critic": (16 + 2, 64, 96, 1), "value_net": (16, 64, 96, 1)}
    for name, layers in {"critic": critic, "value_net": value_net}.items():
        for i, (fan_in, width) in enumerate(itertools.pairwise(sizes[name])):
            check_uniform(layers[f"Dense_{i}"], fan_in, width)
    actor = fresh().actor.params["params"]
    check_uniform(actor["Dense_0"], 128, 256)
    check_uniform(actor["Dense_1"], 256, 256)
    check_uniform(actor["Dense_2"], 2 + 16 + 256, 32)
    check_uniform(actor["head"], 32, 2)
    for name, fan_in, width in (("Dense_3", 32, 128), ("Dense_4", 128, 32)):
        kernel = np.asarray(actor[name]["kernel"])
        assert kernel.shape == (fan_in, width)
        np.testing.assert_allclose(kernel.std(), fan_in**-0.5, rtol=0.1)  # truncated normal
    np.testing.assert_allclose(np.std(actor["frequency"]), 0.2, rtol=0.3)
    assert actor["frequency"].shape == (64,)
    nets.check_members_differ(fresh().critic)


def check_uniform(layer, fan_in, width):
    kernel, bound = np.asarray(layer["kernel"]), (6 / (fan_in + width)) ** 0.5
    assert kernel.shape[-2:] == (fan_in, width) and (np.asarray(layer["bias"]) == 0).all()
    assert 0.85 * bound < np.abs(kernel).max() <= bound


def test_targets_start_as_copies():
    nets.check_targets_are_copies(fresh().critic)
    nets.check_targets_are_copies(fresh().actor)
    assert not hasattr(fresh().value_net, "target_params")


# --- Update -------------------------------------------------------------------------------------
def test_order_of_two_updates():
    """V, the actor, Q with the new V, targets of the critics, average of the actor."""
    rates = {"actor_learning_rate": 0.02, "critic_learning_rate": 0.05, "target_rate": 0.3}
    rates |= {"actor_target_rate": 0.2, "weight_decay": 0.5}
    cosine = {"cosine": True, "num_updates": 4}
    cfg, state, key, data = setup(log_every=2, **rates, **cosine)
    loss_cfg, expected, _, _ = setup()  # the same numbers, with the losses compiled already
    rate = {
        "value_net": lambda step: 0.05,
        "actor": lambda step: 0.02 * (1 + math.cos(math.pi * step / 4)) / 2,
        "critic": lambda step: 0.05,
    }
    adam, found = {name: nets.Adam(x) for name, x in rate.items()}, {}

    def gradient_step(name, loss, *arguments):
        nonlocal expected
        net, step = getattr(expected, name), adam[name].steps
        _, metrics, grads = loss(net.params, expected, *arguments, loss_cfg)
        shrink = rate[name](step) * (0.5 if name == "actor" else 0.0)
        params = adam[name].step(net.params, grads)
        params = jax.tree.map(lambda x, old: np.float32(x - shrink * old), params, net.params)
        expected = expected._replace(**{name: net.replace(params=params)})
        for key, x in metrics.items():
            found.setdefault(key, []).append(x)

    def polyak_step(name, rate):
        nonlocal expected
        net = getattr(expected, name)
        target = nets.polyak(net.params, net.target_params, rate)
        expected = expected._replace(**{name: net.replace(target_params=target)})

    for step in (6, 7):
        batch, key_actor = nets.sample(key, step, data, cfg, 2)
        gradient_step("value_net", value_loss, batch)
        gradient_step("actor", actor_loss, batch, key_actor)
        gradient_step("critic", critic_loss, batch)
        polyak_step("critic", 0.3)
        polyak_step("actor", 0.2)

    after, metrics = nets.train_chunk(idql, state, key, 6, data, cfg)
    for name in ("value_net", "actor", "critic"):
        nets.check_close(getattr(after, name).params, getattr(expected, name).params)
    for name in ("actor", "critic"):
        nets.check_close(getattr(after, name).target_params, getattr(expected, name).target_params)
    for name, numbers in found.items():
        np.testing.assert_allclose(metrics.pop(name), np.mean(numbers), rtol=1e-3)
    assert not metrics


def test_learning_rates():
    """The actor's falls to 0 along a cosine and stays there; those of Q and V stay."""
    rates = {"actor_learning_rate": 0.02, "critic_learning_rate": 0.05, "num_updates": 4}
    _, state, _, _ = setup(**rates, cosine=True, weight_decay=0.0)
    nets.check_rate(state.actor, lambda t: 0.01 * (1 + math.cos(math.pi * min(t, 4) / 4)), steps=6)
    nets.check_rate(state.critic, lambda t: 0.05, steps=6)
    nets.check_rate(state.value_net, lambda t: 0.05, steps=6)
    _, state, _, _ = setup(**rates, cosine=False, weight_decay=0.0)
    nets.check_rate(state.actor, lambda t: 0.02, steps=6)


# --- Data ---------------------------------------------------------------------------------------
def test_training_sees_shifted_scaled_rewards_and_clipped_actions(monkeypatch, tmp_path):
    raw = probes.random_transitions(20)
    raw.action[:3] = [[1, -1], [1 - 1e-6, 0], [0.5, -0.25]]
    overrides = {"reward_shift": -1.0, "return_scale": 1000.0}
    _, data = nets.handed_over(idql, monkeypatch, tmp_path, raw, (-3, 5), **overrides)
    # Returns of the data as recorded span 8.
    np.testing.assert_allclose(data.reward, (raw.reward - 1) * 1000 / 8, rtol=1e-5)
    np.testing.assert_allclose(data.action, raw.action.clip(-0.99999, 0.99999), rtol=1e-7)
    for name in ("observation", "next_observation", "termination"):
        assert np.array_equal(getattr(data, name), getattr(raw, name)), name

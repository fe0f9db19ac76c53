# SPDX-License-Identifier: Apache-2.0
"""Diffusion-DICE's losses, sampling, networks and phases against NumPy in float64 and hand-worked
numbers."""

import functools

import helpers_runs as runs
import jax
import jax.numpy as jnp
import numpy as np
import numpy_nets as nets
import probes
import pytest
from numpy_nets import directions, dot, double, slope

from algorithms import diffusion_dice

SIZES = {"actor_hidden": (8, 6), "guidance_hidden": (8, 8), "noisy_copies": 3, "num_choosers": 3}
SIZES |= {"generator_steps": 5, "num_samples": 4, "clone_batch_size": 32}
setup = functools.partial(nets.setup, diffusion_dice, **SIZES)
critic_loss = nets.compiled(diffusion_dice.critic_loss)
value_loss = nets.compiled(diffusion_dice.value_loss)
chooser_loss = nets.compiled(diffusion_dice.chooser_loss)
guidance_loss = nets.compiled(diffusion_dice.guidance_loss)
clone_loss = nets.compiled(
    lambda params, state, batch, key, cfg: diffusion_dice.clone_loss(params, state, batch, key)
)


# --- The method in NumPy ------------------------------------------------------------------------
def swish(x):
    return x / (1 + np.exp(-x))


def waves(layers, time):
    angle = 2 * np.pi * time * layers["frequency"]
    return nets.dense(layers["Dense_0"], np.concatenate([np.sin(angle), np.cos(angle)], axis=-1))


def block(layers, x, embedding):
    y = swish(nets.dense(layers["Dense_0"], x)) + nets.dense(layers["Dense_1"], swish(embedding))
    y = swish(nets.dense(layers["Dense_2"], y))
    return y + (nets.dense(layers["Dense_3"], x) if "Dense_3" in layers else x)


def numpy_score(params, observation, action, time):
    """Two widths: down, down, middle, up."""
    layers = params["params"]
    x = swish(nets.dense(layers["Dense_1"], observation))
    x = swish(nets.dense(layers["Dense_2"], np.concatenate([x, waves(layers, time)], axis=-1)))
    embedding = nets.dense(layers["Dense_3"], x)
    first = block(layers["ResidualBlock_0"], action, embedding)
    second = block(layers["ResidualBlock_1"], first, embedding)
    middle = block(layers["ResidualBlock_2"], second, embedding)
    up = block(layers["ResidualBlock_3"], np.concatenate([second, middle], axis=-1), embedding)
    return nets.dense(layers["head"], np.concatenate([first, up], axis=-1))


def numpy_guidance(params, observation, action, time):
    layers = params["params"]
    x = np.concatenate([action, waves(layers, time), observation], axis=-1)
    for name in ("Dense_1", "Dense_2"):
        x = swish(nets.dense(layers[name], x))
    return nets.dense(layers["Dense_3"], x)[..., 0]


def numpy_value(params, observation):
    layers, x = params["params"], observation
    for i in range(2):
        x = nets.dense(layers[f"Dense_{i}"], x)
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5)
        norm = layers[f"LayerNorm_{i}"]
        x = np.maximum(x * norm["scale"] + norm["bias"], 0)
    return nets.dense(layers["Dense_2"], x)[..., 0]


def numpy_y(value_params, state, batch, cfg):
    q = nets.critics(double(state.critic.target_params), batch.observation, batch.action)
    value = numpy_value(value_params, batch.observation)
    return [(min(pair) - v) / cfg.alpha for pair, v in zip(q.T, value, strict=True)], value


def numpy_value_loss(params, state, batch, cfg):
    total, weights = 0.0, []
    y, value = numpy_y(params, state, batch, cfg)
    for one, v in zip(y, value, strict=True):
        weights.append(one / 2 + 1 if one > 0 else np.exp(one))
        f = (weights[-1] - 1) ** 2 if one > 0 else weights[-1] * (np.log(weights[-1]) - 1) + 1
        total += weights[-1] * one - f + v / cfg.alpha  # f* is the most that w y - f(w) can be
    return total / len(y), np.array(weights), value


def numpy_schedule(time):
    """Integrals of the rate: the signal loses half of it, as the variance keeps its sum of 1."""
    rate = 0.1 * time + (20 - 0.1) * time**2 / 2
    return np.exp(-rate / 2), np.sqrt(1 - np.exp(-rate))


def draws_of(key, batch, copies=None):
    """time [B, 1], noise [B, A] or [M, B, A]"""
    key_time, key_noise = jax.random.split(jax.random.clone(key))
    time = np.asarray(jax.random.uniform(key_time, (len(batch.action), 1), minval=1e-3))
    shape = batch.action.shape if copies is None else (copies, *batch.action.shape)
    return np.float64(time), np.float64(jax.random.normal(key_noise, shape))


def numpy_guidance_loss(params, state, batch, draws, cfg, scale=None):
    """`scale`: what the loss is divided by, a constant for the gradient; None computes it here."""
    time, noise = draws
    _, weight, _ = numpy_value_loss(double(state.value_net.params), state, batch, cfg)
    signal, std = numpy_schedule(time)
    found = []
    for one in noise:
        noisy = signal * batch.action + std * one
        found.append(numpy_guidance(params, batch.observation, noisy, time))
    found = np.stack(found)
    scale = max(np.exp(-found).max(), np.exp(-1)) if scale is None else scale
    terms = np.minimum(weight, 100) * np.exp(-found) + found
    return terms.mean() / scale, scale


def numpy_critic_losses(params, state, batch, cfg):
    """[K] of each critic"""
    value = numpy_value(double(state.value_net.params), batch.next_observation)
    alive = np.where(batch.termination > 0, 0.0, cfg.discount)
    q = nets.critics(params, batch.observation, batch.action)
    return [np.mean((one - batch.reward - alive * value) ** 2) for one in q]


def check(found, expected, metric=None):
    np.testing.assert_allclose(found[0], expected, rtol=1e-4)
    if metric is not None:
        np.testing.assert_allclose(found[1][metric], expected, rtol=1e-4)


def check_gradient(grads, loss, params):
    for direction in directions(params, 2):
        np.testing.assert_allclose(dot(grads, direction), slope(loss, params, direction), rtol=3e-3)


@pytest.mark.parametrize("alpha", [0.5, 0.1])
def test_value_loss_and_gradient_equal_numpy(alpha):
    cfg, state, _, data = setup(alpha=alpha)
    batch, params = double(data), double(state.value_net.params)
    loss, metrics, grads = value_loss(state.value_net.params, state, data, cfg)
    expected, weights, value = numpy_value_loss(params, state, batch, cfg)
    assert (weights > 1).any() and (weights < 1).any()
    check((loss, metrics), expected, "value_loss")
    np.testing.assert_allclose(
        [metrics["weight"], metrics["value"]], [weights.mean(), value.mean()], rtol=1e-3
    )
    check_gradient(grads, lambda p: numpy_value_loss(p, state, batch, cfg)[0], params)


def test_critic_and_chooser_losses_equal_numpy():
    """The sum over both critics, the mean over the choosers; the targets are numbers."""
    cfg, state, _, data = setup(discount=0.7)
    batch = double(data)
    for name, loss, number in (("critic", critic_loss, sum), ("choosers", chooser_loss, np.mean)):
        net = getattr(state, name)
        found, metrics, grads = loss(net.params, state, data, cfg)
        total = lambda p, number=number: number(numpy_critic_losses(p, state, batch, cfg))  # noqa: E731
        check((found, metrics), total(double(net.params)), f"{name.removesuffix('s')}_loss")
        check_gradient(grads, total, double(net.params))


@pytest.mark.parametrize(("factor", "alpha"), [(1.0, 0.5), (0.01, 0.02)])
def test_guidance_loss_and_gradient_equal_numpy(factor, alpha):
    """Weights over 100 count as 100. The frequencies have no gradient."""
    cfg, state, key, data = setup(alpha=alpha)
    smaller = jax.tree.map(lambda x: factor * x, state.guidance.params)
    state = state._replace(guidance=state.guidance.replace(params=smaller))
    batch, params = double(data), double(smaller)
    draws = draws_of(key, batch, cfg.noisy_copies)
    loss, metrics, grads = guidance_loss(smaller, state, data, key, cfg)
    expected, scale = numpy_guidance_loss(params, state, batch, draws, cfg)
    check((loss, metrics), expected, "guidance_loss")
    assert not np.asarray(grads["params"].pop("frequency")).any()
    fixed = params["params"].pop("frequency")

    def loss_of(params):
        params = {"params": params["params"] | {"frequency": fixed}}
        return numpy_guidance_loss(params, state, batch, draws, cfg, scale)[0]

    check_gradient(grads, loss_of, params)


def test_clone_loss_and_gradient_equal_numpy():
    cfg, state, key, data = setup()
    batch, params = double(data), double(state.actor.params)
    time, noise = draws_of(key, batch)
    signal, std = numpy_schedule(time)
    noisy = signal * batch.action + std * noise

    def loss_of(params):
        params = {"params": params["params"] | {"frequency": fixed}}
        score = numpy_score(params, batch.observation, noisy, time) / std
        return np.mean([(row**2).sum() for row in score * std + noise])

    loss, metrics, grads = clone_loss(state.actor.params, state, data, key, cfg)
    assert not np.asarray(grads["params"].pop("frequency")).any()
    fixed = params["params"].pop("frequency")
    check((loss, metrics), loss_of(params), "clone_loss")
    check_gradient(grads, loss_of, params)


# --- By hand ------------------------------------------------------------------------------------
def test_the_guidance_is_the_log_of_the_mean_weight():
    """w e^-W + W, with w of 3 and 1 as often as each other, is least at W = log 2."""
    losses = [np.mean([w * np.exp(-x) + x for w in (3, 1)]) for x in np.log([1.9, 2.0, 2.1])]
    assert losses[1] < min(losses[0], losses[2])


def test_weights_are_the_derivative_of_the_conjugate():
    y = np.float32([-5, -1, -0.1, 0, 0.1, 1, 50])
    found = jax.vmap(jax.grad(diffusion_dice.conjugate))(y)
    np.testing.assert_allclose(found, diffusion_dice.weight_of(y), rtol=1e-5)
    np.testing.assert_allclose(
        np.asarray(diffusion_dice.weight_of(y))[[0, 3, 6]], [np.exp(-5), 1, 26], rtol=1e-5
    )
    np.testing.assert_allclose(
        diffusion_dice.conjugate(np.float32([-1, 0, 2])), [np.exp(-1) - 1, 0, 3], 1e-5
    )
    assert np.isfinite(jax.vmap(jax.grad(diffusion_dice.conjugate))(np.float32([-1e4, 1e4]))).all()


@pytest.mark.parametrize("steps", [1, 2, 5, 6])
def test_a_perfect_model_of_one_action_generates_it(steps):
    """Whatever the number of steps, it ends std_t eps away from alpha_t a, at t = 0.001."""
    times, action = [], np.float32([[0.5, -0.25]])

    def denoised(x, time):
        jax.debug.callback(lambda t: times.append(float(t)), time, ordered=True)
        return jnp.broadcast_to(action, x.shape)

    noise = np.float32(np.random.default_rng(0).standard_normal((3, 2)))
    found = diffusion_dice.solve(denoised, noise, diffusion_dice.Config(generator_steps=steps))
    jax.effects_barrier()
    signal, std = numpy_schedule(1e-3)
    last = numpy_schedule(1.0)
    expected = signal * action + std * (noise - last[0] * action) / last[1]
    np.testing.assert_allclose(found, expected, atol=1e-3)
    np.testing.assert_allclose(times, np.linspace(1, 1e-3, steps + 1)[:-1], atol=1e-6)


def test_the_steps_are_of_second_order():
    """Data N(0, 0.5^2), whose ODE scales noise to the std at the end; errors fall as steps^2."""
    signal, std = numpy_schedule(1e-3)
    spread = 0.5

    def denoised(x, time):
        level, noise = diffusion_dice.noise_schedule(time)
        return level * spread**2 / (level**2 * spread**2 + noise**2) * x

    exact = np.hypot(signal * spread, std) / np.hypot(
        *(numpy_schedule(1.0) * np.array([spread, 1]))
    )
    errors = []
    for steps in (9, 17, 33):
        found = diffusion_dice.solve(
            denoised, jnp.ones((1, 1)), diffusion_dice.Config(generator_steps=steps)
        )
        errors.append(abs(found.item() - exact))
    assert errors[0] < 0.2 and errors[1] < errors[0] / 2 and errors[2] < errors[1] / 2, errors


# --- Acting -------------------------------------------------------------------------------------
def numpy_samples(params, observation, noise, cfg):
    """Forward Euler would not do: the steps of the solver, in terms of the expected action."""
    actor, guidance, _ = params
    times = np.linspace(1, 1e-3, cfg.generator_steps + 1)

    def expected_action(x, t):
        signal, std = numpy_schedule(t)
        time = np.full((*x.shape[:-1], 1), t)
        slopes = np.zeros_like(x)
        for i in range(x.shape[-1]):
            ends = [
                numpy_guidance(guidance, observation, x + h * np.eye(x.shape[-1])[i], time)
                for h in (1e-5, -1e-5)
            ]
            slopes[..., i] = (ends[0] - ends[1]) / 2e-5
        score = numpy_score(actor, observation, x, time) / std + cfg.guidance_scale * slopes
        return (x + std**2 * score) / signal  # Tweedie

    def step(x, clean, t, s):
        (signal, std), (next_signal, next_std) = numpy_schedule(t), numpy_schedule(s)
        return next_std / std * (x - signal * clean) + next_signal * clean

    def log_snr(t):
        signal, std = numpy_schedule(t)
        return np.log(signal / std)

    x, i = noise, 0
    while i < cfg.generator_steps:
        clean = expected_action(x, times[i])
        if i + 2 < cfg.generator_steps:
            between = expected_action(step(x, clean, times[i], times[i + 1]), times[i + 1])
            share = (log_snr(times[i + 1]) - log_snr(times[i])) / (
                log_snr(times[i + 2]) - log_snr(times[i])
            )
            x, i = step(x, clean + (between - clean) / (2 * share), times[i], times[i + 2]), i + 2
        else:
            x, i = step(x, clean, times[i], times[i + 1]), i + 1
    return x


@pytest.mark.parametrize(
    ("selection", "rows"),
    [("max", 4), ("softmax", 4), ("max", None), pytest.param("softmax", None, marks=runs.SLOW)],
)
def test_the_policy_chooses_one_of_the_guided_samples(selection, rows):
    """The best by the mean of the choosers; or drawn by the first target critic's values."""
    cfg, state, _, data = setup(
        selection=selection, num_choosers=3 if selection == "max" else None, guidance_scale=0.5
    )
    params = jax.tree.map(lambda x: 0.02 * x, diffusion_dice.policy_params(state)[:2])
    params = (*params, diffusion_dice.policy_params(state)[2])
    observation = data.observation[0 if rows is None else slice(rows)]
    action = act_of(cfg)(params, observation, jax.random.key(3))
    assert action.shape == (*observation.shape[:-1], 2)
    repeated = np.stack([np.float64(observation)] * cfg.num_samples)
    key_noise, key_choice = jax.random.split(jax.random.key(3))
    noise = np.float64(jax.random.normal(key_noise, (*repeated.shape[:-1], 2)))
    samples = numpy_samples(double(params), repeated, noise, cfg)
    q = nets.critics(double(params[2]), repeated, samples)
    if selection == "max":
        choice = q.mean(axis=0).argmax(axis=0)
    else:
        gumbel = np.asarray(jax.random.gumbel(key_choice, q.shape[1:], np.float32))
        choice = (q[0] + gumbel).argmax(axis=0)
    expected = np.take_along_axis(samples, choice[None, ..., None], axis=0)[0]
    np.testing.assert_allclose(action, np.clip(expected, -1, 1), rtol=5e-3, atol=5e-3)


@functools.cache
def act_of(cfg):
    _, state, _, _ = setup(selection=cfg.selection, num_choosers=cfg.num_choosers)
    return jax.jit(diffusion_dice.policy_fn(state, cfg))


def test_which_networks_act():
    _, state, _, _ = setup()
    assert diffusion_dice.policy_params(state)[2] is state.choosers.params
    _, state, _, _ = setup(num_choosers=None)
    found = diffusion_dice.policy_params(state)
    assert found[0] is state.actor.params and found[1] is state.guidance.params
    assert found[2] is state.critic.target_params and state.choosers is None


# --- What the losses may depend on --------------------------------------------------------------
def test_termination_stops_the_bootstrap_and_truncation_does_not():
    cfg, state, _, data = setup()
    nets.check_bootstrap(lambda b: critic_loss(state.critic.params, state, b, cfg)[0], data)
    nets.check_bootstrap(lambda b: chooser_loss(state.choosers.params, state, b, cfg)[0], data)


READS = {  # loss -> what it reads of the state
    "critic": {"value_net.params"},
    "choosers": {"value_net.params"},
    "value_net": {"critic.target_params"},
    "guidance": {"critic.target_params", "value_net.params"},
    "actor": set(),
}


@pytest.mark.parametrize("name", READS)
def test_losses_read_only_what_they_should(name):
    cfg, state, key, data = setup()
    other = nets.shaken(state, seed=4)
    function = {
        "critic": critic_loss,
        "choosers": chooser_loss,
        "value_net": value_loss,
        "guidance": guidance_loss,
        "actor": clone_loss,
    }[name]
    keys = (key,) if name in ("guidance", "actor") else ()

    def loss(state, params=state):
        return function(getattr(params, name).params, state, data, *keys, cfg)[0]

    here, found = loss(state), set()
    assert loss(state, params=other) != here
    for net in state._fields:
        for kind in ("params", "target_params"):
            if not hasattr(getattr(state, net), kind):
                continue
            changed = getattr(state, net).replace(**{kind: getattr(getattr(other, net), kind)})
            if loss(state._replace(**{net: changed})) != here:
                found.add(f"{net}.{kind}")
    assert found == READS[name]


# --- Networks -----------------------------------------------------------------------------------
def test_initial_parameters():
    """PyTorch's default in every layer, also of the choosers; frequencies with a std of 30."""
    cfg = probes.config(
        diffusion_dice, hidden=(64, 96), num_critics=3, actor_hidden=(8,), num_choosers=3
    )
    data = probes.random_transitions(observation_dim=16)
    create = functools.partial(diffusion_dice.create_state, cfg=cfg)
    state = jax.jit(create)(jax.random.key(0), data)
    nets.check_uniform_init(state.critic.params, (18, 64, 96, 1))
    nets.check_uniform_init(state.choosers.params, (18, 64, 96, 1))
    nets.check_members_differ(state.critic)
    nets.check_targets_are_copies(state.critic)
    for net in (state.actor, state.guidance):
        frequency = np.asarray(net.params["params"]["frequency"])
        assert frequency.shape == (16,) and 15 < frequency.std() < 45


# --- Phases -------------------------------------------------------------------------------------
def test_each_phase_trains_its_own_networks():
    """And neither the fixed frequencies, which do not decay either."""
    cfg, state, key, data = setup(log_every=2, clone_updates=2, weight_decay=0.1)
    clone = jax.jit(diffusion_dice.clone_chunk, static_argnums=4)
    cloned, metrics = clone(state, jax.random.clone(key), 0, data, cfg)
    trained, more = nets.train_chunk(diffusion_dice, cloned, key, 2, data, cfg)
    for name in state._fields:
        before, between, after = (getattr(x, name).params for x in (state, cloned, trained))
        same = all(map(np.array_equal, probes.leaves(before), probes.leaves(between)))
        assert same == (name != "actor"), name
        same = all(map(np.array_equal, probes.leaves(between), probes.leaves(after)))
        assert same == (name == "actor"), name
    for name in ("actor", "guidance"):
        first, last = (getattr(x, name).params["params"]["frequency"] for x in (state, trained))
        assert np.array_equal(first, last)
    assert {*metrics} == {"clone_loss"}
    names = "critic_loss q value_loss value weight chooser_loss guidance_loss log_weight"
    assert {*more} == {*names.split()}


def test_training_sees_changed_rewards(monkeypatch, tmp_path):
    """From networks of zeros, since their initialisation takes seconds to compile."""
    raw, create = probes.random_transitions(20), diffusion_dice.create_state

    def blank(key, batch, cfg):
        shapes = jax.eval_shape(functools.partial(create, batch=batch, cfg=cfg), key)
        return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)

    monkeypatch.setattr(diffusion_dice, "create_state", blank)
    overrides = SIZES | {"reward_shift": -1.0, "return_scale": 10.0}
    _, data = nets.handed_over(diffusion_dice, monkeypatch, tmp_path, raw, (2, 7), **overrides)
    np.testing.assert_allclose(
        data.reward, 2 * (raw.reward.astype(float) - 1), rtol=1e-4, atol=1e-5
    )

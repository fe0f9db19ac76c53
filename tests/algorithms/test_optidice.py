# SPDX-License-Identifier: Apache-2.0
"""OptiDICE's losses against NumPy in float64, its data, and closed forms.

Its update rule, warm start included, is compared with the authors' code in test_parity.py. Its
ratio is compared with the exact one of a small MDP in tests/benchmarks/test_occupancy.py.
"""

import dataclasses
import functools

import jax
import numpy as np
import numpy_nets as nets
import probes
import pytest
from numpy_nets import directions, dot, double, slope

from algorithms import optidice
from common import datasets
from common.experiment import config

setup = functools.partial(nets.setup, optidice, absorbing_state="none", components=2)


@functools.partial(jax.jit, static_argnums=3)
def everything(state, batch, noise, cfg):
    """{field: (loss, metrics, gradient)} of all losses, as one program."""
    with_metrics = functools.partial(jax.value_and_grad, has_aux=True)

    def multiplier_loss(params):
        return optidice.multiplier_loss(params, state, batch, cfg), {}

    losses = {
        "value_net": lambda p: optidice.value_loss(p, state, batch, cfg),
        "residual_net": lambda p: optidice.residual_loss(p, state, batch, cfg),
        "multipliers": multiplier_loss,
        "actor": lambda p: optidice.actor_loss(p, state, batch, noise, cfg),
        "behaviour": lambda p: optidice.behaviour_loss(p, state, batch),
    }
    if cfg.extraction == "wbc":
        del losses["behaviour"]
    found = {}
    for field, loss in losses.items():
        (value, metrics), grads = with_metrics(loss)(getattr(state, field).params)
        found[field] = value, metrics, grads
    return found


# --- The method in NumPy ------------------------------------------------------------------------
def hidden(params, x):
    for name in ("Dense_0", "Dense_1"):
        x = np.maximum(nets.dense(params["params"][name], x), 0)
    return x


def numpy_actor(params, observation):
    x, layers = hidden(params, observation), params["params"]
    mean = np.clip(nets.dense(layers["Dense_2"], x), -7.24, 7.24)
    return mean, np.clip(nets.dense(layers["Dense_3"], x), -5, 2)


def numpy_log_behaviour(params, observation, x):
    """log of sum_c share_c prod_i N(x_i; mean_ci, std_ci), [B]."""
    h, layers = hidden(params, observation), params["params"]
    count = layers["Dense_4"]["bias"].size
    shape = (len(x), count, x.shape[1])
    mean = np.clip(nets.dense(layers["Dense_2"], h), -7.24, 7.24).reshape(shape)
    log_std = np.clip(nets.dense(layers["Dense_3"], h), -5, 2).reshape(shape)
    share = np.exp(nets.dense(layers["Dense_4"], h))
    share = share / share.sum(axis=1, keepdims=True)
    log_prob = np.stack([nets.log_normal(x, mean[:, c], log_std[:, c]) for c in range(count)])
    return np.log((share.T * np.exp(log_prob)).sum(axis=0))


def numpy_ratio(y, f):
    """Where f' is y, and 0 where it is larger everywhere."""
    if f == "chi2":
        return np.maximum(0, 1 + y)
    return np.exp(y - 1) if f == "kl" else np.where(y < 0, np.exp(np.minimum(y, 0)), 1 + y)


def numpy_f(w, f):
    chi2, entropy = (w - 1) ** 2 / 2, w * np.log(np.maximum(w, 1e-300))
    if f == "soft_chi2":
        return np.where(w < 1, entropy - w + 1, chi2)
    return chi2 if f == "chi2" else entropy


def numpy_residual(params, batch, cfg):
    alive = 1 - batch.termination
    value, next_value = (nets.value(params, x) for x in (batch.observation, batch.next_observation))
    return batch.reward + cfg.discount * alive * next_value - value


def numpy_lagrangian(residual, estimate, multiplier, cfg):
    w = numpy_ratio((estimate - multiplier) / cfg.alpha, cfg.f)
    return (-cfg.alpha * numpy_f(w, cfg.f) + w * (residual - multiplier)).mean()


def numpy_losses(state, batch, noise, cfg):
    """{field: its loss as a function of its parameters}"""
    params = {
        field: double(getattr(state, field).params)
        for field in state._fields
        if hasattr(getattr(state, field), "params")
    }
    residual = numpy_residual(params["value_net"], batch, cfg)
    multipliers = params["multipliers"]
    temperature = np.exp(params["log_temperature"]["log"])

    def e_of(p, action):
        return nets.value(p, batch.observation, action)

    def value_loss(p):
        own, multiplier = numpy_residual(p, batch, cfg), multipliers["value"]
        start = (1 - cfg.discount) * nets.value(p, batch.initial_observation).mean()
        return start + numpy_lagrangian(own, own, multiplier, cfg) + multiplier

    def residual_loss(p):
        estimate = e_of(p, batch.action)
        if cfg.residual_fit == "mse":
            return ((estimate - residual) ** 2).mean()
        return -numpy_lagrangian(residual, estimate, multipliers["residual"], cfg)

    def multiplier_loss(p):
        estimate = e_of(params["residual_net"], batch.action)
        of_value = numpy_lagrangian(residual, residual, p["value"], cfg) + p["value"]
        of_e = numpy_lagrangian(residual, estimate, p["residual"], cfg) + p["residual"]
        return of_value + of_e

    def actor_loss(p):
        mean, log_std = numpy_actor(p, batch.observation)
        x = mean + np.exp(log_std) * noise
        log_prob = nets.log_normal(x, mean, log_std)
        entropy_loss = temperature * (log_prob - np.log(1 - np.tanh(x) ** 2).sum(axis=1)).mean()
        action = np.tanh(x) if cfg.extraction == "iproj" else batch.action
        y = (e_of(params["residual_net"], action) - multipliers["residual"]) / cfg.alpha
        if cfg.extraction == "iproj":
            behaviour = numpy_log_behaviour(params["behaviour"], batch.observation, x)
            log_ratio = np.log(np.maximum(numpy_ratio(y, cfg.f), 1e-10))
            return entropy_loss - (log_ratio - log_prob + behaviour).mean()
        u = np.arctanh(batch.action)
        data_log_prob = nets.log_normal(u, mean, log_std) - np.log(1 - batch.action**2).sum(axis=1)
        return entropy_loss - (numpy_ratio(y, cfg.f) * data_log_prob).mean()

    def behaviour_loss(p):
        return -numpy_log_behaviour(p, batch.observation, np.arctanh(batch.action)).mean()

    losses = {
        "value_net": value_loss,
        "residual_net": residual_loss,
        "multipliers": multiplier_loss,
        "actor": actor_loss,
        "behaviour": behaviour_loss,
    }
    return {field: (losses[field], params[field]) for field in losses if field in params}


VARIANTS = [
    {},
    {"f": "kl", "residual_fit": "mse", "alpha": 2.0, "discount": 0.7},
    {"f": "chi2", "extraction": "wbc", "alpha": 0.8, "discount": 0.9},
]


def inputs(**overrides):
    cfg, state, _, data = setup(**overrides)
    for field in ("actor", "behaviour"):  # no action at the edge of the box, no density of 0
        net = getattr(state, field)
        if net is not None:
            net = net.replace(params=jax.tree.map(lambda x: 0.5 * x, net.params))
            state = state._replace(**{field: net})
    noise = np.random.default_rng(5).standard_normal(data.action.shape, np.float32)
    return cfg, state, data, noise


@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_losses_and_gradients_equal_numpy(overrides):
    """Each gradient takes all that its own network does not give as numbers."""
    cfg, state, data, noise = inputs(**overrides)
    found = everything(state, data, noise, cfg)
    expected = numpy_losses(state, double(data), double(noise), cfg)
    assert found.keys() == expected.keys()
    for field, (loss, params) in expected.items():
        value, _, grads = found[field]
        np.testing.assert_allclose(value, loss(params), rtol=1e-4, err_msg=field)
        for direction in directions(params, 3):
            change = slope(loss, params, direction)
            np.testing.assert_allclose(
                dot(grads, direction), change, rtol=3e-3, atol=1e-3, err_msg=field
            )
    y = numpy_residual(double(state.value_net.params), double(data), cfg)
    y = (y - double(state.multipliers.params["value"])) / cfg.alpha
    weight = found["value_net"][1]["value_weight"]
    np.testing.assert_allclose(weight, numpy_ratio(y, cfg.f).mean(), rtol=1e-4)
    assert (y < 0).any() and (y > 0).any()


READ = {  # loss of -> further fields that it reads
    "value_net": {"multipliers"},
    "residual_net": {"multipliers", "value_net"},
    "multipliers": {"value_net", "residual_net"},
    "actor": {"multipliers", "residual_net", "behaviour", "log_temperature"},
    "behaviour": set(),
}


def test_losses_read_only_the_networks_they_should():
    cfg, state, data, noise = inputs()
    before, other = everything(state, data, noise, cfg), nets.shaken(state, seed=4)
    for field in ("actor", "value_net", "residual_net", "multipliers", "behaviour"):
        changed = everything(state._replace(**{field: getattr(other, field)}), data, noise, cfg)
        for name, read in READ.items():
            same = changed[name][0] == before[name][0]
            assert same == (field != name and field not in read), (name, field)


def test_termination_stops_the_bootstrap():
    cfg, state, data, noise = inputs()

    def loss(termination, next_observation):
        batch = data._replace(
            termination=np.full_like(data.termination, termination),
            next_observation=np.full_like(data.next_observation, next_observation),
        )
        return float(everything(state, batch, noise, cfg)["value_net"][0])

    assert loss(1, 0.1) == loss(1, 0.5) != loss(0, 0.5) != loss(0, 0.1)


@pytest.mark.parametrize("f", ["soft_chi2", "chi2", "kl"])
def test_the_ratio_maximises_w_y_minus_f(f):
    """Against the best of a fine grid of w; f(w) and log w are those of that w."""
    cfg, grid = optidice.Config(f=f), np.linspace(1e-4, 8, 80_000)
    for y in (-2.5, -0.7, -0.1, 0.2, 1.6):
        best = grid[np.argmax(grid * y - numpy_f(grid, f))]
        found = float(optidice.ratio(np.float32(y), cfg))
        np.testing.assert_allclose(found, best, atol=2e-4)
        f_of_w = optidice.f_of_ratio(np.float32(y), cfg)
        np.testing.assert_allclose(f_of_w, numpy_f(np.float64(found), f), atol=1e-5)
        log_w = optidice.log_ratio(np.float32(y), cfg)
        np.testing.assert_allclose(log_w, np.log(max(found, 1e-10)), rtol=1e-5, atol=1e-6)


def test_temperature_rises_while_the_entropy_is_below_minus_a():
    for entropy, sign in ((-3.0, -1), (1.0, 1)):
        grads = jax.grad(optidice.temperature_loss)({"log": np.float32(0.3)}, entropy, 2)
        np.testing.assert_allclose(grads["log"], entropy + 2)
        assert np.sign(grads["log"]) == sign  # Adam moves against it


# --- Networks -----------------------------------------------------------------------------------
def test_initial_parameters():
    cfg = probes.config(optidice, hidden=(64, 96), components=4)
    data = probes.random_transitions(observation_dim=15)  # 16 with the flag
    create = functools.partial(optidice.create_state, cfg=cfg)
    state = jax.jit(create)(jax.random.key(0), data)
    heads = {"actor": [1e-3, 1e-3], "behaviour": [None, 1e-3, None]}
    heads |= {"value_net": [3e-3], "residual_net": [3e-3]}
    for field, bounds in heads.items():
        layers = getattr(state, field).params["params"]
        assert len(layers) == 2 + len(bounds)
        inputs = 18 if field == "residual_net" else 16
        for i, (fan_in, width) in enumerate(((inputs, 64), (64, 96))):
            kernel, bias = (np.asarray(layers[f"Dense_{i}"][x]) for x in ("kernel", "bias"))
            limit = (6 / (fan_in + width)) ** 0.5
            assert kernel.shape == (fan_in, width) and not bias.any()
            assert 0.95 * limit < np.abs(kernel).max() <= limit
        for i, bound in enumerate(bounds):
            kernel, bias = (np.abs(layers[f"Dense_{2 + i}"][x]) for x in ("kernel", "bias"))
            limit = bound or (6 / (96 + kernel.shape[1])) ** 0.5
            assert 0.9 * limit < kernel.max() <= limit and 0 < bias.max() <= (bound or 1e-3)
    assert jax.tree.leaves(state.multipliers.params) == [0, 0]
    cfg = dataclasses.replace(cfg, extraction="wbc")
    assert jax.eval_shape(functools.partial(create, cfg=cfg), jax.random.key(0), data)[5] is None


def test_the_policy_normalises_and_flags_raw_observations():
    cfg = probes.config(optidice, hidden=(16, 16))
    data = probes.random_transitions()
    state = jax.eval_shape(
        functools.partial(optidice.create_state, cfg=cfg), jax.random.key(0), data
    )
    state = nets.shaken(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state))
    params = optidice.policy_params(state)
    assert params[0] is state.actor.params and params[1] is state.statistics
    found = jax.jit(optidice.policy_fn(state, cfg))(params, data.observation, jax.random.key(0))
    mean, std = double(state.statistics)
    observation = (double(data.observation) - mean) / std
    observation = np.concatenate([observation, np.zeros((len(observation), 1))], axis=1)
    expected = np.tanh(numpy_actor(double(params[0]), observation)[0])
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


# --- Data ---------------------------------------------------------------------------------------
def test_an_absorbing_state_behind_every_termination():
    rows = probes.random_transitions(5, 2, termination=[0, 1, 0, 0, 1], truncation=[0, 0, 0, 1, 0])
    for kind, termination in (("masked", rows.termination), ("bootstrap", np.zeros(5))):
        cfg = optidice.Config(absorbing_state=kind)
        data = optidice.with_absorbing_state(rows, cfg)
        assert len(data.reward) == 7
        np.testing.assert_array_equal(data.observation[:5, :2], rows.observation)
        assert data.observation[:, 2].tolist() == [0, 0, 0, 0, 0, 1, 1]
        assert data.next_observation[:, 2].tolist() == [0, 1, 0, 0, 1, 1, 1]
        absorbing = data.next_observation[data.next_observation[:, 2] == 1]
        assert (absorbing == np.array([[0, 0, 1]])).all()
        assert (data.observation[5:] == np.array([[0, 0, 1]])).all()
        kept = np.array([0, 2, 3])
        np.testing.assert_array_equal(data.next_observation[kept, :2], rows.next_observation[kept])
        np.testing.assert_array_equal(data.reward, [*rows.reward, 0, 0])
        np.testing.assert_array_equal(data.action[5:], rows.action[[1, 4]])
        last = [1, 1] if kind == "masked" else [0, 0]
        np.testing.assert_array_equal(data.termination, [*termination, *last])
    assert optidice.with_absorbing_state(rows, optidice.Config(absorbing_state="none")) is rows


def test_every_episodes_start_is_as_likely():
    rows = probes.random_transitions(20, 2)
    ends = np.array([3, 4, 11, 20])  # lengths 3, 1, 7, 9
    data = optidice.with_starts(datasets.Dataset("toy", rows, ends, np.zeros(4)), rows)
    for start in (0, 3, 4, 11):
        same = (data.initial_observation == rows.observation[start]).all(axis=1)
        assert same.sum() == 5
    for name in ("observation", "action", "reward", "next_observation", "termination"):
        assert np.array_equal(getattr(data, name), getattr(rows, name))


def test_training_sees_standardised_rows(monkeypatch, tmp_path):
    raw = probes.random_transitions(20, observation=7 + np.arange(60).reshape(20, 3) % 7)
    state, data = nets.handed_over(optidice, monkeypatch, tmp_path, raw, (-3, 5), extraction="wbc")
    reward = 0.1 * (raw.reward - raw.reward.mean()) / raw.reward.std()
    extra = int(raw.termination.sum())
    np.testing.assert_allclose(data.reward, [*reward, *[0] * extra], rtol=1e-4, atol=1e-6)
    mean, std = raw.observation.mean(axis=0), raw.observation.std(axis=0) + 1e-3
    expected = (raw.observation - mean) / std
    np.testing.assert_allclose(data.observation[:20, :3], expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(state.statistics[0][0], mean, rtol=1e-5)
    starts = {tuple(row) for row in np.round(data.initial_observation, 4).tolist()}
    wanted = np.round(data.observation[np.array([0, 10])], 4)
    assert starts == {tuple(row) for row in wanted.tolist()}


@pytest.mark.parametrize("overrides", [{"alpha": 0.0}, {"discount": 1.0}, {"num_updates": 1000}])
def test_settings_that_cannot_work_are_refused(overrides, capsys):
    with pytest.raises(SystemExit) as leave:
        optidice.train(optidice.Config(**overrides), config.Options())
    line = capsys.readouterr().err
    assert leave.value.code == 2 and line.count("\n") == 1 and "must be" in line


# --- Closed form --------------------------------------------------------------------------------
def test_ratio_of_one_step_into_an_absorbing_state():
    """Rewards a uniform in [-1, 1] at the first step, then the absorbing state without reward.

    Every policy's occupancy of the first state is 1 - gamma = 0.1. Half of the rows start in it,
    so the mean of w over a is 0.2 there. With alpha 1, w = max(0, a - c), of mean (1 - c)^2 / 4.
    """
    data = probes.best_action()
    data = data._replace(reward=data.action[:, 0])
    settings = {"f": "chi2", "alpha": 1.0, "discount": 0.9, "absorbing_state": "bootstrap"}
    settings |= {"extraction": "wbc"}
    state = probes.train(optidice, data, 3000, **settings)
    cfg = probes.config(optidice, **settings)
    action = np.float32([[-0.9], [-0.5], [0.3], [0.6], [0.9]])
    observation = np.float32([[1, 0]] * len(action))
    residual = state.residual_net.apply_fn(state.residual_net.params, observation, action)
    w = optidice.ratio(optidice.normalised_residual(residual, state, cfg), cfg)
    expected = np.maximum(0, action[:, 0] - (1 - 2 * 0.2**0.5))
    np.testing.assert_allclose(w, expected, atol=0.04)

# SPDX-License-Identifier: Apache-2.0
"""AlgaeDICE's losses against NumPy in float64 and hand-worked numbers.

The order of its updates is compared with the authors' code in test_parity.py. Its ratio is compared
with the exact one of its policy in tests/benchmarks/test_occupancy.py.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_nets as nets
import probes
import pytest
from numpy_nets import directions, dot, double, slope

from algorithms import algaedice
from common.experiment import config

setup = functools.partial(nets.setup, algaedice)
critic_loss = nets.compiled(algaedice.critic_loss)
actor_loss = nets.compiled(algaedice.actor_loss)


# --- The method in NumPy ------------------------------------------------------------------------
def sample(params, observation, noise):
    """(action, log pi), with the density of tanh by its derivative."""
    mean, log_std = np.split(nets.mlp(params, observation), 2, axis=-1)
    log_std = -5 + 7 * (np.tanh(log_std) + 1) / 2
    x = mean + np.exp(log_std) * noise
    log_prob = nets.log_normal(x, mean, log_std) - np.log(1 - np.tanh(x) ** 2).sum(axis=1)
    return np.tanh(x), log_prob


def numpy_residual(params, state, batch, action, log_prob, cfg):
    q = nets.critics(params, batch.observation, batch.action)
    next_q = nets.critics(params, batch.next_observation, action)
    target = nets.critics(double(state.critic.target_params), batch.next_observation, action)
    temperature = np.exp(double(state.log_temperature.params)["log"])
    residual = np.zeros(q.shape)
    for k in range(len(q)):
        for i, reward in enumerate(batch.reward):
            mixed = cfg.online_share * next_q[k, i] + (1 - cfg.online_share) * min(target[:, i])
            following = mixed - temperature * log_prob[i]
            alive = 0.0 if batch.termination[i] else 1.0
            residual[k, i] = reward + cfg.discount * alive * following - q[k, i]
    return residual


def numpy_critic_loss(params, state, batch, noise, cfg):
    actor = double(state.actor.params)
    initial, _ = sample(actor, batch.initial_observation, noise[0])
    action, log_prob = sample(actor, batch.next_observation, noise[1])
    residual = numpy_residual(params, state, batch, action, log_prob, cfg)
    first = nets.critics(params, batch.initial_observation, initial)
    terms = abs(residual) ** cfg.exponent / cfg.exponent
    terms += (1 - cfg.discount) * cfg.alpha * first
    return sum(row.mean() for row in terms)


def numpy_actor_terms(params, state, batch, noise, cfg):
    critic = double(state.critic.params)
    initial, _ = sample(params, batch.initial_observation, noise[0])
    action, log_prob = sample(params, batch.next_observation, noise[1])
    residual = numpy_residual(critic, state, batch, action, log_prob, cfg)
    return residual, nets.critics(critic, batch.initial_observation, initial), log_prob


def numpy_actor_loss(params, weight, state, batch, noise, cfg):
    residual, first, _ = numpy_actor_terms(params, state, batch, noise, cfg)
    penalty = 0.0
    for layer in params["params"].values():
        for i, column in enumerate(layer["kernel"].T):
            for j, other in enumerate(layer["kernel"].T):
                penalty += (column @ other) ** 2 if i != j else 0.0
    objective = weight * residual + (1 - cfg.discount) * cfg.alpha * first
    return cfg.orthogonal_penalty * penalty - objective.mean()


VARIANTS = [
    {},
    {"exponent": 2.0, "online_share": 1.0, "alpha": 0.7, "num_critics": 3, "discount": 0.8},
]


def inputs(**overrides):
    cfg, state, key, data = setup(**overrides)
    # Small weights: no action at the edge of the box, where log pi loses its digits.
    actor = jax.tree.map(lambda x: 0.4 * x, state.actor.params)
    noise = jax.random.normal(jax.random.clone(key), (2, *data.action.shape))
    return cfg, state._replace(actor=state.actor.replace(params=actor)), key, data, double(noise)


@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_losses_and_gradients_equal_numpy(overrides):
    """The critic's gradient goes through Q(s', a') too; the actor's takes w as a number."""
    cfg, state, key, data, noise = inputs(**overrides)
    batch, params = double(data), double(state.critic.params)
    loss, metrics, grads = critic_loss(state.critic.params, state, data, key, cfg)
    expected = functools.partial(numpy_critic_loss, state=state, batch=batch, noise=noise, cfg=cfg)
    np.testing.assert_allclose([loss, metrics["critic_loss"]], expected(params), rtol=1e-4)
    for direction in directions(params, 3):
        change = slope(expected, params, direction)
        np.testing.assert_allclose(dot(grads, direction), change, rtol=3e-3, atol=1e-3)

    params = double(state.actor.params)
    loss, metrics, grads = actor_loss(state.actor.params, state, data, key, cfg)
    residual, _, log_prob = numpy_actor_terms(params, state, batch, noise, cfg)
    weight = np.maximum(residual, 0) ** (cfg.exponent - 1)
    expected = functools.partial(
        numpy_actor_loss, weight=weight, state=state, batch=batch, noise=noise, cfg=cfg
    )
    np.testing.assert_allclose([loss, metrics["actor_loss"]], expected(params), rtol=1e-4)
    np.testing.assert_allclose(metrics["weight"], weight.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["residual"], residual.mean(), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(metrics["entropy"], -log_prob.mean(), rtol=1e-4)
    assert 0.1 < (weight > 0).mean() < 0.9
    for direction in directions(params, 3):
        change = slope(expected, params, direction)
        np.testing.assert_allclose(dot(grads, direction), change, rtol=3e-3, atol=1e-3)


# --- By hand ------------------------------------------------------------------------------------
def test_the_two_gradients_by_hand():
    """Q(s, a) = p s for states s of one number, so no action and no noise counts.

    One row from s = 1 to s' = 2, reward 1, gamma 1/2, alpha 1/2, p = 3, target p = 1, temperature 0
    and f(x) = x^2 / 2. The next value is share 6 + (1 - share) 2, and an episode starts in s0 = 4.
    """

    def apply_critic(params, observation, action):
        return params[:, None] * observation.sum(axis=-1)[None]

    critic = nets.linear_net(algaedice.TrainState.create, apply_critic, [3.0], [1.0])
    create = algaedice.train_state.TrainState.create
    actor = nets.linear_net(create, lambda p, s: (p * s, 0 * s), 0.0)
    cold = nets.linear_net(create, algaedice.temperature_of, {"log": -80.0})
    state = algaedice.State(actor, critic, cold)
    one = np.ones((1, 1), np.float32)
    batch = algaedice.TransitionsAndStarts(one, one, one[0], 2 * one, 0 * one[0], 4 * one)
    for share, residual, slope_of_residual in (
        (0.0, -1.0, -1.0),
        (0.5, 0.0, -0.5),
        (1.0, 1.0, 0.0),
    ):
        # delta = 1 + (6 share + 2 (1 - share)) / 2 - 3; its derivative by p is share 2 / 2 - 1
        cfg = algaedice.Config(
            discount=0.5, alpha=0.5, exponent=2.0, online_share=share, orthogonal_penalty=0.0
        )
        loss, _, grads = critic_loss(critic.params, state, batch, jax.random.key(0), cfg)
        # delta^2 / 2 + 1/2 * 1/2 * Q(4), Q(4) = 12
        np.testing.assert_allclose(loss, residual**2 / 2 + 3, rtol=1e-6)
        np.testing.assert_allclose(grads, [residual * slope_of_residual + 1], atol=1e-6)


def test_squared_overlaps_by_hand():
    # Columns (1, 2) and (3, 4) with product 11, both ways; one column alone has none.
    layers = {
        "Dense_0": {"kernel": jnp.array([[1.0, 3.0], [2.0, 4.0]]), "bias": jnp.ones(2)},
        "Dense_1": {"kernel": jnp.array([[5.0], [6.0]]), "bias": jnp.ones(1)},
    }
    np.testing.assert_allclose(algaedice.squared_overlaps({"params": layers}), 2 * 11**2)


def test_temperature_rises_while_the_entropy_is_below_minus_a():
    for entropy, sign in ((-3.0, -1), (1.0, 1)):
        grads = jax.grad(algaedice.temperature_loss)({"log": np.float32(0.3)}, entropy, 2)
        np.testing.assert_allclose(grads["log"], np.exp(0.3) * (entropy + 2), rtol=1e-6)
        assert np.sign(grads["log"]) == sign  # Adam moves against it


# --- What the losses may depend on --------------------------------------------------------------
def test_termination_stops_the_bootstrap():
    cfg, state, key, data, _ = inputs()

    def loss(termination, next_observation):
        batch = data._replace(
            termination=np.full_like(data.termination, termination),
            next_observation=np.full_like(data.next_observation, next_observation),
        )
        return critic_loss(state.critic.params, state, batch, key, cfg)[0]

    assert loss(1, 0.1) == loss(1, 0.5) != loss(0, 0.5) != loss(0, 0.1)


def test_losses_read_only_the_networks_they_should():
    cfg, state, key, data, _ = inputs()
    other = nets.shaken(state, seed=4)
    critic, actor = state.critic.params, state.actor.params
    before = (
        critic_loss(critic, state, data, key, cfg)[0],
        actor_loss(actor, state, data, key, cfg)[0],
    )
    for field in ("actor", "critic", "log_temperature"):
        changed = state._replace(**{field: getattr(other, field)})
        assert critic_loss(critic, changed, data, key, cfg)[0] != before[0]
        same = actor_loss(actor, changed, data, key, cfg)[0] == before[1]
        assert same == (field == "actor")
    targets = state.critic.replace(params=other.critic.params)
    assert critic_loss(critic, state._replace(critic=targets), data, key, cfg)[0] == before[0]


# --- Networks -----------------------------------------------------------------------------------
def test_initial_parameters():
    state = nets.fresh(algaedice)
    for params, sizes in (
        (state.actor.params, (16, 64, 96, 4)),
        (state.critic.params, (18, 64, 96, 1)),
    ):
        layers = params["params"]
        assert len(layers) == 3
        for i, (fan_in, width) in enumerate(itertools.pairwise(sizes)):
            kernel, bias = (np.asarray(layers[f"Dense_{i}"][x]) for x in ("kernel", "bias"))
            assert kernel.shape[-2:] == (fan_in, width) and not bias.any()
            for matrix in kernel.reshape(-1, fan_in, width):
                matrix = matrix if fan_in >= width else matrix.T
                least = np.eye(min(fan_in, width))
                np.testing.assert_allclose(matrix.T @ matrix, least, atol=1e-5)
    nets.check_members_differ(state.critic)
    nets.check_targets_are_copies(state.critic)


def test_the_policy_is_the_mode_and_the_log_std_is_bounded():
    _, state, key, data = setup()
    params = algaedice.policy_params(state)
    assert params is state.actor.params
    action = jax.jit(functools.partial(algaedice.policy, state.actor.apply_fn))(
        params, data.observation, key
    )
    output = nets.mlp(double(params), double(data).observation)
    np.testing.assert_allclose(action, np.tanh(output[:, :2]), rtol=1e-3, atol=1e-4)
    _, log_std = jax.jit(state.actor.apply_fn)(params, data.observation)
    np.testing.assert_allclose(log_std, 3.5 * np.tanh(output[:, 2:]) - 1.5, rtol=1e-3, atol=1e-4)


# --- Data ---------------------------------------------------------------------------------------
def test_training_sees_the_rows_and_the_episodes_starts(monkeypatch, tmp_path):
    raw = probes.random_transitions(20)
    _, data = nets.handed_over(algaedice, monkeypatch, tmp_path, raw, (-3, 5))
    for name in ("observation", "action", "reward", "next_observation", "termination"):
        assert np.array_equal(getattr(data, name), getattr(raw, name)), name
    expected = raw.observation[np.array([0, 10] * 10)]
    assert np.array_equal(data.initial_observation, expected)


@pytest.mark.parametrize("overrides", [{"exponent": 1.0}, {"discount": 1.0}])
def test_settings_that_cannot_work_are_refused(overrides, capsys):
    with pytest.raises(SystemExit) as leave:
        algaedice.train(algaedice.Config(**overrides), config.Options())
    line = capsys.readouterr().err
    assert leave.value.code == 2 and line.count("\n") == 1 and "must be" in line

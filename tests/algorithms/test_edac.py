# SPDX-License-Identifier: Apache-2.0
"""EDAC's diversity loss against NumPy in float64 and hand-worked numbers; the rest as SAC-N's."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import numpy_nets as nets
import probes
import pytest
import test_sac_n as sac_n_tests
from numpy_nets import directions, dot, double, slope

from algorithms import edac, sac_n
from common.experiment import config

setup = functools.partial(nets.setup, edac)
critic_loss = nets.compiled(edac.critic_loss)


# --- The method in NumPy ------------------------------------------------------------------------
def numpy_action_gradient(params, observation, action):
    """grad_a Q of one critic, [B, A], by the chain rule."""
    layers = params["params"]
    hidden, x, on = len(layers) - 1, np.concatenate([observation, action], axis=-1), []
    for i in range(hidden):
        x = nets.dense(layers[f"Dense_{i}"], x)
        on.append(x > 0)
        x = np.maximum(x, 0)
    gradient = np.ones((len(x), 1))
    for i in reversed(range(hidden + 1)):
        gradient = gradient @ layers[f"Dense_{i}"]["kernel"].T
        if i > 0:
            gradient = gradient * on[i - 1]
    return gradient[:, observation.shape[-1] :]


def numpy_diversity(params, batch):
    """Pair by pair."""
    count = len(params["params"]["Dense_0"]["bias"])
    unit = []
    for k in range(count):
        member = jax.tree.map(lambda x, k=k: x[k], params)
        gradient = numpy_action_gradient(member, batch.observation, batch.action)
        unit.append(gradient / np.linalg.norm(gradient, axis=-1, keepdims=True))
    total = 0.0
    for i in range(count):
        for j in range(count):
            if i != j:
                total += (unit[i] * unit[j]).sum(axis=-1)
    return (total / (count - 1)).mean()


def numpy_critic_loss(params, state, batch, noise, cfg):
    """-> loss, TD error, diversity"""
    td_error, _, _ = sac_n_tests.numpy_critic_loss(params, state, batch, noise, cfg)
    diversity = numpy_diversity(params, batch)
    return td_error + cfg.eta * diversity, td_error, diversity


@pytest.mark.parametrize(
    "overrides", [{"num_critics": 4}, {"num_critics": 2, "eta": 50.0}], ids=str
)
def test_critic_loss_and_gradient_equal_numpy(overrides):
    """The gradient is that of a gradient: the diversity changes with the critics' parameters."""
    cfg, state, key, data = setup(**overrides)
    batch, noise = double(data), sac_n_tests.draw(key)
    params = double(state.critic.params)
    loss, metrics, grads = critic_loss(state.critic.params, state, data, key, cfg)
    expected, td_error, diversity = numpy_critic_loss(params, state, batch, noise, cfg)
    np.testing.assert_allclose([loss, metrics["critic_loss"]], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["td_error"], td_error, rtol=1e-4)
    np.testing.assert_allclose(metrics["diversity"], diversity, rtol=1e-4)
    for direction in directions(params, 3):
        expected = slope(
            lambda p: numpy_critic_loss(p, state, batch, noise, cfg)[0], params, direction
        )
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=2e-3)


def test_the_diversity_loss_in_float64_has_the_gradient_of_numpy():
    _, state, _, data = setup(num_critics=3)
    cfg, params, batch = edac.Config(hidden=(16, 16), num_critics=3), double(state.critic.params), 0
    batch = double(data)
    with jax.enable_x64(True):
        found, grads = jax.jit(jax.value_and_grad(functools.partial(edac.diversity_loss, cfg=cfg)))(
            params, batch
        )
    np.testing.assert_allclose(found, numpy_diversity(params, batch), rtol=1e-7)
    for direction in directions(params, 3):
        expected = slope(lambda p: numpy_diversity(p, batch), params, direction)
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=1e-5)


# --- By hand ------------------------------------------------------------------------------------
def linear_critics(gradients):
    """Parameters of critics without hidden layers: Q_k(s, a) = 7 s + gradients[k] a + 1."""
    gradients = np.asarray(gradients, np.float32)
    state_part = np.full((len(gradients), 1), 7, np.float32)
    kernel = np.concatenate([state_part, gradients], axis=1)[..., None]
    return {
        "params": {"Dense_0": {"kernel": kernel, "bias": np.ones((len(kernel), 1), np.float32)}}
    }


@pytest.mark.parametrize(
    ("gradients", "expected"),
    [
        ([[1, 0], [5, 0], [0.1, 0]], 3),  # all the same way: 6 pairs of 1, over 2
        ([[1, 0], [0, 2]], 0),
        ([[3, 4], [-3, -4]], -2),
        ([[1, 0], [-0.5, 3**0.5 / 2], [-0.5, -(3**0.5) / 2]], -1.5),  # 6 pairs of -1/2, over 2
        ([[1, 0], [0, 0]], 0),  # a critic whose Q does not depend on the action
    ],
)
def test_diversity_loss_by_hand(gradients, expected):
    params, cfg = linear_critics(gradients), edac.Config(hidden=(), num_critics=len(gradients))
    batch = probes.random_transitions(4, 1, 2)
    found, grads = jax.value_and_grad(edac.diversity_loss)(params, batch, cfg)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


def test_the_gradient_turns_critics_apart_and_leaves_the_rest():
    """Two critics at a right angle: the slope of cos turns each away from the other; neither the
    length of a gradient nor what Q makes of the state matters."""
    params, cfg = linear_critics([[2, 0], [0, 4]]), edac.Config(hidden=(), num_critics=2)
    grads = jax.grad(edac.diversity_loss)(params, probes.random_transitions(4, 1, 2), cfg)
    found = np.asarray(grads["params"]["Dense_0"]["kernel"][..., 0])
    # d cos / d g_1 = g_2 / (|g_1| |g_2|) at a right angle; two pairs over K - 1 = 1.
    np.testing.assert_allclose(found, [[0, 0, 1], [0, 0.5, 0]], atol=1e-6)
    assert not np.any(grads["params"]["Dense_0"]["bias"])


def test_critic_loss_by_hand():
    """Two critics with the gradients (1, 1) and (1, -1), and one of length 0: all pairs are 0."""
    key = jax.random.key(0)
    state, batch, target, q = sac_n_tests.bootstrap_by_hand(edac, key)
    cfg = edac.Config(hidden=(), num_critics=3, eta=10.0, discount=0.5)
    params = linear_critics([[1], [-2], [0]])
    # One action dimension: cos is -1 between the first two and 0 with the third, over K - 1 = 2.
    q = q + 7 * batch.observation[:, 0] + 1
    state = state._replace(critic=state.critic.replace(apply_fn=one_action_critics(state)))
    expected = ((q - target) ** 2).mean(axis=1).sum()
    loss, metrics, _ = nets.compiled(edac.critic_loss)(params, state, batch, key, cfg)
    np.testing.assert_allclose(metrics["td_error"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["diversity"], -1, rtol=1e-5)
    np.testing.assert_allclose(loss, expected - 10, rtol=1e-5)


def one_action_critics(state):
    """Apply function that takes `linear_critics` and, for the targets, arrays of factors."""
    linear = state.critic.apply_fn
    real = jax.vmap(edac.ReluCritic(()).apply, (0, None, None))
    return lambda p, s, a: real(p, s, a) if isinstance(p, dict) else linear(p, s, a)


# --- What the losses may depend on --------------------------------------------------------------
def test_diversity_reads_the_data_alone():
    """Not rewards, not what follows, not the other networks, whose terms come with the TD error."""
    cfg, state, key, data = setup(num_critics=3)
    other = nets.shaken(state, seed=4)

    def diversity(params=state.critic.params, state=state, data=data):
        return critic_loss(params, state, data, key, cfg)[1]["diversity"]

    here = diversity()
    assert diversity(params=other.critic.params) != here
    assert diversity(state=other) == here
    for name in ("reward", "next_observation", "next_action", "termination", "truncation"):
        changed = data._replace(**{name: jnp.ones_like(getattr(data, name))})
        assert diversity(data=changed) == here, name
    for name in ("observation", "action"):
        changed = data._replace(**{name: 0.5 * getattr(data, name)})
        assert diversity(data=changed) != here, name


def test_without_eta_it_is_sac_n():
    """The same numbers from the same keys."""
    cfg, state, key, data = setup(num_critics=3, eta=0.0)
    loss, _, grads = critic_loss(state.critic.params, state, data, key, cfg)
    parent, _, expected = sac_n_tests.critic_loss(
        state.critic.params, state, data, key, probes.config(sac_n, **nets.CFG)
    )
    np.testing.assert_allclose(loss, parent, rtol=1e-6)
    nets.check_close(grads, expected, 1e-5, 1e-6)


def test_losses_of_actor_and_temperature_are_the_parents():
    for name in ("actor_loss", "temperature_loss", "update"):
        ours, parents = (inspect.getsource(getattr(x, name)) for x in (edac, sac_n))
        assert ours == parents


def test_no_jacobian():
    """Ten times the critics cost ten times the operations, not a hundred times."""

    def operations(count):
        cfg = probes.config(edac, hidden=(8,), num_critics=count)
        params = nets.shapes(edac, cfg, None).critic.params
        grad = jax.jit(jax.grad(functools.partial(edac.diversity_loss, cfg=cfg)))
        program = grad.lower(params, probes.random_transitions())
        return program.cost_analysis()["flops"]

    assert operations(50) < 11 * operations(5)


# --- Networks and update ------------------------------------------------------------------------
def test_initial_state():
    state = nets.fresh(edac)
    sac_n_tests.check_small_outputs(state)
    nets.check_members_differ(state.critic)
    nets.check_targets_are_copies(state.critic)


def test_order_of_an_update_and_means_of_the_metrics():
    sac_n_tests.check_update(edac)


def test_updates_lower_the_alignment():
    """With a large eta the critics' gradients turn apart; without it they do not."""

    def after(eta):
        cfg, state, key, data = setup(
            num_critics=4, log_every=60, critic_learning_rate=3e-3, eta=eta
        )
        state, _ = nets.train_chunk(edac, state, key, 0, data, cfg)
        return float(edac.diversity_loss(state.critic.params, data, cfg))

    assert after(100.0) < after(0.0) - 0.5


def test_a_single_critic_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as leave:
        edac.train(edac.Config(num_critics=1), config.Options())
    assert leave.value.code == 2 and not list(tmp_path.iterdir())
    assert "--num-critics 1: must be at least 2" in capsys.readouterr().err

# SPDX-License-Identifier: Apache-2.0
"""ODICE's losses, projection and update against NumPy in float64 and hand-worked numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_nets as nets
import probes
import pytest
from flax.training import train_state
from numpy_nets import directions, dot, double, slope

from algorithms import odice

value_loss = nets.compiled(odice.value_loss)
actor_loss = nets.compiled(odice.actor_loss)
setup = functools.partial(nets.setup, odice, value_hidden=(16, 16))
RESIDUALS = {  # name -> residual whose V(s), V(s') or both are learned
    "forward": odice.forward_residual,
    "backward": odice.backward_residual,
    "full": odice.full_residual,
}


def compiled_dual_loss(residual):
    def loss(params, state, batch, cfg):
        return odice.dual_loss(params, state, batch, residual, cfg)

    return nets.compiled(loss)


COMPILED = {name: compiled_dual_loss(residual) for name, residual in RESIDUALS.items()}


def dual_loss(params, state, batch, name, cfg):
    """`name` is that of a residual."""
    return COMPILED[name](params, state, batch, cfg)


value_gradient = jax.jit(odice.value_gradient, static_argnums=2)


# --- The method in NumPy ------------------------------------------------------------------------
def numpy_values(params, observation):
    """[K, B], a layer norm before each relu where there is one."""

    def member(k):
        layers, x = jax.tree.map(lambda x: x[k], params)["params"], observation
        count = sum(name.startswith("Dense") for name in layers) - 1
        for i in range(count):
            x = nets.dense(layers[f"Dense_{i}"], x)
            if f"LayerNorm_{i}" in layers:
                norm = layers[f"LayerNorm_{i}"]
                x = x - x.mean(axis=-1, keepdims=True)
                x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5)
                x = x * norm["scale"] + norm["bias"]
            x = np.maximum(x, 0)
        return nets.dense(layers[f"Dense_{count}"], x)[..., 0]

    return np.stack([member(k) for k in range(len(params["params"]["Dense_0"]["bias"]))])


def numpy_residual(params, state, batch, name, cfg):
    target_params = double(state.value_net.target_params)
    values = numpy_values(target_params if name == "backward" else params, batch.observation)
    next_values = numpy_values(
        target_params if name == "forward" else params, batch.next_observation
    )
    residual = np.zeros(values.shape)
    for k in range(len(residual)):
        for i, reward in enumerate(batch.reward):
            value = min(values[:, i]) if name == "backward" else values[k, i]
            next_value = min(next_values[:, i]) if name == "forward" else next_values[k, i]
            alive = 0.0 if batch.termination[i] else 1.0
            residual[k, i] = reward + cfg.discount * alive * next_value - value
    return residual


def numpy_dual(params, state, batch, name, cfg):
    """The conjugate as the largest y x - (x - 1)^2 over ratios x of 0 and more."""
    y = numpy_residual(params, state, batch, name, cfg) / cfg.alpha
    ratio = np.maximum(0, 1 + y / 2)
    return cfg.lam * (y * ratio - (ratio - 1) ** 2).mean()


def numpy_policy(params, observation):
    return nets.mlp(params, observation), np.clip(params["params"]["log_std"], -5, 2)


def numpy_actor_loss(params, state, batch, cfg):
    """-> loss, log pi, weight, e"""
    name = "full" if cfg.gradient == "true" else "forward"
    error = numpy_residual(double(state.value_net.params), state, batch, name, cfg)
    weight = np.clip(error, 0, 100)
    log_prob = nets.log_normal(batch.action, *numpy_policy(params, batch.observation))
    loss = -sum((w * log_prob).mean() for w in weight) / len(weight)
    return loss, log_prob.mean(), weight.mean(), error


VARIANTS = [
    {},
    {"layer_norm": False, "discount": 0.7, "num_values": 1, "lam": 0.3},
    {"alpha": 0.4, "lam": 0.5, "num_values": 3, "gradient": "true", "value_hidden": (8, 12)},
]


@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_losses_and_gradients_equal_numpy(overrides):
    """The gradient takes the targets and the weights of the actor as numbers."""
    cfg, state, _, data = setup(**overrides)
    batch, params = double(data), double(state.value_net.params)
    loss, metrics, _ = value_loss(state.value_net.params, state, data, cfg)
    value = numpy_values(params, batch.observation).mean()
    np.testing.assert_allclose(metrics["value"], value, rtol=1e-4)
    np.testing.assert_allclose(loss, (1 - cfg.lam) * value / cfg.alpha, rtol=1e-4)
    names = RESIDUALS if not overrides else ("forward", "full")
    for name in names:
        loss, metrics, grads = dual_loss(state.value_net.params, state, data, name, cfg)
        expected = numpy_dual(params, state, batch, name, cfg)
        np.testing.assert_allclose([loss, metrics["dual_loss"]], expected, rtol=1e-4)
        for direction in directions(params, 3):
            expected = slope(
                lambda p, name=name: numpy_dual(p, state, batch, name, cfg), params, direction
            )
            np.testing.assert_allclose(dot(grads, direction), expected, rtol=2e-3, atol=1e-4)
    params = double(state.actor.params)
    loss, metrics, grads = actor_loss(state.actor.params, state, data, cfg)
    expected, log_prob, weight, error = numpy_actor_loss(params, state, batch, cfg)
    np.testing.assert_allclose([loss, metrics["actor_loss"]], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["log_prob"], log_prob, rtol=1e-4)
    np.testing.assert_allclose(metrics["weight"], weight, rtol=1e-4)
    np.testing.assert_allclose(metrics["residual"], error.mean(), rtol=1e-3)
    np.testing.assert_allclose(metrics["positive"], (error > 0).mean(), rtol=1e-6)
    assert 0.1 < metrics["positive"] < 0.9
    for direction in directions(params, 3):
        expected = slope(lambda p: numpy_actor_loss(p, state, batch, cfg)[0], params, direction)
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_lambda_one_half_is_the_pearson_dual(alpha):
    """E max(0, 1 + e / (2 alpha))^2 + E V / alpha = 2 (value_loss + dual_loss) + 1."""
    cfg, state, _, data = setup(lam=0.5, alpha=alpha)
    params, batch = double(state.value_net.params), double(data)
    linear, _, linear_grads = value_loss(state.value_net.params, state, data, cfg)
    for name in ("full", "forward"):
        dual, _, grads = dual_loss(state.value_net.params, state, data, name, cfg)

        def pearson(p, name=name):
            error = numpy_residual(p, state, batch, name, cfg)
            hinge = np.maximum(0, 1 + error / (2 * alpha))
            return (hinge**2).mean() + numpy_values(p, batch.observation).mean() / alpha

        np.testing.assert_allclose(2 * (linear + dual) + 1, pearson(params), rtol=1e-4)
        grads = jax.tree.map(lambda x, y: 2 * (x + y), grads, linear_grads)
        for direction in directions(params, 2):
            expected = slope(pearson, params, direction)
            np.testing.assert_allclose(dot(grads, direction), expected, rtol=2e-3, atol=1e-3)


# --- By hand ------------------------------------------------------------------------------------
def tabular(value, target):
    """V_k(s) = sum of value_k * s for states that are unit vectors; std 1, mu(s) = 0."""
    create = train_state.TrainState.create

    def values(params, observation):
        return jnp.einsum("kn,bn->kb", params, observation)

    return odice.State(
        nets.linear_net(create, lambda p, s: (p * s[:, :1], 0 * s[:, :1]), 0.0),
        nets.linear_net(odice.TrainState.create, values, value, target),
    )


def rows(states, next_states, **columns):
    count = len(states)
    return probes.random_transitions(
        count,
        2,
        1,
        observation=np.eye(2)[states],
        next_observation=np.eye(2)[next_states],
        **columns,
    )


def test_the_three_gradients_by_hand():
    # One transition from state 0 to state 1, reward 1, discount 1/2, lambda 1/2, eta 1.
    # V = (1, 2), target V' = (3, 4).
    state = tabular([[1, 2]], [[3, 4]])
    batch = rows([0], [1], reward=[1], termination=[0])
    cfg = odice.Config(discount=0.5, lam=0.5)
    # f*'(e) = max(0, 1 + e / 2), the gradient of V(0) is (1, 0), of V(1) it is (0, 1)
    # forward   e = 1 + 4 / 2 - 1 = 2    f*' = 2      f = 1/2 * 2 * (-1, 0)       = (-1, 0)
    # backward  e = 1 + 2 / 2 - 3 = -1   f*' = 1/2    b = 1/2 * 1/2 * (0, 1/2)    = (0, 1/8)
    # full      e = 1 + 2 / 2 - 1 = 1    f*' = 3/2        1/2 * 3/2 * (-1, 1/2)   = (-3/4, 3/8)
    # (1 - lambda) V(s)                                                            (1/2, 0)
    for gradient, expected in (
        ("semi", [-0.5, 0]),
        ("true", [-0.25, 0.375]),
        ("orthogonal", [-0.5, 0.125]),  # f . b = 0: b stays as it is
    ):
        found, _ = value_gradient(state, batch, dataclasses.replace(cfg, gradient=gradient))
        np.testing.assert_allclose(found, [expected], atol=1e-6)


def test_orthogonal_projection_by_hand():
    # The same, but state 0 also follows itself: f . b is not 0. Two rows, means are halves.
    state = tabular([[1, 2]], [[3, 4]])
    batch = rows([0, 0], [1, 0], reward=[1, 2], termination=[0, 0])
    # row                1                             2
    # forward   e        2                             2 + 3 / 2 - 1 = 2.5
    #           f*'      2                             2.25
    #           f        1/2 * 1/2 * (2 + 2.25) * (-1, 0)                = (-1.0625, 0)
    # backward  e       -1                             2 + 1 / 2 - 3 = -0.5
    #           f*'      0.5                           0.75
    #           b        1/2 * 1/2 * 1/2 * (0.75, 0.5)                   = (0.09375, 0.0625)
    # f . b = -0.099609375, f . f = 1.12890625, share -0.0882352941.. = -0.09375 / 1.0625
    # b - share f = (0.09375 - 0.09375, 0.0625) = (0, 0.0625)
    for eta in (1.0, 4.0):
        cfg = odice.Config(discount=0.5, lam=0.5, eta=eta)
        found, metrics = value_gradient(state, batch, cfg)
        np.testing.assert_allclose(found, [[0.5 - 1.0625, 0.0625 * eta]], atol=1e-6)
        np.testing.assert_allclose(metrics["dual_loss"], 0.5 * (4 + 2.25**2 - 2) / 2, rtol=1e-6)


def test_project_orthogonally_by_hand():
    # x = (3, 4 | 0), d = (1, 0 | 2), both arrays as one vector: x . d / |d|^2 = 3 / 5.
    x = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([[0.0]])}
    direction = {"a": jnp.array([1.0, 0.0]), "b": jnp.array([[2.0]])}
    found = odice.project_orthogonally(x, direction)
    np.testing.assert_allclose(found["a"], [2.4, 4.0], rtol=1e-6)
    np.testing.assert_allclose(found["b"], [[-1.2]], rtol=1e-6)
    nothing = jax.tree.map(jnp.zeros_like, direction)
    nets.check_close(odice.project_orthogonally(x, nothing), x, 0, 0)  # no direction: x itself


def test_the_backward_part_is_orthogonal_to_the_forward_part_over_all_parameters():
    grads = {}
    for gradient in ("orthogonal", "semi"):
        cfg, state, _, data = setup(gradient=gradient, eta=0.7)
        grads[gradient], _ = value_gradient(state, data, cfg)
    params = state.value_net.params
    _, _, forward = dual_loss(params, state, data, "forward", cfg)
    _, _, backward = dual_loss(params, state, data, "backward", cfg)
    added = jax.tree.map(lambda x, y: x - y, double(grads["orthogonal"]), double(grads["semi"]))
    forward, backward = double(forward), double(backward)
    share = dot(backward, forward) / dot(forward, forward)
    expected = jax.tree.map(lambda b, f: 0.7 * (b - share * f), backward, forward)
    nets.check_close(added, expected, 1e-3, 1e-4)
    length = np.sqrt(dot(forward, forward) * dot(added, added))
    assert abs(dot(added, forward)) < 1e-3 * length < abs(0.7 * dot(backward, forward))
    # Layer by layer it is not: the whole is one vector.
    layers = zip(jax.tree.leaves(added), jax.tree.leaves(forward), strict=True)
    assert max(abs((x * y).sum()) for x, y in layers) > 1e-2 * length


def test_actor_loss_by_hand():
    # V_1 = (1, 0) and V_2 = (-1, 0), targets (0, 2) and (0, 4): their minimum is (0, 2).
    state = tabular([[1, 0], [-1, 0]], [[0, 2], [0, 4]])
    batch = rows(
        [0, 0, 0], [1, 1, 1], action=[[1], [2], [0]], reward=[1, -1, 500], termination=[0, 0, 1]
    )
    # row                   1          2            3
    # e (discount 1/2)    1, 3       -1, 1       499, 501
    # weight              1, 3        0, 1       100, 100
    # log pi + c          -1/2        -2           0
    cfg = odice.Config(discount=0.5)
    loss, metrics, _ = actor_loss(state.actor.params, state, batch, cfg)
    c = 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(loss, (4 * (0.5 + c) + (2 + c) + 200 * c) / 6, rtol=1e-5)
    np.testing.assert_allclose(metrics["weight"], 205 / 6, rtol=1e-6)
    np.testing.assert_allclose(metrics["positive"], 5 / 6, rtol=1e-6)


# --- Closed forms -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("gradient", "expected"), [("semi", 50 / 3), ("orthogonal", 50 / 3), ("true", -103.333)]
)
def test_endless_reward(gradient, expected):
    """One state with reward 1 for ever, lambda 0.6, discount 0.9, V one number: no network.

    semi: 0.4 = 0.6 (1 + e / 2), so e = -2/3 = 1 - 0.1 V. The backward gradient lies along the
    forward one, nothing of it is left. true: 0.4 = 0.6 (1 + e / 2) 0.1, so e = 34/3 = 1 - 0.1 V.
    """
    state, batch = tabular([[0, 0]], [[0, 0]]), rows([0], [0], reward=[1], termination=[0])
    cfg, value = odice.Config(discount=0.9, gradient=gradient), np.zeros((1, 2))

    def step(state, _):
        grads, _ = odice.value_gradient(state, batch, cfg)
        value = state.value_net.params - grads
        return state._replace(value_net=state.value_net.replace(params=value, target_params=value))

    state = jax.jit(lambda state: jax.lax.fori_loop(0, 8000, lambda i, s: step(s, i), state))(state)
    value = np.asarray(state.value_net.params)
    np.testing.assert_allclose(value, [[expected, 0]], rtol=1e-3)


# --- What the losses may depend on --------------------------------------------------------------
@pytest.mark.parametrize("name", RESIDUALS)
def test_termination_stops_the_bootstrap_and_truncation_does_not(name):
    cfg, state, _, data = setup()
    nets.check_bootstrap(lambda b: dual_loss(state.value_net.params, state, b, name, cfg)[0], data)


def test_losses_read_only_the_networks_they_should():
    cfg, state, _, data = setup()
    other = nets.shaken(state, seed=4)
    targets = state._replace(
        value_net=state.value_net.replace(target_params=other.value_net.target_params)
    )
    networks = state._replace(value_net=state.value_net.replace(params=other.value_net.params))
    params = state.value_net.params
    for name in RESIDUALS:
        before = dual_loss(params, state, data, name, cfg)[0]
        assert dual_loss(other.value_net.params, state, data, name, cfg)[0] != before
        assert (dual_loss(params, targets, data, name, cfg)[0] == before) == (name == "full")
        assert dual_loss(params, networks, data, name, cfg)[0] == before
    for gradient in ("semi", "orthogonal", "true"):
        cfg, _, _, _ = setup(gradient=gradient)
        before = actor_loss(state.actor.params, state, data, cfg)[0]
        assert actor_loss(state.actor.params, networks, data, cfg)[0] != before
        found = actor_loss(state.actor.params, targets, data, cfg)[0]
        assert (found == before) == (gradient == "true")


# --- Networks -----------------------------------------------------------------------------------
@functools.cache
def fresh():
    cfg = probes.config(odice, hidden=(64, 96), value_hidden=(96, 64), num_values=3)
    data = probes.random_transitions(observation_dim=16)
    create = functools.partial(odice.create_state, cfg=cfg)
    return jax.jit(create)(jax.random.key(0), data)


def test_initial_parameters():
    state = fresh()
    layers = dict(state.actor.params["params"])
    assert layers.pop("log_std").tolist() == [0, 0]
    nets.check_uniform_init({"params": layers}, (16, 64, 96, 2))
    layers = dict(state.value_net.params["params"])
    for i, width in enumerate((96, 64)):
        norm = layers.pop(f"LayerNorm_{i}")
        assert norm["scale"].tolist() == [[1] * width] * 3 and not norm["bias"].any()
    nets.check_uniform_init({"params": layers}, (16, 96, 64, 1))
    kernel = np.asarray(layers["Dense_0"]["kernel"])
    assert not np.isclose(kernel[0], kernel[1]).any(axis=0).all()
    assert not np.isclose(kernel[1], kernel[2]).any(axis=0).all()


def test_value_networks_alone_have_targets_and_they_start_as_copies():
    nets.check_targets_are_copies(fresh().value_net)
    assert not hasattr(fresh().actor, "target_params")


def test_the_policy_is_the_mean_clipped_to_the_box():
    _, state, key, data = setup()
    params = odice.policy_params(state)
    assert params is state.actor.params
    act = jax.jit(functools.partial(odice.policy, state.actor.apply_fn))
    action = act(params, data.observation, key)
    mean, _ = numpy_policy(double(params), double(data).observation)
    np.testing.assert_allclose(action, mean.clip(-1, 1), rtol=1e-3, atol=1e-4)
    assert (mean > 1).any() and (np.abs(mean) < 1).any()
    params["params"]["log_std"] = np.float32([-7, 3])
    _, log_std = jax.jit(state.actor.apply_fn)(params, data.observation)
    assert (log_std == np.array([[-5, 2]])).all()


# --- Update -------------------------------------------------------------------------------------
RATES = {"actor_learning_rate": 0.02, "value_learning_rate": 0.05, "target_rate": 0.3}


def take(data, index):
    return jax.tree.map(lambda column: column[index], data)


def test_order_of_two_updates():
    """V and the actor from the state before, the actor with its parameters added, then targets."""
    cfg, state, key, data = setup(log_every=2, **RATES, weight_decay=0.5)
    loss_cfg, expected, _, _ = setup()  # the same numbers, with the losses compiled already
    tx = nets.shapes(odice, cfg, None).actor.tx  # `setup` leaves the weight decay at its default
    state = state._replace(actor=state.actor.replace(tx=tx))
    adam = {"value_net": nets.Adam(0.05), "actor": nets.Adam(0.02)}
    found = []
    for step in (6, 7):
        key_batch = jax.random.fold_in(jax.random.clone(key), step)
        index = jax.random.randint(key_batch, (cfg.batch_size,), 0, len(data.reward))
        batch = take(data, index)
        grads, metrics = value_gradient(expected, batch, loss_cfg)
        _, more, actor_grads = actor_loss(expected.actor.params, expected, batch, loss_cfg)
        found.append(metrics | more)
        actor_grads = jax.tree.map(lambda g, x: g + 0.5 * x, actor_grads, expected.actor.params)
        for name, gradient in (("value_net", grads), ("actor", actor_grads)):
            net = getattr(expected, name)
            net = net.replace(params=adam[name].step(net.params, gradient))
            expected = expected._replace(**{name: net})
        target = nets.polyak(expected.value_net.params, expected.value_net.target_params, 0.3)
        expected = expected._replace(value_net=expected.value_net.replace(target_params=target))
    after, metrics = nets.train_chunk(odice, state, key, 6, data, cfg)
    for name in ("value_net", "actor"):
        nets.check_close(getattr(after, name).params, getattr(expected, name).params)
    nets.check_close(after.value_net.target_params, expected.value_net.target_params)
    assert {*metrics} == {*found[0]}
    for name in metrics:
        mean = np.mean([float(x[name]) for x in found])
        np.testing.assert_allclose(metrics[name], mean, rtol=1e-3, atol=1e-4)


def test_learning_rates():
    _, state, _, _ = setup(**RATES, weight_decay=0.0)
    nets.check_rate(state.value_net, lambda step: 0.05)
    nets.check_rate(state.actor, lambda step: 0.02)


# --- Data ---------------------------------------------------------------------------------------
def test_training_sees_scaled_and_shifted_rewards(monkeypatch, tmp_path):
    raw = probes.random_transitions(20, reward=np.arange(20) % 4 == 0)
    overrides = {"reward_scale": 3.0, "reward_shift": -3.0, "return_scale": 1000.0}
    overrides |= {"value_hidden": (4,)}
    _, data = nets.handed_over(odice, monkeypatch, tmp_path, raw, (-3, 5), **overrides)
    expected = np.where(raw.reward == 0, -3, 0) * 1000 / 8  # returns as recorded span 8
    np.testing.assert_allclose(data.reward, expected, rtol=1e-5)
    for name in ("observation", "action", "next_observation", "termination"):
        assert np.array_equal(getattr(data, name), getattr(raw, name)), name

# SPDX-License-Identifier: Apache-2.0
"""SQL's and EQL's losses, networks and update against NumPy in float64 and hand-worked numbers."""

import functools
import math

import jax
import numpy as np
import numpy_nets as nets
import probes
import pytest
from flax.training import train_state
from numpy_nets import directions, dot, double, slope

from algorithms import ivr

critic_loss = nets.compiled(ivr.critic_loss)
value_loss = nets.compiled(ivr.value_loss)
actor_loss = nets.compiled(ivr.actor_loss)
setup = functools.partial(nets.setup, ivr)
SQL, EQL = {"variant": "sql"}, {"variant": "eql"}
MILD = {"inverse_temperature": 0.2}  # the random advantages are large: no weight at its cap


# --- The method in NumPy ------------------------------------------------------------------------
def numpy_v(params, observation):
    """V, whose LayerNorm is in front of relu."""
    x, layers = observation, params["params"]
    for i in range(2):
        x = nets.layer_norm(layers[f"LayerNorm_{i}"], nets.dense(layers[f"Dense_{i}"], x))
        x = np.maximum(x, 0)
    return nets.dense(layers["Dense_2"], x)[..., 0]


def target_q(state, batch):
    critic = double(state.critic.target_params)
    return nets.critics(critic, batch.observation, batch.action).min(axis=0)


def numpy_critic_loss(params, state, batch, cfg):
    next_value = numpy_v(double(state.value_net.params), batch.next_observation)
    predicted, loss = nets.critics(params, batch.observation, batch.action), 0.0
    for i in range(len(batch.reward)):
        target = batch.reward[i]
        if not batch.termination[i]:
            target += cfg.discount * next_value[i]
        loss += sum((q[i] - target) ** 2 for q in predicted) / len(batch.reward)
    return loss, predicted.mean()


def numpy_value_loss(params, state, batch, cfg, largest=None):
    """`largest`: EQL's maximum, a constant for the gradient; None computes it here."""
    q, value = target_q(state, batch), numpy_v(params, batch.observation)
    if cfg.variant == "sql":
        y = 1 + (q - value) / (2 * cfg.sql_alpha)
        terms = [v / cfg.sql_alpha + (x**2 if x > 0 else 0) for x, v in zip(y, value, strict=True)]
        return np.mean(terms), value, None
    z = [min(x, 5.0) for x in (q - value) / cfg.eql_alpha]
    largest = max(*z, -1.0) if largest is None else largest
    terms = np.exp(z) + value / cfg.eql_alpha
    return np.mean(terms) / np.exp(largest), value, largest


def numpy_policy(params, observation, drop=lambda i, x: x):
    mean = np.tanh(nets.mlp(params, observation, drop))
    return mean, np.clip(params["params"]["log_std"], -5, 2)


def masks(key, cfg):
    """What dropout does to the hidden units of each layer."""

    def drop(i, x):
        if cfg.dropout is None:
            return x
        keep = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - cfg.dropout, x.shape)
        return np.asarray(keep) * x / (1 - cfg.dropout)

    return drop


def numpy_actor_loss(params, state, batch, cfg, drop=lambda i, x: x):
    log_prob = nets.log_normal(batch.action, *numpy_policy(params, batch.observation, drop))
    advantage = target_q(state, batch) - numpy_v(double(state.value_net.params), batch.observation)
    if cfg.variant == "sql":
        weight = np.array([min(max(x, 0.0), 100.0) for x in advantage])
    else:
        scale = cfg.inverse_temperature / cfg.eql_alpha
        weight = np.array([min(math.exp(scale * x), 100.0) for x in advantage])
    return -np.mean(weight * log_prob), log_prob, weight


@pytest.mark.parametrize("overrides", [{"discount": 0.7}, {"num_critics": 3}], ids=str)
def test_critic_loss_equals_numpy(overrides):
    cfg, state, _, data = setup(**overrides)
    loss, metrics, grads = critic_loss(state.critic.params, state, data, cfg)
    params, batch = double(state.critic.params), double(data)
    expected, q = numpy_critic_loss(params, state, batch, cfg)
    np.testing.assert_allclose([loss, metrics["critic_loss"]], expected, rtol=2e-5)
    np.testing.assert_allclose(metrics["q"], q, rtol=1e-4)
    for direction in directions(params):
        moved = slope(lambda p: numpy_critic_loss(p, state, batch, cfg)[0], params, direction)
        np.testing.assert_allclose(dot(grads, direction), moved, rtol=1e-3)


@pytest.mark.parametrize(
    "overrides",
    [
        SQL | {"sql_alpha": 1.0},
        SQL | {"sql_alpha": 0.1},
        EQL | {"eql_alpha": 2.0},
        EQL | {"eql_alpha": 0.3},  # some rows are clipped
    ],
    ids=str,
)
def test_value_loss_and_gradient_equal_numpy(overrides):
    """The gradient takes Q and the batch's maximum as numbers; clipped rows still push V down."""
    cfg, state, _, data = setup(**overrides)
    params, batch = double(state.value_net.params), double(data)
    loss, metrics, grads = value_loss(state.value_net.params, state, data, cfg)
    expected, value, largest = numpy_value_loss(params, state, batch, cfg)
    np.testing.assert_allclose([loss, metrics["value_loss"]], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["value"], value.mean(), rtol=1e-4)
    assert largest is None or (largest == 5) == (cfg.eql_alpha == 0.3)

    def loss_at_constant_maximum(p):
        return numpy_value_loss(p, state, batch, cfg, largest)[0]

    def loss_at_moving_maximum(p):
        return numpy_value_loss(p, state, batch, cfg, None)[0]

    distinct = []
    for direction in directions(params):
        constant = slope(loss_at_constant_maximum, params, direction)
        moving = slope(loss_at_moving_maximum, params, direction)
        np.testing.assert_allclose(dot(grads, direction), constant, rtol=2e-3, atol=1e-5)
        distinct.append(abs(moving - constant) > 0.02 * abs(constant))
    if cfg.variant == "eql" and largest < 5:
        assert any(distinct)  # else this test could not tell


@pytest.mark.parametrize(
    "overrides",
    [SQL, SQL | {"dropout": 0.3}, EQL, EQL | MILD, EQL | MILD | {"dropout": 0.6}],
    ids=str,
)
def test_actor_loss_and_gradient_equal_numpy(overrides):
    cfg, state, key, data = setup(**overrides)
    batch, params, drop = double(data), double(state.actor.params), masks(key, cfg)
    loss, metrics, grads = actor_loss(state.actor.params, state, data, key, cfg)
    expected, log_prob, weight = numpy_actor_loss(params, state, batch, cfg, drop)
    np.testing.assert_allclose([loss, metrics["actor_loss"]], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["log_prob"], log_prob.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["weight"], weight.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["cloned"], np.mean(weight > 0), rtol=1e-6)
    if cfg.variant == "sql":
        assert 0.1 < metrics["cloned"] < 0.9
    for direction in directions(params):
        moved = slope(lambda p: numpy_actor_loss(p, state, batch, cfg, drop)[0], params, direction)
        np.testing.assert_allclose(dot(grads, direction), moved, rtol=2e-3, atol=1e-4)


# --- By hand ------------------------------------------------------------------------------------
def linear_state(actor=0.5, critic=(9, 9), critic_target=(9, 9), value=9.0):
    """mu(s) = actor * s, std 1, Q_k(s, a) = critic_k * a, V(s) = value * s; s, a of one number."""
    create = train_state.TrainState.create

    def critics(params, observation, action):
        return params[:, None] * action[:, 0][None]

    return ivr.State(
        nets.linear_net(create, lambda p, s, *_: (p * s, 0 * s), actor),
        nets.linear_net(ivr.TrainState.create, critics, critic, critic_target),
        nets.linear_net(create, lambda p, s: p * s[:, 0], value),
    )


def rows(**columns):
    columns = {name: np.array(x)[:, None] for name, x in columns.items()}
    return probes.random_transitions(len(columns["observation"]), 1, 1, **columns)


S_A = {"observation": [0, -1, 1], "action": [1, -1, -2]}
# with Q_k(s, a) = (1, 2) a and V(s) = s
# min Q                      1       -2       -4
# V                          0       -1        1
# A                          1       -1       -5


def test_sql_value_loss_by_hand():
    state, batch = linear_state(critic_target=(1, 2), value=1.0), rows(**S_A)
    # y = 1 + A              2        0       -4, not counted
    # y^2 + 2 V              4       -2        2
    cfg = ivr.Config(variant="sql", sql_alpha=0.5)
    loss, metrics, grads = value_loss(state.value_net.params, state, batch, cfg)
    np.testing.assert_allclose(loss, 4 / 3, rtol=1e-6)
    # d / d value: V' = s    0      2 (-1)    2
    np.testing.assert_allclose(grads, 0, atol=1e-6)
    assert metrics["value"] == 0


@pytest.mark.parametrize("alpha", [0.5, 0.1])
def test_eql_value_loss_by_hand(alpha):
    state, batch = linear_state(critic_target=(1, 2), value=1.0), rows(**S_A)
    # alpha 0.5: z           2       -2      -10
    # alpha 0.1: z           5 (10)  -10     -50
    z, largest = {0.5: ([2, -2, -10], 2), 0.1: ([5, -10, -50], 5)}[alpha]
    cfg = ivr.Config(variant="eql", eql_alpha=alpha)
    loss, _, grads = value_loss(state.value_net.params, state, batch, cfg)
    # sum of V is 0, so is that of V / alpha
    np.testing.assert_allclose(loss, np.exp(z).sum() / 3 / math.exp(largest), rtol=1e-5)
    # d / d value: s (1 - e^z) / alpha, the first row has s = 0
    expected = (-(1 - math.exp(z[1])) + (1 - math.exp(z[2]))) / alpha / 3 / math.exp(largest)
    np.testing.assert_allclose(grads, expected, rtol=1e-2)  # a small difference


def test_eql_divides_by_no_less_than_exp_of_minus_1():
    state = linear_state(critic_target=(-4, -4), value=0.0)
    batch = rows(observation=[1, 1], action=[1, 0.5])
    # z = A                 -4       -2
    cfg = ivr.Config(variant="eql", eql_alpha=1.0)
    loss, _, _ = value_loss(state.value_net.params, state, batch, cfg)
    np.testing.assert_allclose(loss, (math.exp(-3) + math.exp(-1)) / 2, rtol=1e-5)


def test_clipped_rows_of_eql_still_push_v_down():
    state = linear_state(critic_target=(9, 9), value=0.0)
    batch = rows(observation=[1, 1], action=[1, 2])  # A is 9 and 18
    cfg = ivr.Config(variant="eql", eql_alpha=1.0)
    _, _, grads = value_loss(state.value_net.params, state, batch, cfg)
    np.testing.assert_allclose(grads, math.exp(-5), rtol=1e-5)


def test_weights_by_hand():
    """SQL: A where it is positive. EQL: exp(10 A / alpha). Both at most 100."""
    state = linear_state(0.5, critic_target=(1, 1), value=0.0)
    batch = rows(observation=[0, 0, 0], action=[200, -0.1, 0.5])
    key = jax.random.key(0)
    squares = np.array([200, -0.1, 0.5]) ** 2
    for cfg, weight in (
        (ivr.Config(variant="sql", sql_alpha=7.0), np.array([100, 0, 0.5])),
        (ivr.Config(variant="eql"), np.array([100, math.exp(-0.5), math.exp(2.5)])),
        (ivr.Config(variant="eql", eql_alpha=10.0), np.array([100, math.exp(-0.1), math.exp(0.5)])),
    ):
        loss, metrics, _ = actor_loss(state.actor.params, state, batch, key, cfg)
        np.testing.assert_allclose(metrics["weight"], weight.mean(), rtol=1e-5)
        minus_log_prob = 0.5 * squares + 0.5 * math.log(2 * math.pi)
        np.testing.assert_allclose(loss, (weight * minus_log_prob).mean(), rtol=1e-5)
        assert metrics["cloned"] == pytest.approx(2 / 3 if cfg.variant == "sql" else 1)


# --- What the losses may depend on --------------------------------------------------------------
def test_termination_stops_the_bootstrap_and_truncation_does_not():
    cfg, state, _, data = setup()
    nets.check_bootstrap(lambda b: critic_loss(state.critic.params, state, b, cfg)[0], data)


@pytest.mark.parametrize("variant", [SQL, EQL | MILD], ids=str)
@pytest.mark.parametrize("name", ["value_net", "actor"])
def test_value_and_actor_read_observation_and_action_only(name, variant):
    cfg, state, key, data = setup(**variant)
    loss = {
        "value_net": lambda batch: value_loss(state.value_net.params, state, batch, cfg)[0],
        "actor": lambda batch: actor_loss(state.actor.params, state, batch, key, cfg)[0],
    }[name]
    before = loss(data)
    for column in data._fields:
        rolled = data._replace(**{column: np.roll(getattr(data, column), 1, axis=0)})
        assert (loss(rolled) != before) == (column in ("observation", "action")), column


READS = {  # loss -> what it reads of the state
    "critic": {"value_net.params"},
    "value_net": {"critic.target_params"},
    "actor": {"critic.target_params", "value_net.params"},
}


@pytest.mark.parametrize("variant", [SQL, EQL | MILD], ids=str)
@pytest.mark.parametrize("name", READS)
def test_losses_read_only_the_networks_they_should(name, variant):
    cfg, state, key, data = setup(**variant)
    other = nets.shaken(state, seed=4)

    def loss(state, params=state):
        params = getattr(params, name).params
        if name == "critic":
            return critic_loss(params, state, data, cfg)[0]
        if name == "value_net":
            return value_loss(params, state, data, cfg)[0]
        return actor_loss(params, state, data, key, cfg)[0]

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


def test_each_variant_has_a_coefficient_of_its_own():
    for variant, own in ((SQL, {"sql_alpha"}), (EQL, {"eql_alpha", "inverse_temperature"})):
        cfg, state, key, data = setup(**variant | MILD)

        def losses(cfg, state=state, key=key, data=data):
            of_value, _, _ = value_loss(state.value_net.params, state, data, cfg)
            of_actor, _, _ = actor_loss(state.actor.params, state, data, key, cfg)
            return of_value, of_actor

        before = losses(cfg)
        for name in ("sql_alpha", "eql_alpha", "inverse_temperature"):
            changed, _, _, _ = setup(**variant | MILD | {name: 0.15})
            assert (before != losses(changed)) == (name in own), (variant, name)


# --- Networks -----------------------------------------------------------------------------------
@functools.cache
def fresh():
    return nets.fresh(ivr)


def test_initial_parameters():
    state = fresh()
    nets.check_orthogonal_init(state.critic.params, (16 + 2, 64, 96, 1))
    nets.check_orthogonal_init(state.value_net.params, (16, 64, 96, 1))
    layers = dict(state.actor.params["params"])
    assert layers.pop("log_std").tolist() == [0, 0]
    nets.check_orthogonal_init({"params": layers}, (16, 64, 96, 2))
    nets.check_members_differ(state.critic)
    kernels = [net.params["params"]["Dense_0"]["kernel"] for net in (state.actor, state.value_net)]
    assert not np.isclose(*kernels).any(axis=0).all()


def test_layer_norm_is_in_v_alone():
    norms = {name: "LayerNorm_0" in getattr(fresh(), name).params["params"] for name in READS}
    assert norms == {"critic": False, "value_net": True, "actor": False}


def test_the_critics_alone_have_targets_and_they_start_as_copies():
    nets.check_targets_are_copies(fresh().critic)
    assert not hasattr(fresh().actor, "target_params")
    assert not hasattr(fresh().value_net, "target_params")


def test_policy_is_the_mean_without_dropout():
    _, state, key, data = setup(dropout=0.5)
    params = ivr.policy_params(state)
    assert params is state.actor.params
    action = jax.jit(functools.partial(ivr.policy, state.actor.apply_fn))(
        params, data.observation, key
    )
    expected, _ = numpy_policy(double(params), double(data).observation)
    np.testing.assert_allclose(action, expected, rtol=1e-4, atol=1e-6)


# --- Update -------------------------------------------------------------------------------------
def test_order_of_two_updates():
    """V, the actor with the new V, Q with the new V, targets; the actor's rate falls."""
    rates = {"actor_learning_rate": 0.02, "critic_learning_rate": 0.05, "target_rate": 0.3}
    rest = EQL | MILD | {"dropout": 0.6}
    cfg, state, key, data = setup(log_every=2, **rates, **rest, cosine=True, num_updates=4)
    loss_cfg, expected, _, _ = setup(**rest)  # the same numbers, with the losses compiled already
    adam = {
        "value_net": nets.Adam(0.05),
        "actor": nets.Adam(lambda step: 0.02 * (1 + math.cos(math.pi * step / 4)) / 2),
        "critic": nets.Adam(0.05),
    }
    found = {}

    def gradient_step(name, loss, *arguments):
        nonlocal expected
        net = getattr(expected, name)
        _, metrics, grads = loss(net.params, expected, *arguments, loss_cfg)
        expected = expected._replace(
            **{name: net.replace(params=adam[name].step(net.params, grads))}
        )
        for key, x in metrics.items():
            found.setdefault(key, []).append(x)

    for step in (6, 7):
        batch, key_dropout = nets.sample(key, step, data, cfg, 2)
        gradient_step("value_net", value_loss, batch)
        gradient_step("actor", actor_loss, batch, key_dropout)
        gradient_step("critic", critic_loss, batch)
        target = nets.polyak(expected.critic.params, expected.critic.target_params, 0.3)
        expected = expected._replace(critic=expected.critic.replace(target_params=target))

    after, metrics = nets.train_chunk(ivr, state, key, 6, data, cfg)
    for name in ("value_net", "actor", "critic"):
        nets.check_close(getattr(after, name).params, getattr(expected, name).params)
    nets.check_close(after.critic.target_params, expected.critic.target_params)
    for name, numbers in found.items():
        np.testing.assert_allclose(metrics.pop(name), np.mean(numbers), rtol=1e-3)
    assert not metrics


def test_learning_rates():
    """The actor's falls to 0 along a cosine; those of Q and V stay."""
    rates = {"actor_learning_rate": 0.02, "critic_learning_rate": 0.05, "num_updates": 4}
    _, state, _, _ = setup(**rates, cosine=True)
    nets.check_rate(state.actor, lambda t: 0.01 * (1 + math.cos(math.pi * min(t, 4) / 4)), steps=6)
    nets.check_rate(state.critic, lambda t: 0.05, steps=6)
    nets.check_rate(state.value_net, lambda t: 0.05, steps=6)
    assert ivr.Config().cosine


# --- Data ---------------------------------------------------------------------------------------
def test_training_sees_shifted_scaled_rewards_and_clipped_actions(monkeypatch, tmp_path):
    raw = probes.random_transitions(20)
    raw.action[:3] = [[1, -1], [1 - 1e-6, 0], [0.5, -0.25]]
    overrides = {"reward_shift": -1.0, "return_scale": 1000.0}
    _, data = nets.handed_over(ivr, monkeypatch, tmp_path, raw, (-3, 5), **overrides)
    # Returns of the data as recorded span 8.
    np.testing.assert_allclose(data.reward, (raw.reward - 1) * 1000 / 8, rtol=1e-5)
    np.testing.assert_allclose(data.action, raw.action.clip(-0.99999, 0.99999), rtol=1e-7)
    for name in ("observation", "next_observation", "termination"):
        assert np.array_equal(getattr(data, name), getattr(raw, name)), name

# SPDX-License-Identifier: Apache-2.0
"""IQL's losses, networks and update against NumPy in float64 and hand-worked numbers."""

import functools
import math

import jax
import numpy as np
import numpy_nets as nets
import probes
import pytest
from flax.training import train_state
from numpy_nets import directions, dot, double, slope

from algorithms import iql
from common.experiment import config

critic_loss = nets.compiled(iql.critic_loss)
value_loss = nets.compiled(iql.value_loss)
actor_loss = nets.compiled(iql.actor_loss)
setup = functools.partial(nets.setup, iql)
MILD = {"inverse_temperature": 0.1}  # the random advantages are large: no weight at its cap


# --- The method in NumPy ------------------------------------------------------------------------
def numpy_critic_loss(params, state, batch, cfg):
    next_value = nets.value(double(state.value_net.params), batch.next_observation)
    predicted, loss = nets.critics(params, batch.observation, batch.action), 0.0
    for i in range(len(batch.reward)):
        target = batch.reward[i]
        if not batch.termination[i]:
            target += cfg.discount * next_value[i]
        loss += sum((q[i] - target) ** 2 for q in predicted) / len(batch.reward)
    return loss, predicted.mean()


def numpy_value_loss(params, state, batch, cfg):
    q = nets.critics(double(state.critic.target_params), batch.observation, batch.action)
    value = nets.value(params, batch.observation)
    u = q.min(axis=0) - value
    return np.mean(np.abs(cfg.expectile - (u < 0)) * u**2), value.mean()


def numpy_policy(params, observation, drop=lambda i, x: x):
    mean = np.tanh(nets.mlp(params, observation, drop))
    return mean, np.clip(params["params"]["log_std"], -5, 2)


def masks(key, cfg, count):
    """What dropout does to the hidden units of each layer."""

    def drop(i, x):
        if cfg.dropout is None:
            return x
        keep = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - cfg.dropout, x.shape)
        return np.asarray(keep) * x / (1 - cfg.dropout)

    return drop


def numpy_actor_loss(params, state, batch, cfg, drop=lambda i, x: x, scale=None):
    """`scale`: mean |Q|, a constant for the gradient; None computes it here."""
    mean, log_std = numpy_policy(params, batch.observation, drop)
    if cfg.fixed_std is not None:
        log_std = np.log(cfg.fixed_std) * np.ones_like(log_std)
    log_prob = nets.log_normal(batch.action, mean, log_std)
    if cfg.deterministic:
        log_prob = -((mean - batch.action) ** 2).sum(axis=-1)
    if cfg.extraction == "ddpg_bc":
        q = nets.critics(double(state.critic.params), batch.observation, mean).min(axis=0)
        scale = np.abs(q).mean() if scale is None else scale
        weight = np.full(len(q), cfg.alpha)
        return -q.mean() / scale - cfg.alpha * log_prob.mean(), log_prob, weight, scale
    q = nets.critics(double(state.critic.target_params), batch.observation, batch.action)
    advantage = q.min(axis=0) - nets.value(double(state.value_net.params), batch.observation)
    weight = np.array([min(math.exp(cfg.inverse_temperature * x), 100.0) for x in advantage])
    return -np.mean(weight * log_prob), log_prob, weight, None


@pytest.mark.parametrize(
    "overrides",
    [
        {"expectile": 0.9, "discount": 0.7},
        {"expectile": 0.2},
        {"num_critics": 3, "hidden": (8, 12, 16), "layer_norm": True},
    ],
    ids=str,
)
def test_critic_and_value_loss_equal_numpy(overrides):
    cfg, state, _, data = setup(**overrides)
    batch = double(data)
    loss, metrics, _ = critic_loss(state.critic.params, state, data, cfg)
    expected, q = numpy_critic_loss(double(state.critic.params), state, batch, cfg)
    np.testing.assert_allclose([loss, metrics["critic_loss"]], expected, rtol=2e-5)
    np.testing.assert_allclose(metrics["q"], q, rtol=1e-4)
    loss, metrics, _ = value_loss(state.value_net.params, state, data, cfg)
    expected, value = numpy_value_loss(double(state.value_net.params), state, batch, cfg)
    np.testing.assert_allclose([loss, metrics["value_loss"]], expected, rtol=2e-5)
    np.testing.assert_allclose(metrics["value"], value, rtol=1e-4)


VARIANTS = [
    {},  # weights from 0 to the cap
    MILD,
    MILD | {"deterministic": True},
    MILD | {"fixed_std": 0.3},
    MILD | {"dropout": 0.3},
    {"extraction": "ddpg_bc"},
    {"extraction": "ddpg_bc", "alpha": 0.1, "fixed_std": 1.0},
    {"extraction": "ddpg_bc", "deterministic": True, "dropout": 0.6, "num_critics": 3},
]


@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_actor_loss_and_gradient_equal_numpy(overrides):
    """The gradient takes weights and the scale of Q as numbers, but ddpg_bc goes through Q."""
    cfg, state, key, data = setup(**overrides)
    batch, params, drop = double(data), double(state.actor.params), masks(key, cfg, 32)
    loss, metrics, grads = actor_loss(state.actor.params, state, data, key, cfg)
    expected, log_prob, weight, scale = numpy_actor_loss(params, state, batch, cfg, drop)
    np.testing.assert_allclose([loss, metrics["actor_loss"]], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["log_prob"], log_prob.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["weight"], weight.mean(), rtol=1e-4)
    if not overrides:
        assert weight.min() < 1 and weight.max() == 100

    def loss_at_constant_scale(p):
        return numpy_actor_loss(p, state, batch, cfg, drop, scale)[0]

    def loss_at_moving_scale(p):
        return numpy_actor_loss(p, state, batch, cfg, drop, None)[0]

    distinct = []
    for direction in directions(params):
        constant = slope(loss_at_constant_scale, params, direction)
        moving = slope(loss_at_moving_scale, params, direction)
        np.testing.assert_allclose(dot(grads, direction), constant, rtol=2e-3, atol=1e-4)
        distinct.append(abs(moving - constant) > 0.02 * abs(constant))
    assert any(distinct) == (scale is not None)  # else this test could not tell


@pytest.mark.parametrize("net", ["critic", "value_net"])
def test_gradients_take_the_targets_as_numbers(net):
    cfg, state, _, data = setup(expectile=0.9)
    loss = {"critic": critic_loss, "value_net": value_loss}[net]
    numpy_loss = {"critic": numpy_critic_loss, "value_net": numpy_value_loss}[net]
    batch, params = double(data), double(getattr(state, net).params)
    _, _, grads = loss(getattr(state, net).params, state, data, cfg)
    for direction in directions(params):
        expected = slope(lambda p: numpy_loss(p, state, batch, cfg)[0], params, direction)
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=1e-3)


# --- By hand ------------------------------------------------------------------------------------
def linear_state(actor=0.5, critic=(9, 9), critic_target=(9, 9), value=9.0):
    """mu(s) = actor * s, std 1, Q_k(s, a) = critic_k * a, V(s) = value * s; s, a of one number."""
    create = train_state.TrainState.create

    def critics(params, observation, action):
        return params[:, None] * action[:, 0][None]

    return iql.State(
        nets.linear_net(create, lambda p, s, *_: (p * s, 0 * s), actor),
        nets.linear_net(iql.TrainState.create, critics, critic, critic_target),
        nets.linear_net(create, lambda p, s: p * s[:, 0], value),
        statistics=(),
    )


def rows(**columns):
    columns = {name: np.array(x)[:, None] for name, x in columns.items()}
    rest = {name: columns.pop(name)[:, 0] for name in ("reward", "termination") if name in columns}
    return probes.random_transitions(3, 1, 1, **columns, **rest)


def test_critic_loss_by_hand():
    state = linear_state(critic=(1, -1), value=1.0)
    batch = rows(
        action=[1, -1, 0.5], reward=[1, 0, 2], next_observation=[2, -1, 5], termination=[0, 0, 1]
    )
    # row                    1        2        3
    # V(s')                  2       -1       not used: the end
    # target (discount 0.5)  2       -0.5      2
    # Q_1                    1       -1        0.5
    # Q_2                   -1        1       -0.5
    # (Q_1 - target)^2       1        0.25     2.25      sum 3.5
    # (Q_2 - target)^2       9        2.25     6.25      sum 17.5
    cfg = iql.Config(discount=0.5)
    loss, metrics, _ = critic_loss(state.critic.params, state, batch, cfg)
    np.testing.assert_allclose(loss, (3.5 + 17.5) / 3, rtol=1e-6)
    assert metrics["q"] == 0


S_A = {"observation": [0, -1, 1], "action": [1, -1, 0.5]}
# with Q_k(s, a) = (1, 2) a and V(s) = s
# min Q                      1       -2        0.5
# V                          0       -1        1
# A                          1       -1       -0.5


def test_value_loss_by_hand():
    state, batch = linear_state(critic_target=(1, 2), value=1.0), rows(**S_A)
    # weight                 0.9      0.1      0.1
    # times A^2              0.9      0.1      0.025     sum 1.025
    loss, metrics, _ = value_loss(state.value_net.params, state, batch, iql.Config(expectile=0.9))
    np.testing.assert_allclose(loss, 1.025 / 3, rtol=1e-6)
    assert metrics["value"] == 0


LOG_2PI = math.log(2 * math.pi)


@pytest.mark.parametrize("deterministic", [False, True])
def test_awr_by_hand(deterministic):
    state, batch = linear_state(0.5, critic_target=(1, 2), value=1.0), rows(**S_A)
    cfg = iql.Config(inverse_temperature=math.log(2), deterministic=deterministic)
    # weight 2^A             2        0.5      0.5^0.5
    # mu(s) = s / 2          0       -0.5      0.5
    # (a - mu)^2             1        0.25     0
    # -log pi               0.5 + c   0.125 + c   c
    loss, metrics, _ = actor_loss(state.actor.params, state, batch, jax.random.key(0), cfg)
    sum_of_weights, squares = 2.5 + 0.5**0.5, 2 * 1 + 0.5 * 0.25
    c = 0.5 * LOG_2PI
    expected = squares if deterministic else squares / 2 + sum_of_weights * c
    np.testing.assert_allclose(loss, expected / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["weight"], sum_of_weights / 3, rtol=1e-6)


def test_ddpg_bc_by_hand():
    state, batch = linear_state(0.5, critic=(1, -2)), rows(**S_A)
    # Q_1(s, mu(s))          0       -0.5      0.5
    # Q_2(s, mu(s))          0        1       -1
    # minimum                0       -0.5     -1        mean -0.5, mean |Q| 0.5
    cfg, key = iql.Config(extraction="ddpg_bc", alpha=2.0), jax.random.key(0)
    loss, _, _ = actor_loss(state.actor.params, state, batch, key, cfg)
    np.testing.assert_allclose(loss, 1 + 2 * (0.625 / 3 + 0.5 * LOG_2PI), rtol=1e-6)


def test_weights_are_100_at_most():
    state = linear_state(0.5, critic_target=(1, 1), value=0.0)
    batch = rows(observation=[0, 0, 0], action=[1, 0.4, -1])
    cfg, key = iql.Config(inverse_temperature=10.0, deterministic=True), jax.random.key(0)
    loss, metrics, _ = actor_loss(state.actor.params, state, batch, key, cfg)
    weights = np.array([100, math.exp(4), math.exp(-10)])  # e^10 is 22 026
    np.testing.assert_allclose(metrics["weight"], weights.mean(), rtol=1e-5)
    np.testing.assert_allclose(loss, (weights * [1, 0.16, 1]).mean(), rtol=1e-5)


# --- What the losses may depend on --------------------------------------------------------------
def test_termination_stops_the_bootstrap_and_truncation_does_not():
    cfg, state, _, data = setup()
    nets.check_bootstrap(lambda b: critic_loss(state.critic.params, state, b, cfg)[0], data)


@pytest.mark.parametrize("name", ["value_net", "actor"])
def test_value_and_actor_read_observation_and_action_only(name):
    cfg, state, key, data = setup(**MILD)
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
    "awr": {"critic.target_params", "value_net.params"},
    "ddpg_bc": {"critic.params"},
}


@pytest.mark.parametrize("name", READS)
def test_losses_read_only_the_networks_they_should(name):
    extraction = {"extraction": "ddpg_bc"} if name == "ddpg_bc" else {}
    cfg, state, key, data = setup(**MILD, **extraction)
    other = nets.shaken(state, seed=4)

    def loss(state, params=state):
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


def test_every_critic_counts_where_it_is_the_minimum():
    _, state, key, data = setup(**MILD)
    for k in range(2):
        for cfg in (setup(**MILD)[0], setup(extraction="ddpg_bc")[0]):
            lower = jax.tree.map(np.array, state.critic.params)
            lower["params"]["Dense_2"]["bias"][k] -= 100
            critic = state.critic.replace(params=lower, target_params=lower)
            changed = state._replace(critic=critic)
            _, before, _ = actor_loss(state.actor.params, state, data, key, cfg)
            _, after, _ = actor_loss(state.actor.params, changed, data, key, cfg)
            if cfg.extraction == "awr":
                assert after["weight"] < before["weight"] / 10
            else:
                assert after["actor_loss"] != before["actor_loss"]


def as_they_are():
    """Statistics that leave observations as they are."""
    return np.zeros(3, np.float32), np.ones(3, np.float32)


# --- Dropout ------------------------------------------------------------------------------------
def test_dropout_is_in_the_actors_loss_only():
    """The key of a loss matters just where there is dropout, and the policy drops nothing."""
    _, state, key, data = setup()
    for overrides, random in ((MILD, False), (MILD | {"dropout": 0.3}, True)):
        cfg, _, _, _ = setup(**overrides)
        one, _, _ = actor_loss(state.actor.params, state, data, jax.random.key(0), cfg)
        other, _, _ = actor_loss(state.actor.params, state, data, jax.random.key(1), cfg)
        assert (one != other) == random
    params = state.actor.params, as_they_are()
    act = jax.jit(functools.partial(iql.policy, state.actor.apply_fn))
    action = act(params, data.observation, key)
    expected, _ = numpy_policy(double(state.actor.params), double(data).observation)
    np.testing.assert_allclose(action, expected, rtol=1e-4, atol=1e-6)
    assert np.array_equal(action, act(params, data.observation, jax.random.key(2)))


# --- Normalised observations --------------------------------------------------------------------
def test_normalise():
    nets.check_normalise(iql)


def test_the_policy_is_the_mean_at_the_normalised_observation():
    mean, std = nets.fresh(iql, statistics=(np.arange(16.0), np.arange(1.0, 17.0))).statistics
    assert mean.tolist() == [*range(16)] and std.tolist() == [*range(1, 17)]
    nets.check_policy_normalises(iql, lambda params, x: numpy_policy(params, x)[0])


def test_without_normalisation_the_network_acts_on_the_observation_to_the_bit():
    _, state, key, data = setup()
    act = jax.jit(functools.partial(iql.policy, state.actor.apply_fn))
    network = jax.jit(lambda params, observation: state.actor.apply_fn(params, observation)[0])
    expected = network(state.actor.params, data.observation)
    params = state.actor.params, as_they_are()
    assert np.array_equal(act(params, data.observation, key), expected)


@pytest.mark.parametrize("normalised", [True, False])
def test_training_sees_normalised_observations_if_asked(monkeypatch, tmp_path, normalised):
    raw = probes.random_transitions(20, observation=5 + np.arange(60).reshape(20, 3))
    overrides = {"normalise_observations": normalised, "num_critics": 1, "seeds": (0, 1)}
    state, data = nets.handed_over(iql, monkeypatch, tmp_path, raw, (1, 2), **overrides)
    expected, (mean, std) = iql.normalise(raw) if normalised else (raw, ([0] * 3, [1] * 3))
    for name in ("observation", "next_observation"):
        assert np.array_equal(getattr(data, name), getattr(expected, name)), name
    statistics = np.stack([mean, mean]), np.stack([std, std])  # one per seed
    nets.check_close(state.statistics, statistics, atol=1e-6)


# --- Networks -----------------------------------------------------------------------------------
def test_the_mean_is_squashed_and_log_std_clipped():
    _, state, _, data = setup()
    params = jax.tree.map(lambda x: 20 * x, state.actor.params)
    params["params"]["log_std"] = np.float32([-7, 3])
    mean, log_std = state.actor.apply_fn(params, data.observation)
    assert np.abs(mean).max() <= 1 and np.abs(mean).max() > 0.999
    assert (log_std == np.array([[-5, 2]])).all()
    params["params"]["log_std"] = np.float32([-4.5, 1.5])
    assert (
        state.actor.apply_fn(params, data.observation)[1] == params["params"]["log_std"][None]
    ).all()


@functools.cache
def fresh():
    return nets.fresh(iql)


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


def test_the_critics_alone_have_targets_and_they_start_as_copies():
    nets.check_targets_are_copies(fresh().critic)
    assert not hasattr(fresh().actor, "target_params")
    assert not hasattr(fresh().value_net, "target_params")


@pytest.mark.parametrize("layer_norm", [False, True])
def test_layer_norm_is_in_q_and_v_only(layer_norm):
    _, state, _, _ = setup(layer_norm=layer_norm)
    norms = ["LayerNorm_0", "LayerNorm_1"] if layer_norm else []
    layers = ["Dense_0", "Dense_1", "Dense_2"]
    assert sorted(state.actor.params["params"]) == [*layers, "log_std"]
    assert sorted(state.critic.params["params"]) == layers + norms
    assert sorted(state.value_net.params["params"]) == layers + norms


# --- Update -------------------------------------------------------------------------------------
def test_order_of_two_updates():
    """V, the actor with the new V, Q with the new V, targets; the actor's rate falls."""
    rates = {"actor_learning_rate": 0.02, "critic_learning_rate": 0.05, "target_rate": 0.3}
    rest = MILD | {"dropout": 0.3}
    cosine = {"cosine": True, "num_updates": 4}
    cfg, state, key, data = setup(log_every=2, **rates, **rest, **cosine)
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

    after, metrics = nets.train_chunk(iql, state, key, 6, data, cfg)
    for name in ("value_net", "actor", "critic"):
        nets.check_close(getattr(after, name).params, getattr(expected, name).params)
    nets.check_close(after.critic.target_params, expected.critic.target_params)
    nets.check_close(after.statistics, state.statistics, 0, 0)
    for name, numbers in found.items():
        np.testing.assert_allclose(metrics.pop(name), np.mean(numbers), rtol=1e-3)
    assert not metrics


def test_learning_rates():
    """The actor's falls to 0 along a cosine and is whole again online; those of Q and V stay."""
    rates = {"actor_learning_rate": 0.02, "critic_learning_rate": 0.05, "num_updates": 4}
    _, state, _, _ = setup(**rates, cosine=True)

    def rate(t):
        return 0.01 * (1 + math.cos(math.pi * t / 4)) if t < 4 else 0.02

    nets.check_rate(state.actor, rate, steps=6)
    nets.check_rate(state.critic, lambda t: 0.05, steps=6)
    nets.check_rate(state.value_net, lambda t: 0.05, steps=6)
    _, state, _, _ = setup(**rates, cosine=False)
    nets.check_rate(state.actor, lambda t: 0.02, steps=6)
    # Without an offline phase nothing decays.
    _, state, _, _ = setup(**rates | {"num_updates": 0}, cosine=True)
    nets.check_rate(state.actor, lambda t: 0.02, steps=6)
    assert iql.Config().cosine


# --- Data ---------------------------------------------------------------------------------------
def test_training_sees_shifted_scaled_rewards_and_clipped_actions(monkeypatch, tmp_path):
    raw = probes.random_transitions(20)
    raw.action[:3] = [[1, -1], [1 - 1e-6, 0], [0.5, -0.25]]
    overrides = {"reward_shift": -1.0, "return_scale": 1000.0}
    _, data = nets.handed_over(iql, monkeypatch, tmp_path, raw, (-3, 5), **overrides)
    # Returns of the data as recorded span 8.
    np.testing.assert_allclose(data.reward, (raw.reward - 1) * 1000 / 8, rtol=1e-5)
    np.testing.assert_allclose(data.action, raw.action.clip(-0.99999, 0.99999), rtol=1e-7)
    assert np.abs(data.action).max() < 1
    for name in ("observation", "next_observation", "termination"):
        assert np.array_equal(getattr(data, name), getattr(raw, name)), name


def test_rewards_are_as_recorded_unless_said(monkeypatch, tmp_path):
    raw = probes.random_transitions(20)
    # Equal returns do not matter without return_scale.
    _, data = nets.handed_over(iql, monkeypatch, tmp_path, raw, (2, 2))
    assert np.array_equal(data.reward, raw.reward)


@pytest.mark.parametrize(
    ("flag", "bad", "good"),
    [
        ("--expectile", "0 1 -0.1 1.5", "0.001 0.5 0.999"),
        ("--dropout", "0 1 -0.1 1.5", "0.1 0.9 None"),
        ("--fixed-std", "0 -1", "0.01 1 None"),
        ("--return-scale", "0 -1000 inf", "1000 None"),
    ],
)
def test_ranges(flag, bad, good, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for value in bad.split():
        line = nets.refused(capsys, iql.Config, f"{flag} {value}")
        assert f"{flag} {float(value)}: " in line and "must be" in line
    for value in good.split():
        cfg, _ = config.parse(iql.Config, [flag, value])
        assert str(getattr(cfg, flag[2:].replace("-", "_"))) in (value, f"{value}.0")

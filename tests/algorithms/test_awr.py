# SPDX-License-Identifier: Apache-2.0
"""AWR's returns, losses and iteration against NumPy in float64 and hand-worked numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_nets as nets
import probes
import pytest
from numpy_nets import directions, dot, double, slope

from algorithms import awr
from common import datasets
from common.experiment import config

value_loss = nets.compiled(awr.value_loss)
actor_loss = nets.compiled(awr.actor_loss)
setup = functools.partial(nets.setup, awr)


# --- The method in NumPy ------------------------------------------------------------------------
def numpy_value(state, observation, cfg):
    return nets.value(double(state.value_net.params), observation) / (1 - cfg.discount)


def numpy_value_loss(params, batch, returns, cfg):
    error = nets.value(params, batch.observation) / (1 - cfg.discount) - returns
    return np.mean((error * (1 - cfg.discount)) ** 2) / 2


def numpy_actor_loss(params, batch, weight, cfg):
    """-> loss, log pi(a|s)"""
    mean = nets.mlp(params, batch.observation)
    log_std = np.clip(params["params"]["log_std"], -5, 2)
    if cfg.fixed_std is not None:
        log_std = np.full_like(log_std, np.log(cfg.fixed_std))
    log_prob = nets.log_normal(batch.action, mean, log_std)
    loss = 0.0
    for i in range(len(weight)):
        too_far = sum(max(0, abs(x) - 1) ** 2 for x in mean[i])
        loss += (cfg.bound_penalty * too_far / 2 - weight[i] * log_prob[i]) / len(weight)
    return loss, log_prob.mean()


def numpy_returns(state, data, cfg):
    """The mixture of n-step returns that defines TD(lambda), row by row; [N]."""
    next_value = numpy_value(state, data.next_observation, cfg) * (1 - data.termination)
    returns, over = np.zeros(len(data.reward)), (data.termination + data.truncation) > 0
    for t in range(len(returns)):
        rewards, weight, row = 0.0, 1.0, t
        while True:
            n = row - t + 1
            rewards += cfg.discount ** (n - 1) * data.reward[row]
            n_step = rewards + cfg.discount**n * next_value[row]
            if over[row]:
                returns[t] += weight * n_step
                break
            returns[t] += (1 - cfg.td_lambda) * weight * n_step
            weight *= cfg.td_lambda
            row += 1
    return returns


def numpy_weights(state, data, cfg):
    advantage = numpy_returns(state, data, cfg) - numpy_value(state, data.observation, cfg)
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-5)
    return np.minimum(np.exp(cfg.inverse_temperature * advantage), cfg.max_weight)


# --- Returns ------------------------------------------------------------------------------------
compiled_returns = jax.jit(awr.lambda_returns, static_argnums=2)
END, CUT = "termination", "truncation"
LENGTHS = [(1, END), (7, CUT), (1, CUT), (30, END), (2, END), (12, CUT), (9, END), (3, CUT)]


def recording(ends=LENGTHS):
    """Rows of episodes with these lengths and ends.

    A row's next observation is not the observation of the row after it, as where a recording goes
    on after a termination.
    """
    flags = {END: [], CUT: []}
    for length, end in ends:
        for name, column in flags.items():
            column += [0] * (length - 1) + [int(name == end)]
    return probes.random_transitions(len(flags[END]), **flags)


@pytest.mark.parametrize("td_lambda", [0.0, 0.95, 1.0])
def test_lambda_returns_equal_a_loop(td_lambda):
    cfg, state, _, _ = setup(td_lambda=td_lambda, discount=0.9)
    data = recording()
    expected = numpy_returns(state, double(data), cfg)
    np.testing.assert_allclose(compiled_returns(state, data, cfg), expected, rtol=1e-4, atol=1e-4)


def test_lambda_returns_by_hand():
    # (1 - discount) V(s) = s, so V(s) = 2 s; lambda 0.5, discount 0.5
    state = awr.State(None, linear_net(lambda p, s: p * s[..., 0], 1.0), ())
    data = probes.random_transitions(
        6,
        1,
        1,
        reward=[1, 2, 3, 4, 5, 6],
        next_observation=[[1], [2], [3], [-1], [4], [5]],
        termination=[0, 0, 1, 0, 0, 0],
        truncation=[0, 0, 0, 1, 0, 1],
    )
    # row 3 ends there: 3; row 4 is cut: 4 + 0.5 * -2 = 3; row 6 is cut: 6 + 0.5 * 10 = 11
    # row 5: 5 + 0.5 * (0.5 * 8 + 0.5 * 11) = 9.75
    # row 2: 2 + 0.5 * (0.5 * 4 + 0.5 * 3) = 3.75
    # row 1: 1 + 0.5 * (0.5 * 2 + 0.5 * 3.75) = 2.4375
    cfg = awr.Config(td_lambda=0.5, discount=0.5)
    returns = compiled_returns(state, data, cfg)
    np.testing.assert_allclose(returns, [2.4375, 3.75, 3, 3, 9.75, 11], rtol=1e-6)


def test_lambda_1_without_bootstrap_is_the_return_to_go():
    """It does so even if a recording goes on after a termination."""
    lengths = [length for length, _ in LENGTHS]
    data = recording([(length, END) for length in lengths])
    cfg, state, _, _ = setup(td_lambda=1.0, discount=0.9)
    returns = np.asarray(compiled_returns(state, data, cfg))
    every = np.cumsum(lengths)
    for ends in (every, every[[3, 7]]):  # eight recordings, or two
        dataset = datasets.Dataset("toy", data, ends, np.zeros(len(ends)))
        expected = datasets.returns_to_go(dataset, 0.9)
        np.testing.assert_allclose(returns, expected, rtol=1e-4, atol=1e-5)


def test_termination_stops_the_bootstrap_and_truncation_does_not():
    """A truncation bootstraps even with lambda 1. After either end, later rows have no effect."""
    cfg, state, _, _ = setup(discount=0.9)
    for td_lambda in (0.0, 0.95, 1.0):
        cfg = probes.config(awr, td_lambda=td_lambda, discount=0.9)
        for end in (END, CUT):
            data = recording([(4, end), (4, CUT)])
            returns = compiled_returns(state, data, cfg)
            later = data._replace(reward=data.reward + np.float32([0] * 4 + [1] * 4))
            moved = compiled_returns(state, later, cfg) != returns
            assert moved.tolist() == [False] * 4 + [True] * 4
            elsewhere = data.next_observation.copy()
            elsewhere[3] += 1
            moved = compiled_returns(state, data._replace(next_observation=elsewhere), cfg)
            assert (moved[3] != returns[3]) == (end == CUT)


def test_values_of_more_rows_than_are_taken_at_once():
    cfg, state, _, _ = setup()
    data = probes.random_transitions(4096 + 7)
    found = jax.jit(awr.values, static_argnums=2)(state, data.observation, cfg)
    expected = numpy_value(state, double(data.observation), cfg)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


# --- Losses -------------------------------------------------------------------------------------
VARIANTS = [
    {},
    {"fixed_std": None, "discount": 0.7},
    {"fixed_std": 0.2, "bound_penalty": 0.5},
    {"hidden": (8, 12, 16)},
]


@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_losses_equal_numpy(overrides):
    cfg, state, _, data = setup(**overrides)
    rng, batch = np.random.default_rng(0), double(data)
    returns, weight = np.float32(rng.normal(5, 20, 32)), np.float32(rng.uniform(0, 20, 32))
    loss, metrics, _ = value_loss(state.value_net.params, state, data, returns, cfg)
    expected = numpy_value_loss(double(state.value_net.params), batch, returns, cfg)
    np.testing.assert_allclose([loss, metrics["value_loss"]], expected, rtol=1e-4)
    value = numpy_value(state, batch.observation, cfg).mean()
    np.testing.assert_allclose(metrics["value"], value, rtol=1e-4)

    loss, metrics, _ = actor_loss(state.actor.params, state, data, weight, cfg)
    expected, log_prob = numpy_actor_loss(double(state.actor.params), batch, weight, cfg)
    np.testing.assert_allclose([loss, metrics["actor_loss"]], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["log_prob"], log_prob, rtol=1e-4)
    np.testing.assert_allclose(metrics["weight"], weight.mean(), rtol=1e-5)


linear_net = functools.partial(nets.linear_net, awr.train_state.TrainState.create)


def test_value_loss_by_hand():
    state = awr.State(None, linear_net(lambda p, s: p * s[:, 0], 0.5), ())
    batch = probes.random_transitions(3, 1, 1, observation=[[1], [2], [-2]])
    # net output 0.5, 1, -1; returns / 10: 0.5, -1, 0; errors 0, 2, -1
    returns = np.float32([5, -10, 0])
    loss, metrics, _ = value_loss(0.5, state, batch, returns, awr.Config(discount=0.9))
    np.testing.assert_allclose(loss, (0 + 4 + 1) / 6, rtol=1e-5)
    np.testing.assert_allclose(metrics["value"], 0.5 / 3 * 10, rtol=1e-5)


def gaussian(log_std):
    """pi(s) = N(actor * s, exp(log_std)) for s of one number."""

    def act(p, s):
        return p[None] * s, jnp.full((len(s), len(p)), log_std)

    return awr.State(linear_net(act, [1.0, -2.0]), None, ())


def test_actor_loss_by_hand():
    state = gaussian(log_std=np.log(2.0))
    batch = probes.random_transitions(
        2, 1, 2, observation=[[0.5], [-2]], action=[[0.5, 0], [0, 1]], reward=0
    )
    weight = np.float32([2, 1])
    # row                             1             2
    # mean                        (0.5, -1)       (-2, 4)
    # squared error / 2 variance    1 / 8        4 / 8 + 9 / 8
    # outside                         0           1 + 9
    # log pi = -that - 2 log(2 sqrt(2 pi)); weights 2 and 1; half of 3 * 10 outside
    loss, metrics, _ = actor_loss(
        state.actor.params, state, batch, weight, awr.Config(fixed_std=None, bound_penalty=3.0)
    )
    log_norm = 2 * np.log(2 * np.sqrt(2 * np.pi))
    expected = (2 * (1 / 8 + log_norm) + 13 / 8 + log_norm + 15) / 2
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["log_prob"], -(1 / 8 + 13 / 8) / 2 - log_norm, rtol=1e-6)
    # With a fixed std of 1 the learned one does not count.
    loss, _, _ = actor_loss(
        state.actor.params, state, batch, weight, awr.Config(fixed_std=1.0, bound_penalty=0.0)
    )
    log_norm = np.log(2 * np.pi)
    np.testing.assert_allclose(loss, (2 * (0.5 + log_norm) + 6.5 + log_norm) / 2, rtol=1e-6)


def test_the_bound_penalty_counts_outside_the_box_only():
    state, weight = gaussian(log_std=0.0), np.ones(2, np.float32)

    def loss(observation, bound_penalty):
        batch = probes.random_transitions(2, 1, 2, observation=observation)
        cfg = awr.Config(bound_penalty=bound_penalty)
        loss, _, grads = actor_loss(state.actor.params, state, batch, weight, cfg)
        return loss, *np.asarray(grads)

    assert loss(0.5, 0.0) == loss(0.5, 10.0)  # means (0.5, -1)
    far, free = loss(0.6, 10.0), loss(0.6, 0.0)  # means (0.6, -1.2)
    np.testing.assert_allclose(far[0] - free[0], 10 * 0.2**2 / 2, rtol=1e-4)
    assert far[1] == free[1]  # the first component is inside
    np.testing.assert_allclose(far[2] - free[2], 10 * -0.2 * 0.6, rtol=1e-4)


def test_losses_read_only_the_networks_they_should():
    cfg, state, _, data = setup()
    other, target = nets.shaken(state, seed=4), np.arange(32, dtype=np.float32)
    here = value_loss(state.value_net.params, state, data, target, cfg)[0]
    assert here == value_loss(state.value_net.params, other, data, target, cfg)[0]
    assert here != value_loss(other.value_net.params, state, data, target, cfg)[0]
    here = actor_loss(state.actor.params, state, data, target, cfg)[0]
    assert here == actor_loss(state.actor.params, other, data, target, cfg)[0]
    assert here != actor_loss(other.actor.params, state, data, target, cfg)[0]
    # Rewards and what follows enter through returns and weights alone.
    others = probes.random_transitions(seed=1)
    changed = data._replace(
        **{name: getattr(others, name) for name in (*data._fields[2:],)},
    )
    assert here == actor_loss(state.actor.params, state, changed, target, cfg)[0]


@pytest.mark.parametrize("overrides", VARIANTS[:2], ids=str)
def test_gradients(overrides):
    cfg, state, _, data = setup(**overrides)
    batch, weight = double(data), np.linspace(0, 20, 32, dtype=np.float32)
    returns, params = 3 * weight, double(state.value_net.params)
    _, _, grads = value_loss(state.value_net.params, state, data, returns, cfg)
    for direction in directions(params, 3):
        expected = slope(lambda p: numpy_value_loss(p, batch, returns, cfg), params, direction)
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=1e-3)
    params = double(state.actor.params)
    _, _, grads = actor_loss(state.actor.params, state, data, weight, cfg)
    for direction in directions(params, 3):
        expected = slope(lambda p: numpy_actor_loss(p, batch, weight, cfg)[0], params, direction)
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=1e-3)
    assert (grads["params"]["log_std"] == 0).all() == (cfg.fixed_std is not None)


# --- Networks -----------------------------------------------------------------------------------
@functools.cache
def fresh():
    return nets.fresh(awr, statistics=(np.arange(16.0), np.arange(1.0, 17.0)))


@pytest.mark.parametrize("net", ["actor", "value_net"])
def test_initial_parameters(net):
    """Uniform in ±sqrt(6 / (fan in + fan out)); the actor's last layer in ±0.01; biases 0."""
    layers, sizes = dict(getattr(fresh(), net).params["params"]), (16, 64, 96)
    if net == "actor":
        assert layers.pop("log_std").tolist() == [0, 0]
    sizes += (2,) if net == "actor" else (1,)
    assert sorted(layers) == ["Dense_0", "Dense_1", "Dense_2"]
    for i in range(3):
        kernel, bias = (np.asarray(layers[f"Dense_{i}"][name]) for name in ("kernel", "bias"))
        assert kernel.shape == sizes[i : i + 2] and (bias == 0).all()
        bound = 0.01 if net == "actor" and i == 2 else (6 / sum(kernel.shape)) ** 0.5
        assert 0.9 * bound < np.abs(kernel).max() <= bound
        np.testing.assert_allclose(kernel.std(), bound / 3**0.5, rtol=0.1)


def test_learned_std_is_clipped():
    _, state, _, data = setup()
    act = jax.jit(state.actor.apply_fn)
    for log_std, expected in ((-9.0, -5.0), (9.0, 2.0), (0.5, 0.5)):
        params = state.actor.params["params"] | {"log_std": np.full(2, log_std, np.float32)}
        assert (act({"params": params}, data.observation)[1] == expected).all()


@pytest.mark.parametrize("optimiser", ["momentum", "adam"])
def test_optimisers(optimiser):
    rates = {"actor_learning_rate": 0.02, "critic_learning_rate": 0.05}
    _, state, _, _ = setup(optimiser=optimiser, **rates)
    for net, rate in ((state.actor, 0.02), (state.value_net, 0.05)):
        if optimiser == "adam":
            nets.check_rate(net, lambda step, rate=rate: rate)
        else:  # v <- 0.9 v + gradient, in which a constant gradient of 3 becomes 30
            way = iter(3 * rate * np.cumsum(0.9 ** np.arange(4)))
            nets.check_rate(net, lambda step, way=way: next(way))


# --- Observations and rewards -------------------------------------------------------------------
def test_normalise():
    nets.check_normalise(awr)


def test_the_policy_is_the_mean_in_the_box_and_normalises():
    mean, std = fresh().statistics
    assert mean.tolist() == [*range(16)] and std.tolist() == [*range(1, 17)]
    outside = []

    def act(params, observation):
        mean = nets.mlp(params, observation)
        outside.append(np.abs(mean).max() > 1)
        return np.clip(mean, -1, 1)

    nets.check_policy_normalises(awr, act)
    assert any(outside)


def test_training_sees_shifted_rewards_and_normalised_observations(monkeypatch, tmp_path):
    raw = probes.random_transitions(20, observation=5 + np.arange(60).reshape(20, 3))
    state, data = nets.handed_over(
        awr, monkeypatch, tmp_path, raw, (1, 2), reward_shift=-1.0, seeds=(0, 1)
    )
    expected, (mean, std) = awr.normalise(raw._replace(reward=raw.reward - 1))
    nets.check_close(data, expected, atol=1e-6)
    statistics = np.stack([mean, mean]), np.stack([std, std])  # one per seed
    nets.check_close(state.statistics, statistics, atol=1e-6)


# --- Update -------------------------------------------------------------------------------------
class Momentum:
    def __init__(self, rate):
        self.rate, self.memory = rate, 0.0

    def step(self, params, grads):
        if self.memory == 0:
            self.memory = jax.tree.map(np.zeros_like, params)
        self.memory = jax.tree.map(lambda m, g: 0.9 * m + np.asarray(g), self.memory, grads)
        return jax.tree.map(lambda x, m: np.float32(x - self.rate * m), params, self.memory)


def test_order_of_two_iterations():
    """V is fitted to the returns under the old V; the actor uses those of the new."""
    # Large steps and a V far from the returns, so that another order gives other numbers.
    overrides = {"actor_updates": 3, "critic_updates": 4, "discount": 0.9, "max_weight": 5.0}
    rates = {"actor_learning_rate": 0.002, "critic_learning_rate": 0.02, "optimiser": "momentum"}
    cfg, state, key, _ = setup(log_every=6, inverse_temperature=2.0, **overrides, **rates)
    here, data, found = state, recording(), {}
    momentum = {"value_net": Momentum(0.02), "actor": Momentum(0.002)}
    for step in (6, 9):
        keys = jax.random.split(jax.random.fold_in(jax.random.clone(key), step))
        for name, loss, key_net, count, target in (
            ("value_net", value_loss, keys[0], 4, numpy_returns),
            ("actor", actor_loss, keys[1], 3, numpy_weights),
        ):
            target = np.float32(target(here, double(data), cfg))  # once, before the first step
            if name == "actor":
                assert 2 < (target == 5).sum() < 20  # the cap counts, for some
            for key_step in jax.random.split(key_net, count):
                index = np.asarray(jax.random.randint(key_step, (32,), 0, len(data.reward)))
                batch, net = jax.tree.map(lambda x, i=index: x[i], data), getattr(here, name)
                _, metrics, grads = loss(net.params, here, batch, target[index], cfg)
                net = net.replace(params=momentum[name].step(net.params, grads))
                here = here._replace(**{name: net})
                for metric, x in metrics.items():
                    found.setdefault(metric, []).append(x)

    after, metrics = nets.train_chunk(awr, state, key, 6, data, cfg)
    for name, count in (("value_net", 8), ("actor", 6)):
        nets.check_close(getattr(after, name).params, getattr(here, name).params)
        assert getattr(after, name).step == count
    nets.check_close(after.statistics, state.statistics, 0, 0)
    for name, numbers in found.items():
        np.testing.assert_allclose(metrics.pop(name), np.mean(numbers), rtol=1e-3)
    assert not metrics


def test_a_chunk_is_whole_iterations(capsys):
    for words, cause in (
        ("--log-every 500 --eval-every 1000", "--log-every 500 is no multiple of --actor-updates"),
        (
            "--log-every 1000 --actor-updates 300",
            "--log-every 1000 is no multiple of --actor-updates 300",
        ),
    ):
        assert cause in nets.refused(capsys, awr.Config, words)


def test_discount_1_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as leave:
        awr.train(awr.Config(discount=1.0), config.Options())
    assert leave.value.code == 2 and not list(tmp_path.iterdir())
    assert "--discount 1.0: must be below 1" in capsys.readouterr().err


def test_the_range_of_lambda(capsys):
    for word in ("-0.1", "1.1", "nan"):
        line = nets.refused(capsys, awr.Config, f"--td-lambda {word}")
        assert f"--td-lambda {word}: " in line and "must be" in line
    for word in ("0", "1"):
        assert config.parse(awr.Config, ["--td-lambda", word])[0].td_lambda == float(word)

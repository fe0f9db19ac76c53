# SPDX-License-Identifier: Apache-2.0
"""BC's losses, networks and update against NumPy in float64 and hand-worked numbers."""

import functools
import math

import jax
import numpy as np
import numpy_nets as nets
import probes
import pytest
from flax.training import train_state
from numpy_nets import directions, dot, double, slope

from algorithms import bc
from common.experiment import config

actor_loss = nets.compiled(bc.actor_loss)
setup = functools.partial(nets.setup, bc)
KINDS = pytest.mark.parametrize("num_actions", [None, probes.NUMBER], ids=["continuous", "integer"])


# --- The method in NumPy ------------------------------------------------------------------------
def numpy_loss(params, batch):
    if batch.action.ndim == 2:
        return np.mean((nets.tanh_actor(params, batch.observation) - batch.action) ** 2)
    logits = nets.mlp(params, batch.observation)
    share = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    return -np.mean([np.log(share[i, a]) for i, a in enumerate(batch.action.astype(int))])


@KINDS
@pytest.mark.parametrize("overrides", [{}, {"hidden": (8, 12, 16)}], ids=str)
def test_loss_and_gradient_equal_numpy(num_actions, overrides):
    cfg, state, _, data = setup(num_actions, **overrides)
    batch, params = double(data), double(state.actor.params)
    loss, metrics, grads = actor_loss(state.actor.params, state, data, cfg)
    np.testing.assert_allclose([loss, metrics["actor_loss"]], numpy_loss(params, batch), rtol=2e-5)
    for direction in directions(params):
        expected = slope(lambda p: numpy_loss(p, batch), params, direction)
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=1e-3)


# --- By hand ------------------------------------------------------------------------------------
def linear_state(apply_fn, params):
    return bc.State(nets.linear_net(train_state.TrainState.create, apply_fn, params), ())


def test_loss_by_hand():
    state = linear_state(lambda p, s: p[None] * s, [0.5, -0.25])
    batch = probes.random_transitions(2, 1, 2, observation=[[1], [2]], action=[[0, 0.75], [1, 1]])
    # pi(s) is (0.5, -0.25) and (1, -0.5); squares 0.25, 1 and 0, 2.25
    loss, _, _ = actor_loss(state.actor.params, state, batch, bc.Config())
    np.testing.assert_allclose(loss, 3.5 / 4, rtol=1e-6)


def test_loss_of_integers_by_hand():
    state = linear_state(lambda p, s: p[None] * s, [0.0, math.log(2), math.log(5)])
    batch = probes.random_transitions(2, 1, 2, observation=[[1], [-1]])
    batch = batch._replace(action=np.array([2, 0], np.int32))
    # probabilities (1, 2, 5) / 8 and (10, 5, 2) / 17
    loss, _, _ = actor_loss(state.actor.params, state, batch, bc.Config())
    np.testing.assert_allclose(loss, -(math.log(5 / 8) + math.log(10 / 17)) / 2, rtol=1e-6)


@KINDS
def test_the_loss_reads_observation_and_action_only(num_actions):
    cfg, state, _, data = setup(num_actions)
    here = actor_loss(state.actor.params, state, data, cfg)[0]
    for name, column in data._asdict().items():
        loss = actor_loss(
            state.actor.params, state, data._replace(**{name: np.roll(column, 1, axis=0)}), cfg
        )[0]
        assert (loss != here) == (name in ("observation", "action")), name
    other = nets.shaken(state, seed=4)
    assert actor_loss(state.actor.params, other, data, cfg)[0] == here
    assert actor_loss(other.actor.params, state, data, cfg)[0] != here


# --- Networks -----------------------------------------------------------------------------------
@KINDS
def test_initial_parameters(num_actions):
    statistics = (np.arange(16.0), np.arange(1.0, 17.0))
    state = nets.fresh(bc, num_actions, statistics=statistics)
    nets.check_uniform_init(state.actor.params, (16, 64, 96, num_actions or 2))
    nets.check_close(state.statistics, statistics, 0, 0)


# --- Policy -------------------------------------------------------------------------------------
def test_normalise():
    nets.check_normalise(bc)


def test_the_policy_normalises_by_the_statistics_of_the_state():
    nets.check_policy_normalises(bc, nets.tanh_actor)


def test_the_policy_of_integers_takes_the_likeliest():
    _, state, key, data = setup(probes.NUMBER)
    params, observation = bc.policy_params(state), 5 * data.observation
    act = functools.partial(bc.policy, state.actor.apply_fn, discrete=True)
    action = np.asarray(jax.jit(act)(params, observation, key))
    mean, std = double(state.statistics)
    logits = nets.mlp(double(state.actor.params), (double(observation) - mean) / std)
    assert action.dtype == np.int32 and action.shape == data.action.shape
    assert action.tolist() == logits.argmax(axis=-1).tolist()
    assert len({*action.tolist()}) > 1
    raw = nets.mlp(double(state.actor.params), double(observation))
    assert action.tolist() != raw.argmax(axis=-1).tolist()  # the statistics matter here


# --- Update -------------------------------------------------------------------------------------
@KINDS
def test_two_updates(num_actions):
    cfg, state, key, data = setup(num_actions, actor_learning_rate=0.05, log_every=2)
    _, here, _, _ = setup(num_actions)  # the same numbers, with the loss compiled already
    adam, losses = nets.Adam(0.05), []
    for step in (6, 7):
        (batch,) = nets.sample(key, step, data, cfg, 1)
        loss, _, grads = actor_loss(here.actor.params, here, batch, cfg)
        params = adam.step(here.actor.params, grads)
        here = here._replace(actor=here.actor.replace(params=params))
        losses.append(loss)
    after, metrics = nets.train_chunk(bc, state, key, 6, data, cfg)
    nets.check_close(after.actor.params, here.actor.params)
    nets.check_close(after.statistics, state.statistics, 0, 0)
    np.testing.assert_allclose(metrics.pop("actor_loss"), np.mean(losses), rtol=1e-4)
    assert not metrics
    nets.check_rate(state.actor, lambda step: 0.05)


# --- The best episodes --------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fraction_of", "kept"), [("episodes", np.r_[0:5, 10:18]), ("transitions", np.r_[10:18])]
)
def test_training_sees_the_best_episodes_normalised_by_themselves(
    monkeypatch, tmp_path, fraction_of, kept
):
    raw = probes.random_transitions(20, 1, observation=np.arange(20.0)[:, None] ** 2)
    overrides = {"fraction": 0.5, "fraction_of": fraction_of, "seeds": (0, 1)}
    returns, ends = (7, 2, 9, -1), np.array([5, 10, 18, 20])
    state, data = nets.handed_over(bc, monkeypatch, tmp_path, raw, returns, ends, **overrides)
    expected, (mean, std) = bc.normalise(type(raw)(*(column[kept] for column in raw)))
    nets.check_close(data, expected, atol=1e-6)
    for found, statistic in zip(state.statistics, (mean, std), strict=True):
        nets.check_close(found, np.stack([statistic] * 2), atol=1e-6)


def test_training_on_integers_has_one_logit_for_each(monkeypatch, tmp_path):
    raw = probes.integer_actions(probes.random_transitions(20))
    state, data = nets.handed_over(bc, monkeypatch, tmp_path, raw, (1, 2))
    assert np.array_equal(data.action, raw.action) and data.action.dtype == np.int32
    assert state.actor.params["params"]["Dense_1"]["bias"].shape == (1, probes.NUMBER)


@pytest.mark.parametrize("fraction", ["0", "-0.1", "1.01", "nan"])
def test_a_fraction_of_nothing_is_refused(fraction, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    line = nets.refused(capsys, bc.Config, f"--fraction {fraction}")
    assert f"--fraction {float(fraction)}: " in line and "must be" in line
    assert config.parse(bc.Config, ["--fraction", "1"])[0].fraction == 1
    assert config.parse(bc.Config, ["--fraction", "0.001"])[0].fraction == 0.001


def test_the_fraction_is_of_episodes_or_transitions(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    line = nets.refused(capsys, bc.Config, "--fraction-of rows")
    assert "episodes" in line and "transitions" in line

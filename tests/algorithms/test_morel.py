# SPDX-License-Identifier: Apache-2.0
"""MOReL's halt state against NumPy and its authors' code; SAC's losses are in test_parity.py."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import parity
import probes
import pytest
import test_mopo
from numpy_nets import double
from test_mopo import KEY, LARGEST, numpy_actor, numpy_predict

from algorithms import morel


def setup(threshold=1.0, reward=-50.0, **overrides):
    """(cfg, state with random parameters, key, data), the state of MOPO's test and a halt state."""
    healthy = jnp.array([-0.9, -LARGEST, -LARGEST]), jnp.array([1.1, LARGEST, LARGEST])
    _, state, key, data = test_mopo.setup(healthy=healthy)
    cfg = probes.config(morel, **(test_mopo.SMALL | overrides))
    halt = morel.Halt(threshold=jnp.float32(threshold), reward=jnp.float32(reward))
    return cfg, morel.State(*state, halt=halt), key, data


def numpy_disagreement(state, observation, action):
    """[B], pair of members by pair of members."""
    members = len(state.fit.best_error)
    same = [np.stack([x] * members) for x in (observation, action)]
    mean, _ = numpy_predict(double(state.dynamics.params), state, *same)
    unit = double(state.fit.input_statistics[1])[: observation.shape[-1]]
    found = np.zeros(len(observation))
    for first in range(members):
        for second in range(first):
            change = (mean[first] - mean[second])[:, :-1] / unit[None]
            found = np.maximum(found, np.sqrt((change**2).sum(axis=1)))
    return found


# --- What is unknown ----------------------------------------------------------------------------
@functools.cache
def recorded():
    with np.load(parity.FOLDER / "disagreement.npz") as stored:
        numbers = dict(stored)
    index = json.loads(numbers.pop("index").tobytes())
    return {
        name: numbers[dtype][start : start + int(np.prod(shape))].reshape(shape)
        for name, (dtype, start, shape) in index.items()
    }


def test_disagreement_and_where_rollouts_halt_are_the_authors():
    """Their code has observations in the env's units, given it divided by the std of the data."""
    arrays = recorded()
    members = {
        layer: {part: arrays[f"init/members/{layer}/{part}"] for part in ("bias", "kernel")}
        for layer in ("Dense_0", "Dense_1", "Dense_2")
    }
    cfg = probes.config(morel, model_hidden=(8, 8), num_models=4, hidden=(8,), num_critics=1)
    with jax.enable_x64(True):
        example = probes.random_transitions(1, 5, 3)
        state = jax.eval_shape(functools.partial(morel.create_state, cfg=cfg), KEY, example)
        params = {
            "members": {"params": jax.tree.map(lambda x: jnp.asarray(x, float), members)},
            "max_log_variance": jnp.full(6, 0.5),
            "min_log_variance": jnp.full(6, -10.0),
        }
        statistics = tuple(jnp.asarray(arrays[name], float) for name in ("mean", "std"))
        fit = state.fit._replace(input_statistics=statistics, best_error=jnp.zeros(4))
        state = state._replace(fit=fit, dynamics=state.dynamics.replace(params=params))

        @jax.jit
        def disagreement(observation, action):
            mean, _ = morel.ensemble(state, observation, action)
            return morel.disagreement(state, mean)

        rows = [jnp.asarray(arrays[f"data/{name}"], float) for name in ("observation", "action")]
        found = disagreement(*rows)
        np.testing.assert_allclose(found, arrays["disagreement"], rtol=1e-9)
        # Their limit is a share of the largest one.
        np.testing.assert_allclose(found.max() / 1.2, arrays["limit"], rtol=1e-9)

        kept = arrays["kept"]
        assert len({*kept}) > 2
        path = [jnp.asarray(arrays[f"path/{name}"], float) for name in ("observation", "action")]
        for i, count in enumerate(kept):
            unknown = np.asarray(disagreement(path[0][i], path[1][i])) > arrays["limit"]
            last_known = len(unknown) - 1  # of the last step, they do not ask
            first = int(np.argmax(unknown[:last_known])) if unknown[:last_known].any() else None
            # The unknown step is the last that is kept; theirs keep four at least.
            assert count == (len(unknown) if first is None else max(4, first + 1))


def test_the_limit_is_that_of_the_data():
    """Mean and stds of the data's disagreement, so that a single row does not set it."""
    cfg, state, _, data = setup(halt_deviations=2.0, halt_penalty=30.0)
    found = jax.jit(morel.measure_halt, static_argnums=2)
    halt = found(state, data, cfg)
    rows = double(data)
    expected = numpy_disagreement(state, rows.observation, rows.action)
    np.testing.assert_allclose(halt.threshold, expected.mean() + 2 * expected.std(), rtol=1e-4)
    np.testing.assert_allclose(halt.reward, rows.reward.min() - 30, rtol=1e-6)

    # Members that are the same do not disagree, however far the rows are from one another.
    params = state.dynamics.params
    one = jax.tree.map(lambda x: jnp.stack([x[0]] * 3), params["members"])
    state = state._replace(dynamics=state.dynamics.replace(params=params | {"members": one}))
    assert found(state, data, cfg).threshold == 0


def test_units_are_those_of_the_observations():
    """Halving the unit of a column doubles its part; the reward has none."""
    _, state, _, _ = setup()
    mean = jnp.zeros((3, 1, 4)).at[1, 0].set(jnp.array([3.0, 4.0, 0.0, 1000.0]))
    unit = jnp.array([1.0, 1.0, 1.0, 9.0, 9.0])
    fit = state.fit._replace(input_statistics=(jnp.zeros(5), unit))
    assert morel.disagreement(state._replace(fit=fit), mean) == 5
    fit = fit._replace(input_statistics=(jnp.zeros(5), unit.at[:2].set(0.5)))
    assert morel.disagreement(state._replace(fit=fit), mean) == 10


# --- Rollouts -----------------------------------------------------------------------------------
def numpy_rollouts(state, key, data, cfg):
    """The rows of a generation, rollout by rollout and step by step: its columns, in step order."""
    key_start, key_steps = jax.random.split(jax.random.clone(key))
    index = np.asarray(jax.random.randint(key_start, (cfg.rollout_batch,), 0, len(data.reward)))
    observation = double(data.observation)[index]
    alive, rows = np.ones(cfg.rollout_batch, bool), []
    params, actor = double(state.dynamics.params), double(state.actor.params)
    low, high = double(state.healthy)
    for number in range(cfg.rollout_length):
        step_key = jax.random.fold_in(key_steps, number)
        key_action, key_member, key_noise = jax.random.split(step_key, 3)
        count, dim = observation.shape
        mean, log_std = numpy_actor(actor, observation)
        action = np.tanh(mean + np.exp(log_std) * double(jax.random.normal(key_action, mean.shape)))
        pick = np.asarray(jax.random.randint(key_member, (count,), 0, cfg.num_elites))
        noise = double(jax.random.normal(key_noise, (count, dim + 1)))
        same = [np.stack([x] * cfg.num_models) for x in (observation, action)]
        mean, log_variance = numpy_predict(params, state, *same)
        unknown = numpy_disagreement(state, observation, action) > float(state.halt.threshold)
        following = observation.copy()
        for i in np.flatnonzero(alive):
            member = int(state.fit.elites[pick[i]])
            sample = mean[member, i] + np.exp(log_variance[member, i] / 2) * noise[i]
            after = observation[i] + sample[:-1]
            ended = not ((low < after) & (after < high)).all() or unknown[i]
            reward = float(state.halt.reward) if unknown[i] else sample[-1]
            rows.append((observation[i], action[i], reward, after, float(ended)))
            alive[i] = not ended
            following[i] = after
        observation = following
    return [np.array(column) for column in zip(*rows, strict=True)]


def test_rollouts_equal_numpy_and_none_goes_on_past_the_halt_state():
    _, state, _, data = setup()
    rows = double(data)
    middle = np.median(numpy_disagreement(state, rows.observation, rows.action))
    cfg, state, key, data = setup(threshold=1.3 * middle, rollout_batch=12, rollout_length=4)
    ring = morel.blank_ring(jax.tree.map(lambda x: x[:1], data), cfg)
    state = state._replace(ring=ring)
    roll_out = jax.jit(morel.roll_out, static_argnums=(3, 4))
    ring = roll_out(state, jax.random.clone(key), data, morel.halting_step, cfg)
    expected = numpy_rollouts(state, key, data, cfg)
    count = len(expected[2])
    assert int(ring.filled) == count < cfg.rollout_batch * cfg.rollout_length
    halts = expected[2] == -50
    assert 0 < halts.sum() < expected[4].sum() < count  # others left the healthy range
    for found, wanted in zip(ring.rows, expected, strict=True):
        np.testing.assert_allclose(found[:count], wanted, rtol=2e-3, atol=2e-4)
        assert (np.asarray(found)[count:] == 0).all()
    assert (np.asarray(ring.rows.termination)[:count][halts] == 1).all()
    ends = np.asarray(ring.rows.next_observation)[:count][expected[4] == 1]
    begins = np.asarray(ring.rows.observation)[:count]
    assert not any((begins == end).all(axis=1).any() for end in ends)


# --- The second phase ---------------------------------------------------------------------------
def test_the_first_update_of_the_second_phase_sets_the_halt_state():
    """It does so before the rollouts, which use it, and the dynamics stay as they are."""
    cfg, state, key, data = setup(threshold=0.0, model_updates=8, halt_penalty=7.0)
    data = data._replace(reward=data.reward.clip(-1, 1))
    ring = morel.blank_ring(jax.tree.map(lambda x: x[:1], data), cfg)
    before = state._replace(ring=ring)
    update = jax.jit(morel.update, static_argnames="cfg")
    after, metrics = update(before, 8, jax.random.clone(key), data, cfg=cfg)
    assert after.halt.threshold > 0 and metrics["halt_threshold"] == after.halt.threshold
    np.testing.assert_allclose(after.halt.reward, data.reward.min() - 7, rtol=1e-6)
    filled = int(after.ring.filled)
    assert filled > cfg.rollout_batch  # a threshold of zero would have halted all at once
    for name in ("dynamics", "fit"):
        old, new = probes.leaves(getattr(before, name)), probes.leaves(getattr(after, name))
        assert all(map(np.array_equal, old, new)), name

    later, _ = update(after, 9, jax.random.clone(key), data, cfg=cfg)
    assert later.halt == after.halt and int(later.ring.filled) == filled
    kept = before._replace(halt=morel.Halt(jnp.float32(0.25), jnp.float32(-3.0)))
    later, _ = update(kept, 10, jax.random.clone(key), data, cfg=cfg)
    assert later.halt == kept.halt


def test_nothing_halts_at_an_infinite_limit():
    cfg, state, key, data = setup(threshold=LARGEST)
    step = jax.jit(morel.halting_step, static_argnums=3)
    rows = step(state, jnp.asarray(data.observation), jax.random.clone(key), cfg)
    assert (rows.reward > -50).all()
    np.testing.assert_array_equal(rows.termination, morel.ends(state, rows.next_observation))
    halted = state._replace(halt=state.halt._replace(threshold=jnp.float32(-1.0)))
    rows = step(halted, jnp.asarray(data.observation), jax.random.clone(key), cfg)
    assert (rows.reward == -50).all() and (rows.termination == 1).all()


@pytest.mark.parametrize("flag", ["--halt-deviations", "--halt-penalty"])
def test_settings_of_the_halt_state_are_not_negative(flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["--dataset", test_mopo.runs.write_hdf5("data.hdf5"), *test_mopo.runs.tiny("morel")]
    with pytest.raises(SystemExit) as leave:
        test_mopo.runs.start("morel", [*argv, flag, "-1"])
    line = capsys.readouterr().err
    assert leave.value.code == 2 and line.count("\n") == 1 and flag in line

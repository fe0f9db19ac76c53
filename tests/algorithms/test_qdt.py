# SPDX-License-Identifier: Apache-2.0
"""QDT's relabelling, losses and windows against NumPy in float64, its critics against cql.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_nets as nets
import parity
import probes
import pytest
import test_cql
import test_dt
from numpy_nets import directions, dot, double, slope

from algorithms import cql, qdt
from common import datasets, experiment

TINY = test_dt.TINY | {"num_layers": 1, "hidden": (16, 16), "num_samples": 3, "value_samples": 5}
TINY |= {"value_batch_size": 8, "q_updates": 4, "log_every": 2}
SAME = ("discount", "target_rate", "critic_learning_rate", "num_critics", "alpha", "num_samples")
critic_loss = nets.compiled(qdt.critic_loss)
pi_loss = nets.compiled(qdt.pi_loss)
actor_loss = nets.compiled(qdt.actor_loss)
compiled = jax.jit


@functools.cache
def setup():
    """cfg and a state of random numbers, with a gain for each of the 40 rows of `test_dt.toy`."""
    cfg = qdt.Config(**TINY)
    create = functools.partial(qdt.create_state, cfg=cfg, num_rows=40)
    state = jax.eval_shape(create, jax.random.key(0), test_dt.toy().transitions)
    assert state.gain.shape == (40,)
    gain = np.random.default_rng(0).uniform(0, 9, 40)
    state = state._replace(gain=(np.zeros(3), np.zeros(3)))  # what `shaken` knows
    state = nets.shaken(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state), seed=8)
    return cfg, state._replace(gain=jnp.asarray(gain, jnp.float32))


def steps():
    return qdt.Steps(*test_dt.steps())


def as_cql(state, cfg):
    """Config and State of cql.py with the same critics, pi and temperature."""
    facts = {name: getattr(cfg, name) for name in SAME}
    widths = {"hidden": cfg.hidden, "critic_hidden": cfg.hidden, "log_every": cfg.log_every}
    other = cql.Config(
        **facts,
        **widths,
        batch_size=cfg.value_batch_size,
        actor_learning_rate=cfg.pi_learning_rate,
    )
    multiplier = state.log_temperature  # without a gap to aim at, it is not used
    return other, cql.State(
        state.pi, state.critic, state.log_temperature, multiplier, state.statistics
    )


# --- Relabelling --------------------------------------------------------------------------------
def relabelled(reward, value, ends):
    """Section 4 of the paper: from the end of each episode backward, the last row as it is."""
    new, start = np.zeros(len(reward)), 0
    for end in ends:
        new[end - 1] = reward[end - 1]
        for t in range(end - 2, start - 1, -1):
            new[t] = reward[t] + max(new[t + 1], value[t + 1])
        start = end
    return new


def test_gains():
    reward, ends = double(test_dt.toy().transitions.reward), test_dt.ENDS
    old = np.asarray(steps().returns_to_go, float)
    for scale in (0.1, 2.0, 20.0):
        value = old + scale * np.random.default_rng(1).standard_normal(40)
        new = relabelled(reward, value, ends)
        found = np.asarray(compiled(qdt.gains)(jnp.float32(value), steps()))
        np.testing.assert_allclose(old + found, new, rtol=1e-5, atol=1e-5)
        assert (found >= 0).all() and 5 < (found > 0).sum() < 40
        assert not found[ends - 1].any()  # no value behind an episode's last row
    low = compiled(qdt.gains)(jnp.float32(old - 1), steps())
    assert not np.asarray(low).any()  # values below what was got change nothing


def test_the_last_reward_stays_in_the_returns():
    """One episode that pays at its end alone, and values below that: nothing is lost."""
    rows = steps()._replace(timestep=jnp.arange(40), returns_to_go=jnp.full(40, 7.0))
    assert not np.asarray(compiled(qdt.gains)(jnp.full(40, 6.0), rows)).any()
    found = np.asarray(compiled(qdt.gains)(jnp.arange(40) + 0.0, rows))
    assert found.tolist() == [32.0] * 39 + [0.0]


@pytest.mark.parametrize("case", ["mujoco", "free"])
def test_gains_equal_those_of_the_reference(case):
    arrays = parity.fixture("qdt")[case]
    rows = qdt.Steps(**parity.under(arrays, "data"))
    found = compiled(qdt.gains)(jnp.asarray(arrays["relabel/value"]), rows)
    np.testing.assert_allclose(found, arrays["init/gain/0"], rtol=1e-5, atol=1e-5)


def test_values_are_means_over_critics_and_actions():
    """And `relabel` puts together values and gains, with a key that no step has."""
    cfg, state = setup()
    key, data = jax.random.key(3), steps()
    relabel = compiled(functools.partial(qdt.relabel, cfg=cfg))
    after, metrics = relabel(state, jax.random.clone(key), 4, data)
    key = jax.random.fold_in(key, 2**32 - 1)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(40))
    noise = jax.vmap(lambda key: jax.random.normal(key, (1, 5, 2)))(keys)[:, 0]
    observation = double(data.observation)
    mean, log_std = test_cql.numpy_actor(double(state.pi.params), observation)
    action, _ = test_cql.numpy_sample(mean, log_std, double(noise))
    q = test_cql.numpy_critics(double(state.critic.params), observation, action)  # [C, N, M]
    assert q.shape == (2, 40, 5)
    old = np.asarray(data.returns_to_go, float)
    reward = double(test_dt.toy().transitions.reward)
    new = relabelled(reward, q.mean(axis=(0, 2)), test_dt.ENDS)
    np.testing.assert_allclose(old + after.gain, new, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(metrics["gain"], (new - old).mean(), rtol=1e-4)
    assert (new > old).sum() > 5
    nets.check_close(after.critic.params, state.critic.params, 0, 0)


# --- Windows ------------------------------------------------------------------------------------
def test_the_gain_of_a_windows_last_row_is_in_all_its_returns():
    cfg, state = setup()
    data, index = jax.tree.map(np.asarray, steps()), np.arange(40)
    batch = qdt.windows(steps(), index, cfg)
    found = jax.tree.map(np.asarray, compiled(qdt.with_gain)(batch, index, state.gain))
    gain, reward = np.asarray(state.gain), test_dt.toy().transitions.reward
    for row in range(40):
        end = min(row + 4, *(end for end in test_dt.ENDS if end > row))
        last, count = end - 1, end - row
        expected = reward[row:last].sum() + data.returns_to_go[last] + gain[last]
        np.testing.assert_allclose(found.returns_to_go[row, 0], expected, rtol=1e-4, atol=1e-5)
        change = found.returns_to_go[row, : count - 1] - found.returns_to_go[row, 1:count]
        np.testing.assert_allclose(change, reward[row:last], rtol=1e-4, atol=1e-5)
    for name in ("observation", "action", "timestep"):
        assert np.array_equal(getattr(found, name), getattr(batch, name))


def test_an_update_of_the_transformer_is_that_on_windows_with_gains():
    cfg, state = setup()
    key_batch, key_dropout = jax.random.split(jax.random.fold_in(jax.random.key(1), 6))
    index = np.asarray(jax.random.randint(key_batch, (6,), 0, 40))
    batch = qdt.with_gain(qdt.windows(steps(), index, cfg), index, state.gain)
    loss, _, grads = actor_loss(state.actor.params, state, batch, key_dropout, cfg)
    expected = test_dt.numpy_loss(double(state.actor.params), test_dt.wide(batch), cfg)
    np.testing.assert_allclose(loss, expected, rtol=2e-5)
    update = compiled(functools.partial(qdt.update, cfg=cfg))
    after, metrics = update(state, 6, jax.random.key(1), steps())
    np.testing.assert_allclose(metrics["actor_loss"], loss, rtol=1e-5)
    norm = np.sqrt(sum(float((x**2).sum()) for x in jax.tree.leaves(double(grads))))
    scale = min(1.0, cfg.max_gradient_norm / norm)
    memory = parity.memory_of(after.actor.opt_state)  # 0.1 of the gradient, clipped
    wanted = jax.tree.map(lambda g: 0.1 * scale * np.asarray(g), grads)
    nets.check_close(memory, wanted, 1e-3, 1e-6)
    for part in ("pi", "critic", "log_temperature", "gain"):
        nets.check_close(_arrays(getattr(after, part)), _arrays(getattr(state, part)), 0, 0)


def _arrays(part):
    return part.params if hasattr(part, "params") else part


# --- Critics ------------------------------------------------------------------------------------
def test_critic_and_pi_losses_equal_numpy():
    """All 3 M sampled actions are in the gap, those of pi(s') at s; both losses' gradients."""
    cfg, state = setup()
    other, as_theirs = as_cql(state, cfg)
    batch, key = probes.random_transitions(16, 3, 2), jax.random.key(5)
    drawn = test_cql.draws(key, other, size=16)
    wide = double(batch)
    params = double(state.critic.params)
    loss, metrics, grads = critic_loss(state.critic.params, state, batch, key, cfg)
    found = [loss, metrics["td_error"], metrics["q"], metrics["conservative_gap"]]
    expected = test_cql.numpy_critic_loss(params, as_theirs, wide, drawn, other)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    for direction in directions(params, 3):

        def along(params):
            return test_cql.numpy_critic_loss(params, as_theirs, wide, drawn, other)[0]

        np.testing.assert_allclose(
            dot(grads, direction), slope(along, params, direction), rtol=2e-3
        )

    noise = double(jax.random.normal(jax.random.clone(key), (16, 1, 2)))
    temperature = np.exp(float(state.log_temperature.params["log"]))

    def numpy_pi_loss(pi):
        mean, log_std = test_cql.numpy_actor(pi, wide.observation)
        action, log_prob = test_cql.numpy_sample(mean, log_std, noise)
        q = test_cql.numpy_critics(params, wide.observation, action).min(axis=0)
        return (temperature * log_prob - q).mean()

    pi = double(state.pi.params)
    loss, _, grads = pi_loss(state.pi.params, state, batch, key, cfg)
    np.testing.assert_allclose(loss, numpy_pi_loss(pi), rtol=1e-4)
    for direction in directions(pi, 3):
        np.testing.assert_allclose(
            dot(grads, direction), slope(numpy_pi_loss, pi, direction), rtol=2e-3
        )


def test_the_first_phase_is_cql():
    cfg, state = setup()
    other, theirs = as_cql(state, cfg)
    rows, key = jax.device_put(test_dt.toy().transitions), jax.random.key(2)
    chunk = compiled(functools.partial(qdt.value_chunk, cfg=cfg))
    after, metrics = chunk(state, jax.random.clone(key), 2, rows)
    chunk = compiled(functools.partial(cql.train_chunk, cfg=other))
    expected, values = chunk(theirs, key, 2, rows)
    for ours, name in ((after.pi, "actor"), (after.critic, "critic")):
        nets.check_close(ours.params, getattr(expected, name).params, 1e-4, 1e-6)
    nets.check_close(after.critic.target_params, expected.critic.target_params, 1e-4, 1e-6)
    nets.check_close(after.log_temperature.params, expected.log_temperature.params, 1e-5, 1e-7)
    values["pi_loss"] = values.pop("actor_loss")
    assert metrics.keys() == values.keys()
    for name, value in values.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-3, err_msg=name)
    nets.check_close(after.actor.params, state.actor.params, 0, 0)
    assert np.array_equal(after.gain, state.gain)


# --- Training -----------------------------------------------------------------------------------
def test_the_phases(monkeypatch, tmp_path):
    """Rows for the critics, then gains once, then windows of the same rows for the transformer."""
    calls = []

    def over_seeds(chunk, update=None):
        def one(state, keys, start, data):
            calls.append((chunk.func.__name__, start, type(data).__name__, state.gain.shape))
            if len(calls) == 5:
                raise StopIteration
            return state, {"critic_loss": jnp.zeros(1)}

        return one

    def create_state(key, batch, cfg, statistics, num_rows):
        state = setup()[1]
        assert state.gain.shape == (num_rows,)
        return state

    def taken(*args, **kwargs):
        return test_dt.toy()

    monkeypatch.setattr(qdt, "create_state", create_state)
    monkeypatch.setattr(experiment, "over_seeds", over_seeds)
    monkeypatch.setattr(qdt.datasets, "load", taken)
    cfg = qdt.Config(**TINY, dataset="toy.hdf5", num_updates=8, eval_every=8)
    options = experiment.config.Options(name="toy", runs_dir=str(tmp_path), wandb="disabled")
    with pytest.raises(StopIteration):
        qdt.train(cfg, options)
    first, steps = ("Transitions", (1, 40)), ("Steps", (1, 40))
    assert calls == [
        ("value_chunk", 0, *first),
        ("value_chunk", 2, *first),
        ("relabel", 4, *steps),
        ("train_chunk", 4, *steps),
        ("train_chunk", 6, *steps),
    ]


def test_episodes_that_go_on_after_a_termination_are_refused(monkeypatch, capsys):
    """Their returns stop at it, which the recursion over later rows does not know."""
    rows = probes.random_transitions(6, termination=np.arange(6) % 3 == 2, truncation=0)
    for ends, goes_on in ((np.array([3, 6]), False), (np.array([6]), True)):
        dataset = datasets.Dataset("toy", rows, ends, np.zeros(len(ends)))
        assert qdt.goes_on_after_a_termination(dataset) == goes_on
    monkeypatch.setattr(qdt.datasets, "load", lambda *args: dataset)
    with pytest.raises(SystemExit) as leave:
        qdt.train(qdt.Config(**TINY, dataset="toy.hdf5"), experiment.config.Options())
    assert leave.value.code == 2 and "go on after a termination" in capsys.readouterr().err

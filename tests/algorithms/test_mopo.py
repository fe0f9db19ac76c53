# SPDX-License-Identifier: Apache-2.0
"""MOPO's dynamics, rollouts, ring and losses against NumPy, hand-worked numbers, its reference."""

import functools
import json

import helpers_runs as runs
import jax
import jax.numpy as jnp
import numpy as np
import numpy_nets as nets
import parity
import probes
import pytest
from numpy_nets import directions, dot, double, slope

from algorithms import mopo
from common import envs

LARGEST = np.finfo(np.float32).max
SMALL = {"batch_size": 32, "hidden": (16, 16), "model_hidden": (8, 8), "rollout_batch": 6}
SMALL |= {"rollout_length": 3, "generations": 5, "rollout_every": 2, "num_critics": 2}


@functools.cache
def program(function):
    return jax.jit(function, static_argnames="cfg")


def random_tree(tree, seed, size=0.5):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(size * rng.standard_normal(x.shape), x.dtype), tree)


def setup(data=None, healthy=None, **overrides):
    """(cfg, state with random parameters, key, data)"""
    cfg = probes.config(mopo, **(SMALL | overrides))
    data = probes.random_transitions() if data is None else data
    example = jax.tree.map(lambda x: x[:1], data)
    create = functools.partial(mopo.create_state, batch=example, cfg=cfg, healthy=healthy)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(create, KEY))
    width = data.observation.shape[-1]
    state = state._replace(
        actor=state.actor.replace(params=random_tree(state.actor.params, 1)),
        critic=state.critic.replace(
            params=random_tree(state.critic.params, 2),
            target_params=random_tree(state.critic.params, 3),
        ),
        log_temperature=state.log_temperature.replace(params={"log": jnp.float32(-0.7)}),
        dynamics=state.dynamics.replace(params=random_tree(state.dynamics.params, 4)),
        fit=mopo.blank_fit(state.dynamics.params, example, cfg)._replace(
            best_error=jnp.array([0.3, 0.1, 0.2]),
            elites=jnp.array([1, 2]),
            input_statistics=(
                random_tree(jnp.zeros(width + 2), 5),
                1.0 + jnp.abs(random_tree(jnp.zeros(width + 2), 6)),
            ),
        ),
    )
    if healthy is None:
        state = state._replace(healthy=(jnp.full(width, -LARGEST), jnp.full(width, LARGEST)))
    else:
        state = state._replace(healthy=healthy)
    bounds = {
        "min_log_variance": jnp.linspace(-3.0, -2.0, width + 1),
        "max_log_variance": jnp.linspace(0.0, 0.5, width + 1),
    }
    params = state.dynamics.params | bounds
    return cfg, state._replace(dynamics=state.dynamics.replace(params=params)), KEY, data


KEY = jax.random.key(1)


# --- The dynamics in NumPy ----------------------------------------------------------------------
def softplus(x):
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


def numpy_predict(params, state, observation, action):
    """Member by member: mean and log variance, [M, ..., O + 1]."""
    mean, std = double(state.fit.input_statistics)
    found = []
    for member in range(len(params["members"]["params"]["Dense_0"]["bias"])):
        layers = jax.tree.map(lambda x, m=member: x[m], params["members"]["params"])
        x = np.concatenate([observation[member], action[member]], axis=-1)
        x = (x - mean) / std
        for i in range(len(layers) - 1):
            x = nets.dense(layers[f"Dense_{i}"], x)
            x = x / (1 + np.exp(-x))
        x = nets.dense(layers[f"Dense_{len(layers) - 1}"], x)
        width = x.shape[-1] // 2
        log_variance = params["max_log_variance"] - softplus(
            params["max_log_variance"] - x[..., width:]
        )
        log_variance = params["min_log_variance"] + softplus(
            log_variance - params["min_log_variance"]
        )
        found.append((x[..., :width], log_variance))
    return tuple(np.stack(part) for part in zip(*found, strict=True))


def numpy_dynamics_loss(params, state, batch, cfg):
    mean, log_variance = numpy_predict(params, state, batch.observation, batch.action)
    total = 0.0
    for member in range(len(mean)):
        terms = []
        for row in range(len(batch.reward[member])):
            after, before = batch.next_observation[member, row], batch.observation[member, row]
            if batch.termination[member, row] and (after == before).all():
                continue
            target = np.append(after - before, batch.reward[member, row])
            error = (target - mean[member, row]) ** 2 / np.exp(log_variance[member, row])
            terms.append(np.mean(error + log_variance[member, row]))
        total += np.mean(terms)
    total += 0.01 * (params["max_log_variance"].sum() - params["min_log_variance"].sum())
    for i, decay in enumerate(cfg.model_decays):
        total += decay / 2 * (params["members"]["params"][f"Dense_{i}"]["kernel"] ** 2).sum()
    return total


def member_batches(data, members=3):
    """[M, B, ...], other rows for each member."""
    rng = np.random.default_rng(7)
    index = rng.integers(0, len(data.reward), (members, 16))
    return jax.tree.map(lambda x: x[index], data)


def test_dynamics_loss_and_gradient_equal_numpy():
    """Rows without a next observation count neither in the loss nor in its mean."""
    data = probes.random_transitions(termination=0)
    data.termination[::3] = 1
    data.next_observation[::6] = data.observation[::6]
    cfg, state, _, _ = setup(model_decays=(0.1, 0.2, 0.3))
    batch = member_batches(data)
    loss, _, grads = nets.compiled(mopo.dynamics_loss)(state.dynamics.params, state, batch, cfg)
    params = double(state.dynamics.params)
    of = functools.partial(numpy_dynamics_loss, state=state, batch=double(batch), cfg=cfg)
    np.testing.assert_allclose(loss, of(params), rtol=1e-4)
    for direction in directions(params, 4):
        np.testing.assert_allclose(dot(grads, direction), slope(of, params, direction), rtol=2e-3)


def test_a_row_without_a_next_observation_teaches_nothing():
    cfg, state, _, data = setup(model_decays=(0.0, 0.0, 0.0))
    data = data._replace(
        next_observation=data.observation, termination=np.ones_like(data.termination)
    )
    batch = member_batches(data)
    _, _, grads = nets.compiled(mopo.dynamics_loss)(state.dynamics.params, state, batch, cfg)
    assert all((x == 0).all() for x in probes.leaves(grads["members"]))


# --- The reference's dynamics -------------------------------------------------------------------
@functools.cache
def recorded():
    with np.load(parity.FOLDER / "dynamics_ensemble.npz") as stored:
        numbers = dict(stored)
    index = json.loads(numbers.pop("index").tobytes())
    return {
        name: numbers[dtype][start : start + int(np.prod(shape))].reshape(shape)
        for name, (dtype, start, shape) in index.items()
    }


def test_fit_and_rollout_step_are_the_references():
    """Losses and parameters of five updates, errors of held-out rows, elites, a step of 40 rows."""
    arrays = recorded()
    with jax.enable_x64(True):
        held = parity.under(arrays, "holdout")
        rows = {name: jnp.asarray(x, float) for name, x in held.items()}
        cfg = probes.config(
            mopo,
            hidden=(16, 16),
            model_hidden=(8, 8),
            model_decays=(2.5e-5, 5e-5, 1e-4),
            num_models=4,
            num_elites=2,
            rollout_batch=1,
            penalty_weight=2.5,
        )
        example = probes.random_transitions(1, 11, 3)
        state = jax.eval_shape(functools.partial(mopo.create_state, cfg=cfg), KEY, example)
        params = parity.filled(state.dynamics.params, arrays, "init", jnp.float64)
        dynamics = state.dynamics.replace(
            params=params, step=jnp.zeros((), int), opt_state=state.dynamics.tx.init(params)
        )
        actor_params = parity.filled(state.actor.params, arrays, "actor/params", jnp.float64)
        statistics = tuple(jnp.asarray(arrays[name], float) for name in ("mean", "std"))
        fit = mopo.blank_fit(params, example, cfg)._replace(input_statistics=statistics)
        state = state._replace(
            actor=state.actor.replace(params=actor_params),
            dynamics=dynamics,
            fit=fit,
            healthy=tuple(jnp.asarray(x) for x in envs.healthy_range(Hopper, rows_of_width(11))),
        )
        zeros = np.zeros(arrays["batch/reward"].shape[1:])
        for i, expected in enumerate(arrays["losses"]):
            batch = mopo.ModelRows(
                termination=zeros,
                **{
                    name: jnp.asarray(x[i], float)
                    for name, x in parity.under(arrays, "batch").items()
                },
            )
            (loss, _), grads = program(jax.value_and_grad(mopo.dynamics_loss, has_aux=True))(
                state.dynamics.params, state, batch, cfg=cfg
            )
            np.testing.assert_allclose(loss, expected, rtol=1e-12)
            state = state._replace(dynamics=state.dynamics.apply_gradients(grads=grads))
        after = parity.filled(state.dynamics.params, arrays, "after", jnp.float64)
        nets.check_close(state.dynamics.params, after, rtol=1e-9, atol=1e-11)
        state = state._replace(dynamics=state.dynamics.replace(params=after))

        # Every row is among those held out, where one of each five is.
        data = mopo.ModelRows(
            **{name: jnp.repeat(x, 5, axis=0) for name, x in rows.items()},
            termination=jnp.zeros(100),
        )
        fit = mopo.measure_holdout(state, mopo.holdout_rows(KEY, len(data.reward)), data)
        np.testing.assert_allclose(fit.best_error, arrays["holdout_errors"], rtol=1e-10)

        dynamics, fit = mopo.finish_fit(state._replace(fit=fit), cfg)
        state = state._replace(dynamics=dynamics, fit=fit)
        assert list(state.fit.elites) == list(arrays["elites"])
        rollout = parity.under(arrays, "rollout")
        draws = {
            "0_normal": jnp.asarray(rollout["action_noise"], float),
            "1_randint": rollout["pick"],
            "2_normal": jnp.asarray(rollout["noise"], float),
        }
        with parity.replayed(mopo, [], draws):
            observation = jnp.asarray(rollout["observation"], float)
            found = mopo.penalised_step(state, observation, KEY, cfg)
    for name in ("action", "next_observation", "reward", "termination"):
        expected = rollout[name]
        np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-9, atol=1e-11)
    assert 0 < rollout["termination"].sum() < len(rollout["termination"])


class Hopper:
    """Stands for the env: its spec is all that is read."""

    class spec:
        name = "Hopper"

    @property
    def unwrapped(self):
        return self

    def close(self):
        pass


# --- Held-out rows, bootstrap, the stop ---------------------------------------------------------
@pytest.mark.parametrize("count", [2, 3, 7, 11, 997, 100_200])
def test_every_row_is_either_held_out_or_learned_from(count):
    """Also those behind the last block, of which none is held out."""
    held = np.asarray(mopo.holdout_rows(KEY, count))
    learned = np.asarray(mopo.training_rows(KEY, jnp.arange(count - len(held)), count))
    assert sorted([*held.tolist(), *learned.tolist()]) == list(range(count))


@pytest.mark.parametrize(("count", "steps"), [(1_000_000, 1000), (2_000_000, 1000), (200_000, 200)])
def test_held_out_rows_are_of_many_time_steps(count, steps):
    """Also where a block has as many rows as an episode, or two episodes: the errors of the members
    are not those of a single time step."""
    held = np.asarray(mopo.holdout_rows(KEY, count))
    assert len({*(held % steps).tolist()}) > steps / 2


@pytest.mark.parametrize("count", [2, 7, 60, 1234, 7003])
def test_held_out_rows_are_never_drawn_and_all_others_can_be(count):
    cfg = probes.config(mopo, batch_size=4096, num_models=2)
    held = np.asarray(mopo.holdout_rows(KEY, count))
    assert len(held) == max(1, min(count // 5, 1000)) == len({*held})
    assert held.min() >= 0 and held.max() < count
    rows = jax.jit(mopo.bootstrap_rows, static_argnums=(2, 3))
    drawn = np.concatenate([np.asarray(rows(KEY, step, count, cfg)) for step in range(4)], axis=1)
    assert drawn.min() >= 0 and drawn.max() < count
    assert not {*held} & {*drawn.ravel()}
    if count <= 60:
        # The samples differ, and each leaves rows out: (1 - 1/n)^n of them, about 37 %.
        samples = [{*member} for member in drawn]
        others = count - len(held)
        assert all(len(sample) <= others for sample in samples)
        if count == 60:
            assert samples[0] != samples[1]
            assert all(0.45 < len(sample) / others < 0.8 for sample in samples)


def test_members_keep_their_best_and_the_fit_stops_as_the_reference_does():
    """Better is by more than 1 %. The fit stops after `patience` measurements without any."""
    cfg, state, _, data = setup(patience=2)
    data = jax.tree.map(jnp.asarray, data)
    measure = jax.jit(mopo.measure_holdout)
    held_out = mopo.holdout_rows(KEY, len(data.reward))
    blank = state.fit._replace(best_error=jnp.full(3, 1e10))
    fit = measure(state._replace(fit=blank), held_out, data)
    assert int(fit.waiting) == 0
    held = mopo.holdout_rows(KEY, len(data.reward))
    rows = double(jax.tree.map(lambda x: x[held], data))
    three = jax.tree.map(lambda x: np.stack([x] * 3), rows)
    mean, _ = numpy_predict(double(state.dynamics.params), state, three.observation, three.action)
    change = rows.next_observation - rows.observation
    target = np.concatenate([change, rows.reward[:, None]], axis=1)
    square = (mean - target[None]) ** 2
    np.testing.assert_allclose(fit.best_error, square.mean(axis=(1, 2)), rtol=1e-4)
    scaled = np.sqrt((square.mean(axis=1) / target.var(axis=0)[None]).mean(axis=1))
    np.testing.assert_allclose(fit.scaled_error, scaled, rtol=1e-4)

    # Member 1 is better by less than 1 %, member 2 by more.
    old = fit.best_error * jnp.array([0.5, 1.005, 1.02])
    other = jax.tree.map(jnp.zeros_like, fit.best)
    before = fit._replace(best_error=old, best=other, waiting=jnp.int32(1))
    fit = measure(state._replace(fit=before), held_out, data)
    assert int(fit.waiting) == 0
    np.testing.assert_array_equal(fit.best_error[:2], old[:2])
    assert fit.best_error[2] < old[2]
    for best, now in zip(
        probes.leaves(fit.best), probes.leaves(state.dynamics.params["members"]), strict=True
    ):
        assert (best[:2] == 0).all() and (best[2] == now[2]).all()
    before = fit._replace(best_error=jnp.zeros(3), waiting=jnp.int32(1))
    assert int(measure(state._replace(fit=before), held_out, data).waiting) == 2

    # A fit that has stopped changes nothing; its last update takes the best parameters.
    cfg = probes.config(mopo, **SMALL, patience=2, model_updates=10, holdout_every=5)
    stopped = state._replace(fit=before._replace(waiting=jnp.int32(2), best=other))
    step = jax.jit(mopo.model_update, static_argnums=4)
    after, metrics = step(stopped, 4, KEY, data, cfg)
    assert metrics["fitting"] == 0
    assert all(map(np.array_equal, probes.leaves(after), probes.leaves(stopped)))
    going, metrics = step(stopped._replace(fit=before), 4, KEY, data, cfg)
    assert metrics["fitting"] == 1 and int(going.fit.waiting) == 2
    moved = probes.leaves(going.dynamics.params), probes.leaves(stopped.dynamics.params)
    assert not all(map(np.array_equal, *moved))
    errors = jnp.array([0.2, 0.3, 0.1])
    stopped = stopped._replace(fit=stopped.fit._replace(best_error=errors))
    last, _ = step(stopped, 9, KEY, data, cfg)
    assert last.fit.elites.tolist() == [2, 0]
    assert all((x == 0).all() for x in probes.leaves(last.dynamics.params["members"]))
    frozen = [state.actor.params, state.critic.params, state.ring]
    for x, y in zip(frozen, [going.actor.params, going.critic.params, going.ring], strict=True):
        assert all(map(np.array_equal, probes.leaves(x), probes.leaves(y)))


def test_a_fit_that_is_never_measured_keeps_its_last_update():
    """The last update of a fit is followed by a measurement, whatever `holdout_every` is."""
    data = probes.random_transitions(400, 2, 2, termination=0)
    data = data._replace(next_observation=data.observation + 0.5 * data.action)
    errors = {}
    for every in (50, 1000):
        cfg = probes.config(
            mopo,
            model_updates=50,
            log_every=50,
            holdout_every=every,
            batch_size=32,
            model_hidden=(16, 16),
        )
        state, key, rows = probes.start(mopo, data, cfg)
        fit = jax.jit(mopo.model_chunk, static_argnums=4)
        state, _ = fit(state, key, 0, rows, cfg)
        errors[every] = np.asarray(state.fit.best_error)
    np.testing.assert_array_equal(errors[50], errors[1000])


def test_the_fit_learns_a_linear_env():
    """s' = s + 0.5 a, r = s_0: errors fall far below one std, and members end at different ones."""
    data = probes.random_transitions(400, 2, 2, termination=0)
    data = data._replace(
        next_observation=data.observation + 0.5 * data.action, reward=data.observation[:, 0]
    )
    cfg = probes.config(
        mopo, model_updates=500, log_every=500, batch_size=32, model_hidden=(16, 16)
    )
    state, key, rows = probes.start(mopo, data, cfg)
    # As --start-from leaves it, with the record of a fit that has stopped: this one has its own.
    record = state.fit._replace(best_error=jnp.zeros(3), waiting=jnp.int32(99))
    state = state._replace(fit=record)
    fit = jax.jit(mopo.model_chunk, static_argnums=4)
    state, metrics = fit(state, key, 0, rows, cfg)
    error = np.asarray(state.fit.scaled_error)
    assert (error < 0.3).all() and len({*error.tolist()}) == 3
    np.testing.assert_allclose(
        state.fit.input_statistics[0][:2], data.observation.mean(0), atol=1e-5
    )
    assert {f"holdout_error_{i}" for i in range(3)} <= {*metrics}
    best = jax.tree.map(np.asarray, state.fit.best)
    assert all(
        map(np.array_equal, probes.leaves(best), probes.leaves(state.dynamics.params["members"]))
    )


# --- Rollouts -----------------------------------------------------------------------------------
def numpy_rollouts(state, key, data, cfg):
    """The rows of a generation, rollout by rollout and step by step: its columns, in step order."""
    key_start, key_steps = jax.random.split(jax.random.clone(key))
    index = np.asarray(jax.random.randint(key_start, (cfg.rollout_batch,), 0, len(data.reward)))
    observation = double(data.observation)[index]
    alive, rows = np.ones(cfg.rollout_batch, bool), []
    params, actor = double(state.dynamics.params), double(state.actor.params)
    elites = np.argsort(double(state.fit.best_error))[: cfg.num_elites]
    low, high = double(state.healthy)
    for number in range(cfg.rollout_length):
        # Not of a split: a vmap would transpose the keys of a scan, and JAX's check of key reuse
        # takes the transposed ones for used.
        step_key = jax.random.fold_in(key_steps, number)
        key_action, key_member, key_noise = jax.random.split(step_key, 3)
        count, dim = observation.shape
        mean, log_std = numpy_actor(actor, observation)
        action = np.tanh(mean + np.exp(log_std) * double(jax.random.normal(key_action, mean.shape)))
        pick = np.asarray(jax.random.randint(key_member, (count,), 0, cfg.num_elites))
        noise = double(jax.random.normal(key_noise, (count, dim + 1)))
        same = [np.stack([x] * cfg.num_models) for x in (observation, action)]
        mean, log_variance = numpy_predict(params, state, *same)
        std = np.exp(log_variance / 2)
        following = observation.copy()
        for i in np.flatnonzero(alive):
            member = elites[pick[i]]
            sample = mean[member, i] + std[member, i] * noise[i]
            after = observation[i] + sample[:-1]
            penalty = max(np.sqrt((std[m, i] ** 2).sum()) for m in range(cfg.num_models))
            ended = not ((low < after) & (after < high)).all()
            reward = sample[-1] - cfg.penalty_weight * penalty
            rows.append((observation[i], action[i], reward, after, float(ended)))
            alive[i] = not ended
            following[i] = after
        observation = following
    return [np.array(column) for column in zip(*rows, strict=True)]


def numpy_actor(params, observation):
    """Mean and log std before tanh: the last two layers, in this order."""
    layers, x = params["params"], observation
    hidden = len(layers) - 2
    for i in range(hidden):
        x = np.maximum(nets.dense(layers[f"Dense_{i}"], x), 0)
    log_std = nets.dense(layers[f"Dense_{hidden + 1}"], x)
    return nets.dense(layers[f"Dense_{hidden}"], x), np.clip(log_std, -5, 2)


def test_rollouts_equal_numpy_and_none_goes_on_past_an_end():
    healthy = jnp.array([-0.9, -LARGEST, -LARGEST]), jnp.array([1.1, LARGEST, LARGEST])
    cfg, state, key, data = setup(healthy=healthy, penalty_weight=0.7)
    roll_out = jax.jit(mopo.roll_out, static_argnums=(3, 4))
    ring = roll_out(state, jax.random.clone(key), data, mopo.penalised_step, cfg)
    expected = numpy_rollouts(state, key, data, cfg)
    count = len(expected[2])
    assert int(ring.filled) == count < cfg.rollout_batch * cfg.rollout_length  # some have ended
    assert 0 < expected[4].sum() < count
    for found, wanted in zip(ring.rows, expected, strict=True):
        np.testing.assert_allclose(found[:count], wanted, rtol=2e-3, atol=2e-4)
        assert (np.asarray(found)[count:] == 0).all()
    # No written row begins where another one ended.
    ends = np.asarray(ring.rows.next_observation)[:count][expected[4] == 1]
    begins = np.asarray(ring.rows.observation)[:count]
    assert not any((begins == end).all(axis=1).any() for end in ends)


def test_the_ring_keeps_the_newest_rows_and_has_no_gaps():
    """Seven generations into room for five: none of the rows that can be drawn is empty."""
    cfg, _, _, data = setup(generations=5, rollout_batch=4, rollout_length=2)
    ring = mopo.blank_ring(jax.tree.map(lambda x: x[:1], data), cfg)
    capacity = len(ring.rows.reward)
    assert capacity == 40
    write, written = jax.jit(mopo.write_ring), []
    rng, number = np.random.default_rng(0), 0
    for _ in range(14):
        alive = rng.random(4) < 0.8
        numbers = number + np.arange(1.0, 5.0)
        column = jnp.asarray(numbers, jnp.float32)
        wide = jnp.broadcast_to(column[:, None], (4, 3))
        rows = mopo.ModelRows(wide, wide[:, :2], column, wide, column)
        ring = write(ring, rows, alive)
        written += list(numbers[alive])
        number += 4
        filled = int(ring.filled)
        assert filled == min(len(written), capacity)
        newest = written[-capacity:]
        assert sorted(np.asarray(ring.rows.reward)[:filled].tolist()) == newest
        assert int(ring.position) == len(written) % capacity
    for column in ring.rows:
        assert (np.asarray(column).reshape(capacity, -1)[:, 0] == ring.rows.reward).all()


def test_rollouts_come_at_their_steps_and_batches_have_their_share_of_the_data():
    cfg, state, key, data = setup(model_updates=8, real_ratio=0.25, rollout_every=2)
    data = data._replace(reward=np.full_like(data.reward, 1000.0))
    state = state._replace(ring=mopo.blank_ring(jax.tree.map(lambda x: x[:1], data), cfg))
    update = program(mopo.update)
    filled = []
    for step in range(8, 12):
        state, _ = update(state, step, jax.random.clone(key), data, cfg=cfg)
        filled.append(int(state.ring.filled))
    assert filled == [18, 18, 36, 36]
    batch = program(mopo.mixed_batch)(state, data, jax.random.clone(key), cfg=cfg)
    assert (np.asarray(batch.reward) == 1000).sum() == 8 and len(batch.reward) == 32
    assert (batch.reward[:8] == 1000).all()
    known = np.asarray(state.ring.rows.reward)[:36]
    assert np.isin(np.asarray(batch.reward)[8:], known).all()


# --- SAC on model rows --------------------------------------------------------------------------
def test_losses_equal_numpy():
    cfg, state, key, data = setup()
    batch = mopo.ModelRows(*[getattr(data, name) for name in mopo.ModelRows._fields])
    noise = double(jax.random.normal(jax.random.clone(key), (32, 2)))
    temperature, rows = np.exp(-0.7), double(batch)
    actor, critic = double(state.actor.params), double(state.critic.params)

    def sampled(params, observation):
        mean, log_std = numpy_actor(params, observation)
        x = mean + np.exp(log_std) * noise
        log_prob = nets.log_normal(x, mean, log_std) + 2 * np.log(np.cosh(x)).sum(axis=-1)
        return np.tanh(x), log_prob

    def of_critics(params):
        action, log_prob = sampled(actor, rows.next_observation)
        q = nets.critics(double(state.critic.target_params), rows.next_observation, action)
        following = q.min(axis=0) - temperature * log_prob
        target = rows.reward + cfg.discount * np.where(rows.termination, 0, following)
        q = nets.critics(params, rows.observation, rows.action)
        return sum(((member - target) ** 2).mean() for member in q)

    def of_actor(params):
        action, log_prob = sampled(params, rows.observation)
        q = nets.critics(critic, rows.observation, action).min(axis=0)
        return (temperature * log_prob - q).mean()

    for loss, net, of in (
        (mopo.critic_loss, state.critic, of_critics),
        (mopo.actor_loss, state.actor, of_actor),
    ):
        found, _, grads = nets.compiled(loss)(net.params, state, batch, key, cfg)
        params = double(net.params)
        np.testing.assert_allclose(found, of(params), rtol=1e-4)
        for direction in directions(params, 2):
            expected = slope(of, params, direction)
            np.testing.assert_allclose(dot(grads, direction), expected, rtol=2e-3)
    _, log_prob = sampled(actor, rows.observation)
    params, key = state.log_temperature.params, jax.random.clone(key)
    loss = mopo.temperature_loss(params, state, batch, key, cfg)[0]
    np.testing.assert_allclose(loss, -0.7 * (2 - log_prob.mean()), rtol=1e-4)


# --- Ends of envs, bad input --------------------------------------------------------------------
def rows_of_width(width, **columns):
    return probes.random_transitions(observation_dim=width, **columns)


def test_ends_are_those_of_hopper():
    low, high = envs.healthy_range(Hopper, rows_of_width(11))
    state = setup()[1]._replace(healthy=(low, high))
    fine = np.zeros(11, np.float32)
    fine[0] = 1.2
    rows = np.stack([fine] * 7)
    rows[1, 0] = 0.69  # too low
    rows[2, 1] = 0.21  # leans too far
    rows[3, 1] = -0.21
    rows[4, 5] = 101  # a speed out of range
    rows[5, 7] = np.inf
    rows[6, 0] = 99
    with jax.debug_nans(False):
        found = mopo.ends(state, jnp.asarray(rows))
    assert np.asarray(found).tolist() == [0, 1, 1, 1, 1, 1, 0]


def test_unknown_ends_are_told_where_recorded_episodes_terminate(capsys):
    low, high = envs.healthy_range(None, rows_of_width(4, termination=0.0))
    assert (low == -LARGEST).all() and (high == LARGEST).all()
    assert (envs.healthy_range(Hopper, rows_of_width(11))[0] > -LARGEST).all()
    assert capsys.readouterr().err == ""
    made_with_other_options = rows_of_width(12, termination=1.0)
    low, _ = envs.healthy_range(Hopper, made_with_other_options)
    assert (low == -LARGEST).all()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("WARNING: 32 recorded episodes terminate, but when Hopper ends an ")
    envs.healthy_range(None, rows_of_width(4, termination=1.0))
    assert "but when its env ends an episode is known here for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--num-elites", "4"], "at most --num-models, 3"),
        (["--model-decays", "1e-4"], "give 2 numbers"),
        (["--data", "host"], "supports neither"),
        (["--model-updates", "24"], "counts the --model-updates 24 as well"),
        (["--model-updates", "6"], "no multiple of --log-every 4"),
        (["--real-ratio", "1.5"], "a number from 0 to 1"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    argv = ["--dataset", runs.write_hdf5("data.hdf5"), *runs.tiny("mopo"), *flags]
    with pytest.raises(SystemExit) as leave:
        runs.start("mopo", argv)
    line = capsys.readouterr().err
    assert leave.value.code == 2 and line.count("\n") == 1 and said in line
    assert not (tmp_path / "runs").exists()

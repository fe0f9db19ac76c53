# SPDX-License-Identifier: Apache-2.0
"""COMBO's conservative critics and rollouts against NumPy, hand-worked numbers and mopo.py.

The dynamics, the ring and the batches are those of mopo.py, see test_mopo.py.
"""

import functools
import shutil
from pathlib import Path

import helpers_runs as runs
import jax
import jax.numpy as jnp
import numpy as np
import numpy_nets as nets
import probes
import pytest
from numpy_nets import directions, dot, double, slope

from algorithms import combo, mopo
from common import experiment
from common.experiment import checkpoints

SMALL = {"batch_size": 32, "hidden": (16, 16), "model_hidden": (8, 8), "rollout_batch": 6}
SMALL |= {"rollout_length": 2, "generations": 2, "num_samples": 3, "real_ratio": 0.25}
KEY = jax.random.key(1)


@functools.partial(jax.jit, static_argnums=4)
def program(params, state, batch, key, cfg):
    return jax.value_and_grad(combo.critic_loss, has_aux=True)(params, state, batch, key, cfg)


def critic_loss(params, state, batch, key, cfg):
    """-> loss, metrics, gradient"""
    (loss, metrics), grads = program(params, state, batch, jax.random.clone(key), cfg)
    return float(loss), metrics, grads


def random_tree(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.5 * rng.standard_normal(x.shape), x.dtype), tree)


def setup(**overrides):
    """(cfg, state with random parameters, batch: 8 rows of the data and 24 of the model)"""
    cfg = probes.config(combo, **(SMALL | overrides))
    data = probes.random_transitions()
    state = jax.eval_shape(functools.partial(combo.create_state, cfg=cfg), KEY, data)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
    critic_params, target_params = (random_tree(state.critic.params, seed) for seed in (2, 3))
    statistics = jnp.zeros(5), jnp.ones(5)
    state = state._replace(
        actor=state.actor.replace(params=random_tree(state.actor.params, 1)),
        critic=state.critic.replace(params=critic_params, target_params=target_params),
        log_temperature=state.log_temperature.replace(params={"log": jnp.float32(-0.7)}),
        dynamics=state.dynamics.replace(params=random_tree(state.dynamics.params, 4)),
        fit=state.fit._replace(input_statistics=statistics, elites=jnp.array([2, 0])),
        healthy=(jnp.array([-0.9, -9, -9]), jnp.array([1.1, 9, 9])),
    )
    batch = combo.ModelRows(*[getattr(data, name) for name in combo.ModelRows._fields])
    return cfg, state, batch


def numpy_sample(params, observation, noise):
    """Actions of pi and the logs of their densities."""
    layers, x = params["params"], observation
    for i in range(len(layers) - 2):
        x = np.maximum(nets.dense(layers[f"Dense_{i}"], x), 0)
    mean = nets.dense(layers[f"Dense_{len(layers) - 2}"], x)
    log_std = np.clip(nets.dense(layers[f"Dense_{len(layers) - 1}"], x), -5, 2)
    x = mean + np.exp(log_std) * noise
    return np.tanh(x), nets.log_normal(x, mean, log_std) + 2 * np.log(np.cosh(x)).sum(axis=-1)


def numpy_critic_loss(params, state, batch, key, cfg):
    """Row by row and critic by critic."""
    key_next, key_actions = jax.random.split(jax.random.clone(key))
    keys = jax.random.split(key_actions, 3)
    actor, size = double(state.actor.params), len(batch.reward)
    noise = double(jax.random.normal(key_next, (size, 2)))
    next_action, _ = numpy_sample(actor, batch.next_observation, noise)
    target_params = double(state.critic.target_params)
    next_q = nets.critics(target_params, batch.next_observation, next_action).min(axis=0)
    target = batch.reward + cfg.discount * np.where(batch.termination, 0, next_q)
    q = nets.critics(params, batch.observation, batch.action)

    num_real = int(cfg.real_ratio * size)
    pushed = range(num_real if cfg.rho == "model" else 0, size)
    shape = len(pushed), cfg.num_samples, 2
    uniform = double(jax.random.uniform(keys[0], shape, minval=-1.0, maxval=1.0))
    here, there = (double(jax.random.normal(k, shape)) for k in keys[1:])
    total = 0.0
    for k in range(len(q)):
        soft_maxima = []
        member = jax.tree.map(lambda x, k=k: x[k], params)
        for i, row in enumerate(pushed):
            terms = []
            for n in range(cfg.num_samples):
                observation, following = batch.observation[row], batch.next_observation[row]
                drawn = [(uniform[i, n], np.log(0.25))]  # the density in [-1, 1]^2
                drawn.append(numpy_sample(actor, observation, here[i, n]))
                drawn.append(numpy_sample(actor, following, there[i, n]))
                terms += [nets.value(member, observation, a) - log_p for a, log_p in drawn]
            soft_maxima.append(np.log(np.sum(np.exp(terms))))
        gap = np.mean(soft_maxima) - np.mean(q[k, :num_real])
        total += np.mean((q[k] - target) ** 2) + cfg.conservative_weight * gap
    return total


@pytest.mark.parametrize("rho", ["mixed", "model"])
def test_critic_loss_and_gradient_equal_numpy(rho):
    """The gradient goes through the soft maximum over the model's states as well."""
    cfg, state, batch = setup(rho=rho, conservative_weight=2.0)
    loss, _, grads = critic_loss(state.critic.params, state, batch, KEY, cfg)
    params, rows = double(state.critic.params), double(batch)
    of = functools.partial(numpy_critic_loss, state=state, batch=rows, key=KEY, cfg=cfg)
    np.testing.assert_allclose(loss, of(params), rtol=1e-4)
    for direction in directions(params, 2):
        np.testing.assert_allclose(dot(grads, direction), slope(of, params, direction), rtol=2e-3)


def test_a_constant_critic_is_pushed_neither_up_nor_down():
    """Q = c: up by the data's rows as much as down by the sampled ones. A soft maximum without a
    gradient would leave the first alone and raise all values."""
    cfg, state, batch = setup(conservative_weight=1e3, discount=0.5)

    def constant(params, observation, action):
        return jnp.full((1, *action.shape[:-1]), params[0])

    critic = nets.linear_net(combo.TrainState.create, constant, [3.0], [3.0])
    batch = batch._replace(reward=jnp.full(32, 3.0), termination=jnp.ones(32))
    state = state._replace(critic=critic)
    loss, _, gradient = critic_loss(critic.params, state, batch, KEY, cfg)
    np.testing.assert_allclose(gradient, 0, atol=1e-3)
    assert loss > 1e3 * np.log(0.25)  # the term itself is there


def test_the_backup_has_no_entropy_and_stops_at_terminations():
    cfg, state, batch = setup(conservative_weight=0.0)
    check = functools.partial(critic_loss, state.critic.params)
    other = state.log_temperature.replace(params={"log": jnp.float32(2.0)})
    other = state._replace(log_temperature=other)
    assert check(state, batch, KEY, cfg)[0] == check(other, batch, KEY, cfg)[0]
    moved = batch._replace(next_observation=batch.next_observation + 1)
    assert check(state, batch, KEY, cfg)[0] != check(state, moved, KEY, cfg)[0]
    batch, moved = (x._replace(termination=np.ones(32, np.float32)) for x in (batch, moved))
    assert check(state, batch, KEY, cfg)[0] == check(state, moved, KEY, cfg)[0]


def test_rollouts_are_mopos_without_the_penalty():
    cfg, state, batch = setup()
    same = probes.config(mopo, **SMALL, penalty_weight=0.0)
    keys = [jax.random.clone(KEY) for _ in range(2)]
    rows = combo.unpenalised_step(state, batch.observation[:6], keys[0], cfg)
    expected = mopo.penalised_step(state, batch.observation[:6], keys[1], same)
    for x, y in zip(rows, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


@pytest.mark.parametrize("ratio", ["0.1", "1.0"])
def test_a_batch_without_rows_of_one_kind_is_refused(tmp_path, monkeypatch, capsys, ratio):
    monkeypatch.chdir(tmp_path)
    argv = ["--dataset", runs.write_hdf5("data.hdf5"), *runs.tiny("combo"), "--real-ratio", ratio]
    with pytest.raises(SystemExit) as leave:
        runs.start("combo", argv)
    line = capsys.readouterr().err
    assert leave.value.code == 2 and line.count("\n") == 1 and "of 4 rows of a batch" in line
    assert not (tmp_path / "runs").exists()


# --- One fit for several files ------------------------------------------------------------------
@pytest.fixture
def runs_of(tmp_path, monkeypatch):
    """A function that starts a run whose State is drawn at random and stays so: no compilation."""
    monkeypatch.chdir(tmp_path)
    data = runs.write_hdf5("data.hdf5")

    def over_seeds(chunk, update=None):
        def train(state, keys, start, data):
            lanes = jax.vmap(chunk, (0, 0, None, None))
            _, metrics = jax.eval_shape(lanes, state, keys, start, data)
            return state, {name: np.zeros(x.shape) for name, x in metrics.items()}

        return train

    monkeypatch.setattr(experiment, "over_seeds", over_seeds)
    for module in (mopo, combo):
        create = functools.partial(drawn_state, module.create_state, module.__name__)
        monkeypatch.setattr(module, "create_state", create)

    def run(name, *flags):
        """-> its State, which no update changes, by name"""
        argv = ["--dataset", data, *runs.tiny(name), "--num-updates", "8", "--name", "x", *flags]
        runs.start(name, [*argv, "--eval-every", "4", "--eval-episodes", "1"])
        return checkpoints.read(checkpoints.manager(tmp_path / f"runs/{name}/data/x"), 8)[0]

    return run


def drawn_state(create, name, key, batch, cfg, healthy):
    rng = np.random.default_rng(len(name))

    def draw(x):
        integers = np.issubdtype(x.dtype, np.integer)
        numbers = rng.integers(0, 2, x.shape) if integers else rng.uniform(0.5, 1.0, x.shape)
        return jnp.asarray(numbers, x.dtype)

    shapes = jax.eval_shape(lambda key: create(key, batch, cfg, healthy), key)
    return jax.tree.map(draw, shapes)


def test_a_fit_of_dynamics_is_shared(runs_of, capsys):
    """combo.py takes the dynamics of mopo.py's run, with their record, and nothing else."""
    there = runs_of("mopo")
    own = runs_of("combo")
    origin = ("--start-from", "runs/mopo/data/x", "--model-updates", "0")
    shutil.rmtree("runs/combo")
    capsys.readouterr()
    here = runs_of("combo", *origin)
    assert "begins with the dynamics of runs/mopo/data/x at update 8" in capsys.readouterr().out
    for name, array in here.items():
        is_fit = name.startswith(("dynamics.params", "fit."))
        assert np.array_equal(array, (there if is_fit else own)[name]), name
    differ = [name for name in here if not np.array_equal(there[name], own[name])]
    assert {name.split(".")[0] for name in differ} >= {"dynamics", "fit", "actor", "critic"}


def test_a_fit_that_has_not_ended_or_is_not_there_is_refused(runs_of, capsys):
    def refused(name, *flags):
        with pytest.raises(SystemExit) as leave:
            runs_of(name, *flags)
        line = capsys.readouterr().err
        assert leave.value.code == 2 and line.count("\n") == 1
        return line

    assert "take those of another run" in refused("mopo", "--model-updates", "0")
    runs_of("mopo")
    config = Path("runs/mopo/data/x/config.yaml")  # as if more had been asked for
    config.write_text(config.read_text().replace("model_updates: 4", "model_updates: 12"))
    start = ("--start-from", "runs/mopo/data/x")
    line = refused("combo", *start, "--model-updates", "0")
    assert "at update 8, and the fit of its dynamics ends at 12" in line
    shutil.rmtree("runs/combo")
    runs_of("combo", *start)  # the fit goes on
    line = refused("sac", *start, "--online-updates", "0")
    assert "a run of mopo; sac begins with its own runs only" in line

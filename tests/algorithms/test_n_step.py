# SPDX-License-Identifier: Apache-2.0
"""`n_step` of fql, iql and rebrac: the rows, the TD targets and both phases, against NumPy."""

import dataclasses
import json
import types

import helpers_runs as runs
import jax
import jax.numpy as jnp
import numpy as np
import numpy_nets as nets
import probes
import pytest
from numpy_nets import double

from algorithms import fql, iql, rebrac
from common import datasets, experiment, interaction

FILES = [fql, iql, rebrac]
DISCOUNT = 0.9


def random_episodes(rng):
    """A data set of up to ten episodes; some end, some are cut, some go on after a termination."""
    lengths = rng.integers(1, 9, rng.integers(1, 10))
    ends = np.cumsum(lengths)
    termination = rng.random(ends[-1]) < 0.1
    termination[ends - 1] |= rng.random(len(ends)) < 0.5
    truncation = np.zeros(ends[-1], bool)
    truncation[ends - 1] = ~termination[ends - 1]
    ended = {"termination": termination, "truncation": truncation}
    rows = probes.random_transitions(ends[-1], 3, 2, **ended)
    return datasets.Dataset("toy", rows, ends, np.zeros(len(ends)))


def by_a_loop(rows, over, n):
    """[(reward, last row, discount)] of each row in float64. `over`: an episode ends there."""
    rows, returns = double(rows), []
    for i in range(len(rows.reward)):
        total, k = rows.reward[i], 0
        while k < n - 1 and not over[i + k]:
            k += 1
            total += DISCOUNT**k * rows.reward[i + k]
        returns.append((total, i + k, DISCOUNT ** (k + 1)))
    return returns


def check(found, rows, over, n):
    for i, (reward, last, discount) in enumerate(by_a_loop(rows, over, n)):
        np.testing.assert_allclose(found.reward[i], reward, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.discount[i], discount, rtol=1e-6)
        assert found.termination[i] == rows.termination[last]
        for name in ("observation", "action"):
            assert np.array_equal(getattr(found, name)[i], getattr(rows, name)[i])
        for name in ("next_observation", "next_action"):
            assert np.array_equal(getattr(found, name)[i], getattr(rows, name)[last])
    assert all(column.dtype == np.float32 for column in found)


# --- Rows ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_rows_of_random_episodes(n):
    """A return ends at a termination, at a time limit and at the end of the recording."""
    rng = np.random.default_rng(n)
    short = 0
    for _ in range(10):
        dataset = random_episodes(rng)
        rows = dataset.transitions
        over = rows.termination + rows.truncation > 0
        over[-1] = True
        found = fql.n_step_rows(dataset, fql.Config(n_step=n, discount=DISCOUNT))
        check(found, rows, over, n)
        bootstraps = found.termination == 0
        short += np.sum(bootstraps & (found.discount > DISCOUNT**n + 1e-4))
    assert short  # some are cut and bootstrap from where they are cut


def test_one_step_is_the_row_itself():
    dataset = random_episodes(np.random.default_rng(0))
    found = iql.n_step_rows(dataset, iql.Config(n_step=1, discount=DISCOUNT))
    for name in ("reward", "next_observation", "next_action", "termination"):
        assert np.array_equal(getattr(found, name), getattr(dataset.transitions, name))
    assert (found.discount == np.float32(DISCOUNT)).all()


def test_rows_of_the_env_end_with_the_newest_one():
    """Every seed by itself; a row at the head bootstraps from the newest row."""
    columns = [probes.random_transitions(12, 3, 2, seed) for seed in (0, 1)]
    rows = datasets.Transitions(*(np.stack(pair, axis=1) for pair in zip(*columns, strict=True)))
    dataset = datasets.Dataset("toy", None, None, None)
    found = rebrac.online_rows(rows, dataset, rebrac.Config(n_step=4, discount=DISCOUNT))
    for seed in (0, 1):
        of_seed = datasets.Transitions(*(column[:, seed] for column in rows))
        over = of_seed.termination + of_seed.truncation > 0
        over[-1] = True
        check(rebrac.NStep(*(column[:, seed] for column in found)), of_seed, over, 4)
    same = rebrac.online_rows(rows, dataset, rebrac.Config())
    assert all(x is y for x, y in zip(same, rows, strict=True))


def test_the_buffer_holds_the_full_return_once_its_rows_are_there(tmp_path):
    """Two steps per refresh: all rows can be drawn at once, and they equal those of one recording.

    The last n rows are an exception: their returns and next actions are as far as they are known.
    """
    cfg = rebrac.Config(
        num_updates=0, online_updates=24, log_every=24, n_step=3, mixing_ratio=1.0, discount=0.9
    )
    dataset, filled = datasets.load("env/Pendulum-v1", None, 5), []

    def train_chunk(state, key, start, data, cfg):
        return state, {"reward": data.reward[jnp.arange(2)].mean()}

    def transform(rows):
        return rebrac.online_rows(rows, dataset, cfg)

    run = types.SimpleNamespace(
        cfg=cfg, dataset=dataset, folder=tmp_path, attach=lambda online: None
    )
    keys, explore_keys = experiment.streams(cfg.seeds, 2)
    one = datasets.Transitions(*(np.zeros((1, *x.shape[1:]), "f") for x in dataset.transitions))
    first = rebrac.n_step_rows(datasets.Dataset("toy", one, np.array([1]), np.zeros(1)), cfg)
    online = interaction.Interaction(
        run,
        first,
        lambda params, observation, key: params * observation[:, :1],
        explore_keys,
        lambda state: state,
        train_chunk,
        transform,
        look_ahead=3,
    )
    write = online._write
    online._write = lambda first: (write(first), filled.append(int(online.buffer.filled)))
    online.chunk(jnp.ones(1), keys, 0)
    assert filled == list(range(2, 25, 2))
    whole = jax.tree.map(lambda x: x[:, 0], transform(online._transitions(0)))
    for name, column in whole._asdict().items():
        assert np.array_equal(getattr(online.buffer.rows, name)[1:25], column), name


# --- Targets ------------------------------------------------------------------------------------
@pytest.mark.parametrize("module", FILES, ids=["fql", "iql", "rebrac"])
def test_a_target_bootstraps_with_the_discount_of_its_row(module):
    """The loss with n_step 5 at gamma^m is that of one step with cfg.discount gamma^m."""
    flow = {"flow_steps": 1} if module is fql else {}
    cfg, state, _, batch = nets.setup(module, n_step=5, **flow)
    batch = batch._replace(termination=jnp.zeros_like(batch.termination))
    columns = {x: getattr(batch, x) for x in module.NStep._fields if x != "discount"}
    noise = () if module is iql else (jax.random.key(0),)
    program = nets.compiled(module.critic_loss)

    def loss(cfg, rows):
        return float(program(state.critic.params, state, rows, *noise, cfg)[0])

    for count in (1, 3):
        discount = jnp.full_like(batch.reward, DISCOUNT**count)
        found = loss(cfg, module.NStep(**columns, discount=discount))
        one_step = dataclasses.replace(cfg, n_step=1, discount=DISCOUNT**count)
        np.testing.assert_allclose(found, loss(one_step, batch), rtol=1e-6)
    ended = columns | {"termination": jnp.ones_like(batch.reward)}
    found = loss(cfg, module.NStep(**ended, discount=jnp.full_like(batch.reward, 7.0)))
    again = loss(cfg, module.NStep(**ended, discount=jnp.zeros_like(batch.reward)))
    assert found == again


# --- Runs ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", runs.slow_but(["fql", "iql", "rebrac"], []))
def test_host_data_and_an_online_phase_that_grows(name, tmp_path):
    """With --data host the offline numbers are the same; a longer online phase is one long run."""
    facts = {"env_id": "Pendulum-v1", "max_episode_steps": 5}
    data = runs.write_hdf5(tmp_path / "data.hdf5", attributes=facts)
    argv = ["--dataset", data, *runs.tiny(name), "--n-step", "3", "--num-updates", "8"]
    argv += ["--eval-every", "8", "--eval-episodes", "1", "--runs-dir", str(tmp_path)]
    runs.start(name, [*argv, "--name", "device"])
    runs.start(name, [*argv, "--name", "host", "--data", "host"])
    runs.start(name, [*argv, "--name", "whole", "--online-updates", "16"])
    runs.start(name, [*argv, "--name", "grown", "--online-updates", "8"])
    runs.start(name, [*argv, "--name", "grown", "--online-updates", "16", "--resume"])
    folder = tmp_path / name / "data"
    for one, other in (("device", "host"), ("whole", "grown")):
        for file in {x.name for x in (folder / one).glob("*.rows")} | {"metrics.csv"}:
            assert (folder / one / file).read_bytes() == (folder / other / file).read_bytes()
    assert json.loads((folder / "whole" / "result.json").read_text())["env_steps"] == 16

# SPDX-License-Identifier: Apache-2.0
"""The online phase of every file that begins on a data set: resuming, rows, scores, bad input."""

import dataclasses
import json
import shutil
import types

import gymnasium
import helpers_runs as runs
import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest

from algorithms import awac, cql, fql, iql, rebrac, td3_bc
from common import datasets, experiment, interaction
from common.experiment import buffers, growth

LIMIT = 5  # steps per episode of Slide
FILES = ["rebrac", "td3_bc", "iql", "awac", "cql", "fql"]


class Slide(gymnasium.Env):
    """A point that an action moves. It succeeds on the right; far to the left it breaks."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-2, 2, (1,), np.float32)
    breaks = False

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.normal(size=3).astype(np.float32)
        self.steps = 0
        return self.position.copy(), {}

    def step(self, action):
        self.steps += 1
        self.position += np.float32(0.1) * action
        if self.breaks and self.steps == 3:
            self.position[1] = np.nan
        success = bool(self.position[0] > 0)
        reward = float(self.position[0])
        return self.position.copy(), reward, False, False, {"success": success}


if "Slide-v0" not in gymnasium.registry:
    gymnasium.register("Slide-v0", Slide, max_episode_steps=LIMIT)

BOTH = ["--num-updates", "8", "--online-updates", "8", "--eval-every", "8", "--eval-episodes", "1"]


@pytest.fixture
def data(tmp_path):
    facts = {"env_id": "Slide-v0", "max_episode_steps": LIMIT}
    facts |= {"ref_min_score": 0.0, "ref_max_score": 10.0}
    return runs.write_hdf5(tmp_path / "data.hdf5", attributes=facts)


def arguments(name, data, folder):
    return ["--dataset", data, *runs.tiny(name), *BOTH, "--runs-dir", str(folder)]


# --- Over all files -----------------------------------------------------------------------------
@pytest.mark.parametrize("name", FILES)
def test_a_resumed_run_equals_an_undisturbed_one(name, data, tmp_path, monkeypatch, capsys):
    """Stopped in the online phase; one file also before it. All rows and metrics are equal."""
    argv = arguments(name, data, tmp_path)
    resumed = ["at12", "at8"] if name == "rebrac" else ["at12"]
    folder, log, states = tmp_path / name / "data", experiment.Run.log, {}

    def copied(run, step, *args):
        log(run, step, *args)
        if run.folder.name == "whole" and step in (8, 12):
            shutil.copytree(run.folder, run.folder.with_name(f"at{step}"))
        states[run.folder.name, step] = probes.leaves(run.divergence.last_state)

    monkeypatch.setattr(experiment.Run, "log", copied)
    for each in ("whole", *resumed):
        runs.start(name, [*argv, "--name", each, "--resume"])
    said = capsys.readouterr().out
    assert all(f"resuming at update {each[2:]}" in said for each in resumed)
    assert said.count("offline score ") == said.count("regret of the online phase")
    assert said.count("offline score ") == 1 + len(resumed)
    for other in resumed:
        for file in ("metrics.csv", interaction.FILE):
            assert (folder / other / file).read_bytes() == (folder / "whole" / file).read_bytes()
        for x, y in zip(states[other, 16], states["whole", 16], strict=True):
            assert np.array_equal(x, y)
        results = [json.loads((folder / x / "result.json").read_text()) for x in ("whole", other)]
        for key in ("score", "offline_score", "regret", "regret_mean"):
            assert results[0][key] == results[1][key]
    moved = [
        not np.array_equal(*x) for x in zip(states["whole", 16], states["whole", 8], strict=True)
    ]
    assert sum(moved) > len(moved) / 2


# --- The updates of the online phase ------------------------------------------------------------
def mixed_data(recorded=7, own=3):
    """`Apart` of one seed: rewards 0, 1, ... in the data set and 100, 101, ... of the env."""
    data = probes.random_transitions(recorded, 3, 1, reward=np.arange(recorded))
    new = probes.random_transitions(own, 3, 1, seed=1, reward=100 + np.arange(own))
    buffer = buffers.empty(jax.device_put(data), 1, own + 2, apart=True)
    buffer = buffers.write(buffer, jax.tree.map(lambda x: x[:, None], new), 0)
    return buffer.of_seed(0)


def test_a_mixed_batch_has_its_share_of_new_rows():
    for ratio, own in ((0.5, 500), (0.25, 250), (0.0, 0), (1.0, 1000)):
        cfg = rebrac.Config(batch_size=1000, mixing_ratio=ratio)
        batch = rebrac.sample_mixed(mixed_data(), jax.random.key(0), cfg)
        reward = np.asarray(batch.reward, int)
        assert batch.observation.shape == (1000, 3)
        assert (reward[: -own or None] < 7).all() and (reward[1000 - own :] >= 100).all()
        drawn = set(range(7)) if own < 1000 else set()
        assert set(reward.tolist()) == drawn | ({100, 101, 102} if own else set())


def test_apart_each_seed_has_its_own_rows():
    data = probes.random_transitions(4, 2, 1)
    new = probes.random_transitions(6, 2, 1, seed=1)
    by_step = jax.tree.map(lambda x: x.reshape(3, 2, *x.shape[1:]), new)
    buffer = buffers.write(buffers.empty(jax.device_put(data), 2, 5, apart=True), by_step, 0)
    numbers = np.arange(12)
    for seed in (0, 1):
        found = buffer.of_seed(seed)
        assert np.array_equal(found.recorded.action[numbers], data.action[numbers % 4])
        assert np.array_equal(found.own.action[numbers], by_step.action[numbers % 3, seed])


@pytest.mark.parametrize(
    ("step", "share"), [(1000, 1.0), (1200, 0.8), (1499, 0.501), (1500, 0.5), (2400, 0.5)]
)
def test_rebrac_decays_its_actor_penalty(step, share, monkeypatch):
    """beta_1 max(floor, 1 - t / T) with t counted from the first online update; beta_2 at once."""
    cfg = rebrac.Config(num_updates=1000, penalty_decay_updates=1000, actor_penalty=0.4)
    seen = []
    monkeypatch.setattr(rebrac, "update", lambda *args, mixed: seen.append((args[-1], mixed)))
    rebrac.online_update(None, np.int32(step), None, None, cfg)
    ((used, mixed),) = seen
    np.testing.assert_allclose(used.actor_penalty, 0.4 * share, rtol=1e-6)
    assert used.critic_penalty == 0.0 and mixed
    assert dataclasses.replace(used, actor_penalty=0.4, critic_penalty=1.0) == cfg


def test_rebrac_may_still_train_longer_offline():
    """The decay counts from `num_updates`, but an offline run does not depend on that."""
    file = rebrac.__file__
    assert growth.length_dependence(file, rebrac.Config()) is None
    assert growth.length_dependence(file, rebrac.Config(), "online_updates") is None


def test_iql_learns_at_its_full_rate_online(monkeypatch):
    given = []
    monkeypatch.setattr(iql.optax, "adam", given.append)
    monkeypatch.setattr(iql.State, "__new__", lambda *args, **kwargs: None)
    monkeypatch.setattr(iql.TrainState, "create", lambda *args: None)
    monkeypatch.setattr(iql.train_state.TrainState, "create", lambda **kwargs: None)
    cfg = iql.Config(num_updates=100, hidden=(4,), actor_learning_rate=0.5)
    iql.create_state(jax.random.key(0), probes.random_transitions(1, 3, 1), cfg)
    counts = np.array([0, 25, 50, 99, 100, 101, 1000])
    expected = np.where(counts < 100, 0.25 * (1 + np.cos(np.pi * counts / 100)), 0.5)
    np.testing.assert_allclose([given[0](x) for x in counts], expected, rtol=1e-5, atol=1e-7)


# --- The rows of the env ------------------------------------------------------------------------
def env_rows():
    """[4, 2, ...], as Interaction passes them."""
    rows = probes.random_transitions(8, 3, 1)
    return jax.tree.map(lambda x: x.reshape(4, 2, *x.shape[1:]), rows)


STATISTICS = np.array([1.0, -2.0, 0.5]), np.array([2.0, 0.5, 1.0])


@pytest.mark.parametrize(
    ("module", "cfg", "more", "scale", "shift"),
    [
        (td3_bc, {}, {}, 1.0, 0.0),  # its loss adds reward_shift, to all rows
        (iql, {"reward_shift": -1.0}, {"reward_scale": 3.0}, 3.0, -3.0),
        (awac, {"reward_shift": -1.0}, {}, 1.0, -1.0),
        (cql, {"reward_scale": 10.0, "reward_shift": -5.0}, {}, 10.0, -5.0),
        (fql, {"reward_shift": -1.0}, {}, 1.0, -1.0),
    ],
    ids=["td3_bc", "iql", "awac", "cql", "fql"],
)
def test_new_rows_are_like_those_of_the_data(module, cfg, more, scale, shift):
    rows = env_rows()
    rows.action[0] = 1.0
    if module is not td3_bc:
        more = more | {"cfg": module.Config(**cfg)}
    mean, std = STATISTICS if module is not fql else (0.0, 1.0)
    if module is not fql:
        more = more | {"statistics": STATISTICS}
    new = module.online_rows(rows, **more)
    np.testing.assert_allclose(new.reward, scale * rows.reward + shift, rtol=1e-6, atol=1e-6)
    for name in ("observation", "next_observation"):
        expected = (getattr(rows, name) - mean) / std
        np.testing.assert_allclose(getattr(new, name), expected, rtol=1e-6)
    if module in (iql, fql):
        assert np.abs(new.action).max() == np.float32(1 - 1e-5)
    else:
        assert np.array_equal(new.action, rows.action)
    for name in ("termination", "truncation", "next_action"):
        assert np.array_equal(getattr(new, name), getattr(rows, name))


# --- Exploration --------------------------------------------------------------------------------
def test_exploration():
    """Drawn actions have the policy's mean and std, clipped; without noise they are its own."""
    observation = np.zeros((20_000, 3), np.float32)
    nothing = (0.0, 1.0)

    def key():
        return jax.random.key(0)

    def network(params, observation):
        return jnp.broadcast_to(params, (len(observation), 1))

    def gaussian(params, observation):
        mean = network(params, observation)
        return mean, jnp.full_like(mean, jnp.log(0.3))

    for module, params in ((rebrac, 0.2), (td3_bc, (0.2, nothing))):
        cfg = module.Config(exploration_noise=0.1)
        action = module.explore(network, params, observation, key(), cfg)
        np.testing.assert_allclose([action.mean(), action.std()], [0.2, 0.1], atol=0.003)
        cfg = module.Config(exploration_noise=0.0)
        assert (module.explore(network, params, observation, key(), cfg) == jnp.float32(0.2)).all()
    for module in (iql, awac):
        more = () if module is awac else (iql.Config(),)
        action = module.explore(gaussian, (0.1, nothing), observation, key(), *more)
        np.testing.assert_allclose([action.mean(), action.std()], [0.1, 0.3], atol=0.008)
        action = module.explore(gaussian, (0.9, nothing), observation, key(), *more)
        assert action.max() == 1.0
    cfg = iql.Config(fixed_std=0.1)
    assert abs(iql.explore(gaussian, (0.1, nothing), observation, key(), cfg).std() - 0.1) < 0.003
    cfg = iql.Config(deterministic=True)
    assert (
        iql.explore(gaussian, (0.1, nothing), observation, key(), cfg) == jnp.float32(0.1)
    ).all()
    action = cql.explore(gaussian, (0.1, nothing), observation, key())
    assert action.shape == (20_000, 1)
    drawn = jnp.arctanh(action)
    np.testing.assert_allclose([drawn.mean(), drawn.std()], [0.1, 0.3], atol=0.008)


# --- Scores and regret --------------------------------------------------------------------------
def online_of(reports_success, low=0.0, high=10.0):
    """An Interaction of two seeds, as `regret` reads it."""
    cfg = types.SimpleNamespace(seeds=(0, 1))
    dataset = datasets.Dataset("x", None, None, None, ref_min_score=low, ref_max_score=high)
    numbers = {"over": [4, 5], "successes": [1, 5], "sum_of_returns": [8.0, 50.0]}
    return types.SimpleNamespace(
        cfg=cfg, dataset=dataset, envs=[1], reports_success=reports_success, **numbers
    )


def test_regret():
    """1 - success of the phase's episodes as in CORL, else 1 - score / 100; NaN where unknown."""
    regret = interaction.Interaction.regret
    np.testing.assert_allclose(regret(online_of(True)), [0.75, 0.0])
    np.testing.assert_allclose(regret(online_of(False)), [0.8, 0.0])
    assert np.isnan(regret(online_of(False, None, None))).all()
    online = online_of(True)
    online.over, online.successes = [0, 5], [0, 4]
    np.testing.assert_allclose(regret(online), [np.nan, 0.2])


# --- Bad input ----------------------------------------------------------------------------------
def refused(capsys, name, argv):
    """The one line with which a start ends, code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as leave:
        runs.start(name, argv)
    assert leave.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_number_that_is_not_finite_is_one_line(data, tmp_path, monkeypatch, capsys):
    """In the online phase, before anything is learnt from it."""
    argv = [*arguments("rebrac", data, tmp_path), "--name", "run"]
    chunk = interaction.Interaction.chunk

    def broken(*args):
        monkeypatch.setattr(Slide, "breaks", True)
        return chunk(*args)

    monkeypatch.setattr(interaction.Interaction, "chunk", broken)
    line = refused(capsys, "rebrac", argv)
    assert "env Slide-v0: a step's observation has in it nan at env step 3 of seed 0" in line
    assert not (tmp_path / "rebrac" / "data" / "run" / "result.json").exists()


BAD = [
    (["--steps-per-refresh", "1"], "is no multiple of policy_delay 2; 2 would be right"),
    (["--mixing-ratio", "1.5"], "--mixing-ratio 1.5: must be a number from 0 to 1"),
    (["--dataset", "env/Slide-v0", "--num-updates", "0"], "this method needs some to begin"),
    (["--env", "CartPole-v1"], "CartPole-v1"),
    (["--data", "host"], "without --data host"),
]


@pytest.mark.parametrize(("flags", "words"), BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_bad_input_is_one_line(flags, words, data, tmp_path, capsys):
    line = refused(capsys, "rebrac", [*arguments("rebrac", data, tmp_path / "runs"), *flags])
    assert words in line
    assert not (tmp_path / "runs").exists()

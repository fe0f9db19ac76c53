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

from algorithms import awac, cql, fql, iql, qc, rebrac, td3_bc
from common import datasets, experiment, interaction
from common.experiment import buffers, config, growth

LIMIT = 5  # steps per episode of Slide
FILES = ["rebrac", "td3_bc", "iql", "awac", "cql", "cal_ql", "wsrl", "fql", "qc", "online_dt"]


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
@pytest.mark.parametrize("name", runs.slow_but(FILES, ["rebrac", "online_dt"]))
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


@pytest.mark.parametrize("name", FILES)
def test_a_run_may_go_on_online_and_then_for_longer(name):
    """No number of the offline phase depends on the online one, nor an online one on its length."""
    module = runs.module(name)
    cfg = module.Config(online_updates=1000)
    assert growth.length_dependence(module.__file__, cfg, "online_updates") is None
    if name != "iql":  # its cosine; ReBRAC's decay counts from `num_updates` in the online phase
        assert growth.length_dependence(module.__file__, cfg) is None


def test_settings_of_a_phase_that_is_not_there_do_not_name_a_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    flags = [[], ["--mixing-ratio", "0.25"], ["--online-updates", "1000"]]
    flags += [["--online-updates", "1000", "--mixing-ratio", "0.25"]]
    names = [config.run_folder(*config.parse(rebrac.Config, argv)).name for argv in flags]
    assert names[0] == names[1] and len(set(names)) == 3


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
    if module in (iql, fql):
        more = more | {"dataset": None}
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


def test_qc_makes_chunks_of_the_rows_and_leaves_those_to_come():
    """Chunks end with their episode; they equal those of a data set of the same rows."""
    rows = env_rows()
    for name, ends in (("termination", [1, 0, 0, 0]), ("truncation", [0, 0, 1, 0])):
        getattr(rows, name)[:] = np.array(ends)[:, None]
    cfg = qc.Config(horizon=2, discount=0.5, reward_shift=-1.0)
    chunks = qc.online_rows(rows, datasets.Dataset("toy", None, None, None), cfg)
    reward = rows.reward - 1.0
    for i in (0, 1):
        # Row 0 terminates, rows 1 and 2 are an episode that is cut, row 3 waits for a row 4.
        expected = [reward[0, i], reward[1, i] + 0.5 * reward[2, i], reward[2, i], reward[3, i]]
        np.testing.assert_allclose(chunks.reward[:, i], expected, rtol=1e-5, atol=1e-6)
        assert chunks.valid[:, i].tolist() == [[1, 0], [1, 1], [1, 0], [1, 0]]
        assert chunks.termination[:, i].tolist() == [1, 0, 0, 0]
        action = rows.action.clip(-1 + 1e-5, 1 - 1e-5)[:, i]
        assert np.array_equal(chunks.action[1, i], action[1:3].ravel())
        assert np.array_equal(chunks.next_observation[1, i], rows.next_observation[2, i])


def test_the_rows_of_an_ended_episode_are_given_once_more(tmp_path):
    """Two steps per refresh, episodes of five: after steps 6 and 10 the rows of five steps more."""
    given = []

    def transform(rows):
        given.append(rows.observation[:, 0, 0])
        return rows

    def train_chunk(state, key, start, data, cfg):
        return state, {"reward": data.reward[jnp.arange(2)].mean()}

    cfg = rebrac.Config(num_updates=0, online_updates=24, log_every=12)
    dataset = datasets.load("env/Slide-v0")
    run = types.SimpleNamespace(
        cfg=cfg, dataset=dataset, folder=tmp_path, attach=lambda online: None
    )
    keys, explore_keys = experiment.streams(cfg.seeds, 2)
    arguments = dataset.transitions, lambda params, observation, key: params * observation[:, :1]
    online = interaction.Interaction(
        run, *arguments, explore_keys, lambda state: state, train_chunk, transform, episodes=True
    )
    online.chunk(jnp.zeros(1), keys, 0)
    assert [len(x) for x in given] == [2, 3, 2 + 4, 3, 2 + 5, 3]
    assert np.array_equal(given[4], online.rows[3:10, 0, 0])  # the second episode is rows 5 to 9
    assert online.over == [2] and online.lengths == [2]


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
def regret(low, high, reports_success, score_is_success, over=(4, 5)):
    """Of two seeds whose episodes returned 8 and 50 in all and succeeded once and five times."""
    online = interaction.Interaction.__new__(interaction.Interaction)
    online.cfg, online.envs = types.SimpleNamespace(seeds=(0, 1)), [None]
    online.dataset = datasets.Dataset(
        "toy", None, None, None, None, None, low, high, score_is_success=score_is_success
    )
    online.over, online.sum_of_returns, online.successes = over, [8.0, 50.0], [1, 5]
    online.sum_of_returns = np.array(online.sum_of_returns)
    online.successes, online.reports_success = np.array(online.successes), reports_success
    return online.regret()


def test_regret():
    """1 - mean score / 100, by reference scores or success; NaN where a score is not normalised."""
    np.testing.assert_allclose(regret(0.0, 10.0, False, False), [0.8, 0.0])
    np.testing.assert_allclose(regret(0.0, 10.0, True, False), [0.8, 0.0])
    np.testing.assert_allclose(regret(None, None, True, True), [0.75, 0.0])
    np.testing.assert_allclose(regret(0.0, 10.0, True, False, over=(0, 5)), [np.nan, 0.0])
    assert np.isnan(regret(None, None, False, True)).all()  # the env reports no success
    assert np.isnan(regret(None, None, True, False)).all()  # the score is the return


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
    assert "env Slide-v0: a step's observation contains nan at env step 3 of seed 0" in line
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

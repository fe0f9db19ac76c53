# SPDX-License-Identifier: Apache-2.0
"""The online phase: rows of the envs, the buffer, both phases of a run, resuming, bad input."""

import dataclasses
import functools
import json
import shutil
import signal
import types
from pathlib import Path

import gymnasium
import helpers_runs as runs
import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from own_files import FILES, NAMES

from algorithms import sac
from common import datasets, experiment, interaction
from common.experiment import buffers, checkpoints, config, phases

LIMIT = 7  # steps per episode of Walk


class Walk(gymnasium.Env):
    """A walk that draws from its own generator at every step; it ends where it goes too far."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gymnasium.spaces.Box(-2, 2, (1,), np.float32)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.normal(size=3)
        return self.position.copy(), {}

    def step(self, action):
        self.position += 0.2 * action[0] + 0.1 * self.np_random.normal(size=3)
        reward = float(self.position[0] + action[0])
        return self.position.copy(), reward, bool(self.position[1] > 1.0), False, {}


class Forgetful(Walk):
    """The same, but no two episodes are alike, and all end at the limit."""

    count = 0

    def reset(self, *, seed=None, options=None):
        Forgetful.count += 1
        super().reset(seed=Forgetful.count)
        return self.position.copy(), {}

    def step(self, action):
        observation, reward, _, truncation, info = super().step(action)
        return observation, reward, False, truncation, info


for env in (Walk, Forgetful):
    if f"{env.__name__}-v0" not in gymnasium.registry:
        gymnasium.register(f"{env.__name__}-v0", env, max_episode_steps=LIMIT)

TINY = [*runs.tiny("sac"), "--eval-episodes", "1", "--eval-every", "8"]
ALONE = ["--dataset", "env/Walk-v0", "--num-updates", "0", "--random-steps", "5"]


def write_data(folder):
    facts = {"env_id": "Walk-v0", "max_episode_steps": LIMIT}
    facts |= {"ref_min_score": 0.0, "ref_max_score": 10.0}
    return runs.write_hdf5(folder / "data.hdf5", attributes=facts)


def rows_of(folder, seeds=1):
    """{name: [T, S, ...]}: what the run folder keeps of the online phase."""
    example = probes.random_transitions(1, 3, 1)
    width = interaction.columns(example)[1]
    steps = (Path(folder) / interaction.FILE).stat().st_size // (4 * width * seeds)
    return interaction.recorded(folder, example, seeds, steps)


def refused(capsys, argv, name="sac"):
    """The one line with which a start ends, code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as leave:
        runs.start(name, argv)
    assert leave.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


# --- The buffer ---------------------------------------------------------------------------------
def test_every_seed_reads_the_data_and_then_its_own_rows():
    data = jax.device_put(probes.random_transitions(5, 2, 1))
    new = probes.random_transitions(6, 2, 1, seed=1)
    new = jax.tree.map(lambda x: x.reshape(3, 2, *x.shape[1:]), new)  # 3 steps of 2 seeds
    buffer = buffers.empty(data, seeds=2, capacity=4)
    shapes = [x.shape for x in jax.tree.leaves(buffer.rows)]
    assert shapes[0] == (5 + 2 * 4, 2)
    numbers = np.arange(8)
    for name in ("observation", "reward"):  # nothing but the data so far
        column = getattr(buffer.of_seed(1), name)
        assert np.array_equal(column[numbers], getattr(data, name)[numbers % 5])
    buffer = buffers.write(buffer, new, 0)
    assert [x.shape for x in jax.tree.leaves(buffer.rows)] == shapes
    for seed in (0, 1):
        for name in probes.Transitions._fields:
            expected = np.concatenate([getattr(data, name), getattr(new, name)[:, seed]])
            column = getattr(buffer.of_seed(seed), name)
            assert np.array_equal(column[numbers], expected)
            assert np.array_equal(column[numbers + 8 * 1000], expected)  # any larger number, too
    last = jax.tree.map(lambda x: 2 * x[2:], new)
    buffer = buffers.write(buffer, last, 2)  # the last row again
    assert int(buffer.filled) == 3
    assert np.array_equal(buffer.of_seed(1).action[numbers[7:]], last.action[:, 1])


def test_all_rows_are_drawn_equally_often():
    data = jax.device_put(probes.random_transitions(5, 2, 1, reward=np.arange(5)))
    new = probes.random_transitions(2, 2, 1, reward=[5, 6])
    buffer = buffers.write(buffers.empty(data, 1, 3), jax.tree.map(lambda x: x[:, None], new), 0)
    cfg = sac.Config(batch_size=70_000)
    batch = sac.sample_batch(buffer.of_seed(0), jax.random.key(0), cfg)
    counts = np.bincount(np.asarray(batch.reward, int), minlength=8)
    assert counts[7] == 0 and np.abs(counts[:7] - 10_000).max() < 400  # 4 standard deviations


# --- One online run -----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run from scratch: 5 random steps, then 24 updates and as many env steps of two seeds."""
    folder = tmp_path_factory.mktemp("alone")
    argv = [*TINY, *ALONE, "--online-updates", "24", "--seeds", "3", "1"]
    argv += ["--runs-dir", str(folder)]
    seen = []
    chunk = interaction.Interaction.chunk

    def watched(self, state, keys, start):
        result = chunk(self, state, keys, start)
        seen.append((self.buffer.filled, jax.tree.map(np.array, self.buffer.rows)))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interaction.Interaction, "chunk", watched)
        with runs.fused_as_users():
            runs.start("sac", [*argv, "--name", "whole", "--keep", "all"])
    return folder / "sac" / "env" / "Walk-v0" / "whole", argv, seen


def test_rows_are_those_of_the_env(alone):
    """Played once more by hand: resets by seed and episode, time limits as truncations."""
    folder, _, _ = alone
    rows = rows_of(folder, 2)
    assert len(rows["reward"]) == 5 + 24
    ends = {"termination": 0, "truncation": 0}
    for i, seed in enumerate((3, 1)):
        env, episode, length = Walk(), 0, 0
        for t in range(5 + 24):
            if length == 0:
                start = np.random.SeedSequence((seed, episode)).generate_state(1)[0]
                observation, _ = env.reset(seed=int(start))
            row = {name: x[t, i] for name, x in rows.items()}
            assert np.array_equal(row["observation"], np.float32(observation))
            assert abs(row["action"]) <= 1
            observation, reward, termination, _, _ = env.step(2 * row["action"])  # of [-2, 2]
            length += 1
            np.testing.assert_allclose(row["next_observation"], observation, rtol=1e-6)
            np.testing.assert_allclose(row["reward"], reward, rtol=1e-5)
            truncation = length == LIMIT and not termination
            assert (row["termination"], row["truncation"]) == (termination, truncation)
            ends["termination"] += termination
            ends["truncation"] += truncation
            if termination or truncation:
                episode, length = episode + 1, 0
    assert min(ends.values()) > 0  # both kinds were met


def test_the_buffer_has_the_rows_and_their_next_actions(alone):
    folder, _, seen = alone
    rows = rows_of(folder, 2)
    filled, buffer = seen[-1]
    assert filled == 29 and len(buffer.reward) == 2 * 29
    for i in range(2):
        part = {name: getattr(buffer, name)[29 * i : 29 * (i + 1)] for name in buffer._fields}
        for name, column in rows.items():
            assert np.array_equal(part[name], column[:, i].reshape(part[name].shape))
        ended = part["termination"] + part["truncation"] > 0
        ended[-1] = True  # the row after the last one is not known
        expected = part["action"].copy()
        expected[~ended] = part["action"][1:][~ended[:-1]]
        assert np.array_equal(part["next_action"], expected)
    assert [int(count) for count, _ in seen] == [9, 13, 17, 21, 25, 29]
    assert len({x.reward.shape for _, x in seen}) == 1


def test_random_steps_come_first_and_then_the_policy_explores(alone):
    folder, _, _ = alone
    action = rows_of(folder, 2)["action"]
    for i, seed in enumerate((3, 1)):
        for t in range(5):
            draw = np.random.default_rng((seed, t)).uniform(-1, 1, 1).astype(np.float32)
            assert np.array_equal(action[t, i], draw)
    cfg, dataset, _ = experiment.load(sac, folder)
    # The policy after 8 updates takes env step 5 + 8.
    _, _, state = experiment.load(sac, folder, 8)
    key = experiment.streams(cfg.seeds, 4)[3][1]
    observation = rows_of(folder, 2)["observation"][13, 1]
    params = jax.tree.map(lambda x: x[1], sac.policy_params(state))
    explore = functools.partial(sac.explore, state.actor.apply_fn)
    drawn = explore(params, observation[None], jax.random.fold_in(key, 13))[0]
    np.testing.assert_allclose(action[13, 1], drawn, rtol=1e-5, atol=1e-6)
    assert dataset.horizon == LIMIT


def test_metrics_and_result_tell_of_the_online_phase(alone):
    folder, _, _ = alone
    metrics = runs.read_csv(folder / "metrics.csv")
    assert [row["update"] for row in metrics[::2]] == [*map(str, range(0, 25, 4))]
    rows = rows_of(folder, 2)
    over = rows["termination"] + rows["truncation"] > 0
    for i in range(2):
        ends = np.flatnonzero(over[:, i]) + 1
        returns = [x.sum() for x in np.split(rows["reward"][:, i, 0], ends)[:-1]]
        for row in metrics[i::2][1:]:
            update = int(row["update"])
            first = 0 if update == 4 else update + 1  # the random steps belong to the first chunk
            here = [x for x, end in zip(returns, ends, strict=True) if first < end <= update + 5]
            if not here:
                assert row["online_return"] == ""
                continue
            np.testing.assert_allclose(float(row["online_return"]), np.mean(here), rtol=1e-5)
    result = json.loads((folder / "result.json").read_text())
    assert result["num_updates"] == 0 and result["online_updates"] == 24
    assert result["env_steps"] == 29 and result["env_seconds"] > 0
    saved = sorted(int(x.name) for x in (folder / "checkpoints").iterdir())
    assert saved == [0, 8, 16, 20, 24]  # --keep all: those of the evaluations, and the newest two


def test_a_seed_beside_another_equals_that_seed_alone(alone, tmp_path, fused_as_users):
    folder, argv, _ = alone
    argv = [*argv, "--seeds", "1", "--runs-dir", str(tmp_path), "--name", "one"]
    runs.start("sac", argv)
    one = tmp_path / "sac" / "env" / "Walk-v0" / "one"
    for name, column in rows_of(one).items():
        assert np.array_equal(column[:, 0], rows_of(folder, 2)[name][:, 1])
    lines = [runs.seed_lines(x / "metrics.csv", 1) for x in (one, folder)]
    assert lines[0] == lines[1]


# --- Both phases, and resuming ------------------------------------------------------------------
BOTH = ["--num-updates", "8", "--online-updates", "16", "--random-steps", "3"]
BOTH += ["--seeds", "0", "1", "--steps-per-refresh", "2"]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A run of both phases, and copies of its folder at three chunk boundaries."""
    folder = tmp_path_factory.mktemp("both")
    argv = ["--dataset", write_data(folder), *TINY, *BOTH, "--runs-dir", str(folder / "runs")]
    log, final = experiment.Run.log, {}

    def copied(run, step, *args):
        log(run, step, *args)
        if step in (4, 8, 16):
            shutil.copytree(run.folder, run.folder.with_name(f"at{step}"))
        final["state"] = probes.leaves(run.divergence.last_state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment.Run, "log", copied)
        runs.start("sac", [*argv, "--name", "whole"])
    return folder / "runs" / "sac" / "data", argv, final["state"]


@pytest.mark.parametrize("step", runs.slow_but([4, 8, 16], [16]))
def test_a_resumed_run_equals_an_undisturbed_one(both, step, capsys):
    """In the offline phase, between the phases, in the online phase with an episode under way."""
    folder, argv, state = both
    broken = folder / f"at{step}"
    with (broken / interaction.FILE).open("ab") as out:  # rows that no checkpoint counts
        out.write(bytes(120))
    seen = []
    restore = interaction.Interaction.restore
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            interaction.Interaction,
            "restore",
            lambda self, saved: (seen.append(saved), restore(self, saved)),
        )
        runs.start("sac", [*argv, "--name", f"at{step}", "--resume"])
    assert f"resuming at update {step}" in capsys.readouterr().out
    if step == 16:
        assert seen[0]["rows"] == 3 + 8 and min(seen[0]["lengths"]) > 0
    else:
        assert seen == [None]
    for name in ("metrics.csv", interaction.FILE):
        assert (broken / name).read_bytes() == (folder / "whole" / name).read_bytes(), name
    found = experiment.load(sac, broken)[2]
    for x, y in zip(probes.leaves(found), state, strict=True):
        assert np.array_equal(x, y)


def test_the_offline_phase_is_that_of_an_offline_run_which_may_go_on_online(both, capsys):
    folder, argv, _ = both
    offline = ["--online-updates", "0", "--name", "longer"]
    runs.start("sac", [*argv, *offline])
    rows = runs.read_csv(folder / "longer" / "metrics.csv")
    whole = runs.read_csv(folder / "whole" / "metrics.csv")
    assert not (folder / "longer" / interaction.FILE).exists()
    for row, other in zip(rows, whole, strict=False):
        assert row == {name: other[name] for name in row}
        assert other["online_return"] == ""
    runs.start("sac", [*argv, "--name", "longer", "--resume"])
    capsys.readouterr()
    for name in ("metrics.csv", interaction.FILE):
        assert (folder / "longer" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    line = refused(capsys, [*argv, "--num-updates", "12", "--name", "longer", "--resume"])
    assert "is in its online phase" in line
    line = refused(capsys, [*argv, "--online-updates", "8", "--name", "longer", "--resume"])
    assert "has trained for 24 updates" in line and "give at least 16" in line


def test_a_damaged_file_of_rows_is_one_line(both, tmp_path, capsys):
    folder, argv, _ = both
    shutil.copytree(folder / "whole", folder / "damaged", dirs_exist_ok=True)
    (folder / "damaged" / "result.json").unlink()
    file, argv = folder / "damaged" / interaction.FILE, [*argv, "--name", "damaged", "--resume"]
    argv += ["--online-updates", "20"]
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert "rows are missing" in refused(capsys, argv)
    file.write_bytes(b"\1" + whole[1:])
    assert "is not as it was written" in refused(capsys, argv)


def test_an_env_that_cannot_repeat_an_episode_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Forgetful, "count", 0)  # episodes are those of a process that begins
    argv = [*TINY, *ALONE, "--online-updates", "24", "--dataset", "env/Forgetful-v0"]
    argv += ["--runs-dir", str(tmp_path), "--name", "run"]
    log = experiment.Run.log

    def stopped(run, step, *args):
        log(run, step, *args)
        if step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(experiment.Run, "log", stopped)
        runs.start("sac", argv)
    folder = tmp_path / "sac" / "env" / "Forgetful-v0" / "run"
    before = rows_of(folder)
    assert len(before["reward"]) == 9
    over = before["termination"] + before["truncation"] > 0
    assert not over[-1]  # an episode is under way
    capsys.readouterr()
    runs.start("sac", [*argv, "--resume"])
    said = "env Forgetful-v0: does not repeat an episode, so that of seed 0 ends here"
    assert said in capsys.readouterr().out
    after = rows_of(folder)
    assert np.array_equal(after["action"][:9], before["action"])
    assert not np.array_equal(after["observation"][9], before["next_observation"][-1])
    _, meta = checkpoints.read(checkpoints.manager(folder), 24)
    assert meta["interaction"]["broken"] == [[8, 0]]  # truncated there, at every later start


def test_a_killed_run_goes_on(tmp_path, compilation_cache):
    """The real thing, once: SIGKILL in the online phase, half of a line in metrics.csv."""
    argv = ["--dataset", "env/Pendulum-v1", "--env-steps", "6", *TINY, *ALONE[2:]]
    argv += ["--online-updates", "24", "--runs-dir", str(tmp_path), "--name"]
    environment = runs.environment(compilation_cache)
    words = runs.command("sac", [*argv, "killed"], die="in log 16")
    code, _, error = runs.call(words, tmp_path, environment)
    assert code == -signal.SIGKILL, error
    for name in ("killed", "whole"):
        runs.start("sac", [*argv, name, "--resume"])
    killed, whole = (tmp_path / "sac" / "env" / "Pendulum-v1" / x for x in ("killed", "whole"))
    for name in ("metrics.csv", interaction.FILE):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


# --- Counting -----------------------------------------------------------------------------------
# With two updates per step rows grow by two every four updates; with a half, by four every two.
@pytest.mark.parametrize(
    ("per_step", "steps", "written", "mean_start"),
    [(2, 2, [0, 4, 6], 10), (0.5, 4, [0, 4, 8, 12, 16], 11)],
)
def test_updates_per_step_and_steps_per_refresh(
    per_step, steps, written, mean_start, tmp_path, monkeypatch
):
    write, firsts, chunks = buffers.write, [], []

    def noted(buffer, new, first):
        firsts.append(first)
        return write(buffer, new, first)

    def train_chunk(state, key, start, data, cfg):
        rows = data.reward[jnp.arange(3)]
        return state + cfg.log_every, {"start": jnp.float32(start) + 0 * rows.sum()}

    monkeypatch.setattr(buffers, "write", noted)
    cfg = sac.Config(num_updates=8, online_updates=16, log_every=8, random_steps=5)
    cfg = dataclasses.replace(cfg, updates_per_step=per_step, steps_per_refresh=steps)
    dataset = datasets.load("env/Walk-v0")
    run = types.SimpleNamespace(cfg=cfg, dataset=dataset, folder=tmp_path, attach=chunks.append)
    keys, explore_keys = experiment.streams(cfg.seeds, 2)
    online = interaction.Interaction(
        run,
        dataset.transitions,
        lambda params, observation, key: params * observation[:, :1],
        explore_keys,
        lambda state: state * 0,
        train_chunk,
    )
    assert chunks == [online]
    state, metrics = online.chunk(jnp.zeros(1), keys, 8)
    assert firsts == written  # the row before is written once more
    assert state.tolist() == [8] and metrics["start"].tolist() == [mean_start]
    assert online.count == 5 + 8 / per_step
    assert (online.rows[5 : online.count, 0, 3] == 0).all()  # the policy's actions
    assert phases.env_steps(cfg) == 5 + 16 / per_step and phases.last_update(cfg) == 24
    assert phases.env_steps(sac.Config()) == 0
    online.saved()
    assert (tmp_path / interaction.FILE).stat().st_size == online.count * 4 * (3 + 1 + 1 + 3 + 2)


def walking(tmp_path, transform, act, **more):
    """An Interaction of two seeds with a data set of 6 rows, three env steps and an update each."""
    counts = {"steps_per_refresh": 3, "updates_per_refresh": 1, "log_every": 1}
    fields = {"seeds": (3, 1), "num_updates": 0, "online_updates": 12} | counts
    cfg = dataclasses.make_dataclass("Config", fields)(**fields)

    def train_chunk(state, key, start, data, cfg):
        return state, {"reward": data.reward[jnp.arange(2)].mean()}

    dataset = datasets.load("env/Walk-v0")
    run = types.SimpleNamespace(cfg=cfg, dataset=dataset, folder=tmp_path, attach=lambda x: None)
    keys, explore_keys = experiment.streams(cfg.seeds, 2)
    recorded = probes.random_transitions(6, 3, 1, seed=5)
    online = interaction.Interaction(
        run, recorded, act, explore_keys, lambda x: x, train_chunk, transform, **more
    )
    return online, keys, recorded


def test_only_whole_episodes_are_drawn_and_the_newest_of_them(tmp_path):
    """Those of the data set leave first; an episode's rows are what `transform` made of all."""

    def transform(rows):  # the reward becomes the number of the row in its episode
        over = rows.termination + rows.truncation > 0
        count = np.zeros(over.shape, np.float32)
        for t in range(1, len(over)):
            count[t] = np.where(over[t - 1], 0, count[t - 1] + 1)
        return rows._replace(reward=count)

    def act(params, observation, key):
        return params * observation[:, :1]

    online, keys, recorded = walking(tmp_path, transform, act, replay=(3, np.array([2, 3, 6])))
    assert phases.env_steps(online.cfg) == 36
    seen = set()
    for update in range(12):
        online.chunk(jnp.zeros(2), keys, update)
        assert online.count == 3 * (update + 1)
        for i in range(2):
            ended = online.rows[: online.count, i, online.columns["truncation"]] > 0
            ended |= online.rows[: online.count, i, online.columns["termination"]] > 0
            ends = np.flatnonzero(ended) + 1
            own = np.split(np.arange(online.count), ends)[:-1]
            episodes = [[-1, 0, 1], [-1, 2], [-1, 3, 4, 5], *own][-3:]
            expected = []
            for rows in episodes:
                if rows[0] == -1:
                    expected += [recorded.observation[j] for j in rows[1:]]
                else:
                    place = online.columns["observation"]
                    expected += [online.rows[j, i, place] for j in rows]
            drawn = online.buffer.of_seed(i)
            numbers = np.arange(len(expected))
            assert np.array_equal(drawn.observation[numbers], expected)
            assert np.array_equal(drawn.observation[numbers + 5 * len(expected)], expected)
            newest = own[-3:]
            if newest:
                count = np.concatenate([np.arange(len(rows)) for rows in newest])
                assert np.array_equal(drawn.reward[numbers[-len(count) :]], count)
            seen.add(len(own))
    assert len(seen) > 4  # more than the buffer keeps


def test_a_policy_with_a_memory_gets_the_reward_of_the_step_before(tmp_path):
    """0 at the first step of an episode, when its memory begins anew, too."""
    given = []

    def act(params, observation, key, memory, reward):
        return params * observation[:, :1], memory + reward

    online, keys, _ = walking(tmp_path, None, act, memory=np.zeros(1, np.float32))
    inner = online.act

    def noted(*arguments):
        given.append([np.array(x) for x in arguments[4:]])
        return inner(*arguments)

    online.act = noted
    for update in range(5):
        online.chunk(jnp.zeros(2), keys, update)
    rows = online.rows[:15]
    over = rows[..., online.columns["termination"]] + rows[..., online.columns["truncation"]] > 0
    for i in range(2):
        total = 0.0
        for t in range(15):
            begins = t == 0 or over[t - 1, i, 0]
            expected = 0.0 if begins else rows[t - 1, i, online.columns["reward"]][0]
            total = 0.0 if begins else total
            assert given[t][1][i, 0] == np.float32(expected)
            np.testing.assert_allclose(given[t][0][i, 0], total, rtol=1e-5, atol=1e-6)
            total += expected


# --- What the command line takes ----------------------------------------------------------------
def test_an_env_and_no_data_set_begin_from_scratch(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    argv = ["--env", "Walk-v0", "--online-updates", "1000", "--num-updates", "0"]
    cfg, _ = config.parse(sac.Config, argv)
    assert cfg.dataset == "env/Walk-v0"
    cfg, _ = config.parse(sac.Config, ["--env", "Walk-v0"])  # an offline run in another env
    assert cfg.dataset == "local/pointmaze/umaze-v0"
    dataset = datasets.load("env/Walk-v0")
    assert dataset.transitions.observation.shape == (0, 3) and dataset.horizon == LIMIT
    assert dataset.transitions.action.shape == (0, 1) and len(dataset.episode_returns) == 0


BAD = [
    (["--env", "NoSuch-v9"], "NoSuch"),
    (["--dataset", "env/"], "no data set's name"),
    (["--dataset", "env/CartPole-v1"], "integer actions, but this method takes continuous ones"),
    (["--num-updates", "8"], "set --num-updates 0"),
    (["--online-updates", "0", "--num-updates", "8"], "its rows come with --online-updates"),
    (["--online-updates", "6"], "--online-updates 6 is no multiple of --log-every 4"),
    (["--steps-per-refresh", "3"], "no multiple of steps_per_refresh * updates_per_step, 3 * 1"),
    (
        ["--steps-per-refresh", "3", "--updates-per-step", "0.25"],
        "times updates_per_step 0.25 it is no whole number; 4 would be right",
    ),
    (["--updates-per-step", "0"], "--updates-per-step 0.0: must be above 0"),
    (["--random-steps", "-1"], "--random-steps -1: must be at least 0"),
    (["--data", "host"], "without --data host"),
    (["--devices", "2"], "takes one device"),
]


@pytest.mark.parametrize(("flags", "words"), BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_bad_input_is_one_line(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = [*TINY, *ALONE, "--online-updates", "8"]
    if flags[0] == "--env":
        argv = [x for x in argv if x not in ("--dataset", "env/Walk-v0")]
    assert words in refused(capsys, [*argv, *flags])
    assert not any(tmp_path.iterdir())  # nothing half-written


# --- Envs of many kinds -------------------------------------------------------------------------
BOX = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
SPACES = {
    "tuple": gymnasium.spaces.Tuple((BOX, gymnasium.spaces.MultiBinary(3))),
    "nested": gymnasium.spaces.Dict(
        {"goal": BOX, "robot": gymnasium.spaces.Dict({"gear": gymnasium.spaces.Discrete(3)})}
    ),
    "image": gymnasium.spaces.Box(0, 255, (4, 4, 3), np.uint8),
    "one of five": gymnasium.spaces.Discrete(5, start=1),
    "text": gymnasium.spaces.Dict({"mission": gymnasium.spaces.Text(5), "state": BOX}),
}
ACTIONS = {
    "uneven": gymnasium.spaces.Box(np.array([0.0, -3.0]), np.array([10.0, 3.0]), dtype=np.float64),
    "two axes": gymnasium.spaces.Box(-2, 2, (2, 2), np.float32),
    "one value": gymnasium.spaces.Box(np.array([-1.0, 0.5]), np.array([1.0, 0.5])),
}
USABLE = [name for name in (*SPACES, *ACTIONS) if name != "text"]
GIVEN = {  # what a step gives in place of a plain number -> what is said, None where it can be used
    "reward of an array": ({"reward": np.array([1.0])}, None),
    "whole reward": ({"reward": 1}, None),
    "end of an array": ({"termination": np.array([False])}, None),
    "end as a number": ({"truncation": np.int8(0)}, None),
    "no info": ({"info": None}, None),
    "no number": ({"reward": None}, "the reward of a step must be one number, not None"),
    "two rewards": ({"reward": np.ones(2)}, "the reward of a step must be one number"),
    "two ends": ({"termination": np.zeros(2, bool)}, "the termination of a step must be one"),
    "two limits": ({"truncation": [True, False]}, "the truncation of a step must be one number"),
    "huge reward": ({"reward": 1e300}, "a step's reward is 1e+300 at env step 1 of seed 0, beyond"),
    "reward beyond": ({"reward": -1e19}, "beyond 1e+18, and float32 cannot hold its square"),
    "no finite reward": ({"reward": np.inf}, "reward is inf at env step 1 of seed 0, from which"),
}


class Kinds(gymnasium.Env):
    """An env of one of the kinds above, by its name."""

    def __init__(self, kind, render_mode=None):
        self.render_mode, self.kind = render_mode, kind
        self.observation_space = SPACES.get(kind, BOX)
        self.action_space = ACTIONS.get(kind, BOX)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        given = {"reward": float(np.sum(action)), "termination": False, "truncation": False}
        given |= {"info": {}} | GIVEN.get(self.kind, ({},))[0]
        return self.observation_space.sample(), *given.values()

    def close(self):
        if self.kind == "does not close":
            raise OSError("no window")


@pytest.fixture
def kind(tmp_path, monkeypatch):
    """Train beside an env of a kind; what that gives."""
    monkeypatch.chdir(tmp_path)

    def start(kind, **settings):
        env_id = f"Kinds-{kind.replace(' ', '_')}-v0"
        options = {"kwargs": {"kind": kind}, "max_episode_steps": 4, "disable_env_checker": True}
        if env_id not in gymnasium.registry:
            gymnasium.register(env_id, Kinds, **options)
        words = ["--dataset", f"env/{env_id}", *TINY, "--num-updates", "0", "--online-updates", "4"]
        return runs.start("sac", words)

    return start


@pytest.mark.parametrize("name", runs.slow_but(USABLE, ["tuple", "uneven"]))
def test_the_online_phase_takes_every_space_of_the_data(kind, name):
    assert np.isfinite(kind(name)).all()


def test_a_space_without_columns_is_one_line(kind, capsys):
    with pytest.raises(SystemExit) as leave:
        kind("text")
    (line,) = capsys.readouterr().err.splitlines()
    assert leave.value.code == 2 and "observation['mission']: Text(" in line
    assert "gymnasium.wrappers.FilterObservation" in line


@pytest.mark.parametrize("name", GIVEN)
def test_what_a_step_gives_is_used_or_told_in_one_line(name, monkeypatch, capsys):
    """As the online phase takes it from the env."""
    env, (_, said) = Kinds(name), GIVEN[name]
    action = np.zeros(2)  # float64, as a policy gives it under JAX_ENABLE_X64
    env.reset(seed=0)
    online = types.SimpleNamespace(envs=[env], observation=[np.zeros(2)], reports_success=False)
    online.count, online.cfg, online.lengths, online.returns = 0, sac.Config(), [0], [0.0]
    online._check = functools.partial(interaction.Interaction._check, online)
    if said is None:
        step = interaction.Interaction._env_step(online, 0, action)
        assert [type(x) for x in step[1:]] == [float, bool, bool]
        return
    with pytest.raises(SystemExit) as leave:
        interaction.Interaction._env_step(online, 0, action)
    (line,) = capsys.readouterr().err.splitlines()
    assert leave.value.code == 2 and said in line


@runs.SLOW
def test_the_online_phase_with_64_bits(tmp_path, monkeypatch, capsys):
    """The env gets the actions that are recorded, so a resumed run repeats its episodes."""
    monkeypatch.chdir(tmp_path)
    words = ["--dataset", "env/Walk-v0", *TINY, "--num-updates", "0", "--random-steps", "2"]
    with jax.enable_x64(True):
        whole = runs.start("sac", [*words, "--online-updates", "24", "--name", "whole"])
        for updates in ("12", "24"):
            argv = [*words, "--online-updates", updates, "--name", "grown", "--resume"]
            grown = runs.start("sac", argv)
        (folder,) = Path("runs").rglob("grown")
        policy = experiment.load_policy(sac, folder)
        assert policy.act(np.zeros(3)).dtype == np.float32
    assert whole.tolist() == grown.tolist()
    assert "does not repeat an episode" not in capsys.readouterr().out


def test_an_env_that_does_not_close_ends_nothing(kind, capsys):
    """When the data are loaded, in the online phase, and at the evaluation."""
    assert np.isfinite(kind("does not close")).all()
    said = capsys.readouterr().out
    assert said.count("its close raised OSError: no window") >= 4


# --- An env without rows, over all files --------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_the_remedy_for_an_env_without_rows_fits_the_file(name, tmp_path, monkeypatch, capsys):
    """Each message names flags that the file has; with them, the message is another or none."""
    monkeypatch.chdir(tmp_path)
    data = runs.write_hdf5(tmp_path / "data.hdf5")
    config_class = runs.module(name).Config
    words = {"--dataset": "env/Walk-v0", "--log-every": "4", "--eval-every": "4"}
    words |= {"--num-updates": "8"}
    if hasattr(config_class, "clone_updates"):
        words |= {"--clone-updates": "4"}
    if hasattr(config_class, "q_updates"):
        words |= {"--q-updates": "4"}
    said = []
    while len(said) < 4:
        argv = [x for pair in words.items() for x in pair]
        try:
            experiment.parse(config_class, argv)
            break
        except SystemExit as leave:
            assert leave.code == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x]
        said.append(line)
        if "name a data set, with --env Walk-v0" in line:
            words |= {"--dataset": data, "--env": "Walk-v0"}
        elif "its rows come with --online-updates N" in line:
            words |= {"--online-updates": "8"}
        elif "set --num-updates 0" in line:
            words |= {"--num-updates": "0"}
        elif "--online-updates" in line and "updates_per_step" in line:
            words |= {"--log-every": str(config_class.updates_per_step * 10), "--eval-every": "200"}
            words |= {"--online-updates": "200"}
        else:
            break
    assert len(said) == len(set(said)), said
    assert said and all("an env without rows" in line for line in said[:1])
    assert "--online-updates" not in said[0] or hasattr(config_class, "online_updates")


ONLINE = [file.stem for file in FILES if "\n    online_updates: int" in file.read_text()]


@pytest.mark.parametrize("name", ONLINE)
def test_an_online_phase_without_an_env_is_one_line(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = runs.write_hdf5(tmp_path / "data.hdf5", attributes={}, actions=np.zeros((60, 1)))
    sizes = ["--num-updates", "200", "--log-every", "100", "--eval-every", "100"]
    sizes += ["--clone-updates", "100"] if name == "spot" else []
    argv = ["--dataset", data, *runs.tiny(name), *sizes, "--online-updates", "200"]
    line = refused(capsys, argv, name)
    assert "no env is known for" in line and "name one with --env" in line
    assert not (tmp_path / "runs").exists()


def test_without_mujoco_it_is_one_line(monkeypatch, tmp_path, capsys):
    import sys

    monkeypatch.chdir(tmp_path)
    for name in [x for x in sys.modules if x.startswith("gymnasium.envs.mujoco")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mujoco", None)
    argv = [*TINY, *ALONE, "--dataset", "env/Hopper-v5", "--online-updates", "8"]
    line = refused(capsys, argv)
    assert "Hopper-v5: cannot be made" in line and "mujoco" in line

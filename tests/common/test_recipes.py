"""Local data sets: a contiguous walk, rewards as in evaluation, nothing left by a killed run."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common import datasets, envs, recipes
from common.recipes import cartpole, pointmaze

minari = pytest.importorskip("minari")
gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("gymnasium_robotics")

UMAZE = "local/pointmaze/umaze-v0"
EPISODES = 10  # 3000 steps


def run(code, root):
    """Runs code in a fresh process that finds `common` but has imported nothing of it."""
    repository = str(Path(recipes.__file__).resolve().parents[2])
    env = os.environ | {"MINARI_DATASETS_PATH": str(root), "PYTHONPATH": repository}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def listing(root):
    return sorted(path.name for path in root.rglob("*"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A root with 3000 steps of umaze, and its episodes."""
    root = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(root))
        pointmaze.make(UMAZE, "umaze", EPISODES)
        return root, list(minari.load_dataset(UMAZE).iterate_episodes())


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty root, and a data set of 600 steps where `make` is called."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    umaze = envs.MAZES["umaze"]._replace(episodes=2)
    monkeypatch.setitem(envs.MAZES, "umaze", umaze)
    return tmp_path


def test_episodes_are_one_walk_cut_by_truncation(made):
    episodes = made[1]
    assert len(episodes) == EPISODES
    for episode, following in itertools.pairwise(episodes):
        np.testing.assert_array_equal(episode.observations[-1], following.observations[0])
    for episode in episodes:
        assert episode.observations.shape == (301, 4) and episode.actions.shape == (300, 2)
        assert episode.observations.dtype == episode.actions.dtype == np.float32
        assert not episode.terminations.any()
        assert episode.truncations.tolist() == [False] * 299 + [True]
        moved = np.linalg.norm(np.diff(episode.observations[:, :2], axis=0), axis=1)
        assert moved.max() < 0.08  # no teleport: speed about 5 per axis, 0.01 s


def test_rewards_are_those_of_the_next_position(made):
    env = envs.point_maze("umaze")
    np.testing.assert_allclose(env.goal, [-1.0, 1.0])  # row 1, column 1 of a 5 x 5 maze
    rewards = np.concatenate([episode.rewards for episode in made[1]])
    position = np.concatenate([episode.observations[1:, :2] for episode in made[1]])
    expected = np.linalg.norm(position - env.goal, axis=1) <= 0.5
    np.testing.assert_array_equal(rewards, expected)
    assert 0 < rewards.mean() < 1


def test_actions_stay_in_the_box_and_are_noisy(made):
    actions = np.concatenate([episode.actions for episode in made[1]])
    assert np.abs(actions).max() <= 1.0
    # The control changes slowly: a step's change is that of two noise draws, cut by the box.
    inside = (np.abs(actions) < 1).all(axis=1)
    assert 0.3 < np.diff(actions, axis=0)[inside[1:] & inside[:-1]].std() < 0.8


def test_walk_visits_every_cell(made):
    env = envs.point_maze("umaze")
    position = np.concatenate([episode.observations[:, :2] for episode in made[1]])
    visited = {tuple(env.maze.cell_xy_to_rowcol(p).tolist()) for p in position}
    assert visited == set(env.cells)


def test_same_bytes_every_time(made, root):
    pointmaze.make(UMAZE, "umaze", EPISODES)
    for file in ("main_data.hdf5", "metadata.json"):
        path = Path(UMAZE, "data", file)
        assert (root / path).read_bytes() == (made[0] / path).read_bytes()


def test_env_is_recovered_in_a_fresh_process(made):
    code = f"""
import json, minari, numpy, sys
dataset = minari.load_dataset({UMAZE!r})
assert "common.recipes" not in sys.modules
env = dataset.recover_environment(eval_env=True)
observation, info = env.reset(seed=0)
steps = 0
while True:
    observation, reward, termination, truncation, info = env.step(env.action_space.sample())
    assert env.observation_space.contains(observation) and reward == info["success"]
    steps += 1
    if termination or truncation:
        break
scores = minari.get_normalized_score(dataset, numpy.array([36.33, 221.7])).tolist()
print(json.dumps([steps, termination, truncation, env.observation_space.shape, scores]))
"""
    done = run(code, made[0])
    assert json.loads(done.stdout) == [300, False, True, [4], [0.0, 1.0]]
    assert done.stderr == ""


def test_a_recording_of_an_earlier_version_is_still_evaluated(made, tmp_path, monkeypatch):
    """It names the env by the module that had it before common/ had rooms."""
    shutil.copytree(made[0], tmp_path / "root")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "root"))
    file = tmp_path / "root" / UMAZE / "data" / "metadata.json"
    text = file.read_text()
    now, before = "common.envs:point_maze", "common.recipes:point_maze"
    assert now in text and before not in text
    file.write_text(text.replace(now, before))
    dataset = datasets.load(UMAZE)
    env = dataset.make_env()
    observation, _ = env.reset(seed=0)
    assert observation.shape == (4,) and env.step(np.zeros(2, np.float32))[1] in (0.0, 1.0)
    code = f"""
import minari
env = minari.load_dataset({UMAZE!r}).recover_environment(eval_env=True)
print(env.reset(seed=0)[0].tolist())
"""
    assert json.loads(run(code, tmp_path / "root").stdout) == observation.tolist()
    file.write_text(text.replace(now, "common.recipes:make"))  # no other function is trusted
    with pytest.raises(SystemExit):
        datasets.load(UMAZE)


def test_reset_depends_on_the_seed_alone():
    envs.register()
    envs.register()  # idempotent
    actions = np.random.default_rng(0).uniform(-1, 1, (100, 2)).astype(np.float32)

    def rollout(env, seed):
        first, _ = env.reset(seed=seed)
        return np.stack([first] + [env.step(action)[0] for action in actions])

    used, fresh = (gymnasium.make("atoll/PointMaze_Medium-v0") for _ in range(2))
    assert not np.array_equal(rollout(used, 7), rollout(used, None))
    np.testing.assert_array_equal(rollout(used, 3), rollout(fresh, 3))


def test_starts_and_goals_lie_in_free_cells():
    for name, maze in envs.MAZES.items():
        env = envs.point_maze(name)
        assert maze.goal in env.cells
        starts = [env.reset(seed=seed)[0][:2] for seed in range(200)]
        cells = {tuple(env.maze.cell_xy_to_rowcol(start).tolist()) for start in starts}
        assert cells <= set(env.cells) and len(cells) > 0.9 * len(env.cells)


def test_render_mode_passes_through():
    envs.register()
    env = gymnasium.make("atoll/PointMaze_UMaze-v0", render_mode="rgb_array", width=64, height=48)
    assert env.render_mode == env.unwrapped.point.render_mode == "rgb_array"
    assert (env.unwrapped.point.width, env.unwrapped.point.height) == (64, 48)


@pytest.mark.parametrize("name", ["umaze", "medium", "large"])
def test_controller_reaches_the_goal_from_every_cell(name):
    env, generator = envs.point_maze(name), np.random.default_rng(0)
    for cell in env.cells:
        env.reset(seed=0)
        env.point.set_state(env.maze.cell_rowcol_to_xy(cell), np.zeros(2))
        observation = np.concatenate([env.point.data.qpos, env.point.data.qvel])
        waypoints = pointmaze._plan(env, generator, observation, envs.MAZES[name].goal)
        for _ in range(envs.MAZES[name].horizon):
            action, reached = pointmaze._control(observation, waypoints)
            if reached:
                break
            observation, *_ = env.step(action)
        assert reached, cell


def test_recorded_reference_returns_are_about_right():
    umaze = envs.MAZES["umaze"]
    random_return, controller_return = pointmaze.reference_returns("umaze", episodes=100)
    assert abs(random_return - umaze.random_return) < 25  # 75 is one episode's deviation
    assert abs(controller_return - umaze.controller_return) < 20


def test_make_prints_one_line_and_is_quiet(root, capfd, recwarn):
    recipes.make(UMAZE)
    recipes.make(UMAZE)  # there already: nothing to do or say
    out, err = capfd.readouterr()
    assert out.startswith(f"making {UMAZE} (600 steps, about ") and out.count("\n") == 1
    assert err == "" and not list(recwarn)
    assert minari.load_dataset(UMAZE).total_steps == 600
    assert not list(root.glob(".making-*"))


def test_failure_leaves_nothing_and_the_next_call_succeeds(root, monkeypatch):
    def die(*args, **kwargs):
        Path(os.environ["MINARI_DATASETS_PATH"], UMAZE, "data").mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(minari, "create_dataset_from_buffers", die)
        with pytest.raises(KeyboardInterrupt):
            recipes.make(UMAZE)
    assert listing(root) == []
    assert os.environ["MINARI_DATASETS_PATH"] == str(root)
    recipes.make(UMAZE)
    assert minari.load_dataset(UMAZE).total_steps == 600


def test_leftover_of_a_killed_process_is_cleared(root):
    dead, alive = root / ".making-dead", root / ".making-alive"
    for folder in (dead, alive):
        (folder / UMAZE / "data").mkdir(parents=True)
    os.utime(dead, (0, 0))
    recipes.make(UMAZE)
    assert alive.exists() and not dead.exists()
    assert list(minari.list_local_datasets()) == [UMAZE]


def test_second_process_at_the_same_time(root, monkeypatch):
    walk = pointmaze._walk

    def other_first(*args):
        monkeypatch.setattr(pointmaze, "_walk", walk)
        recipes.make(UMAZE)
        (root / UMAZE / "first").touch()
        return walk(*args)

    monkeypatch.setattr(pointmaze, "_walk", other_first)
    recipes.make(UMAZE)
    assert (root / UMAZE / "first").exists()  # theirs stayed, ours is gone
    assert not list(root.glob(".making-*"))
    assert minari.load_dataset(UMAZE).total_steps == 600


def test_something_else_in_the_way_is_an_error(root):
    (root / UMAZE).mkdir(parents=True)
    (root / UMAZE / "notes.txt").touch()
    with pytest.raises(OSError):
        recipes.make(UMAZE)
    assert listing(root / UMAZE) == ["notes.txt"]


# --- CartPole -----------------------------------------------------------------------------------
CARTPOLE = cartpole.ID


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """A root with 80 episodes, 20 of each level of noise, and these."""
    root = tmp_path_factory.mktemp("played")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(root))
        recipes.make(CARTPOLE, 80)
        return root, list(minari.load_dataset(CARTPOLE).iterate_episodes())


def test_cartpole_rows_are_what_the_env_does(played):
    env = gymnasium.make("CartPole-v1").unwrapped
    assert len(played[1]) == 80
    for episode in played[1]:
        assert episode.observations.dtype == np.float32 and episode.actions.dtype.kind == "i"
        env.reset()
        for now, action, after in zip(
            episode.observations, episode.actions, episode.observations[1:], strict=False
        ):
            env.state = now.astype(np.float64)
            np.testing.assert_allclose(env.step(action)[0], after, atol=1e-5)
        assert (episode.rewards == 1).all()


def test_cartpole_episodes_end_by_falling_or_after_500_steps(played):
    lengths = [len(episode.actions) for episode in played[1]]
    assert max(lengths) == 500 and len({*lengths}) > 30
    for episode, length in zip(played[1], lengths, strict=True):
        position, angle = np.abs(episode.observations[1:, [0, 2]]).T
        fallen = (position > 2.4) | (angle > np.deg2rad(12))
        np.testing.assert_array_equal(episode.terminations, fallen)
        assert not fallen[:-1].any()
        assert episode.truncations.tolist() == [step == 500 for step in range(1, length + 1)]


def test_cartpole_noise_levels_come_in_turn(played):
    lengths = []
    for level, noise in enumerate(cartpole.NOISE):
        episodes = played[1][level::4]
        observation = np.concatenate([episode.observations[:-1] for episode in episodes])
        action = np.concatenate([episode.actions for episode in episodes])
        # Half of the random actions are the controller's by chance; about 2.5 deviations.
        agree = np.mean((observation @ cartpole.GAIN > 0) == action)
        assert abs(agree - (1 - noise / 2)) < 1.25 / len(action) ** 0.5
        lengths.append(len(action))
    assert lengths == sorted(lengths, reverse=True)
    assert len(lengths) == 4 and noise == 1.0  # the last level is the random policy


def test_cartpole_same_bytes_every_time(played, root):
    recipes.make(CARTPOLE, 80)
    for file in ("main_data.hdf5", "metadata.json"):
        path = Path(CARTPOLE, "data", file)
        assert (root / path).read_bytes() == (played[0] / path).read_bytes()


def test_cartpole_reference_returns_are_about_right():
    random_return, controller_return = cartpole.reference_returns(100)
    assert abs(random_return - cartpole.RANDOM_RETURN) < 4  # 12 is one episode's deviation
    assert controller_return == cartpole.CONTROLLER_RETURN == 500


def test_cartpole_is_made_when_it_is_loaded(root, monkeypatch, capfd, recwarn):
    monkeypatch.setattr(cartpole, "EPISODES", 8)
    monkeypatch.setattr(cartpole, "STEPS", 900)
    dataset = datasets.load(CARTPOLE, actions="discrete")
    out, err = capfd.readouterr()
    assert out.startswith(f"making {CARTPOLE} (900 steps, about 0 s)") and out.count("\n") == 2
    assert err == "" and not list(recwarn)
    assert len(dataset.episode_ends) == 8 and dataset.num_actions == 2 and dataset.horizon == 500
    assert dataset.transitions.action.dtype == np.int32 and dataset.transitions.action.ndim == 1
    np.testing.assert_allclose(dataset.score(np.array([22.68, 500.0])), [0, 100])
    np.testing.assert_array_equal(dataset.episode_returns, np.diff(dataset.episode_ends, prepend=0))
    env = dataset.make_env()
    observation, _ = env.reset(seed=0)
    assert env.spec.id == "CartPole-v1" and observation.shape == (4,)
    assert env.step(1)[1] == 1.0


# --- Ids and imports ----------------------------------------------------------------------------
def test_unknown_id_names_near_ones():
    with pytest.raises(ValueError, match="did you mean local/pointmaze/umaze-v0"):
        recipes.make("local/pointmaze/u-maze-v0")


def test_import_needs_numpy_only(tmp_path):
    code = """
import sys
for name in ("gymnasium", "gymnasium_robotics", "minari", "mujoco", "tqdm", "h5py"):
    sys.modules[name] = None
import common.recipes
"""
    run(code, tmp_path)

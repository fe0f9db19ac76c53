"""The rules of common/datasets/, each on rows made by hand, then on recorded data."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common import datasets
from common.datasets import __main__ as command

h5py = pytest.importorskip("h5py")
pytest.importorskip("gymnasium")

# Two episodes of three rows: the first ends truly, the second is cut off.
ROWS = {
    "observations": np.arange(6, dtype=np.float32)[:, None],
    "actions": np.linspace(-1, 1, 6, dtype=np.float32)[:, None],
    "rewards": np.array([1, 2, 3, 10, 20, 30], np.float32),
    "terminals": np.array([0, 0, 1, 0, 0, 0], np.float32),
    "timeouts": np.array([0, 0, 0, 0, 0, 1], np.float32),
}


PENDULUM = {
    "observations": np.tile(np.array([1, 0, 0], np.float32), (6, 1)),
    "actions": 2 * ROWS["actions"],
}


def column(array):
    return np.asarray(array).reshape(-1).tolist()


def write(path, rows, **attributes):
    with h5py.File(path, "w") as file:
        for name, array in rows.items():
            file[name] = array
        file.attrs.update(attributes)
    return str(path)


def error_of(capsys, function, *args, **options):
    """The one line that a failing call prints before it leaves with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as leave:
        function(*args, **options)
    text = capsys.readouterr().err
    assert leave.value.code == 2 and text.startswith("error: ") and text.count("\n") == 1, text
    return text


# --- Rows to transitions ------------------------------------------------------------------------
def test_terminations_stop_the_bootstrap_and_truncations_do_not():
    transitions, _, _ = datasets.cut(ROWS)
    assert column(transitions.termination) == [0, 0, 1, 0, 0]
    assert column(transitions.truncation) == [0, 0, 0, 0, 1]


def test_only_rows_without_a_known_next_observation_are_dropped():
    transitions, ends, _ = datasets.cut(ROWS)
    assert column(transitions.observation) == [0, 1, 2, 3, 4]
    assert column(transitions.next_observation) == [1, 2, 2, 4, 5]  # a terminal row keeps its own
    assert ends.tolist() == [3, 5]


def test_recorded_next_observations_keep_every_row():
    rows = ROWS | {"next_observations": ROWS["observations"] + 0.5}
    transitions, ends, _ = datasets.cut(rows)
    assert column(transitions.next_observation) == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]
    assert column(transitions.termination) == [0, 0, 1, 0, 0, 0]
    assert column(transitions.truncation) == [0, 0, 0, 0, 0, 1]
    assert ends.tolist() == [3, 6]


def test_next_action_is_of_the_same_episode_and_its_own_at_the_last_row():
    actions = ROWS["actions"]
    kept, _, _ = datasets.cut(ROWS | {"next_observations": ROWS["observations"]})
    np.testing.assert_array_equal(kept.next_action, actions[[1, 2, 2, 4, 5, 5]])
    dropped, _, _ = datasets.cut(ROWS)  # the dropped row's action was recorded: no invention
    np.testing.assert_array_equal(dropped.next_action, actions[[1, 2, 2, 4, 5]])


def test_returns_count_dropped_rows_too():
    assert datasets.cut(ROWS)[2].tolist() == [6, 60]


def test_an_unfinished_episode_counts_as_truncated():
    rows = ROWS | {"timeouts": np.zeros(6, np.float32)}
    transitions, ends, _ = datasets.cut(rows)
    assert column(transitions.truncation) == [0, 0, 0, 0, 1] and ends.tolist() == [3, 5]


def test_without_timeouts_the_time_limit_cuts():
    rows = {name: array for name, array in ROWS.items() if name != "timeouts"}
    rows["terminals"] = np.array([0, 1, 0, 0, 0, 0], np.float32)
    transitions, ends, returns = datasets.cut(rows, horizon=2)
    assert column(transitions.observation) == [0, 1, 2, 4]  # 3 and 5 are the limit's rows
    assert ends.tolist() == [2, 3, 4] and returns.tolist() == [3, 13, 50]


def test_a_row_both_terminal_and_timed_out_is_terminal():
    rows = ROWS | {"timeouts": np.array([0, 0, 1, 0, 0, 1], np.float32)}
    transitions, _, _ = datasets.cut(rows)
    assert column(transitions.termination) == [0, 0, 1, 0, 0]
    assert column(transitions.truncation) == [0, 0, 0, 0, 1]


@pytest.mark.parametrize("recorded", [False, True])
def test_where_the_recording_goes_on_a_termination_ends_no_episode(recorded):
    """AntMaze without next observations, OGBench with them."""
    rows = ROWS | ({"next_observations": ROWS["observations"] + 0.5} if recorded else {})
    transitions, ends, returns = datasets.cut(rows, termination_ends_episode=False)
    count = 6 if recorded else 5
    assert column(transitions.termination) == [0, 0, 1, 0, 0, 0][:count]
    assert ends.tolist() == [count] and returns.tolist() == [66]
    np.testing.assert_array_equal(transitions.next_action[2], ROWS["actions"][3])
    assert column(transitions.next_observation)[2] == (2.5 if recorded else 3)


def test_an_episode_of_one_dropped_row_vanishes():
    rows = ROWS | {"timeouts": np.array([0, 0, 0, 1, 0, 1], np.float32)}
    transitions, ends, returns = datasets.cut(rows)
    assert column(transitions.observation) == [0, 1, 2, 4]
    assert ends.tolist() == [3, 4] and returns.tolist() == [6, 50]


def test_another_limit_of_evaluation_cuts_no_data(tmp_path):
    rows = {name: array for name, array in (ROWS | PENDULUM).items() if name != "timeouts"}
    path = write(tmp_path / "x.hdf5", rows, env_id="Pendulum-v1", max_episode_steps=3)
    dataset = datasets.load(path, env_steps=2)
    assert dataset.horizon == 2 and dataset.episode_ends.tolist() == [3, 5]


# --- Actions ------------------------------------------------------------------------------------
def test_actions_are_scaled_from_the_env_and_back(tmp_path):
    path = write(tmp_path / "x.hdf5", ROWS | PENDULUM, env_id="Pendulum-v1")
    dataset = datasets.load(path)
    np.testing.assert_allclose(dataset.transitions.action, ROWS["actions"][:5], atol=1e-6)
    env = dataset.make_env()
    assert env.action_space.low == -1 and env.action_space.high == 1
    env.reset(seed=0)
    env.unwrapped.state = np.array([0.0, 0.0])
    observation, *_ = env.step(np.array([0.5], np.float32))
    assert observation[2] == pytest.approx(3 * 0.5 * 2 * 0.05)  # torque 1, not 0.5


def test_actions_without_an_env_are_scaled_by_the_files_bounds(tmp_path):
    path = write(tmp_path / "x.hdf5", ROWS | {"actions": 3 * ROWS["actions"]}, action_low=-3.0)
    with h5py.File(path, "a") as file:
        file.attrs["action_high"] = 3.0
    dataset = datasets.load(path)
    np.testing.assert_allclose(dataset.transitions.action, ROWS["actions"][:5], atol=1e-6)
    assert dataset.make_env is None


def test_a_small_excess_is_clipped_and_said(tmp_path, capsys):
    path = write(tmp_path / "x.hdf5", ROWS | {"actions": 1.0005 * ROWS["actions"]})
    assert np.abs(datasets.load(path).transitions.action).max() == 1
    assert "leave their bounds by up to 5.0e-04: clipped" in capsys.readouterr().out


def test_a_larger_excess_is_an_error(tmp_path, capsys):
    path = write(tmp_path / "x.hdf5", ROWS | {"actions": 1.01 * ROWS["actions"]})
    assert "actions leave [-1, 1]" in error_of(capsys, datasets.load, path)
    path = write(tmp_path / "y.hdf5", ROWS | PENDULUM | {"actions": 3 * ROWS["actions"]})
    text = error_of(capsys, datasets.load, path, env="Pendulum-v1")
    assert "actions leave [-2, 2], the bounds of the env's action space; row 0: [-3.0]" in text


def test_an_infinite_box_is_an_error(tmp_path, capsys):
    path = write(tmp_path / "x.hdf5", ROWS, action_low=-np.inf, action_high=1)
    assert "the action space (Box) has no bounds" in error_of(capsys, datasets.load, path)


def test_integer_actions_know_their_number(tmp_path, capsys):
    actions = np.array([0, 1, 2, 0, 1, 2], np.int64)
    path = write(tmp_path / "x.hdf5", ROWS | {"actions": actions})
    dataset = datasets.load(path, actions="discrete")
    assert dataset.num_actions == 3 and dataset.transitions.action.dtype == np.int32
    assert column(dataset.transitions.next_action) == [1, 2, 2, 1, 2]
    assert "takes continuous ones only" in error_of(capsys, datasets.load, path)
    continuous = write(tmp_path / "y.hdf5", ROWS)
    text = error_of(capsys, datasets.load, continuous, actions="discrete")
    assert "takes integer ones only" in text


def test_actions_of_another_env_are_errors(tmp_path, capsys):
    rows = ROWS | {"observations": np.zeros((6, 4), np.float32)}
    path = write(tmp_path / "x.hdf5", rows)
    text = error_of(capsys, datasets.load, path, env="CartPole-v1")
    assert "CartPole-v1 takes 2 discrete ones" in text
    path = write(tmp_path / "y.hdf5", rows | {"actions": np.full(6, 2)})
    text = error_of(capsys, datasets.load, path, env="CartPole-v1", actions="any")
    assert "actions 2 to 2, but only 2 exist" in text
    path = write(tmp_path / "z.hdf5", ROWS | PENDULUM | {"actions": np.zeros((6, 2))})
    text = error_of(capsys, datasets.load, path, env="Pendulum-v1")
    assert "2 action dimensions" in text


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (1.0, -1.0),
        (-1.0, -1.0),
        ([-1, -1, -1.0], [1, 1, 1.0]),
        ("a", "b"),
        (-2.0, None),
        (np.nan, 1),
    ],
)
def test_a_box_that_is_none_is_one_line(tmp_path, capsys, low, high):
    given = {"action_low": low, "action_high": high}
    given = {key: value for key, value in given.items() if value is not None}
    path = write(tmp_path / "x.hdf5", ROWS | {"actions": np.zeros((6, 2))}, **given)
    assert "each low below its high, or neither attribute" in error_of(capsys, datasets.load, path)


def test_a_box_of_one_number_or_of_one_for_each_action(tmp_path):
    rows = ROWS | {"actions": np.tile(np.float32([1, 3]), (6, 1))}
    path = write(tmp_path / "x.hdf5", rows, action_low=[-1.0, 1.0], action_high=[3.0, 3.0])
    assert datasets.load(path).transitions.action[0].tolist() == [0, 1]
    path = write(tmp_path / "y.hdf5", rows, action_low=-3.0, action_high=3.0)
    np.testing.assert_allclose(datasets.load(path).transitions.action[0], [1 / 3, 1], rtol=1e-6)


def test_integer_actions_are_one_number_for_each_row(tmp_path, capsys):
    path = write(tmp_path / "x.hdf5", ROWS | {"actions": np.eye(6, 2, dtype=np.int32)})
    text = error_of(capsys, datasets.load, path, actions="any")
    assert "integer actions of shape [6, 2]: there must be one number per row" in text


# --- Scores and names ---------------------------------------------------------------------------
def test_scores(tmp_path, capsys):
    path = write(tmp_path / "x.hdf5", ROWS | PENDULUM, env_id="Pendulum-v1")
    dataset = datasets.load(path)
    assert "score column is the plain return" in capsys.readouterr().out
    assert dataset.score(-7.0) == -7.0
    with h5py.File(path, "a") as file:
        file.attrs.update(ref_min_score=10.0, ref_max_score=20.0)
    assert datasets.load(path).score(np.array([10.0, 15.0])).tolist() == [0, 50]
    by_success = datasets.Dataset("x", None, None, None, score_is_success=True)
    assert by_success.score(np.array([-3.0, -9.0]), np.array([0.25, 1.0])).tolist() == [25, 100]


@pytest.mark.parametrize("env", [None, "Pendulum-v1"])
@pytest.mark.parametrize("name", ["x", "hopper-medium-v2"])  # with and without a pair of its name
@pytest.mark.parametrize("pair", [(1.0, None), (None, 1.0), (2.0, 1.0), (1.0, 1.0)])
def test_half_a_pair_or_one_without_a_span_is_one_line(tmp_path, capsys, env, name, pair):
    given = zip(("ref_min_score", "ref_max_score"), pair, strict=True)
    given = {key: score for key, score in given if score is not None}
    path = write(tmp_path / f"{name}.hdf5", ROWS | PENDULUM, **given)
    text = error_of(capsys, datasets.load, path, env=env)
    assert "ref_min_score below ref_max_score, or neither" in text and repr(pair[0]) in text


def test_a_files_own_pair_comes_before_the_one_of_its_name(tmp_path):
    hopper = {"observations": np.zeros((6, 11)), "actions": np.zeros((6, 3))}
    path = write(
        tmp_path / "hopper-medium-v2.hdf5", ROWS | hopper, ref_min_score=1.0, ref_max_score=3.0
    )
    assert datasets.load(path).score(2.0) == 50


def test_the_pair_of_an_env_family_is_used_and_said(tmp_path, capsys):
    hopper = {"observations": np.zeros((6, 11)), "actions": np.zeros((6, 3))}
    dataset = datasets.load(write(tmp_path / "x.hdf5", ROWS | hopper), env="Hopper-v5")
    assert "D4RL's of hopper-expert-v2 are used" in capsys.readouterr().out
    assert (dataset.ref_min_score, dataset.ref_max_score) == (-20.272305, 3234.3)


def test_slug_and_suite():
    assert datasets.slug("a/b/hopper-medium-v4.hdf5") == "hopper-medium-v4"
    assert datasets.slug("D4RL/antmaze/umaze-v1") == "D4RL/antmaze/umaze-v1"
    suites = {
        "hopper-medium-v4.hdf5": "v4",
        "hopper-medium-v2": "mujoco",
        "antmaze-large-play-v2": "antmaze",
        "maze2d-umaze-v1": "maze2d",
        "pen-human-v1": "adroit",
        "D4RL/kitchen/partial-v2": "kitchen",
        "local/pointmaze/umaze-v0": "pointmaze",
        "local/mujoco/hopper-medium-v0": "mujoco_local",
        "env/Hopper-v4": "online",
        "local/ogbench/cube-single-play-v0": "ogbench",
        "cube-single-play-singletask-v0": "ogbench",
        "antmaze-large-navigate-singletask-task2-v0": "ogbench",
        "something-else": None,
    }
    assert {name: datasets.suite(name) for name in suites} == suites


def test_env_steps_must_be_positive(tmp_path, capsys):
    path = write(tmp_path / "x.hdf5", ROWS)
    assert "--env-steps 0" in error_of(capsys, datasets.load, path, None, 0)


def test_load_says_what_it_read_in_one_line(tmp_path, capsys):
    path = write(tmp_path / "x.hdf5", ROWS)
    datasets.load(path)
    text = capsys.readouterr().out
    assert text == (
        f"data {path}: 5 transitions (1 rows without a next observation left out), "
        "2 episodes, return 6.0 / 33.0 / 60.0 (min / mean / max), 1 terminations, "
        "1 truncations, O=1 A=1, 0.0 MB\n"
    )


# --- Bad data -----------------------------------------------------------------------------------
def spoilt(name, row, value):
    array = ROWS[name].copy()
    array[row] = value
    return ROWS | {name: array}


BAD = {
    "NaN": (spoilt("observations", 4, np.nan), "observations has NaN or inf in 1 rows, first in 4"),
    "inf": (spoilt("rewards", 2, np.inf), "rewards has NaN or inf in 1 rows, first in 2"),
    "float64 beyond float32": (
        ROWS | {"rewards": np.full(6, 1e300)},
        "rewards has numbers beyond 1e+18 in 6 rows, first in 0",
    ),
    "squares beyond float32": (
        spoilt("observations", 2, -1e19),
        "observations has numbers beyond 1e+18 in 1 rows, first in 2",
    ),
    "no key": ({k: x for k, x in ROWS.items() if k != "rewards"}, "no array 'rewards'"),
    "text": (ROWS | {"rewards": np.array([b"x"] * 6)}, "rewards is not an array of numbers"),
    "complex": (ROWS | {"actions": np.zeros(6, complex)}, "actions is not an array of numbers"),
    "scalar": (ROWS | {"rewards": np.float32(1)}, "rewards is not an array of numbers"),
    "empty": ({k: x[:0] for k, x in ROWS.items()}, "observations is empty"),
    "lengths": (ROWS | {"actions": ROWS["actions"][:5]}, "5 rows of actions but 6 of rewards"),
    "axes": (
        ROWS | {"rewards": np.zeros((6, 2))},
        "rewards has shape [6, 2], it must have 1 axis",
    ),
    "no columns": (ROWS | {"observations": np.zeros((6, 0))}, "observations is empty"),
    "widths": (ROWS | {"next_observations": np.zeros((6, 2))}, "differ in width"),
    "one row": ({k: x[3:4] for k, x in ROWS.items()}, "no row with a known next observation"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_one_line(case, tmp_path, capsys):
    rows, words = BAD[case]
    text = error_of(capsys, datasets.load, write(tmp_path / "bad.hdf5", rows))
    assert words.replace("first in ", "first in row ") in text and "bad.hdf5" in text


def test_bad_files_are_one_line(tmp_path, capsys):
    whole = Path(write(tmp_path / "whole.hdf5", ROWS)).read_bytes()
    (tmp_path / "cut.hdf5").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.hdf5").touch()
    (tmp_path / "pickle.hdf5").write_bytes(b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}\x94.")
    (tmp_path / "folder.hdf5").mkdir()
    with h5py.File(tmp_path / "huge.hdf5", "w") as file:  # a few kilobytes that say 120 terabytes
        for key in ROWS:
            file.create_dataset(key, (10**13, 3), "f4", chunks=(1024, 3))
    for name in ("cut", "empty", "pickle", "huge"):
        text = error_of(capsys, datasets.load, str(tmp_path / f"{name}.hdf5"))
        assert "cannot be read as HDF5" in text
    assert "a directory" in error_of(capsys, datasets.load, str(tmp_path / "folder.hdf5"))
    assert "a directory" in error_of(capsys, datasets.load, str(tmp_path))
    (tmp_path / "data.pkl").write_bytes(b"\x80\x04}\x94.")
    assert "cannot be read as HDF5" in error_of(capsys, datasets.load, str(tmp_path / "data.pkl"))
    text = error_of(capsys, datasets.load, str(tmp_path / "whale.hdf5"))
    assert "no such file; near it: whole.hdf5" in text


def test_an_env_of_another_shape_is_one_line(tmp_path, capsys):
    path = write(tmp_path / "x.hdf5", ROWS)
    text = error_of(capsys, datasets.load, path, env="Pendulum-v1")
    assert "1 numbers per observation, Pendulum-v1 gives (3,)" in text
    assert "cannot be made" in error_of(capsys, datasets.load, path, env="Penduluum-v1")


def test_exit_code_of_the_command_line(tmp_path):
    command = [sys.executable, "-m", "common.datasets", str(tmp_path / "none.hdf5")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_import_needs_numpy_only():
    code = """
import sys
for name in ("gymnasium", "minari", "h5py", "ogbench", "mujoco", "tqdm", "matplotlib", "jax"):
    sys.modules[name] = None
sys.modules["filelock"] = None
import common.datasets.views
import common.recipes.ogbench
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


# --- Views --------------------------------------------------------------------------------------
@pytest.fixture
def made(tmp_path):
    """Episodes of 3 (ends truly) and 3 rows, rewards 1 2 3 and 10 20 30."""
    rows = ROWS | {"next_observations": ROWS["observations"]}
    return datasets.load(write(tmp_path / "x.hdf5", rows))


def test_episodes_and_return_range(made):
    starts, ends = datasets.episodes(made)
    assert starts.tolist() == [0, 3] and ends.tolist() == [3, 6]
    assert datasets.return_range(made) == (6, 60)


def test_returns_to_go(made):
    assert datasets.returns_to_go(made).tolist() == [6, 5, 3, 60, 50, 30]
    halved = [1 + 1 + 0.75, 2 + 1.5, 3, 10 + 10 + 7.5, 20 + 15, 30]
    assert datasets.returns_to_go(made, 0.5).tolist() == halved
    np.testing.assert_array_equal(made.transitions.reward, ROWS["rewards"])  # not overwritten


def test_returns_to_go_of_many_lengths_agree_with_a_loop(tmp_path):
    draw = np.random.default_rng(0)
    count = 500
    rows = {
        "observations": draw.normal(size=(count, 2)),
        "actions": draw.uniform(-1, 1, (count, 1)),
        "rewards": draw.normal(size=count).astype(np.float32),
        "terminals": (draw.uniform(size=count) < 0.03).astype(np.float32),
        "timeouts": (draw.uniform(size=count) < 0.03).astype(np.float32),
        "next_observations": draw.normal(size=(count, 2)),
    }
    dataset = datasets.load(write(tmp_path / "x.hdf5", rows))
    t, expected, after = dataset.transitions, np.zeros(count), 0.0
    for row in reversed(range(count)):
        if t.termination[row] or t.truncation[row]:
            after = 0.0
        after = expected[row] = t.reward[row] + 0.9 * after
    np.testing.assert_allclose(datasets.returns_to_go(dataset, 0.9), expected, rtol=1e-5, atol=1e-5)


def test_chunks_stop_at_the_end_of_the_episode(made):
    index, valid = datasets.chunks(made, 2)
    assert index.tolist() == [[0, 1], [1, 2], [2, 2], [3, 4], [4, 5], [5, 5]]
    assert valid.tolist() == [[1, 1], [1, 1], [1, 0], [1, 1], [1, 1], [1, 0]]
    index, valid = datasets.chunks(made, 4, rows=[4, 1])
    assert index.tolist() == [[4, 5, 5, 5], [1, 2, 2, 2]]
    assert valid.sum(axis=1).tolist() == [2, 2]


def test_filter_by_return(made):
    best = datasets.filter_by_return(made, 0.5)
    assert column(best.transitions.reward) == [10, 20, 30]
    assert best.episode_ends.tolist() == [3] and best.episode_returns.tolist() == [60]
    assert len(datasets.filter_by_return(made, 1.0).transitions.reward) == 6
    assert len(datasets.filter_by_return(made, 0.01).episode_ends) == 1  # never nothing
    with pytest.raises(ValueError, match="not 0"):
        datasets.filter_by_return(made, 0)


def toy(lengths, returns):
    """A data set whose observations number the rows."""
    ends = np.cumsum(lengths)
    row = np.arange(ends[-1], dtype=np.float32)
    transitions = datasets.Transitions(row[:, None], row[:, None], *[row] * 5)
    return datasets.Dataset("toy", transitions, ends, np.array(returns, float))


@pytest.mark.parametrize(
    ("fraction", "fraction_of", "kept"),
    [  # episodes 0 to 4 of 1, 2, 3, 4 and 10 rows; 3 is the best, then 0, 2, 4, 1
        (0.2, "episodes", [3]),
        (0.39, "episodes", [3]),
        (0.4, "episodes", [0, 3]),
        (0.6, "episodes", [0, 2, 3]),
        (1.0, "episodes", [0, 1, 2, 3, 4]),
        (0.01, "transitions", [3]),  # one at least
        (0.2, "transitions", [3]),  # 4 of 20 rows
        (0.24, "transitions", [3]),
        (0.25, "transitions", [0, 3]),
        (0.4, "transitions", [0, 2, 3]),
        (0.89, "transitions", [0, 2, 3]),  # no more of them, so not the long one
        (0.9, "transitions", [0, 2, 3, 4]),
        (0.99, "transitions", [0, 2, 3, 4]),  # nor a worse one that would fit
        (1.0, "transitions", [0, 1, 2, 3, 4]),
    ],
)
def test_the_best_episodes(fraction, fraction_of, kept):
    lengths, returns = np.array([1, 2, 3, 4, 10]), np.array([8.0, -5, 7, 9, 1])
    dataset = toy(lengths, returns)
    best = datasets.filter_by_return(dataset, fraction, fraction_of)
    starts = np.cumsum(lengths) - lengths
    rows = np.concatenate([starts[i] + np.arange(lengths[i]) for i in kept])  # in their old order
    for column in best.transitions:
        assert column.reshape(-1).tolist() == rows.tolist()
    assert best.episode_ends.tolist() == np.cumsum(lengths[kept]).tolist()
    assert best.episode_returns.tolist() == returns[kept].tolist()


def test_the_best_episodes_by_episodes_unless_said():
    dataset = toy([5, 1, 1, 1], [3, 2, 1, 0])
    assert datasets.filter_by_return(dataset, 0.5).episode_ends.tolist() == [5, 6]
    assert datasets.filter_by_return(dataset, 0.5, "transitions").episode_ends.tolist() == [5]
    assert datasets.filter_by_return(dataset, 0.7, "transitions").episode_ends.tolist() == [5]


def test_of_equal_returns_the_shorter_episode_is_better():
    dataset = toy([4, 2, 3, 2], [0, 0, 0, -1])
    for fraction, ends in ((0.25, [2]), (0.5, [2, 5]), (0.75, [4, 6, 9])):
        assert datasets.filter_by_return(dataset, fraction).episode_ends.tolist() == ends


@pytest.mark.parametrize("count", [100, 300])
def test_rounding_errors_of_the_share_cost_no_episode(count):
    dataset = toy([1] * count, np.arange(count))
    for percent in range(1, 101):  # 0.29 * 100 is 28.999999999999996
        for fraction in {percent / 100, min(0.01 * percent, 1.0)}:
            best = datasets.filter_by_return(dataset, fraction)
            assert len(best.episode_ends) == percent * count // 100


def test_return_span(capsys):
    assert datasets.return_span(toy([1, 2, 3], [4, -2.5, 1])) == 6.5
    assert isinstance(datasets.return_span(toy([1, 2], [0, 1])), float)
    text = error_of(capsys, datasets.return_span, toy([1, 2], [3, 3]))
    assert "toy: " in text and "returns 3, so" in text and "return_scale" in text
    assert "toy: " in error_of(capsys, datasets.return_span, toy([4], [1]))  # one episode


def test_a_look_at_the_data(tmp_path, capsys):
    rows = {name: np.repeat(array, 4, axis=0) for name, array in ROWS.items()}
    rows["observations"] = np.repeat(rows["observations"], 4, axis=1)
    path = write(tmp_path / "maze.hdf5", rows)
    file = tmp_path / "look.png"
    pytest.importorskip("matplotlib")
    command.main([path, "--plot", str(file)])
    text = capsys.readouterr().out
    for words in (
        "episode length",
        "return ",
        "action ",
        "observation ",
        "terminations",
        "drawn: ",
    ):
        assert words in text
    assert file.read_bytes().startswith(b"\x89PNG")
    text = error_of(capsys, command.main, [path, "--plot", str(tmp_path / "no" / "look.png")])
    assert "cannot be drawn" in text


# --- Recorded data ------------------------------------------------------------------------------
@pytest.mark.parametrize("recorded", [True, False], ids=["next_observations", "without"])
def test_hopper_agrees_row_for_row_with_an_independent_reading(atoll_data, tmp_path, recorded):
    source = atoll_data / "hopper-medium-v4.hdf5"
    with h5py.File(source) as file:
        raw = {name: file[name][()] for name in file}
        facts = dict(file.attrs)
    path = source
    if not recorded:
        del raw["next_observations"]
        path = write(tmp_path / "hopper-medium-v4.hdf5", raw, **facts)
    t = datasets.load(str(path)).transitions
    at = 0
    for i in range(len(raw["rewards"])):  # the rules, row by row
        last = raw["terminals"][i] or raw["timeouts"][i]
        if last and not raw["terminals"][i] and not recorded:
            continue
        j = i if last else i + 1
        following = raw["next_observations"][i] if recorded else raw["observations"][j]
        assert (t.observation[at] == raw["observations"][i]).all()
        assert (t.action[at] == raw["actions"][i]).all() and t.reward[at] == raw["rewards"][i]
        assert (t.next_observation[at] == following).all()
        assert (t.next_action[at] == raw["actions"][j]).all()
        assert t.termination[at] == raw["terminals"][i]
        at += 1
    assert at == len(t.reward) == (100_906 if recorded else 100_822)
    if not recorded:  # where both are known they are the same
        kept = ~raw["timeouts"].astype(bool)
        with h5py.File(source) as file:
            recorded_next = file["next_observations"][()][kept]
        inside = t.termination == 0
        np.testing.assert_array_equal(t.next_observation[inside], recorded_next[inside])


def mujoco_state(env, observation):
    """The state of Hopper or HalfCheetah but for x, which changes nothing: 0."""
    model = env.unwrapped.model
    position = np.concatenate([[0.0], observation[: model.nq - 1]])
    env.unwrapped.set_state(position, observation[model.nq - 1 :])


def cartpole_state(env, observation):
    env.unwrapped.state = observation.astype(np.float64)
    env.unwrapped.steps_beyond_terminated = None


def pendulum_state(env, observation):
    angle = np.arctan2(observation[1], observation[0])
    env.unwrapped.state = np.array([angle, observation[2]], np.float64)


SIMULATED = {  # file -> how to restore a state, error allowed for next observations and rewards
    "hopper-medium-v4": (mujoco_state, 1e-5, 1e-5),
    "halfcheetah-medium-expert-v4": (mujoco_state, 2e-4, 2e-5),
    "d3rlpy-cartpole-replay-v0": (cartpole_state, 1e-6, 0),
    "d3rlpy-pendulum-replay-v0": (pendulum_state, 1e-5, 1e-5),
}


@pytest.mark.parametrize("name", SIMULATED)
def test_the_evaluation_env_repeats_the_recorded_steps(atoll_data, name, capsys):
    """States are stored as float32 and without the solver's warm start, so errors are not 0."""
    restore, *allowed = SIMULATED[name]
    dataset = datasets.load(str(atoll_data / f"{name}.hdf5"), actions="any")
    t, env = dataset.transitions, dataset.make_env()
    env.reset(seed=0)
    errors = []
    for row in range(0, len(t.reward), len(t.reward) // 400):
        if "hopper" in name and (np.abs(t.observation[row, 5:]) >= 10).any():
            continue  # Hopper's observation clips speeds at 10: the state is not known
        if t.termination[row] and "hopper" not in name and "cartpole" not in name:
            continue
        env.env.reset() if row % 4000 == 0 else None  # the time limit
        restore(env, t.observation[row])
        observation, reward, termination, _, _ = env.step(t.action[row])
        error = np.abs(observation - t.next_observation[row]).max()
        errors.append((error, abs(float(reward) - t.reward[row])))
        assert termination == bool(t.termination[row])
    largest = np.max(errors, axis=0)
    with capsys.disabled():
        print(
            f"\n{name}: {len(errors)} rows, largest error {largest[0]:.1e}, reward {largest[1]:.1e}"
        )
    assert (largest <= allowed).all()

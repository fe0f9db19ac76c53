# SPDX-License-Identifier: Apache-2.0
"""Common mistakes in a user's own files are warned of, and sound data are not."""

import h5py
import numpy as np
import pytest
from test_datasets import write

from common import datasets
from common.datasets import checks, minari, mistakes

CROSS = "next_observations cross the ends of episodes"
LIMITS = "if that is a time limit, store it as timeouts"


def walk(lengths, resets=True):
    """Episodes of a random walk in D4RL's layout, each cut off; without resets it is one walk."""
    draw, count = np.random.default_rng(0), sum(lengths)
    timeouts = np.zeros(count, np.float32)
    timeouts[np.cumsum(lengths) - 1] = 1
    steps = draw.normal(size=(count, 2)).astype(np.float32)
    observations, position = [], np.zeros(2, np.float32)
    for step, end in zip(steps, timeouts, strict=True):
        observations.append(position)
        position = position + step
        if end and resets:
            position = draw.normal(size=2).astype(np.float32) + 50
    observations = np.stack(observations)
    return {
        "observations": observations,
        "next_observations": observations + steps,
        "actions": steps.clip(-1, 1)[:, :1],
        "rewards": steps[:, 0],
        "terminals": np.zeros(count, np.float32),
        "timeouts": timeouts,
    }


def ended(rows, limits=False):
    """The same, and every second episode, or every one, truly ends where it was cut off."""
    ends = np.flatnonzero(rows["timeouts"])[:: 1 if limits else 2]
    terminals, timeouts = rows["terminals"].copy(), rows["timeouts"].copy()
    terminals[ends], timeouts[ends] = 1, 0
    return rows | {"terminals": terminals, "timeouts": timeouts}


def rolled(rows):
    return rows | {"next_observations": np.roll(rows["observations"], -1, axis=0)}


def shifted(rows):
    """The row after it, as the last row has none."""
    x = rows["observations"]
    return rows | {"next_observations": np.concatenate([x[1:], x[-1:]])}


def without(rows, *names):
    return {name: x for name, x in rows.items() if name not in names}


def said(capsys, tmp_path, rows):
    """What loading the rows as a file prints as a warning, at most one line."""
    capsys.readouterr()
    datasets.load(write(tmp_path / "own.hdf5", rows))
    text = capsys.readouterr().err
    assert text.count("\n") == (text != "")
    return text


EPISODES = [30, 20, 25, 30, 15]
WALK, GOAL_ON = walk(EPISODES), walk(EPISODES, resets=False)


@pytest.mark.parametrize(
    "rows",
    [
        rolled(WALK),
        shifted(WALK),
        rolled(ended(WALK)),
        rolled(ended(WALK, limits=True)),
        rolled(walk([30, 20, 25])),
    ],
    ids=["cut off", "shifted", "some ended", "all ended", "few"],
)
def test_rolled_next_observations_are_told(rows, capsys, tmp_path):
    line = said(capsys, tmp_path, rows)
    assert line.startswith(f"WARNING: {tmp_path / 'own.hdf5'}: {CROSS}")
    remedy = without(rows, "next_observations")  # "or leave them out"
    assert said(capsys, tmp_path, remedy) == ""


def test_rows_that_go_on_after_a_goal_do_not_hide_it(capsys, tmp_path):
    """Their terminals are no ends; where the walk was cut off, the next row is another walk's."""
    terminals = (np.arange(sum(EPISODES)) % 3 == 0).astype(np.float32)
    assert said(capsys, tmp_path, WALK | {"terminals": terminals}) == ""
    assert CROSS in said(capsys, tmp_path, rolled(WALK | {"terminals": terminals}))


@pytest.mark.parametrize(
    "rows",
    [
        WALK,
        ended(WALK),
        without(WALK, "next_observations"),
        GOAL_ON,  # one walk, cut into episodes: the next row truly is the next observation
        shifted(GOAL_ON),
        ended(shifted(GOAL_ON)),
        rolled(walk([1] * 20)),  # no step inside an episode tells a jump
        rolled(WALK | {"observations": np.zeros((sum(EPISODES), 2), np.float32)}),
    ],
    ids=["cut off", "ended", "without", "goes on", "shifted", "goals", "one step", "constant"],
)
def test_sound_next_observations_are_not(rows, capsys, tmp_path):
    assert said(capsys, tmp_path, rows) == ""


def test_a_goal_that_changes_with_the_episode_is_no_reset(capsys, tmp_path):
    """One walk between goals, which are a part of the observation and change at each end."""
    goal = np.repeat(np.arange(5.0), EPISODES)[:, None] * 100
    observations = np.hstack([GOAL_ON["observations"], goal]).astype(np.float32)
    assert said(capsys, tmp_path, shifted(GOAL_ON | {"observations": observations})) == ""


@pytest.mark.parametrize("timeouts", ["none", "all zero"])
@pytest.mark.parametrize("lengths", [[20] * 4, [20] * 3 + [7]], ids=["whole", "broken off"])
def test_time_limits_among_the_terminals_are_told(timeouts, lengths, capsys, tmp_path):
    rows = ended(walk(lengths), limits=True)
    if lengths[-1] < 20:
        rows["terminals"][-1] = 0
    stored = {"terminals": 0 * rows["terminals"], "timeouts": rows["terminals"]}
    rows = without(rows, "timeouts") if timeouts == "none" else rows
    line = said(capsys, tmp_path, rows)
    count = 3 if lengths[-1] < 20 else 4
    assert f"no timeouts, and {count} episodes terminate after 20 steps each; {LIMITS}" in line
    assert said(capsys, tmp_path, rows | stored) == ""


@pytest.mark.parametrize(
    "lengths", [[20] * 2, [20, 20, 20, 25], [20, 19, 20, 20], [1] * 9, [20, 20, 7]]
)
def test_true_ends_are_not(lengths, capsys, tmp_path):
    rows = ended(walk(lengths), limits=True)
    assert said(capsys, tmp_path, without(rows, "timeouts")) == ""


def test_the_rows_of_d4rls_antmaze_are_not(capsys):
    """Goals that are reached stand among its terminals, and no termination ends an episode."""
    rows = ended(GOAL_ON, limits=True)
    mistakes.warn("antmaze", without(rows, "timeouts"), termination_ends_episode=False)
    assert capsys.readouterr().err == ""


def test_recorded_data_are_not_and_would_be(atoll_data, capsys):
    for path in sorted(atoll_data.glob("*.hdf5")):
        capsys.readouterr()
        datasets.load(path, actions="any")
        assert capsys.readouterr().err == "", path
        with h5py.File(path) as file:
            rows = {name: file[name][()] for name in ("observations", "terminals", "timeouts")}
        mistakes.warn("rolled", rolled(rows), True)
        assert CROSS in capsys.readouterr().err, path


def test_data_made_here_are_not(capsys):
    """One walk, cut into episodes, and the policies of a cart pole."""
    for dataset_id in ("local/pointmaze/umaze-v0", "local/cartpole/mixed-v0"):
        datasets.load(dataset_id, actions="any")
        source = minari.read(dataset_id, None, None)
        rows = checks.rows(dataset_id, source.rows)
        mistakes.warn(dataset_id, rows, source.termination_ends_episode)
        assert "WARNING" not in capsys.readouterr().err

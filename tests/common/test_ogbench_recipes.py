# SPDX-License-Identifier: Apache-2.0
"""Episodes of OGBench's recipes are like those of OGBench's own scripts; the official sizes."""

import json
import os

import helpers_runs as runs
import numpy as np
import ogbench_episodes
import pytest

from common import machine, recipes
from common.recipes import __main__ as command
from common.recipes import ogbench

pytest.importorskip("ogbench")
OFFICIAL = json.loads(ogbench_episodes.FILE.read_text())["episodes"]
FAST = ["pointmaze-medium-stitch-v0"]  # the others play a thousand steps per episode
EPISODES = 20
TOO_FAR = 4.5  # standard errors; a file has up to 150 statistics


def far(mine, theirs):
    """{statistic: standard errors between the means over episodes}, where those are too many."""
    found = {}
    for key, values in theirs.items():
        error = np.sqrt(np.var(mine[key]) / len(mine[key]) + np.var(values) / len(values))
        distance = abs(np.mean(mine[key]) - np.mean(values))
        scale = max(1e-3, abs(np.mean(values)))
        if distance > TOO_FAR * error + 1e-4 * scale:
            found[key] = distance / max(error, 1e-12)
    return found


@pytest.mark.parametrize("name", runs.slow_but(sorted(OFFICIAL), FAST))
def test_episodes_are_like_those_of_the_official_script(name, tmp_path):
    """Returns, lengths, visits to the goal, observations, actions, steps."""
    theirs = OFFICIAL[name]
    ogbench.make(name, tmp_path, EPISODES, 1 if name in FAST else min(2, machine.cores()))
    mine = ogbench_episodes.statistics(name, tmp_path)
    assert {*mine} == {*theirs} and len(mine["return"]) == EPISODES
    assert not far(mine, theirs)
    wrong = dict(mine)  # what a recipe with another noise would give is noticed
    wrong["size of an action 0"] = [1.3 * x for x in mine["size of an action 0"]]
    assert list(far(wrong, theirs)) == ["size of an action 0"]


@pytest.mark.parametrize(
    ("name", "episodes"),
    [
        ("cube-single-play-v0", 1000),
        ("cube-triple-noisy-v0", 3000),
        ("puzzle-4x6-play-v0", 5000),
        ("pointmaze-giant-navigate-v0", 500),
        ("pointmaze-large-stitch-v0", 5000),
    ],
)
def test_official_sizes(name, episodes, monkeypatch):
    """Those of data_gen_scripts/commands.sh, on all cores."""
    asked = []
    monkeypatch.setattr(recipes, "make_ogbench", lambda *words: asked.append(words))
    command.main([f"local/ogbench/{name}", "--official"])
    command.main([f"local/ogbench/{name}", "--official", "--workers", "3"])
    assert [words[0] for words in asked] == [name, name]
    assert [words[2:] for words in asked] == [(episodes, machine.cores()), (episodes, 3)]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["local/cartpole/mixed-v0", "--official"], "leave --official out"),
        (["local/ogbench/scene-play-v0", "--official", "--episodes", "7"], "give one of the two"),
    ],
)
def test_official_where_it_cannot_be(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(tmp_path))
    with pytest.raises(SystemExit) as leave:
        command.main(words)
    (line,) = capsys.readouterr().err.splitlines()
    assert leave.value.code == 2 and says in line
    assert not os.listdir(tmp_path)


NAME = "pointmaze-giant-navigate-v0"  # OGBench's has 500 episodes


def store(folder, episodes):
    """A file of that many episodes of three rows, without the .about.json beside it."""
    (folder / "local").mkdir()
    terminals = np.tile([False, False, True], episodes)
    np.savez(folder / "local" / f"{NAME}.npz", terminals=terminals)


def test_a_file_that_is_there_says_its_size(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(tmp_path))
    store(tmp_path, 500)
    for flags in ([], ["--official"], ["--episodes", "500"]):
        command.main([f"local/ogbench/{NAME}", *flags])
        (line,) = capsys.readouterr().out.splitlines()
        assert line.endswith(f"{NAME}.npz is there already, with 500 episodes")


@pytest.mark.parametrize("about", [False, True])
def test_a_file_of_another_size_is_not_the_official_one(about, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(tmp_path))
    store(tmp_path, 100)
    if about:  # of a file that is no longer there
        (tmp_path / "local" / f"{NAME}.about.json").write_text('{"episodes": 500}')
    with pytest.raises(SystemExit) as leave:
        command.main([f"local/ogbench/{NAME}", "--official"])
    (line,) = capsys.readouterr().err.splitlines()
    assert leave.value.code == 2 and "holds 100 episodes, not 500; delete it" in line


def test_a_damaged_file_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(tmp_path))
    store(tmp_path, 100)
    file = tmp_path / "local" / f"{NAME}.npz"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(SystemExit) as leave:
        command.main([f"local/ogbench/{NAME}"])
    (line,) = capsys.readouterr().err.splitlines()
    assert leave.value.code == 2 and "is damaged" in line and "delete it to make it again" in line


def test_goals_of_stitch_are_four_cells_away():
    walls = np.ones((7, 7), int)
    walls[1:6, 1:6] = 0
    walls[2, 2:5] = 1
    goals = ogbench._cells_at(walls, (1, 1), 4)
    assert sorted(goals) == [(1, 5), (3, 3), (4, 2), (5, 1)]
    assert ogbench._cells_at(np.ones((3, 3), int), (1, 1), 4) == []

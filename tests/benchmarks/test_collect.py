# SPDX-License-Identifier: Apache-2.0
"""benchmarks/collect.py: the five sets of an env, made small; interrupted; bad input."""

import json

import helpers_runs as runs
import numpy as np
import pytest

import collect
from common import datasets, folders, interaction
from common.recipes import mujoco

SMALL = """--num-updates 0 --random-steps 60 --hidden 8 --batch-size 8 --actor-learning-rate 1e-3
--updates-per-step 0.5 --steps-per-refresh 20 --log-every 20 --eval-every 40 --eval-episodes 1
--keep all --wandb disabled --resume"""
SMALL_FLAGS = " ".join(SMALL.split())
ARGUMENTS = ["hopper", "--rows", "150", "--updates", "80"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of the data, run folder): interrupted after the second set, then finished."""
    root = tmp_path_factory.mktemp("collect")
    (root / "data").mkdir()
    store, kinds = mujoco.store, []

    def interrupted(task, kind, *rest):
        store(task, kind, *rest)
        kinds.append(kind)
        if len(kinds) == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect, "SETTINGS", SMALL)
        patch.setattr(collect, "EPISODES", 2)
        patch.setattr(collect, "BEST", 2)
        patch.setattr(mujoco, "TOGETHER", 5)
        patch.setattr(mujoco, "store", interrupted)
        patch.setenv("MINARI_DATASETS_PATH", str(root / "data"))
        argv = [*ARGUMENTS, "--runs-dir", str(root / "runs")]
        with pytest.raises(KeyboardInterrupt):
            collect.main(argv)
        collect.main(argv)
        assert kinds == [*mujoco.KINDS]  # each was made once
        (root / "again").mkdir()
        patch.setenv("MINARI_DATASETS_PATH", str(root / "again"))
        collect.main(argv)
    return root, root / "runs" / "sac" / "env" / "Hopper-v4" / "seed0"


@pytest.fixture
def load(made, monkeypatch):
    """{kind: Dataset}, by the ids that a user types."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(made[0] / "data"))
    return lambda kind: datasets.load(mujoco.dataset_id("hopper", kind))


def test_an_interrupted_command_makes_the_files_of_an_undisturbed_one(made):
    root, _ = made
    first, again = runs.tree(root / "data"), runs.tree(root / "again")
    assert len(first) > 10 and first == again


def test_sets_that_were_made_in_another_way_are_not_taken(made, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(collect, "SETTINGS", SMALL)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(made[0] / "data"))
    for changed in (["--seed", "1"], ["--rows", "160"], ["--updates", "120"]):
        argv = [*ARGUMENTS, "--runs-dir", str(tmp_path / "runs"), *changed]
        with pytest.raises(SystemExit) as leave:
            collect.main(argv)
        (line,) = capsys.readouterr().err.splitlines()
        assert leave.value.code == 2 and "hopper-random-v0 was made by 'SAC, 80 updates" in line
        assert not (tmp_path / "runs").exists()


def test_the_sets_are_what_they_say(made, load):
    _, folder = made
    record = json.loads((folder / "collected.json").read_text())
    rows = {row["dataset"].split("hopper-")[1].removesuffix("-v0"): row for row in record["sets"]}
    assert record["command"].startswith("python benchmarks/collect.py hopper --rows 150 --updates")
    assert (record["rows"], record["updates"], record["settings"]) == (150, 80, SMALL_FLAGS)
    medium = record["policies"]["medium"]["update"]
    assert [rows[kind]["rows"] for kind in mujoco.KINDS] == [150, 150, 60 + 2 * medium, 150, 300]
    for kind in mujoco.KINDS:
        dataset = load(kind)
        data = dataset.transitions
        assert len(data.reward) == rows[kind]["rows"]
        assert dataset.make_env().spec.id == "Hopper-v4" and dataset.horizon == 1000
        assert dataset.ref_max_score == 3234.3
        # An episode ends by falling; the recording breaks off the last one.
        ends = dataset.episode_ends - 1
        assert (data.termination + data.truncation)[ends].all()
        assert data.termination.sum() == rows[kind]["terminations"]
        assert 1 <= data.truncation.sum() <= 2
        score = np.mean(mujoco.score("hopper", dataset.episode_returns))
        np.testing.assert_allclose(score, rows[kind]["score"], rtol=1e-5)
        within = np.setdiff1d(np.arange(len(data.reward) - 1), ends)
        assert np.array_equal(data.next_observation[within], data.observation[within + 1])
    assert rows["medium"]["d4rl_score"] == 44.2 and rows["random"]["d4rl_score"] is None


def test_medium_replay_has_the_rows_of_the_training(made, load):
    _, folder = made
    data = load("medium-replay").transitions
    seen = interaction.recorded(folder, data, 1, len(data.reward))
    for name in ("observation", "action", "next_observation"):
        np.testing.assert_allclose(getattr(data, name), seen[name][:, 0], rtol=1e-6)
    np.testing.assert_allclose(data.reward, seen["reward"][:, 0, 0], rtol=1e-6)
    assert np.array_equal(data.termination, seen["termination"][:, 0, 0])


def test_the_policies_are_the_nearest_and_the_best(made):
    _, folder = made
    record = json.loads((folder / "collected.json").read_text())
    scores = json.loads((folder / "scores.json").read_text())
    assert {*scores} == {"40", "80"}  # every evaluation but that of the untrained policy
    policies = record["policies"]
    assert policies["expert"]["score"] == max(scores.values())
    near = min(scores.values(), key=lambda score: abs(score - 44.2))
    assert policies["medium"]["score"] == near


def test_episodes_do_not_depend_on_how_many_are_played_together(monkeypatch):
    def act(observation, numbers, step):
        return np.float32(np.sin(numbers[:, None] + step + np.arange(3)))

    found = []
    for together in (1, 3):
        monkeypatch.setattr(mujoco, "TOGETHER", together)
        make_env = datasets.load("env/Hopper-v4").make_env
        found.append(list(mujoco.play(make_env, act, 100, seed=0)))
    one, three = found
    assert sum(len(x.reward) for x in one) == 100 and one[-1].truncation[-1]
    assert len(one) == len(three) > 2
    for x, y in zip(one, three, strict=True):
        assert all(map(np.array_equal, x, y))


BAD = [
    (["ant"], "ant: not known here; there are hopper, halfcheetah, walker2d"),
    (["hopper", "--rows", "0"], "--rows 0: must be at least 1"),
    (["hopper", "--updates", "10"], "--online-updates 10 is no multiple of --log-every 1000"),
]


@pytest.mark.parametrize(("argv", "line"), BAD, ids=[" ".join(argv) for argv, _ in BAD])
def test_bad_input_is_one_line(argv, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with pytest.raises(SystemExit) as leave:
        collect.main(argv)
    (found,) = capsys.readouterr().err.splitlines()
    assert leave.value.code == 2 and line in found
    assert not any(tmp_path.iterdir())


def test_a_set_that_is_not_there_names_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with pytest.raises(SystemExit) as leave:
        datasets.load("local/mujoco/walker2d-medium-replay-v0")
    (line,) = capsys.readouterr().err.splitlines()
    assert leave.value.code == 2
    assert "python benchmarks/collect.py walker2d" in line and "minutes" in line
    assert folders.minari() == tmp_path and not any(tmp_path.iterdir())

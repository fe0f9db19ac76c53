# SPDX-License-Identifier: Apache-2.0
"""benchmarks/report.py: what the page says of made-up run folders."""

import json
import math
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

import figures
import published
import readers
from benchmarks import report
from common.experiment import provenance, wrong_words

ROOT = Path(__file__).resolve().parents[2]
CODE = {"algorithm": "aaa", "common": "ccc"}


def write_run(
    folder, scores, algorithm="bc", best=None, updates=20, code=CODE, episodes=3, **config
):
    """A finished run with these final scores by seed, all of them 5 halfway."""
    folder.mkdir(parents=True)
    reference = config.pop("reference", [0.0, 200.0])
    record = {"reference": reference, "data_return": {"mean": 50.0, "max": 150.0}}
    record |= config.pop("record", {})
    scores = scores if isinstance(scores, dict) else dict(enumerate(scores))
    config = {"dataset": "made.hdf5", "seeds": [*scores]} | config
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"record": record}))
    by_seed = {str(seed): score for seed, score in scores.items()}
    result = {
        "algorithm": algorithm,
        "num_updates": updates,
        "eval_episodes": episodes,
        "score": by_seed,
        "best_score": by_seed if best is None else dict.fromkeys(by_seed, best),
        "return": {seed: None if x is None else 2 * x for seed, x in by_seed.items()},
        "diverged": {seed: updates // 2 for seed, x in by_seed.items() if x is None},
        "updates_per_second": 1.5,
        "train_seconds": 3000.0,
        "eval_seconds": 1000.0,
        "eval_share": 0.25,
        "hardware": "none",
        "code": code,
        "versions": {"python": "3"},
    }
    (folder / "result.json").write_text(json.dumps(result))
    rows = ["update,seed,actor_loss,score"]
    for update in (updates // 2, updates):
        for seed, score in scores.items():
            shown = "" if score is None else 5 if update < updates else score
            rows.append(f"{update},{seed},0.1,{shown}")
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")


def cells(found):
    return [[str(x) for x in row] for row in found.rows]


def rows(tmp_path):
    return cells(report.table(readers.find((tmp_path,))[0]))


def page(tmp_path, *folders, **options):
    """The Markdown page."""
    folders = folders or (tmp_path / "runs",)
    report.main(report.Arguments(folders, output=tmp_path / "out" / "page", **options))
    return (tmp_path / "out" / "page.md").read_text()


# --- Rows ---------------------------------------------------------------------------------------
def test_a_row_by_hand(tmp_path):
    write_run(tmp_path / "one", [10.0, 20.0], best=30.0)
    (row,) = rows(tmp_path)
    assert row[:7] == ["bc", "made", "25.0", "75.0", "15.0 ± 5.0", "30.0 ± 0.0", "30.0 ± 10.0"]
    assert row[7:] == ["0 1", "20", "3", "1.5", "1:06", "25 %"]


def test_a_seed_that_diverged_is_named_and_not_in_the_mean(tmp_path):
    write_run(tmp_path / "one", [10.0, None, 30.0])
    (row,) = rows(tmp_path)
    assert row[4] == "20.0 ± 10.0" and row[7] == "0 1 2 (diverged, not in the means: 1)"


def test_runs_of_one_algorithm_are_told_apart(tmp_path):
    write_run(tmp_path / "a", [1.0], fraction=1.0, hidden=[8])
    write_run(tmp_path / "b", [2.0], fraction=0.1, hidden=[8])
    write_run(tmp_path / "c", [3.0], "iql", fraction=0.1)
    assert [row[0] for row in rows(tmp_path)] == ["bc fraction=1.0", "bc fraction=0.1", "iql"]


def test_former_names_of_fields_are_the_present_ones(tmp_path):
    """A run with the former name and one with the present name differ in their seeds only."""
    write_run(tmp_path / "old", {0: 1.0}, "cql", gap=0.5)
    write_run(tmp_path / "new", {1: 2.0}, "cql", target_action_gap=0.5)
    write_run(tmp_path / "other", {0: 3.0}, "cql", gap=0.8)
    found, notes = readers.find([tmp_path])
    assert [row.label for row in found] == [
        "cql target_action_gap=0.5",
        "cql target_action_gap=0.8",
    ]
    assert [sorted(row.result["score"]) for row in found] == [["0", "1"], ["0"]]
    assert notes == []


def test_a_budget_is_in_the_name_only_where_it_has_to_be(tmp_path):
    def names(*runs):
        folder = tmp_path / f"{len([*tmp_path.iterdir()])}"
        for i, (dataset, alpha, updates) in enumerate(runs):
            named = {"dataset": f"{dataset}.hdf5", "alpha": alpha, "num_updates": updates}
            write_run(folder / f"{i}", [1.0], updates=updates, **named)
        return sorted(row[0] for row in rows(folder))

    assert names(("a", 1, 20), ("a", 2, 40)) == ["bc alpha=1", "bc alpha=2"]
    assert names(("a", 1, 20), ("a", 1, 40)) == ["bc num_updates=20", "bc num_updates=40"]
    swapped = names(("a", 1, 20), ("a", 2, 40), ("b", 1, 40), ("b", 2, 20))
    assert len({*swapped}) == 4  # one name would hold two budgets


def test_values_tuned_per_data_set_are_one_method(tmp_path):
    write_run(tmp_path / "a", [1.0], dataset="a.hdf5", alpha=1.0)
    write_run(tmp_path / "b", [2.0], dataset="b.hdf5", alpha=2.0)
    assert [row[0] for row in rows(tmp_path)] == ["bc", "bc"]


def test_further_seeds_are_joined(tmp_path):
    write_run(tmp_path / "a", {0: 10.0, 1: 20.0})
    write_run(tmp_path / "b", {2: 60.0})
    (row,) = rows(tmp_path)
    assert row[4] == "30.0 ± 21.6" and row[7] == "0 1 2" and row[11] == "2:13"


def test_a_seed_that_is_there_twice_is_in_no_mean_twice(tmp_path):
    write_run(tmp_path / "a", {0: 10.0, 1: 20.0})
    write_run(tmp_path / "b", {1: 30.0})
    found, notes = readers.find((tmp_path,))
    assert [row.label for row in found] == ["bc run=a", "bc run=b"]
    assert "share a seed" in notes[0] and "not joined" in notes[0]


def test_a_copy_is_left_out(tmp_path):
    write_run(tmp_path / "a", [10.0])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    found, notes = readers.find((tmp_path,))
    assert len(found) == 1 and "/b is a copy of" in notes[0]


def test_two_versions_of_the_code_share_no_mean(tmp_path):
    other = CODE | {"algorithm": "bbb"}
    for name in "xyz":
        write_run(tmp_path / name, [10.0, 20.0], dataset=f"{name}.hdf5", code=CODE)
    write_run(tmp_path / "new", {2: 99.0, 3: 99.0}, dataset="x.hdf5", code=other)
    found, notes = readers.find((tmp_path,))
    assert "bc ran in 2 versions of its code (aaa, bbb)" in notes[0]
    lines = cells(report.matrix(found))
    assert lines == [
        ["bc code=bbb", "99.0 ± 0.0", "", "", "none: 1 of 3 data sets"],
        ["bc code=aaa", *["15.0 ± 5.0"] * 3, "15.0"],
    ]
    assert [*report.summarise(found).scores] == ["bc code=aaa"]


def test_versions_that_differ_between_data_sets_only_share_no_mean_either(tmp_path):
    write_run(tmp_path / "a", [10.0], dataset="x.hdf5")
    write_run(tmp_path / "b", [20.0], dataset="y.hdf5", code=CODE | {"algorithm": "bbb"})
    found, _ = readers.find((tmp_path,))
    assert {row[-1] for row in cells(report.matrix(found))} == {"none: 1 of 2 data sets"}


def test_versions_that_compute_the_same_are_joined_when_asked(tmp_path):
    write_run(tmp_path / "a", {0: 10.0}, dataset="x.hdf5")
    other = {"algorithm": "bbb", "common": "ddd"}
    write_run(tmp_path / "b", {1: 20.0}, dataset="x.hdf5", code=other)
    write_run(tmp_path / "old", {2: 30.0}, dataset="x.hdf5", code=None)
    found, notes = readers.find((tmp_path,), same_code=True)
    scores = {row.code: sorted(row.result["score"].values()) for row in found}
    assert scores == {"aaa, bbb": [10.0, 20.0], "": [30.0]}
    assert notes[0].startswith("seeds from several versions of the code are joined (--same-code)")
    assert ": bc aaa, bbb; common/ " in notes[0]
    assert len(readers.find((tmp_path,))[0]) == 3


def test_versions_that_differ_in_a_seed_are_not_joined(tmp_path):
    write_run(tmp_path / "a", {0: 10.0}, dataset="x.hdf5")
    write_run(tmp_path / "b", {0: 20.0}, dataset="x.hdf5", code=CODE | {"algorithm": "bbb"})
    found, notes = readers.find((tmp_path,), same_code=True)
    assert len(found) == 2
    assert any("do all versions of the code compute the same?" in note for note in notes)


def test_the_command_of_a_page_has_same_code():
    arguments = report.Arguments((Path("runs"),), same_code=True)
    assert report.own_command(arguments) == "python benchmarks/report.py runs --same-code"


def test_code_that_is_not_recorded_is_said_and_never_joined(tmp_path):
    write_run(tmp_path / "runs" / "a", {0: 1.0}, code=None)
    write_run(tmp_path / "runs" / "b", {1: 2.0}, code=None)
    text = page(tmp_path)
    assert "bc run=a" in text and "do not record the version of their code" in text
    assert "2 of 2 rows do not record the version of the code" in text


def test_other_code_in_common_and_resumed_runs_are_said(tmp_path):
    write_run(tmp_path / "runs" / "a", [1.0], dataset="x.hdf5", code=CODE | {"common": "ddd"})
    write_run(tmp_path / "runs" / "b", [1.0], "iql", code=CODE | {"algorithm": "a+b"})
    text = page(tmp_path)
    assert "rows were made with different code in common/: ccc, ddd" in text
    assert "resumed with another version of the code: iql on made" in text


def test_different_data_of_one_name_are_told_apart(tmp_path):
    write_run(tmp_path / "a", [10.0])
    write_run(tmp_path / "b", [20.0], "iql")
    file = tmp_path / "b" / "config.yaml"
    file.write_text(file.read_text().replace("mean: 50.0", "mean: 51.0"))
    found, notes = readers.find((tmp_path,))
    assert "different data are called made" in notes[0]
    assert len({row.dataset for row in found}) == 2


# --- What cannot be read ------------------------------------------------------------------------
def test_an_unfinished_run_is_left_out(tmp_path, capsys):
    write_run(tmp_path / "runs" / "one", [1.0])
    write_run(tmp_path / "runs" / "two", [2.0])
    (tmp_path / "runs" / "two" / "result.json").unlink()
    text = page(tmp_path)
    assert (
        text.count("| bc | made |") == 1 and "two is not finished (it has no result.json)" in text
    )
    assert capsys.readouterr().out.count("two is not finished (it has no result.json)") == 1


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("result.json", r"\Z", "{", "damaged"),
        ("result.json", r"(?s)..\Z", "", "damaged"),
        ("result.json", '"20": 2', '"20": 2', None),
        ("result.json", r'"score": \{"0": 2\.0', '"score": {"0": 3.0', "says 3.0, metrics.csv 2.0"),
        ("result.json", r'"0": 2\.0', '"0": NaN', "score nan"),
        ("result.json", '"num_updates": 20', '"num_updates": 10', "metrics.csv 5.0"),
        ("result.json", '"eval_share"', '"share"', "no 'eval_share'"),
        ("metrics.csv", r"20,0,0\.1,2\.0\n", "", "says 2.0, metrics.csv None"),
        ("metrics.csv", r"2\.0\n\Z", "2", "metrics.csv breaks off"),
        ("metrics.csv", "(?s).+", "", "metrics.csv breaks off"),
        ("config.yaml", r"- 0\n", "- 1\n", "config.yaml has seeds"),
        ("config.yaml", r"(?s)record:.*", "", "no 'record'"),
        ("config.yaml", "(?s).+", "", "damaged"),
        ("config.yaml", "seeds:", "seeds: [", "damaged"),
    ],
)
def test_a_half_written_run_is_left_out(tmp_path, file, old, new, words):
    write_run(tmp_path / "one", [1.0])
    write_run(tmp_path / "two", [2.0], dataset="other.hdf5")
    path = tmp_path / "two" / file
    path.write_text(re.sub(old, new, path.read_text(), count=1))
    found, notes = readers.find((tmp_path,))
    if words is None:
        assert len(found) == 2 and notes == []
    else:
        assert [row.dataset for row in found] == ["made"]
        assert len(notes) == 1 and "two is damaged" in notes[0] and words in notes[0]


def test_a_folder_without_any_run_is_one_line_and_exit_code_2(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(SystemExit) as leave:
            readers.find((folder,))
        assert leave.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert str(folder) in line


def test_wandbs_own_files_are_no_runs(tmp_path):
    write_run(tmp_path / "one", [1.0])
    inner = tmp_path / "one" / "wandb" / "run-x" / "files"
    inner.mkdir(parents=True)
    (inner / "config.yaml").write_text("a: 1\n")
    assert readers.find((tmp_path,))[1] == []


# --- Means over data sets -----------------------------------------------------------------------
def several(tmp_path):
    """Two methods on two data sets, another on one of them, another that lost a seed."""
    for name, add in (("x", 0.0), ("y", 10.0)):
        write_run(tmp_path / f"bc-{name}", [10 + add, 20 + add], dataset=f"{name}.hdf5")
        write_run(tmp_path / f"iql-{name}", [40 + add, 15 + add], "iql", dataset=f"{name}.hdf5")
        lost = [50.0, None if name == "x" else 60.0]
        write_run(tmp_path / f"awr-{name}", lost, "awr", dataset=f"{name}.hdf5")
    write_run(tmp_path / "cql-x", [90.0, 90.0], "cql", dataset="x.hdf5")
    return readers.find((tmp_path,))[0]


def test_means_are_over_all_data_sets_or_missing(tmp_path):
    found = several(tmp_path)
    assert {row[0]: row[-1] for row in cells(report.matrix(found))} == {
        "awr": "none: a seed without a score on x",
        "bc": "20.0",
        "cql": "none: 1 of 2 data sets",
        "iql": "32.5",
    }
    summary = report.summarise(found)
    assert [*summary.scores] == ["bc", "iql"]
    assert summary.iqm["bc"][0] == pytest.approx(20.0)  # of 10 20 20 30 the middle half
    assert summary.improvement["iql", "bc"][0] == pytest.approx(0.75)
    assert summary.improvement["bc", "iql"][0] == pytest.approx(0.25)
    assert summary.words == ["awr (a seed without a score on x)", "cql (1 of 2 data sets)"]


def test_other_numbers_of_seeds_are_not_compared(tmp_path):
    write_run(tmp_path / "a", [10.0, 20.0], dataset="x.hdf5")
    write_run(tmp_path / "b", [20.0], dataset="y.hdf5")
    summary = report.summarise(readers.find((tmp_path,))[0])
    assert summary.scores == {} and summary.words == ["bc (1, 2 seeds)"]


def test_returns_of_two_envs_have_no_mean(tmp_path):
    for name in "xy":
        write_run(tmp_path / name, [10.0], dataset=f"{name}.hdf5", reference=[None, None])
    (line,) = cells(report.matrix(readers.find((tmp_path,))[0]))
    assert line[-1] == "none: returns are on different scales"


def test_one_seed_has_no_interval(tmp_path):
    for name in "xy":
        write_run(tmp_path / "runs" / name, [10.0], dataset=f"{name}.hdf5")
        write_run(tmp_path / "runs" / f"i{name}", [15.0], "iql", dataset=f"{name}.hdf5")
    text = page(tmp_path)
    assert "| bc | 10.0 | 10.0 | 1 | 2 | 20 |" in text and "A single seed has no interval." in text


def test_data_of_other_origin_are_in_other_tables(tmp_path):
    ids = ["hopper-medium-v2", "mujoco/hopper/medium-v0", "hopper-medium-v4.hdf5"]
    ids += ["D4RL/antmaze/umaze-v1", "antmaze-umaze-v2", "antmaze-large-navigate-singletask-v0"]
    ids += [
        "local/pointmaze/umaze-v0",
        "local/ogbench/cube-single-play-v0",
        "x/hopper-medium-v2.h5",
    ]
    for i, name in enumerate(ids):
        write_run(tmp_path / f"{i}", [10.0], dataset=name)
    write_run(tmp_path / "env", [10.0], dataset="hopper-medium-v2", env="Hopper-v5")
    found, _ = readers.find((tmp_path,))
    assert len({row.family for row in found}) == len(ids) + 1
    families = {row.config["dataset"]: row.family for row in found if "env" not in row.config}
    assert families["hopper-medium-v2"] == "D4RL mujoco"
    assert families["mujoco/hopper/medium-v0"] == "Minari mujoco"
    assert families["local/pointmaze/umaze-v0"] == "pointmaze, made locally"


# --- Published scores ---------------------------------------------------------------------------
NOT_D4RL = [
    *("local/pointmaze/umaze-v0", "local/ogbench/cube-single-play-v0", "hopper-medium-v4.hdf5"),
    *("local/ogbench/cube-single-play-singletask-v0", "local/cartpole/mixed-v0"),
    *("mujoco/hopper/medium-v0", "D4RL/antmaze/umaze-v1", "D4RL/pen/human-v2"),
    *("D4RL/kitchen/complete-v2", "D4RL/pointmaze/umaze-v2", "adroit-door-human-replay.hdf5"),
    *("/data/hopper-medium-v2.hdf5", "hopper_medium-v2.hdf5", "hopper-medium-v2.h5"),
]


def every_name(dataset):
    """A reference that knows the data set under any name it might be looked up by."""
    entry = {"algorithm": "bc", "config": "", "mean": "1", "std": "1", "seeds": "4"}
    entry |= {"updates": "20", "selection": "last", "column": "Paper", "source": "s"}
    entry |= {"ddof": "", "note": ""}
    names = [dataset, readers.datasets.slug(dataset), readers.datasets.config_name(dataset)]
    names += [x["dataset"] for x in published.load()]
    return [entry | {"dataset": name} for name in dict.fromkeys(names)]


@pytest.mark.parametrize("dataset", NOT_D4RL)
def test_what_is_not_d4rls_has_no_published_score_beside_it(tmp_path, dataset):
    write_run(tmp_path / "one", [10.0], dataset=dataset)
    (row,) = readers.find((tmp_path,))[0]
    assert published.name_of(row) is None
    assert published.beside(row, every_name(dataset)) == ([], [])
    assert report.beside([row], every_name(dataset)) == []


def d4rl_run(tmp_path, **options):
    options = {"dataset": "hopper-medium-v2", "algorithm": "rebrac", "episodes": 10} | options
    options = {"updates": 1_000_000} | options
    write_run(tmp_path / "one", [101.0, 103.0], **options)
    (row,) = readers.find((tmp_path,))[0]
    return report.beside([row], published.load())


def test_published_scores_stand_beside_ours(tmp_path):
    table, *sources = d4rl_run(tmp_path)
    assert table.head[4:] == ["here", "CORL", "ReBRAC authors"]
    (row,) = cells(table)
    assert row[:4] == ["rebrac", "hopper-medium-v2", "last", "1,000,000"]
    assert row[4:] == ["102.0 ± 1.0 (2)", "102.29 ± 0.17 (4)", "102.01 ± 1.01 (10)"]
    assert "github:corl-team/CORL:README.md; ddof 0" in sources[0].markdown


@pytest.mark.parametrize(
    "options",
    [
        {"updates": 30_000},
        {"episodes": 1},
        {"env": "Hopper-v5"},
        {"algorithm": "awr"},
        {"env_steps": 100},
    ],
)
def test_another_protocol_has_none(tmp_path, options):
    blocks = d4rl_run(tmp_path, **options)
    assert all(isinstance(block, report.Text) for block in blocks)
    if "updates" in options:
        assert "CORL: 1,000,000 updates" in blocks[0].markdown
    elif "episodes" in options:
        assert "CORL: 10 episodes" in blocks[0].markdown
    else:
        assert blocks == []


def test_a_part_of_the_data_is_another_method(tmp_path):
    table, *_ = d4rl_run(tmp_path, algorithm="bc", fraction=0.1)
    assert cells(table)[0][5] == "55.48 ± 7.30 (4)"  # 10%BC in CORL's README


@pytest.mark.parametrize(
    ("every", "episodes", "shown"),
    [(100_000, 50, True), (50_000, 50, False), (100_000, 15, False)],
)
def test_ogbenchs_scores_are_the_mean_of_three_evaluations(tmp_path, every, episodes, shown):
    name = "cube-single-play-singletask-v0"  # task 2
    sizes = {"updates": 1_000_000, "episodes": episodes}
    write_run(tmp_path / "one", [90.0], "rebrac", dataset=name, **sizes)
    updates = [1_000_000 - every * i for i in range(4)][::-1]
    lines = [f"{u},0,0.1,{s}" for u, s in zip(updates, (0, 60, 75, 90), strict=True)]
    text = "\n".join(["update,seed,actor_loss,score", *lines]) + "\n"
    (tmp_path / "one" / "metrics.csv").write_text(text)
    (row,) = readers.find((tmp_path,))[0]
    blocks = report.beside([row], published.load())
    if shown:
        assert cells(blocks[0])[0][4:] == ["75.0 (1)", "92 ± 4 (8)"]
    else:
        assert "so not shown" in blocks[0].markdown


def ogbench_run(folder, algorithm, last_three, updates=1_000_000, **config):
    """A row with these scores of its seed in the last three evaluations of FQL's protocol."""
    sizes = {"updates": updates, "episodes": 50}
    write_run(folder, [last_three[-1]], algorithm, **sizes, **config)
    lines = ["update,seed,actor_loss,score"]
    for i, score in enumerate(last_three):
        lines.append(f"{updates - 100_000 * (2 - i)},0,0.1,{score}")
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    (row,) = readers.find((folder,))[0]
    return row


def test_idql_and_ifql_have_published_scores_of_their_own(tmp_path):
    """One file; Table 3 of FQL's paper has 96 +- 2 and 73 +- 3 on task 2 of cube-single."""

    def shown(name, generator, updates):
        options = {"dataset": "cube-single-play-singletask-v0", "generator": generator}
        row = ogbench_run(tmp_path / name, "idql", (60, 75, 90), updates, **options)
        tables = [x for x in report.beside([row], published.load()) if isinstance(x, report.Table)]
        return [line[-1] for found in tables for line in cells(found)]

    assert shown("ifql", "flow", 1_000_000) == ["73 ± 3 (8)"]
    assert shown("idql", "ddpm", 3_000_000) == ["96 ± 2 (8)"]
    assert shown("long", "flow", 3_000_000) == shown("short", "ddpm", 1_000_000) == []


MADE_HERE = [  # data set, episodes in it, other values, OGBench's name
    ("cube-single-play-v0", 1000, {}, "cube-single-play-singletask-task2-v0"),
    ("cube-single-play-singletask-v0", 1000, {}, "cube-single-play-singletask-task2-v0"),
    ("cube-triple-play-singletask-task3-v0", 3000, {}, "cube-triple-play-singletask-task3-v0"),
    ("cube-triple-play-v0", 1000, {}, None),  # OGBench's has 3000
    ("cube-single-play-v0", 100, {}, None),
    ("cube-single-play-v0", None, {}, None),  # a run from before the number was recorded
    ("cube-single-play-v0", 1000, {"env": "cube-double-singletask-v0"}, None),
    ("cube-single-play-v0", 1000, {"env_steps": 100}, None),
    ("no-such-play-v0", None, {}, None),
]


@pytest.mark.parametrize(("dataset", "episodes", "changed", "theirs"), MADE_HERE)
def test_which_data_made_here_are_ogbenchs(tmp_path, dataset, episodes, changed, theirs):
    record = {} if episodes is None else {"episodes": episodes}
    options = {"dataset": f"local/ogbench/{dataset}", "record": record, **changed}
    row = ogbench_run(tmp_path / "one", "fql", (60, 75, 90), **options)
    assert published.name_of(row) == theirs
    blocks = report.beside([row], published.load())
    if theirs is None:
        assert blocks == []
    elif "cube-single" in dataset:  # FQL's paper has no cube-triple
        assert cells(blocks[0])[0][-2:] == ["75.0 (1)", "97 ± 2 (8)"]
        assert "were made here as OGBench's scripts make theirs" in blocks[1].markdown


def test_a_smaller_set_beside_it_does_not_hide_ogbenchs_size(tmp_path):
    name = "local/ogbench/cube-single-play-v0"
    for episodes, digest in ((1000, "aaa"), (100, "bbb")):
        record = {"episodes": episodes, "digest": digest}
        ogbench_run(tmp_path / digest, "fql", (60, 75, 90), dataset=name, record=record)
    rows = readers.find((tmp_path,))[0]
    assert all(row.copy for row in rows)  # one name, two sets of data
    (table,) = [x for x in report.beside(rows, published.load()) if isinstance(x, report.Table)]
    assert len(table.rows) == 1


# --- The mean of three evaluations --------------------------------------------------------------
def write_curves(folder, *curves, updates=20, **options):
    """A run with these scores of each seed at its last evaluations; None: the seed diverged."""
    last = [None if curve is None else curve[-1] for curve in curves]
    write_run(folder, last, updates=updates, **options)
    lines = ["update,seed,actor_loss,score"]
    for seed, curve in enumerate(curves):
        for i, score in enumerate(curve or ()):
            lines.append(f"{updates - 5 * (len(curve) - 1 - i)},{seed},0.1,{score}")
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")


def test_the_score_can_be_the_mean_of_three_evaluations(tmp_path):
    folder = tmp_path / "runs"
    write_curves(folder / "a", (80, 10, 20, 30), (80, 40, 40, 70), dataset="one.hdf5")
    write_curves(folder / "b", (80, 4, 5, 6), None, (80, 0, 0, 3), dataset="two.hdf5")
    index = tmp_path / "index.md"
    index.write_text("<!-- page -->\n<!-- /page -->\n")
    last = page(tmp_path, index=index)
    assert "| data best | score | best |" in last and "| 50.0 ± 20.0 |" in last
    assert "mean_last_3" not in last + index.read_text()
    text = page(tmp_path, score="mean_last_3", index=index)
    assert "| data best | score (mean_last_3) | best |" in text
    assert "| bc | one | 25.0 | 75.0 | 35.0 ± 15.0 |" in text  # 20 and 50
    assert "| bc | two | 25.0 | 75.0 | 3.0 ± 2.0 |" in text  # 5, diverged and 1
    assert "Score, mean_last_3, by data set (normalised score):" in text
    assert "Score: the mean of a seed's last three evaluations, mean ± std over seeds" in text
    assert "the last policy, mean ± std" in last
    assert "--score mean_last_3 --output" in text  # the command of the page
    assert "| bc | 35.0 ± 15.0 | 3.0 ± 2.0 (1 diverged) |" in index.read_text()
    assert "; the score is the mean of a seed's last three evaluations" in index.read_text()


def test_a_run_of_two_evaluations_has_no_mean_of_three(tmp_path, capsys):
    write_curves(tmp_path / "runs" / "a", (9, 10, 20, 30), dataset="one.hdf5")
    # The third evaluation from the end is that of the untrained policy.
    write_curves(tmp_path / "runs" / "b", (0, 10, 20), dataset="two.hdf5", updates=10)
    text = page(tmp_path, score="mean_last_3")
    assert "| bc | one |" in text and "| bc | two |" not in text
    assert "runs/b has fewer than three evaluations after update 0" in text
    capsys.readouterr()
    with pytest.raises(SystemExit) as leave:
        page(tmp_path, tmp_path / "runs" / "b", score="mean_last_3")
    assert leave.value.code == 2 and "use --score last" in capsys.readouterr().err


def test_published_scores_stand_beside_the_score_of_their_own_protocol(tmp_path):
    write_run(
        tmp_path / "one",
        [101.0, 103.0],
        "rebrac",
        dataset="hopper-medium-v2",
        updates=1_000_000,
        episodes=10,
    )
    (row,) = readers.find((tmp_path,))[0]
    row.selection = "mean_last_3"
    assert cells(report.beside([row], published.load())[0])[0][4] == "102.0 ± 1.0 (2)"


# --- Sizes and names ----------------------------------------------------------------------------
def test_cells_of_other_sizes_say_so(tmp_path):
    write_run(tmp_path / "a", [10.0, 20.0], dataset="one.hdf5")
    write_run(tmp_path / "b", [10.0, 20.0], dataset="two.hdf5")
    write_run(tmp_path / "c", [30.0], "cql", dataset="one.hdf5", updates=10)
    table = report.matrix(readers.find((tmp_path,))[0])
    assert [line[1] for line in cells(table)] == ["15.0 ± 5.0", "30.0 (10 updates, 1 seed)"]


def test_choices_other_than_the_default_are_in_the_name(tmp_path):
    write_run(tmp_path / "a", [10.0], "awr", optimiser="adam")
    write_run(tmp_path / "b", [10.0], "iql", extraction="awr")
    rows, _ = readers.find((tmp_path,))
    report.name_choices(rows)
    assert [row.label for row in rows] == ["awr optimiser=adam", "iql"]


def test_the_reference_file():
    table = published.load()
    assert len({(x["method"], x["dataset"], x["column"]) for x in table}) == len(table) > 600
    for entry in table:
        assert entry["source"] and entry["ddof"] in ("", "0", "1")
        assert float(entry["std"]) >= 0 and int(entry["seeds"]) > 1 and int(entry["updates"]) > 0
        assert entry["selection"] == "last" or entry["selection"].startswith("mean of the last 3")
        origin = SimpleNamespace(config={"dataset": entry["dataset"]}, copy="")
        assert published.name_of(origin) == entry["dataset"]  # D4RL's or OGBench's own


# --- An online phase ----------------------------------------------------------------------------
def write_online(folder, scores, before, regret, offline=12, online=8, **more):
    """A run whose last updates were made beside an env."""
    write_run(folder, scores, updates=offline + online, num_updates=offline, **more)
    file = folder / "result.json"
    result = json.loads(file.read_text()) | {"num_updates": offline, "online_updates": online}
    result |= {"env_steps": online // 2}
    for name, each in (("offline_score", before), ("regret", regret)):
        result[name] = {str(seed): x for seed, x in enumerate(each)}
    file.write_text(json.dumps(result))


def test_an_online_phase_by_hand(tmp_path):
    write_online(tmp_path / "runs" / "a", [60.0, 80.0], [10.0, 20.0], [0.5, 0.7], fraction=1.0)
    write_online(tmp_path / "runs" / "b", [9.0], [4.0], [0.9], algorithm="iql")
    write_run(tmp_path / "runs" / "c", [1.0], "cql")
    found, notes = readers.find((tmp_path / "runs",))
    assert notes == [] and [row.updates for row in found] == [20, 20, 20]
    head, *lines = [report.online(found).head, *cells(report.online(found))]
    first = ["bc", "made", "12", "8", "4", "15.0 ± 5.0", "70.0 ± 10.0", "70.0 ± 10.0"]
    assert lines[0] == [*first, "0.60 ± 0.10"] and head[-2:] == ["best", "regret"]
    assert lines[1] == ["iql", "made", "12", "8", "4", "4.0", "9.0", "9.0", "0.90"]
    assert len(lines) == 2  # cql has no such phase
    text = page(tmp_path)
    assert "| iql | made | 12 | 8 | 4 | 4.0 | 9.0 | 9.0 | 0.90 |" in text
    assert "iql on made, score after updates (beside an env from 12 on)" in text
    assert "cql on made, score after updates<" in text


def test_without_an_online_phase_the_page_says_nothing_of_one(tmp_path):
    write_run(tmp_path / "runs" / "a", [1.0])
    text = page(tmp_path)
    assert "regret" not in text and "env from" not in text and "switch" not in text


def test_an_online_run_that_breaks_off_is_left_out(tmp_path):
    write_online(tmp_path / "one", [9.0], [4.0], [0.9])
    metrics = tmp_path / "one" / "metrics.csv"
    metrics.write_text(metrics.read_text().replace("20,0,0.1,9.0\n", ""))
    write_online(tmp_path / "two", [9.0], [4.0], [0.9], online_updates=16)
    write_run(tmp_path / "three", [1.0], "cql")
    found, notes = readers.find((tmp_path,))
    assert [row.algorithm for row in found] == ["cql"]
    assert "metrics.csv None" in notes[0] and "ended after 8 online_updates, not 16" in notes[1]


@pytest.mark.parametrize("offline", [False, True])
def test_curves_show_the_switch(tmp_path, offline):
    """Updates are counted from it on, unless a row of the panel has none."""
    write_online(tmp_path / "a", [60.0], [10.0], [0.5])
    write_online(tmp_path / "b", [60.0, 3.0], [10.0, 3.0], [0.5, 0.9], 4, 16, algorithm="iql")
    if offline:
        write_run(tmp_path / "c", [1.0], "cql")
    found, _ = readers.find((tmp_path,))
    with figures.curves(found, [row.label for row in found]) as figure:
        axis, lines = figure.axes[0], figure.axes[0].lines
        drawn = {line.get_label(): line.get_xdata() for line in lines}
        upright = {line.get_xdata()[0] for line in lines if [*line.get_ydata()] == [0, 1]}
        assert axis.get_xlabel() == "updates" + " since the switch to the env" * (not offline)
    assert [*drawn["bc"]] == ([10, 20] if offline else [-2, 8])
    assert [*drawn["iql"]] == ([10, 20] if offline else [6, 16])
    assert upright == ({12, 4} if offline else {0})
    thin = [[*line.get_xdata()] for line in lines if line.get_linewidth() == 0.8]
    assert thin == [[*drawn["iql"]]] * 2


def test_an_online_score_has_no_published_one_beside_it(tmp_path):
    table = published.load(published.FILE)
    entry = next(x for x in table if x["selection"] == "last" and not x["config"])
    run = {"dataset": entry["dataset"], "code": CODE}
    run |= {"algorithm": entry["algorithm"], "episodes": int(entry["episodes"] or 3)}
    half = int(entry["updates"]) // 2
    write_run(tmp_path / "a", [1.0], updates=2 * half, **run)
    write_online(tmp_path / "b", [1.0], [1.0], [0.5], half, half, **run)
    before, after = (readers.find((tmp_path / x,))[0][0] for x in "ab")
    assert published.beside(before, table)[0] and published.beside(after, table) == ([], [])


# --- Page ---------------------------------------------------------------------------------------
def test_the_page(tmp_path, monkeypatch):
    write_run(tmp_path / "runs" / "one", [10.0, 20.0])
    monkeypatch.chdir(tmp_path)
    Path("note.md").write_text("Where it comes from.\n")
    arguments = report.Arguments(
        (Path("runs"),), output=Path("out/page"), title="Made", note=Path("note.md")
    )
    report.main(arguments)
    text = Path("out/page.md").read_text()
    assert text.startswith("# Made\n\nWhere it comes from.\n")
    assert "| 0 | 5.0 | 10.0 |" in text and "| 1 | 5.0 | 20.0 |" in text
    again = "python benchmarks/report.py runs --output out/page --title Made --note note.md"
    assert again in text
    assert Path("out/page.png").stat().st_size > 1000
    report.main(arguments)
    assert Path("out/page.md").read_text() == text


def test_the_command_of_a_row_is_its_config(tmp_path):
    """Read back it gives the config; where it does not, the words say so."""
    from algorithms import bc
    from common.experiment import config

    argv = ["--dataset", "hopper-medium-v2", "--seeds", "3", "4", "--hidden", "8", "8"]
    wanted = config.resolved(*config.parse(bc.Config, [*argv, "--fraction", "0.1"]))
    row = SimpleNamespace(algorithm="bc", config=wanted | {"record": {}}, folder=tmp_path)
    words = report.command(row).split()
    assert words[:2] == ["python", "algorithms/bc.py"] and "--eval-every" not in words
    assert config.resolved(*config.parse(bc.Config, words[2:])) == wanted
    whole = report.command(row)
    del row.config["fraction_of"]  # as if the field had been added after the run
    assert report.command(row) == whole
    row.config["gone"] = 1
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(row.config))
    assert report.command(row).startswith("# ")


def test_settings_other_than_the_defaults(tmp_path):
    from algorithms import bc, sac

    rows = [
        SimpleNamespace(algorithm="bc", label="bc", dataset=name, config={"hidden": hidden})
        for name, hidden in (("a", [8, 8]), ("b", list(bc.Config.hidden)))
    ]
    rows.append(SimpleNamespace(algorithm="gone", label="gone", dataset="a", config={}))
    rows.append(SimpleNamespace(algorithm="awr", label="awr", dataset="a", config={}))
    # A field may have become a float since the run.
    whole = {"updates_per_step": int(sac.Config.updates_per_step)}
    rows.append(SimpleNamespace(algorithm="sac", label="sac", dataset="a", config=whole))
    widths = " ".join(map(str, bc.Config.hidden))
    assert cells(report.settings(rows)) == [["bc", "hidden", widths, "8 8", widths]]


def test_the_part_of_an_index(tmp_path, capsys):
    file = tmp_path / "index.md"
    file.write_text("before\n<!-- page -->\nold\n<!-- /page -->\nafter\n")
    several(tmp_path / "runs")
    page(tmp_path, index=file)
    text = file.read_text()
    assert text.startswith("before\n<!-- page -->\n") and text.endswith("<!-- /page -->\nafter\n")
    assert "| bc | 15.0 ± 5.0 | 25.0 ± 5.0 | 20.0 |" in text and "old" not in text
    (link,) = re.findall(r"\[page\.md\]\((.*)\)", text)
    assert (tmp_path / link).is_file()
    page(tmp_path, index=file)
    assert file.read_text() == text
    for spoilt in ("", "<!-- page -->", "<!-- /page -->\n<!-- page -->", text + text):
        file.write_text(spoilt)
        with pytest.raises(SystemExit):
            page(tmp_path, index=file)
        assert file.read_text() == spoilt
        assert "must contain <!-- page -->" in capsys.readouterr().err.splitlines()[-1]


def test_the_html_page_needs_no_other_file(tmp_path):
    several(tmp_path / "runs")
    note = tmp_path / "note.md"
    note.write_text(
        "See `a<b` and [c](d.md).\n\n```\nx < y\n```\n\n| h | i |\n| --- | --- |\n| 1 | 2 |\n"
    )
    page(tmp_path, html=True, note=note, title="A & B")
    text = (tmp_path / "out" / "page.html").read_text()
    assert "<title>A &amp; B</title>" in text and text.count("<svg") == 2
    assert "<code>a&lt;b</code>" in text and '<a href="d.md">c</a>' in text and "x &lt; y" in text
    assert not re.search(r'(src|href)="(?!d\.md|#|data:)', text) and "url(http" not in text
    ids = re.findall(r"<table", text)
    assert len(ids) > 8 and "currentColor" in text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
def test_columns_sort_in_a_browser(tmp_path):
    several(tmp_path / "runs")
    page(tmp_path, html=True)
    file = tmp_path / "out" / "page.html"
    click = """<script>
      const table = document.querySelector("table"), heads = table.tHead.rows[0].cells, out = [];
      for (const i of [4, 4, 1]) { heads[i].querySelector("button").click();
        out.push([...table.tBodies[0].rows].map(r => r.cells[i].textContent).join(";")); }
      document.title = out.join("|"); </script>"""
    file.write_text(file.read_text().replace("</body>", click + "</body>"))
    with tempfile.TemporaryDirectory() as folder:
        words = "chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
        words += " --disable-background-networking --disable-component-update --disable-sync"
        words = [*words.split(), f"--user-data-dir={folder}", "--dump-dom", f"file://{file}"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    title = re.search("<title>(.*)</title>", done.stdout)[1]
    up, down, names = [part.split(";") for part in title.split("|")]
    scores = [float(x.split()[0]) for x in up]
    assert scores == sorted(scores) and len(scores) == 7
    assert sorted(down) == sorted(up)
    assert float(down[0].split()[0]) == max(scores) and names == sorted(names)


# --- Rows of one name ---------------------------------------------------------------------------
def test_rows_that_differ_in_common_only_are_told_apart(tmp_path):
    other = CODE | {"common": "ddd"}
    write_run(tmp_path / "a", [10.0, 20.0], dataset="x.hdf5")
    write_run(tmp_path / "b", {2: 90.0, 3: 90.0}, dataset="x.hdf5", code=other)
    write_run(tmp_path / "c", [10.0, 20.0], dataset="y.hdf5")
    found, _ = readers.find((tmp_path,))
    assert {row.label for row in found} == {"bc common=ccc", "bc common=ddd"}
    table = {line[0]: line[1:] for line in cells(report.matrix(found))}
    assert table["bc common=ccc"] == ["15.0 ± 5.0", "15.0 ± 5.0", "15.0"]
    assert table["bc common=ddd"][:2] == ["90.0 ± 0.0", ""]
    for row in found:
        row.variant = ""
    with pytest.raises(ValueError, match="two rows are called bc on x"):
        report.matrix(found)


def test_a_row_of_several_runs_says_where_all_were_made(tmp_path):
    write_run(tmp_path / "a", [10.0])
    write_run(tmp_path / "b", {1: 20.0})
    file = tmp_path / "b" / "result.json"
    made = {"hardware": "another", "versions": {"python": "4"}}
    file.write_text(json.dumps(json.loads(file.read_text()) | made))
    found, _ = readers.find((tmp_path,))
    assert len(found) == 1
    text = " ".join(block.markdown for block in report.environment(found)[1:])
    assert "Hardware: none, another." in text and "python 3" in text and "python 4" in text
    assert "--seeds 0 1" in report.command(found[0]) or report.command(found[0]).startswith("# ")


def test_two_scales_or_two_digests_under_one_name_are_no_row(tmp_path):
    for seed, top in enumerate((200.0, 400.0)):
        write_run(tmp_path / "scales" / str(seed), {seed: 20.0}, reference=[0.0, top])
    found, notes = readers.find((tmp_path / "scales",))
    assert len(found) == 2 and "different data are called made" in notes[0]
    assert {row.dataset.split("are ")[1] for row in found} == {"0 and 200)", "0 and 400)"}
    for seed, digest in enumerate(("digest 1", "digest 2", None)):
        write_run(tmp_path / "digests" / str(seed), {seed: 20.0})
        file = tmp_path / "digests" / str(seed) / "config.yaml"
        config = yaml.safe_load(file.read_text())
        config["record"]["digest"] = digest
        file.write_text(yaml.safe_dump(config))
    found, notes = readers.find((tmp_path / "digests",))
    assert len(found) == 3 and "different data are called made" in notes[0]
    shutil.rmtree(tmp_path / "digests" / "1")  # an older run is told from none by what it lacks
    found, notes = readers.find((tmp_path / "digests",))
    assert len(found) == 1 and not notes


def test_methods_of_another_budget_are_named_where_they_are_compared(tmp_path):
    for dataset in "xy":
        for name, updates, episodes in (("bc", 20, 1), ("iql", 1000, 3), ("cql", 1000, 3)):
            folder = tmp_path / name / dataset
            data = f"{dataset}.hdf5"
            write_run(folder, [1.0], name, updates=updates, episodes=episodes, dataset=data)
    found, _ = readers.find((tmp_path,))
    *_, words = report.statistics(found, report.summarise(found))
    assert (
        "Compared although their updates, seeds or episodes differ from most: bc." in words.markdown
    )
    lines = {line[0]: line[1:] for line in cells(report.matrix(found))}
    assert lines["bc"][0] == "1.0 (20 updates, 1 episodes)" and lines["iql"][0] == "1.0"
    shutil.rmtree(tmp_path / "cql")  # a tie: the larger is the usual one
    found, _ = readers.find((tmp_path,))
    lines = {line[0]: line[1:] for line in cells(report.matrix(found))}
    assert lines["bc"][0] == "1.0 (20 updates, 1 episodes)" and lines["iql"][0] == "1.0"


def test_rows_of_older_code_are_said_on_the_terminal_their_digests_on_the_page(tmp_path):
    today = provenance.code([ROOT / "algorithms" / "bc.py"])
    write_run(tmp_path / "a", [10.0], dataset="a.hdf5", code={"algorithm": today})
    write_run(tmp_path / "b", [20.0], dataset="b.hdf5", code={"algorithm": "0123456789ab"})
    found, _ = readers.find((tmp_path,))
    assert report.outdated(found) == ["1 row made by another version of bc.py"]
    text = " ".join(block.markdown for block in report.environment(found)[1:])
    assert f"bc {today}" in text and "bc 0123456789ab" in text


def test_the_best_of_a_seed_that_diverged_does_not_count(tmp_path):
    write_run(tmp_path / "a", [10.0, None, 30.0])
    file = tmp_path / "a" / "result.json"
    best = {"best_score": {"0": 10.0, "1": 400.0, "2": 30.0}}
    file.write_text(json.dumps(json.loads(file.read_text()) | best))
    (row,) = rows(tmp_path)
    assert row[4:6] == ["20.0 ± 10.0", "20.0 ± 10.0"]


def test_a_run_may_be_called_wandb(tmp_path):
    write_run(tmp_path / "wandb", [10.0])
    write_run(tmp_path / "wandb" / "wandb" / "offline-run" / "files", [10.0])
    assert len(readers.find((tmp_path,))[0]) == 1


# --- wandb --------------------------------------------------------------------------------------
def entry(seed, scores, state="finished", **config):
    """A run as wandb.Api returns it."""
    record = {"reference": [0.0, 200.0], "data_return": {"mean": 50.0, "max": 150.0}}
    config = {"dataset": "made.hdf5", "num_updates": 20, "eval_episodes": 3} | config
    config |= {"algorithm": "bc", "seed": seed, "record": record, "code": CODE, "_wandb": {}}
    history = [
        {"_step": step, "actor_loss": 0.1} | ({} if score is None else {"score": score})
        for step, score in scores
    ]
    path = ["me", "atoll", f"id{seed}"]
    return SimpleNamespace(
        config=config,
        state=state,
        name=f"bc/made/x/{seed}",
        path=path,
        scan_history=lambda: history,
    )


def test_a_wandb_project_is_read_like_folders(tmp_path):
    entries = [entry(0, [(10, 5.0), (20, 10.0)]), entry(1, [(10, 30.0), (20, 20.0)])]
    entries += [entry(2, [(10, 5.0)], "running"), entry(3, [(10, 5.0), (20, 1.0)], "crashed")]
    entries.append(SimpleNamespace(config={}, name="other", state="finished"))
    rows, notes = readers.from_wandb("me/atoll", SimpleNamespace(runs=lambda project: entries))
    (row,) = cells(report.table(rows))
    assert row[:6] == ["bc", "made", "25.0", "75.0", "15.0 ± 5.0", "20.0 ± 10.0"]
    assert row[7:11] == ["0 1", "20", "3", ""]
    assert len(notes) == 3 and "running at update 10 of 20" in notes[0] and "other" in notes[2]


@pytest.mark.parametrize("gone", [None, math.nan, "NaN"])
def test_a_diverged_run_of_wandb(gone):
    entries = [entry(0, [(10, 5.0), (20, gone)]), entry(1, [(10, 30.0), (20, 20.0)])]
    rows, _ = readers.from_wandb("me/atoll", SimpleNamespace(runs=lambda project: entries))
    (row,) = cells(report.table(rows))
    assert row[4] == "20.0" and row[7] == "0 1 (diverged, not in the means: 0)"
    assert np.isnan(rows[0].scores[0])


def test_a_score_of_zero_of_wandb_is_a_score():
    entries = [entry(0, [(10, 5.0), (20, 0.0)])]
    (row,) = readers.from_wandb("me/atoll", SimpleNamespace(runs=lambda project: entries))[0]
    assert row.scores.tolist() == [0.0] and not row.result["diverged"]


def test_an_empty_run_of_wandb_is_left_out():
    entries = [entry(0, []), entry(1, [(10, 30.0), (20, 20.0)])]
    rows, notes = readers.from_wandb("me/atoll", SimpleNamespace(runs=lambda project: entries))
    assert len(rows) == 1 and "finished at update None of 20" in notes[0]


def test_wandb_without_an_answer_is_one_line(tmp_path, capsys):
    def runs(project):
        raise ConnectionError("no route\nto host")

    for api in (SimpleNamespace(runs=runs), SimpleNamespace(runs=lambda project: [])):
        with pytest.raises(SystemExit) as leave:
            readers.from_wandb("me/atoll", api)
        assert leave.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: wandb project me/atoll: ")


def test_folders_or_wandb(capsys):
    for arguments in (report.Arguments(), report.Arguments((Path("runs"),), wandb="a/b")):
        with pytest.raises(SystemExit):
            report.main(arguments)
        assert "give either run folders or --wandb" in capsys.readouterr().err


def test_a_run_without_a_data_set_has_no_level_of_the_data(tmp_path):
    """`sac.py --env Hopper-v4 --online-updates N`: nothing was recorded before it."""
    write_run(tmp_path / "scratch", [10.0, 20.0], "sac", dataset="env/Hopper-v4")
    file = tmp_path / "scratch" / "config.yaml"
    config = yaml.safe_load(file.read_text())
    config["record"]["data_return"] = {}
    file.write_text(yaml.safe_dump(config))
    (row,) = rows(tmp_path)
    assert row[:5] == ["sac", "env/Hopper-v4", "", "", "15.0 ± 5.0"]
    file.write_text(yaml.safe_dump(config | {"dataset": "made.hdf5"}))
    with pytest.raises(SystemExit):  # a run on data must have them
        readers.find((tmp_path,))


def test_the_committed_runs_can_be_read():
    folders = {*(ROOT / "benchmarks" / "runs").iterdir()}
    for folder in sorted(folders - {ROOT / "benchmarks" / "runs" / "speed"}):  # records of speed.py
        joined = folder.name in ("constraints", "variants")  # see notes/constraints.md
        found, notes = readers.find((folder,), same_code=joined)
        if joined:
            assert notes.pop(0).startswith("seeds from several versions of the code are joined")
        assert found and notes == []


# --- A choice of runs -----------------------------------------------------------------------------
@pytest.fixture
def trials(tmp_path):
    """Four runs of one method that differ in four fields, and one of another method."""
    for number, (alpha, discount) in enumerate([(1.0, 0.9), (1.0, 0.99), (2.0, 0.9), (2.0, 0.99)]):
        fields = {"alpha": alpha, "discount": discount, "hidden": [8] * (number + 1)}
        fields |= {"num_updates": 20, "batch_size": 2 ** (number + 1)}
        folder = tmp_path / "runs" / "td3_bc" / "made" / f"trial{number}"
        write_run(folder, [1.0 + number], algorithm="td3_bc", **fields)
    write_run(tmp_path / "runs" / "bc" / "made" / "main", [9.0], num_updates=20)
    return tmp_path / "runs"


def labels(folder, **choice):
    return sorted(row.label for row in readers.find((folder,), **choice)[0])


@pytest.mark.parametrize(
    ("where", "count"),
    [
        ([], 5),
        (["alpha=1.0"], 2),
        (["alpha=1.0", "discount=0.9"], 1),
        (["algorithm=td3_bc"], 4),
        (["name=trial*"], 4),
        (["name=trial[13]"], 2),
        (["hidden=8 8"], 1),
        (["num_updates=20"], 5),
        (["seeds=0"], 5),
        (["dataset=made.*"], 5),
    ],
)
def test_where_takes_some_of_the_runs(trials, where, count):
    assert len(labels(trials, where=where)) == count


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("alpah=1", "did you mean alpha?"),
        ("alpha", "must be KEY=VALUE"),
        ("nothing=1", "known are"),
        ("alpha=3", "alpha is 1.0, 2.0"),
        ("record=1", "known are"),
    ],
)
def test_a_choice_that_finds_nothing_says_what_there_is(trials, capsys, where, says):
    with pytest.raises(SystemExit) as leave:
        readers.find((trials,), where=[where])
    (line,) = capsys.readouterr().err.splitlines()
    assert leave.value.code == 2 and says in line and f"--where {where}" in line


def test_rows_are_named_by_the_fields_that_are_asked_for(trials):
    four = ["algorithm=td3_bc"]
    assert all(label.count("=") == 4 for label in labels(trials, where=four))
    assert labels(trials, where=four, named_by=["name"]) == [f"td3_bc trial{i}" for i in range(4)]
    named = labels(trials, where=four, named_by=["alpha", "discount"])
    assert named[0] == "td3_bc alpha=1.0 discount=0.9" and len({*named}) == 4
    two = [*four, "discount=0.9"]
    assert labels(trials, where=two, named_by=["alpha"]) == ["td3_bc alpha=1.0", "td3_bc alpha=2.0"]


def test_two_rows_of_one_name_are_refused(trials, capsys):
    with pytest.raises(SystemExit) as leave:
        readers.find((trials,), named_by=["alpha"])
    (line,) = capsys.readouterr().err.splitlines()
    assert leave.value.code == 2 and "would both be 'td3_bc alpha=1.0'" in line
    assert "trial0" in line and "trial1" in line


def test_a_page_of_a_choice_says_the_command_that_makes_it_again(trials, tmp_path):
    text = page(tmp_path, trials, where=("name=trial*",), named_by=("alpha", "discount"))
    assert "--where 'name=trial*' --named-by alpha discount" in text
    assert "td3_bc alpha=1.0 discount=0.9" in text and "main" not in text


# --- Its command line ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["runs", "--outptu", "x"], "there is no flag --outptu; did you mean --output?"),
        (["runs", "--score", "best"], "--score best: must be one of last, mean_last_3"),
        (["runs", "--html", "yes"], "--html: takes no value"),
        (["runs", "--output"], "--output: has no value behind it"),
    ],
)
def test_wrong_words_are_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as leave:
        wrong_words.parse(report.Arguments, words, "report.py")
    (line,) = capsys.readouterr().err.splitlines()
    assert leave.value.code == 2 and line.startswith(f"error: report.py: {said}"), line


def test_without_output_nothing_is_written_among_the_committed_pages():
    given = wrong_words.parse(report.Arguments, ["runs"], "report.py")
    assert given.output.parent == Path("runs")  # which git ignores


def test_sizes_of_the_columns_in_words():
    words = report.sizes_in_words
    assert words([(20_000, 3), (20_000, 3)]) == "20,000 updates, 3 seeds"
    assert words([(20_000, 1), (30_000, 1)]) == "20,000, 30,000 updates by column, 1 seed"
    by_column = "20,000 updates of 1 seed, 30,000 updates of 3 seeds, by column"
    assert words([(20_000, 1), (30_000, 3)]) == by_column

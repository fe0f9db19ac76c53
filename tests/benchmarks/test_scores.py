# SPDX-License-Identifier: Apache-2.0
"""benchmarks/scores.py: the page and README's picture are of the records."""

import json
import shutil
import struct
from pathlib import Path

import pytest
from test_report import write_run

import scores
from benchmarks import report

ROOT = Path(__file__).resolve().parents[2]
PAGE = (scores.RESULTS / "scores.md").read_text()
AGAIN = "run python benchmarks/scores.py"


@pytest.fixture(scope="module")
def rows():
    return scores.read()[0]


def description(path):
    """The text that figures.png wrote into a PNG file."""
    data, start = path.read_bytes(), 8
    while start < len(data):
        size, kind = struct.unpack(">I4s", data[start : start + 8])
        name, _, text = data[start + 8 : start + 8 + size].partition(b"\0")
        if kind == b"tEXt" and name == b"Description":
            return text.decode("latin-1")
        start += size + 12
    return None


def made(folder, monkeypatch):
    """The page of the runs in a folder."""
    monkeypatch.setattr(scores, "RUNS", folder)
    return scores.page(scores.read(folder)[0])


# --- Records ------------------------------------------------------------------------------------
def test_the_page_is_what_the_records_give(rows):
    assert scores.page(rows) == PAGE, AGAIN


def test_the_picture_in_the_readme_is_of_these_scores(rows):
    assert "](benchmarks/results/scores.png)" in (ROOT / "README.md").read_text()
    shown = json.loads(description(scores.RESULTS / "scores.png"))
    assert shown == scores.means(rows), AGAIN
    for suite, methods in shown.items():
        assert [*methods.values()] == sorted(methods.values(), reverse=True)
        (part,) = (x for x in PAGE.split("\n## ") if x.startswith(f"{suite}\n"))
        for method, (mean, *_) in methods.items():
            line = next(x for x in part.splitlines() if x.startswith(f"| {method} |"))
            assert line.endswith(f" {mean} |")


def test_seeds_are_joined_where_the_page_of_the_record_joins_them(rows):
    assert "constraints" in scores.joins_versions()
    (edac,) = (row for row in rows if row.algorithm == "edac" and "umaze" in row.dataset)
    cell = f"{edac.last.mean():.1f} ± {edac.last.std():.1f}"
    page = (scores.RESULTS / "constraints.md").read_text()
    assert len(edac.last) == 3 and cell in PAGE
    assert f"| edac | local/pointmaze/umaze-v0 | -6.1 | 40.8 | {cell} |" in page


# --- Made-up runs -------------------------------------------------------------------------------
def test_a_new_record_is_on_the_page(tmp_path, monkeypatch):
    shutil.copytree(scores.RUNS / "core" / "iql", tmp_path / "core")
    before = made(tmp_path, monkeypatch)
    write_run(tmp_path / "new", [12.3, 12.3], "edac", dataset="hopper-expert-v4.hdf5")
    after = made(tmp_path, monkeypatch)
    line = "| edac | hopper-expert-v4 | 12.3 ± 0.0 |  | 2 | 20 | 3 | [new](../runs/new) |"
    assert line not in before and line in after
    missing = [
        text.split("\n## v4 files\n")[1].split("No record here: ")[1] for text in (before, after)
    ]
    assert ["edac," in words.split("\n")[0] for words in missing] == [True, False]


def test_experiments_other_files_and_online_runs_are_left_out(tmp_path, monkeypatch):
    write_run(tmp_path / "plain", [1.0])
    for folder, algorithm, more in (
        (scores.LEFT_OUT[0], "bc", {}),
        ("other", "no_file_of_ours", {}),
        ("online", "iql", {"online_updates": 5}),
    ):
        write_run(tmp_path / folder / "a", [7.7], algorithm, **more)
    text = made(tmp_path, monkeypatch)
    assert "7.7" not in text and "| bc | 1.0 |" in text


def test_more_seeds_then_more_updates_and_never_the_score_choose_the_record(tmp_path):
    def shown():
        (row,) = scores.read(tmp_path)[0]
        return row.folder.name

    write_run(tmp_path / "b", [9.0], updates=40, code={"algorithm": "b"})
    write_run(tmp_path / "c", [99.0], updates=20, code={"algorithm": "c"})
    assert shown() == "b"
    write_run(tmp_path / "a", [1.0, 1.0], updates=20, code={"algorithm": "a"})
    assert shown() == "a"


def test_there_is_no_mean_over_two_copies_of_one_set_of_data(tmp_path):
    write_run(tmp_path / "a", [1.0], "iql", dataset="one.hdf5")
    write_run(tmp_path / "b", [3.0], "iql", dataset="two.hdf5")
    table = scores.scores(scores.read(tmp_path)[0])
    assert table.rows[-1] == ["iql", "1.0", "3.0", "2.0"]
    write_run(tmp_path / "c", [5.0], "bc", dataset="two.hdf5", reference=[0.0, 300.0])
    assert "mean" not in scores.scores(scores.read(tmp_path)[0]).head


def test_a_published_score_stands_beside_the_same_data_and_protocol(tmp_path, monkeypatch):
    """CORL's README has 42.40 +- 0.19 for BC on halfcheetah-medium-v2: 1M updates, 10 episodes."""
    options = {"dataset": "halfcheetah-medium-v2", "fraction": 1.0, "reference": [-280.2, 12135.0]}
    write_run(tmp_path / "a", [42.0], updates=1_000_000, episodes=10, **options)
    text = made(tmp_path, monkeypatch)
    assert "42.40 ± 0.19 (4)" in text and scores.NONE not in text
    shutil.rmtree(tmp_path / "a")
    write_run(tmp_path / "a", [42.0], updates=500_000, episodes=10, **options)
    text = made(tmp_path, monkeypatch)
    assert "42.40" not in text


def test_the_picture_has_no_method_of_one_seed(tmp_path):
    for method in ("bc", "iql", "td3_bc", "rebrac"):
        seeds = [1.0] if method == "bc" else [1.0, 3.0]
        for name in ("one", "two"):
            write_run(tmp_path / f"{method}_{name}", seeds, method, dataset=f"local/mujoco/{name}")
    ((_, methods),) = scores.means(scores.read(tmp_path)[0]).items()
    assert {*methods} == {"iql", "td3_bc", "rebrac"}


def test_the_mean_of_a_suite_and_its_interval():
    mean, low, high, each = scores.mean_of([report.np.array([1.0, 3.0]), report.np.array([4.0])])
    assert (mean, low, high, each) == (3.0, None, None, [2.0, 4.0])
    mean, low, high, _ = scores.mean_of(2 * [report.np.array([0.0, 10.0, 20.0])])
    assert mean == 10 and 0 <= low < 10 < high <= 20

# SPDX-License-Identifier: Apache-2.0
"""benchmarks/report.py: what the table says of made-up run folders."""

import json
from pathlib import Path

import pytest
import yaml

from benchmarks import report


def write_run(folder, scores, algorithm="bc", best=None, **config):
    """A finished run with these final scores by seed, all of them 5 after 10 updates."""
    folder.mkdir(parents=True)
    record = {"reference": [0.0, 200.0], "data_return": {"mean": 50.0, "max": 150.0}}
    config = {"dataset": "made.hdf5", "seeds": [*range(len(scores))]} | config
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"record": record}))
    by_seed = {str(seed): score for seed, score in enumerate(scores)}
    result = {
        "algorithm": algorithm,
        "num_updates": 20,
        "eval_episodes": 3,
        "score": by_seed,
        "best_score": by_seed if best is None else dict.fromkeys(by_seed, best),
        "return": {seed: None if x is None else 2 * x for seed, x in by_seed.items()},
        "diverged": {seed: 10 for seed, x in by_seed.items() if x is None},
        "updates_per_second": 1.5,
        "eval_share": 0.25,
        "hardware": "none",
        "versions": {"python": "3"},
    }
    (folder / "result.json").write_text(json.dumps(result))
    rows = ["update,seed,actor_loss,score"]
    for update in (10, 20):
        for seed, score in enumerate(scores):
            rows.append(
                f"{update},{seed},0.1,{'' if score is None else 5 if update < 20 else score}"
            )
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")


def rows(tmp_path):
    runs = report.find((tmp_path,))
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in report.table(runs).splitlines()[2:]
    ]


def test_a_row_by_hand(tmp_path):
    write_run(tmp_path / "one", [10.0, 20.0], best=30.0)
    (row,) = rows(tmp_path)
    assert row[:7] == ["bc", "made", "25.0", "75.0", "15.0 ± 5.0", "30.0 ± 0.0", "30.0 ± 10.0"]
    assert row[7:] == ["0 1", "20", "3", "1.5", "25 %"]


def test_a_seed_that_diverged_is_named_and_not_in_the_mean(tmp_path):
    write_run(tmp_path / "one", [10.0, None, 30.0])
    (row,) = rows(tmp_path)
    assert row[4] == "20.0 ± 10.0" and row[7] == "0 1 2 (diverged, not in the means: 1)"


def test_runs_of_one_algorithm_are_told_apart(tmp_path):
    write_run(tmp_path / "a", [1.0], fraction=1.0, hidden=[8])
    write_run(tmp_path / "b", [2.0], fraction=0.1, hidden=[8])
    write_run(tmp_path / "c", [3.0], "iql", fraction=0.1)
    assert [row[0] for row in rows(tmp_path)] == ["bc fraction=1.0", "bc fraction=0.1", "iql"]


def test_an_unfinished_run_is_left_out(tmp_path, capsys):
    write_run(tmp_path / "one", [1.0])
    write_run(tmp_path / "two", [2.0])
    (tmp_path / "two" / "result.json").unlink()
    assert len(rows(tmp_path)) == 1
    assert "two has no result.json" in capsys.readouterr().out


def test_no_run_is_one_line_and_exit_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as leave:
        report.find((tmp_path,))
    assert leave.value.code == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_the_page(tmp_path, monkeypatch):
    write_run(tmp_path / "runs" / "one", [10.0, 20.0])
    monkeypatch.chdir(tmp_path)
    Path("note.md").write_text("Where it comes from.\n")
    report.main(
        report.Arguments((Path("runs"),), Path("out/page"), title="Made", note=Path("note.md"))
    )
    text = Path("out/page.md").read_text()
    assert text.startswith("# Made\n\nWhere it comes from.\n")
    assert "| 0 | 5.0 | 10.0 |" in text and "| 1 | 5.0 | 20.0 |" in text
    assert Path("out/page.png").stat().st_size > 1000

# SPDX-License-Identifier: Apache-2.0
"""benchmarks/online_curves.py: the table of two small runs by hand; bad input."""

import json

import pytest

from benchmarks import online_curves

CONFIG = """dataset: {dataset}
random_steps: 5000
updates_per_step: 1
steps_per_refresh: 1000
hidden: [8, 8]
batch_size: 16
actor_learning_rate: {rate}
"""


def write_run(folder, returns, dataset="env/Hopper-v4", rate=0.0003, algorithm="sac"):
    """A run of one seed with an evaluation every 15,000 updates."""
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG.format(dataset=dataset, rate=rate))
    (folder / "result.json").write_text(json.dumps({"algorithm": algorithm}))
    lines = ["update,seed,q,return"]
    for i, x in enumerate(returns):
        lines += [f"{15_000 * i},0,,{x}", f"{15_000 * i + 1000},0,1.0,"]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    return str(folder)


def test_the_page_of_two_seeds(tmp_path):
    one = write_run(tmp_path / "one", [0, 10, 20, 60, 100, 100, 100, 400])
    two = write_run(tmp_path / "two", [0, 20, 40, 120, 100, 100, 100])
    output = tmp_path / "page"
    online_curves.main(online_curves.Arguments((one, two), str(output)))
    (first,) = json.loads(output.with_suffix(".json").read_text())["rows"]
    # Evaluations at 0, 20k, 35k, 50k, ... env steps: the last three by 40k are the first three.
    assert first["env"] == "Hopper" and first["env steps"] == 40_000 and first["seeds"] == 2
    assert (first["return here"], first["lowest"], first["highest"]) == (15, 10, 20)
    assert (first["Tianshou, mean"], first["Tianshou, std"]) == (1030, 794)
    assert output.with_suffix(".png").stat().st_size > 5000
    text = output.with_suffix(".md").read_text()
    assert "learning rate 0.0003, 1,000 env steps per refresh" in text
    assert "| Hopper | 40000 | 15 | 2 | 10 | 20 | 1030 | 794 |" in text


def test_every_row_of_the_table_has_a_published_number():
    reference = online_curves.published()
    assert sorted(reference) == ["HalfCheetah", "Hopper", "Walker2d"]
    for steps, mean, std in reference.values():
        assert set(online_curves.STEPS) <= set(steps) and (std > 0).all()
        assert mean[-1] > 2500 and len(steps) == len(set(steps))


def test_bad_input_is_one_line(tmp_path, capsys):
    fine = write_run(tmp_path / "fine", [0, 1])
    empty = tmp_path / "empty"
    empty.mkdir()
    for paths, words in [
        ((), "name at least one run folder"),
        ((str(empty),), "no finished run"),
        ((write_run(tmp_path / "iql", [0], algorithm="iql"),), "this takes sac on env/..."),
        ((write_run(tmp_path / "data", [0], dataset="x.hdf5"),), "this takes sac on env/..."),
        ((write_run(tmp_path / "ant", [0], dataset="env/Ant-v5"),), "no published curve of Ant"),
        ((fine, write_run(tmp_path / "fast", [0], rate=0.001)), "another run in Hopper has"),
    ]:
        with pytest.raises(SystemExit) as error:
            online_curves.main(online_curves.Arguments(paths, str(tmp_path / "output")))
        assert error.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
    assert not list(tmp_path.glob("output*"))

# SPDX-License-Identifier: Apache-2.0
"""benchmarks/sweeps and benchmarks/wandb_report.py as far as they go without an account."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import own_files
import pytest
import yaml

import readers
import wandb_report
from common.experiment import config

ROOT = Path(__file__).resolve().parents[2]
SWEEPS = [ROOT / "benchmarks" / "sweeps" / f"{name}.yaml" for name in own_files.NAMES]
CORE = ROOT / "benchmarks" / "runs" / "core"


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep(path, tmp_path, monkeypatch):
    """Every value of every parameter is one that the command line takes as it stands."""
    sweep = yaml.safe_load(path.read_text())
    assert (ROOT / sweep["program"]).stem == path.stem
    assert {*sweep} == {"program", "method", "metric", "command", "parameters"}
    assert sweep["method"] == "grid"
    assert sweep["metric"] == {"name": "score", "goal": "maximize"}
    assert sweep["command"][1:3] == ["python", "${program}"] and sweep["command"][-1] == "${args}"
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"algorithms.{path.stem}")
    values = {key: x.get("values", [x.get("value")]) for key, x in sweep["parameters"].items()}
    for i in range(max(map(len, values.values()))):
        point = {key: each[i % len(each)] for key, each in values.items()}
        flags = [f"--{key}={value}" for key, value in point.items()]  # what ${args} becomes
        cfg, options = config.parse(module.Config, [*sweep["command"][3:-1], *flags])
        point["seeds"] = (point["seeds"],)
        assert {key: getattr(cfg, key) for key in point} == point
        assert options.wandb == "online"
    assert len([*itertools.product(*values.values())]) <= 300


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_fits_wandbs_schema(path):
    """Where the package `sweeps` and jsonschema are installed."""
    jsonschema = pytest.importorskip("jsonschema")
    spec = importlib.util.find_spec("sweeps")
    if spec is None:
        pytest.skip("no sweeps")
    schema = json.loads((Path(spec.origin).parent / "config" / "schema.json").read_text())
    jsonschema.Draft7Validator(schema).validate(yaml.safe_load(path.read_text()))


# --- wandb report -------------------------------------------------------------------------------
def test_the_report_as_wandb_would_get_it(monkeypatch):
    """Where wandb-workspaces is installed; its look-up of the project's id is answered here."""
    pytest.importorskip("wandb_workspaces")
    from wandb_workspaces.reports.v2 import interface

    monkeypatch.setattr(interface, "_get_api", lambda: None)
    answer = {"project": {"internalId": "1"}}
    monkeypatch.setattr(interface, "execute_graphql", lambda *_: answer)
    rows, notes = readers.find((CORE,))
    model = wandb_report.build(rows, notes, "me", "atoll", "Results")._to_model()
    blocks = json.loads(model.model_dump_json(by_alias=True))["spec"]["blocks"]
    grids = [block["metadata"] for block in blocks if block["type"] == "panel-grid"]
    sets = {grid["runSets"][0]["name"]: grid["runSets"][0] for grid in grids}
    assert sets.keys() == {row.config["dataset"] for row in rows}
    hopper = sets["hopper-medium-v4.hdf5"]
    names = [key["name"] for key in hopper["grouping"]]
    assert names == ["algorithm.value", "fraction.value"]
    dataset, algorithm, state = hopper["filters"]["filters"]
    assert dataset["key"] == {"section": "config", "name": "dataset"}
    assert dataset["value"] == "hopper-medium-v4.hdf5"
    assert algorithm["op"] == "IN" and "td3_bc" in algorithm["value"]
    assert state["key"] == {"section": "run", "name": "state"} and state["value"] == "finished"
    panels = grids[0]["panelBankSectionConfig"]["panels"]
    assert panels[0]["config"]["metrics"] == ["score"]
    assert panels[0]["config"]["groupArea"] == "stddev"


class Recorder:
    """Stands for the package where it is not installed: keeps what is built."""

    def __getattr__(self, name):
        return lambda *args, **options: SimpleNamespace(kind=name, args=args, **options)


def test_run_sets_keep_methods_apart(monkeypatch):
    reports = SimpleNamespace(v2=Recorder())
    package = SimpleNamespace(reports=reports)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", package)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports", reports)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", reports.v2)
    rows, notes = readers.find((CORE,))
    made = wandb_report.build(rows, notes, "me", "atoll", "Results")
    sets = {
        block.runsets[0].name: block.runsets[0]
        for block in made.blocks
        if block.kind == "PanelGrid"
    }
    assert sets.keys() == {row.config["dataset"] for row in rows}
    hopper = sets["hopper-medium-v4.hdf5"]
    assert hopper.groupby == ["config.algorithm", "config.fraction"]
    assert (
        "Config('dataset') = 'hopper-medium-v4.hdf5' and Config('algorithm') in" in hopper.filters
    )
    door = sets["adroit-door-human-replay.hdf5"]
    assert door.groupby == ["config.algorithm"] and "['bc', 'iql', 'rebrac']" in door.filters
    tables = [block.args[0] for block in made.blocks if block.kind == "MarkdownBlock"]
    assert any("| bc fraction=0.1 | hopper-medium-v4 |" in text for text in tables)


@pytest.mark.parametrize("project", ["atoll", "/atoll", "me/"])
def test_a_project_without_its_entity_is_one_line(project, capsys):
    with pytest.raises(SystemExit) as leave:
        wandb_report.main(wandb_report.Arguments(project, (CORE,)))
    assert leave.value.code == 2 and "entity/project" in capsys.readouterr().err


def test_without_the_package_it_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(SystemExit) as leave:
        wandb_report.main(wandb_report.Arguments("me/atoll", (CORE,)))
    (line,) = capsys.readouterr().err.splitlines()
    assert leave.value.code == 2 and "wandb report for me/atoll" in line

# SPDX-License-Identifier: Apache-2.0
"""Every measured number in README and in the results pages is that of a kept record."""

import contextlib
import csv
import json
import re
import shlex
from pathlib import Path

import pytest
import tyro

import figures
from benchmarks import report

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
COMMAND = re.compile(r"^python benchmarks/report\.py .*$", re.M)


def made_again(page, folder, monkeypatch):
    """Runs the command that a page names, on the records, with its outputs in `folder`."""
    (command,) = set(COMMAND.findall(page.read_text()))
    (folder / "benchmarks" / "results").mkdir(parents=True)
    for name in ("runs", "notes"):
        (folder / "benchmarks" / name).symlink_to(ROOT / "benchmarks" / name)
    (folder / "README.md").write_text(README)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(figures, "png", lambda figure, path: None)
    for name in ("curves", "aggregates"):
        monkeypatch.setattr(figures, name, lambda *_: contextlib.nullcontext())
    report.main(tyro.cli(report.Arguments, args=shlex.split(command)[2:]))
    return folder / "benchmarks" / "results" / page.name


def of_runs():
    """The pages that report.py wrote."""
    pages = sorted((ROOT / "benchmarks" / "results").glob("*.md"))
    return [page for page in pages if "\nThis page:\n" in page.read_text()]


@pytest.mark.parametrize("page", of_runs(), ids=lambda page: page.stem)
def test_a_results_page_is_what_its_records_give(page, tmp_path, monkeypatch):
    again = made_again(page, tmp_path, monkeypatch)
    assert again.read_text() == page.read_text()
    assert (tmp_path / "README.md").read_text() == README


def test_every_page_has_a_record():
    """Those that report.py did not write say which command did."""
    others = {*(ROOT / "benchmarks" / "results").glob("*.md")} - {*of_runs()}
    assert {page.name for page in others if "python benchmarks/" not in page.read_text()} == set()


def test_a_changed_number_is_found(tmp_path, monkeypatch):
    """README's table is written anew, not copied."""
    spoilt = re.sub(r"(\| cql \| )\S+", r"\g<1>99.9", README)
    assert spoilt != README
    monkeypatch.setitem(globals(), "README", spoilt)
    made_again(ROOT / "benchmarks" / "results" / "core.md", tmp_path, monkeypatch)
    assert (tmp_path / "README.md").read_text() != spoilt


def test_every_table_of_the_readme_is_made_by_report():
    marks = re.findall(r"<!-- (\w+) -->\n(.*?)\n<!-- /\1 -->", README, re.S)
    assert marks and {name for name, _ in marks} <= {page.stem for page in of_runs()}
    rest = re.sub(r"<!-- (\w+) -->\n(.*?)\n<!-- /\1 -->", "", README, flags=re.S)
    assert "±" not in rest


def test_the_quickstart_shows_a_kept_run():
    (log,) = re.findall(r"```\n(config: .*?)\n```", README, re.S)
    (folder,) = re.findall(r"^run (?:runs)/(rebrac)/local/pointmaze/umaze-v0/(\w+)$", log, re.M)
    folder = ROOT / "benchmarks" / "runs" / "quickstarts" / Path(*folder)
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["score"]]
    shown = re.findall(r"^update ([\d,]+): score (\S+) \(seeds: (\S+)\)$", log, re.M)
    found = [(f"{int(row['update']):,}", *2 * (f"{float(row['score']):.1f}",)) for row in rows]
    assert shown == found
    result = json.loads((folder / "result.json").read_text())
    numbers = [f"{result[name]['0']:.1f}" for name in ("score", "best_score", "return")]
    last = re.search(r"score (\S+) \(best during training (\S+)\), return (\S+),", log)
    assert [*last.groups()] == numbers


def test_the_speed_beside_d3rlpy_is_that_of_the_record():
    record = json.loads((ROOT / "benchmarks" / "results" / "throughput.json").read_text())
    rows = {row["algorithm"]: row for row in record["rows"]}
    others = [row for name, row in rows.items() if row["times d3rlpy"] and name != "cql"]
    times = [row["times d3rlpy"] for row in others]
    share = [row["share of floor"] for row in others]
    said = re.search(
        r"([\d.]+) to ([\d.]+) times d3rlpy's updates/s.* at ([\d.]+) to ([\d.]+) of", flat(README)
    )
    numbers = (min(times), max(times), min(share), max(share))
    assert said.groups() == tuple(f"{x:.1f}" for x in numbers)
    assert "CQL, nearly all products, is level" in flat(README)
    assert abs(rows["cql"]["times d3rlpy"] - 1) < 0.1


def flat(text):
    return " ".join(text.split())

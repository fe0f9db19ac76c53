# SPDX-License-Identifier: Apache-2.0
"""Every measured number in README and in the results pages is that of a kept record.

Records are run folders (report.py makes their pages) or a .json beside the page. WITHOUT names the
pages that have none: of data.md the facts about recorded files are looked up in the files.
"""

import contextlib
import csv
import json
import re
import shlex
from pathlib import Path

import helpers_runs as runs
import pytest
import tyro

import figures
from benchmarks import data_table, host_data, report, soak, throughput

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
# Times of loading; what was broken on purpose, in words; the protocol of a trial.
WITHOUT = {"data.md", "reliability.md", "slurm.md"}
README, DATA = ((ROOT / x).read_text() for x in ("README.md", "benchmarks/results/data.md"))
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
    pages = sorted(RESULTS.glob("*.md"))
    return [page for page in pages if "\nThis page:\n" in page.read_text()]


@pytest.mark.parametrize("page", of_runs(), ids=lambda page: page.stem)
def test_a_results_page_is_what_its_records_give(page, tmp_path, monkeypatch):
    again = made_again(page, tmp_path, monkeypatch)
    assert again.read_text() == page.read_text()
    assert (tmp_path / "README.md").read_text() == README


def page_of(name):
    """The text that the script makes of the .json."""
    record = json.loads((RESULTS / f"{name}.json").read_text())
    return written(name, record)


def written(name, record):
    tables = {name: rows for name, rows in record.items() if isinstance(rows, list)}
    facts = {name: fact for name, fact in record.items() if name not in tables}
    if name.startswith("throughput"):
        return throughput.markdown(facts, tables) + "\n"
    if name == "soak":
        return f"# Soak\n\n{soak.markdown(facts, record['rows'])}"
    assert name == "host_data", "say here how its page is made"
    return host_data.page(record)


FROM_JSON = sorted(file.stem for file in RESULTS.glob("*.json"))


def test_every_page_has_a_record():
    made = {page.name for page in of_runs()} | {f"{name}.md" for name in FROM_JSON}
    assert {page.name for page in RESULTS.glob("*.md")} <= made | WITHOUT
    for name in {f"{name}.md" for name in FROM_JSON} | WITHOUT:
        page = RESULTS / name
        assert not page.exists() or "python benchmarks/" in page.read_text()  # to measure again


@pytest.mark.parametrize("name", FROM_JSON)
def test_a_page_is_what_the_json_beside_it_gives(name):
    text, again = (RESULTS / f"{name}.md").read_text(), page_of(name)
    assert text == again


def test_the_page_of_the_soak_counts_every_trial():
    record = json.loads((RESULTS / "soak.json").read_text())
    for i, row in enumerate(record["rows"]):
        spoilt = [dict(x) for x in record["rows"]]
        spoilt[i]["problems"] = [*row["problems"], "another"]
        assert written("soak", record | {"rows": spoilt}) != page_of("soak")
        assert written("soak", record | {"rows": spoilt[:i] + spoilt[i + 1 :]}) != page_of("soak")


@pytest.mark.parametrize("name", [name for name in FROM_JSON if name != "soak"])
def test_such_a_page_shows_every_number_of_the_json(name):
    """It is written anew, not copied: a number changed in the record changes the page."""
    record = json.loads((RESULTS / f"{name}.json").read_text())
    for i, row in enumerate(record["rows"]):
        for column, number in row.items():
            if isinstance(number, int | float):
                rows = [dict(x) for x in record["rows"]]
                rows[i][column] = 1.1 * number + 1
                assert written(name, record | {"rows": rows}) != page_of(name), (i, column)


@pytest.mark.parametrize(
    "name",
    runs.slow_but(re.findall(r"\$ATOLL_DATA/([\w-]+)", DATA), ["hopper-medium-v4"]),
)
def test_a_row_of_data_md_is_what_the_file_gives(name, atoll_data):
    facts, _, _ = data_table.run(str(atoll_data / f"{name}.hdf5"))
    (line,) = re.findall(rf"^.*/{name}\.hdf5.*$", DATA, re.M)
    assert facts_of(line) == facts_of(data_table.row(name, facts))
    found = [facts_of(spoilt) != facts_of(line) for spoilt in one_digit_changed(line)]
    assert sum(found) == len(re.findall(r"\d", "".join(facts_of(line)))) > 10


def one_digit_changed(text):
    """The text as often as it has digits, each time another one is wrong."""
    for digit in re.finditer(r"\d", text):
        yield text[: digit.start()] + str((int(digit[0]) + 1) % 10) + text[digit.end() :]


def facts_of(line):
    """The cells of a row of data.md but the id and the times."""
    cells = [cell.strip() for cell in line.split("|")]
    return cells[2:8] + cells[10:]


def test_a_changed_number_is_found(tmp_path, monkeypatch):
    """README's table is written anew, not copied."""
    spoilt = re.sub(r"(\| cql \| )\S+", r"\g<1>99.9", README)
    assert spoilt != README
    monkeypatch.setitem(globals(), "README", spoilt)
    made_again(RESULTS / "v4.md", tmp_path, monkeypatch)
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
    record = json.loads((RESULTS / "throughput.json").read_text())
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


def test_the_speed_on_a_gpu_is_that_of_the_record():
    one, eight = json.loads((RESULTS / "throughput_h200.json").read_text())["rows"]
    assert (one["seeds"], eight["seeds"]) == (1, 8)
    single, together = (f"{round(row['updates/s'], -2):,.0f}" for row in (one, eight))
    said = f"ReBRAC makes {single} updates/s (TF32), eight seeds side by side {together} together"
    assert f"{said}, a little over half of what their products" in flat(README)
    assert all(0.5 < row["share of bound"] < 0.6 for row in (one, eight))


def flat(text):
    return " ".join(text.split())

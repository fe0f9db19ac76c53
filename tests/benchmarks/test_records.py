# SPDX-License-Identifier: Apache-2.0
"""Every measured number in README, docs/results.md and the results pages is in a kept record.

Records are run folders (report.py makes their pages), the .json files of benchmarks/runs/speed
(speed.py makes the pages of speed) or a .json beside the page. WITHOUT names the pages that have
none; for data.md the facts about recorded files are looked up in the files.
"""

import contextlib
import copy
import csv
import json
import re
import shlex
from pathlib import Path

import helpers_runs as runs
import numpy as np
import own_files
import pytest
import tyro

import figures
from benchmarks import (
    data_table,
    ensembles,
    fidelity,
    host_data,
    model_error,
    online_curves,
    overestimation,
    pessimism,
    report,
    soak,
    speed,
)

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
# Loading times; a picture that its script draws anew; what was broken on purpose, in words.
WITHOUT = {"data.md", "occupancy.md", "reliability.md"}
OF_ALL = {"scores.md", "speed.md"}  # scores.py and speed.py make them of all records
IN_WORDS = {"findings.md"}  # says what other pages show
README, INDEX, DATA = (
    (ROOT / x).read_text() for x in ("README.md", "docs/results.md", "benchmarks/results/data.md")
)
SPEED = {machine.stem: machine for machine in speed.MACHINES}
RECORDS = speed.read()
COMMAND = re.compile(r"^python benchmarks/report\.py .*$", re.M)


def made_again(page, folder, monkeypatch):
    """Runs the command that a page names, on the records, with its outputs in `folder`."""
    (command,) = set(COMMAND.findall(page.read_text()))
    (folder / "benchmarks" / "results").mkdir(parents=True)
    for name in ("runs", "notes"):
        (folder / "benchmarks" / name).symlink_to(ROOT / "benchmarks" / name)
    (folder / "docs").mkdir()
    (folder / "docs" / "results.md").write_text(INDEX)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(figures, "png", lambda figure, path: None)
    for name in ("curves", "aggregates", "pulls"):
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
    assert (tmp_path / "docs" / "results.md").read_text() == INDEX


def page_of(name):
    """The text that the script makes of the .json."""
    record = json.loads((RESULTS / f"{name}.json").read_text())
    return written(name, record)


def written(name, record):
    tables = {name: rows for name, rows in record.items() if isinstance(rows, list)}
    facts = {name: fact for name, fact in record.items() if name not in tables}
    if name == "soak":
        return f"# Soak\n\n{soak.markdown(facts, record['rows'])}"
    scripts = {"ensembles": ensembles, "host_data": host_data, "pessimism": pessimism}
    scripts |= {"model_error": model_error, "overestimation": overestimation}
    scripts |= {"online_curves": online_curves}
    assert name in scripts, "say here how its page is made"
    return scripts[name].page(record)


# fidelity.json has the mutants alone: the rest of its page comes from fixtures, see below.
FROM_JSON = sorted(file.stem for file in RESULTS.glob("*.json") if file.stem != "fidelity")


def test_every_page_has_a_record():
    made = {page.name for page in of_runs()} | {
        f"{name}.md" for name in [*FROM_JSON, *SPEED, "fidelity"]
    }
    made |= OF_ALL
    assert {page.name for page in RESULTS.glob("*.md")} <= made | WITHOUT | IN_WORDS
    for name in made | WITHOUT | IN_WORDS:
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


def test_the_page_of_fidelity_is_of_the_files_as_they_are(monkeypatch):
    """Its table compares with the fixtures, as test_parity.py does; here that part is left out."""
    results = json.loads((RESULTS / "fidelity.json").read_text())
    text = (RESULTS / "fidelity.md").read_text()
    for name in own_files.NAMES:
        (row,) = [line for line in text.splitlines() if line.startswith(f"| [{name}](")]
        assert f"| {results[name]['caught']} of {results[name]['mutants']}" in row
        assert results[name]["caught"] >= 5
        changed = results[name]["code"] != fidelity.digest(
            (ROOT / "algorithms" / f"{name}.py").read_text()
        )
        assert changed == ("of the file as it was on" in row)
    monkeypatch.setattr(fidelity, "row", lambda *_: [])
    remain = "## Deviations that remain"
    assert text.split(remain)[1] == fidelity.page(results).split(remain)[1]


@pytest.mark.parametrize("stem", SPEED)
def test_a_speed_page_is_what_its_records_give(stem):
    machine = SPEED[stem]
    text = (RESULTS / f"{stem}.md").read_text()
    assert text == speed.page(machine, RECORDS[machine])


@pytest.mark.parametrize("stem", SPEED)
def test_a_speed_page_shows_every_number_of_the_newest_rows(stem):
    """A number changed in a record changes the page, unless a newer record replaces its row."""
    records = RECORDS[SPEED[stem]]
    rows, peers = speed.newest(records), speed.beside_d3rlpy(records)
    shown = [id(row) for row, _ in [*rows.values(), *peers.values()]]
    text, older = speed.page(SPEED[stem], records), 0
    for i, record in enumerate(records):
        for j, row in enumerate(record["rows"]):
            if id(row) not in shown:
                older += 1
                assert rows[row["algorithm"], row["seeds"]][1]["date"] > record["date"]
                continue
            for column, number in row.items():
                if isinstance(number, int | float):
                    spoilt = copy.deepcopy(records)
                    spoilt[i]["rows"][j][column] = 1.1 * number + 1
                    assert speed.page(SPEED[stem], spoilt) != text, (record["name"], j, column)
    assert older < len(shown)


def test_the_index_of_speed_is_what_its_records_give():
    text, more = (
        (RESULTS / "speed.md").read_text(),
        (speed.starts(), speed.read(speed.PEER_RECORDS)),
    )
    assert text == speed.index(RECORDS, *more)
    for machine in speed.MACHINES:
        rows = speed.newest(RECORDS[machine])
        counts = sorted({seeds for _, seeds in rows})
        for algorithm, seeds in rows:
            if seeds in (counts[0], counts[-1]):
                spoilt = copy.deepcopy(RECORDS)
                speed.newest(spoilt[machine])[algorithm, seeds][0]["updates/s"] += 10
                assert speed.index(spoilt, *more) != text


def test_the_index_of_speed_shows_every_number_of_start_up_and_of_other_code_bases():
    parts, peer = {"data": "file", "warm, CPU s": 12.5, "cold, CPU s": 30.25}, {}
    facts = {"date": "2026-01-01", "hardware": "one", "load": "2", "versions": "jax 1"}
    start = facts | {"command": "x", "name": "s", "algorithm": "rebrac", "rows": [parts]}
    newer = start | {"date": "2026-01-02", "name": "t", "rows": [parts | {"warm, CPU s": 7.125}]}
    text = "\n".join(speed.start_up([start, newer]))
    assert "| rebrac | file | 7.1 | 30.2 |" in text and "12.5" not in text
    peer = {"algorithm": "fql", "peer": "theirs", "updates/s here": 3.5, "updates/s": 2.25}
    peer |= {"times the peer": 1.556, "by CPU time": None, "versions": "jax 1", "why not": ""}
    record = {"name": "r", "date": "2026-01-01", "rows": [], "peers": [peer], "command": "x"}
    record |= {"data": "rows", "chunks": "2 updates"}
    other = record | {"name": "s", "peers": [peer | {"times the peer": 0.875}]}
    both = {speed.MACHINES[0]: [record, other]}
    text = "\n".join(speed.code_bases(speed.calls(both, {})))
    assert "| 3.500 | 2.250 | 1.556 |" in text and "jax 1" in text
    assert "| 3.500 | 2.250 | 0.875 |" in text  # no call is left out
    row = {"algorithm": "bc", "updates/s": 4.0, speed.PEER: 8.0, "times d3rlpy": 0.5}
    older = record | {"rows": [row], "peer": "d3rlpy 2", "peers": []}
    text = "\n".join(speed.code_bases(speed.calls({}, {speed.MACHINES[0]: [older]})))
    assert "| 4.000 | 8.000 | 0.500 |" in text and "d3rlpy 2" in text
    peer |= {"updates/s": None, "times the peer": None, "why not": "ImportError: no"}
    text = "\n".join(speed.code_bases(speed.calls({speed.MACHINES[0]: [record]}, {})))
    assert "| 3.500 |  |  |" in text and "ImportError: no" in text


NUMBER = re.compile(r"(?<![\w.-])-?\d+(?:,\d{3})*(?:\.\d+)?(?![\w%])")


def test_every_number_of_the_findings_is_on_the_page_that_its_paragraph_links_to():
    _, *findings = re.split(r"^## ", (RESULTS / "findings.md").read_text(), flags=re.M)
    assert len(findings) >= 5
    for finding in findings:
        pages = re.findall(r"\]\((\w+\.md)\)", finding)
        there = {x for page in pages for x in NUMBER.findall((RESULTS / page).read_text())}
        said = set(NUMBER.findall(finding))
        assert pages and len(said) >= 4 and said <= there, (finding.splitlines()[0], said - there)


def test_a_record_of_another_machine_is_refused(tmp_path):
    record = {"hardware": "1 x abacus", "date": "2026-01-01", "rows": []}
    (tmp_path / "other.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="abacus"):
        speed.read(tmp_path)


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
    """The tables of docs/results.md are written anew, not copied."""
    spoilt = re.sub(r"(\| cql \| )\S+", r"\g<1>99.9", INDEX)
    assert spoilt != INDEX
    monkeypatch.setitem(globals(), "INDEX", spoilt)
    made_again(RESULTS / "v4.md", tmp_path, monkeypatch)
    assert (tmp_path / "docs" / "results.md").read_text() != spoilt


MARKS = re.compile(r"<!-- (\w+) -->\n(.*?)\n<!-- /\1 -->", re.S)


def test_every_table_of_scores_is_made_by_report():
    names = {name for name, _ in MARKS.findall(INDEX)}
    assert names and names <= {page.stem for page in of_runs()}
    assert "±" not in MARKS.sub("", INDEX) and "±" not in README


def test_the_table_of_speed_in_the_readme_is_made_by_speed():
    assert dict(MARKS.findall(README)) == {"speed": speed.readme(RECORDS)}
    for algorithm, _, seeds, stem in speed.IN_README:
        spoilt = copy.deepcopy(RECORDS)
        speed.newest(spoilt[SPEED[stem]])[algorithm, seeds][0]["updates/s"] += 10
        assert speed.readme(spoilt) != speed.readme(RECORDS)


def test_the_cost_of_many_critics_in_the_docs_is_that_of_the_record():
    """The table "Many critics" of docs/scale.md."""
    page = (ROOT / "docs" / "scale.md").read_text()
    found = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) GB \|$", page, re.M)
    record = (RESULTS / "ensembles.md").read_text()
    row = r"^\| sac_n \| (\d+) \| ([\d.]+) \| \S+ \| \S+ \| ([\d.]+) \|"
    rows = re.findall(row, record, re.M)
    assert [row[0] for row in found] == [row[0] for row in rows]
    shown, measured = (np.array(table, float) for table in (found, rows))
    np.testing.assert_allclose(shown, measured, rtol=0.03)


def test_readme_names_the_files_without_a_score():
    results = [json.loads(x.read_text()) for x in (ROOT / "benchmarks/runs").rglob("result.json")]
    without = {*own_files.NAMES} - {result["algorithm"] for result in results}
    (named,) = re.findall(r"any score so far: ([^:]*?\.py)\. ", flat(README.replace("\n> ", " ")))
    assert {*named.replace(".py", "").split(", ")} == without


def test_the_quickstart_shows_a_kept_run():
    (log,) = re.findall(r"```\n(config: .*?)\n```", README, re.S)
    (folder,) = re.findall(r"^run (?:runs)/(rebrac)/local/pointmaze/umaze-v0/(\w+)$", log, re.M)
    folder = ROOT / "benchmarks" / "runs" / "quickstarts" / Path(*folder)
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["score"]]
    update = re.compile(r"^update ([\d,]+): score (\S+) \(seeds: (\S+)\)$", re.M)
    shown = update.findall(log)
    found = [(f"{int(row['update']):,}", *2 * (f"{float(row['score']):.1f}",)) for row in rows]
    begin, end = re.split(r"^\.\.\.$", log, flags=re.M)  # evaluations in between are left out
    shown_first, shown_last = (len(update.findall(x)) for x in (begin, end))
    assert shown_first and shown_last
    assert shown == [*found[:shown_first], *found[-shown_last:]]
    result = json.loads((folder / "result.json").read_text())
    numbers = [f"{result[name]['0']:.1f}" for name in ("score", "best_score", "return")]
    last = re.search(r"score (\S+) \(best during training (\S+)\), return (\S+),", log)
    assert [*last.groups()] == numbers


def test_other_scores_of_the_quickstart_are_of_kept_runs():
    """README names what the same command gave elsewhere; running.md says where."""
    record = ROOT / "benchmarks" / "runs" / "variants" / "rebrac_quickstart_amd" / "result.json"
    result = json.loads(record.read_text())
    elsewhere = f"{result['score']['0']:.1f}"
    reliability = (RESULTS / "reliability.md").read_text()
    newer_python = re.findall(r"^final score (\S+) ", reliability, re.M)[-1]
    running = flat((ROOT / "docs" / "running.md").read_text())
    assert f"{newer_python} and {elsewhere} were measured" in flat(README)
    assert f"| {newer_python} |" in running and f"| {elsewhere} |" in running
    assert result["hardware"].split("; ")[1] in running


def test_the_speed_beside_d3rlpy_is_that_of_all_calls():
    times = {}
    for _, row, _ in speed.calls(speed.read(speed.PEER_RECORDS), RECORDS):
        if row["peer"] == "d3rlpy":
            times.setdefault(row["algorithm"], []).append(row["times the peer"])
    cql = re.search(r"CQL ([\d.]+) to ([\d.]+) times", flat(README)).groups()
    assert cql == tuple(f"{x:.2f}" for x in sorted(times.pop("cql")))
    (named,) = re.findall(r"On two cores (.*) and (\w+) make", flat(README))
    named = {name.lower().replace("+", "_") for name in (*named[0].split(", "), named[1])}
    assert named == {*times}
    times = [x for each in times.values() for x in each]
    said = re.search(r"make ([\d.]+) to ([\d.]+) times d3rlpy's updates/s", flat(README))
    assert said.groups() == (f"{min(times):.1f}", f"{max(times):.1f}")


def flat(text):
    return " ".join(text.split())

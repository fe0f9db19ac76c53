# SPDX-License-Identifier: Apache-2.0
"""Speed pages, one per machine, their index, and README's table, from throughput.py's records.

    python benchmarks/speed.py

reads benchmarks/runs/speed/*.json, and for the index peers/ and startup/ there. It writes
benchmarks/results/speed_*.md, the index speed.md, and the part of README.md between
`<!-- speed -->` and `<!-- /speed -->`. Where two records of one machine measured the same file with
the same number of seeds, the pages show the newer one. Other code bases are shown with every call.

To add a measurement:

    python benchmarks/throughput.py ... --output benchmarks/runs/speed/NAME.json
    python benchmarks/speed.py
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

from common import command_line
from report import around

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks" / "runs" / "speed"
PEER_RECORDS = RECORDS / "peers"  # of throughput.py --peers: rows of a busy machine are no speeds
STARTS = RECORDS / "startup"  # of startup.py
PEER = "d3rlpy updates/s"  # column of the rows that were measured beside d3rlpy
IN_README = (  # file, its name, number of seeds, page
    ("td3_bc", "TD3+BC", 1, "speed_cpu"),
    ("rebrac", "ReBRAC", 1, "speed_cpu"),
    ("rebrac", "ReBRAC", 1, "speed_h200"),
    ("rebrac", "ReBRAC", 8, "speed_h200"),
)
UPDATES = """
- **updates/s**: updates per second (of the critics, where a method has them; of the actor in
  awr), added over the seeds that one process trains in parallel. Each figure is the best of several
  timed chunks on synthetic data, without evaluation.
"""
FLOOR = """
- **share of floor**: the floor is the time that the matrix products of an update alone take. Here
  their floating-point operations are counted and divided by the rate at which the machine
  multiplies [batch, width] by [width, width] matrices. A share of 0.7 means that training takes
  1 / 0.7 of that time. It is measured on CPUs only, and it is an estimate: a share can exceed 1.
"""
REST = """
- **share of bound**: the bound is the speed of a program that runs exactly the matrix products of
  the compiled updates, one after the other, and nothing else. A share of 0.7 means that training
  takes 1 / 0.7 of that program's time. A share can exceed 1: in training independent products may
  run side by side, and the program copies a slice for each of its products.
- The shares and GFLOP per update are those of the smallest number of seeds.
- `benchmarks/throughput.py` explains the columns under "All figures".
"""
INDEX = """
Written by `python benchmarks/speed.py`. Updates/s are updates per second (of the critics, where a
method has them; of the actor in awr), added over the seeds that one process trains in parallel, on
synthetic data and without evaluation. All batches have 256 rows (dt: windows) and the networks are
those of the files' defaults. "Default batch" is what the file itself takes: a larger one costs
more. The pages of the machines have what an update costs, how close it is to its matrix products
alone, the records and their commands. An empty cell was not measured. Columns of different
machines cannot be compared. On CPUs more seeds share the same cores, so their updates/s barely
grow.
"""
PEERS = """
`throughput.py --peers` measures other code bases right after our row: the same widths, batch size
and shape of the data, one seed, each as its own main program trains (`benchmarks/peers.py`).
Updates are critic updates; Unifloral makes two of them on every batch. "here" is ours, "times the
peer" the ratio. On a machine that other work shares, read the ratio by CPU time (of all threads):
the clock measures mostly the waiting. Every call has a row. The rate of this machine moves by up to
a third between minutes, as the ratios of repeated calls show, so a ratio between 0.75 and 1.33 does
not tell which of the two is faster.
"""
STARTED = """
CPU seconds (of all threads) from the command to the end of the first chunk, two updates: `cold`
has an empty compilation cache, `warm` a filled one. The parts are those of the warm start: Python
and the imports, reading the data, the initial parameters, envs and the evaluation at update 0,
fetching or compiling the first chunk and running it, the rest. `seconds` are those on the clock.
"""


class Machine(NamedTuple):
    stem: str  # of the page
    words: str  # a record's `hardware`
    title: str
    hardware: str  # as README's table says it


MACHINES = (
    Machine(
        "speed_cpu",
        "1 x cpu; 2 cores of Intel(R) Xeon(R) Processor",
        "Training speed on two CPU cores",
        "2 cores of an Intel Xeon",
    ),
    Machine(
        "speed_cpu_2",
        "1 x cpu; 2 cores of Intel(R) Xeon(R) Processor @ 2.80GHz",
        "Training speed on two slower CPU cores",
        "2 cores of an Intel Xeon at 2.8 GHz",
    ),
    Machine(
        "speed_h200",
        "1 x NVIDIA H200; 16 cores of Intel(R) Xeon(R) Processor",
        "Training speed on one H200 GPU",
        "1 NVIDIA H200, TF32",
    ),
)


# --- Records ------------------------------------------------------------------------------------
def read(folder=RECORDS):
    """machine -> its records, oldest first; a record is a dict with its file's name."""
    found = {machine: [] for machine in MACHINES}
    for file in sorted(folder.glob("*.json")):
        record = json.loads(file.read_text()) | {"name": file.stem}
        machines = [machine for machine in MACHINES if machine.words == record["hardware"]]
        if len(machines) != 1:
            raise SystemExit(f"{file}: add '{record['hardware']}' to MACHINES in speed.py")
        found[machines[0]].append(record)
    for records in found.values():
        records.sort(key=lambda record: (record["date"], record["name"]))
    return found


def starts(folder=STARTS):
    """The records of startup.py, oldest first."""
    records = [json.loads(x.read_text()) | {"name": x.stem} for x in sorted(folder.glob("*.json"))]
    return sorted(records, key=lambda record: (record["date"], record["name"]))


def newest(records):
    """(algorithm, seeds) -> its newest row and the record that has it."""
    rows = {}
    for record in records:
        for row in record["rows"]:
            rows[row["algorithm"], row["seeds"]] = (row, record)
    return rows


def beside_d3rlpy(records):
    """The newest rows that were measured beside d3rlpy, with their record."""
    return newest(
        record | {"rows": [row for row in record["rows"] if row.get(PEER)]} for record in records
    )


# --- Page ---------------------------------------------------------------------------------------
def number(x):
    """A cell of the tables: three digits where it is a fraction."""
    return f"{x:,.3f}" if isinstance(x, float) else str(x or "")


def table(head, lines):
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def page(machine, records):
    """The text of a machine's page."""
    rows, peers = newest(records), beside_d3rlpy(records)
    parts = [
        f"# {machine.title}",
        "Written by `python benchmarks/speed.py`: the newest measurement of every file and number "
        "of seeds, from the records named below. The batch size is "
        f"{joined(str(x['batch size']) for x in records)}; the networks are the files' defaults.",
        speeds(rows),
        f"How to read it:\n\n{how_to_read(rows)}",
    ]
    if peers:
        lines = []
        for (algorithm, seeds), (row, record) in sorted(peers.items()):
            both = [f"{row['updates/s']:,.1f}", f"{row[PEER]:,.1f}", f"{row['times d3rlpy']:.2f}"]
            lines.append([algorithm, seeds, *both, record["date"]])
        head = ["algorithm", "seeds", "updates/s here", PEER, "ratio", "measured on"]
        versions = joined(record["peer"] for _, record in peers.values())
        parts += [
            "## Beside d3rlpy",
            f"The same widths, batch size and data, measured right after each other ({versions}).",
            table(head, lines),
        ]
    parts += ["## Records and commands", *(described(x, rows, peers) for x in records)]
    parts += [
        "## All figures",
        "<details>\n<summary>every column of the rows above</summary>",
        all_figures([row for _, (row, _) in sorted(rows.items())]),
    ]
    if peers:
        parts.append("Beside d3rlpy:")
        parts.append(all_figures([row for _, (row, _) in sorted(peers.items())]))
    return "\n\n".join(part for part in [*parts, "</details>"] if part) + "\n"


def how_to_read(rows):
    """What the columns mean that the page has: the floor is measured on CPUs only."""
    some_row, _ = next(iter(rows.values()))
    floor = FLOOR if "share of floor" in some_row else ""
    return "\n".join(part.strip("\n") for part in (UPDATES, floor, REST) if part)


def speeds(rows):
    """The table that a reader looks at first: a line per file, a column per number of seeds."""
    counts = sorted({seeds for _, seeds in rows})
    shares = [f"share of {x}" for x in ("floor", "bound")]
    some_row, _ = next(iter(rows.values()))
    shares = [column for column in shares if column in some_row]
    head = ["algorithm", *(f"updates/s, {seeds} seed{'s' * (seeds > 1)}" for seeds in counts)]
    lines = []
    for algorithm in sorted({algorithm for algorithm, _ in rows}):
        here = {seeds: rows[algorithm, seeds] for seeds in counts if (algorithm, seeds) in rows}
        first, _ = here[min(here)]
        line = [algorithm]
        line += [f"{here[seeds][0]['updates/s']:,.1f}" if seeds in here else "" for seeds in counts]
        line += [f"{first[column]:.2f}" for column in shares]
        line += [
            f"{first['GFLOP/update']:.2f}",
            joined(record["date"] for _, record in here.values()),
        ]
        lines.append(line)
    return table([*head, *shares, "GFLOP/update", "measured on"], lines)


def all_figures(rows):
    """A table with every number of the rows."""
    head = list(dict.fromkeys(column for row in rows for column in row))
    return table(head, [[number(row.get(column)) for column in head] for row in rows])


def described(record, rows, peers):
    """A record: which of its rows are shown, how it was measured, its command."""
    every = [*rows.values(), *peers.values()]
    used = [row for row, origin in every if origin["name"] == record["name"]]
    count = len({(row["algorithm"], row["seeds"]) for row in used})
    count = f"{count} of its {len(record['rows'])} rows are shown"
    lines = [f"[{record['name']}.json](../runs/speed/{record['name']}.json), {count}:", ""]
    shown = ("date", "hardware", "versions", "matmul precision", "data", "chunks", "beside")
    lines += [f"- {key}: {record[key]}" for key in shown if key in record]
    if "NVIDIA" in record["hardware"]:  # JAX's default there
        lines = [x + " (TF32)" if x == "- matmul precision: default" else x for x in lines]
    return "\n".join([*lines, "", f"```\n{record['command']}\n```"])


def joined(words):
    return ", ".join(dict.fromkeys(words))


# --- Index --------------------------------------------------------------------------------------
def index(found, started, compared):
    """The text of speed.md: the newest figures of every machine side by side.

    Args:
        found: the records of `read`.
        started: those of `starts`.
        compared: those of `read` in PEER_RECORDS.
    """
    found = {machine: records for machine, records in found.items() if records}
    lines, newest_of = [], {}
    for machine, records in found.items():
        rows = newest_of[machine] = newest(records)
        used = {record["name"]: record for _, record in rows.values()}.values()
        lines.append(
            [
                f"[{machine.title}]({machine.stem}.md)",
                machine.hardware,
                len({algorithm for algorithm, _ in rows}),
                joined(record["date"] for record in used),
                joined(record["versions"].split(", ")[0] for record in used),
                joined(record["beside"] for record in used if "beside" in record),
            ]
        )
    parts = ["# Speed", INDEX.strip()]
    parts += [table(["page", "hardware", "files", "measured on", "version", "beside"], lines)]
    head, columns = ["algorithm", "default batch (all measured with 256)"], []
    for machine, rows in newest_of.items():
        counts = sorted({seeds for _, seeds in rows})
        for seeds in dict.fromkeys((counts[0], counts[-1])):
            head.append(f"{machine.hardware}, {seeds} seed{'s' * (seeds > 1)}")
            columns.append((rows, seeds))
    lines = []
    for name in sorted({name for rows in newest_of.values() for name, _ in rows}):
        cells = [rows.get((name, seeds)) for rows, seeds in columns]
        speeds_of = [f"{x[0]['updates/s']:,.1f}" if x else "" for x in cells]
        lines.append([name, default_batch(name), *speeds_of])
    parts += ["## Updates/s", table(head, lines)]
    parts += [*code_bases(calls(compared, found)), *start_up(started)]
    return "\n\n".join(parts) + "\n"


def default_batch(algorithm):
    """The batch size of a file's Config, as text."""
    source = (ROOT / "algorithms" / f"{algorithm}.py").read_text()
    return f"{int(re.search(r'^    batch_size: int = ([0-9_]+)', source, re.M)[1]):,}"


def calls(found, measured):
    """(machine, row, record) of every row that was measured beside another code base.

    Args:
        found: the records of `read` in PEER_RECORDS.
        measured: those of `read`; some of their rows have a column for d3rlpy.
    """
    rows = []
    for machine, records in measured.items():
        for record in records:
            for row in record["rows"]:
                if row.get(PEER):
                    peer = {"algorithm": row["algorithm"], "peer": "d3rlpy", "why not": ""}
                    peer |= {"updates/s here": row["updates/s"], "updates/s": row[PEER]}
                    peer |= {"times the peer": row["times d3rlpy"], "versions": record["peer"]}
                    rows.append((machine, peer, record))
    for machine, records in found.items():
        for record in records:
            rows += [(machine, row, record) for row in record.get("peers", ())]
    return sorted(rows, key=lambda x: (x[1]["algorithm"], x[1]["peer"], x[2]["date"]))


def code_bases(rows):
    """Parts of the index: what `calls` found."""
    if not rows:
        return []
    figures = ["updates/s here", "updates/s", "times the peer"]
    figures += ["updates/CPU s here", "updates/CPU s", "by CPU time"]
    lines, records = [], {}
    for machine, row, record in rows:
        records[record["name"]] = record
        numbers = [number(row.get(column)) for column in figures]
        why = row["why not"] or row["versions"]
        lines.append([row["algorithm"], row["peer"], machine.hardware, *numbers])
        lines[-1] += [record["date"], why]
    head = ["algorithm", "code base", "hardware", *figures, "measured on", "versions, or why not"]
    commands = [
        f"{record['name']}.json, {record['data']}, chunks of {record['chunks']}"
        + (f"; beside it: {record['beside']}" if "beside" in record else "")
        + f":\n\n```\n{record['command']}\n```"
        for record in records.values()
    ]
    return ["## Beside other code bases", PEERS.strip(), table(head, lines), *commands]


def start_up(records):
    """Parts of the index: what a run does until its first update, the newest record of each."""
    rows = {}
    for record in records:
        for row in record["rows"]:
            rows[record["hardware"], record["algorithm"], row["data"]] = (row, record)
    if not rows:
        return []
    columns = list(dict.fromkeys(column for row, _ in rows.values() for column in row))
    lines, shown = [], {}
    for row, record in rows.values():
        shown[record["name"]] = record
        cells = [f"{x:.1f}" if isinstance(x, float) else x for x in map(row.get, columns)]
        lines.append([record["algorithm"], *cells])
    parts = ["## Start-up", STARTED.strip(), table(["algorithm", *columns], lines)]
    kept = ("date", "hardware", "load", "versions")
    for record in shown.values():
        facts = "\n".join(f"- {key}: {record[key]}" for key in kept)
        parts.append(f"{record['name']}.json:\n\n{facts}\n\n```\n{record['command']}\n```")
    return parts


# --- README -------------------------------------------------------------------------------------
def readme(found):
    """README's table: a few rows of the pages, with their hardware."""
    lines = []
    for algorithm, name, seeds, stem in IN_README:
        (machine,) = (machine for machine in found if machine.stem == stem)
        row, record = newest(found[machine])[algorithm, seeds]
        cells = [name, seeds, machine.hardware, f"{row['updates/s']:,.0f}", record["date"]]
        lines.append(cells)
    return table(["method", "seeds in parallel", "hardware", "updates/s", "measured on"], lines)


def main():
    found = read()
    for machine, records in found.items():
        path = ROOT / "benchmarks" / "results" / f"{machine.stem}.md"
        path.write_text(page(machine, records))
        print(f"written: {path.relative_to(ROOT)}")
    (ROOT / "benchmarks" / "results" / "speed.md").write_text(
        index(found, starts(), read(PEER_RECORDS))
    )
    path = ROOT / "README.md"
    before, after = around(path, "speed")
    path.write_text(before + readme(found) + after)
    print("written: benchmarks/results/speed.md README.md")


if __name__ == "__main__":
    command_line.outlive_the_reader()
    main()

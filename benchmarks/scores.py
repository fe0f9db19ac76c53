# SPDX-License-Identifier: Apache-2.0
"""All scores that were measured, one table per suite, and README's picture of them.

    python benchmarks/scores.py

reads the run folders below benchmarks/runs and writes benchmarks/results/scores.md and scores.png.
A new record is on the page after the next call. LEFT_OUT names the folders of experiments that vary
a setting on purpose; they have pages of their own. Runs that went on in an env are left out, too.

Where several records have one method and one data set, the page shows the one with the most seeds,
then the one with the most updates, then the later one in the order of folders. Scores do not enter
that choice. A published score stands beside ours only where benchmarks/published.py allows it.
"""

import json
import re
from pathlib import Path

import numpy as np

import figures
import intervals
import published
import readers
import report
from common import command_line
from pages import Folded, Heading, Table, Text, markdown

ROOT = Path(__file__).resolve().parents[1]
RUNS, RESULTS = ROOT / "benchmarks" / "runs", ROOT / "benchmarks" / "results"
LEFT_OUT = ("bandit", "circle", "more_rows", "selection", "variants")  # of single settings
TOP = """
Written by `python benchmarks/scores.py` from the records in [benchmarks/runs](../runs). Left out
are the folders {left_out}, which vary single settings on purpose, and
runs that went on in an env.

The score is that of the last policy, mean ± std over seeds (ddof 0). It is normalised so that 0
and 100 are the data set's reference scores; OGBench's is the success rate in percent. Where a
method has several records on a data set, the table has the one with the most seeds, then the one
with the most updates. The first line of a table says how most of a column was measured; brackets
say what differs. A row is named after its file and the choices that differ from the file's
defaults: `brac` alone is BRAC-v, with `variant=p` BRAC-p and with `divergence=mmd` BEAR;
`generator=flow` makes IFQL of `idql` and FBRAC of `diffusion_ql`.

**Do not rank methods by these tables alone.** Budgets and networks differ between records, many
have one seed, and most settings were not tuned. The page of a record has its settings and curves.
"""
NONE = "No published score may stand beside one of these: none has the same data and protocol."
PICTURE = """
Mean over the data sets of a suite, with a 95 % bootstrap interval over seeds (too narrow with fewer
than ten seeds). Only methods with a score on every data set of the suite; small dots are its data
sets. A method without an interval has one seed.
"""


# --- Rows ---------------------------------------------------------------------------------------
def read(runs=RUNS):
    """(rows, notes): one row per method and data set, chosen as the docstring says."""
    folders = sorted(x for x in runs.iterdir() if x.is_dir() and x.name not in LEFT_OUT)
    folders = [folder for folder in folders if any(folder.rglob("result.json"))]
    joined = [folder for folder in folders if folder.name in joins_versions()]
    every, notes = readers.find([folder for folder in folders if folder not in joined])
    if joined:
        more, of_more = readers.find(joined, same_code=True)
        every, notes = every + more, notes + of_more
    every = [row for row in every if (ROOT / "algorithms" / f"{row.algorithm}.py").is_file()]
    for row in every:
        row.variant = ""  # what tells records apart; only choices name a method
    report.name_choices(every)
    chosen = {}
    for row in sorted(every, key=lambda row: str(row.folder)):
        key = row.family, row.dataset, row.label
        if not row.config.get("online_updates") and size(row) >= size(chosen.get(key)):
            chosen[key] = row
    order = files()
    place = {name: i for i, name in enumerate(order)}
    rows = sorted(chosen.values(), key=lambda row: place.get(row.algorithm, len(order)))
    return sorted(rows, key=lambda row: (row.family, row.dataset)), notes


def size(row):
    """Seeds and updates of a row; those of no row are 0."""
    return (len(row.last), row.result["num_updates"]) if row else (0, 0)


def files():
    """Names of the project's own algorithm files, in the order of README's table of methods."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [*dict.fromkeys(re.findall(r"^\|.*\(algorithms/(\w+)\.py\)", text, re.M))]


def pages():
    """Folder of benchmarks/runs -> the page that report.py made of it, as a link."""
    found = {}
    for page in sorted(RESULTS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"^python benchmarks/report.py benchmarks/runs/(\w+) ", text, re.M):
            found[name] = f"[{page.stem}]({page.name})"
    return found


def joins_versions():
    """Folders of benchmarks/runs whose page joins seeds of several versions (--same-code)."""
    command = r"^python benchmarks/report.py benchmarks/runs/(\w+) .*--same-code"
    texts = [page.read_text(encoding="utf-8") for page in sorted(RESULTS.glob("*.md"))]
    return {name for text in texts for name in re.findall(command, text, re.M)}


# --- Page ---------------------------------------------------------------------------------------
def page(rows):
    """The text of scores.md."""
    reference, made, left_out = published.load(), pages(), ", ".join(f"`{x}`" for x in LEFT_OUT)
    blocks = [Heading("Scores", 1), Text(TOP.format(left_out=left_out))]
    blocks.append(Text("![mean scores by suite](scores.png)\n\n" + PICTURE.strip()))
    any_published = False
    for suite, group in report.by_family(rows).items():
        there = {row.algorithm for row in group}
        beside = report.beside(group, reference)
        any_published |= bool(beside)
        unit = report.joined(report.WORDS[row.scale] for row in group)
        blocks += [Heading(suite), Text(f"{unit.capitalize()}:"), scores(group), *beside]
        missing = [name for name in files() if name not in there]
        if missing:
            blocks.append(Text(f"No record here: {', '.join(missing)}."))
        folders = dict.fromkeys(row.folder.relative_to(RUNS).parts[0] for row in group)
        words = [made.get(name, f"[{name}](../runs/{name})") for name in folders]
        blocks.append(Text(f"Settings, curves and commands: {', '.join(words)}."))
        blocks.append(Folded("Every score, and its record", [every(group)]))
    if not any_published:
        blocks.insert(2, Text(NONE))
    return markdown(blocks)


def scores(rows):
    """Methods by data sets, below how most of a column was measured.

    The mean over the data sets stands where a method has them all. There is none where one name
    stands for several data sets, because they are copies of each other.
    """
    table, sizes, order = report.matrix(rows), report.usual_sizes(rows), files()
    names = [name for name in table.head if name in sizes]
    most = ["*most of the column*"]
    for name in names:
        updates, seeds, episodes = sizes[name]
        words = f"{updates:,} updates, {seeds} seed{'s' * (seeds > 1)}, {episodes} episodes"
        most.append(f"*{words}*")
    means = len(names) > 1 and not any(row.copy for row in rows)
    lines = [line[: len(names) + 1 + means] for line in table.rows]
    lines = [["" if str(x).startswith("none: ") else x for x in line] for line in lines]
    lines.sort(key=lambda line: (order.index(line[0].split()[0]), line[0]))
    return Table(table.head[: len(names) + 1 + means], [most + [""] * means, *lines])


def every(rows):
    """One line per score: how it was measured, and where its record is."""
    head = ["algorithm", "data set", "last", "mean of the last 3", "seeds", "updates", "episodes"]
    lines = []
    for row in rows:
        three = row.last_3.mean(axis=1) if row.last_3.size else np.array([])
        cells = [report.spread(row.last) + report.lost(row), report.spread(three)]
        cells += [len(row.last), f"{row.result['num_updates']:,}", row.result["eval_episodes"]]
        record = " ".join(
            f"[{folder.name}](../runs/{folder.relative_to(RUNS).as_posix()})"
            for folder in [row.folder, *row.others]
        )
        lines.append([row.label, row.dataset, *cells, record])
    return Table([*head, "record"], lines)


# --- Picture ------------------------------------------------------------------------------------
def means(rows):
    """suite -> method -> [mean, low, high, [scores of the data sets]], highest mean first.

    Suites with several data sets and at least three methods that have a score on all of them, each
    of two seeds or more.
    """
    found = {}
    for suite, group in report.by_family(rows).items():
        names = dict.fromkeys(row.dataset for row in group)
        if len(names) < 2 or any(row.copy for row in group):
            continue
        methods = {}
        for label, here in report.by_method(group).items():
            if not report.why_no_mean(here, names) and min(len(x.last) for x in here.values()) > 1:
                methods[label] = mean_of([here[name].last for name in names])
        if len(methods) > 2:
            found[suite] = dict(sorted(methods.items(), key=lambda item: -item[1][0]))
    return found


def mean_of(scores):
    """[mean, low, high, [scores of the data sets]] of one method, from [S] each."""
    each = [float(x.mean()) for x in scores]
    seeds = min(map(len, scores))
    aligned = np.array([x[:seeds] for x in scores]).T  # [S, T]
    _, low, high = report.estimate(intervals.mean, aligned)
    interval = [None if np.isnan(x) else round(float(x), 1) for x in (low, high)]
    return [round(float(np.mean(each)), 1), *interval, [round(x, 1) for x in each]]


def main():
    rows, notes = read()
    numbers = means(rows)
    with figures.means(numbers) as figure:
        figures.png(figure, RESULTS / "scores.png", json.dumps(numbers))
    (RESULTS / "scores.md").write_text(page(rows), encoding="utf-8")
    print(
        *notes, "", "written: benchmarks/results/scores.md benchmarks/results/scores.png", sep="\n"
    )


if __name__ == "__main__":
    command_line.outlive_the_reader()
    main()

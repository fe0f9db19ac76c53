# SPDX-License-Identifier: Apache-2.0
"""Run folders -> tables, learning curves and intervals, as a Markdown page and an HTML page.

    python benchmarks/report.py runs/rebrac --output benchmarks/results/mine

writes mine.md, mine.png (learning curves) and, if there are methods to compare, mine_1.png, ...
(intervals). --html adds mine.html, one file with everything in it. --index docs/results.md rewrites
the part of that page between `<!-- mine -->` and `<!-- /mine -->`: the scores by data set. `--where
num_updates=100000` takes only some of the runs. `--named-by alpha` names the rows of a method by
that field alone, not by everything in which its runs differ; `name` is the run folder's name. Seeds
of two versions of an algorithm's file, or of common/, are rows of their own. `--same-code` joins
them: it is for versions that compute the same scores. The page names them.

The score is that of the last policy: the mean over the evaluation's episodes, then mean ± std
(ddof 0) over seeds. --score mean_last_3 takes the mean of a seed's last three evaluations instead,
as FQL's authors do on OGBench. The best score during training stands beside it. It was selected on
the evaluation itself, so it is not a score. Data of different origin are never in one table. Runs
that are unfinished, damaged or not comparable are named and left out of every mean.

--protocol bandit is Unifloral's evaluation instead, see bandit.py: not one tuned number, but the
score of a bandit that plays k episodes to find the best of a method's policies. It takes the
episodes of last policies on new start states only.
"""

import collections
import contextlib
import dataclasses
import importlib
import io
import json
import os
import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

import agreement
import bandit
import figures
import intervals
import published
import readers
from common import command_line, fail
from common.experiment import config, provenance, wrong_words
from pages import Figure, Folded, Heading, Table, Text, markdown, page

ROOT = Path(__file__).resolve().parents[1]
UNITS = {"normalised": "score", "success": "success", "return": "return"}
WORDS = {"normalised": "normalised score", "success": "success in %", "return": "plain return"}
PUBLISHED = (
    "Published scores with the same data, updates, episodes and selection, and the source's own "
    "settings; seeds in brackets. D4RL's data are evaluated here in the counterpart env that "
    "docs/data.md names."
)
MADE_HERE = (
    "The `local/ogbench` data were made here as OGBench's scripts make theirs, with as many "
    "episodes, but have other rows; docs/data.md says which sets were compared."
)
FEW = 10  # below this number of seeds the page warns that an interval is too narrow
MANY = 5  # from this number of seeds on, every evaluation is printed as mean ± std
METHODS = ("fraction",)  # numeric fields that papers treat as a method of its own: 10%BC
NARROW = "a 95 % bootstrap interval is too narrow"
SCORES = {"last": "the last policy", "mean_last_3": "the mean of a seed's last three evaluations"}
EXPLAINED = """
Score: {score}, mean ± std over seeds (ddof 0). It is normalised so that 0 and 100 are
the data set's reference scores, the success rate in percent for OGBench, and the plain return for
data without reference scores. Best: the highest evaluation during training, selected after the
fact. Data mean, data best: returns of the recorded episodes on the same scale. Updates/s:
all seeds of a process together. Wall-clock: training and evaluation.
"""
ONLINE = """
Online phase: updates after the switch are made beside an env. Before, after: the score of the
policy at the switch and at the end; without offline updates there is none before. Regret: 1 - the
mean normalised score / 100 of all episodes that ended in the phase, with exploration's actions.
"""
INTERVALS = """
IQM is the interquartile mean over seeds and data sets. Brackets hold 95 % intervals of a bootstrap
stratified by data set. "Row beats column" is the probability that a seed of the row scores higher
than a seed of the column on the same data set, averaged over data sets. All methods and seeds share
the same start states, so intervals and standard deviations do not cover other start states.
"""


@dataclass
class Arguments:
    """Where to read and to write."""

    folders: tyro.conf.Positional[tuple[Path, ...]] = ()  # run folders, or folders above them
    wandb: str | None = None  # "entity/project" to read instead of folders
    where: tuple[str, ...] = ()  # only these runs: num_updates=100000 name=trial*
    named_by: tuple[str, ...] = ()  # fields that name a method's rows: name, alpha, ...
    same_code: bool = False  # join runs of versions of the code that compute the same scores
    score: Literal["last", "mean_last_3"] = "last"  # the last evaluation, or the mean of three
    protocol: Literal["scores", "bandit"] = "scores"  # bandit: over a method's policies
    output: Path = Path("runs/report")  # stem of the .md and .png to write
    title: str = "Results"  # heading of the page
    note: Path | None = None  # Markdown file put below the title: data, commands, findings
    html: bool = False  # also write one self-contained page, the stem with .html
    index: Path | None = None  # page whose part between the marks of this report is rewritten
    reference: Path = published.FILE  # CSV file of published scores
    command: str | None = None  # named on the page as its command, if this call alone is not


# --- Cells --------------------------------------------------------------------------------------
def spread(x, digits=1):
    """Mean ± std (ddof 0) over the seeds that have the number; empty if none has it."""
    x = x[~np.isnan(x)]
    if not len(x):
        return ""
    mean = f"{x.mean():.{digits}f}"
    return f"{mean} ± {x.std():.{digits}f}" if len(x) > 1 else mean


def lost(row):
    """Names seeds that diverged: the means are over the other seeds only."""
    gone = " ".join(row.result["diverged"])
    return f" (diverged, not in the means: {gone})" if gone else ""


def clock(seconds):
    return "" if seconds is None else f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}"


def within(point, low, high, digits=1):
    """A number and its interval; a single seed has no interval."""
    if np.isnan(low):
        return f"{point:.{digits}f}"
    return f"{point:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def joined(words):
    return ", ".join(dict.fromkeys(map(str, words)))


# --- Tables -------------------------------------------------------------------------------------
def table(rows):
    """Every row of the report: its score, the best during training, its cost."""
    selection = rows[0].selection
    score = "score" if selection == "last" else f"score ({selection})"
    head = ["algorithm", "data set", "data mean", "data best", score, "best", "return", "seeds"]
    head += ["updates", "episodes", "updates/s", "wall-clock, h:mm", "evaluation"]
    return Table(head, [_cells(row) for row in rows])


def online(rows):
    """Of the rows with an online phase: the score before and after it, and the regret."""
    head = ["algorithm", "data set", "offline updates", "online updates", "env steps per seed"]
    head += ["score before", "score after", "best", "regret"]
    lines = []
    for row in rows:
        if row.switch is None:
            continue
        result = row.result
        before, regret = (readers.numbers(result.get(x, {})) for x in ("offline_score", "regret"))
        sizes = [result["num_updates"], result["online_updates"], result.get("env_steps")]
        cells = [row.label, row.dataset, *("" if x is None else f"{x:,}" for x in sizes)]
        cells += [spread(before), spread(row.scores), spread(row.best)]
        lines.append([*cells, spread(regret, digits=2)])
    return Table(head, lines)


def explained(rows):
    """What the columns of the table are."""
    return EXPLAINED.format(score=SCORES[rows[0].selection])


def _cells(row):
    result = row.result
    data = [row.level(key) for key in ("mean", "max")]
    seconds = [result.get("train_seconds"), result.get("eval_seconds")]
    speed, share = result.get("updates_per_second"), result.get("eval_share")
    return [
        row.label,
        row.dataset,
        *("" if np.isnan(x) else f"{x:.1f}" for x in data),
        spread(row.scores),
        spread(row.best),
        spread(readers.numbers(result.get("return", {}))),
        " ".join(result["score"]) + lost(row),
        f"{row.updates:,}",
        result["eval_episodes"],
        "" if speed is None else round(speed, 1),
        "" if None in seconds else clock(sum(seconds)),
        "" if share is None else f"{100 * share:.0f} %",
    ]


def by_family(rows):
    families = collections.defaultdict(list)
    for row in rows:
        families[row.family].append(row)
    return families


def by_method(rows):
    """label -> data set -> row, of one family."""
    methods = collections.defaultdict(dict)
    for row in rows:
        if row.dataset in methods[row.label]:
            raise ValueError(f"two rows are called {row.label} on {row.dataset}")
        methods[row.label][row.dataset] = row
    return methods


def why_no_mean(found, names):
    """Why a method has no mean over the data sets of its family; empty if it has one."""
    if len({row.scale for row in found.values()}) > 1 or next(iter(found.values())).scale == (
        "return"
    ):
        return "returns are on different scales"
    if missing := [name for name in names if name not in found]:
        return f"{len(names) - len(missing)} of {len(names)} data sets"
    for name, row in found.items():
        if np.isnan(row.scores).any():
            return f"a seed without a score on {name}"
    return ""


def name_choices(rows):
    """Add to a row's name the choices (fields with words as values) that are not the default."""
    for row in rows:
        try:
            default = importlib.import_module(f"algorithms.{row.algorithm}").Config
        except (ImportError, AttributeError):
            continue
        for known in dataclasses.fields(default):
            value = row.config.get(known.name)
            words = isinstance(known.default, str) or known.name in METHODS
            if known.name == "dataset" or not words:
                continue
            word = f"{known.name}={value}"
            if value not in (None, known.default) and word not in row.variant.split():
                row.variant = f"{word} {row.variant}".strip()


def settings(rows):
    """Config values of the runs that differ from their file's defaults, one line per field."""
    names, lines = list(dict.fromkeys(row.dataset for row in rows)), []
    for label, found in by_method(rows).items():
        try:
            algorithm = next(iter(found.values())).algorithm
            default = importlib.import_module(f"algorithms.{algorithm}").Config
        except (ImportError, AttributeError):
            continue
        for known in dataclasses.fields(default):
            here = {name: row.config.get(known.name, known.default) for name, row in found.items()}
            usual = all(
                value == known.default or plain(value) == plain(known.default)  # (8, 8) and [8, 8]
                for value in here.values()
            )
            if known.name in ("dataset", "seeds") or usual:
                continue
            cells = [plain(here[name]) if name in here else "" for name in names]
            lines.append([label, known.name, plain(known.default), *cells])
    return Table(["algorithm", "field", "default", *names], lines)


def plain(value):
    """A Config value as it is typed on a command line."""
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def usual_sizes(rows):
    """data set -> (updates, seeds, episodes) of most of its rows; in a tie the larger ones."""
    sizes = collections.defaultdict(collections.Counter)
    for row in rows:
        sizes[row.dataset][_size(row)] += 1
    return {name: max(x, key=lambda size: (x[size], size)) for name, x in sizes.items()}


def _size(row):
    return row.updates, len(row.scores), row.result["eval_episodes"]


def matrix(rows, best=False):
    """Methods by data sets, as papers print them, and the mean over the data sets.

    A score says in brackets where its updates, seeds or episodes differ from most of its column.
    """
    names, methods = list(dict.fromkeys(row.dataset for row in rows)), by_method(rows)
    usual = usual_sizes(rows)
    lines = []
    for label, found in methods.items():
        line = [label]
        for name in names:
            row = found.get(name)
            each = row and (row.best if best else row.scores)
            gone = row and len(row.result["diverged"])
            words, (updates, seeds, episodes) = [f"{gone} diverged"] if gone else [], usual[name]
            if row and row.updates != updates:
                words.append(f"{row.updates:,} updates")
            if row and len(row.scores) != seeds:
                words.append(f"{len(row.scores)} seed" + "s" * (len(row.scores) != 1))
            if row and row.result["eval_episodes"] != episodes:
                words.append(f"{row.result['eval_episodes']} episodes")
            extra = f" ({', '.join(words)})" if words else ""
            line.append("" if row is None else spread(each) + extra)
        if len(names) > 1:
            reason = why_no_mean(found, names)
            means = [row.scores.mean() for row in found.values()]
            line.append(f"none: {reason}" if reason else f"{np.mean(means):.1f}")
        lines.append(line)
    return Table(["algorithm", *names, *(["mean"] if len(names) > 1 else [])], lines)


def evaluations(row):
    """The score of every seed at every evaluation; of many seeds mean ± std."""
    updates = sorted({int(update) for curve in row.curves.values() for update in curve[0]})
    lines = []
    if len(row.curves) >= MANY:
        at = [dict(curve.T) for curve in row.curves.values()]
        found = [[scores[update] for scores in at if update in scores] for update in updates]
        line = [f"{len(at)} seeds", *(spread(np.array(scores)) for scores in found)]
        return Table(["", *(f"{update:,}" for update in updates)], [line])
    for seed, curve in row.curves.items():
        at = {int(update): f"{score:.1f}" for update, score in curve.T}
        lines.append([seed, *(at.get(update, "") for update in updates)])
    return Table(["seed", *(f"{update:,}" for update in updates)], lines)


# --- Statistics over data sets ------------------------------------------------------------------
@dataclass
class Summary:
    """Statistics of several methods over all data sets of a family."""

    scores: dict = field(default_factory=dict)  # label -> [R, T]
    words: list = field(default_factory=list)  # which methods are left out, and why
    iqm: dict = field(default_factory=dict)  # label -> point, low, high
    improvement: dict = field(default_factory=dict)  # (label, label) -> point, low, high
    profile: dict = field(default_factory=dict)  # label -> [L], [L], [L]
    levels: np.ndarray | None = None  # [L]


def estimate(statistic, *scores, draws=intervals.DRAWS):
    """Point, low, high; low and high are NaN for a single seed."""
    point = statistic(*scores)
    if min(map(len, scores)) < 2:
        return point, *(np.full(np.shape(point), np.nan) for _ in range(2))
    return point, *intervals.interval(statistic, *scores, draws=draws)


def summarise(rows):
    """Statistics of the methods with a score on every data set and equally many seeds on each."""
    names, summary = list(dict.fromkeys(row.dataset for row in rows)), Summary()
    if len(names) < 2:
        return summary
    for label, found in by_method(rows).items():
        reason = why_no_mean(found, names)
        counts = [len(found[name].scores) for name in names if name in found]
        if not reason and len({*counts}) > 1:
            reason = f"{joined(sorted(counts))} seeds"
        if reason:
            summary.words.append(f"{label} ({reason})")
        else:
            summary.scores[label] = np.stack([found[name].scores for name in names], axis=1)
    if not summary.scores:
        return summary
    every = np.concatenate([x.ravel() for x in summary.scores.values()])
    summary.levels = np.linspace(min(0, every.min()), every.max(), figures.LEVELS)
    for label, scores in summary.scores.items():
        summary.iqm[label] = estimate(intervals.iqm, scores)
        summary.profile[label] = estimate(
            lambda x: intervals.profile(x, summary.levels), scores, draws=2000
        )
    for x in summary.scores:
        for y in summary.scores:
            if (y, x) in summary.improvement:  # ties count half, so the two add up to one
                point, low, high = summary.improvement[y, x]
                summary.improvement[x, y] = 1 - point, 1 - high, 1 - low
            elif x != y:
                both = summary.scores[x], summary.scores[y]
                summary.improvement[x, y] = estimate(intervals.improvement, *both, draws=2000)
    return summary


def statistics(rows, summary):
    """Blocks that compare methods over the data sets of a family."""
    if not summary.scores:
        return []
    methods, lines = by_method(rows), []
    for label, scores in summary.scores.items():
        updates = sorted({row.updates for row in methods[label].values()})
        low, high = estimate(intervals.mean, scores)[1:]
        line = [label, within(*summary.iqm[label]), within(scores.mean(), low, high)]
        lines.append([*line, len(scores), scores.shape[1], joined(f"{x:,}" for x in updates)])
    blocks = [Table(["algorithm", "IQM", "mean", "seeds", "data sets", "updates"], lines)]
    if len(summary.scores) > 1:
        lines = [
            [x, *(within(*summary.improvement[x, y], 2) if x != y else "" for y in summary.scores)]
            for x in summary.scores
        ]
        blocks.append(Table(["row beats column", *summary.scores], lines))
    words = INTERVALS.strip()
    counts = {*map(len, summary.scores.values())}
    words += "\nA single seed has no interval." if 1 in counts else ""
    if few := [count for count in sorted(counts) if 1 < count < FEW]:
        words += f"\nWith {joined(few)} seeds {NARROW}."
    usual = usual_sizes(row for x in summary.scores for row in methods[x].values())
    odd = [x for x in summary.scores if any(_size(y) != usual[z] for z, y in methods[x].items())]
    if odd:
        what = "Compared although their updates, seeds or episodes differ from most"
        words += f"\n{what}: {joined(odd)}."
    if summary.words:
        words += f"\nNot compared here: {'; '.join(summary.words)}."
    return [*blocks, Text(words)]


# --- Published scores ---------------------------------------------------------------------------
def beside(rows, reference):
    """Blocks: our scores with the published ones of the same data set and protocol."""
    columns, lines, used, other = [], [], {}, collections.Counter()
    for row in rows:
        groups, words = published.beside(row, reference)
        other.update(f"{row.label}, {word}" for word in words)
        for group in groups:
            lines.append((row, group))
            for entry in group.rows:
                columns.append(entry["column"])
                used.setdefault(entry["column"], []).append(entry)
    columns, blocks = list(dict.fromkeys(columns)), []
    if lines:
        head = ["algorithm", "data set", "score is", "updates", "here", *columns]
        table = []
        for row, group in lines:
            at = {x["column"]: f"{x['mean']} ± {x['std']} ({x['seeds']})" for x in group.rows}
            ours = f"{spread(group.ours)} ({len(group.ours)})"
            cells = [row.label, row.dataset, group.selection, f"{row.updates:,}"]
            table.append([*cells, ours, *(at.get(column, "") for column in columns)])
        blocks.append(Table(head, table, PUBLISHED))
        blocks += [Text(MADE_HERE)] if any(published.made_here(row) for row, _ in lines) else []
    for column, entries in used.items():
        ddof = joined(x["ddof"] or "not stated" for x in entries)
        notes = joined(x["note"] for x in entries if x["note"] and len(entries) > 3)
        text = f"- {column}: {joined(x['source'] for x in entries)}; ddof {ddof}"
        blocks.append(Text(text + (f"; {notes}" if notes and len(notes) < 120 else "")))
    if other:
        each = [f"{word} ({count})" for word, count in other.items()]
        words = "Published under another protocol, so not shown (number of data sets in brackets)"
        blocks.append(Text(f"{words}: {'; '.join(each)}."))
    return blocks


def with_stand_ins(rows, reference):
    """Blocks: methods by data sets, with published scores where the data stand for D4RL's."""
    found = agreement.cells(rows, reference)
    if not found:
        return [matrix(rows)]
    return [agreement.beside(matrix(rows), found), Text(agreement.words(found))]


# --- Commands -----------------------------------------------------------------------------------
def command(row):
    """The command line of a row: the values that differ from today's defaults and suite file.

    A field that was added to the Config after the run has its default, as in `--config FILE`. If
    the flags do not give the row's config, the command names the run's own config file. If today's
    code does not accept that file either, a comment says why.
    """
    start = f"python algorithms/{row.algorithm}.py"
    values = {key: x for key, x in row.config.items() if key != "record"}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            module = importlib.import_module(f"algorithms.{row.algorithm}")
            values = config.resolved(module.Config(), config.Options()) | values
            # A name of its own: a run folder of the same config may be here.
            extra = ["--runs-dir", "/nonexistent"]
            flags = ["--dataset", values["dataset"]]
            have = config.resolved(*config.parse(module.Config, [*flags, *extra]))
            changed = {key: x for key, x in values.items() if have.get(key) != x}
            for key, value in changed.items():
                flags += [f"--{key.replace('_', '-')}"]
                flags += map(str, value if isinstance(value, list) else [value])
            if config.resolved(*config.parse(module.Config, [*flags, *extra])) == values:
                return f"{start} {shlex.join(flags)}"
            config.read_run(row.folder, module.Config)
        except (ImportError, AttributeError, SystemExit):
            known = (ROOT / "algorithms" / f"{row.algorithm}.py").exists()
            why = f"of another version of {row.algorithm}.py" if known else "not of algorithms/"
            return f"# {row.folder}/config.yaml: {why}"
    seeds = ["--seeds", *row.result["score"]] if row.others else []
    return f"{start} --config {shlex.join([str(row.folder / 'config.yaml'), *seeds])}"


def commands(rows):
    return Text("```\n" + "\n".join(dict.fromkeys(map(command, rows))) + "\n```")


def own_command(arguments):
    """The command that writes the page again."""
    if arguments.command:
        return arguments.command
    words = ["python", "benchmarks/report.py", *map(str, arguments.folders)]
    default = Arguments()
    for name in ("wandb", "score", "protocol", "output", "title", "note", "index", "reference"):
        if (value := getattr(arguments, name)) != getattr(default, name):
            words += [f"--{name}", str(value)]
    for name in ("where", "named_by"):
        if value := getattr(arguments, name):
            words += [f"--{name.replace('_', '-')}", *value]
    words += [
        f"--{name.replace('_', '-')}" for name in ("same_code", "html") if vars(arguments)[name]
    ]
    return shlex.join(words)


# --- Page ---------------------------------------------------------------------------------------
def blocks_of(rows, notes, arguments, draw):
    """The page: note, tables of every family, figures, commands, every evaluation, versions."""
    reference = published.load(arguments.reference)
    blocks = [Heading(arguments.title, 1)]
    blocks += [Text(arguments.note.read_text(encoding="utf-8"))] if arguments.note else []
    families, counts = by_family(rows), collections.Counter(row.label for row in rows)
    labels = [label for label, _ in counts.most_common()]  # the first get the plainest lines
    for family, group in families.items():
        summary = summarise(group)
        blocks += [Heading(family)] if len(families) > 1 else []
        blocks.append(table(group))
        if (phases := online(group)).rows:
            blocks += [Text(ONLINE), phases]
        if len({row.dataset for row in group}) > 1 and len(group) > 1:
            scale = joined(WORDS[row.scale] for row in group)
            which = "Last score" if arguments.score == "last" else f"Score, {arguments.score},"
            blocks += [Text(f"{which} by data set ({scale}):"), *with_stand_ins(group, reference)]
        blocks += statistics(group, summary)
        if len(summary.scores) > 1:
            unit = UNITS[group[0].scale]
            with figures.aggregates(family, summary, labels, unit) as figure:
                blocks.append(draw(figure, f"{family}: intervals, profiles, improvement"))
        blocks += beside(group, reference)
        if (chosen := settings(group)).rows:
            blocks.append(Folded("Settings that differ from the file's defaults", [chosen]))
    blocks += [Text(explained(rows)), Heading("Learning curves")] if len(families) > 1 else []
    with figures.curves(rows, labels) as figure:
        blocks.append(draw(figure, "learning curves", main=True))
    words = f"Line: mean over seeds. With {figures.BAND_SEEDS} or more seeds the band is a 95 % "
    words += f"bootstrap interval (too narrow with fewer than {FEW}). Thin lines are single seeds."
    if any(row.switch is not None for row in rows):
        words += " The vertical line is the switch: updates on its right are made beside an env."
    blocks.append(Text(words))
    blocks += [Text(explained(rows))] if len(families) == 1 else []
    blocks += problems(rows, notes)
    inner = [Text("The runs:"), commands(rows), Text("This page:")]
    inner.append(Text(f"```\n{own_command(arguments)}\n```"))
    blocks += [Heading("Commands"), *inner, Heading("Every evaluation")]
    for row in rows:
        if row.curves:
            title = f"{row.label} on {row.dataset}, score after updates"
            title += "" if row.switch is None else f" (beside an env from {row.switch:,} on)"
            blocks.append(Folded(title, [evaluations(row)]))
    return [*blocks, *environment(rows)]


def bandit_blocks(rows, notes, arguments, draw):
    """The page of --protocol bandit."""

    def picture(found):
        with figures.pulls(found) as figure:
            return draw(figure, "score after k episodes of a bandit", main=True)

    blocks = [Heading(arguments.title, 1)]
    blocks += [Text(arguments.note.read_text(encoding="utf-8"))] if arguments.note else []
    methods = [dataclasses.replace(row, variant="") for row in rows]
    name_choices(methods)  # other settings make no method
    found = bandit.blocks(by_family(methods), notes, picture)
    if not found:
        fail(
            "--protocol bandit: no run has an episodes.csv of its last policy on new start states; "
            "write it with python -m common.experiment RUN_FOLDER --evaluate 100 --starts new "
            "--keep-episodes"
        )
    blocks += [*found, *problems(rows, notes), Heading("Commands"), Text("The runs:")]
    blocks += [commands(rows), Text("This page:"), Text(f"```\n{own_command(arguments)}\n```")]
    return [*blocks, *environment(rows)]


def problems(rows, notes):
    """Blocks with what a reader must know before comparing rows."""
    notes = list(notes)
    old = [row for row in rows if not row.code]
    if old:
        notes.append(f"{len(old)} of {len(rows)} rows do not record the version of the code")
    mixed = [f"{row.label} on {row.dataset}" for row in rows if "+" in row.code]
    if mixed:
        notes.append(f"resumed with another version of the code: {joined(mixed)}")
    shared = {(row.result.get("code") or {}).get("common") for row in rows} - {None}
    if len(shared) > 1:
        notes.append(f"rows were made with different code in common/: {joined(sorted(shared))}")
    lines = "\n".join(f"- {note}" for note in notes)
    return [Heading("Before comparing rows"), Text(lines)] if notes else []


def outdated(rows):
    """Lines for the terminal only: which rows were made by other versions of the files."""
    found = collections.Counter()
    for row in rows:
        script = ROOT / "algorithms" / f"{row.algorithm}.py"
        found[row.algorithm] += script.exists() and row.code != provenance.code([script])
    return [
        f"{n} row{'s' * (n > 1)} made by another version of {name}.py"
        for name, n in found.items()
        if n
    ]


def environment(rows):
    """Blocks: hardware and versions."""
    blocks = [Heading("Hardware and versions")]
    results = [result for row in rows for result in row.results]
    hardware = joined(result["hardware"] for result in results if "hardware" in result)
    blocks += [Text(f"Hardware: {hardware}.")] if hardware else []
    code = joined(sorted(f"{row.algorithm} {row.code}" for row in rows if row.code))
    blocks += [Text(f"Code (digest of each file, recorded with the run): {code}.")] if code else []
    found = [result["versions"] for result in results if "versions" in result]
    versions = sorted({json.dumps(x, sort_keys=True) for x in found})
    for record in versions:
        each = joined(f"{name} {version}" for name, version in json.loads(record).items())
        blocks.append(Text(f"Versions: {each}"))
    if len(versions) > 1:
        words = "The runs were made with different versions, all of which are listed above."
        blocks.append(Text(words))
    return blocks


def index(rows, notes, arguments):
    """The part of an index page: scores by data set, published ones, a link to the full page."""
    reference, blocks = published.load(arguments.reference), []
    for family, group in by_family(rows).items():
        usual, scale = usual_sizes(group), joined(WORDS[row.scale] for row in group)
        size = sizes_in_words([(updates, seeds) for updates, seeds, _ in usual.values()])
        mixed = any(_size(row) != usual[row.dataset] for row in group)
        size += "" if arguments.score == "last" else f"; the score is {SCORES[arguments.score]}"
        size += ", unless a score says otherwise" if mixed else ""
        blocks.append(Text(f"**{family}**: {scale}, mean ± std over seeds; {size}."))
        blocks += [*with_stand_ins(group, reference), *beside(group, reference)]
    blocks += problems(rows, notes)[1:]
    page = arguments.output.with_suffix(".md")
    link = Path(os.path.relpath(page, arguments.index.parent)).as_posix()
    words = f"Commands, best scores, intervals, curves and every evaluation: [{page.name}]({link})."
    return markdown([*blocks, Text(words)])


def sizes_in_words(sizes):
    """(updates, seeds) of every column of a table, as text."""
    seeds_of = [f"{seeds} seed{'s' * (seeds > 1)}" for _, seeds in sizes]
    if len(set(sizes)) == 1:
        return f"{sizes[0][0]:,} updates, {seeds_of[0]}"
    if len(set(seeds_of)) == 1:
        return f"{', '.join(f'{x:,}' for x, _ in sizes)} updates by column, {seeds_of[0]}"
    each = [f"{x:,} updates of {y}" for (x, _), y in zip(sizes, seeds_of, strict=True)]
    return f"{', '.join(each)}, by column"


def around(path, name):
    """The text of a file before and after its part of this name, marks included.

    Raises:
        SystemExit: code 2 after one line if the file does not have both marks once, in order.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    marks = f"<!-- {name} -->", f"<!-- /{name} -->"
    parts = re.split("|".join(map(re.escape, marks)), text)
    if len(parts) != 3 or text.index(marks[0]) > text.index(marks[-1]):
        fail(f"{path}: must contain {marks[0]} and {marks[1]}, once each and in this order")
    return f"{parts[0]}{marks[0]}\n", f"\n{marks[1]}{parts[2]}"


def main(arguments):
    if bool(arguments.folders) == bool(arguments.wandb):
        fail("give either run folders or --wandb entity/project")
    for path in (arguments.note, arguments.reference):
        if path is not None and not path.is_file():
            fail(f"{path}: no such file")
    if arguments.protocol == "bandit" and (arguments.wandb or arguments.index):
        fail("--protocol bandit: takes run folders, and has no part of an index page")
    if arguments.index:
        before, after = around(arguments.index, arguments.output.name)
    chosen = (arguments.where, arguments.named_by, arguments.same_code)
    if arguments.wandb:
        rows, notes = readers.from_wandb(arguments.wandb, None, *chosen)
    else:
        rows, notes = readers.find(arguments.folders, *chosen)
    rows = readers.select(rows, arguments.score, notes)
    if not arguments.named_by:
        name_choices(rows)
    stem, count = arguments.output, 0
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = [f"{stem}.md"]

    def draw(figure, alt, main=False):
        nonlocal count
        count += not main
        path = stem.with_name(f"{stem.name}{'' if main else f'_{count}'}.png")
        figures.png(figure, path)
        written.append(str(path))
        return Figure(path.name, alt, figures.svg(figure) if arguments.html else "")

    make = bandit_blocks if arguments.protocol == "bandit" else blocks_of
    blocks = make(rows, notes, arguments, draw)
    stem.with_name(f"{stem.name}.md").write_text(markdown(blocks), encoding="utf-8")
    if arguments.html:
        stem.with_name(f"{stem.name}.html").write_text(
            page(arguments.title, blocks), encoding="utf-8"
        )
        written.append(f"{stem}.html")
    if arguments.index:
        text = before + index(rows, notes, arguments).strip() + after
        arguments.index.write_text(text, encoding="utf-8")
        written.append(str(arguments.index))
    said = [*notes, *outdated(rows)]
    print(*said, sep="\n", end="\n\n" if said else "")
    print(markdown([table(rows)]))
    print(f"written: {' '.join(written)}")


def start():
    description = __doc__.split("\n\n")[0]
    main(wrong_words.parse(Arguments, sys.argv[1:], "report.py", description=description))


if __name__ == "__main__":
    command_line.run(start)

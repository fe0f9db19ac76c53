# SPDX-License-Identifier: Apache-2.0
"""Compare scores on the gym-mujoco sets made here with those published on D4RL's sets.

`local/mujoco/hopper-medium-v0` was made in the way of D4RL's hopper-medium-v2: by SAC in the same
env, with a policy of about the same score. It is not the same data, so a score on it cannot equal a
published one. What should agree is which method is better on which set, and roughly by how much.

A cell is one method on one set. Its published score is that of the first source of
benchmarks/reference/scores.csv with the cell's algorithm, `config` and data set, whatever the
source's updates and episodes are. Two figures summarise the cells that have one:

- Spearman's rank correlation between our scores and the published ones;
- the mean absolute difference, in points.
"""

import re
from typing import NamedTuple

import numpy as np
from scipy import stats

MADE_HERE = re.compile(r"local/mujoco/(.+)-v0")
FAR = 20.0  # points; a cell that is further away is named


class Cell(NamedTuple):
    """One method on one data set."""

    label: str
    dataset: str  # ours
    score: float  # mean over seeds
    published: float
    source: str  # column of the reference file


def entry_of(row, reference):
    """The published score on the D4RL set that a row's data set stands for; None if none is."""
    made_here = MADE_HERE.fullmatch(row.config["dataset"])
    if made_here is None or row.switch is not None or row.config.get("env"):
        return None
    for entry in reference:
        wanted = [x.split("=") for x in entry["config"].split(";") if x]
        same = (entry["algorithm"], entry["dataset"]) == (row.algorithm, f"{made_here[1]}-v2")
        if same and all(str(row.config.get(key)) == value for key, value in wanted):
            return entry
    return None


def cells(rows, reference):
    """The cells that have a published score and no seed without a score of ours."""
    found = []
    for row in rows:
        entry = entry_of(row, reference)
        if entry is not None and not np.isnan(row.scores).any():
            score, theirs = float(row.scores.mean()), float(entry["mean"])
            found.append(Cell(row.label, row.dataset, score, theirs, entry["column"]))
    return found


def figures_of(found):
    """(Spearman's rank correlation, mean absolute difference) over cells.

    The correlation is NaN for fewer than three cells, which say nothing about an order.
    """
    ours, theirs = (np.array([getattr(x, name) for x in found]) for name in ("score", "published"))
    correlation = stats.spearmanr(ours, theirs).statistic if len(found) > 2 else np.nan
    return float(correlation), float(np.abs(ours - theirs).mean())


def words(found):
    """The two figures, and the cells that are far away, as Markdown."""
    correlation, difference = figures_of(found)
    rank = f"Spearman's rank correlation **{correlation:.2f}**, " if len(found) > 2 else ""
    sources = ", ".join(dict.fromkeys(x.source for x in found))
    lines = [
        "Below each score, in small type: the score published on D4RL's set of the same name "
        f"(v2), by {sources}. D4RL's data are other data, so the two should be of the same order "
        "and not equal.",
        "",
        f"Over the {len(found)} cells with a published score: {rank}mean absolute difference "
        f"**{difference:.1f} points**.",
    ]
    far = [x for x in found if abs(x.score - x.published) > FAR]
    if far:
        each = [f"{x.label} on {x.dataset} ({x.score:.0f} against {x.published:.0f})" for x in far]
        lines += ["", f"More than {FAR:.0f} points apart: {'; '.join(each)}."]
    return "\n".join(lines)


def beside(table, found):
    """A table of scores (methods by data sets) with the published score in each of its cells.

    Args:
        table: rows start with a method's label; the head names data sets.
        found: list of Cell.
    """
    theirs = {(x.label, x.dataset): x.published for x in found}
    for line in table.rows:
        for i, name in enumerate(table.head):
            if (line[0], name) in theirs:
                line[i] += f"<br><sub>{theirs[line[0], name]:.1f}</sub>"
    return table

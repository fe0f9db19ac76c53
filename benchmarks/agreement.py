# SPDX-License-Identifier: Apache-2.0
"""Compare scores on the gym-mujoco sets made here with those published on D4RL's sets.

`local/mujoco/hopper-medium-v0` was made in the way of D4RL's hopper-medium-v2: by SAC in the same
env, with a policy of about the same score. It is not the same data, so a score on it cannot equal a
published one. What should agree is which method is better on which set, and roughly by how much.

A cell is one method on one set. Its published score is that of the first source of
benchmarks/reference/scores.csv with the cell's algorithm, `config` and data set, whatever the
source's updates and episodes are. Three figures summarise the cells that have one:

- Spearman's rank correlation between our scores and the published ones over all cells. Some sets
  give every method more than others, which alone gives a correlation. So the same number stands
  beside it for published scores that are shuffled among the methods of each set;
- the same within each set, averaged over the sets with at least three cells: it says which method
  is better;
- the mean absolute difference, in points.
"""

import re
from typing import NamedTuple

import numpy as np
from scipy import stats

import published

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
    changed = row.config.get("env") or row.config.get("env_steps")
    if made_here is None or row.switch is not None or changed:
        return None
    name = f"{made_here[1]}-v2"
    return next((entry for entry in reference if published.is_of(entry, row, name)), None)


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
    """(rank correlation over all cells, its mean within a set, mean absolute difference).

    A correlation of fewer than three cells says nothing about an order; it is NaN.
    """
    within = []
    for dataset in dict.fromkeys(x.dataset for x in found):
        within.append(rank_correlation([x for x in found if x.dataset == dataset]))
    known = [x for x in within if not np.isnan(x)]
    mean_within = float(np.mean(known)) if known else np.nan
    difference = float(np.mean([abs(x.score - x.published) for x in found]))
    return rank_correlation(found), mean_within, difference


def shuffled(found, draws=1000):
    """The rank correlation over all cells if published scores are shuffled within each set."""
    rng, found = np.random.default_rng(0), sorted(found, key=lambda x: x.dataset)
    sets = [
        [x for x in found if x.dataset == name] for name in dict.fromkeys(x.dataset for x in found)
    ]
    drawn = []
    for _ in range(draws):
        order = [cells[i] for cells in sets for i in rng.permutation(len(cells))]
        mixed = [x._replace(published=y.published) for x, y in zip(found, order, strict=True)]
        drawn.append(rank_correlation(mixed))
    return float(np.mean(drawn))


def rank_correlation(found):
    """Spearman's, between our scores and the published ones."""
    if len(found) < 3:
        return np.nan
    ours, theirs = [x.score for x in found], [x.published for x in found]
    return float(stats.spearmanr(ours, theirs).statistic)


def words(found):
    """The three figures, and the cells that are far away, as Markdown."""
    correlation, within, difference = figures_of(found)
    rank = ""
    if not np.isnan(correlation):
        rank += f"Spearman's rank correlation **{correlation:.2f}** (with the published scores "
        rank += f"shuffled within each data set {shuffled(found):.2f}), "
    if not np.isnan(within):
        rank += f"the mean of the correlations within each data set **{within:.2f}**, "
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

# SPDX-License-Identifier: Apache-2.0
"""Find published scores to show beside ours, in benchmarks/reference/scores.csv.

The file has one row per number. Its columns: `algorithm` is our file, `config` the values that its
run must have, `column` the heading in a report. `updates`, `episodes` and `selection` are the
protocol; selection is "last", or the mean of the last 3 evaluations and their distance. Episodes
are those of the source's own configurations (d3rlpy does not state them). `ddof` is that of the
std, empty if the source does not say. `source` is where the number is printed.

The file has only rows whose source states seeds, updates and selection. It has no numbers that a
source quotes from elsewhere and none that were selected by looking at scores. JAX-CORL's AWAC is
left out, because its code broadcasts the weights into plain cloning. QC's OGBench scores are left
out, because its repository does not state the seeds, and GFP's, of which only means over tasks are
at hand.

A number is shown only if the protocol is the same: the data set has D4RL's or OGBench's own name
(files, recipes and Minari's data are different data, whatever their name), it is evaluated in the
counterpart env of docs/data.md, the updates and (if stated) the episodes are equal, and our score
is selected in the same way. There is one exception: a `local/ogbench` set with the official number
of episodes (`--official`) counts as OGBench's, because it is made as OGBench's scripts make theirs.
The run's record has the number of episodes; a run without it has no published score beside it.
Hyperparameters beyond `config` are the source's own. agreement.py compares scores on data made in
the way of D4RL's with these numbers, and says so.
"""

import csv
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import recipes
from common.datasets import names, reference_scores

MADE_HERE = "local/ogbench/"
FILE = Path(__file__).parent / "reference" / "scores.csv"
DEFAULT_TASK = (  # default task by the beginning of an OGBench env's name; papers number tasks
    ("antsoccer", 4),
    ("puzzle-4x[56]", 2),
    ("puzzle", 4),
    ("cube|scene", 2),
    ("pointmaze|antmaze|humanoidmaze", 1),
)


class Beside(NamedTuple):
    """Our scores and published ones under one protocol."""

    selection: str
    ours: np.ndarray  # [S] our scores under that selection
    rows: list  # rows of the file, as dicts


def load(path=FILE):
    with Path(path).open() as file:
        return list(csv.DictReader(file))


def name_of(run):
    """The name that papers use for a run's data set, None if they do not know it."""
    name = run.config["dataset"]
    if run.config.get("env") or run.config.get("env_steps"):
        return None
    if made_here(run):  # the size tells which data it is, also beside a smaller set of that name
        name = official_name(name.removeprefix(MADE_HERE), run.config.get("record", {}))
    elif run.copy:
        return None
    if name in reference_scores.table():
        return name
    match = names.OGBENCH_ID.fullmatch(name)
    if match is None:
        return None
    task = match[2] or next((f"-task{t}" for k, t in DEFAULT_TASK if re.match(k, match[1])), "")
    return f"{match[1]}-singletask{task}-v0"


def made_here(run):
    """Whether a run's data were made by a recipe for one of OGBench's data sets."""
    return run.config["dataset"].startswith(MADE_HERE)


def official_name(name, record):
    """OGBench's id of a data set made here, "" if it has not as many episodes as OGBench's."""
    match = names.OGBENCH_ID.fullmatch(name)
    data = f"{match[1]}-v0" if match else name
    recipe = recipes.OGBENCH_RECIPES.get(data)
    if recipe is None or record.get("episodes") != recipe.official:
        return ""
    return name if match else f"{name.removesuffix('-v0')}-singletask-v0"


def is_of(row, run, name):
    """Whether a row of the file has a run's method and settings, and the data set `name`."""
    wanted = [x.split("=") for x in row["config"].split(";") if x]
    same = (row["algorithm"], row["dataset"]) == (run.algorithm, name)
    return same and all(str(run.config.get(key)) == value for key, value in wanted)


def beside(run, table):
    """(list of Beside, list of notes on rows that were published under another protocol).

    The table has scores of offline training only, so runs with an online phase have none.
    """
    name, groups, words = name_of(run), {}, []
    if run.switch is not None:
        return [], []
    for row in table:
        if not is_of(row, run, name):
            continue
        updates, episodes = int(row["updates"]), row["episodes"]
        ours = select(run, row["selection"])
        if updates != run.result["num_updates"]:
            words.append(f"{row['column']}: {updates:,} updates")
        elif episodes and int(episodes) != run.result["eval_episodes"]:
            words.append(f"{row['column']}: {episodes} episodes")
        elif ours is None:
            words.append(f"{row['column']}: {row['selection']}")
        else:
            groups.setdefault(row["selection"], Beside(row["selection"], ours, [])).rows.append(row)
    return [*groups.values()], words


def select(run, selection):
    """[S] our score, taken as a source takes its own; None where evaluations do not allow it."""
    if selection == "last":
        return run.last
    count, apart = map(
        int, re.fullmatch(r"mean of the last (\d+), every (\d+)", selection).groups()
    )
    wanted = [run.result["num_updates"] - apart * i for i in range(count)]
    means = []
    for seed in run.result["score"]:
        updates, scores = run.curves.get(int(seed), np.zeros((2, 0)))
        at = dict(zip(updates, scores, strict=True))
        if int(seed) in map(int, run.result["diverged"]):
            means.append(np.nan)
        elif sorted(at)[-count:] != sorted(wanted):
            return None
        else:
            means.append(np.mean([at[update] for update in wanted]))
    return np.array(means)

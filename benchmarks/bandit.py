# SPDX-License-Identifier: Apache-2.0
"""Unifloral's evaluation: how well a bandit does that picks among the policies of a method.

A method with hyperparameters is a set of policies, one per setting and seed. A method is a file
with its choices, as report.name_choices names them: BEAR is not BRAC. Whoever deploys it can try
them: play an episode with one policy, see its score, choose the next one to play, and in the
end keep the policy with the best mean so far. The score after k episodes is the true mean of the
policy that would be kept then. It rewards methods that are good without tuning, and it says what
tuning costs, which one number of the best setting hides.

Jackson et al., "A Clean Slate for Offline Reinforcement Learning" (2025), evaluation.py of
github.com/EmptyJackson/unifloral. Every trial draws some of the policies without replacement. The
next one to play has the highest UCB: its mean + sqrt(alpha log(k) / plays), with scores from 0 to
100. Ties, such as policies that were not played yet, are broken at random. A play draws one of the
policy's recorded episodes. One difference: here a policy that was never played cannot be the one to
keep; Unifloral's code gives it a mean of 0, which matters only where scores are below 0.
"""

import csv
from typing import NamedTuple

import numpy as np

from pages import Heading, Table, Text

SUBSET, TRIALS, PULLS, ALPHA = 8, 1000, 200, 2.0  # of Unifloral's README
SHOWN = (1, 2, 4, 8, 16, 32, 64, 128, 200)  # numbers of episodes in the table
HOW = """
**How to read it.** A method is the set of its policies: one per setting and seed. A choice between
words, such as `variant=p` of `brac`, makes a method of its own. A trial takes {subset} of the
policies (or all, if there are fewer), a UCB bandit (alpha {alpha:g}) plays episodes of its
choice, and the score after k episodes is the mean score of the policy with the best mean so far.
Mean over {trials:,} trials; ± half of a 95 % interval of that mean, which says nothing about other
seeds or settings than those recorded. The last column is the mean of the policy that is best over
all of its episodes: what reporting the best setting would say.
"""


class Policies(NamedTuple):
    """The recorded episodes of the policies of one method."""

    scores: np.ndarray  # [P, E], padded with NaN
    episodes: np.ndarray  # [P] how many of them each has

    @property
    def means(self):
        """[P] the true mean of every policy."""
        return np.nanmean(self.scores, axis=1)


def policies(scores):
    """`Policies` of a list of [E] arrays, whose lengths may differ."""
    episodes = np.array([len(x) for x in scores])
    padded = np.full((len(scores), max(episodes)), np.nan)
    for row, x in zip(padded, scores, strict=True):
        row[: len(x)] = x
    return Policies(padded, episodes)


# --- Bandit -------------------------------------------------------------------------------------
def upper_bounds(plays, totals, pull, alpha=ALPHA):
    """[..., K] UCB of every arm before pull number `pull`, the first is 1."""
    mean = totals / np.maximum(plays, 1)
    return mean + np.sqrt(alpha * np.log(pull) / (plays + 1e-9))


def best_arm(plays, totals):
    """[...] the arm with the best mean of those that were played."""
    mean = np.where(plays > 0, totals / np.maximum(plays, 1), -np.inf)
    return mean.argmax(axis=-1)


def run(arms, subset=SUBSET, trials=TRIALS, pulls=PULLS, alpha=ALPHA, seed=0):
    """[trials, pulls] the true mean of the policy that is kept after every pull."""
    generator = np.random.default_rng(seed)
    count, trial = len(arms.scores), np.arange(trials)
    subset = min(subset, count)
    chosen = generator.permuted(np.tile(np.arange(count), (trials, 1)), axis=1)[:, :subset]
    plays, totals = np.zeros((trials, subset), int), np.zeros((trials, subset))
    kept = np.empty((trials, pulls))
    for pull in range(1, pulls + 1):
        bounds = upper_bounds(plays, totals, pull, alpha)
        ties = bounds == bounds.max(axis=1, keepdims=True)
        arm = np.where(ties, generator.random(ties.shape), -1.0).argmax(axis=1)
        policy = chosen[trial, arm]
        episode = generator.integers(arms.episodes[policy])
        plays[trial, arm] += 1
        totals[trial, arm] += arms.scores[policy, episode]
        kept[:, pull - 1] = arms.means[chosen[trial, best_arm(plays, totals)]]
    return kept


def summary(kept):
    """(mean over trials, half of its 95 % interval), [pulls] each."""
    return kept.mean(axis=0), 1.96 * kept.std(axis=0) / np.sqrt(len(kept))


# --- Report -------------------------------------------------------------------------------------
def episodes_of(folder, last):
    """(seed -> [E] scores of the last policy in a run folder, why there are none).

    Args:
        last: the run's last update. Only episodes of the policy at that update are taken, on start
            states that no evaluation during training used.
    """
    path, found = folder / "episodes.csv", {}
    if not path.is_file():
        return {}, "has no episodes.csv"
    with path.open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    if why := unusable(lines, last):
        return {}, why
    for line in lines:
        found.setdefault(int(line["seed"]), []).append(float(line["score"]))
    return {seed: np.array(scores) for seed, scores in found.items()}, ""


def unusable(lines, last):
    """Why these lines of episodes.csv are not of the last policy on new starts; "" if they are."""
    if not lines or not {"update", "which", "starts"} <= lines[0].keys():
        return "has an episodes.csv that does not say of which policy its episodes are"
    for line in lines:
        if line["which"] == "best":
            return "has episodes of the best policy, not of the last one"
        if line["update"] != str(last):
            return f"has episodes of update {line['update']}, not of the last one, {last}"
        if line["starts"] != "new":
            return "has episodes on the start states of training, not on new ones"
    return ""


def by_method(rows, notes):
    """label -> [E] scores of each of its policies, of rows of one data set."""
    methods = {}
    for row in rows:
        for folder in [row.folder, *row.others]:
            found, why = episodes_of(folder, row.updates)
            if why:
                notes.append(f"left out: {folder} {why}")
            for seed, scores in found.items():
                if str(seed) in row.result["diverged"]:
                    notes.append(f"left out: {folder}, seed {seed}: it diverged")
                elif not np.isfinite(scores).all():
                    notes.append(f"left out: {folder}, seed {seed}: not all scores are finite")
                else:
                    methods.setdefault(row.label, []).append(scores)
    return methods


def blocks(families, notes, draw):
    """Blocks of the page: a table and a figure for every data set of every family.

    Args:
        families: family -> rows of readers.find. Rows with one label are settings of one method.
        notes: what is left out, and why, is appended.
        draw: (curves by data set) -> the block of a figure.
    """
    found, curves = [], {}
    for family, rows in families.items():
        for name in dict.fromkeys(row.dataset for row in rows):
            methods = by_method([row for row in rows if row.dataset == name], notes)
            if not methods:
                continue
            curves[name], lines = {}, []
            for method, scores in sorted(methods.items()):
                arms = policies(scores)
                mean, half = curves[name][method] = summary(run(arms))
                cells = [f"{mean[k - 1]:.1f} ± {half[k - 1]:.1f}" for k in SHOWN]
                played = ", ".join(map(str, sorted({*arms.episodes.tolist()})))
                lines.append([method, len(scores), played, *cells, f"{arms.means.max():.1f}"])
            head = ["method", "policies", "episodes of each", *(f"after {k}" for k in SHOWN)]
            found += [Heading(f"{name} ({family})"), Table([*head, "best policy"], lines)]
    if not found:
        return []
    words = HOW.format(subset=SUBSET, alpha=ALPHA, trials=TRIALS)
    return [*found, draw(curves), Text(words)]

# SPDX-License-Identifier: Apache-2.0
"""Run folders -> a table and learning curves.

    python benchmarks/report.py runs/rebrac --output benchmarks/results/rebrac_v4

writes rebrac_v4.md and rebrac_v4.png. Every folder below the given ones that holds a result.json
is a row; one without (unfinished, half-written) is named and left out. The score is the last
policy's: mean over the evaluation's episodes, then mean ± std (ddof 0) over seeds. The best over
training stands beside it: it was selected on the evaluation itself and is not a score.
"""

import collections
import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
import yaml

from common import datasets, fail

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # Okabe and Ito
COLOURS += ("#e69f00", "#56b4e9", "#000000", "#f0e442")


@dataclass
class Arguments:
    """Where to read and to write."""

    folders: tyro.conf.Positional[tuple[Path, ...]]  # run folders, or folders above them
    output: Path = Path("benchmarks/results/table")  # stem of the .md and .png to write
    title: str = "Results"
    note: Path | None = None  # markdown put below the title: where data come from, commands


@dataclass
class Result:
    """One finished run folder."""

    folder: Path
    config: dict
    result: dict
    curves: dict  # seed -> ([T] updates, [T] scores) at evaluation borders
    variant: str = ""  # where two runs are of one algorithm and data set: what sets this one apart

    @property
    def label(self):
        return f"{self.result['algorithm']} {self.variant}".strip()

    @property
    def dataset(self):
        return datasets.slug(self.config["dataset"])


def read(folder):
    """The run in a folder, or None with a printed line where it is not finished or not whole."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        result = json.loads((folder / "result.json").read_text())
        with (folder / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["score"]]
        curves = collections.defaultdict(list)
        for row in rows:
            curves[int(row["seed"])].append((int(row["update"]), float(row["score"])))
        curves = {seed: np.array(points).T for seed, points in curves.items()}
        return Result(folder, config, result, curves)
    except FileNotFoundError as error:
        print(f"left out: {folder} has no {Path(error.filename).name}, so it is not finished")
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        print(f"left out: {folder} is damaged ({str(error).splitlines()[0]})")
    return None


def find(folders):
    """All finished runs below the folders, in order of algorithm and data set."""
    found = sorted({path.parent for folder in folders for path in folder.rglob("config.yaml")})
    runs = [run for run in map(read, found) if run is not None]
    if not runs:
        fail(f"{' '.join(map(str, folders))}: no finished run (a folder with result.json) in there")
    groups = collections.defaultdict(list)
    for run in runs:
        groups[run.result["algorithm"], run.dataset].append(run)
    for group in groups.values():
        common = [json.dumps(run.config, sort_keys=True) for run in group]
        for run in group if len(set(common)) > 1 else ():
            run.variant = " ".join(
                f"{key}={value}"
                for key, value in run.config.items()
                if key not in ("record", "seeds")
                and any(other.config.get(key) != value for other in group)
            )
    return runs


def table(runs):
    """Markdown: one row per run."""
    head = "algorithm | data set | data mean | data best | score | best | return | seeds | updates"
    head += " | episodes | updates/s | evaluation"
    lines = [f"| {head} |", "|" + " --- |" * (head.count("|") + 1)]
    for run in runs:
        low, high = run.config["record"]["reference"]
        data = [run.config["record"]["data_return"][key] for key in ("mean", "max")]
        if low is not None:
            data = [100 * (x - low) / (high - low) for x in data]
        score = numbers(run.result["score"])
        cells = [
            run.label,
            run.dataset,
            *(f"{x:.1f}" for x in data),
            spread(score),
            spread(numbers(run.result["best_score"])),
            spread(numbers(run.result.get("return", {}))),
            " ".join(run.result["score"]) + lost(run),
            f"{run.result['num_updates']:,}",
            run.result["eval_episodes"],
            run.result["updates_per_second"],
            f"{100 * run.result['eval_share']:.0f} %",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def evaluations(runs):
    """Markdown: the score of every seed at every evaluation."""
    lines = []
    for run in runs:
        updates = sorted({int(update) for curve in run.curves.values() for update in curve[0]})
        if not updates:
            continue
        lines += ["", f"{run.label} on {run.dataset}, score after updates:", ""]
        lines += ["| seed | " + " | ".join(f"{update:,}" for update in updates) + " |"]
        lines += ["| --- " * (len(updates) + 1) + "|"]
        for seed, curve in run.curves.items():
            at = {int(update): f"{score:.1f}" for update, score in curve.T}
            lines.append(
                f"| {seed} | " + " | ".join(at.get(update, "") for update in updates) + " |"
            )
    return lines


def numbers(each):
    return np.array([np.nan if x is None else x for x in each.values()])


def lost(run):
    """Marks seeds that diverged: the means are over the others only."""
    gone = " ".join(run.result["diverged"])
    return f" (diverged, not in the means: {gone})" if gone else ""


def spread(x):
    """Mean ± std (ddof 0) over the seeds that have the number; empty where none has."""
    x = x[~np.isnan(x)]
    if not len(x):
        return ""
    return f"{x.mean():.1f} ± {x.std():.1f}" if len(x) > 1 else f"{x.mean():.1f}"


def curves(runs, path):
    """One panel per data set: a thin line per seed, a thick one for the mean; data as dashes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(run.dataset for run in runs))
    labels = list(dict.fromkeys(run.label for run in runs))
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    size = (4.2 * columns, 3.2 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, names, strict=False):
        for run in (run for run in runs if run.dataset == name):
            colour = COLOURS[labels.index(run.label) % len(COLOURS)]
            for updates, scores in run.curves.values():
                axis.plot(updates, scores, color=colour, alpha=0.35, linewidth=1)
            points = collections.defaultdict(list)  # a seed that diverged has fewer of them
            for curve in run.curves.values():
                for update, score in curve.T:
                    points[update].append(score)
            mean = [np.mean(scores) for scores in points.values()]
            axis.plot(list(points), mean, color=colour, linewidth=2, label=run.label)
            low, high = run.config["record"]["reference"]
            for key, style in (("mean", "--"), ("max", ":")):
                level = run.config["record"]["data_return"][key]
                level = level if low is None else 100 * (level - low) / (high - low)
                axis.axhline(level, color="0.4", linestyle=style, linewidth=1, label=f"data {key}")
        axis.set(title=name, xlabel="updates", ylabel="score" if low is not None else "return")
        axis.grid(alpha=0.25)
        handles = dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
        axis.legend(handles.values(), handles.keys(), fontsize=8, loc="lower right")
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def page(runs, arguments):
    """The markdown page around the table: note, versions and hardware, what was left out."""
    versions = {json.dumps(run.result["versions"], sort_keys=True) for run in runs}
    lines = [f"# {arguments.title}", ""]
    if arguments.note:
        lines += [arguments.note.read_text().strip(), ""]
    lines += [table(runs), "", f"![learning curves]({arguments.output.name}.png)", ""]
    lines.append("Score: last policy, normalised (0 to 100 by the reference pair), mean ± std over")
    lines.append(
        "seeds (ddof 0). Best: highest evaluation during training, selected after the fact."
    )
    lines.append("Data mean and best: returns of the recorded episodes on the same scale.")
    lines += evaluations(runs)
    for hardware in dict.fromkeys(run.result["hardware"] for run in runs):
        lines += ["", f"Hardware: {hardware}."]
    for record in sorted(versions):
        lines += ["", "Versions: " + ", ".join(f"{k} {v}" for k, v in json.loads(record).items())]
    if len(versions) > 1:
        lines += ["", "The runs above were made with different versions, listed one after another."]
    return "\n".join(lines) + "\n"


def main(arguments):
    runs = find(arguments.folders)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    curves(runs, arguments.output.with_suffix(".png"))
    arguments.output.with_suffix(".md").write_text(page(runs, arguments))
    print(table(runs))
    print(f"written: {arguments.output}.md and {arguments.output}.png")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__.split("\n\n")[0]))

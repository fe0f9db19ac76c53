# SPDX-License-Identifier: Apache-2.0
"""A look at a run folder: what it is, and its learning curve."""

import csv
import importlib
import importlib.util
import sys
from pathlib import Path

import numpy as np

from common import fail
from common.experiment import best, growth, yaml_files
from common.experiment.records import SCORES, read_result

ALGORITHMS = Path(__file__).resolve().parents[2] / "algorithms"


def find_module(folder, file=None):
    """The algorithm's file of a run folder, imported.

    Without `file` it is the file that the run was started from, or, on another machine, the one of
    that name in `algorithms/`.
    """
    record = yaml_files.of_run(folder)["record"]
    name = record.get("algorithm") or Path(folder).resolve().parts[-3]
    places = [record.get("algorithm_file"), f"{name}.py", ALGORITHMS / f"{name}.py"]
    places = [file] if file is not None else [place for place in places if place is not None]
    found = next((Path(place) for place in places if Path(place).is_file()), None)
    if found is None:
        what = f"--file {file}: no such file" if file else f"no {name}.py was found; give --file"
        fail(f"{folder}: {what}")
    if found.resolve().parent == ALGORITHMS:
        return importlib.import_module(f"algorithms.{found.stem}")
    spec = importlib.util.spec_from_file_location(found.stem, found)
    if spec is None:
        fail(f"{folder}: --file {found}: no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[found.stem] = module
    spec.loader.exec_module(module)
    return module


def describe(folder) -> str:
    """What a run is and how far it has come, in a dozen lines."""
    folder, values = Path(folder), yaml_files.of_run(folder)
    record, result = values["record"], read_result(folder)
    reached = growth.reached(folder)
    state = "finished" if result else "not finished"
    checkpoints = sorted(
        int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit()
    )
    updates = values.get("num_updates", 0) + values.get("online_updates", 0)
    kept = " and best/" if (folder / best.FOLDER).is_dir() else ""
    lines = [
        ("algorithm", record.get("algorithm")),
        ("data set", f"{values.get('dataset')} ({record.get('digest')})"),
        ("evaluated in", record.get("env") or "nothing: no env is known"),
        ("seeds", " ".join(map(str, values.get("seeds", [])))),
        ("updates", f"{reached:,} of {updates:,}, {state}"),
        ("checkpoints", f"{', '.join(map(str, checkpoints)) or 'none'}{kept}"),
    ]
    if origin := record.get("started_from"):
        lines.append(("started from", f"{origin['folder']} at update {origin['update']:,}"))
    for stage in record.get("history", []):
        before = ", ".join(f"{key} {x}" for key, x in stage.items() if key != "until_update")
        lines.append(("before", f"up to update {stage['until_update']:,}: {before}"))
    if result:
        lines += [
            ("score", f"{_spread(result['score'])}, {result['eval_episodes']} episodes per seed"),
            ("best score", f"{_spread(result['best_score'])}, chosen by the same evaluations"),
            ("speed", f"{result['updates_per_second']:,} updates/s, summed over seeds"),
            ("hardware", result["hardware"]),
        ]
    return "\n".join(f"  {name:16} {text}" for name, text in lines)


def _spread(by_seed):
    """Mean and std over the seeds that have a number."""
    numbers = [x for x in by_seed.values() if x is not None]
    if not numbers:
        return "none"
    spread = f" ± {np.std(numbers):.1f}" if len(numbers) > 1 else ""
    return f"{np.mean(numbers):.1f}{spread}"


def plot(folder, file: str) -> None:
    """Draw the scores of all seeds, or the losses where the run has no scores."""
    from matplotlib.figure import Figure  # not pyplot, which would change a notebook's pictures

    metrics = Path(folder) / "metrics.csv"
    if not metrics.exists():
        fail(f"{folder}: no metrics.csv in it yet")
    with metrics.open(newline="", encoding="utf-8") as text:
        rows = list(csv.DictReader(text))
    if not rows:
        fail(f"{folder}: no row in its metrics.csv yet")
    names = ["score"]
    if not any(row["score"] for row in rows):
        names = [name for name in rows[0] if name not in ("update", "seed", *SCORES)]
    figure = Figure(figsize=(7, 1 + 2.5 * len(names)))
    axes = figure.subplots(len(names), 1, squeeze=False, sharex=True)
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    for axis, name in zip(axes[:, 0], names, strict=True):
        for seed in seeds:
            points = [row for row in rows if row["seed"] == seed and row[name]]
            x, y = [int(row["update"]) for row in points], [float(row[name]) for row in points]
            axis.plot(x, y, marker="." if len(x) < 50 else None, label=f"seed {seed}")
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
    axes[-1, 0].set_xlabel("update")
    axes[0, 0].legend()
    figure.suptitle(" / ".join(Path(folder).resolve().parts[-3:]))
    figure.tight_layout()
    figure.savefig(file, dpi=150)

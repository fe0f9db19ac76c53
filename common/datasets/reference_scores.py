# SPDX-License-Identifier: Apache-2.0
"""The table of D4RL's data sets, reference_scores.csv: suite, reference scores, horizon, env, file.

The reference scores of a data set are two returns: the one that scores 0 and the one that scores
100. Facts from D4RL@89141a6 (infos.py and the environments).
"""

import csv
import re
from pathlib import Path


def table() -> dict[str, dict[str, str]]:
    """D4RL's name of a data set -> its row."""
    with (Path(__file__).parent / "reference_scores.csv").open(encoding="utf-8") as file:
        return {row["dataset"]: row for row in csv.DictReader(file)}


def row_of(name: str) -> dict[str, str]:
    """The row of one of D4RL's names or of the stem of one of its files, {} if there is none."""
    rows = table()
    if name.replace("_", "-") in rows:
        return rows[name.replace("_", "-")]
    return next((row for row in rows.values() if Path(row["file"]).stem == name), {})


def of_task(dataset_id: str) -> tuple[float | None, float | None]:
    """D4RL's scores of the same task, for Minari's data sets of Adroit and Kitchen."""
    for name, row in table().items():
        if row["minari_id"] == dataset_id and row["suite"] in ("adroit", "kitchen"):
            return _of_row(dataset_id, name, row)
    return None, None


def of_env_family(dataset_id: str, env_id: str) -> tuple[float | None, float | None]:
    """D4RL's scores of another version of the env (Hopper-v2's for Hopper-v5), or none."""
    family = re.sub(r"-v\d+$", "", env_id)
    for name, row in table().items():
        if row["suite"] == "mujoco" and re.sub(r"-v\d+$", "", row["env_id"]) == family:
            return _of_row(dataset_id, name, row)
    print(f"{dataset_id}: no reference scores, so the score column is the plain return")
    return None, None


def _of_row(dataset_id, name, row):
    print(f"{dataset_id}: no reference scores recorded, D4RL's of {name} are used")
    return float(row["ref_min_score"]), float(row["ref_max_score"])

# SPDX-License-Identifier: Apache-2.0
"""Draw SAC's learning curves in gym-mujoco envs beside Tianshou's published ones.

    python benchmarks/collect.py hopper          # trains SAC in the env and keeps its run
    python benchmarks/online_curves.py RUN... --output online_curves

RUN is a run folder of algorithms/sac.py that learned in an env without recorded data
(--dataset env/Hopper-v5). Runs in the same env are seeds of one curve. The published curves are
those of benchmarks/reference/sac_online.csv: the mean and the standard deviation of ten seeds,
every 20k env steps, by Tianshou's SAC in version 3 of the envs, from
github.com/thu-ml/tianshou@63f0e9a examples/mujoco/benchmark/*/result.json. Both evaluate the mean
action. The script writes .png, .json and .md.
"""

import csv
import dataclasses
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import tyro
import yaml

import figures
import measured
from common import command_line, fail

REFERENCE = Path(__file__).parent / "reference" / "sac_online.csv"
STEPS = (40_000, 100_000, 200_000, 300_000, 400_000, 500_000)  # env steps, rows of the table
NEAR = 3  # evaluations before a row's env steps that its mean takes in; one has few episodes


@dataclasses.dataclass(frozen=True)
class Arguments:
    runs: tyro.conf.Positional[tuple[str, ...]]  # run folders
    output: str = "online_curves"  # files to write: this with .png, .json and .md


# --- Reading ------------------------------------------------------------------------------------
def published():
    """{env: (env steps [T], mean [T], std [T])}, return of the mean action."""
    columns = defaultdict(list)
    with REFERENCE.open() as file:
        for row in csv.DictReader(file):
            columns[row["env"]].append([float(row[x]) for x in ("env_steps", "mean", "std")])
    return {env: np.array(rows).T for env, rows in columns.items()}


def read(folder):
    """(env, settings, env steps [T], return [T, S]) of a run."""
    try:
        cfg = yaml.safe_load((folder / "config.yaml").read_text())
        result = json.loads((folder / "result.json").read_text())
        rows = [row for row in csv.DictReader((folder / "metrics.csv").open()) if row["return"]]
    except (OSError, ValueError, yaml.YAMLError) as error:
        fail(f"{folder}: no finished run ({error})")
    if result["algorithm"] != "sac" or not cfg["dataset"].startswith("env/"):
        fail(f"{folder}: {result['algorithm']} on {cfg['dataset']}; this takes sac on env/...")
    returns = defaultdict(list)
    for row in rows:
        returns[int(row["update"])].append(float(row["return"]))
    updates = np.array(sorted(returns))
    steps = cfg["random_steps"] * (updates > 0) + updates / cfg["updates_per_step"]
    env = cfg["dataset"].removeprefix("env/").split("-")[0]
    return env, settings(cfg), steps, np.array([returns[update] for update in updates])


def settings(cfg):
    """Those that decide how fast the run learns, as text."""
    hidden = " x ".join(map(str, cfg["hidden"]))
    return (
        f"hidden {hidden}, batches of {cfg['batch_size']}, learning rate "
        f"{cfg['actor_learning_rate']:g}, {cfg['steps_per_refresh']:,} env steps per refresh"
    )


def rows_of(env, steps, returns, known):
    """Rows of the table: our mean of the last evaluations by then, and the published one."""
    rows = []
    for at in STEPS:
        (by_then,) = np.nonzero(steps <= at)
        if steps[-1] < at:
            continue
        ours = returns[by_then[-NEAR:]].mean(axis=0)  # [S]
        (place,) = np.flatnonzero(known[0] == at)
        rows.append(
            {
                "env": env,
                "env steps": at,
                "return here": round(ours.mean()),
                "seeds": len(ours),
                "lowest": round(ours.min()),
                "highest": round(ours.max()),
                "Tianshou, mean": round(known[1][place]),
                "Tianshou, std": round(known[2][place]),
            }
        )
    return rows


# --- Output -------------------------------------------------------------------------------------
def draw(curves, reference, output):
    """A panel per env: our seeds as lines, the published mean with a band of one std."""
    blue, orange = figures.COLOURS[:2]
    with figures.panels(len(curves), columns=3, size=(3.4, 2.9)) as (figure, axes):
        for axis, (env, (steps, returns)) in zip(axes, curves.items(), strict=True):
            at, mean, std = reference[env][:, reference[env][0] <= steps[-1]]
            axis.plot(at / 1000, mean, color=orange, label="Tianshou, 10 seeds")
            axis.fill_between(
                at / 1000, mean - std, mean + std, color=orange, alpha=0.2, linewidth=0
            )
            for i, line in enumerate(returns.T):
                axis.plot(
                    steps / 1000, line, color=blue, linewidth=1, label="" if i else "here, a seed"
                )
            axis.set(title=env, xlabel="thousand env steps", ylabel="return")
            axis.legend()
        figures.png(figure, output)


def page(record):
    """The page of a record."""
    text = [
        *__doc__.strip().splitlines()[5:],
        "",
        f"A row takes the mean of the last {NEAR} evaluations by its env steps, since one has few "
        "episodes.",
    ]
    title = "SAC's learning curves beside published ones"
    return measured.page(title, text, record, "return over env steps, here and by Tianshou")


def main(arguments):
    if not arguments.runs:
        fail("name at least one run folder")
    output = measured.stem(arguments.output)
    reference, found, used = published(), defaultdict(list), {}
    for folder in map(Path, arguments.runs):
        env, words, steps, returns = read(folder)
        if env not in reference:
            fail(f"{folder}: no published curve of {env}; there are {', '.join(reference)}")
        if used.setdefault(env, words) != words:
            fail(f"{folder}: {words}, another run in {env} has {used[env]}")
        found[env].append((steps, returns))
    curves = {}
    for env, runs in found.items():
        steps = min((steps for steps, _ in runs), key=len)
        curves[env] = steps, np.concatenate([x[: len(steps)] for _, x in runs], axis=1)  # [T, S]
    rows = []
    for env, (steps, returns) in curves.items():
        rows += rows_of(env, steps, returns, reference[env])
    record = {
        **measured.facts("online_curves.py"),
        **{f"settings, {env}": words for env, words in used.items()},
        "figure": f"{output.name}.png",
        "rows": rows,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    draw(curves, reference, output.with_suffix(".png"))
    measured.write(output, record, page(record))


if __name__ == "__main__":
    command_line.outlive_the_reader()
    main(tyro.cli(Arguments, description=__doc__.splitlines()[0]))

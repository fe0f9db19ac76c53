# SPDX-License-Identifier: Apache-2.0
"""Draw how IQL's two ways to extract a policy use the same Q function.

    python benchmarks/circle.py                       # trains both if needed, then draws
    python benchmarks/circle.py --runs-dir short --output short.png -- --num-updates 4000

Flags after -- go to both trainings.

In a point maze the best action is full speed in one direction. The figure has a panel for each of
three states of local/pointmaze/umaze-v0: before the bend, in it and after it. A panel shows the two
components of the action, with the box of allowed actions and the unit circle. Grey dots are the
data's actions in nearby states, blue ones 500 samples of the policy by advantage-weighted
regression (awr), orange ones 500 samples by DDPG+BC. An arrow points to the next waypoint. AWR
averages good actions of the data, while DDPG+BC climbs Q. The legend has the returns of both.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

import figures
from algorithms import iql
from common import command_line, datasets, experiment, fail

ROOT = Path(__file__).resolve().parents[1]
DATASET = "local/pointmaze/umaze-v0"
SAMPLES = 500
NEAR = 0.3  # in position, and ten times that in velocity
# The U is walked from (-1, -1) to the goal (-1, 1): position, the next waypoint.
STATES = {
    "before the bend": ((0.0, -1.0), (1.0, -1.0)),
    "in the bend": ((1.0, 0.0), (1.0, 1.0)),
    "after the bend": ((0.0, 1.0), (-1.0, 1.0)),
}
COLOURS = {"awr": figures.COLOURS[0], "ddpg_bc": figures.COLOURS[4]}  # blue, orange
# What else was tried, one seed each: with an expectile of 0.7 AWR scores 9.1 and DDPG+BC with alpha
# 0.1 scores 9.6. With 0.9 AWR scores 15.5, DDPG+BC 5.1 with alpha 0.1 and 23.2 with alpha 0.03.
SETTINGS = {"awr": ["--expectile", "0.9"], "ddpg_bc": ["--expectile", "0.9", "--alpha", "0.03"]}
LABELS = {"awr": "IQL, AWR", "ddpg_bc": "IQL, DDPG+BC"}


def train(extraction, runs_dir, more):
    """Run folder of one extraction. A run that is not finished is trained or resumed first."""
    folder = Path(runs_dir, "iql", datasets.slug(DATASET), f"circle-{extraction}")
    config = ROOT / "configs" / "iql" / "pointmaze.yaml"
    words = [sys.executable, str(ROOT / "algorithms" / "iql.py"), "--config", str(config)]
    words += ["--dataset", DATASET, "--extraction", extraction, "--name", folder.name]
    words += ["--runs-dir", str(runs_dir), "--resume", *SETTINGS[extraction], *more]
    done = subprocess.run(words, cwd=ROOT, check=False)  # a finished one of other flags: refused
    if done.returncode:
        fail(f"IQL with --extraction {extraction} ended with exit code {done.returncode}")
    return folder


def typical(observation, position, waypoint):
    """Rows [N] near a position that move towards the waypoint, and their mean state."""
    way = np.subtract(waypoint, position)
    near = np.linalg.norm(observation[:, :2] - position, axis=1) < NEAR
    near &= observation[:, 2:] @ way > 0
    velocity = observation[near, 2:].mean(axis=0)
    near &= np.linalg.norm(observation[:, 2:] - velocity, axis=1) < 10 * NEAR
    return near, np.array([*position, *velocity], np.float32)


def sample(state, observation, rng):
    """Actions [SAMPLES, 2] of the Gaussian policy of the first seed, and its mean."""
    params = jax.tree.map(lambda x: x[0], state.actor.params)
    mean, log_std = map(np.asarray, state.actor.apply_fn(params, observation))
    return mean + np.exp(log_std) * rng.standard_normal((SAMPLES, 2)), mean


def draw(dataset, policies, titles, output):
    """One panel per state; prints what it shows."""
    rows, rng = dataset.transitions, np.random.default_rng(0)
    angle = np.linspace(0, 2 * np.pi, 200)
    with figures.panels(len(STATES), size=(3.2, 3.2)) as (figure, axes):
        for axis, (title, (position, waypoint)) in zip(axes, STATES.items(), strict=True):
            near, observation = typical(rows.observation, position, waypoint)
            way = np.subtract(waypoint, position) / np.linalg.norm(np.subtract(waypoint, position))
            axis.plot(np.cos(angle), np.sin(angle), color=figures.INK, linewidth=0.8)
            axis.plot([-1, 1, 1, -1, -1], [-1, -1, 1, 1, -1], color=figures.INK, linewidth=0.8)
            shown = rows.action[rng.permutation(np.flatnonzero(near))[:SAMPLES]]
            axis.scatter(*shown.T, s=5, color="0.6", linewidths=0, label="data, states nearby")
            for name, state in policies.items():
                actions, mean = sample(state, observation, rng)
                colour = COLOURS[name]
                axis.scatter(*actions.T, s=5, color=colour, linewidths=0, alpha=0.6)
                axis.scatter(*mean, s=40, color=colour, edgecolors="black", label=titles[name])
                along = actions.clip(-1, 1) @ way
                print(
                    f"{title}: {LABELS[name]} mean ({mean[0]:.2f}, {mean[1]:.2f}), of length "
                    f"{np.linalg.norm(mean):.2f}, {mean @ way:.2f} along the way; "
                    f"samples {along.mean():.2f} along it; data {shown.mean(axis=0) @ way:.2f}"
                )
            axis.annotate("", 1.45 * way, (0, 0), arrowprops={"arrowstyle": "->", "lw": 1.5})
            limits = {"xlim": (-1.6, 1.6), "ylim": (-1.6, 1.6), "aspect": "equal"}
            axis.set(title=title, xlabel="action, right", ylabel="action, up", **limits)
        figures.legend(figure, axes)
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=150)
    print(f"wrote {output}")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--runs-dir", default=ROOT / "runs", type=Path)
    parser.add_argument("--output", default=ROOT / "benchmarks/results/circle.png", type=Path)
    args = parser.parse_args(argv[:split])
    policies, titles = {}, {}
    for extraction, label in LABELS.items():
        folder = train(extraction, args.runs_dir, argv[split + 1 :])
        _, dataset, policies[extraction] = experiment.load(iql, folder)
        result = json.loads((folder / "result.json").read_text())
        mean = np.mean([x for x in result["return"].values() if x is not None])
        titles[extraction] = f"{label}: return {mean:.0f}"
        print(f"{label}: return {mean:.1f}, score {np.mean(list(result['score'].values())):.1f}")
    print(f"data: return {dataset.episode_returns.mean():.1f}")
    draw(dataset, policies, titles, args.output)


if __name__ == "__main__":
    command_line.outlive_the_reader()
    main()

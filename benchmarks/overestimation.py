# SPDX-License-Identifier: Apache-2.0
"""Draw what a run's critics promise beside what its policy earns, at every saved step.

    python algorithms/sac.py --dataset local/mujoco/hopper-medium-expert-v0 --keep all --name naive
    python benchmarks/overestimation.py RUN... --output overestimation

RUN is a run folder of one of the files in ALGORITHMS, whose critics take observations and actions
as they are, with a checkpoint per evaluation (--keep all). At every checkpoint the policy of the
first seed plays a few episodes. **Promised** is the least of the critics' values at an episode's
first state and the policy's action there; **earned** is the discounted sum of the episode's
rewards. Both are means over the episodes. The script writes .png, .json and .md.

SAC's critics count the entropy of later actions as well. A bonus of 0.3 per step adds about 30 to a
value with a discount of 0.99, so a small excess over the earned value says nothing.
"""

import dataclasses
import importlib
import json
from pathlib import Path

import jax
import numpy as np
import tyro

import figures
import measured
from common import command_line, envs, experiment, fail
from common.experiment import checkpoints

ALGORITHMS = ("sac", "sac_n", "edac", "lb_sac", "rebrac", "iql")
STARTS = 50_000  # seed of the first episode


@dataclasses.dataclass(frozen=True)
class Arguments:
    runs: tyro.conf.Positional[tuple[str, ...]]  # run folders with several checkpoints
    episodes: int = 10  # per checkpoint
    output: str = "overestimation"  # files to write: this with .png, .json and .md


# --- Measuring ----------------------------------------------------------------------------------
def updates_of(folder):
    """Updates at which the run has a checkpoint, without the untrained policy's."""
    manager = checkpoints.manager(folder)
    found = sorted(manager.all_steps())
    manager.close()
    return [update for update in found if update > 0]


def module_of(folder):
    """The algorithm's file, by the run's result."""
    try:
        name = json.loads((folder / "result.json").read_text())["algorithm"]
    except (OSError, KeyError, ValueError):
        fail(f"{folder}: no finished run")
    if name not in ALGORITHMS:
        fail(f"{folder}: a run of {name}; this takes runs of {', '.join(ALGORITHMS)}")
    return importlib.import_module(f"algorithms.{name}")


def measure(folder, episodes):
    """One row per checkpoint of a run."""
    module, rows = module_of(folder), []
    for update in updates_of(folder):
        cfg, dataset, state = experiment.load(module, folder, update)
        refuse_what_has_other_units(folder, cfg, dataset)
        promised, earned, score = play(module, cfg, dataset, state, episodes)
        row = {
            "algorithm": module.__name__.split(".")[-1],
            "data set": cfg.dataset,
            "update": update,
            "promised": round(float(promised.mean()), 1),
            "earned": round(float(earned.mean()), 1),
            "score": round(float(score.mean()), 1),
        }
        print(", ".join(f"{name} {x}" for name, x in row.items()), flush=True)
        rows.append(row)
    if not rows:
        fail(f"{folder}: no checkpoint of a trained policy; train with --keep all")
    return rows


def refuse_what_has_other_units(folder, cfg, dataset):
    """Exit with one line where values are not sums of the env's rewards at its observations."""
    if dataset.make_env is None:
        fail(f"{folder}: has no env, so nothing is earned")
    usual = {"reward_scale": 1.0, "reward_shift": 0.0, "return_scale": None}
    usual |= {"normalise_observations": False}
    for name, value in usual.items():
        if getattr(cfg, name, value) != value:
            fail(f"{folder}: {name} is {getattr(cfg, name)}, so values have another unit")


def play(module, cfg, dataset, state, episodes):
    """(promised, earned, score), [E] each, of the first seed's policy."""
    key = experiment.streams(cfg.seeds, 3)[2][0]
    act = module.policy_fn(state, cfg)
    params = jax.tree.map(lambda x: x[0], module.policy_params(state))
    critic_params = jax.tree.map(lambda x: x[0], state.critic.params)

    @jax.jit
    def action_of(observation, step):  # [E, O] -> [E, A]
        return act(params, observation, jax.random.fold_in(key, step)).clip(-1, 1)

    worlds = [dataset.make_env() for _ in range(episodes)]
    observation = np.stack([envs.reset(x, STARTS + i) for i, x in enumerate(worlds)])
    first = action_of(observation, 0)
    promised = state.critic.apply_fn(critic_params, observation, first).min(axis=0)  # [K, E] -> [E]

    live, step = np.arange(episodes), 0
    earned, total = np.zeros(episodes), np.zeros(episodes)
    while len(live):
        action = np.asarray(action_of(observation, step))
        over = np.zeros(episodes, bool)
        for i in live:
            observation[i], reward, termination, truncation, _ = envs.step(worlds[i], action[i])
            earned[i] += cfg.discount**step * reward
            total[i] += reward
            over[i] = termination or truncation
        live, step = live[~over[live]], step + 1
    for world in worlds:
        world.close()
    return np.asarray(promised), earned, dataset.score(total)


# --- Output -------------------------------------------------------------------------------------
def draw(groups, output):
    """A panel per run: both values over updates."""
    blue, orange = figures.COLOURS[:2]
    with figures.panels(len(groups), columns=2, size=(3.8, 2.9)) as (figure, axes):
        for axis, rows in zip(axes, groups, strict=True):
            updates = [row["update"] for row in rows]
            for colour, kind in ((blue, "promised"), (orange, "earned")):
                axis.plot(updates, [row[kind] for row in rows], "o-", color=colour, label=kind)
            scale = "symlog" if max(abs(row["promised"]) for row in rows) > 1e4 else "linear"
            axis.set(title=f"{rows[0]['algorithm']} on {rows[0]['data set'].split('/')[-1]}")
            axis.set(xlabel="updates", ylabel="value of the first state", yscale=scale)
            axis.legend()
        figures.png(figure, output)


def page(record):
    """The page of a record."""
    text = __doc__.strip().splitlines()[5:]
    alt = "promised and earned value over updates"
    return measured.page("What critics promise and policies earn", text, record, alt)


def main(arguments):
    if not arguments.runs:
        fail("name at least one run folder")
    if arguments.episodes < 1:
        fail(f"--episodes {arguments.episodes}: must be at least 1")
    output = measured.stem(arguments.output)
    groups = [measure(Path(run), arguments.episodes) for run in arguments.runs]
    record = {
        **measured.facts("overestimation.py"),
        "figure": f"{output.name}.png",
        "rows": [row for rows in groups for row in rows],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    draw(groups, output.with_suffix(".png"))
    measured.write(output, record, page(record))


if __name__ == "__main__":
    command_line.outlive_the_reader()
    main(tyro.cli(Arguments, description=__doc__.splitlines()[0]))

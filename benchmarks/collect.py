# SPDX-License-Identifier: Apache-2.0
"""Make D4RL's five gym-mujoco sets of an env on this machine: train SAC, record its policies.

    python benchmarks/collect.py hopper                 # also walker2d, halfcheetah
    python benchmarks/collect.py hopper --rows 1000000  # as many as D4RL has (default 200,000)

Where it was stopped, the same command goes on. What it makes, for hopper:
    local/mujoco/hopper-random-v0         uniformly random actions
    local/mujoco/hopper-medium-v0         the first saved policy whose score is within 3 points of
                                          D4RL's behaviour policy, else the closest one
    local/mujoco/hopper-medium-replay-v0  all rows that the training had seen by then
    local/mujoco/hopper-expert-v0         the best policy after training
    local/mujoco/hopper-medium-expert-v0  the rows of both

The policies are those of algorithms/sac.py at every evaluation. Their scores are means of 20
episodes with actions drawn from the policy, as in the data, by D4RL's reference scores. What counts
is the score of a policy and not its size, so the networks are small.
"""

import argparse
import csv
import json
import shlex
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np

from algorithms import sac
from common import command_line, evaluation, experiment, fail, files, folders, interaction
from common.recipes import mujoco

SETTINGS = """--num-updates 0 --random-steps 5000 --hidden 128 128 --batch-size 128
--actor-learning-rate 1e-3 --critic-learning-rate 1e-3 --temperature-learning-rate 1e-3
--updates-per-step 1 --steps-per-refresh 50 --log-every 1000 --eval-every 5000
--eval-episodes 5 --keep all --save-seconds 60 --wandb disabled --resume"""
UPDATES = {"hopper": 500_000, "halfcheetah": 600_000, "walker2d": 600_000}
NEAR = 3  # points; so close to D4RL's score, a policy is taken as the medium one
EPISODES = 20  # by which a policy is scored
BEST = 5  # policies with the best evaluations during training; one of them is the expert
STARTS = 30_000  # seed of the first episode that scores a policy


# --- Training -----------------------------------------------------------------------------------
def train(task, updates, seed, runs_dir):
    """Train SAC in the env, or go on with it. Returns the run folder."""
    name = f"seed{seed}"
    words = ["--dataset", f"env/{mujoco.TASKS[task].env_id}", *SETTINGS.split()]
    words += ["--online-updates", str(updates), "--seeds", str(seed)]
    words += ["--name", name, "--runs-dir", str(runs_dir)]
    cfg, options = experiment.parse(sac.Config, words)
    sac.train(cfg, options)
    return Path(runs_dir, "sac", cfg.dataset, name)


class Policies:
    """The policies of a run at all of its evaluations, and their scores, kept in a file."""

    def __init__(self, task, folder):
        self.task, self.folder, self.file = task, folder, folder / "scores.json"
        self.cfg, self.dataset, state = experiment.load(sac, folder)
        self.keys = experiment.streams(self.cfg.seeds, 5)[4]
        self.explore = partial(sac.explore, state.actor.apply_fn)
        known = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.scores = {int(update): score for update, score in known.items()}
        plan = SimpleNamespace(eval_episodes=EPISODES, eval_every=1, num_updates=0)
        self.rollouts = evaluation.Rollouts(
            self.dataset, self.explore, self.keys, plan, first_start=STARTS
        )

    def params(self, update):
        """Those of the actor, [1, ...], at that update."""
        _, _, state = experiment.load(sac, self.folder, update)
        return sac.policy_params(state)

    def score(self, update):
        """Mean score of 20 episodes with actions drawn from the policy."""
        if update not in self.scores:
            found = self.rollouts.run(self.params(update), update)
            self.scores[update] = float(found["score"][0])
            files.write(self.file, json.dumps(self.scores, indent=1) + "\n")
            print(f"policy of update {update:,}: score {self.scores[update]:.1f}", flush=True)
        return self.scores[update]

    def evaluated(self):
        """{update: score of the evaluation during training}, without the untrained policy."""
        with (self.folder / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["score"] and row["update"] != "0"]
        return {int(row["update"]): float(row["score"]) for row in rows}

    def medium(self):
        """The update of the first policy that is near enough to D4RL's, else the closest one."""
        target = mujoco.TASKS[self.task].behaviour["medium"]
        updates = [*self.evaluated()]
        for update in updates:
            if abs(self.score(update) - target) <= NEAR:
                return update
        return min(updates, key=lambda update: abs(self.score(update) - target))

    def expert(self):
        """The update of the best policy."""
        during = self.evaluated()
        best = sorted(during, key=during.get)[-BEST:]
        return max(best, key=self.score)

    def acting(self, update):
        """(observation [E, O], numbers of the episodes [E], step) -> action [E, A]."""
        params = jax.tree.map(lambda x: x[0], self.params(update))
        key = jax.random.fold_in(self.keys[0], update)

        @jax.jit
        def act(params, observation, numbers, step):
            def one(observation, number):
                own_key = jax.random.fold_in(jax.random.fold_in(key, number), step)
                return self.explore(params, observation, own_key)

            return jax.vmap(one)(observation, numbers)

        return lambda *given: np.asarray(act(params, *given)).clip(-1, 1)


# --- Data sets ----------------------------------------------------------------------------------
def episodes_of(task, kind, policies, rows, seed):
    """The episodes of one of the sets."""
    if kind == "medium-expert":
        return [*stored(task, "medium"), *stored(task, "expert")]
    if kind == "medium-replay":
        return seen_before(policies, policies.medium())
    number = mujoco.KINDS.index(kind)
    if kind == "random":
        act = at_random(policies, seed)
    else:
        act = policies.acting(policies.medium() if kind == "medium" else policies.expert())
    return list(mujoco.play(policies.dataset.make_env, act, rows, 1000 * seed + number))


def at_random(policies, seed):
    """Like `acting`, for uniform actions."""
    size = policies.dataset.example().action.shape[1]

    def act(observation, numbers, step):
        draws = [np.random.default_rng((seed, number, step)) for number in numbers]
        return np.stack([draw.uniform(-1, 1, size).astype(np.float32) for draw in draws])

    return act


def seen_before(policies, update):
    """The episodes that the training had seen by that update; the last one is broken off there."""
    steps = policies.cfg.random_steps + round(update / policies.cfg.updates_per_step)
    rows = interaction.recorded(policies.folder, policies.dataset.example(), 1, steps)
    return list(mujoco.split({name: column[:, 0] for name, column in rows.items()}))


def stored(task, kind):
    """The episodes of a set that is there."""
    import minari

    for x in minari.load_dataset(mujoco.dataset_id(task, kind)).iterate_episodes():
        yield mujoco.Episode(x.observations, x.actions, x.rewards, x.terminations, x.truncations)


def facts(task, kind):
    """What a set is like, as a row of the table."""
    episodes = list(stored(task, kind))
    returns = [float(x.reward.sum()) for x in episodes]
    folder = folders.minari(mujoco.dataset_id(task, kind))
    return {
        "dataset": mujoco.dataset_id(task, kind),
        "rows": sum(len(x.reward) for x in episodes),
        "episodes": len(episodes),
        "terminations": int(sum(x.termination.sum() for x in episodes)),
        "score": float(np.mean(mujoco.score(task, returns))),
        "d4rl_score": mujoco.TASKS[task].behaviour.get(kind),
        "megabytes": sum(x.stat().st_size for x in folder.rglob("*") if x.is_file()) / 1e6,
    }


def recipe(rows, updates, seed):
    """How the sets are made, in words that are kept with each of them."""
    flags = SETTINGS.split()
    rate, per_step = (
        flags[flags.index(flag) + 1] for flag in ("--actor-learning-rate", "--updates-per-step")
    )
    return (
        f"SAC, {updates:,} updates, {per_step} per env step, learning rate {rate}, seed {seed}, "
        f"{rows:,} rows"
    )


def refuse_other_recipes(task, made_by):
    """Exit with one line where one of the sets is there and was made in another way."""
    for kind in mujoco.KINDS:
        folder = folders.minari(mujoco.dataset_id(task, kind))
        if (folder / "data").exists():
            stored = json.loads((folder / "data" / "metadata.json").read_text())
            if stored.get("algorithm_name") != made_by:
                fail(
                    f"{folder} was made by {stored.get('algorithm_name')!r}, this command makes "
                    f"{made_by!r}: move the sets of {task} away, or set MINARI_DATASETS_PATH to "
                    "another folder"
                )


def collect(task, rows, updates, seed, runs_dir, command):
    """Train, record the five sets, and print what they are like."""
    made_by = recipe(rows, updates, seed)
    refuse_other_recipes(task, made_by)
    folder = train(task, updates, seed, runs_dir)
    began = time.monotonic()
    policies = Policies(task, folder)
    for kind in mujoco.KINDS:  # a set that is there is left as it is
        if not (folders.minari(mujoco.dataset_id(task, kind)) / "data").exists():
            episodes = episodes_of(task, kind, policies, rows, seed)
            mujoco.store(task, kind, episodes, made_by)
    result = json.loads((folder / "result.json").read_text())
    chosen = {"medium": policies.medium(), "expert": policies.expert()}
    record = {
        "command": command,
        "updates": updates,
        "rows": rows,
        "seed": seed,
        "settings": " ".join(SETTINGS.split()),
        "policies": {
            name: {"update": update, "score": policies.score(update)}
            for name, update in chosen.items()
        },
        "training_minutes": (result["train_seconds"] + result["eval_seconds"]) / 60,
        "recording_minutes": (time.monotonic() - began) / 60,  # of this start
        "hardware": result["hardware"],
        "sets": [facts(task, kind) for kind in mujoco.KINDS],
    }
    files.write(folder / "collected.json", json.dumps(record, indent=2) + "\n")
    print(table(record))


def table(record):
    """The record as text."""
    lines = [
        f"{name} policy: update {x['update']:,}, score {x['score']:.1f}"
        for name, x in record["policies"].items()
    ]
    lines.append(f"training took {record['training_minutes']:.0f} min on {record['hardware']}")
    lines.append("| data set | rows | episodes | terminations | score | D4RL's score | MB |")
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for row in record["sets"]:
        theirs = "-" if row["d4rl_score"] is None else f"{row['d4rl_score']:.1f}"
        cells = [row["dataset"], f"{row['rows']:,}", f"{row['episodes']:,}"]
        cells += [f"{row['terminations']:,}", f"{row['score']:.1f}", theirs]
        lines.append(f"| {' | '.join(cells)} | {row['megabytes']:.1f} |")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser("benchmarks/collect.py", description=__doc__.split("\n")[0])
    parser.add_argument("task", help=", ".join(mujoco.TASKS))
    parser.add_argument("--rows", type=int, default=200_000, help="of random, medium and expert")
    parser.add_argument("--updates", type=int, help="updates of the training, one per env step")
    parser.add_argument("--seed", type=int, default=0, help="of the training and the recordings")
    parser.add_argument("--runs-dir", default="runs/collect", help="where the training is kept")
    given = parser.parse_args(argv)
    if given.task not in mujoco.TASKS:
        fail(f"{given.task}: not known here; there are {', '.join(mujoco.TASKS)}")
    if given.rows < 1:
        fail(f"--rows {given.rows}: must be at least 1")
    updates = UPDATES[given.task] if given.updates is None else given.updates
    words = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "benchmarks/collect.py", *words])
    try:
        collect(given.task, given.rows, updates, given.seed, given.runs_dir, command)
    except OSError as error:
        fail(f"{given.task}: cannot be collected ({error}); the same command goes on")


if __name__ == "__main__":
    command_line.run(main)

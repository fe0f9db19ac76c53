# SPDX-License-Identifier: Apache-2.0
"""Measure how wrong learned dynamics are, and whether MOPO's penalty is large where they are.

    python benchmarks/model_error.py RUN... --output model_error    # a minute for each run

RUN is a run folder of mopo.py on data of a MuJoCo env. Its observations are all numbers of the
simulator's state but the x position, on which nothing depends. So the simulator can be put into the
state of any row and make the same steps as the model. The script writes .png, .json and .md.

The steps begin at held-out rows and follow one of three policies: the data's actions as they were
recorded, those of the run's own policy in the model, or uniform ones. A member of the ensemble, and
the ensemble (the mean of its elites), predict each step from their own prediction of the last one.
Nothing ends: the simulator goes on where an episode would be over. Of a 5-step rollout only the
first row is known to be held out.

**Error**: the root of the mean square of prediction minus simulator, over rows, the observation and
the reward. Each number of the observation is in units of the std of its one-step change in the
data, the reward in units of its std. So after one step 1 is the error of predicting the mean.
"recording" compares the simulator with the data. Where the env has clipped a speed at 10, as
hopper's does in a fifth of the rows, the simulator begins in the last row before it without such a
number and follows the recorded actions to the row.

**Penalty and error**: Spearman's rank correlation over the first steps between the ensemble's error
and what a method takes for it. The penalty is MOPO's, the largest norm of a member's std, and the
error beside it the norm in the same, raw units. The disagreement is MOReL's, the largest distance
of two members, in units of the std of the observations, and so is the error beside it. Ranks are
all that is compared: a method's weight and threshold set the scale.
"""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import figures
import measured
import readers
import report
from algorithms import mopo, morel
from common import command_line, datasets, experiment, fail
from common.experiment import yaml_files

POLICIES = ("data", "policy", "uniform")
CLIPPED = 10.0  # speeds are, in some of the envs


@dataclasses.dataclass(frozen=True)
class Arguments:
    runs: tyro.conf.Positional[tuple[str, ...]]  # run folders of mopo.py
    rows: int = 1000  # that the steps begin at, at most; the data have 1000 held-out rows or fewer
    steps: int = 5  # of a rollout
    output: str = "model_error"  # files to write: this with .png, .json and .md


class Simulator:
    """The env, which begins in the state that an observation tells of."""

    def __init__(self, dataset):
        self.env = dataset.make_env().unwrapped
        model = getattr(self.env, "model", None)
        width = dataset.transitions.observation.shape[1]
        self.hidden = -1 if model is None else model.nq + model.nv - width
        if self.hidden != 1:
            fail(f"{dataset.id}: no MuJoCo env whose observation lacks the x position alone")
        self.env.reset(seed=0)

    def follow(self, observation, actions):
        """[O], [H, A] -> the H next observations and rewards, [H, O + 1]."""
        numbers = np.concatenate([np.zeros(self.hidden), observation.astype(np.float64)])
        self.env.set_state(*np.split(numbers, [self.env.model.nq]))
        found = []
        for action in actions:
            after, reward, *_ = self.env.step(action)
            found.append([*after, reward])
        return np.array(found, np.float32)


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """What one policy's steps give, from the same R rows."""

    member: np.ndarray  # [M, R, H, O + 1] each member's s' and r
    ensemble: np.ndarray  # [R, H, O + 1] those of the mean of the elites
    truth: np.ndarray  # [R, H, O + 1] the simulator's
    penalty: np.ndarray  # [R] MOPO's, of the first step
    disagreement: np.ndarray  # [R] MOReL's, of the first step


# --- Rows ---------------------------------------------------------------------------------------
def held_out(cfg, data, arguments):
    """[R] rows that the fit of the run's first seed never saw and whose next steps are recorded,
    and [R] the rows of the same episodes that the simulator begins at."""
    key = experiment.streams(cfg.seeds, 3)[1][0]  # the one that mopo.py trains with
    rows = np.asarray(mopo.holdout_rows(key, len(data.reward)))
    rows = rows[rows <= len(data.reward) - arguments.steps]
    begin = last_exact(data)[rows]
    window = rows[:, None] + np.arange(arguments.steps)
    goes_on = not_ended(data)[window[:, :-1]].all(axis=1) & (data.termination[window[:, -1]] == 0)
    kept = goes_on & (begin >= 0)
    if not kept.any():
        fail(f"{cfg.dataset}: no held-out row with {arguments.steps} recorded steps")
    return rows[kept][: arguments.rows], begin[kept][: arguments.rows]


def not_ended(data):
    return (data.termination + data.truncation) == 0


def last_exact(data):
    """[N] the last row of the episode until each one in which no speed is clipped, or -1."""
    exact = ~(np.abs(data.observation) == CLIPPED).any(axis=1)
    number = np.arange(len(exact))
    last = np.maximum.accumulate(np.where(exact, number, -1))
    first = np.maximum.accumulate(np.where(np.roll(~not_ended(data), 1) | (number == 0), number, 0))
    return np.where(last >= first, last, -1)


def recorded(data, rows, steps):
    """The actions, [R, H, A], and s' and r of the recording, [R, H, O + 1]."""
    window = rows[:, None] + np.arange(steps)
    reward = data.reward[window][..., None]
    return data.action[window], np.concatenate([data.next_observation[window], reward], axis=-1)


# --- The model's steps --------------------------------------------------------------------------
def actions_of(state, observation, key, steps):
    """[R, H, A] actions of the run's policy, on observations that the ensemble predicts."""

    def one_step(observation, key):
        action, _ = mopo.sample_policy(
            state.actor, observation, jax.random.normal(key, (len(observation), action_width))
        )
        return elites_mean(state, observation, action)[:, :-1], action

    action_width = state.actor.apply_fn(state.actor.params, observation)[0].shape[-1]
    _, actions = jax.lax.scan(one_step, observation, jax.random.split(key, steps))
    return actions.swapaxes(0, 1)


def elites_mean(state, observation, action):
    """s' and r, [R, O + 1], the mean of the elites'."""
    mean, _ = mopo.ensemble(state, observation, action)  # [M, R, O + 1]
    return with_observation(observation, mean[state.fit.elites].mean(axis=0))


def with_observation(observation, change):
    """s' and r from (s' - s, r), [..., O + 1]."""
    observation = jnp.broadcast_to(observation, (*change.shape[:-1], observation.shape[-1]))
    return change.at[..., :-1].add(observation)


def members_steps(state, observation, actions):
    """[M, H, R, O + 1]: every member goes on from its own prediction."""

    def one_step(observation, action):  # [M, R, O], [R, A]
        action = jnp.broadcast_to(action, (len(observation), *action.shape))
        mean, _ = mopo.predict(state, state.dynamics.params, observation, action)
        after = with_observation(observation, mean)
        return after[..., :-1], after

    first = jnp.broadcast_to(observation, (len(state.fit.best_error), *observation.shape))
    _, found = jax.lax.scan(one_step, first, actions.swapaxes(0, 1))
    return found.swapaxes(0, 1)


def ensemble_steps(state, observation, actions):
    """[H, R, O + 1]: the mean of the elites goes on from itself."""

    def one_step(observation, action):
        after = elites_mean(state, observation, action)
        return after[..., :-1], after

    return jax.lax.scan(one_step, observation, actions.swapaxes(0, 1))[1]


def doubts(state, observation, action):
    """MOPO's penalty without its weight and MOReL's disagreement, [R] each."""
    mean, std = mopo.ensemble(state, observation, action)
    return jnp.linalg.norm(std, axis=-1).max(axis=0), morel.disagreement(state, mean)


def rollouts(state, simulator, data, rows, begin, actions):
    """Rollouts of the given actions, [R, H, A]; `rows` and `begin` as `held_out` gives them."""
    observation = data.observation[rows]
    member = jax.jit(members_steps)(state, observation, actions)
    ensemble = jax.jit(ensemble_steps)(state, observation, actions)
    penalty, disagreement = jax.jit(doubts)(state, observation, actions[:, 0])
    actions = np.asarray(actions)
    truth = []
    for row, first, chosen in zip(rows, begin, actions, strict=True):
        until_row = data.action[first:row]
        steps = simulator.follow(data.observation[first], [*until_row, *chosen])
        truth.append(steps[-len(chosen) :])
    return Rollouts(
        member=np.asarray(member).swapaxes(1, 2),
        ensemble=np.asarray(ensemble).swapaxes(0, 1),
        truth=np.array(truth),
        penalty=np.asarray(penalty),
        disagreement=np.asarray(disagreement),
    )


# --- Numbers ------------------------------------------------------------------------------------
def errors(found, truth, unit):
    """[H] root mean squares over rows and numbers, in their units [O + 1]."""
    return np.sqrt((np.square((found - truth) / unit)).mean(axis=(-3, -1)))


def spearman(x, y):
    """The correlation of ranks, [N] and [N]. Ties count as their mean rank."""
    return np.corrcoef(ranks(x), ranks(y))[0, 1]


def ranks(x):
    _, place, count = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place]


def first_errors(steps, state):
    """The ensemble's errors of the first step, [R] each: raw norms of all numbers, and the norms
    of the observation in units of its std."""
    wrong = steps.ensemble[:, 0] - steps.truth[:, 0]
    unit = np.asarray(state.fit.input_statistics[1])[: wrong.shape[1] - 1]
    return np.linalg.norm(wrong, axis=-1), np.linalg.norm(wrong[:, :-1] / unit, axis=-1)


def measure(cfg, dataset, state, arguments):
    """(rows of errors, rows of correlations, {policy: Rollouts}, {policy: raw errors}) of a run.

    `state` is that of its first seed.
    """
    data, simulator = dataset.transitions, Simulator(dataset)
    name = datasets.slug(cfg.dataset)
    rows, begin = held_out(cfg, data, arguments)
    observation = data.observation[rows]
    data_actions, recording = recorded(data, rows, arguments.steps)
    change = recording[:, 0] - np.pad(observation, ((0, 0), (0, 1)))
    unit = np.where(change.std(axis=0) < 1e-6, 1, change.std(axis=0))
    chosen, key = {"data": data_actions}, jax.random.key(0)
    of_policy = jax.jit(partial(actions_of, steps=arguments.steps))
    chosen["policy"] = of_policy(state, observation, jax.random.fold_in(key, 1))
    shape, key_uniform = data_actions.shape, jax.random.fold_in(key, 2)
    chosen["uniform"] = jax.random.uniform(key_uniform, shape, minval=-1.0, maxval=1.0)

    table, correlations, found, raw = [], [], {}, {}
    for policy in POLICIES:
        steps = rollouts(state, simulator, data, rows, begin, chosen[policy])
        found[policy] = steps
        of_predictors = {f"member {i}": steps.member[i] for i in range(len(steps.member))}
        of_predictors["ensemble"] = steps.ensemble
        if policy == "data":
            of_predictors["recording"] = recording
        for predictor, predicted in of_predictors.items():
            size = errors(predicted, steps.truth, unit)
            row = {"data set": name, "actions": policy, "predictor": predictor}
            row |= {f"step {i + 1}": round(float(x), 3) for i, x in enumerate(size)}
            table.append(row)
        raw[policy], scaled = first_errors(steps, state)
        correlations.append(correlation(name, policy, steps, raw[policy], scaled))
        print(", ".join(f"{key} {x}" for key, x in correlations[-1].items()), flush=True)
    return table, correlations, found, raw


def correlation(name, policy, steps, raw, scaled):
    """A row of the second table."""
    return {
        "data set": name,
        "actions": policy,
        "rows": len(raw),
        "mean penalty": round(float(steps.penalty.mean()), 3),
        "mean error": round(float(raw.mean()), 3),
        "penalty and error": round(float(spearman(steps.penalty, raw)), 2),
        "disagreement and error": round(float(spearman(steps.disagreement, scaled)), 2),
    }


# --- Figure and page ----------------------------------------------------------------------------
def draw(runs, output):
    """A row of two panels for each run: errors by step, and penalty against error."""
    with figures.panels(2 * len(runs), columns=2, size=(4.2, 3.0)) as (figure, axes):
        for i, (table, _, found, raw) in enumerate(runs):
            draw_errors(axes[2 * i], table)
            draw_penalty(axes[2 * i + 1], table[0]["data set"], found, raw)
        figures.png(figure, output)


def draw_errors(axis, table):
    columns = [column for column in table[0] if column.startswith("step ")]
    steps = range(1, len(columns) + 1)
    for row in table:
        colour = figures.COLOURS[POLICIES.index(row["actions"])]
        size = [row[column] for column in columns]
        if row["predictor"] == "ensemble":
            axis.plot(steps, size, color=colour, linewidth=2, label=f"{row['actions']} actions")
        elif row["predictor"] != "recording":
            axis.plot(steps, size, color=colour, linewidth=0.6, alpha=0.6)
    axis.set(title=f"{table[0]['data set']}: error", yscale="log", xticks=steps)
    axis.set(xlabel="steps (thick: ensemble, thin: members)", ylabel="std of one-step changes")
    axis.legend()


def draw_penalty(axis, name, found, raw):
    for policy in reversed(POLICIES):
        colour = figures.COLOURS[POLICIES.index(policy)]
        rho = spearman(found[policy].penalty, raw[policy])
        label = f"{policy} actions, {rho:.2f}"
        axis.plot(found[policy].penalty, raw[policy], ".", color=colour, markersize=2, label=label)
    axis.set(title=f"{name}: first step", xscale="log", yscale="log")
    axis.set(xlabel="MOPO's penalty, lambda 1", ylabel="norm of the error")
    axis.legend(title="Spearman's correlation", markerscale=4)


def page(record):
    """The page of a record."""
    lines = ["# Errors of learned dynamics", "", *__doc__.strip().splitlines()[4:], ""]
    facts = {name: fact for name, fact in record.items() if not isinstance(fact, list)}
    lines += [f"- {name}: {fact}" for name, fact in facts.items()]
    lines += [f"- run: {fit}" for fit in record["fits"]]
    lines += ["", f"![errors by step, and penalty against error]({record['figure']})", ""]
    lines += ["## Error", "", *measured.table(record["rows"]), ""]
    lines += ["## Penalty and error", "", *measured.table(record["correlations"])]
    return "\n".join(lines) + "\n"


def fit_of(folder):
    """The command of a run."""
    folder = Path(folder)
    config = yaml_files.of_run(folder)
    command = report.command(readers.Result(folder, config, {"algorithm": "mopo"}, {}))
    return f"`{command}`"


def main(arguments):
    if not arguments.runs:
        fail("give a run folder of mopo.py, or more")
    for flag in ("rows", "steps"):
        if getattr(arguments, flag) < 1:
            fail(f"--{flag} {getattr(arguments, flag)}: must be at least 1")
    output = measured.stem(arguments.output)
    loaded = [experiment.load(mopo, folder) for folder in arguments.runs]
    found = [
        measure(cfg, dataset, jax.tree.map(lambda x: x[0], state), arguments)
        for cfg, dataset, state in loaded
    ]
    record = {
        **measured.facts("model_error.py"),
        "figure": f"{output.name}.png",
        "fits": [fit_of(folder) for folder in arguments.runs],
        "rows": [row for table, *_ in found for row in table],
        "correlations": [row for _, rows, *_ in found for row in rows],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    draw(found, output.with_suffix(".png"))
    measured.write(output, record, page(record))


if __name__ == "__main__":
    command_line.outlive_the_reader()
    main(tyro.cli(Arguments, description=__doc__.splitlines()[0]))

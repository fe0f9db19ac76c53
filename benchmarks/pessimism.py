# SPDX-License-Identifier: Apache-2.0
"""Draw what the number of critics alone does to actions that the data never show.

    python benchmarks/pessimism.py --output pessimism    # writes pessimism.png, .json and .md

SAC-N with 2, 10 and 50 critics on one state that never ends. An action has six components. The
data vary the first one, a_1, and keep the others at 0. Every step has the reward -(a_1 - 0.5)^2,
and in truth costs 1 more once another component exceeds 0.1, which no row shows. So the best value
is 0. What the critics say about the other components comes from their initial parameters. Two
critics often rise in the same direction, the actor follows it, and the bootstrapped target makes
the error ten times larger (the discount is 0.9). The more critics, the rarer a direction in which
all of them rise.

Left: the least of the critics' values at the policy's action, and what this action is truly worth.
Right: the largest of the five components that should be 0. One dot per seed. Ten critics are not
enough: the policy still leaves the data, and the value that they promise is far above the true one.
With 50 the policy stays near the data, and its value is underestimated.
"""

import dataclasses
from functools import partial

import jax
import numpy as np
import tyro

import figures
import measured
from algorithms import sac_n
from common import command_line, datasets, fail

ROWS, ACTIONS, CLIFF = 2000, 6, 0.1


@dataclasses.dataclass(frozen=True)
class Arguments:
    critics: tuple[int, ...] = (2, 10, 50)  # numbers of critics to compare
    seeds: tuple[int, ...] = (0, 1, 2)  # one dot each
    updates: int = 3000  # gradient steps
    width: int = 64  # of both hidden layers
    output: str = "pessimism"  # files to write: this with .png, .json and .md


def narrow_data():
    """Rows whose actions vary in the first component only."""
    rng = np.random.default_rng(6)
    action = np.zeros((ROWS, ACTIONS), np.float32)
    action[:, 0] = rng.uniform(-1, 1, ROWS)
    state, zero = np.ones((ROWS, 1), np.float32), np.zeros(ROWS, np.float32)
    return datasets.Transitions(
        observation=state,
        action=action,
        reward=reward_of(action),
        next_observation=state,
        next_action=action,
        termination=zero,
        truncation=zero,
    )


def reward_of(action):
    """The true reward, [..., 6] -> [...]. The data never show its second term."""
    cliff = largest_unseen(action) > CLIFF
    return (-np.square(action[..., 0] - 0.5) - cliff).astype(np.float32)


def largest_unseen(action):
    """The largest component that the data keep at 0, [..., 6] -> [...]."""
    return np.abs(action[..., 1:]).max(axis=-1)


def train(critics, arguments):
    """(greedy actions [S, 6], their least values [S], config) of all seeds."""
    cfg = sac_n.Config(
        seeds=arguments.seeds,
        num_updates=arguments.updates,
        log_every=arguments.updates,
        batch_size=64,
        actor_learning_rate=1e-3,
        critic_learning_rate=1e-3,
        temperature_learning_rate=1e-2,  # soon there is no entropy in the values
        discount=0.9,
        target_rate=0.05,
        hidden=(arguments.width, arguments.width),
        num_critics=critics,
    )
    data = jax.device_put(narrow_data())
    example = jax.tree.map(lambda x: x[:1], data)

    def one_seed(seed):
        key_init, key_train = jax.random.split(jax.random.key(seed))
        state = sac_n.create_state(key_init, example, cfg)
        state, _ = sac_n.train_chunk(state, key_train, 0, data, cfg)
        act = partial(sac_n.policy, state.actor.apply_fn)
        action = act(state.actor.params, example.observation, None)
        q = state.critic.apply_fn(state.critic.params, example.observation, action)
        return action[0], q.min()

    actions, values = jax.jit(lambda seeds: jax.lax.map(one_seed, seeds))(np.array(cfg.seeds))
    return np.asarray(actions), np.asarray(values), cfg


def measure(arguments):
    """[one row per number of critics and seed]"""
    rows = []
    for critics in arguments.critics:
        actions, values, cfg = train(critics, arguments)
        true_values = reward_of(actions) / (1 - cfg.discount)  # the same action for ever
        unseen = largest_unseen(actions)
        for i, seed in enumerate(arguments.seeds):
            row = {
                "critics": critics,
                "seed": seed,
                "least value": round(float(values[i]), 2),
                "true value": round(float(true_values[i]), 2),
                "largest unseen component": round(float(unseen[i]), 2),
            }
            print(", ".join(f"{name} {x}" for name, x in row.items()), flush=True)
            rows.append(row)
    return rows


def draw(rows, output):
    """Two panels over the number of critics."""
    critics = sorted({row["critics"] for row in rows})
    places = [critics.index(row["critics"]) for row in rows]
    blue, orange, green = figures.COLOURS[:3]
    with figures.panels(2, columns=2, size=(3.6, 2.9)) as (figure, axes):
        for colour, kind in ((blue, "least value"), (orange, "true value")):
            axes[0].plot(places, [row[kind] for row in rows], "o", color=colour, label=kind)
        unseen = [row["largest unseen component"] for row in rows]
        axes[1].plot(places, unseen, "o", color=green)
        axes[1].axhline(CLIFF, color="0.5", linestyle="--", label="the cost begins")
        axes[0].set(title="Value of the policy's action", ylabel="value")
        axes[1].set(title="Largest component that should be 0", ylabel="size", ylim=(0, 1.05))
        for axis in axes:
            axis.set(xlabel="critics", xticks=range(len(critics)), xticklabels=critics)
            axis.legend()
        figures.png(figure, output)


def page(record):
    """The page of a record."""
    text = __doc__.strip().splitlines()[4:]
    alt = "values and actions by number of critics"
    return measured.page("Pessimism by number", text, record, alt)


def main(arguments):
    for flag in ("critics", "seeds"):
        if not getattr(arguments, flag):
            fail(f"--{flag}: name at least one")
    for flag in ("updates", "width", "critics"):
        if np.min(getattr(arguments, flag)) < 1:
            fail(f"--{flag} {getattr(arguments, flag)}: must be at least 1")
    output = measured.stem(arguments.output)
    record = {
        **measured.facts("pessimism.py"),
        "training": f"{arguments.updates:,} updates, two hidden layers of {arguments.width}",
        "figure": f"{output.name}.png",
        "rows": measure(arguments),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    draw(record["rows"], output.with_suffix(".png"))
    measured.write(output, record, page(record))


if __name__ == "__main__":
    command_line.outlive_the_reader()
    main(tyro.cli(Arguments, description=__doc__.splitlines()[0]))

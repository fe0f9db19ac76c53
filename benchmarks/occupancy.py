# SPDX-License-Identifier: Apache-2.0
"""Draw what "distribution correction" is: learned ratios of occupancies beside the exact ones.

    python benchmarks/occupancy.py                    # two minutes of one core
    python benchmarks/occupancy.py --updates 500 --output short.png

A corridor of five cells. An action below 0 moves to the left, one above 0 to the right, and the
walls at both ends hold. A step earns more the further right it begins: 0 in the first cell, 1 in
the last. Nothing ends. The data starts in the first two cells and goes right half of the time.

The occupancy of a policy is how often it takes each (cell, direction), discounted. The ratio w of
its occupancy to that of the data is what the DICE methods learn, each by a dual problem of its own.
The corridor is so small that every ratio is known:

- OptiDICE: of the policy with the highest return minus alpha times the chi-square divergence.
- ODICE with its true gradient: the same with other starts, the states of the data, when lambda is
  1 / (2 - gamma). Its orthogonal gradient follows another objective, and the panel shows how far
  its weights are from that ratio.
- AlgaeDICE: of a given policy, here one that turns back in the fourth cell, by its critic loss with
  online_share 1 of the paper. Its own policy is left out: the loss samples one next action, and
  where a policy has several that differ in value, this biases the ratio towards the better ones.
- Diffusion-DICE: of another kind. Its dual has no gradient through V(s'), so w is how much more
  likely the regularised policy is to take an action than the data, with the mean 1 in each cell.
"""

import argparse
import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import figures
from algorithms import algaedice, diffusion_dice, odice, optidice
from common import command_line, datasets

ROOT = Path(__file__).resolve().parents[1]
CELLS = 5
DISCOUNT = 0.9
EPISODES, STEPS = 200, 20
ALPHA = 0.25  # weight of the chi-square divergence (w - 1)^2 / 2
DIRECTIONS = ("left", "right")
RIGHT = np.array([1.0, 1.0, 1.0, 0.0, 0.0])  # AlgaeDICE's policy goes left from the fourth cell on
NETS = {"hidden": (32, 32), "batch_size": 128, "discount": DISCOUNT}


@dataclasses.dataclass(frozen=True)
class Corridor:
    """The data, and what it says of the corridor: everything that an exact ratio needs."""

    dataset: datasets.Dataset
    cell: np.ndarray  # [N]
    direction: np.ndarray  # [N] 0 is left
    occupancy: np.ndarray  # [CELLS, 2] share of the rows
    starts: np.ndarray  # [CELLS] share of the episodes


def move(cell, direction):
    return np.clip(cell + 2 * direction - 1, 0, CELLS - 1)


def reward(cell):
    return np.float32(cell / (CELLS - 1))


def corridor(seed=0):
    """Episodes of a policy that goes right half of the time."""
    rng = np.random.default_rng(seed)
    cells = np.zeros((EPISODES, STEPS + 1), int)
    cells[:, 0] = np.arange(EPISODES) % 2
    directions = (rng.random((EPISODES, STEPS)) < 0.5).astype(int)
    for step in range(STEPS):
        cells[:, step + 1] = move(cells[:, step], directions[:, step])
    cell, direction = cells[:, :-1].ravel(), directions.ravel()

    size = rng.uniform(0.4, 1.0, len(cell))  # an action is a direction with some length
    action = np.float32(np.where(direction == 1, size, -size))[:, None]
    one_hot = np.eye(CELLS, dtype=np.float32)
    nothing = np.zeros(len(cell), np.float32)
    last = np.float32(np.arange(len(cell)) % STEPS == STEPS - 1)
    transitions = datasets.Transitions(
        observation=one_hot[cell],
        action=action,
        reward=reward(cell),
        next_observation=one_hot[move(cell, direction)],
        next_action=action,  # read by none of the methods
        termination=nothing,
        truncation=last,
    )
    ends = STEPS * np.arange(1, EPISODES + 1)
    returns = transitions.reward.reshape(EPISODES, STEPS).sum(axis=1)
    occupancy, starts = np.zeros((CELLS, 2)), np.zeros(CELLS)
    np.add.at(occupancy, (cell, direction), 1 / len(cell))
    np.add.at(starts, cells[:, 0], 1 / EPISODES)
    dataset = datasets.Dataset("corridor", transitions, ends, returns.astype(np.float64))
    return Corridor(dataset, cell, direction, occupancy, starts)


# --- Exact ratios -------------------------------------------------------------------------------
def best_ratio(world, starts, alpha):
    """w [CELLS, 2] of the policy with the best return - alpha E_data[(w - 1)^2 / 2].

    Newton steps on the dual, a convex function of one value for each cell:
    (1 - gamma) E[nu(s0)] + E_data[w e - alpha (w - 1)^2 / 2] with w = max(0, 1 + e / alpha).
    """
    cell, direction = np.divmod(np.arange(2 * CELLS), 2)
    one_hot = np.eye(CELLS)
    flow = DISCOUNT * one_hot[move(cell, direction)] - one_hot[cell]  # e = reward + flow nu
    share, earned = world.occupancy.ravel(), cell / (CELLS - 1)

    def dual(nu):
        residual = earned + flow @ nu
        ratio = np.maximum(0, 1 + residual / alpha)
        value = (1 - DISCOUNT) * starts @ nu
        return value + share @ (ratio * residual - alpha * (ratio - 1) ** 2 / 2), ratio

    nu = np.zeros(CELLS)
    for _ in range(200):
        value, ratio = dual(nu)
        gradient = (1 - DISCOUNT) * starts + flow.T @ (share * ratio)
        curvature = flow.T @ ((share * (ratio > 0) / alpha)[:, None] * flow)
        step = np.linalg.solve(curvature + 1e-9 * np.eye(CELLS), gradient)
        size = 1.0
        while size > 1e-9 and dual(nu - size * step)[0] > value:
            size /= 2
        nu = nu - size * step
    return dual(nu)[1].reshape(CELLS, 2)


def policy_ratio(world, right):
    """w [CELLS, 2] of the policy that goes right with probability `right` [CELLS]."""
    chance = np.stack([1 - right, right], axis=1)  # [CELLS, 2]
    transition = np.zeros((CELLS, CELLS))
    for direction in (0, 1):
        after = move(np.arange(CELLS), direction)
        np.add.at(transition, (np.arange(CELLS), after), chance[:, direction])
    visits = np.linalg.solve(np.eye(CELLS) - DISCOUNT * transition.T, (1 - DISCOUNT) * world.starts)
    return visits[:, None] * chance / world.occupancy


def best_action_ratio(world, alpha):
    """w [CELLS, 2], pi(a|s) over the data's, of the solution of Diffusion-DICE's dual.

    w = 1 + y / 2 from y = (Q - V) / alpha = 0 on and e^y below; V(s) is where the mean of w over
    the data's actions is 1, found by bisection; Q = r + gamma V(s'), by value iteration.
    """
    share = world.occupancy / world.occupancy.sum(axis=1, keepdims=True)
    cell, value = np.arange(CELLS), np.zeros(CELLS)
    after = np.stack([move(cell, 0), move(cell, 1)], axis=1)

    def ratio(q, value):
        y = (q - value[:, None]) / alpha
        return np.where(y >= 0, 1 + y / 2, np.exp(np.minimum(y, 0)))

    for _ in range(200):
        q = reward(cell)[:, None] + DISCOUNT * value[after]
        low, high = q.min(axis=1), q.max(axis=1)
        for _ in range(50):
            value = (low + high) / 2
            is_low = (share * ratio(q, value)).sum(axis=1) > 1
            low, high = np.where(is_low, value, low), np.where(is_low, high, value)
    return ratio(q, value)


# --- Learned ratios -----------------------------------------------------------------------------
def train(module, cfg, data, seed=0, change=lambda state: state):
    """The state of one seed after `log_every` updates. `change` may alter the first state."""
    key_init, key_train = jax.random.split(jax.random.key(seed))
    example = jax.tree.map(lambda x: x[:1], data)
    create = partial(module.create_state, cfg=cfg)
    if module is not algaedice:  # XLA can hang on its QR decompositions
        create = jax.jit(create)
    state = change(create(key_init, example))
    chunk = jax.jit(partial(module.train_chunk, cfg=cfg))
    return chunk(state, key_train, 0, jax.device_put(data))[0]


def by_direction(world, ratio):
    """Mean over the rows of each (cell, direction), [CELLS, 2]."""
    total = np.zeros((CELLS, 2))
    np.add.at(total, (world.cell, world.direction), np.asarray(ratio, np.float64))
    return total / (len(world.cell) * world.occupancy)


def learn_optidice(world, updates):
    """(exact ratio, learned ratio)"""
    cfg = optidice.Config(
        **NETS,
        log_every=updates,
        learning_rate=2e-3,
        f="chi2",
        alpha=ALPHA,
        extraction="wbc",  # without a behaviour model: the ratio is all that is asked for
        absorbing_state="none",
    )
    data = optidice.with_starts(world.dataset, world.dataset.transitions)
    state = train(optidice, cfg, data)
    residual = state.residual_net.apply_fn(state.residual_net.params, data.observation, data.action)
    ratio = optidice.ratio(optidice.normalised_residual(residual, state, cfg), cfg)
    return best_ratio(world, world.starts, cfg.alpha), by_direction(world, ratio)


def learn_odice(world, updates, gradient="true"):
    """(exact ratio, learned ratio)"""
    cfg = odice.Config(
        **NETS,
        log_every=updates,
        value_hidden=(32, 32),
        value_learning_rate=2e-3,
        layer_norm=False,
        gradient=gradient,
        lam=1 / (2 - DISCOUNT),  # so that (1 - lambda) / lambda = 1 - gamma
        alpha=ALPHA / 2,  # its divergence is (w - 1)^2
    )
    data = world.dataset.transitions
    state = train(odice, cfg, data)
    residual = odice.full_residual if gradient == "true" else odice.forward_residual
    found = residual(state.value_net.params, state, data, cfg).mean(axis=0)  # [K, N] -> [N]
    ratio = np.maximum(0, 1 + np.asarray(found) / cfg.alpha / 2)  # the derivative of the conjugate
    starts = world.occupancy.sum(axis=1)  # in place of the episodes' starts
    return best_ratio(world, starts, ALPHA), by_direction(world, ratio)


def turning_back(state):
    """AlgaeDICE's state with an actor that follows `RIGHT`, and no reward for entropy."""
    params = jax.tree.map(np.zeros_like, state.actor.params)
    layers = params["params"]
    layers["Dense_0"]["kernel"][RIGHT == 0, 0] = 1.0  # one hidden unit is 1 where it goes left
    layers["Dense_1"]["kernel"][0, 0] = 1.0
    layers["Dense_2"]["kernel"][0, 0] = -1.4
    layers["Dense_2"]["bias"][:] = (0.7, -10.0)  # the mean to the right, and the least std
    temperature = {"log": np.float32(-20.0)}
    return state._replace(
        actor=state.actor.replace(params=params),
        log_temperature=state.log_temperature.replace(params=temperature),
    )


def learn_algaedice(world, updates):
    """(exact ratio, learned ratio)"""
    cfg = algaedice.Config(
        **NETS,
        log_every=updates,
        actor_learning_rate=0.0,
        temperature_learning_rate=0.0,
        alpha=0.5,
        exponent=2.0,
        online_share=1.0,
    )
    data = algaedice.with_starts(world.dataset, world.dataset.transitions)
    state = train(algaedice, cfg, data, change=turning_back)

    @jax.jit
    def residual(state, data):
        noise = jnp.zeros_like(data.action)  # the std of this policy is 0.007
        action, log_prob = algaedice.sample_policy(state.actor, data.next_observation, noise)
        return algaedice.bellman_residual(state.critic.params, state, data, action, log_prob, cfg)

    found = np.asarray(residual(state, data)).mean(axis=0)  # [K, N] -> [N]
    ratio = found.clip(0.0) / cfg.alpha  # f'(delta) / alpha
    return policy_ratio(world, RIGHT), by_direction(world, ratio)


def learn_diffusion_dice(world, updates):
    """(exact ratio, learned ratio)"""
    cfg = diffusion_dice.Config(
        **NETS,
        log_every=updates,
        critic_learning_rate=2e-3,
        weight_decay=0.0,
        alpha=ALPHA / 2,  # its divergence is (w - 1)^2 above 1
        actor_hidden=(8,),  # neither trains before nor has a part in w, as the next three
        guidance_hidden=(8,),
        noisy_copies=1,
        num_choosers=None,
    )
    data = world.dataset.transitions
    state = train(diffusion_dice, cfg, data)
    y, _ = diffusion_dice.scaled_advantage(state.value_net.params, state, data, cfg)
    return best_action_ratio(world, cfg.alpha), by_direction(world, diffusion_dice.weight_of(y))


METHODS = {  # title -> function of (world, updates)
    "OptiDICE": learn_optidice,
    "ODICE, true gradient": learn_odice,
    "ODICE, orthogonal gradient": partial(learn_odice, gradient="orthogonal"),
    "AlgaeDICE": learn_algaedice,
    "Diffusion-DICE": learn_diffusion_dice,
}


def error(world, exact, learned):
    """Mean absolute difference over the data."""
    return float((world.occupancy * np.abs(learned - exact)).sum())


# --- Figure -------------------------------------------------------------------------------------
def draw(world, found, output):
    """A panel with the two occupancies, then one per method: lines exact, dots learned."""
    cells = np.arange(1, CELLS + 1)
    with figures.panels(1 + len(found), size=(3.4, 2.8)) as (figure, axes):
        best = found["OptiDICE"][0] * world.occupancy
        axes[0].bar(cells - 0.2, world.occupancy.sum(axis=1), 0.4, color="0.6", label="data")
        label, colour = "best regularised policy", figures.COLOURS[2]
        axes[0].bar(cells + 0.2, best.sum(axis=1), 0.4, color=colour, label=label)
        axes[0].set(title="occupancy of the cells", xlabel="cell", ylabel="share")
        for axis, (title, (exact, learned)) in zip(axes[1:], found.items(), strict=True):
            for i, direction in enumerate(DIRECTIONS):
                colour = figures.COLOURS[1 - i]
                axis.plot(cells, exact[:, i], color=colour, label=f"{direction}, exact")
                label = f"{direction}, learned"
                axis.plot(cells, learned[:, i], figures.MARKERS[i], color=colour, label=label)
            off = error(world, exact, learned)
            axis.set(title=f"{title}: {off:.2f} off", xlabel="cell", ylabel="ratio w")
        figures.legend(figure, axes)
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=150)
    print(f"wrote {output}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--updates", default=10_000, type=int)
    parser.add_argument("--output", default=ROOT / "benchmarks/results/occupancy.png", type=Path)
    args = parser.parse_args(argv)
    world, found = corridor(), {}
    for title, learn in METHODS.items():
        found[title] = exact, learned = learn(world, args.updates)
        mean = (world.occupancy * learned).sum()
        print(
            f"{title}: mean error {error(world, exact, learned):.3f}, mean ratio {mean:.3f}, "
            f"largest exact ratio {exact.max():.2f}"
        )
    draw(world, found, args.output)


if __name__ == "__main__":
    command_line.outlive_the_reader()
    main()

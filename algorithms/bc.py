# SPDX-License-Identifier: Apache-2.0
"""BC: behaviour cloning. With --fraction 0.1 it is 10%BC, which clones the best episodes only.

Paper       https://arxiv.org/abs/2106.01345 (%BC, Section 5.1)
Reference   https://github.com/corl-team/CORL (algorithms/offline/any_percent_bc.py)
Run         python algorithms/bc.py --config configs/bc/mujoco.yaml
Parent      none
Results     docs/results.md
Deviations  CORL cuts episodes every 1000 rows and at terminals, so on AntMaze it ranks segments
            that end at the goal. This file ranks whole episodes, and of two with the same return
            it prefers the shorter one. Integer actions are an addition. Rows at a truncation are
            kept if their next observation is known.

Shapes: S seeds, B batch, E episodes, O observation, A action. Arrays are float32.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state

from common import datasets, evaluation, experiment


# --- Config -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    dataset: str = "local/pointmaze/umaze-v0"  # data set id or path, see docs/data.md
    seeds: tuple[int, ...] = (0,)  # trained in parallel
    num_updates: int = 1_000_000  # gradient steps
    log_every: int = 1_000  # updates per compiled chunk, the unit of logging and saving
    eval_every: int = 20_000  # updates between evaluations
    eval_episodes: int = 10  # episodes per seed and evaluation
    batch_size: int = 256  # transitions per update
    actor_learning_rate: float = 3e-4  # Adam
    hidden: tuple[int, ...] = (256, 256)  # widths of the actor
    # BC
    fraction: float = 1.0  # X of X%BC, the share of the data to clone: the episodes of best return
    fraction_of: Literal["episodes", "transitions"] = "episodes"  # what `fraction` is a share of


# --- Networks -----------------------------------------------------------------------------------
def fan_in_uniform():
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # U(±1 / sqrt(fan in))


def uniform(bound):
    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def linear(fan_in, width):  # PyTorch's default initialisation
    return nn.Dense(width, kernel_init=fan_in_uniform(), bias_init=uniform(fan_in**-0.5))


class TanhActor(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, observation):  # [..., O] -> [..., A]
        x = observation
        for width in self.hidden:
            x = nn.relu(linear(x.shape[-1], width)(x))
        head = linear(x.shape[-1], self.action_dim)
        return jnp.tanh(head(x))


class MLP(nn.Module):
    hidden: tuple[int, ...]
    outputs: int

    @nn.compact
    def __call__(self, observation):  # [..., O] -> [..., outputs]
        x = observation
        for width in self.hidden:
            x = nn.relu(linear(x.shape[-1], width)(x))
        return linear(x.shape[-1], self.outputs)(x)


# --- State --------------------------------------------------------------------------------------
class State(NamedTuple):
    actor: train_state.TrainState
    statistics: tuple[jax.Array, jax.Array]  # mean and std of the observations, [O] each


def normalise(data):
    """The data with observations of mean 0 and std 1, and that mean and std, [O] each."""
    mean = data.observation.mean(axis=0, dtype=float)
    std = data.observation.std(axis=0, dtype=float) + 1e-3
    observation = (data.observation - mean) / std
    next_observation = (data.next_observation - mean) / std
    data = data._replace(
        observation=observation.astype("float32"),
        next_observation=next_observation.astype("float32"),
    )
    return data, (mean, std)


def standardise(observation, statistics):
    """(observation - mean) / std, [..., O], with the statistics of the data."""
    mean = jnp.broadcast_to(statistics[0], observation.shape)
    std = jnp.broadcast_to(statistics[1], observation.shape)
    return (observation - mean) / std


def create_state(key, batch, cfg, statistics=(0.0, 1.0), num_actions=None):
    """State of one seed before the first update. `batch` supplies shapes only."""
    if num_actions is None:
        actor = TanhActor(cfg.hidden, action_dim=batch.action.shape[-1])
    else:
        actor = MLP(cfg.hidden, outputs=num_actions)  # logits

    actor_params = actor.init(key, batch.observation)
    actor_adam = optax.adam(cfg.actor_learning_rate)
    mean, std = statistics
    observation_shape = batch.observation.shape[-1:]
    return State(
        actor=train_state.TrainState.create(
            apply_fn=actor.apply, params=actor_params, tx=actor_adam
        ),
        statistics=(
            jnp.broadcast_to(mean, observation_shape),
            jnp.broadcast_to(std, observation_shape),
        ),
    )


# --- Losses -------------------------------------------------------------------------------------
def actor_loss(params, state, batch, cfg):
    """(pi(s) - a)^2, mean over B and A; for integer actions -log softmax(logits)[a], over B."""
    output = state.actor.apply_fn(params, batch.observation)
    if batch.action.ndim == 1:  # integer actions [B], output: logits [B, num_actions]
        error = optax.softmax_cross_entropy_with_integer_labels(output, batch.action)  # [B]
    else:  # actions and output: [B, A]
        chex.assert_equal_shape([output, batch.action])
        error = jnp.square(output - batch.action).mean(axis=-1)  # [B]
    chex.assert_equal_shape([error, batch.reward])
    loss = error.mean()
    return loss, {"actor_loss": loss}


# --- Update -------------------------------------------------------------------------------------
def update(state, step, key, data, cfg):
    """One gradient step of the actor on one batch. One seed.

    Randomness is a function of (key, step) alone, so neither the length of a chunk nor a resumed
    run changes the result. The key of a step is fold_in(key, step).
    """
    key_batch = jax.random.fold_in(key, step)
    batch = sample_batch(data, key_batch, cfg)
    grads, metrics = jax.grad(actor_loss, has_aux=True)(state.actor.params, state, batch, cfg)
    state = state._replace(actor=state.actor.apply_gradients(grads=grads))
    return state, metrics


def sample_batch(data, key, cfg):
    """`batch_size` rows of the data, drawn with replacement."""
    index = jax.random.randint(key, (cfg.batch_size,), 0, len(data.reward))
    return jax.tree.map(lambda column: column[index], data)


def train_chunk(state, key, start, data, cfg):
    """`log_every` updates of one seed, compiled as one program. Metrics are chunk means."""
    steps = start + jnp.arange(cfg.log_every)
    state, metrics = jax.lax.scan(partial(update, key=key, data=data, cfg=cfg), state, steps)
    return state, jax.tree.map(jnp.mean, metrics)


# --- Policy -------------------------------------------------------------------------------------
def policy(apply_fn, params, observation, key, discrete=False):
    """Action in [-1, 1], [..., O] -> [..., A]; if `discrete`, the most likely integer, [...].

    `key` is not used.
    """
    actor_params, statistics = params
    output = apply_fn(actor_params, standardise(observation, statistics))
    if discrete:
        return output.argmax(axis=-1)
    return output


def policy_params(state):
    return state.actor.params, state.statistics


def policy_fn(state, cfg, num_actions=None):
    """`policy` with the networks filled in: (params, observation, key) -> action."""
    return partial(policy, state.actor.apply_fn, discrete=num_actions is not None)


# --- Training -----------------------------------------------------------------------------------
def train(cfg, options):
    """Train every seed of `cfg` and return its final normalised scores, [S]."""
    experiment.check(cfg, options)
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps, actions="any")
    kept = datasets.filter_by_return(dataset, cfg.fraction, cfg.fraction_of)
    if cfg.fraction < 1:
        print(f"kept {len(kept.episode_ends)} of {len(dataset.episode_ends)} episodes")
    data, statistics = normalise(kept.transitions)
    data = experiment.place(data, options)
    example = jax.tree.map(lambda x: x[:1], data)  # one row, for its shapes
    init_keys, train_keys, policy_keys = experiment.streams(cfg.seeds, 3)  # [S] keys each
    create = partial(
        create_state,
        batch=example,
        cfg=cfg,
        statistics=statistics,
        num_actions=dataset.num_actions,
    )
    state = jax.vmap(create)(init_keys)
    # Compiled once for all seeds. `update` shows which rows a step reads, for --data host.
    train_seeds = experiment.over_seeds(partial(train_chunk, cfg=cfg), update=update)
    act = policy_fn(state, cfg, dataset.num_actions)

    with (
        experiment.Run(cfg, options, dataset) as run,
        evaluation.Rollouts(dataset, act, policy_keys, cfg) as rollouts,
    ):
        state, metrics, start = run.restore(state)
        for step in run.boundaries(start):  # start, start + log_every, ..., num_updates
            run.save(step, state, metrics)
            scores = None
            if run.evaluates(step):
                scores = rollouts.start(policy_params(state), step)
            last_metrics = metrics  # of the chunk that ended at this step
            if step < cfg.num_updates:  # an accelerator trains while the CPU evaluates
                state, metrics = train_seeds(state, train_keys, step, data)
            run.log(step, last_metrics, scores)
    return run.scores


if __name__ == "__main__":
    train(*experiment.parse(Config))

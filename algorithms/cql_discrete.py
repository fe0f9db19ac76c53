# SPDX-License-Identifier: Apache-2.0
"""CQL for integer actions (Kumar et al., 2020): double DQN, pushed down where data show nothing.

Paper       https://arxiv.org/abs/2006.04779
Reference   https://github.com/aviralkumar2907/CQL (atari), https://github.com/takuseno/d3rlpy
Run         python algorithms/cql_discrete.py --config configs/cql_discrete/classic.yaml
Parent      none
Results     benchmarks/results
Deviations  the paper's Atari code has a quantile network (QR-DQN, 200 quantiles) over images; this
            is its form over vectors, on double DQN with plain Q values and Huber error, as in
            d3rlpy. Rows at a truncation are kept where their next observation is known.

Shapes: S seeds, B batch, E episodes, O observation, A number of actions.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

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
    dataset: str = "local/cartpole/mixed-v0"  # data set id or path, see common/datasets.py
    seeds: tuple[int, ...] = (0,)  # trained in parallel
    num_updates: int = 100_000  # gradient steps
    log_every: int = 1_000  # updates per compiled chunk, the unit of logging and saving
    eval_every: int = 10_000  # updates between evaluations
    eval_episodes: int = 10  # episodes per seed and evaluation
    batch_size: int = 256  # transitions per update
    critic_learning_rate: float = 3e-4  # Adam
    discount: float = 0.99  # gamma, per environment step
    target_every: int = 2_000  # updates between copies to the target network
    hidden: tuple[int, ...] = (256, 256)  # widths of the critic
    # CQL
    alpha: float = 1.0  # weight of the conservative term, Eq. 4


# --- Networks -----------------------------------------------------------------------------------
def fan_in_uniform():
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # U(±1 / sqrt(fan in))


def uniform(bound):
    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def linear(fan_in, width):  # PyTorch's default
    return nn.Dense(width, kernel_init=fan_in_uniform(), bias_init=uniform(fan_in**-0.5))


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
class TrainState(train_state.TrainState):
    target_params: Any  # Polyak average of params

    @classmethod
    def create(cls, apply_fn, params, tx):
        # The targets are a copy: params and targets are donated, so they must not share buffers.
        target = jax.tree.map(jnp.copy, params)
        return super().create(apply_fn=apply_fn, params=params, target_params=target, tx=tx)


class State(NamedTuple):
    critic: TrainState  # of all actions at once, target_params is a copy


def create_state(key, batch, cfg, num_actions=2):
    """State of one seed before the first update. `batch` supplies shapes only."""
    critic, adam = MLP(cfg.hidden, num_actions), optax.adam(cfg.critic_learning_rate)
    return State(TrainState.create(critic.apply, critic.init(key, batch.observation), adam))


# --- Losses -------------------------------------------------------------------------------------
def critic_loss(params, state, batch, cfg):
    """Huber TD error to the double-Q target plus alpha (log sum_a exp Q(s, a) - Q(s, a_data))."""
    every_q = state.critic.apply_fn(params, batch.observation)  # [B, A]
    q = jnp.take_along_axis(every_q, batch.action[:, None], axis=-1).squeeze(-1)  # [B]
    best = state.critic.apply_fn(params, batch.next_observation).argmax(axis=-1)
    next_q = state.critic.apply_fn(state.critic.target_params, batch.next_observation)
    next_q = jnp.take_along_axis(next_q, best[:, None], axis=-1).squeeze(-1)
    # Bootstrap through truncations, never through terminations.
    target = batch.reward + cfg.discount * (1.0 - batch.termination) * next_q
    difference = jax.nn.logsumexp(every_q, axis=-1) - q
    chex.assert_equal_shape([q, target, difference])
    td_error = optax.huber_loss(q, jax.lax.stop_gradient(target)).mean()
    loss = td_error + cfg.alpha * difference.mean()
    metrics = {"critic_loss": loss, "td_error": td_error, "q": q.mean()}
    return loss, metrics | {"penalty": difference.mean()}


# --- Update -------------------------------------------------------------------------------------
def update(state, step, key, data, cfg):
    """One gradient step, and every `target_every` of them a copy to the target. One seed.

    Randomness is a function of (key, step) alone, so neither the length of a chunk nor a resumed
    run changes the result. `key` is folded with the step, never split.
    """
    key_batch = jax.random.fold_in(key, step)
    batch = sample_batch(data, key_batch, cfg)
    grads, metrics = jax.grad(critic_loss, has_aux=True)(state.critic.params, state, batch, cfg)
    critic = state.critic.apply_gradients(grads=grads)
    target = optax.periodic_update(
        critic.params, critic.target_params, critic.step, cfg.target_every
    )
    return State(critic.replace(target_params=target)), metrics


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
def policy(apply_fn, params, observation, key):
    """The integer action of highest Q, [..., O] -> [...]. `key` is not used."""
    return apply_fn(params, observation).argmax(axis=-1)


def policy_params(state):
    return state.critic.params


# --- Training -----------------------------------------------------------------------------------
def train(cfg, options):
    """Train every seed of `cfg` and return its final normalised scores, [S]."""
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps, actions="discrete")
    data = experiment.place(dataset.transitions, options)
    example = jax.tree.map(lambda x: x[:1], data)
    init_keys, train_keys, policy_keys = experiment.streams(cfg.seeds, 3)  # [S] each
    create = partial(create_state, batch=example, cfg=cfg, num_actions=dataset.num_actions)
    state = jax.vmap(create)(init_keys)
    # Compiled once for all seeds. `update` shows which rows a step reads, for --data host.
    train_seeds = experiment.over_seeds(partial(train_chunk, cfg=cfg), update=update)
    act = partial(policy, state.critic.apply_fn)

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

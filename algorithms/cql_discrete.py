# SPDX-License-Identifier: Apache-2.0
"""CQL for integer actions (Kumar et al., 2020): double DQN with low values off the data.

Paper       https://arxiv.org/abs/2006.04779
Reference   https://github.com/aviralkumar2907/CQL (atari), https://github.com/takuseno/d3rlpy
Run         python algorithms/cql_discrete.py --config configs/cql_discrete/classic.yaml
Parent      none
Results     docs/results.md
Deviations  The authors' Atari code has a quantile network (QR-DQN, 200 quantiles) over images. Here
            observations are vectors, and the method stands on double DQN with plain Q values and a
            Huber error, as in d3rlpy. The target critic is copied first after update
            `target_every`; d3rlpy's also after the first update. Rows at a truncation are kept
            where their next observation is known.

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
    dataset: str = "local/cartpole/mixed-v0"  # data set id or path, see docs/data.md
    seeds: tuple[int, ...] = (0,)  # trained in parallel
    num_updates: int = 100_000  # gradient steps
    log_every: int = 1_000  # updates per compiled chunk, the unit of logging and saving
    eval_every: int = 10_000  # updates between evaluations
    eval_episodes: int = 10  # episodes per seed and evaluation
    batch_size: int = 256  # transitions per update
    critic_learning_rate: float = 3e-4  # Adam
    discount: float = 0.99  # gamma, per environment step
    target_every: int = 2_000  # updates between copies of the critic to the target critic
    hidden: tuple[int, ...] = (256, 256)  # widths of the critic
    # CQL
    alpha: float = 1.0  # weight of the conservative gap: log sum exp Q(s, .) - Q(s, a), Eq. 4


# --- Networks -----------------------------------------------------------------------------------
def fan_in_uniform():
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # U(±1 / sqrt(fan in))


def uniform(bound):
    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def linear(fan_in, width):  # PyTorch's default initialisation
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
    target_params: Any  # slow copy of params

    @classmethod
    def create(cls, apply_fn, params, tx):
        # A copy: JAX reuses the memory of the old state, so params and targets must not share any.
        target = jax.tree.map(jnp.copy, params)
        return super().create(apply_fn=apply_fn, params=params, target_params=target, tx=tx)


class State(NamedTuple):
    critic: TrainState  # Q of all actions; target_params is copied every `target_every` updates


def create_state(key, batch, cfg, num_actions=2):
    """State of one seed before the first update. `batch` supplies shapes only."""
    critic = MLP(cfg.hidden, outputs=num_actions)
    critic_params = critic.init(key, batch.observation)
    critic_adam = optax.adam(cfg.critic_learning_rate)
    return State(critic=TrainState.create(critic.apply, critic_params, critic_adam))


# --- Losses -------------------------------------------------------------------------------------
def critic_loss(params, state, batch, cfg):
    """Huber error to the double-Q target + alpha (log sum_a~ exp Q(s, a~) - Q(s, a)). Eq. 4."""
    # Double DQN: the critic chooses the next action, the target critic values it.
    next_action = state.critic.apply_fn(params, batch.next_observation).argmax(axis=-1)  # [B]
    next_q = state.critic.apply_fn(state.critic.target_params, batch.next_observation)  # [B, A]
    next_q = jnp.take_along_axis(next_q, next_action[:, None], axis=-1).squeeze(-1)  # [B]
    # Bootstrap through truncations, never through terminations.
    target = batch.reward + cfg.discount * (1.0 - batch.termination) * next_q  # [B]
    target = jax.lax.stop_gradient(target)

    all_q = state.critic.apply_fn(params, batch.observation)  # [B, A]
    q = jnp.take_along_axis(all_q, batch.action[:, None], axis=-1).squeeze(-1)  # [B]
    conservative_gap = jax.nn.logsumexp(all_q, axis=-1) - q  # [B]
    chex.assert_equal_shape([q, target, conservative_gap])

    td_error = optax.huber_loss(q, target).mean()
    conservative_loss = cfg.alpha * conservative_gap.mean()
    loss = td_error + conservative_loss
    metrics = {"critic_loss": loss, "td_error": td_error, "q": q.mean()}
    return loss, metrics | {"conservative_gap": conservative_gap.mean()}


# --- Update -------------------------------------------------------------------------------------
def update(state, step, key, data, cfg):
    """One gradient step; after every `target_every` of them the target critic is copied. One seed.

    Randomness is a function of (key, step) alone, so neither the length of a chunk nor a resumed
    run changes the result. The key of a step is fold_in(key, step).
    """
    key_batch = jax.random.fold_in(key, step)
    batch = sample_batch(data, key_batch, cfg)
    grads, metrics = jax.grad(critic_loss, has_aux=True)(state.critic.params, state, batch, cfg)
    critic = state.critic.apply_gradients(grads=grads)
    # A copy, not a Polyak average: the target critic stays as it is in between.
    target_params = optax.periodic_update(
        critic.params, critic.target_params, critic.step, cfg.target_every
    )
    return State(critic=critic.replace(target_params=target_params)), metrics


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


def policy_fn(state, cfg):
    """`policy` with the networks filled in: (params, observation, key) -> action."""
    return partial(policy, state.critic.apply_fn)


# --- Training -----------------------------------------------------------------------------------
def train(cfg, options):
    """Train every seed of `cfg` and return its final normalised scores, [S]."""
    experiment.check(cfg, options)
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps, actions="discrete")
    data = experiment.place(dataset.transitions, options)
    example = jax.tree.map(lambda x: x[:1], data)  # one row, for its shapes
    init_keys, train_keys, policy_keys = experiment.streams(cfg.seeds, 3)  # [S] keys each
    create = partial(create_state, batch=example, cfg=cfg, num_actions=dataset.num_actions)
    state = jax.vmap(create)(init_keys)
    # Compiled once for all seeds. `update` shows which rows a step reads, for --data host.
    train_seeds = experiment.over_seeds(partial(train_chunk, cfg=cfg), update=update)
    act = policy_fn(state, cfg)

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

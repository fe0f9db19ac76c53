# SPDX-License-Identifier: Apache-2.0
"""TD3+BC (Fujimoto & Gu, 2021): TD3 whose actor also clones the data, at a fixed exchange rate.

Paper       https://arxiv.org/abs/2106.06860
Reference   https://github.com/sfujim/TD3_BC
Run         python algorithms/td3_bc.py --config configs/td3_bc/mujoco.yaml
Parent      none
Results     benchmarks/results
Deviations  none known from the code (Eq. 5 averages |Q| over the data's actions, the code over the
            policy's). Data with recorded next observations keep the rows at a truncation, which
            D4RL's loader drops.

Shapes: S seeds, K critics, B batch, E episodes, O observation, A action. Arrays are float32.
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
    dataset: str = "local/pointmaze/umaze-v0"  # data set id or path, see common/datasets.py
    seeds: tuple[int, ...] = (0,)  # trained side by side, one lane each
    num_updates: int = 1_000_000  # critic gradient steps
    log_every: int = 1_000  # updates per compiled chunk: one row of metrics, the border to save at
    eval_every: int = 20_000  # updates between evaluations
    eval_episodes: int = 10  # episodes per seed and evaluation
    batch_size: int = 256  # transitions per update
    actor_learning_rate: float = 3e-4  # Adam
    critic_learning_rate: float = 3e-4  # Adam
    discount: float = 0.99  # gamma, per environment step
    target_rate: float = 0.005  # tau, Polyak step of the target networks
    policy_delay: int = 2  # critic updates per actor and target update
    target_noise: float = 0.2  # std of the target policy smoothing noise, in action units
    target_noise_clip: float = 0.5  # bound on that noise, in action units
    hidden: tuple[int, ...] = (256, 256)  # widths of actor and critics
    num_critics: int = 2  # K, the target is their minimum
    reward_shift: float = 0.0  # added to data set rewards (AntMaze: -1)
    # TD3+BC
    alpha: float = 2.5  # weight of Q / mean |Q| beside the mean of (pi(s) - a)^2, Eqs. 3, 5


# --- Networks -----------------------------------------------------------------------------------
def fan_in_uniform():
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # U(±1 / sqrt(fan in))


def uniform(bound):
    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def linear(fan_in, width):  # PyTorch's default
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


class Critic(nn.Module):
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, observation, action):  # [..., O], [..., A] -> [...]
        x = jnp.concatenate([observation, action], axis=-1)
        for width in self.hidden:
            x = nn.relu(linear(x.shape[-1], width)(x))
        return linear(x.shape[-1], 1)(x).squeeze(-1)


# --- State --------------------------------------------------------------------------------------
class TrainState(train_state.TrainState):
    target_params: Any  # Polyak average of params

    @classmethod
    def create(cls, apply_fn, params, tx):
        # The targets are a copy: params and targets are donated, so they must not share buffers.
        target = jax.tree.map(jnp.copy, params)
        return super().create(apply_fn=apply_fn, params=params, target_params=target, tx=tx)


class State(NamedTuple):
    actor: TrainState
    critic: TrainState  # every array has a leading [K] axis
    statistics: tuple[jax.Array, jax.Array]  # mean and std of the observations, [O] each


def normalise(data):
    """The data with observations of mean 0 and std 1, and that mean and std."""
    x = data.observation
    mean, std = x.mean(axis=0, dtype=float), x.std(axis=0, dtype=float) + 1e-3
    x, next_x = (((x - mean) / std).astype("float32") for x in (x, data.next_observation))
    return data._replace(observation=x, next_observation=next_x), (mean, std)


def create_state(key, batch, cfg, statistics=(0.0, 1.0)):
    """State of one seed before the first update. `batch` supplies shapes only."""
    key_actor, key_critic = jax.random.split(key)
    actor, critic = TanhActor(cfg.hidden, batch.action.shape[-1]), Critic(cfg.hidden)
    actor_params = actor.init(key_actor, batch.observation)
    critic_params = jax.vmap(critic.init, (0, None, None))(
        jax.random.split(key_critic, cfg.num_critics), batch.observation, batch.action
    )
    critics = jax.vmap(critic.apply, (0, None, None))  # -> [K, B]
    return State(
        TrainState.create(actor.apply, actor_params, optax.adam(cfg.actor_learning_rate)),
        TrainState.create(critics, critic_params, optax.adam(cfg.critic_learning_rate)),
        tuple(jnp.broadcast_to(x, batch.observation.shape[-1:]) for x in statistics),
    )


# --- Losses -------------------------------------------------------------------------------------
def critic_loss(params, state, batch, key, cfg):
    """TD error to the clipped double-Q target, mean over B, summed over K."""
    noise = cfg.target_noise * jax.random.normal(key, batch.action.shape)
    noise = noise.clip(-cfg.target_noise_clip, cfg.target_noise_clip)
    next_action = state.actor.apply_fn(state.actor.target_params, batch.next_observation)
    next_action = (next_action + noise).clip(-1.0, 1.0)
    next_q = state.critic.apply_fn(state.critic.target_params, batch.next_observation, next_action)
    next_q = next_q.min(axis=0)  # [B]
    # Bootstrap through truncations, never through terminations.
    target = batch.reward + cfg.reward_shift + cfg.discount * (1.0 - batch.termination) * next_q
    q = state.critic.apply_fn(params, batch.observation, batch.action)  # [K, B]
    chex.assert_equal_shape([*q, target])
    loss = jnp.square(q - target[None]).mean(axis=1).sum()
    return loss, {"critic_loss": loss, "q": q.mean()}


def actor_loss(params, state, batch, cfg):
    """(pi(s) - a)^2, mean over B and A, - alpha Q_1(s, pi(s)) / mean |Q_1|. Eqs. 3, 5."""
    action = state.actor.apply_fn(params, batch.observation)
    q = state.critic.apply_fn(state.critic.params, batch.observation, action)[0]  # [B]
    penalty = jnp.square(action - batch.action).mean(axis=-1)  # [B]
    chex.assert_equal_shape([q, penalty, batch.reward])
    loss = (penalty - cfg.alpha * q / jax.lax.stop_gradient(jnp.abs(q).mean())).mean()
    return loss, {"actor_loss": loss, "behaviour_mse": penalty.mean()}


# --- Update -------------------------------------------------------------------------------------
def update(state, step, key, data, cfg):
    """`policy_delay` critic updates and, among them, one of actor and targets. One seed.

    Randomness is a function of (key, step) alone, so neither the length of a chunk nor a resumed
    run changes the result. `key` is folded with the step, never split.
    """
    critic_metrics = []
    for i in range(cfg.policy_delay):  # unrolled: a `cond` would run both branches under vmap
        key_batch, key_noise = jax.random.split(jax.random.fold_in(key, step + i))
        index = jax.random.randint(key_batch, (cfg.batch_size,), 0, len(data.reward))
        batch = jax.tree.map(lambda x, index=index: x[index], data)
        grads, metrics = jax.grad(critic_loss, has_aux=True)(
            state.critic.params, state, batch, key_noise, cfg
        )
        state = state._replace(critic=state.critic.apply_gradients(grads=grads))
        critic_metrics.append(metrics)
        if i == cfg.policy_delay - 1:
            grads, actor_metrics = jax.grad(actor_loss, has_aux=True)(
                state.actor.params, state, batch, cfg
            )
            state = state._replace(actor=state.actor.apply_gradients(grads=grads))
            state = update_targets(state, cfg)
    mean = jax.tree.map(lambda *x: sum(x) / len(x), *critic_metrics)
    return state, mean | actor_metrics


def update_targets(state, cfg):
    """One Polyak step of both target networks."""
    actor, critic = (
        net.replace(
            target_params=optax.incremental_update(net.params, net.target_params, cfg.target_rate)
        )
        for net in (state.actor, state.critic)
    )
    return state._replace(actor=actor, critic=critic)


def train_chunk(state, key, start, data, cfg):
    """`log_every` updates of one seed, compiled as one program. Metrics are chunk means."""
    steps = start + jnp.arange(0, cfg.log_every, cfg.policy_delay)
    state, metrics = jax.lax.scan(partial(update, key=key, data=data, cfg=cfg), state, steps)
    return state, jax.tree.map(jnp.mean, metrics)


# --- Policy -------------------------------------------------------------------------------------
def policy(apply_fn, params, observation, key):
    """Deterministic action in [-1, 1], [..., O] -> [..., A]. `key` is not used."""
    mean, std = (jnp.broadcast_to(x, observation.shape) for x in params[1])
    return apply_fn(params[0], (observation - mean) / std)


def policy_params(state):
    return state.actor.params, state.statistics


# --- Training -----------------------------------------------------------------------------------
def train(cfg, options):
    """Train every seed of `cfg` and return its final normalised scores, [S]."""
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps)
    data, statistics = normalise(dataset.transitions)
    data = experiment.place(data, options)
    example = jax.tree.map(lambda x: x[:1], data)
    init_keys, train_keys, policy_keys = experiment.streams(cfg.seeds, 3)  # [S] each
    create = partial(create_state, batch=example, cfg=cfg, statistics=statistics)
    state = jax.vmap(create)(init_keys)  # not jitted: two QRs at once hang XLA
    # jit with the state donated; seeds by vmap on an accelerator, one after the other on CPU.
    train_seeds = experiment.over_seeds(partial(train_chunk, cfg=cfg), update)
    act = partial(policy, state.actor.apply_fn)

    with (
        experiment.Run(cfg, options, dataset) as run,
        evaluation.Rollouts(dataset, act, policy_keys, cfg) as rollouts,
    ):
        state, metrics, start = run.restore(state)
        for step in run.borders(start):  # start, start + log_every, ..., num_updates
            run.save(step, state, metrics)
            scores = rollouts.start(policy_params(state), step) if run.evaluates(step) else None
            row = (step, metrics, scores)
            if step < cfg.num_updates:  # beside the evaluation where there is an accelerator
                state, metrics = train_seeds(state, train_keys, step, data)
            run.log(*row)
    return run.scores


if __name__ == "__main__":
    train(*experiment.parse(Config))

# SPDX-License-Identifier: Apache-2.0
"""IQL (Kostrikov et al., 2021): expectile regression in place of a maximum over actions.

Paper       https://arxiv.org/abs/2110.06169
Reference   https://github.com/ikostrikov/implicit_q_learning
Run         python algorithms/iql.py --config configs/iql/antmaze.yaml
Parent      none
Results     benchmarks/results
Deviations  rows at a truncation are kept where their next observation is known, and count in
            return_scale. extraction=ddpg_bc and layer_norm are after seohongpark/fql, which has
            GELU, Glorot initialisation, no tanh on the mean, losses of the state before and awr
            from online critics, and samples the action where the std is learned. deterministic
            is CORL's.

Shapes: S seeds, K critics, B batch, E episodes, O observation, A action. Arrays are float32.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

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
    seeds: tuple[int, ...] = (0,)  # trained in parallel
    num_updates: int = 1_000_000  # gradient steps of every network
    log_every: int = 1_000  # updates per compiled chunk, the unit of logging and saving
    eval_every: int = 20_000  # updates between evaluations
    eval_episodes: int = 10  # episodes per seed and evaluation
    batch_size: int = 256  # transitions per update
    actor_learning_rate: float = 3e-4  # Adam, see cosine
    critic_learning_rate: float = 3e-4  # Adam, for Q and V
    discount: float = 0.99  # gamma, per environment step
    target_rate: float = 0.005  # tau, Polyak step of the target critics
    hidden: tuple[int, ...] = (256, 256)  # widths of all networks
    num_critics: int = 2  # K, their minimum counts
    layer_norm: bool = False  # after the activations of Q and V
    reward_shift: float = 0.0  # added to data set rewards (AntMaze: -1)
    return_scale: float | None = None  # returns of the data span this much (MuJoCo: 1000)
    # IQL
    expectile: float = 0.7  # tau, weight of errors where Q > V, Eq. 5
    extraction: Literal["awr", "ddpg_bc"] = "awr"  # of the policy
    inverse_temperature: float = 3.0  # beta of awr, Eq. 7
    alpha: float = 1.0  # weight of log pi(a|s) in ddpg_bc
    deterministic: bool = False  # squared error in place of -log pi(a|s)
    fixed_std: float | None = None  # std of the policy; None learns one per action dimension
    cosine: bool = True  # the actor's learning rate falls to 0 over num_updates
    dropout: float | None = None  # share of the actor's hidden units dropped in training


# --- Networks -----------------------------------------------------------------------------------
def orthogonal(width):
    return nn.Dense(width, kernel_init=nn.initializers.orthogonal(2**0.5))


class DropoutGaussianActor(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, observation, key=None, dropout=None):  # [..., O] -> [..., A] twice
        x = observation
        for i, width in enumerate(self.hidden):
            x = nn.relu(orthogonal(width)(x))
            if dropout is not None:
                keep = jax.random.bernoulli(jax.random.fold_in(key, i), 1.0 - dropout, x.shape)
                x = jnp.where(keep, x / (1.0 - dropout), 0.0)
        log_std = self.param("log_std", nn.initializers.zeros, (self.action_dim,))
        mean = jnp.tanh(orthogonal(self.action_dim)(x))
        return mean, jnp.broadcast_to(log_std.clip(-5.0, 2.0), mean.shape)


class OrthogonalCritic(nn.Module):
    hidden: tuple[int, ...]
    layer_norm: bool

    @nn.compact
    def __call__(self, *inputs):  # [..., O] and for Q [..., A] -> [...]
        x = jnp.concatenate(inputs, axis=-1)
        for width in self.hidden:
            x = nn.relu(orthogonal(width)(x))
            x = nn.LayerNorm()(x) if self.layer_norm else x
        return orthogonal(1)(x).squeeze(-1)


# --- State --------------------------------------------------------------------------------------
class TrainState(train_state.TrainState):
    target_params: Any  # Polyak average of params

    @classmethod
    def create(cls, apply_fn, params, tx):
        # The targets are a copy: params and targets are donated, so they must not share buffers.
        target = jax.tree.map(jnp.copy, params)
        return super().create(apply_fn=apply_fn, params=params, target_params=target, tx=tx)


class State(NamedTuple):
    actor: train_state.TrainState
    critic: TrainState  # every array has a leading [K] axis
    value_net: train_state.TrainState


def create_state(key, batch, cfg):
    """State of one seed before the first update. `batch` supplies shapes only."""
    key_actor, key_critic, key_value = jax.random.split(key, 3)
    actor = DropoutGaussianActor(cfg.hidden, batch.action.shape[-1])
    critic = value_net = OrthogonalCritic(cfg.hidden, cfg.layer_norm)
    actor_params = actor.init(key_actor, batch.observation)
    critic_params = jax.vmap(critic.init, (0, None, None))(
        jax.random.split(key_critic, cfg.num_critics), batch.observation, batch.action
    )
    value_params = value_net.init(key_value, batch.observation)
    critics = jax.vmap(critic.apply, (0, None, None))  # -> [K, B]
    rate, create = cfg.actor_learning_rate, train_state.TrainState.create
    rate = optax.cosine_decay_schedule(rate, cfg.num_updates) if cfg.cosine else rate
    adam = optax.adam(cfg.critic_learning_rate)
    return State(
        create(apply_fn=actor.apply, params=actor_params, tx=optax.adam(rate)),
        TrainState.create(critics, critic_params, adam),
        create(apply_fn=value_net.apply, params=value_params, tx=adam),
    )


# --- Losses -------------------------------------------------------------------------------------
def critic_loss(params, state, batch, cfg):
    """TD error to r + gamma V(s'), mean over B, summed over K. Eq. 6."""
    next_value = state.value_net.apply_fn(state.value_net.params, batch.next_observation)  # [B]
    # Bootstrap through truncations, never through terminations.
    target = batch.reward + cfg.discount * (1.0 - batch.termination) * next_value
    q = state.critic.apply_fn(params, batch.observation, batch.action)  # [K, B]
    chex.assert_equal_shape([*q, target])
    loss = jnp.square(q - target[None]).mean(axis=1).sum()
    return loss, {"critic_loss": loss, "q": q.mean()}


def value_loss(params, state, batch, cfg):
    """|tau - 1(u < 0)| u^2 with u = min_k Q_k(s, a) - V(s), target critics. Eq. 5."""
    q = state.critic.apply_fn(state.critic.target_params, batch.observation, batch.action)
    value = state.value_net.apply_fn(params, batch.observation)  # [B]
    error = q.min(axis=0) - value
    chex.assert_equal_shape([error, value, batch.reward])
    weight = jnp.where(error > 0, cfg.expectile, 1.0 - cfg.expectile)
    loss = (weight * jnp.square(error)).mean()
    return loss, {"value_loss": loss, "value": value.mean()}


def actor_loss(params, state, batch, key, cfg):
    """-exp(beta A) log pi(a|s), capped at 100, A = min_k Q_k(s, a) - V(s), target critics. Eq. 7.

    With ddpg_bc it is -min_k Q_k(s, mu(s)) / mean |min_k Q_k| - alpha log pi(a|s), online critics.
    """
    mean, log_std = state.actor.apply_fn(params, batch.observation, key, cfg.dropout)
    if cfg.fixed_std is not None:
        log_std = jnp.full_like(log_std, jnp.log(cfg.fixed_std))
    if cfg.deterministic:
        log_prob = -jnp.square(batch.action - mean).sum(axis=-1)  # [B]
    else:
        log_prob = gaussian_log_prob(batch.action, mean, log_std)  # [B]
    if cfg.extraction == "ddpg_bc":
        q = state.critic.apply_fn(state.critic.params, batch.observation, mean).min(axis=0)
        weight, gain = cfg.alpha, q / jax.lax.stop_gradient(jnp.abs(q).mean())
    else:
        q = state.critic.apply_fn(state.critic.target_params, batch.observation, batch.action)
        value = state.value_net.apply_fn(state.value_net.params, batch.observation)
        weight = jnp.minimum(jnp.exp(cfg.inverse_temperature * (q.min(axis=0) - value)), 100.0)
        gain = jnp.zeros_like(value)
    chex.assert_equal_shape([log_prob, gain, batch.reward])
    loss = -(weight * log_prob + gain).mean()
    return loss, {"actor_loss": loss, "log_prob": log_prob.mean(), "weight": jnp.mean(weight)}


def gaussian_log_prob(x, mean, log_std):
    """log N(x; mean, std), summed over the last axis."""
    error = (x - mean) * jnp.exp(-log_std)
    return -(0.5 * jnp.square(error) + log_std + 0.5 * jnp.log(2 * jnp.pi)).sum(axis=-1)


# --- Update -------------------------------------------------------------------------------------
def update(state, step, key, data, cfg):
    """One step of each network in the order below, then of the targets, on one batch. One seed.

    Randomness is a function of (key, step) alone, so neither the length of a chunk nor a resumed
    run changes the result. `key` is folded with the step, never split.
    """
    key_batch, key_actor = jax.random.split(jax.random.fold_in(key, step))
    batch = sample_batch(data, key_batch, cfg)
    grads, value_metrics = jax.grad(value_loss, has_aux=True)(
        state.value_net.params, state, batch, cfg
    )
    state = state._replace(value_net=state.value_net.apply_gradients(grads=grads))
    grads, actor_metrics = jax.grad(actor_loss, has_aux=True)(
        state.actor.params, state, batch, key_actor, cfg
    )
    state = state._replace(actor=state.actor.apply_gradients(grads=grads))
    grads, critic_metrics = jax.grad(critic_loss, has_aux=True)(
        state.critic.params, state, batch, cfg
    )
    state = state._replace(critic=state.critic.apply_gradients(grads=grads))
    state = state._replace(critic=update_target(state.critic, cfg))
    return state, critic_metrics | value_metrics | actor_metrics


def sample_batch(data, key, cfg):
    """`batch_size` rows of the data, drawn with replacement."""
    index = jax.random.randint(key, (cfg.batch_size,), 0, len(data.reward))
    return jax.tree.map(lambda column: column[index], data)


def update_target(net, cfg):
    target_params = optax.incremental_update(net.params, net.target_params, cfg.target_rate)
    return net.replace(target_params=target_params)


def train_chunk(state, key, start, data, cfg):
    """`log_every` updates of one seed, compiled as one program. Metrics are chunk means."""
    steps = start + jnp.arange(cfg.log_every)
    state, metrics = jax.lax.scan(partial(update, key=key, data=data, cfg=cfg), state, steps)
    return state, jax.tree.map(jnp.mean, metrics)


# --- Policy -------------------------------------------------------------------------------------
def policy(apply_fn, params, observation, key):
    """Mean action in [-1, 1], [..., O] -> [..., A]. `key` is not used."""
    return apply_fn(params, observation)[0]


def policy_params(state):
    return state.actor.params


# --- Training -----------------------------------------------------------------------------------
def train(cfg, options):
    """Train every seed of `cfg` and return its final normalised scores, [S]."""
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps)
    action = dataset.transitions.action.clip(-1 + 1e-5, 1 - 1e-5)
    reward = dataset.transitions.reward + cfg.reward_shift
    if cfg.return_scale is not None:
        reward = reward * (cfg.return_scale / datasets.return_span(dataset))
    data = experiment.place(dataset.transitions._replace(action=action, reward=reward), options)
    example = jax.tree.map(lambda x: x[:1], data)
    init_keys, train_keys, policy_keys = experiment.streams(cfg.seeds, 3)  # [S] each
    create = partial(create_state, batch=example, cfg=cfg)
    # Not jitted: XLA can hang on the QR decompositions of two orthogonal initialisers.
    state = jax.vmap(create)(init_keys)
    # Compiled once for all seeds. `update` shows which rows a step reads, for --data host.
    train_seeds = experiment.over_seeds(partial(train_chunk, cfg=cfg), update=update)
    act = partial(policy, state.actor.apply_fn)

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

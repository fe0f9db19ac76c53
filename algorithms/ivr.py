# SPDX-License-Identifier: Apache-2.0
"""IVR (Xu et al., 2023): in-sample values under a regulariser, sparse (SQL) or exponential (EQL).

Paper       https://arxiv.org/abs/2303.15810
Reference   https://github.com/ryanxhr/IVR
Run         python algorithms/ivr.py --config configs/ivr/antmaze.yaml
Parent      iql.py (233 lines)
Results     docs/results.md
Deviations  As in the authors' code, not the paper: SQL's actor weight is max(A, 0) in place of
            max(1 + A / (2 alpha), 0), EQL's has a factor of 10 (inverse_temperature), and EQL's
            loss of V bounds A / alpha at 5 and is divided by the batch's largest exponential.
            Unlike that code: rows at a truncation are kept where their next observation is known,
            and count in return_scale; V has no dropout, which the code never turns on.

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
    dataset: str = "local/pointmaze/umaze-v0"  # data set id or path, see docs/data.md
    seeds: tuple[int, ...] = (0,)  # trained in parallel
    num_updates: int = 1_000_000  # gradient steps of every network
    log_every: int = 1_000  # updates per compiled chunk, the unit of logging and saving
    eval_every: int = 20_000  # updates between evaluations
    eval_episodes: int = 10  # episodes per seed and evaluation
    batch_size: int = 256  # transitions per update
    actor_learning_rate: float = 3e-4  # Adam, see cosine
    critic_learning_rate: float = 3e-4  # Adam, for Q and V
    discount: float = 0.99  # gamma, per environment step
    target_rate: float = 0.005  # Polyak rate of the target critics
    hidden: tuple[int, ...] = (256, 256)  # widths of all networks
    num_critics: int = 2  # K, V and the actor learn from their minimum
    reward_shift: float = 0.0  # added to data set rewards (AntMaze: -1)
    return_scale: float | None = None  # rescales rewards to this range of returns (MuJoCo: 1000)
    # IVR
    variant: Literal["sql", "eql"] = "sql"  # regulariser: chi-square (sql), reverse KL (eql)
    sql_alpha: float = 1.0  # alpha of SQL, weight of its regulariser
    eql_alpha: float = 2.0  # alpha of EQL, weight of its regulariser
    inverse_temperature: float = 10.0  # factor of A / alpha in EQL's actor weights
    cosine: bool = True  # cosine decay of the actor's learning rate to 0 over num_updates
    dropout: float | None = None  # dropout rate of the actor's hidden layers in training


# --- Networks -----------------------------------------------------------------------------------
def orthogonal_dense(width):
    return nn.Dense(width, kernel_init=nn.initializers.orthogonal(2**0.5))


class DropoutGaussianActor(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, observation, key=None, dropout=None):  # [..., O] -> mean, log std [..., A]
        x = observation
        for i, width in enumerate(self.hidden):
            x = nn.relu(orthogonal_dense(width)(x))
            if dropout is not None:
                key_layer = jax.random.fold_in(key, i)
                keep = jax.random.bernoulli(key_layer, 1.0 - dropout, x.shape)
                x = jnp.where(keep, x / (1.0 - dropout), 0.0)
        log_std = self.param("log_std", nn.initializers.zeros, (self.action_dim,))
        mean = jnp.tanh(orthogonal_dense(self.action_dim)(x))
        return mean, jnp.broadcast_to(log_std.clip(-5.0, 2.0), mean.shape)


class OrthogonalReluCritic(nn.Module):
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, observation, action):  # [..., O], [..., A] -> [...]
        x = jnp.concatenate([observation, action], axis=-1)
        for width in self.hidden:
            x = nn.relu(orthogonal_dense(width)(x))
        return orthogonal_dense(1)(x).squeeze(-1)


class LayerNormValue(nn.Module):
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, observation):  # [..., O] -> [...]
        x = observation
        for width in self.hidden:
            x = nn.relu(nn.LayerNorm()(orthogonal_dense(width)(x)))
        return orthogonal_dense(1)(x).squeeze(-1)


# --- State --------------------------------------------------------------------------------------
class TrainState(train_state.TrainState):
    target_params: Any  # slow copy of params

    @classmethod
    def create(cls, apply_fn, params, tx):
        # A copy: JAX reuses the memory of the old state, so params and targets must not share any.
        target = jax.tree.map(jnp.copy, params)
        return super().create(apply_fn=apply_fn, params=params, target_params=target, tx=tx)


class State(NamedTuple):
    actor: train_state.TrainState  # Flax's own class: no target_params
    critic: TrainState  # every array has a leading [K] axis
    value_net: train_state.TrainState  # one network, without target_params


def create_state(key, batch, cfg):
    """State of one seed before the first update. `batch` supplies shapes only."""
    key_actor, key_critic, key_value = jax.random.split(key, 3)
    actor = DropoutGaussianActor(cfg.hidden, action_dim=batch.action.shape[-1])
    critic = OrthogonalReluCritic(cfg.hidden)
    value_net = LayerNormValue(cfg.hidden)
    init_critics = jax.vmap(critic.init, (0, None, None))
    apply_critics = jax.vmap(critic.apply, (0, None, None))  # -> [K, B]

    actor_params = actor.init(key_actor, batch.observation)
    critic_keys = jax.random.split(key_critic, cfg.num_critics)
    critic_params = init_critics(critic_keys, batch.observation, batch.action)
    value_params = value_net.init(key_value, batch.observation)

    actor_learning_rate = cfg.actor_learning_rate
    if cfg.cosine:
        actor_learning_rate = optax.cosine_decay_schedule(actor_learning_rate, cfg.num_updates)
    actor_adam = optax.adam(actor_learning_rate)
    critic_adam = optax.adam(cfg.critic_learning_rate)
    value_adam = optax.adam(cfg.critic_learning_rate)
    return State(
        actor=train_state.TrainState.create(
            apply_fn=actor.apply, params=actor_params, tx=actor_adam
        ),
        critic=TrainState.create(apply_critics, critic_params, critic_adam),
        value_net=train_state.TrainState.create(
            apply_fn=value_net.apply, params=value_params, tx=value_adam
        ),
    )


# --- Losses -------------------------------------------------------------------------------------
def critic_loss(params, state, batch, cfg):
    """Squared TD error to r + gamma V(s'), mean over B, summed over K. Eq. 6 of IQL."""
    next_value = state.value_net.apply_fn(state.value_net.params, batch.next_observation)  # [B]
    # Bootstrap through truncations, never through terminations.
    target = batch.reward + cfg.discount * (1.0 - batch.termination) * next_value  # [B]

    q = state.critic.apply_fn(params, batch.observation, batch.action)  # [K, B]
    chex.assert_equal_shape([*q, target])
    loss = jnp.square(q - target[None]).mean(axis=1).sum()
    return loss, {"critic_loss": loss, "q": q.mean()}


def value_loss(params, state, batch, cfg):
    """SQL's or EQL's loss of V, with A = min_k Q_k(s, a) - V(s), target critics."""
    q = state.critic.apply_fn(state.critic.target_params, batch.observation, batch.action)
    q = q.min(axis=0)  # [K, B] -> [B]
    value = state.value_net.apply_fn(params, batch.observation)  # [B]
    advantage = q - value
    chex.assert_equal_shape([advantage, value, batch.reward])
    if cfg.variant == "sql":
        loss = sql_value_loss(advantage, value, cfg)
    else:
        loss = eql_value_loss(advantage, value, cfg)
    return loss, {"value_loss": loss, "value": value.mean()}


def actor_loss(params, state, batch, key, cfg):
    """-w log pi(a|s), mean over B, w = A (SQL) or exp(10 A / alpha) (EQL) between 0 and 100.

    A as in value_loss. `key` is for dropout.
    """
    mean, log_std = state.actor.apply_fn(params, batch.observation, key, cfg.dropout)
    log_prob = gaussian_log_prob(batch.action, mean, log_std)  # [B]
    q = state.critic.apply_fn(state.critic.target_params, batch.observation, batch.action)
    q = q.min(axis=0)  # [K, B] -> [B]
    value = state.value_net.apply_fn(state.value_net.params, batch.observation)  # [B]
    advantage = q - value
    if cfg.variant == "sql":
        weight = advantage
    else:
        weight = jnp.exp(cfg.inverse_temperature * advantage / cfg.eql_alpha)
    weight = weight.clip(0.0, 100.0)
    chex.assert_equal_shape([log_prob, weight, batch.reward])
    loss = -(weight * log_prob).mean()
    cloned = jnp.mean(weight > 0)  # share of the rows that the actor clones
    metrics = {"log_prob": log_prob.mean(), "weight": weight.mean(), "cloned": cloned}
    return loss, {"actor_loss": loss} | metrics


def sql_value_loss(advantage, value, cfg):
    """max(1 + A / (2 alpha), 0)^2 + V / alpha, mean over B."""
    sparse_term = jnp.square(nn.relu(1.0 + advantage / (2.0 * cfg.sql_alpha)))
    linear_term = value / cfg.sql_alpha
    return (sparse_term + linear_term).mean()


def eql_value_loss(advantage, value, cfg):
    """(e^z + V / alpha) / e^(max z), mean over B, with z = A / alpha, at most 5.

    max z is over the batch and at least -1.
    """
    z = jnp.minimum(advantage / cfg.eql_alpha, 5.0)
    max_z = jax.lax.stop_gradient(jnp.maximum(z.max(), -1.0))
    exponential_term = jnp.exp(z - max_z)
    linear_term = jnp.exp(-max_z) * value / cfg.eql_alpha
    return (exponential_term + linear_term).mean()


def gaussian_log_prob(x, mean, log_std):
    """log N(x; mean, std), summed over the last axis."""
    error = (x - mean) * jnp.exp(-log_std)
    return -(0.5 * jnp.square(error) + log_std + 0.5 * jnp.log(2 * jnp.pi)).sum(axis=-1)


# --- Update -------------------------------------------------------------------------------------
def update(state, step, key, data, cfg):
    """One gradient step of V, the actor and Q in turn, then one step of the targets. One seed.

    All of them use the same batch. Randomness is a function of (key, step) alone, so neither the
    length of a chunk nor a resumed run changes the result. The key of a step is
    fold_in(key, step).
    """
    key_batch, key_actor = jax.random.split(jax.random.fold_in(key, step))
    batch = sample_batch(data, key_batch, cfg)

    value_grads, value_metrics = jax.grad(value_loss, has_aux=True)(
        state.value_net.params, state, batch, cfg
    )
    state = state._replace(value_net=state.value_net.apply_gradients(grads=value_grads))

    actor_grads, actor_metrics = jax.grad(actor_loss, has_aux=True)(
        state.actor.params, state, batch, key_actor, cfg
    )
    state = state._replace(actor=state.actor.apply_gradients(grads=actor_grads))

    critic_grads, critic_metrics = jax.grad(critic_loss, has_aux=True)(
        state.critic.params, state, batch, cfg
    )
    state = state._replace(critic=state.critic.apply_gradients(grads=critic_grads))
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
    mean, _ = apply_fn(params, observation)
    return mean


def policy_params(state):
    return state.actor.params


def policy_fn(state, cfg):
    """`policy` with the networks filled in: (params, observation, key) -> action."""
    return partial(policy, state.actor.apply_fn)


# --- Training -----------------------------------------------------------------------------------
def train(cfg, options):
    """Train every seed of `cfg` and return its final normalised scores, [S]."""
    experiment.check(cfg, options)
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps)
    action = dataset.transitions.action.clip(-1 + 1e-5, 1 - 1e-5)
    reward = dataset.transitions.reward + cfg.reward_shift
    if cfg.return_scale is not None:
        reward = reward * (cfg.return_scale / datasets.return_span(dataset))
    data = experiment.place(dataset.transitions._replace(action=action, reward=reward), options)
    example = jax.tree.map(lambda x: x[:1], data)  # one row, for its shapes
    init_keys, train_keys, policy_keys = experiment.streams(cfg.seeds, 3)  # [S] keys each
    create = partial(create_state, batch=example, cfg=cfg)
    # Not jitted: XLA can hang on the QR decompositions of two orthogonal initialisers.
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

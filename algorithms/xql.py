# SPDX-License-Identifier: Apache-2.0
"""XQL (Garg et al., 2023): Extreme Q-learning offline, soft values by Gumbel regression.

Paper       https://arxiv.org/abs/2301.02328
Reference   https://github.com/Div99/XQL (offline)
Run         python algorithms/xql.py --config configs/xql/antmaze.yaml
Parent      iql.py (95 lines)
Results     benchmarks/results
Deviations  from the paper, as in its code: Huber loss of Q in place of the square, the clone's
            temperature is not beta, target critics, and only an upper clip of V's exponent.
            From the code: each of value_updates draws its own noise and uniform actions, noise
            does not go with the uniform ones; rows at a truncation are kept where their next
            observation is known, and count in return_scale; no V dropout, which it never turns on.

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
    reward_shift: float = 0.0  # added to data set rewards (AntMaze: -1)
    return_scale: float | None = None  # returns of the data span this much (MuJoCo: 1000)
    # XQL
    beta: float = 2.0  # temperature of V's regression, Eq. 11
    max_clip: float = 7.0  # upper bound of (Q - V) / beta in V's loss
    value_updates: int = 1  # steps of V per update, all on its batch
    random_actions: int | None = None  # uniform actions per row that V learns from as well
    action_noise: float | None = None  # std of noise on V's data actions, clipped at 0.5
    huber_delta: float = 20.0  # TD errors count linearly from here on
    inverse_temperature: float = 3.0  # of the policy's weights exp(this A), capped at 100
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


class LayerNormValue(nn.Module):
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, observation):  # [..., O] -> [...]
        x = observation
        for width in self.hidden:
            x = nn.relu(nn.LayerNorm()(orthogonal(width)(x)))
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
    critic = OrthogonalCritic(cfg.hidden, layer_norm=False)
    value_net = LayerNormValue(cfg.hidden)
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
    """Huber loss of the TD error to r + gamma V(s'), mean over B, summed over K. Eq. 14."""
    next_value = state.value_net.apply_fn(state.value_net.params, batch.next_observation)  # [B]
    # Bootstrap through truncations, never through terminations.
    target = batch.reward + cfg.discount * (1.0 - batch.termination) * next_value
    q = state.critic.apply_fn(params, batch.observation, batch.action)  # [K, B]
    chex.assert_equal_shape([*q, target])
    loss = optax.huber_loss(q, target[None], delta=cfg.huber_delta).mean(axis=1).sum()
    return loss, {"critic_loss": loss, "q": q.mean()}


def value_loss(params, state, batch, key, cfg):
    """(e^z - z - 1) / e^(max z), z = (min_k Q_k(s, a) - V(s)) / beta, target critics. Eq. 11.

    z is at most max_clip, its maximum over the rows -1 at least. `key` is split.
    """
    observation, action = value_batch(batch, key, cfg)
    q = state.critic.apply_fn(state.critic.target_params, observation, action)
    value = state.value_net.apply_fn(params, observation)
    error = q.min(axis=0) - value
    chex.assert_equal_shape([error, value, observation[:, 0]])
    z = jnp.minimum(error / cfg.beta, cfg.max_clip)
    largest = jax.lax.stop_gradient(jnp.maximum(z.max(), -1.0))
    loss = (jnp.exp(z - largest) - (z + 1.0) * jnp.exp(-largest)).mean()
    return loss, {"value_loss": loss, "value": value.mean()}


def actor_loss(params, state, batch, key, cfg):
    """-exp(A / T) log pi(a|s), capped at 100, A = min_k Q_k(s, a) - V(s), target Q. Eq. 12."""
    mean, log_std = state.actor.apply_fn(params, batch.observation, key, cfg.dropout)
    log_prob = gaussian_log_prob(batch.action, mean, log_std)  # [B]
    q = state.critic.apply_fn(state.critic.target_params, batch.observation, batch.action)
    value = state.value_net.apply_fn(state.value_net.params, batch.observation)
    weight = jnp.minimum(jnp.exp(cfg.inverse_temperature * (q.min(axis=0) - value)), 100.0)
    chex.assert_equal_shape([log_prob, weight, batch.reward])
    loss = -(weight * log_prob).mean()
    return loss, {"actor_loss": loss, "log_prob": log_prob.mean(), "weight": weight.mean()}


def value_batch(batch, key, cfg):
    """Observations and actions of V's loss: the batch's, then R uniform actions for each row.

    [B, O], [B, A] -> [B + B R, O], [B + B R, A]
    """
    observation, action = batch.observation, batch.action
    key_noise, key_random = jax.random.split(key)
    if cfg.action_noise is not None:
        noise = cfg.action_noise * jax.random.normal(key_noise, action.shape)
        action = (action + noise.clip(-0.5, 0.5)).clip(-1.0, 1.0)
    if cfg.random_actions is not None:
        count = cfg.random_actions * len(action)
        uniform = jax.random.uniform(key_random, (count, action.shape[1]), minval=-1.0)
        observation = jnp.tile(observation, (1 + cfg.random_actions, 1))
        action = jnp.concatenate([action, uniform])
    return observation, action


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
    key_batch, key_value, key_actor = jax.random.split(jax.random.fold_in(key, step), 3)
    batch = sample_batch(data, key_batch, cfg)
    for i in range(cfg.value_updates):
        grads, value_metrics = jax.grad(value_loss, has_aux=True)(
            state.value_net.params, state, batch, jax.random.fold_in(key_value, i), cfg
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

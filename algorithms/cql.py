# SPDX-License-Identifier: Apache-2.0
"""CQL (Kumar et al., 2020): SAC whose critics are pushed down on actions the data do not show.

Paper       https://arxiv.org/abs/2006.04779
Reference   https://github.com/young-geng/JaxCQL, with the settings of corl-team/CORL
Run         python algorithms/cql.py --config configs/cql/antmaze.yaml
Parent      none
Results     benchmarks/results
Deviations  CORL's orthogonal initialisation reaches the actor here, its 5 AntMaze layers both Qs.
            No halved TD error, no warm start by cloning, as in CORL. Rows at truncations are kept.

Shapes: S seeds, K critics, B batch, N num_samples, M actions per row, O observation, A action.
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
    log_every: int = 200  # updates per compiled chunk, the unit of logging and saving
    eval_every: int = 20_000  # updates between evaluations
    eval_episodes: int = 10  # episodes per seed and evaluation
    batch_size: int = 256  # transitions per update
    actor_learning_rate: float = 3e-5  # Adam, for the actor and the entropy temperature
    critic_learning_rate: float = 3e-4  # Adam, for Q and the Lagrange multiplier
    discount: float = 0.99  # gamma, per environment step
    target_rate: float = 0.005  # tau, Polyak step of the target critics
    hidden: tuple[int, ...] = (256, 256, 256)  # widths of the actor
    critic_hidden: tuple[int, ...] = (256, 256, 256)  # widths of the critics
    num_critics: int = 2  # K, their minimum counts
    normalise_observations: bool = True  # to mean 0 and std 1
    reward_scale: float = 1.0  # multiplies data set rewards (AntMaze: 10)
    reward_shift: float = 0.0  # added afterwards (AntMaze: -5)
    # CQL
    alpha: float = 10.0  # weight of the conservative term, Eq. 4
    num_samples: int = 10  # N, actions per row of each kind: uniform, pi(s), pi(s')
    importance: bool = True  # weigh them by their density; False: data actions join them instead
    gap: float | None = None  # Lagrange threshold on the conservative term; None: fixed weight
    lowest_difference: float | None = None  # clips each row's conservative term from below
    max_target_backup: bool = False  # the best of N actions at s' instead of one


# --- Networks -----------------------------------------------------------------------------------
def orthogonal(width):
    return nn.Dense(width, kernel_init=nn.initializers.orthogonal(2**0.5))


def small_head(width):
    return nn.Dense(width, kernel_init=nn.initializers.orthogonal(1e-2))


class TanhGaussianActor(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, observation):  # [..., O] -> [..., A] twice, mean and log std before tanh
        x = observation
        for width in self.hidden:
            x = nn.relu(orthogonal(width)(x))
        mean, log_std = jnp.split(small_head(2 * self.action_dim)(x), 2, axis=-1)
        scale = self.param("log_std_scale", nn.initializers.constant(1.0), ())
        shift = self.param("log_std_shift", nn.initializers.constant(-1.0), ())
        return mean, (scale * log_std + shift).clip(-20.0, 2.0)


class SmallHeadCritic(nn.Module):
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, observation, action):  # [B, O], [B, M, A] -> [B, M]
        observation = observation.repeat(action.shape[1], axis=0)  # [B M, O]: gradients are faster
        x = jnp.concatenate([observation, action.reshape(len(observation), -1)], axis=-1)
        for width in self.hidden:
            x = nn.relu(orthogonal(width)(x))
        return small_head(1)(x).reshape(action.shape[:-1])


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
    temperature: train_state.TrainState  # its logarithm
    lagrange: train_state.TrainState  # logarithm of the multiplier, not used without a gap
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


def create_state(key, batch, cfg, statistics=(0.0, 1.0)):
    """State of one seed before the first update. `batch` supplies shapes only."""
    key_actor, key_critic = jax.random.split(key)
    actor = TanhGaussianActor(cfg.hidden, batch.action.shape[-1])
    critic = SmallHeadCritic(cfg.critic_hidden)
    actor_params = actor.init(key_actor, batch.observation)
    critic_params = jax.vmap(critic.init, (0, None, None))(
        jax.random.split(key_critic, cfg.num_critics), batch.observation, batch.action[:, None]
    )
    critics = jax.vmap(critic.apply, (0, None, None))  # -> [K, B, M]
    create = train_state.TrainState.create
    adam, critic_adam = map(optax.adam, (cfg.actor_learning_rate, cfg.critic_learning_rate))
    return State(
        create(apply_fn=actor.apply, params=actor_params, tx=adam),
        TrainState.create(critics, critic_params, critic_adam),
        create(apply_fn=multiplier, params={"log": jnp.float32(0.0)}, tx=adam),
        create(apply_fn=multiplier, params={"log": jnp.float32(1.0)}, tx=critic_adam),
        tuple(jnp.broadcast_to(x, batch.observation.shape[-1:]) for x in statistics),
    )


def multiplier(params):
    return jnp.exp(params["log"]).clip(0.0, 1e6)


# --- Losses -------------------------------------------------------------------------------------
def critic_loss(params, state, batch, key, cfg):
    """TD error + alpha (log sum exp Q(s, a~) - Q(s, a)), a~ the sampled actions, per critic. Eq. 4.

    Means over B, summed over K. All sampled actions, those of pi(s') too, are valued at s.
    """
    actions, log_density, next_action = sample_actions(state.actor, batch, key, cfg)
    next_q = state.critic.apply_fn(state.critic.target_params, batch.next_observation, next_action)
    next_q = next_q.min(axis=0).max(axis=-1)  # [B]
    # Bootstrap through truncations, never through terminations.
    target = batch.reward + cfg.discount * (1.0 - batch.termination) * next_q
    every_q = state.critic.apply_fn(params, batch.observation, actions)  # [K, B, 1 + 3N]
    q = every_q[..., 0]  # [K, B]
    # With densities: log of the integral of exp Q plus log 3N, which gap and clip count too.
    every_q = every_q[..., 1:] - log_density[None] if cfg.importance else every_q
    difference = jax.nn.logsumexp(every_q, axis=-1) - q  # [K, B]
    if cfg.lowest_difference is not None:
        difference = jnp.maximum(difference, cfg.lowest_difference)
    chex.assert_equal_shape([*q, *difference, target])
    td_error = jnp.square(q - target[None]).mean(axis=1).sum()
    weight = 1.0 if cfg.gap is None else state.lagrange.apply_fn(state.lagrange.params)
    loss = td_error + weight * cfg.alpha * difference.mean(axis=1).sum()
    metrics = {"td_error": td_error, "q": q.mean(), "penalty": difference.mean()}
    return loss, metrics | {"critic_loss": loss}


def actor_loss(params, state, batch, key, cfg):
    """temperature log pi(a~|s) - min_k Q_k(s, a~) with a~ ~ pi(s)."""
    action, log_prob = sample_tanh(*state.actor.apply_fn(params, batch.observation), key, 1)
    q = state.critic.apply_fn(state.critic.params, batch.observation, action).min(axis=0)  # [B, 1]
    chex.assert_equal_shape([q, log_prob, batch.reward[:, None]])
    loss = (state.temperature.apply_fn(state.temperature.params) * log_prob - q).mean()
    return loss, {"actor_loss": loss, "entropy": -log_prob.mean()}


def temperature_loss(params, entropy, action_dim):
    """log temperature (entropy - target), with -A as the target."""
    return params["log"] * (entropy + action_dim)


def lagrange_loss(params, penalty, cfg):
    """-multiplier alpha (penalty - gap): the multiplier grows while the penalty is above."""
    return -multiplier(params) * cfg.alpha * (penalty - cfg.gap)


def sample_actions(actor, batch, key, cfg):
    """Data, uniform, pi(s) and pi(s') actions [B, 1 + 3N, A], log density of the latter three
    [B, 3N], and 1 or N actions at s' for the target [B, 1 or N, A]."""
    key_uniform, key_policy = jax.random.split(key)
    size, n, dim = len(batch.reward), cfg.num_samples, batch.action.shape[-1]
    both = jnp.concatenate([batch.observation, batch.next_observation])
    count = 2 * n if cfg.max_target_backup else n + 1
    action, log_prob = sample_tanh(*actor.apply_fn(actor.params, both), key_policy, count)
    uniform = jax.random.uniform(key_uniform, (size, n, dim), minval=-1.0, maxval=1.0)
    actions = [batch.action[:, None], uniform, action[:size, :n], action[size:, :n]]
    logs = [jnp.full((size, n), dim * jnp.log(0.5)), log_prob[:size, :n], log_prob[size:, :n]]
    return jnp.concatenate(actions, axis=1), jnp.concatenate(logs, axis=1), action[size:, n:]


def sample_tanh(mean, log_std, key, count):
    """`count` actions of tanh N(mean, std) per row, [B, count, A], and their log pi, [B, count]."""
    noise = jax.random.normal(key, (len(mean), count, mean.shape[-1]))
    log_std = jnp.broadcast_to(log_std[:, None], noise.shape)
    x = mean[:, None] + jnp.exp(log_std) * noise
    log_prob = -0.5 * jnp.square(noise) - log_std - 0.5 * jnp.log(2 * jnp.pi)
    log_prob -= 2 * (jnp.log(2.0) - x - jax.nn.softplus(-2 * x))  # log(1 - tanh(x)^2)
    return jnp.tanh(x), log_prob.sum(axis=-1)


# --- Update -------------------------------------------------------------------------------------
def update(state, step, key, data, cfg):
    """One step of every network, all of them from the state before, then the targets. One seed.

    Randomness is a function of (key, step) alone, so neither the length of a chunk nor a resumed
    run changes the result. `key` is folded with the step, never split.
    """
    key_batch, key_critic, key_actor = jax.random.split(jax.random.fold_in(key, step), 3)
    batch = sample_batch(data, key_batch, cfg)
    critic_grads, critic_metrics = jax.grad(critic_loss, has_aux=True)(
        state.critic.params, state, batch, key_critic, cfg
    )
    actor_grads, actor_metrics = jax.grad(actor_loss, has_aux=True)(
        state.actor.params, state, batch, key_actor, cfg
    )
    metrics, dim = critic_metrics | actor_metrics, batch.action.shape[-1]
    temperature, lagrange = state.temperature, state.lagrange
    metrics["temperature"] = temperature.apply_fn(temperature.params)
    grads = jax.grad(temperature_loss)(temperature.params, metrics["entropy"], dim)
    temperature = temperature.apply_gradients(grads=grads)
    if cfg.gap is not None:
        metrics["multiplier"] = lagrange.apply_fn(lagrange.params)
        grads = jax.grad(lagrange_loss)(lagrange.params, metrics["penalty"], cfg)
        lagrange = lagrange.apply_gradients(grads=grads)
    critic = update_target(state.critic.apply_gradients(grads=critic_grads), cfg)
    actor = state.actor.apply_gradients(grads=actor_grads)
    return State(actor, critic, temperature, lagrange, state.statistics), metrics


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
    """tanh of the mean, [..., O] -> [..., A]. `key` is not used."""
    actor_params, statistics = params
    mean, _ = apply_fn(actor_params, standardise(observation, statistics))
    return jnp.tanh(mean)


def policy_params(state):
    return state.actor.params, state.statistics


# --- Training -----------------------------------------------------------------------------------
def train(cfg, options):
    """Train every seed of `cfg` and return its final normalised scores, [S]."""
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps)
    reward = cfg.reward_scale * dataset.transitions.reward + cfg.reward_shift
    data, statistics = dataset.transitions._replace(reward=reward), (0.0, 1.0)
    data, statistics = normalise(data) if cfg.normalise_observations else (data, statistics)
    data = experiment.place(data, options)
    example = jax.tree.map(lambda x: x[:1], data)
    init_keys, train_keys, policy_keys = experiment.streams(cfg.seeds, 3)  # [S] each
    create = partial(create_state, batch=example, cfg=cfg, statistics=statistics)
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

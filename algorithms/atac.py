# SPDX-License-Identifier: Apache-2.0
"""ATAC (Cheng et al., 2022): a slow actor against fast critics that look for its faults.

Paper       https://arxiv.org/abs/2202.02446
Reference   https://github.com/microsoft/ATAC
Run         python algorithms/atac.py --config configs/atac/mujoco.yaml
Parent      none
Results     benchmarks/results
Deviations  networks and their start, limits of targets and action_margin are chinganc/lightATAC's,
            which sums no log pi over action dimensions, starts the game with targets at their
            initial parameters and a fresh optimiser for the critics too, and projects no weights
            before. The paper's beta per data set is in neither code. Rows at truncations are kept.

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
    num_updates: int = 1_100_000  # gradient steps of every network, the warm start's included
    log_every: int = 1_000  # updates per compiled chunk, the unit of logging and saving
    eval_every: int = 20_000  # updates between evaluations
    eval_episodes: int = 10  # episodes per seed and evaluation
    batch_size: int = 256  # transitions per update
    actor_learning_rate: float = 5e-7  # Adam, after the warm start
    critic_learning_rate: float = 5e-4  # Adam, also for temperature and warm start of the actor
    discount: float = 0.99  # gamma, per environment step
    target_rate: float = 0.005  # tau, Polyak step of the target critics
    hidden: tuple[int, ...] = (256, 256, 256)  # widths of actor and critics
    num_critics: int = 2  # K, the minimum of their targets counts; the actor follows the first
    # ATAC
    beta: float = 16.0  # weight of the Bellman error beside the pessimism
    warm_start: int = 100_000  # the first updates: cloning, and critics of the Bellman error alone
    residual: float = 0.5  # share of the residual error in the Bellman error, the rest is TD
    weight_norm: float = 100.0  # largest Frobenius norm of a weight matrix of the critics
    lowest_target: float | None = None  # of the critics, such as the least reward / (1 - discount)
    highest_target: float | None = None  # the same from above
    action_margin: float = 1e-6  # the data's actions are kept this far inside [-1, 1], for log pi


# --- Networks -----------------------------------------------------------------------------------
def fan_in_uniform():
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # U(±1 / sqrt(fan in))


def uniform(bound):
    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def linear(fan_in, width):  # PyTorch's default
    return nn.Dense(width, kernel_init=fan_in_uniform(), bias_init=uniform(fan_in**-0.5))


class UnitStdActor(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, observation):  # [..., O] -> [..., A] twice, mean and log std before tanh
        x = observation
        for width in self.hidden:
            x = nn.relu(linear(x.shape[-1], width)(x))
        mean = linear(x.shape[-1], self.action_dim)(x)
        log_std = nn.Dense(self.action_dim, kernel_init=nn.initializers.zeros)(x)  # std 1 at first
        return mean, log_std.clip(jnp.log(1e-5), jnp.log(10.0))


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
    target_params: Any  # slow copy of params

    @classmethod
    def create(cls, apply_fn, params, tx):
        # The targets are a copy: params and targets are donated, so they must not share buffers.
        target = jax.tree.map(jnp.copy, params)
        return super().create(apply_fn=apply_fn, params=params, target_params=target, tx=tx)


class State(NamedTuple):
    actor: train_state.TrainState
    critic: TrainState  # every array has a leading [K] axis
    temperature: train_state.TrainState  # its logarithm


def create_state(key, batch, cfg):
    """State of one seed before the first update. `batch` supplies shapes only."""
    key_actor, key_critic = jax.random.split(key)
    actor, critic = UnitStdActor(cfg.hidden, batch.action.shape[-1]), Critic(cfg.hidden)
    actor_params = actor.init(key_actor, batch.observation)
    critic_params = jax.vmap(critic.init, (0, None, None))(
        jax.random.split(key_critic, cfg.num_critics), batch.observation, batch.action
    )
    critics = jax.vmap(critic.apply, (0, None, None))  # -> [K, B]
    fast, create = optax.adam(cfg.critic_learning_rate), train_state.TrainState.create
    rates = map(optax.constant_schedule, (cfg.critic_learning_rate, cfg.actor_learning_rate))
    slow = optax.adam(optax.join_schedules([*rates], [cfg.warm_start]))
    return State(
        create(apply_fn=actor.apply, params=actor_params, tx=slow),
        TrainState.create(critics, critic_params, fast),
        create(apply_fn=lambda p: jnp.exp(p["log"]), params={"log": jnp.float32(0.0)}, tx=fast),
    )


# --- Losses -------------------------------------------------------------------------------------
def critic_loss(params, state, batch, noise, warm, cfg):
    """Q(s, a~) - Q(s, a) + beta Bellman error, a~ ~ pi(s), mean over B, summed over K. Algorithm 2.

    Bellman error: (1 - w) TD error to the targets' minimum + w residual error, whose gradient goes
    through r + gamma Q(s', a') too. With beta > 1 all is divided by it. No Q(s, a~) while `warm`.
    """
    (action, _), (next_action, _) = (
        sample_squashed(*state.actor.apply_fn(state.actor.params, x), noise[i])
        for i, x in enumerate((batch.observation, batch.next_observation))
    )
    next_q = state.critic.apply_fn(state.critic.target_params, batch.next_observation, next_action)
    # Bootstrap through truncations, never through terminations.
    discount = cfg.discount * (1.0 - batch.termination)
    limits = cfg.lowest_target, cfg.highest_target
    target = (batch.reward + discount * next_q.min(axis=0)).clip(*limits)  # [B]
    observations = [batch.observation, batch.next_observation, batch.observation]
    pairs = map(jnp.concatenate, (observations, [batch.action, next_action, action]))
    q, next_q, policy_q = jnp.split(state.critic.apply_fn(params, *pairs), 3, axis=1)  # [K, B]
    chex.assert_equal_shape([*q, *next_q, *policy_q, target])
    own_target = (batch.reward[None] + discount[None] * next_q).clip(*limits)
    td_error = jnp.square(q - target[None]).mean(axis=1).sum()
    residual_error = jnp.square(q - own_target).mean(axis=1).sum()
    bellman_error = (1.0 - cfg.residual) * td_error + cfg.residual * residual_error
    pessimism = jnp.where(warm, 0.0, (policy_q - q).mean(axis=1).sum())
    loss = pessimism / jnp.maximum(cfg.beta, 1.0) + jnp.minimum(cfg.beta, 1.0) * bellman_error
    metrics = {"critic_loss": loss, "td_error": td_error, "residual_error": residual_error}
    return loss, metrics | {"pessimism": pessimism, "q": q.mean()}


def actor_loss(params, state, batch, noise, warm, cfg):
    """temperature log pi(a~|s) - Q_1(s, a~), a~ ~ pi(s), over max(1, temperature). Algorithm 2.

    While `warm`, log pi(a|s) of the data stands for Q_1.
    """
    distribution = state.actor.apply_fn(params, batch.observation)
    action, log_prob = sample_squashed(*distribution, noise[0])
    clone = squashed_log_prob(jnp.arctanh(batch.action), *distribution)
    first = jax.tree.map(lambda x: x[:1], state.critic.params)
    q = state.critic.apply_fn(first, batch.observation, action)[0]  # [B]
    chex.assert_equal_shape([q, log_prob, clone, batch.reward])
    gain = jnp.where(warm, clone, q)
    temperature = state.temperature.apply_fn(state.temperature.params)
    loss = jnp.minimum(temperature, 1.0) * log_prob - gain / jnp.maximum(temperature, 1.0)
    metrics = {"actor_loss": loss.mean(), "log_prob": clone.mean(), "temperature": temperature}
    return loss.mean(), metrics | {"entropy": -log_prob.mean()}


def temperature_loss(params, entropy, action_dim):
    """log temperature (entropy - target), with -A as the target."""
    return params["log"] * (entropy + action_dim)


def sample_squashed(mean, log_std, noise):
    """a = tanh(mean + std noise) and its log pi, [B, A] -> [B, A], [B]."""
    x = mean + jnp.exp(log_std) * noise
    return jnp.tanh(x), squashed_log_prob(x, mean, log_std)


def squashed_log_prob(x, mean, log_std):
    """log density of tanh(x) for x ~ N(mean, std), summed over the last axis."""
    error = (x - mean) * jnp.exp(-log_std)
    log_prob = -0.5 * jnp.square(error) - log_std - 0.5 * jnp.log(2 * jnp.pi)
    log_prob -= 2 * (jnp.log(2.0) - x - jax.nn.softplus(-2 * x))  # log(1 - tanh(x)^2)
    return log_prob.sum(axis=-1)


# --- Update -------------------------------------------------------------------------------------
def update(state, step, key, data, cfg):
    """One step of each network in the order below, then of the targets. One seed. Algorithm 2.

    Randomness is a function of (key, step) alone, so neither the length of a chunk nor a resumed
    run changes the result. `key` is folded with the step, never split.
    """
    key_batch, key_noise = jax.random.split(jax.random.fold_in(key, step))
    batch = sample_batch(data, key_batch, cfg)
    noise = jax.random.normal(key_noise, (2, *batch.action.shape))  # at s and at s'
    warm = step < cfg.warm_start
    state = restart(state, step == cfg.warm_start)
    grads, critic_metrics = jax.grad(critic_loss, has_aux=True)(
        state.critic.params, state, batch, noise, warm, cfg
    )
    critic = state.critic.apply_gradients(grads=grads)
    state = state._replace(critic=critic.replace(params=project(critic.params, cfg.weight_norm)))
    distribution = state.actor.apply_fn(state.actor.params, batch.observation)
    entropy = -sample_squashed(*distribution, noise[0])[1].mean()
    grads = jax.grad(temperature_loss)(state.temperature.params, entropy, batch.action.shape[-1])
    state = state._replace(temperature=state.temperature.apply_gradients(grads=grads))
    grads, actor_metrics = jax.grad(actor_loss, has_aux=True)(
        state.actor.params, state, batch, noise, warm, cfg
    )
    state = state._replace(actor=state.actor.apply_gradients(grads=grads))
    return state._replace(critic=update_target(state.critic, cfg)), critic_metrics | actor_metrics


def restart(state, now):
    """Where `now`: temperature 1 again, and Adam without memory for it and for the actor."""
    (adam, schedule), temperature = state.actor.opt_state, state.temperature
    old = (adam, temperature.params, temperature.opt_state)
    adam, log, memory = jax.tree.map(lambda x: jnp.where(now, jnp.zeros_like(x), x), old)
    actor = state.actor.replace(opt_state=(adam, schedule))
    temperature = temperature.replace(params=log, opt_state=memory)
    return state._replace(actor=actor, temperature=temperature)


def project(params, norm):
    """Critics whose weight matrices are scaled down to this Frobenius norm where above it."""

    def scale(x):  # [K, in, out]
        return x * jnp.minimum(1.0, norm / jnp.linalg.norm(x, axis=(-2, -1), keepdims=True))

    return jax.tree.map(lambda x: scale(x) if x.ndim == 3 else x, params)


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
    return jnp.tanh(apply_fn(params, observation)[0])


def policy_params(state):
    return state.actor.params


# --- Training -----------------------------------------------------------------------------------
def train(cfg, options):
    """Train every seed of `cfg` and return its final normalised scores, [S]."""
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps)
    rows, limit = dataset.transitions, 1.0 - cfg.action_margin
    data = experiment.place(rows._replace(action=rows.action.clip(-limit, limit)), options)
    init_keys, train_keys, policy_keys = experiment.streams(cfg.seeds, 3)  # [S] each
    create = partial(create_state, batch=jax.tree.map(lambda x: x[:1], data), cfg=cfg)
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

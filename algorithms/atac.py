# SPDX-License-Identifier: Apache-2.0
"""ATAC (Cheng et al., 2022): a game of a slow actor against fast, pessimistic critics.

Paper       https://arxiv.org/abs/2202.02446
Reference   https://github.com/microsoft/ATAC
Run         python algorithms/atac.py --config configs/atac/mujoco.yaml
Parent      none
Results     docs/results.md
Deviations  The networks, their initialisation, the limits of the targets and action_margin are
            those of chinganc/lightATAC. lightATAC differs from this file in that it does not sum
            log pi over the action dimensions, resets the target critics to their initial parameters
            and the critics' optimiser at the end of the warm start, and projects no weights before
            that. The defaults are microsoft/ATAC's recipe (beta 16 with 6M updates); the configs of
            D4RL have lightATAC's (beta 3 with 1.1M). Neither code has the paper's beta per data
            set. Rows at truncations are kept.

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
    dataset: str = "local/pointmaze/umaze-v0"  # data set id or path, see docs/data.md
    seeds: tuple[int, ...] = (0,)  # trained in parallel
    num_updates: int = 6_000_000  # gradient steps of every network, including the warm start
    log_every: int = 1_000  # updates per compiled chunk, the unit of logging and saving
    eval_every: int = 20_000  # updates between evaluations
    eval_episodes: int = 10  # episodes per seed and evaluation
    batch_size: int = 256  # transitions per update
    actor_learning_rate: float = 5e-7  # Adam, after the warm start
    critic_learning_rate: float = 5e-4  # Adam; also of temperature and, in the warm start, actor
    discount: float = 0.99  # gamma, per environment step
    target_rate: float = 0.005  # tau, Polyak step of the target critics
    hidden: tuple[int, ...] = (256, 256, 256)  # widths of actor and critics
    num_critics: int = 2  # K, the target is their minimum; the actor follows the first
    # ATAC
    beta: float = 16.0  # beta, weight of the Bellman error beside the pessimism term
    warm_start: int = 100_000  # first updates: behaviour cloning, and critics without pessimism
    residual: float = 0.5  # w, weight of the residual error; the TD error has 1 - w
    weight_norm: float = 100.0  # largest Frobenius norm of a weight matrix of the critics
    lowest_target: float | None = None  # lower bound on targets, e.g. least reward / (1 - discount)
    highest_target: float | None = None  # upper bound on targets
    action_margin: float = 1e-6  # the data's actions keep this distance from -1 and 1, for log pi


# --- Networks -----------------------------------------------------------------------------------
def fan_in_uniform():
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # U(±1 / sqrt(fan in))


def uniform(bound):
    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def linear(fan_in, width):  # PyTorch's default initialisation
    return nn.Dense(width, kernel_init=fan_in_uniform(), bias_init=uniform(fan_in**-0.5))


class UnitStdActor(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, observation):  # [..., O] -> mean and log std before tanh, [..., A] each
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
        # A copy: JAX reuses the memory of the old state, so params and targets must not share any.
        target = jax.tree.map(jnp.copy, params)
        return super().create(apply_fn=apply_fn, params=params, target_params=target, tx=tx)


class State(NamedTuple):
    actor: train_state.TrainState
    critic: TrainState  # every array has a leading [K] axis
    log_temperature: train_state.TrainState  # one number, the logarithm of the temperature


def create_state(key, batch, cfg):
    """State of one seed before the first update. `batch` supplies shapes only."""
    key_actor, key_critic = jax.random.split(key)
    actor = UnitStdActor(cfg.hidden, action_dim=batch.action.shape[-1])
    critic = Critic(cfg.hidden)
    init_critics = jax.vmap(critic.init, (0, None, None))
    apply_critics = jax.vmap(critic.apply, (0, None, None))  # -> [K, B]

    actor_params = actor.init(key_actor, batch.observation)
    critic_keys = jax.random.split(key_critic, cfg.num_critics)
    critic_params = init_critics(critic_keys, batch.observation, batch.action)
    log_temperature = {"log": jnp.float32(0.0)}

    warm_rate = optax.constant_schedule(cfg.critic_learning_rate)
    slow_rate = optax.constant_schedule(cfg.actor_learning_rate)
    actor_rate = optax.join_schedules([warm_rate, slow_rate], boundaries=[cfg.warm_start])
    actor_adam = optax.adam(actor_rate)
    critic_adam = optax.adam(cfg.critic_learning_rate)
    temperature_adam = optax.adam(cfg.critic_learning_rate)
    return State(
        actor=train_state.TrainState.create(
            apply_fn=actor.apply, params=actor_params, tx=actor_adam
        ),
        critic=TrainState.create(apply_critics, critic_params, critic_adam),
        log_temperature=train_state.TrainState.create(
            apply_fn=temperature_of, params=log_temperature, tx=temperature_adam
        ),
    )


def temperature_of(params):
    """The weight of log pi in the actor loss, from its logarithm."""
    return jnp.exp(params["log"])


# --- Losses -------------------------------------------------------------------------------------
def critic_loss(params, state, batch, noise, warm, cfg):
    """(Pessimism + beta Bellman error) / max(1, beta), mean over B, summed over K. Algorithm 2.

    Pessimism: Q(s, a~) - Q(s, a) with a~ ~ pi(s); 0 while `warm`.
    Bellman error: (1 - w) TD error + w residual error. The TD error is to the minimum of the target
    critics. The residual error is to r + gamma Q(s', a') of the same critic, a' ~ pi(s'), and its
    gradient goes through both of its Qs. `noise` [2, B, A] draws a~ and a'.
    """
    action, _ = sample_policy(state.actor, batch.observation, noise[0])  # a~, [B, A]
    next_action, _ = sample_policy(state.actor, batch.next_observation, noise[1])  # a', [B, A]

    # The critics see (s, a), (s', a') and (s, a~) in one pass.
    observations = [batch.observation, batch.next_observation, batch.observation]
    actions = [batch.action, next_action, action]
    all_q = state.critic.apply_fn(params, jnp.concatenate(observations), jnp.concatenate(actions))
    q, own_next_q, policy_q = jnp.split(all_q, 3, axis=1)  # [K, 3 B] -> [K, B] each

    # Bootstrap through truncations, never through terminations.
    discount = cfg.discount * (1.0 - batch.termination)  # [B]
    next_q = state.critic.apply_fn(state.critic.target_params, batch.next_observation, next_action)
    next_q = next_q.min(axis=0)  # [K, B] -> [B]
    target = batch.reward + discount * next_q  # [B]
    target = target.clip(cfg.lowest_target, cfg.highest_target)
    own_target = batch.reward[None] + discount[None] * own_next_q  # [K, B]
    own_target = own_target.clip(cfg.lowest_target, cfg.highest_target)

    chex.assert_equal_shape([*q, *own_next_q, *policy_q, target])
    td_error = jnp.square(q - target[None]).mean(axis=1).sum()
    residual_error = jnp.square(q - own_target).mean(axis=1).sum()
    bellman_error = (1.0 - cfg.residual) * td_error + cfg.residual * residual_error
    pessimism = (policy_q - q).mean(axis=1).sum()
    pessimism = jnp.where(warm, 0.0, pessimism)
    loss = pessimism / jnp.maximum(cfg.beta, 1.0) + jnp.minimum(cfg.beta, 1.0) * bellman_error
    return loss, {
        "critic_loss": loss,
        "td_error": td_error,
        "residual_error": residual_error,
        "pessimism": pessimism,
        "q": q.mean(),
    }


def actor_loss(params, state, batch, noise, warm, cfg):
    """(temperature log pi(a~|s) - objective) / max(1, temperature), mean over B. Algorithm 2.

    a~ ~ pi(s). The objective is Q_1(s, a~); while `warm` it is log pi(a|s) of the data's action.
    """
    mean, log_std = state.actor.apply_fn(params, batch.observation)
    action, log_prob = sample_squashed(mean, log_std, noise[0])  # [B, A], [B]
    bc_log_prob = squashed_log_prob(jnp.arctanh(batch.action), mean, log_std)  # [B]
    first_critic = jax.tree.map(lambda x: x[:1], state.critic.params)
    q = state.critic.apply_fn(first_critic, batch.observation, action)
    q = q[0]  # [1, B] -> [B]
    objective = jnp.where(warm, bc_log_prob, q)
    chex.assert_equal_shape([objective, q, log_prob, bc_log_prob, batch.reward])

    temperature = state.log_temperature.apply_fn(state.log_temperature.params)
    loss = jnp.minimum(temperature, 1.0) * log_prob - objective / jnp.maximum(temperature, 1.0)
    loss = loss.mean()  # [B] -> []
    return loss, {
        "actor_loss": loss,
        "log_prob": bc_log_prob.mean(),
        "temperature": temperature,
        "entropy": -log_prob.mean(),
    }


def temperature_loss(params, entropy, action_dim):
    """log temperature (entropy - target), target -A. An entropy above it lowers the temperature."""
    target = -action_dim
    return params["log"] * (entropy - target)


def sample_policy(actor, observation, noise):
    """a ~ pi(s), [B, A], and log pi(a|s), [B], of the actor as it is."""
    mean, log_std = actor.apply_fn(actor.params, observation)
    return sample_squashed(mean, log_std, noise)


def sample_squashed(mean, log_std, noise):
    """a = tanh(mean + std noise), [B, A], and log pi(a|s), [B]."""
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
    """One step of the critics, the temperature, the actor and the targets. Algorithm 2. One seed.

    Randomness is a function of (key, step) alone, so neither the length of a chunk nor a resumed
    run changes the result. The key of a step is fold_in(key, step).
    """
    key_batch, key_noise = jax.random.split(jax.random.fold_in(key, step))
    batch = sample_batch(data, key_batch, cfg)
    noise = jax.random.normal(key_noise, (2, *batch.action.shape))  # for actions at s and at s'
    warm = step < cfg.warm_start
    state = restart(state, step == cfg.warm_start)

    grads, critic_metrics = jax.grad(critic_loss, has_aux=True)(
        state.critic.params, state, batch, noise, warm, cfg
    )
    critic = state.critic.apply_gradients(grads=grads)
    critic = critic.replace(params=project_weights(critic.params, cfg.weight_norm))
    state = state._replace(critic=critic)

    _, log_prob = sample_policy(state.actor, batch.observation, noise[0])
    entropy = -log_prob.mean()
    action_dim = batch.action.shape[-1]
    grads = jax.grad(temperature_loss)(state.log_temperature.params, entropy, action_dim)
    state = state._replace(log_temperature=state.log_temperature.apply_gradients(grads=grads))

    grads, actor_metrics = jax.grad(actor_loss, has_aux=True)(
        state.actor.params, state, batch, noise, warm, cfg
    )
    state = state._replace(actor=state.actor.apply_gradients(grads=grads))

    state = state._replace(critic=update_target(state.critic, cfg))
    return state, critic_metrics | actor_metrics


def restart(state, now):
    """If `now`, the warm start ends: temperature 1, and fresh Adam states for it and the actor."""

    def zero_if_now(tree):
        return jax.tree.map(lambda x: jnp.where(now, jnp.zeros_like(x), x), tree)

    adam_state, schedule_state = state.actor.opt_state
    # The schedule keeps its step count, by which the actor's learning rate falls.
    actor = state.actor.replace(opt_state=(zero_if_now(adam_state), schedule_state))
    log_temperature = state.log_temperature.replace(
        params=zero_if_now(state.log_temperature.params),  # log 1
        opt_state=zero_if_now(state.log_temperature.opt_state),
    )
    return state._replace(actor=actor, log_temperature=log_temperature)


def project_weights(params, max_norm):
    """Scale every weight matrix of the critics down to a Frobenius norm of at most `max_norm`."""

    def project(x):
        if x.ndim != 3:  # a bias, [K, out]
            return x
        norm = jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)  # [K, in, out] -> [K, 1, 1]
        return x * jnp.minimum(1.0, max_norm / norm)

    return jax.tree.map(project, params)


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
    mean, _ = apply_fn(params, observation)
    return jnp.tanh(mean)


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
    limit = 1.0 - cfg.action_margin
    action = dataset.transitions.action.clip(-limit, limit)
    data = experiment.place(dataset.transitions._replace(action=action), options)
    example = jax.tree.map(lambda x: x[:1], data)  # one row, for its shapes
    init_keys, train_keys, policy_keys = experiment.streams(cfg.seeds, 3)  # [S] keys each
    create = partial(create_state, batch=example, cfg=cfg)
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

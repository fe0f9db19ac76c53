# SPDX-License-Identifier: Apache-2.0
"""SAC-N (An et al., 2021): SAC on data alone, made pessimistic by the minimum of N critics.

Paper       https://arxiv.org/abs/2110.01548
Reference   https://github.com/corl-team/CORL (algorithms/offline/sac_n.py)
Run         python algorithms/sac_n.py --config configs/sac_n/mujoco.yaml
Parent      sac.py (31 lines)
Results     docs/results.md; speed and memory by N in docs/scale.md
Deviations  log pi is exact; the reference adds 1e-6 to the slope of tanh. Kernels of the critics
            are uniform in ±1 / sqrt(inputs); the reference has outputs in place of inputs there.
            The authors' code (https://github.com/snu-mllab/EDAC) initialises targets and
            critics independently and takes all gradients before the first step. Rows at a
            truncation are kept where their next observation is known.

Shapes: S seeds, K critics (the paper's N), B batch, O observation, A action. Arrays are float32.
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
    num_updates: int = 3_000_000  # gradient steps of every network
    log_every: int = 1_000  # updates per compiled chunk, the unit of logging and saving
    eval_every: int = 20_000  # updates between evaluations
    eval_episodes: int = 10  # episodes per seed and evaluation
    batch_size: int = 256  # transitions per update
    actor_learning_rate: float = 3e-4  # Adam
    critic_learning_rate: float = 3e-4  # Adam
    temperature_learning_rate: float = 3e-4  # Adam, for the weight of the entropy
    discount: float = 0.99  # gamma, per environment step
    target_rate: float = 0.005  # tau, Polyak step of the target critics
    hidden: tuple[int, ...] = (256, 256, 256)  # widths of actor and critics
    num_critics: int = 10  # K, target and actor use their minimum


# --- Networks -----------------------------------------------------------------------------------
def fan_in_uniform():
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # U(±1 / sqrt(fan in))


def uniform(bound):
    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def hidden_layer(width):
    return nn.Dense(width, kernel_init=fan_in_uniform(), bias_init=nn.initializers.constant(0.1))


class TwoHeadActor(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, observation):  # [..., O] -> mean and log std before tanh, [..., A] each
        x = observation
        for width in self.hidden:
            x = nn.relu(hidden_layer(width)(x))
        mean = nn.Dense(self.action_dim, kernel_init=uniform(1e-3), bias_init=uniform(1e-3))(x)
        log_std = nn.Dense(self.action_dim, kernel_init=uniform(1e-3), bias_init=uniform(1e-3))(x)
        return mean, log_std.clip(-5.0, 2.0)


class ReluCritic(nn.Module):
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, observation, action):  # [..., O], [..., A] -> [...]
        x = jnp.concatenate([observation, action], axis=-1)
        for width in self.hidden:
            x = nn.relu(hidden_layer(width)(x))
        return nn.Dense(1, kernel_init=uniform(3e-3), bias_init=uniform(3e-3))(x).squeeze(-1)


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
    actor = TwoHeadActor(cfg.hidden, action_dim=batch.action.shape[-1])
    critic = ReluCritic(cfg.hidden)
    init_critics = jax.vmap(critic.init, (0, None, None))
    apply_critics = jax.vmap(critic.apply, (0, None, None))  # -> [K, B]

    actor_params = actor.init(key_actor, batch.observation)
    critic_keys = jax.random.split(key_critic, cfg.num_critics)
    critic_params = init_critics(critic_keys, batch.observation, batch.action)
    log_temperature = {"log": jnp.float32(0.0)}
    actor_adam = optax.adam(cfg.actor_learning_rate)
    critic_adam = optax.adam(cfg.critic_learning_rate)
    temperature_adam = optax.adam(cfg.temperature_learning_rate)
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
def critic_loss(params, state, batch, key, cfg):
    """Squared TD error to the soft minimum of K targets, mean over B, summed over K. Algorithm 1.

    The target is r + gamma (min_k Q_k(s', a') - temperature log pi(a'|s')) with a' ~ pi(s').
    """
    noise = jax.random.normal(key, batch.action.shape)
    next_action, next_log_prob = sample_policy(state.actor, batch.next_observation, noise)
    next_q = state.critic.apply_fn(state.critic.target_params, batch.next_observation, next_action)
    next_q = next_q.min(axis=0)  # [K, B] -> [B]
    temperature = state.log_temperature.apply_fn(state.log_temperature.params)
    next_value = next_q - temperature * next_log_prob  # [B]
    # Bootstrap through truncations, never through terminations.
    target = batch.reward + cfg.discount * (1.0 - batch.termination) * next_value  # [B]

    q = state.critic.apply_fn(params, batch.observation, batch.action)  # [K, B]
    chex.assert_equal_shape([q[0], target, next_q, next_log_prob])
    loss = jnp.square(q - target[None]).mean(axis=1).sum()
    # The std over the critics is how far they disagree about the actions of the data.
    return loss, {"critic_loss": loss, "q": q.mean(), "q_std": q.std(axis=0).mean()}


def actor_loss(params, state, batch, key, cfg):
    """temperature log pi(a~|s) - min_k Q_k(s, a~) with a~ ~ pi(s), mean over B. Algorithm 1."""
    noise = jax.random.normal(key, batch.action.shape)
    mean, log_std = state.actor.apply_fn(params, batch.observation)
    action, log_prob = sample_squashed(mean, log_std, noise)  # [B, A], [B]
    q = state.critic.apply_fn(state.critic.params, batch.observation, action)
    q = q.min(axis=0)  # [K, B] -> [B]
    chex.assert_equal_shape([q, log_prob, batch.reward])
    temperature = state.log_temperature.apply_fn(state.log_temperature.params)
    entropy_loss = temperature * log_prob
    loss = (entropy_loss - q).mean()
    return loss, {"actor_loss": loss, "entropy": -log_prob.mean(), "temperature": temperature}


def temperature_loss(params, state, batch, key, cfg):
    """log temperature (entropy - target), target -A. An entropy above it lowers the temperature.

    SAC's paper, Eq. 18, has the temperature itself; published code has its logarithm, as here.
    """
    noise = jax.random.normal(key, batch.action.shape)
    _, log_prob = sample_policy(state.actor, batch.observation, noise)
    entropy = -log_prob.mean()
    target_entropy = -batch.action.shape[-1]
    loss = params["log"] * (entropy - target_entropy)
    return loss, {"temperature_loss": loss}


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
    """A gradient step of temperature, actor and critics in turn, then one of the targets. One seed.

    Randomness is a function of (key, step) alone, so neither the length of a chunk nor a resumed
    run changes the result. The key of a step is fold_in(key, step).
    """
    key = jax.random.fold_in(key, step)
    key_batch, key_temperature, key_actor, key_critic = jax.random.split(key, 4)
    batch = sample_batch(data, key_batch, cfg)

    grads, temperature_metrics = jax.grad(temperature_loss, has_aux=True)(
        state.log_temperature.params, state, batch, key_temperature, cfg
    )
    state = state._replace(log_temperature=state.log_temperature.apply_gradients(grads=grads))

    grads, actor_metrics = jax.grad(actor_loss, has_aux=True)(
        state.actor.params, state, batch, key_actor, cfg
    )
    state = state._replace(actor=state.actor.apply_gradients(grads=grads))

    grads, critic_metrics = jax.grad(critic_loss, has_aux=True)(
        state.critic.params, state, batch, key_critic, cfg
    )
    state = state._replace(critic=state.critic.apply_gradients(grads=grads))
    state = state._replace(critic=update_target(state.critic, cfg))
    return state, critic_metrics | actor_metrics | temperature_metrics


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
    data = dataset.transitions
    data = experiment.place(data, options)
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

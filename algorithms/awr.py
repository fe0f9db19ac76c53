# SPDX-License-Identifier: Apache-2.0
"""AWR (Peng et al., 2019): cloning weighted by exp(advantage) over TD(lambda) returns of the data.

Paper       https://arxiv.org/abs/1910.00177
Reference   https://github.com/xbpeng/awr
Run         python algorithms/awr.py --config configs/awr/mujoco.yaml
Parent      none
Results     benchmarks/results
Deviations  one static buffer, the paper's offline setting. Batches are drawn with replacement, the
            reference shuffles. Observation statistics are the data set's, not running ones, with
            1e-3 added to the std. optimiser=adam and fixed_std=None are additions. Rows at a
            truncation are kept where their next observation is known.

Shapes: S seeds, N data, B batch, E episodes, O observation, A action. Arrays are float32.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state

from common import datasets, evaluation, experiment, fail


# --- Config -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    dataset: str = "local/pointmaze/umaze-v0"  # data set id or path, see common/datasets.py
    seeds: tuple[int, ...] = (0,)  # trained in parallel
    num_updates: int = 1_000_000  # gradient steps of the actor
    log_every: int = 10_000  # updates per compiled chunk, the unit of logging and saving
    eval_every: int = 20_000  # updates between evaluations
    eval_episodes: int = 10  # episodes per seed and evaluation
    batch_size: int = 256  # transitions per update
    actor_learning_rate: float = 5e-5  # see optimiser
    critic_learning_rate: float = 1e-2  # of V, see optimiser
    discount: float = 0.99  # gamma, per environment step
    hidden: tuple[int, ...] = (128, 64)  # widths of actor and V
    reward_shift: float = 0.0  # added to data set rewards (AntMaze: -1)
    # AWR
    actor_updates: int = 1_000  # actor steps per iteration
    critic_updates: int = 200  # V steps per iteration, before them
    td_lambda: float = 0.95  # lambda of the returns; 1: Monte Carlo
    inverse_temperature: float = 1.0  # 1 / beta, on advantages of mean 0 and std 1
    max_weight: float = 20.0  # cap on exp(advantage / beta)
    fixed_std: float | None = 0.4  # std of the policy; None learns one per action dimension
    bound_penalty: float = 10.0  # weight of half the squared distance of means outside the box
    optimiser: Literal["momentum", "adam"] = "momentum"  # SGD with momentum 0.9, or Adam


# --- Networks -----------------------------------------------------------------------------------
def uniform(bound):
    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class UnboundedGaussianActor(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, observation):  # [..., O] -> [..., A] twice
        x = observation
        for width in self.hidden:
            x = nn.relu(nn.Dense(width, kernel_init=nn.initializers.glorot_uniform())(x))
        log_std = self.param("log_std", nn.initializers.zeros, (self.action_dim,))
        mean = nn.Dense(self.action_dim, kernel_init=uniform(0.01))(x)
        return mean, jnp.broadcast_to(log_std.clip(-5.0, 2.0), mean.shape)


class GlorotValue(nn.Module):
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, observation):  # [..., O] -> [...]
        x = observation
        for width in self.hidden:
            x = nn.relu(nn.Dense(width, kernel_init=nn.initializers.glorot_uniform())(x))
        return nn.Dense(1, kernel_init=nn.initializers.glorot_uniform())(x).squeeze(-1)


# --- State --------------------------------------------------------------------------------------
class State(NamedTuple):
    actor: train_state.TrainState
    value_net: train_state.TrainState  # (1 - gamma) V
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
    key_actor, key_value = jax.random.split(key)
    actor = UnboundedGaussianActor(cfg.hidden, batch.action.shape[-1])
    value_net = GlorotValue(cfg.hidden)
    optimiser = partial(optax.sgd, momentum=0.9) if cfg.optimiser == "momentum" else optax.adam
    create = train_state.TrainState.create
    return State(
        create(
            apply_fn=actor.apply,
            params=actor.init(key_actor, batch.observation),
            tx=optimiser(cfg.actor_learning_rate),
        ),
        create(
            apply_fn=value_net.apply,
            params=value_net.init(key_value, batch.observation),
            tx=optimiser(cfg.critic_learning_rate),
        ),
        tuple(jnp.broadcast_to(x, batch.observation.shape[-1:]) for x in statistics),
    )


# --- Losses -------------------------------------------------------------------------------------
def value_loss(params, state, batch, returns, cfg):
    """Half the squared error of V to the returns, in units of 1 / (1 - gamma). Algorithm 1."""
    value = state.value_net.apply_fn(params, batch.observation)  # [B]
    chex.assert_equal_shape([value, returns, batch.reward])
    loss = 0.5 * jnp.square(value - (1.0 - cfg.discount) * returns).mean()
    return loss, {"value_loss": loss, "value": value.mean() / (1.0 - cfg.discount)}


def actor_loss(params, state, batch, weight, cfg):
    """-weight log pi(a|s), and a penalty on means outside of the box. Algorithm 1."""
    mean, log_std = state.actor.apply_fn(params, batch.observation)
    if cfg.fixed_std is not None:
        log_std = jnp.full_like(log_std, jnp.log(cfg.fixed_std))
    log_prob = gaussian_log_prob(batch.action, mean, log_std)  # [B]
    outside = 0.5 * jnp.square(mean - mean.clip(-1.0, 1.0)).sum(axis=-1)  # [B]
    chex.assert_equal_shape([weight, log_prob, outside, batch.reward])
    loss = (cfg.bound_penalty * outside - weight * log_prob).mean()
    return loss, {"actor_loss": loss, "log_prob": log_prob.mean(), "weight": weight.mean()}


def gaussian_log_prob(x, mean, log_std):
    """log N(x; mean, std), summed over the last axis."""
    error = (x - mean) * jnp.exp(-log_std)
    return -(0.5 * jnp.square(error) + log_std + 0.5 * jnp.log(2 * jnp.pi)).sum(axis=-1)


def values(state, observation, cfg):
    """V of the whole data set, [N, O] -> [N], some thousand rows at a time."""
    apply = partial(state.value_net.apply_fn, state.value_net.params)
    return jax.lax.map(apply, observation, batch_size=4096) / (1.0 - cfg.discount)


def lambda_returns(state, data, cfg):
    """R_t = r_t + gamma ((1 - lambda) V(s_t+1) + lambda R_t+1) within episodes, [N]. Section 3.3.

    The last row of an episode (termination or truncation) takes V(s_t+1) alone, or nothing where
    it is a termination.
    """
    last = jnp.maximum(data.termination, data.truncation)
    bootstrap = (1.0 - data.termination) * values(state, data.next_observation, cfg)
    add = data.reward + cfg.discount * jnp.where(last, 1.0, 1.0 - cfg.td_lambda) * bootstrap
    factor = cfg.discount * cfg.td_lambda * (1.0 - last)

    def join(later, earlier):  # of two maps R -> add + factor * R
        return earlier[0] + earlier[1] * later[0], earlier[1] * later[1]

    return jax.lax.associative_scan(join, (add, factor), reverse=True)[0]


# --- Update -------------------------------------------------------------------------------------
def update(carry, step, key, data, cfg):
    """One iteration: `critic_updates` steps of V, then `actor_updates` of the actor. Algorithm 1.

    `carry` is the state and the lambda-returns under its V, which the next iteration regresses on.

    Randomness is a function of (key, step) alone, so neither the length of a chunk nor a resumed
    run changes the result. `key` is folded with the step, never split.
    """
    state, returns = carry
    key_value, key_actor = jax.random.split(jax.random.fold_in(key, step))

    steps = jnp.arange(cfg.critic_updates)
    value_net, value_metrics = descend(
        state.value_net, value_loss, returns, state, steps, key_value, data, cfg
    )
    state = state._replace(value_net=value_net)
    returns = lambda_returns(state, data, cfg)
    advantage = returns - values(state, data.observation, cfg)
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-5)
    weight = jnp.minimum(jnp.exp(cfg.inverse_temperature * advantage), cfg.max_weight)
    steps = jnp.arange(cfg.actor_updates)
    actor, actor_metrics = descend(
        state.actor, actor_loss, weight, state, steps, key_actor, data, cfg
    )
    return (state._replace(actor=actor), returns), value_metrics | actor_metrics


def descend(net, loss, target, state, steps, key, data, cfg):
    """Steps of `net`, each on a batch and its rows of `target` [N]. -> net, mean metrics

    Of `state` the losses use the networks' functions only.
    """

    def one(net, step):
        key_batch = jax.random.fold_in(key, step)
        index = jax.random.randint(key_batch, (cfg.batch_size,), 0, len(data.reward))
        batch = jax.tree.map(lambda x: x[index], data)
        grads, metrics = jax.grad(loss, has_aux=True)(net.params, state, batch, target[index], cfg)
        return net.apply_gradients(grads=grads), metrics

    net, metrics = jax.lax.scan(one, net, steps)
    return net, jax.tree.map(jnp.mean, metrics)


def train_chunk(state, key, start, data, cfg):
    """`log_every` updates of one seed, compiled as one program. Metrics are chunk means."""
    steps = start + jnp.arange(0, cfg.log_every, cfg.actor_updates)
    carry = state, lambda_returns(state, data, cfg)
    (state, _), metrics = jax.lax.scan(partial(update, key=key, data=data, cfg=cfg), carry, steps)
    return state, jax.tree.map(jnp.mean, metrics)


# --- Policy -------------------------------------------------------------------------------------
def policy(apply_fn, params, observation, key):
    """Mean action, clipped to [-1, 1], [..., O] -> [..., A]. `key` is not used."""
    actor_params, statistics = params
    mean, _ = apply_fn(actor_params, standardise(observation, statistics))
    return mean.clip(-1.0, 1.0)


def policy_params(state):
    return state.actor.params, state.statistics


# --- Training -----------------------------------------------------------------------------------
def train(cfg, options):
    """Train every seed of `cfg` and return its final normalised scores, [S]."""
    if cfg.discount == 1:
        fail("--discount 1.0: below 1 is wanted, V is learned in units of 1 / (1 - discount)")
    if options.data == "host" or options.devices > 1:
        fail("--data host, --devices: not here, every iteration needs V of all rows of the data")
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps)
    reward = dataset.transitions.reward + cfg.reward_shift
    data, statistics = normalise(dataset.transitions._replace(reward=reward))
    data = experiment.place(data, options)
    example = jax.tree.map(lambda x: x[:1], data)
    init_keys, train_keys, policy_keys = experiment.streams(cfg.seeds, 3)  # [S] each
    create = partial(create_state, batch=example, cfg=cfg, statistics=statistics)
    state = jax.vmap(create)(init_keys)
    # Compiled once for all seeds.
    train_seeds = experiment.over_seeds(partial(train_chunk, cfg=cfg))
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

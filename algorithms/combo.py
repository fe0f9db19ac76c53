# SPDX-License-Identifier: Apache-2.0
"""COMBO (Yu et al., 2021): MOPO's rollouts without its penalty, and CQL's on the critics instead.

Paper       https://arxiv.org/abs/2102.08363
Reference   https://github.com/yihaosun1124/OfflineRL-Kit
Run         python algorithms/combo.py --config configs/combo/mujoco.yaml
Parent      mopo.py (69 lines)
Results     docs/results.md
Deviations  Those of mopo.py about the dynamics and the rollouts. The reference updates the actor
            first, then temperature and critics, and lets the actor's rate decay. As there, the
            conservative term has CQL's soft maximum over uniform actions, those of pi(s) and those
            of pi(s'); the paper has actions of one kind. The reference means to take it over all of
            these, but takes the mean of N soft maxima over one of each. The policy makes every
            rollout; the paper has uniform actions on some data sets.

Shapes: S seeds, M members, K critics, B batch, N sampled actions, H held-out rows, R rollouts,
        C rows of the ring, O observation, A action. Arrays are float32.
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

from common import datasets, envs, evaluation, experiment, fail


# --- Config -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    dataset: str = "local/pointmaze/umaze-v0"  # data set id or path, see docs/data.md
    seeds: tuple[int, ...] = (0,)  # trained in parallel
    num_updates: int = 1_400_000  # gradient steps: first the dynamics', then those of SAC
    log_every: int = 1_000  # updates per compiled chunk, the unit of logging and saving
    eval_every: int = 20_000  # updates between evaluations
    eval_episodes: int = 10  # episodes per seed and evaluation
    batch_size: int = 256  # transitions per update
    actor_learning_rate: float = 1e-4  # Adam
    critic_learning_rate: float = 3e-4  # Adam
    temperature_learning_rate: float = 1e-4  # Adam, for the weight of the entropy
    discount: float = 0.99  # gamma, per environment step
    target_rate: float = 0.005  # tau, Polyak step of the target critics
    hidden: tuple[int, ...] = (256, 256, 256)  # widths of actor and critics
    num_critics: int = 2  # K, target and actor use their minimum
    # Dynamics
    model_updates: int = 400_000  # first updates, of the dynamics alone; 0 with --start-from
    model_learning_rate: float = 1e-3  # Adam
    model_hidden: tuple[int, ...] = (200, 200, 200, 200)  # widths of a member
    model_decays: tuple[float, ...] = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)  # of weights, by layer
    num_models: int = 7  # M, members of the ensemble
    num_elites: int = 5  # members that the rollouts use, those of the lowest holdout error
    holdout_every: int = 4_000  # updates between two measurements of the holdout error
    patience: int = 5  # measurements without a member better by 1 %, after which the fit stops
    rollout_every: int = 1_000  # updates between two generations of rollouts
    rollout_batch: int = 50_000  # R, rollouts of a generation
    rollout_length: int = 5  # h, steps of a rollout that does not end before
    generations: int = 5  # full generations that the ring of model rows has room for
    real_ratio: float = 0.5  # share of a batch's rows that are the data's
    # COMBO
    conservative_weight: float = 5.0  # beta, weight of the conservative term
    num_samples: int = 10  # N, actions per state of each kind: uniform, of pi(s), of pi(s')
    rho: Literal["mixed", "model"] = "mixed"  # states that the term pushes down: all, or model rows


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


class Dynamics(nn.Module):
    hidden: tuple[int, ...]
    width: int  # numbers that are predicted, O + 1

    @nn.compact
    def __call__(self, x):  # [..., O + A] -> mean and log variance, [..., O + 1] each
        init = nn.initializers.variance_scaling(0.25, "fan_in", "normal")
        for width in self.hidden:
            x = nn.swish(nn.Dense(width, kernel_init=init)(x))
        output = nn.Dense(2 * self.width, kernel_init=init)(x)
        mean, log_variance = jnp.split(output, 2, axis=-1)
        return mean, log_variance


# --- State --------------------------------------------------------------------------------------
class TrainState(train_state.TrainState):
    target_params: Any  # slow copy of params

    @classmethod
    def create(cls, apply_fn, params, tx):
        # A copy: JAX reuses the memory of the old state, so params and targets must not share any.
        target = jax.tree.map(jnp.copy, params)
        return super().create(apply_fn=apply_fn, params=params, target_params=target, tx=tx)


UNMEASURED = 1e10  # the holdout error of a member before the first measurement


class Fit(NamedTuple):
    best: Any  # the parameters of every member at its lowest holdout error
    best_error: jax.Array  # [M] that error, a mean square
    scaled_error: jax.Array  # [M] the last error, as a root in units of the std of the data
    waiting: jax.Array  # measurements since a member became better by 1 %
    input_statistics: tuple[jax.Array, jax.Array]  # mean and std of the inputs, [O + A] each
    elites: jax.Array  # [num_elites] members of the lowest error, once the fit has ended


class ModelRows(NamedTuple):
    """Transitions as SAC reads them, of the dynamics or of the data."""

    observation: jax.Array  # [N, O]
    action: jax.Array  # [N, A]
    reward: jax.Array  # [N]
    next_observation: jax.Array  # [N, O]
    termination: jax.Array  # [N]


class Ring(NamedTuple):
    rows: ModelRows  # [C, ...], new ones take the place of the oldest
    position: jax.Array  # where the next row goes
    filled: jax.Array  # rows that have been written, C at most


class State(NamedTuple):
    actor: train_state.TrainState
    critic: TrainState  # every array has a leading [K] axis
    log_temperature: train_state.TrainState  # one number, the logarithm of the temperature
    dynamics: train_state.TrainState  # "members" with a leading [M] axis, bounds [O + 1]
    fit: Fit
    healthy: tuple[jax.Array, jax.Array]  # an episode goes on between these numbers, [O] each
    ring: Ring


def create_state(key, batch, cfg, healthy=None):
    """State of one seed before the first update. `batch` supplies shapes only.

    `healthy`: see envs.healthy_range; without it no rollout ends.
    """
    key_actor, key_critic, key_dynamics = jax.random.split(key, 3)
    width = batch.observation.shape[-1]
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
    dynamics = create_dynamics(key_dynamics, batch, cfg)
    if healthy is None:
        largest = jnp.full(width, jnp.finfo(jnp.float32).max)
        healthy = -largest, largest
    return State(
        actor=train_state.TrainState.create(
            apply_fn=actor.apply, params=actor_params, tx=actor_adam
        ),
        critic=TrainState.create(apply_critics, critic_params, critic_adam),
        log_temperature=train_state.TrainState.create(
            apply_fn=temperature_of, params=log_temperature, tx=temperature_adam
        ),
        dynamics=dynamics,
        fit=blank_fit(dynamics.params, batch, cfg),
        healthy=healthy,
        ring=blank_ring(batch, cfg),
    )


def create_dynamics(key, batch, cfg):
    """The ensemble: M networks of one architecture, which share the bounds of the log variance."""
    width = batch.observation.shape[-1] + 1
    network = Dynamics(cfg.model_hidden, width)
    x = jnp.concatenate([batch.observation, batch.action], axis=-1)
    members = jax.vmap(network.init, (0, None))(jax.random.split(key, cfg.num_models), x)
    params = {
        "members": members,
        "max_log_variance": jnp.full(width, 0.5),
        "min_log_variance": jnp.full(width, -10.0),
    }
    return train_state.TrainState.create(
        apply_fn=jax.vmap(network.apply),  # -> [M, B, O + 1] twice
        params=params,
        tx=optax.adam(cfg.model_learning_rate),
    )


def blank_fit(params, batch, cfg):
    inputs = batch.observation.shape[-1] + batch.action.shape[-1]
    return Fit(
        best=jax.tree.map(jnp.copy, params["members"]),
        best_error=jnp.full(cfg.num_models, UNMEASURED),
        scaled_error=jnp.zeros(cfg.num_models),
        waiting=jnp.int32(0),
        input_statistics=(jnp.zeros(inputs), jnp.ones(inputs)),
        elites=jnp.arange(cfg.num_elites),
    )


def blank_ring(batch, cfg):
    """A ring without rows; its capacity is that of `generations` in which no rollout ends."""
    capacity = cfg.generations * cfg.rollout_batch * cfg.rollout_length

    def room(column):
        return jnp.zeros((capacity, *column.shape[1:]))

    rows = ModelRows(
        observation=room(batch.observation),
        action=room(batch.action),
        reward=room(batch.reward),
        next_observation=room(batch.next_observation),
        termination=room(batch.termination),
    )
    return Ring(rows, position=jnp.int32(0), filled=jnp.int32(0))


def temperature_of(params):
    """The weight of log pi in the actor loss, from its logarithm."""
    return jnp.exp(params["log"])


# --- Losses -------------------------------------------------------------------------------------
def critic_loss(params, state, batch, key, cfg):
    """Squared TD error + beta (log sum_a~ exp Q(s, a~) over rho - Q(s, a) over the data).

    Means over the rows, summed over K. The target is r + gamma min_k Q_k(s', a'), a' ~ pi(s'). The
    first rows of a batch are those of the data.
    """
    key_next, key_actions = jax.random.split(key)
    noise = jax.random.normal(key_next, batch.action.shape)
    next_action, _ = sample_policy(state.actor, batch.next_observation, noise)
    next_q = state.critic.apply_fn(state.critic.target_params, batch.next_observation, next_action)
    next_q = next_q.min(axis=0)  # [K, B] -> [B]
    # Bootstrap through truncations, never through terminations.
    target = batch.reward + cfg.discount * (1.0 - batch.termination) * next_q  # [B]

    q = state.critic.apply_fn(params, batch.observation, batch.action)  # [K, B]
    chex.assert_equal_shape([*q, target, next_q])
    td_error = jnp.square(q - target[None]).mean(axis=1).sum()

    num_real = int(cfg.real_ratio * cfg.batch_size)
    first = num_real if cfg.rho == "model" else 0
    rows = jax.tree.map(lambda column: column[first:], batch)
    action, log_density = sampled_actions(state.actor, rows, key_actions, cfg)
    observation = jnp.repeat(rows.observation[:, None], 3 * cfg.num_samples, axis=1)
    sampled_q = state.critic.apply_fn(params, observation, action)  # [K, B, 3N]
    chex.assert_equal_shape([*sampled_q, log_density])
    soft_maximum = jax.nn.logsumexp(sampled_q - log_density[None], axis=-1)  # [K, B]
    pushed_down = soft_maximum.mean(axis=1)  # [K]
    pushed_up = q[:, :num_real].mean(axis=1)  # [K]
    conservative_gap = (pushed_down - pushed_up).sum()
    loss = td_error + cfg.conservative_weight * conservative_gap
    metrics = {"critic_loss": loss, "td_error": td_error, "q": q.mean()}
    return loss, metrics | {"conservative_gap": conservative_gap}


def actor_loss(params, state, batch, key, cfg):
    """temperature log pi(a~|s) - min_k Q_k(s, a~) with a~ ~ pi(s), mean over B. Eq. 9 of SAC."""
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


def dynamics_loss(params, state, batch, cfg):
    """Negative log likelihood, mean over B and O + 1, summed over M, with a decay of the weights.

    Batches are [M, B, ...]. A hundredth of the distance of the bounds of the log variance is added,
    so that they close in on what the data need.
    """
    target = dynamics_target(batch)  # [M, B, O + 1]
    mean, log_variance = predict(state, params, batch.observation, batch.action)
    chex.assert_equal_shape([mean, log_variance, target])
    square = jnp.square(mean - target) * jnp.exp(-log_variance)
    # Twice the negative log likelihood, without its constant.
    nll = (square + log_variance).mean(axis=-1)  # [M, B]
    known = next_is_known(batch)  # [M, B]
    chex.assert_equal_shape([nll, known, batch.reward])
    member_loss = (nll * known).sum(axis=1) / known.sum(axis=1).clip(min=1.0)  # [M]
    bounds = params["max_log_variance"].sum() - params["min_log_variance"].sum()
    loss = member_loss.sum() + 0.01 * bounds + weight_decay(params["members"], cfg)
    return loss, {"dynamics_loss": loss}


def weight_decay(members, cfg):
    """Half the squares of the kernels, summed over M, with a weight for each layer."""
    total = 0.0
    for i, decay in enumerate(cfg.model_decays):
        kernel = members["params"][f"Dense_{i}"]["kernel"]
        total += decay * 0.5 * jnp.square(kernel).sum()
    return total


def predict(state, params, observation, action):
    """Mean and log variance of (s' - s, r) by each member, from [M, B, O] and [M, B, A]."""
    x = jnp.concatenate([observation, action], axis=-1)
    mean, std = state.fit.input_statistics
    x = (x - mean[None, None]) / std[None, None]
    mean, log_variance = state.dynamics.apply_fn(params["members"], x)
    highest = params["max_log_variance"][None, None]
    lowest = params["min_log_variance"][None, None]
    log_variance = highest - jax.nn.softplus(highest - log_variance)
    log_variance = lowest + jax.nn.softplus(log_variance - lowest)
    return mean, log_variance


def dynamics_target(batch):
    """(s' - s, r), [..., O + 1]."""
    change = batch.next_observation - batch.observation
    return jnp.concatenate([change, batch.reward[..., None]], axis=-1)


def next_is_known(batch):
    """1 where the next observation was recorded. At an end without one it repeats the row's own."""
    same = (batch.next_observation == batch.observation).all(axis=-1)
    return 1.0 - same * batch.termination


def sampled_actions(actor, batch, key, cfg):
    """Uniform actions, those of pi(s) and of pi(s'), [B, 3N, A], and log densities, [B, 3N]."""
    key_uniform, key_here, key_there = jax.random.split(key, 3)
    shape = (len(batch.action), cfg.num_samples, batch.action.shape[-1])
    uniform_action = jax.random.uniform(key_uniform, shape, minval=-1.0, maxval=1.0)
    uniform_log_density = jnp.full(shape[:2], shape[-1] * jnp.log(0.5))
    here = jnp.repeat(batch.observation[:, None], cfg.num_samples, axis=1)  # [B, N, O]
    there = jnp.repeat(batch.next_observation[:, None], cfg.num_samples, axis=1)
    here_action, here_log_prob = sample_policy(actor, here, jax.random.normal(key_here, shape))
    there_action, there_log_prob = sample_policy(actor, there, jax.random.normal(key_there, shape))
    action = jnp.concatenate([uniform_action, here_action, there_action], axis=1)
    return action, jnp.concatenate([uniform_log_density, here_log_prob, there_log_prob], axis=1)


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
def model_update(state, step, key, data, cfg):
    """A gradient step of the dynamics and, at times, a measurement of their errors. One seed.

    The first phase. Its key of a step is fold_in(key, step), as in `update`. Once the fit has
    stopped, a step changes nothing, but for the last one.
    """
    index = bootstrap_rows(key, step, len(data.reward), cfg)  # [M, B]
    held_out = holdout_rows(key, len(data.reward))  # [H]
    fitting = state.fit.waiting < cfg.patience
    dynamics, fit, loss = jax.lax.cond(
        fitting,
        partial(fit_step, step=step, index=index, held_out=held_out, data=data, cfg=cfg),
        lambda state: (state.dynamics, state.fit, jnp.float32(0.0)),
        state,
    )
    state = state._replace(dynamics=dynamics, fit=fit)
    is_last = step == cfg.model_updates - 1
    dynamics, fit = jax.lax.cond(
        is_last, partial(finish_fit, cfg=cfg), lambda state: (state.dynamics, state.fit), state
    )
    state = state._replace(dynamics=dynamics, fit=fit)
    metrics = {"dynamics_loss": loss, "fitting": fitting.astype(jnp.float32)}
    for member in range(cfg.num_models):
        metrics[f"holdout_error_{member}"] = state.fit.scaled_error[member]
    return state, metrics


def fit_step(state, step, index, held_out, data, cfg):
    """Dynamics and fit after a gradient step, and after a measurement if it is time for one.

    `index` has the rows of the step, [M, B], and `held_out` those of the measurement, [H]. The
    third result is the loss of the step.
    """
    batch = jax.tree.map(lambda column: column[index], data)
    grads, metrics = jax.grad(dynamics_loss, has_aux=True)(state.dynamics.params, state, batch, cfg)
    state = state._replace(dynamics=state.dynamics.apply_gradients(grads=grads))
    is_last = step == cfg.model_updates - 1  # what comes after the last measurement is lost
    measures = (step == 0) | ((step + 1) % cfg.holdout_every == 0) | is_last
    fit = jax.lax.cond(
        measures,
        partial(measure_holdout, held_out=held_out, data=data),
        lambda state: state.fit,
        state,
    )
    return state.dynamics, fit, metrics["dynamics_loss"]


def finish_fit(state, cfg):
    """Dynamics with the best parameters of every member, and the fit, which knows the elites."""
    params = state.dynamics.params | {"members": state.fit.best}
    elites = state.fit.best_error.argsort()[: cfg.num_elites]
    return state.dynamics.replace(params=params), state.fit._replace(elites=elites)


def measure_holdout(state, held_out, data):
    """The fit after a measurement: each member's best parameters and their holdout error."""
    batch = jax.tree.map(lambda column: column[held_out], data)
    members = len(state.fit.best_error)
    repeated = jax.tree.map(lambda x: jnp.broadcast_to(x, (members, *x.shape)), batch)
    target = dynamics_target(repeated)  # [M, H, O + 1]
    mean, _ = predict(state, state.dynamics.params, repeated.observation, repeated.action)
    chex.assert_equal_shape([mean, target])
    known = next_is_known(repeated)[..., None]  # [M, H, 1]
    count = known[0].sum().clip(min=1.0)
    square = jnp.square(mean - target) * known
    error = square.sum(axis=1).mean(axis=-1) / count  # [M]

    center = (target * known).sum(axis=1, keepdims=True) / count
    variance = (jnp.square(target - center) * known).sum(axis=1) / count  # [M, O + 1]
    variance = jnp.where(variance < 1e-12, 1.0, variance)
    scaled_error = jnp.sqrt((square.sum(axis=1) / count / variance).mean(axis=-1))  # [M]

    better = error < 0.99 * state.fit.best_error
    best = jax.tree.map(
        partial(jax.vmap(jnp.where), better),
        state.dynamics.params["members"],
        state.fit.best,
    )
    return state.fit._replace(
        best=best,
        best_error=jnp.where(better, error, state.fit.best_error),
        scaled_error=scaled_error,
        waiting=jnp.where(better.any(), 0, state.fit.waiting + 1),
    )


def holdout_size(count):
    """A fifth of the rows, 1000 at most."""
    return max(1, min(count // 5, 1000))


def fit_keys(key):
    """Two keys, the same at every step: of the held-out rows and of the bootstrap samples."""
    return jax.random.split(jax.random.fold_in(key, 2**32 - 1))  # no step has this number


def holdout_offsets(key, count):
    """[H] the place of the held-out row in each block of count // H rows.

    Every block has its own. One place for all blocks could hold out the same time step of every
    episode, since the length of an episode may be a multiple of a block's.
    """
    size = holdout_size(count)
    key_holdout, _ = fit_keys(key)
    return jax.random.randint(key_holdout, (size,), 0, count // size)


def holdout_rows(key, count):
    """[H] the rows that no member learns from: a random one of each block of count // H rows."""
    size = holdout_size(count)
    return holdout_offsets(key, count) + count // size * jnp.arange(size)


def training_rows(key, number, count):
    """The rows that are not held out, by their `number` among these, from 0 to count - H - 1."""
    size = holdout_size(count)
    length = count // size  # rows of a block, one of which is held out
    block = number // (length - 1)
    inside = number % (length - 1)
    offset = holdout_offsets(key, count)[block.clip(max=size - 1)]
    row = block * length + inside + (inside >= offset)
    # The rows behind the last block are too few for another one. None of them is held out.
    return jnp.where(block < size, row, number + size)


def bootstrap_rows(key, step, count, cfg):
    """[M, B] rows of a step: each member draws from its own sample of the rows not held out.

    A sample is as large as what it is drawn from, with replacement. It is never written out: its
    i-th row is a random number whose key is that of the member and i.
    """
    remaining = count - holdout_size(count)
    shape = cfg.num_models, cfg.batch_size
    place = jax.random.randint(jax.random.fold_in(key, step), shape, 0, remaining)
    _, key_samples = fit_keys(key)
    member_keys = jax.random.split(key_samples, cfg.num_models)

    def number_of(member_key, i):
        return jax.random.randint(jax.random.fold_in(member_key, i), (), 0, remaining)

    number = jax.vmap(jax.vmap(number_of, (None, 0)))(member_keys, place)  # [M, B]
    return training_rows(key, number, count)


def update(state, step, key, data, cfg):
    """A gradient step of SAC and, at times, a generation of rollouts before it. One seed.

    The second phase: the dynamics stay as they are. Randomness is a function of (key, step) alone,
    so neither the length of a chunk nor a resumed run changes the result. The key of a step is
    fold_in(key, step).
    """
    key_rollout, key_policy = jax.random.split(jax.random.fold_in(key, step))
    rolls = (step - cfg.model_updates) % cfg.rollout_every == 0
    ring = jax.lax.cond(
        rolls,
        partial(roll_out, key=key_rollout, data=data, model_step=unpenalised_step, cfg=cfg),
        lambda state: state.ring,
        state,
    )
    state = state._replace(ring=ring)
    return policy_update(state, step, key_policy, data, cfg)


def policy_update(state, step, key, data, cfg):
    """A gradient step of temperature, actor and critics in turn, then one of the targets."""
    key_batch, key_temperature, key_actor, key_critic = jax.random.split(key, 4)
    batch = mixed_batch(state, data, key_batch, cfg)

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
    batch_metrics = {"reward": batch.reward.mean(), "model_rows": state.ring.filled * 1.0}
    return state, critic_metrics | actor_metrics | temperature_metrics | batch_metrics


def mixed_batch(state, data, key, cfg):
    """Rows of the data, then rows of the ring: `batch_size` in all, drawn with replacement."""
    key_real, key_model = jax.random.split(key)
    num_real = int(cfg.real_ratio * cfg.batch_size)
    index = jax.random.randint(key_real, (num_real,), 0, len(data.reward))
    real = ModelRows(
        observation=data.observation[index],
        action=data.action[index],
        reward=data.reward[index],
        next_observation=data.next_observation[index],
        termination=data.termination[index],
    )
    num_model = cfg.batch_size - num_real
    index = jax.random.randint(key_model, (num_model,), 0, state.ring.filled)
    model = jax.tree.map(lambda column: column[index], state.ring.rows)
    chex.assert_equal_rank([real.reward, model.reward, real.termination])
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), real, model)


def roll_out(state, key, data, model_step, cfg):
    """The ring after a generation: R rollouts of the policy from observations of the data.

    `model_step(state, observation, key, cfg)` makes a step of all of them.
    """
    key_start, key_steps = jax.random.split(key)
    index = jax.random.randint(key_start, (cfg.rollout_batch,), 0, len(data.reward))
    observation = data.observation[index]
    alive = jnp.ones(cfg.rollout_batch, bool)

    def one_step(carry, number):
        ring, observation, alive = carry
        rows = model_step(state, observation, jax.random.fold_in(key_steps, number), cfg)
        ring = write_ring(ring, rows, alive)
        alive = alive & (rows.termination == 0)
        # A rollout that has ended stays where it is. Nothing of it is written any more.
        observation = jnp.where(alive[:, None], rows.next_observation, observation)
        return (ring, observation, alive), None

    numbers = jnp.arange(cfg.rollout_length)
    (ring, _, _), _ = jax.lax.scan(one_step, (state.ring, observation, alive), numbers)
    return ring


def unpenalised_step(state, observation, key, cfg):
    """A step of every rollout, [R, ...]: a ~ pi(s), and s', r by a random elite."""
    key_action, key_member, key_noise = jax.random.split(key, 3)
    mean, log_std = state.actor.apply_fn(state.actor.params, observation)
    action, _ = sample_squashed(mean, log_std, jax.random.normal(key_action, mean.shape))
    mean, std = ensemble(state, observation, action)  # [M, R, O + 1] each
    next_observation, reward = sample_elite(
        state, observation, mean, std, key_member, key_noise, cfg
    )
    return ModelRows(
        observation=observation,
        action=action,
        reward=reward,
        next_observation=next_observation,
        termination=ends(state, next_observation),
    )


def ensemble(state, observation, action):
    """Mean and std of (s' - s, r) by every member, [M, R, O + 1] each."""
    members = len(state.fit.best_error)
    observation = jnp.broadcast_to(observation, (members, *observation.shape))
    action = jnp.broadcast_to(action, (members, *action.shape))
    mean, log_variance = predict(state, state.dynamics.params, observation, action)
    return mean, jnp.exp(0.5 * log_variance)


def sample_elite(state, observation, mean, std, key_member, key_noise, cfg):
    """s' and r, drawn for every row from the Gaussian of one of the elites, [R, O] and [R]."""
    rows = jnp.arange(len(observation))
    member = state.fit.elites[jax.random.randint(key_member, (len(rows),), 0, cfg.num_elites)]
    noise = jax.random.normal(key_noise, mean.shape[1:])
    sample = mean[member, rows] + std[member, rows] * noise
    return observation + sample[:, :-1], sample[:, -1]


def ends(state, next_observation):
    """1 where the env would end the episode, [R]."""
    low, high = state.healthy
    healthy = (next_observation > low[None]) & (next_observation < high[None])
    return 1.0 - healthy.all(axis=-1)


def write_ring(ring, rows, alive):
    """The ring with those rows that are `alive`, [R], in the place of the oldest ones."""
    capacity = len(ring.rows.reward)
    place = (ring.position + jnp.cumsum(alive) - 1) % capacity
    place = jnp.where(alive, place, capacity)  # a place outside of the ring: not written
    columns = jax.tree.map(lambda x, new: x.at[place].set(new, mode="drop"), ring.rows, rows)
    count = alive.sum()
    filled = jnp.minimum(ring.filled + count, capacity)
    return Ring(columns, position=(ring.position + count) % capacity, filled=filled)


def update_target(net, cfg):
    target_params = optax.incremental_update(net.params, net.target_params, cfg.target_rate)
    return net.replace(target_params=target_params)


def model_chunk(state, key, start, data, cfg):
    """`log_every` updates of the first phase, as `train_chunk` makes those of the second."""
    # With --start-from, the record is of another fit, whose rows may have been others: begin anew.
    fit = state.fit._replace(
        best_error=jnp.where(start == 0, UNMEASURED, state.fit.best_error),
        waiting=jnp.where(start == 0, 0, state.fit.waiting),
        input_statistics=input_statistics(data),
    )
    state = state._replace(fit=fit)
    steps = start + jnp.arange(cfg.log_every)
    state, metrics = jax.lax.scan(partial(model_update, key=key, data=data, cfg=cfg), state, steps)
    return state, jax.tree.map(jnp.mean, metrics)


def input_statistics(data):
    """Mean and std of observations and actions, [O + A] each."""
    x = jnp.concatenate([data.observation, data.action], axis=-1)
    std = x.std(axis=0)
    return x.mean(axis=0), jnp.where(std < 1e-6, 1.0, std)


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
    check_model(cfg, options)
    num_real = int(cfg.real_ratio * cfg.batch_size)
    if not 0 < num_real < cfg.batch_size:
        fail(
            f"--real-ratio {cfg.real_ratio}: {num_real} of {cfg.batch_size} rows of a batch are "
            "the data's; at least one must be, and one the model's"
        )
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps)
    if len(dataset.transitions.reward) < 2:
        fail(f"{cfg.dataset}: one row is too few, since the fit of the dynamics holds one out")
    data = experiment.place(dataset.transitions, options)
    example = jax.tree.map(lambda x: x[:1], data)  # one row, for its shapes
    healthy = envs.healthy_range(dataset.make_env, dataset.transitions)
    init_keys, train_keys, policy_keys = experiment.streams(cfg.seeds, 3)  # [S] keys each
    create = partial(create_state, batch=example, cfg=cfg, healthy=healthy)
    state = jax.vmap(create)(init_keys)
    # Compiled once for all seeds.
    model_seeds = experiment.over_seeds(partial(model_chunk, cfg=cfg))
    train_seeds = experiment.over_seeds(partial(train_chunk, cfg=cfg))
    act = policy_fn(state, cfg)

    with (
        experiment.Run(cfg, options, dataset) as run,
        evaluation.Rollouts(dataset, act, policy_keys, cfg) as rollouts,
    ):
        state, metrics, start = run.restore(state)
        for step in run.boundaries(start):  # start, start + log_every, ..., num_updates
            run.save(step, state, metrics)
            scores = None
            if run.evaluates(step) and step >= cfg.model_updates:  # from the actor's phase on
                scores = rollouts.start(policy_params(state), step)
            last_metrics = metrics  # of the chunk that ended at this step
            # An accelerator trains while the CPU evaluates.
            if step < cfg.model_updates:  # the first phase
                state, metrics = model_seeds(state, train_keys, step, data)
            elif step < cfg.num_updates:  # the second one
                state, metrics = train_seeds(state, train_keys, step, data)
            run.log(step, last_metrics, scores)
    return run.scores


def check_model(cfg, options):
    """Exit with code 2 after one line, where the dynamics cannot be as they are asked for."""
    if cfg.num_elites > cfg.num_models:
        fail(f"--num-elites {cfg.num_elites}: at most --num-models, {cfg.num_models}")
    layers = len(cfg.model_hidden) + 1
    if len(cfg.model_decays) != layers:
        given = " ".join(map(str, cfg.model_decays))
        fail(f"--model-decays {given}: give {layers} numbers, one for each layer of the dynamics")
    if cfg.model_updates == 0 and options.start_from is None:
        fail("--model-updates 0: no dynamics; take those of another run, with --start-from FOLDER")
    if options.data == "host" or options.devices > 1:
        fail("--data host, --devices: a model of the env supports neither; start it without them")


if __name__ == "__main__":
    train(*experiment.parse(Config))

# SPDX-License-Identifier: Apache-2.0
"""AWAC (Nair et al., 2020): a TD critic of the policy; cloning weighted by exp(advantage).

Paper       https://arxiv.org/abs/2006.09359
Reference   https://github.com/corl-team/CORL (algorithms/offline/awac.py)
Run         python algorithms/awac.py --config configs/awac/mujoco.yaml
Parent      iql.py (239 lines)
Results     docs/results.md
Deviations  The initialisation, the tanh on the mean and the range [-5, 2] of log_std are those of
            ikostrikov's IQL (his AWAC has [-10, 2]). CORL has PyTorch's initialisation, no tanh and
            [-20, 2]: 30.0 ± 1.8 in place of 28.6 ± 2.3 on hopper-medium-v4, and no better on
            local/pointmaze/umaze-v0 (benchmarks/results/awac_networks.md). The paper's rlkit code
            has a 4 x 256 actor with weight decay, batch 1024 and weight=softmax. Rows at a
            truncation are kept if their next observation is known.

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

from common import datasets, evaluation, experiment, interaction


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
    actor_learning_rate: float = 3e-4  # Adam
    critic_learning_rate: float = 3e-4  # Adam
    discount: float = 0.99  # gamma, per environment step
    target_rate: float = 0.005  # tau, Polyak step of the target critics
    hidden: tuple[int, ...] = (256, 256, 256)  # widths of actor and critics
    num_critics: int = 2  # K, the target and the advantage take their minimum
    reward_shift: float = 0.0  # added to all rewards (AntMaze: -1)
    # AWAC
    inverse_temperature: float = 3.0  # 1 / lambda, Eq. 13
    weight: Literal["exp", "softmax"] = "exp"  # exp(A / lambda) up to 100, or softmax over batch
    # Online phase
    online_updates: int = 0  # gradient steps of online training, after the offline ones
    updates_per_step: int = 1  # updates per env step
    steps_per_refresh: int = 1  # env steps between updates of the acting policy


# --- Networks -----------------------------------------------------------------------------------
def orthogonal_dense(width):
    return nn.Dense(width, kernel_init=nn.initializers.orthogonal(2**0.5))


class GaussianActor(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, observation):  # [..., O] -> mean and log std, [..., A] each
        x = observation
        for width in self.hidden:
            x = nn.relu(orthogonal_dense(width)(x))
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
    actor = GaussianActor(cfg.hidden, action_dim=batch.action.shape[-1])
    critic = OrthogonalReluCritic(cfg.hidden)
    init_critics = jax.vmap(critic.init, (0, None, None))
    apply_critics = jax.vmap(critic.apply, (0, None, None))  # -> [K, B]

    actor_params = actor.init(key_actor, batch.observation)
    critic_keys = jax.random.split(key_critic, cfg.num_critics)
    critic_params = init_critics(critic_keys, batch.observation, batch.action)
    actor_adam = optax.adam(cfg.actor_learning_rate)
    critic_adam = optax.adam(cfg.critic_learning_rate)
    mean, std = statistics
    observation_shape = batch.observation.shape[-1:]
    return State(
        actor=train_state.TrainState.create(
            apply_fn=actor.apply, params=actor_params, tx=actor_adam
        ),
        critic=TrainState.create(apply_critics, critic_params, critic_adam),
        statistics=(
            jnp.broadcast_to(mean, observation_shape),
            jnp.broadcast_to(std, observation_shape),
        ),
    )


# --- Losses -------------------------------------------------------------------------------------
def critic_loss(params, state, batch, key, cfg):
    """Squared error of Q_k(s, a) to the target, mean over B, summed over K.

    Target: r + gamma min_k Q_k(s', a') of the target networks, with a' ~ pi(s').
    """
    next_action = sample_action(state.actor, batch.next_observation, key)  # [B, A]
    next_q = state.critic.apply_fn(state.critic.target_params, batch.next_observation, next_action)
    next_q = next_q.min(axis=0)  # [K, B] -> [B]
    # Bootstrap through truncations, never through terminations.
    target = batch.reward + cfg.discount * (1.0 - batch.termination) * next_q  # [B]

    q = state.critic.apply_fn(params, batch.observation, batch.action)  # [K, B]
    chex.assert_equal_shape([*q, target])
    loss = jnp.square(q - target[None]).mean(axis=1).sum()
    return loss, {"critic_loss": loss, "q": q.mean()}


def actor_loss(params, state, batch, key, cfg):
    """-exp(A / lambda) log pi(a|s), A = min_k Q_k(s, a) - min_k Q_k(s, a~), a~ ~ pi(s). Eq. 13."""
    q = state.critic.apply_fn(state.critic.params, batch.observation, batch.action)
    q = q.min(axis=0)  # [K, B] -> [B]
    policy_action = sample_action(state.actor, batch.observation, key)  # [B, A]
    value = state.critic.apply_fn(state.critic.params, batch.observation, policy_action)
    value = value.min(axis=0)  # [K, B] -> [B]
    scaled_advantage = cfg.inverse_temperature * (q - value)
    if cfg.weight == "softmax":  # times B, so that the mean weight is 1
        weight = len(scaled_advantage) * jax.nn.softmax(scaled_advantage)
    else:
        weight = jnp.minimum(jnp.exp(scaled_advantage), 100.0)

    mean, log_std = state.actor.apply_fn(params, batch.observation)
    log_prob = gaussian_log_prob(batch.action, mean, log_std)  # [B]
    chex.assert_equal_shape([log_prob, weight, batch.reward])
    loss = -(weight * log_prob).mean()
    return loss, {"actor_loss": loss, "log_prob": log_prob.mean(), "weight": weight.mean()}


def sample_action(actor, observation, key):
    """One action of the policy per row, clipped to [-1, 1], [B, O] -> [B, A]."""
    mean, log_std = actor.apply_fn(actor.params, observation)
    noise = jax.random.normal(key, mean.shape)
    return (mean + jnp.exp(log_std) * noise).clip(-1.0, 1.0)


def gaussian_log_prob(x, mean, log_std):
    """log N(x; mean, std), summed over the last axis."""
    error = (x - mean) * jnp.exp(-log_std)
    return -(0.5 * jnp.square(error) + log_std + 0.5 * jnp.log(2 * jnp.pi)).sum(axis=-1)


# --- Update -------------------------------------------------------------------------------------
def update(state, step, key, data, cfg):
    """One step of the critics, then the actor, then the target critics, on one batch. One seed.

    Randomness is a function of (key, step) alone, so neither the length of a chunk nor a resumed
    run changes the result. The key of a step is fold_in(key, step).
    """
    key_batch, key_critic, key_actor = jax.random.split(jax.random.fold_in(key, step), 3)
    batch = sample_batch(data, key_batch, cfg)

    grads, critic_metrics = jax.grad(critic_loss, has_aux=True)(
        state.critic.params, state, batch, key_critic, cfg
    )
    state = state._replace(critic=state.critic.apply_gradients(grads=grads))

    grads, actor_metrics = jax.grad(actor_loss, has_aux=True)(
        state.actor.params, state, batch, key_actor, cfg
    )
    state = state._replace(actor=state.actor.apply_gradients(grads=grads))

    state = state._replace(critic=update_target(state.critic, cfg))
    return state, critic_metrics | actor_metrics


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
    actor_params, statistics = params
    mean, _ = apply_fn(actor_params, standardise(observation, statistics))
    return mean


def explore(apply_fn, params, observation, key):
    """An action drawn from pi, clipped to [-1, 1], by which the online phase acts."""
    actor_params, statistics = params
    mean, log_std = apply_fn(actor_params, standardise(observation, statistics))
    noise = jax.random.normal(key, mean.shape)
    return (mean + jnp.exp(log_std) * noise).clip(-1.0, 1.0)


def policy_params(state):
    return state.actor.params, state.statistics


def policy_fn(state, cfg):
    """`policy` with the networks filled in: (params, observation, key) -> action."""
    return partial(policy, state.actor.apply_fn)


# --- Training -----------------------------------------------------------------------------------
def online_rows(rows, statistics, cfg):
    """Rows of the env as those of the data set are: the same rewards and observations."""
    mean, std = statistics
    return rows._replace(
        reward=rows.reward + cfg.reward_shift,
        observation=(rows.observation - mean) / std,
        next_observation=(rows.next_observation - mean) / std,
    )


def train(cfg, options):
    """Train every seed of `cfg` and return its final normalised scores, [S]."""
    experiment.check(cfg, options)
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps)
    reward = dataset.transitions.reward + cfg.reward_shift
    data, statistics = normalise(dataset.transitions._replace(reward=reward))
    data = experiment.place(data, options)
    example = jax.tree.map(lambda x: x[:1], data)  # one row, for its shapes
    init_keys, train_keys, policy_keys, explore_keys = experiment.streams(cfg.seeds, 4)  # [S] each
    create = partial(create_state, batch=example, cfg=cfg, statistics=statistics)
    # Not jitted: XLA can hang on the QR decompositions of two orthogonal initialisers.
    state = jax.vmap(create)(init_keys)
    # Compiled once for all seeds. `update` shows which rows a step reads, for --data host.
    train_seeds = experiment.over_seeds(partial(train_chunk, cfg=cfg), update=update)
    act = policy_fn(state, cfg)
    explore_by = partial(explore, state.actor.apply_fn)
    rows_as_data = partial(online_rows, statistics=statistics, cfg=cfg)

    with (
        experiment.Run(cfg, options, dataset) as run,
        evaluation.Rollouts(dataset, act, policy_keys, cfg) as rollouts,
        interaction.Interaction(
            run, data, explore_by, explore_keys, policy_params, train_chunk, rows_as_data
        ) as online,
    ):
        state, metrics, start = run.restore(state)
        for step in run.boundaries(start):  # start, start + log_every, ..., last_update
            run.save(step, state, metrics)
            scores = None
            if run.evaluates(step):
                scores = rollouts.start(policy_params(state), step)
            last_metrics = metrics  # of the chunk that ended at this step
            if step < cfg.num_updates:  # an accelerator trains while the CPU evaluates
                state, metrics = train_seeds(state, train_keys, step, data)
            elif step < run.last_update:  # env steps and updates in turns
                state, metrics = online.chunk(state, train_keys, step)
            run.log(step, last_metrics, scores)
    return run.scores


if __name__ == "__main__":
    train(*experiment.parse(Config))

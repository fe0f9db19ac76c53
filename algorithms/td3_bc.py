# SPDX-License-Identifier: Apache-2.0
"""TD3+BC (Fujimoto & Gu, 2021): TD3 whose actor also clones the data.

Paper       https://arxiv.org/abs/2106.06860
Reference   https://github.com/sfujim/TD3_BC
Run         python algorithms/td3_bc.py --config configs/td3_bc/mujoco.yaml
Parent      none
Results     docs/results.md
Deviations  none known from the authors' code, which divides Q by mean |Q| of the policy's actions;
            Eq. 5 has the data's actions. Rows at a truncation are kept if the data record their
            next observation; D4RL's loader drops them. The paper has no online phase: here it
            goes on with the same losses and TD3's exploration noise.

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

from common import datasets, evaluation, experiment, interaction


# --- Config -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    dataset: str = "local/pointmaze/umaze-v0"  # data set id or path, see docs/data.md
    seeds: tuple[int, ...] = (0,)  # trained in parallel
    num_updates: int = 1_000_000  # critic gradient steps
    log_every: int = 1_000  # updates per compiled chunk, the unit of logging and saving
    eval_every: int = 20_000  # updates between evaluations
    eval_episodes: int = 10  # episodes per seed and evaluation
    batch_size: int = 256  # transitions per update
    actor_learning_rate: float = 3e-4  # Adam
    critic_learning_rate: float = 3e-4  # Adam
    discount: float = 0.99  # gamma, per environment step
    target_rate: float = 0.005  # tau, Polyak step of the target networks
    policy_delay: int = 2  # critic updates per actor and target update
    target_noise: float = 0.2  # std of the target policy smoothing noise, in action units
    target_noise_clip: float = 0.5  # bound on that noise, in action units
    hidden: tuple[int, ...] = (256, 256)  # widths of actor and critics
    num_critics: int = 2  # K, the target is their minimum
    reward_shift: float = 0.0  # added to all rewards (AntMaze: -1)
    # TD3+BC
    alpha: float = 2.5  # weight of Q / mean |Q| beside the mean of (pi(s) - a)^2, Eqs. 3, 5
    # Online phase
    online_updates: int = 0  # gradient steps of online training, after the offline ones
    updates_per_step: int = 1  # updates per env step
    steps_per_refresh: int = 2  # env steps between updates of the acting policy
    exploration_noise: float = 0.1  # std of the noise on actions in the env, as in TD3


# --- Networks -----------------------------------------------------------------------------------
def fan_in_uniform():
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # U(±1 / sqrt(fan in))


def uniform(bound):
    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def linear(fan_in, width):  # PyTorch's default initialisation
    return nn.Dense(width, kernel_init=fan_in_uniform(), bias_init=uniform(fan_in**-0.5))


class TanhActor(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, observation):  # [..., O] -> [..., A]
        x = observation
        for width in self.hidden:
            x = nn.relu(linear(x.shape[-1], width)(x))
        head = linear(x.shape[-1], self.action_dim)
        return jnp.tanh(head(x))


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
    actor: TrainState
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
    actor = TanhActor(cfg.hidden, action_dim=batch.action.shape[-1])
    critic = Critic(cfg.hidden)
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
        actor=TrainState.create(actor.apply, actor_params, actor_adam),
        critic=TrainState.create(apply_critics, critic_params, critic_adam),
        statistics=(
            jnp.broadcast_to(mean, observation_shape),
            jnp.broadcast_to(std, observation_shape),
        ),
    )


# --- Losses -------------------------------------------------------------------------------------
def critic_loss(params, state, batch, key, cfg):
    """Squared TD error to the clipped double-Q target, mean over B, summed over K."""
    noise = cfg.target_noise * jax.random.normal(key, batch.action.shape)
    noise = noise.clip(-cfg.target_noise_clip, cfg.target_noise_clip)
    next_action = state.actor.apply_fn(state.actor.target_params, batch.next_observation)
    next_action = (next_action + noise).clip(-1.0, 1.0)  # [B, A]

    next_q = state.critic.apply_fn(state.critic.target_params, batch.next_observation, next_action)
    next_q = next_q.min(axis=0)  # [K, B] -> [B]
    reward = batch.reward + cfg.reward_shift
    # Bootstrap through truncations, never through terminations.
    target = reward + cfg.discount * (1.0 - batch.termination) * next_q  # [B]

    q = state.critic.apply_fn(params, batch.observation, batch.action)  # [K, B]
    chex.assert_equal_shape([*q, target])
    loss = jnp.square(q - target[None]).mean(axis=1).sum()
    return loss, {"critic_loss": loss, "q": q.mean()}


def actor_loss(params, state, batch, cfg):
    """(pi(s) - a)^2, mean over A, - alpha Q_1(s, pi(s)) / mean |Q_1|, mean over B. Eqs. 3, 5."""
    action = state.actor.apply_fn(params, batch.observation)  # [B, A]
    behaviour_mse = jnp.square(action - batch.action).mean(axis=-1)  # [B]
    q = state.critic.apply_fn(state.critic.params, batch.observation, action)
    q = q[0]  # [K, B] -> [B], the first critic
    q_scale = jax.lax.stop_gradient(jnp.abs(q).mean())
    chex.assert_equal_shape([q, behaviour_mse, batch.reward])
    q_loss = -cfg.alpha * q / q_scale
    loss = (behaviour_mse + q_loss).mean()
    return loss, {"actor_loss": loss, "behaviour_mse": behaviour_mse.mean()}


# --- Update -------------------------------------------------------------------------------------
def update(state, step, key, data, cfg):
    """`policy_delay` critic updates, then one of the actor and of all targets. One seed.

    Randomness is a function of (key, step) alone, so neither the length of a chunk nor a resumed
    run changes the result. The key of a step is fold_in(key, step).
    """
    critic_metrics = []
    for i in range(cfg.policy_delay):
        key_batch, key_noise = jax.random.split(jax.random.fold_in(key, step + i))
        batch = sample_batch(data, key_batch, cfg)
        grads, metrics = jax.grad(critic_loss, has_aux=True)(
            state.critic.params, state, batch, key_noise, cfg
        )
        state = state._replace(critic=state.critic.apply_gradients(grads=grads))
        critic_metrics.append(metrics)
    # The actor learns from the last of these batches.
    grads, actor_metrics = jax.grad(actor_loss, has_aux=True)(state.actor.params, state, batch, cfg)
    state = state._replace(actor=state.actor.apply_gradients(grads=grads))
    state = state._replace(
        actor=update_target(state.actor, cfg), critic=update_target(state.critic, cfg)
    )
    return state, mean_metrics(critic_metrics) | actor_metrics


def sample_batch(data, key, cfg):
    """`batch_size` rows of the data, drawn with replacement."""
    index = jax.random.randint(key, (cfg.batch_size,), 0, len(data.reward))
    return jax.tree.map(lambda column: column[index], data)


def update_target(net, cfg):
    target_params = optax.incremental_update(net.params, net.target_params, cfg.target_rate)
    return net.replace(target_params=target_params)


def mean_metrics(metrics):
    """Mean of a list of dicts with the same names."""
    names = metrics[0]
    return {name: sum(row[name] for row in metrics) / len(metrics) for name in names}


def train_chunk(state, key, start, data, cfg):
    """`log_every` updates of one seed, compiled as one program. Metrics are chunk means."""
    steps = start + jnp.arange(0, cfg.log_every, cfg.policy_delay)  # one per call of `update`
    state, metrics = jax.lax.scan(partial(update, key=key, data=data, cfg=cfg), state, steps)
    return state, jax.tree.map(jnp.mean, metrics)


# --- Policy -------------------------------------------------------------------------------------
def policy(apply_fn, params, observation, key):
    """Deterministic action in [-1, 1], [..., O] -> [..., A]. `key` is not used."""
    actor_params, statistics = params
    return apply_fn(actor_params, standardise(observation, statistics))


def explore(apply_fn, params, observation, key, cfg):
    """`policy` with normal noise, clipped to [-1, 1], by which the online phase acts."""
    action = policy(apply_fn, params, observation, key)
    noise = cfg.exploration_noise * jax.random.normal(key, action.shape)
    return (action + noise).clip(-1.0, 1.0)


def policy_params(state):
    return state.actor.params, state.statistics


def policy_fn(state, cfg):
    """`policy` with the networks filled in: (params, observation, key) -> action."""
    return partial(policy, state.actor.apply_fn)


# --- Training -----------------------------------------------------------------------------------
def online_rows(rows, statistics):
    """Rows of the env as those of the data set are: observations of about mean 0, std 1."""
    mean, std = statistics
    return rows._replace(
        observation=(rows.observation - mean) / std,
        next_observation=(rows.next_observation - mean) / std,
    )


def train(cfg, options):
    """Train every seed of `cfg` and return its final normalised scores, [S]."""
    experiment.check(cfg, options)
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps)
    data, statistics = normalise(dataset.transitions)
    data = experiment.place(data, options)
    example = jax.tree.map(lambda x: x[:1], data)  # one row, for its shapes
    init_keys, train_keys, policy_keys, explore_keys = experiment.streams(cfg.seeds, 4)  # [S] each
    create = partial(create_state, batch=example, cfg=cfg, statistics=statistics)
    state = jax.vmap(create)(init_keys)
    # Compiled once for all seeds. `update` shows which rows a step reads, for --data host.
    train_seeds = experiment.over_seeds(partial(train_chunk, cfg=cfg), update=update)
    act = policy_fn(state, cfg)
    explore_by = partial(explore, state.actor.apply_fn, cfg=cfg)
    rows_as_data = partial(online_rows, statistics=statistics)

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

# SPDX-License-Identifier: Apache-2.0
"""ReBRAC (Tarasov et al., 2023): TD3+BC with separate behaviour penalties for actor and critic.

Paper       https://arxiv.org/abs/2305.09836
Reference   https://github.com/tinkoff-ai/ReBRAC
Run         python algorithms/rebrac.py --config configs/rebrac/antmaze.yaml
Parent      td3_bc.py (198 lines)
Results     docs/results.md
Deviations  none known in the method. Rows at a truncation are kept if the data record their next
            observation (0.1 % of the rows of 1000-step episodes). Their next action is unknown, so
            their own action takes its place. The reference drops these rows. The online phase
            is that of CORL's finetune/rebrac.py, but a new row's next action is the one that was
            taken (there: the policy's). It counts only with an online_critic_penalty. n_step is not
            in the reference: a sum that an episode's end cuts bootstraps there.

Shapes: S seeds, K critics, B batch, E episodes, O observation, A action. Arrays are float32.
"""

from dataclasses import dataclass, replace
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
    batch_size: int = 1024  # transitions per update
    actor_learning_rate: float = 1e-3  # Adam
    critic_learning_rate: float = 1e-3  # Adam
    discount: float = 0.99  # gamma, per environment step
    target_rate: float = 0.005  # tau, Polyak step of the target networks
    policy_delay: int = 2  # critic updates per actor and target update
    target_noise: float = 0.2  # std of the target policy smoothing noise, in action units
    target_noise_clip: float = 0.5  # bound on that noise, in action units
    hidden: tuple[int, ...] = (256, 256, 256)  # widths of actor and critics
    num_critics: int = 2  # K, the target is their minimum
    reward_scale: float = 1.0  # multiplies all rewards (AntMaze: 100)
    # ReBRAC
    actor_penalty: float = 1.0  # beta_1, weight of (pi(s) - a)^2 in the actor loss, Eq. 7
    critic_penalty: float = 1.0  # beta_2, weight of (pi(s') - a')^2 in the TD target, Eq. 6
    n_step: int = 1  # rows whose rewards a TD target sums before it bootstraps
    # Online phase
    online_updates: int = 0  # gradient steps of online training, after the offline ones
    updates_per_step: int = 1  # updates per env step
    steps_per_refresh: int = 2  # env steps between updates of the acting policy
    exploration_noise: float = 0.0  # std of the noise on actions in the env, in action units
    online_critic_penalty: float = 0.0  # beta_2 in this phase
    penalty_floor: float = 0.5  # beta_1 decays linearly to this share of itself
    penalty_decay_updates: int = 1_000_000  # the decay would reach 0 after so many online updates
    mixing_ratio: float = 0.5  # share of the batch that comes from the env


# --- Networks -----------------------------------------------------------------------------------
def fan_in_uniform():
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # U(±1 / sqrt(fan in))


def uniform(bound):
    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def hidden_layer(width):
    return nn.Dense(width, kernel_init=fan_in_uniform(), bias_init=nn.initializers.constant(0.1))


class Actor(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, observation):  # [..., O] -> [..., A]
        x = observation
        for width in self.hidden:
            x = nn.relu(hidden_layer(width)(x))
        head = nn.Dense(self.action_dim, kernel_init=uniform(1e-3), bias_init=uniform(1e-3))
        return jnp.tanh(head(x))


class LayerNormCritic(nn.Module):
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, observation, action):  # [..., O], [..., A] -> [...]
        x = jnp.concatenate([observation, action], axis=-1)
        for width in self.hidden:
            x = nn.relu(hidden_layer(width)(x))
            x = nn.LayerNorm()(x)
        return nn.Dense(1, kernel_init=uniform(3e-3), bias_init=uniform(3e-3))(x).squeeze(-1)


# --- State --------------------------------------------------------------------------------------
class NStep(NamedTuple):
    """Rows with returns of up to n steps. Everything "next" is after the last of them."""

    observation: Any  # [B, O]
    action: Any  # [B, A]
    reward: Any  # [B], the sum of gamma^k r_k over m <= n rows
    next_observation: Any  # [B, O]
    next_action: Any  # [B, A]
    termination: Any  # [B], 1 where the last of the m rows is a true end
    discount: Any  # [B], gamma^m


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


def create_state(key, batch, cfg):
    """State of one seed before the first update. `batch` supplies shapes only."""
    key_actor, key_critic = jax.random.split(key)
    actor = Actor(cfg.hidden, action_dim=batch.action.shape[-1])
    critic = LayerNormCritic(cfg.hidden)
    init_critics = jax.vmap(critic.init, (0, None, None))
    apply_critics = jax.vmap(critic.apply, (0, None, None))  # -> [K, B]

    actor_params = actor.init(key_actor, batch.observation)
    critic_keys = jax.random.split(key_critic, cfg.num_critics)
    critic_params = init_critics(critic_keys, batch.observation, batch.action)
    actor_adam = optax.adam(cfg.actor_learning_rate)
    critic_adam = optax.adam(cfg.critic_learning_rate)
    return State(
        actor=TrainState.create(actor.apply, actor_params, actor_adam),
        critic=TrainState.create(apply_critics, critic_params, critic_adam),
    )


# --- Losses -------------------------------------------------------------------------------------
def critic_loss(params, state, batch, key, cfg):
    """Squared TD error to the penalised double-Q target, mean over B, summed over K. Eq. 6."""
    noise = cfg.target_noise * jax.random.normal(key, batch.action.shape)
    noise = noise.clip(-cfg.target_noise_clip, cfg.target_noise_clip)
    next_action = state.actor.apply_fn(state.actor.target_params, batch.next_observation)
    next_action = (next_action + noise).clip(-1.0, 1.0)  # [B, A]
    next_penalty = jnp.square(next_action - batch.next_action).sum(axis=-1)  # [B]

    next_q = state.critic.apply_fn(state.critic.target_params, batch.next_observation, next_action)
    next_q = next_q.min(axis=0) - cfg.critic_penalty * next_penalty  # [K, B] -> [B]
    reward = cfg.reward_scale * batch.reward
    discount = cfg.discount
    if cfg.n_step > 1:
        discount = batch.discount  # gamma^m, [B]
    # Bootstrap through truncations, never through terminations.
    target = reward + discount * (1.0 - batch.termination) * next_q  # [B]

    q = state.critic.apply_fn(params, batch.observation, batch.action)  # [K, B]
    chex.assert_equal_shape([*q, target])
    loss = jnp.square(q - target[None]).mean(axis=1).sum()
    return loss, {"critic_loss": loss, "q": q.mean()}


def actor_loss(params, state, batch, cfg):
    """beta_1 (pi(s) - a)^2, sum over A, - min_k Q_k(s, pi(s)) / mean |min_k Q_k|. Eq. 7."""
    action = state.actor.apply_fn(params, batch.observation)  # [B, A]
    squared_error = jnp.square(action - batch.action).sum(axis=-1)  # [B]
    q = state.critic.apply_fn(state.critic.params, batch.observation, action)
    q = q.min(axis=0)  # [K, B] -> [B]
    q_scale = jax.lax.stop_gradient(jnp.abs(q).mean())
    chex.assert_equal_shape([q, squared_error, batch.reward])
    q_loss = -q / q_scale
    loss = (cfg.actor_penalty * squared_error + q_loss).mean()
    return loss, {"actor_loss": loss, "behaviour_penalty": squared_error.mean()}


# --- Update -------------------------------------------------------------------------------------
def update(state, step, key, data, cfg, mixed=False):
    """`policy_delay` critic updates; after the first, one of actor and targets. One seed.

    Randomness is a function of (key, step) alone, so neither the length of a chunk nor a resumed
    run changes the result. The key of a step is fold_in(key, step).
    """
    critic_metrics = []
    for i in range(cfg.policy_delay):  # a Python loop: only the first round updates the actor
        key_batch, key_noise = jax.random.split(jax.random.fold_in(key, step + i))
        batch = sample_mixed(data, key_batch, cfg) if mixed else sample_batch(data, key_batch, cfg)
        grads, metrics = jax.grad(critic_loss, has_aux=True)(
            state.critic.params, state, batch, key_noise, cfg
        )
        state = state._replace(critic=state.critic.apply_gradients(grads=grads))
        critic_metrics.append(metrics)
        if i == 0:
            # As in the authors' code, the targets move before the actor's step.
            state = state._replace(
                actor=update_target(state.actor, cfg), critic=update_target(state.critic, cfg)
            )
            grads, actor_metrics = jax.grad(actor_loss, has_aux=True)(
                state.actor.params, state, batch, cfg
            )
            state = state._replace(actor=state.actor.apply_gradients(grads=grads))
    return state, mean_metrics(critic_metrics) | actor_metrics


def online_update(state, step, key, data, cfg):
    """`update` on mixed batches, with another beta_2, and beta_1 as far as it has decayed."""
    decay = 1.0 - (step - cfg.num_updates) / cfg.penalty_decay_updates
    actor_penalty = cfg.actor_penalty * jnp.maximum(decay, cfg.penalty_floor)
    critic_penalty = cfg.online_critic_penalty
    # Traced numbers: the losses can multiply by them, but a Python `if` on them fails.
    cfg = replace(cfg, actor_penalty=actor_penalty, critic_penalty=critic_penalty)
    return update(state, step, key, data, cfg, mixed=True)


def sample_batch(data, key, cfg):
    """`batch_size` rows of the data, drawn with replacement."""
    index = jax.random.randint(key, (cfg.batch_size,), 0, len(data.reward))
    return jax.tree.map(lambda column: column[index], data)


def sample_mixed(data, key, cfg):
    """A batch of which `mixing_ratio` are rows of the env, behind those of the data set."""
    key_recorded, key_own = jax.random.split(key)
    own_size = int(cfg.mixing_ratio * cfg.batch_size)
    recorded_cfg = replace(cfg, batch_size=cfg.batch_size - own_size)
    recorded = sample_batch(data.recorded, key_recorded, recorded_cfg)
    own = sample_batch(data.own, key_own, replace(cfg, batch_size=own_size))
    return jax.tree.map(lambda *columns: jnp.concatenate(columns), recorded, own)


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


def online_chunk(state, key, start, data, cfg):
    """`train_chunk` of the online phase."""
    steps = start + jnp.arange(0, cfg.log_every, cfg.policy_delay)
    one_update = partial(online_update, key=key, data=data, cfg=cfg)
    state, metrics = jax.lax.scan(one_update, state, steps)
    return state, jax.tree.map(jnp.mean, metrics)


# --- Policy -------------------------------------------------------------------------------------
def policy(apply_fn, params, observation, key):
    """Deterministic action in [-1, 1], [..., O] -> [..., A]. `key` is not used."""
    return apply_fn(params, observation)


def explore(apply_fn, params, observation, key, cfg):
    """`policy` with normal noise, clipped to [-1, 1], by which the online phase acts."""
    action = policy(apply_fn, params, observation, key)
    noise = cfg.exploration_noise * jax.random.normal(key, action.shape)
    return (action + noise).clip(-1.0, 1.0)


def policy_params(state):
    return state.actor.params


def policy_fn(state, cfg):
    """`policy` with the networks filled in: (params, observation, key) -> action."""
    return partial(policy, state.actor.apply_fn)


# --- Training -----------------------------------------------------------------------------------
def n_step_rows(dataset, cfg):
    """`NStep` of a data set, one from each of its N rows on.

    A return ends with its episode or recording, and before that with a termination. It has m < n
    rows then. Where that end is no termination, the target bootstraps from there, with gamma^m.
    """
    rows = dataset.transitions
    index, valid = datasets.chunks(dataset, cfg.n_step)  # [N, n] each
    last = index[:, -1]  # [N], the last row of each return
    reward = 0.0
    for k in range(cfg.n_step):
        reward = reward + cfg.discount**k * valid[:, k] * rows.reward[index[:, k]]
    count = valid.sum(axis=1)  # [N], m
    return NStep(
        observation=rows.observation,
        action=rows.action,
        reward=reward,
        next_observation=rows.next_observation[last],
        next_action=rows.next_action[last],
        termination=rows.termination[last],
        discount=cfg.discount**count,
    )


def online_rows(rows, dataset, cfg):
    """Rows of the env as those of the data set are: with returns of as many steps."""
    if cfg.n_step > 1:
        return datasets.by_seed(partial(n_step_rows, cfg=cfg), rows, dataset)
    return rows


def train(cfg, options):
    """Train every seed of `cfg` and return its final normalised scores, [S]."""
    experiment.check(cfg, options)
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps)
    data = dataset.transitions
    if cfg.n_step > 1:
        data = n_step_rows(dataset, cfg)
    data = experiment.place(data, options)
    example = jax.tree.map(lambda x: x[:1], data)  # one row, for its shapes
    init_keys, train_keys, policy_keys, explore_keys = experiment.streams(cfg.seeds, 4)  # [S] each
    create = partial(create_state, batch=example, cfg=cfg)
    state = jax.vmap(create)(init_keys)
    # Compiled once for all seeds. `update` shows which rows a step reads, for --data host.
    train_seeds = experiment.over_seeds(partial(train_chunk, cfg=cfg), update=update)
    act = policy_fn(state, cfg)
    explore_by = partial(explore, state.actor.apply_fn, cfg=cfg)
    rows_as_data = partial(online_rows, dataset=dataset, cfg=cfg)

    with (
        experiment.Run(cfg, options, dataset) as run,
        evaluation.Rollouts(dataset, act, policy_keys, cfg) as rollouts,
        interaction.Interaction(
            run,
            data,
            explore_by,
            explore_keys,
            policy_params,
            online_chunk,
            rows_as_data,
            apart=True,
            look_ahead=cfg.n_step,
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

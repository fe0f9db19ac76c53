# SPDX-License-Identifier: Apache-2.0
"""IQL (Kostrikov et al., 2021): expectile regression in place of a maximum over actions.

Paper       https://arxiv.org/abs/2110.06169
Reference   https://github.com/ikostrikov/implicit_q_learning
Run         python algorithms/iql.py --config configs/iql/antmaze.yaml
Parent      none
Results     docs/results.md
Deviations  Rows at a truncation are kept where their next observation is known, and they count in
            return_scale. extraction=ddpg_bc and layer_norm follow seohongpark/fql, which also has
            GELU, Glorot initialisation (the actor's last layer 10 times smaller), no tanh on the
            mean, losses and targets that read the networks from before the update, awr weights from
            the online critics, and sampled actions where the std is learned. deterministic and
            normalise_observations follow CORL. Online the actor's learning rate is constant, after
            the cosine of the offline phase; the authors fine-tune without cosine. n_step is not in
            the reference: a sum that an episode's end cuts bootstraps there.

Shapes: S seeds, K critics, B batch, E episodes, O observation, A action. Arrays are float32.
"""

from dataclasses import dataclass, replace
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
    actor_learning_rate: float = 3e-4  # Adam, see cosine
    critic_learning_rate: float = 3e-4  # Adam, for Q and V
    discount: float = 0.99  # gamma, per environment step
    target_rate: float = 0.005  # Polyak rate of the target critics
    hidden: tuple[int, ...] = (256, 256)  # widths of all networks
    num_critics: int = 2  # K, V and the actor learn from their minimum
    layer_norm: bool = False  # LayerNorm after every hidden layer of Q and V
    reward_shift: float = 0.0  # added to all rewards (AntMaze: -1)
    return_scale: float | None = None  # rescales rewards to this range of returns (MuJoCo: 1000)
    # IQL
    expectile: float = 0.7  # tau, weight of (Q - V)^2 where Q > V, Eq. 5
    extraction: Literal["awr", "ddpg_bc"] = "awr"  # how the actor learns from Q and V
    inverse_temperature: float = 3.0  # beta of awr, Eq. 7
    alpha: float = 1.0  # weight of log pi(a|s) in ddpg_bc
    deterministic: bool = False  # |a - mu(s)|^2 in place of -log pi(a|s)
    fixed_std: float | None = None  # std of the policy; None: one learned per action dimension
    cosine: bool = True  # cosine decay of the actor's learning rate to 0; constant again online
    dropout: float | None = None  # dropout rate of the actor's hidden layers in training
    normalise_observations: bool = False  # to mean 0 and std 1, as CORL does
    n_step: int = 1  # rows whose rewards a TD target sums before it bootstraps
    # Online phase
    online_updates: int = 0  # gradient steps of online training, after the offline ones
    updates_per_step: int = 1  # updates per env step
    steps_per_refresh: int = 1  # env steps between updates of the acting policy


# --- Networks -----------------------------------------------------------------------------------
def orthogonal_dense(width):
    return nn.Dense(width, kernel_init=nn.initializers.orthogonal(2**0.5))


class DropoutGaussianActor(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, observation, key=None, dropout=None):  # [..., O] -> mean, log std [..., A]
        x = observation
        for i, width in enumerate(self.hidden):
            x = nn.relu(orthogonal_dense(width)(x))
            if dropout is not None:
                key_layer = jax.random.fold_in(key, i)
                keep = jax.random.bernoulli(key_layer, 1.0 - dropout, x.shape)
                x = jnp.where(keep, x / (1.0 - dropout), 0.0)
        log_std = self.param("log_std", nn.initializers.zeros, (self.action_dim,))
        mean = jnp.tanh(orthogonal_dense(self.action_dim)(x))
        return mean, jnp.broadcast_to(log_std.clip(-5.0, 2.0), mean.shape)


class OrthogonalCritic(nn.Module):
    hidden: tuple[int, ...]
    layer_norm: bool

    @nn.compact
    def __call__(self, *inputs):  # Q: [..., O], [..., A] -> [...]; V: [..., O] -> [...]
        x = jnp.concatenate(inputs, axis=-1)
        for width in self.hidden:
            x = nn.relu(orthogonal_dense(width)(x))
            if self.layer_norm:
                x = nn.LayerNorm()(x)
        return orthogonal_dense(1)(x).squeeze(-1)


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
    actor: train_state.TrainState  # Flax's own class: no target_params
    critic: TrainState  # every array has a leading [K] axis
    value_net: train_state.TrainState  # one network, without target_params
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
    key_actor, key_critic, key_value = jax.random.split(key, 3)
    actor = DropoutGaussianActor(cfg.hidden, action_dim=batch.action.shape[-1])
    critic = OrthogonalCritic(cfg.hidden, cfg.layer_norm)
    value_net = OrthogonalCritic(cfg.hidden, cfg.layer_norm)
    init_critics = jax.vmap(critic.init, (0, None, None))
    apply_critics = jax.vmap(critic.apply, (0, None, None))  # -> [K, B]

    actor_params = actor.init(key_actor, batch.observation)
    critic_keys = jax.random.split(key_critic, cfg.num_critics)
    critic_params = init_critics(critic_keys, batch.observation, batch.action)
    value_params = value_net.init(key_value, batch.observation)

    actor_learning_rate = cfg.actor_learning_rate
    if cfg.cosine:
        decay = optax.cosine_decay_schedule(actor_learning_rate, max(1, cfg.num_updates))
        constant = optax.constant_schedule(actor_learning_rate)  # in the online phase
        actor_learning_rate = optax.join_schedules([decay, constant], [cfg.num_updates])
    actor_adam = optax.adam(actor_learning_rate)
    critic_adam = optax.adam(cfg.critic_learning_rate)
    value_adam = optax.adam(cfg.critic_learning_rate)
    mean, std = statistics
    observation_shape = batch.observation.shape[-1:]
    return State(
        actor=train_state.TrainState.create(
            apply_fn=actor.apply, params=actor_params, tx=actor_adam
        ),
        critic=TrainState.create(apply_critics, critic_params, critic_adam),
        value_net=train_state.TrainState.create(
            apply_fn=value_net.apply, params=value_params, tx=value_adam
        ),
        statistics=(
            jnp.broadcast_to(mean, observation_shape),
            jnp.broadcast_to(std, observation_shape),
        ),
    )


# --- Losses -------------------------------------------------------------------------------------
def critic_loss(params, state, batch, cfg):
    """Squared TD error to r + gamma V(s'), mean over B, summed over K. Eq. 6."""
    next_value = state.value_net.apply_fn(state.value_net.params, batch.next_observation)  # [B]
    discount = cfg.discount
    if cfg.n_step > 1:
        discount = batch.discount  # gamma^m, [B]
    # Bootstrap through truncations, never through terminations.
    target = batch.reward + discount * (1.0 - batch.termination) * next_value  # [B]

    q = state.critic.apply_fn(params, batch.observation, batch.action)  # [K, B]
    chex.assert_equal_shape([*q, target])
    loss = jnp.square(q - target[None]).mean(axis=1).sum()
    return loss, {"critic_loss": loss, "q": q.mean()}


def value_loss(params, state, batch, cfg):
    """|tau - 1(A < 0)| A^2, mean over B, with A = min_k Q_k(s, a) - V(s), target critics. Eq. 5."""
    q = state.critic.apply_fn(state.critic.target_params, batch.observation, batch.action)
    q = q.min(axis=0)  # [K, B] -> [B]
    value = state.value_net.apply_fn(params, batch.observation)  # [B]
    advantage = q - value
    chex.assert_equal_shape([advantage, value, batch.reward])
    weight = jnp.where(advantage > 0, cfg.expectile, 1.0 - cfg.expectile)
    loss = (weight * jnp.square(advantage)).mean()
    return loss, {"value_loss": loss, "value": value.mean()}


def actor_loss(params, state, batch, key, cfg):
    """The loss of the chosen policy extraction, awr or ddpg_bc."""
    if cfg.extraction == "ddpg_bc":
        return ddpg_bc_loss(params, state, batch, key, cfg)
    return awr_loss(params, state, batch, key, cfg)


def awr_loss(params, state, batch, key, cfg):
    """-exp(beta A) log pi(a|s), mean over B, the weight at most 100. A as in value_loss. Eq. 7."""
    _, log_prob = mean_and_log_prob(params, state, batch, key, cfg)  # [B]
    q = state.critic.apply_fn(state.critic.target_params, batch.observation, batch.action)
    q = q.min(axis=0)  # [K, B] -> [B]
    value = state.value_net.apply_fn(state.value_net.params, batch.observation)  # [B]
    advantage = q - value
    weight = jnp.minimum(jnp.exp(cfg.inverse_temperature * advantage), 100.0)
    chex.assert_equal_shape([log_prob, weight, batch.reward])
    loss = -(weight * log_prob).mean()
    return loss, {"actor_loss": loss, "log_prob": log_prob.mean(), "weight": weight.mean()}


def ddpg_bc_loss(params, state, batch, key, cfg):
    """-Q / mean |Q| - alpha log pi(a|s), mean over B, Q = min_k Q_k(s, mu(s)), online critics."""
    mean, log_prob = mean_and_log_prob(params, state, batch, key, cfg)  # [B, A], [B]
    q = state.critic.apply_fn(state.critic.params, batch.observation, mean)
    q = q.min(axis=0)  # [K, B] -> [B]
    q_scale = jax.lax.stop_gradient(jnp.abs(q).mean())
    chex.assert_equal_shape([q, log_prob, batch.reward])
    q_loss = -q / q_scale
    bc_loss = -cfg.alpha * log_prob
    loss = (q_loss + bc_loss).mean()
    weight = jnp.asarray(cfg.alpha)  # of log pi(a|s), the same for every row
    return loss, {"actor_loss": loss, "log_prob": log_prob.mean(), "weight": weight}


def mean_and_log_prob(params, state, batch, key, cfg):
    """The policy's mean mu(s), [B, A], and log pi(a|s) of the data's actions, [B].

    If deterministic, -|a - mu(s)|^2 takes the place of log pi(a|s). `key` is for dropout.
    """
    mean, log_std = state.actor.apply_fn(params, batch.observation, key, cfg.dropout)
    if cfg.deterministic:
        return mean, -jnp.square(batch.action - mean).sum(axis=-1)
    if cfg.fixed_std is not None:
        log_std = jnp.full_like(log_std, jnp.log(cfg.fixed_std))
    return mean, gaussian_log_prob(batch.action, mean, log_std)


def gaussian_log_prob(x, mean, log_std):
    """log N(x; mean, std), summed over the last axis."""
    error = (x - mean) * jnp.exp(-log_std)
    return -(0.5 * jnp.square(error) + log_std + 0.5 * jnp.log(2 * jnp.pi)).sum(axis=-1)


# --- Update -------------------------------------------------------------------------------------
def update(state, step, key, data, cfg):
    """One gradient step of V, the actor and Q in turn, then one step of the targets. One seed.

    All of them use the same batch. Randomness is a function of (key, step) alone, so neither the
    length of a chunk nor a resumed run changes the result. The key of a step is
    fold_in(key, step).
    """
    key_batch, key_actor = jax.random.split(jax.random.fold_in(key, step))
    batch = sample_batch(data, key_batch, cfg)

    value_grads, value_metrics = jax.grad(value_loss, has_aux=True)(
        state.value_net.params, state, batch, cfg
    )
    state = state._replace(value_net=state.value_net.apply_gradients(grads=value_grads))

    actor_grads, actor_metrics = jax.grad(actor_loss, has_aux=True)(
        state.actor.params, state, batch, key_actor, cfg
    )
    state = state._replace(actor=state.actor.apply_gradients(grads=actor_grads))

    critic_grads, critic_metrics = jax.grad(critic_loss, has_aux=True)(
        state.critic.params, state, batch, cfg
    )
    state = state._replace(critic=state.critic.apply_gradients(grads=critic_grads))
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
    actor_params, statistics = params
    mean, _ = apply_fn(actor_params, standardise(observation, statistics))
    return mean


def explore(apply_fn, params, observation, key, cfg):
    """An action drawn from pi, clipped to [-1, 1], by which the online phase acts.

    It is the mean if deterministic.
    """
    actor_params, statistics = params
    mean, log_std = apply_fn(actor_params, standardise(observation, statistics))
    if cfg.deterministic:
        return mean
    if cfg.fixed_std is not None:
        log_std = jnp.full_like(log_std, jnp.log(cfg.fixed_std))
    noise = jax.random.normal(key, mean.shape)
    return (mean + jnp.exp(log_std) * noise).clip(-1.0, 1.0)


def policy_params(state):
    return state.actor.params, state.statistics


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


def online_rows(rows, dataset, reward_scale, statistics, cfg):
    """Rows of the env as those of the data set are: the same actions, rewards and observations."""
    mean, std = statistics
    rows = rows._replace(
        action=rows.action.clip(-1 + 1e-5, 1 - 1e-5),
        reward=reward_scale * (rows.reward + cfg.reward_shift),
        observation=(rows.observation - mean) / std,
        next_observation=(rows.next_observation - mean) / std,
    )
    if cfg.n_step > 1:
        return datasets.by_seed(partial(n_step_rows, cfg=cfg), rows, dataset)
    return rows


def train(cfg, options):
    """Train every seed of `cfg` and return its final normalised scores, [S]."""
    experiment.check(cfg, options)
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps)
    action = dataset.transitions.action.clip(-1 + 1e-5, 1 - 1e-5)
    reward = dataset.transitions.reward + cfg.reward_shift
    reward_scale = 1.0
    if cfg.return_scale is not None:
        reward_scale = cfg.return_scale / datasets.return_span(dataset)
    reward = reward * reward_scale
    data = dataset.transitions._replace(action=action, reward=reward)
    statistics = (0.0, 1.0)  # leaves observations as they are
    if cfg.normalise_observations:
        data, statistics = normalise(data)
    if cfg.n_step > 1:
        data = n_step_rows(replace(dataset, transitions=data), cfg)
    data = experiment.place(data, options)
    example = jax.tree.map(lambda x: x[:1], data)  # one row, for its shapes
    init_keys, train_keys, policy_keys, explore_keys = experiment.streams(cfg.seeds, 4)  # [S] each
    create = partial(create_state, batch=example, cfg=cfg, statistics=statistics)
    # Not jitted: XLA can hang on the QR decompositions of two orthogonal initialisers.
    state = jax.vmap(create)(init_keys)
    # Compiled once for all seeds. `update` shows which rows a step reads, for --data host.
    train_seeds = experiment.over_seeds(partial(train_chunk, cfg=cfg), update=update)
    act = policy_fn(state, cfg)
    explore_by = partial(explore, state.actor.apply_fn, cfg=cfg)
    rows_as_data = partial(
        online_rows, dataset=dataset, reward_scale=reward_scale, statistics=statistics, cfg=cfg
    )

    with (
        experiment.Run(cfg, options, dataset) as run,
        evaluation.Rollouts(dataset, act, policy_keys, cfg) as rollouts,
        interaction.Interaction(
            run,
            data,
            explore_by,
            explore_keys,
            policy_params,
            train_chunk,
            rows_as_data,
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

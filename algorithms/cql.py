# SPDX-License-Identifier: Apache-2.0
"""CQL (Kumar et al., 2020): SAC with critics trained to give low values to actions not in the data.

Paper       https://arxiv.org/abs/2006.04779
Reference   https://github.com/young-geng/JaxCQL, with the settings of corl-team/CORL
Run         python algorithms/cql.py --config configs/cql/antmaze.yaml
Parent      none
Results     docs/results.md
Deviations  The actor is initialised orthogonally too (CORL's ignores that setting), and on AntMaze
            both critics have 5 layers (CORL's second one has 3). As in CORL, the TD error has no
            factor 1/2, and training does not begin with behaviour cloning. Rows at a truncation
            are kept.

Shapes: S seeds, K critics, B batch, N num_samples, M actions per row, O observation, A action.
        Arrays are float32.
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
    num_critics: int = 2  # K, target and actor use their minimum
    normalise_observations: bool = True  # to mean 0 and std 1
    reward_scale: float = 1.0  # multiplies all rewards (AntMaze: 10)
    reward_shift: float = 0.0  # added afterwards (AntMaze: -5)
    # CQL
    alpha: float = 10.0  # weight of the conservative gap: log sum exp Q(s, .) - Q(s, a), Eq. 4
    num_samples: int = 10  # N, actions sampled per row from each of uniform, pi(s) and pi(s')
    importance_sampling: bool = True  # divide exp Q by the action's density; False: plain exp Q
    target_action_gap: float | None = None  # the gap that a Lagrange multiplier aims at; None: off
    clip_diff_min: float | None = None  # lower bound on the conservative gap of each row
    max_target_backup: bool = False  # the TD target takes the best of N actions of pi(s'), not one
    # Online phase
    online_updates: int = 0  # gradient steps of online training, after the offline ones
    updates_per_step: int = 1  # updates per env step
    steps_per_refresh: int = 1  # env steps between updates of the acting policy
    online_alpha: float | None = None  # alpha in this phase; None: as before, like CORL


# --- Networks -----------------------------------------------------------------------------------
def orthogonal_dense(width):
    return nn.Dense(width, kernel_init=nn.initializers.orthogonal(2**0.5))


def small_dense(width):
    return nn.Dense(width, kernel_init=nn.initializers.orthogonal(1e-2))


class TanhGaussianActor(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, observation):  # [..., O] -> mean and log std before tanh, [..., A] each
        x = observation
        for width in self.hidden:
            x = nn.relu(orthogonal_dense(width)(x))
        output = small_dense(2 * self.action_dim)(x)
        mean, log_std = jnp.split(output, 2, axis=-1)
        scale = self.param("log_std_scale", nn.initializers.constant(1.0), ())
        shift = self.param("log_std_shift", nn.initializers.constant(-1.0), ())
        log_std = (scale * log_std + shift).clip(-20.0, 2.0)
        return mean, log_std


class SmallHeadCritic(nn.Module):
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, observation, action):  # [B, O], [B, M, A] -> [B, M]
        # Rows and actions share one axis, since gradients are faster than with two.
        actions_per_row = action.shape[1]
        observation = observation.repeat(actions_per_row, axis=0)  # [B*M, O]
        flat_action = action.reshape(len(observation), -1)  # [B M, A]
        x = jnp.concatenate([observation, flat_action], axis=-1)
        for width in self.hidden:
            x = nn.relu(orthogonal_dense(width)(x))
        q = small_dense(1)(x)  # [B M, 1]
        return q.reshape(action.shape[:-1])


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
    log_temperature: train_state.TrainState  # logarithm of SAC's entropy temperature
    log_multiplier: train_state.TrainState  # logarithm of the Lagrange multiplier of the gap
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
    actor = TanhGaussianActor(cfg.hidden, action_dim=batch.action.shape[-1])
    critic = SmallHeadCritic(cfg.critic_hidden)
    init_critics = jax.vmap(critic.init, (0, None, None))
    apply_critics = jax.vmap(critic.apply, (0, None, None))  # -> [K, B, M]

    actor_params = actor.init(key_actor, batch.observation)
    critic_keys = jax.random.split(key_critic, cfg.num_critics)
    critic_params = init_critics(critic_keys, batch.observation, batch.action[:, None])
    actor_adam = optax.adam(cfg.actor_learning_rate)
    critic_adam = optax.adam(cfg.critic_learning_rate)
    temperature_adam = optax.adam(cfg.actor_learning_rate)
    multiplier_adam = optax.adam(cfg.critic_learning_rate)
    mean, std = statistics
    observation_shape = batch.observation.shape[-1:]
    return State(
        actor=train_state.TrainState.create(
            apply_fn=actor.apply, params=actor_params, tx=actor_adam
        ),
        critic=TrainState.create(apply_critics, critic_params, critic_adam),
        log_temperature=train_state.TrainState.create(
            apply_fn=bounded_exp, params={"log": jnp.float32(0.0)}, tx=temperature_adam
        ),
        log_multiplier=train_state.TrainState.create(
            apply_fn=bounded_exp, params={"log": jnp.float32(1.0)}, tx=multiplier_adam
        ),
        statistics=(
            jnp.broadcast_to(mean, observation_shape),
            jnp.broadcast_to(std, observation_shape),
        ),
    )


def bounded_exp(params):
    """Temperature or multiplier from its logarithm, at most 1e6."""
    return jnp.exp(params["log"]).clip(0.0, 1e6)


# --- Losses -------------------------------------------------------------------------------------
def critic_loss(params, state, batch, key, cfg):
    """Squared TD error + alpha (log sum_a~ exp Q(s, a~) - Q(s, a)), a~ the sampled actions. Eq. 4.

    Mean over B, summed over K. All sampled actions are valued at s, those of pi(s') too. With a
    `target_action_gap` the Lagrange multiplier multiplies alpha.
    """
    sampled_action, log_density, target_action = sample_actions(state.actor, batch, key, cfg)

    next_q = state.critic.apply_fn(
        state.critic.target_params, batch.next_observation, target_action
    )
    next_q = next_q.min(axis=0).max(axis=-1)  # [K, B, 1 or N] -> [B]
    # Bootstrap through truncations, never through terminations.
    target = batch.reward + cfg.discount * (1.0 - batch.termination) * next_q  # [B]

    # One call for the action of the data and the sampled ones is faster than two.
    action = jnp.concatenate([batch.action[:, None], sampled_action], axis=1)  # [B, 1 + 3N, A]
    all_q = state.critic.apply_fn(params, batch.observation, action)  # [K, B, 1 + 3N]
    q = all_q[..., 0]  # [K, B]
    sampled_q = all_q[..., 1:]  # [K, B, 3N]
    chex.assert_equal_shape([*q, target])
    td_error = jnp.square(q - target[None]).mean(axis=1).sum()

    if cfg.importance_sampling:
        # A sum over 3N samples, not a mean: gap, threshold and clip include log 3N.
        soft_maximum = jax.nn.logsumexp(sampled_q - log_density[None], axis=-1)  # [K, B]
    else:
        soft_maximum = jax.nn.logsumexp(all_q, axis=-1)  # over the data's action as well
    conservative_gap = soft_maximum - q  # [K, B]
    if cfg.clip_diff_min is not None:
        conservative_gap = jnp.maximum(conservative_gap, cfg.clip_diff_min)

    multiplier = 1.0
    if cfg.target_action_gap is not None:
        multiplier = bounded_exp(state.log_multiplier.params)
    conservative_loss = multiplier * cfg.alpha * conservative_gap.mean(axis=1).sum()
    loss = td_error + conservative_loss
    metrics = {"critic_loss": loss, "td_error": td_error, "q": q.mean()}
    return loss, metrics | {"conservative_gap": conservative_gap.mean()}


def actor_loss(params, state, batch, key, cfg):
    """temperature log pi(a~|s) - min_k Q_k(s, a~) with one a~ ~ pi(s), mean over B."""
    mean, log_std = state.actor.apply_fn(params, batch.observation)
    action, log_prob = sample_tanh(mean, log_std, key, 1)  # [B, 1, A], [B, 1]
    q = state.critic.apply_fn(state.critic.params, batch.observation, action)
    q = q.min(axis=0)  # [K, B, 1] -> [B, 1]
    chex.assert_equal_shape([q, log_prob, batch.reward[:, None]])
    temperature = bounded_exp(state.log_temperature.params)
    entropy_loss = temperature * log_prob
    loss = (entropy_loss - q).mean()
    return loss, {"actor_loss": loss, "entropy": -log_prob.mean()}


def temperature_loss(params, entropy, action_dim):
    """log temperature (entropy - target entropy), with -A as the target."""
    target_entropy = -action_dim
    return params["log"] * (entropy - target_entropy)


def multiplier_loss(params, conservative_gap, cfg):
    """-multiplier alpha (gap - target gap), so the multiplier grows while the gap is too large."""
    return -bounded_exp(params) * cfg.alpha * (conservative_gap - cfg.target_action_gap)


def sample_actions(actor, batch, key, cfg):
    """N uniform actions, N of pi(s) and N of pi(s'), [B, 3N, A], their log densities, [B, 3N], and
    the actions of pi(s') for the TD target, [B, 1 or N, A]."""
    key_uniform, key_policy = jax.random.split(key)
    batch_size, action_dim = batch.action.shape
    count = cfg.num_samples
    target_count = cfg.num_samples if cfg.max_target_backup else 1

    shape = (batch_size, count, action_dim)
    uniform_action = jax.random.uniform(key_uniform, shape, minval=-1.0, maxval=1.0)
    uniform_log_prob = jnp.full((batch_size, count), action_dim * jnp.log(0.5))  # 1/2 per dimension

    # One call of the actor for s and s'. Actions past the first N are for the target, unused at s.
    observation = jnp.concatenate([batch.observation, batch.next_observation])  # [2B, O]
    mean, log_std = actor.apply_fn(actor.params, observation)
    action, log_prob = sample_tanh(mean, log_std, key_policy, count + target_count)
    action_at_s, action_at_next = jnp.split(action, 2)  # [B, N + 1 or 2N, A] each
    log_prob_at_s, log_prob_at_next = jnp.split(log_prob, 2)  # [B, N + 1 or 2N] each
    current_action = action_at_s[:, :count]
    next_action = action_at_next[:, :count]
    target_action = action_at_next[:, count:]
    current_log_prob = log_prob_at_s[:, :count]
    next_log_prob = log_prob_at_next[:, :count]

    sampled_action = jnp.concatenate([uniform_action, current_action, next_action], axis=1)
    log_density = jnp.concatenate([uniform_log_prob, current_log_prob, next_log_prob], axis=1)
    return sampled_action, log_density, target_action


def sample_tanh(mean, log_std, key, count):
    """`count` actions of tanh N(mean, std) per row, [B, count, A], and their log pi, [B, count]."""
    noise = jax.random.normal(key, (len(mean), count, mean.shape[-1]))
    log_std = jnp.broadcast_to(log_std[:, None], noise.shape)
    x = mean[:, None] + jnp.exp(log_std) * noise  # [B, count, A], before tanh
    normal_log_prob = -0.5 * jnp.square(noise) - log_std - 0.5 * jnp.log(2 * jnp.pi)
    log_slope = 2 * (jnp.log(2.0) - x - jax.nn.softplus(-2 * x))  # log(1 - tanh(x)^2)
    log_prob = normal_log_prob - log_slope
    return jnp.tanh(x), log_prob.sum(axis=-1)


# --- Update -------------------------------------------------------------------------------------
def update(state, step, key, data, cfg):
    """One gradient step of every network at once, then one of the target critics. One seed.

    Randomness is a function of (key, step) alone, so neither the length of a chunk nor a resumed
    run changes the result. The key of a step is fold_in(key, step).
    """
    key_batch, key_critic, key_actor = jax.random.split(jax.random.fold_in(key, step), 3)
    batch = sample_batch(data, key_batch, cfg)
    # All gradients are taken at the state before the update.
    critic_grads, critic_metrics = jax.grad(critic_loss, has_aux=True)(
        state.critic.params, state, batch, key_critic, cfg
    )
    actor_grads, actor_metrics = jax.grad(actor_loss, has_aux=True)(
        state.actor.params, state, batch, key_actor, cfg
    )
    metrics = critic_metrics | actor_metrics

    action_dim = batch.action.shape[-1]
    temperature_grads = jax.grad(temperature_loss)(
        state.log_temperature.params, metrics["entropy"], action_dim
    )
    metrics["temperature"] = bounded_exp(state.log_temperature.params)

    log_multiplier = state.log_multiplier
    if cfg.target_action_gap is not None:
        multiplier_grads = jax.grad(multiplier_loss)(
            log_multiplier.params, metrics["conservative_gap"], cfg
        )
        metrics["multiplier"] = bounded_exp(log_multiplier.params)
        log_multiplier = log_multiplier.apply_gradients(grads=multiplier_grads)

    critic = state.critic.apply_gradients(grads=critic_grads)
    state = State(
        actor=state.actor.apply_gradients(grads=actor_grads),
        critic=update_target(critic, cfg),
        log_temperature=state.log_temperature.apply_gradients(grads=temperature_grads),
        log_multiplier=log_multiplier,
        statistics=state.statistics,
    )
    return state, metrics


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


def online_chunk(state, key, start, data, cfg):
    """`train_chunk` of the online phase, with an alpha of its own."""
    alpha = cfg.alpha if cfg.online_alpha is None else cfg.online_alpha
    return train_chunk(state, key, start, data, replace(cfg, alpha=alpha))


# --- Policy -------------------------------------------------------------------------------------
def policy(apply_fn, params, observation, key):
    """tanh of the mean, [..., O] -> [..., A]. `key` is not used."""
    actor_params, statistics = params
    mean, _ = apply_fn(actor_params, standardise(observation, statistics))
    return jnp.tanh(mean)


def explore(apply_fn, params, observation, key):
    """An action drawn from pi, [..., O] -> [..., A], by which the online phase acts."""
    actor_params, statistics = params
    mean, log_std = apply_fn(actor_params, standardise(observation, statistics))
    action, _ = sample_tanh(mean, log_std, key, 1)  # [B, 1, A]
    return action[:, 0]


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
        reward=cfg.reward_scale * rows.reward + cfg.reward_shift,
        observation=(rows.observation - mean) / std,
        next_observation=(rows.next_observation - mean) / std,
    )


def train(cfg, options):
    """Train every seed of `cfg` and return its final normalised scores, [S]."""
    experiment.check(cfg, options)
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps)
    reward = cfg.reward_scale * dataset.transitions.reward + cfg.reward_shift
    data = dataset.transitions._replace(reward=reward)
    statistics = (0.0, 1.0)  # leaves observations as they are
    if cfg.normalise_observations:
        data, statistics = normalise(data)
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
            run, data, explore_by, explore_keys, policy_params, online_chunk, rows_as_data
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

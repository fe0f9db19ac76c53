# SPDX-License-Identifier: Apache-2.0
"""WSRL (Zhou et al., 2024): Cal-QL on data, some env steps, then SAC in the env without the data.

Paper       https://arxiv.org/abs/2412.07762
Reference   https://github.com/zhouzypaul/wsrl
Run         python algorithms/wsrl.py --config configs/wsrl/antmaze.yaml
Parent      cal_ql.py (336 lines)
Results     docs/results.md
Deviations  The authors run the phases apart, with a checkpoint in between; here one run has both.
            Their Lagrange multiplier takes a gap from new samples, ours that of the critic loss.
            They clip actions to 0.99999, count the warm-up among the online steps and wait for as
            many steps as a batch has rows. Rows at a truncation are kept if the data record their
            next observation. As in their code, Adam also steps where it has no gradient, see
            `idle`. last_reward_goes_on is cal_ql.py's, for every truncated episode.

Shapes: S seeds, K critics, D drawn critics, U updates_per_step, B batch, N num_samples, M actions
        per row, O observation, A action. Arrays are float32.
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

from common import datasets, evaluation, experiment, fail, interaction


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
    actor_learning_rate: float = 1e-4  # Adam, for the actor and the entropy temperature
    critic_learning_rate: float = 3e-4  # Adam, for Q and the Lagrange multiplier
    discount: float = 0.99  # gamma, per environment step
    target_rate: float = 0.005  # tau, Polyak step of the target critics
    hidden: tuple[int, ...] = (256, 256)  # widths of the actor
    critic_hidden: tuple[int, ...] = (256, 256)  # widths of the critics
    num_critics: int = 10  # K, the actor uses their minimum
    normalise_observations: bool = False  # to mean 0 and std 1
    reward_scale: float = 1.0  # multiplies all rewards (AntMaze: 10)
    reward_shift: float = 0.0  # added afterwards (AntMaze: -5)
    # CQL
    alpha: float = 5.0  # weight of the conservative gap: log sum exp Q(s, .) - Q(s, a), Eq. 4
    num_samples: int = 10  # N, actions sampled per row from each of uniform, pi(s) and pi(s')
    importance_sampling: bool = True  # divide exp Q by the action's density; False: plain exp Q
    target_action_gap: float | None = None  # a Lagrange multiplier's, in alpha's place; None: off
    max_target_backup: bool = True  # the TD target takes the best of N actions of pi(s'), not one
    # Cal-QL
    last_reward_goes_on: bool = False  # a truncated episode's, for ever: in the return
    # WSRL
    calibrate: bool = True  # Cal-QL's bound by the returns; False: plain CQL (MuJoCo)
    num_target_critics: int = 2  # D, drawn from the K for the TD target and for the gap
    std_per_state: bool = True  # the actor's std is an output; False: one for all states (AntMaze)
    last_gain: float = 1e-2  # orthogonal gain of the last hidden layers (Kitchen: 1.414)
    # Online phase
    online_updates: int = 2_000_000  # critic updates online, after the offline ones
    updates_per_step: int = 4  # U, updates of the critics per env step and per update of the actor
    steps_per_refresh: int = 1  # env steps between updates of the acting policy
    warm_up_steps: int = 5_000  # env steps by the offline policy before the first of these updates
    online_max_target_backup: bool = False  # max_target_backup in this phase (AntMaze: True)


# --- Networks -----------------------------------------------------------------------------------
def orthogonal_dense(width):
    return nn.Dense(width, kernel_init=nn.initializers.orthogonal(2**0.5))


class NormedTrunk(nn.Module):
    hidden: tuple[int, ...]
    last_gain: float

    @nn.compact
    def __call__(self, x):  # [..., I] -> [..., H]
        for width in self.hidden[:-1]:
            x = nn.relu(nn.LayerNorm()(orthogonal_dense(width)(x)))
        last_init = nn.initializers.orthogonal(self.last_gain)
        x = nn.Dense(self.hidden[-1], kernel_init=last_init)(x)
        return nn.relu(nn.LayerNorm()(x))


class NormedTrunkActor(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int
    last_gain: float
    std_per_state: bool

    @nn.compact
    def __call__(self, observation):  # [..., O] -> mean and log std before tanh, [..., A] each
        x = NormedTrunk(self.hidden, self.last_gain, name="trunk")(observation)
        mean = orthogonal_dense(self.action_dim)(x)
        if self.std_per_state:
            log_std = orthogonal_dense(self.action_dim)(x)
        else:
            log_std = self.param("log_std", nn.initializers.zeros, (self.action_dim,))
            log_std = jnp.broadcast_to(log_std, mean.shape)
        return mean, log_std.clip(jnp.log(1e-5), jnp.log(10.0))


class SharedHeadCritics(nn.Module):
    num_critics: int
    hidden: tuple[int, ...]
    last_gain: float

    @nn.compact
    def __call__(self, observation, action):  # [B, O], [B, M, A] -> [K, B, M]
        # Rows and actions share one axis, since gradients are faster than with two.
        actions_per_row = action.shape[1]
        observation = observation.repeat(actions_per_row, axis=0)  # [B*M, O]
        flat_action = action.reshape(len(observation), -1)  # [B M, A]
        x = jnp.concatenate([observation, flat_action], axis=-1)
        trunks = nn.vmap(
            NormedTrunk,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=self.num_critics,
        )
        x = trunks(self.hidden, self.last_gain, name="trunks")(x)  # [K, B M, H]
        q = orthogonal_dense(1)(x)  # [K, B M, 1], one layer for all K, as in the authors' code
        return q.reshape(self.num_critics, *action.shape[:-1])


# --- State --------------------------------------------------------------------------------------
class TrainState(train_state.TrainState):
    target_params: Any  # slow copy of params

    @classmethod
    def create(cls, apply_fn, params, tx):
        # A copy: JAX reuses the memory of the old state, so params and targets must not share any.
        target = jax.tree.map(jnp.copy, params)
        return super().create(apply_fn=apply_fn, params=params, target_params=target, tx=tx)


class Rows(NamedTuple):
    """N transitions with the discounted return from each of them on."""

    observation: jax.Array  # [N, O]
    action: jax.Array  # [N, A]
    reward: jax.Array  # [N]
    next_observation: jax.Array  # [N, O]
    termination: jax.Array  # [N] 1 at a true end
    returns_to_go: jax.Array  # [N] -inf where the episode goes on


class State(NamedTuple):
    actor: train_state.TrainState
    critic: TrainState  # all K
    temperature: train_state.TrainState  # SAC's entropy temperature, before the softplus
    multiplier: train_state.TrainState  # Lagrange multiplier of the gap, before the softplus
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
    action_dim = batch.action.shape[-1]
    actor = NormedTrunkActor(cfg.hidden, action_dim, cfg.last_gain, cfg.std_per_state)
    critic = SharedHeadCritics(cfg.num_critics, cfg.critic_hidden, cfg.last_gain)

    actor_params = actor.init(key_actor, batch.observation)
    critic_params = critic.init(key_critic, batch.observation, batch.action[:, None])
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
        critic=TrainState.create(critic.apply, critic_params, critic_adam),
        temperature=train_state.TrainState.create(
            apply_fn=softplus_of, params={"raw": softplus_inverse(1.0)}, tx=temperature_adam
        ),
        multiplier=train_state.TrainState.create(
            apply_fn=softplus_of,
            params={"raw": softplus_inverse(1.0)},
            tx=multiplier_adam,
        ),
        statistics=(
            jnp.broadcast_to(mean, observation_shape),
            jnp.broadcast_to(std, observation_shape),
        ),
    )


def softplus_inverse(value):
    return jnp.log(jnp.expm1(jnp.float32(value)))


def softplus_of(params):
    """The temperature or the multiplier."""
    return jax.nn.softplus(params["raw"])


# --- Losses -------------------------------------------------------------------------------------
def critic_loss(params, state, batch, key, cfg):
    """Squared TD error + alpha (log sum_a~ exp Q(s, a~) - Q(s, a)), a~ the sampled actions.

    Values of the actions of pi(s) and pi(s') count as no less than the row's return. Cal-QL,
    Eq. 5.1. The error is a mean over B and K, the gap one over B and D drawn critics. All sampled
    actions are valued at s, those of pi(s') too. With a `target_action_gap` the Lagrange multiplier
    takes alpha's place.
    """
    key_sample, key_target, key_gap = jax.random.split(key, 3)
    sampled_action, log_density, target_action = sample_actions(state.actor, batch, key_sample, cfg)
    target = drawn_target(state, batch, target_action, key_target, cfg)  # [B]

    # One call for the action of the data and the sampled ones is faster than two.
    action = jnp.concatenate([batch.action[:, None], sampled_action], axis=1)  # [B, 1 + 3N, A]
    all_q = state.critic.apply_fn(params, batch.observation, action)  # [K, B, 1 + 3N]
    q = all_q[..., 0]  # [K, B]
    chex.assert_equal_shape([*q, target, batch.returns_to_go])
    td_error = jnp.square(q - target[None]).mean()

    drawn = draw_critics(key_gap, cfg)
    drawn_q = q[drawn]  # [D, B]
    sampled_q = all_q[drawn, :, 1:]  # [D, B, 3N]
    bound_rate = 0.0
    if cfg.calibrate:
        # Only the policy's actions: the uniform ones, the first N, stay as they are.
        uniform_q = sampled_q[..., : cfg.num_samples]  # [D, B, N]
        policy_q = sampled_q[..., cfg.num_samples :]  # [D, B, 2N]
        returns_to_go = jnp.broadcast_to(batch.returns_to_go[:, None], policy_q.shape)
        bound_rate = (policy_q < returns_to_go).mean()
        policy_q = jnp.maximum(policy_q, returns_to_go)  # no gradient where the return is larger
        sampled_q = jnp.concatenate([uniform_q, policy_q], axis=-1)  # [D, B, 3N]

    if cfg.importance_sampling:
        # A sum over 3N samples, not a mean: the gap and its target include log 3N.
        soft_maximum = jax.nn.logsumexp(sampled_q - log_density[None], axis=-1)  # [D, B]
    else:
        all_q = jnp.concatenate([drawn_q[..., None], sampled_q], axis=-1)
        # A mean, over the data's action as well.
        soft_maximum = jax.nn.logsumexp(all_q, axis=-1) - jnp.log(all_q.shape[-1])
    conservative_gap = (soft_maximum - drawn_q).mean()  # [D, B] -> []

    conservative_loss = cfg.alpha * conservative_gap
    if cfg.target_action_gap is not None:
        multiplier = softplus_of(state.multiplier.params)
        conservative_loss = multiplier * (conservative_gap - cfg.target_action_gap)
    loss = td_error + conservative_loss
    metrics = {"critic_loss": loss, "td_error": td_error, "q": q.mean()}
    metrics |= {"bound_rate": bound_rate}
    return loss, metrics | {"conservative_gap": conservative_gap}


def actor_loss(params, state, batch, key, cfg):
    """temperature log pi(a~|s) - min_k Q_k(s, a~) with one a~ ~ pi(s), mean over B."""
    mean, log_std = state.actor.apply_fn(params, batch.observation)
    action, log_prob = sample_tanh(mean, log_std, key, 1)  # [B, 1, A], [B, 1]
    q = state.critic.apply_fn(state.critic.params, batch.observation, action)
    q = q.min(axis=0)  # [K, B, 1] -> [B, 1]
    chex.assert_equal_shape([q, log_prob, batch.reward[:, None]])
    temperature = softplus_of(state.temperature.params)
    entropy_loss = temperature * log_prob
    loss = (entropy_loss - q).mean()
    return loss, {"actor_loss": loss, "entropy": -log_prob.mean()}


def temperature_loss(params, state, batch, key, cfg):
    """temperature (entropy - target entropy), with -A as the target and the entropy at s'."""
    _, log_prob = sample_next(state.actor, batch, key, cfg)
    temperature = softplus_of(params)
    target_entropy = -batch.action.shape[-1]
    loss = temperature * (-log_prob.mean() - target_entropy)
    return loss, {"temperature_loss": loss, "temperature": temperature}


def multiplier_loss(params, conservative_gap, cfg):
    """-multiplier (gap - target gap), so the multiplier grows while the gap is too large."""
    return -softplus_of(params) * (conservative_gap - cfg.target_action_gap)


def online_critic_loss(params, state, batch, key, cfg):
    """Squared TD error alone, mean over B and K."""
    key_action, key_target = jax.random.split(key)
    target_action, _ = sample_next(state.actor, batch, key_action, cfg)
    target = drawn_target(state, batch, target_action, key_target, cfg)  # [B]
    q = state.critic.apply_fn(params, batch.observation, batch.action[:, None])
    q = q.squeeze(-1)  # [K, B, 1] -> [K, B]
    chex.assert_equal_shape([*q, target])
    loss = jnp.square(q - target[None]).mean()
    return loss, {"critic_loss": loss, "td_error": loss, "q": q.mean()}


def drawn_target(state, batch, target_action, key, cfg):
    """r + gamma max_a' min_d Q_d(s', a') with D drawn targets, [B]. No entropy in it."""
    next_q = state.critic.apply_fn(
        state.critic.target_params, batch.next_observation, target_action
    )
    next_q = next_q[draw_critics(key, cfg)]
    next_q = next_q.min(axis=0).max(axis=-1)  # [D, B, 1 or N] -> [B]
    # Bootstrap through truncations, never through terminations.
    return batch.reward + cfg.discount * (1.0 - batch.termination) * next_q


def draw_critics(key, cfg):
    """Which of the K critics count, [D]. One may be drawn twice."""
    return jax.random.randint(key, (cfg.num_target_critics,), 0, cfg.num_critics)


def sample_next(actor, batch, key, cfg):
    """The actions of pi(s') for the TD target, [B, 1 or N, A], and their log pi, [B, 1 or N]."""
    count = cfg.num_samples if cfg.max_target_backup else 1
    mean, log_std = actor.apply_fn(actor.params, batch.next_observation)
    return sample_tanh(mean, log_std, key, count)


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
    keys = jax.random.split(jax.random.fold_in(key, step), 4)
    key_batch, key_critic, key_actor, key_temperature = keys
    batch = sample_batch(data, key_batch, cfg)
    # All gradients are taken at the state before the update.
    critic_grads, critic_metrics = jax.grad(critic_loss, has_aux=True)(
        state.critic.params, state, batch, key_critic, cfg
    )
    actor_grads, actor_metrics = jax.grad(actor_loss, has_aux=True)(
        state.actor.params, state, batch, key_actor, cfg
    )
    temperature_grads, temperature_metrics = jax.grad(temperature_loss, has_aux=True)(
        state.temperature.params, state, batch, key_temperature, cfg
    )
    metrics = critic_metrics | actor_metrics | temperature_metrics

    multiplier = state.multiplier
    if cfg.target_action_gap is not None:
        multiplier_grads = jax.grad(multiplier_loss)(
            multiplier.params, metrics["conservative_gap"], cfg
        )
        metrics["multiplier"] = softplus_of(multiplier.params)
        multiplier = multiplier.apply_gradients(grads=multiplier_grads)

    critic = state.critic.apply_gradients(grads=critic_grads)
    state = State(
        actor=state.actor.apply_gradients(grads=actor_grads),
        critic=update_target(critic, cfg),
        temperature=state.temperature.apply_gradients(grads=temperature_grads),
        multiplier=multiplier,
        statistics=state.statistics,
    )
    return state, metrics


def online_update(state, step, key, data, cfg):
    """U updates of the critics, then one of actor and temperature on all of their rows. One seed.

    The U batches are drawn at once. Neither a conservative term nor a row of the data set.
    """
    keys = jax.random.split(jax.random.fold_in(key, step), 4)
    key_batch, key_critic, key_actor, key_temperature = keys
    count = cfg.updates_per_step
    rows = sample_batch(data, key_batch, replace(cfg, batch_size=count * cfg.batch_size))
    batches = jax.tree.map(lambda x: x.reshape(count, cfg.batch_size, *x.shape[1:]), rows)
    critic_keys = jax.random.split(key_critic, count)
    state, critic_metrics = jax.lax.scan(
        partial(critics_step, cfg=cfg), state, (batches, critic_keys)
    )
    critic_metrics = jax.tree.map(jnp.mean, critic_metrics)

    actor_grads, actor_metrics = jax.grad(actor_loss, has_aux=True)(
        state.actor.params, state, rows, key_actor, cfg
    )
    temperature_grads, temperature_metrics = jax.grad(temperature_loss, has_aux=True)(
        state.temperature.params, state, rows, key_temperature, cfg
    )
    state = state._replace(
        actor=state.actor.apply_gradients(grads=actor_grads),
        critic=idle(state.critic),
        temperature=state.temperature.apply_gradients(grads=temperature_grads),
    )
    return state, critic_metrics | actor_metrics | temperature_metrics


def critics_step(state, batch_and_key, cfg):
    """A gradient step of the critics on SAC's TD error, then one of the targets."""
    batch, key = batch_and_key
    grads, metrics = jax.grad(online_critic_loss, has_aux=True)(
        state.critic.params, state, batch, key, cfg
    )
    critic = state.critic.apply_gradients(grads=grads)
    state = state._replace(
        actor=idle(state.actor),
        critic=update_target(critic, cfg),
        temperature=idle(state.temperature),
    )
    return state, metrics


def idle(net):
    """Adam's step on a gradient of zero: its mean of the earlier ones still moves the network.

    The authors' code takes it where another network is updated. With U = 4 the actor moves about
    twice as far per env step as without.
    """
    return net.apply_gradients(grads=jax.tree.map(jnp.zeros_like, net.params))


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
    """`train_chunk` of the online phase, which reads no row of the data set."""
    cfg = replace(cfg, max_target_backup=cfg.online_max_target_backup)
    steps = start + jnp.arange(0, cfg.log_every, cfg.updates_per_step)
    one_update = partial(online_update, key=key, data=data.own, cfg=cfg)
    state, metrics = jax.lax.scan(one_update, state, steps)
    return state, jax.tree.map(jnp.mean, metrics)


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
def with_returns(dataset, cfg):
    """`Rows` of a data set whose rewards and observations are those that are learnt from.

    A return ends with its episode. With last_reward_goes_on the last reward of a truncated episode
    goes on for ever. An AntMaze episode without success then returns r / (1 - gamma) from each of
    its rows on.
    """
    rows = dataset.transitions
    reward = rows.reward
    if cfg.last_reward_goes_on:
        afterwards = cfg.discount / (1.0 - cfg.discount) * rows.reward
        reward = reward + rows.truncation * afterwards
    dataset = replace(dataset, transitions=rows._replace(reward=reward))
    return Rows(
        observation=rows.observation,
        action=rows.action,
        reward=rows.reward,
        next_observation=rows.next_observation,
        termination=rows.termination,
        returns_to_go=datasets.returns_to_go(dataset, cfg.discount),
    )


def online_rows(rows, statistics, cfg):
    """`Rows` of the env's rows, [T, S, ...]. No update reads a return of theirs."""
    mean, std = statistics
    reward = cfg.reward_scale * rows.reward + cfg.reward_shift
    return Rows(
        observation=(rows.observation - mean) / std,
        action=rows.action,
        reward=reward,
        next_observation=(rows.next_observation - mean) / std,
        termination=rows.termination,
        returns_to_go=jnp.full_like(reward, -jnp.inf),
    )


def train(cfg, options):
    """Train every seed of `cfg` and return its final normalised scores, [S]."""
    experiment.check(cfg, options)
    if cfg.last_reward_goes_on and cfg.discount == 1.0:
        fail("--discount 1.0: must be below 1 with --last-reward-goes-on, whose sum is infinite")
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps)
    reward = cfg.reward_scale * dataset.transitions.reward + cfg.reward_shift
    data = dataset.transitions._replace(reward=reward)
    statistics = (0.0, 1.0)  # leaves observations as they are
    if cfg.normalise_observations:
        data, statistics = normalise(data)
    data = with_returns(replace(dataset, transitions=data), cfg)
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
            run,
            data,
            explore_by,
            explore_keys,
            policy_params,
            online_chunk,
            rows_as_data,
            apart=True,
        ) as online,
    ):
        state, metrics, start = run.restore(state)
        for step in run.boundaries(start):  # start, start + log_every, ..., last_update
            run.save(step, state, metrics)
            scores = None
            if run.evaluates(step):
                scores = rollouts.start(policy_params(state), step)
            last_metrics = metrics  # of the chunk that ended at this step
            if step < cfg.num_updates:  # Cal-QL; an accelerator trains while the CPU evaluates
                state, metrics = train_seeds(state, train_keys, step, data)
            elif step < run.last_update:  # warm-up first, then env steps and SAC's updates in turns
                state, metrics = online.chunk(state, train_keys, step)
            run.log(step, last_metrics, scores)
    return run.scores


if __name__ == "__main__":
    train(*experiment.parse(Config))

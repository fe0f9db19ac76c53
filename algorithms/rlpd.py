# SPDX-License-Identifier: Apache-2.0
"""RLPD (Ball et al., 2023): SAC in an env, half of every batch from a data set.

Paper       https://arxiv.org/abs/2302.02948
Reference   https://github.com/ikostrikov/rlpd (train_finetuning.py, configs/rlpd_config.py)
Run         python algorithms/rlpd.py --config configs/rlpd/pointmaze.yaml
Parent      sac.py (160 lines)
Results     docs/results.md
Deviations  The authors draw the rows of all updates after an env step at once and cut them into
            batches. Here every update draws its own batch, which gives the same distribution. An
            update of the actor and the temperature follows the last of them, as theirs does. With
            `--num-updates N` the updates before the online phase draw from the data set alone.
            The authors count the random steps among the env steps, here they come before.

Shapes: S seeds, K critics, B batch, O observation, A action. Arrays are float32.
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
    num_updates: int = 0  # gradient steps of the critics before the online phase
    log_every: int = 1_000  # updates per compiled chunk, the unit of logging and saving
    eval_every: int = 100_000  # updates between evaluations, of 20 per env step
    eval_episodes: int = 10  # episodes per seed and evaluation
    batch_size: int = 256  # transitions per update, half of them from the data set
    actor_learning_rate: float = 3e-4  # Adam
    critic_learning_rate: float = 3e-4  # Adam
    temperature_learning_rate: float = 3e-4  # Adam, for the weight of the entropy
    discount: float = 0.99  # gamma, per environment step
    target_rate: float = 0.005  # tau, Polyak step of the target critics
    hidden: tuple[int, ...] = (256, 256)  # widths of actor and critics
    num_critics: int = 10  # K, the actor maximises their mean
    num_target_critics: int = 2  # drawn from the K for every update; the target is their minimum
    backup_entropy: bool = True  # the target has the entropy of the next action (AntMaze: False)
    reward_shift: float = 0.0  # added to all rewards (AntMaze: -1)
    # Online phase
    online_updates: int = 5_000_000  # critic updates online
    updates_per_step: int = 20  # updates of the critics per env step and per update of the actor
    steps_per_refresh: int = 1  # env steps between updates of the acting policy
    random_steps: int = 5_000  # env steps with uniform actions before the first of these updates


# --- Networks -----------------------------------------------------------------------------------
def glorot_dense(width):
    return nn.Dense(width, kernel_init=nn.initializers.xavier_uniform())


class GlorotTwoHeadActor(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, observation):  # [..., O] -> mean and log std before tanh, [..., A] each
        x = observation
        for width in self.hidden:
            x = nn.relu(glorot_dense(width)(x))
        mean = glorot_dense(self.action_dim)(x)
        log_std = glorot_dense(self.action_dim)(x)
        return mean, log_std.clip(-20.0, 2.0)


class NormThenReluCritic(nn.Module):
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, observation, action):  # [..., O], [..., A] -> [...]
        x = jnp.concatenate([observation, action], axis=-1)
        for width in self.hidden:
            x = nn.relu(nn.LayerNorm()(glorot_dense(width)(x)))
        return glorot_dense(1)(x).squeeze(-1)


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
    actor = GlorotTwoHeadActor(cfg.hidden, action_dim=batch.action.shape[-1])
    critic = NormThenReluCritic(cfg.hidden)
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
    """Squared TD error to the minimum of some of the targets, mean over B and K. Algorithm 1.

    The target is r + gamma (min_k Q_k(s', a') - temperature log pi(a'|s')) with a' ~ pi(s') and k
    among `num_target_critics` of the K, drawn anew for every batch.
    """
    key_noise, key_members = jax.random.split(key)
    noise = jax.random.normal(key_noise, batch.action.shape)
    next_action, next_log_prob = sample_policy(state.actor, batch.next_observation, noise)
    members = jnp.argsort(jax.random.uniform(key_members, (cfg.num_critics,)))
    members = members[: cfg.num_target_critics]
    target_params = jax.tree.map(lambda x: x[members], state.critic.target_params)
    next_value = state.critic.apply_fn(target_params, batch.next_observation, next_action)
    next_value = next_value.min(axis=0)  # [num_target_critics, B] -> [B]
    if cfg.backup_entropy:
        temperature = state.log_temperature.apply_fn(state.log_temperature.params)
        next_value = next_value - temperature * next_log_prob
    reward = batch.reward + cfg.reward_shift
    # Bootstrap through truncations, never through terminations.
    target = reward + cfg.discount * (1.0 - batch.termination) * next_value  # [B]

    q = state.critic.apply_fn(params, batch.observation, batch.action)  # [K, B]
    chex.assert_equal_shape([q[0], target, next_value, next_log_prob])
    loss = jnp.square(q - target[None]).mean()
    return loss, {"critic_loss": loss, "q": q.mean()}


def actor_loss(params, state, batch, key, cfg):
    """temperature log pi(a~|s) - mean_k Q_k(s, a~) with a~ ~ pi(s), mean over B. Algorithm 1."""
    noise = jax.random.normal(key, batch.action.shape)
    mean, log_std = state.actor.apply_fn(params, batch.observation)
    action, log_prob = sample_squashed(mean, log_std, noise)  # [B, A], [B]
    q = state.critic.apply_fn(state.critic.params, batch.observation, action)
    q = q.mean(axis=0)  # [K, B] -> [B]
    chex.assert_equal_shape([q, log_prob, batch.reward])
    temperature = state.log_temperature.apply_fn(state.log_temperature.params)
    entropy_loss = temperature * log_prob
    loss = (entropy_loss - q).mean()
    return loss, {"actor_loss": loss, "entropy": -log_prob.mean()}


def temperature_loss(params, state, batch, entropy, cfg):
    """temperature (entropy - target), target -A / 2. An entropy above it lowers the temperature.

    `entropy` is that of the actor loss, of the policy before its update.
    """
    temperature = state.log_temperature.apply_fn(params)
    target_entropy = -batch.action.shape[-1] / 2
    loss = temperature * (entropy - target_entropy)
    return loss, {"temperature_loss": loss, "temperature": temperature}


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
def update(state, step, key, data, cfg, halves=False):
    """`updates_per_step` updates of the critics, then one of actor and temperature. One seed.

    Randomness is a function of (key, step) alone, so neither the length of a chunk nor a resumed
    run changes the result. The key of a step is fold_in(key, step).
    """
    draw = sample_halves if halves else sample_batch
    steps = step + jnp.arange(cfg.updates_per_step)
    state, critic_metrics = jax.lax.scan(
        partial(update_critics, key=key, data=data, draw=draw, cfg=cfg), state, steps
    )
    critic_metrics = jax.tree.map(jnp.mean, critic_metrics)

    # The actor learns from the last of these batches: the same key draws the same rows.
    key_batch, _, key_actor = jax.random.split(jax.random.fold_in(key, steps[-1]), 3)
    batch = draw(data, key_batch, cfg)
    grads, actor_metrics = jax.grad(actor_loss, has_aux=True)(
        state.actor.params, state, batch, key_actor, cfg
    )
    state = state._replace(actor=state.actor.apply_gradients(grads=grads))

    grads, temperature_metrics = jax.grad(temperature_loss, has_aux=True)(
        state.log_temperature.params, state, batch, actor_metrics["entropy"], cfg
    )
    state = state._replace(log_temperature=state.log_temperature.apply_gradients(grads=grads))
    return state, critic_metrics | actor_metrics | temperature_metrics


def online_update(state, step, key, data, cfg):
    """`update` with half of every batch from the env."""
    return update(state, step, key, data, cfg, halves=True)


def update_critics(state, step, key, data, draw, cfg):
    """A gradient step of the critics on a batch of its own, then one of the targets."""
    key_batch, key_critic, _ = jax.random.split(jax.random.fold_in(key, step), 3)
    batch = draw(data, key_batch, cfg)
    grads, metrics = jax.grad(critic_loss, has_aux=True)(
        state.critic.params, state, batch, key_critic, cfg
    )
    state = state._replace(critic=state.critic.apply_gradients(grads=grads))
    return state._replace(critic=update_target(state.critic, cfg)), metrics


def sample_batch(data, key, cfg):
    """`batch_size` rows of the data, drawn with replacement."""
    index = jax.random.randint(key, (cfg.batch_size,), 0, len(data.reward))
    return jax.tree.map(lambda column: column[index], data)


def sample_halves(data, key, cfg):
    """A batch whose rows come from the data set and from the env, in turns."""
    key_recorded, key_own = jax.random.split(key)
    half = replace(cfg, batch_size=(cfg.batch_size + 1) // 2)
    recorded = sample_batch(data.recorded, key_recorded, half)
    own = sample_batch(data.own, key_own, half)

    def in_turns(recorded_column, own_column):
        pairs = jnp.stack([recorded_column, own_column], axis=1)
        rows = jnp.concatenate(pairs)  # [B / 2, 2, ...] -> [B, ...]
        return rows[: cfg.batch_size]

    return jax.tree.map(in_turns, recorded, own)


def update_target(net, cfg):
    target_params = optax.incremental_update(net.params, net.target_params, cfg.target_rate)
    return net.replace(target_params=target_params)


def train_chunk(state, key, start, data, cfg):
    """`log_every` updates of one seed, compiled as one program. Metrics are chunk means."""
    steps = start + jnp.arange(0, cfg.log_every, cfg.updates_per_step)  # per call of `update`
    state, metrics = jax.lax.scan(partial(update, key=key, data=data, cfg=cfg), state, steps)
    return state, jax.tree.map(jnp.mean, metrics)


def online_chunk(state, key, start, data, cfg):
    """`train_chunk` of the online phase."""
    steps = start + jnp.arange(0, cfg.log_every, cfg.updates_per_step)
    one_update = partial(online_update, key=key, data=data, cfg=cfg)
    state, metrics = jax.lax.scan(one_update, state, steps)
    return state, jax.tree.map(jnp.mean, metrics)


# --- Policy -------------------------------------------------------------------------------------
def policy(apply_fn, params, observation, key):
    """tanh of the mean, [..., O] -> [..., A]. `key` is not used."""
    mean, _ = apply_fn(params, observation)
    return jnp.tanh(mean)


def explore(apply_fn, params, observation, key):
    """An action drawn from pi, [..., O] -> [..., A], by which the online phase acts."""
    mean, log_std = apply_fn(params, observation)
    noise = jax.random.normal(key, mean.shape)
    action, _ = sample_squashed(mean, log_std, noise)
    return action


def policy_params(state):
    return state.actor.params


def policy_fn(state, cfg):
    """`policy` with the networks filled in: (params, observation, key) -> action."""
    return partial(policy, state.actor.apply_fn)


# --- Training -----------------------------------------------------------------------------------
def train(cfg, options):
    """Train every seed of `cfg` and return its final normalised scores, [S]."""
    experiment.check(cfg, options)
    if cfg.num_target_critics > cfg.num_critics:
        fail(
            f"--num-target-critics {cfg.num_target_critics}: there are {cfg.num_critics} critics "
            "(--num-critics)"
        )
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps)
    data = dataset.transitions
    data = experiment.place(data, options)
    example = jax.tree.map(lambda x: x[:1], data)  # one row, for its shapes
    init_keys, train_keys, policy_keys, explore_keys = experiment.streams(cfg.seeds, 4)  # [S] each
    create = partial(create_state, batch=example, cfg=cfg)
    state = jax.vmap(create)(init_keys)
    # Compiled once for all seeds. `update` shows which rows a step reads, for --data host.
    train_seeds = experiment.over_seeds(partial(train_chunk, cfg=cfg), update=update)
    act = policy_fn(state, cfg)
    explore_by = partial(explore, state.actor.apply_fn)

    with (
        experiment.Run(cfg, options, dataset) as run,
        evaluation.Rollouts(dataset, act, policy_keys, cfg) as rollouts,
        interaction.Interaction(
            run, data, explore_by, explore_keys, policy_params, online_chunk, apart=True
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

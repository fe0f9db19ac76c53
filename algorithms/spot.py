# SPDX-License-Identifier: Apache-2.0
"""SPOT (Wu et al., 2022): TD3 whose actor stays where a VAE finds the data dense, then online.

Paper       https://arxiv.org/abs/2202.06239
Reference   https://github.com/corl-team/CORL (algorithms/finetune/spot.py)
Run         python algorithms/spot.py --config configs/spot/antmaze.yaml
Parent      td3_bc.py (226 lines)
Results     docs/results.md
Deviations  As in the reference, observations are not normalised and the actor has no dropout; the
            authors have both in their runs on MuJoCo. Their importance-weighted bound is not here.
            The reference clips the exploration noise at five times its std; here the action is
            clipped. Rows at a truncation are kept if the data record their next observation.

Shapes: S seeds, K critics, B batch, N samples, L latent, O observation, A action.
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
    num_updates: int = 1_100_000  # gradient steps: first the VAE's, then the critics'
    log_every: int = 1_000  # updates per compiled chunk, the unit of logging and saving
    eval_every: int = 20_000  # updates between evaluations
    eval_episodes: int = 10  # episodes per seed and evaluation
    batch_size: int = 256  # transitions per update
    actor_learning_rate: float = 1e-4  # Adam
    critic_learning_rate: float = 3e-4  # Adam
    discount: float = 0.99  # gamma, per environment step
    target_rate: float = 0.005  # tau, Polyak step of the target networks
    policy_delay: int = 2  # critic updates per actor and target update
    target_noise: float = 0.2  # std of the target policy smoothing noise, in action units
    target_noise_clip: float = 0.5  # bound on that noise, in action units
    hidden: tuple[int, ...] = (256, 256)  # widths of actor and critics
    num_critics: int = 2  # K, the target is their minimum
    reward_shift: float = 0.0  # added to all rewards (AntMaze: -1)
    # SPOT
    clone_updates: int = 100_000  # first updates: they train the VAE alone
    vae_learning_rate: float = 1e-3  # Adam
    vae_hidden: tuple[int, ...] = (750, 750)  # widths of encoder and decoder
    kl_weight: float = 0.5  # beta, weight of the KL divergence in the negative ELBO
    density_weight: float = 0.05  # lambda, weight of the negative ELBO in the actor loss
    num_samples: int = 1  # N, latents per row to estimate the ELBO of the policy's actions
    # Online phase
    online_updates: int = 0  # gradient steps of online training, after the offline ones
    updates_per_step: int = 1  # updates per env step
    steps_per_refresh: int = 2  # env steps between updates of the acting policy
    exploration_noise: float = 0.1  # std of the noise on actions in the env, as in TD3
    online_discount: float = 0.995  # gamma in this phase
    penalty_floor: float = 0.2  # lambda decays linearly to this share of itself
    penalty_decay_updates: int = 1_000_000  # the decay would reach 0 after so many online updates


# --- Networks -----------------------------------------------------------------------------------
def fan_in_uniform():
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # U(±1 / sqrt(fan in))


def uniform(bound):
    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def linear(fan_in, width):  # PyTorch's default initialisation
    return nn.Dense(width, kernel_init=fan_in_uniform(), bias_init=uniform(fan_in**-0.5))


class SmallHeadActor(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, observation):  # [..., O] -> [..., A]
        x = observation
        for width in self.hidden:
            x = nn.relu(linear(x.shape[-1], width)(x))
        head = nn.Dense(self.action_dim, kernel_init=uniform(1e-3), bias_init=uniform(1e-3))
        return jnp.tanh(head(x))


class LinearSmallHeadCritic(nn.Module):
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, observation, action):  # [..., O], [..., A] -> [...]
        x = jnp.concatenate([observation, action], axis=-1)
        for width in self.hidden:
            x = nn.relu(linear(x.shape[-1], width)(x))
        return nn.Dense(1, kernel_init=uniform(3e-3), bias_init=uniform(3e-3))(x).squeeze(-1)


class Encoder(nn.Module):
    hidden: tuple[int, ...]
    latent_dim: int

    @nn.compact
    def __call__(self, observation, action):  # -> mean and log std of the latent, [..., L] each
        x = jnp.concatenate([observation, action], axis=-1)
        for width in self.hidden:
            x = nn.relu(linear(x.shape[-1], width)(x))
        x = linear(x.shape[-1], 2 * self.latent_dim)(x)
        mean, log_std = jnp.split(x, 2, axis=-1)
        return mean, log_std.clip(-4.0, 15.0)


class Decoder(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, observation, latent):  # [..., O], [..., L] -> [..., A]
        x = jnp.concatenate([observation, latent], axis=-1)
        for width in self.hidden:
            x = nn.relu(linear(x.shape[-1], width)(x))
        head = linear(x.shape[-1], self.action_dim)
        return jnp.tanh(head(x))


class DensityVAE(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int

    def setup(self):
        self.encoder = Encoder(self.hidden, 2 * self.action_dim)  # L = 2 A
        self.decoder = Decoder(self.hidden, self.action_dim)

    def __call__(self, observation, action, key):
        """The action [..., A] encoded and decoded; mean and log std of its latent, [..., L]."""
        mean, log_std = self.encoder(observation, action)
        latent = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
        return self.decoder(observation, latent), mean, log_std


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
    vae: train_state.TrainState  # of the data's actions; its ELBO is the density


def create_state(key, batch, cfg):
    """State of one seed before the first update. `batch` supplies shapes only."""
    key_actor, key_critic, key_vae, key_noise = jax.random.split(key, 4)
    action_dim = batch.action.shape[-1]
    actor = SmallHeadActor(cfg.hidden, action_dim)
    critic = LinearSmallHeadCritic(cfg.hidden)
    vae = DensityVAE(cfg.vae_hidden, action_dim)
    init_critics = jax.vmap(critic.init, (0, None, None))
    apply_critics = jax.vmap(critic.apply, (0, None, None))  # -> [K, B]

    actor_params = actor.init(key_actor, batch.observation)
    critic_keys = jax.random.split(key_critic, cfg.num_critics)
    critic_params = init_critics(critic_keys, batch.observation, batch.action)
    vae_params = vae.init(key_vae, batch.observation, batch.action, key_noise)
    actor_adam = optax.adam(cfg.actor_learning_rate)
    critic_adam = optax.adam(cfg.critic_learning_rate)
    vae_adam = optax.adam(cfg.vae_learning_rate)
    return State(
        actor=TrainState.create(actor.apply, actor_params, actor_adam),
        critic=TrainState.create(apply_critics, critic_params, critic_adam),
        vae=train_state.TrainState.create(apply_fn=vae.apply, params=vae_params, tx=vae_adam),
    )


def with_new_optimisers(state):
    """The State of one seed whose actor and critics begin anew with their optimisers."""
    actor = state.actor.replace(opt_state=state.actor.tx.init(state.actor.params))
    critic = state.critic.replace(opt_state=state.critic.tx.init(state.critic.params))
    return state._replace(actor=actor, critic=critic)


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


def actor_loss(params, state, batch, key, cfg):
    """lambda (-ELBO(pi(s) | s)) - Q_1(s, pi(s)) / mean |Q_1|, mean over B."""
    action = state.actor.apply_fn(params, batch.observation)  # [B, A]
    q = state.critic.apply_fn(state.critic.params, batch.observation, action)
    q = q[0]  # [K, B] -> [B], the first critic
    q_scale = jax.lax.stop_gradient(jnp.abs(q).mean())
    # N latents for each row.
    observations = jnp.repeat(batch.observation[None], cfg.num_samples, axis=0)  # [N, B, O]
    actions = jnp.repeat(action[None], cfg.num_samples, axis=0)  # [N, B, A]
    reconstruction_mse, kl = negative_elbo(
        state.vae.params, state.vae.apply_fn, observations, actions, key
    )
    negative_density = (reconstruction_mse + cfg.kl_weight * kl).mean(axis=0)  # [B]
    chex.assert_equal_shape([q, negative_density, batch.reward])
    q_loss = -q / q_scale
    density_loss = cfg.density_weight * negative_density
    loss = (density_loss + q_loss).mean()
    return loss, {
        "actor_loss": loss,
        "negative_density": negative_density.mean(),
        "density_weight": jnp.asarray(cfg.density_weight),
    }


def vae_loss(params, state, batch, key, cfg):
    """(decoded - a)^2 + kl_weight KL(N(mean, std), N(0, 1)) of the latent, mean over B."""
    reconstruction_mse, kl = negative_elbo(
        params, state.vae.apply_fn, batch.observation, batch.action, key
    )
    chex.assert_equal_shape([reconstruction_mse, kl, batch.reward])
    loss = (reconstruction_mse + cfg.kl_weight * kl).mean()
    return loss, {
        "vae_loss": loss,
        "reconstruction_mse": reconstruction_mse.mean(),
        "kl": kl.mean(),
    }


def negative_elbo(params, apply_vae, observation, action, key):
    """Its two terms before their weights, [...] each, of actions [..., A] with a latent each.

    The first is a mean over A, the second over L, as in the reference.
    """
    decoded, mean, log_std = apply_vae(params, observation, action, key)
    reconstruction_mse = jnp.square(decoded - action).mean(axis=-1)
    kl = 0.5 * (jnp.square(mean) + jnp.exp(2 * log_std) - 2 * log_std - 1.0)  # [..., L]
    return reconstruction_mse, kl.mean(axis=-1)


# --- Update -------------------------------------------------------------------------------------
def clone_update(state, step, key, data, cfg):
    """A gradient step of the VAE. One seed.

    The first phase. Its key of a step is fold_in(key, step), as in `update`.
    """
    key_batch, key_vae = jax.random.split(jax.random.fold_in(key, step))
    batch = sample_batch(data, key_batch, cfg)
    grads, metrics = jax.grad(vae_loss, has_aux=True)(state.vae.params, state, batch, key_vae, cfg)
    return state._replace(vae=state.vae.apply_gradients(grads=grads)), metrics


def update(state, step, key, data, cfg):
    """`policy_delay` critic updates, then one of the actor and of all targets. One seed.

    Randomness is a function of (key, step) alone, so neither the length of a chunk nor a resumed
    run changes the result. The key of a step is fold_in(key, step).
    """
    critic_metrics = []
    for i in range(cfg.policy_delay):
        keys = jax.random.split(jax.random.fold_in(key, step + i), 3)
        key_batch, key_noise, key_actor = keys
        batch = sample_batch(data, key_batch, cfg)
        grads, metrics = jax.grad(critic_loss, has_aux=True)(
            state.critic.params, state, batch, key_noise, cfg
        )
        state = state._replace(critic=state.critic.apply_gradients(grads=grads))
        critic_metrics.append(metrics)
    # The actor learns from the last of these batches.
    grads, actor_metrics = jax.grad(actor_loss, has_aux=True)(
        state.actor.params, state, batch, key_actor, cfg
    )
    state = state._replace(actor=state.actor.apply_gradients(grads=grads))
    state = state._replace(
        actor=update_target(state.actor, cfg), critic=update_target(state.critic, cfg)
    )
    return state, mean_metrics(critic_metrics) | actor_metrics


def online_update(state, step, key, data, cfg):
    """`update` with another gamma, and lambda as far as it has decayed when the actor moves."""
    count = step + cfg.policy_delay - cfg.num_updates
    decay = jnp.maximum(1.0 - count / cfg.penalty_decay_updates, cfg.penalty_floor)
    density_weight = cfg.density_weight * decay
    cfg = replace(cfg, density_weight=density_weight, discount=cfg.online_discount)
    return update(state, step, key, data, cfg)


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


def clone_chunk(state, key, start, data, cfg):
    """`log_every` updates of the first phase, as `train_chunk` makes those of the second."""
    steps = start + jnp.arange(cfg.log_every)
    state, metrics = jax.lax.scan(partial(clone_update, key=key, data=data, cfg=cfg), state, steps)
    return state, jax.tree.map(jnp.mean, metrics)


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
def train(cfg, options):
    """Train every seed of `cfg` and return its final normalised scores, [S]."""
    experiment.check(cfg, options)
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps)
    data = experiment.place(dataset.transitions, options)
    example = jax.tree.map(lambda x: x[:1], data)  # one row, for its shapes
    init_keys, train_keys, policy_keys, explore_keys = experiment.streams(cfg.seeds, 4)  # [S] each
    create = partial(create_state, batch=example, cfg=cfg)
    state = jax.vmap(create)(init_keys)
    # Compiled once for all seeds. An `update` shows which rows a step reads, for --data host.
    clone_seeds = experiment.over_seeds(partial(clone_chunk, cfg=cfg), update=clone_update)
    train_seeds = experiment.over_seeds(partial(train_chunk, cfg=cfg), update=update)
    act = policy_fn(state, cfg)
    explore_by = partial(explore, state.actor.apply_fn, cfg=cfg)

    with (
        experiment.Run(cfg, options, dataset) as run,
        evaluation.Rollouts(dataset, act, policy_keys, cfg) as rollouts,
        interaction.Interaction(
            run, data, explore_by, explore_keys, policy_params, online_chunk
        ) as online,
    ):
        state, metrics, start = run.restore(state)
        for step in run.boundaries(start):  # start, start + log_every, ..., last_update
            run.save(step, state, metrics)
            scores = None
            if run.evaluates(step) and step >= cfg.clone_updates:  # from the actor's phase on
                scores = rollouts.start(policy_params(state), step)
            last_metrics = metrics  # of the chunk that ended at this step
            # An accelerator trains while the CPU evaluates.
            if step < cfg.clone_updates:  # the first phase
                state, metrics = clone_seeds(state, train_keys, step, data)
            elif step < cfg.num_updates:  # the second one
                state, metrics = train_seeds(state, train_keys, step, data)
            elif step < run.last_update:  # env steps and updates in turns
                if step == cfg.num_updates:
                    state = jax.vmap(with_new_optimisers)(state)
                state, metrics = online.chunk(state, train_keys, step)
            run.log(step, last_metrics, scores)
    return run.scores


if __name__ == "__main__":
    train(*experiment.parse(Config))

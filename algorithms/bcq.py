# SPDX-License-Identifier: Apache-2.0
"""BCQ (Fujimoto et al., 2019): Q-learning over actions that a model of the data generates.

Paper       https://arxiv.org/abs/1812.02900
Reference   https://github.com/sfujim/BCQ (continuous_BCQ)
Run         python algorithms/bcq.py --config configs/bcq/mujoco.yaml
Parent      td3_bc.py (263 lines)
Results     docs/results.md
Deviations  none known from the code. Data with recorded next observations keep the rows at a
            truncation, which D4RL's loader drops.

Shapes: S seeds, K critics, N sampled actions, B batch, E episodes, O observation, A action,
        L = 2 A latent. Arrays are float32.
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

from common import datasets, evaluation, experiment


# --- Config -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    dataset: str = "local/pointmaze/umaze-v0"  # data set id or path, see docs/data.md
    seeds: tuple[int, ...] = (0,)  # trained in parallel
    num_updates: int = 1_000_000  # gradient steps of every network
    log_every: int = 1_000  # updates per compiled chunk, the unit of logging and saving
    eval_every: int = 20_000  # updates between evaluations
    eval_episodes: int = 10  # episodes per seed and evaluation
    batch_size: int = 100  # transitions per update
    actor_learning_rate: float = 1e-3  # Adam
    critic_learning_rate: float = 1e-3  # Adam
    discount: float = 0.99  # gamma, per environment step
    target_rate: float = 0.005  # tau, Polyak step of the target networks
    hidden: tuple[int, ...] = (400, 300)  # widths of actor and critics
    num_critics: int = 2  # K, the target mixes their minimum and maximum by lam
    reward_shift: float = 0.0  # added to data set rewards
    # BCQ
    vae_learning_rate: float = 1e-3  # Adam
    vae_hidden: tuple[int, ...] = (750, 750)  # widths of the VAE's encoder and decoder
    kl_weight: float = 0.5  # weight of the KL term beside the reconstruction error of the VAE
    perturbation: float = 0.05  # Phi, how far the actor may move a sampled action
    lam: float = 0.75  # lambda, weight of min_k Q_k in the target; max_k Q_k has 1 - lambda
    num_samples: int = 10  # N, actions sampled per next observation for the target
    num_eval_samples: int = 100  # actions sampled per observation when acting, the best is taken


# --- Networks -----------------------------------------------------------------------------------
def fan_in_uniform():
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # U(±1 / sqrt(fan in))


def uniform(bound):
    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def linear(fan_in, width):  # PyTorch's default initialisation
    return nn.Dense(width, kernel_init=fan_in_uniform(), bias_init=uniform(fan_in**-0.5))


class PerturbationActor(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, observation, action):  # [..., O], [..., A] -> xi / Phi in [-1, 1], [..., A]
        x = jnp.concatenate([observation, action], axis=-1)
        for width in self.hidden:
            x = nn.relu(linear(x.shape[-1], width)(x))
        head = linear(x.shape[-1], self.action_dim)
        return jnp.tanh(head(x))


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


class VAE(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int

    def setup(self):
        self.latent_dim = 2 * self.action_dim  # L
        self.encoder = Encoder(self.hidden, self.latent_dim)
        self.decoder = Decoder(self.hidden, self.action_dim)

    def __call__(self, observation, action, key):
        """The action [..., A] encoded and decoded; mean and log std of its latent, [..., L]."""
        mean, log_std = self.encoder(observation, action)
        latent = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
        return self.decoder(observation, latent), mean, log_std

    def sample(self, observation, key):  # [..., O] -> [..., A]
        latent = jax.random.normal(key, (*observation.shape[:-1], self.latent_dim))
        latent = latent.clip(-0.5, 0.5)  # near the mean, where actions are likely
        return self.decoder(observation, latent)


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
    actor: TrainState  # xi, perturbs sampled actions
    critic: TrainState  # every array has a leading [K] axis
    vae: train_state.TrainState  # samples actions as in the data


def create_state(key, batch, cfg):
    """State of one seed before the first update. `batch` supplies shapes only."""
    key_actor, key_critic, key_vae, key_noise = jax.random.split(key, 4)
    action_dim = batch.action.shape[-1]
    actor = PerturbationActor(cfg.hidden, action_dim)
    critic = Critic(cfg.hidden)
    vae = VAE(cfg.vae_hidden, action_dim)
    init_critics = jax.vmap(critic.init, (0, None, None))
    apply_critics = jax.vmap(critic.apply, (0, None, None))  # -> [K, B]

    actor_params = actor.init(key_actor, batch.observation, batch.action)
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


# --- Losses -------------------------------------------------------------------------------------
def critic_loss(params, state, batch, key, cfg):
    """Squared TD error to the best of N sampled actions, mean over B, summed over K. Eq. 13.

    The Q of an action in the target is lambda min_k Q_k + (1 - lambda) max_k Q_k.
    """
    next_observation = jnp.repeat(
        batch.next_observation[None], cfg.num_samples, axis=0
    )  # [N, B, O]
    next_action = state.vae.apply_fn(state.vae.params, next_observation, key, method="sample")
    next_action = perturb(
        state.actor.apply_fn, state.actor.target_params, next_observation, next_action, cfg
    )  # [N, B, A]

    next_q = state.critic.apply_fn(state.critic.target_params, next_observation, next_action)
    lowest_q = next_q.min(axis=0)  # [K, N, B] -> [N, B]
    highest_q = next_q.max(axis=0)  # [K, N, B] -> [N, B]
    mixed_q = cfg.lam * lowest_q + (1.0 - cfg.lam) * highest_q
    next_value = mixed_q.max(axis=0)  # [N, B] -> [B]
    reward = batch.reward + cfg.reward_shift
    # Bootstrap through truncations, never through terminations.
    target = reward + cfg.discount * (1.0 - batch.termination) * next_value  # [B]

    q = state.critic.apply_fn(params, batch.observation, batch.action)  # [K, B]
    chex.assert_equal_shape([*q, target])
    loss = jnp.square(q - target[None]).mean(axis=1).sum()
    return loss, {"critic_loss": loss, "q": q.mean()}


def actor_loss(params, state, batch, key, cfg):
    """-Q_1(s, a + xi(s, a)) at one sampled action a, mean over B. Eq. 12."""
    action = state.vae.apply_fn(state.vae.params, batch.observation, key, method="sample")
    action = perturb(state.actor.apply_fn, params, batch.observation, action, cfg)  # [B, A]
    q = state.critic.apply_fn(state.critic.params, batch.observation, action)
    q = q[0]  # [K, B] -> [B], the first critic
    chex.assert_equal_shape([q, batch.reward])
    loss = -q.mean()
    return loss, {"actor_loss": loss}


def vae_loss(params, state, batch, key, cfg):
    """(decoded - a)^2 + kl_weight KL(N(mean, std), N(0, 1)) of the latent, mean over B.

    The first term is a mean over A, the second over L, as in the authors' code.
    """
    decoded, mean, log_std = state.vae.apply_fn(params, batch.observation, batch.action, key)
    reconstruction_mse = jnp.square(decoded - batch.action).mean(axis=-1)  # [B]
    kl = 0.5 * (jnp.square(mean) + jnp.exp(2 * log_std) - 2 * log_std - 1.0)  # [B, L]
    kl = kl.mean(axis=-1)  # [B]
    chex.assert_equal_shape([reconstruction_mse, kl, batch.reward])
    loss = (reconstruction_mse + cfg.kl_weight * kl).mean()
    return loss, {
        "vae_loss": loss,
        "reconstruction_mse": reconstruction_mse.mean(),
        "kl": kl.mean(),
    }


def perturb(apply_actor, actor_params, observation, action, cfg):
    """a + xi(s, a) with |xi| < Phi, clipped to [-1, 1], [..., O], [..., A] -> [..., A]."""
    xi = cfg.perturbation * apply_actor(actor_params, observation, action)
    return (action + xi).clip(-1.0, 1.0)


# --- Update -------------------------------------------------------------------------------------
def update(state, step, key, data, cfg):
    """One step of the VAE, the critics and the actor, then of the targets, on one batch. One seed.

    Randomness is a function of (key, step) alone, so neither the length of a chunk nor a resumed
    run changes the result. The key of a step is fold_in(key, step).
    """
    key_batch, key_vae, key_critic, key_actor = jax.random.split(jax.random.fold_in(key, step), 4)
    batch = sample_batch(data, key_batch, cfg)

    grads, vae_metrics = jax.grad(vae_loss, has_aux=True)(
        state.vae.params, state, batch, key_vae, cfg
    )
    state = state._replace(vae=state.vae.apply_gradients(grads=grads))

    grads, critic_metrics = jax.grad(critic_loss, has_aux=True)(
        state.critic.params, state, batch, key_critic, cfg
    )
    state = state._replace(critic=state.critic.apply_gradients(grads=grads))

    grads, actor_metrics = jax.grad(actor_loss, has_aux=True)(
        state.actor.params, state, batch, key_actor, cfg
    )
    state = state._replace(actor=state.actor.apply_gradients(grads=grads))

    state = state._replace(
        actor=update_target(state.actor, cfg), critic=update_target(state.critic, cfg)
    )
    return state, critic_metrics | actor_metrics | vae_metrics


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
def policy(apply_fn, params, observation, key, apply_vae, apply_critics, cfg):
    """Of `num_eval_samples` sampled and perturbed actions the one of highest Q_1.

    [..., O] -> [..., A]. `key` draws the samples. In the shapes below M is their number.
    """
    actor_params, vae_params, critic_params = params
    observation = jnp.repeat(observation[None], cfg.num_eval_samples, axis=0)  # [M, ..., O]
    action = apply_vae(vae_params, observation, key, method="sample")
    action = perturb(apply_fn, actor_params, observation, action, cfg)  # [M, ..., A]
    q = apply_critics(critic_params, observation, action)
    q = q[0]  # [K, M, ...] -> [M, ...], the first critic
    best = q.argmax(axis=0)[None, ..., None]  # [1, ..., 1]
    return jnp.take_along_axis(action, best, axis=0)[0]


def policy_params(state):
    return state.actor.params, state.vae.params, state.critic.params


def policy_fn(state, cfg):
    """`policy` with the networks filled in: (params, observation, key) -> action."""
    return partial(
        policy,
        state.actor.apply_fn,
        apply_vae=state.vae.apply_fn,
        apply_critics=state.critic.apply_fn,
        cfg=cfg,
    )


# --- Training -----------------------------------------------------------------------------------
def train(cfg, options):
    """Train every seed of `cfg` and return its final normalised scores, [S]."""
    experiment.check(cfg, options)
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps)
    data = experiment.place(dataset.transitions, options)
    example = jax.tree.map(lambda x: x[:1], data)  # one row, for its shapes
    init_keys, train_keys, policy_keys = experiment.streams(cfg.seeds, 3)  # [S] keys each
    create = partial(create_state, batch=example, cfg=cfg)
    state = jax.vmap(create)(init_keys)
    # Compiled once for all seeds. `update` shows which rows a step reads, for --data host.
    train_seeds = experiment.over_seeds(partial(train_chunk, cfg=cfg), update=update)
    act = policy_fn(state, cfg)

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

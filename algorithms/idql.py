# SPDX-License-Identifier: Apache-2.0
"""IDQL (Hansen-Estruch et al., 2023): IQL's values pick among samples of a diffusion model.

Paper       https://arxiv.org/abs/2304.10573, IFQL (generator=flow) https://arxiv.org/abs/2502.02538
Reference   https://github.com/philippe-eecs/IDQL, https://github.com/seohongpark/fql
Run         python algorithms/idql.py --config configs/idql/antmaze.yaml
Parent      iql.py (170 lines)
Results     benchmarks/results
Deviations  as the code has it since 7582571, not before: one batch and one step per update for all
            networks. The best sample acts (paper: also one drawn by its weight). All rows train
            (code: 95 %), those at a truncation too where their next observation is known. IFQL:
            the reference has one Adam, its losses and targets are of the state before, its online
            critics choose, the actor's loss is a mean over actions; configs turn off the rest.

Shapes: S seeds, K critics, N samples, B batch, E episodes, O observation, A action. All float32.
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

from common import datasets, evaluation, experiment


# --- Config -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    dataset: str = "local/pointmaze/umaze-v0"  # data set id or path, see common/datasets.py
    seeds: tuple[int, ...] = (0,)  # trained in parallel
    num_updates: int = 3_000_000  # gradient steps of every network
    log_every: int = 1_000  # updates per compiled chunk, the unit of logging and saving
    eval_every: int = 250_000  # updates between evaluations
    eval_episodes: int = 50  # episodes per seed and evaluation
    batch_size: int = 512  # transitions per update
    actor_learning_rate: float = 3e-4  # AdamW, see cosine
    critic_learning_rate: float = 3e-4  # Adam, for Q and V
    discount: float = 0.99  # gamma, per environment step
    target_rate: float = 0.005  # tau, Polyak step of the target critics
    hidden: tuple[int, ...] = (256, 256)  # widths of Q and V
    num_critics: int = 2  # K, their minimum counts
    layer_norm: Literal["none", "input", "hidden"] = "input"  # of V, or after Q's and V's layers
    reward_shift: float = 0.0  # added to data set rewards (AntMaze: -1)
    return_scale: float | None = None  # returns of the data span this much (MuJoCo: 1000)
    # IDQL
    expectile: float = 0.7  # tau, weight of errors where Q > V
    generator: Literal["ddpm", "flow"] = "ddpm"  # of actions; flow, with GELU in Q and V: IFQL
    generator_steps: int = 5  # T, from noise to action
    num_samples: int = 64  # N, actions to choose from when acting
    actor_hidden: tuple[int, ...] = (256, 256, 256)  # widths of residual blocks, flow: of layers
    actor_target_rate: float = 0.001  # Polyak step of the parameters that act
    weight_decay: float = 1e-4  # of the actor, relative to its learning rate
    cosine: bool = True  # the actor's learning rate falls to 0 over num_updates
    dropout: float | None = 0.1  # share of the actor's hidden units dropped in training


# --- Networks -----------------------------------------------------------------------------------
def glorot(width):
    return nn.Dense(width, kernel_init=nn.initializers.xavier_uniform())


def drop(x, rate, key):
    """x with a share `rate` of its numbers at 0, the others larger by as much; None: x itself."""
    if rate is None:
        return x
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0.0)


class NoiseNet(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, observation, action, time, keys=None, dropout=None):  # -> [..., A]
        keys = [None] * len(self.hidden) if keys is None else keys  # one per block
        frequency = self.param("frequency", nn.initializers.normal(0.2), (64,))
        angle = 2 * jnp.pi * time * jnp.broadcast_to(frequency, (*time.shape[:-1], 64))
        waves = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        context = nn.swish(glorot(256)(waves))
        context = glorot(256)(context)  # [..., 256] or, at one time, [256]
        context = jnp.broadcast_to(context, (*action.shape[:-1], 256))
        x = jnp.concatenate([action, observation, context], axis=-1)
        x = glorot(self.hidden[0])(x)
        for width, key in zip(self.hidden, keys, strict=True):
            y = nn.LayerNorm()(drop(x, dropout, key))
            y = nn.swish(nn.Dense(4 * width)(y))
            y = nn.Dense(width)(y)
            x = y + (x if x.shape == y.shape else nn.Dense(width)(x))
        head = nn.Dense(self.action_dim, kernel_init=nn.initializers.xavier_uniform(), name="head")
        return head(nn.swish(x))


class VelocityNet(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, observation, action, time, keys=None, dropout=None):  # -> [..., A]
        keys = [None] * len(self.hidden) if keys is None else keys  # one per layer
        time = jnp.broadcast_to(time, (*action.shape[:-1], 1))
        x = jnp.concatenate([observation, action, time], axis=-1)
        for width, key in zip(self.hidden, keys, strict=True):
            x = drop(nn.gelu(glorot(width)(x)), dropout, key)
        head = nn.Dense(self.action_dim, kernel_init=nn.initializers.xavier_uniform(), name="head")
        return head(x)


class GlorotCritic(nn.Module):
    hidden: tuple[int, ...]
    activation: Any
    norm_input: bool
    norm_hidden: bool

    @nn.compact
    def __call__(self, *inputs):  # [..., O] and for Q [..., A] -> [...]
        x = jnp.concatenate(inputs, axis=-1)
        x = nn.LayerNorm()(x) if self.norm_input else x
        for width in self.hidden:
            x = self.activation(glorot(width)(x))
            x = nn.LayerNorm()(x) if self.norm_hidden else x
        return glorot(1)(x).squeeze(-1)


# --- State --------------------------------------------------------------------------------------
class TrainState(train_state.TrainState):
    target_params: Any  # Polyak average of params

    @classmethod
    def create(cls, apply_fn, params, tx):
        # The targets are a copy: params and targets are donated, so they must not share buffers.
        target = jax.tree.map(jnp.copy, params)
        return super().create(apply_fn=apply_fn, params=params, target_params=target, tx=tx)


class State(NamedTuple):
    actor: TrainState  # models the behaviour; its targets act
    critic: TrainState  # every array has a leading [K] axis
    value_net: train_state.TrainState


def create_state(key, batch, cfg):
    """State of one seed before the first update. `batch` supplies shapes only."""
    key_actor, key_critic, key_value = jax.random.split(key, 3)
    flow = cfg.generator == "flow"
    actor = (VelocityNet if flow else NoiseNet)(cfg.actor_hidden, batch.action.shape[-1])
    sizes = cfg.hidden, nn.gelu if flow else nn.relu
    critic = GlorotCritic(*sizes, False, cfg.layer_norm == "hidden")
    value_net = GlorotCritic(*sizes, cfg.layer_norm == "input", cfg.layer_norm == "hidden")
    time = jnp.zeros_like(batch.action[..., :1])
    actor_params = actor.init(key_actor, batch.observation, batch.action, time)
    critic_params = jax.vmap(critic.init, (0, None, None))(
        jax.random.split(key_critic, cfg.num_critics), batch.observation, batch.action
    )
    value_params = value_net.init(key_value, batch.observation)
    critics = jax.vmap(critic.apply, (0, None, None))  # -> [K, B]
    rate, create = cfg.actor_learning_rate, train_state.TrainState.create
    rate = optax.cosine_decay_schedule(rate, cfg.num_updates) if cfg.cosine else rate
    adamw = optax.adamw(rate, weight_decay=cfg.weight_decay)
    adam = optax.adam(cfg.critic_learning_rate)
    return State(
        TrainState.create(actor.apply, actor_params, adamw),
        TrainState.create(critics, critic_params, adam),
        create(apply_fn=value_net.apply, params=value_params, tx=adam),
    )


# --- Losses -------------------------------------------------------------------------------------
def critic_loss(params, state, batch, cfg):
    """TD error to r + gamma V(s'), mean over B, summed over K. Eq. 6 of IQL."""
    next_value = state.value_net.apply_fn(state.value_net.params, batch.next_observation)  # [B]
    # Bootstrap through truncations, never through terminations.
    target = batch.reward + cfg.discount * (1.0 - batch.termination) * next_value
    q = state.critic.apply_fn(params, batch.observation, batch.action)  # [K, B]
    chex.assert_equal_shape([*q, target])
    loss = jnp.square(q - target[None]).mean(axis=1).sum()
    return loss, {"critic_loss": loss, "q": q.mean()}


def value_loss(params, state, batch, cfg):
    """|tau - 1(u < 0)| u^2 with u = min_k Q_k(s, a) - V(s), target critics. Eq. 5 of IQL."""
    q = state.critic.apply_fn(state.critic.target_params, batch.observation, batch.action)
    value = state.value_net.apply_fn(params, batch.observation)  # [B]
    error = q.min(axis=0) - value
    chex.assert_equal_shape([error, value, batch.reward])
    weight = jnp.where(error > 0, cfg.expectile, 1.0 - cfg.expectile)
    loss = (weight * jnp.square(error)).mean()
    return loss, {"value_loss": loss, "value": value.mean()}


def actor_loss(params, state, batch, key, cfg):
    """|eps_theta(x_t, s, t) - eps|^2 at x_t = sqrt(abar_t) a + sqrt(1 - abar_t) eps, any step t.

    With flow |v_theta(x_t, s, t) - (a - eps)|^2 at x_t = (1 - t) eps + t a, t from 0 to 1.
    """
    key_time, key_noise, *keys = jax.random.split(key, 2 + len(cfg.actor_hidden))
    noise = jax.random.normal(key_noise, batch.action.shape)
    if cfg.generator == "flow":
        time = jax.random.uniform(key_time, (len(noise), 1))
        x, target = (1.0 - time) * noise + time * batch.action, batch.action - noise
    else:
        time = jax.random.randint(key_time, (len(noise), 1), 0, cfg.generator_steps)
        kept = jnp.cumprod(vp_schedule(cfg))[time]  # abar, [B, 1]
        x, target = jnp.sqrt(kept) * batch.action + jnp.sqrt(1.0 - kept) * noise, noise
    output = state.actor.apply_fn(params, batch.observation, x, time, keys, cfg.dropout)
    error = jnp.square(output - target).sum(axis=-1)  # [B]
    chex.assert_equal_shape([error, batch.reward])
    return error.mean(), {"actor_loss": error.mean()}


def vp_schedule(cfg):
    """alpha_t = 1 - beta_t of the variance preserving process, from 0.1 to 10, [T]."""
    t = jnp.arange(1, cfg.generator_steps + 1) / cfg.generator_steps
    return jnp.exp(-(0.1 + (10.0 - 0.1) * (t - 0.5 / cfg.generator_steps)) / cfg.generator_steps)


# --- Update -------------------------------------------------------------------------------------
def update(state, step, key, data, cfg):
    """One step of each network in the order below, then of the targets, on one batch. One seed.

    Randomness is a function of (key, step) alone, so neither the length of a chunk nor a resumed
    run changes the result. `key` is folded with the step, never split.
    """
    key_batch, key_actor = jax.random.split(jax.random.fold_in(key, step))
    batch = sample_batch(data, key_batch, cfg)
    grads, value_metrics = jax.grad(value_loss, has_aux=True)(
        state.value_net.params, state, batch, cfg
    )
    state = state._replace(value_net=state.value_net.apply_gradients(grads=grads))
    grads, actor_metrics = jax.grad(actor_loss, has_aux=True)(
        state.actor.params, state, batch, key_actor, cfg
    )
    state = state._replace(actor=state.actor.apply_gradients(grads=grads))
    grads, critic_metrics = jax.grad(critic_loss, has_aux=True)(
        state.critic.params, state, batch, cfg
    )
    state = state._replace(critic=state.critic.apply_gradients(grads=grads))
    state = state._replace(critic=update_target(state.critic, cfg))
    actor, rate = state.actor, cfg.actor_target_rate
    target_params = optax.incremental_update(actor.params, actor.target_params, rate)
    state = state._replace(actor=actor.replace(target_params=target_params))
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
def policy(apply_fn, params, observation, key, critic, cfg):
    """The best by min_k Q_k of N sampled actions, [..., O] -> [..., A], random by `key`."""
    actor_params, critic_params = params
    observation = jnp.broadcast_to(observation, (cfg.num_samples, *observation.shape))
    action = generate(apply_fn, actor_params, observation, key, cfg)  # [N, ..., A]
    q = critic(critic_params, observation, action).min(axis=0)  # [N, ...]
    best = q.argmax(axis=0)[None, ..., None]
    return jnp.take_along_axis(action, best, axis=0)[0]


def generate(apply_fn, params, observation, key, cfg):
    """Actions of the behaviour model, [..., O] -> [..., A], in T steps. `key` is split."""
    keys, steps = jax.random.split(key, cfg.generator_steps), cfg.generator_steps
    action_dim = params["params"]["head"]["bias"].shape[0]
    x = jax.random.normal(keys[0], (*observation.shape[:-1], action_dim))
    if cfg.generator == "flow":
        for i in range(steps):
            x = x + apply_fn(params, observation, x, jnp.full(1, i / steps)) / steps
        return x.clip(-1.0, 1.0)
    alpha = vp_schedule(cfg)
    kept = jnp.cumprod(alpha)
    for t in reversed(range(steps)):
        noise = apply_fn(params, observation, x, jnp.full(1, float(t)))
        x = (x - (1.0 - alpha[t]) / jnp.sqrt(1.0 - kept[t]) * noise) / jnp.sqrt(alpha[t])
        if t > 0:
            x = x + jnp.sqrt(1.0 - alpha[t]) * jax.random.normal(keys[t], x.shape)
        x = x.clip(-1.0, 1.0)
    return x


def policy_params(state):
    return state.actor.target_params, state.critic.target_params


# --- Training -----------------------------------------------------------------------------------
def train(cfg, options):
    """Train every seed of `cfg` and return its final normalised scores, [S]."""
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps)
    action = dataset.transitions.action.clip(-1 + 1e-5, 1 - 1e-5)
    reward = dataset.transitions.reward + cfg.reward_shift
    if cfg.return_scale is not None:
        reward = reward * (cfg.return_scale / datasets.return_span(dataset))
    data = experiment.place(dataset.transitions._replace(action=action, reward=reward), options)
    example = jax.tree.map(lambda x: x[:1], data)
    init_keys, train_keys, policy_keys = experiment.streams(cfg.seeds, 3)  # [S] each
    create = partial(create_state, batch=example, cfg=cfg)
    state = jax.vmap(create)(init_keys)
    # Compiled once for all seeds. `update` shows which rows a step reads, for --data host.
    train_seeds = experiment.over_seeds(partial(train_chunk, cfg=cfg), update=update)
    act = partial(policy, state.actor.apply_fn, critic=state.critic.apply_fn, cfg=cfg)

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

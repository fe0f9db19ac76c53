# SPDX-License-Identifier: Apache-2.0
"""IDQL (Hansen-Estruch et al., 2023): IQL's critics choose among samples of a diffusion model.

Paper       https://arxiv.org/abs/2304.10573, IFQL (generator=flow) https://arxiv.org/abs/2502.02538
Reference   https://github.com/philippe-eecs/IDQL, https://github.com/seohongpark/fql
Run         python algorithms/idql.py --config configs/idql/antmaze.yaml
Parent      iql.py (405 lines)
Results     docs/results.md
Deviations  As in the authors' code since 7582571, each update is one step of every network on one
            batch. Only the best sample acts (the paper also draws one by its weight). All rows
            train, not 95 %, also those at a truncation whose next observation is known. IFQL's code
            has one Adam, computes losses and targets from the state before, chooses by the online
            critics and averages the actor's loss over actions; the configs turn off the rest.

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
    dataset: str = "local/pointmaze/umaze-v0"  # data set id or path, see docs/data.md
    seeds: tuple[int, ...] = (0,)  # trained in parallel
    num_updates: int = 3_000_000  # gradient steps of every network
    log_every: int = 1_000  # updates per compiled chunk, the unit of logging and saving
    eval_every: int = 250_000  # updates between evaluations
    eval_episodes: int = 50  # episodes per seed and evaluation
    batch_size: int = 512  # transitions per update
    actor_learning_rate: float = 3e-4  # AdamW, see cosine
    critic_learning_rate: float = 3e-4  # Adam, for Q and V
    discount: float = 0.99  # gamma, per environment step
    target_rate: float = 0.005  # Polyak rate of the target critics
    hidden: tuple[int, ...] = (256, 256)  # widths of Q and V
    num_critics: int = 2  # K, V and the policy use their minimum
    layer_norm: Literal["none", "input", "hidden"] = "input"  # input of V | hidden layers of Q, V
    reward_shift: float = 0.0  # added to data set rewards (AntMaze: -1)
    return_scale: float | None = None  # rescales rewards to this range of returns (MuJoCo: 1000)
    # IDQL
    expectile: float = 0.7  # tau, weight of (Q - V)^2 where Q > V
    generator: Literal["ddpm", "flow"] = "ddpm"  # model of actions; flow: IFQL, GELU in Q and V
    generator_steps: int = 5  # T, sampling steps from noise to action
    num_samples: int = 64  # N, sampled actions from which the policy takes the best
    actor_hidden: tuple[int, ...] = (256, 256, 256)  # widths of residual blocks (flow: layers)
    actor_target_rate: float = 0.001  # Polyak rate of the actor's parameters that act
    weight_decay: float = 1e-4  # AdamW's weight decay of the actor
    cosine: bool = True  # cosine decay of the actor's learning rate to 0 over num_updates
    dropout: float | None = 0.1  # dropout rate of the actor's hidden layers in training


# --- Networks -----------------------------------------------------------------------------------
def glorot_dense(width):
    return nn.Dense(width, kernel_init=nn.initializers.xavier_uniform())


def drop(x, rate, key):
    """Dropout: a share `rate` of x is 0, the rest is scaled by 1 / (1 - rate). None: no dropout."""
    if rate is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0)


class EpsilonNet(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int
    num_frequencies: int = 64  # learned, each gives a cosine and a sine of the time
    time_width: int = 256  # of the embedding of the time

    @nn.compact
    def __call__(self, observation, action, time, keys=None, dropout=None):  # -> [..., A]
        """The noise in `action`. `time` is [..., 1] or [1], `keys` has one key per block."""
        if keys is None:
            keys = [None] * len(self.hidden)
        time_embedding = self.embed(time)
        time_embedding = jnp.broadcast_to(time_embedding, (*action.shape[:-1], self.time_width))
        x = jnp.concatenate([action, observation, time_embedding], axis=-1)
        x = glorot_dense(self.hidden[0])(x)
        for width, key in zip(self.hidden, keys, strict=True):
            y = nn.LayerNorm()(drop(x, dropout, key))
            y = nn.swish(nn.Dense(4 * width)(y))
            y = nn.Dense(width)(y)
            if x.shape != y.shape:
                x = nn.Dense(width)(x)
            x = y + x
        glorot = nn.initializers.xavier_uniform()
        return nn.Dense(self.action_dim, kernel_init=glorot, name="head")(nn.swish(x))

    def embed(self, time):  # [..., 1] -> [..., time_width]
        init = nn.initializers.normal(0.2)
        frequency = self.param("frequency", init, (self.num_frequencies,))
        frequency = jnp.broadcast_to(frequency, (*time.shape[:-1], self.num_frequencies))
        angle = 2 * jnp.pi * time * frequency
        waves = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        x = nn.swish(glorot_dense(self.time_width)(waves))
        return glorot_dense(self.time_width)(x)


class VelocityNet(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, observation, action, time, keys=None, dropout=None):  # -> [..., A]
        """The velocity at `action`. `time` is [..., 1] or [1], `keys` has one key per layer."""
        if keys is None:
            keys = [None] * len(self.hidden)
        time = jnp.broadcast_to(time, (*action.shape[:-1], 1))
        x = jnp.concatenate([observation, action, time], axis=-1)
        for width, key in zip(self.hidden, keys, strict=True):
            x = nn.gelu(glorot_dense(width)(x))
            x = drop(x, dropout, key)
        glorot = nn.initializers.xavier_uniform()
        return nn.Dense(self.action_dim, kernel_init=glorot, name="head")(x)


class GlorotCritic(nn.Module):
    hidden: tuple[int, ...]
    activation: Any
    norm_input: bool
    norm_hidden: bool

    @nn.compact
    def __call__(self, *inputs):  # Q: [..., O], [..., A] -> [...]; V: [..., O] -> [...]
        x = jnp.concatenate(inputs, axis=-1)
        if self.norm_input:
            x = nn.LayerNorm()(x)
        for width in self.hidden:
            x = self.activation(glorot_dense(width)(x))
            if self.norm_hidden:
                x = nn.LayerNorm()(x)
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
    actor: TrainState  # model of the behaviour policy; its target_params act
    critic: TrainState  # every array has a leading [K] axis
    value_net: train_state.TrainState  # Flax's own class: no target_params


def create_networks(action_dim, cfg):
    """The actor, one critic and the value network, without parameters."""
    if cfg.generator == "flow":
        actor = VelocityNet(cfg.actor_hidden, action_dim)
        activation = nn.gelu
    else:
        actor = EpsilonNet(cfg.actor_hidden, action_dim)
        activation = nn.relu
    norm_input = cfg.layer_norm == "input"  # of V alone
    norm_hidden = cfg.layer_norm == "hidden"
    critic = GlorotCritic(cfg.hidden, activation, norm_input=False, norm_hidden=norm_hidden)
    value_net = GlorotCritic(cfg.hidden, activation, norm_input=norm_input, norm_hidden=norm_hidden)
    return actor, critic, value_net


def create_state(key, batch, cfg):
    """State of one seed before the first update. `batch` supplies shapes only."""
    key_actor, key_critic, key_value = jax.random.split(key, 3)
    actor, critic, value_net = create_networks(batch.action.shape[-1], cfg)
    init_critics = jax.vmap(critic.init, (0, None, None))
    apply_critics = jax.vmap(critic.apply, (0, None, None))  # -> [K, B]

    time = jnp.zeros_like(batch.action[..., :1])
    actor_params = actor.init(key_actor, batch.observation, batch.action, time)
    critic_keys = jax.random.split(key_critic, cfg.num_critics)
    critic_params = init_critics(critic_keys, batch.observation, batch.action)
    value_params = value_net.init(key_value, batch.observation)

    actor_learning_rate = cfg.actor_learning_rate
    if cfg.cosine:
        actor_learning_rate = optax.cosine_decay_schedule(actor_learning_rate, cfg.num_updates)
    actor_adamw = optax.adamw(actor_learning_rate, weight_decay=cfg.weight_decay)
    critic_adam = optax.adam(cfg.critic_learning_rate)
    value_adam = optax.adam(cfg.critic_learning_rate)
    return State(
        actor=TrainState.create(actor.apply, actor_params, actor_adamw),
        critic=TrainState.create(apply_critics, critic_params, critic_adam),
        value_net=train_state.TrainState.create(
            apply_fn=value_net.apply, params=value_params, tx=value_adam
        ),
    )


# --- Losses -------------------------------------------------------------------------------------
def critic_loss(params, state, batch, cfg):
    """Squared TD error to r + gamma V(s'), mean over B, summed over K. Eq. 6 of IQL."""
    next_value = state.value_net.apply_fn(state.value_net.params, batch.next_observation)  # [B]
    # Bootstrap through truncations, never through terminations.
    target = batch.reward + cfg.discount * (1.0 - batch.termination) * next_value  # [B]

    q = state.critic.apply_fn(params, batch.observation, batch.action)  # [K, B]
    chex.assert_equal_shape([*q, target])
    loss = jnp.square(q - target[None]).mean(axis=1).sum()
    return loss, {"critic_loss": loss, "q": q.mean()}


def value_loss(params, state, batch, cfg):
    """|tau - 1(A < 0)| A^2, mean over B, with A = min_k Q_k(s, a) - V(s), target critics.

    Eq. 5 of IQL.
    """
    q = state.critic.apply_fn(state.critic.target_params, batch.observation, batch.action)
    q = q.min(axis=0)  # [K, B] -> [B]
    value = state.value_net.apply_fn(params, batch.observation)  # [B]
    advantage = q - value
    chex.assert_equal_shape([advantage, value, batch.reward])
    weight = jnp.where(advantage > 0, cfg.expectile, 1.0 - cfg.expectile)
    loss = (weight * jnp.square(advantage)).mean()
    return loss, {"value_loss": loss, "value": value.mean()}


def actor_loss(params, state, batch, key, cfg):
    """Denoising or flow matching loss of the behaviour model, summed over A, mean over B.

    ddpm: |eps_theta(x_t, s, t) - eps|^2, x_t = sqrt(alpha_bar_t) a + sqrt(1 - alpha_bar_t) eps.
    flow: |v_theta(x_t, s, t) - (a - eps)|^2, x_t = (1 - t) eps + t a.
    """
    key_time, key_noise, *dropout_keys = jax.random.split(key, 2 + len(cfg.actor_hidden))
    noise = jax.random.normal(key_noise, batch.action.shape)
    if cfg.generator == "flow":
        time = jax.random.uniform(key_time, (len(noise), 1))
        noisy_action = (1.0 - time) * noise + time * batch.action
        target = batch.action - noise  # the velocity
    else:
        time = jax.random.randint(key_time, (len(noise), 1), 0, cfg.generator_steps)
        alpha_bar = jnp.cumprod(vp_schedule(cfg))[time]  # [B, 1]
        noisy_action = jnp.sqrt(alpha_bar) * batch.action + jnp.sqrt(1.0 - alpha_bar) * noise
        target = noise

    output = state.actor.apply_fn(
        params, batch.observation, noisy_action, time, dropout_keys, cfg.dropout
    )
    squared_error = jnp.square(output - target).sum(axis=-1)  # [B, A] -> [B]
    chex.assert_equal_shape([squared_error, batch.reward])
    loss = squared_error.mean()
    return loss, {"actor_loss": loss}


def vp_schedule(cfg, beta_min=0.1, beta_max=10.0):
    """alpha_t = 1 - beta_t of the variance preserving process for t = 1 to T, [T].

    The process has continuous time from 0 to 1 and a rate of noise from beta_min to beta_max;
    alpha_t is what one of T equal steps keeps of the signal's variance.
    """
    steps = cfg.generator_steps
    end_of_step = jnp.arange(1, steps + 1) / steps
    middle_of_step = end_of_step - 0.5 / steps
    rate = beta_min + (beta_max - beta_min) * middle_of_step
    return jnp.exp(-rate / steps)


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
    state = state._replace(actor=update_acting_params(state.actor, cfg))
    return state, critic_metrics | value_metrics | actor_metrics


def sample_batch(data, key, cfg):
    """`batch_size` rows of the data, drawn with replacement."""
    index = jax.random.randint(key, (cfg.batch_size,), 0, len(data.reward))
    return jax.tree.map(lambda column: column[index], data)


def update_target(net, cfg):
    target_params = optax.incremental_update(net.params, net.target_params, cfg.target_rate)
    return net.replace(target_params=target_params)


def update_acting_params(actor, cfg):
    """`update_target` with the rate of the actor."""
    target_params = optax.incremental_update(
        actor.params, actor.target_params, cfg.actor_target_rate
    )
    return actor.replace(target_params=target_params)


def train_chunk(state, key, start, data, cfg):
    """`log_every` updates of one seed, compiled as one program. Metrics are chunk means."""
    steps = start + jnp.arange(cfg.log_every)
    state, metrics = jax.lax.scan(partial(update, key=key, data=data, cfg=cfg), state, steps)
    return state, jax.tree.map(jnp.mean, metrics)


# --- Policy -------------------------------------------------------------------------------------
def policy(apply_fn, params, observation, key, apply_critics, cfg):
    """The sampled action with the highest min_k Q_k of N, [..., O] -> [..., A], random by `key`."""
    actor_params, critic_params = params
    observation = jnp.broadcast_to(observation, (cfg.num_samples, *observation.shape))
    action = generate(apply_fn, actor_params, observation, key, cfg)  # [N, ..., A]
    q = apply_critics(critic_params, observation, action)
    q = q.min(axis=0)  # [K, N, ...] -> [N, ...]
    best = q.argmax(axis=0)[None, ..., None]
    return jnp.take_along_axis(action, best, axis=0)[0]


def generate(apply_fn, params, observation, key, cfg):
    """Actions of the behaviour model, [..., O] -> [..., A], in T steps. `key` is split."""
    keys = jax.random.split(key, cfg.generator_steps)
    action_dim = params["params"]["head"]["bias"].shape[0]
    noise = jax.random.normal(keys[0], (*observation.shape[:-1], action_dim))
    if cfg.generator == "flow":
        return follow_velocity(apply_fn, params, observation, noise, cfg)
    return denoise(apply_fn, params, observation, noise, keys, cfg)


def follow_velocity(apply_fn, params, observation, noise, cfg):
    """T Euler steps along the velocity, from noise at time 0 to an action at time 1."""
    x = noise
    for i in range(cfg.generator_steps):
        time = jnp.full(1, i / cfg.generator_steps)
        velocity = apply_fn(params, observation, x, time)
        x = x + velocity / cfg.generator_steps
    return x.clip(-1.0, 1.0)


def denoise(apply_fn, params, observation, noise, keys, cfg):
    """DDPM sampling: T denoising steps, each but the last with new noise, clipped to [-1, 1]."""
    alpha = vp_schedule(cfg)
    alpha_bar = jnp.cumprod(alpha)
    x = noise
    for t in reversed(range(cfg.generator_steps)):
        epsilon = apply_fn(params, observation, x, jnp.full(1, float(t)))
        x = x - (1.0 - alpha[t]) / jnp.sqrt(1.0 - alpha_bar[t]) * epsilon
        x = x / jnp.sqrt(alpha[t])
        if t > 0:
            x = x + jnp.sqrt(1.0 - alpha[t]) * jax.random.normal(keys[t], x.shape)
        x = x.clip(-1.0, 1.0)
    return x


def policy_params(state):
    return state.actor.target_params, state.critic.target_params


def policy_fn(state, cfg):
    """`policy` with the networks filled in: (params, observation, key) -> action."""
    return partial(policy, state.actor.apply_fn, apply_critics=state.critic.apply_fn, cfg=cfg)


# --- Training -----------------------------------------------------------------------------------
def train(cfg, options):
    """Train every seed of `cfg` and return its final normalised scores, [S]."""
    experiment.check(cfg, options)
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps)
    action = dataset.transitions.action.clip(-1 + 1e-5, 1 - 1e-5)
    reward = dataset.transitions.reward + cfg.reward_shift
    if cfg.return_scale is not None:
        reward = reward * (cfg.return_scale / datasets.return_span(dataset))
    data = experiment.place(dataset.transitions._replace(action=action, reward=reward), options)
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

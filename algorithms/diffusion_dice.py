# SPDX-License-Identifier: Apache-2.0
"""Diffusion-DICE (Mao et al., 2024): a DICE dual's ratio guides a diffusion model of the data.

Paper       https://arxiv.org/abs/2407.20109
Reference   https://github.com/maoliyuan/diffusion-DICE-Pytorch
Run         python algorithms/diffusion_dice.py --config configs/diffusion_dice/mujoco.yaml
Parent      none
Results     docs/results.md
Deviations  The candidates are not clipped before the choice, the chosen action is (the code leaves
            that to the env). The ensemble has PyTorch's default initialisation; in the code a layer
            has the bound of its output's width. Rows at a truncation whose next observation is
            known train. The paper's alpha and number of candidates for each data set are not in its
            code, whose defaults are these; its optional cosine schedule is not here.

Shapes: S seeds, K critics, N samples, M noisy copies, B batch, E episodes, O observation, A action.
        All float32.
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

from common import datasets, evaluation, experiment, fail


# --- Config -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    dataset: str = "local/pointmaze/umaze-v0"  # data set id or path, see docs/data.md
    seeds: tuple[int, ...] = (0,)  # trained in parallel
    num_updates: int = 1_600_000  # gradient steps: first the actor's, then the other networks'
    log_every: int = 1_000  # updates per compiled chunk, the unit of logging and saving
    eval_every: int = 40_000  # updates between evaluations
    eval_episodes: int = 10  # episodes per seed and evaluation
    batch_size: int = 512  # transitions per update of the second phase
    critic_learning_rate: float = 3e-4  # AdamW, for Q, V and the critics that choose
    discount: float = 0.99  # gamma, per environment step
    target_rate: float = 0.005  # Polyak rate of the target critics
    hidden: tuple[int, ...] = (256, 256)  # widths of Q, V and the critics that choose
    num_critics: int = 2  # K, V and the guidance use their minimum
    reward_shift: float = 0.0  # added to data set rewards (AntMaze: -1)
    return_scale: float | None = None  # rescales rewards to this range of returns (MuJoCo: 1000)
    # Diffusion-DICE
    alpha: float = 0.5  # weight of the divergence from the data's policy, divides Q - V
    weight_decay: float = 1e-4  # AdamW's, of all networks but the actor
    clone_updates: int = 600_000  # first updates: they train the actor alone
    clone_batch_size: int = 4096  # transitions per update of the first phase
    clone_learning_rate: float = 1e-4  # Adam
    actor_hidden: tuple[int, ...] = (512, 256, 128)  # widths of the actor's residual blocks
    guidance_learning_rate: float = 3e-4  # AdamW
    guidance_hidden: tuple[int, ...] = (256, 256, 256, 256)  # widths of the guidance network
    noisy_copies: int = 16  # M, of each action of a batch, to train the guidance
    guidance_scale: float = 4.0  # multiplies the guidance when actions are sampled
    generator_steps: int = 15  # evaluations of the actor and its guidance per sampled action
    num_samples: int = 1  # N, sampled actions from which the policy takes one
    selection: Literal["max", "softmax"] = "max"  # of the N values: the best, or in proportion
    num_choosers: int | None = 10  # critics whose mean chooses; None: the first target critic


# --- Networks -----------------------------------------------------------------------------------
def fan_in_uniform():
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # U(±1 / sqrt(fan in))


def uniform(bound):
    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def linear(fan_in, width):  # PyTorch's default initialisation
    return nn.Dense(width, kernel_init=fan_in_uniform(), bias_init=uniform(fan_in**-0.5))


class NormThenReluValue(nn.Module):
    hidden: tuple[int, ...]
    layer_norm: bool

    @nn.compact
    def __call__(self, observation):  # [..., O] -> [...]
        x = observation
        for width in self.hidden:
            x = linear(x.shape[-1], width)(x)
            if self.layer_norm:
                x = nn.LayerNorm(epsilon=1e-5)(x)  # PyTorch's epsilon
            x = nn.relu(x)
        return linear(x.shape[-1], 1)(x).squeeze(-1)


class Critic(nn.Module):
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, observation, action):  # [..., O], [..., A] -> [...]
        x = jnp.concatenate([observation, action], axis=-1)
        for width in self.hidden:
            x = nn.relu(linear(x.shape[-1], width)(x))
        return linear(x.shape[-1], 1)(x).squeeze(-1)


def fourier_features(frequency, time):
    """Sines, then cosines of 2 pi f t, [..., 1] -> [..., 2F]. The frequencies are not trained."""
    frequency = jnp.broadcast_to(frequency, (*time.shape[:-1], len(frequency)))
    angle = 2 * jnp.pi * time * jax.lax.stop_gradient(frequency)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class ResidualBlock(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, embedding):  # [..., X], [..., E] -> [..., width]
        y = nn.swish(linear(x.shape[-1], self.width)(x))
        y = y + linear(embedding.shape[-1], self.width)(nn.swish(embedding))
        y = nn.swish(linear(self.width, self.width)(y))
        if x.shape[-1] != self.width:
            x = linear(x.shape[-1], self.width)(x)
        return y + x


class ScoreNet(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int
    num_frequencies: int = 16  # each gives a sine and a cosine of the time

    @nn.compact
    def __call__(self, observation, action, time):  # -> [..., A]
        """The score at a noisy action times the std of its noise. `time` is [..., 1], in (0, 1]."""
        embedding = self.embed(observation, time)
        down, x = [], action
        for width in self.hidden:
            x = ResidualBlock(width)(x, embedding)
            down.append(x)
        x = ResidualBlock(self.hidden[-1])(x, embedding)
        widths_up = self.hidden[:-1][::-1]
        skips = down[1:][::-1]  # the deepest first
        for width, skipped in zip(widths_up, skips, strict=True):
            x = ResidualBlock(width)(jnp.concatenate([skipped, x], axis=-1), embedding)
        x = jnp.concatenate([down[0], x], axis=-1)
        return nn.Dense(
            self.action_dim,
            kernel_init=fan_in_uniform(),
            bias_init=uniform(x.shape[-1] ** -0.5),
            name="head",
        )(x)

    def embed(self, observation, time):  # -> [..., last of hidden]
        init = nn.initializers.normal(30.0)
        frequency = self.param("frequency", init, (self.num_frequencies,))
        waves = fourier_features(frequency, time)
        time_embedding = linear(waves.shape[-1], 32)(waves)
        x = nn.swish(linear(observation.shape[-1], 32)(observation))
        x = jnp.concatenate([x, time_embedding], axis=-1)
        x = nn.swish(linear(x.shape[-1], self.hidden[-1])(x))
        return linear(x.shape[-1], self.hidden[-1])(x)


class GuidanceNet(nn.Module):
    hidden: tuple[int, ...]
    num_frequencies: int = 16  # each gives a sine and a cosine of the time

    @nn.compact
    def __call__(self, observation, action, time):  # -> [...]
        """W(s, a_t, t), near log E[w(s, a) | a_t]. `time` is [..., 1], in (0, 1]."""
        init = nn.initializers.normal(30.0)
        frequency = self.param("frequency", init, (self.num_frequencies,))
        waves = fourier_features(frequency, time)
        time_embedding = linear(waves.shape[-1], 32)(waves)
        x = jnp.concatenate([action, time_embedding, observation], axis=-1)
        for width in self.hidden:
            x = nn.swish(linear(x.shape[-1], width)(x))
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
    actor: train_state.TrainState  # score of the data's noisy actions: Flax's own class
    critic: TrainState  # every array has a leading [K] axis
    value_net: train_state.TrainState
    guidance: train_state.TrainState
    choosers: train_state.TrainState | None  # critics that train beside the others, None: none


def create_state(key, batch, cfg):
    """State of one seed before the first update. `batch` supplies shapes only."""
    keys = jax.random.split(key, 5)
    actor = ScoreNet(cfg.actor_hidden, batch.action.shape[-1])
    critic = Critic(cfg.hidden)
    value_net = NormThenReluValue(cfg.hidden, layer_norm=True)
    guidance = GuidanceNet(cfg.guidance_hidden)
    init_critics = jax.vmap(critic.init, (0, None, None))
    apply_critics = jax.vmap(critic.apply, (0, None, None))  # -> [K, B]

    observation, action = batch.observation, batch.action
    time = action[..., :1]  # [B, 1]
    actor_params = actor.init(keys[0], observation, action, time)
    critic_keys = jax.random.split(keys[1], cfg.num_critics)
    critic_params = init_critics(critic_keys, observation, action)
    value_params = value_net.init(keys[2], observation)
    guidance_params = guidance.init(keys[3], observation, action, time)

    clone_adam = optax.adam(cfg.clone_learning_rate)
    critic_adamw = optax.adamw(cfg.critic_learning_rate, weight_decay=cfg.weight_decay)
    guidance_adamw = optax.adamw(
        cfg.guidance_learning_rate, weight_decay=cfg.weight_decay, mask=decays
    )
    choosers = None
    if cfg.num_choosers is not None:
        chooser_keys = jax.random.split(keys[4], cfg.num_choosers)
        choosers = train_state.TrainState.create(
            apply_fn=apply_critics,
            params=init_critics(chooser_keys, observation, action),
            tx=critic_adamw,
        )
    return State(
        actor=train_state.TrainState.create(
            apply_fn=actor.apply, params=actor_params, tx=clone_adam
        ),
        critic=TrainState.create(apply_critics, critic_params, critic_adamw),
        value_net=train_state.TrainState.create(
            apply_fn=value_net.apply, params=value_params, tx=critic_adamw
        ),
        guidance=train_state.TrainState.create(
            apply_fn=guidance.apply, params=guidance_params, tx=guidance_adamw
        ),
        choosers=choosers,
    )


def decays(params):
    """Which parameters decay: all but the fixed frequencies."""
    return {"params": {name: name != "frequency" for name in params["params"]}}


# --- Losses -------------------------------------------------------------------------------------
def critic_loss(params, state, batch, cfg):
    """Squared TD error to r + gamma V(s'), mean over B, summed over K."""
    target = td_target(state, batch, cfg)  # [B]
    q = state.critic.apply_fn(params, batch.observation, batch.action)  # [K, B]
    chex.assert_equal_shape([*q, target])
    loss = jnp.square(q - target[None]).mean(axis=1).sum()
    return loss, {"critic_loss": loss, "q": q.mean()}


def value_loss(params, state, batch, cfg):
    """f*(y) + V(s) / alpha, mean over B, with y = (min_k Q_k(s, a) - V(s)) / alpha.

    The dual of the regularised policy, in a form that needs no action but the data's. The gradient
    of f* is w, so the mean of w over the data's actions is 1 where V is at its minimum.
    """
    y, value = scaled_advantage(params, state, batch, cfg)  # [B] each
    dual_term = conjugate(y)
    linear_term = value / cfg.alpha
    chex.assert_equal_shape([dual_term, linear_term, batch.reward])
    loss = (dual_term + linear_term).mean()
    return loss, {"value_loss": loss, "value": value.mean(), "weight": weight_of(y).mean()}


def guidance_loss(params, state, batch, key, cfg):
    """w(s, a) e^-W + W, mean over M and B, with W = W(s, a_t, t): its minimum is log E[w | a_t].

    Every action of the batch has M noisy copies at one time t. The loss is divided by the largest
    e^-W of the batch where that is above 1 / e, and e^-W goes up to e^80.
    """
    y, _ = scaled_advantage(state.value_net.params, state, batch, cfg)  # [B]
    weight = jnp.minimum(weight_of(y), 100.0)

    key_time, key_noise = jax.random.split(key)
    time = jax.random.uniform(key_time, (len(weight), 1), minval=1e-3)  # [B, 1]
    copies = (cfg.noisy_copies, *batch.action.shape)  # [M, B, A]
    noise = jax.random.normal(key_noise, copies)
    noisy_action = diffuse(jnp.broadcast_to(batch.action, copies), noise, time[None])
    observation = jnp.broadcast_to(batch.observation, (*copies[:2], batch.observation.shape[-1]))
    time = jnp.broadcast_to(time, (*copies[:2], 1))
    log_weight = state.guidance.apply_fn(params, observation, noisy_action, time)  # [M, B]

    # A bound on the number alone: the gradient passes through it.
    excess = jnp.maximum(-log_weight - 80.0, 0.0)
    exponent = -log_weight - jax.lax.stop_gradient(excess)
    largest = jax.lax.stop_gradient(jnp.maximum(exponent.max(), -1.0))
    weight = jnp.broadcast_to(weight, log_weight.shape)
    exponential_term = weight * jnp.exp(exponent - largest)
    linear_term = jnp.exp(-largest) * log_weight
    loss = (exponential_term + linear_term).mean()
    return loss, {"guidance_loss": loss, "log_weight": log_weight.mean()}


def chooser_loss(params, state, batch, cfg):
    """The TD error of `critic_loss` for the critics that choose, mean over them and B."""
    target = td_target(state, batch, cfg)  # [B]
    q = state.choosers.apply_fn(params, batch.observation, batch.action)
    chex.assert_equal_shape([*q, target])
    loss = jnp.square(q - target[None]).mean()
    return loss, {"chooser_loss": loss}


def clone_loss(params, state, batch, key):
    """|std score(s, a_t, t) + eps|^2, summed over A, mean over B, a_t = alpha_t a + std_t eps."""
    key_time, key_noise = jax.random.split(key)
    time = jax.random.uniform(key_time, (len(batch.action), 1), minval=1e-3)  # [B, 1]
    noise = jax.random.normal(key_noise, batch.action.shape)
    noisy_action = diffuse(batch.action, noise, time)
    scaled_score = state.actor.apply_fn(params, batch.observation, noisy_action, time)  # [B, A]
    chex.assert_equal_shape([scaled_score, noise])
    loss = jnp.square(scaled_score + noise).sum(axis=-1).mean()
    return loss, {"clone_loss": loss}


def td_target(state, batch, cfg):
    """r + gamma V(s'), [B]."""
    next_value = state.value_net.apply_fn(state.value_net.params, batch.next_observation)  # [B]
    # Bootstrap through truncations, never through terminations.
    return batch.reward + cfg.discount * (1.0 - batch.termination) * next_value


def scaled_advantage(params, state, batch, cfg):
    """y = (min_k Q_k(s, a) - V(s)) / alpha, target critics, and V(s), [B] each."""
    q = state.critic.apply_fn(state.critic.target_params, batch.observation, batch.action)
    q = q.min(axis=0)  # [K, B] -> [B]
    value = state.value_net.apply_fn(params, batch.observation)  # [B]
    chex.assert_equal_shape([q, value, batch.reward])
    return (q - value) / cfg.alpha, value


def conjugate(y):
    """f*(y): y^2 / 4 + y from 0 on, e^y - 1 below. f(w) = (w - 1)^2 from 1 on, w log w - w + 1."""
    return jnp.where(y >= 0, jnp.square(y) / 4 + y, jnp.exp(jnp.minimum(y, 0.0)) - 1.0)


def weight_of(y):
    """w(s, a), the derivative of f*: y / 2 + 1 from 0 on, e^y below."""
    return jnp.where(y >= 0, y / 2 + 1.0, jnp.exp(jnp.minimum(y, 0.0)))


def diffuse(action, noise, time):
    """a_t = alpha_t a + std_t eps of the variance preserving process."""
    signal, std = noise_schedule(time)
    return signal * action + std * noise


def noise_schedule(time):
    """alpha_t and std_t of t from 0 to 1: what is left of the signal, and the noise."""
    signal = jnp.exp(log_signal(time))
    return signal, jnp.sqrt(-jnp.expm1(2.0 * log_signal(time)))


def log_signal(time, beta_min=0.1, beta_max=20.0):
    """log alpha_t for a rate of noise that rises linearly from beta_min to beta_max."""
    return -0.25 * time**2 * (beta_max - beta_min) - 0.5 * time * beta_min


# --- Update -------------------------------------------------------------------------------------
def clone_update(state, step, key, data, cfg):
    """A gradient step of the actor, which models the data's actions. One seed.

    The first phase. Its key of a step is fold_in(key, step), as in `update`.
    """
    key_batch, key_clone = jax.random.split(jax.random.fold_in(key, step))
    batch = sample_batch(data, key_batch, replace(cfg, batch_size=cfg.clone_batch_size))
    grads, metrics = jax.grad(clone_loss, has_aux=True)(state.actor.params, state, batch, key_clone)
    state = state._replace(actor=state.actor.apply_gradients(grads=grads))
    return state, metrics


def update(state, step, key, data, cfg):
    """A gradient step of V, Q, the choosers and, after the targets', the guidance. One seed.

    The second phase: the actor stays as it is. All of them use the same batch. Randomness is a
    function of (key, step) alone, so neither the length of a chunk nor a resumed run changes the
    result. The key of a step is fold_in(key, step).
    """
    key_batch, key_guidance = jax.random.split(jax.random.fold_in(key, step))
    batch = sample_batch(data, key_batch, cfg)

    value_grads, value_metrics = jax.grad(value_loss, has_aux=True)(
        state.value_net.params, state, batch, cfg
    )
    state = state._replace(value_net=state.value_net.apply_gradients(grads=value_grads))

    critic_grads, critic_metrics = jax.grad(critic_loss, has_aux=True)(
        state.critic.params, state, batch, cfg
    )
    state = state._replace(critic=state.critic.apply_gradients(grads=critic_grads))

    chooser_metrics = {}
    if cfg.num_choosers is not None:
        chooser_grads, chooser_metrics = jax.grad(chooser_loss, has_aux=True)(
            state.choosers.params, state, batch, cfg
        )
        state = state._replace(choosers=state.choosers.apply_gradients(grads=chooser_grads))
    state = state._replace(critic=update_target(state.critic, cfg))

    guidance_grads, guidance_metrics = jax.grad(guidance_loss, has_aux=True)(
        state.guidance.params, state, batch, key_guidance, cfg
    )
    state = state._replace(guidance=state.guidance.apply_gradients(grads=guidance_grads))
    return state, critic_metrics | value_metrics | chooser_metrics | guidance_metrics


def sample_batch(data, key, cfg):
    """`batch_size` rows of the data, drawn with replacement."""
    index = jax.random.randint(key, (cfg.batch_size,), 0, len(data.reward))
    return jax.tree.map(lambda column: column[index], data)


def update_target(net, cfg):
    target_params = optax.incremental_update(net.params, net.target_params, cfg.target_rate)
    return net.replace(target_params=target_params)


def clone_chunk(state, key, start, data, cfg):
    """`log_every` updates of the first phase, as `train_chunk` makes those of the second."""
    steps = start + jnp.arange(cfg.log_every)
    state, metrics = jax.lax.scan(partial(clone_update, key=key, data=data, cfg=cfg), state, steps)
    return state, jax.tree.map(jnp.mean, metrics)


def train_chunk(state, key, start, data, cfg):
    """`log_every` updates of one seed, compiled as one program. Metrics are chunk means."""
    steps = start + jnp.arange(cfg.log_every)
    state, metrics = jax.lax.scan(partial(update, key=key, data=data, cfg=cfg), state, steps)
    return state, jax.tree.map(jnp.mean, metrics)


# --- Policy -------------------------------------------------------------------------------------
def policy(apply_fn, params, observation, key, apply_guidance, apply_critics, cfg):
    """One of N guided samples, chosen by its value, [..., O] -> [..., A], random by `key`."""
    actor_params, guidance_params, critic_params = params
    key_noise, key_choice = jax.random.split(key)
    observation = jnp.broadcast_to(observation, (cfg.num_samples, *observation.shape))
    action_dim = actor_params["params"]["head"]["bias"].shape[-1]
    noise = jax.random.normal(key_noise, (*observation.shape[:-1], action_dim))

    def denoised(action, time):
        time = jnp.full((*action.shape[:-1], 1), time)
        signal, std = noise_schedule(time)
        scaled_score = apply_fn(actor_params, observation, action, time)
        guidance = jax.grad(lambda x: apply_guidance(guidance_params, observation, x, time).sum())
        epsilon = -(scaled_score + cfg.guidance_scale * std * guidance(action))
        return (action - std * epsilon) / signal

    action = solve(denoised, noise, cfg)  # [N, ..., A]
    q = apply_critics(critic_params, observation, action)  # [K, N, ...]
    q = q[0] if cfg.num_choosers is None else q.mean(axis=0)  # [N, ...]
    if cfg.selection == "max":
        choice = q.argmax(axis=0)
    else:
        choice = jax.random.categorical(key_choice, q, axis=0)
    action = jnp.take_along_axis(action, choice[None, ..., None], axis=0)[0]
    return action.clip(-1.0, 1.0)


def solve(denoised, noise, cfg):
    """From noise at time 1 to an action at time 0.001, by the ODE of the diffusion: DPM-Solver++.

    `denoised(a_t, t)` is the noiseless action that the model expects. Steps of second order take
    two evaluations each, the last one or two steps are of first order.
    """
    time = jnp.linspace(1.0, 1e-3, cfg.generator_steps + 1)
    pairs = (cfg.generator_steps - 1) // 2

    def second_order_step(action, start):
        t, t_middle, t_end = time[start], time[start + 1], time[start + 2]
        share = (log_snr(t_middle) - log_snr(t)) / (log_snr(t_end) - log_snr(t))
        first = denoised(action, t)
        middle = first_order_step(action, first, t, t_middle)
        second = denoised(middle, t_middle)
        slope = (second - first) / (2 * share)
        return first_order_step(action, first + slope, t, t_end), None

    # A scan: unrolled it runs no faster and takes longer to compile.
    action, _ = jax.lax.scan(second_order_step, noise, 2 * jnp.arange(pairs))
    for i in range(2 * pairs, cfg.generator_steps):
        action = first_order_step(action, denoised(action, time[i]), time[i], time[i + 1])
    return action


def first_order_step(action, clean_action, time, next_time):
    """The noisy action at `next_time`, if `clean_action` is what is under the noise."""
    _, std = noise_schedule(time)
    next_signal, next_std = noise_schedule(next_time)
    shrink = jnp.expm1(log_snr(time) - log_snr(next_time))
    return next_std / std * action - next_signal * shrink * clean_action


def log_snr(time):
    """log(alpha_t / std_t), half the logarithm of the signal-to-noise ratio."""
    signal, std = noise_schedule(time)
    return jnp.log(signal / std)


def policy_params(state):
    chooser_params = state.critic.target_params
    if state.choosers is not None:
        chooser_params = state.choosers.params
    return state.actor.params, state.guidance.params, chooser_params


def policy_fn(state, cfg):
    """`policy` with the networks filled in: (params, observation, key) -> action."""
    return partial(
        policy,
        state.actor.apply_fn,
        apply_guidance=state.guidance.apply_fn,
        apply_critics=state.critic.apply_fn,
        cfg=cfg,
    )


# --- Training -----------------------------------------------------------------------------------
def train(cfg, options):
    """Train every seed of `cfg` and return its final normalised scores, [S]."""
    experiment.check(cfg, options)
    if cfg.alpha == 0:
        fail("--alpha 0.0: must be above 0, since the advantages are divided by it")
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps)
    reward = dataset.transitions.reward + cfg.reward_shift
    if cfg.return_scale is not None:
        reward = reward * (cfg.return_scale / datasets.return_span(dataset))
    data = experiment.place(dataset.transitions._replace(reward=reward), options)
    example = jax.tree.map(lambda x: x[:1], data)  # one row, for its shapes
    init_keys, train_keys, policy_keys = experiment.streams(cfg.seeds, 3)  # [S] keys each
    create = partial(create_state, batch=example, cfg=cfg)
    state = jax.vmap(create)(init_keys)
    # Compiled once for all seeds. An `update` shows which rows a step reads, for --data host.
    clone_seeds = experiment.over_seeds(partial(clone_chunk, cfg=cfg), update=clone_update)
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
            if run.evaluates(step) and step >= cfg.clone_updates:  # from the second phase on
                scores = rollouts.start(policy_params(state), step)
            last_metrics = metrics  # of the chunk that ended at this step
            # An accelerator trains while the CPU evaluates.
            if step < cfg.clone_updates:  # the first phase
                state, metrics = clone_seeds(state, train_keys, step, data)
            elif step < cfg.num_updates:  # the second one
                state, metrics = train_seeds(state, train_keys, step, data)
            run.log(step, last_metrics, scores)
    return run.scores


if __name__ == "__main__":
    train(*experiment.parse(Config))

# SPDX-License-Identifier: Apache-2.0
"""Diffusion-QL (Wang et al., 2023): a diffusion model of the data's actions that also raises Q.

Paper       https://arxiv.org/abs/2208.06193, FBRAC (generator=flow) https://arxiv.org/abs/2502.02538
Reference   https://github.com/Zhendong-Wang/Diffusion-Policies-for-Offline-RL
Run         python algorithms/diffusion_ql.py --config configs/diffusion_ql/mujoco.yaml
Parent      fql.py (376 lines)
Results     docs/results.md
Deviations  All rows train, also those at a truncation whose next observation is known. `cosine`
            brings the learning rates to 0 over the run; the authors' --lr_decay moves once in 50k
            updates and ends at 99.9 % of the first rate, so it is off here. The score is the last
            policy's, not that of a chosen checkpoint. FBRAC's code has one Adam, and its losses and
            targets read the state from before the update. Its configs switch off Diffusion-QL's
            gradient clipping, actor average and choice among samples.

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

from common import datasets, evaluation, experiment, fail


# --- Config -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    dataset: str = "local/pointmaze/umaze-v0"  # data set id or path, see docs/data.md
    seeds: tuple[int, ...] = (0,)  # trained in parallel
    num_updates: int = 2_000_000  # gradient steps of every network
    log_every: int = 1_000  # updates per compiled chunk, the unit of logging and saving
    eval_every: int = 50_000  # updates between evaluations
    eval_episodes: int = 10  # episodes per seed and evaluation
    batch_size: int = 256  # transitions per update
    actor_learning_rate: float = 3e-4  # Adam
    critic_learning_rate: float = 3e-4  # Adam
    discount: float = 0.99  # gamma, per environment step
    target_rate: float = 0.005  # tau, Polyak step of the target critics
    hidden: tuple[int, ...] = (256, 256, 256)  # widths of all networks
    num_critics: int = 2  # K
    reward_scale: float = 1.0  # multiplies data set rewards (AntMaze: 4)
    reward_shift: float = 0.0  # added afterwards (AntMaze: -2)
    standardise_rewards: bool = False  # first bring them to mean 0 and std 1 (Adroit)
    # Diffusion-QL
    eta: float = 1.0  # weight of the loss -Q
    alpha: float = 1.0  # weight of the behaviour loss (FBRAC's coefficient)
    actor_q: Literal["other", "mean"] = "other"  # -Q_i / mean |Q_j|, i random | -mean_k Q_k
    q_agg: Literal["mean", "min"] = "min"  # of the K critics, in the TD target
    target_samples: int = 1  # N actions in the TD target, each critic takes its best (AntMaze: 10)
    generator: Literal["ddpm", "flow"] = "ddpm"  # model of actions; flow: FBRAC, GELU networks
    generator_steps: int = 5  # T, denoising steps of ddpm from noise to action
    flow_steps: int = 10  # Euler steps of the flow from noise to action
    num_samples: int = 50  # N actions from which the policy draws one by softmax over Q
    max_gradient_norm: float | None = 1.0  # gradients are clipped to this norm; None: never
    actor_target_rate: float = 0.005  # step of the average of the actor that the TD target uses
    actor_target_every: int = 5  # updates between these steps
    actor_target_start: int = 1_000  # number of the first update that may have such a step
    cosine: bool = False  # cosine decay of all learning rates to 0 over num_updates


# --- Networks -----------------------------------------------------------------------------------
def fan_in_uniform():
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # U(±1 / sqrt(fan in))


def uniform(bound):
    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def linear(fan_in, width):  # PyTorch's default initialisation
    return nn.Dense(width, kernel_init=fan_in_uniform(), bias_init=uniform(fan_in**-0.5))


class MishNoiseNet(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int
    time_width: int = 16  # of the embedding of the time, half sines and half cosines

    @nn.compact
    def __call__(self, observation, action, time):  # [..., O], [..., A], [..., 1] -> [..., A]
        """The noise in `action` at a step of the diffusion."""
        half = self.time_width // 2
        frequency = jnp.exp(-jnp.log(10_000.0) * jnp.arange(half) / (half - 1))
        angle = time * jnp.broadcast_to(frequency, (*time.shape[:-1], half))
        embedding = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
        embedding = jax.nn.mish(linear(self.time_width, 2 * self.time_width)(embedding))
        embedding = linear(2 * self.time_width, self.time_width)(embedding)
        x = jnp.concatenate([action, embedding, observation], axis=-1)
        for width in self.hidden:
            x = jax.nn.mish(linear(x.shape[-1], width)(x))
        bias_init = uniform(x.shape[-1] ** -0.5)
        return nn.Dense(
            self.action_dim, kernel_init=fan_in_uniform(), bias_init=bias_init, name="head"
        )(x)


class MishCritic(nn.Module):
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, observation, action):  # [..., O], [..., A] -> [...]
        x = jnp.concatenate([observation, action], axis=-1)
        for width in self.hidden:
            x = jax.nn.mish(linear(x.shape[-1], width)(x))
        return linear(x.shape[-1], 1)(x).squeeze(-1)


def glorot_dense(width):
    return nn.Dense(width, kernel_init=nn.initializers.xavier_uniform())


class GeluNet(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, *inputs):  # [..., O], [..., A] and, for the flow, time [..., 1] -> [..., A]
        x = jnp.concatenate(inputs, axis=-1)
        for width in self.hidden:
            x = nn.gelu(glorot_dense(width)(x))
        head = nn.Dense(self.action_dim, kernel_init=nn.initializers.xavier_uniform(), name="head")
        return head(x)


class GeluCritic(nn.Module):
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, observation, action):  # [..., O], [..., A] -> [...]
        x = jnp.concatenate([observation, action], axis=-1)
        for width in self.hidden:
            x = nn.gelu(glorot_dense(width)(x))
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
    actor: TrainState  # model of actions; its target_params are a slow average
    critic: TrainState  # every array has a leading [K] axis


def create_state(key, batch, cfg):
    """State of one seed before the first update. `batch` supplies shapes only."""
    key_actor, key_critic = jax.random.split(key)
    action_dim = batch.action.shape[-1]
    if cfg.generator == "flow":
        actor = GeluNet(cfg.hidden, action_dim)
        critic = GeluCritic(cfg.hidden)
    else:
        actor = MishNoiseNet(cfg.hidden, action_dim)
        critic = MishCritic(cfg.hidden)
    init_critics = jax.vmap(critic.init, (0, None, None))
    apply_critics = jax.vmap(critic.apply, (0, None, None))  # -> [K, B]

    time = batch.action[..., :1]  # [B, 1]
    actor_params = actor.init(key_actor, batch.observation, batch.action, time)
    critic_keys = jax.random.split(key_critic, cfg.num_critics)
    critic_params = init_critics(critic_keys, batch.observation, batch.action)
    actor_adam = clipped_adam(cfg.actor_learning_rate, cfg)
    critic_adam = clipped_adam(cfg.critic_learning_rate, cfg)
    return State(
        actor=TrainState.create(actor.apply, actor_params, actor_adam),
        critic=TrainState.create(apply_critics, critic_params, critic_adam),
    )


def clipped_adam(learning_rate, cfg):
    """Adam on gradients whose norm over all parameters of a network is limited."""
    if cfg.cosine:
        learning_rate = optax.cosine_decay_schedule(learning_rate, cfg.num_updates)
    adam = optax.adam(learning_rate)
    if cfg.max_gradient_norm is None:
        return adam
    return optax.chain(optax.clip_by_global_norm(cfg.max_gradient_norm), adam)


# --- Losses -------------------------------------------------------------------------------------
def critic_loss(params, state, batch, key, cfg):
    """Squared TD error to r + gamma min_k max_n Q_k(s', a'_n), mean over B, summed over K.

    The N actions a'_n come from the slow average of the actor.
    """
    shape = (cfg.target_samples, *batch.next_observation.shape)
    next_observation = jnp.broadcast_to(batch.next_observation, shape)  # [N, B, O]
    next_action = generate_action(
        state.actor.apply_fn, state.actor.target_params, next_observation, key, cfg
    )
    next_q = state.critic.apply_fn(state.critic.target_params, next_observation, next_action)
    next_q = next_q.max(axis=1)  # [K, N, B] -> [K, B]
    next_q = aggregate(next_q, cfg)  # [K, B] -> [B]
    # Bootstrap through truncations, never through terminations.
    target = batch.reward + cfg.discount * (1.0 - batch.termination) * next_q  # [B]

    q = state.critic.apply_fn(params, batch.observation, batch.action)  # [K, B]
    chex.assert_equal_shape([*q, target])
    loss = jnp.square(q - target[None]).mean(axis=1).sum()
    return loss, {"critic_loss": loss, "q": q.mean()}


def actor_loss(params, state, batch, key, cfg):
    """alpha L_behaviour + eta L_q with L_q = -Q_i / mean |Q_j| (-mean_k Q_k in FBRAC).

    The gradient of Q goes through all steps of sampling. They are unrolled and keep what it needs:
    22 MB in all with the defaults, 87 MB with FBRAC's. A scan and jax.checkpoint are slower.
    """
    key_behaviour, key_action, key_choice = jax.random.split(key, 3)
    behaviour = behaviour_loss(params, state, batch, key_behaviour, cfg)
    action = generate_action(state.actor.apply_fn, params, batch.observation, key_action, cfg)
    q = state.critic.apply_fn(state.critic.params, batch.observation, action)  # [K, B]
    chex.assert_equal_shape([*q, batch.reward])
    if cfg.actor_q == "mean":
        q_loss = -q.mean()
    else:
        chosen = jax.random.randint(key_choice, (), 0, cfg.num_critics)
        other = (chosen + 1) % cfg.num_critics
        q_scale = jax.lax.stop_gradient(jnp.abs(q[other]).mean())
        q_loss = -q[chosen].mean() / q_scale

    loss = cfg.alpha * behaviour + cfg.eta * q_loss
    return loss, {"actor_loss": loss, "behaviour_loss": behaviour, "q_loss": q_loss}


def behaviour_loss(params, state, batch, key, cfg):
    """Denoising or flow matching loss of the data's actions, mean over B and A.

    ddpm: |eps_theta(x_t, s, t) - eps|^2, x_t = sqrt(alpha_bar_t) a + sqrt(1 - alpha_bar_t) eps.
    flow: |v_theta(x_t, s, t) - (a - eps)|^2, x_t = (1 - t) eps + t a.
    """
    key_time, key_noise = jax.random.split(key)
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

    output = state.actor.apply_fn(params, batch.observation, noisy_action, time)
    chex.assert_equal_shape([output, target])
    return jnp.square(output - target).mean()


def aggregate(q, cfg):
    """Mean or minimum over the critics, [K, ...] -> [...]."""
    if cfg.q_agg == "min":
        return q.min(axis=0)
    return q.mean(axis=0)


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


def generate_action(apply_fn, params, observation, key, cfg):
    """Actions of the model, [..., O] -> [..., A]. `key` is split."""
    keys = jax.random.split(key, cfg.generator_steps)
    action_dim = params["params"]["head"]["bias"].shape[-1]
    noise = jax.random.normal(keys[0], (*observation.shape[:-1], action_dim))
    if cfg.generator == "flow":
        return integrate(apply_fn, params, observation, noise, cfg)
    return denoise_by_posterior(apply_fn, params, observation, noise, keys, cfg)


def denoise_by_posterior(apply_fn, params, observation, noise, keys, cfg):
    """DDPM sampling: each of T steps draws x_{t-1} from q(x_{t-1} | x_t, x_0).

    x_0 is the action that the model predicts, clipped to [-1, 1]; the last step returns it.
    """
    alpha = vp_schedule(cfg)
    alpha_bar = jnp.cumprod(alpha)
    x = noise
    for t in reversed(range(cfg.generator_steps)):
        time = jnp.full((*x.shape[:-1], 1), float(t))
        epsilon = apply_fn(params, observation, x, time)
        x0 = (x - jnp.sqrt(1.0 - alpha_bar[t]) * epsilon) / jnp.sqrt(alpha_bar[t])
        x0 = x0.clip(-1.0, 1.0)
        if t == 0:
            x = x0
        else:
            noise_before = 1.0 - alpha_bar[t - 1]  # variance of the noise in x_{t-1}
            noise_now = 1.0 - alpha_bar[t]
            weight_x0 = jnp.sqrt(alpha_bar[t - 1]) * (1.0 - alpha[t]) / noise_now
            weight_x = jnp.sqrt(alpha[t]) * noise_before / noise_now
            std = jnp.sqrt((1.0 - alpha[t]) * noise_before / noise_now)
            x = weight_x0 * x0 + weight_x * x + std * jax.random.normal(keys[t], x.shape)
    return x


def integrate(apply_fn, params, observation, noise, cfg):
    """F(s, z): the action that the flow makes of noise in `flow_steps` Euler steps, [..., A]."""
    x = noise
    for i in range(cfg.flow_steps):  # a Python loop: a handful of matrix products per step
        time = jnp.full((*x.shape[:-1], 1), i / cfg.flow_steps)
        velocity = apply_fn(params, observation, x, time)
        x = x + velocity / cfg.flow_steps
    return x.clip(-1.0, 1.0)


# --- Update -------------------------------------------------------------------------------------
def update(state, step, key, data, cfg):
    """One gradient step of the critics, then of the actor, then steps of the averages. One seed.

    Both use the same batch. Randomness is a function of (key, step) alone, so neither the length
    of a chunk nor a resumed run changes the result. The key of a step is fold_in(key, step).
    """
    key_batch, key_critic, key_actor = jax.random.split(jax.random.fold_in(key, step), 3)
    batch = sample_batch(data, key_batch, cfg)

    critic_grads, critic_metrics = jax.grad(critic_loss, has_aux=True)(
        state.critic.params, state, batch, key_critic, cfg
    )
    state = state._replace(critic=state.critic.apply_gradients(grads=critic_grads))

    actor_grads, actor_metrics = jax.grad(actor_loss, has_aux=True)(
        state.actor.params, state, batch, key_actor, cfg
    )
    state = state._replace(actor=state.actor.apply_gradients(grads=actor_grads))
    state = state._replace(actor=update_average(state.actor, step, cfg))
    state = state._replace(critic=update_target(state.critic, cfg))
    return state, critic_metrics | actor_metrics


def sample_batch(data, key, cfg):
    """`batch_size` rows of the data, drawn with replacement."""
    index = jax.random.randint(key, (cfg.batch_size,), 0, len(data.reward))
    return jax.tree.map(lambda column: column[index], data)


def update_target(net, cfg):
    target_params = optax.incremental_update(net.params, net.target_params, cfg.target_rate)
    return net.replace(target_params=target_params)


def update_average(actor, step, cfg):
    """`update_target` for the actor: in some of the updates only, with a rate of its own."""
    is_late_enough = step + 1 >= cfg.actor_target_start
    is_due = is_late_enough & (step % cfg.actor_target_every == 0)
    rate = jnp.where(is_due, cfg.actor_target_rate, 0.0)  # 0 changes no bit
    target_params = optax.incremental_update(actor.params, actor.target_params, rate)
    return actor.replace(target_params=target_params)


def train_chunk(state, key, start, data, cfg):
    """`log_every` updates of one seed, compiled as one program. Metrics are chunk means."""
    steps = start + jnp.arange(cfg.log_every)
    state, metrics = jax.lax.scan(partial(update, key=key, data=data, cfg=cfg), state, steps)
    return state, jax.tree.map(jnp.mean, metrics)


# --- Policy -------------------------------------------------------------------------------------
def policy(apply_fn, params, observation, key, apply_critics, cfg):
    """One of N sampled actions, drawn by softmax of min_k Q_k, [..., O] -> [..., A]."""
    actor_params, critic_params = params
    key_action, key_choice = jax.random.split(key)
    observation = jnp.broadcast_to(observation, (cfg.num_samples, *observation.shape))
    action = generate_action(apply_fn, actor_params, observation, key_action, cfg)  # [N, ..., A]
    q = apply_critics(critic_params, observation, action)
    q = q.min(axis=0)  # [K, N, ...] -> [N, ...]
    choice = jax.random.categorical(key_choice, q, axis=0)[None, ..., None]
    return jnp.take_along_axis(action, choice, axis=0)[0]


def policy_params(state):
    return state.actor.params, state.critic.target_params


def policy_fn(state, cfg):
    """`policy` with the networks filled in: (params, observation, key) -> action."""
    return partial(policy, state.actor.apply_fn, apply_critics=state.critic.apply_fn, cfg=cfg)


# --- Training -----------------------------------------------------------------------------------
def train(cfg, options):
    """Train every seed of `cfg` and return its final normalised scores, [S]."""
    experiment.check(cfg, options)
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps)
    reward = dataset.transitions.reward
    if cfg.standardise_rewards:
        if reward.std() == 0:
            fail("--standardise-rewards True: all rewards are equal, so they have no scale")
        reward = (reward - reward.mean()) / reward.std(ddof=1)
    reward = cfg.reward_scale * reward + cfg.reward_shift
    data = experiment.place(dataset.transitions._replace(reward=reward), options)
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

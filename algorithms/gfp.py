# SPDX-License-Identifier: Apache-2.0
"""GFP (Tiofack et al., 2026): FQL whose flow clones above all the actions that Q prefers.

Paper       https://arxiv.org/abs/2512.03973
Reference   https://github.com/Simple-Robotics/guided-flow-policy
Run         python algorithms/gfp.py --config configs/gfp/ogbench.yaml
Parent      fql.py (161 lines)
Results     docs/results.md
Deviations  Each network has an Adam of its own, which makes the same steps as the reference's one
            Adam for all. Rows at a truncation are kept where their next observation is known.
            Observations are vectors, not images. As in the released code, the target critics
            follow the critics before their gradient step. That code's weights without a
            denominator (guidance_fn=advantage) are left out.

Shapes: S seeds, K critics, B batch, E episodes, O observation, A action. Arrays are float32.
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
    num_updates: int = 1_000_000  # gradient steps of every network
    log_every: int = 1_000  # updates per compiled chunk, the unit of logging and saving
    eval_every: int = 100_000  # updates between evaluations
    eval_episodes: int = 50  # episodes per seed and evaluation
    batch_size: int = 256  # transitions per update
    actor_learning_rate: float = 3e-4  # Adam, for the policy and the flow
    critic_learning_rate: float = 3e-4  # Adam
    discount: float = 0.99  # gamma, per environment step
    target_rate: float = 0.005  # tau, Polyak step of the target critics
    hidden: tuple[int, ...] = (512, 512, 512, 512)  # widths of all networks
    num_critics: int = 2  # K
    reward_shift: float = 0.0  # added to data set rewards (AntMaze: -1)
    # FQL
    alpha: float = 1.0  # weight of the distillation error (mu(s, z) - F(s, z))^2 beside -Q
    q_agg: Literal["mean", "min"] = "mean"  # of the K critics, in targets, weights and actor loss
    normalize_q: bool = True  # divide Q by its mean absolute value in the actor loss
    flow_steps: int = 10  # Euler steps of the flow F from noise z to action
    # GFP
    eta: float | None = 0.01  # temperature of the flow's weights, in mean |Q|; None: all are 1
    guidance_agg: Literal["actor", "flow", "min", "mean", "max"] = "actor"  # whose Q to exceed
    target_agg: Literal["actor", "flow", "min", "mean", "max"] = "actor"  # whose Q in the TD target


# --- Networks -----------------------------------------------------------------------------------
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
    actor: train_state.TrainState  # mu(s, z), the one-step policy
    critic: TrainState  # every array has a leading [K] axis
    flow: train_state.TrainState  # v(s, x, t), the velocity from noise to the data's actions


def create_state(key, batch, cfg):
    """State of one seed before the first update. `batch` supplies shapes only."""
    key_actor, key_critic, key_flow = jax.random.split(key, 3)
    action_dim = batch.action.shape[-1]
    actor = GeluNet(cfg.hidden, action_dim)
    critic = GeluCritic(cfg.hidden)
    flow = GeluNet(cfg.hidden, action_dim)
    init_critics = jax.vmap(critic.init, (0, None, None))
    apply_critics = jax.vmap(critic.apply, (0, None, None))  # -> [K, B]

    noise = batch.action  # [B, A], z
    time = batch.action[..., :1]  # [B, 1], t
    actor_params = actor.init(key_actor, batch.observation, noise)
    critic_keys = jax.random.split(key_critic, cfg.num_critics)
    critic_params = init_critics(critic_keys, batch.observation, batch.action)
    flow_params = flow.init(key_flow, batch.observation, noise, time)
    actor_adam = optax.adam(cfg.actor_learning_rate)
    critic_adam = optax.adam(cfg.critic_learning_rate)
    flow_adam = optax.adam(cfg.actor_learning_rate)
    return State(
        actor=train_state.TrainState.create(
            apply_fn=actor.apply, params=actor_params, tx=actor_adam
        ),
        critic=TrainState.create(apply_critics, critic_params, critic_adam),
        flow=train_state.TrainState.create(apply_fn=flow.apply, params=flow_params, tx=flow_adam),
    )


# --- Losses -------------------------------------------------------------------------------------
def critic_loss(params, state, batch, key, cfg):
    """Squared TD error to r + gamma Q(s'), mean over K and B. Eq. 7."""
    noise = jax.random.normal(key, batch.action.shape)  # z, [B, A]
    next_q = policy_value(state, batch.next_observation, noise, cfg.target_agg, cfg)  # [B]
    # Bootstrap through truncations, never through terminations.
    target = batch.reward + cfg.discount * (1.0 - batch.termination) * next_q  # [B]

    q = state.critic.apply_fn(params, batch.observation, batch.action)  # [K, B]
    chex.assert_equal_shape([*q, target])
    loss = jnp.square(q - target[None]).mean()
    return loss, {"critic_loss": loss, "q": q.mean()}


def actor_loss(params, state, batch, noise, cfg):
    """alpha (mu(s, z) - F(s, z))^2 - Q(s, mu(s, z)) / mean |Q|, F without gradient.

    `noise` is z, [B, A], the same for mu and F.
    """
    flow_action = integrate(state.flow.apply_fn, state.flow.params, batch.observation, noise, cfg)
    action = state.actor.apply_fn(params, batch.observation, noise)
    chex.assert_equal_shape([action, flow_action, batch.action])
    distill_error = jnp.square(action - flow_action).mean(axis=-1)  # [B]

    action = action.clip(-1.0, 1.0)
    q = state.critic.apply_fn(state.critic.params, batch.observation, action)
    q = aggregate(q, cfg)  # [K, B] -> [B]
    q_scale = 1.0
    if cfg.normalize_q:
        q_scale = jax.lax.stop_gradient(jnp.abs(q).mean())
    q_loss = -q / q_scale

    chex.assert_equal_shape([distill_error, q_loss, batch.reward])
    loss = (cfg.alpha * distill_error + q_loss).mean()
    return loss, {"actor_loss": loss, "distill_loss": distill_error.mean()}


def flow_loss(params, state, batch, weight, key, cfg):
    """g (v(s, x_t, t) - (a - z))^2 at x_t = (1 - t) z + t a, t uniform in [0, 1].

    `weight` is g, [B]. The z of the flow is drawn anew.
    """
    key_noise, key_time = jax.random.split(key)
    noise = jax.random.normal(key_noise, batch.action.shape)  # z, [B, A]
    time = jax.random.uniform(key_time, (len(noise), 1))  # t, [B, 1]
    x = (1.0 - time) * noise + time * batch.action  # x_t, [B, A]
    velocity = state.flow.apply_fn(params, batch.observation, x, time)
    target_velocity = batch.action - noise
    chex.assert_equal_shape([velocity, target_velocity])
    flow_error = jnp.square(velocity - target_velocity).mean(axis=-1)  # [B]
    chex.assert_equal_shape([flow_error, weight])
    loss = (weight * flow_error).mean()
    return loss, {"flow_loss": loss, "guidance": weight.mean()}


def guidance(state, batch, noise, cfg):
    """g = exp(Q(s, a) / T) / (exp(Q(s, a) / T) + exp(Q_pi(s) / T)), T = eta mean |Q|, [B].

    Eq. 10. Q(s, a) is the value of the data's action and Q_pi(s) that of a policy's. A weight of
    1/2 says that they are equal. `noise` is the z of `actor_loss`.
    """
    if cfg.eta is None:
        return jnp.ones_like(batch.reward)
    action = state.actor.apply_fn(state.actor.params, batch.observation, noise)
    action = action.clip(-1.0, 1.0)
    q = state.critic.apply_fn(state.critic.params, batch.observation, action)
    q_scale = jnp.abs(aggregate(q, cfg)).mean()

    data_q = action_value(state, batch.observation, batch.action, cfg)  # [B]
    policy_q = policy_value(state, batch.observation, noise, cfg.guidance_agg, cfg)  # [B]
    chex.assert_equal_shape([data_q, policy_q, batch.reward])
    return jax.nn.sigmoid((data_q - policy_q) / (cfg.eta * q_scale))


def policy_value(state, observation, noise, agg, cfg):
    """Q(s, mu(s, z)), Q(s, F(s, z)) or the min, mean or max of both, by target critics, [B]."""
    values = []
    if agg != "flow":
        action = state.actor.apply_fn(state.actor.params, observation, noise)
        values.append(action_value(state, observation, action.clip(-1.0, 1.0), cfg))
    if agg != "actor":
        action = integrate(state.flow.apply_fn, state.flow.params, observation, noise, cfg)
        values.append(action_value(state, observation, action, cfg))
    values = jnp.stack(values)
    if agg == "min":
        return values.min(axis=0)
    if agg == "max":
        return values.max(axis=0)
    return values.mean(axis=0)  # of one or of both


def action_value(state, observation, action, cfg):
    """Q(s, a) of the target critics, [B]."""
    return aggregate(state.critic.apply_fn(state.critic.target_params, observation, action), cfg)


def aggregate(q, cfg):
    """Mean or minimum over the critics, [K, ...] -> [...]."""
    if cfg.q_agg == "min":
        return q.min(axis=0)
    return q.mean(axis=0)


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
    """One gradient step of every network at once, on one batch. One seed.

    Randomness is a function of (key, step) alone, so neither the length of a chunk nor a resumed
    run changes the result. The key of a step is fold_in(key, step).
    """
    keys = jax.random.split(jax.random.fold_in(key, step), 4)
    key_batch, key_critic, key_actor, key_flow = keys
    batch = sample_batch(data, key_batch, cfg)
    noise = jax.random.normal(key_actor, batch.action.shape)  # z of the actor's loss and of g
    weight = guidance(state, batch, noise, cfg)  # [B]
    # All gradients are taken at the state before the update.
    critic_grads, critic_metrics = jax.grad(critic_loss, has_aux=True)(
        state.critic.params, state, batch, key_critic, cfg
    )
    actor_grads, actor_metrics = jax.grad(actor_loss, has_aux=True)(
        state.actor.params, state, batch, noise, cfg
    )
    flow_grads, flow_metrics = jax.grad(flow_loss, has_aux=True)(
        state.flow.params, state, batch, weight, key_flow, cfg
    )
    # Targets first: they follow the critics before their gradient step.
    critic = update_target(state.critic, cfg)
    state = State(
        actor=state.actor.apply_gradients(grads=actor_grads),
        critic=critic.apply_gradients(grads=critic_grads),
        flow=state.flow.apply_gradients(grads=flow_grads),
    )
    return state, critic_metrics | actor_metrics | flow_metrics


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
    """mu(s, z) with noise z of `key`, clipped to [-1, 1], [..., O] -> [..., A]."""
    action_dim = params["params"]["head"]["bias"].shape[-1]
    noise = jax.random.normal(key, (*observation.shape[:-1], action_dim))
    return apply_fn(params, observation, noise).clip(-1.0, 1.0)


def policy_params(state):
    return state.actor.params


def policy_fn(state, cfg):
    """`policy` with the networks filled in: (params, observation, key) -> action."""
    return partial(policy, state.actor.apply_fn)


# --- Training -----------------------------------------------------------------------------------
def train(cfg, options):
    """Train every seed of `cfg` and return its final normalised scores, [S]."""
    experiment.check(cfg, options)
    if cfg.eta == 0:
        fail("--eta 0.0: must be above 0; --eta None weighs all actions alike, the authors' eta 0")
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps)
    action = dataset.transitions.action.clip(-1 + 1e-5, 1 - 1e-5)
    reward = dataset.transitions.reward + cfg.reward_shift
    data = dataset.transitions._replace(action=action, reward=reward)
    data = experiment.place(data, options)
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

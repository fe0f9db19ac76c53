# SPDX-License-Identifier: Apache-2.0
"""FQL (Park et al., 2025): a flow clones the data, a one-step policy imitates it and raises Q.

Paper       https://arxiv.org/abs/2502.02538
Reference   https://github.com/seohongpark/fql
Run         python algorithms/fql.py --config configs/fql/ogbench.yaml
Parent      none
Results     docs/results.md
Deviations  Each network has an Adam of its own, which makes the same steps as the reference's one
            Adam for all. Rows at a truncation are kept where their next observation is known.
            Observations are vectors, not images. As in the released code, the target critics
            follow the critics before their gradient step. n_step is not in the reference: a sum
            that an episode's end cuts bootstraps there, where QC's n-step baseline drops it.

Shapes: S seeds, K critics, B batch, E episodes, O observation, A action. Arrays are float32.
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

from common import datasets, evaluation, experiment, interaction


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
    reward_shift: float = 0.0  # added to all rewards (AntMaze: -1)
    # FQL
    alpha: float = 10.0  # weight of the distillation error (mu(s, z) - F(s, z))^2 beside -Q
    q_agg: Literal["mean", "min"] = "mean"  # of the K critics, in the TD target
    normalize_q: bool = False  # divide Q by its mean absolute value in the actor loss
    flow_steps: int = 10  # Euler steps of the flow F from noise z to action
    n_step: int = 1  # rows whose rewards a TD target sums before it bootstraps
    # Online phase
    online_updates: int = 0  # gradient steps of online training, after the offline ones
    updates_per_step: int = 1  # updates per env step
    steps_per_refresh: int = 1  # env steps between updates of the acting policy


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
class NStep(NamedTuple):
    """Rows with returns of up to n steps. Everything "next" is after the last of them."""

    observation: Any  # [B, O]
    action: Any  # [B, A]
    reward: Any  # [B], the sum of gamma^k r_k over m <= n rows
    next_observation: Any  # [B, O]
    next_action: Any  # [B, A]
    termination: Any  # [B], 1 where the last of the m rows is a true end
    discount: Any  # [B], gamma^m


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
    """Squared TD error to r + gamma Q(s', mu(s', z)), mean over K and B. Algorithm 1."""
    noise = jax.random.normal(key, batch.action.shape)  # z, [B, A]
    next_action = state.actor.apply_fn(state.actor.params, batch.next_observation, noise)
    next_action = next_action.clip(-1.0, 1.0)

    next_q = state.critic.apply_fn(state.critic.target_params, batch.next_observation, next_action)
    next_q = aggregate(next_q, cfg)  # [K, B] -> [B]
    discount = cfg.discount
    if cfg.n_step > 1:
        discount = batch.discount  # gamma^m, [B]
    # Bootstrap through truncations, never through terminations.
    target = batch.reward + discount * (1.0 - batch.termination) * next_q  # [B]

    q = state.critic.apply_fn(params, batch.observation, batch.action)  # [K, B]
    chex.assert_equal_shape([*q, target])
    loss = jnp.square(q - target[None]).mean()
    return loss, {"critic_loss": loss, "q": q.mean()}


def actor_loss(params, state, batch, key, cfg):
    """alpha (mu(s, z) - F(s, z))^2 - mean_k Q_k(s, mu(s, z)), F without gradient. Algorithm 1."""
    noise = jax.random.normal(key, batch.action.shape)  # z, the same for mu and F
    flow_action = integrate(state.flow.apply_fn, state.flow.params, batch.observation, noise, cfg)
    action = state.actor.apply_fn(params, batch.observation, noise)
    chex.assert_equal_shape([action, flow_action, batch.action])
    distill_error = jnp.square(action - flow_action).mean(axis=-1)  # [B]

    action = action.clip(-1.0, 1.0)
    q = state.critic.apply_fn(state.critic.params, batch.observation, action)
    q = q.mean(axis=0)  # [K, B] -> [B]
    q_scale = 1.0
    if cfg.normalize_q:
        q_scale = jax.lax.stop_gradient(jnp.abs(q).mean())
    q_loss = -q / q_scale

    chex.assert_equal_shape([distill_error, q_loss, batch.reward])
    loss = (cfg.alpha * distill_error + q_loss).mean()
    return loss, {"actor_loss": loss, "distill_loss": distill_error.mean()}


def flow_loss(params, state, batch, key, cfg):
    """(v(s, x_t, t) - (a - z))^2 at x_t = (1 - t) z + t a, t uniform in [0, 1]. Algorithm 1."""
    key_noise, key_time = jax.random.split(key)
    noise = jax.random.normal(key_noise, batch.action.shape)  # z, [B, A]
    time = jax.random.uniform(key_time, (len(noise), 1))  # t, [B, 1]
    x = (1.0 - time) * noise + time * batch.action  # x_t, [B, A]
    velocity = state.flow.apply_fn(params, batch.observation, x, time)
    target_velocity = batch.action - noise
    chex.assert_equal_shape([velocity, target_velocity])
    loss = jnp.square(velocity - target_velocity).mean()
    return loss, {"flow_loss": loss}


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
    # All gradients are taken at the state before the update.
    critic_grads, critic_metrics = jax.grad(critic_loss, has_aux=True)(
        state.critic.params, state, batch, key_critic, cfg
    )
    actor_grads, actor_metrics = jax.grad(actor_loss, has_aux=True)(
        state.actor.params, state, batch, key_actor, cfg
    )
    flow_grads, flow_metrics = jax.grad(flow_loss, has_aux=True)(
        state.flow.params, state, batch, key_flow, cfg
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


def explore(apply_fn, params, observation, key):
    """mu(s, z) as in `policy`, by which the online phase acts."""
    return policy(apply_fn, params, observation, key)


def policy_params(state):
    return state.actor.params


def policy_fn(state, cfg):
    """`policy` with the networks filled in: (params, observation, key) -> action."""
    return partial(policy, state.actor.apply_fn)


# --- Training -----------------------------------------------------------------------------------
def n_step_rows(dataset, cfg):
    """`NStep` of a data set, one from each of its N rows on.

    A return ends with its episode or recording, and before that with a termination. It has m < n
    rows then. Where that end is no termination, the target bootstraps from there, with gamma^m.
    """
    rows = dataset.transitions
    index, valid = datasets.chunks(dataset, cfg.n_step)  # [N, n] each
    last = index[:, -1]  # [N], the last row of each return
    reward = 0.0
    for k in range(cfg.n_step):
        reward = reward + cfg.discount**k * valid[:, k] * rows.reward[index[:, k]]
    count = valid.sum(axis=1)  # [N], m
    return NStep(
        observation=rows.observation,
        action=rows.action,
        reward=reward,
        next_observation=rows.next_observation[last],
        next_action=rows.next_action[last],
        termination=rows.termination[last],
        discount=cfg.discount**count,
    )


def online_rows(rows, dataset, cfg):
    """Rows of the env as those of the data set are: the same actions and rewards."""
    rows = rows._replace(
        action=rows.action.clip(-1 + 1e-5, 1 - 1e-5),
        reward=rows.reward + cfg.reward_shift,
    )
    if cfg.n_step > 1:
        return datasets.by_seed(partial(n_step_rows, cfg=cfg), rows, dataset)
    return rows


def train(cfg, options):
    """Train every seed of `cfg` and return its final normalised scores, [S]."""
    experiment.check(cfg, options)
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps)
    action = dataset.transitions.action.clip(-1 + 1e-5, 1 - 1e-5)
    reward = dataset.transitions.reward + cfg.reward_shift
    data = dataset.transitions._replace(action=action, reward=reward)
    if cfg.n_step > 1:
        data = n_step_rows(replace(dataset, transitions=data), cfg)
    data = experiment.place(data, options)
    example = jax.tree.map(lambda x: x[:1], data)  # one row, for its shapes
    init_keys, train_keys, policy_keys, explore_keys = experiment.streams(cfg.seeds, 4)  # [S] each
    create = partial(create_state, batch=example, cfg=cfg)
    state = jax.vmap(create)(init_keys)
    # Compiled once for all seeds. `update` shows which rows a step reads, for --data host.
    train_seeds = experiment.over_seeds(partial(train_chunk, cfg=cfg), update=update)
    act = policy_fn(state, cfg)
    explore_by = partial(explore, state.actor.apply_fn)
    rows_as_data = partial(online_rows, dataset=dataset, cfg=cfg)

    with (
        experiment.Run(cfg, options, dataset) as run,
        evaluation.Rollouts(dataset, act, policy_keys, cfg) as rollouts,
        interaction.Interaction(
            run,
            data,
            explore_by,
            explore_keys,
            policy_params,
            train_chunk,
            rows_as_data,
            look_ahead=cfg.n_step,
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

# SPDX-License-Identifier: Apache-2.0
"""QC and QC-FQL (Li et al., 2025): Q-learning over chunks of h actions, cloned by a flow model.

Paper       https://arxiv.org/abs/2507.07969
Reference   https://github.com/ColinQiyangLi/qc
Run         python algorithms/qc.py --config configs/qc/ogbench.yaml
Parent      fql.py (122 lines)
Results     benchmarks/results
Deviations  those of fql.py; offline only, the paper goes on online. Rewards after a termination
            inside a chunk do not count (reference: they do, the bootstrap stops). The critics also
            learn from chunks that a termination cuts at an episode's end (reference: dropped;
            OGBench has few); such a chunk goes on with the actions of the rows behind it.

Shapes: S seeds, K critics, N samples, h steps of a chunk, B batch or rows, E episodes,
        O observation, A action. Arrays are float32.
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

from common import datasets, evaluation, experiment


# --- Config -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    dataset: str = "local/pointmaze/umaze-v0"  # data set id or path, see common/datasets.py
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
    alpha: float = 100.0  # of distill: weight of (mu(s, z) - F(s, z))^2, in units of Q
    q_agg: Literal["mean", "min"] = "mean"  # over K, in the TD target
    normalize_q: bool = False  # of distill: divides Q by its mean size, alpha is without units
    flow_steps: int = 10  # Euler steps of F from noise to action
    # QC
    actor: Literal["best_of_n", "distill"] = "best_of_n"  # QC, or QC-FQL with FQL's policy
    horizon: int = 5  # h, actions per chunk
    num_samples: int = 32  # N, chunks to choose from with best_of_n
    sparse_reward: bool = False  # rewards other than 0 become -1 (scene, puzzle-3x3)


# --- Networks -----------------------------------------------------------------------------------
def glorot(width):
    return nn.Dense(width, kernel_init=nn.initializers.xavier_uniform())


class GeluNet(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, *inputs):  # [..., O], [..., A] and for the flow [..., 1] -> [..., A]
        x = jnp.concatenate(inputs, axis=-1)
        for width in self.hidden:
            x = nn.gelu(glorot(width)(x))
        head = nn.Dense(self.action_dim, kernel_init=nn.initializers.xavier_uniform(), name="head")
        return head(x)


class GeluCritic(nn.Module):
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, observation, action):  # [..., O], [..., A] -> [...]
        x = jnp.concatenate([observation, action], axis=-1)
        for width in self.hidden:
            x = nn.LayerNorm()(nn.gelu(glorot(width)(x)))
        return glorot(1)(x).squeeze(-1)


# --- State --------------------------------------------------------------------------------------
class Chunks(NamedTuple):
    """Rows of the data, each with the h - 1 behind it."""

    observation: Any  # [B, O] before the first action
    action: Any  # [B, h A]
    reward: Any  # [B] sum of gamma^k r_k up to a termination
    next_observation: Any  # [B, O] after the last action
    termination: Any  # [B] 1 where one of the actions ends the episode
    valid: Any  # [B, h] 1 where an action is of the first one's episode


class TrainState(train_state.TrainState):
    target_params: Any  # Polyak average of params

    @classmethod
    def create(cls, apply_fn, params, tx):
        # The targets are a copy: params and targets are donated, so they must not share buffers.
        target = jax.tree.map(jnp.copy, params)
        return super().create(apply_fn=apply_fn, params=params, target_params=target, tx=tx)


class State(NamedTuple):
    actor: train_state.TrainState | None  # mu, the one-step policy; only with distill
    critic: TrainState  # every array has a leading [K] axis
    flow: train_state.TrainState  # v, the velocity from noise to the data's actions


def create_state(key, batch, cfg):
    """State of one seed before the first update. `batch` supplies shapes only."""
    key_actor, key_critic, key_flow = jax.random.split(key, 3)
    batch = batch._replace(action=jnp.tile(batch.action, cfg.horizon))  # [B, A] -> [B, h A]
    actor = flow = GeluNet(cfg.hidden, batch.action.shape[-1])
    critic, time = GeluCritic(cfg.hidden), batch.action[..., :1]
    actor_params = actor.init(key_actor, batch.observation, batch.action)
    critic_params = jax.vmap(critic.init, (0, None, None))(
        jax.random.split(key_critic, cfg.num_critics), batch.observation, batch.action
    )
    flow_params = flow.init(key_flow, batch.observation, batch.action, time)
    critics = jax.vmap(critic.apply, (0, None, None))  # -> [K, B]
    create, adam = train_state.TrainState.create, optax.adam(cfg.actor_learning_rate)
    distill = cfg.actor == "distill"
    return State(
        create(apply_fn=actor.apply, params=actor_params, tx=adam) if distill else None,
        TrainState.create(critics, critic_params, optax.adam(cfg.critic_learning_rate)),
        create(apply_fn=flow.apply, params=flow_params, tx=adam),
    )


# --- Losses -------------------------------------------------------------------------------------
def critic_loss(params, state, batch, key, cfg):
    """TD error of a chunk to its rewards + gamma^h Q(s', the policy's chunk), target critics."""
    next_action = sample_chunk(
        *(state.flow.apply_fn, policy_params(state), batch.next_observation, key),
        *(state.critic.apply_fn, cfg),
    )
    next_q = state.critic.apply_fn(state.critic.target_params, batch.next_observation, next_action)
    next_q = aggregate(next_q, cfg)  # [B]
    # Bootstrap through truncations, never through terminations.
    discount = cfg.discount**cfg.horizon
    target = batch.reward + discount * (1.0 - batch.termination) * next_q
    q = state.critic.apply_fn(params, batch.observation, batch.action)  # [K, B]
    # What follows a chunk that the recording cuts is not known.
    known = jnp.maximum(batch.valid[:, -1], batch.termination)
    chex.assert_equal_shape([*q, target, known])
    loss = (known[None] * jnp.square(q - target[None])).mean()
    return loss, {"critic_loss": loss, "q": q.mean()}


def actor_loss(params, state, batch, key, cfg):
    """alpha (mu(s, z) - F(s, z))^2 - mean_k Q_k(s, mu(s, z)), F without gradient. QC-FQL."""
    noise = jax.random.normal(key, batch.action.shape)
    goal = integrate(state.flow.apply_fn, state.flow.params, batch.observation, noise, cfg)
    action = state.actor.apply_fn(params, batch.observation, noise)
    chex.assert_equal_shape([action, goal, batch.action])
    distance = jnp.square(action - goal).mean(axis=-1)  # [B]
    action = action.clip(-1.0, 1.0)
    q = state.critic.apply_fn(state.critic.params, batch.observation, action).mean(axis=0)
    chex.assert_equal_shape([distance, q, batch.reward])
    scale = jax.lax.stop_gradient(jnp.abs(q).mean()) if cfg.normalize_q else 1.0
    loss = (cfg.alpha * distance - q / scale).mean()
    return loss, {"actor_loss": loss, "distill_loss": distance.mean()}


def flow_loss(params, state, batch, key, cfg):
    """(v(s, x_t, t) - (a - z))^2 at x_t = (1 - t) z + t a, t uniform in [0, 1], a a chunk."""
    key_noise, key_time = jax.random.split(key)
    noise = jax.random.normal(key_noise, batch.action.shape)
    time = jax.random.uniform(key_time, (len(noise), 1))
    x = (1.0 - time) * noise + time * batch.action
    velocity = state.flow.apply_fn(params, batch.observation, x, time)
    chex.assert_equal_shape([velocity, noise, batch.action])
    error = jnp.square(velocity - (batch.action - noise))
    error = error.reshape(len(error), cfg.horizon, -1) * batch.valid[..., None]
    loss = error.mean()
    return loss, {"flow_loss": loss}


def aggregate(q, cfg):
    """One value of K, [K, ...] -> [...]."""
    return q.min(axis=0) if cfg.q_agg == "min" else q.mean(axis=0)


def integrate(apply_fn, params, observation, noise, cfg):
    """F: the action that the flow makes of noise, by Euler's method, [..., O], [..., A]."""
    x = noise
    for i in range(cfg.flow_steps):  # unrolled: a handful of matrix products each
        time = jnp.full((*x.shape[:-1], 1), i / cfg.flow_steps)
        x = x + apply_fn(params, observation, x, time) / cfg.flow_steps
    return x.clip(-1.0, 1.0)


def sample_chunk(apply_fn, params, observation, key, critic, cfg):
    """A chunk of the policy, [..., O] -> [..., h A]: mu's, or of N of the flow's the best by Q."""
    params, critic_params = params
    if cfg.actor == "best_of_n":
        observation = jnp.broadcast_to(observation, (cfg.num_samples, *observation.shape))
    size = params["params"]["head"]["bias"].shape[-1]
    noise = jax.random.normal(key, (*observation.shape[:-1], size))
    if cfg.actor == "distill":
        return apply_fn(params, observation, noise).clip(-1.0, 1.0)
    action = integrate(apply_fn, params, observation, noise, cfg)  # [N, ..., h A]
    q = aggregate(critic(critic_params, observation, action), cfg)  # [N, ...]
    best = q.argmax(axis=0)[None, ..., None]
    return jnp.take_along_axis(action, best, axis=0)[0]


# --- Update -------------------------------------------------------------------------------------
def update(state, step, key, data, cfg):
    """One step of each network, all of them from the state before, on one batch. One seed.

    Randomness is a function of (key, step) alone, so neither the length of a chunk nor a resumed
    run changes the result. `key` is folded with the step, never split.
    """
    key_batch, *keys = jax.random.split(jax.random.fold_in(key, step), 4)
    batch = sample_batch(data, key_batch, cfg)
    critic_grads, critic_metrics = jax.grad(critic_loss, has_aux=True)(
        state.critic.params, state, batch, keys[0], cfg
    )
    actor, actor_metrics = state.actor, {}
    if cfg.actor == "distill":
        actor_grads, actor_metrics = jax.grad(actor_loss, has_aux=True)(
            state.actor.params, state, batch, keys[1], cfg
        )
        actor = actor.apply_gradients(grads=actor_grads)
    flow_grads, flow_metrics = jax.grad(flow_loss, has_aux=True)(
        state.flow.params, state, batch, keys[2], cfg
    )
    # Targets first: they follow the critics before their step.
    state = state._replace(critic=update_target(state.critic, cfg))
    state = State(
        actor,
        state.critic.apply_gradients(grads=critic_grads),
        state.flow.apply_gradients(grads=flow_grads),
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
def policy(apply_fn, params, observation, key, memory, reward, critic, cfg):
    """Next action in [-1, 1] of the chunk in memory, after h of them a new one, random by `key`.

    `memory`: chunk [..., h, A] and steps made, alike in all environments. `reward` is not used.
    """
    chunk, step = memory

    def replan():
        return sample_chunk(apply_fn, params, observation, key, critic, cfg).reshape(chunk.shape)

    chunk = jax.lax.cond(step % cfg.horizon == 0, replan, lambda: chunk)
    return chunk[..., step % cfg.horizon, :], (chunk, step + 1)


def policy_params(state):
    if state.actor is None:
        return state.flow.params, state.critic.params
    return state.actor.params, None


# --- Training -----------------------------------------------------------------------------------
def chunked(dataset, cfg):
    """Chunks of a data set, one from each row on."""
    rows = dataset.transitions
    # They go on past a termination inside an episode, as OGBench's data do after a success.
    endless = replace(dataset, transitions=rows._replace(termination=0 * rows.termination))
    index, valid = datasets.chunks(endless, cfg.horizon)
    actions, reward, alive = [], 0.0, 1.0
    for k in range(cfg.horizon):
        row = (index[:, 0] + k).clip(max=len(index) - 1)
        actions.append(rows.action[row])
        reward = reward + cfg.discount**k * alive * valid[:, k] * rows.reward[row]
        alive = alive * (1.0 - valid[:, k] * rows.termination[row])
    action, after = jnp.concatenate(actions, axis=-1), rows.next_observation[row]
    return Chunks(rows.observation, action, reward, after, 1.0 - alive, valid)


def train(cfg, options):
    """Train every seed of `cfg` and return its final normalised scores, [S]."""
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps)
    action = dataset.transitions.action.clip(-1 + 1e-5, 1 - 1e-5)
    reward = dataset.transitions.reward + cfg.reward_shift
    if cfg.sparse_reward:
        reward = -(reward != 0).astype("float32")
    rows = dataset.transitions._replace(action=action, reward=reward)
    data = experiment.place(chunked(replace(dataset, transitions=rows), cfg), options)
    example = jax.tree.map(lambda x: x[:1], rows)
    init_keys, train_keys, policy_keys = experiment.streams(cfg.seeds, 3)  # [S] each
    create = partial(create_state, batch=example, cfg=cfg)
    state = jax.vmap(create)(init_keys)
    # Compiled once for all seeds. `update` shows which rows a step reads, for --data host.
    train_seeds = experiment.over_seeds(partial(train_chunk, cfg=cfg), update=update)
    act = partial(policy, state.flow.apply_fn, critic=state.critic.apply_fn, cfg=cfg)
    memory = jnp.zeros((cfg.eval_episodes, cfg.horizon, action.shape[-1])), jnp.int32(0)

    with (
        experiment.Run(cfg, options, dataset) as run,
        evaluation.Rollouts(dataset, act, policy_keys, cfg, memory) as rollouts,
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

# SPDX-License-Identifier: Apache-2.0
"""Decision Transformer (Chen et al., 2021): GPT clones actions given the return still to come.

Paper       https://arxiv.org/abs/2106.01345
Reference   https://github.com/kzl/decision-transformer (gym)
Run         python algorithms/dt.py --config configs/dt/mujoco.yaml
Parent      bc.py (200 lines)
Results     benchmarks/results
Deviations  windows are padded at their end in training, at their start in evaluation; the reference
            pads both at the start (masked: no difference). 1e-3 is added to the std, there 1e-6.
            One target return per run, there two. Left out, since without effect: heads for
            observations and returns, the keys' bias. Rows at a truncation are left out where their
            next observation is unknown (there: kept), and so their reward in the returns-to-go. An
            unfinished last episode is kept (there: left out).

Shapes: S seeds, N data, B batch, K context, T = 3 K tokens, D embedding, O observation, A action.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

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
    num_updates: int = 100_000  # gradient steps
    log_every: int = 1_000  # updates per compiled chunk, the unit of logging and saving
    eval_every: int = 10_000  # updates between evaluations
    eval_episodes: int = 100  # episodes per seed and evaluation
    batch_size: int = 64  # windows per update
    actor_learning_rate: float = 1e-4  # AdamW, see warm_up
    # DT
    context: int = 20  # K, steps of a window, three tokens each
    embedding: int = 128  # D, width of a token; four times that inside the blocks
    num_layers: int = 3  # blocks
    num_heads: int = 1  # of attention, D / num_heads wide each
    dropout: float | None = 0.1  # share dropped of tokens, attention and what blocks add; or None
    weight_decay: float = 1e-4  # of all parameters, times the learning rate
    warm_up: int = 10_000  # updates until the learning rate, rising linearly, is the full one
    max_gradient_norm: float = 0.25  # gradients are scaled down to it
    episode_length: int = 1_000  # timesteps with an embedding of their own; later ones share one
    reward_scale: float = 0.001  # multiplies the returns-to-go that the network sees
    target_return: float | None = None  # asked for in evaluation, unscaled; None: the data's best


# --- Networks -----------------------------------------------------------------------------------
def fan_in_uniform():
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # U(±1 / sqrt(fan in))


def uniform(bound):
    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def linear(fan_in, width):  # PyTorch's default
    return nn.Dense(width, kernel_init=fan_in_uniform(), bias_init=uniform(fan_in**-0.5))


def gpt_dense(width, use_bias=True):
    return nn.Dense(width, use_bias=use_bias, kernel_init=nn.initializers.normal(0.02))


def layer_norm():
    return nn.LayerNorm(epsilon=1e-5)


class Block(nn.Module):
    num_heads: int
    dropout: float

    @nn.compact
    def __call__(self, x, visible, train):  # [B T, D], [B, T, T] -> [B T, D]
        width, drop = x.shape[-1], partial(nn.Dropout(self.dropout), deterministic=not train)
        y = layer_norm()(x)
        query, value = jnp.split(gpt_dense(2 * width)(y), 2, axis=-1)
        key = gpt_dense(width, use_bias=False)(y)  # it would cancel in the softmax
        heads = (*visible.shape[:2], self.num_heads, width // self.num_heads)
        query, key, value = (y.reshape(heads) for y in (query, key, value))
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) / heads[-1] ** 0.5
        # A row per query, a column per key; those that must not be seen get a weight of exactly 0.
        weight = nn.softmax(jnp.where(visible[:, None], logits, jnp.finfo(logits.dtype).min))
        seen = jnp.einsum("bhqk,bkhd->bqhd", drop(weight), value).reshape(x.shape)
        x = x + drop(gpt_dense(width)(seen))
        y = nn.relu(gpt_dense(4 * width)(layer_norm()(x)))
        return x + drop(gpt_dense(width)(y))


class DecisionTransformer(nn.Module):
    embedding: int
    num_layers: int
    num_heads: int
    dropout: float
    episode_length: int
    reward_scale: float
    action_dim: int

    @nn.compact
    def __call__(self, observation, action, returns_to_go, timestep, train=False):  # -> [B, K, A]
        """Action of each step, from its return-to-go, its observation and what came before them.

        `timestep` below 0 is padding, which no other step sees.
        """
        time = nn.Embed(
            self.episode_length, self.embedding, embedding_init=nn.initializers.normal(1.0)
        )(timestep.clip(0, self.episode_length - 1))
        inputs = (self.reward_scale * returns_to_go[..., None], observation, action)
        tokens = [linear(x.shape[-1], self.embedding)(x) + time for x in inputs]  # [B, K, D] each
        # One axis of tokens: with two, XLA copies what the weights' gradients are made of.
        x = jnp.stack(tokens, axis=2).reshape(-1, self.embedding)  # [B T, D]
        order = jnp.arange(3 * timestep.shape[1])
        causal = order[:, None] >= order[None]
        visible = causal[None] & jnp.repeat(timestep >= 0, 3, axis=1)[:, None]  # [B, T, T]
        x = nn.Dropout(self.dropout)(layer_norm()(x), deterministic=not train)
        for _ in range(self.num_layers):
            x = Block(self.num_heads, self.dropout)(x, visible, train)
        x = layer_norm()(x)[1::3]  # of R_1, s_1, a_1, R_2, ... the observations
        output = jnp.tanh(linear(self.embedding, self.action_dim)(x))
        return output.reshape(action.shape)


# --- State --------------------------------------------------------------------------------------
class Steps(NamedTuple):
    """Steps in time order: the data, [N]; windows of them, [B, K]; a policy's memory, [E, K]."""

    observation: jax.Array  # [..., O] of mean 0 and std 1
    action: jax.Array  # [..., A]
    returns_to_go: jax.Array  # sum of the rewards from this step on, not discounted
    timestep: jax.Array  # int32, steps since the episode began; -1 is padding


class State(NamedTuple):
    actor: train_state.TrainState
    statistics: tuple[jax.Array, jax.Array]  # mean and std of the observations, [O] each


def normalise(data):
    """The data with observations of mean 0 and std 1, and that mean and std, [O] each."""
    mean = data.observation.mean(axis=0, dtype=float)
    std = data.observation.std(axis=0, dtype=float) + 1e-3
    observation = (data.observation - mean) / std
    next_observation = (data.next_observation - mean) / std
    data = data._replace(
        observation=observation.astype("float32"),
        next_observation=next_observation.astype("float32"),
    )
    return data, (mean, std)


def standardise(observation, statistics):
    """(observation - mean) / std, [..., O], with the statistics of the data."""
    mean = jnp.broadcast_to(statistics[0], observation.shape)
    std = jnp.broadcast_to(statistics[1], observation.shape)
    return (observation - mean) / std


def episode_steps(dataset, data):
    """Rows as steps of their episodes, [N]."""
    starts, ends = datasets.episodes(dataset)
    timestep = jnp.arange(ends[-1]) - jnp.repeat(starts, ends - starts)
    returns_to_go = jnp.asarray(datasets.returns_to_go(dataset))
    return Steps(data.observation, data.action, returns_to_go, timestep)


def blank_steps(count, batch, target_return, cfg):
    """Padding only, [count, K], with the return that is asked for. `batch` supplies shapes only."""
    shape = (count, cfg.context)
    return Steps(
        jnp.zeros((*shape, batch.observation.shape[-1])),
        jnp.zeros((*shape, batch.action.shape[-1])),
        jnp.full(shape, target_return, jnp.float32),
        jnp.full(shape, -1, jnp.int32),
    )


def create_state(key, batch, cfg, statistics=(0.0, 1.0)):
    """State of one seed before the first update. `batch` supplies shapes only."""
    actor = DecisionTransformer(
        *(cfg.embedding, cfg.num_layers, cfg.num_heads, cfg.dropout or 0.0),
        *(cfg.episode_length, cfg.reward_scale, batch.action.shape[-1]),
    )
    actor_params = actor.init(key, *blank_steps(1, batch, 0.0, cfg))

    def rate(step):
        return cfg.actor_learning_rate * jnp.minimum((step + 1) / cfg.warm_up, 1.0)

    adam = optax.chain(
        optax.clip_by_global_norm(cfg.max_gradient_norm),
        optax.adamw(rate, weight_decay=cfg.weight_decay),
    )
    return State(
        train_state.TrainState.create(apply_fn=actor.apply, params=actor_params, tx=adam),
        tuple(jnp.broadcast_to(x, batch.observation.shape[-1:]) for x in statistics),
    )


# --- Losses -------------------------------------------------------------------------------------
def actor_loss(params, state, batch, key, cfg):
    """(pi(R_1, s_1, a_1, ..., R_t, s_t) - a_t)^2, mean over A and the steps that are no padding."""
    output = state.actor.apply_fn(params, *batch, train=True, rngs={"dropout": key})  # [B, K, A]
    chex.assert_equal_shape([output, batch.action])
    error = jnp.square(output - batch.action).mean(axis=-1)
    valid = batch.timestep >= 0
    chex.assert_equal_shape([error, valid, batch.returns_to_go])
    loss = (valid * error).sum() / valid.sum()
    return loss, {"actor_loss": loss}


# --- Update -------------------------------------------------------------------------------------
def update(state, step, key, data, cfg):
    """One gradient step. One seed.

    Randomness is a function of (key, step) alone, so neither the length of a chunk nor a resumed
    run changes the result. `key` is folded with the step, never split.
    """
    key_batch, key_dropout = jax.random.split(jax.random.fold_in(key, step))
    # Any row of the data may begin a window: episodes count by their length.
    index = jax.random.randint(key_batch, (cfg.batch_size,), 0, len(data.timestep))
    batch = windows(data, index, cfg)
    grads, metrics = jax.grad(actor_loss, has_aux=True)(
        state.actor.params, state, batch, key_dropout, cfg
    )
    return state._replace(actor=state.actor.apply_gradients(grads=grads)), metrics


def windows(data, index, cfg):
    """The K steps from each row of `index` [B] on, [B, K]; past the end of its episode, padding."""
    offset = jnp.arange(cfg.context)[None]
    rows = (index[:, None] + offset).clip(max=len(data.timestep) - 1)
    batch = jax.tree.map(lambda x: x[rows], data)
    same = batch.timestep == batch.timestep[:, :1] + offset  # episode
    return batch._replace(timestep=jnp.where(same, batch.timestep, -1))


def train_chunk(state, key, start, data, cfg):
    """`log_every` updates of one seed, compiled as one program. Metrics are chunk means."""
    steps = start + jnp.arange(cfg.log_every)
    state, metrics = jax.lax.scan(partial(update, key=key, data=data, cfg=cfg), state, steps)
    return state, jax.tree.map(jnp.mean, metrics)


# --- Policy -------------------------------------------------------------------------------------
def policy(apply_fn, params, observation, key, memory, reward):
    """Action in [-1, 1], [E, O] -> [E, A], and the memory of it, [E, K] Steps. No use of `key`.

    The `reward` [E] of the step before is taken off the return that is asked for.
    """
    actor_params, statistics = params
    now = Steps(
        standardise(observation, statistics),
        jnp.zeros_like(memory.action[:, -1]),  # not known yet and not seen
        memory.returns_to_go[:, -1] - reward,
        memory.timestep[:, -1] + 1,
    )
    memory = jax.tree.map(lambda x, new: jnp.append(x[:, 1:], new[:, None], axis=1), memory, now)
    action = apply_fn(actor_params, *memory)[:, -1]
    return action, memory._replace(action=memory.action.at[:, -1].set(action))


def policy_params(state):
    return state.actor.params, state.statistics


# --- Training -----------------------------------------------------------------------------------
def train(cfg, options):
    """Train every seed of `cfg` and return its final normalised scores, [S]."""
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps)
    data, statistics = normalise(dataset.transitions)
    data = experiment.place(episode_steps(dataset, data), options)
    example = jax.tree.map(lambda x: x[:1], data)
    init_keys, train_keys, policy_keys = experiment.streams(cfg.seeds, 3)  # [S] each
    create = partial(create_state, batch=example, cfg=cfg, statistics=statistics)
    state = jax.vmap(create)(init_keys)
    # Compiled once for all seeds. `update` shows which rows a step reads, for --data host.
    train_seeds = experiment.over_seeds(partial(train_chunk, cfg=cfg), update=update)
    act = partial(policy, state.actor.apply_fn)
    # of what it was trained on
    best = float(data.returns_to_go[datasets.episodes(dataset)[0]].max())
    target_return = best if cfg.target_return is None else cfg.target_return
    memory = blank_steps(cfg.eval_episodes, example, target_return, cfg)

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

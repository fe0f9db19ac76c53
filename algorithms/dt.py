# SPDX-License-Identifier: Apache-2.0
"""Decision Transformer (Chen et al., 2021): a GPT predicts actions from the return asked for.

Paper       https://arxiv.org/abs/2106.01345
Reference   https://github.com/kzl/decision-transformer (gym)
Run         python algorithms/dt.py --config configs/dt/mujoco.yaml
Parent      bc.py (277 lines)
Results     docs/results.md
Deviations  Training pads windows at their end, the reference at their start; padding is masked, so
            this has no effect. The keys' bias and the heads for observations and returns have none
            either and are left out. 1e-3 is added to the std, not 1e-6. `dropout` is that of the
            tokens too, for which the reference always has 0.1. A run has one target return, not
            two. A row at a truncation is dropped if its next observation is unknown, and its reward
            is missing in the returns-to-go (the reference keeps both). An unfinished last episode
            is kept (the reference drops it).

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
    dataset: str = "local/pointmaze/umaze-v0"  # data set id or path, see docs/data.md
    seeds: tuple[int, ...] = (0,)  # trained in parallel
    num_updates: int = 100_000  # gradient steps
    log_every: int = 1_000  # updates per compiled chunk, the unit of logging and saving
    eval_every: int = 10_000  # updates between evaluations
    eval_episodes: int = 100  # episodes per seed and evaluation
    batch_size: int = 64  # windows per update
    actor_learning_rate: float = 1e-4  # AdamW, see warm_up
    # DT
    context: int = 20  # K, steps per window; each step is three tokens
    embedding: int = 128  # D, width of a token; the hidden layer of a block is 4 D wide
    num_layers: int = 3  # number of transformer blocks
    num_heads: int = 1  # attention heads per block, each D / num_heads wide
    dropout: float | None = 0.1  # rate for tokens, attention weights and block outputs; None: off
    weight_decay: float = 1e-4  # of AdamW, for all parameters
    warm_up: int = 10_000  # updates over which the learning rate rises linearly to its full value
    max_gradient_norm: float = 0.25  # larger gradients are scaled down to this norm
    episode_length: int = 1_000  # number of timestep embeddings; later timesteps share the last
    reward_scale: float = 0.001  # multiplies the returns-to-go that the network sees
    target_return: float | None = None  # asked for in evaluation, unscaled; None: best in the data


# --- Networks -----------------------------------------------------------------------------------
def fan_in_uniform():
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # U(±1 / sqrt(fan in))


def uniform(bound):
    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def linear(fan_in, width):  # PyTorch's default initialisation
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
        batch_size, num_tokens, _ = visible.shape
        width = x.shape[-1]
        head_width = width // self.num_heads
        by_head = (batch_size, num_tokens, self.num_heads, head_width)
        dropout = nn.Dropout(self.dropout, deterministic=not train)

        # Queries and values are the two halves of one layer's output. The keys' layer is apart
        # because it has no bias: a bias there would cancel in the softmax.
        y = layer_norm()(x)
        query_and_value = gpt_dense(2 * width)(y)
        query, value = jnp.split(query_and_value, 2, axis=-1)
        key = gpt_dense(width, use_bias=False)(y)
        query = query.reshape(by_head)  # [B T, D] -> [B, T, heads, D / heads]
        key = key.reshape(by_head)
        value = value.reshape(by_head)

        # Attention: a row of the logits per query, a column per key. The mask makes the weight of
        # an invisible token exactly 0.
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) / head_width**0.5  # [B, heads, T, T]
        logits = jnp.where(visible[:, None], logits, jnp.finfo(logits.dtype).min)
        weight = dropout(nn.softmax(logits))
        attended = jnp.einsum("bhqk,bkhd->bqhd", weight, value)
        attended = gpt_dense(width)(attended.reshape(x.shape))  # [B T, D]
        x = x + dropout(attended)

        # The feed-forward network of each token.
        y = layer_norm()(x)
        y = nn.relu(gpt_dense(4 * width)(y))
        y = gpt_dense(width)(y)
        return x + dropout(y)


class DecisionTransformer(nn.Module):
    embedding: int
    num_layers: int
    num_heads: int
    dropout: float
    episode_length: int
    reward_scale: float
    action_dim: int

    @nn.compact
    def __call__(self, steps, train=False):  # Steps, [B, K] -> actions, [B, K, A]
        """Each action is predicted from its step's return-to-go and observation and what precedes.

        Steps with a timestep below 0 are padding, which no other step sees.
        """
        embed_timestep = nn.Embed(
            num_embeddings=self.episode_length,
            features=self.embedding,
            embedding_init=nn.initializers.normal(1.0),
        )
        time = embed_timestep(steps.timestep.clip(0, self.episode_length - 1))  # [B, K, D]
        returns_to_go = self.reward_scale * steps.returns_to_go[..., None]  # [B, K, 1]
        observation_dim = steps.observation.shape[-1]

        # Three tokens per step, [B, K, D] each.
        return_token = linear(1, self.embedding)(returns_to_go) + time
        observation_token = linear(observation_dim, self.embedding)(steps.observation) + time
        action_token = linear(self.action_dim, self.embedding)(steps.action) + time
        tokens = jnp.stack([return_token, observation_token, action_token], axis=2)
        # B and T share one axis: with two, XLA copies the inputs of the weights' gradients.
        x = tokens.reshape(-1, self.embedding)  # [B, K, 3, D] -> [B T, D]

        # A token sees itself and those before it, padding aside.
        order = jnp.arange(3 * steps.timestep.shape[1])
        causal = order[:, None] >= order[None]  # [T, T], query and key
        is_step = jnp.repeat(steps.timestep >= 0, 3, axis=1)  # [B, K] -> [B, T]
        visible = causal[None] & is_step[:, None]  # [B, T, T]

        x = layer_norm()(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        for _ in range(self.num_layers):
            x = Block(self.num_heads, self.dropout)(x, visible, train)
        x = layer_norm()(x)
        x = x[1::3]  # of R_1, s_1, a_1, R_2, s_2, ... the observations; [B T, D] -> [B K, D]
        output = jnp.tanh(linear(self.embedding, self.action_dim)(x))
        return output.reshape(steps.action.shape)


# --- State --------------------------------------------------------------------------------------
class Steps(NamedTuple):
    """Steps in time order: the data [N], windows of it [B, K], or the policy's memory [E, K]."""

    observation: jax.Array  # [..., O], normalised
    action: jax.Array  # [..., A]
    returns_to_go: jax.Array  # sum of the rewards from this step on, not discounted
    timestep: jax.Array  # int32, number of steps since the start of the episode; -1: padding


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
    """The rows of the data as steps of their episodes, [N]."""
    starts, ends = datasets.episodes(dataset)
    timestep = jnp.arange(ends[-1]) - jnp.repeat(starts, ends - starts)
    returns_to_go = jnp.asarray(datasets.returns_to_go(dataset))
    return Steps(
        observation=data.observation,
        action=data.action,
        returns_to_go=returns_to_go,
        timestep=timestep,
    )


def blank_steps(count, batch, target_return, cfg):
    """A memory of padding only, [count, K], that asks for the target return.

    `batch` supplies shapes only.
    """
    observation_dim = batch.observation.shape[-1]
    action_dim = batch.action.shape[-1]
    return Steps(
        observation=jnp.zeros((count, cfg.context, observation_dim)),
        action=jnp.zeros((count, cfg.context, action_dim)),
        returns_to_go=jnp.full((count, cfg.context), target_return, jnp.float32),
        timestep=jnp.full((count, cfg.context), -1, jnp.int32),
    )


def create_state(key, batch, cfg, statistics=(0.0, 1.0)):
    """State of one seed before the first update. `batch` supplies shapes only."""
    actor = DecisionTransformer(
        embedding=cfg.embedding,
        num_layers=cfg.num_layers,
        num_heads=cfg.num_heads,
        dropout=cfg.dropout or 0.0,
        episode_length=cfg.episode_length,
        reward_scale=cfg.reward_scale,
        action_dim=batch.action.shape[-1],
    )
    example_steps = blank_steps(1, batch, 0.0, cfg)
    actor_params = actor.init(key, example_steps)

    def learning_rate(step):
        return cfg.actor_learning_rate * jnp.minimum((step + 1) / cfg.warm_up, 1.0)

    actor_adam = optax.chain(
        optax.clip_by_global_norm(cfg.max_gradient_norm),
        optax.adamw(learning_rate, weight_decay=cfg.weight_decay),
    )
    mean, std = statistics
    observation_shape = batch.observation.shape[-1:]
    return State(
        actor=train_state.TrainState.create(
            apply_fn=actor.apply, params=actor_params, tx=actor_adam
        ),
        statistics=(
            jnp.broadcast_to(mean, observation_shape),
            jnp.broadcast_to(std, observation_shape),
        ),
    )


# --- Losses -------------------------------------------------------------------------------------
def actor_loss(params, state, batch, key, cfg):
    """(pi(R_1, s_1, a_1, ..., R_t, s_t) - a_t)^2, mean over A and all steps except padding."""
    output = state.actor.apply_fn(params, batch, train=True, rngs={"dropout": key})  # [B, K, A]
    chex.assert_equal_shape([output, batch.action])
    error = jnp.square(output - batch.action).mean(axis=-1)  # [B, K]
    is_step = batch.timestep >= 0  # [B, K]
    chex.assert_equal_shape([error, is_step, batch.returns_to_go])
    loss = (is_step * error).sum() / is_step.sum()
    return loss, {"actor_loss": loss}


# --- Update -------------------------------------------------------------------------------------
def update(state, step, key, data, cfg):
    """One gradient step of the transformer on a batch of windows. One seed.

    Randomness is a function of (key, step) alone, so neither the length of a chunk nor a resumed
    run changes the result. The key of a step is fold_in(key, step).
    """
    key_batch, key_dropout = jax.random.split(jax.random.fold_in(key, step))
    # A window may begin at any row, so episodes are drawn in proportion to their length.
    index = jax.random.randint(key_batch, (cfg.batch_size,), 0, len(data.timestep))
    batch = windows(data, index, cfg)
    grads, metrics = jax.grad(actor_loss, has_aux=True)(
        state.actor.params, state, batch, key_dropout, cfg
    )
    state = state._replace(actor=state.actor.apply_gradients(grads=grads))
    return state, metrics


def windows(data, index, cfg):
    """The K steps from each row of `index` [B] on, [B, K]. Beyond the episode's end is padding."""
    offset = jnp.arange(cfg.context)[None]  # [1, K]
    rows = (index[:, None] + offset).clip(max=len(data.timestep) - 1)  # [B, K]
    batch = jax.tree.map(lambda column: column[rows], data)
    same_episode = batch.timestep == batch.timestep[:, :1] + offset  # else another one has begun
    return batch._replace(timestep=jnp.where(same_episode, batch.timestep, -1))


def train_chunk(state, key, start, data, cfg):
    """`log_every` updates of one seed, compiled as one program. Metrics are chunk means."""
    steps = start + jnp.arange(cfg.log_every)
    state, metrics = jax.lax.scan(partial(update, key=key, data=data, cfg=cfg), state, steps)
    return state, jax.tree.map(jnp.mean, metrics)


# --- Policy -------------------------------------------------------------------------------------
def policy(apply_fn, params, observation, key, memory, reward):
    """Action in [-1, 1], [E, O] -> [E, A], and the memory with this step in it, Steps [E, K].

    The `reward` [E] of the previous step reduces the return asked for. `key` is not used.
    """
    actor_params, statistics = params
    step = Steps(
        observation=standardise(observation, statistics),
        action=jnp.zeros_like(memory.action[:, -1]),  # not known yet; its own prediction ignores it
        returns_to_go=memory.returns_to_go[:, -1] - reward,
        timestep=memory.timestep[:, -1] + 1,
    )

    def append(column, new):  # [E, K, ...], [E, ...]: the oldest step makes room for the new one
        return jnp.append(column[:, 1:], new[:, None], axis=1)

    memory = jax.tree.map(append, memory, step)
    output = apply_fn(actor_params, memory)  # [E, K, A]
    action = output[:, -1]
    return action, memory._replace(action=memory.action.at[:, -1].set(action))


def policy_params(state):
    return state.actor.params, state.statistics


def policy_fn(state, cfg):
    """`policy` with the networks filled in.

    (params, observation, key, memory, reward) -> (action, memory)
    """
    return partial(policy, state.actor.apply_fn)


def initial_memory(count, batch, cfg, target_return):
    """The memory with which `count` episodes begin. `batch` supplies shapes only."""
    return blank_steps(count, batch, target_return, cfg)


# --- Training -----------------------------------------------------------------------------------
def train(cfg, options):
    """Train every seed of `cfg` and return its final normalised scores, [S]."""
    experiment.check(cfg, options)
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps)
    data, statistics = normalise(dataset.transitions)
    data = experiment.place(episode_steps(dataset, data), options)
    example = jax.tree.map(lambda x: x[:1], data)  # one row, for its shapes
    init_keys, train_keys, policy_keys = experiment.streams(cfg.seeds, 3)  # [S] keys each
    create = partial(create_state, batch=example, cfg=cfg, statistics=statistics)
    state = jax.vmap(create)(init_keys)
    # Compiled once for all seeds. `update` shows which rows a step reads, for --data host.
    train_seeds = experiment.over_seeds(partial(train_chunk, cfg=cfg), update=update)
    act = policy_fn(state, cfg)
    target_return = cfg.target_return
    if target_return is None:
        starts, _ = datasets.episodes(dataset)
        target_return = float(data.returns_to_go[starts].max())  # the best of the data
    memory = initial_memory(cfg.eval_episodes, example, cfg, target_return)

    with (
        experiment.Run(cfg, options, dataset, {"target_return": target_return}) as run,
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

# SPDX-License-Identifier: Apache-2.0
"""Trajectory Transformer (Janner et al., 2021): a GPT models trajectories, beam search plans in it.

Paper       https://arxiv.org/abs/2106.02039
Reference   https://github.com/jannerm/trajectory-transformer
Run         python algorithms/trajectory_transformer.py
Parent      dt.py (546 lines)
Results     docs/results.md
Deviations  The learning rate follows the updates, the reference's the tokens so far, by which it
            lags one update behind (and the first one has the full rate). As there, the cosine is
            not held at its end: the rate rises again. Batches are drawn with replacement, and
            windows may begin at an episode's last row. No token after a truncation counts; the
            reference counts the first. With rows that are no multiple of V the bins are all used.
            The keys' bias cancels in the softmax and is left out. What is said in dt.py about rows
            at a truncation holds here as well.

Shapes: S seeds, N data, B batch, K context, O observation, A action, M = O + A + 2 numbers of a
transition (with reward and value), V bins, T tokens, D embedding, E episodes, P beams, H horizon of
a plan, C transitions that a plan's step is predicted from, its own among them.
"""

import dataclasses
import time
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

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
    num_updates: int = 195_000  # gradient steps
    log_every: int = 1_000  # updates per compiled chunk, the unit of logging and saving
    eval_every: int = 195_000  # updates between evaluations; each takes long, see plan_horizon
    eval_episodes: int = 5  # episodes per seed and evaluation
    batch_size: int = 256  # windows per update
    actor_learning_rate: float = 6e-4  # AdamW, see warm_up and decay_updates
    # Trajectory Transformer
    context: int = 10  # K, transitions per window; each is M tokens
    embedding: int = 128  # D, width of a token; the hidden layer of a block is 4 D wide
    num_layers: int = 4  # number of transformer blocks
    num_heads: int = 4  # attention heads per block, each D / num_heads wide
    dropout: float | None = 0.1  # rate for tokens, attention weights and block outputs; None: off
    weight_decay: float = 0.1  # of AdamW, for matrices only
    warm_up: int = 3_906  # updates over which the learning rate rises linearly to its full value
    max_gradient_norm: float = 1.0  # larger gradients are scaled down to this norm
    discount: float = 0.99  # gamma, of the value tokens and of a plan's rewards
    decay_updates: int = 78_125  # updates after which a cosine has brought the rate to a tenth
    num_bins: int = 100  # V, bins of each number, with equally many rows of the data
    termination_reward: float | None = -100.0  # replaces the reward at a true end; None: kept
    action_weight: float = 5.0  # of the action tokens in the loss
    reward_weight: float = 1.0  # of the reward tokens
    value_weight: float = 1.0  # of the value tokens
    plan_horizon: int = 15  # H, transitions per plan; one plan is H (1 + M) calls of the network
    plan_context: int = 5  # C, at least 2 and at most the context
    beam_width: int = 128  # P, sequences that are kept after each transition
    num_expand: int = 2  # sequences that each beam is continued to before the best are kept
    observation_top_k: int | None = 1  # most likely bins that observations are drawn from; None: V
    action_top_k: int | None = None  # the same for actions
    action_cdf: float | None = 0.6  # share of the probability, of the least likely, left out


# --- Networks -----------------------------------------------------------------------------------
def uniform(bound):
    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def gpt_dense(width, use_bias=True):
    return nn.Dense(width, use_bias=use_bias, kernel_init=nn.initializers.normal(0.02))


def layer_norm():
    return nn.LayerNorm(epsilon=1e-5)


class CachedBlock(nn.Module):
    num_heads: int
    dropout: float

    @nn.compact
    def __call__(self, x, visible, train, cache, first):
        """[B, T, D] -> [B, T, D] and the cache, with the tokens at slots `first`, `first` + 1, ...

        The cache has keys and values of all slots, [B, slots, heads, D / heads] each; without one
        (None) the T tokens see each other only. `visible` is [T, slots] or [T, T].
        """
        batch_size, num_tokens, width = x.shape
        head_width = width // self.num_heads
        by_head = (batch_size, num_tokens, self.num_heads, head_width)
        dropout = nn.Dropout(self.dropout, deterministic=not train)

        # Queries and values are the two halves of one layer's output. The keys' layer is apart
        # because it has no bias: a bias there would cancel in the softmax.
        y = layer_norm()(x)
        query_and_value = gpt_dense(2 * width)(y)
        query, value = jnp.split(query_and_value, 2, axis=-1)
        key = gpt_dense(width, use_bias=False)(y)
        query = query.reshape(by_head)  # [B, T, D] -> [B, T, heads, D / heads]
        key = key.reshape(by_head)
        value = value.reshape(by_head)
        if cache is not None:
            old_key, old_value = cache
            key = jax.lax.dynamic_update_slice_in_dim(old_key, key, first, axis=1)
            value = jax.lax.dynamic_update_slice_in_dim(old_value, value, first, axis=1)
            cache = key, value

        # Attention: a row of the logits per query, a column per key. The mask makes the weight of
        # an invisible token exactly 0.
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) / head_width**0.5
        logits = jnp.where(visible[None, None], logits, jnp.finfo(logits.dtype).min)
        weight = dropout(nn.softmax(logits))
        attended = jnp.einsum("bhqk,bkhd->bqhd", weight, value)
        attended = gpt_dense(width)(attended.reshape(x.shape))
        x = x + dropout(attended)

        # The feed-forward network of each token.
        y = layer_norm()(x)
        y = nn.gelu(gpt_dense(4 * width)(y), approximate=False)
        y = gpt_dense(width)(y)
        return x + dropout(y), cache


class TrajectoryTransformer(nn.Module):
    embedding: int
    num_layers: int
    num_heads: int
    dropout: float
    context: int
    num_bins: int
    transition_dim: int

    @nn.compact
    def __call__(self, token, first=0, blank=0, caches=None, train=False):
        """Logits of the next token after each of `token`, [B, T] -> [B, T, V + 1], and the caches.

        The tokens are at slots `first`, `first` + 1, ... of a window that begins with a transition.
        Its first `blank` transitions are padding, which no token sees and no position counts. A
        call with `caches`, one per layer, also sees the tokens of the calls before.
        """
        num_bins, transition_dim = self.num_bins, self.transition_dim
        num_positions = self.context * transition_dim - 1
        slot = first + jnp.arange(token.shape[1])  # [T]
        dimension = slot % transition_dim

        # Every dimension has embeddings of its own; the token V, nothing after the end, has one.
        own = token + num_bins * dimension[None]  # [B, T]
        index = jnp.where(token == num_bins, num_bins * transition_dim, own)
        embed_token = nn.Embed(
            num_embeddings=num_bins * transition_dim + 1,
            features=self.embedding,
            embedding_init=nn.initializers.normal(0.02),
        )
        position_shape = (num_positions, self.embedding)
        embed_position = self.param("position", nn.initializers.zeros, position_shape)
        position = (slot - blank * transition_dim).clip(0, num_positions - 1)
        x = embed_token(index) + embed_position[position][None]  # [B, T, D]

        # A token sees itself and those before it, padding and values aside.
        num_slots = token.shape[1] if caches is None else caches[0][0].shape[1]
        key_slot = jnp.arange(num_slots)
        is_seen = (key_slot >= blank * transition_dim) & (
            key_slot % transition_dim != transition_dim - 1
        )
        visible = (slot[:, None] >= key_slot[None]) & is_seen[None]  # [T, slots]

        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        new_caches = []
        for i in range(self.num_layers):
            cache = None if caches is None else caches[i]
            x, cache = CachedBlock(self.num_heads, self.dropout)(x, visible, train, cache, first)
            new_caches.append(cache)
        x = layer_norm()(x)
        head_shape = (transition_dim, self.embedding, num_bins + 1)
        head = self.param("head", uniform(self.embedding**-0.5), head_shape)
        logits = jnp.einsum("btd,tdv->btv", x, head[dimension])  # each dimension has a head
        return logits, tuple(new_caches)


# --- State --------------------------------------------------------------------------------------
class Tokens(NamedTuple):
    """Steps in time order: the data [N], or windows of it [B, K]. Numbers of bins, int32."""

    observation: jax.Array  # [..., O]; in all four, V is nothing, after the end of the episode
    action: jax.Array  # [..., A]
    reward: jax.Array  # [...]
    value: jax.Array  # [...] discounted return from the next step on
    timestep: jax.Array  # int32, number of steps since the start of the episode
    termination: jax.Array  # float32, 1 at a true end


class PlanMemory(NamedTuple):
    """The last C transitions of E episodes. Of the newest, reward and value are not known yet."""

    token: jax.Array  # [E, C, M] int32
    steps: jax.Array  # [E] int32, steps since the start of the episode


class State(NamedTuple):
    actor: train_state.TrainState
    bins: jax.Array  # [V + 1, M], borders of the bins


def quantile_bins(numbers, num_bins):
    """Borders of bins with equally many of the rows, [N, M] -> [V + 1, M]."""
    rows = [i * len(numbers) // num_bins for i in range(num_bins)]
    lower = jnp.sort(numbers, axis=0)[jnp.array(rows)]
    return jnp.append(lower, numbers.max(axis=0, keepdims=True), axis=0)


def discretise(numbers, bins):
    """Numbers of the bins, [..., m] -> int32 [..., m]. Of several equal borders the last counts."""
    flat = numbers.reshape(-1, numbers.shape[-1])
    reached = jax.vmap(partial(jnp.searchsorted, side="right"), 1, 1)(bins, flat)
    token = (reached - 1).clip(0, len(bins) - 2).astype(jnp.int32)
    return token.reshape(numbers.shape)


def tokenised(dataset, cfg):
    """The rows of the data as tokens, [N], and the bins."""
    data, is_last = dataset.transitions, dataset.transitions.termination > 0
    reward = data.reward.copy()
    if cfg.termination_reward is not None:
        reward[is_last] = cfg.termination_reward
    dataset = dataclasses.replace(dataset, transitions=data._replace(reward=reward))
    returns_to_go = datasets.returns_to_go(dataset, cfg.discount)
    # A true end is the end of an episode of tokens, also where the recording goes on.
    is_last[dataset.episode_ends - 1] = True
    value = returns_to_go.copy()  # of a step: the discounted return from the next one on
    value[:-1] = returns_to_go[1:]
    value[is_last] = 0

    columns = data.observation, data.action, reward[:, None], value[:, None].astype(reward.dtype)
    numbers = jnp.concatenate([jnp.asarray(column) for column in columns], axis=1)  # [N, M]
    bins = quantile_bins(numbers, cfg.num_bins)
    token = discretise(numbers, bins)
    row = jnp.arange(len(is_last))
    begun = jnp.where(jnp.append(True, is_last[:-1]), row, 0)
    observation_dim = data.observation.shape[1]
    tokens = Tokens(
        observation=token[:, :observation_dim],
        action=token[:, observation_dim:-2],
        reward=token[:, -2],
        value=token[:, -1],
        timestep=row - jax.lax.cummax(begun),
        termination=jnp.asarray(data.termination),
    )
    return tokens, bins


def create_state(key, batch, cfg, bins=0.0):
    """State of one seed before the first update. `batch` supplies shapes only."""
    transition_dim = batch.observation.shape[-1] + batch.action.shape[-1] + 2
    actor = TrajectoryTransformer(
        embedding=cfg.embedding,
        num_layers=cfg.num_layers,
        num_heads=cfg.num_heads,
        dropout=cfg.dropout or 0.0,
        context=cfg.context,
        num_bins=cfg.num_bins,
        transition_dim=transition_dim,
    )
    actor_params = actor.init(key, jnp.zeros((1, transition_dim), jnp.int32))

    def learning_rate(step):
        done = step + 1
        progress = (done - cfg.warm_up) / max(1, cfg.decay_updates - cfg.warm_up)
        fallen = jnp.maximum(0.1, 0.5 * (1 + jnp.cos(jnp.pi * progress)))
        return cfg.actor_learning_rate * jnp.where(done < cfg.warm_up, done / cfg.warm_up, fallen)

    def is_matrix(path, _):
        return path[-1].key in ("kernel", "head")

    actor_adam = optax.chain(
        optax.clip_by_global_norm(cfg.max_gradient_norm),
        optax.adamw(
            learning_rate,
            b2=0.95,
            weight_decay=cfg.weight_decay,
            mask=partial(jax.tree_util.tree_map_with_path, is_matrix),
        ),
    )
    return State(
        actor=train_state.TrainState.create(
            apply_fn=actor.apply, params=actor_params, tx=actor_adam
        ),
        bins=jnp.broadcast_to(bins, (cfg.num_bins + 1, transition_dim)),
    )


# --- Losses -------------------------------------------------------------------------------------
def actor_loss(params, state, batch, valid, key, cfg):
    """-w log p(token_t | token_1, ..., token_t-1), mean over all tokens but a window's first.

    w is the weight of the token's kind, and 0 where `valid` [B, K] is 0.
    """
    sequence = flat_tokens(batch)  # [B, K M]
    logits, _ = state.actor.apply_fn(params, sequence[:, :-1], train=True, rngs={"dropout": key})
    target = sequence[:, 1:, None]  # [B, T, 1] with T = K M - 1
    log_prob = jnp.take_along_axis(nn.log_softmax(logits), target, axis=-1)[..., 0]  # [B, T]

    observation_weight = jnp.ones_like(batch.observation, valid.dtype)  # [B, K, O]
    action_weight = jnp.full_like(batch.action, cfg.action_weight, valid.dtype)
    reward_weight = jnp.full_like(batch.reward, cfg.reward_weight, valid.dtype)
    value_weight = jnp.full_like(batch.value, cfg.value_weight, valid.dtype)
    weight = batch._replace(
        observation=observation_weight * valid[..., None],
        action=action_weight * valid[..., None],
        reward=reward_weight * valid,
        value=value_weight * valid,
    )
    weight = flat_tokens(weight)[:, 1:]  # [B, T]
    chex.assert_equal_shape([log_prob, weight])
    loss = -(weight * log_prob).mean()
    return loss, {"actor_loss": loss}


def flat_tokens(batch):
    """The numbers of all steps in one sequence per window, [B, K M]."""
    parts = batch.observation, batch.action, batch.reward[..., None], batch.value[..., None]
    joined = jnp.concatenate(parts, axis=-1)  # [B, K, M]
    return joined.reshape(len(joined), -1)


# --- Update -------------------------------------------------------------------------------------
def update(state, step, key, data, cfg):
    """One gradient step of the transformer on a batch of windows. One seed.

    Randomness is a function of (key, step) alone, so neither the length of a chunk nor a resumed
    run changes the result. The key of a step is fold_in(key, step).
    """
    key_batch, key_dropout = jax.random.split(jax.random.fold_in(key, step))
    # A window may begin at any row, so episodes are drawn in proportion to their length.
    index = jax.random.randint(key_batch, (cfg.batch_size,), 0, len(data.timestep))
    batch, valid = token_windows(data, index, cfg)
    grads, metrics = jax.grad(actor_loss, has_aux=True)(
        state.actor.params, state, batch, valid, key_dropout, cfg
    )
    state = state._replace(actor=state.actor.apply_gradients(grads=grads))
    return state, metrics


def token_windows(data, index, cfg):
    """The K steps from each row of `index` [B] on, [B, K], and where the loss counts, [B, K].

    Beyond the episode's end is the token V. It counts after a termination: the network learns that
    nothing follows. It does not count after a truncation, since what would follow is not known.
    """
    offset = jnp.arange(cfg.context)[None]  # [1, K]
    rows = (index[:, None] + offset).clip(max=len(data.timestep) - 1)  # [B, K]
    batch = jax.tree.map(lambda column: column[rows], data)
    chex.assert_equal_shape([batch.reward, batch.value, batch.timestep, batch.termination])
    same_episode = batch.timestep == batch.timestep[:, :1] + offset  # else another one has begun
    terminated = jnp.cumsum(same_episode * batch.termination, axis=1) > 0
    valid = (same_episode | terminated).astype(batch.termination.dtype)
    batch = batch._replace(
        observation=jnp.where(same_episode[..., None], batch.observation, cfg.num_bins),
        action=jnp.where(same_episode[..., None], batch.action, cfg.num_bins),
        reward=jnp.where(same_episode, batch.reward, cfg.num_bins),
        value=jnp.where(same_episode, batch.value, cfg.num_bins),
    )
    return batch, valid


def train_chunk(state, key, start, data, cfg):
    """`log_every` updates of one seed, compiled as one program. Metrics are chunk means."""
    steps = start + jnp.arange(cfg.log_every)
    state, metrics = jax.lax.scan(partial(update, key=key, data=data, cfg=cfg), state, steps)
    return state, jax.tree.map(jnp.mean, metrics)


# --- Policy -------------------------------------------------------------------------------------
def policy(apply_fn, params, observation, key, memory, reward, cfg):
    """First action of the best plan, in [-1, 1], [E, O] -> [E, A], and the memory, PlanMemory [E].

    The `reward` [E] of the previous step completes the memory's newest transition.
    """
    actor_params, bins = params
    observation_dim = observation.shape[-1]
    observation_token = discretise(observation, bins[:, :observation_dim])  # [E, O]
    reward_token = discretise(reward[:, None], bins[:, -2:-1])[:, 0]  # [E]
    # The value of a step in the past stays 0: no token sees it.
    token = memory.token.at[:, -1, -2].set(reward_token)
    token = jnp.append(token[:, 1:], jnp.zeros_like(token[:, :1]), axis=1)
    token = token.at[:, -1, :observation_dim].set(observation_token)
    known = jnp.minimum(memory.steps, cfg.plan_context - 1)

    network = partial(apply_fn, actor_params)
    search = partial(beam_search, network, bins=bins, cfg=cfg)
    keys = jax.random.split(key, len(observation))
    plan = jax.vmap(search)(token[:, :-1], known, observation_token, keys)  # [E, H, M]

    action_token = plan[:, 0, observation_dim:-2]  # [E, A]
    action_bins = bins[:, observation_dim:-2]
    number = action_token.clip(max=cfg.num_bins - 1)  # the token V has no action
    action = jnp.take_along_axis(centres(action_bins), number, axis=0)
    token = token.at[:, -1, observation_dim:-2].set(discretise(action, action_bins))
    return action, PlanMemory(token, memory.steps + 1)


def centres(bins):
    """Where bins have their middle, [V + 1, m] -> [V, m]."""
    return (bins[:-1] + bins[1:]) / 2


def beam_search(network, token, known, observation, key, bins, cfg):
    """The plan with the highest sum of rewards and last value that the search finds, [H, M].

    It continues `observation` [O] after the transitions `token` [C - 1, M], of which the last
    `known` are no padding. sum_i gamma^i r_i + gamma^(t + 1) V_t ranks the beams after transition
    t, with the means of the network's distributions of r and V.

    Positions count from the window's first transition, so all of them move with every transition.
    Hence a window's keys and values are computed anew for each transition of the plan, and cached
    for the M tokens of that transition.
    """
    num_past, transition_dim = token.shape
    observation_dim = len(observation)
    action_dim = transition_dim - observation_dim - 2
    reward_centres, value_centres = centres(bins[:, -2:]).T  # [V] each

    def one_transition(carry, t):
        sequence, gained = carry  # [P, C - 1 + H, M], [P] rewards before t
        key_t = jax.random.fold_in(key, t)
        key_observation, key_action, key_value = jax.random.split(key_t, 3)
        blank = jnp.maximum(num_past - known - t, 0)
        past = jax.lax.dynamic_slice_in_dim(sequence, t, num_past, axis=1)
        beams = read(network, past.reshape(cfg.beam_width, -1), blank, cfg)

        # The observation comes first, given or predicted.
        given = jnp.where(t == 0, observation, -1)
        here, top_k = num_past * transition_dim, cfg.observation_top_k
        beams, observations, _ = write(
            network, beams, key_observation, here, observation_dim, blank, top_k, None, given
        )
        # Several continuations of every beam.
        copies = (beams, observations, sequence, gained)
        copies = jax.tree.map(lambda x: jnp.concatenate([x] * cfg.num_expand), copies)
        beams, observations, sequence, gained = copies
        here, top_k, cdf = here + observation_dim, cfg.action_top_k, cfg.action_cdf
        beams, actions, _ = write(network, beams, key_action, here, action_dim, blank, top_k, cdf)
        here += action_dim
        _, outcome, prob = write(network, beams, key_value, here, 2, blank, 1)

        # The token V has no part in the means, so what follows a predicted end is worth 0.
        reward = prob[:, 0, :-1] @ reward_centres  # [n P]
        value = prob[:, 1, :-1] @ value_centres
        gained = gained + cfg.discount**t * reward
        best_value, best = jax.lax.top_k(gained + cfg.discount ** (t + 1) * value, cfg.beam_width)
        transition = jnp.concatenate([observations, actions, outcome], axis=1)  # [n P, M]
        sequence = jax.lax.dynamic_update_slice_in_dim(
            sequence, transition[:, None], num_past + t, axis=1
        )
        return (sequence[best], gained[best]), best_value[0]

    sequence = jnp.zeros((cfg.beam_width, num_past + cfg.plan_horizon, transition_dim), jnp.int32)
    sequence = sequence.at[:, :num_past].set(token[None])
    carry = sequence, jnp.zeros(cfg.beam_width, bins.dtype)
    (sequence, _), _ = jax.lax.scan(one_transition, carry, jnp.arange(cfg.plan_horizon))
    return sequence[0, num_past:]  # top_k sorts: the first one is the best


class Beams(NamedTuple):
    """Sequences of tokens as the network has read them."""

    logits: jax.Array  # [P, V + 1] of the next token
    caches: tuple  # keys and values of each layer, [P, C M, heads, D / heads] each


def read(network, token, blank, cfg):
    """Beams that have read the past of a window, [P, (C - 1) M]; room for one more transition."""
    num_tokens = token.shape[1] // (cfg.plan_context - 1) * cfg.plan_context
    head_width = cfg.embedding // cfg.num_heads
    empty = jnp.zeros((len(token), num_tokens, cfg.num_heads, head_width))
    caches = ((empty, empty),) * cfg.num_layers
    logits, caches = network(token, 0, blank, caches)
    return Beams(logits[:, -1], caches)


def write(network, beams, key, first, count, blank, top_k, cdf=None, given=None):
    """Continue beams by `count` tokens from slot `first` on, drawn or, where not below 0, given.

    Returns the beams, their tokens [P, count], and the distributions [P, count, V + 1] before
    `top_k` and `cdf` narrow them.
    """
    given = jnp.full(count, -1) if given is None else given

    def one_token(beams, i):
        drawn = jax.random.categorical(jax.random.fold_in(key, i), likely(beams.logits, top_k, cdf))
        token = jnp.where(given[i] < 0, drawn, given[i]).astype(jnp.int32)  # [P]
        prob = nn.softmax(beams.logits)
        logits, caches = network(token[:, None], first + i, blank, beams.caches)
        return Beams(logits[:, 0], caches), (token, prob)

    beams, (tokens, probs) = jax.lax.scan(one_token, beams, jnp.arange(count))
    return beams, tokens.T, probs.swapaxes(0, 1)


def likely(logits, top_k=None, cdf=None):
    """Logits [P, V + 1] without the least likely tokens, which have the probability `cdf` together,
    and without all but the `top_k` most likely; None keeps them."""
    if cdf is not None:
        prob = nn.softmax(logits)
        ascending = jnp.sort(prob, axis=-1)
        below = jnp.cumsum(ascending, axis=-1) < cdf
        last_below = jnp.maximum(below.sum(axis=-1, keepdims=True) - 1, 0)
        largest = jnp.take_along_axis(ascending, last_below, axis=-1)  # [P, 1]
        logits = jnp.where(prob <= largest, -1000.0, logits)
    if top_k is not None:
        smallest = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return logits


def policy_params(state):
    return state.actor.params, state.bins


def policy_fn(state, cfg):
    """`policy` with the networks filled in.

    (params, observation, key, memory, reward) -> (action, memory)
    """
    return partial(policy, state.actor.apply_fn, cfg=cfg)


def initial_memory(count, batch, cfg):
    """The memory with which `count` episodes begin. `batch` supplies shapes only."""
    transition_dim = batch.observation.shape[-1] + batch.action.shape[-1] + 2
    return PlanMemory(
        token=jnp.zeros((count, cfg.plan_context, transition_dim), jnp.int32),
        steps=jnp.zeros(count, jnp.int32),
    )


# --- Training -----------------------------------------------------------------------------------
def check_plans(cfg):
    """Exit with code 2 after one line where no plan can be made."""
    if not 2 <= cfg.plan_context <= cfg.context:
        fail(
            f"--plan-context {cfg.plan_context}: must be from 2 to --context {cfg.context}, the "
            "transitions that the network learns to see"
        )
    for name in ("observation_top_k", "action_top_k"):
        if (getattr(cfg, name) or 1) > cfg.num_bins:
            flag = "--" + name.replace("_", "-")
            fail(f"{flag} {getattr(cfg, name)}: must be at most --num-bins {cfg.num_bins}")


def say_cost(rollouts, params, dataset, cfg):
    """Print what an evaluation costs, from the time of one step of all its episodes."""
    if dataset.make_env is None or jax.process_index() > 0:
        return
    shape = len(cfg.seeds), cfg.eval_episodes
    _, observation_dim = dataset.transitions.observation.shape
    observation, reward = jnp.zeros((*shape, observation_dim)), jnp.zeros(shape)
    step = jnp.zeros((), jnp.uint32)
    past = rollouts.memory, reward
    arguments = params, observation, rollouts.keys, step, step, past
    arguments = jax.device_put(arguments, rollouts.cpu)
    for _ in range(2):  # the first call compiles
        began = time.perf_counter()
        jax.block_until_ready(rollouts.act(*arguments))
        seconds = time.perf_counter() - began
    transition_dim = observation_dim + dataset.transitions.action.shape[-1] + 2
    calls = cfg.plan_horizon * (1 + transition_dim)
    horizon = dataset.horizon or 1000
    print(
        f"planning: {calls} calls of the transformer with {cfg.beam_width} to "
        f"{cfg.beam_width * cfg.num_expand} sequences per env step, {seconds:.2f} s for a step of "
        f"all episodes: an evaluation takes at most {seconds * horizon / 60:.1f} min",
        flush=True,
    )


def train(cfg, options):
    """Train every seed of `cfg` and return its final normalised scores, [S]."""
    experiment.check(cfg, options)
    check_plans(cfg)
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps)
    data, bins = tokenised(dataset, cfg)
    data = experiment.place(data, options)
    example = jax.tree.map(lambda x: x[:1], data)  # one row, for its shapes
    init_keys, train_keys, policy_keys = experiment.streams(cfg.seeds, 3)  # [S] keys each
    create = partial(create_state, batch=example, cfg=cfg, bins=bins)
    state = jax.vmap(create)(init_keys)
    # Compiled once for all seeds. `update` shows which rows a step reads, for --data host.
    train_seeds = experiment.over_seeds(partial(train_chunk, cfg=cfg), update=update)
    act = policy_fn(state, cfg)
    memory = initial_memory(cfg.eval_episodes, example, cfg)
    cost_is_said = False

    with (
        experiment.Run(cfg, options, dataset) as run,
        evaluation.Rollouts(dataset, act, policy_keys, cfg, memory) as rollouts,
    ):
        state, metrics, start = run.restore(state)
        for step in run.boundaries(start):  # start, start + log_every, ..., num_updates
            run.save(step, state, metrics)
            scores = None
            if run.evaluates(step):
                if not cost_is_said:
                    say_cost(rollouts, policy_params(state), dataset, cfg)
                    cost_is_said = True
                scores = rollouts.start(policy_params(state), step)
            last_metrics = metrics  # of the chunk that ended at this step
            if step < cfg.num_updates:  # an accelerator trains while the CPU evaluates
                state, metrics = train_seeds(state, train_keys, step, data)
            run.log(step, last_metrics, scores)
    return run.scores


if __name__ == "__main__":
    train(*experiment.parse(Config))

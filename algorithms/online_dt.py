# SPDX-License-Identifier: Apache-2.0
"""Online Decision Transformer (Zheng et al., 2022): a stochastic DT that is fine-tuned online.

Paper       https://arxiv.org/abs/2202.05607
Reference   https://github.com/facebookresearch/online-dt
Run         python algorithms/online_dt.py --config configs/online_dt/pointmaze.yaml
Parent      dt.py (212 lines)
Results     docs/results.md
Deviations  Those of dt.py about windows, keys (which have a trust ratio of their own in LAMB), the
            std and rows at truncations. The entropy is a mean over steps, in the reference over
            padding as well. Actions are clipped by 1e-6 in the loss only. A new policy comes after
            a number of env steps, in the paper after an episode; an episode may go on with it.
            Offline there are 5,100 updates, not 5,000, since log_every must divide them.

Shapes: S seeds, N data, B batch, K context, T = 3 K tokens, D embedding, O observation, A action.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state

from common import datasets, evaluation, experiment, fail, interaction


# --- Config -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    dataset: str = "local/pointmaze/umaze-v0"  # data set id or path, see docs/data.md
    seeds: tuple[int, ...] = (0,)  # trained in parallel
    num_updates: int = 5_100  # gradient steps
    log_every: int = 300  # updates per compiled chunk, the unit of logging and saving
    eval_every: int = 3_000  # updates between evaluations
    eval_episodes: int = 10  # episodes per seed and evaluation
    batch_size: int = 256  # windows per update
    actor_learning_rate: float = 1e-4  # LAMB, see warm_up
    # DT
    context: int = 20  # K, steps per window; each step is three tokens
    embedding: int = 512  # D, width of a token; the hidden layer of a block is 4 D wide
    num_layers: int = 4  # number of transformer blocks
    num_heads: int = 4  # attention heads per block, each D / num_heads wide
    dropout: float | None = 0.1  # rate for tokens, attention weights and block outputs; None: off
    weight_decay: float = 5e-4  # of LAMB, for all parameters
    warm_up: int = 10_000  # updates over which the learning rate rises linearly to its full value
    max_gradient_norm: float = 0.25  # larger gradients are scaled down to this norm
    episode_length: int = 1_000  # number of timestep embeddings; later timesteps share the last
    reward_scale: float = 0.001  # multiplies the returns-to-go that the network sees
    target_return: float | None = None  # asked for in evaluation, unscaled; None: best in the data
    # Online DT
    eval_context: int = 5  # steps that the policy remembers when it acts, at most K
    timestep_embedding: bool = False  # tokens know how far the episode is
    initial_temperature: float = 0.1  # weight of the entropy before the first update
    temperature_learning_rate: float = 1e-4  # Adam, for the weight of the entropy
    # Online phase
    online_updates: int = 0  # gradient steps of online training, after the offline ones
    steps_per_refresh: int = 1_000  # env steps between updates of the acting policy
    updates_per_refresh: int = 300  # updates between two such sets of env steps
    replay_episodes: int = 1_000  # the newest so many are learnt from; at first the data's best
    exploration_return: float | None = None  # asked for by exploration; None: target + |target|


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


def orthogonal_head(width):
    return nn.Dense(width, kernel_init=nn.initializers.orthogonal())


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


class StochasticTransformer(nn.Module):
    embedding: int
    num_layers: int
    num_heads: int
    dropout: float
    episode_length: int
    reward_scale: float
    action_dim: int
    timestep_embedding: bool

    @nn.compact
    def __call__(self, steps, train=False):  # Steps, [B, K] -> mean, log std, [B, K, A] each
        """The Gaussian before tanh of each action, given its step's observation and what precedes.

        That includes the step's return-to-go. Steps with a timestep below 0 are padding, which no
        other step sees.
        """
        time = 0.0
        if self.timestep_embedding:
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
        mean = orthogonal_head(self.action_dim)(x)
        # From any number to [-5, 2].
        log_std = -5.0 + 3.5 * (jnp.tanh(orthogonal_head(self.action_dim)(x)) + 1.0)
        return mean.reshape(steps.action.shape), log_std.reshape(steps.action.shape)


# --- State --------------------------------------------------------------------------------------
class Steps(NamedTuple):
    """Steps in time order: the data [N], windows of it [B, K], or the policy's memory [E, K]."""

    observation: jax.Array  # [..., O], normalised
    action: jax.Array  # [..., A]
    returns_to_go: jax.Array  # sum of the rewards from this step on, not discounted
    timestep: jax.Array  # int32, number of steps since the start of the episode; -1: padding


class State(NamedTuple):
    actor: train_state.TrainState
    log_temperature: train_state.TrainState  # one number, the logarithm of the temperature
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
    actor = StochasticTransformer(
        embedding=cfg.embedding,
        num_layers=cfg.num_layers,
        num_heads=cfg.num_heads,
        dropout=cfg.dropout or 0.0,
        episode_length=cfg.episode_length,
        reward_scale=cfg.reward_scale,
        action_dim=batch.action.shape[-1],
        timestep_embedding=cfg.timestep_embedding,
    )
    example_steps = blank_steps(1, batch, 0.0, cfg)
    actor_params = actor.init(key, example_steps)

    def learning_rate(step):
        return cfg.actor_learning_rate * jnp.minimum((step + 1) / cfg.warm_up, 1.0)

    actor_lamb = optax.chain(
        optax.clip_by_global_norm(cfg.max_gradient_norm),
        optax.lamb(learning_rate, eps=1e-8, weight_decay=cfg.weight_decay),
    )
    log_temperature = {"log": jnp.log(jnp.float32(cfg.initial_temperature))}
    temperature_adam = optax.adam(cfg.temperature_learning_rate)
    mean, std = statistics
    observation_shape = batch.observation.shape[-1:]
    return State(
        actor=train_state.TrainState.create(
            apply_fn=actor.apply, params=actor_params, tx=actor_lamb
        ),
        log_temperature=train_state.TrainState.create(
            apply_fn=temperature_of, params=log_temperature, tx=temperature_adam
        ),
        statistics=(
            jnp.broadcast_to(mean, observation_shape),
            jnp.broadcast_to(std, observation_shape),
        ),
    )


def temperature_of(params):
    """The weight of log pi in the actor loss, from its logarithm."""
    return jnp.exp(params["log"])


def best_episodes(steps, dataset, number):
    """The `number` episodes with the highest returns, the worst first, and the row after each.

    Steps [N] -> Steps [M], all rows of these episodes.
    """
    starts, ends = datasets.episodes(dataset)
    best = dataset.episode_returns.argsort(kind="stable")[-number:]
    lengths = (ends - starts)[best]
    new_ends = lengths.cumsum()
    new_starts = new_ends - lengths
    rows = jnp.arange(new_ends[-1]) + (starts[best] - new_starts).repeat(lengths)  # [M]
    return jax.tree.map(lambda column: column[rows], steps), new_ends


# --- Losses -------------------------------------------------------------------------------------
def actor_loss(params, state, batch, key, cfg):
    """-log pi(a_t|...) - temperature H(pi), mean over all steps except padding.

    The entropy H is that of one sampled action per step.
    """
    key_dropout, key_noise = jax.random.split(key)
    rngs = {"dropout": key_dropout}
    mean, log_std = state.actor.apply_fn(params, batch, train=True, rngs=rngs)  # [B, K, A]
    noise = jax.random.normal(key_noise, batch.action.shape)
    _, sampled_log_prob = sample_squashed(mean, log_std, noise)  # [B, K]
    # An action on the border of [-1, 1] would have a density of 0.
    x = jnp.arctanh(batch.action.clip(-1 + 1e-6, 1 - 1e-6))
    log_prob = squashed_log_prob(x, mean, log_std)  # [B, K]

    is_step = batch.timestep >= 0  # [B, K]
    chex.assert_equal_shape([log_prob, sampled_log_prob, is_step, batch.returns_to_go])
    likelihood_loss = -(is_step * log_prob).sum() / is_step.sum()
    entropy = -(is_step * sampled_log_prob).sum() / is_step.sum()
    temperature = state.log_temperature.apply_fn(state.log_temperature.params)
    loss = likelihood_loss - temperature * entropy
    metrics = {"actor_loss": loss, "log_prob": -likelihood_loss}
    return loss, metrics | {"entropy": entropy, "temperature": temperature}


def temperature_loss(params, state, entropy, action_dim):
    """temperature (entropy - target), target -A. An entropy above it lowers the temperature.

    `entropy` is a number, that of the batch of the actor's step.
    """
    target_entropy = -action_dim
    loss = state.log_temperature.apply_fn(params) * (entropy - target_entropy)
    return loss, {"temperature_loss": loss}


def sample_squashed(mean, log_std, noise):
    """a = tanh(mean + std noise), [B, A], and log pi(a|s), [B]."""
    x = mean + jnp.exp(log_std) * noise
    return jnp.tanh(x), squashed_log_prob(x, mean, log_std)


def squashed_log_prob(x, mean, log_std):
    """log density of tanh(x) for x ~ N(mean, std), summed over the last axis."""
    error = (x - mean) * jnp.exp(-log_std)
    log_prob = -0.5 * jnp.square(error) - log_std - 0.5 * jnp.log(2 * jnp.pi)
    log_prob -= 2 * (jnp.log(2.0) - x - jax.nn.softplus(-2 * x))  # log(1 - tanh(x)^2)
    return log_prob.sum(axis=-1)


# --- Update -------------------------------------------------------------------------------------
def update(state, step, key, data, cfg):
    """A gradient step of the transformer on a batch of windows, then of the temperature. One seed.

    Randomness is a function of (key, step) alone, so neither the length of a chunk nor a resumed
    run changes the result. The key of a step is fold_in(key, step).
    """
    key_batch, key_actor = jax.random.split(jax.random.fold_in(key, step))
    # A window may begin at any row, so episodes are drawn in proportion to their length.
    index = jax.random.randint(key_batch, (cfg.batch_size,), 0, len(data.timestep))
    batch = windows(data, index, cfg)
    grads, metrics = jax.grad(actor_loss, has_aux=True)(
        state.actor.params, state, batch, key_actor, cfg
    )
    state = state._replace(actor=state.actor.apply_gradients(grads=grads))

    grads, temperature_metrics = jax.grad(temperature_loss, has_aux=True)(
        state.log_temperature.params, state, metrics["entropy"], batch.action.shape[-1]
    )
    state = state._replace(log_temperature=state.log_temperature.apply_gradients(grads=grads))
    return state, metrics | temperature_metrics


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
    """tanh of the mean, [E, O] -> [E, A], and the memory with this step in it, Steps [E, K].

    The `reward` [E] of the previous step reduces the return asked for. `key` is not used.
    """
    memory = with_step(params, observation, memory, reward)
    mean, _ = apply_fn(params[0], memory)  # [E, K, A]
    action = jnp.tanh(mean[:, -1])
    return action, memory._replace(action=memory.action.at[:, -1].set(action))


def explore(apply_fn, params, observation, key, memory, reward):
    """As `policy`, with an action drawn from pi, by which the online phase acts."""
    memory = with_step(params, observation, memory, reward)
    mean, log_std = apply_fn(params[0], memory)  # [E, K, A]
    noise = jax.random.normal(key, mean[:, -1].shape)
    action, _ = sample_squashed(mean[:, -1], log_std[:, -1], noise)
    return action, memory._replace(action=memory.action.at[:, -1].set(action))


def with_step(params, observation, memory, reward):
    """The memory with one more step, whose action is not known yet, Steps [E, K]."""
    _, statistics = params
    step = Steps(
        observation=standardise(observation, statistics),
        action=jnp.zeros_like(memory.action[:, -1]),  # its own prediction ignores it
        returns_to_go=memory.returns_to_go[:, -1] - reward,
        timestep=memory.timestep[:, -1] + 1,
    )

    def append(column, new):  # [E, K, ...], [E, ...]: the oldest step makes room for the new one
        return jnp.append(column[:, 1:], new[:, None], axis=1)

    return jax.tree.map(append, memory, step)


def policy_params(state):
    return state.actor.params, state.statistics


def policy_fn(state, cfg):
    """`policy` with the networks filled in.

    (params, observation, key, memory, reward) -> (action, memory)
    """
    return partial(policy, state.actor.apply_fn)


def initial_memory(count, batch, cfg, target_return):
    """The memory with which `count` episodes begin. `batch` supplies shapes only."""
    return blank_steps(count, batch, target_return, replace(cfg, context=cfg.eval_context))


# --- Training -----------------------------------------------------------------------------------
def online_rows(rows, dataset, statistics):
    """Rows of the env, [T, S, ...], as Steps with the returns that their episodes came to.

    The first and the last rows may be parts of episodes. The timesteps of the former and the
    returns-to-go of the latter are wrong, and the Interaction does not let them be drawn.
    """
    mean, std = statistics
    steps = []
    for i in range(rows.reward.shape[1]):
        own = jax.tree.map(lambda x, i=i: x[:, i], rows)  # [T, ...] of one seed
        own = own._replace(observation=(own.observation - mean) / std)
        over = own.termination + own.truncation
        over[-1] = 1.0
        (last,) = over.nonzero()
        steps.append(episode_steps(replace(dataset, transitions=own, episode_ends=last + 1), own))
    return jax.tree.map(lambda *columns: jnp.stack(columns, axis=1), *steps)


def train(cfg, options):
    """Train every seed of `cfg` and return its final normalised scores, [S]."""
    experiment.check(cfg, options)
    if cfg.eval_context > cfg.context:
        fail(f"--eval-context {cfg.eval_context}: at most --context, {cfg.context}")
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps)
    data, statistics = normalise(dataset.transitions)
    steps = episode_steps(dataset, data)
    data = experiment.place(steps, options)
    example = jax.tree.map(lambda x: x[:1], data)  # one row, for its shapes
    init_keys, train_keys, policy_keys, explore_keys = experiment.streams(cfg.seeds, 4)  # [S] each
    create = partial(create_state, batch=example, cfg=cfg, statistics=statistics)
    # Not jitted: XLA can hang on the QR decompositions of two orthogonal initialisers.
    state = jax.vmap(create)(init_keys)
    # Compiled once for all seeds. `update` shows which rows a step reads, for --data host.
    train_seeds = experiment.over_seeds(partial(train_chunk, cfg=cfg), update=update)
    act = policy_fn(state, cfg)
    target_return = cfg.target_return
    if target_return is None:
        starts, _ = datasets.episodes(dataset)
        target_return = float(data.returns_to_go[starts].max())  # the best of the data
    memory = initial_memory(cfg.eval_episodes, example, cfg, target_return)
    exploration_return = cfg.exploration_return
    if exploration_return is None:
        exploration_return = target_return + abs(target_return)
    explore_by = partial(explore, state.actor.apply_fn)
    replay, episode_ends = best_episodes(steps, dataset, cfg.replay_episodes)

    with (
        experiment.Run(cfg, options, dataset, {"target_return": target_return}) as run,
        evaluation.Rollouts(dataset, act, policy_keys, cfg, memory) as rollouts,
        interaction.Interaction(
            run,
            replay,
            explore_by,
            explore_keys,
            policy_params,
            train_chunk,
            partial(online_rows, dataset=dataset, statistics=statistics),
            memory=initial_memory(1, example, cfg, exploration_return),
            replay=(cfg.replay_episodes, episode_ends),
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

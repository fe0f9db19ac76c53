# SPDX-License-Identifier: Apache-2.0
"""QDT (Yamagata et al., 2023): a Decision Transformer on returns that a learned critic raises.

Paper       https://arxiv.org/abs/2209.03993
Reference   https://github.com/takuseno/d3rlpy (reproductions/offline/qdt.py; a reimplementation)
Run         python algorithms/qdt.py --config configs/qdt/mujoco.yaml
Parent      dt.py (333 lines)
Results     docs/results.md
Deviations  The critic is that of cql.py: its TD target has an action drawn from pi, the reference's
            the mean of pi, and its networks are initialised orthogonally. Its observations are
            normalised as the transformer's are; the reference's are not. An episode's last
            return-to-go is its last reward; in the reference's recursion it is 0, so that reward
            is lost in the rows before. Windows begin at any row, as in dt.py, not end there. As in
            the reference, V is discounted and the returns are not. Those of dt.py.

Shapes: S seeds, N data, B batch, K context, T = 3 K tokens, D embedding, C critics, M actions per
        row, O observation, A action.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

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
    num_updates: int = 600_000  # gradient steps: first the critics', then the transformer's
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
    # QDT
    q_updates: int = 500_000  # first updates: they train critics and pi, by CQL
    value_batch_size: int = 256  # transitions per update of that phase
    pi_learning_rate: float = 1e-4  # Adam, for pi and its entropy temperature
    critic_learning_rate: float = 3e-4  # Adam
    discount: float = 0.99  # gamma, per environment step
    target_rate: float = 0.005  # tau, Polyak step of the target critics
    hidden: tuple[int, ...] = (256, 256, 256)  # widths of pi and the critics
    num_critics: int = 2  # C, target and pi use their minimum, V their mean
    alpha: float = 5.0  # weight of the conservative gap: log sum exp Q(s, .) - Q(s, a)
    num_samples: int = 10  # actions sampled per row from each of uniform, pi(s) and pi(s')
    value_samples: int = 10  # actions of pi(s), over which V(s) is the mean of Q


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


def orthogonal_dense(width):
    return nn.Dense(width, kernel_init=nn.initializers.orthogonal(2**0.5))


def small_dense(width):
    return nn.Dense(width, kernel_init=nn.initializers.orthogonal(1e-2))


class TanhGaussianActor(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, observation):  # [..., O] -> mean and log std before tanh, [..., A] each
        x = observation
        for width in self.hidden:
            x = nn.relu(orthogonal_dense(width)(x))
        output = small_dense(2 * self.action_dim)(x)
        mean, log_std = jnp.split(output, 2, axis=-1)
        scale = self.param("log_std_scale", nn.initializers.constant(1.0), ())
        shift = self.param("log_std_shift", nn.initializers.constant(-1.0), ())
        log_std = (scale * log_std + shift).clip(-20.0, 2.0)
        return mean, log_std


class SmallHeadCritic(nn.Module):
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, observation, action):  # [B, O], [B, M, A] -> [B, M]
        # Rows and actions share one axis, since gradients are faster than with two.
        actions_per_row = action.shape[1]
        observation = observation.repeat(actions_per_row, axis=0)  # [B*M, O]
        flat_action = action.reshape(len(observation), -1)  # [B M, A]
        x = jnp.concatenate([observation, flat_action], axis=-1)
        for width in self.hidden:
            x = nn.relu(orthogonal_dense(width)(x))
        q = small_dense(1)(x)  # [B M, 1]
        return q.reshape(action.shape[:-1])


# --- State --------------------------------------------------------------------------------------
class Steps(NamedTuple):
    """Steps in time order: the data [N], windows of it [B, K], or the policy's memory [E, K]."""

    observation: jax.Array  # [..., O], normalised
    action: jax.Array  # [..., A]
    returns_to_go: jax.Array  # sum of the rewards from this step on, not discounted
    timestep: jax.Array  # int32, number of steps since the start of the episode; -1: padding


class TrainState(train_state.TrainState):
    target_params: Any  # slow copy of params

    @classmethod
    def create(cls, apply_fn, params, tx):
        # A copy: JAX reuses the memory of the old state, so params and targets must not share any.
        target = jax.tree.map(jnp.copy, params)
        return super().create(apply_fn=apply_fn, params=params, target_params=target, tx=tx)


class State(NamedTuple):
    actor: train_state.TrainState
    pi: train_state.TrainState  # the policy whose value the critics learn
    critic: TrainState  # every array has a leading [C] axis
    log_temperature: train_state.TrainState  # logarithm of the entropy temperature of pi
    gain: jax.Array  # [N], what the critics add to the return-to-go of each row
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


def goes_on_after_a_termination(dataset):
    """Whether a row that is not the last of its episode has a termination, as in AntMaze."""
    _, ends = datasets.episodes(dataset)
    termination = jnp.asarray(dataset.transitions.termination)
    return bool(termination.at[ends - 1].set(0.0).any())


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


def create_state(key, batch, cfg, statistics=(0.0, 1.0), num_rows=1):
    """State of one seed before the first update. `batch` supplies shapes only.

    Of `num_rows` data, none of which has a gain yet.
    """
    key_actor, key_pi, key_critic = jax.random.split(key, 3)
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
    actor_params = actor.init(key_actor, example_steps)

    def learning_rate(step):
        return cfg.actor_learning_rate * jnp.minimum((step + 1) / cfg.warm_up, 1.0)

    actor_adam = optax.chain(
        optax.clip_by_global_norm(cfg.max_gradient_norm),
        optax.adamw(learning_rate, weight_decay=cfg.weight_decay),
    )

    pi = TanhGaussianActor(cfg.hidden, action_dim=batch.action.shape[-1])
    critic = SmallHeadCritic(cfg.hidden)
    init_critics = jax.vmap(critic.init, (0, None, None))
    apply_critics = jax.vmap(critic.apply, (0, None, None))  # -> [C, B, M]
    example = jax.tree.map(lambda x: x[:, 0], example_steps)  # [1, ...]
    pi_params = pi.init(key_pi, example.observation)
    critic_keys = jax.random.split(key_critic, cfg.num_critics)
    critic_params = init_critics(critic_keys, example.observation, example.action[:, None])
    pi_adam = optax.adam(cfg.pi_learning_rate)
    critic_adam = optax.adam(cfg.critic_learning_rate)
    temperature_adam = optax.adam(cfg.pi_learning_rate)

    mean, std = statistics
    observation_shape = batch.observation.shape[-1:]
    return State(
        actor=train_state.TrainState.create(
            apply_fn=actor.apply, params=actor_params, tx=actor_adam
        ),
        pi=train_state.TrainState.create(apply_fn=pi.apply, params=pi_params, tx=pi_adam),
        critic=TrainState.create(apply_critics, critic_params, critic_adam),
        log_temperature=train_state.TrainState.create(
            apply_fn=bounded_exp, params={"log": jnp.float32(0.0)}, tx=temperature_adam
        ),
        gain=jnp.zeros(num_rows, jnp.float32),
        statistics=(
            jnp.broadcast_to(mean, observation_shape),
            jnp.broadcast_to(std, observation_shape),
        ),
    )


def bounded_exp(params):
    """Temperature or multiplier from its logarithm, at most 1e6."""
    return jnp.exp(params["log"]).clip(0.0, 1e6)


# --- Losses -------------------------------------------------------------------------------------
def critic_loss(params, state, batch, key, cfg):
    """Squared TD error + alpha (log sum_a~ exp Q(s, a~) - Q(s, a)), a~ the sampled actions.

    CQL's. Mean over B, summed over C. All sampled actions are valued at s, those of pi(s') too.
    """
    sampled_action, log_density, next_action = candidate_actions(state.pi, batch, key, cfg)

    next_q = state.critic.apply_fn(state.critic.target_params, batch.next_observation, next_action)
    next_q = next_q.min(axis=0)[:, 0]  # [C, B, 1] -> [B]
    # Bootstrap through truncations, never through terminations.
    target = batch.reward + cfg.discount * (1.0 - batch.termination) * next_q  # [B]

    # One call for the action of the data and the sampled ones is faster than two.
    action = jnp.concatenate([batch.action[:, None], sampled_action], axis=1)  # [B, 1 + 3M, A]
    all_q = state.critic.apply_fn(params, batch.observation, action)  # [C, B, 1 + 3M]
    q = all_q[..., 0]  # [C, B]
    sampled_q = all_q[..., 1:]  # [C, B, 3M]
    chex.assert_equal_shape([*q, target])
    td_error = jnp.square(q - target[None]).mean(axis=1).sum()

    # A sum over 3M samples, not a mean, so the gap includes log 3M.
    soft_maximum = jax.nn.logsumexp(sampled_q - log_density[None], axis=-1)  # [C, B]
    conservative_gap = soft_maximum - q  # [C, B]
    conservative_loss = cfg.alpha * conservative_gap.mean(axis=1).sum()
    loss = td_error + conservative_loss
    metrics = {"critic_loss": loss, "td_error": td_error, "q": q.mean()}
    return loss, metrics | {"conservative_gap": conservative_gap.mean()}


def actor_loss(params, state, batch, key, cfg):
    """(pi(R_1, s_1, a_1, ..., R_t, s_t) - a_t)^2, mean over A and all steps except padding."""
    output = state.actor.apply_fn(params, batch, train=True, rngs={"dropout": key})  # [B, K, A]
    chex.assert_equal_shape([output, batch.action])
    error = jnp.square(output - batch.action).mean(axis=-1)  # [B, K]
    is_step = batch.timestep >= 0  # [B, K]
    chex.assert_equal_shape([error, is_step, batch.returns_to_go])
    loss = (is_step * error).sum() / is_step.sum()
    return loss, {"actor_loss": loss}


def temperature_loss(params, entropy, action_dim):
    """log temperature (entropy - target entropy), with -A as the target."""
    target_entropy = -action_dim
    return params["log"] * (entropy - target_entropy)


def pi_loss(params, state, batch, key, cfg):
    """temperature log pi(a~|s) - min_c Q_c(s, a~) with one a~ ~ pi(s), mean over B."""
    mean, log_std = state.pi.apply_fn(params, batch.observation)
    action, log_prob = sample_tanh(mean, log_std, key, 1)  # [B, 1, A], [B, 1]
    q = state.critic.apply_fn(state.critic.params, batch.observation, action)
    q = q.min(axis=0)  # [C, B, 1] -> [B, 1]
    chex.assert_equal_shape([q, log_prob, batch.reward[:, None]])
    temperature = bounded_exp(state.log_temperature.params)
    entropy_loss = temperature * log_prob
    loss = (entropy_loss - q).mean()
    return loss, {"pi_loss": loss, "entropy": -log_prob.mean()}


def candidate_actions(pi, batch, key, cfg):
    """M uniform actions, M of pi(s) and M of pi(s'), [B, 3M, A], their log densities, [B, 3M], and
    another of pi(s') for the TD target, [B, 1, A]."""
    key_uniform, key_pi = jax.random.split(key)
    batch_size, action_dim = batch.action.shape
    count = cfg.num_samples

    shape = (batch_size, count, action_dim)
    uniform_action = jax.random.uniform(key_uniform, shape, minval=-1.0, maxval=1.0)
    uniform_log_prob = jnp.full((batch_size, count), action_dim * jnp.log(0.5))  # 1/2 per dimension

    # One call of pi for s and s'. The last action is for the target, unused at s.
    observation = jnp.concatenate([batch.observation, batch.next_observation])  # [2B, O]
    mean, log_std = pi.apply_fn(pi.params, observation)
    action, log_prob = sample_tanh(mean, log_std, key_pi, count + 1)
    action_at_s, action_at_next = jnp.split(action, 2)  # [B, M + 1, A] each
    log_prob_at_s, log_prob_at_next = jnp.split(log_prob, 2)  # [B, M + 1] each

    sampled_action = jnp.concatenate(
        [uniform_action, action_at_s[:, :count], action_at_next[:, :count]], axis=1
    )
    log_density = jnp.concatenate(
        [uniform_log_prob, log_prob_at_s[:, :count], log_prob_at_next[:, :count]], axis=1
    )
    return sampled_action, log_density, action_at_next[:, count:]


def sample_tanh(mean, log_std, key, count):
    """`count` actions of tanh N(mean, std) per row, [B, count, A], and their log pi, [B, count]."""
    noise = jax.random.normal(key, (len(mean), count, mean.shape[-1]))
    log_std = jnp.broadcast_to(log_std[:, None], noise.shape)
    x = mean[:, None] + jnp.exp(log_std) * noise  # [B, count, A], before tanh
    normal_log_prob = -0.5 * jnp.square(noise) - log_std - 0.5 * jnp.log(2 * jnp.pi)
    log_slope = 2 * (jnp.log(2.0) - x - jax.nn.softplus(-2 * x))  # log(1 - tanh(x)^2)
    log_prob = normal_log_prob - log_slope
    return jnp.tanh(x), log_prob.sum(axis=-1)


# --- Update -------------------------------------------------------------------------------------
def value_update(state, step, key, data, cfg):
    """One gradient step of critics, pi and temperature at once, then of the targets. One seed.

    The first phase. Its key of a step is fold_in(key, step), as in `update`.
    """
    key_batch, key_critic, key_pi = jax.random.split(jax.random.fold_in(key, step), 3)
    batch = sample_batch(data, key_batch, replace(cfg, batch_size=cfg.value_batch_size))
    # All gradients are taken at the state before the update.
    critic_grads, critic_metrics = jax.grad(critic_loss, has_aux=True)(
        state.critic.params, state, batch, key_critic, cfg
    )
    pi_grads, pi_metrics = jax.grad(pi_loss, has_aux=True)(
        state.pi.params, state, batch, key_pi, cfg
    )
    metrics = critic_metrics | pi_metrics
    temperature_grads = jax.grad(temperature_loss)(
        state.log_temperature.params, metrics["entropy"], batch.action.shape[-1]
    )
    metrics["temperature"] = bounded_exp(state.log_temperature.params)

    critic = state.critic.apply_gradients(grads=critic_grads)
    state = state._replace(
        pi=state.pi.apply_gradients(grads=pi_grads),
        critic=update_target(critic, cfg),
        log_temperature=state.log_temperature.apply_gradients(grads=temperature_grads),
    )
    return state, metrics


def relabel(state, key, start, data, cfg):
    """The State of one seed with the gains of all rows of `data`, and their mean.

    Between the phases. Its key is fold_in(key, 2**32 - 1), a number that no step has.
    """
    value = state_values(state, jax.random.fold_in(key, 2**32 - 1), data, cfg)
    gain = gains(value, data)
    return state._replace(gain=gain), {"gain": gain.mean()}


def state_values(state, key, data, cfg):
    """V(s) of every row, [N]: the mean of Q over the critics and some actions of pi(s)."""

    def of_row(row):
        number, observation = row
        mean, log_std = state.pi.apply_fn(state.pi.params, observation[None])
        key_row = jax.random.fold_in(key, number)
        action, _ = sample_tanh(mean, log_std, key_row, cfg.value_samples)  # [1, M, A]
        return state.critic.apply_fn(state.critic.params, observation[None], action).mean()

    numbers = jnp.arange(len(data.timestep))
    return jax.lax.map(of_row, (numbers, data.observation), batch_size=2_000)


def gains(value, data):
    """How much the value [N] raises the return-to-go of each row, [N].

    From the end of an episode backward, the new return-to-go is that row's reward plus the next
    row's new return-to-go or its value, whichever is more:

        g_t = r_t + max(g_t+1, V(s_t+1)),    g_T = r_T.

    The old one is R_t = r_t + R_t+1, so g_t - R_t = max(g_t+1 - R_t+1, V(s_t+1) - R_t+1).
    """
    excess = value - data.returns_to_go  # of V over R, [N]
    is_last = jnp.append(data.timestep[1:] == 0, True)  # in its episode

    def one_row(best_later, row):
        excess, is_last = row
        gain = jnp.where(is_last, 0.0, best_later)
        return jnp.maximum(gain, excess), gain

    _, gain = jax.lax.scan(one_row, jnp.zeros_like(excess[0]), (excess, is_last), reverse=True)
    return gain


def update(state, step, key, data, cfg):
    """One gradient step of the transformer on a batch of windows. One seed.

    The second phase: the critics stay as they are. Randomness is a function of (key, step) alone,
    so neither the length of a chunk nor a resumed run changes the result. The key of a step is
    fold_in(key, step).
    """
    key_batch, key_dropout = jax.random.split(jax.random.fold_in(key, step))
    # A window may begin at any row, so episodes are drawn in proportion to their length.
    index = jax.random.randint(key_batch, (cfg.batch_size,), 0, len(data.timestep))
    batch = windows(data, index, cfg)
    batch = with_gain(batch, index, state.gain)
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


def with_gain(batch, index, gain):
    """The windows [B, K] with the gain of their last row in the return-to-go of every row.

    So within a window a row's return-to-go less its reward is the next one's, as in evaluation.
    """
    num_steps = (batch.timestep >= 0).sum(axis=1)
    last_row = index + num_steps - 1  # [B]
    return batch._replace(returns_to_go=batch.returns_to_go + gain[last_row][:, None])


def sample_batch(data, key, cfg):
    """`batch_size` rows of the data, drawn with replacement."""
    index = jax.random.randint(key, (cfg.batch_size,), 0, len(data.reward))
    return jax.tree.map(lambda column: column[index], data)


def update_target(net, cfg):
    target_params = optax.incremental_update(net.params, net.target_params, cfg.target_rate)
    return net.replace(target_params=target_params)


def value_chunk(state, key, start, data, cfg):
    """`log_every` updates of the first phase, as `train_chunk` makes those of the second."""
    steps = start + jnp.arange(cfg.log_every)
    state, metrics = jax.lax.scan(partial(value_update, key=key, data=data, cfg=cfg), state, steps)
    return state, jax.tree.map(jnp.mean, metrics)


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
    if options.data == "host" or options.devices > 1:
        fail("--data host, --devices: QDT supports neither, since it needs V of all rows")
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps)
    if goes_on_after_a_termination(dataset):
        fail(
            f"{cfg.dataset}: episodes go on after a termination, which QDT's new returns do not "
            "allow for; it needs data whose episodes end there"
        )
    transitions, statistics = normalise(dataset.transitions)
    transitions = experiment.place(transitions, options)  # for the critics
    data = episode_steps(dataset, transitions)  # the same rows, for the transformer
    example = jax.tree.map(lambda x: x[:1], data)  # one row, for its shapes
    init_keys, train_keys, policy_keys = experiment.streams(cfg.seeds, 3)  # [S] keys each
    create = partial(
        create_state,
        batch=example,
        cfg=cfg,
        statistics=statistics,
        num_rows=len(data.timestep),
    )
    # Not jitted: XLA can hang on the QR decompositions of two orthogonal initialisers.
    state = jax.vmap(create)(init_keys)
    # Compiled once for all seeds.
    value_seeds = experiment.over_seeds(partial(value_chunk, cfg=cfg))
    relabel_seeds = experiment.over_seeds(partial(relabel, cfg=cfg))
    train_seeds = experiment.over_seeds(partial(train_chunk, cfg=cfg))
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
            if run.evaluates(step) and step >= cfg.q_updates:  # from the actor's phase on
                scores = rollouts.start(policy_params(state), step)
            last_metrics = metrics  # of the chunk that ended at this step
            # An accelerator trains while the CPU evaluates.
            if step < cfg.q_updates:  # the first phase
                state, metrics = value_seeds(state, train_keys, step, transitions)
            elif step < cfg.num_updates:  # the second one
                if step == cfg.q_updates:
                    state, _ = relabel_seeds(state, train_keys, step, data)
                state, metrics = train_seeds(state, train_keys, step, data)
            run.log(step, last_metrics, scores)
    return run.scores


if __name__ == "__main__":
    train(*experiment.parse(Config))

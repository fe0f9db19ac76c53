# SPDX-License-Identifier: Apache-2.0
"""AlgaeDICE (Nachum et al., 2019): the dual of the policy's return, over Q and the policy at once.

Paper       https://arxiv.org/abs/1912.02074
Reference   https://github.com/google-research/google-research/tree/master/algae_dice
Run         python algorithms/algaedice.py --config configs/algaedice/mujoco.yaml
Parent      sac.py (245 lines)
Results     docs/results.md
Deviations  The authors' script fills its replay buffer as it learns; here it is the fixed data set,
            and the buffer of initial states has the first observation of each episode. The
            evaluated policy is the mode, theirs samples. As in the code, only 0.05 of the next
            value is the network that learns (online_share; 1 is the paper's objective). The case
            of discount 1 is left out. Adam's epsilon is 1e-8, Keras has 1e-7.

Shapes: S seeds, N data, K critics, B batch, O observation, A action. Arrays are float32.
"""

from dataclasses import dataclass
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
    num_updates: int = 500_000  # gradient steps of the critics
    log_every: int = 1_000  # updates per compiled chunk, the unit of logging and saving
    eval_every: int = 20_000  # updates between evaluations
    eval_episodes: int = 10  # episodes per seed and evaluation
    batch_size: int = 256  # transitions per update, and as many initial observations
    actor_learning_rate: float = 1e-3  # Adam
    critic_learning_rate: float = 1e-3  # Adam
    temperature_learning_rate: float = 1e-3  # Adam, for the weight of the entropy
    discount: float = 0.99  # gamma, per environment step
    target_rate: float = 0.005  # tau, Polyak step of the target critics
    policy_delay: int = 2  # critic updates per update of actor, temperature and targets
    hidden: tuple[int, ...] = (256, 256)  # widths of actor and critics
    num_critics: int = 2  # K
    # AlgaeDICE
    alpha: float = 0.01  # weight of the initial values: the paper's alpha to the power p - 1
    exponent: float = 1.5  # p of f(x) = |x|^p / p
    online_share: float = 0.05  # of Q in the next value; the rest is the least target Q
    orthogonal_penalty: float = 1e-4  # on actor weights whose columns are not orthogonal


# --- Networks -----------------------------------------------------------------------------------
def unit_orthogonal_dense(width):
    return nn.Dense(width, kernel_init=nn.initializers.orthogonal())


class TanhStdActor(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, observation):  # [..., O] -> mean and log std before tanh, [..., A] each
        x = observation
        for width in self.hidden:
            x = nn.relu(unit_orthogonal_dense(width)(x))
        output = unit_orthogonal_dense(2 * self.action_dim)(x)
        mean, log_std = jnp.split(output, 2, axis=-1)
        return mean, -5.0 + 3.5 * (nn.tanh(log_std) + 1.0)  # log std from -5 to 2


class UnitOrthogonalCritic(nn.Module):
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, observation, action):  # [..., O], [..., A] -> [...]
        x = jnp.concatenate([observation, action], axis=-1)
        for width in self.hidden:
            x = nn.relu(unit_orthogonal_dense(width)(x))
        return unit_orthogonal_dense(1)(x).squeeze(-1)


# --- State --------------------------------------------------------------------------------------
class TransitionsAndStarts(NamedTuple):
    """Rows of the data, each beside the first observation of some episode."""

    observation: Any  # [N, O]
    action: Any  # [N, A]
    reward: Any  # [N]
    next_observation: Any  # [N, O]
    termination: Any  # [N], 1 where no value follows
    initial_observation: Any  # [N, O], of an episode that need not be the row's own


class TrainState(train_state.TrainState):
    target_params: Any  # slow copy of params

    @classmethod
    def create(cls, apply_fn, params, tx):
        # A copy: JAX reuses the memory of the old state, so params and targets must not share any.
        target = jax.tree.map(jnp.copy, params)
        return super().create(apply_fn=apply_fn, params=params, target_params=target, tx=tx)


class State(NamedTuple):
    actor: train_state.TrainState
    critic: TrainState  # every array has a leading [K] axis
    log_temperature: train_state.TrainState  # one number, the logarithm of the temperature


def with_starts(dataset, data):
    """The data with the episodes' first observations beside the rows, all episodes in turn.

    A batch of rows thus brings as many initial observations, each episode's as likely as another's.
    """
    starts, _ = datasets.episodes(dataset)
    episode = jnp.arange(len(data.reward)) % len(starts)
    return TransitionsAndStarts(
        observation=data.observation,
        action=data.action,
        reward=data.reward,
        next_observation=data.next_observation,
        termination=data.termination,
        initial_observation=data.observation[starts[episode]],
    )


def create_state(key, batch, cfg):
    """State of one seed before the first update. `batch` supplies shapes only."""
    key_actor, key_critic = jax.random.split(key)
    actor = TanhStdActor(cfg.hidden, action_dim=batch.action.shape[-1])
    critic = UnitOrthogonalCritic(cfg.hidden)
    init_critics = jax.vmap(critic.init, (0, None, None))
    apply_critics = jax.vmap(critic.apply, (0, None, None))  # -> [K, B]

    actor_params = actor.init(key_actor, batch.observation)
    critic_keys = jax.random.split(key_critic, cfg.num_critics)
    critic_params = init_critics(critic_keys, batch.observation, batch.action)
    log_temperature = {"log": jnp.float32(0.0)}
    actor_adam = optax.adam(cfg.actor_learning_rate)
    critic_adam = optax.adam(cfg.critic_learning_rate)
    temperature_adam = optax.adam(cfg.temperature_learning_rate)
    return State(
        actor=train_state.TrainState.create(
            apply_fn=actor.apply, params=actor_params, tx=actor_adam
        ),
        critic=TrainState.create(apply_critics, critic_params, critic_adam),
        log_temperature=train_state.TrainState.create(
            apply_fn=temperature_of, params=log_temperature, tx=temperature_adam
        ),
    )


def temperature_of(params):
    """The weight of log pi in the actor loss, from its logarithm."""
    return jnp.exp(params["log"])


# --- Losses -------------------------------------------------------------------------------------
def critic_loss(params, state, batch, key, cfg):
    """f(delta) + (1 - gamma) alpha Q(s0, a0), mean over B, summed over K, with a0 ~ pi(s0).

    The gradient goes through Q(s, a), through the online share of Q(s', a') and through Q(s0, a0).
    """
    noise = jax.random.normal(key, (2, *batch.action.shape))
    initial_action, _ = sample_policy(state.actor, batch.initial_observation, noise[0])
    next_action, next_log_prob = sample_policy(state.actor, batch.next_observation, noise[1])
    residual = bellman_residual(params, state, batch, next_action, next_log_prob, cfg)  # [K, B]
    initial_q = state.critic.apply_fn(params, batch.initial_observation, initial_action)
    chex.assert_equal_shape([*residual, *initial_q, batch.reward])
    divergence = jnp.abs(residual) ** cfg.exponent / cfg.exponent
    initial_loss = (1.0 - cfg.discount) * cfg.alpha * initial_q
    loss = (divergence + initial_loss).mean(axis=1).sum()
    return loss, {"critic_loss": loss, "initial_q": initial_q.mean()}


def actor_loss(params, state, batch, key, cfg):
    """-(w delta + (1 - gamma) alpha Q(s0, a0)), mean over K and B, and a penalty on the weights.

    The weight w = f'(delta), at least 0, gets no gradient; delta and Q(s0, a0) get one through the
    actions. With online_share 1, w / alpha estimates the ratio of the policy's occupancy to
    that of the data.
    """
    noise = jax.random.normal(key, (2, *batch.action.shape))
    actor = state.actor.replace(params=params)
    initial_action, _ = sample_policy(actor, batch.initial_observation, noise[0])
    next_action, next_log_prob = sample_policy(actor, batch.next_observation, noise[1])
    critic_params = state.critic.params
    residual = bellman_residual(critic_params, state, batch, next_action, next_log_prob, cfg)
    initial_q = state.critic.apply_fn(critic_params, batch.initial_observation, initial_action)
    chex.assert_equal_shape([*residual, *initial_q, batch.reward])
    weight = jax.lax.stop_gradient(residual.clip(0.0, 1e6) ** (cfg.exponent - 1.0))  # [K, B]
    objective = weight * residual + (1.0 - cfg.discount) * cfg.alpha * initial_q
    penalty_loss = cfg.orthogonal_penalty * squared_overlaps(params)
    loss = penalty_loss - objective.mean()
    return loss, {
        "actor_loss": loss,
        "weight": weight.mean(),
        "residual": residual.mean(),
        "entropy": -next_log_prob.mean(),
        "temperature": state.log_temperature.apply_fn(state.log_temperature.params),
    }


def temperature_loss(params, entropy, action_dim):
    """temperature (entropy - target), target -A. An entropy above it lowers the temperature."""
    target = -action_dim
    return temperature_of(params) * (entropy - target)


def bellman_residual(params, state, batch, next_action, next_log_prob, cfg):
    """delta = r + gamma (next value) - Q(s, a), [K, B].

    The next value is a mixture of Q_k(s', a') and the least target Q, minus temperature log pi.
    """
    q = state.critic.apply_fn(params, batch.observation, batch.action)  # [K, B]
    next_q = state.critic.apply_fn(params, batch.next_observation, next_action)
    target_q = state.critic.apply_fn(
        state.critic.target_params, batch.next_observation, next_action
    )
    target_q = target_q.min(axis=0)  # [K, B] -> [B]
    mixed_q = cfg.online_share * next_q + (1.0 - cfg.online_share) * target_q[None]
    temperature = state.log_temperature.apply_fn(state.log_temperature.params)
    next_value = mixed_q - temperature * next_log_prob[None]
    # Bootstrap through truncations, never through terminations.
    discount = cfg.discount * (1.0 - batch.termination)  # [B]
    chex.assert_equal_shape([*q, *next_q, target_q, next_log_prob, discount, batch.reward])
    return batch.reward[None] + discount[None] * next_value - q


def squared_overlaps(params):
    """Squared scalar products of different columns of a weight matrix, summed over all matrices."""
    total = 0.0
    for layer in params["params"].values():
        products = layer["kernel"].T @ layer["kernel"]
        others = products * (1.0 - jnp.eye(len(products)))
        total += jnp.square(others).sum()
    return total


def sample_policy(actor, observation, noise):
    """a ~ pi(s), [B, A], and log pi(a|s), [B], of the actor as it is."""
    mean, log_std = actor.apply_fn(actor.params, observation)
    return sample_squashed(mean, log_std, noise)


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
    """`policy_delay` critic updates, then one of actor, temperature and targets. One seed.

    Randomness is a function of (key, step) alone, so neither the length of a chunk nor a resumed
    run changes the result. The key of a step is fold_in(key, step).
    """
    critic_metrics = []
    for i in range(cfg.policy_delay):
        keys = jax.random.split(jax.random.fold_in(key, step + i), 3)
        key_batch, key_critic, key_actor = keys
        batch = sample_batch(data, key_batch, cfg)
        grads, metrics = jax.grad(critic_loss, has_aux=True)(
            state.critic.params, state, batch, key_critic, cfg
        )
        state = state._replace(critic=state.critic.apply_gradients(grads=grads))
        critic_metrics.append(metrics)
    # The actor learns from the last of these batches.
    grads, actor_metrics = jax.grad(actor_loss, has_aux=True)(
        state.actor.params, state, batch, key_actor, cfg
    )
    temperature_grads = jax.grad(temperature_loss)(
        state.log_temperature.params, actor_metrics["entropy"], batch.action.shape[-1]
    )
    state = state._replace(
        actor=state.actor.apply_gradients(grads=grads),
        critic=update_target(state.critic, cfg),
        log_temperature=state.log_temperature.apply_gradients(grads=temperature_grads),
    )
    return state, mean_metrics(critic_metrics) | actor_metrics


def sample_batch(data, key, cfg):
    """`batch_size` rows of the data, drawn with replacement."""
    index = jax.random.randint(key, (cfg.batch_size,), 0, len(data.reward))
    return jax.tree.map(lambda column: column[index], data)


def update_target(net, cfg):
    target_params = optax.incremental_update(net.params, net.target_params, cfg.target_rate)
    return net.replace(target_params=target_params)


def mean_metrics(metrics):
    """Mean of a list of dicts with the same names."""
    names = metrics[0]
    return {name: sum(row[name] for row in metrics) / len(metrics) for name in names}


def train_chunk(state, key, start, data, cfg):
    """`log_every` updates of one seed, compiled as one program. Metrics are chunk means."""
    steps = start + jnp.arange(0, cfg.log_every, cfg.policy_delay)  # one per call of `update`
    state, metrics = jax.lax.scan(partial(update, key=key, data=data, cfg=cfg), state, steps)
    return state, jax.tree.map(jnp.mean, metrics)


# --- Policy -------------------------------------------------------------------------------------
def policy(apply_fn, params, observation, key):
    """tanh of the mean, [..., O] -> [..., A]. `key` is not used."""
    mean, _ = apply_fn(params, observation)
    return jnp.tanh(mean)


def policy_params(state):
    return state.actor.params


def policy_fn(state, cfg):
    """`policy` with the networks filled in: (params, observation, key) -> action."""
    return partial(policy, state.actor.apply_fn)


# --- Training -----------------------------------------------------------------------------------
def train(cfg, options):
    """Train every seed of `cfg` and return its final normalised scores, [S]."""
    experiment.check(cfg, options)
    if cfg.exponent <= 1:
        fail(f"--exponent {cfg.exponent}: must be above 1, for a derivative that grows")
    if cfg.discount == 1:
        fail("--discount 1.0: must be below 1, for the occupancy of a discounted future")
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps)
    rows = dataset.transitions
    data = experiment.place(with_starts(dataset, rows), options)
    example = jax.tree.map(lambda x: x[:1], rows)  # one row, for its shapes
    init_keys, train_keys, policy_keys = experiment.streams(cfg.seeds, 3)  # [S] keys each
    create = partial(create_state, batch=example, cfg=cfg)
    # Not jitted: XLA can hang on the QR decompositions of two orthogonal initialisers.
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

# SPDX-License-Identifier: Apache-2.0
"""OptiDICE (Lee et al., 2021): the best policy's occupancy, as a ratio to that of the data.

Paper       https://arxiv.org/abs/2106.10783
Reference   https://github.com/secury/optidice
Run         python algorithms/optidice.py --config configs/optidice/mujoco.yaml
Parent      none
Results     docs/results.md
Deviations  The code takes log w of chi2 as log 1e-10 for all y < 0, here it is log w. The std of
            the observations has 1e-3 added, not 1e-10. The entropy has no 1e-6 inside its log.
            Adam's epsilon is 1e-8, Keras has 1e-7. Rows at a truncation are kept where their next
            observation is known. As in the code, absorbing_state=masked gives terminal rows no
            value after them. Occupancies then sum to less than 1 where episodes end, which E[w] = 1
            contradicts; bootstrap is consistent. The code appends rows of the absorbing state, too,
            but draws batches from the rows before them only. Here they are drawn.

Shapes: S seeds, N data, B batch, E episodes, C components, O observation, A action.
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
    num_updates: int = 3_000_000  # gradient steps of nu and e, including the warm start
    log_every: int = 1_000  # updates per compiled chunk, the unit of logging and saving
    eval_every: int = 20_000  # updates between evaluations
    eval_episodes: int = 10  # episodes per seed and evaluation
    batch_size: int = 512  # transitions per update, and as many initial observations
    learning_rate: float = 3e-4  # Adam, of every network and multiplier
    discount: float = 0.99  # gamma, per environment step
    hidden: tuple[int, ...] = (256, 256)  # widths of every network
    # OptiDICE
    f: Literal["soft_chi2", "chi2", "kl"] = "soft_chi2"  # the divergence between both occupancies
    alpha: float = 1.0  # its weight, in units of the reward as it is learned from
    residual_fit: Literal["minimax", "mse"] = "minimax"  # how e(s, a) learns E[e_nu | s, a]
    extraction: Literal["iproj", "wbc"] = "iproj"  # information projection, or weighted cloning
    components: int = 5  # C, Gaussians in the behaviour model of iproj
    warm_start: int = 500_000  # first updates, in which the actor does not learn yet
    standardise_reward: bool = True  # rewards of mean 0 and std 1 before they are scaled
    reward_scale: float = 0.1  # multiplies the rewards
    absorbing_state: Literal["masked", "bootstrap", "none"] = "masked"  # value 0, learned, no row


# --- Networks -----------------------------------------------------------------------------------
def uniform(bound):
    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def glorot_dense(width):
    return nn.Dense(width, kernel_init=nn.initializers.xavier_uniform())


class ClippedGaussianActor(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, observation):  # [..., O] -> mean and log std before tanh, [..., A] each
        x = observation
        for width in self.hidden:
            x = nn.relu(glorot_dense(width)(x))
        mean = nn.Dense(self.action_dim, kernel_init=uniform(1e-3), bias_init=uniform(1e-3))(x)
        log_std = nn.Dense(self.action_dim, kernel_init=uniform(1e-3), bias_init=uniform(1e-3))(x)
        return mean.clip(-7.24, 7.24), log_std.clip(-5.0, 2.0)  # tanh(7.24) = 1 - 1e-6


class MixtureActor(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int
    components: int

    @nn.compact
    def __call__(self, observation):  # [..., O] -> [..., C, A] twice, before tanh, and [..., C]
        x = observation
        for width in self.hidden:
            x = nn.relu(glorot_dense(width)(x))
        size = self.components * self.action_dim
        glorot = nn.initializers.xavier_uniform()
        mean = nn.Dense(size, kernel_init=glorot, bias_init=uniform(1e-3))(x)
        log_std = nn.Dense(size, kernel_init=uniform(1e-3), bias_init=uniform(1e-3))(x)
        logits = nn.Dense(self.components, kernel_init=glorot, bias_init=uniform(1e-3))(x)
        shape = (*x.shape[:-1], self.components, self.action_dim)
        mean = mean.clip(-7.24, 7.24).reshape(shape)
        log_std = log_std.clip(-5.0, 2.0).reshape(shape)
        return mean, log_std, jax.nn.log_softmax(logits)


class ScalarNet(nn.Module):
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, *inputs):  # [..., O] or [..., O], [..., A] -> [...]
        x = jnp.concatenate(inputs, axis=-1)
        for width in self.hidden:
            x = nn.relu(glorot_dense(width)(x))
        return nn.Dense(1, kernel_init=uniform(3e-3), bias_init=uniform(3e-3))(x).squeeze(-1)


# --- State --------------------------------------------------------------------------------------
class TransitionsAndStarts(NamedTuple):
    """Rows of the data, each beside the first observation of some episode."""

    observation: Any  # [N, O]
    action: Any  # [N, A]
    reward: Any  # [N]
    next_observation: Any  # [N, O]
    termination: Any  # [N], 1 where no value follows
    initial_observation: Any  # [N, O], of an episode that need not be the row's own


class State(NamedTuple):
    actor: train_state.TrainState
    value_net: train_state.TrainState  # nu(s), the multiplier of the flow into s
    residual_net: train_state.TrainState  # e(s, a), the mean of e_nu over next observations
    multipliers: train_state.TrainState  # lambda of nu and of e, for E[w] = 1
    log_temperature: train_state.TrainState  # logarithm of the weight of the actor's entropy
    behaviour: train_state.TrainState | None  # the policy of the data; None with wbc
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


def flagged(observation, cfg):
    """The observation and, if there is an absorbing state, a 0: it is not that state."""
    if cfg.absorbing_state == "none":
        return observation
    flag = jnp.zeros_like(observation[..., :1])
    return jnp.concatenate([observation, flag], axis=-1)


def with_absorbing_state(data, cfg):
    """The data with an absorbing state behind each termination, and one more row that stays there.

    Its observation is 0 but for the flag of 1, its reward 0, its action that of the terminal row.
    """
    if cfg.absorbing_state == "none":
        return data
    observation = flagged(data.observation, cfg)
    next_observation = flagged(data.next_observation, cfg)
    absorbing = jnp.zeros_like(observation[:1]).at[0, -1].set(1.0)  # [1, O]
    ended = jnp.flatnonzero(data.termination)
    termination = data.termination
    if cfg.absorbing_state == "bootstrap":
        termination = jnp.zeros_like(termination)

    next_observation = jnp.where(data.termination[:, None] == 1, absorbing, next_observation)
    data = data._replace(
        observation=observation, next_observation=next_observation, termination=termination
    )
    rows = jax.tree.map(lambda column: column[ended], data)
    rows = rows._replace(
        observation=jnp.broadcast_to(absorbing, rows.observation.shape),
        reward=jnp.zeros_like(rows.reward),
        next_observation=jnp.broadcast_to(absorbing, rows.observation.shape),
    )
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), data, rows)


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


def create_state(key, batch, cfg, statistics=(0.0, 1.0)):
    """State of one seed before the first update. `batch` supplies shapes only."""
    key_actor, key_value, key_residual, key_behaviour = jax.random.split(key, 4)
    action_dim = batch.action.shape[-1]
    actor = ClippedGaussianActor(cfg.hidden, action_dim)
    behaviour = MixtureActor(cfg.hidden, action_dim, cfg.components)
    net = ScalarNet(cfg.hidden)

    observation = flagged(batch.observation, cfg)
    actor_params = actor.init(key_actor, observation)
    value_params = net.init(key_value, observation)
    residual_params = net.init(key_residual, observation, batch.action)
    multipliers = {"value": jnp.float32(0.0), "residual": jnp.float32(0.0)}
    log_temperature = {"log": jnp.float32(0.0)}
    adam = optax.adam(cfg.learning_rate)
    behaviour_state = None
    if cfg.extraction == "iproj":
        behaviour_params = behaviour.init(key_behaviour, observation)
        behaviour_state = train_state.TrainState.create(
            apply_fn=behaviour.apply, params=behaviour_params, tx=adam
        )
    mean, std = statistics
    observation_shape = batch.observation.shape[-1:]
    return State(
        actor=train_state.TrainState.create(apply_fn=actor.apply, params=actor_params, tx=adam),
        value_net=train_state.TrainState.create(apply_fn=net.apply, params=value_params, tx=adam),
        residual_net=train_state.TrainState.create(
            apply_fn=net.apply, params=residual_params, tx=adam
        ),
        multipliers=train_state.TrainState.create(apply_fn=None, params=multipliers, tx=adam),
        log_temperature=train_state.TrainState.create(
            apply_fn=temperature_of, params=log_temperature, tx=adam
        ),
        behaviour=behaviour_state,
        statistics=(
            jnp.broadcast_to(mean, observation_shape),
            jnp.broadcast_to(std, observation_shape),
        ),
    )


def temperature_of(params):
    """The weight of log pi in the actor loss, from its logarithm."""
    return jnp.exp(params["log"])


# --- Losses -------------------------------------------------------------------------------------
def value_loss(params, state, batch, cfg):
    """(1 - gamma) E[nu(s0)] + E[-alpha f(w) + w (e_nu - lambda)] + lambda.

    The gradient goes through nu(s), nu(s') and nu(s0), as it is.
    """
    initial_value = state.value_net.apply_fn(params, batch.initial_observation)  # [B]
    residual = value_residual(params, state, batch, cfg)  # [B]
    multiplier = state.multipliers.params["value"]
    chex.assert_equal_shape([initial_value, residual, batch.reward])
    initial_loss = (1.0 - cfg.discount) * initial_value.mean()
    loss = initial_loss + lagrangian(residual, residual, multiplier, cfg) + multiplier
    weight = ratio((residual - multiplier) / cfg.alpha, cfg)
    return loss, {"value_loss": loss, "value": initial_value.mean(), "value_weight": weight.mean()}


def actor_loss(params, state, batch, noise, cfg):
    """The actor follows w = w(e), by one of two extractions, plus an entropy term.

    iproj: E[-log w(s, a~) + log pi(a~|s) - log pi_D(a~|s)] with a~ ~ pi(s), densities before tanh.
    wbc: E[-w(s, a) log pi(a|s)].
    """
    mean, log_std = state.actor.apply_fn(params, batch.observation)
    x = mean + jnp.exp(log_std) * noise  # before tanh, [B, A]
    entropy = -squashed_log_prob(x, mean, log_std).mean()
    if cfg.extraction == "iproj":
        residual = state.residual_net.apply_fn(
            state.residual_net.params, batch.observation, jnp.tanh(x)
        )
        log_weight = log_ratio(normalised_residual(residual, state, cfg), cfg)  # [B]
        log_prob = gaussian_log_prob(x, mean, log_std)  # [B]
        behaviour_log_prob = gaussian_mixture_log_prob(
            state.behaviour.params, state, batch.observation, x
        )
        chex.assert_equal_shape([log_weight, log_prob, behaviour_log_prob, batch.reward])
        extraction_loss = (log_prob - behaviour_log_prob - log_weight).mean()
    else:
        residual = state.residual_net.apply_fn(
            state.residual_net.params, batch.observation, batch.action
        )
        weight = ratio(normalised_residual(residual, state, cfg), cfg)  # [B]
        log_prob = squashed_log_prob(before_tanh(batch.action), mean, log_std)  # [B]
        chex.assert_equal_shape([weight, log_prob, batch.reward])
        extraction_loss = -(weight * log_prob).mean()
    temperature = state.log_temperature.apply_fn(state.log_temperature.params)
    loss = extraction_loss - temperature * entropy
    return loss, {"actor_loss": loss, "entropy": entropy, "temperature": temperature}


def temperature_loss(params, entropy, action_dim):
    """log temperature (entropy - target), target -A. An entropy above it lowers the temperature."""
    target = -action_dim
    return params["log"] * (entropy - target)


def residual_loss(params, state, batch, cfg):
    """e(s, a) against e_nu, which is a number here: -E[-alpha f(w) + w (e_nu - lambda)], w = w(e).

    Its minimum over e is at E[e_nu | s, a]. mse: E[(e - e_nu)^2], whose minimum is the same.
    """
    residual = value_residual(state.value_net.params, state, batch, cfg)  # [B]
    estimate = state.residual_net.apply_fn(params, batch.observation, batch.action)
    chex.assert_equal_shape([residual, estimate, batch.reward])
    if cfg.residual_fit == "minimax":
        loss = -lagrangian(residual, estimate, state.multipliers.params["residual"], cfg)
    else:
        loss = jnp.square(residual - estimate).mean()
    weight = ratio(normalised_residual(estimate, state, cfg), cfg)
    return loss, {"residual_loss": loss, "residual": estimate.mean(), "weight": weight.mean()}


def multiplier_loss(params, state, batch, cfg):
    """E[-alpha f(w) + w (e_nu - lambda)] + lambda, for w = w(e_nu) and for w = w(e), their sum.

    For e_nu its minimum over lambda is where E[w] = 1.
    """
    residual = value_residual(state.value_net.params, state, batch, cfg)  # [B]
    estimate = state.residual_net.apply_fn(
        state.residual_net.params, batch.observation, batch.action
    )
    value_part = lagrangian(residual, residual, params["value"], cfg) + params["value"]
    residual_part = lagrangian(residual, estimate, params["residual"], cfg) + params["residual"]
    return value_part + residual_part


def behaviour_loss(params, state, batch):
    """-log pi_D(a|s), mean over B, as a density before tanh."""
    x = before_tanh(batch.action)
    log_prob = gaussian_mixture_log_prob(params, state, batch.observation, x)
    chex.assert_equal_shape([log_prob, batch.reward])
    loss = -log_prob.mean()
    return loss, {"behaviour_loss": loss}


def value_residual(params, state, batch, cfg):
    """e_nu = r + gamma nu(s') - nu(s), [B]: one sample of s' each."""
    value = state.value_net.apply_fn(params, batch.observation)
    next_value = state.value_net.apply_fn(params, batch.next_observation)
    # Bootstrap through truncations, never through terminations.
    discount = cfg.discount * (1.0 - batch.termination)
    chex.assert_equal_shape([value, next_value, discount, batch.reward])
    return batch.reward + discount * next_value - value


def lagrangian(residual, estimate, multiplier, cfg):
    """E[-alpha f(w) + w (residual - multiplier)] with w = w((estimate - multiplier) / alpha)."""
    y = (estimate - multiplier) / cfg.alpha
    return (-cfg.alpha * f_of_ratio(y, cfg) + ratio(y, cfg) * (residual - multiplier)).mean()


def normalised_residual(residual, state, cfg):
    """y = (e - lambda) / alpha, [B], of which the ratio w is a function."""
    return (residual - state.multipliers.params["residual"]) / cfg.alpha


def ratio(y, cfg):
    """w(y) = max(0, f'^-1(y)): what maximises w y - f(w) over w of 0 and more."""
    if cfg.f == "chi2":
        return jnp.maximum(y + 1.0, 0.0)
    if cfg.f == "kl":
        return jnp.exp(y - 1.0)
    return jnp.where(y < 0, jnp.exp(jnp.minimum(y, 0.0)), y + 1.0)


def f_of_ratio(y, cfg):
    """f(w(y)). chi2: (w - 1)^2 / 2, kl: w log w, soft_chi2: w (log w - 1) + 1 below w = 1."""
    if cfg.f == "chi2":
        return 0.5 * jnp.square(ratio(y, cfg) - 1.0)
    if cfg.f == "kl":
        return ratio(y, cfg) * (y - 1.0)
    negative = jnp.minimum(y, 0.0)
    return jnp.where(y < 0, jnp.exp(negative) * (negative - 1.0) + 1.0, 0.5 * jnp.square(y))


def log_ratio(y, cfg):
    """log w(y), for chi2 at least log 1e-10."""
    if cfg.f == "chi2":
        return jnp.log(jnp.maximum(y + 1.0, 1e-10))
    if cfg.f == "kl":
        return y - 1.0
    return jnp.where(y < 0, y, jnp.log(jnp.maximum(y, 0.0) + 1.0))


def before_tanh(action):
    """arctanh of an action that keeps a small distance from -1 and 1."""
    return jnp.arctanh(action.clip(-1.0 + 1e-6, 1.0 - 1e-6))


def gaussian_mixture_log_prob(params, state, observation, x):
    """log of the density of the behaviour model at x, before tanh, [B]."""
    mean, log_std, log_share = state.behaviour.apply_fn(params, observation)  # [B, C, A], [B, C]
    x = jnp.broadcast_to(x[:, None], mean.shape)
    return jax.nn.logsumexp(log_share + gaussian_log_prob(x, mean, log_std), axis=-1)


def gaussian_log_prob(x, mean, log_std):
    """log N(x; mean, std), summed over the last axis."""
    error = (x - mean) * jnp.exp(-log_std)
    return -(0.5 * jnp.square(error) + log_std + 0.5 * jnp.log(2 * jnp.pi)).sum(axis=-1)


def squashed_log_prob(x, mean, log_std):
    """log density of tanh(x) for x ~ N(mean, std), summed over the last axis."""
    error = (x - mean) * jnp.exp(-log_std)
    log_prob = -0.5 * jnp.square(error) - log_std - 0.5 * jnp.log(2 * jnp.pi)
    log_prob -= 2 * (jnp.log(2.0) - x - jax.nn.softplus(-2 * x))  # log(1 - tanh(x)^2)
    return log_prob.sum(axis=-1)


# --- Update -------------------------------------------------------------------------------------
def update(state, step, key, data, cfg):
    """One gradient step of every network, all gradients of the state before it. One seed.

    The actor and the temperature begin after the warm start. Randomness is a function of
    (key, step) alone, so neither the length of a chunk nor a resumed run changes the result. The
    key of a step is fold_in(key, step).
    """
    key_batch, key_noise = jax.random.split(jax.random.fold_in(key, step))
    batch = sample_batch(data, key_batch, cfg)
    noise = jax.random.normal(key_noise, batch.action.shape)

    value_grads, value_metrics = jax.grad(value_loss, has_aux=True)(
        state.value_net.params, state, batch, cfg
    )
    residual_grads, residual_metrics = jax.grad(residual_loss, has_aux=True)(
        state.residual_net.params, state, batch, cfg
    )
    multiplier_grads = jax.grad(multiplier_loss)(state.multipliers.params, state, batch, cfg)
    actor_grads, actor_metrics = jax.grad(actor_loss, has_aux=True)(
        state.actor.params, state, batch, noise, cfg
    )
    temperature_grads = jax.grad(temperature_loss)(
        state.log_temperature.params, actor_metrics["entropy"], batch.action.shape[-1]
    )
    metrics = value_metrics | residual_metrics | actor_metrics
    behaviour = None
    if cfg.extraction == "iproj":
        behaviour_grads, behaviour_metrics = jax.grad(behaviour_loss, has_aux=True)(
            state.behaviour.params, state, batch
        )
        behaviour = state.behaviour.apply_gradients(grads=behaviour_grads)
        metrics = metrics | behaviour_metrics

    warm = step < cfg.warm_start
    actor = state.actor.apply_gradients(grads=actor_grads)
    log_temperature = state.log_temperature.apply_gradients(grads=temperature_grads)
    state = state._replace(
        actor=choose(warm, state.actor, actor),
        value_net=state.value_net.apply_gradients(grads=value_grads),
        residual_net=state.residual_net.apply_gradients(grads=residual_grads),
        multipliers=state.multipliers.apply_gradients(grads=multiplier_grads),
        log_temperature=choose(warm, state.log_temperature, log_temperature),
        behaviour=behaviour,
    )
    return state, metrics


def choose(condition, tree, other):
    """`tree` where the condition holds, else `other`."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), tree, other)


def sample_batch(data, key, cfg):
    """`batch_size` rows of the data, drawn with replacement."""
    index = jax.random.randint(key, (cfg.batch_size,), 0, len(data.reward))
    return jax.tree.map(lambda column: column[index], data)


def train_chunk(state, key, start, data, cfg):
    """`log_every` updates of one seed, compiled as one program. Metrics are chunk means."""
    steps = start + jnp.arange(cfg.log_every)
    state, metrics = jax.lax.scan(partial(update, key=key, data=data, cfg=cfg), state, steps)
    return state, jax.tree.map(jnp.mean, metrics)


# --- Policy -------------------------------------------------------------------------------------
def policy(apply_fn, params, observation, key, cfg):
    """tanh of the mean, [..., O] -> [..., A]. `key` is not used."""
    actor_params, statistics = params
    observation = flagged(standardise(observation, statistics), cfg)
    mean, _ = apply_fn(actor_params, observation)
    return jnp.tanh(mean)


def policy_params(state):
    return state.actor.params, state.statistics


def policy_fn(state, cfg):
    """`policy` with the networks filled in: (params, observation, key) -> action."""
    return partial(policy, state.actor.apply_fn, cfg=cfg)


# --- Training -----------------------------------------------------------------------------------
def train(cfg, options):
    """Train every seed of `cfg` and return its final normalised scores, [S]."""
    experiment.check(cfg, options)
    if cfg.alpha == 0:
        fail("--alpha 0.0: must be above 0, since the residuals are divided by it")
    if cfg.discount == 1:
        fail("--discount 1.0: must be below 1, for the occupancy of a discounted future")
    if cfg.warm_start >= cfg.num_updates:
        fail(f"--warm-start {cfg.warm_start}: must be below --num-updates for the actor to learn")
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps)
    reward = dataset.transitions.reward
    if cfg.standardise_reward:
        reward = (reward - reward.mean()) / (reward.std() + 1e-10)
    rows = dataset.transitions._replace(reward=cfg.reward_scale * reward)
    rows, statistics = normalise(rows)
    example = jax.tree.map(lambda x: x[:1], rows)  # one row, for its shapes
    data = with_starts(dataset, with_absorbing_state(rows, cfg))
    data = jax.device_get(data)  # in the host's memory, where `--data host` leaves it
    data = experiment.place(data, options)
    init_keys, train_keys, policy_keys = experiment.streams(cfg.seeds, 3)  # [S] keys each
    create = partial(create_state, batch=example, cfg=cfg, statistics=statistics)
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

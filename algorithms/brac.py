# SPDX-License-Identifier: Apache-2.0
"""BRAC (Wu et al., 2019): actor-critic with a penalty for leaving a cloned behaviour policy mu.

Paper       https://arxiv.org/abs/1911.11361, BEAR https://arxiv.org/abs/1906.00949
Reference   https://github.com/google-research/google-research (behavior_regularized_offline_rl)
Run         python algorithms/brac.py --config configs/brac/mujoco.yaml
Parent      sac.py (338 lines)
Results     docs/results.md
Deviations  An alpha that is learned takes the divergence of the actor before its step, where the
            authors estimate it anew after it; so does the temperature of the cloning. Both are
            clipped to their range, where the authors mask the gradient at its ends. The actor
            follows the minimum of the critics at any `lam`, as in BEAR; BRAC's authors mix minimum
            and maximum there, too. Targets begin as copies; theirs are initialised independently.
            Adam's epsilon is 1e-8, not Keras's 1e-7. BEAR's code differs more: it trains a VAE
            beside the critics in place of mu, has other initial values and a wider range of the
            actor's std, and takes the steps of critics and actor at the same time. Rows at
            terminations and truncations are kept; D4RL's BRAC loader drops the former.

Variant v lowers the reward by alpha D, the divergence of pi from mu, in target and actor: lectures
call it the penalty on the reward's side. Variant p has the penalty in the actor's loss alone, the
actor's side. BEAR is variant p with an MMD and a learned alpha: configs/brac/mujoco_bear.yaml.

Shapes: S seeds, K critics, B batch, N samples, M samples when acting, O observation, A action.
        Arrays are float32.
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
    num_updates: int = 800_000  # gradient steps: first the cloning's, then actor's and critics'
    log_every: int = 1_000  # updates per compiled chunk, the unit of logging and saving
    eval_every: int = 20_000  # updates between evaluations
    eval_episodes: int = 10  # episodes per seed and evaluation
    batch_size: int = 256  # transitions per update
    actor_learning_rate: float = 3e-4  # Adam
    critic_learning_rate: float = 1e-3  # Adam
    discount: float = 0.99  # gamma, per environment step
    target_rate: float = 0.005  # tau, Polyak step of the target critics
    hidden: tuple[int, ...] = (200, 200)  # widths of the actor and of the behaviour policy
    critic_hidden: tuple[int, ...] = (300, 300)  # widths of the critics
    num_critics: int = 2  # K, the target mixes their minimum and maximum by lam
    # BRAC
    clone_updates: int = 300_000  # first updates: they train the behaviour policy alone
    clone_learning_rate: float = 5e-4  # Adam, for the behaviour policy and its temperature
    variant: Literal["v", "p"] = "v"  # penalty in target and actor (v) or in the actor alone (p)
    divergence: Literal["kl", "mmd"] = "kl"  # D, of pi(s) from mu(s)
    alpha: float = 0.1  # weight of the divergence; the first one where it is learned
    alpha_training: Literal["none", "linear", "log"] = "none"  # learn alpha, or its logarithm
    alpha_learning_rate: float = 1e-3  # Adam
    target_divergence: float = 0.0  # the divergence that a learned alpha aims at
    warm_start: int = 20_000  # updates after the cloning in which the actor ignores Q
    num_samples: int = 4  # N, actions per row to estimate the divergence
    action_margin: float = 1e-3  # where log mu is taken, actions keep this distance from -1 and 1
    kernel: Literal["laplacian", "gaussian"] = "laplacian"  # of mmd: with |x - y|_1 or |x - y|_2^2
    kernel_width: float = 20.0  # sigma, the kernel is exp(-distance / sigma)
    mmd_before_tanh: bool = False  # mmd of the actions before tanh, as in BEAR
    mmd_root: bool = False  # the MMD, as in BEAR, not its square
    lam: float = 1.0  # lambda, weight of min_k Q_k in the target; max_k Q_k has 1 - lambda
    num_target_samples: int = 1  # actions per next observation, the target takes the best
    num_eval_samples: int | None = None  # M, the best by Q_1 acts; None: tanh of the mean


# --- Networks -----------------------------------------------------------------------------------
def glorot_dense(width):
    return nn.Dense(width, kernel_init=nn.initializers.xavier_uniform())


class SmallStdActor(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, observation):  # [..., O] -> mean and log std before tanh, [..., A] each
        x = observation
        for width in self.hidden:
            x = nn.relu(glorot_dense(width)(x))
        output = glorot_dense(2 * self.action_dim)(x)
        mean, position = jnp.split(output, 2, axis=-1)
        log_std = -5.0 + 2.5 * (jnp.tanh(position) + 1.0)  # from -5 to 0
        return mean, log_std


class GlorotReluCritic(nn.Module):
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, observation, action):  # [..., O], [..., A] -> [...]
        x = jnp.concatenate([observation, action], axis=-1)
        for width in self.hidden:
            x = nn.relu(glorot_dense(width)(x))
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
    actor: train_state.TrainState
    critic: TrainState  # every array has a leading [K] axis
    alpha: train_state.TrainState  # one number, see `alpha_of`
    behaviour: train_state.TrainState  # mu, of the actor's architecture
    clone_temperature: train_state.TrainState  # one number, weight of the entropy in the cloning


def create_state(key, batch, cfg):
    """State of one seed before the first update. `batch` supplies shapes only."""
    key_actor, key_critic, key_behaviour = jax.random.split(key, 3)
    actor = SmallStdActor(cfg.hidden, action_dim=batch.action.shape[-1])
    critic = GlorotReluCritic(cfg.critic_hidden)
    init_critics = jax.vmap(critic.init, (0, None, None))
    apply_critics = jax.vmap(critic.apply, (0, None, None))  # -> [K, B]

    actor_params = actor.init(key_actor, batch.observation)
    critic_keys = jax.random.split(key_critic, cfg.num_critics)
    critic_params = init_critics(critic_keys, batch.observation, batch.action)
    behaviour_params = actor.init(key_behaviour, batch.observation)
    alpha, alpha_range = jnp.float32(cfg.alpha), (0.0, 500.0)
    if cfg.alpha_training == "log":
        alpha, alpha_range = jnp.log(alpha).clip(-5.0, 10.0), (-5.0, 10.0)
    actor_adam = optax.adam(cfg.actor_learning_rate)
    critic_adam = optax.adam(cfg.critic_learning_rate)
    alpha_adam = optax.chain(optax.adam(cfg.alpha_learning_rate), keep_between(*alpha_range))
    behaviour_adam = optax.adam(cfg.clone_learning_rate)
    temperature_adam = optax.chain(optax.adam(cfg.clone_learning_rate), keep_between(0.0, jnp.inf))
    return State(
        actor=train_state.TrainState.create(
            apply_fn=actor.apply, params=actor_params, tx=actor_adam
        ),
        critic=TrainState.create(apply_critics, critic_params, critic_adam),
        alpha=train_state.TrainState.create(
            apply_fn=alpha_of, params={"value": alpha}, tx=alpha_adam
        ),
        behaviour=train_state.TrainState.create(
            apply_fn=actor.apply, params=behaviour_params, tx=behaviour_adam
        ),
        clone_temperature=train_state.TrainState.create(
            apply_fn=None, params={"value": jnp.float32(1.0)}, tx=temperature_adam
        ),
    )


def keep_between(low, high):
    """The last step of an optimiser whose parameters do not leave [low, high]."""

    def bounded(changes, params):  # optax adds the result to the parameters
        return jax.tree.map(lambda x, change: (x + change).clip(low, high) - x, params, changes)

    return optax.stateless(bounded)


def alpha_of(params, cfg):
    """The weight of the divergence, from alpha itself or from its logarithm."""
    return jnp.exp(params["value"]) if cfg.alpha_training == "log" else params["value"]


# --- Losses -------------------------------------------------------------------------------------
def critic_loss(params, state, batch, key, cfg):
    """Squared TD error to r + gamma (Q(s', a') - alpha D(s')), mean over B, summed over K.

    a' ~ pi(s'). Its Q is lam min_k Q_k + (1 - lam) max_k Q_k, of the best of `num_target_samples`
    actions. The term with D is that of variant v alone.
    """
    key_actor, key_behaviour = jax.random.split(key)
    count = cfg.num_target_samples
    mean, log_std = state.actor.apply_fn(state.actor.params, batch.next_observation)
    x = sample_gaussian(mean, log_std, key_actor, count + cfg.num_samples)  # [count + N, B, A]
    next_action = jnp.tanh(x[:count])
    next_observation = jnp.repeat(batch.next_observation[None], count, axis=0)  # [count, B, O]
    next_q = state.critic.apply_fn(state.critic.target_params, next_observation, next_action)
    lowest_q = next_q.min(axis=0)  # [K, count, B] -> [count, B]
    highest_q = next_q.max(axis=0)  # [K, count, B] -> [count, B]
    mixed_q = cfg.lam * lowest_q + (1.0 - cfg.lam) * highest_q
    next_value = mixed_q.max(axis=0)  # [count, B] -> [B]
    if cfg.variant == "v":
        alpha = alpha_of(state.alpha.params, cfg)
        next_divergence = divergence(
            x[count:], mean, log_std, state.behaviour, batch.next_observation, key_behaviour, cfg
        )
        chex.assert_equal_shape([next_value, next_divergence])
        next_value = next_value - alpha * next_divergence  # [B]
    # Bootstrap through truncations, never through terminations.
    target = batch.reward + cfg.discount * (1.0 - batch.termination) * next_value  # [B]

    q = state.critic.apply_fn(params, batch.observation, batch.action)  # [K, B]
    chex.assert_equal_shape([*q, target])
    loss = jnp.square(q - target[None]).mean(axis=1).sum()
    return loss, {"critic_loss": loss, "q": q.mean()}


def actor_loss(params, state, batch, key, warm, cfg):
    """alpha D(s) - min_k Q_k(s, a~) with a~ ~ pi(s), mean over B; without Q while `warm`."""
    key_actor, key_behaviour = jax.random.split(key)
    mean, log_std = state.actor.apply_fn(params, batch.observation)
    x = sample_gaussian(mean, log_std, key_actor, 1 + cfg.num_samples)  # [1 + N, B, A]
    q = state.critic.apply_fn(state.critic.params, batch.observation, jnp.tanh(x[0]))
    q = q.min(axis=0)  # [K, B] -> [B]
    penalty = divergence(
        x[1:], mean, log_std, state.behaviour, batch.observation, key_behaviour, cfg
    )
    chex.assert_equal_shape([q, penalty, batch.reward])
    alpha = alpha_of(state.alpha.params, cfg)
    objective = jnp.where(warm, 0.0, q)
    loss = (alpha * penalty - objective).mean()
    return loss, {"actor_loss": loss, "divergence": penalty.mean(), "alpha": alpha}


def alpha_loss(params, divergence, cfg):
    """-alpha (D - target), so alpha grows while the divergence is above its target."""
    return -alpha_of(params, cfg) * (divergence - cfg.target_divergence)


def clone_loss(params, state, batch, key, cfg):
    """temperature log mu(a~|s) - log mu(a|s) with a~ ~ mu(s), mean over B."""
    mean, log_std = state.behaviour.apply_fn(params, batch.observation)
    x = sample_gaussian(mean, log_std, key, 1)[0]  # [B, A]
    sampled_log_prob = squashed_log_prob(x, mean, log_std)  # [B]
    action = inside(batch.action, cfg)
    log_prob = squashed_log_prob(jnp.arctanh(action), mean, log_std)  # [B]
    chex.assert_equal_shape([sampled_log_prob, log_prob, batch.reward])
    temperature = state.clone_temperature.params["value"]
    loss = (temperature * sampled_log_prob - log_prob).mean()
    return loss, {
        "clone_loss": loss,
        "clone_log_prob": log_prob.mean(),
        "clone_entropy": -sampled_log_prob.mean(),
        "clone_temperature": temperature,
    }


def clone_temperature_loss(params, entropy, action_dim):
    """temperature (entropy - target), target -A. An entropy above it lowers the temperature."""
    target = -action_dim
    return params["value"] * (entropy - target)


def divergence(x, mean, log_std, behaviour, observation, key, cfg):
    """D(pi(s), mu(s)) of each row, [B], from draws x [N, B, A] of N(mean, std), pi before tanh."""
    behaviour_mean, behaviour_log_std = behaviour.apply_fn(behaviour.params, observation)
    if cfg.divergence == "kl":
        log_pi = squashed_log_prob(x, mean[None], log_std[None])  # [N, B]
        action = inside(jnp.tanh(x), cfg)
        log_mu = squashed_log_prob(
            jnp.arctanh(action), behaviour_mean[None], behaviour_log_std[None]
        )  # [N, B]
        return (log_pi - log_mu).mean(axis=0)
    y = sample_gaussian(behaviour_mean, behaviour_log_std, key, len(x))  # [N, B, A]
    if not cfg.mmd_before_tanh:
        x, y = jnp.tanh(x), jnp.tanh(y)
    return mmd(x, y, cfg)


def mmd(x, y, cfg):
    """Mean k(x, x') + mean k(y, y') - 2 mean k(x, y) of each row, [N, B, A] twice -> [B].

    The biased estimate: a pair of a sample with itself counts.
    """
    within_x = mean_kernel(x, x, cfg)
    within_y = mean_kernel(y, y, cfg)
    between = mean_kernel(x, y, cfg)
    squared_mmd = within_x + within_y - 2.0 * between
    return jnp.sqrt(squared_mmd + 1e-6) if cfg.mmd_root else squared_mmd


def mean_kernel(x, y, cfg):
    """exp(-distance / sigma), mean over all pairs of x and y, [N, B, A] twice -> [B]."""
    difference = x[None] - y[:, None]  # [N, N, B, A]
    if cfg.kernel == "laplacian":
        distance = jnp.abs(difference).sum(axis=-1)
    else:
        distance = jnp.square(difference).sum(axis=-1)
    return jnp.exp(-distance / cfg.kernel_width).mean(axis=(0, 1))


def sample_gaussian(mean, log_std, key, count):
    """`count` draws of N(mean, std), [..., A] -> [count, ..., A]: actions before tanh."""
    noise = jax.random.normal(key, (count, *mean.shape))
    return mean[None] + jnp.exp(log_std)[None] * noise


def inside(action, cfg):
    """The action, clipped to where arctanh is finite and log mu is moderate."""
    limit = 1.0 - cfg.action_margin
    return action.clip(-limit, limit)


def squashed_log_prob(x, mean, log_std):
    """log density of tanh(x) for x ~ N(mean, std), summed over the last axis."""
    error = (x - mean) * jnp.exp(-log_std)
    log_prob = -0.5 * jnp.square(error) - log_std - 0.5 * jnp.log(2 * jnp.pi)
    log_prob -= 2 * (jnp.log(2.0) - x - jax.nn.softplus(-2 * x))  # log(1 - tanh(x)^2)
    return log_prob.sum(axis=-1)


# --- Update -------------------------------------------------------------------------------------
def clone_update(state, step, key, data, cfg):
    """A gradient step of the behaviour policy and of the temperature of its entropy. One seed.

    The first phase. Its key of a step is fold_in(key, step), as in `update`.
    """
    key_batch, key_clone = jax.random.split(jax.random.fold_in(key, step))
    batch = sample_batch(data, key_batch, cfg)
    grads, metrics = jax.grad(clone_loss, has_aux=True)(
        state.behaviour.params, state, batch, key_clone, cfg
    )
    temperature_grads = jax.grad(clone_temperature_loss)(
        state.clone_temperature.params, metrics["clone_entropy"], batch.action.shape[-1]
    )
    state = state._replace(
        behaviour=state.behaviour.apply_gradients(grads=grads),
        clone_temperature=state.clone_temperature.apply_gradients(grads=temperature_grads),
    )
    return state, metrics


def update(state, step, key, data, cfg):
    """A gradient step of critics, actor and alpha in turn, then one of the targets. One seed.

    The second phase: the behaviour policy stays as it is. Randomness is a function of (key, step)
    alone, so neither the length of a chunk nor a resumed run changes the result. The key of a step
    is fold_in(key, step).
    """
    key_batch, key_critic, key_actor = jax.random.split(jax.random.fold_in(key, step), 3)
    batch = sample_batch(data, key_batch, cfg)
    warm = step < cfg.clone_updates + cfg.warm_start

    grads, critic_metrics = jax.grad(critic_loss, has_aux=True)(
        state.critic.params, state, batch, key_critic, cfg
    )
    state = state._replace(critic=state.critic.apply_gradients(grads=grads))

    grads, actor_metrics = jax.grad(actor_loss, has_aux=True)(
        state.actor.params, state, batch, key_actor, warm, cfg
    )
    state = state._replace(actor=state.actor.apply_gradients(grads=grads))

    if cfg.alpha_training != "none":
        grads = jax.grad(alpha_loss)(state.alpha.params, actor_metrics["divergence"], cfg)
        state = state._replace(alpha=state.alpha.apply_gradients(grads=grads))

    state = state._replace(critic=update_target(state.critic, cfg))
    return state, critic_metrics | actor_metrics


def sample_batch(data, key, cfg):
    """`batch_size` rows of the data, drawn with replacement."""
    index = jax.random.randint(key, (cfg.batch_size,), 0, len(data.reward))
    return jax.tree.map(lambda column: column[index], data)


def update_target(net, cfg):
    target_params = optax.incremental_update(net.params, net.target_params, cfg.target_rate)
    return net.replace(target_params=target_params)


def clone_chunk(state, key, start, data, cfg):
    """`log_every` updates of the first phase, as `train_chunk` makes those of the second."""
    steps = start + jnp.arange(cfg.log_every)
    state, metrics = jax.lax.scan(partial(clone_update, key=key, data=data, cfg=cfg), state, steps)
    return state, jax.tree.map(jnp.mean, metrics)


def train_chunk(state, key, start, data, cfg):
    """`log_every` updates of one seed, compiled as one program. Metrics are chunk means."""
    steps = start + jnp.arange(cfg.log_every)
    state, metrics = jax.lax.scan(partial(update, key=key, data=data, cfg=cfg), state, steps)
    return state, jax.tree.map(jnp.mean, metrics)


# --- Policy -------------------------------------------------------------------------------------
def policy(apply_fn, params, observation, key, apply_critics, cfg):
    """tanh of the mean, or the action of highest Q_1 of M sampled ones. [..., O] -> [..., A].

    `key` draws the samples.
    """
    actor_params, critic_params = params
    mean, log_std = apply_fn(actor_params, observation)
    if cfg.num_eval_samples is None:
        return jnp.tanh(mean)
    action = jnp.tanh(sample_gaussian(mean, log_std, key, cfg.num_eval_samples))  # [M, ..., A]
    observation = jnp.repeat(observation[None], cfg.num_eval_samples, axis=0)  # [M, ..., O]
    q = apply_critics(critic_params, observation, action)
    q = q[0]  # [K, M, ...] -> [M, ...], the first critic
    best = q.argmax(axis=0)[None, ..., None]  # [1, ..., 1]
    return jnp.take_along_axis(action, best, axis=0)[0]


def policy_params(state):
    return state.actor.params, state.critic.params


def policy_fn(state, cfg):
    """`policy` with the networks filled in: (params, observation, key) -> action."""
    return partial(policy, state.actor.apply_fn, apply_critics=state.critic.apply_fn, cfg=cfg)


# --- Training -----------------------------------------------------------------------------------
def train(cfg, options):
    """Train every seed of `cfg` and return its final normalised scores, [S]."""
    experiment.check(cfg, options)
    if cfg.alpha_training == "log" and not 0.007 <= cfg.alpha <= 22_000:
        fail(f"--alpha {cfg.alpha}: from 0.007 to 22000, since log alpha stays between -5 and 10")
    if cfg.alpha_training == "linear" and cfg.alpha > 500:
        fail(f"--alpha {cfg.alpha}: at most 500, the limit of an alpha that is learned")
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps)
    data = experiment.place(dataset.transitions, options)
    example = jax.tree.map(lambda x: x[:1], data)  # one row, for its shapes
    init_keys, train_keys, policy_keys = experiment.streams(cfg.seeds, 3)  # [S] keys each
    create = partial(create_state, batch=example, cfg=cfg)
    state = jax.vmap(create)(init_keys)
    # Compiled once for all seeds. An `update` shows which rows a step reads, for --data host.
    clone_seeds = experiment.over_seeds(partial(clone_chunk, cfg=cfg), update=clone_update)
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
            if run.evaluates(step) and step >= cfg.clone_updates:  # from the actor's phase on
                scores = rollouts.start(policy_params(state), step)
            last_metrics = metrics  # of the chunk that ended at this step
            # An accelerator trains while the CPU evaluates.
            if step < cfg.clone_updates:  # the first phase
                state, metrics = clone_seeds(state, train_keys, step, data)
            elif step < cfg.num_updates:  # the second one
                state, metrics = train_seeds(state, train_keys, step, data)
            run.log(step, last_metrics, scores)
    return run.scores


if __name__ == "__main__":
    train(*experiment.parse(Config))

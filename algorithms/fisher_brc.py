# SPDX-License-Identifier: Apache-2.0
"""Fisher-BRC (Kostrikov et al., 2021): Q is the log density of a cloned policy plus an offset.

Paper       https://arxiv.org/abs/2103.08050
Reference   https://github.com/google-research/google-research (fisher_brc)
Run         python algorithms/fisher_brc.py --config configs/fisher_brc/mujoco.yaml
Parent      sac.py (299 lines)
Results     docs/results.md
Deviations  Adam's epsilon is 1e-8, not TensorFlow's 1e-7. The learning rate of the cloning falls at
            80 % and at 90 % of `clone_updates`, where the authors' falls at their million's. Rows
            at a truncation are kept.

Shapes: S seeds, K critics, B batch, C components, O observation, A action. Arrays are float32.
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

from common import datasets, evaluation, experiment


# --- Config -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    dataset: str = "local/pointmaze/umaze-v0"  # data set id or path, see docs/data.md
    seeds: tuple[int, ...] = (0,)  # trained in parallel
    num_updates: int = 2_000_000  # gradient steps: first the cloning's, then actor's and critics'
    log_every: int = 1_000  # updates per compiled chunk, the unit of logging and saving
    eval_every: int = 20_000  # updates between evaluations
    eval_episodes: int = 10  # episodes per seed and evaluation
    batch_size: int = 256  # transitions per update
    actor_learning_rate: float = 3e-4  # Adam
    critic_learning_rate: float = 3e-4  # Adam
    temperature_learning_rate: float = 3e-4  # Adam, for the weight of the actor's entropy
    discount: float = 0.99  # gamma, per environment step
    target_rate: float = 0.005  # tau, Polyak step of the target critics
    hidden: tuple[int, ...] = (256, 256, 256)  # widths of actor and critics
    num_critics: int = 2  # K, target and actor use their minimum
    reward_scale: float = 1.0  # multiplies data set rewards, so that they count beside log mu
    # Fisher-BRC
    clone_updates: int = 1_000_000  # first updates: they train the behaviour policy alone
    clone_learning_rate: float = 1e-3  # Adam, at first; a tenth and a hundredth of it at the end
    behaviour_hidden: tuple[int, ...] = (256, 256)  # widths of the behaviour policy
    num_components: int = 5  # C, of the mixture that the behaviour policy is
    gradient_penalty: float = 0.1  # lambda, weight of |grad_a O|^2 at the policy's actions
    survival_bonus: float = 5.0  # added to every reward afterwards
    action_margin: float = 1e-6  # where log mu is taken, actions keep this distance from -1 and 1


# --- Networks -----------------------------------------------------------------------------------
def orthogonal_dense(width):
    return nn.Dense(width, kernel_init=nn.initializers.orthogonal(2**0.5))


def small_dense(width):
    return nn.Dense(width, kernel_init=nn.initializers.orthogonal(1e-2))


class OrthogonalActor(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, observation):  # [..., O] -> mean and log std before tanh, [..., A] each
        x = observation
        for width in self.hidden:
            x = nn.relu(orthogonal_dense(width)(x))
        output = small_dense(2 * self.action_dim)(x)
        mean, log_std = jnp.split(output, 2, axis=-1)
        return mean, log_std.clip(-20.0, 2.0)


class MixturePolicy(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int
    num_components: int

    @nn.compact
    def __call__(self, observation):
        """Of each component logit, mean and log std before tanh, [..., O] -> [..., A, C] each."""
        x = observation
        for width in self.hidden:
            x = nn.relu(orthogonal_dense(width)(x))
        output = small_dense(3 * self.action_dim * self.num_components)(x)
        logits, mean, log_std = jnp.split(output, 3, axis=-1)
        shape = (*x.shape[:-1], self.action_dim, self.num_components)
        log_std = log_std.clip(-20.0, 2.0)
        return logits.reshape(shape), mean.reshape(shape), log_std.reshape(shape)


class OffsetCritic(nn.Module):
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, observation, action):  # [..., O], [..., A] -> O(s, a), [...]
        x = jnp.concatenate([observation, action], axis=-1)
        for width in self.hidden:
            x = nn.relu(orthogonal_dense(width)(x))
        return small_dense(1)(x).squeeze(-1)


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
    critic: TrainState  # the offsets O; every array has a leading [K] axis
    log_temperature: train_state.TrainState  # one number, the logarithm of the temperature
    behaviour: train_state.TrainState  # mu, a mixture
    clone_temperature: train_state.TrainState  # one number, a logarithm: of the cloning's entropy


def create_state(key, batch, cfg):
    """State of one seed before the first update. `batch` supplies shapes only."""
    key_actor, key_critic, key_behaviour = jax.random.split(key, 3)
    action_dim = batch.action.shape[-1]
    actor = OrthogonalActor(cfg.hidden, action_dim)
    critic = OffsetCritic(cfg.hidden)
    behaviour = MixturePolicy(cfg.behaviour_hidden, action_dim, cfg.num_components)
    init_critics = jax.vmap(critic.init, (0, None, None))
    apply_critics = jax.vmap(critic.apply, (0, None, None))  # -> [K, B]

    actor_params = actor.init(key_actor, batch.observation)
    critic_keys = jax.random.split(key_critic, cfg.num_critics)
    critic_params = init_critics(critic_keys, batch.observation, batch.action)
    behaviour_params = behaviour.init(key_behaviour, batch.observation)
    actor_adam = optax.adam(cfg.actor_learning_rate)
    critic_adam = optax.adam(cfg.critic_learning_rate)
    temperature_adam = optax.adam(cfg.temperature_learning_rate)
    clone_rate = clone_schedule(cfg)
    return State(
        actor=train_state.TrainState.create(
            apply_fn=actor.apply, params=actor_params, tx=actor_adam
        ),
        critic=TrainState.create(apply_critics, critic_params, critic_adam),
        log_temperature=train_state.TrainState.create(
            apply_fn=temperature_of, params={"log": jnp.float32(0.0)}, tx=temperature_adam
        ),
        behaviour=train_state.TrainState.create(
            apply_fn=behaviour.apply, params=behaviour_params, tx=optax.adam(clone_rate)
        ),
        clone_temperature=train_state.TrainState.create(
            apply_fn=temperature_of, params={"log": jnp.float32(0.0)}, tx=optax.adam(clone_rate)
        ),
    )


def clone_schedule(cfg):
    """The learning rate of the cloning: a tenth after 80 % of its updates, again after 90 %."""
    first_fall, second_fall = 8 * cfg.clone_updates // 10, 9 * cfg.clone_updates // 10
    return optax.piecewise_constant_schedule(
        cfg.clone_learning_rate, {first_fall: 0.1, second_fall: 0.1}
    )


def temperature_of(params):
    """The weight of log pi in the actor loss, from its logarithm."""
    return jnp.exp(params["log"])


# --- Losses -------------------------------------------------------------------------------------
def critic_loss(params, state, batch, key, cfg):
    """Squared TD error of Q_k = O_k + log mu, and lambda |grad_a O_k(s, a~)|^2 with a~ ~ pi(s).

    Mean over B, summed over K. The target is r + bonus + gamma min_k Q_k(s', a') with a' ~ pi(s').
    """
    noise = jax.random.normal(key, (2, *batch.action.shape))
    next_action, _ = sample_policy(state.actor, batch.next_observation, noise[0])
    policy_action, _ = sample_policy(state.actor, batch.observation, noise[1])

    next_offset = state.critic.apply_fn(
        state.critic.target_params, batch.next_observation, next_action
    )
    next_log_mu = log_behaviour(state.behaviour, batch.next_observation, next_action, cfg)
    next_q = next_offset.min(axis=0) + next_log_mu  # [K, B] -> [B]
    reward = cfg.reward_scale * batch.reward + cfg.survival_bonus
    # Bootstrap through truncations, never through terminations.
    target = reward + cfg.discount * (1.0 - batch.termination) * next_q  # [B]

    offset = state.critic.apply_fn(params, batch.observation, batch.action)  # [K, B]
    log_mu = log_behaviour(state.behaviour, batch.observation, batch.action, cfg)  # [B]
    q = offset + log_mu[None]  # [K, B]
    chex.assert_equal_shape([*q, target, next_log_mu, log_mu])
    td_error = jnp.square(q - target[None]).mean(axis=1).sum()

    gradient = offset_gradient(params, state.critic.apply_fn, batch.observation, policy_action)
    squared_norm = jnp.square(gradient).sum(axis=-1)  # [K, B, A] -> [K, B]
    gradient_loss = squared_norm.mean(axis=1).sum()
    loss = td_error + cfg.gradient_penalty * gradient_loss
    return loss, {
        "critic_loss": loss,
        "td_error": td_error,
        "gradient_loss": gradient_loss,
        "q": q.mean(),
        "log_mu": log_mu.mean(),
    }


def actor_loss(params, state, batch, key, cfg):
    """temperature log pi(a~|s) - min_k O_k(s, a~) - log mu(a~|s), a~ ~ pi(s), mean over B."""
    noise = jax.random.normal(key, batch.action.shape)
    mean, log_std = state.actor.apply_fn(params, batch.observation)
    action, log_prob = sample_squashed(mean, log_std, noise)  # [B, A], [B]
    offset = state.critic.apply_fn(state.critic.params, batch.observation, action)
    log_mu = log_behaviour(state.behaviour, batch.observation, action, cfg)  # [B]
    q = offset.min(axis=0) + log_mu  # [K, B] -> [B]
    chex.assert_equal_shape([q, log_mu, log_prob, batch.reward])
    temperature = state.log_temperature.apply_fn(state.log_temperature.params)
    entropy_loss = temperature * log_prob
    loss = (entropy_loss - q).mean()
    return loss, {"actor_loss": loss, "entropy": -log_prob.mean(), "temperature": temperature}


def temperature_loss(params, entropy, action_dim):
    """temperature (entropy - target), target -A. An entropy above it lowers the temperature."""
    target = -action_dim
    return temperature_of(params) * (entropy - target)


def clone_loss(params, state, batch, key, cfg):
    """-log mu(a|s) + temperature log mu(a~|s) with a~ ~ mu(s), mean over B.

    The gradient through a~ is that of its component; the choice of the component has none.
    """
    logits, mean, log_std = state.behaviour.apply_fn(params, batch.observation)  # [B, A, C] each
    sampled_action = jnp.tanh(sample_mixture(logits, mean, log_std, key))  # [B, A]
    sampled_log_prob = mixture_log_prob(inside(sampled_action, cfg), logits, mean, log_std)
    log_prob = mixture_log_prob(inside(batch.action, cfg), logits, mean, log_std)
    chex.assert_equal_shape([log_prob, sampled_log_prob, batch.reward])
    temperature = state.clone_temperature.apply_fn(state.clone_temperature.params)
    loss = (temperature * sampled_log_prob - log_prob).mean()
    return loss, {
        "clone_loss": loss,
        "clone_log_prob": log_prob.mean(),
        "clone_entropy": -sampled_log_prob.mean(),
        "clone_temperature": temperature,
    }


def offset_gradient(params, apply_critics, observation, action):
    """grad_a O_k(s, a) of every critic, [K, B, A]."""

    def of_one_critic(member):
        member = jax.tree.map(lambda x: x[None], member)  # apply_critics takes an axis [K]
        return jax.grad(lambda a: apply_critics(member, observation, a).sum())(action)

    return jax.vmap(of_one_critic)(params)


def log_behaviour(behaviour, observation, action, cfg):
    """log mu(a|s) of the behaviour policy as it is, [B]."""
    logits, mean, log_std = behaviour.apply_fn(behaviour.params, observation)
    return mixture_log_prob(inside(action, cfg), logits, mean, log_std)


def mixture_log_prob(action, logits, mean, log_std):
    """log density of a mixture of tanh N(mean, std) for each dimension, summed over A: [B].

    Actions [B, A]; logits, mean and log std [B, A, C].
    """
    x = jnp.arctanh(action)
    error = (x[..., None] - mean) * jnp.exp(-log_std)
    component_log_prob = -0.5 * jnp.square(error) - log_std - 0.5 * jnp.log(2 * jnp.pi)
    log_weight = jax.nn.log_softmax(logits)
    log_prob = jax.nn.logsumexp(log_weight + component_log_prob, axis=-1)  # [B, A], before tanh
    log_slope = 2 * (jnp.log(2.0) - x - jax.nn.softplus(-2 * x))  # log(1 - tanh(x)^2)
    return (log_prob - log_slope).sum(axis=-1)


def sample_mixture(logits, mean, log_std, key):
    """One draw before tanh for each dimension, [B, A], of its own component."""
    key_component, key_noise = jax.random.split(key)
    position = jax.random.uniform(key_component, mean.shape[:-1])  # [B, A]
    upper_ends = jnp.cumsum(jax.nn.softmax(logits), axis=-1)[..., :-1]  # [B, A, C - 1]
    # The components share [0, 1] by their weights: choose the one whose part holds `position`.
    component = (position[..., None] > upper_ends).sum(axis=-1, keepdims=True)  # [B, A, 1]
    mean = jnp.take_along_axis(mean, component, axis=-1)[..., 0]  # [B, A]
    log_std = jnp.take_along_axis(log_std, component, axis=-1)[..., 0]  # [B, A]
    noise = jax.random.normal(key_noise, mean.shape)
    return mean + jnp.exp(log_std) * noise


def inside(action, cfg):
    """The action, clipped to where arctanh is finite and log mu is moderate."""
    limit = 1.0 - cfg.action_margin
    return action.clip(-limit, limit)


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
def clone_update(state, step, key, data, cfg):
    """A gradient step of the behaviour policy and of the temperature of its entropy. One seed.

    The first phase. Its key of a step is fold_in(key, step), as in `update`.
    """
    key_batch, key_clone = jax.random.split(jax.random.fold_in(key, step))
    batch = sample_batch(data, key_batch, cfg)
    grads, metrics = jax.grad(clone_loss, has_aux=True)(
        state.behaviour.params, state, batch, key_clone, cfg
    )
    temperature_grads = jax.grad(temperature_loss)(
        state.clone_temperature.params, metrics["clone_entropy"], batch.action.shape[-1]
    )
    state = state._replace(
        behaviour=state.behaviour.apply_gradients(grads=grads),
        clone_temperature=state.clone_temperature.apply_gradients(grads=temperature_grads),
    )
    return state, metrics


def update(state, step, key, data, cfg):
    """A gradient step of critics, target critics, actor and temperature in turn. One seed.

    The second phase: the behaviour policy stays as it is. Randomness is a function of (key, step)
    alone, so neither the length of a chunk nor a resumed run changes the result. The key of a step
    is fold_in(key, step).
    """
    key_batch, key_critic, key_actor = jax.random.split(jax.random.fold_in(key, step), 3)
    batch = sample_batch(data, key_batch, cfg)

    grads, critic_metrics = jax.grad(critic_loss, has_aux=True)(
        state.critic.params, state, batch, key_critic, cfg
    )
    state = state._replace(critic=state.critic.apply_gradients(grads=grads))
    state = state._replace(critic=update_target(state.critic, cfg))

    grads, actor_metrics = jax.grad(actor_loss, has_aux=True)(
        state.actor.params, state, batch, key_actor, cfg
    )
    state = state._replace(actor=state.actor.apply_gradients(grads=grads))

    action_dim = batch.action.shape[-1]
    grads = jax.grad(temperature_loss)(
        state.log_temperature.params, actor_metrics["entropy"], action_dim
    )
    state = state._replace(log_temperature=state.log_temperature.apply_gradients(grads=grads))
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

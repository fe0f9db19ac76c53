# SPDX-License-Identifier: Apache-2.0
"""ODICE (Mao et al., 2024): the dual of chi-square regularised RL, with an orthogonal gradient.

Paper       https://arxiv.org/abs/2402.00348
Reference   https://github.com/maoliyuan/ODICE-Pytorch
Run         python algorithms/odice.py --config configs/odice/mujoco.yaml
Parent      none
Results     docs/results.md
Deviations  Rows at a truncation are kept where their next observation is known, and count in
            return_scale. Its range is over episodes; the code's is over pieces of at most 1000 rows
            that join timed-out episodes, without the last piece (5 % less on
            hopper-medium-replay-v4, 0 to 2 % on three others). No reverse KL. The paper's lam and
            eta per data set are not in its code; the configs have the code's defaults. alpha is not
            the paper's: with lam=0.5 the objective is the practical Pearson dual, see dual_loss.

Shapes: S seeds, K value networks, B batch, E episodes, O observation, A action.
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

from common import datasets, evaluation, experiment


# --- Config -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    dataset: str = "local/pointmaze/umaze-v0"  # data set id or path, see docs/data.md
    seeds: tuple[int, ...] = (0,)  # trained in parallel
    num_updates: int = 1_000_000  # gradient steps of every network
    log_every: int = 1_000  # updates per compiled chunk, the unit of logging and saving
    eval_every: int = 20_000  # updates between evaluations
    eval_episodes: int = 10  # episodes per seed and evaluation
    batch_size: int = 256  # transitions per update
    actor_learning_rate: float = 2e-4  # Adam
    value_learning_rate: float = 2e-4  # Adam
    discount: float = 0.99  # gamma, per environment step
    target_rate: float = 0.005  # Polyak rate of the target value networks
    hidden: tuple[int, ...] = (1024, 1024)  # widths of the actor
    value_hidden: tuple[int, ...] = (256, 256)  # widths of the value networks
    num_values: int = 2  # K, targets are their minimum (some AntMaze: 1)
    layer_norm: bool = True  # LayerNorm before every activation of V (AntMaze: False)
    reward_scale: float = 1.0  # multiplies data set rewards (AntMaze: 3)
    reward_shift: float = 0.0  # added to the scaled rewards (AntMaze: -3)
    return_scale: float | None = None  # rescales rewards to this range of returns (MuJoCo: 1000)
    # ODICE
    gradient: Literal["orthogonal", "semi", "true"] = "orthogonal"  # gradient of f* through V(s')
    lam: float = 0.6  # lambda, weight of f*(e); V(s) has 1 - lambda
    eta: float = 1.0  # weight of the projected backward gradient (orthogonal)
    alpha: float = 1.0  # divides e and V(s); small: V is close to a maximum over the data
    weight_decay: float = 1e-4  # L2 regularisation of the actor, added to its gradient


# --- Networks -----------------------------------------------------------------------------------
def fan_in_uniform():
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # U(±1 / sqrt(fan in))


def uniform(bound):
    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def linear(fan_in, width):  # PyTorch's default initialisation
    return nn.Dense(width, kernel_init=fan_in_uniform(), bias_init=uniform(fan_in**-0.5))


class UnsquashedGaussianActor(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, observation):  # [..., O] -> mean and log std, [..., A] each
        x = observation
        for width in self.hidden:
            x = nn.relu(linear(x.shape[-1], width)(x))
        log_std = self.param("log_std", nn.initializers.zeros, (self.action_dim,))
        mean = linear(x.shape[-1], self.action_dim)(x)
        return mean, jnp.broadcast_to(log_std.clip(-5.0, 2.0), mean.shape)


class NormThenReluValue(nn.Module):
    hidden: tuple[int, ...]
    layer_norm: bool

    @nn.compact
    def __call__(self, observation):  # [..., O] -> [...]
        x = observation
        for width in self.hidden:
            x = linear(x.shape[-1], width)(x)
            if self.layer_norm:
                x = nn.LayerNorm(epsilon=1e-5)(x)  # PyTorch's epsilon
            x = nn.relu(x)
        return linear(x.shape[-1], 1)(x).squeeze(-1)


# --- State --------------------------------------------------------------------------------------
class TrainState(train_state.TrainState):
    target_params: Any  # slow copy of params

    @classmethod
    def create(cls, apply_fn, params, tx):
        # A copy: JAX reuses the memory of the old state, so params and targets must not share any.
        target = jax.tree.map(jnp.copy, params)
        return super().create(apply_fn=apply_fn, params=params, target_params=target, tx=tx)


class State(NamedTuple):
    actor: train_state.TrainState  # Flax's own class: no target_params
    value_net: TrainState  # every array has a leading [K] axis


def create_state(key, batch, cfg):
    """State of one seed before the first update. `batch` supplies shapes only."""
    key_actor, key_value = jax.random.split(key)
    actor = UnsquashedGaussianActor(cfg.hidden, action_dim=batch.action.shape[-1])
    value_net = NormThenReluValue(cfg.value_hidden, cfg.layer_norm)
    init_values = jax.vmap(value_net.init, (0, None))
    apply_values = jax.vmap(value_net.apply, (0, None))  # -> [K, B]

    actor_params = actor.init(key_actor, batch.observation)
    value_keys = jax.random.split(key_value, cfg.num_values)
    value_params = init_values(value_keys, batch.observation)
    actor_adam = optax.chain(
        optax.add_decayed_weights(cfg.weight_decay),  # before Adam: L2, not AdamW
        optax.adam(cfg.actor_learning_rate),
    )
    value_adam = optax.adam(cfg.value_learning_rate)
    return State(
        actor=train_state.TrainState.create(
            apply_fn=actor.apply, params=actor_params, tx=actor_adam
        ),
        value_net=TrainState.create(apply_values, value_params, value_adam),
    )


# --- Losses -------------------------------------------------------------------------------------
def value_loss(params, state, batch, cfg):
    """(1 - lambda) V(s) / alpha, mean over K and B: the linear term, which keeps V from growing."""
    value = state.value_net.apply_fn(params, batch.observation)  # [K, B]
    loss = (1.0 - cfg.lam) * value.mean() / cfg.alpha
    return loss, {"value": value.mean()}


def actor_loss(params, state, batch, cfg):
    """-w log pi(a|s), mean over K and B, with w = e between 0 and 100."""
    if cfg.gradient == "true":
        residual = full_residual(state.value_net.params, state, batch, cfg)  # [K, B]
    else:
        residual = forward_residual(state.value_net.params, state, batch, cfg)  # [K, B]
    weight = residual.clip(0.0, 100.0)

    mean, log_std = state.actor.apply_fn(params, batch.observation)
    log_prob = gaussian_log_prob(batch.action, mean, log_std)  # [B]
    chex.assert_equal_shape([*weight, log_prob])
    loss = -(weight * log_prob[None]).mean()
    return loss, {
        "actor_loss": loss,
        "log_prob": log_prob.mean(),
        "weight": weight.mean(),
        "residual": residual.mean(),
        "positive": (residual > 0).mean(),
    }


def dual_loss(params, state, batch, residual_fn, cfg):
    """lambda f*(e / alpha), mean over K and B, with f*(y) = max(0, 1 + y / 2)^2 - 1 (chi-square).

    `residual_fn` computes e: one of the three functions below. With lambda = 1/2, twice the sum of
    value_loss and dual_loss is E max(0, 1 + e / (2 alpha))^2 + E V / alpha, minus 1.
    """
    y = residual_fn(params, state, batch, cfg) / cfg.alpha  # [K, B]
    conjugate = jnp.square(jnp.maximum(1.0 + y / 2, 0.0)) - 1.0
    loss = cfg.lam * conjugate.mean()
    return loss, {"dual_loss": loss}


def forward_residual(params, state, batch, cfg):
    """e with V(s) from the networks of `params`, V(s') from the target networks, [K, B]."""
    value = state.value_net.apply_fn(params, batch.observation)
    next_value = target_value(state, batch.next_observation)
    return td_residual(value, next_value, batch, cfg)


def backward_residual(params, state, batch, cfg):
    """e with V(s) from the target networks, V(s') from the networks of `params`, [K, B]."""
    value = target_value(state, batch.observation)
    next_value = state.value_net.apply_fn(params, batch.next_observation)
    return td_residual(value, next_value, batch, cfg)


def full_residual(params, state, batch, cfg):
    """e with V(s) and V(s') from the networks of `params`, [K, B]."""
    value = state.value_net.apply_fn(params, batch.observation)
    next_value = state.value_net.apply_fn(params, batch.next_observation)
    return td_residual(value, next_value, batch, cfg)


def target_value(state, observation):
    """The minimum of the target networks, the same for every k, [K, B]."""
    value = state.value_net.apply_fn(state.value_net.target_params, observation)  # [K, B]
    return jnp.broadcast_to(value.min(axis=0), value.shape)


def td_residual(value, next_value, batch, cfg):
    """e = r + gamma V(s') - V(s), [K, B]."""
    # Bootstrap through truncations, never through terminations.
    discount = cfg.discount * (1.0 - batch.termination)  # [B]
    target = batch.reward[None] + discount[None] * next_value
    chex.assert_equal_shape([value, next_value, target])
    return target - value


def gaussian_log_prob(x, mean, log_std):
    """log N(x; mean, std), summed over the last axis."""
    error = (x - mean) * jnp.exp(-log_std)
    return -(0.5 * jnp.square(error) + log_std + 0.5 * jnp.log(2 * jnp.pi)).sum(axis=-1)


# --- Update -------------------------------------------------------------------------------------
def update(state, step, key, data, cfg):
    """One gradient step of V and the actor, then one step of the targets. One seed.

    Both gradients are of the state before the update. Randomness is a function of (key, step)
    alone, so neither the length of a chunk nor a resumed run changes the result. The key of a step
    is fold_in(key, step).
    """
    key_batch = jax.random.fold_in(key, step)
    batch = sample_batch(data, key_batch, cfg)

    value_grads, value_metrics = value_gradient(state, batch, cfg)
    actor_grads, actor_metrics = jax.grad(actor_loss, has_aux=True)(
        state.actor.params, state, batch, cfg
    )
    state = state._replace(value_net=state.value_net.apply_gradients(grads=value_grads))
    state = state._replace(actor=state.actor.apply_gradients(grads=actor_grads))
    state = state._replace(value_net=update_target(state.value_net, cfg))
    return state, value_metrics | actor_metrics


def value_gradient(state, batch, cfg):
    """Gradient of value_loss + dual_loss with regard to the value networks.

    "true" differentiates V(s) and V(s') in e, "semi" V(s) alone. "orthogonal" is "semi" plus eta
    times the backward gradient, the one through V(s'), projected orthogonally to the forward one.
    """
    params = state.value_net.params
    residual_fn = full_residual if cfg.gradient == "true" else forward_residual
    grads, value_metrics = jax.grad(value_loss, has_aux=True)(params, state, batch, cfg)
    dual_grads, dual_metrics = jax.grad(dual_loss, has_aux=True)(
        params, state, batch, residual_fn, cfg
    )
    if cfg.gradient == "orthogonal":
        backward_grads, _ = jax.grad(dual_loss, has_aux=True)(
            params, state, batch, backward_residual, cfg
        )
        projected = project_orthogonally(backward_grads, dual_grads)
        grads = jax.tree.map(lambda x, y: x + cfg.eta * y, grads, projected)
    grads = jax.tree.map(jnp.add, grads, dual_grads)
    return grads, value_metrics | dual_metrics


def project_orthogonally(tree, direction):
    """x - (x . d) / |d|^2 d, where x and d are all arrays of a tree as one vector each."""
    share = tree_dot(tree, direction) / jnp.maximum(tree_dot(direction, direction), 1e-10)
    return jax.tree.map(lambda x, d: x - share * d, tree, direction)


def tree_dot(tree, other):
    """Dot product of two trees of arrays, all arrays of each as one vector."""
    products = jax.tree.map(jnp.vdot, tree, other)
    return sum(jax.tree.leaves(products))


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
def policy(apply_fn, params, observation, key):
    """Mean action, clipped to [-1, 1], [..., O] -> [..., A]. `key` is not used."""
    mean, _ = apply_fn(params, observation)
    return mean.clip(-1.0, 1.0)


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
    reward = cfg.reward_scale * dataset.transitions.reward + cfg.reward_shift
    if cfg.return_scale is not None:
        reward = reward * (cfg.return_scale / datasets.return_span(dataset))
    data = experiment.place(dataset.transitions._replace(reward=reward), options)
    example = jax.tree.map(lambda x: x[:1], data)  # one row, for its shapes
    init_keys, train_keys, policy_keys = experiment.streams(cfg.seeds, 3)  # [S] keys each
    create = partial(create_state, batch=example, cfg=cfg)
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

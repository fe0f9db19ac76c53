# SPDX-License-Identifier: Apache-2.0
"""ODICE (Mao et al., 2024): the dual of chi-square regularised offline RL, gradients projected.

Paper       https://arxiv.org/abs/2402.00348
Reference   https://github.com/maoliyuan/ODICE-Pytorch
Run         python algorithms/odice.py --config configs/odice/mujoco.yaml
Parent      none
Results     benchmarks/results
Deviations  rows at a truncation are kept where their next observation is known, and count in
            return_scale, whose range is over episodes (there: over at most 1000 rows that glue
            episodes cut in time, without the last; 5 % less on hopper-medium-replay-v4, 0 to 2 %
            on three others). No reverse KL. The paper's lam and eta per data set are not in its
            code: the configs have the code's defaults. alpha is not the paper's: with lam=0.5 the
            objective is the practical Pearson dual E max(0, 1 + e / (2 alpha))^2 + E V / alpha.

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
    dataset: str = "local/pointmaze/umaze-v0"  # data set id or path, see common/datasets.py
    seeds: tuple[int, ...] = (0,)  # trained in parallel
    num_updates: int = 1_000_000  # gradient steps of every network
    log_every: int = 1_000  # updates per compiled chunk, the unit of logging and saving
    eval_every: int = 20_000  # updates between evaluations
    eval_episodes: int = 10  # episodes per seed and evaluation
    batch_size: int = 256  # transitions per update
    actor_learning_rate: float = 2e-4  # Adam
    value_learning_rate: float = 2e-4  # Adam
    discount: float = 0.99  # gamma, per environment step
    target_rate: float = 0.005  # tau, Polyak step of the target value networks
    hidden: tuple[int, ...] = (1024, 1024)  # widths of the actor
    value_hidden: tuple[int, ...] = (256, 256)  # widths of the value networks
    num_values: int = 2  # K, the minimum of their targets counts (some AntMaze: 1)
    layer_norm: bool = True  # before the activations of V (AntMaze: False)
    reward_scale: float = 1.0  # multiplies data set rewards (AntMaze: 3)
    reward_shift: float = 0.0  # added afterwards (AntMaze: -3)
    return_scale: float | None = None  # returns of the data span this much (MuJoCo: 1000)
    # ODICE
    gradient: Literal["orthogonal", "semi", "true"] = "orthogonal"  # of f*(e) through V(s')
    lam: float = 0.6  # lambda, weight of f*(e) beside 1 - lambda of V(s)
    eta: float = 1.0  # weight of the projected backward gradient
    alpha: float = 1.0  # divides e and V(s): the smaller, the nearer to a maximum over the data
    weight_decay: float = 1e-4  # L2 on the actor's parameters, in its gradient


# --- Networks -----------------------------------------------------------------------------------
def fan_in_uniform():
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # U(±1 / sqrt(fan in))


def uniform(bound):
    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def linear(fan_in, width):  # PyTorch's default
    return nn.Dense(width, kernel_init=fan_in_uniform(), bias_init=uniform(fan_in**-0.5))


class UnsquashedGaussianActor(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, observation):  # [..., O] -> [..., A] twice
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
            x = nn.relu(nn.LayerNorm(epsilon=1e-5)(x) if self.layer_norm else x)
        return linear(x.shape[-1], 1)(x).squeeze(-1)


# --- State --------------------------------------------------------------------------------------
class TrainState(train_state.TrainState):
    target_params: Any  # Polyak average of params

    @classmethod
    def create(cls, apply_fn, params, tx):
        # The targets are a copy: params and targets are donated, so they must not share buffers.
        target = jax.tree.map(jnp.copy, params)
        return super().create(apply_fn=apply_fn, params=params, target_params=target, tx=tx)


class State(NamedTuple):
    actor: train_state.TrainState
    value_net: TrainState  # every array has a leading [K] axis


def create_state(key, batch, cfg):
    """State of one seed before the first update. `batch` supplies shapes only."""
    key_actor, key_value = jax.random.split(key)
    actor = UnsquashedGaussianActor(cfg.hidden, batch.action.shape[-1])
    value_net = NormThenReluValue(cfg.value_hidden, cfg.layer_norm)
    actor_params = actor.init(key_actor, batch.observation)
    value_params = jax.vmap(value_net.init, (0, None))(
        jax.random.split(key_value, cfg.num_values), batch.observation
    )
    value_nets = jax.vmap(value_net.apply, (0, None))  # -> [K, B]
    adam = optax.adam(cfg.actor_learning_rate)
    adam = optax.chain(optax.add_decayed_weights(cfg.weight_decay), adam)  # L2, not AdamW
    create = train_state.TrainState.create
    return State(
        create(apply_fn=actor.apply, params=actor_params, tx=adam),
        TrainState.create(value_nets, value_params, optax.adam(cfg.value_learning_rate)),
    )


# --- Losses -------------------------------------------------------------------------------------
def value_loss(params, state, batch, cfg):
    """(1 - lambda) V(s) / alpha, mean over K and B: what keeps V from growing."""
    value = state.value_net.apply_fn(params, batch.observation)  # [K, B]
    loss = (1.0 - cfg.lam) * value.mean() / cfg.alpha
    return loss, {"value": value.mean()}


def actor_loss(params, state, batch, cfg):
    """-max(0, e) log pi(a|s), the weight capped at 100, mean over K and B."""
    side = "both" if cfg.gradient == "true" else "forward"
    error = residual(state.value_net.params, state, batch, side, cfg)  # [K, B]
    weight = error.clip(0.0, 100.0)
    log_prob = gaussian_log_prob(batch.action, *state.actor.apply_fn(params, batch.observation))
    chex.assert_equal_shape([*weight, log_prob])
    loss = -(weight * log_prob[None]).mean()
    positive = (error > 0).mean()
    metrics = {"actor_loss": loss, "log_prob": log_prob.mean(), "weight": weight.mean()}
    return loss, metrics | {"residual": error.mean(), "positive": positive}


def dual_loss(params, state, batch, side, cfg):
    """lambda f*(e / alpha), mean over K and B, f*(y) = max(0, 1 + y / 2)^2 - 1 for chi-square."""
    error = residual(params, state, batch, side, cfg) / cfg.alpha
    loss = cfg.lam * (jnp.square(jnp.maximum(1.0 + error / 2, 0.0)) - 1.0).mean()
    return loss, {"dual_loss": loss}


def residual(params, state, batch, side, cfg):
    """e = r + gamma V(s') - V(s), [K, B]. `side` is where the networks of `params` are.

    That is s ("forward"), s' ("backward") or "both"; elsewhere the minimum of the targets is.
    """

    def value(observation, learned):
        net = state.value_net
        found = net.apply_fn(params if learned else net.target_params, observation)  # [K, B]
        return found if learned else jnp.broadcast_to(found.min(axis=0), found.shape)

    here = value(batch.observation, side != "backward")
    there = value(batch.next_observation, side != "forward")
    # Bootstrap through truncations, never through terminations.
    target = batch.reward[None] + cfg.discount * (1.0 - batch.termination)[None] * there
    chex.assert_equal_shape([here, there, target])
    return target - here


def gaussian_log_prob(x, mean, log_std):
    """log N(x; mean, std), summed over the last axis."""
    error = (x - mean) * jnp.exp(-log_std)
    return -(0.5 * jnp.square(error) + log_std + 0.5 * jnp.log(2 * jnp.pi)).sum(axis=-1)


# --- Update -------------------------------------------------------------------------------------
def update(state, step, key, data, cfg):
    """One step of V and the actor, both from the state before, then of the targets. One seed.

    Randomness is a function of (key, step) alone, so neither the length of a chunk nor a resumed
    run changes the result. `key` is folded with the step, never split.
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
    """Gradient of value_loss + dual_loss: through both V ("true"), through V(s) alone ("semi"),
    or with the part through V(s') freed of what lies along the other one ("orthogonal")."""
    params = state.value_net.params
    grads, metrics = jax.grad(value_loss, has_aux=True)(params, state, batch, cfg)
    side = "both" if cfg.gradient == "true" else "forward"
    forward, dual_metrics = jax.grad(dual_loss, has_aux=True)(params, state, batch, side, cfg)
    if cfg.gradient == "orthogonal":
        backward, _ = jax.grad(dual_loss, has_aux=True)(params, state, batch, "backward", cfg)
        backward = without_component(backward, forward)
        grads = jax.tree.map(lambda x, y: x + cfg.eta * y, grads, backward)
    return jax.tree.map(jnp.add, grads, forward), metrics | dual_metrics


def without_component(x, along):
    """x - (x . along) / |along|^2 along, over all arrays of the trees as one vector."""
    dot, square = (sum(jax.tree.leaves(jax.tree.map(jnp.vdot, y, along))) for y in (x, along))
    share = dot / jnp.maximum(square, 1e-10)
    return jax.tree.map(lambda x, y: x - share * y, x, along)


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
    return apply_fn(params, observation)[0].clip(-1.0, 1.0)


def policy_params(state):
    return state.actor.params


# --- Training -----------------------------------------------------------------------------------
def train(cfg, options):
    """Train every seed of `cfg` and return its final normalised scores, [S]."""
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps)
    reward = cfg.reward_scale * dataset.transitions.reward + cfg.reward_shift
    if cfg.return_scale is not None:
        reward = reward * (cfg.return_scale / datasets.return_span(dataset))
    data = experiment.place(dataset.transitions._replace(reward=reward), options)
    example = jax.tree.map(lambda x: x[:1], data)
    init_keys, train_keys, policy_keys = experiment.streams(cfg.seeds, 3)  # [S] each
    create = partial(create_state, batch=example, cfg=cfg)
    # Not jitted: XLA can hang on the QR decompositions of two orthogonal initialisers.
    state = jax.vmap(create)(init_keys)
    # Compiled once for all seeds. `update` shows which rows a step reads, for --data host.
    train_seeds = experiment.over_seeds(partial(train_chunk, cfg=cfg), update=update)
    act = partial(policy, state.actor.apply_fn)

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

# SPDX-License-Identifier: Apache-2.0
"""QC and QC-FQL (Li et al., 2025): Q-learning over chunks of h actions that a flow model clones.

Paper       https://arxiv.org/abs/2507.07969
Reference   https://github.com/ColinQiyangLi/qc
Run         python algorithms/qc.py --config configs/qc/ogbench.yaml
Parent      fql.py (245 lines)
Results     docs/results.md
Deviations  Those of fql.py. Rewards after a termination inside a chunk do not count (in the
            reference they do, and only the bootstrap stops). The critics also learn from chunks in
            which a termination ends the episode (the reference drops them; OGBench has few); their
            remaining actions are those of the rows that follow in the data. A chunk may start in
            the data's last h - 1 rows (there: none does). normalize_q is an addition: the reference
            has the setting, but does not read it.

Shapes: S seeds, K critics, N samples, h steps of a chunk, B batch or rows, E episodes,
        O observation, A action. Arrays are float32. A chunk of actions is one vector, [h A].
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state

from common import datasets, evaluation, experiment, interaction


# --- Config -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    dataset: str = "local/pointmaze/umaze-v0"  # data set id or path, see docs/data.md
    seeds: tuple[int, ...] = (0,)  # trained in parallel
    num_updates: int = 1_000_000  # gradient steps of every network
    log_every: int = 1_000  # updates per compiled chunk, the unit of logging and saving
    eval_every: int = 100_000  # updates between evaluations
    eval_episodes: int = 50  # episodes per seed and evaluation
    batch_size: int = 256  # transitions per update
    actor_learning_rate: float = 3e-4  # Adam, for the policy and the flow
    critic_learning_rate: float = 3e-4  # Adam
    discount: float = 0.99  # gamma, per environment step
    target_rate: float = 0.005  # tau, Polyak step of the target critics
    hidden: tuple[int, ...] = (512, 512, 512, 512)  # widths of all networks
    num_critics: int = 2  # K
    reward_shift: float = 0.0  # added to all rewards (AntMaze: -1)
    # FQL
    alpha: float = 100.0  # with distill: weight of (mu(s, z) - F(s, z))^2 beside -Q
    q_agg: Literal["mean", "min"] = "mean"  # of the K critics, in the TD target and the choice
    normalize_q: bool = False  # with distill: divide Q by its mean absolute value in the actor loss
    flow_steps: int = 10  # Euler steps of the flow F from noise z to action
    # QC
    actor: Literal["best_of_n", "distill"] = "best_of_n"  # QC, or QC-FQL with FQL's one-step policy
    horizon: int = 5  # h, actions per chunk
    num_samples: int = 32  # N, with best_of_n: chunks of the flow from which Q chooses
    sparse_reward: bool = False  # rewards other than 0 become -1 (scene, puzzle-3x3)
    # Online phase
    online_updates: int = 0  # gradient steps of online training, after the offline ones
    updates_per_step: int = 1  # updates per env step
    steps_per_refresh: int = 1  # env steps between updates of the acting policy


# --- Networks -----------------------------------------------------------------------------------
def glorot_dense(width):
    return nn.Dense(width, kernel_init=nn.initializers.xavier_uniform())


class GeluNet(nn.Module):
    hidden: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, *inputs):  # [..., O], [..., A] and, for the flow, time [..., 1] -> [..., A]
        x = jnp.concatenate(inputs, axis=-1)
        for width in self.hidden:
            x = nn.gelu(glorot_dense(width)(x))
        head = nn.Dense(self.action_dim, kernel_init=nn.initializers.xavier_uniform(), name="head")
        return head(x)


class GeluCritic(nn.Module):
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, observation, action):  # [..., O], [..., A] -> [...]
        x = jnp.concatenate([observation, action], axis=-1)
        for width in self.hidden:
            x = nn.gelu(glorot_dense(width)(x))
            x = nn.LayerNorm()(x)
        return glorot_dense(1)(x).squeeze(-1)


# --- State --------------------------------------------------------------------------------------
class Chunks(NamedTuple):
    """Chunks of the data, one from each row on: the row and the h - 1 after it."""

    observation: Any  # [B, O], before the first action
    action: Any  # [B, h A]
    reward: Any  # [B], the sum of gamma^k r_k up to a termination
    next_observation: Any  # [B, O], after the last action
    termination: Any  # [B], 1 where the chunk contains a termination
    valid: Any  # [B, h], 1 where a row belongs to the episode of the first one


class TrainState(train_state.TrainState):
    target_params: Any  # slow copy of params

    @classmethod
    def create(cls, apply_fn, params, tx):
        # A copy: JAX reuses the memory of the old state, so params and targets must not share any.
        target = jax.tree.map(jnp.copy, params)
        return super().create(apply_fn=apply_fn, params=params, target_params=target, tx=tx)


class State(NamedTuple):
    actor: train_state.TrainState | None  # mu(s, z), the one-step policy; None with best_of_n
    critic: TrainState  # every array has a leading [K] axis
    flow: train_state.TrainState  # v(s, x, t), the velocity from noise to the data's actions


class PolicyParams(NamedTuple):
    """Parameters of the networks that choose a chunk; the others are None."""

    actor: Any  # with distill
    critic: Any  # with best_of_n
    flow: Any  # with best_of_n


def create_state(key, batch, cfg):
    """State of one seed before the first update. `batch` supplies shapes only."""
    key_actor, key_critic, key_flow = jax.random.split(key, 3)
    chunk = jnp.tile(batch.action, cfg.horizon)  # [B, A] -> [B, h A]
    chunk_dim = chunk.shape[-1]
    actor = GeluNet(cfg.hidden, chunk_dim)
    critic = GeluCritic(cfg.hidden)
    flow = GeluNet(cfg.hidden, chunk_dim)
    init_critics = jax.vmap(critic.init, (0, None, None))
    apply_critics = jax.vmap(critic.apply, (0, None, None))  # -> [K, B]

    noise = chunk  # [B, h A], z
    time = chunk[..., :1]  # [B, 1], t
    critic_keys = jax.random.split(key_critic, cfg.num_critics)
    critic_params = init_critics(critic_keys, batch.observation, chunk)
    flow_params = flow.init(key_flow, batch.observation, noise, time)
    critic_adam = optax.adam(cfg.critic_learning_rate)
    flow_adam = optax.adam(cfg.actor_learning_rate)
    actor_state = None
    if cfg.actor == "distill":
        actor_params = actor.init(key_actor, batch.observation, noise)
        actor_adam = optax.adam(cfg.actor_learning_rate)
        actor_state = train_state.TrainState.create(
            apply_fn=actor.apply, params=actor_params, tx=actor_adam
        )
    return State(
        actor=actor_state,
        critic=TrainState.create(apply_critics, critic_params, critic_adam),
        flow=train_state.TrainState.create(apply_fn=flow.apply, params=flow_params, tx=flow_adam),
    )


# --- Losses -------------------------------------------------------------------------------------
def critic_loss(params, state, batch, key, cfg):
    """Squared TD error of a chunk to its rewards + gamma^h Q(s', the policy's chunk at s').

    Mean over K and B. The policy chooses its chunk by the critics, the target critics value it.
    """
    next_action = sample_chunk(
        state.flow.apply_fn,
        state.critic.apply_fn,
        policy_params(state),
        batch.next_observation,
        key,
        cfg,
    )  # [B, h A]

    next_q = state.critic.apply_fn(state.critic.target_params, batch.next_observation, next_action)
    next_q = aggregate(next_q, cfg)  # [K, B] -> [B]
    # Bootstrap through truncations, never through terminations.
    discount = cfg.discount**cfg.horizon
    target = batch.reward + discount * (1.0 - batch.termination) * next_q  # [B]

    q = state.critic.apply_fn(params, batch.observation, batch.action)  # [K, B]
    # What follows the chunk is unknown where the episode ends inside it without a termination.
    known = jnp.maximum(batch.valid[:, -1], batch.termination)  # [B]
    chex.assert_equal_shape([*q, target, known])
    loss = (known[None] * jnp.square(q - target[None])).mean()
    return loss, {"critic_loss": loss, "q": q.mean()}


def actor_loss(params, state, batch, key, cfg):
    """alpha (mu(s, z) - F(s, z))^2 - mean_k Q_k(s, mu(s, z)), F without gradient. QC-FQL."""
    noise = jax.random.normal(key, batch.action.shape)  # z, the same for mu and F
    flow_action = integrate(state.flow.apply_fn, state.flow.params, batch.observation, noise, cfg)
    action = state.actor.apply_fn(params, batch.observation, noise)
    chex.assert_equal_shape([action, flow_action, batch.action])
    distill_error = jnp.square(action - flow_action).mean(axis=-1)  # [B]

    action = action.clip(-1.0, 1.0)
    q = state.critic.apply_fn(state.critic.params, batch.observation, action)
    q = q.mean(axis=0)  # [K, B] -> [B]
    q_scale = 1.0
    if cfg.normalize_q:
        q_scale = jax.lax.stop_gradient(jnp.abs(q).mean())
    q_loss = -q / q_scale

    chex.assert_equal_shape([distill_error, q_loss, batch.reward])
    loss = (cfg.alpha * distill_error + q_loss).mean()
    return loss, {"actor_loss": loss, "distill_loss": distill_error.mean()}


def flow_loss(params, state, batch, key, cfg):
    """(v(s, x_t, t) - (a - z))^2 at x_t = (1 - t) z + t a, t uniform in [0, 1], for a chunk a.

    The error of actions past the end of the episode counts as 0.
    """
    key_noise, key_time = jax.random.split(key)
    noise = jax.random.normal(key_noise, batch.action.shape)  # z, [B, h A]
    time = jax.random.uniform(key_time, (len(noise), 1))  # t, [B, 1]
    x = (1.0 - time) * noise + time * batch.action  # x_t, [B, h A]
    velocity = state.flow.apply_fn(params, batch.observation, x, time)
    target_velocity = batch.action - noise
    chex.assert_equal_shape([velocity, target_velocity])
    error = jnp.square(velocity - target_velocity)
    error = error.reshape(len(error), cfg.horizon, -1)  # [B, h A] -> [B, h, A]
    loss = (error * batch.valid[..., None]).mean()
    return loss, {"flow_loss": loss}


def aggregate(q, cfg):
    """Mean or minimum over the critics, [K, ...] -> [...]."""
    if cfg.q_agg == "min":
        return q.min(axis=0)
    return q.mean(axis=0)


def integrate(apply_fn, params, observation, noise, cfg):
    """F(s, z): the action that the flow makes of noise in `flow_steps` Euler steps, [..., A]."""
    x = noise
    for i in range(cfg.flow_steps):  # a Python loop: a handful of matrix products per step
        time = jnp.full((*x.shape[:-1], 1), i / cfg.flow_steps)
        velocity = apply_fn(params, observation, x, time)
        x = x + velocity / cfg.flow_steps
    return x.clip(-1.0, 1.0)


def sample_chunk(apply_fn, apply_critics, params, observation, key, cfg):
    """QC-FQL: a chunk of mu. QC: the chunk of highest Q among N of the flow. [..., O] -> [..., h A]

    `apply_fn` is that of mu and of the flow, which have the same architecture.
    """
    if cfg.actor == "distill":
        chunk_dim = params.actor["params"]["head"]["bias"].shape[-1]
        noise = jax.random.normal(key, (*observation.shape[:-1], chunk_dim))
        return apply_fn(params.actor, observation, noise).clip(-1.0, 1.0)

    chunk_dim = params.flow["params"]["head"]["bias"].shape[-1]
    observation = jnp.broadcast_to(observation, (cfg.num_samples, *observation.shape))
    noise = jax.random.normal(key, (*observation.shape[:-1], chunk_dim))  # [N, ..., h A]
    action = integrate(apply_fn, params.flow, observation, noise, cfg)  # [N, ..., h A]
    q = apply_critics(params.critic, observation, action)
    q = aggregate(q, cfg)  # [K, N, ...] -> [N, ...]
    best = q.argmax(axis=0)  # [...]
    return jnp.take_along_axis(action, best[None, ..., None], axis=0)[0]


# --- Update -------------------------------------------------------------------------------------
def update(state, step, key, data, cfg):
    """One gradient step of every network at once, on one batch. One seed.

    Randomness is a function of (key, step) alone, so neither the length of a chunk nor a resumed
    run changes the result. The key of a step is fold_in(key, step).
    """
    keys = jax.random.split(jax.random.fold_in(key, step), 4)
    key_batch, key_critic, key_actor, key_flow = keys
    batch = sample_batch(data, key_batch, cfg)
    # All gradients are taken at the state before the update.
    critic_grads, critic_metrics = jax.grad(critic_loss, has_aux=True)(
        state.critic.params, state, batch, key_critic, cfg
    )
    actor = state.actor
    actor_metrics = {}
    if cfg.actor == "distill":
        actor_grads, actor_metrics = jax.grad(actor_loss, has_aux=True)(
            state.actor.params, state, batch, key_actor, cfg
        )
        actor = actor.apply_gradients(grads=actor_grads)
    flow_grads, flow_metrics = jax.grad(flow_loss, has_aux=True)(
        state.flow.params, state, batch, key_flow, cfg
    )
    # Targets first: they follow the critics before their gradient step.
    critic = update_target(state.critic, cfg)
    state = State(
        actor=actor,
        critic=critic.apply_gradients(grads=critic_grads),
        flow=state.flow.apply_gradients(grads=flow_grads),
    )
    return state, critic_metrics | actor_metrics | flow_metrics


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
def policy(apply_fn, params, observation, key, memory, reward, apply_critics, cfg):
    """Next action of the chunk in memory, [..., O] -> [..., A]; every h steps a new chunk by `key`.

    `memory`: the chunk, [..., h, A], and the number of steps made, the same in all environments.
    `reward` is not used.
    """
    chunk, step = memory

    def new_chunk():
        action = sample_chunk(apply_fn, apply_critics, params, observation, key, cfg)
        return action.reshape(chunk.shape)  # [..., h A] -> [..., h, A]

    def same_chunk():
        return chunk

    position = step % cfg.horizon
    chunk = jax.lax.cond(position == 0, new_chunk, same_chunk)
    return chunk[..., position, :], (chunk, step + 1)


def explore(apply_fn, params, observation, key, memory, reward, apply_critics, cfg):
    """`policy`, by which the online phase acts: it plays its chunks to their end."""
    return policy(apply_fn, params, observation, key, memory, reward, apply_critics, cfg)


def policy_params(state):
    if state.actor is None:
        return PolicyParams(actor=None, critic=state.critic.params, flow=state.flow.params)
    return PolicyParams(actor=state.actor.params, critic=None, flow=None)


def policy_fn(state, cfg):
    """`policy` with the networks filled in.

    (params, observation, key, memory, reward) -> (action, memory)
    """
    return partial(policy, state.flow.apply_fn, apply_critics=state.critic.apply_fn, cfg=cfg)


def initial_memory(count, batch, cfg):
    """The memory with which `count` episodes begin. `batch` supplies shapes only."""
    no_chunk = jnp.zeros((count, cfg.horizon, batch.action.shape[-1]))
    return no_chunk, jnp.int32(0)


# --- Training -----------------------------------------------------------------------------------
def chunked(dataset, cfg):
    """`Chunks` of a data set, one from each of its N rows on."""
    rows = dataset.transitions
    # A chunk runs on past a termination inside its episode, as OGBench's episodes do after a
    # success. The view would stop there, so it is shown no terminations.
    no_terminations = rows._replace(termination=jnp.zeros_like(rows.termination))
    index, valid = datasets.chunks(replace(dataset, transitions=no_terminations), cfg.horizon)
    first = index[:, 0]  # [N], and `valid` is [N, h]

    actions = []
    reward = 0.0
    alive = 1.0  # [N], 0 after a termination
    for k in range(cfg.horizon):
        row = (first + k).clip(max=len(first) - 1)  # [N]
        counted = alive * valid[:, k]
        reward = reward + cfg.discount**k * counted * rows.reward[row]
        alive = alive * (1.0 - valid[:, k] * rows.termination[row])
        actions.append(rows.action[row])
    last = (first + cfg.horizon - 1).clip(max=len(first) - 1)  # [N]

    return Chunks(
        observation=rows.observation,
        action=jnp.concatenate(actions, axis=-1),
        reward=reward,
        next_observation=rows.next_observation[last],
        termination=1.0 - alive,
        valid=valid,
    )


def prepared(rows, cfg):
    """Rows with actions just inside of [-1, 1] and the rewards that are learnt from."""
    reward = rows.reward + cfg.reward_shift
    if cfg.sparse_reward:
        reward = -(reward != 0).astype("float32")
    return rows._replace(action=rows.action.clip(-1 + 1e-5, 1 - 1e-5), reward=reward)


def online_rows(rows, dataset, cfg):
    """`Chunks` of the env's rows, [T, S, ...]. Those that the last row cuts are not drawn yet."""
    return datasets.by_seed(partial(chunked, cfg=cfg), prepared(rows, cfg), dataset)


def train(cfg, options):
    """Train every seed of `cfg` and return its final normalised scores, [S]."""
    experiment.check(cfg, options)
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps)
    rows = prepared(dataset.transitions, cfg)
    data = chunked(replace(dataset, transitions=rows), cfg)
    data = experiment.place(data, options)
    example = jax.tree.map(lambda x: x[:1], rows)  # one row, for its shapes
    init_keys, train_keys, policy_keys, explore_keys = experiment.streams(cfg.seeds, 4)  # [S] each
    create = partial(create_state, batch=example, cfg=cfg)
    state = jax.vmap(create)(init_keys)
    # Compiled once for all seeds. `update` shows which rows a step reads, for --data host.
    train_seeds = experiment.over_seeds(partial(train_chunk, cfg=cfg), update=update)
    act = policy_fn(state, cfg)
    explore_by = partial(explore, state.flow.apply_fn, apply_critics=state.critic.apply_fn, cfg=cfg)
    rows_as_data = partial(online_rows, dataset=dataset, cfg=cfg)
    memory = initial_memory(cfg.eval_episodes, example, cfg)

    with (
        experiment.Run(cfg, options, dataset) as run,
        evaluation.Rollouts(dataset, act, policy_keys, cfg, memory) as rollouts,
        interaction.Interaction(
            run,
            data,
            explore_by,
            explore_keys,
            policy_params,
            train_chunk,
            rows_as_data,
            window=cfg.horizon,
            memory=initial_memory(1, example, cfg),
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

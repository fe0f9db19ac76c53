# SPDX-License-Identifier: Apache-2.0
"""Tiny data sets with known answers, and how to train an algorithm file on one.

Every data set is a `Transitions` of float32 arrays, drawn from a fixed NumPy seed.
"""

import dataclasses
import functools
import inspect
import itertools

import compiler_flags
import jax
import jax.numpy as jnp
import numpy as np

from common.datasets import Dataset, Transitions

DISCRETE = ("cql_discrete",)  # files that take integer actions only
NUMBER = 3  # of integer actions
ACTIONS = ("action", "next_action")


def random_transitions(count=32, observation_dim=3, action_dim=2, seed=0, **columns):
    """Random rows of every column; `columns` replace some of them (numbers fill a column)."""
    rng = np.random.default_rng(seed)
    observation = (count, observation_dim)
    rows = {
        "observation": rng.standard_normal(observation),
        "action": rng.uniform(-1, 1, (count, action_dim)),
        "reward": rng.standard_normal(count),
        "next_observation": rng.standard_normal(observation),
        "next_action": rng.uniform(-1, 1, (count, action_dim)),
        "termination": rng.random(count) < 0.3,
        "truncation": rng.random(count) < 0.2,
    }
    rows["truncation"] &= ~rows["termination"]
    for name, value in columns.items():
        shape = np.shape(value) or rows[name].shape
        rows[name] = np.broadcast_to(np.asarray(value), shape)
    return Transitions(**{name: np.array(rows[name], np.float32) for name in Transitions._fields})


def integer_actions(data):
    """The same rows with an integer in place of each action."""
    number = {name: np.int32(NUMBER * (getattr(data, name)[:, 0] + 1) / 2) for name in ACTIONS}
    return data._replace(**{name: x.clip(0, NUMBER - 1) for name, x in number.items()})


def rows_for(name, *args, **kwargs):
    """Random rows whose actions are what algorithms/<name>.py takes."""
    data = random_transitions(*args, **kwargs)
    return integer_actions(data) if name in DISCRETE else data


# --- Data sets ----------------------------------------------------------------------------------
# One state, or two, at +1 and -1; one action dimension; actions uniform in [-1, 1] unless said.
COUNT = 2000


def one_state(**columns):
    last = np.arange(COUNT) == COUNT - 1  # a recording breaks off
    rows = {"observation": 1.0, "next_observation": 1.0, "termination": 0, "truncation": last}
    return random_transitions(COUNT, 1, 1, **(rows | columns))


def terminal_reward():
    """Reward 1 and the end: Q = 1."""
    return one_state(reward=1.0, termination=1)


def endless_reward():
    """Reward 1 for ever: Q = 1 / (1 - discount)."""
    return one_state(reward=1.0)


def cut_reward():
    """The same, every row the last one of an episode cut by time: Q = 1 / (1 - discount)."""
    return one_state(reward=1.0, truncation=1)


def two_steps():
    """From +1 without reward to -1, there reward 1 and the end: Q = (discount, 1)."""
    second = np.arange(COUNT) % 2
    state = (1.0 - 2.0 * second)[:, None]
    return one_state(
        observation=state, next_observation=-np.ones_like(state), reward=second, termination=second
    )


def best_action():
    """The end after any action a, with reward 1 - (a - 0.5)^2: pi = 0.5, Q = 1 there."""
    action = np.random.default_rng(1).uniform(-1, 1, (COUNT, 1))
    return one_state(action=action, reward=1 - (action[:, 0] - 0.5) ** 2, termination=1)


def best_action_by_state():
    """Reward 1 - (a - 0.5 s)^2 in s = ±1, then the end: pi = 0.5 s."""
    rng = np.random.default_rng(2)
    state, action = rng.choice([-1.0, 1.0], (COUNT, 1)), rng.uniform(-1, 1, (COUNT, 1))
    reward = 1 - (action - 0.5 * state)[:, 0] ** 2
    return one_state(observation=state, action=action, reward=reward, termination=1)


def support():
    """Actions in [-1, 0] only, reward -(a - 0.5)^2, the end: unconstrained pi is 0 or more."""
    action = np.random.default_rng(3).uniform(-1, 0, (COUNT, 1))
    return one_state(action=action, reward=-((action[:, 0] - 0.5) ** 2), termination=1)


def rewarding_left():
    """Actions in [-1, 0], reward a, no end: V = 0. No row shows that actions > 0 cost -1."""
    rng = np.random.default_rng(4)
    action, next_action = rng.uniform(-1, 0, (2, COUNT, 1))
    return one_state(action=action, reward=action[:, 0], next_action=next_action)


SPEED = 0.2  # longest step in the plane


def move(position, action):
    """A point in the plane moves by its action, SPEED at most."""
    length = np.linalg.norm(action, axis=-1, keepdims=True)
    return position + SPEED * action / np.maximum(1, length)


def crossing(copies=50):
    """Noisy walks from (-1, -1) over (0, 0) to (1, -1), reward 0, cut there by time; then others
    from (-1, 1) over (0, 0) to (1, 1), reward 1 and the end. None goes from (-1, -1) to (1, 1)."""
    rng, rows = np.random.default_rng(5), []
    for side in np.repeat([-1.0, 1.0], copies):
        position, way = starts(rng, 1, side)[0], [np.zeros(2), np.array([1.0, side])]
        while way:
            wanted = (way[0] - position) / SPEED
            wanted /= max(1, np.linalg.norm(wanted))
            action = np.clip(wanted + 0.2 * rng.standard_normal(2), -1, 1)
            after = move(position, action)
            if np.linalg.norm(after - way[0]) < 0.15:
                way.pop(0)
            good, bad = not way and side == 1, not way and side == -1
            rows.append([position, action, good, after, action, good, bad])
            if len(rows) > 1 and rows[-2][3] is position:  # the same walk
                rows[-2][4] = action
            position = after
    return Transitions(*(np.array(column, np.float32) for column in zip(*rows, strict=True)))


def starts(rng, count, side=-1.0):
    return np.array([-1.0, side]) + 0.1 * rng.standard_normal((count, 2))


# --- Training -----------------------------------------------------------------------------------
CHUNK = 1000  # updates per compiled program

FAST = {"actor_learning_rate": 1e-3, "critic_learning_rate": 1e-3}
NET = {"hidden": (64, 64), "batch_size": 64}
SEQUENCE = {"embedding": 16, "num_layers": 1, "batch_size": 64}
MODEL = {  # of files that fit dynamics
    "temperature_learning_rate": 1e-3,
    "model_updates": 1000,
    "model_hidden": (32, 32),
    "model_decays": (2.5e-5, 5e-5, 1e-4),
    "num_models": 3,
    "num_elites": 2,
    "holdout_every": 100,
    "rollout_every": 50,
    "rollout_batch": 64,
    "rollout_length": 2,
}
SMALL = {  # what makes an algorithm file small and fast; data sets and claims set the rest
    "algaedice": NET | FAST,
    "atac": NET | FAST | {"warm_start": 20},
    "awac": NET | FAST,
    "awr": NET | FAST | {"optimiser": "adam", "actor_updates": 5, "critic_updates": 2},
    "bc": NET | FAST,
    "bcq": NET
    | FAST
    | {"vae_learning_rate": 1e-3, "vae_hidden": (64, 64), "num_samples": 4, "num_eval_samples": 50},
    "brac": NET
    | FAST
    | {"critic_hidden": (64, 64), "clone_updates": 1000, "clone_learning_rate": 1e-3}
    | {"warm_start": 20, "alpha_training": "linear", "divergence": "mmd", "kernel_width": 2.0},
    "combo": NET | FAST | MODEL | {"num_samples": 4},
    "cal_ql": NET
    | FAST
    | {"critic_hidden": (64, 64), "num_samples": 4, "max_target_backup": False, "warm_up_steps": 4}
    | {"last_reward_goes_on": True},
    "cql": NET | FAST | {"critic_hidden": (64, 64), "num_samples": 4},
    "cql_discrete": NET | FAST,
    "dt": SEQUENCE | FAST | {"context": 3, "warm_up": 10, "episode_length": 20},
    "online_dt": SEQUENCE
    | FAST
    | {"context": 3, "eval_context": 3, "warm_up": 10, "episode_length": 20, "num_heads": 1}
    | {"temperature_learning_rate": 1e-3, "steps_per_refresh": 2, "updates_per_refresh": 2},
    "qdt": SEQUENCE
    | FAST
    | {"context": 3, "warm_up": 10, "episode_length": 20, "hidden": (64, 64)}
    | {"q_updates": 1000, "value_batch_size": 64, "num_samples": 4, "value_samples": 4}
    | {"pi_learning_rate": 1e-3},
    "edac": NET | FAST | {"temperature_learning_rate": 1e-3, "num_critics": 3},
    "fisher_brc": NET
    | FAST
    | {"temperature_learning_rate": 1e-3, "behaviour_hidden": (64, 64), "clone_updates": 1000},
    "diffusion_dice": NET
    | FAST
    | {"clone_updates": 1000, "clone_batch_size": 64, "clone_learning_rate": 1e-3}
    | {"actor_hidden": (32, 32), "guidance_learning_rate": 1e-3, "guidance_hidden": (32, 32)}
    | {"noisy_copies": 4, "num_choosers": 2},
    "diffusion_ql": NET
    | FAST
    | {"generator_steps": 3, "max_gradient_norm": 10.0}
    | {"actor_target_start": 1, "actor_target_rate": 0.05},
    "fql": NET | FAST | {"flow_steps": 5},
    "gfp": NET | FAST | {"flow_steps": 5},
    "idql": NET
    | FAST
    | {"cosine": False, "actor_hidden": (32,), "dropout": None, "actor_target_rate": 0.01}
    | {"layer_norm": "none"},  # of one number it leaves none
    "iql": NET | FAST | {"cosine": False},
    "ivr": NET | FAST | {"cosine": False},
    "lb_sac": NET | FAST | {"temperature_learning_rate": 1e-3, "num_critics": 3},
    "mobile": NET | FAST | MODEL | {"num_samples": 4, "least_target": -10.0},
    "mopo": NET | FAST | MODEL,
    "morel": NET | FAST | MODEL | {"num_critics": 2, "halt_penalty": 1.0},
    "odice": NET | FAST | {"value_hidden": (64, 64), "value_learning_rate": 1e-3},
    "optidice": NET | {"learning_rate": 1e-3, "warm_start": 20},
    "qc": NET | FAST | {"flow_steps": 5, "num_samples": 4, "horizon": 3},
    "rebrac": NET | FAST,
    "rlpd": NET
    | FAST
    | {"temperature_learning_rate": 1e-3, "num_critics": 3, "updates_per_step": 2},
    "sac": NET | FAST | {"temperature_learning_rate": 1e-3},
    "sac_n": NET | FAST | {"temperature_learning_rate": 1e-3, "num_critics": 3},
    "spot": NET
    | FAST
    | {
        "vae_hidden": (64, 64),
        "clone_updates": 1000,
        "density_weight": 0.07,
        "steps_per_refresh": 2,
    },
    "td3_bc": NET | FAST,
    "trajectory_transformer": SEQUENCE
    | FAST
    | {"context": 3, "num_heads": 2, "warm_up": 10, "num_bins": 10, "dropout": None}
    | {"plan_context": 2, "plan_horizon": 1, "beam_width": 8},
    "wsrl": NET
    | FAST
    | {"critic_hidden": (64, 64), "num_critics": 3, "num_samples": 4, "max_target_backup": False}
    | {"updates_per_step": 2, "warm_up_steps": 4, "last_reward_goes_on": True},
    "xql": NET | FAST | {"cosine": False},
}


def config(module, **overrides):
    """Config of an algorithm file, small unless overridden; fields it lacks are left out."""
    known = {field.name for field in dataclasses.fields(module.Config)}
    values = SMALL[module.__name__.split(".")[-1]] | overrides
    return module.Config(**{name: value for name, value in values.items() if name in known})


def prepared(module, data, cfg):
    """Rows as the chunks of updates take them: some files make more of a data set than rows."""
    ends = np.flatnonzero(data.termination + data.truncation) + 1
    ends = np.union1d(ends, len(data.reward))
    dataset = Dataset("rows", data, ends, np.zeros(len(ends)))
    if hasattr(module, "episode_steps"):
        return module.episode_steps(dataset, data)
    if hasattr(module, "tokenised"):
        return module.tokenised(dataset, cfg)[0]
    if hasattr(module, "with_absorbing_state"):
        data = module.with_absorbing_state(data, cfg)
    if hasattr(module, "with_returns"):
        return module.with_returns(dataset, cfg)
    if hasattr(module, "with_starts"):
        return module.with_starts(dataset, data)
    return module.chunked(dataset, cfg) if hasattr(module, "chunked") else data


def start(module, data, cfg, seed=0):
    """State, train key and data on the device, for one seed."""
    key_init, key_train = jax.random.split(jax.random.key(seed))
    number = NUMBER if data.action.ndim == 1 else None
    create = compiled_create(module.create_state, dataclasses.replace(cfg, log_every=1), number)
    state = create(key_init, jax.tree.map(lambda x: x[:1], data))
    return state, key_train, jax.device_put(prepared(module, data, cfg))


@functools.cache
def compiled_create(create_state, cfg, num_actions):
    """One program per Config, and one set of optimisers: states of two calls fit the same chunk.

    How many updates a chunk has does not matter to `create_state`.
    """
    facts = {} if num_actions is None else {"num_actions": num_actions}
    return jax.jit(functools.partial(create_state, cfg=cfg, **facts))


@functools.cache
def compiled_chunk(module_chunk):
    def chunk(state, key, start, data, numbers, cfg):
        return module_chunk(state, key, start, data, dataclasses.replace(cfg, **numbers))

    # Thousands of updates pay for it.
    fast = {"xla_backend_optimization_level": 3, **compiler_flags.AS_USERS}
    return jax.jit(chunk, static_argnums=5, donate_argnums=0, compiler_options=fast)


def train(module, data, updates, seed=0, **overrides):
    """State of one seed after `updates` updates, and before them those of a first phase.

    Floats of the Config enter the compiled program as arguments: one program serves them all.
    """
    cfg = config(module, **overrides, log_every=CHUNK)
    state, key, data = start(module, data, cfg, seed)
    numbers = {name: value for name, value in vars(cfg).items() if isinstance(value, float)}
    cfg = dataclasses.replace(cfg, **dict.fromkeys(numbers))
    cloning = cfg.clone_updates if hasattr(module, "clone_chunk") else 0
    for step in range(0, cloning, CHUNK):
        state, _ = compiled_chunk(module.clone_chunk)(state, key, step, data, numbers, cfg)
    modelling = cfg.model_updates if hasattr(module, "model_chunk") else 0
    for step in range(0, modelling, CHUNK):
        state, _ = compiled_chunk(module.model_chunk)(state, key, step, data, numbers, cfg)
    first = cloning + modelling
    for step in range(first, first + updates, CHUNK):
        state, _ = compiled_chunk(module.train_chunk)(state, key, step, data, numbers, cfg)
    return state


def policy(module, state, **overrides):
    """The compiled policy with its parameters: observations [..., O] -> actions [..., A].

    Every call has its own key. `overrides` are those of the training, for a policy that reads the
    Config. One of chunks begins a new one at every call.
    """
    params, keys = module.policy_params(state), map(jax.random.key, itertools.count())
    cfg = config(module, **overrides)
    play = module.policy_fn(state, cfg)

    @jax.jit
    def act(params, observation, key):
        if "memory" not in inspect.signature(module.policy).parameters:
            return play(params, observation, key)
        size = state.flow.params["params"]["head"]["bias"].size // cfg.horizon
        memory = np.zeros((*observation.shape[:-1], cfg.horizon, size), np.float32), 0
        return play(params, observation, key, memory, None)[0]

    return lambda observation: act(params, observation, next(keys))


def act(module, state, observation, **overrides):
    """Action [A] in one observation."""
    return np.asarray(policy(module, state, **overrides)(np.atleast_1d(np.float32(observation))))


def q(state, observation, action):
    """min over K of Q(observation, action), for one pair."""
    pair = [np.atleast_2d(np.float32(x)) for x in (observation, action)]
    if "log_multiplier" in state._fields:  # critics of many actions per row
        pair[1] = pair[1][:, None]
    return float(state.critic.apply_fn(state.critic.params, *pair).min())


def value(state, observation):
    """min over K of V(observation), for one; AWR's gives (1 - discount) V, the probes' is 0.9."""
    scaled = "critic" in state._fields or hasattr(state.value_net, "target_params")
    observation = np.atleast_2d(np.float32(observation))
    found = state.value_net.apply_fn(state.value_net.params, observation).min()
    return float(found) * (1.0 if scaled else 1 / (1 - 0.9))


def stacked(trees):
    """One tree of their arrays, with a leading axis; functions in it are those of the first."""
    arrays = zip(*map(jax.tree.leaves, trees), strict=True)
    return jax.tree.unflatten(jax.tree.structure(trees[0]), [jnp.stack(x) for x in arrays])


def leaves(tree):
    """NumPy copies of all arrays of a tree, keys left out."""
    return [np.array(x) for x in jax.tree.leaves(tree)]

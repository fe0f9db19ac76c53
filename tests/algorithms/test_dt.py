# SPDX-License-Identifier: Apache-2.0
"""Decision Transformer's network, loss, windows, update and memory against NumPy in float64."""

import functools

import flax.linen as nn
import gymnasium
import jax
import numpy as np
import numpy_nets as nets
import probes
import pytest
from numpy_nets import dense, directions, dot, double, slope

from algorithms import dt
from common import evaluation
from common.datasets import Dataset

TINY = {"context": 4, "embedding": 8, "num_layers": 2, "num_heads": 2, "batch_size": 6}
TINY |= {"episode_length": 12, "reward_scale": 0.5, "dropout": None}
ENDS = np.array([3, 4, 15, 31, 40])  # the episodes of `toy`, one longer than episode_length
HURRIED = {"actor_learning_rate": 0.05, "weight_decay": 0.5, "max_gradient_norm": 0.05}
HURRIED |= {"warm_up": 3, "log_every": 2, "dropout": 0.25, "num_layers": 1}
actor_loss = nets.compiled(dt.actor_loss)
windows = jax.jit(dt.windows, static_argnums=2)


def toy():
    termination = np.isin(np.arange(40), ENDS[::2] - 1)
    truncation = np.isin(np.arange(40), ENDS[1::2] - 1)
    rows = probes.random_transitions(40, termination=termination, truncation=truncation)
    returns = np.add.reduceat(rows.reward, np.append(0, ENDS[:-1]))
    return Dataset("toy", rows, ENDS, returns)


@functools.cache
def steps():
    return dt.episode_steps(toy(), jax.device_put(toy().transitions))


@functools.cache
def shapes(cfg):
    create = functools.partial(dt.create_state, cfg=cfg)
    return jax.eval_shape(create, jax.random.key(0), toy().transitions)


def setup(**overrides):
    """cfg, a state of random numbers, a train key, and windows of which many are padded."""
    cfg = dt.Config(**(TINY | overrides))
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes(cfg))
    state = nets.shaken(state, seed=8)
    params = jax.tree.map(lambda x: 2 * np.asarray(x), state.actor.params)  # so that inputs matter
    state = state._replace(actor=state.actor.replace(params=jax.device_put(params)))
    index = np.array([0, 1, 3, 13, 25, 38])
    return cfg, state, jax.random.key(1), windows(steps(), index, cfg)


@functools.cache
def program(apply_fn):
    return jax.jit(apply_fn)


def forward(state, batch):
    return np.asarray(program(state.actor.apply_fn)(state.actor.params, batch))


# --- The method in NumPy ------------------------------------------------------------------------
def norm(layer, x):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * layer["scale"] + layer["bias"]


def numpy_block(layers, x, num_heads):
    """Every head of every token in a loop; a token looks at itself and those before it."""
    size = x.shape[1] // num_heads
    y, seen = norm(layers["LayerNorm_0"], x), np.zeros_like(x)
    parts = *np.split(dense(layers["Dense_0"], y), 2, axis=1), y @ layers["Dense_1"]["kernel"]
    for head in range(num_heads):
        query, value, key = (part[:, head * size :][:, :size] for part in parts)
        for t in range(len(x)):
            weight = np.exp(key[: t + 1] @ query[t] / np.sqrt(size))
            seen[t, head * size :][:size] = weight @ value[: t + 1] / weight.sum()
    x = x + dense(layers["Dense_2"], seen)
    inner = np.maximum(dense(layers["Dense_3"], norm(layers["LayerNorm_1"], x)), 0)
    return x + dense(layers["Dense_4"], inner)


def numpy_forward(params, batch, cfg):
    """[B, K, A]; padding is left out of the sequence altogether, and 0 in the result."""
    layers, out = params["params"], np.zeros(batch.action.shape)
    for b, timesteps in enumerate(batch.timestep):
        tokens, valid = [], np.flatnonzero(timesteps >= 0)
        for k in valid:
            time = layers["Embed_0"]["embedding"][min(timesteps[k], cfg.episode_length - 1)]
            asked = np.array([cfg.reward_scale * batch.returns_to_go[b, k]])
            inputs = (asked, batch.observation[b, k], batch.action[b, k])
            tokens += [dense(layers[f"Dense_{i}"], x) + time for i, x in enumerate(inputs)]
        x = norm(layers["LayerNorm_0"], np.array(tokens))
        for i in range(cfg.num_layers):
            x = numpy_block(layers[f"Block_{i}"], x, cfg.num_heads)
        x = norm(layers["LayerNorm_1"], x[1::3])
        out[b, valid] = np.tanh(dense(layers["Dense_3"], x))
    return out


def numpy_loss(params, batch, cfg):
    error, predicted = [], numpy_forward(params, batch, cfg)
    for b, k in np.argwhere(batch.timestep >= 0):
        error.append(np.mean((predicted[b, k] - batch.action[b, k]) ** 2))
    return np.mean(error)


def wide(batch):
    return dt.Steps(*(np.asarray(x, np.float64) for x in batch[:3]), np.asarray(batch.timestep))


# --- Network ------------------------------------------------------------------------------------
@pytest.mark.parametrize("overrides", [{}, {"num_heads": 1, "num_layers": 1}], ids=str)
def test_forward_pass_equals_numpy(overrides):
    cfg, state, _, batch = setup(**overrides)
    valid = np.asarray(batch.timestep) >= 0
    assert valid.any(axis=1).all() and 10 < valid.sum() < valid.size
    assert np.asarray(batch.timestep).max() >= cfg.episode_length
    expected = numpy_forward(double(state.actor.params), wide(batch), cfg)
    np.testing.assert_allclose(forward(state, batch)[valid], expected[valid], rtol=1e-4, atol=1e-5)
    assert np.abs(expected).max() < 1 and np.ptp(expected[valid]) > 0.5


def test_late_timesteps_share_an_embedding():
    _, state, _, batch = setup()
    batch = jax.tree.map(np.asarray, batch)
    at = {t: forward(state, batch._replace(timestep=np.full((6, 4), t))) for t in (10, 11, 12, 500)}
    assert np.array_equal(at[11], at[12]) and np.array_equal(at[11], at[500])
    assert not np.isclose(at[10], at[11]).all()


def test_causality():
    """What a step's action is predicted from: returns-to-go, observations up to its own, actions
    before it. Nothing else."""
    _, state, _, batch = setup()
    batch = jax.tree.map(np.array, batch)._replace(timestep=np.arange(24).reshape(6, 4) % 11)
    here = forward(state, batch)
    for name in ("observation", "action", "returns_to_go"):
        for k in range(4):
            column = getattr(batch, name).copy()
            column[:, k] += 1
            there = forward(state, batch._replace(**{name: column}))
            first = k + (name == "action")
            assert np.array_equal(here[:, :first], there[:, :first])
            changed = (here != there).any(axis=-1)[:, first:]
            assert changed.all(), (name, k)


def test_padding_is_invisible_wherever_it_is():
    """Two steps have the same actions at the start, at the end and amid any padding."""
    _, state, _, batch = setup()
    batch, rng = jax.tree.map(np.array, batch), np.random.default_rng(7)
    found = []
    for places in ([0, 1], [2, 3], [0, 3], [1, 2]):
        for _ in range(2):
            padding = dt.Steps(
                *(100 * rng.standard_normal(x.shape, np.float32) for x in batch[:3]),
                np.full((6, 4), -1, np.int32),
            )
            for x, y in zip(padding, batch, strict=True):
                x[:, places] = y[:, :2]
            padding.timestep[:, places] = [4, 5]
            found.append(forward(state, padding)[:, places])
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-5, atol=1e-6)


def test_initial_parameters():
    """GPT-2's in the blocks, PyTorch's in the layers around them."""
    cfg = dt.Config(embedding=64, num_layers=2, episode_length=100)
    statistics = np.arange(16.0), np.arange(1.0, 17.0)
    create = functools.partial(dt.create_state, cfg=cfg, statistics=statistics)
    rows = probes.random_transitions(1, 16)
    state = jax.jit(create)(jax.random.key(0), rows)
    layers = jax.tree.map(np.asarray, state.actor.params["params"])
    around = {name: layers[name] for name in layers if name.startswith("Dense")}
    for i, (fan_in, width) in enumerate([(1, 64), (16, 64), (2, 64), (64, 2)]):
        one = {"Dense_0": around.pop(f"Dense_{i}")}
        nets.check_uniform_init({"params": one}, (fan_in, width))
    assert not around
    np.testing.assert_allclose(layers["Embed_0"]["embedding"].std(), 1, rtol=0.03)
    assert layers["Embed_0"]["embedding"].shape == (100, 64)
    sizes = [(64, 128), (64, 64), (64, 64), (64, 256), (256, 64)]
    for i in range(2):
        block = layers[f"Block_{i}"]
        for j, size in enumerate(sizes):
            layer = block.pop(f"Dense_{j}")
            assert layer["kernel"].shape == size and not layer.get("bias", np.zeros(1)).any()
            assert ("bias" in layer) == (j != 1)
            np.testing.assert_allclose(layer["kernel"].std(), 0.02, rtol=0.05)
        assert sorted(block) == ["LayerNorm_0", "LayerNorm_1"]
    nets.check_close(state.statistics, statistics, 0, 0)


def test_dropout_on_tokens_attention_and_what_blocks_add():
    _, state, key, batch = setup(dropout=0.25)
    found = []

    def record(call, arguments, options, context):
        out = call(*arguments, **options)
        if isinstance(context.module, nn.Dropout):
            found.append((arguments[0], out))
        return out

    def pairs(params, key):
        with nn.intercept_methods(record):
            state.actor.apply_fn(params, batch, train=True, rngs={"dropout": key})
        return tuple(found)

    calls = jax.jit(pairs)(state.actor.params, key)
    tokens, weights = (6 * 12, 8), (6, 2, 12, 12)
    assert [x.shape for x, _ in calls] == [tokens, *[weights, tokens, tokens] * 2]
    kept = []
    for x, out in calls:
        x, out = np.asarray(x), np.asarray(out)
        kept.append(out != 0)
        np.testing.assert_allclose(out[kept[-1]], x[kept[-1]] / 0.75, rtol=1e-5)
        np.testing.assert_allclose(kept[-1][x != 0].mean(), 0.75, atol=0.08)
    assert not any(np.array_equal(kept[i], kept[j]) for i, j in ((0, 2), (2, 3), (1, 4), (2, 5)))
    found.clear()
    plain = setup()[1]
    np.testing.assert_array_equal(forward(state, batch), forward(plain, batch))  # none when acting


# --- Loss ---------------------------------------------------------------------------------------
def test_loss_and_gradient_equal_numpy():
    cfg, state, key, batch = setup()
    params, data = double(state.actor.params), wide(batch)
    loss, metrics, grads = actor_loss(state.actor.params, state, batch, key, cfg)
    np.testing.assert_allclose(
        [loss, metrics["actor_loss"]], numpy_loss(params, data, cfg), rtol=2e-5
    )
    for direction in directions(params):
        expected = slope(lambda p: numpy_loss(p, data, cfg), params, direction)
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=1e-3)


def test_the_key_of_the_loss_is_that_of_dropout():
    cfg, state, key, batch = setup(**HURRIED)
    other = jax.random.key(9)
    losses = [actor_loss(state.actor.params, state, batch, k, cfg)[0] for k in (key, key, other)]
    assert losses[0] == losses[1] != losses[2]
    cfg, state, key, batch = setup()
    losses = [actor_loss(state.actor.params, state, batch, k, cfg)[0] for k in (key, other)]
    assert losses[0] == losses[1]


# --- Data ---------------------------------------------------------------------------------------
def test_steps_of_episodes():
    found, rows, start = steps(), toy().transitions, 0
    for end in ENDS:
        np.testing.assert_array_equal(found.timestep[start:end], np.arange(end - start))
        expected = [rows.reward[i:end].sum() for i in range(start, end)]  # discount 1
        np.testing.assert_allclose(found.returns_to_go[start:end], expected, rtol=1e-5, atol=1e-6)
        start = end
    assert found.timestep.dtype == np.int32 and len(found.timestep) == 40
    for name in ("observation", "action"):
        np.testing.assert_array_equal(getattr(found, name), getattr(rows, name))


def test_a_window_begins_at_its_row_and_ends_with_the_episode():
    data = jax.tree.map(np.asarray, steps())
    batch = jax.tree.map(np.asarray, windows(steps(), np.arange(40), dt.Config(**TINY)))
    for row in range(40):
        end = min(end for end in ENDS if end > row)
        count = min(4, end - row)
        expected = [*range(int(data.timestep[row]), int(data.timestep[row]) + count)]
        assert batch.timestep[row].tolist() == expected + [-1] * (4 - count)
        for x, column in zip(batch, data, strict=True):
            np.testing.assert_array_equal(x[row, :count], column[row : row + count])


# --- Update -------------------------------------------------------------------------------------
def numpy_update(adam, params, grads, cfg):
    """Gradient of at most this norm; AdamW with a learning rate that rises linearly."""
    grads = double(grads)
    norm = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(grads)))
    assert norm > cfg.max_gradient_norm  # so that the clip matters
    grads = jax.tree.map(lambda x: x * cfg.max_gradient_norm / norm, grads)
    decay = adam.rate(adam.steps) * cfg.weight_decay
    return jax.tree.map(
        lambda new, old: np.float32(new - decay * old), adam.step(params, grads), params
    )


@jax.jit
def keys_of(key, step):
    key_batch, key_dropout = jax.random.split(jax.random.fold_in(key, step))
    return jax.random.randint(key_batch, (6,), 0, 40), key_dropout


def test_updates():
    """Two of them, before the learning rate is the full one: clip, decay, warm-up, order, keys."""
    cfg, state, key, _ = setup(**HURRIED)
    here, losses = state, []
    adam = nets.Adam(lambda count: 0.05 * min((count + 1) / 3, 1))
    for step in (6, 7):
        index, key_dropout = keys_of(jax.random.clone(key), step)
        batch = windows(steps(), np.asarray(index), cfg)
        loss, _, grads = actor_loss(here.actor.params, here, batch, key_dropout, cfg)
        params = numpy_update(adam, here.actor.params, grads, cfg)
        here = here._replace(actor=here.actor.replace(params=params))
        losses.append(loss)
    after, metrics = nets.train_chunk(dt, state, key, 6, steps(), cfg)
    nets.check_close(after.actor.params, here.actor.params, 1e-3, 1e-4)
    nets.check_close(after.statistics, state.statistics, 0, 0)
    np.testing.assert_allclose(metrics.pop("actor_loss"), np.mean(losses), rtol=1e-4)
    assert not metrics


def test_the_learning_rate_warms_up():
    state = shapes(dt.Config(**TINY, warm_up=4, actor_learning_rate=0.1, weight_decay=1e-9))
    state = state._replace(actor=state.actor.replace(params=None))
    nets.check_rate(state.actor, lambda step: 0.1 * min((step + 1) / 4, 1), steps=6)


# --- Policy -------------------------------------------------------------------------------------
def roll(state, cfg, observations, rewards, target_return):
    """Actions [t, E, A] of the policy and its memories, step by step, rewards one step later."""
    rows, count = toy().transitions, len(observations[0])
    memory = dt.blank_steps(count, rows, target_return, cfg)
    act = jax.jit(functools.partial(dt.policy, state.actor.apply_fn))
    actions, memories = [], []
    for observation, reward in zip(observations, [0 * rewards[0], *rewards], strict=False):
        params = dt.policy_params(state)
        action, memory = act(params, observation, jax.random.key(0), memory, reward)
        actions.append(np.asarray(action))
        memories.append(jax.tree.map(np.asarray, memory))
    assert act._cache_size() == 1  # one program from the first step on
    return np.array(actions), memories


def test_rolling_memory_equals_windows_of_the_whole_episode():
    """The action at t is that of the network on the window of the recorded episode ending at t."""
    cfg, state, _, _ = setup()
    rng, length = np.random.default_rng(0), 9
    observations = rng.standard_normal((length, 2, 3), np.float32)
    rewards = rng.standard_normal((length, 2), np.float32)
    actions, memories = roll(state, cfg, observations, rewards, 5.0)
    mean, std = (np.asarray(x) for x in state.statistics)
    asked = 5.0 - np.cumsum([0 * rewards[0], *rewards[:-1]], axis=0)  # [t, E]
    for e in range(2):
        whole = dt.Steps((observations - mean) / std, actions, asked, None)
        whole = dt.Steps(*(x[:, e] for x in whole[:3]), np.arange(length))
        for t in range(length):
            first = max(0, t + 1 - cfg.context)
            window = dt.Steps(*(x[None, first : t + 1] for x in whole))
            expected = numpy_forward(double(state.actor.params), wide(window), cfg)[0, -1]
            np.testing.assert_allclose(actions[t, e], expected, rtol=1e-3, atol=1e-4)
            kept = dt.Steps(*(x[e, -(t + 1 - first) :] for x in memories[t]))
            for x, y in zip(kept, window, strict=True):
                np.testing.assert_allclose(x, y[0], rtol=1e-4, atol=1e-5)
            assert (memories[t].timestep[e, : -(t + 1 - first)] == -1).all()
    assert np.ptp(actions, axis=0).mean() > 0.1


def test_policy_params_are_what_acting_needs():
    _, state, _, _ = setup()
    params = dt.policy_params(state)
    assert params[0] is state.actor.params and params[1] is state.statistics


class Count(gymnasium.Env):
    """12 steps; each pays 1. Keeps the actions."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.actions = []
        self.start = self.np_random.standard_normal(3).astype(np.float32)
        return self.start.copy(), {}

    def step(self, action):
        self.actions.append(np.array(action))
        return self.start * len(self.actions), 1.0, False, len(self.actions) == 12, {}


def test_evaluation_conditions_on_what_is_left_and_compiles_once():
    cfg, state, _, _ = setup(eval_episodes=2)
    memory = dt.blank_steps(2, toy().transitions, 7.0, cfg)
    act = functools.partial(dt.policy, state.actor.apply_fn)
    both = jax.tree.map(lambda x, y: np.stack([x, y]), *map(dt.policy_params, (state, setup()[1])))
    dataset = Dataset("toy", toy().transitions, ENDS, ENDS, Count, 12)
    keys = jax.vmap(jax.random.key)(np.arange(2, dtype=np.uint32))
    compiled = []
    with evaluation.Rollouts(dataset, act, keys, cfg, memory) as rollouts:
        rollouts.start(both, 0).result()
        events = lambda name, *_, **__: compiled.append(name)  # noqa: E731
        jax.monitoring.register_event_duration_secs_listener(events)
        result = rollouts.start(both, 10).result()
    assert not [name for name in compiled if "compile" in name]
    assert result["return"].tolist() == [12.0, 12.0]
    start = np.array([env.start for env in rollouts.envs[:2]])
    observations = [start, *(start * (t + 1) for t in range(11))]
    expected, _ = roll(state, cfg, observations, [np.ones(2, np.float32)] * 12, 7.0)
    for i, env in enumerate(rollouts.envs):
        np.testing.assert_allclose(env.actions, expected[:, i % 2], rtol=1e-3, atol=1e-4)


# --- Training -----------------------------------------------------------------------------------
@pytest.mark.parametrize("target", [None, 3.5])
def test_what_reaches_training_and_evaluation(monkeypatch, tmp_path, target):
    raw, memories = toy().transitions, []
    raw = raw._replace(observation=5 + 3 * raw.observation)
    original = evaluation.Rollouts.__init__

    def init(rollouts, dataset, act, keys, cfg, memory=None):
        memories.append(memory)
        original(rollouts, dataset, act, keys, cfg, memory)

    monkeypatch.setattr(evaluation.Rollouts, "__init__", init)
    overrides = {"seeds": (0, 1), "target_return": target, "eval_episodes": 3, **TINY}
    returns = (1.0, 9.0, -4.0, 2.0, 0.0)
    state, data = nets.handed_over(dt, monkeypatch, tmp_path, raw, returns, ENDS, **overrides)
    rows, statistics = dt.normalise(raw)
    nets.check_close(data[:3], (rows.observation, raw.action, steps().returns_to_go), atol=1e-5)
    assert np.array_equal(data.timestep, steps().timestep)
    for found, statistic in zip(state.statistics, statistics, strict=True):
        nets.check_close(found, np.stack([statistic] * 2), atol=1e-6)
    (memory,) = memories
    best = max(steps().returns_to_go[start] for start in (0, *ENDS[:-1]))
    assert (np.asarray(memory.timestep) == -1).all() and memory.timestep.shape == (3, 4)
    assert memory.observation.shape == (3, 4, 3) and memory.action.shape == (3, 4, 2)
    assert (np.asarray(memory.returns_to_go) == (best if target is None else target)).all()


def test_normalise():
    nets.check_normalise(dt)


def test_it_gets_the_return_that_it_is_asked_for():
    """Episodes of three steps, each with one action a in [-1, 1] throughout that pays a a step:
    asked for 3 a, the policy takes a."""
    rng, number = np.random.default_rng(0), 200
    action = np.repeat(rng.uniform(-1, 1, (number, 1)), 3, axis=0)
    rows = probes.random_transitions(3 * number, 1, 1, action=action, reward=action[:, 0])
    last = np.float32(np.arange(3 * number) % 3 == 2)
    rows = rows._replace(termination=0 * last, truncation=last)
    cfg = probes.config(dt, context=2, reward_scale=1.0, dropout=None, log_every=400)
    state, key, data = probes.start(dt, rows, cfg)
    chunk = jax.jit(dt.train_chunk, static_argnums=4, donate_argnums=0)
    state, _ = chunk(state, key, 0, data, cfg)
    act = jax.jit(functools.partial(dt.policy, state.actor.apply_fn))
    for target in (-1.8, 0.0, 1.8):
        observations = [np.zeros((1, 1), np.float32)] * 3
        memory = dt.blank_steps(1, rows, target, cfg)
        reward = np.zeros(1, np.float32)
        for observation in observations:
            found, memory = act(dt.policy_params(state), observation, key, memory, reward)
            np.testing.assert_allclose(found, target / 3, atol=0.1)
            reward = np.asarray(found)[:, 0]

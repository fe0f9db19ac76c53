# SPDX-License-Identifier: Apache-2.0
"""Trajectory Transformer: bins, network, loss, windows and beam search against NumPy in float64."""

import functools
import math

import helpers_runs as runs
import jax
import jax.numpy as jnp
import numpy as np
import numpy_nets as nets
import probes
import pytest
from numpy_nets import dense, directions, dot, double, slope

from algorithms import trajectory_transformer
from common.datasets import Dataset

TINY = {"context": 3, "embedding": 8, "num_layers": 2, "num_heads": 2, "batch_size": 6}
TINY |= {"dropout": None, "num_bins": 5, "discount": 0.9, "termination_reward": -7.0}
TINY |= {"plan_horizon": 3, "plan_context": 3, "beam_width": 2, "action_cdf": 0.5}
TINY |= {"reward_weight": 2.0, "value_weight": 0.5, "max_gradient_norm": 0.05, "warm_up": 3}
ENDS = np.array([3, 4, 15, 31, 40])  # the episodes of `toy`
O, A, M = 3, 2, 7  # noqa: E741
CFG = trajectory_transformer.Config(**TINY)
actor_loss = nets.compiled(trajectory_transformer.actor_loss)
windows = jax.jit(trajectory_transformer.token_windows, static_argnums=2)


def toy():
    """Terminations at the first and third end, and one within the last episode."""
    termination = np.isin(np.arange(40), [2, 14, 34])
    truncation = np.isin(np.arange(40), [3, 30, 39])
    rows = probes.random_transitions(40, termination=termination, truncation=truncation)
    return Dataset("toy", rows, ENDS, np.zeros(len(ENDS)))


@functools.cache
def tokens():
    return trajectory_transformer.tokenised(toy(), CFG)


@functools.cache
def setup():
    """A state of random numbers, and windows of which many go over an end."""
    create = functools.partial(trajectory_transformer.create_state, cfg=CFG)
    state = jax.eval_shape(create, jax.random.key(0), toy().transitions)
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
    rng = np.random.default_rng(8)
    draw = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), state.actor.params)
    state = state._replace(actor=state.actor.replace(params=jax.device_put(draw)), bins=tokens()[1])
    index = np.array([0, 1, 3, 13, 33, 38])
    return state, *windows(tokens()[0], index, CFG)


# --- The method in NumPy ------------------------------------------------------------------------
def norm(layer, x):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * layer["scale"] + layer["bias"]


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / 2**0.5)) / 2


def numpy_logits(params, sequence):
    """Logits after each token of one sequence that begins with a transition, [T, V + 1]."""
    layers, dimension = params["params"], np.arange(len(sequence)) % M
    index = np.where(sequence == 5, 5 * M, sequence + 5 * dimension)
    x = layers["Embed_0"]["embedding"][index] + layers["position"][: len(sequence)]
    for i in range(2):
        block = layers[f"CachedBlock_{i}"]
        y, seen = norm(block["LayerNorm_0"], x), np.zeros_like(x)
        query, value = np.split(dense(block["Dense_0"], y), 2, axis=1)
        key = y @ block["Dense_1"]["kernel"]
        for head in (slice(0, 4), slice(4, 8)):
            for t in range(len(x)):
                # Never a value token, not even its own.
                keys = [k for k in range(t + 1) if k % M != M - 1]
                weight = np.exp(key[keys, head] @ query[t, head] / 2)
                seen[t, head] = weight @ value[keys, head] / weight.sum()
        x = x + dense(block["Dense_2"], seen)
        x = x + dense(
            block["Dense_4"], gelu(dense(block["Dense_3"], norm(block["LayerNorm_1"], x)))
        )
    x = norm(layers["LayerNorm_0"], x)
    return np.array([y @ layers["head"][d] for y, d in zip(x, dimension, strict=True)])


def softmax(x):
    x = np.exp(x - x.max())
    return x / x.sum()


def sequences(batch):
    parts = batch.observation, batch.action, batch.reward[..., None], batch.value[..., None]
    return np.concatenate([np.asarray(x) for x in parts], axis=-1).reshape(len(batch.reward), -1)


def numpy_loss(params, batch, valid):
    kinds = np.array([1.0] * O + [5.0] * A + [2.0, 0.5])
    total = 0
    for sequence, counts in zip(sequences(batch), np.asarray(valid), strict=True):
        logits = numpy_logits(params, sequence[:-1])
        for t, row in enumerate(logits):
            weight = kinds[(t + 1) % M] * counts[(t + 1) // M]
            total -= weight * np.log(softmax(row)[sequence[t + 1]])
    return total / (len(valid) * (3 * M - 1))


# --- Data ---------------------------------------------------------------------------------------
def test_bins_have_equally_many_rows_and_are_all_used():
    rng = np.random.default_rng(0)
    numbers = np.float32(rng.standard_normal((47, 2)))  # no multiple of 5
    bins = np.asarray(trajectory_transformer.quantile_bins(jnp.asarray(numbers), 5))
    assert bins.shape == (6, 2) and (np.diff(bins, axis=0) > 0).all()
    np.testing.assert_array_equal(bins[[0, -1]], [numbers.min(axis=0), numbers.max(axis=0)])
    found = np.asarray(trajectory_transformer.discretise(jnp.asarray(numbers), jnp.asarray(bins)))
    for column, borders, numbers_of in zip(numbers.T, bins.T, found.T, strict=True):
        counts = np.bincount(numbers_of, minlength=5)
        assert counts.min() >= 9 and counts.max() <= 10
        expected = [max(i for i in range(5) if x >= borders[i]) for x in column]
        np.testing.assert_array_equal(numbers_of, expected)
    far = np.array([[-1e6, 1e6]], np.float32)  # beyond the data: the outermost bins
    np.testing.assert_array_equal(
        trajectory_transformer.discretise(jnp.asarray(far), jnp.asarray(bins)), [[0, 4]]
    )


def test_of_equal_borders_the_last_counts():
    bins = jnp.array([[0.0], [0.0], [0.0], [1.0]])
    numbers = jnp.array([[0.0], [0.5], [-1.0], [1.0], [2.0]])
    np.testing.assert_array_equal(
        trajectory_transformer.discretise(numbers, bins)[:, 0], [2, 2, 0, 2, 2]
    )


def test_rewards_and_values_know_of_the_end():
    """A termination replaces the reward, and the values before it count that; a value is what comes
    after its step; a termination within an episode ends it."""
    rows, (data, bins) = toy().transitions, tokens()
    reward = np.where(rows.termination > 0, -7.0, rows.reward.astype(np.float64))
    value, timestep = np.zeros(40), np.zeros(40, int)
    ends = sorted({*ENDS, 35})
    for start, end in zip([0, *ends], ends, strict=False):
        for t in range(start, end):
            value[t] = sum(0.9 ** (k - t - 1) * reward[k] for k in range(t + 1, end))
            timestep[t] = t - start
    np.testing.assert_array_equal(data.timestep, timestep)
    expected = trajectory_transformer.discretise(
        jnp.asarray(np.float32(value[:, None])), bins[:, -1:]
    )[:, 0]
    assert (np.abs(np.asarray(data.value) - expected) <= 1).all()  # rounding at a border
    assert (np.asarray(data.value) != expected).mean() <= 0.2
    np.testing.assert_allclose(np.sort(value)[::8], bins[:-1, -1], rtol=1e-4, atol=1e-5)
    expected = trajectory_transformer.discretise(
        jnp.asarray(np.float32(reward[:, None])), bins[:, -2:-1]
    )[:, 0]
    np.testing.assert_array_equal(data.reward, expected)
    assert data.observation.shape == (40, O) and data.action.shape == (40, A)
    np.testing.assert_array_equal(data.termination, rows.termination)


def test_windows_end_with_their_episode():
    """V follows an end; it counts after a termination, and not after a truncation."""
    data = jax.tree.map(np.asarray, tokens()[0])
    batch, valid = jax.tree.map(np.asarray, windows(tokens()[0], np.arange(40), CFG))
    ends = sorted({*ENDS, 35})
    for row in range(40):
        end = min(end for end in ends if end > row)
        count = min(3, end - row)
        for name in ("observation", "action", "reward", "value"):
            found, column = getattr(batch, name)[row], getattr(data, name)
            np.testing.assert_array_equal(found[:count], column[row : row + count])
            assert (found[count:] == 5).all()
        assert (valid[row, :count] == 1).all()
        assert (valid[row, count:] == data.termination[end - 1]).all()


# --- Loss and network ---------------------------------------------------------------------------
def test_loss_and_gradient_equal_numpy():
    state, batch, valid = setup()
    assert 0 < np.asarray(valid).mean() < 1
    params = double(state.actor.params)
    loss, metrics, grads = actor_loss(
        state.actor.params, state, batch, valid, jax.random.key(0), CFG
    )
    expected = numpy_loss(params, batch, valid)
    np.testing.assert_allclose([loss, metrics["actor_loss"]], expected, rtol=2e-5)
    (direction, *_) = directions(params)
    numeric = slope(lambda p: numpy_loss(p, batch, valid), params, direction)
    np.testing.assert_allclose(dot(grads, direction), numeric, rtol=2e-3)
    head = np.asarray(grads["params"]["head"])
    assert (np.abs(head).max(axis=(1, 2)) > 0).all()  # every dimension has a head that learns


def test_cached_calls_equal_one_call_of_the_window():
    """Padding at the window's beginning, past transitions at once, then token after token."""
    state, batch, _ = setup()
    params = state.actor.params
    sequence = sequences(batch)[:2, : 2 * M]
    padded = jnp.asarray(np.concatenate([np.full((2, M), 3), sequence], axis=1))
    call = jax.jit(state.actor.apply_fn)
    empty = jnp.zeros((2, 3 * M, 2, 4))
    logits, caches = call(params, padded[:, : 2 * M], 0, 1, ((empty, empty),) * 2)
    found = [np.asarray(logits[:, M:])]
    for slot in range(2 * M, 3 * M):
        logits, caches = call(params, padded[:, slot : slot + 1], slot, 1, caches)
        found.append(np.asarray(logits))
    found = np.concatenate(found, axis=1)
    for i in range(2):
        expected = numpy_logits(double(params), sequence[i])
        np.testing.assert_allclose(found[i], expected, rtol=1e-3, atol=1e-3)
    assert call._cache_size() == 2


def test_what_is_left_of_the_likely_tokens():
    logits = jnp.log(jnp.array([[0.05, 0.3, 0.2, 0.45]]))
    kept = np.asarray(trajectory_transformer.likely(logits, cdf=0.6))[0]
    # 0.05 and 0.2 and 0.3 are 0.55 < 0.6: what is left is the most likely one.
    assert (kept > -100).tolist() == [False, False, False, True]
    kept = np.asarray(trajectory_transformer.likely(logits, cdf=0.5))[0]
    assert (kept > -100).tolist() == [False, True, False, True]
    kept = np.asarray(trajectory_transformer.likely(logits, top_k=2))[0]
    assert np.isfinite(kept).tolist() == [False, True, False, True]
    np.testing.assert_array_equal(trajectory_transformer.likely(logits), logits)


# --- Update -------------------------------------------------------------------------------------
def test_the_learning_rate_rises_and_falls():
    cfg = trajectory_transformer.Config(
        **TINY | {"warm_up": 2, "decay_updates": 6, "actor_learning_rate": 0.1}
    )
    create = functools.partial(trajectory_transformer.create_state, cfg=cfg)
    state = jax.eval_shape(create, jax.random.key(0), toy().transitions)
    actor = state.actor.replace(params=None)

    def rate(step):
        if step == 0:
            return 0.05
        return 0.1 * max(0.1, 0.5 * (1 + math.cos(math.pi * (step + 1 - 2) / 4)))

    nets.check_rate(actor, rate, steps=8)
    assert rate(6) < rate(7)  # as in the authors' code it rises again


def test_decay_is_for_matrices_only():
    """With gradients far below Adam's epsilon an update is the decay alone."""
    actor = setup()[0].actor
    grads = jax.tree.map(lambda x: np.full_like(x, 1e-14), actor.params)
    update = jax.jit(
        lambda grads, params: actor.tx.update(grads, actor.tx.init(params), params)[0],
    )
    rate = 6e-4 / 3 * 0.1
    for path, change in jax.tree_util.tree_leaves_with_path(update(grads, actor.params)):
        x = functools.reduce(lambda tree, part: tree[part.key], path, actor.params)
        decays = path[-1].key in ("kernel", "head")
        np.testing.assert_allclose(change, -rate * decays * x, rtol=1e-4, atol=1e-9)


# --- Planning -----------------------------------------------------------------------------------
def numpy_plan(params, past, observation, bins, horizon):
    """Greedy, without a cache and without padding: every token from the last transitions alone."""
    sequence = [*past.ravel(), *observation]
    middle, gained = (bins[1:] + bins[:-1]) / 2, 0.0
    start = len(past)
    for t in range(horizon):
        while len(sequence) < (start + t + 1) * M:
            done = len(sequence) // M  # complete transitions; 2 of them are seen
            window = np.array(sequence[max(0, done - 2) * M :])
            prob = softmax(numpy_logits(params, window)[-1])
            dimension = len(sequence) % M
            sequence.append(int(prob.argmax()))
            if dimension == M - 2:
                gained += 0.9**t * prob[:5] @ middle[:, -2]
    return np.array(sequence).reshape(-1, M)[start:]


@functools.cache
def greedy():
    cfg = trajectory_transformer.Config(**TINY | {"action_cdf": None, "action_top_k": 1})

    def one(params, token, known, observation, bins):
        network = functools.partial(setup()[0].actor.apply_fn, params)
        return trajectory_transformer.beam_search(
            network, token, known, observation, jax.random.key(0), bins, cfg
        )

    return jax.jit(one)


@pytest.mark.parametrize("known", [0, 1, 2])
def test_a_plan_of_the_most_likely_tokens(known):
    """The cache, its padding and the window that moves with the plan change nothing."""
    state, _, _ = setup()
    rng = np.random.default_rng(known)
    token, observation = rng.integers(0, 5, (2, M)), rng.integers(0, 5, O)
    plan = greedy()(state.actor.params, token, known, observation, state.bins)
    expected = numpy_plan(
        double(state.actor.params), token[2 - known :], observation, double(state.bins), 3
    )
    np.testing.assert_array_equal(plan, expected)


def test_the_memory_of_the_policy():
    """It has the last steps' observations, actions as played and rewards."""
    state, _, _ = setup()
    act = jax.jit(trajectory_transformer.policy_fn(state, CFG))
    memory = trajectory_transformer.initial_memory(2, toy().transitions, CFG)
    rng, bins = np.random.default_rng(0), np.asarray(state.bins)
    observations = rng.standard_normal((5, 2, O), np.float32)
    rewards = rng.standard_normal((5, 2), np.float32)
    last, steps = np.zeros(2, np.float32), []
    for observation, reward in zip(observations, rewards, strict=True):
        action, memory = act(
            trajectory_transformer.policy_params(state),
            observation,
            jax.random.key(1),
            memory,
            last,
        )
        action, last = np.asarray(action), reward
        steps.append(np.concatenate([observation, action, reward[:, None]], axis=1))
        assert np.abs(action).max() <= 1
        for number, borders in zip(action.T, bins.T[O:], strict=False):
            assert np.isclose(number[:, None], (borders[1:] + borders[:-1]) / 2).any(axis=1).all()
    assert act._cache_size() == 1  # one program from the first step on
    assert memory.steps.tolist() == [5, 5]
    numbers = np.stack(steps[-3:], axis=1)  # [E, C, M - 1]
    expected = np.asarray(
        trajectory_transformer.discretise(jnp.asarray(numbers), state.bins[:, :-1])
    )
    found = np.asarray(memory.token)
    np.testing.assert_array_equal(found[:, :, :-2], expected[:, :, :-1])
    np.testing.assert_array_equal(found[:, :-1, -2], expected[:, :-1, -1])


@runs.SLOW  # it trains for a while
def test_the_plan_takes_the_action_that_pays():
    """One step with reward 1 - (a - 0.5)^2: of the candidates the one next to 0.5 is best."""
    cfg = probes.config(
        trajectory_transformer, termination_reward=None, action_cdf=None, log_every=300
    )
    state, key, data = probes.start(trajectory_transformer, probes.best_action(), cfg)
    rows = probes.best_action()
    bins = trajectory_transformer.tokenised(
        Dataset("rows", rows, np.arange(1, 2001), rows.reward), cfg
    )[1]
    chunk = jax.jit(trajectory_transformer.train_chunk, static_argnums=4, donate_argnums=0)
    state, _ = chunk(state, key, 0, data, cfg)
    act = jax.jit(trajectory_transformer.policy_fn(state, cfg))
    memory = trajectory_transformer.initial_memory(8, rows, cfg)
    params = state.actor.params, bins
    one = np.ones((8, 1), np.float32)
    action, _ = act(params, one, jax.random.key(3), memory, one[:, 0])
    np.testing.assert_allclose(np.median(action), 0.5, atol=0.15)


@pytest.mark.parametrize("words", ["--plan-context 1", "--plan-context 11", "--action-top-k 101"])
def test_plans_that_cannot_be_made_are_refused(words, capsys):
    flag, value = words.split()
    cfg = trajectory_transformer.Config(**{flag[2:].replace("-", "_"): int(value)})
    with pytest.raises(SystemExit) as leave:
        trajectory_transformer.check_plans(cfg)
    assert leave.value.code == 2 and words in capsys.readouterr().err

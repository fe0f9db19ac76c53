# SPDX-License-Identifier: Apache-2.0
"""What the tests of the algorithm files share: networks and Adam in NumPy and float64, states with
random parameters, compiled losses, and checks that are the same for several files."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import probes
import pytest

from common import datasets, experiment
from common.experiment import config

CFG = {"hidden": (16, 16), "batch_size": 32}  # as many rows as the data: one program serves both
OPTIMISERS = ("learning_rate", "weight_decay", "gradient_norm")  # ends of names that they read


# --- NumPy --------------------------------------------------------------------------------------
def double(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def dense(layer, x):
    return x @ layer["kernel"] + layer["bias"]


def layer_norm(layer, x):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * layer["scale"] + layer["bias"]


def mlp(params, x, drop=lambda i, x: x):
    """Dense, relu, where there is one a layer norm, `drop`; ...; Dense."""
    layers = params["params"]
    count = sum(name.startswith("Dense") for name in layers) - 1
    for i in range(count):
        x = np.maximum(dense(layers[f"Dense_{i}"], x), 0)
        if f"LayerNorm_{i}" in layers:
            x = layer_norm(layers[f"LayerNorm_{i}"], x)
        x = drop(i, x)
    return dense(layers[f"Dense_{count}"], x)


def tanh_actor(params, observation):
    return np.tanh(mlp(params, observation))


def value(params, *inputs):
    return mlp(params, np.concatenate(inputs, axis=-1))[..., 0]


def critics(params, *inputs):
    """[K, B]"""
    members = len(params["params"]["Dense_0"]["bias"])
    return np.stack(
        [value(jax.tree.map(lambda x, k=k: x[k], params), *inputs) for k in range(members)]
    )


def gelu(x):
    """The approximation by tanh."""
    return x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2


def gelu_net(params, *inputs):
    """Dense, gelu, where there is one a layer norm; ...; Dense, "head" or the last one."""
    layers, x = dict(params["params"]), np.concatenate(inputs, axis=-1)
    hidden = sum(name.startswith("Dense") for name in layers) - ("head" not in layers)
    for i in range(hidden):
        x = gelu(dense(layers[f"Dense_{i}"], x))
        x = layer_norm(layers[f"LayerNorm_{i}"], x) if f"LayerNorm_{i}" in layers else x
    return dense(layers.get("head", layers.get(f"Dense_{hidden}")), x)


def gelu_critics(params, *inputs):
    """[K, ...]"""
    members = len(params["params"]["Dense_0"]["bias"])
    one = [jax.tree.map(lambda x, k=k: x[k], params) for k in range(members)]
    return np.stack([gelu_net(member, *inputs)[..., 0] for member in one])


def flow(params, observation, noise, steps):
    """Where a velocity net carries the noise in `steps` Euler steps, clipped."""
    x = noise
    for i in range(steps):
        x = x + gelu_net(params, observation, x, np.full((*x.shape[:-1], 1), i / steps)) / steps
    return np.clip(x, -1, 1)


def log_normal(x, mean, log_std):
    """log of the density of independent normal numbers, summed over the last axis."""
    std = np.exp(log_std)
    return np.log(np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))).sum(axis=-1)


def slope(loss, params, direction, step=1e-6):
    """Central difference of a float64 loss along `direction`."""
    ends = [jax.tree.map(lambda x, d, s=s: x + s * d, params, direction) for s in (step, -step)]
    return (loss(ends[0]) - loss(ends[1])) / (2 * step)


def directions(params, count=5):
    rng = np.random.default_rng(0)
    return [jax.tree.map(lambda x: rng.standard_normal(x.shape), params) for _ in range(count)]


def dot(grads, direction):
    products = jax.tree.map(lambda g, d: (np.asarray(g, np.float64) * d).sum(), grads, direction)
    return sum(jax.tree.leaves(products))


class Adam:
    """Kingma & Ba, Algorithm 1. `rate` is a number or a function of the steps made so far."""

    def __init__(self, rate):
        self.rate, self.steps, self.memory = rate, 0, {}

    def step(self, params, grads):
        rate = self.rate(self.steps) if callable(self.rate) else self.rate
        self.steps += 1
        leaves, tree = jax.tree.flatten(params)
        changed = []
        for i, (x, g) in enumerate(zip(leaves, jax.tree.leaves(double(grads)), strict=True)):
            m, v = self.memory.get(i, (0, 0))
            self.memory[i] = m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            m, v = m / (1 - 0.9**self.steps), v / (1 - 0.999**self.steps)
            changed.append(np.float32(x - rate * m / (np.sqrt(v) + 1e-8)))
        return tree.unflatten(changed)


def polyak(params, target, rate):
    return jax.tree.map(lambda x, t: np.float32(rate * x + (1 - rate) * t), params, target)


# --- States and losses --------------------------------------------------------------------------
def shaken(state, seed=3):
    """Random numbers for every set of parameters, so that no term is near zero, and for mean and
    std of the observations; the rest is kept."""
    rng = np.random.default_rng(seed)

    def shake(tree):
        draws = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), tree)
        return jax.device_put(jax.tree.map(lambda x: 0.5 * x, draws))

    def one(net):
        if net is None:
            return None
        if isinstance(net, tuple):
            size = net[0].shape
            mean, std = rng.standard_normal(size), rng.uniform(0.5, 2, size)
            return jax.device_put((np.float32(mean), np.float32(std)))
        names = [name for name in ("params", "target_params") if hasattr(net, name)]
        return net.replace(**{name: shake(net.params) for name in names})

    return type(state)(*map(one, state))


@functools.cache
def shapes(module, cfg, num_actions):
    facts = {} if num_actions is None else {"num_actions": num_actions}
    create = functools.partial(module.create_state, cfg=cfg, **facts)
    return jax.eval_shape(create, jax.random.key(0), probes.random_transitions())


def setup(module, num_actions=None, **overrides):
    """(cfg, shaken state, train key, data). No initialisation is compiled: it takes seconds.

    Configs that differ in what no network sees share the networks, and so the compiled losses.
    """
    cfg, data = probes.config(module, **(CFG | overrides)), probes.random_transitions()
    data = data if num_actions is None else probes.integer_actions(data)
    data = probes.prepared(module, data, cfg)
    unseen = {
        field.name: field.default
        for field in dataclasses.fields(cfg)
        if "float" in str(field.type) and not field.name.endswith(OPTIMISERS)
    }
    state = shapes(module, dataclasses.replace(cfg, **unseen), num_actions)
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
    return cfg, shaken(state), jax.random.key(1), jax.device_put(data)


def compiled(loss):
    """loss(params, ..., cfg) -> (loss, metrics, gradient), as one program.

    Op by op every shape would cost a compilation of its own. Floats of the Config are arguments.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def program(cfg, numbers, params, *rest):
        cfg = dataclasses.replace(cfg, **numbers)
        return jax.value_and_grad(loss, has_aux=True)(params, *rest, cfg)

    def run(params, *rest):
        *rest, cfg = (x if not _is_key(x) else jax.random.clone(x) for x in rest)
        numbers = {name: x for name, x in vars(cfg).items() if isinstance(x, float)}
        cfg = dataclasses.replace(cfg, **dict.fromkeys(numbers))
        (found, metrics), grads = program(cfg, numbers, params, *rest)
        return float(found), {name: float(x) for name, x in metrics.items()}, grads

    return run


def _is_key(x):
    return isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def train_chunk(module, state, key, start, data, cfg):
    program = jax.jit(module.train_chunk, static_argnums=4)
    return program(state, jax.random.clone(key), start, data, cfg)


def sample(key, step, data, cfg, number):
    """The batch of a step and its other keys, of `number` keys in all."""
    return _sample(jax.random.clone(key), step, data, cfg.batch_size, number)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _sample(key, step, data, size, number):
    key = jax.random.fold_in(key, step)
    keys = jax.random.split(key, number) if number > 1 else [key]
    index = jax.random.randint(keys[0], (size,), 0, len(data.reward))
    return jax.tree.map(lambda x: x[index], data), *keys[1:]


def fresh(module, num_actions=None, **facts):
    """State of a seed as `create_state` makes it: O = 16, A = 2, hidden (64, 96), K = 3."""
    cfg = probes.config(module, hidden=(64, 96), num_critics=3)
    data = probes.random_transitions(observation_dim=16)
    if num_actions is not None:
        data, facts = probes.integer_actions(data), facts | {"num_actions": num_actions}
    create = functools.partial(module.create_state, cfg=cfg, **facts)
    return jax.jit(create)(jax.random.key(0), data)


def linear_net(create, apply_fn, params, target_params=None):
    """A net whose output is worked out by hand."""
    net = create(apply_fn=apply_fn, params=_arrays(params), tx=optax.sgd(1.0))
    if target_params is None:
        return net
    return net.replace(target_params=_arrays(target_params))


def linear_td3(module, actor, actor_target, critic, critic_target, **facts):
    """pi(s) = actor * s for s of one number, Q_k(s, a) = critic_k * sum of a."""
    net = functools.partial(linear_net, module.TrainState.create)
    return module.State(
        net(lambda p, s: p[None] * s, actor, actor_target),
        net(lambda p, s, a: p[:, None] * a.sum(axis=-1)[None], critic, critic_target),
        **facts,
    )


def check_target_noise(critic_loss, linear_state, cfg, policy_action):
    """The noise is clipped, and so is the noisy action. `critic_loss`: as `compiled` returns it.

    Q(s, a) = a with target parameters 1 and 0 with the others, so loss = mean (discount a')^2.
    """
    state, key = linear_state([0], [policy_action], [0], [1]), jax.random.key(0)
    batch = probes.random_transitions(64, 1, 1, reward=0.0, next_observation=1.0, termination=0)
    noise = np.asarray(jax.random.normal(key, (64, 1)), np.float64)
    action = np.clip(policy_action + 0.5 * np.sign(noise), -1, 1)  # 0.8 + 0.5 is not an action
    loss = critic_loss(state.critic.params, state, batch, jax.random.clone(key), cfg)[0]
    np.testing.assert_allclose(loss, np.square(0.99 * action).mean(), rtol=1e-5)


def _arrays(tree):
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32), tree, is_leaf=lambda x: not isinstance(x, dict)
    )


# --- Checks of several files --------------------------------------------------------------------
def check_close(tree, expected, rtol=1e-3, atol=1e-3):
    for x, y in zip(probes.leaves(tree), probes.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


def check_bootstrap(loss, data):
    """loss(batch) reads what follows a row unless it is a true end; truncations do not count."""

    def read(**columns):
        rows = {name: np.full_like(getattr(data, name), x) for name, x in columns.items()}
        return loss(data._replace(**rows))

    assert read(termination=0) != read(termination=1)
    for termination in (0, 1):
        fixed = {"termination": termination}
        here = read(**fixed)
        assert here == read(**fixed, truncation=0) == read(**fixed, truncation=1)
        assert here == read(**fixed, next_action=0.5)
        assert (here == read(**fixed, next_observation=0.5)) == (termination == 1)
        assert here != read(**fixed, reward=0.5)


def check_uniform_init(params, sizes):
    """PyTorch's default: kernels and biases uniform in ±1 / sqrt(fan in)."""
    layers = params["params"]
    assert sorted(layers) == [f"Dense_{i}" for i in range(len(sizes) - 1)]
    for i, (fan_in, width) in enumerate(itertools.pairwise(sizes)):
        kernel, bias = (np.asarray(layers[f"Dense_{i}"][x]) for x in ("kernel", "bias"))
        assert kernel.shape[-2:] == (fan_in, width) and bias.shape[-1:] == (width,)
        bound = fan_in**-0.5
        assert 0.9 * bound < np.abs(kernel).max() <= bound
        assert 0.2 * bound < np.abs(bias).max() <= bound
        if kernel.size > 1000:
            np.testing.assert_allclose(kernel.std(), bound / 3**0.5, rtol=0.05)
        if bias.size > 50:
            np.testing.assert_allclose(bias.std(), bound / 3**0.5, rtol=0.25)


def check_orthogonal_init(params, sizes):
    """Kernels are sqrt 2 times an orthogonal matrix, in every layer; biases are 0."""
    layers = params["params"]
    dense_layers = sorted(name for name in layers if name.startswith("Dense"))
    assert dense_layers == [f"Dense_{i}" for i in range(len(sizes) - 1)]
    for i, (fan_in, width) in enumerate(itertools.pairwise(sizes)):
        kernel, bias = (np.asarray(layers[f"Dense_{i}"][x]) for x in ("kernel", "bias"))
        assert kernel.shape[-2:] == (fan_in, width)
        for matrix in kernel.reshape(-1, fan_in, width):
            matrix = matrix if fan_in >= width else matrix.T
            np.testing.assert_allclose(matrix.T @ matrix, 2 * np.eye(min(fan_in, width)), atol=1e-5)
        assert (bias == 0).all()


def check_members_differ(critic):
    for layer in critic.params["params"].values():
        if "kernel" in layer:
            kernel = np.asarray(layer["kernel"])
            for i, j in ((0, 1), (0, 2), (1, 2)):
                assert not np.isclose(kernel[i], kernel[j]).any(axis=0).all()
    data = probes.random_transitions(observation_dim=16)
    q = np.asarray(jax.jit(critic.apply_fn)(critic.params, data.observation, data.action))
    assert q.shape == (3, 32) and (np.ptp(q, axis=0) > 0).all()


def check_targets_are_copies(net):
    """Equal numbers in buffers of their own: both are donated to the chunks."""
    for made in (net, type(net).create(net.apply_fn, net.params, net.tx)):
        for x, target in zip(*map(jax.tree.leaves, (made.params, made.target_params)), strict=True):
            assert np.array_equal(x, target)
            assert x.unsafe_buffer_pointer() != target.unsafe_buffer_pointer()


def check_rate(net, rate, steps=4):
    """`rate`, a function of the step, is how far the net's optimiser goes in each step.

    Adam makes steps of just this length while the gradient stays the same.
    """
    x = {"x": np.ones(1, np.float32)}
    memory, update = net.tx.init(x), jax.jit(net.tx.update)
    for step in range(steps):
        change, memory = update({"x": np.full(1, 3, np.float32)}, memory, x)
        np.testing.assert_allclose(change["x"], -rate(step), rtol=1e-4, atol=1e-9)


def check_normalise(module):
    """Mean 0 and std 1, one that is 0 harmless; next observations by the same numbers."""
    rng = np.random.default_rng(0)
    mean, std = np.array([1000.0, -3.0, 7.0, 0.0]), np.array([0.5, 1e-2, 0.0, 20.0])
    observation = np.float32(mean + std * rng.standard_normal((20_000, 4)))
    raw = probes.random_transitions(20_000, 4, observation=observation)
    data, (mean, std) = module.normalise(raw)
    wide = observation.astype(np.float64)
    np.testing.assert_allclose(mean, wide.mean(axis=0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(std, wide.std(axis=0) + 1e-3, rtol=1e-9)
    np.testing.assert_allclose(data.observation.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(np.std(data.observation, axis=0), [0.998, 10 / 11, 0, 1], rtol=1e-2)
    for name in ("observation", "next_observation"):
        expected = (getattr(raw, name).astype(np.float64) - mean) / std
        np.testing.assert_allclose(getattr(data, name), expected, rtol=1e-4, atol=1e-4)
    for name, column in data._asdict().items():
        assert isinstance(column, np.ndarray) and column.dtype == np.float32
        if not name.endswith("observation"):
            assert np.array_equal(column, getattr(raw, name))


def check_policy_normalises(module, actor):
    """Raw observations in, the same action out as for the data: `actor(params, normalised)`."""
    observation = 5 + 3 * np.random.default_rng(0).standard_normal((20, 3))
    raw = probes.random_transitions(20, observation=observation)
    data, statistics = module.normalise(raw)
    _, state, key, _ = setup(module)
    state = state._replace(statistics=jax.device_put(tuple(map(np.float32, statistics))))
    params = module.policy_params(state)
    assert params[0] is state.actor.params and params[1] is state.statistics
    act = jax.jit(functools.partial(module.policy, state.actor.apply_fn))
    action = act(params, raw.observation, key)
    expected = actor(double(state.actor.params), double(data.observation))
    np.testing.assert_allclose(action, expected, rtol=1e-3, atol=1e-4)
    # One observation, as a user would ask.
    alone = act(params, raw.observation[0], jax.random.clone(key))
    np.testing.assert_allclose(alone, expected[0], rtol=1e-3, atol=1e-4)


# --- Runs ---------------------------------------------------------------------------------------
class Seen(Exception):
    pass


def handed_over(module, monkeypatch, tmp_path, transitions, returns, ends=None, **overrides):
    """What `train` hands to the first chunk: state and data. Episodes of one length or `ends`."""
    count = len(transitions.reward)
    ends = count // len(returns) * np.arange(1, 1 + len(returns)) if ends is None else ends
    returns = np.asarray(returns, np.float64)
    number = probes.NUMBER if transitions.action.ndim == 1 else None
    dataset = datasets.Dataset("toy", transitions, ends, returns, num_actions=number)

    def over_seeds(chunk, update=None):
        def stop(state, keys, start, data):
            raise Seen(state, data)

        return stop

    create_state = module.create_state

    def create(key, batch, cfg, **facts):
        """As one program: `train` runs `create_state` operation by operation."""
        return jax.jit(functools.partial(create_state, cfg=cfg, **facts))(key, batch)

    monkeypatch.setattr(module, "create_state", create)
    monkeypatch.setattr(experiment, "over_seeds", over_seeds)
    monkeypatch.setattr(datasets, "load", lambda *args, **kwargs: dataset)
    cfg = probes.config(module, dataset="toy.hdf5", hidden=(4,), **overrides)
    options = config.Options(name="toy", runs_dir=str(tmp_path), wandb="disabled")
    with pytest.raises(Seen) as seen:
        module.train(cfg, options)
    return seen.value.args


def refused(capsys, config_class, words):
    """The one line that a start with these words ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as leave:
        config.parse(config_class, words.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert leave.value.code == 2 and line.startswith("error: ")
    return line

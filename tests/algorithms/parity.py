# SPDX-License-Identifier: Apache-2.0
"""Runs an algorithm file on the batches and random numbers that its authors' code was run on.

A fixture, tests/fixtures/parity/<algorithm>.npz, has what the authors' code started from and what
it made of it. The text beside it says how it was made. Where one file would exceed 200 kB, further
cases are in <algorithm>.<name>.npz. A fixture holds one case or more, each with
its own settings. The names of its arrays are paths in our names:

    <case>/init/<field>/params/...          parameters before the first update, and `target_params`
    <case>/batch/<column>                   [N, M, B, ...], M batches for each of N updates
    <case>/data/<column>                    or all rows, from which `update` draws its batches
    <case>/draw/<number>_<kind>             [N, ...], random numbers, see `replayed`
    <case>/loss/<metric>                    [N], a loss of each update
    <case>/after/<n>/<field>/params/...     after n updates, and `target_params`
    <case>/after/<n>/<field>/mu/...         Adam's mean of the gradients: all we need to compare
                                            gradients (after one step it is a tenth of the first)
                                            or what SGD with momentum keeps
    <case>/policy/observation, action       ten observations and what the policy makes of them,
                                            for DT those of a few steps, with their rewards
    <case>/policy/draw/<number>_<kind>      its random numbers

An .npz is smaller with few arrays, so the file holds one long array per dtype and `index`, JSON:
{path: [dtype, start, shape]}. One "update" is one call of the file's `update`, which may take
several gradient steps. Inputs are float32. Results are float64 where the authors' code was run in
float64; then ours is, too.
"""

import collections
import contextlib
import dataclasses
import functools
import inspect
import json
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import probes
from flax.core import Scope

FOLDER = Path(__file__).resolve().parents[1] / "fixtures" / "parity"


@dataclasses.dataclass(frozen=True)
class Case:
    """One case of a fixture: our side of its settings."""

    algorithm: str
    name: str
    config: dict  # fields of the file's Config that differ from `CONFIG`
    gradient_steps: int = 1  # per call of `update`
    create: dict = dataclasses.field(default_factory=dict)  # further arguments of `create_state`
    action_dim: int | None = None  # of the data, where a batch has other actions than the data
    policy: str = "policy"  # function of the file that gives the action
    carry: str | None = None  # function of (state, data, cfg): what `update` takes with the state
    update: str = "update"  # function of the file that makes an update, of a phase of the training


CONFIG = {"hidden": (16, 16), "log_every": 2}
# What `after/1` lacks: {(algorithm, case): beginnings of names}. IDQL's wide layers would exceed
# 200 kB, and without a target for the gap CQL's multiplier has no gradient.
LEFT_OUT = {
    ("idql", "mujoco"): (
        "actor/target_params/",
        "actor/mu/Dense_0/kernel",
        "actor/mu/Dense_1/kernel",
        "actor/mu/Dense_2/kernel",
    ),
    ("cql", "mujoco"): ("log_multiplier/mu/",),
    ("cql", "unweighted"): ("log_multiplier/mu/",),
    ("cal_ql", "adroit"): ("log_multiplier/mu/",),
    ("cal_ql", "kitchen"): ("log_multiplier/mu/",),
    ("mobile", "fixed"): ("log_temperature/mu/",),  # which nothing updates there
}
# Parts of the state that no update of a case changes, so a fixture need not have them: the other
# phase's networks and fixed weights.
CLONED = ("behaviour/", "clone_temperature/")
UNCHANGED = {
    ("brac", "value"): (*CLONED, "alpha/"),
    ("brac", "policy"): CLONED,
    ("brac", "both"): (*CLONED, "alpha/"),
    ("brac", "clone"): ("actor/", "critic/", "alpha/"),
    ("brac", "bear"): CLONED,
    ("diffusion_dice", "mujoco"): ("actor/",),
    ("diffusion_dice", "antmaze"): ("actor/",),
    ("diffusion_dice", "clone"): ("critic/", "value_net/", "guidance/", "choosers/"),
    ("qdt", "mujoco"): ("pi/", "critic/", "log_temperature/"),
    ("qdt", "free"): ("pi/", "critic/", "log_temperature/"),
    ("qdt", "critic"): ("actor/",),
    ("fisher_brc", "mujoco"): CLONED,
    ("fisher_brc", "strong"): CLONED,
    ("fisher_brc", "clone"): ("actor/", "critic/", "log_temperature/"),
    ("wsrl", "kitchen"): ("multiplier/",),
    ("wsrl", "mujoco"): ("multiplier/",),
    ("wsrl", "online"): ("multiplier/",),
    ("wsrl", "online_antmaze"): ("multiplier/",),
}
# What a policy takes besides its parameters, and the field of State whose apply function it is.
NETWORKS = {"apply_critics": "critic", "critic": "critic", "apply_vae": "vae"}
NETWORKS["apply_guidance"] = "guidance"


@functools.cache
def fixture(algorithm):
    """{case: {path: array}}"""
    cases = collections.defaultdict(dict)
    for path in sorted(FOLDER.glob(f"{algorithm}.*npz")):
        with np.load(path) as stored:
            numbers = dict(stored)
        index = json.loads(numbers.pop("index").tobytes())
        for key, (dtype, start, shape) in index.items():
            case, rest = key.split("/", 1)
            size = int(np.prod(shape))
            cases[case][rest] = numbers[dtype][start : start + size].reshape(shape)
    if not cases:
        raise AssertionError(f"{algorithm} has no parity fixture ({algorithm}.npz is missing)")
    return dict(cases)


def under(arrays, prefix):
    """{rest of the path: array} of all arrays below `prefix`."""
    return {key[len(prefix) + 1 :]: x for key, x in arrays.items() if key.startswith(prefix + "/")}


# --- Random numbers -----------------------------------------------------------------------------
@contextlib.contextmanager
def replayed(module, batches, draws):
    """Within this, `sample_batch` and jax.random give the numbers of the fixture.

    `module.sample_batch` gives `batches` in turn. A function of jax.random that is named in
    `draws` ({"<number>_<kind>": array}) gives the next array of its kind and of the shape that it
    is asked for. What it scales its numbers by (minval, maxval) is applied to them. It is an error
    to ask for a batch or a draw that is not there, and to leave one over. `jax.lax.scan` is a
    Python loop, so that it asks for a draw in each of its rounds, not once as it is compiled.
    """
    batches = list(batches)
    queues = collections.defaultdict(list)
    for name in sorted(draws, key=lambda name: int(name.split("_")[0])):
        kind = name.split("_", 1)[1]
        queues[kind, draws[name].shape].append(draws[name])

    def sample_batch(*args):
        return batches.pop(0)

    initialising = False

    def param(scope, *args, **kwargs):
        # flax asks an initialiser for the shape of a parameter that it has already.
        nonlocal initialising
        before, initialising = initialising, True
        try:
            return real["param"](scope, *args, **kwargs)
        finally:
            initialising = before

    def draw(kind, shape):
        queue = queues[kind, tuple(shape)]
        if not queue:
            raise AssertionError(f"no draw left of jax.random.{kind} with shape {tuple(shape)}")
        return queue.pop(0)

    def normal(key, shape=(), *args, **kwargs):
        if initialising:
            return real["normal"](key, shape, *args, **kwargs)
        return draw("normal", shape)

    def uniform(key, shape=(), dtype=float, minval=0.0, maxval=1.0):
        if initialising:
            return real["uniform"](key, shape, dtype, minval, maxval)
        return minval + (maxval - minval) * draw("uniform", shape)

    def bernoulli(key, p=0.5, shape=None):
        return draw("bernoulli", shape).astype(bool)

    def randint(key, shape, *args, **kwargs):
        return draw("randint", shape)

    def categorical(key, logits, axis=-1):
        return (logits + draw("gumbel", logits.shape)).argmax(axis)  # one of softmax(logits)

    fakes = {"normal": normal, "uniform": uniform, "bernoulli": bernoulli, "randint": randint}
    fakes["categorical"] = categorical
    real = {kind: getattr(jax.random, kind) for kind in fakes} | {"param": Scope.param}
    with contextlib.ExitStack() as stack:
        if batches:
            stack.enter_context(mock.patch.object(module, "sample_batch", sample_batch))
        stack.enter_context(mock.patch.object(jax.lax, "scan", unrolled))
        stack.enter_context(mock.patch.object(Scope, "param", param))
        for kind, fake in fakes.items():
            stack.enter_context(mock.patch.object(jax.random, kind, fake))
        yield
    left = [key for key, queue in queues.items() if queue]
    if batches or left:
        raise AssertionError(f"not used: {len(batches)} batches, draws {left}")


def unrolled(f, init, xs):
    """`jax.lax.scan` as a Python loop."""
    carry, outputs = init, []
    for i in range(len(jax.tree.leaves(xs)[0])):
        carry, output = f(carry, item(xs, i))
        outputs.append(output)
    return carry, jax.tree.map(lambda *x: jnp.stack(x), *outputs)


# --- Our state ----------------------------------------------------------------------------------
def leaf_names(tree):
    """Paths of the leaves of a parameter tree, without flax's own "params"."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    return [name.removeprefix("params").removeprefix("/") for name in names]


def join(*parts):
    return "/".join(part for part in parts if part)


def filled(tree, arrays, prefix, dtype):
    """The tree with the fixture's arrays for leaves. Every leaf must be there, in its shape."""
    leaves, structure = jax.tree.flatten(tree)
    new = []
    for name, leaf in zip(leaf_names(tree), leaves, strict=True):
        x = arrays[join(prefix, name)]
        assert x.shape == leaf.shape, (prefix, name, x.shape, leaf.shape)
        new.append(jnp.asarray(x, dtype))
    return structure.unflatten(new)


def initial_state(module, case, cfg, batch, arrays, dtype):
    """What `create_state` makes, with the fixture's parameters and optimisers that start anew."""
    create = functools.partial(module.create_state, cfg=cfg, **case.create)
    if case.action_dim is not None:
        batch = batch._replace(action=batch.action[..., : case.action_dim])
    state = jax.eval_shape(create, jax.random.key(0), batch)
    used = set()
    for field in state._fields:
        net = getattr(state, field)
        if not hasattr(net, "params"):  # such as the mean and std of the observations
            leaves, structure = jax.tree.flatten(net)
            names = [f"{field}/{i}" for i in range(len(leaves))]
            new = structure.unflatten(
                [
                    jnp.asarray(arrays[name], _like(leaf, dtype))
                    for name, leaf in zip(names, leaves, strict=True)
                ]
            )
            used.update(names)
        else:
            new = net
            for trees in ("params", "target_params"):
                if getattr(net, trees, None) is None:
                    continue
                tree = filled(getattr(net, trees), arrays, f"{field}/{trees}", dtype)
                used.update(join(field, trees, name) for name in leaf_names(tree))
                new = new.replace(**{trees: tree})
            new = new.replace(step=jnp.zeros((), int), opt_state=net.tx.init(new.params))
        state = state._replace(**{field: new})
    assert used == set(arrays), f"not used: {sorted(set(arrays) - used)}"
    return state


def trees_of(state):
    """{field/params/..., field/target_params/..., field/mu/...: array} of a state."""
    found = {}
    for field in state._fields:
        net = getattr(state, field)
        if not hasattr(net, "params"):
            continue
        trees = {"params": net.params, "mu": memory_of(net.opt_state)}
        if getattr(net, "target_params", None) is not None:
            trees["target_params"] = net.target_params
        for name, tree in trees.items():
            for leaf, x in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True):
                found[join(field, name, leaf)] = np.asarray(x)
    return found


def memory_of(opt_state):
    """Adam's mean of the gradients, or the sum that SGD with momentum keeps."""
    mean = optax.tree_utils.tree_get(opt_state, "mu")
    return optax.tree_utils.tree_get(opt_state, "trace") if mean is None else mean


# --- Comparison ---------------------------------------------------------------------------------
def difference(found, expected):
    """Largest difference of two arrays relative to the largest number in them."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-12))


def rows(module, columns):
    """A Transitions of the columns that the authors' code reads, the others zero.

    For QC a Chunks, for DT a Steps, for Cal-QL Rows with returns, and with initial observations a
    TransitionsAndStarts.
    """
    if "initial_observation" in columns:
        return module.TransitionsAndStarts(**columns)
    if "valid" in columns:
        return module.Chunks(**columns)
    if "timestep" in columns:
        return module.Steps(**columns)
    if "returns_to_go" in columns:
        return module.Rows(**columns)
    zeros = np.zeros(columns["reward"].shape, np.float32)
    blank = {"next_action": np.zeros_like(columns["action"]), "truncation": zeros}
    return probes.Transitions(**(blank | columns))


def config_of(module, case):
    """The file's Config, with those settings of `CONFIG` that the file has."""
    names = {field.name for field in dataclasses.fields(module.Config)}
    common = {name: x for name, x in CONFIG.items() if name in names}
    return module.Config(**(common | case.config))


def acting(module, case, state, cfg):
    """The policy of a state, (params=, observation=, key=) -> action."""
    policy = getattr(module, case.policy)
    networks = {
        field: getattr(state, field).apply_fn
        for field in state._fields
        if hasattr(getattr(state, field), "apply_fn")
    }
    acts = next(field for field in ("actor", "flow", "critic") if field in networks)
    bound = {"apply_fn": networks[acts]}
    for name in inspect.signature(policy).parameters:
        if name == "cfg":
            bound[name] = cfg
        elif name in NETWORKS:
            bound[name] = networks[NETWORKS[name]]
    return functools.partial(policy, **bound)


def precision(arrays):
    """The dtype that the authors' code was run in."""
    return np.result_type(*[x for name, x in arrays.items() if name.startswith("after/")])


def compare(module, case, arrays=None, stop_above=None):
    """{what: {name: largest relative difference}} of the module and the fixture of a case.

    What is one of "loss", "gradient", "parameters after 1", "parameters after N" (networks and
    targets) and "policy". With `stop_above` it returns as soon as a difference exceeds that.
    """
    arrays = fixture(case.algorithm)[case.name] if arrays is None else arrays
    dtype = precision(arrays)
    # The tests' debug modes cost a quarter of the time, and a NaN differs from every number.
    with (
        jax.enable_x64(dtype == np.float64),
        jax.debug_nans(False),
        jax.debug_key_reuse(False),
    ):
        return _compare(module, case, arrays, dtype, stop_above)


def _compare(module, case, arrays, dtype, stop_above):
    cfg, key = config_of(module, case), jax.random.key(0)
    update = getattr(module, case.update)

    def inputs(prefix):
        # NumPy arrays, since taking an item of one compiles nothing.
        return {name: np.asarray(x, _like(x, dtype)) for name, x in under(arrays, prefix).items()}

    draws, losses = inputs("draw"), under(arrays, "loss")
    number = len(next(iter(losses.values())))
    whole = bool(under(arrays, "data"))
    if whole:
        data = rows(module, inputs("data"))
        if hasattr(module, "tokenised"):
            data = probes.prepared(module, data, cfg)
        data = jax.device_put(data)  # rows are taken by a traced index
        example, batches = item(data, 0), None
    else:
        batches = rows(module, inputs("batch"))
        example = item(item(batches, 0), 0)
    state = initial_state(module, case, cfg, example, under(arrays, "init"), dtype)
    if case.carry is not None:
        carry = functools.partial(getattr(module, case.carry), cfg=cfg)
        state = state, jax.jit(carry)(state, data)

    @jax.jit
    def one_update(state, step, batches, draws):
        if whole:
            with replayed(module, [], draws):
                return update(state, step, key, data, cfg)
        turns = [item(batches, i) for i in range(len(batches.reward))]
        with replayed(module, turns, draws):
            return update(state, step, key, turns[0], cfg)

    found = collections.defaultdict(dict)

    def note(what, name, ours, theirs):
        far = difference(np.asarray(ours, np.float64), np.asarray(theirs, np.float64))
        found[what][name] = max(far, found[what].get(name, 0.0))

    def far_off():
        worst = max((x for numbers in found.values() for x in numbers.values()), default=0.0)
        return stop_above is not None and not worst <= stop_above

    begun_with = trees_of(state if case.carry is None else state[0])
    for i in range(number):
        step = i * case.gradient_steps
        state, metrics = one_update(state, step, item(batches, i), item(draws, i))
        for name, expected in losses.items():
            note("loss", name, metrics[name], expected[i])
        ours = trees_of(state if case.carry is None else state[0])
        stored = under(arrays, f"after/{i + 1}")
        if i in (0, number - 1):
            check_complete(case, i == 0, ours, stored)
            check_unchanged(case, ours, begun_with)
        for name, expected in stored.items():
            tree = name.split("/")[1]
            what = f"parameters after {'1' if i == 0 else 'N'}"
            note("gradient" if tree == "mu" else what, name, ours[name], expected)
        if far_off():
            return dict(found)

    state = state if case.carry is None else state[0]
    play = play_steps if "policy/reward" in arrays else play_once
    action = play(module, case, state, cfg, inputs("policy"), inputs("policy/draw"), example)
    note("policy", "action", action, arrays["policy/action"])
    return dict(found)


def check_complete(case, first, ours, stored):
    """Nothing that an update changes is missing in the fixture, but for LEFT_OUT."""
    wanted = {name for name in ours if first or name.split("/")[1] != "mu"}
    unchanged = UNCHANGED.get((case.algorithm, case.name), ())
    wanted = {name for name in wanted if not name.startswith(unchanged)}
    if first:
        left_out = LEFT_OUT.get((case.algorithm, case.name), ())
        wanted = {name for name in wanted if not name.startswith(left_out)}
    assert wanted <= set(stored), f"not in the fixture: {sorted(wanted - set(stored))}"


def check_unchanged(case, ours, begun_with):
    """The parts in UNCHANGED are, to the bit."""
    for name in ours:
        if name.startswith(UNCHANGED.get((case.algorithm, case.name), ())):
            assert np.array_equal(ours[name], begun_with[name]), f"an update changes {name}"


def play_once(module, case, state, cfg, recorded, draws, example):
    """The policy's actions at all observations at once."""
    policy = acting(module, case, state, cfg)

    @jax.jit
    def act(params, observation, draws):
        with replayed(module, [], draws):
            return policy(params=params, observation=observation, key=jax.random.key(0))

    return act(module.policy_params(state), recorded["observation"], draws)


def play_steps(module, case, state, cfg, recorded, draws, example):
    """The actions of a policy with a memory, step by step, [T, E, A]."""
    policy = acting(module, case, state, cfg)

    @jax.jit
    def act(params, observation, memory, reward, draws):
        key = jax.random.key(0)
        with replayed(module, [], draws):
            return policy(
                params=params, observation=observation, key=key, memory=memory, reward=reward
            )

    observation, reward = recorded["observation"], recorded["reward"]
    facts = {name: recorded[name] for name in ("target_return",) if name in recorded}
    memory = module.initial_memory(len(reward[0]), example, cfg, **facts)
    memory = jax.tree.map(lambda x: jnp.asarray(x, _like(x, observation.dtype)), memory)
    actions, last_reward = [], jnp.zeros_like(reward[0])
    for i in range(len(observation)):
        step = observation[i], memory, last_reward, item(draws, i)
        action, memory = act(module.policy_params(state), *step)
        actions.append(action)
        last_reward = reward[i]
    return jnp.stack(actions)


def item(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def _like(x, dtype):
    return dtype if x.dtype.kind == "f" else x.dtype


def summary(found):
    """{what: largest difference}"""
    return {what: max(numbers.values()) for what, numbers in found.items()}


def updates_of(case):
    return len(next(iter(under(fixture(case.algorithm)[case.name], "loss").values())))


def describe(found):
    """The largest differences by name, for the message of a failing test."""
    lines = [(far, what, name) for what, names in found.items() for name, far in names.items()]
    lines.sort(key=lambda line: -line[0] if line[0] == line[0] else -np.inf)
    return "\n" + "\n".join(f"{far:.1e}  {what}: {name}" for far, what, name in lines[:12])

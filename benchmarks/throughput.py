# SPDX-License-Identifier: Apache-2.0
"""Measure the training speed of algorithm files, and how long their matrix products alone take.

Run       python benchmarks/throughput.py --algorithms rebrac --seeds 1 2 --output throughput.md
Updates/s Critic updates, summed over seeds, of the chunk that the file's own `train` compiles and
          calls. The data are synthetic; all settings but the batch size are the file's defaults.
Floor     The time that the matrix products alone take, as an estimate: their floating-point
          operations divided by the rate of a chain x <- x w with the layers' shape, [batch, width]
          times [width, width]. Each result is an operand of the next, as in training. Measured on
          CPUs only, because on a GPU such a chain waits for kernel launches.
Bound     The same, measured more closely: a program that runs exactly the matrix products of the
          chunk and nothing else. These are all dot_generals of the traced chunk (dead code removed,
          loops with their trip counts) as [b, m, k] x [b, k, n], with the same storage and order,
          in one jitted loop. Each product uses an element of the one before it, so that none can be
          dropped, hoisted or overlapped. Operands of one shape share an array, so that they stay in
          the cache, which they do not in training. On a CPU batched products are also run one by
          one, and the faster way counts.
Peak      The rate of a chain of large square products, in GFLOP/s.
Peer      With --peer PYTHON, the updates/s of d3rlpy with the same widths, batch size and data
          sizes, measured right after each row of one seed. PYTHON belongs to a virtual environment
          with d3rlpy: python -m venv peer; peer/bin/pip install d3rlpy; --peer peer/bin/python.
Peers     With --peers NAME=PATH, other code bases with the same sizes and data, each measured right
          after our row of one seed, by peers.py: fql=FOLDER (seohongpark/fql), jax_corl=FOLDER
          (nissymori/JAX-CORL), unifloral=FOLDER (EmptyJackson/unifloral), corl=FOLDER
          (corl-team/CORL) are clones, d3rlpy=PYTHON is the python of an environment. A clone runs
          in its own environment, FOLDER/.venv, or else in this one. A peer that cannot be measured
          says why in its row. Peers that share a machine with other work are compared by
          updates/CPU s, the updates per second of CPU time of all threads.
Loading   With --loading, seconds to load a million transitions of each layout, see data_table.py.
Rollouts  With --rollouts ENV, evaluation steps/s in ENV: 10 episodes per seed of ReBRAC's actor.
Online    With --online ENV, env steps/s and updates/s of the online phase beside ENV, for every
          --steps-per-refresh, summed over seeds. The rows of the data set are synthetic. The share
          of the env is that of env.step in all time. That of env and acting has also the policy's
          actions and copying the rows into the buffer: all that is no update.

Every figure is the best of `repeats`; chunk, floor and bound alternate in one process. GFLOP count
the matrix products, 2 b m k n each. "compile s" is the extra time of the first two calls of the
chunk (with tracing, without the persistent cache); "dispatch ms" is the time until a call returns.
"""

import contextlib
import dataclasses
import datetime
import importlib
import json
import math
import os
import platform
import re
import runpy
import subprocess
import sys
import tempfile
import time
from functools import partial, reduce
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.interpreters import partial_eval

from common import command_line, datasets, evaluation, experiment, fail, files, interaction
from common.experiment.config import Options

ROWS, OBSERVATION, ACTION = 100_000, 17, 6  # of the synthetic data
FIRST_PHASES = ("clone_updates", "model_updates", "q_updates", "warm_start")  # Config fields
CHAIN = 200  # products in the chain that measures the rate for the floor
PEERS = ("td3_bc", "rebrac", "iql", "awac", "cql")  # methods that d3rlpy also has
CODE_BASES = {  # of --peers -> the methods that they have, too
    "fql": ("fql", "iql", "rebrac"),
    "jax_corl": ("td3_bc", "iql"),
    "unifloral": ("td3_bc", "rebrac"),
    "corl": ("rebrac",),
    "d3rlpy": PEERS,
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    algorithms: tuple[str, ...] = ("rebrac",)  # files of algorithms/, without .py
    seeds: tuple[int, ...] = (1, 2)  # numbers of seeds to train in parallel, one row each
    batch_size: int = 256  # transitions per update
    updates: int = 500  # per timed chunk; of awr, rlpd and wsrl more, up to whole iterations
    repeats: int = 5  # of every timing; the best counts
    output: str | None = None  # file to write, .md or .json; without a suffix both
    peer: str | None = None  # python of an environment with d3rlpy to compare with
    peers: tuple[str, ...] = ()  # NAME=FOLDER of other code bases to measure in turn, see above
    loading: bool = False  # also measure how long a million transitions take to load
    rollouts: tuple[str, ...] = ()  # also measure evaluation steps/s in these Gymnasium envs
    online: tuple[str, ...] = ()  # only measure the online phase, beside these Gymnasium envs
    steps_per_refresh: tuple[int, ...] = (1, 50)  # env steps between two policies, with --online


# --- Chunk --------------------------------------------------------------------------------------
def synthetic(
    dataset_id,
    env=None,
    env_steps=None,
    actions="continuous",
    observation_dim=OBSERVATION,
    action_dim=ACTION,
):
    """`datasets.load` with random transitions of 100 episodes, the same on every machine."""
    generator, length = np.random.default_rng(0), ROWS // 100
    observation, next_observation = generator.normal(size=(2, ROWS, observation_dim))
    action, next_action = generator.uniform(-1, 1, (2, ROWS, action_dim))
    if actions == "discrete":
        action, next_action = generator.integers(ACTION, size=(2, ROWS))
    reward, termination, truncation = generator.normal(size=ROWS), np.zeros(ROWS), np.zeros(ROWS)
    truncation[length - 1 :: length] = 1
    rows = (observation, action, reward, next_observation, next_action, termination, truncation)
    rows = (x.astype(np.int32 if x.dtype.kind == "i" else np.float32) for x in rows)
    ends, returns = np.arange(length, ROWS + 1, length), reward.reshape(100, length).sum(axis=1)
    number = ACTION if actions == "discrete" else None
    rows = datasets.Transitions(*rows)
    return datasets.Dataset("synthetic", rows, ends, returns, num_actions=number)


def last_chunk(module, cfg):
    """What `module.train` calls for its last updates on fixed data, and the arguments.

    By then the phases that come first are over, for example the cloning of a behaviour policy.
    """

    class Reached(Exception):
        pass

    def over_seeds(chunk, update=None, original=experiment.over_seeds):
        def call(*arguments):
            raise Reached(original(chunk), arguments)

        return call

    run = mock.MagicMock()
    run.__enter__.return_value = run
    run.restore = lambda state: (state, None, cfg.num_updates - cfg.log_every)
    run.boundaries = lambda start: [start]
    run.evaluates.return_value = False
    with (
        mock.patch.object(datasets, "load", synthetic),
        mock.patch.object(experiment, "over_seeds", over_seeds),
        mock.patch.object(experiment, "Run", lambda *_: run),
        mock.patch.object(evaluation, "Rollouts", mock.MagicMock()),
        mock.patch.object(interaction, "Interaction", mock.MagicMock()),
    ):
        try:
            module.train(cfg, Options(wandb="disabled"))
        except Reached as reached:
            return reached.args
    raise RuntimeError(f"{module.__name__}.train did not call what over_seeds returned")


# --- Online phase -------------------------------------------------------------------------------
class Timed(interaction.Interaction):
    """It measures env.step, and hands itself over in place of its first chunk."""

    class Reached(Exception):
        pass

    def chunk(self, state, keys, start):
        raise Timed.Reached(self, state, keys, start)

    def _env_step(self, i, action):
        began = time.perf_counter()
        step = super()._env_step(i, action)
        self.env_seconds += time.perf_counter() - began
        return step


def first_online_chunk(module, cfg, dataset, folder):
    """The `Interaction` of `module.train` and the arguments of its first chunk."""
    run = mock.MagicMock(cfg=cfg, dataset=dataset, folder=Path(folder))
    run.__enter__.return_value = run
    run.restore = lambda state: (state, None, cfg.num_updates)
    run.boundaries = lambda start: [start]
    run.last_update = cfg.num_updates + cfg.online_updates
    run.evaluates.return_value = False
    with (
        mock.patch.object(datasets, "load", lambda *_, **__: dataset),
        mock.patch.object(experiment, "Run", lambda *_: run),
        mock.patch.object(evaluation, "Rollouts", mock.MagicMock()),
        mock.patch.object(interaction, "Interaction", Timed),
    ):
        try:
            module.train(cfg, Options(wandb="disabled"))
        except Timed.Reached as reached:
            return reached.args
    raise RuntimeError(f"{module.__name__}.train has no online phase")


def measure_online(name, env_id, seeds, steps_per_refresh, arguments):
    """One row of the record: the online phase of an algorithm beside an env."""
    module, updates = importlib.import_module(f"algorithms.{name}"), arguments.updates
    known = {field.name for field in dataclasses.fields(module.Config)}
    if not {"online_updates", "updates_per_step"} <= known:
        fail(f"--algorithms {name}: has no online phase of one update or more for an env step")
    # An actor that changes at every second update has no newer version after one step.
    steps_per_refresh = max(steps_per_refresh, getattr(module.Config, "policy_delay", 1))
    refresh = int(steps_per_refresh * module.Config.updates_per_step)
    if updates % refresh:
        fail(f"--updates {updates}: not a multiple of the {refresh} between two policies of {name}")
    first = {x: 200 for x in ("random_steps", "warm_up_steps") if x in known}
    cfg = module.Config(
        seeds=tuple(range(seeds)),
        batch_size=arguments.batch_size,
        num_updates=updates,
        log_every=updates,
        online_updates=updates * (arguments.repeats + 1),
        steps_per_refresh=steps_per_refresh,
        **first,
    )
    env = make_env("--online", env_id)
    sizes = (int(np.prod(space.shape)) for space in (env.observation_space, env.action_space))
    dataset = synthetic(env_id, None, None, "continuous", *sizes)
    dataset = dataclasses.replace(
        dataset,
        make_env=partial(make_env, "--online", env_id),
        horizon=env.spec.max_episode_steps,
    )
    times = []
    with tempfile.TemporaryDirectory() as folder:
        online, state, keys, start = first_online_chunk(module, cfg, dataset, folder)
        for i in range(arguments.repeats + 1):  # the first one compiles
            online.env_seconds, acted, steps = 0.0, online.seconds, online.count
            (state, _), spent, _ = seconds(
                interaction.Interaction.chunk, online, state, keys, start + i * updates
            )
            shares = online.env_seconds / spent, (online.seconds - acted) / spent
            times.append((spent, online.count - steps, *shares))
        online.__exit__()
    spent, steps, env_share, acting_share = min(times[1:])
    return {
        "algorithm": name,
        "env": env_id,
        "seeds": seeds,
        "steps per refresh": steps_per_refresh,
        "updates per env step": cfg.updates_per_step,
        "env steps/s": steps * seeds / spent,
        "updates/s": updates * seeds / spent,
        "share of env": env_share,
        "share of env and acting": acting_share,
    }


def make_env(flag, env_id):
    """The Gymnasium env, or one line and exit code 2."""
    import gymnasium

    from common.envs import pointmaze

    pointmaze.register()
    try:
        return gymnasium.make(env_id)
    except gymnasium.error.Error as error:
        fail(f"{flag} {env_id}: {' '.join(str(error).split())}")


# --- Floor --------------------------------------------------------------------------------------
class Matmul(NamedTuple):
    """One dot_general, [b, m, k] x [b, k, n], without b where that is 1."""

    left: jax.ShapeDtypeStruct  # [b, m, k] or [b, k, m]
    right: jax.ShapeDtypeStruct  # [b, k, n] or [b, n, k]
    k_axes: tuple[int, int]  # -1 or -2, the axis of k in left and in right
    settings: tuple[tuple[str, Any], ...] = ()  # precision and output type

    @property
    def flops(self):
        k, b = self.left.shape[self.k_axes[0]], math.prod(self.left.shape[:-2])
        return 2 * self.left.size * self.right.size // (b * k)


class Loop(NamedTuple):
    body: tuple[Any, ...]  # Matmuls and Loops
    trips: int = 1
    devices: int = 1  # that run the loop at the same time, each on its share

    @property
    def flops(self):
        return self.trips * self.devices * sum(node.flops for node in self.body)


def matmuls(jaxpr):
    """The matrix products of a jaxpr in order, as a tuple of `Matmul` and `Loop`."""
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    found = []
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            found.append(matmul(eqn))
        leaves = jax.tree.leaves(list(params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
        bodies = [matmuls(getattr(x, "jaxpr", x)) for x in leaves if hasattr(x, "eqns")]
        trips = params["length"] if name == "scan" else 1
        devices = params["mesh"].size if name == "shard_map" else 1
        loops = [Loop(body, trips, devices) for body in bodies if body]
        if loops and name in ("while", "cond"):
            print(f"note: a {name} counts as one trip through its costliest branch")
            loops = [max(loops, key=lambda loop: loop.flops)]
        found += loops
    return tuple(found)


def matmul(eqn):
    operands, axes = [], []
    for variable, inner, batch in zip(eqn.invars, *eqn.params["dimension_numbers"], strict=True):
        shape = variable.aval.shape
        b, k = (math.prod(shape[i] for i in chosen) for chosen in (batch, inner))
        rest = math.prod(shape) // (b * k)
        # The last axis that is not a batch axis is the contiguous one. Is it part of k?
        last = max(set(range(len(shape))) - set(batch), default=None)
        stored = (rest, k) if last in inner else (k, rest)
        stored = (b, *stored) if b > 1 else stored
        operands.append(jax.ShapeDtypeStruct(stored, variable.aval.dtype))
        axes.append(-1 if last in inner else -2)
    settings = tuple((name, eqn.params[name]) for name in ("precision", "preferred_element_type"))
    return Matmul(*operands, tuple(axes), settings)


def unbatched(node):
    """The same products, with those that have a batch axis run one after the other."""
    if isinstance(node, Loop):
        return node._replace(body=tuple(map(unbatched, node.body)))
    left, right = (jax.ShapeDtypeStruct(x.shape[-2:], x.dtype) for x in (node.left, node.right))
    return Loop((node._replace(left=left, right=right),), math.prod(node.left.shape[:-2]))


def program(node):
    """A jitted function that runs these products and nothing else, and its argument."""
    generator, lefts, rights = np.random.default_rng(0), {}, {}

    def allocate(node):
        for inner in node.body if isinstance(node, Loop) else ():
            allocate(inner)
        if isinstance(node, Matmul):
            k = node.left.shape[node.k_axes[0]]
            for pool, x, scale in ((lefts, node.left, 1), (rights, node.right, k)):
                # Every product is a mean over k, so that the chain neither grows nor vanishes.
                pool.setdefault(x, jnp.asarray(generator.uniform(0.5, 1, x.shape) / scale, x.dtype))

    def run(carry, node):
        if isinstance(node, Loop):
            body = lambda carry, _: (reduce(run, node.body, carry), None)  # noqa: E731
            return jax.lax.scan(body, carry, length=node.trips)[0]
        left, right, element = carry
        i, j = list(lefts).index(node.left), list(rights).index(node.right)
        x, y, rank = left[i], right[j], len(node.left.shape)
        axes, batch = tuple((rank + axis,) for axis in node.k_axes), tuple(range(rank - 2))
        # The barriers keep XLA from copying x and from computing only the element that is read.
        element = element.astype(x.dtype).reshape((1,) * rank)
        x = jax.lax.dynamic_update_slice(x, element, (0,) * rank)
        x = jax.lax.optimization_barrier(x)
        out = jax.lax.dot_general(x, y, (axes, (batch, batch)), **dict(node.settings))
        element = jax.lax.optimization_barrier(out)[(0,) * rank].astype(jnp.float32)
        return [*left[:i], x, *left[i + 1 :]], right, element

    allocate(node)
    start = [*lefts.values()], [*rights.values()], jnp.float32(0)
    return jax.jit(lambda carry: run(carry, node)[-1]), start


def chain(batch_size, width):
    """x <- x w, `CHAIN` times: the result of a product is an operand of the next."""
    w = jax.random.normal(jax.random.key(0), (width, width)) / math.sqrt(width)
    x = jax.random.normal(jax.random.key(1), (batch_size, width))
    scan = jax.jit(lambda x, w: jax.lax.scan(lambda x, _: (x @ w, None), x, length=CHAIN)[0])
    return lambda start: scan(*start), (x, w)


# --- Record -------------------------------------------------------------------------------------
def seconds(function, *arguments):
    """(result, seconds until it was ready, seconds until the call returned)."""
    start = time.perf_counter()
    result = function(*arguments)
    returned = time.perf_counter() - start
    jax.block_until_ready(result)
    return result, time.perf_counter() - start, returned


def config(module, seeds, arguments, **changes):
    """The file's defaults, with the batch size and with short phases before the last updates."""
    fields, updates = {x.name for x in dataclasses.fields(module.Config)}, arguments.updates
    for part in fields & {"actor_updates", "updates_per_step"}:  # of which a chunk is made
        size = max(1, int(getattr(module.Config, part)))
        updates = math.ceil(updates / size) * size
    first = dict.fromkeys(fields.intersection(FIRST_PHASES), updates)
    if "online_updates" in fields:
        changes["online_updates"] = 0
    return module.Config(
        seeds=tuple(range(seeds)),
        batch_size=arguments.batch_size,
        num_updates=(len(first) + 2) * updates,
        log_every=updates,
        eval_every=updates,
        **first,
        **changes,
    )


def measure(name, seeds, arguments):
    """One row of the record: an algorithm that trains `seeds` seeds in parallel."""
    module = importlib.import_module(f"algorithms.{name}")
    cfg = config(module, seeds, arguments)
    updates = cfg.log_every
    if updates % getattr(cfg, "policy_delay", 1):
        fail(f"--updates {updates}: not a multiple of {name}'s policy delay {cfg.policy_delay}")
    chunk, (state, *rest) = last_chunk(module, cfg)
    calls = []
    for _ in range(2):  # with several devices the second call compiles too
        (state, _), call, _ = seconds(chunk, state, *rest)
        calls.append(call)
    products = Loop(matmuls(jax.make_jaxpr(chunk)(state, *rest).jaxpr))
    cpu = jax.default_backend() == "cpu"
    large = jax.ShapeDtypeStruct((2048, 2048) if cpu else (8192, 8192), jnp.float32)
    squares = Loop((Matmul(large, large, (-1, -2)),), 2 if cpu else 10)
    floors = [products, unbatched(products)] if cpu else [products]
    width = max(getattr(cfg, "hidden", None) or (256,))
    layers = chain(arguments.batch_size, width)
    programs = [program(squares), layers, *map(program, floors)]
    for compiled, start in programs:
        seconds(compiled, start)
    times = []
    for _ in range(arguments.repeats):
        began = time.process_time()
        (state, _), spent, dispatch = seconds(chunk, state, *rest)
        cpu_time = time.process_time() - began
        others = [seconds(compiled, start)[1] for compiled, start in programs]
        times.append((spent, cpu_time, dispatch, *others))
    spent, cpu_time, dispatch, peak, layer, *bound = np.min(times, axis=0).tolist()
    count, gflop = updates * seeds, products.flops / 1e9
    hidden = ("floor updates/s", "share of floor", "floor GFLOP/s", "updates/CPU s")
    hidden = () if cpu else hidden
    rate = 2 * CHAIN * arguments.batch_size * width**2 / 1e9 / layer  # GFLOP/s
    row = {
        "algorithm": name,
        "seeds": seeds,
        "updates/s": count / spent,
        "updates/CPU s": count / cpu_time,
        "floor updates/s": count * rate / gflop,
        "share of floor": gflop / rate / spent,
        "bound updates/s": count / min(bound),
        "share of bound": min(bound) / spent,
        "GFLOP/update": gflop / count,
        "GFLOP/s": gflop / spent,
        "floor GFLOP/s": rate,
        "bound GFLOP/s": gflop / min(bound),
        "peak GFLOP/s": squares.flops / 1e9 / peak,
        "compile s": sum(calls) - 2 * spent,
        "dispatch ms": 1e3 * dispatch,
    }
    return {key: x for key, x in row.items() if key not in hidden}


def sizes_of(name, arguments):
    """What a peer is asked for: the widths of our file, batch size, data and timing."""
    cfg = importlib.import_module(f"algorithms.{name}").Config()
    return {
        "algorithm": name,
        "hidden": cfg.hidden,
        "critic_hidden": getattr(cfg, "critic_hidden", cfg.hidden),
        "batch_size": arguments.batch_size,
        "updates": arguments.updates,
        "repeats": arguments.repeats,
        "rows": ROWS,
        "observation": OBSERVATION,
        "action": ACTION,
        "device": jax.default_backend(),
    }


def ask(python, script, question):
    """The finished process of a script beside this one, which was asked in JSON."""
    words = [str(python), str(Path(__file__).with_name(script)), json.dumps(question)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def peer(name, arguments):
    """Updates/s and versions of d3rlpy, see peer_d3rlpy.py."""
    done = ask(arguments.peer, "peer_d3rlpy.py", sizes_of(name, arguments))
    if done.returncode:
        fail(f"--peer {arguments.peer}: {(done.stderr.strip().splitlines() or ['it failed'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def code_bases(arguments):
    """name -> path of --peers.

    Raises:
        SystemExit: code 2 after one line, where a name or a path is unknown.
    """
    found = {}
    for words in arguments.peers:
        name, _, path = words.partition("=")
        if name not in CODE_BASES or not path:
            fail(f"--peers {words}: must be NAME=PATH with a NAME of {', '.join(CODE_BASES)}")
        if not Path(path).exists():
            what = "python of an environment with d3rlpy" if name == "d3rlpy" else "clone of it"
            fail(f"--peers {words}: no such path; name a {what}")
        found[name] = Path(path)
    return found


def beside(row, name, path, arguments):
    """A row of the table of peers: our row of one seed, and what the code base makes of it."""
    question = sizes_of(row["algorithm"], arguments)
    if name == "d3rlpy":
        done = ask(path, "peer_d3rlpy.py", question)
    else:
        own = path / ".venv" / "bin" / "python"
        python = own if own.exists() else sys.executable
        done = ask(python, "peers.py", question | {"peer": name, "folder": str(path)})
    said = {"refused": (done.stderr.strip().splitlines() or ["it failed"])[-1]}
    with contextlib.suppress(json.JSONDecodeError, IndexError):
        said = said if done.returncode else json.loads(done.stdout.splitlines()[-1])
    columns = ("updates/s", "updates/CPU s")
    found = {"algorithm": row["algorithm"], "peer": name}
    found |= {f"{column} here": row.get(column) for column in columns}
    found |= {column: said.get(column) for column in columns}
    for column, times in zip(columns, ("times the peer", "by CPU time"), strict=True):
        mine, theirs = found[f"{column} here"], found[column]
        found[times] = mine / theirs if mine and theirs else None
    versions = [f"{package} {version}" for package, version in said.get("versions", {}).items()]
    commit = subprocess.run(
        ["git", "-C", str(path), "rev-parse", "--short=12", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    versions += [f"commit {commit.stdout.strip()}"] if commit.stdout and path.is_dir() else []
    return found | {"versions": ", ".join(versions), "why not": said.get("refused", "")}


def load():
    """Rows of the loading table; needs h5py and minari."""
    script = runpy.run_path(str(Path(__file__).with_name("data_table.py")))
    with tempfile.TemporaryDirectory() as folder:
        return [*script["speed"](Path(folder))]


def roll_out(env_id, seeds):
    """One row of the rollout table: 10 episodes per seed with an untrained actor."""
    from algorithms import rebrac

    cfg = rebrac.Config(seeds=tuple(range(seeds)), eval_episodes=10)
    env = make_env("--rollouts", env_id)
    observation = np.zeros((1, *env.observation_space.shape), np.float32)
    action = np.zeros((1, *env.action_space.shape), np.float32)
    batch = datasets.Transitions(
        observation, action, *[None] * (len(datasets.Transitions._fields) - 2)
    )
    init_keys, policy_keys = experiment.streams(cfg.seeds, 2)
    state = jax.vmap(lambda key: rebrac.create_state(key, batch, cfg))(init_keys)
    made = mock.MagicMock(
        make_env=partial(make_env, "--rollouts", env_id), horizon=env.spec.max_episode_steps
    )
    act = partial(rebrac.policy, state.actor.apply_fn)
    with evaluation.Rollouts(made, act, policy_keys, cfg) as rollouts:
        found = [rollouts.run(rebrac.policy_params(state), update) for update in range(3)][1:]
    best = min(found, key=lambda x: x["seconds"] / x["length"].sum())
    steps = cfg.eval_episodes * best["length"].sum()
    return {"env": env_id, "seeds": seeds, "steps": int(steps), "steps/s": steps / best["seconds"]}


def command(arguments):
    """The command line that repeats this measurement; defaults are left out."""
    words = ["python benchmarks/throughput.py"]
    for field in dataclasses.fields(arguments):
        value = getattr(arguments, field.name)
        if value != field.default:
            value = " ".join(map(str, value)) if isinstance(value, tuple) else value
            flag = f"--{field.name.replace('_', '-')}"
            words.append(flag if value is True else f"{flag} {value}")
    return " ".join(words)


def conditions(arguments):
    """When, where and with which data the rows of a record were measured."""
    cpuinfo, packages = Path("/proc/cpuinfo"), ("jax", "jaxlib", "flax", "optax", "numpy")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    cores = f"{os.cpu_count()} cores of {model[1] if model else platform.machine()}"
    return {
        "command": command(arguments),
        "date": datetime.date.today().isoformat(),
        "hardware": f"{len(jax.devices())} x {jax.devices()[0].device_kind}; {cores}",
        "versions": ", ".join(f"{name} {metadata.version(name)}" for name in packages),
        "matmul precision": jax.config.jax_default_matmul_precision or "default",
        "data": f"{ROWS:,} synthetic rows, {OBSERVATION} observations, {ACTION} actions",
        "batch size": arguments.batch_size,
        "chunks": f"{arguments.updates} updates, best of {arguments.repeats}",
    }


def markdown(facts, tables):
    lines = ["# Throughput", "", "The columns are explained in `benchmarks/throughput.py`.", ""]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    for name, rows in tables.items():
        lines += ["", f"## {name.capitalize()}"] if name != "rows" else []
        lines += ["", "| " + " | ".join(rows[0]) + " |", "| --- " * len(rows[0]) + "|"]
        for row in rows:
            cells = (f"{x:,.3f}" if isinstance(x, float) else str(x or "") for x in row.values())
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments):
    """Measure, print the table, write the record, and return its rows."""
    known = {x.stem for x in Path(__file__).resolve().parents[1].glob("algorithms/*.py")}
    unknown = sorted(set(arguments.algorithms) - known)
    if unknown or not arguments.algorithms:
        fail(f"--algorithms {' '.join(unknown)}: choose from {', '.join(sorted(known))}")
    for flag in ("seeds", "batch_size", "updates", "repeats", "steps_per_refresh"):
        if np.min(getattr(arguments, flag) or 0) < 1:
            fail(f"--{flag.replace('_', '-')} {getattr(arguments, flag)}: must be at least 1")
    output = Path(arguments.output or "")
    if output.suffix not in ("", ".md", ".json"):
        fail(f"--output {output}: must end in .md or .json, or have no suffix for both")
    facts = conditions(arguments)
    if arguments.peer is not None and not Path(arguments.peer).exists():
        fail(
            f"--peer {arguments.peer}: no such file; name the python of an environment with d3rlpy"
        )
    others = code_bases(arguments)
    if arguments.online:
        facts["data"] = f"{ROWS:,} synthetic rows of the sizes of the env"
    rows, of_peers = [], []
    for case in product(
        arguments.algorithms, arguments.online, arguments.seeds, arguments.steps_per_refresh
    ):
        rows.append(measure_online(*case, arguments))
        write(facts, tables_of(rows, of_peers), arguments.output)  # what is measured is kept
    for name, seeds in product(arguments.algorithms, arguments.seeds) if not rows else ():
        row = measure(name, seeds, arguments)
        for other, path in others.items():
            if name in CODE_BASES[other] and seeds == 1:
                of_peers.append(beside({"algorithm": name} | row, other, path, arguments))
        if arguments.peer is not None:
            row |= {"d3rlpy updates/s": None, "times d3rlpy": None}
            if name in PEERS and seeds == 1:
                found = peer(name, arguments)
                row["d3rlpy updates/s"] = found["updates/s"]
                row["times d3rlpy"] = row["updates/s"] / found["updates/s"]
                facts["peer"] = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
        rows.append(row)
        write(facts, tables_of(rows, of_peers), arguments.output)  # what is measured is kept
    tables = tables_of(rows, of_peers)
    if arguments.loading:
        tables["loading"] = load()
    if arguments.rollouts:
        pairs = product(arguments.rollouts, arguments.seeds)
        tables["rollouts"] = [roll_out(env_id, seeds) for env_id, seeds in pairs]
    print(markdown(facts, tables))
    write(facts, tables, arguments.output)
    return rows


def tables_of(rows, of_peers):
    return {"rows": rows} | ({"peers": of_peers} if of_peers else {})


def write(facts, tables, output):
    """Write the record; without a suffix as .md and .json, without `output` not at all."""
    texts = {".md": markdown(facts, tables), ".json": json.dumps(facts | tables, indent=2)}
    for suffix in texts if output else ():
        path = Path(output)
        if path.suffix in ("", suffix):
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write(path.with_suffix(suffix), texts[suffix] + "\n")


if __name__ == "__main__":
    command_line.outlive_the_reader()
    jax.config.update("jax_enable_compilation_cache", False)
    main(tyro.cli(Arguments, description=__doc__.splitlines()[0]))

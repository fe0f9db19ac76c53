# SPDX-License-Identifier: Apache-2.0
"""Runs small enough for tests: data files, argument lists, in this process or as a user's command.

As a script it is a command that dies at a chosen point: `python tests/helpers_runs.py POINT
algorithms/rebrac.py ...`, see `die_at`. `calls` gives it several commands.
"""

import contextlib
import csv
import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import compiler_flags
import gymnasium
import h5py
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SLOW = pytest.mark.skipif("ATOLL_SLOW" not in os.environ, reason="minutes: ATOLL_SLOW=1 runs it")
ALGORITHMS = ["rebrac"]  # every test of runs goes through these files
CONTINUOUS = ["rebrac", "td3_bc", "iql", "awr", "awac", "cql"]  # these refuse integer actions
CONTINUOUS += ["dt", "bcq", "atac", "odice", "ivr", "xql", "idql", "fql", "qc"]
CONTINUOUS += ["sac_n", "edac", "lb_sac"]
CONTINUOUS += ["optidice", "algaedice"]
CONTINUOUS += ["sac"]
CONTINUOUS += ["rlpd", "spot", "cal_ql", "wsrl"]
CONTINUOUS += ["brac", "fisher_brc"]
CONTINUOUS += ["diffusion_dice", "diffusion_ql", "gfp"]
CONTINUOUS += ["mopo", "combo"]
CONTINUOUS += ["morel"]
CONTINUOUS += ["mobile"]
CONTINUOUS += ["trajectory_transformer"]
CONTINUOUS += ["online_dt"]
CONTINUOUS += ["qdt"]
DISCRETE = ["cql_discrete"]  # these refuse others
EITHER = ["bc"]  # takes both
MODEL = ["--model-updates", "4", "--model-hidden", "8", "--model-decays", "1e-4", "1e-4"]
MODEL += ["--num-models", "3", "--num-elites", "2", "--holdout-every", "2"]
MODEL += ["--rollout-every", "2", "--rollout-batch", "4", "--rollout-length", "2"]
HANGS = 900  # seconds after which a test gives up; no machine is so slow
SHORT = ["--num-updates", "24", "--log-every", "4", "--eval-every", "8", "--eval-episodes", "2"]
SHORT += ["--batch-size", "4", "--wandb", "disabled", "--save-seconds", "0"]
NARROW = ["--hidden", "8"]
TINY = [*SHORT, *NARROW]
ALSO_TINY = {  # by algorithm
    "atac": ["--warm-start", "10"],
    "awr": ["--actor-updates", "2", "--critic-updates", "1"],
    "bcq": ["--vae-hidden", "8", "--num-samples", "2", "--num-eval-samples", "2"],
    "brac": ["--critic-hidden", "8", "--clone-updates", "4", "--warm-start", "2"],
    "cal_ql": ["--critic-hidden", "8", "--num-samples", "2", "--warm-up-steps", "4"],
    "cql": ["--critic-hidden", "8", "--num-samples", "2"],
    "fisher_brc": ["--behaviour-hidden", "8", "--clone-updates", "4"],
    "idql": ["--actor-hidden", "8", "--num-samples", "2"],
    "odice": ["--value-hidden", "8"],
    "diffusion_dice": ["--actor-hidden", "8", "--guidance-hidden", "8", "--clone-updates", "4"],
    "mopo": MODEL,
    "morel": [*MODEL, "--num-critics", "2"],
    "combo": [*MODEL, "--num-samples", "2"],
    "mobile": [*MODEL, "--num-samples", "2"],
    "diffusion_ql": ["--generator-steps", "2", "--num-samples", "2"],
    "optidice": ["--warm-start", "2"],
    "fql": ["--flow-steps", "2"],
    "gfp": ["--flow-steps", "2"],
    "qc": ["--flow-steps", "2", "--num-samples", "2", "--horizon", "3"],
    "spot": ["--vae-hidden", "8", "--clone-updates", "4"],
    "rlpd": ["--num-critics", "3", "--updates-per-step", "2", "--online-updates", "0"],
    "wsrl": ["--critic-hidden", "8", "--num-samples", "2", "--num-critics", "3"],
}
ALSO_TINY["wsrl"] += ["--warm-up-steps", "4", "--updates-per-step", "2", "--online-updates", "0"]
ALSO_TINY["diffusion_dice"] += ["--clone-batch-size", "4", "--noisy-copies", "2"]
ALSO_TINY["diffusion_dice"] += ["--generator-steps", "3", "--num-choosers", "2"]
SEQUENCE = {  # by algorithm, in place of hidden layers
    "dt": ["--context", "3", "--embedding", "8", "--num-layers", "1"],
    "online_dt": ["--context", "3", "--embedding", "8", "--num-layers", "1", "--num-heads", "1"],
}
SEQUENCE["trajectory_transformer"] = [*SEQUENCE["dt"], "--num-heads", "2", "--num-bins", "5"]
SEQUENCE["trajectory_transformer"] += ["--plan-context", "2", "--plan-horizon", "2"]
SEQUENCE["trajectory_transformer"] += ["--beam-width", "2"]
SEQUENCE["online_dt"] += ["--eval-context", "2", "--steps-per-refresh", "2"]
SEQUENCE["online_dt"] += ["--updates-per-refresh", "2"]
SEQUENCE["qdt"] = [*SEQUENCE["dt"], *NARROW, "--num-samples", "2", "--value-samples", "2"]
SEQUENCE["qdt"] += ["--q-updates", "4", "--value-batch-size", "4"]


def slow_but(names, fast):
    """Parameters for parametrize: those not in `fast` run with ATOLL_SLOW=1 only."""
    return [pytest.param(x, marks=() if x in fast else SLOW) for x in names]


def nets(name):
    """The flags that make an algorithm's networks small."""
    return SEQUENCE.get(name, [*NARROW, *ALSO_TINY.get(name, [])])


def tiny(name):
    """The flags of a run of any algorithm that takes seconds."""
    return [*SHORT, *nets(name)]


class Endless(gymnasium.Env):
    """Never ends by itself; observations and actions as in Pendulum-v1, where the box is wider."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.normal(size=3).astype(np.float32)
        return self.position.copy(), {}

    def step(self, action):
        self.position += np.float32(0.1) * action
        return self.position.copy(), float(self.position[0]), False, False, {}


if "Endless-v0" not in gymnasium.registry:
    gymnasium.register("Endless-v0", Endless)


def module(name):
    return importlib.import_module(f"algorithms.{name}")


def write_hdf5(path, rows=60, attributes=None, **columns):
    """A file in D4RL's layout with three numbers per observation; columns of None are left out."""
    random = np.random.default_rng(0)
    timeouts = np.zeros(rows)
    timeouts[9::10] = 1
    arrays = {
        "observations": random.normal(size=(rows, 3)),
        "actions": random.uniform(-2, 2, (rows, 1)),
        "rewards": random.normal(size=rows),
        "terminals": np.zeros(rows),
        "timeouts": timeouts,
    }
    facts = {"env_id": "Pendulum-v1", "max_episode_steps": 10}
    facts |= {"ref_min_score": -100.0, "ref_max_score": 0.0}
    with h5py.File(path, "w") as file:
        for name, array in (arrays | columns).items():
            if array is not None:
                file[name] = array
        for name, value in (facts if attributes is None else attributes).items():
            file.attrs[name] = value
    return str(path)


def write_cartpole(path, rows=60):
    """The same with the four numbers and two actions of CartPole-v1."""
    random = np.random.default_rng(1)
    facts = {"env_id": "CartPole-v1", "max_episode_steps": 10}
    columns = {"observations": random.normal(size=(rows, 4)), "actions": np.arange(rows) % 2}
    return write_hdf5(path, rows, facts, **columns)


def start(name, argv):
    """`python algorithms/<name>.py <argv>` in this process.

    Runs of one Config share their compiled program, see `over_seeds`.
    """
    from common import experiment
    from common.experiment import devices

    algorithm = module(name)
    cfg, options = experiment.parse(algorithm.Config, argv)
    if experiment.over_seeds is not devices.over_seeds:  # a test has put something in its place
        return algorithm.train(cfg, options)
    with mock.patch.object(experiment, "over_seeds", over_seeds):
        return algorithm.train(cfg, options)


@functools.cache
def program(train_chunk, cfg, shapes):
    """Compiled training of all seeds, and the structure of the State that it takes.

    `shapes` are those of the State's arrays: networks also depend on the data.
    """
    from common.experiment import devices

    return devices.over_seeds(functools.partial(train_chunk, cfg=cfg)), {}


def over_seeds(chunk, update=None):
    """`experiment.over_seeds` for data on one device, traced and compiled once per process.

    The functions in a State (networks, optimisers) are made anew by every run, and JAX would trace
    them anew. So every run's arrays go into the functions of the first run of an equal Config.
    """
    import jax

    from common.experiment import devices, growth

    cfg = chunk.keywords["cfg"]
    same = dataclasses.replace(cfg, dataset="", seeds=(), eval_every=1, eval_episodes=1)
    two_phases = getattr(cfg, "online_updates", 0) > 0
    if not two_phases and not growth.length_dependence(Path(inspect.getfile(chunk.func)), cfg):
        same = dataclasses.replace(same, num_updates=same.log_every)
    of_this_run = devices.over_seeds(chunk, update=update)

    def train(state, keys, start, data):
        if isinstance(data, tuple) and isinstance(data[0], np.ndarray):  # --data host
            return of_this_run(state, keys, start, data)
        arrays, structure = jax.tree.flatten(state)
        # Fresh counts are of Python's numbers, restored ones are not: one program serves both.
        arrays = [jax.lax.convert_element_type(x, x.dtype) for x in arrays]
        shared, first = program(chunk.func, same, tuple(x.shape for x in arrays))
        state = first.setdefault("structure", structure).unflatten(arrays)
        state, metrics = shared(state, keys, start, data)
        return structure.unflatten(jax.tree.leaves(state)), metrics

    return train


@contextlib.contextmanager
def fused_as_users():
    """Programs are compiled as for users: bit for bit the same for any number of seeds or devices.

    The other tests compile in half the time, see compiler_flags.py.
    """
    import jax
    import optax  # noqa: F401 - before jax.jit is another one, which its decorators would take

    program.cache_clear()  # programs that other tests have compiled
    fused = functools.partial(jax.jit, compiler_options=compiler_flags.AS_USERS)
    with mock.patch.object(jax, "jit", fused):
        yield
    program.cache_clear()


def command(name, argv, die=None, code=None):
    """The words of that command; with `die` it kills itself there, with `code` that runs first."""
    script = str(ROOT / "algorithms" / f"{name}.py")
    if code is not None:
        code = f"import runpy, sys; sys.argv = sys.argv[1:]; {code}"
        code = f"{code}\nrunpy.run_path(sys.argv[0], run_name='__main__')"
        return [sys.executable, "-c", code, script, *argv]
    before = [] if die is None else [str(Path(__file__)), die]
    return [sys.executable, *before, script, *argv]


def environment(cache, **variables):
    """Variables of a subprocess: one CPU device, no debug modes, its own compilation cache."""
    keep = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    keep |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    return keep | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"} | variables


def call(words, cwd, environment):
    """Run to the end. -> (exit code, stdout, stderr)"""
    done = subprocess.run(
        words,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def calls(name, starts, cwd, environment):
    """Several commands of an algorithm, one after the other, from one process.

    It imports the libraries, which takes as long as such a run, and each command is a fork of it.

    Args:
        starts: [(argv, point of its death or None, variables beside `environment`), ...]

    Returns:
        [(exit code, stdout, stderr), ...]
    """
    words = [sys.executable, __file__, json.dumps(starts), *command(name, [])[1:]]
    code, out, error = call(words, cwd, environment)
    assert code == 0, error
    return [tuple(end) for end in json.loads(out)]


def only_run(folder):
    """The one run folder below a folder of runs."""
    (file,) = Path(folder).rglob("config.yaml")
    return file.parent


def read_csv(file):
    with Path(file).open() as text:
        return list(csv.DictReader(text))


def seed_lines(file, seed):
    """Header and the rows of one seed, as written."""
    header, *rows = Path(file).read_text().splitlines()
    return [header, *(row for row in rows if row.split(",")[1] == str(seed))]


def tree(folder):
    """Everything below a folder: path -> digest. Equal before and after = nothing was written."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(Path(folder).rglob("*"))
    }


def wait_for(what):
    end = time.monotonic() + HANGS
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


# --- Deaths -------------------------------------------------------------------------------------
def die_at(point):
    """Arrange for SIGKILL at a point: start, "before save 8", "in save 8", "after save 8", ..."""
    from common import experiment
    from common.experiment.records import Records

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    when, _, rest = point.partition(" ")
    method, _, border = (rest or "restore").partition(" ")
    original = getattr(experiment.Run, method)

    def replaced(run, step, *args):
        if border and step != int(border):
            return original(run, step, *args)
        if when == "in" and method == "save":
            os.rename = os.replace = Path.rename = Path.replace = lambda *_: die()
        if when == "in" and method == "log":  # half of a line is in the file

            def append(records, name, header, *rows):
                with (records.folder / name).open("a") as file:
                    file.write(",".join(map(str, rows[0]))[:5])
                die()

            Records.append = append
        if when == "before" or method == "restore":
            die()
        result = original(run, step, *args)
        die()
        return result

    setattr(experiment.Run, method, replaced)


def fork(argv, die, variables):
    """A run in a fork of this process. -> (exit code, stdout, stderr)"""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(error.fileno(), 2)
            os.environ.update(variables)
            sys.argv[1:] = argv
            if die is not None:
                die_at(die)
            runpy.run_path(sys.argv[0], run_name="__main__")
            sys.exit()  # as a command ends: after what is registered for that
        _, status = os.waitpid(child, 0)
        said = []
        for file in (out, error):
            file.seek(0)
            said.append(file.read())
        return os.waitstatus_to_exitcode(status), *said


if __name__ == "__main__":
    point, sys.argv = sys.argv[1], sys.argv[2:]
    if point.startswith("["):  # see `calls`; JAX looks for its devices in the forks only
        module(Path(sys.argv[0]).stem)
        importlib.import_module("orbax.checkpoint")
        print(json.dumps([fork(*start) for start in json.loads(point)]))
    else:
        die_at(point)
        runpy.run_path(sys.argv[0], run_name="__main__")

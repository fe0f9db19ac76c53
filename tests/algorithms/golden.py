# SPDX-License-Identifier: Apache-2.0
"""Losses and parameter norms after 10 and 100 updates, to notice any change of the numbers.

    python tests/algorithms/golden.py          write golden.json anew and print what changed
    python tests/algorithms/golden.py rebrac   only that algorithm's part

A change belongs in CHANGELOG.md, with the results it touches.

Processors round differently, and training amplifies that. golden_tolerances.json has how much, for
each algorithm; golden_spread.py measures it. How values are compared is in `differences`.
"""

import contextlib
import functools
import importlib
import json
import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path

# As a script: the project first, since tests/ has folders of the same names as the project's.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import compiler_flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = compiler_flags.beside(os.environ.get("XLA_FLAGS", ""))

import helpers_runs
import numpy as np
import own_files
import probes

from common import experiment
from common import machine as this_machine

FILE = Path(__file__).with_name("golden.json")
TOLERANCES = Path(__file__).with_name("golden_tolerances.json")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
SETTINGS = {"hidden": (32,), "batch_size": 64}
AFTER = (10, 100)  # updates
# Tolerances of a continuous value, in units of max(1, |value|): rewards are of size one, so a mean
# near zero has the errors of its terms.
SAME_MACHINE = {10: 1e-6, 100: 1e-5}  # where the values were recorded: nearly the same bits
MARGIN = 10  # elsewhere: so many times the measured spread, but at least
# this, since any network may meet what odice and cql met: a ReLU that rounding flips after 50
# updates, which changes values by 1e-4 after 100.
LEAST = {10: 2e-6, 100: 1e-4}
RELATIVE = {10: 1e-5, 100: 1e-3}  # and no more of a value, unless the measured spread asks for it
OTHER_JAX = 1e-3  # after 10 updates; later values are not compared
ROWS_OFF = 5 / (10 * SETTINGS["batch_size"])  # shares: so many rows of a chunk's 10 batches


def versions():
    return {name: metadata.version(name) for name in PACKAGES}


def machine():
    """What the last bits of a value depend on beside versions: processor, flags of XLA, cores."""
    processor = Path("/proc/cpuinfo")
    text = processor.read_text() if processor.exists() else ""
    facts = [re.search(rf"^{key}\s*: (.*)$", text, re.M) for key in ("model name", "cpu family")]
    facts += [re.search(r"^model\s*: (.*)$", text, re.M)]
    known = " ".join(fact[1] for fact in facts if fact) or platform.machine()
    flags = [x for x in os.environ["XLA_FLAGS"].split() if x not in compiler_flags.FLAGS]
    return {"processor": known, "cores": this_machine.cores(), "xla_flags": " ".join(flags)}


def tolerances():
    """{algorithm: {updates: measured spread}}"""
    return json.loads(TOLERANCES.read_text())["spread"]


def shares():
    """Names of the metrics that count rows, as the mean of a comparison."""
    return json.loads(TOLERANCES.read_text())["shares"]


def tolerance(name, updates, recorded):
    """That of the continuous values of an algorithm, given its entry of golden.json.

    An entry without "machine" is from before that was recorded: no machine is known to be its own,
    so its values are compared as those of another one.
    """
    if recorded["versions"]["jax"] != versions()["jax"]:
        return OTHER_JAX
    if recorded.get("machine") == machine():
        return SAME_MACHINE[updates]
    return max(LEAST[updates], MARGIN * tolerances()[name][str(updates)])


def differences(old, new, continuous, relative=None, spread=0.0):
    """[what differs between two {metric or norm: value}], beyond a tolerance of `continuous`.

    Where `relative` is given, a value may differ by that share of itself at most, or by ten times
    the `spread` that was measured, if that is more.
    """
    found = [f"{key} is in one of them only" for key in sorted({*old} ^ {*new})]
    for key in sorted({*old} & {*new}):
        size = max(1.0, abs(old[key]))
        allowed = ROWS_OFF if key in shares() else continuous * size
        if relative is not None and key not in shares():
            allowed = min(allowed, max(relative * abs(old[key]), MARGIN * spread * size))
        if not abs(new[key] - old[key]) <= allowed:
            found.append(
                f"{key} was {old[key]:.9g}, is {new[key]:.9g}, may differ by {allowed:.1e}"
            )
    return found


def measure(name, seeds=(0,), chunk=10, lane=0, updates=100, **overrides):
    """{updates: {metric or norm: value}} of one seed, on 512 random rows; arrays of all states."""
    found, arrays = measure_all(name, seeds, chunk, updates, **overrides)
    return found[lane], arrays


def measure_all(
    name,
    seeds,
    chunk,
    updates,
    change=lambda state: state,
    note=lambda metrics: None,
    as_users=True,
    **overrides,
):
    """The values of each seed, in a list.

    `change` may alter the state [S, ...] before training; `note` gets the metrics of each chunk.
    Bits are the same beside other seeds with `as_users`, which takes twice as long to compile.
    """
    module = importlib.import_module(f"algorithms.{name}")
    cfg = probes.config(module, **SETTINGS, **overrides, log_every=chunk)
    data = probes.rows_for(name, 512, 5, 3, seed=0)
    starts = {seed: probes.start(module, data, cfg, seed) for seed in {*seeds}}
    state, keys = probes.stacked([starts[seed][:2] for seed in seeds])
    state, rows = change(state), starts[seeds[0]][2]
    train = experiment.over_seeds(functools.partial(module.train_chunk, cfg=cfg))
    found = [{} for _ in seeds]
    for step in range(0, updates, chunk):
        fused = helpers_runs.fused_as_users() if as_users else contextlib.nullcontext()
        with fused:  # the first call compiles
            state, metrics = train(state, keys, step, rows)
        note(metrics)
        if step + chunk in AFTER:
            for lane, values in enumerate(found):
                values[str(step + chunk)] = of_one_seed(state, metrics, lane)
    return found, probes.leaves(state)


def of_one_seed(state, metrics, lane):
    """Its metrics, and the norm of every network's parameters."""
    values = {metric: float(value[lane]) for metric, value in metrics.items()}
    for net in state._fields:
        for part in ("params", "target_params"):
            if tree := getattr(getattr(state, net), part, None):
                squares = [np.square(x[lane], dtype=np.float64).sum() for x in probes.leaves(tree)]
                values[f"norm of {net}.{part}"] = float(np.sqrt(sum(squares)))
    return values


def main(names):
    known = {path.stem for path in (FILE.parents[2] / "algorithms").glob("*.py")}
    if unknown := {*names} - known:
        print(f"error: no algorithms/{min(unknown)}.py", file=sys.stderr)
        return 2
    golden = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name in names or own_files.NAMES:
        (new, _), old = measure(name), golden.get(name, {})
        was = ", ".join(f"{k} {v}" for k, v in old.get("versions", {}).items()) or "nothing"
        print(f"{name}: was written by {was}")
        for step, values in new.items():
            for key, value in values.items():
                before = old.get("after", {}).get(step, {}).get(key)
                if before != value:
                    print(f"  after {step}, {key}: {before} -> {value}")
        golden[name] = {"versions": versions(), "machine": machine(), "after": new}
    golden = {name: golden[name] for name in sorted(known) if name in golden}
    FILE.write_text(json.dumps(golden, indent=1) + "\n")
    print(f"wrote {FILE.name} with " + ", ".join(f"{k} {v}" for k, v in versions().items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

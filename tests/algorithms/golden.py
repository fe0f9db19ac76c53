# SPDX-License-Identifier: Apache-2.0
"""Losses and parameter norms after 10 and 100 updates, to notice any change of the numbers.

    python tests/algorithms/golden.py          write golden.json anew and print what changed
    python tests/algorithms/golden.py rebrac   only that algorithm's part

A change belongs in CHANGELOG.md, with the results it touches.
"""

import functools
import importlib
import json
import os
import sys
from importlib import metadata
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# As the tests do, see conftest.py.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ["XLA_FLAGS"] += " --xla_cpu_enable_concurrency_optimized_scheduler=false"

import numpy as np
import probes

from common import experiment

FILE = Path(__file__).with_name("golden.json")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
SETTINGS = {"hidden": (32,), "batch_size": 64}
AFTER = {10: 1e-5, 100: 1e-3}  # updates -> relative tolerance


def versions():
    return {name: metadata.version(name) for name in PACKAGES}


def measure(name, seeds=(0,), chunk=10, lane=0, updates=100):
    """{updates: {metric or norm: value}} of one seed, on 512 random rows; arrays of all states."""
    module = importlib.import_module(f"algorithms.{name}")
    cfg = probes.config(module, **SETTINGS, log_every=chunk)
    data = probes.rows_for(name, 512, 5, 3, seed=0)
    starts = [probes.start(module, data, cfg, seed) for seed in seeds]
    (state, keys), rows = probes.stacked([x[:2] for x in starts]), starts[0][2]
    train, found = experiment.over_seeds(functools.partial(module.train_chunk, cfg=cfg)), {}
    for step in range(0, updates, chunk):
        state, metrics = train(state, keys, step, rows)
        if step + chunk in AFTER:
            values = {metric: float(value[lane]) for metric, value in metrics.items()}
            for net in state._fields:
                for part in ("params", "target_params"):
                    if tree := getattr(getattr(state, net), part, None):
                        squares = [
                            np.square(x[lane], dtype=np.float64).sum() for x in probes.leaves(tree)
                        ]
                        values[f"norm of {net}.{part}"] = float(np.sqrt(sum(squares)))
            found[str(step + chunk)] = values
    return found, probes.leaves(state)


def main(names):
    known = sorted(path.stem for path in (FILE.parents[2] / "algorithms").glob("*.py"))
    if unknown := {*names} - {*known}:
        print(f"error: no algorithms/{min(unknown)}.py", file=sys.stderr)
        return 2
    golden = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name in names or known:
        (new, _), old = measure(name), golden.get(name, {})
        was = ", ".join(f"{k} {v}" for k, v in old.get("versions", {}).items()) or "nothing"
        print(f"{name}: was written by {was}")
        for step, values in new.items():
            for key, value in values.items():
                before = old.get("after", {}).get(step, {}).get(key)
                if before != value:
                    print(f"  after {step}, {key}: {before} -> {value}")
        golden[name] = {"versions": versions(), "after": new}
    golden = {name: golden[name] for name in known if name in golden}
    FILE.write_text(json.dumps(golden, indent=1) + "\n")
    print(f"wrote {FILE.name} with " + ", ".join(f"{k} {v}" for k, v in versions().items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

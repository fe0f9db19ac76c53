# SPDX-License-Identifier: Apache-2.0
"""Losses and parameter norms after 10 and 100 updates, to notice any change of the numbers.

    python tests/golden.py          write tests/golden.json anew and print what changed
    python tests/golden.py rebrac   only that algorithm's part

A change belongs in CHANGELOG.md, with the results it touches.
"""

import importlib
import json
import os
import sys
from importlib import metadata
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # as the tests do

import jax
import numpy as np
import probes

FILE = Path(__file__).with_name("golden.json")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
SETTINGS = {"hidden": (32,), "batch_size": 64, "log_every": 10}
AFTER = {10: 1e-5, 100: 1e-3}  # updates -> relative tolerance


def versions():
    return {name: metadata.version(name) for name in PACKAGES}


def measure(name):
    """{updates: {metric or norm: value}} of the small algorithm on 512 random rows."""
    module = importlib.import_module(f"algorithms.{name}")
    cfg = probes.config(module, **SETTINGS)
    data = probes.rows_for(name, 512, 5, 3, seed=0)
    state, key, data = probes.start(module, data, cfg)
    chunk = jax.jit(module.train_chunk, static_argnums=4, donate_argnums=0)
    found = {}
    for step in range(0, max(AFTER), cfg.log_every):
        state, metrics = chunk(state, key, step, data, cfg)
        if step + cfg.log_every in AFTER:
            values = {name: float(value) for name, value in metrics.items()}
            for net in state._fields:
                for part in ("params", "target_params"):
                    if tree := getattr(getattr(state, net), part, None):
                        squares = [
                            np.square(x, dtype=np.float64).sum() for x in probes.leaves(tree)
                        ]
                        values[f"norm of {net}.{part}"] = float(np.sqrt(sum(squares)))
            found[str(step + cfg.log_every)] = values
    return found


def main(names):
    known = sorted(path.stem for path in (FILE.parents[1] / "algorithms").glob("*.py"))
    if unknown := {*names} - {*known}:
        print(f"error: no algorithms/{min(unknown)}.py", file=sys.stderr)
        return 2
    golden = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name in names or known:
        new, old = measure(name), golden.get(name, {})
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

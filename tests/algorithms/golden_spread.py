# SPDX-License-Identifier: Apache-2.0
"""How much the golden values of an algorithm differ over processors, see golden.py.

    python tests/algorithms/golden_spread.py           measure all algorithms
    python tests/algorithms/golden_spread.py rebrac    only that one

An older processor is this one with XLA held to its instructions. Beside those, parameters whose
last bits are changed at the start stand for the processors that nobody tried. The largest
difference to golden.json, in units of max(1, |value|), goes into golden_tolerances.json, unless a
larger one is there from another machine. Delete an algorithm's line to forget it.
"""

import json
import os
import subprocess
import sys

import golden
import jax
import numpy as np
import own_files

INSTRUCTIONS = ("", "--xla_cpu_max_isa=AVX2", "--xla_cpu_max_isa=SSE4_2")
DRAWS = 16  # of last bits
MEASURE = """
import json, os, sys
if sys.argv[1] == "one core":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import golden
print(json.dumps({name: golden.measure(name)[0] for name in sys.argv[2:]}))
"""


def on_other_processors(names):
    """{algorithm: values} with older instructions, on one core and on all: a list of six."""
    found = []
    for instructions in INSTRUCTIONS:
        for cores in ("all cores", "one core"):
            flags = f"{os.environ['XLA_FLAGS']} {instructions}"
            folders = os.pathsep.join(sys.path)
            environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": folders}
            words = [sys.executable, "-c", MEASURE, cores, *names]
            done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, check=True)
            found.append(json.loads(done.stdout))
    return found


def with_other_last_bits(name):
    """Values where the first parameters of every network are rounded otherwise: a list of DRAWS."""
    random = np.random.default_rng(0)

    def rounded_otherwise(x):
        if x.dtype != np.float32:
            return x
        step = random.choice([-1, 0, 1], x.shape) * np.finfo(np.float32).eps
        return x * np.float32(1 + step)

    def change(state):
        return jax.tree.map(rounded_otherwise, state)

    return golden.measure_all(name, (0,) * DRAWS, 10, 100, change)[0]


def spread(recorded, found):
    """The largest difference of a continuous value, in units of max(1, |value|)."""
    differences = [
        abs(values[key] - old) / max(1.0, abs(old))
        for values in found
        for key, old in recorded.items()
        if key not in golden.shares()
    ]
    return float(f"{max(differences):.1e}")


def one_line_each(record):
    """JSON with a line for every algorithm."""
    text = json.dumps(record | {"spread": {}}, indent=1)
    rows = [f"  {json.dumps(name)}: {json.dumps(x)}" for name, x in record["spread"].items()]
    return text.replace('"spread": {}', '"spread": {\n' + ",\n".join(rows) + "\n }") + "\n"


def main(names):
    names = names or own_files.NAMES
    recorded = json.loads(golden.FILE.read_text())
    if unknown := sorted({*names} - {*recorded}):
        print(f"error: {unknown[0]} has no values in {golden.FILE.name}", file=sys.stderr)
        return 2
    processors = on_other_processors(names)
    record = json.loads(golden.TOLERANCES.read_text())
    for name in names:
        found = [values[name] for values in processors] + with_other_last_bits(name)
        for updates in map(str, golden.AFTER):
            here = spread(recorded[name]["after"][updates], [x[updates] for x in found])
            before = record["spread"].setdefault(name, {}).get(updates, 0.0)
            record["spread"][name][updates] = max(before, here)
        print(f"{name}: {record['spread'][name]}", flush=True)
    machine = golden.machine()
    here = f"{machine['cores']} cores of {machine['processor']}"
    record["machines"] = sorted({*record["machines"], here})
    record["spread"] = dict(sorted(record["spread"].items()))
    golden.TOLERANCES.write_text(one_line_each(record))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

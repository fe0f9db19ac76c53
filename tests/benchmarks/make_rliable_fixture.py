# SPDX-License-Identifier: Apache-2.0
"""Writes rliable.json: what rliable says of made-up scores.

rliable 1.2.0 does not work beside today's pandas, so it runs in an environment of its own:

    python -m venv rliable && rliable/bin/pip install rliable==1.2.0 "pandas<3"
    rliable/bin/python tests/benchmarks/make_rliable_fixture.py
"""

import json
from importlib import metadata
from pathlib import Path

import numpy as np
from rliable import library, metrics

DRAWS = 50_000
LEVELS = np.array([0.0, 25.0, 50.0, 75.0, 100.0])


def made_scores():
    """Two methods, 10 and 6 seeds on 5 data sets of different difficulty, rounded: with ties."""
    generator = np.random.default_rng(7)
    centre, width = np.array([10, 40, 70, 90, 105]), np.array([3, 15, 20, 6, 2])
    x = generator.normal(centre, width, (10, 5)).round()
    y = generator.normal(centre - [1, 8, -5, 4, 1], width, (6, 5)).round()
    y[0, 3] = 12.0  # a seed that failed
    return x, y


def main():
    x, y = made_scores()
    found = {"versions": {name: metadata.version(name) for name in ("rliable", "arch", "numpy")}}
    found |= {"x": x.tolist(), "y": y.tolist(), "draws": DRAWS, "levels": LEVELS.tolist()}
    state = np.random.RandomState(0)
    np.random.seed(0)  # noqa: NPY002 -- two matrices at a time are drawn from NumPy's global state
    point, interval = library.get_interval_estimates(
        {"x": x, "y": y},
        lambda scores: np.array([metrics.aggregate_iqm(scores), metrics.aggregate_mean(scores)]),
        reps=DRAWS,
        random_state=state,
    )
    found["iqm, mean"] = {k: [point[k].tolist(), interval[k].tolist()] for k in point}
    point, interval = library.get_interval_estimates(
        {"x,y": (x, y)}, metrics.probability_of_improvement, reps=10_000, random_state=state
    )
    found["improvement"] = [float(point["x,y"]), interval["x,y"].ravel().tolist()]
    curve, band = library.create_performance_profile({"x": x, "y": y}, LEVELS, reps=10_000)
    found["profile"] = {k: [curve[k].tolist(), band[k].tolist()] for k in curve}
    path = Path(__file__).with_name("rliable.json")
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

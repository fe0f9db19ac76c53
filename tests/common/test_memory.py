# SPDX-License-Identifier: Apache-2.0
"""The sizes that docs/scale.md names: of a row of data, of a seed's State."""

import importlib
import re
from functools import partial
from pathlib import Path

import jax
import probes
import pytest

TEXT = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
SIZES = re.findall(r"^\| (\w+)\.py \| ([\d.]+) \|$", TEXT, re.M)


def megabytes(tree):
    arrays = [
        x for x in jax.tree.leaves(tree) if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    ]
    return sum(x.size * x.dtype.itemsize for x in arrays) / 1e6


@pytest.mark.parametrize(("name", "said"), SIZES)
def test_a_seed_takes_what_the_page_says(name, said):
    module = importlib.import_module(f"algorithms.{name}")
    batch = jax.tree.map(lambda x: x[:1], probes.random_transitions(2, 17, 6))
    create = partial(module.create_state, batch=batch, cfg=module.Config())
    assert f"{megabytes(jax.eval_shape(create, jax.random.key(0))):.1f}" == said


def test_a_million_rows_and_sixteen_seeds_take_what_the_page_says():
    row = megabytes(probes.random_transitions(1, 17, 6)) * 1e6
    assert row == 4 * (2 * 17 + 2 * 6 + 3) and "4 (2 O + 2 A + 3) bytes" in TEXT
    assert f"a million rows take {row:.0f} MB" in TEXT
    total = row / 1e3 + 16 * float(dict(SIZES)["fql"]) / 1e3
    assert f"a million rows and 16 seeds of FQL take {total:.1f} GB" in TEXT

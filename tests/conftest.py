# SPDX-License-Identifier: Apache-2.0
"""Every test runs on the CPU with JAX's debug modes on, so that silent mistakes become errors."""

import gc
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Half the time to compile; what trains for thousands of updates asks for more, see probes.py.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
# The tests jit `create_state`: XLA's concurrent scheduler would run its QR decompositions at the
# same time, and on two cores they can wait for each other for ever (jax 0.10.2).
os.environ["XLA_FLAGS"] += " --xla_cpu_enable_concurrency_optimized_scheduler=false"

import jax
import probes
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")  # [B] against [B, 1]
jax.config.update("jax_debug_nans", True)
jax.config.update("jax_debug_key_reuse", True)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory, worker_id):
    """Programs that several tests compile are compiled once, by any of pytest-xdist's workers."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder if worker_id == "master" else folder.parent) / "xla"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)  # where runs and their processes look
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


@pytest.fixture(autouse=True)
def few_programs():
    """Compiled programs are forgotten before Linux's limit of 65,530 memory maps per process."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def transitions():
    """The function that builds random Transitions, see probes.py."""
    return probes.random_transitions


@pytest.fixture
def atoll_data():
    """Folder of recorded data sets, kept outside of the repository."""
    folder = Path(os.environ.get("ATOLL_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no recorded data in {folder} (set ATOLL_DATA)")
    return folder

# SPDX-License-Identifier: Apache-2.0
"""Every test runs on the CPU with JAX's debug modes on, so that silent mistakes become errors."""

import gc
import os
import signal
import threading
from pathlib import Path

import compiler_flags

# The files are UTF-8, whatever the locale says: pytest-xdist's workers and all commands see this.
os.environ["PYTHONUTF8"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = compiler_flags.beside(os.environ.get("XLA_FLAGS", ""))

import flax_parameters
import helpers_runs
import jax
import probes
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")  # [B] against [B, 1]
jax.config.update("jax_debug_nans", True)
jax.config.update("jax_debug_key_reuse", True)
jax.config.update("jax_traceback_in_locations_limit", 0)  # programs without lines of the source

ROOT = Path(__file__).resolve().parents[1]
flax_parameters.compare_shapes_alone()

# The garbage collector leaves out what the imports made, and looks less often at the rest: JAX's
# tracing allocates much, and this takes a fifth off the time of a run of a test.
gc.collect()
gc.freeze()
gc.set_threshold(50_000, 20, 50)

# A shell's background job ignores Ctrl-C, and its children would inherit that.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory, worker_id):
    """Programs that several tests compile are compiled once, by any of pytest-xdist's workers."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder if worker_id == "master" else folder.parent) / "xla"
    folder.mkdir(exist_ok=True)
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
def fused_as_users():
    """Programs as users compile them, see helpers_runs.py."""
    with helpers_runs.fused_as_users():
        yield


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

# SPDX-License-Identifier: Apache-2.0
"""How a run starts: its config, the other processes, JAX's settings."""

import os
import shutil
import signal
from pathlib import Path

import jax

from common import fail
from common.experiment import config, meshes, processes, signals


def parse(config_class, argv=None):
    """Config and Options of this start, see config.py; JAX is set up for them.

    Raises:
        SystemExit: code 2 after one line that names the file and key or the flag.
    """
    if argv is None:  # the process is this run: until training begins, Ctrl-C just ends it
        signal.signal(signal.SIGINT, signals.interrupted)
    cfg, options = config.parse(config_class, argv)
    options = processes.join(options)
    _set_up(cfg, options)
    return cfg, options


def _set_up(cfg, options):
    """JAX's persistent compilation cache for every program; checks of devices and processes."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", Path.home() / ".cache" / "atoll" / "xla")
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    platforms = jax.config.jax_platforms
    if platforms and "cpu" not in platforms.split(","):  # the policy acts on the CPU
        jax.config.update("jax_platforms", f"{platforms},cpu")
    # The paths of the data set may differ between processes: `place` compares its rows.
    processes.require_same(config.resolved(cfg, options) | {"dataset": None})
    devices, seeds = len(jax.devices()), len(cfg.seeds)
    gpus = int(os.environ.get("SLURM_GPUS_ON_NODE", 0)) * int(os.environ.get("SLURM_NNODES", 1))
    if jax.process_count() > 1:
        idle = f"; WARNING: {gpus - devices} GPUs have no process" if gpus > devices else ""
        print(f"{jax.process_count()} processes with {devices} devices in all{idle}")
    if options.devices != 1:
        meshes.check(cfg, options, devices)
    elif seeds % devices and (seeds > 1 or jax.process_count() > 1):
        fail(
            f"--seeds: {seeds} seeds cannot be divided equally among {devices} devices; give a "
            f"multiple of {devices} or show JAX fewer devices (CUDA_VISIBLE_DEVICES)"
        )
    if not platforms and jax.default_backend() == "cpu" and shutil.which("nvidia-smi"):
        print("WARNING: there is an NVIDIA GPU but JAX runs on the CPU: pip install 'jax[cuda12]'")

# SPDX-License-Identifier: Apache-2.0
"""How a run starts: its config, the other processes, JAX's settings."""

import os
import signal
import sys

import jax

from common import command_line, fail, one_line, threads
from common.experiment import config, meshes, platforms, processes, signals, unreadable


def parse(config_class, argv=None):
    """Config and Options of this start, see config.py; JAX is set up for them.

    Raises:
        SystemExit: code 2 after one line that names the file and key or the flag.
    """
    if argv is None:  # the process is this run: until training begins, Ctrl-C just ends it
        threads.handle(signal.SIGINT, signals.interrupted)
        command_line.use_plain_letters()
        command_line.outlive_the_reader()
        explain_memory()
    cfg, options = config.parse(config_class, argv)
    options = processes.join(options)
    _set_up(cfg, options)
    return cfg, options


def explain_memory():
    """From now on, memory that is not enough ends this program with one line and exit code 2."""
    before = sys.excepthook

    def hook(kind, error, trace):
        if not unreadable.is_out_of_memory(error):
            before(kind, error, trace)
            return
        fail(
            f"there is not enough memory ({one_line(error)}); smaller networks and batches and "
            "fewer --seeds take less, and --data host keeps the data out of a GPU's memory"
        )

    sys.excepthook = hook


def _set_up(cfg, options):
    """JAX's devices and its cache of compiled programs; checks of devices and processes."""
    platforms.cache_programs()
    platforms.prepare()
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

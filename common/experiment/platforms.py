# SPDX-License-Identifier: Apache-2.0
"""JAX's settings for a run: the platform that was asked for, the cache of compiled programs."""

import os
import shutil

import jax

from common import fail, folders, one_line, threads

FALLBACK = "JAX_PLATFORMS=cpu trains on the CPU"


def prepare(say=print):
    """Let JAX find its devices: those that JAX_PLATFORMS names, and the CPU for the policy.

    `say` is called with what is to be known about them.

    Raises:
        SystemExit: code 2 after one line, where the platform that was asked for is not there. JAX
            by itself would train on the CPU without a word once the CPU is named as well.
    """
    with threads.ALONE:  # until the platform that was asked for is there or refused
        _prepare(say)


def _prepare(say):
    asked = jax.config.jax_platforms
    add_cpu()
    try:
        devices = jax.devices()
        jax.local_devices(backend="cpu")
    except (RuntimeError, AssertionError) as error:
        _fail(asked, error)
    if asked and devices[0].platform == "cpu" and (first := asked.split(",")[0]) != "cpu":
        try:
            jax.devices(first)
        except RuntimeError as error:
            if "cpu" not in asked.split(","):
                _fail(asked, error)
            say(f"JAX_PLATFORMS={asked}: there is no {first} here, so the CPU trains")
    if not asked and devices[0].platform == "cpu" and shutil.which("nvidia-smi"):
        say("WARNING: there is an NVIDIA GPU but JAX runs on the CPU: pip install 'jax[cuda12]'")


def add_cpu():
    """Let JAX use the CPU beside the platforms that were asked for: the policy acts there.

    JAX listens to this only until it has looked for its devices.
    """
    asked = jax.config.jax_platforms
    if asked and "cpu" not in asked.split(","):
        jax.config.update("jax_platforms", f"{asked},cpu")


def _fail(asked, error):
    jax.config.update("jax_platforms", asked)  # so that the next try in this process fails as well
    setting = f"JAX_PLATFORMS={asked}" if asked else "JAX"
    cuda = "install jax[cuda12] or take the CPU: " if asked and "cuda" in asked else ""
    fail(f"{setting}: JAX finds no such device here ({one_line(error)}); {cuda}{FALLBACK}")


def cache_programs():
    """Keep every compiled program for the next start, unless a variable says otherwise."""
    folder = jax.config.jax_compilation_cache_dir
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:  # empty: no cache
        folder = os.environ["JAX_COMPILATION_CACHE_DIR"] or None
    elif folder is None:
        folder = folders.compiled_programs()
    jax.config.update("jax_compilation_cache_dir", None if folder is None else str(folder))
    for name, value in (("MIN_COMPILE_TIME_SECS", 0.0), ("MIN_ENTRY_SIZE_BYTES", -1)):
        if f"JAX_PERSISTENT_CACHE_{name}" not in os.environ:
            jax.config.update(f"jax_persistent_cache_{name.lower()}", value)

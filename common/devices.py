# SPDX-License-Identifier: Apache-2.0
"""Keys of the seeds, the seeds on the devices, and JAX's persistent compilation cache."""

import os
import shutil
from functools import partial
from pathlib import Path

import jax
import numpy as np

from common import config, digests, fail, host_data, meshes, processes


def streams(seeds, number):
    """`number` independent key arrays, [S] each: a seed's keys do not depend on the other seeds."""
    split = jax.jit(jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), number)))
    return tuple(split(np.asarray(seeds, np.uint32)).T)


def place(data, options):
    """The arrays of a data set in host memory, on the device, or on each of `--devices`."""
    if jax.process_count() > 1:
        same({"data with": digests.of_data(data)})
    if options.data == "host":
        return jax.tree.map(np.asarray, data)
    if options.devices == 1:
        return jax.device_put(data)
    return meshes.on_each(data, jax.devices()[: options.devices])


def over_seeds(chunk, update=None):
    """Compile `chunk(state, key, start, data)` of one seed for all seeds; the state is donated.

    Seeds are lanes of a `vmap` on an accelerator and run one after the other on a CPU, whose
    batched matrix products are slow. Of several devices each takes an equal share of the seeds;
    one seed stays on one device, unless `place` put the data on several: these share its batches.
    `update` tells what a chunk reads, for data that `place` left in host memory.
    """

    def lanes(state, keys, start, data):
        data = data.columns() if isinstance(data, host_data.Rows) else data
        if jax.default_backend() == "cpu":
            return jax.lax.map(lambda lane: chunk(*lane, start, data), (state, keys))
        return jax.vmap(chunk, (0, 0, None, None))(state, keys, start, data)

    made = []

    def train(state, keys, start, data):
        if not made:  # what is asked for shows in the first call
            on_host, devices = isinstance(data[0], np.ndarray), jax.devices()
            if not on_host and (mesh := meshes.of_batches(data)):
                made.append(meshes.share_batches(lanes, mesh))
            elif len(devices) == 1 or len(keys) == 1:
                made.append(jax.jit(lanes, donate_argnums=0))
            else:
                made.append(meshes.share_seeds(lanes, devices))
            if on_host and update is not None:
                cfg = chunk.keywords["cfg"]
                reads = partial(update, cfg=cfg)
                feed = host_data.Feed(reads, state, keys, data, cfg.log_every, cfg.num_updates)
                made[0] = host_data.fed(made[0], feed)
        return made[0](state, keys, start, data)

    return train


def same(facts):
    """Exit code 2 in all processes after one line, where they do not have the same."""
    first, *others = processes.ask(facts)
    for index, other in enumerate(others, 1):
        for name in sorted({*first, *other}):
            if (value := other.get(name)) != (wanted := first.get(name)):
                fail(f"--distributed: process {index} has {name} {value}, process 0 has {wanted}")


def setup(cfg, options):
    """Every program goes to the persistent cache. Says it where a GPU lies idle."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", Path.home() / ".cache" / "atoll" / "xla")
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    platforms = jax.config.jax_platforms
    if platforms and "cpu" not in platforms.split(","):  # the policy acts on the CPU
        jax.config.update("jax_platforms", f"{platforms},cpu")
    same(config.resolved(cfg, options) | {"dataset": None})  # its rows are compared by `place`
    devices, seeds = len(jax.devices()), len(cfg.seeds)
    gpus = int(os.environ.get("SLURM_GPUS_ON_NODE", 0)) * int(os.environ.get("SLURM_NNODES", 1))
    if jax.process_count() > 1:
        idle = f"; WARNING: {gpus - devices} GPUs have no process" if gpus > devices else ""
        print(f"{jax.process_count()} processes with {devices} devices in all{idle}")
    if options.devices != 1:
        meshes.check(cfg, options, devices)
    elif seeds % devices and (seeds > 1 or jax.process_count() > 1):
        several = f"{seeds} of them cannot be shared out equally to {devices} devices; take"
        fail(f"--seeds: {several} a multiple of {devices} or show JAX fewer (CUDA_VISIBLE_DEVICES)")
    if not platforms and jax.default_backend() == "cpu" and shutil.which("nvidia-smi"):
        print("WARNING: there is an NVIDIA GPU but JAX runs on the CPU: pip install 'jax[cuda12]'")

# SPDX-License-Identifier: Apache-2.0
"""Keys of the seeds, the seeds on the devices, and JAX's persistent compilation cache."""

import os
import shutil
from functools import partial
from pathlib import Path

import jax
import numpy as np

from common import fail, host_data

# XLA's CPU scheduler runs independent operations at the same time. The QR decompositions of
# orthogonal initialisers then waited for each other for ever on two cores (jax 0.10.2). Read by XLA
# when its first device is made; a value of the user's stays.
SCHEDULER = "xla_cpu_enable_concurrency_optimized_scheduler"
if SCHEDULER not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{SCHEDULER}=false".strip()


def streams(seeds, number):
    """`number` independent key arrays, [S] each: a seed's keys do not depend on the other seeds."""
    split = jax.jit(jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), number)))
    return tuple(split(np.asarray(seeds, np.uint32)).T)


def place(data, options):
    """The arrays of a data set where `--data` wants them: on the device, or in host memory."""
    return jax.tree.map(np.asarray, data) if options.data == "host" else jax.device_put(data)


def over_seeds(chunk, update=None):
    """Compile `chunk(state, key, start, data)` of one seed for all seeds; the state is donated.

    Seeds are lanes of a `vmap` on an accelerator and run one after the other on a CPU, whose
    batched matrix products are slow. Of several devices each takes an equal share of the seeds.
    With `update`, which tells what a chunk reads, the data may stay in host memory (NumPy arrays).
    """
    train, feeds = _compiled(chunk), []

    def fed(state, keys, start, data):
        if update is None or not isinstance(data[0], np.ndarray):
            return train(state, keys, start, data)
        cfg = chunk.keywords["cfg"]
        if not feeds:
            of_seed = partial(update, cfg=cfg)
            numbers = cfg.log_every, cfg.num_updates
            feeds.append(host_data.Feed(of_seed, state, keys, data, *numbers))
        after = train(state, keys, start, feeds[0](start))
        feeds[0].prepare(start + cfg.log_every)  # while the device trains
        return after

    return fed


def _compiled(chunk):
    def lanes(state, keys, start, data):
        data = data.columns() if isinstance(data, host_data.Rows) else data
        if jax.default_backend() == "cpu":
            return jax.lax.map(lambda lane: chunk(*lane, start, data), (state, keys))
        return jax.vmap(chunk, (0, 0, None, None))(state, keys, start, data)

    devices = jax.devices()
    if len(devices) == 1:
        return jax.jit(lanes, donate_argnums=0)
    mesh = jax.sharding.Mesh(np.array(devices), ("seed",))
    seed, whole = jax.sharding.PartitionSpec("seed"), jax.sharding.PartitionSpec()
    split = {"in_specs": (seed, seed, whole, whole), "out_specs": seed, "check_vma": False}
    one = jax.jit(lanes, donate_argnums=0)
    shared = jax.jit(jax.shard_map(lanes, mesh=mesh, **split), donate_argnums=0)
    copies = {}

    def spread(state, keys, start, data):
        if len(keys) == 1:  # one seed stays on one device
            return one(state, keys, start, data)
        if copies.get("of") is not data:  # every device gets the data once, not at every chunk
            copies.update({"of": data, "data": jax.device_put(data, _place(mesh, whole))})
        state, keys = jax.device_put((state, keys), _place(mesh, seed))
        return shared(state, keys, start, copies["data"])

    return spread


def _place(mesh, spec):
    return jax.sharding.NamedSharding(mesh, spec)


def setup(seeds):
    """Every program goes to the persistent cache. Says it where a GPU lies idle."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", Path.home() / ".cache" / "atoll" / "xla")
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    platforms = jax.config.jax_platforms
    if platforms and "cpu" not in platforms.split(","):  # the policy acts on the CPU
        jax.config.update("jax_platforms", f"{platforms},cpu")
    devices = len(jax.devices())
    if seeds > 1 and seeds % devices:
        fail(
            f"--seeds: {seeds} of them cannot be shared out equally to {devices} devices; take a "
            f"multiple of {devices}, or show JAX fewer devices (CUDA_VISIBLE_DEVICES)"
        )
    if not platforms and jax.default_backend() == "cpu" and shutil.which("nvidia-smi"):
        print("WARNING: there is an NVIDIA GPU but JAX runs on the CPU: pip install 'jax[cuda12]'")

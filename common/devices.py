# SPDX-License-Identifier: Apache-2.0
"""Keys of the seeds, the seeds on the devices, and JAX's persistent compilation cache."""

import os
import shutil
from functools import partial
from pathlib import Path

import jax
import numpy as np

from common import fail, host_data, processes

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
    """The arrays of a data set in host memory, on the device, or on each of `--devices`."""
    if options.data == "host":
        return jax.tree.map(np.asarray, data)
    if options.devices == 1:
        return jax.device_put(data)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[: options.devices]), ("batch",))
    return jax.device_put(data, _place(mesh, jax.sharding.PartitionSpec()))


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
            if not on_host and (mesh := _batch_mesh(data)):
                made.append(_share_batches(lanes, mesh))
            elif len(devices) == 1 or len(keys) == 1:
                made.append(jax.jit(lanes, donate_argnums=0))
            else:
                made.append(_share_seeds(lanes, devices))
            if on_host and update is not None:
                cfg = chunk.keywords["cfg"]
                reads, numbers = partial(update, cfg=cfg), (cfg.log_every, cfg.num_updates)
                feed = host_data.Feed(reads, state, keys, data, *numbers)
                made[0] = _fed(made[0], feed)
        return made[0](state, keys, start, data)

    return train


def _share_seeds(lanes, devices):
    mesh = jax.sharding.Mesh(np.array(devices), ("seed",))
    seed, whole = jax.sharding.PartitionSpec("seed"), jax.sharding.PartitionSpec()
    split = {"in_specs": (seed, seed, whole, whole), "out_specs": seed, "check_vma": False}
    shared = jax.jit(jax.shard_map(lanes, mesh=mesh, **split), donate_argnums=0)
    copies = {}

    def train(state, keys, start, data):
        if copies.get("of") is not data:  # every device gets the data once, not at every chunk
            copies.update({"of": data, "data": processes.spread(data, _place(mesh, whole))})
        state, keys = processes.spread((state, keys), _place(mesh, seed))
        return processes.gather(shared(state, keys, start, copies["data"]))

    return train


def _share_batches(lanes, mesh):
    """Every device holds the data and the state and computes its rows of each batch."""

    def read(array, index):
        rows = jax.sharding.PartitionSpec("batch")
        return jax.lax.with_sharding_constraint(array[index], _place(mesh, rows))

    def shared(state, keys, start, data):
        columns = jax.tree.map(lambda x: host_data.Column(len(x), partial(read, x)), data)
        return lanes(state, keys, start, columns)

    whole = _place(mesh, jax.sharding.PartitionSpec())
    compiled = jax.jit(shared, donate_argnums=0, out_shardings=whole)
    return lambda state, keys, *rest: compiled(*jax.device_put((state, keys), whole), *rest)


def _batch_mesh(data):
    """The devices that share a batch, None where there is but one."""
    mesh = getattr(getattr(data[0], "sharding", None), "mesh", None)
    return mesh if mesh is not None and mesh.axis_names == ("batch",) else None


def _fed(train, feed):
    """The same with the rows of a chunk in place of the data."""

    def one(state, keys, start, _):
        after = train(state, keys, start, feed(start))
        feed.prepare(start + feed.steps)  # while the device trains
        return after

    return one


def _place(mesh, spec):
    return jax.sharding.NamedSharding(mesh, spec)


def setup(seeds, batch_size, options):
    """Every program goes to the persistent cache. Says it where a GPU lies idle."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", Path.home() / ".cache" / "atoll" / "xla")
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    platforms = jax.config.jax_platforms
    if platforms and "cpu" not in platforms.split(","):  # the policy acts on the CPU
        jax.config.update("jax_platforms", f"{platforms},cpu")
    devices = len(jax.devices())
    if options.devices != 1:
        _check_shared(options, devices, seeds, batch_size)
    elif seeds % devices and (seeds > 1 or jax.process_count() > 1):
        fail(
            f"--seeds: {seeds} of them cannot be shared out equally to {devices} devices; take a "
            f"multiple of {devices}, or show JAX fewer devices (CUDA_VISIBLE_DEVICES)"
        )
    if not platforms and jax.default_backend() == "cpu" and shutil.which("nvidia-smi"):
        print("WARNING: there is an NVIDIA GPU but JAX runs on the CPU: pip install 'jax[cuda12]'")


def _check_shared(options, devices, seeds, batch_size):
    asked = f"--devices {options.devices}"
    if options.devices < 1:
        fail(f"{asked}: at least 1 is wanted")
    if options.devices > devices:
        fail(
            f"{asked}: JAX sees {devices} (on a CPU --xla_force_host_platform_device_count in "
            "XLA_FLAGS makes more)"
        )
    if seeds > 1:
        fail(f"{asked}: they share the batches of one seed; several seeds share devices without it")
    if batch_size % options.devices:
        fail(f"{asked}: --batch-size {batch_size} cannot be shared out equally to them")
    if options.data == "host":
        fail(f"{asked}: not with --data host")

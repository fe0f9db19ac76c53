# SPDX-License-Identifier: Apache-2.0
"""Several devices: they share the seeds, or the batches of one seed (`--devices`)."""

from functools import partial

import jax
import numpy as np

from common import fail
from common.experiment import host_data, processes


def on_each(data, devices):
    """Put the data on each of the devices, which then share batches."""
    mesh = jax.sharding.Mesh(np.array(devices), ("batch",))
    return jax.device_put(data, _place(mesh, jax.sharding.PartitionSpec()))


def share_seeds(all_seeds, devices):
    """`all_seeds(state, keys, start, data)` with an equal share of the seeds on every device."""
    mesh = jax.sharding.Mesh(np.array(devices), ("seed",))
    seed, whole = jax.sharding.PartitionSpec("seed"), jax.sharding.PartitionSpec()
    split = {"in_specs": (seed, seed, whole, whole), "out_specs": seed, "check_vma": False}
    shared = jax.jit(jax.shard_map(all_seeds, mesh=mesh, **split), donate_argnums=0)
    copies = {}

    def train(state, keys, start, data):
        if copies.get("of") is not data:  # every device gets the data once, not at every chunk
            copies.update({"of": data, "data": spread(data, _place(mesh, whole))})
        state, keys = spread((state, keys), _place(mesh, seed))
        return processes.gather(shared(state, keys, start, copies["data"]))

    return train


def spread(tree, sharding):
    """Divide arrays, which every process has whole, among the devices of all processes."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def one(x):
        if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(one(jax.random.key_data(x)))
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree)


def share_batches(all_seeds, mesh):
    """Every device holds the data and the state, and computes its share of each batch's rows."""

    def read(array, index):
        rows = jax.sharding.PartitionSpec("batch")
        return jax.lax.with_sharding_constraint(array[index], _place(mesh, rows))

    def shared(state, keys, start, data):
        columns = jax.tree.map(lambda x: host_data.Column(len(x), partial(read, x)), data)
        return all_seeds(state, keys, start, columns)

    whole = _place(mesh, jax.sharding.PartitionSpec())
    compiled = jax.jit(shared, donate_argnums=0, out_shardings=whole)
    return lambda state, keys, *rest: compiled(*jax.device_put((state, keys), whole), *rest)


def of_batches(data):
    """The mesh of devices that share a batch, None where the data are on one device."""
    mesh = getattr(data[0].sharding, "mesh", None)
    return mesh if mesh is not None and mesh.axis_names == ("batch",) else None


def check(cfg, options, devices):
    """Exit with code 2 after one line where so many devices cannot share the batches."""
    number, batch = options.devices, f"--batch-size {cfg.batch_size}"
    more = "on a CPU --xla_force_host_platform_device_count in XLA_FLAGS makes more"
    one = "they share the batches of one seed; several seeds share devices without it"
    for wrong, why in (
        (number < 1, "must be at least 1"),
        (options.distributed is not None, "not with --distributed, which divides the seeds"),
        (number > devices, f"JAX sees {devices} ({more})"),
        (len(cfg.seeds) > 1, one),
        (cfg.batch_size % max(number, 1), f"{batch} cannot be divided equally among them"),
        (options.data == "host", "not with --data host"),
    ):
        if wrong:
            fail(f"--devices {number}: {why}")


def _place(mesh, spec):
    return jax.sharding.NamedSharding(mesh, spec)

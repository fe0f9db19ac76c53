# SPDX-License-Identifier: Apache-2.0
"""The seeds on the devices: their random keys, the data they read, their training."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from common.experiment import buffers, digests, host_data, meshes, platforms, processes, ranges


def streams(seeds, number):
    """`number` independent arrays of random keys, [S] each.

    A seed's keys do not depend on the other seeds.
    """
    ranges.check_seeds(seeds)
    split = jax.jit(jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), number)))
    return tuple(split(np.asarray(seeds, np.uint32)).T)


def place(data, options):
    """Put the arrays of a data set on the device, or on each of `--devices`.

    With `--data host` they stay in host memory.
    """
    platforms.prepare(say=_nothing)  # `parse` said it, if it was called
    if jax.process_count() > 1:
        processes.require_same({"data with": digests.of_data(data)})
    if options.data == "host":
        return jax.tree.map(np.asarray, data)
    if options.devices == 1:
        return jax.device_put(data)
    return meshes.on_each(data, jax.devices()[: options.devices])


def _nothing(line):
    """For what is not to be said."""


def over_seeds(chunk, update=None):
    """Compile the training of one seed into one program that trains all seeds.

    Args:
        chunk: `train_chunk` of an algorithm with its `cfg` filled in by `functools.partial`:
            (state, key, start, data) -> (state, metrics), the updates `start`, `start` + 1, ...
            of one seed.
        update: the algorithm's `update(state, step, key, data, cfg)`, which `chunk` calls for every
            step. Only `--data host` needs it: the data set then stays in host memory, and before a
            chunk runs, `update` is traced to find out which rows its steps will read. Those rows
            alone are copied to the device. Without `update`, the whole data set is copied.

    Returns:
        (state, keys, start, data) -> (state, metrics), where state, keys and metrics have an axis
        [S] of seeds in front. In the online phase `data` is a Buffer, see buffers.py. The memory of
        the state that is passed in is reused (donated), so the caller must not use it again.

    On an accelerator the seeds are computed together (`vmap`). On a CPU they are computed one after
    the other, because its batched matrix products are slow. Of several devices each takes an equal
    share of the seeds. One seed stays on one device, unless `place` has put the data on several:
    those share its batches.
    """

    def all_seeds(state, keys, start, data):
        if isinstance(data, buffers.Buffer):
            return beside_envs(state, keys, start, data)
        data = data.columns() if isinstance(data, host_data.Rows) else data
        if jax.default_backend() == "cpu":
            return jax.lax.map(lambda seed: chunk(*seed, start, data), (state, keys))
        return jax.vmap(chunk, (0, 0, None, None))(state, keys, start, data)

    def beside_envs(state, keys, start, buffer):
        def one_seed(arguments):
            index, state, key = arguments
            return chunk(state, key, start, buffer.of_seed(index))

        seeds = jnp.arange(len(keys)), state, keys
        if jax.default_backend() == "cpu":
            return jax.lax.map(one_seed, seeds)
        return jax.vmap(one_seed)(seeds)

    compiled = None

    def train(state, keys, start, data):
        nonlocal compiled
        if compiled is None:  # only the first call shows where the data are
            compiled = _compile(all_seeds, keys, data)
            if _on_host(data) and update is not None:
                cfg = chunk.keywords["cfg"]
                functions = partial(update, cfg=cfg), chunk
                counts = cfg.log_every, cfg.num_updates
                feed = host_data.Feed(*functions, state, keys, data, *counts)
                compiled = host_data.fed(compiled, feed)
        return compiled(state, keys, start, data)

    return train


def _compile(all_seeds, keys, data):
    """The program for the devices that are there."""
    devices, is_buffer = jax.devices(), isinstance(data, buffers.Buffer)
    if not _on_host(data) and not is_buffer and (mesh := meshes.of_batches(data)):
        return meshes.share_batches(all_seeds, mesh)
    if len(devices) == 1 or len(keys) == 1 or is_buffer:
        return jax.jit(all_seeds, donate_argnums=0)
    return meshes.share_seeds(all_seeds, devices)


def _on_host(data):
    return not isinstance(data, buffers.Buffer) and isinstance(data[0], np.ndarray)

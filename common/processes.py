# SPDX-License-Identifier: Apache-2.0
"""One run over several processes (`--distributed`), joined by `jax.distributed`.

Every process runs the same program on the same data. A chunk of updates runs on a mesh of all
processes' devices, each with its share of the seeds; after it every process has the whole state
again. Process 0 evaluates and writes; the others write into a temporary folder of their own.
"""

import atexit
import dataclasses
import os
import re
import shutil
import sys
import tempfile

import jax
import numpy as np

from common import fail


def join(options):
    """Join the others, before JAX looks for devices. Returns this process's own options.

    `--distributed` is `auto` where a cluster tells (SLURM, Open MPI, TPU pods), or
    `HOST:PORT/COUNT/INDEX` with the address of process 0.
    """
    if options.distributed is None:
        return options
    words = {}
    if options.distributed != "auto":
        match = re.fullmatch(r"(\S+:\d+)/(\d+)/(\d+)", options.distributed)
        if match is None or not int(match[3]) < int(match[2]):
            fail(
                f"--distributed {options.distributed}: auto is wanted, or HOST:PORT/COUNT/INDEX "
                "such as node1:1234/2/0 on the first of two processes, INDEX below COUNT"
            )
        count, index = int(match[2]), int(match[3])
        words = {"coordinator_address": match[1], "num_processes": count, "process_id": index}
    try:
        jax.distributed.initialize(**words)
    except (RuntimeError, ValueError) as error:
        fail(f"--distributed {options.distributed}: {str(error).splitlines()[0]}")
    if jax.process_index() == 0:
        print(f"{jax.process_count()} processes with {len(jax.devices())} devices in all")
        return options
    folder = tempfile.mkdtemp(prefix="atoll-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115, process 0 speaks for all
    return dataclasses.replace(options, runs_dir=folder, resume=False, wandb="disabled")


def agree(number):
    """The largest of all processes' numbers; all have to ask at the same border."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def from_first(tree):
    """Process 0's arrays, in every process."""
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(tree)


def spread(tree, sharding):
    """Arrays that every process has whole, on all processes' devices."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def one(x):
        if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(one(jax.random.key_data(x)))
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree)


def gather(tree):
    """The whole arrays [S, ...] of a tree that lies on all processes' devices, in every process."""
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)

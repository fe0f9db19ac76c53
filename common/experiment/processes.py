# SPDX-License-Identifier: Apache-2.0
"""One run over several processes (`--distributed`), joined by `jax.distributed`.

Every process runs the same program on the same data. The seeds are divided among the devices of all
processes, and after a chunk every process has the whole state again. Process 0 evaluates and
writes. Before they exchange arrays the processes exchange messages: one that ends says so there,
and the others end as well.

The messages go through the key-value store of `jax.distributed`, which JAX has not made public:
this is the only file that imports `jax._src`, and a test tells when a public name appears.
"""

import atexit
import dataclasses
import itertools
import json
import os
import re
import sys
import tempfile

import jax
from jax._src import distributed
from jax.experimental import multihost_utils

from common import fail, one_line

EXCHANGES = itertools.count()  # number of each exchange of messages


def join(options):
    """Join the other processes, before JAX looks for devices. Returns this process's own options.

    `--distributed` is `auto`, where SLURM, Open MPI or a TPU pod knows the processes, or it is
    HOST:PORT/COUNT/INDEX: an address of process 0, the number of processes, this one's index.
    """
    if options.distributed is None:
        return options
    asked, address = f"--distributed {options.distributed}", ()
    if options.distributed != "auto":
        match = re.fullmatch(r"(\S+:(\d{1,5}))/(\d{1,6})/(\d{1,6})", options.distributed, re.A)
        if not match or not int(match[4]) < int(match[3]) or not 0 < int(match[2]) < 65536:
            fail(f"{asked}: must be auto or HOST:PORT/COUNT/INDEX (a:80/2/0), INDEX below COUNT")
        address = (match[1], int(match[3]), int(match[4]))
    print(f"{asked}: waiting for the others; JAX aborts after five minutes", flush=True)
    try:
        jax.distributed.initialize(*address)
    except (RuntimeError, ValueError) as error:
        fail(f"{asked}: {one_line(error)}{'' if address else '; give HOST:PORT/COUNT/INDEX'}")
    atexit.register(_leave)
    if distributed.global_state.process_id == 0:  # jax.process_index() would look for devices
        return options
    folder = tempfile.TemporaryDirectory(prefix="atoll-", ignore_cleanup_errors=True)
    atexit.register(folder.cleanup)
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - process 0 prints for all
    return dataclasses.replace(options, runs_dir=folder.name, resume=False, wandb="disabled")


def joined():
    """Whether this process is one of a run over several, or of one."""
    return distributed.global_state.client is not None


def ask(mine):
    """The `mine` of every process, as JSON keeps it. All processes must call this equally often."""
    if jax.process_count() == 1:
        return [mine]
    said = _exchange(json.dumps(mine))
    if "left" in said:
        fail(f"process {said.index('left')} of --distributed ended before this one; it said why")
    return [json.loads(text) for text in said]


def agree(number):
    """The largest of all processes' numbers; all must call this at the same chunk boundary."""
    return max(ask(number))


def require_same(facts):
    """End all processes with code 2 after one line, where a fact is not the same in all of them."""
    first, *others = ask(facts)
    for index, other in enumerate(others, 1):
        for name in sorted({*first, *other}):
            if (value := other.get(name)) != (wanted := first.get(name)):
                fail(f"--distributed: process {index} has {name} {value}, process 0 has {wanted}")


def from_first(tree):
    """Process 0's arrays, in every process."""
    ask("first")
    return tree if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(tree)


def gather(tree):
    """The whole arrays [S, ...] of a tree that lies on all processes' devices, in every process."""
    if jax.process_count() > 1:
        jax.block_until_ready(tree)  # Gloo's first exchange waits only 30 s for the others
        ask("gather")
        tree = multihost_utils.process_allgather(tree, tiled=True)
    return tree


def _exchange(text):
    """The texts of all processes, in order. Ctrl-C is handled once a second while it waits."""
    us, said, place = distributed.global_state, [], f"atoll/{next(EXCHANGES)}"
    us.client.key_value_set(f"{place}/{us.process_id}", text)
    while len(said) < us.num_processes:
        try:
            said.append(us.client.blocking_key_value_get(f"{place}/{len(said)}", 1000))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
    return said


def _leave():
    """Tell the others that this process ends, whatever ended it, and wait until all have said so.

    JAX by itself would let the others wait for five minutes.
    """
    while {*_exchange("left")} != {"left"}:
        pass

# SPDX-License-Identifier: Apache-2.0
"""One run over several processes (`--distributed`), joined by `jax.distributed`.

Every process runs the same program on the same data; a mesh of all their devices shares out the
seeds, and each has the whole state again after a chunk. Process 0 evaluates and writes. They meet
before each exchange: one that ends says so there, and the others end as well.
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
from jax._src import distributed  # not public, but orbax uses it as well
from jax.experimental import multihost_utils

from common import fail, one_line

MEETINGS = itertools.count()


def join(options):
    """Join the others, before JAX looks for devices. Returns this process's own options.

    `--distributed`: `auto` (SLURM, Open MPI, a TPU pod tell) or process 0's HOST:PORT/COUNT/INDEX.
    """
    if options.distributed is None:
        return options
    asked, words = f"--distributed {options.distributed}", ()
    if options.distributed != "auto":
        match = re.fullmatch(r"(\S+:(\d{1,5}))/(\d{1,6})/(\d{1,6})", options.distributed, re.A)
        if not match or not int(match[4]) < int(match[3]) or not 0 < int(match[2]) < 65536:
            fail(f"{asked}: auto is wanted or HOST:PORT/COUNT/INDEX (a:80/2/0), INDEX below COUNT")
        words = (match[1], int(match[3]), int(match[4]))
    print(f"{asked}: waiting for the others; JAX aborts after five minutes", flush=True)
    try:
        jax.distributed.initialize(*words)
    except (RuntimeError, ValueError) as error:
        fail(f"{asked}: {one_line(error)}{'' if words else '; give HOST:PORT/COUNT/INDEX'}")
    atexit.register(_leave)
    if distributed.global_state.process_id == 0:  # asking JAX would make it look for devices
        return options
    folder = tempfile.TemporaryDirectory(prefix="atoll-", ignore_cleanup_errors=True)
    atexit.register(folder.cleanup)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115, process 0 speaks for all
    return dataclasses.replace(options, runs_dir=folder.name, resume=False, wandb="disabled")


def ask(mine):
    """Every process's `mine` (as JSON keeps it), in order; all have to ask the same questions."""
    if jax.process_count() == 1:
        return [mine]
    said = _meet(json.dumps(mine))
    if "left" in said:
        fail(f"process {said.index('left')} of --distributed ended before this one; it said why")
    return [json.loads(text) for text in said]


def agree(number):
    """The largest of all processes' numbers; all have to ask at the same border."""
    return max(ask(number))


def from_first(tree):
    """Process 0's arrays, in every process."""
    ask("first")
    return tree if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(tree)


def gather(tree):
    """The whole arrays [S, ...] of a tree that lies on all processes' devices, in every process."""
    if jax.process_count() > 1:
        jax.block_until_ready(tree)  # Gloo's first exchange waits for the others for 30 s only
        ask("gather")
        tree = multihost_utils.process_allgather(tree, tiled=True)
    return tree


def _meet(text):
    """What every process says at this meeting; Ctrl-C is seen to every second."""
    us, said, place = distributed.global_state, [], f"atoll/{next(MEETINGS)}"
    us.client.key_value_set(f"{place}/{us.process_id}", text)
    while len(said) < us.num_processes:
        try:
            said.append(us.client.blocking_key_value_get(f"{place}/{len(said)}", 1000))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
    return said


def _leave():
    """At the end of a process, whatever ended it. JAX by itself gives the others five minutes."""
    while {*_meet("left")} != {"left"}:
        pass

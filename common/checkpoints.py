# SPDX-License-Identifier: Apache-2.0
"""Checkpoints by orbax."""

import contextlib
import json
import logging
import shutil
import sys
import time
from pathlib import Path

import jax

from common import digests, disks, fail, one_line


def manager(folder):
    """Orbax's manager of a run folder's `checkpoints/`, the newest two."""
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax raises what it logs as well
    options = {"max_to_keep": 2, "enable_async_checkpointing": False}
    handlers = None
    if jax.process_count() > 1:  # every process has a folder of its own
        index = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(index, {index}, f"process_{index}")
        options |= {"multiprocessing_options": alone, "create": False}
        (folder / "checkpoints").mkdir(exist_ok=True)
        handlers = {
            "state": ocp.StandardCheckpointHandler(multiprocessing_options=alone),
            "meta": ocp.JsonCheckpointHandler(multiprocessing_options=alone),
        }
    return ocp.CheckpointManager(
        (folder / "checkpoints").resolve(),
        options=ocp.CheckpointManagerOptions(**options),
        item_handlers=handlers,
    )


@disks.quiet_loops()
def save(manager, step, state, meta):
    """The State and what belongs to it, with a digest of both."""
    import orbax.checkpoint as ocp

    meta = json.loads(json.dumps(meta))  # as it will be read
    meta |= {"digest": digests.of_checkpoint(state, meta)}
    items = {"state": ocp.args.StandardSave(state), "meta": ocp.args.JsonSave(meta)}
    manager.save(step, args=ocp.args.Composite(**items))
    disks.settle_all(Path(manager.directory, str(step)))  # orbax does so with arrays only


@disks.quiet_loops()
def restore(checkpoints, target, keep=False):
    """(state, meta) of the newest checkpoint that can be read, (None, None) where there is none.

    Damaged ones newer than that are set aside, since new checkpoints will want their numbers;
    `keep` leaves them. Where none can be read, nothing is touched and the run stops with one line.
    """
    import orbax.checkpoint as ocp

    damaged = []
    for step in sorted(checkpoints.all_steps(), reverse=True):
        try:
            items = {"state": ocp.args.StandardRestore(target), "meta": ocp.args.JsonRestore()}
            saved = checkpoints.restore(step, args=ocp.args.Composite(**items))
            if saved["meta"].pop("digest", None) != digests.of_checkpoint(
                saved["state"], saved["meta"]
            ):
                raise ValueError("other bits than were saved")
        except Exception as error:
            why = one_line(error)
            shapes = {}
            with contextlib.suppress(Exception):  # orbax has many; then it is damaged
                shapes = _shapes(checkpoints.item_metadata(step)["state"].tree)
            if shapes and shapes != _shapes(target):
                fail(
                    f"{checkpoints.directory}: checkpoint {step} is of another State than this "
                    f"file makes ({why}); take the file it was made with, or another --name"
                )
            print(f"WARNING: checkpoint {step} cannot be read ({why})", file=sys.stderr)
            damaged.append(step)
            continue
        for step in [] if keep else damaged:
            aside = checkpoints.directory.parent / "damaged" / f"{step}-{time.time_ns()}"
            aside.parent.mkdir(exist_ok=True)
            shutil.move(checkpoints.directory / str(step), aside)
        checkpoints.reload()
        return saved["state"], saved["meta"]
    if damaged:
        fail(f"{checkpoints.directory}: no checkpoint can be read; delete the run, or take --name")
    return None, None


def _shapes(tree):
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator="."): x.shape for k, x in leaves}

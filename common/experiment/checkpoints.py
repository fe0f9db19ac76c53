# SPDX-License-Identifier: Apache-2.0
"""Checkpoints, written and read by orbax."""

import contextlib
import json
import logging
import shutil
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from common import fail, files, one_line
from common.experiment import digests, disk_errors, unreadable


def manager(folder, name="checkpoints", kept=2, every=None):
    """Orbax's manager of a run folder's `checkpoints/`. It keeps the newest two.

    `name` is another folder beside it, where the newest `kept` are kept. With `every`, those of
    updates that it divides are kept as well.
    """
    import orbax.checkpoint as ocp

    disk_errors.silence_closed_loops()
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax raises what it logs as well
    options = {"max_to_keep": kept, "keep_period": every, "enable_async_checkpointing": False}
    handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
    if jax.process_count() > 1:  # every process has a folder of its own
        index = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(index, {index}, f"process_{index}")
        options |= {"multiprocessing_options": alone, "create": False}
        (folder / name).mkdir(exist_ok=True)
        handlers = {
            "state": ocp.StandardCheckpointHandler(multiprocessing_options=alone),
            "meta": ocp.JsonCheckpointHandler(multiprocessing_options=alone),
        }
    return ocp.CheckpointManager(
        (folder / name).resolve(),
        options=ocp.CheckpointManagerOptions(**options),
        item_handlers=handlers,
    )


def save(manager, step, state, meta):
    """Save the State and the facts that belong to it, with a digest of both."""
    import orbax.checkpoint as ocp

    meta = json.loads(json.dumps(meta))  # as it will be read
    meta |= {"x64": bool(jax.config.jax_enable_x64)}
    meta |= {"digest": digests.of_checkpoint(state, meta)}
    items = {"state": ocp.args.StandardSave(state), "meta": ocp.args.JsonSave(meta)}
    manager.save(step, args=ocp.args.Composite(**items))
    files.sync_folder(Path(manager.directory, str(step)))  # orbax syncs the arrays only


def restore(checkpoints, target, keep=False, only=None):
    """(state, meta) of the newest checkpoint that can be read, (None, None) where there is none.

    With `only` it is that one or none. Newer ones that are damaged are moved to `damaged/`, since
    new checkpoints will have their numbers; `keep` leaves them where they are. If all are damaged,
    nothing is changed.

    Raises:
        SystemExit: code 2 after one line, where no checkpoint can be read.
    """
    import orbax.checkpoint as ocp

    damaged, proven = [], True
    steps = [only] if only is not None else sorted(checkpoints.all_steps(), reverse=True)
    for step in steps:
        try:
            wanted = _as_saved(checkpoints, step, target) if keep else target
            items = {"state": ocp.args.StandardRestore(wanted), "meta": ocp.args.JsonRestore()}
            saved = checkpoints.restore(step, args=ocp.args.Composite(**items))
            if saved["meta"].pop("digest", None) != digests.of_checkpoint(
                saved["state"], saved["meta"]
            ):
                raise unreadable.Changed("its digest does not match")
            if not keep:
                unreadable.check_precision(checkpoints.directory, step, saved["meta"])
        except Exception as error:
            unreadable.check(checkpoints.directory, step, error)
            if not keep and (meta := _meta(checkpoints, step)):
                unreadable.check_precision(checkpoints.directory, step, meta)
            why = one_line(error)
            shapes = {}
            with contextlib.suppress(Exception):  # of many kinds; the checkpoint is then damaged
                shapes = _shapes(checkpoints.item_metadata(step)["state"].tree)
            if shapes and shapes != _shapes(target):
                fail(
                    f"{checkpoints.directory}: checkpoint {step} has another State than this "
                    f"file makes ({why}); use the file that made it, or choose a --name"
                )
            print(f"WARNING: checkpoint {step} cannot be read ({why})", file=sys.stderr)
            damaged.append(step)
            proven = proven and unreadable.is_damage(error)
            continue
        for step in [] if keep else damaged:
            aside = checkpoints.directory.parent / "damaged" / f"{step}-{time.time_ns()}"
            aside.parent.mkdir(exist_ok=True)
            shutil.move(checkpoints.directory / str(step), aside)
        checkpoints.reload()
        return jax.tree.map(jnp.asarray, saved["state"]) if keep else saved["state"], saved["meta"]
    if damaged:
        remedy = "; delete the run or choose a --name" if proven else "; choose a --name"
        remedy = "" if keep else remedy  # who only looks has no run to begin
        fail(f"{checkpoints.directory}: no checkpoint can be read{remedy}")
    return None, None


def _meta(checkpoints, step):
    """The facts beside a State that cannot be read, {} where they cannot be read either."""
    import orbax.checkpoint as ocp

    with contextlib.suppress(Exception):  # of many kinds; the checkpoint is then damaged
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return checkpoints.restore(step, args=args)["meta"]
    return {}


def _as_saved(checkpoints, step, target):
    """Arrays like those of `target` in the types that were saved, which x64 mode changes."""
    saved = names(checkpoints.item_metadata(step)["state"].tree)

    def empty(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return np.empty(np.shape(x), saved[name].dtype if name in saved else None)

    return jax.tree_util.tree_map_with_path(empty, target)


def read(checkpoints, step):
    """({name: array}, meta) of a checkpoint, whatever its State is; see `names`."""
    import orbax.checkpoint as ocp

    items = {"state": ocp.args.StandardRestore(), "meta": ocp.args.JsonRestore()}
    saved = checkpoints.restore(step, args=ocp.args.Composite(**items))
    return names(saved["state"]), saved["meta"]


def names(tree):
    """{name: leaf} of a tree, as in "actor.params.params.Dense_0.kernel"."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator="."): x for k, x in leaves}


def _shapes(tree):
    return {name: x.shape for name, x in names(tree).items()}

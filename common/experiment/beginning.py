# SPDX-License-Identifier: Apache-2.0
"""`--start-from`: a run begins with the parameters of another run of the same algorithm.

Only parameters are taken, those of target networks included, and with `--start-optimizer` the
states of the optimisers. Everything else of the State is the new run's own: the statistics of the
observations are those of its data. One part is taken as a whole: the record of a fit of dynamics,
which belongs to their parameters. Runs of other algorithms share a fit: of these, the dynamics
alone are taken.
"""

import math
from pathlib import Path

import jax
import jax.numpy as jnp

from common import fail
from common.experiment import checkpoints, digests, growth, yaml_files

PARAMETERS = ("params", "target_params")
OPTIMISERS = ("opt_state", "step")
DYNAMICS = ("dynamics", "fit")  # fields of a State: the networks, and the record of their fit


def check(options, cfg, script):
    """Exit with code 2 after one line, where the flags cannot be followed."""
    if options.start_optimizer and options.start_from is None:
        fail("--start-optimizer: takes the optimisers of a run; say which with --start-from")
    if options.start_optimizer and (where := growth.length_dependence(script, cfg)):
        fail(
            f"--start-optimizer: {where} depends on num_updates, so its schedule would go on where "
            "that run's ended; start without --start-optimizer"
        )


def facts(folder, algorithm, cfg=None):
    """What a run's record tells of its beginning: {folder, seeds, update, digest}.

    If that is a run of another algorithm, its name is there as well: {algorithm}.
    """
    flag = f"--start-from {folder}"
    config = yaml_files.of_run(folder, flag)
    other = config["record"].get("algorithm")
    both_fit = "model_updates" in config and hasattr(cfg, "model_updates")
    if other != algorithm and not both_fit:
        fail(f"{flag}: a run of {other}; {algorithm} begins with its own runs only")
    update = growth.reached(folder)
    if not (Path(folder) / "checkpoints" / str(update)).is_dir():
        fail(f"{flag}: no checkpoint in it")
    if both_fit and cfg.model_updates == 0 and update < config["model_updates"]:
        fail(
            f"{flag}: at update {update}, and the fit of its dynamics ends at "
            f"{config['model_updates']}; resume that run, or go on with --model-updates N"
        )
    _, meta = _read(folder, update)
    found = {
        "folder": str(folder),
        "seeds": config["seeds"],
        "update": update,
        "digest": meta["digest"],
    }
    return found if other == algorithm else found | {"algorithm": other}


def begin(state, seeds, facts, optimiser):
    """The State [S, ...] with the parameters of the run that `facts` tells of.

    A seed begins with the same seed of that run. If that run has one seed, all begin with it. Of
    another algorithm's run the dynamics are taken.
    """
    flag = f"--start-from {facts['folder']}"
    arrays, meta = _read(facts["folder"], facts["update"])
    if meta["digest"] != facts["digest"]:
        fail(f"{flag}: is no longer what this run was begun with; choose a --name")
    own = checkpoints.names(state)
    if own.keys() == arrays.keys():
        meta.pop("digest")
        if facts["digest"] != digests.of_checkpoint([arrays[name] for name in own], meta):
            fail(f"{flag}: checkpoint {facts['update']} is damaged, its digest does not match")
    rows = [_row(seed, facts["seeds"], flag) for seed in seeds]
    taken = PARAMETERS + OPTIMISERS if optimiser else PARAMETERS

    def choose(path, mine):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        kinds = [part for part in name.split(".") if part in PARAMETERS + OPTIMISERS]
        field = name.split(".")[0]
        if "algorithm" in facts and field not in DYNAMICS:
            return mine
        if field != "fit" and (not kinds or kinds[0] not in taken):
            return mine
        if name not in arrays:
            fail(f"{flag}: has no {name}, which this config makes; give the settings of that run")
        other = arrays[name]
        if other.shape[1:] != mine.shape[1:]:
            there, here = _numbers(other), _numbers(mine)
            fail(f"{flag}: {name} has {there} numbers there and {here} here; networks and data "
                 "must have the same sizes")  # fmt: skip
        return jnp.asarray(other[jnp.array(rows)], mine.dtype)

    return jax.tree_util.tree_map_with_path(choose, state)


def _read(folder, update):
    manager = checkpoints.manager(Path(folder))
    try:
        return checkpoints.read(manager, update)
    except Exception as error:  # of many kinds
        fail(f"--start-from {folder}: checkpoint {update} cannot be read ({error})")
    finally:
        manager.close()


def _row(seed, seeds, flag):
    if seed in seeds:
        return seeds.index(seed)
    if len(seeds) > 1:
        fail(f"{flag}: has seeds {' '.join(map(str, seeds))} and no seed {seed}; give --seeds "
             "of that run, or a run of one seed, with which every seed can begin")  # fmt: skip
    return 0


def _numbers(array):
    shape = array.shape[1:]
    return " x ".join(map(str, shape)) or math.prod(shape)

# SPDX-License-Identifier: Apache-2.0
"""What is asked of wandb, by flags or by wandb's own variables, which have the second say."""

import os

from common import fail

MODES = {"online": "online", "offline": "offline", "disabled": "disabled"}
MODES |= {"run": "online", "dryrun": "offline"}  # older names, which wandb still takes
PROJECT = "atoll"


def mode(options):
    """(online, offline or disabled; what says so): the flag, else wandb's variables, else offline.

    Raises:
        SystemExit: code 2 after one line, where WANDB_MODE names no such mode.
    """
    if options.wandb is not None:
        return options.wandb, "command line"
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on"):
        return "disabled", "WANDB_DISABLED"
    if not (asked := os.environ.get("WANDB_MODE")):
        return "offline", "default"
    if asked not in MODES:
        fail(f"WANDB_MODE={asked}: must be online, offline or disabled; --wandb says it as well")
    return MODES[asked], "WANDB_MODE"


def project(options):
    """(wandb's project, what says so)."""
    return _first(options.wandb_project, "WANDB_PROJECT", PROJECT)


def entity(options):
    """(the user or team that the runs belong to, what says so); None is the account's own."""
    return _first(options.wandb_entity, "WANDB_ENTITY", None)


def _first(flag, variable, default):
    if flag is not None:
        return flag, "command line"
    if value := os.environ.get(variable):
        return value, variable
    return default, "default"


def check(cfg, options):
    """Exit with code 2 after one line, where wandb's variables ask for what cannot be.

    An agent of a sweep gives its command one run, and wandb makes that one of every run the command
    starts: two seeds would overwrite each other.
    """
    if mode(options)[0] == "disabled":
        return
    if "WANDB_SWEEP_ID" in os.environ and len(cfg.seeds) > 1:
        fail(
            f"--seeds {' '.join(map(str, cfg.seeds))}: wandb's sweep agent logs one run, so one "
            "seed; make the seed a parameter of the sweep, or give --wandb disabled"
        )

# SPDX-License-Identifier: Apache-2.0
"""The two phases of a run: `num_updates` on fixed data, then `online_updates` in an env.

Updates are counted through both. A Config without `online_updates` has the first phase only.
"""

import dataclasses

from common import fail


def online_updates(cfg) -> int:
    """The updates of the online phase."""
    return getattr(cfg, "online_updates", 0)


def last_update(cfg) -> int:
    """The number of updates in all."""
    return cfg.num_updates + online_updates(cfg)


def updates_per_refresh(cfg) -> int:
    """The updates of the online phase between two sets of env steps."""
    if hasattr(cfg, "updates_per_refresh"):
        return cfg.updates_per_refresh
    return int(getattr(cfg, "steps_per_refresh", 1) * getattr(cfg, "updates_per_step", 1))


def env_steps(cfg) -> int:
    """The env steps of every seed in the online phase."""
    if not online_updates(cfg):
        return 0
    if hasattr(cfg, "updates_per_refresh"):
        return cfg.online_updates // cfg.updates_per_refresh * cfg.steps_per_refresh
    first_steps = getattr(cfg, "random_steps", 0) + getattr(cfg, "warm_up_steps", 0)
    return first_steps + round(cfg.online_updates / cfg.updates_per_step)


def fields(config_class):
    """Names of the fields of a Config that belong to the online phase: the last ones."""
    names = [field.name for field in dataclasses.fields(config_class)]
    return names[names.index("online_updates") :] if "online_updates" in names else []


def check(cfg, options):
    """Exit with code 2 after one line, where the phases cannot be as they are asked for."""
    asked = f"--online-updates {online_updates(cfg)}"
    if cfg.dataset.startswith("env/"):
        _check_without_rows(cfg)
    if not online_updates(cfg):
        return
    if options.data == "host":
        fail(f"{asked}: its rows are on the device; start it without --data host")
    if options.devices != 1 or options.distributed is not None:
        fail(f"{asked}: takes one device; start it without --devices and --distributed")


def _check_without_rows(cfg):
    """The same, where the data set is an env."""
    given = f"--dataset {cfg.dataset}: an env without rows"
    env = cfg.dataset.removeprefix("env/")
    if not hasattr(cfg, "random_steps"):
        what = "this method needs some to begin"
        fail(f"{given}, and {what}; name a data set, with --env {env} to evaluate in that env")
    if not online_updates(cfg):
        fail(f"{given}; its rows come with --online-updates N")
    if cfg.num_updates:
        what = f"for the updates before the online phase (--num-updates {cfg.num_updates})"
        fail(f"{given} {what}; set --num-updates 0")


def check_env(cfg, dataset):
    """The same, where there is no env for the online phase."""
    if online_updates(cfg) and dataset.make_env is None:
        asked = f"--online-updates {cfg.online_updates}"
        fail(f"{asked}: no env is known for {dataset.id}; name one with --env")

# SPDX-License-Identifier: Apache-2.0
"""Ranges of a Config's fields, by their names: a name means the same in every algorithm file."""

import dataclasses
import re
from fractions import Fraction
from types import SimpleNamespace

from common import fail
from common.experiment import phases

SHARES = ("discount", "target_rate", "actor_target_rate", "td_lambda", "lam", "residual")
SHARES += ("mixing_ratio", "penalty_floor", "real_ratio", "online_share")
INSIDE = ("expectile", "dropout", "action_margin", "action_cdf")  # neither 0 nor 1
LARGEST = 3.4e38  # of float32, in which the networks compute
# Patterns of names.
POSITIVE = "learning_rate$|^fixed_std$|^return_scale$|^beta$|^(sql|eql)_alpha$|^huber_delta$"
POSITIVE += "|^(initial|fixed)_temperature$|^weight_norm$|^max_(weight|clip|gradient_norm)$"
POSITIVE += "|^kernel_width$|^updates_per_step$"
NOT_NEGATIVE = "alpha$|_penalty$|noise|_weight$|_decays?$|^inverse_temperature$"
NOT_NEGATIVE += "|^perturbation$|^eta$|_deviations$|^target_divergence$"


def check(cfg):
    """Check ranges, seeds and counts that must divide each other. A message names the remedy.

    A rule that the default of a field breaks is not meant for that field: a name may mean something
    else in a file of your own.
    """
    defaults = _defaults(cfg)
    for name, value in vars(cfg).items():
        given = f"{flag(name)} {value}"
        numbers = value if isinstance(value, tuple | list) else (value,)
        if any(isinstance(x, float) and not abs(x) <= LARGEST for x in numbers):
            fail(f"{given}: must be a finite number of at most {LARGEST:.1e}")
        if any(type(x) is int and abs(x) >= 2**31 for x in numbers) and name != "seeds":
            fail(f"{given}: must be below {2**31:,}")
        if name == "seeds":
            check_seeds(value)
        wanted = _wanted(name, value, cfg)
        if wanted is not None and wanted != _wanted(name, getattr(defaults, name), defaults):
            fail(f"{given}: {wanted}")
    for whole, part in (
        ("eval_every", "log_every"),
        ("num_updates", "log_every"),
        ("clone_updates", "log_every"),
        ("model_updates", "log_every"),
        ("q_updates", "log_every"),
        ("log_every", "policy_delay"),
        ("log_every", "actor_updates"),
        ("log_every", "updates_per_step"),
        ("online_updates", "log_every"),
        ("online_updates", "updates_per_refresh"),
        ("embedding", "num_heads"),
    ):
        if not _divides(part, whole, cfg) and _divides(part, whole, defaults):
            number, divisor = getattr(cfg, whole), getattr(cfg, part)
            near = max(1, round(number / divisor)) * divisor
            smaller = f", or {flag(part)} {number}" if number < divisor else ""
            fail(
                f"{flag(whole)} {number} is no multiple of {flag(part)} {divisor}; "
                f"{near} would be one{smaller}"
            )
    for first in ("clone_updates", "model_updates", "q_updates"):
        number = getattr(cfg, first, 0)
        idle = getattr(cfg, "warm_start", 0)  # updates that follow, without what they are for
        if number and number + idle >= cfg.num_updates:
            counted = f"the {flag(first)} {number}"
            if idle:
                counted += f" and the --warm-start {idle}"
            least = ((number + idle) // cfg.log_every + 1) * cfg.log_every
            fail(
                f"--num-updates {cfg.num_updates}: counts {counted} as well, so it must be more; "
                f"give at least {least}"
            )

    if isinstance(getattr(cfg, "updates_per_step", 1), float):
        _check_several_steps_per_update(cfg)
    refresh = phases.updates_per_refresh(cfg)
    if refresh > 1 and cfg.online_updates and cfg.log_every % refresh:
        what = f"no multiple of updates_per_refresh, {refresh}"
        if hasattr(cfg, "updates_per_step"):
            counts = f"{cfg.steps_per_refresh} * {cfg.updates_per_step:g}"
            what = f"no multiple of steps_per_refresh * updates_per_step, {counts}"
        fail(f"--log-every {cfg.log_every}: {what}, the updates between two sets of env steps")
    delay = getattr(cfg, "policy_delay", 1) or 1
    if getattr(cfg, "online_updates", 0) and refresh % delay:
        steps = cfg.steps_per_refresh
        what = f"times updates_per_step {cfg.updates_per_step:g} it is no multiple of policy_delay"
        fail(f"--steps-per-refresh {steps}: {what} {delay}; {steps * delay} would be right")


def _check_several_steps_per_update(cfg):
    """A refresh has a whole number of updates."""
    steps, rate = cfg.steps_per_refresh, Fraction(str(cfg.updates_per_step))
    if (steps * rate).denominator != 1:
        fail(
            f"--steps-per-refresh {steps}: times updates_per_step {cfg.updates_per_step} it is no "
            f"whole number; {rate.denominator} would be right"
        )


def _defaults(cfg):
    """The defaults of a Config's fields; None for a field that has none."""
    values = {field.name: field.default for field in dataclasses.fields(cfg)}
    missing = dataclasses.MISSING
    return SimpleNamespace(**{name: None if x is missing else x for name, x in values.items()})


def _wanted(name, value, cfg):
    """What numbers in a field of this name must be and are not; None where they are all right."""
    numbers = value if isinstance(value, tuple | list) else (value,)
    if name.endswith("hidden") and not numbers:
        return "give at least one hidden layer"
    are_numbers = all(isinstance(x, int | float) for x in numbers)
    if name == "seeds" or not numbers or not are_numbers:
        return None
    lowest, highest = min(numbers), max(numbers)
    if any(type(x) is int and x < _least(name, cfg) for x in numbers):
        return f"must be at least {_least(name, cfg)}"
    if name in SHARES and not 0 <= lowest <= highest <= 1:
        return "must be a number from 0 to 1"
    if name == "fraction" and not 0 < lowest <= highest <= 1:
        return "must be a number above 0 and up to 1"
    if name in INSIDE and not 0 < lowest <= highest < 1:
        return "must be between 0 and 1, exclusive"
    if name == "action_margin" and lowest < 1e-6:
        return "must be at least 1e-06, smaller ones vanish in float32"
    if re.search(POSITIVE, name) and lowest <= 0:
        return "must be above 0"
    if re.search(NOT_NEGATIVE, name) and lowest < 0:
        return "must be 0 or more"
    return None


def _divides(part, whole, cfg):
    """Whether one field divides another; True where one of them is not there or None."""
    number, divisor = getattr(cfg, whole, None), getattr(cfg, part, None)
    if number is None or divisor is None or isinstance(divisor, float):
        return True
    return divisor != 0 and number % divisor == 0


def _least(name, cfg):
    """The least value of a whole number."""
    if name in ("model_updates", "online_updates", "random_steps", "warm_up_steps", "warm_start"):
        return 0
    if name == "num_bins":
        return 2
    return 0 if name == "num_updates" and getattr(cfg, "online_updates", 0) else 1


def check_seeds(seeds):
    given = f"--seeds {seeds}"
    if not seeds or len(set(seeds)) < len(seeds):
        fail(f"{given}: give at least one seed, and none twice")
    if min(seeds) < 0 or max(seeds) >= 2**32:
        fail(f"{given}: seeds go from 0 to {2**32 - 1}")


def flag(name):
    """A field's flag on the command line."""
    return f"--{name.replace('_', '-')}"

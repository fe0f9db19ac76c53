# SPDX-License-Identifier: Apache-2.0
"""Ranges of a Config's fields, by their names: a name means the same in every algorithm file."""

import re

from common import fail
from common.experiment import phases

SHARES = ("discount", "target_rate", "actor_target_rate", "td_lambda", "lam", "residual")
SHARES += ("mixing_ratio", "penalty_floor", "real_ratio", "online_share")
LARGEST = 3.4e38  # of float32, in which the networks compute
# Patterns of names.
POSITIVE = "learning_rate$|^fixed_std$|^return_scale$|^beta$|^(sql|eql)_alpha$|^huber_delta$"
POSITIVE += "|^(initial|fixed)_temperature$|^weight_norm$|^max_(weight|clip|gradient_norm)$"
POSITIVE += "|^kernel_width$"
NOT_NEGATIVE = "alpha$|_penalty$|noise|_weight$|_decays?$|^inverse_temperature$"
NOT_NEGATIVE += "|^perturbation$|^eta$|_deviations$|^target_divergence$"


def check(cfg):
    """Check ranges, seeds and counts that must divide each other. A message names the remedy."""
    for name, value in vars(cfg).items():
        given = f"{flag(name)} {value}"
        numbers = value if isinstance(value, tuple | list) else (value,)
        if value is None:
            continue
        if any(isinstance(x, float) and not abs(x) <= LARGEST for x in numbers):
            fail(f"{given}: must be a finite number of at most {LARGEST:.1e}")
        if any(type(x) is int and abs(x) >= 2**31 for x in numbers) and name != "seeds":
            fail(f"{given}: must be below {2**31:,}")
        if name == "seeds":
            check_seeds(value)
        elif name.endswith("hidden") and not value:
            fail(f"{given}: give at least one hidden layer")
        elif any(type(x) is int and x < _least(name, cfg) for x in numbers):
            fail(f"{given}: must be at least {_least(name, cfg)}")
        elif name in SHARES and not 0 <= value <= 1:
            fail(f"{given}: must be a number from 0 to 1")
        elif name == "fraction" and not 0 < value <= 1:
            fail(f"{given}: must be a number above 0 and up to 1")
        elif name in ("expectile", "dropout", "action_margin", "action_cdf") and not 0 < value < 1:
            fail(f"{given}: must be between 0 and 1, exclusive")
        elif name == "action_margin" and value < 1e-6:
            fail(f"{given}: must be at least 1e-06, smaller ones vanish in float32")
        elif re.search(POSITIVE, name) and min(numbers) <= 0:
            fail(f"{given}: must be above 0")
        elif re.search(NOT_NEGATIVE, name) and min(numbers, default=0) < 0:
            fail(f"{given}: must be 0 or more")
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
        if {whole, part} <= {*vars(cfg)} and getattr(cfg, whole) % getattr(cfg, part):
            number, divisor = getattr(cfg, whole), getattr(cfg, part)
            near = max(1, round(number / divisor)) * divisor
            smaller = f", or {flag(part)} {number}" if number < divisor else ""
            fail(
                f"{flag(whole)} {number} is no multiple of {flag(part)} {divisor}; "
                f"{near} would be one{smaller}"
            )
    for first in ("clone_updates", "model_updates", "q_updates"):
        number = getattr(cfg, first, 0)
        if number and number >= cfg.num_updates:
            fail(
                f"--num-updates {cfg.num_updates}: counts the {flag(first)} {number} as well, "
                "so it must be more"
            )

    refresh = phases.updates_per_refresh(cfg)
    if refresh > 1 and cfg.online_updates and cfg.log_every % refresh:
        what = f"no multiple of updates_per_refresh, {refresh}"
        if hasattr(cfg, "updates_per_step"):
            counts = f"{cfg.steps_per_refresh} * {cfg.updates_per_step}"
            what = f"no multiple of steps_per_refresh * updates_per_step, {counts}"
        fail(f"--log-every {cfg.log_every}: {what}, the updates between two sets of env steps")
    delay = getattr(cfg, "policy_delay", 1)
    if getattr(cfg, "online_updates", 0) and refresh % delay:
        steps = cfg.steps_per_refresh
        what = f"times updates_per_step {cfg.updates_per_step} it is no multiple of policy_delay"
        fail(f"--steps-per-refresh {steps}: {what} {delay}; {steps * delay} would be right")


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

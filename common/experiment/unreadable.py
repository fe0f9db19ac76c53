# SPDX-License-Identifier: Apache-2.0
"""Why a checkpoint cannot be read. Only some reasons are damage; each other one has its line."""

import errno
import json
import os

import jax

from common import fail, one_line
from common.experiment import disk_errors

X64 = "JAX_ENABLE_X64"
LIMITS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EPERM}  # of the system or the user
DAMAGE = ("DATA_LOSS", "NOT_FOUND", "OUT_OF_RANGE", "FAILED_PRECONDITION", "INVALID_ARGUMENT")


class Changed(ValueError):
    """The bits are not those that were saved."""


def check_precision(folder, step, meta):
    """Exit with one line where a run of 32-bit numbers would go on with 64-bit ones or back.

    The state would have other types, and JAX's random numbers are others.
    """
    saved, now = bool(meta.get("x64", False)), bool(jax.config.jax_enable_x64)
    if saved != now:
        begun = f"begun {'with' if saved else 'without'} {X64}"
        fail(
            f"{folder}: checkpoint {step} is of a run {begun}, which is {'on' if now else 'off'} "
            f"here; set {X64}={int(saved)} to continue, or choose a --name"
        )


def check(folder, step, error):
    """Exit with code 2 after one line, where the error says nothing against the checkpoint."""
    if why := _outside(error):
        fail(f"{folder}: checkpoint {step} was not read: {why}; start again with --resume")


def _outside(error):
    """What else than damage kept a checkpoint from being read, with its remedy; else None."""
    if isinstance(error, ImportError):
        return f"a package is missing or broken ({one_line(error)}): install it"
    if is_out_of_memory(error):
        return f"there is not enough memory ({one_line(error)})"
    number = disk_errors.number(error)
    if number in disk_errors.DISK_ERRORS | LIMITS:
        return f"{os.strerror(number)}: that is no fault of its bytes"
    return None


def is_out_of_memory(error):
    """Whether memory of the host or of a device was not enough."""
    return isinstance(error, MemoryError) or "out of memory" in str(error).lower()


def is_damage(error):
    """Whether the error proves that bytes of a checkpoint are missing or changed."""
    if isinstance(error, Changed | json.JSONDecodeError | UnicodeDecodeError | FileNotFoundError):
        return True
    return any(word in str(error) for word in DAMAGE)

# SPDX-License-Identifier: Apache-2.0
"""Types of the values of a Config and of Options.

tyro checks those of a command line, but a Config that Python makes takes anything.
"""

import types
import typing

from common import fail
from common.experiment.ranges import flag

WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}


def check(values):
    """Exit with code 2 after one line, where a field of a dataclass has a value of another type."""
    for name, kind in typing.get_type_hints(type(values)).items():
        value = getattr(values, name)
        if not _fits(value, kind):
            made_of = {type(x).__name__ for x in value} if isinstance(value, tuple | list) else ()
            what = " of ".join([type(value).__name__, *sorted(made_of)[:1]])
            fail(f"{flag(name)} {value}: must be {words(kind)}, not {what}")


def _fits(value, kind):
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is typing.Literal:
        return any(value is part or value == part for part in parts)
    if origin is tuple:
        return isinstance(value, tuple | list) and all(_fits(x, parts[0]) for x in value)
    if kind is types.NoneType:
        return value is None
    # Numbers of NumPy are none: config.yaml could not hold them.
    return kind not in WORDS or type(value) is kind or (kind is float and type(value) is int)


def words(kind):
    """What a value of this type is, in words."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(words(part) for part in parts)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, parts))
    if origin is tuple:
        return f"a tuple, and each part {words(parts[0])}"
    return "None" if kind is types.NoneType else WORDS.get(kind, "text")

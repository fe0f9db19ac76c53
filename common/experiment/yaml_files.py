# SPDX-License-Identifier: Apache-2.0
"""Read YAML files: configs, and the config.yaml of a run folder."""

import itertools
import os
from pathlib import Path

from common import fail

LONGEST = 1_000_000  # characters of a config, and values in it once aliases are written out


def of_run(folder, given=None):
    """What the config.yaml of a run folder holds; its `record` is a mapping, maybe an empty one.

    `given` are the words by which the folder was given, where that is more than its path.
    """
    file = Path(folder) / "config.yaml"
    if not file.exists():
        fail(f"{given or folder}: no config.yaml in it, so no run folder; {_near(folder)}")
    values = load(file)
    if not values:
        fail(f"{file} is empty, so nothing tells what this run was; choose a --name")
    if not isinstance(values.setdefault("record", {}), dict):
        fail(f"{file}: record: must be a mapping of facts, not {values['record']!r}")
    return values


def _near(folder):
    """What may be meant: a run folder below this one, or that around a file."""
    folder = Path(folder)
    above = [place for place in folder.parents if (place / "config.yaml").exists()]
    if above:
        return f"did you mean {above[0]}?"
    below = itertools.islice(_below(folder), 100)
    newest = max(below, key=lambda place: (place / "config.yaml").stat().st_mtime, default=None)
    if newest is not None:
        return f"the newest below it is {newest}"
    return "give runs/ALGORITHM/DATA SET/NAME, as the run's output says"


def _below(folder):
    """The run folders at most five levels down; the name of a data set can have three levels."""
    for root, names, files in os.walk(folder):
        if "config.yaml" in files:
            yield Path(root)
        if "config.yaml" in files or len(Path(root).relative_to(folder).parts) == 5:
            names.clear()  # `os.walk` goes no deeper here


def load(file):
    """The mapping that a YAML file holds. What is wrong with it is one line and exit code 2."""
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # the one in C is faster
        def construct_mapping(self, node, deep=False):
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for key in keys:
                if not isinstance(key, str) or keys.count(key) > 1:
                    what = "appears twice" if isinstance(key, str) else "is not a word"
                    fail(f"{file}: key {key!r} {what} (line {node.start_mark.line + 1} ff.)")
            return super().construct_mapping(node, deep)

    try:
        with open(file, encoding="utf-8") as text:
            content = text.read(LONGEST + 1)
    except (OSError, ValueError) as error:
        fail(f"--config {file}: cannot be read ({getattr(error, 'strerror', None) or error})")
    if len(content) > LONGEST:
        fail(f"--config {file}: longer than {LONGEST:,} characters, so no config")
    try:
        values = yaml.load(content, Loader)
    except Exception as error:  # of many kinds, where a tag does not fit its text
        fail(f"{file}: not valid YAML ({' '.join(str(error).split())})")
    values = {} if values is None else values
    if _is_too_large(values):
        fail(f"{file}: its aliases make more than {LONGEST:,} values")
    if not isinstance(values, dict):
        fail(f"{file}: must be a mapping of fields to values, not a {type(values).__name__}")
    return values


def _is_too_large(values):
    """Whether there are too many values once aliases of aliases are written out."""
    parts, count = [values], 0
    while parts and count <= LONGEST:
        part, count = parts.pop(), count + 1
        if isinstance(part, dict):
            parts += part.values()
        elif isinstance(part, list):
            parts += part
    return count > LONGEST

# SPDX-License-Identifier: Apache-2.0
"""What a run's numbers depend on beside its config: code, processor, devices, data, versions.

Where one of them changes before a run is resumed, a warning says so and the record names both.
"""

import contextlib
import inspect
import json
import sys
from pathlib import Path

import jax

from common import machine
from common.experiment import digests, growth, provenance

THEN = ", then "  # between what a run began with and what it was resumed with
COMMON = Path(__file__).resolve().parents[1]


def code_of_common() -> list[Path]:
    """All files of common/, in a fixed order."""
    return sorted(COMMON.rglob("*.py"))


def code_of_run(folder):
    """Digest of the algorithm's file that a run was made by, None where nothing tells it."""
    folder = Path(folder)
    newest = folder / "checkpoints" / str(growth.reached(folder))
    for file in (folder / "result.json", newest / "meta" / "metadata"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return json.loads(file.read_text(encoding="utf-8"))["code"]["algorithm"]
    return None


def another_version(script, made):
    """Words for the version of an algorithm's file that made a run; None if it is the present one.

    `made` is the digest that the run has recorded, or None.
    """
    now = provenance.code([script])
    return None if made in (None, now) else f"another version of {script.name} ({made}, now {now})"


class Origin:
    """`code`: digests of the algorithm's file and of common/. `world`: everything else."""

    def __init__(self, cfg, dataset):
        script = Path(inspect.getfile(type(cfg)))
        self.code = {
            "algorithm": provenance.code([script]),
            "common": provenance.code(code_of_common()),
        }
        devices = jax.devices()
        self.world = {
            "processor": machine.processor(),
            "data": digests.of_data(dataset.transitions),
            "devices": f"{len(devices)} x {devices[0].device_kind}",
            "reference": f"{dataset.ref_min_score} to {dataset.ref_max_score}",
        }
        self.versions = dict(provenance.versions())

    def saved(self):
        """What a checkpoint keeps of it."""
        return {"code": self.code, "world": self.world | self.versions}

    def compare(self, saved):
        """Warn of what is not as it was when the run began, and record both."""
        for part, now in self.code.items():
            before = saved["code"][part]
            self.code[part] = before if now in before.split("+") else f"{before}+{now}"
            if self.code[part] != before:
                what = f"resumed by another version of the {part} code, {self.code[part]}"
                print(f"WARNING: {what}", file=sys.stderr)
        for what, before in saved["world"].items():
            facts = self.world if what in self.world else self.versions
            now = facts.get(what)
            facts[what] = before if now in before.split(THEN) else f"{before}{THEN}{now}"
            if facts[what] != before:
                print(f"WARNING: begun on {before}, resumed on {now} ({what})", file=sys.stderr)

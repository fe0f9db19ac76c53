# SPDX-License-Identifier: Apache-2.0
"""What scripts that measure something and draw it have in common: a .json, a .md and a .png."""

import datetime
import json
import shlex
import sys
from pathlib import Path

from common import fail, machine
from common.experiment import provenance


def stem(output):
    """The path that the three suffixes are added to; one with a suffix ends with code 2."""
    output = Path(output)
    if output.suffix:
        fail(f"--output {output}: must have no suffix; .png, .json and .md are added")
    return output


def facts(script):
    """How and where a record was made, its first entries."""
    return {
        "command": shlex.join(["python", f"benchmarks/{script}", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "hardware": machine.processor(),
        "versions": ", ".join(f"{name} {x}" for name, x in provenance.versions()),
    }


def table(rows):
    """Lines of a Markdown table of dicts with the same keys."""
    lines = [f"| {' | '.join(rows[0])} |", "|" + " --- |" * len(rows[0])]
    return lines + [f"| {' | '.join(map(str, row.values()))} |" for row in rows]


def page(title, text, record, alt):
    """The page of a record with one table and one picture; `text` are the lines that explain it."""
    lines = [f"# {title}", "", *text, ""]
    lines += [f"- {name}: {fact}" for name, fact in record.items() if name != "rows"]
    lines += ["", f"![{alt}]({record['figure']})", "", *table(record["rows"])]
    return "\n".join(lines) + "\n"


def write(output, record, text):
    """Write the record and its page."""
    output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    output.with_suffix(".md").write_text(text)

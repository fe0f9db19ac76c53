# SPDX-License-Identifier: Apache-2.0
"""The text files of a run folder: config.yaml, metrics.csv, timing.csv, result.json."""

import json

import numpy as np

from common import fail, files, one_line
from common.experiment import growth

TIMES = ("chunk_seconds", "train_seconds", "eval_seconds", "checkpoint_seconds")
SCORES = ("score", "return", "success", "length")  # the last columns of metrics.csv


class Records:
    """Writes whole lines and whole files, so that a process that dies leaves nothing half-written.

    `waiting` has rows of metrics.csv that wait until the metrics have names: those of update 0,
    which has no losses.
    """

    def __init__(self, folder, seeds):
        self.folder, self.seeds = folder, seeds
        self.waiting = []

    def write_config(self, values):
        """config.yaml. Where there is one, only what may change at a resumption is written.

        The record's `history` keeps the former values and the update up to which they held.
        """
        import yaml

        file = self.folder / "config.yaml"
        if file.exists():
            now = {key: values[key] for key in growth.MAY_CHANGE if key in values}
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
            changed = {key: values[key] for key, x in now.items() if values.get(key, x) != x}
            if not changed:
                return
            stage = {"until_update": growth.reached(self.folder)} | changed
            values["record"].setdefault("history", []).append(stage)
            values.update(now)
            words = ", ".join(f"{key} {now[key]} (was {x})" for key, x in changed.items())
            print(f"config.yaml: {words}")
        files.write(file, yaml.safe_dump(values, sort_keys=False, default_flow_style=None))

    def started_from(self):
        """What config.yaml records of another run's parameters, None if it does not."""
        import yaml

        file = self.folder / "config.yaml"
        if not file.exists():
            return None
        return yaml.safe_load(file.read_text(encoding="utf-8"))["record"].get("started_from")

    def write_result(self, values):
        files.write(self.folder / "result.json", json.dumps(values, indent=2) + "\n")

    def read_result(self):
        return read_result(self.folder)

    def resume(self, start, columns=()):
        """Drop everything that update `start` and the later ones wrote: it is written again.

        `columns` are further ones of metrics.csv, which a run gets that grows by an online phase.
        """
        (self.folder / "result.json").unlink(missing_ok=True)  # a folder with it is finished
        for name in columns:
            self._add_column("metrics.csv", name, before=SCORES[0])
        self._add_column("timing.csv", TIMES[-1])  # runs of before do not have it
        self._cut("metrics.csv", self.waiting[0][0] if self.waiting else start)
        self._cut("timing.csv", start)

    def _cut(self, name, first):
        """Drop the rows from update `first` on, and a row that was not written to its end."""
        file = self.folder / name
        if file.exists():
            header, *rows = file.read_text(encoding="utf-8").splitlines(keepends=True) or [""]
            rows = [row for row in rows if row[-1] == "\n" and int(row.split(",")[0]) < first]
            files.write(file, "".join([header, *rows] if rows else []))

    def _add_column(self, name, column, before=None):
        """An empty column of a CSV file, before another one or the last, if it is not there."""
        file = self.folder / name
        rows = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        if not rows or column in rows[0].split(","):
            return
        header = rows[0].split(",")
        place = header.index(before) if before else len(header)
        cells = [row.split(",") for row in rows if len(row.split(",")) == len(header)]
        lines = [[*row[:place], "" if i else column, *row[place:]] for i, row in enumerate(cells)]
        files.write(file, "".join(",".join(line) + "\n" for line in lines))

    def write_metrics(self, step, metrics, scores, diverged, last):
        """Add the rows of a chunk boundary to metrics.csv, one per seed.

        Args:
            metrics: name -> [S] means over the chunk, None at update 0.
            scores: name -> [S] of an evaluation, None without one.
            diverged: index of a seed -> update; its metrics stay empty after that.
            last: whether no later row can give the metrics their names.

        Returns:
            The rows that were written: (update, seed, metrics, scores).
        """
        for i, seed in enumerate(self.seeds):
            gone = diverged.get(i, step) < step
            means = {name: x[i] for name, x in (metrics or {}).items() if x[i] is not None}
            means = {} if gone else means
            numbers = {name: x[i] for name, x in (scores or {}).items()}
            self.waiting.append((step, seed, means, numbers))
        if not metrics and not last:
            return []
        names, lines = self._columns(list(metrics or {})), []
        for update, seed, means, numbers in self.waiting:
            cells = [_cell(means.get(name)) for name in names]
            cells += [_cell(numbers.get(name)).replace("nan", "") for name in SCORES]
            lines.append((update, seed, *cells))
        self.append("metrics.csv", ("update", "seed", *names, *SCORES), *lines)
        written, self.waiting = self.waiting, []
        return written

    def _columns(self, names):
        """The metrics that metrics.csv has, then those of `names` that are new, in this order.

        A method that learns in several phases has other metrics in each of them. The first rows of
        a phase give the file its columns; the rows before have empty cells there.
        """
        file = self.folder / "metrics.csv"
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        header, *rows = [line.split(",") for line in text.splitlines()] or [[]]
        first, last = 2, len(header) - len(SCORES)  # metrics are the columns in between
        if header[:first] != ["update", "seed"] or header[last:] != [*SCORES]:
            return names  # a new file, or one that `append` refuses
        known = header[first:last]
        new = [name for name in names if name not in known]
        if new:
            lines = [[*header[:last], *new, *SCORES]]
            lines += [[*row[:last], *[""] * len(new), *row[last:]] for row in rows]
            files.write(file, "".join(",".join(line) + "\n" for line in lines))
        return known + new

    def scores_at(self, update):
        """{seed: score} of the evaluation at that update, for the seeds that have one."""
        header, *rows = (self.folder / "metrics.csv").read_text(encoding="utf-8").splitlines()
        place, found = header.split(",").index(SCORES[0]), {}
        for row in rows:
            cells = row.split(",")
            if int(cells[0]) == update and cells[place]:
                found[int(cells[1])] = float(cells[place])
        return found

    def write_timing(self, step, seconds):
        self.append("timing.csv", ("update", *TIMES), (step, *seconds))

    def append(self, name, header, *rows):
        """Add rows to a CSV file, which gets the header where it is new."""
        header, *rows = (",".join(map(str, line)) + "\n" for line in (header, *rows))
        with (self.folder / name).open("a+", encoding="utf-8") as out:
            out.seek(0)
            if (first := out.readline()) not in ("", header):
                fail(f"{self.folder / name}: has other columns ({first.strip()}); choose a --name")
            out.write("".join(rows if first else [header, *rows]))
            files.sync(out)


def read_result(folder):
    """The result.json of a run folder, {} where the run is not finished."""
    file = folder / "result.json"
    if not file.exists():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:  # it is written whole, so something changed it
        fail(f"{file}: no JSON ({one_line(error)}); delete it, --resume writes it again")


def over_seeds(name, numbers):
    """Mean and std (ddof 0) of [S] numbers over the seeds that have one; None where none has."""
    known = np.asarray(numbers, float)
    known = known[np.isfinite(known)]
    if not len(known):
        return {f"{name}_mean": None, f"{name}_std": None}
    return {f"{name}_mean": float(known.mean()), f"{name}_std": float(known.std())}


def _cell(x):
    return "" if x is None else f"{x:.9g}"

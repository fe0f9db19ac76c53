# SPDX-License-Identifier: Apache-2.0
"""Read run folders, or the runs of a wandb project, into the rows of a report.

A row is the score of one method on one data set. Runs that differ only in their seeds are joined
into one row. Any other difference makes separate rows and is named: a config value, the version of
the code, other data under the same name. Runs that cannot be rows (unfinished, damaged, a seed
twice) are left out, and a note says so.
"""

import collections
import contextlib
import csv
import difflib
import fnmatch
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import yaml

from common import datasets, fail, one_line
from common.datasets import reference_scores
from common.datasets.names import OGBENCH_ID
from common.experiment.config import current_names

PER_SEED = ("score", "best_score", "return", "success", "length", "diverged")
PER_SEED += ("offline_score", "regret", "online_success")  # of runs with an online phase
# Named only if nothing else tells rows apart, or if one name has several of them.
BUDGET = ("num_updates", "online_updates", "log_every", "eval_every", "eval_episodes")
NO_CONFIG = ("record", "seeds", "dataset")  # keys that do not distinguish rows
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C is faster


@dataclass
class Result:
    """One row: a finished run, or several that differ in their seeds only."""

    folder: Path
    config: dict
    result: dict
    curves: dict  # seed -> ([T] updates, [T] scores) of the evaluations
    variant: str = ""  # what distinguishes this row from others of the same algorithm
    others: list = field(default_factory=list)  # folders of runs with further seeds
    copy: str = ""  # which data, if two data sets have one name
    joined: list = field(default_factory=list)  # the result.json of every run in the row
    selection: str = "last"  # which evaluations are the score, see `select`

    @property
    def algorithm(self):
        return self.result["algorithm"]

    @property
    def label(self):
        return f"{self.algorithm} {self.variant}".strip()

    @property
    def dataset(self):
        return datasets.slug(self.config["dataset"]) + self.copy

    @property
    def code(self):
        """Digest of the algorithm's file when the run was made; empty in old runs."""
        return (self.result.get("code") or {}).get("algorithm", "")

    @property
    def made(self):
        """What a run depends on besides its config and algorithm, if result.json records it."""
        common = (self.result.get("code") or {}).get("common", "")
        precision = self.result.get("matmul_precision", "")
        precision += " with 64 bits" if self.result.get("x64") else ""
        return {"common": common, "precision": precision}

    @property
    def updates(self):
        """Updates of both phases."""
        return updates_of(self.result)

    @property
    def switch(self):
        """The update after which the online phase began; None if the run has none."""
        return self.result["num_updates"] if self.result.get("online_updates") else None

    @property
    def results(self):
        return self.joined or [self.result]

    @property
    def reference(self):
        return self.config.get("record", {}).get("reference", [None, None])

    @property
    def last(self):
        """[S] of the last policy; NaN if a seed diverged or was not evaluated."""
        return numbers(self.result["score"])

    @property
    def last_3(self):
        """[S, 3] the last three evaluations of a trained policy, [S, 0] if a seed has fewer.

        NaN for a seed without a last score, such as one that diverged.
        """
        found = []
        for seed, last in self.result["score"].items():
            updates, scores = self.curves.get(int(seed), np.zeros((2, 0)))
            found.append(np.full(3, np.nan) if last is None else scores[updates > 0][-3:])
        if min(map(len, found)) < 3:
            return np.zeros((len(found), 0))
        return np.array(found)

    @property
    def scores(self):
        """[S] the scores of the row, taken as `selection` says."""
        return self.last if self.selection == "last" else self.last_3.mean(axis=1)

    @property
    def best(self):
        """[S] highest evaluation during training; NaN if a seed diverged."""
        gone = self.result["diverged"]
        each = self.result["best_score"].items()
        return numbers({seed: None if seed in gone else score for seed, score in each})

    @property
    def scale(self):
        """Scale of the score: normalised by reference scores, success rate or plain return."""
        name = self.config["dataset"]
        if OGBENCH_ID.fullmatch(name) or name.startswith("local/ogbench/"):
            return "success"
        return "return" if self.reference[0] is None else "normalised"

    @property
    def family(self):
        """Where the data come from. No table, mean or published score mixes two families."""
        name, known = self.config["dataset"], reference_scores.table()
        suite = datasets.suite(name) or "other"
        if name in known:
            where = f"D4RL {known[name]['suite']}"
        elif OGBENCH_ID.fullmatch(name):
            where = "OGBench"
        elif name.startswith("local/"):
            where = f"{name.split('/')[1]}, made locally"
        elif datasets.slug(name) != name:
            where = f"{suite} files"
        else:
            where = f"Minari {suite}"
        env = self.config.get("env")
        return f"{where}, evaluated in {env}" if env else where

    def level(self, key):
        """Mean or max return of the data on the scale of the score; NaN if not known."""
        value = self.config.get("record", {}).get("data_return", {}).get(key)
        if value is None or self.scale == "success":
            return math.nan
        low, high = self.reference
        return value if low is None else 100 * (value - low) / (high - low)


def updates_of(result):
    """Updates of both phases by a run's result.json."""
    return result["num_updates"] + result.get("online_updates", 0)


def numbers(each):
    return np.array([np.nan if x is None else x for x in each.values()], float)


# --- Run folders --------------------------------------------------------------------------------
def find(folders, where=(), named_by=(), same_code=False):
    """(rows, notes) of all runs below the folders, in order of algorithm and data set.

    Args:
        folders: run folders, or folders above them.
        where: "key=value" each: only runs with these values, see `choose`.
        named_by: fields that name the rows, see `name_by`.
        same_code: whether runs of several versions of a file count as runs of one.

    Raises:
        SystemExit: code 2 after one line, if there is no finished run.
    """
    for folder in folders:
        if not folder.is_dir():
            fail(f"{folder}: no such folder; runs are in runs/<algorithm>/<data set>/<name>")
    found = {path.parent for folder in folders for path in folder.rglob("config.yaml")}
    found |= {path.parent for folder in folders for path in folder.rglob("result.json")}
    found = sorted(folder for folder in found if not any(map(_of_a_run, [folder, *folder.parents])))
    notes = []
    runs = [run for run in (read(folder, notes) for folder in found) if run is not None]
    if not runs:
        words = f"; {len(found)} begun: {notes[0]}" if found else ""
        there = " ".join(map(str, folders))
        fail(f"{there}: no finished run (a folder with result.json) in there{words}")
    runs = choose(runs, where)
    if same_code:
        join_versions(runs, notes)
    return name_by(tell_apart(runs, notes), named_by), notes


def join_versions(runs, notes):
    """Give the runs of an algorithm one version of its code, named after all of theirs."""
    by_algorithm = collections.defaultdict(list)
    for run in runs:
        if run.code and run.made["common"]:  # older runs record neither, and stay apart
            by_algorithm[run.algorithm].append(run)
    versions = []
    shared = sorted({run.made["common"] for group in by_algorithm.values() for run in group})
    for algorithm, group in sorted(by_algorithm.items()):
        codes = sorted({run.code for run in group})
        if len(codes) > 1:
            versions.append(f"{algorithm} {', '.join(codes)}")
        for run in group:
            run.result["code"] = {"algorithm": ", ".join(codes), "common": ", ".join(shared)}
    if len(shared) > 1:
        versions.append(f"common/ {', '.join(shared)}")
    if versions:
        notes.append(
            "seeds from several versions of the code are joined (--same-code), which must compute "
            f"the same: {'; '.join(versions)}"
        )


def choose(runs, where):
    """The runs with these values: "num_updates=100000", "name=trial*", "algorithm=iql".

    A key is a field of the config, `name` (of the run folder) or `algorithm`. `*` and `?` in a
    value stand for any letters and any one letter, a list is written with spaces.

    Raises:
        SystemExit: code 2 after one line, where no run has that key or that value.
    """
    for condition in where:
        key, equals, wanted = condition.partition("=")
        here = {_field(run, key) for run in runs} - {None}
        if not equals or not here:
            known = sorted({"name", "algorithm"}.union(*(run.config for run in runs)) - {"record"})
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            fail(f"--where {condition}: must be KEY=VALUE with a field of the runs; {hint}")
        chosen = [run for run in runs if fnmatch.fnmatchcase(_field(run, key) or "", wanted)]
        if not chosen:
            fail(f"--where {condition}: no run has that; {key} is {', '.join(sorted(here))}")
        runs = chosen
    return runs


def _field(run, key):
    """A value of a run as it is typed on a command line, None where the run has none."""
    if key == "name":
        return run.folder.name
    value = run.config.get(key) if key != "algorithm" else run.algorithm
    if value is None or key == "record":
        return None
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def select(rows, selection, notes):
    """The rows with scores that are taken as `selection` says: "last" or "mean_last_3".

    Rows with fewer than three evaluations have no mean of three: they are left out, with a note.

    Raises:
        SystemExit: code 2 after one line, if no row is left.
    """
    if selection == "last":
        return rows
    kept = [row for row in rows if row.last_3.size]
    for row in rows:
        if not row.last_3.size:
            notes.append(f"left out: {row.folder} has fewer than three evaluations after update 0")
    if not kept:
        fail(f"--score {selection}: no run has three evaluations after update 0; use --score last")
    return [replace(row, selection=selection) for row in kept]


def name_by(rows, keys):
    """Rows named by these fields alone, where there are any; else as they are.

    Raises:
        SystemExit: code 2 after one line, where a key is unknown or two rows would have one name.
    """
    if not keys:
        return rows
    for row in rows:
        words = []
        for key in keys:
            value = _field(row, key)
            words += [] if value is None else [value if key == "name" else f"{key}={value}"]
        row.variant = " ".join(words)
    seen = {}
    for row in rows:
        other = seen.setdefault((row.family, row.dataset, row.label), row)
        if other is not row:
            names = " ".join(keys)
            fail(
                f"--named-by {names}: {other.folder} and {row.folder} would both be {row.label!r}; "
                "name them by more fields, or leave one out with --where"
            )
    return rows


def _of_a_run(folder):
    """Whether this is the folder of wandb's own files in a run folder."""
    return folder.name == "wandb" and (folder.parent / "config.yaml").exists()


def read(folder, notes):
    """The run in a folder, or None and a note if it is unfinished or damaged."""
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
        config = current_names(yaml.load(text, YAML_LOADER))
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        text = (folder / "metrics.csv").read_text(encoding="utf-8")
        if not text.endswith("\n"):
            raise ValueError("metrics.csv breaks off")
        curves = collections.defaultdict(list)
        for row in csv.DictReader(text.splitlines()):
            if row["score"]:
                curves[int(row["seed"])].append((int(row["update"]), float(row["score"])))
        curves = {seed: np.array(points).T for seed, points in curves.items()}
        run = Result(folder, config, result, curves)
        check(run)
        return run
    except FileNotFoundError as error:
        notes.append(f"left out: {folder} is not finished (it has no {Path(error.filename).name})")
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        notes.append(f"left out: {folder} is damaged ({reason})")
    return None


def check(run):
    """Raises ValueError or KeyError if the three files of a run do not fit together."""
    result, updates = run.result, updates_of(run.result)
    record = run.config["record"]
    has_data = not run.config["dataset"].startswith("env/")  # else it began without a data set
    missing = {"mean", "max"} - {*record["data_return"]}
    if len(record["reference"]) != 2 or (has_data and missing):
        raise ValueError("config.yaml without the data's returns and reference scores")
    seeds = [str(seed) for seed in run.config["seeds"]]
    if seeds != [*result["score"]] or seeds != [*result["best_score"]]:
        raise ValueError(f"config.yaml has seeds {seeds}, result.json {[*result['score']]}")
    for name in ("num_updates", "online_updates"):
        have = result.get(name, 0)
        if run.config.get(name, have) != have:
            raise ValueError(f"ended after {have} {name}, not {run.config[name]}")
    for seed, score in result["score"].items():
        curve = run.curves.get(int(seed), np.zeros((2, 0)))
        last = dict(zip(*curve, strict=True)).get(updates)
        if score is not None and not math.isfinite(score):
            raise ValueError(f"seed {seed}: score {score}")
        same = (
            last is None
            if score is None
            else last is not None and math.isclose(score, last, rel_tol=1e-7, abs_tol=1e-7)
        )
        if not same:
            raise ValueError(f"seed {seed}: result.json says {score}, metrics.csv {last}")
    for name in ("updates_per_second", "eval_share", "eval_episodes", "algorithm", "diverged"):
        result[name]


# --- wandb --------------------------------------------------------------------------------------
def from_wandb(project, api=None, where=(), named_by=(), same_code=False):
    """(rows, notes) of the finished runs of a project ("entity/project"), one wandb run per seed.

    Raises:
        SystemExit: code 2 after one line, if the project cannot be read or has no such run.
    """
    try:
        if api is None:
            import wandb

            api = wandb.Api(timeout=20)
        runs, notes = [], []
        for entry in api.runs(project):
            try:
                runs.append(_of_wandb(entry))
            except (KeyError, TypeError, ValueError) as error:
                reason = f"no {error} in it" if isinstance(error, KeyError) else str(error)
                notes.append(f"left out: wandb run {entry.name} ({reason})")
    except Exception as error:  # wandb raises many kinds: no key, no network, no such project
        fail(f"wandb project {project}: {one_line(error)}; give run folders instead, or log in")
    if not runs:
        fail(f"wandb project {project}: no finished run of these algorithms in it")
    runs = choose(runs, where)
    if same_code:
        join_versions(runs, notes)
    return name_by(tell_apart(runs, notes), named_by), notes


def _of_wandb(entry):
    """A wandb run as a row of one seed."""
    config = {key: x for key, x in entry.config.items() if not key.startswith("_")}
    config = current_names(config)
    seed, algorithm = config.pop("seed"), config.pop("algorithm")
    lengths = {name: config.get(name, 0) for name in ("num_updates", "online_updates")}
    code, updates = config.pop("code", {}), updates_of(lengths)
    points, values, last = [], {}, None
    for row in entry.scan_history():
        score = row.get("score")
        if score is not None and math.isfinite(float(score)):  # wandb gives NaN as "NaN"
            points.append((row["_step"], float(score)))
            values = {name: row.get(name) for name in ("score", "return", "success", "length")}
        last = row["_step"]
    if entry.state != "finished" or last != updates:
        raise ValueError(f"{entry.state} at update {last} of {updates}")
    over = not points or points[-1][0] != updates  # diverged or never evaluated
    best = max((score for step, score in points if step > 0), default=None)
    result = {"algorithm": algorithm, **lengths, "code": code}
    result |= {"eval_episodes": config["eval_episodes"], "best_score": {str(seed): best}}
    result |= {name: {str(seed): None if over else x} for name, x in values.items()}
    result |= {"diverged": {str(seed): updates} if over and points else {}}
    result.setdefault("score", {str(seed): None})
    curve = {seed: np.array(points, float).reshape(-1, 2).T}
    return Result(Path(*entry.path), config | {"seeds": [seed]}, result, curve)


# --- Rows ---------------------------------------------------------------------------------------
def tell_apart(runs, notes):
    """Turn runs into rows: join further seeds, name all other differences, note what and why."""
    by_name = collections.defaultdict(list)
    for run in runs:
        by_name[run.family, run.dataset].append(run)
    for (family, name), group in by_name.items():
        digests = [run.config.get("record", {}).get("digest") for run in group]
        texts = [_data(run) for run in group]
        if len({*digests} - {None}) > 1:  # older runs have none
            texts = [
                f"{text}, {digest or 'no digest'}"
                for text, digest in zip(texts, digests, strict=True)
            ]
        if len({*texts}) > 1:
            notes.append(f"{family}: different data are called {name}; their rows say which")
            for run, text in zip(group, texts, strict=True):
                run.copy = f" ({text})"
    rows = _join(runs, notes)
    methods = collections.defaultdict(lambda: collections.defaultdict(list))
    for run in rows:
        methods[run.family, run.algorithm][run.dataset].append(run)
    for (family, algorithm), by_dataset in methods.items():
        group = [run for runs in by_dataset.values() for run in runs]
        keys = set()
        for same in by_dataset.values():
            for key in {key for run in same for key in run.config} - {*NO_CONFIG}:
                if len({json.dumps(run.config.get(key)) for run in same}) > 1:
                    keys.add(key)
        short, budgets = keys - {*BUDGET}, collections.defaultdict(set)
        for run in group:
            budgets[_values(run, short)].add(_values(run, BUDGET))
        unique = all(len({_values(run, short) for run in x}) == len(x) for x in by_dataset.values())
        if unique and max(map(len, budgets.values())) == 1:
            keys = short
        versions = {run.code for run in group}
        if len(versions) > 1:
            names = ", ".join(sorted(version or "not recorded" for version in versions))
            notes.append(
                f"{family}: {algorithm} ran in {len(versions)} versions of its code ({names}); "
                "they are separate rows, and no mean mixes them"
            )
        for run in group:
            words = [f"{key}={run.config[key]}" for key in run.config if key in keys]
            words += [f"code={run.code or 'unrecorded'}"] if len(versions) > 1 else []
            run.variant = " ".join([*words, *([run.variant] if run.variant else [])])
        for key in ("common", "precision"):  # named only if nothing else tells rows apart
            names = collections.Counter((run.dataset, run.variant) for run in group)
            if max(names.values()) > 1 and len({run.made[key] for run in group}) > 1:
                for run in group:
                    run.variant = f"{run.variant} {key}={run.made[key] or 'unrecorded'}".strip()
    return rows


def _values(run, keys):
    return json.dumps([run.config.get(key) for key in sorted(keys)])


def _data(run):
    """What distinguishes two data sets of one name."""
    returns = run.config.get("record", {}).get("data_return")
    if not returns:  # of an early version, or a run that began without a data set
        return "data not recorded"
    text = f"returns {returns['mean']:.6g} in the mean, {returns['max']:.6g} at most"
    low, high = run.reference
    return text if low is None else f"{text}, 0 and 100 are {low:.6g} and {high:.6g}"


def _join(runs, notes):
    """Join runs that differ only in their seeds into one row."""
    groups = collections.defaultdict(list)
    for run in runs:
        config = {key: x for key, x in run.config.items() if key not in NO_CONFIG}
        key = [run.algorithm, run.family, run.dataset, config, run.code, run.made]
        groups[json.dumps(key, sort_keys=True)].append(run)
    rows = []
    for group in groups.values():
        kept = []
        for run in group:
            twin = next((x for x in kept if _equal(run, x)), None)
            if twin is None:
                kept.append(run)
            else:
                notes.append(
                    f"left out: {run.folder} is a copy of {twin.folder} (same config and numbers)"
                )
        seeds = [seed for run in kept for seed in run.result["score"]]
        if len(kept) == 1:
            rows += kept
        elif len({*seeds}) == len(seeds) and kept[0].code:
            rows.append(_union(kept))
        else:
            why = "share a seed" if kept[0].code else "do not record the version of their code"
            if ", " in kept[0].code:  # see `join_versions`
                why += ", whose scores differ: do all versions of the code compute the same?"
            names = ", ".join(str(run.folder) for run in kept)
            notes.append(f"not joined, because they {why}: {names}")
            for run in kept:
                run.variant = f"run={run.folder.name}"
            if len({run.variant for run in kept}) < len(kept):
                for run in kept:
                    run.variant = f"run={run.folder}"
            rows += kept
    return rows


def _equal(one, other):
    if one.result["score"] != other.result["score"] or one.curves.keys() != other.curves.keys():
        return False
    return all(np.array_equal(one.curves[seed], other.curves[seed]) for seed in one.curves)


def _union(runs):
    """All seeds in one result. Seconds are summed; the speed is the mean over the processes."""
    runs = sorted(runs, key=lambda run: run.config["seeds"])
    first, result = runs[0], dict(runs[0].result)
    for name in PER_SEED:
        if any(name in run.result for run in runs):
            result[name] = {k: x for run in runs for k, x in run.result.get(name, {}).items()}
    for name in ("train_seconds", "eval_seconds"):
        if all(name in run.result for run in runs):
            result[name] = sum(run.result[name] for run in runs)
    with contextlib.suppress(KeyError, ZeroDivisionError):
        result["updates_per_second"] = np.mean([x.result["updates_per_second"] for x in runs])
        seconds = [result["eval_seconds"], result["train_seconds"]]
        result["eval_share"] = seconds[0] / sum(seconds)
    config = first.config | {"seeds": [seed for run in runs for seed in run.config["seeds"]]}
    curves = {seed: curve for run in runs for seed, curve in run.curves.items()}
    others, each = [run.folder for run in runs[1:]], [run.result for run in runs]
    return replace(first, config=config, result=result, curves=curves, others=others, joined=each)

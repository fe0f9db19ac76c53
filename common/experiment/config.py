# SPDX-License-Identifier: Apache-2.0
"""One checked Config from four sources; a later one overrides an earlier one.

They are the defaults of the Config, a YAML file, that file's row for the data set, and the command
line. The values of a file are turned into words of a command line, so that tyro parses them all.
"""

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import inspect
import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from common import datasets, fail
from common.experiment import (
    beginning,
    growth,
    kinds,
    origin,
    phases,
    processes,
    ranges,
    show_config,
    wandb_settings,
    wrong_words,
    yaml_files,
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags that are not fields of a Config. Those of IN_YAML change a run's numbers."""

    config: str | None = None  # YAML over the defaults above (default: the data set's suite's)
    name: str | None = None  # run name (default: a hash of the resolved config)
    resume: bool = False  # continue from the newest checkpoint; start anew where there is none
    runs_dir: str = "runs"  # where run folders go
    show_config: bool = False  # print every value and where it comes from, and train nothing
    wandb: Literal["offline", "online", "disabled"] | None = None  # default: WANDB_MODE or offline
    wandb_project: str | None = None  # default: WANDB_PROJECT or atoll
    wandb_entity: str | None = None  # wandb's user or team (default: WANDB_ENTITY or your own)
    start_from: str | None = None  # run folder whose parameters are the beginning of this run
    start_optimizer: bool = False  # with --start-from: the states of its optimisers as well
    keep: Literal["last", "best", "all"] = "last"  # also the best evaluated policy, or all of them
    save_seconds: float | None = None  # least time between checkpoints (default: 10; more if slow)
    data: Literal["device", "host"] = "device"  # host: the device holds the rows of two chunks only
    devices: int = 1  # devices that share the batches of one seed; several seeds always share all
    distributed: str | None = None  # auto or HOST:PORT/COUNT/INDEX: a run over several processes
    env: str | None = None  # Gymnasium id to evaluate in instead of the data set's own
    env_steps: int | None = None  # step limit of that env
    mirror: str | None = None  # folder on a server to download D4RL's and OGBench's files from

    def __post_init__(self):
        """Replace `~` in paths. The mirror counts from here on: data are loaded without Options."""
        for name in ("config", "runs_dir", "start_from"):
            if isinstance(given := getattr(self, name), str):
                object.__setattr__(self, name, os.path.expanduser(given))
        if isinstance(self.mirror, str):
            datasets.use_mirror(self.mirror)


# Options that change results, so a YAML may set them.
IN_YAML = ("env", "env_steps", "start_from", "start_optimizer")
COMMON = Path(__file__).resolve().parents[1]


def parse(config_class, argv=None):
    """Config and Options of this start, from `configs/<algorithm>/` and the command line.

    Raises:
        SystemExit: code 2 after one line that names the file and key or the flag.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    script = Path(inspect.getfile(config_class))
    _check_copy(script)
    not_given = "\0"  # tells whether the command line names a data set
    cfg, options = _command_line(config_class, [f"--dataset={not_given}", *argv], script.name)
    chosen = None if cfg.dataset == not_given else cfg.dataset
    if chosen is None and options.config is None and options.env and phases.online_updates(cfg):
        chosen = f"env/{options.env}"  # an env and no data: the online phase alone
        argv = ["--dataset", chosen, *argv]
    for name in ("config", "env", "name", "runs_dir", "distributed"):
        _printable(ranges.flag(name), getattr(options, name) or "-")
    dataset = _printable("--dataset", chosen or config_class.dataset)
    datasets.refuse_missing_version(dataset)
    if options.show_config:
        print("# ", end="")  # what is printed is a config file
    file, found = options.config, File()
    whose = "the suite's" if file is None else "the file's"
    if file is None:
        file = _suite_file(script, dataset)
    if file is not None:
        found = _read_file(file, config_class, chosen, whose)
    cfg, options = _command_line(config_class, [*found.tokens, *argv], script.name)
    datasets.refuse_missing_version(cfg.dataset)
    check(cfg, options)
    if options.show_config:
        show_config.show(cfg, options, argv, found, IN_YAML)
        raise SystemExit(0)
    run_folder(cfg, options)
    # `Run` refuses a file that nobody has read.
    return cfg, dataclasses.replace(options, config=None)


def check(cfg, options):
    """What holds for every run, whether a command line or Python started it.

    Raises:
        SystemExit: code 2 after one line that names the value and the remedy.
    """
    kinds.check(cfg)
    kinds.check(options)
    phases.check(cfg, options)  # first: a remedy for a number may not fit the other phase
    ranges.check(cfg)
    seconds = options.save_seconds
    if seconds is not None and not 0 <= seconds < float("inf"):
        fail(f"--save-seconds {options.save_seconds}: must be 0 or more")
    if options.devices < 1:
        fail(f"--devices {options.devices}: must be at least 1")
    wandb_settings.check(cfg, options)
    beginning.check(options, cfg, Path(inspect.getfile(type(cfg))))


def refuse_unread(options):
    """Exit with code 2 after one line on a field that `parse` acts on, if `parse` never saw it."""
    instead = "only experiment.parse heeds it; take Config and Options from there"
    if options.config is not None:
        fail(f"--config {options.config}: {instead}")
    if options.distributed is not None and not processes.joined():
        fail(f"--distributed {options.distributed}: {instead}")


def _check_copy(script):
    """An algorithm file is not run with the common/ of another copy of the repository."""
    beside = script.resolve().parents[1] / "common"
    if beside.is_dir() and not beside.samefile(COMMON):
        here = f"would run with {COMMON}, of another copy of Atoll"
        fail(f"{script}: {here}; PYTHONPATH={beside.parent} takes its own")


def _suite_file(script, dataset):
    """The config file of the data set's suite, None where there is none."""
    missing, hint = "", ""
    if suite := datasets.suite(dataset):
        # A copy of an algorithm file may be in the root of the repository, too.
        root = script.resolve().parent
        root = root.parent if root.name == "algorithms" else root
        path = root / "configs" / script.stem / f"{suite}.yaml"
        if path.exists():
            return _short(path)
        missing = f" {_short(path)}"
        if not path.parent.exists():  # a copy whose settings were not copied
            parents = _short(path.parent.parent / "PARENT")
            hint = f"; cp -r {parents} {_short(path.parent)} copies its parent's"
    print(f"config: no file{missing} for {dataset}, the defaults of {script.name} apply{hint}")
    return None


@dataclasses.dataclass(frozen=True)
class File:
    """What a config file says: its values, and those of its row of the data set."""

    name: str | None = None
    values: dict = dataclasses.field(default_factory=dict)
    row_name: str = ""
    row: dict = dataclasses.field(default_factory=dict)

    @property
    def tokens(self):
        """All of it as words of a command line; those of the row come last and so count."""
        return [*_tokens(self.values), *_tokens(self.row)]


def _read_file(file, config_class, chosen, whose):
    """Read a file for the chosen data set, or for the one that it names itself.

    Its values are parsed here once, so that a wrong value is said to be the file's.
    """
    values, rows = read_yaml(file, config_class)
    dataset = chosen or str(values.get("dataset", config_class.dataset))
    _printable("dataset", dataset)
    _command_line(config_class, [*_tokens(values | {"dataset": dataset})], file)
    name = datasets.config_name(dataset)
    row = rows.get(name, {})
    _command_line(config_class, [*_tokens(row)], f"{file}: datasets: {name}")
    words = ", ".join(f"{key} {value}" for key, value in row.items())
    if name in rows:
        what = f"row {name}: {words or 'no values of its own'}"
    else:
        others = f" but the {len(rows)} with a row of their own" if rows else ""
        what = f"{whose} values apply to all its data sets{others}"
    print(f"config: {file}, {what}")
    return File(file, values, name, row)


# --- YAML files ---------------------------------------------------------------------------------
def read_yaml(file, config_class):
    """Fields and `datasets:` rows of a YAML file. Unknown and doubled keys end with exit code 2."""
    values = yaml_files.load(file)
    if isinstance(
        values.get("record"), dict
    ):  # a run's config.yaml, which may have former names of fields
        values = current_names(values, renamed(config_class))
        del values["record"]  # facts about the run, for the reader
    rows = values.pop("datasets", None) or {}
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        fail(f"{file}: datasets: must be a mapping of data set ids to mappings of fields")
    _check_keys(file, "", values, config_class)
    for name, row in rows.items():
        _check_keys(file, f"datasets: {name}: ", row, config_class)
    return values, rows


def _check_keys(file, where, mapping, config_class):
    """Every key is a field and has a value."""
    fields = [field.name for field in dataclasses.fields(config_class)]
    optional = {x.name for x in dataclasses.fields(config_class) if "None" in str(x.type)}
    for key, value in mapping.items():
        if key in renamed(config_class):
            fail(f"{file}: {where}{key} has a new name: {renamed(config_class)[key]}")
        if key not in (*fields, *IN_YAML):
            near = difflib.get_close_matches(key, fields, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(fields)}"
            fail(f"{file}: {where}unknown key {key!r}; {hint}")
        if (value is None and key not in optional) or isinstance(value, dict):
            fail(f"{file}: {where}{key}: must have a value, not {value}")


# --- Renamed fields -----------------------------------------------------------------------------
RENAMED = {  # former name of a field -> its present name
    "importance": "importance_sampling",
    "gap": "target_action_gap",
    "lowest_difference": "clip_diff_min",
    "num_choices": "num_eval_samples",
}


def renamed(config_class):
    """The part of RENAMED that concerns a Config: it has the new field and not the old one."""
    fields = {field.name for field in dataclasses.fields(config_class)}
    return {old: new for old, new in RENAMED.items() if new in fields and old not in fields}


def current_names(values, names=RENAMED):
    """The values of an earlier run's config under the present names of the fields."""
    return {names.get(key, key): value for key, value in values.items()}


def _check_flags(argv, config_class, source):
    """A flag with the former name of a field is one line that says the present one."""
    for word in argv:
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and name in renamed(config_class):
            new = ranges.flag(renamed(config_class)[name])
            fail(f"{source}: {ranges.flag(name)} has a new name: {new}")


# --- Run folders --------------------------------------------------------------------------------
def _printable(what, text):
    """The text, if it can be a file's name; else exit code 2 after one line."""
    if not text.isprintable() or any(len(part.encode()) > 255 for part in text.split("/")):
        shown = text if len(text) < 60 else f"{text[:60]}..."
        fail(f"{what} {shown!r}: must be printable text with at most 255 bytes between '/'")
    return text


def read_run(folder, config_class):
    """Config and Options that a run folder's config.yaml holds."""
    yaml_files.of_run(folder)
    file = Path(folder) / "config.yaml"
    values, _ = read_yaml(file, config_class)
    return _command_line(config_class, list(_tokens(values)), str(file))


def resolved(cfg, options):
    """Everything that decides the numbers, as plain YAML values."""
    values = {key: list(x) if isinstance(x, tuple) else x for key, x in vars(cfg).items()}
    return values | {key: getattr(options, key) for key in IN_YAML if getattr(options, key)}


def _same_file(was, now):
    """Whether two paths, however they are spelled, lead to one file."""
    was, now = os.path.expanduser(str(was)), os.path.expanduser(now)
    return os.path.realpath(was) == os.path.realpath(now)


def runs_dir(options):
    """The folder of all runs."""
    folder = options.runs_dir
    if folder.startswith("~"):
        fail(f"--runs-dir {folder}: there is no such home folder; give a path without '~'")
    return Path(folder)


def run_folder(cfg, options):
    """`<runs-dir>/<algorithm>/<data set>/<name>`.

    Raises:
        SystemExit: code 2 where the folder holds a run and --resume is missing, or another config.
            Only what growth.py lists may change.
    """
    values = resolved(cfg, options)
    # The name does not depend on how a path is spelled, nor on whether a field was renamed, nor on
    # the settings of an online phase that the run does not have.
    former = {new: old for old, new in renamed(type(cfg)).items()}
    known = values | {"dataset": datasets.slug(cfg.dataset)}
    unused = () if phases.online_updates(cfg) else phases.fields(type(cfg))
    known = {former.get(key, key): value for key, value in known.items() if key not in unused}
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:8]
    name = digest if options.name is None else options.name
    if not re.fullmatch(r"\w[\w.-]*", name):
        fail(f"--name {name!r}: letters, digits, '_', '-' and, inside, '.' only")
    script = Path(inspect.getfile(type(cfg)))
    algorithm, slug = script.stem, datasets.slug(cfg.dataset)
    if {"", ".", ".."} & {*slug.split("/")}:
        what = "a directory, or no data set's name; pass an HDF5 file or an id"
        fail(f"--dataset {cfg.dataset}: {what}")
    folder = runs_dir(options) / algorithm / slug / name
    if options.resume and options.name is None and not (folder / "config.yaml").exists():
        folder = growth.find(folder, values, cfg, script)
    if (folder / "config.yaml").exists():
        before = resolved(*read_run(folder, type(cfg)))
        for key in sorted({*before, *values} - {*growth.MAY_CHANGE}):
            was, now = before.get(key), values.get(key)
            is_path = key in ("dataset", "start_from") and was and now
            if was != now and not (is_path and _same_file(was, now)):
                text = f"{folder} has {key} {was}, not {now}; choose another --name, or continue "
                text += f"that run with its own {key} and --resume"
                if key == "seeds" and (new := [x for x in now if x not in was]):
                    seeds = " ".join(map(str, new))
                    text += f"; to add seeds, train --seeds {seeds} under another --name"
                fail(text)
        growth.check(folder, before, cfg, script)
        if not options.resume:
            what = "exists; continue it with --resume or start another run with --name"
            if other := origin.another_version(script, origin.code_of_run(folder)):
                what = f"exists, made by {other}; give a --name to train the present one, or "
                what += "continue that run with --resume"
            fail(f"{folder} {what}")
    return folder


def _command_line(config_class, argv, source):
    """Config and Options that words of a command line, or values of a file, make."""
    _check_flags(argv, config_class, source)
    classes = [config_class, Options]
    hints = wrong_words.hints_of(*classes)
    settings = {"prog": source, "config": (tyro.conf.OmitArgPrefixes,)}
    in_file = not source.endswith(".py")
    both = _both(config_class)
    parsed = wrong_words.parse(
        both, argv, source, hints, in_file=in_file, classes=classes, **settings
    )
    return parsed.cfg, parsed.options


@functools.cache  # tyro looks for the source of every class that it has not seen
def _both(config_class):
    """A dataclass of a Config and Options, as which a command line is parsed."""
    config_class = Annotated[config_class, tyro.conf.FlagConversionOff]
    return dataclasses.make_dataclass("Both", [("cfg", config_class), ("options", Options)])


def _tokens(values):
    """The values as words of a command line."""
    for name, value in values.items():
        flag = ranges.flag(name)
        if isinstance(value, list):
            yield from (flag, *map(str, value))
        elif name in IN_YAML and isinstance(value, bool):  # a flag without a word behind it
            yield from [flag] * value
        else:
            yield f"{flag}={value}"


def _short(path):
    """The path relative to the working directory, if it is below that: it is shorter to read."""
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)

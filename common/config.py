# SPDX-License-Identifier: Apache-2.0
"""Config defaults, a YAML file, its row of the data set and the command line -> one checked Config.

Every value of a file becomes a command line token, so that file and command line are parsed by the
same code (tyro) and the last one wins.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import inspect
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from common import datasets, fail, ranges


@dataclasses.dataclass(frozen=True)
class Options:
    """What belongs to this start of a run rather than to its Config."""

    config: str | None = None  # YAML over the defaults above (default: the data set's suite's)
    name: str | None = None  # run name (default: a hash of the resolved config)
    resume: bool = False  # go on from the newest checkpoint; start anew where there is none
    runs_dir: str = "runs"  # where run folders go
    wandb: Literal["offline", "online", "disabled"] = "offline"  # offline needs no account
    save_seconds: float = 10.0  # between checkpoints at least; 0: a checkpoint at every border
    data: Literal["device", "host"] = "device"  # host: the device holds two chunks of rows only
    devices: int = 1  # that share the batches of one seed; several seeds share all of them anyway
    distributed: str | None = None  # auto or HOST:PORT/COUNT/INDEX: a run over several processes
    env: str | None = None  # Gymnasium id to evaluate in instead of the data set's own
    env_steps: int | None = None  # step limit of that env


IN_YAML = ("env", "env_steps")  # options that change results, so a YAML may set them


def parse(config_class, argv=None):
    """Config and Options of this start, from `configs/<algorithm>/` and the command line.

    Raises:
        SystemExit: code 2 after one line that names the file and key or the flag.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    script = Path(inspect.getfile(config_class))
    beside = script.resolve().parents[1] / "common"
    if beside.is_dir() and not beside.samefile(Path(__file__).parent):
        here = f"would run with {Path(__file__).parent}, of another copy of Atoll"
        fail(f"{script}: {here}; PYTHONPATH={beside.parent} takes its own")
    unset = "\0"  # tells a data set chosen on the command line from the default one
    cfg, options = _cli(config_class, ["--dataset", unset, *argv], script.name)
    chosen = None if cfg.dataset == unset else cfg.dataset
    for flag in ("config", "env", "name", "runs_dir", "distributed"):
        _printable(f"--{flag.replace('_', '-')}", getattr(options, flag) or "-")
    dataset = _printable("--dataset", chosen or config_class.dataset)
    file, tokens, missing = options.config, [], ""
    if file is None and (suite := datasets.suite(dataset)):
        # A copy of an algorithm's file may lie in the repository's root, too.
        root = script.resolve().parent
        root = root.parent if root.name == "algorithms" else root
        path = root / "configs" / script.stem / f"{suite}.yaml"
        file = _short(path) if path.exists() else None
        missing = f" {_short(path)}"
    if file is None:
        print(f"config: no file{missing} for {dataset}, the defaults of {script.name} apply")
    else:
        values, rows = read_yaml(file, config_class)
        dataset = _printable("dataset", chosen or str(values.get("dataset", dataset)))
        tokens = list(_tokens(values | {"dataset": dataset}))
        _cli(config_class, tokens, file)
        name = datasets.config_name(dataset)
        row = rows.get(name, {})
        _cli(config_class, list(_tokens(row)), f"{file}: datasets: {name}")
        tokens += _tokens(row)
        words = ", ".join(f"{key} {value}" for key, value in row.items())
        print(
            f"config: {file}, "
            + (
                f"row {name}: {words or 'nothing else'}"
                if name in rows
                else f"no row for {dataset}"
            )
        )
    cfg, options = _cli(config_class, [*tokens, *argv], script.name)
    ranges.check(cfg)
    if not 0 <= options.save_seconds < float("inf"):
        fail(f"--save-seconds {options.save_seconds}: 0 or more is wanted")
    run_folder(cfg, options)
    return cfg, options


LONGEST = 1_000_000  # characters of a config, and values in it once aliases are written out


def read_yaml(file, config_class):
    """Fields and `datasets:` rows of a YAML file. Unknown and doubled keys end with exit code 2."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for key in keys:
                if not isinstance(key, str) or keys.count(key) > 1:
                    what = "appears twice" if isinstance(key, str) else "is not a word"
                    fail(f"{file}: key {key!r} {what} (line {node.start_mark.line + 1} ff.)")
            return super().construct_mapping(node, deep)

    try:
        with open(file) as text:
            content = text.read(LONGEST + 1)
    except (OSError, ValueError) as error:
        fail(f"--config {file}: cannot be read ({getattr(error, 'strerror', None) or error})")
    if len(content) > LONGEST:
        fail(f"--config {file}: longer than {LONGEST:,} characters, so no config")
    try:
        values = yaml.load(content, Loader)
    except Exception as error:  # of many kinds, where a tag does not fit its text
        fail(f"{file}: not valid YAML ({' '.join(str(error).split())})")
    values, parts, count = {} if values is None else values, [values], 0
    while parts and count <= LONGEST:  # aliases of aliases would be written out below
        part, count = parts.pop(), count + 1
        if isinstance(part, dict | list):
            parts += part.values() if isinstance(part, dict) else part
    if count > LONGEST:
        fail(f"{file}: its aliases make more than {LONGEST:,} values")
    if not isinstance(values, dict):
        fail(f"{file}: a mapping of fields to values is wanted, not a {type(values).__name__}")
    values.pop("record", None)  # what a run wrote into its config.yaml for the reader
    rows = values.pop("datasets", None) or {}
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        fail(f"{file}: datasets: a mapping of data set ids to mappings of fields is wanted")
    fields = [field.name for field in dataclasses.fields(config_class)]
    optional = {x.name for x in dataclasses.fields(config_class) if "None" in str(x.type)}
    wheres = {"": values} | {f"datasets: {name}: ": row for name, row in rows.items()}
    for where, mapping in wheres.items():
        for key, value in mapping.items():
            if key not in (*fields, *IN_YAML):
                near = difflib.get_close_matches(key, fields, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(fields)}"
                fail(f"{file}: {where}unknown key {key!r}; {hint}")
            if (value is None and key not in optional) or isinstance(value, dict):
                fail(f"{file}: {where}{key}: a value is wanted, not {value}")
    return values, rows


def _printable(what, text):
    """The text, where it can be the name of something on this machine."""
    if not text.isprintable() or any(len(part.encode()) > 255 for part in text.split("/")):
        shown = text if len(text) < 60 else f"{text[:60]}..."
        fail(f"{what} {shown!r}: printable text is wanted, at most 255 bytes between '/'")
    return text


def read_run(folder, config_class):
    """Config and Options that a run folder's config.yaml holds."""
    file = Path(folder) / "config.yaml"
    if not file.exists():
        fail(f"{folder}: no config.yaml in it, so no run folder")
    values, _ = read_yaml(file, config_class)
    if not values:
        fail(f"{file} is empty: nothing tells what this run was; start another with --name")
    return _cli(config_class, list(_tokens(values)), str(file))


def resolved(cfg, options):
    """Everything that decides the numbers, as plain YAML values."""
    values = {key: list(x) if isinstance(x, tuple) else x for key, x in vars(cfg).items()}
    return values | {key: getattr(options, key) for key in IN_YAML if getattr(options, key)}


def _one_file(was, now):
    return os.path.realpath(os.path.expanduser(str(was))) == os.path.realpath(
        os.path.expanduser(now)
    )


def run_folder(cfg, options):
    """`<runs-dir>/<algorithm>/<data set>/<name>`.

    Raises:
        SystemExit: code 2 where the folder holds a run and --resume is missing, or another config.
    """
    values = resolved(cfg, options)
    known = values | {"dataset": datasets.slug(cfg.dataset)}  # however the path was spelled
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:8]
    name = digest if options.name is None else options.name
    if not re.fullmatch(r"\w[\w.-]*", name):
        fail(f"--name {name!r}: letters, digits, '_', '-' and, inside, '.' only")
    algorithm, slug = Path(inspect.getfile(type(cfg))).stem, datasets.slug(cfg.dataset)
    if {"", ".", ".."} & {*slug.split("/")}:
        what = "a directory, or no data set's name; pass an HDF5 file or an id"
        fail(f"--dataset {cfg.dataset}: {what}")
    folder = Path(options.runs_dir) / algorithm / slug / name
    if (folder / "config.yaml").exists():
        if not options.resume:
            fail(f"{folder} exists; go on with --resume or start another run with --name")
        before = resolved(*read_run(folder, type(cfg)))
        for key in sorted({*before, *values}):
            was, now = before.get(key), values.get(key)
            if was != now and not (key == "dataset" and _one_file(was, now)):
                fail(f"{folder} has {key} {was}, not {now}; resume with that or choose a --name")
    return folder


def _cli(config_class, argv, source):
    """Parse with tyro; its box of errors becomes one line that begins with the source."""
    config_class = Annotated[config_class, tyro.conf.FlagConversionOff]
    both = dataclasses.make_dataclass("Both", [("cfg", config_class), ("options", Options)])
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            parsed = tyro.cli(both, args=argv, prog=source, config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as leave:
        if leave.code == 0:  # --help
            raise
        text = re.sub(r"\x1b\[[\d;]*m|[╭╮╰╯│─]|-{4,}", " ", printed.getvalue())
        text = " ".join(text.split("For full helptext")[0].split())
        fail(f"{source}: {re.sub(r'^(Parsing error|Unrecognized options) ', '', text)}")
    return parsed.cfg, parsed.options


def _tokens(values):
    for name, value in values.items():
        flag = ranges.flag(name)
        if isinstance(value, list):
            yield from (flag, *map(str, value))
        else:
            yield f"{flag}={value}"


def _short(path):
    """The path from here where it lies below, so that messages stay readable."""
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)

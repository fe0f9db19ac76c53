# SPDX-License-Identifier: Apache-2.0
"""`--show-config`: every resolved value and where it comes from, as a config file with comments.

No data are read and nothing is trained. `--config` takes what is printed.
"""

import dataclasses

from common import datasets
from common.experiment import wandb_settings

ENVIRONMENT = {  # options that variables may decide: (value, what says so)
    "wandb": wandb_settings.mode,
    "wandb_project": wandb_settings.project,
    "wandb_entity": wandb_settings.entity,
    "mirror": lambda options: datasets.mirror(options.mirror),
}


def show(cfg, options, argv, file, in_file):
    """Print the values of a Config and of the Options of this start.

    Args:
        argv: words of the command line.
        file: the config.File that was read, or an empty one.
        in_file: names of options that a file may have.
    """
    given = {word.partition("=")[0][2:].replace("-", "_") for word in argv if word[:2] == "--"}
    given |= {name.removeprefix("no_") for name in given}
    lines = []
    for name, value in vars(cfg).items():
        lines.append((f"{name}: {_yaml(value)}", _source(name, given, file)))
    for field in dataclasses.fields(options):
        name, value = field.name, getattr(options, field.name)
        source = _source(name, given, file) if name in in_file else _source(name, given, None)
        if name in ENVIRONMENT:
            value, source = ENVIRONMENT[name](options)
        if name not in ("show_config", "config"):
            comment = "" if name in in_file and value is not None else "# "
            lines.append((f"{comment}{name}: {_yaml(value)}", source))
    width = min(40, max(len(line) for line, _ in lines))
    for line, source in lines:
        print(f"{line:{width}}  # {source}")


def _source(name, given, file):
    if name in given:
        return "command line"
    if file is not None and name in file.row:
        return f"{file.name}, row {file.row_name}"
    if file is not None and name in file.values:
        return file.name
    return "default"


def _yaml(value):
    """A value as YAML writes it in one line."""
    import yaml

    value = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")

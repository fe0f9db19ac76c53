# SPDX-License-Identifier: Apache-2.0
"""What may change when a run is resumed, and whether an algorithm depends on the run's length.

More updates, more evaluation episodes and another interval of evaluations change no number that
training has produced so far. Everything else is another run. Where a schedule depends on the
length, more updates are another run as well.
"""

import ast
import functools
from pathlib import Path

from common import fail
from common.experiment import phases, provenance, ranges

LENGTHS = ("num_updates", "online_updates")
MAY_CHANGE = (*LENGTHS, "eval_every", "eval_episodes")


# --- The length of a run ------------------------------------------------------------------------
def length_dependence(script, cfg, length="num_updates"):
    """Where an algorithm's file uses a length for more than the end of training, else None.

    Every use counts that this Config reaches, except comparisons in `train` ("step <
    cfg.num_updates"): a branch of `if cfg.cosine` counts only where that field chooses it. The file
    is read and not run, so a new file needs to declare nothing. A function named `online_...` runs
    in the online phase only. `num_updates` is fixed by then, so it may depend on that.
    """
    tree = _parsed(Path(script).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == type(cfg).__name__:
            continue
        name = getattr(node, "name", "the top level")
        if length == "num_updates" and name.startswith("online_"):
            continue
        if line := _first_use(node, cfg, length, comparisons=name != "train"):
            return f"{name} (line {line} of {Path(script).name})"
    return None


@functools.lru_cache(8)
def _parsed(text):
    return provenance.parsed(text)


def _first_use(node, cfg, length, comparisons):
    """The line of the first use of a length below a node of the syntax tree, else None."""
    if isinstance(node, ast.Compare) and not comparisons:
        return None
    names = {getattr(node, "attr", None), getattr(node, "id", None), getattr(node, "value", None)}
    if length in {x for x in names if isinstance(x, str)}:
        return node.lineno
    for child in _reached(node, cfg):
        if line := _first_use(child, cfg, length, comparisons):
            return line
    return None


def _reached(node, cfg):
    """The parts of a node that can run: of `if cfg.field` only the branch that is chosen."""
    test = getattr(node, "test", None)
    is_field = isinstance(test, ast.Attribute) and isinstance(test.value, ast.Name)
    if not isinstance(node, ast.If | ast.IfExp) or not is_field:
        return list(ast.iter_child_nodes(node))
    if test.value.id != "cfg" or not hasattr(cfg, test.attr) or test.attr in LENGTHS:
        return list(ast.iter_child_nodes(node))
    branch = node.body if getattr(cfg, test.attr) else node.orelse
    return branch if isinstance(branch, list) else [branch]


# --- Resuming with other values -----------------------------------------------------------------
def reached(folder):
    """The update of the newest checkpoint in a run folder, 0 where there is none."""
    saved = (Path(folder) / "checkpoints").glob("*")
    return max((int(path.name) for path in saved if path.name.isdigit()), default=0)


def check(folder, before, cfg, script):
    """Exit with code 2 after one line, where a run cannot take its new numbers of updates.

    Args:
        folder: the run folder.
        before: its values so far.
        cfg: the Config with which it is resumed.
        script: the algorithm's file.
    """
    updates = reached(folder)
    for length in LENGTHS:
        was, now = before.get(length, 0), getattr(cfg, length, 0)
        if was == now:
            continue
        if updates > phases.last_update(cfg):
            least = updates - phases.last_update(cfg) + now  # the other phase has the rest
            fail(
                f"{folder} has trained for {updates} updates already, more than "
                f"{ranges.flag(length)} {now}; give at least {least} or choose another --name"
            )
        if length == "num_updates" and phases.online_updates(cfg) and updates > was:
            fail(
                f"{folder} is in its online phase, which began after num_updates {was}; resume "
                "with that or choose another --name"
            )
        if where := length_dependence(script, cfg, length):
            fail(
                f"{folder} was begun with {length} {was}, and {where} depends on it, so with "
                f"{now} all of its updates differ; choose another --name"
            )


def find(folder, values, cfg, script):
    """The run that `--resume` without `--name` continues, where its default folder is not there.

    The default name is a hash of the config, so a run that was begun with fewer updates or with
    other evaluations has another one. It is the run to continue if nothing else differs. Where the
    algorithm depends on the length, no run can be continued with another one. Then this exits with
    code 2 after one line: a new run would begin at update 0, unnoticed.

    Args:
        folder: the default folder of this config.
        values: the resolved config.
        cfg: the Config.
        script: the algorithm's file.
    """
    found, another = [], None
    for file in sorted(folder.parent.glob("[0-9a-f]" * 8 + "/config.yaml")):
        before = _values(file)
        keys = {*before, *values} - {*MAY_CHANGE, "record"}
        # A field that is newer than the run has its default there: `run_folder` looks closer.
        same = all(before.get(key, values.get(key)) == values.get(key) for key in keys)
        longer = [x for x in LENGTHS if before.get(x, 0) != getattr(cfg, x, 0)]
        if not before or not same or reached(file.parent) > phases.last_update(cfg):
            continue
        depends = [x for x in longer if length_dependence(script, cfg, x)]
        if not depends:
            found.append(file.parent)
        elif reached(file.parent) and another is None:
            another = file.parent, depends[0], before.get(depends[0], 0)
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        fail(f"{folder.parent}: --resume could continue {names}; say which one with --name")
    if another and not found:
        run, length, was = another
        where, now = length_dependence(script, cfg, length), getattr(cfg, length)
        fail(
            f"{run} was begun with {length} {was}, and {where} depends on it, so --resume cannot "
            f"continue it with {now}; for a new run from update 0, give it a --name or leave out "
            "--resume"
        )
    return found[0] if found else folder


def _values(file):
    """The values of a run's config.yaml, {} where it cannot be read."""
    import yaml

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}

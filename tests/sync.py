# SPDX-License-Identifier: Apache-2.0
"""Same name, same body: keeps the copies of a top-level definition equal over `algorithms/`.

    python tests/sync.py                                 print the drift, exit 1 if there is any
    python tests/sync.py update_target --from td3_bc.py  rewrite it in every file that has it

Functions, classes and assignments count, with their decorators, comments and blank lines. Only
`OWN` names and losses may differ between files.
"""

import argparse
import ast
import collections
import os
import sys
from pathlib import Path

ALGORITHMS = Path(__file__).resolve().parents[1] / "algorithms"
OWN = {"Config", "State", "create_state", "update", "train_chunk", "policy", "policy_params"}
OWN |= {"online_update", "online_chunk", "online_rows", "clone_update"}
OWN |= {"policy_fn", "explore", "initial_memory", "train"}  # and every *_loss
BANNER = "# ---"


def is_own(name):
    return name in OWN or name.endswith("_loss")


def spans(text):
    """[(name, first line, line after the last one)] of the top-level definitions, from 0."""
    lines, found = text.splitlines(), []
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            parts = [part for target in targets for part in ast.walk(target)]
            names = [part.id for part in parts if isinstance(part, ast.Name)]
        else:
            continue
        decorators = [decorator.lineno for decorator in getattr(node, "decorator_list", [])]
        start, stop = min([node.lineno, *decorators]) - 1, node.end_lineno
        while (
            start and lines[start - 1].startswith("#") and not lines[start - 1].startswith(BANNER)
        ):
            start -= 1  # the comment right above
        while stop < len(lines) and lines[stop].startswith((" ", "\t")):
            stop += 1  # a comment that ends the body
        found += [(name, start, stop) for name in names]
    return found


def definitions(path):
    """{name: source text} of the top-level definitions of a file."""
    text = Path(path).read_text()
    lines, bodies = text.splitlines(), collections.defaultdict(list)
    for name, start, stop in spans(text):
        bodies[name].append("\n".join(lines[start:stop]))
    return {name: "\n".join(parts) for name, parts in bodies.items()}


def drift(folder=ALGORITHMS, files=None):
    """{name: [[file names with one body], [with another], ...]} of what should be equal.

    Over all files of the folder, or over `files`.
    """
    bodies = collections.defaultdict(lambda: collections.defaultdict(list))
    for path in files or sorted(Path(folder).glob("*.py")):
        for name, body in definitions(path).items():
            if not is_own(name):
                bodies[name][body].append(path.name)
    return {name: list(files.values()) for name, files in bodies.items() if len(files) > 1}


def propagate(name, source, folder=ALGORITHMS):
    """Rewrite `name` as it stands in `source` in every other file that has it.

    Returns:
        Names of the changed files.

    Raises:
        ValueError: no such file or definition, a file's own name, or a name defined twice.
    """
    folder = Path(folder)
    path = folder / Path(source).name
    if is_own(name):
        raise ValueError(f"{name}: belongs to each file, it is never propagated")
    if not path.exists():
        raise ValueError(f"--from {source}: no such file in {folder}")
    body = definitions(path).get(name)
    if body is None:
        raise ValueError(f"{name}: no top-level definition of that name in {path.name}")
    texts = {}
    for other in sorted(folder.glob("*.py")):
        text = other.read_text()
        places = [(start, stop) for found, start, stop in spans(text) if found == name]
        if len(places) > 1:
            raise ValueError(f"{name}: defined {len(places)} times in {other.name}")
        for start, stop in places:
            lines = text.splitlines()
            new = "\n".join([*lines[:start], body, *lines[stop:]]) + "\n"
            ast.parse(new)
            if new != text:
                texts[other] = new
    for other, text in texts.items():  # nothing is written before all of it is known to be right
        part = other.with_name(other.name + ".part")
        part.write_text(text)
        os.replace(part, other)
    return [other.name for other in texts]


def fail(message):
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", help="top-level definition to propagate")
    parser.add_argument("--from", dest="source", metavar="FILE", help="the file that has it right")
    parser.add_argument("--folder", default=ALGORITHMS, help="default: algorithms/")
    parser.error = fail
    options = parser.parse_args(argv)
    if not Path(options.folder).is_dir():
        fail(f"--folder {options.folder}: no such folder")
    if (options.name is None) != (options.source is None):
        fail("a name and --from FILE go together, as in: sync.py update_target --from td3_bc.py")
    try:
        if options.name is None:
            found = drift(options.folder)
            for name, groups in found.items():
                print(f"{name}: {' != '.join(', '.join(group) for group in groups)}")
            return int(bool(found))
        changed = propagate(options.name, options.source, options.folder)
    except SyntaxError as error:
        fail(f"{error.filename or options.folder}: not valid Python ({error})")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        fail(error)
    print("\n".join(changed) if changed else f"{options.name}: equal everywhere already")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

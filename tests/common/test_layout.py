# SPDX-License-Identifier: Apache-2.0
"""The floors of common/: a module imports its own floor or a lower one, and there is no circle.

Read off the text of the modules, imports inside functions included.
"""

import ast
import functools
import re
import shutil
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMON = ROOT / "common"
# Every other module lies below the rooms. Evaluation stands beside experiment: neither imports the
# other. Interaction, the online phase of a run, stands on experiment.
FLOORS = {"envs": 1, "recipes": 2, "datasets": 3, "experiment": 4, "evaluation": 4}
FLOORS |= {"interaction": 5}
PROGRAMS = 6  # a room's __main__ may import every room, and nothing imports it


def modules(common):
    """{name: file} of every module, "common.envs" for common/envs/__init__.py."""
    found = {}
    for file in sorted(common.rglob("*.py")):
        parts = file.relative_to(common.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = file
    return found


@functools.cache
def import_nodes(text):
    """Every import of a module's text, those inside functions too."""
    kinds = ast.Import | ast.ImportFrom
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]


def imports(file, known):
    """The modules of common/ that a file imports. Of a package's name: the package itself."""
    found = set()
    for node in import_nodes(file.read_text()):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            assert not node.level, f"{file}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.append(inner if inner in known else node.module)
        for name in names:
            if name.split(".")[0] == "common":
                found.add(name)
    return found


def room(name):
    return name.split(".")[1] if "." in name else "common"


def floor(name):
    return PROGRAMS if name.endswith(".__main__") else FLOORS.get(room(name), 0)


def upward(graph):
    """Imports of a higher floor, and between the two rooms of the top floor."""
    problems = []
    for name, imported in graph.items():
        for other in sorted(imported):
            here, there = floor(name), floor(other)
            beside = here == there and room(name) != room(other) and here > 0
            if there > here or beside:
                problems.append(f"{name} imports {other}")
    return problems


def circle(graph):
    """The names of modules that import each other in a circle, [] if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def graph_of(common):
    known = modules(common)
    graph = {name: imports(file, known) for name, file in known.items()}
    unknown = set().union(*graph.values()) - {*known}
    assert not unknown, f"imports of modules that do not exist: {unknown}"
    return graph


def test_no_module_imports_a_higher_floor():
    assert upward(graph_of(COMMON)) == []


def test_no_two_modules_import_each_other():
    assert circle(graph_of(COMMON)) == []


def test_every_file_is_in_a_room_or_below_them():
    """A new file in the root of common/ is a decision: name it here."""
    assert {file.stem for file in COMMON.glob("*.py")} == {
        "__init__",
        "command_line",
        "evaluation",
        "files",
        "folders",
        "interaction",
        "machine",
        "threads",
    }
    rooms = {x.name for x in COMMON.iterdir() if (x / "__init__.py").exists()}
    assert rooms == {*FLOORS} - {"evaluation", "interaction"}


def test_a_room_opens_with_its_public_interface_and_nothing_else():
    for name in FLOORS:
        file = COMMON / name / "__init__.py"
        if not file.exists():
            continue
        documentation, *rest = ast.parse(file.read_text()).body
        assert isinstance(documentation.value.value, str)
        *from_imports, names = rest
        assert all(isinstance(node, ast.ImportFrom) for node in from_imports), name
        public = {alias.asname or alias.name for node in from_imports for alias in node.names}
        assert public == set(ast.literal_eval(names.value)) and names.targets[0].id == "__all__"


@pytest.mark.parametrize(
    ("file", "line", "upward_import", "in_circle"),
    [
        ("envs/pointmaze.py", "import common.datasets.views", "common.datasets.views", False),
        ("files.py", "from common import envs", "common.envs", False),
        ("recipes/ogbench.py", "from common.datasets import names", "common.datasets.names", True),
        (
            "evaluation.py",
            "from common.experiment import config",
            "common.experiment.config",
            False,
        ),
        ("experiment/config.py", "from common import evaluation", "common.evaluation", False),
        (
            "experiment/look.py",
            "import common.datasets.__main__",
            "common.datasets.__main__",
            False,
        ),
        ("datasets/hdf5.py", "from common.datasets.d4rl import read", None, True),
        ("datasets/dataset.py", "from common import datasets", None, True),
        ("experiment/ranges.py", "from common.experiment.config import parse", None, True),
    ],
)
@pytest.mark.parametrize("inside", [False, True], ids=["at the top", "inside a function"])
def test_a_spoilt_copy_is_found(tmp_path, file, line, upward_import, in_circle, inside):
    copy = tmp_path / "common"
    shutil.copytree(COMMON, copy, ignore=shutil.ignore_patterns("__pycache__"))
    text = f"\n\ndef late():\n    {line}\n" if inside else f"\n{line}\n"
    with (copy / file).open("a") as out:
        out.write(text)
    graph = graph_of(copy)
    name = "common." + file.removesuffix(".py").replace("/", ".")
    assert upward(graph) == ([] if upward_import is None else [f"{name} imports {upward_import}"])
    assert bool(circle(graph)) == in_circle


def test_every_room_is_installed_with_its_data():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    rooms = {f"common.{file.parent.name}" for file in COMMON.glob("*/__init__.py")}
    assert {*settings["packages"]} == {"algorithms", "common"} | rooms
    data = {file.relative_to(ROOT).parent.as_posix() for file in COMMON.rglob("*.csv")}
    assert {name.replace(".", "/") for name in settings["package-data"]} == data


# --- What JAX has not made public ---------------------------------------------------------------
def test_private_parts_of_jax_are_used_in_one_file_only():
    used = [
        x
        for x in modules(COMMON).values()
        if re.search(r"^.*import.*jax\._src|^from jax\._src", x.read_text(), re.M)
    ]
    assert used == [COMMON / "experiment" / "processes.py"]


def test_jax_offers_no_public_key_value_store_yet():
    """If this fails, see whether processes.py can use a public name instead of `jax._src`."""
    public = {name for name in dir(jax.distributed) if not name.startswith("_")}
    assert public <= {"initialize", "is_initialized", "shutdown"}

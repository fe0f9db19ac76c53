# SPDX-License-Identifier: Apache-2.0
"""House rules that can be read off the text of the files: no JAX, no data, under a second.

Every check returns a list of problems, is empty on the real files and is shown to find something
on a spoilt copy of one.
"""

import ast
import functools
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import own_files
import pytest
import sync
import yaml

NESTED_DEFS = 2
# Longer ones are a warning, for a reviewer to look at: no file is cut to fit a number.
FILE_LINES, FUNCTION_LINES, CONFIG_FIELDS = 400, 50, 35

SECTIONS = ("Config", "Networks", "State", "Losses", "Update", "Policy", "Training")
BANNERS = [f"# --- {name} ".ljust(98, "-") for name in SECTIONS]
HOME = {  # names whose section is fixed; every *_loss lives in Losses
    "Config": "Config",
    "State": "State",
    "create_state": "State",
    "update": "Update",
    "train_chunk": "Update",
    "policy": "Policy",
    "policy_params": "Policy",
    "policy_fn": "Policy",
    "train": "Training",
}
LOSSES = (
    "critic_loss",
    "value_loss",
    "actor_loss",
    "temperature_loss",
)  # in this order, then others
LABELS = ("Paper", "Reference", "Run", "Parent", "Results", "Deviations")
PACKAGES = {"jax", "flax", "optax", "chex", "common"} | sys.stdlib_module_names
IN_YAML = {"dataset", "datasets", "env", "env_steps"}  # keys beside the fields of Config
MAIN = 'if __name__ == "__main__":\n    train(*experiment.parse(Config))\n'

ROOT = Path(__file__).resolve().parents[1]
FILES, YAMLS = own_files.FILES, own_files.YAMLS
COMMON = sorted((ROOT / "common").rglob("*.py"))
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def parse(text):
    return ast.parse(text)


def read(path):
    text = path.read_text()
    return text, text.splitlines(), parse(text)


def config_class(tree):
    return next(x for x in tree.body if isinstance(x, ast.ClassDef) and x.name == "Config")


def config_fields(tree):
    """{field: its AST node}"""
    body = config_class(tree).body
    return {x.target.id: x for x in body if isinstance(x, ast.AnnAssign)}


# --- Checks of one algorithm file ---------------------------------------------------------------
def check_sections(path):
    """The same banners in the same order, the fixed names under theirs, a two-line main."""
    text, lines, tree = read(path)
    found = [line for line in lines if line.startswith("# --")]
    if found != BANNERS:
        return [f"section headers are {found}, wanted {BANNERS}"]
    problems, starts = [], [lines.index(banner) for banner in BANNERS]
    names = [x for x in tree.body if isinstance(x, FUNCTIONS | ast.ClassDef)]
    for node in names:
        section = [s for s, start in zip(SECTIONS, starts, strict=True) if start < node.lineno]
        wanted = "Losses" if node.name.endswith("_loss") else HOME.get(node.name)
        if not section or (wanted and section[-1] != wanted):
            problems.append(f"{node.name} is not in section {wanted}")
    problems += [f"no {name}" for name in HOME if name not in [node.name for node in names]]
    losses = [node.name for node in names if node.name.endswith("_loss")]
    rank = [LOSSES.index(name) if name in LOSSES else len(LOSSES) for name in losses]
    if rank != sorted(rank):
        problems.append(f"losses in the order {losses}")
    if not text.endswith("\n\n\n" + MAIN):
        problems.append("does not end with the two lines of __main__")
    return problems


def check_top_level(path):
    """Nothing but imports, definitions and main, so that nothing escapes the drift check."""
    _, _, tree = read(path)
    definitions = FUNCTIONS | ast.ClassDef | ast.Assign | ast.AnnAssign
    problems = []
    for node in tree.body[1:]:
        is_main = node is tree.body[-1] and isinstance(node, ast.If)
        if not isinstance(node, ast.Import | ast.ImportFrom | definitions) and not is_main:
            problems.append(f"line {node.lineno}: {type(node).__name__} at top level")
    names = [name for name, _, _ in sync.spans(read(path)[0])]
    problems += [f"{name} is defined twice" for name in {*names} if names.count(name) > 1]
    return problems


def check_docstring(path):
    _, _, tree = read(path)
    docstring = ast.get_docstring(tree, clean=False)
    if docstring is None:
        return ["no module docstring"]
    lines = docstring.splitlines()
    problems = []
    labels = [line.split()[0] for line in lines if re.match(r"[A-Z]\w+ {2,}\S", line)]
    if labels != [*LABELS]:
        problems.append(f"docstring labels are {labels}, wanted {[*LABELS]}")
    for line in lines:
        if line.split(" ")[0] in LABELS and not re.match(r".{11} \S", line):
            problems.append(f"not aligned to column 12: {line!r}")
    if not any(line.startswith("Shapes: ") for line in lines):
        problems.append("docstring without a 'Shapes:' line")
    run = re.search(r"^Run +python algorithms/(\w+)\.py(?: --config (\S+))?$", docstring, re.M)
    if not run or run[1] != path.stem:
        problems.append("the Run line does not run this file")
    elif run[2] and not (ROOT / run[2]).exists():
        problems.append(f"the Run line names {run[2]}, which does not exist")
    return problems


def check_parent(path):
    """The Parent line tells the size of the diff, module docstring and Config aside."""
    docstring = ast.get_docstring(read(path)[2], clean=False) or ""
    match = re.search(r"^Parent +(?:none|(\w+)\.py \((\d+) lines?\))$", docstring, re.M)
    if not match:
        return ["no line 'Parent  none' or 'Parent  file.py (27 lines)'"]
    if match[1] is None:
        return []
    parent = path.with_name(match[1] + ".py")
    if parent == path or not parent.exists():
        return [f"parent {parent.name} is not another file beside it"]
    size = diff_size(parent, path)
    if size != int(match[2]):
        return [f"Parent line says {match[2]} lines, the diff to {parent.name} has {size}"]
    return []


def diff_size(parent, child):
    """`git diff --numstat` added + removed, without module docstring and Config."""
    with tempfile.TemporaryDirectory() as folder:
        for name, path in (("parent", parent), ("child", child)):
            _, lines, tree = read(path)
            config = config_class(tree)
            start = min([config.lineno, *(x.lineno for x in config.decorator_list)]) - 1
            skipped = {*range(tree.body[0].end_lineno), *range(start, config.end_lineno)}
            rest = [line for i, line in enumerate(lines) if i not in skipped]
            Path(folder, name).write_text("\n".join(rest) + "\n")
        command = "git -c diff.algorithm=myers diff --no-index --no-ext-diff --numstat parent child"
        alone = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
        done = subprocess.run(
            command.split(), cwd=folder, env=os.environ | alone, capture_output=True, text=True
        )
    assert done.returncode in (0, 1), done.stderr
    return sum(map(int, done.stdout.split()[:2])) if done.stdout else 0


def functions(tree, depth=0):
    """[(function, how many defs deep)] of a file."""
    found = []
    for child in ast.iter_child_nodes(tree):
        inner = depth + isinstance(child, FUNCTIONS)
        if inner > depth:
            found.append((child, inner))
        found += functions(child, inner)
    return found


def check_nesting(path):
    """A reader keeps two scopes in mind, not three."""
    return [
        f"{function.name} is a def {depth} deep, at most {NESTED_DEFS}"
        for function, depth in functions(read(path)[2])
        if depth > NESTED_DEFS
    ]


def lengths(path):
    """What is unusually long: a warning and no problem, since length serves the reader."""
    _, lines, tree = read(path)
    found = []
    if len(lines) > FILE_LINES:
        found.append(f"{len(lines)} lines, most files have at most {FILE_LINES}")
    if len(config_fields(tree)) > CONFIG_FIELDS:
        found.append(f"{len(config_fields(tree))} Config fields, most have at most {CONFIG_FIELDS}")
    for function, _ in functions(tree):
        count = function.end_lineno - function.lineno + 1
        if count > FUNCTION_LINES:
            found.append(f"{function.name} has {count} lines, most have at most {FUNCTION_LINES}")
    return found


@functools.cache
def attributes(path, text):
    """Names read as `cfg.<name>` or `<anything>.cfg.<name>` in a file."""
    found = [x for x in ast.walk(parse(text)) if isinstance(x, ast.Attribute)]
    return {
        x.attr
        for x in found
        if isinstance(x.ctx, ast.Load)
        and "cfg" in (getattr(x.value, "id", None), getattr(x.value, "attr", None))
    }


def check_config(path):
    """Every field has a default and a trailing comment and is read; nothing else is."""
    text, lines, tree = read(path)
    own = attributes(path, text)
    shared = set().union(*(attributes(x, x.read_text()) for x in COMMON))
    problems = []
    for name, node in config_fields(tree).items():
        if not re.search(r"  # \S", lines[node.end_lineno - 1]):
            problems.append(f"Config.{name} has no trailing comment")
        if node.value is None:
            problems.append(f"Config.{name} has no default")
        if name not in own | shared:
            problems.append(f"Config.{name} is never read as cfg.{name}")
    unknown = own - {*config_fields(tree)}
    return problems + [f"cfg.{name} is read but no field of Config" for name in sorted(unknown)]


def check_imports(path):
    _, _, tree = read(path)
    problems = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = ["." if node.level else node.module]
        for name in names:
            if name.split(".")[0] not in PACKAGES:
                problems.append(f"line {node.lineno}: imports {name}")
    return problems


def check_no_try(path):
    """Validation is common/'s and JAX's business; an algorithm hides no error."""
    found = [x for x in ast.walk(read(path)[2]) if isinstance(x, ast.Try | ast.TryStar)]
    return [f"line {x.lineno}: try in an algorithm file" for x in found]


CHECKS = (
    check_sections,
    check_top_level,
    check_docstring,
    check_parent,
    check_nesting,
    check_config,
    check_imports,
    check_no_try,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_algorithm_file(path, check):
    assert check(path) == []


class LongCode(UserWarning):
    """Something to look at in review."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_length(path):
    for found in lengths(path):
        warnings.warn(f"{path.name}: {found}", LongCode, stacklevel=1)


def test_same_name_same_body():
    assert sync.drift(files=FILES) == {}


# --- Checks of the rest -------------------------------------------------------------------------
def check_yaml(path, algorithm):
    """Known keys, no doubles, a default data set, a source, and overrides only."""
    text = path.read_text()
    tree = parse(algorithm.read_text())
    fields = config_fields(tree)
    root = yaml.compose(text)
    if not isinstance(root, yaml.MappingNode):
        return ["not a mapping"]
    rows = [node for key, node in root.value if key.value == "datasets"]
    mappings = [("", root)]
    for row in rows:
        mappings += [(f"datasets: {key.value}: ", node) for key, node in row.value]
    problems = []
    for where, node in mappings:
        keys = [key.value for key, _ in node.value]
        known = {*fields, *IN_YAML} if node is root else {*fields, "env", "env_steps"}
        problems += [f"{where}unknown key {key!r}" for key in keys if key not in known]
    for where, node in [*mappings, *(("datasets: ", row) for row in rows)]:
        keys = [key.value for key, _ in node.value]
        problems += [f"{where}key {key!r} twice" for key in sorted(keys) if keys.count(key) > 1]
    values = yaml.safe_load(text)
    if not isinstance(values.get("dataset"), str):
        problems.append("no default dataset")
    if not re.search(r"^# Sources\n#   \S", text, re.MULTILINE):
        problems.append("no '# Sources' comment")
    for name in {*values} & {*fields} - {"dataset"}:
        default = ast.literal_eval(fields[name].value)
        value = tuple(values[name]) if isinstance(values[name], list) else values[name]
        if value == default:
            problems.append(f"{name}: {value} is the default of Config already")
    return problems


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_yaml(path):
    algorithm = ROOT / "algorithms" / f"{path.parent.name}.py"
    assert algorithm.exists(), f"{path.parent} belongs to no algorithm"
    assert check_yaml(path, algorithm) == []


def check_common(path, names):
    _, lines, tree = read(path)
    problems = []
    for node in ast.walk(tree):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if any(module.split(".")[0] == "algorithms" for module in modules):
            problems.append(f"line {node.lineno}: imports from algorithms")
    for number, line in enumerate(lines, 1):
        for name in names:
            if re.search(rf"\b{name}\b", line, re.IGNORECASE):
                problems.append(f"line {number} names the algorithm {name}")
    return problems


@pytest.mark.parametrize("path", COMMON, ids=lambda path: str(path.relative_to(ROOT)))
def test_common(path):
    assert check_common(path, [path.stem for path in FILES]) == []


# --- The checks find what they look for ---------------------------------------------------------
REBRAC = ROOT / "algorithms" / "rebrac.py"


def test_there_are_files():
    assert REBRAC in FILES and YAMLS and ROOT / "common" / "experiment" / "run.py" in COMMON


PARENT = re.search("^Parent .*", REBRAC.read_text(), re.M)[0]
SPOILT = [  # (check, text to replace, replacement, part of the problem reported)
    (check_sections, "# --- State --", "# --- States --", "section headers"),
    (check_sections, BANNERS[4] + "\n", "", "section headers"),
    (check_sections, "# --- Update ---", "# --- Update -- ---", "section headers"),
    (check_sections, "def policy_params(", "def acting_params(", "no policy_params"),
    (check_sections, "def create_state(", "def create_loss(", "create_loss is not in section"),
    (check_sections, "def critic_loss(", "def temperature_loss(", "losses in the order"),
    (check_sections, MAIN, MAIN + "    print()\n", "__main__"),
    (check_top_level, "from common import", "print()\nfrom common import", "Expr at top level"),
    (check_top_level, "\n\nclass State(", "\n\nclass Actor(", "Actor is defined twice"),
    (check_docstring, "Results     ", "Result      ", "docstring labels"),
    (check_docstring, "Reference   https", "Reference  https", "not aligned"),
    (check_docstring, "Shapes: ", "Letters: ", "Shapes:"),
    (check_docstring, "algorithms/rebrac.py --", "algorithms/other.py --", "Run line"),
    (check_docstring, "rebrac/antmaze.yaml", "rebrac/absent.yaml", "does not exist"),
    (check_parent, PARENT, "Parent      one.py", "no line 'Parent"),
    (check_parent, PARENT, "Parent      absent.py (3 lines)", "not another file"),
    (check_parent, PARENT, "Parent      rebrac.py (0 lines)", "not another file"),
    (
        check_nesting,
        "        return jax.random.uniform(",
        "        def deep():\n            pass\n\n        return jax.random.uniform(",
        "deep is a def 3",
    ),
    (check_config, "  # Adam", "", "no trailing comment"),
    (check_config, "int = 2  # critic updates", "int  # critic updates", "has no default"),
    (check_config, "cfg.reward_scale * ", "", "reward_scale is never read"),
    (check_config, "cfg.reward_scale * ", "cfg.scale * ", "cfg.scale is read but"),
    (check_imports, "import optax", "import numpy as np\nimport optax", "imports numpy"),
    (check_imports, "from common import", "from algorithms import", "imports algorithms"),
    (check_imports, "from common import", "from . import", "imports ."),
    (
        check_no_try,
        "    return state.actor.params",
        "    try:\n        return state.actor.params\n    except KeyError:\n        pass",
        "try in an",
    ),
]


@pytest.mark.parametrize(("check", "old", "new", "problem"), SPOILT)
def test_a_spoilt_file_is_found(tmp_path, check, old, new, problem):
    text = REBRAC.read_text()
    assert old in text
    path = tmp_path / "rebrac.py"
    path.write_text(text.replace(old, new))
    assert any(problem in found for found in check(path)), check(path)


@pytest.mark.parametrize(
    ("old", "new", "warning"),
    [
        (MAIN, "# filler\n" * FILE_LINES + "\n\n" + MAIN, "lines, most files"),
        ("    # ReBRAC\n", "".join(f"    x{i}: int = 1\n" for i in range(40)), "Config fields"),
        ("    critic_metrics = []\n", "    critic_metrics = []\n" * 40, "update has"),
    ],
)
def test_what_is_long_is_a_warning(tmp_path, old, new, warning):
    text = REBRAC.read_text()
    assert old in text and lengths(REBRAC) == []
    path = tmp_path / "rebrac.py"
    path.write_text(text.replace(old, new))
    assert any(warning in found for found in lengths(path))
    with pytest.warns(LongCode, match=warning):
        test_length(path)


def test_a_stale_parent_number_is_found(tmp_path):
    parent, child = tmp_path / "parent.py", tmp_path / "child.py"
    text = REBRAC.read_text()
    parent.write_text(text)
    # One line changed in the code counts as two; docstring and Config do not count.
    text = text.replace("    return state.actor.params\n", "    return state.actor\n")
    text = text.replace("K critics, ", "").replace("discount: float = 0.99", "discount: float = 1")
    child.write_text(text.replace(PARENT, "Parent      parent.py (2 lines)"))
    assert check_parent(child) == []
    child.write_text(text.replace(PARENT, "Parent      parent.py (3 lines)"))
    assert "has 2" in check_parent(child)[0]
    child.write_text(REBRAC.read_text().replace(PARENT, "Parent      parent.py (0 lines)"))
    assert check_parent(child) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("discount: 0.999", "gamma: 0.999", "unknown key 'gamma'"),
        (
            "{actor_penalty: 0.003, critic_penalty: 0.002}",
            "{beta: 1}",
            "umaze-v2: unknown key 'beta'",
        ),
        ("eval_every: 100000", "eval_every: 100000\neval_every: 100000", "'eval_every' twice"),
        ("antmaze-medium-play-v2:", "antmaze-umaze-v2:", "'antmaze-umaze-v2' twice"),
        ("dataset: antmaze-umaze-v2", "", "no default dataset"),
        ("discount: 0.999", "discount: 0.99", "default of Config already"),
    ],
)
def test_a_spoilt_yaml_is_found(tmp_path, old, new, problem):
    text = (ROOT / "configs/rebrac/antmaze.yaml").read_text()
    assert old in text
    path = tmp_path / "antmaze.yaml"
    path.write_text(text.replace(old, new, 1))
    assert any(problem in found for found in check_yaml(path, REBRAC)), check_yaml(path, REBRAC)


def test_a_yaml_without_a_source_is_found(tmp_path):
    path = tmp_path / "suite.yaml"
    path.write_text("# Some values.\ndataset: a\n")
    assert check_yaml(path, REBRAC) == ["no '# Sources' comment"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("from algorithms import rebrac\n", "imports from algorithms"),
        ("import algorithms.rebrac\n", "imports from algorithms"),
        ('if name == "rebrac":\n    pass\n', "names the algorithm rebrac"),
        ("# as in ReBRAC\n", "names the algorithm rebrac"),
    ],
)
def test_a_spoilt_common_file_is_found(tmp_path, text, problem):
    path = tmp_path / "__init__.py"
    path.write_text(text)
    assert any(problem in found for found in check_common(path, ["rebrac"]))

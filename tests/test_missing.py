# SPDX-License-Identifier: Apache-2.0
"""Every file of the project is complete; a user's own file is left alone by the tests."""

import ast
import os
import shutil
import subprocess
import sys

import missing
import own_files
import pytest

ROOT = own_files.ROOT


@pytest.mark.parametrize("path", own_files.FILES, ids=lambda path: path.stem)
def test_nothing_is_missing(path):
    assert missing.places(path.stem) == []


def test_rows_of_the_table_are_the_projects_files():
    assert len(own_files.NAMES) >= 17 and "rebrac" in own_files.NAMES
    text = "| [IQL](x) | [iql.py](algorithms/iql.py) | |\nSee [bc](algorithms/bc.py).\n"
    assert own_files.in_readme(text) == ["iql"]


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """A copy of the checkout, without git, with a user's two files and a config."""
    folder = tmp_path_factory.mktemp("fork") / "my copy"
    for part in ("common", "tests", "benchmarks/sweeps"):
        shutil.copytree(
            ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", ".*")
        )
    (folder / "algorithms").mkdir()
    for path in own_files.FILES:  # not what a user's checkout has beside them
        shutil.copyfile(path, folder / "algorithms" / path.name)
        shutil.copytree(ROOT / "configs" / path.stem, folder / "configs" / path.stem)
    for name in ("README.md", "pyproject.toml"):
        shutil.copyfile(ROOT / name, folder / name)
    for path in [*folder.rglob("*")]:  # the checkout may be read-only
        path.chmod(0o755 if path.is_dir() else 0o644)
    own = (ROOT / "algorithms" / "iql.py").read_text(encoding="utf-8")
    own = own.replace("def update_target(", "def update_target(  # mine\n    ")
    (folder / "algorithms" / "my_iql.py").write_text(own, encoding="utf-8")
    (folder / "algorithms" / "begun.py").write_text("def train(\n")
    (folder / "configs" / "my_iql").mkdir()
    (folder / "configs" / "my_iql" / "robot.yaml").write_text("dataset: robot.hdf5\nown: 1\n")
    return folder


def python(folder, *words):
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_users_own_file_fails_no_test(fork):
    """The house rules run here; the other tests are parametrized over the project's names."""
    code, said = python(
        fork, "-m", "pytest", "-q", "-n", "0", "tests/test_static.py", "tests/test_sync.py"
    )
    assert code == 0, said
    globs = [
        f"{path.relative_to(ROOT)}: {ast.unparse(node)}"
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and getattr(node.func, "attr", "") in ("glob", "rglob")
        and ("'algorithms'" in ast.unparse(node) or "'configs'" in ast.unparse(node))
    ]
    assert globs == []


def test_what_is_missing_is_listed(fork):
    code, said = python(fork, "tests/missing.py", "algorithms/my_iql.py")
    assert code == 1, said
    for part in (
        "my_iql.py: the Run line does not run this file",
        "my_iql.py: update_target is not the same as in the other files",
        "README.md: 0 rows",
        "configs/my_iql/robot.yaml: unknown key 'own'",
        "benchmarks/sweeps/my_iql.yaml",
        "tests/algorithms/test_my_iql.py",
        "tests/algorithms/probes.py",
        "tests/helpers_runs.py",
        "golden.json: no values",
        "golden_tolerances.json: no measured spread",
        "tests/fixtures/parity/my_iql.npz",
        "tests/fixtures/parity/my_iql.md",
        "tests/algorithms/test_parity.py: no case",
    ):
        assert part in said, said
    assert "Traceback" not in said


@pytest.mark.parametrize("name", ["algorithms/absent.py", "tests/missing.py"])
def test_what_is_no_algorithm_file_is_one_line(name, capsys):
    assert missing.main([str(ROOT / name)]) == 2
    assert capsys.readouterr().err.count("\n") == 1

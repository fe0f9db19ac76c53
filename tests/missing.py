# SPDX-License-Identifier: Apache-2.0
"""What an algorithm file still needs before it belongs to the project.

    python tests/missing.py algorithms/my_iql.py   print what is missing, exit 1 if anything is
    python tests/missing.py                        the same for every file that git tracks

Your own file in algorithms/ needs none of it: it runs as it is, and the tests leave it alone.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

# The project first, since tests/ has folders of the same names as the project's.
sys.path.insert(0, str(Path(__file__).resolve().parent / "algorithms"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import golden
import helpers_runs
import own_files
import parity
import probes
import sync
import test_parity
import test_static

ROOT = own_files.ROOT


def places(name):
    """What stands outside of the file itself: README, configs, sweep, tests."""
    found = []
    rows = re.findall(rf"^\|.*\(algorithms/{name}\.py\).*$", (ROOT / "README.md").read_text(), re.M)
    if len(rows) != 1:
        found.append(f"README.md: {len(rows)} rows of the table of methods link to it, wanted one")
    source = (ROOT / "algorithms" / f"{name}.py").read_text()
    parent = re.search(r"^Parent +(\w+)\.py \((\d+) lines?\)$", source, re.M)
    for said in re.findall(r"\| (\w+), (\d+) lines? \|", "".join(rows)):
        if not parent or said != parent.groups():
            found.append("README.md: its row names another parent than the file's Parent line")
    configs = sorted((ROOT / "configs" / name).glob("*.yaml"))
    if not configs:
        found.append(f"configs/{name}/: no config, add at least one <suite>.yaml")
    for path in configs:
        problems = test_static.check_yaml(path, ROOT / "algorithms" / f"{name}.py")
        found += [f"configs/{name}/{path.name}: {problem}" for problem in problems]
    if not (ROOT / "benchmarks" / "sweeps" / f"{name}.yaml").exists():
        found.append(f"benchmarks/sweeps/{name}.yaml: no wandb sweep")
    if not (ROOT / "tests" / "algorithms" / f"test_{name}.py").exists():
        found.append(
            f"tests/algorithms/test_{name}.py: no test of its losses against NumPy or numbers "
            "worked by hand"
        )
    if name not in probes.SMALL:
        found.append("tests/algorithms/probes.py: no small settings in SMALL")
    if name not in helpers_runs.CONTINUOUS + helpers_runs.DISCRETE + helpers_runs.EITHER:
        found.append("tests/helpers_runs.py: not in CONTINUOUS, DISCRETE or EITHER")
    if name not in json.loads(golden.FILE.read_text()):
        found.append(
            f"tests/algorithms/golden.json: no values; python tests/algorithms/golden.py {name}"
        )
    if name not in golden.tolerances():
        found.append(f"tests/algorithms/golden_tolerances.json: no measured spread of {name}")
    for suffix in (".npz", ".md"):
        if not (parity.FOLDER / f"{name}{suffix}").exists():
            found.append(f"tests/fixtures/parity/{name}{suffix}: no numbers of its authors' code")
    if name not in {case.algorithm for case in test_parity.CASES}:
        found.append("tests/algorithms/test_parity.py: no case in CASES")
    return found


def missing(path):
    """[one line for each thing that an algorithm file of the project would need]"""
    path = Path(path)
    try:
        test_static.read(path)
    except SyntaxError as error:
        return [f"{path.name}: not valid Python ({error})"]
    found = []
    for check in test_static.CHECKS:
        found += [f"{path.name}: {problem}" for problem in check(path)]
    others = [other for other in own_files.FILES if other != path]
    for name, groups in sync.drift(files=[*others, path]).items():
        if any(path.name in group for group in groups):
            found.append(f"{path.name}: {name} is not the same as in the other files")
    return found + places(path.stem)


def tracked():
    """Algorithm files that git tracks, beside those in README's table."""
    command = ["git", "ls-files", "--", "algorithms/*.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return sorted({*own_files.FILES, *(ROOT / line for line in done.stdout.splitlines())})


def main(arguments):
    paths = [Path(argument).resolve() for argument in arguments] or tracked()
    for path in paths:
        if path.parent != ROOT / "algorithms" or path.suffix != ".py" or not path.exists():
            print(f"error: {path} is no file of {ROOT / 'algorithms'}", file=sys.stderr)
            return 2
    found = [line for path in paths for line in missing(path)]
    print("\n".join(found) if found else f"nothing is missing ({len(paths)} files)")
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

# SPDX-License-Identifier: Apache-2.0
"""What made a run's numbers: versions of packages, digests of code, the processor."""

import ast
import contextlib
import hashlib
import os
import platform
import re
from importlib import metadata
from pathlib import Path

VERSIONS = ["jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint", "gymnasium"]
VERSIONS += ["gymnasium-robotics", "mujoco", "minari", "ogbench"]


def versions():
    """(name, version) of the packages that matter and are installed."""
    for name in VERSIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            yield name, metadata.version(name)


def code(paths):
    """Digest of what the files do: comments, docstrings and layout do not count."""
    digest = hashlib.sha256()
    for path in paths:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:]
        digest.update(ast.unparse(tree).encode())
    return digest.hexdigest()[:12]


def cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def processor():
    """Number and model of this machine's cores, and how many of them this process may use."""
    model = platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        model = found[1] if found else model
    count = os.cpu_count()
    return f"{'' if cores() == count else f'{cores()} of '}{count} cores of {model}"

# SPDX-License-Identifier: Apache-2.0
"""Versions of the packages and digests of the code behind a run's numbers. No JAX in here."""

import ast
import contextlib
import hashlib
import platform
import threading
from importlib import metadata

VERSIONS = ["jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint", "gymnasium"]
VERSIONS += ["gymnasium-robotics", "mujoco", "minari", "ogbench"]
PARSER = threading.Lock()  # Python 3.11 fails where two threads parse at the same time


def versions():
    """(name, version) of Python and of those packages of VERSIONS that are installed."""
    yield "python", platform.python_version()
    for name in VERSIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            yield name, metadata.version(name)


def code(paths):
    """Digest of what the files do: comments, docstrings and layout do not change it.

    It is the same in every version of Python.
    """
    digest = hashlib.sha256()
    for path in paths:
        tree = parsed(path.read_text(encoding="utf-8"))
        digest.update(repr(_shape(tree)).encode())
    return digest.hexdigest()[:12]


def parsed(text):
    """The syntax tree of a file's text, one thread at a time."""
    with PARSER:
        return ast.parse(text)


def _shape(x):
    """The syntax tree as nested tuples, without docstrings and without empty fields."""
    if isinstance(x, ast.AST):
        fields = ((name, _shape(value)) for name, value in ast.iter_fields(x))
        return type(x).__name__, [(name, shape) for name, shape in fields if shape]
    if isinstance(x, list):
        return [_shape(node) for node in x if not _documents(node)]
    return "" if x is None else repr(x)


def _documents(node):
    return isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)

# SPDX-License-Identifier: Apache-2.0
"""Versions of the packages and digests of the code behind a run's numbers. No JAX in here."""

import ast
import contextlib
import functools
import hashlib
import platform
from importlib import metadata

from common import threads

VERSIONS = ["jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint", "gymnasium"]
VERSIONS += ["gymnasium-robotics", "mujoco", "minari", "ogbench"]


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
    return _digest(tuple(path.read_text(encoding="utf-8") for path in paths))


@functools.lru_cache(maxsize=8)  # one process may begin many runs, and this takes 0.1 s
def _digest(texts):
    digest = hashlib.sha256()
    for text in texts:
        digest.update(_written(parsed(text)).encode())
    return digest.hexdigest()[:12]


def parsed(text):
    """The syntax tree of a file's text, one thread at a time."""
    with threads.ALONE:
        return ast.parse(text)


def _written(node):
    """A syntax tree as text: ('Name', [('field', ...), ...]) without docstrings and empty fields.

    Digests in the records of old runs are of just this text.
    """
    fields = []
    for name, value in ast.iter_fields(node):
        if isinstance(value, list):
            items = [_field(item) for item in value if not _documents(item)]
            if items:
                fields.append(f"('{name}', [{', '.join(items)}])")
        elif value is not None:
            fields.append(f"('{name}', {_field(value)})")
    return f"('{type(node).__name__}', [{', '.join(fields)}])"


def _field(value):
    if isinstance(value, ast.AST):
        return _written(value)
    return "''" if value is None else repr(repr(value))


def _documents(node):
    return isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)

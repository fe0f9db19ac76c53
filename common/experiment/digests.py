# SPDX-License-Identifier: Apache-2.0
"""Digests that tell a change: of the data, of a checkpoint."""

import hashlib
import json
import zlib

import jax
import numpy as np


def of_data(tree) -> str:
    """Digest of all arrays [N, ...] of a tree. It is cheap and no protection against forgery."""
    digest = 0
    for leaf in jax.tree.leaves(tree):
        digest = zlib.crc32(np.ascontiguousarray(leaf).data, digest)
    return f"digest {digest:08x}"


def of_checkpoint(state, meta) -> str:
    """Digest of all arrays and of the facts beside them: a bit that flips on a disk changes it."""
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for leaf in jax.tree.leaves(state):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()

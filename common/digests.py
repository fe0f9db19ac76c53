# SPDX-License-Identifier: Apache-2.0
"""What a run's numbers hang on beside its config and code, and digests that tell a change."""

import hashlib
import json
import zlib

import jax
import numpy as np

from common import processor, provenance

NO_VERSIONS = ("processor", "data", "devices", "reference")  # of what `world` gives


def world(dataset) -> dict[str, str]:
    """Processor, devices, data, scale of the score, versions: a resumed run tells of changes."""
    devices = jax.devices()
    facts = {"processor": processor.name(), "data": of_data(dataset.transitions)}
    facts |= {"devices": f"{len(devices)} x {devices[0].device_kind}"}
    facts |= {"reference": f"{dataset.ref_min_score} to {dataset.ref_max_score}"}
    return facts | dict(provenance.versions())


def of_data(tree) -> str:
    """Of all arrays [N, ...] of a tree; cheap, against changes and not against forgers."""
    digest = 0
    for leaf in jax.tree.leaves(tree):
        digest = zlib.crc32(np.ascontiguousarray(leaf).data, digest)
    return f"digest {digest:08x}"


def of_checkpoint(state, meta) -> str:
    """Of all arrays and of what lies beside them: bits that flip on a disk change it."""
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for leaf in jax.tree.leaves(state):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()

# SPDX-License-Identifier: Apache-2.0
"""What a run's numbers hang on beside its config and code, and digests that tell a change."""

import hashlib
import json
import zlib

import jax
import numpy as np

from common import provenance


def world(dataset) -> dict[str, str]:
    """Processor, devices, data and versions; a resumed run warns of those that changed."""
    devices, data = jax.devices(), 0
    for column in dataset.transitions:
        data = zlib.crc32(np.ascontiguousarray(column).data, data)
    facts = {"processor": provenance.processor(), "data": f"digest {data:08x}"}
    facts |= {"devices": f"{len(devices)} x {devices[0].device_kind}"}
    return facts | dict(provenance.versions())


def of_checkpoint(state, meta) -> str:
    """Of all arrays and of what lies beside them: bits that flip on a disk change it."""
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for leaf in jax.tree.leaves(state):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()

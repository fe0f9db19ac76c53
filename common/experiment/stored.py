# SPDX-License-Identifier: Apache-2.0
"""Read a run folder back."""

import os
from pathlib import Path

import jax

from common import datasets, fail
from common.experiment import checkpoints, config, devices


def load(module, folder):
    """Config, data set and newest saved State (arrays [S, ...]) of a run folder.

    Args:
        module: the algorithm's file, imported.
        folder: the run folder.
    """
    folder = Path(os.path.expanduser(folder))
    cfg, options = config.read_run(folder, module.Config)
    dataset = datasets.load(cfg.dataset, options.env, options.env_steps, actions="any")
    example = jax.tree.map(lambda x: x[:1], dataset.transitions)
    facts = {} if dataset.num_actions is None else {"num_actions": dataset.num_actions}
    create = jax.vmap(lambda key: module.create_state(key, example, cfg, **facts))
    (keys,) = devices.streams(cfg.seeds, 1)
    manager = checkpoints.manager(folder)
    state, meta = checkpoints.restore(manager, create(keys), keep=True)
    if meta is None:
        fail(f"{folder}: no readable checkpoint in it")
    return cfg, dataset, state

# SPDX-License-Identifier: Apache-2.0
"""Measure the updates/s of d3rlpy with our sizes; `throughput.py --peer PYTHON` runs this file.

PYTHON belongs to a virtual environment with d3rlpy (`pip install d3rlpy`). This file imports
nothing of this project. Its argument is JSON with algorithm, hidden, critic_hidden, batch_size,
updates, repeats, rows, observation, action and device ("gpu" is the first GPU, all else the CPU).
The last line that it prints is JSON with updates/s and updates/CPU s, the best of the repeats, and
the versions, device and precision of matrix products. It times `fit` as a user calls it, without
evaluation, log files and progress bar. The first call, which builds the networks, is not timed.
"""

import json
import sys
import time
from importlib import metadata

import d3rlpy
import numpy as np
import torch
from d3rlpy.models.encoders import VectorEncoderFactory


def algorithm(ask):
    """d3rlpy's object for one of our names, with our widths and batch size."""
    plain = VectorEncoderFactory(hidden_units=ask["hidden"])
    critic = VectorEncoderFactory(
        hidden_units=ask["critic_hidden"], use_layer_norm=ask["algorithm"] == "rebrac"
    )
    common = {"batch_size": ask["batch_size"], "actor_encoder_factory": plain}
    common["critic_encoder_factory"] = critic
    if ask["algorithm"] == "iql":
        common["value_encoder_factory"] = plain
    config = {
        "td3_bc": d3rlpy.algos.TD3PlusBCConfig,
        "rebrac": d3rlpy.algos.ReBRACConfig,
        "iql": d3rlpy.algos.IQLConfig,
        "awac": d3rlpy.algos.AWACConfig,
        "cql": d3rlpy.algos.CQLConfig,
    }[ask["algorithm"]]
    return config(**common).create(device=device_of(ask))


def device_of(ask):
    return "cuda:0" if ask["device"] == "gpu" else "cpu:0"


def main(ask):
    """Updates/s of one algorithm on random data."""
    random = np.random.default_rng(0)
    rows = ask["rows"]
    timeouts = np.zeros(rows)
    timeouts[999::1000] = 1
    dataset = d3rlpy.dataset.MDPDataset(
        observations=random.normal(size=(rows, ask["observation"])).astype(np.float32),
        actions=random.uniform(-1, 1, (rows, ask["action"])).astype(np.float32),
        rewards=random.normal(size=rows).astype(np.float32),
        terminals=np.zeros(rows),
        timeouts=timeouts,
    )
    algo, seconds, cpu_seconds = algorithm(ask), [], []
    for number in range(ask["repeats"] + 1):
        start, start_cpu = time.perf_counter(), time.process_time()
        algo.fit(
            dataset,
            n_steps=ask["updates"],
            n_steps_per_epoch=ask["updates"],
            show_progress=False,
            logger_adapter=d3rlpy.logging.NoopAdapterFactory(),
        )
        seconds += [time.perf_counter() - start] if number else []
        cpu_seconds += [time.process_time() - start_cpu] if number else []
    versions = {name: metadata.version(name) for name in ("d3rlpy", "torch")}
    versions["device"] = device_of(ask)
    versions["float32 products"] = torch.get_float32_matmul_precision()
    rates = {"updates/s": ask["updates"] / min(seconds)}
    rates["updates/CPU s"] = ask["updates"] / min(cpu_seconds)
    print(json.dumps(rates | {"versions": versions}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

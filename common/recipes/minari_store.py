# SPDX-License-Identifier: Apache-2.0
"""Store recorded episodes as a Minari data set."""

import os
import shutil
import tempfile
import time
from pathlib import Path

from common import threads


def store(dataset_id, env_id, reference, algorithm, description, episodes, steps):
    """Write the data set under Minari's local root, whole or not at all.

    Args:
        reference: returns that score 0 and 100.
        episodes: iterator over (observation [T + 1, ...], action, reward, termination, truncation
            [T] each). Nothing is recorded where the data set is there already.
        steps: about how many steps there are, for the printed estimate.
    """
    import minari
    from minari.data_collector import EpisodeBuffer
    from minari.storage import get_dataset_path

    root, final = get_dataset_path(), get_dataset_path(dataset_id)
    if (final / "data").exists():
        return
    seconds = steps / 2e4  # 25,000 steps/s were measured on one core
    print(f"making {dataset_id} ({steps:,} steps, about {seconds:.0f} s) in {final}", flush=True)
    names = ("observations", "actions", "rewards", "terminations", "truncations")
    buffers = [EpisodeBuffer(**dict(zip(names, x, strict=True)), infos={}) for x in episodes]
    for folder in root.glob(".making-*"):  # left by a killed run, unless it is in use
        if time.time() - folder.stat().st_mtime > 600:
            shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=root) as temporary:
        # Minari reads its root from the environment at each call. It warns of a missing author.
        with (
            threads.environment("MINARI_DATASETS_PATH", temporary),
            threads.no_warnings(),
        ):
            minari.create_dataset_from_buffers(
                dataset_id,
                buffers,
                env=env_id,
                eval_env=env_id,
                algorithm_name=algorithm,
                description=description,
                ref_min_score=reference[0],
                ref_max_score=reference[1],
                num_episodes_average_score=1000,
                data_format="hdf5",
            )
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.replace(Path(temporary, dataset_id), final)
        except OSError:
            if not (final / "data").exists():  # else another process was first, with the same data
                raise

# SPDX-License-Identifier: Apache-2.0
"""Loaded transitions against those of D4RL's and the authors' loaders, from the same small files.

What their loaders made is in tests/fixtures/parity/loading.npz; loading.md says how. The third
number of an observation is its row in the file.
"""

import h5py
import numpy as np
import parity
import pytest

from common import datasets
from common.datasets import d4rl
from common.datasets.transitions import cut

LIMIT = 8  # steps of an episode in the file without timeouts

# Rows that one side keeps and the other drops; loading.md explains them.
OURS_ONLY = {"timeouts": [], "both_flags": [20, 59], "no_timeouts": [13, 25, 33, 52], "antmaze": []}
THEIRS_ONLY = {"timeouts": [], "both_flags": [], "no_timeouts": [14, 26], "antmaze": [30]}


def load(name, rows, folder):
    if name == "antmaze":  # by its name, `load` would make the simulator's ant
        rows = {column: np.array(x, np.float32) for column, x in rows.items()}
        termination_ends_episode = d4rl.repair("antmaze", rows)
        return cut(rows, None, termination_ends_episode)[0]
    path = folder / f"{name}.hdf5"
    with h5py.File(path, "w") as file:
        for column, x in rows.items():
            file[column] = x
    steps = LIMIT if name == "no_timeouts" else None
    return datasets.load(str(path), env_steps=steps).transitions


@pytest.mark.parametrize("name", OURS_ONLY)
def test_transitions_are_those_of_the_authors_loaders(name, tmp_path):
    arrays = parity.fixture("loading")[name]
    theirs, iql, fql = (parity.under(arrays, part) for part in ("d4rl", "iql", "fql"))
    transitions = load(name, parity.under(arrays, "rows"), tmp_path)

    our_rows = transitions.observation[:, 2].astype(int)
    their_rows = theirs["observations"][:, 2].astype(int)
    assert sorted({*our_rows} - {*their_rows}) == OURS_ONLY[name]
    assert sorted({*their_rows} - {*our_rows}) == THEIRS_ONLY[name]

    both, ours, same = np.intersect1d(our_rows, their_rows, return_indices=True)
    assert len(both) > 45
    assert np.array_equal(transitions.observation[ours], theirs["observations"][same])
    assert np.array_equal(transitions.action[ours], theirs["actions"][same])
    assert np.array_equal(transitions.reward[ours], theirs["rewards"][same])
    for masks in (iql["masks"], fql["masks"], 1.0 - theirs["terminals"]):
        assert np.array_equal(1.0 - transitions.termination[ours], masks[same])
    # After a termination nothing is read of the next step.
    goes_on = transitions.termination[ours] == 0
    ours, same = ours[goes_on], same[goes_on]
    assert np.array_equal(transitions.next_observation[ours], theirs["next_observations"][same])
    assert np.array_equal(transitions.next_action[ours], theirs["next_actions"][same])

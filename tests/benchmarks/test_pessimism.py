# SPDX-License-Identifier: Apache-2.0
"""More critics, less overestimation: a small version of the figure in benchmarks/pessimism.py."""

import json

import numpy as np
import pytest

from benchmarks import pessimism


def test_number_alone_makes_pessimistic(tmp_path):
    arguments = pessimism.Arguments(
        critics=(2, 20), seeds=(0,), updates=600, width=32, output=str(tmp_path / "small")
    )
    pessimism.main(arguments)
    record = json.loads((tmp_path / "small.json").read_text())
    few, many = record["rows"]
    assert few["critics"] == 2 and many["critics"] == 20
    # No true value is above 0. What the longer runs of the kept record show of the action is not
    # yet there after so few updates.
    assert few["least value"] > 3 > 1 > many["least value"]
    assert (tmp_path / "small.png").stat().st_size > 5000
    assert (tmp_path / "small.md").read_text() == pessimism.page(record)


def test_the_data_do_not_show_the_cost():
    data = pessimism.narrow_data()
    np.testing.assert_allclose(data.reward, -((data.action[:, 0] - 0.5) ** 2), rtol=1e-6)
    assert not data.action[:, 1:].any() and np.ptp(data.action[:, 0]) > 1.9
    action = np.array([[0.5, 0, 0, 0.05, 0, 0], [0.5, 0, -0.2, 0, 0, 0], [0, 0, 0, 0, 0, 1]])
    np.testing.assert_allclose(pessimism.reward_of(action), [0, -1, -1.25])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"critics": ()}, "--critics: name at least one"),
        ({"critics": (2, 0)}, "--critics (2, 0): must be at least 1"),
        ({"updates": 0}, "--updates 0: must be at least 1"),
        ({"output": "a.png"}, "--output a.png: must have no suffix"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(wrong, words, capsys):
    with pytest.raises(SystemExit) as leave:
        pessimism.main(pessimism.Arguments(**wrong))
    assert leave.value.code == 2
    assert words in capsys.readouterr().err

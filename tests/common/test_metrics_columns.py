# SPDX-License-Identifier: Apache-2.0
"""metrics.csv of a method that learns in several phases, each with metrics of its own."""

import pytest

from common.experiment.records import Records

SCORE = {"score": [1.5, 2.5]}


def written(folder, steps):
    """The rows of chunk boundaries; `steps`: {update: (metrics, scores)}."""
    records = Records(folder, (3, 7))
    for step, (metrics, scores) in steps.items():
        records.write_metrics(step, metrics, scores, {}, last=False)
    return records, (folder / "metrics.csv").read_text()


STEPS = {
    0: (None, None),
    10: ({"first": [0.1, 0.2]}, None),
    20: ({"second": [0.3, 0.4], "third": [5, 6]}, SCORE),
    30: ({"second": [0.5, 0.6], "third": [7, 8]}, None),
}
WHOLE = """\
update,seed,first,second,third,score,return,success,length
0,3,,,,,,,
0,7,,,,,,,
10,3,0.1,,,,,,
10,7,0.2,,,,,,
20,3,,0.3,5,1.5,,,
20,7,,0.4,6,2.5,,,
30,3,,0.5,7,,,,
30,7,,0.6,8,,,,
"""


def test_a_later_phase_adds_its_columns(tmp_path):
    _, text = written(tmp_path, STEPS)
    assert text == WHOLE


@pytest.mark.parametrize("start", [10, 20, 30])
def test_a_resumed_run_writes_the_same_file(tmp_path, start):
    records, _ = written(tmp_path, STEPS)
    records.resume(start)
    for step in range(start, 40, 10):
        metrics, scores = STEPS[step]
        records.write_metrics(step, metrics, scores, {}, last=False)
    assert (tmp_path / "metrics.csv").read_text() == WHOLE


def test_a_file_of_another_kind_is_left_alone(tmp_path, capsys):
    spoilt = "update,seed,first,scores\n10,3,0.1,\n"
    (tmp_path / "metrics.csv").write_text(spoilt)
    with pytest.raises(SystemExit):
        written(tmp_path, {20: STEPS[20]})
    assert "has other columns (update,seed,first,scores)" in capsys.readouterr().err
    assert (tmp_path / "metrics.csv").read_text() == spoilt

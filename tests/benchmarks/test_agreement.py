# SPDX-License-Identifier: Apache-2.0
"""benchmarks/agreement.py on made-up run folders: which published score belongs to which cell."""

import numpy as np
import pytest
from test_report import page, write_run

import agreement
import published
import readers

HOPPER = "local/mujoco/hopper-medium-v0"
CHEETAH = "local/mujoco/halfcheetah-medium-expert-v0"


def of(tmp_path):
    return agreement.cells(readers.find((tmp_path,))[0], published.load())


def test_a_cell_has_the_score_of_d4rls_set_of_the_same_name(tmp_path):
    """Whatever its updates are. The reference has CORL's TD3+BC at 60.37 and 10 % BC at 55.48."""
    write_run(tmp_path / "td3_bc", [50.0, 60.0], "td3_bc", updates=10, dataset=HOPPER)
    write_run(tmp_path / "ten", [44.0], "bc", dataset=HOPPER, fraction=0.1)
    found = {cell.label.split()[0]: cell for cell in of(tmp_path)}
    assert found["td3_bc"].score == 55 and found["td3_bc"].published == 60.37
    assert found["bc"].published == 55.48 and found["bc"].source == "CORL"


@pytest.mark.parametrize(
    "options",
    [
        {"dataset": "hopper-medium-v4.hdf5"},  # data that nobody made after D4RL's
        {"dataset": "local/pointmaze/umaze-v0"},
        {"dataset": HOPPER, "algorithm": "atac"},  # no source in the reference
        {"dataset": HOPPER, "env": "Hopper-v5"},
        {"dataset": "local/mujoco/hopper-random-v0"},  # no source for that set
    ],
)
def test_other_runs_have_none(tmp_path, options):
    write_run(tmp_path / "one", [10.0], **{"algorithm": "td3_bc"} | options)
    assert of(tmp_path) == []


def test_a_cell_with_a_lost_seed_is_left_out(tmp_path):
    write_run(tmp_path / "one", [10.0, None], "td3_bc", dataset=HOPPER)
    assert of(tmp_path) == []


def test_the_figures_by_hand():
    """Ranks 1 2 3 against 1 3 2: 1 - 6 * 2 / (3 * 8) = 0.5."""
    pairs = [(10.0, 20.0), (20.0, 60.0), (30.0, 50.0)]
    found = [agreement.Cell("x", str(i), *pair, "CORL") for i, pair in enumerate(pairs)]
    correlation, difference = agreement.figures_of(found)
    np.testing.assert_allclose([correlation, difference], [0.5, (10 + 40 + 20) / 3])
    text = agreement.words(found)
    assert "**0.50**" in text and "**23.3 points**" in text
    assert "x on 1 (20 against 60)" in text and "x on 2" not in text  # 20 points are not more


def test_two_cells_have_no_correlation():
    found = [agreement.Cell("x", str(i), 1.0, 2.0, "CORL") for i in range(2)]
    assert np.isnan(agreement.figures_of(found)[0])
    assert "correlation" not in agreement.words(found) and "**1.0 points**" in agreement.words(
        found
    )


def test_a_page_shows_it_under_our_score(tmp_path):
    for i, dataset in enumerate((HOPPER, CHEETAH)):
        write_run(tmp_path / "runs" / f"{i}", [50.0, 60.0], "td3_bc", dataset=dataset)
        write_run(tmp_path / "runs" / f"atac{i}", [30.0], "atac", dataset=dataset)
    text = page(tmp_path, html=True)
    assert "| 55.0 ± 5.0<br><sub>60.4</sub> |" in text and "| 30.0 (1 seed) |" in text
    assert "Over the 2 cells with a published score" in text
    html = (tmp_path / "out" / "page.html").read_text()
    assert "55.0 ± 5.0<br><sub>60.4</sub>" in html

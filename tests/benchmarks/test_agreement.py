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
        {"dataset": HOPPER, "env_steps": 100},
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
    """On set a ranks 1 2 3 against 1 3 2: 1 - 6 * 2 / (3 * 8) = 0.5; on set b they are equal.

    Over all six the ranks 1 2 3 4 5 6 stand against 1 3 2 4 5 6: 1 - 6 * 2 / (6 * 35) = 33 / 35.
    """
    pairs = [(10.0, 20.0), (20.0, 60.0), (30.0, 50.0), (80.0, 80.0), (90.0, 90.0), (99.0, 99.0)]
    found = [agreement.Cell(f"x{i}", "aaabbb"[i], *pair, "CORL") for i, pair in enumerate(pairs)]
    np.testing.assert_allclose(agreement.figures_of(found), [33 / 35, 0.75, (10 + 40 + 20) / 6])
    text = agreement.words(found)
    assert "**0.94**" in text and "**0.75**" in text and "**11.7 points**" in text
    assert "x1 on a (20 against 60)" in text and "x2 on a" not in text  # 20 points are not more


def test_shuffled_scores_keep_the_order_of_the_sets():
    """Two sets far apart: any shuffle has them in order, and within a set nothing."""
    pairs = [(i + 100 * (i > 4), 2 * i + 100 * (i > 4)) for i in range(10)]
    found = [agreement.Cell(f"x{i}", "aaaaabbbbb"[i], *pairs[i], "CORL") for i in range(10)]
    np.testing.assert_allclose(agreement.figures_of(found)[:2], 1)
    # Without an order within a set the expected ranks are 3 and 8: 1 - 6 * 10 * 4 / (10 * 99).
    np.testing.assert_allclose(agreement.shuffled(found), 1 - 240 / 990, atol=0.02)
    assert f"within each data set {agreement.shuffled(found):.2f})" in agreement.words(found)


def test_few_cells_of_a_set_say_nothing_of_an_order():
    """Three sets with one cell each have an order over all, and none within a set."""
    found = [agreement.Cell("x", str(i), float(i), 2.0 * i, "CORL") for i in range(3)]
    assert agreement.figures_of(found)[0] == 1 and np.isnan(agreement.figures_of(found)[1])
    assert "correlations within" not in agreement.words(found)


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

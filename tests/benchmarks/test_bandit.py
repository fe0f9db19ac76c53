# SPDX-License-Identifier: Apache-2.0
"""benchmarks/bandit.py agrees with Unifloral's evaluation.py on the same returns.

unifloral_bandit.json has what theirs made of returns of 12 policies (25 episodes each), all of them
above 0: means, standard deviations and bootstrap intervals over 4000 trials, and one bandit step by
step. Random numbers differ, so means are compared within their standard errors.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from test_report import write_run

import bandit
from benchmarks import report
from common.experiment import __main__ as program

THEIRS = json.loads(Path(__file__).with_name("unifloral_bandit.json").read_text())
ARMS = bandit.policies([np.array(x) for x in THEIRS["returns"]])
TOO_FAR = 5  # standard errors; 240 means are compared


# --- Beside Unifloral ---------------------------------------------------------------------------
@pytest.mark.parametrize("theirs", THEIRS["trials"], ids=lambda x: f"{x['subset']}-{x['alpha']}")
def test_the_score_after_every_pull_is_theirs(theirs):
    pulls = len(theirs["mean"])
    ours = bandit.run(ARMS, theirs["subset"], theirs["repeats"], pulls, theirs["alpha"])
    mean, half = bandit.summary(ours)
    error = np.hypot(ours.std(axis=0), theirs["std"]) / np.sqrt(theirs["repeats"])
    assert (abs(mean - theirs["mean"]) < TOO_FAR * error + 1e-3).all()
    widths = np.subtract(theirs["high"], theirs["low"]) / 2
    assert np.allclose(half, widths, rtol=0.25, atol=1e-3)  # 400 draws of theirs
    other = bandit.run(ARMS, theirs["subset"], theirs["repeats"], pulls, 100 * theirs["alpha"])
    far = abs(other.mean(axis=0) - theirs["mean"]) > TOO_FAR * error + 1e-3
    assert far.any()  # another exploration is noticed


def test_one_bandit_step_by_step_is_theirs():
    """Every arm that theirs played has the highest bound here, and the same policy is kept."""
    plays, totals = np.zeros(12, int), np.zeros(12)
    one = THEIRS["one"]
    for pull, (arm, episode, kept) in enumerate(zip(*one.values(), strict=True), 1):
        bounds = bandit.upper_bounds(plays, totals, pull, THEIRS["alpha"])
        assert bounds[arm] >= bounds.max() - 1e-4 * abs(bounds.max())
        assert pull > 12 or plays[arm] == 0  # every arm first
        plays[arm] += 1
        totals[arm] += ARMS.scores[arm, episode]
        assert ARMS.means[bandit.best_arm(plays, totals)] == pytest.approx(kept, abs=1e-3)


# --- By hand ------------------------------------------------------------------------------------
def test_a_policy_that_was_never_played_is_not_kept():
    """Scores below 0: after one pull the kept policy is the one that was played."""
    arms = bandit.policies([np.array([-30.0]), np.array([-10.0])])
    kept = bandit.run(arms, trials=400, pulls=2)
    assert {*kept[:, 0]} == {-30.0, -10.0} and abs(kept[:, 0].mean() + 20) < 3
    assert (kept[:, 1] == -10).all()


def test_policies_may_have_different_numbers_of_episodes():
    arms = bandit.policies([np.array([1.0, 3.0]), np.array([8.0])])
    assert arms.means.tolist() == [2.0, 8.0]
    kept = bandit.run(arms, trials=50, pulls=30)
    assert np.isfinite(kept).all() and (kept[:, -1] == 8).all()


# --- Report -------------------------------------------------------------------------------------
def episodes(folder, scores, update=20, which="last", starts="new"):
    lines = ["seed,update,which,starts,episode,score\n"]
    for seed, each in scores.items():
        lines += [f"{seed},{update},{which},{starts},{i},{x}\n" for i, x in enumerate(each)]
    (folder / "episodes.csv").write_text("".join(lines))


def page(tmp_path):
    options = {"output": tmp_path / "page", "protocol": "bandit"}
    report.main(report.Arguments((tmp_path / "runs",), **options))
    return (tmp_path / "page.md").read_text()


def test_the_page(tmp_path):
    for name, scores in (("a", {0: [10.0, 20.0], 1: [40.0, 40.0]}), ("b", {0: [5.0, 5.0]})):
        write_run(tmp_path / "runs" / name, [*map(np.mean, scores.values())], hidden=[len(scores)])
        episodes(tmp_path / "runs" / name, scores)
    write_run(tmp_path / "runs" / "c", [1.0], "iql")
    text = page(tmp_path)
    (line,) = (x for x in text.splitlines() if x.startswith("| bc |"))
    cells = [x.strip() for x in line.split("|")[1:-1]]
    assert cells[:3] == ["bc", "3", "2"] and cells[-1] == "40.0"
    assert cells[-2] == "40.0 ± 0.0" and 18 < float(cells[3].split(" ")[0]) < 22
    assert "runs/c has no episodes.csv" in text and (tmp_path / "page.png").exists()
    assert "--protocol bandit" in text


def test_choices_make_methods_and_numbers_make_policies(tmp_path):
    """BRAC-v, BRAC-p and BEAR; SQL and EQL; IDQL and IFQL; BC and 10%BC."""
    runs = [("brac", {"variant": x, "alpha": alpha}) for x in "vp" for alpha in (1.0, 5.0)]
    runs += [("brac", {"variant": "v", "divergence": "mmd"})]
    runs += [("ivr", {"variant": x}) for x in ("sql", "eql")]
    runs += [("idql", {"generator": x}) for x in ("ddpm", "flow")]
    runs += [("bc", {"fraction": x}) for x in (1.0, 0.1)]
    for i, (algorithm, config) in enumerate(runs):
        write_run(tmp_path / "runs" / f"{i}", [1.0], algorithm, **config)
        episodes(tmp_path / "runs" / f"{i}", {0: [1.0, 1.0]})
    lines = [x.split(" | ")[:2] for x in page(tmp_path).splitlines() if "1.0 ± 0.0" in x]
    assert {method.removeprefix("| "): int(policies) for method, policies in lines} == {
        **{"brac": 2, "brac variant=p": 2, "brac divergence=mmd": 1},
        **{"ivr": 1, "ivr variant=eql": 1, "idql": 1, "idql generator=flow": 1},
        **{"bc": 1, "bc fraction=0.1": 1},
    }


@pytest.mark.parametrize(
    ("made", "says"),
    [
        ({"update": 10}, "has episodes of update 10, not of the last one, 20"),
        ({"which": "best"}, "has episodes of the best policy, not of the last one"),
        ({"starts": "same"}, "has episodes on the start states of training, not on new ones"),
        (None, "has an episodes.csv that does not say of which policy its episodes are"),
    ],
)
def test_only_the_last_policy_on_new_starts_counts(tmp_path, made, says):
    write_run(tmp_path / "runs" / "good", [1.0], hidden=[1])
    episodes(tmp_path / "runs" / "good", {0: [1.0, 1.0]}, which="20")
    write_run(tmp_path / "runs" / "other", [99.0], hidden=[2])
    if made is None:  # as it was written before
        (tmp_path / "runs" / "other" / "episodes.csv").write_text("seed,episode,score\n0,0,99.0\n")
    else:
        episodes(tmp_path / "runs" / "other", {0: [99.0, 99.0]}, **made)
    text = page(tmp_path)
    assert f"runs/other {says}" in text
    (line,) = (x for x in text.splitlines() if x.startswith("| bc |"))
    assert line.startswith("| bc | 1 | 2 | 1.0 ± 0.0")


def test_a_seed_that_diverged_has_no_last_policy(tmp_path):
    write_run(tmp_path / "runs" / "a", [1.0, None])
    episodes(tmp_path / "runs" / "a", {0: [1.0, 1.0], 1: [99.0, 99.0]})
    text = page(tmp_path)
    assert "runs/a, seed 1: it diverged" in text and "| bc | 1 | 2 | 1.0 ± 0.0" in text


def test_without_episodes_one_line_says_how_to_get_them(tmp_path, capsys):
    write_run(tmp_path / "runs" / "a", [1.0])
    with pytest.raises(SystemExit) as stop:
        report.main(report.Arguments((tmp_path / "runs",), protocol="bandit"))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "--keep-episodes" in error


def test_keep_episodes_needs_evaluate(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        program.main([str(tmp_path), "--keep-episodes"])
    assert stop.value.code == 2 and "--evaluate N" in capsys.readouterr().err

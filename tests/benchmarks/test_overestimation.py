# SPDX-License-Identifier: Apache-2.0
"""benchmarks/overestimation.py: the two values of a small run, by other means."""

import json

import gymnasium
import helpers_runs as runs
import numpy as np
import pytest

from algorithms import iql, sac
from benchmarks import overestimation
from common import experiment

SMALL = ["--num-updates", "8", "--log-every", "4", "--eval-every", "4", "--eval-episodes", "1"]
SMALL += ["--hidden", "8", "--batch-size", "4", "--wandb", "disabled"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    argv = ["--dataset", runs.write_hdf5(root / "r.hdf5"), "--runs-dir", str(root / "runs"), *SMALL]
    runs.start("sac", [*argv, "--keep", "all", "--num-critics", "3"])
    return runs.only_run(root / "runs")


def test_the_page_of_a_run(folder, tmp_path):
    output = tmp_path / "small"
    arguments = overestimation.Arguments((str(folder),), episodes=2, output=str(output))
    overestimation.main(arguments)
    record = json.loads(output.with_suffix(".json").read_text())
    assert [row["update"] for row in record["rows"]] == [4, 8]
    assert output.with_suffix(".png").stat().st_size > 5000
    assert output.with_suffix(".md").read_text() == overestimation.page(record)


def test_both_values_equal_those_of_an_episode_by_hand(folder):
    cfg, dataset, state = experiment.load(sac, folder, 8)
    promised, earned, score = overestimation.play(sac, cfg, dataset, state, episodes=2)
    policy = experiment.load_policy(sac, folder, 8)
    env = gymnasium.make("Pendulum-v1", max_episode_steps=10)
    for number in range(2):
        observation, _ = env.reset(seed=overestimation.STARTS + number)
        policy.reset()
        rewards, action = [], policy.act(observation)
        values = [
            sac.ReluCritic(cfg.hidden).apply(
                {
                    "params": {
                        name: one_critic(x, k) for name, x in state.critic.params["params"].items()
                    }
                },
                observation,
                action / 2,  # a critic's actions are in [-1, 1], the env's in [-2, 2]
            )
            for k in range(3)
        ]
        np.testing.assert_allclose(promised[number], np.min(values), rtol=1e-5)
        over = False
        while not over:
            observation, reward, termination, truncation, _ = env.step(action)
            rewards.append(reward)
            action, over = policy.act(observation), termination or truncation
        np.testing.assert_allclose(earned[number], np.array(rewards) @ 0.99 ** np.arange(10), 1e-5)
        np.testing.assert_allclose(score[number], dataset.score(sum(rewards)), rtol=1e-5)


def one_critic(layer, k):
    """Parameters of a layer of the k-th critic of the first seed."""
    return {name: x[0, k] for name, x in layer.items()}


def test_bad_input_is_one_line(folder, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    cloned = tmp_path / "cloned"
    cloned.mkdir()
    (cloned / "result.json").write_text('{"algorithm": "bc"}')
    for arguments, words in [
        (overestimation.Arguments(()), "name at least one run folder"),
        (overestimation.Arguments((str(folder),), episodes=0), "--episodes 0: must be at least 1"),
        (overestimation.Arguments((str(folder),), output="a.png"), "--output a.png"),
        (overestimation.Arguments((str(other),)), f"{other}: no finished run"),
        (overestimation.Arguments((str(cloned),)), "a run of bc; this takes runs of sac, sac_n"),
    ]:
        with pytest.raises(SystemExit) as leave:
            overestimation.main(arguments)
        assert leave.value.code == 2 and words in capsys.readouterr().err


def test_values_of_another_unit_are_refused(folder, capsys):
    cfg, dataset, _ = experiment.load(sac, folder, 8)
    scaled = iql.Config(return_scale=1000.0)
    with pytest.raises(SystemExit):
        overestimation.refuse_what_has_other_units(folder, scaled, dataset)
    assert "return_scale is 1000.0" in capsys.readouterr().err
    dataset.make_env = None
    with pytest.raises(SystemExit):
        overestimation.refuse_what_has_other_units(folder, cfg, dataset)
    assert "has no env" in capsys.readouterr().err
